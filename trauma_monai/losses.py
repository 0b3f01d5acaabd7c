"""Training losses: injuries per slice group, and organ masks as a second task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn import functional

__all__ = ["InjuryLoss", "MultilabelDiceLoss"]

DICE_EPSILON = 1e-7
"""Least denominator of a Dice score, as in segmentation_models_pytorch."""


class MultilabelDiceLoss(nn.Module):
    """Soft Dice loss of independent (sigmoid) classes, where a class that the target lacks counts 0.

    Intersection and areas of a class are summed over the whole batch and all of space, so that one small organ in one
    slice does not weigh as much as a full one. The mean is over all classes, absent ones included: the loss of a
    batch without organs is 0, and gives no gradient.

    Equals `DiceLoss(mode="multilabel")` of segmentation_models_pytorch (from logits, smooth 0, eps 1e-7). MONAI's
    `DiceLoss` differs: it charges 1 for an absent class. Computed in float32, since half precision overflows in the
    sums.

    Source: smp: https://github.com/qubvel-org/segmentation_models.pytorch; used so by the 1st place of RSNA 2023.
    """

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Compare logits with masks.

        Args:
            logits: shape (N, C, ...), before the sigmoid.
            target: either one binary mask per class, shape (N, C, ...), or a label map of whole numbers, shape
                (N, 1, ...), in which class c has the code c + 1; other codes are background.

        Returns:
            The loss, a float32 scalar, 0 to 1.

        Raises:
            ValueError: when the shapes do not fit.
        """
        num_classes = logits.shape[1]
        expected = [(len(logits), channels, *logits.shape[2:]) for channels in (num_classes, 1)]
        if tuple(target.shape) not in expected:
            raise ValueError(
                f"masks have shape {tuple(target.shape)}, logits {tuple(logits.shape)}; expected masks of shape "
                f"{expected[0]} or a label map of shape {expected[1]}. A mask head has to return masks at the "
                "resolution of the target: resize its logits in the decoder."
            )
        if target.shape[1] != num_classes:
            codes = torch.arange(1, num_classes + 1, device=target.device)
            target = target == codes.view(1, -1, *[1] * (target.ndim - 2))
        over = [0, *range(2, logits.ndim)]
        probability = logits.float().sigmoid()
        mask = target.to(probability.dtype)
        present = mask.sum(dim=over)
        overlap = (probability * mask).sum(dim=over)
        dice = 2 * overlap / (probability.sum(dim=over) + present).clamp_min(DICE_EPSILON)
        return ((1 - dice) * (present > 0)).mean()


class InjuryLoss(nn.Module):
    """Binary cross-entropy of the injuries plus the Dice loss of each organ mask head, weighted.

    Shapes: B studies, W windows, S slice groups, T targets, O organs, H x H pixels.

    A NaN is neither replaced nor skipped: a network that returns one has diverged, and MONAI's `TerminateOnNan` should
    see it. (The reference zeroes NaN in the logits, which turns into probabilities of 0.5.)

    Args:
        mask_weight: weight of the Dice loss of each mask head; with two heads both count. The published 0.1 to 0.3.

    Source:
        1st place, RSNA 2023 Abdominal Trauma Detection:
        https://github.com/Nischaydnk/RSNA-2023-1st-place-solution
    """

    def __init__(self, mask_weight: float = 0.0) -> None:
        super().__init__()
        self.mask_weight = mask_weight
        self.mask_loss = MultilabelDiceLoss()

    def forward(
        self,
        pred: torch.Tensor | tuple[torch.Tensor, Sequence[torch.Tensor]],
        target: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        """Add up the losses.

        Args:
            pred: injury logits (B, W, S, T); or a pair of them and a list of mask logits, each (B, W, S, O, H, H).
                The first O organs of the label map are compared.
            target: ``label``: soft labels (B, W, S, T), 0 to 1; ``organs``: label map (B, W, S, H, H), 0 background,
                1 liver, 2 spleen, 3 kidney, 4 bowel. ``organs`` is needed only for a pair.

        Returns:
            The loss, a float32 scalar.

        Raises:
            ValueError: when shapes do not fit.
            KeyError: when masks are predicted but ``target`` has no ``organs``.
        """
        logits, masks = pred if isinstance(pred, tuple | list) else (pred, ())
        label = target["label"]
        if logits.shape != label.shape:
            raise ValueError(
                f"injury logits have shape {tuple(logits.shape)}, labels {tuple(label.shape)}; expected the same: "
                "(studies, windows, slice groups, targets)."
            )
        loss = functional.binary_cross_entropy_with_logits(logits.float(), label.float())
        if not masks:
            return loss
        if "organs" not in target:
            raise KeyError("the network predicts organ masks, but the batch has no 'organs' to compare them with.")
        organs = target["organs"]
        flat_organs = organs.flatten(0, -3).unsqueeze(1)
        for mask in masks:
            loss = loss + self.mask_weight * self.mask_loss(mask.flatten(0, -4), flat_organs)
        return loss
