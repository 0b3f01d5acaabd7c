"""A volume for MONAI's transforms: from a DICOM series or a NIfTI file, CT or label map."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom.misc
import torch
from monai.config import PathLike
from monai.data import ImageReader
from monai.utils import MetaKeys, SpaceKeys, ensure_tuple

from trauma_monai.dicom import DicomError, read_series

__all__ = ["NIFTI", "VolumeReader"]

NIFTI = (".nii", ".nii.gz")
"""Endings of NIfTI files."""


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
        """Hand on the paths: what is raised here, LoadImage takes for a hint to try another reader."""
        return [Path(path) for path in ensure_tuple(data)]

    def get_data(self, img: Any) -> tuple[Any, dict[Any, Any]]:
        """Return the volume (X, Y, Z) and its meta data."""
        tensor, affine = _open(img)
        meta = {
            MetaKeys.AFFINE: affine,
            MetaKeys.ORIGINAL_AFFINE: affine.copy(),
            MetaKeys.SPACE: SpaceKeys.RAS,
            MetaKeys.SPATIAL_SHAPE: np.asarray(tensor.shape),
            MetaKeys.ORIGINAL_CHANNEL_DIM: "no_channel",
        }
        return tensor, meta


def _open(paths: Sequence[Path]) -> tuple[torch.Tensor, np.ndarray]:
    """Read the volume (X, Y, Z) and its affine from a NIfTI file or a DICOM series."""
    if missing := [path for path in paths if not path.exists()]:
        raise FileNotFoundError(f"{missing[0]} does not exist.")
    path = paths[0]
    if len(paths) > 1 or path.is_dir():
        volume = read_series(paths if len(paths) > 1 else path)
        return torch.from_numpy(volume.array), volume.affine
    if path.name.lower().endswith(NIFTI):
        image: Any = nib.load(path)
        return _nifti_tensor(image), np.asarray(image.affine, dtype=np.float64)
    if pydicom.misc.is_dicom(path):
        raise DicomError(f"{path} is one DICOM file; give the folder of its series.")
    raise ValueError(f"{path} is neither a NIfTI file (.nii, .nii.gz) nor a folder of DICOM files.")


def _nifti_tensor(image: Any) -> torch.Tensor:
    if len(image.shape) < 3 or any(length != 1 for length in image.shape[3:]):
        raise ValueError(f"{image.get_filename()} has shape {image.shape}; expected a volume with three axes.")
    if not (image.header["sform_code"] or image.header["qform_code"]):
        raise ValueError(
            f"{image.get_filename()} does not say how it lies in the patient (sform and qform codes are 0): left and "
            "right cannot be told. Convert it from DICOM again."
        )
    slope, intercept = image.dataobj.slope, image.dataobj.inter
    try:
        if (slope, intercept) == (1, 0):
            return _unscaled(image).reshape(image.shape[:3])
        values = np.asarray(image.dataobj, dtype=np.float32).reshape(image.shape[:3])
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
