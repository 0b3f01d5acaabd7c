"""Training and evaluation: the items of a prepared data set, as configs ask for them.

A prepared data set is what ``trauma-monai prepare`` writes; its datalist.json is described in
:mod:`trauma_monai.prepare`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trauma_monai.files import DATALIST
from trauma_monai.stacks import slice_windows

__all__ = ["load_datalist", "organ_items", "window_items"]

SECTIONS = ("train", "validate", "all", "test")
"""What :func:`load_datalist` can be asked for."""

ALL_FOLDS = -1
"""Fold that holds nothing back: training and validation both get every patient."""

HOW_TO_GET = {"organs": "run 'trauma-monai segment' on the data set"}
"""What to do about a key that items lack."""


def load_datalist(
    dataset_dir: str | Path, section: str = "train", fold: int = 0, require: Sequence[str] = ("organs",)
) -> list[dict[str, Any]]:
    """Load the items of one section of a prepared data set.

    Args:
        dataset_dir: folder with datalist.json.
        section: ``train``: all folds but ``fold``; ``validate``: ``fold``; ``all``: every fold; ``test``: the
            series without labels.
        fold: the fold to hold back; -1 holds nothing back.
        require: keys that every item must have. Organ masks by default: a flow that makes its own masks passes ``[]``.

    Returns:
        Items as in datalist.json, with the paths of ``image`` and ``organs`` made absolute, and NaN for an
        ``aortic_hu`` that is not known (batches cannot hold None).

    Raises:
        FileNotFoundError: when there is no datalist.json.
        KeyError: when an item lacks a key of ``require``.
        ValueError: for an unknown section or fold, or when the section is empty.
    """
    path = Path(dataset_dir).expanduser().absolute() / DATALIST
    if section not in SECTIONS:
        raise ValueError(f"unknown section {section!r}; expected one of {', '.join(SECTIONS)}.")
    if not path.exists():
        raise FileNotFoundError(f"no {DATALIST} in {path.parent}; make it with 'trauma-monai prepare RSNA_DIR OUT'.")
    content = json.loads(path.read_text())
    items = _select(content.get("test" if section == "test" else "training", []), section, int(fold))
    if not items:
        raise ValueError(f"section {section!r} (fold {fold}) of {path} is empty; rejected.csv beside it may say why.")
    for key in require:
        _check_has(key, items)
    return [_as_sample(item, path.parent) for item in items]


def has_items(dataset_dir: str | Path, section: str) -> bool:
    """Say whether a section of a prepared data set, ``all`` or ``test``, has series."""
    content = json.loads((Path(dataset_dir) / DATALIST).read_text())
    return bool(content.get("test" if section == "test" else "training"))


def organ_items(dataset_dir: str | Path, section: str = "train", fold: int = 0) -> list[dict[str, Any]]:
    """Load what an organ network learns from: the series whose masks came with the data set.

    Series whose masks a network made (``trauma-monai segment``) are left out: a network must not learn from, or be
    measured against, its own output.

    Args:
        dataset_dir: folder with datalist.json.
        section: see :func:`load_datalist`.
        fold: see :func:`load_datalist`.

    Returns:
        Items ``{"image", "label"}`` of absolute paths; ``label`` is the mask.

    Raises:
        ValueError: when the section holds no such series; otherwise as :func:`load_datalist`.
    """
    items = load_datalist(dataset_dir, section, fold, require=())
    given = [item for item in items if "organs" in item and item.get("organs_from") != "model"]
    if not given:
        raise ValueError(
            f"none of the {len(items)} series in section {section!r} (fold {fold}) of {dataset_dir} came with an organ "
            "mask; expected segmentations/SERIES.nii for some of them. rejected.csv names the masks that were refused."
        )
    return [{"image": item["image"], "label": item["organs"]} for item in given]


def window_items(
    items: Sequence[Mapping[str, Any]],
    mode: str = "windows",
    length: int = 96,
    window: int = 100,
    max_slices: int = 400,
) -> list[dict[str, Any]]:
    """Turn each series into one item per window of slices, so that training draws windows and not series.

    Args:
        items: items with ``num_slices``.
        mode: see :func:`trauma_monai.stacks.slice_windows`, as for the other arguments.
        length: slices of a window.
        window: slices of a window before ``length`` of them are kept.
        max_slices: of a longer series every second slice is used.

    Returns:
        Items with ``window``, the index of the window in its series.

    Raises:
        KeyError: when an item lacks ``num_slices``.
    """
    _check_has("num_slices", items)
    return [
        {**item, "window": index}
        for item in items
        for index in range(len(slice_windows(item["num_slices"], mode, length, window, max_slices)))
    ]


def _select(items: list[dict[str, Any]], section: str, fold: int) -> list[dict[str, Any]]:
    if section in ("test", "all") or not items:
        return items
    _check_has("fold", items)
    folds = sorted({item["fold"] for item in items})
    if fold == ALL_FOLDS:
        return items
    if fold not in folds:
        raise ValueError(f"unknown fold {fold}; the data set has {folds}, and {ALL_FOLDS} means to hold nothing back.")
    return [item for item in items if (item["fold"] == fold) == (section == "validate")]


def _check_has(key: str, items: Sequence[Mapping[str, Any]]) -> None:
    lacking = [item for item in items if item.get(key) is None]
    if lacking:
        what_to_do = HOW_TO_GET.get(key, "prepare the data set again")
        raise KeyError(
            f"{len(lacking)} of {len(items)} items lack {key!r}, the first is that of "
            f"{Path(str(lacking[0].get('image'))).name}: {what_to_do}."
        )


def _as_sample(item: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    paths = {key: str(folder / item[key]) for key in ("image", "organs") if key in item}
    aortic_hu = item.get("aortic_hu")
    return {**item, **paths, "aortic_hu": float("nan") if aortic_hu is None else aortic_hu}
