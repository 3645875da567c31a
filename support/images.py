"""Image files, arrays and drawn scenes to uint8 arrays, and tensors back to pictures."""

import errno
import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from .errors import UserError, is_out_of_memory, note
from .files import damage
from .scenes import Scene

READ = ".jpg .jpeg .jpe .jfif .png .webp .bmp .gif .tif .tiff .ppm .pgm .pbm .pnm .avif"
IMAGE_SUFFIXES = {*READ.split(), *".heic .heif .jxl .jp2 .tga .ico .svg .psd".split()}  # to be told of
IMAGE_FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"]  # Pillow runs no program to read these
IMAGE_FORMATS += ["AVIF"] * bool(find_spec("PIL.AvifImagePlugin"))  # from Pillow 11.3 on
NO_CLASSES = re.compile(r"mask|(.*[_ -])?(masks|annotations?|labels)|mask_.*|segmentation.*", re.I)
SPLIT = re.compile(r"(?:x_)?(train|test|val)(?:ing|id|idation)?(?:[_ -]?(?:set|images|data))?", re.I)
CAPTION = '{"file_name": "image.png", "text": "a caption"}'
MACHINE_ERRORS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO}  # not the fault of an image file
Picture = Path | Scene | np.ndarray  # what an image is made from; an array is uint8 (h, w) or (h, w, 1 or 3)


def entries(folder: Path) -> list[Path]:
    """What is in a folder, sorted, without hidden entries; [] where there is no folder, else UserError."""
    try:
        return sorted(p for p in folder.iterdir() if not p.name.startswith((".", "@eaDir", "__MACOSX")))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"folder {folder} can't be read ({error.strerror}): allow it, or move it") from None


def image_files(folder: Path, recursive: bool = False, seen: set[Path] | None = None) -> list[Path]:
    """The image files of a folder, sorted by path, without hidden ones, with links to missing files."""
    found, here = [], Path(os.path.realpath(folder))
    seen = set(here.parents) if seen is None else seen
    if here in seen:  # by a link to it, or to a folder above
        return []
    seen.add(here)
    for path in entries(folder):
        if path.suffix.lower() in IMAGE_SUFFIXES and (path.is_file() or not path.exists()):
            found.append(path)
        elif recursive and path.is_dir():
            found += image_files(path, True, seen)
    return found


def labelled_folders(folder: Path) -> tuple[list[Path], list[int], list[str]]:
    """The files of `folder/<class>/**/*.jpg`, their labels and the class names, in alphabetical order."""
    files_of = {f.name: files for f in entries(folder) if f.is_dir() and (files := image_files(f, True))}
    for name in [name for name in files_of if NO_CLASSES.fullmatch(name)]:
        note(f"{folder / name} is left out: its name is that of no class")
        del files_of[name]
    for path in entries(folder):
        if path.is_symlink() and not path.exists() and path.suffix.lower() not in IMAGE_SUFFIXES:
            note(f"{path} is left out: what it links to is missing")
    labels = [label for label, files in enumerate(files_of.values()) for _ in files]
    names = [os.fsencode(name).decode(errors="backslashreplace") for name in files_of]  # perhaps not UTF-8
    return [path for files in files_of.values() for path in files], labels, names


def splits_of(root: Path) -> dict[str, Path]:
    """The sub-folders of a data set by split, or {"train": root} where it has none, with a note of others."""
    counts = {f: n for f in entries(root) if f.is_dir() and (n := len(image_files(f, recursive=True)))}
    parts = {found[1].lower(): f for f in counts if (found := SPLIT.fullmatch(f.name))}
    others = [f for f in counts if f not in parts.values()]
    flat, inner = image_files(root), next(iter(counts), None)
    if (root / "metadata.jsonl").is_file():
        return {"train": root}
    if len(others) == len(counts) == 1 and not flat and not image_files(inner):
        return splits_of(inner)  # the one folder of an archive, in which all the others are
    known = [f for f in others if not NO_CLASSES.fullmatch(f.name)]  # as classes
    few = sum(counts[f] for f in parts.values()) < len(flat) + sum(counts[f] for f in known)
    if few or not parts or (known and set(parts) == {"train"} and not labelled_folders(parts["train"])[0]):
        return {"train": root}  # "train" may also be a class of trains
    if left := [f.name for f in others] + [f"{len(flat)} images"] * bool(flat):
        note(f"{root} is taken for a set in splits: {', '.join(left)} left out")
    return parts


def read_captions(path: Path) -> tuple[list[Path], list[str]]:
    """Files and captions of a metadata.jsonl, one JSON object a line with `file_name` and `text`."""
    files, captions = [], []
    for n, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:  # from bytes: where they are no UTF-8, that is an error
            if line.strip():
                entry = json.loads(line)
                files.append(path.parent / entry["file_name"])
                captions.append("" + entry["text"])  # a TypeError where it is no text
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"{path}, line {n}: {damage(path) or f'expected {CAPTION}, in UTF-8'}") from None
    if not files:
        raise UserError(f"{path} names no images")
    return files, captions


def note_skipped(files: Sequence[str]) -> None:
    """Tell of files that are missing, and of those that can't be read: their number, and the first few."""
    missing = {file for file in files if not os.path.exists(file)}
    for what, some in (("missing", sorted(missing)), ("unreadable", [f for f in files if f not in missing])):
        if some:
            more = [f"... and {len(some) - 5} more"] * (len(some) > 5)
            why = damage(Path(some[0])) if what == "unreadable" else None
            which = f" (the first one {why})" if why else ""
            note("\n  ".join([f"{len(some)} {what} images were skipped{which}:", *some[:5], *more]))


def open_image(image: Picture, size: int) -> Image.Image:
    """The picture of a file, an array, or a scene, which is drawn at size x size."""
    if isinstance(image, np.ndarray):
        return Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
    if isinstance(image, Scene):
        return image.draw(size)
    if image.exists() and not image.is_file():  # to open a pipe would wait for ever
        raise ValueError("it is no file")
    return Image.open(image, formats=IMAGE_FORMATS)


def read_image(image: Picture, size: int, channels: int, mask: bool = False) -> np.ndarray:
    """An image, turned as its EXIF data say, as (C, size, size) uint8 on white; raises what Pillow raises."""
    # It is scaled and cropped; a mask lies on black, and none of its values are mixed.
    paper, method = ("black", Image.Resampling.NEAREST) if mask else ("white", Image.Resampling.BICUBIC)
    with open_image(image, size) as picture:
        picture.draft(None, (2 * size, 2 * size))  # a large JPEG is decoded at 1/2, 1/4 or 1/8: far faster
        picture.load()  # raises if the image is broken;
        with suppress(Exception):  # broken EXIF data alone do not make it unusable
            picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith(("I", "F")):  # 16 bits or floats, which convert("L") would cut off at 255
            values = np.asarray(picture).astype(np.float64)
            scale = 255 / 65535 if picture.mode.startswith("I") else (255 if values.max() <= 1 else 1)
            picture = Image.fromarray((values * scale).round().clip(0, 255).astype(np.uint8))
        if picture.has_transparency_data:
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, paper), picture.convert("RGBA"))
        picture = ImageOps.fit(picture.convert("RGB" if channels == 3 else "L"), (size, size), method)
    return np.asarray(picture).reshape(size, size, channels).transpose(2, 0, 1)


def try_to_read(image: Picture, size: int, channels: int) -> np.ndarray | None:
    """What `read_image` returns, or None for a file that is no image."""
    try:
        return read_image(image, size, channels)
    except Exception as error:  # Pillow's decoders raise almost anything on a broken file
        if is_out_of_memory(error) or getattr(error, "errno", None) in MACHINE_ERRORS:
            raise
        return None


def read_images(files: list[str], size: int, channels: int, mask: bool = False) -> torch.Tensor:
    """The files of --image or --mask, (B, C, size, size) in [-1, 1], resized with a note; else UserError."""
    images, typed = [], "--mask" if mask else "--image"
    for file in files:
        try:
            with open_image(Path(file), size) as picture:
                width, height = picture.size
            images.append(torch.tensor(read_image(Path(file), size, channels, mask)))
        except FileNotFoundError:
            raise UserError(f"{typed} {file}: there is no such file") from None
        except Exception as error:  # Pillow's decoders raise almost anything on a broken file
            if is_out_of_memory(error):
                raise
            why = damage(Path(file)) or error
            raise UserError(f"{typed} {file} can't be read as an image: {why}") from None
        if (width, height) != (size, size):
            crop, method = "cropped to a square and " * (width != height), ", nearest" * mask
            note(f"{file}, {width}x{height}, is {crop}resized to {size}x{size}{method}")
    return to_x_0(torch.stack(images))


def to_x_0(images: torch.Tensor) -> torch.Tensor:
    """uint8 images (B, C, H, W) -> [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(x: torch.Tensor) -> np.ndarray:
    """Images in [-1, 1] (B, C, H, W) -> rounded to uint8 (B, H, W, C) on the CPU."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def to_pictures(x: torch.Tensor) -> list[Image.Image]:
    """Images in [-1, 1] (B, C, H, W) -> B Pillow images, gray where C = 1."""
    return [open_image(image, 0) for image in to_uint8(x)]
