"""Inference: the organ network, the slice network, and a whole study from DICOM files to the report."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import torch
from monai.bundle import ConfigParser
from torch.nn import functional

from benchmarks.common import ORGAN_BUNDLE, TRAUMA_BUNDLE, Row, Settings, compare, largest_series, phantoms, take_turns
from trauma_monai.networks.deployed import can_compile, for_inference, gains_from_bfloat16
from trauma_monai.pipeline import predict

VOLUME = (1, 1, 64, 128, 128)
STACK = (1, 32, 3, 384, 384)
WINDOW_HU = (-150.0, 250.0)


def run(settings: Settings) -> list[Row]:
    """Compare plain eager float32 with what the bundles do, and with their fast mode."""
    return _networks(settings) + _study(settings)


def network_of(bundle: Path) -> torch.nn.Module:
    """Build a bundle's network as published, with random weights."""
    torch.manual_seed(0)
    return ConfigParser(ConfigParser.load_config_file(bundle / "configs/inference.yaml")).get_parsed_content(
        "network_def"
    )


def _networks(settings: Settings) -> list[Row]:
    rows: list[Row] = []
    for bundle, shape, case in ((ORGAN_BUNDLE, VOLUME, "organ network"), (TRAUMA_BUNDLE, STACK, "slice network")):
        plain = network_of(bundle).eval().to(settings.device)
        exact = for_inference(copy.deepcopy(plain), settings.device)
        fast = for_inference(copy.deepcopy(plain), settings.device, fast=True)
        image = torch.rand(shape, device=settings.device)
        sides = {"exact (default)": exact, "plain eager": plain, _fast_name(settings.device): fast}
        with torch.inference_mode():
            times = take_turns({name: _call(network, image) for name, network in sides.items()}, settings)
        rows += compare("infer", f"{case}, {' x '.join(map(str, shape))}", times, "s")
    return rows


def _fast_name(device: torch.device) -> str:
    how = [name for name, yes in (("bf16", gains_from_bfloat16(device)), ("compiled", can_compile(device))) if yes]
    return f"fast ({', '.join(how) or 'no gain here'})"


def _call(network: torch.nn.Module, image: torch.Tensor) -> Callable[[], Any]:
    return lambda: network(image)


def _study(settings: Settings) -> list[Row]:
    """Time a study of one series."""
    series = largest_series(phantoms(settings.work, 2, 512, 1.5))
    weights = {bundle: weights_of(bundle, settings.work) for bundle in (ORGAN_BUNDLE, TRAUMA_BUNDLE)}
    organs, slices = (network_of(bundle).eval().to(settings.device) for bundle in (ORGAN_BUNDLE, TRAUMA_BUNDLE))

    def ours() -> None:
        with tempfile.TemporaryDirectory() as out:
            predict(series, out, weights[ORGAN_BUNDLE], weights[TRAUMA_BUNDLE], device=str(settings.device))

    def published() -> None:
        with torch.inference_mode():
            _published(series, organs, slices, settings.device)

    times = take_turns(
        {"trauma_monai, with checks, masks and report": ours, "published way, scores only": published}, settings
    )
    slices_in = len(list(series.iterdir()))
    return compare("infer", f"a study of {slices_in} slices", times, "s")


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
