"""Stage 3: windows of slices, 8-bit windowing, stacking, crop, resize and augmentation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose

from trauma_monai.stacks import (
    CropToBoxd,
    RandWarpStackd,
    ResizeStackd,
    SelectSlicesd,
    StackSlicesd,
    Warp,
    WindowSlicesd,
    slice_windows,
)


@pytest.mark.parametrize(
    ("num_slices", "count"), [(1, 1), (99, 1), (100, 1), (101, 2), (250, 3), (400, 4), (401, 3), (650, 4)]
)
def test_a_series_gives_as_many_windows_as_the_published_code(num_slices: int, count: int) -> None:
    windows = slice_windows(num_slices)
    assert windows.shape == (count, 96)
    assert windows.dtype == np.int64
    assert windows.max() < num_slices


def test_the_first_96_slices_of_each_hundred_are_kept_and_the_last_window_ends_the_series() -> None:
    windows = slice_windows(250)
    assert [(window[0], window[-1]) for window in windows] == [(0, 95), (100, 195), (150, 245)]


def test_a_long_series_is_read_at_every_second_slice() -> None:
    windows = slice_windows(401)
    assert windows[0, :4].tolist() == [0, 2, 4, 6]
    # 201 slices remain; the last hundred of them starts at the 101st, slice 202 of the series.
    assert [window[0] for window in windows] == [0, 200, 202]


def test_a_short_series_repeats_slices_as_the_published_expression_does() -> None:
    assert slice_windows(50)[0, :6].tolist() == [0, 0, 1, 1, 2, 2]
    # Floating point included: 58 x .01 x 50 = 28.999..., 70 x .01 x 90 = 63.000...
    assert slice_windows(50)[0, 58] == 28
    assert slice_windows(90)[0, 70] == 63


def test_equidistant_slices_span_the_series() -> None:
    assert slice_windows(10, mode="equidistant", length=4).tolist() == [[0, 3, 6, 9]]


def test_impossible_windows_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown slice mode 'every'"):
        slice_windows(10, mode="every")
    with pytest.raises(ValueError, match="a series of 0 slices"):
        slice_windows(0)
    with pytest.raises(ValueError, match="length=96 slices cannot be kept of a window of 90"):
        slice_windows(10, window=90)


def volume(num_slices: int = 5) -> torch.Tensor:
    """(1, Z, 2, 2), each slice holds its index."""
    return torch.arange(num_slices, dtype=torch.int16).view(1, num_slices, 1, 1).expand(1, num_slices, 2, 2)


SELECT = SelectSlicesd("image", length=2, window=2)


def test_all_windows_are_selected_with_their_rows() -> None:
    rows = torch.arange(5.0)[:, None]
    result = SELECT({"image": MetaTensor(volume()), "visibility": rows})
    assert result["image"].shape == (3, 2, 2, 2)
    assert result["image"][:, :, 0, 0].tolist() == [[0, 1], [2, 3], [3, 4]]
    assert result["slice_index"].tolist() == [[0, 1], [2, 3], [3, 4]]
    assert result["visibility"][..., 0].tolist() == [[0.0, 1.0], [2.0, 3.0], [3.0, 4.0]]
    assert type(result["image"]) is torch.Tensor


def test_head_first_turns_the_series_and_all_that_belongs_to_it_but_not_where_it_says_they_are() -> None:
    rows = torch.arange(5.0)[:, None]
    result = SelectSlicesd("image", length=2, window=2, head_first=True)({"image": volume(), "visibility": rows})
    assert result["image"][:, :, 0, 0].tolist() == [[4, 3], [2, 1], [1, 0]]
    assert result["slice_index"].tolist() == [[4, 3], [2, 1], [1, 0]]
    assert result["visibility"][..., 0].tolist() == [[4.0, 3.0], [2.0, 1.0], [1.0, 0.0]]


def test_a_sample_that_names_a_window_gets_that_one() -> None:
    result = SELECT({"image": volume(), "window": 1})
    assert result["image"][:, :, 0, 0].tolist() == [[2, 3]]
    with pytest.raises(ValueError, match=r"window 3 asked for, but 5 slices give 3 window"):
        SELECT({"image": volume(), "window": 3})


def test_rows_that_do_not_belong_to_the_volume_are_refused() -> None:
    with pytest.raises(ValueError, match="'visibility' has 4 slices, expected 5"):
        SELECT({"image": volume(), "visibility": torch.zeros(4, 4)})


def reference_windowing(slices: np.ndarray, low: float, high: float) -> np.ndarray:
    """The published code, slice by slice."""
    out = []
    for values in slices:
        pixels = np.clip(values.astype(np.float64), low, high)
        pixels = pixels - pixels.min()
        out.append((pixels / pixels.max() * 255).astype(np.uint8) if pixels.max() > 0 else pixels.astype(np.uint8))
    return np.stack(out)


@pytest.mark.parametrize("spread", [(-1024, 3000), (-20, 90), (-32768, 32767), (400, 800)])
def test_look_up_gives_the_same_bytes_as_the_published_arithmetic(spread: tuple[int, int]) -> None:
    slices = np.random.default_rng(0).integers(*spread, size=(6, 32, 32)).astype(np.int16)
    result = WindowSlicesd("image")({"image": torch.from_numpy(slices)})["image"]
    assert result.dtype == torch.uint8
    np.testing.assert_array_equal(result.numpy(), reference_windowing(slices, -150, 250))


def test_values_in_float_are_windowed_like_integers() -> None:
    slices = np.random.default_rng(1).integers(-500, 500, size=(2, 3, 8, 8)).astype(np.int16)
    window = WindowSlicesd("image")
    whole, real = (window({"image": torch.from_numpy(slices).to(t)})["image"] for t in (torch.int16, torch.float32))
    torch.testing.assert_close(whole, real, rtol=0, atol=0)


def test_without_stretching_each_hu_value_has_one_grey_value() -> None:
    slices = torch.tensor([[[-150, 50]], [[50, 1000]]], dtype=torch.int16)
    fixed = WindowSlicesd("image", per_slice_minmax=False)({"image": slices})["image"]
    # 200 of 400 HU above the lower end: 127.5 is cut off to 127.
    assert fixed.tolist() == [[[0, 127]], [[127, 255]]]
    stretched = WindowSlicesd("image")({"image": slices})["image"]
    assert stretched.tolist() == [[[0, 255]], [[0, 255]]]


def test_a_constant_slice_becomes_black() -> None:
    slices = torch.full((1, 2, 2), 40, dtype=torch.int16)
    assert WindowSlicesd("image")({"image": slices})["image"].tolist() == [[[0, 0], [0, 0]]]


def test_a_windowed_volume_keeps_its_place_in_the_patient() -> None:
    affine = torch.diag(torch.tensor([1.0, 2.0, 3.0, 1.0], dtype=torch.float64))
    volume = MetaTensor(torch.zeros(1, 2, 4, 4, dtype=torch.int16), affine=affine)
    windowed = WindowSlicesd("image")({"image": volume})["image"]
    assert isinstance(windowed, MetaTensor)
    torch.testing.assert_close(windowed.affine, affine)


def test_an_empty_window_is_refused() -> None:
    with pytest.raises(ValueError, match=r"window \[250, -150\] is empty"):
        WindowSlicesd("image", window=[250, -150])


def test_groups_hold_neighbours_and_rows_come_from_the_middle_slice() -> None:
    slices = torch.arange(6, dtype=torch.uint8).view(1, 6, 1, 1)
    sample = {"image": slices, "organs": slices, "visibility": torch.arange(6.0).view(1, 6, 1)}
    result = StackSlicesd("image", num_groups=2, channels=3)(sample)
    assert result["image"][0, :, :, 0, 0].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert result["organs"].flatten().tolist() == [1, 4]
    assert result["visibility"].tolist() == [[[1.0], [4.0]]]


def test_slices_that_do_not_fill_the_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="'image' has 6 slices per window, expected 2 groups of 2"):
        StackSlicesd("image", num_groups=2, channels=2)({"image": torch.zeros(1, 6, 1, 1)})


def test_crop_keeps_the_box_without_copying() -> None:
    image = torch.arange(12).view(1, 3, 4)
    result = CropToBoxd("image")({"image": image, "study_box": torch.tensor([1, 3, 0, 2])})
    assert result["image"].tolist() == [[[4, 5], [8, 9]]]
    assert result["image"].untyped_storage().data_ptr() == image.untyped_storage().data_ptr()


def test_region_none_keeps_the_whole_slice() -> None:
    assert CropToBoxd("image", region="none")({"image": torch.zeros(1, 3, 4)})["image"].shape == (1, 3, 4)
    with pytest.raises(ValueError, match="unknown region 'liver'"):
        CropToBoxd("image", region="liver")


def test_a_box_outside_the_slice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"y 1:5, x 0:2; expected a box within the 3 x 4"):
        CropToBoxd("image")({"image": torch.zeros(1, 3, 4), "study_box": torch.tensor([1, 5, 0, 2])})


def stack(size: int = 8, groups: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "image": torch.randint(0, 256, (1, groups, 3, size, size), dtype=torch.uint8, generator=generator),
        "organs": torch.randint(0, 6, (1, groups, size, size), dtype=torch.uint8, generator=generator),
    }


def test_resize_is_bilinear_for_images_and_scales_them_to_one() -> None:
    sample = stack(size=9, groups=3)
    result = ResizeStackd(6)(sample)
    expected = torch.nn.functional.interpolate(sample["image"][0] / 255, size=(6, 6), mode="bilinear")
    torch.testing.assert_close(result["image"].as_tensor()[0], expected)
    assert result["image"].dtype == torch.float32


def test_the_stack_carries_no_geometry_of_the_volume() -> None:
    image = ResizeStackd(4)(stack())["image"]
    assert isinstance(image, MetaTensor)
    assert "spatial_shape" not in image.meta


def test_masks_are_resized_to_the_nearest_pixel_with_the_kidneys_as_one_organ() -> None:
    codes = torch.tensor([[0, 1, 2], [3, 4, 5], [5, 0, 3]], dtype=torch.uint8)
    sample = {"image": torch.zeros(1, 1, 3, 3, 3, dtype=torch.uint8), "organs": codes[None, None]}
    result = ResizeStackd(3)(sample)["organs"][0, 0]
    assert result.tolist() == [[0, 1, 2], [3, 3, 4], [4, 0, 3]]
    assert result.dtype == torch.uint8


def test_a_mask_value_that_is_no_organ_is_refused() -> None:
    sample = stack() | {"organs": torch.full((1, 2, 8, 8), 9, dtype=torch.uint8)}
    with pytest.raises(ValueError, match=r"the organ masks hold the values \[9\]"):
        ResizeStackd(4)(sample)


def warped(sample: dict[str, torch.Tensor], warp: Warp, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    result = ResizeStackd(size).resample(sample, warp)
    return result["image"].as_tensor(), result["organs"]


def test_flips_mirror_images_and_masks() -> None:
    sample = stack()
    image, organs = warped(sample, Warp())
    for warp, axis in ((Warp(flip_x=True), -1), (Warp(flip_y=True), -2)):
        flipped_image, flipped_organs = warped(sample, warp)
        torch.testing.assert_close(flipped_image, image.flip(axis))
        torch.testing.assert_close(flipped_organs, organs.flip(axis))


def test_a_quarter_turn_is_counter_clockwise() -> None:
    sample = stack()
    image, organs = warped(sample, Warp())
    turned_image, turned_organs = warped(sample, Warp(angle_degrees=90.0))
    torch.testing.assert_close(turned_image, image.rot90(1, (-2, -1)))
    torch.testing.assert_close(turned_organs, organs.rot90(1, (-2, -1)))


def test_corners_uncovered_by_a_rotation_are_filled_by_reflection() -> None:
    """Turned by 45 degrees about the middle of 5 x 5 pixels, the upper left corner shows x = 2 - 8**.5 = -0.828."""
    row = torch.tensor([0, 100, 200, 200, 200], dtype=torch.uint8)
    image = row.view(1, 1, 1, 1, 5).expand(1, 1, 3, 5, 5)
    sample = {"image": image, "organs": torch.zeros(1, 1, 5, 5, dtype=torch.uint8)}
    turned, _ = warped(sample, Warp(angle_degrees=-45.0), size=5)
    # Folded back about pixel 0 to 0.828, between the values 0 and 100.
    assert turned[0, 0, 0, 0, 0].item() * 255 == pytest.approx(82.84, abs=0.01)


def test_perspective_shows_the_named_corners_of_the_source() -> None:
    """A ramp along x from 0 to 1: corners moved in by a quarter show the ramp from 0.25 to 0.75."""
    ramp = torch.linspace(0, 255, 256).round().to(torch.uint8).expand(1, 1, 3, 256, 256)
    sample = {"image": ramp, "organs": torch.zeros(1, 1, 256, 256, dtype=torch.uint8)}
    corners = ((0.25, 0.25), (0.75, 0.25), (0.75, 0.75), (0.25, 0.75))
    image, _ = warped(sample, Warp(corners=corners), size=128)
    # The first pixel of 128 covers 1/256 of the source from 0.25 on: its middle is at pixel 64 - 0.5 + 0.5.
    assert image[0, 0, 0, 0, 0].item() * 255 == pytest.approx(64, abs=0.01)
    assert image[0, 0, 0, 0, -1].item() * 255 == pytest.approx(191, abs=0.01)


def test_one_draw_holds_for_all_slices_and_the_masks() -> None:
    """Every slice shows the same disc, which is also the liver: after the warp they still agree."""
    y, x = torch.meshgrid(torch.arange(64) - 20, torch.arange(64) - 40, indexing="ij")
    disc = (y**2 + x**2 < 15**2).to(torch.uint8)
    sample = {"image": (disc * 255).expand(1, 4, 3, 64, 64), "organs": disc.expand(1, 4, 64, 64)}
    transform = RandWarpStackd(ResizeStackd(48), prob_perspective=1.0, prob_rotate=1.0).set_random_state(seed=5)
    result = transform(sample)
    image = result["image"].as_tensor()
    assert transform.warp.angle_degrees != 0
    assert transform.warp.corners != Warp().corners
    torch.testing.assert_close(image, image[:, :1, :1].expand_as(image))
    assert ((image[:, :, 0] > 0.5) == (result["organs"] == 1)).float().mean() > 0.995


def test_the_same_seed_draws_the_same_warp() -> None:
    transforms = Compose([RandWarpStackd(ResizeStackd(8))])
    first, second = (transforms.set_random_state(seed=3)(stack())["image"] for _ in range(2))
    torch.testing.assert_close(first, second)


def test_each_step_is_drawn_about_as_often_as_asked() -> None:
    transform = RandWarpStackd(ResizeStackd(8), prob_flip_y=0.0)
    transform.set_random_state(seed=0)
    draws = []
    for _ in range(400):
        transform.randomize()
        draws.append(transform.warp)
    assert 0.4 < np.mean([draw.flip_x for draw in draws]) < 0.6
    assert 0.4 < np.mean([draw.angle_degrees != 0 for draw in draws]) < 0.6
    assert 0.4 < np.mean([draw.corners != Warp().corners for draw in draws]) < 0.6
    assert not any(draw.flip_y for draw in draws)
    assert max(abs(draw.angle_degrees) for draw in draws) <= 25
    assert all(0 <= value <= 1 for draw in draws for corner in draw.corners for value in corner)
