"""Data set preparation: the competition's folder -> volumes that are fast to read, masks, datalist.json.

What is written to OUT:

    datalist.json       {"training": [item, …], "test": [item, …]}, paths relative to the file
    rejected.csv        patient_id, series_id, reason: what was not used, and why
    images/P_S.nii      int16 HU of patient P, series S
    organs/P_S.nii      uint8 organ codes (trauma_monai.targets.ORGAN_CODES) on the image's grid, where there is a mask
    records/P_S.json    what was read for it: tells on the next run that nothing needs to be done

An item has ``image``, ``organs`` and ``organs_from`` ("segmentations" or "model"; both absent when there is no mask),
``patient_id``, ``series_id``, ``aortic_hu`` (null when unknown), ``num_slices``, and in training ``label`` (target ->
0 or 1), ``frame_labels`` (target -> slice indices of the stored volume) and ``fold``.

How files are written says :mod:`trauma_monai.store`.

A run can be stopped at any time and started again. A series counts as done when its record is there, its DICOM files
and mask are those that the record was made from (names, sizes, modification times), and the files that were written
have the size that they must have. Files appear under their names when they are complete. A series that was rejected
is tried again by every run: the cause may lie outside of the data, such as a decoder that was not installed. Labels,
folds and aortic HU are read from the tables anew by every run.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trauma_monai.console import progress_bar, say
from trauma_monai.dicom import DicomError, read_series
from trauma_monai.files import DATALIST, fingerprint, write_csv, write_json
from trauma_monai.organ_masks import mask_on_grid
from trauma_monai.rsna_layout import (
    Rejection,
    RsnaSeries,
    assign_folds,
    list_series,
    read_frame_labels,
    read_labels,
)
from trauma_monai.store import (
    add_model_mask,
    image_bytes,
    image_path,
    make_folders,
    mask_bytes,
    mask_path,
    record_path,
    size_of,
    write_volume,
)
from trauma_monai.targets import FRAME_TARGETS
from trauma_monai.workers import run_jobs

__all__ = ["Prepared", "prepare"]

RECORD_VERSION = 2
"""Raised when volumes are written differently, so that older ones are made again."""

RECORD_ENTRIES = {"version", "inputs", "shape", "instance_numbers", "has_mask", "mask_problem"}
"""What a record holds; one that was damaged is made again."""

KILLED = "the process that read it was killed each time: a decoder crashed, or memory ran out"


class Prepared(NamedTuple):
    """What a run of :func:`prepare` came to.

    Attributes:
        training: series in the training section of the datalist.
        test: series in its test section.
        masks: series that have an organ mask.
        reused: series that an earlier run had prepared.
        rejected: series (or masks, or frame labels) that are not used; lines of rejected.csv.
    """

    training: int
    test: int
    masks: int
    reused: int
    rejected: int


class _Job(NamedTuple):
    """One series for a worker; small, for it travels."""

    name: str
    folder: Path
    mask: Path | None
    out: Path
    overwrite: bool


class _Outcome(NamedTuple):
    """What a worker returns: the record of a series, or why there is none."""

    record: dict[str, Any] | None = None
    reason: str | None = None
    reused: bool = False


def prepare(
    rsna_dir: str | Path,
    out: str | Path,
    workers: int | None = None,
    folds: int = 4,
    scheduler: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Prepared:
    """Check every series of the competition and write it as a volume that is fast to read.

    See the module's text for what is written and when a series is done again. Only one run at a time may write to
    ``out``. Memory does not grow with the number of series: each worker holds one.

    Args:
        rsna_dir: folder in the layout of the RSNA 2023 competition.
        out: folder to fill, about 0.5 MB per slice (as much again as half of that for slices with a mask).
        workers: processes; all cores by default. With 1 everything runs in this process.
        folds: parts that the patients are split into, of equal size and alike in their injuries.
        scheduler: address of a Dask scheduler, to use its workers in place of own ones; they must see ``rsna_dir`` and
            ``out`` under the same paths.
        overwrite: prepare again what is done.
        progress: show a progress bar on stderr.

    Raises:
        FileNotFoundError: when ``rsna_dir`` is not in the competition's layout.
        ValueError: when a table is malformed, there are fewer patients than folds, or no series could be prepared.
        OSError: when ``out`` cannot be written, for instance because the disk is full.
    """
    rsna_dir, out = Path(rsna_dir).expanduser().absolute(), Path(out).expanduser().absolute()
    series, rejected = list_series(rsna_dir)
    tables = _Tables.read(rsna_dir, folds) if any(one.section == "training" for one in series) else _Tables.empty()
    rejected += [Rejection(one.patient_id, one.series_id, reason) for one in series if (reason := tables.problem(one))]
    known = {(one.patient_id, one.series_id) for one in series}
    known |= {(one.patient_id, one.series_id) for one in rejected}
    rejected += [Rejection(*key, "frame labels of a series that is not there") for key in tables.frames.keys() - known]
    series = [one for one in series if not tables.problem(one)]
    make_folders(out)

    items: dict[int, dict[str, Any]] = {}
    reused = 0
    jobs = [_Job(_name(one), one.folder, one.mask, out, overwrite) for one in series]
    try:
        with progress_bar(progress) as bar:
            outcomes = run_jobs(_prepare_series, jobs, workers, scheduler, when_killed=_Outcome(reason=KILLED))
            for index, outcome in bar.track(outcomes, total=len(jobs), description="series"):
                one = series[index]
                reused += outcome.reused
                if outcome.record is None:
                    notes = [str(outcome.reason)]
                else:
                    items[index], notes = _item(one, outcome.record, tables, out)
                notes = [_without_folder(note, rsna_dir) for note in notes]
                rejected += [Rejection(one.patient_id, one.series_id, note) for note in notes]
    except KeyboardInterrupt:
        say(f"interrupted: {len(items)} of {len(jobs)} series are done and kept; the same command goes on from there")
        raise

    sections: dict[str, list[dict[str, Any]]] = {"training": [], "test": []}
    for index in sorted(items):
        sections[series[index].section].append(items[index])
    write_csv(out / "rejected.csv", Rejection._fields, sorted(rejected))
    write_json(out / DATALIST, sections)
    if not items:
        first = rejected[0].reason if rejected else "there is none"
        raise ValueError(f"no series could be prepared ({first}); all reasons are in {out / 'rejected.csv'}.")
    masks = sum("organs" in item for item in items.values())
    summary = Prepared(len(sections["training"]), len(sections["test"]), masks, reused, len(rejected))
    say(
        f"{summary.training} training and {summary.test} test series ({reused} from an earlier run), {masks} with "
        f"organ masks; not used: {summary.rejected}{', see rejected.csv' if rejected else ''}"
    )
    return summary


# One series: this part runs in the workers.


def _prepare_series(job: _Job) -> _Outcome:
    """Read one series and its mask, write both and the record; or find that it is done.

    Whatever is wrong with the input is returned as a reason. What is wrong with the output (a full disk) is raised,
    for it would happen to every other series too.
    """
    try:
        files = sorted(job.folder.glob("*.dcm"))
        inputs = fingerprint([*files, *([job.mask] if job.mask else [])])
    except OSError as error:
        return _Outcome(reason=f"cannot be listed: {error.strerror}")
    record_file, image_file, mask_file = (path(job.out, job.name) for path in (record_path, image_path, mask_path))
    record = None if job.overwrite else _valid_record(record_file, inputs, job)
    if record is not None:
        return _Outcome(record, reused=True)
    record_file.unlink(missing_ok=True)
    try:
        if not files:
            raise DicomError("no .dcm files")
        # The files, not the folder: of a folder, a file that is no DICOM any more would be left out unseen.
        volume = read_series(files)
    except Exception as error:  # decoders raise anything; the next series may well be fine
        image_file.unlink(missing_ok=True)
        return _Outcome(reason=_reason(error))
    codes, mask_problem = _read_mask(job.mask, volume.array.shape, volume.affine)
    write_volume(image_file, volume.array, volume.affine)
    if codes is None:
        # Also one that `segment` made: it may belong to the pixels of before.
        mask_file.unlink(missing_ok=True)
    else:
        write_volume(mask_file, codes, volume.affine)
    record = {
        "version": RECORD_VERSION,
        "inputs": inputs,
        "shape": list(volume.array.shape),
        "instance_numbers": [_instance_number(number, path) for _, number, path in volume.instances],
        "has_mask": codes is not None,
        "mask_problem": mask_problem,
    }
    write_json(record_file, record)
    return _Outcome(record)


def _instance_number(of_header: int, path: Path) -> int:
    """What frame labels call a slice: the name of its file, as the layout promises, or else what its header says."""
    return int(path.stem) if path.stem.isdecimal() else of_header


def _read_mask(path: Path | None, shape: Sequence[int], affine: np.ndarray) -> tuple[np.ndarray | None, str | None]:
    if path is None:
        return None, None
    try:
        return mask_on_grid(path, shape, affine), None
    except Exception as error:  # a mask that cannot be used leaves a series that can
        return None, f"mask not used: {_reason(error)}"


def _valid_record(path: Path, inputs: str, job: _Job) -> dict[str, Any] | None:
    """The record of an earlier run, when it still describes the input and the files that were written."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(record, dict) or set(record) != RECORD_ENTRIES:
        return None
    if record.get("version") != RECORD_VERSION or record.get("inputs") != inputs:
        return None
    whole = size_of(image_path(job.out, job.name)) == image_bytes(record["shape"])
    if record["has_mask"]:
        whole = whole and size_of(mask_path(job.out, job.name)) == mask_bytes(record["shape"])
    return record if whole else None


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}"


# What is written.


class _Tables(NamedTuple):
    """The competition's tables: what is known of patients and series."""

    labels: Mapping[str, Mapping[str, int]]
    problems: Mapping[str, str]
    frames: Mapping[tuple[str, str], Mapping[str, Sequence[int]]]
    folds: Mapping[str, int]

    @classmethod
    def read(cls, rsna_dir: Path, folds: int) -> _Tables:
        labels, problems = read_labels(rsna_dir / "train.csv")
        frames = read_frame_labels(rsna_dir / "image_level_labels.csv")
        return cls(labels, problems, frames, assign_folds(labels, folds))

    @classmethod
    def empty(cls) -> _Tables:
        return cls({}, {}, {}, {})

    def problem(self, series: RsnaSeries) -> str | None:
        """Why nothing can be learned from a series; None when it can."""
        if series.section == "test" or series.patient_id in self.labels:
            return None
        return self.problems.get(series.patient_id, "its patient is not in train.csv")


def _item(
    series: RsnaSeries, record: Mapping[str, Any], tables: _Tables, out: Path
) -> tuple[dict[str, Any], list[str]]:
    """One entry of the datalist, and what of the series is not used."""
    name = _name(series)
    notes = [record["mask_problem"]] if record["mask_problem"] else []
    item: dict[str, Any] = {"image": image_path(out, name).relative_to(out).as_posix()}
    if record["has_mask"]:
        item |= {"organs": mask_path(out, name).relative_to(out).as_posix(), "organs_from": "segmentations"}
    if series.section == "training":
        frames, frame_notes = _frame_indices(
            tables.frames.get((series.patient_id, series.series_id), {}), record["instance_numbers"]
        )
        notes += frame_notes
        item |= {"label": dict(tables.labels[series.patient_id]), "frame_labels": frames}
        item["fold"] = tables.folds[series.patient_id]
    item |= {
        "patient_id": series.patient_id,
        "series_id": series.series_id,
        "aortic_hu": series.aortic_hu,
        "num_slices": record["shape"][2],
    }
    if not record["has_mask"]:
        add_model_mask(item, out)
    return item, notes


def _frame_indices(
    labelled: Mapping[str, Sequence[int]], instance_numbers: Sequence[int | None]
) -> tuple[dict[str, list[int]], list[str]]:
    """From labelled instance numbers to slice indices, by the slices' own numbers: either order occurs."""
    copies = Counter(instance_numbers)
    index_of = {number: index for index, number in enumerate(instance_numbers) if copies[number] == 1}
    indices: dict[str, list[int]] = {name: [] for name in FRAME_TARGETS}
    lost: set[int] = set()
    for name, numbers in labelled.items():
        indices[name] = sorted({index_of[number] for number in numbers if number in index_of})
        lost |= {number for number in numbers if number not in index_of}
    if not lost:
        return indices, []
    return indices, [f"frame labels not used: no single slice has instance number {', '.join(map(str, sorted(lost)))}"]


def _name(series: RsnaSeries) -> str:
    return f"{series.patient_id}_{series.series_id}"


def _without_folder(text: str, folder: Path) -> str:
    """Paths in reasons start at the data set: the rest differs between machines."""
    return text.replace(f"{folder}{os.sep}", "")
