"""Record outputs of the reference network for test_published.py: `python tests/record_published.py`.

It needs the reference implementation (pip install diffusers); the project and its tests do not.
For each configuration: the names and shapes of the published form's weights, and the output for seeded
weights and a seeded input, at three times.
"""

import json
from pathlib import Path

import numpy as np
import torch

RECORDED = Path(__file__).parent / "published.npz"
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


def seeded_weights(shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """A float32 array for each name, drawn in the order of the names, on the scale of trained weights."""
    draw = np.random.default_rng(0)
    weights = {}
    for name in sorted(shapes):
        noise = draw.standard_normal(shapes[name], dtype=np.float32)
        one = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        weights[name] = one + 0.1 * noise if noise.ndim == 1 else noise / np.float32(noise[0].size) ** 0.5
    return weights


def seeded_input() -> torch.Tensor:
    """x_t (1, 3, SIZE, SIZE)."""
    return torch.from_numpy(np.random.default_rng(1).standard_normal((1, 3, SIZE, SIZE), dtype=np.float32))


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


if __name__ == "__main__":
    main()
