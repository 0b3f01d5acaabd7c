"""The RSNA 2023 competition's folder: which series it holds and what its tables say about them.

Nothing here opens an image. Ids are text throughout: a folder's name is the key, not the number that it spells.

Source: RSNA 2023 Abdominal Trauma Detection, data page.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from trauma_monai.targets import FRAME_LABEL_NAMES, FRAME_TARGETS, GROUPS, SUBMISSION_COLUMNS, TARGETS

__all__ = ["Rejection", "RsnaSeries", "assign_folds", "list_series", "read_frame_labels", "read_labels"]

AORTIC_HU_FAILED = -1024.0
"""What the tables hold where no aorta was measured: the value of air, not a contrast phase."""


class RsnaSeries(NamedTuple):
    """One series on disk.

    Attributes:
        section: ``training`` or ``test``.
        patient_id: name of the patient's folder.
        series_id: name of the series' folder.
        folder: DICOM files of the series.
        mask: NIfTI organ mask of the series; None when there is none.
        aortic_hu: HU measured in the aorta, which tells the contrast phase; None when unknown.
    """

    section: str
    patient_id: str
    series_id: str
    folder: Path
    mask: Path | None
    aortic_hu: float | None


class Rejection(NamedTuple):
    """A line of rejected.csv: what was not used, and why."""

    patient_id: str
    series_id: str
    reason: str


def list_series(rsna_dir: Path) -> tuple[list[RsnaSeries], list[Rejection]]:
    """List the series of ``train_images`` and ``test_images``, ordered by patient and series.

    A training series needs a line in train_series_meta.csv: the competition holds 60 series without one, which have
    no labels either. A test series does not.

    Returns:
        The series to read, and those that cannot be read or learned from, with the reason.

    Raises:
        FileNotFoundError: when neither folder exists, or a table that the layout promises is missing.
        ValueError: when a table lacks a column or repeats a series.
    """
    train, test = rsna_dir / "train_images", rsna_dir / "test_images"
    if not train.is_dir() and not test.is_dir():
        raise FileNotFoundError(
            f"no train_images and no test_images in {rsna_dir}; expected the layout of the RSNA 2023 competition: "
            "train_images/PATIENT/SERIES/*.dcm, train.csv, train_series_meta.csv, image_level_labels.csv."
        )
    found: list[RsnaSeries] = []
    rejected: list[Rejection] = []
    if train.is_dir():
        aortic_hu = _read_aortic_hu(rsna_dir / "train_series_meta.csv")
        for patient_id, series_id, folder in _folders(train):
            if (patient_id, series_id) in aortic_hu:
                hu = aortic_hu.pop((patient_id, series_id))
                found.append(RsnaSeries("training", patient_id, series_id, folder, _mask(rsna_dir, series_id), hu))
            else:
                rejected.append(Rejection(patient_id, series_id, "not in train_series_meta.csv: it has no labels"))
        rejected += [Rejection(*key, f"no folder train_images/{'/'.join(key)}") for key in aortic_hu]
    if test.is_dir():
        table = rsna_dir / "test_series_meta.csv"
        aortic_hu = _read_aortic_hu(table) if table.exists() else {}
        taken = {(series.patient_id, series.series_id) for series in found}
        for patient_id, series_id, folder in _folders(test):
            if (patient_id, series_id) in taken:
                rejected.append(Rejection(patient_id, series_id, "in test_images, but train_images has it too"))
                continue
            hu = aortic_hu.get((patient_id, series_id))
            found.append(RsnaSeries("test", patient_id, series_id, folder, None, hu))
    return found, rejected


def read_labels(path: Path) -> tuple[dict[str, dict[str, int]], dict[str, str]]:
    """Read train.csv: the 11 targets of each patient.

    Returns:
        Labels by patient, and what is wrong with the lines of the patients that have none: a group of columns (healthy
        and injured, or healthy, low and high) that does not hold exactly one 1, or an any_injury that contradicts them.
    """
    table = _read_table(path, ("patient_id", *SUBMISSION_COLUMNS), SUBMISSION_COLUMNS, unique=("patient_id",))
    labels: dict[str, dict[str, int]] = {}
    problems: dict[str, str] = {}
    for row in table.to_dict("records"):
        wrong = [
            group
            for group, columns in GROUPS.items()
            if sorted(row[column] for column in columns) != [0] * (len(columns) - 1) + [1]
        ]
        if wrong:
            problems[row["patient_id"]] = f"{path.name}: columns of {', '.join(wrong)} do not hold exactly one 1"
        else:
            label = {name: _target_value(name, row) for name in TARGETS}
            if row.get("any_injury", any(label.values())) != any(label.values()):
                problems[row["patient_id"]] = f"{path.name}: any_injury contradicts the other columns"
            else:
                labels[row["patient_id"]] = label
    return labels, problems


def _target_value(name: str, row: Mapping[Hashable, Any]) -> int:
    """One target of a line of train.csv; the graded organs have no ``_injury`` column."""
    if name in row:
        return int(row[name])
    organ = name.removesuffix("_injury")
    return int(row[f"{organ}_low"] or row[f"{organ}_high"])


def read_frame_labels(path: Path) -> dict[tuple[str, str], dict[str, list[int]]]:
    """Read image_level_labels.csv: by (patient, series) and target, the instance numbers that show the injury.

    Raises:
        ValueError: for an injury with an unknown name.
    """
    columns = ("patient_id", "series_id", "instance_number", "injury_name")
    table = _read_table(path, columns, numbers=("instance_number",))
    if not (table["instance_number"] % 1 == 0).all():
        raise ValueError(f"{path.name} has instance numbers that are not whole.")
    unknown = sorted(set(map(str, table["injury_name"])) - set(FRAME_LABEL_NAMES))
    if unknown:
        raise ValueError(f"{path.name} names injuries {unknown}; known: {', '.join(FRAME_LABEL_NAMES)}.")
    frames: dict[tuple[str, str], dict[str, list[int]]] = {}
    for row in table.to_dict("records"):
        of_series = frames.setdefault((row["patient_id"], row["series_id"]), {name: [] for name in FRAME_TARGETS})
        of_series[FRAME_LABEL_NAMES[row["injury_name"]]].append(int(row["instance_number"]))
    return frames


def assign_folds(labels: Mapping[str, Mapping[str, int]], folds: int) -> dict[str, int]:
    """Split the patients into folds that hold about the same share of each injury.

    Patients are grouped by the rarest injury that they have. The split depends on train.csv and ``folds`` alone, so
    that a series which fails today and is read tomorrow moves nobody to another fold, and both series of a patient
    are always together.

    Raises:
        ValueError: when there are fewer patients than folds.
    """
    from sklearn.model_selection import StratifiedKFold  # of no use to the workers, which import this module too

    if len(labels) < folds:
        raise ValueError(f"{len(labels)} patients cannot be split into {folds} folds; lower the number of folds.")
    patients = sorted(labels, key=lambda patient: (len(patient), patient))
    strata = _merge_small_strata(_rarest_injury([labels[patient] for patient in patients]), folds)
    splits = StratifiedKFold(folds).split(patients, strata)
    return {patients[index]: fold for fold, (_, validation) in enumerate(splits) for index in validation}


def _rarest_injury(labels: Sequence[Mapping[str, int]]) -> list[str]:
    counts = Counter(name for label in labels for name, value in label.items() if value)
    return [
        min((name for name, value in label.items() if value), key=lambda name: (counts[name], name), default="healthy")
        for label in labels
    ]


def _merge_small_strata(strata: list[str], folds: int) -> list[str]:
    """Join the two smallest strata until each has a patient for every fold."""
    while True:
        counts = sorted(Counter(strata).items(), key=lambda item: (item[1], item[0]))
        if len(counts) == 1 or counts[0][1] >= folds:
            return strata
        (smallest, _), (next_smallest, _) = counts[:2]
        strata = [next_smallest if stratum == smallest else stratum for stratum in strata]


def _read_aortic_hu(path: Path) -> dict[tuple[str, str], float | None]:
    keys = ("patient_id", "series_id")
    table = _read_table(path, (*keys, "aortic_hu"), ("aortic_hu",), unique=keys, may_lack=("aortic_hu",))
    return {
        (row["patient_id"], row["series_id"]): _measured(float(row["aortic_hu"])) for row in table.to_dict("records")
    }


def _measured(aortic_hu: float) -> float | None:
    return aortic_hu if math.isfinite(aortic_hu) and aortic_hu > AORTIC_HU_FAILED else None


def _read_table(
    path: Path,
    columns: Sequence[str],
    numbers: Sequence[str],
    unique: Sequence[str] = (),
    may_lack: Sequence[str] = (),
) -> pd.DataFrame:
    """Read a CSV file and check it.

    Args:
        path: the file.
        columns: that it must have, none of them empty in any line.
        numbers: those of them that hold numbers.
        unique: columns whose values occur together only once.
        may_lack: columns that may be empty in a line.
    """
    if not path.exists():
        raise FileNotFoundError(f"no {path.name} in {path.parent}; it is part of the competition's layout.")
    try:
        table = pd.read_csv(path, dtype={"patient_id": str, "series_id": str})
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name} is not a readable CSV file ({error}); expected comma-separated text.") from error
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise ValueError(f"{path.name} lacks the columns {missing}; it has {list(table.columns)}.")
    for column in columns:
        empty = table[column].isna()
        if column not in may_lack and empty.any():
            raise ValueError(f"{path.name}, line {_line(empty)}: no {column}.")
        if column in numbers:
            values = pd.to_numeric(table[column], errors="coerce")
            if (wrong := values.isna() & ~empty).any():
                found = table[column][wrong].iloc[0]
                raise ValueError(f"{path.name}, line {_line(wrong)}: {column} is {found!r}; expected a number.")
            table[column] = values
    if unique and table.duplicated(list(unique)).any():
        first = table[table.duplicated(list(unique))].iloc[0]
        raise ValueError(f"{path.name} repeats {', '.join(f'{key} {first[key]}' for key in unique)}; expected once.")
    return table


def _line(rows: pd.Series) -> int:
    """Line in the file of the first row that is meant, below the line of titles."""
    return int(rows.to_numpy().argmax()) + 2


def _folders(images: Path) -> Iterator[tuple[str, str, Path]]:
    for patient in _by_number(images):
        for series in _by_number(patient):
            yield patient.name, series.name, series


def _by_number(parent: Path) -> list[Path]:
    """Subfolders in the order of the numbers that their names spell; hidden ones are not data."""
    folders = [path for path in parent.iterdir() if path.is_dir() and not path.name.startswith(".")]
    return sorted(folders, key=lambda path: (len(path.name), path.name))


def _mask(rsna_dir: Path, series_id: str) -> Path | None:
    path = rsna_dir / "segmentations" / f"{series_id}.nii"
    return path if path.exists() else None
