"""Preparation of a data set, and access to 96 slices of what it made."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np

from benchmarks.common import Row, Settings, compare, largest_series, phantoms, take_turns
from trauma_monai.datalist import load_datalist
from trauma_monai.dicom import read_series
from trauma_monai.prepare import prepare
from trauma_monai.volume_reader import VolumeReader

SLICES = 96


def run(settings: Settings) -> list[Row]:
    """Compare one with two workers, and the store with the files that it could have been."""
    return _workers(settings) + _access(settings)


def _workers(settings: Settings) -> list[Row]:
    """Time the command on a few tiny series, which is its start, and how much longer it takes for large ones."""
    start = _command_times(phantoms(settings.work, 8, 64, 10.0), settings)
    source = phantoms(settings.work, 32, 512, 3.0)
    series = len(list(source.glob("train_images/*/*")))
    after = {name: (time - start[name]) / series for name, time in _command_times(source, settings).items()}
    rows = compare("prepare", "start, of the command and its workers", start, "ms")
    return rows + compare("prepare", f"{series} series of 512 x 512, after the start", after, "ms per series")


def _command_times(source: Path, settings: Settings) -> dict[str, float]:
    def side(workers: int) -> Callable[[], None]:
        def prepare_afresh() -> None:
            out = settings.work / f"prepared_by_{workers}"
            shutil.rmtree(out, ignore_errors=True)
            program = Path(sys.executable).with_name("trauma-monai")
            command = [program, "prepare", source, out, "--workers", str(workers)]
            subprocess.run(command, check=True, capture_output=True)

        return prepare_afresh

    return take_turns({"2 workers": side(2), "1 worker": side(1)}, settings, per=1e-3)


def _access(settings: Settings) -> list[Row]:
    source = phantoms(settings.work, 2, 512, 1.5)
    out = settings.work / "prepared_thin"
    prepare(source, out, workers=1, folds=2, progress=False)
    dicom = largest_series(source)
    items = {item["series_id"]: item for item in load_datalist(out, "all", require=())}
    stored = Path(items[dicom.name]["image"])
    compressed = settings.work / "thin.nii.gz"
    if not compressed.exists():
        nib.save(nib.load(stored), compressed)
    total = nib.load(stored).shape[2]
    chosen = np.linspace(0, total - 1, SLICES).astype(int)
    sides = {
        "store": lambda: _slices(stored, chosen),
        "NIfTI, gzip": lambda: _slices(compressed, chosen),
        "DICOM, decoded again": lambda: read_series(dicom).array.T[chosen],
    }
    rows = compare("prepare", f"{SLICES} of {total} slices", take_turns(sides, settings, per=1e-3), "ms")
    return rows + compare("prepare", "decode, check and write 512 x 512", _slice_time(source, settings), "ms per slice")


def _slice_time(source: Path, settings: Settings) -> dict[str, float]:
    out = settings.work / "prepared_afresh"

    def prepare_afresh() -> None:
        shutil.rmtree(out, ignore_errors=True)
        prepare(source, out, workers=1, folds=2, progress=False)

    slices = len(list(source.glob("train_images/*/*/*.dcm")))
    return take_turns({"1 worker": prepare_afresh}, settings, per=slices / 1000)


def _slices(path: Path, chosen: np.ndarray) -> np.ndarray:
    volume, _ = VolumeReader().get_data([path])
    return np.asarray(volume).T[chosen]
