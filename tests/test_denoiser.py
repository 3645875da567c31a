"""`ddpm.py --task denoiser`: the single-step denoiser of CS180, project 5, B.1."""

import csv

import pytest
import torch
from conftest import TINY, error_line
from PIL import Image

import ddpm
from support.generators import seeded_generator
from support.loader import hold_out

FLAGS = (
    "--task denoiser --limit 48 --batch-size 16 --width 8 --multipliers 1 2 --blocks 1 --attention 1 "
    "--image-size 8 --device cpu"
).split()


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0])
def test_sigma_counts_in_units_of_images_in_0_to_1(sigma):
    """A network that returns its input errs by the noise: sigma^2 in [0, 1], 4 sigma^2 in [-1, 1]."""
    x_0 = torch.rand(64, 1, 16, 16) * 2 - 1
    seen = []

    def identity(z, t):
        seen.append(t)
        return z

    loss = ddpm.denoiser_loss(sigma, identity, x_0, generator=seeded_generator(0))
    assert loss.item() == pytest.approx(4 * sigma**2, rel=0.03)
    assert seen[0].shape == (64,) and (seen[0] == seen[0][0]).all()  # it is told no noise level
    again = ddpm.denoiser_loss(sigma, identity, x_0, generator=seeded_generator(0))
    assert again == loss


def test_a_denoiser_that_knows_the_image_has_no_loss():
    x_0 = torch.rand(4, 3, 8, 8)
    assert ddpm.denoiser_loss(0.5, lambda z, t: x_0, x_0) == 0


def test_it_is_shown_after_every_epoch_at_every_sigma_on_images_kept_back(cli, tmp_path, monkeypatch):
    trained_on = []
    original = ddpm.train

    def spy(loss, trainer):
        trained_on.append(trainer.loader.images)
        return original(loss, trainer)

    monkeypatch.setattr(ddpm, "train", spy)
    result = cli(*FLAGS, "--sigma", 0.4)
    assert result.code == 0, result.err
    run = tmp_path / "runs/denoiser_digits"
    pictures = [f"epoch_{k:04d}.png" for k in range(1, 6)]
    assert sorted(p.name for p in (run / "samples").iterdir()) == pictures
    assert Image.open(run / "samples/epoch_0001.png").width > 7 * 64
    rows = rows_of(run / "psnr.csv")
    assert [float(r["sigma"]) for r in rows if r["epoch"] == "5"] == [0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0]
    assert len(rows) == 5 * 7 and len(trained_on[0]) == 48 - 5
    for row in rows:  # the PSNR of noise sigma is -20 log10(sigma); 5 images of 64 pixels
        if row["sigma"] != "0":
            expected = -20 * torch.tensor(float(row["sigma"])).log10().item()
            assert float(row["noisy"]) == pytest.approx(expected, abs=1.0)
    at_own = [float(r["denoised"]) for r in rows if r["sigma"] == "0.4"]
    assert at_own[-1] > at_own[0]  # it learns
    assert "python analysis.py denoise runs/denoiser_digits" in result.out


def test_an_output_of_both_is_for_diffusion_alone(cli):
    """shapes are denoised by an eps and an x_0 at once; the single-step denoiser gives one image."""
    assert cli(*FLAGS, "--epochs", 1, "--dataset", "shapes", "--limit", 32).code == 0
    assert cli(*TINY, "--dataset", "shapes", "--limit", 32).code == 0
    for name, channels in (("denoiser", 3), ("ddpm", 6)):
        weights = torch.load(f"runs/{name}_shapes/ckpt.pt", weights_only=True)["net"]
        assert len(weights["conv_out.weight"]) == channels
    assert cli("--sample", 2, "--checkpoint", "runs/ddpm_shapes", "--sample-steps", 2).code == 0


def test_it_resumes_and_goes_on_in_its_table(cli, tmp_path):
    assert cli(*FLAGS, "--epochs", 2).code == 0
    result = cli("--resume", "runs/denoiser_digits", "--epochs", 3)
    assert result.code == 0, result.err
    assert [r["epoch"] for r in rows_of(tmp_path / "runs/denoiser_digits/psnr.csv")][::7] == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--sigma 0.5", "--sigma belongs to --task denoiser"),
        ("--task denoiser --schedule linear", "--schedule belongs to --task diffusion"),
        ("--task denoiser --prediction eps", "--prediction belongs to --task diffusion"),
        ("--task denoiser --sampler ddim", "--sampler belongs to --task diffusion"),
        ("--task denoiser --sigma 0", "--sigma"),
        ("--task blur", "invalid choice"),
        ("--task denoiser --limit 1 --image-size 8", "two images or more"),
    ],
)
def test_flags_without_an_effect_are_refused(cli, flags, says):
    assert says in error_line(cli(*flags.split()))


def test_it_is_no_diffusion_model_and_says_so(cli):
    assert cli(*FLAGS, "--epochs", 1).code == 0
    assert "'denoiser'" in error_line(cli("--sample", 2, "--checkpoint", "runs/denoiser_digits"))
    line = error_line(cli("--resume", "runs/denoiser_digits", "--epochs", 2, "--sampler", "ddpm"))
    assert "--sampler belongs to --task diffusion" in line


def test_images_held_out_are_a_tenth_and_at_most_1000():
    for count, few in ((2, 1), (48, 5), (1797, 180), (60000, 1000)):
        held_out, rest = hold_out(count, 0, "a test")
        assert len(held_out) == few and sorted([*held_out.tolist(), *rest.tolist()]) == list(range(count))
    assert not torch.equal(hold_out(48, 0, "a test")[0], hold_out(48, 1, "a test")[0])
