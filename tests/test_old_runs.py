"""Runs that the program before issue 13 made: they load, resume and sample, with that program's results.

tests/fixtures holds two, of `ddpm.py FLAGS --epochs 2` and the same with ddpm_conditional.py, FLAGS being
--limit 40 --batch-size 16 --width 4 --multipliers 1 2 --blocks 1 --attention 1 --image-size 8 --device cpu
--noise-steps 20 --sample-steps 4 --lr 0.02. In expected.npz is what that program made of them: the weights
`net` and `ema` after `--resume RUN --epochs 4`, each in one array, and the images `samples` of
`--sample 3 --seed 1`, with `--labels 1,2` where the run is conditional.
"""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PROJECT
from PIL import Image

import ddpm
import ddpm_conditional

OF_SAMPLES = {
    "out",
    "animate",
    "labels",
    "prompt",
    "batches",
    "guidance",
    "classifier",
    "checkpoint",
    "sample",
}


@pytest.fixture(params=["old_run", "old_conditional_run"])
def old(request, tmp_path):
    """The script of an old run, a copy of its folder, and what is expected of it."""
    folder = shutil.copytree(PROJECT / "tests/fixtures" / request.param, tmp_path / "old")
    script = ddpm_conditional if "conditional" in request.param else ddpm
    return script, folder, np.load(folder / "expected.npz")


def test_an_old_run_goes_on_as_it_would_have(old, script):
    module, run, expected = old
    before = json.loads((run / "config.json").read_text())
    result = script(module, "--resume", run, "--epochs", 4)
    assert result.code == 0, result.err
    state = torch.load(run / "ckpt.pt", weights_only=True)
    assert (state["epoch"], state["step"]) == (4, 12)
    for part in ("net", "ema"):
        wanted, position = torch.from_numpy(expected[part]), 0
        for name, found in state[part].items():
            position, start = position + found.numel(), position
            if not name.endswith("k.bias"):  # without effect: its gradient is rounding, which AdamW enlarges
                assert torch.allclose(found.flatten(), wanted[start:position], atol=1e-4, rtol=0), name
        assert position == len(wanted)
    assert [row["epoch"] for row in csv.DictReader(open(run / "log.csv"))] == ["1", "2", "3", "4"]
    config = json.loads((run / "config.json").read_text())
    assert OF_SAMPLES & before.keys() and config == state["config"] and not OF_SAMPLES & config.keys()
    newer = dict.fromkeys(("spacing", "latent", "downsampling", "latent_channels"))  # than the run
    newer |= {"patch": 1, "places": False, "adagn": False}
    if module is ddpm_conditional:
        newer["text_kernel"] = 0
    assert config == {key: before.get(key) for key in config} | {"epochs": 4} | newer  # the others stay
    assert config.keys() - before.keys() == newer.keys()


def test_an_old_run_is_sampled_as_it_was(old, script):
    module, run, expected = old
    labels = ("--labels", "1,2") if module is ddpm_conditional else ()
    result = script(module, "--sample", 3, "--checkpoint", run, *labels, "--seed", 1, "--out", "out")
    assert result.code == 0, result.err
    found = np.stack([np.asarray(Image.open(Path("out") / f"{i:05d}.png")) for i in range(3)])
    assert found.shape == expected["samples"].shape
    assert np.abs(found.astype(int) - expected["samples"]).max() <= 2


def test_the_fixtures_of_git_are_whole_and_small():
    files = [path for path in (PROJECT / "tests/fixtures").rglob("*") if path.is_file()]
    assert {path.name for path in files} == {"ckpt.pt", "config.json", "log.csv", "expected.npz"}
    assert sum(path.stat().st_size for path in files) < 1.1e6
