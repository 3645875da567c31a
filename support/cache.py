"""Images are decoded once and kept in one file, from which a large data set is mapped into memory."""

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from operator import attrgetter
from pathlib import Path

import numpy as np

from .errors import is_out_of_memory, note
from .files import remove_leftovers, replacing
from .images import Picture, try_to_read
from .machine import progress
from .scenes import BACKGROUNDS, COLOURS, SHAPES, Scene

CHUNK = 2**26  # bytes of images that are decoded before they are written
MAPPED = 2**28  # bytes from which on a set is mapped; a smaller one is read, and its file may then change
Pictures = Sequence[Picture] | np.ndarray  # an array is uint8 (N, h, w) or (N, h, w, 1 or 3)


def fingerprint(images: Pictures, root: Path | None) -> str:
    """A hash of what the pixels are made from: arrays, scenes, or files (path below `root`, size, times)."""
    state = attrgetter("st_size", "st_mtime_ns", "st_ctime_ns", "st_ino")
    digest = hashlib.sha256(b"1")  # raise this number when read_image or Scene changes what it returns
    if getattr(images, "filename", None):  # a mapped file, which may be huge
        digest.update(" ".join(map(str, state(os.stat(images.filename)))).encode())
    elif isinstance(images, np.ndarray):
        digest.update(f"{images.shape}".encode())
        digest.update(np.ascontiguousarray(images))
    elif isinstance(images[0], Scene):
        digest.update(repr((images, COLOURS, BACKGROUNDS, SHAPES)).encode())
    else:
        for path in images:  # metadata.jsonl may list files that do not exist, or lie elsewhere
            found = state(os.stat(path)) if os.path.exists(path) else None
            name = path.relative_to(root) if path.is_relative_to(root) else path
            digest.update(f"{name} {found}\n".encode(errors="backslashreplace"))
    return digest.hexdigest()[:16]


def decode(images: Pictures, size: int, channels: int, workers: int) -> Iterator[tuple]:
    """The images that can be read, in chunks: (M, C, size, size) uint8, and their M positions."""
    read = partial(try_to_read, size=size, channels=channels)
    most = min(len(images), max(1, CHUNK // (channels * size**2)))  # images in a chunk
    # Threads: Pillow decodes and resizes outside Python's lock. Ctrl-C while `map` waits cancels the rest.
    with ThreadPoolExecutor(workers) as pool, progress("decoding", len(images)) as bar:
        for start in range(0, len(images), most):
            chunk, kept = np.empty((most, channels, size, size), np.uint8), []
            for i, image in enumerate(pool.map(read, images[start : start + most]), start):
                bar.update()
                if image is not None:
                    chunk[len(kept)] = image
                    kept.append(i)
            yield chunk[: len(kept)], kept


def joined(chunks: Iterator[tuple]) -> tuple[np.ndarray, np.ndarray]:
    """Chunks of images and their positions, in one piece."""
    chunks, kept = zip(*chunks, strict=True)
    return chunks[0] if len(chunks) == 1 else np.concatenate(chunks), np.concatenate(kept).astype(np.int64)


def cached(cache_file: Path, shape: tuple[int, ...], make: Callable, dtype=np.uint8) -> tuple:
    """The images that make() yields in chunks, (M, ...) of the N of a `shape`, and their positions (M,)."""
    why = "it was removed at once"
    remove_leftovers(cache_file.parent)
    if found := read_cache(cache_file, shape, dtype):
        return found
    try:
        write_cache(cache_file, shape, make(), dtype)
    except OSError as error:
        why = error.strerror
    if found := read_cache(cache_file, shape, dtype):  # ours, or that of another process, which has it open
        return found
    note(f"the decoded images were not cached in {cache_file}: {why}")
    return joined(make())  # held in memory, where a file is mapped and may be larger than that


def write_cache(cache_file: Path, shape: tuple[int, ...], chunks: Iterator[tuple], dtype=np.uint8) -> None:
    """Write an .npy file of that shape (images, then zeros), and after it one of their positions."""
    cache_file.parent.mkdir(parents=True, exist_ok=True)
    kept = []
    with replacing(cache_file) as file:
        header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for images, positions in chunks:
            file.write(images.tobytes())
            kept += positions
        file.seek((shape[0] - len(kept)) * math.prod(shape[1:]) * np.dtype(dtype).itemsize, os.SEEK_CUR)
        np.save(file, np.array(kept, dtype=np.int64))


def read_cache(cache_file: Path, shape: tuple[int, ...], dtype=np.uint8) -> tuple | None:
    """What write_cache wrote, a large set mapped into memory; None where it is missing or damaged."""
    try:
        images = np.load(cache_file, mmap_mode="c", allow_pickle=False)  # "c": PyTorch wants it writable
        with open(cache_file, "rb") as file:
            file.seek(images.offset + images.nbytes)
            kept = np.load(file, allow_pickle=False)
        if images.shape != shape or images.dtype != dtype:
            raise ValueError
        images = images[: len(kept)]
        return (images if images.nbytes > MAPPED else np.array(images)), kept
    except Exception as error:  # missing, or damaged in one of many ways
        if is_out_of_memory(error):
            raise
        if not isinstance(error, FileNotFoundError):
            note(f"{cache_file} is damaged and is made anew")
    return None
