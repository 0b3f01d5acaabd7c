"""The pages of the bundles: every command in them runs, in a package where this project is not installed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import BUNDLES
from packages import NAMES, ORGANS, TRAUMA, copy_source, outside_environment

COMMANDS = re.compile(r"```bash\n(.*?)```", re.DOTALL)
CHECKOUT = re.compile(r"<!-- checkout -->(.*?)<!-- /checkout -->", re.DOTALL)

# What the commands of a package do, in their order, and a file that each leaves in $OUT.
IN_ORDER: dict[str, dict[str, str | None]] = {
    ORGANS: {
        "install": None,
        "infer": "scan_organs.nii.gz",
        "train": "model.pt",
        "train on two": "model.pt",
        "evaluate": "metrics.json",
        "share": "uploaded.json",
    },
    TRAUMA: {
        "install": None,
        "infer": "probabilities.json",
        "train": "model.pt",
        "evaluate": "metrics.json",
        "share": "uploaded.json",
    },
}

# Takes the place of the Hugging Face Hub's library, and writes down what would have been uploaded.
HUB = """
import json, os, pathlib
class HfApi:
    def __init__(self, token=None): pass
    def create_repo(self, repo_id, private, exist_ok): pass
    def upload_folder(self, repo_id, folder_path):
        files = [path.relative_to(folder_path).as_posix() for path in pathlib.Path(folder_path).rglob("*")]
        pathlib.Path(os.environ["OUT"], "uploaded.json").write_text(json.dumps({repo_id: files}))
"""


def page(bundle: Path) -> str:
    return (bundle / "docs/README.md").read_text()


def run(commands: str, folder: Path, out: Path, environment: dict[str, str]) -> None:
    """Run a block as a user would, in the bundle's folder, with a new folder for $OUT."""
    out.mkdir()
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=folder,
        env=environment | {"OUT": str(out)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{commands}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def shorten(train: Path) -> None:
    """One epoch is enough to see that a command works."""
    config = json.loads(train.read_text())
    train.write_text(json.dumps(config | {"epochs": 1, "val_interval": 1}))


@pytest.fixture
def given(dataset_dir: Path, tmp_path: Path) -> dict[str, str]:
    """What the pages ask their reader to name."""
    scan = Path(shutil.copy(min((dataset_dir / "images").glob("*.nii")), tmp_path / "scan.nii"))
    return {"SCAN": str(scan), "DATA": str(dataset_dir), "HF_USER": "someone"}


@pytest.mark.parametrize("name", NAMES)
def test_every_command_of_a_package_runs_in_its_folder(
    name: str, packages: dict[str, Path], given: dict[str, str], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(packages[name], tmp_path / name))
    shorten(folder / "configs/train.json")
    environment = outside_environment(tmp_path / "outside") | given
    environment |= {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}  # all is there: nothing to download
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub/huggingface_hub.py").write_text(HUB)
    for (job, file), commands in zip(IN_ORDER[name].items(), COMMANDS.findall(page(folder)), strict=True):
        path = f"{tmp_path / 'hub'}:{environment['PYTHONPATH']}" if job == "share" else environment["PYTHONPATH"]
        out = tmp_path / job
        run(commands, folder, out, environment | {"PYTHONPATH": path})
        assert file is None or (out / file).is_file(), f"{job} left {list(out.iterdir())}"
    uploaded = json.loads((tmp_path / "share/uploaded.json").read_text())
    assert {"configs/inference.json", "models/model.ts", "README.md"} <= set(uploaded[f"someone/{name}"])


@pytest.mark.parametrize("name", NAMES)
def test_every_command_for_a_checkout_runs_in_the_bundles_folder(
    name: str, given: dict[str, str], packages: dict[str, Path], tmp_path: Path
) -> None:
    for each in NAMES:
        copy_source(each, tmp_path / "bundles")
    folder = tmp_path / "bundles" / name
    for variant in (folder / "configs/variants").glob("*.yaml"):
        variant.write_text(re.sub(r"^(epochs|val_interval): \d+", r"\1: 1", variant.read_text(), flags=re.MULTILINE))
    environment = os.environ | given | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    environment["ORGAN_WEIGHTS"] = str(packages[TRAUMA] / ORGANS / "models/model.pt")
    blocks = [block for part in CHECKOUT.findall(page(folder)) for block in COMMANDS.findall(part)]
    assert len(blocks) == 1
    run(blocks[0], folder, tmp_path / "out", environment)
    assert (tmp_path / f"out/{name}.zip.sha256").is_file()


@pytest.mark.parametrize("name", NAMES)
def test_a_page_names_configs_that_are_there(name: str, packages: dict[str, Path]) -> None:
    """A package's page names its JSON, the page in the checkout its YAML, and neither talks to the other's reader."""
    for folder, kind in ((BUNDLES / name, "yaml"), (packages[name], "json")):
        named = set(re.findall(r"configs/\w+(?:/\w+)?\.(?:yaml|json)", page(folder)))
        assert {Path(file).suffix for file in named if "metadata" not in file} == {f".{kind}"}
        assert [file for file in named if not (folder / file).is_file()] == []
    assert "checkout" not in page(packages[name])
    assert "trauma-monai package" not in page(packages[name])


@pytest.mark.parametrize("name", NAMES)
def test_a_page_explains_every_label(name: str) -> None:
    metadata = json.loads((BUNDLES / name / "configs/metadata.json").read_text())
    labels = metadata["network_data_format"]["outputs"]["pred"]["channel_def"]
    rows = re.findall(r"^\| (\d+) \| (\w+)", page(BUNDLES / name), re.MULTILINE)
    assert [value for value, _ in rows] == list(labels)
    if name == TRAUMA:
        assert dict(rows) == labels
