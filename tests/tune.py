"""Which settings reach the lowest Frechet distance in a given time? What the defaults were chosen by.

python tests/tune.py --classifier runs/classifier_digits --minutes 2 --arm "" --arm "--width 24 --lr 1e-3"

An arm is what would be typed after `python ddpm.py`: "" is the defaults. Each is trained from scratch for as
many steps as fit in the time, judged as `analysis.py evaluate` judges, and adds a line to --out. With
--photos in place of --classifier the judge is that of tests/judge_photos.py. A step is timed in turn with one
of the defaults: with --reference MS, what that takes on a machine with nothing else to do, arms are given the
steps of such a machine, and several may run side by side. --grids DIR keeps 36 samples of each arm.
"""

import argparse
import csv
import math
import re
import shlex
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import support.environment  # isort: skip  # noqa: F401 (before torch)
import judge_photos
import torch

import analysis
import ddpm
import utils
from ddpm import SamplerSettings
from modules import EMA, make_network
from support.errors import UserError, run_main
from support.images import to_uint8
from support.launch import load_data
from support.loader import Loader
from support.machine import MachineSettings, get_device, half_precision, to_device
from support.measures import frechet_distance, quality
from support.pictures import make_grid, save_picture
from support.settings import Command, Parser, add_settings
from support.trainer import CHECK_EVERY, Trainer, TrainingSettings


@dataclass
class Arm:
    """The settings that `python ddpm.py FLAGS` would run with, and its images (N, C, H, W) uint8."""

    command: Command
    images: torch.Tensor
    device: torch.device

    def make(self) -> tuple[torch.nn.Module, ddpm.Diffusion]:
        torch.manual_seed(self.command["seed"])
        config = self.command.config()
        return to_device(make_network(config), self.device), ddpm.make_diffusion(config)

    def loader(self) -> Loader:
        batch_size, flip, seed = (self.command[name] for name in ("batch_size", "flip", "seed"))
        return Loader(self.images, batch_size, self.device, None, flip, seed)


def make_arm(flags: str, shared: list[str]) -> Arm:
    parser = Parser(argument_default=argparse.SUPPRESS, allow_abbrev=False)
    add_settings(parser, ddpm.GROUPS)
    command = Command(vars(parser.parse_args([*shared, *shlex.split(flags)])), ddpm.GROUPS.values())
    dataset = command["dataset"]
    command.settle(utils.DEFAULTS.get(dataset, {}))
    data = load_data(command, utils.get_data, dataset in utils.NARROW)
    return Arm(command, data.images, get_device(command["device"]))


def stepper(arm: Arm):
    """A function that takes one training step, and waits for it."""
    net, diffusion = arm.make()
    optimizer, ema = torch.optim.AdamW(net.parameters(), fused=arm.device.type != "mps"), EMA(net)
    x_0, _ = next(arm.loader().epoch(0))
    if half := half_precision(arm.command["precision"], arm.device, net):
        net.forward = torch.autocast(arm.device.type, half)(net.forward)

    def step() -> float:
        start = time.perf_counter()
        loss = diffusion.loss(net, x_0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        ema.update(net, 0)
        loss.item()
        return time.perf_counter() - start

    return step


def seconds_a_step(arm: Arm, reference: Arm, known: float | None) -> float:
    """Of an arm: its own, or that of the reference's known step times the ratio of the two."""
    step, other = stepper(arm), stepper(reference)
    times = [(step(), other()) for _ in range(3 + (30 if arm.images.shape[-1] <= 32 else 6))][3:]
    if known is None:
        return statistics.median(a for a, _ in times)
    return known / 1000 * statistics.median(a / b for a, b in times)


def trained(arm: Arm, steps: int | None = None, seconds: float = math.inf) -> tuple[Trainer, ddpm.Diffusion]:
    """The trainer, with the averaged network, after so many steps or seconds, and the diffusion process."""
    (net, diffusion), settings = arm.make(), arm.command[TrainingSettings]
    settings.epochs, passes = 1, map(arm.loader().epoch, count())
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(net, EMA, arm.loader(), Path(folder), settings, arm.command[MachineSettings])
        trainer.loader.batches = steps or 10_000  # one long epoch, over which the learning rate falls to 0
        start = time.monotonic()
        for batch, _ in islice(chain.from_iterable(passes), steps):
            passed = time.monotonic() - start
            if passed >= seconds:
                break
            if trainer.steps >= 20 and steps is None:  # by now it is known how many steps there will be
                will_be = round(trainer.steps * seconds / passed)
                trainer.loader.batches = max(trainer.steps + 1, will_be)
            for x_0, y, generator in trainer.parts_of(batch, None, len(batch)):
                trainer.step(diffusion.loss(trainer.net, x_0, y, generator))
            if len(trainer.pending) >= CHECK_EVERY:  # thousands of them would scatter the memory
                trainer.check_losses()
        if trainer.pending:
            trainer.check_losses()
    return trainer, diffusion


def drawn(net, diffusion, arm: Arm, sampling: SamplerSettings, n: int) -> torch.Tensor:
    """n samples (n, C, H, W) in [-1, 1]."""
    shape, eps_theta = arm.images.shape[1:], diffusion.denoiser(net)
    parts = torch.arange(n).split(50)
    x = [ddpm.sample(diffusion, eps_theta, p.tolist(), shape, sampling, 0, arm.device).cpu() for p in parts]
    return torch.cat(x).clamp(-1, 1)


def judge_by_classifier(path: str, plain: Arm, n: int):
    """A function of samples: their quality beside real images, and the share that is surely a class."""
    classifier, _, _ = ddpm.load_network(path, plain.device, ("classifier",))
    evaluator = analysis.Evaluator(classifier, plain.device, classifier.head.in_features)
    first, second = analysis.real_halves(plain, evaluator, n, 0)
    real, others = (evaluator.features(plain.images[half]) for half in (first, second[:n]))

    def judge(x: torch.Tensor) -> dict:
        sure = (evaluator.p(x).max(1).values > 0.95).double().mean().item()
        return quality(evaluator.features(x), real) | {"sure": sure, "floor": frechet_distance(others, real)}

    return judge


def judge_of_photos(plain: Arm, n: int, cache: str):
    """A function of samples: their distances from all real images, to a network trained on ImageNet."""
    judge = judge_photos.Judge()
    real = judge.real(plain.images, cache)
    axes = judge_photos.principal_axes(real)
    floor = judge_photos.floor(real, axes, n)["frechet"]
    return lambda x: judge_photos.distances(judge.features(to_bytes(x)), real, axes) | {"floor": floor}


def to_bytes(x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(to_uint8(x)).permute(0, 3, 1, 2)  # (N, H, W, C) -> (N, C, H, W)


def add_row(path: Path, row: dict) -> None:
    new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--arm", action="append", required=True, metavar="FLAGS")
    judges = parser.add_mutually_exclusive_group(required=True)
    judges.add_argument("--classifier", metavar="RUN")
    judges.add_argument("--photos", action="store_true")
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--reference", type=float, metavar="MS")
    parser.add_argument("--reference-arm", default="", metavar="FLAGS")
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--data-root", default="data")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--sampler", default="dpm_solver")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", default="tune.csv")
    parser.add_argument("--grids", metavar="DIR")
    base = parser.parse_args()
    out = Path(base.out)
    if out.is_file() and ("kid" in out.read_text().splitlines()[0].split(",")) != base.photos:
        raise UserError(f"{out} is a table of the other judge: name another with --out")
    shared = ["--dataset", base.dataset, "--data-root", base.data_root]
    shared += ["--limit", str(base.limit)] if base.limit else []
    shared += ["--image-size", str(base.image_size)] if base.image_size else []
    shared += ["--channels", "3"] if base.photos else []
    plain, sampling = make_arm(base.reference_arm, shared), SamplerSettings(base.sampler, base.steps)
    n = min(base.samples, len(plain.images) // 2)
    if base.photos:
        judge = judge_of_photos(plain, n, plain.command["cache_dir"])
    else:
        judge = judge_by_classifier(base.classifier, plain, n)
    for flags in base.arm:
        arm = make_arm(flags, shared)
        seconds = seconds_a_step(arm, plain, base.reference)
        steps = max(1, round(60 * base.minutes / seconds))
        for seed in range(base.seeds):
            arm.command[MachineSettings].seed = seed
            trainer, diffusion = trained(arm, steps)
            net = trainer.ema.net
            row = {"arm": flags or "the defaults", "dataset": base.dataset, "minutes": base.minutes}
            row |= {"parameters": sum(p.numel() for p in net.parameters()), "seed": seed}
            row |= {"ms a step": round(1000 * seconds, 2), "steps": steps}
            row |= {"images": steps * arm.command["batch_size"]}
            x = drawn(net, diffusion, arm, sampling, n)
            row |= {key: round(value, 4) for key, value in judge(x).items()}
            add_row(out, row)
            if base.grids:
                name = re.sub(r"[^a-z0-9.]+", "_", f"{flags} {base.minutes:g} {seed}".lower()).strip("_")
                caption = f"{flags or 'the defaults'}: Frechet {row['frechet']:.1f}"
                save_picture(make_grid(x[:36], caption, 6), Path(base.grids) / f"{name}.png")
            print(row, flush=True)


if __name__ == "__main__":
    run_main(main)
