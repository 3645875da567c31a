"""Latent diffusion: closed forms for Gaussian data, formulas of the loss, and what a user sees of a run."""

import csv
import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, error_line, run_in
from PIL import Image
from torch.distributions import Normal, kl_divergence

import analysis
import ddpm
import ddpm_conditional
import edit
import utils
from modules import Attention, Autoencoder, Latents, PublishedAutoencoder
from support.generators import seeded_generator
from support.loader import Loader, hold_out

AUTOENCODER = (  # of digits at 8x8, latents 4x4
    "--task autoencoder --limit 48 --batch-size 16 --epochs 2 --width 8 --multipliers 1 2 --blocks 1 "
    "--image-size 8 --device cpu"
).split()
LATENT = [*TINY[: TINY.index("--image-size")], "--latent", "runs/autoencoder_digits", "--device", "cpu"]


def gray(path):
    return np.asarray(Image.open(path).convert("L")).astype(int)


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# ------------------------------------------------------------------------------------------------------------
# Closed forms


class PCA(torch.nn.Module):
    """A linear autoencoder of images (B, 2, 4, 4): 12 principal axes of a Gaussian as a latent (3, 2, 2)."""

    divisor, latent_channels = 2, 3

    def __init__(self):
        super().__init__()
        root = torch.randn(32, 32, generator=seeded_generator(0), dtype=torch.float64) / 32**0.5
        self.mean = torch.linspace(-0.5, 0.5, 32, dtype=torch.float64)
        self.covariance = root @ root.T
        values, vectors = torch.linalg.eigh(self.covariance)
        self.values, self.axes = values[-12:], vectors[:, -12:]  # (12,), (32, 12)

    def encode(self, x):
        z = (x.flatten(1) - self.mean) @ self.axes
        return z.view(-1, 3, 2, 2), torch.full((len(x), 3, 2, 2), -torch.inf)

    def decode(self, z):
        return (self.mean + z.flatten(1) @ self.axes.T).view(-1, 2, 4, 4)


@pytest.mark.parametrize("sampler", ["ddim", "pndm", "dpm_solver"])
@pytest.mark.parametrize("schedule", ["cosine", "scaled_linear"])
def test_latent_diffusion_gives_the_projected_gaussian(sampler, schedule):
    """With the ideal denoiser sampling is linear, so images of the unit vectors give mean and covariance."""
    pca, diffusion = PCA(), ddpm.Diffusion(1000, schedule)
    scale = pca.values.mean().item() ** -0.5  # mean 0, so this makes the variance of all values 1
    space, variance = Latents(pca, scale, 4, "cpu"), (scale**2 * pca.values).view(1, 3, 2, 2)

    def eps_theta(x_t, t):
        ab = diffusion.alpha_bar[t].view(-1, 1, 1, 1)
        return (1 - ab).sqrt() * x_t / (ab * variance + 1 - ab)  # E[eps | x_t], x_0 ~ N(0, variance)

    assert space.shape == (3, 2, 2) and space.factor == 2 and variance.mean().item() == pytest.approx(1)
    unit = torch.cat([torch.zeros(1, 12), torch.eye(12)]).double().view(13, 3, 2, 2)
    x = space.decode(ddpm.SAMPLERS[sampler](diffusion, eps_theta, unit, diffusion.timesteps(1000)))
    mean, columns = x[0].flatten(), (x[1:] - x[0]).flatten(1)
    projection = pca.axes @ pca.axes.T
    assert torch.allclose(mean, pca.mean, atol=2e-2)  # decode returns float32
    wanted = projection @ pca.covariance @ projection
    assert (columns.T @ columns - wanted).norm() < 0.03 * wanted.norm()


def test_encode_and_decode_are_inverse_up_to_the_projection():
    pca = PCA()
    space, x = Latents(pca, 3.0, 4, "cpu"), torch.randn(600, 2, 4, 4, dtype=torch.float64)
    z = space.encode(x)
    assert torch.allclose(z, 3 * pca.encode(x)[0])  # in parts, joined in order
    seen = (x.flatten(1) - pca.mean) @ pca.axes @ pca.axes.T + pca.mean
    assert torch.allclose(space.decode(z).double().flatten(1), seen, atol=1e-5)
    assert space.decode(z[None, :4, None].expand(2, 4, 3, 3, 2, 2)).shape == (2, 4, 3, 2, 4, 4)


def test_the_loss_is_l1_edges_and_kl():
    draw = partial(torch.randn, generator=seeded_generator(1), dtype=torch.float64)
    x, x_hat, mean, log_variance = draw(2, 3, 5, 6), draw(2, 3, 5, 6), draw(2, 4, 2, 2), draw(2, 4, 2, 2)
    loss = ddpm.autoencoder_loss(lambda x, generator: (x_hat, mean, log_variance), x)
    kl = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(torch.zeros(()), torch.ones(())))
    e = (x_hat - x).numpy()
    edges = np.abs(e[:, :, 1:] - e[:, :, :-1]).mean() + np.abs(e[..., 1:] - e[..., :-1]).mean()
    wanted = np.abs(e).mean() + edges + 1e-6 * kl.sum().item() / x.numel()
    assert loss.item() == pytest.approx(wanted, rel=1e-12)


def test_z_is_drawn_from_q():
    """What forward decodes has the mean and the variance that encode says."""
    torch.manual_seed(0)
    net, seen = Autoencoder(4, 1, 8, (1, 2), 1, ()), []
    net.decode = lambda z: seen.append(z) or z
    x = torch.randn(1, 1, 8, 8).expand(4000, -1, -1, -1)
    with torch.no_grad():
        _, mean, log_variance = net(x, seeded_generator(0))
    z = (seen[0] - mean) / (log_variance / 2).exp()
    assert z.mean().abs() < 0.01 and (z.var() - 1).abs() < 0.01
    assert torch.equal(mean, net.encode(x)[0]) and mean.shape == (4000, 4, 4, 4)


@pytest.mark.parametrize("levels", [2, 3, 4])
@pytest.mark.parametrize("channels", [1, 3])
def test_shapes_of_an_autoencoder(levels, channels):
    net, factor = Autoencoder(5, channels, 8, (1,) * levels, 1, ()), 2 ** (levels - 1)
    mean, log_variance = net.encode(torch.randn(2, channels, 2 * factor, 3 * factor))
    assert mean.shape == log_variance.shape == (2, 5, 2, 3)
    assert net.decode(mean).shape == (2, channels, 2 * factor, 3 * factor)
    assert not any("time" in name for name in net.state_dict())
    with pytest.raises(ValueError, match="divisible"):
        net.encode(torch.randn(1, channels, factor, factor + 1))


def test_the_quantiser_takes_the_nearest_vector():
    torch.manual_seed(0)
    net = PublishedAutoencoder(4, 1e-6, 50, 3, 3, 8, (1, 2), 1, ())
    z, codes = torch.randn(2, 3, 4, 5), net.codebook.weight
    found = net.quantise(z)
    for b, i, j in np.ndindex(2, 4, 5):
        distances = [(z[b, :, i, j] - code).square().sum().item() for code in codes]
        assert torch.equal(found[b, :, i, j], codes[int(np.argmin(distances))])
    assert torch.equal(net.quantise(found), found)


def test_heads_attend_by_themselves():
    """Two heads are two attentions of half the channels, each with its own softmax."""
    torch.manual_seed(0)
    x, attention = torch.randn(2, 16, 3, 3), Attention(16, heads=2)
    torch.nn.init.eye_(attention.out.weight[:, :, 0, 0])
    h = attention.norm(x)
    q, k, v = (f(h).flatten(2) for f in (attention.q, attention.k, attention.v))  # (B, 16, 9)
    halves = []
    for part in (slice(0, 8), slice(8, 16)):
        weights = (q[:, part].transpose(1, 2) @ k[:, part] / 8**0.5).softmax(-1)  # (B, 9, 9)
        halves.append(v[:, part] @ weights.transpose(1, 2))
    assert torch.allclose(attention(x), x + torch.cat(halves, 1).view_as(x), atol=1e-5)


def test_mirrored_latents_are_those_of_mirrored_images():
    """The loader takes the second of a pair where it would mirror the image."""
    images = torch.randint(0, 256, (40, 3, 4, 4), dtype=torch.uint8, generator=seeded_generator(0))
    x = images.float() / 127.5 - 1
    pairs = torch.stack([x, x.flip(-1)], 1).half()
    plain = Loader(images, 16, flip=True, seed=3)
    latent = Loader(pairs, 16, flip=True, seed=3)
    latent.scale = 2.0
    for (a, _), (b, _) in zip(plain.epoch(0), latent.epoch(0), strict=True):
        assert torch.allclose(2 * a, b, atol=2e-3)
    (never, _), *_ = Loader(pairs, 40, flip=False).epoch(0)
    (first, _), *_ = Loader(images, 40, flip=False).epoch(0)
    assert torch.allclose(never, first, atol=1e-3)


# ------------------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with an autoencoder and latent runs: unconditional, conditional, and a classifier."""
    folder = tmp_path_factory.mktemp("latent")
    run_in(folder, ddpm, *AUTOENCODER)
    run_in(folder, ddpm, *LATENT)
    run_in(folder, ddpm_conditional, *LATENT)
    run_in(folder, ddpm_conditional, "--task", "classifier", *without(LATENT, "--sample-steps"))
    Image.effect_noise((8, 8), 90).save(folder / "image.png")
    return folder


def without(flags, name):
    at = flags.index(name)
    return [*flags[:at], *flags[at + 2 :]]


@pytest.fixture
def runs(trained, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return tmp_path / "runs"


def checkpoint(run):
    return torch.load(run / "ckpt.pt", weights_only=True)


def test_an_autoencoder_is_measured_on_images_kept_back(runs, monkeypatch):
    rows = rows_of(runs / "autoencoder_digits/log.csv")
    assert [row["epoch"] for row in rows] == ["1", "2"] and (runs / "autoencoder_digits/samples").is_dir()
    state = checkpoint(runs / "autoencoder_digits")
    net = Autoencoder(4, 1, 8, (1, 2), 1, ())
    net.load_state_dict(state["ema"])
    images = utils.get_data("digits", image_size=8, limit=48).images
    held_out, _ = hold_out(48, 0, "x")
    x = images[held_out].float() / 127.5 - 1
    with torch.no_grad():
        error = (net.eval().decode(net.encode(x)[0]).clamp(-1, 1) - x).square().mean((1, 2, 3)) / 4
    assert float(rows[-1]["psnr"]) == pytest.approx((-10 * error.log10()).mean().item(), abs=0.02)
    assert -1 <= float(rows[-1]["ssim"]) <= 1
    config = state["config"]
    assert (config["downsampling"], config["latent_channels"]) == (2, 4)


def test_more_training_reconstructs_better(cli, tmp_path):
    """Held-out digits are reconstructed far better than by any one image, and better each time."""
    flags = without(without(AUTOENCODER, "--limit"), "--epochs")
    assert cli(*flags, "--limit", 300, "--epochs", 10).code == 0
    rows = rows_of(tmp_path / "runs/autoencoder_digits/log.csv")
    assert float(rows[-1]["psnr"]) > 20 and float(rows[-1]["psnr"]) > float(rows[0]["psnr"]) + 3
    assert float(rows[-1]["ssim"]) > 0.9


def test_latents_have_variance_one_and_are_cached(runs, cli):
    state, (file,) = checkpoint(runs / "ddpm_digits"), Path("data/cache").glob("*latents*")
    z = np.load(file)
    assert z.dtype == np.float16 and z.shape == (48, 1, 4, 4, 4)  # digits are not mirrored
    assert z.astype(np.float64).std() * state["autoencoder"]["scale"] == pytest.approx(1, abs=1e-9)
    net, _, config = ddpm.load_network(runs / "ddpm_digits")
    space = config["space"]
    assert space.shape == (4, 4, 4) and net.conv_in.in_channels == 4
    assert space.scale == state["autoencoder"]["scale"]
    x = utils.get_data("digits", image_size=8, limit=48).images.float() / 127.5 - 1
    assert torch.allclose(space.encode(x) / space.scale, torch.from_numpy(z[:, 0]).float(), atol=2e-2)
    before = file.stat().st_mtime_ns
    result = cli(*LATENT)  # found again
    assert result.code == 0 and "encoding" not in result.err and file.stat().st_mtime_ns == before
    assert cli(*LATENT, "--flip").code == 0  # another file: both mirror images
    both = max(Path("data/cache").glob("*latents*"), key=lambda path: path.stat().st_mtime_ns)
    assert np.load(both).shape == (48, 2, 4, 4, 4)


def test_a_latent_run_takes_the_data_of_its_autoencoder(runs):
    for name in ("ddpm_digits", "ddpm_conditional_digits", "classifier_digits"):
        config = json.loads((runs / name / "config.json").read_text())
        assert (config["dataset"], config["image_size"], config["channels"]) == ("digits", 8, 1)
        assert (config["latent"], config["downsampling"], config["latent_channels"]) == (
            "runs/autoencoder_digits", 2, 4
        )  # fmt: skip
    assert json.loads((runs / "ddpm_digits/config.json").read_text())["no_clip"] is True


def test_a_latent_run_goes_on_without_its_autoencoder(runs, cli):
    """Bit for bit, from its own checkpoint, whatever became of the autoencoder's run."""
    assert cli(*LATENT, "--epochs", 4, "--name", "whole").code == 0
    assert cli(*LATENT, "--epochs", 4, "--name", "parts").code == 0
    state = checkpoint(runs / "whole")
    shutil.rmtree(runs / "autoencoder_digits")
    shutil.rmtree("data/cache")
    result = cli("--resume", runs / "ddpm_digits", "--epochs", 3)
    assert result.code == 0, result.err
    assert checkpoint(runs / "ddpm_digits")["autoencoder"]["scale"] == state["autoencoder"]["scale"]


def test_a_latent_run_from_before_there_were_patches(runs, cli):
    state = checkpoint(runs / "ddpm_digits")
    for part in (state, state["autoencoder"]):
        del part["config"]["patch"]
    torch.save(state, runs / "ddpm_digits/ckpt.pt")
    assert cli("--sample", 1, "--checkpoint", runs / "ddpm_digits", "--sample-steps", 1).code == 0
    assert cli("--resume", runs / "ddpm_digits", "--epochs", 3).code == 0


def test_samples_are_decoded_and_carry_their_autoencoder(runs, cli, tmp_path):
    shutil.rmtree(runs / "autoencoder_digits")
    sample = ("--sample", 3, "--checkpoint", runs / "ddpm_digits", "--sample-steps", 3, "--device", "cpu")
    result = cli(*sample, "--out", "out", "--animate")
    assert result.code == 0, result.err
    assert Image.open("out/00000.png").size == (8, 8)
    assert list((runs / "ddpm_digits/samples").glob("*.gif"))
    net, diffusion, config = ddpm.load_network(runs / "ddpm_digits")
    space, settings = config["space"], ddpm.SamplerSettings(sample_steps=3, no_clip=True)
    x_0 = ddpm.sample(diffusion, diffusion.denoiser(net), [0, 1, 2], space.shape, settings, 0, "cpu")
    assert x_0.abs().max() > 1  # nothing was clipped
    wanted = space.decode(x_0)[1, 0].clamp(-1, 1)
    assert np.abs((wanted.numpy() + 1) * 127.5 - gray("out/00001.png")).max() < 1


def test_guidance_works_on_latents(runs, conditional):
    conditional_run = ("--checkpoint", runs / "ddpm_conditional_digits", "--device", "cpu")
    result = conditional("--sample", 4, *conditional_run, "--labels", "1,2", "--sample-steps", 3)
    assert result.code == 0, result.err
    plain = ("--sample", 4, "--checkpoint", runs / "ddpm_digits", "--labels", "1,2", "--sample-steps", 3)
    guide = ("--guidance", "classifier", "--classifier")
    result = conditional(*plain, *guide, runs / "classifier_digits", "--device", "cpu")
    assert result.code == 0, result.err
    line = error_line(conditional("--sample", 4, *conditional_run, "--dynamic-threshold", 0.9))
    assert "--dynamic-threshold" in line and "latents" in line


def test_a_classifier_of_pixels_does_not_guide_latents(runs, conditional, script):
    flags = without(without(LATENT, "--sample-steps"), "--latent")
    assert conditional("--task", "classifier", *flags, "--image-size", 8, "--name", "pixels").code == 0
    plain = ("--sample", 4, "--checkpoint", runs / "ddpm_digits", "--labels", "1,2", "--device", "cpu")
    line = error_line(conditional(*plain, "--guidance", "classifier", "--classifier", runs / "pixels"))
    assert "--latent runs/autoencoder_digits" in line
    evaluate = (analysis, "evaluate", runs / "ddpm_digits", "--device", "cpu", "--classifier")
    assert "latent" not in script(*evaluate, runs / "pixels").err
    assert "images" in error_line(script(*evaluate, runs / "classifier_digits"))


def test_noise_on_latents_is_bounded_by_the_autoencoder(runs, script):
    flags = ("--images", 8, "--draws", 2, "--sample-steps", 2, "--device", "cpu")
    result = script(analysis, "noise", runs / "ddpm_digits", *flags)
    assert result.code == 0 and "high frequencies lost" in result.out, result.err
    rows = rows_of(runs / "ddpm_digits/noise.csv")
    (bound,) = [row for row in rows if row["reconstruction"] == "autoencoder, no noise"]
    ways = {row["reconstruction"] for row in rows}
    assert ways >= {"one-step x_0", "chain, ddim", "chain, pndm", "chain, ddpm", "autoencoder, no noise"}
    assert float(bound["psnr"]) > 0 and Image.open(runs / "ddpm_digits/noise.png").width > 100


@pytest.mark.parametrize("study", ["denoise", "losses", "samplers", "score", "guidance", "report"])
def test_studies_take_latent_runs(runs, script, study, monkeypatch):
    run = runs / ("ddpm_conditional_digits" if study == "guidance" else "ddpm_digits")
    flags = {"score": ("--point-epochs", 1, "--langevin-levels", 2, "--inner", 1)}.get(study, ())
    flags += ("--per-label", 2, "--labels", "1,2") if study == "guidance" else ()
    if study == "report":
        monkeypatch.setattr(analysis, "REPORT", [("A", "denoise"), ("1", "losses")])
    result = script(analysis, study, run, *flags, "--device", "cpu")
    assert result.code == 0 and "left out" not in result.err, result.err


@pytest.mark.parametrize("task", ["sdedit", "inpaint", "interpolate", "sds"])
def test_edits_take_latent_runs(runs, script, task):
    flags = {
        "sdedit": ("--image", "image.png"),
        "inpaint": ("--image", "image.png", "--box", "3,3,2,1", "--out", "out", "--sample-steps", 2),
        "interpolate": ("--image", "image.png", "image.png", "--sample-steps", 2),
        "sds": ("--steps", 3, "--draws", 2, "--parameterisations", "pixels,fourier,low_rank"),
    }[task]
    result = script(edit, task, "--checkpoint", runs / "ddpm_digits", *flags, "--device", "cpu")
    assert result.code == 0, result.err
    assert (runs / f"ddpm_digits/edits/{task}.png").is_file()
    if task == "inpaint":  # pixels outside the hole are those of the image, and those inside are not
        before, after = gray("image.png"), gray("out/00000.png")
        hole = np.zeros((8, 8), bool)
        hole[3, 3:5] = True
        assert np.abs(after - before)[~hole].max() <= 1 and np.abs(after - before)[hole].max() > 1


def test_the_hole_of_latents_is_all_that_the_pixels_touch(runs, script, monkeypatch):
    seen, original = [], edit.inpaint

    def spy(diffusion, sampler, eps_theta, x, parts, x_0, hole, generator=None):
        seen.append((x_0, hole))
        return original(diffusion, sampler, eps_theta, x, parts, x_0, hole, generator)

    monkeypatch.setattr(edit, "inpaint", spy)
    box = ("--image", "image.png", "--box", "3,3,2,1", "--sample-steps", 2, "--device", "cpu")
    assert script(edit, "inpaint", "--checkpoint", runs / "ddpm_digits", *box).code == 0
    (x_0, hole), *_ = seen
    wanted = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    wanted[0, 0, 1, 1:3] = True  # pixel row 3 is of latent row 1; columns 3 and 4 of columns 1 and 2
    assert torch.equal(hole, wanted) and x_0.shape == (1, 4, 4, 4)


@pytest.mark.parametrize("task", ["anagram", "hybrid", "restore"])
def test_edits_of_pixels_say_why_they_do_not(runs, script, task):
    flags = ("--image", "image.png") if task == "restore" else ("--labels", "1,2")
    line = error_line(script(edit, task, "--checkpoint", runs / "ddpm_conditional_digits", *flags))
    assert "latents" in line and "pixels" in line


# ------------------------------------------------------------------------------------------------------------
# Errors


def test_latent_takes_an_autoencoder(runs, cli):
    assert "autoencoder" in error_line(cli(*without(LATENT, "--latent"), "--latent", runs / "ddpm_digits"))
    assert "no checkpoint" in error_line(cli("--latent", "runs/nothing"))
    assert "ddpm" in error_line(cli("--sample", 2, "--checkpoint", runs / "autoencoder_digits"))


def test_other_channels_are_an_error_and_another_size_a_note(runs, cli, tmp_path):
    for i in range(20):
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.effect_noise((16, 16), 90).convert("RGB").save(tmp_path / f"photos/{i}.png")
    photos = ("--dataset", "folder", "--data-root", tmp_path / "photos")
    assert "3" in (line := error_line(cli(*LATENT, *photos))) and "--channels 1" in line
    result = cli(*LATENT, *photos, "--channels", 1, "--image-size", 16)
    assert result.code == 0 and "was trained at 8 pixels" in result.err, result.err


def test_sizes_that_the_two_networks_cannot_halve_are_named(runs, cli):
    line = error_line(cli(*LATENT, "--image-size", 10))
    assert "--image-size 10" in line and "8 or 12" in line
    assert "--image-size 10" in error_line(cli("--task", "autoencoder", "--image-size", 10))


@pytest.mark.parametrize("flags", ["--multipliers 1 2 --downsampling 4", "--multipliers 1"])
def test_downsampling_and_multipliers_agree(cli, flags):
    assert "--multipliers" in error_line(cli("--task", "autoencoder", *flags.split()))


@pytest.mark.parametrize("flag", [("--downsampling", 2), ("--latent-channels", 3)])
def test_flags_of_the_autoencoder_belong_to_it(cli, flag):
    assert "--task autoencoder" in error_line(cli(*flag))


def test_downsampling_sets_the_levels(cli, tmp_path):
    flags = (
        "--task autoencoder --limit 20 --epochs 1 --downsampling 8 --latent-channels 6 --device cpu --width 4"
    )
    assert cli(*flags.split()).code == 0
    config = json.loads((tmp_path / "runs/autoencoder_digits/config.json").read_text())
    assert len(config["multipliers"]) == 4 and config["latent_channels"] == 6


def test_patches_halve_what_an_autoencoder_sees(cli, tmp_path):
    flags = "--task autoencoder --limit 20 --epochs 1 --patch 2 --device cpu --width 4 --name"
    assert cli(*flags.split(), "one", "--downsampling", 4).code == 0
    config = json.loads((tmp_path / "runs/one/config.json").read_text())
    assert len(config["multipliers"]) == 2 and config["patch"] == 2
    assert cli(*flags.split(), "two", "--multipliers", 1, 2, 2).code == 0
    assert json.loads((tmp_path / "runs/two/config.json").read_text())["downsampling"] == 8
    assert "2 to 4 of them" in error_line(
        cli(*flags.split(), "x", "--multipliers", 1, 2, "--downsampling", 2)
    )
    latent = "--epochs 1 --limit 20 --device cpu --width 4 --multipliers 1 2 --sample-steps 2".split()
    assert cli(*latent, "--latent", "runs/one").code == 0
    assert checkpoint(Path("runs/ddpm_digits"))["net"]["conv_in.weight"].shape[1] == 4  # latents, no patches


def damage(state):
    yield "gone", {key: value for key, value in state.items() if key != "autoencoder"}
    yield "no dict", state | {"autoencoder": [1]}
    part = state["autoencoder"]
    yield "no weights", state | {"autoencoder": {key: part[key] for key in ("config", "scale")}}
    yield "wrong weights", state | {"autoencoder": part | {"weights": {"conv_in.weight": torch.zeros(2)}}}
    for scale in (0.0, None, "1", float("nan")):
        yield f"scale {scale}", state | {"autoencoder": part | {"scale": scale}}


def test_a_damaged_autoencoder_is_named(runs, cli):
    run = runs / "ddpm_digits"
    for what, state in damage(checkpoint(run)):
        torch.save(state, run / "ckpt.pt")
        for flags in (("--sample", 2, "--checkpoint", run), ("--resume", run, "--epochs", 5)):
            assert "autoencoder" in error_line(cli(*flags)), what


def test_init_takes_a_run_of_the_same_latents(runs, conditional, cli):
    result = conditional(*LATENT, "--init", runs / "ddpm_digits")
    assert result.code == 0, result.err
    pixels = without(LATENT, "--latent")
    assert cli(*pixels, "--image-size", 8, "--name", "pixels").code == 0
    assert "--latent" in error_line(conditional(*LATENT, "--init", runs / "pixels"))
