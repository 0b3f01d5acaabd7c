"""Organ masks for the prepared series that came without: the organ bundle over a data set."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.data import MetaTensor

from trauma_monai.bundle_files import ORGAN_BUNDLE, find_bundle
from trauma_monai.console import progress_bar, say
from trauma_monai.files import DATALIST, checksum_of_weights, write_json
from trauma_monai.models import find_device
from trauma_monai.organs import OrganSegmenter
from trauma_monai.store import add_model_mask, mask_path, model_mask_maker, name_of, write_volume
from trauma_monai.volume_reader import VolumeReader

__all__ = ["segment"]


def segment(
    out: str | Path,
    weights: str | Path,
    variant: str | None = None,
    bundles_dir: str | Path | None = None,
    device: str = "auto",
    overwrite: bool = False,
    progress: bool = True,
) -> int:
    """Fill in organ masks for the prepared series that have none, in training and test.

    A mask that the same weights made is not made again; one that other weights made is; one that came with the data
    set is never replaced. datalist.json is brought up to date at the end, also when the run is interrupted.

    Args:
        out: folder that :func:`trauma_monai.prepare.prepare` wrote.
        weights: weights of the organ bundle.
        variant: variant of the bundle that the weights belong to.
        bundles_dir: folder with the organ bundle; by default the bundles that come with this package.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        overwrite: make again also the masks that these weights made.
        progress: show a progress bar on stderr.

    Returns:
        How many masks were made.

    Raises:
        FileNotFoundError: when there is no datalist.json, or no such weights.
        ValueError: when the bundle has no such variant, or the machine no such device.
        RuntimeError: when some series could not be segmented; the others have their masks.
    """
    out, weights = Path(out).expanduser().absolute(), Path(weights)
    if not (out / DATALIST).exists():
        raise FileNotFoundError(f"no {DATALIST} in {out}; make it with 'trauma-monai prepare RSNA_DIR OUT'.")
    sections = json.loads((out / DATALIST).read_text())
    items = [item for section in sections.values() for item in section if item.get("organs_from") != "segmentations"]
    made_by = f"{checksum_of_weights(weights)}, variant {variant or 'default'}"
    todo = [item for item in items if overwrite or model_mask_maker(item, out) != made_by]
    problems: list[str] = []
    try:
        if todo:
            root = find_bundle(ORGAN_BUNDLE, None if bundles_dir is None else Path(bundles_dir))
            segmenter = OrganSegmenter(root, weights, variant, find_device(device))
            problems = _segment_items(todo, out, segmenter, made_by, progress)
    finally:
        for item in items:
            add_model_mask(item, out)
        write_json(out / DATALIST, sections)
    made = len(todo) - len(problems)
    say(f"{made} organ masks made, {len(items) - len(todo)} were there already")
    if problems:
        raise RuntimeError(f"{len(problems)} of {len(todo)} series could not be segmented; the first: {problems[0]}")
    return made


def _segment_items(
    items: Sequence[Mapping[str, Any]], out: Path, segmenter: Callable[..., Any], made_by: str, progress: bool
) -> list[str]:
    """Segment one series after the other; what fails is named and does not stop the rest."""
    reader = VolumeReader()
    problems: list[str] = []
    with progress_bar(progress) as bar:
        for item in bar.track(items, description="organ masks"):
            try:
                voxels, meta = reader.get_data(reader.read(out / item["image"]))
                label_map = segmenter(MetaTensor(voxels[None], affine=meta["affine"]))
            except (ValueError, RuntimeError, OSError, EOFError) as error:
                problems.append(f"{name_of(item)}: {error}")
                continue
            codes = np.asarray(label_map.cpu()).astype(np.uint8, copy=False)[0]
            write_volume(mask_path(out, name_of(item)), codes, meta["affine"], made_by)
    return problems
