"""Run every command in README.md and docs/ once, in a short version: no documented command is dead.

    python tests/run_commands.py                 all of them, in five minutes
    python tests/run_commands.py --only edit.py  those with these words, and the trainings that come first

Test runs are made in a temporary folder, from data sets of noise. The suite only parses the commands
(tests/test_docs.py). Those of tests/ take minutes, and a report is made in tests/test_analysis.py.
"""

import argparse
import os
import re
import shlex
import struct
import sys
import tempfile
import traceback
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import analysis
import ddpm
import ddpm_conditional
import edit
from support.errors import run_main

PROJECT = Path(__file__).resolve().parent.parent
SCRIPTS = {f"{module.__name__}.py": module for module in (ddpm, ddpm_conditional, analysis, edit)}
COMMAND = re.compile(r"`(python [^`]+)`|^ {4}(?:[^\n]* )?(python [^\n]+)$", re.MULTILINE)
TRAIN = """--width 8 --multipliers 1 2 --blocks 1 --attention 1 --patch 1 --limit 48 --batch-size 8 --epochs 1
--precision fp32 --device cpu"""
SHORT = {  # flags that are appended, for of two of a name the last one counts
    "noise": "--images 2 --draws 2 --sample-steps 2 --samplers ddim",
    "samplers": "--samplers ddim --schedules linear",
    "guidance": "--per-label 2 --guidance-scale 0,2 --sample-steps 2",
    "evaluate": "--samples 20 --sample-steps 2",
    "losses": "--images 4",
    "score": "--langevin-levels 3 --inner 2 --point-epochs 1",
    "forward": "--noise-steps 50 --schedules linear,cosine",
    "schedules": "--noise-steps 50",
    "weights": "--noise-steps 50",
    "sds": "--steps 4 --draws 2",
    "anagram": "--draws 2",
    "hybrid": "--draws 2",
}
A_CAR = "a photo of a 2012 Jeep Wrangler SUV"
CARS = """Ferrari 458 Italia Convertible 2012,Lamborghini Diablo Coupe 2001,Ford F-150 Regular Cab 2012,
Mercedes-Benz Sprinter Van 2012,HUMMER H2 SUT Crew Cab 2009,Rolls-Royce Phantom Sedan 2012,
FIAT 500 Convertible 2012,Dodge Caliber Wagon 2007,Jeep Wrangler SUV 2012""".replace("\n", "").split(",")


def documented() -> list[tuple[str, ...]]:
    """The commands as tuples of words, each once, in the order of the documents."""
    found = {}
    for path in (PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))):
        text = path.read_text("utf-8").replace("\\\n", " ")
        for inline, line in COMMAND.findall(text):
            command = re.split(" && | > ", inline or line)[0]
            if not re.match(r"python (-[cm] |(analysis|edit).py$|analysis.py report)", command):
                found[tuple(shlex.split(command)[1:])] = None  # a report is made in test_analysis.py
    return [*found]


def is_training(words: tuple[str, ...]) -> bool:
    other = {"--sample", "--resume", "--help"} & {*words}
    return words[0] in ("ddpm.py", "ddpm_conditional.py") and not other


def with_names(words: tuple[str, ...]) -> list[str]:
    """The flags with names of our own for RUN, FILE, DIR, ..., and without what takes minutes."""
    text, image = " ".join(words), "image.png"
    data = "mnist" if "0,0,14,28" in text else "digits"
    run = "runs/ddpm_digits" if words[0] != "edit.py" else f"runs/ddpm_conditional_{data}"
    run = "runs/ddpm_stanfordcars" if "colourise" in text else run
    run = "runs/ddpm_conditional_shapes" if "--prompt" in text else run
    judge, prompt = f"runs/classifier_{data}", A_CAR if "cars" in text else "a red circle"
    names = {"RUN": run, "CLASSIFIER": judge, "NAME": "linear", "STUDY": "noise", "TASK": "sdedit"}
    names |= {"FILE": image, "A": image, "B": image, "DIR": "out", "--compile": ""}
    names |= {"...": prompt if "--prompt" in text else "", "linear,strong_start": "linear"}
    flags = []
    for before, word in pairwise(words):
        name = judge if (before, word) == ("--classifier", "RUN") else names.get(word, word)
        flags += [image if re.search(r"\.(png|jpg)$", name) else name] if name else []
    return flags + [prompt] * (flags[-1:] == ["--prompt"])


def shortened(words: tuple[str, ...]) -> list[str]:
    """The flags of a version that takes a second or two."""
    flags, text, script = with_names(words), " ".join(words), words[0]
    if "--help" in flags:
        return flags
    if is_training(words):
        flags += TRAIN.split()
        diffusion = not {"autoencoder", "denoiser"} & {*flags}
        flags += ["--noise-steps", "1000" if "cars" in text else "50"] if diffusion else []
        return flags + (["--sample-steps", "2"] if diffusion and "classifier" not in flags else [])
    flags += ["--device", "cpu"]
    if "--out" in flags:
        flags += ["--out", re.sub("[^a-z0-9]+", "_", text)[-60:]]
    if "--sample" in flags:
        return [*flags, "--sample", "4", "--sample-steps", "2"]
    flags += SHORT.get(flags[0], "").replace("--images 2" * ("--image" in flags), "").split()
    flags += ["--samples", "20"] if flags[0] == "samplers" and "--classifier" in flags else []
    flags += ["--out", "studies"] if script == "analysis.py" and "--out" not in flags else []
    flags += ["--sample-steps", "3"] if script == "edit.py" and flags[0] != "sds" else []
    return flags + (["--box", "4,4,4,4"] if "--box" in flags and "256" in text else [])


def run(words: tuple[str, ...]) -> bool:
    """Run a command here, as its command line does; -> whether it worked."""
    argv, sys.argv = sys.argv, [words[0], *shortened(words)]
    print(f"\n$ python {shlex.join(sys.argv)}", flush=True)
    try:
        run_main(SCRIPTS[words[0]].main)
    except SystemExit as end:
        if end.code == 130:  # Ctrl-C
            raise
        return not end.code
    except Exception:
        traceback.print_exc()
        return False
    finally:
        sys.argv = argv
    return True


def write_data(folder) -> None:
    """Data sets in their layouts, of noise, an image, and published weights."""
    rng = np.random.default_rng(0)
    (folder / "data/MNIST/raw").mkdir(parents=True)
    for split in ("train", "t10k"):
        images, labels = rng.integers(0, 256, (60, 28, 28)), np.arange(60) % 10
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            head = struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape)
            file = folder / f"data/MNIST/raw/{split}-{name}-ubyte"
            file.write_bytes(head + array.astype(np.uint8).tobytes())
    for i, name in enumerate(CARS * 6):
        (file := folder / f"data/stanford_cars/train/{name}/{i:05d}.png").parent.mkdir(
            parents=True, exist_ok=True
        )
        Image.fromarray(rng.integers(0, 256, (48, 64, 3)).astype(np.uint8)).save(file)
    Image.fromarray(rng.integers(0, 256, (32, 32, 3)).astype(np.uint8)).save(folder / "image.png")
    from test_published import TINY_CONFIG, publish, tiny_weights
    from test_published_ldm import publish_ldm

    publish(folder / "ddpm-celebahq-256", TINY_CONFIG, tiny_weights())
    publish_ldm(folder / "ldm-celebahq-256")


def in_order(commands: list[tuple[str, ...]]) -> Iterator[tuple[str, ...]]:
    """Trainings first, and of these autoencoders before runs in their latents."""
    return iter(sorted(commands, key=lambda words: (not is_training(words), "--latent" in words)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="words that a command has (besides trainings)")
    only = parser.parse_args().only
    commands = [words for words in documented() if words[0] in SCRIPTS]
    commands = [words for words in commands if is_training(words) or only in " ".join(words)]
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder))
        os.chdir(folder)
        failed = [words for words in in_order(commands) if not run(words)]
        os.chdir(PROJECT)
    print(f"\n{len(commands) - len(failed)} of {len(commands)} documented commands work")
    for words in failed:
        print(f"failed: python {shlex.join(words)}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
