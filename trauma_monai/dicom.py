"""Stage 1 of 6: DICOM series -> volume (HU).

A folder of any mix is sorted into series; a series is checked, ordered by position and decoded into one volume. What is
not a plain stack of parallel, equally spaced CT slices is refused with its reason: nothing is repaired in silence.
Volumes have axes to patient left, to posterior and to the head for ordinary axial slices, and a RAS+ affine (nibabel's
and MONAI's convention).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import pydicom
import pydicom.misc
import torch
from monai.config import PathLike
from monai.data import ImageReader
from monai.utils import MetaKeys, SpaceKeys, ensure_tuple
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.uid import UID, CTImageStorage, EnhancedCTImageStorage

from trauma_monai.pixels import DicomError, read_hu

__all__ = ["CTVolume", "DicomError", "Rejected", "SeriesFiles", "VolumeReader", "discover_series", "read_series"]

MIN_SLICES = 3
"""Fewer slices make no volume: neither their spacing nor a gap can be judged."""

MAX_TILT_DEGREES = 0.5
"""Angle between the stack and the slices' normal. Above it (a tilted gantry) voxels are sheared by more than 1 %."""

SPACING_TOLERANCE = 0.05
"""Relative difference of slice distances that counts as rounding: positions are often given in tenths of a mm."""

GAP = 1.5
"""A distance this many times the usual one means that a slice is missing."""

SAME_POSITION_MM = 0.01
"""Slices nearer than this lie at the same position; no CT is reconstructed in such steps."""

SAME_ORIENTATION = 1e-3
"""Difference of direction cosines that counts as rounding (0.06 degrees)."""

_DIRECTORY_FILE = "DICOMDIR"
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])

_SERIES_TAGS = [
    "SOPClassUID",
    "PatientID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "Modality",
    "ImageType",
    "SeriesDescription",
]
_GEOMETRY_TAGS = ["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "Rows", "Columns"]
_SLICE_TAGS = [
    *_SERIES_TAGS,
    *_GEOMETRY_TAGS,
    *(
        "SOPInstanceUID",
        "InstanceNumber",
        "BitsAllocated",
        "BitsStored",
        "HighBit",
        "PixelRepresentation",
        "SamplesPerPixel",
    ),
    *("PhotometricInterpretation", "NumberOfFrames", "RescaleSlope", "RescaleIntercept", "RescaleType"),
    *("PixelPaddingValue", "PixelPaddingRangeLimit", "PixelData"),
    *("KVP", "SliceThickness", "ConvolutionKernel", "Manufacturer", "ManufacturerModelName", "ContrastBolusAgent"),
]


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
        description: SeriesDescription.
        files: paths.
    """

    patient_id: str
    study_uid: str
    series_uid: str
    modality: str
    description: str
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
    series: dict[tuple[str, str, str], list[tuple[Path, Dataset]]] = {}
    rejected: list[Rejected] = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _DIRECTORY_FILE):
        try:
            header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=_SERIES_TAGS)
        except InvalidDicomError:
            rejected.append(Rejected(path, "not a DICOM file"))
            continue
        except (OSError, ValueError, KeyError, EOFError) as error:
            rejected.append(Rejected(path, f"damaged DICOM header ({type(error).__name__})"))
            continue
        if reason := _no_ct_slice(header):
            rejected.append(Rejected(path, reason))
            continue
        uid = _text(header, "SeriesInstanceUID") or path.parent.name
        series.setdefault((_text(header, "PatientID"), _text(header, "StudyInstanceUID"), uid), []).append(
            (path, header)
        )
    found = [
        SeriesFiles(*key, "CT", _text(members[0][1], "SeriesDescription"), tuple(path for path, _ in members))
        for key, members in sorted(series.items())
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
    headers = _sorted_by_position(_read_files(_files_of(series)))
    _check_alike([header for _, header in headers])
    positions = np.array([header.ImagePositionPatient for _, header in headers], dtype=np.float64)
    normal = _normal(headers[0][1])
    facts = _facts(headers[0][1])
    volume = np.empty((len(headers), int(headers[0][1].Rows), int(headers[0][1].Columns)), dtype=np.int16)
    for (path, header), out in zip(headers, volume, strict=True):
        try:
            read_hu(header, out)
        except DicomError as error:
            raise DicomError(f"{path.name}: {error}.") from error
        del header.PixelData  # decoded; keeps the peak at one copy of the series
    kept = _without_repeats(volume, positions @ normal)
    if len(kept) < len(headers):
        facts["repeated_slices_dropped"] = float(len(headers) - len(kept))
        volume, positions, headers = volume[kept], positions[kept], [headers[i] for i in kept]
    _check_spacing(positions, normal)
    return CTVolume(
        array=volume.transpose(2, 1, 0),
        affine=_affine(headers[0][1], positions),
        facts=facts,
        instances=tuple(
            (_instance_uid(header), int(header.get("InstanceNumber") or 0), path) for path, header in headers
        ),
    )


class VolumeReader(ImageReader):
    """MONAI reader for CT volumes and label maps: a DICOM series (folder or list of files), ``.nii`` and ``.nii.gz``.

    Uncompressed NIfTI files are memory-mapped and handed on as a view: nothing is read before it is used, so that a
    transform that takes 96 of 400 slices reads just these. Integer types stay; a scaled file becomes int16 where all
    its values are whole numbers that fit, else float32. Use it with ``dtype: null``, or ``LoadImaged`` makes a copy.

    Raises:
        FileNotFoundError: when there is no such file.
        DicomError: see :func:`read_series`.
        ValueError: for another kind of file, or a NIfTI file that is damaged or has not three axes.
    """

    def verify_suffix(self, filename: Sequence[PathLike] | PathLike) -> bool:
        """Say yes to everything: a file of another kind is answered with an error that tells what is expected."""
        return True

    def read(self, data: Sequence[PathLike] | PathLike, **kwargs: Any) -> Any:
        """Open a file, or read a DICOM series."""
        paths = [Path(path) for path in ensure_tuple(data)]
        if missing := [path for path in paths if not path.exists()]:
            raise FileNotFoundError(f"{missing[0]} does not exist.")
        if len(paths) > 1:
            return read_series(paths)
        if paths[0].is_dir():
            return read_series(paths[0])
        if paths[0].name.lower().endswith((".nii", ".nii.gz")):
            return nib.load(paths[0])
        if pydicom.misc.is_dicom(paths[0]):
            raise DicomError(f"{paths[0]} is one DICOM file; give the folder of its series.")
        raise ValueError(f"{paths[0]} is neither a NIfTI file (.nii, .nii.gz) nor a folder of DICOM files.")

    def get_data(self, img: Any) -> tuple[Any, dict[Any, Any]]:
        """Return the volume (X, Y, Z) and its meta data."""
        if isinstance(img, CTVolume):
            tensor, affine = torch.from_numpy(img.array), img.affine
        else:
            tensor, affine = _nifti_tensor(img), np.asarray(img.affine, dtype=np.float64)
        meta = {
            MetaKeys.AFFINE: affine,
            MetaKeys.ORIGINAL_AFFINE: affine.copy(),
            MetaKeys.SPACE: SpaceKeys.RAS,
            MetaKeys.SPATIAL_SHAPE: np.asarray(tensor.shape),
            MetaKeys.ORIGINAL_CHANNEL_DIM: "no_channel",
        }
        return tensor, meta


# --- files ------------------------------------------------------------------------------------------------------------


def _files_of(series: SeriesFiles | str | Path | Sequence[str | Path]) -> list[Path]:
    if isinstance(series, SeriesFiles):
        return list(series.files)
    if not isinstance(series, (str, Path)):
        return [Path(path) for path in series]
    found, rejected = discover_series(series)
    if len(found) == 1:
        return list(found[0].files)
    if found:
        raise DicomError(f"{len(found)} series in {Path(series).name}; expected one. Give the folder of one series.")
    reasons = ", ".join(sorted({item.reason for item in rejected})) or "it is empty"
    raise DicomError(f"no CT series in {Path(series).name}: {reasons}.")


def _read_files(paths: Sequence[Path]) -> Iterator[tuple[Path, Dataset]]:
    """Read the files of a series with their pixels, still encoded."""
    for path in paths:
        try:
            header = pydicom.dcmread(path, specific_tags=_SLICE_TAGS)
        except (InvalidDicomError, OSError, ValueError, KeyError, EOFError) as error:
            raise DicomError(f"{path.name}: not a readable DICOM file ({type(error).__name__}).") from error
        if reason := _no_ct_slice(header):
            raise DicomError(f"{path.name}: {reason}.")
        if missing := [tag for tag in _GEOMETRY_TAGS if not header.get(tag)]:
            raise DicomError(f"{path.name}: no {', '.join(missing)}; the slice's place in space is unknown.")
        yield path, header


def _no_ct_slice(header: Dataset) -> str | None:
    """Say why this is not one slice of a CT volume; None when it is one."""
    sop_class = UID(_text(header, "SOPClassUID") or str(header.file_meta.get("MediaStorageSOPClassUID", "")))
    if sop_class == EnhancedCTImageStorage:
        return "enhanced (multi-frame) CT is not supported; export it as one file per slice"
    if sop_class != CTImageStorage and (sop_class or _text(header, "Modality") != "CT"):
        return f"not a CT image ({sop_class.name if sop_class else _text(header, 'Modality') or 'no modality'})"
    if "LOCALIZER" in (header.get("ImageType") or ()):
        return "localizer"
    return None


def _text(header: Dataset, tag: str) -> str:
    return str(header.get(tag) or "").strip()


def _instance_uid(header: Dataset) -> str:
    return _text(header, "SOPInstanceUID") or str(header.file_meta.get("MediaStorageSOPInstanceUID", ""))


def _facts(header: Dataset) -> dict[str, str | float]:
    """What a report may show. A closed list: free text may name a patient."""
    kernel = header.get("ConvolutionKernel") or ""
    facts: dict[str, str | float] = {
        "kernel": kernel if isinstance(kernel, str) else "/".join(kernel),
        "manufacturer": _text(header, "Manufacturer"),
        "model": _text(header, "ManufacturerModelName"),
        "contrast_agent": "yes" if _text(header, "ContrastBolusAgent") else "",
        "transfer_syntax": header.file_meta.TransferSyntaxUID.name,
    }
    for name, tag in (("kVp", "KVP"), ("slice_thickness_mm", "SliceThickness")):
        if _text(header, tag):
            facts[name] = float(header[tag].value)
    return {name: value for name, value in facts.items() if value != ""}


# --- geometry ---------------------------------------------------------------------------------------------------------


def _normal(header: Dataset) -> np.ndarray:
    """Unit normal of a slice (LPS), on the side of the patient's head."""
    cosines = np.array(header.ImageOrientationPatient, dtype=np.float64)
    normal = np.cross(cosines[:3], cosines[3:])
    return normal / np.linalg.norm(normal) * (1.0 if normal[2] >= 0 else -1.0)


def _sorted_by_position(headers: Iterator[tuple[Path, Dataset]]) -> list[tuple[Path, Dataset]]:
    members = list(headers)
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
    cosines = np.array([header.ImageOrientationPatient for header in headers], dtype=np.float64)
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
    if np.abs(distances - usual).max() > SPACING_TOLERANCE * usual + SAME_POSITION_MM:
        raise DicomError(
            f"slice distances from {distances.min():.2f} to {distances.max():.2f} mm mixed; expected equal ones."
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


# --- NIfTI ------------------------------------------------------------------------------------------------------------


def _nifti_tensor(image: Any) -> torch.Tensor:
    if len(image.shape) != 3:
        raise ValueError(f"{image.get_filename()} has shape {image.shape}; expected a volume with three axes.")
    slope, intercept = image.dataobj.slope, image.dataobj.inter
    try:
        if (slope, intercept) == (1, 0):
            return _unscaled(image)
        values = np.asarray(image.dataobj, dtype=np.float32)
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"{image.get_filename()} is damaged or cut off: {' '.join(str(error).split())}") from error
    whole = np.all(np.rint(values) == values) and np.abs(values).max(initial=0) < 2**15
    return torch.from_numpy(values.astype(np.int16) if whole else values)


def _unscaled(image: Any) -> torch.Tensor:
    """Stored values as they are: a view of the file where it is not compressed."""
    dtype = image.get_data_dtype().newbyteorder("=")
    if image.get_filename().endswith(".nii") and image.get_data_dtype().isnative:
        # Copy on write: torch wants writable memory; nothing that is written reaches the file.
        data: np.ndarray = np.memmap(image.get_filename(), dtype, "c", image.dataobj.offset, image.shape, order="F")
    else:
        data = np.asanyarray(image.dataobj.get_unscaled())
    # torch has next to no operations for uint16, and HU need no double precision.
    return torch.from_numpy(data.astype({"uint16": np.int32, "float64": np.float32}.get(dtype.name, dtype), copy=False))
