import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

import ddpm
import ddpm_conditional
from support.errors import run_main

PROJECT = Path(__file__).resolve().parent.parent
TINY = (  # a network and a run that train in a second or two
    "--limit 48 --batch-size 16 --epochs 2 --width 8 --multipliers 1 2 --blocks 1 --attention 1 "
    "--noise-steps 20 --sample-steps 2 --image-size 8 --device cpu"
).split()


@dataclass
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def script(tmp_path, monkeypatch, capsys):
    """Run `MODULE.py ...` in an empty folder, as the command line does; -> exit status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(module, *args: str) -> Result:
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, args)])
        capsys.readouterr()
        code = 0
        try:
            run_main(module.main)
        except SystemExit as end:
            code = end.code or 0
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture
def cli(script):
    return partial(script, ddpm)


@pytest.fixture
def conditional(script):
    return partial(script, ddpm_conditional)


def run_in(folder: Path, module, *args: str) -> Path:
    """Run `MODULE.py ...` in a folder, for runs that many tests share; -> the folder."""
    before, argv = os.getcwd(), sys.argv
    os.chdir(folder)
    sys.argv = [f"{module.__name__}.py", *map(str, args)]
    try:
        module.main()
    finally:
        sys.argv = argv
        os.chdir(before)
    return folder


@pytest.fixture
def data_root() -> Path:
    """The folder of real data that DATA_ROOT names; the test is skipped without it."""
    if "DATA_ROOT" not in os.environ:
        pytest.skip("DATA_ROOT is not set")
    return Path(os.environ["DATA_ROOT"])


def error_line(result: Result) -> str:
    """The one line on stderr of a run that a user's error ended."""
    lines = [line for line in result.err.splitlines() if "error:" in line]
    assert result.code == 2, result
    assert len(lines) == 1 and "Traceback" not in result.err and "usage:" not in result.err, result.err
    return lines[0]
