"""Denoising diffusion from scratch: the mathematics, losses, samplers, training loop and command line.

Read it from top to bottom with the papers open: DDPM (Ho et al. 2020, https://arxiv.org/abs/2006.11239), DDIM
(Song et al. 2021, https://arxiv.org/abs/2010.02502), PNDM (Liu et al. 2022, https://arxiv.org/abs/2202.09778)
and DPM-Solver++ (Lu et al. 2022, https://arxiv.org/abs/2211.01095). t runs 1..T as in DDPM; alpha_bar[0] = 1
is the clean image.

    python ddpm.py                                            train on the embedded digits
    python ddpm.py --epochs 80 --dataset stanfordcars         train on Stanford Cars
    torchrun --nproc_per_node=4 ddpm.py ...                   by four processes, each on its GPU
    python ddpm.py --sample 64 --checkpoint runs/ddpm_digits  sample from what was trained
    python ddpm.py --task denoiser --sigma 0.5                a single-step denoiser, for analysis.py denoise
"""

import argparse
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path

import PIL.Image
import torch
from PIL.Image import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import utils
from modules import EMA, END, Classifier, ConditionalUNet, PublishedUNet, TextUNet, UNet
from utils import SCHEDULES, Loader, Processes, Stopped, UserError, flag, real, whole

Denoiser = Callable[[Tensor, Tensor], Tensor]  # eps_theta(x_t (B, C, H, W), t (B,)) -> eps (B, C, H, W)


@dataclass
class Share:
    """A generator for some images of a batch: it draws for all of the batch, and they get what is theirs.

    So the noise of an image depends neither on how many processes share a batch nor on --accumulate.
    """

    generator: torch.Generator
    images: range  # their positions in the batch
    total: int  # images in the batch

    @property
    def device(self) -> torch.device:
        return self.generator.device


Generators = torch.Generator | Share | Sequence[torch.Generator] | None  # one, or one for each image


def draw(random: Callable[..., Tensor], shape: Sequence[int], x: Tensor, generator: Generators) -> Tensor:
    """`random(shape)`, as of torch.rand, for each of a batch, drawn where the generator lives, moved to x."""
    if isinstance(generator, Share):
        everyones = draw(random, (generator.total, *shape[1:]), x, generator.generator)
        return everyones[generator.images.start : generator.images.stop : generator.images.step]
    device = x.device if generator is None else generator.device
    return random(shape, generator=generator, device=device).to(x.device)


def randn_like(x: Tensor, generator: Generators = None) -> Tensor:
    """Standard normal noise shaped as x (B, ...), drawn where the generator lives and moved to x.

    With a list of generators image i draws from generator i alone, so it does not matter what else is in its
    batch.
    """
    if isinstance(generator, Sequence):
        return torch.cat([randn_like(x[i : i + 1], g) for i, g in enumerate(generator)])
    return draw(partial(torch.randn, dtype=x.dtype), x.shape, x, generator)


def numbered_noise(
    numbers: Sequence[int], shape: Sequence[int], seed: int
) -> tuple[Tensor, list[torch.Generator]]:
    """x_T (B, *shape) and the generator that drew it, for each number: those of `ddpm.py --sample`."""
    generators = [utils.seeded_generator(seed, i) for i in numbers]
    return randn_like(torch.empty(len(numbers), *shape), generators), generators


# ------------------------------------------------------------------------------------------------------------
# How much each noise level counts: w(snr), the weight of the squared error of eps.


def simple(snr: Tensor) -> Tensor:
    """w = 1: plain MSE on eps, DDPM's L_simple (Ho et al. 2020, eq. 14)."""
    return torch.ones_like(snr)


def p2(snr: Tensor, gamma: float = 1.0, k: float = 1.0) -> Tensor:
    """w = 1 / (k + snr)^gamma: less where there is little noise to clean up (P2, Choi et al. 2022)."""
    return 1 / (k + snr) ** gamma


def min_snr(snr: Tensor, gamma: float = 5.0) -> Tensor:
    """w = min(snr, gamma) / snr (Min-SNR-gamma, Hang et al. 2023, in terms of the error of eps)."""
    return snr.clamp(max=gamma) / snr


def mse_x_0(snr: Tensor) -> Tensor:
    """w = 1 / snr: plain MSE on x_0."""
    return 1 / snr


def mse_v(snr: Tensor) -> Tensor:
    """w = (1 + snr) / snr: plain MSE on v (Salimans & Ho 2022)."""
    return (1 + snr) / snr


WEIGHTINGS = {"simple": simple, "p2": p2, "min_snr": min_snr, "x_0": mse_x_0, "v": mse_v}
PLAIN_MSE = {"eps": simple, "x_0": mse_x_0, "v": mse_v}  # for each prediction: plain MSE on what it predicts


class Diffusion:
    """The forward process q(x_t | x_0), what a network is trained to say of it, and how that becomes eps.

    `alpha_bar` and `snr` (T+1,) float64 on the CPU; `prediction` is what the network's output means: "eps",
    "x_0" or "v"; `weighting` is a name in WEIGHTINGS or any w(snr), None being plain MSE on the prediction.
    ValueError for T < 2 or an unknown name.
    """

    def __init__(
        self,
        noise_steps: int = 1000,
        schedule: str | Callable[[int], Tensor] = "linear",
        prediction: str = "eps",
        weighting: str | Callable[[Tensor], Tensor] | None = None,
    ):
        if noise_steps < 2 or prediction not in PLAIN_MSE:
            raise ValueError(f"noise_steps must be at least 2 and prediction one of {', '.join(PLAIN_MSE)}")
        if isinstance(schedule, str) and schedule not in SCHEDULES:
            raise ValueError(f"schedule {schedule!r} is none of {', '.join(SCHEDULES)}")
        if isinstance(weighting, str) and weighting not in WEIGHTINGS:
            raise ValueError(f"weighting {weighting!r} is none of {', '.join(WEIGHTINGS)}")
        self.T, self.prediction = noise_steps, prediction
        betas = (SCHEDULES[schedule] if isinstance(schedule, str) else schedule)(noise_steps)  # (T,)
        one = torch.ones(1, dtype=torch.float64)
        self.alpha_bar = torch.cat([one, (1 - betas.double()).cumprod(0)])  # (T+1,) prod (1 - beta), eq. 4

        self.snr = self.alpha_bar / (1 - self.alpha_bar)  # (T+1,), infinite at t = 0
        snr = self.snr[1:]
        w = PLAIN_MSE[prediction] if weighting is None else WEIGHTINGS.get(weighting, weighting)
        # Squared errors: of eps = snr x of x_0 = alpha_bar x of v. So w becomes the weight of the output's.
        factor = {"eps": torch.ones_like(snr), "x_0": snr, "v": self.alpha_bar[1:]}[prediction]
        self.tables = {
            "signal": self.alpha_bar.sqrt(),
            "noise": (1 - self.alpha_bar).sqrt(),
            "weight": torch.cat([0 * one, w(snr) * factor]),  # t = 0 is never trained
        }
        self.moved: dict[tuple, Tensor] = {}  # the tables, cast once for each device and type

    def lookup(self, table: str, t: Tensor, x: Tensor) -> Tensor:
        """Entries t (B,) of a table, in the type and on the device of x; -> (B, 1, 1, 1)."""
        key = (table, x.dtype, x.device)
        if key not in self.moved:
            self.moved[key] = self.tables[table].to(x.dtype).to(x.device)
        return self.moved[key][t].view(-1, 1, 1, 1)

    def scales(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t) for t (B,); -> (B, 1, 1, 1) each."""
        return self.lookup("signal", t, x), self.lookup("noise", t, x)

    def noise_images(self, x_0: Tensor, t: Tensor, generator: Generators = None) -> tuple[Tensor, Tensor]:
        """Draw x_t ~ q(x_t | x_0) in one go; -> x_t and the eps in it, (B, C, H, W) each (DDPM, eq. 4)."""
        signal, noise = self.scales(t, x_0)
        eps = randn_like(x_0, generator)
        return signal * x_0 + noise * eps, eps  # DDPM, eq. 4, reparameterised: N(sqrt(ab) x_0, (1 - ab) I)

    def target(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the network should say: eps, x_0 or v = sqrt(ab) eps - sqrt(1 - ab) x_0; (B, C, H, W)."""
        signal, noise = self.scales(t, x_0)
        return {"eps": eps, "x_0": x_0, "v": signal * eps - noise * x_0}[self.prediction]

    def split(
        self, out: Tensor, x_t: Tensor, t: Tensor, prediction: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """The (x_0, eps) that x_t is made of if the network's output `out`, an eps, x_0 or v, is right.

        Solves x_t = sqrt(ab) x_0 + sqrt(1 - ab) eps for what `out` leaves open. `prediction` defaults to the
        network's.
        """
        signal, noise = self.scales(t, x_t)
        prediction = prediction or self.prediction
        if prediction == "eps":
            return (x_t - noise * out) / signal, out  # DDPM, eq. 15
        if prediction == "x_0":
            return out, (x_t - signal * out) / noise
        return signal * x_t - noise * out, noise * x_t + signal * out  # "v" (Salimans & Ho 2022, appendix D)

    def denoiser(self, net: torch.nn.Module, y: Tensor | None = None) -> Denoiser:
        """`eps_theta(x_t, t) -> eps` for a network of any prediction, its condition y closed over."""

        def eps_theta(x_t: Tensor, t: Tensor) -> Tensor:
            t = torch.as_tensor(t, device=x_t.device).expand(len(x_t))
            return self.split(net(x_t, t, y).to(x_t.dtype), x_t, t)[1]

        return eps_theta

    def loss(
        self, net: torch.nn.Module, x_0: Tensor, y: Tensor | None = None, generator: Generators = None
    ) -> Tensor:
        """Weighted squared error of the network on x_0 (B, C, H, W); -> scalar (DDPM, Algorithm 1)."""
        # Start: training step (DDPM, Algorithm 1)
        t = self.sample_timesteps(x_0, generator)  # line 3: t ~ Uniform({1, ..., T}), one for each image
        x_t, eps = self.noise_images(x_0, t, generator)  # line 4: eps ~ N(0, I); eq. 4: the x_t of line 5
        out = net(x_t, t, y).to(x_0.dtype)  # line 5: eps_theta(x_t, t), or the network's x_0 or v
        error = (out - self.target(x_0, eps, t)).square().mean((1, 2, 3), keepdim=True)  # line 5: ||...||^2
        return (self.lookup("weight", t, x_0) * error).mean()  # by noise level; weight 1 is eq. 14, L_simple
        # End (the gradient step of line 5 is in train())

    def sample_timesteps(self, x_0: Tensor, generator: Generators = None) -> Tensor:
        """t ~ Uniform({1, ..., T}) for each image; -> (B,) int64."""
        return draw(partial(torch.randint, 1, self.T + 1), (len(x_0),), x_0, generator)

    def timesteps(self, steps: int) -> list[int]:
        """[T, ..., 0], steps + 1 entries, as even as whole numbers can be; ValueError if not 1..T steps."""
        if not 1 <= steps <= self.T:
            raise ValueError(f"steps must lie between 1 and T = {self.T}, not {steps}")
        return [round(self.T * (steps - i) / steps) for i in range(steps + 1)]

    def strides(self, x: Tensor, timesteps: Sequence[int]) -> Iterator[tuple[Tensor, float, float]]:
        """For each stride t -> s of a list of timesteps: t (B,), alpha_bar_t and alpha_bar_s."""
        for t, s in pairwise(timesteps):
            yield (
                torch.full((len(x),), t, device=x.device),
                self.alpha_bar[t].item(),
                self.alpha_bar[s].item(),
            )


# ------------------------------------------------------------------------------------------------------------
# Samplers: sampler(diffusion, eps_theta, x, timesteps, generator=None) -> x. They see a denoiser and a
# decreasing list of timesteps, nothing else; one that ends above 0 leaves x_t at that noise level, for
# another sampler to go on from.


@torch.no_grad()
def ddpm(
    diffusion: Diffusion,
    eps_theta: Denoiser,
    x: Tensor,
    timesteps: Sequence[int],
    generator: Generators = None,
    variance: str = "posterior",
) -> Tensor:
    """Ancestral sampling, x (B, C, H, W) at timesteps[0] -> x at timesteps[-1] (Ho et al. 2020, Algorithm 2).

    variance: sigma_t^2 = "beta", or the "posterior" beta_tilde = (1 - ab_s) / (1 - ab_t) beta (eq. 7), which
    is the better one when a stride t -> s skips steps; beta_t and alpha_t are then those of the stride,
    alpha_t = ab_t / ab_s.
    """
    # Start: DDPM sampling (Algorithm 2)
    for t, ab_t, ab_s in diffusion.strides(x, timesteps):  # line 2: for t = T, ..., 1
        alpha, beta = ab_t / ab_s, 1 - ab_t / ab_s
        posterior = beta * (1 - ab_s) / (1 - ab_t)  # eq. 7
        sigma = {"posterior": posterior, "beta": beta if ab_s < 1 else 0.0}[variance] ** 0.5  # section 3.2
        x = (x - beta / (1 - ab_t) ** 0.5 * eps_theta(x, t)) / alpha**0.5  # line 4: the mean, eq. 11
        if sigma > 0:  # line 3: z ~ N(0, I) if t > 1, else z = 0
            x = x + sigma * randn_like(x, generator)  # line 4: + sigma_t z
    return x  # line 6
    # End


def ddim_stride(x: Tensor, eps: Tensor, ab_t: float, ab_s: float, sigma: float = 0.0) -> Tensor:
    """From x_t to x_s, less its fresh noise, if x_t holds `eps` (DDIM, eq. 12; PNDM, the transfer part)."""
    x_0 = (x - (1 - ab_t) ** 0.5 * eps) / ab_t**0.5  # "predicted x_0"
    return ab_s**0.5 * x_0 + max(0.0, 1 - ab_s - sigma**2) ** 0.5 * eps  # + "direction pointing to x_t"


@torch.no_grad()
def ddim(
    diffusion: Diffusion,
    eps_theta: Denoiser,
    x: Tensor,
    timesteps: Sequence[int],
    generator: Generators = None,
    eta: float = 0.0,
) -> Tensor:
    """DDIM, x (B, C, H, W) at timesteps[0] -> x at timesteps[-1] (Song et al. 2021, eq. 12 and 16).

    eta = 0 is deterministic, Euler's method on the probability flow; eta = 1 is DDPM with the posterior
    variance.
    """
    # Start: DDIM sampling
    for t, ab_t, ab_s in diffusion.strides(x, timesteps):
        sigma = eta * ((1 - ab_s) / (1 - ab_t) * (1 - ab_t / ab_s)) ** 0.5  # eq. 16
        x = ddim_stride(x, eps_theta(x, t), ab_t, ab_s, sigma)  # eq. 12, its first two terms
        if sigma > 0:
            x = x + sigma * randn_like(x, generator)  # eq. 12, "random noise"
    return x
    # End


ADAMS_BASHFORTH = {  # by how many eps are known, the newest first (PNDM, section 3.3)
    1: [1],
    2: [3 / 2, -1 / 2],
    3: [23 / 12, -16 / 12, 5 / 12],
    4: [55 / 24, -59 / 24, 37 / 24, -9 / 24],
}


@torch.no_grad()
def pndm(
    diffusion: Diffusion,
    eps_theta: Denoiser,
    x: Tensor,
    timesteps: Sequence[int],
    generator: Generators = None,
    runge_kutta: bool = False,
) -> Tensor:
    """Pseudo linear multistep, x (B, C, H, W) at timesteps[0] -> x at timesteps[-1] (PNDM, Liu et al. 2022).

    A DDIM stride along an eps extrapolated from the last four. It starts with fewer, or with `runge_kutta`
    with three pseudo Runge-Kutta strides of four evaluations each (the paper's way). Deterministic: the
    generator is not used.
    """
    # Start: PNDM sampling
    history: list[Tensor] = []  # the last eps, newest first
    for i, (t, ab_t, ab_s) in enumerate(diffusion.strides(x, timesteps)):
        history = [eps_theta(x, t), *history[:3]]
        if runge_kutta and i < 3:
            eps = runge_kutta_eps(diffusion, eps_theta, x, history[0], timesteps[i], timesteps[i + 1])
        else:
            eps = sum(w * e for w, e in zip(ADAMS_BASHFORTH[len(history)], history, strict=True))
        x = ddim_stride(x, eps, ab_t, ab_s)
    return x
    # End


def runge_kutta_eps(
    diffusion: Diffusion, eps_theta: Denoiser, x: Tensor, eps_1: Tensor, t: int, s: int
) -> Tensor:
    """The eps of a pseudo Runge-Kutta stride t -> s from x (B, C, H, W), eps_1 being eps_theta(x, t).

    PNDM, section 3.3. The half step is (t + s + 1) // 2, and a stride that ends in 0 looks ahead to 1: no
    network was trained at t = 0.
    """
    half, end = (t + s + 1) // 2, max(s, 1)

    def look(eps: Tensor, to: int) -> Tensor:
        there = ddim_stride(x, eps, diffusion.alpha_bar[t].item(), diffusion.alpha_bar[to].item())
        return eps_theta(there, torch.full((len(x),), to, device=x.device))

    eps_2 = look(eps_1, half)
    eps_3 = look(eps_2, half)
    eps_4 = look(eps_3, end)
    return (eps_1 + 2 * eps_2 + 2 * eps_3 + eps_4) / 6


@torch.no_grad()
def dpm_solver(
    diffusion: Diffusion,
    eps_theta: Denoiser,
    x: Tensor,
    timesteps: Sequence[int],
    generator: Generators = None,
) -> Tensor:
    """DPM-Solver++(2M), x (B, C, H, W) at timesteps[0] -> x at timesteps[-1] (Lu et al. 2022, Algorithm 2).

    Exact in the linear part of the flow, second order in the change of x_0 over lambda = log(sqrt(ab) /
    sqrt(1 - ab)). Deterministic: the generator is not used.
    """
    # Start: DPM-Solver++(2M) sampling
    x_0_before, h_before = None, 0.0
    for t, ab_t, ab_s in diffusion.strides(x, timesteps):
        x_0, _ = diffusion.split(eps_theta(x, t), x, t, "eps")
        h = log_snr_half(ab_s) - log_snr_half(ab_t)  # the stride in lambda; infinite where s = 0
        D = x_0  # the first stride, and one that ends in 0, are of first order
        if x_0_before is not None and ab_s < 1:
            r = h_before / h
            D = (1 + 1 / (2 * r)) * x_0 - 1 / (2 * r) * x_0_before  # x_0 half a stride on, extrapolated
        x = ((1 - ab_s) / (1 - ab_t)) ** 0.5 * x - ab_s**0.5 * math.expm1(-h) * D  # the flow for constant D
        x_0_before, h_before = x_0, h
    return x
    # End


def log_snr_half(ab: float) -> float:
    """lambda = log(sqrt(ab) / sqrt(1 - ab)), half of log snr; infinite at ab = 1."""
    return 0.5 * math.log(ab / (1 - ab)) if ab < 1 else math.inf


SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "pndm": pndm, "dpm_solver": dpm_solver}


def clip_x_0(diffusion: Diffusion, eps_theta: Denoiser) -> Denoiser:
    """The denoiser with its x_0 clipped to [-1, 1] and eps derived anew: the outermost wrapper."""

    def clipped(x_t: Tensor, t: Tensor) -> Tensor:
        x_0, _ = diffusion.split(eps_theta(x_t, t), x_t, t, "eps")
        return diffusion.split(x_0.clamp(-1, 1), x_t, t, "x_0")[1]

    return clipped


def at(t: int, T: int) -> int:
    """A time quoted for 1000 steps, in a process of T."""
    return max(1, round(t * T / 1000))


def strided_timesteps(T: int) -> list[int]:
    """[990, 960, ..., 30, 0], quoted for 1000 steps, in a process of T (Berkeley CS180, project 5, A 1.4)."""
    return sorted({0, *(at(t, T) for t in range(990, 0, -30))}, reverse=True)


# ------------------------------------------------------------------------------------------------------------
# Training: one loop, which serves every task that trains anything.

CHECK_EVERY = 25  # steps between two looks at the loss: each look waits for the device
SAVE_SECONDS = 600  # within a long epoch, save this often


def learning_rate(step: int, total: int, peak: float, warmup: int) -> float:
    """Linear warm-up (over at most a tenth of the run), then half a cosine from `peak` to 0 at `total`."""
    warmup = min(warmup, total // 10)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def random_states(generator: torch.Generator) -> dict:
    """Every random state that training draws from, as CPU ByteTensors."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda, "train": generator.get_state()}


def restore(
    checkpoint: dict, net: torch.nn.Module, ema: EMA, optimizer: torch.optim.Optimizer, generator
) -> None:
    """Put a checkpoint's weights, optimizer and random states in place; UserError where they don't fit."""
    try:
        net.load_state_dict(checkpoint["net"])
        ema.net.load_state_dict(checkpoint["ema"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"the checkpoint does not fit this network: {str(error).splitlines()[0]}") from None
    torch.set_rng_state(checkpoint["rng"]["cpu"])
    if len(checkpoint["rng"]["cuda"]) == torch.cuda.device_count() > 0:
        torch.cuda.set_rng_state_all(checkpoint["rng"]["cuda"])
    state = checkpoint["rng"]["train"]
    if state.numel() == generator.get_state().numel():  # else the run began on another kind of device
        generator.set_state(state)


class Wrapped(torch.nn.Module):
    """A network that is called in another way, and is else the one that it wraps."""

    def __init__(self, net: torch.nn.Module):
        super().__init__()
        self.net = net

    def null(self, y: Tensor) -> Tensor:
        return self.net.null(y)


class Compiled(Wrapped):
    """A network compiled by torch.compile, maybe into CUDA graphs; itself, with a note, where that fails."""

    def __init__(self, net: torch.nn.Module, graphs: bool):
        super().__init__(net)
        self.graphs = graphs
        self.fast = torch.compile(net, mode="reduce-overhead" if graphs else None, dynamic=False)

    def forward(self, *inputs: Tensor) -> Tensor:
        if self.fast is None:
            return self.net(*inputs)
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()  # what the last call returned may be overwritten
        try:
            out = self.fast(*inputs)
        except Exception as error:  # of the compiler and of the tools it calls: there are many
            if utils.out_of_memory(error):
                raise
            utils.note(f"--compile failed and is left out: {utils.first_line(error)}")
            self.fast = None
            return self.net(*inputs)
        return out.clone() if self.graphs and not torch.is_grad_enabled() else out  # a sampler may keep it


def batch_gradient(
    model: torch.nn.Module,
    loss_fn: Callable[..., Tensor],
    x_0: Tensor,
    y: Tensor | None,
    generator: torch.Generator,
    total: int,
    processes: Processes,
    accumulate: int = 1,
    autocast: Callable = nullcontext,
) -> Tensor:
    """Add the gradient of the mean loss over a batch of `total` images to the weights' grad; -> loss, a
    scalar: averaged over the processes it is the mean loss.

    x_0 (B, C, H, W) and y are this process's share of the batch, taken in `accumulate` parts, one after the
    other. With several processes `model` averages their gradients.
    """
    mine, before = processes.share(range(total)), generator.get_state()
    loss, parts = torch.zeros((), device=x_0.device), min(accumulate, len(x_0))
    for k in range(parts):
        images = mine[k::parts]  # their positions in the batch
        weight = len(images) / total * processes.count  # 0 for a process that the last batch has no image for
        generator.set_state(before)  # each part draws for the whole batch
        draws = generator if len(images) == total else Share(generator, images or range(1), total)
        y_k = None if y is None else y[k::parts]
        alone, last = processes.count == 1, k + 1 == parts
        with nullcontext() if alone or last else model.no_sync():  # the gradients travel once
            # Start: DDPM, Algorithm 1, lines 3 to 5 (line 2: x_0 ~ q(x_0) came from the loader)
            with autocast():
                loss_k = weight * loss_fn(model, x_0[k::parts], y_k, draws)  # lines 3 and 4, error of line 5
            loss_k.backward()  # line 5: its gradient in theta
            # End (the step is in train())
        loss += loss_k.detach()
    return loss


def train(
    net: torch.nn.Module,
    loss_fn: Callable[..., Tensor],
    loader: Loader,
    run: Path,
    *,
    epochs: int,
    lr: float = 2e-4,
    warmup: int = 200,
    weight_decay: float = 0.01,
    clip_grad: float = 1.0,
    ema_decay: float = 0.999,
    bf16: bool = False,
    compile: bool = False,
    accumulate: int = 1,
    seed: int = 0,
    save_every: int = 1,
    preview: Callable[[torch.nn.Module, int], object] | None = None,
    preview_every: int = 1,
    extra: dict | None = None,
    resume: dict | None = None,
) -> EMA:
    """Minimise `loss_fn(net, x_0, y, generator)` over the loader's batches; `run` gets ckpt.pt and log.csv.

    `extra` goes into every checkpoint; `resume` is a checkpoint to go on from, bit for bit on the CPU.
    `preview(net, epoch)` is called with the averaged weights. Of several processes, the loader's, only the
    first one writes. Raises UserError if the loss stops being finite (the last good checkpoint stays) and
    Stopped after a signal (the place is saved).
    """
    device, per_epoch, processes = loader.device, len(loader), loader.processes
    net.train()
    optimizer = torch.optim.AdamW(net.parameters(), lr, weight_decay=weight_decay, fused=device.type != "mps")
    ema = EMA(net, ema_decay)
    generator = torch.Generator(device).manual_seed(seed)
    step, loss_sum = 0, 0.0  # steps done; the sum of this epoch's losses
    if resume is not None:
        restore(resume, net, ema, optimizer, generator)
        step, loss_sum = resume["step"], resume["loss_sum"]
    if not processes.first:
        torch.manual_seed(seed + step + processes.rank)  # other features are dropped than in the first
    begun_at, model = step, net
    if compile:  # a graph's gradients are gone at its next call, so --accumulate can't add to them
        model = Compiled(net, graphs=device.type == "cuda" and accumulate == 1)
    if processes.count > 1:
        model = DistributedDataParallel(model, [device.index] if device.type == "cuda" else None)
    autocast = partial(torch.autocast, device.type, torch.bfloat16) if bf16 else nullcontext
    log = utils.Log(run / "log.csv", step) if processes.first else None
    pending: list[Tensor] = []  # loss and gradient norm of the last few steps, still on the device
    saved_at = time.monotonic()

    def check() -> None:
        """Read the pending losses, add them up, and stop if one is not finite: nothing later is saved."""
        nonlocal loss_sum
        values = processes.add(torch.stack(pending)) / processes.count if pending else torch.zeros(0, 2)
        for i, (loss, norm) in enumerate(values.tolist()):
            if not math.isfinite(loss) or not math.isfinite(norm):
                what = "loss" if not math.isfinite(loss) else "gradient"
                raise UserError(
                    f"the {what} is not finite at step {step - len(pending) + i + 1}: try a lower --lr; "
                    f"{run / 'ckpt.pt'} holds the last good weights"
                )
            loss_sum += loss
        pending.clear()

    def save() -> None:
        nonlocal saved_at
        check()
        saved_at = time.monotonic()
        if not processes.first:
            return
        state = {"net": net.state_dict(), "ema": ema.net.state_dict(), "optimizer": optimizer.state_dict()}
        place = {
            "epoch": step // per_epoch,
            "step": step,
            "loss_sum": loss_sum,
            "rng": random_states(generator),
        }
        utils.save_checkpoint(run / "ckpt.pt", {**(extra or {}), **state, **place})

    def asked() -> list[bool]:
        """Whether to stop, and whether it is time to save: all processes must do the same."""
        return processes.any(stop.is_set(), time.monotonic() - saved_at > SAVE_SECONDS)

    bar = tqdm(
        total=epochs * len(loader.images),
        initial=step // per_epoch * len(loader.images) + step % per_epoch * loader.batch_size,
        unit="img",
        unit_scale=True,
        mininterval=0.2 if sys.stderr.isatty() else 10,
    )
    with utils.stop_on_signal() as stop, bar:
        if resume is None:
            save()  # from here on there is always a checkpoint
        for epoch in range(step // per_epoch, epochs):
            bar.set_description(f"epoch {epoch + 1}/{epochs}", refresh=False)
            started, images = time.monotonic(), 0
            for x_0, y in loader.epoch(epoch, start=step % per_epoch):
                total = loader.size(step % per_epoch)
                # Start: gradient step (DDPM, Algorithm 1)
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, epochs * per_epoch, lr, warmup)
                optimizer.zero_grad()
                loss = batch_gradient(
                    model, loss_fn, x_0, y, generator, total, processes, accumulate, autocast
                )  # lines 3 to 5: the gradient in theta
                norm = torch.nn.utils.clip_grad_norm_(net.parameters(), clip_grad)
                optimizer.step()  # line 5: the step
                ema.update(net, step)  # Ho et al. 2020, appendix B: sampling uses averaged weights
                # End
                pending.append(torch.stack([loss.float(), norm.detach().float()]))
                if compile and step == begun_at:
                    loss.item()  # waits for the device
                    tqdm.write(f"the first step took {time.monotonic() - started:.0f} s, with compilation")
                step, images = step + 1, images + total
                bar.update(total)
                if len(pending) >= CHECK_EVERY:
                    check()
                    bar.set_postfix(loss=f"{loss_sum / ((step - 1) % per_epoch + 1):.4f}", refresh=False)
                stopping, late = asked()
                if step % per_epoch and (stopping or late):
                    save()
                    if stopping:
                        raise Stopped
            check()
            if log:
                log.add(
                    epoch + 1, step, loss_sum / per_epoch, optimizer.param_groups[0]["lr"], images, started
                )
            bar.set_postfix(loss=f"{loss_sum / per_epoch:.4f}", refresh=False)
            loss_sum = 0.0
            # asked once: the signal may come between two lines
            stopping, _ = asked()
            if (epoch + 1) % save_every == 0 or epoch + 1 == epochs or stopping:
                save()
            if stopping and epoch + 1 < epochs:
                raise Stopped
            if preview and processes.first and ((epoch + 1) % preview_every == 0 or epoch + 1 == epochs):
                preview(ema.net, epoch + 1)
    return ema


def memory_of_training(
    net: torch.nn.Module, loss_fn: Callable[..., Tensor], x_0: Tensor, y: Tensor | None, autocast: Callable
) -> tuple[int, int]:
    """The bytes that training holds whatever the batch, and for each image of it: x_0 (1, C, H, W) is one.

    Counted: weights, their gradients, AdamW's two moments and the average; and what the forward pass keeps
    for the backward pass, of one image and of two.
    """
    weights = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in net.parameters()}

    def kept_of(n: int) -> int:
        kept: dict[int, int] = {}  # by address: a tensor may be kept twice

        def keep(x: Tensor) -> Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        x, of_x = x_0.repeat(n, 1, 1, 1), None if y is None else torch.cat([y] * n)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), autocast():
            loss = loss_fn(net, x, of_x, torch.Generator(x.device).manual_seed(0))
        del loss
        return sum(n for address, n in kept.items() if address not in weights)

    one, two = kept_of(1), kept_of(2)
    return 5 * sum(weights.values()) + max(0, 2 * one - two), two - one


def what_fits(
    fixed: int,
    each: int,
    room: float,
    batch_size: int,
    accumulate: int,
    processes: Processes,
    checkpointing: bool = False,
) -> str:
    """What to lower where memory ran out, and how far, of `room` bytes; the work itself gets a fifth."""
    fit = int((0.8 * room - fixed) // each) * processes.count  # images at a time
    fit = min(fit, math.ceil(batch_size / accumulate) // 2)  # all did not, so the count may be too low
    keep_less = "" if checkpointing else ", or add --checkpointing"
    told = f"out of memory at --batch-size {batch_size}" + (f" --accumulate {accumulate}" * (accumulate > 1))
    told += f" (an image takes {each / 1e6:.1f} MB, the weights {fixed / 1e6:.0f} MB, of {room / 1e9:.1f} GB)"
    if fit < 1:
        return f"{told}: not one image fits: lower --image-size or --width{keep_less}"
    lower = f"lower --batch-size to {fit * accumulate}"
    return f"{told}: {lower}, or take --accumulate {math.ceil(batch_size / fit)}{keep_less}"


# ------------------------------------------------------------------------------------------------------------
# Command line


def add_task_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("task").add_argument
    task = "what to train: diffusion, or a denoiser that removes the noise of one level in one step"
    add("--task", choices=list(TASKS), default="diffusion", metavar="NAME", help=task)
    level = "--task denoiser: of the noise, in units of images in [0, 1]"
    add("--sigma", type=real(0, above=True), default=0.5, metavar="S", help=level)


def add_diffusion_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("diffusion").add_argument
    add("--noise-steps", type=whole(2), default=1000, metavar="T", help="number of noise levels")
    schedule = "of the noise: %(choices)s"
    add("--schedule", choices=list(SCHEDULES), default="cosine", metavar="NAME", help=schedule)
    predicted = "what the network predicts: %(choices)s (default: v; eps for shapes)"
    add("--prediction", choices=list(PLAIN_MSE), default="v", metavar="NAME", help=predicted)
    weighted = "of noise levels in the loss: %(choices)s (default: plain MSE on the prediction; shapes: p2)"
    add("--weighting", choices=list(WEIGHTINGS), metavar="NAME", help=weighted)
    add("--p2-gamma", type=real(0), default=1.0, metavar="G", help="--weighting p2: 1 / (k + snr)^gamma")
    add(
        "--p2-k",
        type=real(0, above=True),
        default=1.0,
        metavar="K",
        help="--weighting p2: its k",
    )
    cut = "--weighting min_snr: where snr is cut off"
    add("--min-snr-gamma", type=real(0, above=True), default=5.0, metavar="G", help=cut)


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("training").add_argument
    passes = "passes over the data (default: digits 20, 30 if conditional; shapes, denoiser 5; else 80)"
    add("--epochs", type=whole(1), metavar="N", help=passes)
    batch = "in one step, or sampled at once (default: by image size; 64 with --sample)"
    add("--batch-size", type=whole(1), metavar="IMAGES", help=batch)
    rate = "peak learning rate of AdamW (default: by image size)"
    add("--lr", type=real(0, above=True), metavar="RATE", help=rate)
    add(
        "--warmup",
        type=whole(0),
        default=200,
        metavar="STEPS",
        help="to the peak; at most a tenth of the run",
    )
    add("--weight-decay", type=real(0), default=0.01, metavar="RATE", help="of AdamW")
    add("--clip-grad", type=real(0, above=True), default=1.0, metavar="NORM", help="largest gradient norm")
    add("--ema-decay", type=real(0, 1), default=0.999, metavar="D", help="of the averaged weights, per step")
    bf16 = "fp32, bf16, or auto: bf16 where it is faster"
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto", metavar="NAME", help=bf16)
    add("--compile", action="store_true", help="torch.compile the network: slower to start, then faster")
    split = "parts that a batch is taken in, one after the other: less memory, the same step"
    add("--accumulate", type=whole(1), default=1, metavar="PARTS", help=split)
    again = "keep few activations and compute the others again: less memory, a third more time"
    add("--checkpointing", action="store_true", help=again)
    grids = "between two sample grids (default: a quarter of the run)"
    add("--preview-every", type=whole(1), metavar="EPOCHS", help=grids)
    add("--save-every", type=whole(1), default=1, metavar="EPOCHS", help="between two checkpoints")
    add("--name", metavar="NAME", help="of the run's folder (default: the script and the data set)")
    add("--runs", default="runs", metavar="DIR", help="where run folders are made")
    add("--resume", metavar="RUN", help="go on with an interrupted run (its folder), with its settings")


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    group = "sampling (the sampler, its options and the clipping also serve the previews)"
    add = parser.add_argument_group(group).add_argument
    add("--sample", type=whole(1), metavar="N", help="draw N images from a checkpoint instead of training")
    add("--checkpoint", metavar="RUN", help="--sample: a run's folder, or published weights")
    add_sampler_flags(add, "ddim, ddpm for shapes; with --sample what the run's previews used")
    add("--out", metavar="DIR", help="--sample: also write one PNG per image there, for FID tools")
    add("--animate", action="store_true", help="--sample: also write a GIF of the denoising")


def add_sampler_flags(add: Callable, default: str, steps: str = "50, at most T") -> None:
    how = f"one of %(choices)s (default: {default})"
    add("--sampler", choices=list(SAMPLERS), default="ddim", metavar="NAME", help=how)
    add("--sample-steps", type=whole(1), metavar="N", help=f"strides from t = T to 0 (default: {steps})")
    add(
        "--eta", type=real(0, 1), default=0.0, metavar="E", help="--sampler ddim: 0 no fresh noise, 1 as DDPM"
    )
    sigma = "--sampler ddpm: sigma_t^2, posterior or beta"
    add("--variance", choices=["posterior", "beta"], default="posterior", metavar="NAME", help=sigma)
    add("--runge-kutta", action="store_true", help="--sampler pndm: start with three Runge-Kutta strides")
    add("--no-clip", action="store_true", help="do not clip x_0 to [-1, 1] at each stride")


def make_parser(
    description: str = "Train an unconditional diffusion model, or sample from one.",
) -> argparse.ArgumentParser:
    parser = utils.Parser(description=description)
    utils.add_data_flags(parser)
    utils.add_network_flags(parser)
    add_diffusion_flags(parser)
    add_training_flags(parser)
    add_sampling_flags(parser)
    utils.add_machine_flags(parser)
    return parser


SAMPLER_FLAGS = {"eta": "ddim", "variance": "ddpm", "runge_kutta": "pndm"}  # which sampler a flag belongs to
WEIGHTING_FLAGS = {"p2_gamma": "p2", "p2_k": "p2", "min_snr_gamma": "min_snr"}
HOW_TO_SAMPLE = {"sampler", "sample_steps", "no_clip", *SAMPLER_FLAGS}  # this serves previews as well
OF_DIFFUSION = {"noise_steps", "schedule", "prediction", "weighting", *WEIGHTING_FLAGS, *HOW_TO_SAMPLE}
FLAG_OWNERS = {"sampler": SAMPLER_FLAGS, "weighting": WEIGHTING_FLAGS}
TASK_FLAGS = {"sigma": "denoiser", **{dest: "diffusion" for dest in OF_DIFFUSION}}
ONLY_SAMPLING = {"checkpoint", "out", "animate"}  # flags that go with --sample alone
HOW_TO_RUN = {"precision", "compile"}
# Flags that mean something beside --sample; the other settings come from the checkpoint.
FOR_SAMPLING = {"sample", "batch_size", "device", "seed", *HOW_TO_RUN, *ONLY_SAMPLING, *HOW_TO_SAMPLE}
FREE_ON_RESUME = {  # flags that may change when a run goes on: they shape neither network nor data nor loss
    *("resume", "epochs", "data_root", "cache_dir", "workers", "device", *HOW_TO_RUN),
    *("accumulate", "checkpointing", "preview_every", "save_every", *HOW_TO_SAMPLE),
}


def check_flags(
    args: argparse.Namespace,
    owners: dict = FLAG_OWNERS,
    for_sampling: set = FOR_SAMPLING,
    only_sampling: set = ONLY_SAMPLING,
) -> None:
    """Refuse flags that would have no effect, rather than ignore them; UserError."""
    if not args.resume:
        check_owners(args, owners)
    if args.sample is None:
        for dest in args.typed & only_sampling:
            raise UserError(f"{flag(dest)} goes with --sample N, the number of images to draw")
    elif args.checkpoint is None:
        raise UserError("--sample needs --checkpoint RUN, the folder of the run to sample from")
    else:
        for dest in args.typed - for_sampling:
            raise UserError(f"{flag(dest)} comes from the checkpoint when sampling: leave it out")


DATA_DEFAULTS = {  # what suits a data set, where the command line leaves it open
    "digits": {"epochs": 20},
    # Flat pictures on bright grounds: v stays on a plateau for long, and x_0 learns words late.
    "shapes": {"epochs": 5, "batch_size": 16, "prediction": "eps", "weighting": "p2", "sampler": "ddpm"},
}


def check_owners(args: argparse.Namespace, owners: dict[str, dict[str, str]]) -> None:
    """UserError for a flag that belongs to another choice, {owner: {flag: the choice it belongs to}}."""
    for owner, flags in owners.items():
        for dest in args.typed & set(flags):
            if getattr(args, owner) != flags[dest]:
                raise UserError(f"{flag(dest)} belongs to --{owner} {flags[dest]}: add that, or leave it out")


def fill_data_set_defaults(args: argparse.Namespace, defaults: dict[str, dict] = DATA_DEFAULTS) -> None:
    """Settle what is known of a data set by its name, for a new run; a loss that was typed is left alone."""
    if args.sample is not None or args.resume:
        return
    for dest, value in defaults.get(args.dataset, {}).items():
        loss = {"prediction", "weighting"}  # chosen together
        if not args.typed & (loss if dest in loss else {dest}):
            setattr(args, dest, value)


def unet_defaults(image_size: int, simple: bool = False) -> dict:
    """The network and its training as they suit an image size, where the command line leaves them open.

    `simple` images, such as digits, need less width at full resolution, where the time goes.
    """
    if image_size <= 16:  # 1.0 M parameters
        return dict(width=16, multipliers=[1, 2, 5], blocks=1, attention=[1, 2], batch_size=16, lr=2e-3)
    if image_size <= 32 and simple:  # 2.7 M, or where 8 does not divide the size, 1.3 M
        deep = dict(multipliers=[1, 2, 4, 8], attention=[2, 3])
        shape = dict(multipliers=[1, 2, 6], attention=[2]) if image_size % 8 else deep
        return dict(width=16, blocks=1, batch_size=32, lr=2e-3, **shape)
    if image_size <= 32:  # 4.0 M
        return dict(width=32, multipliers=[1, 2, 4], blocks=2, attention=[1, 2], batch_size=64, lr=1e-3)
    if image_size <= 64:  # 16 M
        return dict(width=48, multipliers=[1, 2, 4, 6], blocks=1, attention=[2, 3], batch_size=64, lr=5e-4)
    levels = max(5, round(math.log2(image_size / 8)) + 1)  # the lowest has about 8 pixels
    multipliers = [1] * (levels - 4) + [2, 2, 3, 4]
    attention = [levels - 2, levels - 1]
    return dict(width=64, multipliers=multipliers, blocks=2, attention=attention, batch_size=32, lr=1e-4)


def fill_network_defaults(args: argparse.Namespace) -> None:
    """Settle the network and its training for args.image_size; UserError if that does not fit the network."""
    if args.attention is None and args.multipliers is not None:
        args.attention = [len(args.multipliers) - 1] if len(args.multipliers) > 1 else []
    for dest, value in unet_defaults(args.image_size, args.dataset in utils.SIMPLE).items():
        if getattr(args, dest) is None:
            setattr(args, dest, value)
    levels = len(args.multipliers)
    divisor = 2 ** (levels - 1)
    if args.image_size % divisor:
        below = args.image_size // divisor * divisor
        near = f"{below} or {below + divisor}" if below else f"{divisor}"
        raise UserError(
            f"--image-size {args.image_size} is not divisible by {divisor}, as {levels} levels need it: "
            f"try {near}"
        )


def fill_data_defaults(args: argparse.Namespace, data: utils.Data) -> None:
    """Settle what depends on the data set; a note where the batch is larger than the set."""
    args.channels = data.images.shape[1]
    args.flip = data.flip if args.flip is None else args.flip
    args.epochs = args.epochs or 80
    args.preview_every = args.preview_every or max(1, args.epochs // 4)
    if args.batch_size > len(data.images):
        utils.note(f"the data set, {len(data.images)} images, is smaller than --batch-size: it is the batch")


NETWORK_SETTINGS = ("channels", "width", "multipliers", "blocks", "attention", "dropout")


def network_class(config: dict) -> Callable[..., torch.nn.Module]:
    """The class of network that a run of any kind trains, told what it has to know besides the settings."""
    kind = config.get("kind")
    if kind == "published":
        return partial(PublishedUNet, config["norm_groups"], config["norm_eps"])
    if kind == "classifier":
        return partial(Classifier, len(config["class_names"]))
    if kind == "ddpm_conditional" and config["condition"] == "text":
        words, max_tokens = config["vocabulary"]["words"], config["vocabulary"]["max_tokens"]
        return partial(TextUNet, END + 1 + len(words), max_tokens)
    if kind == "ddpm_conditional":
        return partial(ConditionalUNet, len(config["class_names"]))
    return UNet


def make_net(config: dict) -> torch.nn.Module:
    """The network that a run's settings describe; UserError if they make none."""
    try:
        return network_class(config)(**{key: config[key] for key in NETWORK_SETTINGS})
    except ValueError as error:
        raise UserError(f"no network can be made of these settings: {error}") from None


def place(net: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """The network on its device, with channels last in memory, as convolutions of CPUs and CUDA like it."""
    return net.to(
        device, memory_format=torch.preserve_format if device.type == "mps" else torch.channels_last
    )


def make_diffusion(config: dict) -> Diffusion:
    """The diffusion process and loss that a run's settings describe; UserError if they make none."""
    weighting = config["weighting"]
    if weighting == "p2":
        weighting = partial(p2, gamma=config["p2_gamma"], k=config["p2_k"])
    elif weighting == "min_snr":
        weighting = partial(min_snr, gamma=config["min_snr_gamma"])
    try:
        return Diffusion(config["noise_steps"], config["schedule"], config["prediction"], weighting)
    except ValueError as error:
        raise UserError(f"these settings make no diffusion process: {error}") from None


ABOUT = ("kind", "epoch", "class_names", "vocabulary", "examples")  # what a checkpoint says beside settings


def load_network(
    path: str | Path,
    device: torch.device | str = "cpu",
    kinds: Sequence[str] = ("ddpm", "ddpm_conditional"),
) -> tuple[torch.nn.Module, Diffusion, dict]:
    """The network of a run, with its averaged weights, or of published ones; -> net, diffusion, config.

    Either is called as `net(x_t, t, y=None)` with t in 1..T. `path` is a run's folder or its ckpt.pt, or the
    folder or the weights file of a published DDPM (utils.load_published). `config` holds the settings and
    what the checkpoint says besides: "kind", "epoch", "class_names", ... UserError where it is no checkpoint
    of these kinds (a published one counts as "ddpm"), or does not hold what its settings describe.
    """
    file = utils.published_file(path)
    if file and "ddpm" not in kinds:
        what = f"{path} holds the published weights of an unconditional model"
        raise UserError(f"{what}: a run of kind {kinds[0]!r} is needed here")
    checkpoint = None if file else utils.load_checkpoint(path, *kinds)
    try:
        if file:
            config, weights = utils.load_published(file)
        else:
            config = {**checkpoint["config"], **{key: checkpoint.get(key) for key in ABOUT}}
            weights = {key: (key, value) for key, value in checkpoint["ema"].items()}
        net, diffusion = make_net(config), make_diffusion(config)
        fill(net, weights)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:  # all may be in a file
        why = str(error).splitlines()[0]
        raise UserError(f"{path} does not hold the network that its settings describe: {why}") from None
    net = place(net, torch.device(device)).eval()
    net.keep_times(diffusion.T)
    return net, diffusion, config


def fill(net: torch.nn.Module, weights: dict[str, tuple[str, Tensor]]) -> None:
    """Give a network its weights, {key: (name in the file, value)}; ValueError names what does not fit."""
    wanted = net.state_dict()
    wrong = [f"{key} is not there" for key in wanted if key not in weights]
    for key, (name, value) in weights.items():
        if key not in wanted:
            wrong.append(f"{name} has no place")
        elif value.shape != wanted[key].shape:
            wrong.append(f"{name} is {tuple(value.shape)}, not {tuple(wanted[key].shape)}")
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError("; ".join(wrong[:3]) + more)
    net.load_state_dict({key: value for key, (_, value) in weights.items()})


def model_name(config: dict) -> str:
    """Whose samples they are, for a caption."""
    if config["kind"] == "published":
        return f"{config['name']}, published weights"
    return f"{config['dataset']}, epoch {config['epoch']}"


def use_bf16(precision: str, device: torch.device, config: dict) -> bool:
    """Whether to compute in bfloat16: where the chip has it natively, and layers are wide enough to gain."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    questions = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # what a CPU may have for it
    has_it = any(getattr(torch.cpu, question, bool)() for question in questions)
    return device.type == "cpu" and config["width"] * max(config["multipliers"]) >= 256 and has_it


def fill_sample_steps(args: argparse.Namespace, T: int) -> None:
    """Settle the strides for T noise levels; UserError where more were asked for."""
    args.sample_steps = args.sample_steps or min(50, T)
    if args.sample_steps > T:
        raise UserError(f"--sample-steps {args.sample_steps} is more than the {T} noise steps of the network")


def fill_sampler(args: argparse.Namespace, config: dict) -> None:
    """Settle the sampler: that of the run's previews, unless one, or an option of one, was typed."""
    if not args.typed & {"sampler", *SAMPLER_FLAGS} and config.get("sampler") in SAMPLERS:
        args.sampler = config["sampler"]


def chosen_sampler(args: argparse.Namespace) -> Callable[..., Tensor]:
    """The sampler that the command line asks for, with its options."""
    options = {
        dest: getattr(args, dest) for dest, sampler in SAMPLER_FLAGS.items() if sampler == args.sampler
    }
    return partial(SAMPLERS[args.sampler], **options)


class Captured(Wrapped):
    """A network recorded as one CUDA graph for each shape of its inputs, then replayed: for sampling.

    A small network's kernels end sooner than Python can ask for the next; a graph asks for all at once.
    """

    def __init__(self, net: torch.nn.Module):
        super().__init__(net)
        self.graphs: dict[tuple, tuple] = {}

    def forward(self, *inputs: Tensor | None) -> Tensor:
        inputs = tuple(x for x in inputs if x is not None)
        if torch.is_grad_enabled():
            return self.net(*inputs)
        key = tuple((x.shape, x.dtype) for x in inputs)
        if key not in self.graphs:
            self.graphs[key] = self.record(*inputs)
        graph, fixed, out = self.graphs[key]
        for kept, x in zip(fixed, inputs, strict=True):
            kept.copy_(x)
        graph.replay()
        return out.clone()

    def record(self, *inputs: Tensor) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
        """A graph, the inputs that it reads and the output that it writes."""
        fixed, side = [x.clone() for x in inputs], torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # libraries choose their kernels, which can't be recorded
                self.net(*fixed)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = self.net(*fixed)
        return graph, fixed, out


def quick(
    net: torch.nn.Module, args: argparse.Namespace, config: dict, device: torch.device
) -> torch.nn.Module:
    """The network as it samples fastest: in half precision where that gains, compiled, or captured."""
    if use_bf16(args.precision, device, config):
        for module in net.modules():  # once, and not at every step; norms stay in float32
            if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
                module.to(torch.bfloat16)
        net.forward = torch.autocast(device.type, torch.bfloat16)(net.forward)
    if args.compile:
        return Compiled(net, graphs=device.type == "cuda")
    return Captured(net) if device.type == "cuda" else net


def sample_images(
    diffusion: Diffusion,
    eps_theta: Denoiser,
    x_T: Tensor,
    args: argparse.Namespace,
    generators: list[torch.Generator],
) -> Tensor:
    """From x_T to x_0 (B, C, H, W) by the sampler, steps and clipping in `args`; one generator an image."""
    denoiser = eps_theta if args.no_clip else clip_x_0(diffusion, eps_theta)
    return chosen_sampler(args)(diffusion, denoiser, x_T, diffusion.timesteps(args.sample_steps), generators)


@dataclass
class Task:
    """What run_training trains: a network, its loss over images and y, and how to look at it on the way."""

    kind: str  # of checkpoint
    net: torch.nn.Module
    loss: Callable[..., Tensor]  # loss(net, x_0, y, generator) -> scalar
    preview: Callable[[torch.nn.Module, int, Path], object]  # preview(net, epoch, file to write)
    images: Tensor  # (N, C, H, W) uint8
    y: Tensor | None = None  # (N, ...) labels, or captions as tokens
    keep: dict = field(default_factory=dict)  # further entries of the checkpoint
    use: Sequence[object] = ("--sample", 64, "--checkpoint")  # flags that use the run when it is done
    used_by: str | None = None  # the script that they are flags of, if not the one that trains


def unconditional(
    args: argparse.Namespace, data: utils.Data, diffusion: Diffusion, device: torch.device
) -> Task:
    """A UNet that learns to denoise the images; previews always start from the same noise."""
    count = 64 if args.image_size <= 32 else 16

    def preview(net: torch.nn.Module, epoch: int, path: Path) -> None:
        x_0 = draw_preview(diffusion, diffusion.denoiser(net), range(count), args, device)
        caption = f"{args.dataset}, epoch {epoch}, {args.sampler} {args.sample_steps} steps"
        utils.save_picture(utils.make_grid(x_0, caption), path)

    return Task("ddpm", make_net(vars(args)), diffusion.loss, preview, data.images)


SIGMAS = (0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0)  # at which a single-step denoiser is tested


def denoiser_loss(sigma: float) -> Callable[..., Tensor]:
    """`loss(net, x_0, y, generator) -> scalar`, the squared error of x_0 made from x_0 + noise of one level.

    `sigma` counts in units of images in [0, 1] (Berkeley CS180, project 5, B.1), so 2 sigma of ours.
    """

    def loss(
        net: torch.nn.Module, x_0: Tensor, y: Tensor | None = None, generator: Generators = None
    ) -> Tensor:
        # Start: training step of the single-step denoiser (CS180, project 5, B.1)
        z = x_0 + 2 * sigma * randn_like(x_0, generator)  # z = x + sigma eps
        t = torch.zeros(len(z), dtype=torch.long, device=z.device)  # one level: there is no time to tell
        return (net(z, t).to(x_0.dtype) - x_0).square().mean()  # ||D_theta(z) - x||^2
        # End

    return loss


def psnr(x: Tensor, x_0: Tensor) -> Tensor:
    """10 log10(1 / MSE) of images in [0, 1], in dB; here both are (..., C, H, W) in [-1, 1]; -> (...)."""
    return -10 * ((x - x_0) / 2).square().mean((-3, -2, -1)).log10()


def denoising(args: argparse.Namespace, data: utils.Data, diffusion: Diffusion, device: torch.device) -> Task:
    """A UNet that removes the noise of one level in one step, tested on a tenth of the images."""
    for dest in args.typed & OF_DIFFUSION:  # typed beside --resume
        raise UserError(f"{flag(dest)} means nothing to a single-step denoiser: leave it out")
    held_out, trained_on = utils.hold_out(len(data.images), args.seed, "a denoiser")
    x_0 = utils.to_x_0(data.images[held_out])
    shown = min(3, len(x_0))

    @torch.no_grad()
    def preview(net: torch.nn.Module, epoch: int, path: Path) -> None:
        pictures, levels = [], []
        for sigma in SIGMAS:
            noise = randn_like(x_0, utils.seeded_generator(args.seed))  # the same at each level and epoch
            z = x_0 + 2 * sigma * noise
            x = torch.cat(
                [net(part, part.new_zeros(len(part)).long()).cpu() for part in z.to(device).split(64)]
            )
            levels.append((f"{sigma:g}", f"{psnr(z, x_0).mean():.2f}", f"{psnr(x, x_0).mean():.2f}"))
            pictures.append(torch.stack([z[:shown], x[:shown]], 1).flatten(0, 1))  # (2 shown, C, H, W)
        utils.log_levels(path.parent.parent / "psnr.csv", ("sigma", "noisy", "denoised"), epoch, levels)
        tqdm.write(f"epoch {epoch}: PSNR " + ", ".join(f"{x} dB at sigma {at}" for at, _, x in levels))
        caption = f"{args.dataset}, trained at sigma {args.sigma:g}, epoch {epoch}; sigma: PSNR in dB"
        heads = [f"{sigma}: {dB}" for sigma, _, dB in levels]
        x = torch.stack(pictures, 1).flatten(0, 1)
        rows = ["noisy", "denoised"] * shown
        utils.save_picture(utils.make_grid(x, caption, len(SIGMAS), rows, heads), path)

    net, images = make_net(vars(args)), data.images[trained_on]
    return Task(
        "denoiser",
        net,
        denoiser_loss(args.sigma),
        preview,
        images,
        use=("denoise",),
        used_by="analysis.py",
    )


TASKS = {"diffusion": unconditional, "denoiser": denoising}


def make_task(args: argparse.Namespace, *more) -> Task:
    return TASKS[args.task](args, *more)


def draw_preview(
    diffusion: Diffusion, eps_theta: Denoiser, numbers: Sequence[int], args, device: torch.device
) -> Tensor:
    """Images x_0 (B, C, H, W), image i from noise of its own number numbers[i]: one for all epochs."""
    x_T, generators = numbered_noise(numbers, (args.channels, args.image_size, args.image_size), args.seed)
    return sample_images(diffusion, eps_theta, x_T.to(device), args, generators)


def run_training(
    args: argparse.Namespace,
    make_task: Callable[..., Task] = unconditional,
    kinds: Sequence[str] = ("ddpm",),
    free_on_resume: set[str] = FREE_ON_RESUME,
) -> None:
    """Train as the command line says, in a new folder under --runs, or go on with --resume's.

    `make_task(args, data, diffusion, device)` says what is trained; `kinds` are the checkpoints it goes on
    from.
    """
    device = utils.get_device(args.device)
    processes = utils.join_processes(device)
    (restarted,) = processes.any(utils.restarted())  # on one machine or another
    if restarted and not args.resume:
        args.resume = processes.told(processes.first and run_of_launch(Path(args.runs))) or None
    resume = utils.load_checkpoint(args.resume, *kinds) if args.resume else None
    if resume:
        args = utils.merge_config(args, resume["config"], free_on_resume)
    fill_sample_steps(args, args.noise_steps)
    if args.image_size:
        fill_network_defaults(args)  # an image size that does not fit is told before the images are decoded
    choice = {key: getattr(args, key) for key in ("image_size", "channels", "limit", "workers", "cache_dir")}
    with processes.first_goes_first():
        data = utils.get_data(args.dataset, args.data_root, "train", **choice)
    args.image_size = data.images.shape[-1]
    fill_network_defaults(args)
    fill_data_defaults(args, data)

    torch.manual_seed(args.seed)
    diffusion = make_diffusion(vars(args))
    task = make_task(args, data, diffusion, device)
    digest = utils.digest(task.images) + ("" if task.y is None else utils.digest(task.y))
    config = {k: v for k, v in vars(args).items() if k not in ("typed", "resume", "sample", "checkpoint")}
    check_shares(processes.count, args, len(task.images))
    net = place(task.net, device)
    net.checkpointing = args.checkpointing
    loader = Loader(task.images, args.batch_size, device, task.y, args.flip, args.seed, processes)
    kept = {"config": config, "class_names": data.class_names, "data": digest, **task.keep}
    if resume:
        check_resumable(resume, args, kept, len(loader))
        run = utils.checkpoint_file(args.resume).parent
    else:
        wanted = Path(args.runs) / (args.name or f"{task.kind}_{args.dataset}")
        run = processes.told(utils.new_path(wanted) if processes.first else None)
        if run != wanted:
            utils.note(f"{wanted} exists and stays as it is: this run goes to {run}")
    if processes.first:
        write_settings(run, config)
    parameters = sum(p.numel() for p in net.parameters()) / 1e6
    size = " x ".join(map(str, data.images.shape[1:]))
    print(f"data     {args.dataset}, {len(data.images)} images of {size}")
    several = f", {processes.count} processes" if processes.count > 1 else ""
    print(f"network  {parameters:.2f} M parameters, on {device}{several}\nresults  in {run}/")

    def preview(net: torch.nn.Module, epoch: int) -> None:
        task.preview(net, epoch, run / "samples" / f"epoch_{epoch:04d}.png")

    options = ("epochs", "lr", "warmup", "weight_decay", "clip_grad", "ema_decay", "compile", "accumulate")
    bf16 = use_bf16(args.precision, device, config)
    try:
        ema = train(
            net,
            task.loss,
            loader,
            run,
            **{key: config[key] for key in (*options, "seed", "save_every", "preview_every")},
            bf16=bf16,
            preview=preview,
            extra={"kind": task.kind, **kept},
            resume=resume,
        )
    except Stopped:
        print(f"stopped and saved; go on with\n  {command('--resume', run)}", file=sys.stderr)
        sys.exit(130)
    except (RuntimeError, MemoryError) as error:
        if utils.is_lost(error):
            go_on = f"go on with {command('--resume', run)}"
            raise utils.LostProcess(f"another process has ended, and so does this one: {go_on}") from None
        if not utils.out_of_memory(error):
            raise
        failed = True  # what the error holds on to is free after this block
    else:
        failed = False
    if failed:
        raise utils.OwnError(told_of_memory(net, task, args, bf16, device, processes))
    if not processes.first:
        return
    last_grid = run / "samples" / f"epoch_{args.epochs:04d}.png"
    if not last_grid.is_file():  # the run was killed after its last step
        preview(ema.net, args.epochs)
    for name, path in (("samples", last_grid), ("log", run / "log.csv"), ("checkpoint", run / "ckpt.pt")):
        print(f"{name:10s}  {shlex.quote(str(path))}")
    print(f"use it with\n  {command(*task.use, run, script=task.used_by)}")


def check_shares(count: int, args: argparse.Namespace, images: int) -> None:
    """UserError where a process, or a part of a batch, would get no image."""
    batch = min(args.batch_size, images)
    if count > batch:
        raise UserError(f"{count} processes for a batch of {batch} images: lower --nproc_per_node")
    if args.accumulate > batch // count:
        each = "" if count == 1 else f" for each of {count} processes"
        raise UserError(
            f"--accumulate {args.accumulate} parts of {batch // count} images{each}: ask for fewer"
        )


def write_settings(run: Path, config: dict) -> None:
    """Make a run's folder, unless it is there, and write its config.json; and who started it, if torchrun."""
    (run / "samples").mkdir(parents=True, exist_ok=True)
    with utils.replacing(run / "config.json") as file:
        file.write(json.dumps(config, indent=2).encode())
    if launch := utils.launch_name():
        (run / "launch").write_text(launch)


def run_of_launch(runs: Path) -> str | None:
    """The run that torchrun's processes of this launch began before they were started again, if they did."""
    ours = (p.parent for p in runs.glob("*/launch") if p.read_text() == utils.launch_name())
    return next((str(run) for run in ours if (run / "ckpt.pt").is_file()), None)


def told_of_memory(
    net: torch.nn.Module,
    task: Task,
    args: argparse.Namespace,
    bf16: bool,
    device: torch.device,
    processes: Processes,
) -> str:
    """What to say where memory ran out: an estimate, made on the CPU with one image and with two."""
    autocast = partial(torch.autocast, "cpu", torch.bfloat16) if bf16 else nullcontext
    x_0, y = utils.to_x_0(task.images[:1]), None if task.y is None else task.y[:1]
    fixed, each = memory_of_training(net.cpu(), task.loss, x_0, y, autocast)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    room = utils.room(device)
    if device.type == "cpu":
        room /= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return what_fits(fixed, each, room, args.batch_size, args.accumulate, processes, args.checkpointing)


def command(*flags: object, script: str | None = None) -> str:
    """A command line of this script, or of another beside it, that can be pasted into a shell."""
    path = Path(sys.argv[0]).with_name(script) if script else sys.argv[0]
    return shlex.join(["python", str(path), *map(str, flags)])


def check_resumable(resume: dict, args: argparse.Namespace, kept: dict, per_epoch: int) -> None:
    """UserError unless the run can go on: from its own checkpoint, with the data it had, not past its end.

    `kept` is what its next checkpoint would hold of settings and data.
    """
    if utils.checkpoint_file(args.resume).name != "ckpt.pt":
        raise UserError(f"--resume {args.resume}: a run goes on in its folder, from its ckpt.pt: name that")
    if any(resume.get(key) != value for key, value in kept.items() if key != "config"):
        raise UserError("the data set has changed since the run began: bring it back, or start a new run")
    if resume["step"] > args.epochs * per_epoch:
        raise UserError(f"the run has had {resume['epoch']} epochs already: ask for more --epochs")
    if resume["step"] == args.epochs * per_epoch:
        utils.note(f"the run has had its {args.epochs} epochs; to train further, ask for more --epochs")


ALONE = Processes()
GRID_LIMIT = 256  # images shown in a grid; --out gets them all


def draw_images(
    diffusion: Diffusion,
    denoiser_of: Callable[[Sequence[int]], Denoiser],
    numbers: Sequence[int],
    args: argparse.Namespace,
    config: dict,
    device: torch.device,
    suffix: str = "",
    made_with: str = "",
    processes: Processes = ALONE,
) -> tuple[Tensor, list[Tensor]]:
    """Draw the images of those numbers, each from noise of its own, --batch-size at a time.

    `denoiser_of(numbers of a batch)` is its eps_theta. With --out each goes there as `number + suffix`, with
    `made_with` in it; those there already are not drawn again; several processes take turns. -> the images
    x_0 (B, C, H, W) that a grid shows, the first GRID_LIMIT, and with --animate frames of the first batch:
    its x_t on the way.
    """
    batch_size = args.batch_size or 64
    evaluations = args.sample_steps + (3 * min(3, args.sample_steps) if args.runge_kutta else 0)
    path_of = lambda number: Path(args.out) / f"{number:05d}{suffix}.png"  # noqa: E731
    batches = [numbers[i : i + batch_size] for i in range(0, len(numbers), batch_size)]
    film_of = batches[0] if args.animate else None
    if args.out:  # whole batches, whoever draws them: then an image is the same to the last bit
        batches = [b for b in batches if b == film_of or not all(path_of(i).exists() for i in b)]
    batches = processes.share(processes.told(batches))  # told: others may have written some by now
    shown, frames, info = [], [], PngInfo()
    info.add_text("made_with", made_with)
    with tqdm(total=len(batches) * evaluations, desc=f"sampling{suffix}", unit="step") as bar:
        for batch in batches:
            film = frames if batch == film_of else None  # a batch of the first process
            eps_theta = watched(denoiser_of(batch), bar, film, math.ceil(evaluations / 60))
            shape = (config["channels"], config["image_size"], config["image_size"])
            x_T, generators = numbered_noise(batch, shape, args.seed)
            x_0 = sample_images(diffusion, eps_theta, x_T.to(device), args, generators).cpu()
            if film is not None:
                frames.append(x_0[:GRID_LIMIT])
            if args.out:
                for number, picture in zip(batch, utils.to_pictures(x_0), strict=True):
                    if not path_of(number).exists():
                        utils.save_picture(picture, path_of(number), pnginfo=info)
            elif len(shown) * batch_size < GRID_LIMIT:
                shown.append(x_0)
    if args.out:
        processes.wait()
        files = [str(path_of(i)) for i in numbers[:GRID_LIMIT]]
        shown = [utils.read_images(files, config["image_size"], config["channels"])]
    return torch.cat(shown)[:GRID_LIMIT], frames


def made_with(
    args: argparse.Namespace, config: dict, net: torch.nn.Module, further: Sequence[str] = ()
) -> str:
    """What images are drawn with, kept in their files: --out goes on only among images of the same making."""
    told = {key: getattr(args, key) for key in (*HOW_TO_SAMPLE, "seed", *further)}
    weights = utils.digest(net.conv_out.weight.detach().float().cpu())
    return json.dumps(told | {"model": model_name(config), "weights": weights}, sort_keys=True)


def watched(eps_theta: Denoiser, bar: tqdm, frames: list[Tensor] | None, every: int) -> Denoiser:
    """The denoiser, its calls counted on a progress bar; every so many calls its x_t is kept as a frame."""

    def eps_theta_watched(x_t: Tensor, t: Tensor) -> Tensor:
        if frames is not None and bar.n % every == 0:
            frames.append(x_t[:GRID_LIMIT].cpu())
        bar.update()
        return eps_theta(x_t, t)

    return eps_theta_watched


def run_sampling(args: argparse.Namespace) -> None:
    """Draw --sample images from the averaged weights of --checkpoint, into a grid and what is asked for."""
    device = utils.get_device(args.device)
    processes = join_to_sample(args, device)
    net, diffusion, config = load_network(args.checkpoint, device, ("ddpm",))
    fill_sampler(args, config)
    fill_sample_steps(args, diffusion.T)
    samples, made = utils.run_folder(args.checkpoint) / "samples", made_with(args, config, net)
    prepare_folders(samples, args.out, made)
    eps_theta = diffusion.denoiser(quick(net, args, config, device))
    numbers, more = range(args.sample), (made, processes)
    shown, frames = draw_images(diffusion, lambda batch: eps_theta, numbers, args, config, device, "", *more)
    if not processes.first:
        return

    made_by = f"{args.sampler} {args.sample_steps} steps, seed {args.seed}"
    caption = f"{model_name(config)}, {made_by}"
    name = samples / f"{args.sampler}_{args.sample_steps}_seed{args.seed}.png"
    save_grids(utils.make_grid(shown, caption), [utils.make_grid(x, caption) for x in frames], name)
    if args.out:
        print("images  ", shlex.quote(args.out))


def save_grids(grid: Image, frames: list[Image], name: Path) -> None:
    """Write a grid, and the frames of its making as a GIF, under that name or the next free one."""
    path = utils.save_picture(grid, utils.new_path(name, ".png"))
    print("grid    ", shlex.quote(str(path)))
    if frames:
        gif = utils.save_animation(frames, utils.new_path(path.with_suffix(".gif"), ".gif"))
        print("gif     ", shlex.quote(str(gif)))


def join_to_sample(args: argparse.Namespace, device: torch.device) -> Processes:
    """The processes that sample; UserError where there are several and no --out for them to meet in."""
    processes = utils.join_processes(device)
    if processes.count > 1 and not args.out:
        raise UserError("several processes sample into a folder: add --out DIR")
    return processes


def prepare_folders(samples: Path, out: str | None, made_with: str | None = None) -> None:
    """Make the folders for the grid and single images; UserError, before any work, if they can't be used.

    `out` must hold no images yet, which would be lost, or mixed with ours in what an FID tool reads, save
    those that an interrupted command of the same settings, `made_with`, has left there.
    """
    if out and Path(out).exists() and not Path(out).is_dir():
        raise UserError(f"--out {out} is a file: name a folder")
    for folder in (samples, Path(out) if out else samples):
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise UserError(f"folder {folder} can't be written to: copy the run, or name another --out")
    there = utils.image_files(Path(out)) if out else []
    if not there and (not out or not (Path(out) / "metadata.jsonl").exists()):
        return
    if made_with is None or not there or any(text_in(path) != made_with for path in there):
        raise UserError(f"--out {out} already holds images of another making: name a new or an empty folder")
    utils.note(f"{out} holds {len(there)} images of this kind already: they are not drawn again")


def text_in(path: Path) -> str | None:
    """What an image says of its making, where it is one of ours."""
    try:
        with PIL.Image.open(path, formats=["PNG"]) as picture:
            return picture.text.get("made_with")
    except Exception:  # Pillow's decoders raise almost anything on a broken file
        return None


DENOISER_DEFAULTS = {"epochs": 5, "preview_every": 1}  # as in CS180, which looks at epochs 1 and 5


def main() -> None:
    parser = make_parser()
    add_task_flags(parser)
    args = parser.parse_args()
    defaults = dict(DATA_DEFAULTS)
    if args.task == "denoiser":
        defaults[args.dataset] = {**DATA_DEFAULTS.get(args.dataset, {}), **DENOISER_DEFAULTS}
    fill_data_set_defaults(args, defaults)
    check_flags(args, {"task": TASK_FLAGS, **FLAG_OWNERS}, FOR_SAMPLING, ONLY_SAMPLING)
    if args.sample is None:
        run_training(args, make_task, ("ddpm", "denoiser"))
    else:
        run_sampling(args)


if __name__ == "__main__":
    utils.run_main(main)
