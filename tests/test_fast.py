"""The fast paths give what the plain ones give: precision, memory, compilation, sampling, large data sets."""

import copy
import gc
import os
import threading
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, error_line
from PIL import Image

import ddpm
import modules
import utils
from modules import ConditionalUNet, TextUNet, UNet
from utils import Processes

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
    images = utils.get_data("digits", image_size=size, cache_dir=os.devnull + "/none").images[:n]
    return utils.to_x_0(images)


def gradient(model, net, loss_fn, x_0, parts=1):
    total, generator = len(x_0), torch.Generator().manual_seed(1)
    loss = ddpm.batch_gradient(model, loss_fn, x_0, None, generator, total, Processes(), parts)
    grads = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    return loss, grads


def largest_difference(a, b):
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


# equal results


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_first_loss_and_gradients_are_those_of_the_plain_loop(prediction):
    plain, x_0 = unet(), digits()
    fast, diffusion = ddpm.place(copy.deepcopy(plain), CPU), ddpm.Diffusion(200, "cosine", prediction)
    loss, grads = gradient(fast, fast, diffusion.loss, x_0, parts=2)

    generator = torch.Generator().manual_seed(1)  # DDPM, Algorithm 1, in its own words
    t = torch.randint(1, 201, (len(x_0),), generator=generator)
    eps = torch.randn(x_0.shape, generator=generator)
    ab = diffusion.alpha_bar[t].float()[:, None, None, None]
    target = eps if prediction == "eps" else ab.sqrt() * eps - (1 - ab).sqrt() * x_0
    expected = (plain(ab.sqrt() * x_0 + (1 - ab).sqrt() * eps, t) - target).square().mean()
    expected.backward()
    assert abs(loss - expected.detach()) < 1e-5
    assert largest_difference(grads, [p.grad for p in plain.parameters()]) < 1e-5


def test_200_steps_in_bf16_lose_as_much_as_in_fp32(tmp_path):
    images = ((digits(1797) + 1) * 127.5).byte()
    losses = {}
    for bf16 in (False, True):
        net, diffusion, seen = unet(width=16, multipliers=(1, 4)), ddpm.Diffusion(100, "cosine", "v"), []

        def loss_fn(*args, diffusion=diffusion, seen=seen):
            seen.append(diffusion.loss(*args))
            return seen[-1]

        loader = utils.Loader(images[:800], 8)
        (tmp_path / str(bf16)).mkdir()
        ddpm.train(net, loss_fn, loader, tmp_path / str(bf16), epochs=2, lr=1e-3, bf16=bf16)
        losses[bf16] = torch.stack(seen).mean().item()
        assert len(seen) == 200
    assert losses[True] != losses[False]  # it was another precision
    assert losses[True] == pytest.approx(losses[False], rel=0.02)


def counted(monkeypatch, place, name):
    """The calls of a function, which goes on working."""
    calls, f = [], getattr(place, name)
    monkeypatch.setattr(place, name, lambda *args, **options: calls.append(1) or f(*args, **options))
    return calls


def test_accumulated_and_checkpointed_runs_are_the_same(cli, monkeypatch):
    losses = counted(monkeypatch, ddpm.Diffusion, "loss")
    stages = counted(monkeypatch, modules, "checkpoint")
    cli(*TINY, "--name", "plain")
    assert len(losses) == 6 and not stages
    cli(*TINY, "--name", "parts", "--accumulate", "3")
    assert len(losses) == 6 + 3 * 6 and not stages
    cli(*TINY, "--name", "again", "--checkpointing")
    assert len(losses) == 6 + 3 * 6 + 6 and len(stages) == 6 * 8  # 2 stages down, 2 in the middle, 4 up
    plain, parts, again = (torch.load(f"runs/{name}/ckpt.pt") for name in ("plain", "parts", "again"))
    for key, value in plain["net"].items():
        assert (value - parts["net"][key]).abs().max() < 1e-4 and torch.equal(value, again["net"][key])


def test_checkpointing_keeps_less_and_gives_the_same_gradient():
    net, diffusion, x_0 = unet(), ddpm.Diffusion(50), digits(8)
    _, grads = gradient(net, net, diffusion.loss, x_0)
    _, kept = ddpm.memory_of_training(net, diffusion.loss, x_0[:1], None, nullcontext)
    net.checkpointing = True
    _, again = gradient(net, net, diffusion.loss, x_0)
    _, kept_then = ddpm.memory_of_training(net, diffusion.loss, x_0[:1], None, nullcontext)
    assert largest_difference(grads, again) < 1e-6 and kept_then < 0.6 * kept


# which precision, how much memory


@pytest.mark.parametrize("has", ["_is_avx512_bf16_supported", "_is_amx_tile_supported", None])
def test_bf16_on_a_cpu_that_has_it_and_where_layers_are_wide(monkeypatch, has):
    for question in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, question, lambda question=question: question == has, raising=False)
    wide, narrow = ({"width": 32, "multipliers": m} for m in ([1, 8], [1, 4]))
    assert ddpm.use_bf16("auto", CPU, wide) == (has is not None)
    assert not ddpm.use_bf16("auto", CPU, narrow)
    assert ddpm.use_bf16("bf16", CPU, narrow) and not ddpm.use_bf16("fp32", CPU, wide)


def test_memory_is_counted_by_the_image():
    net, diffusion, x_0 = unet(), ddpm.Diffusion(50), digits(6)
    fixed, one = ddpm.memory_of_training(net, diffusion.loss, x_0[:1], None, nullcontext)
    _, six = ddpm.memory_of_training(net, diffusion.loss, x_0, None, nullcontext)
    assert fixed == pytest.approx(5 * 4 * sum(p.numel() for p in net.parameters()), rel=0.05)
    assert six == pytest.approx(6 * one, rel=0.02)
    assert one > 10 * 8 * 8 * 8 * 4  # ten and more activations of 8 channels at 8x8
    half = partial(torch.autocast, "cpu", torch.bfloat16)
    assert ddpm.memory_of_training(net, diffusion.loss, x_0[:1], None, half)[1] < 0.9 * one


def test_what_fits():
    def told(room, batch=64, parts=1, processes=1):
        return ddpm.what_fits(10**9, 10**8, room, batch, parts, Processes(0, processes))

    assert "lower --batch-size to 30, or take --accumulate 3, or add --checkpointing" in told(5e9)
    assert "lower --batch-size to 60, or take --accumulate 4," in told(5e9, 120, 2)
    assert "lower --batch-size to 60" in told(5e9, 120, processes=2)
    assert "lower --batch-size to 32" in told(1e12)  # counted to fit, but it did not
    for room, batch, parts in ((1e9, 64, 1), (1e12, 8, 8), (1e12, 1, 1)):
        assert "not one image fits: lower --image-size or --width, or add --check" in told(room, batch, parts)
    assert "add --checkpointing" not in ddpm.what_fits(10**9, 10**8, 5e9, 64, 1, Processes(), True)


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA"),
        MemoryError(),
        RuntimeError("[..] can't allocate memory: you tried to allocate 1 bytes"),
    ],
)
def test_out_of_memory_says_what_would_fit(cli, monkeypatch, error):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(ddpm, "batch_gradient", fail)
    net, diffusion = UNet(1, 8, (1, 2), 1, (1,)), ddpm.Diffusion(20, "cosine", "v")
    fixed, each = ddpm.memory_of_training(net, diffusion.loss, digits(1), None, nullcontext)
    monkeypatch.setattr(utils, "room", lambda device: (fixed + 5.5 * each) / 0.8)
    line = error_line(cli(*TINY))
    assert "lower --batch-size to 5, or take --accumulate 4, or add --checkpointing" in line
    assert Path("runs/ddpm_digits/ckpt.pt").is_file()


# compiled


def test_a_compiler_that_fails_is_left_out_and_that_is_said_once(cli, monkeypatch):
    calls = []

    def broken(net, **options):
        def forward(*args):
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
    monkeypatch.setattr(torch, "compile", lambda net, **options: lambda *args: calls.append(1) or net(*args))
    result = cli(*TINY, "--compile")
    assert len(calls) == 6 and "the first step took" in result.out + result.err
    cli("--sample", "3", "--compile", "--checkpoint", "runs/ddpm_digits")
    assert len(calls) == 6 + 20


# sampling


@pytest.mark.parametrize("make", [UNet, partial(ConditionalUNet, 3), partial(TextUNet, 5, 4)])
def test_times_are_embedded_once_and_say_the_same(make, monkeypatch):
    torch.manual_seed(0)
    net = make(1, 8, (1, 2), 1, (1,)).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    x, t, keys = torch.randn(4, 1, 8, 8), torch.tensor([1, 7, 20, 50]), set(net.state_dict())
    before = net(x, t)
    net.keep_times(50)
    calls = []
    net.time_mlp.register_forward_hook(lambda *args: calls.append(1))
    assert (net(x, t) - before).abs().max() < 1e-5 and not calls
    assert set(net.state_dict()) == keys
    other = {key: value + 0.1 for key, value in net.state_dict().items()}
    for change in (net.train, partial(net.load_state_dict, other)):  # of other weights they are others
        net.eval().keep_times(50)
        change()
        calls.clear()
        net(x, t)
        assert calls


def test_half_precision_samples_are_close_and_differ(cli):
    cli(*TINY, "--limit", "400", "--epochs", "4")
    for precision in ("fp32", "bf16"):
        run = ("--sample", "8", "--checkpoint", "runs/ddpm_digits", "--sample-steps", "10")
        assert cli(*run, "--precision", precision, "--out", precision).code == 0
    a, b = (
        np.stack([np.asarray(Image.open(f"{p}/{i:05d}.png")) for i in range(8)]).astype(float)
        for p in ("fp32", "bf16")
    )
    assert 0 < np.abs(a - b).mean() < 4  # of 255


def test_one_graph_for_each_shape(monkeypatch):
    """Captured's own part: CUDA's is played by a graph that computes on the CPU what was recorded."""
    net, recorded = unet().eval(), []

    def record(self, *inputs):
        fixed, recorded[:] = [x.clone() for x in inputs], [*recorded, 1]
        out = self.net(*fixed)

        class Graph:
            def replay(self):
                out.copy_(net(*fixed))

        return Graph(), fixed, out

    monkeypatch.setattr(ddpm.Captured, "record", record)
    captured = ddpm.Captured(net)
    with torch.no_grad():
        for i, n in enumerate((4, 4, 2, 4, 2)):
            x, t = torch.randn(n, 1, 8, 8), torch.full((n,), i + 1)
            out = captured(x, t, None)
            assert torch.allclose(out, net(x, t), atol=1e-6)
            captured(torch.zeros_like(x), t)
            assert torch.allclose(out, net(x, t), atol=1e-6)  # the next call left it alone
    assert len(recorded) == 2
    x = torch.randn(2, 1, 8, 8, requires_grad=True)
    assert captured(x, torch.ones(2, dtype=torch.long)).requires_grad and len(recorded) == 2


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
    monkeypatch.setattr(ddpm, "sample_images", lambda *args: calls.append(1))
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


# data sets larger than memory


def test_ahead_gives_the_same_items_and_errors_and_ends_with_its_user():
    assert list(utils.ahead(iter(range(10)))) == list(range(10))

    def broken():
        yield 1
        raise OSError("gone")

    items = utils.ahead(broken())
    assert next(items) == 1
    with pytest.raises(OSError, match="gone"):
        next(items)
    made = []
    items = utils.ahead((made.append(i) or i for i in range(10**9)), depth=2)
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    time.sleep(0.2)
    assert len(made) <= 6  # three used, two waiting, one in hand
    threads = threading.active_count()
    items.close()
    time.sleep(0.5)
    assert threading.active_count() < threads


def test_a_set_that_does_not_fit_gives_the_same_batches():
    images = torch.randint(0, 256, (20, 1, 4, 4), dtype=torch.uint8)
    loader = utils.Loader(images, 6, y=torch.arange(20), flip=True)
    whole = list(loader.epoch(2, start=1))
    loader.resident = False
    for (a, y_a), (b, y_b) in zip(whole, loader.epoch(2, start=1), strict=True):
        assert torch.equal(a, b) and torch.equal(y_a, y_b)


def test_a_large_set_is_shuffled_by_stretches_of_its_file(monkeypatch):
    monkeypatch.setattr(utils, "MAPPED", 10**4)
    loader = utils.Loader(torch.zeros(40_000, 1, 1, 1, dtype=torch.uint8), 64)
    order = loader.shuffled(torch.Generator().manual_seed(0))
    assert torch.equal(order.sort().values, torch.arange(40_000))  # each image once
    assert torch.equal(order, loader.shuffled(torch.Generator().manual_seed(0)))
    assert not torch.equal(order, loader.shuffled(torch.Generator().manual_seed(1)))
    begun = order[: 64 * 256] // 64  # the stretches that are open at first: no more than 256,
    assert len(begun.unique()) == 256 and len(begun[:64].unique()) > 40  # but a batch is of many
    batches = [y for _, y in utils.Loader(loader.images, 64, y=torch.arange(40_000)).epoch(0)]
    assert torch.equal(torch.cat(batches).sort().values, torch.arange(40_000))


def save_array(path, n, size=8, channels=3):
    images = np.random.default_rng(0).integers(0, 256, (n, size, size, channels), np.uint8)
    np.save(path, images)
    return images


@pytest.mark.parametrize("channels", [1, 3])
def test_an_array_file_is_a_data_set(tmp_path, channels):
    images = save_array(tmp_path / "a.npy", 9, channels=channels)
    data = utils.get_data("folder", tmp_path / "a.npy", cache_dir=tmp_path / "cache")
    assert np.array_equal(data.images.numpy(), images.transpose(0, 3, 1, 2)) and data.flip
    assert not (tmp_path / "cache").exists()  # nothing was decoded
    small = utils.get_data("folder", tmp_path / "a.npy", image_size=4, limit=5, cache_dir=tmp_path / "cache")
    assert small.images.shape == (5, channels, 4, 4)


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((3, 8, 8, 3), np.float32),
        np.zeros((3, 8, 8), np.uint8),
        np.zeros((3, 3, 8, 8), np.uint8),
        None,
    ],
)
def test_an_array_file_that_is_none(cli, bad):
    np.save("bad.npy", bad) if bad is not None else Path("bad.npy").write_bytes(b"no array")
    assert "bad.npy is no array of images" in error_line(cli("--dataset", "folder", "--data-root", "bad.npy"))
    assert "can't be read" in error_line(cli("--dataset", "folder", "--data-root", "none.npy"))


def own_memory():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("decoded", [False, True])
def test_memory_does_not_grow_with_the_data_set(tmp_path, monkeypatch, decoded):
    monkeypatch.setattr(utils, "MAPPED", 10**7)
    save_array(tmp_path / "a.npy", 25_000, 32)  # 77 MB
    size = 16 if decoded else 32  # 19 MB
    get = partial(utils.get_data, "folder", tmp_path / "a.npy", image_size=size, cache_dir=tmp_path / "cache")
    if decoded:
        get()
    gc.collect()
    before = own_memory()
    loader = utils.Loader(get().images, 64, flip=True)
    for _ in loader.epoch(0):
        pass
    assert utils.digest(loader.images)
    assert own_memory() - before < 12e6


def test_a_cache_with_unreadable_files_is_mapped_as_well(tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "CHUNK", 4)
    (tmp_path / "in").mkdir()
    for i in range(11):
        Image.new("RGB", (8, 8), (20 * i, 0, 0)).save(tmp_path / f"in/{i:02d}.png")
    for i in (0, 5, 10):
        (tmp_path / f"in/{i:02d}.png").write_bytes(b"broken")
    for _ in range(2):
        data = utils.get_data("folder", tmp_path / "in", image_size=8, cache_dir=tmp_path / "cache")
        assert (data.images[:, 0, 0, 0] / 20).tolist() == [1, 2, 3, 4, 6, 7, 8, 9]
        assert [Path(p).name for p in data.skipped] == ["00.png", "05.png", "10.png"]


def test_a_large_set_is_known_by_part_of_it(monkeypatch):
    class Huge(torch.Tensor):
        def numel(self):
            return 2**31

    x = torch.arange(40, dtype=torch.uint8).view(10, 4)
    whole, part = utils.digest(x), utils.digest(x.as_subclass(Huge))
    assert whole != part and len(part) == 16
    y = x.clone()
    y[0] += 1
    assert utils.digest(y) != whole and utils.digest(y.as_subclass(Huge)) != part


def test_a_large_array_is_known_by_its_file(tmp_path, monkeypatch):
    images = save_array(tmp_path / "a.npy", 9)
    source = utils.DATASETS["folder"](tmp_path / "a.npy", "train")
    monkeypatch.setattr(np, "ascontiguousarray", None)  # it is not read
    before = utils.fingerprint(source)
    assert utils.fingerprint(utils.DATASETS["folder"](tmp_path / "a.npy", "train")) == before
    np.save(tmp_path / "a.npy", images[::-1])
    assert utils.fingerprint(utils.DATASETS["folder"](tmp_path / "a.npy", "train")) != before


def test_a_cache_that_cannot_be_mapped_is_done_without(tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "mapped", lambda *args: None)
    data = utils.get_data("digits", image_size=8, limit=5, cache_dir=tmp_path)
    assert data.images.shape == (5, 1, 8, 8)
