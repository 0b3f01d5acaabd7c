"""What ``-m`` names: a bundle's folder or the TorchScript of a bundle -> one folder that the App SDK can run.

The SDK reads one inference config and takes every value in it as it stands. So the config is written anew, with the
variant merged into it and the paths of this machine, beside a link to the weights; the bundle itself stays untouched.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

from monai.bundle import ConfigParser

from trauma_monai.bundle_files import ORGAN_BUNDLE, config_files, find_bundle
from trauma_monai.files import name_with_checksum, write_json
from trauma_monai.targets import ORGAN_CODES, TARGETS

__all__ = ["DeployModel", "read_model"]


class DeployModel(NamedTuple):
    """A bundle that is ready to be run.

    Attributes:
        task: what it does, by its metadata.
        root: folder of the bundle.
        weights: its model.ts or model.pt.
        config: its inference config, complete.
        metadata: content of its metadata.json.
        names: variants, names and checksums of weights, for the results.
    """

    task: Literal["organs", "trauma"]
    root: Path
    weights: Path
    config: dict[str, Any]
    metadata: dict[str, Any]
    names: dict[str, str]

    def write(self, folder: Path) -> Path:
        """Write the bundle folder that the SDK runs, and return it."""
        for name, content in (("inference", self.config), ("metadata", self.metadata)):
            write_json(folder / "configs" / f"{name}.json", content)
        (folder / "models").mkdir()
        (folder / "models" / f"model{self.weights.suffix}").symlink_to(self.weights.resolve())
        return folder


def read_model(
    path: Path, variant: str | None = None, organ_model: Path | None = None, organ_variant: str | None = None
) -> DeployModel:
    """Read a bundle's configs and find its weights.

    Args:
        path: folder of a bundle with models/model.pt or model.ts; or a model.ts that `monai.bundle ckpt_export` wrote.
        variant: variant of the bundle that the weights belong to; a model.ts carries its own.
        organ_model: folder of the organ bundle that makes the masks for the trauma bundle; by default the one that its
            config names, or for a model.ts the one that comes with this package.
        organ_variant: variant of that organ bundle.

    Raises:
        FileNotFoundError: when there is no such file or folder, or no weights in it.
        ValueError: for another kind of bundle, an unknown variant, and options that do not fit the bundle.
    """
    if path.is_dir():
        root, weights = path.resolve(), _find_weights(path)
        config, metadata = _read_folder(path, variant)
    elif path.is_file() and path.suffix == ".ts":
        if variant is not None:
            raise ValueError(f"{path.name} carries the variant that it was exported with; leave --variant out.")
        root, weights = path.resolve().parents[1], path
        config, metadata, variant = _read_torchscript(path)
    else:
        raise FileNotFoundError(f"{path} is neither a bundle's folder nor a model.ts.")
    task = _task_of(metadata, path)
    config |= {"bundle_root": str(root)}
    names = {"variant": variant or "default", "weights": name_with_checksum(weights)}
    if task == "organs":
        if organ_model is not None or organ_variant is not None:
            raise ValueError(f"{path} is the organ bundle itself; --organ-model and --organ-variant go with the other.")
        return DeployModel(task, root, weights, config, metadata, names)
    if organ_model is None and path.is_file():
        organ_model = find_bundle(ORGAN_BUNDLE)
    if organ_model is not None:
        config |= {"organ_bundle_root": str(organ_model.resolve()), "organ_weights": None}
    if organ_variant is not None:
        config["organ_variant"] = organ_variant
    return DeployModel(task, root, weights, config, metadata, names | _organ_names(config))


def _read_folder(folder: Path, variant: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    config = ConfigParser.load_config_files([str(file) for file in config_files(folder, variant)])
    metadata = folder / "configs" / "metadata.json"
    if not metadata.is_file():
        raise FileNotFoundError(f"{folder} has no configs/metadata.json; expected the folder of a bundle.")
    return config, json.loads(metadata.read_text(encoding="utf-8"))


def _read_torchscript(path: Path) -> tuple[dict[str, Any], dict[str, Any], str | None]:
    """Read what `ckpt_export` put beside the network: inference.json, metadata.json, maybe a variant, with its name."""
    try:
        with zipfile.ZipFile(path) as archive:
            found = {
                PurePosixPath(name).stem: json.loads(archive.read(name))
                for name in archive.namelist()
                if PurePosixPath(name).parent.name == "extra" and name.endswith(".json")
            }
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is no TorchScript file.") from error
    if missing := [name for name in ("inference", "metadata") if name not in found]:
        raise ValueError(
            f"{path} carries no {' and '.join(missing)}; export it with `monai.bundle ckpt_export --config_file "
            "configs/inference.yaml`."
        )
    config, metadata = found.pop("inference"), found.pop("metadata")
    if len(found) > 1:
        raise ValueError(f"{path} carries several overlays ({', '.join(sorted(found))}), and not their order.")
    variant = next(iter(found), None)
    return {**config, **found.get(variant or "", {})}, metadata, variant


def _find_weights(root: Path) -> Path:
    for name in ("model.pt", "model.ts"):  # the state dict is the truth, TorchScript made from it
        if (root / "models" / name).is_file():
            return root / "models" / name
    raise FileNotFoundError(f"no weights at {root / 'models/model.pt'}: train the bundle, or copy its model.pt there.")


def _task_of(metadata: Mapping[str, Any], path: Path) -> Literal["organs", "trauma"]:
    try:
        output = metadata["network_data_format"]["outputs"]["pred"]
        labels = set(output["channel_def"].values())
    except (KeyError, AttributeError) as error:
        raise ValueError(f"the metadata of {path} do not describe the output 'pred'.") from error
    if output["type"] == "image" and labels == {"background", *ORGAN_CODES}:
        return "organs"
    if output["type"] == "probabilities" and labels <= set(TARGETS):
        return "trauma"
    raise ValueError(
        f"{path} predicts {output['type']} of {', '.join(sorted(labels))}; this app runs the organ and trauma bundles."
    )


def _organ_names(config: Mapping[str, Any]) -> dict[str, str]:
    """Name the organ bundle's weights; they are missed now rather than in the middle of the run."""
    parser = ConfigParser(dict(config))
    root = Path(parser.get_parsed_content("organ_bundle_root"))
    weights = Path(parser.get_parsed_content("organ_weights") or root / "models/model.pt")
    if not weights.is_file():
        raise FileNotFoundError(f"no organ weights at {weights}; give the organ bundle's folder with --organ-model.")
    variant = parser.get_parsed_content("organ_variant")
    config_files(root, variant)
    return {"organ_variant": variant or "default", "organ_weights": name_with_checksum(weights)}
