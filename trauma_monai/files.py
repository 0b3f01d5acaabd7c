"""Files: their names, written whole or not at all, and what tells one version of them from another."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = [
    "DATALIST",
    "PART",
    "checksum_of_weights",
    "complete_or_absent",
    "fingerprint",
    "name_with_checksum",
    "sha256_of",
    "write_csv",
    "write_json",
    "write_text",
]

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


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with complete_or_absent(path) as file:
        file.write(text)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, whole or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a CSV file, whole or not at all."""
    with complete_or_absent(path) as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(columns)
        table.writerows(rows)


def fingerprint(files: Iterable[Path], *facts: str) -> str:
    """Return a short text that changes when a file does: its name, folder, size or time of modification.

    Args:
        files: in an order that stays; their content is not read, which would take as long as the work to be saved.
        facts: what else must be the same.
    """
    stats = [(path.parent.name, path.name, path.stat()) for path in files]
    seen = [(folder, name, stat.st_size, stat.st_mtime_ns) for folder, name, stat in stats]
    return hashlib.sha256(repr((seen, facts)).encode()).hexdigest()


def sha256_of(file: Path) -> str:
    """Return the checksum of a file's content."""
    with file.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def checksum_of_weights(weights: Path) -> str:
    """Return a checksum of a weights file that is short enough to be shown.

    Raises:
        FileNotFoundError: when there is no such file.
    """
    if not weights.is_file():
        raise FileNotFoundError(f"no weights at {weights}: train the bundle, or copy its model.pt there.")
    return f"sha256 {sha256_of(weights)[:12]}"


def name_with_checksum(weights: Path) -> str:
    """Name a weights file and its content, for the report; see :func:`checksum_of_weights`."""
    return f"{weights.name} ({checksum_of_weights(weights)})"
