"""A decoder that crashes takes its own process along, and nothing else."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.uid import JPEG2000Lossless

from conftest import SHARED_DATA
from test_dicom import write_series
from trauma_monai import gdcm_process
from trauma_monai.dicom import DicomError, read_series
from trauma_monai.gdcm_process import decode


@pytest.fixture
def header(tmp_path: Path) -> pydicom.Dataset:
    """GDCM decodes JPEG 2000 as well, which can be written here."""
    hu = np.random.default_rng(0).integers(-1000, 1000, size=(1, 64, 64))
    return pydicom.dcmread(write_series(tmp_path, hu, syntax=JPEG2000Lossless)[0])


def test_pixels_are_those_of_pydicom(header: pydicom.Dataset) -> None:
    assert np.array_equal(decode(header), header.pixel_array)


def test_pixels_that_gdcm_refuses_are_an_error_and_the_next_ones_are_decoded(header: pydicom.Dataset) -> None:
    whole, header.PixelData = header.PixelData, pydicom.encaps.encapsulate([b"nothing of that kind"])
    with pytest.raises(RuntimeError):
        decode(header)
    header.PixelData = whole
    assert np.array_equal(decode(header), header.pixel_array)


def test_a_crash_is_an_error_and_the_next_slice_gets_a_new_process(header: pydicom.Dataset) -> None:
    decode(header)
    assert gdcm_process._process is not None
    os.kill(gdcm_process._process[1].pid, signal.SIGSEGV)
    gdcm_process._process[1].wait()
    with pytest.raises(RuntimeError, match="crashed"):
        decode(header)
    assert np.array_equal(decode(header), header.pixel_array)


@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_fork_has_a_process_of_its_own(header: pydicom.Dataset) -> None:
    """Workers of a data loader are forks, and would mix up their answers."""
    decode(header)
    with multiprocessing.get_context("fork").Pool(2) as workers:
        for pixels in workers.map(decode, [header] * 8):
            assert np.array_equal(pixels, header.pixel_array)


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="needs the real CT files")
@pytest.mark.parametrize("syntax", ["57", "70"])
def test_a_damaged_jpeg_stream_on_which_gdcm_aborts_is_refused(tmp_path: Path, syntax: str) -> None:
    [source] = (SHARED_DATA / "cornerstone").glob(f"*.1.2.4.{syntax}.dcm")
    content = bytearray(source.read_bytes())
    content[content.find(b"\xff\xd8\xff") + 11] = 76
    for number in range(3):
        (tmp_path / f"{number}.dcm").write_bytes(content)
    with pytest.raises(DicomError, match=r"cannot be decoded: the decoder \(GDCM\) crashed over it"):
        read_series(tmp_path)
