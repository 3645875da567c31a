"""Linear maps of images (B, C, H, W): views that can be undone, a blur, and a sharper low-pass filter."""

from collections import namedtuple
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur, rotate

from .errors import UserError
from .generators import seeded_generator

View = namedtuple("View", "see undo")  # a map of images that rearranges their pixels, and its inverse


def turned(degrees: int) -> View:
    """A counter-clockwise rotation; only quarter turns map pixels to pixels."""
    if degrees % 90:
        return View(partial(rotate, angle=degrees), partial(rotate, angle=-degrees))
    return View(*(partial(torch.rot90, k=k, dims=(2, 3)) for k in (degrees // 90, -degrees // 90)))


def jigsaw(size: int, pieces: int, seed: int) -> View:
    """A random order of pieces x pieces squares; UserError if `pieces` does not divide `size`."""
    if size % pieces:
        near = ", ".join(str(n) for n in range(2, size) if size % n == 0)
        raise UserError(f"--pieces {pieces} does not divide {size} pixels: choose one of {near}")
    side, order = size // pieces, torch.randperm(pieces**2, generator=seeded_generator(seed))

    def rearrange(x: Tensor, order: Tensor) -> Tensor:
        return F.fold(F.unfold(x, side, stride=side)[:, :, order.to(x.device)], size, side, stride=side)

    return View(partial(rearrange, order=order), partial(rearrange, order=order.argsort()))


FLIP, MIRROR = (partial(torch.flip, dims=(dim,)) for dim in (2, 3))  # each undoes itself
VIEWS = {"flip": lambda *_: View(FLIP, FLIP), "mirror": lambda *_: View(MIRROR, MIRROR)}
VIEWS |= {"rotate90": lambda *_: turned(90), "rotate180": lambda *_: turned(180)}
VIEWS |= {"negative": lambda *_: View(torch.neg, torch.neg), "jigsaw": jigsaw}  # (image size, pieces, seed)


def low_pass(x: Tensor, sigma: float) -> Tensor:
    """G x: x blurred by a Gaussian of `sigma` pixels."""
    reach = min(max(1, round(8 * sigma)), x.shape[-1] - 1)  # no farther than mirroring at the edges allows
    return gaussian_blur(x, 2 * reach + 1, sigma)
