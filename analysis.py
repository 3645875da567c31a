"""Studies of diffusion models: one command, one figure, one table each.

    python analysis.py schedules                     these three need no network
    python analysis.py forward --image face.jpg --image-size 256
    python analysis.py weights
    python analysis.py noise runs/ddpm_digits        what a model gets out of x_t, at each noise level
    python analysis.py evaluate runs/ddpm_digits runs/ddpm_conditional_digits \\
        --classifier runs/classifier_digits          the quality of samples, in figures
    python analysis.py report runs/ddpm_digits       all of them, as a PDF

Each writes STUDY.png, its table as STUDY.csv and the numbers behind its charts as STUDY_curves.csv, into the
run's folder (or --out), and never over what is there. Read it with P2 (Choi et al. 2022,
https://arxiv.org/abs/2204.00227) and Berkeley CS180, project 5.
"""

import argparse
import csv
import io
import math
import shlex
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur
from tqdm import tqdm

import ddpm
import ddpm_conditional
import utils
from ddpm import SAMPLERS, Denoiser, Diffusion, Generators, at, clip_x_0, numbered_noise, psnr, randn_like
from modules import PointMLP
from utils import SCHEDULES, UserError, diversity, real, saturation, to_x_0, whole

# ------------------------------------------------------------------------------------------------------------
# What a study gives: a figure made of grids and charts, and a table.

Row = dict[str, object]  # of a table, by column


@dataclass
class Panel:
    """Axes of a chart, with curves {name: (x, y)} as lines or points, or {name: (x, y, u, v)} as arrows."""

    title: str
    x_label: str
    y_label: str
    curves: dict[str, tuple[Sequence[float], ...]]
    log: str = ""  # which axes are logarithmic: "", "x", "y" or "xy"
    kind: str = "line"  # or "points", "arrows"
    stages: bool = False  # x is SNR: shade the three stages of P2, and let noise grow to the right


@dataclass
class Chart:
    """Panels side by side; those without curves are left out."""

    panels: list[Panel]
    columns: int = 3


@dataclass
class Result:
    """What a study found."""

    figure: list[Image.Image | Chart]  # from top to bottom
    rows: list[Row]
    folder: Path = Path("runs/analysis")  # where it is kept unless --out says otherwise
    notes: Sequence[str] = ()  # how the table is to be read, told below it


# The stages of Choi et al. 2022: below an SNR of 1e-2 coarse things are made, above 1 noise is cleaned up.
COARSE, CLEAN_UP = 1e-2, 1.0
STAGES = {"coarse": (0.0, COARSE), "content": (COARSE, CLEAN_UP), "clean-up": (CLEAN_UP, math.inf)}


def curves(rows: Sequence[Row], by: str, x: str, y: str) -> dict[str, tuple[Sequence[float], ...]]:
    """Of a table: y over x, a curve for each value in the column `by`; rows that lack one are left out."""
    found: dict[str, list] = {}
    for row in rows:
        if row.get(x) is not None and row.get(y) is not None:
            found.setdefault(str(row[by]), []).append((float(row[x]), float(row[y])))
    return {name: tuple(zip(*points, strict=True)) for name, points in found.items()}


def draw_chart(chart: Chart) -> Image.Image:
    """The chart as a picture; UserError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("charts were left out, for they need matplotlib: pip install matplotlib") from None
    panels = [panel for panel in chart.panels if panel.curves]
    columns = min(chart.columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.4 * columns, 3.5 * rows), layout="constrained", dpi=100)
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for ax, panel in zip(axes, [*panels, *[None] * (rows * columns - len(panels))], strict=True):
        draw_panel(ax, panel) if panel else ax.set_axis_off()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")


def draw_panel(ax, panel: Panel) -> None:
    """Draw a panel on matplotlib's axes."""
    for name, columns in panel.curves.items():
        if panel.stages:  # a cosine's last steps would squeeze all the others: they are left to the table
            columns = (
                tuple(zip(*(p for p in zip(*columns, strict=True) if p[0] > 1e-4), strict=True)) or columns
            )
        if panel.kind == "arrows":
            ax.quiver(*columns, angles="xy", width=0.004, color="gray")
        elif panel.kind == "points":
            ax.plot(*columns, ".", markersize=1.5, label=name)
        else:
            ax.plot(*columns, marker="." if len(columns[0]) <= 25 else "", linewidth=1.3, label=name)
    if "x" in panel.log:
        ax.set_xscale("log")
    if "y" in panel.log:
        ax.set_yscale("log")
    ax.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
    ax.grid(alpha=0.3)
    if panel.stages:
        low, high = sorted(ax.get_xlim())
        for (name, (start, end)), shade in zip(STAGES.items(), ("0.78", "0.88", "0.97"), strict=True):
            left, right = max(low, start), min(high, end)
            if left < right:
                ax.axvspan(left, right, color=shade, zorder=-1, linewidth=0)
                place = dict(transform=ax.get_xaxis_transform(), ha="center", va="top", fontsize=7)
                ax.text((left * right) ** 0.5, 0.98, name, **place)
        ax.set_xlim(high, low)
    if len(panel.curves) > 1:
        ax.legend(fontsize=7, markerscale=4 if panel.kind == "points" else 1)


def chart_numbers(figure: Sequence[Image.Image | Chart]) -> list[Row]:
    """The numbers behind the charts, a row a point."""
    panels = [panel for part in figure if isinstance(part, Chart) for panel in part.panels]
    return [
        {"chart": panel.title, "curve": name, **dict(zip("xyuv", map(float, point), strict=False))}
        for panel in panels
        for name, columns in panel.curves.items()
        for point in zip(*columns, strict=True)
    ]


def join(pictures: Sequence[Image.Image], across: bool = False, gap: int = 8) -> Image.Image:
    """Pictures on white, below each other or `across`, side by side."""
    sizes = [(p.width, p.height) if across else (p.height, p.width) for p in pictures]
    along, wide = sum(size + gap for size, _ in sizes) - gap, max(size for _, size in sizes)
    sheet, place = Image.new("RGB", (along, wide) if across else (wide, along), "white"), 0
    for picture, (size, _) in zip(pictures, sizes, strict=True):
        sheet.paste(picture, (place, 0) if across else (0, place))
        place += size + gap
    return sheet


def pairs(pictures: Sequence[Image.Image]) -> list[Image.Image]:
    """Pictures two by two, side by side."""
    return [join(pictures[i : i + 2], across=True) for i in range(0, len(pictures), 2)]


def format_number(value: object, digits: int = 4) -> str:
    """A number as a table shows it, None as nothing, other things as they are."""
    if isinstance(value, (float, Tensor, np.floating)):
        return f"{float(value):.{digits}g}"
    return "" if value is None else str(value)


def table(rows: Sequence[Row], digits: int = 4) -> list[list[str]]:
    """A table's cells, its header first: every column that some row has."""
    header = list(dict.fromkeys(column for row in rows for column in row))
    return [header, *([format_number(row.get(column), digits) for column in header] for row in rows)]


def aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    """Lines of text with the cells in columns."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in cells]


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(table(rows, digits=6))
    with utils.replacing(path) as file:
        file.write(text.getvalue().encode())


def publish(study: str, result: Result, out: str | None) -> tuple[Image.Image | None, UserError | None]:
    """Write a study's figure and tables, print its table, name the files.

    -> the figure, and the error to end with where charts had to be left out of it.
    """
    folder = Path(out) if out else result.folder
    folder.mkdir(parents=True, exist_ok=True)
    name, number = study, 2
    while any((folder / f"{name}{end}").exists() for end in (".png", ".csv", "_curves.csv")):
        name, number = f"{study}_{number}", number + 1  # what an earlier study wrote stays

    files = {"table": folder / f"{name}.csv"}
    write_csv(files["table"], result.rows)
    if numbers := chart_numbers(result.figure):
        files["curves"] = folder / f"{name}_curves.csv"
        write_csv(files["curves"], numbers)
    figure, pictures, missing = None, [], None
    for part in result.figure:
        try:
            pictures.append(draw_chart(part) if isinstance(part, Chart) else part)
        except UserError as error:
            missing = error
    if pictures:
        figure = join(pictures)
        files["figure"] = utils.save_picture(figure, folder / f"{name}.png")
    print("\n".join([*aligned(table(result.rows)), *result.notes]))
    for kind in sorted(files):
        print(f"{kind:7s} {shlex.quote(str(files[kind]))}")
    return figure, missing


# ------------------------------------------------------------------------------------------------------------
# Measures. Images are (B, C, H, W) in [-1, 1].


def ssim(x: Tensor, x_0: Tensor) -> Tensor:
    """Structural similarity of each pair of images, (B, C, H, W) twice -> (B,) (Wang et al. 2004, eq. 13).

    Gaussian window of sigma 1.5, 11 pixels wide or what fits the image; 1 for equal images.
    """
    x, x_0 = ((z.double() + 1) / 2 for z in (x, x_0))  # in [0, 1], so L = 1 in c_1 and c_2
    width = min(11, (min(x.shape[-2:]) - 1) // 2 * 2 + 1)
    blur = partial(gaussian_blur, kernel_size=[width, width], sigma=[1.5, 1.5])
    mean_x, mean_0 = blur(x), blur(x_0)
    var_x, var_0 = blur(x * x) - mean_x**2, blur(x_0 * x_0) - mean_0**2
    cov = blur(x * x_0) - mean_x * mean_0
    c_1, c_2 = 0.01**2, 0.03**2
    above = (2 * mean_x * mean_0 + c_1) * (2 * cov + c_2)
    below = (mean_x**2 + mean_0**2 + c_1) * (var_x + var_0 + c_2)
    return (above / below).mean((1, 2, 3))


BANDS = {"low": (0.0, 0.125), "middle": (0.125, 0.25), "high": (0.25, 1.0)}  # cycles per pixel


def in_bands(spectrum: Tensor) -> Tensor:
    """Sums of a spectrum (B, C, H, W) over channels and the frequencies of each band; -> (B, 3)."""
    vertical, horizontal = (torch.fft.fftfreq(n, device=spectrum.device) for n in spectrum.shape[-2:])
    frequency = (vertical[:, None] ** 2 + horizontal**2).sqrt()  # (H, W)
    masks = [(low <= frequency) & (frequency < high) for low, high in BANDS.values()]
    return torch.stack([(spectrum * mask).sum((1, 2, 3)) for mask in masks], dim=1)


def energy_bands(x: Tensor) -> Tensor:
    """The shares of each image's energy in low, middle and high spatial frequencies; (B, C, H, W) -> (B, 3).

    The three sum to one.
    """
    energy = in_bands(torch.fft.fft2(x.double()).abs().square())
    return energy / energy.sum(1, keepdim=True)


def kept_bands(x: Tensor, x_0: Tensor) -> Tensor:
    """The share of x_0's energy in each band that x has too, over all images: <x, x_0> / <x_0, x_0>; -> (3,).

    1 for x = x_0, about 0 for images that have nothing to do with it; nan where x_0 has nothing in a band.
    For the mean of all x_0 that fit some x_t it is the share of the energy that x_t tells.
    """
    spectrum, of_x_0 = (torch.fft.fft2(z.double()) for z in (x, x_0))
    product, energy = (in_bands(z).sum(0) for z in ((spectrum * of_x_0.conj()).real, of_x_0.abs().square()))
    return torch.where(energy > 1e-9 * energy.sum(), product / energy, math.nan)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|m_a - m_b|^2 + Tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of features (n, D) and (m, D) (Heusel et al. 2017).

    The squared Wasserstein distance of Gaussians with their means m and covariances S. UserError where there
    are too few for covariances of full rank.
    """
    if min(len(a), len(b)) <= a.shape[1]:
        raise UserError(
            f"a Frechet distance in {a.shape[1]} features takes at least {a.shape[1] + 1} images on either "
            f"side, and there are {min(len(a), len(b))}: ask for more"
        )
    a, b = a.double(), b.double()
    S_a, S_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(S_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # S_a^(1/2)
    # The eigenvalues of S_a S_b are those of the symmetric S_a^(1/2) S_b S_a^(1/2).
    cross = torch.linalg.eigvalsh(root @ S_b @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + S_a.trace() + S_b.trace() - 2 * cross
    return max(0.0, distance.item())


def covered(points: Tensor, cloud: Tensor, k: int = 3) -> float:
    """The share of points (n, D) that lie within some point of a cloud (m, D)'s distance to its k-th nearest.

    Of samples, by the data: precision; of data, by the samples: recall (Kynkäänniemi et al. 2019, eq. 1, 2).
    """
    if len(cloud) <= k:
        raise UserError(f"precision and recall take at least {k + 1} images on either side, not {len(cloud)}")
    points, cloud = points.double(), cloud.double()  # cdist rounds as coarsely as the squares of its values
    radius = torch.cdist(cloud, cloud).topk(k + 1, largest=False).values[:, k]  # the 0-th is the point itself
    return (torch.cdist(points, cloud) <= radius).any(1).double().mean().item()


def quality(features: Tensor, real: Tensor) -> Row:
    """How features (n, D) of samples compare with those of real images (m, D), m >= n.

    Precision and recall are taken between sets of one size, as in their paper.
    """
    precision, recall = covered(features, real[: len(features)]), covered(real[: len(features)], features)
    return {"frechet": frechet_distance(features, real), "precision": precision, "recall": recall}


def nearest_images(x: Tensor, cloud: Tensor, skip: int = 0) -> tuple[Tensor, Tensor]:
    """Distance of x (n, C, H, W) to the nearest of uint8 images (N, C, H, W), and its number; (n,) each.

    Rms per pixel of [0, 1]. `skip` = 1 where x is part of the cloud, and each image is its own nearest.
    """
    values, index = torch.full((len(x), 0), 0.0), torch.zeros((len(x), 0), dtype=torch.long)
    for start in range(0, len(cloud), 4096):  # so that no more of it is made float at once
        part = to_x_0(cloud[start : start + 4096])
        distance = torch.cdist(x.flatten(1) / 2, part.flatten(1) / 2) / x[0].numel() ** 0.5
        numbers = torch.arange(start, start + len(part)).expand(len(x), -1)
        values, index = torch.cat([values, distance], 1), torch.cat([index, numbers], 1)
        values, best = values.topk(min(1 + skip, values.shape[1]), largest=False)
        index = index.gather(1, best)
    return values[:, -1], index[:, -1]


# ------------------------------------------------------------------------------------------------------------
# What is studied: trained models, real images, samples.


@dataclass
class Model:
    """A trained network with its averaged weights, and what its checkpoint says of it."""

    path: str
    net: torch.nn.Module
    diffusion: Diffusion
    config: dict
    device: torch.device

    @property
    def folder(self) -> Path:
        return utils.run_folder(self.path)

    @property
    def classes(self) -> int | None:
        """How many labels it can be asked for; None if it can't be asked for labels."""
        return len(self.config["class_names"]) if self.config.get("condition") == "label" else None

    def eps_theta(self) -> Denoiser:
        """The denoiser, its x_0 clipped; a conditional network is told the null condition."""
        return clip_x_0(self.diffusion, self.diffusion.denoiser(self.net))

    def guided(self, y: Tensor, scale: float) -> Denoiser:
        """The same told y (B, ...), under classifier-free guidance; scale 1 is plain conditional."""
        guided = ddpm_conditional.cfg(self.diffusion, self.net, y.to(self.device), scale)
        return clip_x_0(self.diffusion, guided)


def load_model(path: str, device: torch.device, kinds: Sequence[str] = ("ddpm", "ddpm_conditional")) -> Model:
    return Model(path, *ddpm.load_network(path, device, kinds), device)


@dataclass
class Judge:
    """A classifier of --task classifier, asked about images without noise, at t = 1."""

    net: torch.nn.Module
    device: torch.device

    @property
    def dim(self) -> int:
        """D, the number of features."""
        return self.net.head.in_features

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1], or uint8, -> (B, D)."""
        found = []
        for part in x.split(256):
            part = (to_x_0(part) if part.dtype == torch.uint8 else part).to(self.device)
            found.append(self.net.features(part, torch.ones(len(part), dtype=torch.long, device=self.device)))
        return torch.cat(found).float().cpu()

    @torch.no_grad()
    def p(self, x: Tensor) -> Tensor:
        """p(y | x), (B, C, H, W) -> (B, K)."""
        return self.net.head(self.features(x).to(self.device)).softmax(1).cpu()


def load_judge(path: str | None, model: Model) -> Judge | None:
    """The classifier of --classifier, if given; UserError unless it knows the model's data."""
    if path is None:
        return None
    same = ddpm_conditional.SAME_DATA
    return Judge(ddpm_conditional.load_classifier(path, model.config, model.device, same), model.device)


def real_data(args: argparse.Namespace, config: dict) -> utils.Data:
    """The images that a run was trained on; UserError where nobody says which they are."""
    if config["dataset"] is None:
        what = f"{config['name']}: published weights do not say what they were trained on"
        raise UserError(f"{what}; noise, denoise and losses take images with --image")
    choice = {key: config[key] for key in ("image_size", "channels", "limit")}
    root = args.data_root or config["data_root"]
    return utils.get_data(config["dataset"], root, "train", **choice, cache_dir=args.cache_dir)


def labelled_data(args: argparse.Namespace, config: dict) -> utils.Data:
    """The same, with their labels; UserError if they have none."""
    data = real_data(args, config)
    if data.labels is None:
        raise UserError(
            f"the images of {config['dataset']} have no labels here: is it the --data-root of the run?"
        )
    return data


@dataclass
class Reference:
    """Real images to compare samples with: one half of them, and from the other as many as samples."""

    real: Tensor  # (N, C, H, W) uint8, all of them
    features: Tensor  # (N // 2, D), of the first half
    floor: Tensor  # (n, C, H, W), of the second half: what samples as good as real ones would score
    floor_features: Tensor  # (n, D)
    labels: Tensor  # (n,), of the floor


def make_reference(data: utils.Data, judge: Judge, n: int, seed: int) -> Reference:
    """The reference for n samples; UserError where n is too small to measure, or the real images too few."""
    if n <= judge.dim:
        raise UserError(
            f"a Frechet distance in the classifier's {judge.dim} features takes at least {judge.dim + 1} "
            f"samples, not {n}" + (": ask for more --samples" if len(data.images) > 2 * judge.dim + 1 else "")
        )
    order = torch.randperm(len(data.images), generator=utils.seeded_generator(seed))
    if len(order) < 2 * n:
        raise UserError(
            f"{n} samples are compared with half of the real images, and with {n} of the other half, which "
            f"takes {2 * n}, and there are {len(order)}: ask for fewer --samples"
        )
    return split_reference(data, judge, *order.tensor_split([len(order) // 2]), n)


def reference_of_labels(data: utils.Data, judge: Judge, asked: Tensor, seed: int) -> Reference:
    """The reference for samples that were asked for labels (n,): real images of these, in like proportion.

    Of a label that the second half has too few of, the floor takes what there is.
    """
    order = torch.randperm(len(data.images), generator=utils.seeded_generator(seed))
    order = order[torch.isin(data.labels[order], asked)]
    first, second = order.tensor_split([len(order) // 2])
    if len(order) < 4:
        raise UserError(
            f"of the labels asked for there are {len(order)} real images: ask for others, or more"
        )
    second = [second[data.labels[second] == k][: (asked == k).sum()] for k in asked.unique()]
    return split_reference(data, judge, first, torch.cat(second), len(asked))


def split_reference(data: utils.Data, judge: Judge, first: Tensor, second: Tensor, n: int) -> Reference:
    floor = to_x_0(data.images[second[:n]])
    real, features = data.images[torch.cat([first, second])], judge.features(data.images[first])
    return Reference(real, features, floor, judge.features(floor), data.labels[second[:n]])


def samples_for(judge: Judge, asked: int | None, data: utils.Data) -> int:
    """How many samples to measure quality on: --samples, or enough for the features, if the data are."""
    return asked or min(max(128, judge.dim * 5 // 4), len(data.images) // 2)


def chosen_images(args: argparse.Namespace, count: int, config: dict | None = None) -> Tensor:
    """x_0 (B, C, H, W): the user's --image files, or `count` of the data set's.

    `config` is that of the run that they are for; without one --dataset and --image-size say what to take.
    """
    given = {dest for dest in ("dataset", "image_size") if getattr(args, dest, None)}
    if config and given:
        raise UserError(f"{utils.flag(given.pop())} comes from the run: leave it out")
    if getattr(args, "image", None):
        if getattr(args, "images", None):
            raise UserError("--images counts images of the data set: leave it out beside --image")
        known = config or {"image_size": args.image_size or 64, "channels": 3}
        return utils.read_images(args.image, known["image_size"], known["channels"])
    if config:
        images = real_data(args, config).images
    else:
        root, name = args.data_root or "data", args.dataset or "digits"
        images = utils.get_data(name, root, "train", args.image_size, cache_dir=args.cache_dir).images
    order = torch.randperm(len(images), generator=utils.seeded_generator(args.seed))
    return to_x_0(images[order[:count]])


def chosen_levels(levels: Sequence[int] | None, default: Sequence[int], T: int) -> list[int]:
    """Times t, falling: --levels, or some that are quoted for T = 1000; UserError for one above T."""
    chosen = sorted(set(levels or (at(t, T) for t in default)), reverse=True)
    if chosen[0] > T:
        raise UserError(f"--levels: t runs from 1 to {T}")
    return chosen


def snr_label(diffusion: Diffusion, t: int) -> str:
    return f"t = {t}, SNR {diffusion.snr[t].item():.2g}"


def in_batches(eps_theta: Denoiser, batch_size: int, bar: tqdm) -> Denoiser:
    """The denoiser, run on so many images at once, and counted on a progress bar."""

    def eps_theta_in_batches(x_t: Tensor, t: Tensor) -> Tensor:
        t, parts = torch.as_tensor(t, device=x_t.device).expand(len(x_t)), []
        for x, times in zip(x_t.split(batch_size), t.split(batch_size), strict=True):
            parts.append(eps_theta(x, times))
            bar.update(len(x))
        return torch.cat(parts)

    return eps_theta_in_batches


@torch.no_grad()
def draw(
    model: Model,
    numbers: range,
    sampler: Callable[..., Tensor],
    steps: int,
    args: argparse.Namespace,
    denoiser_of: Callable[[Tensor], Denoiser] | None = None,
    diffusion: Diffusion | None = None,
    per_step: int = 1,
) -> Tensor:
    """Samples x_0 (B, C, H, W) of those numbers on the CPU, each from noise of its own.

    `denoiser_of(numbers)` makes the denoiser of a batch, the model's own if not given; `diffusion` may be
    another process than the model's; the sampler calls the denoiser `per_step` times a step.
    """
    diffusion, done = diffusion or model.diffusion, []
    shape = (model.config["channels"], model.config["image_size"], model.config["image_size"])
    name = getattr(sampler, "func", sampler).__name__  # of a partial, the function's
    with utils.progress(f"{name}, {steps} steps", len(numbers) * steps * per_step) as bar:
        for batch in torch.tensor(numbers).split(args.batch_size):
            x_T, generators = numbered_noise(batch.tolist(), shape, args.seed)
            eps_theta = denoiser_of(batch) if denoiser_of else model.eps_theta()
            counted = in_batches(eps_theta, args.batch_size, bar)
            x = sampler(diffusion, counted, x_T.to(model.device), diffusion.timesteps(steps), generators)
            done.append(x.clamp(-1, 1).cpu())
    return torch.cat(done)


# ------------------------------------------------------------------------------------------------------------
# 1. The schedules


def schedules(args: argparse.Namespace) -> Result:
    """betas, alpha_bar and SNR of every schedule over t, and where its landmarks lie."""
    # Start
    T, rows, found = args.noise_steps, [], {"beta": {}, "alpha_bar": {}, "SNR": {}}
    t = range(1, T + 1)
    for name in args.schedules:
        diffusion = Diffusion(T, name)
        alpha_bar, snr = diffusion.alpha_bar[1:], diffusion.snr[1:]  # (T,)
        beta = 1 - alpha_bar / diffusion.alpha_bar[:-1]  # DDPM, eq. 4, backwards
        for quantity, values in (("beta", beta), ("alpha_bar", alpha_bar), ("SNR", snr)):
            found[quantity][name] = (t, values.tolist())
        half_gone = (alpha_bar.sqrt() > 0.5).sum().item() + 1  # of a standardised x_0, corr(x_t, x_0)
        rows.append(
            {
                "schedule": name,
                "steps with SNR > 1": (snr > CLEAN_UP).sum().item(),
                "steps with SNR > 0.01": (snr > COARSE).sum().item(),
                "alpha_bar_T": alpha_bar[-1],
                "half the structure gone at t": half_gone if half_gone <= T else None,
            }
        )
    # End
    panels = [Panel(name, "t", name, c, "" if name == "alpha_bar" else "y") for name, c in found.items()]
    notes = [
        "structure is half gone where the correlation of x_t with x_0, sqrt(alpha_bar_t), is 0.5 or less"
    ]
    return Result([Chart(panels)], rows, notes=notes)


# ------------------------------------------------------------------------------------------------------------
# 2. The forward process


def standardised(x: Tensor) -> Tensor:
    """Mean 0 and variance 1 in each coordinate of points (N, D, 1, 1), or over all values of images."""
    dims = 0 if x.shape[-1] == 1 else (0, 1, 2, 3)
    return (x - x.mean(dims, keepdim=True)) / x.std(dims, keepdim=True, correction=0)


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


def cloud_picture(points: Tensor, size: int = 72, reach: float = 3.5) -> Tensor:
    """Points (N, 2, 1, 1) as black dots on white, the plane from -reach to reach; -> (1, 1, size, size)."""
    x, y = points.flatten(1).T.numpy()
    counts, _, _ = np.histogram2d(-y, x, bins=size, range=[(-reach, reach)] * 2)  # rows from the top down
    return 1 - 2 * torch.from_numpy(counts).clamp(max=1).float()[None, None]


def neighbours_kept(x_t: Tensor, x_0: Tensor, k: int = 10) -> float:
    """The share of each point's k nearest neighbours in x_0 that are among them in x_t; (N, 2, 1, 1) each."""
    x_0, x_t = x_0.double().flatten(1), x_t.double().flatten(1)
    before, after = (torch.cdist(x, x).topk(k + 1, largest=False).indices[:, 1:] for x in (x_0, x_t))
    return (before[:, :, None] == after[:, None, :]).any(2).double().mean().item()


def correlation(x_t: Tensor, x_0: Tensor) -> float:
    """Pearson's correlation of the values of x_t with those of x_0, mean over images (B, C, H, W)."""
    a, b = (x.flatten(1) - x.flatten(1).mean(1, keepdim=True) for x in (x_t, x_0))
    return ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).mean().item()


def half_life(t: Sequence[int], values: Sequence[float]) -> float:
    """When values that fall from 1 at t = 0 reach one half, linear between times; inf if never."""
    for (t_0, high), (t_1, low) in pairwise([(0, 1.0), *zip(t, values, strict=True)]):
        if low <= 0.5:
            return t_0 + (t_1 - t_0) * (high - 0.5) / (high - low)
    return math.inf


def forward(args: argparse.Namespace) -> Result:
    """Points and an image under the forward process of every schedule: how long structure survives."""
    T, generator = args.noise_steps, partial(utils.seeded_generator, args.seed)
    x_0 = chosen_images(args, 1)[:1]
    if x_0.std((2, 3)).max() == 0:
        raise UserError("the image is of a single colour: there is no structure to follow")
    clouds = {name: cloud(500, generator(0)) for name, cloud in CLOUDS.items()}
    many = standardised(x_0.repeat(math.ceil(50000 / x_0.numel()), 1, 1, 1))  # enough to measure a variance
    times = sorted({max(1, round(T * k / 40)) for k in range(1, 41)})  # where structure is measured
    shown = sorted({max(1, round(T * share)) for share in (0.02, 0.1, 0.25, 0.5, 0.75, 1)})
    t_parts = at(args.at, T)
    pictures: dict[str, list[Tensor]] = {name: [] for name in (*clouds, "an image", "parts")}
    found: dict[str, dict] = {"points": {}, "image": {}, "variance": {}}
    rows = []
    for name in args.schedules:
        # Start
        diffusion = Diffusion(T, name)

        def noised(x: Tensor, t: int, seed: int = 1, diffusion: Diffusion = diffusion) -> Tensor:
            return diffusion.noise_images(x, torch.full((len(x),), t), generator(seed))[0]

        # (a) points, and how many of their neighbours stay
        for cloud, x in clouds.items():
            pictures[cloud] += [cloud_picture(x_t) for x_t in (x, *(noised(x, t) for t in shown))]
        kept = [np.mean([neighbours_kept(noised(x, t), x) for x in clouds.values()]) for t in times]
        # (b) the image, and for one t its parts: DDPM, eq. 4: x_t = sqrt(ab) x_0 + sqrt(1 - ab) eps
        pictures["an image"] += [x_0, *(noised(x_0, t) for t in shown)]
        signal = diffusion.scales(torch.tensor([t_parts]), x_0)[0] * x_0
        x_t = noised(x_0, t_parts)
        pictures["parts"] += [signal, x_t - signal, x_t]
        alike = [correlation(noised(x_0, t), x_0) for t in times]
        # (c) the variance at every t, of standardised x_0: 1 if the process preserves it
        variance = [noised(many, t, seed=1 + t).var().item() for t in range(1, T + 1)]
        # End
        found["points"][name], found["image"][name] = (times, kept), (times, alike)
        found["variance"][name] = (range(1, T + 1), variance)
        rows.append(
            {
                "schedule": name,
                "points half-life": half_life(times, kept),
                "image half-life": half_life(times, alike),
                "mean neighbours kept": np.mean(kept),
                "mean correlation": np.mean(alike),
                "variance, largest error": max(abs(v - 1) for v in variance),
            }
        )
    for what, tie in (("points", "mean neighbours kept"), ("image", "mean correlation")):
        longest_first = sorted(rows, key=lambda row: (-row[f"{what} half-life"], -row[tie]))
        for rank, row in enumerate(longest_first, start=1):
            row[f"rank by {what}"] = rank

    def grid(what: str, caption: str, heads: list[str]) -> Image.Image:
        return utils.make_grid(torch.cat(pictures[what]), caption, len(heads), args.schedules, heads)

    heads = ["x_0", *(f"t = {t}" for t in shown)]
    grids = [grid(what, f"{what}, by schedule and time", heads) for what in (*clouds, "an image")]
    grids.append(grid("parts", f"parts of x_t, t = {t_parts}", ["signal", "noise", "sum: x_t"]))
    chart = [
        Panel("points: nearest neighbours kept", "t", "share of 10", found["points"]),
        Panel("image: correlation with x_0", "t", "correlation", found["image"]),
        Panel("variance of x_t, x_0 standardised", "t", "variance", found["variance"]),
    ]
    notes = [
        "half-life: the t at which the measure has fallen to one half. Points: the share of a point's 10",
        f"nearest in x_0 that still are, mean of {' and '.join(clouds)}; image: correlation with x_0",
    ]
    return Result([*pairs(grids), Chart(chart)], rows, notes=notes)


# ------------------------------------------------------------------------------------------------------------
# 3. Weights


def ho_weights(diffusion: Diffusion) -> Tensor:
    """lambda_t = (1 - beta_t) (1 - alpha_bar_t) / beta_t, what L_simple gives each term of the VLB; (T,).

    DDPM, eq. 12, with sigma_t^2 = beta_t, but for its factor 2 (Choi et al. 2022).
    """
    alpha_bar = diffusion.alpha_bar
    beta = 1 - alpha_bar[1:] / alpha_bar[:-1]
    return (1 - beta) * (1 - alpha_bar[1:]) / beta


def continuous_weights(diffusion: Diffusion) -> Tensor:
    """-SNR(t) / SNR'(t), the same for infinitely many steps (Kingma et al. 2021); (T,).

    SNR'(t) by its difference from t - 1, which is infinite at t = 1: there the weight is 0.
    """
    return diffusion.snr[1:] / (diffusion.snr[:-1] - diffusion.snr[1:])


def weights(args: argparse.Namespace) -> Result:
    """Each weighting as a weight of the VLB's terms and of the error of eps, over SNR and by stage."""
    # Start
    panels, rows = [], []
    for schedule in args.schedules:
        diffusion = Diffusion(args.noise_steps, schedule)
        snr, ho = diffusion.snr[1:], ho_weights(diffusion)  # (T,)
        # lambda' = lambda / (k + SNR)^gamma (P2, Choi et al. 2022); gamma = 0 is L_simple
        of_vlb = {f"P2, gamma {gamma:g}": ho * ddpm.p2(snr, gamma, args.k) for gamma in (0.0, 0.5, 1.0)}
        of_vlb = {"VLB": torch.ones_like(snr), **of_vlb}
        # the same as w(snr), the weight of the squared error of eps: that of the VLB is 1 / lambda
        of_eps = {name: weight / ho for name, weight in of_vlb.items()}
        of_eps |= {"min-SNR": ddpm.min_snr(snr), "MSE of x_0": ddpm.mse_x_0(snr), "MSE of v": ddpm.mse_v(snr)}
        for title, weightings in (
            ("lambda", {"Ho et al.": ho, "continuous, -SNR / SNR'": continuous_weights(diffusion)}),
            ("weight of the VLB's terms", of_vlb),
            ("the same, normalised", {name: weight / weight.sum() for name, weight in of_vlb.items()}),
            ("weight of the error of eps", of_eps),
        ):
            drawn = {name: weight > 0 for name, weight in weightings.items()}
            lines = {
                name: (snr[drawn[name]].tolist(), w[drawn[name]].tolist()) for name, w in weightings.items()
            }
            panels.append(Panel(f"{schedule}: {title}", "SNR", "weight", lines, "xy", stages=True))
        for kind, weightings in (("VLB's terms", of_vlb), ("error of eps", of_eps)):
            for name, weight in weightings.items():
                row: Row = {"schedule": schedule, "weight of": kind, "weighting": name}
                for stage, (low, high) in STAGES.items():
                    row[f"share of {stage}"] = weight[(low <= snr) & (snr < high)].sum() / weight.sum()
                rows.append(row)
    # End
    return Result([Chart(panels, 4)], rows)


# ------------------------------------------------------------------------------------------------------------
# 4. What a model gets out of x_t: the P2 comparison

ONE_STEP = {
    "ddpm",
    "ddim",
}  # samplers that look at x_t alone: their chains may be joined by others on the way


def chains(
    diffusion: Diffusion,
    eps_theta: Denoiser,
    sampler: str,
    x_t: Tensor,
    levels: Sequence[int],
    steps: int,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """x_0 of every x_t[l], noisy as levels[l], by a sampler that makes `steps` from T; (L, B, C, H, W) both.

    `levels` fall. One batch goes down them, and at each those images join it that start there. A multistep
    sampler takes each level by itself, for its history must not be cut. `generators`: one an image, L x B.
    """
    grid = sorted({*diffusion.timesteps(steps), *levels}, reverse=True)
    L, B = x_t.shape[:2]
    done = []
    for group in [range(L)] if sampler in ONE_STEP else [[i] for i in range(L)]:
        x, of_x = x_t[0, :0], []
        for i, end in pairwise([*group, None]):
            x, of_x = torch.cat([x, x_t[i]]), [*of_x, *generators[i * B : (i + 1) * B]]
            to = 0 if end is None else levels[end]
            x = SAMPLERS[sampler](diffusion, eps_theta, x, [t for t in grid if to <= t <= levels[i]], of_x)
        done.append(x.unflatten(0, (len(group), B)))
    return torch.cat(done)


def compare(x: Tensor, x_0: Tensor, mean: Tensor | float) -> Row:
    """Measures of x beside x_0, (B, C, H, W) both.

    The energy in bands is counted from a mean image (C, H, W), so that what all images share is no credit.
    """
    kept = [share if math.isfinite(share) else None for share in kept_bands(x - mean, x_0 - mean).tolist()]
    return {
        "mse": ((x - x_0) / 2).square().mean().item(),
        "psnr": psnr(x, x_0).mean().item(),
        "ssim": ssim(x, x_0).mean().item(),
        **{f"{band} kept": share for band, share in zip(BANDS, kept, strict=True)},
    }


def two_noisings(diffusion: Diffusion, x_0: Tensor, seed: int, judge: Judge | None = None) -> list[Row]:
    """Rms distance of two noisings of one image, and of noisings of two images, at forty levels.

    P2, Choi et al. 2022, figure 2. Per pixel and squared they are 2 (1 - ab), and that plus ab |x - x'|^2;
    with a judge also in its features, as the paper's distance is a perceptual one.
    """
    rows = []
    for t in sorted({max(1, round(diffusion.T * k / 40)) for k in range(1, 41)}):
        times = torch.full((len(x_0),), t)
        a, b = (diffusion.noise_images(x_0, times, utils.seeded_generator(seed, t, i))[0] for i in (0, 1))
        for what, other in (("one image", b), ("two images", b.roll(1, 0))):
            row: Row = {"of": what, "snr": diffusion.snr[t], "pixels": (a - other).square().mean().sqrt()}
            if judge:
                row["features"] = (judge.features(a) - judge.features(other)).square().mean().sqrt()
            rows.append(row)
    return rows


@torch.no_grad()
def noise(args: argparse.Namespace) -> Result:
    """What a model gets out of x_t, at each noise level: noise images, reconstruct, compare (P2)."""
    # Start
    model = load_model(args.run, args.device)
    diffusion, judge = model.diffusion, load_judge(args.classifier, model)
    ddpm_conditional.without_condition(model.path, model.config)
    x_0 = chosen_images(args, args.images or 16, model.config)  # (B, C, H, W)
    named = judge and judge.p(x_0).argmax(1)
    mean = 0.0 if args.image or len(x_0) == 1 else x_0.mean(0)  # what all of them share; else mid-gray
    levels = chosen_levels(args.levels, (50, 150, 300, 450, 600, 750, 900, 1000), diffusion.T)
    L, B, steps = len(levels), len(x_0), min(args.sample_steps, diffusion.T)
    draws = {sampler: args.draws if sampler == "ddpm" else 1 for sampler in args.samplers}
    stops = [*diffusion.timesteps(steps), *levels]
    per_image = sum(len({t for t in stops if 0 < t <= level}) for level in levels)

    # one x_t for each image and level, the same for every reconstruction
    own = [utils.seeded_generator(args.seed, level, i) for level in levels for i in range(B)]
    t = torch.tensor(levels).repeat_interleave(B)  # (L B,)
    x_t = diffusion.noise_images(x_0.repeat(L, 1, 1, 1), t, own)[0].to(model.device)

    with utils.progress("denoising", L * B + sum(draws.values()) * per_image * B) as bar:
        eps_theta = in_batches(model.eps_theta(), args.batch_size, bar)
        # one step: the mean of all x_0 that x_t may come from
        t = t.to(model.device)
        one_step, _ = diffusion.split(eps_theta(x_t, t), x_t, t, "eps")
        found = {"one-step x_0": one_step.cpu().unflatten(0, (L, 1, B))}  # each (L, draws, B, C, H, W)
        # chains: deterministic ones, and ddpm's several times from the same x_t
        for sampler, K in draws.items():
            start = x_t.unflatten(0, (L, B)).repeat(1, K, 1, 1, 1)  # (L, K B, C, H, W)
            seeds = [(level, i, 1 + k) for level in levels for k in range(K) for i in range(B)]
            generators = [utils.seeded_generator(args.seed, *seed) for seed in seeds]
            x = chains(diffusion, eps_theta, sampler, start, levels, steps, generators)
            found[f"chain, {sampler}"] = x.clamp(-1, 1).cpu().unflatten(1, (K, B))

    rows = []
    for name, x in found.items():
        for level, several in reversed(list(zip(levels, x, strict=True))):  # several: (K, B, C, H, W)
            each = [compare(draw, x_0, mean) for draw in several]
            row: Row = {"reconstruction": name, "t": level, "snr": diffusion.snr[level]}
            row |= {key: None if each[0][key] is None else np.mean([m[key] for m in each]) for key in each[0]}
            if judge:
                p = judge.p(several.flatten(0, 1))
                row["classifier agrees"] = (p.argmax(1) == named.repeat(len(several))).double().mean().item()
            if len(several) > 1:  # what the draws share is what the model got out of x_t
                row["spread of draws"] = several.std(0).square().mean().sqrt().item() / 2
                row["mse of their mean"] = ((several.mean(0) - x_0) / 2).square().mean().item()
            rows.append(row)
    # End
    shown = {"x_t": x_t.cpu().unflatten(0, (L, 1, B)), **found}
    far = two_noisings(diffusion, x_0, args.seed, judge) if B > 1 else []
    energy = [
        f"{band} {share:.0%}" for band, share in zip(BANDS, energy_bands(x_0 - mean).mean(0), strict=True)
    ]
    zero = "mid-gray" if isinstance(mean, float) else "the images' mean"
    notes = [
        f"over {B} images, {args.draws} draws of each by ddpm; mse, psnr, spread: of images in [0, 1]",
        f"kept: the share of x_0's energy, counted from {zero}: {', '.join(energy)}. low: to 0.125 cycles a",
        "pixel, middle: to 0.25",
    ]
    figure = [*pairs(noise_grids(shown, x_0, diffusion, levels, args.show)), noise_chart(rows, far)]
    return Result(figure, rows, model.folder, notes)


def noise_grids(
    shown: dict[str, Tensor], x_0: Tensor, diffusion: Diffusion, levels: Sequence[int], count: int
) -> list[Image.Image]:
    """A grid for each x (L, K, B, C, H, W): its first draw, and where there are several also their mean."""
    grids, heads = [], [*(snr_label(diffusion, level) for level in reversed(levels)), "x_0"]
    for name, x in shown.items():
        parts = {name: x[:, 0]}
        if x.shape[1] > 1:
            parts = {f"{name}, one draw": x[:, 0], f"{name}, mean of {x.shape[1]} draws": x.mean(1)}
        for caption, part in parts.items():
            cells = torch.stack([*part.flip(0), x_0], dim=1)[:count]  # (count, L + 1, C, H, W)
            labels = [f"image {i + 1}" for i in range(len(cells))]
            grids.append(utils.make_grid(cells.flatten(0, 1), caption, len(heads), labels, heads))
    return grids


def noise_chart(rows: Sequence[Row], far: Sequence[Row]) -> Chart:
    measures = dict.fromkeys(key for row in rows for key in row)
    measures = [key for key in measures if key not in ("reconstruction", "t", "snr", "mse of their mean")]
    panels = [(key, key, curves(rows, "reconstruction", "snr", key)) for key in measures]
    panels.append(("distance of two noisings", "rms per pixel", curves(far, "of", "snr", "pixels")))
    panels.append(("the same to the classifier", "rms per feature", curves(far, "of", "snr", "features")))
    return Chart([Panel(title, "SNR", y, lines, "x", stages=True) for title, y, lines in panels], 4)


# ------------------------------------------------------------------------------------------------------------
# 5. Denoising


def best_blur(x: Tensor, x_0: Tensor) -> tuple[Tensor, int, float]:
    """x (B, C, H, W) under the Gaussian blur that brings it nearest to x_0, its kernel's width and sigma."""
    size, tried = min(x.shape[-2:]), []
    for sigma in np.geomspace(0.3, size / 6, 24).tolist():
        width = min(2 * math.ceil(3 * sigma) + 1, size - 1 + size % 2)  # odd, not wider than the image
        blurred = gaussian_blur(gaussian_blur(x, [width, 1], [sigma, sigma]), [1, width], [sigma, sigma])
        tried.append(((blurred - x_0).square().mean().item(), width, sigma, blurred))
    _, width, sigma, blurred = min(tried, key=lambda one: one[0])
    return blurred, width, sigma


@torch.no_grad()
def denoise(args: argparse.Namespace) -> Result:
    """Blur, one step and many steps of a network, and a denoiser of one noise level (CS180, A 1 and B 1)."""
    models = [load_model(run, args.device, ("ddpm", "ddpm_conditional", "denoiser")) for run in args.runs]
    denoisers = [model for model in models if model.config["kind"] == "denoiser"]
    models = [model for model in models if model.config["kind"] != "denoiser"]
    if len(denoisers) > 1 or len(models) > 1:
        raise UserError("denoise takes a diffusion run, a run of --task denoiser, or one of each")
    first = next(iter(models + denoisers), None)
    same_data(models + denoisers)
    for model in models:
        ddpm_conditional.without_condition(model.path, model.config)
        if args.schedule:
            raise UserError("--schedule comes from the run: leave it out")
    x_0 = chosen_images(args, args.images or 16, first and first.config)
    diffusion = models[0].diffusion if models else Diffusion(1000, args.schedule or "linear")
    # Start
    T, pictures, labels, rows, heads = diffusion.T, [], [], [], []
    strided = ddpm.strided_timesteps(T)  # A 1.4: 990, 960, ..., 0
    for t in reversed(chosen_levels(args.levels, (250, 500, 750), T)):
        generators = [utils.seeded_generator(args.seed, t, i) for i in range(len(x_0))]
        times = torch.full((len(x_0),), t)
        x_t, _ = diffusion.noise_images(x_0, times, generators)  # A 1.1
        noisy = x_t / diffusion.scales(times, x_t)[0]  # x_0 + noise, which a blur can bring back to x_0
        blurred, width, sigma = best_blur(noisy, x_0)  # A 1.2
        ways = {"noisy": noisy, "best blur": blurred}
        for model in models:
            x, times = x_t.to(model.device), times.to(model.device)
            down = [t, *(s for s in strided if s < t)]  # A 1.4: from t on down the strides of 30
            with utils.progress(f"denoising from t = {t}", len(x) * len(down)) as bar:
                eps_theta = in_batches(model.eps_theta(), args.batch_size, bar)
                one_step, _ = diffusion.split(eps_theta(x, times), x, times, "eps")  # A 1.3
                many = ddpm.ddpm(diffusion, eps_theta, x, down, generators)
            ways |= {"one step": one_step.cpu(), "iterative": many.cpu()}
        figures = {name: psnr(x, x_0).mean().item() for name, x in ways.items()}
        for name, figure in figures.items():
            row = {"noise": f"t = {t}", "snr": diffusion.snr[t], "denoised by": name, "psnr": figure}
            rows.append(row | ({"kernel": width, "kernel sigma": sigma} if name == "best blur" else {}))
        heads = ["x_0", *ways]
        pictures += [x[:1] for x in (x_0, *ways.values())]
        told = ", ".join(f"{name} {figure:.1f}" for name, figure in figures.items())
        labels.append(f"{snr_label(diffusion, t)}: PSNR {told}")
    # End
    caption = f"x_t / sqrt(alpha_bar) and what is made of it; PSNR in dB over {len(x_0)} images"
    figure: list = [utils.make_grid(torch.cat(pictures), caption, len(heads), labels, heads)]
    for model in denoisers:
        seen, of_denoiser = single_step(model)
        by_epoch = curves(of_denoiser, "denoised by", "sigma", "psnr")
        title = f"a denoiser trained at sigma {model.config['sigma']:g}"
        figure += [*seen, Chart([Panel(title, "sigma, images in [0, 1]", "PSNR in dB", by_epoch)])]
        rows += of_denoiser
    return Result(figure, rows, first.folder if first else Result.folder)


def single_step(model: Model) -> tuple[list[Image.Image], list[Row]]:
    """What a run of --task denoiser gave after epoch 1 and 5, or else the first and last: grids, PSNRs."""
    logged = model.folder / "psnr.csv"
    if not logged.is_file():
        raise UserError(f"{logged} is missing: the run has had no epoch yet, or was copied without it")
    with open(logged, newline="") as file:
        lines = [{key: float(value) for key, value in line.items()} for line in csv.DictReader(file)]
    if not lines:
        raise UserError(f"{logged} is empty: the run has had no epoch yet")
    epochs = sorted({int(line["epoch"]) for line in lines})
    pictures, rows = [], []
    for epoch in [1, 5] if {1, 5} <= set(epochs) else sorted({epochs[0], epochs[-1]}):
        of_epoch = [line for line in lines if line["epoch"] == epoch]
        for way, key in ((f"one step, epoch {epoch}", "denoised"), ("noisy", "noisy")):
            rows = [row for row in rows if row["denoised by"] != way]  # noisy is the same for every epoch
            for line in of_epoch:
                row = {"noise": f"sigma = {line['sigma']:g}", "sigma": line["sigma"], "denoised by": way}
                rows.append(row | {"psnr": line[key] if math.isfinite(line[key]) else None})
        picture = model.folder / "samples" / f"epoch_{epoch:04d}.png"
        if picture.is_file():
            with Image.open(picture, formats=["PNG"]) as file:
                pictures.append(file.convert("RGB"))
    return pictures, rows


# ------------------------------------------------------------------------------------------------------------
# 6. Samplers, and other schedules at inference


def on_schedule(trained: Diffusion, other: Diffusion, eps_theta: Denoiser) -> Denoiser:
    """A denoiser for the process `other` out of one for `trained`, asked at the t whose SNR is nearest.

    At equal SNR x_t has one distribution under both, so what was learned of its eps holds.
    """
    log_snr = trained.snr[1:].log()  # (T,)
    nearest = (log_snr - other.snr[1:, None].log()).abs().argmin(1) + 1
    times = torch.cat([torch.zeros(1, dtype=torch.long), nearest])  # t of `other` -> t of `trained`

    def eps_theta_on_schedule(x_t: Tensor, t: Tensor) -> Tensor:
        return eps_theta(x_t, times.to(x_t.device)[torch.as_tensor(t, device=x_t.device)])

    return eps_theta_on_schedule


@torch.no_grad()
def samplers(args: argparse.Namespace) -> Result:
    """The same starting noise through every sampler in 5 to T steps, and on other schedules."""
    model = load_model(args.run, args.device)
    T, trained, judge = model.diffusion.T, model.config["schedule"], load_judge(args.classifier, model)
    ddpm_conditional.without_condition(model.path, model.config)
    few = 8  # images that are compared one by one
    if judge:
        data = labelled_data(args, model.config)
        n = samples_for(judge, args.samples, data)
        reference = make_reference(data, judge, n, args.seed)
    elif args.samples or args.full:
        raise UserError("--samples and --full are of the quality, which takes --classifier RUN: add it")
    # Start
    plain = model.diffusion.denoiser(model.net)
    counts = sorted({min(steps, T) for steps in (5, 10, 20, 50, 100, 250, T)})
    jobs = [(sampler, trained, steps) for sampler in args.samplers for steps in counts]
    jobs += [("ddim", schedule, min(20, T)) for schedule in args.schedules if schedule != trained]
    rows, pictures = [], {}
    end_point = draw(model, range(few), ddpm.ddim, T, args)  # of the probability flow
    for sampler, schedule, steps in jobs:
        diffusion, eps_theta = model.diffusion, plain
        if schedule != trained:
            diffusion = Diffusion(T, schedule)
            eps_theta = on_schedule(model.diffusion, diffusion, plain)
        clipped = clip_x_0(diffusion, eps_theta)
        drawn = partial(draw, model, sampler=SAMPLERS[sampler], steps=steps, args=args, diffusion=diffusion)
        drawn = partial(drawn, denoiser_of=lambda _, eps_theta=clipped: eps_theta)
        started = time.perf_counter()
        x = drawn(range(few))
        row: Row = {"sampler": sampler, "schedule": schedule, "steps": steps}
        row["ms per image"] = 1000 * (time.perf_counter() - started) / few
        row["distance to DDIM's end point"] = (x - end_point).square().mean().sqrt().item() / 2
        if judge and (steps <= 50 or args.full):
            x = torch.cat([x, drawn(range(few, n))])
            row |= {"n": n, **quality(judge.features(x), reference.features)}
        rows.append(row)
        pictures[sampler, schedule, steps] = x[:2]
    # End
    own = [row for row in rows if row["schedule"] == trained]
    if judge:
        floor = quality(reference.floor_features, reference.features)
        rows.append({"sampler": "real images", "n": n, **floor})
    heads = [f"{steps} steps" for steps in counts]
    cells = [pictures[sampler, trained, steps] for sampler in args.samplers for steps in counts]
    caption = f"{model.path}: two starting noises, the same for all"
    grids = [utils.make_grid(torch.cat(cells), caption, 2 * len(counts), args.samplers, heads)]
    others = {schedule: x for (_, schedule, _), x in pictures.items() if schedule != trained}
    if others:
        caption = f"trained on {trained}, sampled on another schedule, ddim {min(20, T)} steps"
        x = torch.cat(list(others.values()))
        grids.append(utils.make_grid(x, caption, len(x), heads=list(others)))
    panels = [
        Panel(what, "steps", what, curves(own, "sampler", "steps", what), "xy")
        for what in ("distance to DDIM's end point", "frechet", "ms per image")
    ]
    of_flow = {k: [p for p in zip(*c, strict=True) if p[1] > 0] for k, c in panels[0].curves.items()}
    panels[0].curves = {name: tuple(zip(*points, strict=True)) for name, points in of_flow.items() if points}
    notes = [f"distance: rms per pixel of [0, 1], {few} images, to ddim with {T} steps from the same noise"]
    return Result([*grids, Chart(panels)], rows, model.folder, notes)


# ------------------------------------------------------------------------------------------------------------
# 7. Guidance


def guides(args: argparse.Namespace, model: Model) -> dict[str, Callable[[Tensor, float], Denoiser]]:
    """What can guide the model: name -> (y (B, ...), scale) -> denoiser."""
    found: dict[str, Callable] = {}
    if model.config["kind"] == "ddpm_conditional":
        found["cfg"] = model.guided
    if path := args.guide or args.classifier:
        try:
            classifier = ddpm_conditional.load_classifier(path, model.config, model.device)
        except UserError as error:  # a judge need not know the model's noise; a guide must
            if args.guide or not found:
                raise
            utils.note(f"no classifier guidance: {error}")
            return found
        plain = model.diffusion.denoiser(model.net)  # told nothing

        def by_classifier(y: Tensor, scale: float) -> Denoiser:
            y = y.to(model.device)
            guided = ddpm_conditional.classifier_guidance(model.diffusion, plain, classifier, y, scale)
            return clip_x_0(model.diffusion, guided)

        found["classifier"] = by_classifier
    return found


@torch.no_grad()
def guidance(args: argparse.Namespace) -> Result:
    """Scales of classifier-free and of classifier guidance: pictures, accuracy, diversity, saturation."""
    model = load_model(args.run, args.device)
    judge, denoisers = load_judge(args.classifier, model), guides(args, model)
    if not denoisers:
        raise UserError(
            f"{args.run} is unconditional: guiding it takes --classifier RUN, of --task classifier"
        )
    if "cfg" in denoisers:
        ddpm_conditional.fill_guidance_scale(args, model.config["p_uncond"])  # a note, where it is no use
    args.checkpoint = args.run  # which `conditions` names in its errors
    names, y = ddpm_conditional.conditions(args, model.config)
    if not (args.labels or args.prompt) and len(names) > 10:  # ten of many, evenly spaced
        few = torch.linspace(0, len(names) - 1, 10).round().long()
        names, y = [names[k] for k in few], y[few]
    # Start
    R, n = len(names), len(names) * args.per_label
    of = torch.arange(n) % R  # image i is asked to be names[i % R]
    reference = (
        reference_of_labels(labelled_data(args, model.config), judge, y[of], args.seed) if judge else None
    )
    enough = judge and min(n, len(reference.floor), len(reference.features)) > judge.dim
    steps, sampler = min(args.sample_steps, model.diffusion.T), args.sampler or model.config["sampler"]

    def measured(kind: str, scale: float | None, x: Tensor, label: Tensor, features: Tensor | None) -> Row:
        row: Row = {"guidance": kind, "scale": scale, "n": len(x)}
        if judge:
            row["accuracy"] = (judge.p(x).argmax(1) == label).double().mean().item()
        if args.per_label > 1:
            row["diversity"] = diversity(x, label if y.ndim == 1 else of)  # captions are told by their number
        row["saturation"] = saturation(x)
        if enough:
            row["frechet"] = frechet_distance(features, reference.features)
        return row

    rows, pictures = [], {kind: [] for kind in denoisers}
    for kind, denoiser_of in denoisers.items():
        for scale in args.guidance_scale:
            make = lambda i, d=denoiser_of, s=scale: d(y[of[i]], s)  # noqa: E731
            x = draw(model, range(n), SAMPLERS[sampler], steps, args, make)
            rows.append(measured(kind, scale, x, y[of], judge and judge.features(x)))
            pictures[kind].append(x[:R])
    scales = list(rows)
    if judge:
        rows.append(
            measured("real images", None, reference.floor, reference.labels, reference.floor_features)
        )
    # End
    heads = [f"scale {scale:g}" for scale in args.guidance_scale]
    grids = []
    for kind, x in pictures.items():
        caption = f"{kind} guidance, {sampler} {steps} steps; a row has one noise"
        grids.append(utils.make_grid(torch.stack(x, 1).flatten(0, 1), caption, len(heads), names, heads))
    measures = [key for key in ("accuracy", "diversity", "saturation", "frechet") if key in rows[0]]
    panels = [Panel(key, "scale", key, curves(scales, "guidance", "scale", key)) for key in measures]
    notes = ["diversity: mean rms distance per pixel of [0, 1] within a condition; saturation: at 0 or 255"]
    if judge and not enough:
        notes.append(
            f"no Frechet distance: it takes more than {judge.dim} images on either side (--per-label)"
        )
    if judge and "classifier" in denoisers and not args.guide:
        notes.append("the classifier that guides is also the judge, which flatters it: see --guide RUN")
    return Result([*pairs(grids), Chart(panels, 4)], rows, model.folder, notes)


# ------------------------------------------------------------------------------------------------------------
# 8. Quality in figures


def same_data(models: Sequence[Model]) -> None:
    """UserError unless all runs are of the same data set, image size and channels."""
    for model in models[1:]:
        for key in ddpm_conditional.SAME_DATA:
            ours, theirs = model.config[key], models[0].config[key]
            if ours != theirs:
                raise UserError(
                    f"{model.path} was trained with {utils.flag(key)} {ours}, {models[0].path} {theirs}: "
                    "compare runs of the same data"
                )
        if model.config["class_names"] != models[0].config["class_names"]:
            raise UserError(
                f"{model.path} and {models[0].path} know other classes: compare runs of the same data"
            )


@torch.no_grad()
def evaluate(args: argparse.Namespace) -> Result:
    """Frechet distance, precision, recall and accuracy of runs, beside those of real images."""
    models = [load_model(run, args.device) for run in args.runs]
    same_data(models)
    if models[0].config["dataset"] is None:
        raise UserError(
            f"evaluate compares samples with what a model was trained on: {args.run} does not say"
        )
    if args.classifier is None:
        of = "--dataset {dataset} --image-size {image_size}".format(**models[0].config)
        trained = f"python ddpm_conditional.py --task classifier {of}"
        raise UserError(
            f"evaluate sees images as a classifier does: name one with --classifier RUN ({trained})"
        )
    judge, data = load_judge(args.classifier, models[0]), labelled_data(args, models[0].config)
    # Start
    n = args.samples or min(1000, len(data.images) // 2)
    reference = make_reference(data, judge, n, args.seed)

    def measured(x: Tensor, features: Tensor, labels: Tensor | None, nearest: Tensor) -> Row:
        p = judge.p(x)
        accuracy = None if labels is None else (p.argmax(1) == labels).double().mean().item()
        sure = (p.max(1).values > 0.95).double().mean().item()  # of whatever label
        row = {"n": n, **quality(features, reference.features), "label accuracy": accuracy, "sure": sure}
        return row | {"nearest, mean": nearest.mean().item(), "nearest, least": nearest.min().item()}

    rows, pictures, names = [], [], []
    for model in models:
        steps, sampler = min(args.sample_steps, model.diffusion.T), args.sampler or model.config["sampler"]
        if model.classes:
            ddpm_conditional.fill_guidance_scale(args, model.config["p_uncond"])  # a note, where it is no use
        for scale in args.guidance_scale if model.classes else [None]:
            labels = torch.arange(n) % model.classes if model.classes else None
            asked = lambda i, m=model, y=labels, s=scale: m.guided(y[i], s)  # noqa: E731
            x = draw(model, range(n), SAMPLERS[sampler], steps, args, asked if model.classes else None)
            nearest, index = nearest_images(x, reference.real)
            row: Row = {"run": model.path, "scale": scale, "epoch": model.config["epoch"]}
            row |= {"sampled by": f"{sampler} {steps}"}
            rows.append(row | measured(x, judge.features(x), labels, nearest))
            pictures += [x[:10], to_x_0(reference.real[index[:10]])]
            told = "" if scale is None else f" scale {scale:g}"
            names += [model.folder.name + told, "nearest training image"]
    # the floor: what other real images score against the same half
    nearest, _ = nearest_images(reference.floor, reference.real, skip=1)
    rows.append(
        {"run": "real images"}
        | measured(reference.floor, reference.floor_features, reference.labels, nearest)
    )
    # End
    caption = f"samples, and the nearest of {len(reference.real)} training images to each"
    grid = utils.make_grid(torch.cat(pictures), caption, min(10, n), names)
    notes = [
        f"as {args.classifier} sees them, trained on most of them; against {len(reference.features)} real,",
        "and so is the last row: other real ones. sure: share that it gives some label over 95 %. nearest:",
        "rms distance per pixel of [0, 1] to the nearest training image (of a real one, to another one)",
    ]
    return Result([grid], rows, models[0].folder, notes)


# ------------------------------------------------------------------------------------------------------------
# 9. Losses


@torch.no_grad()
def losses(args: argparse.Namespace) -> Result:
    """The error at each noise level, of every run on the same images and noise, and training curves."""
    models = [load_model(run, args.device) for run in args.runs]
    same_data(models)
    x_0 = chosen_images(args, args.images or 256, models[0].config)
    # Start
    rows, errors, training = [], [], []
    for model in models:
        ddpm_conditional.without_condition(model.path, model.config)
        diffusion = model.diffusion
        levels = sorted({at(t, diffusion.T) for t in (1, 10, *range(40, 1001, 40))})
        of_model = []
        with utils.progress(model.path, len(levels) * len(x_0)) as bar:
            eps_theta = in_batches(diffusion.denoiser(model.net), args.batch_size, bar)
            for t in levels:
                times = torch.full((len(x_0),), t)
                x_t, eps = diffusion.noise_images(x_0, times, utils.seeded_generator(args.seed, t))
                said = eps_theta(x_t.to(model.device), times.to(model.device)).cpu()
                error, snr = (said - eps).square().mean().item(), diffusion.snr[t].item()
                # of x_0 = of eps / SNR
                of_model.append(
                    {"run": model.path, "snr": snr, "mse of eps": error, "mse of x_0": error / snr}
                )
        errors += of_model
        for stage, (low, high) in STAGES.items():
            inside = [row for row in of_model if low <= row["snr"] < high]
            weighting = model.config["weighting"] or "plain MSE"
            row = {"run": model.path, "prediction": model.config["prediction"], "weighting": weighting}
            means = {key: np.mean([e[key] for e in inside]) for key in ("mse of eps", "mse of x_0") if inside}
            rows.append(row | {"stage": stage, **means})
        if (model.folder / "log.csv").is_file():
            with open(model.folder / "log.csv", newline="") as file:
                training += [{"run": model.path, **line} for line in csv.DictReader(file)]
    # End
    panels = [
        Panel(key, "SNR", key, curves(errors, "run", "snr", key), "xy", stages=True)
        for key in ("mse of eps", "mse of x_0")
    ]
    title = "training loss, as each run weights it"
    panels.append(Panel(title, "epoch", "loss", curves(training, "run", "epoch", "loss"), "y"))
    notes = [
        f"on {len(x_0)} training images and the same noise; a stage's mean: of t = 1, 10, 40, 80, ... in it"
    ]
    return Result([Chart(panels)], rows, models[0].folder, notes)


# ------------------------------------------------------------------------------------------------------------
# 10. The network as a score function


@torch.no_grad()
def langevin(
    diffusion: Diffusion,
    eps_theta: Denoiser,
    x: Tensor,
    timesteps: Sequence[int],
    generator: Generators = None,
    inner: int = 5,
    step: float = 0.3,
) -> Tensor:
    """Annealed Langevin dynamics, x (B, C, H, W) at timesteps[0] -> x at timesteps[-1] (Song & Ermon 2019).

    A sampler that knows nothing of the chain, only each level's score: of x_0 + sigma_t z, where sigma_t^2 =
    1 / SNR, it is -eps_theta / sigma_t. `inner` steps of size alpha_t = step sigma_t^2 at each level.
    """
    # Start: annealed Langevin dynamics (Song & Ermon 2019, Algorithm 1)
    for t, ab_t, ab_s in diffusion.strides(x, timesteps):  # line 2: for each noise level
        sigma = ((1 - ab_t) / ab_t) ** 0.5
        z = x / ab_t**0.5  # their coordinates, x_0 + sigma_t noise: in them no level rescales what it gets
        alpha = step * sigma**2  # line 3
        for _ in range(inner):  # line 4
            score = -eps_theta(z * ab_t**0.5, t) / sigma
            z = z + alpha / 2 * score + alpha**0.5 * randn_like(z, generator)  # lines 5 and 6
        if ab_s == 1:  # after the last level the noise that it left is taken out, in one step
            z = z - sigma * eps_theta(z * ab_t**0.5, t)
        x = z * ab_s**0.5  # line 8: the next level begins where this one ended
    return x
    # End


def train_on_points(x_0: Tensor, epochs: int, seed: int) -> tuple[torch.nn.Module, Diffusion]:
    """A small network that learned points (N, 2, 1, 1) in [-1, 1], by the loop that trains all others."""
    torch.manual_seed(seed)
    diffusion = Diffusion(1000, "cosine", "v", "simple")
    loader = utils.Loader(((x_0 + 1) * 127.5).round().clamp(0, 255).byte(), 256, seed=seed)
    settings = {"epochs": epochs, "lr": 3e-3, "save_every": epochs, "seed": seed}
    with tempfile.TemporaryDirectory() as folder, torch.enable_grad():
        ema = ddpm.train(PointMLP(), diffusion.loss, loader, Path(folder), **settings)
    return ema.net, diffusion


@torch.no_grad()
def score(args: argparse.Namespace) -> Result:
    """Annealed Langevin dynamics beside ancestral sampling, for points in the plane and for images."""
    model = load_model(args.run, args.device) if args.run else None
    judge = load_judge(args.classifier, model) if model else None
    if (args.classifier and not model) or (args.samples and not judge):
        raise UserError("--samples and --classifier measure images: name a RUN, and its --classifier")
    # Start
    points = swiss_roll(4000, utils.seeded_generator(args.seed), noise=0.06) / 2.5  # in [-1, 1]
    net, diffusion = train_on_points(points, args.point_epochs, args.seed)
    n, eps_theta, (data, more) = 1000, diffusion.denoiser(net), points[:2000].chunk(2)
    ways = {"ancestral": ddpm.ddpm, "Langevin": partial(langevin, inner=args.inner, step=args.step)}

    def effort(way: str, T: int) -> tuple[int, int]:
        """Steps and evaluations: as many of these either way, if T allows, and Langevin's last one."""
        if way == "ancestral":
            return min(args.langevin_levels * args.inner, T), min(args.langevin_levels * args.inner, T)
        return min(args.langevin_levels, T), min(args.langevin_levels, T) * args.inner + 1

    rows, clouds, grids = [], {"data": data}, []
    for way, sampler in ways.items():
        steps, evaluations = effort(way, diffusion.T)
        x_T, generators = numbered_noise(range(n), (2, 1, 1), args.seed)
        clouds[way] = sampler(diffusion, eps_theta, x_T, diffusion.timesteps(steps), generators)
        row: Row = {"data": "Swiss roll", "sampler": way, "evaluations": evaluations, "n": n}
        rows.append(row | quality(clouds[way].flatten(1), data.flatten(1)))
    rows.append(
        {"data": "Swiss roll", "sampler": "real", "n": n, **quality(more.flatten(1), data.flatten(1))}
    )
    if model:
        ddpm_conditional.without_condition(model.path, model.config)
        n = 16
        if judge:
            images = labelled_data(args, model.config)
            n = samples_for(judge, args.samples, images)
            reference = make_reference(images, judge, n, args.seed)
        for way, sampler in ways.items():
            steps, evaluations = effort(way, model.diffusion.T)
            x = draw(model, range(n), sampler, steps, args, per_step=evaluations // steps)
            row = {"data": model.path, "sampler": way, "evaluations": evaluations, "n": n}
            rows.append(row | (quality(judge.features(x), reference.features) if judge else {}))
            grids.append(utils.make_grid(x[:16], f"{way}, {evaluations} evaluations", 8))
        if judge:
            floor = quality(reference.floor_features, reference.features)
            rows.append({"data": model.path, "sampler": "real", "n": n, **floor})
    # End
    panels = [
        Panel(name, "", "", {name: tuple(x.flatten(1).T.tolist())}, kind="points")
        for name, x in clouds.items()
    ]
    figure = [Chart([*panels, *score_fields(diffusion, eps_theta)]), *pairs(grids)]
    return Result(figure, rows, model.folder if model else Result.folder)


def score_fields(diffusion: Diffusion, eps_theta: Denoiser) -> list[Panel]:
    """Which way the score, -eps_theta / sqrt(1 - ab), points in the plane, at three noise levels."""
    line, panels = torch.linspace(-1.6, 1.6, 17), []
    x, y = (c.flatten() for c in torch.meshgrid(line, line, indexing="xy"))
    for t in (50, 250, 600):
        plane, times = torch.stack([x, y], 1)[..., None, None], torch.full((len(x),), t)
        field = -eps_theta(plane, times).flatten(1)
        arrows = (x, y, *(field / field.norm(dim=1, keepdim=True)).T)
        title = f"direction of the score, {snr_label(diffusion, t)}"
        panels.append(Panel(title, "", "", {"score": tuple(c.tolist() for c in arrows)}, kind="arrows"))
    return panels


# ------------------------------------------------------------------------------------------------------------
# 11. The report

PAGE, MARGIN = (1654, 2339), 100  # pixels: A4 at 200 dpi


def draw_page(
    title: str, text: str, figure: Image.Image | None, cells: Sequence[Sequence[str]]
) -> Image.Image:
    """A page: how to read the study, its figure as large as fits, its table as far as it fits."""
    page, (width, height) = Image.new("RGB", PAGE, "white"), PAGE
    canvas, room, font, top = ImageDraw.Draw(page), width - 2 * MARGIN, ImageFont.load_default(24), 160
    canvas.text((MARGIN, 80), title, "black", ImageFont.load_default(44))
    for line in utils.wrap(text, room, font):
        canvas.text((MARGIN, top), line, "black", font)
        top += 34
    top += 30
    if figure is not None:
        scale = min(room / figure.width, (height - top) * 2 / 3 / figure.height, 2.0)
        size = (round(figure.width * scale), round(figure.height * scale))
        page.paste(figure.resize(size, Image.Resampling.LANCZOS), ((width - size[0]) // 2, top))
        top += size[1] + 40
    draw_table(canvas, cells, top, room, height - top - 80)
    return page


def draw_table(
    canvas: ImageDraw.ImageDraw, cells: Sequence[Sequence[str]], top: int, width: int, height: int
) -> None:
    """A table, its header first, in the largest type that fits; rows without room are only counted."""
    for size in range(24, 9, -1):
        font = ImageFont.load_default(size)
        widths = [max(map(font.getlength, column)) + size for column in zip(*cells, strict=True)]
        if sum(widths) <= width and 1.4 * size * len(cells) <= height:
            break
    fit = int(height // (1.4 * size))
    if len(cells) > fit:
        cells = [*cells[: fit - 1], [f"... and {len(cells) - fit + 1} rows more in the CSV"]]
    for i, line in enumerate(cells):
        for k, cell in enumerate(line):
            canvas.text((MARGIN + sum(widths[:k]), top + 1.4 * size * i), cell, "black", font)


def report(args: argparse.Namespace) -> None:
    """Every study of one run, in files of its own and as a page of a PDF."""
    model = load_model(args.run, args.device)
    load_judge(args.classifier, model)  # an error here is told before the work
    folder = Path(args.out) if args.out else model.folder
    common = ["--seed", str(args.seed), "--device", str(args.device), "--cache-dir", args.cache_dir]
    common += ["--data-root", args.data_root] if args.data_root else []
    judge, pages, missing = ["--classifier", args.classifier] if args.classifier else [], [], None
    of = {key: str(model.config.get(key)) for key in ("noise_steps", "dataset", "image_size", "data_root")}
    steps = ["--noise-steps", of["noise_steps"]]
    same = {"schedules": steps, "weights": steps}
    same["forward"] = [*steps, "--image-size", of["image_size"]]
    seen = {}  # the user's images, where a study takes some
    if args.image:
        same["forward"] += ["--image", args.image[0]]
        seen = {name: ["--image", *args.image] for name in ("noise", "denoise", "losses")}
    elif model.config["dataset"] is not None:
        same["forward"] += ["--dataset", of["dataset"]]
        same["forward"] += [] if args.data_root else ["--data-root", of["data_root"]]
    # Start
    for name, study in STUDIES.items():
        if study.run is report:
            continue
        print(f"\n{name}")
        try:
            of_run = ["--checkpoint", args.run, *seen.get(name, [])] if study.most else same[name]
            result = study.run(parse([name, *of_run, *common, *(judge if study.judged else [])]))
            figure, error = publish(name, result, str(folder))
            missing = missing or error
            pages.append(draw_page(name, study.how_to_read, figure, table(result.rows)))
        except UserError as error:
            utils.note(f"{name} is left out: {error}")
            pages.append(draw_page(name, f"Left out: {error}.", None, [[""]]))
    path = utils.new_path(folder / "report.pdf", ".pdf")
    utils.save_picture(pages[0], path, save_all=True, append_images=pages[1:], resolution=200.0)
    # End
    print(f"\nreport  {shlex.quote(str(path))}")
    if missing:
        raise missing


# ------------------------------------------------------------------------------------------------------------
# Command line


def one_of(names: dict) -> Callable[[str], str]:
    """An argparse type: a key of the dict."""

    def parse(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(names)}")
        return text

    return parse


def add_schedules(add: Callable, default: Sequence[str] = tuple(SCHEDULES)) -> None:
    names = f"with commas between them: {', '.join(SCHEDULES)}"
    add(
        "--schedules", type=utils.listed(one_of(SCHEDULES)), default=list(default), metavar="LIST", help=names
    )
    add("--noise-steps", type=whole(2), default=1000, metavar="T", help="number of noise levels")


def add_image(add: Callable, count: int | str = "+") -> None:
    add("--image", nargs=count, metavar="FILE", help="your own instead of the data set's")


def add_data_set(add: Callable) -> None:
    where = "where images come from, without a run or --image: %(choices)s (default: digits)"
    add("--dataset", choices=list(utils.DATASETS), metavar="NAME", help=where)
    size = "height and width, without a run (default: the data set's; 64 for --image)"
    add("--image-size", type=whole(8), metavar="PIXELS", help=size)


def add_judge(add: Callable) -> None:
    add("--classifier", metavar="RUN", help="a run of ddpm_conditional.py --task classifier on the same data")


def add_batch(add: Callable) -> None:
    add("--batch-size", type=whole(1), default=128, metavar="IMAGES", help="through the network at once")


def add_sampling(add: Callable, steps: int) -> None:
    one = "one of %(choices)s (default: that of the run's previews)"
    add("--sampler", choices=list(SAMPLERS), metavar="NAME", help=one)
    add(
        "--sample-steps", type=whole(1), default=steps, metavar="N", help="strides from t = T to 0, at most T"
    )
    add_batch(add)


def schedules_flags(add: Callable) -> None:
    add_schedules(add)


def forward_flags(add: Callable) -> None:
    add_schedules(add)
    add_image(add, 1)
    add_data_set(add)
    parts = "whose x_t is shown in parts, quoted for T = 1000"
    add("--at", type=utils.number(int, 1, 1000), default=300, metavar="t", help=parts)


def weights_flags(add: Callable) -> None:
    add_schedules(add, ("linear", "cosine"))
    add("--k", type=real(0, above=True), default=1.0, metavar="K", help="of P2's 1 / (k + SNR)^gamma")


def noise_flags(add: Callable) -> None:
    add_image(add)
    add("--images", type=whole(1), metavar="N", help="of the data set, to be measured (default: 16)")
    add("--show", type=whole(1), default=4, metavar="N", help="of them in the figure")
    levels = "times t (default: eight from 50 to 1000, scaled to T)"
    add("--levels", type=utils.listed(whole(1)), metavar="LIST", help=levels)
    chosen = f"chains, with commas between them: {', '.join(SAMPLERS)}"
    default = ["ddim", "pndm", "ddpm"]
    add("--samplers", type=utils.listed(one_of(SAMPLERS)), default=default, metavar="LIST", help=chosen)
    add("--sample-steps", type=whole(1), default=50, metavar="N", help="of a chain from t = T to 0")
    add("--draws", type=whole(2), default=4, metavar="K", help="of ddpm's chain, from one x_t")
    add_judge(add)
    add_batch(add)


def denoise_flags(add: Callable) -> None:
    add_image(add)
    many = "of the data set, over which PSNR is averaged; the first is shown (default: 16)"
    add("--images", type=whole(1), metavar="N", help=many)
    add_data_set(add)
    times = "times t (default: 250,500,750, scaled to T)"
    add("--levels", type=utils.listed(whole(1)), metavar="LIST", help=times)
    schedule = "of the noise, without a run (default: linear)"
    add("--schedule", choices=list(SCHEDULES), metavar="NAME", help=schedule)
    add_batch(add)


def samplers_flags(add: Callable) -> None:
    which = {"type": utils.listed(one_of(SAMPLERS)), "default": list(SAMPLERS), "metavar": "LIST"}
    add("--samplers", **which, help="with commas between them")
    which = {"type": utils.listed(one_of(SCHEDULES)), "default": list(SCHEDULES), "metavar": "LIST"}
    add("--schedules", **which, help="to sample on, beside the one trained on")
    many = "that quality is measured on (default: 128, or what the classifier needs)"
    add("--samples", type=whole(1), metavar="N", help=many)
    add("--full", action="store_true", help="measure quality above 50 steps as well")
    add_judge(add)
    add_batch(add)


def guidance_flags(add: Callable) -> None:
    scales = [0.0, 0.5, 1.0, 2.0, 3.0, 5.0, 7.5, 15.0]
    which = {"type": utils.listed(real(0)), "default": scales, "metavar": "LIST"}
    add("--guidance-scale", **which, help="with commas between them")
    labels = "classes, numbers or names with commas (default: all, or ten of many)"
    add("--labels", type=utils.listed(str), metavar="LIST", help=labels)
    add("--prompt", nargs="+", action="extend", metavar="CAPTION", help="for a model of captions, in quotes")
    add("--per-label", type=whole(1), default=20, metavar="N", help="images of each condition at each scale")
    add_judge(add)
    add("--guide", metavar="RUN", help="another classifier, to guide with (default: that of --classifier)")
    add_sampling(add, 20)


def evaluate_flags(add: Callable) -> None:
    many = "from each run (default: half of the training images, at most 1000)"
    add("--samples", type=whole(1), metavar="N", help=many)
    which = {"type": utils.listed(real(0)), "default": [1.0], "metavar": "LIST"}
    add("--guidance-scale", **which, help="for runs of labels; 1 is plain conditional")
    add_judge(add)
    add_sampling(add, 50)


def losses_flags(add: Callable) -> None:
    add_image(add)
    many = "training images that errors are measured on (default: 256)"
    add("--images", type=whole(1), metavar="N", help=many)
    add_batch(add)


def score_flags(add: Callable) -> None:
    add("--langevin-levels", type=whole(2), default=60, metavar="N", help="noise levels")
    add("--inner", type=whole(1), default=5, metavar="N", help="Langevin steps at each of them")
    size = "their size, in units of sigma_t^2"
    add("--step", type=real(0, 2, above=True), default=0.3, metavar="S", help=size)
    add(
        "--point-epochs",
        type=whole(1),
        default=300,
        metavar="N",
        help="of the network that learns the points",
    )
    many = "images that quality is measured on (default: 128, or what the classifier needs)"
    add("--samples", type=whole(1), metavar="N", help=many)
    add_judge(add)
    add_batch(add)


def report_flags(add: Callable) -> None:
    add_image(add)
    add_judge(add)


@dataclass
class Study:
    """A study, its flags, how many runs it takes, and two sentences on how to read what it gives."""

    run: Callable[[argparse.Namespace], Result | None]
    add_flags: Callable[[Callable], None]
    how_to_read: str
    least: int = 0
    most: float = 0
    judged: bool = False  # does it take --classifier


STUDIES = {
    "schedules": Study(
        schedules,
        schedules_flags,
        "SNR is what a schedule sets: two of them take one path through noise levels at two speeds. "
        "A schedule spends most steps where its curve of SNR is flattest.",
    ),
    "forward": Study(
        forward,
        forward_flags,
        "A row is a schedule, time runs to the right: what can be recognised there can be learned there. "
        "The variance stays 1 under every schedule, so x_t always has the size that the network is used to.",
    ),
    "weights": Study(
        weights,
        weights_flags,
        "Noise grows to the right, from the clean-up through the content to the coarse stage. "
        "L_simple already takes weight from the clean-up, on which the VLB spends much, and P2 takes more.",
    ),
    "noise": Study(
        noise,
        noise_flags,
        "Where reconstructions equal x_0 the model read it in x_t; where draws differ it made it up. "
        "Detail (high frequencies) is lost to little noise, colour and layout (low ones) last.",
        least=1,
        most=1,
        judged=True,
    ),
    "denoise": Study(
        denoise,
        denoise_flags,
        "A blur trades noise for detail; one step of the network gives the mean of all images that fit, many "
        "steps give one of them. That one is sharper and farther from x_0: PSNR prefers the mean.",
        most=2,
    ),
    "samplers": Study(
        samplers,
        samplers_flags,
        "From one noise the deterministic samplers all go to one picture, the better ones in fewer steps. "
        "DDPM adds noise on the way and ends elsewhere, so for it only the quality counts.",
        least=1,
        most=1,
        judged=True,
    ),
    "guidance": Study(
        guidance,
        guidance_flags,
        "Scales above 1 buy accuracy with diversity; far too much of them spoils the pictures. "
        "The Frechet distance is least where both are near what real images have.",
        least=1,
        most=1,
        judged=True,
    ),
    "evaluate": Study(
        evaluate,
        evaluate_flags,
        "Read each figure beside the last row, what real images score: that is the floor. "
        "Precision is the share of samples that could be real, recall of real images that samples cover.",
        least=1,
        most=math.inf,
        judged=True,
    ),
    "losses": Study(
        losses,
        losses_flags,
        "Where its curve is higher a model errs more, at that noise level. "
        "Training losses weight the levels each in its way: compare only runs of one weighting by them.",
        least=1,
        most=math.inf,
    ),
    "score": Study(
        score,
        score_flags,
        "-eps_theta / sqrt(1 - alpha_bar) points to likelier images; noisy steps along it draw samples. "
        "With as many evaluations of the network it should come near ancestral sampling.",
        most=1,
        judged=True,
    ),
    "report": Study(report, report_flags, "", least=1, most=1),
}


def make_parser() -> argparse.ArgumentParser:
    parser = utils.Parser(description="Studies of diffusion models: one command, one figure, one table each.")
    studies = parser.add_subparsers(dest="study", required=True, metavar="STUDY")
    for name, study in STUDIES.items():
        what = study.run.__doc__.splitlines()[0]
        sub = studies.add_parser(name, help=what, description=what)
        add = sub.add_argument
        if study.most:
            add("runs", nargs="*", metavar="RUN", help="a run's folder, or published weights")
            add("--checkpoint", action="append", metavar="RUN", help="the same, as a flag")
        study.add_flags(add)
        add(
            "--data-root",
            metavar="DIR",
            help="where the data set is (default: where the run had it, or data)",
        )
        add("--cache-dir", default="data/cache", metavar="DIR", help="where decoded images are kept")
        add("--out", metavar="DIR", help="where to write (default: the first run's folder, or runs/analysis)")
        utils.add_machine_flags(sub)
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line of a study; UserError where it names too few or too many runs."""
    args = make_parser().parse_args(argv)
    study = STUDIES[args.study]
    if study.most:
        args.runs = [*args.runs, *(args.checkpoint or [])]
        if not study.least <= len(args.runs) <= study.most:
            wanted = {(1, 1): "one run", (0, 1): "one run at most", (0, 2): "two runs at most"}
            takes = wanted.get((study.least, study.most), "at least one run")
            raise UserError(
                f"{args.study} takes {takes}, as runs/ddpm_digits, and {len(args.runs)} were given"
            )
        args.run = args.runs[0] if args.runs else None
    args.device = utils.get_device(args.device)
    return args


def main() -> None:
    args = parse()
    result = STUDIES[args.study].run(args)
    if result is not None:
        _, missing = publish(args.study, result, args.out)
        if missing:
            raise missing


if __name__ == "__main__":
    utils.run_main(main)
