"""Samples: single files, grids and GIFs, drawn in batches by one process or several."""

import json
import math
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .errors import UserError, note
from .files import new_path, quoted, replacing
from .images import read_images, to_pictures
from .machine import progress
from .pictures import make_grid, save_picture
from .runs import prepare_folders, run_folder

GRID_LIMIT = 256  # images shown in a grid; --out gets all of them


class Plan:
    """What --sample draws and where it goes; image i has condition i modulo the number of `names`."""

    def __init__(self, config: dict, output, batch_size: int | None, made_with: str, processes, names=()):
        if processes.count > 1 and not output.out:
            raise UserError("several processes sample into a folder: add --out DIR")
        self.output, self.batch_size, self.made_with = output, batch_size or 64, made_with
        self.processes, self.names = processes, names
        self.shape = (config["channels"], config["image_size"], config["image_size"])
        self.folder = prepare_folders(run_folder(output.checkpoint) / "samples", output.out, made_with)

    def film(self, steps: Sequence[int]) -> Sequence[int]:
        """The steps that --animate shows, at most some sixty."""
        return steps[:: math.ceil((len(steps) - 1) / 60)] if self.output.animate else ()

    def draw_grids(self, columns: dict[float, Callable], caption: str, name: str, batches: int = 1) -> None:
        """Draw `batches` times --sample images by each column, {scale: draw(numbers, bar) -> x, film}."""
        each, several, output = self.output.sample, len(columns) > 1, self.output
        suffix = {scale: f"_scale{scale:g}" if several else "" for scale in columns}
        in_grid = max(1, GRID_LIMIT // len(columns))
        if each > in_grid and self.names:
            note(f"a grid shows the first {in_grid} images{' of each scale' if several else ''}")
        for first in range(0, batches * each, each):
            numbers = range(first, first + each)
            drawn = [self.draw_in_batches(draw, numbers, suffix[scale]) for scale, draw in columns.items()]
            if self.processes.first:
                found = zip(*([part[:in_grid] for part in column] for column in drawn), strict=True)
                heads = [f"scale {scale:g}" for scale in columns]
                self.save_grids([condition_grid(x, self.names, caption, heads) for x in found], name)
        if output.out and self.processes.first:
            if self.names:  # the condition of each image; `--dataset folder` reads it as captions
                with replacing(Path(output.out) / "metadata.jsonl") as file:
                    for (scale, end), i in product(suffix.items(), range(batches * each)):
                        text = self.names[i % each % len(self.names)]
                        line = {"file_name": f"{i:05d}{end}.png", "text": text, "guidance_scale": scale}
                        file.write(f"{json.dumps(line)}\n".encode())
            print("images  ", quoted(output.out))

    def save_grids(self, grids: list[Image.Image], name: str) -> None:
        """Write a grid, the first, and the frames of its making as a GIF of four seconds and a rest."""
        (grid, *frames), path = grids, new_path(self.folder / name, ".png")
        print("grid    ", quoted(save_picture(grid, path)))
        if frames:
            times = [max(20, 4000 // len(frames))] * (len(frames) - 1) + [2000]  # milliseconds
            options = {"save_all": True, "append_images": frames[1:], "duration": times, "loop": 0}
            gif = save_picture(frames[0], new_path(path.with_suffix(".gif"), ".gif"), show=False, **options)
            print("gif     ", quoted(gif))

    def draw_in_batches(self, draw: Callable, numbers: Sequence[int], suffix: str) -> list[torch.Tensor]:
        """The images (N, C, H, W) that a grid shows, and frames of the first batch; --out gets all."""
        out, size, shown, frames, info = self.output.out, self.batch_size, [], [], PngInfo()
        paths = {i: Path(out) / f"{i:05d}{suffix}.png" for i in numbers} if out else {}
        batches = [numbers[i : i + size] for i in range(0, len(numbers), size)]
        film_of = batches[0] if self.output.animate else None
        if out:  # whole batches, in any process: so an image is the same to the last bit
            batches = [b for b in batches if b == film_of or not all(paths[i].exists() for i in b)]
        batches = self.processes.share(self.processes.broadcast(batches))  # others may have written some now
        info.add_text("made_with", self.made_with)
        with progress(f"sampling{suffix}", sum(map(len, batches))) as bar:
            for done, batch in enumerate(batches, start=1):
                x_0, film = draw(batch, bar)
                bar.update(sum(map(len, batches[:done])) - bar.n)
                frames = [*film, x_0] if batch == film_of else frames
                if out:
                    for i, picture in zip(batch, to_pictures(x_0), strict=True):
                        if not paths[i].exists():
                            save_picture(picture, paths[i], show=False, pnginfo=info)
                elif len(shown) * size < GRID_LIMIT:
                    shown.append(x_0)
        if out:
            self.processes.barrier()
            shown = [read_images([*map(str, paths.values())][:GRID_LIMIT], self.shape[-1], self.shape[0])]
        return [torch.cat(shown), *frames]


def condition_grid(x: Sequence[torch.Tensor], names: Sequence[str], caption: str, heads: Sequence[str]):
    """A grid, its rows R names, image i that of i modulo R, with a block for each of x (N, C, H, W)."""
    if not names:
        return make_grid(x[0], caption)
    names = names[: len(x[0])]
    each = math.ceil(len(x[0]) / len(names))  # images of a condition in a block
    across, cells, rows = math.ceil(each / math.ceil(each / max(1, 16 // len(x)))), [], []  # even rows
    for (k, name), start in product(enumerate(names), range(0, each, across)):
        rows.append(name if start == 0 else "")
        for block in x:
            images = block[k :: len(names)][start : start + across]
            cells += [images, images.new_ones(across - len(images), *images.shape[1:])]
    return make_grid(torch.cat(cells), caption, len(x) * across, rows, heads if len(x) > 1 else [])
