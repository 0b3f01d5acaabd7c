"""The prepared data set on disk: how volumes and organ masks are named, written and recognised as complete.

Volumes are uncompressed NIfTI with the array axes to patient left, to posterior and to the head: the pixels of one
axial slice lie together, so that a memory-mapped file gives 96 of 400 slices without reading the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from trauma_monai.files import PART, complete_or_absent

__all__ = [
    "add_model_mask",
    "image_bytes",
    "image_path",
    "make_folders",
    "mask_bytes",
    "mask_path",
    "model_mask_maker",
    "name_of",
    "record_path",
    "size_of",
    "write_volume",
]

HEADER_BYTES = 352
"""Header of a NIfTI-1 file without extensions; the voxels follow."""

DESCRIPTION_BYTES = 80
"""Length of the text that a NIfTI-1 header holds (``descrip``)."""

SCANNER_SPACE = 1
"""NIfTI sform and qform code of coordinates given by the scanner."""


def image_path(out: Path, name: str) -> Path:
    """Return the file of a series' volume, int16 HU."""
    return out / "images" / f"{name}.nii"


def mask_path(out: Path, name: str) -> Path:
    """Return the file of a series' organ mask, uint8 codes on the volume's grid."""
    return out / "organs" / f"{name}.nii"


def record_path(out: Path, name: str) -> Path:
    """Return the file that says what was read for a series."""
    return out / "records" / f"{name}.json"


def name_of(item: Mapping[str, Any]) -> str:
    """Return the name of the series of an item of the datalist."""
    return Path(item["image"]).stem


def image_bytes(shape: Sequence[int]) -> int:
    """Return the size of the file of a whole volume."""
    return HEADER_BYTES + 2 * int(np.prod(shape))


def mask_bytes(shape: Sequence[int]) -> int:
    """Return the size of the file of a whole mask."""
    return HEADER_BYTES + int(np.prod(shape))


def size_of(path: Path) -> int | None:
    """Return the size of a file; None when it is not there."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def make_folders(out: Path) -> None:
    """Make the folders of a data set, and remove what a run that was killed left half written."""
    for path in (image_path(out, "_"), mask_path(out, "_"), record_path(out, "_")):
        path.parent.mkdir(parents=True, exist_ok=True)
        for leftover in path.parent.glob(f"*{PART}"):
            leftover.unlink()


def write_volume(path: Path, array: np.ndarray, affine: np.ndarray, description: str = "") -> None:
    """Write a volume or mask as NIfTI, whole or not at all.

    Args:
        path: file to write or replace.
        array: voxels (X, Y, Z).
        affine: RAS+ affine in mm, 4x4.
        description: kept in the header, cut off after 79 characters.
    """
    # The order of the file: nibabel writes an array of the other order 10 times slower.
    image = nibabel.Nifti1Image(np.asfortranarray(array), affine)
    image.set_sform(affine, SCANNER_SPACE)
    image.set_qform(affine, SCANNER_SPACE)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = description.encode()[: DESCRIPTION_BYTES - 1]
    with complete_or_absent(path, "wb") as file:
        image.to_stream(file)


def model_mask_maker(item: Mapping[str, Any], out: Path) -> str | None:
    """Say which weights made the whole mask of an item; None when there is none."""
    path, image = mask_path(out, name_of(item)), size_of(out / item["image"])
    size = size_of(path)
    if size is None or image is None or 2 * (size - HEADER_BYTES) != image - HEADER_BYTES:
        return None
    return bytes(nibabel.Nifti1Image.from_filename(path).header["descrip"]).rstrip(b"\0").decode(errors="replace")


def add_model_mask(item: dict[str, Any], out: Path) -> None:
    """Add to an item the mask that a network made, if there is one."""
    if model_mask_maker(item, out) is not None:
        item |= {"organs": mask_path(out, name_of(item)).relative_to(out).as_posix(), "organs_from": "model"}
