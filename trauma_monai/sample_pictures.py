"""Pictures of what a network is trained on and what it makes of it, for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from ignite.engine import Engine, Events
from torch.utils.tensorboard import SummaryWriter

from trauma_monai.pictures import ORGAN_COLOURS

__all__ = ["SamplePictures", "draw_sample"]

OVERLAY = 0.45
"""How much of a pixel is its organ's colour; the tissue must stay visible."""

CLASSES = {4: ("liver", "spleen", "kidney", "bowel"), 5: ("liver", "spleen", "kidney", "kidney", "bowel")}
"""Organs by their code - 1: of the classification network, and of the organ network, which tells kidneys apart."""


class SamplePictures:
    """Draw a sample of the last batch of each epoch: slices with their organ masks, below them the predicted masks.

    Takes the batches of both bundles: windows of a volume, whose prediction are organ masks, and stacks of slices,
    whose prediction may have organ masks beside the injuries.

    Args:
        log_dir: folder of the TensorBoard logs.
        slices: how many slices of the sample are drawn, evenly spaced.
    """

    def __init__(self, log_dir: str | Path, slices: int = 8) -> None:
        self.log_dir = str(log_dir)
        self.slices = slices
        self._writer: SummaryWriter | None = None

    def attach(self, engine: Engine) -> None:
        """Draw when an epoch ends."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Write one picture."""
        sample = cast(list[Mapping[str, Any]], engine.state.output)[0]
        if self._writer is None:  # one for all epochs: each makes a file of its own
            self._writer = SummaryWriter(self.log_dir)
        picture = draw_sample(sample, self.slices)
        self._writer.add_image("sample (masks above, predicted below)", picture, engine.state.epoch, dataformats="HWC")
        self._writer.flush()


def draw_sample(sample: Mapping[str, Any], slices: int) -> np.ndarray:
    """Draw slices of a sample in a row with their organs, and below them with the predicted organs.

    Args:
        sample: one item of the trainer's output: ``image``, ``label`` and ``pred`` of a volume, (1, D, H, W), (1, D, H,
            W) and logits (5, D, H, W); or of a stack, (W, S, C, H, H), ``{"organs": (W, S, H, H)}`` and a pair of
            injury logits and mask logits [(W, S, O, H, H), ...]. The second row is left out without mask logits.
        slices: how many.

    Returns:
        RGB picture, uint8.
    """
    image, organs, masks = _of_stack(sample) if isinstance(sample["label"], Mapping) else _of_volume(sample)
    chosen = np.linspace(0, len(image) - 1, min(slices, len(image))).round().astype(int)
    rows = [_row(image[chosen], organs[chosen], 4 if masks is None else masks.shape[1])]
    if masks is not None:
        likely, code = masks[chosen].max(dim=1)
        rows.append(_row(image[chosen], torch.where(likely > 0, code + 1, 0), masks.shape[1]))
    return np.concatenate(rows, axis=0)


def _of_volume(sample: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    image, label, logits = (_plain(sample[key]) for key in ("image", "label", "pred"))
    return image[0], label[0], logits.transpose(0, 1)


def _of_stack(sample: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    image = _plain(sample["image"]).flatten(0, 1)
    middle = image[:, image.shape[1] // 2]
    organs = sample["label"].get("organs")
    pred = sample["pred"]
    masks = pred[1] if isinstance(pred, tuple | list) else None
    return (
        middle,
        torch.zeros_like(middle) if organs is None else _plain(organs).flatten(0, 1),
        _plain(masks[-1]).flatten(0, 1) if masks else None,  # MONAI turns an empty list into None
    )


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(tensor).detach().cpu().float()


def _row(image: torch.Tensor, codes: torch.Tensor, num_classes: int) -> np.ndarray:
    """Slices (N, H, W) side by side, (H, N * W, 3), grey from the darkest to the brightest, organs in their colours."""
    grey = (image - image.min()) / (image.max() - image.min()).clamp_min(1e-6)
    colours = torch.zeros(num_classes + 1, 3)
    for code, organ in enumerate(CLASSES.get(num_classes, CLASSES[4])[:num_classes], start=1):
        colours[code] = torch.tensor([int(ORGAN_COLOURS[organ][i : i + 2], 16) / 255 for i in (1, 3, 5)])
    known = torch.where(codes <= num_classes, codes, 0).long()
    share = (OVERLAY * (known > 0)).unsqueeze(-1)
    drawn = grey.unsqueeze(-1) * (1 - share) + colours[known] * share
    return np.concatenate(list((drawn * 255).round().byte().numpy()), axis=1)
