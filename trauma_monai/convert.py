"""Published checkpoint -> weights of our networks.

The winners of RSNA 2023 Abdominal Trauma Detection trained networks of the same structure under other names. A
converted file gives the same logits. Layers that only served their training are left out, and listed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from monai.bundle import ConfigParser
from torch import nn

from trauma_monai.bundle_files import config_files, find_bundle
from trauma_monai.files import complete_or_absent
from trauma_monai.networks.weights import check_weights, describe, read_tensors

__all__ = ["Conversion", "convert_checkpoint", "convert_for_bundle"]


class Conversion(NamedTuple):
    """What became of a checkpoint's tensors.

    Attributes:
        system: the published system that the checkpoint belongs to.
        used: how many tensors the network took.
        dropped: part of the checkpoint -> why it is left out, for the parts that were there.
    """

    system: str
    used: int
    dropped: dict[str, str]


class _Layout(NamedTuple):
    """How one family of published networks names its tensors.

    Attributes:
        system: its name.
        marker: prefix that only this family has.
        renames: (pattern at the start of a name, replacement); the first that matches counts.
        dropped: prefix -> why tensors under it are left out.
    """

    system: str
    marker: str
    renames: tuple[tuple[str, str], ...]
    dropped: dict[str, str]


_MASK_HEADS = {name: "organ-mask head, training only" for name in ("mask_head_3.", "mask_head_4.")}

_LAYOUTS = (
    _Layout(
        system="1st place 2023, CoaT-Lite classifier",
        marker="enc.",
        renames=(
            (r"enc\.patch_embed([1-4])\.proj\.", r"encoder.stages.{stage}.projection."),
            (r"enc\.patch_embed([1-4])\.norm\.", r"encoder.stages.{stage}.norm."),
            (r"enc\.cls_token([1-4])$", r"encoder.stages.{stage}.class_token"),
            (r"enc\.serial_blocks([1-4])\.", r"encoder.stages.{stage}.blocks."),
            # All blocks of a stage share these two, and so hold the same tensors.
            (r"enc\.cpe([1-4])\.", r"encoder.stages.{stage}.blocks.0.cpe."),
            (r"enc\.crpe([1-4])\.", r"encoder.stages.{stage}.blocks.0.factoratt_crpe.crpe."),
            (r"lstm2\.", "rnn."),
            (r"head\.1\.", "classifier."),
        ),
        dropped={
            "lstm.": "recurrent layers that the published network builds and never calls",
            "dec4.": "organ-mask U-Net, training only",
            "dec3.": "organ-mask U-Net, training only",
            "dec2.": "organ-mask U-Net, training only",
            "fpn.": "organ-mask U-Net, training only",
            "final_conv.": "organ-mask U-Net, training only",
            **_MASK_HEADS,
        },
    ),
    _Layout(
        system="1st place 2023, EfficientNetV2-S classifier",
        marker="encoder.model.",
        renames=(
            (r"encoder\.model\.", "encoder."),
            (r"conv_head\.", "encoder.head.conv_head."),
            (r"bn2\.", "encoder.head.bn2."),
            (r"lstm\.", "rnn."),
            (r"head\.1\.", "classifier."),
        ),
        dropped={
            "decoder.": "organ-mask U-Net, training only",
            "segmentation_head.": "organ-mask U-Net, training only",
            **_MASK_HEADS,
        },
    ),
    _Layout(
        system="1st place 2023, organ segmentation",
        marker="segmentation_head.",
        renames=((r"(?=encoder\.|decoder\.|segmentation_head\.)", ""),),  # the same names
        dropped={"encoder.layer4.": "stage of the encoder whose output the decoder does not take"},
    ),
)


def convert_for_bundle(checkpoint: Path, out: Path, bundle: str, variant: str | None = None) -> Conversion:
    """Write a published checkpoint as weights of a bundle.

    Args:
        checkpoint: see :func:`convert_checkpoint`.
        out: see :func:`convert_checkpoint`.
        bundle: name of the bundle, ``trauma_ct_classification`` or ``organ_ct_segmentation``.
        variant: the bundle's variant that the checkpoint belongs to; None for the bundle as it stands.

    Raises:
        FileNotFoundError: see :func:`convert_checkpoint`.
        ValueError: for an unknown bundle or variant, and see :func:`convert_checkpoint`.
    """
    bundle_root = find_bundle(bundle)
    parser = ConfigParser(ConfigParser.load_config_files(config_files(bundle_root, variant)))
    parser["bundle_root"] = str(bundle_root)
    return convert_checkpoint(checkpoint, parser.get_parsed_content("network_def"), out)


def convert_checkpoint(checkpoint: Path, network: nn.Module, out: Path) -> Conversion:
    """Write a published checkpoint as weights of one of our networks.

    Args:
        checkpoint: file as the published training scripts write it; read without running code from it.
        network: the network to fill, of the size that the checkpoint has: a SliceSequenceNet or an InflatedUNet. It
            holds the converted weights afterwards.
        out: where to write the state dict; its folder is made, and the file appears only once it is complete.

    Raises:
        FileNotFoundError: when there is no checkpoint.
        ValueError: when it is none of the known systems, holds tensors that nobody knows, or does not fit the network:
            the message names what is missing, left over or of another shape.
    """
    published = _read_checkpoint(Path(checkpoint))
    layout = _find_layout(published, checkpoint)
    weights, dropped = _rename(published, layout, checkpoint)
    missing = [name for name in network.state_dict() if name not in weights]
    if missing:
        published_names = ", ".join(f"{name} (there {_published_name(name, layout)})" for name in missing)
        raise ValueError(
            f"{checkpoint} ({layout.system}) does not fit {type(network).__name__}. missing: {published_names}."
        )
    check_weights(weights, network, f"{checkpoint} ({layout.system})")
    network.load_state_dict(weights)
    with complete_or_absent(Path(out), "wb") as file:
        torch.save(dict(network.state_dict()), file)
    used = len(published) - sum(dropped.values())
    return Conversion(layout.system, used, {part: layout.dropped[part] for part in dropped})


def _read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors; undo what DistributedDataParallel and common savers wrap around them."""
    content: Any = read_tensors(path)
    for wrapper in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no state dict (name -> tensor).")
    plain = {name.removeprefix("module."): tensor for name, tensor in content.items()}
    if len(plain) < len(content):
        raise ValueError(f"{path} holds tensors both with and without the prefix 'module.'; expected one of the two.")
    return plain


def _find_layout(published: Mapping[str, torch.Tensor], source: Path) -> _Layout:
    for layout in _LAYOUTS:
        if any(name.startswith(layout.marker) for name in published):
            return layout
    known = "; ".join(layout.system for layout in _LAYOUTS)
    raise ValueError(f"{source} is of no known system. Known: {known}. It holds {describe(list(published))}.")


def _rename(
    published: Mapping[str, torch.Tensor], layout: _Layout, source: Path
) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """Give every tensor its new name; count the dropped ones per part."""
    weights: dict[str, torch.Tensor] = {}
    dropped: dict[str, int] = {}
    unknown: list[str] = []
    for name, tensor in published.items():
        if part := next((prefix for prefix in layout.dropped if name.startswith(prefix)), None):
            dropped[part] = dropped.get(part, 0) + 1
            continue
        new = _new_name(name, layout)
        if new is None:
            unknown.append(name)
        elif new in weights and not torch.equal(weights[new], tensor):
            raise ValueError(f"{source} holds two different tensors for {new}, which the network shares: {name}.")
        else:
            weights[new] = tensor
    if unknown:
        raise ValueError(f"{source} ({layout.system}) holds tensors without a place: {describe(unknown)}.")
    return weights, dropped


def _new_name(name: str, layout: _Layout) -> str | None:
    for pattern, replacement in layout.renames:
        if match := re.match(pattern, name):
            stage = int(match[1]) - 1 if match.groups() else None  # published stages count from 1
            return replacement.format(stage=stage) + name[match.end() :]
    return None


def _published_name(name: str, layout: _Layout) -> str:
    """Where a checkpoint has one of our tensors: :func:`_new_name` backwards."""
    for pattern, replacement in layout.renames:
        for stage in range(4):
            ours = replacement.format(stage=stage)
            if ours and name.startswith(ours):
                theirs = pattern.replace("([1-4])", str(stage + 1)).replace("\\.", ".").rstrip("$")
                return theirs + name[len(ours) :]
    return name
