"""Measures of images, and of sets of images by their features. Images are (B, C, H, W) in [-1, 1]."""

import math
from functools import partial

import torch
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from .errors import UserError
from .images import to_x_0

BANDS = {"low": (0.0, 0.125), "middle": (0.125, 0.25), "high": (0.25, 1.0)}  # cycles per pixel
YCBCR = [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]]  # of RGB (JPEG)


def psnr(x: Tensor, x_0: Tensor) -> Tensor:
    """10 log10(1 / MSE) of images in [0, 1], in dB; here both are (..., C, H, W) in [-1, 1]; -> (...)."""
    return -10 * ((x - x_0) / 2).square().mean((-3, -2, -1)).log10()


def distance(x: Tensor, x_0: Tensor) -> float:
    """The root mean square difference of two sets of images, per pixel of [0, 1]."""
    return ((x - x_0) / 2).square().mean().sqrt().item()


def ssim(x: Tensor, x_0: Tensor) -> Tensor:
    """Structural similarity of each pair of images, (B, C, H, W) twice -> (B,) (Wang et al. 2004, eq. 13)."""
    x, x_0 = ((z.double() + 1) / 2 for z in (x, x_0))  # in [0, 1], so L = 1 in c_1 and c_2
    width = min(11, (min(x.shape[-2:]) - 1) // 2 * 2 + 1)  # of the window: 11 pixels, or what fits the image
    row, column = (partial(gaussian_blur, kernel_size=k, sigma=[1.5, 1.5]) for k in ([width, 1], [1, width]))
    mean_x, mean_0, xx, oo, xo = (row(column(z)) for z in (x, x_0, x * x, x_0 * x_0, x * x_0))
    var_x, var_0, cov, c_1, c_2 = xx - mean_x**2, oo - mean_0**2, xo - mean_x * mean_0, 0.01**2, 0.03**2
    below = (mean_x**2 + mean_0**2 + c_1) * (var_x + var_0 + c_2)
    return ((2 * mean_x * mean_0 + c_1) * (2 * cov + c_2) / below).mean((1, 2, 3))


def in_bands(spectrum: Tensor) -> Tensor:
    """Sums of a spectrum (B, C, H, W) over channels and the frequencies of each band; -> (B, 3)."""
    vertical, horizontal = (torch.fft.fftfreq(n, device=spectrum.device) for n in spectrum.shape[-2:])
    frequency = (vertical[:, None] ** 2 + horizontal**2).sqrt()  # (H, W)
    masks = [(low <= frequency) & (frequency < high) for low, high in BANDS.values()]
    return torch.stack([(spectrum * mask).sum((1, 2, 3)) for mask in masks], dim=1)


def energy_bands(x: Tensor) -> Tensor:
    """The shares of each image's energy in each band of spatial frequencies; (B, C, H, W) -> (B, 3)."""
    energy = in_bands(torch.fft.fft2(x.double()).abs().square())
    return energy / energy.sum(1, keepdim=True)


def share_kept(product: Tensor, energy: Tensor) -> Tensor:
    """<x, x_0> / <x_0, x_0>: 1 for x = x_0, about 0 for an independent x; nan where x_0 has no energy."""
    return torch.where(energy > 1e-9 * energy.sum(), product / energy, math.nan)


def kept_bands(x: Tensor, x_0: Tensor) -> Tensor:
    """The share of x_0's energy in each band that x has too, over all images; (B, C, H, W) twice -> (3,)."""
    spectrum, of_x_0 = (torch.fft.fft2(z.double()) for z in (x, x_0))
    product, energy = (spectrum * of_x_0.conj()).real, of_x_0.abs().square()
    return share_kept(in_bands(product).sum(0), in_bands(energy).sum(0))


def kept_colour(x: Tensor, x_0: Tensor) -> Tensor:
    """The same in luma, Y, and in chroma, Cb and Cr together, of images (B, 3, H, W) twice; -> (2,)."""
    of_rgb = torch.tensor(YCBCR, dtype=torch.float64)
    x, x_0 = (torch.einsum("ij,bjhw->ibhw", of_rgb, z.double()) for z in (x, x_0))  # (3, B, H, W)
    return share_kept(*(torch.stack([z[0].sum(), z[1:].sum()]) for z in (x * x_0, x_0.square())))


def compare(x: Tensor, x_0: Tensor, mean: Tensor | float) -> dict:
    """Measures of x beside x_0, (B, C, H, W) both; energy is counted from `mean`, what all images share."""
    kept = dict(zip(BANDS, kept_bands(x - mean, x_0 - mean).tolist(), strict=True))
    if x.shape[1] == 3:
        kept["luma"], kept["chroma"] = kept_colour(x - mean, x_0 - mean).tolist()
    row = {"mse": ((x - x_0) / 2).square().mean().item(), "psnr": psnr(x, x_0).mean().item()}
    row["ssim"] = ssim(x, x_0).mean().item()
    return row | {f"{what} kept": share if math.isfinite(share) else None for what, share in kept.items()}


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|m_a - m_b|^2 + Tr(S_a + S_b - 2 (S_a S_b)^(1/2)), features (n, D), (m, D); UserError if n, m <= D."""
    if (fewest := min(len(a), len(b))) <= (D := a.shape[1]):  # then covariances S are not of full rank
        needs = f"a Frechet distance in {D} features takes at least {D + 1} images on either side"
        raise UserError(f"{needs}, and there are {fewest}: ask for more")
    (m_a, S_a), (m_b, S_b) = ((z.mean(0), torch.cov(z.T)) for z in (a.double(), b.double()))
    values, vectors = torch.linalg.eigh(S_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # S_a^(1/2)
    cross = torch.linalg.eigvalsh(root @ S_b @ root).clamp(min=0).sqrt().sum()  # eigenvalues of S_a S_b
    squared = (m_a - m_b).square().sum() + S_a.trace() + S_b.trace() - 2 * cross
    return max(0.0, squared.item())  # Heusel et al. 2017


def manifold_coverage(points: Tensor, cloud: Tensor, k: int = 3) -> float:
    """The share of points (n, D) that are as near to a point of the cloud (m, D) as its k-th neighbour is."""
    if len(cloud) <= k:
        raise UserError(f"precision and recall take at least {k + 1} images on either side, not {len(cloud)}")
    points, cloud = points.double(), cloud.double()  # cdist rounds as coarsely as the squares of its values
    radius = torch.cdist(cloud, cloud).topk(k + 1, largest=False).values[:, k]  # the 0-th is the point itself
    return (torch.cdist(points, cloud) <= radius).any(1).double().mean().item()


def quality(features: Tensor, real: Tensor) -> dict[str, float]:
    """Frechet distance, precision and recall of samples by features (n, D), beside real images' (m, D)."""
    same_size = real[: len(features)]  # Kynkäänniemi et al. 2019, eq. 1 and 2, of sets of one size
    precision, recall = manifold_coverage(features, same_size), manifold_coverage(same_size, features)
    return {"frechet": frechet_distance(features, real), "precision": precision, "recall": recall}


def diversity(x: Tensor, y: Tensor) -> float | None:
    """Mean rms distance of two images of one class, x (B, C, H, W), y (B,); None where no class has two."""
    distances = torch.cat([torch.pdist(x[y == k].flatten(1) / 2) for k in y.unique()])
    return (distances / x[0].numel() ** 0.5).mean().item() if len(distances) else None


def saturation(x: Tensor) -> float:
    """The share of values at the ends of the range, which a file saves as 0 or 255."""
    return (x.abs() >= 1 - 1 / 255).double().mean().item()


def nearest_images(x: Tensor, cloud: Tensor, skip: int = 0) -> tuple[Tensor, Tensor]:
    """Rms distance of x (n, C, H, W) to the nearest of uint8 images (N, C, H, W), and its index; both (n,)"""
    parts = (to_x_0(part).flatten(1) / 2 for part in cloud.split(4096))  # few are made float at once
    apart = torch.cat([torch.cdist(x.flatten(1) / 2, part) for part in parts], dim=1) / x[0].numel() ** 0.5
    # skip = 1 where x is part of the cloud, and each image is its own nearest
    return tuple(found[:, -1] for found in apart.topk(min(1 + skip, len(cloud)), largest=False))


def standardised(x: Tensor) -> Tensor:
    """Mean 0 and variance 1 in each coordinate of points (N, D, 1, 1), or over all values of images."""
    dims = 0 if x.shape[-1] == 1 else (0, 1, 2, 3)
    return (x - x.mean(dims, keepdim=True)) / x.std(dims, keepdim=True, correction=0)


def correlation(x_t: Tensor, x_0: Tensor) -> float:
    """Pearson's correlation of the values of x_t with those of x_0, mean over images (B, C, H, W)."""
    a, b = (x.flatten(1) - x.flatten(1).mean(1, keepdim=True) for x in (x_t, x_0))
    return ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).mean().item()


def neighbours_kept(x_t: Tensor, x_0: Tensor, k: int = 10) -> float:
    """The share of each point's k nearest neighbours in x_0 that are among them in x_t; (N, 2, 1, 1) each."""
    x_0, x_t = x_0.double().flatten(1), x_t.double().flatten(1)
    before, after = (torch.cdist(x, x).topk(k + 1, largest=False).indices[:, 1:] for x in (x_0, x_t))
    return (before[:, :, None] == after[:, None, :]).any(2).double().mean().item()
