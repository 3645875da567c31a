"""The device, the precision and the compilation of a network, and progress bars."""

import math
import os
import sys
import time
from collections.abc import Callable, Container

import torch
from tqdm import tqdm

from .errors import UserError, first_line, is_out_of_memory, note
from .processes import join_processes
from .settings import setting, settings, whole

PRECISIONS = {"auto": None, "fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@settings(sample=True)
class MachineSettings:
    device: str = setting("auto", "auto, cpu, cuda, cuda:1 or mps", "NAME", resume=True)
    seed: int = setting(0, "seed of all random draws", "N", whole(0, 2**63 - 1))
    precision: str = setting("auto", "%(choices)s", "NAME", choices=PRECISIONS, resume=True)
    compile: bool = setting(False, "torch.compile the network: slower to start, then faster", resume=True)


def get_device(name: str = "auto") -> torch.device:
    """The device of that name, "auto" being the best of cuda, mps and cpu; UserError if it is not there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(kind for kind in available if available[kind]) if name == "auto" else name
    kind, _, index = name.partition(":")
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if kind == "cuda" and available["cuda"] and here > 1:  # of several processes on a machine each has a GPU
        if index:
            raise UserError(f"{here} processes can't share {name}: leave the number out, each takes its own")
        if here > gpus:
            raise UserError(f"{here} processes for {gpus} GPUs: lower --nproc_per_node, or use --device cpu")
        index = os.environ["LOCAL_RANK"]
        name = f"cuda:{index}"
    if kind not in available or (index and not index.isdigit()):
        raise UserError(f"unknown device {name!r}: choose auto, cpu, cuda, cuda:1, ... or mps")
    if not available[kind] or (kind == "cuda" and int(index or 0) >= gpus):
        raise UserError(f"device {name!r} is not available on this machine: use --device auto or cpu")
    if kind == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, where there is such a unit
        torch.backends.cudnn.benchmark = True  # all batches but the last of an epoch have one shape
        if index:
            torch.cuda.set_device(int(index))  # CUDA graphs are recorded on the current device
    return torch.device(name)


def to_device(net: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """The network on its device, with channels last in memory, which convolutions of CPUs and CUDA prefer."""
    order = torch.preserve_format if device.type == "mps" else torch.channels_last
    return net.to(device, memory_format=order)


def half_precision(precision: str, device: torch.device, net: torch.nn.Module) -> torch.dtype | None:
    """The 16-bit type to compute in, or None; "auto" takes one that gains. UserError where there is none."""
    if precision != "auto":
        if (half := PRECISIONS[precision]) and time_convolution(half, device) == math.inf:
            raise UserError(f"{device} can't compute in {precision}: use --precision fp32")
        return half
    if device.type == "cuda":  # tensor cores take float16 from 7.0 on, bfloat16 from 8.0 on
        capability = torch.cuda.get_device_capability(device)
        return torch.bfloat16 if capability >= (8, 0) else torch.float16 if capability >= (7, 0) else None
    widest = max((m.out_channels for m in net.modules() if isinstance(m, torch.nn.Conv2d)), default=0)
    if device.type != "cpu" or widest < 128:
        return None
    single, half = (time_convolution(dtype, device) for dtype in (torch.float32, torch.bfloat16))
    return join_processes(device).broadcast(torch.bfloat16 if half < 0.8 * single else None)


def time_convolution(dtype: torch.dtype, device: torch.device) -> float:
    """Seconds that a convolution and its gradient take; infinite where the device has none in this type."""
    times, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)  # several, which wait for each other, measure what else the machine does
    try:
        layer = torch.nn.Conv2d(128, 128, 3, device=device)
        conv = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)(layer)
        scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        for _ in range(5):
            start = time.perf_counter()
            scaler.scale(conv(torch.ones(4, 128, 16, 16, device=device)).float().mean()).backward()
            times.append(time.perf_counter() - start)
        scaler.unscale_(torch.optim.SGD(layer.parameters()))
    except (RuntimeError, TypeError) as error:  # of a type or an operation that the device does not have
        if is_out_of_memory(error):
            raise
        return math.inf
    finally:
        torch.set_num_threads(threads)
    return min(times)


def compile_forward(net: torch.nn.Module, graphs: bool) -> None:
    """Compile a network in place, with CUDA `graphs` or without; a note where that fails."""
    plain = net.forward
    compiled = torch.compile(plain, mode="reduce-overhead" if graphs else None, dynamic=False)

    def forward(*inputs: torch.Tensor) -> torch.Tensor:
        nonlocal compiled, graphs
        try:
            if graphs:
                torch.compiler.cudagraph_mark_step_begin()  # what the last call returned may be overwritten
            out = compiled(*inputs)
        except Exception as error:  # of the compiler and of the tools it calls: there are many
            if is_out_of_memory(error) or compiled is plain:
                raise
            note(f"--compile failed and is left out: {first_line(error)}")
            compiled, graphs = plain, False
            out = plain(*inputs)
        return out.clone() if graphs and not torch.is_grad_enabled() else out  # a sampler may keep it

    net.forward = forward


def speed_up_sampling(net: torch.nn.Module, machine: MachineSettings, device: torch.device) -> None:
    """Make a trained network sample faster, in place: in 16 bits where that gains, compiled if asked for."""
    if half := half_precision(machine.precision, device, net):
        for module in (m for m in net.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))):
            module.to(half)  # weights once, and not at every step; norms stay in float32
        net.forward = torch.autocast(device.type, half)(net.forward)
    if machine.compile:
        compile_forward(net, graphs=device.type == "cuda")


def progress(what: str, total: float | None = None, unit: str = "image") -> tqdm:
    """A progress bar; without a total it counts."""
    every = 0.2 if sys.stderr.isatty() else 30
    return tqdm(desc=what, total=total, unit=unit, unit_scale=True, mininterval=every, leave=False)


class Watched:
    """f(x, t) of images x (B, C, H, W), times t (B,), its `evaluations` and `kept`, {t: x} of t in `keep`."""

    def __init__(self, f: Callable, T: int, bar: tqdm | None = None, keep: Container[int] = (), total=0):
        self.f, self.T, self.bar, self.keep, self.total = f, T, bar, keep, total
        self.reached, self.evaluations, self.kept = T, 0, {}

    def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        time, self.evaluations = int(t[0]), self.evaluations + 1
        if time in self.keep and time not in self.kept:
            self.kept[time] = x.cpu()
        if self.total:  # evaluations, in each of which the bar, in images, moves on
            self.bar.update(len(x) / self.total)
        elif self.bar is not None and time < self.reached:  # else it follows t, from T to 0
            self.bar.update((self.reached - time) / self.T * len(x))
            self.reached = time
        return self.f(x, t)
