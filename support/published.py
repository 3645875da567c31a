"""Weights that others published: DDPMs in the form of google/ddpm-cifar10-32, our UNet under other names."""

import os
import re
from collections.abc import Iterable, Iterator
from json import dumps
from pathlib import Path

import torch

from .errors import UserError, first_line
from .files import damage, read_json

PUBLISHED_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
NAMES = (  # a pattern in their names, and the text for it in ours; attention has new and old names
    *((r"^time_embedding\.linear_1", "time_mlp.0"), (r"^time_embedding\.linear_2", "time_mlp.2")),
    *((r"_blocks\.", "."), (r"\.(\d+)\.(down|up)samplers\.0", r"sample.\1"), (r"^mid_block", "middle")),
    *((r"resnets\.(\d+)", r"\1.block"), (r"\.time_emb_proj", ".time"), (r"\.conv_shortcut", ".shortcut")),
    *((r"attentions\.(\d+)", r"\1.attention"), (r"\.group_norm", ".norm"), (r"^conv_norm_out", "norm_out")),
    *((r"\.(?:to_)?([qkv])(?:uery|ey|alue)?\.", r".\1."), (r"\.(to_out\.0|proj_attn)\.", ".out.")),
)
NETWORK = {  # config.json, besides the fields of which several values are right: see network_fields
    **{"_class_name": "UNet2DModel", "act_fn": "silu", "mid_block_scale_factor": 1, "flip_sin_to_cos": False},
    **{"center_input_sample": False, "class_embed_type": None, "downsample_type": "conv", "freq_shift": 1},
    **{"time_embedding_type": "positional", "resnet_time_scale_shift": "default", "num_class_embeds": None},
    **{"add_attention": True, "attn_norm_num_groups": None, "downsample_padding": 0, "upsample_type": "conv"},
    **{"mid_block_type": "UNetMidBlock2D"},
}
NOISE = {  # scheduler_config.json
    **{"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "num_train_timesteps": 1000},
    **{"prediction_type": "epsilon", "trained_betas": None, "clip_sample_range": 1},
}
SCHEDULERS = ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler")
FREE = {  # fields that change nothing here: of training, and of sampling, which has flags of its own
    *("dropout", "num_train_timesteps", "clip_sample", "dynamic_thresholding_ratio", "sample_max_value"),
    *("timestep_spacing", "steps_offset", "set_alpha_to_one", "skip_prk_steps"),
}


def is_count(value: object, *divisors: int) -> bool:
    return type(value) is int and 0 < value < 2**16 and all(value % divisor == 0 for divisor in divisors)


def attention_levels(config: dict) -> list[int]:
    return [level for level, kind in enumerate(config["down_block_types"]) if kind == "AttnDownBlock2D"]


def network_fields(config: dict) -> Iterator[tuple[str, object]]:
    """The fields of config.json in the order to check them, each with the value that makes the network ours.

    Where several values are right, that is the file's own, or if it is wrong, a text that says what is right.
    """
    groups, widths, eps = config["norm_num_groups"], config["block_out_channels"], config["norm_eps"]
    yield "norm_num_groups", groups if is_count(groups) else "a whole number"
    levels = len(widths) if isinstance(widths, list) else 0
    right = 0 < levels <= 16 and all(is_count(width, groups, widths[0]) for width in widths)
    multiples = "whole numbers, multiples of the first and of norm_num_groups"
    yield "block_out_channels", widths if right else multiples
    yield "norm_eps", eps if type(eps) is float and 0 < eps < 1 else "a number such as 1e-6"
    blocks, channels, size = config["layers_per_block"], config["in_channels"], config["sample_size"]
    yield "layers_per_block", blocks if is_count(blocks) else "a whole number"
    yield "in_channels", channels if is_count(channels) and channels in (1, 3) else "3, or 1 for gray images"
    yield "out_channels", channels
    yield "sample_size", size if is_count(size, 2 ** (levels - 1)) else "a number divisible by 2^(levels - 1)"
    kinds, head = config["down_block_types"], config.get("attention_head_dim")
    right = isinstance(kinds, list) and all(kind in ("DownBlock2D", "AttnDownBlock2D") for kind in kinds)
    right = right and len(kinds) == levels and kinds[0] == "DownBlock2D"
    yield "down_block_types", kinds if right else "DownBlock2D, then [Attn]DownBlock2D a level"
    yield "up_block_types", [kind.replace("Down", "Up") for kind in kinds[::-1]]
    attended = {widths[level] for level in (*attention_levels(config), -1)}  # of one width, that of one head
    yield "attention_head_dim", head if is_count(head) and attended == {head} else None
    yield from NETWORK.items()


def published_file(path: str | Path) -> Path | None:
    """The weights file of a published network that `path`, it or its folder, names; None if it names none."""
    path = Path(path)
    if path.is_dir() and not (path / "ckpt.pt").is_file():
        folders = (path, path / "unet")  # a whole pipeline keeps the network in unet/
        return next((f / name for f in folders for name in PUBLISHED_FILES if (f / name).is_file()), None)
    return path if path.is_file() and path.suffix in (".safetensors", ".bin") else None


def published_name(folder: Path) -> str:
    """The name of published weights: that of their folder, or of the pipeline whose unet/ the folder is."""
    folder = Path(os.path.abspath(folder))
    return folder.parent.name if folder.name == "unet" else folder.name


def load_published(file: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """Settings, in the terms of our runs, and weights {our name: float32 tensor} of published weights.

    A field that config.json leaves out has its default. UserError where the files describe another network
    or other noise than that of the published DDPMs (T = 1000, linear, eps), or a file is damaged.
    """
    from .runs import read_pickle  # here, as support.runs imports this module

    config = read_config(file.parent / "config.json")
    for folder in (file.parent, file.parent / ".." / "scheduler"):
        if (path := folder / "scheduler_config.json").is_file():
            theirs = read_json(path, "it has just been removed")
            variance = theirs.get("variance_type")  # of ddpm's sigma_t^2, which --variance sets
            fixed = ("variance_type", variance if str(variance).startswith("fixed") else "fixed_small")
            name = theirs.get("_class_name")  # others have other betas where theirs are left out
            known = ("_class_name", name if name in SCHEDULERS else SCHEDULERS[0])
            check_fields(path, theirs, [known, *NOISE.items(), fixed])
    weights = read_safetensors(file) if file.suffix == ".safetensors" else read_pickle(file, "get it again")
    for weight in weights.values() if isinstance(weights, dict) else [None]:
        dense = isinstance(weight, torch.Tensor) and weight.layout == torch.strided
        if not dense or not weight.is_floating_point() or weight.itemsize == 1:  # one byte: quantised
            raise UserError(f"{file} holds no weights, or not in floating point alone: get it again")
    return config, dict(renamed(str(name), weight.float()) for name, weight in weights.items())


def read_config(path: Path) -> dict:
    """The settings that a config.json describes, in the terms of our runs; UserError names what differs."""
    theirs = read_json(path, "weights need the config.json that was published with them")
    for name in ("block_out_channels", "down_block_types", "in_channels", "layers_per_block", "sample_size"):
        if name not in theirs:
            raise UserError(f"{path} lacks {name}: it does not describe a network of this kind")
    theirs = {"norm_num_groups": 32, "norm_eps": 1e-6, **theirs}
    check_fields(path, theirs, network_fields(theirs))
    widths, size = theirs["block_out_channels"], theirs["sample_size"]
    return {
        **{"kind": "published", "name": published_name(path.parent), "dataset": None, "class_names": None},
        **{"image_size": size, "channels": theirs["in_channels"], "blocks": theirs["layers_per_block"]},
        **{"width": widths[0], "multipliers": [width // widths[0] for width in widths], "dropout": 0.0},
        **{"attention": attention_levels(theirs), "norm_groups": theirs["norm_num_groups"]},
        **{"norm_eps": theirs["norm_eps"], "noise_steps": 1000, "schedule": "linear", "prediction": "eps"},
        **{"weighting": None, "sampler": "ddim"},
    }


def check_fields(path: Path, config: dict, wanted_fields: Iterable[tuple[str, object]]) -> None:
    """UserError for the first field that has another value than the one wanted, or is unknown and set."""
    known = set(FREE)
    for name, wanted in wanted_fields:
        known.add(name)
        if name in config and config[name] != wanted:
            what = f"{path}: {name} is {dumps(config[name])}"
            raise UserError(f"{what}; the network here is the one with {dumps(wanted)}")
    for name, value in config.items():
        if value and name not in known and not name.startswith("_"):
            raise UserError(f"{path}: {name} is {dumps(value)}, which is unknown here: it may change numbers")


def renamed(name: str, weight: torch.Tensor) -> tuple[str, torch.Tensor]:
    """A weight's name and value in our UNet, where attention has 1x1 convolutions for linear layers."""
    if "attentions" in name and weight.ndim == 2:
        weight = weight[:, :, None, None]  # (C, C, 1, 1)
    for pattern, ours in NAMES:
        name = re.sub(pattern, ours, name)
    return name, weight


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors file; UserError where it is damaged, or the package is missing."""
    try:
        import safetensors.torch

        return safetensors.torch.load_file(path)
    except ImportError:
        raise UserError(f"{path} needs the package safetensors: pip install safetensors") from None
    except safetensors.SafetensorError as error:
        why = damage(path) or f"is truncated or damaged ({first_line(error)})"
        raise UserError(f"{path} {why}: get it again") from None
