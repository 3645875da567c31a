"""Does a model of cars draw the body type it is asked for? And how near are its samples to real cars?

python tests/read_cars.py DIR [DIR ...] --data-root DIR [--image-size 64]

DIR is what `ddpm_conditional.py --sample N --out DIR` wrote, of labels or captions. The body type asked for
is the one in the class's name. The classifier of body types is trained here, on the features that
tests/judge_photos.py measures distances in.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from judge_photos import Judge, distances, floor, principal_axes

import utils
from support.errors import UserError, run_main
from support.generators import seeded_generator
from support.images import read_images

BODIES = ["Sedan", "SUV", "Convertible", "Coupe", "Hatchback", "Wagon", "Van", "Cab", "Minivan"]


def body_of(name: str) -> int | None:
    """The number in BODIES of the last body type in a class name or a caption; None where there is none."""
    words = [word.strip(",.").lower() for word in name.split()]
    words = ["cab" if word == "supercab" else word for word in words]
    found = [i for word in words for i, body in enumerate(BODIES) if word == body.lower()]
    return found[-1] if found else None


class BodyTypes:
    """A linear classifier of features (N, 1280), of body types (N,), trained on nine tenths of them."""

    def __init__(self, features: Tensor, bodies: Tensor):
        self.mean, self.std = features.mean(0), features.std(0)
        test, train = torch.randperm(len(bodies), generator=seeded_generator(0)).tensor_split(
            [len(bodies) // 10]
        )
        x = self.scaled(features[train])
        self.weight = torch.zeros(x.shape[1], len(BODIES), requires_grad=True)
        self.bias = torch.zeros(len(BODIES), requires_grad=True)
        optimizer = torch.optim.LBFGS([self.weight, self.bias], max_iter=200, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(x @ self.weight + self.bias, bodies[train])
            loss = loss + 0.01 * self.weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        self.accuracy = (self(features[test]) == bodies[test]).double().mean().item()
        self.tested = len(test)

    def scaled(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.std

    @torch.no_grad()
    def __call__(self, features: Tensor) -> Tensor:
        """The body type of each, (N,)."""
        return (self.scaled(features) @ self.weight + self.bias).argmax(1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="DIR")
    parser.add_argument("--data-root", default="data", metavar="DIR")
    parser.add_argument("--image-size", type=int, default=64, metavar="PIXELS")
    parser.add_argument("--cache-dir", default="data/cache", metavar="DIR")
    args = parser.parse_args()
    size, cache = args.image_size, args.cache_dir
    data = utils.get_data("stanfordcars", args.data_root, image_size=size, cache_dir=cache)
    judge, of_class = Judge(), [body_of(name) for name in data.class_names or ()]
    if not any(body is not None for body in of_class):
        raise UserError(f"no class name in {args.data_root} has a body type: they take pip install scipy")
    real = judge.real(data.images, cache)
    axes, bodies = principal_axes(real), [of_class[label] for label in data.labels.tolist()]
    known = torch.tensor([i for i, body in enumerate(bodies) if body is not None])
    types = BodyTypes(real[known], torch.tensor([bodies[i] for i in known.tolist()]))
    count = Counter(bodies[i] for i in known.tolist())
    print("real images:", ", ".join(f"{BODIES[body]} {n}" for body, n in count.most_common()))
    print(f"the classifier names {types.accuracy:.1%} of {types.tested} real held-out images rightly")
    print(f"{'Frechet':>9} {'1000 KID':>9} {'body type right':>16}")
    for folder in map(Path, args.folders):
        if not (folder / "metadata.jsonl").is_file():
            raise UserError(f"{folder} has no metadata.jsonl: write it with --sample N --out {folder}")
        lines = [json.loads(line) for line in open(folder / "metadata.jsonl", encoding="utf-8")]
        if not lines or any("guidance_scale" not in line for line in lines):
            raise UserError(
                f"{folder} holds images of another making: ddpm_conditional.py --sample makes them"
            )
        for scale in sorted({line["guidance_scale"] for line in lines}):
            some = [line for line in lines if line["guidance_scale"] == scale]
            x = read_images([str(folder / line["file_name"]) for line in some], size, 3)
            features = judge.features(((x + 1) * 127.5).round().byte())
            asked = [body_of(line["text"]) for line in some]
            pairs = list(zip(types(features).tolist(), asked, strict=True))
            right = [named == body for named, body in pairs if body is not None]
            found = distances(features, real, axes).values()
            share = f"{sum(right)} of {len(right)}, {sum(right) / max(1, len(right)):.1%}"
            print("{:9.2f} {:9.2f} {:>16}".format(*found, share), f" {folder}, scale {scale:g}", flush=True)
        lowest = floor(real, axes, len(some)).values()
        print("{:9.2f} {:9.2f} {:>16}".format(*lowest, ""), f" {len(some)} real images against the others")


if __name__ == "__main__":
    run_main(main)
