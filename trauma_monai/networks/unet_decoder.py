"""The U-Net decoder: doubles the resolution once per feature map, taking in the next finer map each time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

__all__ = ["UNetDecoder"]


class UNetDecoder(nn.Module):
    """Feature maps (finest first, each twice as fine as the next) -> one map, twice as fine as the finest.

    2D as built; :func:`trauma_monai.networks.unet3d.inflate` makes it 3D.

    Args:
        channels: channels of the maps, finest first.
        decoder_channels: output channels of the blocks, one per map, coarsest first.

    Raises:
        ValueError: when the two do not have the same length.

    Source:
        The decoder of segmentation_models.pytorch, without attention; parameters carry the same names.
    """

    def __init__(self, channels: Sequence[int], decoder_channels: Sequence[int]) -> None:
        super().__init__()
        if len(channels) != len(decoder_channels):
            raise ValueError(
                f"{len(decoder_channels)} decoder_channels {list(decoder_channels)} for {len(channels)} feature maps; "
                "expected one per map."
            )
        coarse_first = list(channels)[::-1]
        inputs = [coarse_first[0], *decoder_channels[:-1]]
        skips = [*coarse_first[1:], 0]
        self.blocks = nn.ModuleList(
            _UpBlock(wide, skip, out) for wide, skip, out in zip(inputs, skips, decoder_channels, strict=True)
        )

    def forward(self, maps: list[torch.Tensor]) -> torch.Tensor:
        x = maps[-1]
        last = len(maps) - 1
        for index, block in enumerate(self.blocks):
            x = functional.interpolate(x, scale_factor=2.0, mode="nearest")
            if index < last:
                x = torch.cat([x, maps[last - 1 - index]], dim=1)
            x = block(x)
        return x


class _UpBlock(nn.Module):
    def __init__(self, in_channels: int, skip_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = _conv_norm_relu(in_channels + skip_channels, out_channels)
        self.conv2 = _conv_norm_relu(out_channels, out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv2(self.conv1(x))


def _conv_norm_relu(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )
