"""Stored pixels of one CT slice -> Hounsfield units, as the DICOM standard says and with no silent repair.

Uncompressed pixels are taken as they are; the others are decoded by :mod:`trauma_monai.decoders`.
"""

from __future__ import annotations

import math

import numpy as np
from pydicom.dataset import Dataset
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from trauma_monai.decoders import decode

__all__ = ["AIR_HU", "DicomError", "read_hu"]

AIR_HU = -1024
"""What padding becomes: the lowest value of a 12-bit CT, as outside of the reconstructed circle."""

HU_RANGE = (-10240, 30710)
"""No CT has values beyond these, the ends of the extended 16-bit CT scale. A damaged JPEG stream has."""

TISSUE_HU = (-1024, 3071)
"""The 12-bit CT scale. A padding value that means something within it could be tissue, and is left alone."""

PLAUSIBLE_HU = (-2048, 4095)
"""Beyond these a slice holds metal on an extended scale, and the fill outside the round field of view."""

FILL_NOISE_HU = 16
"""How far lossy compression moves the fill outside the field of view."""

MAX_IMPLAUSIBLE = 0.05
"""Share of other such pixels above which a slice is damaged: two hip prostheses cover about 2 %."""

BACKGROUND_HU = -200
"""The border of a CT slice shows air or the table: its median lies below this in a picture that is not inverted."""

_RAW = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian)
_END_OF_IMAGE = b"\xff\xd9"
"""Marker that ends a JPEG, JPEG-LS and JPEG 2000 stream."""


class DicomError(ValueError):
    """A DICOM file or series that cannot be read as a CT volume; the text says why, without a patient's name."""


def read_hu(header: Dataset, out: np.ndarray) -> bool:
    """Decode one slice and write its HU.

    Args:
        header: data set with its pixel data.
        out: int16 array (rows, columns) to fill.

    Returns:
        Whether the values were stored inverted, see :func:`_as_monochrome2`.

    Raises:
        DicomError: when the pixels cannot be decoded, are not those of one grey-scale CT slice, or give values that no
            CT has.
    """
    stored = _signed_or_not(_decode(header), header)
    if stored.shape != out.shape:
        raise DicomError(f"pixels of shape {stored.shape} where Rows and Columns say {out.shape}")
    slope, intercept = _rescale(header)
    inverted = False
    if header.get("PhotometricInterpretation") == "MONOCHROME1":
        stored, inverted = _as_monochrome2(stored, header, slope, intercept)
    padding = _padding(stored, header, slope, intercept)
    if padding is not None:
        if padding.all():
            out.fill(AIR_HU)
            return inverted
        # The first value that is none takes the place of padding: much faster than to select the others.
        stored = np.where(padding, stored.flat[padding.argmin()], stored)
    lowest, highest = sorted(float(value) * slope + intercept for value in (stored.min(), stored.max()))
    _check_range(lowest, highest)
    if slope == 1 and intercept.is_integer():
        # 16-bit addition wraps around, so that it is exact for unsigned values too: the result is known to fit.
        np.add(stored.view(np.int16), np.int16(int(intercept)), out=out)
    else:
        out[:] = np.rint(stored * slope + intercept).clip(*HU_RANGE).astype(np.int16)
    if padding is not None:
        np.copyto(out, AIR_HU, where=padding)
    if lowest < PLAUSIBLE_HU[0] or highest > PLAUSIBLE_HU[1]:
        _check_plausible(out)
    return inverted


def _decode(header: Dataset) -> np.ndarray:
    """Return the stored values of the slice as 16-bit integers, (rows, columns)."""
    if header.get("SamplesPerPixel", 1) != 1 or int(header.get("NumberOfFrames") or 1) != 1:
        raise DicomError("colour or multi-frame pixels; expected one grey-scale slice per file")
    if "PixelData" not in header:
        raise DicomError("no pixel data")
    syntax = header.file_meta.TransferSyntaxUID
    if syntax in _RAW and header.BitsAllocated == 16:
        return _raw(header)
    if syntax.is_private or not syntax.is_transfer_syntax:
        raise DicomError(f"transfer syntax {syntax}; expected one of the DICOM standard, in which others can read it")
    if syntax.is_compressed and syntax not in _RAW:
        _check_complete(header)
    try:
        pixels = decode(header)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        # pydicom's plugins raise whatever they like, the one for RLE even what is no Exception (a panic of its Rust
        # code). For a reader all of it means the same.
        reason = " ".join(str(error).split())[:200]
        raise DicomError(f"pixels ({syntax.name}) cannot be decoded: {reason or type(error).__name__}") from error
    wanted = np.int16 if header.PixelRepresentation == 1 else np.uint16
    return np.ascontiguousarray(pixels).astype(wanted, copy=False)


def _raw(header: Dataset) -> np.ndarray:
    """Uncompressed little-endian pixels: the bytes are the values (PS3.5 8.1)."""
    rows, columns, data = int(header.Rows), int(header.Columns), header.PixelData
    if len(data) < rows * columns * 2:
        raise DicomError(f"truncated: {len(data)} bytes of pixels where {rows} x {columns} x 2 were expected")
    dtype = "<i2" if header.PixelRepresentation == 1 else "<u2"
    return np.frombuffer(data, dtype, count=rows * columns).reshape(rows, columns)


def _check_complete(header: Dataset) -> None:
    """Refuse a cut-off JPEG stream: decoders fill in what is missing without a word."""
    if "JPEG" in header.file_meta.TransferSyntaxUID.name and _END_OF_IMAGE not in header.PixelData[-24:]:
        raise DicomError("truncated: the compressed pixels have no end marker")


def _signed_or_not(pixels: np.ndarray, header: Dataset) -> np.ndarray:
    """Keep the stored bits only, with their sign.

    PS3.5 8.1.1: bits above BitsStored do not belong to the value; some writers leave them 0 in negative numbers.
    """
    unused = 16 - int(header.BitsStored)
    if unused < 0:
        raise DicomError(f"BitsStored {header.BitsStored}; expected at most 16, as CT has")
    if int(header.get("HighBit", header.BitsStored - 1)) != header.BitsStored - 1:
        raise DicomError(f"HighBit {header.HighBit} with BitsStored {header.BitsStored}; expected BitsStored - 1")
    if unused == 0:
        return pixels
    if header.PixelRepresentation == 1:
        return (pixels.view(np.int16) << unused) >> unused
    return pixels & np.uint16((1 << int(header.BitsStored)) - 1)


def _rescale(header: Dataset) -> tuple[float, float]:
    """RescaleSlope and RescaleIntercept, which a CT image must have (PS3.3 C.8.2.1)."""
    slope, intercept = header.get("RescaleSlope"), header.get("RescaleIntercept")
    if slope in (None, "", 0) or intercept in (None, ""):
        raise DicomError("no RescaleSlope or RescaleIntercept; without them stored values are not HU")
    if header.get("RescaleType", "HU") not in ("HU", "", None):
        raise DicomError(f"RescaleType {header.RescaleType}; expected HU")
    if not (math.isfinite(slope) and math.isfinite(intercept)):
        raise DicomError(f"RescaleSlope {slope} and RescaleIntercept {intercept}; expected finite numbers")
    return float(slope), float(intercept)


def _padding(stored: np.ndarray, header: Dataset, slope: float, intercept: float) -> np.ndarray | None:
    """Where the slice holds no data: PixelPaddingValue, up to PixelPaddingRangeLimit (PS3.3 C.7.5.1.1.2)."""
    ends = [header.get(name) for name in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    values = sorted(_like_pixels(int(end), header) for end in ends if end not in (None, ""))
    if not values or any(TISSUE_HU[0] < value * slope + intercept <= TISSUE_HU[1] for value in values):
        return None
    padding = stored == values[0] if len(values) == 1 else (stored >= values[0]) & (stored <= values[1])
    return padding if padding.any() else None


def _like_pixels(value: int, header: Dataset) -> int:
    """A 16-bit value that may have been read with the wrong sign (its VR is US or SS)."""
    return (value + 2**15) % 2**16 - 2**15 if header.PixelRepresentation == 1 else value % 2**16


def _as_monochrome2(stored: np.ndarray, header: Dataset, slope: float, intercept: float) -> tuple[np.ndarray, bool]:
    """Stored values whose rescaled ones are HU, where the lowest is displayed white; and whether they were inverted.

    By the standard the photometric interpretation only tells how to display (PS3.3 C.7.6.3.1.2), and rescaled values
    are HU either way. But some exports inverted the stored values and left the rescaling as it was. The border of a CT
    slice is air, which tells the two apart; where neither fits, the slice is refused.
    """
    low = -(2 ** (header.BitsStored - 1)) if header.PixelRepresentation == 1 else 0
    inverted = (2 * low + 2**header.BitsStored - 1 - stored.astype(np.int32)).astype(stored.dtype)
    for candidate, was_inverted in ((stored, False), (inverted, True)):
        border = np.concatenate([candidate[0], candidate[-1], candidate[:, 0], candidate[:, -1]])
        if float(np.median(border)) * slope + intercept < BACKGROUND_HU:
            return candidate, was_inverted
    raise DicomError("MONOCHROME1, and neither its values nor their inverse show air at the border of the slice")


def _check_range(lowest: float, highest: float) -> None:
    if lowest < HU_RANGE[0] or highest > HU_RANGE[1]:
        raise DicomError(
            f"values from {lowest:g} to {highest:g} HU, beyond the {HU_RANGE[0]} to {HU_RANGE[1]} of any CT: "
            "the pixel data are damaged, or the rescaling is wrong"
        )


def _check_plausible(hu: np.ndarray) -> None:
    """Refuse noise: what decoders make of a damaged JPEG stream, without an error."""
    # The lowest value is the fill outside the field of view.
    above_fill = hu > int(hu.min()) + FILL_NOISE_HU
    implausible = float(np.mean(((hu < PLAUSIBLE_HU[0]) & above_fill) | (hu > PLAUSIBLE_HU[1])))
    if implausible > MAX_IMPLAUSIBLE:
        raise DicomError(
            f"{implausible:.0%} of the values lie outside {PLAUSIBLE_HU[0]} to {PLAUSIBLE_HU[1]} HU: damaged pixel data"
        )
