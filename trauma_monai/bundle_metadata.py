"""What a bundle's metadata.json says, made true for a variant and an installation, and checked.

The schema is MONAI's of 2024-07-25, https://github.com/Project-MONAI/MONAI-extra-test-data; the model zoo asks for more
than it requires.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from importlib import metadata as installed
from typing import Any

from trauma_monai.targets import ORGAN_CODES

__all__ = ["complete_metadata", "describe_network", "example_shape", "find_metadata_problems", "requirements"]

FRAMEWORKS = {"monai": "monai_version", "torch": "pytorch_version", "numpy": "numpy_version"}
"""Package -> the entry that holds its version; all other packages are in ``required_packages_version``."""

REQUIRED = (
    *("schema", "version", "changelog", *FRAMEWORKS.values(), "required_packages_version", "name", "task"),
    *("description", "authors", "copyright", "data_source", "data_type", "intended_use", "references"),
    *("eval_metrics", "supported_apps", "network_data_format"),
)
TYPES: dict[str, type | tuple[type, ...]] = {
    "changelog": dict,
    "required_packages_version": dict,
    "network_data_format": dict,
    "eval_metrics": dict,
    "supported_apps": dict,
    "references": list,
}
"""Of the entries that are no text, in the zoo's schema."""

REQUIRED_OF_TENSOR = ("type", "format", "num_channels", "spatial_shape", "dtype", "value_range", "channel_def")

HIGHEST_VERSION_PART = 9
"""The zoo sorts versions as text, so that 0.10.0 would come before 0.9.0."""


def complete_metadata(metadata: Mapping[str, Any], config: Mapping[str, Any], variant: str | None) -> dict[str, Any]:
    """Fill in what depends on the variant and on the installed packages.

    Args:
        metadata: the bundle's metadata, whose packages are named with any version.
        config: the inference config with the variant in it.
        variant: name of the variant, None for the bundle as it stands.

    Raises:
        ValueError: when a package that the bundle requires is not installed.
    """
    complete = copy.deepcopy(dict(metadata))
    complete |= {entry: _installed_version(package) for package, entry in FRAMEWORKS.items()}
    complete["required_packages_version"] = {
        package: _installed_version(package) for package in sorted(metadata["required_packages_version"])
    }
    complete["variant"] = variant or "default"
    complete["network_data_format"] = describe_network(metadata["network_data_format"], config)
    return complete


def requirements(metadata: Mapping[str, Any]) -> list[str]:
    """List the packages of complete metadata as pip takes them, ``name==version``."""
    versions = {package: metadata[entry] for package, entry in FRAMEWORKS.items()}
    versions |= metadata["required_packages_version"]
    return [f"{package}=={version}" for package, version in versions.items()]


def describe_network(data_format: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``network_data_format`` with the shapes and the meaning of channels that a config gives its network.

    Args:
        data_format: as the bundle's metadata has it.
        config: the inference config of either bundle.
    """
    described = copy.deepcopy(dict(data_format))
    image, pred = described["inputs"]["image"], described["outputs"]["pred"]
    decided = described["post_processed_outputs"]["pred"]
    size = config["image_size"]
    if _takes_slice_groups(config):  # (B, S, C, Y, X) -> (B, S, T)
        groups, targets = config["num_groups"], config["targets"]
        image |= {"num_channels": groups, "spatial_shape": [config["channels"], size, size]}
        image["channel_def"] = {str(group): f"slice group {group + 1} of {groups}, upwards" for group in range(groups)}
        pred |= {"num_channels": groups, "spatial_shape": [len(targets)]}
        decided |= {"num_channels": len(targets), "spatial_shape": []}
        names = dict(enumerate(targets))
    else:  # (B, 1, Z, Y, X) -> (B, O, Z, Y, X)
        shape = [config["depth"], size, size]
        image |= {"num_channels": 1, "spatial_shape": shape}
        pred |= {"num_channels": len(ORGAN_CODES), "spatial_shape": shape}
        names = {0: "background"} | {code: organ for organ, code in ORGAN_CODES.items()}
    for output in (pred, decided):
        output["channel_def"] = {str(value): name for value, name in names.items()}
    return described


def example_shape(metadata: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the shape of a small input of the network, of which no dimension is 1 that could be more.

    Two slice groups show all that many do.
    """
    image = metadata["network_data_format"]["inputs"]["image"]
    channels = min(2, image["num_channels"]) if _takes_slice_groups(config) else image["num_channels"]
    return (1, channels, *image["spatial_shape"])


def find_metadata_problems(metadata: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[str]:
    """Name what is missing in metadata, and what is not true of a config."""
    if missing := [entry for entry in REQUIRED if entry not in metadata]:
        yield f"metadata.json lacks {', '.join(missing)}"
        return
    wrong = [entry for entry in REQUIRED if not isinstance(metadata[entry], TYPES.get(entry, str))]
    if wrong:
        yield f"metadata.json has {', '.join(wrong)} of another type than the zoo's schema"
        return
    version = metadata["version"]
    if version not in metadata["changelog"]:
        yield f"metadata.json is of version {version}, which its changelog does not tell about"
    parts = version.split(".")
    if len(parts) != 3 or any(part not in map(str, range(HIGHEST_VERSION_PART + 1)) for part in parts):
        yield f"version is {version}; expected three numbers from 0 to {HIGHEST_VERSION_PART}, as 1.2.3"
    yield from _find_tensor_problems(metadata["network_data_format"], config)


def _find_tensor_problems(data_format: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[str]:
    try:
        described = describe_network(data_format, config)
    except (KeyError, TypeError) as error:
        yield f"metadata.json does not describe inputs image, outputs pred and post_processed_outputs pred: {error}"
        return
    for side, tensors in described.items():
        for name, expected in tensors.items():
            tensor = data_format[side][name]
            if missing := [entry for entry in REQUIRED_OF_TENSOR if entry not in tensor]:
                yield f"{side} {name} lacks {', '.join(missing)}"
            if not isinstance(tensor.get("value_range", []), list):
                yield f"value_range of {side} {name} is {tensor['value_range']!r}, expected a list"
            for entry in expected:
                if entry in tensor and tensor[entry] != expected[entry]:
                    yield f"{entry} of {side} {name} is {tensor[entry]}, the configs say {expected[entry]}"


def _takes_slice_groups(config: Mapping[str, Any]) -> bool:
    return "num_groups" in config


def _installed_version(package: str) -> str:
    """Version without its local part: ``2.11.0+cpu`` is 2.11.0 in every index."""
    try:
        return installed.version(package).partition("+")[0]
    except installed.PackageNotFoundError as error:
        raise ValueError(f"the bundle requires {package}, which is not installed: pip install {package}") from error
