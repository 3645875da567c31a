"""Linear maps of images (B, C, H, W): views that can be undone, blurs, measurements with a pseudo-inverse."""

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
    k = degrees // 90
    return View(partial(torch.rot90, k=k, dims=(2, 3)), partial(torch.rot90, k=-k, dims=(2, 3)))


def jigsaw(size: int, pieces: int, seed: int) -> View:
    """A random order of pieces x pieces squares; UserError if `pieces` does not divide `size`."""
    if size % pieces:
        near = ", ".join(str(n) for n in range(2, size) if size % n == 0)
        raise UserError(f"--pieces {pieces} does not divide {size} pixels: choose one of {near}")
    side, order = size // pieces, torch.randperm(pieces**2, generator=seeded_generator(seed))

    def rearrange(x: Tensor, order: Tensor) -> Tensor:
        parts = F.unfold(x, side, stride=side)  # (B, C side^2, pieces^2)
        return F.fold(parts[:, :, order.to(x.device)], size, side, stride=side)

    return View(partial(rearrange, order=order), partial(rearrange, order=order.argsort()))


VIEWS = {  # view(size of the image, pieces, seed)
    "flip": lambda size, pieces, seed: View(partial(torch.flip, dims=(2,)), partial(torch.flip, dims=(2,))),
    "mirror": lambda size, pieces, seed: View(partial(torch.flip, dims=(3,)), partial(torch.flip, dims=(3,))),
    "rotate90": lambda size, pieces, seed: turned(90),
    "rotate180": lambda size, pieces, seed: turned(180),
    "negative": lambda size, pieces, seed: View(torch.neg, torch.neg),
    "jigsaw": jigsaw,
}


def is_isometry(view: View, shape) -> bool:
    """Whether a view of images of a shape (C, H, W) keeps inner products, and `undo` inverts `see`."""
    x = torch.randn(4, *shape, generator=seeded_generator(0), dtype=torch.float64)
    y = view.see(x)
    same = y.shape == x.shape and torch.allclose(y.flatten(1) @ y.flatten(1).T, x.flatten(1) @ x.flatten(1).T)
    return same and torch.allclose(view.undo(y), x)


def low_pass(x: Tensor, sigma: float | None = None) -> Tensor:
    """G x: x blurred by a Gaussian of `sigma` pixels, by default 2 at 64x64, scaled with the size."""
    sigma = sigma or 2 * x.shape[-1] / 64
    reach = min(max(1, round(8 * sigma)), x.shape[-1] - 1)  # no farther than mirroring at the edges allows
    return gaussian_blur(x, 2 * reach + 1, sigma)


class Measurement(namedtuple("Measurement", "A inverse")):
    """A linear map A of images (B, C, H, W) and its pseudo-inverse A+: A A+ A = A."""

    def project(self, x: Tensor, y: Tensor) -> Tensor:
        """A+ y + (I - A+ A) x: the image nearest to x with A x = y."""
        return x + self.inverse(y - self.A(x))


def colourise(shape) -> Measurement:
    """A: the mean of the channels, of images of a shape (C, H, W); UserError for C = 1."""
    if shape[0] == 1:
        raise UserError("--problem colourise: the model draws gray images; choose one of colour images")
    return Measurement(lambda x: x.mean(1, keepdim=True), lambda y: y.repeat(1, shape[0], 1, 1))


def super_resolve(shape, factor: int) -> Measurement:
    """A: the mean of each factor x factor pixels; UserError if `factor` does not divide the size."""
    possible = [n for n in range(2, shape[-1]) if shape[-1] % n == 0]
    if factor not in possible:
        choices = ", ".join(map(str, possible)) or "none"
        raise UserError(f"--factor {factor}: for {shape[-1]} pixels it is one of {choices}")
    return Measurement(partial(F.avg_pool2d, kernel_size=factor), partial(F.interpolate, scale_factor=factor))


def deblur(shape, sigma: float | None = None) -> Measurement:
    """A: a Gaussian blur of rows and columns, by a matrix whose singular values of at most 0.1 are 0."""
    sigma = sigma or max(1.5, shape[-1] / 32)  # pixels
    at = torch.arange(shape[-1], dtype=torch.float64)
    B = torch.exp(-0.5 * ((at[:, None] - at) / sigma) ** 2)
    U, S, V = torch.linalg.svd(B / B.sum(1, keepdim=True))  # rows sum to 1 at the edges too
    kept = S > 0.1  # the largest is about 1
    B = ((U[:, kept] * S[kept]) @ V[kept]).float()
    B_inverse = ((V[kept].T / S[kept]) @ U[:, kept].T).float()

    def on_both_sides(matrix: Tensor):
        return lambda x: matrix.to(x.device) @ x @ matrix.T.to(x.device)

    return Measurement(on_both_sides(B), on_both_sides(B_inverse))


PROBLEMS = {"colourise": colourise, "deblur": deblur, "super_resolve": super_resolve}
