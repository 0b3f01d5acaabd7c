"""What a bundle run reads and writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import torch
from ignite.engine import Engine

from competition import write_dicom
from trauma_monai.runs import SaveMetrics, SaveProbabilities, check_switches, series_items
from trauma_monai.targets import SUBMISSION_COLUMNS, TARGETS


def test_metrics_that_are_not_defined_are_written_as_null(tmp_path: Path) -> None:
    engine = Engine(lambda engine, batch: None)
    SaveMetrics(tmp_path / "new" / "metrics.json").attach(engine)
    engine.state.metrics = {"trauma_score": torch.tensor(0.5), "auc": float("nan")}
    engine.run([0])
    assert json.loads((tmp_path / "new" / "metrics.json").read_text()) == {"trauma_score": 0.5, "auc": None}


def test_a_switch_that_would_mean_its_opposite_is_refused() -> None:
    check_switches(amp=False, resume="true")
    with pytest.raises(ValueError, match="--pretrained is the text 'false'; write --pretrained False"):
        check_switches(amp=True, pretrained="false")


@pytest.fixture
def two_anonymous_patients(tmp_path: Path) -> Path:
    """The same series for two patients, without IDs or with the same ones, in folders of one name."""
    for patient in "ab":
        write_dicom(tmp_path / "in" / patient / "CT")
    return tmp_path / "in"


@pytest.mark.parametrize("series_uid", ["", "1.2.3"])
def test_patients_without_ids_stay_apart(two_anonymous_patients: Path, series_uid: str) -> None:
    for path in two_anonymous_patients.rglob("*.dcm"):
        header = pydicom.dcmread(path)
        header.PatientID = header.StudyInstanceUID = "" if not series_uid else f"9.{ord(path.parts[-3])}"
        header.SeriesInstanceUID = series_uid
        header.save_as(path)
    items = series_items(two_anonymous_patients)
    assert [len(item["image"]) for item in items] == [5, 5]
    for key in ("patient_id", "series_id"):
        assert len({item[key] for item in items}) == 2
        assert not any("CT" in item[key] for item in items), "a folder may be named after a patient"


def test_a_folder_of_nifti_files_holds_a_study_each(tmp_path: Path) -> None:
    for name in ("scan.nii.gz", "other.nii", "notes.txt"):
        (tmp_path / name).touch()
    assert series_items(tmp_path) == [
        {"image": str(tmp_path / "other.nii"), "patient_id": "other", "series_id": "other"},
        {"image": str(tmp_path / "scan.nii.gz"), "patient_id": "scan", "series_id": "scan"},
    ]


def test_masks_beside_dicom_are_not_taken_for_ct(two_anonymous_patients: Path) -> None:
    (two_anonymous_patients / "mask.nii").touch()
    assert not any("mask" in item["series_id"] for item in series_items(two_anonymous_patients))


def test_series_of_a_patient_are_pooled_before_they_are_written(tmp_path: Path) -> None:
    probabilities = {"a": np.linspace(0, 1, 11), "b": np.linspace(1, 0, 11)}

    def evaluate(engine: Engine, series: str) -> list[dict[str, Any]]:
        engine.state.batch = [{"patient_id": "7", "series_id": series}]
        return [{"pred": torch.from_numpy(probabilities[series])}]

    engine = Engine(evaluate)
    SaveProbabilities(tmp_path / "probabilities.json", list(TARGETS)).attach(engine)
    engine.run(["a", "b"])
    record = json.loads((tmp_path / "probabilities.json").read_text())["7"]
    assert record["series"] == ["a", "b"]
    assert list(record["targets"].values()) == pytest.approx([1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.6, 0.7, 0.8, 0.9, 1])
    assert list(record["probabilities"]) == list(SUBMISSION_COLUMNS)
