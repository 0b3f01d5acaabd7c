"""Stage 1 of 6: DICOM series -> volume (HU).

A folder of any mix is sorted into series; a series is checked, ordered by position and decoded into one volume. What is
not a plain stack of parallel, equally spaced CT slices is refused with its reason: nothing is repaired in silence.
Volumes have axes to patient left, to posterior and to the head for ordinary axial slices, and a RAS+ affine (nibabel's
and MONAI's convention).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.multival import MultiValue
from pydicom.tag import Tag
from pydicom.uid import UID, CTImageStorage, EnhancedCTImageStorage

from trauma_monai.headers import SliceHeaders, read_header
from trauma_monai.pixels import DicomError, read_hu

__all__ = ["CTVolume", "DicomError", "Rejected", "SeriesFiles", "discover_series", "read_series"]

MIN_SLICES = 3
"""Fewer slices make no volume: neither their spacing nor a gap can be judged."""

MAX_TILT_DEGREES = 0.5
"""Angle between the stack and the slices' normal. Above it (a tilted gantry) voxels are sheared by more than 1 %."""

SPACING_TOLERANCE = 0.05
"""Relative difference of slice distances that counts as rounding."""

ROUNDING_MM = 0.11
"""Positions are often given in tenths of a mm: 0.625 mm apart, they read 0.6 and 0.7."""

OFF_GRID = 0.5
"""How far a slice may lie from where equal steps would put it, in voxels."""

GAP = 1.5
"""A distance this many times the usual one means that a slice is missing."""

SAME_POSITION_MM = 0.01
"""Slices nearer than this lie at the same position; no CT is reconstructed in such steps."""

SAME_ORIENTATION = 1e-3
"""Difference of direction cosines that counts as rounding (0.06 degrees)."""

_DIRECTORY_FILE = "DICOMDIR"
_DAMAGED = "damaged DICOM file"
_NOT_DICOM = "not a DICOM file"
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])

_GEOMETRY = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "Rows", "Columns")
_SERIES_TAGS = tuple(
    Tag(name) for name in ("SOPClassUID", "PatientID", "StudyInstanceUID", "SeriesInstanceUID", "Modality", "ImageType")
)
_SLICE_TAGS = (
    *_SERIES_TAGS,
    *(Tag(name) for name in ("SOPInstanceUID", "InstanceNumber", *_GEOMETRY)),
    *(Tag(name) for name in ("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "SamplesPerPixel")),
    *(Tag(name) for name in ("PhotometricInterpretation", "NumberOfFrames")),
    *(Tag(name) for name in ("RescaleSlope", "RescaleIntercept", "RescaleType")),
    *(Tag(name) for name in ("PixelPaddingValue", "PixelPaddingRangeLimit", "PixelData")),
    *(Tag(name) for name in ("KVP", "SliceThickness", "ConvolutionKernel", "ContrastBolusAgent")),
    *(Tag(name) for name in ("Manufacturer", "ManufacturerModelName")),
)


class Rejected(NamedTuple):
    """A file or folder that holds no CT series to read, and why."""

    path: Path
    reason: str


@dataclass(frozen=True)
class SeriesFiles:
    """The files of one series, in no particular order.

    Attributes:
        patient_id: PatientID; empty where the files have none.
        study_uid: StudyInstanceUID; empty where the files have none.
        series_uid: SeriesInstanceUID; the name of the folder where the files have none.
        modality: always ``CT``.
        files: paths.
    """

    patient_id: str
    study_uid: str
    series_uid: str
    modality: str
    files: tuple[Path, ...]


class CTVolume(NamedTuple):
    """One series in memory.

    Attributes:
        array: HU, int16 of shape (X, Y, Z): columns, rows, slices along their normal, towards the head.
        affine: voxel index -> mm in RAS+, float64 (4, 4).
        facts: what reports show (kVp, kernel, ...); nothing that identifies a patient.
        instances: (SOPInstanceUID, InstanceNumber, file) of each slice along Z.
    """

    array: np.ndarray
    affine: np.ndarray
    facts: Mapping[str, str | float]
    instances: tuple[tuple[str, int, Path], ...]


def discover_series(folder: str | Path) -> tuple[list[SeriesFiles], list[Rejected]]:
    """Find the CT series in a folder of any mix: patients, studies, series, localizers, reports, other files.

    A series may be spread over folders. Where files have no SeriesInstanceUID, those of one folder are a series.

    Args:
        folder: searched with all its subfolders.

    Returns:
        CT series, ordered by patient, study and series; and what was left out, with the reason.

    Raises:
        DicomError: when the folder does not exist.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DicomError(f"{folder} is not a folder; expected a folder of DICOM files.")
    members: dict[tuple[str, str, str, str], list[Path]] = {}
    rejected: list[Rejected] = []
    for path in _files_in(folder):
        header, reason = _read_series_header(path)
        if header is None:
            rejected.append(Rejected(path, reason))
        else:
            members.setdefault(_series_key(path, header), []).append(path)
    found = [
        SeriesFiles(patient_id, study_uid, uid or Path(place).name, "CT", tuple(paths))
        for (patient_id, study_uid, uid, place), paths in sorted(members.items())
    ]
    return found, rejected


def read_series(series: SeriesFiles | str | Path | Sequence[str | Path]) -> CTVolume:
    """Read one CT series into a volume.

    Slices are ordered by ImagePositionPatient along the normal of their plane, never by InstanceNumber
    (PS3.3 C.7.6.2.1.1), towards the head. Repeated files (same position, same pixels) count once, and the facts say so.

    Args:
        series: from :func:`discover_series`, the folder of one series, or its files.

    Returns:
        The volume with its affine. Values between HU (a fractional slope) are rounded to whole ones.

    Raises:
        DicomError: for no or several series, localizers and other non-CT images; files that cannot be decoded;
            slices that differ in size, spacing or orientation, lie at one position with different pixels, are missing
            or unevenly spaced, or are sheared (gantry tilt).
    """
    try:
        return _read_volume(series)
    except DicomError:
        raise
    except (ArithmeticError, AttributeError, LookupError, NotImplementedError, TypeError, ValueError) as error:
        # Values are converted when they are asked for, wherever that is; NotImplementedError is an unknown VR.
        raise DicomError(f"a header value is missing or malformed: {' '.join(str(error).split())}.") from error


def _read_volume(series: SeriesFiles | str | Path | Sequence[str | Path]) -> CTVolume:
    headers = _sorted_by_position(_read_slices(series))
    _check_alike([header for _, header in headers])
    positions = np.array([header.ImagePositionPatient for _, header in headers], dtype=np.float64)
    normal = _normal(headers[0][1])
    facts = _facts(headers[0][1])
    volume, inverted = _decode(headers)
    if inverted:
        facts["slices_stored_inverted"] = float(inverted)
    kept = _without_repeats(volume, positions @ normal)
    if len(kept) < len(headers):
        facts["repeated_slices_dropped"] = float(len(headers) - len(kept))
        volume, positions, headers = volume[kept], positions[kept], [headers[i] for i in kept]
    _check_spacing(positions, normal)
    affine = _affine(headers[0][1], positions)
    _check_on_grid(positions, affine)
    return CTVolume(
        array=volume.transpose(2, 1, 0),
        affine=affine,
        facts=facts,
        instances=tuple(
            (_instance_uid(header), int(header.get("InstanceNumber") or 0), path) for path, header in headers
        ),
    )


# --- files ------------------------------------------------------------------------------------------------------------


def _files_in(folder: Path) -> list[Path]:
    files: list[Path] = []
    entered: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in entered:
            folders.clear()  # links that lead back would be followed for ever
            continue
        entered.add(real)
        files += [path for name in names if name != _DIRECTORY_FILE and (path := Path(place, name)).is_file()]
    return sorted(files)


def _series_key(path: Path, header: Dataset) -> tuple[str, str, str, str]:
    """What files of one series have in common: patient, study and series; the folder where there is no series UID."""
    uid = _text(header, "SeriesInstanceUID")
    return _text(header, "PatientID"), _text(header, "StudyInstanceUID"), uid, "" if uid else str(path.parent)


def _read_series_header(path: Path) -> tuple[Dataset | None, str]:
    """Read what sorts a file into a series; None and the reason when it holds no CT slice."""

    def read() -> Dataset:
        with path.open("rb") as file:
            return read_header(file, _SERIES_TAGS, stop_before_pixels=True)

    return _ct_slice(read)


def _ct_slice(read: Callable[[], Dataset]) -> tuple[Dataset | None, str]:
    """Read a header; None and the reason when it is not that of a CT slice."""
    try:
        header = read()
        for tag in _SERIES_TAGS:
            header.get(tag)  # pydicom converts a value when it is asked for, and fails then
        reason = _no_ct_slice(header)
    except InvalidDicomError:
        return None, _NOT_DICOM
    except Exception as error:  # zlib.error, NotImplementedError, ...: damage of any kind
        return None, f"{_DAMAGED} ({type(error).__name__})"
    return (None, reason) if reason else (header, "")


def _read_slices(series: SeriesFiles | str | Path | Sequence[str | Path]) -> list[tuple[Path, Dataset]]:
    """Read the headers of one series, with pixels that are still encoded, or in their file still.

    In a folder, what is no CT slice is passed over; a file that was named is refused if it is none. A damaged file, or
    one that is called .dcm and is no DICOM, is refused in either case: it may be a slice.
    """
    in_folder = isinstance(series, (str, Path))
    paths = _files_in(Path(series)) if isinstance(series, (str, Path)) else _named_files(series)
    headers = SliceHeaders(_SLICE_TAGS)
    slices: list[tuple[Path, Dataset]] = []
    passed_over: list[str] = []
    first_key: tuple[str, ...] = ()
    for path in paths:
        header, reason = _ct_slice(partial(headers.read, path))
        if header is not None and "PixelData" not in header:
            # Of compressed pixels that are cut off, pydicom returns nothing, not even the elements before them.
            header, reason = None, f"{_DAMAGED} (no pixels, or cut off within them)"
        if header is None:
            broken = reason.startswith(_DAMAGED) or (reason == _NOT_DICOM and path.suffix.lower() == ".dcm")
            if broken or not in_folder:
                raise DicomError(f"{path.name}: {reason}.")
            passed_over.append(reason)
            continue
        key = _series_key(path, header)
        if slices and key != first_key:
            raise DicomError(f"{path.name} belongs to another series than {slices[0][0].name}; expected one series.")
        if missing := [tag for tag in _GEOMETRY if not header.get(tag)]:
            raise DicomError(f"{path.name}: no {', '.join(missing)}; the slice's place in space is unknown.")
        first_key = first_key or key
        slices.append((path, header))
    if not slices:
        reasons = ", ".join(sorted(set(passed_over))) or "no files"
        raise DicomError(
            f"no CT series{f' in {Path(series).name}' if isinstance(series, (str, Path)) else ''}: {reasons}."
        )
    return slices


def _named_files(series: SeriesFiles | Sequence[str | Path]) -> list[Path]:
    return list(series.files) if isinstance(series, SeriesFiles) else [Path(path) for path in series]


def _decode(headers: Sequence[tuple[Path, Dataset]]) -> tuple[np.ndarray, int]:
    """Decode the slices to HU (Z, Y, X); also say how many were stored inverted."""
    first = headers[0][1]
    volume = np.empty((len(headers), int(first.Rows), int(first.Columns)), dtype=np.int16)
    inverted = 0
    for (path, header), out in zip(headers, volume, strict=True):
        try:
            inverted += read_hu(header, out)
        except DicomError as error:
            raise DicomError(f"{path.name}: {error}.") from error
        except OSError as error:  # pixels that are not compressed were in the file until now
            raise DicomError(f"{path.name}: the file can no longer be read ({type(error).__name__}).") from error
        del header.PixelData  # decoded: the series is never held twice
    return volume, inverted


def _no_ct_slice(header: Dataset) -> str | None:
    """Say why this is not one slice of a CT volume; None when it is one."""
    sop_class = UID(_text(header, "SOPClassUID") or str(header.file_meta.get("MediaStorageSOPClassUID", "")))
    if sop_class == EnhancedCTImageStorage:
        return "enhanced (multi-frame) CT is not supported; export it as one file per slice"
    if sop_class != CTImageStorage and (sop_class or _text(header, "Modality") != "CT"):
        return f"not a CT image ({sop_class.name if sop_class else _text(header, 'Modality') or 'no modality'})"
    if "LOCALIZER" in [str(value).strip() for value in _values(header, "ImageType")]:
        return "localizer"
    return None


def _text(header: Dataset, tag: str) -> str:
    return str(header.get(tag) or "").strip()


def _values(header: Dataset, tag: str) -> list[Any]:
    value = header.get(tag)
    return list(value) if isinstance(value, MultiValue) else [] if value is None else [value]


def _instance_uid(header: Dataset) -> str:
    return _text(header, "SOPInstanceUID") or str(header.file_meta.get("MediaStorageSOPInstanceUID", ""))


def _facts(header: Dataset) -> dict[str, str | float]:
    """What a report may show. A closed list: free text may name a patient."""
    facts: dict[str, str | float] = {
        "kernel": "/".join(map(str, _values(header, "ConvolutionKernel"))),
        "manufacturer": _text(header, "Manufacturer"),
        "model": _text(header, "ManufacturerModelName"),
        "contrast_agent": "yes" if _text(header, "ContrastBolusAgent") else "",
        "transfer_syntax": header.file_meta.TransferSyntaxUID.name,
    }
    for name, tag in (("kVp", "KVP"), ("slice_thickness_mm", "SliceThickness")):
        with suppress(TypeError, ValueError):  # only shown: a series is not refused for it
            facts[name] = float(header.get(tag))
    return {name: value for name, value in facts.items() if value != ""}


# --- geometry ---------------------------------------------------------------------------------------------------------


def _normal(header: Dataset) -> np.ndarray:
    """Unit normal of a slice (LPS), on the side of the patient's head."""
    cosines = np.array(header.ImageOrientationPatient, dtype=np.float64)
    normal = np.cross(cosines[:3], cosines[3:])
    return normal / np.linalg.norm(normal) * (1.0 if normal[2] >= 0 else -1.0)


def _sorted_by_position(members: Sequence[tuple[Path, Dataset]]) -> list[tuple[Path, Dataset]]:
    if len(members) < MIN_SLICES:
        raise DicomError(f"{len(members)} slice(s); a volume needs at least {MIN_SLICES}.")
    positions = np.array([header.ImagePositionPatient for _, header in members], dtype=np.float64)
    order = np.argsort(positions @ _normal(members[0][1]), kind="stable")
    return [members[index] for index in order]


def _check_alike(headers: Sequence[Dataset]) -> None:
    sizes = sorted({(int(header.Rows), int(header.Columns)) for header in headers})
    if len(sizes) > 1:
        mixed = " and ".join(f"{rows} x {columns}" for rows, columns in sizes)
        raise DicomError(f"slices of {mixed} pixels mixed; expected one size.")
    spacings = np.array([header.PixelSpacing for header in headers], dtype=np.float64)
    if not np.allclose(spacings, spacings[0], rtol=SAME_ORIENTATION, atol=0):
        raise DicomError(
            f"pixel spacings from {spacings.min():g} to {spacings.max():g} mm mixed; expected one spacing."
        )
    if spacings.min() <= 0:
        raise DicomError(f"a pixel spacing of {spacings.min():g} mm; expected more than 0.")
    kernels = sorted({"/".join(map(str, _values(header, "ConvolutionKernel"))) for header in headers})
    if len(kernels) > 1:
        raise DicomError(f"slices of the kernels {' and '.join(kernels)} mixed; expected one reconstruction.")
    cosines = np.array([header.ImageOrientationPatient for header in headers], dtype=np.float64)
    axes = cosines[0].reshape(2, 3)
    if not np.allclose(axes @ axes.T, np.eye(2), rtol=0, atol=SAME_ORIENTATION):
        raise DicomError(f"row and column directions {cosines[0].tolist()} are not at right angles and of length 1.")
    if not np.allclose(cosines, cosines[0], rtol=0, atol=SAME_ORIENTATION):
        raise DicomError("slices of different orientation mixed; expected parallel ones.")


def _without_repeats(volume: np.ndarray, heights_mm: np.ndarray) -> list[int]:
    """Indices of the slices without those that repeat the one before them.

    Raises:
        DicomError: when slices at one position have different pixels.
    """
    kept = [0]
    for index in range(1, len(volume)):
        if heights_mm[index] - heights_mm[kept[-1]] >= SAME_POSITION_MM:
            kept.append(index)
        elif not np.array_equal(volume[index], volume[kept[-1]]):
            raise DicomError(
                f"several slices with different pixels at position {heights_mm[index]:g} mm (several series, phases or "
                "reconstructions in one?); expected one slice per position."
            )
    return kept


def _check_spacing(positions: np.ndarray, normal: np.ndarray) -> None:
    if len(positions) < MIN_SLICES:
        raise DicomError(f"{len(positions)} slices at different positions; a volume needs at least {MIN_SLICES}.")
    stack = positions[-1] - positions[0]
    tilt = np.degrees(np.arccos(np.clip(stack @ normal / np.linalg.norm(stack), -1.0, 1.0)))
    if tilt > MAX_TILT_DEGREES:
        raise DicomError(
            f"the slices are stacked {tilt:.1f} degrees off their normal (gantry tilt); expected less than "
            f"{MAX_TILT_DEGREES}. Resample the series to an untilted one first."
        )
    heights = positions @ normal
    distances = np.diff(heights)
    usual = float(np.median(distances))
    if (worst := int(np.argmax(distances))) >= 0 and distances[worst] > GAP * usual:
        missing = int(np.sum(np.rint(distances[distances > GAP * usual] / usual) - 1))
        raise DicomError(
            f"about {missing} slice(s) missing: {distances[worst]:.2f} mm between the slices at {heights[worst]:g} and "
            f"{heights[worst + 1]:g} mm, where {usual:.2f} mm is usual."
        )
    if np.abs(distances - usual).max() > max(SPACING_TOLERANCE * usual, ROUNDING_MM):
        raise DicomError(
            f"slice distances from {distances.min():.2f} to {distances.max():.2f} mm mixed; expected equal ones."
        )


def _check_on_grid(positions: np.ndarray, affine: np.ndarray) -> None:
    """Refuse a series whose slices are shifted within their plane, or whose steps drift."""
    steps = np.arange(len(positions))
    indices = np.stack([np.zeros_like(steps), np.zeros_like(steps), steps], axis=1)
    found = np.linalg.inv(affine[:3, :3]) @ (positions * np.diag(_LPS_TO_RAS)[:3] - affine[:3, 3]).T
    off = np.abs(found.T - indices).max(axis=1)
    if (worst := float(off.max())) > OFF_GRID:
        raise DicomError(
            f"slice {int(off.argmax())} from the feet lies {worst:.1f} voxels off the grid of the others; expected "
            "parallel slices in equal steps, one above the other."
        )


def _affine(header: Dataset, positions: np.ndarray) -> np.ndarray:
    """Voxel index (column, row, slice) -> mm, RAS+ (PS3.3 C.7.6.2.1.1, with x and y negated from LPS)."""
    cosines = np.array(header.ImageOrientationPatient, dtype=np.float64)
    row_mm, column_mm = (float(mm) for mm in header.PixelSpacing)
    affine = np.eye(4)
    affine[:3, 0] = cosines[:3] * column_mm
    affine[:3, 1] = cosines[3:] * row_mm
    affine[:3, 2] = (positions[-1] - positions[0]) / (len(positions) - 1)
    affine[:3, 3] = positions[0]
    return _LPS_TO_RAS @ affine
