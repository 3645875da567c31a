"""A training run from its settings to its last sample grid."""

import math
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from . import runs
from .errors import UserError, note
from .files import digest, quoted
from .latents import Reconstructions, settle_levels
from .loader import Loader
from .machine import MachineSettings, get_device, to_device
from .processes import join_processes
from .settings import Command
from .trainer import Trainer, TrainingSettings


@dataclass
class Task:
    """What a run trains: a network, its loss over images and y, and how to look at it on the way."""

    kind: str  # of checkpoint
    net: torch.nn.Module
    loss: Callable[..., Tensor]  # loss(net, x_0, y, generator) -> scalar
    preview: Callable[[torch.nn.Module, int, Path], object]  # preview(net, epoch, file to write)
    average: Callable  # average(net, decay): the average of its weights
    images: Tensor  # (N, C, H, W) uint8
    y: Tensor | None = None  # (N, ...) labels, or captions as tokens
    keep: dict = field(default_factory=dict)  # further entries of the checkpoint
    latents: tuple | None = None  # to train on instead: what an autoencoder makes of the images, and that
    tested: Reconstructions | None = None  # what is measured after each epoch, for log.csv
    use: Sequence[object] = ("--sample", 64, "--checkpoint")  # flags that use the run when it is done
    used_by: str | None = None  # the script that they are flags of, if not the one that trains


def default_network(image_size: int, narrow: bool = False, cpu: bool = False) -> dict:
    """Network, batch size and learning rate that suit an image size in pixels (measured: docs/tuning.md)."""
    if image_size <= 16:  # 1.0 M parameters
        return dict(width=16, multipliers=[1, 2, 5], blocks=1, attention=[1, 2], batch_size=16, lr=2e-3)
    if image_size <= 32 and narrow:  # digits and the like need less width at full resolution; 2.7 M
        if image_size % 8:  # too few halvings for four levels: 1.3 M
            return dict(width=16, multipliers=[1, 2, 6], blocks=1, attention=[2], batch_size=32, lr=2e-3)
        return dict(width=16, multipliers=[1, 2, 4, 8], blocks=1, attention=[2, 3], batch_size=32, lr=2e-3)
    if image_size <= 64 and cpu and image_size % 8 == 0:  # 2.8 M: 80 epochs of cars in under 3 hours
        network = dict(patch=2, width=32, multipliers=[1, 2, 4], blocks=1, attention=[1, 2])
        return network | dict(batch_size=16, lr=1e-3)
    if image_size <= 32:  # 4.0 M
        return dict(width=32, multipliers=[1, 2, 4], blocks=2, attention=[1, 2], batch_size=64, lr=1e-3)
    if image_size <= 64:  # 16 M
        return dict(width=48, multipliers=[1, 2, 4, 6], blocks=1, attention=[2, 3], batch_size=64, lr=5e-4)
    levels = max(5, round(math.log2(image_size / 8)) + 1)  # the lowest has about 8 pixels
    multipliers, attention = [1] * (levels - 4) + [2, 2, 3, 4], [levels - 2, levels - 1]
    return dict(width=64, multipliers=multipliers, blocks=2, attention=attention, batch_size=32, lr=1e-4)


def at_once(config: dict) -> int:
    """The number of images that a process trains on together, and so draws together in its previews."""
    return max(1, config["batch_size"] // (config["accumulate"] * int(os.environ.get("WORLD_SIZE", 1))))


def load_data(command: Command, get_data: Callable, narrow: bool):
    """The data set, after which the settings that depend on it are settled; UserError if they do not fit."""
    names = ("dataset", "data_root", "image_size", "channels", "limit", "workers", "cache_dir")
    options, multipliers = {name: command[name] for name in names}, command["multipliers"]
    data = None if options["image_size"] else get_data(**options)
    size = options["image_size"] or data.images.shape[-1]
    if command["task"] == "autoencoder":
        factor, defaults = 1, dict(width=16, multipliers=[1, 3, 6, 8][: settle_levels(command)], blocks=1)
        defaults |= dict(attention=[], batch_size=8 if size > 32 else 32, lr=2e-3)
    else:
        factor = command["downsampling"] if command["latent"] else 1
        cpu = get_device(command["device"]).type == "cpu" and factor == 1  # latents are small already
        defaults = default_network(size // factor, narrow, cpu)
        if command["attention"] is None and multipliers:
            command.settle({"attention": [len(multipliers) - 1] if len(multipliers) > 1 else []}, typed=True)
    defaults = defaults | {"patch": 1} if multipliers else {"patch": 1} | defaults  # none in one's own levels
    command.settle({name: value for name, value in defaults.items() if command[name] is None}, typed=True)
    levels = len(command["multipliers"])
    divisor = command["patch"] * 2 ** (levels - 1) * factor
    if size % divisor:
        near = " or ".join(str(n) for n in (size // divisor * divisor, (size // divisor + 1) * divisor) if n)
        needed = f"not divisible by {divisor}, as {levels} levels need it"
        needed += f" on patches of {command['patch']} pixels" * (command["patch"] > 1)
        needed += f" on latents, {factor} times smaller" * (factor > 1)
        raise UserError(f"--image-size {size} is {needed}: try {near}")
    data = data or get_data(**options)
    epochs, flip = command["epochs"] or 80, data.flip if command["flip"] is None else command["flip"]
    known = {"image_size": size, "channels": data.images.shape[1], "epochs": epochs, "flip": flip}
    known["preview_every"] = command["preview_every"] or max(1, epochs // 4)
    command.settle(known, typed=True)
    if command["batch_size"] > len(data.images):
        note(f"the data set, {len(data.images)} images, is smaller than --batch-size: it is the batch")
    return data


def run_training(command: Command, get_data, narrow: set[str], tasks: dict, train, kinds) -> None:
    """Train as the settings say, in a new run folder, or go on with --resume's, of one of the `kinds`."""
    machine, training, place = command[MachineSettings], command[TrainingSettings], command[runs.RunSettings]
    device = get_device(machine.device)
    processes = join_processes(device)
    resume = runs.load_checkpoint(place.resume, *kinds) if place.resume else None
    if resume:
        command.take_from(resume["config"])
        command.check()
    dataset = command["dataset"]
    with processes.in_turns() if processes.count > 1 else nullcontext():
        data = load_data(command, get_data, dataset in narrow)  # these data sets take a narrow network
        torch.manual_seed(machine.seed)
        task: Task = tasks[command["task"]](command, data, device)
    count, parts, batch = processes.count, training.accumulate, min(training.batch_size, len(task.images))
    if count > batch:
        raise UserError(f"{count} processes for a batch of {batch} images: lower --nproc_per_node")
    if parts > batch // count:
        each = f" for each of {count} processes" if count > 1 else ""
        raise UserError(f"--accumulate {parts} parts of {batch // count} images{each}: ask for fewer")
    config, net = command.config(), to_device(task.net, device)
    known = digest(task.images) + ("" if task.y is None else digest(task.y))
    keep = {"config": config, "class_names": data.class_names, "data": known, **task.keep}
    images, part = task.latents or (task.images, None)
    loader = Loader(images, training.batch_size, device, task.y, command["flip"], machine.seed, processes)
    if part:
        keep["autoencoder"], loader.scale = part, part["scale"]
    wanted = Path(place.runs) / (place.name or f"{task.kind}_{dataset}")
    if resume:
        wanted = runs.checkpoint_file(place.resume).parent
        runs.check_resumable(place.resume, resume, keep, training.epochs, loader.batches)
    several = f", {count} processes" if count > 1 else ""
    print(f"data     {dataset}, {len(data.images)} images of {' x '.join(map(str, data.images.shape[1:]))}")
    print(f"network  {sum(p.numel() for p in net.parameters()) / 1e6:.2f} M parameters, on {device}{several}")
    with runs.open_run(wanted, resume is not None, config, processes) as run:
        print(f"results  in {run}/")
        trainer = Trainer(net, task.average, loader, run, training, machine, task.preview)
        trainer.keep, trainer.tested = {"kind": task.kind, **keep}, task.tested
        trainer.columns += task.tested.columns if task.tested else ()
        if resume:
            trainer.resume(resume)
        train(task.loss, trainer)  # the loop
    if processes.rank > 0:
        return
    last_grid = run / "samples" / f"epoch_{training.epochs:04d}.png"
    if not last_grid.is_file() and trainer.steps < trainer.first_step:  # it was killed after its last step
        trainer.draw_preview(training.epochs)
    for name, path in (("samples", last_grid), ("log", run / "log.csv"), ("checkpoint", run / "ckpt.pt")):
        if path.is_file():
            print(f"{name:10s}  {quoted(path)}")
    print(f"use it with\n  {runs.command_line(*task.use, run, script=task.used_by)}")
