"""Studies of diffusion models: one command, one figure, one table each.

    python analysis.py noise runs/ddpm_digits        what a model recovers from x_t, at each noise level (P2)
    python analysis.py evaluate runs/ddpm_digits runs/ddpm_conditional_digits \\
        --classifier runs/classifier_digits          the quality of samples, in numbers
    python analysis.py report runs/ddpm_digits       all studies of a run, as a PDF
    python analysis.py schedules                     this, forward and weights need no network
    python analysis.py forward --image face.jpg --image-size 256
    python analysis.py STUDY --help                  the settings of a study, and how to read it

Each writes STUDY.png, its table as STUDY.csv and the numbers behind its charts as STUDY_curves.csv, into the
run's folder (or --out), and overwrites nothing. Read it with P2 (Choi et al. 2022,
https://arxiv.org/abs/2204.00227) and Berkeley CS180, project 5.
"""

import support.environment  # isort: skip  # noqa: F401 (before torch)
import math
import tempfile
import textwrap
import time
from collections import namedtuple
from collections.abc import Callable, Sequence
from dataclasses import make_dataclass, replace
from functools import partial
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import ddpm
from ddpm import SAMPLERS, Diffusion, at, clip_x_0, numbered_noise
from ddpm_conditional import SAME_DATA, GuidanceSettings, guided_denoiser, load_classifier, settle_scale
from modules import EMA, timestep_embedding
from support import charts, measures, runs
from support.charts import Chart, Panel, Result, curves, publish, write_report
from support.errors import UserError, note, run_main
from support.files import new_path, quoted, read_csv, read_pickle
from support.generators import randn_like, seeded_generator
from support.images import read_images, to_pictures, to_x_0
from support.loader import Loader
from support.machine import MachineSettings, Watched, get_device, progress
from support.measures import BANDS, correlation, nearest_images, neighbours_kept, psnr, quality, standardised
from support.operators import low_pass
from support.pictures import join, make_grid, save_picture
from support.settings import COUNT, PLAIN, Parser, add_settings, flag, listed, real, rows_of, setting, whole
from support.settings import settings as settings_class
from support.text import ConditionSettings, conditions
from support.trainer import Trainer, TrainingSettings
from utils import DATASETS, SCHEDULES, WEIGHTINGS, Data, get_data, p2


# The shared pieces: settings, models, images, samples ------------------------------------------------------
@settings_class()
class Settings:
    """All settings of the studies; a study has those that its decorator names, and the last five."""

    image: list | None = setting(None, "your own images instead of the data set's", "FILE", nargs="+")
    images: int = setting(16, "number of images of the data set", "N", COUNT)
    show: int = setting(4, "number of images in the figure, in guidance for each scale", "N", COUNT)
    dataset: str = setting("digits", "data set, without a run: %(choices)s", "NAME", choices=DATASETS)
    image_size: int | None = setting(None, "size, without a run (default: the data's, or 64)", "N", whole(8))
    schedules: list = setting([*SCHEDULES], f"some of {', '.join(SCHEDULES)}", "LIST", listed(str, SCHEDULES))
    noise_steps: int = setting(1000, "number of noise levels", "T", whole(2))
    schedule: str | None = setting(None, "no run: %(choices)s (default: linear)", "NAME", choices=SCHEDULES)
    at: int = setting(300, "the t whose x_t is shown in parts, for T = 1000", "t", whole(1, 1000))
    k: float = setting(1.0, "k of P2's 1 / (k + SNR)^gamma", "K", real(0, above=True))
    gammas: list = setting([0.0, 0.5, 1.0, 2.0], "gammas of P2; 0 is L_simple", "LIST", listed(real(0)))
    levels: list | None = setting(None, "times t, as 250,500 (default: by study)", "LIST", listed(COUNT))
    snr: list | None = setting(None, "levels by SNR, as 10,1,0.1", "LIST", listed(real(0, above=True)))
    sampler: str | None = setting(None, "%(choices)s (default: as in previews)", "NAME", choices=SAMPLERS)
    samplers: list = setting([*SAMPLERS], f"some of {', '.join(SAMPLERS)}", "LIST", listed(str, SAMPLERS))
    sample_steps: int = setting(50, "strides from t = T to 0, at most T", "N", COUNT)
    spacing: str | None = setting(None, ddpm.SPACING, "NAME", choices=["even", "log_snr"])
    draws: int = setting(4, "number of draws by ddpm from one x_t", "K", whole(2))
    no_clip: bool = setting(False, "do not clip x_0 to [-1, 1]")
    keep_eps: bool = setting(False, "also ddim that keeps eps where x_0 is clipped, as diffusers does")
    samples: int | None = setting(None, "samples to measure (default: up to half of the images)", "N", COUNT)
    full: bool = setting(False, "measure quality above 50 steps as well")
    labels: list | None = setting(None, "class numbers or names (default: all, or ten)", "LIST", listed(str))
    prompt: list | None = setting(None, "captions, each in quotes", "CAPTION", nargs="+", action="extend")
    per_label: int = setting(20, "number of images of each condition at each scale", "N", COUNT)
    batches: int = setting(1, "rows of --show images of each condition", "B", COUNT)
    guidance_scale: list = setting([1.0], "guidance scales; 1 is plain conditional", "LIST", listed(real(0)))
    langevin_levels: int = setting(60, "number of noise levels of Langevin dynamics", "N", whole(2))
    inner: int = setting(5, "number of Langevin steps at each of them", "N", COUNT)
    step: float = setting(0.3, "size of such a step, in units of sigma_t^2", "S", real(0, 2, above=True))
    point_epochs: int = setting(300, "epochs of the network that learns the points", "N", COUNT)
    classifier: str | None = setting(None, "evaluator: a run of --task classifier on the same data", "RUN")
    guide: str | None = setting(None, "another classifier, to guide with", "RUN")
    batch_size: int = setting(128, "images through the network at once", "IMAGES", COUNT)
    data_root: str | None = setting(None, "directory of the data set (default: the run's, or data)", "DIR")
    cache_dir: str = setting("data/cache", "directory of decoded images", "DIR")
    out: str | None = setting(None, "output directory (default: the run's, or runs/analysis)", "DIR")
    device: str = setting("auto", "auto, cpu, cuda, cuda:1 or mps", "NAME")
    seed: int = setting(0, "seed of all random draws", "N", whole(0, 2**63 - 1))


# run(settings, *models) -> Result takes `least` to `most` models; `about` are the paragraphs of its docstring
Study = namedtuple("Study", "run settings least most kinds about")
STUDIES: dict[str, Study] = {}
DIFFUSION = ("ddpm", "ddpm_conditional")
STAGES = {"coarse": (0.0, 0.01), "content": (0.01, 1.0), "clean-up": (1.0, math.inf)}  # of P2, by SNR
PLANE = ("first coordinate", "second coordinate")  # the axes of charts of points


def study(names: str, least: int = 0, most: float = 0, kinds=DIFFUSION, **defaults) -> Callable:
    """A decorator: add a function to STUDIES, with the settings of those names, some with other defaults."""
    names = {*names.split(), "data_root", "cache_dir", "out", "device", "seed"}

    def add(run: Callable) -> Callable:
        rows = {name: row | {"of": ""} for name, row in rows_of(Settings).items() if name in names}
        rows |= {name: rows[name] | {"default": default} for name, default in defaults.items()}
        about = [" ".join(text.split()) for text in run.__doc__.split("\n\n")]
        settings = make_dataclass(run.__name__, [(n, object, setting(**row)) for n, row in rows.items()])
        STUDIES[run.__name__] = Study(torch.no_grad()(run), settings, least, most, kinds, about)
        return run

    return add


class Model(namedtuple("Model", "path net diffusion config device folder")):
    """A trained network with its averaged weights, and the settings in its checkpoint, `config`."""

    @property
    def space(self):  # Pixels or Latents
        return self.config["space"]

    def clipped(self, eps_theta, diffusion: Diffusion | None = None):
        """The denoiser with its x_0 clipped to [-1, 1]; latents are not clipped."""
        return eps_theta if self.config.get("latent") else clip_x_0(diffusion or self.diffusion, eps_theta)

    def guided(self, y: Tensor, scale: float, numbers: Tensor, classifier=None):
        """The denoiser of samples of those numbers, given y (n, ...) of all, by cfg or by a classifier."""
        y, plain = y[numbers].to(self.device), GuidanceSettings()
        return self.clipped(guided_denoiser(self.diffusion, self.net, y, scale, plain, classifier))

    def note_condition(self, y: Tensor | None) -> list[str]:
        """A line on what a conditional model gets with images whose conditions are y or None; also a note."""
        if self.config["kind"] != "ddpm_conditional":
            return []
        given = "the null condition" if y is None else f"the {self.config['condition']} of each image"
        note(line := f"{self.path} is conditional: here it gets {given}")
        return [line]


class Evaluator(namedtuple("Evaluator", "net device dim")):  # dim is D, of its features
    """A classifier of --task classifier, applied to images without noise, at t = 1."""

    def features(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1], or uint8, -> (B, D)."""
        parts = ((to_x_0(z) if z.dtype == torch.uint8 else z).to(self.device) for z in x.split(256))
        return torch.cat([self.net.features(z, z.new_ones(len(z)).long()) for z in parts]).float().cpu()

    def p(self, x: Tensor) -> Tensor:
        """p(y | x), (B, C, H, W) -> (B, K)."""
        return self.net.head(self.features(x).to(self.device)).softmax(1).cpu()

    def agreement(self, x: Tensor, labels: Tensor) -> float:
        """The share of images x (B, C, H, W) that it gives their labels (B,)."""
        return (self.p(x).argmax(1) == labels).double().mean().item()


def load_evaluator(path: str | None, model: Model) -> Evaluator | None:
    """The classifier of --classifier, if given; UserError unless it was trained on the model's data."""
    net = path and load_classifier(path, model.config, model.device, guides=False)
    return net and Evaluator(net, model.device, net.head.in_features)


def same_data(models: Sequence[Model]) -> None:
    """UserError unless all runs are of the same data set, image size, channels and classes."""
    for model, key in product(models[1:], (*SAME_DATA, "class_names")):
        if model.config[key] != models[0].config[key]:
            differ = f"{model.path} and {models[0].path} differ in {flag(key)}"
            raise UserError(f"{differ}: compare runs of the same data")


def real_data(config: dict, settings: Settings, labelled: bool = False) -> Data:
    """The images that a run was trained on; UserError if its settings do not say which, or without labels."""
    name, root = config["dataset"], settings.data_root or config.get("data_root")
    if name is None:
        what = f"{config['name']}: published weights do not say what they were trained on"
        raise UserError(f"{what}; noise, denoise and losses take images with --image")
    choice = {key: config[key] for key in ("image_size", "channels", "limit")}
    data = get_data(name, root, "train", **choice, cache_dir=settings.cache_dir)
    if labelled and data.labels is None:
        raise UserError(f"the images of {name} have no labels here: is it the --data-root of the run?")
    return data


def chosen_images(settings: Settings, config: dict | None = None):
    """x_0 (B, C, H, W), of --image or of a run's data, and the conditions y (B, ...) of these, or None."""
    config = config or {**vars(settings), "channels": None, "limit": None, "data_root": "data"}
    if settings.image:
        x = read_images(settings.image, config["image_size"] or 64, config["channels"] or 3)
        return (x if config["channels"] or (x != x[:, :1]).any() else x[:, :1]), None  # gray ones stay gray
    data, condition = real_data(config, settings), config.get("condition")
    order = torch.randperm(len(data.images), generator=seeded_generator(settings.seed))
    chosen = order[: vars(settings).get("images", 1)]
    y = data.labels[chosen] if condition == "label" else None
    if condition == "text":
        y = conditions("", config, ConditionSettings(prompt=[data.captions[i] for i in chosen]))[1]
    return to_x_0(data.images[chosen]), y


def nearest_times(diffusion: Diffusion, snr: Tensor) -> Tensor:
    """The t in 1..T whose log SNR is nearest to that of each of snr (N,); -> (N,)."""
    return (diffusion.snr[1:].log() - snr[:, None].log()).abs().argmin(1) + 1


def chosen_levels(levels: Sequence[int] | None, default: Sequence[int], T: int) -> list[int]:
    """Times t, falling: --levels, or defaults that are quoted for T = 1000; UserError for one above T."""
    chosen = sorted(set(levels or (at(t, T) for t in default)), reverse=True)
    if chosen[0] > T:
        raise UserError(f"--levels: t runs from 1 to {T}")
    return chosen


def stage_levels(diffusion: Diffusion, each: int = 3) -> list[int]:
    """Times, falling: `each` in every stage of P2, even in log SNR, of SNR from 1e-4 to 100."""
    wanted, (most, *_, least) = [], diffusion.snr[1:].tolist()
    for low, high in STAGES.values():
        low, high = max(low, 1e-4, least), min(high, 100, most)
        wanted += [low * (high / low) ** ((i + 0.5) / each) for i in range(each) if low < high]
    return sorted({*nearest_times(diffusion, torch.tensor(wanted).double()).tolist()}, reverse=True)


def snr_label(diffusion: Diffusion, t: int) -> str:
    snr = diffusion.snr[t].item()
    return f"t = {t}, SNR {snr:.0f}" if snr >= 100 else f"t = {t}, SNR {snr:.2g}"


def in_batches(model: Model, y: Tensor | None, batch_size: int, bar, clip: bool = True):
    """The model's denoiser on `batch_size` images at once, counted on a progress bar; y (B, ...) or None.

    The images may be B, or B several times, as at several noise levels: y is then repeated.
    """

    def eps_theta(x_t: Tensor, t: Tensor) -> Tensor:
        parts, of = [], x_t if y is None else torch.cat([y.to(x_t.device)] * (len(x_t) // len(y)))
        for x, times, z in zip(*(part.split(batch_size) for part in (x_t, t, of)), strict=True):
            denoiser = model.diffusion.denoiser(model.net, None if y is None else z)
            parts.append((model.clipped(denoiser) if clip else denoiser)(x, times))
            bar.update(len(x))
        return torch.cat(parts)

    return eps_theta


def draw_samples(model, numbers, sampler, steps: int, settings, denoiser_of=None, diffusion=None):
    """Samples (B, C, H, W) of those numbers on the CPU, each from its own noise, and evaluations for each."""
    diffusion, done = diffusion or model.diffusion, []
    denoiser_of = denoiser_of or (lambda _: model.clipped(model.diffusion.denoiser(model.net)))  # of numbers
    name = getattr(sampler, "func", sampler).__name__  # of a partial, the function's
    with progress(f"{name}, {steps} steps", len(numbers)) as bar:
        for batch in torch.tensor(numbers).split(settings.batch_size):
            x_T, generators = numbered_noise(batch.tolist(), model.space.shape, settings.seed)
            watched = Watched(denoiser_of(batch), diffusion.T, bar)
            timesteps = diffusion.timesteps(steps, getattr(settings, "spacing", None))
            x_0 = sampler(diffusion, watched, x_T.to(model.device), timesteps, generators)
            done.append(model.space.decode(x_0).clamp(-1, 1))
    return torch.cat(done), watched.evaluations


def over_snr(title: str, y: str, lines: dict, log: str = "xy", x_from: float = 1e-4) -> Panel:
    """Curves over SNR from `x_from` up; a cosine's last steps lie below, and would squeeze all the others."""
    return Panel(title, "SNR", y, lines, log, bands=STAGES, x_from=x_from)


# 1. The P2 comparison: what a model recovers from x_t ------------------------------------------------------
def ddim_keeping_eps(diffusion, eps_theta, x, timesteps, generator=None):
    """DDIM, eq. 12, with x_0 clipped and eps as it was, as in diffusers; `clip_x_0` derives eps again."""
    # Start: DDIM sampling that keeps eps
    for t, _, _, ab_s in diffusion.strides(x, timesteps):  # t -> s, the next t; ab is alpha_bar
        eps = eps_theta(x, t)
        x_0 = diffusion.x_0_from_eps(x, eps, t).clamp(-1, 1)
        x = ab_s**0.5 * x_0 + (1 - ab_s) ** 0.5 * eps  # eq. 12 for eta = 0
    return x
    # End


def chains(diffusion, eps_theta, sampler, x_t, levels, steps, generators):
    """x_0 of every x_t[l], noisy as levels[l], by a sampler of `steps` strides from T; (L, B, C, H, W) both.

    A level takes the strides that are left below it. `generators`: one for each of L x B.
    """
    grid, B, x_0 = sorted({*diffusion.timesteps(steps), *levels}, reverse=True), x_t.shape[1], []
    for i, level in enumerate(levels):
        down, of_level = [t for t in grid if t <= level], generators[i * B : (i + 1) * B]
        x_0.append((SAMPLERS | KEEPING_EPS)[sampler](diffusion, eps_theta, x_t[i], down, of_level))
    return torch.stack(x_0)


def reconstructions(model, x_t: Tensor, y, levels: Sequence[int], draws: dict[str, int], settings) -> dict:
    """Images of x_t (L, B, *) at levels (L,), y (B, ...) or None, by each way; {way: (L, K, B, C, H, W)}."""
    diffusion, (L, B), x_t = model.diffusion, x_t.shape[:2], x_t.to(model.device)
    steps = min(settings.sample_steps, diffusion.T)
    with progress("denoising", unit="evaluation") as bar:
        plain = in_batches(model, y, settings.batch_size, bar, clip=False)
        eps_theta = plain if settings.no_clip else in_batches(model, y, settings.batch_size, bar)
        # Start: from x_t to x_0
        t, x = torch.tensor(levels, device=model.device).repeat_interleave(B), x_t.flatten(0, 1)  # (L B, ...)
        one_step = diffusion.x_0_from_eps(x, eps_theta(x, t), t)  # DDPM, eq. 15: the mean of all that fit x_t
        found = {"one-step x_0": model.space.decode(one_step).unflatten(0, (L, 1, B))}
        for sampler, K in draws.items():  # down from t: one of those that fit, by ddpm another in each draw
            seeds = [(level, i, 1 + k) for level in levels for k in range(K) for i in range(B)]
            generators = [seeded_generator(settings.seed, *seed) for seed in seeds]
            x, denoiser = x_t.repeat(1, K, 1, 1, 1), plain if sampler in KEEPING_EPS else eps_theta
            x = chains(diffusion, denoiser, sampler, x, levels, steps, generators)  # (L, K B, C, H, W)
            found[f"chain, {sampler}"] = model.space.decode(x).clamp(-1, 1).unflatten(1, (K, B))
        # End
    return found


def two_noisings(diffusion: Diffusion, x_0: Tensor, seed: int, features: Callable | None = None) -> list:
    """Rms distance of two noisings of one image and of two, at forty levels (P2, Choi et al. 2022, figure 2).

    Per pixel and squared: 2 (1 - ab), and that plus ab |x - x'|^2; in `features` perceptual, as the paper's.
    """
    rows = []
    for t in sorted({at(25 * k, diffusion.T) for k in range(1, 41)}):
        a, b = (diffusion.noise_images(x_0, t, seeded_generator(seed, t, i))[0] for i in (0, 1))
        for what, other in (("one image", b), ("two images", b.roll(1, 0))):
            rows.append({"of": what, "snr": diffusion.snr[t], "pixels": (a - other).square().mean().sqrt()})
            if features:
                rows[-1]["features"] = (features(a) - features(other)).square().mean().sqrt()
    return rows


NOISE = "image images show levels snr samplers sample_steps draws no_clip keep_eps classifier batch_size"
BOUND = "autoencoder, no noise"  # the same at every level
LOOK = {"x_t": "what the model gets", "one-step x_0": "the mean of all images that fit: a blur where many do"}
KEEPING_EPS = {"ddim, eps kept": ddim_keeping_eps}  # by the denoiser without clipping


@study(NOISE, 1, 1, samplers=["ddim", "pndm", "ddpm"])
def noise(settings: Settings, model: Model) -> Result:
    """What does a model recover from x_t, at each noise level and by each sampler (P2, Choi et al. 2022)?

    Where reconstructions equal x_0 the model read it in x_t; where draws differ it made it up. Detail (high
    frequencies) is lost to little noise, colour and layout (low ones) last. A latent model denoises latents;
    what its autoencoder loses by itself, without any noise, stands beside that and bounds it.
    """
    diffusion, evaluator, space = model.diffusion, load_evaluator(settings.classifier, model), model.space
    by_snr = settings.snr and nearest_times(diffusion, torch.tensor(settings.snr).double()).tolist()
    levels = chosen_levels(by_snr or settings.levels or stage_levels(diffusion), (), diffusion.T)
    x, y = chosen_images(settings, model.config)  # (B, C, H, W)
    x_0 = space.encode(x.to(model.device)).cpu()  # the same, or their latents (B, c, h, w)
    L, B = len(levels), len(x)
    mean = 0.0 if settings.image or B == 1 else x.mean(0)  # what all of them share; else mid-gray
    labels = evaluator and evaluator.p(x).argmax(1)
    draws = {sampler: settings.draws if sampler == "ddpm" else 1 for sampler in settings.samplers}
    draws |= dict.fromkeys(KEEPING_EPS, 1) if settings.keep_eps else {}
    if settings.keep_eps and (settings.no_clip or space.factor > 1):
        raise UserError("--keep-eps is for x_0 that are clipped, and none are here: leave it out")
    # Start: one x_t for each level and image, the same for all reconstructions
    generators = [seeded_generator(settings.seed, level, i) for level in levels for i in range(B)]
    t = torch.tensor(levels).repeat_interleave(B)  # (L B,)
    x_t = diffusion.noise_images(x_0.repeat(L, 1, 1, 1), t, generators)[0].unflatten(0, (L, B))  # eq. 4
    # End
    found, rows = reconstructions(model, x_t, y, levels, draws, settings), []
    if space.factor > 1:
        found[BOUND] = space.decode(x_0).clamp(-1, 1).expand(L, 1, *x.shape)
    for name, made in found.items():
        for level, several in reversed(list(zip(levels, made, strict=True))):  # several: (K, B, C, H, W)
            each = [measures.compare(draw, x, mean) for draw in several]
            row, K = {"reconstruction": name, "t": level, "snr": diffusion.snr[level]}, len(several)
            row |= {key: None if each[0][key] is None else np.mean([m[key] for m in each]) for key in each[0]}
            if evaluator:
                row["classifier agrees"] = evaluator.agreement(several.flatten(0, 1), labels.repeat(K))
            if K > 1:  # what the draws share is what the model recovered from x_t
                row["spread of draws"] = several.std(0).square().mean().sqrt().item() / 2
                row["mse of their mean"] = ((several.mean(0) - x) / 2).square().mean().item()
            rows.append(row)
    features = evaluator and (lambda x_t: evaluator.features(space.decode(x_t)))
    far = two_noisings(diffusion, x_0, settings.seed, features) if B > 1 else []
    keys = dict.fromkeys(key for row in rows for key in [*row][3:] if key != "mse of their mean")  # measures
    panels = [over_snr(key, key, curves(rows, "reconstruction", "snr", key), "x", 0) for key in keys]
    for title, of in (("distance of two noisings", "pixels"), ("the same to the classifier", "features")):
        panels.append(over_snr(title, f"rms of {of}", curves(far, "of", "snr", of), "x"))
    shown = {"x_t": space.decode(x_t)[:, None], **found}  # (L, K, B, C, H, W) each
    grids = noise_grids(shown, x[: settings.show], diffusion, levels)
    shares = ", ".join(map("{} {:.0%}".format, BANDS, measures.energy_bands(x - mean).mean(0)))
    zero = "mid-gray" if isinstance(mean, float) else "the images' mean"
    drawn = f", {draws['ddpm']} draws of each by ddpm" if "ddpm" in draws else ""
    notes = [f"over {B} images{drawn}; mse, psnr{', spread' if drawn else ''}: of images in [0, 1]"]
    notes += ["x_0 is not clipped"] * settings.no_clip + model.note_condition(y)
    notes += [f"kept: the share of x_0's energy, counted from {zero}: {shares}. low: to 0.125 cycles a"]
    notes += ["pixel, middle: to 0.25" + ("; luma: of Y, chroma: of Cb and Cr" if x.shape[1] == 3 else "")]
    if BOUND in found:
        where_lost(rows, list(found)[1], panels, notes)
        rows = [row for row in rows if row["reconstruction"] != BOUND or row["t"] == levels[-1]]
    images = {f"{way}, t = {t}": x[i, 0] for way, x in shown.items() for i, t in enumerate(levels)}
    return Result([*grids, Chart(panels)], rows, model.folder, notes, images)


def where_lost(rows: Sequence[dict], way: str, panels: list, notes: list) -> None:
    """Add the shares of high frequencies lost in the autoencoder, and besides in the diffusion by one way."""
    kept = {(row["reconstruction"], row["t"]): row["high kept"] or 0 for row in rows}
    lost, names = [], ("in the autoencoder", f"besides, by {way}")
    for t, snr in {row["t"]: row["snr"] for row in rows}.items():
        shares = 1 - kept[BOUND, t], kept[BOUND, t] - kept[way, t]
        lost += [{"in": name, "snr": snr, "share": share} for name, share in zip(names, shares, strict=True)]
    panels.append(over_snr("high frequencies lost", "share", curves(lost, "in", "snr", "share"), "x", 0))
    besides = ", ".join(f"{row['share']:.0%} at SNR {row['snr']:.2g}" for row in lost[1::2])
    notes.append(f"high frequencies lost: {lost[0]['share']:.0%} {names[0]}; {names[1]}, {besides}")


def noise_grids(shown: dict, x_0: Tensor, diffusion: Diffusion, levels: Sequence[int]) -> list[Image.Image]:
    """A grid for each x (L, K, B, C, H, W): its first draw, and where there are several also their mean."""
    bound = {"auto-\nencoder": shown[BOUND][0, 0, : len(x_0)]} if BOUND in shown else {}
    ends, labels = {**bound, "x_0": x_0}, [f"image {i + 1}" for i in range(len(x_0))]
    grids, heads = [], [*(snr_label(diffusion, t).replace(", ", "\n") for t in reversed(levels)), *ends]
    for name, x in shown.items():
        parts = {name: x[:, 0]} if name != BOUND else {}
        if x.shape[1] > 1:
            parts = {f"{name}, one draw": x[:, 0], f"{name}, mean of {x.shape[1]} draws": x.mean(1)}
        for caption, part in parts.items():
            cells = torch.stack([*part.flip(0)[:, : len(x_0)], *ends.values()], dim=1).flatten(0, 1)
            look = LOOK.get(name, "from which column on is it another image?")
            grids.append(make_grid(cells, f"{caption}: {look}", len(heads), labels, heads))
    return grids


# 2. The schedules ------------------------------------------------------------------------------------------
@study("schedules noise_steps")
def schedules(settings: Settings) -> Result:
    """What does a schedule set: beta, alpha_bar and SNR over t, and where do its landmarks lie?

    SNR is what a schedule sets: two of them take one path through noise levels at two speeds. A schedule
    spends most steps where its curve of SNR is flattest.
    """
    T, rows, found = settings.noise_steps, [], {"beta": {}, "alpha_bar": {}, "SNR": {}}
    for name in settings.schedules:
        diffusion = Diffusion(T, name)
        alpha_bar, snr = diffusion.alpha_bar[1:], diffusion.snr[1:]  # (T,)
        half_gone = (alpha_bar.sqrt() > 0.5).sum().item() + 1  # of a standardised x_0, corr(x_t, x_0)
        for quantity, values in (("beta", diffusion.beta), ("alpha_bar", alpha_bar), ("SNR", snr)):
            found[quantity][name] = (range(1, T + 1), values.tolist())
        row = {"schedule": name, "steps with SNR > 1": (snr > 1).sum().item()}
        row |= {"steps with SNR > 0.01": (snr > 0.01).sum().item(), "alpha_bar_T": alpha_bar[-1]}
        rows.append(row | {"half the structure gone at t": half_gone if half_gone <= T else None})
    panels = [Panel(name, "t", name, c, "" if name == "alpha_bar" else "y") for name, c in found.items()]
    panels[-1].y_range = 1e-5, 1e5  # of SNR; cosine ends near 1e-9, and the others would lie on each other
    half = "structure is half gone where the correlation of x_t with x_0, sqrt(alpha_bar_t), is 0.5 or less"
    return Result([Chart(panels)], rows, notes=[half])


# 3. The forward process ------------------------------------------------------------------------------------
def swiss_roll(count: int, generator: torch.Generator, noise: float = 0.0) -> Tensor:
    """Points of a spiral of one and a half turns, standardised; (N, 2, 1, 1)."""
    angle = 1.5 * math.pi * (1 + 2 * torch.rand(count, generator=generator))
    points = standardised(torch.stack([angle * angle.cos(), angle * angle.sin()], 1)[..., None, None])
    return standardised(points + noise * randn_like(points, generator))


def s_curve(count: int, generator: torch.Generator) -> Tensor:
    """Points of two arcs that make an S, standardised; (N, 2, 1, 1)."""
    angle = 3 * math.pi * (torch.rand(count, generator=generator) - 0.5)
    return standardised(torch.stack([angle.sin(), angle.sign() * (angle.cos() - 1)], 1)[..., None, None])


CLOUDS = {"Swiss roll": swiss_roll, "S-curve": s_curve}


def half_life(t: Sequence[int], values: Sequence[float]) -> float:
    """The t at which values that fall from 1 at t = 0 reach one half, linear between times; inf if never."""
    for (t_0, high), (t_1, low) in pairwise([(0, 1.0), *zip(t, values, strict=True)]):
        if low <= 0.5:
            return t_0 + (t_1 - t_0) * (high - 0.5) / (high - low)
    return math.inf


def what_is_left(diffusion: Diffusion, x_0: Tensor, shown: Sequence[int], t_parts: int, seed: int):
    """Noised x_0 (B, C, H, W) at times `shown`, {name: points} at them, and {measure: (t, values)}."""
    T, times = diffusion.T, sorted({at(25 * k, diffusion.T) for k in range(1, 41)})
    clouds = {name: cloud(500, seeded_generator(seed, 0)) for name, cloud in CLOUDS.items()}
    many = standardised(x_0.repeat(math.ceil(50000 / x_0.numel()), 1, 1, 1))  # enough to measure a variance

    def noised(x: Tensor, t: int, number: int = 1) -> Tensor:
        return diffusion.noise_images(x, t, seeded_generator(seed, number))[0]

    # Start: what the forward process leaves
    # (a) points, and the share of their neighbours that stay
    points = {name: [x, *(noised(x, t) for t in shown)] for name, x in clouds.items()}
    kept = [np.mean([neighbours_kept(noised(x, t), x) for x in clouds.values()]) for t in times]
    # (b) the image, and for one t its parts: DDPM, eq. 4: x_t = sqrt(ab) x_0 + sqrt(1 - ab) eps
    pictures = [x_0[:1], *(noised(x_0, t)[:1] for t in shown)]
    signal, x_t = diffusion.scales(t_parts, x_0)[0] * x_0[:1], noised(x_0, t_parts)[:1]
    pictures += [signal, x_t - signal, x_t]
    alike = [correlation(noised(many, t), many) for t in times]  # sqrt(ab), as they are standardised
    # (c) the variance at every t, of standardised x_0: 1 if the process preserves it, and 1 + sum beta
    # for x_0 + sqrt(sum beta) eps, a process that adds the same noise and does not scale the mean
    variance, unscaled = [], []
    for t in range(1, T + 1):
        x_t, eps = diffusion.noise_images(many, t, seeded_generator(seed, 1 + t))
        variance.append(x_t.var().item())
        unscaled.append((many + diffusion.beta[:t].sum().sqrt() * eps).var().item())
    # End
    left = {"points": (times, kept), "image": (times, alike)}
    left |= {"variance": (range(1, T + 1), variance), "unscaled": (range(1, T + 1), unscaled)}
    return pictures, points, left


@study("schedules noise_steps image dataset image_size at")
def forward(settings: Settings) -> Result:
    """How long do points and an image survive under each schedule, and is the variance preserved?

    A row is a schedule, time runs to the right: what can be recognised there can be learned there. If
    x_0 has variance 1, so has x_t under every schedule: the network sees one size at all times. If the mean
    were not scaled down while noise is added, the variance would grow to 1 plus the sum of the betas.
    """
    T, names, (x_0, _) = settings.noise_steps, settings.schedules, chosen_images(settings)
    if (x_0.std((2, 3)).amax(1) == 0).any():
        raise UserError("the image is of a single colour: there is no structure to follow")
    shown = sorted({at(t, T) for t in (20, 100, 250, 500, 750, 1000)})
    t_parts, table = at(settings.at, T), schedules(settings)
    found = {name: what_is_left(Diffusion(T, name), x_0, shown, t_parts, settings.seed) for name in names}
    rows = [*{row["schedule"]: row for row in table.rows}.values()]  # one of each name, as in `found`
    for row, (_, _, left) in zip(rows, found.values(), strict=True):
        (times, kept), (_, alike), (_, variance), (_, unscaled) = left.values()
        row |= {"points half-life": half_life(times, kept), "image half-life": half_life(times, alike)}
        row |= {"mean neighbours kept": np.mean(kept), "mean correlation": np.mean(alike)}
        row |= {"variance, largest error": max(abs(v - 1) for v in variance), "mean not scaled": unscaled[-1]}
    order = {"rank by points": lambda row: (row["points half-life"], row["mean neighbours kept"])}
    order["rank by image"] = lambda row: (row["image half-life"], row["mean correlation"])
    order["rank"] = lambda row: -row["rank by points"] - row["rank by image"]
    for which, key in order.items():
        for rank, row in enumerate(sorted(rows, key=key, reverse=True), start=1):
            row[which] = rank
    clouds = [
        Panel(f"{name}, t = {t}", "", "" if t else what, {what: x.flatten(1).T.tolist()}, kind="cloud")
        for what, (name, (_, points, _)) in product(CLOUDS, found.items())
        for t, x in zip((0, *shown), points[what], strict=True)
    ]
    heads = ["x_0", *(f"t = {t}" for t in shown), "signal", "noise", "x_t"]
    caption = f"From which column on is it noise? Last three: x_t at t = {t_parts} is signal plus noise"
    cells = torch.cat([x for pictures, _, _ in found.values() for x in pictures])
    grid = make_grid(cells, caption, len(heads), [*found], heads)
    lines = {key: {name: left[key] for name, (_, _, left) in found.items()} for key in left}
    chart = [Panel("points: nearest neighbours kept", "t", "share of 10", lines["points"])]
    chart += [Panel("image: correlation with x_0", "t", "correlation", lines["image"])]
    chart += [Panel("variance of x_t, x_0 standardised", "t", "variance", lines["variance"], y_range=(0, 2))]
    chart += [Panel("variance where the mean is not scaled", "t", "variance", lines["unscaled"])]
    notes = ["half-life: t where a measure is down to one half. Points: the share of 10 nearest points kept,"]
    notes += [f"mean of {' and '.join(CLOUDS)}; image: correlation with x_0, standardised. rank: by both"]
    apart = [r for r in rows if abs(r["rank by points"] - r["rank by image"]) > min(2, len(rows) // 3)]
    differ = "; ".join("{schedule} {rank by points} and {rank by image}".format_map(row) for row in apart)
    trust = "trust points for fine detail, which little noise hides, and the image for its layout"
    notes += [f"ranks by points and by image differ: {differ}: {trust}"] if apart else []
    figure = [*table.figure, Chart(clouds, 1 + len(shown)), grid, Chart(chart, 2)]
    return Result(figure, rows, notes=[*notes, *table.notes])


# 4. Weights ------------------------------------------------------------------------------------------------
def ho_weights(diffusion: Diffusion) -> Tensor:
    """lambda_t = (1 - beta_t) (1 - alpha_bar_t) / beta_t, L_simple's weight of each VLB term; (T,)."""
    beta, alpha_bar = diffusion.beta, diffusion.alpha_bar[1:]  # (T,), as in P2 (Choi et al. 2022)
    return (1 - beta) * (1 - alpha_bar) / beta  # DDPM, eq. 12, with sigma_t^2 = beta_t, without its factor 2


def continuous_weights(diffusion: Diffusion) -> Tensor:
    """-SNR(t) / SNR'(t), lambda_t for infinitely many steps, by differences (Kingma et al. 2021); (T,)."""
    return diffusion.snr[1:] / (diffusion.snr[:-1] - diffusion.snr[1:])


@study("schedules noise_steps k gammas", schedules=["linear", "cosine"])
def weights(settings: Settings) -> Result:
    """What does each weighting make of the VLB's terms, and of the error of eps, over SNR and by stage?

    Noise grows to the right, from the clean-up through the content to the coarse stage. L_simple already
    takes weight from the clean-up, on which the VLB spends much, and P2 takes more: its normalised weights
    have a hump in the content stage. With a gamma of 2 so little is left for the clean-up that noise stays.
    """
    panels, rows = [], []
    for schedule in settings.schedules:
        # Start: weights of the VLB's terms, and of the error of eps
        diffusion = Diffusion(settings.noise_steps, schedule)
        snr, ho = diffusion.snr[1:], ho_weights(diffusion)  # (T,)
        # lambda' = lambda / (k + SNR)^gamma (P2, Choi et al. 2022); gamma = 0 is L_simple
        of_vlb = {f"P2, gamma {gamma:g}": ho * p2(snr, gamma, settings.k) for gamma in settings.gammas}
        of_vlb = {"VLB": torch.ones_like(snr), **of_vlb}
        # the same as w(snr), the weight of the squared error of eps: divided by lambda of Ho et al.
        of_eps = {name: weight / ho for name, weight in of_vlb.items()}
        others = {"min-SNR": "min_snr", "MSE of x_0": "x_0", "MSE of v": "v"}
        of_eps |= {name: WEIGHTINGS[key](snr) for name, key in others.items()}
        # End
        both = {"Ho et al.": ho, "continuous, -SNR / SNR'": continuous_weights(diffusion)}
        over_t = {name: (range(1, diffusion.T + 1), weight.tolist()) for name, weight in both.items()}
        panels.append(Panel(f"{schedule}: lambda", "t", "weight", over_t, "y"))
        normalised = {name: weight / weight.sum() for name, weight in of_vlb.items()}
        shown = {"weight of the VLB's terms": (of_vlb, "xy"), "the same, normalised": (normalised, "x")}
        shown["weight of the error of eps"] = of_eps, "xy"
        for title, (weightings, log) in shown.items():
            lines = {name: (snr[w > 0].tolist(), w[w > 0].tolist()) for name, w in weightings.items()}
            panels.append(over_snr(f"{schedule}: {title}", "weight", lines, log, 1e-8))
        for kind, weightings in (("VLB's terms", of_vlb), ("error of eps", of_eps)):
            for name, weight in weightings.items():
                row = {"schedule": schedule, "weight of": kind, "weighting": name}
                row |= {"peak of a sum of 1": weight.max() / weight.sum(), "at SNR": snr[weight.argmax()]}
                for stage, (low, high) in STAGES.items():
                    row[f"share of {stage}"] = weight[(low <= snr) & (snr < high)].sum() / weight.sum()
                rows.append(row)
    return Result([Chart(panels, 2)], rows)


# 5. Denoising ----------------------------------------------------------------------------------------------
def denoised(diffusion: Diffusion, models: Sequence[Model], x_0: Tensor, y, t: int, settings: Settings):
    """x_0 (B, C, H, W) noised to t, and denoised: {way: (B, C, H, W)}; and x_t on the iterative way, by t."""
    # Start: denoising (CS180, project 5)
    generators = [seeded_generator(settings.seed, t, i) for i in range(len(x_0))]
    x_t, _ = diffusion.noise_images(x_0, t, generators)  # A 1.1
    noisy, kept = x_t / diffusion.scales(t, x_t)[0], {}  # x_0 + noise, which a blur can bring back to x_0
    sigmas = [x_0.shape[-1] / share for share in (32, 16, 8)]  # A 1.2: kernels by the size alone
    ways = {"x_t": x_t, "noisy": noisy} | {f"blur {sigma:g}": low_pass(noisy, sigma) for sigma in sigmas}
    for model in models:
        x, times = x_t.to(model.device), torch.full((len(x_t),), t, device=model.device)
        down = [t, *(s for s in ddpm.strided_timesteps(diffusion.T) if s < t)]  # A 1.4: strides of 30
        with progress(f"denoising from t = {t}", unit="evaluation") as bar:
            eps_theta = in_batches(model, y, settings.batch_size, bar)
            ways["one step"] = diffusion.x_0_from_eps(x, eps_theta(x, times), times).cpu()  # A 1.3
            watched = Watched(eps_theta, diffusion.T, keep=down[::5])
            ways["iterative"], kept = ddpm.ddpm(diffusion, watched, x, down, generators).cpu(), watched.kept
    # End
    return ways, kept


@study("image images dataset image_size levels schedule batch_size", 0, 2, (*DIFFUSION, "denoiser"))
def denoise(settings: Settings, *models: Model) -> Result:
    """What do blurs, one step, many steps, and a denoiser of one level make of x_t (CS180, A 1 and B 1)?

    A blur trades noise for detail; one step of the network gives the mean of all images that fit, many steps
    give one of them. That one is sharper and farther from x_0: PSNR prefers the mean. The number after "blur"
    is its sigma in pixels.
    """
    denoisers = [model for model in models if model.config["kind"] == "denoiser"]
    networks = [model for model in models if model.config["kind"] != "denoiser"]
    if len(denoisers) > 1 or len(networks) > 1:
        raise UserError("denoise takes a diffusion run, a run of --task denoiser, or one of each")
    same_data(models)
    first, figure, rows = next(iter(networks + denoisers), None), [], []
    diffusion = networks[0].diffusion if networks else Diffusion(1000, settings.schedule or "linear")
    x, y = chosen_images(settings, first and first.config)
    notes = [line for model in networks for line in model.note_condition(y)]
    x_0 = first.space.encode(x).cpu() if first else x
    for t in reversed(chosen_levels(settings.levels, (250, 500, 750), diffusion.T)):
        ways, _ = denoised(diffusion, networks, x_0, y, t, settings)
        ways = {name: first.space.decode(made) for name, made in ways.items()} if first else ways
        values = {name: psnr(made, x).mean().item() for name, made in ways.items()}
        best = max((name for name in ways if name.startswith("blur")), key=values.get)
        for name, value in values.items():
            row = {"noise": f"t = {t}", "snr": diffusion.snr[t], "denoised by": name, "psnr": value}
            rows.append(row | ({"best": "of the blurs"} if name == best else {}))
        heads = [f"{name}\n{value:.1f} dB{' *' * (name == best)}" for name, value in values.items()]
        level, over = snr_label(diffusion, t), f"mean of {len(x)} image{'s' * (len(x) > 1)}"
        caption = f"{level}; noisy: x_t / sqrt(alpha_bar); PSNR: {over}; *: best blur"
        pictures = torch.cat([one[:1] for one in (x, *ways.values())])
        figure.append(make_grid(pictures, caption, len(pictures), heads=["x_0", *heads]))
    for model in networks:  # A 1.4, of the first image
        t, y = at(990, diffusion.T), y if y is None else y[:1]
        ways, kept = denoised(diffusion, networks, x_0[:1], y, t, settings)
        shown = {f"t = {t}": x for t, x in kept.items()} | {k: ways[k] for k in ("iterative", "one step")}
        shown["blurred"] = low_pass(ways["x_t"], x_0.shape[-1] / 8)
        cells = torch.cat([model.space.decode(x) for x in shown.values()])
        caption = "after each fifth stride: from noise to an image; one step gives a mean of all that fit"
        figure.append(make_grid(cells, caption, len(shown), heads=[*shown]))
    for model in denoisers:
        seen, of_denoiser = one_level(model)
        by_epoch = curves(of_denoiser, "denoised by", "sigma", "psnr")
        title = f"a denoiser trained at sigma {model.config['sigma']:g}"
        panels = [Panel(title, "sigma, images in [0, 1]", "PSNR in dB", by_epoch)]
        loss = curves(charts.training_log(model), "run", "epoch", "loss")
        figure += [*seen, Chart([*panels, Panel("training loss", "epoch", "loss", loss)])]
        rows += of_denoiser
    return Result(figure, rows, first.folder if first else Result.folder, notes)


def one_level(model: Model) -> tuple[list[Image.Image], list[dict]]:
    """Pictures and PSNRs of a run of --task denoiser after epochs 1 and 5, or else the first and the last."""
    header, *lines = read_csv(model.folder / "psnr.csv") or [[]]
    if not lines:
        raise UserError(f"{model.folder / 'psnr.csv'} is missing: the run has had no epoch yet, or is a copy")
    lines = [dict(zip(header, map(float, line), strict=True)) for line in lines]
    epochs = sorted({int(line["epoch"]) for line in lines})
    epochs = [1, 5] if {1, 5} <= set(epochs) else sorted({epochs[0], epochs[-1]})
    ways, rows = {f"one step, epoch {epoch}": (epoch, "denoised") for epoch in epochs}, []
    for way, (epoch, key) in (ways | {"noisy": (epochs[-1], "noisy")}).items():  # noisy at every epoch
        for line in (line for line in lines if line["epoch"] == epoch):
            row = {"noise": f"sigma = {line['sigma']:g}", "sigma": line["sigma"], "denoised by": way}
            rows.append(row | {"psnr": line[key] if math.isfinite(line[key]) else None})
    files = [model.folder / f"epoch_{epoch:04d}.pt" for epoch in epochs]
    if not all(file.is_file() for file in files):  # a copy, or a run of an older version
        return [], rows
    # (sigmas, 2 images, C, H, W): noisy and denoised ones in turn; those of sigma = 0 are clean
    seen = [read_pickle(file, "train it again") for file in files]
    level = np.abs(np.array(ddpm.SIGMAS) - model.config["sigma"]).argmin()
    columns = {"clean": seen[0][0, ::2], "noisy": seen[0][level, ::2]}
    columns |= {f"epoch {epoch}": x[level, 1::2] for epoch, x in zip(epochs, seen, strict=True)}
    cells, caption = torch.stack([*columns.values()], 1).flatten(0, 1), f"at sigma {ddpm.SIGMAS[level]:g}"
    return [make_grid(cells, caption, len(columns), heads=[*columns])], rows


# 6. Samplers, and other schedules at inference -------------------------------------------------------------
def real_halves(data: Data, evaluator: Evaluator, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of two random halves of the real images; UserError where n is too small or the data too few."""
    count, D = len(data.images), evaluator.dim
    if n <= D:
        needed = f"a Frechet distance in {D} features takes at least {D + 1} samples, not {n}"
        raise UserError(needed + (": ask for more --samples" if count > 2 * D + 1 else ""))
    if count < 2 * n:
        compared = f"{n} samples are compared with half of the real images, and with {n} of the other half"
        raise UserError(f"{compared}, which takes {2 * n}, and there are {count}: ask for fewer --samples")
    return torch.randperm(count, generator=seeded_generator(seed)).tensor_split([count // 2])


def real_features(model: Model, evaluator: Evaluator, settings: Settings) -> tuple[int, Tensor, Tensor]:
    """The number n of samples to measure; features of real images (N // 2, D), and of n others (n, D)."""
    data = real_data(model.config, settings, labelled=True)
    n = settings.samples or min(max(128, evaluator.dim * 5 // 4), len(data.images) // 2)
    first, second = real_halves(data, evaluator, n, settings.seed)
    return n, evaluator.features(data.images[first]), evaluator.features(data.images[second[:n]])


def on_schedule(trained: Diffusion, other: Diffusion, eps_theta):
    """A denoiser for the process `other` out of one for `trained`, called with the t whose SNR is nearest."""
    # At equal SNR x_t has one distribution under both, so what was learned of its eps holds.
    times = torch.cat([torch.zeros(1, dtype=torch.long), nearest_times(trained, other.snr[1:])])  # (T+1,)
    return lambda x_t, t: eps_theta(x_t, times.to(x_t.device)[t])


@study("samplers schedules spacing samples full classifier batch_size", 1, 1)
def samplers(settings: Settings, model: Model) -> Result:
    """How few steps will do, for each sampler, and may the schedule be another one than in training?

    From one noise all but DDPM go to one picture, the better ones in fewer evaluations; of DDPM only the
    quality counts. Frechet distances of few samples differ by chance, by about that of real images.
    """
    evaluator, few = load_evaluator(settings.classifier, model), 8  # images that are compared one by one
    T, trained, y = model.diffusion.T, model.config["schedule"], None
    if model.config["kind"] == "ddpm_conditional":
        _, y = conditions(model.path, model.config, ConditionSettings())
    if evaluator:
        n, half, others = real_features(model, evaluator, settings)
    elif settings.samples or settings.full:
        raise UserError("--samples and --full are of the quality, which takes --classifier RUN: add it")

    def draw(sampler: str, schedule: str, steps: int, numbers: range) -> tuple[Tensor, int]:
        diffusion = Diffusion(T, schedule)

        def denoiser_of(numbers: Tensor):
            of = None if y is None else y[numbers % len(y)].to(model.device)  # the conditions in turn
            plain = model.diffusion.denoiser(model.net, of)
            eps_theta = plain if schedule == trained else on_schedule(model.diffusion, diffusion, plain)
            return model.clipped(eps_theta, diffusion)

        return draw_samples(model, numbers, SAMPLERS[sampler], steps, settings, denoiser_of, diffusion)

    counts = sorted({min(steps, T) for steps in (5, 10, 20, 50, 100, 250, T)})
    jobs = [(sampler, trained, steps) for sampler in settings.samplers for steps in counts]
    jobs += [("ddim", schedule, min(20, T)) for schedule in settings.schedules if schedule != trained]
    end_point, _ = draw("ddim", trained, T, range(few))  # of the probability flow
    rows, pictures, panels = [], {}, []
    for sampler, schedule, steps in jobs:
        started = time.perf_counter()
        x, evaluations = draw(sampler, schedule, steps, range(few))
        row = {"sampler": sampler, "schedule": schedule, "steps": steps, "evaluations": evaluations}
        row["ms per image"] = 1000 * (time.perf_counter() - started) / few
        row["distance to DDIM's end point"] = (x - end_point).square().mean().sqrt().item() / 2
        if evaluator and (steps <= 50 or settings.full):
            x = torch.cat([x, draw(sampler, schedule, steps, range(few, n))[0]])
            row |= {"n": n, **quality(evaluator.features(x), half)}
        rows.append(row)
        pictures[sampler, schedule, steps] = x[:2]
    rows += [{"sampler": "real images", "n": n, **quality(others, half)}] if evaluator else []
    notes = [f"distance: rms per pixel of [0, 1], {few} images, to ddim with {T} steps from the same noise"]
    notes += [f"spacing of the strides: {settings.spacing or 'by schedule'}"]
    notes += ["the run is conditional: it gets its classes or example captions in turn"] * (y is not None)
    own = [x for (_, schedule, _), x in pictures.items() if schedule == trained]
    foreign = {schedule: x for (_, schedule, _), x in pictures.items() if schedule != trained}
    drawn, heads = list(dict.fromkeys(settings.samplers)), [f"{n} steps" for n in counts]
    caption = f"{model.path}: two starting noises. From how many steps on does nothing change any more?"
    x = torch.stack(own).unflatten(0, (-1, len(counts))).transpose(1, 2).flatten(0, 2)  # a row for each noise
    grids = [make_grid(x, caption, len(counts), [row for name in drawn for row in (name, "")], heads)]
    if foreign:
        caption = f"{trained} in training, another in sampling, ddim {min(20, T)} steps: is any worse?"
        grids.append(make_grid(torch.cat([*foreign.values()]), caption, 2, [*foreign]))
    for what in ("distance to DDIM's end point", "frechet", "ms per image"):
        seen = [row for row in rows if row.get("schedule") == trained and row.get(what) != 0]  # log 0
        panels.append(Panel(what, "evaluations", what, curves(seen, "sampler", "evaluations", what), "xy"))
    panels[1].curves |= {"real images": ([5, min(50, T)], [rows[-1]["frechet"]] * 2)} if evaluator else {}
    return Result([join(grids, across=True), Chart(panels)], rows, model.folder, notes)


# 7. Guidance -----------------------------------------------------------------------------------------------
SCALES = [0.0, 0.5, 1.0, 2.0, 3.0, 5.0, 7.5, 15.0]
STRONG = (("sharper", "sharpness", 1), ("less diverse", "diversity", -1), ("saturated", "saturation", 1))
WEAK = (("blurry", "sharpness", -1), ("random", "accuracy", -1))  # a claim, its measure, where that goes
GUIDANCE = "guidance_scale labels prompt per_label show batches classifier guide sampler sample_steps"


def real_beside(model: Model, y: Tensor, settings: Settings, needed: bool) -> tuple | None:
    """Two sets of real images for samples of y (n, ...), and labels of the second; None without data."""
    try:
        data, labelled = real_data(model.config, settings, labelled=y.ndim == 1), y.ndim == 1
        labels, y = (data.labels, y) if labelled else (torch.zeros(len(data.images)), torch.zeros(len(y)))
        order = torch.randperm(len(data.images), generator=seeded_generator(settings.seed))
        order = order[torch.isin(labels[order], y)]  # both sets are of labels in y (n,), or of all captions
        first, second = order.tensor_split([len(order) // 2])
        if len(order) < 4:
            raise UserError(f"there are {len(order)} real images of these labels: ask for others, or more")
    except UserError as error:
        if needed:
            raise
        return note(f"no real images beside the samples: {error}")
    second = torch.cat([second[labels[second] == k][: (y == k).sum()] for k in y.unique()])  # at most y's
    return data.images[first], data.images[second], labels[second] if labelled else torch.arange(len(second))


def guides(settings: Settings, model: Model) -> dict[str, Callable]:
    """What can guide the model, {name: (y (n, ...), scale, numbers) -> denoiser}; UserError if nothing."""
    found = {"cfg": model.guided} if model.config["kind"] == "ddpm_conditional" else {}
    path = settings.guide or settings.classifier
    if not found and not path:
        raise UserError(f"{model.path} is unconditional: guide it with --classifier RUN")
    try:
        if path:
            classifier = load_classifier(path, model.config, model.device)
            found["classifier"] = partial(model.guided, classifier=classifier)
    except UserError as error:  # an evaluator may have been trained on other noise; a guide may not
        if settings.guide or not found:
            raise
        note(f"no classifier guidance: {error}")
    return found


@study(f"{GUIDANCE} batch_size", 1, 1, guidance_scale=SCALES, sample_steps=20, show=1)
def guidance(settings: Settings, model: Model) -> Result:
    """How do pictures, accuracy, diversity and sharpness change with the scale of guidance?

    Scales above 1 buy accuracy with diversity; far too much of them spoils the pictures. The Frechet distance
    is least where both are near what real images have.
    """
    evaluator, denoisers = load_evaluator(settings.classifier, model), guides(settings, model)
    scales, sampler = settings.guidance_scale, settings.sampler or model.config["sampler"]
    if "cfg" in denoisers:
        settle_scale(model.config["p_uncond"])
        scales = [1.0] if model.config["p_uncond"] == 0 and scales == SCALES else scales
    names, y = conditions(model.path, model.config, settings)
    if not (settings.labels or settings.prompt) and len(names) > 10:  # ten of many, evenly spaced
        few = torch.linspace(0, len(names) - 1, 10).round().long()
        names, y = [names[k] for k in few], y[few]
    many = settings.batches * settings.show  # images of a condition in the figure
    R, n, enough = len(names), len(names) * max(settings.per_label, many), False
    of, steps = torch.arange(n) % R, min(settings.sample_steps, model.diffusion.T)  # i is of names[i % R]
    real = real_beside(model, y := y[of], settings, needed=evaluator is not None)
    if evaluator:
        half, enough = evaluator.features(real[0]), min(n, *map(len, real)) > evaluator.dim

    def measured(kind: str, scale: float | None, x: Tensor, labels: Tensor) -> dict:
        row = {"guidance": kind, "scale": scale, "n": len(x)}
        row |= {"accuracy": evaluator.agreement(x, labels)} if evaluator else {}
        row |= {"diversity": measures.diversity(x, labels)} if settings.per_label > 1 else {}
        row |= {"sharpness": measures.energy_bands(x)[:, 2].mean(), "contrast": x.std((1, 2, 3)).mean() / 2}
        row |= {"saturation": measures.saturation(x)} if x.shape[1] == 3 else {}  # digits are black and white
        return row | ({"frechet": measures.frechet_distance(evaluator.features(x), half)} if enough else {})

    rows, grids, heads = [], [], [f"scale {scale:g}" for scale in scales]
    batches = [f", batch {b + 1}" * (settings.batches > 1) for b in range(settings.batches)]
    labels = [name + batch for name, batch in product(names, batches)]
    for kind, guide in denoisers.items():
        shown = []  # (batches, show, R, C, H, W) for each of S scales
        for scale in scales:
            x, _ = draw_samples(model, range(n), SAMPLERS[sampler], steps, settings, partial(guide, y, scale))
            rows.append(measured(kind, scale, x, y if y.ndim == 1 else of))  # a caption by its number
            shown.append(x[: R * many].unflatten(0, (settings.batches, settings.show, R)))
        cells = torch.stack(shown).permute(3, 1, 0, 2, 4, 5, 6).flatten(0, 3)  # (R batches S show, C, H, W)
        caption = f"{kind} guidance, {sampler} {steps} steps: where are labels right, and images broken?"
        grids.append(make_grid(cells, caption, len(scales) * settings.show, labels, heads))
    last = [measured("real images", None, to_x_0(real[1]), real[2])] if real else []
    level = [one | {"scale": s} for one in last for s in (min(scales), max(scales))]  # drawn as a line
    panels = [Panel(k, "scale", k, curves(rows + level, "guidance", "scale", k)) for k in [*rows[0]][3:]]
    notes = ["diversity: mean rms distance per pixel of [0, 1] within a condition; sharpness: the share of"]
    notes += ["energy above 0.25 cycles a pixel; contrast: standard deviation; saturation: share at 0 or 255"]
    notes += claims(rows)
    if evaluator:
        few = f"no Frechet distance: it takes more than {evaluator.dim} images on either side (--per-label)"
        same = "the classifier that guides is also the evaluator, which flatters it: see --guide RUN"
        notes += [few] * (not enough) + [same] * ("classifier" in denoisers and not settings.guide)
    return Result([*grids, Chart(panels)], rows + last, model.folder, notes)


def claims(rows: Sequence[dict]) -> list[str]:
    """What is claimed of scales too high and too low: a line each, on whether it holds beside scale 1."""
    lines, kinds = [], dict.fromkeys(row["guidance"] for row in rows)
    for kind, (end, which, claimed) in product(kinds, [(-1, "too strong", STRONG), (0, "too weak", WEAK)]):
        of = sorted((row for row in rows if row["guidance"] == kind), key=lambda row: row["scale"])
        row, plain, held = of[end], min(of, key=lambda row: abs(row["scale"] - 1)), []
        for claim, key, sign in claimed if row is not plain else ():
            if row.get(key) is not None:
                answer = "yes" if sign * (row[key] - plain[key]) > 0.01 * abs(plain[key]) else "no"
                held.append(f"{claim}: {answer} ({key} {plain[key]:.3g} to {row[key]:.3g})")
        scales = f"scale {row['scale']:g} beside {plain['scale']:g}"
        lines += [f"{kind}, {scales}, {which}? {', '.join(held)}"] if held else []
    return lines


# 8. Quality in numbers -------------------------------------------------------------------------------------
@study("samples guidance_scale classifier sampler sample_steps batch_size", 1, math.inf)
def evaluate(settings: Settings, *models: Model) -> Result:
    """How good are the samples of runs: Frechet distance, precision, recall, accuracy, beside real images?

    Read each number beside the last row, the score of real images: that is the floor. Precision is the share
    of samples that could be real, recall the share of real images that samples cover.
    """
    same_data(models)
    config, path = models[0].config, settings.classifier
    data = real_data(config, settings, labelled=True)
    if path is None:
        trained = "python ddpm_conditional.py --task classifier --dataset {dataset} --image-size {image_size}"
        named = f"name one with --classifier RUN ({trained.format(**config)})"
        raise UserError(f"evaluate sees images as a classifier does: {named}")
    evaluator = load_evaluator(path, models[0])
    n = settings.samples or min(1000, len(data.images) // 2)
    first, second = real_halves(data, evaluator, n, settings.seed)
    images, half = data.images[torch.cat([first, second])], evaluator.features(data.images[first])

    def measured(x: Tensor, labels: Tensor | None, nearest: Tensor) -> dict:
        row = {"n": n, **quality(evaluator.features(x), half)}
        row["label accuracy"] = None if labels is None else evaluator.agreement(x, labels)
        row["sure"] = (evaluator.p(x).max(1).values > 0.95).double().mean().item()  # of whatever label
        return row | {"nearest, mean": nearest.mean().item(), "nearest, least": nearest.min().item()}

    rows, pictures, names = [], [], []
    for model in models:
        sampler = settings.sampler or model.config["sampler"]
        steps, scales, y = min(settings.sample_steps, model.diffusion.T), [None], None
        if model.config.get("condition") == "label":
            settle_scale(model.config["p_uncond"])
            scales, y = settings.guidance_scale, torch.arange(n) % len(model.config["class_names"])
        for s in scales:
            eps_theta_of = None if y is None else partial(model.guided, y, s)
            x, _ = draw_samples(model, range(n), SAMPLERS[sampler], steps, settings, eps_theta_of)
            nearest, index = nearest_images(x, images)
            row = {"run": model.path, "scale": s, "epoch": model.config["epoch"]}
            rows.append(row | {"sampled by": f"{sampler} {steps}"} | measured(x, y, nearest))
            pictures += [x[:10], to_x_0(images[index[:10]])]
            names += [model.folder.name + ("" if y is None else f" scale {s:g}"), "nearest training image"]
    floor = to_x_0(data.images[second[:n]])  # the score of other real images against the same half
    nearest, _ = nearest_images(floor, images, skip=1)
    rows.append({"run": "real images"} | measured(floor, data.labels[second[:n]], nearest))
    caption = f"samples, and the nearest of {len(images)} training images to each: is any of them a copy?"
    notes = [f"as {path} sees them, trained on most of them; against {len(first)} real, and so is the last"]
    notes += ["row: other real ones. sure: share with some label above 95 %. nearest: rms distance per pixel"]
    notes += ["of [0, 1] to the nearest training image (of a real one, to another one)"]
    if len(models) > 1:  # 2.d the conditional model beside the unconditional one
        best = min(rows[:-1], key=lambda row: row["frechet"])
        guided = "guidance, eps_u + s (eps_c - eps_u): to eps_u it adds s times what the label changes"
        notes += [f"nearest to real images: {best['run']}", *[guided] * any(row.get("scale") for row in rows)]
    return Result([make_grid(torch.cat(pictures), caption, min(10, n), names)], rows, models[0].folder, notes)


# 9. Losses -------------------------------------------------------------------------------------------------
@study("image images batch_size", 1, math.inf, (*DIFFUSION, "denoiser"), images=256)
def losses(settings: Settings, *models: Model) -> Result:
    """At which noise levels do runs err, on the same images and noise, and how did they train?

    Where its curve is higher a model errs more, at that noise level. Training losses weight the levels each
    in its way: compare only runs of one weighting by them.
    """
    same_data(models)
    rows, errors, keys = [], [], ("mse of eps", "mse of x_0")
    notes = ["on the same images and noise; a stage: mean of its t = 1, 10, 40, ...; charts end at SNR 1e-4"]
    networks = [model for model in models if model.config["kind"] != "denoiser"]
    rows += [{"run": m.path, "prediction": "x_0 at one level"} for m in models if m not in networks]
    for model in networks:
        x, y = chosen_images(settings, models[0].config | {"condition": model.config.get("condition")})
        notes += model.note_condition(y)
        diffusion, of_model, x_0 = model.diffusion, [], model.space.encode(x).cpu()
        levels = sorted({at(t, diffusion.T) for t in (1, 10, *range(40, 1001, 40))})
        with progress(model.path, len(levels) * len(x_0)) as bar:
            eps_theta = in_batches(model, y, settings.batch_size, bar, clip=False)
            for t in levels:
                times = torch.full((len(x_0),), t)
                x_t, eps = diffusion.noise_images(x_0, times, seeded_generator(settings.seed, t))
                predicted = eps_theta(x_t.to(model.device), times.to(model.device)).cpu()
                error, snr = (predicted - eps).square().mean().item(), diffusion.snr[t].item()
                of_model += [{"run": model.path, "snr": snr, "mse of eps": error, "mse of x_0": error / snr}]
        errors += of_model
        row = {"run": model.path} | {k: model.config[k] or "plain MSE" for k in ("prediction", "weighting")}
        for stage, (low, high) in STAGES.items():
            inside = [error for error in of_model if low <= error["snr"] < high]
            means = {key: np.mean([error[key] for error in inside]) for key in keys if inside}
            rows.append(row | {"stage": stage, **means})
    by_epoch = curves([row for model in models for row in charts.training_log(model)], "run", "epoch", "loss")
    panels = [over_snr(key, key, curves(errors, "run", "snr", key)) for key in keys]
    panels.append(Panel("training loss, as each run weights it", "epoch", "loss", by_epoch, "y"))
    if len({model.space.shape for model in networks}) > 1:
        note("errors of latents and of pixels are not of one unit: do not compare their heights")
    if len({model.config["schedule"] for model in networks}) > 1:
        notes.append("the schedules differ, and so does the SNR at these t: compare the charts, over SNR")
    return Result([Chart(panels)], rows, models[0].folder, notes)


# 10. The network as a score function -----------------------------------------------------------------------
@torch.no_grad()
def langevin(diffusion, eps_theta, x, timesteps, generator=None, inner=5, step=0.3):
    """Annealed Langevin dynamics, x (B, C, H, W) at timesteps[0] -> x at timesteps[-1] (Song & Ermon 2019).

    A sampler that uses only each level's score. That of z = x_0 + sigma_t eps, where sigma_t^2 = 1 / SNR, is
    -eps_theta / sigma_t. Each level takes `inner` steps of size `step` sigma_t^2, their alpha.
    """
    # Start: annealed Langevin dynamics (Song & Ermon 2019, Algorithm 1)
    for t, _, ab_t, ab_s in diffusion.strides(x, timesteps):  # line 2: for each noise level
        sigma = ((1 - ab_t) / ab_t) ** 0.5
        z = x / ab_t**0.5  # their coordinates: a level begins as the one before ended
        alpha = step * sigma**2  # line 3
        for _ in range(inner):  # line 4
            score = -eps_theta(z * ab_t**0.5, t) / sigma
            z = z + alpha / 2 * score + alpha**0.5 * randn_like(z, generator)  # lines 5 and 6
        if ab_s == 1:  # after the last level the noise that is left is taken out, in one step
            z = z - sigma * eps_theta(z * ab_t**0.5, t)
        x = z * ab_s**0.5  # line 8: the next level begins where this one ended
    return x
    # End


class PointMLP(torch.nn.Module):
    """A network for points (B, 2, 1, 1) of the plane; it sees their Fourier features (Tancik et al. 2020)."""

    def __init__(self, width: int = 128):
        super().__init__()
        self.width, sizes = width, (2 + 2 * 6 + width, width, width)
        hidden = [layer for n in sizes for layer in (torch.nn.Linear(n, width), torch.nn.SiLU())]
        self.layers = torch.nn.Sequential(*hidden, torch.nn.Linear(width, 2))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        angles = (x.flatten(1)[:, :, None] * math.pi * x.new_tensor([0.5, 1.0, 2.0])).flatten(1)  # (B, 6)
        time = timestep_embedding(t, self.width)  # (B, width)
        return self.layers(torch.cat([x.flatten(1), angles.sin(), angles.cos(), time], dim=1)).view(x.shape)


@study("langevin_levels inner step point_epochs samples classifier batch_size", 0, 1)
def score(settings: Settings, model: Model | None = None) -> Result:
    """Does annealed Langevin dynamics along the network's score sample as well as ancestral sampling?

    -eps_theta / sqrt(1 - alpha_bar) points to likelier images; noisy steps along it draw samples. With as
    many evaluations of the network it should come near ancestral sampling.
    """
    evaluator = load_evaluator(settings.classifier, model) if model else None
    if (settings.classifier and not model) or (settings.samples and not evaluator):
        raise UserError("--samples and --classifier measure images: name a RUN, and its --classifier")
    points = swiss_roll(4000, seeded_generator(settings.seed), noise=0.06) / 2.5  # in [-1, 1]
    torch.manual_seed(settings.seed)
    net, diffusion = PointMLP(), Diffusion(1000, "cosine", "v", "simple")  # a small network learns the points
    loader = Loader(((points + 1) * 127.5).round().clamp(0, 255).byte(), 256, seed=settings.seed)
    training = TrainingSettings(settings.point_epochs, lr=3e-3, save_every=settings.point_epochs)
    with tempfile.TemporaryDirectory() as folder, torch.enable_grad():
        trainer = Trainer(net, EMA, loader, Path(folder), training, MachineSettings(seed=settings.seed))
        ddpm.train(diffusion.loss, trainer)
    n, eps_theta, (data, more) = 1000, diffusion.denoiser(trainer.ema.net), points[:2000].chunk(2)
    levels, by_score = settings.langevin_levels, partial(langevin, inner=settings.inner, step=settings.step)
    ways = {"ancestral": (ddpm.ddpm, levels * settings.inner), "Langevin": (by_score, levels)}  # equal effort
    rows, clouds, grids = [], {"data": data}, []
    for way, (sampler, steps) in ways.items():
        x_T, generators = numbered_noise(range(n), (2, 1, 1), settings.seed)
        watched, timesteps = Watched(eps_theta, diffusion.T), diffusion.timesteps(min(steps, diffusion.T))
        clouds[way] = sampler(diffusion, watched, x_T, timesteps, generators)
        row = {"data": "Swiss roll", "sampler": way, "evaluations": watched.evaluations, "n": n}
        rows.append(row | quality(clouds[way].flatten(1), data.flatten(1)))
    rows.append({"data": "Swiss roll", "sampler": "real", "n": n} | quality(more.flatten(1), data.flatten(1)))
    if model:
        n, half, rest = real_features(model, evaluator, settings) if evaluator else (16, None, None)
        for way, (sampler, steps) in ways.items():
            x, evaluations = draw_samples(model, range(n), sampler, min(steps, model.diffusion.T), settings)
            row = {"data": model.path, "sampler": way, "evaluations": evaluations, "n": n}
            rows.append(row | (quality(evaluator.features(x), half) if evaluator else {}))
            grids.append(make_grid(x[:16], f"{way}, {evaluations} evaluations: can as many be read?", 8))
        rows += [{"data": model.path, "sampler": "real", "n": n, **quality(rest, half)}] if evaluator else []
    panels = [Panel(way, *PLANE, {way: x.flatten(1).T.tolist()}, kind="points") for way, x in clouds.items()]
    x, y = (c.flatten() for c in torch.meshgrid(*[torch.linspace(-1.2, 1.2, 17)] * 2, indexing="xy"))
    plane = torch.stack([x, y], 1)[..., None, None]
    for t in (20, 100, 400):  # the direction of the score, -eps_theta / sqrt(1 - ab)
        field = -eps_theta(plane, torch.full((len(x),), t)).flatten(1)
        arrows = [c.tolist() for c in (x, y, *(field / field.norm(dim=1, keepdim=True)).T)]
        title = f"direction of the score, {snr_label(diffusion, t)}"
        lines = {"sqrt(alpha_bar) x_0": (diffusion.signal[t] * data).flatten(1).T.tolist(), "score": arrows}
        panels.append(Panel(title, *PLANE, lines, kind="points"))
    folder, notes = (model.folder, model.note_condition(None)) if model else (Result.folder, ())
    return Result([Chart(panels), *grids], rows, folder, notes)


# 11. The report, and the command line ----------------------------------------------------------------------
REPORT = [  # in the order of the assignment and of CS180: an item, and a study or a command # its question
    *(("1", "schedules"), ("1", "forward"), ("1", "losses")),
    ("1", "{kind}.py --sample 20 --sampler ddpm --sample-steps {noise_steps} --no-clip # How does it draw?"),
    ("1", "samplers"),
    ("2.a, 2.b", "ddpm_conditional.py --sample 30 --guidance-scale 0,1,3 # What do labels and guidance do?"),
    *(("2.c", "guidance"), ("2.d", "evaluate"), ("P2", "noise"), ("P2", "weights")),
    ("CS180 A 1.1 to 1.4, B 1", "denoise"),
    ("CS180 A 1.7", "edit.py sdedit --image {image} # What stays of an image, noised and denoised?"),
    ("CS180 A 1.7", "edit.py inpaint --image {image} --box 0,0,{half},{image_size} # What fills a hole?"),
    ("CS180 A 1.8", "edit.py anagram --labels 6,9 --draws 5 # Can one picture be read in two ways?"),
    ("CS180 A 1.9", "edit.py hybrid --labels 6,4 --draws 5 # Is it one thing from afar, another from near?"),
    ("Scores", "score"),
    ("Scores", "edit.py sds --labels 3,8 --draws 2 # What does score distillation make of noise?"),
]


@study("image classifier", 1, 2)
def report(settings: Settings, *models: Model) -> None:
    """Every study of one or two runs, and edits by the last, as a PDF in the assignment's order."""
    load_evaluator(settings.classifier, models[0])  # errors here come before the work
    same_data(models)
    charts.new_figure(1, 1)
    folder, last = Path(settings.out) if settings.out else models[0].folder, models[-1]
    of_run = {key: last.config.get(key) for key in ("noise_steps", "dataset", "image_size", "data_root")}
    known = {key: value for key, value in (of_run | vars(settings)).items() if value is not None}
    x, _ = chosen_images(settings, last.config)  # its first image is given to the edits
    keep = partial(save_picture, to_pictures(x)[0], show=False)
    image = settings.image[0] if settings.image else keep(new_path(folder / "report_image.png", ".png"))
    machine, each = ("--device", settings.device, "--seed", settings.seed), [[model] for model in models]
    sections = [charts.settings_section(models)]
    for item, what in REPORT:
        one = STUDIES.get(what)
        command, question, *more = (what, *one.about) if one else what.split(" # ")
        of = models[0] if "{kind}" in command else last  # Algorithm 2 by the first, edits by the last
        values = of.config | {"image": image, "half": of.config["image_size"] // 2}
        words = [part.format(**values).replace("published.py", "ddpm.py") for part in command.split()]
        for group in {0: [[]], math.inf: [models]}.get(one.most, each) if one else [[of]]:
            figure, rows, texts, name = [], [], [], " ".join(words).split(" -")[0]
            title = ", ".join([f"{item}: {name}", *(m.path for m in group if len(models) > 1)])
            print(f"\n{title}")
            try:
                if one:
                    chosen = {key: value for key, value in known.items() if key in rows_of(one.settings)}
                    result = one.run(one.settings(**chosen), *group)
                    publish(what, replace(result, folder=folder), settings.out)
                    figure, rows, texts = result.figure, result.rows, [" ".join(more), *result.notes]
                else:
                    figure = runs.figure_of(*words, *machine, "--checkpoint", of.path)
            except UserError as error:
                note(f"{title} is left out: {error}")
                texts = [f"Left out: {error}."]
            sections.append(charts.section(title, question, texts, figure, rows))
    print(f"\nreport  {quoted(write_report(folder / 'report.pdf', sections))}")


def make_parser() -> Parser:
    parser = Parser(description=__doc__, **PLAIN)
    studies = parser.add_subparsers(dest="study", required=True, metavar="STUDY")
    for name, one in STUDIES.items():
        about = "\n\n".join(textwrap.fill(text, 110) for text in one.about)
        sub = studies.add_parser(name, help=one.about[0], description=about, **PLAIN)
        if one.most:
            sub.add_argument("runs", nargs="*", metavar="RUN", help="run's directory, or published weights")
            sub.add_argument("--checkpoint", action="append", metavar="RUN", help="the same, as a flag")
        add_settings(sub, {"settings": one.settings})
    return parser


def main() -> None:
    typed = vars(make_parser().parse_args())  # what was typed, and no more
    one = STUDIES[name := typed.pop("study")]
    paths = [*typed.pop("runs", []), *typed.pop("checkpoint", [])]
    if not one.least <= len(paths) <= one.most:
        wanted = {(1, 1): "one run", (0, 1): "one run at most", (1, math.inf): "at least one run"}
        takes = wanted.get((one.least, one.most), "two runs at most")
        raise UserError(f"{name} takes {takes}, as runs/ddpm_digits, and {len(paths)} were given")
    for one_way, other in (("image", "images"), ("levels", "snr")):
        if typed.keys() >= {one_way, other}:
            raise UserError(f"{flag(other)} means nothing here: leave it out beside {flag(one_way)}")
    for key in sorted(typed.keys() & {"dataset", "image_size", "schedule"} if paths else ()):
        raise UserError(f"{flag(key)} comes from the run: leave it out")
    chosen = one.settings(**typed)
    device, load = get_device(chosen.device), ddpm.load_network
    models = [Model(path, *load(path, device, one.kinds), device, runs.run_folder(path)) for path in paths]
    runs.check_folder(Path(chosen.out) if chosen.out else models[0].folder if models else Result.folder)
    result = one.run(chosen, *models)
    if result and (missing := publish(name, result, chosen.out)[1]):
        raise missing


if __name__ == "__main__":
    run_main(main)
