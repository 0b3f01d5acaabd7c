"""Inference: the organ network, the slice network, and a whole study from DICOM files to the report."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pydicom
import torch
from monai.bundle import ConfigParser
from torch.nn import functional

from benchmarks.common import ORGAN_BUNDLE, TRAUMA_BUNDLE, Row, Settings, compare, largest_series, phantoms, take_turns
from trauma_monai.bundle_files import config_files
from trauma_monai.networks.deployed import can_compile, for_inference, gains_from_float16
from trauma_monai.pipeline import predict

SHAPES: dict[Path, tuple[int, ...]] = {ORGAN_BUNDLE: (1, 1, 64, 128, 128), TRAUMA_BUNDLE: (1, 32, 3, 384, 384)}
"""Two windows of the organ network, one of the slice network."""

WINDOW_HU = (-150.0, 250.0)


def run(settings: Settings) -> list[Row]:
    """Compare plain eager float32 with what the bundles do, and with their fast mode.

    The other way has its turns first: ours keeps freed memory, which would serve the whole process.
    """
    with torch.inference_mode():
        plain = {bundle: _plain(bundle, shape, settings) for bundle, shape in SHAPES.items()}
    series = largest_series(phantoms(settings.work, 2, 512, 1.5))
    published = _published_study(series, settings)
    rows: list[Row] = []
    for bundle, shape in SHAPES.items():
        times = _ours(bundle, settings) | plain[bundle]
        rows += compare("infer", f"{bundle.name}, {' x '.join(map(str, shape))}", times, "s")
    times = _our_study(series, settings) | published
    return rows + compare("infer", f"a study of {len(list(series.iterdir()))} slices", times, "s")


def network_of(bundle: Path, variant: str | None = None) -> torch.nn.Module:
    """Build a bundle's network with random weights, which do not change how long it takes."""
    torch.manual_seed(0)
    config = ConfigParser.load_config_files(config_files(bundle, variant))
    return ConfigParser(config).get_parsed_content("network_def")


def weights_of(bundle: Path, work: Path, variant: str | None = None) -> Path:
    """Save random weights of a bundle's network."""
    path = work / f"{bundle.name}_{variant or 'default'}.pt"
    torch.save(network_of(bundle, variant).state_dict(), path)
    return path


def _plain(bundle: Path, shape: tuple[int, ...], settings: Settings) -> dict[str, float]:
    network, image = network_of(bundle).eval().to(settings.device), torch.rand(shape, device=settings.device)
    return take_turns({"plain eager": lambda: network(image)}, settings)


def _ours(bundle: Path, settings: Settings) -> dict[str, float]:
    image = torch.rand(SHAPES[bundle], device=settings.device)
    exact = for_inference(network_of(bundle).eval(), settings.device)
    fast = for_inference(network_of(bundle).eval(), settings.device, fast=True)
    with torch.inference_mode():
        sides = {"exact (default)": lambda: exact(image), _fast_name(settings.device): lambda: fast(image)}
        return take_turns(sides, settings)


def _fast_name(device: torch.device) -> str:
    how = [name for name, yes in (("fp16", gains_from_float16(device)), ("compiled", can_compile(device))) if yes]
    return f"fast ({', '.join(how) or 'no gain here'})"


def _our_study(series: Path, settings: Settings) -> dict[str, float]:
    weights = {bundle: weights_of(bundle, settings.work) for bundle in SHAPES}

    def study() -> None:
        with tempfile.TemporaryDirectory() as out:
            predict(series, out, weights[ORGAN_BUNDLE], weights[TRAUMA_BUNDLE], device=str(settings.device))

    return take_turns({"trauma_monai, with checks, masks and report": study}, settings)


def _published_study(series: Path, settings: Settings) -> dict[str, float]:
    organs, slices = (network_of(bundle).eval().to(settings.device) for bundle in SHAPES)

    def study() -> None:
        with torch.inference_mode():
            _published(series, organs, slices, settings.device)

    return take_turns({"published way, scores only": study}, settings)


def _published(series: Path, organs: torch.nn.Module, slices: torch.nn.Module, device: torch.device) -> None:
    """The published inference, restated: float64 windowing, every slice segmented, all windows in one batch."""
    files = sorted(series.iterdir(), key=lambda path: int(path.stem))
    volume = np.stack([_windowed(pydicom.dcmread(path)) for path in files])
    image = torch.from_numpy(volume.astype(np.float32) / 255)[None, None].to(device)
    small = functional.interpolate(image, size=(len(files), 128, 128), mode="trilinear")
    for start in range(0, len(files), 32):
        block = small[:, :, start : start + 32]
        organs(functional.pad(block, (0, 0, 0, 0, 0, 32 - block.shape[2])))
    windows = max(1, -(-len(files) // 100))
    chosen = np.linspace(0, len(files) - 1, windows * 96).astype(int)
    stack = image[0, 0, torch.from_numpy(chosen).to(device)].reshape(windows * 32, 3, *image.shape[-2:])
    stack = functional.interpolate(stack, size=384, mode="bilinear").reshape(windows, 32, 3, 384, 384)
    slices(stack).sigmoid().cpu()


def _windowed(dataset: pydicom.Dataset) -> np.ndarray:
    hu = dataset.pixel_array.astype(np.float64) * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
    hu = np.clip(hu, *WINDOW_HU)
    return ((hu - hu.min()) / max(hu.max() - hu.min(), 1e-6) * 255).astype(np.uint8)
