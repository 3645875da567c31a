"""Pictures of pictures: grids with captions."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .files import replacing
from .images import to_pictures

LINE, GAP = 18, 2  # pixels from one line of text to the next, and between two images
FONT = ImageFont.load_default(14)


def make_grid(x: Tensor, caption="", columns: int | None = None, rows=(), heads=()) -> Image.Image:
    """Images in [-1, 1] (B, C, H, W) under a caption, `rows` beside them, `heads` above equal columns."""
    columns, (height, width) = columns or math.ceil(len(x) ** 0.5), x.shape[-2:]
    zoom = math.ceil(96 / max(height, width))  # of small images, so that their pixels can be seen
    cell_w, cell_h = width * zoom + GAP, height * zoom + GAP

    def fits(width: int) -> bool:  # beside the rows, each of whose labels then takes no more than its row
        wrapped = [wrap(row, width) for row in rows]
        narrow = all(FONT.getlength(line) <= width for lines in wrapped for line in lines)
        return narrow and LINE * max(map(len, wrapped)) <= cell_h

    least = max((FONT.getlength(line) for row in rows for line in row.splitlines()), default=0)
    left = 8 + next(filter(fits, range(min(100, round(least) + 4), 10**5, 10))) if any(rows) else 0
    lines = wrap(caption, left + columns * cell_w - 2 * GAP)
    span = columns * cell_w // max(1, len(heads))  # pixels under one head
    head_lines = [wrap(head, span - 2 * GAP) for head in heads]
    top = GAP + LINE * (len(lines) + max(map(len, head_lines), default=0))
    bottom = top + math.ceil(len(x) / columns) * cell_h
    grid = Image.new("RGB", (left + columns * cell_w + GAP, bottom + (GAP if lines else 0)), "white")
    texts = [(2 * GAP, GAP, lines)]  # from the left, from the top, what stands there
    texts += [(left + GAP + i * span, GAP + LINE * len(lines), head) for i, head in enumerate(head_lines)]
    texts += [(2 * GAP, top + i * cell_h + GAP, wrap(row, left - 4 * GAP)) for i, row in enumerate(rows)]
    for across, down, text in texts:
        for i, line in enumerate(text):
            ImageDraw.Draw(grid).text((across, down + LINE * i), line, "black", FONT)
    for i, picture in enumerate(to_pictures(x.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3))):
        grid.paste(picture, (left + GAP + i % columns * cell_w, top + i // columns * cell_h))
    return grid


def wrap(text: str, width: int) -> list[str]:
    """The lines of `text`, broken to be at most `width` pixels wide (a single word may be wider)."""
    lines = []
    for line in text.encode("latin-1", "replace").decode("latin-1").splitlines():  # what Pillow's font has
        first, *words = line.split() or [""]
        lines.append(first)
        for word in words:
            if FONT.getlength(f"{lines[-1]} {word}") <= width:
                lines[-1] += f" {word}"
            else:
                lines.append(word)
    return lines


def join(pictures: Sequence[Image.Image], across: bool = False, gap: int = 8) -> Image.Image:
    """Pictures on white, below each other or `across`, side by side."""
    sizes = [(p.width, p.height) if across else (p.height, p.width) for p in pictures]
    along, wide = sum(size + gap for size, _ in sizes) - gap, max(size for _, size in sizes)
    sheet, place = Image.new("RGB", (along, wide) if across else (wide, along), "white"), 0
    for picture, (size, _) in zip(pictures, sizes, strict=True):
        sheet.paste(picture, (place, 0) if across else (0, place))
        place += size + gap
    return sheet


def save_picture(picture: Image.Image, path: Path, show: bool = True, **options) -> Path:
    """Write a Pillow image in one step, in the format of its suffix; -> the path. Notebooks `show` it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        picture.save(file, format=path.suffix[1:].upper(), **options)
    shell = "IPython" in sys.modules and sys.modules["IPython"].get_ipython()
    if show and hasattr(shell, "kernel"):  # of a notebook that runs this script
        sys.modules["IPython"].display.display(picture)
    return path
