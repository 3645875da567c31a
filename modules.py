"""The networks: the UNet of DDPM (Ho et al. 2020, https://arxiv.org/abs/2006.11239) and the average of its
weights.

Every network is called as `net(x_t, t, y=None) -> out`, out shaped as x_t. What `out` means (the noise, the
clean image or v) is the business of ddpm.Diffusion; a network is only a function from image and time to
image.
"""

import copy
import math

import torch
import torch.nn as nn
import torch.nn.functional as F


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


class Attention(nn.Module):
    """Single-head self-attention over the H x W positions, added to its input, (B, C, H, W)."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.q, self.k, self.v = (init_layer(nn.Conv2d(channels, channels, 1)) for _ in range(3))
        self.out = init_layer(nn.Conv2d(channels, channels, 1), zero=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).transpose(1, 2) for f in (self.q, self.k, self.v))  # (B, HW, C)
        h = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])  # softmax(q k' / sqrt(C)) v
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

    def __init__(self, c_in: int, c_out: int, emb_dim: int, dropout: float, attention: bool):
        super().__init__()
        self.block = ResidualBlock(c_in, c_out, emb_dim, dropout)
        self.attention = Attention(c_out) if attention else nn.Identity()

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        return self.attention(self.block(x, emb))


class UNet(nn.Module):
    """The UNet of Ho et al. 2020, appendix B: `net(x_t, t) -> out`, (B, C, H, W) and (B,) -> (B, C, H, W).

    Level i has width * multipliers[i] channels at 1 / 2^i of the resolution, `blocks` residual blocks on the
    way down and blocks + 1 on the way up; `attention` lists the levels with self-attention, which the middle
    always has. H and W must be divisible by `self.divisor` = 2^(levels - 1), else ValueError. y is not used:
    conditional networks override `embed`. (The published weights count t from 0: with them, pass t - 1.)
    """

    def __init__(
        self,
        channels: int = 3,
        width: int = 64,
        multipliers: tuple[int, ...] = (1, 2, 4),
        blocks: int = 2,
        attention: tuple[int, ...] = (1,),
        dropout: float = 0.0,
    ):
        super().__init__()
        if width < 4 or width % 2 or blocks < 1 or not multipliers or min(multipliers) < 1:
            raise ValueError("width must be even and >= 4, blocks >= 1, multipliers a list of numbers >= 1")
        if any(not 0 < level < len(multipliers) for level in attention):
            raise ValueError(
                f"attention levels must lie between 1 (half resolution) and {len(multipliers) - 1}; "
                "there is none at full resolution, level 0"
            )
        self.width, self.divisor = width, 2 ** (len(multipliers) - 1)
        emb_dim, widths = 4 * width, [width * m for m in multipliers]

        def stage(c_in: int, c_out: int, attend: bool) -> Stage:
            return Stage(c_in, c_out, emb_dim, dropout, attend)

        self.time_mlp = nn.Sequential(
            init_layer(nn.Linear(width, emb_dim)), nn.SiLU(), init_layer(nn.Linear(emb_dim, emb_dim))
        )
        self.conv_in = conv3x3(channels, width)
        c, skips = width, [width]  # channels now, and of every output that is kept as a skip
        self.down, self.downsample = nn.ModuleList(), nn.ModuleList()
        for level, c_level in enumerate(widths):
            stages = nn.ModuleList()
            for _ in range(blocks):
                stages.append(stage(c, c_level, level in attention))
                c = c_level
                skips.append(c)
            self.down.append(stages)
            if level < len(widths) - 1:
                self.downsample.append(Downsample(c))
                skips.append(c)

        self.middle = nn.ModuleList([stage(c, c, True), stage(c, c, False)])

        self.up, self.upsample = nn.ModuleList(), nn.ModuleList()
        for level, c_level in reversed(list(enumerate(widths))):
            stages = nn.ModuleList()
            for _ in range(blocks + 1):
                stages.append(stage(c + skips.pop(), c_level, level in attention))
                c = c_level
            self.up.append(stages)
            if level > 0:
                self.upsample.append(Upsample(c))

        self.norm_out, self.conv_out = group_norm(c), conv3x3(c, channels, zero=True)

    def embed(self, t: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
        """What every residual block is told besides the image: the embedded time; (B,) -> (B, 4 * width)."""
        return self.time_mlp(timestep_embedding(t, self.width).to(self.conv_in.weight.dtype))

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        if x.shape[-2] % self.divisor or x.shape[-1] % self.divisor:
            raise ValueError(
                f"image {tuple(x.shape[-2:])}: height and width must be divisible by {self.divisor}"
            )
        emb = self.embed(t, y)  # (B, 4 * width)
        h = self.conv_in(x)  # (B, width, H, W)
        skips = [h]
        for level, stages in enumerate(self.down):
            for stage in stages:
                h = stage(h, emb)  # (B, width * m, H / 2^level, W / 2^level)
                skips.append(h)
            if level < len(self.downsample):
                h = self.downsample[level](h)
                skips.append(h)
        for stage in self.middle:
            h = stage(h, emb)
        for i, stages in enumerate(self.up):
            for stage in stages:
                h = stage(torch.cat([h, skips.pop()], dim=1), emb)
            if i < len(self.upsample):
                h = self.upsample[i](h)
        return self.conv_out(F.silu(self.norm_out(h)))  # (B, C, H, W)


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
