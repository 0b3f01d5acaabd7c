"""Stages 2 to 5 with several networks: checkpoints of one variant are averaged slice by slice, variants after pooling.

An ensemble is a list in a YAML file::

    folder: ../../models     # of checkpoints and scales, from the file on; its own folder unless given
    scales: oof.yaml         # factors from `trauma-monai oof`, if any
    members:
    - {variant: organs_coat_m_heads, fold: -1, seed: 7, checkpoint: a.pt, weight: 1.0}
    - ...

``fold`` and ``seed`` say how a checkpoint was trained; only its variant, file and weight (1 unless given) count.

Source: 1st place, RSNA 2023: https://github.com/Nischaydnk/RSNA-2023-1st-place-solution ("within folds of each models,
slice level ensemble; different architectures and data after the max aggregation").
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
import yaml
from monai.data import MetaTensor

from trauma_monai.classifier import TraumaFlow
from trauma_monai.files import name_with_checksum
from trauma_monai.networks import load_weights
from trauma_monai.pooling import ModelOutput, merge_models
from trauma_monai.results import SliceScores
from trauma_monai.targets import TARGETS

__all__ = ["Ensemble", "EnsembleClassifier", "Member", "read_ensemble", "read_scales"]

ENTRIES = {"folder", "scales", "members"}
"""What an ensemble file may hold."""

MEMBER_ENTRIES = {"variant", "fold", "seed", "checkpoint", "weight"}
"""What a member of the list may hold; ``variant`` and ``checkpoint`` must be there."""


class Member(NamedTuple):
    """One checkpoint of an ensemble.

    Attributes:
        variant: variant of the bundle that it belongs to.
        checkpoint: state dict of its network.
        weight: what it counts for among the checkpoints of its variant; a variant counts for the mean of them.
    """

    variant: str
    checkpoint: Path
    weight: float = 1.0


class Ensemble(NamedTuple):
    """What an ensemble file lists.

    Attributes:
        members: the checkpoints, at least one.
        scales: the file with factors for the columns of the competition; None without.
    """

    members: tuple[Member, ...]
    scales: Path | None = None

    def checksum(self) -> str:
        """Of all that a prediction depends on: variants, weights, the content of checkpoints and scales."""
        parts = [f"{member.variant} {member.weight} {name_with_checksum(member.checkpoint)}" for member in self.members]
        if self.scales is not None:
            parts.append(name_with_checksum(self.scales))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


Model: TypeAlias = tuple[TraumaFlow, list[Member]]
"""A variant and its checkpoints."""


class Answer(NamedTuple):
    """What one variant says of a series.

    Attributes:
        output: over the series, with the variant's weight among the others.
        scores: along z.
    """

    output: ModelOutput
    scores: SliceScores


class EnsembleClassifier:
    """All networks of an ensemble, called for every series like one.

    A series is read once by the caller, and each kind of stack (crop or none, say) is made once. One stack and one
    network are in memory at a time, however many checkpoints and series there are. The price is that every
    checkpoint is read again for every series: 0.2 s for 47 M parameters. A network is built anew, 0.7 s, only where
    its architecture differs from the one before.

    Args:
        bundle_root: folder of the classification bundle.
        members: its checkpoints.
        device: where the networks run.
        fast: see :func:`trauma_monai.for_inference`.

    Raises:
        ValueError: for an unknown variant, and when variants pool series differently.
    """

    def __init__(self, bundle_root: Path, members: Sequence[Member], device: torch.device, fast: bool = False) -> None:
        by_variant: dict[str, list[Member]] = {}
        for member in members:
            by_variant.setdefault(member.variant, []).append(member)
        models = [(TraumaFlow(bundle_root, variant, device, fast), own) for variant, own in by_variant.items()]
        # Neighbours share their stack, and then their architecture, so that both are kept as long as they serve.
        self.models = sorted(models, key=lambda model: (_stack_of(model), _architecture_of(model)))
        modes = {flow.series_mode for flow, _ in models}
        if len(modes) > 1:
            raise ValueError(f"the variants pool series by {' and '.join(sorted(modes))}; an ensemble needs one way.")
        self.series_mode = modes.pop()

    def __call__(self, image: MetaTensor, organs: MetaTensor) -> tuple[list[ModelOutput], SliceScores]:
        """Classify one series.

        Args:
            image: HU, shape (1, X, Y, Z) in any orientation.
            organs: label map on the same grid.

        Returns:
            What each variant says of the series, to be pooled by :func:`trauma_monai.pooling.pool_study`, and the
            scores along z without their positions in mm: those of the first variant's slices, to which those of the
            others are interpolated.

        Raises:
            FileNotFoundError: when a checkpoint is gone.
            ValueError: when a checkpoint does not fit its variant.
        """
        answers = [
            answer
            for _, alike in groupby(self.models, key=_stack_of)
            for answer in _with_one_stack(list(alike), image, organs)
        ]
        return [answer.output for answer in answers], _merge_scores(answers)


def read_ensemble(path: Path) -> Ensemble:
    """Read an ensemble file.

    Raises:
        FileNotFoundError: when the file, the scales or a checkpoint is not there.
        ValueError: when it is not such a file, or names the same checkpoint twice.
    """
    content = _read_yaml(path)
    if not isinstance(content, dict) or not content.get("members") or set(content) - ENTRIES:
        raise ValueError(f"{path} is no ensemble; expected entries {sorted(ENTRIES)}, with at least one member.")
    folder = path.parent / content.get("folder", ".")
    members = tuple(_read_member(entry, folder, path) for entry in content["members"])
    files = [member.checkpoint for member in members]
    if twice := {file.name for file in files if files.count(file) > 1}:
        raise ValueError(f"{path} lists {', '.join(sorted(twice))} more than once; give it a larger weight instead.")
    if missing := [file.name for file in files if not file.is_file()]:
        raise FileNotFoundError(
            f"{len(missing)} of {len(files)} checkpoints of {path.name} are not in {folder.resolve()}, the first is "
            f"{missing[0]}: train the variants, or convert published ones."
        )
    scales = None if content.get("scales") is None else folder / content["scales"]
    if scales is not None and not scales.is_file():
        raise FileNotFoundError(f"no scales at {scales}; fit them with 'trauma-monai oof', or leave the entry out.")
    return Ensemble(members, scales)


def read_scales(path: Path) -> dict[str, float]:
    """Read the factors that ``trauma-monai oof`` fitted.

    Raises:
        ValueError: when the file holds none.
    """
    content = _read_yaml(path)
    if not isinstance(content, dict) or not isinstance(content.get("scales"), dict):
        raise ValueError(f"{path} holds no scales (column -> factor); expected what 'trauma-monai oof' writes.")
    return {str(column): float(factor) for column, factor in content["scales"].items()}


def _stack_of(model: Model) -> str:
    return model[0].text_of("preprocessing")


def _architecture_of(model: Model) -> str:
    return model[0].text_of("network_def")


def _with_one_stack(models: Sequence[Model], image: MetaTensor, organs: MetaTensor) -> Iterator[Answer]:
    sample = models[0][0].prepare(image, organs)
    for _, alike in groupby(models, key=_architecture_of):
        yield from _with_one_network(list(alike), sample)


def _with_one_network(models: Sequence[Model], sample: Mapping[str, Any]) -> Iterator[Answer]:
    network = models[0][0].build_network()
    for flow, members in models:
        probabilities = _average(flow, network, members, sample)
        weight = float(np.mean([member.weight for member in members]))
        yield Answer(ModelOutput(flow.pool(probabilities), weight), flow.scores(sample, probabilities))


def _average(
    flow: TraumaFlow, network: torch.nn.Module, members: Sequence[Member], sample: Mapping[str, Any]
) -> torch.Tensor:
    """Mean over the checkpoints of one variant, probabilities of shape (W, S, T)."""
    weighted = [
        member.weight * flow.run(load_weights(network, member.checkpoint), sample).double() for member in members
    ]
    return (sum(weighted[1:], weighted[0]) / sum(member.weight for member in members)).float()


def _merge_scores(answers: Sequence[Answer]) -> SliceScores:
    """Average the curves along z, target by target."""
    first = answers[0].scores
    curves = [
        {
            target: np.interp(first.z_index, scores.z_index, scores.probabilities[:, column])
            for column, target in enumerate(scores.targets)
        }
        for _, scores in answers
    ]
    merged = merge_models(curves, [answer.output.weight for answer in answers])
    targets = tuple(name for name in TARGETS if name in merged)
    values = np.stack([merged[name] for name in targets], axis=1).astype(np.float32)
    return replace(first, targets=targets, probabilities=values)


def _read_member(entry: Any, folder: Path, source: Path) -> Member:
    known = isinstance(entry, dict) and {"variant", "checkpoint"} <= set(entry) <= MEMBER_ENTRIES
    if not known:
        raise ValueError(
            f"{source} has the member {entry!r}; expected variant and checkpoint, and maybe fold, seed and weight."
        )
    weight = float(entry.get("weight", 1.0))
    if not weight > 0:
        raise ValueError(f"{source} gives {entry['checkpoint']} the weight {weight:g}; expected above 0.")
    return Member(str(entry["variant"]), folder / entry["checkpoint"], weight)


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
