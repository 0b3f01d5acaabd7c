"""k-fold work flow: what the networks of all folds say of patients that they were not trained on.

Each fold is evaluated with ``--predictions_path`` (:class:`trauma_monai.TraumaScore` writes one row per series). Put
together, the folds judge a variant on every patient, and scaling factors can be fitted on them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from sklearn.metrics import roc_auc_score

from trauma_monai.files import complete_or_absent
from trauma_monai.metrics import Score, best_constant, read_solution, trauma_loss, trauma_score
from trauma_monai.pooling import SeriesMode, SubmissionColumns, assessed_groups, fit_scales, merge_models, pool_series
from trauma_monai.targets import GROUPS, TARGETS

__all__ = ["OutOfFold", "collect_oof", "write_oof"]

KEYS = ["patient_id", "series_id", "aortic_hu"]
"""Columns of a predictions file beside the targets."""

DIGITS = 6
"""Significant digits of the numbers in the file."""


@dataclass(frozen=True)
class OutOfFold:
    """What out-of-fold predictions are worth.

    Attributes:
        models: model -> the files of its folds.
        patients: how many were predicted.
        score: the competition's metric without scaling, and its parts; lower is better.
        best_constant: the score to beat on these patients.
        auc: area under the ROC curve by target; NaN where all patients are alike.
        scales: fitted factors by column, for the injuries that some of the patients have.
        scaled_score: with the factors, on the patients that they were fitted on: too good.
        held_out_score: each fold with factors fitted on the others; None for a single fold.
    """

    models: Mapping[str, Sequence[str]]
    patients: int
    score: Score
    best_constant: float
    auc: Mapping[str, float]
    scales: Mapping[str, float]
    scaled_score: float
    held_out_score: float | None


def collect_oof(
    predictions: Sequence[Path],
    solution: Path,
    series_mode: SeriesMode = "max",
) -> OutOfFold:
    """Score out-of-fold predictions and fit scaling factors on them.

    Args:
        predictions: files of the folds of one model, or one folder for each model with such files (``*.csv``). Models
            are averaged per patient, over the patients that all of them predict.
        solution: CSV like train.csv; may hold more patients.
        series_mode: how the series of a patient are pooled, see :func:`trauma_monai.pool_series`.

    Raises:
        FileNotFoundError: when a file is not there, or a folder holds none.
        ValueError: when files and folders are mixed, two folds predict the same patient, the folds of a model have
            different targets, the models have no patient in common, or a patient is not in the solution.
    """
    models = _find_models(predictions)
    tables = {name: _read_model(files, series_mode) for name, files in models.items()}
    fold_of = next(iter(tables.values()))["fold"]
    patients = [patient for patient in fold_of.index if all(patient in table.index for table in tables.values())]
    if not patients:
        raise ValueError(f"the models {', '.join(tables)} have no patient in common; give the same folds of each.")
    truth = read_solution(solution)
    if missing := [patient for patient in patients if patient not in truth.index]:
        raise ValueError(f"{len(missing)} predicted patients are not in {solution}, the first is {missing[0]}.")
    truth = truth.loc[patients]
    targets = merge_models(
        [
            {name: table.loc[patients, name].to_numpy() for name in table.columns if name != "fold"}
            for table in tables.values()
        ]
    )
    columns = {name: np.broadcast_to(values, len(truth)) for name, values in SubmissionColumns()(targets).items()}
    injuries = [name for group in assessed_groups(list(targets)) for name in GROUPS[group][1:] if truth[name].any()]
    loss = trauma_loss(truth)
    scale = fit_scales(columns, loss, names=injuries)
    return OutOfFold(
        models={name: [file.name for file in files] for name, files in models.items()},
        patients=len(patients),
        score=trauma_score(truth, pd.DataFrame(columns, truth.index)),
        best_constant=best_constant(truth).score,
        auc={name: _area_under_roc(_truth_of(name, truth), targets[name]) for name in TARGETS if name in targets},
        scales=scale.factors,
        scaled_score=loss(scale(columns)),
        held_out_score=_held_out_score(columns, truth, fold_of.loc[patients].to_numpy(), injuries),
    )


def write_oof(result: OutOfFold, out: Path) -> None:
    """Write the result as YAML, which an ensemble can name as its ``scales``; the file appears whole."""
    content = {
        "patients": result.patients,
        "models": {name: list(files) for name, files in result.models.items()},
        "score": _rounded(result.score.score),
        "best_constant": _rounded(result.best_constant),
        "parts": {name: _rounded(value) for name, value in result.score.parts.items()},
        "auc": {name: _rounded(value) for name, value in result.auc.items()},
        "scaled_score": _rounded(result.scaled_score),
        "held_out_score": _rounded(result.held_out_score),
        "scales": {name: _rounded(value) for name, value in result.scales.items()},
    }
    heading = "# Out-of-fold predictions, by trauma-monai oof. scaled_score is too good; held_out_score is honest.\n"
    with complete_or_absent(out) as file:
        file.write(heading + yaml.safe_dump(content, sort_keys=False))


def _find_models(predictions: Sequence[Path]) -> dict[str, list[Path]]:
    """Sort the paths into models and their files."""
    folders = [path for path in predictions if path.is_dir()]
    if not folders:
        return {"model": list(predictions)}
    names = [folder.resolve().name for folder in folders]
    if len(folders) < len(predictions) or len(set(names)) < len(names):
        raise ValueError("expected either files, the folds of one model, or folders of different names, one per model.")
    models = {name: sorted(folder.glob("*.csv")) for name, folder in zip(names, folders, strict=True)}
    if empty := [name for name, files in models.items() if not files]:
        raise FileNotFoundError(f"no *.csv in {empty[0]}; evaluate each fold with --predictions_path.")
    return models


def _read_model(files: Sequence[Path], series_mode: SeriesMode) -> pd.DataFrame:
    """Read the folds of a model: one row per patient, a column for each target and ``fold``, the number of the file."""
    folds = [_read_fold(file, series_mode).assign(fold=number) for number, file in enumerate(files)]
    for file, fold in zip(files, folds, strict=True):
        if set(fold.columns) != set(folds[0].columns):
            raise ValueError(f"{file} and {files[0]} predict different targets; expected the folds of one model.")
    table = pd.concat(folds)
    if not table.index.is_unique:
        twice = table.index[table.index.duplicated()]
        raise ValueError(
            f"{len(twice)} patients are predicted by two folds of a model, the first is {twice[0]}: one of them was "
            "trained on these patients, or has been given twice."
        )
    return table


def _read_fold(file: Path, series_mode: SeriesMode) -> pd.DataFrame:
    table = pd.read_csv(file, dtype={"patient_id": str, "series_id": str})
    targets = [name for name in table.columns if name not in KEYS]
    if missing := [name for name in KEYS if name not in table.columns]:
        raise ValueError(f"{file} lacks the columns {missing}; expected what --predictions_path writes.")
    assessed_groups(targets)  # refuses what is no target
    pooled = {
        str(patient): pool_series(list(rows[targets].to_numpy()), series_mode, rows["aortic_hu"].tolist())
        for patient, rows in table.groupby("patient_id")
    }
    return pd.DataFrame.from_dict(pooled, orient="index", columns=targets)


def _held_out_score(
    columns: Mapping[str, Any], truth: pd.DataFrame, folds: np.ndarray, injuries: Sequence[str]
) -> float | None:
    """Score each fold with factors that were fitted on the others."""
    if len(np.unique(folds)) < 2:
        return None
    scaled = {name: np.empty(len(truth)) for name in columns}
    for fold in np.unique(folds):
        here = folds == fold
        others = {name: values[~here] for name, values in columns.items()}
        of_others = [name for name in injuries if truth.loc[~here, name].any()]
        scale = fit_scales(others, trauma_loss(truth[~here]), names=of_others)
        for name, values in scale({name: values[here] for name, values in columns.items()}).items():
            scaled[name][here] = values
    return trauma_loss(truth)(scaled)


def _truth_of(target: str, truth: pd.DataFrame) -> np.ndarray:
    healthy = target.replace("_injury", "_healthy")
    return truth[target].to_numpy() if target in truth else 1 - truth[healthy].to_numpy()


def _area_under_roc(truth: np.ndarray, probabilities: np.ndarray) -> float:
    return float(roc_auc_score(truth, probabilities)) if len(np.unique(truth)) == 2 else float("nan")


def _rounded(value: float | None) -> float | None:
    return None if value is None or np.isnan(value) else float(f"{value:.{DIGITS}g}")
