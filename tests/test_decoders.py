"""JPEG streams that pydicom's plugins do not decode; the others are tested where series are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from imagecodecs import jpeg8_encode
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGExtended12Bit, JPEGLossless, JPEGLosslessSV1

from test_dicom import write_series
from trauma_monai.decoders import decode
from trauma_monai.dicom import DicomError, read_series

HU = np.random.default_rng(0).integers(-1000, 1000, size=(3, 64, 48))


def write_jpeg_series(
    folder: Path, syntax: str = JPEGLosslessSV1, fragments: int = 1, damage: Callable[[bytearray], object] | None = None
) -> list[Path]:
    """Write a series of signed 16-bit values as JPEG lossless, each slice in some fragments."""
    paths = write_series(folder, HU)
    for path in paths:
        header = pydicom.dcmread(path)
        stream = bytearray(jpeg8_encode(header.pixel_array.view(np.uint16), lossless=True))
        if damage:
            damage(stream)
        header.PixelData = encapsulate([bytes(stream)], fragments_per_frame=fragments)
        header["PixelData"].is_undefined_length = True
        header.file_meta.TransferSyntaxUID = syntax
        header.save_as(path)
    return paths


@pytest.mark.parametrize("syntax", [JPEGLossless, JPEGLosslessSV1])
@pytest.mark.parametrize("fragments", [1, 3])
def test_lossless_jpeg_is_exact(tmp_path: Path, syntax: str, fragments: int) -> None:
    write_jpeg_series(tmp_path, syntax, fragments)
    np.testing.assert_array_equal(read_series(tmp_path).array.transpose(2, 1, 0), HU)


def test_lossy_jpeg_of_12_bits_is_decoded(tmp_path: Path) -> None:
    header = pydicom.dcmread(write_series(tmp_path, HU)[0])
    ramp = np.tile(np.arange(0, 4096, 64, dtype=np.uint16), (64, 1))
    header.PixelData = encapsulate([jpeg8_encode(ramp, level=100, bitspersample=12)])
    header.file_meta.TransferSyntaxUID = JPEGExtended12Bit
    assert np.abs(decode(header).astype(int) - ramp).max() <= 2


def _another_size(stream: bytearray) -> None:
    frame = stream.find(b"\xff\xc3")  # start of frame: marker, length, precision, height, width
    stream[frame + 5 : frame + 7] = (7).to_bytes(2, "big")


def _another_precision(stream: bytearray) -> None:
    stream[stream.find(b"\xff\xc3") + 4] = 76  # over this one GDCM aborted, and took the process along


def _no_end(stream: bytearray) -> None:
    del stream[-40:]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_another_size, "pixels of shape (7, 48) where Rows and Columns say (64, 48)"),
        (_another_precision, "cannot be decoded: Unsupported JPEG data precision 76"),
        (_no_end, "truncated: the compressed pixels have no end marker"),
    ],
)
def test_a_damaged_stream_is_refused(tmp_path: Path, damage: Callable[[bytearray], object], reason: str) -> None:
    write_jpeg_series(tmp_path, damage=damage)
    with pytest.raises(DicomError) as caught:
        read_series(tmp_path)
    assert reason in str(caught.value)
