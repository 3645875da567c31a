"""Several processes: the same gradients, runs and samples as one, and what happens when one of them dies."""

import csv
import json
import os
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
import ddpm_conditional
from modules import EMA, ConditionalUNet
from support import launch
from support.errors import UserError
from support.generators import BatchShare, randn_like
from support.loader import Loader
from support.machine import get_device
from support.processes import Processes, join_processes
from support.trainer import Trainer, TrainingSettings


def torchrun(folder, *command):
    """Start `torchrun ... SCRIPT ...` in a folder; -> the process, its output piped."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    script, *flags = command
    everything = [*run, str(PROJECT / script), *map(str, flags)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(everything, cwd=folder, env=env, **pipes)


def finished(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out, err


def weights(run):
    return torch.load(Path(run) / "ckpt.pt", weights_only=True)


def assert_same_weights(a, b, tolerance):
    for part in ("net", "ema"):
        for key, value in a[part].items():
            assert (value - b[part][key]).abs().max() < tolerance, (part, key)


# shares


def test_shares_are_a_partition():
    items = list(range(11))
    shares = [Processes(rank, 3).share(items) for rank in range(3)]
    assert sorted(i for share in shares for i in share) == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert Processes().share(items) == items and Processes().first and not Processes(1, 2).first


def test_the_shares_of_a_batch_are_the_batch():
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 1, 2, 2)
    make = partial(Loader, images, 4, y=torch.arange(10), flip=True, seed=3)
    whole, loaders = make(), [make(processes=Processes(rank, 2)) for rank in range(2)]
    epochs = (loader.epoch(1) for loader in (whole, *loaders))
    for size, (one, *two) in zip((4, 4, 2), zip(*epochs, strict=True), strict=True):
        assert size == len(one[0]) == sum(len(x) for x, _ in two)
        for rank, (x, y) in enumerate(two):
            assert torch.equal(x, one[0][rank::2]) and torch.equal(y, one[1][rank::2])


def test_a_share_draws_what_the_whole_batch_would():
    def generator():
        return torch.Generator().manual_seed(5)

    x = torch.zeros(7, 2, 3, 3)
    for drawn in (randn_like, ddpm.Diffusion(50).sample_timesteps):
        part = drawn(x[1::3], BatchShare(generator(), range(1, 7, 3), 7))
        assert torch.equal(part, drawn(x, generator())[1::3])


# gradients

ALONE, BATCH = Processes(), 7


def gradients(processes=ALONE, parts=1, batch=BATCH):
    """Loss and gradients of a small network in float64 on a batch that this process has a share of."""
    torch.manual_seed(0)
    net = ConditionalUNet(10, 1, 8, (1, 2), 1, (1,)).double()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x_0, y = torch.rand(batch, 1, 8, 8, dtype=torch.float64) * 2 - 1, torch.arange(batch)
    diffusion = ddpm.Diffusion(100, "cosine", "v")
    loader = Loader(torch.zeros(batch, 1, 8, 8, dtype=torch.uint8), batch, processes=processes)
    settings = TrainingSettings(epochs=1, accumulate=parts, clip_grad=1e9)
    trainer = Trainer(net, EMA, loader, Path("none"), settings)
    mine = range(batch)[processes.rank :: processes.count] or range(1)
    for x_part, y_part, generator in trainer.parts_of(x_0[mine], y[mine], batch):
        loss = ddpm_conditional.conditional_loss(
            diffusion, net.null, 0.5, trainer.net, x_part, y_part, generator
        )
        trainer.step(loss)
    return processes.add(trainer.loss.clone()) / processes.count, [p.grad for p in net.parameters()]


def gradients_of_a_process(rank, folder):
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    found = [gradients(Processes(rank, 2), parts, batch) for parts, batch in ((1, BATCH), (2, BATCH), (1, 1))]
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def largest_difference(a, b):
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


def test_gradients_are_those_of_one_process_with_the_whole_batch(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{PROJECT}:{PROJECT / 'tests'}")
    torch.multiprocessing.spawn(gradients_of_a_process, (str(tmp_path),), 2)
    loss, grads = gradients()
    alone = gradients(batch=1)
    assert max(g.abs().max().item() for g in grads) > 0.01
    for rank in range(2):
        whole, in_parts, one_image = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for two in (whole, in_parts):
            assert abs(two[0] - loss) < 1e-10 and largest_difference(two[1], grads) < 1e-10
        assert largest_difference(one_image[1], alone[1]) < 1e-10  # a process without images weighs nothing


@pytest.mark.parametrize("parts", [2, 3, 7, 20])
def test_gradients_in_parts_are_those_of_the_whole_batch(parts):
    loss, grads = gradients()
    loss_of_parts, in_parts = gradients(parts=parts)
    assert abs(loss_of_parts - loss) < 1e-12 and largest_difference(in_parts, grads) < 1e-12


# runs


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A run of two processes."""
    folder = tmp_path_factory.mktemp("two")
    out, _ = finished(torchrun(folder, "ddpm.py", *TINY, "--batch-size", 15))
    assert out.count("2 processes") == 1 and out.count("network ") == 1
    return folder


def test_a_run_of_two_processes_is_that_of_one(two, cli):
    assert os.listdir(two / "runs") == ["ddpm_digits"]
    cli(*TINY, "--batch-size", "15")
    one = weights("runs/ddpm_digits")
    assert weights(two / "runs/ddpm_digits")["step"] == one["step"] == 8  # of 15, 15, 15 and 3 images
    assert_same_weights(weights(two / "runs/ddpm_digits"), one, 1e-4)
    rows = [list(csv.DictReader(open(f / "runs/ddpm_digits/log.csv"))) for f in (two, Path("."))]
    for a, b in zip(*rows, strict=True):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), abs=2e-5)


def test_sampling_by_two_processes_gives_the_same_files(two, cli):
    run, out = two / "runs/ddpm_digits", two / "images"
    how = ("--sample", 11, "--batch-size", 3, "--sample-steps", 5)
    finished(torchrun(two, "ddpm.py", *how, "--checkpoint", run, "--out", out))
    cli(*how, "--checkpoint", run, "--out", "one")
    names = [f"{i:05d}.png" for i in range(11)]
    assert sorted(os.listdir(out)) == sorted(os.listdir("one")) == names
    for name in names:
        assert (out / name).read_bytes() == Path("one", name).read_bytes()


def test_the_first_process_says_what_is_left_to_draw(two, cli, monkeypatch):
    """The others may come late, and see more files than it did."""
    sent = []
    monkeypatch.setattr(Processes, "broadcast", lambda self, value: sent.append(value) or value)
    run, how = two / "runs/ddpm_digits", ("--batch-size", 2, "--sample-steps", 2, "--out", "out")
    cli("--sample", 3, "--checkpoint", run, *how)
    cli("--sample", 9, "--checkpoint", run, *how, "--animate")
    assert [list(map(list, batches)) for batches in sent] == [
        [[0, 1], [2]],
        [[0, 1], [2, 3], [4, 5], [6, 7], [8]],
    ]


def test_a_mistake_is_one_line_though_the_others_wait(tmp_path):
    process = torchrun(tmp_path, "ddpm.py", *TINY, "--dataset", "folder", "--data-root", "/none")
    _, err = process.communicate(timeout=90)
    ours = err[: err.find("torch/distributed/elastic")]
    assert process.returncode != 0 and ours.count("ddpm.py: error:") == 1 and "Traceback" not in ours


# one of them dies


def started(folder):
    """A run of two processes that would take minutes, once it has trained an epoch; -> it, its children."""
    process = torchrun(folder, "ddpm.py", *TINY, "--epochs", 400, "--preview-every", 400)
    log = folder / "runs/ddpm_digits/log.csv"
    wait_for(lambda: log.is_file() and len(log.read_text().splitlines()) > 2, process)
    return process, children(process.pid)


def children(pid):
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for(condition, process, seconds=90):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.05)


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="reads /proc")


@needs_proc
@pytest.mark.parametrize("dead", [0, 1])
def test_a_process_that_dies_ends_the_others_with_a_message_and_one_goes_on(tmp_path, cli, dead):
    process, workers = started(tmp_path)
    saved = weights(tmp_path / "runs/ddpm_digits")["epoch"]
    os.kill(workers[dead], signal.SIGKILL)
    _, err = process.communicate(timeout=90)
    assert process.returncode != 0
    assert "another process has ended" in err and "--resume runs/ddpm_digits" in err
    os.chdir(tmp_path)
    assert os.listdir("runs") == ["ddpm_digits"]
    at, log = weights("runs/ddpm_digits")["epoch"], Path("runs/ddpm_digits/log.csv")
    assert at >= saved >= 1
    assert cli("--resume", "runs/ddpm_digits", "--epochs", at + 2).code == 0  # alone
    assert weights("runs/ddpm_digits")["epoch"] == at + 2
    epochs = [int(row["epoch"]) for row in csv.DictReader(open(log))]
    assert epochs == list(range(1, at + 3))  # it went on, and began nothing twice


@needs_proc
def test_a_signal_to_torchrun_saves_and_stops(tmp_path):
    process, _ = started(tmp_path)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=90)
    assert "stopped and saved; go on with" in err and "another process" not in err
    state = weights(tmp_path / "runs/ddpm_digits")
    assert state["step"] >= 6 and state["epoch"] < 400


# what can be wrong


@pytest.fixture
def three(monkeypatch):
    monkeypatch.setattr(launch, "join_processes", lambda device: Processes(0, 3))
    monkeypatch.setattr(Processes, "barrier", lambda self: None)
    monkeypatch.setattr(Processes, "broadcast", lambda self, value: value)
    monkeypatch.setattr(Processes, "add", lambda self, x: x)


def test_more_processes_than_images(cli, three):
    line = error_line(cli(*TINY, "--batch-size", "2"))
    assert "3 processes" in line and "2 images" in line and "--nproc_per_node" in line
    assert not Path("runs").exists()


def test_more_parts_than_images(cli):
    assert "--accumulate 17" in error_line(cli(*TINY, "--accumulate", "17"))


def test_several_processes_sample_into_a_folder(two, cli, three):
    assert "--out" in error_line(cli("--sample", "4", "--checkpoint", two / "runs/ddpm_digits"))


def test_processes_that_cannot_talk(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"mps can't talk.*--device cpu"):
        join_processes(torch.device("mps"))


@pytest.mark.parametrize("missing", ["is_available", "is_gloo_available"])
def test_gloo_is_missing(cli, monkeypatch, missing):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, missing, lambda: False)
    assert "gloo" in error_line(cli(*TINY))


def test_nccl_is_missing(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    with pytest.raises(UserError, match=r"nccl.*--device cpu"):
        join_processes(torch.device("cuda:0"))


def test_more_processes_than_gpus(monkeypatch):
    for name, value in (("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "3")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    with pytest.raises(UserError, match="3 processes for 2 GPUs"):
        get_device("auto")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes can't share cuda:1"):
        get_device("cuda:1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert get_device("auto") == get_device("cuda") == torch.device("cuda:1")
    assert current == [1, 1]


def test_an_index_makes_that_gpu_the_current_one(monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert get_device("cuda:1") == torch.device("cuda:1") and current == [1]


def test_processes_that_cannot_meet(cli, monkeypatch):
    where = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "no"}
    for name, value in where.items():
        monkeypatch.setenv(name, value)
    assert "could not meet" in error_line(cli(*TINY))


def test_the_folder_of_two_processes_is_that_of_one(two, cli):
    cli(*TINY)
    assert sorted(os.listdir("runs/ddpm_digits")) == sorted(os.listdir(two / "runs/ddpm_digits"))
    assert json.load(open(two / "runs/ddpm_digits/config.json"))["batch_size"] == 15
