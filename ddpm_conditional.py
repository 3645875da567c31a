"""Conditional diffusion: labels and captions, classifier-free and classifier guidance, text to image.

What ddpm.py does, told what to draw. Read it with Classifier-free guidance (Ho & Salimans 2022,
https://arxiv.org/abs/2207.12598), ADM (Dhariwal & Nichol 2021, https://arxiv.org/abs/2105.05233) and GLIDE
(Nichol et al. 2021, https://arxiv.org/abs/2112.10741). Guidance makes or wraps a denoiser eps_theta(x_t, t),
so every sampler of ddpm.py works with every guidance.

    python ddpm_conditional.py                                           train on the embedded digits
    python ddpm_conditional.py --sample 30 --checkpoint runs/ddpm_conditional_digits --labels 0,3,7
    python ddpm_conditional.py --dataset stanfordcars --epochs 80        Stanford Cars by class
    python ddpm_conditional.py --dataset shapes                          text to image
    python ddpm_conditional.py --task classifier                         for --guidance classifier
"""

import argparse
import difflib
import json
import math
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor
from tqdm import tqdm

import ddpm
import utils
from ddpm import Denoiser, Diffusion, Generators, Task
from modules import END, PAD
from utils import UserError, real, whole

# ------------------------------------------------------------------------------------------------------------
# Guidance: each makes a denoiser, or wraps one.


def cfg(
    diffusion: Diffusion,
    net: torch.nn.Module,
    y: Tensor,
    scale: float,
    interval: tuple[int, int] | None = None,
    rescale: float = 0.0,
) -> Denoiser:
    """Classifier-free guidance, `eps_u + s (eps_c - eps_u)`; y (B, ...) is the condition of each image.

    Ho & Salimans 2022, eq. 6, whose w is s - 1: s = 1 is the plain conditional denoiser, s = 0 the
    unconditional one. Guides only where interval[0] <= t <= interval[1], if given, and is plain conditional
    elsewhere (Kynkäänniemi et al. 2024); `rescale` is the phi of `rescaled`.
    """
    conditional = diffusion.denoiser(net, y)
    unconditional = diffusion.denoiser(net, net.null(y))
    both = diffusion.denoiser(net, torch.cat([net.null(y), y]))

    def eps_theta(x_t: Tensor, t: Tensor) -> Tensor:
        # Start: classifier-free guidance (Ho & Salimans 2022, Algorithm 2)
        t = torch.as_tensor(t, device=x_t.device).expand(len(x_t))
        eps_u, eps_c = both(torch.cat([x_t, x_t]), torch.cat([t, t])).chunk(2)  # both halves in one batch
        eps = torch.lerp(eps_u, eps_c, scale)  # line 3, eq. 6: eps_u + s (eps_c - eps_u)
        # End
        return rescaled(diffusion, eps, eps_c, x_t, t, rescale) if rescale else eps

    if scale == 1:
        return conditional
    if scale == 0 and not rescale:
        eps_theta = unconditional
    return eps_theta if interval is None else within(interval, eps_theta, conditional)


def within(interval: tuple[int, int], inside: Denoiser, outside: Denoiser) -> Denoiser:
    """The denoiser `inside` where interval[0] <= t <= interval[1], else `outside`, for each image."""

    def eps_theta(x_t: Tensor, t: Tensor) -> Tensor:
        t = torch.as_tensor(t, device=x_t.device).expand(len(x_t))
        here = (interval[0] <= t) & (t <= interval[1])  # (B,)
        if here.all():
            return inside(x_t, t)
        if not here.any():  # so that guidance costs nothing outside its interval
            return outside(x_t, t)
        return torch.where(here.view(-1, 1, 1, 1), inside(x_t, t), outside(x_t, t))

    return eps_theta


def rescaled(diffusion: Diffusion, eps: Tensor, eps_c: Tensor, x_t: Tensor, t: Tensor, phi: float) -> Tensor:
    """The guided eps, its x_0 given back the contrast of the conditional one; all (B, C, H, W), t (B,).

    x_0 <- phi x_0 std(x_c) / std(x_0) + (1 - phi) x_0, the standard deviations over each image (Lin et al.
    2023, section 3.4, applied to x_0).
    """
    x_0, x_c = (diffusion.split(e, x_t, t, "eps")[0] for e in (eps, eps_c))
    ratio = x_c.std((1, 2, 3), keepdim=True) / x_0.std((1, 2, 3), keepdim=True)
    return diffusion.split(torch.lerp(x_0, x_0 * ratio, phi), x_t, t, "x_0")[1]


def classifier_guidance(
    diffusion: Diffusion, eps_theta: Denoiser, classifier: torch.nn.Module, y: Tensor, scale: float
) -> Denoiser:
    """`eps - sqrt(1 - alpha_bar_t) s grad log p(y | x_t)`, labels y (B,), eps_theta being unconditional.

    `classifier(x_t, t)` gives logits (B, K) (Dhariwal & Nichol 2021, Algorithm 2).
    """

    def guided(x_t: Tensor, t: Tensor) -> Tensor:
        # Start: classifier guidance (Dhariwal & Nichol 2021, Algorithm 2)
        t = torch.as_tensor(t, device=x_t.device).expand(len(x_t))
        with torch.enable_grad():  # samplers run without gradients
            x = x_t.detach().requires_grad_()
            log_p = F.log_softmax(classifier(x, t), dim=1).gather(1, y[:, None])  # (B, 1), log p(y | x_t)
            gradient = torch.autograd.grad(log_p.sum(), x)[0]  # of a sum: each image gets its own gradient
        _, noise = diffusion.scales(t, x_t)
        return eps_theta(x_t, t) - noise * scale * gradient  # eps_hat
        # End

    return guided


def dynamic_threshold(diffusion: Diffusion, eps_theta: Denoiser, quantile: float) -> Denoiser:
    """The denoiser, its x_0 clamped to [-s, s] and divided by s, s >= 1 being a quantile of its |x_0|.

    Where guidance drives many pixels out of [-1, 1], this keeps the differences between them, which clipping
    would remove (Imagen, Saharia et al. 2022, section 2.3). `quantile` in (0, 1].
    """

    def thresholded(x_t: Tensor, t: Tensor) -> Tensor:
        x_0, _ = diffusion.split(eps_theta(x_t, t), x_t, t, "eps")
        values = x_0.abs().flatten(1).sort(dim=1).values  # (B, C H W); torch.quantile takes no large batches
        s = values[:, round(quantile * (values.shape[1] - 1))].clamp(min=1).view(-1, 1, 1, 1)
        return diffusion.split(x_0.clamp(-s, s) / s, x_t, t, "x_0")[1]

    return thresholded


# ------------------------------------------------------------------------------------------------------------
# Conditions: captions as tokens, and what the command line asks for.


MAX_WORDS = 127  # in a caption


class Vocabulary:
    """The words of a model's captions. A caption's tokens are its words', then END, then PAD; (L,)."""

    def __init__(self, words: list[str], max_tokens: int):
        self.words, self.max_tokens = words, max_tokens  # max_tokens is L
        self.number = {word: token for token, word in enumerate(words, start=END + 1)}

    def state(self) -> dict:
        """What a checkpoint keeps: `Vocabulary(**state)` is the same one."""
        return {"words": self.words, "max_tokens": self.max_tokens}

    @classmethod
    def of(cls, captions: Sequence[str]) -> "Vocabulary":
        """All the words of the captions, as long as the longest of them."""
        split = [cls.split(caption) for caption in captions]
        longest = max(range(len(split)), key=lambda i: len(split[i]))
        if len(split[longest]) > MAX_WORDS:
            raise UserError(
                f"the caption {captions[longest][:60]!r}... has {len(split[longest])} words: shorten it to "
                f"{MAX_WORDS}, for all are as long as the longest in memory"
            )
        return cls(sorted({word for words in split for word in words}), max(map(len, split)) + 1)

    @staticmethod
    def split(caption: str) -> list[str]:
        """The words of a caption, in lower case and without the punctuation around them."""
        return [word for part in caption.lower().split() if (word := part.strip(".,:;!?\"'()"))]

    def __len__(self) -> int:
        return END + 1 + len(self.words)

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Tokens (B, L) int64; UserError for a word that is not in the vocabulary, or a caption too long."""
        tokens = torch.full((len(captions), self.max_tokens), PAD)
        for row, caption in zip(tokens, captions, strict=True):
            words = self.split(caption)
            for word in words:
                if word not in self.number:
                    known = nearest(word, self.words)
                    raise UserError(
                        f"{caption!r}: the model knows no word {word!r}; the nearest it knows: {known}"
                    )
            if len(words) >= self.max_tokens:
                raise UserError(
                    f"{caption!r} has {len(words)} words; the model reads at most {self.max_tokens - 1}, "
                    "the length of its longest training caption: shorten it"
                )
            row[: len(words) + 1] = torch.tensor([*(self.number[word] for word in words), END])
        return tokens


def nearest(word: str, known: Sequence[str]) -> str:
    """The known words most like one, as a list to read."""
    lower = {name.lower(): name for name in known}
    return ", ".join(lower[name] for name in difflib.get_close_matches(word.lower(), lower, n=5, cutoff=0))


def find_label(text: str, class_names: Sequence[str]) -> int:
    """The label that a class name, if need be in another case, or a number means; UserError if none."""
    for wanted, names in ((text, class_names), (text.lower(), [name.lower() for name in class_names])):
        if wanted in names:
            return names.index(wanted)
    if re.fullmatch(r"[+-]?[0-9]+", text):
        if 0 <= int(text) < len(class_names):
            return int(text)
        raise UserError(f"label {text} is out of range: the model's labels are 0 to {len(class_names) - 1}")
    known = nearest(text, class_names)
    raise UserError(f"{text!r} is no class of the model; the nearest: {known} (or give its number)")


def conditions(args: argparse.Namespace, config: dict) -> tuple[list[str], Tensor]:
    """What --labels or --prompt asks a model for, R names and y (R, ...); UserError if it can't be asked so.

    Without them: every class, or the captions that the model's previews showed.
    """
    if config.get("condition") == "text":
        if args.labels:
            raise UserError("--labels: this model was trained on captions: ask it with --prompt")
        prompts = args.prompt or config["examples"]
        return prompts, Vocabulary(**config["vocabulary"]).encode(prompts)
    names = config["class_names"]
    if names is None:
        raise UserError(
            f"{args.checkpoint} was trained on images without labels: there is nothing to ask it for"
        )
    if args.prompt:
        raise UserError(
            "--prompt: this model was trained on labels: ask it with --labels, numbers or class names"
        )
    labels = [find_label(text, names) for text in args.labels] if args.labels else list(range(len(names)))
    return [names[label] for label in labels], torch.tensor(labels)


# ------------------------------------------------------------------------------------------------------------
# What is trained: a conditional denoiser, or a noise-aware classifier. ddpm.train() serves both.


def conditional_loss(diffusion: Diffusion, p_uncond: float) -> Callable[..., Tensor]:
    """`loss(net, x_0, y, generator) -> scalar`, each image's condition dropped with probability p_uncond."""

    def loss(net: torch.nn.Module, x_0: Tensor, y: Tensor, generator: Generators = None) -> Tensor:
        # Start: training step (Ho & Salimans 2022, Algorithm 1)
        # 2.b classifier-free guidance: one network learns eps_c and, where the condition is dropped, eps_u
        coin = ddpm.draw(torch.rand, (len(y),), y, generator)  # one for each image of the batch
        dropped = (coin < p_uncond).view(-1, *[1] * (y.ndim - 1))  # (B,), or (B, 1) for tokens
        null = getattr(net, "module", net).null(y)  # (several processes wrap the network)
        y = torch.where(dropped, null, y)  # line 3: c <- null with probability p_uncond
        return diffusion.loss(net, x_0, y, generator)  # lines 4 to 7: DDPM, Algorithm 1, given y
        # End

    return loss


def classifier_loss(diffusion: Diffusion) -> Callable[..., Tensor]:
    """`loss(net, x_0, y, generator) -> scalar`, the cross-entropy of p(y | x_t) over all noise levels."""

    def loss(net: torch.nn.Module, x_0: Tensor, y: Tensor, generator: Generators = None) -> Tensor:
        # Start: training step of the noise-aware classifier (Dhariwal & Nichol 2021, section 4.3)
        t = diffusion.sample_timesteps(x_0, generator)  # t ~ Uniform({1, ..., T}), one for each image
        x_t, _ = diffusion.noise_images(x_0, t, generator)  # it will be asked about noisy images
        return F.cross_entropy(net(x_t, t).float(), y)  # -log p(y | x_t)
        # End

    return loss


def by_label(args: argparse.Namespace, data: utils.Data) -> tuple[Tensor, list[str], Tensor, dict]:
    """y (N,) of every image, the names and y of the classes that previews show, what a checkpoint keeps."""
    if data.labels is None:
        raise UserError(f"data set {args.dataset} has no labels{instead(data.captions, 'text')}")
    last = len(data.class_names) - 1
    shown = sorted({round(k * last / 9) for k in range(10)})  # ten classes, evenly spaced
    return data.labels, [data.class_names[k] for k in shown], torch.tensor(shown), {}


def by_caption(args: argparse.Namespace, data: utils.Data) -> tuple[Tensor, list[str], Tensor, dict]:
    """The same for captions, y (N, L) being tokens of the vocabulary of all captions."""
    if data.captions is None:
        raise UserError(f"data set {args.dataset} has no captions{instead(data.labels, 'label')}")
    vocabulary, shown = Vocabulary.of(data.captions), list(dict.fromkeys(data.captions))[:8]
    keep = {"vocabulary": vocabulary.state(), "examples": shown}
    return vocabulary.encode(data.captions), shown, vocabulary.encode(shown), keep


def instead(values: object, condition: str) -> str:
    """What to do where a data set lacks one kind of condition, by whether it has the other."""
    return ": choose another --dataset" if values is None else f": train it with --condition {condition}"


CONDITIONS = {"label": by_label, "text": by_caption}


def conditional(
    args: argparse.Namespace, data: utils.Data, diffusion: Diffusion, device: torch.device
) -> Task:
    """A UNet that learns to denoise images given their labels or captions; previews have them as rows."""
    args.condition = args.condition or ("text" if data.labels is None else "label")
    y, names, y_shown, keep = CONDITIONS[args.condition](args, data)
    about = {"kind": "ddpm_conditional", "class_names": data.class_names, **keep}
    net = ddpm.make_net({**vars(args), **about})
    if args.init and not args.resume:
        start_from(net, args.init)
    check_interval(args, diffusion.T)
    fill_guidance_scale(args, args.p_uncond)
    columns, scale = 6 if args.image_size <= 32 else 3, args.guidance_scale[0]

    def preview(net: torch.nn.Module, epoch: int, path: Path) -> None:
        numbers = list(range(columns)) * len(names)  # the same noise in every row
        y = y_shown.repeat_interleave(columns, dim=0).to(device)
        x_0 = ddpm.draw_preview(diffusion, guided(args, diffusion, net, y, scale), numbers, args, device)
        caption = f"{args.dataset}, epoch {epoch}, {made_by(args)}, scale {scale:g}"
        utils.save_picture(utils.make_grid(x_0, caption, columns, rows=names), path)

    loss = conditional_loss(diffusion, args.p_uncond)
    return Task("ddpm_conditional", net, loss, preview, data.images, y, keep)


def fill_guidance_scale(args: argparse.Namespace, p_uncond: float) -> None:
    """Settle the scale: 1 where the network never saw the null condition; a note where guidance is no use."""
    if p_uncond in (0, 1):
        what = "unconditional" if p_uncond == 0 else "conditional"
        utils.note(f"with --p-uncond {p_uncond:g} nothing {what} is learned, so guidance means nothing")
    if p_uncond == 0 and "guidance_scale" not in args.typed:
        args.guidance_scale = [1.0]


LOSS = {"weighting", *ddpm.WEIGHTING_FLAGS}
FROM_INIT = {*ddpm.NETWORK_SETTINGS, "image_size", "noise_steps", "schedule", "prediction", *LOSS}
FREE_ON_INIT = {"image_size", "dropout", *LOSS}  # which may differ: the weights fit any size


def fill_from_init(args: argparse.Namespace) -> argparse.Namespace:
    """The settings, with --init's network and diffusion; UserError for a flag that contradicts them."""
    config = utils.load_checkpoint(args.init, "ddpm")["config"]
    free = args.typed - FROM_INIT | FREE_ON_INIT
    return utils.merge_config(args, {dest: config[dest] for dest in FROM_INIT & set(config)}, free)


def start_from(net: torch.nn.Module, path: str) -> None:
    """Give a conditional network the averaged weights of an unconditional run; what it has more stays new."""
    unet, _, config = ddpm.load_network(path, kinds=("ddpm",))
    net.load_state_dict(unet.state_dict(), strict=False)
    print(f"init     from {path}, epoch {config['epoch']}")


def classification(
    args: argparse.Namespace, data: utils.Data, diffusion: Diffusion, device: torch.device
) -> Task:
    """A classifier of noisy images; a tenth of them is kept back to measure its accuracy."""
    if data.labels is None:
        raise UserError(f"data set {args.dataset} has no labels to classify by: choose another --dataset")
    for dest in args.typed & OF_THE_DENOISER:  # typed beside --resume
        raise UserError(f"{utils.flag(dest)} means nothing to a classifier: leave it out")
    held_out, trained_on = utils.hold_out(len(data.images), args.seed, "a classifier")
    x_0, y = utils.to_x_0(data.images[held_out]), data.labels[held_out]

    def preview(net: torch.nn.Module, epoch: int, path: Path) -> None:
        columns = min(10, len(x_0))
        shown = measure_accuracy(diffusion, net, x_0, y, columns, args, device)
        levels = [(t, f"{share:.4f}") for t, share, _ in shown]
        utils.log_levels(path.parent.parent / "accuracy.csv", ("t", "accuracy"), epoch, levels)
        told = ", ".join(f"{t}: {share:.1%}" for t, share, _ in shown)
        tqdm.write(f"epoch {epoch}: accuracy at t = {told}")
        rows = [f"t = {t}: {share:.1%}" for t, share, _ in shown]
        caption = (
            f"{args.dataset}, epoch {epoch}: accuracy at each noise level, on {len(x_0)} held-out images"
        )
        grid = utils.make_grid(torch.cat([x_t for *_, x_t in shown]), caption, columns, rows)
        utils.save_picture(grid, path)

    net = ddpm.make_net({**vars(args), "kind": "classifier", "class_names": data.class_names})
    use = ("--sample", 64, "--checkpoint", "RUN", "--guidance", "classifier", "--classifier")
    loss, images, labels = classifier_loss(diffusion), data.images[trained_on], data.labels[trained_on]
    return Task("classifier", net, loss, preview, images, labels, use=use)


@torch.no_grad()
def measure_accuracy(
    diffusion: Diffusion, net: torch.nn.Module, x_0: Tensor, y: Tensor, shown: int, args, device: torch.device
) -> list[tuple[int, float, Tensor]]:
    """(t, share of the images x_0 (N, C, H, W) named y (N,), the first `shown` x_t) at eleven t of 1..T."""
    results = []
    for t in sorted({1, *(max(1, round(diffusion.T * k / 10)) for k in range(1, 11))}):
        generator = utils.seeded_generator(args.seed, t)  # the same noise every epoch
        right, examples = 0, []
        for images, labels in zip(x_0.split(args.batch_size), y.split(args.batch_size), strict=True):
            at = torch.full((len(images),), t)
            x_t, _ = diffusion.noise_images(images, at, generator)
            right += (net(x_t.to(device), at.to(device)).argmax(1).cpu() == labels).sum().item()
            examples += x_t[: max(0, shown - len(examples))]
        results.append((t, right / len(x_0), torch.stack(examples)))
    return results


# ------------------------------------------------------------------------------------------------------------
# Command line

GUIDANCE_FLAGS = {"classifier": "classifier", "guidance_rescale": "cfg"}  # which --guidance a flag belongs to
HOW_TO_GUIDE = {"guidance_scale", "guidance_interval", "guidance_rescale", "dynamic_threshold"}
ONLY_HERE = {"labels", "prompt", "guidance", "classifier", "batches"}
ONLY_SAMPLING = ddpm.ONLY_SAMPLING | ONLY_HERE
FOR_SAMPLING = ddpm.FOR_SAMPLING | ONLY_SAMPLING | HOW_TO_GUIDE
OF_THE_DENOISER = {  # flags that mean nothing to a classifier
    *("condition", "p_uncond", "init", "prediction", "weighting", *ddpm.WEIGHTING_FLAGS),
    *(*ddpm.HOW_TO_SAMPLE, *HOW_TO_GUIDE),
}
FLAG_OWNERS = {
    **{"guidance": GUIDANCE_FLAGS, "task": {dest: "diffusion" for dest in OF_THE_DENOISER}},
    **ddpm.FLAG_OWNERS,
}
DATA_DEFAULTS = {**ddpm.DATA_DEFAULTS, "digits": {"epochs": 30}}  # ten kinds take longer to tell apart
TASKS = {"diffusion": conditional, "classifier": classification}


def add_conditional_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("conditional training").add_argument
    task = "what to train: diffusion, or a noise-aware classifier for --guidance classifier"
    add("--task", choices=list(TASKS), default="diffusion", metavar="NAME", help=task)
    on = "label or text: what the network is told (default: label where the data set has labels)"
    add("--condition", choices=list(CONDITIONS), metavar="NAME", help=on)
    dropped = "probability of dropping an image's condition, so that the unconditional is learned as well"
    add("--p-uncond", type=real(0, 1), default=0.1, metavar="P", help=dropped)
    add(
        "--init", metavar="RUN", help="start from the weights and settings of an unconditional run of ddpm.py"
    )

    add = parser.add_argument_group(
        "guidance (the scale and what follows it also serve the previews)"
    ).add_argument
    what = "--sample: class numbers or names, with commas: 0,3,7 (default: all)"
    add("--labels", type=utils.listed(str), metavar="LIST", help=what)
    say = "--sample: one or more captions, each in quotes"
    add("--prompt", nargs="+", action="extend", metavar="CAPTION", help=say)
    add(
        "--batches",
        type=whole(1),
        default=1,
        metavar="B",
        help="--sample: draw B times N images, a grid each",
    )
    how = "--sample: cfg (classifier-free), or classifier, with --classifier"
    add("--guidance", choices=["cfg", "classifier"], default="cfg", metavar="NAME", help=how)
    add("--classifier", metavar="RUN", help="--guidance classifier: a run of --task classifier")
    scale = (
        "1 plain conditional, 0 unconditional, above 1 guided; 1,3,7 compares three in the columns of a grid"
    )
    add("--guidance-scale", type=utils.listed(real(0)), default=[3.0], metavar="S", help=scale)
    add_guidance_options(add)


def add_guidance_options(add: Callable) -> None:
    span = ("LOW", "HIGH")
    add("--guidance-interval", type=whole(1), nargs=2, metavar=span, help="guide only where LOW <= t <= HIGH")
    phi = "--guidance cfg: share of the conditional's contrast that is restored, 0 to 1"
    add("--guidance-rescale", type=real(0, 1), default=0.0, metavar="PHI", help=phi)
    quantile = (
        "scale x_0 down by this quantile of its |x_0| where that is above 1, as 0.995, before it is clipped"
    )
    add("--dynamic-threshold", type=real(0, 1, above=True), metavar="P", help=quantile)


def make_parser() -> argparse.ArgumentParser:
    parser = ddpm.make_parser("Train a diffusion model on labels or captions, or sample from one.")
    add_conditional_flags(parser)
    return parser


def check_guidance_flags(args: argparse.Namespace) -> None:
    """Refuse flags that contradict each other; UserError."""
    if args.guidance == "classifier" and args.classifier is None:
        raise UserError("--guidance classifier needs --classifier RUN, a run of --task classifier")
    if args.init and args.resume:
        raise UserError("--init is for a new run, --resume goes on with one: leave one out")
    check_scales(args)
    if args.sample is None and len(args.guidance_scale) > 1:
        raise UserError("previews are drawn with one --guidance-scale; compare several with --sample")


def check_scales(args: argparse.Namespace) -> None:
    """UserError for a scale that --guidance-scale lists twice, or an interval the wrong way round."""
    if len({f"{scale:g}" for scale in args.guidance_scale}) < len(args.guidance_scale):
        raise UserError("--guidance-scale lists the same scale twice")
    if args.guidance_interval and args.guidance_interval[0] > args.guidance_interval[1]:
        raise UserError("--guidance-interval LOW HIGH: LOW must not be above HIGH")


def check_interval(args: argparse.Namespace, T: int) -> None:
    """UserError for a --guidance-interval that leaves 1..T."""
    if args.guidance_interval and args.guidance_interval[1] > T:
        raise UserError(f"--guidance-interval: t runs from 1 to {T}")


def without_condition(path: str, config: dict) -> None:
    """A note that a conditional model is used as it is without its condition."""
    if config["kind"] == "ddpm_conditional":
        never = " (which it never learned)" if config.get("p_uncond") == 0 else ""
        utils.note(f"{path} is conditional: here it is told nothing, the null condition{never}")


def guided(
    args: argparse.Namespace,
    diffusion: Diffusion,
    net: torch.nn.Module,
    y: Tensor,
    scale: float,
    classifier: torch.nn.Module | None = None,
) -> Denoiser:
    """The denoiser that the command line asks for, its condition y (B, ...) and guidance closed over."""
    interval = args.guidance_interval
    if classifier is None:
        eps_theta = cfg(diffusion, net, y, scale, interval, args.guidance_rescale)
    else:
        base = diffusion.denoiser(net)  # without y: the null condition
        eps_theta = classifier_guidance(diffusion, base, classifier, y, scale)
        eps_theta = within(interval, eps_theta, base) if interval else eps_theta
    return (
        dynamic_threshold(diffusion, eps_theta, args.dynamic_threshold)
        if args.dynamic_threshold
        else eps_theta
    )


def made_by(args: argparse.Namespace) -> str:
    """How images are drawn, for their caption."""
    options = {
        "interval": args.guidance_interval and "{} to {}".format(*args.guidance_interval),
        "rescale": args.guidance_rescale,
        "threshold": args.dynamic_threshold,
    }
    told = [f"{name} {value}" for name, value in options.items() if value]
    return ", ".join([f"{args.sampler} {args.sample_steps} steps", f"{args.guidance} guidance", *told])


SAME_DATA = ("dataset", "image_size", "channels")
SAME_NOISE = ("noise_steps", "schedule")


def load_classifier(
    path: str, model: dict, device: torch.device, same: Sequence[str] = (*SAME_DATA, *SAME_NOISE)
) -> torch.nn.Module:
    """A run of --task classifier; UserError unless its settings `same` and its classes are the model's."""
    if model.get("condition") == "text":
        raise UserError("a classifier takes a model of labels; this one was trained on captions: use cfg")
    if model["kind"] == "published":
        raise UserError("a classifier takes a model of this project; published weights have no known data")
    classifier, _, theirs = ddpm.load_network(path, device, ("classifier",))
    for key in same:
        if theirs[key] != model[key]:
            raise UserError(
                f"--classifier {path} was trained with {utils.flag(key)} {theirs[key]}, the model "
                f"with {model[key]}: train one with --task classifier {utils.flag(key)} {model[key]}"
            )
    if theirs["class_names"] != model["class_names"]:
        raise UserError(f"--classifier {path} knows other classes than the model: train one on its data")
    return classifier.requires_grad_(False)


def run_sampling(args: argparse.Namespace) -> None:
    """Draw --batches times --sample images from --checkpoint, as asked for: a grid of each batch."""
    device = utils.get_device(args.device)
    processes = ddpm.join_to_sample(args, device)
    kinds = ("ddpm_conditional", "ddpm") if args.guidance == "classifier" else ("ddpm_conditional",)
    net, diffusion, config = ddpm.load_network(args.checkpoint, device, kinds)
    ddpm.fill_sampler(args, config)
    ddpm.fill_sample_steps(args, diffusion.T)
    check_interval(args, diffusion.T)
    if args.guidance == "cfg":
        fill_guidance_scale(args, config.get("p_uncond", 0.1))
    classifier = load_classifier(args.classifier, config, device) if args.guidance == "classifier" else None
    names, y = conditions(args, config)
    samples = utils.run_folder(args.checkpoint) / "samples"
    made = ddpm.made_with(args, config, net, (*HOW_TO_GUIDE, *ONLY_HERE, "sample"))
    ddpm.prepare_folders(samples, args.out, made)
    net = ddpm.quick(net, args, config, device)

    scales, caption = args.guidance_scale, caption_of(args, config)
    in_grid = max(1, ddpm.GRID_LIMIT // len(scales))
    if args.sample > in_grid:
        utils.note(f"a grid shows the first {in_grid} images{' of each scale' if len(scales) > 1 else ''}")

    def draw(first: int, scale: float) -> tuple[Tensor, list[Tensor]]:
        """A batch of --sample images from number `first` on, at one scale, and the frames of its making."""

        def denoiser_of(numbers: Sequence[int]) -> Denoiser:
            asked = torch.tensor([(i - first) % len(names) for i in numbers])
            return guided(args, diffusion, net, y[asked].to(device), scale, classifier)

        numbers = range(first, first + args.sample)
        x_0, frames = ddpm.draw_images(
            *(diffusion, denoiser_of, numbers, args, config, device),
            *(suffix_of(scale, scales), made, processes),
        )
        return x_0[:in_grid], [frame[:in_grid] for frame in frames]

    for first in range(0, args.batches * args.sample, args.sample):
        shown, films = zip(*(draw(first, scale) for scale in scales), strict=True)
        if not processes.first:
            continue
        grid, *frames = (
            condition_grid(x, names, caption, scales) for x in [shown, *zip(*films, strict=True)]
        )
        name = f"{args.guidance}_{args.sampler}_{args.sample_steps}_seed{args.seed}.png"
        ddpm.save_grids(grid, frames, samples / name)
    if args.out and processes.first:
        write_metadata(Path(args.out), args, names)
        print("images  ", shlex.quote(args.out))


def suffix_of(scale: float, scales: Sequence[float]) -> str:
    """What tells the files of one scale from those of the others."""
    return f"_scale{scale:g}" if len(scales) > 1 else ""


def write_metadata(folder: Path, args: argparse.Namespace, names: list[str]) -> None:
    """metadata.jsonl: what each image was asked to show; `--dataset folder` reads it as captions."""
    lines = [
        {
            "file_name": f"{i:05d}{suffix_of(scale, args.guidance_scale)}.png",
            "text": names[i % args.sample % len(names)],
            "guidance_scale": scale,
        }
        for scale in args.guidance_scale
        for i in range(args.batches * args.sample)
    ]
    with utils.replacing(folder / "metadata.jsonl") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines).encode())


def caption_of(args: argparse.Namespace, config: dict) -> str:
    """What made a grid, to be written above it."""
    scale = f", scale {args.guidance_scale[0]:g}" if len(args.guidance_scale) == 1 else ""
    return f"{ddpm.model_name(config)}, {made_by(args)}{scale}, seed {args.seed}"


def condition_grid(x: Sequence[Tensor], names: list[str], caption: str, scales: Sequence[float]) -> Image:
    """A grid with conditions as rows and scales as columns; x has (N, C, H, W) for each scale.

    Image i of a scale is of condition i modulo their number. A condition with many images takes several rows.
    """
    names = names[: len(x[0])]
    each = math.ceil(len(x[0]) / len(names))  # images of a condition at a scale
    across = min(each, max(1, 16 // len(x)))  # of them in a row
    cells, rows = [], []
    for k, name in enumerate(names):
        for start in range(0, each, across):
            rows.append(name if start == 0 else "")
            for of_scale in x:
                images = of_scale[k :: len(names)][start : start + across]
                blank = images.new_ones(across - len(images), *images.shape[1:])
                cells += [images, blank]
    heads = [f"scale {scale:g}" for scale in scales] if len(scales) > 1 else []
    return utils.make_grid(torch.cat(cells), caption, len(x) * across, rows, heads)


def main() -> None:
    args = make_parser().parse_args()
    ddpm.fill_data_set_defaults(args, DATA_DEFAULTS)
    ddpm.check_flags(args, FLAG_OWNERS, FOR_SAMPLING, ONLY_SAMPLING)
    check_guidance_flags(args)
    if args.sample is not None:
        run_sampling(args)
        return
    if args.init:
        args = fill_from_init(args)
    free = ddpm.FREE_ON_RESUME | HOW_TO_GUIDE
    ddpm.run_training(args, make_task, ("ddpm_conditional", "classifier"), free)


def make_task(args: argparse.Namespace, *more) -> Task:
    return TASKS[args.task](args, *more)


if __name__ == "__main__":
    utils.run_main(main)
