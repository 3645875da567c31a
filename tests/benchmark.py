"""How fast is it? Tables of training and sampling, as shares of what the machine can do, and of a yardstick.

python tests/benchmark.py                        all tables, on a CPU about a quarter of an hour
python tests/benchmark.py --sizes 16 --seconds 1 --no-compile
python tests/benchmark.py --scale                a data set of 10,000 images and one of 1,000,000 (12 GB)

Compare ratios, not times: the matrix rate (a large product of two matrices in the same precision) and the
yardstick, a plain UNet of 27 M parameters, are measured in the same run.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ddpm import Diffusion
from ddpm_conditional import cfg
from modules import EMA, ConditionalUNet, UNet
from support import machine
from support.errors import run_main
from support.images import to_x_0
from support.launch import default_network
from support.loader import Loader
from support.machine import MachineSettings, to_device
from support.trainer import CHECK_EVERY
from utils import get_data

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
PRECISIONS |= {"fp16": torch.float16} if torch.cuda.is_available() else {}
YARDSTICK = dict(width=64, multipliers=[1, 2, 4, 4], blocks=2, attention=[2, 3])  # at 64x64, batch 12
GROWTH = 4  # from one batch to the next
SPIN = {"GOMP_SPINCOUNT": "100000", "KMP_BLOCKTIME": "1"}  # as support/environment.py has them
PARTS = ("data", "forward", "backward", "optimizer", "EMA", "logging")


def defaults(size: int) -> dict:
    """A GPU's default network and training for that image size, as for MNIST at 28, photographs at 32."""
    return default_network(size, narrow=size == 28)


def channels_of(size: int) -> int:
    return 1 if size in (16, 28) else 3


def make_unet(size: int, network: dict | None = None) -> UNet:
    network = network or {key: defaults(size)[key] for key in YARDSTICK}
    return UNet(channels_of(size), **network)


def wait(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP a second of a large matrix product, the best of several."""
    n = 3072 if device.type == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best = math.inf
    for _ in range(8):
        wait(device)
        start = time.perf_counter()
        a @ b
        wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


class Training:
    """Training a network step by step, as support.trainer.Trainer does it, each part timed."""

    def __init__(
        self, size: int, batch: int, device: torch.device, precision: str, compile: bool = False, network=None
    ):
        torch.manual_seed(0)
        self.net, self.diffusion, self.device = (
            to_device(make_unet(size, network), device),
            Diffusion(),
            device,
        )
        self.optimizer = torch.optim.AdamW(self.net.parameters(), fused=device.type != "mps")
        self.ema, shape = EMA(self.net), (max(4 * batch, 64), channels_of(size), size, size)
        images = torch.randint(0, 256, shape, dtype=torch.uint8)
        self.loader, self.batches = Loader(images, batch, device, flip=True), iter(())
        self.generator, self.pending = torch.Generator(device).manual_seed(0), []
        with FlopCounterMode(display=False) as counter:
            self.diffusion.loss(self.net, self.batch()).backward()
        self.flops = counter.get_total_flops()  # of a step, as PyTorch counts them
        if compile:
            machine.compile_forward(self.net, graphs=device.type == "cuda")
        if precision != "fp32":
            self.net.forward = torch.autocast(device.type, PRECISIONS[precision])(self.net.forward)

    def batch(self) -> torch.Tensor:
        x_0 = next(self.batches, (None,))[0]
        if x_0 is None:
            self.batches = self.loader.epoch(0)
            x_0, _ = next(self.batches)
        return x_0

    def step(self, wait: Callable = lambda device: None) -> dict[str, float]:
        """One step; the seconds of its parts, if `wait` waits for the device."""
        marks = [time.perf_counter()]

        def mark() -> None:
            wait(self.device)
            marks.append(time.perf_counter())

        x_0 = self.batch()
        mark()
        loss = self.diffusion.loss(self.net, x_0, None, self.generator)
        mark()
        self.optimizer.zero_grad()
        loss.backward()
        mark()
        norm = torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        mark()
        self.ema.update(self.net, 0)
        mark()
        self.pending.append(torch.stack([loss.detach().float(), norm.detach().float()]))
        if len(self.pending) >= CHECK_EVERY:
            torch.stack(self.pending).tolist()
            self.pending.clear()
        mark()
        return dict(zip(PARTS, (b - a for a, b in pairwise(marks)), strict=True))


def sampling(size: int, batch: int, device: torch.device, precision: str, compile: bool) -> Callable:
    """One evaluation of the default network as --sample makes it."""
    net = to_device(make_unet(size), device).eval()
    machine.speed_up_sampling(net, MachineSettings(precision=precision, compile=compile), device)
    x_t = torch.randn(batch, channels_of(size), size, size, device=device)
    t = torch.full((batch,), 500, device=device)

    def evaluation() -> None:
        with torch.no_grad():
            net(x_t, t)

    return evaluation


def seconds_each(f: Callable, device: torch.device, seconds: float) -> float:
    """What one call takes, timed over at least so many seconds after two to warm up."""
    for _ in range(2):
        f()
    wait(device)
    calls, start = 0, time.perf_counter()
    while True:
        for _ in range(max(1, calls)):
            f()
            calls += 1
        wait(device)
        if time.perf_counter() - start > seconds:
            return (time.perf_counter() - start) / calls


def memory_of_training(net: torch.nn.Module, loss_fn: Callable, images: torch.Tensor) -> tuple[int, int]:
    """The bytes that training takes for any batch, and for these images (B, C, H, W) uint8 of a batch.

    Counted are the weights, their gradients, AdamW's two moments and the average; and what the forward pass
    saves for the backward pass.
    """
    weights = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in net.parameters()}

    def saved(times: int) -> int:
        found: dict[int, int] = {}  # by address: a tensor may be saved twice

        def save(x: torch.Tensor) -> torch.Tensor:
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        x_0, generator = to_x_0(images).repeat(times, 1, 1, 1), torch.Generator().manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
            loss = loss_fn(net, x_0, None, generator)
        del loss
        return sum(size for address, size in found.items() if address not in weights)

    once, twice = saved(1), saved(2)
    return 5 * sum(weights.values()) + max(0, 2 * once - twice), twice - once


def counted(size: int, batch: int, precision: str) -> int:
    """The bytes that training the default network takes with such a batch."""
    net = make_unet(size)
    if precision != "fp32":
        net.forward = torch.autocast("cpu", torch.bfloat16)(net.forward)
    image = torch.zeros(1, channels_of(size), size, size, dtype=torch.uint8)
    fixed, each = memory_of_training(net, Diffusion().loss, image)
    return fixed + batch * each


def measured(
    size: int, batch: int, precision: str, compile: bool, device: torch.device, seconds: float, rates: dict
) -> dict:
    """A row of the table: training and sampling of the default network for a size."""
    cuda, training = device.type == "cuda", Training(size, batch, device, precision, compile)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    took = seconds_each(training.step, device, seconds)
    memory = torch.cuda.max_memory_allocated() if cuda else counted(size, batch, precision)
    flops, parameters = training.flops, sum(p.numel() for p in training.net.parameters())
    del training
    row = {
        "size": size,
        "parameters (M)": round(parameters / 1e6, 2),
        "batch": batch,
        "precision": precision,
        "compiled": "yes" if compile else "no",
        "trains (img/s)": batch / took,
        "memory (MB)": memory / 1e6,  # measured on a GPU, else counted
        "GFLOP a step": flops / 1e9,
        "of its matrix rate": flops / took / rates[precision],
        "of the fp32 rate": flops / took / rates["fp32"],
    }
    evaluation = seconds_each(sampling(size, batch, device, precision, compile), device, seconds / 2)
    return row | {"samples (img/s)": batch / evaluation / 50}


def free_memory(device: torch.device) -> float:
    """The free bytes of a GPU, or all bytes of the CPU's memory; 8 GB where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    known = device.type == "cpu" and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {})
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else 8e9


def default_precision(size: int, device: torch.device) -> str:
    half = machine.half_precision("auto", device, make_unet(size))
    return next(name for name, dtype in PRECISIONS.items() if dtype == (half or torch.float32))


def speed(
    sizes: list[int],
    seconds: float,
    longest: float,
    compile: bool,
    device: torch.device,
    rates: dict,
    quiet: bool,
) -> list[dict]:
    """The last table: every size, batches up to the largest, both precisions, compiled or not."""
    rows = []
    for size in sizes:
        batch = 1
        while counted(size, batch, "fp32") < 0.8 * free_memory(device):
            for precision in PRECISIONS:
                rows.append(measured(size, batch, precision, False, device, seconds, rates))
                show(rows[-1:], header=len(rows) == 1, quiet=quiet)
            if batch / rows[-1]["trains (img/s)"] > longest:
                break  # a step takes too long to go on
            batch *= GROWTH
        if compile:
            batch, precision = 16 if device.type == "cpu" else 64, default_precision(size, device)
            rows.append(measured(size, batch, precision, True, device, seconds, rates))
            show(rows[-1:], header=False, quiet=quiet)
    return rows


def yardstick(device: torch.device, rates: dict, repeats: int) -> dict:
    """A step of a GPU's default network at 64x64 with all that is on by default, and one of the yardstick.

    The yardstick computes in bf16 everywhere, so on a CPU that has no bf16 the ratio says little.
    """
    ours = Training(64, 12, device, default_precision(64, device))
    plain = Training(64, 12, device, "bf16", network=YARDSTICK)
    took = {ours: [], plain: []}
    for repeat in range(repeats + 1):
        for training, times in took.items():
            wait(device)
            start = time.perf_counter()
            training.step()
            wait(device)
            times += [time.perf_counter() - start] if repeat else []
    ratios = [a / b for a, b in zip(took[ours], took[plain], strict=True)]
    return {
        "default (ms)": 1000 * statistics.median(took[ours]),
        "yardstick (ms)": 1000 * statistics.median(took[plain]),
        "default / yardstick": statistics.median(ratios),
        "default (GFLOP)": ours.flops / 1e9,
        "yardstick (GFLOP)": plain.flops / 1e9,
        "default, of the fp32 rate": ours.flops / statistics.median(took[ours]) / rates["fp32"],
        "default, of the bf16 rate": ours.flops / statistics.median(took[ours]) / rates["bf16"],
    }


def breakdown(size: int, device: torch.device) -> dict:
    """Where the time of a step goes, in %, at the default precision and batch, on a CPU at most 16."""
    batch = defaults(size)["batch_size"]
    batch = min(batch, 16) if device.type == "cpu" else batch
    training = Training(size, batch, device, default_precision(size, device))
    for _ in range(3):
        training.step()
    steps = [training.step(wait) for _ in range(25 if device.type != "cpu" or size <= 32 else 5)]
    means = {part: statistics.mean(step[part] for step in steps) for part in PARTS}
    shares = {f"{part} (%)": 100 * mean / sum(means.values()) for part, mean in means.items()}
    return {"size": size, "batch": batch} | shares


def ratio(name: str, slow: Callable, fast: Callable, repeats: int, device: torch.device) -> dict:
    """Run both in turn; the median of slow / fast."""
    seconds: dict[Callable, list[float]] = {slow: [], fast: []}
    for repeat in range(repeats + 1):
        for f in (slow, fast):
            start = time.perf_counter()
            f()
            wait(device)
            if repeat:  # the first is a warm-up
                seconds[f].append(time.perf_counter() - start)
    of = statistics.median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))
    return {"one way -> another": name, "ratio": of}


def guidance(size: int, batch: int, device: torch.device) -> tuple[Callable, Callable]:
    """One evaluation of classifier-free guidance, both halves in one batch, and one unconditional one."""
    torch.manual_seed(0)
    network = {key: defaults(size)[key] for key in YARDSTICK}
    net = to_device(ConditionalUNet(10, 3, **network), device).eval()
    diffusion, x_t = Diffusion(), torch.randn(batch, 3, size, size, device=device)
    t, y = torch.full((batch,), 500, device=device), torch.arange(batch, device=device) % 10
    guided, plain = cfg(diffusion, net, y, 3.0), diffusion.denoiser(net)

    def run(eps_theta: Callable) -> None:
        with torch.no_grad():
            eps_theta(x_t, t)

    return partial(run, guided), partial(run, plain)


def loading(folder: Path, device: torch.device) -> tuple[Callable, Callable]:
    """An epoch over image files: decoded by a DataLoader's workers, or sliced from the one array."""
    for i in range(600):
        (folder / "class").mkdir(exist_ok=True)
        noise = torch.randint(0, 256, (12, 16, 3), dtype=torch.uint8).numpy()
        Image.fromarray(noise).resize((160, 120)).save(folder / "class" / f"{i}.jpg")
    t = torchvision.transforms
    steps = [t.Resize(64), t.CenterCrop(64), t.RandomHorizontalFlip(), t.ToTensor(), t.Normalize(0.5, 0.5)]
    images = torchvision.datasets.ImageFolder(str(folder), t.Compose(steps))
    usual = torch.utils.data.DataLoader(images, 64, shuffle=True, num_workers=2)
    ours = Loader(get_data("folder", folder, cache_dir=folder / "cache").images, 64, device, flip=True)

    def epoch_usual() -> None:
        for x_0, _ in usual:
            x_0.to(device)

    def epoch_ours() -> None:
        for _ in ours.epoch(0):
            pass

    return epoch_usual, epoch_ours


def alternatives(device: torch.device) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        name = "an epoch of 600 image files: a DataLoader that decodes -> batches of one array"
        rows = [ratio(name, *loading(Path(folder), device), 3, device)]
    for size, batch in ((16, 32), (64, 4)):
        guided = guidance(size, batch, device)
        rows.append(
            ratio(f"a step of guidance at {size}x{size} -> an unconditional one", *guided, 15, device)
        )
    return rows


TRAINS = """
import sys, time
import benchmark, torch
size, seconds = int(sys.argv[1]), float(sys.argv[2])
batch = benchmark.defaults(size)["batch_size"]
step = benchmark.Training(size, batch, torch.device("cpu"), "fp32").step
print(batch / benchmark.seconds_each(step, torch.device("cpu"), seconds))
"""


def busy(size: int, seconds: float, repeats: int = 5) -> dict:
    """Training on the CPU alone, and beside a program that computes on every core: two settings of OpenMP.

    Its own setting lets idle threads spin for long; that of support/environment.py bounds it. Medians: in
    company the system's scheduler decides much, and single runs differ by several times.
    """
    here = Path(__file__).resolve().parent
    clean = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", *SPIN)}
    rates: dict[str, list[float]] = {}
    command = [sys.executable, "-c", TRAINS, str(size), str(seconds)]
    for company, name in [
        (c, n) for _ in range(repeats) for c in ("alone", "in company") for n in ("own", "bounded")
    ]:
        count = (os.cpu_count() or 1) if company == "in company" else 0
        loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
        try:
            env = clean | (SPIN if name == "bounded" else {})
            run = subprocess.run(command, env=env, cwd=here, capture_output=True, text=True)
            rates.setdefault(f"{name}, {company}", []).append(float(run.stdout))
        finally:
            for loop in loops:
                loop.kill()
    found = {what: statistics.median(rate) for what, rate in rates.items()}
    row = {"size": size} | {f"{what} (img/s)": rate for what, rate in found.items()}
    for company in ("alone", "in company"):
        row[f"bounded / own, {company}"] = found[f"bounded, {company}"] / found[f"own, {company}"]
    return row


def scale(counts: list[int], device: torch.device, folder: str | None) -> list[dict]:
    """Images a second and memory of reading batches of 64 from a generated file of so many 64x64 images."""
    rows = []
    for n in counts:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            path, noise = Path(place) / "images.npy", np.random.default_rng(0)
            images = np.lib.format.open_memmap(path, "w+", np.uint8, (n, 64, 64, 3))
            for start in range(0, n, 10000):
                images[start : start + 10000] = noise.integers(
                    0, 256, images[start : start + 10000].shape, np.uint8
                )
            images.flush()
            del images
            data = get_data("folder", path)
            before = own_memory()
            loader = Loader(data.images, 64, device, flip=True)
            done, start = 0, time.perf_counter()
            for x_0, _ in loader.epoch(0):
                done += len(x_0)
                if time.perf_counter() - start > 20:
                    break
            wait(device)
            took = time.perf_counter() - start
            rows.append({"images": n, "file (GB)": path.stat().st_size / 1e9, "reads (img/s)": done / took})
            rows[-1]["memory of the process, more than before (MB)"] = (own_memory() - before) / 1e6
            del data, loader, x_0
    return rows


def own_memory() -> float:
    """What the process holds that is no file's, in bytes: pages of a mapped file may be dropped at any time.

    nan where the system has no /proc, which Linux has.
    """
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), math.nan)


def show(rows: list[dict], header: bool = True, quiet: bool = False) -> None:
    """Rows as a table in Markdown."""
    if quiet or not rows:
        return

    def text(value: object) -> str:
        if not isinstance(value, float):
            return str(value)
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"

    if header:
        print("\n| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(text(value) for value in row.values()) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 28, 32, 64, 128])
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument(
        "--longest", type=float, default=2.0, help="seconds of a step, to go on to larger batches"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave out the compiled networks")
    parser.add_argument("--scale", action="store_true", help="only the large data sets of --counts")
    parser.add_argument("--counts", type=int, nargs="+", default=[10_000, 1_000_000], help="--scale: images")
    parser.add_argument(
        "--folder", help="--scale: where the file is made (default: where temporary files go)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    args = parser.parse_args()
    device = machine.get_device(args.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} cores"
    found: dict = {
        "device": f"{device} ({name})",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    if args.scale:
        found["scale"] = scale(args.counts, device, args.folder)
        show(found["scale"], quiet=args.json)
    else:
        rates = {name: matrix_rate(dtype, device) for name, dtype in PRECISIONS.items()}
        found["matrix rate (GFLOP/s)"] = {name: rate / 1e9 for name, rate in rates.items()}
        show([found | found.pop("matrix rate (GFLOP/s)")], quiet=args.json)
        found["matrix rate (GFLOP/s)"] = {name: rate / 1e9 for name, rate in rates.items()}
        found["yardstick"] = yardstick(device, rates, 5)
        show([found["yardstick"]], quiet=args.json)
        found["breakdown"] = [breakdown(size, device) for size in args.sizes]
        show(found["breakdown"], quiet=args.json)
        found["alternatives"] = alternatives(device)
        show(found["alternatives"], quiet=args.json)
        if device.type == "cpu":
            found["busy"] = [busy(28, 4 * args.seconds)]
            show(found["busy"], quiet=args.json)
        how = (args.sizes, args.seconds, args.longest, not args.no_compile)
        found["speed"] = speed(*how, device, rates, args.json)
    if args.json:
        print(json.dumps(found, indent=2))


if __name__ == "__main__":
    run_main(main)
