"""Published weights: the same outputs as the reference network, and clear errors for what is not one."""

import json
import re
import struct
import sys

import numpy as np
import pytest
import torch
from conftest import TINY, error_line
from PIL import Image
from record_published import CONFIGS, RECORDED, TIMES, seeded_input, seeded_weights

import analysis
import ddpm
import edit
from modules import PublishedUNet
from support.published import load_published

OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
TINY_CONFIG = {
    **CONFIGS["cifar10_32"],
    **{"sample_size": 16, "block_out_channels": [16, 32], "layers_per_block": 1, "norm_num_groups": 8},
    **{
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    },
}


def with_old_names(weights):
    renamed = {}
    for name, value in weights.items():
        for new, old in OLD_NAMES.items():
            name = name.replace(f".{new}.", f".{old}.")
        renamed[name] = value
    return renamed


def publish(folder, config, weights, suffix="safetensors"):
    """A folder in the published form."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    file, weights = (
        folder / f"diffusion_pytorch_model.{suffix}",
        {k: torch.as_tensor(w) for k, w in weights.items()},
    )
    if suffix == "bin":
        torch.save(weights, file)
    else:
        pytest.importorskip("safetensors.torch").save_file(weights, file, {"format": "pt"})
    return folder


THEIRS = (  # ours and theirs, for the tiny network
    (r"^time_mlp\.0\.", "time_embedding.linear_1."),
    (r"^time_mlp\.2\.", "time_embedding.linear_2."),
    (r"^(down|up)sample\.(\d)\.", r"\1_blocks.\2.\1samplers.0."),
    (r"^(down|up)\.(\d)\.(\d)\.block\.", r"\1_blocks.\2.resnets.\3."),
    (r"^(down|up)\.(\d)\.(\d)\.attention\.", r"\1_blocks.\2.attentions.\3."),
    (r"^middle\.(\d)\.block\.", r"mid_block.resnets.\1."),
    (r"^middle\.0\.attention\.", "mid_block.attentions.0."),
    (r"\.time\.", ".time_emb_proj."),
    (r"\.shortcut\.", ".conv_shortcut."),
    (r"(attentions\.\d)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d)\.([qkv])\.", r"\1.to_\2."),
    (r"(attentions\.\d)\.out\.", r"\1.to_out.0."),
    (r"^norm_out\.", "conv_norm_out."),
)


def tiny_weights():
    net = PublishedUNet(8, 1e-6, 3, 16, (1, 2), 1, (1,))
    weights = {}
    for name, value in net.state_dict().items():
        for ours, theirs in THEIRS:
            name = re.sub(ours, theirs, name)
        weights[name] = value[..., 0, 0] if ".to_" in name and value.ndim == 4 else value
    return seeded_weights({name: list(value.shape) for name, value in weights.items()})


@pytest.fixture
def tiny(tmp_path):
    return publish(tmp_path / "tiny-ddpm-16", TINY_CONFIG, tiny_weights())


def recorded(name):
    stored = np.load(RECORDED)
    return seeded_weights(json.loads(str(stored[f"{name}_shapes"]))), torch.from_numpy(stored[f"{name}_out"])


@pytest.mark.parametrize(
    "name, old, suffix",
    [
        ("cifar10_32", False, "safetensors"),
        ("cifar10_32", True, "bin"),
        ("celebahq_256", True, "safetensors"),
    ],
)
def test_outputs_are_those_of_the_reference_network(tmp_path, name, old, suffix):
    weights, expected = recorded(name)
    folder = publish(tmp_path / name, CONFIGS[name], with_old_names(weights) if old else weights, suffix)
    net, diffusion, config = ddpm.load_network(folder)
    for file in folder.iterdir():  # half a gigabyte
        file.unlink()
    with torch.no_grad():
        for t, out in zip(TIMES, expected, strict=True):
            assert torch.allclose(net(seeded_input(), torch.tensor([t]))[0], out, atol=1e-4), t
        later = net(seeded_input(), torch.tensor([TIMES[1] + 1]))[0]
    assert (later - expected[1]).abs().max() > 1e-3  # the published network counts time from 0
    assert config["image_size"] == CONFIGS[name]["sample_size"] and config["channels"] == 3
    assert diffusion.T == 1000 and diffusion.prediction == "eps"
    assert diffusion.alpha_bar[1].item() == pytest.approx(1 - 1e-4)  # linear: beta_1 = 1e-4


def test_a_file_is_as_good_as_its_folder_and_a_pipeline_as_its_network(tmp_path, tiny):
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([1, 1000])
    (tmp_path / "pipeline").mkdir()
    publish(tmp_path / "pipeline" / "unet", TINY_CONFIG, tiny_weights(), "bin")
    outs = [
        ddpm.load_network(path)[0](x, t)
        for path in (tiny, str(tiny / "diffusion_pytorch_model.safetensors"), tmp_path / "pipeline")
    ]
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


def test_runs_and_published_weights_load_alike(tmp_path, cli, tiny):
    assert cli(*TINY).code == 0
    for path in (tiny, "runs/ddpm_digits", "runs/ddpm_digits/ckpt.pt"):
        net, diffusion, config = ddpm.load_network(path)
        size = config["image_size"]
        x = torch.randn(2, config["channels"], size, size)
        assert net(x, torch.tensor([1, diffusion.T])).shape == x.shape and not net.training


def test_half_precision_is_read_as_float32(tmp_path):
    values = torch.tensor([[1.0, -2.5], [0.15625, 29952.0]])  # exact in both
    weights = {"half": values.half(), "brain": values.bfloat16(), "single": values, "double": values.double()}
    for suffix in ("bin", "safetensors"):
        folder = publish(tmp_path / suffix, TINY_CONFIG, weights, suffix)
        _, read = load_published(folder / f"diffusion_pytorch_model.{suffix}")
        assert (
            all(torch.equal(w, values) and w.dtype == torch.float32 for w in read.values()) and len(read) == 4
        )


SAMPLE = ("--sample", 2, "--sample-steps", 2, "--device", "cpu", "--checkpoint")


def test_sampling_writes_beside_the_runs_not_among_the_weights(tmp_path, cli, tiny):
    before = sorted(tiny.rglob("*"))
    result = cli(*SAMPLE, tiny)
    assert result.code == 0, result.err
    assert (tmp_path / "runs/tiny-ddpm-16/samples/ddim_2_seed0.png").is_file()
    assert sorted(tiny.rglob("*")) == before


def test_studies_and_edits_take_published_weights(tmp_path, script, tiny):
    Image.new("RGB", (40, 30), "teal").save("photo.png")
    machine = ("--device", "cpu", "--sample-steps", 2)
    result = script(analysis, "noise", tiny, "--image", "photo.png", "--draws", 2, *machine)
    assert result.code == 0 and (tmp_path / "runs/tiny-ddpm-16/noise.png").is_file(), result.err
    result = script(analysis, "denoise", "--checkpoint", tiny, "--image", "photo.png", "--levels", 20)
    assert result.code == 0 and (tmp_path / "runs/tiny-ddpm-16/denoise.png").is_file(), result.err
    result = script(edit, "restore", "--checkpoint", tiny, "--image", "photo.png", *machine)
    assert result.code == 0 and (tmp_path / "runs/tiny-ddpm-16/edits/restore.png").is_file(), result.err


@pytest.mark.parametrize("study", ["noise", "denoise", "losses", "evaluate"])
def test_a_study_of_the_training_data_names_what_is_unknown(script, tiny, study):
    line = error_line(script(analysis, study, tiny))
    assert "trained on" in line and "None" not in line


def test_a_report_shows_published_weights_on_images_of_the_user(tmp_path, script, tiny, monkeypatch):
    """Studies that need no training images work; the others are left out by name."""
    Image.effect_noise((40, 30), 90).save("photo.png")
    fast, made = ("weights", "forward", "denoise", "losses", "evaluate", "guidance", "sdedit", "ddpm"), []
    few = [
        (item, what) for item, what in analysis.REPORT if {*what.split()[:2]} & {*fast} or "{kind}" in what
    ]
    monkeypatch.setattr(analysis, "REPORT", few)
    picture = Image.new("RGB", (300, 200))
    monkeypatch.setattr("support.runs.figure_of", lambda *words: made.append(words) or [picture])
    result = script(analysis, "report", tiny, "--image", "photo.png", "--device", "cpu")
    assert result.code == 0 and (tmp_path / "runs/tiny-ddpm-16/report.pdf").is_file(), result.err
    left_out = re.findall("note: .*: (.*) is left out", result.err)
    assert left_out == ["guidance", "evaluate"], result.err
    assert [words[0] for words in made] == ["ddpm.py", "edit.py"] and "photo.png" in made[1]


# ------------------------------------------------------------------------------------------------------------
# What is not such a network


@pytest.mark.parametrize(
    "field, value",
    [
        ("_class_name", "UNet2DConditionModel"),
        ("act_fn", "gelu"),
        ("attention_head_dim", 8),
        ("block_out_channels", [24, 32]),
        ("center_input_sample", True),
        ("down_block_types", ["DownBlock2D", "SkipDownBlock2D"]),
        ("down_block_types", ["AttnDownBlock2D", "AttnDownBlock2D"]),
        ("downsample_padding", 1),
        ("flip_sin_to_cos", True),
        ("freq_shift", 0),
        ("out_channels", 6),
        ("sample_size", 15),
        ("sample_size", [16, 16]),
        ("sample_size", 0),
        ("sample_size", 10**30),
        ("norm_eps", None),
        ("norm_eps", "8"),
        ("norm_num_groups", -8),
        ("norm_num_groups", 8.0),
        ("in_channels", 4),
        ("in_channels", True),
        ("layers_per_block", "2"),
        ("block_out_channels", {"a": 1}),
        ("block_out_channels", []),
        ("down_block_types", 3),
        ("down_block_types", ["DownBlock2D", ["AttnDownBlock2D"]]),
        ("time_embedding_type", "fourier"),
        ("up_block_types", ["UpBlock2D", "UpBlock2D"]),
    ],
)
def test_another_network_is_refused_by_the_name_of_the_field(cli, tiny, field, value):
    (tiny / "config.json").write_text(json.dumps({**TINY_CONFIG, field: value}))
    line = error_line(cli(*SAMPLE, tiny))
    assert f"config.json: {field} is {json.dumps(value)}; the network here is the one with " in line


def test_another_noise_schedule_is_refused_by_the_name_of_the_field(cli, tiny):
    (tiny / "scheduler_config.json").write_text(json.dumps({"beta_schedule": "squaredcos_cap_v2"}))
    assert "beta_schedule" in error_line(cli(*SAMPLE, tiny))


def test_a_missing_field_is_named(cli, tiny):
    lacking = {key: value for key, value in TINY_CONFIG.items() if key != "layers_per_block"}
    (tiny / "config.json").write_text(json.dumps(lacking))
    assert "layers_per_block" in error_line(cli(*SAMPLE, tiny))


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "[" * 100_000])
def test_a_damaged_config_is_named(cli, tiny, text):
    (tiny / "config.json").write_text(text)
    assert "config.json" in error_line(cli(*SAMPLE, tiny))


def test_weights_without_their_config_are_refused(cli, tiny):
    (tiny / "config.json").unlink()
    line = error_line(cli(*SAMPLE, tiny))
    assert "config.json is missing" in line and "Stable Diffusion is out of scope" in line


def test_a_pipeline_of_stable_diffusion_is_refused_by_its_class(cli, tiny):
    """Its UNet differs in many fields; the class says at once what it is."""
    theirs = {"in_channels": 4, "out_channels": 4, "cross_attention_dim": 768, "sample_size": 64}
    theirs |= {"_class_name": "UNet2DConditionModel", "norm_num_groups": 32}
    (tiny / "config.json").write_text(json.dumps({**TINY_CONFIG, **theirs}))
    assert '_class_name is "UNet2DConditionModel"' in error_line(cli(*SAMPLE, tiny))


def test_three_shapes_that_do_not_fit_are_named(cli, tiny):
    (tiny / "config.json").write_text(json.dumps({**TINY_CONFIG, "block_out_channels": [32, 64]}))
    line = error_line(cli(*SAMPLE, tiny))
    assert line.count("size mismatch for") == 3
    assert "torch.Size([64, 16])" in line and "torch.Size([128, 32])" in line


def test_missing_and_unexpected_weights_are_named(cli, tmp_path):
    weights = tiny_weights()
    weights["class_embedding.weight"] = weights.pop("conv_in.bias")
    line = error_line(cli(*SAMPLE, publish(tmp_path / "odd", TINY_CONFIG, weights)))
    assert "conv_in.bias" in line and "class_embedding.weight" in line


@pytest.mark.parametrize("left", [0, 5, 200, -1000])
def test_a_truncated_file_is_refused(cli, tiny, left):
    file = tiny / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    assert "truncated" in error_line(cli(*SAMPLE, tiny))


@pytest.mark.parametrize(
    "change", [{"dtype": "I64"}, {"shape": [5, 5]}, {"data_offsets": [9]}, {"data_offsets": [-64, 0]}, None]
)
def test_a_damaged_header_is_refused(cli, tiny, change):
    file = tiny / "diffusion_pytorch_model.safetensors"
    data = file.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    header["conv_in.bias"] = {**header["conv_in.bias"], **change} if change else None
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
    assert "damaged" in error_line(cli(*SAMPLE, tiny))


def test_a_header_that_is_not_json_is_refused(cli, tiny):
    (tiny / "diffusion_pytorch_model.safetensors").write_bytes(struct.pack("<Q", 4) + b"\xff{}}" * 9)
    assert "damaged" in error_line(cli(*SAMPLE, tiny))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_weights_in_other_types_are_refused(tmp_path, cli, suffix, dtype):
    weights = {**tiny_weights(), "conv_in.bias": torch.zeros(16).to(dtype)}
    assert "floating point" in error_line(
        cli(*SAMPLE, publish(tmp_path / "odd", TINY_CONFIG, weights, suffix))
    )


def test_the_safetensors_package_is_optional(cli, tmp_path, tiny, monkeypatch):
    publish(tmp_path / "bin", TINY_CONFIG, tiny_weights(), "bin")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert "pip install safetensors" in error_line(cli(*SAMPLE, tiny))
    assert cli(*SAMPLE, tmp_path / "bin").code == 0


class Mischief:
    def __reduce__(self):
        return (open, ("mischief", "w"))


@pytest.mark.parametrize(
    "content", [Mischief(), {"conv_in.weight": Mischief()}, [1, 2], {"epoch": 3}, {0: torch.zeros(1)}]
)
def test_a_bin_never_runs_code(tmp_path, cli, tiny, content):
    (tiny / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(content, tiny / "diffusion_pytorch_model.bin")
    error_line(cli(*SAMPLE, tiny))
    assert not (tmp_path / "mischief").exists()


def test_published_weights_are_unconditional(script, conditional, tiny):
    assert "unconditional" in error_line(conditional(*SAMPLE, tiny))
    line = error_line(script(edit, "sds", "--checkpoint", tiny, "--prompt", "a face", "--device", "cpu"))
    assert "unconditional" in line and "--prompt" in line


def test_a_folder_without_weights_is_refused(cli, tiny):
    (tiny / "diffusion_pytorch_model.safetensors").rename(tiny / "diffusion_pytorch_model.fp16.safetensors")
    assert "diffusion_pytorch_model.safetensors" in error_line(cli(*SAMPLE, tiny))


def test_a_pipeline_has_its_own_name(tmp_path, cli):
    publish(tmp_path / "pipeline" / "unet", TINY_CONFIG, tiny_weights())
    (tmp_path / "pipeline" / "scheduler").mkdir()
    assert cli(*SAMPLE, tmp_path / "pipeline").code == 0
    assert (tmp_path / "runs/pipeline/samples/ddim_2_seed0.png").is_file()
    (tmp_path / "pipeline/scheduler/scheduler_config.json").write_text(json.dumps({"beta_end": 0.03}))
    assert "beta_end" in error_line(cli(*SAMPLE, tmp_path / "pipeline"))


@pytest.mark.parametrize("ema", [[], None, {"conv_in.weight": 3}, {"conv_in.weight": torch.zeros(2)}])
def test_a_run_with_damaged_weights_is_refused(tmp_path, cli, ema):
    assert cli(*TINY).code == 0
    file = tmp_path / "runs/ddpm_digits/ckpt.pt"
    torch.save({**torch.load(file, weights_only=True), "ema": ema}, file)
    assert "does not hold" in error_line(cli(*SAMPLE, "runs/ddpm_digits"))
