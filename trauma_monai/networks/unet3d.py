"""CT volume -> organ logits: a 2D U-Net whose kernels are repeated along the third axis."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from trauma_monai.networks.encoders import create_timm, timm_family
from trauma_monai.networks.unet_decoder import UNetDecoder

__all__ = ["InflatedUNet", "inflate"]


class InflatedUNet(nn.Module):
    """A timm ResNet and a U-Net decoder, both turned into 3D.

    ``forward``: image (B, 1, Z, Y, X), grey values 0 to 1 -> logits (B, num_classes, Z, Y, X). Z, Y and X must be
    multiples of ``stride`` (16 with four decoder channels).

    The stages of the encoder that no decoder block takes in are not built: for resnet18d with four blocks that leaves
    14.8 of 39.7 million parameters, with the same output.

    Args:
        encoder: timm name of a ResNet without attention, e.g. ``resnet18d``, or ``resnet10t`` for a small network.
        decoder_channels: output channels of the decoder's blocks, coarsest first; their number is the depth.
        num_classes: output channels.
        dropout: probability, before the last convolution. The published system has none.
        drop_path: probability that a residual branch of the encoder is skipped, growing from the first to the last.
        pretrained: start the encoder from timm's published (2D) weights.

    Raises:
        ValueError: for an encoder that is unknown or has no 3D form here, or a volume that does not fit ``stride``.

    Source:
        1st place, RSNA 2023 Abdominal Trauma Detection (its 3D segmentation); the way to inflate a 2D network is that
        of the 1st place of RSNA 2022 Cervical Spine Fracture Detection.
    """

    def __init__(
        self,
        encoder: str = "resnet18d",
        decoder_channels: Sequence[int] = (256, 128, 64, 32),
        num_classes: int = 5,
        dropout: float = 0.0,
        drop_path: float = 0.1,
        pretrained: bool = False,
    ) -> None:
        if timm_family(encoder) != "resnet":
            raise ValueError(f"encoder {encoder!r} has no 3D form here; use a ResNet such as resnet18d.")
        super().__init__()
        features = create_timm(
            encoder,
            pretrained,
            features_only=True,
            out_indices=tuple(range(len(decoder_channels))),
            drop_path_rate=drop_path,
        )
        channels = features.feature_info.channels()
        self.stride = 2 ** len(decoder_channels)
        self.encoder = inflate(features)
        self.decoder = inflate(UNetDecoder(channels, decoder_channels))
        self.dropout = nn.Dropout(dropout)
        self.segmentation_head = inflate(nn.Conv2d(decoder_channels[-1], num_classes, kernel_size=3, padding=1))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        for size in image.shape[2:]:
            if size % self.stride != 0:
                raise ValueError(
                    f"volume of {image.shape[2:]} voxels: expected multiples of {self.stride}; pad or resize it."
                )
        maps = self.encoder(image.expand(-1, 3, -1, -1, -1))
        return self.segmentation_head(self.dropout(self.decoder(maps)))


def inflate(module: nn.Module) -> nn.Module:
    """Turn a 2D network into 3D, layer by layer: (N, C, H, W) -> (N, C, D, H, W).

    A kernel (o, i, k, k) becomes (o, i, k, k, k) by repetition along the new last axis. It is not divided by k: the
    batch normalisation that follows takes up the change of scale, and published weights rely on it.

    Containers are changed in place.

    Raises:
        ValueError: when a layer is neither convertible nor known to work in any number of dimensions.
    """
    if isinstance(module, nn.Conv2d):
        return _inflate_convolution(module).train(module.training)
    if type(module) is nn.BatchNorm2d:  # timm's subclasses also hold an activation
        return _inflate_batch_norm(module).train(module.training)
    if isinstance(module, nn.MaxPool2d):
        return nn.MaxPool3d(module.kernel_size, module.stride, module.padding, module.dilation, False, module.ceil_mode)
    if isinstance(module, nn.AvgPool2d):
        return _AvgPool3d(module)
    if type(module).__name__ not in _ANY_DIMENSION:
        raise ValueError(
            f"layer {type(module).__name__} has no 3D form here; use a ResNet without attention, such as resnet18d."
        )
    for name, child in module.named_children():
        setattr(module, name, inflate(child))
    return module


_ANY_DIMENSION = {
    "FeatureListNet",
    "BasicBlock",
    "Bottleneck",
    "DropPath",
    "Identity",
    "ReLU",
    "SiLU",
    "Sequential",
    "ModuleList",
    "UNetDecoder",
    "_UpBlock",
}
"""Containers and layers whose code does not depend on the number of axes."""


def _inflate_convolution(flat: nn.Conv2d) -> nn.Conv3d:
    if type(flat) is not nn.Conv2d or flat.kernel_size[0] != flat.kernel_size[1]:
        raise ValueError(f"layer {flat} has no 3D form here; use a ResNet without attention, such as resnet18d.")
    deep = nn.Conv3d(
        flat.in_channels,
        flat.out_channels,
        flat.kernel_size[0],
        stride=flat.stride[0],
        padding=flat.padding[0],
        dilation=flat.dilation[0],
        groups=flat.groups,
        bias=flat.bias is not None,
    )
    with torch.no_grad():
        deep.weight.copy_(flat.weight.unsqueeze(-1).expand_as(deep.weight))
        if flat.bias is not None and deep.bias is not None:
            deep.bias.copy_(flat.bias)
    return deep


def _inflate_batch_norm(flat: nn.BatchNorm2d) -> nn.BatchNorm3d:
    deep = nn.BatchNorm3d(flat.num_features, flat.eps, flat.momentum, flat.affine, flat.track_running_stats)
    deep.load_state_dict(flat.state_dict())
    return deep


class _AvgPool3d(nn.Module):
    """Average pooling that also takes half precision on a CPU, for which torch has no kernel."""

    def __init__(self, flat: nn.AvgPool2d) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.padding = (
            _one_number(value) for value in (flat.kernel_size, flat.stride, flat.padding)
        )
        self.ceil_mode = flat.ceil_mode
        self.count_include_pad = flat.count_include_pad

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = x.float() if x.is_cpu else x
        pooled = functional.avg_pool3d(
            pooled, self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad
        )
        return pooled.to(x.dtype)


def _one_number(value: int | tuple[int, ...]) -> int:
    return value if isinstance(value, int) else value[0]
