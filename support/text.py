"""Captions as tokens, and labels by their names."""

import difflib
import re
from collections import namedtuple
from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import UserError
from .images import CAPTION
from .settings import listed, setting, settings

PAD, END = 0, 1  # the tokens that are no words: padding, and the end of every caption
MAX_WORDS = 127  # in a caption


@settings(sample="only")
class ConditionSettings:
    labels: list | None = setting(None, "class numbers or names: 0,3,7 (default: all)", "LIST", listed(str))
    prompt: list | None = setting(None, "captions, each in quotes", "CAPTION", nargs="+", action="extend")


def words_of(caption: str) -> list[str]:
    """The words of a caption, in lower case and without the punctuation around them."""
    return [word for part in caption.lower().split() if (word := part.strip(".,:;!?\"'()"))]


class Vocabulary(namedtuple("Vocabulary", "words max_tokens")):  # max_tokens is L
    """The words of a model's captions. The tokens (L,) of a caption are those of its words, END, then PAD."""

    @classmethod
    def of(cls, captions: Sequence[str]) -> "Vocabulary":
        """All the words of the captions; L fits the longest of them. UserError if that is too long."""
        longest = max(captions, key=lambda caption: len(words_of(caption)))
        if (length := len(words_of(longest))) > MAX_WORDS:
            what = f"the caption {longest[:60]!r}... has {length} words"
            raise UserError(f"{what}: shorten it to {MAX_WORDS}, as all take the memory of the longest")
        return cls(sorted({word for caption in captions for word in words_of(caption)}), length + 1)

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Tokens (B, L) int64; UserError for a word that is not in the vocabulary, or a caption too long."""
        tokens = torch.full((len(captions), self.max_tokens), PAD)
        number = {word: token for token, word in enumerate(self.words, start=END + 1)}
        for row, caption in zip(tokens, captions, strict=True):
            words = words_of(caption)
            if unknown := [word for word in words if word not in number]:
                known = f"the nearest it knows: {nearest(unknown[0], self.words)}"
                known += f"; all: {', '.join(self.words)}" if len(self.words) < 100 else ""
                raise UserError(f"{caption!r}: the model knows no word {unknown[0]!r}; {known}")
            if len(words) >= self.max_tokens:
                most = f"at most {self.max_tokens - 1}, as many as its longest training caption has"
                raise UserError(f"{caption!r} has {len(words)} words; the model reads {most}: shorten it")
            row[: len(words) + 1] = torch.tensor([*map(number.get, words), END])
        return tokens


def word_codes(names: Sequence[str], size: int) -> Tensor:
    """The sum of random codes of each name's words, over the root of their number; K names -> (K, size)."""
    tokens = Vocabulary.of(names).encode(names)  # (K, L)
    codes = torch.randn(int(tokens.max()) + 1, size)
    codes[[PAD, END]] = 0
    return codes[tokens].sum(1) / (tokens > END).sum(1, keepdim=True).clamp(min=1).sqrt()


def nearest(word: str, known: Sequence[str]) -> str:
    """The five known words most like a word, as a list to read."""
    lower = {name.lower(): name for name in known}
    return ", ".join(lower[name] for name in difflib.get_close_matches(word.lower(), lower, n=5, cutoff=0))


def find_label(text: str, class_names: Sequence[str]) -> int:
    """The label of a class name, in any case, or of a number; UserError if there is none."""
    for wanted, names in ((text, class_names), (text.lower(), [name.lower() for name in class_names])):
        if wanted in names:
            return names.index(wanted)
    count = len(class_names)
    numbers = [name for name in class_names if re.fullmatch(r"[+-]?\d+([.,]\s?\d+)?(e[+-]?\d+)?\s?%?", name)]
    if 2 * len(numbers) > count and list(class_names) != [str(k) for k in range(count)]:
        raise UserError(f"{text!r} is no class of the model; its classes are {', '.join(class_names)}")
    if re.fullmatch(r"[+-]?[0-9]+", text):
        if 0 <= int(text) < count:
            return int(text)
        raise UserError(f"label {text} is out of range: the model's labels are 0 to {count - 1}")
    known = nearest(text, class_names)
    raise UserError(f"{text!r} is no class of the model; the nearest: {known} (or give its number)")


def find_labels(parts: Sequence[str], class_names: Sequence[str]) -> list[int]:
    """The labels that were typed with commas between them; a name with commas in it takes several parts."""
    names, found = [", ".join(part.strip() for part in name.split(",")) for name in class_names], []
    lower = {name.lower() for name in names}
    while parts:
        taken = next((n for n in range(len(parts), 1, -1) if ", ".join(parts[:n]).lower() in lower), 1)
        found.append(find_label(", ".join(parts[:taken]), names))
        parts = parts[taken:]
    return found


def check_has(data, name: str, what: str) -> None:
    """UserError, with what to do, where a data set has no labels, or no captions."""
    other, condition = ("captions", "text") if what == "labels" else ("labels", "label")
    read = f"labels are read from sub-folders, one a class, captions from a metadata.jsonl of {CAPTION}; or "
    cure = read * (name == "folder") + "choose another --dataset"
    cure = f"train it with --condition {condition}" if getattr(data, other) is not None else cure
    if getattr(data, what) is None:
        raise UserError(f"data set {name} has no {what}: {cure}")


def by_label(data, name: str) -> tuple[Tensor, list[str], Tensor, dict]:
    """Labels (N,), names and labels of ten classes for previews, entries of a checkpoint; else UserError."""
    check_has(data, name, "labels")
    shown = sorted({round(k * (len(data.class_names) - 1) / 9) for k in range(10)})
    return data.labels, [data.class_names[k] for k in shown], torch.tensor(shown), {}


def by_caption(data, name: str) -> tuple[Tensor, list[str], Tensor, dict]:
    """The same for captions: their tokens (N, L), in a vocabulary made from all of them."""
    check_has(data, name, "captions")
    vocabulary, shown = Vocabulary.of(data.captions), list(dict.fromkeys(data.captions))[:8]
    keep = {"vocabulary": vocabulary._asdict(), "examples": shown}
    return vocabulary.encode(data.captions), shown, vocabulary.encode(shown), keep


def conditions(path: str, config: dict, wanted: ConditionSettings) -> tuple[list[str], Tensor]:
    """R names and y (R, ...) of --labels or --prompt, else of all classes or `examples`; else UserError."""
    labels, prompt, names = wanted.labels, wanted.prompt, config["class_names"]
    if config.get("condition") == "text":
        if labels:
            raise UserError("--labels: this model was trained on captions: ask it with --prompt")
        captions = prompt or config["examples"]
        return captions, Vocabulary(**config["vocabulary"]).encode(captions)
    if names is None:
        raise UserError(f"{path} was trained on images without labels: there is nothing to ask it for")
    if prompt:
        raise UserError("--prompt: this model was trained on labels: ask it with --labels, numbers or names")
    chosen = find_labels(labels, names) if labels else list(range(len(names)))
    return [names[label] for label in chosen], torch.tensor(chosen)


CONDITIONS = {"label": by_label, "text": by_caption}
