"""Record outputs of the reference network for test_published.py: `python tests/record_published.py`.

It needs the reference implementation (pip install diffusers); the project and its tests do not.
For each configuration: the names and shapes of the published form's weights, and the output for seeded
weights and a seeded input, at three times.
"""

import json
from pathlib import Path

import numpy as np
import torch

RECORDED, RECORDED_LDM = (Path(__file__).parent / name for name in ("published.npz", "published_ldm.npz"))
SIZE = 32  # of the recorded input, also where the network was made for 256x256
TIMES = (1, 500, 1000)  # the paper's t

COMMON = {
    **{"_class_name": "UNet2DModel", "act_fn": "silu", "attention_head_dim": None},
    **{"center_input_sample": False, "out_channels": 3, "time_embedding_type": "positional"},
    **{"downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "in_channels": 3},
    **{"layers_per_block": 2, "mid_block_scale_factor": 1, "norm_eps": 1e-6, "norm_num_groups": 32},
}
CONFIGS = {  # as google/ddpm-cifar10-32 and google/ddpm-celebahq-256 publish them
    "cifar10_32": {
        **COMMON,
        "sample_size": 32,
        "block_out_channels": [128, 256, 256, 256],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    },
    "celebahq_256": {
        **COMMON,
        "sample_size": 256,
        "block_out_channels": [128, 128, 256, 256, 512, 512],
        "down_block_types": [*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4],
    },
}

LDM = {  # as CompVis/ldm-celebahq-256 publishes them
    "unet": {
        **{**COMMON, "attention_head_dim": 32, "downsample_padding": 1, "flip_sin_to_cos": True},
        **{"freq_shift": 0, "norm_eps": 1e-5, "sample_size": 64, "block_out_channels": [224, 448, 672, 896]},
        "down_block_types": ["DownBlock2D", *["AttnDownBlock2D"] * 3],
        "up_block_types": [*["AttnUpBlock2D"] * 3, "UpBlock2D"],
    },
    "vqvae": {
        **{"_class_name": "VQModel", "act_fn": "silu", "block_out_channels": [128, 256, 512]},
        **{"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3},
        **{"in_channels": 3, "out_channels": 3, "latent_channels": 3, "layers_per_block": 2},
        **{"num_vq_embeddings": 8192, "sample_size": 256},
    },
    "scheduler": {
        **{"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.0015},
        **{"beta_end": 0.0195, "clip_sample": False, "num_train_timesteps": 1000, "trained_betas": None},
    },
}
NARROW_LDM = {  # the same, small enough to be made anew in a test: images of 64x64
    "unet": {**LDM["unet"], "sample_size": 16, "block_out_channels": [32, 64, 96, 128]},
    "vqvae": {**LDM["vqvae"], "sample_size": 64, "block_out_channels": [32, 64, 128]},
    "scheduler": LDM["scheduler"],
}


def seeded_weights(shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """A float32 array for each name, drawn in the order of the names, on the scale of trained weights."""
    draw = np.random.default_rng(0)
    weights = {}
    for name in sorted(shapes):
        noise = draw.standard_normal(shapes[name], dtype=np.float32)
        one = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        weights[name] = one + 0.1 * noise if noise.ndim == 1 else noise / np.float32(noise[0].size) ** 0.5
    return weights


def seeded_input(size: int = SIZE) -> torch.Tensor:
    """x_t (1, 3, size, size)."""
    return torch.from_numpy(np.random.default_rng(1).standard_normal((1, 3, size, size), dtype=np.float32))


def main() -> None:
    from diffusers import UNet2DModel

    recorded = {}
    for name, config in CONFIGS.items():
        net = UNet2DModel.from_config(config).eval()
        shapes = {key: list(value.shape) for key, value in net.state_dict().items()}
        net.load_state_dict({key: torch.from_numpy(w) for key, w in seeded_weights(shapes).items()})
        with torch.no_grad():
            out = [net(seeded_input(), t - 1).sample[0].numpy() for t in TIMES]
        recorded |= {f"{name}_shapes": json.dumps(shapes), f"{name}_out": np.stack(out)}
    np.savez_compressed(RECORDED, **recorded)
    print(f"{RECORDED}, {RECORDED.stat().st_size} bytes")
    record_ldm()


@torch.no_grad()
def record_ldm() -> None:
    """The outputs of the narrow LDM, part by part, and its picture; shapes of the published weights."""
    from diffusers import DDIMScheduler, LDMPipeline, UNet2DModel, VQModel

    kinds, recorded, parts = {"unet": UNet2DModel, "vqvae": VQModel}, {}, {}
    for name, kind in kinds.items():
        with torch.device("meta"):
            whole = kind.from_config(LDM[name]).state_dict()
        parts[name] = kind.from_config(NARROW_LDM[name]).eval()
        shapes = {key: list(value.shape) for key, value in parts[name].state_dict().items()}
        parts[name].load_state_dict({k: torch.from_numpy(w) for k, w in seeded_weights(shapes).items()})
        recorded[f"{name}_shapes"] = json.dumps(shapes)
        recorded[f"{name}_published_shapes"] = json.dumps({k: list(v.shape) for k, v in whole.items()})
    unet, vqvae = parts.values()
    vqvae.register_to_config(scaling_factor=1.0)  # the published pipeline was made before there was one
    x_T = seeded_input(16)
    recorded["unet_out"] = np.stack([unet(x_T, t - 1).sample[0].numpy() for t in TIMES])
    z = vqvae.encode(seeded_input(64).clamp(-1, 1)).latents
    recorded |= {"z": z[0].numpy(), "quantised": vqvae.quantize(z)[0][0].numpy()}
    recorded["decoded"] = vqvae.decode(z).sample[0].numpy()
    pipeline = LDMPipeline(vqvae, unet, DDIMScheduler.from_config(LDM["scheduler"]))
    pipeline.scheduler.set_timesteps(20)
    recorded["timesteps"] = pipeline.scheduler.timesteps.numpy()
    import diffusers.pipelines.deprecated.latent_diffusion_uncond.pipeline_latent_diffusion_uncond as module

    module.randn_tensor = lambda *_, **__: x_T  # the pipeline's noise
    recorded["picture"] = pipeline(num_inference_steps=20, output_type="np").images[
        0
    ]  # (64, 64, 3) in [0, 1]
    np.savez_compressed(RECORDED_LDM, **recorded)
    print(f"{RECORDED_LDM}, {RECORDED_LDM.stat().st_size} bytes")


if __name__ == "__main__":
    main()
