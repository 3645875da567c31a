"""The drawn data set: what its captions say, what is held out, and the rule that reads the pictures."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from read_shapes import agrees, described

import utils
from support import cache
from support.scenes import BACKGROUNDS, COLOURS, HELD_OUT, RELATIONS, SHAPES, SIZES, Scene, Shape
from utils import get_data


@pytest.fixture
def get(tmp_path, monkeypatch):
    """get_data with its cache in a folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    return get_data


def test_captions_of_shapes_say_what_is_drawn():
    scenes = utils.shapes(None, "train", 2000).images
    for scene in scenes:
        shapes, relation, place, background = described(scene.caption)
        assert len(shapes) == len(scene.shapes) and background in (None, scene.background)
        for (size, colour, shape), drawn in zip(shapes, scene.shapes, strict=True):
            assert size in (None, drawn.size) and (colour, shape) == (drawn.colour, drawn.shape)
        x, y = scene.shapes[0].centre
        if relation not in (None, "and"):
            x_2, y_2 = scene.shapes[1].centre
            apart = {"left of": x_2 - x, "right of": x - x_2, "above": y_2 - y, "below": y - y_2}[relation]
            assert apart >= sum(shape.radius for shape in scene.shapes)  # beside each other, not overlapping
        for side, where in (("left", x), ("right", 1 - x), ("top", y), ("bottom", 1 - y)):
            assert not (place and side in place) or where < 0.45
        if place == "in the middle":
            assert abs(x - 0.5) <= 0.05 and abs(y - 0.5) <= 0.05
    every = [described(scene.caption) for scene in scenes]
    assert {len(shapes) for shapes, *_ in every} == {1, 2}
    assert {relation for _, relation, *_ in every} == {None, "and", *RELATIONS}
    assert {background for *_, background in every} == {None, *BACKGROUNDS}
    assert not any(re.search(r"\ba orange|\ban (?!orange)", scene.caption) for scene in scenes)


@pytest.mark.parametrize("size", [16, 32, 100])
def test_shapes_have_their_colours_sizes_and_background(size):
    for scene in utils.shapes(None, "train", 60).images:
        picture = np.asarray(scene.draw(size)).astype(int)
        assert picture.shape == (size, size, 3)
        assert tuple(picture[0, 0]) == BACKGROUNDS[scene.background]
        for shape in scene.shapes:
            x, y = (int(c * size) for c in shape.centre)
            assert tuple(picture[y, x]) == COLOURS[shape.colour]
            inside = [shape.radius <= c <= 1 - shape.radius for c in shape.centre]
            assert all(inside)  # all of it is in the picture
        covered = (picture != picture[0, 0]).any(2)
        if len(scene.shapes) == 1 and size == 100:
            extent = max(np.ptp(np.flatnonzero(covered.any(axis))) + 1 for axis in (0, 1)) / size
            low, high = SIZES[scene.shapes[0].size]
            assert 1.6 * low <= extent <= 2 * high + 0.03


def test_held_out_pairs_never_enter_training():
    pairs = {
        split: {(s.colour, s.shape) for scene in utils.shapes(None, split, 3000).images for s in scene.shapes}
        for split in ("train", "test")
    }
    every = {(colour, shape) for colour in COLOURS for shape in SHAPES}
    assert pairs["test"] == HELD_OUT and pairs["train"] == every - HELD_OUT
    for names in zip(*HELD_OUT, strict=True):  # each colour and shape of them is seen in other pairs
        assert all(any(name in pair for pair in pairs["train"]) for name in names)
    said = {described(caption)[0][0][1:] for caption in utils.shapes(None, "train", 3000).captions}
    assert not said & HELD_OUT


def test_two_processes_draw_the_same_shapes(tmp_path):
    code = (
        "import sys, utils; from support.files import digest; "
        "data = utils.get_data('shapes', limit=300, cache_dir=sys.argv[1]); "
        "print(digest(data.images), data.captions)"
    )
    outs = []
    for name in ("a", "b"):
        env = {**os.environ, "PYTHONPATH": str(utils.HERE), "PYTHONHASHSEED": str(len(outs) + 1)}
        command = [sys.executable, "-c", code, str(tmp_path / name)]
        outs.append(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout)
    assert outs[0] == outs[1] and len(outs[0]) > 64


def test_number_and_size_of_shapes(get):
    few, more = (get("shapes", limit=n, image_size=16) for n in (5, 8))
    assert few.images.shape == (5, 3, 16, 16) and len(few.captions) == 5
    assert few.labels is None and not few.flip
    assert torch.equal(more.images[:5], few.images) and more.captions[:5] == few.captions  # by index alone
    assert get("shapes", limit=3).images.shape[-1] == 32
    assert len(utils.shapes(None, "train").images) == 20000
    assert not torch.equal(get("shapes", split="test", limit=5, image_size=16).images, few.images)


def test_shapes_are_cached(get, monkeypatch):
    first = get("shapes", limit=5)
    monkeypatch.setattr(cache, "decode", None)  # drawing them again would fail
    assert torch.equal(get("shapes", limit=5).images, first.images)


def test_the_rule_reads_what_is_drawn():
    for scene in utils.shapes(None, "train", 40).images + utils.shapes(None, "test", 20).images:
        assert agrees(scene.caption, np.asarray(scene.draw(32)))


def test_the_rule_sees_what_is_wrong():
    star, left = Shape("red", "star", "", 0.22, (0.3, 0.5)), Shape("red", "star", "", 0.2, (0.25, 0.5))
    right = Shape("blue", "cross", "", 0.2, (0.75, 0.5))
    picture = np.asarray(Scene((star,), "gray", "").draw(32))
    assert agrees("a red star", picture)
    for wrong in (
        "a red circle",
        "a blue star",
        "a red star left of a red star",
        "a red star and a red star",
    ):
        assert not agrees(wrong, picture)
    picture = np.asarray(Scene((left, right), "black", "").draw(32))
    assert agrees("a red star left of a blue cross", picture)
    assert agrees("a blue cross and a red star", picture)
    assert not agrees("a red star right of a blue cross", picture)
    assert not agrees("a red cross left of a blue star", picture)  # colours of the wrong shapes
