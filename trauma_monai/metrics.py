"""The competitions' metrics, from tables or CSV files, with every part that they are made of.

Sources: evaluation pages of RSNA 2023 Abdominal Trauma Detection and RSNA 2022 Cervical Spine Fracture Detection, and
the hosts' metric notebook of 2023 (https://www.kaggle.com/code/metric/rsna-trauma-metric).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from sklearn.metrics import log_loss

from trauma_monai.targets import GROUPS, SUBMISSION_COLUMNS

__all__ = [
    "CLASS_WEIGHTS",
    "Score",
    "best_constant",
    "best_constant_prediction",
    "cspine_score",
    "read_solution",
    "read_submission",
    "score_files",
    "trauma_loss",
    "trauma_score",
]

CLASS_WEIGHTS = {
    "bowel": (1.0, 2.0),
    "extravasation": (1.0, 6.0),
    "kidney": (1.0, 2.0, 4.0),
    "liver": (1.0, 2.0, 4.0),
    "spleen": (1.0, 2.0, 4.0),
    "any_injury": (1.0, 6.0),
}
"""What a study counts for in each of the six losses, by its true class (classes in the order of ``GROUPS``)."""

WEIGHT_COLUMNS = tuple(f"{part}_weight" for part in CLASS_WEIGHTS)
"""Columns by which a solution may carry its own weights, as the hosts' does."""

CSPINE_TARGETS = ("patient_overall", "C1", "C2", "C3", "C4", "C5", "C6", "C7")
"""What each study of RSNA 2022 is scored for."""

CSPINE_CLIP = 1e-15
"""Probabilities of RSNA 2022 are kept this far from 0 and 1."""

MAX_NAMED_ROWS = 5
"""An error names this many of the rows at fault."""


@dataclass(frozen=True)
class Score:
    """A metric and its parts; lower is better.

    Attributes:
        score: the competition's metric.
        parts: for RSNA 2023 the six losses that the score is the mean of (bowel, extravasation, kidney, liver, spleen,
            any_injury); for RSNA 2022 the weighted log loss of each of the eight targets over all studies, for
            information.
    """

    score: float
    parts: dict[str, float]


def score_files(solution_path: str | Path, submission_path: str | Path, competition: str = "rsna2023") -> Score:
    """Score a submission file against a solution file.

    Args:
        solution_path: ``rsna2023``: a CSV like train.csv; ``rsna2022``: a CSV with ``row_id,fractured``.
        submission_path: a CSV in the columns of the competition's sample submission.
        competition: ``rsna2023`` or ``rsna2022``.

    Raises:
        ValueError: for an unknown competition, and for every flaw that the two metrics refuse.
        FileNotFoundError: when a file does not exist.
    """
    if competition == "rsna2023":
        return trauma_score(_read_csv(solution_path), _read_csv(submission_path))
    if competition == "rsna2022":
        return cspine_score(_read_csv(solution_path), _read_csv(submission_path))
    raise ValueError(f"unknown competition {competition!r}; known: rsna2023, rsna2022.")


def read_solution(path: str | Path) -> pd.DataFrame:
    """Read and check the truth of RSNA 2023.

    Args:
        path: CSV with ``patient_id`` and the 13 label columns of train.csv. ``any_injury`` may be there and is
            then checked. The six ``*_weight`` columns of the hosts' solution may be there, all of them, and then
            replace :data:`CLASS_WEIGHTS`.

    Returns:
        float64 table, one row per patient, index ``patient_id`` (text).

    Raises:
        ValueError: for missing, unknown or repeated columns, a repeated patient, and labels that are not one-hot.
    """
    return _check_solution(_read_csv(path))


def read_submission(path: str | Path) -> pd.DataFrame:
    """Read and check a submission to RSNA 2023.

    Args:
        path: CSV with ``patient_id`` and the 13 columns of sample_submission.csv.

    Returns:
        float64 table of the 13 columns as they came (not normalised), index ``patient_id`` (text).

    Raises:
        ValueError: for missing, unknown or repeated columns, a repeated patient, a value that is negative or not
            finite, and a group of columns that sums to zero in some row.
    """
    return _check_submission(_read_csv(path))


def trauma_score(solution: pd.DataFrame, submission: pd.DataFrame) -> Score:
    """The metric of RSNA 2023 Abdominal Trauma Detection.

    Each group of columns is divided by its sum, then scored by a log loss weighted by the true class. The sixth loss
    is that of "any injury": the largest 1 - healthy over the groups, in the truth as in the prediction. Everything is
    float64, since the log loss clips at the resolution of the numbers that it gets.

    Args:
        solution: truth, one row per patient; see :func:`read_solution` for columns and errors. ``patient_id`` is a
            column or the index.
        submission: predictions for the same patients in any order; see :func:`read_submission`.

    Raises:
        ValueError: for a flaw in either table, and when the two are not about the same patients.
    """
    truth = _check_solution(solution)
    predicted = _check_submission(submission)
    _check_same_rows(truth.index, predicted.index, "patient")
    return _score(truth, predicted.loc[truth.index])


def trauma_loss(solution: pd.DataFrame) -> Callable[[Mapping[str, Any]], float]:
    """The metric on these studies as a function of the columns alone: :func:`trauma_score` for those who fit to it.

    Args:
        solution: truth, see :func:`read_solution`.

    Returns:
        A function from the 13 columns, each an array with one positive value per study in the order of ``solution``, to
        the score. The columns are not checked, which makes it a hundred times faster.
    """
    truth = _check_solution(solution)
    rows = np.arange(len(truth))
    classes = {group: _classes(truth, group) for group in GROUPS}
    classes["any_injury"] = np.max([values > 0 for values in classes.values()], axis=0).astype(int)
    weights = {part: _study_weights(part, values, truth) for part, values in classes.items()}
    smallest = np.finfo(np.float64).eps  # where scikit-learn's log_loss clips

    def log_loss_of(part: str, of_truth: np.ndarray) -> float:
        return float(np.average(-np.log(np.clip(of_truth, smallest, 1 - smallest)), weights=weights[part]))

    def loss(columns: Mapping[str, Any]) -> float:
        losses = []
        healthy = np.ones(len(truth))
        for group, names in GROUPS.items():
            p = np.stack([columns[name] for name in names], axis=1)
            p = p / p.sum(axis=1, keepdims=True)
            losses.append(log_loss_of(group, p[rows, classes[group]]))
            healthy = np.minimum(healthy, p[:, 0])
        losses.append(log_loss_of("any_injury", np.where(classes["any_injury"] == 1, 1 - healthy, healthy)))
        return float(np.mean(losses))

    return loss


def best_constant(solution: pd.DataFrame) -> Score:
    """The best score on these studies of a prediction that is the same for all of them: what a model must beat.

    Args:
        solution: truth, see :func:`read_solution`.
    """
    truth = _check_solution(solution)
    return min((_score(truth, _repeat(row, truth)) for row in _constant_candidates(truth)), key=lambda s: s.score)


def best_constant_prediction(solution: pd.DataFrame) -> dict[str, float]:
    """The 13 probabilities that :func:`best_constant` scores.

    Args:
        solution: truth, see :func:`read_solution`.
    """
    truth = _check_solution(solution)
    return min(_constant_candidates(truth), key=lambda row: _score(truth, _repeat(row, truth)).score)


def cspine_score(
    solution: pd.DataFrame, submission: pd.DataFrame, normalise: Literal["row", "global"] = "row"
) -> Score:
    """The metric of RSNA 2022 Cervical Spine Fracture Detection: a weighted binary log loss over eight targets.

    ``patient_overall`` weighs 7, a vertebra 1; a positive counts twice. The hosts' code is not public; that each
    study's losses are divided by that study's weights is the reading that the published systems share.

    Args:
        solution: ``row_id,fractured`` with 0 or 1; ``row_id`` is ``<study>_<target>``, eight rows per study.
        submission: the same rows in any order with probabilities.
        normalise: ``row`` takes the mean over studies of (loss of the study / weights of the study); ``global``
            divides the loss of all studies by the weights of all studies.

    Raises:
        ValueError: for an unknown ``normalise``, missing or unknown columns, malformed, repeated, missing or
            additional rows, labels other than 0 and 1, probabilities outside 0 to 1.
    """
    if normalise not in ("row", "global"):
        raise ValueError(f"normalise is {normalise!r}; expected 'row' or 'global'.")
    truth = _cspine_table(solution, "solution")
    predicted = _cspine_table(submission, "submission")
    _check_same_rows(truth.index, predicted.index, "row_id")
    if wrong := _named(truth.index[~truth.isin((0.0, 1.0))]):
        raise ValueError(f"solution: 'fractured' is neither 0 nor 1 in rows {wrong}.")
    y = truth.unstack().to_numpy()
    p = predicted.loc[truth.index].unstack().to_numpy().clip(CSPINE_CLIP, 1 - CSPINE_CLIP)
    weights = np.where(y == 1, 2.0, 1.0) * np.where(truth.unstack().columns == "patient_overall", 7.0, 1.0)
    losses = -weights * (y * np.log(p) + (1 - y) * np.log1p(-p))
    parts = dict(zip(truth.unstack().columns, losses.sum(axis=0) / weights.sum(axis=0), strict=True))
    if normalise == "row":
        score = np.mean(losses.sum(axis=1) / weights.sum(axis=1))
    else:
        score = losses.sum() / weights.sum()
    return Score(float(score), {name: float(parts[name]) for name in CSPINE_TARGETS})


def _score(truth: pd.DataFrame, predicted: pd.DataFrame) -> Score:
    """Score two checked tables with the same index."""
    parts: dict[str, float] = {}
    any_truth = np.zeros(len(truth))
    any_predicted = np.zeros(len(truth))
    for group, columns in GROUPS.items():
        y = truth[list(columns)].to_numpy()
        p = predicted[list(columns)].to_numpy()
        p = p / p.sum(axis=1, keepdims=True)
        parts[group] = _weighted_log_loss(group, y.argmax(axis=1), p, truth)
        any_truth = np.maximum(any_truth, 1 - y[:, 0])
        any_predicted = np.maximum(any_predicted, 1 - p[:, 0])
    parts["any_injury"] = _weighted_log_loss("any_injury", any_truth.astype(int), any_predicted, truth)
    return Score(float(np.mean(list(parts.values()))), parts)


def _weighted_log_loss(part: str, classes: np.ndarray, probabilities: np.ndarray, truth: pd.DataFrame) -> float:
    weights = _study_weights(part, classes, truth)
    # labels: without them the log loss fails where only one class occurs.
    labels = list(range(len(CLASS_WEIGHTS[part])))
    return float(log_loss(classes, probabilities, labels=labels, sample_weight=weights))


def _study_weights(part: str, classes: np.ndarray, truth: pd.DataFrame) -> np.ndarray:
    """What each study counts for in a part of the score, shape (studies,)."""
    if f"{part}_weight" in truth:
        return truth[f"{part}_weight"].to_numpy()
    return np.asarray(CLASS_WEIGHTS[part])[classes]


def _constant_candidates(truth: pd.DataFrame) -> list[dict[str, float]]:
    """Constant predictions of which one is the best: one per group that may carry the any-injury loss.

    Each group's log loss alone is least at its weighted class frequencies. The any-injury loss depends only on the
    largest 1 - healthy. Given the group that has it, the sum of the losses is convex in that value, and is least at
    the mean of the weighted injury frequencies of that group, of any injury, and of all groups that would exceed it.
    """
    frequencies = {group: _weighted_frequencies(group, _classes(truth, group), truth) for group in GROUPS}
    injured = {group: 1 - values[0] for group, values in frequencies.items()}
    any_classes = np.max([_classes(truth, group) > 0 for group in GROUPS], axis=0).astype(int)
    any_injured = _weighted_frequencies("any_injury", any_classes, truth)[1]
    candidates = []
    for carrier in GROUPS:
        pool = [injured[carrier], any_injured]
        for value in sorted((injured[group] for group in GROUPS if group != carrier), reverse=True):
            if value <= np.mean(pool):
                break
            pool.append(value)
        top = float(np.mean(pool))
        row: dict[str, float] = {}
        for group, columns in GROUPS.items():
            share = top if group == carrier else min(injured[group], top)
            row.update(zip(columns, _with_injured_share(frequencies[group], share), strict=True))
        candidates.append(row)
    return candidates


def _classes(truth: pd.DataFrame, group: str) -> np.ndarray:
    return truth[list(GROUPS[group])].to_numpy().argmax(axis=1)


def _weighted_frequencies(part: str, classes: np.ndarray, truth: pd.DataFrame) -> np.ndarray:
    weights = _study_weights(part, classes, truth)
    return np.bincount(classes, weights=weights, minlength=len(CLASS_WEIGHTS[part])) / weights.sum()


def _with_injured_share(frequencies: np.ndarray, share: float) -> list[float]:
    """Class probabilities with the given probability of injury, its grades in the proportion that they occur in."""
    grades = frequencies[1:]
    split = grades / grades.sum() if grades.sum() > 0 else np.full(len(grades), 1 / len(grades))
    return [float(1 - share), *(float(share * fraction) for fraction in split)]


def _repeat(row: Mapping[str, float], truth: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame({column: np.full(len(truth), value) for column, value in row.items()}, index=truth.index)


def _read_csv(path: str | Path) -> pd.DataFrame:
    try:
        return pd.read_csv(path, dtype={"patient_id": str, "row_id": str})
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a readable CSV file ({error}); expected comma-separated text.") from error


def _check_solution(table: pd.DataFrame) -> pd.DataFrame:
    optional = {"any_injury", *WEIGHT_COLUMNS}
    numbers = _numbers(table, "solution", optional)
    labels = numbers[[column for column in (*SUBMISSION_COLUMNS, "any_injury") if column in numbers]]
    if wrong := _named(labels.index[~labels.isin((0.0, 1.0)).all(axis=1)]):
        raise ValueError(f"solution: labels other than 0 and 1 in the rows of patients {wrong}.")
    for group, columns in GROUPS.items():
        sums = labels[list(columns)].sum(axis=1)
        if wrong := _named(labels.index[sums != 1]):
            raise ValueError(
                f"solution: the {group} columns are not one-hot in the rows of patients {wrong}; "
                f"expected exactly one 1 among {', '.join(columns)}."
            )
    if "any_injury" in labels:
        healthy = labels[[columns[0] for columns in GROUPS.values()]].min(axis=1)
        if wrong := _named(labels.index[labels["any_injury"] != 1 - healthy]):
            raise ValueError(f"solution: any_injury contradicts the groups in the rows of patients {wrong}.")
    _check_weights(numbers)
    return numbers


def _check_weights(solution: pd.DataFrame) -> None:
    given = [column for column in WEIGHT_COLUMNS if column in solution]
    if not given:
        return
    if missing := sorted(set(WEIGHT_COLUMNS) - set(given)):
        raise ValueError(f"solution has weights but lacks columns {missing}; give all six or none.")
    if wrong := _named(solution.index[(solution[given] <= 0).any(axis=1)]):
        raise ValueError(f"solution: weights that are not above 0 in the rows of patients {wrong}.")


def _check_submission(table: pd.DataFrame) -> pd.DataFrame:
    numbers = _numbers(table, "submission", set())
    for column in SUBMISSION_COLUMNS:
        if wrong := _named(numbers.index[numbers[column] < 0]):
            raise ValueError(f"submission: {column} is negative in the rows of patients {wrong}; expected 0 or more.")
    for group, columns in GROUPS.items():
        sums = numbers[list(columns)].sum(axis=1)
        if wrong := _named(numbers.index[~np.isfinite(sums)]):
            raise ValueError(f"submission: {' + '.join(columns)} cannot be added up in the rows of patients {wrong}.")
        if wrong := _named(numbers.index[sums == 0]):
            raise ValueError(
                f"submission: {' + '.join(columns)} is 0 in the rows of patients {wrong}; "
                f"at least one class of {group} needs a probability above 0."
            )
    return numbers[list(SUBMISSION_COLUMNS)]


def _numbers(table: pd.DataFrame, name: str, optional: set[str]) -> pd.DataFrame:
    """The table's columns as float64 with the patients as index; ``name`` is what errors call it."""
    indexed = _index_by_patient(table, name)
    if repeated := sorted(set(indexed.columns[indexed.columns.duplicated()])):
        raise ValueError(f"{name} repeats columns {repeated}.")
    if missing := [column for column in SUBMISSION_COLUMNS if column not in indexed]:
        raise ValueError(f"{name} lacks columns {missing}; expected patient_id and {', '.join(SUBMISSION_COLUMNS)}.")
    if unknown := sorted(set(indexed.columns) - set(SUBMISSION_COLUMNS) - optional):
        raise ValueError(f"{name} has unknown columns {unknown}; expected patient_id and the 13 class columns.")
    return pd.DataFrame({column: _finite(indexed[column], name, "patients") for column in indexed})


def _index_by_patient(table: pd.DataFrame, name: str) -> pd.DataFrame:
    if "patient_id" in table:
        table = table.set_index("patient_id")
    elif table.index.name != "patient_id":
        raise ValueError(f"{name} has no column patient_id; its columns are {list(map(str, table.columns))}.")
    if table.empty:
        raise ValueError(f"{name} has no rows.")
    if nameless := int(np.count_nonzero(pd.isna(table.index))):
        raise ValueError(f"{name} has {nameless} rows without a patient_id.")
    table = table.set_axis(table.index.astype(str), axis=0).rename_axis("patient_id")
    if repeated := _named(table.index[table.index.duplicated()].unique()):
        raise ValueError(f"{name} repeats patients {repeated}; expected one row each.")
    return table


def _finite(column: pd.Series, name: str, rows: str) -> pd.Series:
    values = pd.to_numeric(column, errors="coerce").astype("float64")
    if wrong := _named(column.index[~np.isfinite(values)]):
        raise ValueError(f"{name}: {column.name} is not a finite number in the rows of {rows} {wrong}.")
    return values


def _check_same_rows(expected: pd.Index, found: pd.Index, what: str) -> None:
    if missing := _named(expected.difference(found)):
        raise ValueError(f"submission lacks a {what} of the solution: {missing}.")
    if unknown := _named(found.difference(expected)):
        raise ValueError(f"submission has a {what} that the solution lacks: {unknown}.")


def _cspine_table(table: pd.DataFrame, name: str) -> pd.Series:
    """``fractured`` indexed by (study, target)."""
    if set(table.columns) != {"row_id", "fractured"}:
        raise ValueError(f"{name} has columns {list(map(str, table.columns))}; expected row_id, fractured.")
    if table.empty:
        raise ValueError(f"{name} has no rows.")
    row_ids = table["row_id"].astype(str)
    pattern = rf"^(?P<study>.+)_(?P<target>{'|'.join(CSPINE_TARGETS)})$"
    parts = row_ids.str.extract(pattern)
    if wrong := _named(row_ids[parts["study"].isna()]):
        raise ValueError(f"{name}: row_id {wrong} does not read <study>_<{'|'.join(CSPINE_TARGETS)}>.")
    if repeated := _named(row_ids[row_ids.duplicated()]):
        raise ValueError(f"{name} repeats row_id {repeated}.")
    column = table["fractured"].set_axis(pd.Index(row_ids))
    values = _finite(column, name, "row_id")
    if wrong := _named(values.index[(values < 0) | (values > 1)]):
        raise ValueError(f"{name}: fractured lies outside 0 to 1 in rows {wrong}.")
    counts = parts["study"].value_counts()
    if wrong := _named(counts.index[counts != len(CSPINE_TARGETS)]):
        raise ValueError(f"{name}: studies {wrong} do not have {len(CSPINE_TARGETS)} rows each.")
    return values.set_axis(pd.MultiIndex.from_frame(parts))


def _named(rows: pd.Index | pd.Series) -> str:
    """The first few rows at fault, for an error; empty when there is none."""
    names = ["_".join(map(str, row)) if isinstance(row, tuple) else str(row) for row in rows[:MAX_NAMED_ROWS]]
    more = len(rows) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")
