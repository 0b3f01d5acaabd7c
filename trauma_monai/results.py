"""Stage 6 of 6, its content: what was found in a study -> probabilities.json, submission.csv.

Nothing here knows a patient's name; the patient ID is the only key.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trauma_monai.files import complete_or_absent
from trauma_monai.pictures import Picture, draw_slice
from trauma_monai.pooling import ModelOutput
from trauma_monai.targets import GROUPS, ORGAN_CODES, SUBMISSION_COLUMNS

__all__ = [
    "FINDINGS",
    "ORGAN_TITLES",
    "SUSPICIOUS",
    "KeySlice",
    "SeriesResult",
    "SliceScores",
    "StudyResult",
    "find_key_slices",
    "organ_volumes_ml",
    "pick_key_slices",
    "quality_remarks",
    "study_record",
    "write_submission",
]

FINDINGS = ("liver", "spleen", "kidney", "bowel", "extravasation")
"""The groups of the competition in the order of the report."""

ORGAN_TITLES = {
    "liver": "liver",
    "spleen": "spleen",
    "kidney_left": "left kidney",
    "kidney_right": "right kidney",
    "bowel": "bowel",
}

SUSPICIOUS = 0.5
"""A second slice of a finding is shown only from here on: more pictures of nothing help nobody."""

KEY_SLICE_DISTANCE_MM = 15.0
"""Two pictures of one finding lie at least this far apart, or they show the same."""

MIN_ORGAN_ML = {"liver": 200.0, "spleen": 20.0, "kidney_left": 30.0, "kidney_right": 30.0, "bowel": 100.0}
"""Adults' organs are larger than this; less means that the scan or the segmentation is incomplete."""

NOISE_ML = 2.0
"""Less of an organ is a stray blob of the segmentation: the organ was not found."""

CUT_MM2 = 100.0
"""An organ that covers this much of the first or last slice goes on beyond it."""

MAX_SPACING_MM = 5.5
"""The thickest slices of the competition are 5 mm."""


@dataclass(frozen=True)
class SliceScores:
    """What the network says along z. Shapes: G slice groups, T targets, O organs; rows from feet to head.

    Attributes:
        targets: names of the T targets.
        organs: names of the O organs.
        z_index: middle slice of each group, counted from the feet, from 0; shape (G,).
        z_mm: its position along the patient's axis (DICOM z, towards the head); shape (G,).
        instance_number: its DICOM InstanceNumber, which viewers show; None for a file without.
        probabilities: network outputs, 0 to 1; shape (G, T).
        visibility: organ area over its largest area in the series, 0 to 1; shape (G, O).
        sop_instance_uid: DICOM SOPInstanceUID of the middle slice, shape (G,); None where there is none.
    """

    targets: tuple[str, ...]
    organs: tuple[str, ...]
    z_index: np.ndarray
    z_mm: np.ndarray
    instance_number: np.ndarray | None
    probabilities: np.ndarray
    visibility: np.ndarray
    sop_instance_uid: np.ndarray | None = None

    def of_group(self, group: str) -> np.ndarray | None:
        """Return how suspicious each slice group is for a finding, shape (G,), or None when it is not assessed."""
        names = [f"{group}_injury"] if f"{group}_injury" in self.targets else [f"{group}_low", f"{group}_high"]
        columns = [self.targets.index(name) for name in names if name in self.targets]
        return self.probabilities[:, columns].max(axis=1) if columns else None

    def at_positions(self, affine: np.ndarray, instances: Sequence[tuple[str, int, Path]]) -> SliceScores:
        """Add where the slices lie (z of their first pixel, as in ImagePositionPatient) and what they are called.

        Args:
            affine: of the displayed volume (Z, Y, X), RAS+.
            instances: SOPInstanceUID, InstanceNumber and file of each displayed slice; none when there are none.
        """
        placed = replace(self, z_mm=affine[2, 3] + affine[2, 0] * self.z_index)
        if not instances:
            return placed
        uids, numbers = zip(*((uid, number) for uid, number, _ in instances), strict=True)
        return replace(
            placed,
            instance_number=np.array(numbers)[self.z_index],
            sop_instance_uid=np.array(uids)[self.z_index],
        )


class KeySlice(NamedTuple):
    """One of the most suspicious slices of a finding.

    Attributes:
        group: the finding, one of :data:`trauma_monai.targets.GROUPS`.
        row: its slice group, a row of :class:`SliceScores`.
        probability: network output there.
        picture: the slice.
    """

    group: str
    row: int
    probability: float
    picture: Picture


@dataclass(frozen=True)
class SeriesResult:
    """One series: numbers and finished pictures, so that its volume can be let go.

    Attributes:
        series_uid: SeriesInstanceUID, or the stem of a file.
        organs_file: name of the organ label map beside the report.
        shape: number of slices, rows, columns.
        spacing_mm: distance of neighbouring slices, rows, columns.
        facts: kVp and the like; see :data:`trauma_monai.report.FACTS`.
        scores: network outputs along z.
        outputs: what each model says over the series.
        volumes_ml: organ code name -> volume, organs that were found.
        remarks: what a reader must know about the quality of the input.
        key_slices: most suspicious slices per finding.
        coronal: overview.
        instances: SOPInstanceUID, InstanceNumber and file of each slice of the label map; none for a NIfTI file.
    """

    series_uid: str
    organs_file: str
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    facts: Mapping[str, str | float]
    scores: SliceScores
    outputs: Sequence[ModelOutput]
    volumes_ml: Mapping[str, float]
    remarks: Sequence[str]
    key_slices: Sequence[KeySlice]
    coronal: Picture
    instances: Sequence[tuple[str, int, Path]] = ()

    @property
    def shows_organs(self) -> bool:
        """Whether the scan shows what the network judges: at least one organ of an adult's size."""
        return any(ml >= MIN_ORGAN_ML[name] for name, ml in self.volumes_ml.items())


@dataclass(frozen=True)
class StudyResult:
    """One study of one patient.

    Attributes:
        patient_id: DICOM PatientID or the stem of a file.
        study_uid: StudyInstanceUID or the stem of a file.
        series: its series, at least one.
        pooled: target -> probability over all series.
        columns: the 13 columns of the competition; the columns of a group sum to 1.
        not_assessed: groups that the model does not know; their columns hold class frequencies.
        left_out: what was not read of the study, and why.
        model: names and checksums of variants and weights.
        version: of this package.
        remarks: what limits the result as a whole; what limits a series stands there.
        dicom_files: names of the DICOM objects beside the report; None when nobody asked for them.
    """

    patient_id: str
    study_uid: str
    series: Sequence[SeriesResult]
    pooled: Mapping[str, float]
    columns: Mapping[str, float]
    not_assessed: Sequence[str]
    left_out: Sequence[str]
    model: Mapping[str, Any]
    version: str
    remarks: Sequence[str] = ()
    dicom_files: Sequence[str] | None = None

    @property
    def any_injury(self) -> float | None:
        """Largest probability of an injury among the assessed groups, as the competition's metric takes it."""
        assessed = [1 - self.columns[f"{group}_healthy"] for group in GROUPS if group not in self.not_assessed]
        return max(assessed) if assessed else None

    @property
    def organs_found(self) -> list[str]:
        """Names of the organs that some series shows; none where all are too small to be organs."""
        shown = {name for series in self.series if series.shows_organs for name in series.volumes_ml}
        return [name for name in ORGAN_CODES if name in shown]


def organ_volumes_ml(organs: np.ndarray, spacing_mm: Sequence[float]) -> dict[str, float]:
    """Measure the organs of a label map (codes of :data:`ORGAN_CODES`); organs of less than 2 ml are left out."""
    counts = np.zeros(max(ORGAN_CODES.values()) + 1, dtype=np.int64)
    for plane in organs:  # slice by slice: bincount copies to int64
        counts += np.bincount(plane.reshape(-1), minlength=len(counts))[: len(counts)]
    voxel_ml = float(np.prod(spacing_mm)) / 1000
    volumes_ml = {name: float(counts[code] * voxel_ml) for name, code in ORGAN_CODES.items()}
    return {name: ml for name, ml in volumes_ml.items() if ml >= NOISE_ML}


def quality_remarks(
    organs: np.ndarray,
    spacing_mm: tuple[float, float, float],
    volumes_ml: Mapping[str, float],
    facts: Mapping[str, str | float],
) -> list[str]:
    """Say what makes this series' result less reliable.

    Args:
        organs: label map, shape (Z, Y, X), slices from feet to head.
        spacing_mm: distance of neighbouring slices, rows, columns.
        volumes_ml: from :func:`organ_volumes_ml`.
        facts: of the scan, from the reader.
    """
    remarks = []
    if repeated := facts.get("repeated_slices_dropped"):
        remarks.append(f"Slices that the series holds more than once were dropped: {repeated:g}.")
    if inverted := facts.get("slices_stored_inverted"):
        remarks.append(f"Slices whose values were stored inverted (MONOCHROME1) were turned back: {inverted:g}.")
    small = [ORGAN_TITLES[name] for name, ml in volumes_ml.items() if ml < MIN_ORGAN_ML[name]]
    if len(small) == len(volumes_ml):
        size = " of an adult's size" if small else ""
        return [
            *remarks,
            f"No abdominal organ{size} was found. The scan may show another body part, or differ from what the "
            "segmentation was trained on; the injury probabilities mean nothing.",
        ]
    if missing := [ORGAN_TITLES[name] for name in ORGAN_CODES if name not in volumes_ml]:
        remarks.append(f"Not found: {', '.join(missing)}.")
    if small:
        remarks.append(f"Unusually small, perhaps incompletely scanned or segmented: {', '.join(small)}.")
    for plane, end in ((organs[-1], "top"), (organs[0], "bottom")):
        areas = {name: (plane == code).sum() * spacing_mm[1] * spacing_mm[2] for name, code in ORGAN_CODES.items()}
        if cut := [ORGAN_TITLES[name] for name, area in areas.items() if name != "bowel" and area >= CUT_MM2]:
            remarks.append(f"Cut off at the {end} of the scan: {', '.join(cut)}.")
    if spacing_mm[0] > MAX_SPACING_MM:
        remarks.append(f"Slices lie {spacing_mm[0]:.1f} mm apart; small injuries may fall between them.")
    return remarks


def pick_key_slices(scores: SliceScores) -> list[tuple[str, int]]:
    """Pick the most suspicious slice group of each finding, and a second one where it is suspicious as well.

    Returns:
        Pairs of finding and row of ``scores``.
    """
    picked = []
    for group in FINDINGS:
        values = scores.of_group(group)
        if values is None:
            continue
        first = int(values.argmax())
        picked.append((group, first))
        apart = np.abs(scores.z_mm - scores.z_mm[first]) >= KEY_SLICE_DISTANCE_MM
        if apart.any():
            second = int(np.where(apart, values, -1).argmax())
            if values[second] >= SUSPICIOUS:
                picked.append((group, second))
    return picked


def find_key_slices(
    scores: SliceScores, image: np.ndarray, organs: np.ndarray, spacing_mm: tuple[float, float, float]
) -> list[KeySlice]:
    """Draw the slices that :func:`pick_key_slices` names. A slice that shows two findings is drawn once.

    Args:
        scores: network outputs along z.
        image: HU, shape (Z, Y, X), slices from feet to head.
        organs: label map of the same shape.
        spacing_mm: distance of neighbouring slices, rows, columns.
    """
    drawn: dict[int, Picture] = {}
    key_slices = []
    for group, row in pick_key_slices(scores):
        z = int(scores.z_index[row])
        if z not in drawn:
            drawn[z] = draw_slice(image[z], organs[z], spacing_mm[1:])
        values = scores.of_group(group)
        if values is not None:
            key_slices.append(KeySlice(group, row, float(values[row]), drawn[z]))
    return key_slices


def study_record(study: StudyResult) -> dict[str, Any]:
    """Return the content of probabilities.json.

    ``probabilities``: the 13 columns of the competition, each group summing to 1, with ``any_injury``, the highest
    1 - healthy of the groups that the model assesses (``not_assessed`` names the others, which hold class
    frequencies). ``network_outputs``: target -> highest output over slices and series, before the columns' weights.
    ``organs_found``, ``organ_volumes_ml`` and ``organ_files`` per series. ``dicom_files``: DICOM SEG and SR, empty when
    they could not be written, null when they were not asked for. ``warnings``: what limits the result.
    ``slices``: one entry per series and slice group, from feet to head: z_index of the middle slice (from 0),
    z_mm, DICOM instance_number, probabilities per target, visibility per organ (area over the largest area).
    """
    return {
        "patient_id": study.patient_id,
        "study": study.study_uid,
        "series": [series.series_uid for series in study.series],
        "probabilities": {name: _rounded(study.columns[name]) for name in SUBMISSION_COLUMNS},
        "any_injury": _rounded(study.any_injury),
        "not_assessed": list(study.not_assessed),
        "network_outputs": {name: _rounded(value) for name, value in study.pooled.items()},
        "organs_found": study.organs_found,
        "organ_volumes_ml": {
            series.series_uid: {name: round(ml, 1) for name, ml in series.volumes_ml.items()} for series in study.series
        },
        "organ_files": {series.series_uid: series.organs_file for series in study.series},
        "dicom_files": None if study.dicom_files is None else list(study.dicom_files),
        "warnings": _warnings(study),
        "slices": [row for series in study.series for row in _slice_rows(series)],
        "model": dict(study.model),
        "version": study.version,
    }


def _warnings(study: StudyResult) -> list[str]:
    remarks = [remark for series in study.series for remark in series.remarks]
    return [*(f"Left out: {note}" for note in study.left_out), *study.remarks, *remarks]


def _slice_rows(series: SeriesResult) -> list[dict[str, Any]]:
    scores = series.scores
    return [
        {
            "series": series.series_uid,
            "z_index": int(scores.z_index[row]),
            "z_mm": round(float(scores.z_mm[row]), 2),
            "instance_number": None if scores.instance_number is None else int(scores.instance_number[row]),
            "probabilities": dict(zip(scores.targets, map(_rounded, scores.probabilities[row]), strict=True)),
            "visibility": dict(zip(scores.organs, map(_rounded, scores.visibility[row]), strict=True)),
        }
        for row in range(len(scores.z_index))
    ]


def write_submission(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write one row per patient in the competition's columns; patients with several studies get the highest injury.

    Args:
        records: contents of probabilities.json, see :func:`study_record`.
        path: CSV to write, whole or not at all.
    """
    rows: dict[str, dict[str, float]] = {}
    for record in records:
        columns = record["probabilities"]
        row = rows.setdefault(record["patient_id"], dict(columns))
        for names in GROUPS.values():
            if columns[names[0]] < row[names[0]]:  # names[0] is the healthy column
                row.update({name: columns[name] for name in names})
    with complete_or_absent(path) as file:
        writer = csv.DictWriter(file, ["patient_id", *SUBMISSION_COLUMNS], lineterminator="\n")
        writer.writeheader()
        for patient_id in sorted(rows):
            writer.writerow({"patient_id": patient_id, **rows[patient_id]})


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(float(value), 6)
