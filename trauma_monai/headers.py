"""Headers of DICOM files, read by pydicom at about a third of its usual cost.

Three things take most of pydicom's time on an uncompressed slice: the objects around the file meta information, memory
for the pixels of a whole series, and turning some thirty values from bytes to Python. Here the file meta information of
a slice in the transfer syntax of the series' first slice is passed over, pixels that are not compressed stay in the
file until they are asked for, and a value that is written as in the first slice is that of the first slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import pydicom
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset, FileDataset
from pydicom.filereader import read_dataset
from pydicom.tag import BaseTag, Tag
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

__all__ = ["SliceHeaders", "read_header"]

FIRST_GROUPS = (b"\x02\x00", b"\x08\x00")
"""First bytes of a data set that was written without preamble, with and without its file meta information."""

START_OF_META = b"DICM\x02\x00\x00\x00UL\x04\x00"
"""Follows the preamble of 128 bytes; after it comes the length of the rest of the file meta information."""

LARGE_BYTES = 4096
"""Only pixels are longer, of the elements that are asked for."""

DEFERRED = (ImplicitVRLittleEndian, ExplicitVRLittleEndian)
"""Transfer syntaxes in which an element can be read on its own, when it is asked for."""

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
    """Reads the slices of one series, one after the other.

    Args:
        tags: elements to read, pixel data among them.
    """

    def __init__(self, tags: Sequence[BaseTag]) -> None:
        self.tags = list(tags)
        self._first: Dataset | None = None
        self._written: dict[BaseTag, RawDataElement] = {}

    def read(self, path: Path) -> Dataset:
        """Read a file; pydicom reads pixels that are not compressed when they are asked for."""
        with path.open("rb") as file:
            header = self._read_like_first(file)
            if header is None:
                file.seek(0)
                header = read_header(file, self.tags, defer_size=LARGE_BYTES)
                if header.file_meta.TransferSyntaxUID not in DEFERRED:
                    file.seek(0)
                    header = read_header(file, self.tags)
        self._share_values(header)
        return header

    def _read_like_first(self, file: BinaryIO) -> Dataset | None:
        """Read a file's data set with the file meta information of the first slice; None where that may not do."""
        start = file.read(144)
        if self._first is None or start[128:140] != START_OF_META:
            return None
        syntax = self._first.file_meta.TransferSyntaxUID
        length = int.from_bytes(start[140:], "little")
        unlike = syntax.is_private or syntax in (DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian)
        if unlike or length > LARGE_BYTES or _as_element(syntax) not in file.read(length):
            return None
        implicit, defer_size = syntax == ImplicitVRLittleEndian, LARGE_BYTES if syntax in DEFERRED else None
        header = read_dataset(file, implicit, True, defer_size=defer_size, specific_tags=list(self.tags))
        if "SOPInstanceUID" not in header or "SOPClassUID" not in header:
            return None  # then those of the file meta information count, which are the slice's own
        return FileDataset(file, header, file_meta=self._first.file_meta, is_implicit_VR=implicit)

    def _share_values(self, header: Dataset) -> None:
        # As written: asking for an element by its tag would turn it to Python. A value that is deferred is None.
        written = {
            tag: element
            for tag, element in header.items()
            if isinstance(element, RawDataElement) and element.value is not None and tag != PIXEL_DATA
        }
        if self._first is None:
            self._first, self._written = header, written
            return
        for tag, element in written.items():
            like = self._written.get(tag)
            if like is not None and like.value == element.value and like.VR == element.VR:
                header[tag] = self._first[tag]


def _as_element(syntax: UID) -> bytes:
    """Return a transfer syntax as (0002,0010) is written, padded to an even length."""
    value = syntax.encode() + b"\0" * (len(syntax) % 2)
    return b"\x02\x00\x10\x00UI" + len(value).to_bytes(2, "little") + value
