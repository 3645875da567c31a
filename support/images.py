"""Image files, arrays and drawn scenes to uint8 arrays, and tensors back to pictures."""

import errno
import json
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from .errors import UserError, note
from .scenes import Scene

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
IMAGE_FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"]  # Pillow runs no program to read these
MACHINE_ERRORS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO}  # not the fault of an image file
Picture = Path | Scene | np.ndarray  # what an image is made from; an array is uint8 (h, w) or (h, w, 1 or 3)


def image_files(folder: Path, recursive: bool = False) -> list[Path]:
    """The image files of a folder, sorted by path, without hidden files; [] where there is no folder."""
    found = folder.glob("**/*" if recursive else "*")
    files = [p for p in found if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file()]
    return sorted(p for p in files if not any(part.startswith(".") for part in p.relative_to(folder).parts))


def class_folders(folder: Path) -> list[Path]:
    """The sub-folders of a folder, sorted by name, without hidden ones; [] where there is no folder."""
    return sorted(p for p in folder.glob("*") if p.is_dir() and not p.name.startswith("."))


def labelled_folders(folder: Path) -> tuple[list[Path], list[int], list[str]]:
    """The files of `folder/<class>/**/*.jpg`, their labels and the class names, in alphabetical order."""
    files_of = {f.name: files for f in class_folders(folder) if (files := image_files(f, recursive=True))}
    labels = [label for label, files in enumerate(files_of.values()) for _ in files]
    return [path for files in files_of.values() for path in files], labels, list(files_of)


def read_captions(path: Path) -> tuple[list[Path], list[str]]:
    """Files and captions of a metadata.jsonl, one JSON object a line with `file_name` and `text`."""
    files, captions = [], []
    lines = path.read_text(encoding="utf-8-sig", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            if line.strip():
                entry = json.loads(line)
                files.append(path.parent / entry["file_name"])
                captions.append(str(entry["text"]))
        except (ValueError, KeyError, TypeError):
            expected = '{"file_name": "image.png", "text": "a caption"}'
            raise UserError(f"{path}, line {number}: expected {expected}") from None
    return files, captions


def open_image(image: Picture, size: int) -> Image.Image:
    """The picture of a file, an array, or a scene, which is drawn at size x size."""
    if isinstance(image, np.ndarray):
        return Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
    return image.draw(size) if isinstance(image, Scene) else Image.open(image, formats=IMAGE_FORMATS)


def upright(image: Picture, size: int, channels: int, paper: str = "white") -> Image.Image:
    """One image, turned as its EXIF data say, in 8 bits on paper of a colour; raises what Pillow raises."""
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
        return picture.convert("RGB" if channels == 3 else "L")


def read_image(image: Picture, size: int, channels: int, mask: bool = False) -> np.ndarray:
    """What `upright` returns, its short side scaled to `size`, its center cropped; (C, size, size) uint8.

    A `mask` is painted on black paper and not interpolated.
    """
    method = Image.Resampling.NEAREST if mask else Image.Resampling.BICUBIC
    picture = ImageOps.fit(upright(image, size, channels, "black" if mask else "white"), (size, size), method)
    return np.asarray(picture).reshape(size, size, channels).transpose(2, 0, 1)


def try_to_read(image: Picture, size: int, channels: int) -> np.ndarray | None:
    """What `read_image` returns, or None for a file that is no image."""
    try:
        return read_image(image, size, channels)
    except Exception as error:  # Pillow's decoders raise almost anything on a broken file
        if isinstance(error, MemoryError) or getattr(error, "errno", None) in MACHINE_ERRORS:
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
            raise UserError(f"{typed} {file} can't be read as an image: {error}") from None
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
