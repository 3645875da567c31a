"""Weights that others published: DDPMs like google/ddpm-cifar10-32, LDMs like CompVis/ldm-celebahq-256."""

import os
import re
from collections.abc import Iterable, Iterator
from json import dumps
from pathlib import Path

import torch

from .errors import UserError, first_line
from .files import damage, read_json, read_pickle

PUBLISHED_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
NAMES = (  # a pattern in their names, and the text for it in ours; attention has new and old names
    *((r"^encoder\.conv_norm_out", "norm_z"), (r"^encoder\.conv_out", "conv_z"), (r"^quant_conv", "before")),
    *((r"^decoder\.conv_in", "conv_up"), (r"^decoder\.mid_block", "middle_up"), (r"^(?:en|de)coder\.", "")),
    *((r"^post_quant_conv", "after"), (r"^quantize\.embedding", "codebook")),
    *((r"^time_embedding\.linear_1", "time_mlp.0"), (r"^time_embedding\.linear_2", "time_mlp.2")),
    *((r"_blocks\.", "."), (r"\.(\d+)\.(down|up)samplers\.0", r"sample.\1"), (r"^mid_block", "middle")),
    *((r"resnets\.(\d+)", r"\1.block"), (r"\.time_emb_proj", ".time"), (r"\.conv_shortcut", ".shortcut")),
    *((r"attentions\.(\d+)", r"\1.attention"), (r"\.group_norm", ".norm"), (r"^conv_norm_out", "norm_out")),
    *((r"\.(?:to_)?([qkv])(?:uery|ey|alue)?\.", r".\1."), (r"\.(to_out\.0|proj_attn)\.", ".out.")),
)
# config.json, besides the fields of which several values are right: see network_fields
UNET = dict(_class_name="UNet2DModel", act_fn="silu", mid_block_scale_factor=1, flip_sin_to_cos=False)
UNET |= dict(center_input_sample=False, class_embed_type=None, downsample_type="conv", freq_shift=1)
UNET |= dict(time_embedding_type="positional", resnet_time_scale_shift="default", num_class_embeds=None)
UNET |= dict(add_attention=True, attn_norm_num_groups=None, downsample_padding=0, upsample_type="conv")
UNET |= dict(mid_block_type="UNetMidBlock2D")
LDM = UNET | dict(flip_sin_to_cos=True, freq_shift=0, downsample_padding=1)
VQVAE = dict(_class_name="VQModel", act_fn="silu", norm_type="group", mid_block_add_attention=True)
NETWORKS = {"ddpm": UNET, "ldm": LDM, "vqvae": VQVAE}
# defaults of config.json, beside two in read_config. VQ latents have a variance near 1: LDM, appendix D.1
DEFAULTS = {"ddpm": {}, "ldm": {"norm_eps": 1e-5, "attention_head_dim": 8}, "vqvae": {"scaling_factor": 1}}
NOISE = dict(beta_schedule="linear", beta_start=1e-4, beta_end=0.02, num_train_timesteps=1000)  # defaults of
NOISE |= dict(prediction_type="epsilon", trained_betas=None, clip_sample_range=1)  # scheduler_config.json
LDM_NOISE = {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195}
SCHEDULERS = ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler")
# fields that change nothing here: of training, and of sampling, which has flags of its own
FREE = "dropout num_train_timesteps clip_sample dynamic_thresholding_ratio sample_max_value".split()
FREE += "timestep_spacing steps_offset set_alpha_to_one skip_prk_steps force_upcast".split()


def is_count(value: object, *divisors: int) -> bool:
    return type(value) is int and 0 < value < 2**16 and all(value % divisor == 0 for divisor in divisors)


def network_fields(config: dict, what: str) -> Iterator[tuple[str, object]]:
    """Fields of config.json in the order to check them, and the value that makes the network ours of each."""
    # Where several values are right, that is the file's own, or if it is wrong, a text on what is right.
    yield "_class_name", NETWORKS[what]["_class_name"]  # that of Stable Diffusion has another
    groups, widths, eps = config["norm_num_groups"], config["block_out_channels"], config["norm_eps"]
    yield "norm_num_groups", groups if is_count(groups) else "a whole number"
    levels = len(widths) if isinstance(widths, list) else 0
    right = 0 < levels <= 16 and all(is_count(width, groups, widths[0]) for width in widths)
    multiples = "whole numbers, multiples of the first and of norm_num_groups"
    yield "block_out_channels", widths if right else multiples
    yield "norm_eps", eps if type(eps) is float and 0 < eps < 1 else "a number such as 1e-6"
    blocks, channels, size = config["layers_per_block"], config["in_channels"], config["sample_size"]
    yield "layers_per_block", blocks if is_count(blocks) else "a whole number"
    right = is_count(channels) and (channels in (1, 3) or what == "ldm")
    yield "in_channels", channels if right else "3, or 1 for gray images"
    yield "out_channels", channels
    yield "sample_size", size if is_count(size, 2 ** (levels - 1)) else "a number divisible by 2^(levels - 1)"
    kinds, head = config["down_block_types"], config.get("attention_head_dim")
    plain, other = ("DownBlock2D", "AttnDownBlock2D") if what != "vqvae" else ("DownEncoderBlock2D",) * 2
    right = isinstance(kinds, list) and all(kind in (plain, other) for kind in kinds)
    right = right and len(kinds) == levels and kinds[0] == plain
    yield "down_block_types", kinds if right else f"{plain}, then [Attn]DownBlock2D a level"
    yield "up_block_types", [kind.replace("Down", "Up").replace("Enc", "Dec") for kind in kinds[::-1]]
    attended = {widths[-1], *(w for w, kind in zip(widths, kinds, strict=True) if kind.startswith("Attn"))}
    right = is_count(head) and (attended == {head} or (what == "ldm" and not any(w % head for w in attended)))
    yield "attention_head_dim", head if right else None  # a DDPM has one head
    yield from NETWORKS[what].items()
    if what == "vqvae":
        for name in ("latent_channels", "num_vq_embeddings"):
            yield name, config.get(name) if is_count(config.get(name)) else "a whole number"
        yield "vq_embed_dim", config["latent_channels"] if config.get("vq_embed_dim") else None
        right = type(scale := config["scaling_factor"]) in (int, float) and 0 < scale < 1e9
        yield "scaling_factor", scale if right else "a number above 0"


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
    """Settings, in terms of our runs, and weights {our name: float32 tensor}; UserError if they don't fit."""
    path, pipeline = file.parent / "config.json", file.parent / ".."
    theirs = read_json(path, "it was published with the weights (Stable Diffusion is out of scope: README)")
    inside = os.path.basename(os.path.abspath(file.parent)) == "unet"
    latent = inside and ((pipeline / "vqvae").is_dir() or theirs.get("flip_sin_to_cos"))
    config = read_config(path, theirs, "ldm" if latent else "ddpm")
    part, noise = (read_autoencoder(pipeline, config), NOISE | LDM_NOISE) if latent else ({}, NOISE)
    for folder in (file.parent, pipeline / "scheduler"):
        if (path := folder / "scheduler_config.json").is_file() or (latent and folder != file.parent):
            theirs = NOISE | read_json(path, "a latent diffusion model has it beside unet/ and vqvae/")
            variance = theirs.get("variance_type")  # of ddpm's sigma_t^2, which --variance sets
            fixed = ("variance_type", variance if str(variance).startswith("fixed") else "fixed_small")
            name = theirs.get("_class_name")  # others have other betas where theirs are left out
            known = ("_class_name", name if name in SCHEDULERS else SCHEDULERS[0])
            check_fields(path, theirs, [known, *noise.items(), fixed])
    return config | part, read_weights(file)


def read_weights(file: Path) -> dict[str, torch.Tensor]:
    """{our name: float32 tensor} of a file of weights; else UserError."""
    weights = read_safetensors(file) if file.suffix == ".safetensors" else read_pickle(file, "get it again")
    for weight in weights.values() if isinstance(weights, dict) else [None]:
        dense = isinstance(weight, torch.Tensor) and weight.layout == torch.strided
        if not dense or not weight.is_floating_point() or weight.itemsize == 1:  # one byte: quantised
            raise UserError(f"{file} holds no weights, or not in floating point alone: get it again")
    return dict(renamed(str(name), weight.float()) for name, weight in weights.items())


def read_autoencoder(pipeline: Path, unet: dict) -> dict:
    """The settings that vqvae/ adds to those of the UNet of a latent diffusion model, and its weights."""
    if (file := published_file(pipeline / "vqvae")) is None:
        whole = f"{os.path.abspath(pipeline)} is a latent diffusion model"
        raise UserError(f"{whole}, and lacks vqvae/ or weights in it: get it")
    path = file.parent / "config.json"
    own = read_config(path, read_json(path, "weights need the config.json of their network"), "vqvae")
    channels, size = own["latent_channels"], unet["image_size"] * 2 ** (len(own["multipliers"]) - 1)
    if channels != unet["channels"]:
        raise UserError(f"{path}: latent_channels is {channels}; unet/ has in_channels {unet['channels']}")
    part = {"config": own, "weights": read_weights(file), "scale": own["scale"]}
    about = {"latent": unet["name"], "latent_channels": channels, "schedule": "scaled_linear"}
    return about | {"channels": own["channels"], "image_size": size, "autoencoder": part}


def read_config(path: Path, theirs: dict, what: str) -> dict:
    """The settings that a config.json describes, in the terms of our runs; UserError names what differs."""
    for name in ("block_out_channels", "down_block_types", "in_channels", "layers_per_block", "sample_size"):
        if name not in theirs:
            raise UserError(f"{path} lacks {name}: it does not describe a network of this kind")
    theirs = {"norm_num_groups": 32, "norm_eps": 1e-6, **DEFAULTS[what], **theirs}
    check_fields(path, theirs, network_fields(theirs, what))
    widths, size, codes = (theirs.get(n) for n in ("block_out_channels", "sample_size", "num_vq_embeddings"))
    form = {"head_dim": theirs.get("attention_head_dim"), "cosines": True, "shift": 0, "padding": 1}
    kind = "published_autoencoder" if what == "vqvae" else "published"
    attention = [level for level, block in enumerate(theirs["down_block_types"]) if block.startswith("Attn")]
    ours = dict(kind=kind, name=published_name(path.parent), dataset=None, class_names=None, weighting=None)
    ours |= dict(form=form if what == "ldm" else None, codes=codes, scale=theirs.get("scaling_factor"))
    ours |= dict(latent_channels=theirs.get("latent_channels"), channels=theirs["in_channels"], dropout=0.0)
    ours |= dict(image_size=size, width=widths[0], multipliers=[width // widths[0] for width in widths])
    ours |= dict(blocks=theirs["layers_per_block"], attention=attention, patch=1, norm_eps=theirs["norm_eps"])
    ours |= dict(norm_groups=theirs["norm_num_groups"], noise_steps=1000, schedule="linear", sampler="ddim")
    return ours | {"prediction": "eps"}


def check_fields(path: Path, config: dict, wanted_fields: Iterable[tuple[str, object]]) -> None:
    """UserError for the first field that has another value than the one wanted, or is unknown and set."""
    known = set(FREE)
    for key, right in wanted_fields:
        known.add(key)
        if key in config and (own := config[key]) != right:
            raise UserError(f"{path}: {key} is {dumps(own)}; the network here is the one with {dumps(right)}")
    for name, value in config.items():
        if value and name not in known and not name.startswith("_"):
            raise UserError(f"{path}: {name} is {dumps(value)}, which is unknown here: it may change numbers")


def renamed(name: str, weight: torch.Tensor) -> tuple[str, torch.Tensor]:
    """A weight's name and value in our UNet, where attention has 1x1 convolutions for linear layers."""
    weight = weight[:, :, None, None] if "attentions" in name and weight.ndim == 2 else weight  # (C, C, 1, 1)
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
