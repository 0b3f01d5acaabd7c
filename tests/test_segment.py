"""trauma-monai segment: the masks that a data set came without."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
from monai.data import MetaTensor

import trauma_monai.segment as module
from competition import AFFINE, HU, items_of, one_voxel, run
from trauma_monai.segment import segment


class FakeSegmenter:
    """Calls every voxel above 300 HU liver; counts its calls."""

    def __init__(self, *arguments: object, fail_at: int = 0, error: BaseException | None = None) -> None:
        self.calls, self.fail_at, self.error = 0, fail_at, error

    def __call__(self, image: MetaTensor) -> MetaTensor:
        self.calls += 1
        if self.error is not None and self.calls == self.fail_at:
            raise self.error
        return MetaTensor((image.as_tensor() > 300).byte(), affine=image.affine)


@pytest.fixture
def prepared(competition, out) -> Path:
    """Series 1 has a mask, 2 and 3 have none."""
    competition.add_mask("1", one_voxel())
    run(competition, out)
    return out


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return weights_file(tmp_path / "model.pt", "the first training")


def weights_file(path: Path, content: str) -> Path:
    """What is in it does not matter here: masks are made by a fake."""
    path.write_text(content)
    return path


def use(monkeypatch: pytest.MonkeyPatch, segmenter: FakeSegmenter) -> FakeSegmenter:
    monkeypatch.setattr(module, "OrganSegmenter", lambda *arguments: segmenter)
    return segmenter


def test_segment_fills_in_the_missing_masks_on_the_grid_of_the_images(prepared, weights, monkeypatch):
    use(monkeypatch, FakeSegmenter())
    assert segment(prepared, weights, progress=False) == 2
    item = items_of(prepared)["3"]
    assert item["organs_from"] == "model"
    mask = nibabel.load(prepared / item["organs"])
    assert np.array_equal(np.asanyarray(mask.dataobj), HU > 300)
    assert np.allclose(mask.affine, AFFINE)
    assert items_of(prepared)["1"]["organs_from"] == "segmentations"


def test_segment_does_nothing_twice_unless_told_to(prepared, weights, monkeypatch):
    segmenter = use(monkeypatch, FakeSegmenter())
    segment(prepared, weights, progress=False)
    assert segment(prepared, weights, progress=False) == 0
    assert segmenter.calls == 2
    assert segment(prepared, weights, overwrite=True, progress=False) == 2
    assert np.asanyarray(nibabel.load(prepared / "organs/10_1.nii").dataobj).sum() == 1


def test_other_weights_make_their_own_masks(prepared, weights, monkeypatch):
    segmenter = use(monkeypatch, FakeSegmenter())
    segment(prepared, weights, progress=False)
    weights_file(weights, "the second training")
    assert segment(prepared, weights, progress=False) == 2
    assert segment(prepared, weights, variant="demo", progress=False) == 2
    assert segmenter.calls == 6


def test_an_interrupted_segment_keeps_the_masks_that_are_done(prepared, weights, monkeypatch):
    use(monkeypatch, FakeSegmenter(fail_at=2, error=KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        segment(prepared, weights, progress=False)
    assert {series: "organs" in item for series, item in items_of(prepared).items()} == {
        "1": True,
        "2": True,
        "3": False,
    }
    use(monkeypatch, FakeSegmenter())
    assert segment(prepared, weights, progress=False) == 1


def test_a_series_that_cannot_be_segmented_is_named_and_the_others_are_done(prepared, weights, monkeypatch):
    use(monkeypatch, FakeSegmenter(fail_at=1, error=ValueError("too few slices")))
    with pytest.raises(RuntimeError, match="1 of 2 series could not be segmented; the first: 20_2: too few slices"):
        segment(prepared, weights, progress=False)
    assert "organs" in items_of(prepared)["3"]


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:400])])
def test_a_volume_that_is_damaged_is_named_and_the_others_are_done(prepared, weights, monkeypatch, spoil):
    use(monkeypatch, FakeSegmenter())
    spoil(prepared / "images/20_2.nii")
    with pytest.raises(RuntimeError, match="1 of 2 series could not be segmented; the first: 20_2: "):
        segment(prepared, weights, progress=False)
    assert "organs" in items_of(prepared)["3"]


def test_prepare_keeps_the_masks_that_a_network_made(competition, prepared, weights, monkeypatch):
    use(monkeypatch, FakeSegmenter())
    segment(prepared, weights, progress=False)
    run(competition, prepared)
    assert items_of(prepared)["3"]["organs_from"] == "model"


def test_a_mask_of_other_pixels_does_not_outlive_them(competition, prepared, weights, monkeypatch):
    use(monkeypatch, FakeSegmenter())
    segment(prepared, weights, progress=False)
    (competition.folder / "train_images/20/3/1.dcm").touch()
    run(competition, prepared)
    assert "organs" not in items_of(prepared)["3"]
    assert "organs" in items_of(prepared)["2"]


def test_segment_before_prepare_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="trauma-monai prepare"):
        segment(tmp_path, "model.pt")
