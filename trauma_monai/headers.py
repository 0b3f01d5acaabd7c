"""Headers of DICOM files, read by pydicom at about half of its usual cost.

Two things take most of pydicom's time on an uncompressed slice: a copy of the pixels, and turning some thirty values
from bytes to Python. Here the pixels stay where the file was read to, and a value that is written as in the first slice
of the series is that of the first slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import pydicom
from pydicom import config
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset
from pydicom.tag import BaseTag, Tag
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

__all__ = ["SliceHeaders", "read_header"]

FIRST_GROUPS = (b"\x02\x00", b"\x08\x00")
"""First bytes of a data set that was written without preamble, with and without its file meta information."""

LARGE_BYTES = 4096
"""Only pixels are longer, of the elements that are asked for."""

UNDEFINED_LENGTH = 0xFFFFFFFF
PIXEL_DATA = Tag("PixelData")


def read_header(
    file: BinaryIO, tags: Sequence[BaseTag], stop_before_pixels: bool = False, defer_size: int | None = None
) -> Dataset:
    """Read some elements of a file, with or without preamble (PS3.10 7.1).

    Raises:
        InvalidDicomError: when it is no DICOM file. Of a damaged one, pydicom raises whatever it meets.
    """
    bare = file.read(2) in FIRST_GROUPS
    file.seek(0)
    header = pydicom.dcmread(file, defer_size, stop_before_pixels, force=bare, specific_tags=list(tags))
    if bare and "TransferSyntaxUID" not in header.file_meta:
        header.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian  # what a file without meta information has
    return header


class SliceHeaders:
    """Reads the slices of one series, one after the other, with their pixels still encoded.

    Args:
        tags: elements to read, pixel data among them.
    """

    def __init__(self, tags: Sequence[BaseTag]) -> None:
        self.tags = tags
        self._values = [tag for tag in tags if tag != PIXEL_DATA]
        self._first: Dataset | None = None
        self._written: dict[BaseTag, RawDataElement] = {}

    def read(self, path: Path) -> Dataset:
        """Read a file. Pixels that are not compressed are a view of its bytes."""
        content = path.read_bytes()
        compressed = self._first is not None and self._first.file_meta.TransferSyntaxUID.is_compressed
        header = read_header(BytesIO(content), self.tags, defer_size=None if compressed else LARGE_BYTES)
        if not compressed and not _view_pixels(header, content):
            header = read_header(BytesIO(content), self.tags)
        self._share_values(header)
        return header

    def _share_values(self, header: Dataset) -> None:
        elements = dict(header.items())  # as written: asking for one by its tag would turn it to Python
        written: dict[BaseTag, RawDataElement] = {}
        for tag in self._values:
            element = elements.get(tag)
            if isinstance(element, RawDataElement):
                written[tag] = element
        if self._first is None:
            self._first, self._written = header, written
            return
        for tag, element in written.items():
            like = self._written.get(tag)
            if like is not None and like.value == element.value and like.VR == element.VR:
                header[tag] = self._first[tag]


def _view_pixels(header: Dataset, content: bytes) -> bool:
    """Let pixels that were passed over point to the file's bytes; say whether they could."""
    if PIXEL_DATA not in header:
        return True
    pixels = dict(header.items())[PIXEL_DATA]  # asking for it by its tag would read it
    if not isinstance(pixels, RawDataElement) or pixels.value is not None:
        return True  # too short to be passed over
    plain = header.file_meta.TransferSyntaxUID in (ImplicitVRLittleEndian, ExplicitVRLittleEndian)
    if not plain or pixels.length == UNDEFINED_LENGTH or header.get("BitsAllocated") != 16:
        return False
    view = memoryview(content)[pixels.value_tell : pixels.value_tell + pixels.length]
    header[PIXEL_DATA] = DataElement(PIXEL_DATA, "OW", view, validation_mode=config.IGNORE)
    return True
