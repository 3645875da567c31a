"""The training loop: what it saves and when, resuming bit for bit, and stopping in every way."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import PROJECT, TINY, error_line

import ddpm
from modules import EMA
from support import trainer
from support.images import image_files
from support.loader import Loader
from support.machine import compile_forward
from support.trainer import Trainer, TrainingSettings


def checkpoint(run="runs/ddpm_digits"):
    return torch.load(f"{run}/ckpt.pt", weights_only=True)


def same(a, b):
    """Equality of nested dictionaries, lists and tensors, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def assert_same_end(a, b):
    for part in ("net", "ema", "optimizer", "rng", "epoch", "step"):
        assert same(a[part], b[part]), part


def interrupt_at(monkeypatch, step):
    """Send this process a Ctrl-C while training takes its step number `step` (from 1)."""
    calls, real = [], ddpm.Diffusion.loss

    def loss(self, *args, **options):
        calls.append(1)
        if len(calls) == step:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, *args, **options)

    monkeypatch.setattr(ddpm.Diffusion, "loss", loss)


def test_a_run_is_one_folder(cli):
    result = cli(*TINY)
    assert result.code == 0
    state = checkpoint()
    assert state["kind"] == "ddpm" and state["epoch"] == 2 and state["step"] == 6
    assert state["class_names"] == list("0123456789")
    config = json.load(open("runs/ddpm_digits/config.json"))
    assert config == state["config"] and config["width"] == 8 and config["lr"] == 2e-3
    rows = list(csv.DictReader(open("runs/ddpm_digits/log.csv")))
    assert [row["epoch"] for row in rows] == ["1", "2"] and [row["step"] for row in rows] == ["3", "6"]
    assert all(0 < float(row["loss"]) < 10 for row in rows)
    for path in ("runs/ddpm_digits/ckpt.pt", "runs/ddpm_digits/log.csv", "samples/epoch_0002.png"):
        assert path in result.out
    pictures = image_files(Path("runs/ddpm_digits/samples"))
    assert sorted(p.name for p in pictures) == ["epoch_0001.png", "epoch_0002.png"]


def test_a_run_never_overwrites_another(cli):
    cli(*TINY)
    before = open("runs/ddpm_digits/ckpt.pt", "rb").read()
    result = cli(*TINY, "--epochs", "1")
    assert result.code == 0 and "runs/ddpm_digits_2" in result.out
    assert "note: runs/ddpm_digits exists" in result.err
    assert open("runs/ddpm_digits/ckpt.pt", "rb").read() == before
    cli(*TINY, "--epochs", "1", "--name", "mine")
    assert checkpoint("runs/mine")["step"] == 3


def test_the_same_seed_gives_the_same_run_and_another_seed_another(cli):
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        cli(*TINY, "--name", name, "--seed", seed)
    assert_same_end(checkpoint("runs/a"), checkpoint("runs/b"))
    assert not same(checkpoint("runs/a")["net"], checkpoint("runs/c")["net"])


@pytest.mark.parametrize(  # an epoch has 3 steps
    "step, dropout", [(1, "0"), (2, "0.3"), (3, "0"), (4, "0"), (4, "0.3"), (5, "0")]
)
def test_interrupted_and_resumed_is_the_same_bit_for_bit(cli, monkeypatch, step, dropout):
    tiny = [*TINY, "--dropout", dropout]
    cli(*tiny, "--name", "whole")
    with monkeypatch.context() as patch:
        interrupt_at(patch, step)
        result = cli(*tiny, "--name", "parts")
    assert result.code == 130 and "Traceback" not in result.err
    assert "--resume runs/parts" in result.err
    assert checkpoint("runs/parts")["step"] == step
    torch.manual_seed(999)  # the process that resumes is another one
    assert cli("--resume", "runs/parts").code == 0
    assert_same_end(checkpoint("runs/whole"), checkpoint("runs/parts"))

    def losses(run):
        return [row[:3] for row in csv.reader(open(f"runs/{run}/log.csv"))]  # epoch, step and loss

    assert losses("whole") == losses("parts") and len(losses("whole")) == 3


def test_first_checkpoint_stands_before_step_1(cli, monkeypatch):
    def fail(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(ddpm.Diffusion, "loss", fail)
    assert cli(*TINY).code == 130
    assert checkpoint()["step"] == 0


def test_a_long_epoch_is_saved_on_the_way(cli, monkeypatch):
    monkeypatch.setattr(trainer, "SAVE_SECONDS", 0)
    with monkeypatch.context() as patch:
        calls, real = [], ddpm.Diffusion.loss

        def killed_at_5(*args, **options):
            calls.append(1)
            if len(calls) == 5:
                raise KeyboardInterrupt  # cuts in without saving
            return real(*args, **options)

        patch.setattr(ddpm.Diffusion, "loss", killed_at_5)
        assert cli(*TINY).code == 130
    assert checkpoint()["step"] == 4


def test_random_states_are_byte_tensors(cli):
    cli(*TINY)
    rng = checkpoint()["rng"]
    assert rng["cpu"].dtype == rng["train"].dtype == torch.uint8 and not rng["cpu"].is_cuda


@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.parametrize("step", [1, 5])
def test_what_is_not_finite_stops_the_run_before_it_is_saved(cli, monkeypatch, kind, step):
    calls, real = [], ddpm.Diffusion.loss

    def loss(self, net, *args, **options):
        calls.append(1)
        value = real(self, net, *args, **options)
        if len(calls) == step:
            if kind == "loss":
                return value * float("nan")
            weight = next(iter(net.parameters()))
            value = value + (weight.flatten()[0] * 0).sqrt()  # finite, but its slope is not
        return value

    monkeypatch.setattr(ddpm.Diffusion, "loss", loss)
    line = error_line(cli(*TINY))
    assert f"the {kind} is not finite at step {step}:" in line and "ckpt.pt" in line
    state = checkpoint()
    assert state["step"] == (0 if step == 1 else 3)  # the end of the last good epoch
    assert all(p.isfinite().all() for part in ("net", "ema") for p in state[part].values())


def test_the_loss_is_not_read_at_every_step(monkeypatch, tmp_path):
    """Reading a number from the device waits for it: 60 steps may do so a few times only."""
    reads, real = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(1) or real(self))
    monkeypatch.setattr(torch.Tensor, "item", lambda self: reads.append(1) or real(self))
    net = torch.nn.Conv2d(1, 1, 1)
    loader, settings = Loader(torch.zeros(60, 1, 2, 2, dtype=torch.uint8), 1), TrainingSettings(epochs=1)
    ddpm.train(lambda net, x, y, g: net(x).square().mean(), Trainer(net, EMA, loader, tmp_path, settings))
    assert len(reads) <= 5


class Silent(trainer.tqdm):
    """A progress bar as with TQDM_DISABLE=1: it counts nothing."""

    def __init__(self, **options):
        super().__init__(**options, disable=True)


@pytest.mark.parametrize(
    "epochs, every, told", [(10, 2, False), (10_000_000, 2, True), (10_000_000, 25, True)]
)
def test_a_long_run_says_how_long_it_will_take(cli, monkeypatch, epochs, every, told):
    """After a few steps, or where an epoch has less than these, after the first."""
    monkeypatch.setattr(trainer, "CHECK_EVERY", every)
    monkeypatch.setattr(trainer, "tqdm", Silent)
    after_epoch = Trainer.after_epoch
    monkeypatch.setattr(Trainer, "after_epoch", lambda self, n, _: after_epoch(self, n, n == 3))  # as Ctrl-C
    result = cli(*TINY, "--epochs", str(epochs), "--preview-every", "100")
    said = [line for line in result.out.splitlines() if "hours" in line]
    assert result.code == 130 and len(said) == told
    for line in said:
        assert re.fullmatch(r"time     about \d+\.\d hours; what takes less: .*--image-size.*latents.*", line)


def test_training_loop_serves_any_task(tmp_path):
    """A regression with labels: nothing in train() knows of diffusion. The averaged weights learn, too."""
    x = torch.randint(0, 256, (256, 1, 2, 2), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    y = (x.float() / 127.5 - 1) @ torch.ones(2, 2) * 0.5 + 0.25
    net = torch.nn.Conv2d(1, 1, 1)

    def loss_fn(net, x_0, y, generator):
        return (net(x_0) @ torch.ones(2, 2) / 2 - y).square().mean()

    settings = TrainingSettings(epochs=20, lr=0.05, weight_decay=0)
    training = Trainer(net, EMA, Loader(x, 16, y=y), tmp_path, settings)
    ddpm.train(loss_fn, training)
    for trained in (net, training.ema.net):
        assert trained.weight.item() == pytest.approx(1, abs=0.02)
        assert trained.bias.item() == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("steps", [1, 1000])
def test_learning_rate(steps, tmp_path):
    """A warm-up, of at most a tenth of the run, then half a cosine from the peak to 0."""
    net, rates = torch.nn.Conv2d(1, 1, 1), []
    loader = Loader(torch.zeros(steps, 1, 2, 2, dtype=torch.uint8), 1)
    trainer = Trainer(net, EMA, loader, tmp_path, TrainingSettings(epochs=1, lr=2.0, warmup=50))

    def loss_fn(net, x_0, y, generator):
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        return net(x_0).square().mean()

    ddpm.train(loss_fn, trainer)
    assert max(rates) == 2.0 and rates.index(2.0) == min(50, steps // 10)
    if steps == 1000:
        assert rates[:51] == pytest.approx([2.0 * (k + 1) / 51 for k in range(51)])
        assert rates[525] == pytest.approx(1.0) and 0 < rates[-1] < 1e-4


def test_checkpoints_hold_the_settings_of_the_run_alone(conditional):
    assert conditional(*TINY, "--epochs", 1, "--device", "cpu").code == 0
    config = json.load(open("runs/ddpm_conditional_digits/config.json"))
    assert config == checkpoint("runs/ddpm_conditional_digits")["config"]
    assert config["width"] == 8 and config["schedule"] == "cosine" and config["guidance_scale"] == [3]
    of_samples = {"out", "animate", "labels", "prompt", "batches", "guidance", "classifier", "checkpoint"}
    assert not config.keys() & {*of_samples, "sample", "resume"}


def test_resume_may_go_on_for_longer(cli):
    cli(*TINY)
    assert "has had 2 epochs already" in error_line(cli("--resume", "runs/ddpm_digits", "--epochs", "1"))
    assert cli("--resume", "runs/ddpm_digits", "--epochs", "3").code == 0
    assert checkpoint()["epoch"] == 3 and checkpoint()["config"]["epochs"] == 3


def test_a_run_killed_after_its_last_step_is_finished(cli):
    cli(*TINY)
    last = Path("runs/ddpm_digits/samples/epoch_0002.png")
    grid, before = last.read_bytes(), checkpoint()
    last.unlink()  # as if killed while it was drawn
    result = cli("--resume", "runs/ddpm_digits")
    assert result.code == 0 and "has had its 2 epochs" in result.err and str(last) in result.out
    assert last.read_bytes() == grid and same(checkpoint(), before)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--variance", "beta"], "--variance belongs to --sampler ddpm"),
        (["--sampler", "ddpm", "--eta", 1], "--eta belongs to --sampler ddim"),
        (["--sampler", "ddpm", "--runge-kutta"], "--runge-kutta belongs to --sampler pndm"),
    ],
)
def test_resume_refuses_settings_of_another_choice(cli, flags, message):
    cli(*TINY, "--epochs", 1)
    before = Path("runs/ddpm_digits/ckpt.pt").read_bytes()
    assert message in error_line(cli("--resume", "runs/ddpm_digits", "--epochs", 2, *flags))
    assert Path("runs/ddpm_digits/ckpt.pt").read_bytes() == before
    assert (
        cli("--resume", "runs/ddpm_digits", "--epochs", 2, "--sampler", "ddpm", "--variance", "beta").code
        == 0
    )


def test_resuming_with_the_whole_command(cli):
    cli(*TINY, "--batch-size", "500")  # larger than the data set
    assert cli(*TINY, "--batch-size", "500", "--resume", "runs/ddpm_digits").code == 0


def test_log_rows_that_a_crash_left_are_taken_back(cli, monkeypatch):
    cli(*TINY)
    with open("runs/ddpm_digits/log.csv", "a") as file:
        file.write("3,9,0.1,0.1,1,1\n")  # logged, but the run was killed before it was saved
    cli("--resume", "runs/ddpm_digits", "--epochs", "3")
    assert [row["epoch"] for row in csv.DictReader(open("runs/ddpm_digits/log.csv"))] == ["1", "2", "3"]


def start(tmp_path, *args):
    command = [sys.executable, str(PROJECT / "ddpm.py"), *args]
    return subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def wait_for(path, process):
    for _ in range(600):
        if path.exists() or process.poll() is not None:
            break
        time.sleep(0.1)
    assert path.exists(), process.communicate()[1]


@pytest.mark.parametrize("wait", [0.0, 0.7])
def test_kill_at_any_moment_leaves_a_checkpoint_that_resumes(cli, tmp_path, wait):
    long = [*TINY, "--epochs", "100000", "--preview-every", "100000"]
    process = start(tmp_path, *long)
    wait_for(tmp_path / "runs/ddpm_digits/ckpt.pt", process)
    time.sleep(wait)
    process.kill()
    process.communicate()
    step = checkpoint()["step"]
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 2)
        assert cli("--resume", "runs/ddpm_digits").code == 130
    assert checkpoint()["step"] == step + 2


def test_ctrl_c_and_sigterm_save_and_leave_cleanly(cli, tmp_path):
    long = [*TINY, "--epochs", "100000", "--preview-every", "100000"]
    sent = {"one": signal.SIGINT, "two": signal.SIGTERM}
    processes = {name: start(tmp_path, *long, "--name", name) for name in sent}
    for name, process in processes.items():
        wait_for(tmp_path / f"runs/{name}/ckpt.pt", process)
        time.sleep(0.3)
        process.send_signal(sent[name])
    for name, process in processes.items():
        err = process.communicate(timeout=60)[1]
        assert process.returncode == 130 and "Traceback" not in err, err
        assert f"--resume runs/{name}" in err
        assert not list((tmp_path / f"runs/{name}").glob("*.tmp"))


def test_compile_gives_the_same_run(cli, monkeypatch):
    """--compile changes the speed, not what is learned; a compiled run is resumed like any other.

    The whole network is captured here, and its backward pass; code is generated for a part, in the next test,
    as it takes the C++ compiler a minute or two for the whole.
    """
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    for result in (
        cli(*TINY, "--compile", "--name", "compiled"),
        cli("--resume", "runs/compiled", "--epochs", 3),
    ):
        assert result.code == 0 and "--compile failed" not in result.err
        assert "the first step took" in result.out + result.err
    cli(*TINY, "--name", "eager")
    cli("--resume", "runs/eager", "--epochs", 3)
    a, b = checkpoint("runs/compiled")["net"], checkpoint("runs/eager")["net"]
    assert a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=1e-3) for k in a)


def test_compiled_code_gives_the_same_output_and_gradients(capsys):
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Conv2d(2, 2, 3), torch.nn.SiLU())
        if compiled:
            compile_forward(net, graphs=False)
        out = net(torch.randn(2, 2, 8, 8))
        out.square().sum().backward()
        results.append([out, *(p.grad for p in net.parameters())])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-3) for a, b in zip(*results, strict=True))
    assert "--compile failed" not in capsys.readouterr().err


def test_bf16_trains(cli):
    assert cli(*TINY, "--precision", "bf16").code == 0
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in checkpoint()["net"].values())
