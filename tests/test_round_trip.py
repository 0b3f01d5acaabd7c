"""The real tools in the order of a user: DICOM -> prepare -> train one epoch -> predict -> score."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import pandas as pd
import pytest

from conftest import BUNDLES
from trauma_monai.targets import SUBMISSION_COLUMNS


def run(*arguments: object, cwd: Path) -> str:
    result = subprocess.run([sys.executable, "-m", *map(str, arguments)], capture_output=True, text=True, cwd=cwd)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    (cwd / "errors.txt").write_text(result.stderr)
    return result.stdout


def train(bundle: str, dataset_dir: Path, out: Path) -> Path:
    """Train the demo variant for one epoch with MONAI's command line; returns the weights."""
    configs = BUNDLES / bundle / "configs"
    run(
        *("monai.bundle", "run", "training", "--bundle_root", BUNDLES / bundle, "--dataset_dir", dataset_dir),
        *("--config_file", f"['{configs / 'train.yaml'}','{configs / 'variants/demo.yaml'}']"),
        *("--output_dir", out, "--ckpt_dir", out, "--epochs", 1, "--val_interval", 1, "--num_workers", 0),
        cwd=out.parent,
    )
    return out / "model.pt"


@pytest.fixture(scope="module")
def prediction(rsna_dir: Path, dataset_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("round_trip")
    organ_weights = train("organ_ct_segmentation", dataset_dir, folder / "organs")
    trauma_weights = train("trauma_ct_classification", dataset_dir, folder / "trauma")
    run(
        *("trauma_monai", "predict", rsna_dir / "train_images", folder / "report", "--variant", "demo"),
        *("--organ-weights", organ_weights, "--trauma-weights", trauma_weights),
        cwd=folder,
    )
    return folder / "report"


def test_predict_writes_its_progress_to_the_screen_and_no_warnings(prediction: Path) -> None:
    screen = (prediction.parent / "errors.txt").read_text()
    assert "any injury" in screen
    assert "warn" not in screen.lower()
    assert "nvimg" not in screen.lower()


def test_the_submission_can_be_scored(prediction: Path, rsna_dir: Path) -> None:
    scored = json.loads(
        run("trauma_monai", "score", rsna_dir / "train.csv", prediction / "submission.csv", "--json", cwd=prediction)
    )
    assert 0 < scored["score"] < 10
    assert list(pd.read_csv(prediction / "submission.csv").columns) == ["patient_id", *SUBMISSION_COLUMNS]


def test_every_study_has_its_report_probabilities_and_masks(prediction: Path, rsna_dir: Path) -> None:
    patients = sorted(str(patient) for patient in pd.read_csv(rsna_dir / "train.csv")["patient_id"])
    found = [json.loads(path.read_text()) for path in prediction.glob("*/probabilities.json")]
    assert sorted(entry["patient_id"] for entry in found) == patients
    for entry in found:
        assert set(entry["probabilities"]) == set(SUBMISSION_COLUMNS)
    assert len(list(prediction.glob("*/report.html"))) == len(patients)


def test_the_masks_lie_on_the_grid_of_the_series(prediction: Path, dataset_dir: Path) -> None:
    path = next(iter(sorted(prediction.glob("*/organs*.nii.gz"))))
    masks = nib.load(path)
    assert masks.get_data_dtype() == "uint8"
    shapes = {nib.load(image).shape for image in (dataset_dir / "images").glob("*.nii")}
    assert masks.shape in shapes
