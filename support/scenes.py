"""Drawn scenes of one or two coloured shapes, with captions: each is made from (seed, index) alone."""

import math
from collections import namedtuple
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

COLOURS = dict(red=(230, 30, 30), green=(20, 170, 40), blue=(40, 70, 240), yellow=(250, 220, 20))
COLOURS |= dict(purple=(150, 40, 190), orange=(250, 135, 10))
BACKGROUNDS = {"white": (255, 255, 255), "black": (0, 0, 0), "gray": (128, 128, 128)}
# Corners of shapes in units of the radius, y down; a circle has none.
SQUARE = [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]
STAR = [(r * math.sin(k * math.pi / 5), -r * math.cos(k * math.pi / 5)) for k, r in enumerate((1, 0.42) * 5)]
ARM = [(-0.3, -1), (0.3, -1), (0.3, -0.3)]  # of a cross, which has four, each a quarter turn from the last
CROSS = [((x, y), (-y, x), (-x, -y), (y, -x))[turns] for turns in range(4) for x, y in ARM]
SHAPES = {"circle": [], "square": SQUARE, "triangle": [(0, -1), (0.95, 0.8), (-0.95, 0.8)]}
SHAPES |= {"star": STAR, "cross": CROSS}
SIZES = {"small": (0.13, 0.15), "large": (0.2, 0.22)}  # smallest and largest radius, in units of the image
# Pairs that no training image shows: prompts with them test whether the model combines colour and shape.
HELD_OUT = set(dict(green="circle", yellow="square", orange="triangle", red="star", blue="cross").items())
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # the first's side
# One shape of a scene; radius and centre (x, y) are in units of the image, the centre from the top left.
Shape = namedtuple("Shape", "colour shape size radius centre")


class Scene(namedtuple("Scene", "shapes background caption")):
    """One or two shapes on a background, and the caption that describes them."""

    def draw(self, size: int) -> Image.Image:
        """The picture, RGB, size x size pixels; drawn four times as large and averaged, for smooth edges."""
        picture = Image.new("RGB", (4 * size, 4 * size), BACKGROUNDS[self.background])
        canvas, scale = ImageDraw.Draw(picture), 4 * size
        for shape in self.shapes:
            (x, y), r, corners = shape.centre, shape.radius, SHAPES[shape.shape]
            points = [((x + r * u) * scale, (y + r * v) * scale) for u, v in corners or ((-1, -1), (1, 1))]
            (canvas.polygon if corners else canvas.ellipse)(points, COLOURS[shape.colour])
        return picture.reduce(4)


def make_scene(seed: int, index: int, pairs: Sequence[tuple[str, str]]) -> Scene:
    """The scene of that seed and index; its one or two shapes are drawn from `pairs` of colour and shape."""
    rng = np.random.default_rng([seed, index])

    def sometimes(text: str) -> str:  # so that the model also learns short prompts
        return text if rng.random() < 0.75 else ""

    def between(low: float, high: float) -> float:
        return round(float(rng.uniform(low, high)), 4)

    def shape_at(*sides: int) -> tuple[tuple[Shape], str]:
        """One shape, on that side (-1, 0 or 1) of the middle, right and down, and its description."""
        (colour, shape), size = pairs[rng.integers(len(pairs))], ["small", "large"][rng.integers(2)]
        radius = between(*SIZES[size])
        near, far = 0.03 + radius, 0.49 - radius  # from the middle: two shapes never touch, nor the edge
        x, y = (0.5 + side * between(near, far) if side else between(0.45, 0.55) for side in sides)
        description = f"{sometimes(size + ' ')}{colour} {shape}"
        article = "an" if description.startswith("orange") else "a"
        return (Shape(colour, shape, size, radius, (x, y)),), f"{article} {description}"

    background = list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    if rng.random() < 0.5:
        x, y = (int(side) for side in rng.integers(-1, 2, 2))
        shapes, text = shape_at(x, y)
        sides = [{-1: "top", 1: "bottom"}.get(y), {-1: "left", 1: "right"}.get(x)]
        text += sometimes(f" at the {' '.join(filter(None, sides))}" if x or y else " in the middle")
    else:
        relation, (x, y) = list(RELATIONS.items())[rng.integers(len(RELATIONS))]
        (first, text), (second, text_2) = shape_at(x, y), shape_at(-x, -y)
        text += f" {sometimes(relation) or 'and'} {text_2}"
        shapes = first + second
    return Scene(shapes, background, text + sometimes(f" on {background}"))
