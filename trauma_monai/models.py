"""Both bundles with their weights, built once for all studies; for the second one, an ensemble can stand in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from monai.data import MetaTensor
from monai.transforms import Compose

from trauma_monai.bundle_files import config_files, find_bundles
from trauma_monai.classifier import TraumaClassifier
from trauma_monai.ensemble import EnsembleClassifier, read_ensemble, read_scales
from trauma_monai.files import name_with_checksum
from trauma_monai.organs import OrganSegmenter
from trauma_monai.pooling import ModelOutput, ScaleColumns, SeriesMode, SubmissionColumns
from trauma_monai.results import SliceScores

__all__ = ["Models", "find_device", "load_models"]


class Models(NamedTuple):
    """Both bundles with their weights, loaded once for all studies.

    Attributes:
        segment: volume -> organ label map on the same grid, :class:`trauma_monai.organs.OrganSegmenter`.
        classify: volume and label map -> what each network or variant says of the series, and the curves along z.
        names: variants, file names and checksums, for the report.
        series_mode: how the series of a study are pooled, see :func:`trauma_monai.pooling.pool_series`.
        columns: target -> probability over the study to the 13 columns of the competition.
    """

    segment: Callable[[MetaTensor], MetaTensor]
    classify: Callable[[MetaTensor, MetaTensor], tuple[Sequence[ModelOutput], SliceScores]]
    names: Mapping[str, str]
    series_mode: SeriesMode = "max"
    columns: Callable[[Mapping[str, Any]], dict[str, Any]] = SubmissionColumns()


def load_models(
    organ_weights: Path,
    trauma_weights: Path | None,
    variant: str | None,
    organ_variant: str | None,
    ensemble: Path | None,
    device: str,
    bundles_dir: Path | str | None,
    fast: bool = False,
) -> Models:
    """Build both bundles with their weights; see :func:`trauma_monai.pipeline.predict` for the arguments and errors."""
    if (trauma_weights is None) == (ensemble is None) or None not in (ensemble, variant):
        raise ValueError("expected either trauma weights, with their variant if any, or an ensemble, which names both.")
    organ_root, trauma_root = find_bundles(bundles_dir)
    if organ_variant is None and variant is not None and (organ_root / f"configs/variants/{variant}.yaml").is_file():
        organ_variant = variant
    config_files(organ_root, organ_variant)  # an unknown variant is cheaper to refuse before any network is built
    where = find_device(device)
    names = {
        "organ_variant": organ_variant or "default",
        "organ_weights": name_with_checksum(organ_weights),
        **({"arithmetic": "fast"} if fast else {}),
    }
    columns: Any = SubmissionColumns()
    classify: TraumaClassifier | EnsembleClassifier
    if trauma_weights is not None:
        names |= {"variant": variant or "default", "trauma_weights": name_with_checksum(trauma_weights)}
        classify = TraumaClassifier(trauma_root, trauma_weights, variant, where, fast)
    elif ensemble is not None:
        listed = read_ensemble(ensemble)
        names["ensemble"] = f"{ensemble.name}, {len(listed.members)} networks (sha256 {listed.checksum()})"
        classify = EnsembleClassifier(trauma_root, listed.members, where, fast)
        if listed.scales is not None:
            columns = Compose([columns, ScaleColumns(read_scales(listed.scales))])
    segment = OrganSegmenter(organ_root, organ_weights, variant=organ_variant, device=where)
    return Models(segment, classify, names, classify.series_mode, columns)


def find_device(name: str) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` into a device.

    Raises:
        ValueError: for another name, and for CUDA where there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device is {name!r}; expected auto, cpu, cuda or cuda:N.") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {name!r}; expected auto, cpu, cuda or cuda:N.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {name!r}, but torch finds no CUDA device; use cpu or auto.")
    return device
