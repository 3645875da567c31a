"""Run folders: checkpoints that never run code, logs, and folders of samples that are never mixed."""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import PIL.Image
import torch

from .errors import LostProcess, Stopped, UserError, is_lost, note
from .files import digest, new_path, quoted, read_csv, read_pickle, remove_leftovers, replacing, write_csv
from .images import image_files
from .processes import Processes
from .published import PUBLISHED_FILES, load_published, published_file, published_name
from .settings import COUNT, OLDER, setting, settings


@settings()
class RunSettings:
    name: str | None = setting(None, "run's folder (default: kind and data set, as ddpm_digits)", "NAME")
    runs: str = setting("runs", "directory of the run folders", "DIR")
    resume: str | None = setting(None, "run to go on with, with its settings", "RUN", resume=True)


@settings()
class OutputSettings:
    sample: int | None = setting(None, "draw N images instead of training", "N", COUNT, sample=True)
    checkpoint: str | None = setting(None, "run's folder, or published weights", "RUN", sample="only")
    out: str | None = setting(None, "directory for one PNG per image, for FID tools", "DIR", sample="only")
    animate: bool = setting(False, "also write a GIF of the way from noise to images", sample="only")


CHECKPOINT_KEYS = ("config", "net", "ema", "optimizer", "epoch", "step", "loss_sum", "rng", "data")
FOREIGN = {"model.diffusion_model.": "LDM or Stable Diffusion", "input_blocks.": "guided-diffusion"}
ABOUT = ("kind", "epoch", "class_names", "vocabulary", "examples", "autoencoder")  # beside the settings


def load_checkpoint(path: str | Path, *kinds: str) -> dict:
    """A run's checkpoint, read from its folder or its ckpt.pt; UserError if it is none of the kinds."""
    path = checkpoint_file(path)
    read = read_pickle(path, "use a ckpt.pt that this project wrote")
    checkpoint = read if isinstance(read, dict) else {}
    if "kind" not in checkpoint:
        keys = " ".join(map(str, d if isinstance(d := checkpoint.get("state_dict"), dict) else checkpoint))
        for what in (what for key, what in FOREIGN.items() if key in keys):
            raise UserError(f"{path} holds weights of {what}, which are out of scope (the README says more)")
        raise UserError(f"{path} is no checkpoint of this project (a ckpt.pt from a folder of runs/ is)")
    if checkpoint["kind"] not in kinds:
        one = f"{'an' if kinds[0] == 'autoencoder' else 'a'} {kinds[0]!r} one is needed here"
        needed = " or ".join([one, *map(repr, kinds[1:])])
        used_by = "; ddpm_conditional.py samples it" if checkpoint["kind"] == "ddpm_conditional" else ""
        raise UserError(f"{path} is a checkpoint of kind {checkpoint['kind']!r}; {needed}{used_by}")
    missing = [key for key in CHECKPOINT_KEYS if key not in checkpoint]
    if missing or not isinstance(checkpoint["config"], dict):
        raise UserError(f"checkpoint {path} is incomplete: it lacks {', '.join(missing) or 'settings'}")
    checkpoint["config"] = OLDER | checkpoint["config"]
    return checkpoint


def load_weights(path: str | Path, kinds: Sequence[str]) -> tuple[dict, dict]:
    """Settings and averaged weights of a run, or published ones, which pass for "ddpm"; else UserError."""
    if file := published_file(path):
        if "ddpm" not in kinds:
            what = f"{path} holds the published weights of an unconditional model"
            raise UserError(f"{what}: a run of kind {kinds[0]!r} is needed here")
        return load_published(file)
    checkpoint = load_checkpoint(path, *kinds)
    return {**checkpoint["config"], **{key: checkpoint.get(key) for key in ABOUT}}, checkpoint["ema"]


@contextmanager
def fitting(path: object) -> Iterator[None]:
    """UserError where what is made in the block from a checkpoint's settings and weights does not fit."""
    try:
        yield
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:  # all may be in a file
        why = "; ".join(line.strip() for line in str(error).splitlines()[:4])
        raise UserError(f"{path} does not hold the network that its settings describe: {why}") from None


def checkpoint_file(path: str | Path) -> Path:
    """The ckpt.pt that a run's folder, or the file itself, names; UserError where there is none."""
    path = Path(path)
    if published := published_file(path):
        raise UserError(f"{published} holds published weights: a run of this project is needed here")
    file = path / "ckpt.pt" if path.is_dir() else path
    if file.is_file():
        return file
    if (path / "vqvae").exists():
        raise UserError(f"{path} is a latent diffusion model, and lacks unet/ or weights in it: get it")
    inside = sorted([*path.glob("*"), *path.glob("unet/*")])
    there = [p.name for p in inside if p.suffix in (".bin", ".safetensors")]
    if there or any((path / name).exists() for name in ("config.json", "model_index.json", "unet")):
        cure = f", but {', '.join(there)}: rename one file, save shards as one" if there else ""
        raise UserError(f"{path} holds no {' or '.join(('ckpt.pt', *PUBLISHED_FILES))}{cure}")
    raise UserError(f"no checkpoint {file}: name a run's folder, such as runs/ddpm_digits, or its ckpt.pt")


def run_folder(path: str | Path) -> Path:
    """The folder for what is made with a checkpoint: its run's, or runs/NAME for published weights."""
    file = published_file(path)
    return Path("runs") / published_name(file.parent) if file else checkpoint_file(path).parent


def command_line(*flags: object, script: str | None = None) -> str:
    """A command line of this script, or of another beside it, that can be pasted into a shell."""
    return quoted("python", Path(sys.argv[0]).with_name(script) if script else sys.argv[0], *flags)


def figure_of(script: str, *flags: object) -> list[PIL.Image.Image]:
    """The figure that a command of another script makes; UserError with what it says if it fails."""
    print(f"  {command_line(*flags, script=script)}")
    command = [sys.executable, Path(__file__).parents[1] / script, *flags]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    made = re.findall("^(?:figure|grid) +(.+)$", done.stdout, re.MULTILINE)
    if done.returncode or not made:
        raise UserError((done.stderr.strip().splitlines() or ["no figure was made"])[-1])
    file = made[0].strip("'\"").replace("'\"'\"'", "'")  # as `quoted` writes it
    return [PIL.Image.open(file, formats=["PNG"]).convert("RGB")]


def check_resumable(path: str, checkpoint: dict, keep: dict, epochs: int, per_epoch: int) -> None:
    """UserError unless a run can go on: from its own ckpt.pt, with the data in `keep`, not past its end."""
    if checkpoint_file(path).name != "ckpt.pt":
        raise UserError(f"--resume {path}: a run goes on in its folder, from its ckpt.pt: name that")
    if any(checkpoint.get(key) != keep[key] for key in keep.keys() - {"config", "autoencoder"}):
        raise UserError("the data set has changed since the run began: bring it back, or start a new run")
    if checkpoint["step"] > epochs * per_epoch:
        raise UserError(f"the run has had {checkpoint['epoch']} epochs already: ask for more --epochs")
    if checkpoint["step"] == epochs * per_epoch:
        note(f"the run has had its {epochs} epochs; to train further, ask for more --epochs")


@contextmanager
def open_run(wanted: Path, resumed: bool, config: dict, processes: Processes) -> Iterator[Path]:
    """The folder of a run: `wanted`, or for a new one the next free name; a stopped run says how to go on."""
    wanted.parent.mkdir(parents=True, exist_ok=True)
    run = new_path(wanted) if processes.first and not resumed else wanted
    if processes.count > 1:
        run = processes.broadcast(run)
    if run != wanted:
        note(f"{wanted} exists and stays as it is: this run goes to {run}")
    if processes.first:
        remove_leftovers(run, run / "samples")
        with replacing(run / "config.json") as file:
            file.write(json.dumps(config, indent=2).encode())
    try:
        yield run
    except Stopped:
        print(f"stopped and saved; go on with\n  {command_line('--resume', run)}", file=sys.stderr)
        sys.exit(130)
    except RuntimeError as error:
        if not is_lost(error):
            raise
        go_on = f"go on with {command_line('--resume', run)}"
        raise LostProcess(f"another process has ended, and so does this one: {go_on}") from None


def log_rows(path: Path, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> bool:
    """Write rows of epochs to a CSV, in the place of those from their first epoch on; False if that fails."""
    try:
        earlier = [row for row in read_csv(path) if row[0].isdecimal() and int(row[0]) < rows[0][0]]
        write_csv(path, [("epoch", *columns), *earlier, *rows])
    except OSError as error:
        note(f"{path} can't be written ({error.strerror}): close it elsewhere; its rows are written later")
        return False  # the caller keeps its rows, and writes them all next time
    return True


def prepare_folders(samples: Path, out: str | None, made_with: str | None = None) -> Path:
    """Make the folders for the grid and single images, -> that of the grid; UserError, before any work."""
    if out and Path(out).exists() and not Path(out).is_dir():
        raise UserError(f"--out {out} is a file: name a folder")
    try:
        check_folder(samples)
    except UserError:
        if not out:
            raise
        samples = Path(out) / "grids"
        note(f"the run's folder can't be written to: grids go to {samples}")
    for folder in (samples, Path(out or samples)):
        check_folder(folder)
    there = image_files(Path(out)) if out else []
    if out and (there or (Path(out) / "metadata.jsonl").exists()):  # others would be lost, or mixed with ours
        if made_with is None or not there or any(text_in(path) != made_with for path in there):
            raise UserError(f"--out {out} already holds images of another making: name a new or empty folder")
        note(f"{out} holds {len(there)} images of this kind already: they are not drawn again")
    return samples


def check_folder(folder: Path) -> None:
    """Make a folder for results; UserError where that fails, or no file can be made in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        remove_leftovers(folder)
    except OSError as error:
        why = f"folder {folder} can't be written to ({error.strerror})"
        raise UserError(f"{why}: name a folder for the results with --out") from None


def text_in(path: Path) -> str | None:
    """The settings that an image was made with, as its file keeps them, if it is one of ours."""
    with suppress(Exception), PIL.Image.open(path, formats=["PNG"]) as picture:  # broken files raise anything
        return picture.text.get("made_with")
    return None


def model_name(config: dict) -> str:
    """The model's name in captions."""
    own = f"{config['dataset']}, epoch {config.get('epoch')}"
    return f"{config['name']}, published weights" if config["kind"] == "published" else own


def made_with(settings: dict, config: dict, net: torch.nn.Module) -> str:
    """What images are drawn with, kept in their files: --out goes on only among images of the same making."""
    weights = digest(net.conv_out.weight.detach().float().cpu())
    return json.dumps(settings | {"model": model_name(config), "weights": weights}, sort_keys=True)
