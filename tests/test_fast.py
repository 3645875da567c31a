"""The fast paths give what the plain ones give: precision, memory, compilation, sampling."""

import copy
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmark import memory_of_training
from conftest import TINY, error_line
from PIL import Image

import ddpm
from modules import EMA, UNet
from support import machine, trainer
from support.errors import UserError
from support.images import to_x_0
from support.loader import Loader
from support.machine import MachineSettings, compile_forward, half_precision, to_device
from support.trainer import Trainer, TrainingSettings
from utils import get_data

CPU = torch.device("cpu")


def unet(seed=0, width=8, multipliers=(1, 2)):
    """A small network all of whose layers do something: a new one's last ones are zero."""
    torch.manual_seed(seed)
    net = UNet(1, width, multipliers, 1, (1,))
    for p in net.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return net


def digits(n=64, size=8):
    return get_data("digits", image_size=size).images[:n]


def gradient(net, loss_fn, images, folder, **settings):
    """Loss and gradients of a step of the trainer whose batch is all of the images."""
    training = TrainingSettings(epochs=1, clip_grad=1e9, **settings)
    trainer = Trainer(net, EMA, Loader(images, len(images)), folder, training, MachineSettings(seed=1))
    for x_0, y, generator in trainer.parts_of(to_x_0(images), None, len(images)):
        trainer.step(loss_fn(trainer.net, x_0, y, generator))
    assert trainer.steps == 1
    return trainer.loss, [p.grad.clone() for p in net.parameters()]


def largest_difference(a, b):
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


# equal results


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_first_loss_and_gradients_are_those_of_the_plain_loop(prediction, tmp_path):
    plain, images, diffusion = unet(), digits(), ddpm.Diffusion(200, "cosine", prediction)
    fast, x_0 = to_device(copy.deepcopy(plain), CPU), to_x_0(images)
    loss, grads = gradient(fast, diffusion.loss, images, tmp_path, accumulate=2)

    generator = torch.Generator().manual_seed(1)  # DDPM, Algorithm 1, in its own words
    t = torch.randint(1, 201, (len(x_0),), generator=generator)
    eps = torch.randn(x_0.shape, generator=generator)
    ab = diffusion.alpha_bar[t].float()[:, None, None, None]
    target = eps if prediction == "eps" else ab.sqrt() * eps - (1 - ab).sqrt() * x_0
    expected = (plain(ab.sqrt() * x_0 + (1 - ab).sqrt() * eps, t) - target).square().mean()
    expected.backward()
    assert abs(loss - expected.detach()) < 1e-5
    assert largest_difference(grads, [p.grad for p in plain.parameters()]) < 1e-5


def test_100_steps_in_bf16_lose_as_much_as_in_fp32(tmp_path):
    losses = {}
    for precision in ("fp32", "bf16"):
        net, diffusion, seen = unet(width=16), ddpm.Diffusion(100, "cosine", "v"), []

        def loss_fn(*inputs, diffusion=diffusion, seen=seen):
            seen.append(diffusion.loss(*inputs))
            return seen[-1]

        (tmp_path / precision).mkdir()
        training, loader = TrainingSettings(epochs=2, lr=1e-3), Loader(digits(400), 8)
        settings = MachineSettings(precision=precision)
        ddpm.train(loss_fn, Trainer(net, EMA, loader, tmp_path / precision, training, settings))
        losses[precision] = torch.stack(seen).mean().item()
        assert len(seen) == 100
    assert losses["bf16"] != losses["fp32"]  # it was another precision
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.005)


def counted(monkeypatch, place, name):
    """The calls of a function, which goes on working."""
    calls, f = [], getattr(place, name)
    monkeypatch.setattr(place, name, lambda *inputs, **options: calls.append(1) or f(*inputs, **options))
    return calls


def test_accumulated_and_checkpointed_runs_are_the_same(cli, monkeypatch):
    losses = counted(monkeypatch, ddpm.Diffusion, "loss")
    stages = counted(monkeypatch, trainer, "checkpoint")
    cli(*TINY, "--name", "plain")
    assert len(losses) == 6 and not stages
    cli(*TINY, "--name", "parts", "--accumulate", "3")
    assert len(losses) == 6 + 3 * 6 and not stages
    cli(*TINY, "--name", "again", "--checkpointing")
    assert len(losses) == 6 + 3 * 6 + 6 and len(stages) == 6 * 8  # 2 stages down, 2 in the middle, 4 up
    plain, parts, again = (torch.load(f"runs/{name}/ckpt.pt") for name in ("plain", "parts", "again"))
    for key, value in plain["net"].items():
        assert (value - parts["net"][key]).abs().max() < 1e-4 and torch.equal(value, again["net"][key])


def test_checkpointing_keeps_less_and_gives_the_same_gradient(tmp_path):
    diffusion, images = ddpm.Diffusion(50), digits(8)
    _, grads = gradient(unet(), diffusion.loss, images, tmp_path)
    net = unet()
    _, again = gradient(net, diffusion.loss, images, tmp_path, checkpointing=True)  # in place, from here on
    assert largest_difference(grads, again) < 1e-6
    (_, kept), (_, kept_then) = (memory_of_training(n, diffusion.loss, images[:1]) for n in (unet(), net))
    assert kept_then < 0.6 * kept


# which precision, how much memory


@pytest.mark.parametrize("bf16_takes, gains", [(0.5, True), (2.0, False)])
def test_bf16_on_a_cpu_that_is_faster_in_it_and_where_layers_are_wide(monkeypatch, bf16_takes, gains):
    times = {torch.bfloat16: bf16_takes, torch.float32: 1.0}
    monkeypatch.setattr(machine, "time_convolution", lambda dtype, device: times[dtype])
    wide, narrow = (unet(width=32, multipliers=m) for m in ([1, 4], [1, 2]))
    assert half_precision("auto", CPU, wide) == (torch.bfloat16 if gains else None)
    assert half_precision("auto", CPU, narrow) is None


@pytest.mark.parametrize(
    "capability, half",
    [((6, 1), None), ((7, 0), torch.float16), ((7, 5), torch.float16), ((8, 0), torch.bfloat16)],
)
def test_a_gpu_takes_the_16_bits_that_its_tensor_cores_have(monkeypatch, capability, half):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert half_precision("auto", torch.device("cuda"), unet()) == half


def test_a_precision_is_as_asked_for_or_an_error(cli, monkeypatch):
    assert half_precision("fp32", CPU, unet()) is None
    assert half_precision("bf16", CPU, unet()) == torch.bfloat16
    assert half_precision("fp16", CPU, unet()) == torch.float16

    def refuse(*inputs, **options):
        raise RuntimeError('"conv2d" not implemented for this type\nsecond line')

    wide = unet(width=32, multipliers=[1, 4])
    monkeypatch.setattr(torch.nn.functional, "conv2d", refuse)
    assert half_precision("auto", CPU, wide) is None
    with pytest.raises(UserError, match=r"^cpu can't compute in fp16: use --precision fp32$"):
        half_precision("fp16", CPU, None)


class Overflowing:
    """The loss of a diffusion process, at some calls so large that its gradient overflows float16."""

    def __init__(self, at=(), factor=1e9):
        self.diffusion, self.at, self.factor, self.trainer = ddpm.Diffusion(100), at, factor, None
        self.seen = []  # before each step: the loss scale, the learning rate of the last step, the weights

    def __call__(self, *inputs):
        trainer = self.trainer
        weights = [p.detach().clone() for net in (trainer.weights, trainer.ema.net) for p in net.parameters()]
        self.seen.append((trainer.scaler.get_scale(), trainer.optimizer.param_groups[0]["lr"], weights))
        return self.diffusion.loss(*inputs) * (self.factor if len(self.seen) in self.at else 1)


def fp16_trainer(folder, loss_fn, epochs=3):
    folder.mkdir(exist_ok=True)
    settings = TrainingSettings(epochs=epochs, lr=1e-3)
    loader, precision = Loader(digits(16), 2), MachineSettings(precision="fp16")  # 8 steps an epoch
    loss_fn.trainer = Trainer(unet(), EMA, loader, folder, settings, precision)
    return loss_fn.trainer


def test_the_loss_scale_leaves_the_gradient_as_it_is(tmp_path):
    diffusion, found = ddpm.Diffusion(100), {}
    for precision in ("fp32", "fp16"):
        images, net, scaled = digits(4), unet(), MachineSettings(seed=1, precision=precision)
        settings = TrainingSettings(epochs=1, clip_grad=1e9)
        trainer = Trainer(net, EMA, Loader(images, 4), tmp_path, settings, scaled)
        for x_0, y, generator in trainer.parts_of(to_x_0(images), None, 4):
            trainer.step(diffusion.loss(trainer.net, x_0, y, generator))
        found[precision] = torch.cat([p.grad.flatten() for p in net.parameters()])
        assert not trainer.skipped
    error = (found["fp16"] - found["fp32"]).norm() / found["fp32"].norm()
    assert 0 < error < 0.01


def test_a_gradient_that_overflows_is_skipped_and_halves_the_scale(tmp_path):
    loss_fn = Overflowing(at=[6])
    trainer = fp16_trainer(tmp_path, loss_fn)
    ddpm.train(loss_fn, trainer)
    scales, rates, weights = zip(*loss_fn.seen, strict=True)
    assert scales == (2.0**16,) * 6 + (2.0**15,) * 18
    assert all(map(torch.equal, weights[5], weights[6]))  # of the network and their average
    assert not any(all(map(torch.equal, weights[k], weights[k + 1])) for k in (*range(5), *range(6, 23)))
    assert rates[5] == rates[6]  # nor is it a step of the learning rate
    assert trainer.steps == 24 and trainer.skipped == 1
    assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {23}


def test_a_run_in_fp16_resumes_bit_for_bit_with_its_scale(tmp_path):
    whole = Overflowing(at=[6])
    ddpm.train(whole, fp16_trainer(tmp_path / "whole", whole))
    first, second = Overflowing(at=[6]), Overflowing()
    trainer = fp16_trainer(tmp_path / "parts", first)
    trainer.after_epoch = lambda epoch, stopping: trainer.save() or stop()

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # after the first epoch, of 8 steps
        ddpm.train(first, trainer)
    again = fp16_trainer(tmp_path / "parts", second)
    again.resume(torch.load(tmp_path / "parts" / "ckpt.pt", weights_only=True))
    assert again.scaler.get_scale() == 2.0**15 and (again.steps, again.skipped) == (8, 1)
    ddpm.train(second, again)
    a, b = (torch.load(tmp_path / name / "ckpt.pt", weights_only=True) for name in ("whole", "parts"))
    assert a["scaler"] == b["scaler"]
    for part in ("net", "ema"):
        assert all(torch.equal(a[part][key], b[part][key]) for key in a[part])


def test_a_loss_scale_that_falls_to_nothing_is_an_error(cli, monkeypatch):
    loss = ddpm.Diffusion.loss
    monkeypatch.setattr(ddpm.Diffusion, "loss", lambda *inputs: 1e30 * loss(*inputs))
    line = error_line(cli(*TINY, "--precision", "fp16", "--epochs", "12"))
    assert "the loss scale of fp16 fell to nothing at step 17: try a lower --lr or --precision fp32" in line
    assert torch.load("runs/ddpm_digits/ckpt.pt")["step"] == 15  # saved after each epoch; all steps skipped


def test_memory_of_training_is_counted_by_the_image():
    """What tests/benchmark.py says of a CPU, and less in half the precision."""
    net, diffusion = unet(), ddpm.Diffusion(50)
    fixed, one = memory_of_training(net, diffusion.loss, digits(1))
    _, six = memory_of_training(net, diffusion.loss, digits(6))
    assert fixed == pytest.approx(5 * 4 * sum(p.numel() for p in net.parameters()), rel=0.05)
    assert six == pytest.approx(6 * one, rel=0.02)
    assert one > 10 * 8 * 8 * 8 * 4  # ten and more activations of 8 channels at 8x8
    net.forward = torch.autocast("cpu", torch.bfloat16)(net.forward)
    assert memory_of_training(net, diffusion.loss, digits(1))[1] < 0.9 * one


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA"),
        MemoryError(),
        RuntimeError("[..] can't allocate memory: you tried to allocate 1 bytes"),
    ],
)
def test_out_of_memory_names_the_flags_that_help(cli, monkeypatch, error):
    def fail(*inputs, **options):
        raise error

    monkeypatch.setattr(ddpm.Diffusion, "loss", fail)
    line = error_line(cli(*TINY))
    assert line.startswith("ddpm.py: error: out of memory: lower --batch-size")
    assert "--accumulate" in line and "--checkpointing" in line
    assert Path("runs/ddpm_digits/ckpt.pt").is_file()


# compiled


def test_a_compiler_that_fails_is_left_out_and_that_is_said_once(cli, monkeypatch):
    calls = []

    def broken(net, **options):
        def forward(*inputs):
            calls.append(1)
            raise RuntimeError("InvalidCxxCompiler: no working C++ compiler\nsecond line")

        return forward

    cli(*TINY, "--name", "plain")
    monkeypatch.setattr(torch, "compile", broken)
    result = cli(*TINY, "--name", "compiled", "--compile")
    assert result.code == 0 and len(calls) == 1
    assert result.err.count("--compile failed") == 1 and "no working C++ compiler" in result.err
    plain, compiled = (torch.load(f"runs/{name}/ckpt.pt")["net"] for name in ("plain", "compiled"))
    assert all(torch.equal(plain[key], compiled[key]) for key in plain)


def test_what_compiled_does_is_used_and_the_time_shown(cli, monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda net, **options: lambda *x: calls.append(1) or net(*x))
    result = cli(*TINY, "--compile")
    assert len(calls) == 6 and "the first step took" in result.out + result.err
    cli("--sample", "3", "--compile", "--checkpoint", "runs/ddpm_digits")
    assert len(calls) == 6 + 20


def test_the_next_call_of_a_graph_leaves_samples_alone(monkeypatch):
    """A CUDA graph writes its output into the same memory each time; here a function on the CPU does."""
    net, plain, buffers = unet().eval(), unet().eval(), {}

    def graph(forward, **options):
        def replay(x, t):
            out = forward(x, t)
            if torch.is_grad_enabled():
                return out
            return buffers.setdefault(len(x), torch.empty_like(out)).copy_(out)

        return replay

    monkeypatch.setattr(torch, "compile", graph)
    compile_forward(net, graphs=True)
    with torch.no_grad():
        for i, n in enumerate((4, 4, 2, 4, 2)):
            x, t = torch.randn(n, 1, 8, 8), torch.full((n,), i + 1)
            out = net(x, t)
            assert torch.allclose(out, plain(x, t), atol=1e-6)
            net(torch.zeros_like(x), t)
            assert torch.allclose(out, plain(x, t), atol=1e-6)  # the next call left it alone
    x = torch.randn(2, 1, 8, 8, requires_grad=True)
    assert net(x, torch.ones(2, dtype=torch.long)).requires_grad


# sampling


def test_half_precision_samples_are_close_and_differ(cli):
    cli(*TINY, "--limit", "400", "--epochs", "4")
    for precision in ("fp32", "bf16", "fp16"):
        run = ("--sample", "8", "--checkpoint", "runs/ddpm_digits", "--sample-steps", "10")
        assert cli(*run, "--precision", precision, "--out", precision).code == 0
    a, b, c = (
        np.stack([np.asarray(Image.open(f"{p}/{i:05d}.png")) for i in range(8)]).astype(float)
        for p in ("fp32", "bf16", "fp16")
    )
    assert 0 < np.abs(a - c).mean() < np.abs(a - b).mean() < 4  # of 255; float16 has three more bits


def test_sampling_goes_on_where_it_stopped(cli, monkeypatch):
    cli(*TINY)
    run = ("--checkpoint", "runs/ddpm_digits", "--batch-size", "4")
    cli("--sample", "10", *run, "--out", "whole")
    cli("--sample", "6", *run, "--out", "parts")
    os.unlink("parts/00001.png")
    kept = os.stat("parts/00002.png").st_mtime_ns
    result = cli("--sample", "10", *run, "--out", "parts")
    assert result.code == 0 and "5 images of this kind already" in result.err
    assert os.stat("parts/00002.png").st_mtime_ns == kept
    for i in range(10):
        assert Path(f"parts/{i:05d}.png").read_bytes() == Path(f"whole/{i:05d}.png").read_bytes()
    grids = [Image.open(f"runs/ddpm_digits/samples/ddim_20_seed0{n}.png") for n in ("", "_3")]
    assert grids[0].tobytes() == grids[1].tobytes()
    calls = []
    monkeypatch.setattr(ddpm, "sample", lambda *inputs: calls.append(1))
    assert cli("--sample", "10", *run, "--out", "parts").code == 0 and not calls


@pytest.mark.parametrize("other", [("--seed", "1"), ("--sampler", "ddpm"), ("--sample-steps", "3")])
def test_samples_of_another_making_are_not_mixed(cli, other):
    cli(*TINY)
    run = ("--sample", "3", "--checkpoint", "runs/ddpm_digits", "--out", "out")
    cli(*run)
    assert "another making" in error_line(cli(*run, *other))
    cli(*TINY, "--seed", "5", "--name", "again")
    assert "another making" in error_line(cli("--sample", "3", "--checkpoint", "runs/again", "--out", "out"))
    Image.new("L", (8, 8)).save("out/mine.png")
    assert "another making" in error_line(cli(*run))


def test_conditional_sampling_goes_on_and_not_with_other_labels(conditional):
    conditional(*TINY)
    run = (
        "--sample",
        "6",
        "--checkpoint",
        "runs/ddpm_conditional_digits",
        "--out",
        "out",
        "--batch-size",
        "2",
    )
    conditional(*run, "--labels", "1,2", "--guidance-scale", "1,3")
    before = {p.name: p.read_bytes() for p in Path("out").iterdir()}
    os.unlink("out/00002_scale3.png")
    os.unlink("out/metadata.jsonl")
    assert conditional(*run, "--labels", "1,2", "--guidance-scale", "1,3").code == 0
    assert {p.name: p.read_bytes() for p in Path("out").iterdir()} == before and len(before) == 13
    assert "another making" in error_line(conditional(*run, "--labels", "1,3", "--guidance-scale", "1,3"))
