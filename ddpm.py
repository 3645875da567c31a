"""Denoising diffusion from scratch: the forward process, the loss, four samplers, training and sampling.

Read it from top to bottom with the papers open: DDPM (Ho et al. 2020, https://arxiv.org/abs/2006.11239), DDIM
(Song et al. 2021, https://arxiv.org/abs/2010.02502), PNDM (Liu et al. 2022, https://arxiv.org/abs/2202.09778)
and DPM-Solver++ (Lu et al. 2022, https://arxiv.org/abs/2211.01095). t runs 1..T as in DDPM; alpha_bar[0] = 1
is the clean image. In formulas and names ab is short for alpha_bar.

    python ddpm.py                                            train on the embedded digits
    python ddpm.py --epochs 80 --dataset stanfordcars         train on Stanford Cars
    python ddpm.py --sample 64 --checkpoint runs/ddpm_digits  sample from what was trained
    python ddpm.py --task denoiser --sigma 0.5                a denoiser of one noise level (CS180, B.1)
    python ddpm.py --latent runs/autoencoder_digits           diffusion in latents of --task autoencoder
    torchrun --nproc_per_node=4 ddpm.py ...                   train or sample on four GPUs
"""

import support.environment  # isort: skip  # noqa: F401 (before torch)
import math
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import utils
from modules import EMA, Latents, NetworkSettings, Pixels, make_network
from support import launch, runs
from support.errors import UserError, note, run_main
from support.files import replacing
from support.generators import draw, randn_like, seeded_generator
from support.images import to_x_0
from support.latents import LatentSettings, Reconstructions, encoded, load_autoencoder, settle_latent
from support.launch import Task
from support.loader import hold_out
from support.machine import MachineSettings, Watched, get_device, speed_up_sampling, to_device
from support.measures import psnr
from support.pictures import make_grid, save_picture
from support.samples import Plan
from support.settings import COUNT, POSITIVE, Command, parse, real, rows_of, setting, settings, whole
from support.trainer import Trainer, TrainingSettings
from utils import PLAIN_MSE, SCHEDULES, WEIGHTINGS


# The forward process, and Algorithm 1's loss. A denoiser, here and everywhere, is a function
# eps_theta(x_t (B, C, H, W), t (B,)) -> eps (B, C, H, W).
class Diffusion:
    """The forward process q(x_t | x_0), what a network is trained to predict of it, and how that becomes eps.

    `beta` (T,), `alpha_bar` and `snr` (T+1,) are float64 on the CPU. `schedule` is a name in SCHEDULES or any
    f(T) -> betas; `prediction` is what the network's output means: "eps", "x_0", "v" or "dual"; `weighting`
    is a name in WEIGHTINGS or a w(snr); None is plain MSE on the prediction. ValueError: T < 2, unknown name.
    """

    def __init__(self, noise_steps: int = 1000, schedule="cosine", prediction="v", weighting=None):
        if noise_steps < 2 or prediction not in PLAIN_MSE:
            raise ValueError(f"noise_steps must be at least 2 and prediction one of {', '.join(PLAIN_MSE)}")
        for what, name, known in (("schedule", schedule, SCHEDULES), ("weighting", weighting, WEIGHTINGS)):
            if isinstance(name, str) and name not in known:
                raise ValueError(f"{what} {name!r} is none of {', '.join(known)}")
        self.T, self.prediction = noise_steps, prediction
        self.beta = SCHEDULES.get(schedule, schedule)(noise_steps).double()  # (T,), beta_t at t - 1
        one = torch.ones(1, dtype=torch.float64)
        self.alpha_bar = torch.cat([one, (1 - self.beta).cumprod(0)])  # (T+1,) prod (1 - beta), eq. 4
        self.snr = self.alpha_bar / (1 - self.alpha_bar)  # (T+1,), infinite at t = 0
        self.signal, self.noise = self.alpha_bar.sqrt(), (1 - self.alpha_bar).sqrt()  # (T+1,) each

        w = WEIGHTINGS.get(weighting or PLAIN_MSE[prediction], weighting)
        # w weighs the error of eps; the loss needs a weight of the output's error. For a given x_t an error
        # d_eps comes with d_x_0 = -(noise / signal) d_eps, so d_eps^2 = snr d_x_0^2. It comes with
        # d_v = signal d_eps - noise d_x_0 = d_eps / signal (signal^2 + noise^2 = 1), so d_eps^2 = ab d_v^2.
        snr = self.snr[1:]
        factor = {"x_0": snr, "v": self.alpha_bar[1:]}.get(prediction, 1)  # 1 for eps, and for that of dual
        self.weight = torch.cat([0 * one, w(snr) * factor])  # (T+1,); t = 0 is never trained

    def scales(self, t: Tensor | int, x: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t) for t (B,) or int, typed as x; -> (B, 1, 1, 1) each."""
        tables = torch.stack([self.signal, self.noise]).to(x.dtype).to(x.device)  # (2, T+1)
        return tables[:, t].view(2, -1, 1, 1, 1).unbind()

    def noise_images(self, x_0: Tensor, t: Tensor | int, generator=None) -> tuple[Tensor, Tensor]:
        """Draw x_t ~ q(x_t | x_0) (DDPM, eq. 4), t (B,) or one for all; -> x_t and its eps, (B, C, H, W)."""
        signal, noise = self.scales(t, x_0)
        eps = randn_like(x_0, generator)
        return signal * x_0 + noise * eps, eps  # DDPM, eq. 4, reparameterised: N(sqrt(ab) x_0, (1 - ab) I)

    def target(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the error is of: eps, x_0 or v = sqrt(ab) eps - sqrt(1 - ab) x_0; (B, C, H, W)."""
        if self.prediction != "v":
            return x_0 if self.prediction == "x_0" else eps
        signal, noise = self.scales(t, x_0)
        return signal * eps - noise * x_0  # Salimans & Ho 2022, appendix D

    def loss(self, net, x_0: Tensor, y: Tensor | None = None, generator=None) -> Tensor:
        """Weighted squared error of the network on x_0 (B, C, H, W); -> scalar (DDPM, Algorithm 1)."""
        # Start: training step (DDPM, Algorithm 1, lines 3 to 5)
        t = self.sample_timesteps(x_0, generator)  # line 3: t ~ Uniform({1, ..., T}), one for each image
        x_t, eps = self.noise_images(x_0, t, generator)  # line 4: eps ~ N(0, I); x_t, as in line 5
        out = net(x_t, t, y).to(x_0.dtype)  # line 5: eps_theta(x_t, t), or x_0, v, or both
        out = self.eps_from_output(x_t, out, t) if self.prediction == "dual" else out
        error = (out - self.target(x_0, eps, t)).square().mean((1, 2, 3))  # (B,), line 5: ||...||^2
        weight = self.weight.to(x_0.dtype).to(x_0.device)[t]  # (B,); 1 for eps is L_simple, eq. 14
        return (weight * error).mean()
        # End

    def sample_timesteps(self, x_0: Tensor, generator=None) -> Tensor:
        """t ~ Uniform({1, ..., T}) for each image; -> (B,) int64."""
        return draw(partial(torch.randint, 1, self.T + 1), (len(x_0),), x_0, generator)

    # From the network's output to eps, which all samplers, guidance and edits work with.
    def x_0_from_eps(self, x_t: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The x_0 that x_t is made of if its noise is eps; (B, C, H, W) (DDPM, eq. 15)."""
        signal, noise = self.scales(t, x_t)
        return (x_t - noise * eps) / signal

    def eps_from_x_0(self, x_t: Tensor, x_0: Tensor, t: Tensor) -> Tensor:
        """The noise in x_t if its clean image is x_0; (B, C, H, W) (DDPM, eq. 4, solved for eps)."""
        signal, noise = self.scales(t, x_t)
        return (x_t - signal * x_0) / noise

    def eps_from_output(self, x_t: Tensor, out: Tensor, t: Tensor) -> Tensor:
        """The noise in x_t by the network's output: an eps, x_0 or v (B, C, H, W), or dual (B, 2C, H, W)."""
        if self.prediction == "eps":
            return out
        if self.prediction == "x_0":
            return self.eps_from_x_0(x_t, out, t)
        signal, noise = self.scales(t, x_t)
        if self.prediction == "dual":  # an eps, and an x_0 for low SNR, where an eps says little of the image
            # half of each at SNR 0.03 (Benny & Wolf 2022, https://arxiv.org/abs/2203.04304, learn the share)
            (eps, x_0), share = out.chunk(2, dim=1), 0.03 / (0.03 + (signal / noise) ** 2)
            return eps.lerp(self.eps_from_x_0(x_t, x_0, t), share)
        return noise * x_t + signal * out  # from v (Salimans & Ho 2022, appendix D)

    def denoiser(self, net, y: Tensor | None = None):
        """`eps_theta(x_t, t) -> eps` for a network of any prediction; it is called with the condition y."""
        return lambda x_t, t: self.eps_from_output(x_t, net(x_t, t, y).to(x_t.dtype), t)

    def timesteps(self, steps: int, spacing: str | None = None) -> list[int]:
        """[T, ..., 0], steps + 1 entries, strictly decreasing; ValueError if not 1..T steps.

        `spacing` is "even" in t, or "log_snr": T, then times even in log SNR from SNR 0.001 to t = 1, then 0.
        The default is log_snr where the last of 20 even strides would begin at an SNR below 25.

        A network trained on T noise levels may be sampled in fewer steps: it learned each x_t by itself, and
        q(x_t | x_0) (eq. 4) is the same whatever steps lead to t. On any part of 1..T the same equations hold
        with alpha_t = ab_t / ab_s (DDIM, section 4.2). `analysis.py samplers` measures what that costs.
        """
        if not 1 <= steps <= self.T:
            raise ValueError(f"steps must lie between 1 and T = {self.T}, not {steps}")
        default = "log_snr" if self.snr[at(50, self.T)] < 25 else "even"  # measured: docs/experiments.md
        if (spacing or default) == "even":
            return [round(self.T * (steps - i) / steps) for i in range(steps + 1)]
        log_snr, times = self.snr[1:].log(), [self.T]  # (T,), falls with t
        low = max(log_snr[-1].item(), math.log(1e-3))  # below it x_t is noise, and one stride will do
        wanted = torch.linspace(low, log_snr[0].item(), steps, dtype=torch.float64)
        nearest = 1 + (log_snr - wanted[1:, None]).abs().argmin(1)  # (steps - 1,)
        for left, t in zip(range(steps - 1, 0, -1), nearest.tolist(), strict=True):
            times.append(max(left, min(t, times[-1] - 1)))  # all differ; `left` strides are still to come
        return [*times, 0]

    def strides(self, x: Tensor, timesteps):
        """For each stride t -> s of a list of timesteps: t (B,) and s (B,), alpha_bar_t and alpha_bar_s."""
        times = [(torch.full((len(x),), t, device=x.device), self.alpha_bar[t].item()) for t in timesteps]
        for (t, ab_t), (s, ab_s) in pairwise(times):
            yield t, s, ab_t, ab_s


# Samplers: sampler(diffusion, eps_theta, x, timesteps, generator=None) -> x, from x (B, C, H, W) at
# timesteps[0] to x at timesteps[-1]. They see a denoiser and a decreasing list of timesteps, nothing else. A
# list that ends above 0 leaves x_t at that noise level, for another sampler to go on from. `generator` is one
# or a list, one for each image. Clipping is not in them: `sample`, below, clips in its denoiser.
def numbered_noise(numbers, shape, seed: int) -> tuple[Tensor, list[torch.Generator]]:
    """x_T (B, *shape) ~ N(0, I) (DDPM, Algorithm 2, line 1), and a generator for each of the numbered images.

    An image depends on its number and the seed, and not on the rest of its batch.
    """
    generators = [seeded_generator(seed, i) for i in numbers]
    return randn_like(torch.empty(len(numbers), *shape), generators), generators


@torch.no_grad()
def ddpm(diffusion, eps_theta, x, timesteps, generator=None, variance="posterior"):
    """Ancestral sampling (Ho et al. 2020, Algorithm 2).

    variance: sigma_t^2 = "beta", or the "posterior" beta_tilde = (1 - ab_s) / (1 - ab_t) beta (eq. 7). For a
    stride t -> s that skips steps, alpha_t = ab_t / ab_s and beta_t = 1 - alpha_t are those of the whole
    stride, and the posterior is the better choice.
    """
    # Start: DDPM sampling (Algorithm 2; line 1, x_T ~ N(0, I), is in numbered_noise)
    for t, _, ab_t, ab_s in diffusion.strides(x, timesteps):  # line 2: for t = T, ..., 1; s is the next t
        alpha, beta = ab_t / ab_s, 1 - ab_t / ab_s  # of the stride t -> s; ab is alpha_bar
        posterior = beta * (1 - ab_s) / (1 - ab_t)  # eq. 7
        sigma = (beta if variance == "beta" else posterior) ** 0.5  # section 3.2
        x = (x - beta / (1 - ab_t) ** 0.5 * eps_theta(x, t)) / alpha**0.5  # line 4: the mean, eq. 11
        if ab_s < 1:  # line 3: z ~ N(0, I) if t > 1, else z = 0
            x = x + sigma * randn_like(x, generator)  # line 4: + sigma_t z
    return x  # line 6
    # End


def ddim_stride(x: Tensor, eps: Tensor, ab_t: float, ab_s: float, sigma: float = 0.0) -> Tensor:
    """x_t with the noise `eps` in it -> x_s, no noise added yet (DDIM, eq. 12; PNDM, the transfer part)."""
    x_0 = (x - (1 - ab_t) ** 0.5 * eps) / ab_t**0.5  # "predicted x_0"
    return ab_s**0.5 * x_0 + max(0.0, 1 - ab_s - sigma**2) ** 0.5 * eps  # + "direction pointing to x_t"


@torch.no_grad()
def ddim(diffusion, eps_theta, x, timesteps, generator=None, eta=0.0):
    """DDIM (Song et al. 2021, eq. 12 and 16).

    eta = 0 is deterministic, Euler's method on the probability flow; eta = 1 is DDPM, variance "posterior".
    """
    # Start: DDIM sampling
    for t, _, ab_t, ab_s in diffusion.strides(x, timesteps):  # t -> s, the next t; ab is alpha_bar
        sigma = eta * ((1 - ab_s) / (1 - ab_t) * (1 - ab_t / ab_s)) ** 0.5  # eq. 16
        x = ddim_stride(x, eps_theta(x, t), ab_t, ab_s, sigma)  # eq. 12: x_0, and the direction to x_t
        if sigma > 0:
            x = x + sigma * randn_like(x, generator)  # eq. 12, "random noise"
    return x
    # End


# Weights by the number of known eps, the newest first, to be divided by their sum (PNDM, section 3.3).
ADAMS_BASHFORTH = {1: [1], 2: [3, -1], 3: [23, -16, 5], 4: [55, -59, 37, -9]}


@torch.no_grad()
def pndm(diffusion, eps_theta, x, timesteps, generator=None, runge_kutta=False):
    """Pseudo linear multistep: a DDIM stride along an eps extrapolated from the last four (Liu et al. 2022).

    Its first three strides use the one to three eps that there are; with `runge_kutta` they are pseudo
    Runge-Kutta strides of four evaluations each, as in the paper. Deterministic: the generator is not used.
    """
    # Start: PNDM sampling
    history = []  # the last eps, newest first
    for i, (t, _, ab_t, ab_s) in enumerate(diffusion.strides(x, timesteps)):  # t -> s, the next t
        history = [eps_theta(x, t), *history[:3]]  # the gradient part
        if runge_kutta and i < 3:
            eps = runge_kutta_eps(diffusion, eps_theta, x, history[0], timesteps[i], timesteps[i + 1])
        else:
            weights = ADAMS_BASHFORTH[len(history)]  # of four: 55, -59, 37, -9, over 24
            eps = sum(w * e for w, e in zip(weights, history, strict=True)) / sum(weights)
        x = ddim_stride(x, eps, ab_t, ab_s)  # the transfer part: along eps to s
    return x
    # End


def runge_kutta_eps(diffusion, eps_theta, x: Tensor, eps_1: Tensor, t: int, s: int) -> Tensor:
    """The eps of a pseudo Runge-Kutta stride t -> s from x (B, C, H, W), eps_1 being eps_theta(x, t).

    PNDM, section 3.3. The middle is rounded up, and a stride to 0 evaluates at 1: t = 0 is never trained.
    """
    half, end = (t + s + 1) // 2, max(s, 1)

    def eps_at(time: int, eps: Tensor) -> Tensor:
        there = ddim_stride(x, eps, diffusion.alpha_bar[t].item(), diffusion.alpha_bar[time].item())
        return eps_theta(there, torch.full((len(x),), time, device=x.device))

    eps_2 = eps_at(half, eps_1)
    eps_3 = eps_at(half, eps_2)
    eps_4 = eps_at(end, eps_3)
    return (eps_1 + 2 * eps_2 + 2 * eps_3 + eps_4) / 6


@torch.no_grad()
def dpm_solver(diffusion, eps_theta, x, timesteps, generator=None):
    """DPM-Solver++(2M) (Lu et al. 2022, Algorithm 2).

    With lambda = log(sqrt(ab) / sqrt(1 - ab)) it is exact where the predicted x_0 does not change along the
    flow, and of second order in lambda where it does. Deterministic: the generator is not used.
    """
    # Start: DPM-Solver++(2M) sampling
    x_0_before, h_before = None, 0.0
    for t, _, ab_t, ab_s in diffusion.strides(x, timesteps):  # t -> s, the next t; ab is alpha_bar
        x_0 = diffusion.x_0_from_eps(x, eps_theta(x, t), t)  # what the network predicts
        # the stride in lambda, lambda_s - lambda_t; infinite where s = 0
        h = 0.5 * math.log(ab_s / (1 - ab_s) * (1 - ab_t) / ab_t) if ab_s < 1 else math.inf
        D = x_0  # the first stride, and one that ends in 0, are of first order
        if x_0_before is not None and ab_s < 1:
            r = h_before / h
            D = (1 + 1 / (2 * r)) * x_0 - 1 / (2 * r) * x_0_before  # x_0 in the middle of the stride
        x = ((1 - ab_s) / (1 - ab_t)) ** 0.5 * x - ab_s**0.5 * math.expm1(-h) * D  # the flow for constant D
        x_0_before, h_before = x_0, h
    return x
    # End


SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "pndm": pndm, "dpm_solver": dpm_solver}
VARIANCES = ("posterior", "beta")


# Settings, from which the command line is made; then clipping, and times that are quoted for T = 1000. ----
WEIGHTING = """weight of the squared error of eps at each noise level, for any prediction: %(choices)s; simple
is plain MSE on eps (default: plain MSE on the output; min_snr for cars, p2 for shapes and cars by class)"""
PREDICTION = "network's output: %(choices)s; dual is eps and x_0 (default: v; x_0 for cars, dual for shapes)"
SPACING = "strides even in t, or in log SNR: %(choices)s (default: by schedule)"
OF_RUN = "(default: ddim, ddpm for shapes; with --sample that of the run's previews)"


@settings(of="task=diffusion/classifier")
class DiffusionSettings:
    noise_steps: int = setting(1000, "number of noise levels", "T", whole(2))
    schedule: str = setting("cosine", "noise schedule: %(choices)s", "NAME", choices=SCHEDULES)
    prediction: str = setting("v", PREDICTION, "NAME", choices=PLAIN_MSE, of="task=diffusion")
    weighting: str | None = setting(None, WEIGHTING, "NAME", choices=WEIGHTINGS, of="task=diffusion")
    p2_gamma: float = setting(1.0, "gamma of 1 / (k + snr)^gamma", "G", real(0), of="weighting=p2")
    p2_k: float = setting(1.0, "k (default: 1.0; cars by class .1)", "K", POSITIVE, of="weighting=p2")
    min_snr_gamma: float = setting(5.0, "largest snr that counts", "G", POSITIVE, of="weighting=min_snr")


@settings(of="task=diffusion", resume=True, sample=True)
class SamplerSettings:  # also of the previews while training
    sampler: str = setting("ddim", f"sampler: %(choices)s {OF_RUN}", "NAME", choices=SAMPLERS)
    sample_steps: int | None = setting(None, "strides to t = 0 (default: at most 50; sdedit 33)", "N", COUNT)
    eta: float = setting(0.0, "0 adds no fresh noise, 1 as much as DDPM", "E", real(0, 1), of="sampler=ddim")
    variance: str = setting("posterior", "sigma_t^2: %(choices)s", choices=VARIANCES, of="sampler=ddpm")
    runge_kutta: bool = setting(False, "begin with three Runge-Kutta strides", of="sampler=pndm")
    spacing: str | None = setting(None, SPACING, "NAME", choices=["even", "log_snr"])
    no_clip: bool = setting(False, "do not clip x_0 to [-1, 1] in each stride")

    def __str__(self) -> str:  # in captions
        options = f", {self.spacing}" * bool(self.spacing) + ", no clip" * self.no_clip
        return f"{self.sampler} {self.sample_steps} steps{options}"


def make_sampler(settings: SamplerSettings):
    """The sampler that the settings name, with the options that belong to it."""
    name, rows = settings.sampler, rows_of(type(settings))
    own = {option: getattr(settings, option) for option in rows if f"sampler={name}" in rows[option]["of"]}
    return partial(SAMPLERS[name], **own)


def clip_x_0(diffusion: Diffusion, eps_theta):
    """The denoiser with its x_0 clipped to [-1, 1], and eps derived from that x_0. Guidance comes before it.

    x_0 is computed from eps, and float32 rounds it: on the cosine schedule by up to 0.005, less than a gray
    level, at t = T, and by less than 2e-5 from the second of 50 strides on.
    """

    def clipped(x_t: Tensor, t: Tensor) -> Tensor:
        x_0 = diffusion.x_0_from_eps(x_t, eps_theta(x_t, t), t).clamp(-1, 1)
        return diffusion.eps_from_x_0(x_t, x_0, t)

    return clipped


def at(t: int, T: int) -> int:
    """A time quoted for 1000 steps, in a process of T."""
    return max(1, round(t * T / 1000))


def strided_timesteps(T: int) -> list[int]:
    """[990, 960, ..., 30, 0], quoted for 1000 steps, in a process of T (Berkeley CS180, project 5, A 1.4)."""
    return sorted({0, *(at(t, T) for t in range(990, 0, -30))}, reverse=True)


# Training and sampling ------------------------------------------------------------------------------------
def train(loss_fn, trainer: Trainer) -> None:
    """The one training loop: minimise `loss_fn(net, x_0, y, generator)`, for diffusion `Diffusion.loss`."""
    # Start: training (DDPM, Algorithm 1)
    for x_0, y, generator in trainer:  # lines 1 and 2: repeat; x_0 ~ q(x_0)
        loss = loss_fn(trainer.net, x_0, y, generator)  # lines 3 to 5: t, eps, and the error of the network
        trainer.step(loss)  # line 5: take a gradient step; line 6: until the last epoch
    # End


def sample(diffusion, eps_theta, numbers, shape, settings: SamplerSettings, seed, device) -> Tensor:
    """Images x_0 (B, *shape) of those numbers, each from noise of its own (DDPM, Algorithm 2)."""
    # Start: sampling
    x_T, generators = numbered_noise(numbers, shape, seed)  # line 1: x_T ~ N(0, I)
    if not settings.no_clip:
        eps_theta = clip_x_0(diffusion, eps_theta)  # not in the papers' algorithms: keeps x_0 in range
    sampler, timesteps = make_sampler(settings), diffusion.timesteps(settings.sample_steps, settings.spacing)
    return sampler(diffusion, eps_theta, x_T.to(device), timesteps, generators)  # lines 2 to 6
    # End


def unconditional(command: Command, data: utils.Data, device: torch.device) -> Task:
    """A UNet that learns to denoise the images; previews always start from the same noise."""
    config, shape = command.config(), tuple(data.images.shape[1:])
    space, latents = latent_space(command, data, device) if config["latent"] else (Pixels(shape), None)
    diffusion = make_diffusion(config)
    settings = settle_sampler(command, config, diffusion.T)
    numbers = torch.arange(64 if shape[-1] <= 32 else 16).split(launch.at_once(config))

    def preview(net, epoch: int, path: Path) -> None:
        eps_theta, how = diffusion.denoiser(net), (space.shape, settings, config["seed"], device)
        x = [space.decode(sample(diffusion, eps_theta, part.tolist(), *how)) for part in numbers]
        save_picture(make_grid(torch.cat(x), f"{config['dataset']}, epoch {epoch}, {settings}"), path)

    return Task("ddpm", make_network(config), diffusion.loss, preview, EMA, data.images, latents=latents)


def latent_space(command: Command, data: utils.Data, device: torch.device):
    """The latent space of --latent's autoencoder, and what a Task takes as `latents` (see `encoded`)."""
    part = load_autoencoder(command, data.images.shape[1:])
    space = make_latents(command["latent"], part, data.images.shape[-1], device)
    return space, encoded(space, data.images, part, command)


def autoencoder_loss(net, x_0: Tensor, y: Tensor | None = None, generator=None) -> Tensor:
    """Mean |x_hat - x_0|, the same of differences of neighbours, and 1e-6 KL over the values; -> scalar."""
    # Start: training step of the autoencoder (Kingma & Welling 2014, eq. 10; LDM, section 3.1)
    x_hat, mean, log_variance = (out.to(x_0.dtype) for out in net(x_0, generator))  # x_hat = D(z), z ~ q
    error = x_hat - x_0
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()  # keeps x_hat sharp
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum()  # KL(q || N(0, I)), appendix B
    return error.abs().mean() + edges + 1e-6 * kl / x_0.numel()
    # End


def autoencoding(command: Command, data: utils.Data, device: torch.device) -> Task:
    """An autoencoder; a tenth of the images tests it, and is shown beside its reconstruction."""
    config = command.config() | {"kind": "autoencoder"}
    held_out, trained_on = hold_out(len(data.images), config["seed"], "an autoencoder")
    tested = Reconstructions(data.images[held_out], config, launch.at_once(config), device)
    how = {"images": data.images[trained_on], "use": ("--latent",), "tested": tested}
    return Task("autoencoder", make_network(config), autoencoder_loss, tested.preview, EMA, **how)


SIGMAS = (0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0)  # at which a single-step denoiser is tested


def denoiser_loss(sigma: float, net, x_0: Tensor, y: Tensor | None = None, generator=None) -> Tensor:
    """The squared error of x_0 (B, C, H, W) made from x_0 + noise of one level; -> scalar.

    `sigma` counts in units of images in [0, 1] (Berkeley CS180, project 5, B.1), so 2 sigma of ours.
    """
    # Start: training step of the single-step denoiser (CS180, project 5, B.1)
    z = x_0 + 2 * sigma * randn_like(x_0, generator)  # z = x + sigma eps
    t = torch.zeros(len(z), dtype=torch.long, device=z.device)  # one level: the network needs no time
    return (net(z, t).to(x_0.dtype) - x_0).square().mean()  # ||D_theta(z) - x||^2
    # End


def single_step(command: Command, data: utils.Data, device: torch.device) -> Task:
    """A UNet that removes the noise of one level in one step; a tenth of the images tests it (CS180, B.1)."""
    config = command.config()
    held_out, trained_on = hold_out(len(data.images), config["seed"], "a denoiser")
    x_0 = to_x_0(data.images[held_out])
    shown, log = min(3, len(x_0)), []  # rows of psnr.csv

    @torch.no_grad()
    def preview(net, epoch: int, path: Path) -> None:
        levels, found = [], []
        for sigma in SIGMAS:
            z = x_0 + 2 * sigma * randn_like(x_0, seeded_generator(config["seed"]))  # the same noise at each
            parts = (part.to(device) for part in z.split(launch.at_once(config)))
            x = torch.cat([net(part, part.new_zeros(len(part)).long()).float().cpu() for part in parts])
            levels.append((f"{sigma:g}", f"{psnr(z, x_0).mean():.2f}", f"{psnr(x, x_0).mean():.2f}"))
            found.append(torch.stack([z[:shown], x[:shown]], 1).flatten(0, 1))  # (2 shown, C, H, W)
        log.extend((epoch, *level) for level in levels)
        runs.log_rows(path.parent.parent / "psnr.csv", ("sigma", "noisy", "denoised"), log)
        tqdm.write(f"epoch {epoch}: PSNR " + ", ".join(f"{dB} dB at sigma {s}" for s, _, dB in levels))
        trained = f"{config['dataset']}, trained at sigma {config['sigma']:g}, epoch {epoch}"
        heads, rows = [f"{s}: {dB}" for s, _, dB in levels], ["noisy", "denoised"] * shown
        x, caption = torch.stack(found, 1).flatten(0, 1), f"{trained}; sigma: PSNR in dB"
        save_picture(make_grid(x, caption, len(SIGMAS), rows, heads), path)
        with replacing(path.parents[1] / f"{path.stem}.pt") as file:
            torch.save(torch.stack(found), file)  # (sigmas, 2 shown, C, H, W)

    net, loss, use = make_network(config), partial(denoiser_loss, config["sigma"]), ("denoise",)
    return Task("denoiser", net, loss, preview, EMA, data.images[trained_on], use=use, used_by="analysis.py")


TASKS = {"diffusion": unconditional, "denoiser": single_step, "autoencoder": autoencoding}


@settings()
class TaskSettings:
    task: str = setting("diffusion", "what to train: %(choices)s", "NAME", choices=TASKS)
    sigma: float = setting(0.5, "noise level, for images in [0, 1]", "S", POSITIVE, of="task=denoiser")


# From settings to diffusion, networks and samples ---------------------------------------------------------
def make_diffusion(config: dict) -> Diffusion:
    """The diffusion process and loss of a run; a note where the schedule leaves signal at t = T."""
    p2 = partial(utils.p2, gamma=config.get("p2_gamma"), k=config.get("p2_k"))
    min_snr = partial(utils.min_snr, gamma=config.get("min_snr_gamma"))
    weighting = {"p2": p2, "min_snr": min_snr}.get(config["weighting"], config["weighting"])
    diffusion = Diffusion(config["noise_steps"], config["schedule"], config["prediction"], weighting)
    if diffusion.alpha_bar[-1] > 2e-3:
        left = f"leaves {diffusion.signal[-1]:.1%} of the signal at t = T"
        note(f"schedule {config['schedule']} {left}, and sampling starts from noise without any signal")
    if diffusion.signal[-1] < 1e-6:
        left = f"only {diffusion.signal[-1]:.0e} of the signal, which float32 can't resolve"
        note(f"at t = T schedule {config['schedule']} leaves {left}: ask for more --noise-steps")
    return diffusion


def load_network(path, device="cpu", kinds=("ddpm", "ddpm_conditional")):
    """The network of a run, with its averaged weights, or of published ones; -> net, diffusion, config.

    Either is called as `net(x_t, t, y=None)` with t in 1..T. `path` is a run's folder or its ckpt.pt, or the
    folder or weights of a published model; `config` holds the settings, "kind", "epoch", "space" (Pixels or
    Latents), ... UserError where there is no checkpoint of these kinds, or not the network described.
    """
    config, weights = runs.load_weights(path, kinds)
    with runs.fitting(path):
        net, diffusion, size = make_network(config), make_diffusion(config), config["image_size"]
        net.load_state_dict(weights)
        config["space"] = Pixels((config["channels"], size, size))
    if config.get("latent"):
        config["space"] = make_latents(path, config["autoencoder"], size, device)
    return to_device(net, torch.device(device)).eval(), diffusion, config


def make_latents(path, part: dict, size: int, device) -> Latents:
    """The latent space of an autoencoder, `part` of a checkpoint, for images of `size` pixels."""
    with runs.fitting(f"the autoencoder in {path}"):
        net = make_network(part["config"])
        net.load_state_dict(part["weights"])
        if not part["scale"] > 0:
            raise ValueError(f"its scale is {part['scale']}")
        return Latents(to_device(net, torch.device(device)).eval(), part["scale"], size, device)


def settle_sampler(command: Command, config: dict, T: int) -> SamplerSettings:
    """The sampler for T noise levels: that of the run in `config`, unless one or its options were typed.

    The guidance scale too is the run's. Latents are not clipped. UserError if strides outnumber noise levels.
    """
    settings, rows = command[SamplerSettings], command.rows
    chosen = {name for name in rows if name == "sampler" or "sampler=" in " ".join(rows[name]["of"])}
    if not command.typed & chosen and config.get("sampler") in SAMPLERS:
        settings.sampler = config["sampler"]
    command.settle({name: config[name] for name in {"guidance_scale"} & config.keys()})
    settings.no_clip = settings.no_clip or config.get("latent") is not None
    settings.sample_steps = settings.sample_steps or min(50, T)
    if settings.sample_steps > T:
        raise UserError(f"--sample-steps {settings.sample_steps} is more than the {T} noise steps: lower it")
    return settings


def run_sampling(command: Command) -> None:
    """Draw --sample images from the averaged weights of --checkpoint, into a grid and single files."""
    output, seed, device = command[runs.OutputSettings], command["seed"], get_device(command["device"])
    processes = launch.join_processes(device)
    net, diffusion, config = load_network(output.checkpoint, device, ("ddpm",))
    settings, space = settle_sampler(command, config, diffusion.T), config["space"]
    made = runs.made_with({**vars(settings), "seed": seed}, config, net)
    plan = Plan(config, output, command["batch_size"], made, processes)
    film = plan.film(diffusion.timesteps(settings.sample_steps, settings.spacing))
    speed_up_sampling(net, command[MachineSettings], device)

    def draw(numbers, bar: tqdm) -> tuple[Tensor, list[Tensor]]:
        eps_theta = Watched(diffusion.denoiser(net), diffusion.T, bar, film)
        x_0 = sample(diffusion, eps_theta, numbers, space.shape, settings, seed, device)
        return space.decode(x_0), [space.decode(x_t) for x_t in eps_theta.kept.values()]

    caption = f"{runs.model_name(config)}, {settings}, seed {seed}"
    plan.draw_grids({1.0: draw}, caption, f"{settings.sampler}_{settings.sample_steps}_seed{seed}.png")


# Command line ---------------------------------------------------------------------------------------------
GROUPS = {
    "task": TaskSettings,
    "latent diffusion": LatentSettings,
    "data": utils.DataSettings,
    "network (defaults: by image size, data set and device, see docs/tuning.md)": NetworkSettings,
    "diffusion": DiffusionSettings,
    "training": TrainingSettings,
    "run": runs.RunSettings,
    "sampling (the sampler, its options and the clipping also serve the previews)": SamplerSettings,
    "samples": runs.OutputSettings,
    "machine": MachineSettings,
}


def main() -> None:
    command = parse(__doc__, GROUPS)
    if not command["resume"]:
        settle_latent(command)
        own = {"denoiser": {"epochs": 5, "preview_every": 1}, "autoencoder": {"epochs": 10}}  # 5 as in CS180
        command.settle({**utils.DEFAULTS.get(command["dataset"], {}), **own.get(command["task"], {})})
    command.check(owners=not command["resume"])
    if command["sample"] is not None:
        return run_sampling(command)
    kinds = ("ddpm", "denoiser", "autoencoder")
    launch.run_training(command, utils.get_data, utils.NARROW, TASKS, train, kinds)


if __name__ == "__main__":
    run_main(main)
