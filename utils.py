"""Everything around the diffusion model: beta schedules, data sets, checkpoints, image files, command-line
plumbing.
"""

import argparse
import csv
import errno
import hashlib
import io
import json
import math
import os
import pickle
import re
import signal
import socket
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np
import torch
import torchvision
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

HERE = Path(__file__).resolve().parent


class UserError(Exception):
    """Something the user can put right; its text is one clear line that says how."""


def note(message: str) -> None:
    """Tell the user of something that did not stop the work."""
    print(f"note: {message}", file=sys.stderr)


# ------------------------------------------------------------------------------------------------------------
# Beta schedules: f(T) -> betas, shape (T,), float64, in (0, 1). betas[t - 1] is the papers' beta_t.
#
# One step of the forward process is x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) eps (DDPM, eq. 2). The
# published betas belong to T = 1000; for another T they are scaled by 1000 / T, so that the same noise is
# added in all. To add one, write a function and add it to SCHEDULES: the command line, every sampler and
# every test then know it.

MAX_BETA = 0.999  # beta = 1 would leave no signal, and x_0 could not be read off x_t


def scaled_betas(betas_at_1000: torch.Tensor) -> torch.Tensor:
    """Betas published for T = 1000, taken at T points, scaled by 1000 / T and clamped; (T,) -> (T,)."""
    return (betas_at_1000 * 1000 / len(betas_at_1000)).clamp(max=MAX_BETA)


def betas_from_alpha_bar(alpha_bar: Callable[[torch.Tensor], torch.Tensor], T: int) -> torch.Tensor:
    """1 - alpha_bar(t/T) / alpha_bar((t-1)/T), clamped (Nichol & Dhariwal 2021, section 3.2); -> (T,)."""
    bar = alpha_bar(torch.linspace(0, 1, T + 1, dtype=torch.float64))  # (T+1,)
    return (1 - bar[1:] / bar[:-1]).clamp(max=MAX_BETA)


def linear(T: int) -> torch.Tensor:
    """beta from 1e-4 to 0.02 in equal steps (Ho et al. 2020, section 4); -> (T,)."""
    return scaled_betas(torch.linspace(1e-4, 0.02, T, dtype=torch.float64))


def quadratic(T: int) -> torch.Tensor:
    """sqrt(beta) from sqrt(1e-4) to sqrt(0.02) in equal steps (the code of Ho et al. 2020); -> (T,)."""
    return scaled_betas(torch.linspace(1e-4**0.5, 0.02**0.5, T, dtype=torch.float64) ** 2)


def sigmoid(T: int) -> torch.Tensor:
    """beta from 1e-4 to 0.02 along a logistic curve over [-6, 6] (Xu et al. 2022, GeoDiff); -> (T,)."""
    return scaled_betas(torch.linspace(-6, 6, T, dtype=torch.float64).sigmoid() * (0.02 - 1e-4) + 1e-4)


def constant(T: int) -> torch.Tensor:
    """beta the same at every step, the mean of `linear`, which so ends with the same alpha_bar_T; -> (T,)."""
    return scaled_betas(torch.full((T,), (1e-4 + 0.02) / 2, dtype=torch.float64))


def jsd(T: int) -> torch.Tensor:
    """beta_t = 1 / (T - t + 1), so alpha_bar_t = 1 - t / T for t < T (Sohl-Dickstein et al. 2015); (T,)."""
    return (1 / torch.linspace(T, 1, T, dtype=torch.float64)).clamp(max=MAX_BETA)


def cosine(T: int) -> torch.Tensor:
    """alpha_bar(u) = f(u) / f(0), f(u) = cos^2((u + s) / (1 + s) pi / 2), s = 0.008; -> (T,).

    Less noise early and late than `linear` (Nichol & Dhariwal 2021, eq. 17).
    """
    s = 0.008
    return betas_from_alpha_bar(lambda u: ((u + s) / (1 + s) * math.pi / 2).cos() ** 2, T)


def laplace(T: int) -> torch.Tensor:
    """log snr(u) = -b sgn(0.5 - u) log(1 - 2 |u - 0.5|), b = 0.5; -> (T,).

    Most steps lie near snr = 1, as if log snr were drawn from a Laplace distribution (Hang et al. 2024).
    """
    b = 0.5

    def alpha_bar(u: torch.Tensor) -> torch.Tensor:
        log_snr = -b * (0.5 - u).sign() * (1 - 2 * (u - 0.5).abs()).log()
        return log_snr.sigmoid()  # snr = alpha_bar / (1 - alpha_bar)

    return betas_from_alpha_bar(alpha_bar, T)


def flow(T: int) -> torch.Tensor:
    """snr(u) = ((1 - u) / u)^2, that of flow matching's straight line (1 - u) x_0 + u eps; -> (T,).

    Rectified flow (Liu et al. 2022) is one more noise schedule: dividing the line by sqrt((1 - u)^2 + u^2)
    makes it sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps, and any network and sampler here takes it from
    there.
    """
    return betas_from_alpha_bar(lambda u: (1 - u) ** 2 / ((1 - u) ** 2 + u**2), T)


SCHEDULES = {
    "linear": linear,
    "cosine": cosine,
    "quadratic": quadratic,
    "sigmoid": sigmoid,
    "constant": constant,
    "jsd": jsd,
    "laplace": laplace,
    "flow": flow,
}


# ------------------------------------------------------------------------------------------------------------
# Data sets. A loader `f(root, split) -> Source` says what there is: image files, or arrays, with labels or
# captions. get_data turns a Source into Data: one uint8 array, decoded once and cached. To add one: a
# function, a dict entry.

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
# What files may hold whatever their suffix: no format that Pillow hands to another program, as it does EPS.
IMAGE_FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"]


@dataclass
class Source:
    """Images yet to be made, and what is known of them: files, scenes, uint8 (N, h, w) or (N, h, w, 3)."""

    images: "list[Path] | list[Scene] | np.ndarray"
    labels: list[int] | None = None  # 0-based
    class_names: list[str] | None = None
    captions: list[str] | None = None
    flip: bool = True  # may an image be mirrored and still be what its label or caption says
    image_size: int = 64  # what --image-size and --channels default to
    channels: int = 3
    root: Path | None = None  # the folder that file names are given relative to


@dataclass
class Data:
    """Images (N, C, H, W) uint8 in memory and, where known, labels (N,) int64 (0-based) or N captions."""

    images: torch.Tensor
    labels: torch.Tensor | None = None
    class_names: list[str] | None = None
    captions: list[str] | None = None
    flip: bool = False
    skipped: list[str] = field(default_factory=list)  # the files that could not be read


def image_files(folder: Path, recursive: bool = False) -> list[Path]:
    """The image files of a folder by name, in a fixed order; hidden files are no images."""
    if not folder.is_dir():
        return []
    found = folder.rglob("*") if recursive else folder.iterdir()
    return sorted(
        p
        for p in found
        if p.suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in p.relative_to(folder).parts)
        and p.is_file()
    )


def class_folders(folder: Path) -> list[Path]:
    """The sub-folders of a folder, sorted by name; hidden ones are no classes."""
    return (
        sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
        if folder.is_dir()
        else []
    )


def no_split(dataset: str, split: str) -> UserError:
    return UserError(f"data set {dataset!r} has no split {split!r} here, only 'train'")


def digits(root: Path, split: str) -> Source:
    """The 1797 8x8 digits of UCI's optical recognition set, which the project carries (data/README.md)."""
    if split != "train":
        raise no_split("digits", split)
    with np.load(HERE / "data" / "digits.npz", allow_pickle=False) as file:
        images, labels = file["images"], file["labels"]  # (1797, 8, 8) of 0..16, (1797,)
    images = (images * (255 / 16)).round().astype(np.uint8)
    return Source(images, labels.tolist(), [str(k) for k in range(10)], flip=False, image_size=16, channels=1)


def from_torchvision(name: str, root: Path, **options) -> torch.utils.data.Dataset:
    """A torchvision data set under root, downloaded on first use; UserError where that fails."""
    try:
        return getattr(torchvision.datasets, name)(str(root), download=True, **options)
    except Exception as error:  # of the network, of archives, of parsers: all of them end here
        raise UserError(
            f"{name} is not there, or is damaged, under {root}, and could not be downloaded "
            f"({' '.join(str(error).split())}): check the network, or copy it there, or name its --data-root"
        ) from None


def mnist(root: Path, split: str) -> Source:
    """MNIST: 60000 (test: 10000) handwritten digits, 28x28."""
    data = from_torchvision("MNIST", root, train=split == "train")
    return Source(
        data.data.numpy(),
        data.targets.tolist(),
        [str(k) for k in range(10)],
        flip=False,
        image_size=28,
        channels=1,
    )


def fashion_mnist(root: Path, split: str) -> Source:
    """Fashion-MNIST: 60000 (test: 10000) pieces of clothing, 28x28."""
    data = from_torchvision("FashionMNIST", root, train=split == "train")
    return Source(data.data.numpy(), data.targets.tolist(), list(data.classes), image_size=28, channels=1)


def cifar10(root: Path, split: str) -> Source:
    """CIFAR-10: 50000 (test: 10000) colour photographs of ten kinds, 32x32."""
    data = from_torchvision("CIFAR10", root, train=split == "train")
    return Source(data.data, list(data.targets), list(data.classes), image_size=32)


def imagenette(root: Path, split: str) -> Source:
    """Imagenette: 9469 (test: 3925) photographs of ten easy ImageNet classes, short side 160."""
    part = "train" if split == "train" else "val"
    folder = root / "imagenette2-160"
    if not (folder / part).is_dir():  # some versions of torchvision refuse to "download" what is there
        from_torchvision("Imagenette", root, split=part, size="160px")
    source, all_of_them = labelled_folders(folder / part), 9469 if part == "train" else 3925
    if len(source.images) < all_of_them:
        note(f"{folder / part} holds {len(source.images)} images of {all_of_them}: delete it to get it anew")
    source.class_names = [IMAGENETTE.get(wnid, wnid) for wnid in source.class_names]
    return source


IMAGENETTE = {
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}


def labelled_folders(folder: Path) -> Source:
    """`folder/<class>/**/*.jpg`: labels are the positions of the class names in alphabetical order."""
    classes = [(f.name, image_files(f, recursive=True)) for f in class_folders(folder)]
    classes = [(name, files) for name, files in classes if files]
    files = [p for _, of_class in classes for p in of_class]
    labels = [k for k, (_, of_class) in enumerate(classes) for _ in of_class]
    return Source(files, labels, [name for name, _ in classes], root=folder)


SPLIT_FOLDERS = {"train", "test", "val", "valid", "validation"}


def folder(root: Path, split: str) -> Source:
    """Images in one folder, in one sub-folder a class, as listed with captions in metadata.jsonl, or in one
    .npy file, uint8 (N, h, w, 3) or (N, h, w, 1).
    """
    if root.suffix == ".npy" and split == "train":
        return array_file(root)
    if not root.is_dir():
        raise UserError(f"folder {root} does not exist: name a folder of images with --data-root")
    sub_folders = {f.name for f in class_folders(root) if image_files(f, recursive=True)}
    if "train" in sub_folders and sub_folders <= SPLIT_FOLDERS:  # splits, and not a class of trains
        root = root / split
        if split not in sub_folders:
            raise no_split("folder", split)
    elif split != "train":
        raise no_split("folder", split)
    if (root / "metadata.jsonl").is_file():
        source = captioned_folder(root)
    else:
        flat = image_files(root)
        source = Source(flat, root=root) if flat else labelled_folders(root)
        if flat and class_folders(root):
            note(f"of {root} only the images directly in it are used, not its sub-folders")
    if not source.images:
        raise UserError(f"folder {root} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
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
    except ValueError:
        raise UserError(
            f"{path} is no array of images: it takes uint8, (N, h, w, 3) or (N, h, w, 1)"
        ) from None
    return Source(images, image_size=min(height, width), channels=channels)


def captioned_folder(root: Path) -> Source:
    """Images and captions of `metadata.jsonl`, one JSON object a line with `file_name` and `text`."""
    files, captions = [], []
    text = (root / "metadata.jsonl").read_text(encoding="utf-8-sig", errors="replace")
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            files.append(root / entry["file_name"])
            captions.append(str(entry["text"]))
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{root / 'metadata.jsonl'}, line {number}: expected "
                '{"file_name": "image.png", "text": "a caption"}'
            ) from None
    return Source(files, captions=captions, flip=False, root=root)


CARS_TREES = """accepted, each under --data-root or in a sub-folder of it whose name contains "car":
  torchvision              Kaggle, by classes            Kaggle, doubled          by classes
  cars_train/00001.jpg     names.csv                     cars_train/              train/
  devkit/                  anno_train.csv                  cars_train/00001.jpg     <Class name>/*.jpg
    cars_meta.mat          car_data/car_data/            devkit/                  test/
    train_perfect_preds.txt  train/<Class name>/*.jpg                               <Class name>/*.jpg
                             test/<Class name>/*.jpg
get it (its original address is gone) with one of
  kaggle datasets download -d jutrera/stanford-car-dataset-by-classes-folder --unzip -p data/stanford_cars
  kaggle datasets download -d rickyyyyyyy/torchvision-stanford-cars --unzip -p data"""


def stanfordcars(root: Path, split: str) -> Source:
    """Stanford Cars (Krause et al. 2013): 8144 (test: 8041) cars of 196 classes, in any layout that people
    have it in.

    Labels are the official class numbers less 1 (so 0..195) wherever names.csv, anno_*.csv or the devkit give
    them; captions are made of the class names.
    """
    source = labelled_cars(root, split)
    if source.labels and not any(UNNAMED.fullmatch(source.class_names[k]) for k in source.labels):
        source.captions = [car_caption(source.class_names[k]) for k in source.labels]
    return source


UNNAMED = re.compile(r"class \d+")  # what a class is called whose name is not known


def car_caption(name: str) -> str:
    """What a picture of the class shows: "a photo of a 2012 Audi TT RS Coupe" of "Audi TT RS Coupe 2012"."""
    found = re.fullmatch(r"(.*) (\d{4})", name)
    return f"a photo of a {found[2]} {found[1]}" if found else f"a photo of a {name}"


def labelled_cars(root: Path, split: str) -> Source:
    """The cars with their labels and class names as far as files tell them."""
    images, near = find_cars(root, split)
    source, by_class = Source(image_files(images), root=images), labelled_folders(images)
    names = car_names(near)
    if len(source.images) > len(by_class.images):  # flat: labels by file name
        source.labels = car_labels(source.images, near, split)
        if source.labels:
            source.class_names = names or [f"class {k + 1}" for k in range(max(195, *source.labels) + 1)]
        return source

    source = by_class
    if names:  # a folder for each class: labels by folder name
        number = {car_key(name): k for k, name in enumerate(names)}
        for name in source.class_names:
            if car_key(name) not in number:
                raise UserError(f"{images / name} is no class of names.csv or the devkit: rename or move it")
        source.labels = [number[car_key(source.class_names[k])] for k in source.labels]
        source.class_names = names
    elif labels := car_labels(source.images, near, split):  # labels by file name, class names by folder
        name_of = {new: source.class_names[old] for old, new in zip(source.labels, labels, strict=True)}
        source.labels = labels
        source.class_names = [name_of.get(k, f"class {k + 1}") for k in range(max(195, *labels) + 1)]
    return source


def find_cars(root: Path, split: str) -> tuple[Path, list[Path]]:
    """The folder of Stanford Cars' images, and those where names.csv or devkit/ may lie; else UserError."""
    root, flat = root.absolute(), f"cars_{split}"
    parts = [f"{flat}/{flat}", flat, f"car_data/car_data/{split}", f"car_data/{split}", split]
    bases = [root] + [f for f in class_folders(root) if "car" in f.name.lower()]
    inner = {flat, split, "car_data"}  # --data-root may be one of the tree's own folders
    bases += [root.parent] if root.name in inner else []
    looked_at = [base / part for part in parts for base in bases]
    top = root
    while top.name in inner:
        top = top.parent
    for images in looked_at:
        if image_files(images) or labelled_folders(images).images:
            return images, [p for p in (images, *images.parents) if p.is_relative_to(top)]
    shown = "\n".join(f"  {p}" for p in looked_at)
    raise UserError(f"no Stanford Cars ({split} split) under {root}; looked at\n{shown}\n{CARS_TREES}")


def car_key(name: str) -> str:
    """A class name fit to be compared: "Ram C/V" is the folder "Ram C-V", as folders have no slash."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower())


def car_names(near: list[Path]) -> list[str] | None:
    """The class names in official order, from names.csv or (with scipy) devkit/cars_meta.mat, or None."""
    if path := car_file(near, "names.csv"):
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        return [line.strip().strip('"') for line in lines if line.strip()]
    if (path := car_file(near, "cars_meta.mat")) and (mat := read_mat(path)):
        return [str(name) for name in mat["class_names"]]
    return None


def car_file(near: list[Path], name: str) -> Path | None:
    """The nearest file of that name, in one of the folders or in a devkit in it."""
    places = [place / kit / name for place in near for kit in ("", "devkit", "car_devkit/devkit")]
    return next((p for p in places if p.is_file()), None)


def read_mat(path: Path) -> dict | None:
    """A MATLAB file, or None without scipy."""
    try:
        from scipy.io import loadmat
    except ImportError:
        note(f"{path.name} was not read: that takes `pip install scipy`")
        return None
    try:
        return loadmat(str(path), squeeze_me=True)
    except Exception as error:  # scipy raises almost anything on a file that is none
        note(f"{path} can't be read ({error}) and is left out")
        return None


def car_labels(files: list[Path], near: list[Path], split: str) -> list[int] | None:
    """Official class numbers, less 1, by file name: from anno_*.csv, train_perfect_preds.txt or a .mat."""
    annotations = "cars_train_annos.mat" if split == "train" else "cars_test_annos_withlabels.mat"
    if path := car_file(near, f"anno_{split}.csv"):  # file name, box, class number
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file) if row and row[-1].strip().isdigit()]
        number_of = {Path(row[0]).stem: int(row[-1]) for row in rows}
    elif split == "train" and (path := car_file(near, "train_perfect_preds.txt")):  # line i is of image i
        lines = path.read_text(errors="replace").split()
        if not all(line.isdecimal() for line in lines):
            raise UserError(f"{path} should hold one class number a line, and nothing else")
        number_of = {f"{i:05d}": int(k) for i, k in enumerate(lines, start=1)}
    elif (path := car_file(near, annotations)) and (mat := read_mat(path)):
        number_of = {Path(str(row["fname"])).stem: int(row["class"]) for row in mat["annotations"]}
    else:
        return None
    unknown = [p for p in files if p.stem not in number_of]
    if unknown:
        raise UserError(f"{unknown[0]} and {len(unknown) - 1} more have no class in {path}: move them away")
    return [number_of[p.stem] - 1 for p in files]


# Drawn pictures with captions, for text to image: every scene is made from (seed, index) alone.

COLOURS = {
    "red": (230, 30, 30),
    "green": (20, 170, 40),
    "blue": (40, 70, 240),
    "yellow": (250, 220, 20),
    "purple": (150, 40, 190),
    "orange": (250, 135, 10),
}
BACKGROUNDS = {"white": (255, 255, 255), "black": (0, 0, 0), "gray": (128, 128, 128)}
SHAPES = {  # corners in units of the radius, y down; a circle has none
    "circle": [],
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0, -1), (0.95, 0.8), (-0.95, 0.8)],
    "star": [
        ((1, 0.42)[k % 2] * math.sin(k * math.pi / 5), -(1, 0.42)[k % 2] * math.cos(k * math.pi / 5))
        for k in range(10)
    ],
    "cross": [
        *((-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3)),
        *((0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3), (-1, -0.3), (-0.3, -0.3)),
    ],
}
SIZES = {"small": (0.13, 0.15), "large": (0.2, 0.22)}  # radii, in units of the image
HELD_OUT = {  # pairs that no training image shows: ask for them to see what the model can put together
    *(("green", "circle"), ("yellow", "square"), ("orange", "triangle"), ("red", "star"), ("blue", "cross")),
}


@dataclass(frozen=True)
class Shape:
    """One shape of a scene; radius and centre are in units of the image, the centre from the top left."""

    colour: str
    shape: str
    size: str
    radius: float
    centre: tuple[float, float]

    def draw(self, canvas: ImageDraw.ImageDraw, pixels: int) -> None:
        (x, y), r = self.centre, self.radius
        if corners := SHAPES[self.shape]:
            canvas.polygon(
                [((x + r * u) * pixels, (y + r * v) * pixels) for u, v in corners], COLOURS[self.colour]
            )
        else:
            box = [(x - r) * pixels, (y - r) * pixels, (x + r) * pixels, (y + r) * pixels]
            canvas.ellipse(box, COLOURS[self.colour])


@dataclass(frozen=True)
class Scene:
    """One or two shapes on a background, and the caption that says so."""

    shapes: tuple[Shape, ...]
    background: str
    caption: str

    def draw(self, size: int) -> Image.Image:
        """The picture, RGB, size x size pixels; drawn four times as large and averaged, for smooth edges."""
        picture = Image.new("RGB", (4 * size, 4 * size), BACKGROUNDS[self.background])
        for shape in self.shapes:
            shape.draw(ImageDraw.Draw(picture), 4 * size)
        return picture.reduce(4)


# Of two shapes, on which side of the middle the first one is: right and down.
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}


def make_scene(seed: int, index: int, pairs: Sequence[tuple[str, str]]) -> Scene:
    """The scene of that seed and index, of shapes out of `pairs` of colour and shape.

    Half of the scenes have two shapes, side by side or one above the other. Captions leave out each size, the
    place and the background one time in four, so that short prompts are understood as well.
    """
    rng = np.random.default_rng([seed, index])

    def said(text: str) -> str:
        return text if rng.random() < 0.75 else ""

    def between(low: float, high: float) -> float:
        return round(float(rng.uniform(low, high)), 4)

    def shape_at(x: int, y: int) -> tuple[Shape, str]:
        """A shape on that side (-1, 0 or 1) of the middle, right and down, and what a caption calls it."""
        colour, shape = pairs[rng.integers(len(pairs))]
        size = ["small", "large"][rng.integers(2)]
        radius = between(*SIZES[size])
        # 0.03 from the middle line and 0.01 from the edge, so that two shapes never touch
        centre = tuple(
            0.5 + side * between(0.03 + radius, 0.49 - radius) if side else between(0.45, 0.55)
            for side in (x, y)
        )
        description = f"{said(size + ' ')}{colour} {shape}"
        article = "an" if description.startswith("orange") else "a"
        return Shape(colour, shape, size, radius, centre), f"{article} {description}"

    background = list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    if rng.random() < 0.5:
        x, y = (int(side) for side in rng.integers(-1, 2, 2))
        shape, text = shape_at(x, y)
        sides = [{-1: "top", 1: "bottom"}.get(y), {-1: "left", 1: "right"}.get(x)]
        text += said(f" at the {' '.join(filter(None, sides))}" if x or y else " in the middle")
        shapes = (shape,)
    else:
        relation = list(RELATIONS)[rng.integers(len(RELATIONS))]
        x, y = RELATIONS[relation]
        (first, text), (second, text_2) = shape_at(x, y), shape_at(-x, -y)
        text += f" {said(relation) or 'and'} {text_2}"
        shapes = (first, second)
    return Scene(shapes, background, text + said(f" on {background}"))


def shapes(root: Path, split: str, count: int = 20000) -> Source:
    """`count` drawn scenes of one or two coloured shapes with captions, the same ones every time.

    The pairs in HELD_OUT are in no image of the "train" split, and all that is in "test".
    """
    all_pairs = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    pairs = [pair for pair in all_pairs if (pair in HELD_OUT) == (split == "test")]
    scenes = [make_scene({"train": 0, "test": 1}[split], index, pairs) for index in range(count)]
    return Source(scenes, captions=[scene.caption for scene in scenes], flip=False, image_size=32)


DRAWN = {"shapes"}  # sets without an end: --limit says how many images there are


DATASETS: dict[str, Callable[..., Source]] = {
    "digits": digits,
    "mnist": mnist,
    "fashion_mnist": fashion_mnist,
    "cifar10": cifar10,
    "imagenette": imagenette,
    "stanfordcars": stanfordcars,
    "folder": folder,
    "shapes": shapes,
}
SIMPLE = {"digits", "mnist", "fashion_mnist", "shapes"}  # narrow networks learn these well, and far sooner


def open_image(image: Path | Scene | np.ndarray, size: int) -> Image.Image:
    """The picture of a file, an array, or a scene, which is drawn at size x size."""
    if isinstance(image, Scene):
        return image.draw(size)
    if isinstance(image, np.ndarray):
        return Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
    return Image.open(image, formats=IMAGE_FORMATS)


def upright(image: Path | Scene | np.ndarray, size: int, channels: int, paper: str = "white") -> Image.Image:
    """One image, gray or RGB in 8 bits, upright, laid on paper of a colour; of at least `size` if it was.

    Raises OSError, ValueError or what else Pillow raises on a file that is no image.
    """
    with open_image(image, size) as picture:
        picture.draft(None, (2 * size, 2 * size))  # a large JPEG is decoded at 1/2, 1/4 or 1/8: far faster
        picture.load()  # what is broken in the image is told here;
        with suppress(Exception):  # broken EXIF data do not make it a broken one
            picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith(("I", "F")):  # 16 bits or floats, which convert("L") would cut off at 255
            values = np.asarray(picture).astype(np.float64)
            scale = 255 / 65535 if picture.mode.startswith("I") else (255 if values.max() <= 1 else 1)
            picture = Image.fromarray((values * scale).round().clip(0, 255).astype(np.uint8))
        if picture.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, paper), picture)
        return picture.convert("RGB" if channels == 3 else "L")


def read_image(image: Path | Scene | np.ndarray, size: int, channels: int) -> np.ndarray:
    """One image on white, short side scaled to `size` and center-cropped; -> (C, size, size) uint8.

    Raises what `upright` raises.
    """
    picture = ImageOps.fit(upright(image, size, channels), (size, size), Image.Resampling.BICUBIC)
    return np.asarray(picture).reshape(size, size, channels).transpose(2, 0, 1)


NOT_THE_FILES_FAULT = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO}


CHUNK = 4096  # images decoded before they are written


def decode(source: Source, size: int, channels: int, workers: int) -> Iterator[tuple[np.ndarray, list[int]]]:
    """The images of a source that can be read, in chunks: (M, C, size, size) uint8, and their M positions."""

    def try_read(image: Path | Scene | np.ndarray) -> np.ndarray | None:
        try:
            return read_image(image, size, channels)
        except Exception as error:  # Pillow's decoders raise almost anything on a broken file
            if isinstance(error, MemoryError) or getattr(error, "errno", None) in NOT_THE_FILES_FAULT:
                raise
            return None

    pool = ThreadPoolExecutor(workers)  # threads: Pillow decodes and resizes outside Python's lock
    bar = tqdm(desc="decoding", total=len(source.images), unit="img", leave=False)
    try:
        for start in range(0, len(source.images), CHUNK):
            images, kept = np.empty((CHUNK, channels, size, size), np.uint8), []
            for i, image in enumerate(pool.map(try_read, source.images[start : start + CHUNK]), start):
                bar.update()
                if image is not None:
                    images[len(kept)] = image
                    kept.append(i)
            yield images[: len(kept)], kept
    finally:
        bar.close()
        pool.shutdown(cancel_futures=True)  # so that Ctrl-C need not wait for the rest


def fingerprint(source: Source) -> str:
    """What the pixels are made from: names, sizes and times of the files, arrays, or scenes, hashed."""
    digest = hashlib.sha256(b"1")  # raise this number when read_image or Scene changes what it returns
    if getattr(source.images, "filename", None):  # a mapped file, which may be huge
        stat = os.stat(source.images.filename)
        digest.update(f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}".encode())
    elif isinstance(source.images, np.ndarray):
        digest.update(f"{source.images.shape}".encode())
        digest.update(np.ascontiguousarray(source.images))
    elif isinstance(source.images[0], Scene):
        digest.update(repr((source.images, COLOURS, BACKGROUNDS, SHAPES)).encode())
    else:
        for path in source.images:
            try:
                stat = path.stat()
                made = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
            except (OSError, ValueError):  # listed in metadata.jsonl, but not there
                made = None
            digest.update(f"{os.path.relpath(path, source.root)} {made}\n".encode())
    return digest.hexdigest()[:16]


def decoded(
    source: Source, cache_file: Path, size: int, channels: int, workers: int
) -> tuple[np.ndarray, np.ndarray]:
    """The images of a source, (M, C, size, size) uint8, and the positions (M,) of those that can be read.

    They come from `cache_file`, which is made first if it is not there and whole; a large set is mapped from
    it and may be larger than the memory. Where it can't be written, they are held in memory.
    """
    shape = (len(source.images), channels, size, size)
    found = mapped(cache_file, shape)
    if found is None:
        chunks = partial(decode, source, size, channels, workers)
        try:
            cache_file.parent.mkdir(parents=True, exist_ok=True)
            write_cache(cache_file, shape, chunks())
            found = mapped(cache_file, shape)
        except OSError as error:
            note(f"the decoded images were not cached in {cache_file}: {error.strerror}")
        if found is None:
            images, kept = zip(*chunks(), strict=True)
            found = np.concatenate(images), np.concatenate(kept).astype(np.int64)
    return found


def write_cache(cache_file: Path, shape: tuple[int, ...], chunks: Iterator) -> None:
    """An .npy file of that shape with the decoded images, zeros after them, then their positions (N,)."""
    with replacing(cache_file) as file:
        kept = []
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for images, of_chunk in chunks:
            file.write(images.tobytes())
            kept += of_chunk
        file.truncate(file.tell() + (shape[0] - len(kept)) * math.prod(shape[1:]))
        file.seek(0, os.SEEK_END)
        np.save(file, np.array(kept, dtype=np.int64))


MAPPED = 2**28  # bytes from which on a set is mapped; a smaller one is read, and its file matters no more


def mapped(cache_file: Path, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray] | None:
    """What write_cache wrote, a large set mapped into memory; None where it is not there, or damaged."""
    try:
        images = np.load(cache_file, mmap_mode="c", allow_pickle=False)  # "c": PyTorch wants it writable
        with open(cache_file, "rb") as file:
            file.seek(images.offset + images.nbytes)
            kept = np.load(file, allow_pickle=False)
        if images.shape != shape or images.dtype != np.uint8:
            raise ValueError
        images = images[: len(kept)]
        return (images if images.nbytes > MAPPED else np.array(images)), kept
    except FileNotFoundError:
        return None
    except Exception:  # cut short or damaged, in one of many ways: it is made anew
        note(f"{cache_file} is damaged and is made anew")
        return None


def get_data(
    dataset: str,
    data_root: str | Path = "data",
    split: str = "train",
    image_size: int | None = None,
    channels: int | None = None,
    limit: int | None = None,
    workers: int | None = None,
    cache_dir: str | Path = "data/cache",
) -> Data:
    """A data set of DATASETS as one array, decoded and resized once and cached on disk.

    `limit` takes the first of a fixed shuffle, or says how many are drawn for a set in DRAWN; `image_size` is
    in pixels, `workers` in threads.
    Raises UserError where there is no such data set, split or folder, or no image in it can be read.
    """
    if dataset not in DATASETS:
        raise UserError(f"unknown data set {dataset!r}: choose one of {', '.join(DATASETS)}")
    if split not in ("train", "test"):
        raise UserError(f"unknown split {split!r}: choose train or test")
    drawn = {"count": limit} if dataset in DRAWN and limit else {}
    source = DATASETS[dataset](Path(data_root), split, **drawn)
    if limit is not None and not drawn:
        source = subset(source, np.random.default_rng(0).permutation(len(source.images))[:limit])
    size, channels = image_size or source.image_size, channels or source.channels

    colour = "rgb" if channels == 3 else "gray"
    if is_ready(source.images, size, channels):  # there is nothing to decode, and it may be huge
        images, kept = source.images.transpose(0, 3, 1, 2), np.arange(len(source.images))
    else:
        cache_file = Path(cache_dir) / f"{dataset}_{split}_{size}x{size}_{colour}_{fingerprint(source)}.npy"
        images, kept = decoded(source, cache_file, size, channels, workers or os.cpu_count() or 1)
    skipped = [str(source.images[i]) for i in np.setdiff1d(np.arange(len(source.images)), kept)]
    if skipped:
        note(f"{len(skipped)} unreadable images were skipped:\n  " + "\n  ".join(skipped))
    if not len(images):
        raise UserError(f"none of the {len(skipped)} images of {dataset} under {data_root} can be read")
    source = subset(source, kept) if skipped else source
    labels = None if source.labels is None else torch.tensor(source.labels)
    return Data(torch.from_numpy(images), labels, source.class_names, source.captions, source.flip, skipped)


def is_ready(images: object, size: int, channels: int) -> bool:
    """Whether images are an array mapped from a file that needs no change but the order of its axes."""
    return isinstance(images, np.memmap) and images.shape[1:] == (size, size, channels)


def subset(source: Source, index: np.ndarray) -> Source:
    """The images of a source at the positions `index`, with their labels or captions."""

    def take(values):
        if values is None or isinstance(values, np.ndarray):
            return values if values is None else values[index]
        return [values[i] for i in index]

    return replace(
        source, images=take(source.images), labels=take(source.labels), captions=take(source.captions)
    )


class Loader:
    """Batches of a data set, sliced from its one array: no Python runs per image.

    The order and the flips of an epoch depend on (seed, epoch) alone, so a run can be resumed at any batch of
    any epoch. `y` (N, ...), where given, goes with the images: labels, or captions as tokens. Of several
    processes each gets its share of every batch: images rank, rank + count, ... of it.
    """

    def __init__(
        self,
        images: torch.Tensor,  # (N, C, H, W) uint8
        batch_size: int,
        device: str | torch.device = "cpu",
        y: torch.Tensor | None = None,
        flip: bool = False,
        seed: int = 0,
        processes: "Processes | None" = None,
    ):
        self.batch_size, self.device, self.flip, self.seed = batch_size, torch.device(device), flip, seed
        self.processes = processes or Processes()
        # A set that fits lives where the network does; a larger one is sent over batch by batch.
        self.resident = self.device.type == "cpu" or images.numel() <= room(self.device) / 2
        self.images = images.to(self.device) if self.resident else images
        self.y = None if y is None else y.to(self.images.device)

    def __len__(self) -> int:
        """Batches in an epoch; the last may be smaller."""
        return math.ceil(len(self.images) / self.batch_size)

    def size(self, i: int) -> int:
        """The images in batch i of an epoch, of all processes together."""
        return min(self.batch_size, len(self.images) - i * self.batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Batches of an epoch from number `start` on: x_0 (B, C, H, W) in [-1, 1], and y (B, ...) or None."""
        slices = self.slices(epoch, start)
        for images, y, mirrored in slices if self.resident else ahead(slices):
            x_0 = to_x_0(images.to(self.device, non_blocking=True))
            if self.flip:
                mirrored = mirrored.to(self.device, non_blocking=True)[:, None, None, None]
                x_0 = torch.where(mirrored, x_0.flip(-1), x_0)
            yield x_0, None if y is None else y.to(self.device, non_blocking=True)

    def slices(self, epoch: int, start: int) -> Iterator[tuple[torch.Tensor | None, ...]]:
        """The images (B, C, H, W) uint8 of each batch, y or None, and which to mirror (B,), where they live.

        They are pinned if they have to travel: a copy from such memory does not keep the CPU waiting.
        """
        generator = seeded_generator(self.seed, epoch)
        order = self.shuffled(generator).to(self.images.device)
        mirrored = torch.rand(len(self.images), generator=generator).to(self.images.device) < 0.5
        pin = not self.resident and self.device.type == "cuda"
        for i in range(start, len(self)):
            index = order[i * self.batch_size : (i + 1) * self.batch_size]
            share = self.processes.share(index)
            index = share if len(share) else index[:1]  # something to take part with: it will weigh nothing
            batch = (self.images[index], None if self.y is None else self.y[index], mirrored[index])
            yield tuple(part.pin_memory() if pin and part is not None else part for part in batch)

    def shuffled(self, generator: torch.Generator) -> torch.Tensor:
        """The positions (N,) of the images in a random order.

        A large set is read from its file, which takes long one image here and one there: it is cut into
        stretches, 256 of which, drawn at random, are shuffled into one another at a time.
        """
        if self.images.numel() <= MAPPED:
            return torch.randperm(len(self.images), generator=generator)
        stretches = torch.arange(len(self.images)).split(64)
        drawn = [stretches[i] for i in torch.randperm(len(stretches), generator=generator)]
        mixed = [torch.cat(drawn[i : i + 256]) for i in range(0, len(drawn), 256)]
        return torch.cat([part[torch.randperm(len(part), generator=generator)] for part in mixed])


def room(device: torch.device) -> float:
    """The bytes that are free on a GPU, or all of a CPU's; 8 GB where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    told = device.type == "cpu" and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {})
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if told else 8e9


def ahead(items: Iterator, depth: int = 2) -> Iterator:
    """The same items, made in a thread of their own while the last ones are used, at most `depth` ahead."""
    with ThreadPoolExecutor(1) as thread:
        waiting = deque(thread.submit(next, items, None) for _ in range(depth))
        while (item := waiting.popleft().result()) is not None:
            waiting.append(thread.submit(next, items, None))
            yield item


def hold_out(count: int, seed: int, task: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The positions of a tenth of `count` images, up to 1000, to test on, and of the rest."""
    if count < 2:
        raise UserError(f"{task} takes two images or more, one of them to test it on")
    order = torch.randperm(count, generator=seeded_generator(seed))
    return order.tensor_split([min(1000, math.ceil(count / 10))])


def seeded_generator(*seed: int) -> torch.Generator:
    """A CPU generator whose stream depends on all the numbers given: (0, 1) and (1, 0) differ."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))


# ------------------------------------------------------------------------------------------------------------
# Files: nothing that is there is overwritten, save by a whole new version of itself.


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to that takes the place of `path` in one step at the end; `path` is always whole."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # on the disk before the name points to it
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and not error.filename:  # a full disk does not say which file
            error.filename = str(path)
        raise


def new_path(path: Path, suffix: str = "") -> Path:
    """`path`, or if that is taken, the first of path_2, path_3, ... that is free (before the suffix)."""
    candidate, number = path, 2
    while candidate.exists():
        candidate = path.with_name(f"{path.name.removesuffix(suffix)}_{number}{suffix}")
        number += 1
    return candidate


def digest(array: torch.Tensor) -> str:
    """A hash of an array's shape and bytes: equal for equal data sets.

    Of more than 1 GiB it sees 1 GiB, evenly spread: reading all of a large set takes minutes.
    """
    found = hashlib.sha256(str(tuple(array.shape)).encode())
    every = max(1, math.ceil(array.numel() * array.element_size() / 2**30))
    for part in array[::every].split(256):
        found.update(part.contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write a checkpoint in one step; UserError where that fails, and the previous one is still whole."""
    buffer = io.BytesIO()  # torch.save straight to a full disk may abort the process
    torch.save(checkpoint, buffer)
    try:
        with replacing(path) as file:
            file.write(buffer.getbuffer())
    except OSError as error:
        left = "the previous checkpoint is untouched" if path.is_file() else "there is no checkpoint yet"
        raise UserError(
            f"can't write {path}: {error.strerror}; {left}: make room, or choose another --runs"
        ) from None


CHECKPOINT_KEYS = ("config", "net", "ema", "optimizer", "epoch", "step", "loss_sum", "rng", "data")


def load_checkpoint(path: str | Path, *kinds: str) -> dict:
    """Read a run's checkpoint (its folder, or the file) of a kind wanted onto the CPU, never running code
    from it.

    Raises UserError where it is missing, damaged, no checkpoint of this project or of another kind.
    """
    path = checkpoint_file(path)
    checkpoint = read_pickle(path, "use a ckpt.pt that this project wrote")
    if not isinstance(checkpoint, dict) or "kind" not in checkpoint:
        raise UserError(f"{path} is no checkpoint of this project (a ckpt.pt from a folder of runs/ is)")
    if checkpoint["kind"] not in kinds:
        needed = " or ".join([f"a {kinds[0]!r} one is needed here", *map(repr, kinds[1:])])
        raise UserError(f"{path} is a checkpoint of kind {checkpoint['kind']!r}; {needed}")
    missing = [key for key in CHECKPOINT_KEYS if key not in checkpoint]
    if missing or not isinstance(checkpoint["config"], dict):
        raise UserError(f"checkpoint {path} is incomplete: it lacks {', '.join(missing) or 'settings'}")
    return checkpoint


def read_pickle(path: Path, instead: str) -> object:
    """What torch.save wrote, read onto the CPU without running code; UserError says what to use `instead`."""
    try:
        with warnings.catch_warnings():  # about foreign files, which are refused below
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"checkpoint {path} can't be read: {error.strerror}") from None
    except Exception as error:  # torch, zipfile and pickle each have their own
        unsafe = isinstance(error, pickle.UnpicklingError) and "weights" in str(error).lower()
        why = (
            "it holds Python objects, which could run code" if unsafe else "it is damaged or no PyTorch file"
        )
        raise UserError(f"checkpoint {path} was not loaded: {why}; {instead}") from None


def checkpoint_file(path: str | Path) -> Path:
    """The ckpt.pt that a run's folder, or the file itself, names; UserError where there is none."""
    path = Path(path)
    file = path / "ckpt.pt" if path.is_dir() else path
    if not file.is_file():
        if path.is_dir() and (path / "config.json").is_file():
            names = " or ".join(("ckpt.pt", *PUBLISHED_FILES))
            raise UserError(f"{path} holds no weights: there is no {names}")
        raise UserError(
            f"no checkpoint {file}: name a run's folder, such as runs/ddpm_digits, or its ckpt.pt"
        )
    return file


def run_folder(path: str | Path) -> Path:
    """Where what is made with a checkpoint is kept: its run's folder, or runs/NAME for published weights."""
    file = published_file(path)
    return Path("runs") / published_name(file.parent) if file else checkpoint_file(path).parent


def published_name(folder: Path) -> str:
    """What a folder of published weights is called, that of the pipeline where it is its unet/."""
    folder = Path(os.path.abspath(folder))
    return folder.parent.name if folder.name == "unet" else folder.name


# ------------------------------------------------------------------------------------------------------------
# Published weights: DDPMs in the form of google/ddpm-cifar10-32 and its like, a folder with config.json and
# diffusion_pytorch_model.safetensors or .bin.

PUBLISHED_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")

PUBLISHED_NAMES = (  # a pattern in their names, old and new ones of attention, and what stands there in ours
    (r"time_embedding\.linear_1\.", "time_mlp.0."),
    (r"time_embedding\.linear_2\.", "time_mlp.2."),
    (r"(down|up)_blocks\.(\d+)\.(down|up)samplers\.0\.", r"\1sample.\2."),
    (r"(down|up)_blocks\.(\d+)\.resnets\.(\d+)\.", r"\1.\2.\3.block."),
    (r"(down|up)_blocks\.(\d+)\.attentions\.(\d+)\.", r"\1.\2.\3.attention."),
    (r"mid_block\.resnets\.(\d+)\.", r"middle.\1.block."),
    (r"mid_block\.attentions\.0\.", "middle.0.attention."),
    (r"\.time_emb_proj\.", ".time."),
    (r"\.conv_shortcut\.", ".shortcut."),
    (r"\.attention\.group_norm\.", ".attention.norm."),
    (r"\.attention\.(query|to_q)\.", ".attention.q."),
    (r"\.attention\.(key|to_k)\.", ".attention.k."),
    (r"\.attention\.(value|to_v)\.", ".attention.v."),
    (r"\.attention\.(proj_attn|to_out\.0)\.", ".attention.out."),
    (r"^conv_norm_out\.", "norm_out."),
)

PUBLISHED_FIELDS = {  # of config.json, with the values that make the network ours
    "_class_name": "UNet2DModel",
    "act_fn": "silu",
    "add_attention": True,
    "attn_norm_num_groups": None,
    "center_input_sample": False,
    "class_embed_type": None,
    "downsample_padding": 0,
    "downsample_type": "conv",
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "mid_block_scale_factor": 1,
    "num_class_embeds": None,
    "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional",
    "upsample_type": "conv",
}
PUBLISHED_SCHEDULER = {  # the same of scheduler_config.json
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "trained_betas": None,
}


def published_file(path: str | Path) -> Path | None:
    """The weights file of a published network that `path`, it or its folder, names; None if it names none."""
    path = Path(path)
    if path.is_dir() and not (path / "ckpt.pt").is_file():
        folders = (path, path / "unet")  # a whole pipeline keeps the network in unet/
        return next((f / name for f in folders for name in PUBLISHED_FILES if (f / name).is_file()), None)
    return path if path.is_file() and path.suffix in (".safetensors", ".bin") else None


def load_published(file: Path) -> tuple[dict, dict[str, tuple[str, torch.Tensor]]]:
    """Settings, in the terms of our runs, and weights {our name: (their name, value)} of published weights.

    Noise is the published DDPMs': T = 1000, `linear`, eps. A field that a config.json leaves out counts as
    it is in theirs. Raises UserError where it describes another network or noise, or a file is damaged.
    """
    config = published_config(file.parent / "config.json")
    for folder in (file.parent, file.parent / ".." / "scheduler"):
        if (folder / "scheduler_config.json").is_file():
            path = folder / "scheduler_config.json"
            check_fields(path, read_json(path), PUBLISHED_SCHEDULER)
    weights = read_safetensors(file) if file.suffix == ".safetensors" else read_pickle(file, "get it again")
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and isinstance(w, torch.Tensor) for name, w in weights.items()
    ):
        raise UserError(f"{file} holds no weights: get it again")
    return config, {our_name(name): (name, as_convolution(name, w)) for name, w in weights.items()}


def published_config(path: Path) -> dict:
    """The settings that a config.json describes, in the terms of our runs; UserError names what differs."""
    theirs = read_json(path)
    needed = ("block_out_channels", "down_block_types", "in_channels", "layers_per_block", "sample_size")
    for name in needed:
        if name not in theirs:
            raise UserError(f"{path} lacks {name}: it does not describe a network of this kind")
    theirs = {"norm_num_groups": 32, "norm_eps": 1e-6, "attention_head_dim": None, **theirs}
    widths, down, channels, blocks, size = (theirs[name] for name in needed)
    groups, eps, head = (theirs[name] for name in ("norm_num_groups", "norm_eps", "attention_head_dim"))

    def numbers(*values: object) -> bool:
        return all(type(value) is int and 0 < value < 2**16 for value in values)

    def need(name: str, fits: object, what: str) -> None:
        check_fields(path, theirs, {name: theirs[name] if fits else what})

    need("block_out_channels", isinstance(widths, list) and widths and numbers(*widths), "whole numbers")
    need("norm_num_groups", numbers(groups), "a whole number")
    need("norm_eps", type(eps) is float and 0 < eps < 1, "a number such as 1e-6")
    need("layers_per_block", numbers(blocks), "a whole number")
    need("in_channels", channels in (1, 3) and numbers(channels), "3, or 1 for gray images")
    multiples = all(width % widths[0] == 0 and width % groups == 0 for width in widths)
    need("block_out_channels", multiples, "multiples of the first and of norm_num_groups")
    divisor = 2 ** (len(widths) - 1)
    need("sample_size", numbers(size) and size % divisor == 0, f"a number divisible by {divisor}")
    need("down_block_types", isinstance(down, list) and len(down) == len(widths), "a type for each level")

    attention = [level for level, kind in enumerate(down) if level and kind == "AttnDownBlock2D"]
    kinds = ["Attn" * (level in attention) for level in range(len(widths))]
    one_head = {widths[level] for level in (*attention, -1)} == ({head} if numbers(head) else None)
    wanted = {
        **PUBLISHED_FIELDS,
        "attention_head_dim": head if one_head else None,  # one head may be told by its width
        "down_block_types": [f"{kind}DownBlock2D" for kind in kinds],
        "up_block_types": [f"{kind}UpBlock2D" for kind in kinds[::-1]],
        "out_channels": channels,
    }
    check_fields(path, theirs, wanted)
    return {
        **{"kind": "published", "name": published_name(path.parent), "dataset": None, "class_names": None},
        **{"image_size": size, "channels": channels, "width": widths[0], "blocks": blocks},
        **{"multipliers": [width // widths[0] for width in widths], "attention": attention, "dropout": 0.0},
        **{"norm_groups": groups, "norm_eps": eps, "sampler": "ddim"},
        **{"noise_steps": 1000, "schedule": "linear", "prediction": "eps", "weighting": None},
    }


def check_fields(path: Path, theirs: dict, wanted: dict) -> None:
    """UserError for the first field that is there and not as wanted."""
    for name, value in wanted.items():
        if theirs.get(name, value) != value:
            what = f"{path}: {name} is {json.dumps(theirs[name])}"
            raise UserError(f"{what}; the network here is the one with {json.dumps(value)}")


def read_json(path: Path) -> dict:
    """An object in a JSON file; UserError where there is none."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing: weights need the config.json that was published with them"
        ) from None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: get it again")
    return found


def our_name(name: str) -> str:
    """The name in our UNet of a weight of the published one."""
    for pattern, ours in PUBLISHED_NAMES:
        name = re.sub(pattern, ours, name)
    return name


def as_convolution(name: str, weight: torch.Tensor) -> torch.Tensor:
    """Attention's linear layers (C, C) as the 1x1 convolutions that they are here, (C, C, 1, 1)."""
    return weight[:, :, None, None] if "attentions" in name and weight.ndim == 2 else weight


SAFETENSORS_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors file; UserError where it is damaged, or holds anything but floats.

    Eight bytes hold the length of a JSON header {name: {"dtype", "shape", "data_offsets": [begin, end]}},
    which follows; after it come the numbers.
    """
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
        ends = [start + entry["data_offsets"][1] for entry in header.values()]
        if max(ends) > len(data):
            raise UserError(f"{path} is truncated, {len(data)} of {max(ends)} bytes: get it again")
        return {name: read_tensor(data, start, entry) for name, entry in header.items()}
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError):
        why = "truncated" if len(data) < start else "damaged, or holds no plain tensors"
        raise UserError(f"{path} is {why}: get it again") from None


def read_tensor(data: bytes, start: int, entry: dict) -> torch.Tensor:
    """The tensor that an entry of a safetensors header describes, its data counted from `start`."""
    begin, end = (start + offset for offset in entry["data_offsets"])
    if begin < start:
        raise ValueError("a negative offset")
    values = torch.frombuffer(bytearray(data[begin:end]), dtype=SAFETENSORS_TYPES[entry["dtype"]])
    return values.reshape(entry["shape"]).float()


class Log:
    """log.csv, a row an epoch; rows later than `step` are dropped, for those steps will be taken again."""

    COLUMNS = ("epoch", "step", "loss", "lr", "images_per_second", "seconds")

    def __init__(self, path: Path, step: int):
        self.path, rows = path, []
        if path.is_file():
            with open(path, newline="") as file:
                rows = [
                    row for row in csv.reader(file) if row[1:] and row[1].isdigit() and int(row[1]) <= step
                ]
        with replacing(path) as file:
            file.write("".join(f"{','.join(row)}\n" for row in [self.COLUMNS, *rows]).encode())

    def add(self, epoch: int, step: int, loss: float, lr: float, images: int, started: float) -> None:
        seconds = time.monotonic() - started
        with open(self.path, "a") as file:
            file.write(f"{epoch},{step},{loss:.6f},{lr:.3e},{images / seconds:.1f},{seconds:.2f}\n")


def log_levels(path: Path, columns: Sequence[str], epoch: int, levels: Sequence[Sequence[object]]) -> None:
    """Add what was measured at each noise level after an epoch to a CSV, in the place of later epochs."""
    earlier = []
    if path.is_file():
        with open(path, newline="") as file:
            earlier = [row for row in csv.reader(file) if row and row[0].isdigit() and int(row[0]) < epoch]
    rows = [("epoch", *columns), *earlier, *((epoch, *level) for level in levels)]
    with replacing(path) as file:
        file.write("".join(f"{','.join(map(str, row))}\n" for row in rows).encode())


def to_x_0(images: torch.Tensor) -> torch.Tensor:
    """uint8 images (B, C, H, W) -> [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(x: torch.Tensor) -> np.ndarray:
    """Images in [-1, 1] (B, C, H, W) -> rounded to uint8 (B, H, W, C) on the CPU."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def resized(file: str, before: tuple[int, int], size: int) -> str:
    """What happens to an image of another size, to be told."""
    crop = "" if before[0] == before[1] else "cropped to a square and "
    return f"{file}, {before[0]}x{before[1]}, is {crop}resized to {size}x{size}"


def read_images(files: Sequence[str], size: int, channels: int) -> torch.Tensor:
    """The user's images in [-1, 1] (B, C, size, size), with a note where they had another size."""
    images = []
    for file in files:
        try:
            with open_image(Path(file), size) as picture:
                before = picture.size
            images.append(torch.from_numpy(read_image(Path(file), size, channels).copy()))
        except FileNotFoundError:
            raise UserError(f"--image {file}: there is no such file") from None
        except Exception as error:  # Pillow's decoders raise almost anything on a broken file
            raise UserError(f"--image {file} can't be read as an image: {error}") from None
        if before != (size, size):
            note(resized(file, before, size))
    return to_x_0(torch.stack(images))


def diversity(x: torch.Tensor, y: torch.Tensor) -> float | None:
    """Mean distance between two images of one class, rms per pixel of [0, 1]; x (B, C, H, W), y (B,).

    None where no class has two.
    """
    distances = torch.cat([torch.pdist(x[y == k].flatten(1) / 2) for k in y.unique()])
    return (distances / x[0].numel() ** 0.5).mean().item() if len(distances) else None


def saturation(x: torch.Tensor) -> float:
    """The share of values at the ends of the range, which a file saves as 0 or 255."""
    return (x.abs() >= 1 - 1 / 255).double().mean().item()


def to_pictures(x: torch.Tensor) -> list[Image.Image]:
    """Images in [-1, 1] (B, C, H, W) -> B Pillow images, gray where C = 1."""
    return [Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image) for image in to_uint8(x)]


LINE = 16  # pixels from one line of text to the next


def make_grid(
    x: torch.Tensor,
    caption: str = "",
    columns: int | None = None,
    rows: Sequence[str] = (),
    heads: Sequence[str] = (),
) -> Image.Image:
    """Images in [-1, 1] (B, C, H, W) side by side, about square unless `columns` is given, under a caption.

    Small images are enlarged by a whole number, so that their pixels can be seen. `rows` are written beside
    the rows, `heads` above equal shares of the columns.
    """
    columns = columns or math.ceil(len(x) ** 0.5)
    gap = 2
    height, width = x.shape[-2:]
    zoom = max(1, round(64 / max(height, width)))
    cell_w, cell_h = width * zoom + gap, height * zoom + gap
    left = row_label_width(rows, cell_h)
    lines = wrap(caption, left + columns * cell_w - 2 * gap)
    span = columns * cell_w // max(1, len(heads))  # pixels under one head
    head_lines = [wrap(head, span) for head in heads]
    top = gap + LINE * (len(lines) + max(map(len, head_lines), default=0))
    bottom = top + math.ceil(len(x) / columns) * cell_h
    grid = Image.new("RGB", (left + columns * cell_w + gap, bottom + (gap if lines else 0)), "white")

    def write(texts: list[str], x: int, y: int) -> None:
        for i, text in enumerate(texts):
            ImageDraw.Draw(grid).text((x, y + LINE * i), text, "black", font())

    write(lines, 2 * gap, gap)
    for i, texts in enumerate(head_lines):
        write(texts, left + gap + i * span, gap + LINE * len(lines))
    for i, row in enumerate(rows):
        write(wrap(row, left - 4 * gap), 2 * gap, top + i * cell_h + gap)
    for i, picture in enumerate(to_pictures(x)):
        picture = picture.resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
        grid.paste(picture, (left + gap + i % columns * cell_w, top + i // columns * cell_h))
    return grid


def row_label_width(rows: Sequence[str], height: int) -> int:
    """The pixels needed beside rows of that height for the longest of their labels; 0 without labels."""
    fits = (
        w
        for w in range(20, 10**5, 10)
        if all(LINE * len(wrap(row, w)) <= height for row in rows)
        and all(font().getlength(line) <= w for row in rows for line in wrap(row, w))
    )
    return next(fits) + 8 if any(rows) else 0


@cache
def font() -> ImageFont.ImageFont:
    return ImageFont.load_default()


def wrap(text: str, width: int, face: ImageFont.ImageFont | None = None) -> list[str]:
    """`text` broken into lines that are at most `width` pixels wide (a single word may be wider)."""
    lines, face = [], face or font()
    for word in text.encode("latin-1", "replace").decode("latin-1").split():  # what Pillow's own font has
        if lines and face.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def save_picture(picture: Image.Image, path: Path, **options) -> Path:
    """Write a Pillow image in one step, in the format of its suffix; -> the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        picture.save(file, format=path.suffix[1:].upper(), **options)
    return path


def save_animation(frames: list[Image.Image], path: Path) -> Path:
    """Write Pillow images of one size as a GIF of about four seconds that rests on its last; -> the path."""
    durations = [max(20, 4000 // len(frames))] * (len(frames) - 1) + [2000]  # milliseconds
    return save_picture(frames[0], path, save_all=True, append_images=frames[1:], duration=durations, loop=0)


# ------------------------------------------------------------------------------------------------------------
# Several processes. `torchrun --nproc_per_node=N SCRIPT ...` starts N of them, numbers them by RANK and ends
# them all when one ends; here is all that the scripts know of each other.


@dataclass(frozen=True)
class Processes:
    """The processes of a run, this one's number among them, and what they do together: one if alone."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.rank == 0

    def share(self, items):
        """What this process has of a sequence or a tensor: items rank, rank + count, ..."""
        return items[self.rank :: self.count]

    def add(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of x over all processes; in place."""
        if self.count > 1:
            torch.distributed.all_reduce(x)
        return x

    def any(self, *here: bool) -> list[bool]:
        """For each of some questions, whether any process says yes."""
        if self.count == 1:
            return list(here)
        return (self.add(torch.tensor(here, dtype=torch.int32)) > 0).tolist()

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            torch.distributed.barrier()

    def told(self, value: object) -> object:
        """What the first process has for `value`."""
        if self.count == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box)
        return box[0]

    @contextmanager
    def first_goes_first(self) -> Iterator[None]:
        """A block that the first process, then the first of each machine, is through with before the others
        begin: they find its files.
        """
        turn = 0 if self.first else 1 if int(os.environ.get("LOCAL_RANK", 0)) == 0 else 2
        for _ in range(turn):
            self.wait()
        yield
        for _ in range(2 - turn):
            self.wait()


PATIENCE = timedelta(hours=2)  # how long the others wait for the first process: it decodes, draws previews


def join_processes(device: torch.device) -> Processes:
    """Meet the other processes that torchrun started, if it started this one.

    UserError where PyTorch lacks what they talk by, or there are more of them than GPUs.
    """
    count = int(os.environ.get("WORLD_SIZE", 1))
    if count == 1:
        return Processes()
    talk = torch.distributed
    backends = {"cpu": ["gloo"], "cuda": ["nccl", "gloo"]}.get(device.type)  # gloo keeps no GPU waiting
    if not backends:
        raise UserError(f"processes on {device.type} can't talk to each other: use one, or --device cpu")
    for backend in backends:
        if not talk.is_available() or not getattr(talk, f"is_{backend}_available")():
            instead = "; --device cpu needs gloo instead" if backend == "nccl" else ""
            raise UserError(
                f"this PyTorch has no {backend}, by which processes on {device.type} talk{instead}"
            )
    if not talk.is_initialized():
        try:
            store, rank, count = meeting_place()
            by = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"  # by where a tensor is
            talk.init_process_group(by, store=store, rank=rank, world_size=count, timeout=PATIENCE)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"the {count} processes could not meet: {first_line(error)}") from None
    return Processes(talk.get_rank(), talk.get_world_size())


def meeting_place() -> tuple[torch.distributed.Store, int, int]:
    """A store in which the processes of this start find each other; -> it, this one's rank, their number.

    The one that torchrun has for them outlives its restarts, with the addresses of the dead in it (PyTorch's
    issue 135712). So the first process opens one of its own, and says there on which port; one where nobody
    answers is of an earlier start.
    """
    told, rank, count = next(torch.distributed.rendezvous("env://", timeout=PATIENCE))
    store_at = partial(torch.distributed.TCPStore, os.environ["MASTER_ADDR"], timeout=PATIENCE)
    if rank == 0:
        store = store_at(0, is_master=True, wait_for_workers=False)
        told.set("port", str(store.port))
        return store, rank, count
    while True:
        port = int(told.get("port"))
        try:
            socket.create_connection((os.environ["MASTER_ADDR"], port), 3).close()
        except OSError:
            time.sleep(0.1)
        else:
            return store_at(port), rank, count


class OwnError(UserError):
    """An error of one process, which the others need not have."""


class LostProcess(OwnError):
    """Another process of the run has ended."""


def is_lost(error: BaseException) -> bool:
    """Whether an error says that another process of ours could not be reached."""
    names = ("gloo", "nccl", "connection closed", "connection reset", "c10d")
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    return together and any(name in str(error).lower() for name in names)


def launch_name() -> str | None:
    """What stays the same when torchrun starts its processes again; None without it."""
    job = os.environ.get("TORCHELASTIC_RUN_ID")
    return job and f"{job} {socket.gethostname()} {os.getppid()}"


def restarted() -> bool:
    """Whether torchrun has started the processes of this machine again, after one died (--max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:300]


# ------------------------------------------------------------------------------------------------------------
# Command-line plumbing


def progress(what: str, total: int) -> tqdm:
    """A progress bar of network evaluations, image by image."""
    every = 0.2 if sys.stderr.isatty() else 30
    return tqdm(desc=what, total=total, unit="image", unit_scale=True, mininterval=every, leave=False)


def get_device(name: str = "auto") -> torch.device:
    """The device of that name, "auto" being the best of cuda, mps and cpu; UserError if it is not there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    kind, _, index = name.partition(":")
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if kind == "cuda" and available["cuda"] and here > 1:  # of several processes on a machine each has a GPU
        if index:
            raise UserError(f"{here} processes can't share {name}: leave the number out, each takes its own")
        if here > gpus:
            raise UserError(f"{here} processes for {gpus} GPUs: lower --nproc_per_node, or use --device cpu")
        index = os.environ["LOCAL_RANK"]
        name = f"cuda:{index}"
    if kind not in available or (index and not index.isdigit()):
        raise UserError(f"unknown device {name!r}: choose auto, cpu, cuda, cuda:1, ... or mps")
    if not available[kind] or (kind == "cuda" and int(index or 0) >= gpus):
        raise UserError(f"device {name!r} is not available on this machine: use --device auto or cpu")
    if kind == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, where there is such a unit
        torch.backends.cudnn.benchmark = True  # all batches but the last of an epoch have one shape
        if index:
            torch.cuda.set_device(int(index))  # CUDA graphs are recorded on the current device
    return torch.device(name)


class HelpFormatter(argparse.HelpFormatter):
    """One flag a line with its default, wide enough to read."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34, width=120)

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default is None or action.default is False or action.default is argparse.SUPPRESS:
            return action.help
        if "default" in action.help:
            return action.help
        between = " " if action.nargs else ","  # as they are typed
        several = isinstance(action.default, (list, tuple))
        default = between.join(map(str, action.default)) if several else "%(default)s"
        return f"{action.help} (default: {default})"


class Parser(argparse.ArgumentParser):
    """argparse with defaults in its help, errors of one line, and the flags really typed in `args.typed`."""

    def __init__(self, **options):
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        sys.exit(fail(f"{self.prog}: error: {message} (see {self.prog} --help)"))

    def parse_args(self, args: Sequence[str] | None = None) -> argparse.Namespace:
        namespace = super().parse_args(args)
        defaults = [(action, action.default) for action in self.every_action()]
        for action, _ in defaults:
            action.default = argparse.SUPPRESS
        namespace.typed = set(vars(super().parse_args(args)))
        for action, default in defaults:
            action.default = default
        return namespace

    def every_action(self) -> Iterator[argparse.Action]:
        """Its flags and arguments, and those of its sub-commands."""
        for action in self._actions:
            yield action
            if isinstance(action.choices, dict):
                for parser in action.choices.values():
                    yield from parser.every_action()


def number(kind: type, low: float, high: float = math.inf, above: bool = False) -> Callable[[str], float]:
    """An argparse type: a number of the kind int or float in [low, high], or in (low, high] if `above`."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
            if low <= value <= high and math.isfinite(value) and not (above and value == low):
                return value
        except ValueError:
            pass
        name = "a whole number" if kind is int else "a number"
        span = f"above {low:g}" if above else f"of at least {low:g}"
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected {name} {span}" + (f", at most {high:g}" if high < math.inf else "")
        )

    return parse


def whole(low: int) -> Callable[[str], float]:
    return number(int, low)


def real(low: float, high: float = math.inf, above: bool = False) -> Callable[[str], float]:
    return number(float, low, high, above)


def listed(kind: Callable[[str], object]) -> Callable[[str], list]:
    """An argparse type: values of that kind with commas between them."""

    def parse(text: str) -> list:
        values = [kind(part.strip()) for part in text.split(",") if part.strip()]
        if not values:
            raise argparse.ArgumentTypeError(f"{text!r}: expected values with commas between them")
        return values

    return parse


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=list(DATASETS), default="digits", metavar="NAME", help="one of %(choices)s")
    add("--data-root", default="data", metavar="DIR", help="where the data set is, or is downloaded to")
    add("--image-size", type=whole(1), metavar="PIXELS", help="height and width (default: by data set)")
    add("--channels", type=int, choices=[1, 3], help="1 gray, 3 RGB (default: by data set)")
    add(
        "--limit",
        type=whole(1),
        metavar="N",
        help="use the first N images of a fixed shuffle (default: all); for shapes draw N (default: 20000)",
    )
    mirror = "mirror images at random, one in two (default: yes, save for digits and captions)"
    add("--flip", action=argparse.BooleanOptionalAction, help=mirror)
    add("--workers", type=whole(1), metavar="N", help="threads that decode images (default: one per core)")
    add("--cache-dir", default="data/cache", metavar="DIR", help="where decoded images are kept")


def add_network_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("network (defaults: by image size)").add_argument
    add("--width", type=whole(4), metavar="N", help="channels at full resolution")
    add("--multipliers", type=whole(1), nargs="+", metavar="M", help="of the width, one for each level")
    add("--blocks", type=whole(1), metavar="N", help="residual blocks in each level")
    add(
        "--attention",
        type=int,
        nargs="*",
        metavar="LEVEL",
        help="levels with attention; 1 is half resolution",
    )
    add("--dropout", type=real(0, 1), default=0.0, metavar="P", help="probability of dropping a feature")


def add_machine_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="of every random draw")


def flag(dest: str) -> str:
    return "--" + dest.replace("_", "-")


@contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C (or SIGTERM) sets, to stop between two steps; a second one cuts in."""
    stop = threading.Event()

    def handle(signum: int, frame: object) -> None:
        if stop.is_set() and signum == signal.SIGTERM and "LOCAL_RANK" in os.environ:
            return  # torchrun passes on a Ctrl-C that its processes have had from the terminal
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        print("\nstopping after this step (once more to stop at once) ...", file=sys.stderr)

    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield stop
        return
    before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


class Stopped(KeyboardInterrupt):
    """Training was stopped by a signal, and saved."""


def merge_config(args: argparse.Namespace, config: dict, free: set[str]) -> argparse.Namespace:
    """The settings of a run that goes on: its own, save for typed flags in `free`; UserError for others."""
    for dest in sorted(args.typed - free):
        if getattr(args, dest) != config.get(dest):
            raise UserError(
                f"the run was made with {flag(dest)} {config.get(dest)}, not {getattr(args, dest)}: "
                "leave the flag out, or start afresh"
            )
    typed = {dest: getattr(args, dest) for dest in args.typed}
    return argparse.Namespace(**{**vars(args), **config, **typed})


def run_main(main: Callable[[], None]) -> None:
    """Run a script's main(): an error that its user can put right is one line on stderr and exit status 2.

    Of several processes on a machine the first one speaks; the others tell only an OwnError.
    """
    name, silent = Path(sys.argv[0]).name, int(os.environ.get("LOCAL_RANK", 0)) > 0
    try:
        with ExitStack() as quiet:
            if silent:
                nowhere = quiet.enter_context(open(os.devnull, "w"))
                quiet.enter_context(redirect_stdout(nowhere))
                quiet.enter_context(redirect_stderr(nowhere))
            main()
    except LostProcess as error:
        os._exit(fail(f"{name}: error: {error}"))  # at once: to take leave of the others could take for ever
    except UserError as error:
        told = not silent or isinstance(error, OwnError)
        sys.exit(fail(f"{name}: error: {error}") if told else 2)
    except (RuntimeError, MemoryError) as error:
        if is_lost(error):
            os._exit(2 if silent else fail(f"{name}: error: another process has ended, and so does this one"))
        if not out_of_memory(error):
            raise
        sys.exit(fail(f"{name}: error: out of memory: lower --batch-size, --image-size or --width"))
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        sys.exit(
            fail(f"{name}: error: {error.strerror or error}{where} (is there room, and may you write there?)")
        )
    except KeyboardInterrupt:
        if not silent:
            print(f"{name}: stopped", file=sys.stderr)
        sys.exit(130)
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says so: that of a GPU, Python's own, or what PyTorch says of the CPU's memory."""
    named = isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError))
    return named or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def fail(message: str) -> int:
    print(message, file=sys.stderr)
    return 2
