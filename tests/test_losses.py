"""Losses against numbers worked out by hand, and against the reference's Dice."""

from __future__ import annotations

import math

import pytest
import torch

from trauma_monai.losses import InjuryLoss, MultilabelDiceLoss

CERTAIN = 50.0  # a logit whose sigmoid is 1 in float32


def test_dice_is_taken_per_class_over_batch_and_space():
    """Class 0: predicted .5 everywhere (4 pixels), target 3 pixels: 1 - 2 * 1.5 / (2 + 3) = .4. Class 1: perfect."""
    logits = torch.zeros(2, 2, 2)
    target = torch.tensor([[[1.0, 1.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, 0.0]]])
    logits[:, 1] = (2 * target[:, 1] - 1) * CERTAIN
    assert MultilabelDiceLoss()(logits, target).item() == pytest.approx((0.4 + 0.0) / 2)


def test_class_absent_from_the_target_counts_zero_but_stays_in_the_mean():
    logits = torch.full((1, 2, 3), CERTAIN)
    target = torch.tensor([[[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]])
    assert MultilabelDiceLoss()(logits, target).item() == pytest.approx((1 - 2 * 1 / (3 + 1)) / 2)


def test_batch_without_organs_has_no_loss_and_no_gradient():
    logits = torch.randn(2, 3, 4, requires_grad=True)
    loss = MultilabelDiceLoss()(logits, torch.zeros(2, 1, 4, dtype=torch.uint8))
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


def test_label_map_equals_its_one_hot_masks():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 5, 6, generator=generator)
    codes = torch.randint(0, 6, (2, 1, 4, 5, 6), generator=generator).to(torch.uint8)  # 4 and 5 are background here
    masks = torch.cat([codes == code for code in (1, 2, 3)], dim=1)
    loss = MultilabelDiceLoss()
    torch.testing.assert_close(loss(logits, codes), loss(logits, masks.float()))


def reference_dice(y_pred: torch.Tensor, y_true: torch.Tensor) -> torch.Tensor:
    """`DiceLoss("multilabel").forward` of segmentation_models_pytorch 0.3, written out with its defaults."""
    y_pred = torch.nn.functional.logsigmoid(y_pred).exp()
    y_true = y_true.view(*y_true.shape[:2], -1).type_as(y_pred)
    y_pred = y_pred.view(*y_true.shape)
    intersection = torch.sum(y_pred * y_true, dim=(0, 2))
    cardinality = torch.sum(y_pred + y_true, dim=(0, 2))
    scores = (2.0 * intersection + 0.0) / (cardinality + 0.0).clamp_min(1e-7)
    return ((1.0 - scores) * (y_true.sum((0, 2)) > 0)).mean()


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5])
def test_dice_equals_the_reference(share: float):
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(2, 4, 6, 7, generator=generator)
    target = (torch.rand(2, 4, 6, 7, generator=generator) < share).float()
    torch.testing.assert_close(MultilabelDiceLoss()(logits, target), reference_dice(logits, target))


def test_half_precision_does_not_overflow():
    """131,072 pixels: more than the largest float16, 65,504."""
    logits = torch.full((2, 1, 256, 256), 20.0, dtype=torch.float16)
    assert MultilabelDiceLoss()(logits, torch.ones(2, 1, 256, 256)).item() == pytest.approx(0, abs=1e-6)


def test_mask_head_at_its_own_resolution_is_refused():
    with pytest.raises(ValueError, match="resize its logits in the decoder"):
        MultilabelDiceLoss()(torch.zeros(1, 4, 8, 8), torch.zeros(1, 1, 16, 16))


def test_injury_loss_of_logits_alone_is_their_mean_cross_entropy():
    """Logit 0 costs ln 2 whatever the label; logit ln 3 (p = .75) costs -.5 ln .75 - .5 ln .25 at label .5."""
    logits = torch.tensor([0.0, math.log(3)]).view(1, 1, 2, 1)
    label = torch.tensor([0.3, 0.5]).view(1, 1, 2, 1)
    expected = (math.log(2) - 0.5 * math.log(0.75) - 0.5 * math.log(0.25)) / 2
    assert InjuryLoss(mask_weight=0.25)(logits, {"label": label}).item() == pytest.approx(expected)


def test_every_mask_head_adds_its_weighted_dice():
    """Two windows of one study, three organs; liver in 1 of 4 x 2 pixels, predicted .5 everywhere in one head."""
    label = torch.zeros(1, 2, 2, 1)
    logits = torch.full((1, 2, 2, 1), -CERTAIN)  # injury loss 0
    organs = torch.zeros(1, 2, 2, 1, 2, dtype=torch.uint8)
    organs[0, 1, 0, 0, 1] = 1
    undecided = torch.zeros(1, 2, 2, 3, 1, 2)
    perfect = torch.full((1, 2, 2, 3, 1, 2), -CERTAIN)
    perfect[0, 1, 0, 0, 0, 1] = CERTAIN
    loss = InjuryLoss(mask_weight=0.25)
    liver = 1 - 2 * 0.5 / (4 + 1)  # spleen and kidney are absent: 0
    target = {"label": label, "organs": organs}
    assert loss((logits, [undecided]), target).item() == pytest.approx(0.25 * liver / 3)
    assert loss((logits, [undecided, perfect, undecided]), target).item() == pytest.approx(2 * 0.25 * liver / 3)


def test_three_organ_heads_ignore_bowel_and_four_do_not():
    organs = torch.full((1, 1, 1, 2, 2), 4, dtype=torch.uint8)
    target = {"label": torch.zeros(1, 1, 1, 1), "organs": organs}
    logits = torch.full((1, 1, 1, 1), -CERTAIN)
    loss = InjuryLoss(mask_weight=1.0)
    assert loss((logits, [torch.zeros(1, 1, 1, 3, 2, 2)]), target).item() == pytest.approx(0, abs=1e-6)
    bowel = 1 - 2 * 2 / (2 + 4)
    assert loss((logits, [torch.zeros(1, 1, 1, 4, 2, 2)]), target).item() == pytest.approx(bowel / 4)


def test_nan_logits_are_not_hidden():
    loss = InjuryLoss()(torch.full((1, 1, 2, 3), torch.nan), {"label": torch.zeros(1, 1, 2, 3)})
    assert loss.isnan()


def test_targets_that_do_not_fit_are_refused():
    loss = InjuryLoss(mask_weight=0.1)
    logits = torch.zeros(1, 1, 2, 3)
    with pytest.raises(ValueError, match=r"logits have shape \(1, 1, 2, 3\), labels \(1, 2, 3\)"):
        loss(logits, {"label": torch.zeros(1, 2, 3)})
    with pytest.raises(KeyError, match="no 'organs'"):
        loss((logits, [torch.zeros(1, 1, 2, 4, 8, 8)]), {"label": logits})
