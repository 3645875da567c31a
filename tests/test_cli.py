"""The command line: sampling, what it prints and writes, and every error a user can cause."""

import argparse
import os
import pickle
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import PROJECT, TINY, error_line, run_in
from PIL import Image

import ddpm
import ddpm_conditional
import utils
from modules import UNet
from support.errors import UserError
from support.files import new_path
from support.images import image_files, to_uint8
from support.launch import default_network, load_data
from support.pictures import make_grid
from support.settings import Command, Parser, add_settings, flag, rows_of


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with one tiny run in it, runs/ddpm_digits."""
    return run_in(tmp_path_factory.mktemp("trained"), ddpm, *TINY) / "runs/ddpm_digits"


def pixels(path):
    return np.asarray(Image.open(path))


# sampling


@pytest.mark.parametrize(
    "flags",
    [
        "--sampler ddim",
        "--sampler ddim --eta 1",
        "--sampler ddpm",
        "--sampler ddpm --variance beta --no-clip",
        "--sampler pndm",
        "--sampler pndm --runge-kutta",
        "--sampler dpm_solver",
    ],
)
def test_every_sampler_writes_a_grid_and_images(cli, trained, flags, tmp_path):
    of, how = ("--sample", 5, "--checkpoint", trained), ("--sample-steps", 4, "--out", "single")
    result = cli(*of, *flags.split(), *how)
    assert result.code == 0, result.err
    grid = re.search(r"grid +(\S+)", result.out)[1]
    assert Image.open(grid).width > 5 * 8 and "single" in result.out
    single = image_files(tmp_path / "single")
    assert [p.name for p in single] == [f"{i:05d}.png" for i in range(5)]
    assert all(pixels(p).shape == (8, 8) and pixels(p).dtype == np.uint8 for p in single)


def test_images_depend_on_seed_and_number_alone(cli, trained, tmp_path):
    flags = ["--checkpoint", trained, "--sampler", "ddpm", "--sample-steps", "5"]
    cli("--sample", 6, *flags, "--out", "a")
    cli("--sample", 6, *flags, "--out", "b", "--batch-size", 4)
    cli("--sample", 2, *flags, "--out", "c")
    cli("--sample", 6, *flags, "--out", "d", "--seed", 1)
    a, b, c, d = ([pixels(p) for p in image_files(tmp_path / name)] for name in "abcd")
    assert np.abs(np.subtract(a, b, dtype=int)).max() <= 1
    assert np.abs(np.subtract(a[:2], c, dtype=int)).max() <= 1
    assert not np.array_equal(a, d) and not np.array_equal(a[0], a[1])


def test_sampling_uses_the_averaged_weights(cli, trained, tmp_path):
    state = torch.load(trained / "ckpt.pt", weights_only=True)
    for name, part in (("no_net", "net"), ("no_ema", "ema")):
        changed = {**state, part: {k: v + 0.5 for k, v in state[part].items()}}
        (tmp_path / name).mkdir()
        torch.save(changed, tmp_path / name / "ckpt.pt")
    for out, run in (("a", trained), ("b", "no_net"), ("c", tmp_path / "no_ema/ckpt.pt")):
        assert cli("--sample", 2, "--checkpoint", run, "--sample-steps", 3, "--out", out).code == 0
    assert np.array_equal(pixels("a/00001.png"), pixels("b/00001.png"))
    assert not np.array_equal(pixels("a/00001.png"), pixels("c/00001.png"))


def test_grids_are_numbered_not_overwritten(cli, trained):
    flags = ["--sample", "2", "--checkpoint", str(trained), "--sample-steps", "2", "--seed", "77"]
    first, second = (re.search(r"grid +(\S+)", cli(*flags).out)[1] for _ in range(2))
    assert first != second and os.path.exists(first) and np.array_equal(pixels(first), pixels(second))


def test_animation(cli, trained):
    result = cli("--sample", 2, "--checkpoint", trained, "--sample-steps", 6, "--animate")
    gif = Image.open(re.search(r"gif +(\S+)", result.out)[1])
    assert gif.format == "GIF" and gif.n_frames == 7  # x_T, five on the way, and x_0

    def last_and(frame):
        gif.seek(frame)
        return np.asarray(gif.convert("L")).astype(int)

    first, end = last_and(0), last_and(6)
    assert np.abs(first - end).mean() > 5


def test_out_of_an_earlier_sample_is_not_mixed_or_lost(cli, trained):
    flags = ["--sample", "2", "--checkpoint", trained, "--sample-steps", "2", "--out", "x"]
    assert cli(*flags).code == 0
    before = pixels("x/00000.png")
    assert "x already holds images" in error_line(cli(*flags, "--seed", 5))
    assert np.array_equal(pixels("x/00000.png"), before)


def heun(diffusion, eps_theta, x, timesteps, generator=None):
    """A sampler that a student may add: Heun's method, of two evaluations a stride, but for the last one."""
    with torch.no_grad():
        for t, s, ab_t, ab_s in diffusion.strides(x, timesteps):
            eps = eps_theta(x, t)
            end = ddpm.ddim_stride(x, eps, ab_t, ab_s)
            x = ddpm.ddim_stride(x, (eps + eps_theta(end, s)) / 2, ab_t, ab_s) if ab_s < 1 else end
    return x


def test_a_sampler_of_two_evaluations_a_stride_is_one_more_entry(script, monkeypatch):
    monkeypatch.setitem(ddpm.SAMPLERS, "heun", heun)
    for module, run in ((ddpm, "runs/ddpm_digits"), (ddpm_conditional, "runs/ddpm_conditional_digits")):
        result = script(module, *TINY, "--epochs", 1, "--sampler", "heun", "--sample-steps", 5)
        assert result.code == 0 and os.path.exists(f"{run}/samples/epoch_0001.png"), result.err
        result = script(module, "--sample", 2, "--checkpoint", run, "--sample-steps", 6, "--animate")
        assert "heun_6_seed0.png" in result.out, result.err  # the sampler of the run's previews
        assert Image.open(re.search(r"gif +(\S+)", result.out)[1]).n_frames == 7
        for sampler in ("heun", "ddim"):
            how = ("--sampler", sampler, "--sample-steps", 6, "--out", f"{run}/{sampler}")
            assert script(module, "--sample", 2, "--checkpoint", run, *how).code == 0
        assert not np.array_equal(pixels(f"{run}/heun/00001.png"), pixels(f"{run}/ddim/00001.png"))


def test_a_schedule_that_keeps_signal_is_a_note(script, monkeypatch):
    """In training and in sampling: sampling starts from noise alone, which such a network never saw."""
    monkeypatch.setitem(ddpm.SCHEDULES, "weak", lambda T: torch.full((T,), 1 / T, dtype=torch.float64))
    for module, run in ((ddpm, "runs/ddpm_digits"), (ddpm_conditional, "runs/ddpm_conditional_digits")):
        trained = script(module, *TINY, "--epochs", 1, "--schedule", "weak")
        sampled = script(module, "--sample", 2, "--checkpoint", run)
        for result in (trained, sampled):
            assert result.code == 0 and "grid" in sampled.out, result.err
            assert result.err.count("note: schedule weak leaves 59.9% of the signal at t = T") == 1
        assert "leaves" not in script(module, *TINY, "--epochs", 1).err


def test_grid_places_images_in_order():
    x = torch.linspace(-1, 1, 6).view(6, 1, 1, 1).repeat(1, 1, 64, 64)
    grid = make_grid(x, columns=3).convert("L")
    seen = [grid.getpixel((2 + 130 * (i % 3) + 60, 2 + 130 * (i // 3) + 60)) for i in range(6)]
    assert seen == [round(255 * i / 5) for i in range(6)]
    captioned = make_grid(x, caption="a caption that is long enough to need several lines", columns=1)
    assert captioned.height > make_grid(x, columns=1).height and captioned.width == 132


@pytest.mark.parametrize("size", [1, 7, 8, 16, 28, 32, 64, 95, 96, 128])
def test_no_image_of_a_grid_is_smaller_than_96_pixels_and_small_ones_keep_their_pixels(size):
    x = torch.zeros(1, 1, size, size)
    x[..., 0] = 1  # a white column
    grid = np.asarray(make_grid(x).convert("L"))[2:-2, 2:-2]
    assert grid.shape[0] >= 96 and grid.shape[1] >= 96 and grid.shape[1] <= max(96, size) + size
    zoom = grid.shape[1] // size
    assert (grid[:, :zoom] == 255).all() and (size == 1 or (grid[:, zoom : size * zoom] == 128).all())


def test_pixels_are_rounded_not_truncated():
    x = torch.tensor([-1.0, -1 + 2 * 0.6 / 255, 0.999, 3.0, -7.0]).view(5, 1, 1, 1)
    assert to_uint8(x).flatten().tolist() == [0, 1, 255, 255, 0]


# data and devices


def test_gray_training_on_a_folder_of_photographs(cli, tmp_path):
    for i in range(4):
        Image.new("RGB", (30, 20), (50 * i, 90, 10)).save(tmp_path / f"{i}.png")
    small = [a for a in TINY if a not in ("--limit", "48")]
    result = cli(*small, "--dataset", "folder", "--data-root", ".", "--channels", 1, "--batch-size", 2)
    assert result.code == 0 and "1 x 8 x 8" in result.out


def test_few_noise_steps_need_no_other_flag(cli):
    tiny = " ".join(TINY).replace("--noise-steps 20 --sample-steps 2", "--noise-steps 7").split()
    assert cli(*tiny).code == 0
    assert cli("--sample", 1, "--checkpoint", "runs/ddpm_digits").code == 0


def test_paths_can_be_pasted(cli):
    result = cli(*TINY, "--name", "my run", "--epochs", 1)
    assert "'runs/my run/ckpt.pt'" in result.out and "--checkpoint 'runs/my run'" in result.out


def test_new_path(tmp_path):
    for _ in range(3):
        new_path(tmp_path / "v1.5")
        new_path(tmp_path / "a.png", ".png")
    names = ["a.png", "a_2.png", "a_3.png", "v1.5", "v1.5_2", "v1.5_3"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names


def test_batch_larger_than_the_data_is_a_note(cli):
    result = cli(*TINY, "--batch-size", 500)
    assert result.code == 0 and "note: the data set" in result.err
    assert torch.load("runs/ddpm_digits/ckpt.pt", weights_only=True)["step"] == 2  # one batch an epoch


@pytest.mark.parametrize("weighting", ddpm.WEIGHTINGS)
def test_every_weighting_trains(cli, weighting):
    how = ("--epochs", 1, "--prediction", "v", "--schedule", "cosine")
    assert cli(*TINY, *how, "--weighting", weighting).code == 0


def test_real_cars_and_mnist(cli, data_root):
    for dataset in ("stanfordcars", "mnist"):
        result = cli(*TINY, "--dataset", dataset, "--data-root", data_root, "--image-size", 16)
        assert result.code == 0 and "48 images" in result.out
        config = torch.load(f"runs/ddpm_{dataset}/ckpt.pt", weights_only=True)["config"]
        loss = ("x_0", "min_snr") if dataset == "stanfordcars" else ("v", None)
        assert (config["prediction"], config["weighting"]) == loss


@pytest.mark.parametrize("image_size", [8, 16, 28, 32, 48, 64, 96, 128, 256])
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("cpu", [False, True])
def test_default_networks_fit_their_sizes(image_size, narrow, cpu):
    defaults = {"patch": 1} | default_network(image_size, narrow, cpu)
    with torch.device("meta"):
        net = UNet(3, **{k: defaults[k] for k in ("width", "multipliers", "blocks", "attention", "patch")})
    assert image_size % net.divisor == 0 and 0 not in defaults["attention"]
    parameters = sum(p.numel() for p in net.parameters()) / 1e6
    if image_size <= 16:
        assert 0.7 < parameters < 1.5
    if image_size == 64 and not cpu:
        assert 15 < parameters < 25


def settled(*flags):
    """The settings of a run of so many flags, on eight images."""
    parser = Parser(argument_default=argparse.SUPPRESS)
    add_settings(parser, ddpm.GROUPS)
    command = Command(vars(parser.parse_args([*flags, "--limit", "8"])), ddpm.GROUPS.values())
    load_data(command, utils.get_data, narrow=False)
    return command


def test_patches_are_the_default_of_a_cpu_where_levels_are_left_open():
    size, cpu = ("--image-size", "64"), ("--device", "cpu")
    for larger in (size, ("--image-size", "32")):
        assert [settled(*larger, *cpu)[name] for name in ("patch", "width", "batch_size")] == [2, 32, 16]
    assert settled(*size, *cpu, "--multipliers", "1", "2")["patch"] == 1  # a network of one's own
    assert settled(*size, *cpu, "--multipliers", "1", "2", "--patch", "4")["patch"] == 4
    assert settled(*cpu)["patch"] == 1  # at 16x16
    wrong = r"--image-size 40 is not divisible by 16, as 3 levels .* on patches of 4 pixels: try 32 or 48"
    with pytest.raises(UserError, match=wrong):
        settled("--image-size", "40", "--multipliers", "1", "2", "4", "--patch", "4")


@pytest.mark.parametrize("module", [ddpm, ddpm_conditional])
def test_help_names_every_flag_with_its_default(script, module):
    result = script(module, "--help")
    assert result.code == 0 and "Traceback" not in result.err
    entries = [" ".join(entry.split()) for entry in re.split(r"\n  (?=--)", result.out)]
    entry_of = {entry.split()[0].rstrip(","): entry for entry in entries}
    for group in module.GROUPS.values():
        for name, row in rows_of(group).items():
            default, entry = row["default"], entry_of.pop(flag(name))
            assert len(entry.split()) > 2, entry
            if default not in (None, False):
                shown = ",".join(map(str, default)) if isinstance(default, list) else default
                assert f"(default: {shown}" in entry, entry
    assert "--noise-steps T number of noise levels (default: 1000)" in entries


# errors


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--dataset cifar11", "invalid choice: 'cifar11' (choose from"),
        ("--dataset folder --data-root nowhere", "folder nowhere does not exist"),
        ("--dataset folder --data-root .", "holds no images"),
        ("--image-size 18", "--image-size 18 is not divisible by 4, as 3 levels need it: try 16 or 20"),
        ("--image-size 9 --multipliers 1 2 2 2 2", "not divisible by 16, as 5 levels need it: try 16"),
        ("--attention 0", "level 0 has none"),
        ("--width 7", "width must be even"),
        ("--resume nowhere", "no checkpoint nowhere"),
        ("--sample 4 --checkpoint nowhere", "no checkpoint nowhere"),
        ("--sample 4", "--sample needs --checkpoint"),
        ("--out there", "--out goes with --sample"),
        ("--sampler ddpm --eta 1", "--eta belongs to --sampler ddim"),
        ("--p2-gamma 2", "--p2-gamma belongs to --weighting p2"),
        ("--sample-steps 2000", "more than the 1000 noise steps"),
        ("--seed 99999999999999999999999", "expected a whole number of at least 0"),
        ("--device tpu", "unknown device 'tpu'"),
        ("--epochs 0", "expected a whole number of at least 1"),
        ("--lr -1", "expected a number above 0"),
        ("--lr nan", "expected a number above 0"),
        ("--schedule karras", "invalid choice"),
        ("--sampel 3", "unrecognized arguments"),
        ("--runs file/runs", "file"),
    ],
)
def test_errors_are_one_line(cli, tmp_path, flags, message):
    (tmp_path / "file").write_text("in the way")
    assert message in error_line(cli(*flags.split()))
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_that_is_not_there(cli, device):
    assert f"device '{device}' is not available" in error_line(cli("--device", device))


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="there is an MPS device here")
def test_mps_that_is_not_there(cli):
    assert "device 'mps' is not available" in error_line(cli("--device", "mps"))


def test_no_cars_is_an_error_that_says_what_to_do(cli):
    result = cli("--dataset", "stanfordcars", "--data-root", ".")
    assert "no Stanford Cars" in error_line(result) and "kaggle datasets download" in result.err


class Exploit:
    def __reduce__(self):
        return os.system, ("touch exploited",)


def write_bad_checkpoints(trained):
    good = (trained / "ckpt.pt").read_bytes()
    state = torch.load(trained / "ckpt.pt", weights_only=True)
    open("truncated.pt", "wb").write(good[: len(good) // 2])
    open("empty.pt", "wb").close()
    open("text.pt", "w").write("a text file\n")
    pickle.dump(Exploit(), open("pickle.pt", "wb"))
    torch.save({"kind": "ddpm", "config": Exploit()}, "exploit.pt")
    torch.save({"kind": "classifier", "config": {}}, "classifier.pt")
    torch.save({"weights": torch.zeros(3)}, "foreign.pt")
    torch.save([1, 2], "list.pt")
    torch.save({"input_blocks.0.0.weight": torch.zeros(3)}, "adm.pt")
    torch.save({"state_dict": {"model.diffusion_model.input_blocks.0.0.bias": torch.zeros(3)}}, "sd.ckpt")
    torch.save({"state_dict": None}, "none.pt")
    torch.save({**state, "config": {**state["config"], "width": 16}}, "other_width.pt")
    torch.save({**state, "config": {}}, "no_config.pt")
    torch.save({**state, "config": {**state["config"], "schedule": "mine"}}, "renamed.pt")
    torch.save({"kind": "ddpm", "config": {}}, "incomplete.pt")
    return state


@pytest.mark.parametrize(
    "name, message",
    [
        ("truncated.pt", "damaged"),
        ("empty.pt", "damaged"),
        ("text.pt", "was not loaded"),
        ("pickle.pt", "was not loaded"),
        ("exploit.pt", "could run code"),
        ("classifier.pt", "of kind 'classifier'; a 'ddpm' one is needed"),
        ("foreign.pt", "no checkpoint of this project"),
        ("list.pt", "no checkpoint of this project"),
        ("none.pt", "no checkpoint of this project"),
        ("adm.pt", "weights of guided-diffusion, which are out of scope"),
        ("sd.ckpt", "weights of LDM or Stable Diffusion, which are out of scope"),
        ("other_width.pt", "does not hold the network"),
        ("no_config.pt", "does not hold the network"),
        ("renamed.pt", "schedule 'mine' is none of linear, cosine"),
        ("incomplete.pt", "incomplete: it lacks net, ema"),
    ],
)
def test_bad_checkpoints(cli, trained, tmp_path, name, message):
    write_bad_checkpoints(trained)
    assert message in error_line(cli("--sample", 1, "--checkpoint", name, "--sample-steps", 2))
    if "does not hold" not in message and name != "renamed.pt":
        assert message in error_line(cli("--resume", name))
    assert "Warning" not in cli("--sample", 1, "--checkpoint", name).err
    assert not (tmp_path / "exploited").exists()


def test_resume_with_another_network(cli):
    cli(*TINY)
    before = open("runs/ddpm_digits/ckpt.pt", "rb").read()
    shutil.copy("runs/ddpm_digits/ckpt.pt", "runs/ddpm_digits/backup.pt")
    assert "from its ckpt.pt" in error_line(cli("--resume", "runs/ddpm_digits/backup.pt", "--epochs", 3))
    for flags in (["--width", 16], ["--multipliers", 1, 2, 2], ["--schedule", "linear"], ["--limit", 7]):
        line = error_line(cli("--resume", "runs/ddpm_digits", "--epochs", 3, *flags))
        assert "the run was made with" in line and flags[0] in line
    assert open("runs/ddpm_digits/ckpt.pt", "rb").read() == before
    assert cli("--resume", "runs/ddpm_digits", "--epochs", 3, "--width", 8).code == 0


def test_resume_with_changed_data(cli, tmp_path):
    for i in range(4):
        Image.new("L", (8, 8), 60 * i).save(tmp_path / f"{i}.png")
    cli(*TINY, "--dataset", "folder", "--data-root", ".")
    Image.new("L", (8, 8), 77).save(tmp_path / "3.png")  # as many images, but others
    assert "the data set has changed" in error_line(cli("--resume", "runs/ddpm_folder", "--epochs", 3))


def test_sampling_takes_its_settings_from_the_checkpoint(cli, trained):
    line = error_line(cli("--sample", 1, "--checkpoint", trained, "--width", 8))
    assert "--width comes from the checkpoint" in line
    assert "20 noise steps" in error_line(cli("--sample", 1, "--checkpoint", trained, "--sample-steps", 21))


def test_a_conditional_run_is_sampled_by_the_other_script(cli, conditional):
    conditional(*TINY, "--epochs", 1)
    line = error_line(cli("--sample", 1, "--checkpoint", "runs/ddpm_conditional_digits"))
    assert "of kind 'ddpm_conditional'" in line and "ddpm_conditional.py samples it" in line


@pytest.mark.parametrize("call", ["write", "replace"])
def test_full_disk_leaves_the_previous_checkpoint(cli, call):
    """Room for the checkpoints of step 0 and of the first epoch, none for that of the second."""
    saves, real_fsync, real_replace = [], os.fsync, os.replace

    def full(path):
        if str(path).endswith("ckpt.pt.tmp"):
            saves.append(path)
            if len(saves) == 3:
                raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        if call == "write":
            patch.setattr(os, "fsync", lambda f: full(os.readlink(f"/proc/self/fd/{f}")) or real_fsync(f))
        else:
            patch.setattr(os, "replace", lambda a, b: full(a) or real_replace(a, b))
        line = error_line(cli(*TINY))
    assert "No space left on device" in line and "previous checkpoint is untouched" in line
    state = torch.load("runs/ddpm_digits/ckpt.pt", weights_only=True)
    assert state["step"] == 3 and not os.path.exists("runs/ddpm_digits/ckpt.pt.tmp")


def test_full_disk_for_another_file_names_it(cli, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    line = error_line(cli(*TINY))
    assert "No space left on device: runs/ddpm_digits/samples/epoch_0001.png" in line
    assert torch.load("runs/ddpm_digits/ckpt.pt", weights_only=True)["step"] == 3


def test_out_of_memory_names_the_flags_that_help(cli, monkeypatch):
    def fail(*args, **options):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ddpm, "train", fail)
    line = error_line(cli(*TINY))
    assert all(name in line for name in ("lower --batch-size", "--accumulate", "--checkpointing"))


def test_as_a_process_without_matplotlib_and_scipy(tmp_path):
    """The five run-time packages are enough, and errors leave a process with status 2."""
    hide = "import sys; sys.modules.update(matplotlib=None, scipy=None, safetensors=None)"
    run = f"runpy.run_path('{PROJECT}/ddpm.py', run_name='__main__')"
    code = f"{hide}; import runpy; sys.argv[0] = 'ddpm.py'; {run}"
    options = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(PROJECT)}, "text": True}
    runs = [
        subprocess.Popen([sys.executable, "-c", code, *flags], stderr=subprocess.PIPE, **options)
        for flags in (TINY, ["--dataset", "x"])
    ]
    (_, good), (_, bad) = (run.communicate(timeout=120) for run in runs)
    assert runs[0].returncode == 0, good
    assert runs[1].returncode == 2 and len(bad.splitlines()) == 1, bad
