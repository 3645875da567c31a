"""Files: nothing is overwritten but by a whole new version of itself, put in place in one step."""

import csv
import errno
import hashlib
import io
import json
import math
import os
import pickle
import re
import secrets
import shlex
import time
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import BinaryIO

import torch

from .errors import UserError, is_out_of_memory

try:
    import fcntl
except ImportError:  # Windows, which removes no file that is open
    fcntl = None

TEMPORARY = re.compile(r"[0-9a-f]{8}\..+\.tmp")
WAITS = (0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)  # seconds before each try: a virus scanner may have the file open
csv.field_size_limit(2**30)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to that takes the place of `path` in one step at the end; `path` is always whole."""
    removed = True
    while removed:  # a new file beside `path`, of this writer alone, locked as long as it is open
        file = open(path.with_name(f"{secrets.token_hex(4)}.{path.name}.tmp"), "xb")
        with suppress(OSError, AttributeError):  # of file systems without locks, and of Windows
            fcntl.flock(file, fcntl.LOCK_EX)
        removed = fcntl and not os.fstat(file.fileno()).st_nlink  # as a leftover, before it was locked
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # on the disk before the name points to it
            if not fcntl:
                file.close()
            for wait in WAITS:
                time.sleep(wait)
                try:
                    os.replace(file.name, path)
                    break
                except OSError as error:
                    if wait == WAITS[-1] or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                        raise
    except BaseException as error:
        Path(file.name).unlink(missing_ok=True)
        if isinstance(error, OSError) and not error.filename:  # a full disk does not say which file
            error.filename = str(path)
        raise


def remove_leftovers(*folders: Path) -> None:
    """Remove the temporary files of processes that were killed; nobody has these locked, or open."""
    for path in (path for folder in folders for path in folder.glob("*.tmp") if TEMPORARY.match(path.name)):
        with suppress(OSError):
            with open(path, "ab") as file:
                if fcntl:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
            path.unlink(missing_ok=True)


def new_path(path: Path, suffix: str = "") -> Path:
    """`path`, or the first free one of path_2, path_3, ..., made as a folder or, with a suffix, as a file."""
    for n in count(1):
        new = path if n == 1 else path.with_name(f"{path.name.removesuffix(suffix)}_{n}{suffix}")
        with suppress(FileExistsError):  # so that no other process takes the name
            new.touch(exist_ok=False) if suffix else new.mkdir()
            return new


def quoted(*words: object, windows: bool = os.name == "nt") -> str:
    """Words as a shell takes them; that of Windows takes double quotes alone."""
    if not windows:
        return shlex.join(map(str, words))
    return " ".join(w if re.fullmatch(r"[\w:./\\=+,@-]+", w) else f'"{w}"' for w in map(str, words))


def write_csv(path: Path, rows: Iterable[Sequence[object]]) -> None:
    """Write a table, its header first, in one step."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    with replacing(path) as file:
        file.write(text.getvalue().encode(errors="surrogateescape"))


def read_csv(path: Path) -> list[list[str]]:
    """The rows of a table, its header first; none where there is no file. A spreadsheet may have saved it."""
    if path.is_file() and (what := damage(path)) and "empty" not in what:
        raise UserError(f"{path} {what}; get it again")
    lines = path.read_text("utf-8-sig", "surrogateescape").splitlines() if path.is_file() else []
    mark = next((mark for mark in ";\t" if lines and mark in lines[0] and "," not in lines[0]), ",")
    comma = str.maketrans(",", ".") if mark != "," else {}  # where ; separates, 0,5 is a number
    return [[cell.translate(comma) for cell in row] for row in csv.reader(lines, delimiter=mark) if row]


def read_json(path: Path, missing: str) -> dict:
    """An object in a JSON file; UserError says `missing` where there is no file."""
    if not path.exists():
        raise UserError(f"{path} is missing: {missing}")
    with suppress(ValueError, RecursionError):
        if isinstance(found := json.loads(path.read_bytes()), dict):
            return found
    raise UserError(f"{path} {damage(path) or 'is damaged'}; get it again")


def read_pickle(path: Path, instead: str) -> object:
    """What torch.save wrote, read onto the CPU without running code; UserError says what to use `instead`."""
    try:
        with warnings.catch_warnings():  # about foreign files, which are refused below
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"checkpoint {path} can't be read: {error.strerror}") from None
    except Exception as error:  # torch, zipfile and pickle each have their own
        if is_out_of_memory(error):
            raise
        unsafe = isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error)
        why = "holds Python objects, which could run code" if unsafe else "is damaged or no PyTorch file"
        raise UserError(f"checkpoint {path} was not loaded: it {damage(path) or why}; {instead}") from None


def damage(path: Path) -> str | None:
    """What a file is that should be another one, where its first bytes tell; else None."""
    with suppress(OSError), open(path, "rb") as file:
        start = file.read(512).removeprefix(b"\xef\xbb\xbf").lstrip().lower()
        if not start:
            return "is damaged: an empty file (truncated)"
        if start.startswith(b"version https://git-lfs"):
            return "is a Git LFS pointer, which stands for the file (git lfs pull gets it)"
        if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<error", b"<!--")):
            return "is a web page, saved in place of the file"
        if start.startswith(b"pk\3\4") and not zipfile.is_zipfile(path):
            return "is damaged: truncated, its end is missing"
    return None


def digest(array: torch.Tensor) -> str:
    """A hash of an array's shape and bytes; of a large one, of 1 GiB evenly spread, which takes seconds."""
    found = hashlib.sha256(str(tuple(array.shape)).encode())
    for part in array[:: max(1, math.ceil(array.numel() * array.element_size() / 2**30))].split(256):
        found.update(part.contiguous().numpy().tobytes())
    return found.hexdigest()[:16]
