"""Encoded pixels of one slice -> stored values: each transfer syntax has its one decoder, of permissive licence.

pydicom decodes with its plugins for RLE, JPEG 2000 (OpenJPEG) and JPEG-LS (CharLS), and with libjpeg-turbo through
imagecodecs what is called JPEG in DICOM. What a decoder refuses is not handed to the next. GDCM, pydicom's choice for
JPEG lossless, is not used: a damaged stream makes it abort, and all other studies with it.
"""

from __future__ import annotations

import numpy as np
from imagecodecs import jpeg8_decode
from pydicom import encaps
from pydicom.dataset import Dataset
from pydicom.uid import JPEG2000, JPEG2000Lossless, JPEGLSLossless, JPEGLSNearLossless, RLELossless

__all__ = ["decode"]

_JPEG = ("1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70")
"""Extended (12 bits), lossless, and lossless with first-order prediction: pydicom 2 and 3 name them differently."""

_PYDICOM_2 = not hasattr(Dataset, "pixel_array_options")
"""MONAI Label's packages exclude pydicom 3."""

_PLUGINS = {
    RLELossless: "pylibjpeg",
    JPEG2000Lossless: "pylibjpeg",
    JPEG2000: "pylibjpeg",
    JPEGLSLossless: "jpeg_ls" if _PYDICOM_2 else "pyjpegls",
    JPEGLSNearLossless: "jpeg_ls" if _PYDICOM_2 else "pyjpegls",
}
"""pydicom's name of the plugin for a transfer syntax."""


def decode(header: Dataset) -> np.ndarray:
    """Decode the pixels of one slice.

    Args:
        header: data set with its pixel data and file meta information.

    Returns:
        Stored values (rows, columns).

    Raises:
        Exception: of any kind when they cannot be decoded; the plugin for RLE raises even what is none (a panic).
    """
    syntax = header.file_meta.TransferSyntaxUID
    if syntax in _JPEG:
        return jpeg8_decode(_frame(header))
    if syntax in _PLUGINS and _PYDICOM_2:
        header.convert_pixel_data(_PLUGINS[syntax])
    elif syntax in _PLUGINS:
        header.pixel_array_options(decoding_plugin=_PLUGINS[syntax])
    return header.pixel_array


def _frame(header: Dataset) -> bytes:
    """Return the one frame of encapsulated pixel data (PS3.5 A.4)."""
    if _PYDICOM_2:
        return b"".join(encaps.decode_data_sequence(header.PixelData))
    return encaps.get_frame(header.PixelData, 0, number_of_frames=1)
