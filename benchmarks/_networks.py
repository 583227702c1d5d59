"""Networks of three sizes, for time alone: their weights are random."""

from __future__ import annotations

import torch
from torch import nn

#: Channels by level of a U-Net for images of 3 x 32 x 32, attention on the second, by millions of parameters.
SIZES = {"1M": (32, 32, 64), "30M": (128, 192, 256, 256), "400M": (448, 896, 1152)}
SHAPE = (3, 32, 32)


def unet(name: str, device: str = "cpu") -> nn.Module:
    """A U-Net of that size."""
    from diffusers import UNet2DModel

    channels = SIZES[name]
    levels = len(channels)
    with torch.device(device):
        network: nn.Module = UNet2DModel(
            sample_size=32,
            in_channels=3,
            out_channels=3,
            layers_per_block=2,
            norm_num_groups=16,
            block_out_channels=channels,
            down_block_types=tuple("AttnDownBlock2D" if level == 1 else "DownBlock2D" for level in range(levels)),
            up_block_types=tuple("AttnUpBlock2D" if level == levels - 2 else "UpBlock2D" for level in range(levels)),
        )
    return network.eval().requires_grad_(False)
