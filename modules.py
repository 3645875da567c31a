"""The networks: the UNet of DDPM (Ho et al. 2020, https://arxiv.org/abs/2006.11239), the same conditioned on
labels or captions, a classifier of noisy images, an autoencoder, whose latents can take the place of pixels
(LDM, Rombach et al. 2022, https://arxiv.org/abs/2112.10752), and the average of a network's weights.

Every UNet is called as `net(x_t, t, y=None) -> out`, out shaped as x_t, or with twice the channels. What
`out` means (the noise, the clean image, v, or the first two) is the business of ddpm.Diffusion.
"""

import copy
import math
from collections import OrderedDict
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from support.errors import UserError
from support.generators import randn_like
from support.settings import COUNT, OLDER, SWITCH, real, setting, settings, whole
from support.text import END, PAD


@settings()
class NetworkSettings:  # None: by image size, see default_network in support/launch.py
    width: int | None = setting(None, "channels of level 0", "N", whole(4))
    multipliers: list | None = setting(None, "multiples of the width, one a level", "M", COUNT, nargs="+")
    blocks: int | None = setting(None, "residual blocks a level", "N", COUNT)
    attention: list | None = setting(None, "levels with attention, from 1 on", "LEVEL", int, nargs="*")
    dropout: float = setting(0.0, "probability of dropping a feature", "P", real(0, 1))
    patch: int | None = setting(None, "side of the squares of pixels that are one position", "N", COUNT)
    places: bool = setting(False, "attention knows where a position is (default: for shapes)", action=SWITCH)
    adagn: bool = setting(False, "AdaGN (default: for shapes)", action=SWITCH, of="task=diffusion/classifier")


def timestep_embedding(t: torch.Tensor, dim: int, shift: int = 1) -> torch.Tensor:
    """Sinusoids `[sin(t w_i), cos(t w_i)]`, `w_i = 10000^(-i / (dim/2 - shift))`; t (B,) -> (B, dim).

    Vaswani et al. 2017, section 3.5; shift is 1 in the code of DDPM. dim must be even and at least 4.
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(10000.0) / (half - shift) * torch.arange(half, device=t.device))
    angles = t.float()[:, None] * frequencies  # (B, half)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class GroupNorm(nn.GroupNorm):
    """GroupNorm in float32, with min(32, channels // 4) groups, or the next smaller divisor of `channels`."""

    def __init__(self, channels: int):
        most = max(1, min(32, channels // 4))
        super().__init__(next(n for n in range(most, 0, -1) if channels % n == 0), channels, eps=1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)  # as x; bfloat16 is slow on a CPU


def init_layer(layer: nn.Module, zero: bool = False) -> nn.Module:
    """Ho et al.'s initialisation: Xavier-uniform weights, or zeros to end a residual branch; zero bias."""
    nn.init.zeros_(layer.weight) if zero else nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class ResidualBlock(nn.Module):
    """GroupNorm-SiLU-Conv twice, the time embedding added in between; (B, c_in, H, W) -> (B, c_out, H, W).

    With emb_dim = 0 there is no time. With adagn the time embedding scales and shifts what the second
    GroupNorm gives: (1 + scale) GroupNorm(h) + shift (Dhariwal & Nichol 2021, section 3.1).
    """

    def __init__(self, c_in: int, c_out: int, emb_dim: int, dropout: float = 0.0, adagn: bool = False):
        super().__init__()
        self.norm1, self.conv1 = GroupNorm(c_in), init_layer(nn.Conv2d(c_in, c_out, 3, padding=1))
        self.time = init_layer(nn.Linear(emb_dim, (1 + adagn) * c_out)) if emb_dim else None
        self.norm2, self.adagn = GroupNorm(c_out), adagn and emb_dim > 0
        self.conv2 = init_layer(nn.Conv2d(c_out, c_out, 3, padding=1), zero=True)
        self.dropout = nn.Dropout(dropout)
        self.shortcut = init_layer(nn.Conv2d(c_in, c_out, 1)) if c_in != c_out else nn.Identity()

    def forward(self, x: torch.Tensor, emb: torch.Tensor | None) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x)))  # (B, c_out, H, W)
        emb = 0 if self.time is None else self.time(F.silu(emb))[:, :, None, None]  # (B, c_out, 1, 1)
        if self.adagn:
            scale, shift = emb.chunk(2, dim=1)  # emb has 2 c_out here: (B, c_out, 1, 1) each
            h = (1 + scale) * self.norm2(h) + shift  # (B, c_out, H, W)
        else:
            h = self.norm2(h + emb)  # (B, c_out, H, W)
        return self.shortcut(x) + self.conv2(self.dropout(F.silu(h)))  # (B, c_out, H, W)


Context = tuple[torch.Tensor, torch.Tensor]  # encoded tokens (B, L, D), and which are no padding (B, L)


class Attention(nn.Module):
    """Self-attention over the H x W positions, added to its input, (B, C, H, W).

    With a context its L tokens are further keys and values (GLIDE, Nichol et al. 2021, section 4.1). Each of
    the heads has C / heads of the channels (Vaswani et al. 2017, section 3.2.2); DDPM has one. With `places`
    it also reads sines and cosines of where each position is, as words are read (their section 3.5).
    """

    def __init__(self, channels: int, context_dim: int = 0, heads: int = 1, places: bool = False):
        super().__init__()
        self.norm, self.heads = GroupNorm(channels), heads
        self.place = nn.Conv2d(8, channels, 1) if places else None
        self.q, self.k, self.v = (init_layer(nn.Conv2d(channels, channels, 1)) for _ in range(3))
        self.out = init_layer(nn.Conv2d(channels, channels, 1), zero=True)
        self.context = init_layer(nn.Linear(context_dim, 2 * channels)) if context_dim else None

    def forward(self, x: torch.Tensor, context: Context | None = None) -> torch.Tensor:
        h, mask, dtype = self.norm(x), None, self.out.weight.dtype  # (B, C, H, W)
        if self.place is not None:
            lines = (torch.linspace(-math.pi / 2, math.pi / 2, n, device=x.device) for n in h.shape[2:])
            angles = torch.stack(torch.meshgrid(*lines, indexing="ij"))  # (2, H, W), of y and of x
            waves = angles.sin(), angles.cos(), (2 * angles).sin(), (2 * angles).cos()  # (2, H, W) each
            h = h + self.place(torch.cat(waves)[None].to(h.dtype))  # of (1, 8, H, W); (B, C, H, W)
        q, k, v = (f(h).flatten(2).transpose(1, 2) for f in (self.q, self.k, self.v))  # (B, HW, C)
        if context is not None:
            tokens, real = context  # (B, L, D), (B, L)
            k_text, v_text = self.context(tokens).chunk(2, dim=-1)  # (B, L, C) each
            k, v = torch.cat([k, k_text], dim=1), torch.cat([v, v_text], dim=1)  # (B, HW + L, C)
            mask = torch.cat([real.new_ones(q.shape[:2]), real], dim=1)[:, None, None]  # (B, 1, 1, HW + L)
        # (B, heads, HW, d) for q and h, (B, heads, HW + L, d) for k and v, where d = C / heads
        q, k, v = (z.to(dtype).unflatten(2, (self.heads, -1)).transpose(1, 2) for z in (q, k, v))
        with torch.autocast("cpu", enabled=False):  # a CPU is slow in bfloat16 here, above all backward
            h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # softmax(q k' / sqrt(d)) v
        return x + self.out(h.transpose(2, 3).reshape(x.shape))  # (B, C, H, W)


class UNetBlock(nn.Module):
    """A residual block, followed by attention where the level has it; (B, c_in, H, W) -> (B, c_out, H, W)."""

    recompute = True  # in the backward pass, with --checkpointing

    def __init__(self, c_in, c_out, emb_dim: int, attention: bool, context_dim: int, places=False, **block):
        super().__init__()
        self.block = ResidualBlock(c_in, c_out, emb_dim, **block)
        self.attention = Attention(c_out, context_dim, places=places) if attention else None

    def forward(self, x: torch.Tensor, emb=None, context: Context | None = None) -> torch.Tensor:
        h = self.block(x, emb)  # (B, c_out, H, W)
        return h if self.attention is None else self.attention(h, context)  # (B, c_out, H, W)


class Encoder(nn.Module):
    """The UNet's way down and its middle, which the classifier shares: (B, C, H, W) and t (B,) -> features.

    patch x patch pixels are the channels of one position (Hoogeboom et al. 2023). Level i has width *
    multipliers[i] channels at 1 / 2^i of that resolution and `blocks` residual blocks; `own` are dropout,
    adagn and places. `attention` lists the levels with self-attention, which the middle always has, and level
    0 never: it costs sixteen times that of level 1. ValueError where `divisor` does not divide H and W.
    """

    timed = skipped = True  # whether blocks get the time, and on the way up skips; not in an autoencoder
    context_dim = 0  # size of the tokens in the context, where a network has one

    def __init__(self, channels=3, width=64, multipliers=(1, 2, 4), blocks=2, attention=(1,), patch=1, **own):
        super().__init__()
        if width < 4 or width % 2 or min(blocks, patch) < 1 or not multipliers or min(multipliers) < 1:
            raise ValueError("width must be even and >= 4; blocks, patch and all of the multipliers >= 1")
        if any(not 0 < level < len(multipliers) for level in attention):
            raise ValueError(f"attention levels must lie in 1..{len(multipliers) - 1}; level 0 has none")
        self.width, self.patch, self.emb_dim = width, patch, 4 * width * self.timed
        self.divisor = patch * 2 ** (len(multipliers) - 1)
        self.levels = [(width * m, level in attention) for level, m in enumerate(multipliers)]
        self.block = partial(UNetBlock, emb_dim=self.emb_dim, context_dim=self.context_dim, **own)

        if self.timed:
            first, second = (init_layer(nn.Linear(n, 4 * width)) for n in (width, 4 * width))
            self.time_mlp = nn.Sequential(first, nn.SiLU(), second)
        self.conv_in = init_layer(nn.Conv2d(channels * patch**2, width, 3, padding=1))
        self.skip_channels = [width]  # of every output that the UNet keeps as a skip
        self.down, self.downsample = nn.ModuleList(), nn.ModuleList()
        for level, (c, has_attention) in enumerate(self.levels):
            self.down.append(nn.ModuleList())
            for _ in range(blocks):
                self.down[level].append(self.block(self.skip_channels[-1], c, attention=has_attention))
                self.skip_channels.append(c)
            if level < len(multipliers) - 1:
                # halves H and W; padded as TensorFlow's "SAME" pads, right and bottom by one
                conv = init_layer(nn.Conv2d(c, c, 3, stride=2))
                self.downsample.append(nn.Sequential(OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=conv)))
                self.skip_channels.append(c)
        self.middle = nn.ModuleList([self.block(c, c, attention=True), self.block(c, c, attention=False)])

    def embed(self, t: torch.Tensor, y: torch.Tensor | None) -> tuple[torch.Tensor, Context | None]:
        """What every block gets besides the image: the embedded time (B, 4 * width), and a context or None.

        Conditional networks override this method, and only this one; here y is not used.
        """
        return self.time_mlp(timestep_embedding(t, self.width).to(self.conv_in.weight.dtype)), None

    def encode(self, x: torch.Tensor, emb: torch.Tensor | None = None, context: Context | None = None):
        """The output of the middle, (B, width * multipliers[-1], H / divisor, W / divisor), and the skips."""
        size = tuple(x.shape[-2:])
        if size[0] % self.divisor or size[1] % self.divisor:
            raise ValueError(f"image {size}: height and width must be divisible by {self.divisor}")
        h = self.conv_in(F.pixel_unshuffle(x, self.patch))  # (B, width, H, W), now counted in patches
        skips = [h]  # of skip_channels
        for level, blocks in enumerate(self.down):
            for block in blocks:
                h = block(h, emb, context)  # (B, width * m, H / 2^level, W / 2^level)
                skips.append(h)
            if level < len(self.downsample):
                h = self.downsample[level](h)  # (B, width * m, H / 2^(level + 1), W / 2^(level + 1))
                skips.append(h)
        for block in self.middle:
            h = block(h, emb, context)  # (B, width * multipliers[-1], H / divisor, W / divisor)
        return h, skips


class UNet(Encoder):
    """The UNet of Ho et al. 2020, appendix B: `net(x_t, t) -> out`, (B, C, H, W) and (B,) -> (B, C, H, W).

    The Encoder's way down and middle, and a way up with blocks + 1 residual blocks a level. Each block of the
    way up also takes a skip. It ends in outputs * C channels. The other arguments are the Encoder's.
    """

    def __init__(self, *encoder, outputs=1, **more):
        super().__init__(*encoder, **more)
        c, skips = self.skip_channels[-1], list(self.skip_channels)
        self.up, self.upsample = nn.ModuleList(), nn.ModuleList()
        for level, (c_out, has_attention) in reversed(list(enumerate(self.levels))):
            self.up.append(nn.ModuleList())
            for _ in range(len(self.down[level]) + 1):
                c += skips.pop() if self.skipped else 0
                self.up[-1].append(self.block(c, c_out, attention=has_attention))
                c = c_out
            if level > 0:
                repeat, conv = nn.Upsample(scale_factor=2.0), init_layer(nn.Conv2d(c, c, 3, padding=1))
                self.upsample.append(nn.Sequential(OrderedDict(nearest=repeat, conv=conv)))

        out = nn.Conv2d(c, outputs * self.conv_in.in_channels, 3, padding=1)
        self.norm_out, self.conv_out = GroupNorm(c), init_layer(out, zero=True)

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        emb, context = self.embed(t, y)  # (B, 4 * width), and tokens (B, L, D) or None
        return self.ascend(*self.encode(x, emb, context), emb, context)  # (B, outputs * C, H, W)

    def ascend(self, h: torch.Tensor, skips=(), emb=None, context: Context | None = None) -> torch.Tensor:
        """The way up from the middle, h, to the output (B, outputs * C, H, W)."""
        for i, blocks in enumerate(self.up):
            for block in blocks:
                h = torch.cat([h, skips.pop()], dim=1) if skips else h  # (B, c + c_skip, ...)
                h = block(h, emb, context)  # (B, width * m, H / 2^level, W / 2^level)
            if i < len(self.upsample):
                h = self.upsample[i](h)  # twice the height and width
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(h))), self.patch)  # (B, outputs * C, H, W)


class PublishedUNet(UNet):
    """The UNet as published weights know it: they count time from 0, and say how its parts are made.

    Called as every network here, with t in 1..T. `norm_groups` and `norm_eps` are of every GroupNorm. In the
    `form` of an LDM a head has head_dim channels, the embedding of t has its cosines first and a shift of 0,
    and convolutions that halve pad each side by padding = 1. The other arguments are the UNet's.
    """

    def __init__(self, norm_groups: int, norm_eps: float, *unet, form: dict | None = None, **more):
        super().__init__(*unet, **more)
        self.form = {"head_dim": None, "cosines": False, "shift": 1, "padding": 0, **(form or {})}
        set_norms(self, norm_groups, norm_eps)
        for attention in (module for module in self.modules() if isinstance(module, Attention)):
            attention.heads = attention.q.out_channels // (self.form["head_dim"] or attention.q.out_channels)
        for halving in self.downsample if self.form["padding"] else ():
            halving.pad = nn.ZeroPad2d(self.form["padding"])

    def embed(self, t: torch.Tensor, y: torch.Tensor | None) -> tuple[torch.Tensor, Context | None]:
        emb = timestep_embedding(t - 1, self.width, self.form["shift"])  # t of 1..T is their 0..T-1
        emb = emb.roll(self.width // 2, dims=1) if self.form["cosines"] else emb
        return self.time_mlp(emb.to(self.conv_in.weight.dtype)), None


def set_norms(net: nn.Module, groups: int, eps: float) -> None:
    for norm in (module for module in net.modules() if isinstance(module, GroupNorm)):
        norm.num_groups, norm.eps = groups, eps


class ConditionalUNet(UNet):
    """The UNet conditioned on a label: `net(x_t, t, y) -> out`, y (B,) int64 of 0..num_classes - 1.

    y = num_classes is the null label, "no label" (Ho & Salimans 2022), and so is y = None. The embedding
    starts at zero: the network then is the UNet, bit for bit. The other arguments are the UNet's.
    """

    def __init__(self, num_classes: int, *unet, **more):
        super().__init__(*unet, **more)
        # 2.a label embedding: a row for each class, and the last for the null label
        self.num_classes = num_classes
        self.label_embedding = nn.Embedding(num_classes + 1, self.emb_dim)
        nn.init.zeros_(self.label_embedding.weight)

    def null(self, y: torch.Tensor) -> torch.Tensor:
        """The null label for each image of a batch; shaped as y (B,)."""
        return torch.full_like(y, self.num_classes)

    def embed(self, t: torch.Tensor, y: torch.Tensor | None) -> tuple[torch.Tensor, Context | None]:
        emb, context = super().embed(t, y)
        y = self.null(t) if y is None else y
        return emb + self.label_embedding(y).to(emb.dtype), context  # 2.a: added to the time embedding


class TextUNet(UNet):
    """The UNet conditioned on a caption (GLIDE, Nichol et al. 2021, section 4.1): `net(x_t, t, y) -> out`.

    y (B, L) int64 holds each caption's tokens, then END, then PAD; L is at most `max_tokens`, and tokens are
    below `vocabulary`. A transformer encodes them; the last one, END, is added to the time embedding, and all
    are further keys and values of every attention. The empty caption, END alone, is the null condition, and
    so is y = None. The other arguments are the UNet's.
    """

    def __init__(self, vocabulary, max_tokens, *unet, text_width=128, text_layers=2, text_kernel=7, **more):
        self.context_dim = text_width  # which the layers are made with
        super().__init__(*unet, **more)
        self.token_embedding = nn.Embedding(vocabulary, text_width)
        self.position_embedding = nn.Embedding(max_tokens, text_width)
        nn.init.normal_(self.position_embedding.weight, std=0.1)  # a word is N(0, 1)
        self.token_embedding.weight.data[END] = 0  # at first END is what attention gathers, the words
        # Which words stand before a word, and which after it (wav2vec 2.0, Baevski et al. 2020, section 2).
        self.beside = nn.Conv1d(text_width, text_width, text_kernel, padding="same") if text_kernel else None
        layer = partial(nn.TransformerEncoderLayer, batch_first=True, norm_first=True, activation="gelu")
        sizes = (text_width, max(1, text_width // 32), 4 * text_width)  # of tokens; heads; hidden size
        self.transformer = nn.ModuleList(layer(*sizes, dropout=0.0) for _ in range(text_layers))
        self.text_norm = nn.LayerNorm(text_width)
        self.text_to_emb = init_layer(nn.Linear(text_width, self.emb_dim))

    def null(self, y: torch.Tensor) -> torch.Tensor:
        """The empty caption for each of a batch; shaped as y (B, L)."""
        empty = torch.full_like(y, PAD)
        empty[:, 0] = END
        return empty

    def embed(self, t: torch.Tensor, y: torch.Tensor | None) -> tuple[torch.Tensor, Context | None]:
        y = self.null(t[:, None]) if y is None else y  # (B, L)
        real = y != PAD  # (B, L)
        h = self.token_embedding(y) + self.position_embedding.weight[: y.shape[1]]  # (B, L, text_width)
        if self.beside is not None:
            h = h + self.beside((h * real[:, :, None]).transpose(1, 2)).transpose(1, 2)  # (B, L, text_width)
        for layer in self.transformer:
            h = layer(h, src_key_padding_mask=~real)  # (B, L, text_width)
        tokens = self.text_norm(h)  # (B, L, text_width)
        last = tokens[torch.arange(len(y), device=y.device), real.sum(1) - 1]  # (B, text_width), END
        return super().embed(t, y)[0] + self.text_to_emb(last), (tokens, real)


class Classifier(Encoder):
    """p(y | x_t), a classifier that knows how noisy its image is: `net(x_t, t) -> logits` (B, num_classes).

    The Encoder, with its other arguments, averaged over the image (Dhariwal & Nichol 2021, section 4.3).
    """

    def __init__(self, num_classes: int, *encoder, **more):
        super().__init__(*encoder, **more)
        c = self.skip_channels[-1]
        self.norm_out, self.head = GroupNorm(c), init_layer(nn.Linear(c, num_classes))

    def features(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """What the logits are made of, (B, width * multipliers[-1])."""
        h, _ = self.encode(x, *self.embed(t, None))  # (B, width * multipliers[-1], H / divisor, W / divisor)
        return F.silu(self.norm_out(h)).mean((2, 3))  # (B, width * multipliers[-1])

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        return self.head(self.features(x, t))  # (B, num_classes)


class Autoencoder(UNet):
    """Two halves of a UNet with a latent z between them: `net(x) -> x_hat, mean, log-variance of q(z | x)`.

    It has neither time nor skips. `encode(x)`, x (B, C, H, W), gives the mean and the log-variance, each
    (B, latent_channels, H / divisor, W / divisor); `decode(z)` is an image (B, C, H, W) (Kingma & Welling
    2014; LDM, section 3.1). The other arguments are the Encoder's.
    """

    timed = skipped = False

    def __init__(self, latent_channels: int = 4, *encoder, **more):
        super().__init__(*encoder, **more)
        c, self.latent_channels = self.skip_channels[-1], latent_channels
        self.norm_z, self.conv_z = GroupNorm(c), init_layer(nn.Conv2d(c, 2 * latent_channels, 3, padding=1))
        self.conv_up = init_layer(nn.Conv2d(latent_channels, c, 3, padding=1))
        self.middle_up = nn.Sequential(self.block(c, c, attention=True), self.block(c, c, attention=False))

    def moments(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv_z(F.silu(self.norm_z(super().encode(x)[0])))

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, log_variance = self.moments(x).chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)  # so that its exponential is finite

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return self.ascend(self.middle_up(self.conv_up(z)))

    def forward(self, x: torch.Tensor, generator=None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mean, log_variance = self.encode(x)  # (B, latent_channels, H / divisor, W / divisor) each
        z = mean + (log_variance / 2).exp() * randn_like(mean, generator)  # z ~ q(z | x): eq. 10
        return self.decode(z), mean, log_variance  # (B, C, H, W), and the latter two as z


class PublishedAutoencoder(Autoencoder):
    """The VQ autoencoder of published LDMs: z becomes the nearest of `codes` vectors before it is decoded.

    van den Oord et al. 2017, eq. 1 and 2. Its encoder knows no variance; a 1x1 convolution stands on either
    side of the quantiser. The other arguments are those of PublishedUNet and the Autoencoder.
    """

    def __init__(self, norm_groups, norm_eps, codes, latent_channels, *encoder, **more):
        super().__init__(latent_channels, *encoder, **more)
        self.conv_z = nn.Conv2d(self.conv_z.in_channels, latent_channels, 3, padding=1)
        self.before, self.after = (nn.Conv2d(latent_channels, latent_channels, 1) for _ in range(2))
        self.codebook = nn.Embedding(codes, latent_channels)
        set_norms(self, norm_groups, norm_eps)

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z = self.before(self.moments(x))
        return z, torch.full_like(z, -math.inf)  # variance 0

    def quantise(self, z: torch.Tensor) -> torch.Tensor:
        """The vector of the codebook nearest to z (B, C, H, W) at each position; shaped as z."""
        nearest = torch.cdist(z.permute(0, 2, 3, 1).flatten(0, 2), self.codebook.weight).argmin(1)  # eq. 1
        return self.codebook(nearest).view(len(z), *z.shape[2:], -1).permute(0, 3, 1, 2)  # eq. 2

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return super().decode(self.after(self.quantise(z)))


class Pixels:
    """Pixel space: x_0 (B, *shape) is the image. `factor` pixels along its side are one value of x_0."""

    def __init__(self, shape: tuple[int, int, int]):
        self.shape, self.factor = shape, 1

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def decode(self, x_0: torch.Tensor) -> torch.Tensor:
        return x_0.cpu()


class Latents:
    """Latent space: x_0 = scale E(x), of variance 1, and the image is D(x_0 / scale) (LDM, appendix G).

    E is the mean of q(z | x). `size` is the image's, in pixels. Images go through E and D a few at a time.
    """

    def __init__(self, autoencoder: Autoencoder, scale: float, size: int, device):
        self.autoencoder, self.scale, self.device = autoencoder, scale, device
        self.factor, self.few = autoencoder.divisor, max(1, 2**18 // size**2)
        self.shape = (autoencoder.latent_channels, size // self.factor, size // self.factor)

    @torch.no_grad()
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) -> x_0 (B, *shape)."""
        parts = (few.to(self.device) for few in x.split(self.few))
        return self.scale * torch.cat([self.autoencoder.encode(few)[0] for few in parts])

    @torch.no_grad()
    def decode(self, x_0: torch.Tensor) -> torch.Tensor:
        """Latents, clean or noisy, (..., *shape) -> images (..., C, H, W) on the CPU."""
        z = (x_0 / self.scale).to(self.device).reshape(-1, *self.shape)
        x = torch.cat([self.autoencoder.decode(few).cpu() for few in z.split(self.few)])
        return x.view(*x_0.shape[:-3], *x.shape[1:])


def make_network(config: dict) -> nn.Module:
    """The network that the settings of a run describe, of the run's kind; UserError if they make none."""
    config = OLDER | config
    kind, make = config.get("kind"), UNet
    channels = config["latent_channels" if config.get("latent") else "channels"]
    if kind == "published":
        make = partial(PublishedUNet, config["norm_groups"], config["norm_eps"], form=config["form"])
    elif kind == "published_autoencoder":
        given = (config[key] for key in ("norm_groups", "norm_eps", "codes", "latent_channels"))
        make = partial(PublishedAutoencoder, *given)
    elif kind == "autoencoder":
        make = partial(Autoencoder, config["latent_channels"])
    elif kind == "classifier":
        make = partial(Classifier, len(config["class_names"]))
    elif kind == "ddpm_conditional" and config["condition"] == "text":
        words, max_tokens = config["vocabulary"]["words"], config["vocabulary"]["max_tokens"]
        make = partial(TextUNet, END + 1 + len(words), max_tokens, text_kernel=config["text_kernel"])
    elif kind == "ddpm_conditional":
        make = partial(ConditionalUNet, len(config["class_names"]))
    if config.get("prediction") == "dual" and config["task"] == "diffusion":
        make = partial(make, outputs=2)  # an eps and an x_0
    try:
        return make(channels, **{name: config[name] for name in vars(NetworkSettings())})
    except ValueError as error:
        raise UserError(f"no network can be made of these settings: {error}") from None


class EMA:
    """Exponential moving average of a network's weights, in `self.net`: `ema <- d ema + (1 - d) net`.

    d = min(decay, (1 + step) / (10 + step)) after `step` updates, so the first weights are soon forgotten.
    """

    def __init__(self, net: nn.Module, decay: float = 0.999):
        self.net, self.decay = copy.deepcopy(net).eval().requires_grad_(False), decay

    @torch.no_grad()
    def update(self, net: nn.Module, step: int) -> None:
        d = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.net.parameters()), list(net.parameters()), 1 - d)
