"""The settings that suit an image size, where the command line leaves them open."""

import math


def default_network(image_size: int, narrow: bool = False) -> dict:
    """Network, batch size and learning rate that suit an image size in pixels (measured: docs/tuning.md).

    `narrow` is for simple images such as digits, which need less width at full resolution.
    """
    if image_size <= 16:  # 1.0 M parameters
        return dict(width=16, multipliers=[1, 2, 5], blocks=1, attention=[1, 2], batch_size=16, lr=2e-3)
    if image_size <= 32 and narrow:  # 2.7 M, or where 8 does not divide the size, 1.3 M
        deep = dict(multipliers=[1, 2, 4, 8], attention=[2, 3])
        shape = dict(multipliers=[1, 2, 6], attention=[2]) if image_size % 8 else deep
        return dict(width=16, blocks=1, batch_size=32, lr=2e-3, **shape)
    if image_size <= 32:  # 4.0 M
        return dict(width=32, multipliers=[1, 2, 4], blocks=2, attention=[1, 2], batch_size=64, lr=1e-3)
    if image_size <= 64:  # 16 M
        return dict(width=48, multipliers=[1, 2, 4, 6], blocks=1, attention=[2, 3], batch_size=64, lr=5e-4)
    levels = max(5, round(math.log2(image_size / 8)) + 1)  # the lowest has about 8 pixels
    multipliers, attention = [1] * (levels - 4) + [2, 2, 3, 4], [levels - 2, levels - 1]
    return dict(width=64, multipliers=multipliers, blocks=2, attention=attention, batch_size=32, lr=1e-4)
