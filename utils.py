"""What you can plug in: noise schedules, weightings of the loss and data sets, each a dict of functions."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import Tensor

from support import cars, scenes
from support.cache import cached, decode, fingerprint, joined
from support.errors import UserError, note
from support.files import damage
from support.images import READ, image_files, labelled_folders, note_skipped, read_captions, splits_of
from support.settings import COUNT, SWITCH, setting, settings

# Beta schedules: f(T) -> betas, shape (T,), float64, in (0, 1). betas[t - 1] is the papers' beta_t.
#
# A step of the forward process is x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) eps (DDPM, eq. 2); t steps
# are x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, alpha_bar_t = prod_{s<=t} (1 - beta_s) (eq. 4).
#
# To add a schedule, write a function and add it to SCHEDULES below. The command line, all samplers, figures
# and tests then know it. It should
# - work for every T >= 2. Published betas belong to T = 1000; `scaled_betas` multiplies them by 1000 / T, so
#   that all T steps together add the same noise;
# - leave little signal at T: alpha_bar_T <= 0.002. Sampling starts from pure noise. If there is signal at T,
#   the network was never trained on pure noise. Such a schedule gets a note when it is used.
MAX_BETA = 0.999  # beta = 1 would leave no signal, and x_0 could not be read off x_t
HERE = Path(__file__).resolve().parent  # the folder of the project


def scaled_betas(betas_at_1000: Tensor) -> Tensor:
    """Betas published for T = 1000, given at T points, scaled by 1000 / T and clamped; (T,) -> (T,)."""
    return (betas_at_1000 * 1000 / len(betas_at_1000)).clamp(max=MAX_BETA)


def betas_from_alpha_bar(alpha_bar: Callable[[Tensor], Tensor], T: int) -> Tensor:
    """1 - alpha_bar(t/T) / alpha_bar((t-1)/T), clamped (Nichol & Dhariwal 2021, section 3.2); -> (T,)."""
    bar = alpha_bar(torch.linspace(0, 1, T + 1, dtype=torch.float64))  # (T+1,)
    return (1 - bar[1:] / bar[:-1]).clamp(max=MAX_BETA)


def linear(T: int) -> Tensor:
    """beta from 1e-4 to 0.02 in equal steps (Ho et al. 2020, section 4); -> (T,)."""
    return scaled_betas(torch.linspace(1e-4, 0.02, T, dtype=torch.float64))


def quadratic(T: int) -> Tensor:
    """sqrt(beta) from sqrt(1e-4) to sqrt(0.02) in equal steps (the code of Ho et al. 2020); -> (T,)."""
    return scaled_betas(torch.linspace(1e-4**0.5, 0.02**0.5, T, dtype=torch.float64) ** 2)


def scaled_linear(T: int) -> Tensor:
    """As `quadratic`, but from 0.0015 to 0.0195 (the code of LDM, Rombach et al. 2022); -> (T,)."""
    return scaled_betas(torch.linspace(0.0015**0.5, 0.0195**0.5, T, dtype=torch.float64) ** 2)


def sigmoid(T: int) -> Tensor:
    """beta from 1e-4 to 0.02 along a logistic curve over [-6, 6] (Xu et al. 2022, GeoDiff); -> (T,)."""
    return scaled_betas(torch.linspace(-6, 6, T, dtype=torch.float64).sigmoid() * (0.02 - 1e-4) + 1e-4)


def constant(T: int) -> Tensor:
    """beta the same at every step, the mean of `linear`'s, so alpha_bar_T is nearly the same; -> (T,)."""
    return scaled_betas(torch.full((T,), (1e-4 + 0.02) / 2, dtype=torch.float64))


def jsd(T: int) -> Tensor:
    """beta_t = 1 / (T - t + 1), so alpha_bar_t = 1 - t / T for t < T (Sohl-Dickstein et al. 2015); (T,)."""
    return (1 / torch.linspace(T, 1, T, dtype=torch.float64)).clamp(max=MAX_BETA)


def cosine(T: int) -> Tensor:
    """alpha_bar(u) = f(u) / f(0), f(u) = cos^2((u + s) / (1 + s) pi / 2), s = 0.008; -> (T,).

    alpha_bar changes little at both ends and falls in between (Nichol & Dhariwal 2021, eq. 17).
    """
    s = 0.008
    return betas_from_alpha_bar(lambda u: ((u + s) / (1 + s) * math.pi / 2).cos() ** 2, T)


def laplace(T: int) -> Tensor:
    """log snr(u) = -b sgn(0.5 - u) log(1 - 2 |u - 0.5|), b = 0.5; -> (T,).

    Most steps lie near snr = 1, as if log snr were drawn from a Laplace distribution (Hang et al. 2024).
    """
    b = 0.5  # and alpha_bar is the sigmoid of log snr, as snr = alpha_bar / (1 - alpha_bar)
    return betas_from_alpha_bar(
        lambda u: (-b * (0.5 - u).sign() * (1 - 2 * (u - 0.5).abs()).log()).sigmoid(), T
    )


def flow(T: int) -> Tensor:
    """snr(u) = ((1 - u) / u)^2, that of flow matching's straight line (1 - u) x_0 + u eps; -> (T,).

    Rectified flow (Liu et al. 2022) is one more noise schedule: the line divided by sqrt((1 - u)^2 + u^2) is
    sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps, which every network and sampler here can use.
    """
    return betas_from_alpha_bar(lambda u: (1 - u) ** 2 / ((1 - u) ** 2 + u**2), T)


SCHEDULES = dict(linear=linear, cosine=cosine, quadratic=quadratic, scaled_linear=scaled_linear)
SCHEDULES |= dict(sigmoid=sigmoid, constant=constant, jsd=jsd, laplace=laplace, flow=flow)


# Weightings of the loss: w(snr), the weight of the squared error of eps at a noise level; (T,) -> (T,). ---
def p2(snr: Tensor, gamma: float = 1.0, k: float = 1.0) -> Tensor:
    """w = 1 / (k + snr)^gamma: less where there is little noise to clean up (P2, Choi et al. 2022)."""
    return 1 / (k + snr) ** gamma


def min_snr(snr: Tensor, gamma: float = 5.0) -> Tensor:
    """w = min(snr, gamma) / snr (Min-SNR-gamma, Hang et al. 2023, in terms of the error of eps)."""
    return snr.clamp(max=gamma) / snr


WEIGHTINGS = {
    "simple": torch.ones_like,  # w = 1: plain MSE on eps, DDPM's L_simple (Ho et al. 2020, eq. 14)
    "p2": p2,
    "min_snr": min_snr,
    "clamped_snr": lambda snr: snr.clamp(1, 5) / snr,  # min_snr, but never below plain MSE on x_0
    "x_0": lambda snr: 1 / snr,  # plain MSE on x_0
    "v": lambda snr: (1 + snr) / snr,  # plain MSE on v (Salimans & Ho 2022)
}
PLAIN_MSE = {"eps": "simple", "x_0": "x_0", "v": "v", "dual": "simple"}  # plain MSE on it; of dual on its eps


# Data sets: f(root, split) -> Source says what there is: image files, or arrays, with labels or captions;
# None is for a split that is not there. `get_data` turns a Source into Data, one uint8 array, decoded once
# and cached. To add a data set, write a function and add it to DATASETS.
@dataclass
class Source:
    """Images before decoding: files, scenes, or an array, uint8 (N, h, w) or (N, h, w, C); their labels."""

    images: list[Path] | list[scenes.Scene] | np.ndarray
    labels: list[int] | None = None  # 0-based
    class_names: list[str] | None = None
    captions: list[str] | None = None
    flip: bool = True  # whether labels and captions still hold for a mirrored image
    image_size: int = 64  # default of --image-size
    channels: int = 3  # default of --channels
    root: Path | None = None  # the folder that the names of files are relative to


@dataclass
class Data:
    """Images (N, C, H, W) uint8 in memory and, where known, labels (N,) int64 (0-based) or N captions."""

    images: Tensor
    labels: Tensor | None = None
    class_names: list[str] | None = None
    captions: list[str] | None = None
    flip: bool = False
    skipped: list[str] = field(default_factory=list)  # the files that could not be read


def digits(root: Path, split: str) -> Source | None:
    """The 1797 8x8 digits of UCI's optical recognition set, which the project carries (data/README.md)."""
    if split != "train":
        return None
    with np.load(HERE / "data" / "digits.npz", allow_pickle=False) as file:
        images, labels = (file["images"] * (255 / 16)).round(), file["labels"].tolist()  # 8x8, of 0..16
    return Source(images.astype(np.uint8), labels, list("0123456789"), flip=False, image_size=16, channels=1)


def from_torchvision(name: str, root: Path, **options) -> torch.utils.data.Dataset:
    """A torchvision data set under root, downloaded on first use; UserError where that fails."""
    try:
        return getattr(torchvision.datasets, name)(str(root), download=True, **options)
    except Exception as error:  # of the network, of archives, of parsers
        why = " ".join(str(error).split())
        missing = f"{name} is not there, or is damaged, under {root}, and could not be downloaded ({why})"
        raise UserError(f"{missing}: check the network, or copy it there, or name its --data-root") from None


def mnist(root: Path, split: str) -> Source:
    """MNIST: 60000 (test: 10000) handwritten digits, 28x28."""
    data = from_torchvision("MNIST", root, train=split == "train")
    images, labels = data.data.numpy(), data.targets.tolist()
    return Source(images, labels, list("0123456789"), flip=False, image_size=28, channels=1)


def fashion_mnist(root: Path, split: str) -> Source:
    """Fashion-MNIST: 60000 (test: 10000) pieces of clothing, 28x28."""
    data = from_torchvision("FashionMNIST", root, train=split == "train")
    return Source(data.data.numpy(), data.targets.tolist(), list(data.classes), image_size=28, channels=1)


def cifar10(root: Path, split: str) -> Source:
    """CIFAR-10: 50000 (test: 10000) colour photographs of ten kinds, 32x32."""
    data = from_torchvision("CIFAR10", root, train=split == "train")
    return Source(data.data, list(data.targets), list(data.classes), image_size=32)


IMAGENETTE = """n01440764 tench, n02102040 English springer, n02979186 cassette player, n03000684 chain saw,
n03028079 church, n03394916 French horn, n03417042 garbage truck, n03425413 gas pump, n03445777 golf ball,
n03888257 parachute"""


def imagenette(root: Path, split: str) -> Source:
    """Imagenette: 9469 (test: 3925) photographs of ten easy ImageNet classes, short side 160."""
    part, count = ("train", 9469) if split == "train" else ("val", 3925)
    folder = root / "imagenette2-160" / part
    if not folder.is_dir():  # some versions of torchvision refuse to "download" what is there
        from_torchvision("Imagenette", root, split=part, size="160px")
    files, labels, wnids = labelled_folders(folder)
    if len(files) < count:
        note(f"{folder} holds {len(files)} images of {count}: delete it to get it anew")
    name_of = dict(entry.split(maxsplit=1) for entry in IMAGENETTE.split(","))
    return Source(files, labels, [name_of.get(wnid, wnid) for wnid in wnids], root=folder)


def stanfordcars(root: Path, split: str) -> Source:
    """Stanford Cars (Krause et al. 2013): 8144 (test: 8041) cars of 196 classes, as in support/cars.py."""
    folder, files, labels, class_names = cars.labelled_cars(root, split)
    return Source(files, labels, class_names, cars.captions(labels, class_names), root=folder)


def folder(root: Path, split: str) -> Source | None:
    """Images of a folder, of one sub-folder a class, of a metadata.jsonl with captions, or of a .npy file."""
    if root.suffix.lower() == ".npy" and split == "train":
        return array_file(root)
    if not root.is_dir():
        what = "is a file (unpack an archive; save an array as .npy)" if root.exists() else "does not exist"
        raise UserError(f"folder {root} {what}: name a folder of images with --data-root")
    if (root := splits_of(root).get(split)) is None:
        return None
    flat, (files, labels, class_names) = image_files(root), labelled_folders(root)
    if (root / "metadata.jsonl").is_file():
        listed, captions = read_captions(root / "metadata.jsonl")
        source = Source(listed, captions=captions, flip=False, root=root)
    else:  # what most of the images say
        source = Source(*([files, labels, class_names] if len(files) > len(flat) else [flat]), root=root)
    if not source.images:
        raise UserError(f"folder {root} holds no images ({READ})")
    if (left := len(flat) + len(files) - len(source.images)) > 0:
        note(f"{len(source.images)} images of {root} are used, and {left} others in it are not")
    if source.captions is None:
        texts = [root / "metadata.csv", *(path.with_suffix(".txt") for path in source.images[:9])]
        if text := next((path for path in texts if path.is_file()), None):
            note(f"{text} is not read: captions are read from metadata.jsonl")
    return source


def array_file(path: Path) -> Source:
    """Square images of one .npy file, mapped into memory: a set that needs no decoding may be of any size."""
    try:
        images = np.load(path, mmap_mode="c", allow_pickle=False)
        height, width, channels = images.shape[1:]
        if images.dtype != np.uint8 or channels not in (1, 3) or min(images.shape) < 1:
            raise ValueError
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror or error}") from None
    except Exception:  # NumPy raises almost anything on a damaged file
        what = damage(path) or "is no array of images"
        raise UserError(f"{path} {what}: it takes uint8 (N, h, w, 1 or 3)") from None
    return Source(images, image_size=min(height, width), channels=channels)


def shapes(root: Path, split: str, count: int = 20000) -> Source:
    """`count` scenes of one or two coloured shapes with captions, always the same (support/scenes.py)."""
    pairs = [(colour, shape) for colour in scenes.COLOURS for shape in scenes.SHAPES]
    pairs = [pair for pair in pairs if (pair in scenes.HELD_OUT) == (split == "test")]  # all of "test" are
    drawn = [scenes.make_scene(int(split == "test"), index, pairs) for index in range(count)]
    return Source(drawn, captions=[scene.caption for scene in drawn], flip=False, image_size=32)


DATASETS = dict(digits=digits, mnist=mnist, fashion_mnist=fashion_mnist, cifar10=cifar10)
DATASETS |= dict(imagenette=imagenette, stanfordcars=stanfordcars, folder=folder, shapes=shapes)
NARROW = {"digits", "mnist", "fashion_mnist"}  # narrow networks learn these well, and far sooner
# Labels and captions say most about content (SNR 1 to 0.01), to which Min-SNR gives little weight.
FOR_CONTENT = {("prediction", "weighting"): ("x_0", "p2")}
FOR_CONTENT[("prediction", "weighting", "p2_k")] = ("x_0", "p2", 0.1)  # where --p2-k is not typed
SHAPES = dict(condition="text", places=True, adagn=True, batch_size=32, clip_grad=0.1, sampler="ddpm")
DEFAULTS = {  # the settings that suit a data set, where the command line leaves them open
    "digits": {"epochs": 20},
    # Predicting v or eps leaves noise in photographs for long, and says little of x_0 where words matter.
    "stanfordcars": {("prediction", "weighting"): ("x_0", "min_snr")},
    "shapes": SHAPES | {"epochs": 18, "guidance_scale": [2.0], ("prediction", "weighting"): ("dual", "p2")},
}
LIMIT = "use the first N images of a fixed shuffle (default: all); for shapes draw N (default: 20000)"
FLIP = "mirror one in two images (default: yes; no for digits, mnist, shapes and folders with captions)"


@settings()
class DataSettings:
    dataset: str = setting("digits", "data set: %(choices)s", "NAME", choices=DATASETS)
    data_root: str = setting("data", "folder of the data set, or to download it to", "DIR", resume=True)
    image_size: int | None = setting(None, "height and width (default: by data set)", "PIXELS", COUNT)
    channels: int | None = setting(None, "1 gray, 3 RGB (default: by data set)", type=int, choices=[1, 3])
    limit: int | None = setting(None, LIMIT, "N", COUNT)
    flip: bool | None = setting(None, FLIP, action=SWITCH)
    workers: int | None = setting(None, "decoding threads (default: one per core)", "N", COUNT, resume=True)
    cache_dir: str = setting("data/cache", "folder for decoded images", "DIR", resume=True)


def get_data(dataset: str, data_root="data", split="train", **options) -> Data:
    """A data set of DATASETS as one array, decoded and resized once and cached on disk.

    `options` are image_size, channels, limit, workers and cache_dir of DataSettings. UserError where there is
    no such data set, split or folder, or no image in it can be read.
    """
    how = DataSettings(**options)
    if dataset not in DATASETS:
        raise UserError(f"unknown data set {dataset!r}: choose one of {', '.join(DATASETS)}")
    if split not in ("train", "test"):
        raise UserError(f"unknown split {split!r}: choose train or test")
    drawn = {"count": how.limit} if dataset == "shapes" and how.limit else {}
    source = DATASETS[dataset](Path(data_root), split, **drawn)
    if source is None:
        raise UserError(f"data set {dataset!r} has no split {split!r} here")
    if not len(source.images):
        raise UserError(f"there are no images of {dataset} under {data_root}")
    if how.limit is not None and not drawn:
        source = subset(source, np.random.default_rng(0).permutation(len(source.images))[: how.limit])
    size, channels = how.image_size or source.image_size, how.channels or source.channels
    images, colour = source.images, "rgb" if channels == 3 else "gray"
    if isinstance(images, np.memmap) and images.shape[1:] == (size, size, channels):  # needs no decoding
        array, kept = images.transpose(0, 3, 1, 2), np.arange(len(images))
    elif isinstance(images, np.ndarray) and images.nbytes < 2**20:  # decoded as soon as found in a cache
        array, kept = joined(decode(images, size, channels, how.workers or 1))
    else:
        key = fingerprint(images, source.root)
        cache_file = Path(how.cache_dir) / f"{dataset}_{split}_{size}x{size}_{colour}_{key}.npy"
        shape, workers = (len(images), channels, size, size), how.workers or os.cpu_count() or 1
        array, kept = cached(cache_file, shape, lambda: decode(images, size, channels, workers))
    if skipped := [str(images[i]) for i in np.setdiff1d(np.arange(len(images)), kept)]:
        note_skipped(skipped)
        source = subset(source, kept)
    if not len(array):
        raise UserError(f"none of the {len(skipped)} images of {dataset} under {data_root} can be read")
    labels = None if source.labels is None else torch.tensor(source.labels)
    return Data(torch.from_numpy(array), labels, source.class_names, source.captions, source.flip, skipped)


def subset(source: Source, at: np.ndarray) -> Source:
    """The images of a source at those positions, with their labels or captions."""
    images = source.images[at] if isinstance(source.images, np.ndarray) else [source.images[i] for i in at]
    labels, captions = (some and [some[i] for i in at] for some in (source.labels, source.captions))
    return replace(source, images=images, labels=labels, captions=captions)
