"""Faults of other programs of this kind, as their users reported them: what a user sees here instead."""

import ast
import csv
import errno
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PROJECT, TINY, error_line
from PIL import Image
from test_published import SAMPLE, TINY_CONFIG, publish, tiny_weights

import analysis
import ddpm
import edit
import utils
from support import cache, files, images, launch, loader, trainer
from support.errors import UserError, is_out_of_memory, run_main
from support.files import new_path, quoted, read_csv, remove_leftovers, replacing
from support.text import find_labels

RUN = "runs/ddpm_digits"
TINY_CLASSIFIER = (*" ".join(TINY).replace("--sample-steps 2 ", "").split(), "--task", "classifier")


def save(path, colour="red", size=(8, 8), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)


def python(code, *args, cwd, wait=True, **environment):
    """A process that runs Python code with the project's modules."""
    env = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1", **environment}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        **{"cwd": cwd, "env": env, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True},
    )
    return (process, *process.communicate(timeout=120)) if wait else process


def until(condition, process):
    for _ in range(600):
        if condition() or process.poll() is not None:
            break
        time.sleep(0.05)
    assert condition(), process.communicate()


# 1. Two processes, one file ---------------------------------------------------------------------------------
SLOWLY = """
import sys, time
import utils
from support import cache, images
read, cache.CHUNK = images.read_image, 4 * 3 * 8 * 8
images.read_image = lambda *a, **k: time.sleep(0.03) or read(*a, **k)
data = utils.get_data("folder", "in", image_size=8, workers=1, cache_dir="cache")
print(len(data.images), data.images.min().item())
"""


def test_two_processes_that_decode_one_set_both_get_it(tmp_path):
    for i in range(40):
        save(tmp_path / f"in/{i:02d}.png", "white")
    first = python(SLOWLY, cwd=tmp_path, wait=False)
    until(lambda: list(tmp_path.glob("cache/*.tmp")), first)
    second = python(SLOWLY, cwd=tmp_path, wait=False)
    for process in (first, second):
        out, err = process.communicate(timeout=120)
        assert out.split() == ["40", "255"], err
    (cached,) = (tmp_path / "cache").iterdir()
    assert np.load(cached, mmap_mode="r").min() == 255


def test_a_set_is_opened_while_it_is_written(tmp_path):
    path, shape = tmp_path / "a.npy", (6, 1, 4, 4)

    def chunks(inner):
        for start in range(0, 6, 2):
            if inner and start == 4:
                cache.write_cache(path, shape, chunks(inner=False))
            yield np.full((2, 1, 4, 4), 255, np.uint8), [start, start + 1]

    cache.write_cache(path, shape, chunks(inner=True))
    images, kept = cache.read_cache(path, shape)
    assert images.mean((1, 2, 3)).tolist() == [255] * 6 and kept.tolist() == [0, 1, 2, 3, 4, 5]
    assert [p.name for p in tmp_path.iterdir()] == ["a.npy"]


def test_what_a_killed_process_left_is_removed_by_a_later_one_and_by_no_other(tmp_path):
    for i in range(40):
        save(tmp_path / f"in/{i:02d}.png", "white")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/mine.tmp").write_text("no file of ours")
    process = python(SLOWLY, cwd=tmp_path, wait=False)
    until(lambda: len(list(tmp_path.glob("cache/*.tmp"))) == 2, process)
    remove_leftovers(tmp_path / "cache")
    assert len(list(tmp_path.glob("cache/*.tmp"))) == 2  # it is being written
    process.kill()
    process.communicate()
    assert len(list(tmp_path.glob("cache/*.tmp"))) == 2
    process, out, err = python(SLOWLY, cwd=tmp_path)
    assert out.split() == ["40", "255"], err
    assert [p.name for p in tmp_path.glob("cache/*.tmp")] == ["mine.tmp"]


def test_a_run_removes_what_a_killed_run_left(cli):
    assert cli(*TINY).code == 0
    for name in ("0123abcd.ckpt.pt.tmp", "samples/89abcdef.epoch_0001.png.tmp"):
        Path(RUN, name).write_bytes(b"cut short")
    assert cli("--resume", RUN, "--epochs", 3).code == 0
    assert not list(Path(RUN).rglob("*.tmp"))


def test_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "a"
    with replacing(path) as one:
        one.write(b"1" * 9)
        with replacing(path) as two:
            two.write(b"2" * 3)
        assert path.read_bytes() == b"222"
    assert path.read_bytes() == b"1" * 9 and len(list(tmp_path.iterdir())) == 1
    assert path.stat().st_mode & 0o777 == 0o666 & ~os.umask(os.umask(0o22) or 0o22)


def test_two_runs_that_begin_at_once_get_two_folders(cli, monkeypatch):
    """Another process makes the folder just before this one does."""
    real, taken = Path.mkdir, []

    def late(path, *args, **options):
        if path == Path(RUN) and not taken:
            taken.append(real(path))
        real(path, *args, **options)

    monkeypatch.setattr(Path, "mkdir", late)
    result = cli(*TINY)
    assert result.code == 0 and "this run goes to runs/ddpm_digits_2" in result.err
    assert not any(Path(RUN).iterdir()) and Path("runs/ddpm_digits_2/ckpt.pt").is_file()


def test_two_figures_of_one_name_are_two_files(tmp_path):
    assert [new_path(tmp_path / "a.png", ".png").name for _ in range(3)] == ["a.png", "a_2.png", "a_3.png"]


def test_a_folder_of_runs_on_a_disk_that_is_gone(cli, tmp_path):
    (tmp_path / "runs").symlink_to(tmp_path / "nowhere")
    assert "runs" in error_line(cli(*TINY))
    (tmp_path / "runs").unlink()
    Path(RUN).parent.mkdir()
    Path(RUN).symlink_to(tmp_path / "nowhere")
    assert cli(*TINY).code == 0 and Path("runs/ddpm_digits_2/ckpt.pt").is_file()


def test_two_studies_of_one_name_are_two(script, monkeypatch):
    """Another process takes the name between the look for a free one and its making."""
    real = Path.touch

    def slow(path, *args, **options):
        if path.name == "schedules.csv" and not path.exists():
            path.write_text("theirs")
        return real(path, *args, **options)

    monkeypatch.setattr(Path, "touch", slow)
    assert script(analysis, "schedules", "--out", "out", "--noise-steps", 20).code == 0
    assert Path("out/schedules.csv").read_text() == "theirs" and Path("out/schedules_2.csv").stat().st_size


# 2. Memory for training, and not for a preview --------------------------------------------------------------
LIMITED = """
import resource, sys
import ddpm_conditional
from support import launch
from support.errors import run_main
import torch
torch.ones(2, 2) @ torch.ones(2, 2)
size = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize:"))
limit = 1024 * size + int(float(sys.argv.pop(1)) * 2**20)
if sys.argv.pop(1) == "all":
    launch.at_once = lambda config: 10**6
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
run_main(ddpm_conditional.main)
"""
LARGE = (
    "--limit 4 --batch-size 1 --epochs 2 --width 32 --multipliers 1 2 --blocks 1 --attention --image-size 64"
)


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS and /proc are Linux's")
def test_memory_for_training_is_memory_for_previews(tmp_path):
    """Previews are drawn as many at once as training takes; if even that is too much, training goes on."""
    flags = [*LARGE.split(), "--sample-steps", 1, "--preview-every", 1, "--device", "cpu"]
    ways = ("few", "all")
    found = [python(LIMITED, 400, way, *flags, "--name", way, cwd=tmp_path, wait=False) for way in ways]
    for way, process in zip(ways, found, strict=True):
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0 and "Traceback" not in err, err
        folder = tmp_path / "runs" / way
        assert torch.load(folder / "ckpt.pt", weights_only=True)["epoch"] == 2
        assert ("out of memory in the preview of epoch 1" in err) == (way == "all"), err
        assert len(list(folder.glob("samples/*.png"))) == (2 if way == "few" else 0)
        named = re.findall(r"^(?:samples|log|checkpoint) +(\S+)$", out, re.M)
        assert named and all((tmp_path / name).exists() for name in named)


def test_previews_do_not_depend_on_the_batch_size(cli, conditional):
    """Images are drawn --batch-size at a time, fewer with --accumulate; each starts from its own noise."""
    assert launch.at_once({"batch_size": 12, "accumulate": 4}) == 3
    assert launch.at_once({"batch_size": 2, "accumulate": 4}) == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        assert launch.at_once({"batch_size": 64, "accumulate": 1}) == 32
    for script, name in ((cli, "ddpm"), (conditional, "ddpm_conditional")):
        drawn = []
        for size in (10**6, 7):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(launch, "at_once", lambda config, size=size: size)
                assert script(*TINY, "--name", f"{name}{size}").code == 0
            drawn.append(np.asarray(Image.open(f"runs/{name}{size}/samples/epoch_0002.png")).astype(int))
        assert np.abs(drawn[0] - drawn[1]).max() <= 1


def test_previews_are_drawn_in_the_precision_of_the_run(cli, monkeypatch):
    seen, real = set(), ddpm.sample

    def watched(*args):
        seen.add(torch.is_autocast_enabled("cpu"))
        return real(*args)

    monkeypatch.setattr(ddpm, "sample", watched)
    for precision, name in (("bf16", "a"), ("fp32", "b")):
        assert cli(*TINY, "--precision", precision, "--name", name).code == 0
        assert seen == {precision == "bf16"}
        seen.clear()


# 3. Out of memory, in other words ---------------------------------------------------------------------------
WORDS = [
    "[enforce fail at alloc_cpu.cpp:116] data. DefaultCPUAllocator: not enough memory: you tried to allocate",
    "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000 bytes. Error code 12",
    "MPS backend out of memory (MPS allocated: 5.05 GB, other allocations: 2.14 GB, max allowed: 9.07 GB).",
    "Invalid buffer size: 24.00 GB",
    "CUDA error: out of memory",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "HIP out of memory. Tried to allocate 2.00 GiB",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "HIP error: hipErrorOutOfMemory",
    "CUDA driver error: cudaErrorMemoryAllocation",
    "Native API failed. Native API returns: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)",
    "Could not allocate tensor with 268435456 bytes. There is not enough GPU video memory available!",
    "CUDA error: CUSPARSE_STATUS_INSUFFICIENT_RESOURCES",
    "could not create a primitive",
]


@pytest.mark.parametrize("words", WORDS)
def test_out_of_memory_in_any_words(words):
    assert is_out_of_memory(RuntimeError(words)) and not is_out_of_memory(RuntimeError("shapes differ"))


def test_out_of_memory_is_one_line(cli, monkeypatch):
    def fail(*args):
        raise RuntimeError(WORDS[0])

    monkeypatch.setattr(ddpm, "train", fail)
    line = error_line(cli(*TINY))
    assert "out of memory" in line and "lower --batch-size" in line and "--accumulate" in line


@pytest.mark.parametrize("error", [UserError("a"), OSError(28, "b"), MemoryError(), KeyboardInterrupt()])
def test_a_notebook_shows_no_exception_below_the_line(error, capsys):
    """IPython prints the chain of a SystemExit with frames of its own where another exception led to it."""

    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        run_main(main)
    assert end.value.code in (2, 130) and end.value.__context__ is None
    assert len(capsys.readouterr().err.splitlines()) == 1
    with pytest.raises(SystemExit) as end:
        run_main(lambda: analysis.make_parser().parse_args(["schedules", "--noise-steps", "0"]))
    assert end.value.code == 2 and end.value.__context__ is None


def test_the_systems_own_words_count_and_others_do_not():
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(OSError(errno.ENOMEM, os.strerror(12)))
    assert not is_out_of_memory(OSError(errno.ENOSPC, "No space left on device"))
    assert not is_out_of_memory(UserError("out of memory"))
    assert not is_out_of_memory(FileNotFoundError(2, "No such file or directory", "out of memory/a.png"))
    assert not is_out_of_memory(RuntimeError("could not create a primitive descriptor for a convolution"))


def test_on_resume_the_advice_names_flags_that_resume_takes(cli, monkeypatch):
    assert cli(*TINY).code == 0

    def fail(*args):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(ddpm, "train", fail)
        for resume in (["--resume", RUN], [f"--resume={RUN}"]):
            line = error_line(cli(*resume, "--epochs", 3))
            assert set(re.findall(r"--[a-z-]+", line)) == {"--accumulate", "--checkpointing"}
    assert cli("--resume", RUN, "--epochs", 3, "--accumulate", 2, "--checkpointing").code == 0


# 4. Files that are locked for a moment ----------------------------------------------------------------------
class Locked:
    """os.replace that fails for files of a name, as on Windows while another program has them open."""

    def __init__(self, monkeypatch, name, times):
        self.name, self.times, self.real = name, times, os.replace
        monkeypatch.setattr(os, "replace", self)
        monkeypatch.setattr(files.time, "sleep", lambda seconds: None)

    def __call__(self, temporary, path):
        if Path(path).name == self.name and self.times > 0:
            self.times -= 1
            raise PermissionError(errno.EACCES, "Access is denied", str(path))
        return self.real(temporary, path)


@pytest.mark.parametrize("name", ["ckpt.pt", "log.csv", "config.json", "epoch_0002.png"])
def test_a_file_that_is_locked_for_a_moment_is_tried_again(cli, monkeypatch, name):
    locked = Locked(monkeypatch, name, times=3)
    result = cli(*TINY)
    assert result.code == 0 and locked.times == 0 and "note" not in result.err
    assert [row[0] for row in read_csv(Path(RUN, "log.csv"))] == ["epoch", "1", "2"]


def test_it_is_tried_for_some_seconds():
    assert 4 <= sum(files.WAITS) <= 20


def test_a_checkpoint_that_stays_locked_says_so_and_leaves_the_last_one(cli, monkeypatch):
    assert cli(*TINY).code == 0
    Locked(monkeypatch, "ckpt.pt", times=10**6)
    line = error_line(cli("--resume", RUN, "--epochs", 3))
    assert "previous checkpoint is untouched" in line and "close the program that has it open" in line
    assert torch.load(f"{RUN}/ckpt.pt", weights_only=True)["epoch"] == 2
    assert not list(Path(RUN).rglob("*.tmp"))


def logged():
    return [row["epoch"] for row in csv.DictReader(open(f"{RUN}/log.csv"))]


def test_the_rows_of_a_locked_log_are_written_later(cli, monkeypatch):
    Locked(monkeypatch, "log.csv", times=len(files.WAITS))  # of the first epoch
    result = cli(*TINY, "--epochs", 3)
    assert result.code == 0 and "log.csv can't be written (Access is denied)" in result.err
    assert logged() == ["1", "2", "3"]


def test_a_log_that_stays_locked_loses_nothing(cli, monkeypatch):
    """Save first, log after: everything is in ckpt.pt, and the next command writes the rows."""
    with monkeypatch.context() as patch:
        Locked(patch, "log.csv", times=10**6)
        assert cli(*TINY, "--epochs", 7, "--save-every", 5).code == 0
    assert torch.load(f"{RUN}/ckpt.pt", weights_only=True)["epoch"] == 7
    assert not Path(RUN, "log.csv").exists()
    assert cli("--resume", RUN).code == 0 and logged() == list("1234567")


def test_a_log_that_stays_locked_costs_little_time_and_few_notes(cli, monkeypatch):
    Locked(monkeypatch, "log.csv", times=10**6)
    result = cli(*TINY, "--epochs", 25, "--preview-every", 25)
    assert result.code == 0 and result.err.count("log.csv can't be written") == 4  # epochs 1, 10, 20 and 25


def test_a_log_of_a_classifier_that_is_locked_is_written_later(conditional, monkeypatch):
    Locked(monkeypatch, "accuracy.csv", times=len(files.WAITS))
    result = conditional(*TINY_CLASSIFIER, "--preview-every", 1, "--epochs", 3)
    assert result.code == 0 and "accuracy.csv can't be written" in result.err
    rows = csv.DictReader(open("runs/classifier_digits/accuracy.csv"))
    assert {row["epoch"] for row in rows} == {"1", "2", "3"}


# 5. Names and streams ---------------------------------------------------------------------------------------
@pytest.mark.skipif(sys.platform != "linux", reason="names that are not UTF-8 exist on Linux")
def test_names_that_are_not_utf8(cli, conditional, tmp_path, capsys):
    odd = os.fsdecode(b"Citro\xebn")
    for name in (f"flat/{odd}.png", "flat/a.png", f"classes/{odd}/1.png", "classes/BMW/1.png"):
        save(tmp_path / name)
    (tmp_path / f"flat/{odd}2.png").write_bytes(b"broken")
    result = cli(*TINY, "--dataset", "folder", "--data-root", "flat", "--channels", 1)
    assert result.code == 0 and "1 unreadable" in result.err, result.err
    flags = ("--dataset", "folder", "--data-root", "classes")
    result = conditional(*TINY, *flags)
    assert result.code == 0, result.err
    sampled = ("--sample", 2, "--checkpoint", "runs/ddpm_conditional_folder", "--labels", r"citro\xebn,BMW")
    result = conditional(*sampled, "--out", f"out_{odd}")
    assert result.code == 0 and len(list(Path(f"out_{odd}").glob("*.png"))) == 2, result.err


def test_a_terminal_that_lacks_letters(tmp_path, encoding="cp1252"):
    code = "import ddpm; from support.errors import run_main; run_main(ddpm.main)"
    process, out, err = python(code, *TINY, "--name", "тест", cwd=tmp_path, PYTHONIOENCODING=encoding)
    assert process.returncode == 0 and r"\u0442\u0435\u0441\u0442" in out, err
    assert (tmp_path / "runs/тест/ckpt.pt").is_file()


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is Linux's")
def test_streams_that_are_closed_full_or_gone_do_not_end_training(tmp_path):
    command = f"{sys.executable} -u {PROJECT / 'ddpm.py'}"
    ways = ("2>&-", ">&- 2>&-", "| head -c 1", ">/dev/full 2>/dev/full")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": tmp_path}
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    lines = [f"{command} {' '.join(TINY)} --name {i} {way}" for i, way in enumerate(ways)]
    lines += [f"{command} --dataset folder --data-root gone 2>&-"]
    started = [subprocess.Popen(["bash", "-c", line], env=env, **pipes) for line in lines]
    ended = [(*process.communicate(timeout=120), process.returncode) for process in started]
    for i, _ in enumerate(ways):
        assert torch.load(tmp_path / f"runs/{i}/ckpt.pt", weights_only=True)["epoch"] == 2
    assert ended[0][2] == ended[1][2] == 0 and ended[-1][2] == 2
    assert "gone does not exist" in ended[-1][0]  # stderr is closed: an error is told on stdout


def test_commands_are_quoted_as_the_shell_takes_them():
    assert quoted("python", "my runs/a", windows=False) == "python 'my runs/a'"
    words = ("python", r"C:\Users\A B\ddpm.py", "--resume", r"runs\a&b", r"D:\runs\x_1", "R (2)")
    asked = r'python "C:\Users\A B\ddpm.py" --resume "runs\a&b" D:\runs\x_1 "R (2)"'
    assert quoted(*words, windows=True) == asked
    for path in PROJECT.glob("**/*.py"):
        if path.parent in (PROJECT, PROJECT / "support") and path.name != "files.py":
            assert "shlex" not in path.read_text(encoding="utf-8"), path


def test_images_on_another_drive(tmp_path, monkeypatch):
    """os.path.relpath raises between drives: metadata.jsonl may name a file on another one."""
    save(tmp_path / "far/a.png")
    (tmp_path / "in").mkdir()
    entry = {"file_name": str(tmp_path / "far/a.png"), "text": "far"}
    (tmp_path / "in/metadata.jsonl").write_text(json.dumps(entry))

    def relpath(path, start=None):
        raise ValueError("path is on mount 'D:', start on mount 'C:'")

    monkeypatch.setattr(os.path, "relpath", relpath)
    data = utils.get_data("folder", tmp_path / "in", image_size=8, cache_dir=tmp_path / "cache")
    assert len(data.images) == 1


# 6. A run in a folder that can't be written to --------------------------------------------------------------
@pytest.fixture
def read_only(monkeypatch):
    """Makes folders read-only, for root as well."""
    folders, real = [], tempfile.TemporaryFile

    def temporary(*args, dir=None, **options):
        if any(Path(dir).absolute().is_relative_to(folder) for folder in folders):
            raise OSError(errno.EROFS, "Read-only file system", str(dir))
        return real(*args, dir=dir, **options)

    monkeypatch.setattr(tempfile, "TemporaryFile", temporary)
    return lambda folder: folders.append(Path(folder).absolute())


def test_a_run_in_a_read_only_folder(script, read_only):
    assert script(ddpm, *TINY).code == 0
    save(Path("a.png"))
    read_only(RUN)
    before = sorted(Path(RUN).rglob("*"))
    commands = {
        "samples": (ddpm, "--sample", 3, "--checkpoint", RUN, "--sample-steps", 2),
        "edits": (
            edit,
            "sdedit",
            "--checkpoint",
            RUN,
            "--image",
            "a.png",
            "--i-start",
            18,
            "--device",
            "cpu",
        ),
        "studies": (analysis, "denoise", RUN, "--device", "cpu", "--levels", 5, "--image", "a.png"),
    }
    for name, command in commands.items():
        line = error_line(script(*command))
        assert RUN in line and "with --out" in line, name
        result = script(*command, "--out", f"out/{name}")
        assert result.code == 0 and list(Path(f"out/{name}").rglob("*.png")), result.err
    assert len(list(Path("out/samples").glob("*.png"))) == 3  # the grid is not among them
    assert len(list(Path("out/samples/grids").glob("*.png"))) == 1
    assert [p for p in sorted(Path(RUN).rglob("*")) if p not in before] in ([], [Path(RUN, "edits")])
    read_only("out")
    assert "out" in error_line(script(*commands["samples"], "--out", "out/more"))


# 7. Classes -------------------------------------------------------------------------------------------------
def test_a_number_is_a_name_where_names_are_numbers(conditional, tmp_path):
    for name in ("1", "2", "3"):
        save(tmp_path / "in" / name / "a.png")
    assert conditional(*TINY, "--dataset", "folder", "--data-root", "in").code == 0
    sampled = ("--sample", 2, "--checkpoint", "runs/ddpm_conditional_folder", "--sample-steps", 1)
    line = error_line(conditional(*sampled, "--labels", "0,1"))
    assert "'0' is no class" in line and "1, 2, 3" in line
    assert conditional(*sampled, "--labels", "3,1", "--out", "out").code == 0
    lines = Path("out/metadata.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in lines] == ["3", "1"]


def test_class_names_with_commas_can_be_asked_for():
    names = ["tench, Tinca tinca", "church", "a,b,c", "b"]
    for text, found in {
        "tench, Tinca tinca": [0],
        "church,Tench,tinca Tinca,church": [1, 0, 1],
        "b,a, b,c,b": [3, 2, 3],
        "0,2": [0, 2],
    }.items():
        assert find_labels([part.strip() for part in text.split(",")], names) == found, text
    for names, numbers in ((["-1", "0", "1"], "2"), (["1.5", "2.5", "3.5"], "2"), (["1", "2", "all"], "0")):
        with pytest.raises(UserError, match=f"'{numbers}' is no class of the model; its classes are"):
            find_labels([numbers], names)
    names = ["tench, Tinca tinca", "church"]
    with pytest.raises(UserError, match="'tinca' is no class"):
        find_labels(["tinca"], names)


# 8. Captions ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("text", [None, ["a", "b"], 3, {"a": 1}, True])
def test_captions_that_are_no_text_name_the_line(tmp_path, text):
    save(tmp_path / "a.png")
    good = json.dumps({"file_name": "a.png", "text": "a red square"})
    (tmp_path / "metadata.jsonl").write_text(f"{good}\n{json.dumps({'file_name': 'a.png', 'text': text})}\n")
    with pytest.raises(UserError, match=r"metadata.jsonl, line 2: expected"):
        utils.get_data("folder", tmp_path)


@pytest.mark.parametrize(
    "content, what",
    [
        *[(b'{"file_name": "a.png", "text": "caf\xe9"}', "line 1: expected"), (b"[" * 200_000, "line 1")],
        *[(b"", "names no images"), (b"<!DOCTYPE html>", "web page")],
    ],
)
def test_other_metadata_that_is_none(tmp_path, content, what):
    save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=what):
        utils.get_data("folder", tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes of Unix")
def test_odd_file_names_in_metadata_are_skipped(cli, tmp_path):
    save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    names = ["a.png", "", ".", "pipe.png", "a\ud800b.png", "a\0b.png", "тест.png"]
    lines = [json.dumps({"file_name": name, "text": "a"}) for name in names]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    result = cli(*TINY, "--dataset", "folder", "--data-root", ".", "--channels", 1)
    assert result.code == 0 and "1 images" in result.out and "3 missing" in result.err
    assert "3 unreadable" in result.err


def test_captions_above_a_train_folder_are_read(tmp_path):
    save(tmp_path / "train/a.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "train/a.png", "text": "a"}))
    assert utils.get_data("folder", tmp_path, image_size=8, cache_dir=tmp_path / "cache").captions == ["a"]


@pytest.mark.parametrize("name", ["metadata.csv", "a.txt"])
def test_captions_in_other_files_are_told_of(tmp_path, capsys, name):
    save(tmp_path / "a.png")
    (tmp_path / name).write_text("a red square")
    utils.get_data("folder", tmp_path, image_size=8, cache_dir=tmp_path / "cache")
    err = capsys.readouterr().err
    assert f"{name} is not read" in err and "metadata.jsonl" in err


# 9. The wrong data set --------------------------------------------------------------------------------------
def test_one_stray_image_beside_class_folders(tmp_path, capsys):
    for k in range(10):
        save(tmp_path / f"in/class {k}/a.png")
    save(tmp_path / "in/cover.png", "blue")
    data = utils.get_data("folder", tmp_path / "in", image_size=8, cache_dir=tmp_path / "cache")
    assert len(data.images) == 10 and len(data.class_names) == 10
    assert "10 images of" in capsys.readouterr().err
    for i in range(12):
        save(tmp_path / f"in/{i}.png", "blue")
    data = utils.get_data("folder", tmp_path / "in", image_size=8, cache_dir=tmp_path / "cache")
    assert len(data.images) == 13 and data.labels is None and "10 others" in capsys.readouterr().err


@pytest.mark.parametrize("flat", [False, True])
def test_splits_and_masks_are_no_classes(tmp_path, capsys, flat):
    for part, count in (("train", 3), ("test", 2), ("masks", 5)):
        for i in range(count):
            save(tmp_path / part / ("" if flat else f"class {i % 2}") / f"{i}.png")
    for split, count in (("train", 3), ("test", 2)):
        data = utils.get_data("folder", tmp_path, split, image_size=8, cache_dir=tmp_path / "cache")
        assert len(data.images) == count and data.class_names == (None if flat else ["class 0", "class 1"])
    assert "masks" in capsys.readouterr().err


def test_masks_beside_images_are_no_class(tmp_path, capsys):
    for name in ("images/1.png", "images/2.png", "Masks/1.png", "Masks/2.png"):
        save(tmp_path / "in" / name)
    data = utils.get_data("folder", tmp_path / "in", image_size=8, cache_dir=tmp_path / "cache")
    assert len(data.images) == 2 and "Masks is left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    "layout, read, classes",
    [
        ("train/a train_masks/a", 1, None),
        ("images/a images/b labels/a labels/b", 2, ["images"]),
        ("JPEGImages/a SegmentationClass/a mask_images/a", 1, ["JPEGImages"]),
        ("training_set/cat/a training_set/dog/a test_set/cat/a", 2, ["cat", "dog"]),
        ("x_train/a x_train/b x_test/a", 2, None),
        ("ds/train/cat/a ds/train/dog/a ds/test/cat/a", 2, ["cat", "dog"]),
        ("images/train/a images/train/b images/val/a", 2, None),
        ("a b c d train/a", 4, None),
        ("train/deep/a bus/a bus/b car/a", 4, ["bus", "car", "train"]),
        ("cat/a dog/a @eaDir/a __MACOSX/a", 2, ["cat", "dog"]),
        ("with_mask/a without_mask/a", 2, ["with_mask", "without_mask"]),
    ],
)
def test_other_layouts(tmp_path, layout, read, classes):
    for name in layout.split():
        save(tmp_path / f"in/{name}.png")
    data = utils.get_data("folder", tmp_path / "in", image_size=8, cache_dir=tmp_path / "cache")
    assert len(data.images) == read and data.class_names == classes


def test_validation_without_training_images_is_an_error(tmp_path):
    save(tmp_path / "val/a.png")
    save(tmp_path / "test/a.png")
    with pytest.raises(UserError, match="no split 'train'"):
        utils.get_data("folder", tmp_path)


@pytest.mark.parametrize("numbers, what", [([0, 1], "from 1 on"), ([1, 5], "none of the 2 classes")])
def test_cars_with_numbers_of_no_class(tmp_path, numbers, what):
    (tmp_path / "names.csv").write_text("Acura RL Sedan 2012\nBMW M3 Coupe 2012\n")
    for i in (1, 2):
        save(tmp_path / f"cars_train/{i:05d}.jpg")
    (tmp_path / "anno_train.csv").write_text(
        "".join(f"{i:05d}.jpg,1,1,9,9,{k}\n" for i, k in enumerate(numbers, 1))
    )
    with pytest.raises(UserError, match=what):
        utils.get_data("stanfordcars", tmp_path)


@pytest.mark.parametrize("where", ["cards/train/ace", "cars/train/red", "train/ace", "my_cars/train"])
def test_cars_are_known_by_their_own_signs(cli, tmp_path, where):
    save(tmp_path / "data" / where / "1.png")
    line = error_line(cli("--dataset", "stanfordcars", *TINY))
    assert "no Stanford Cars" in line


def test_a_flat_folder_says_what_would_be_read(conditional, tmp_path):
    save(tmp_path / "in/a.png")
    line = error_line(conditional(*TINY, "--dataset", "folder", "--data-root", "in"))
    assert all(words in line for words in ("has no captions", "metadata.jsonl", '"file_name"', "sub-folders"))
    line = error_line(conditional(*TINY_CLASSIFIER, "--dataset", "folder", "--data-root", "in"))
    assert "has no labels" in line and "sub-folders" in line


# 10. Damaged files ------------------------------------------------------------------------------------------
MODEL = "diffusion_pytorch_model"
DAMAGED = {
    "web page": b"<!DOCTYPE html><html><body>Sign in</body></html>",
    "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    "empty file": b"",
}


@pytest.mark.parametrize("what", [*DAMAGED, "truncated"])
@pytest.mark.parametrize(
    "name", ["ckpt.pt", "diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"]
)
def test_damaged_weights_say_what_they_are(cli, tmp_path, what, name):
    kind = "safetensors" if name.endswith("safetensors") else "bin"
    folder = publish(tmp_path / "published", TINY_CONFIG, tiny_weights(), kind)
    file = (folder / f"{MODEL}.{kind}").rename(folder / name)
    file.write_bytes(file.read_bytes()[:-2000] if what == "truncated" else DAMAGED[what])
    line = error_line(cli(*SAMPLE, file))
    assert what in line and name in line and "run code" not in line


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_data_say_what_they_are(cli, tmp_path, what):
    folder = publish(tmp_path / "published", TINY_CONFIG, tiny_weights())
    (folder / "config.json").write_bytes(DAMAGED[what])
    assert what in error_line(cli(*SAMPLE, folder))
    (tmp_path / "a.npy").write_bytes(DAMAGED[what])
    assert what in error_line(cli(*TINY, "--dataset", "folder", "--data-root", "a.npy"))
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(DAMAGED[what])
    result = cli(*TINY, "--dataset", "folder", "--data-root", "in")
    assert result.code == 2 and f"the first one is {'damaged: ' * (what == 'empty file')}a" in result.err


JUNK = [b"\x1f\x8b\x08\0\0", b"\x89PNG\r\n\x1a\n", b'{"a": 1}', b"hello", bytes(100), b"\x93NUMPY\x01"]


@pytest.mark.parametrize("content", JUNK)
def test_other_files_are_not_said_to_run_code(cli, tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    line = error_line(cli(*SAMPLE, "x.pt"))
    assert "is damaged or no PyTorch file" in line and "run code" not in line


# 11. Links and folders that can't be read -------------------------------------------------------------------
@pytest.mark.skipif(os.name == "nt", reason="links take rights on Windows")
def test_linked_folders_are_read_and_circles_end(tmp_path, capsys):
    for i in range(10):
        save(tmp_path / f"store/{i}.png")
    for i in range(2):
        save(tmp_path / f"in/cat/{i}.png")
    save(tmp_path / "in/dog/0.png")
    (tmp_path / "in/cat/more").symlink_to(tmp_path / "store")
    (tmp_path / "in/cat/self").symlink_to(tmp_path / "in/cat")
    (tmp_path / "in/cow").symlink_to(tmp_path / "store")
    (tmp_path / "in/dog/gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "in/eel").symlink_to(tmp_path / "nowhere")
    data = utils.get_data("folder", tmp_path / "in", image_size=8, cache_dir=tmp_path / "cache")
    assert data.class_names == ["cat", "cow", "dog"] and data.labels.bincount().tolist() == [12, 10, 1]
    err = capsys.readouterr().err
    assert "1 missing images" in err and "eel is left out" in err


def test_a_class_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    for name in ("cat", "dog"):
        save(tmp_path / "in" / name / "0.png")
    real = Path.iterdir

    def refuse(path):
        if path.name == "dog":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(UserError, match=r"dog can't be read \(Permission denied\)"):
        utils.get_data("folder", tmp_path / "in", image_size=8, cache_dir=tmp_path / "cache")


@pytest.mark.skipif(os.name == "nt", reason="links take rights on Windows")
def test_links_between_classes_end_and_take_no_others_images(tmp_path):
    for k in range(9):
        save(tmp_path / f"in/{k}/a.png")
    for k in range(9):
        for other in range(9):
            (tmp_path / f"in/{k}/to{other}").symlink_to(tmp_path / f"in/{other}")
        (tmp_path / f"in/{k}/up").symlink_to(tmp_path / "in")
    started = time.monotonic()
    data = utils.get_data("folder", tmp_path / "in", image_size=8, cache_dir=tmp_path / "cache")
    assert data.labels.bincount().tolist() == [9] * 9 and time.monotonic() - started < 20


def test_an_image_that_may_not_be_read_is_skipped(tmp_path, monkeypatch, capsys):
    for name in ("a", "b"):
        save(tmp_path / f"in/{name}.png")
    real = open

    def refuse(path, *args, **options):
        if str(path).endswith("a.png"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *args, **options)

    monkeypatch.setattr("builtins.open", refuse)
    data = utils.get_data("folder", tmp_path / "in", image_size=8, cache_dir=tmp_path / "cache")
    assert len(data.images) == 1 and "1 unreadable" in capsys.readouterr().err


# 12. Memory while decoding ----------------------------------------------------------------------------------
def test_decoding_takes_memory_by_bytes(tmp_path, monkeypatch):
    asked, real = [], np.empty

    def watched(shape, *args, **options):
        asked.append(int(np.prod(shape)))
        return real(shape, *args, **options)

    for i in range(3):
        save(tmp_path / f"in/{i}.png")
    monkeypatch.setattr(cache.np, "empty", watched)
    for size in (1024, 16):
        utils.get_data("folder", tmp_path / "in", image_size=size, cache_dir=tmp_path / "cache")
        assert max(asked) <= 3 * 3 * size**2
        asked.clear()
    monkeypatch.setattr(cache, "CHUNK", 2 * 3 * 32**2)
    data = utils.get_data("folder", tmp_path / "in", image_size=32, cache_dir=tmp_path / "cache")
    assert max(asked) <= 2 * 3 * 32**2 and data.images.shape == (3, 3, 32, 32)


# 13. Skipped files ------------------------------------------------------------------------------------------
def test_skipped_files_are_counted_and_the_first_are_listed(tmp_path, capsys):
    save(tmp_path / "in/a.png")
    names = ["a.png", *(f"gone{i:04d}.png" for i in range(2000)), *(f"bad{i}.png" for i in range(7))]
    for i in range(7):
        (tmp_path / f"in/bad{i}.png").write_bytes(b"broken")
    entries = [json.dumps({"file_name": name, "text": "a"}) for name in names]
    (tmp_path / "in/metadata.jsonl").write_text("\n".join(entries))
    data = utils.get_data("folder", tmp_path / "in", image_size=8, cache_dir=tmp_path / "cache")
    err = capsys.readouterr().err
    assert len(data.images) == 1 and len(data.skipped) == 2007 and len(err.splitlines()) < 20
    assert "2000 missing images" in err and "7 unreadable images" in err and "gone0000.png" in err
    assert "and 1995 more" in err and "gone0100.png" not in err


# 14, 15. Published weights ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "field, value",
    [
        *[("rescale_betas_zero_snr", True), ("thresholding", True), ("use_karras_sigmas", True)],
        *[("variance_type", "learned_range"), ("clip_sample_range", 2.0), ("trained_betas", [0.1])],
        *[("something_new", 3), ("timestep_scaling", 10.0), ("_class_name", "UnCLIPScheduler")],
    ],
)
def test_what_changes_numbers_in_a_published_scheduler_is_refused(cli, tmp_path, field, value):
    folder = publish(tmp_path / "published", TINY_CONFIG, tiny_weights(), "bin")
    (folder / "scheduler_config.json").write_text(json.dumps({field: value}))
    line = error_line(cli(*SAMPLE, folder))
    assert f"scheduler_config.json: {field} is" in line


def test_what_changes_no_number_in_a_published_scheduler_is_read(cli, tmp_path):
    folder = publish(tmp_path / "published", TINY_CONFIG, tiny_weights(), "bin")
    harmless = {"_class_name": "DDPMScheduler", "clip_sample": True, "variance_type": "fixed_large"}
    harmless |= {"rescale_betas_zero_snr": False, "thresholding": False, "timestep_spacing": "leading"}
    (folder / "scheduler_config.json").write_text(json.dumps(harmless | {"clip_sample_range": 1.0}))
    assert cli(*SAMPLE, folder).code == 0


@pytest.mark.parametrize("field", ["time_embedding_dim", "mid_block_type", "only_cross_attention"])
def test_what_changes_a_published_network_is_refused(cli, tmp_path, field):
    folder = publish(tmp_path / "published", {**TINY_CONFIG, field: 64}, tiny_weights(), "bin")
    assert f"config.json: {field} is 64" in error_line(cli(*SAMPLE, folder))


def test_published_weights_are_no_run(cli, conditional, tmp_path):
    folder = publish(tmp_path / "published", TINY_CONFIG, tiny_weights(), "bin")
    for result in (cli("--resume", folder), conditional("--init", folder, *TINY)):
        line = error_line(result)
        assert "published weights: a run of this project is needed" in line and "no checkpoint" not in line


@pytest.mark.parametrize(
    "name",
    [
        "diffusion_pytorch_model.fp16.safetensors",
        "diffusion_pytorch_model-00001-of-00002.safetensors",
        "diffusion_pytorch_model.fp16.bin",
    ],
)
def test_other_files_of_a_pipeline_are_named(cli, tmp_path, name):
    folder = publish(tmp_path / "pipeline/unet", TINY_CONFIG, tiny_weights(), "bin")
    (folder / "diffusion_pytorch_model.bin").rename(folder / name)
    (tmp_path / "pipeline/model_index.json").write_text("{}")
    for path in (tmp_path / "pipeline", folder):
        line = error_line(cli(*SAMPLE, path))
        assert name in line and "rename" in line


# 16. The flag that an error names ---------------------------------------------------------------------------
WRONG = """
import sys
import analysis, ddpm, ddpm_conditional, edit
from support.errors import run_main
for line in sys.argv[1:]:
    script, *sys.argv[1:] = line.split()
    try:
        run_main(sys.modules[script].main)
    except SystemExit as end:
        assert end.code == 2
"""


def test_the_flag_that_an_error_names_is_always_the_same(tmp_path):
    resume = f"--resume {PROJECT / 'tests/fixtures/old_run'}"
    commands = [
        "ddpm --sample 1 --checkpoint x --lr 1 --epochs 3 --noise-steps 5",
        f"ddpm --seed 3 --width 8 --noise-steps 9 --lr 0.1 --image-size 9 {resume}",
        "ddpm --eta 1 --variance beta --runge-kutta --sigma 1 --p2-k 3",
        "ddpm_conditional --batches 2 --labels 1 --guidance cfg --animate",
        "edit sdedit --checkpoint x --image x --guidance-scale 2 --guidance-rescale 1",
        "analysis denoise x --dataset digits --image-size 8",
    ]
    found = [python(WRONG, *commands, cwd=tmp_path, wait=False, PYTHONHASHSEED=str(k)) for k in (1, 2, 5)]
    errors = {process.communicate(timeout=120)[1] for process in found}
    assert len(errors) == 1 and errors.pop().count("error: ") == len(commands)


# 17. Small ones ---------------------------------------------------------------------------------------------
def test_other_suffixes_of_images(tmp_path, capsys):
    save(tmp_path / "in/a.jfif", format="JPEG")
    save(tmp_path / "in/b.jpe", format="JPEG")
    read = ["a.jfif", "b.jpe"]
    if "AVIF" in images.IMAGE_FORMATS:
        save(tmp_path / "in/c.avif")
        read.append("c.avif")
    (tmp_path / "in/d.heic").write_bytes(b"a photograph of a telephone")
    data = utils.get_data("folder", tmp_path / "in", image_size=8, cache_dir=tmp_path / "cache")
    assert len(data.images) == len(read) and [Path(p).name for p in data.skipped] == ["d.heic"]
    assert "d.heic" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["cars.zip", "images.npz", "photo.png"])
def test_a_file_that_is_there_is_not_said_to_be_missing(cli, tmp_path, name):
    (tmp_path / name).write_bytes(b"PK")
    line = error_line(cli(*TINY, "--dataset", "folder", "--data-root", name))
    assert f"{name} is a file" in line and "does not exist" not in line


@pytest.mark.parametrize("mark", [";", "\t"])
def test_a_log_that_a_spreadsheet_saved(cli, mark):
    assert cli(*TINY).code == 0
    log = Path(RUN, "log.csv")
    before = list(csv.reader(open(log)))
    text = "\n".join(mark.join(cell.replace(".", ",") for cell in row) for row in before)
    log.write_text(text, encoding="utf-8-sig")
    assert read_csv(log) == before
    state = torch.load(f"{RUN}/ckpt.pt", weights_only=True)
    del state["log"]  # as in runs made before rows were kept there
    torch.save(state, f"{RUN}/ckpt.pt")
    assert cli("--resume", RUN, "--epochs", 3).code == 0
    after = list(csv.reader(open(log)))
    assert after[:3] == before and [row[0] for row in after[1:]] == ["1", "2", "3"]


def test_bars_write_little_into_a_file(cli, tmp_path):
    """Decoding 150 images and sampling 40 images one by one, where stderr is no terminal."""
    for i in range(150):
        save(tmp_path / f"in/{i}.png")
    result = cli(*TINY, "--dataset", "folder", "--data-root", "in", "--limit", 150, "--epochs", 1)
    assert result.code == 0 and result.err.count("\r") < 15, result.err
    sampling = ("--sample", 40, "--batch-size", 1, "--sample-steps", 10)
    result = cli(*sampling, "--checkpoint", "runs/ddpm_folder")
    assert result.code == 0 and result.err.count("\r") < 15, result.err


def test_a_resumed_run_takes_the_optimizer_of_its_own_device(tmp_path, monkeypatch):
    """A run of a CPU goes on where the fused AdamW does not exist, as on MPS."""
    net = torch.nn.Linear(1, 1)
    made = []

    def make():
        data = loader.Loader(torch.zeros(4, 1, 2, 2, dtype=torch.uint8), 2)
        how = trainer.TrainingSettings(epochs=1, save_every=1)
        made.append(trainer.Trainer(net, lambda net, decay: Averaged(net), data, tmp_path, how))
        return made[-1]

    class Averaged:
        def __init__(self, net):
            self.net = net

        def update(self, *args):
            pass

    first = make()
    first.keep = {"kind": "x", "config": {}, "data": ""}
    first.optimizer.param_groups[0]["fused"] = False  # as made on MPS
    first.save()
    second = make()
    second.resume(torch.load(tmp_path / "ckpt.pt", weights_only=True))
    assert second.optimizer.param_groups[0]["fused"] is True


def test_a_schedule_that_leaves_nothing_gets_a_note(cli):
    """constant at T = 10: beta = 0.999 at each step, and x_0 can't be read off x_T in float32."""
    result = cli(*TINY, "--schedule", "constant", "--noise-steps", 10, "--sampler", "pndm")
    assert result.code == 0 and "float32 can't resolve" in result.err and "--noise-steps" in result.err
    assert "can't resolve" not in cli(*TINY, "--schedule", "constant", "--noise-steps", 1000).err


def test_a_study_of_an_edited_log(script):
    assert script(ddpm, *TINY).code == 0
    with open(f"{RUN}/log.csv", "a") as file:
        file.write('3,,,,\nTotal,-,x,"1,5",1.234.567\n')
    result = script(analysis, "losses", RUN, "--device", "cpu", "--images", 4)
    assert result.code == 0, result.err


def test_edits_take_a_spacing(script):
    assert script(ddpm, *TINY, "--noise-steps", 200).code == 0
    save(Path("a.png"))
    captions = []
    for spacing in ("even", "log_snr"):
        flags = ("--image", "a.png", "--i-start", 3, "--spacing", spacing, "--device", "cpu")
        assert script(edit, "sdedit", "--checkpoint", RUN, *flags, "--out", spacing).code == 0
        captions.append(np.asarray(Image.open(f"{spacing}/00000.png")).tolist())
    assert captions[0] != captions[1]


# 18. A busy machine -----------------------------------------------------------------------------------------
def test_waiting_threads_are_bounded_and_the_users_own_settings_are_kept(tmp_path):
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    code = f"import support.environment, os; print(*[os.environ.get(name) for name in {names}])"
    cases = {
        (): "None 100000 1",
        (("OMP_WAIT_POLICY", "ACTIVE"),): "ACTIVE None None",
        (("GOMP_SPINCOUNT", "7"),): "None 7 1",
        (("KMP_BLOCKTIME", "200"),): "None 100000 200",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.delenv(name, raising=False)
        for own, expected in cases.items():
            _, out, err = python(code, cwd=tmp_path, **dict(own))
            assert out.strip() == expected, err


def test_every_script_sets_them_before_torch_is_imported(tmp_path):
    for name in ("ddpm", "ddpm_conditional", "analysis", "edit"):
        nodes = ast.parse((PROJECT / f"{name}.py").read_text(encoding="utf-8")).body
        first = next(node for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom)))
        assert [alias.name for alias in first.names] == ["support.environment"]
    code = """
import os, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"), os.environ.get("KMP_BLOCKTIME"))
            sys.meta_path.remove(self)
sys.meta_path.insert(0, Watch())
import edit
"""
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
            patch.delenv(variable, raising=False)
        _, out, err = python(code, cwd=tmp_path)
    assert out.split() == ["100000", "1"], err
