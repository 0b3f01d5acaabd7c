"""What a packaged bundle must be: the rules of the MONAI model zoo, and our own.

A package that passes does with MONAI's tools what its metadata says; the zoo's own checks ask for less.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import torch
import yaml
from monai.bundle import ConfigParser, ReferenceResolver
from monai.bundle.properties import InferProperties, TrainProperties
from monai.utils import BundleProperty, BundlePropertyConfig
from torch import nn

from trauma_monai.bundle_files import ORGAN_BUNDLE
from trauma_monai.bundle_metadata import FRAMEWORKS, example_shape, find_metadata_problems
from trauma_monai.files import sha256_of
from trauma_monai.networks import load_weights
from trauma_monai.organs import OrganSegmenter
from trauma_monai.vendoring import PACKAGE, missing_modules, outside_packages

__all__ = ["LARGE_FILE", "LARGE_FILES", "OVERLAYS", "WORKFLOWS", "check_package"]

WORKFLOWS = ("train", "inference")
OVERLAYS = {
    "evaluate": ("train",),
    "multi_gpu_train": ("train",),
    "multi_gpu_evaluate": ("train", "evaluate"),
}
"""Config -> the configs that it is laid over."""

LARGE_FILE = 25 * 1024 * 1024
"""Bytes; the zoo's repository takes no larger file."""

LARGE_FILES = "large_files.yml"

# Beyond what MONAI requires of each workflow: what MONAI Label, MONAI Deploy and `monai.bundle` go by.
OWN_IDS = {
    "train": ("network_def", "train::handlers", "validate::evaluator", "validate::handlers", "training"),
    "inference": ("preprocessing", "postprocessing", "handlers", "displayable_configs"),
    "evaluate": ("evaluating",),
    "multi_gpu_train": ("training",),
    "multi_gpu_evaluate": ("evaluating",),
}
EVERYWHERE = ("initialize", "run")

OWN_OF_EACH_WORKFLOW = {
    *("output_dir", "dataset_dir", "imports", "initialize", "run", "network", "num_workers", "amp"),
    "displayable_configs",
}
"""Names that train and inference may both have with different values. All others are the system, which is one."""

TOLERANCE = 1e-4
"""Of logits, absolute and relative: TorchScript may take sums in another order."""


def check_package(folder: str | Path) -> None:
    """Check a packaged bundle: files, metadata, config ids, vendored modules, network and weights.

    The network is built from this installation's components, and compared with the package's TorchScript.

    Raises:
        ValueError: naming all that is wrong in the first of these that is.
    """
    content = _Package(Path(folder))
    checks: tuple[Callable[[_Package], Iterator[str]], ...] = (
        _find_layout_problems,
        _find_config_problems,
        _find_differences,
        lambda package: find_metadata_problems(package.metadata, package.configs["inference"]),
        _find_module_problems,
        _find_network_problems,
    )
    for check in checks:
        if problems := list(check(content)):
            raise ValueError(f"the package is not sound: {'; '.join(problems)}.")


class _Package:
    """The files of a package, each read once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.weights = folder / "models/model.pt"
        self.torchscript = folder / "models/model.ts"

    @cached_property
    def metadata(self) -> dict[str, Any]:
        return ConfigParser.load_config_file(self.folder / "configs/metadata.json")

    @cached_property
    def configs(self) -> dict[str, dict[str, Any]]:
        return {name: ConfigParser.load_config_file(self._config(name)) for name in (*WORKFLOWS, *OVERLAYS)}

    def merge(self, name: str) -> ConfigParser:
        """A workflow, or an overlay on what it is laid over."""
        files = [self._config(each) for each in (*OVERLAYS.get(name, ()), name)]
        return ConfigParser(ConfigParser.load_config_files(files))

    def _config(self, name: str) -> Path:
        return self.folder / f"configs/{name}.json"


def _find_layout_problems(package: _Package) -> Iterator[str]:
    configs = [f"configs/{name}.json" for name in (*WORKFLOWS, *OVERLAYS, "metadata")]
    for name in ("LICENSE", "docs/README.md", "configs/logging.conf", *configs):
        if not (package.folder / name).is_file():
            yield f"{name} is missing"
    for file in sorted(package.folder.glob("configs/*.y*ml")):
        yield f"configs/{file.name} stands beside JSON: MONAI's tools differ in which they take"
    if package.torchscript.is_file() and not package.weights.is_file():
        yield "models/model.ts stands alone, without models/model.pt"
    listed = _listed_large_files(package.folder / LARGE_FILES)
    for file in sorted(package.folder.rglob("*")):
        name = file.relative_to(package.folder).as_posix()
        if file.is_file() and file.stat().st_size > LARGE_FILE and listed.get(name) != sha256_of(file):
            yield f"{name} exceeds {LARGE_FILE >> 20} MB, and {LARGE_FILES} does not list it with its sha256"


def _listed_large_files(file: Path) -> dict[str, str]:
    entries = yaml.safe_load(file.read_text(encoding="utf-8"))["large_files"] if file.is_file() else []
    return {entry["path"]: entry["hash_val"] for entry in entries}


def _find_config_problems(package: _Package) -> Iterator[str]:
    for name in (*WORKFLOWS, *OVERLAYS):
        try:
            parser = package.merge(name)
        except (KeyError, ValueError) as error:  # a nested id whose parent is not there; an id that occurs twice
            yield f"{name}.json cannot be read: {error}"
            continue
        expected = [*_required_ids(name), *OWN_IDS[name], *EVERYWHERE]
        if missing := [item for item in expected if item not in parser]:
            yield f"{name}.json lacks {', '.join(missing)}"
        if dangling := sorted(item for item in _references(parser.get()) if item not in parser):
            yield f"{name}.json refers to {', '.join(dangling)}, which it does not have"


def _find_differences(package: _Package) -> Iterator[str]:
    """What is trained must be what is applied, and evaluating must not train."""
    train, inference = package.configs["train"], package.configs["inference"]
    for name in sorted(train.keys() & inference.keys() - OWN_OF_EACH_WORKFLOW):
        if train[name] != inference[name]:
            yield f"{name} is {train[name]} in train.json and {inference[name]} in inference.json"
    if package.configs["evaluate"].get("run") == train["run"] or "run" not in package.configs["evaluate"]:
        yield "evaluate.json has no run of its own: it would train"


def _required_ids(name: str) -> list[str]:
    """What MONAI requires of a workflow; overlays lie over training."""
    properties = InferProperties if name == "inference" else TrainProperties
    return [str(entry[BundlePropertyConfig.ID]) for entry in properties.values() if entry.get(BundleProperty.REQUIRED)]


def _references(value: Any) -> set[str]:
    """Ids that a config refers to, ``@id`` or ``%id`` of its own file."""
    if isinstance(value, Mapping):
        return set().union(*(_references(item) for item in value.values()))
    if isinstance(value, list):
        return set().union(*(_references(item) for item in value))
    if not isinstance(value, str):
        return set()
    macro = {value[1:]} if value.startswith("%") else set()
    return macro | set(ReferenceResolver.match_refs_pattern(value))


def _find_module_problems(package: _Package) -> Iterator[str]:
    if missing := missing_modules(package.configs.values(), package.folder):
        yield f"the vendored modules lack {', '.join(missing)}"
    named = {_same(name) for name in (*FRAMEWORKS, *package.metadata["required_packages_version"])}
    providers = packages_distributions()
    for module in sorted(outside_packages(package.folder.joinpath(PACKAGE).rglob("*.py"))):
        if not named & {_same(distribution) for distribution in providers.get(module, [module])}:
            yield f"the modules import {module}, of which required_packages_version in metadata.json names no package"


def _same(distribution: str) -> str:
    return distribution.lower().replace("_", "-")


def _find_network_problems(package: _Package) -> Iterator[str]:
    try:
        network = ConfigParser(dict(package.configs["inference"])).get_parsed_content("network_def").eval()
        if package.weights.is_file():
            load_weights(network, package.weights)
        yield from _find_output_problems(package, network)
        if (organs := package.folder / ORGAN_BUNDLE).is_dir():
            OrganSegmenter(organs, organs / "models/model.pt", device="cpu")
    except (ValueError, RuntimeError, OSError) as error:
        yield f"the network is not what the package says: {error}"


def _find_output_problems(package: _Package, network: nn.Module) -> Iterator[str]:
    """Run the network, and its TorchScript, on an input of the shape that the metadata declares."""
    example = torch.rand(example_shape(package.metadata, package.configs["inference"]))
    output = package.metadata["network_data_format"]["outputs"]["pred"]
    groups_or_channels = example.shape[1] if output["format"] == "classification" else output["num_channels"]
    expected = (1, groups_or_channels, *output["spatial_shape"])
    with torch.inference_mode():
        pred = network(example)
    if tuple(pred.shape) != expected:
        yield f"the network answers {tuple(example.shape)} with {tuple(pred.shape)}, the metadata say {expected}"
    elif package.torchscript.is_file():
        yield from _find_torchscript_problems(package, example, pred)


def _find_torchscript_problems(package: _Package, example: torch.Tensor, pred: torch.Tensor) -> Iterator[str]:
    carried = {"metadata.json": "", "inference.json": ""}
    scripted = torch.jit.load(package.torchscript, map_location="cpu", _extra_files=carried).eval()
    with torch.inference_mode():
        difference = (scripted(example) - pred).abs()
    if not bool((difference <= TOLERANCE * (1 + pred.abs())).all()):
        yield f"models/model.ts differs from the network by up to {float(difference.max()):.2g}"
    for name, own in (("metadata.json", package.metadata), ("inference.json", package.configs["inference"])):
        if not carried[name] or json.loads(carried[name]) != own:
            yield f"models/model.ts does not carry the package's {name}"
