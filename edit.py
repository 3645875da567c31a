"""Edits of images with a trained denoiser: the tasks of Berkeley CS180, project 5, on any run or weights.

    python edit.py sdedit --checkpoint RUN --image sketch.png --labels 3
    python edit.py inpaint --checkpoint RUN --image photo.png --box 8,8,16,16
    python edit.py anagram --checkpoint RUN --labels 6,9 --view rotate180
    python edit.py hybrid --checkpoint RUN --prompt "a red circle" "a blue star"
    python edit.py interpolate --checkpoint RUN --image a.png b.png
    python edit.py sds --checkpoint RUN --labels 3
    python edit.py restore --checkpoint RUN --image photo.png --problem super_resolve

An edit makes or wraps a denoiser eps_theta(x_t, t), or acts before or between segments of sampling. So every
edit works with every sampler, and with classifier-free guidance. Papers, as arxiv.org/abs/NUMBER: SDEdit
2108.01073, replacement 2011.13456, RePaint 2201.09865, Visual Anagrams 2311.17919, Factorized Diffusion
2404.11615, DreamFusion 2209.14988, DDNM 2212.00490.

`eps_theta`, `eps_1` and `eps_2` are denoisers, `sampler` is one of ddpm.SAMPLERS, `timesteps` a decreasing
list, `x` and `x_0` are images (B, C, H, W), x_0 in [-1, 1], and `generator` is one, or a list of one each.
"""

import support.environment  # isort: skip  # noqa: F401 (before torch)
import re
from collections import namedtuple
from dataclasses import make_dataclass
from functools import partial
from itertools import pairwise, product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import ddpm
import ddpm_conditional
from support import settings as cli
from support.errors import UserError, note, run_main
from support.files import new_path, quoted
from support.generators import randn_like, seeded_generator
from support.images import read_images, to_pictures
from support.machine import MachineSettings, Watched, get_device, progress
from support.measures import distance, diversity, psnr, saturation
from support.operators import VIEWS, View, low_pass, turned
from support.pictures import make_grid, save_picture
from support.runs import model_name, prepare_folders, run_folder
from support.settings import COUNT, POSITIVE, listed, real, setting, whole
from support.text import conditions


# 1. SDEdit: noise an image to some level, and denoise it from there ---------------------------------------
def sdedit(diffusion, sampler, eps_theta, x_0, timesteps, generator=None) -> Tensor:
    """x_0 noised to timesteps[0] and denoised from there (Meng et al. 2022, section 3)."""
    # Start: SDEdit
    x_t, _ = diffusion.noise_images(x_0, timesteps[0], generator)  # the lower t, the more of x_0 is kept
    return sampler(diffusion, eps_theta, x_t, timesteps, generator)
    # End


# 2. Inpainting: known pixels replace what the model makes of them -----------------------------------------
def inpaint(diffusion, sampler, eps_theta, x, parts, x_0, hole: Tensor, generator=None) -> Tensor:
    """x at the first timestep -> x_0 with its hole, bool (1, 1, H, W), filled (RePaint, Algorithm 1).

    `parts` come from `segments`. A part that is sampled several times, noised again in between, lets the
    hole agree with its surroundings. One part, sampled once, is replacement (Song et al., score SDE, I.2).
    """

    # Start: RePaint
    def eps_theta_inpainting(x_t: Tensor, t: Tensor) -> Tensor:
        known, _ = diffusion.noise_images(x_0, t, generator)  # eq. 8a: q(x_t | x_0), new noise at each t
        return eps_theta(torch.where(hole, x_t, known), t)  # eq. 8c

    for timesteps, times in parts:
        for u in range(times):  # line 3
            x = sampler(diffusion, eps_theta_inpainting, x, timesteps, generator)  # lines 4 to 8
            if u < times - 1:  # line 9
                x = renoise(diffusion, x, timesteps[-1], timesteps[0], generator)  # line 10
    return torch.where(hole, x, x_0)
    # End


def segments(timesteps: list[int], resample: int, jump: int) -> list[tuple[list[int], int]]:
    """Parts of `jump` strides, each with the number of times to sample it; the last stride, to 0, once."""
    if resample == 1:
        return [(timesteps, 1)]  # in one piece, so that a multistep sampler keeps its history
    down = timesteps[:-1]
    parts = [(down[i : i + jump + 1], resample) for i in range(0, len(down) - 1, jump)]
    return [*parts, (timesteps[-2:], 1)]


def renoise(diffusion, x: Tensor, s: int, t: int, generator=None) -> Tensor:
    """x_t ~ q(x_t | x_s) from x = x_s, for s < t (DDPM, eq. 2, over several steps)."""
    alpha = (diffusion.alpha_bar[t] / diffusion.alpha_bar[s]).item()
    return alpha**0.5 * x + (1 - alpha) ** 0.5 * randn_like(x, generator)


# 3. Two conditions in one picture: visual anagrams and hybrid images --------------------------------------
def is_isometry(view: View, shape) -> bool:
    """Whether a view of images of a shape (C, H, W) keeps inner products, and `undo` inverts `see`."""
    x = torch.randn(4, *shape, generator=seeded_generator(0), dtype=torch.float64)
    y = view.see(x)
    same = y.shape == x.shape and torch.allclose(y.flatten(1) @ y.flatten(1).T, x.flatten(1) @ x.flatten(1).T)
    return same and torch.allclose(view.undo(y), x)


def anagram(eps_1, eps_2, view: View):
    """The mean of one denoiser's eps and of another's in a view of x_t (Geng et al. 2024, section 3)."""
    return lambda x_t, t: (eps_1(x_t, t) + view.undo(eps_2(view.see(x_t), t))) / 2


def sharp_low_pass(x: Tensor, cycles: float) -> Tensor:
    """x times 1 / (1 + (f / cycles)^8) at frequencies of f cycles a side (a Butterworth filter's gain^2)."""
    vertical, horizontal = (torch.fft.fftfreq(n, 1 / n, device=x.device) for n in x.shape[-2:])
    f = (vertical[:, None] ** 2 + horizontal**2).sqrt()  # (H, W)
    return torch.fft.ifft2(torch.fft.fft2(x) / (1 + (f / cycles) ** 8)).real


def hybrid(eps_1, eps_2, G):
    """`G eps_1 + eps_2 - G eps_2`, G a low-pass filter, as a blur (Factorized Diffusion, section 3)."""

    def eps_theta_hybrid(x_t: Tensor, t: Tensor) -> Tensor:
        far, near = eps_1(x_t, t), eps_2(x_t, t)
        return G(far) + near - G(near)

    return eps_theta_hybrid


# 4. Interpolation through DDIM inversion ------------------------------------------------------------------
@torch.no_grad()
def ddim_inversion(diffusion, eps_theta, x, timesteps, iterations: int = 5) -> Tensor:
    """The noise x_T from which DDIM makes the images x, by the same decreasing timesteps.

    A stride of DDIM from t to s is x_s = stride(x_t, eps_theta(x_t, t)). Its inverse is the fixed point of
    x_t = stride(x_s, eps_theta(x_t, t)), a stride from s to t, which a few iterations find. They start from
    the eps of the stride below, where Song et al. 2021, section 4.3, stop, and at s = 0 from eps = 0.
    """
    # Start: DDIM inversion
    eps = torch.zeros_like(x)
    for s, t in pairwise(reversed(timesteps)):  # from s up to t
        ab_s, ab_t = diffusion.alpha_bar[s].item(), diffusion.alpha_bar[t].item()
        at_t, x_s = torch.full((len(x),), t, device=x.device), x
        x = ddpm.ddim_stride(x_s, eps, ab_s, ab_t)  # eq. 12 with s and t exchanged
        for _ in range(iterations):
            eps = eps_theta(x, at_t)
            x = ddpm.ddim_stride(x_s, eps, ab_s, ab_t)  # the same with the eps at t, which sampling will use
    return x
    # End


def slerp(a: Tensor, b: Tensor, u: Tensor) -> Tensor:
    """From a to b (B, C, H, W) on the sphere, u (B,) in [0, 1]: noise keeps its norm (DDIM, appendix D.5)."""
    phi = F.cosine_similarity(a.flatten(1), b.flatten(1)).clamp(-1, 1).acos().clamp(min=1e-6)  # (B,), angle
    u, phi = u.view(-1, 1, 1, 1), phi.view(-1, 1, 1, 1)
    return ((1 - u) * phi).sin() / phi.sin() * a + (u * phi).sin() / phi.sin() * b


def mixture(eps_1, eps_2, u: Tensor):
    """From one denoiser to another: (1 - u) eps_1 + u eps_2, u (B,)."""
    return lambda x_t, t: torch.lerp(eps_1(x_t, t), eps_2(x_t, t), u.view(-1, 1, 1, 1))


# 5. Score distillation of images x = g(theta); a parameterisation makes theta and g from noise (B, C, H, W)
def pixels(noise: Tensor):
    """The pixels themselves, starting from faint noise."""
    x = (0.1 * noise).requires_grad_()
    return [x], lambda: x


def fourier(noise: Tensor):
    """The lowest quarter of the frequencies in each direction: no details at all."""
    size, keep = noise.shape[-1], max(1, noise.shape[-1] // 8)  # keep so many cycles per image, of size / 2
    rows = [*range(keep + 1), *range(size - keep, size)]
    share = len(rows) * (2 * keep + 1) / size**2  # of all frequencies; scales steps to those of pixels
    start = torch.fft.rfft2(0.1 * noise, norm="ortho")[..., rows, : keep + 1] * share**0.5
    c = torch.view_as_real(start).contiguous().requires_grad_()  # (B, C, rows, keep + 1, 2)

    def image() -> Tensor:
        spectrum = c.new_zeros(*noise.shape[:3], size // 2 + 1, 2)
        spectrum[..., rows, : keep + 1, :] = c / share**0.5
        return torch.fft.irfft2(torch.view_as_complex(spectrum), s=(size, size), norm="ortho")

    return [c], image


def low_rank(noise: Tensor):
    """Each channel a product U V of rank size / 8."""
    rank = max(1, noise.shape[-1] // 8)
    U = (0.3 * noise[..., :rank]).requires_grad_()  # (B, C, H, rank)
    V = (0.3 * noise[..., rank : 2 * rank, :]).requires_grad_()  # (B, C, rank, W)
    return [U, V], lambda: U @ V


def score_distillation(diffusion, eps_theta, parameters, steps, lr, generators, snapshot_steps=()):
    """Images moved until the denoiser, on average over t, finds just the noise that was added to them.

    Adam along w(t) (eps_theta(x_t, t) - eps) dx/dtheta, w = 1 - alpha_bar (DreamFusion, Poole et al. 2023,
    eq. 3). -> (S, B, C, H, W), the images after each of `snapshot_steps` and after the last of the steps.
    """
    (theta, g), snapshots = parameters, []
    optimizer = torch.optim.Adam(theta, lr)
    low, high = max(1, round(0.02 * diffusion.T)), round(0.98 * diffusion.T)
    for step in range(1, steps + 1):
        # Start: score distillation
        x = g()  # x = g(theta)
        t = torch.cat([torch.randint(low, high + 1, (1,), generator=one) for one in generators]).to(x.device)
        with torch.no_grad():
            x_t, eps = diffusion.noise_images(x, t, generators)
            weight = diffusion.scales(t, x)[1] ** 2  # w(t) = 1 - alpha_bar
            gradient = weight * (eps_theta(x_t, t) - eps)  # eq. 3: the network's own Jacobian is left out
        optimizer.zero_grad()
        x.backward(gradient)  # times dx/dtheta
        optimizer.step()
        # End
        if step in snapshot_steps or step == steps:
            snapshots.append(g().detach().clone())  # the optimizer changes pixels in place
    return torch.stack(snapshots)


# 6. Linear restoration: the model fills in what a measurement y = A x leaves open -------------------------
class Measurement(namedtuple("Measurement", "A inverse")):
    """A linear map A of images (B, C, H, W) and its pseudo-inverse A+: A A+ A = A."""

    def project(self, x: Tensor, y: Tensor) -> Tensor:
        """A+ y + (I - A+ A) x: the image nearest to x with A x = y."""
        return x + self.inverse(y - self.A(x))


def colourise(shape) -> Measurement:
    """A: the mean of the channels, of images of a shape (C, H, W); UserError for C = 1."""
    if shape[0] == 1:
        raise UserError("--problem colourise: the model draws gray images; choose one of colour images")
    return Measurement(lambda x: x.mean(1, keepdim=True), lambda y: y.repeat(1, shape[0], 1, 1))


def super_resolve(shape, factor: int) -> Measurement:
    """A: the mean of each factor x factor pixels; UserError if `factor` does not divide the size."""
    possible = [n for n in range(2, shape[-1]) if shape[-1] % n == 0]
    if factor not in possible:
        choices = ", ".join(map(str, possible)) or "none"
        raise UserError(f"--factor {factor}: for {shape[-1]} pixels it is one of {choices}")
    return Measurement(partial(F.avg_pool2d, kernel_size=factor), partial(F.interpolate, scale_factor=factor))


def deblur(shape, sigma: float | None = None) -> Measurement:
    """A: a Gaussian blur of rows and columns, by a matrix whose singular values of at most 0.1 are 0."""
    sigma = sigma or max(1.5, shape[-1] / 32)  # pixels
    at = torch.arange(shape[-1], dtype=torch.float64)
    B = torch.exp(-0.5 * ((at[:, None] - at) / sigma) ** 2)
    U, S, V = torch.linalg.svd(B / B.sum(1, keepdim=True))  # rows sum to 1 at the edges too
    kept = S > 0.1  # the largest is about 1
    B = ((U[:, kept] * S[kept]) @ V[kept]).float()
    B_inverse = ((V[kept].T / S[kept]) @ U[:, kept].T).float()
    return Measurement(*(lambda x, M=M: M.to(x.device) @ x @ M.T.to(x.device) for M in (B, B_inverse)))


def ddnm(diffusion, eps_theta, measurement: Measurement, y: Tensor):
    """The denoiser whose x_0 agrees with the measurement y, eps derived again (DDNM, Algorithm 1)."""

    def eps_theta_restoring(x_t: Tensor, t: Tensor) -> Tensor:
        # Start: DDNM
        x_0 = diffusion.x_0_from_eps(x_t, eps_theta(x_t, t), t)  # line 3
        x_0 = measurement.project(x_0, y)  # line 4: A+ y + (I - A+ A) x_0, section 3
        return diffusion.eps_from_x_0(x_t, x_0, t)
        # End

    return eps_theta_restoring


# What every task is given ---------------------------------------------------------------------------------
START = "strides to start at, of 990, 960, ..., 0 or --sample-steps, from 0 on (default: 1,3,5,7,10,20)"
I_STARTS = [1, 3, 5, 7, 10, 20]
PARAMETERISATIONS = {"pixels": pixels, "fourier": fourier, "low_rank": low_rank}
PROBLEMS = {"colourise": colourise, "deblur": deblur, "super_resolve": super_resolve}
BLUR = "sigma of the blur, in pixels (default: a 32nd of the width, at least 1.5)"
KINDS = f"parameterisations of the images, with commas: {', '.join(PARAMETERISATIONS)}"
# A result to be made: the numbers of its image, its condition and its draw, and the label of its row.
Item = namedtuple("Item", "image condition draw label", defaults=(0, 0, 0, ""))


@cli.settings()
class EditSettings:  # of all tasks; EDITS below lists those of each
    checkpoint: str = setting(None, "directory of the run, or of published weights", "RUN", required=True)
    image: list = setting(None, "images to edit: photographs, drawings", "FILE", nargs="+", required=True)
    i_start: list | None = setting(None, START, "LIST", listed(whole(0)))
    strength: list | None = setting(None, "instead: shares of T", "LIST", listed(real(0, 1, above=True)))
    mask: str | None = setting(None, "image that is white where the hole is", "FILE")
    box: list | None = setting(None, "instead: a box in the model's pixels", "X,Y,W,H", listed(whole(0)))
    resample: int = setting(1, "RePaint: number of times that each part is sampled", "R", COUNT)
    jump: int = setting(1, "RePaint: number of strides of a part", "J", COUNT)
    view: str = setting("rotate180", f"second reading: {', '.join(VIEWS)}", "NAME")
    pieces: int = setting(4, "N x N pieces", "N", whole(2), of="view=jigsaw")
    cycles: float | None = setting(None, "low: to N cycles a side (default: 2.5; digits 2)", "N", real(0.1))
    sigma: float | None = setting(None, "instead: a Gaussian blur, in pixels", "S", real(0.1))
    frames: int = setting(7, "images from the first to the second, both included", "N", whole(2))
    iterations: int = setting(5, "iterations of the fixed point in each stride", "N", COUNT)
    parameterisations: list = setting(["pixels", "fourier"], KINDS, "LIST", listed(str, PARAMETERISATIONS))
    steps: int = setting(500, "steps of Adam", "N", COUNT)
    lr: float = setting(0.03, "learning rate of Adam", "RATE", POSITIVE)
    problem: str = setting("super_resolve", "problem: %(choices)s", "NAME", choices=PROBLEMS)
    factor: int = setting(4, "images become N times larger", "N", whole(2), of="problem=super_resolve")
    blur_sigma: float | None = setting(None, BLUR, "S", real(0.1), of="problem=deblur")
    degraded: bool = setting(False, "the images are gray, blurred or small already (default: made so first)")
    draws: int = setting(1, "number of results (for each image and condition)", "N", COUNT)
    classifier: str | None = setting(None, "run of a classifier of the same data, to name results", "RUN")
    labels: list | None = setting(None, "class numbers or names, with commas: 0,3,7", "LIST", listed(str))
    prompt: list | None = setting(None, "captions, each in quotes", "CAPTION", nargs="+", action="extend")
    batch_size: int = setting(64, "images per evaluation of the network", "N", COUNT)
    out: str | None = setting(None, "directory for one PNG per result, beside the figure", "DIR")


class Model:
    """The network of --checkpoint with its conditions, and the settings of the command line, all settled."""

    def __init__(self, command: cli.Command, defaults: dict):
        self.settings, self.guidance, self.sampling, self.machine = command.groups
        typed = [cli.flag(name) for name in ("labels", "prompt") if command[name]]
        command.check()
        for name in sorted(command.typed & vars(self.guidance).keys()) if not typed else ():
            raise UserError(f"{cli.flag(name)} goes with --labels or --prompt: it guides towards a condition")
        self.device = get_device(self.machine.device)
        self.net, self.diffusion, self.config = ddpm.load_network(path := command["checkpoint"], self.device)
        ddpm.settle_sampler(command, self.config, self.diffusion.T)
        command.settle(defaults)
        ddpm_conditional.check_guidance(self.guidance, self.diffusion.T, self.config.get("latent"))
        self.names, self.y = [""], None  # the conditions (R, ...), if any
        if typed and self.config["kind"] != "ddpm_conditional":
            raise UserError(f"{path} is an unconditional model: leave out {typed[0]}, or name another run")
        if typed:
            self.names, self.y = conditions(path, self.config, self.settings)
            ddpm_conditional.settle_scale(self.config.get("p_uncond", 0.1), command)
        elif self.config["kind"] == "ddpm_conditional":
            note(f"{path} is conditional: without --labels or --prompt it gets the null condition")
        load, path = ddpm_conditional.load_classifier, self.settings.classifier
        self.classifier = path and load(path, self.config, self.device, guides=False)
        self.space = self.config["space"]  # where x_0 is; the user's images are pixels
        self.shape = self.config["channels"], self.config["image_size"], self.config["image_size"]
        T, steps = self.diffusion.T, self.sampling.sample_steps
        self.timesteps, spacing = ddpm.strided_timesteps(T), self.sampling.spacing
        if steps or spacing:
            self.timesteps = self.diffusion.timesteps(steps or len(self.timesteps) - 1, spacing)
        self.sampling.sample_steps = steps = len(self.timesteps) - 1
        shown = [self.timesteps[round(i * steps / 4)] for i in (1, 2, 3)]  # where a figure shows x_t
        self.watched = lambda eps_theta, bar, total=0: Watched(eps_theta, T, bar, shown, total)

    def read_images(self, size: int | None = None) -> tuple[Tensor, list[Item]]:
        """The user's images (N, C, H, W), of the model's size or another, and the items to make of them."""
        images = read_images(self.settings.image, size or self.shape[-1], self.shape[0])
        return images.to(self.device), self.items(len(images))

    def items(self, images: int = 1) -> list[Item]:
        """One for each draw of each condition of each image."""
        made, draws = [], self.settings.draws
        for i, k, d in product(range(images), range(len(self.names)), range(draws)):
            label = [f"image {i + 1}"] * (images > 1) + [self.names[k]] + [f"draw {d + 1}"] * (draws > 1)
            made.append(Item(i, k, d, ", ".join(filter(None, label))))
        return made

    def generators(self, items: list[Item]) -> list[torch.Generator]:
        """One for each item: the same for all conditions, to compare them."""
        return [seeded_generator(self.machine.seed, item.draw, item.image) for item in items]

    def noise(self, generators: list[torch.Generator]) -> Tensor:  # x_T (B, C, H, W)
        return randn_like(torch.empty(len(generators), *self.space.shape, device=self.device), generators)

    def denoiser(self, items: list[Item], scale: float | None = None):
        """eps_theta for a batch, each item with its condition, guided at `scale` or at --guidance-scale."""
        scales = self.guidance.guidance_scale if scale is None else [scale]
        if self.y is None:
            return self.diffusion.denoiser(self.net)
        if len(scales) > 1:
            raise UserError("--guidance-scale: one scale, please; only sds compares several")
        y = self.y[[item.condition for item in items]].to(self.device)
        return ddpm_conditional.guided_denoiser(self.diffusion, self.net, y, scales[0], self.guidance)

    def clipped(self, eps_theta):
        return eps_theta if self.sampling.no_clip else ddpm.clip_x_0(self.diffusion, eps_theta)

    def sampler(self, diffusion, eps_theta, x, timesteps, generator=None) -> Tensor:
        """The sampler of the command line; it clips x_0 unless --no-clip."""
        return ddpm.make_sampler(self.sampling)(diffusion, self.clipped(eps_theta), x, timesteps, generator)

    def sample(self, eps_theta, items: list[Item]) -> Tensor:
        generators = self.generators(items)
        return self.sampler(self.diffusion, eps_theta, self.noise(generators), self.timesteps, generators)

    def in_pixels(self, why: str) -> None:
        """UserError for a model of latents."""
        if self.space.factor > 1:
            path = self.settings.checkpoint
            raise UserError(f"{path} is a model of latents, and this edit takes one of pixels: {why}")

    def classes(self, *columns: Tensor) -> list[tuple]:
        """The classifier's names of the images in each row of columns (N, C, H, W); [] without one."""
        t = torch.ones(len(columns[0]), dtype=torch.long, device=self.device)
        found = [self.classifier(x.to(self.device), t).argmax(1).tolist() for x in columns if self.classifier]
        return [tuple(self.config["class_names"][label] for label in row) for row in zip(*found, strict=True)]

    def batches(self, what: str, items, edit, images: int = 1) -> dict[str, Tensor]:
        """The columns of `edit(items of a batch, bar)`, joined; an item moves the bar by so many images."""
        columns, size = {}, self.settings.batch_size
        with progress(what, images * len(items)) as bar:
            for first in range(0, len(items), size):
                for head, x in edit(items[first : first + size], bar).items():
                    columns.setdefault(head, []).append(x.cpu())
        return {head: torch.cat(parts) for head, parts in columns.items()}


# The tasks: run(model) -> columns of pictures {head, or t of an x_t: (N, C, H, W)}, labels of the N rows,
# results (M, C, H, W), and notes of what was measured
def run_sdedit(model: Model):
    """Noise an image to several levels, and denoise it from there (SDEdit), by default in 33 strides."""
    diffusion, timesteps, last = model.diffusion, model.timesteps, len(model.timesteps) - 2
    chosen, strengths = model.settings.i_start, model.settings.strength
    if chosen and strengths:
        raise UserError("--i-start and --strength both say where to start: leave one out")
    if chosen and max(chosen) > last:
        raise UserError(f"--i-start {max(chosen)}: the last stride to start at is {last}")
    starts = {f"strength {s:g}": max(1, round(s * diffusion.T)) for s in strengths or ()}
    chosen = [] if strengths else chosen or [i for i in I_STARTS if i <= last] or [0]
    starts |= {f"i_start {i}": timesteps[i] for i in chosen}
    ways = {f"{name}\nt = {t}": [t, *(s for s in timesteps if s < t)] for name, t in starts.items()}
    images, items = model.read_images()

    def edit(items: list[Item], bar) -> dict[str, Tensor]:
        x = images[[item.image for item in items]]
        columns, x_0 = {"input": x.repeat_interleave(2, 0)}, model.space.encode(x)  # two rows for each item
        for head, timesteps in ways.items():
            eps_theta = Watched(model.denoiser(items), diffusion.T, bar, timesteps[:1])
            x = sdedit(diffusion, model.sampler, eps_theta, x_0, timesteps, model.generators(items))
            pair = [model.space.decode(x_t) for x_t in (*eps_theta.kept.values(), x)]
            columns[head] = torch.stack(pair, 1).flatten(0, 1)
        return columns

    columns = model.batches("sdedit", items, edit, len(ways))
    results, x_0 = {head.replace("\n", ", "): columns[head][1::2] for head in ways}, columns["input"][::2]
    labels = [label for item in items for label in (f"{item.label} noised", f"{item.label} edited")]
    notes = [f"{head}: {distance(x, x_0):.3f} rms from the input" for head, x in results.items()]
    return columns, labels, torch.stack(list(results.values()), 1).flatten(0, 1), notes


def read_hole(box: list[int] | None, mask: str | None, size: int) -> Tensor:
    """The hole of --box, or the white of --mask, bool (size, size); UserError if there is none."""
    if (box is None) == (mask is None):
        raise UserError("inpaint fills --box x,y,w,h or the white of --mask FILE: leave one of them out")
    if mask is not None:
        hole = read_images([mask], size, 1, mask=True)[0, 0] > 0
        if not hole.any():
            raise UserError(f"--mask {mask} has no hole: paint white what to fill, and black what to keep")
        return hole
    if len(box) != 4 or 0 in box[2:]:
        raise UserError("--box: expected x,y,w,h in pixels, w and h at least 1")
    (x, y, w, h), hole = box, torch.zeros(size, size, dtype=torch.bool)
    if max(x + w, y + h) > size:
        raise UserError(f"--box leaves the image: x + w and y + h are at most {size}, the model's size")
    hole[y : y + h, x : x + w] = True
    return hole


def run_inpaint(model: Model):
    """Fill the hole of an image, and keep all other pixels (replacement, RePaint)."""
    settings, (images, items) = model.settings, model.read_images()
    if settings.jump > 1 and settings.resample == 1:
        raise UserError("--jump is of RePaint: add --resample 2 or more, or leave it out")
    hole = read_hole(settings.box, settings.mask, model.shape[-1])[None, None].to(model.device)
    touched = F.max_pool2d(hole.float(), model.space.factor) > 0  # the values of x_0 that have pixels in it
    parts = segments(model.timesteps, settings.resample, settings.jump)

    def edit(items: list[Item], bar) -> dict[str, Tensor]:
        x, generators = images[[item.image for item in items]], model.generators(items)
        eps_theta, x_T = model.watched(model.denoiser(items), bar), model.noise(generators)
        x_0, known = model.space.encode(x), torch.where(hole, 0 * x, x)
        x_0 = inpaint(model.diffusion, model.sampler, eps_theta, x_T, parts, x_0, touched, generators)
        result = torch.where(hole, model.space.decode(x_0).to(x), x)  # known pixels stay what they were
        seen = {t: model.space.decode(x_t) for t, x_t in eps_theta.kept.items()}
        return {"input": x, "known": known, **seen, "result": result}

    columns = model.batches("inpaint", items, edit)
    labels, notes = [item.label for item in items], []
    if pairs := model.classes(columns["result"], columns["input"]):
        same, rows = sum(new == old for new, old in pairs), zip(labels, pairs, strict=True)
        labels = [f"{label} seen as {new}, the input as {old}".lstrip() for label, (new, old) in rows]
        notes = [f"the classifier names {same} of {len(pairs)} as it names the input"]
    return columns, labels, columns["result"], notes


def draw_pair(model: Model, label: str, compose, columns_of, *readings: str):
    """Pictures by compose(eps_1, eps_2) of two conditions; a classifier names two columns, the `readings`."""
    model.in_pixels("its two readings share pixels, or frequencies of pixels")
    if len(model.names) != 2:
        raise UserError("this takes a conditional model and two conditions: --labels 6,9, or two of --prompt")

    def edit(items: list[Item], bar) -> dict[str, Tensor]:
        pair = (model.denoiser([Item(condition=k)] * len(items)) for k in (0, 1))
        eps_theta = model.watched(compose(*pair), bar)
        x = model.sample(eps_theta, items)
        return {**eps_theta.kept, **columns_of(x)}

    columns = model.batches("drawing", [Item(draw=draw) for draw in range(model.settings.draws)], edit)
    labels, notes = [label] * model.settings.draws, []
    if found := model.classes(*(columns[reading] for reading in readings)):
        labels = [f"{label} seen as {a} / {b}" for a, b in found]
        notes = [f"the classifier names both as asked in {found.count(tuple(model.names))} of {len(found)}"]
    return columns, labels, columns["as it is"], notes


def make_view(name: str, shape: tuple, pieces: int, seed: int) -> View:
    """The view of that name, in VIEWS or "rotateN", by N degrees; UserError unless it is an isometry."""
    angle = re.fullmatch("rotate([0-9]{1,3})", name)
    if name not in VIEWS and not angle:
        raise UserError(f"--view {name} is unknown: choose one of {', '.join(VIEWS)}")
    view = VIEWS[name](shape[-1], pieces, seed) if name in VIEWS else turned(int(angle[1]))
    if not is_isometry(view, shape):
        raise UserError(f"--view {name} is no isometry: noise would not stay white; try {', '.join(VIEWS)}")
    return view


def run_anagram(model: Model):
    """One picture, read in two ways: as it is, and turned or otherwise rearranged."""
    settings, seen = model.settings, model.settings.view
    view = make_view(settings.view, model.shape, settings.pieces, model.machine.seed)
    label, readings = " / ".join(model.names), lambda x: {"as it is": x, seen: view.see(x)}
    return draw_pair(model, label, partial(anagram, view=view), readings, "as it is", seen)


def run_hybrid(model: Model):
    """A picture that is one thing from afar, by its low frequencies, and another from near."""
    size, sigma, cycles = model.shape[-1], model.settings.sigma, model.settings.cycles
    if sigma and cycles:
        raise UserError("--sigma and --cycles both say which frequencies are low: leave one out")
    cycles = cycles or (2.0 if model.config["dataset"] == "digits" else 2.5)  # the digits fill their images
    G = partial(low_pass, sigma=sigma) if sigma else partial(sharp_low_pass, cycles=cycles)
    edge = (size - max(1, size // 4)) // 2

    def columns_of(x: Tensor) -> dict[str, Tensor]:
        low, small = G(x), F.interpolate(x, size=max(1, size // 4), mode="area")
        small = F.pad(small, (edge, size - edge - small.shape[-1]) * 2, value=1.0)  # on white
        return {"as it is": x, "small": small, "blurred": low_pass(x, size / 11), "low": low, "high": x - low}

    label = " from afar, ".join(model.names) + " from near"
    return draw_pair(model, label, partial(hybrid, G=G), columns_of, "blurred", "as it is")


def run_interpolate(model: Model):
    """From one image to another, through the noise from which DDIM makes them."""
    if model.sampling.sampler == "ddpm" or model.sampling.eta:
        note("this sampler adds fresh noise, so it does not give the images back")
    (images, _), names, last = model.read_images(), model.names, model.settings.frames - 1
    if len(images) != 2 or len(names) > 2:
        raise UserError("interpolate takes two --image files, and one condition for both, or one for each")
    ends, iterations = [Item(), Item(condition=len(names) - 1)], model.settings.iterations
    with progress("inversion", 2) as bar:
        eps_theta = model.watched(model.denoiser(ends), bar, iterations * model.sampling.sample_steps)
        x_0, eps_theta = model.space.encode(images), model.clipped(eps_theta)
        x_T = ddim_inversion(model.diffusion, eps_theta, x_0, model.timesteps, iterations)
    images, (a, b) = images.cpu(), x_T.cpu().unsqueeze(1)  # a and b (1, C, H, W)

    def edit(numbers: range, bar) -> dict[str, Tensor]:
        B, u = len(numbers), torch.tensor(numbers) / last
        eps_1, eps_2 = (model.denoiser([end] * B) for end in ends)
        eps_theta = mixture(eps_1, eps_2, u.to(model.device)) if len(names) == 2 else eps_1
        eps_theta, x_T = model.watched(eps_theta, bar), slerp(a.expand(B, -1, -1, -1), b, u)
        generators = model.generators([Item()] * B)  # the same for all, where the sampler adds noise
        x_0 = model.sampler(model.diffusion, eps_theta, x_T.to(model.device), model.timesteps, generators)
        return {"found": torch.stack([model.space.decode(x_T), model.space.decode(x_0)], 1)}

    found = model.batches("sampling", range(last + 1), edit)["found"]  # (frames, 2, C, H, W)
    columns = {f"u = {u}/{last}": pair for u, pair in enumerate(found)}
    columns = {"image 1": images[[0, 0]], **columns, "image 2": images[[1, 1]]}
    far = [distance(found[i, 1], images[i]) for i in (0, -1)]
    notes = [f"image {i}: inverted and sampled again it is {d:.2g} rms away" for i, d in enumerate(far, 1)]
    return columns, ["x_T", f"x_0 {' to '.join(names)}".rstrip()], found[:, 1], notes


def run_sds(model: Model):
    """Optimise images by score distillation (DreamFusion), and sample others to compare with."""
    settings, diffusion, items, steps = model.settings, model.diffusion, model.items(), model.settings.steps
    snapshot_steps = sorted({max(1, steps // 10), max(1, steps // 3), steps})

    def make(items: list[Item], bar, scale: float, kind: str | None) -> dict[str, Tensor]:
        eps_theta = model.watched(model.denoiser(items, scale), bar, total=steps if kind else 0)
        if kind is None:
            x = model.space.decode(model.sample(eps_theta, items))
            return {"x": torch.stack([x] * len(snapshot_steps), 1)}
        generators, lr = model.generators(items), settings.lr
        start = PARAMETERISATIONS[kind](model.noise(generators))
        x = score_distillation(diffusion, eps_theta, start, steps, lr, generators, snapshot_steps)
        return {"x": model.space.decode(x).transpose(0, 1)}

    columns, notes, results = {}, [], []
    scales = [1.0] if model.y is None else model.guidance.guidance_scale
    for scale, kind in product(scales, (None, *settings.parameterisations)):
        name = f"sds, {kind}" if kind else model.sampling.sampler
        x = model.batches(name, items, partial(make, scale=scale, kind=kind))["x"]  # (N, S, C, H, W)
        head = name if model.y is None else f"{name}\nscale {scale:g}"
        last, columns[head] = x[:, -1].clamp(-1, 1), x.flatten(0, 1)
        among = diversity(last, torch.tensor([item.condition for item in items]))
        more = "" if among is None else f", diversity {among:.3f}"
        notes.append(f"{' '.join(head.split())}: saturation {saturation(last):.3f}{more}")
        results += [last] if kind else []
    rows = enumerate(product(items, snapshot_steps))
    shown = {i: f"{item.label} after {step}" for i, (item, step) in rows if item.draw == 0 or step == steps}
    columns = {head: x[list(shown)] for head, x in columns.items()}
    return columns, list(shown.values()), torch.cat(results), notes


def run_restore(model: Model):
    """Colourise, deblur or enlarge an image (DDNM)."""
    settings, off = model.settings, []
    model.in_pixels("what was measured is linear in pixels, and a decoder is not")
    options = {"super_resolve": {"factor": settings.factor}, "deblur": {"sigma": settings.blur_sigma}}
    measurement = PROBLEMS[settings.problem](model.shape, **options.get(settings.problem, {}))
    shape = measurement.A(torch.zeros(1, *model.shape)).shape[1:]  # of y; an image file has C channels
    images, items = model.read_images(shape[-1] if settings.degraded else None)

    def edit(items: list[Item], bar) -> dict[str, Tensor]:
        given, eps_theta = images[[item.image for item in items]], model.watched(model.denoiser(items), bar)
        y = given if settings.degraded and given.shape[1:] == shape else measurement.A(given)
        x = model.sample(ddnm(model.diffusion, eps_theta, measurement, y), items)
        x = measurement.project(x, y)  # exactly, after extrapolation and clipping
        off.append((measurement.A(x.clamp(-1, 1)) - y).abs().max().item() / 2)  # as a file has it
        original, inverse = {} if settings.degraded else {"input": given}, measurement.inverse(y)
        seen = {"measured": y, "A+ y": inverse} if y.shape == x.shape else {"measured": inverse}
        return {**original, **seen, **eps_theta.kept, "result": x}

    columns = model.batches("restore", items, edit)
    notes = [f"the result's own measurement is within {max(off):.2g} of the one given, in [0, 1]"]
    heads = [head for head in ("measured", "A+ y", "result") if head in columns and "input" in columns]
    notes += [f"{h}: PSNR {psnr(columns[h].clamp(-1, 1), columns['input']).mean():.2f} dB" for h in heads]
    return columns, [item.label for item in items], columns["result"], notes


# Command line ---------------------------------------------------------------------------------------------
GROUPS = [EditSettings, ddpm_conditional.GuidanceSettings, ddpm.SamplerSettings, MachineSettings]
Edit = namedtuple("Edit", "run flags defaults", defaults=({},))
EDITS = {
    "sdedit": Edit(run_sdedit, "image i_start strength draws", dict(sample_steps=None)),
    "inpaint": Edit(run_inpaint, "image mask box resample jump draws classifier"),
    "anagram": Edit(run_anagram, "view pieces draws classifier", dict(draws=10, guidance_scale=[5.0])),
    "hybrid": Edit(run_hybrid, "sigma cycles draws classifier", dict(draws=10, guidance_scale=[5.0])),
    "interpolate": Edit(run_interpolate, "image frames iterations", dict(guidance_scale=[1], sampler="ddim")),
    "sds": Edit(run_sds, "parameterisations steps lr draws", dict(draws=4, guidance_scale=[1.0, 7.5])),
    "restore": Edit(run_restore, "image problem factor blur_sigma degraded draws"),
}


def make_parser() -> cli.Parser:
    parser = cli.Parser(description=__doc__.split("\n\nAn edit")[0], **cli.PLAIN)
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    of_some = {"precision", "compile"}.union(*(edit.flags.split() for edit in EDITS.values()))
    for task, edit in EDITS.items():
        groups, what, own, left_out = {}, edit.run.__doc__, edit.defaults, of_some - {*edit.flags.split()}
        for group in GROUPS:
            rows = {name: row for name, row in cli.rows_of(group).items() if name not in left_out}
            for name, row in rows.items():
                row["of"] = " ".join(choice for choice in row["of"] if "guidance=" not in choice)
                row["default"] = own.get(name, row["default"])
            if group is ddpm.SamplerSettings:
                default = own.get("sampler", "that of the run's previews")
                rows["sampler"]["help"] = f"sampler: %(choices)s (default: {default})"
            made = [(name, object, setting(**row)) for name, row in rows.items()]
            groups[group.__name__.removesuffix("Settings").lower()] = make_dataclass("Shown", made)
        cli.add_settings(tasks.add_parser(task, help=what, description=what, **cli.PLAIN), groups)
    return parser


def main() -> None:
    typed = vars(make_parser().parse_args())
    run, flags, defaults = EDITS[task := typed.pop("task")]
    command = cli.Command(typed, GROUPS)
    model, out = Model(command, defaults), command["out"]
    folder = prepare_folders(run_folder(command["checkpoint"]) / "edits", out)
    columns, labels, results, notes = run(model)
    shown = {"view", "problem"} | command.typed - {"image", "draws", "classifier"}  # settings in the caption
    own = [f"{k.replace('_', ' ')} {command[k]}".removesuffix(" True") for k in flags.split() if k in shown]
    scales = ", ".join(f"{scale:g}" for scale in model.guidance.guidance_scale)
    guided = f"{ddpm_conditional.described(model.sampling, model.guidance)}, scale {scales}"
    made = f"{model.sampling}" if model.y is None else guided
    about = ", ".join([task, *own, model_name(model.config), made, f"seed {command['seed']}"])
    heads = [f"t = {head}" if isinstance(head, int) else head for head in columns]
    x, caption = torch.stack(list(columns.values()), 1).flatten(0, 1), "\n".join([about, *notes])
    grid = make_grid(x, caption, len(heads), labels, heads)
    path = save_picture(grid, new_path(folder / f"{task}.png", ".png"))
    print("\n".join([*notes, f"figure   {quoted(path)}"]))
    if out:
        for i, picture in enumerate(to_pictures(results)):
            save_picture(picture, Path(out) / f"{i:05d}.png", show=False)
        print("images  ", quoted(out))


if __name__ == "__main__":
    run_main(main)
