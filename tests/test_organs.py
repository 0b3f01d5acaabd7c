"""Organ masks: resizing and its inverse, the decision, visibility and box, the bundle as a function."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor, decollate_batch, list_data_collate
from monai.transforms import Compose, EnsureChannelFirstd, Invertd, LoadImaged, Orientationd, SaveImaged

from conftest import BUNDLES
from trauma_monai.networks import InflatedUNet
from trauma_monai.organs import (
    CheckMaskd,
    NameBySeriesd,
    OrganDice,
    OrganDiceCELoss,
    OrganLabelMapd,
    OrganSegmenter,
    OrganVisibilityd,
    ResizeSlicesd,
    SegmentOrgansd,
)
from trauma_monai.targets import ORGANS
from trauma_monai.volume_reader import VolumeReader

ORGAN_BUNDLE = BUNDLES / "organ_ct_segmentation"
SMALL = {"encoder": "test_resnet", "decoder_channels": [32, 16, 8, 8]}


def volume(values: torch.Tensor, affine: np.ndarray | None = None) -> MetaTensor:
    return MetaTensor(values, affine=np.eye(4) if affine is None else affine)


# ---- ResizeSlicesd ----


def test_every_second_slice_is_kept_from_the_first_on() -> None:
    image = volume(torch.arange(5, dtype=torch.uint8).reshape(1, 5, 1, 1).expand(1, 5, 4, 4))
    resized = ResizeSlicesd("image", size=2, z_stride=2)({"image": image})["image"]
    assert resized.shape == (1, 3, 2, 2)
    assert resized.dtype == torch.uint8
    assert resized[0, :, 0, 0].tolist() == [0, 2, 4]


def test_an_integer_image_is_interpolated_between_pixel_centres_and_rounded() -> None:
    # From 4 pixels to 2 the new centres lie in the middle of two old ones: (10 + 21) / 2 = 15.5 -> 16, to even.
    row = torch.tensor([10, 21, 30, 42], dtype=torch.uint8).expand(1, 1, 4, 4)
    assert ResizeSlicesd("image", size=2)({"image": volume(row)})["image"][0, 0, 0].tolist() == [16, 36]


def test_slices_beyond_the_first_batch_are_resized_alike() -> None:
    image = torch.arange(40, dtype=torch.int16).reshape(1, 40, 1, 1).expand(1, 40, 2, 2)
    resized = ResizeSlicesd("image", size=4)({"image": volume(image)})["image"]
    assert resized[0, :, 3, 3].tolist() == list(range(40))


def test_a_label_map_takes_the_pixel_under_the_new_centre() -> None:
    # From 6 pixels to 2: the new centres, 1.5 and 4.5 pixels from the edge, lie in the old pixels 1 and 4.
    row = torch.tensor([0, 5, 0, 0, 3, 0], dtype=torch.uint8).expand(1, 1, 6, 6)
    assert ResizeSlicesd("label", size=2, mode="nearest")({"label": volume(row)})["label"][0, 0, 0].tolist() == [5, 3]


def test_at_even_factors_a_label_map_does_not_shift() -> None:
    # From 8 pixels to 4 each centre lies between two old pixels: the one behind and the one before, in turn.
    row = torch.arange(8, dtype=torch.uint8).expand(1, 1, 8, 8)
    resized = ResizeSlicesd("label", size=4, mode="nearest")({"label": volume(row)})["label"]
    assert resized[0, 0, 0].tolist() == [1, 2, 5, 6]


def test_affine_says_where_the_new_pixel_centres_lie_in_the_patient() -> None:
    # 5 mm slices, every 3rd kept; 2 mm pixels become 4 mm ones whose first centre lies 1 mm further in.
    affine = np.diag([5.0, 2.0, 2.0, 1.0])
    affine[:3, 3] = [100, -50, 30]
    resized = ResizeSlicesd("image", size=4, z_stride=3)({"image": volume(torch.zeros(1, 7, 8, 8), affine)})["image"]
    expected = np.diag([15.0, 4.0, 4.0, 1.0])
    expected[:3, 3] = [100, -49, 31]
    np.testing.assert_allclose(resized.affine.numpy(), expected)


def test_the_inverse_gives_each_slice_the_labels_of_its_nearest_kept_one() -> None:
    resize = ResizeSlicesd("image", size=1, z_stride=3)
    small = resize({"image": volume(torch.zeros(1, 6, 1, 1))})["image"]  # slices 0 and 3 are kept
    labels = MetaTensor(torch.tensor([1, 2], dtype=torch.uint8).reshape(1, 2, 1, 1))
    labels.copy_meta_from(small)
    inverse = resize.inverse({"image": labels})["image"]
    assert inverse.dtype == torch.uint8
    assert inverse.flatten().tolist() == [1, 1, 2, 2, 2, 2]


@pytest.mark.parametrize("shape", [(7, 30, 18), (1, 5, 5), (10, 16, 16)])
@pytest.mark.parametrize("z_stride", [1, 2, 3])
def test_the_inverse_restores_grid_and_affine_exactly(shape: tuple[int, ...], z_stride: int) -> None:
    affine = np.array([[0.1, -2.0, 0, 3], [0.3, 0, 1.7, 5], [4.9, 0.2, 0, -7], [0, 0, 0, 1]])
    resize = ResizeSlicesd("image", size=16, z_stride=z_stride)
    small = resize({"image": volume(torch.zeros(1, *shape), affine)})
    restored = resize.inverse(small)["image"]
    assert restored.shape == (1, *shape)
    np.testing.assert_array_equal(restored.affine.numpy(), affine)
    assert restored.applied_operations == []


def test_a_block_survives_resizing_and_inversion_at_whole_factors() -> None:
    label = torch.zeros(1, 4, 12, 12, dtype=torch.uint8)
    label[:, :, 3:9, 6:12] = 4
    resize = ResizeSlicesd("label", size=4, mode="nearest")
    restored = resize.inverse(resize({"label": volume(label)}))["label"]
    assert torch.equal(restored.as_tensor(), label)


def test_a_finer_label_map_is_inverted_as_it_is() -> None:
    resize = ResizeSlicesd("image", size=2)
    small = resize({"image": volume(torch.zeros(1, 1, 4, 4))})["image"]
    fine = torch.arange(16, dtype=torch.uint8).reshape(1, 1, 4, 4)
    restored = resize.inverse({"image": MetaTensor(fine).copy_meta_from(small)})["image"]
    assert torch.equal(restored.as_tensor(), fine)


def test_a_label_map_with_all_slices_is_inverted_as_it_is() -> None:
    resize = ResizeSlicesd("image", size=1, z_stride=3)
    small = resize({"image": volume(torch.zeros(1, 7, 1, 1))})["image"]  # slices 0, 3 and 6 are kept
    fine = torch.arange(9, dtype=torch.uint8).reshape(1, 9, 1, 1)
    restored = resize.inverse({"image": MetaTensor(fine).copy_meta_from(small)})["image"]
    assert restored.flatten().tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_invertd_brings_a_prediction_back_to_any_axes_after_batching() -> None:
    affine = np.diag([-2.0, 3.0, 5.0, 1.0])  # x to the left, y to the front, z up
    flow = Compose([Orientationd("image", axcodes="SPL", labels=None), ResizeSlicesd("image", size=4, z_stride=2)])
    sample = flow({"image": volume(torch.zeros(1, 8, 12, 5, dtype=torch.int16), affine)})
    assert sample["image"].shape == (1, 3, 4, 4)
    batch = list_data_collate([sample])
    prediction = torch.zeros(1, 1, 3, 4, 4, dtype=torch.uint8)
    prediction[..., 1, 0, 3] = 2  # slices 2 and 3; foremost quarter; leftmost quarter
    batch["pred"] = MetaTensor(prediction).copy_meta_from(batch["image"])
    inverted = Invertd("pred", transform=flow, orig_keys="image")(decollate_batch(batch)[0])["pred"]
    assert inverted.shape == (1, 8, 12, 5)
    assert inverted.dtype == torch.uint8
    np.testing.assert_allclose(inverted.affine.numpy(), affine)
    marked = [sorted(set(axis.tolist())) for axis in torch.nonzero(inverted[0].as_tensor(), as_tuple=True)]
    assert marked == [[6, 7], [9, 10, 11], [2, 3]]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"size": 4, "mode": "cubic"}, "unknown resize mode"),
        ({"size": 0}, "must be at least 1"),
        ({"size": 4, "z_stride": 0}, "must be at least 1"),
    ],
)
def test_resizing_without_sense_is_refused(arguments: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        ResizeSlicesd("image", **arguments)


def test_resizing_a_volume_without_channel_axis_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(3, 4, 4\), expected \(1, Z, Y, X\)"):
        ResizeSlicesd("image", size=2)({"image": volume(torch.zeros(3, 4, 4))})


# ---- OrganLabelMapd ----


def test_the_likeliest_organ_wins_if_it_is_likelier_than_not() -> None:
    logits = torch.full((5, 1, 1, 4), -1.0)
    logits[0, ..., 0] = 0.1  # liver
    logits[3, ..., 1], logits[4, ..., 1] = 2.0, 3.0  # right kidney and, likelier, bowel
    logits[2, ..., 2] = 1e-6  # left kidney, just
    assert OrganLabelMapd("pred")({"pred": logits})["pred"].flatten().tolist() == [1, 5, 3, 0]


def test_a_refined_border_lies_where_the_logits_cross_zero() -> None:
    # Logits 3 and -1 at pixel centres 0.5 and 1.5 cross zero at 1.25: 5 of 8 quarter pixels are liver.
    logits = torch.full((5, 1, 1, 2), -9.0)
    logits[0, 0, 0] = torch.tensor([3.0, -1.0])
    refined = OrganLabelMapd("pred", refine=4)({"pred": logits})["pred"]
    assert refined.shape == (1, 1, 4, 8)
    assert refined[0, 0, 0].tolist() == [1, 1, 1, 1, 1, 0, 0, 0]


def test_a_slice_that_the_network_did_not_see_gets_what_lies_between_its_neighbours() -> None:
    # Logits 3, -1 and 1 in the kept slices 0, 2 and 4: between them 1 and 0 (not above 0), after them 1 again.
    logits = torch.full((5, 3, 1, 1), -9.0)
    logits[4, :, 0, 0] = torch.tensor([3.0, -1.0, 1.0])
    assert OrganLabelMapd("pred", z_refine=2)({"pred": logits})["pred"].flatten().tolist() == [5, 5, 0, 0, 5, 5]


def test_slices_beyond_the_first_batch_are_decided_alike() -> None:
    logits = torch.full((5, 21, 1, 1), -1.0)
    logits[1, ::2] = 1.0
    assert OrganLabelMapd("pred")({"pred": logits})["pred"].flatten().tolist() == [2, 0] * 10 + [2]


def test_logits_of_another_network_are_refused() -> None:
    with pytest.raises(ValueError, match="expected \\(5, Z, Y, X\\)"):
        OrganLabelMapd("pred")({"pred": torch.zeros(6, 2, 2, 2)})


# ---- OrganVisibilityd ----


def test_visibility_is_the_area_over_the_largest_and_the_larger_kidney_counts() -> None:
    organs = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    organs[0, 0, :2, :4] = 1  # liver: 8, 2, 0 pixels
    organs[0, 1, 0, :2] = 1
    organs[0, 1, 1, :4] = 3  # left kidney: 0, 4, 1
    organs[0, 2, 1, 0] = 3
    organs[0, 2, 2, :2] = 4  # right kidney: 0, 0, 2 -> its largest area, although smaller than the left one's
    visibility = OrganVisibilityd("organs", ORGANS)({"organs": organs})["visibility"]
    expected = torch.tensor([[1.0, 0, 0, 0], [0.25, 0, 1, 0], [0, 0, 1, 0]])  # liver, spleen, kidney, bowel
    torch.testing.assert_close(visibility, expected)


def loaded(folder: Path, mask: np.ndarray, shift_mm: float = 0.0) -> dict[str, Any]:
    """An image and its mask as the bundle reads them, the image turned as the flow does it first."""
    affine, shifted = np.diag([-2.0, -2.0, 5.0, 1.0]), np.diag([-2.0, -2.0, 5.0, 1.0])
    shifted[2, 3] = shift_mm
    nib.save(nib.Nifti1Image(np.zeros((6, 5, 4), np.int16), affine), folder / "image.nii")
    nib.save(nib.Nifti1Image(mask.astype(np.uint8), shifted), folder / "mask.nii")
    load = Compose(
        [
            LoadImaged(["image", "label"], reader=VolumeReader, dtype=None, ensure_channel_first=False),
            EnsureChannelFirstd("image"),
            Orientationd("image", axcodes="IPL", labels=None),
        ]
    )
    return load({"image": folder / "image.nii", "label": folder / "mask.nii"})


def test_a_mask_of_the_image_is_taken(tmp_path: Path) -> None:
    sample = loaded(tmp_path, np.full((6, 5, 4), 5))
    assert CheckMaskd("label")(sample)["label"] is sample["label"]


@pytest.mark.parametrize(
    ("mask", "shift_mm", "reason"),
    [
        (np.zeros((6, 5, 4)), 5.0, "it lies up to 1.00 voxels from the image"),
        (np.zeros((6, 5, 3)), 0.0, r"shape \(6, 5, 3\) differs from that of the image, \(6, 5, 4\)"),
        (np.full((6, 5, 4), 51), 0.0, "values 51 to 51, expected organ codes 0 to 5"),
    ],
    ids=["elsewhere", "a slice short", "other codes"],
)
def test_a_mask_of_another_image_is_refused(tmp_path: Path, mask: np.ndarray, shift_mm: float, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"the mask mask\.nii does not fit its image: {reason}"):
        CheckMaskd("label")(loaded(tmp_path, mask, shift_mm))


def test_the_box_of_all_organs_ends_before_their_last_row_and_column_as_published() -> None:
    organs = torch.zeros(1, 2, 8, 9, dtype=torch.uint8)
    organs[0, 0, 2, 3] = 1
    organs[0, 1, 5, 7] = 5
    assert OrganVisibilityd()({"organs": organs})["study_box"].tolist() == [2, 5, 3, 7]


def test_the_box_of_a_single_pixel_holds_it() -> None:
    organs = torch.zeros(1, 2, 8, 9, dtype=torch.uint8)
    organs[0, 0, 7, 3] = 1
    assert OrganVisibilityd()({"organs": organs})["study_box"].tolist() == [7, 8, 3, 4]


def test_a_series_without_organs_has_visibility_zero_and_the_whole_frame() -> None:
    sample = OrganVisibilityd()({"organs": torch.zeros(1, 2, 8, 9, dtype=torch.uint8)})
    assert sample["study_box"].tolist() == [0, 8, 0, 9]
    assert torch.equal(sample["visibility"], torch.zeros(2, 4))


def test_a_large_frame_is_measured_on_every_nth_pixel() -> None:
    organs = torch.zeros(1, 2, 512, 300, dtype=torch.uint8)
    organs[0, 0, 100:200, 41:81] = 2  # every 4th row, every 2nd column: 25 x 20 pixels are seen
    organs[0, 1, 100:150, 41:81] = 2  # 13 x 20
    sample = OrganVisibilityd("organs", ["spleen"])({"organs": organs})
    torch.testing.assert_close(sample["visibility"], torch.tensor([[1.0], [13 / 25]]))
    assert sample["study_box"].tolist() == [100, 196, 42, 80]


def test_an_unknown_organ_is_answered_with_the_known_ones() -> None:
    with pytest.raises(KeyError, match=r"'pancreas'.*known: liver, spleen, kidney, bowel"):
        OrganVisibilityd(organs=["liver", "pancreas"])


# ---- loss, metric, names ----


def test_the_loss_is_least_where_the_label_map_decision_is_right() -> None:
    label = torch.tensor([[0, 1, 5, 3]], dtype=torch.uint8).reshape(1, 1, 1, 1, 4)
    logits = torch.full((1, 5, 1, 1, 4), -30.0)
    for voxel, code in enumerate([0, 1, 5, 3]):
        if code:
            logits[0, code - 1, ..., voxel] = 30.0
    assert OrganLabelMapd("pred")({"pred": logits[0]})["pred"].flatten().tolist() == [0, 1, 5, 3]
    right = OrganDiceCELoss()(logits, label)
    wrong = OrganDiceCELoss()(-logits, label)
    # Dice of the four classes that are there is 1; the two absent ones score 1 by MONAI's smoothing.
    assert right.item() == pytest.approx(0.0, abs=1e-4)
    assert wrong > 10


def test_undecided_logits_cost_the_cross_entropy_of_six_equal_classes() -> None:
    label = torch.zeros(1, 1, 1, 1, 2, dtype=torch.uint8)
    loss = OrganDiceCELoss()
    loss.loss.lambda_dice = 0.0
    assert loss(torch.zeros(1, 5, 1, 1, 2), label).item() == pytest.approx(np.log(6), rel=1e-5)


def test_dice_is_reported_per_organ_and_absent_organs_do_not_count() -> None:
    label = torch.tensor([1, 1, 2, 2, 0, 0], dtype=torch.uint8).reshape(1, 1, 1, 6)
    pred = torch.tensor([1, 0, 2, 2, 5, 0], dtype=torch.uint8).reshape(1, 1, 1, 6)
    metric = OrganDice()
    engine = SimpleNamespace(state=SimpleNamespace(metrics={}, metric_details={}))
    metric.attach_to = engine
    metric._engine = engine
    metric._name = "val_mean_dice"
    metric.update([[pred], [label]])
    metric.completed(engine, "val_mean_dice")
    # liver: 2 * 1 / (1 + 2); spleen: 1; kidneys and bowel are not in the label.
    assert engine.state.metrics["dice_liver"] == pytest.approx(2 / 3)
    assert engine.state.metrics["dice_spleen"] == 1.0
    assert np.isnan(engine.state.metrics["dice_bowel"])
    assert engine.state.metrics["val_mean_dice"] == pytest.approx(5 / 6)


def test_a_saved_map_is_named_after_its_series_if_it_has_one(tmp_path: Path) -> None:
    """Series of one study differ in the last part of their UID only."""
    save = SaveImaged("pred", output_dir=tmp_path, output_postfix="organs", separate_folder=False, print_log=False)
    for series in ({"series_id": "1.2.7"}, {"series_id": "1.2.8"}, {}):
        pred = MetaTensor(torch.zeros(1, 2, 2, 2), meta={"filename_or_obj": "IM0001.dcm"})
        save(NameBySeriesd("pred")({"pred": pred, **series}))
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["1.2.7_organs.nii.gz", "1.2.8_organs.nii.gz", "IM0001_organs.nii.gz"]


# ---- OrganSegmenter, SegmentOrgansd ----


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The organ bundle's inference config with a tiny variant, and random weights for it."""
    root = tmp_path_factory.mktemp("organ_bundle")
    (root / "configs/variants").mkdir(parents=True)
    (root / "configs/inference.yaml").write_text((ORGAN_BUNDLE / "configs/inference.yaml").read_text())
    (root / "configs/variants/tiny.yaml").write_text(
        "encoder: test_resnet\ndecoder_channels: [32, 16, 8, 8]\nimage_size: 32\ndepth: 16\nz_stride: 1\nrefine: 1\n"
    )
    torch.manual_seed(3)
    torch.save(InflatedUNet(**SMALL).state_dict(), root / "weights.pt")
    return root


def random_hu(*shape: int, affine: np.ndarray) -> MetaTensor:
    values = np.random.default_rng(0).integers(-1000, 1000, shape).astype(np.int16)
    return volume(torch.from_numpy(values), affine)


def test_masks_lie_on_the_grid_of_the_image(bundle: Path) -> None:
    image = random_hu(1, 40, 36, 9, affine=np.diag([-1.0, -1.0, 4.0, 1.0]))
    organs = OrganSegmenter(bundle, bundle / "weights.pt", variant="tiny", device="cpu")(image)
    assert organs.shape == image.shape
    assert organs.dtype == torch.uint8
    assert set(organs.unique().tolist()) <= set(range(6))
    assert len(organs.unique()) > 1
    torch.testing.assert_close(organs.affine, image.affine)


def test_the_order_of_the_axes_does_not_matter(bundle: Path) -> None:
    image = random_hu(1, 24, 24, 9, affine=np.diag([-1.0, -1.0, 4.0, 1.0]))
    turned = Orientationd("image", axcodes="SPR", labels=None)({"image": image})["image"]
    segmenter = OrganSegmenter(bundle, bundle / "weights.pt", variant="tiny", device="cpu")
    back = Orientationd("organs", axcodes="LPS", labels=None)({"organs": segmenter(turned)})["organs"]
    assert torch.equal(back.as_tensor(), segmenter(image).as_tensor())


def test_weights_of_another_variant_are_refused(bundle: Path) -> None:
    with pytest.raises(ValueError, match="does not fit InflatedUNet"):
        OrganSegmenter(bundle, bundle / "weights.pt", device="cpu")


def test_an_unknown_variant_is_answered_with_the_known_ones(bundle: Path) -> None:
    with pytest.raises(ValueError, match="has no variant 'huge'; it has tiny"):
        OrganSegmenter(bundle, bundle / "weights.pt", variant="huge")


def test_a_volume_without_affine_is_refused(bundle: Path) -> None:
    segmenter = OrganSegmenter(bundle, bundle / "weights.pt", variant="tiny", device="cpu")
    with pytest.raises(TypeError, match="expected a MetaTensor"):
        segmenter(torch.zeros(1, 8, 8, 8))


def test_masks_that_are_there_are_kept_and_missing_ones_made(bundle: Path) -> None:
    segment = SegmentOrgansd(bundle_root=bundle, weights=bundle / "weights.pt", variant="tiny", device="cpu")
    flow = Compose([Orientationd("image", axcodes="SPL", labels=None), segment])
    image = random_hu(1, 20, 20, 6, affine=np.diag([-1.0, -1.0, 4.0, 1.0]))
    assert segment({"image": image, "organs": "mine"})["organs"] == "mine"
    sample = flow({"image": image})
    assert sample["organs"].shape == sample["image"].shape == (1, 6, 20, 20)
    back = flow.inverse({key: sample[key] for key in ("image",)})["image"]
    assert back.shape == image.shape
    assert [step["class"] for step in sample["organs"].applied_operations] == ["Orientation"]


def test_weights_that_are_not_named_are_the_bundles_own(bundle: Path, tmp_path: Path) -> None:
    trained = tmp_path / "organ_ct_segmentation"
    shutil.copytree(bundle, trained)
    (trained / "models").mkdir()
    (trained / "weights.pt").rename(trained / "models/model.pt")
    image = random_hu(1, 20, 20, 6, affine=np.diag([-1.0, -1.0, 4.0, 1.0]))
    named = SegmentOrgansd(bundle_root=bundle, weights=bundle / "weights.pt", variant="tiny", device="cpu")
    own = SegmentOrgansd(bundle_root=trained, variant="tiny", device="cpu")
    assert torch.equal(own({"image": image})["organs"], named({"image": image})["organs"])


def test_a_sample_without_masks_needs_weights(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no 'organs' and there are no organ weights at .*/models/model\.pt"):
        SegmentOrgansd(bundle_root=tmp_path)({"image": volume(torch.zeros(1, 2, 2, 2))})
