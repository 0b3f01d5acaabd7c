"""Headers that are read faster are the same headers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.tag import Tag
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless

from test_dicom import edit, write_series
from trauma_monai.headers import PIXEL_DATA, SliceHeaders

TAGS = [
    *(Tag(name) for name in ("SOPClassUID", "SOPInstanceUID", "PatientID", "InstanceNumber", "ImagePositionPatient")),
    *(Tag(name) for name in ("PixelSpacing", "KVP", "BitsAllocated", "Rows")),
]


def in_syntax(path: Path, syntax: str) -> None:
    header = pydicom.dcmread(path)
    header.file_meta.TransferSyntaxUID = syntax
    header.save_as(path, implicit_vr=syntax == ImplicitVRLittleEndian, little_endian=True)


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Slices whose pixels are long enough to be passed over."""
    return write_series(tmp_path, np.random.default_rng(0).integers(-1000, 1000, size=(4, 64, 64)))


@pytest.mark.parametrize(
    "syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian, RLELossless]
)
def test_every_slice_has_the_values_and_pixels_of_its_own_file(paths: list[Path], syntax: str) -> None:
    edit(paths[2], KVP=80, PixelSpacing=[0.5, 0.5], PatientID="4712")
    for path in paths:
        if syntax == RLELossless:
            header = pydicom.dcmread(path)
            header.compress(RLELossless)
            header.save_as(path)
        else:
            in_syntax(path, syntax)
    headers = SliceHeaders([*TAGS, PIXEL_DATA])
    for path in paths:
        found, expected = headers.read(path), pydicom.dcmread(path)
        assert [found.get(tag) for tag in TAGS] == [expected.get(tag) for tag in TAGS]
        assert bytes(found.PixelData) == expected.PixelData


def test_pixels_stay_in_the_file_and_equal_values_are_not_converted_again(paths: list[Path]) -> None:
    headers = SliceHeaders([*TAGS, PIXEL_DATA])
    first, second = headers.read(paths[0]), headers.read(paths[1])
    assert [dict(header.items())[PIXEL_DATA].value for header in (first, second)] == [None, None]
    assert second["PixelSpacing"] is first["PixelSpacing"]
    assert second["InstanceNumber"].value != first["InstanceNumber"].value


def test_identifiers_that_only_the_file_meta_information_holds_are_those_of_the_slice(paths: list[Path]) -> None:
    for path in paths[1:]:
        header = pydicom.dcmread(path)
        del header.SOPInstanceUID
        header.save_as(path)
    headers = SliceHeaders([*TAGS, PIXEL_DATA])
    for path in paths:
        meta = pydicom.dcmread(path).file_meta
        assert headers.read(path).file_meta.MediaStorageSOPInstanceUID == meta.MediaStorageSOPInstanceUID


def test_slices_of_different_syntaxes_are_read_each_in_its_own(paths: list[Path]) -> None:
    for path in paths[1:3]:
        header = pydicom.dcmread(path)
        header.compress(RLELossless)
        header.save_as(path)
    for order in (paths, paths[::-1], paths[1:]):
        headers = SliceHeaders([*TAGS, PIXEL_DATA])
        for path in order:
            assert bytes(headers.read(path).PixelData) == pydicom.dcmread(path).PixelData
