"""Does a model of cars draw the body type it is asked for? And how near are its samples to real cars?

python tests/read_cars.py DIR [DIR ...] --data-root DIR [--image-size 64]
python tests/read_cars.py RUN [RUN ...] --data-root DIR --errors

DIR is what `ddpm_conditional.py --sample N --out DIR` wrote, of labels or captions. The body type asked for
is the one in the class's name. The classifier of body types is trained here, on the features that
tests/judge_photos.py measures distances in. The colour is that of the middle of an image, averaged over a
class: its correlation over the classes with that of the real images, for red minus green, blue minus green
and brightness. --errors says instead what a network has learned of labels or captions: the error of x_0 with
none, with the right one, and with that of another image.
"""

import argparse
import json
import math
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from judge_photos import Judge, distances, floor, principal_axes

import ddpm
import utils
from support import cars
from support.errors import UserError, run_main
from support.generators import seeded_generator
from support.images import read_images, to_x_0
from support.text import Vocabulary

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


def tints(images: Tensor) -> Tensor:
    """Red minus green, blue minus green, and brightness of the middles of uint8 (N, 3, H, W); (N, 3)."""
    edge = images.shape[-1] // 4
    red, green, blue = images[..., edge:-edge, edge:-edge].float().mean((2, 3)).T
    return torch.stack([red - green, blue - green, (red + green + blue) / 3], dim=1)


def correlations(values: Tensor, labels: Tensor, others: Tensor, their_labels: Tensor) -> list[float]:
    """Pearson's, over classes, of their means of values (N, 3) and of others (M, 3); nan below 3 classes."""
    shared = sorted({*labels.tolist()} & {*their_labels.tolist()})
    if len(shared) < 3:
        return [math.nan] * values.shape[1]
    a, b = (
        torch.stack([x[y == k].mean(0) for k in shared])
        for x, y in ((values, labels), (others, their_labels))
    )
    a, b = a - a.mean(0), b - b.mean(0)
    return ((a * b).sum(0) / (a.norm(dim=0) * b.norm(dim=0))).tolist()


@torch.no_grad()
def label_errors(net, diffusion, x_0: Tensor, y: Tensor, t: int) -> list[float]:
    """The error of x_0 (N, 3, H, W) at t with no condition, with its own of y (N, ...), and with another."""
    times = torch.full((len(x_0),), t)
    x_t, _ = diffusion.noise_images(x_0, times, seeded_generator(0, t))
    found = []
    for condition in (net.null(y), y, y.roll(1, 0)):
        parts = zip(x_t.split(64), times.split(64), condition.split(64), strict=True)
        x = [diffusion.x_0_from_eps(x, diffusion.denoiser(net, c)(x, s), s) for x, s, c in parts]
        found.append((torch.cat(x) - x_0).square().mean().item())
    return found


def print_errors(path: str, data: utils.Data, count: int = 256) -> None:
    net, diffusion, config = ddpm.load_network(path, kinds=("ddpm_conditional",))
    if data.labels is None or (config["condition"] == "text" and not data.captions):
        raise UserError("these cars have no class names: they take pip install scipy")
    some = torch.randperm(len(data.images), generator=seeded_generator(0))[:count]
    y = data.labels[some]
    if config["condition"] == "text":
        y = Vocabulary(**config["vocabulary"]).encode([data.captions[i] for i in some.tolist()])
    for t in (600, 800, 900, 950, 990):
        none, right, other = label_errors(net, diffusion, to_x_0(data.images[some]), y, t)
        told = f"right {right:.4f} ({right / none - 1:+.1%}), other {other:.4f} ({other / none - 1:+.1%})"
        print(f"{path}, t = {t}, SNR {diffusion.snr[t]:.4f}: none {none:.4f}, {told}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="DIR")
    parser.add_argument("--data-root", default="data", metavar="DIR")
    parser.add_argument("--image-size", type=int, default=64, metavar="PIXELS")
    parser.add_argument("--cache-dir", default="data/cache", metavar="DIR")
    parser.add_argument("--errors", action="store_true", help="what is learned of labels or captions")
    args = parser.parse_args()
    size, cache = args.image_size, args.cache_dir
    data = utils.get_data("stanfordcars", args.data_root, image_size=size, cache_dir=cache)
    of_class = [body_of(name) for name in data.class_names or ()]
    if args.errors:
        for path in args.folders:
            print_errors(path, data)
        return
    judge = Judge()
    if not any(body is not None for body in of_class):
        raise UserError(f"no class name in {args.data_root} has a body type: they take pip install scipy")
    real = judge.real(data.images, cache)
    axes, bodies = principal_axes(real), [of_class[label] for label in data.labels.tolist()]
    known = torch.tensor([i for i, body in enumerate(bodies) if body is not None])
    types = BodyTypes(real[known], torch.tensor([bodies[i] for i in known.tolist()]))
    count = Counter(bodies[i] for i in known.tolist())
    print("real images:", ", ".join(f"{BODIES[body]} {n}" for body, n in count.most_common()))
    print(f"the classifier names {types.accuracy:.1%} of {types.tested} real held-out images rightly")
    label_of = {name: k for k, name in enumerate(data.class_names)}
    label_of |= {cars.caption(name): k for name, k in label_of.items()}
    real_tints = tints(data.images)
    print(f"{'Frechet':>9} {'1000 KID':>9} {'body type right':>18} {'red, blue, brightness':>22}")
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
            images = ((x + 1) * 127.5).round().byte()
            features, labels = judge.features(images), [label_of.get(line["text"]) for line in some]
            named = [i for i, label in enumerate(labels) if label is not None]
            of_label = torch.tensor([labels[i] for i in named])
            colour = correlations(tints(images[named]), of_label, real_tints, data.labels)
            asked = [body_of(line["text"]) for line in some]
            pairs = list(zip(types(features).tolist(), asked, strict=True))
            right = [seen == body for seen, body in pairs if body is not None]
            found = distances(features, real, axes).values()
            share = f"{sum(right)} of {len(right)}, {sum(right) / max(1, len(right)):.1%}"
            tinted = ", ".join(f"{one:.2f}" for one in colour)
            row = "{:9.2f} {:9.2f} {:>18} {:>22}".format(*found, share, tinted)
            print(row, f" {folder}, scale {scale:g}", flush=True)
            all_asked, hit = Counter(b for _, b in pairs), Counter(b for a, b in pairs if a == b)
            each = (f"{BODIES[b]} {hit[b]} of {n}" for b, n in all_asked.most_common() if b is not None)
            print(f"{'':9} {', '.join(each)}", flush=True)
        lowest = floor(real, axes, len(some)).values()
        print("{:9.2f} {:9.2f}".format(*lowest), f" {len(some)} real images against the others")


if __name__ == "__main__":
    run_main(main)
