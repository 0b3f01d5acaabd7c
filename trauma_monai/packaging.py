"""Bundle -> package: a folder that needs only MONAI and public packages, as the MONAI model zoo takes it.

The bundle's YAML becomes JSON with the variant in it, the components that it names are copied into it, and the weights
come as state dict and as TorchScript. The same input gives the same bytes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from monai.bundle import ConfigParser
from torch import nn

from trauma_monai.bundle_files import ORGAN_BUNDLE, config_files, find_bundle, find_bundles
from trauma_monai.bundle_metadata import complete_metadata, find_metadata_problems, requirements
from trauma_monai.files import complete_or_absent, sha256_of, write_json, write_text
from trauma_monai.networks import load_weights
from trauma_monai.vendoring import find_itself, vendor
from trauma_monai.zoo_checks import LARGE_FILE, LARGE_FILES, OVERLAYS, WORKFLOWS, check_package

__all__ = ["Package", "package"]

WEIGHTS = "models/model.pt"

# The page of a bundle, read in a checkout, shows the commands for YAML. Parts of it are for readers of one form only.
CHECKOUT_ONLY = re.compile(r"<!-- checkout -->\n.*?<!-- /checkout -->\n\n?", re.DOTALL)
PACKAGE_ONLY = re.compile(r"<!-- package\n(.*?)\n/package -->", re.DOTALL)
YAML_CONFIG = re.compile(r"\bconfigs/(\w+)\.yaml\b")

VARIANT_NOTE = (
    "**This package holds the variant `{variant}`.** Its shapes, channels and settings are those of configs/; where "
    "this page names the network, sizes and rates, it speaks of the base that the variant changes."
)

ZIP_TIME = (1980, 1, 1, 0, 0, 0)
"""The earliest time that a zip can hold: that of packaging would differ each time."""


class Package(NamedTuple):
    """What :func:`package` wrote.

    Attributes:
        folder: the package.
        zip_file: the package in one file, None when that was not asked for. Beside it lies its ``.sha256``.
        remarks: what the package lacks, and what would bring it.
    """

    folder: Path
    zip_file: Path | None
    remarks: list[str]


def package(
    bundle: str | Path,
    out: str | Path,
    variant: str | None = None,
    weights: str | Path | None = None,
    organ_weights: str | Path | None = None,
    organ_variant: str | None = None,
    zipped: bool = False,
) -> Package:
    """Write a bundle as a folder that works where this project is not installed.

    Args:
        bundle: name of a bundle of this project, or the folder of one.
        out: folder to write; appears when it is complete and has passed :func:`trauma_monai.zoo_checks.check_package`.
        variant: variant that goes into the configs; None for the bundle as it stands.
        weights: state dict of the network; None for the bundle's own models/model.pt. Without either the package can
            be trained, not applied.
        organ_weights: state dict of organ_ct_segmentation, for a bundle that crops by organs. Its package then brings
            that bundle's inference and segments by itself.
        organ_variant: variant that the organ weights belong to; None for ``variant`` where the organ bundle has it.
        zipped: also write ``OUT.zip`` and ``OUT.zip.sha256``.

    Raises:
        FileNotFoundError: when a weights file is missing.
        FileExistsError: when ``out`` exists.
        ValueError: for an unknown bundle or variant, weights that do not fit, metadata that are not true of the
            configs, a package that the bundle requires and that is not installed, and whatever the check finds.
        RuntimeError: when the network does not become TorchScript.
    """
    bundle_root, out = _find_root(bundle), Path(out).absolute()
    if out.exists():
        raise FileExistsError(f"{out} exists; remove it, or name a new folder.")
    staged = out.with_name(f".{out.name}.partial")
    shutil.rmtree(staged, ignore_errors=True)
    try:
        remarks = _write(bundle_root, staged, variant, weights, organ_weights, organ_variant)
        check_package(staged)
        zip_file = _zip(staged, bundle_root.name, out.with_name(f"{out.name}.zip")) if zipped else None
        os.replace(staged, out)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return Package(out, zip_file, remarks)


def _find_root(bundle: str | Path) -> Path:
    folder = Path(bundle).expanduser().absolute()
    root = folder if (folder / "configs").is_dir() else find_bundle(str(bundle))
    if not (root / "configs/train.yaml").is_file():
        raise ValueError(f"{root} has no configs/train.yaml; expected a bundle's source, not a package.")
    return root


def _write(
    root: Path,
    out: Path,
    variant: str | None,
    weights: str | Path | None,
    organ_weights: str | Path | None,
    organ_variant: str | None,
) -> list[str]:
    configs = {name: _merge(root, name, variant) for name in (*WORKFLOWS, *OVERLAYS)}
    _refuse_unknown_names(root, variant, {name for workflow in WORKFLOWS for name in configs[workflow]})
    metadata = _read_metadata(root, configs["inference"], variant)
    remarks = []

    if "organ_bundle_root" in configs["inference"]:
        if organ_weights is not None:
            configs["inference"]["organ_bundle_root"] = f"$@bundle_root + '/{ORGAN_BUNDLE}'"
            _write_organ_bundle(root, out / ORGAN_BUNDLE, Path(organ_weights), organ_variant, variant)
        else:
            remarks.append(
                "without --organ-weights it takes only volumes that bring organ masks, "
                f"or needs a package of {ORGAN_BUNDLE} in the folder beside it"
            )
    elif organ_weights is not None or organ_variant is not None:
        raise ValueError(f"{root.name} needs no organ weights and no organ variant; leave them out.")

    for file in (root / "LICENSE", *sorted(root.glob("docs/*")), root / "configs/logging.conf"):
        _write_bytes(out / file.relative_to(root), file.read_bytes())
    write_text(out / "docs/README.md", _adapt_page((root / "docs/README.md").read_text(encoding="utf-8"), variant))
    write_json(out / "configs/metadata.json", metadata)
    for name, config in configs.items():
        write_json(out / f"configs/{name}.json", find_itself(config))
    vendor([*configs.values(), *_organ_configs(out), *_project_configs()], out)
    write_text(out / "requirements.txt", "".join(f"{line}\n" for line in requirements(metadata)))

    if weights is not None or (root / WEIGHTS).is_file():
        _write_weights(configs["inference"], Path(weights or root / WEIGHTS), out / WEIGHTS)
        _write_torchscript(out)
    else:
        remarks.append("without weights (--weights) it can be trained, not applied")
    _write_large_files(out)
    return remarks


def _merge(root: Path, name: str, variant: str | None) -> dict[str, Any]:
    """Read a config; a workflow gets those of a variant's names that it has."""
    config: dict[str, Any] = ConfigParser.load_config_file(root / f"configs/{name}.yaml")
    if variant is not None and name in WORKFLOWS:
        overlay = ConfigParser.load_config_file(config_files(root, variant)[-1])
        config |= {key: value for key, value in overlay.items() if key in config}
    return config


def _refuse_unknown_names(root: Path, variant: str | None, known: set[str]) -> None:
    """A name of a variant that no workflow has is misspelt, and would be lost without a word."""
    overlay = {} if variant is None else ConfigParser.load_config_file(config_files(root, variant)[-1])
    if unknown := sorted(set(overlay) - known):
        raise ValueError(f"variant {variant} sets {', '.join(unknown)}, which neither train nor inference has.")


def _read_metadata(root: Path, config: Mapping[str, Any], variant: str | None) -> dict[str, Any]:
    """Read the bundle's metadata, which must be true of the bundle as it stands, and make them true of the variant."""
    metadata = ConfigParser.load_config_file(root / "configs/metadata.json")
    if problems := list(find_metadata_problems(metadata, _merge(root, "inference", None))):
        raise ValueError(f"{root.name} is not as its metadata say: {'; '.join(problems)}.")
    return complete_metadata(metadata, config, variant)


# --- weights ----------------------------------------------------------------------------------------------------------


def _write_weights(config: Mapping[str, Any], weights: Path, out: Path) -> None:
    """Check weights strictly against the network, and save them in its order: same values, same bytes."""
    network: nn.Module = ConfigParser(json.loads(json.dumps(config))).get_parsed_content("network_def")
    state = load_weights(network, weights).state_dict()
    with complete_or_absent(out, "wb") as file:  # into a file: the name of a path would be in the archive
        torch.save({name: tensor.contiguous().clone() for name, tensor in state.items()}, file)


def _write_torchscript(out: Path) -> None:
    """Export models/model.ts by MONAI's own command, in a process that knows the vendored modules only.

    TorchScript numbers the classes that a process has compiled, and sorts some by hash: only a fresh process with a
    fixed hash seed gives the same bytes each time.
    """
    command = [sys.executable, "-m", "monai.bundle", "ckpt_export", "--net_id", "network_def", "--bundle_root", "."]
    command += ["--config_file", "configs/inference.json"]
    environment = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=out, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
        raise RuntimeError(f"the network does not become TorchScript: {reason[0]}")
    _forget_sources(out / "models/model.ts")


def _forget_sources(torchscript: Path) -> None:
    """Drop what TorchScript keeps for tracebacks, which names files of this machine, and the checksum over that."""
    with zipfile.ZipFile(torchscript) as archive:
        names = [name for name in archive.namelist() if not name.endswith((".debug_pkl", "/serialization_id"))]
        records = {name: archive.read(name) for name in names}
    _write_zip(torchscript, records, zipfile.ZIP_STORED)


def _write_organ_bundle(
    trauma_root: Path, out: Path, weights: Path, organ_variant: str | None, variant: str | None
) -> None:
    """Write what segmenting needs of the organ bundle: its inference config and weights."""
    root = find_bundle(ORGAN_BUNDLE, trauma_root.parent)
    if organ_variant is None and (root / f"configs/variants/{variant}.yaml").is_file():
        organ_variant = variant
    config = _merge(root, "inference", organ_variant)
    write_json(out / "configs/inference.json", config)
    _write_weights(config, weights, out / WEIGHTS)


def _organ_configs(out: Path) -> list[dict[str, Any]]:
    file = out / ORGAN_BUNDLE / "configs/inference.json"
    return [ConfigParser.load_config_file(file)] if file.is_file() else []


def _project_configs() -> list[Any]:
    """Read all configs of this project's bundles, whose modules each package brings.

    A process imports ``trauma_monai`` once. Where it serves several packages, as MONAI Label does, all of them use the
    modules of the one that was loaded first.
    """
    files = (file for root in find_bundles(None) for file in sorted((root / "configs").rglob("*.yaml")))
    return [ConfigParser.load_config_file(file) for file in files]


def _write_large_files(out: Path) -> None:
    """List the files that the zoo does not take into its repository; they lie in the package all the same."""
    large = [file for file in sorted(out.rglob("*")) if file.is_file() and file.stat().st_size > LARGE_FILE]
    entries = [
        {"path": file.relative_to(out).as_posix(), "url": "", "hash_val": sha256_of(file), "hash_type": "sha256"}
        for file in large
    ]
    if entries:
        note = "# url: where you have put the file; `python -m monai.bundle download_large_files` gets it from there.\n"
        write_text(out / LARGE_FILES, note + yaml.safe_dump({"large_files": entries}, sort_keys=False))


# --- files ------------------------------------------------------------------------------------------------------------


def _adapt_page(text: str, variant: str | None) -> str:
    """Turn a bundle's page into that of its package."""
    text = PACKAGE_ONLY.sub(r"\1", CHECKOUT_ONLY.sub("", text))
    if variant is not None:
        title, rest = text.split("\n", 1)
        text = f"{title}\n\n{VARIANT_NOTE.format(variant=variant)}\n{rest}"
    return YAML_CONFIG.sub(r"configs/\1.json", text)


def _zip(folder: Path, top: str, out: Path) -> Path:
    """Write a folder as a zip with one folder in it, named as the bundle, and the checksum as sha256sum reads it."""
    files = {
        f"{top}/{file.relative_to(folder).as_posix()}": file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    _write_zip(out, files, zipfile.ZIP_DEFLATED)
    write_text(out.with_name(f"{out.name}.sha256"), f"{sha256_of(out)}  {out.name}\n")
    return out


def _write_zip(out: Path, files: Mapping[str, bytes], compression: int) -> None:
    with complete_or_absent(out, "wb") as file, zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in files.items():
            info = zipfile.ZipInfo(name, ZIP_TIME)
            info.external_attr = 0o644 << 16
            info.compress_type = compression
            archive.writestr(info, content)


def _write_bytes(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
