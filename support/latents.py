"""What an autoencoder makes of images: computed once, cached like decoded images, and measured."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .cache import cached
from .errors import UserError, note
from .files import digest
from .images import to_x_0
from .machine import progress
from .measures import psnr, ssim
from .pictures import make_grid, save_picture
from .runs import load_checkpoint
from .settings import COUNT, Command, setting, settings

HALVED = "pixels along a side for one of a latent: 2, 4 or 8 (default: 4)"
DIFFUSED, OWN = "task=diffusion/classifier", "task=autoencoder"
AT_ONCE = 128  # images that are encoded before they are written


@settings()
class LatentSettings:
    latent: str | None = setting(None, "autoencoder run, to train in its latents", "RUN", of=DIFFUSED)
    downsampling: int | None = setting(None, HALVED, "N", int, choices=[2, 4, 8], of=OWN)
    latent_channels: int | None = setting(None, "channels of latents (default: 4)", "N", COUNT, of=OWN)


def settle_latent(command: Command) -> None:
    """Take from --latent, if given, the shape of its latents, and its data unless --dataset names another."""
    if command["latent"]:
        given = load_checkpoint(command["latent"], "autoencoder")["config"]
        if "dataset" not in command.typed or command["dataset"] == given["dataset"]:
            command.settle({name: given[name] for name in ("dataset", "data_root", "image_size", "channels")})
        command.settle({name: given[name] for name in ("downsampling", "latent_channels")})


def settle_levels(command: Command) -> int:
    """The levels of an autoencoder; its --downsampling is settled. UserError where its flags contradict."""
    patch, given = command["patch"] or 1, command["downsampling"]
    levels = len(command["multipliers"] or ()) or max(1, (given or 4) // patch).bit_length()
    factor = patch * 2 ** (levels - 1)
    if factor not in (2, 4, 8) or factor != (given or factor):
        takes = "an autoencoder that halves images n times takes n + 1 --multipliers, 2 to 4 of them"
        raise UserError(f"{takes}; --patch 2 halves them once, --patch 4 twice")
    command.settle({"downsampling": factor, "latent_channels": command["latent_channels"] or 4}, typed=True)
    return levels


def load_autoencoder(command: Command, shape) -> dict:
    """The autoencoder of --latent or --resume: settings, weights, scale; UserError if `shape` has other C."""
    if command["resume"]:
        return load_checkpoint(command["resume"], "ddpm", "ddpm_conditional", "classifier").get("autoencoder")
    path, theirs = command["latent"], load_checkpoint(command["latent"], "autoencoder")
    config = theirs["config"] | {"kind": "autoencoder"}
    if config["channels"] != shape[0]:
        takes = f"--latent {path} takes images of {config['channels']} channels, and these have {shape[0]}"
        raise UserError(f"{takes}: add --channels {config['channels']}, or train an autoencoder on these")
    if config["image_size"] != shape[-1]:
        note(f"--latent {path} was trained at {config['image_size']} pixels, and the images have {shape[-1]}")
    return {"config": config, "weights": theirs["ema"], "scale": 1.0}


def encoded(space, images: Tensor, part: dict, command: Command) -> tuple[Tensor, dict]:
    """Latents float16 (N, 1 or 2, c, h, w) of uint8 images (N, C, H, W), and `part`, their autoencoder."""
    weights = "".join(f"{name} {digest(weight)}" for name, weight in sorted(part["weights"].items()))
    key = hashlib.sha256(f"1 {digest(images)} {command['flip']}{weights}".encode())  # 1: see fingerprint
    space.scale = 1.0  # while they are computed

    def chunks() -> Iterator[tuple[np.ndarray, list[int]]]:
        with progress("encoding", len(images)) as bar:
            for part in torch.arange(len(images)).split(AT_ONCE):
                x = to_x_0(images[part])
                both = [x, x.flip(-1)] if command["flip"] else [x]  # the second is the mirror image
                yield torch.stack([space.encode(x) for x in both], dim=1).half().cpu().numpy(), part.tolist()
                bar.update(len(part))

    cache_file = Path(command["cache_dir"]) / f"{command['dataset']}_latents_{key.hexdigest()[:16]}.npy"
    shape = (len(images), 2 if command["flip"] else 1, *space.shape)
    z = torch.from_numpy(cached(cache_file, shape, chunks, np.float16)[0])
    if not command["resume"]:  # a new run measures the scale that makes their variance 1
        mean = sum(few.double().sum() for few in z.split(AT_ONCE)) / z.numel()
        variance = sum((few.double() - mean).square().sum() for few in z.split(AT_ONCE)) / z.numel()
        part["scale"] = max(variance.item(), 1e-12) ** -0.5
    space.scale = part["scale"]
    return z, part


class Reconstructions:
    """Held-out images (N, C, H, W) uint8, of which up to 256 are measured and 32 shown, `at_once` at once."""

    columns, found = ("psnr", "ssim"), None  # of log.csv (means, PSNR in dB), and in the last epoch

    def __init__(self, images: Tensor, config: dict, at_once: int, device):
        self.x, self.config, self.at_once, self.device = to_x_0(images[:256]), config, at_once, device

    @torch.no_grad()
    def __call__(self, net, x: Tensor) -> Tensor:
        """Images (B, C, H, W), encoded and decoded."""
        parts = (part.to(self.device) for part in x.split(self.at_once))
        return torch.cat([net.decode(net.encode(part)[0]).float().cpu() for part in parts]).clamp(-1, 1)

    def measure(self, net) -> tuple[str, str]:
        x = self(net, self.x)
        self.found = f"{psnr(x, self.x).mean():.2f}", f"{ssim(x, self.x).mean():.4f}"
        return self.found

    def preview(self, net, epoch: int, path: Path) -> None:
        found = self.found or self.measure(net)
        of = "PSNR {} dB, SSIM {} on {} held-out images".format(*found, len(self.x))
        tqdm.write(f"epoch {epoch}: {of}")
        pairs = torch.stack([self.x[:32], self(net, self.x[:32])], 1).flatten(0, 1)
        caption, heads = f"{self.config['dataset']}, epoch {epoch}: {of}", ["image", "D(E(x))"] * 4
        save_picture(make_grid(pairs, caption, 8, heads=heads), path)
