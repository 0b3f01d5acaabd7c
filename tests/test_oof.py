"""Out-of-fold predictions: what is put together, what is refused, and whether fitted factors are worth anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from trauma_monai.ensemble import read_scales
from trauma_monai.metrics import trauma_loss, trauma_score
from trauma_monai.oof import collect_oof, write_oof
from trauma_monai.targets import GROUPS, SUBMISSION_COLUMNS

BLEED = ("bowel_injury", "extravasation_injury")


def write_solution(path: Path, bowel: Sequence[int]) -> Path:
    """Patients 0, 1, ...: injured bowels as given, everything else healthy."""
    healthy = {column: int(column.endswith("healthy")) for column in SUBMISSION_COLUMNS}
    rows = [{"patient_id": i, **healthy, "bowel_healthy": 1 - b, "bowel_injury": b} for i, b in enumerate(bowel)]
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


def write_fold(path: Path, series: Sequence[tuple[int, float]]) -> Path:
    """Pairs of patient and probability of an injured bowel; bleeding is .1."""
    path.parent.mkdir(exist_ok=True)
    rows = [
        {"patient_id": patient, "series_id": number, "aortic_hu": 100.0, BLEED[0]: p, BLEED[1]: 0.1}
        for number, (patient, p) in enumerate(series)
    ]
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


def submission(bowel: Mapping[str, float]) -> pd.DataFrame:
    """Bowel as given; bleeding .1: injury 3 x .0636 + 4 x .1, healthy .5 x .9364 + .5 x .9; organs by frequency."""
    from trauma_monai.pooling import prior_columns

    rows = {}
    for patient, p in bowel.items():
        organs = {name: value for g in ("kidney", "liver", "spleen") for name, value in prior_columns(g).items()}
        bleeding = {"extravasation_healthy": 0.9182, "extravasation_injury": 0.5908}
        rows[patient] = {"bowel_healthy": 1 - p, "bowel_injury": p, **bleeding, **organs}
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.index.name = "patient_id"
    return table


def test_folds_become_one_table_of_patients_and_series_are_pooled_by_their_maximum(tmp_path):
    solution = write_solution(tmp_path / "train.csv", [1, 0, 1, 0, 0])
    folds = [
        write_fold(tmp_path / "a.csv", [(0, 0.2), (1, 0.3), (0, 0.7)]),
        write_fold(tmp_path / "b.csv", [(3, 0.1), (2, 0.2)]),
    ]
    result = collect_oof(folds, solution)
    assert result.patients == 4  # patient 4 has not been predicted
    truth = pd.read_csv(solution, dtype={"patient_id": str}).set_index("patient_id").loc[["0", "1", "2", "3"]]
    expected = trauma_score(truth, submission({"0": 0.7, "1": 0.3, "2": 0.2, "3": 0.1}))
    assert result.score.score == pytest.approx(expected.score, abs=1e-9)
    # Pairs of injured and healthy: .7 > .3, .7 > .1, .2 < .3, .2 > .1
    assert result.auc["bowel_injury"] == 0.75
    assert np.isnan(result.auc["extravasation_injury"])


def test_models_in_folders_are_averaged_over_the_patients_that_all_of_them_predict(tmp_path):
    solution = write_solution(tmp_path / "train.csv", [1, 0, 0])
    write_fold(tmp_path / "one/0.csv", [(0, 0.8), (1, 0.4)])
    write_fold(tmp_path / "one/1.csv", [(2, 0.1)])
    write_fold(tmp_path / "two/0.csv", [(0, 0.2), (1, 0.2)])
    result = collect_oof([tmp_path / "one", tmp_path / "two"], solution)
    assert (result.patients, dict(result.models)) == (2, {"one": ["0.csv", "1.csv"], "two": ["0.csv"]})
    truth = pd.read_csv(solution, dtype={"patient_id": str}).set_index("patient_id").loc[["0", "1"]]
    assert result.score.score == pytest.approx(trauma_score(truth, submission({"0": 0.5, "1": 0.3})).score, abs=1e-9)


def test_a_patient_in_two_folds_is_refused(tmp_path):
    solution = write_solution(tmp_path / "train.csv", [1, 0])
    folds = [write_fold(tmp_path / "a.csv", [(0, 0.2), (1, 0.3)]), write_fold(tmp_path / "b.csv", [(1, 0.1)])]
    with pytest.raises(ValueError, match="1 patients are predicted by two folds"):
        collect_oof(folds, solution)


def test_a_patient_without_truth_is_refused(tmp_path):
    solution = write_solution(tmp_path / "train.csv", [1])
    with pytest.raises(ValueError, match=r"1 predicted patients are not in .*train\.csv, the first is 7"):
        collect_oof([write_fold(tmp_path / "a.csv", [(0, 0.2), (7, 0.3)])], solution)


def test_files_beside_folders_are_refused(tmp_path):
    solution = write_solution(tmp_path / "train.csv", [1])
    file = write_fold(tmp_path / "a.csv", [(0, 0.2)])
    write_fold(tmp_path / "one/0.csv", [(0, 0.8)])
    with pytest.raises(ValueError, match="either files"):
        collect_oof([file, tmp_path / "one"], solution)


def test_factors_undo_a_systematic_error_and_an_ensemble_can_read_them(tmp_path):
    """A model that says a tenth of the truth everywhere is repaired by one factor; held-out patients gain as well."""
    rng = np.random.default_rng(0)
    risk = rng.uniform(0.05, 0.6, 200)
    injured = (rng.random(200) < risk).astype(int)
    solution = write_solution(tmp_path / "train.csv", injured.tolist())
    said = risk / 10
    folds = [
        write_fold(tmp_path / "a.csv", [(i, said[i]) for i in range(0, 200, 2)]),
        write_fold(tmp_path / "b.csv", [(i, said[i]) for i in range(1, 200, 2)]),
    ]
    result = collect_oof(folds, solution)
    assert result.auc["bowel_injury"] == pytest.approx(roc_auc_score(injured, risk))
    assert result.held_out_score is not None
    assert result.scaled_score <= result.held_out_score < result.score.score
    assert set(result.scales) == {"bowel_injury"}  # the model assesses bleeding as well, but nobody bleeds
    assert result.scales["bowel_injury"] > 5
    write_oof(result, tmp_path / "out/oof.yaml")
    assert read_scales(tmp_path / "out/oof.yaml") == pytest.approx(dict(result.scales), rel=1e-5)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["oof.yaml"]


def test_the_quick_loss_is_the_metric():
    rng = np.random.default_rng(1)
    truth, predicted = {}, {}
    for columns in GROUPS.values():
        classes = rng.integers(0, len(columns), 30)
        p = rng.dirichlet(np.ones(len(columns)), 30)
        p[0] = np.eye(len(columns))[(classes[0] + 1) % len(columns)]  # sure and wrong: clipped
        for i, column in enumerate(columns):
            truth[column] = (classes == i).astype(float)
            predicted[column] = 3 * p[:, i]
    index = pd.Index([str(i) for i in range(30)], name="patient_id")
    solution = pd.DataFrame(truth, index)
    expected = trauma_score(solution, pd.DataFrame(predicted, index)).score
    assert trauma_loss(solution)(predicted) == pytest.approx(expected, rel=1e-12)
