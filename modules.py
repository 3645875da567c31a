"""The networks: the UNet of DDPM (Ho et al. 2020, https://arxiv.org/abs/2006.11239), the same conditioned on
labels or captions, a classifier of noisy images, and the average of a network's weights.

Every UNet is called as `net(x_t, t, y=None) -> out`, out shaped as x_t. What `out` means (the noise, the
clean image or v) is the business of ddpm.Diffusion; a network is only a function from image, time and
condition to image.
"""

import copy
import math
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


def timestep_embedding(t: torch.Tensor, dim: int) -> torch.Tensor:
    """Sinusoidal embedding `[sin(t w_i), cos(t w_i)]`, `w_i = 10000^(-i / (dim/2 - 1))`; t (B,) -> (B, dim).

    Vaswani et al. 2017, section 3.5, in the variant of the DDPM code; dim must be even and at least 4.
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(10000.0) / (half - 1) * torch.arange(half, device=t.device))  # (half,)
    angles = t.float()[:, None] * frequencies  # (B, half)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with min(32, channels // 4) groups, or the next smaller number that divides `channels`."""
    groups = max(1, min(32, channels // 4))
    while channels % groups:
        groups -= 1
    return nn.GroupNorm(groups, channels, eps=1e-6)


def init_layer(layer: nn.Module, zero: bool = False) -> nn.Module:
    """Ho et al.'s initialisation: Xavier-uniform weights, or zeros to end a residual branch; zero bias."""
    nn.init.zeros_(layer.weight) if zero else nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def conv3x3(c_in: int, c_out: int, zero: bool = False) -> nn.Conv2d:
    return init_layer(nn.Conv2d(c_in, c_out, 3, padding=1), zero)


class ResidualBlock(nn.Module):
    """GroupNorm-SiLU-Conv twice, the time embedding added in between; (B, c_in, H, W) -> (B, c_out, H, W)."""

    def __init__(self, c_in: int, c_out: int, emb_dim: int, dropout: float = 0.0):
        super().__init__()
        self.norm1, self.conv1 = group_norm(c_in), conv3x3(c_in, c_out)
        self.time = init_layer(nn.Linear(emb_dim, c_out))
        self.norm2, self.conv2 = group_norm(c_out), conv3x3(c_out, c_out, zero=True)
        self.dropout = nn.Dropout(dropout)
        self.shortcut = init_layer(nn.Conv2d(c_in, c_out, 1)) if c_in != c_out else nn.Identity()

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x)))  # (B, c_out, H, W)
        h = h + self.time(F.silu(emb))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.shortcut(x) + h


Context = tuple[
    torch.Tensor, torch.Tensor
]  # encoded tokens (B, L, D), and which of the L are no padding (B, L)


class Attention(nn.Module):
    """Single-head self-attention over the H x W positions, added to its input, (B, C, H, W).

    With a context its L tokens are further keys and values (GLIDE, Nichol et al. 2021, section 4.1).
    """

    def __init__(self, channels: int, context_dim: int = 0):
        super().__init__()
        self.norm = group_norm(channels)
        self.q, self.k, self.v = (init_layer(nn.Conv2d(channels, channels, 1)) for _ in range(3))
        self.out = init_layer(nn.Conv2d(channels, channels, 1), zero=True)
        self.context = init_layer(nn.Linear(context_dim, 2 * channels)) if context_dim else None

    def forward(self, x: torch.Tensor, context: Context | None = None) -> torch.Tensor:
        h, mask = self.norm(x), None
        q, k, v = (f(h).flatten(2).transpose(1, 2) for f in (self.q, self.k, self.v))  # (B, HW, C)
        if context is not None:
            tokens, real = context
            k_text, v_text = self.context(tokens).chunk(2, dim=-1)  # (B, L, C) each
            k, v = torch.cat([k, k_text], dim=1), torch.cat([v, v_text], dim=1)  # (B, HW + L, C)
            mask = torch.cat([real.new_ones(q.shape[:2]), real], dim=1)[:, None, None]  # (B, 1, 1, HW + L)
        # softmax(q k' / sqrt(C)) v, over the keys that are no padding
        h = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], attn_mask=mask)
        return x + self.out(h[:, 0].transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """Halve H and W by a strided convolution, padded as TensorFlow's "SAME" pads: right and bottom by one."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = init_layer(nn.Conv2d(channels, channels, 3, stride=2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double H and W by repeating pixels, then convolve."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = conv3x3(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Stage(nn.Module):
    """A residual block, followed by attention where the level has it."""

    def __init__(
        self, c_in: int, c_out: int, emb_dim: int, dropout: float, attention: bool, context_dim: int
    ):
        super().__init__()
        self.block = ResidualBlock(c_in, c_out, emb_dim, dropout)
        self.attention = Attention(c_out, context_dim) if attention else None

    def forward(self, x: torch.Tensor, emb: torch.Tensor, context: Context | None) -> torch.Tensor:
        h = self.block(x, emb)
        return h if self.attention is None else self.attention(h, context)


class Encoder(nn.Module):
    """The UNet's way down and its middle, which the classifier shares: (B, C, H, W) and t (B,) -> features.

    Level i has width * multipliers[i] channels at 1 / 2^i of the resolution and `blocks` residual blocks;
    `attention` lists the levels with self-attention, which the middle always has. H and W must be divisible
    by `self.divisor` = 2^(levels - 1), else ValueError. `context_dim` is the size of the tokens in the
    context, where a network has one.
    """

    def __init__(
        self,
        channels: int = 3,
        width: int = 64,
        multipliers: tuple[int, ...] = (1, 2, 4),
        blocks: int = 2,
        attention: tuple[int, ...] = (1,),
        dropout: float = 0.0,
        context_dim: int = 0,
    ):
        super().__init__()
        if width < 4 or width % 2 or blocks < 1 or not multipliers or min(multipliers) < 1:
            raise ValueError("width must be even and >= 4, blocks >= 1, multipliers a list of numbers >= 1")
        if any(not 0 < level < len(multipliers) for level in attention):
            raise ValueError(
                f"attention levels must lie between 1 (half resolution) and {len(multipliers) - 1}; "
                "there is none at full resolution, level 0"
            )
        self.width, self.divisor, self.emb_dim = width, 2 ** (len(multipliers) - 1), 4 * width
        self.stage = partial(Stage, emb_dim=self.emb_dim, dropout=dropout, context_dim=context_dim)

        self.time_mlp = nn.Sequential(
            init_layer(nn.Linear(width, self.emb_dim)),
            nn.SiLU(),
            init_layer(nn.Linear(self.emb_dim, self.emb_dim)),
        )
        self.conv_in = conv3x3(channels, width)
        c = width
        self.skip_channels = [c]  # of every output that the UNet keeps as a skip
        self.down, self.downsample = nn.ModuleList(), nn.ModuleList()
        for level, multiplier in enumerate(multipliers):
            stages = nn.ModuleList()
            for _ in range(blocks):
                stages.append(self.stage(c, width * multiplier, attention=level in attention))
                c = width * multiplier
                self.skip_channels.append(c)
            self.down.append(stages)
            if level < len(multipliers) - 1:
                self.downsample.append(Downsample(c))
                self.skip_channels.append(c)
        self.middle = nn.ModuleList([self.stage(c, c, attention=True), self.stage(c, c, attention=False)])
        self.checkpointing = False  # keep no activations inside stages, and compute them again when needed
        self.times: torch.Tensor | None = None  # (T+1, 4 * width) the embedded times, where they are kept

    @torch.no_grad()
    def keep_times(self, T: int) -> None:
        """Embed all times 0..T now, where the network is, rather than anew at every step of sampling.

        They serve until the network is set to train, or given other weights.
        """
        self.times = None
        self.times = self.embed_time(torch.arange(T + 1, device=self.conv_in.weight.device))

    def train(self, mode: bool = True) -> "Encoder":
        self.times = None if mode else self.times
        return super().train(mode)

    def load_state_dict(self, *weights, **options):
        self.times = None
        return super().load_state_dict(*weights, **options)

    def embed_time(self, t: torch.Tensor) -> torch.Tensor:
        """The embedded time (B, 4 * width) of t (B,)."""
        if self.times is not None:
            return self.times[t]
        return self.time_mlp(timestep_embedding(t, self.width).to(self.conv_in.weight.dtype))

    def embed(self, t: torch.Tensor, y: torch.Tensor | None) -> tuple[torch.Tensor, Context | None]:
        """What every stage is told besides the image: the embedded time (B, 4 * width), and a context.

        Here y is not used and there is no context: conditional networks override this.
        """
        return self.embed_time(t), None

    def run(self, stage: Stage, h: torch.Tensor, emb: torch.Tensor, context: Context | None) -> torch.Tensor:
        """One stage; with `checkpointing` its activations are computed again in the backward pass."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(stage, h, emb, context, use_reentrant=False)
        return stage(h, emb, context)

    def encode(
        self, x: torch.Tensor, emb: torch.Tensor, context: Context | None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The output of the middle, (B, width * multipliers[-1], H / divisor, W / divisor), and the skips."""
        if x.shape[-2] % self.divisor or x.shape[-1] % self.divisor:
            raise ValueError(
                f"image {tuple(x.shape[-2:])}: height and width must be divisible by {self.divisor}"
            )
        h = self.conv_in(x)  # (B, width, H, W)
        skips = [h]
        for level, stages in enumerate(self.down):
            for stage in stages:
                h = self.run(stage, h, emb, context)  # (B, width * m, H / 2^level, W / 2^level)
                skips.append(h)
            if level < len(self.downsample):
                h = self.downsample[level](h)
                skips.append(h)
        for stage in self.middle:
            h = self.run(stage, h, emb, context)
        return h, skips


class UNet(Encoder):
    """The UNet of Ho et al. 2020, appendix B: `net(x_t, t) -> out`, (B, C, H, W) and (B,) -> (B, C, H, W).

    The Encoder's way down and middle, and a way up with blocks + 1 residual blocks a level, each of which is
    also given a skip.
    """

    def __init__(
        self,
        channels: int = 3,
        width: int = 64,
        multipliers: tuple[int, ...] = (1, 2, 4),
        blocks: int = 2,
        attention: tuple[int, ...] = (1,),
        dropout: float = 0.0,
        context_dim: int = 0,
    ):
        super().__init__(channels, width, multipliers, blocks, attention, dropout, context_dim)
        c, skips = width * multipliers[-1], list(self.skip_channels)
        self.up, self.upsample = nn.ModuleList(), nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(multipliers))):
            stages = nn.ModuleList()
            for _ in range(blocks + 1):
                stages.append(self.stage(c + skips.pop(), width * multiplier, attention=level in attention))
                c = width * multiplier
            self.up.append(stages)
            if level > 0:
                self.upsample.append(Upsample(c))

        self.norm_out, self.conv_out = group_norm(c), conv3x3(c, channels, zero=True)

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        emb, context = self.embed(t, y)  # (B, 4 * width)
        h, skips = self.encode(x, emb, context)
        for i, stages in enumerate(self.up):
            for stage in stages:
                h = self.run(stage, torch.cat([h, skips.pop()], dim=1), emb, context)
            if i < len(self.upsample):
                h = self.upsample[i](h)
        return self.conv_out(F.silu(self.norm_out(h)))  # (B, C, H, W)


class PublishedUNet(UNet):
    """The UNet as published weights know it: they count time from 0, and say how its norms are made.

    Called as every network here, with t in 1..T. `norm_groups` and `norm_eps` are of every GroupNorm; the
    other arguments are the UNet's.
    """

    def __init__(self, norm_groups: int, norm_eps: float, *unet, **more):
        super().__init__(*unet, **more)
        for module in self.modules():
            if isinstance(module, nn.GroupNorm):
                module.num_groups, module.eps = norm_groups, norm_eps

    def embed(self, t: torch.Tensor, y: torch.Tensor | None) -> tuple[torch.Tensor, Context | None]:
        return super().embed(t - 1, y)  # t of 1..T is their 0..T-1


class ConditionalUNet(UNet):
    """The UNet told a label as well: `net(x_t, t, y) -> out`, y (B,) int64 of 0..num_classes - 1.

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


PAD, END = 0, 1  # the tokens that are no words: padding, and the end of every caption


class TextUNet(UNet):
    """The UNet told a caption, as in GLIDE (Nichol et al. 2021, section 4.1): `net(x_t, t, y) -> out`.

    y (B, L) int64 holds each caption's tokens, then END, then PAD; L is at most `max_tokens`, and tokens are
    below `vocabulary`. A transformer encodes them; the last one, END, is added to the time embedding, and all
    are further keys and values of every attention. The empty caption, END alone, is the null condition, and
    so is y = None. The other arguments are the UNet's.
    """

    def __init__(
        self, vocabulary: int, max_tokens: int, *unet, text_width: int = 128, text_layers: int = 2, **more
    ):
        super().__init__(*unet, **more, context_dim=text_width)
        self.max_tokens = max_tokens
        self.token_embedding = nn.Embedding(vocabulary, text_width)
        self.position_embedding = nn.Embedding(max_tokens, text_width)
        for embedding in (self.token_embedding, self.position_embedding):
            nn.init.normal_(embedding.weight, std=0.5**0.5)  # their sum has variance 1
        self.transformer = nn.ModuleList(
            nn.TransformerEncoderLayer(
                text_width,
                max(1, text_width // 32),
                4 * text_width,
                0.0,
                "gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(text_layers)
        )
        self.text_norm = nn.LayerNorm(text_width)
        self.text_to_emb = init_layer(nn.Linear(text_width, self.emb_dim))

    def null(self, y: torch.Tensor) -> torch.Tensor:
        """The empty caption for each of a batch; shaped as y (B, L)."""
        empty = torch.full_like(y, PAD)
        empty[:, 0] = END
        return empty

    def embed(self, t: torch.Tensor, y: torch.Tensor | None) -> tuple[torch.Tensor, Context | None]:
        emb, _ = super().embed(t, y)
        y = self.null(t[:, None]) if y is None else y  # (B, L)
        real = y != PAD
        h = self.token_embedding(y) + self.position_embedding.weight[: y.shape[1]]  # (B, L, text_width)
        for layer in self.transformer:
            h = layer(h, src_key_padding_mask=~real)
        tokens = self.text_norm(h)
        last = tokens[torch.arange(len(y), device=y.device), real.sum(1) - 1]  # (B, text_width), END
        return emb + self.text_to_emb(last), (tokens, real)


class Classifier(Encoder):
    """p(y | x_t), a classifier that knows how noisy its image is: `net(x_t, t) -> logits` (B, num_classes).

    The UNet's way down and middle, averaged over the image (Dhariwal & Nichol 2021, section 4.3). The other
    arguments are the UNet's.
    """

    def __init__(self, num_classes: int, *encoder, **more):
        super().__init__(*encoder, **more)
        c = self.skip_channels[-1]
        self.norm_out, self.head = group_norm(c), init_layer(nn.Linear(c, num_classes))

    def features(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """What the logits are made of, (B, width * multipliers[-1])."""
        h, _ = self.encode(x, *self.embed(t, None))
        return F.silu(self.norm_out(h)).mean((2, 3))

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        return self.head(self.features(x, t))


class PointMLP(nn.Module):
    """A network for points in the plane, `net(x_t, t) -> out`, (B, 2, 1, 1) and (B,) -> (B, 2, 1, 1).

    It sees sines and cosines of the coordinates beside them, or it would learn only slow changes over the
    plane (Fourier features, Tancik et al. 2020).
    """

    def __init__(self, width: int = 128):
        super().__init__()
        self.width = width
        self.register_buffer("frequencies", torch.tensor([0.5, 1.0, 2.0]) * math.pi)
        self.layers = nn.Sequential(
            *(nn.Linear(2 + 2 * 6 + width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()),
            *(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)),
        )

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        angles = (x.flatten(1)[:, :, None] * self.frequencies).flatten(1)  # (B, 6)
        time = timestep_embedding(t, self.width)  # (B, width)
        return self.layers(torch.cat([x.flatten(1), angles.sin(), angles.cos(), time], dim=1)).view(x.shape)


class EMA:
    """Exponential moving average of a network's weights, in `self.net`: `ema <- d ema + (1 - d) net`.

    d = min(decay, (1 + step) / (10 + step)), so that the first, random weights are soon forgotten (step
    counts the updates before this one).
    """

    def __init__(self, net: nn.Module, decay: float = 0.999):
        self.net = copy.deepcopy(net).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, net: nn.Module, step: int) -> None:
        d = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.net.parameters()), list(net.parameters()), 1 - d)
        for average, buffer in zip(self.net.buffers(), net.buffers(), strict=True):
            average.copy_(buffer)
