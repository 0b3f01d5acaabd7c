"""Soft labels in each layout of the published systems, with numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from trauma_monai.labels import FrameLabelsd, SoftSliceLabelsd, StudyTruthd
from trauma_monai.targets import TARGETS

ORGAN_TARGETS = [name for name in TARGETS if name != "extravasation_injury"]

HEALTHY = dict.fromkeys(TARGETS, 0)
LABEL = {**HEALTHY, "liver_injury": 1, "liver_high": 1, "kidney_injury": 1, "kidney_low": 1, "bowel_injury": 1}

# One window, three slice groups; liver, spleen, kidney, bowel.
VISIBILITY = torch.tensor([[[0.0, 1.0, 0.5, 0.4], [1.0, 0.3, 0.0, 0.5], [0.2, 0.0, 0.25, 1.0]]])
# Bowel injured in groups 1 and 2, bleeding in group 0.
FRAMES = torch.tensor([[[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]])


def soften(targets: list[str], times_visibility: tuple[str, ...] = (), **sample: object) -> torch.Tensor:
    transform = SoftSliceLabelsd("label", targets=targets, frame_targets_times_visibility=times_visibility)
    return transform({"label": LABEL, "visibility": VISIBILITY, "frame_labels": FRAMES, **sample})["label"]


def test_organ_model_with_bowel_as_frame_label_times_visibility():
    """Ten outputs of the 1st place's CoaT scripts, in their order."""
    expected = torch.zeros(1, 3, 10)
    expected[0, :, 0] = expected[0, :, 4] = torch.tensor([0.0, 1.0, 0.2])  # liver_injury, liver_high
    expected[0, :, 2] = expected[0, :, 7] = torch.tensor([0.5, 0.0, 0.25])  # kidney_injury, kidney_low
    expected[0, :, 9] = torch.tensor([0.0, 0.5, 1.0])  # bowel mark 0, 1, 1 times its visibility
    torch.testing.assert_close(soften(ORGAN_TARGETS, ("bowel_injury",)), expected)


def test_organ_model_with_bowel_as_frame_label_alone():
    """Ten outputs of the two EfficientNetV2 organ scripts."""
    labels = soften(ORGAN_TARGETS)
    torch.testing.assert_close(labels[0, :, 9], torch.tensor([0.0, 1.0, 1.0]))
    torch.testing.assert_close(labels[..., :9], soften(ORGAN_TARGETS, ("bowel_injury",))[..., :9])


def test_bleeding_model_of_the_coat_scripts():
    labels = soften(["bowel_injury", "extravasation_injury"], ("bowel_injury",))
    torch.testing.assert_close(labels, torch.tensor([[[0.0, 1.0], [0.5, 0.0], [1.0, 0.0]]]))


def test_bleeding_model_of_the_efficientnet_script_has_the_other_order_and_no_visibility():
    labels = soften(["extravasation_injury", "bowel_injury"])
    torch.testing.assert_close(labels, FRAMES.flip(-1))


def test_base_layout_is_the_ten_outputs_and_extravasation():
    labels = soften(list(TARGETS), ("bowel_injury",))
    torch.testing.assert_close(labels[..., :10], soften(ORGAN_TARGETS, ("bowel_injury",)))
    torch.testing.assert_close(labels[..., 10], FRAMES[..., 1])
    assert labels.dtype == torch.float32


def test_series_without_frame_labels_is_negative_in_their_columns():
    sample = FrameLabelsd()({"image": torch.zeros(1, 3, 2, 2)})
    labels = soften(["bowel_injury", "extravasation_injury"], frame_labels=sample["frame_labels"][None])
    assert not labels.any()


def test_bleeding_model_needs_no_organs():
    transform = SoftSliceLabelsd("label", targets=["extravasation_injury"], organs=[])
    sample = {"label": LABEL, "visibility": torch.zeros(1, 3, 0), "frame_labels": FRAMES}
    torch.testing.assert_close(transform(sample)["label"], FRAMES[..., 1:])


def test_areas_in_pixels_are_refused():
    with pytest.raises(ValueError, match="spans 0 to 300, expected 0 to 1"):
        soften(ORGAN_TARGETS, visibility=VISIBILITY * 300)


def test_nan_visibility_is_refused():
    with pytest.raises(ValueError, match="spans nan to nan"):
        soften(ORGAN_TARGETS, visibility=VISIBILITY / torch.zeros(1))


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"\(1, 3, 3\) and 'frame_labels' \(1, 3, 2\); expected \(W, S, 4\)"):
        soften(ORGAN_TARGETS, visibility=VISIBILITY[..., :3])
    with pytest.raises(ValueError, match=r"'frame_labels' \(1, 2, 2\)"):
        soften(ORGAN_TARGETS, frame_labels=FRAMES[:, :2])


def test_targets_that_cannot_be_made_are_refused():
    with pytest.raises(KeyError, match="unknown target 'any_injury'"):
        SoftSliceLabelsd("label", targets=["any_injury"])
    with pytest.raises(ValueError, match=r"targets need organs .'spleen'., but visibility covers .'liver'."):
        SoftSliceLabelsd("label", targets=["liver_low", "spleen_low"], organs=["liver"])
    for name in ("extravasation_injury", "liver_low"):
        with pytest.raises(ValueError, match=f"{name} cannot be a frame label times visibility"):
            SoftSliceLabelsd("label", targets=[name], frame_targets_times_visibility=[name])
    with pytest.raises(KeyError, match="no label 'liver_injury'; it has bowel_injury"):
        soften(["liver_injury"], label={"bowel_injury": 1})
    with pytest.raises(ValueError, match=r"label 'liver_injury' of the study is 0.5; expected 0 or 1"):
        soften(["liver_injury"], label={"liver_injury": 0.5})


def test_frame_labels_become_columns():
    sample = {
        "image": torch.zeros(1, 4, 8, 8),
        "frame_labels": {"extravasation_injury": [0, 3], "bowel_injury": [3]},
    }
    columns = FrameLabelsd()(sample)["frame_labels"]
    torch.testing.assert_close(columns, torch.tensor([[0.0, 1.0], [0.0, 0.0], [0.0, 0.0], [1.0, 1.0]]))


@pytest.mark.parametrize("frame_labels", [None, {}, {"bowel_injury": []}])
def test_missing_frame_labels_are_zeros(frame_labels: dict | None):
    sample = FrameLabelsd()({"image": torch.zeros(1, 4, 8, 8), "frame_labels": frame_labels})
    torch.testing.assert_close(sample["frame_labels"], torch.zeros(4, 2))


def test_frame_labels_outside_the_volume_or_under_another_name_are_refused():
    image = torch.zeros(1, 4, 8, 8)
    for index in (4, -1):
        with pytest.raises(ValueError, match=f"name slices {index} to {index} of a volume with 4 slices"):
            FrameLabelsd()({"image": image, "frame_labels": {"bowel_injury": [index]}})
    with pytest.raises(KeyError, match="Active_Extravasation"):
        FrameLabelsd()({"image": image, "frame_labels": {"Active_Extravasation": [1]}})


def test_study_truth_has_all_targets_in_order_and_keeps_the_labels():
    sample = StudyTruthd()({"label": LABEL})
    torch.testing.assert_close(sample["truth"], torch.tensor([1.0, 0, 1, 0, 1, 0, 0, 1, 0, 1, 0]))
    assert sample["label"] is LABEL
    chosen = StudyTruthd("label", targets=["kidney_low", "spleen_low"], truth_key="grades")({"label": LABEL})
    torch.testing.assert_close(chosen["grades"], torch.tensor([1.0, 0.0]))
