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
    """Batches of one array of images (N, C, H, W) uint8, no Python per image, and of y (N, ...), if given."""

    def __init__(self, images, batch_size, device="cpu", y=None, flip=False, seed=0, processes=None):
        self.batch_size, self.device, self.flip, self.seed = batch_size, torch.device(device), flip, seed
        self.processes, self.scale = processes or Processes(), 1.0
        # A set that fits is kept on the network's device; a larger one is sent there batch by batch.
        free = torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else 8e9
        self.resident = self.device.type == "cpu" or images.numel() <= free / 2
        self.images = images.to(self.device) if self.resident else images
        self.y = None if y is None else y.to(self.images.device)
        self.batches = math.ceil(len(images) / batch_size)  # in an epoch; the last may be smaller

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Batches of an epoch from number `start` on: x_0 (B, C, H, W) in [-1, 1], and y (B, ...) or None."""
        # The order and the flips depend on (seed, epoch) alone, so a run can be resumed at any batch.
        generator, n, where = seeded_generator(self.seed, epoch), len(self.images), self.images.device
        large, pin = self.images.numel() > MAPPED, not self.resident and self.device.type == "cuda"
        order = self.shuffled(generator) if large else torch.randperm(n, generator=generator)
        batches = order.to(where).split(self.batch_size)[start:]
        mirrored = torch.rand(n, generator=generator).to(where) < 0.5
        # Every process needs an image; one that has no share of a batch gets any, and gives it weight 0.
        shares = (index[self.processes.rank % len(index) :: self.processes.count] for index in batches)
        parts = [self.images, mirrored] if self.y is None else [self.images, mirrored, self.y]
        slices = ([part[i].pin_memory() if pin else part[i] for part in parts] for i in shares)
        for images, mirror, *y in slices if self.resident else ahead(slices):
            images, mirror = (part.to(self.device, non_blocking=True) for part in (images, mirror))
            latents = images.ndim == 5  # (B, 1 or 2, c, h, w), of images and their mirror images
            other, images = (images[:, -1], images[:, 0]) if latents else (images.flip(-1), images)
            images = torch.where(mirror[:, None, None, None], other, images) if self.flip else images
            x_0 = images.float() * self.scale if latents else to_x_0(images)
            yield x_0, y[0].to(self.device, non_blocking=True) if y else None

    def shuffled(self, generator: torch.Generator) -> Tensor:
        """The positions (N,) of the images of a large set in a random order, in stretches of its file."""
        # Single random places are slow to read: 256 stretches of 64 images at a time are shuffled together.
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
