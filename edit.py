"""Editing images with a trained denoiser: the tasks of Berkeley CS180, project 5, on any run or weights.

    python edit.py sdedit --checkpoint RUN --image sketch.png --labels 3     towards a label, from a drawing
    python edit.py inpaint --checkpoint RUN --image photo.png --box 8,8,16,16
    python edit.py anagram --checkpoint RUN --labels 6,9 --view rotate180     one picture, read two ways
    python edit.py hybrid --checkpoint RUN --prompt "a red circle" "a blue star"
    python edit.py interpolate --checkpoint RUN --image a.png b.png
    python edit.py sds --checkpoint RUN --labels 3                           score distillation
    python edit.py restore --checkpoint RUN --image photo.png --problem super_resolve

Every edit makes or wraps a denoiser eps_theta(x_t, t), or stands before or between two segments of a sampler:
so each works with every sampler and guidance of the other scripts. Read it with SDEdit (Meng et al. 2022,
https://arxiv.org/abs/2108.01073), RePaint (Lugmayr et al. 2022, https://arxiv.org/abs/2201.09865), Visual
Anagrams (Geng et al. 2024, https://arxiv.org/abs/2311.17919), Factorized Diffusion (Geng et al. 2024,
https://arxiv.org/abs/2404.11615), DreamFusion (Poole et al. 2023, https://arxiv.org/abs/2209.14988) and DDNM
(Wang et al. 2023, https://arxiv.org/abs/2212.00490).
"""

import argparse
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur, rotate
from tqdm import tqdm

import ddpm
import ddpm_conditional
import utils
from ddpm import Denoiser, Diffusion, Generators, clip_x_0, ddim_stride, psnr, randn_like
from utils import UserError, real, whole

Sampler = Callable[..., Tensor]  # as in ddpm.SAMPLERS

# ------------------------------------------------------------------------------------------------------------
# 1. SDEdit: noise an image to some level, and denoise it


def sdedit(
    diffusion: Diffusion,
    sampler: Sampler,
    eps_theta: Denoiser,
    x_0: Tensor,
    timesteps: Sequence[int],
    generator: Generators = None,
) -> Tensor:
    """x_0 (B, C, H, W) noised to timesteps[0] and denoised from there (Meng et al. 2022, section 3)."""
    # Start: SDEdit
    t = torch.full((len(x_0),), timesteps[0], device=x_0.device)
    x_t, _ = diffusion.noise_images(x_0, t, generator)  # the later the start, the more of the image is kept
    return sampler(diffusion, eps_theta, x_t, timesteps, generator)
    # End


# ------------------------------------------------------------------------------------------------------------
# 2. Inpainting: what is known of an image takes the place of what the model makes there


def replacement(
    diffusion: Diffusion, eps_theta: Denoiser, x_0: Tensor, hole: Tensor, generator: Generators = None
) -> Denoiser:
    """The denoiser, shown the known pixels of x_0, as noisy as x_t, outside the hole (B or 1, 1, H, W).

    Song et al. 2021 (https://arxiv.org/abs/2011.13456), appendix I.2; RePaint, eq. 8. What it says there has
    no effect: the pixels are replaced before it is asked again, and at the end.
    """

    def eps_theta_inpainting(x_t: Tensor, t: Tensor) -> Tensor:
        known, _ = diffusion.noise_images(x_0, t, generator)  # eq. 8a: q(x_t | x_0), drawn anew at each t
        return eps_theta(torch.where(hole, x_t, known), t)  # eq. 8c

    return eps_theta_inpainting


def inpaint(
    diffusion: Diffusion,
    sampler: Sampler,
    eps_theta: Denoiser,
    x: Tensor,
    timesteps: Sequence[int],
    x_0: Tensor,
    hole: Tensor,
    generator: Generators = None,
    resample: int = 1,
    jump: int = 1,
) -> Tensor:
    """x at timesteps[0] -> x_0 with its hole filled, all (B, C, H, W), hole bool (RePaint, Algorithm 1).

    Plain replacement for resample = 1. Else each `jump` strides are taken `resample` times, x being noised
    again in between, so that what is in the hole and what is around it come to agree.
    """
    eps_theta = replacement(diffusion, eps_theta, x_0, hole, generator)
    # Start: RePaint
    for segment, times in segments(timesteps, resample, jump):
        for u in range(times):  # line 3
            x = sampler(diffusion, eps_theta, x, segment, generator)  # lines 4 to 8
            if u < times - 1:  # line 9
                x = noised_on(diffusion, x, segment[-1], segment[0], generator)  # line 10
    return torch.where(hole, x, x_0)
    # End


def segments(timesteps: Sequence[int], resample: int, jump: int) -> list[tuple[Sequence[int], int]]:
    """The parts of a sampler's way, and how often each is taken: the last stride, to t = 0, only once."""
    if resample == 1:
        return [(timesteps, 1)]
    down = timesteps[:-1]
    parts = [(down[i : i + jump + 1], resample) for i in range(0, len(down) - 1, jump)]
    return [*parts, (timesteps[-2:], 1)]


def noised_on(diffusion: Diffusion, x: Tensor, s: int, t: int, generator: Generators = None) -> Tensor:
    """x_t ~ q(x_t | x_s) from x_s, for s < t; (B, C, H, W) (DDPM, eq. 2, over several steps)."""
    alpha = (diffusion.alpha_bar[t] / diffusion.alpha_bar[s]).item()
    return alpha**0.5 * x + (1 - alpha) ** 0.5 * randn_like(x, generator)


# ------------------------------------------------------------------------------------------------------------
# 3. Visual anagrams: one picture, read two ways


@dataclass
class View:
    """Another way to look at images (B, C, H, W), and the way back."""

    see: Callable[[Tensor], Tensor]
    undo: Callable[[Tensor], Tensor]


def anagram(eps_1: Denoiser, eps_2: Denoiser, view: View) -> Denoiser:
    """The mean of what one denoiser says of x_t and another of its view (Geng et al. 2024, section 3)."""

    def eps_theta(x_t: Tensor, t: Tensor) -> Tensor:
        return (eps_1(x_t, t) + view.undo(eps_2(view.see(x_t), t))) / 2

    return eps_theta


def turned(degrees: int) -> View:
    """Turned counter-clockwise; only quarter turns take pixels to pixels."""
    if degrees % 90 == 0:
        return View(
            partial(torch.rot90, k=degrees // 90, dims=(2, 3)),
            partial(torch.rot90, k=-degrees // 90, dims=(2, 3)),
        )
    return View(partial(rotate, angle=degrees), partial(rotate, angle=-degrees))


def jigsaw(pieces: int, size: int, seed: int) -> View:
    """pieces x pieces square parts of the picture, in another order; UserError if they don't divide it."""
    if size % pieces:
        near = [n for n in range(2, size) if size % n == 0]
        raise UserError(
            f"--pieces {pieces} does not divide {size} pixels: choose of {', '.join(map(str, near))}"
        )
    order = torch.randperm(pieces**2, generator=utils.seeded_generator(seed))

    def rearranged(x: Tensor, order: Tensor) -> Tensor:
        parts = F.unfold(x, size // pieces, stride=size // pieces)  # (B, C h w, pieces^2)
        return F.fold(parts[:, :, order.to(x.device)], size, size // pieces, stride=size // pieces)

    return View(partial(rearranged, order=order), partial(rearranged, order=order.argsort()))


def negated(x: Tensor) -> Tensor:
    return -x


VIEWS: dict[str, Callable[[argparse.Namespace, int], View]] = {  # view(args, size of the image)
    "flip": lambda args, size: View(partial(torch.flip, dims=(2,)), partial(torch.flip, dims=(2,))),
    "mirror": lambda args, size: View(partial(torch.flip, dims=(3,)), partial(torch.flip, dims=(3,))),
    "rotate90": lambda args, size: turned(90),
    "rotate180": lambda args, size: turned(180),
    "negative": lambda args, size: View(negated, negated),
    "jigsaw": lambda args, size: jigsaw(args.pieces, size, args.seed),
}


def check_isometry(view: View, name: str, shape: Sequence[int]) -> None:
    """UserError unless a view keeps inner products, so that white noise stays white, and can be undone."""
    x = torch.randn(4, *shape, generator=utils.seeded_generator(0), dtype=torch.float64)
    y = view.see(x)
    same = y.shape == x.shape and torch.allclose(y.flatten(1) @ y.flatten(1).T, x.flatten(1) @ x.flatten(1).T)
    if not same or not torch.allclose(view.undo(y), x):
        raise UserError(
            f"--view {name} is no isometry: white noise seen that way would not be white, and the model "
            f"knows no other; choose of {', '.join(VIEWS)}"
        )


# ------------------------------------------------------------------------------------------------------------
# 4. Hybrid images: one thing from afar, another from near


def low_pass(x: Tensor, sigma: float | None = None) -> Tensor:
    """G x: blurred by a Gaussian whose sigma, in pixels, is by default 2 at 64x64, scaled with the size.

    Its kernel is 33 pixels wide for sigma 2, scaled with sigma, but never wider than mirroring allows.
    """
    size = x.shape[-1]
    sigma = sigma or 2 * size / 64
    reach = min(max(1, round(8 * sigma)), size - 1)  # as far as the image can be mirrored at its edges
    return gaussian_blur(x, 2 * reach + 1, sigma)


def hybrid(eps_1: Denoiser, eps_2: Denoiser, sigma: float | None = None) -> Denoiser:
    """`G eps_1 + eps_2 - G eps_2`: coarse things from one denoiser, fine ones from another (Factorized
    Diffusion, Geng et al. 2024, section 3)."""

    def eps_theta(x_t: Tensor, t: Tensor) -> Tensor:
        coarse, fine = eps_1(x_t, t), eps_2(x_t, t)
        return low_pass(coarse, sigma) + fine - low_pass(fine, sigma)

    return eps_theta


# ------------------------------------------------------------------------------------------------------------
# 5. Interpolation through DDIM inversion


@torch.no_grad()
def ddim_inversion(
    diffusion: Diffusion, eps_theta: Denoiser, x: Tensor, timesteps: Sequence[int], iterations: int = 5
) -> Tensor:
    """The noise x_T that DDIM takes to x, (B, C, H, W) both, by the same falling timesteps.

    A stride of DDIM from t to s is x_s = stride(x_t, eps_theta(x_t, t)): its inverse is the fixed point of
    x_t = stride(x_s, eps_theta(x_t, t)), the stride now going up. A few iterations find it, from where the
    eps of the stride below leads (Song et al. 2021, section 4.3, stop there; at s = 0, where no network was
    trained, there is none).
    """
    eps = torch.zeros_like(x)
    # Start: DDIM inversion
    for s, t in pairwise(reversed(timesteps)):
        ab_s, ab_t = diffusion.alpha_bar[s].item(), diffusion.alpha_bar[t].item()
        at_t, x_s = torch.full((len(x),), t, device=x.device), x
        x = ddim_stride(x_s, eps, ab_s, ab_t)  # eq. 12 with s and t exchanged
        for _ in range(iterations):
            eps = eps_theta(x, at_t)
            x = ddim_stride(x_s, eps, ab_s, ab_t)  # the same with eps at t, as sampling will take it
    return x
    # End


def slerp(a: Tensor, b: Tensor, u: Tensor) -> Tensor:
    """From a to b (B, C, H, W) along the sphere, u (B,) in [0, 1]: noise stays as large as noise is.

    sin((1 - u) phi) / sin(phi) a + sin(u phi) / sin(phi) b, phi the angle between them (DDIM, appendix D.5).
    """
    u = u.view(-1, 1, 1, 1)
    cosine = F.cosine_similarity(a.flatten(1), b.flatten(1)).clamp(-1, 1).view(-1, 1, 1, 1)
    phi = cosine.acos().clamp(min=1e-6)  # (B, 1, 1, 1)
    return ((1 - u) * phi).sin() / phi.sin() * a + (u * phi).sin() / phi.sin() * b


def mixture(eps_1: Denoiser, eps_2: Denoiser, u: Tensor) -> Denoiser:
    """From one denoiser to another: (1 - u) eps_1 + u eps_2, u (B,)."""

    def eps_theta(x_t: Tensor, t: Tensor) -> Tensor:
        return torch.lerp(eps_1(x_t, t), eps_2(x_t, t), u.view(-1, 1, 1, 1))

    return eps_theta


# ------------------------------------------------------------------------------------------------------------
# 6. Score distillation: an image that looks well to the denoiser at every noise level


@dataclass
class Parameters:
    """Images (B, C, H, W) as functions of numbers that are optimised."""

    numbers: list[Tensor]
    image: Callable[[], Tensor]


def pixels(noise: Tensor) -> Parameters:
    """The pixels themselves, at first faint noise; `noise` (B, C, H, W)."""
    x = (0.1 * noise).requires_grad_()
    return Parameters([x], lambda: x)


def fourier(noise: Tensor) -> Parameters:
    """The lowest quarter of the frequencies in each direction: no details at all."""
    size = noise.shape[-1]
    keep = max(1, size // 8)  # cycles an image, of size / 2
    rows = [*range(keep + 1), *range(size - keep, size)]
    share = len(rows) * (2 * keep + 1) / size**2  # of all frequencies: steps are as large in pixels as theirs
    at_first = torch.fft.rfft2(0.1 * noise, norm="ortho")[..., rows, : keep + 1] * share**0.5
    c = torch.view_as_real(at_first).contiguous().requires_grad_()  # (B, C, R, keep + 1, 2)

    def image() -> Tensor:
        spectrum = c.new_zeros(*noise.shape[:3], size // 2 + 1, 2)
        spectrum[..., rows, : keep + 1, :] = c / share**0.5
        return torch.fft.irfft2(torch.view_as_complex(spectrum), s=(size, size), norm="ortho")

    return Parameters([c], image)


def low_rank(noise: Tensor) -> Parameters:
    """Each channel a product U V of rank size / 8: a sum of so many columns times rows."""
    rank = max(1, noise.shape[-1] // 8)
    U = (0.3 * noise[..., :rank]).requires_grad_()  # (B, C, H, rank)
    V = (0.3 * noise[..., rank : 2 * rank, :]).requires_grad_()  # (B, C, rank, W)
    return Parameters([U, V], lambda: U @ V)


PARAMETERISATIONS = {"pixels": pixels, "fourier": fourier, "low_rank": low_rank}


def score_distillation(
    diffusion: Diffusion,
    eps_theta: Denoiser,
    parameters: Parameters,
    steps: int,
    lr: float,
    generators: Sequence[torch.Generator],
    looks: Sequence[int] = (),
) -> Tensor:
    """Images (B, C, H, W) under which the denoiser's guess of the noise is right, on average over t.

    Follows w(t) (eps_theta(x_t, t) - eps) dx/dtheta, w = 1 - alpha_bar (DreamFusion, Poole et al. 2023,
    eq. 3), by Adam. -> (L, B, C, H, W), the images after so many steps as `looks` lists, and after the last.
    """
    optimizer, seen = torch.optim.Adam(parameters.numbers, lr), []
    low, high = max(1, round(0.02 * diffusion.T)), round(0.98 * diffusion.T)
    for step in range(1, steps + 1):
        # Start: score distillation
        x = parameters.image()  # x = g(theta)
        t = torch.cat([torch.randint(low, high + 1, (1,), generator=g) for g in generators]).to(x.device)
        with torch.no_grad():
            x_t, eps = diffusion.noise_images(x, t, generators)
            weight = diffusion.scales(t, x)[1] ** 2  # w(t) = 1 - alpha_bar
            gradient = weight * (eps_theta(x_t, t) - eps)  # eq. 3: the network's own Jacobian is left out
        optimizer.zero_grad()
        x.backward(gradient)  # times dx/dtheta
        optimizer.step()
        # End
        if step in looks or step == steps:
            seen.append(parameters.image().detach().clone())  # pixels go on changing in place
    return torch.stack(seen)


# ------------------------------------------------------------------------------------------------------------
# 7. Linear restoration: what a measurement y = A x leaves open is left to the model


@dataclass
class Measurement:
    """A linear map A of images (B, C, H, W) and its pseudo-inverse A+: A A+ A = A."""

    A: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]

    def project(self, x: Tensor, y: Tensor) -> Tensor:
        """A+ y + (I - A+ A) x: the image nearest to x with A x = y (DDNM, section 3)."""
        return x + self.inverse(y - self.A(x))


def ddnm(diffusion: Diffusion, eps_theta: Denoiser, measurement: Measurement, y: Tensor) -> Denoiser:
    """The denoiser with x_0 made to agree with the measurement y, eps derived anew (DDNM, Algorithm 1)."""

    def eps_theta_restoring(x_t: Tensor, t: Tensor) -> Tensor:
        x_0, _ = diffusion.split(eps_theta(x_t, t), x_t, t, "eps")  # line 3
        return diffusion.split(measurement.project(x_0, y), x_t, t, "x_0")[1]  # line 4

    return eps_theta_restoring


def colourise(args: argparse.Namespace, shape: Sequence[int]) -> Measurement:
    """A: the mean of the channels."""
    if shape[0] == 1:
        raise UserError("--problem colourise: the model draws gray images; choose one of colour images")
    return Measurement(lambda x: x.mean(1, keepdim=True), lambda y: y.repeat(1, shape[0], 1, 1))


def super_resolve(args: argparse.Namespace, shape: Sequence[int]) -> Measurement:
    """A: the mean of each factor x factor pixels."""
    near = [n for n in range(2, shape[-1]) if shape[-1] % n == 0]
    if args.factor not in near:
        possible = ", ".join(map(str, near))
        raise UserError(f"--factor {args.factor}: for {shape[-1]} pixels it is one of {possible or 'none'}")
    enlarge = partial(F.interpolate, scale_factor=args.factor, mode="nearest")
    return Measurement(partial(F.avg_pool2d, kernel_size=args.factor), enlarge)


SMALLEST = 0.1  # singular values of a blur, of at most about 1, below which what was lost counts as lost


def deblur(args: argparse.Namespace, shape: Sequence[int]) -> Measurement:
    """A: a Gaussian blur along rows and columns, each a matrix, without its smallest singular values."""
    size = shape[-1]
    sigma = args.blur_sigma or max(1.5, size / 32)
    at = torch.arange(size, dtype=torch.float64)
    B = torch.exp(-0.5 * ((at[:, None] - at) / sigma) ** 2)
    U, S, V = torch.linalg.svd(B / B.sum(1, keepdim=True))  # rows sum to 1 at the edges too
    kept = S > SMALLEST
    B = ((U[:, kept] * S[kept]) @ V[kept]).float()
    B_inverse = ((V[kept].T / S[kept]) @ U[:, kept].T).float()

    def along_both(x: Tensor, matrix: Tensor) -> Tensor:
        matrix = matrix.to(x.device)
        return matrix @ x @ matrix.T

    return Measurement(partial(along_both, matrix=B), partial(along_both, matrix=B_inverse))


PROBLEMS = {"colourise": colourise, "deblur": deblur, "super_resolve": super_resolve}


# ------------------------------------------------------------------------------------------------------------
# What every task is given, and what it gives


@dataclass
class Item:
    """A picture to be made: of which image, towards which condition, and which of several draws."""

    image: int = 0
    asked: int = 0
    draw: int = 0


@dataclass
class Figure:
    """Pictures {head of a column: (N, C, H, W)} with a label for each of N rows, and what was made."""

    pictures: dict[str, Tensor]
    labels: Sequence[str]
    results: Tensor  # (M, C, H, W)
    notes: Sequence[str] = ()  # what was measured, to be printed
    caption: Sequence[str] | None = None  # what of it is written above the pictures, if not all


@dataclass
class Job:
    """A model, what it is asked for, the user's images, and the progress of its work."""

    args: argparse.Namespace
    net: torch.nn.Module
    diffusion: Diffusion
    config: dict
    device: torch.device
    names: list[str]  # of the conditions
    y: Tensor | None  # (R, ...), None where the model is told nothing
    images: Tensor | None = None  # (N, C, H, W) in [-1, 1]
    judge: torch.nn.Module | None = None
    measurement: Measurement | None = None
    bar: tqdm | None = None
    seen: dict[int, Tensor] = field(default_factory=dict)  # x_t (B, C, H, W) at those t that are shown
    shown: Sequence[int] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.config["channels"], self.config["image_size"], self.config["image_size"]

    def items(self) -> list[Item]:
        """One for each of --draws of each image and each condition."""
        images = range(1 if self.images is None else len(self.images))
        return [Item(i, k, d) for i in images for k in range(len(self.names)) for d in range(self.args.draws)]

    def label(self, item: Item) -> str:
        """What a row shows."""
        parts = [f"image {item.image + 1}" if self.images is not None and len(self.images) > 1 else ""]
        parts += [self.names[item.asked], f"draw {item.draw + 1}" if self.args.draws > 1 else ""]
        return ", ".join(part for part in parts if part)

    def of(self, items: Sequence[Item]) -> Tensor:
        """Their images (B, C, H, W)."""
        return self.images[[item.image for item in items]].to(self.device)

    def generators(self, items: Sequence[Item]) -> list[torch.Generator]:
        """One for each: the same for every condition, so that these can be compared."""
        return [utils.seeded_generator(self.args.seed, item.draw, item.image) for item in items]

    def noise(self, generators: Sequence[torch.Generator]) -> Tensor:
        """x_T (B, C, H, W)."""
        return randn_like(torch.empty(len(generators), *self.shape, device=self.device), generators)

    def denoiser(self, asked: Sequence[int], scale: float | None = None) -> Denoiser:
        """The model's eps_theta for a batch, each told the condition of that number, under guidance."""
        if self.y is None:
            eps_theta = self.diffusion.denoiser(self.net)
        else:
            scale = self.args.guidance_scale[0] if scale is None else scale
            y = self.y[list(asked)].to(self.device)
            eps_theta = ddpm_conditional.guided(self.args, self.diffusion, self.net, y, scale)

        def watched(x_t: Tensor, t: Tensor) -> Tensor:
            self.bar.update(len(x_t))
            if (time := int(t[0])) in self.shown:
                self.seen.setdefault(time, x_t.cpu())
            return eps_theta(x_t, t)

        return watched

    def sampler(self, diffusion: Diffusion, eps_theta: Denoiser, *more) -> Tensor:
        """The sampler of the command line, which clips x_0 unless told not to."""
        eps_theta = eps_theta if self.args.no_clip else clip_x_0(diffusion, eps_theta)
        return ddpm.chosen_sampler(self.args)(diffusion, eps_theta, *more)

    def evaluations(self, timesteps: Sequence[int]) -> int:
        """Calls of the denoiser by the sampler along them."""
        strides = len(timesteps) - 1
        return strides + (3 * min(3, strides) if self.args.runge_kutta else 0)

    def show(self, timesteps: Sequence[int], count: int = 3) -> None:
        """Keep x_t at `count` of these times, evenly spaced, for the figure."""
        self.shown = [timesteps[round(i * (len(timesteps) - 1) / (count + 1))] for i in range(1, count + 1)]
        self.shown = [t for t in dict.fromkeys(self.shown) if t > 0]

    def steps(self) -> dict[str, Tensor]:
        """What was kept on the way, as columns of a figure."""
        return {f"t = {t}": self.seen[t] for t in self.shown}

    def batches(
        self, items: Sequence, evaluations: int, edit: Callable[[Sequence], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """`edit(items of a batch)` for --batch-size of them at a time, its pictures joined."""
        found: dict[str, list[Tensor]] = {}
        with utils.progress(self.args.task, len(items) * evaluations) as self.bar:
            for first in range(0, len(items), self.args.batch_size):
                self.seen = {}
                for head, x in edit(items[first : first + self.args.batch_size]).items():
                    found.setdefault(head, []).append(x.cpu())
        return {head: torch.cat(parts) for head, parts in found.items()}

    @torch.no_grad()
    def named(self, x: Tensor) -> list[str]:
        """What --classifier calls each image (B, C, H, W)."""
        t = torch.ones(len(x), dtype=torch.long, device=self.device)
        return [self.config["class_names"][k] for k in self.judge(x.to(self.device), t).argmax(1).tolist()]


def distance(x: Tensor, x_0: Tensor) -> float:
    """Rms per pixel of images in [0, 1], these being in [-1, 1]."""
    return ((x - x_0) / 2).square().mean().sqrt().item()


# ------------------------------------------------------------------------------------------------------------
# The tasks of the command line


def run_sdedit(job: Job) -> Figure:
    """Noise an image to several levels, and denoise it from there (SDEdit)."""
    args, T, items = job.args, job.diffusion.T, job.items()
    timesteps = job.diffusion.timesteps(args.sample_steps) if args.sample_steps else ddpm.strided_timesteps(T)
    args.sample_steps = len(timesteps) - 1  # for the caption
    if args.strength:
        starts = {f"strength {s:g}": max(1, round(s * T)) for s in args.strength}
    else:
        last = len(timesteps) - 2
        if args.i_start and max(args.i_start) > last:
            raise UserError(f"--i-start {max(args.i_start)}: the last stride to start at is {last}")
        chosen = args.i_start or [i for i in I_STARTS if i <= last] or [0]
        starts = {f"i_start {i}": timesteps[i] for i in chosen}
    ways = {
        f"{name}, t = {start}": [start, *(t for t in timesteps if t < start)]
        for name, start in starts.items()
    }

    def edit(items: Sequence[Item]) -> dict[str, Tensor]:
        x_0, found = job.of(items), {}
        for head, way in ways.items():
            job.shown, job.seen = way[:1], {}
            eps_theta, generators = job.denoiser([item.asked for item in items]), job.generators(items)
            x = sdedit(job.diffusion, job.sampler, eps_theta, x_0, way, generators)
            found[head] = torch.stack([job.seen[way[0]], x.cpu()], 1).flatten(0, 1)  # two rows for each
        return {"input": x_0.repeat_interleave(2, 0), **found}

    pictures = job.batches(items, sum(map(job.evaluations, ways.values())), edit)
    edited = {head: pictures[head][1::2] for head in ways}
    far = {head: distance(x, pictures["input"][::2]) for head, x in edited.items()}
    heads = {head: f"{head}: {far[head]:.3f}" if head in far else head for head in pictures}
    labels = [label for item in items for label in (f"{job.label(item)} noised", f"{job.label(item)} edited")]
    notes = [f"{head}: {d:.4f} from the input, rms of images in [0, 1]" for head, d in far.items()]
    results = torch.stack(list(edited.values()), 1).flatten(0, 1)
    caption = ["above a column: how far its results are from the inputs, rms of images in [0, 1]"]
    return Figure({heads[head]: x for head, x in pictures.items()}, labels, results, notes, caption)


def run_inpaint(job: Job) -> Figure:
    """Fill the hole of an image, all other pixels as they were (replacement, RePaint)."""
    args, items = job.args, job.items()
    hole = read_hole(args, job.shape[-1])[None, None]  # (1, 1, H, W)
    timesteps = job.diffusion.timesteps(args.sample_steps)
    parts = segments(timesteps, args.resample, args.jump)
    job.show(timesteps)

    def edit(items: Sequence[Item]) -> dict[str, Tensor]:
        x_0, at, generators = job.of(items), hole.to(job.device), job.generators(items)
        way = (job.noise(generators), timesteps, x_0, at, generators, args.resample, args.jump)
        x = inpaint(job.diffusion, job.sampler, job.denoiser([item.asked for item in items]), *way)
        return {"input": x_0, "known": torch.where(at, 0 * x_0, x_0), **job.steps(), "result": x}

    pictures = job.batches(items, sum(times * job.evaluations(part) for part, times in parts), edit)
    labels, notes = [job.label(item) for item in items], []
    if job.judge:
        before, after = job.named(pictures["input"]), job.named(pictures["result"])
        seen = zip(labels, before, after, strict=True)
        labels = [f"{label} seen as {a}, the input as {b}".lstrip() for label, b, a in seen]
        same = sum(a == b for a, b in zip(before, after, strict=True))
        notes = [f"the classifier names {same} of {len(items)} as it names the input"]
    return Figure(pictures, labels, pictures["result"], notes)


def read_hole(args: argparse.Namespace, size: int) -> Tensor:
    """Where to fill, bool (size, size), from --box or the white of --mask; UserError if that is nowhere."""
    hole = torch.zeros(size, size, dtype=torch.bool)
    if args.box:
        x, y, w, h = args.box
        if x + w > size or y + h > size:
            raise UserError(
                f"--box {x},{y},{w},{h} leaves the image: the model's are {size}x{size}, so x + w and y + h "
                f"are at most {size}"
            )
        hole[y : y + h, x : x + w] = True
        return hole
    try:
        with utils.open_image(Path(args.mask), size) as picture:
            before = picture.size
        mask = utils.upright(Path(args.mask), size, 1, "black")  # what is transparent was not painted
    except FileNotFoundError:
        raise UserError(f"--mask {args.mask}: there is no such file") from None
    except Exception as error:  # Pillow's decoders raise almost anything on a broken file
        raise UserError(f"--mask {args.mask} can't be read as an image: {error}") from None
    if before != (size, size):
        utils.note(f"{utils.resized(args.mask, before, size)}, nearest")
        mask = ImageOps.fit(mask, (size, size), Image.Resampling.NEAREST)
    hole = torch.from_numpy(np.asarray(mask) >= 128)
    if not hole.any():
        raise UserError(
            f"--mask {args.mask} has no hole: paint white what is to be filled, black what is to stay"
        )
    return hole


def run_anagram(job: Job) -> Figure:
    """One picture, read two ways: as it is, and turned or otherwise rearranged."""
    args, items = job.args, [Item(draw=draw) for draw in range(job.args.draws)]
    view = make_view(args, job.shape[-1])
    check_isometry(view, args.view, job.shape)
    timesteps = job.diffusion.timesteps(args.sample_steps)
    job.show(timesteps)

    def edit(items: Sequence[Item]) -> dict[str, Tensor]:
        generators = job.generators(items)
        eps_theta = anagram(*(job.denoiser([k] * len(items)) for k in (0, 1)), view)
        x = job.sampler(job.diffusion, eps_theta, job.noise(generators), timesteps, generators)
        return {**job.steps(), "as it is": x, f"seen by {args.view}": view.see(x)}

    pictures = job.batches(items, 2 * job.evaluations(timesteps), edit)
    readings, notes = list(pictures.values())[-2:], []
    labels = [f"{job.names[0]} / {job.names[1]}"] * len(items)
    if job.judge:
        found = list(zip(*map(job.named, readings), strict=True))
        right = sum(both == tuple(job.names) for both in found)
        notes = [f"the classifier names both readings as asked in {right} of {len(items)}"]
        labels = [f"{label} seen as {a} / {b}" for label, (a, b) in zip(labels, found, strict=True)]
    return Figure(pictures, labels, readings[0], notes)


def make_view(args: argparse.Namespace, size: int) -> View:
    """The view of --view: of VIEWS, or turned by so many degrees; UserError for another."""
    if args.view in VIEWS:
        return VIEWS[args.view](args, size)
    if angle := re.fullmatch("rotate([0-9]{1,3})", args.view):
        return turned(int(angle[1]))
    raise UserError(f"--view {args.view} is unknown: choose of {', '.join(VIEWS)}")


def run_hybrid(job: Job) -> Figure:
    """A picture that is one thing from afar, by its low frequencies, and another from near."""
    args, items = job.args, [Item(draw=draw) for draw in range(job.args.draws)]
    timesteps, size = job.diffusion.timesteps(args.sample_steps), job.shape[-1]
    job.show(timesteps)

    def edit(items: Sequence[Item]) -> dict[str, Tensor]:
        generators = job.generators(items)
        eps_theta = hybrid(*(job.denoiser([k] * len(items)) for k in (0, 1)), args.sigma)
        x = job.sampler(job.diffusion, eps_theta, job.noise(generators), timesteps, generators)
        small, edge = F.interpolate(x, size=max(1, size // 4), mode="area"), (size - max(1, size // 4)) // 2
        afar = F.pad(small, (edge, size - edge - small.shape[-1]) * 2, value=1.0)  # on white
        low = low_pass(x, args.sigma)
        return {**job.steps(), "large": x, "small": afar, "low frequencies": low, "high": x - low}

    pictures = job.batches(items, 2 * job.evaluations(timesteps), edit)
    labels = [f"{job.names[0]} from afar, {job.names[1]} from near"] * len(items)
    return Figure(pictures, labels, pictures["large"])


def run_interpolate(job: Job) -> Figure:
    """From one image to another, through the noise that DDIM makes them of."""
    args, diffusion = job.args, job.diffusion
    if len(job.images) != 2 or len(job.names) > 2:
        raise UserError("interpolate takes two --image files, and one condition for both, or one for each")
    timesteps = diffusion.timesteps(args.sample_steps)
    own = [0, len(job.names) - 1]  # the condition of each image

    def invert(items: Sequence[int]) -> dict[str, Tensor]:
        eps_theta = job.denoiser([own[i] for i in items])
        eps_theta = eps_theta if args.no_clip else clip_x_0(diffusion, eps_theta)
        return {
            "x_T": ddim_inversion(
                diffusion, eps_theta, job.images[items].to(job.device), timesteps, args.iterations
            )
        }

    x_T = job.batches([0, 1], args.iterations * (len(timesteps) - 1), invert)["x_T"]

    def edit(frames: Sequence[int]) -> dict[str, Tensor]:
        B, u = len(frames), torch.tensor(frames) / (args.frames - 1)
        eps_theta = job.denoiser([0] * B)
        if own[1]:
            eps_theta = mixture(eps_theta, job.denoiser([1] * B), u.to(job.device))
        x = slerp(x_T[:1].expand(B, -1, -1, -1), x_T[1:].expand(B, -1, -1, -1), u)
        generators = job.generators([Item()] * B)  # the same noise for all, where the sampler adds any
        return {"x_T": x, "x_0": job.sampler(diffusion, eps_theta, x.to(job.device), timesteps, generators)}

    found = job.batches(range(args.frames), (1 + own[1]) * job.evaluations(timesteps), edit)
    ends = zip(job.images, found["x_0"][[0, -1]], strict=True)
    notes = [
        f"image {i}: inverted and sampled again it is {distance(x, x_0):.2g} away, rms of images in [0, 1]"
        for i, (x_0, x) in enumerate(ends, start=1)
    ]
    columns = {
        f"u = {u}/{args.frames - 1}": torch.stack([found["x_T"][u], found["x_0"][u]])
        for u in range(args.frames)
    }
    first, last = (torch.stack([x_0, x_0]) for x_0 in job.images)
    made = f"x_0 {' to '.join(job.names)}".rstrip()
    return Figure({"image 1": first, **columns, "image 2": last}, ["x_T", made], found["x_0"], notes)


def run_sds(job: Job) -> Figure:
    """Optimise images until a denoiser is content with them, beside images that it draws (DreamFusion)."""
    args, diffusion, items = job.args, job.diffusion, job.items()
    timesteps = diffusion.timesteps(args.sample_steps)
    looks = sorted({max(1, args.steps // 10), max(1, args.steps // 3), args.steps})
    asked = torch.tensor([item.asked for item in items])
    columns, notes, results = {}, [], []
    for scale in args.guidance_scale if job.y is not None else [1.0]:
        guided = f", scale {scale:g}" if job.y is not None else ""

        def sample(items: Sequence[Item], scale: float = scale) -> dict[str, Tensor]:
            generators, eps_theta = job.generators(items), job.denoiser([item.asked for item in items], scale)
            x = job.sampler(diffusion, eps_theta, job.noise(generators), timesteps, generators)
            return {args.sampler: x[:, None].expand(-1, len(looks), -1, -1, -1)}

        def distil(items: Sequence[Item], name: str, scale: float = scale) -> dict[str, Tensor]:
            generators, eps_theta = job.generators(items), job.denoiser([item.asked for item in items], scale)
            parameters = PARAMETERISATIONS[name](job.noise(generators))
            x = score_distillation(diffusion, eps_theta, parameters, args.steps, args.lr, generators, looks)
            return {f"sds, {name}": x.transpose(0, 1)}

        found = job.batches(items, job.evaluations(timesteps), sample)
        for name in args.parameterisations:
            found |= job.batches(items, args.steps, partial(distil, name=name))
        for name, x in found.items():  # (N, looks, C, H, W)
            last = x[:, -1].clamp(-1, 1)
            among = utils.diversity(last, asked)
            told = "" if among is None else f", diversity {among:.3f}"
            notes.append(f"{name}{guided}: saturation {utils.saturation(last):.3f}{told}")
            columns[name + guided] = x.flatten(0, 1)
            results += [last] if name != args.sampler else []
    rows = [(item, step) for item in items for step in looks]
    shown = [
        i for i, (item, step) in enumerate(rows) if item.draw == 0 or step == args.steps
    ]  # one on its way
    labels = [f"{job.label(rows[i][0])} after {rows[i][1]}" for i in shown]
    return Figure({head: x[shown] for head, x in columns.items()}, labels, torch.cat(results), notes)


def run_restore(job: Job) -> Figure:
    """Colourise, deblur or enlarge an image (DDNM)."""
    args, diffusion, items = job.args, job.diffusion, job.items()
    measurement, off = job.measurement, []
    timesteps = diffusion.timesteps(args.sample_steps)
    job.show(timesteps)

    def edit(items: Sequence[Item]) -> dict[str, Tensor]:
        given, generators = job.of(items), job.generators(items)
        measured = args.degraded and args.problem != "colourise"  # a gray image's mean is what it is
        y = given if measured else measurement.A(given)
        eps_theta = ddnm(diffusion, job.denoiser([item.asked for item in items]), measurement, y)
        x = job.sampler(diffusion, eps_theta, job.noise(generators), timesteps, generators)
        x = measurement.project(x, y)  # exactly, whatever sampler and clipping did
        off.append((measurement.A(x.clamp(-1, 1)) - y).abs().max().item() / 2)  # as a file has it
        seen = y if y.shape == x.shape else measurement.inverse(y)
        inverse = {"A+ y": measurement.inverse(y)} if args.problem == "deblur" else {}
        original = {} if args.degraded else {"input": given}
        return {**original, "measured": seen, **inverse, **job.steps(), "result": x}

    pictures = job.batches(items, job.evaluations(timesteps), edit)
    notes = [f"the result's own measurement is within {max(off):.2g} of the one given, in [0, 1]"]
    if not args.degraded:
        for head in ("measured", "A+ y", "result"):
            if head in pictures:
                dB = psnr(pictures[head].clamp(-1, 1), pictures["input"]).mean()
                notes.append(f"{head}: PSNR {dB:.2f} dB")
    return Figure(pictures, [job.label(item) for item in items], pictures["result"], notes)


# ------------------------------------------------------------------------------------------------------------
# Command line

I_STARTS = (1, 3, 5, 7, 10, 20)


def box(text: str) -> list[int]:
    """An argparse type: x,y,w,h."""
    values = utils.listed(whole(0))(text)
    if len(values) != 4 or 0 in values[2:]:
        raise argparse.ArgumentTypeError(f"{text!r}: expected x,y,w,h in pixels, w and h at least 1")
    return values


def sdedit_flags(add: Callable) -> None:
    starts = "where to start among 990, 960, ..., 0 (or --sample-steps), 0 being the first: later keeps more"
    add("--i-start", type=utils.listed(whole(0)), metavar="LIST", help=f"{starts} (default: 1,3,5,7,10,20)")
    share = "instead: the noise level to start from, as a share of T"
    add("--strength", type=utils.listed(real(0, 1, above=True)), metavar="LIST", help=share)


def inpaint_flags(add: Callable) -> None:
    add("--mask", metavar="FILE", help="an image, white where the hole is")
    add("--box", type=box, metavar="X,Y,W,H", help="instead: the hole as a box, in the model's pixels")
    add(
        "--resample", type=whole(1), default=1, metavar="R", help="RePaint: take each part of the way R times"
    )
    add("--jump", type=whole(1), default=1, metavar="J", help="RePaint: the strides of a part")


def anagram_flags(add: Callable) -> None:
    add("--view", default="rotate180", metavar="NAME", help=f"one of {', '.join(VIEWS)}")
    add("--pieces", type=whole(2), default=4, metavar="N", help="--view jigsaw: of N x N pieces")


def hybrid_flags(add: Callable) -> None:
    sigma = "of the Gaussian that parts low from high, in pixels (default: 2 at 64x64, scaled with the size)"
    add("--sigma", type=real(0.1), metavar="S", help=sigma)


def interpolate_flags(add: Callable) -> None:
    add("--frames", type=whole(2), default=7, metavar="N", help="from one image to the other, both included")
    add("--iterations", type=whole(1), default=5, metavar="N", help="of the fixed point in each stride")


def sds_flags(add: Callable) -> None:
    kinds = f"with commas between them: {', '.join(PARAMETERISATIONS)}"
    add(
        "--parameterisations",
        type=parameterisations,
        default=["pixels", "fourier"],
        metavar="LIST",
        help=kinds,
    )
    add("--steps", type=whole(1), default=500, metavar="N", help="of Adam")
    add("--lr", type=real(0, above=True), default=0.03, metavar="RATE", help="of Adam")


def parameterisations(text: str) -> list[str]:
    """An argparse type: names in PARAMETERISATIONS."""
    names = utils.listed(str)(text)
    for name in names:
        if name not in PARAMETERISATIONS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(PARAMETERISATIONS)}")
    return list(dict.fromkeys(names))


def restore_flags(add: Callable) -> None:
    what = "one of %(choices)s"
    add("--problem", choices=list(PROBLEMS), default="super_resolve", metavar="NAME", help=what)
    add("--factor", type=whole(2), default=4, metavar="N", help="--problem super_resolve: N times larger")
    sigma = "--problem deblur: of the blur, in pixels (default: a 32nd of the width, at least 1.5)"
    add("--blur-sigma", type=real(0.1), metavar="S", help=sigma)
    given = "the images are gray, blurred or small already (default: they are whole, and made so first)"
    add("--degraded", action="store_true", help=given)


@dataclass
class Task:
    run: Callable[[Job], Figure]
    add_flags: Callable[[Callable], None] = lambda add: None
    images: bool = True  # whether it takes --image
    scale: Sequence[float] = (3.0,)  # of guidance, by default
    draws: int = 1


TASKS = {
    "sdedit": Task(run_sdedit, sdedit_flags),
    "inpaint": Task(run_inpaint, inpaint_flags),
    "anagram": Task(run_anagram, anagram_flags, images=False, scale=(5.0,), draws=10),
    "hybrid": Task(run_hybrid, hybrid_flags, images=False, draws=4),
    "interpolate": Task(run_interpolate, interpolate_flags, scale=(1.0,)),
    "sds": Task(run_sds, sds_flags, images=False, scale=(1.0, 7.5), draws=4),
    "restore": Task(run_restore, restore_flags),
}
FLAG_OWNERS = {  # which --sampler, --view or --problem a flag belongs to
    "sampler": ddpm.SAMPLER_FLAGS,
    "view": {"pieces": "jigsaw"},
    "problem": {"factor": "super_resolve", "blur_sigma": "deblur"},
}


def make_parser() -> argparse.ArgumentParser:
    what = "Edit images with a trained diffusion model: one command, one figure."
    parser = utils.Parser(description=what)
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    for name, task in TASKS.items():
        what = task.run.__doc__.splitlines()[0]
        sub = tasks.add_parser(name, help=what, description=what)
        add = sub.add_argument
        runs = "a run's folder, or the folder or file of published weights"
        add("--checkpoint", required=True, metavar="RUN", help=runs)
        if task.images:
            add("--image", nargs="+", required=True, metavar="FILE", help="to be edited: photos, drawings")
        task.add_flags(add)
        if task.draws == 1 and name != "interpolate":
            add("--draws", type=whole(1), default=1, metavar="N", help="of each image, for each condition")
        elif name != "interpolate":
            add("--draws", type=whole(1), default=task.draws, metavar="N", help="pictures to make")
        if name in ("inpaint", "anagram"):
            add("--classifier", metavar="RUN", help="a classifier of the same data, to name what was made")
        add = sub.add_argument_group("what to make (of a conditional model)").add_argument
        classes = "class numbers or names, with commas: 0,3,7"
        add("--labels", type=utils.listed(str), metavar="LIST", help=classes)
        say = "one or more captions, each in quotes"
        add("--prompt", nargs="+", action="extend", metavar="CAPTION", help=say)
        scale = "1 plain conditional, 0 unconditional, above 1 guided"
        more = "; several, with commas, are compared" if name == "sds" else ""
        add(
            "--guidance-scale",
            type=utils.listed(real(0)),
            default=list(task.scale),
            metavar="S",
            help=scale + more,
        )
        ddpm_conditional.add_guidance_options(add)
        add = sub.add_argument_group("sampling").add_argument
        sampler = "ddim" if name == "interpolate" else "that of the run's previews"
        steps = "33, of t = 990, 960, ..., 0" if name == "sdedit" else "50, at most T"
        ddpm.add_sampler_flags(add, sampler, steps)
        add("--batch-size", type=whole(1), default=64, metavar="IMAGES", help="through the network at once")
        add("--out", metavar="DIR", help="also write one PNG per result there")
        utils.add_machine_flags(sub)
    return parser


def asked_for(args: argparse.Namespace, config: dict) -> tuple[list[str], Tensor | None]:
    """What the model is asked for, names and y (R, ...); [""] and None where it is told nothing."""
    if args.task in ("anagram", "hybrid") and config["kind"] != "ddpm_conditional":
        what = f"{args.task} takes a conditional model, a run of ddpm_conditional.py"
        raise UserError(f"{what}: {args.checkpoint} is unconditional")
    if args.task in ("anagram", "hybrid") and len(args.labels or args.prompt or ()) != 2:
        raise UserError(f"{args.task} takes two conditions: --labels 6,9, or --prompt with two captions")
    if not args.labels and not args.prompt:
        ddpm_conditional.without_condition(args.checkpoint, config)
        return [""], None
    if config["kind"] != "ddpm_conditional":
        raise UserError(
            f"{args.checkpoint} is an unconditional model, which can't be told what to make: leave out "
            f"{'--labels' if args.labels else '--prompt'}, or name a run of ddpm_conditional.py"
        )
    if config.get("p_uncond") == 0:
        ddpm_conditional.fill_guidance_scale(args, 0)  # a note
    return ddpm_conditional.conditions(args, config)


def make_job(args: argparse.Namespace) -> Job:
    """Load what the command line names; UserError where that does not go together."""
    ddpm.check_owners(args, {owner: flags for owner, flags in FLAG_OWNERS.items() if owner in args})
    ddpm_conditional.check_scales(args)
    if args.task != "sds" and len(args.guidance_scale) > 1:
        raise UserError("--guidance-scale: one scale, please; only sds compares several")
    if args.task == "inpaint" and args.mask is None and args.box is None:
        raise UserError("inpaint needs to know where: --box x,y,w,h, or --mask FILE")
    if args.task == "inpaint" and args.mask is not None and args.box is not None:
        raise UserError("--box and --mask both say where: leave one of them out")
    if args.task == "inpaint" and "jump" in args.typed and args.resample == 1:
        raise UserError("--jump is of RePaint: add --resample 2 or more, or leave it out")
    told_nothing = not args.labels and not args.prompt
    for dest in args.typed & ddpm_conditional.HOW_TO_GUIDE if told_nothing else ():
        raise UserError(f"{utils.flag(dest)} goes with --labels or --prompt, what to guide towards")
    if args.task == "interpolate" and (args.sampler == "ddpm" or args.eta):
        utils.note("this sampler adds noise of its own on the way: it does not give the images back")
    if args.task == "sdedit" and args.i_start and args.strength:
        raise UserError("--i-start and --strength both say where to start: leave one out")
    device = utils.get_device(args.device)
    net, diffusion, config = ddpm.load_network(args.checkpoint, device)
    if args.task != "sdedit" or args.sample_steps:  # sdedit has strides of its own
        ddpm.fill_sample_steps(args, diffusion.T)
    if args.task != "interpolate":  # which inverts ddim
        ddpm.fill_sampler(args, config)
    ddpm_conditional.check_interval(args, diffusion.T)
    job = Job(args, net, diffusion, config, device, *asked_for(args, config))
    if TASKS[args.task].images:
        size = config["image_size"]
        if args.task == "restore":
            job.measurement = PROBLEMS[args.problem](args, job.shape)
            size //= args.factor if args.degraded and args.problem == "super_resolve" else 1
        job.images = utils.read_images(args.image, size, config["channels"])
    if getattr(args, "classifier", None):
        same = ddpm_conditional.SAME_DATA
        job.judge = ddpm_conditional.load_classifier(args.classifier, config, device, same)
    return job


IN_CAPTIONS = {  # settings of a task that are told where they were typed
    *("pieces", "factor", "blur_sigma", "sigma", "box", "mask", "resample", "jump", "iterations", "steps"),
    *("lr", "degraded", "no_clip"),
}


def settings(args: argparse.Namespace) -> list[str]:
    """The settings that were typed, for the caption."""
    found = {dest: getattr(args, dest) for dest in sorted(args.typed & IN_CAPTIONS)}
    return [
        f"{dest.replace('_', ' ')}{'' if value is True else f' {value}'}" for dest, value in found.items()
    ]


def made_by(job: Job) -> str:
    """How pictures were made, for the caption."""
    args = job.args
    if job.y is None:
        return f"{args.sampler} {args.sample_steps} steps"
    return f"{ddpm_conditional.made_by(args)}, scale {', '.join(f'{s:g}' for s in args.guidance_scale)}"


def main() -> None:
    args = make_parser().parse_args()
    args.guidance = "cfg"
    job = make_job(args)
    folder = utils.run_folder(args.checkpoint) / "edits"
    ddpm.prepare_folders(folder, args.out)
    figure = TASKS[args.task].run(job)
    what = " ".join([args.task, *(getattr(args, dest) for dest in ("view", "problem") if dest in args)])
    told = [what, *settings(args), ddpm.model_name(job.config), made_by(job), f"seed {args.seed}"]
    notes = figure.notes if figure.caption is None else figure.caption
    caption = "; ".join([", ".join(told), *notes])
    cells = torch.stack(list(figure.pictures.values()), 1).flatten(0, 1)
    grid = utils.make_grid(cells, caption, len(figure.pictures), figure.labels, list(figure.pictures))
    path = utils.save_picture(grid, utils.new_path(folder / f"{args.task}.png", ".png"))
    if args.out:
        for i, picture in enumerate(utils.to_pictures(figure.results)):
            utils.save_picture(picture, Path(args.out) / f"{i:05d}.png")
    print("\n".join([*figure.notes, f"figure   {shlex.quote(str(path))}"]))
    if args.out:
        print("images  ", shlex.quote(args.out))


if __name__ == "__main__":
    utils.run_main(main)
