"""Which settings reach the lowest Frechet distance in a given time? What the defaults were chosen by.

python tests/tune.py --classifier runs/classifier_digits --minutes 2 --arm "" --arm "--width 24 --lr 1e-3"

An arm is what would be typed after `python ddpm.py`: "" is the defaults. Each is trained from scratch for as
many steps as fit in the time, judged as `analysis.py evaluate` judges, and adds a line to --out. A step is
timed in turn with one of the defaults: with --reference MS, what that takes on a machine with nothing else to
do, arms are given the steps of such a machine, and several may run side by side.
"""

import argparse
import csv
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import analysis
import ddpm
import utils
from modules import EMA


class Budget(utils.Loader):
    """A loader of one long epoch: so many batches, of as many passes over the data as that takes."""

    def __init__(self, *options, steps: int):
        super().__init__(*options)
        self.steps = steps

    def __len__(self):
        return self.steps

    def size(self, i):
        return super().size(i % super().__len__())

    def epoch(self, epoch, start=0):
        done, whole = 0, super().__len__()
        while done < self.steps:
            for batch in self.one_pass(done // whole):
                if done < self.steps:
                    done += 1
                    yield batch

    def one_pass(self, number):
        of_one = utils.Loader(self.images, self.batch_size, self.device, self.y, self.flip, self.seed)
        return of_one.epoch(number)


def settings(flags: str, base: argparse.Namespace) -> argparse.Namespace:
    """What `python ddpm.py --dataset ... flags` would run with."""
    typed = ["--dataset", base.dataset, "--data-root", base.data_root, *shlex.split(flags)]
    typed += ["--limit", str(base.limit)] if base.limit else []
    typed += ["--image-size", str(base.image_size)] if base.image_size else []
    args = ddpm.make_parser().parse_args(typed)
    ddpm.fill_data_set_defaults(args)
    data = utils.get_data(args.dataset, args.data_root, "train", args.image_size, None, args.limit)
    args.image_size = data.images.shape[-1]
    ddpm.fill_network_defaults(args)
    ddpm.fill_data_defaults(args, data)
    args.data, args.device = data, utils.get_device(args.device)
    return args


def make(args: argparse.Namespace) -> tuple[torch.nn.Module, ddpm.Diffusion]:
    torch.manual_seed(args.seed)
    return ddpm.place(ddpm.make_net(vars(args)), args.device), ddpm.make_diffusion(vars(args))


def stepper(args: argparse.Namespace):
    """A function that takes one training step, and waits for it."""
    net, diffusion = make(args)
    optimizer, ema = torch.optim.AdamW(net.parameters(), fused=args.device.type != "mps"), EMA(net)
    loader = utils.Loader(args.data.images, args.batch_size, args.device, None, args.flip)
    x_0, _ = next(loader.epoch(0))
    bf16 = ddpm.use_bf16(args.precision, args.device, vars(args))

    def step() -> float:
        start = time.perf_counter()
        with torch.autocast(args.device.type, torch.bfloat16, enabled=bf16):
            loss = diffusion.loss(net, x_0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        ema.update(net, 0)
        loss.item()
        return time.perf_counter() - start

    return step


def seconds_a_step(args: argparse.Namespace, reference: argparse.Namespace, known: float | None) -> float:
    """Of an arm: its own, or that of the reference's known step times the ratio of the two."""
    arm, other = stepper(args), stepper(reference)
    times = [(arm(), other()) for _ in range(3 + (30 if args.image_size <= 32 else 6))][3:]
    if known is None:
        return statistics.median(a for a, _ in times)
    return known / 1000 * statistics.median(a / b for a, b in times)


def judged(net, diffusion, args, judge, reference, sampler: str, steps: int, n: int) -> analysis.Row:
    config = vars(args) | {"kind": "ddpm", "name": "", "class_names": None}
    model = analysis.Model("arm", net, diffusion, config, args.device)
    how = argparse.Namespace(batch_size=64, seed=0, no_clip=False, args=None)
    x = analysis.draw(model, range(n), ddpm.SAMPLERS[sampler], steps, how)
    sure = (judge.p(x).max(1).values > 0.95).double().mean().item()
    return analysis.quality(judge.features(x), reference.features) | {"sure": sure}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--arm", action="append", required=True, metavar="FLAGS")
    parser.add_argument("--classifier", required=True, metavar="RUN")
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
    base = parser.parse_args()
    plain = settings(base.reference_arm, base)
    classifier, _, _ = ddpm.load_network(base.classifier, plain.device, ("classifier",))
    judge, n = analysis.Judge(classifier, plain.device), min(base.samples, len(plain.data.images) // 2)
    reference = analysis.make_reference(plain.data, judge, n, 0)
    for flags in base.arm:
        args = settings(flags, base)
        seconds = seconds_a_step(args, plain, base.reference)
        steps = max(1, round(60 * base.minutes / seconds))
        for args.seed in range(base.seeds):
            net, diffusion = make(args)
            loader = Budget(
                args.data.images, args.batch_size, args.device, None, args.flip, args.seed, steps=steps
            )
            keep = ("lr", "warmup", "weight_decay", "clip_grad", "ema_decay", "compile", "seed")
            bf16 = ddpm.use_bf16(args.precision, args.device, vars(args))
            options = {key: getattr(args, key) for key in keep} | {"epochs": 1, "bf16": bf16}
            with tempfile.TemporaryDirectory() as folder:
                ema = ddpm.train(net, diffusion.loss, loader, Path(folder), **options)
            row = {"arm": flags or "the defaults", "dataset": args.dataset, "minutes": base.minutes}
            row |= {"parameters": sum(p.numel() for p in net.parameters()), "seed": args.seed}
            row |= {"ms a step": round(1000 * seconds, 2), "steps": steps, "images": steps * args.batch_size}
            how = (args, judge, reference, base.sampler, base.steps, n)
            row |= {key: round(value, 4) for key, value in judged(ema.net, diffusion, *how).items()}
            floor = analysis.frechet_distance(reference.floor_features, reference.features)
            row |= {"floor": round(floor, 4)}
            new = not Path(base.out).exists()
            with open(base.out, "a", newline="") as file:
                writer = csv.DictWriter(file, row)
                _ = new and writer.writeheader()
                writer.writerow(row)
            print(row, flush=True)


if __name__ == "__main__":
    utils.run_main(main)
