"""Settings as dataclasses, one field a setting, and the command line that is made from them.

    @settings(resume=True)
    class SamplerSettings:
        eta: float = setting(0.0, "share of fresh noise", "E", real(0, 1), of="sampler=ddim")

A field's metadata are what argparse takes, and `of`, the choices that it belongs to, spaces between them
(elsewhere it is refused); `resume`, whether it may change when a run goes on; `sample`, whether it may be
typed beside --sample, or "only" there. `settings` takes what all fields of a class have of these.
"""

import argparse
import math
from collections.abc import Callable, Container, Iterable
from contextlib import suppress
from dataclasses import Field, dataclass, field, fields
from functools import partial
from typing import NoReturn

from .errors import UserError

WIDE = partial(argparse.RawDescriptionHelpFormatter, max_help_position=34, width=120)
PLAIN = {"formatter_class": WIDE, "allow_abbrev": False, "argument_default": argparse.SUPPRESS}
OURS = ("of", "resume", "sample", "default")  # what of a field's metadata is not argparse's


def setting(default: object, help: str, metavar=None, type=None, of="", **metadata) -> Field:
    """A field of a settings dataclass: its default, its line of --help, and the metadata above."""
    make = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    given = {key: value for key, value in (("metavar", metavar), ("type", type)) if value is not None}
    return field(**make, metadata={"help": help, "default": default, "of": of.split(), **given, **metadata})


def settings(of: str = "", **common) -> Callable[[type], type]:
    """A dataclass of settings, with metadata that all its fields have."""

    def make(group: type) -> type:
        for row in fields(group := dataclass(group)):
            row.metadata = {**common, **row.metadata, "of": of.split() + row.metadata["of"]}
        return group

    return make


def rows_of(group: type) -> dict[str, dict]:
    """The metadata of each field of a settings dataclass, and its default, by name."""
    return {row.name: dict(row.metadata) for row in fields(group)}


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line; with PLAIN it holds only what was typed, and its help is wide."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def add_settings(parser: Parser, groups: dict[str, type]) -> None:
    """Add a flag for each field of the dataclasses, {title: dataclass}, with its default in its help."""
    for title, group in groups.items():
        add = parser.add_argument_group(title).add_argument
        for name, row in ((row.name, row.metadata) for row in fields(group)):
            options, default = {key: value for key, value in row.items() if key not in OURS}, row["default"]
            whose = [f"--{of}: ".replace("=", " ") for of in row["of"] if not of.startswith("task=diffusion")]
            options["help"] = "".join(whose or ["--sample: "] * (row.get("sample") == "only")) + row["help"]
            if default is False:
                options.setdefault("action", "store_true")
            elif default is not None and "(default" not in options["help"]:
                shown = ",".join(map(str, default)) if isinstance(default, list) else default
                options["help"] += f" (default: {shown})"
            add("--" + name.replace("_", "-"), **options)


def parse(description: str, groups: dict[str, type]) -> "Command":
    """The command line of a script, with a flag for each field of the dataclasses, {title: dataclass}."""
    parser = Parser(description=description, usage="%(prog)s [flags]", **PLAIN)
    add_settings(parser, groups)
    return Command(vars(parser.parse_args()), groups.values())


class Command:
    """What a command line asks for: an object of each dataclass, the names typed, the metadata by name."""

    def __init__(self, typed: dict[str, object], groups: Iterable[type]):
        own = {group: {row.name: row.metadata for row in fields(group)} for group in groups}
        self.groups = [kind(**{name: typed[name] for name in typed.keys() & own[kind]}) for kind in own]
        self.typed, self.rows = set(typed), {name: row for rows in own.values() for name, row in rows.items()}

    def __getitem__(self, key: str | type) -> object:
        """The setting of that name, or the object of that dataclass."""
        if isinstance(key, str):
            return next(getattr(group, key) for group in self.groups if key in vars(group))
        return next(group for group in self.groups if isinstance(group, key))

    def settle(self, values: dict, typed: bool = False) -> None:
        """Set what was not typed, or that as well; names in a tuple are set together or not at all."""
        for names, value in values.items():
            names, value = (names, value) if isinstance(names, tuple) else ((names,), (value,))
            for group in self.groups if typed or not self.typed & set(names) else ():
                for name, one in zip(names, value, strict=True):
                    if name in vars(group):
                        setattr(group, name, one)

    def config(self) -> dict[str, object]:
        """The settings of the run alone, as its checkpoints keep them."""
        sampling = {name for name, row in self.rows.items() if row.get("sample") == "only"}
        return {name: self[name] for name in self.rows if name not in sampling | {"resume", "sample"}}

    def check(self, owners: bool = True) -> None:
        """UserError for a typed flag that has no effect, with `owners` also for one of a choice not made."""
        sampling = "sample" in self.rows and self["sample"] is not None
        if sampling and self["checkpoint"] is None:
            raise UserError("--sample needs --checkpoint RUN, the folder of the run to sample from")
        for name in sorted(self.typed & self.rows.keys()):
            row, typed = self.rows[name], flag(name)
            if not sampling and row.get("sample") == "only":
                raise UserError(f"{typed} goes with --sample N, the number of images to draw")
            if sampling and not row.get("sample"):
                raise UserError(f"{typed} comes from the checkpoint when sampling: leave it out")
            for choice in row["of"] if owners else ():
                owner, *valid = choice.replace("=", "/").split("/")  # of owner=one, or owner=one/other
                if owner in self.rows and str(self[owner]) not in valid:
                    raise UserError(f"{typed} belongs to {flag(owner)} {valid[0]}: add that, or leave it out")

    def take_from(self, config: dict, free: set[str] | None = None) -> None:
        """Take the settings of a run, but for those typed among `free`; UserError for another one typed."""
        free = free or {name for name, row in self.rows.items() if row.get("resume")}  # which --resume takes
        for name in (name for name in sorted(self.typed - free) if self[name] != config.get(name)):
            made = f"the run was made with {flag(name)} {config.get(name)}, not {self[name]}"
            raise UserError(f"{made}: leave the flag out, or start afresh")
        self.settle({name: value for name, value in config.items() if name in self.config()})


# Types of flags, for argparse.
def number(kind: type, low: float, high: float = math.inf, above: bool = False) -> Callable[[str], float]:
    """A number of the kind int or float in [low, high], or in (low, high] if `above`."""
    name = "a whole number" if kind is int else "a number"
    span = (f"above {low:g}" if above else f"of at least {low:g}") + f", at most {high:g}" * (high < math.inf)

    def parse(text: str) -> float:
        with suppress(ValueError):
            if low <= (value := kind(text)) <= high and math.isfinite(value) and not (above and value == low):
                return value
        raise argparse.ArgumentTypeError(f"{text!r}: expected {name} {span}")

    return parse


def listed(kind: Callable[[str], object], names: Container[str] | None = None) -> Callable[[str], list]:
    """Values of that kind, or of those `names`, with commas between them."""

    def parse(text: str) -> list:
        values = [kind(part.strip()) for part in text.split(",") if part.strip()]
        if unknown := [value for value in values if names is not None and value not in names]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(names)}")
        if not values:
            raise argparse.ArgumentTypeError(f"{text!r}: expected values with commas between them")
        return values

    return parse


whole, real = partial(number, int), partial(number, float)
COUNT, POSITIVE, SWITCH = whole(1), real(0, above=True), argparse.BooleanOptionalAction
OLDER = {"patch": 1, "places": False, "adagn": False, "text_kernel": 0}  # of runs from before these
