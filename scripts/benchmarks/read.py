"""Reading a DICOM series into a volume: ours against the readers that MONAI users have."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from imagecodecs import jpeg8_encode
from monai.data import ITKReader, PydicomReader
from monai.transforms import LoadImage
from pydicom.encaps import encapsulate
from pydicom.uid import JPEG2000Lossless, JPEGLosslessSV1

from benchmarks.common import Row, Settings, compare, largest_series, peer, phantoms, take_turns
from trauma_monai.dicom import read_series


def run(settings: Settings) -> list[Row]:
    """Compare time per slice of 512 x 512 pixels in four transfer syntaxes; all sides use one thread."""
    rle = largest_series(phantoms(settings.work, 1, 512, 5.0))
    rows: list[Row] = []
    for name, write in SYNTAXES.items():
        folder = settings.work / f"series_{name.replace(' ', '_')}"
        if not folder.exists():
            _convert(rle, folder, write)
        sides = _readers(folder)
        if name == "JPEG lossless" and not peer("gdcm"):
            del sides["MONAI PydicomReader"]  # pydicom's only decoder of it that has a permissive licence
        slices = len(list(folder.iterdir()))
        times = take_turns(sides, settings, per=slices / 1000)
        rows += compare("read", name, times, "ms per slice")
    return rows


def _readers(folder: Path) -> dict[str, Callable[[], Any]]:
    sides: dict[str, Callable[[], Any]] = {"trauma_monai": lambda: read_series(folder)}
    if peer("itk"):
        sides["MONAI ITKReader"] = lambda: LoadImage(ITKReader())(folder)
    sides["MONAI PydicomReader"] = lambda: LoadImage(PydicomReader())(folder)
    if sitk := peer("SimpleITK"):
        sides["SimpleITK series reader"] = lambda: _read_with_sitk(sitk, folder)
    if dicomsdl := peer("dicomsdl"):
        sides["dicomsdl (no geometry, no checks)"] = lambda: _read_with_dicomsdl(dicomsdl, folder)
    return sides


def _read_with_sitk(sitk: Any, folder: Path) -> Any:
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return sitk.GetArrayFromImage(reader.Execute())


def _read_with_dicomsdl(dicomsdl: Any, folder: Path) -> np.ndarray:
    return np.stack([dicomsdl.open(str(path)).pixelData(storedvalue=True) for path in sorted(folder.iterdir())])


# --- the same series in other transfer syntaxes -----------------------------------------------------------------------


def _convert(source: Path, folder: Path, write: Callable[[Path, Path], None]) -> None:
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for path in source.iterdir():
        write(path, partial / path.name)
    partial.rename(folder)


def _decompress(source: Path, target: Path) -> None:
    dataset = pydicom.dcmread(source)
    dataset.decompress()
    dataset.save_as(target)


def _as_jpeg2000(source: Path, target: Path) -> None:
    dataset = pydicom.dcmread(source)
    dataset.decompress()
    dataset.compress(JPEG2000Lossless)
    dataset.save_as(target)


def _as_jpeg_lossless(source: Path, target: Path) -> None:
    dataset = pydicom.dcmread(source)
    dataset.decompress()
    dataset.PixelData = encapsulate([jpeg8_encode(dataset.pixel_array.view(np.uint16), lossless=True)])
    dataset["PixelData"].is_undefined_length = True
    dataset.file_meta.TransferSyntaxUID = JPEGLosslessSV1
    dataset.save_as(target)


SYNTAXES: dict[str, Callable[[Path, Path], Any]] = {
    "uncompressed": _decompress,
    "RLE": shutil.copyfile,
    "JPEG lossless": _as_jpeg_lossless,
    "JPEG 2000": _as_jpeg2000,
}
