"""Whole data sets of phantoms in the layout of the RSNA 2023 competition."""

from __future__ import annotations

import csv
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from trauma_monai.phantom.anatomy import Anatomy, random_anatomy
from trauma_monai.phantom.injuries import Injuries, injure, random_grades
from trauma_monai.phantom.rendering import Grid, Rendering, random_phase, render
from trauma_monai.phantom.storage import PIXEL_FORMATS, SeriesHeader, write_dicom, write_mask
from trauma_monai.targets import FRAME_LABEL_NAMES, SUBMISSION_COLUMNS

ID_RANGE = (10000, 65536)
"""Patient and series numbers are drawn from here, as in the competition."""

FRAME_LABEL_OF = {target.removesuffix("_injury"): name for name, target in FRAME_LABEL_NAMES.items()}
"""Group -> injury_name in image_level_labels.csv."""


@dataclass(frozen=True)
class Request:
    """What data set is wanted; see :func:`write_phantoms`."""

    out: Path
    studies: int
    seed: int
    matrix: int
    slice_thickness_mm: float
    masked_fraction: float
    test_studies: int


@dataclass
class Tables:
    """Rows of one patient for each table."""

    train: list[dict[str, object]] = field(default_factory=list)
    train_series_meta: list[dict[str, object]] = field(default_factory=list)
    image_level_labels: list[dict[str, object]] = field(default_factory=list)
    test_series_meta: list[dict[str, object]] = field(default_factory=list)
    sample_submission: list[dict[str, object]] = field(default_factory=list)


COLUMNS = {
    "train": ("patient_id", *SUBMISSION_COLUMNS, "any_injury"),
    "train_series_meta": ("patient_id", "series_id", "aortic_hu", "incomplete_organ"),
    "image_level_labels": ("patient_id", "series_id", "instance_number", "injury_name"),
    "test_series_meta": ("patient_id", "series_id", "aortic_hu"),
    "sample_submission": ("patient_id", *SUBMISSION_COLUMNS),
}


def write_phantoms(
    out: Path,
    studies: int,
    seed: int = 0,
    *,
    matrix: int = 256,
    slice_thickness_mm: float = 5.0,
    masked_fraction: float = 1.0,
    test_studies: int = 0,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write synthetic abdominal trauma CTs in the layout of the RSNA 2023 competition.

    Each patient has one or two series of different contrast phase, organ masks, and injuries that are visible in the
    pixels of every series. About a third of the patients is injured in each group, many times more than in reality, so
    that small sets teach something: scores on phantoms say that the machinery works, nothing about patients.

    Written are ``train_images/<patient_id>/<series_id>/<instance>.dcm`` (RLE Lossless, headers as varied as the
    competition's), ``segmentations/<series_id>.nii`` and the tables train.csv, train_series_meta.csv,
    image_level_labels.csv, test_series_meta.csv and sample_submission.csv. A patient depends on the seed and on its
    index alone: the same seed gives the same bytes for any number of studies and workers. A process needs about
    70 bytes per voxel of a series.

    Args:
        out: folder to make; may exist if it is empty. It appears once everything is written.
        studies: number of patients.
        seed: not negative.
        matrix: rows and columns of a slice.
        slice_thickness_mm: also the distance between slices.
        masked_fraction: part of the series that has a segmentation.
        test_studies: number of further patients under test_images, without labels and masks.
        workers: processes; all cores by default.
        progress: called after each patient with the number done and the number of all.

    Raises:
        FileExistsError: when ``out`` exists and is not an empty folder.
        ValueError: for numbers out of range.
    """
    out = Path(out)
    _check(studies, seed, matrix, slice_thickness_mm, masked_fraction, test_studies)
    with _new_folder(out) as folder:
        request = Request(folder, studies, seed, matrix, slice_thickness_mm, masked_fraction, test_studies)
        total = studies + test_studies
        tables: list[Tables] = []
        for rows in _map(partial(_write_patient, request), range(total), workers or os.cpu_count() or 1):
            tables.append(rows)
            if progress:
                progress(len(tables), total)
        for name, columns in COLUMNS.items():
            _write_table(folder / f"{name}.csv", columns, [row for part in tables for row in getattr(part, name)])


def _check(
    studies: int, seed: int, matrix: int, slice_thickness_mm: float, masked_fraction: float, test_studies: int
) -> None:
    most = (ID_RANGE[1] - ID_RANGE[0]) // 2
    for name, value, low, high in (
        ("studies", studies, 1, most),
        ("test_studies", test_studies, 0, most - studies),
        ("seed", seed, 0, 2**63),
        ("matrix", matrix, 32, 1024),
        ("slice_thickness_mm", slice_thickness_mm, 0.5, 20),
        ("masked_fraction", masked_fraction, 0, 1),
    ):
        if not low <= value <= high:
            raise ValueError(f"{name} is {value}; expected {low} to {high}.")


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` that becomes ``out`` when the block ends well and vanishes when it does not."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not an empty folder: remove it or name another one.")
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield folder
        folder.chmod(0o755)  # mkdtemp makes it private
        os.replace(folder, out)  # over an empty folder too
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _map(function: Callable[[int], Tables], indices: Iterable[int], workers: int) -> Iterator[Tables]:
    if workers == 1:
        yield from map(function, indices)
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(function, indices)


def _write_table(path: Path, columns: tuple[str, ...], rows: list[dict[str, object]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _identifiers(seed: int) -> np.ndarray:
    """All patient and series numbers of a data set in random order, three to a patient."""
    return np.random.default_rng([seed, 0]).permutation(np.arange(*ID_RANGE))


def _write_patient(request: Request, index: int) -> Tables:
    """Draw, scan and write patient number ``index``; the test patients follow the others."""
    test = index >= request.studies
    # Test patients have numbers of their own: their look must not depend on how many others there are.
    number = index - request.studies + 1_000_000 if test else index
    rng = np.random.default_rng([request.seed, 1, number])
    identifiers = _identifiers(request.seed)
    if test:
        identifiers = identifiers[::-1]
    patient_id, *series_ids = (int(i) for i in identifiers[3 * (number % 1_000_000) :][:3])
    anatomy, injuries = injure(rng, random_anatomy(rng), random_grades(rng))
    phases = ("portal", "arterial") if rng.random() < 0.4 else (("portal",) if rng.random() < 0.7 else ("arterial",))
    in_scanner = np.append(np.round(rng.uniform((-20, -160, -900), (20, -60, -300)), 1), 0)
    tables = Tables()
    for order, (phase_name, series_id) in enumerate(zip(phases, series_ids, strict=False)):
        grid = _random_grid(rng, request, anatomy, injuries, tilted=number % 4 == 2)
        rendering = render(anatomy, injuries, random_phase(rng, phase_name), grid, rng)
        header = SeriesHeader(
            patient_id=patient_id,
            series_id=series_id,
            seed=request.seed,
            pixel_format=PIXEL_FORMATS[(number + 2 * order) % len(PIXEL_FORMATS)],
            first_instance=int(rng.integers(2, 300)),
            feet_first=number % 3 == 1,
            kvp=int(rng.choice([100, 120, 140])),
            patient_position="FFS" if rng.random() < 0.5 else "HFS",
        )
        affine = grid.affine.copy()
        affine[:, 3] += in_scanner
        images = request.out / ("test_images" if test else "train_images")
        write_dicom(images / str(patient_id) / str(series_id), rendering.hu, affine, header)
        if not test and rng.random() < request.masked_fraction:
            masks = request.out / "segmentations"
            masks.mkdir(exist_ok=True)
            write_mask(masks / f"{series_id}.nii", rendering.organs, affine)
        _add_series(tables, header, rendering, test=test)
    if test:
        uniform = {name: 0.5 if name.startswith(("bowel", "extravasation")) else 0.333 for name in SUBMISSION_COLUMNS}
        tables.sample_submission.append({"patient_id": patient_id, **uniform})
    else:
        tables.train.append({"patient_id": patient_id, **injuries.labels})
    return tables


def _add_series(tables: Tables, header: SeriesHeader, rendering: Rendering, *, test: bool) -> None:
    row: dict[str, object] = {
        "patient_id": header.patient_id,
        "series_id": header.series_id,
        "aortic_hu": rendering.aortic_hu,
    }
    if test:
        tables.test_series_meta.append(row)
        return
    tables.train_series_meta.append({**row, "incomplete_organ": int(not rendering.complete)})
    numbers = header.instance_numbers(len(rendering.hu))
    for group, name in FRAME_LABEL_OF.items():
        for number in sorted(int(numbers[i]) for i in rendering.frames[group]):
            tables.image_level_labels.append(
                {
                    "patient_id": header.patient_id,
                    "series_id": header.series_id,
                    "instance_number": number,
                    "injury_name": name,
                }
            )


def _random_grid(
    rng: np.random.Generator, request: Request, anatomy: Anatomy, injuries: Injuries, *, tilted: bool
) -> Grid:
    """Where one series lies: 320 to 390 mm high, a tenth of them cut short at the head, never through an injury."""
    dome = anatomy.diaphragm.bounds[1][2]
    bottom, top = rng.uniform(-12, 8), dome + rng.uniform(12, 30)
    if rng.random() < 0.1:
        injured_up_to = max((lesion.shape.bounds[1][2] for lesion in injuries.lesions), default=0.0)
        top = max(dome - rng.uniform(25, 50), injured_up_to + 10)
    slices = round((top - bottom) / request.slice_thickness_mm)
    field_of_view = 2.18 * anatomy.body.half_width + rng.uniform(4, 30)
    pixel = round(field_of_view / request.matrix, 6)
    tilt = (rng.uniform(1, 4), 0.0, rng.uniform(-1.5, 1.5)) if tilted else (0.0, 0.0, 0.0)
    return Grid(
        shape=(slices, request.matrix, request.matrix),
        spacing=(request.slice_thickness_mm, pixel, pixel),
        middle=(rng.uniform(-6, 6), rng.uniform(-6, 10), bottom),
        tilt=tilt,
    )
