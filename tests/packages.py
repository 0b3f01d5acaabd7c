"""Small packages of both bundles, and an environment in which this project is not installed."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import torch
from monai.bundle import ConfigParser

from conftest import BUNDLES, PROJECT
from trauma_monai.packaging import package

ORGANS, TRAUMA = "organ_ct_segmentation", "trauma_ct_classification"
NAMES = (ORGANS, TRAUMA)


def write_weights(name: str, out: Path, variant: str = "demo") -> Path:
    """Random weights of a bundle's network, the same each time."""
    files = [BUNDLES / name / "configs" / file for file in ("inference.yaml", f"variants/{variant}.yaml")]
    torch.manual_seed(0)
    network = ConfigParser(ConfigParser.load_config_files(files)).get_parsed_content("network_def")
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.save(network.state_dict(), out)
    return out


def write_package(name: str, folder: Path) -> Path:
    """Package the demo variant with random weights, and its zip, into ``folder``."""
    weights = write_weights(name, folder / f"{name}.pt")
    organ_weights = write_weights(ORGANS, folder / "organs.pt") if name == TRAUMA else None
    return package(name, folder / name, "demo", weights, organ_weights, zipped=True).folder


def copy_source(name: str, folder: Path) -> Path:
    """Copy a bundle without its weights, to be changed."""
    ignored = shutil.ignore_patterns("models", "eval")
    return Path(shutil.copytree(BUNDLES / name, folder / name, ignore=ignored))


def outside_environment(folder: Path) -> dict[str, str]:
    """Environment variables under which Python finds everything that is installed, but not this project."""
    folder.mkdir(parents=True, exist_ok=True)
    hide = f"import sys\nsys.path[:] = [entry for entry in sys.path if entry != {str(PROJECT)!r}]\n"
    (folder / "sitecustomize.py").write_text(hide)  # runs after the installed packages are on the path
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return own | {
        "PYTHONPATH": str(folder),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "MONAI_FAIL_ON_DUPLICATE_CONFIG": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def write_json(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path
