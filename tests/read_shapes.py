"""Does a text-to-image model draw what its captions say? A rule reads it out of the pixels.

python tests/read_shapes.py runs/ddpm_conditional_shapes [--guidance-scale 2 --sampler ddpm --sample-steps 50]
python tests/read_shapes.py runs/ddpm_conditional_shapes --words

Colour, shape and size are right where the picture has just the shapes of the caption, in these colours, of
these shapes or sizes. A relation is right where the shapes are also in the places that the caption gives
them. --words says instead, at four SNRs, by how much the error of x_0 grows where all words of a kind
are wrong: what a network has learned of them, long before its samples are right.
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
from support.images import to_uint8, to_x_0
from support.scenes import BACKGROUNDS, COLOURS, HELD_OUT, RELATIONS, SHAPES, SIZES, Scene, Shape
from support.text import Vocabulary
from utils import get_data

SMALLEST = 0.01  # share of the picture that a region must have to be a shape
LARGE = (SIZES["small"][1] + SIZES["large"][0]) / 2  # radius from which on a shape is large, of the image


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
    """The shape, and its radius in pixels, in some place and of some size about the box, that covers the same
    pixels best, by their intersection over union; `covered` (size, size) of 0..1.
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
                best[shape, r] = max(score, best.get((shape, r), 0))
    return max(best, key=best.get)


def edge_colour(picture):
    """The median of the border of a picture (H, H, 3)."""
    edge = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    return np.median(edge, axis=0)


def nearest(colour, names):
    return min(names, key=lambda name: np.abs(colour - names[name]).sum())


def read(picture):
    """[(size, colour, shape, (x, y))] of the regions of a picture (H, H, 3) uint8 that are not background.

    The background is the median of the border; a region's colour the nearest of COLOURS to that of its most
    colourful pixels.
    """
    picture = picture.astype(float)
    background = edge_colour(picture)
    away = np.abs(picture - background).max(2)
    regions, _ = ndimage.label(away > 60)
    found = []
    for k, box in enumerate(ndimage.find_objects(regions), start=1):
        mask = regions == k
        if mask.mean() < SMALLEST:
            continue
        inner = picture[mask & (away >= np.median(away[mask]))]
        colour = nearest(np.median(inner, 0), COLOURS)
        contrast = COLOURS[colour] - background
        covered = ((picture - background) @ contrast / (contrast @ contrast)).clip(0, 1)
        covered[~ndimage.binary_dilation(mask)] = 0
        shape, radius = closest_shape(covered, box, len(picture))
        size = "large" if radius > LARGE * len(picture) else "small"
        centre = ((box[1].start + box[1].stop) / 2, (box[0].start + box[0].stop) / 2)
        found.append((size, colour, shape, centre))
    return found


def in_place(expected, relation, found):
    """Whether the shapes found are those expected, (size, colour, shape) each, in their places."""
    if sorted(shape[1:] for shape in expected) != sorted(region[1:3] for region in found):
        return False
    if relation in (None, "and"):
        return True
    (x, y), (x_2, y_2) = next(
        [centre for *_, centre in order]
        for order in (found, found[::-1])
        if [region[1:3] for region in order] == [shape[1:] for shape in expected]
    )
    if expected[0][1:] == expected[1][1:]:  # two alike: either may be the first
        beside = relation in ("left of", "right of")
        return abs(x - x_2) > abs(y - y_2) if beside else abs(y - y_2) > abs(x - x_2)
    return {"left of": x < x_2, "right of": x > x_2, "above": y < y_2, "below": y > y_2}[relation]


def agrees(caption, picture):
    """Whether a picture holds the shapes of a caption, no others, and in the places it gives them."""
    expected, relation, *_ = described(caption)
    return in_place(expected, relation, read(picture))


def checked(caption, picture):
    """{what a caption says: whether the picture has it}."""
    expected, relation, _, background = described(caption)
    found = read(picture)
    right = {
        name: sorted(str(shape[i]) for shape in expected) == sorted(region[i] for region in found)
        for i, name in enumerate(("size", "colour", "shape"))
    }
    if None in (size for size, *_ in expected):
        del right["size"]
    if background:
        right["background"] = nearest(edge_colour(picture.astype(float)), BACKGROUNDS) == background
    if relation in RELATIONS:
        right["relation"] = in_place(expected, relation, found)
    return right


def prompt(colour, shape, size="", background=""):
    text = " ".join(word for word in (size, colour, shape) if word)
    return f"{'an' if text.startswith('orange') else 'a'} {text}{' on ' * bool(background)}{background}"


def prompts(count=100):
    """{what is asked for: captions}, the pairs of colour and shape and what goes with them taken in turn."""
    seen, held_out = (
        [(c, s) for c in COLOURS for s in SHAPES if ((c, s) in HELD_OUT) == out] for out in (False, True)
    )

    def turns(*lists):  # all combinations in turn, in a fixed random order
        every = list(itertools.product(*lists))
        order = np.random.default_rng(0).permutation(len(every))
        return [every[i] for i in itertools.islice(itertools.cycle(order), count)]

    def whole(pairs):
        return [prompt(*pair, size, on) for pair, size, on in turns(pairs, SIZES, BACKGROUNDS)]

    two = [f"{prompt(*a)} {relation} {prompt(*b)}" for a, relation, b in turns(seen, RELATIONS, seen)]
    return {
        "one shape": [prompt(*pair) for (pair,) in turns(seen)],
        "one shape, its size and background": whole(seen),
        "one shape, pairs never seen": [prompt(*pair) for (pair,) in turns(held_out)],
        "the same with size and background": whole(held_out),
        "two shapes and their relation": two,
    }


@torch.no_grad()
def drawn(net, diffusion, vocabulary, captions, args, size):
    """A picture (H, H, 3) uint8 for each caption; picture i has noise of its own."""
    pictures = []
    for i in range(0, len(captions), 50):
        batch = captions[i : i + 50]
        g = [seeded_generator(0, i + k) for k in range(len(batch))]
        x_T = randn_like(torch.empty(len(batch), 3, size, size), g)
        eps_theta = cfg(diffusion, net, vocabulary.encode(batch), args.guidance_scale)
        clipped, timesteps = ddpm.clip_x_0(diffusion, eps_theta), diffusion.timesteps(args.sample_steps)
        x_0 = ddpm.SAMPLERS[args.sampler](diffusion, clipped, x_T, timesteps, g)
        pictures.extend(to_uint8(x_0))
    return pictures


def next_of(words):
    """{each word: the next one}."""
    return dict(zip(words, [*words[1:], words[0]], strict=True))


WRONG = {kind: next_of(list(words)) for kind, words in (("background", BACKGROUNDS), ("colour", COLOURS))}
WRONG |= {"size": next_of(list(SIZES)), "shape": next_of(list(SHAPES))}
WRONG["place"] = next_of(["left", "right"]) | next_of(["above", "below"]) | next_of(["top", "bottom"])
WRONG["relation"] = WRONG["place"]  # of two shapes, and "place" of one


@torch.no_grad()
def words_learned(net, diffusion, vocabulary, size, t, count):
    """The error of x_0 at t with the right captions of real scenes, and by what share of itself it grows
    without them, or where all words of a kind are wrong.
    """
    data = get_data("shapes", image_size=size, limit=count)
    x_0, times = to_x_0(data.images), torch.full((count,), t)
    x_t, _ = diffusion.noise_images(x_0, times, seeded_generator(0, t))

    def errors(captions):  # (count,)
        eps = diffusion.denoiser(net, vocabulary.encode(captions))(x_t, times)
        return (diffusion.x_0_from_eps(x_t, eps, times) - x_0).square().mean((1, 2, 3))

    right = errors(data.captions)
    growth = {"no caption": (errors([""] * count).mean() / right.mean()).item() - 1}
    for kind, other in WRONG.items():
        wrong = [" ".join(other.get(word, word) for word in caption.split()) for caption in data.captions]
        if kind in ("place", "relation"):
            shapes = 2 if kind == "relation" else 1
            is_meant = [len(described(caption)[0]) == shapes for caption in data.captions]
            choices = zip(is_meant, wrong, data.captions, strict=True)
            wrong = [one if meant else caption for meant, one, caption in choices]
        has = torch.tensor([one != caption for one, caption in zip(wrong, data.captions, strict=True)])
        growth[kind] = (errors(wrong)[has].mean() / right[has].mean()).item() - 1
    return right.mean().item(), growth


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--guidance-scale", type=float, default=2.0)
    parser.add_argument("--sampler", choices=list(ddpm.SAMPLERS), default="ddpm")
    parser.add_argument("--sample-steps", type=int, default=50)
    parser.add_argument("--count", type=int, default=100, help="captions of each kind")
    parser.add_argument("--words", action="store_true", help="what is learned of each kind of word")
    args = parser.parse_args()
    net, diffusion, config = ddpm.load_network(args.checkpoint, kinds=("ddpm_conditional",))
    vocabulary, size = Vocabulary(**config["vocabulary"]), config["image_size"]
    if args.words:
        for snr in (0.006, 0.025, 0.1, 1):
            t = int((diffusion.snr[1:] - snr).abs().argmin()) + 1
            error, growth = words_learned(net, diffusion, vocabulary, size, t, 4 * args.count)
            grown = ", ".join(f"{kind} {share:.1%}" for kind, share in growth.items())
            print(f"t = {t}, SNR {diffusion.snr[t]:.3f}: error {error:.4f}; grows by {grown}", flush=True)
        return
    for name, captions in prompts(args.count).items():
        pictures = drawn(net, diffusion, vocabulary, captions, args, size)
        every = [checked(caption, picture) for caption, picture in zip(captions, pictures, strict=True)]
        counts = ", ".join(f"{what} {sum(one[what] for one in every)}" for what in every[0])
        print(f"{name}: of {len(captions)} right {counts}", flush=True)


if __name__ == "__main__":
    run_main(main)
