"""One training sample: 96 x 512 x 512 uint8 slices and masks -> 32 x 3 x 384 x 384, randomly warped."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor

from benchmarks.common import TRAUMA_BUNDLE, Row, Settings, compare, largest_series, peer, phantoms, take_turns
from trauma_monai.datalist import load_datalist, window_items
from trauma_monai.memory import keep_freed_memory
from trauma_monai.prepare import prepare


def run(settings: Settings) -> list[Row]:
    """Compare our one resampling with albumentations' steps, slice by slice, as the published training has them.

    Both sides have one thread and keep freed memory, as a data loader's worker does in training.
    """
    keep_freed_memory()
    torch.set_num_threads(1)
    flow = ConfigParser(ConfigParser.load_config_file(TRAUMA_BUNDLE / "configs/train.yaml"))
    flow["prob_flip_x"] = flow["prob_flip_y"] = 1.0
    flow["train::warp::prob_perspective"] = flow["train::warp::prob_rotate"] = 1.0
    steps = flow.get_parsed_content("train::preprocessing").transforms
    warp = flow.get_parsed_content("train::warp")
    item, sample = _stack(settings, steps[:-1])
    sides: dict[str, Callable[[], Any]] = {"trauma_monai, one resampling": lambda: warp(dict(sample))}
    if albumentations := peer("albumentations"):
        images = [np.ascontiguousarray(np.moveaxis(np.asarray(group), 0, -1)) for group in _full(sample["image"])]
        masks = [np.ascontiguousarray(np.asarray(mask)) for mask in _full(sample["organs"])]
        replay = _published(albumentations)
        importlib.import_module("cv2").setNumThreads(1)
        sides["albumentations, slice by slice"] = lambda: _replay(albumentations, replay, images, masks)
    rows = compare("sample", "augmentation", take_turns(sides, settings, per=1e-3), "ms")
    whole = take_turns({"from the store to the network's input": lambda: _run(steps, item)}, settings, per=1e-3)
    return rows + compare("sample", "whole sample", whole, "ms")


def _stack(settings: Settings, steps: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A window of a prepared series: its item, and the sample before augmentation."""
    source = phantoms(settings.work, 2, 512, 1.5)
    out = settings.work / "prepared_thin"
    prepare(source, out, workers=1, folds=2, progress=False)
    name = largest_series(source).name
    items = [item for item in load_datalist(out, "all") if item["series_id"] == name]
    item = window_items(items)[0]
    return item, _run(steps, item)


def _run(steps: Any, item: dict[str, Any]) -> dict[str, Any]:
    sample: Any = item
    for step in steps:
        sample = step(sample)
    return sample


def _full(volume: torch.Tensor) -> torch.Tensor:
    plain = volume.as_tensor() if isinstance(volume, MetaTensor) else volume
    return plain.flatten(0, 1) if plain.ndim > 4 else plain.flatten(0, -3)


def _published(albumentations: Any) -> Any:
    """The steps of the published training, each at every draw, as on our side."""
    return albumentations.ReplayCompose(
        [
            albumentations.Resize(384, 384),
            albumentations.Perspective(scale=(0.05, 0.1), p=1.0),
            albumentations.HorizontalFlip(p=1.0),
            albumentations.VerticalFlip(p=1.0),
            albumentations.Rotate(limit=25, p=1.0),
        ]
    )


def _replay(albumentations: Any, compose: Any, images: list[np.ndarray], masks: list[np.ndarray]) -> None:
    first = compose(image=images[0], mask=masks[0])
    for image, mask in zip(images[1:], masks[1:], strict=True):
        albumentations.ReplayCompose.replay(first["replay"], image=image, mask=mask)
