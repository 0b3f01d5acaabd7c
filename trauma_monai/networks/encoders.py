"""2D image encoders: (N, C, H, W) -> feature maps of falling resolution.

The layers and their pretrained weights are timm's. timm's own feature extractors do not script for CoaT, and leave out
a layer that the classifiers need for EfficientNet; the wrappers here hold timm's layers and write the forward pass out.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import timm
import torch
from torch import nn

__all__ = ["Encoder", "create_encoder"]


class Encoder(nn.Module):
    """A 2D encoder: images (N, C, H, W) -> list of feature maps, finest first.

    Attributes:
        channels: channels of each map.
        head: applied to the last map before it is pooled; the identity for most encoders.
        num_features: channels of ``head``'s output.
    """

    def __init__(self, channels: Sequence[int], num_features: int, head: nn.Module) -> None:
        super().__init__()
        self.channels = list(channels)
        self.num_features = num_features
        self.head = head

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        raise NotImplementedError


def create_encoder(name: str, pretrained: bool = False, image_size: int = 384, in_channels: int = 3) -> Encoder:
    """Build a timm model as an encoder, without its classifier.

    Args:
        name: timm model name, e.g. ``coat_lite_medium_384``, ``tf_efficientnetv2_s`` or ``resnet18d``.
        pretrained: start from timm's published weights; they are downloaded on first use.
        image_size: height and width of the images in pixels; only models built for one size take note of it.
        in_channels: channels of the images.

    Raises:
        ValueError: for a name that timm does not know, or a CoaT with parallel blocks (only ``coat_lite_*`` work).
        RuntimeError: when the pretrained weights cannot be had.
    """
    family = timm_family(name)
    options: dict[str, Any] = {"in_chans": in_channels}
    config = timm.get_pretrained_cfg(name)
    if config is not None and config.fixed_input_size:
        options["img_size"] = image_size
    if family not in ("coat", "efficientnet"):
        return _FeatureEncoder(create_timm(name, pretrained, features_only=True, **options))
    model = create_timm(name, pretrained, num_classes=0, **options)
    return _CoatLiteEncoder(model, name) if family == "coat" else _EfficientNetEncoder(model)


def timm_family(name: str) -> str:
    """Name the module of timm that a model comes from: ``resnet``, ``coat``, ``efficientnet``, ...

    Raises:
        ValueError: for a name that timm does not know.
    """
    if not timm.is_model(name):
        raise ValueError(f"encoder {name!r} is no model of timm {timm.__version__}; timm.list_models() has the names.")
    return timm.model_entrypoint(name).__module__.rsplit(".", 1)[-1]


def create_timm(name: str, pretrained: bool, **options: Any) -> Any:
    """``timm.create_model``, with an answer that helps when there are no pretrained weights.

    Raises:
        RuntimeError: when the pretrained weights cannot be had.
    """
    if not pretrained:
        return timm.create_model(name, pretrained=False, **options)
    try:
        return timm.create_model(name, pretrained=True, **options)
    except (OSError, RuntimeError, ValueError) as error:
        raise RuntimeError(
            f"no pretrained weights for encoder {name!r}: {error} "
            "Run once with a connection to the Hugging Face hub, or set pretrained to false."
        ) from error


class _FeatureEncoder(Encoder):
    """Any model that timm can take apart by itself (ResNet, ConvNeXt, ...)."""

    def __init__(self, features: Any) -> None:
        channels = features.feature_info.channels()
        super().__init__(channels, channels[-1], nn.Identity())
        self.features = features

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        return self.features(images)


class _EfficientNetEncoder(Encoder):
    """EfficientNet (B, Lite, V2): five maps at strides 2 to 32, and the 1x1 convolution before the pooling.

    timm's feature extractor drops that convolution.
    """

    def __init__(self, model: Any) -> None:
        channels = [info["num_chs"] for info in model.feature_info]
        head = nn.Sequential(OrderedDict(conv_head=model.conv_head, bn2=model.bn2))
        super().__init__(channels, model.num_features, head)
        self.conv_stem = model.conv_stem
        self.bn1 = model.bn1
        self.blocks = model.blocks
        self.stage_ends = list(model.stage_ends)  # the stem is 0, so the first block is 1

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        maps: list[torch.Tensor] = []
        x = self.bn1(self.conv_stem(images))
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index + 1 in self.stage_ends:
                maps.append(x)
        return maps


class _CoatLiteEncoder(Encoder):
    """CoaT-Lite: four maps at strides 4, 8, 16 and 32, before the last normalisation.

    timm fixes the image size; here it is read off the image, since no layer depends on it.

    Source:
        Xu et al., Co-Scale Conv-Attentional Image Transformers, https://arxiv.org/abs/2104.06399
    """

    def __init__(self, model: Any, name: str) -> None:
        if model.parallel_blocks is not None:
            raise ValueError(f"encoder {name!r} has parallel blocks, which are not supported; use one of coat_lite_*.")
        super().__init__(model.embed_dims, model.embed_dims[-1], nn.Identity())
        self.stages = nn.ModuleList(
            _CoatStage(
                getattr(model, f"patch_embed{stage}"),
                getattr(model, f"cls_token{stage}"),
                getattr(model, f"serial_blocks{stage}"),
            )
            for stage in range(1, 5)
        )

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        maps: list[torch.Tensor] = []
        x = images
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


class _CoatStage(nn.Module):
    """Map -> patches as tokens, a class token in front -> attention blocks -> coarser map."""

    def __init__(self, patch_embed: Any, class_token: nn.Parameter, blocks: nn.ModuleList) -> None:
        super().__init__()
        self.projection = patch_embed.proj
        self.norm = patch_embed.norm
        self.class_token = class_token
        self.blocks = blocks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        patches = self.projection(x)
        size = (patches.shape[2], patches.shape[3])
        tokens = self.norm(patches.flatten(2).transpose(1, 2))
        tokens = torch.cat([self.class_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)
        for block in self.blocks:
            tokens = block(tokens, size)
        return tokens[:, 1:].transpose(1, 2).unflatten(2, size).contiguous()
