"""Stages 3 to 5 as a callable: the classification bundle, built by its own inference config."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged

from trauma_monai.bundle_files import config_files
from trauma_monai.networks import load_weights
from trauma_monai.organs import SegmentOrgansd
from trauma_monai.pooling import ModelOutput, PoolSlicesd, SeriesMode
from trauma_monai.results import SliceScores

__all__ = ["TraumaClassifier", "TraumaFlow"]

REFERENCE = re.compile(r"@(\w+)")
"""Names of other entries within the text of a config entry."""


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
        self.series_mode: SeriesMode = parser.get("series_mode", "max")
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

    def __call__(self, image: MetaTensor, organs: MetaTensor) -> tuple[list[ModelOutput], SliceScores]:
        """Classify one series.

        Args:
            image: HU, shape (1, X, Y, Z) in any orientation.
            organs: label map on the same grid.

        Returns:
            What the network says of the series, and the scores along z without their positions in mm.
        """
        sample = self.flow.prepare(image, organs)
        probabilities = self.flow.run(self.network, sample)
        return [ModelOutput(self.flow.pool(probabilities))], self.flow.scores(sample, probabilities)
