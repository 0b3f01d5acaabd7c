"""Turns, tables and synthetic studies that the parts share."""

from __future__ import annotations

import functools
import importlib
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from trauma_monai.bundle_files import find_bundle
from trauma_monai.phantom import write_phantoms

ORGAN_BUNDLE = find_bundle("organ_ct_segmentation")
TRAUMA_BUNDLE = find_bundle("trauma_ct_classification")


@dataclass(frozen=True)
class Settings:
    """What all parts are told.

    Attributes:
        work: folder for synthetic studies.
        device: where networks run.
        rounds: how often each side has its turn.
    """

    work: Path
    device: torch.device
    rounds: int


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        part: of the benchmark.
        case: what is compared within it.
        name: which side.
        value: the figure.
        unit: of the figure.
        ratio: value over that of the first side of the case.
    """

    part: str
    case: str
    name: str
    value: float
    unit: str
    ratio: float

    def as_dict(self) -> dict[str, Any]:
        """Return what goes into JSON."""
        return asdict(self)


def compare(part: str, case: str, values: Mapping[str, float], unit: str) -> list[Row]:
    """Make rows of figures; the first is what the others are divided by."""
    first = next(iter(values.values()))
    return [Row(part, case, name, value, unit, value / first) for name, value in values.items()]


def take_turns(
    sides: Mapping[str, Callable[[], Any]],
    settings: Settings,
    per: float = 1.0,
) -> dict[str, float]:
    """Time each side in turn, as often as the settings say, after a first time that does not count.

    Args:
        sides: name -> what to do.
        settings: rounds, and the device that is waited for.
        per: divides the seconds, for a figure per slice in ms (n / 1000), say.

    Returns:
        Name -> the best time.
    """
    best = dict.fromkeys(sides, float("inf"))
    for turn in range(settings.rounds + 1):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            if settings.device.type == "cuda":
                torch.cuda.synchronize(settings.device)
            if turn:
                best[name] = min(best[name], (time.perf_counter() - start) / per)
    return best


@functools.cache
def peer(module: str) -> ModuleType | None:
    """Import an optional peer, or say that it is left out."""
    try:
        return importlib.import_module(module)
    except ImportError:
        print(f"{module} is not installed: left out", file=sys.stderr)
        return None


def phantoms(work: Path, studies: int, matrix: int, slice_thickness_mm: float) -> Path:
    """Make synthetic studies in the competition's layout, or find those of an earlier run."""
    folder = work / f"phantoms_{studies}_{matrix}_{slice_thickness_mm:g}"
    if not folder.exists():
        write_phantoms(folder, studies, seed=0, matrix=matrix, slice_thickness_mm=slice_thickness_mm)
    return folder


def largest_series(rsna_dir: Path) -> Path:
    """Return the folder of the series with the most slices."""
    series = [folder for folder in rsna_dir.glob("train_images/*/*") if folder.is_dir()]
    return max(series, key=lambda folder: len(list(folder.iterdir())))


def print_table(part: str, rows: list[Row]) -> None:
    """Print the rows of a part."""
    table = Table(title=part, title_justify="left")
    for column in ("case", "what", "figure", "unit", "ratio"):
        table.add_column(column, justify="right" if column in ("figure", "ratio") else "left")
    case = None
    for row in rows:
        table.add_row(row.case if row.case != case else "", row.name, f"{row.value:.3g}", row.unit, f"{row.ratio:.2f}")
        case = row.case
    Console(width=110).print(table)
