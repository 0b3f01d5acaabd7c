"""GDCM in a process of its own.

A damaged JPEG stream can make GDCM abort or crash, which no exception handler sees. Here it takes only this process
along: the slice is refused, and the reader, with all other studies, goes on.

The file is also the program that runs in that process; it imports nothing of this package, so that it runs from a
packaged bundle too.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID

__all__ = ["PYDICOM_2", "decode"]

PYDICOM_2 = not hasattr(Dataset, "pixel_array_options")

_ATTRIBUTES = (
    *("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "SamplesPerPixel"),
    *("PhotometricInterpretation", "PixelData"),
)
"""All that decoding needs of a header."""

_START = "import runpy, sys; program, *sys.path = sys.argv[1:]; runpy.run_path(program, run_name='__main__')"
"""Runs this file as a program that finds the packages that this process finds."""

_lock = threading.Lock()
_process: tuple[int, subprocess.Popen[bytes]] | None = None
"""The decoding process, and the process that started it: a fork must not share its pipes."""


def decode(header: Dataset) -> np.ndarray:
    """Decode the pixels of one slice with GDCM.

    Args:
        header: data set with its pixel data.

    Returns:
        Stored values (rows, columns).

    Raises:
        RuntimeError: when GDCM cannot decode them, or crashed over them.
    """
    request = {name: header.get(name) for name in _ATTRIBUTES if name in header}
    with _lock:
        process = _running()
        try:
            pickle.dump((str(header.file_meta.TransferSyntaxUID), request), process.stdin)  # type: ignore[arg-type]
            process.stdin.flush()  # type: ignore[union-attr]
            answer: np.ndarray | str = pickle.load(process.stdout)  # type: ignore[arg-type]
        except (EOFError, OSError) as error:
            _stop()
            raise RuntimeError("the decoder (GDCM) crashed over it") from error
        except BaseException:
            _stop()  # what it still answers belongs to this slice
            raise
    if isinstance(answer, str):
        raise RuntimeError(answer)
    return answer


def _running() -> subprocess.Popen[bytes]:
    global _process
    if _process is None or _process[0] != os.getpid():
        # Its own session: Ctrl-C is for the reader, whose end closes the pipe and so ends this process.
        started = subprocess.Popen(
            [sys.executable, "-c", _START, __file__, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        _process = os.getpid(), started
    return _process[1]


def _stop() -> None:
    global _process
    if _process is not None:
        _process[1].kill()
        _process[1].wait()
    _process = None


def _serve() -> None:
    """Answer one request after the other until the pipe is closed."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what GDCM prints is no answer
    while True:
        try:
            syntax, request = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(_answer(syntax, request), answers)
        answers.flush()


def _answer(syntax: str, request: dict[str, Any]) -> np.ndarray | str:
    header = Dataset()
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = UID(syntax)
    for name, value in request.items():
        setattr(header, name, value)
    try:
        if PYDICOM_2:
            header.is_little_endian, header.is_implicit_VR = True, False
            header.convert_pixel_data("gdcm")
        else:
            header.pixel_array_options(decoding_plugin="gdcm")
        return header.pixel_array
    except Exception as error:  # whatever it is, the reader is told
        return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    _serve()
