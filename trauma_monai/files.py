"""Files: their names, written whole or not at all, and their checksums."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["DATALIST", "PART", "complete_or_absent", "name_with_checksum", "sha256_of"]

DATALIST = "datalist.json"
"""Name of the list in a prepared data set."""

PART = ".part"
"""Ending of a file that is being written. What still has it when a run starts was left by one that was killed."""


@contextmanager
def complete_or_absent(path: Path, mode: str = "w") -> Iterator[Any]:
    """Open a file that appears under its name when it is complete; until then the old one stays.

    Args:
        path: file to write or replace; its folder is made.
        mode: ``w`` for UTF-8 text with line ends as they are written, ``wb`` for bytes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}{PART}")
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    try:
        with part.open(mode, **text) as file:  # type: ignore[call-overload]
            yield file
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def sha256_of(file: Path) -> str:
    """Return the checksum of a file's content."""
    with file.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def name_with_checksum(weights: Path) -> str:
    """Name a file and its content, for the report.

    Raises:
        FileNotFoundError: when there is no such file.
    """
    if not weights.is_file():
        raise FileNotFoundError(f"no weights at {weights}: train the bundle, or copy its model.pt there.")
    return f"{weights.name} (sha256 {sha256_of(weights)[:12]})"
