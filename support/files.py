"""Files: nothing is overwritten but by a whole new version of itself, put in place in one step."""

import csv
import hashlib
import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain, count
from pathlib import Path
from typing import BinaryIO

import torch

from .errors import UserError


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
    numbered = (path.with_name(f"{path.name.removesuffix(suffix)}_{n}{suffix}") for n in count(2))
    return next(p for p in chain([path], numbered) if not p.exists())


def write_csv(path: Path, rows: Iterable[Sequence[object]]) -> None:
    """Write a table, its header first, in one step."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    with replacing(path) as file:
        file.write(text.getvalue().encode())


def read_csv(path: Path) -> list[list[str]]:
    """The rows of a table, its header first; none where there is no file."""
    lines = path.read_text(encoding="utf-8-sig").splitlines() if path.is_file() else []
    return [row for row in csv.reader(lines) if row]


def read_json(path: Path, missing: str) -> dict:
    """An object in a JSON file; UserError says `missing` where there is no file."""
    if not path.exists():
        raise UserError(f"{path} is missing: {missing}")
    with suppress(ValueError, RecursionError):
        if isinstance(found := json.loads(path.read_bytes()), dict):
            return found
    raise UserError(f"{path} is damaged: get it again")


def digest(array: torch.Tensor) -> str:
    """A hash of an array's shape and bytes; of a large one, of 1 GiB evenly spread, which takes seconds."""
    found = hashlib.sha256(str(tuple(array.shape)).encode())
    every = max(1, math.ceil(array.numel() * array.element_size() / 2**30))
    for part in array[::every].split(256):
        found.update(part.contiguous().numpy().tobytes())
    return found.hexdigest()[:16]
