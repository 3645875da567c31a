"""Batches of one array of images, and its division into a training and a test part."""

import math
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from .cache import MAPPED
from .errors import UserError
from .generators import seeded_generator
from .images import to_x_0
from .processes import Processes


class Loader:
    """Batches of a data set, sliced from its one array (N, C, H, W) uint8: no Python runs per image.

    The order and the flips of an epoch depend on (seed, epoch) alone, so a run can be resumed at any batch.
    `y` (N, ...) goes with the images: labels, or captions as tokens. Each of several processes gets its share
    of every batch: images rank, rank + count, ... of it.
    """

    def __init__(self, images, batch_size, device="cpu", y=None, flip=False, seed=0, processes=None):
        self.batch_size, self.device, self.flip, self.seed = batch_size, torch.device(device), flip, seed
        self.processes = processes or Processes()
        # A set that fits is kept on the network's device; a larger one is sent there batch by batch.
        free = torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else 8e9
        self.resident = self.device.type == "cpu" or images.numel() <= free / 2
        self.images = images.to(self.device) if self.resident else images
        self.y = None if y is None else y.to(self.images.device)
        self.batches = math.ceil(len(images) / batch_size)  # in an epoch; the last may be smaller

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Batches of an epoch from number `start` on: x_0 (B, C, H, W) in [-1, 1], and y (B, ...) or None."""
        slices = self.slices(epoch, start)
        for images, y, mirrored in slices if self.resident else ahead(slices):
            x_0 = to_x_0(images.to(self.device, non_blocking=True))
            if self.flip:
                mirrored = mirrored.to(self.device, non_blocking=True)[:, None, None, None]
                x_0 = torch.where(mirrored, x_0.flip(-1), x_0)
            yield x_0, None if y is None else y.to(self.device, non_blocking=True)

    def slices(self, epoch: int, start: int) -> Iterator[tuple[Tensor | None, ...]]:
        """The images (B, C, H, W) uint8 of each batch, y or None, and which to mirror (B,), maybe pinned."""
        generator = seeded_generator(self.seed, epoch)
        large, n = self.images.numel() > MAPPED, len(self.images)
        order = self.shuffled(generator) if large else torch.randperm(n, generator=generator)
        order = order.to(self.images.device)
        mirrored = torch.rand(n, generator=generator).to(self.images.device) < 0.5
        pin = not self.resident and self.device.type == "cuda"
        for i in range(start, self.batches):
            index = order[i * self.batch_size : (i + 1) * self.batch_size]
            share = index[self.processes.rank :: self.processes.count]
            index = share if len(share) else index[:1]  # every process needs an image; this one has weight 0
            batch = (self.images[index], None if self.y is None else self.y[index], mirrored[index])
            yield tuple(part.pin_memory() if pin and part is not None else part for part in batch)

    def shuffled(self, generator: torch.Generator) -> Tensor:
        """The positions (N,) of the images of a large set in a random order, in stretches of its file.

        Single random places are slow to read, so 256 stretches of 64 images at a time are shuffled together.
        """
        stretches = torch.arange(len(self.images)).split(64)
        drawn = [stretches[i] for i in torch.randperm(len(stretches), generator=generator)]
        mixed = [torch.cat(drawn[i : i + 256]) for i in range(0, len(drawn), 256)]
        return torch.cat([part[torch.randperm(len(part), generator=generator)] for part in mixed])


def ahead(items: Iterator, depth: int = 2) -> Iterator:
    """The same items, made in a thread while the last ones are used, at most `depth` ahead."""
    with ThreadPoolExecutor(1) as thread:
        waiting = deque(thread.submit(next, items, None) for _ in range(depth))
        while (item := waiting.popleft().result()) is not None:
            waiting.append(thread.submit(next, items, None))
            yield item


def hold_out(count: int, seed: int, task: str) -> tuple[Tensor, Tensor]:
    """The positions of a tenth of `count` images, up to 1000, and of the rest; UserError for one image."""
    if count < 2:
        raise UserError(f"{task} takes two images or more, one of them to test it on")
    order = torch.randperm(count, generator=seeded_generator(seed))
    return order.tensor_split([min(1000, math.ceil(count / 10))])
