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

Volumes are uncompressed NIfTI with the array axes to patient left, to posterior and to the head: the pixels of one
axial slice lie together, so that a memory-mapped file gives 96 of 400 slices without reading the rest.

A run can be stopped at any time and started again. A series counts as done when its record is there, its DICOM files
and mask are those that the record was made from (names, sizes, modification times), and the files that were written
have the size that they must have. Files appear under their names when they are complete. A series that was rejected
is tried again by every run: the cause may lie outside of the data, such as a decoder that was not installed. Labels,
folds and aortic HU are read from the tables anew by every run.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import dask
import nibabel
import numpy as np
from dask.distributed import Client, KilledWorker, LocalCluster, as_completed
from dask.system import CPU_COUNT
from distributed import Worker, WorkerPlugin
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation, ornt_transform
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from trauma_monai.dicom import DicomError, read_series
from trauma_monai.files import DATALIST, PART, complete_or_absent
from trauma_monai.rsna_layout import (
    Rejection,
    RsnaSeries,
    assign_folds,
    list_series,
    read_frame_labels,
    read_labels,
)
from trauma_monai.targets import FRAME_TARGETS, ORGAN_CODES

__all__ = ["Prepared", "mask_on_grid", "prepare", "segment"]

RECORD_VERSION = 1
"""Raised when volumes are written differently, so that older ones are made again."""

NIFTI_HEADER_BYTES = 352
"""Header of a NIfTI-1 file without extensions; the voxels follow."""

MAX_MASK_SHIFT_VOXELS = 0.5
"""How far a corner of a mask may lie from the image's, along any axis. Below half a voxel, nearest-neighbour resampling
would return the mask unchanged; above, mask and image are of different volumes or one of them lies."""

SCANNER_SPACE = 1
"""NIfTI sform and qform code of coordinates given by the scanner."""


LOCAL_DASK: dict[str, float] = {
    # A worker holds one series and no next one, so that a series which kills it is told from those that wait.
    "distributed.scheduler.worker-saturation": 1.0,
    "distributed.scheduler.allowed-failures": 1,
}
"""Settings of the local cluster. It has no memory limit either: Dask would restart a worker for a long series."""


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
    series = [one for one in series if not tables.problem(one)]
    _make_folders(out)

    items: dict[int, dict[str, Any]] = {}
    reused = 0
    jobs = [_Job(_name(one), one.folder, one.mask, out, overwrite) for one in series]
    try:
        with _progress_bar("series", len(jobs), progress) as advance:
            for index, outcome in _run(jobs, workers, scheduler):
                one = series[index]
                reused += outcome.reused
                if outcome.record is None:
                    notes = [str(outcome.reason)]
                else:
                    items[index], notes = _item(one, outcome.record, tables, out)
                notes = [_without_folder(note, rsna_dir) for note in notes]
                rejected += [Rejection(one.patient_id, one.series_id, note) for note in notes]
                advance()
    except KeyboardInterrupt:
        _say(f"interrupted: {len(items)} of {len(jobs)} series are done and kept; the same command goes on from there")
        raise

    sections: dict[str, list[dict[str, Any]]] = {"training": [], "test": []}
    for index in sorted(items):
        sections[series[index].section].append(items[index])
    _write_rejected(out / "rejected.csv", rejected)
    _write_json(out / DATALIST, sections)
    if not items:
        first = rejected[0].reason if rejected else "there is none"
        raise ValueError(f"no series could be prepared ({first}); all reasons are in {out / 'rejected.csv'}.")
    masks = sum("organs" in item for item in items.values())
    summary = Prepared(len(sections["training"]), len(sections["test"]), masks, reused, len(rejected))
    _say(
        f"{summary.training} training and {summary.test} test series ({reused} from an earlier run), {masks} with "
        f"organ masks; not used: {summary.rejected}{', see rejected.csv' if rejected else ''}"
    )
    return summary


def segment(
    out: str | Path,
    weights: str | Path,
    variant: str | None = None,
    bundles_dir: str | Path | None = None,
    device: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> int:
    """Fill in organ masks for the prepared series that have none, in training and test.

    A mask that is there is not made again; one that came with the data set is never replaced. datalist.json is
    brought up to date at the end, also when the run is interrupted.

    Args:
        out: folder that :func:`prepare` wrote.
        weights: weights of the organ bundle.
        variant: variant of the bundle that the weights belong to.
        bundles_dir: folder with the organ bundle; by default the bundles that come with this package.
        device: where the network runs; the config chooses by default.
        overwrite: make again the masks that a network made, for instance with better weights.
        progress: show a progress bar on stderr.

    Returns:
        How many masks were made.

    Raises:
        FileNotFoundError: when there is no datalist.json, or no such weights.
        ValueError: when the bundle has no such variant.
        RuntimeError: when some series could not be segmented; the others have their masks.
    """
    out = Path(out).expanduser().absolute()
    if not (out / DATALIST).exists():
        raise FileNotFoundError(f"no {DATALIST} in {out}; make it with 'trauma-monai prepare RSNA_DIR OUT'.")
    sections = json.loads((out / DATALIST).read_text())
    items = [item for section in sections.values() for item in section if item.get("organs_from") != "segmentations"]
    todo = [item for item in items if overwrite or not _is_mask_of(_model_mask(out, item), out / item["image"])]
    problems: list[str] = []
    try:
        if todo:
            problems = _segment_items(todo, out, _organ_segmenter(bundles_dir, weights, variant, device), progress)
    finally:
        for item in items:
            _add_model_mask(item, out)
        _write_json(out / DATALIST, sections)
    made = len(todo) - len(problems)
    _say(f"{made} organ masks made, {len(items) - len(todo)} were there already")
    if problems:
        raise RuntimeError(f"{len(problems)} of {len(todo)} series could not be segmented; the first: {problems[0]}")
    return made


def _segment_items(
    items: Sequence[Mapping[str, Any]], out: Path, segmenter: Callable[..., Any], progress: bool
) -> list[str]:
    """Segment one series after the other; what fails is named and does not stop the rest."""
    from monai.data import MetaTensor

    from trauma_monai import VolumeReader

    reader = VolumeReader()
    problems: list[str] = []
    with _progress_bar("organ masks", len(items), progress) as advance:
        for item in items:
            voxels, meta = reader.get_data(reader.read(out / item["image"]))
            try:
                label_map = segmenter(MetaTensor(voxels[None], affine=meta["affine"]))
            except (ValueError, RuntimeError) as error:
                problems.append(f"{_name_of(item)}: {error}")
            else:
                codes = np.asarray(label_map.cpu()).astype(np.uint8, copy=False)[0]
                _write_volume(_model_mask(out, item), codes, meta["affine"])
            advance()
    return problems


def _organ_segmenter(
    bundles_dir: str | Path | None, weights: str | Path, variant: str | None, device: str | None
) -> Callable[..., Any]:
    from trauma_monai.bundle_files import ORGAN_BUNDLE, find_bundle
    from trauma_monai.organs import OrganSegmenter

    root = find_bundle(ORGAN_BUNDLE, None if bundles_dir is None else Path(bundles_dir))
    return OrganSegmenter(root, weights, variant, device)


# One series: this part runs in the workers.


def _prepare_series(job: _Job) -> _Outcome:
    """Read one series and its mask, write both and the record; or find that it is done.

    Whatever is wrong with the input is returned as a reason. What is wrong with the output (a full disk) is raised,
    for it would happen to every other series too.
    """
    try:
        files = sorted(job.folder.glob("*.dcm"))
        inputs = _fingerprint(files, job.mask)
    except OSError as error:
        return _Outcome(reason=f"cannot be listed: {error.strerror}")
    record_path = job.out / "records" / f"{job.name}.json"
    record = None if job.overwrite else _valid_record(record_path, inputs, job)
    if record is not None:
        return _Outcome(record, reused=True)
    record_path.unlink(missing_ok=True)
    image_path, organs_path = (job.out / folder / f"{job.name}.nii" for folder in ("images", "organs"))
    try:
        if not files:
            raise DicomError("no .dcm files")
        # The files, not the folder: of a folder, a file that is no DICOM any more would be left out unseen.
        volume = read_series(files)
    except Exception as error:  # decoders raise anything; the next series may well be fine
        image_path.unlink(missing_ok=True)
        return _Outcome(reason=_reason(error))
    codes, mask_problem = _read_mask(job.mask, volume.array.shape, volume.affine)
    _write_volume(image_path, volume.array, volume.affine)
    if codes is None:
        # Also one that `segment` made: it may belong to the pixels of before.
        organs_path.unlink(missing_ok=True)
    else:
        _write_volume(organs_path, codes, volume.affine)
    record = {
        "version": RECORD_VERSION,
        "inputs": inputs,
        "shape": list(volume.array.shape),
        "instance_numbers": [None if number is None else int(number) for _, number, _ in volume.instances],
        "has_mask": codes is not None,
        "mask_problem": mask_problem,
    }
    _write_json(record_path, record)
    return _Outcome(record)


def _read_mask(path: Path | None, shape: Sequence[int], affine: np.ndarray) -> tuple[np.ndarray | None, str | None]:
    if path is None:
        return None, None
    try:
        return mask_on_grid(path, shape, affine), None
    except Exception as error:  # a mask that cannot be used leaves a series that can
        return None, f"mask not used: {_reason(error)}"


def mask_on_grid(path: str | Path, shape: Sequence[int], affine: np.ndarray) -> np.ndarray:
    """Read an organ mask and turn its axes to those of the image, as both affines say.

    Nothing is resampled and nothing is guessed: axes are exchanged and reversed until they point as the image's do,
    and then every corner must be where the image has it.

    Args:
        path: NIfTI file with organ codes.
        shape: shape (X, Y, Z) of the image.
        affine: RAS+ affine of the image, 4x4, in mm.

    Returns:
        Organ codes, uint8, of shape ``shape``.

    Raises:
        ValueError: when the file does not say how it lies, lies elsewhere, or holds other values than organ codes.
    """
    image = nibabel.load(path)
    if not isinstance(image, nibabel.Nifti1Image):
        raise ValueError(f"{type(image).__name__} is not NIfTI")
    if image.header["sform_code"] == 0 and image.header["qform_code"] == 0:
        raise ValueError("sform and qform codes are 0: the file does not say which side is left")
    turn = ornt_transform(io_orientation(image.affine), io_orientation(affine))
    turned_affine = image.affine @ inv_ornt_aff(turn, image.shape[:3])
    codes = apply_orientation(np.asanyarray(image.dataobj), turn)
    if codes.shape != tuple(shape):
        raise ValueError(f"shape {codes.shape} differs from that of the image, {tuple(shape)} (axes as in the image)")
    shift = _corner_shift_voxels(turned_affine, affine, shape)
    if not shift <= MAX_MASK_SHIFT_VOXELS:
        raise ValueError(
            f"it lies up to {shift:.2f} voxels from the image, expected at most {MAX_MASK_SHIFT_VOXELS}: "
            "their affines are of different grids"
        )
    low, high = codes.min(), codes.max()
    if low < 0 or high > max(ORGAN_CODES.values()) or (codes.dtype.kind == "f" and (codes != np.rint(codes)).any()):
        raise ValueError(f"values {low:g} to {high:g}, expected organ codes 0 to {max(ORGAN_CODES.values())}")
    return codes.astype(np.uint8, copy=False)


def _corner_shift_voxels(affine: np.ndarray, reference: np.ndarray, shape: Sequence[int]) -> float:
    """Largest distance along any axis, in voxels of the reference, of the corner voxels of two grids."""
    corners = np.array([[i, j, k, 1] for i in (0, shape[0] - 1) for j in (0, shape[1] - 1) for k in (0, shape[2] - 1)])
    in_reference = np.linalg.inv(reference) @ affine @ corners.T
    return float(np.abs(in_reference.T - corners).max())


def _fingerprint(files: Sequence[Path], mask: Path | None) -> str:
    """Names, sizes and modification times of everything that the series is made from, as one short text."""
    stats = [(path.parent.name, path.name, path.stat()) for path in (*files, *([mask] if mask else []))]
    facts = [(folder, name, stat.st_size, stat.st_mtime_ns) for folder, name, stat in stats]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _valid_record(path: Path, inputs: str, job: _Job) -> dict[str, Any] | None:
    """The record of an earlier run, when it still describes the input and the files that were written."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    if record.get("version") != RECORD_VERSION or record.get("inputs") != inputs:
        return None
    voxels = int(np.prod(record["shape"]))
    sizes = {job.out / "images" / f"{job.name}.nii": NIFTI_HEADER_BYTES + 2 * voxels}
    if record["has_mask"]:
        sizes[job.out / "organs" / f"{job.name}.nii"] = NIFTI_HEADER_BYTES + voxels
    return record if all(_size(file) == size for file, size in sizes.items()) else None


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}"


# The run: one process after the other, on this machine or on a cluster.


def _run(jobs: Sequence[_Job], workers: int | None, scheduler: str | None) -> Iterator[tuple[int, _Outcome]]:
    """Prepare all series, in any order; yields the index of the job with its outcome."""
    workers = min(workers or CPU_COUNT, max(len(jobs), 1))
    if scheduler is None and workers == 1:
        yield from ((index, _prepare_series(job)) for index, job in enumerate(jobs))
        return
    with _dask_client(workers, scheduler) as client:
        index_of = {future: index for index, future in enumerate(client.map(_prepare_series, jobs, pure=False))}
        for future in as_completed(index_of, raise_errors=False):
            index = index_of.pop(future)
            yield index, _outcome(future)


def _outcome(future: Any) -> _Outcome:
    error = future.exception()
    if isinstance(error, KilledWorker):
        # A decoder that crashes, or memory that ran out: it takes its process along, not the run.
        return _Outcome(reason="the process that read it was killed each time: a decoder crashed, or memory ran out")
    if error is not None:
        raise error
    return future.result()


class _IgnoreInterrupts(WorkerPlugin):
    """Ctrl-C reaches every process of the terminal; the one that answers it stops the workers."""

    def setup(self, worker: Worker) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def _dask_client(workers: int, scheduler: str | None) -> Iterator[Client]:
    if scheduler is not None:
        with Client(scheduler) as client:
            yield client
        return
    with (
        dask.config.set(LOCAL_DASK),
        LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            processes=True,
            memory_limit=0,
            dashboard_address=None,
            silence_logs=logging.CRITICAL,
        ) as cluster,
        Client(cluster) as client,
    ):
        client.register_plugin(_IgnoreInterrupts())
        yield client


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
    item: dict[str, Any] = {"image": f"images/{name}.nii"}
    if record["has_mask"]:
        item |= {"organs": f"organs/{name}.nii", "organs_from": "segmentations"}
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
        _add_model_mask(item, out)
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


def _add_model_mask(item: dict[str, Any], out: Path) -> None:
    """Add the mask that :func:`segment` made, if there is one."""
    path = _model_mask(out, item)
    if _is_mask_of(path, out / item["image"]):
        item |= {"organs": path.relative_to(out).as_posix(), "organs_from": "model"}


def _model_mask(out: Path, item: Mapping[str, Any]) -> Path:
    return out / "organs" / f"{_name_of(item)}.nii"


def _is_mask_of(mask: Path, image: Path) -> bool:
    """Whether a mask is complete: one byte per voxel, where the image has two."""
    mask_bytes, image_bytes = _size(mask), _size(image)
    if mask_bytes is None or image_bytes is None:
        return False
    return 2 * (mask_bytes - NIFTI_HEADER_BYTES) == image_bytes - NIFTI_HEADER_BYTES


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def _name(series: RsnaSeries) -> str:
    return f"{series.patient_id}_{series.series_id}"


def _name_of(item: Mapping[str, Any]) -> str:
    return Path(item["image"]).stem


def _make_folders(out: Path) -> None:
    for name in ("images", "organs", "records"):
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(f"*{PART}"):
            leftover.unlink()


def _write_volume(path: Path, array: np.ndarray, affine: np.ndarray) -> None:
    # The order of the file: nibabel writes an array of the other order 10 times slower.
    image = nibabel.Nifti1Image(np.asfortranarray(array), affine)
    image.set_sform(affine, SCANNER_SPACE)
    image.set_qform(affine, SCANNER_SPACE)
    image.header.set_xyzt_units("mm")
    with complete_or_absent(path, "wb") as file:
        image.to_stream(file)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with complete_or_absent(path, "w") as file:
        file.write(json.dumps(content, indent=1))


def _write_rejected(path: Path, rejected: Sequence[Rejection]) -> None:
    text = StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(Rejection._fields)
    table.writerows(sorted(rejected))
    with complete_or_absent(path, "w") as file:
        file.write(text.getvalue())


def _without_folder(text: str, folder: Path) -> str:
    """Paths in reasons start at the data set: the rest differs between machines."""
    return text.replace(f"{folder}{os.sep}", "")


@contextmanager
def _progress_bar(what: str, total: int, show: bool) -> Iterator[Callable[[], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not show) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)


def _say(text: str) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).print(text)
