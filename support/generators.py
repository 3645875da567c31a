"""Random draws: all go through a generator, and one image can have a generator of its own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor


@dataclass
class BatchShare:
    """Draws for a whole batch, of which some images get theirs, in any process and with any --accumulate."""

    generator: torch.Generator
    images: range  # their positions in the batch
    total: int  # images in the batch


Generators = torch.Generator | BatchShare | Sequence[torch.Generator] | None  # one, or one for each image


def seeded_generator(*seed: int) -> torch.Generator:
    """A CPU generator whose stream depends on all the numbers given: (0, 1) and (1, 0) differ."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))


def draw(random: Callable[..., Tensor], shape: Sequence[int], x: Tensor, generator: Generators) -> Tensor:
    """`random(shape)`, such as torch.rand, drawn on the generator's device and moved to that of x."""
    if isinstance(generator, BatchShare):
        whole = draw(random, (generator.total, *shape[1:]), x, generator.generator)
        return whole[generator.images.start : generator.images.stop : generator.images.step]
    return random(shape, generator=generator, device=(generator or x).device).to(x.device)


def randn_like(x: Tensor, generator: Generators = None) -> Tensor:
    """Standard normal noise shaped as x (B, ...); with a list, image i draws from generator i alone."""
    if isinstance(generator, Sequence):
        return torch.cat([randn_like(x[i : i + 1], g) for i, g in enumerate(generator)])
    return draw(partial(torch.randn, dtype=x.dtype), x.shape, x, generator)
