"""The training loop around a loss: all of it but the loss."""

import io
import math
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from .errors import Stopped, UserError, first_line, is_out_of_memory, note, stop_on_signal
from .files import replacing
from .generators import BatchShare, Generators
from .loader import Loader
from .machine import MachineSettings, compile_forward, half_precision
from .runs import log_rows
from .settings import COUNT, POSITIVE, real, setting, settings, whole

CHECK_EVERY = 25  # steps between two looks at the loss: each look waits for the device
SAVE_SECONDS = 600  # within a long epoch, save this often
MACHINE, LOG = MachineSettings(), ("step", "loss", "lr", "images_per_second", "seconds")
BATCH, QUARTER = "default: by network and data set; with --sample 64", "default: a quarter of the run"
EPOCHS = "default: by data set and task, 5 to 80"
RECOMPUTE = "compute activations again in the backward pass: less memory, a third more time"


@settings()
class TrainingSettings:
    epochs: int | None = setting(None, f"passes over the data ({EPOCHS})", "N", COUNT, resume=True)
    batch_size: int | None = setting(None, f"images at once ({BATCH})", "N", COUNT, sample=True)
    lr: float | None = setting(None, "peak rate of AdamW (default: by network, data set)", "RATE", POSITIVE)
    warmup: int = setting(200, "steps of linear warm-up, at most a tenth of the run", "STEPS", whole(0))
    weight_decay: float = setting(0.01, "weight decay of AdamW", "RATE", real(0))
    clip_grad: float = setting(1.0, "largest gradient norm (default: 1.0; 0.1 for shapes)", "NORM", POSITIVE)
    ema_decay: float = setting(0.999, "decay of the averaged weights, per step", "D", real(0, 1))
    accumulate: int = setting(1, "parts of a batch: less memory, the same step", "PARTS", COUNT, resume=True)
    checkpointing: bool = setting(False, RECOMPUTE, resume=True)
    preview_every: int | None = setting(None, f"epochs between grids ({QUARTER})", "N", COUNT, resume=True)
    save_every: int = setting(1, "epochs between checkpoints", "N", COUNT, resume=True)


class Trainer:
    """Batches to take a loss of, and gradient steps.

        for x_0, y, generator in trainer:
            trainer.step(loss_fn(trainer.net, x_0, y, generator))

    Between two batches it saves, logs, draws by `preview(averaged network, epoch, file to write)`, and stops
    after a signal (Stopped) or where the loss is not finite (UserError). `average(net, decay)` makes the
    averaged weights, `ema`; the first process writes log.csv and ckpt.pt, with `keep` in it, to `run`.
    """

    def __init__(self, net, average, loader: Loader, run: Path, settings, machine=MACHINE, preview=None):
        self.weights, self.ema = net.train(), average(net, settings.ema_decay)
        self.loader, self.run, self.settings, self.preview = loader, run, settings, preview
        self.processes, self.machine, self.keep = loader.processes, machine, {}
        device, self.lr = loader.device, settings.lr or 2e-4
        options = {"weight_decay": settings.weight_decay, "fused": device.type != "mps"}
        self.optimizer = torch.optim.AdamW(net.parameters(), self.lr, **options)
        self.parts = {"net": net, "ema": self.ema.net, "optimizer": self.optimizer}  # of a checkpoint
        self.generator = torch.Generator(device).manual_seed(machine.seed)
        self.steps, self.loss_sum, self.resumed = 0, 0.0, False  # steps done; sum of this epoch's losses
        self.rows, self.logged = [], True  # of log.csv; whether all could be written
        self.tested, self.columns = None, LOG  # tested.measure(averaged network) fills further columns
        self.pending: list[Tensor] = []  # loss and gradient norm of the last few steps, still on the device
        for block in net.modules() if settings.checkpointing else ():
            if getattr(block, "recompute", False):  # keeps no activations, but computes them again
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        if machine.compile:  # the next call of a CUDA graph overwrites gradients, which --accumulate adds to
            compile_forward(net, graphs=device.type == "cuda" and settings.accumulate == 1)
        half = half_precision(machine.precision, device, net)
        self.autocast = torch.autocast(device.type, half) if half else nullcontext()
        self.scaler = torch.amp.GradScaler(device.type, enabled=half == torch.float16)
        self.scale = self.scaler.get_scale()  # of the loss; 1, but in float16
        self.skipped = 0  # of the steps: those whose gradient overflowed; the scale then halves
        if half:
            net.forward = self.autocast(net.forward)
        self.net = net  # the network to be called
        if self.processes.count > 1:
            self.net = DistributedDataParallel(net, [device.index] if device.type == "cuda" else None)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None, Generators]]:
        loader, epochs, rank = self.loader, self.settings.epochs, self.processes.rank
        if rank > 0:  # dropout draws other numbers than in the first process
            torch.manual_seed(self.machine.seed + self.steps + rank)
        self.first_step, self.saved_at, self.told = self.steps + 1, time.monotonic(), False
        images, per_epoch = len(loader.images), loader.batches
        done = self.steps // per_epoch * images + self.steps % per_epoch * loader.batch_size
        every = 0.2 if sys.stderr.isatty() else 10
        bar = tqdm(total=epochs * images, initial=done, unit="img", unit_scale=True, mininterval=every)
        with stop_on_signal() as stop, bar:
            if not self.resumed:
                self.save()  # from here on there is always a checkpoint
            elif self.rows and self.processes.first:  # perhaps the last ones could not be written
                log_rows(self.run / "log.csv", self.columns, self.rows)
            for epoch in range(self.steps // per_epoch + 1, epochs + 1):
                bar.set_description(f"epoch {epoch}/{epochs}", refresh=False)
                started, seen = time.monotonic(), 0
                for x_0, y in loader.epoch(epoch - 1, start=self.steps % per_epoch):
                    batch = min(loader.batch_size, images - self.steps % per_epoch * loader.batch_size)
                    yield from self.parts_of(x_0, y, batch)
                    seen += batch
                    bar.update(batch)
                    self.after_step(stop.is_set(), bar, started)
                loss, self.loss_sum, took = self.loss_sum / per_epoch, 0.0, time.monotonic() - started
                lr = f"{self.optimizer.param_groups[0]['lr']:.3e}"
                row = (epoch, self.steps, f"{loss:.6f}", lr, f"{seen / took:.1f}", f"{took:.2f}")
                measured = self.tested and self.processes.first and self.tested.measure(self.ema.net)
                self.rows.append((*row, *(measured or ())))
                self.after_epoch(epoch, stop.is_set())

    def parts_of(self, x_0: Tensor, y: Tensor | None, batch: int) -> Iterator[tuple]:
        """This process's share of a batch of `batch` images, in --accumulate parts; neither changes draws."""
        total, count = self.settings.epochs * self.loader.batches, self.processes.count
        warmup, taken = min(self.settings.warmup, total // 10), self.steps - self.skipped
        rate = self.lr * (taken + 1) / (warmup + 1)  # linear, then half a cosine from the peak to 0
        if taken >= warmup:
            rate = self.lr * 0.5 * (1 + math.cos(math.pi * (taken - warmup) / (total - warmup)))
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.zero_grad()
        self.loss = torch.zeros((), device=x_0.device)
        share, before = range(batch)[self.processes.rank :: count], self.generator.get_state()
        parts = min(self.settings.accumulate, len(x_0))
        for k in range(parts):
            images, self.last_part = share[k::parts], k + 1 == parts  # their positions in the batch
            self.weight = len(images) / batch * count  # 0 if this process has no image of it
            if count > 1:
                self.net.require_backward_grad_sync = self.last_part  # average the gradients once a batch
            self.generator.set_state(before)
            share_of = BatchShare(self.generator, images or range(1), batch)
            draws = self.generator if len(images) == batch else share_of
            yield x_0[k::parts], None if y is None else y[k::parts], draws

    def step(self, loss: Tensor) -> None:
        """Add the gradient of a loss; after the last part of a batch clip it, step, average the weights."""
        loss = self.weight * loss
        self.scaler.scale(loss).backward()
        self.loss += loss.detach()
        if self.last_part:
            self.scaler.unscale_(self.optimizer)
            norm = torch.nn.utils.clip_grad_norm_(self.weights.parameters(), self.settings.clip_grad)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            before, self.scale = self.scale, self.scaler.get_scale()
            if self.scale < before:
                self.skipped, norm = self.skipped + 1, torch.zeros_like(norm)
            else:
                self.ema.update(self.weights, self.steps - self.skipped)
            self.steps += 1
            self.pending.append(torch.stack([self.loss.float(), norm.detach().float()]))
            if self.scale < 1:  # then gradients are above 65504 by themselves
                raise self.lost("loss scale of fp16 fell to nothing", self.steps)

    def after_step(self, stopping: bool, bar: tqdm, started: float) -> None:
        """Look at the losses now and then, tell a long run's hours, save in a long epoch, or to stop."""
        per_epoch = self.loader.batches
        if self.steps == self.first_step:
            if self.machine.compile:
                self.pending[-1].tolist()  # waits for the device
                tqdm.write(f"the first step took {time.monotonic() - started:.0f} s, with compilation")
            self.began = time.monotonic()
        if len(self.pending) >= CHECK_EVERY or self.steps % per_epoch == 0:
            self.check_losses()
            bar.set_postfix(loss=f"{self.loss_sum / ((self.steps - 1) % per_epoch + 1):.4f}", refresh=False)
            done, left = self.steps - self.first_step, self.settings.epochs * per_epoch - self.steps
            if done and not self.told:
                self.told, hours = True, (time.monotonic() - self.began) / done * left / 3600
                if hours > 1:
                    less = "fewer --epochs, a smaller --image-size, or latents (docs/latents.md)"
                    tqdm.write(f"time     about {hours:.1f} hours; what takes less: {less}")
        stopping, late = self.processes.any(stopping, time.monotonic() - self.saved_at > SAVE_SECONDS)
        if self.steps % per_epoch and (stopping or late):
            self.save()
            if stopping:
                raise Stopped

    def after_epoch(self, epoch: int, stopping: bool) -> None:
        """Save, log, stop after a signal, draw a preview."""
        settings, last = self.settings, epoch == self.settings.epochs
        (stopping,) = self.processes.any(stopping)
        if epoch % settings.save_every == 0 or last or stopping:
            self.save()
        if self.processes.first and (self.logged or last or stopping or epoch % 10 == 0):  # a locked one
            self.logged = log_rows(self.run / "log.csv", self.columns, self.rows)  # takes seconds to try
        if stopping and not last:
            raise Stopped
        if self.preview and self.processes.first and (last or epoch % (settings.preview_every or 1) == 0):
            self.draw_preview(epoch)

    def draw_preview(self, epoch: int) -> None:
        """Draw a preview in the run's precision; a note where there is too little memory for it."""
        try:
            with self.autocast:
                self.preview(self.ema.net, epoch, self.run / "samples" / f"epoch_{epoch:04d}.png")
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            note(f"out of memory in the preview of epoch {epoch}, which is left out; training goes on")

    def check_losses(self) -> None:
        """Add up the pending losses; UserError if one is not finite, and then nothing later is saved."""
        values = (self.processes.add(torch.stack(self.pending)) / self.processes.count).tolist()
        for step, (loss, norm) in enumerate(values, start=self.steps - len(values) + 1):
            if not math.isfinite(loss) or not math.isfinite(norm):
                raise self.lost(f"{'gradient' if math.isfinite(loss) else 'loss'} is not finite", step)
            self.loss_sum += loss
        self.pending.clear()

    def lost(self, what: str, step: int) -> UserError:
        """The error of a run that has nothing more to learn from."""
        cure = "a lower --lr" + " or --precision fp32" * self.scaler.is_enabled()
        kept = f"{self.run / 'ckpt.pt'} holds the last good weights"
        return UserError(f"the {what} at step {step}: try {cure}; {kept}")

    def save(self) -> None:
        """Write ckpt.pt in one step; UserError where that fails, and the previous one is still whole."""
        if self.pending:
            self.check_losses()
        self.saved_at = time.monotonic()
        if self.processes.rank > 0:
            return
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        rng = {"cpu": torch.get_rng_state(), "cuda": cuda, "train": self.generator.get_state()}
        place = {"epoch": self.steps // self.loader.batches, "step": self.steps, "loss_sum": self.loss_sum}
        place |= {"skipped": self.skipped, "scaler": self.scaler.state_dict()}
        state = {name: part.state_dict() for name, part in self.parts.items()}
        path, buffer = self.run / "ckpt.pt", io.BytesIO()  # torch.save to a full disk may abort the process
        torch.save({**self.keep, **state, **place, "log": self.rows, "rng": rng}, buffer)  # log.csv may lag
        try:
            with replacing(path) as file:
                file.write(buffer.getbuffer())
        except OSError as error:
            left = "the previous checkpoint is untouched" if path.is_file() else "there is no checkpoint yet"
            cure = "close the program that has it open, or allow writing" * isinstance(error, PermissionError)
            cure = f"{cure or 'make room'}, or choose another --runs"
            raise UserError(f"can't write {path}: {error.strerror}; {left}: {cure}") from None

    def resume(self, checkpoint: dict) -> None:
        """Go on where a checkpoint was saved, bit for bit on the CPU; UserError where it does not fit."""
        try:
            for name, part in self.parts.items():
                part.load_state_dict(checkpoint[name])
            if checkpoint.get("scaler"):  # it has one, if the run was in float16
                self.scaler.load_state_dict(checkpoint["scaler"])
                self.scale = self.scaler.get_scale()
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"the checkpoint does not fit this network: {first_line(error)}") from None
        rng = checkpoint["rng"]
        torch.set_rng_state(rng["cpu"])
        if len(rng["cuda"]) == torch.cuda.device_count() > 0:
            torch.cuda.set_rng_state_all(rng["cuda"])
        if rng["train"].numel() == self.generator.get_state().numel():  # else it is of another kind of device
            self.generator.set_state(rng["train"])
        self.optimizer.param_groups[0]["fused"] = self.optimizer.defaults["fused"]  # that of this device
        self.steps, self.loss_sum, self.resumed = checkpoint["step"], checkpoint["loss_sum"], True
        self.skipped = checkpoint.get("skipped", 0)
        self.rows = checkpoint.get("log", [])  # older runs have them in log.csv alone
