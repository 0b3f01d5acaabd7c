"""From slice probabilities to the 13 columns, with numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from monai.transforms import Compose

from trauma_monai.pooling import (
    BlendPrior,
    Columns,
    ModelOutput,
    PoolSlicesd,
    Power,
    ScaleColumns,
    SubmissionColumns,
    assessed_groups,
    fit_scales,
    merge_models,
    pool_series,
    pool_study,
    prior_columns,
)
from trauma_monai.targets import GROUPS, SUBMISSION_COLUMNS, TARGETS

# Two windows of two slice groups, two targets.
SLICES = torch.tensor([[[0.1, 0.5], [0.2, 0.4]], [[0.7, 0.0], [0.2, 0.1]]])

PREDICTED = {
    "liver_injury": 0.4,
    "spleen_injury": 0.0,
    "kidney_injury": 1.0,
    "liver_low": 0.3,
    "liver_high": 0.05,
    "spleen_low": 0.0,
    "spleen_high": 0.0,
    "kidney_low": 0.5,
    "kidney_high": 0.25,
    "bowel_injury": 0.2,
    "extravasation_injury": 0.3,
}


@pytest.mark.parametrize(("mode", "expected"), [("max", [0.7, 0.5]), ("mean", [0.3, 0.25])])
def test_slices_of_all_windows_are_pooled_and_kept(mode: str, expected: list[float]):
    sample = PoolSlicesd("pred", mode=mode)({"pred": SLICES})
    torch.testing.assert_close(sample["pred"], torch.tensor(expected))
    torch.testing.assert_close(sample["slice_probabilities"], SLICES)


def test_half_precision_becomes_float32_before_it_is_pooled():
    assert PoolSlicesd()({"pred": SLICES.bfloat16()})["pred"].dtype == torch.float32


def test_logits_nan_and_unpooled_shapes_are_refused():
    with pytest.raises(ValueError, match=r"spans -1 to 0.7, expected 0 to 1: apply the sigmoid first"):
        PoolSlicesd()({"pred": torch.where(SLICES == 0, -1.0, SLICES)})
    with pytest.raises(ValueError, match="spans nan to nan"):
        PoolSlicesd()({"pred": SLICES * torch.nan})
    with pytest.raises(ValueError, match=r"\(2, 2\); expected \(windows, slice groups, targets\)"):
        PoolSlicesd()({"pred": SLICES[0]})
    with pytest.raises(ValueError, match="mode is 'median'; expected 'max' or 'mean'"):
        PoolSlicesd(mode="median")


SERIES = [np.array([0.2, 0.8]), np.array([0.6, 0.4])]


def test_series_are_pooled_by_max_mean_or_the_late_phase():
    np.testing.assert_allclose(pool_series(SERIES, "max"), [0.6, 0.8])
    np.testing.assert_allclose(pool_series(SERIES, "mean"), [0.4, 0.6])
    np.testing.assert_allclose(pool_series(SERIES, "lowest_aortic_hu", [300.0, 150.0]), [0.6, 0.4])


def test_unknown_and_failed_aortic_measurements_are_never_the_lowest():
    for unknown in (None, math.nan, -1024.0):
        np.testing.assert_allclose(pool_series(SERIES, "lowest_aortic_hu", [300.0, unknown]), [0.2, 0.8])
    np.testing.assert_allclose(pool_series(SERIES[:1], "lowest_aortic_hu"), [0.2, 0.8])
    with pytest.raises(ValueError, match="none of 2 series has a known aortic_hu; pool them by 'max' or 'mean'"):
        pool_series(SERIES, "lowest_aortic_hu", [None, -1024.0])
    with pytest.raises(ValueError, match="0 values of aortic_hu for 2 series"):
        pool_series(SERIES, "lowest_aortic_hu")


def test_series_are_pooled_for_each_model_before_the_models_are_averaged():
    one, two = (
        [ModelOutput({"bowel_injury": a}, 3.0), ModelOutput({"bowel_injury": b})] for a, b in ((0.9, 0.1), (0.1, 0.5))
    )
    # (3 x max(.9, .1) + max(.1, .5)) / 4; the other way round it were max((3 x .9 + .1) / 4, (3 x .1 + .5) / 4) = .7
    assert pool_study([one, two]) == pytest.approx({"bowel_injury": 0.8})
    assert pool_study([one, two], "mean") == pytest.approx({"bowel_injury": (3 * 0.5 + 0.3) / 4})


def test_pooling_without_series_or_with_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="no series to pool"):
        pool_series([])
    with pytest.raises(ValueError, match="mode is 'min'"):
        pool_series(SERIES, "min")


def test_columns_are_those_of_the_first_place():
    columns = SubmissionColumns()(PREDICTED)
    assert tuple(columns) == SUBMISSION_COLUMNS
    liver = 0.6 + 0.3 + 2 * 0.05
    assert columns["liver_healthy"] == pytest.approx(0.6 / liver)
    assert columns["liver_high"] == pytest.approx(0.1 / liver)
    assert columns["bowel_injury"] == pytest.approx(0.2)
    injury, healthy = 3 * 0.0636 + 4 * 0.3, 0.5 * (1 - 0.0636) + 0.5 * 0.7
    assert columns["extravasation_injury"] == pytest.approx(injury / (injury + healthy))
    for group in GROUPS.values():
        assert sum(columns[name] for name in group) == pytest.approx(1)


def test_columns_without_raising_are_plain():
    columns = SubmissionColumns(high_factor=1.0, extravasation_prior=None)(PREDICTED)
    assert columns["extravasation_injury"] == pytest.approx(0.3)
    assert columns["liver_high"] == pytest.approx(0.05 / 0.95)


def test_saturated_sigmoids_leave_every_group_a_probability():
    sure = dict.fromkeys(PREDICTED, 0.0) | {"liver_injury": np.float32(1), "bowel_injury": 1.0}
    columns = SubmissionColumns()(sure)  # liver: healthy 0, low 0, high 0
    assert all(np.isfinite(value) for value in columns.values())
    assert columns["bowel_healthy"] == pytest.approx(1e-6)


def test_columns_of_many_studies_are_arrays():
    studies = {name: np.array([value, 0.5], dtype=np.float32) for name, value in PREDICTED.items()}
    columns = SubmissionColumns()(studies)
    one = SubmissionColumns()(PREDICTED)
    assert {name: value[0] for name, value in columns.items()} == pytest.approx(one, abs=1e-6)


def test_group_without_targets_gets_the_weighted_class_frequencies():
    columns = SubmissionColumns()({"bowel_injury": 0.2, "extravasation_injury": 0.3})
    assert columns["liver_low"] == pytest.approx(2 * 259 / (2826 + 2 * 259 + 4 * 62), abs=1e-4)
    assert columns["bowel_injury"] == pytest.approx(0.2)
    assert assessed_groups(["bowel_injury", "extravasation_injury"]) == ("bowel", "extravasation")
    assert assessed_groups(list(TARGETS)) == tuple(GROUPS)
    assert sum(prior_columns("extravasation").values()) == pytest.approx(1)


def test_group_covered_in_part_is_refused():
    with pytest.raises(ValueError, match=r"cover liver in part: .'liver_low', 'liver_high'. missing"):
        SubmissionColumns()({"liver_injury": 0.5})
    with pytest.raises(KeyError, match="unknown target 'any_injury'"):
        SubmissionColumns()({"any_injury": 0.5})


def test_models_are_averaged_over_those_that_know_a_target():
    organs = {"liver_injury": 0.2, "bowel_injury": 0.4}
    bleeding = {"extravasation_injury": 0.9, "bowel_injury": 0.1}
    assert merge_models([organs, bleeding]) == pytest.approx(
        {"liver_injury": 0.2, "bowel_injury": 0.25, "extravasation_injury": 0.9}
    )
    assert merge_models([organs, bleeding], weights=[1, 2])["bowel_injury"] == pytest.approx(0.2)
    with pytest.raises(ValueError, match="no predictions to merge"):
        merge_models([])
    with pytest.raises(ValueError, match=r"weights are \[1, 0\] for 2 models"):
        merge_models([organs, bleeding], weights=[1, 0])


def plain_columns() -> dict[str, float]:
    return SubmissionColumns(high_factor=1.0, extravasation_prior=None)(PREDICTED)


def test_scaled_columns_are_normalised_again():
    columns = ScaleColumns({"bowel_injury": 3.0})(plain_columns())
    assert columns["bowel_injury"] == pytest.approx(0.6 / (0.6 + 0.8))
    assert columns["liver_low"] == pytest.approx(0.3 / 0.95)


def test_power_evens_classes_out():
    columns = Power(0.5)(plain_columns())
    assert columns["bowel_injury"] == pytest.approx(math.sqrt(0.2) / (math.sqrt(0.2) + math.sqrt(0.8)))


def test_blending_moves_towards_the_prior():
    prior = prior_columns("bowel")["bowel_injury"]
    assert BlendPrior(0.25)(plain_columns())["bowel_injury"] == pytest.approx(0.75 * 0.2 + 0.25 * prior)
    assert BlendPrior(0)(plain_columns()) == pytest.approx(plain_columns())


def test_post_processing_chains_with_monai_compose():
    chain = Compose([SubmissionColumns(extravasation_prior=None), ScaleColumns({"bowel_injury": 3.0}), Power(2.0)])
    assert chain(PREDICTED)["bowel_injury"] == pytest.approx(0.6**2 / (0.6**2 + 0.8**2))


def test_post_processing_that_makes_no_sense_is_refused():
    with pytest.raises(KeyError, match=r"unknown columns .'any_injury'."):
        ScaleColumns({"any_injury": 2.0})
    with pytest.raises(ValueError, match=r"'bowel_injury': 0.* are not above 0"):
        ScaleColumns({"bowel_injury": 0.0})
    with pytest.raises(ValueError, match="exponent is 0"):
        Power(0)
    with pytest.raises(ValueError, match=r"weight is 1.5; expected 0 to 1"):
        BlendPrior(1.5)
    with pytest.raises(ValueError, match="high_factor is 0"):
        SubmissionColumns(high_factor=0)
    with pytest.raises(ValueError, match=r"extravasation_prior is 6.36"):
        SubmissionColumns(extravasation_prior=6.36)


def test_fitted_scales_find_the_factors_that_the_loss_asks_for():
    columns = {column: np.full(2, 1 / len(group)) for group in GROUPS.values() for column in group}
    wanted = ScaleColumns({"extravasation_injury": 6.0, "liver_high": 2.5})

    def loss(scaled: Columns) -> float:
        return sum(float(np.square(scaled[name] - value).sum()) for name, value in wanted(columns).items())

    fitted = fit_scales(columns, loss, start={"liver_high": 2.0})
    assert loss(fitted(columns)) < 1e-4 < loss(columns)
    assert fitted.factors["extravasation_injury"] == pytest.approx(6, rel=0.1)
    assert fitted.factors["liver_high"] == pytest.approx(2.5, rel=0.1)
    assert "liver_healthy" not in fitted.factors
