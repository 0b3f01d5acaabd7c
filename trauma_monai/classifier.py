"""Stages 2 to 5 as callables: both bundles, built by their own inference configs and loaded with weights."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged

from trauma_monai.files import sha256_of
from trauma_monai.networks import load_weights
from trauma_monai.organs import OrganSegmenter, SegmentOrgansd
from trauma_monai.pooling import PoolSlicesd, SubmissionColumns
from trauma_monai.results import SliceScores

__all__ = [
    "ORGAN_BUNDLE",
    "TRAUMA_BUNDLE",
    "Models",
    "TraumaClassifier",
    "TraumaFlow",
    "config_files",
    "find_bundle",
    "find_bundles",
    "find_device",
    "load_models",
    "name_with_checksum",
]

ORGAN_BUNDLE = "organ_ct_segmentation"
TRAUMA_BUNDLE = "trauma_ct_classification"

REFERENCE = re.compile(r"@(\w+)")
"""Names of other entries within the text of a config entry."""


class Models(NamedTuple):
    """Both bundles with their weights, loaded once for all studies.

    Attributes:
        segment: volume -> organ label map on the same grid, :class:`trauma_monai.organs.OrganSegmenter`.
        classify: volume and label map -> probabilities.
        names: variants, file names and checksums, for the report.
        series_mode: how the series of a study are pooled, see :func:`trauma_monai.pooling.pool_series`.
        columns: target -> probability over the study to the 13 columns of the competition.
    """

    segment: Callable[[MetaTensor], MetaTensor]
    classify: Callable[[MetaTensor, MetaTensor], tuple[dict[str, float], SliceScores]]
    names: Mapping[str, str]
    series_mode: Literal["max", "mean"] = "max"
    columns: Callable[[Mapping[str, Any]], dict[str, Any]] = SubmissionColumns()


def find_bundle(name: str, bundles_dir: Path | None = None) -> Path:
    """Find a bundle in ``bundles_dir``, else inside the installed package, else beside it in a checkout.

    Raises:
        ValueError: when it is in none of these.
    """
    package = Path(__file__).resolve().parent
    places = [Path(bundles_dir)] if bundles_dir is not None else [package / "bundles", package.parent / "bundles"]
    for place in places:
        if (place / name / "configs").is_dir():
            return place / name
    raise ValueError(f"no bundle {name!r} in {' or '.join(map(str, places))}; expected its folder with configs/ there.")


def config_files(bundle_root: Path, variant: str | None) -> list[Path]:
    """Return the bundle's inference config and, over it, that of a variant.

    Raises:
        ValueError: for a variant that the bundle does not have.
    """
    configs = bundle_root / "configs"
    # A packaged bundle is JSON, as the model zoo has it.
    base = next((path for path in (configs / "inference.yaml", configs / "inference.json") if path.is_file()), None)
    if base is None:
        raise ValueError(f"{configs} holds no inference.yaml or inference.json; expected a bundle's configs.")
    if variant is None:
        return [base]
    overlay = configs / "variants" / f"{variant}.yaml"
    if not overlay.is_file():
        known = sorted(path.stem for path in overlay.parent.glob("*.yaml"))
        raise ValueError(f"{bundle_root.name} has no variant {variant!r}; it has {', '.join(known) or 'none'}.")
    return [base, overlay]


class TraumaFlow:
    """What a variant of the classification bundle does around its network. Holds no weights.

    Shapes: W windows, S slice groups of a window, G slice groups of a series, T targets, O organs.

    Attributes:
        targets: names of the T targets.
        organs: names of the O organs.
        series_mode: how series are pooled, see :func:`trauma_monai.pooling.pool_series`.

    Args:
        bundle_root: folder of the bundle.
        variant: which variant; None for the bundle as it stands.
        device: where the network runs.
        fast: see :func:`trauma_monai.for_inference`.

    Raises:
        ValueError: for an unknown variant.
    """

    def __init__(self, bundle_root: Path, variant: str | None, device: torch.device, fast: bool = False) -> None:
        self.config: dict[str, Any] = ConfigParser.load_config_files(config_files(bundle_root, variant))
        self.config |= {"bundle_root": str(bundle_root), "device": str(device), "fast": fast}
        self.device = device
        parser = self._parse()
        self.targets: tuple[str, ...] = tuple(parser.get_parsed_content("targets"))
        self.organs: tuple[str, ...] = tuple(parser.get_parsed_content("organs"))
        self.series_mode: Literal["max", "mean"] = parser.get("series_mode", "max")
        # Volume and masks are in memory already: what reads or makes them is left out, as MONAI Deploy does.
        steps = parser.get_parsed_content("preprocessing").flatten().transforms
        made_before = (LoadImaged, EnsureChannelFirstd, SegmentOrgansd)
        self.preprocessing = Compose([step for step in steps if not isinstance(step, made_before)])
        self.postprocessing = parser.get_parsed_content("postprocessing")
        self.pooling = PoolSlicesd(keys="pred", mode=parser.get_parsed_content("slice_pooling"))
        self.inferer = parser.get_parsed_content("inferer")

    def build_network(self) -> torch.nn.Module:
        """Build a network with random weights. Nothing else holds on to it."""
        return self._parse().get_parsed_content("network").eval()

    def text_of(self, entry: str) -> str:
        """Return an entry of the config with all that it refers to: equal texts make equal components."""
        found: dict[str, str] = {}
        names = [entry]
        while names:
            name = names.pop()
            if name not in found:
                found[name] = json.dumps(self.config[name], sort_keys=True, default=str)
                names += REFERENCE.findall(found[name])
        return json.dumps(found, sort_keys=True)

    def _parse(self) -> ConfigParser:
        return ConfigParser(copy.deepcopy(self.config))

    def prepare(self, image: MetaTensor, organs: MetaTensor) -> dict[str, Any]:
        """Turn a series (HU and label map, (1, X, Y, Z) in any orientation) into the network's input."""
        return self.preprocessing({"image": image, "organs": organs})

    def run(self, network: torch.nn.Module, sample: Mapping[str, Any]) -> torch.Tensor:
        """Return the probabilities (W, S, T) that a network gives to a prepared series."""
        with torch.inference_mode():
            logits = self.inferer(sample["image"][None].to(self.device), network)
        return self.postprocessing({"pred": logits[0].cpu()})["slice_probabilities"]

    def pool(self, probabilities: torch.Tensor) -> dict[str, float]:
        """Turn probabilities (W, S, T) into target -> probability over the series."""
        pooled = self.pooling({"pred": probabilities})["pred"]
        return dict(zip(self.targets, pooled.tolist(), strict=True))

    def scores(self, sample: Mapping[str, Any], probabilities: torch.Tensor) -> SliceScores:
        """Join the windows: a slice that several of them show gets its highest probability."""
        values = np.asarray(probabilities, dtype=np.float32).reshape(-1, len(self.targets))
        visibility = np.asarray(sample["visibility"], dtype=np.float32).reshape(-1, len(self.organs))
        z_index, first, group = np.unique(np.asarray(sample["slice_index"]), return_index=True, return_inverse=True)
        joined = np.zeros((len(z_index), values.shape[1]), dtype=np.float32)
        np.maximum.at(joined, group.reshape(-1), values)
        return SliceScores(self.targets, self.organs, z_index, z_index.astype(float), None, joined, visibility[first])


class TraumaClassifier:
    """One network of the classification bundle, built once and called for every series.

    Args:
        bundle_root: folder of the bundle.
        weights: state dict of its network.
        variant: variant that the weights belong to; None for the bundle as it stands.
        device: where the network runs.
        fast: see :func:`trauma_monai.for_inference`.

    Raises:
        ValueError: for an unknown variant, or weights of another network.
    """

    def __init__(
        self, bundle_root: Path, weights: Path, variant: str | None, device: torch.device, fast: bool = False
    ) -> None:
        self.flow = TraumaFlow(bundle_root, variant, device, fast)
        self.series_mode = self.flow.series_mode
        self.network = load_weights(self.flow.build_network(), weights)

    def __call__(self, image: MetaTensor, organs: MetaTensor) -> tuple[dict[str, float], SliceScores]:
        """Classify one series.

        Args:
            image: HU, shape (1, X, Y, Z) in any orientation.
            organs: label map on the same grid.

        Returns:
            Target -> probability over the series, and the scores along z without their positions in mm.
        """
        sample = self.flow.prepare(image, organs)
        probabilities = self.flow.run(self.network, sample)
        return self.flow.pool(probabilities), self.flow.scores(sample, probabilities)


def load_models(
    organ_weights: Path,
    trauma_weights: Path,
    variant: str | None,
    organ_variant: str | None,
    device: str,
    bundles_dir: Path | str | None,
    fast: bool = False,
) -> Models:
    """Build both bundles with their weights; see :func:`trauma_monai.pipeline.predict` for the arguments and errors."""
    organ_root, trauma_root = find_bundles(bundles_dir)
    if organ_variant is None and variant is not None and (organ_root / f"configs/variants/{variant}.yaml").is_file():
        organ_variant = variant
    for root, name in ((organ_root, organ_variant), (trauma_root, variant)):
        config_files(root, name)  # an unknown variant is cheaper to refuse before any network is built
    names = {
        "variant": variant or "default",
        "organ_variant": organ_variant or "default",
        "organ_weights": name_with_checksum(organ_weights),
        "trauma_weights": name_with_checksum(trauma_weights),
        **({"arithmetic": "fast"} if fast else {}),
    }
    where = find_device(device)
    segment = OrganSegmenter(organ_root, organ_weights, variant=organ_variant, device=where, fast=fast)
    classify = TraumaClassifier(trauma_root, trauma_weights, variant, where, fast)
    return Models(segment, classify, names, classify.series_mode)


def find_bundles(bundles_dir: Path | str | None) -> tuple[Path, Path]:
    """Find both bundles, organ and trauma; see :func:`find_bundle`."""
    place = None if bundles_dir is None else Path(bundles_dir)
    return find_bundle(ORGAN_BUNDLE, place), find_bundle(TRAUMA_BUNDLE, place)


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
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {name!r}, but torch finds no CUDA device; use cpu or auto.")
    return device


def name_with_checksum(weights: Path) -> str:
    """Name a file and its content, for the report.

    Raises:
        FileNotFoundError: when there is no such file.
    """
    if not weights.is_file():
        raise FileNotFoundError(f"no weights at {weights}: train the bundle, or copy its model.pt there.")
    return f"{weights.name} (sha256 {sha256_of(weights)[:12]})"
