"""Auxiliary organ-mask decoders: learned along with the injuries, thrown away when the network is deployed.

A slice classifier that must also say where the organs are looks at the organs; the published system gains 0.01 to 0.03
in the competition metric. The decoders read the encoder's feature maps and answer at the size of the image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional

from trauma_monai.networks.sequence import SliceSequenceNet
from trauma_monai.networks.unet_decoder import UNetDecoder

__all__ = ["ConvMaskHeads", "EffNetMaskDecoder", "UNetMaskDecoder", "WithOrganMasks"]


class WithOrganMasks(nn.Module):
    """A SliceSequenceNet and an organ-mask decoder on its encoder, for training.

    ``forward``, training: image (B, S, C, H, W) -> (logits (B, S, T), [mask logits (B, S, O, H, W), ...]), one entry
    per head of the decoder. Evaluating: logits only, as the deployed network gives them.

    Args:
        net: the network to deploy; its weights are those under ``net``.
        decoder: ``heads`` (:class:`ConvMaskHeads`), ``unet`` (:class:`UNetMaskDecoder`), ``effnet_unet``
            (:class:`EffNetMaskDecoder`) or ``none``.
        num_organs: O.

    Raises:
        ValueError: for an unknown decoder, or one that does not fit the encoder's maps.
    """

    def __init__(self, net: SliceSequenceNet, decoder: str = "heads", num_organs: int = 4) -> None:
        super().__init__()
        if decoder not in _DECODERS:
            raise ValueError(f"decoder is {decoder!r}, expected one of {', '.join(_DECODERS)}.")
        self.net = net
        self.decoder = _DECODERS[decoder](net.encoder.channels, num_organs)

    def forward(self, image: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, list[torch.Tensor]]:
        if not self.training:
            return self.net(image)
        maps = self.net.encode(image)
        stack = image.shape[:2]
        logits = self.net.classify(self.net.pool(maps).unflatten(0, stack))
        size = (image.shape[-2], image.shape[-1])
        return logits, [mask.unflatten(0, stack) for mask in self.decoder(maps, size)]


class _NoMasks(nn.Module):
    """No organ masks: what is left is the network alone."""

    def __init__(self, channels: Sequence[int], num_organs: int) -> None:
        super().__init__()

    def forward(self, maps: list[torch.Tensor], size: tuple[int, int]) -> list[torch.Tensor]:
        return []


class ConvMaskHeads(nn.Module):
    """Two independent heads, on the last and on the second last map: two masks, each learned on its own.

    ``forward``: maps of N images, (H, W) -> [(N, O, H, W) from the last map, (N, O, H, W) from the second last].

    Args:
        channels: channels of the encoder's maps, finest first.
        num_organs: O.

    Source:
        1st place, RSNA 2023 Abdominal Trauma Detection (``mask_head_4``, ``mask_head_3``).
    """

    def __init__(self, channels: Sequence[int], num_organs: int = 4) -> None:
        super().__init__()
        self.last = _convolutions(channels[-1], num_organs)
        self.second_last = _convolutions(channels[-2], num_organs)

    def forward(self, maps: list[torch.Tensor], size: tuple[int, int]) -> list[torch.Tensor]:
        return [_resize(self.last(maps[-1]), size), _resize(self.second_last(maps[-2]), size)]


def _convolutions(in_channels: int, num_organs: int, width: int = 128) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, width, kernel_size=3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, width, kernel_size=3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, num_organs, kernel_size=1),
    )


class UNetMaskDecoder(nn.Module):
    """A U-Net decoder with pixel shuffles and a feature pyramid, made for CoaT's four maps at strides 4 to 32.

    ``forward``: maps of N images, (H, W) -> [(N, O, H, W)].

    Args:
        channels: channels of the encoder's maps, finest first; the last four are used.
        num_organs: O.

    Raises:
        ValueError: when there are fewer than four maps.

    Source:
        1st place, RSNA 2023 Abdominal Trauma Detection; the blocks are those of the CoaT U-Net of the 2023 contrails
        competition (``dec4``, ``dec3``, ``dec2``, ``fpn``, ``final_conv``).
    """

    def __init__(self, channels: Sequence[int], num_organs: int = 4) -> None:
        super().__init__()
        if len(channels) < 4:
            raise ValueError(
                f"the unet mask decoder needs four feature maps, the encoder has {len(channels)}; use heads."
            )
        stride4, stride8, stride16, stride32 = channels[-4:]
        pyramid = 32
        self.dec4 = _UNetBlock(stride32, stride16, 384)
        self.dec3 = _UNetBlock(384, stride8, 192)
        self.dec2 = _UNetBlock(192, stride4, 96)
        self.fpn = nn.ModuleList(_pyramid_level(width, pyramid) for width in (stride32, 384, 192))
        self.final_shuffle = _shuffle(96 + 3 * pyramid, 48, blur=True)
        self.final_conv = nn.Sequential(
            nn.Conv2d(48, 48, kernel_size=3, padding=1), _ChannelNorm(48), nn.GELU(), nn.Conv2d(48, num_organs, 1)
        )

    def forward(self, maps: list[torch.Tensor], size: tuple[int, int]) -> list[torch.Tensor]:
        stride4, stride8, stride16, stride32 = maps[-4:]
        up16 = self.dec4(stride32, stride16)
        up8 = self.dec3(up16, stride8)
        up4 = self.dec2(up8, stride4)
        quarter = (up4.shape[-2], up4.shape[-1])
        levels = zip(self.fpn, (stride32, up16, up8), strict=True)
        pyramid = torch.cat([*(_resize(convolve(level), quarter) for convolve, level in levels), up4], dim=1)
        return [_resize(self.final_conv(self.final_shuffle(pyramid)), size)]


class _UNetBlock(nn.Module):
    """Double the coarse map's resolution, put the skipped map beside it, convolve twice."""

    def __init__(self, coarse: int, skip: int, out: int) -> None:
        super().__init__()
        self.shuffle = _shuffle(coarse, coarse // 2, blur=False)
        self.norm = _ChannelNorm(skip)
        self.conv1 = nn.Conv2d(coarse // 2 + skip, out, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(out, out, kernel_size=3, padding=1)

    def forward(self, coarse: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        x = functional.gelu(torch.cat([self.shuffle(coarse), self.norm(skip)], dim=1))
        return functional.gelu(self.conv2(functional.gelu(self.conv1(x))))


def _pyramid_level(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, 2 * out_channels, kernel_size=3, padding=1),
        nn.GELU(),
        _ChannelNorm(2 * out_channels),
        nn.Conv2d(2 * out_channels, out_channels, kernel_size=3, padding=1),
    )


def _shuffle(in_channels: int, out_channels: int, blur: bool) -> nn.Sequential:
    """Learned doubling of the resolution; ``blur`` averages the checkerboard away."""
    expand = nn.Conv2d(in_channels, 4 * out_channels, kernel_size=1)
    _start_as_nearest(expand)
    layers: list[nn.Module] = [expand, _ChannelNorm(4 * out_channels), nn.GELU(), nn.PixelShuffle(2)]
    if blur:
        layers += [nn.ReplicationPad2d((1, 0, 1, 0)), nn.AvgPool2d(2, stride=1)]
    return nn.Sequential(*layers)


def _start_as_nearest(expand: nn.Conv2d) -> None:
    """ICNR: give the four channels that become one 2x2 block the same weights (https://arxiv.org/abs/1707.02937)."""
    with torch.no_grad():
        kernels = torch.empty_like(expand.weight[::4])
        nn.init.kaiming_normal_(kernels)
        expand.weight.copy_(kernels.repeat_interleave(4, dim=0))


class _ChannelNorm(nn.LayerNorm):
    """Layer normalisation over the channels of a map, pixel by pixel."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class EffNetMaskDecoder(nn.Module):
    """A plain U-Net decoder on five maps at strides 2 to 32, as EfficientNets and ResNets have them.

    ``forward``: maps of N images, (H, W) -> [(N, O, H, W)].

    Args:
        channels: channels of the encoder's maps, finest first.
        num_organs: O.

    Raises:
        ValueError: when there are not five maps.

    Source:
        1st place, RSNA 2023 Abdominal Trauma Detection: ``Unet`` of segmentation_models.pytorch.
    """

    def __init__(self, channels: Sequence[int], num_organs: int = 4) -> None:
        super().__init__()
        if len(channels) != 5:
            raise ValueError(
                f"decoder effnet_unet needs five feature maps (strides 2 to 32), the encoder has {len(channels)}; "
                "use unet or heads."
            )
        self.unet = UNetDecoder(channels, (256, 128, 64, 32, 16))
        self.segmentation_head = nn.Conv2d(16, num_organs, kernel_size=3, padding=1)
        self._start_as_published()

    def _start_as_published(self) -> None:
        for layer in self.unet.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
        nn.init.xavier_uniform_(self.segmentation_head.weight)
        if self.segmentation_head.bias is not None:
            nn.init.zeros_(self.segmentation_head.bias)

    def forward(self, maps: list[torch.Tensor], size: tuple[int, int]) -> list[torch.Tensor]:
        return [_resize(self.segmentation_head(self.unet(maps)), size)]


def _resize(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return functional.interpolate(maps, size=size, mode="bilinear", align_corners=False)


_DECODERS: dict[str, Callable[[Sequence[int], int], nn.Module]] = {
    "heads": ConvMaskHeads,
    "unet": UNetMaskDecoder,
    "effnet_unet": EffNetMaskDecoder,
    "none": _NoMasks,
}
