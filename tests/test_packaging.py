"""Packages of both bundles: what is in them, the model zoo's checks and MONAI's commands where we are not installed."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow, download_large_files

from conftest import BUNDLES, PROJECT
from packages import NAMES, ORGANS, TRAUMA, copy_source, outside_environment, write_json, write_package, write_weights
from trauma_monai import zoo_checks
from trauma_monai.packaging import package
from trauma_monai.vendoring import find_itself
from trauma_monai.zoo_checks import check_package

SCHEMA = PROJECT.parent / "shared/zoo/schema/meta_schema_20240725.json"
TASKS = (
    *("load_for_inference", "load_for_training", "train", "evaluate", "infer", "train_by_command", "infer_by_command"),
    "infer_beside_the_other_package",
    *("check_metadata", "check_network", "export_torchscript", "export_onnx", "export_program"),
)
OTHER = {ORGANS: TRAUMA, TRAUMA: ORGANS}
# One epoch of the demo variant is short.
OVERRIDES = {"epochs": 1, "val_interval": 1, "device": "cpu", "num_workers": 0}


@pytest.fixture(params=NAMES)
def folder(request: pytest.FixtureRequest, packages: dict[str, Path]) -> Path:
    return packages[request.param]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def demo(name: str) -> dict[str, Any]:
    """What the packaged variant sets."""
    return ConfigParser.load_config_file(BUNDLES / name / "configs/variants/demo.yaml")


# --- what is in a package ---------------------------------------------------------------------------------------------


def test_the_layout_is_the_zoos(folder: Path) -> None:
    expected = {"LICENSE", "requirements.txt", "docs/README.md", "docs/data_license.txt", "configs/logging.conf"}
    jobs = ("train", "inference", "evaluate", "multi_gpu_train", "multi_gpu_evaluate", "metadata")
    expected |= {f"configs/{job}.json" for job in jobs} | {"models/model.pt", "models/model.ts"}
    if folder.name == TRAUMA:
        expected |= {f"{ORGANS}/configs/inference.json", f"{ORGANS}/models/model.pt"}
    assert {name for name in files_of(folder) if not name.startswith("trauma_monai/")} == expected


def test_of_this_project_a_package_has_the_modules_that_configs_reach_and_no_others(packages: dict[str, Path]) -> None:
    modules = {name: {path.stem for path in (root / "trauma_monai").glob("*.py")} for name, root in packages.items()}
    assert modules[ORGANS] == modules[TRAUMA] >= {"dicom", "organs", "stacks", "targets", "inferers", "handlers"}
    assert not modules[TRAUMA] & {"cli", "pipeline", "report", "prepare", "packaging"}
    for name, root in packages.items():
        for module in modules[name]:
            vendored = root / f"trauma_monai/{module}.py"
            assert vendored.read_bytes() == (PROJECT / f"trauma_monai/{module}.py").read_bytes()


def test_metadata_tell_the_installed_versions_and_the_variants_shapes(packages: dict[str, Path]) -> None:
    metadata = ConfigParser.load_config_file(packages[TRAUMA] / "configs/metadata.json")
    assert metadata["variant"] == "demo"
    assert metadata["pytorch_version"] == version("torch").partition("+")[0]
    assert metadata["required_packages_version"]["timm"] == version("timm")
    image = metadata["network_data_format"]["inputs"]["image"]
    size, groups = demo(TRAUMA)["image_size"], demo(TRAUMA)["num_groups"]
    assert (image["num_channels"], image["spatial_shape"]) == (groups, [3, size, size])
    assert list(image["channel_def"]) == [str(group) for group in range(groups)]
    organs = ConfigParser.load_config_file(packages[ORGANS] / "configs/metadata.json")["network_data_format"]
    assert organs["inputs"]["image"]["spatial_shape"] == [32, demo(ORGANS)["image_size"], demo(ORGANS)["image_size"]]
    assert f"timm=={version('timm')}" in (packages[ORGANS] / "requirements.txt").read_text().splitlines()


def test_metadata_of_a_variant_name_its_own_targets(tmp_path: Path) -> None:
    out = package(TRAUMA, tmp_path / TRAUMA, "bleed_effnet_s").folder
    data_format = ConfigParser.load_config_file(out / "configs/metadata.json")["network_data_format"]
    expected = {"0": "extravasation_injury", "1": "bowel_injury"}
    assert data_format["outputs"]["pred"]["channel_def"] == expected
    assert data_format["outputs"]["pred"]["spatial_shape"] == [2]
    assert data_format["post_processed_outputs"]["pred"]["channel_def"] == expected


def test_a_variant_is_merged_into_the_workflows_that_have_its_names(packages: dict[str, Path]) -> None:
    train, inference = (
        ConfigParser.load_config_file(packages[TRAUMA] / f"configs/{job}.json") for job in ("train", "inference")
    )
    assert train["image_size"] == inference["image_size"] == demo(TRAUMA)["image_size"]
    assert train["lr"] == demo(TRAUMA)["lr"]
    assert "lr" not in inference


def test_an_overlay_keeps_its_own_imports_and_finds_the_vendored_modules_too() -> None:
    overlay = {"imports": ["$import os"], "initialize": ["$os.getpid()"], "device": "cpu"}
    assert find_itself(overlay) == {
        "imports": ["$import sys", "$import traceback", "$import os"],
        "initialize": ["$sys.path.insert(1, @bundle_root)", "$os.getpid()"],
        "device": "cpu",
    }
    assert find_itself({"run": ["$1"]}) == {"run": ["$1"]}


def test_the_zip_holds_the_folder_and_its_checksum_is_right(folder: Path) -> None:
    zip_file = folder.with_name(f"{folder.name}.zip")
    with zipfile.ZipFile(zip_file) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    assert content == {f"{folder.name}/{name}": data for name, data in files_of(folder).items()}
    expected = f"{hashlib.sha256(zip_file.read_bytes()).hexdigest()}  {zip_file.name}\n"
    assert zip_file.with_name(f"{zip_file.name}.sha256").read_text() == expected


def test_the_same_input_gives_the_same_bytes(packages: dict[str, Path], tmp_path: Path) -> None:
    """Of the bundle that has the other one in it."""
    folder = packages[TRAUMA]
    again = write_package(TRAUMA, tmp_path)
    assert files_of(again) == files_of(folder)
    assert again.with_name(f"{again.name}.zip").read_bytes() == folder.with_name(f"{folder.name}.zip").read_bytes()


def test_torchscript_names_no_file_of_this_machine(folder: Path) -> None:
    with zipfile.ZipFile(folder / "models/model.ts") as archive:
        assert not [name for name in archive.namelist() if str(PROJECT).encode() in archive.read(name)]


def test_files_that_the_zoo_does_not_take_are_listed_with_their_checksum(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for module in ("packaging", "zoo_checks"):
        monkeypatch.setattr(f"trauma_monai.{module}.LARGE_FILE", 11000)  # bytes; the licence has 11,358
    out = package(ORGANS, tmp_path / ORGANS, "demo").folder
    listed = ConfigParser.load_config_file(out / "large_files.yml")["large_files"]
    entry = next(entry for entry in listed if entry["path"] == "LICENSE")
    assert entry["hash_val"] == hashlib.sha256((out / "LICENSE").read_bytes()).hexdigest()
    download_large_files(str(out))  # MONAI finds them in place, and so downloads nothing
    (out / "large_files.yml").unlink()
    with pytest.raises(ValueError, match=r"LICENSE exceeds 0 MB, and large_files\.yml does not list it"):
        check_package(out)


def test_what_a_package_lacks_is_said(tmp_path: Path) -> None:
    result = package(TRAUMA, tmp_path / TRAUMA, "demo")
    assert [remark for remark in result.remarks if "--organ-weights" in remark]
    assert [remark for remark in result.remarks if "--weights" in remark]
    assert not (result.folder / "models").exists()
    assert result.zip_file is None


def test_the_command_line_says_where_the_package_is_and_what_it_lacks(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "trauma_monai", "package", ORGANS, str(tmp_path / "out"), "--variant", "demo"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == str(tmp_path / "out")
    assert "note: without weights" in done.stdout


# --- what is refused --------------------------------------------------------------------------------------------------


def replace_in(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


SPOILED = {
    "missing label": (ORGANS, "metadata.json", ',\n          "5": "bowel"', "", "channel_def of outputs pred"),
    "wrong channels": (ORGANS, "metadata.json", '"num_channels": 5', '"num_channels": 4', "num_channels of outputs"),
    "missing target": (TRAUMA, "metadata.json", ',\n          "10": "extravasation_injury"', "", "channel_def of out"),
    "no changelog": (TRAUMA, "metadata.json", '"0.1.0": "first version"', "", "changelog does not tell"),
    "renamed id": (ORGANS, "inference.yaml", "network_def", "net_def", "inference.json lacks network_def"),
    "renamed handlers": (TRAUMA, "train.yaml", "\n  handlers:", "\n  hooks:", "lacks train::handlers"),
    "dangling reference": (ORGANS, "train.yaml", "\nloss:", "\ncriterion:", "train.json refers to loss"),
    "missing run": (TRAUMA, "evaluate.yaml", "evaluating:", "testing:", "evaluate.json lacks evaluating"),
    "other network": (ORGANS, "train.yaml", "num_classes: 5", "num_classes: 6", "network_def is .* in train.json and"),
    "other size": (ORGANS, "train.yaml", "image_size: 128", "image_size: 96", "image_size is 96 in train.json and 128"),
    "run renamed": (ORGANS, "evaluate.yaml", "\nrun:", "\ngo:", "evaluate.json has no run of its own"),
    "version a number": (ORGANS, "metadata.json", '"version": "0.1.0"', '"version": 1', "version of another type"),
    "changelog a list": (
        ORGANS,
        "metadata.json",
        '{\n    "0.1.0": "first version"\n  }',
        '["0.1.0"]',
        "changelog of an",
    ),
    "unknown component": (ORGANS, "inference.yaml", "NameBySeriesd", "NameByPatientd", "NameByPatientd"),
    "unnamed package": (ORGANS, "metadata.json", '"timm": ', '"jinja2": ', "the modules import timm, of which"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_spoiled_bundle_is_refused_before_anything_is_written(case: str, tmp_path: Path) -> None:
    name, file, old, new, reason = SPOILED[case]
    source = copy_source(name, tmp_path / "source")
    replace_in(source / "configs" / file, old, new)
    with pytest.raises(ValueError, match=reason):
        package(source, tmp_path / name, zipped=True)
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_a_misspelt_name_of_a_variant_is_refused(tmp_path: Path) -> None:
    source = copy_source(ORGANS, tmp_path / "source")
    replace_in(source / "configs/variants/demo.yaml", "image_size", "imagesize")
    with pytest.raises(ValueError, match="variant demo sets imagesize, which neither train nor inference has"):
        package(source, tmp_path / ORGANS, "demo")


def test_weights_of_another_variant_are_refused(tmp_path: Path) -> None:
    weights = write_weights(ORGANS, tmp_path / "weights/real_ct.pt", "real_ct")
    with pytest.raises(ValueError, match="does not fit UNet"):
        package(ORGANS, tmp_path / ORGANS, "demo", weights)
    assert {path.name for path in tmp_path.iterdir()} == {"weights"}


def test_an_unknown_bundle_or_variant_is_answered_with_what_is_known(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no bundle 'spleen_ct'"):
        package("spleen_ct", tmp_path / "out")
    with pytest.raises(ValueError, match="has no variant 'big'; it has demo, real_ct"):
        package(ORGANS, tmp_path / "out", "big")


def test_a_package_that_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / ORGANS).mkdir()
    with pytest.raises(FileExistsError, match="remove it"):
        package(ORGANS, tmp_path / ORGANS)


def test_a_bundle_that_needs_no_organs_takes_no_organ_weights(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs no organ weights"):
        package(ORGANS, tmp_path / ORGANS, organ_weights=tmp_path / "model.pt")


def spoil(folder: Path, case: str) -> None:
    if case == "torchscript of other weights":
        state = torch.load(folder / "models/model.pt", weights_only=True)
        torch.save({name: value * 1.5 for name, value in state.items()}, folder / "models/model.pt")
    elif case == "torchscript of other metadata":
        replace_in(folder / "configs/metadata.json", '"variant": "demo"', '"variant": "other"')
    elif case == "lost module":
        (folder / "trauma_monai/stacks.py").unlink()
    elif case == "lost overlay":
        (folder / "configs/evaluate.json").unlink()
    else:
        replace_in(folder / "configs/inference.json", f'"image_size": {demo(ORGANS)["image_size"]}', '"image_size": 48')


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("torchscript of other weights", "model.ts differs from the network"),
        ("torchscript of other metadata", "does not carry the package's metadata.json"),
        ("lost module", "lack trauma_monai.stacks"),
        ("lost overlay", "configs/evaluate.json is missing"),
        ("other size", "image_size is 96 in train.json and 48 in inference.json"),
    ],
)
def test_a_package_that_was_spoiled_later_is_found_out(
    case: str, reason: str, packages: dict[str, Path], tmp_path: Path
) -> None:
    with zipfile.ZipFile(packages[ORGANS].with_suffix(".zip")) as archive:
        archive.extractall(tmp_path)
    check_package(tmp_path / ORGANS)
    spoil(tmp_path / ORGANS, case)
    with pytest.raises(ValueError, match=reason):
        check_package(tmp_path / ORGANS)


def test_the_check_asks_for_all_that_monai_asks_for() -> None:
    assert set(zoo_checks.OWN_IDS) == {*zoo_checks.WORKFLOWS, *zoo_checks.OVERLAYS}


# --- the zoo's checks and MONAI's own functions, where this project is not installed ----------------------------------


def schema(folder: Path) -> Path:
    """The zoo's schema where it is at hand, else what it requires."""
    if SCHEMA.exists():
        return SCHEMA
    tensor = ("type", "format", "num_channels", "spatial_shape", "dtype", "value_range")
    side = {"type": "object", "patternProperties": {"^.+$": {"type": "object", "required": tensor}}}
    required = ("schema", "version", "monai_version", "pytorch_version", "numpy_version", "required_packages_version")
    return write_json(
        folder / "required.json",
        {
            "type": "object",
            "required": [*required, "task", "description", "authors", "copyright", "network_data_format"],
            "properties": {
                "network_data_format": {
                    "required": ["inputs", "outputs"],
                    "properties": {"inputs": side, "outputs": side, "post_processed_outputs": side},
                }
            },
        },
    )


@pytest.fixture(scope="module")
def scan(dataset_dir: Path) -> Path:
    """A CT without masks, as a NIfTI file."""
    return min((dataset_dir / "images").glob("*.nii"))


@pytest.fixture(scope="module")
def outputs(
    packages: dict[str, Path], dataset_dir: Path, scan: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Bundle -> folder in which zoo_tasks.py has left a log and the output of each task."""
    folders = {}
    for name, folder in packages.items():
        out = folders[name] = tmp_path_factory.mktemp("zoo")
        paths = {"dataset_dir": dataset_dir, "scan": scan, "schema": schema(out), "other": packages[OTHER[name]]}
        settings = {"overrides": OVERRIDES} | {key: str(path) for key, path in paths.items()}
        settings = write_json(out / "settings.json", settings)
        program = [sys.executable, str(Path(__file__).with_name("zoo_tasks.py")), str(folder), str(out), str(settings)]
        environment = outside_environment(out / "outside")
        done = subprocess.run(program, cwd=out, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return folders


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", NAMES)
def test_the_zoos_checks_pass(name: str, task: str, outputs: dict[str, Path]) -> None:
    log = (outputs[name] / f"{task}.log").read_text()
    assert log.splitlines()[-1] == "done", log


@pytest.mark.parametrize("name", NAMES)
def test_a_package_predicts_what_the_checkout_predicts(
    name: str, packages: dict[str, Path], outputs: dict[str, Path], scan: Path, tmp_path: Path
) -> None:
    organs = {"organ_weights": str(packages[TRAUMA] / ORGANS / "models/model.pt"), "organ_variant": "demo"}
    workflow = ConfigWorkflow(
        config_file=[str(BUNDLES / name / "configs" / file) for file in ("inference.yaml", "variants/demo.yaml")],
        workflow_type="infer",
        bundle_root=str(BUNDLES / name),
        dataset_dir=str(scan),
        output_dir=str(tmp_path),
        ckpt_dir=str(packages[name] / "models"),
        device="cpu",
        num_workers=0,
        **(organs if name == TRAUMA else {}),
    )
    workflow.initialize()
    workflow.run()
    (own,) = tmp_path.iterdir()
    packaged = outputs[name] / "infer" / own.name
    if name == ORGANS:
        maps = [np.asanyarray(nib.load(file).dataobj) for file in (own, packaged)]
        assert np.array_equal(*maps)
        assert maps[0].any()
    else:
        ours, theirs = (json.loads(file.read_text()) for file in (own, packaged))
        (patient,) = ours
        assert theirs[patient]["targets"] == pytest.approx(ours[patient]["targets"], abs=1e-6)


def test_what_ran_left_the_packages_as_they_were(packages: dict[str, Path], outputs: dict[str, Path]) -> None:
    for folder in packages.values():
        with zipfile.ZipFile(folder.with_name(f"{folder.name}.zip")) as archive:
            packed = {f"{folder.name}/{name}" for name in files_of(folder) if "__pycache__" not in name}
            assert packed == set(archive.namelist())
