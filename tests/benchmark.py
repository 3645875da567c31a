"""How fast is it: ratios, each of two alternatives run in turn, so that a busy machine slows both.

python tests/benchmark.py            on the CPU about three minutes; with a GPU, --device cuda
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ddpm
import ddpm_conditional
import utils
from modules import EMA, ConditionalUNet, UNet


def ratio(name: str, slow: Callable, fast: Callable, repeats: int, device: torch.device) -> None:
    """Run both in turn and print the median of slow / fast, with the medians in milliseconds."""
    seconds: dict[Callable, list[float]] = {slow: [], fast: []}
    for repeat in range(repeats + 1):
        for f in (slow, fast):
            start = time.perf_counter()
            f()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat:  # the first is a warm-up
                seconds[f].append(time.perf_counter() - start)
    of = statistics.median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))
    was, now = (1000 * statistics.median(seconds[f]) for f in (slow, fast))
    print(f"{of:7.2f} x  {name}  ({was:.1f} ms -> {now:.1f} ms)", flush=True)


def training_step(
    size: int, batch: int, device: torch.device, bf16=False, channels_last=False, compile=False
) -> Callable[[], None]:
    """One step of training the default network for `size`, as train() takes it."""
    torch.manual_seed(0)
    defaults = ddpm.unet_defaults(size)
    net = UNet(3, **{k: defaults[k] for k in ("width", "multipliers", "blocks", "attention")}).to(device)
    if channels_last:
        net = net.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    model, ema, diffusion = torch.compile(net) if compile else net, EMA(net), ddpm.Diffusion()
    x_0 = torch.rand(batch, 3, size, size, device=device) * 2 - 1

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = diffusion.loss(model, x_0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        ema.update(net, 0)

    return step


def guidance_step(size: int, batch: int, device: torch.device) -> tuple[Callable, Callable]:
    """One evaluation of classifier-free guidance, both halves in one batch, and one unconditional one."""
    torch.manual_seed(0)
    defaults = ddpm.unet_defaults(size)
    settings = {k: defaults[k] for k in ("width", "multipliers", "blocks", "attention")}
    net, diffusion = ddpm.place(ConditionalUNet(10, 3, **settings), device).eval(), ddpm.Diffusion()
    x_t = torch.randn(batch, 3, size, size, device=device)
    t, y = torch.full((batch,), 500, device=device), torch.arange(batch, device=device) % 10
    guided, plain = ddpm_conditional.cfg(diffusion, net, y, 3.0), diffusion.denoiser(net)

    def run(eps_theta: Callable) -> Callable[[], None]:
        def step() -> None:
            with torch.no_grad():
                eps_theta(x_t, t)

        return step

    return run(guided), run(plain)


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
    data = utils.get_data("folder", folder, cache_dir=folder / "cache")
    ours = utils.Loader(data.images, 64, device, flip=True)

    def epoch_usual() -> None:
        for x_0, _ in usual:
            x_0.to(device)

    def epoch_ours() -> None:
        for _ in ours.epoch(0):
            pass

    return epoch_usual, epoch_ours


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto")
    device = utils.get_device(parser.parse_args().device)
    print(f"on {device}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as folder:
        slow, fast = loading(Path(folder), device)
        ratio(
            "an epoch of 600 images: a DataLoader that decodes -> batches of one array", slow, fast, 3, device
        )

    cpu = device.type == "cpu"
    for size, batch in ((16, 32), (32, 16 if cpu else 256), (64, 4 if cpu else 64)):
        repeats = {16: 15, 32: 4, 64: 3}[size] if cpu else 20
        plain = training_step(size, batch, device)
        last = training_step(size, batch, device, channels_last=True)
        ratio(
            f"a training step at {size} x {size}: contiguous -> channels last", plain, last, repeats, device
        )
        bf16 = training_step(size, batch, device, bf16=True, channels_last=cpu)
        ratio(
            f"a training step at {size} x {size}: float32 -> bfloat16",
            last if cpu else plain,
            bf16,
            repeats,
            device,
        )
        guided, plain = guidance_step(size, batch, device)
        name = f"a step of guidance at {size} x {size}, over an unconditional one"
        ratio(name, guided, plain, 3 * repeats, device)
        if not cpu:
            compiled = training_step(size, batch, device, bf16=True, compile=True)
            ratio(
                f"a training step at {size} x {size}: bfloat16 -> compiled", bf16, compiled, repeats, device
            )


if __name__ == "__main__":
    main()
