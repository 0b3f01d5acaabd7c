"""Organ masks of a data set: files of any orientation -> label maps on the grid of their image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation, ornt_transform

from trauma_monai.targets import ORGAN_CODES

__all__ = ["check_codes", "check_same_grid", "mask_on_grid"]

MAX_MASK_SHIFT_VOXELS = 0.5
"""How far a corner of a mask may lie from the image's, along any axis. Below half a voxel, nearest-neighbour resampling
would return the mask unchanged; above, mask and image are of different volumes or one of them lies."""


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
    turn = check_same_grid(image.shape, image.affine, shape, affine)
    codes = apply_orientation(np.asanyarray(image.dataobj), turn)
    check_codes(codes)
    return codes.astype(np.uint8, copy=False)


def check_same_grid(
    mask_shape: Sequence[int], mask_affine: np.ndarray, shape: Sequence[int], affine: np.ndarray
) -> np.ndarray:
    """Check that a mask has the voxels of its image, whatever the order and direction of its axes.

    Args:
        mask_shape: shape of the mask.
        mask_affine: its RAS+ affine, 4x4, in mm.
        shape: shape (X, Y, Z) of the image.
        affine: its RAS+ affine.

    Returns:
        How the mask's axes have to be exchanged and reversed to point as the image's do (nibabel's orientation).

    Raises:
        ValueError: when it has other voxels.
    """
    turn = ornt_transform(io_orientation(mask_affine), io_orientation(affine))
    turned_shape = tuple(int(mask_shape[axis]) for axis in np.argsort(turn[:, 0]))
    if (*turned_shape, *mask_shape[3:]) != tuple(shape):
        raise ValueError(f"shape {turned_shape} differs from that of the image, {tuple(shape)} (axes as in the image)")
    shift = _corner_shift_voxels(mask_affine @ inv_ornt_aff(turn, tuple(mask_shape[:3])), affine, shape)
    if not shift <= MAX_MASK_SHIFT_VOXELS:
        raise ValueError(
            f"it lies up to {shift:.2f} voxels from the image, expected at most {MAX_MASK_SHIFT_VOXELS}: "
            "their affines are of different grids"
        )
    return turn


def check_codes(codes: np.ndarray) -> None:
    """Check that a mask holds organ codes only.

    Raises:
        ValueError: when it holds other values.
    """
    low, high = codes.min(), codes.max()
    if low < 0 or high > max(ORGAN_CODES.values()) or (codes.dtype.kind == "f" and (codes != np.rint(codes)).any()):
        raise ValueError(f"values {low:g} to {high:g}, expected organ codes 0 to {max(ORGAN_CODES.values())}")


def _corner_shift_voxels(affine: np.ndarray, reference: np.ndarray, shape: Sequence[int]) -> float:
    """Largest distance along any axis, in voxels of the reference, of the corner voxels of two grids."""
    corners = np.array([[i, j, k, 1] for i in (0, shape[0] - 1) for j in (0, shape[1] - 1) for k in (0, shape[2] - 1)])
    in_reference = np.linalg.inv(reference) @ affine @ corners.T
    return float(np.abs(in_reference.T - corners).max())
