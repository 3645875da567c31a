"""Does a text-to-image model draw what its captions say? A rule reads colour and shape out of the pixels.

python tests/read_shapes.py runs/ddpm_conditional_shapes [--guidance-scale 3 --sampler ddpm --sample-steps 50]
"""

import argparse
import itertools
import re
import sys
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ddpm
from ddpm_conditional import cfg
from support.errors import run_main
from support.generators import randn_like, seeded_generator
from support.images import to_uint8
from support.scenes import COLOURS, HELD_OUT, SHAPES, Scene, Shape
from support.text import Vocabulary
from utils import shapes

SMALLEST = 0.01  # share of the picture that a region must have to be a shape


def described(caption):
    """A caption taken apart: its shapes as (size or None, colour, shape), relation, place, background."""
    one = r"an? (?:(small|large) )?(\w+) (circle|square|triangle|star|cross)"
    two = rf"{one}(?: (and|left of|right of|above|below) {one}| (in the middle|at the [a-z ]+?))?"
    found = re.fullmatch(two + r"(?: on (\w+))?", caption)
    if not found:
        raise ValueError(f"{caption!r} is no caption of shapes")
    size, colour, shape, relation, *second, place, background = found.groups()
    first = (size, colour, shape)
    return [first, tuple(second)] if relation else [first], relation, place, background


def coverage(shape, radius, centre, size):
    """The share of each pixel that the shape covers, drawn as the data set draws it; (size, size)."""
    scene = Scene((Shape("red", shape, "", radius, centre),), "black", "")
    return np.asarray(scene.draw(size))[..., 0] / COLOURS["red"][0]


def closest_shape(covered, box, size):
    """The shape, in some place and of some size about the box, that covers the same pixels best, by their
    intersection over union; `covered` (size, size) of 0..1.
    """
    middle = [(side.start + side.stop) / 2 for side in reversed(box)]  # x, y
    radius = max(side.stop - side.start for side in box) / 2
    best = {}
    for shape in SHAPES:
        for r in np.arange(radius - 1.5, radius + 1.1, 0.5):
            for dx, dy in itertools.product((-0.5, 0, 0.5), (-0.5, 0, 0.5, 1)):
                at = ((middle[0] + dx) / size, (middle[1] + dy) / size)
                other = coverage(shape, max(r, 1) / size, at, size)
                score = np.minimum(covered, other).sum() / np.maximum(covered, other).sum()
                best[shape] = max(score, best.get(shape, 0))
    return max(best, key=best.get)


def read(picture):
    """[(colour, shape, (x, y))] of the regions of a picture (H, H, 3) uint8 that are not background.

    The background is the median of the border; a region's colour the nearest of COLOURS to that of its most
    colourful pixels.
    """
    picture = picture.astype(float)
    edge = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    background = np.median(edge, axis=0)
    away = np.abs(picture - background).max(2)
    regions, _ = ndimage.label(away > 60)
    found = []
    for k, box in enumerate(ndimage.find_objects(regions), start=1):
        mask = regions == k
        if mask.mean() < SMALLEST:
            continue
        inner = picture[mask & (away >= np.median(away[mask]))]
        colour = min(COLOURS, key=lambda name: np.abs(np.median(inner, 0) - COLOURS[name]).sum())
        contrast = COLOURS[colour] - background
        covered = ((picture - background) @ contrast / (contrast @ contrast)).clip(0, 1)
        covered[~ndimage.binary_dilation(mask)] = 0
        shape = closest_shape(covered, box, len(picture))
        found.append((colour, shape, ((box[1].start + box[1].stop) / 2, (box[0].start + box[0].stop) / 2)))
    return found


def agrees(caption, picture):
    """Whether a picture holds the shapes of a caption, no others, and in the places it gives them."""
    expected, relation, *_ = described(caption)
    found = read(picture)
    if sorted((colour, shape) for _, colour, shape in expected) != sorted(region[:2] for region in found):
        return False
    if relation in (None, "and"):
        return True
    orders = [found, found[::-1]]
    (x, y), (x_2, y_2) = next(
        [centre for *_, centre in order]
        for order in orders
        if [region[:2] for region in order] == [shape[1:] for shape in expected]
    )
    if expected[0][1:] == expected[1][1:]:  # two alike: either may be the first
        beside = relation in ("left of", "right of")
        return abs(x - x_2) > abs(y - y_2) if beside else abs(y - y_2) > abs(x - x_2)
    return {"left of": x < x_2, "right of": x > x_2, "above": y < y_2, "below": y > y_2}[relation]


def prompt(colour, shape):
    return f"{'an' if colour == 'orange' else 'a'} {colour} {shape}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--guidance-scale", type=float, default=3.0)
    parser.add_argument("--sampler", choices=list(ddpm.SAMPLERS), default="ddpm")
    parser.add_argument("--sample-steps", type=int, default=50)
    args = parser.parse_args()
    net, diffusion, config = ddpm.load_network(args.checkpoint, kinds=("ddpm_conditional",))
    vocabulary, size = Vocabulary(**config["vocabulary"]), config["image_size"]
    seen = [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in HELD_OUT]
    prompts = {
        "one shape, seen pairs": [prompt(*pair) for pair in seen] * 4,
        "one shape, held-out pairs": [prompt(*pair) for pair in sorted(HELD_OUT)] * 20,
        "two shapes, seen pairs": [
            caption for caption in shapes(None, "train", 1000).captions if described(caption)[1]
        ][:100],
    }
    for name, captions in prompts.items():
        right = 0
        for i in range(0, len(captions), 50):
            batch = captions[i : i + 50]
            g = [seeded_generator(0, i + k) for k in range(len(batch))]
            x_T = randn_like(torch.empty(len(batch), 3, size, size), g)
            eps_theta = cfg(diffusion, net, vocabulary.encode(batch), args.guidance_scale)
            clipped, timesteps = ddpm.clip_x_0(diffusion, eps_theta), diffusion.timesteps(args.sample_steps)
            x_0 = ddpm.SAMPLERS[args.sampler](diffusion, clipped, x_T, timesteps, g)
            right += sum(map(agrees, batch, to_uint8(x_0)))
        print(f"{name}: {right} of {len(captions)}", flush=True)


if __name__ == "__main__":
    run_main(main)
