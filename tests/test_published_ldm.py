"""Published latent diffusion models: every part and the whole pipeline give what the reference gives."""

import json

import numpy as np
import pytest
import torch
from conftest import error_line
from PIL import Image
from record_published import LDM, NARROW_LDM, RECORDED_LDM, TIMES, seeded_input, seeded_weights
from test_published import publish, with_old_names

import analysis
import ddpm
import edit
from modules import make_network
from support.published import read_config, renamed

PARTS = ("unet", "vqvae")


@pytest.fixture(scope="module")
def recorded():
    return np.load(RECORDED_LDM)


def publish_ldm(folder, suffix="safetensors", old=False, configs=NARROW_LDM):
    """A folder as `hf download CompVis/ldm-celebahq-256 --local-dir` leaves it."""
    stored = np.load(RECORDED_LDM)
    for part in PARTS:
        weights = seeded_weights(json.loads(str(stored[f"{part}_shapes"])))
        publish(folder / part, configs[part], with_old_names(weights) if old else weights, suffix)
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(configs["scheduler"]))
    return folder


@pytest.fixture
def ldm(tmp_path):
    return publish_ldm(tmp_path / "ldm-celebahq-256")


def close(ours, theirs):
    return torch.allclose(ours, torch.from_numpy(theirs), atol=1e-4)


@pytest.mark.parametrize("old, suffix", [(False, "safetensors"), (True, "bin")])
def test_every_part_is_the_reference(tmp_path, recorded, old, suffix):
    net, diffusion, config = ddpm.load_network(publish_ldm(tmp_path / "ldm", suffix, old))
    autoencoder = config["space"].autoencoder
    with torch.no_grad():
        for t, out in zip(TIMES, recorded["unet_out"], strict=True):
            assert close(net(seeded_input(16), torch.tensor([t]))[0], out), t
        z, log_variance = autoencoder.encode(seeded_input(64).clamp(-1, 1))
        assert close(z[0], recorded["z"]) and (log_variance == -torch.inf).all()
        assert close(autoencoder.quantise(torch.from_numpy(recorded["z"])[None])[0], recorded["quantised"])
        assert close(autoencoder.decode(torch.from_numpy(recorded["z"])[None])[0], recorded["decoded"])
    assert config["image_size"] == 64 and config["channels"] == 3 and config["latent_channels"] == 3
    betas = np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2  # scaled_linear: sqrt(beta) in equal steps
    assert diffusion.T == 1000 and diffusion.prediction == "eps"
    assert np.allclose(diffusion.alpha_bar[1:], np.cumprod(1 - betas), rtol=1e-12)


def test_the_pipeline_is_the_reference(ldm, recorded):
    """20 DDIM steps from one noise, decoded; their times 950, ..., 0 are our 951, ..., 1."""
    net, diffusion, config = ddpm.load_network(ldm)
    timesteps = [*(recorded["timesteps"] + 1).tolist(), 0]
    x_0 = ddpm.ddim(diffusion, diffusion.denoiser(net), seeded_input(16), timesteps)
    picture = (config["space"].decode(x_0)[0] / 2 + 0.5).clamp(0, 1)
    assert close(picture.permute(1, 2, 0), recorded["picture"])


@pytest.mark.parametrize("part", PARTS)
def test_the_published_size_has_the_published_weights(tmp_path, recorded, part):
    """Names and shapes of all 274 M and 55 M weights, without making them."""
    shapes = json.loads(str(recorded[f"{part}_published_shapes"]))
    theirs = dict(renamed(name, torch.empty(shape, device="meta")) for name, shape in shapes.items())
    what = "ldm" if part == "unet" else part
    with torch.device("meta"):
        net = make_network(read_config(tmp_path / part / "config.json", LDM[part], what))
    ours = {name: weight.shape for name, weight in net.state_dict().items()}
    assert ours == {name: weight.shape for name, weight in theirs.items()}
    if part == "unet":
        heads = {module.heads for module in net.modules() if hasattr(module, "heads")}
        assert heads == {14, 21, 28}  # of 32 channels each


SAMPLE = ("--sample", 2, "--sample-steps", 2, "--device", "cpu", "--checkpoint")


def test_it_is_sampled_and_studied_as_other_weights_are(tmp_path, cli, script, ldm):
    before = sorted(ldm.rglob("*"))
    result = cli(*SAMPLE, ldm, "--out", "out")
    assert result.code == 0 and Image.open("out/00001.png").size == (64, 64), result.err
    assert (tmp_path / "runs/ldm-celebahq-256/samples/ddim_2_seed0.png").is_file()
    Image.effect_noise((80, 70), 90).convert("RGB").save("photo.png")
    flags = "--image photo.png --levels 50,500 --draws 2 --sample-steps 2 --device cpu".split()
    result = script(analysis, "noise", "--checkpoint", ldm, *flags)
    assert result.code == 0 and "high frequencies lost" in result.out, result.err
    result = script(edit, "sdedit", "--checkpoint", ldm, "--image", "photo.png", "--i-start", 30)
    assert result.code == 0, result.err
    assert sorted(ldm.rglob("*")) == before


def test_the_unet_alone_finds_its_pipeline(ldm, monkeypatch):
    monkeypatch.chdir(ldm / "unet")
    whole, part, here = (ddpm.load_network(path)[2] for path in (ldm, ldm / "unet", "."))
    assert whole["space"].shape == part["space"].shape == here["space"].shape == (3, 16, 16)
    assert whole["name"] == part["name"] == here["name"] == "ldm-celebahq-256"


def test_a_scaling_factor_is_used_where_there_is_one(tmp_path):
    """x_0 = factor z, as the reference multiplies and divides by it."""
    scaled = {**NARROW_LDM, "vqvae": {**NARROW_LDM["vqvae"], "scaling_factor": 0.25}}
    spaces = [
        ddpm.load_network(publish_ldm(tmp_path / name, configs=configs))[2]["space"]
        for name, configs in (("plain", NARROW_LDM), ("scaled", scaled))
    ]
    x = seeded_input(64).clamp(-1, 1)
    z, quarter = (space.encode(x) for space in spaces)
    assert torch.allclose(z, 4 * quarter) and spaces[0].scale == 1
    assert torch.equal(spaces[0].decode(z), spaces[1].decode(quarter))


@pytest.mark.parametrize("part", ["unet", "vqvae", "scheduler"])
@pytest.mark.parametrize("whole", [True, False])
def test_a_missing_part_is_named(ldm, cli, part, whole):
    for file in (ldm / part).iterdir():
        if whole or file.suffix != ".json" or part == "scheduler":
            file.unlink()
    if whole:
        (ldm / part).rmdir()
    assert part in error_line(cli(*SAMPLE, ldm))


@pytest.mark.parametrize(
    "part, field, value",
    [
        ("unet", "flip_sin_to_cos", False),
        ("unet", "freq_shift", 1),
        ("unet", "downsample_padding", 0),
        ("unet", "attention_head_dim", 24),
        ("unet", "in_channels", 4),
        ("vqvae", "latent_channels", 4),
        ("vqvae", "num_vq_embeddings", None),
        ("vqvae", "scaling_factor", 0),
        ("vqvae", "vq_embed_dim", 8),
        ("vqvae", "down_block_types", ["AttnDownEncoderBlock2D"] * 3),
        ("vqvae", "norm_type", "spatial"),
        ("scheduler", "beta_schedule", "linear"),
        ("scheduler", "beta_start", 0.001),
        ("scheduler", "prediction_type", "v_prediction"),
    ],
)
def test_another_model_is_refused_by_the_name_of_the_field(ldm, cli, part, field, value):
    file = ldm / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    file.write_text(json.dumps({**NARROW_LDM[part], field: value}))
    line = error_line(cli(*SAMPLE, ldm))
    assert part in line and (field in line or "channels" in line)


def test_a_schedule_that_is_left_out_is_that_of_ddpms_and_refused(ldm, cli):
    (ldm / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": "DDIMScheduler"}))
    assert "beta_schedule" in error_line(cli(*SAMPLE, ldm))
