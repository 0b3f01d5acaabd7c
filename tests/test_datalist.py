"""A data set of three patients in two folds; files are never opened, so none is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trauma_monai.datalist import load_datalist, organ_items, window_items


def _item(patient: str, fold: int, organs_from: str = "segmentations") -> dict:
    item = {"image": f"images/{patient}_7.nii", "organs": f"organs/{patient}_7.nii", "organs_from": organs_from}
    return item | {"fold": fold, "patient_id": patient}


@pytest.fixture
def dataset_dir(tmp_path: Path) -> Path:
    training = [_item("1", 0), _item("2", 1, organs_from="model"), _item("3", 1)]
    test = [{"image": "images/9_7.nii", "patient_id": "9"}]
    (tmp_path / "datalist.json").write_text(json.dumps({"training": training, "test": test}))
    return tmp_path


def _patients(items: list[dict]) -> list[str]:
    return [item["patient_id"] for item in items]


def test_train_is_every_fold_but_the_one_held_back(dataset_dir):
    assert _patients(load_datalist(dataset_dir, "train", 0)) == ["2", "3"]
    assert _patients(load_datalist(dataset_dir, "validate", 0)) == ["1"]
    assert _patients(load_datalist(dataset_dir, "train", 1)) == ["1"]
    assert _patients(load_datalist(dataset_dir, "all", 1)) == ["1", "2", "3"]


def test_fold_minus_one_holds_nothing_back(dataset_dir):
    for section in ("train", "validate"):
        assert _patients(load_datalist(dataset_dir, section, -1)) == ["1", "2", "3"]


def test_paths_become_absolute(dataset_dir, monkeypatch):
    monkeypatch.chdir(dataset_dir.parent)
    item = load_datalist(dataset_dir.name, "validate", 0)[0]
    assert item["image"] == str(dataset_dir / "images/1_7.nii")
    assert item["organs"] == str(dataset_dir / "organs/1_7.nii")


def test_test_items_need_no_fold(dataset_dir):
    assert _patients(load_datalist(dataset_dir, "test", require=[])) == ["9"]


def test_a_missing_datalist_says_how_to_make_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="trauma-monai prepare"):
        load_datalist(tmp_path)


def test_an_unknown_fold_is_answered_with_the_known_ones(dataset_dir):
    with pytest.raises(ValueError, match=r"unknown fold 4; the data set has \[0, 1\]"):
        load_datalist(dataset_dir, "train", 4)


def test_an_unknown_section_is_answered_with_the_known_ones(dataset_dir):
    with pytest.raises(ValueError, match=r"unknown section 'val'; expected one of train, validate, all, test"):
        load_datalist(dataset_dir, "val")


def test_series_without_masks_are_named_with_what_to_do(dataset_dir):
    with pytest.raises(KeyError, match=r"1 of 1 items lack 'organs'.* 9_7.nii: run 'trauma-monai segment'"):
        load_datalist(dataset_dir, "test")


def test_an_empty_section_is_an_error(tmp_path):
    (tmp_path / "datalist.json").write_text('{"training": [], "test": []}')
    with pytest.raises(ValueError, match=r"section 'train' .* is empty"):
        load_datalist(tmp_path)


def test_an_organ_network_never_learns_from_a_networks_masks(dataset_dir):
    expected = [{"image": str(dataset_dir / "images/3_7.nii"), "label": str(dataset_dir / "organs/3_7.nii")}]
    assert organ_items(dataset_dir, "train", 0) == expected


def test_no_given_mask_at_all_is_an_error(dataset_dir):
    with pytest.raises(ValueError, match="none of the 1 series in section 'test'"):
        organ_items(dataset_dir, "test")


def test_a_series_becomes_one_item_per_window():
    items = [{"image": "a", "num_slices": 250}, {"image": "b", "num_slices": 99}]
    windows = window_items(items)
    assert [(item["image"], item["window"]) for item in windows] == [("a", 0), ("a", 1), ("a", 2), ("b", 0)]
    assert "window" not in items[0]


def test_equidistant_slices_are_one_window():
    assert len(window_items([{"image": "a", "num_slices": 250}], mode="equidistant", length=32)) == 1


def test_window_items_need_the_number_of_slices():
    with pytest.raises(KeyError, match="lack 'num_slices'"):
        window_items([{"image": "a.nii"}])


def test_an_unknown_contrast_phase_becomes_nan(dataset_dir):
    """Batches cannot hold None, and the pooling of series takes NaN for unknown."""
    content = json.loads((dataset_dir / "datalist.json").read_text())
    content["training"][0]["aortic_hu"] = None
    content["training"][1]["aortic_hu"] = 180.5
    (dataset_dir / "datalist.json").write_text(json.dumps(content))
    values = [item["aortic_hu"] for item in load_datalist(dataset_dir, "all")]
    assert values == pytest.approx([float("nan"), 180.5, float("nan")], nan_ok=True)
