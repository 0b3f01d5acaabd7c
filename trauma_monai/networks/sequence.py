"""2.5D stack -> slice logits: a 2D encoder, then a recurrent layer over the slice groups."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from trauma_monai.networks.encoders import create_encoder

__all__ = ["SliceSequenceNet"]

_RNNS = {"gru": nn.GRU, "lstm": nn.LSTM}


class SliceSequenceNet(nn.Module):
    """Score every slice group of a CT stack, each in the light of all others.

    Each group of neighbouring slices is one image with as many channels. A 2D encoder turns it into a feature vector
    (global average of its last map), a bidirectional recurrent layer passes over the groups, and a linear layer gives
    one logit per target and group.

    Shapes: B stacks, S slice groups, C slices per group, T targets.
    ``forward``: image (B, S, C, H, W), grey values 0 to 1 -> logits (B, S, T). Values that are not finite count as 0.

    Args:
        encoder: timm model name; see :func:`~trauma_monai.networks.encoders.create_encoder`.
        num_targets: T.
        rnn: ``gru`` or ``lstm``.
        hidden_size: width of the recurrent layer, per direction.
        dropout: probability, before the linear layer.
        image_size: H = W in pixels; only encoders built for one size take note of it.
        pretrained: start the encoder from timm's published weights.
        in_channels: C.
        chunk_size: images that pass the encoder at a time when not training: bounds the memory, not the result. A
            traced, exported or compiled network takes them all at once.

    Raises:
        ValueError: for an unknown encoder or rnn.

    Source:
        1st place, RSNA 2023 Abdominal Trauma Detection:
        https://www.kaggle.com/competitions/rsna-2023-abdominal-trauma-detection/discussion/447449
    """

    half_precision_parts = ("encoder",)
    """What :func:`~trauma_monai.networks.for_inference` may run in float16. The recurrent layer, which sums over all
    slices, costs next to nothing."""

    def __init__(
        self,
        encoder: str = "coat_lite_medium_384",
        num_targets: int = 11,
        rnn: str = "gru",
        hidden_size: int = 512,
        dropout: float = 0.1,
        image_size: int = 384,
        pretrained: bool = False,
        in_channels: int = 3,
        chunk_size: int = 8,
    ) -> None:
        super().__init__()
        if rnn not in _RNNS:
            raise ValueError(f"rnn is {rnn!r}, expected one of {', '.join(_RNNS)}.")
        self.encoder = create_encoder(encoder, pretrained, image_size, in_channels)
        self.rnn = _RNNS[rnn](self.encoder.num_features, hidden_size, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(2 * hidden_size, num_targets)
        self.chunk_size = chunk_size

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        images = _as_images(image)
        if self._in_chunks():
            features = torch.cat([self.pool(self.encoder(chunk)) for chunk in images.split(self.chunk_size)])
        else:
            features = self.pool(self.encoder(images))
        return self.classify(features.unflatten(0, image.shape[:2]))

    @torch.jit.unused
    def encode(self, image: torch.Tensor) -> list[torch.Tensor]:
        """Turn image (B, S, C, H, W) into the encoder's maps of B * S images, for a mask decoder to share."""
        return self.encoder(_as_images(image))

    def pool(self, maps: list[torch.Tensor]) -> torch.Tensor:
        """Turn the encoder's maps of N images into features (N, F)."""
        return functional.adaptive_avg_pool2d(self.encoder.head(maps[-1]), 1).flatten(1)

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """Turn features (B, S, F) into logits (B, S, T)."""
        sequence, _ = self.rnn(features)
        return self.classifier(self.dropout(sequence))

    def _in_chunks(self) -> bool:
        """Say whether to loop over chunks; not where batch statistics are taken, or where loops are written out."""
        if self.training or torch.jit.is_scripting():
            return not self.training
        return not (torch.jit.is_tracing() or torch.compiler.is_compiling())


def _as_images(image: torch.Tensor) -> torch.Tensor:
    return torch.nan_to_num(image, 0.0, 0.0, 0.0).flatten(0, 1)
