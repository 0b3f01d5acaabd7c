"""Both bundles on the real MONAI Deploy App SDK and holoscan, in the environment that scripts/deploy_env.sh makes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import highdicom as hd
import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch

from conftest import BUNDLES, PROJECT
from packages import ORGANS, TRAUMA, copy_source, write_package, write_weights
from trauma_monai.apps.deploy.model import read_model
from trauma_monai.dicom import discover_series, read_series
from trauma_monai.networks import load_weights

ENVIRONMENT = PROJECT / ".venv-deploy"


@pytest.fixture(scope="session")
def deploy_python() -> Path:
    """Python with the App SDK. Continuous integration makes it; elsewhere nothing is fetched unasked."""
    if os.environ.get("CI") != "true" and not (ENVIRONMENT / "installed").is_file():
        pytest.skip("no environment with the MONAI Deploy App SDK: bash scripts/deploy_env.sh makes it (0.7 GB)")
    own = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    made = subprocess.run(["bash", PROJECT / "scripts/deploy_env.sh"], env=own, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout[-2000:] + made.stderr[-4000:]
    return ENVIRONMENT / "bin/python"


@pytest.fixture(scope="session")
def study(rsna_dir: Path) -> Path:
    """DICOM of a synthetic patient with two series."""
    (folder, *_) = [path for path in sorted((rsna_dir / "train_images").iterdir()) if len(list(path.iterdir())) == 2]
    return folder


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both bundles with random weights, as `trauma-monai package` writes them."""
    return {name: write_package(name, tmp_path_factory.mktemp("packages")) for name in (ORGANS, TRAUMA)}


@pytest.fixture(scope="module")
def organ_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The organ bundle as in this repository, with the weights of its package."""
    folder = copy_source(ORGANS, tmp_path_factory.mktemp("source"))
    write_weights(ORGANS, folder / "models/model.pt")
    return folder


def deploy(python: Path, *arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HOLOSCAN"))}
    command = [str(python), "-m", "trauma_monai.apps.deploy", *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env=own | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True
    )


def deploy_well(python: Path, *arguments: str | Path, cwd: Path) -> None:
    done = deploy(python, *arguments, cwd=cwd)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def run_bundle(name: str, weights: Path, study: Path, out: Path, **overrides: str | Path) -> None:
    """What the app must agree with: `monai.bundle run` of the same weights on the same files."""
    configs = BUNDLES / name / "configs"
    options = {"bundle_root": BUNDLES / name, "dataset_dir": study, "output_dir": out, "ckpt_dir": weights.parent}
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file"]
    command += [f"['{configs / 'inference.yaml'}','{configs / 'variants/demo.yaml'}']"]
    for key, value in (options | overrides | {"device": "cpu"}).items():
        command += [f"--{key}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def label_map_of(segmentation_file: Path, instances: list[str]) -> np.ndarray:
    """Label map (X, Y, Z) on the source images."""
    segmentation = hd.seg.segread(segmentation_file)
    frames = segmentation.get_pixels_by_source_instance(
        instances, combine_segments=True, assert_missing_frames_are_empty=True
    )
    return np.asarray(frames).T


@pytest.fixture(scope="module")
def bundle_label_maps(organ_source: Path, study: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Series UID -> label map by `monai.bundle run`, and the instances that its slices are."""
    maps = {}
    found, _ = discover_series(study)
    assert len(found) == 2
    for series in found:
        out = tmp_path_factory.mktemp("by_bundle")
        run_bundle(ORGANS, organ_source / "models/model.pt", series.files[0].parent, out)
        (written,) = out.glob("*_organs.nii.gz")
        label_map: Any = nib.load(written)
        maps[series.series_uid] = np.asarray(label_map.dataobj), [uid for uid, _, _ in read_series(series).instances]
    return maps


@pytest.mark.parametrize("form", ["package", "model.ts", "source"])
def test_organs_are_those_of_the_bundle(
    deploy_python: Path,
    packages: dict[str, Path],
    organ_source: Path,
    bundle_label_maps: dict[str, Any],
    study: Path,
    tmp_path: Path,
    form: str,
) -> None:
    model = {
        "package": [packages[ORGANS]],
        "model.ts": [packages[ORGANS] / "models/model.ts"],
        "source": [organ_source, "--variant", "demo"],
    }[form]
    deploy_well(deploy_python, "-i", study, "-o", "out", "-m", *model, cwd=tmp_path)
    written = sorted((tmp_path / "out").iterdir())
    assert [path.name for path in written] == ["organs_1.dcm", "organs_2.dcm"]
    for path in written:
        (reference,) = pydicom.dcmread(path).ReferencedSeriesSequence
        expected, instances = bundle_label_maps[reference.SeriesInstanceUID]
        assert len(np.unique(expected)) > 1
        np.testing.assert_array_equal(label_map_of(path, instances), expected)


@pytest.fixture(scope="module")
def bundle_probabilities(
    organ_source: Path, packages: dict[str, Path], study: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("by_bundle")
    organs = {"organ_bundle_root": organ_source, "organ_variant": "demo"}
    run_bundle(TRAUMA, packages[TRAUMA] / "models/model.pt", study, out, **organs)
    (record,) = json.loads((out / "probabilities.json").read_text()).values()
    return record


def test_probabilities_are_those_of_the_bundle_and_the_report_says_them(
    deploy_python: Path, packages: dict[str, Path], bundle_probabilities: dict[str, Any], study: Path, tmp_path: Path
) -> None:
    deploy_well(deploy_python, "-i", study, "-o", "out", "-m", packages[TRAUMA], cwd=tmp_path)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["probabilities.json", "report.dcm"]
    record = json.loads((tmp_path / "out/probabilities.json").read_text())
    assert record["network_outputs"] == pytest.approx(bundle_probabilities["targets"], abs=2e-6)
    assert record["probabilities"] == pytest.approx(bundle_probabilities["probabilities"], abs=2e-6)

    report = hd.sr.srread(tmp_path / "out/report.dcm")
    said, images = {}, set()
    for group in report.content.get_image_measurement_groups():
        for measurement in group.get_measurements():
            if measurement.referenced_images:
                images |= {image.referenced_sop_instance_uid for image in measurement.referenced_images}
            else:
                said[measurement.name.value] = measurement.value
    assert said == pytest.approx(record["probabilities"] | {"any_injury": record["any_injury"]}, abs=1e-9)
    evidence = {
        item.ReferencedSOPInstanceUID
        for series in report.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence
        for item in series.ReferencedSOPSequence
    }
    assert images
    assert images <= evidence
    assert len(evidence) == len(list(study.rglob("*.dcm")))


def test_a_series_that_cannot_be_read_is_left_out_and_named(
    deploy_python: Path,
    packages: dict[str, Path],
    organ_source: Path,
    bundle_probabilities: dict[str, Any],
    study: Path,
    tmp_path: Path,
) -> None:
    shutil.copytree(study, tmp_path / "in")
    (first, *_) = sorted((tmp_path / "in").iterdir())
    for number, path in enumerate(sorted(first.iterdir())[:2]):  # two slices make no volume
        ds = pydicom.dcmread(path)
        ds.SeriesInstanceUID = f"{ds.SeriesInstanceUID}.9"
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"{ds.SeriesInstanceUID}.{number}"
        ds.save_as(tmp_path / "in" / f"extra{number}.dcm")
    organs = ("--organ-model", organ_source, "--organ-variant", "demo")
    model = packages[TRAUMA] / "models/model.ts"
    deploy_well(deploy_python, "-i", "in", "-o", "out", "-m", model, *organs, cwd=tmp_path)
    record = json.loads((tmp_path / "out/probabilities.json").read_text())
    assert record["network_outputs"] == pytest.approx(bundle_probabilities["targets"], abs=2e-6)
    assert record["warnings"][0].endswith("2 slice(s); a volume needs at least 3.")
    assert record["model"]["weights"].startswith("model.ts (sha256 ")


def test_images_without_uids_end_the_run_with_the_reason_and_leave_nothing(
    deploy_python: Path, packages: dict[str, Path], study: Path, tmp_path: Path
) -> None:
    shutil.copytree(study, tmp_path / "in")
    for path in (tmp_path / "in").rglob("*.dcm"):
        ds = pydicom.dcmread(path)
        ds.FrameOfReferenceUID = ""
        ds.save_as(path)
    done = deploy(deploy_python, "-i", "in", "-o", "out", "-m", packages[ORGANS], cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("trauma-monai deploy: the series lacks FrameOfReferenceUID")
    assert list((tmp_path / "out").iterdir()) == []


# --- what needs no SDK ------------------------------------------------------------------------------------------------


def test_wrong_usage_ends_with_2_and_bad_input_with_1_and_its_reason(organ_source: Path, tmp_path: Path) -> None:
    python = Path(sys.executable)
    assert deploy(python, "-i", tmp_path, cwd=tmp_path).returncode == 2
    for arguments, reason in (
        (("-i", "absent", "-o", "out", "-m", organ_source), "absent is not a folder"),
        (("-i", tmp_path, "-o", "out", "-m", "absent"), "neither a bundle's folder nor a model.ts"),
        (("-i", tmp_path, "-o", "out", "-m", organ_source), "holds 0 CT studies, expected one"),
    ):
        done = deploy(python, *arguments, cwd=PROJECT)
        assert done.returncode == 1
        assert reason in done.stderr.splitlines()[-1]
    assert not (PROJECT / "out").exists()


def test_several_studies_are_refused(organ_source: Path, rsna_dir: Path, tmp_path: Path) -> None:
    done = deploy(Path(sys.executable), "-i", rsna_dir, "-o", tmp_path / "out", "-m", organ_source, cwd=PROJECT)
    assert done.returncode == 1
    assert "holds 4 CT studies, expected one" in done.stderr


def test_the_sdk_is_missed_with_a_hint(organ_source: Path, study: Path, tmp_path: Path) -> None:
    """The tests' own environment has no App SDK."""
    done = deploy(Path(sys.executable), "-i", study, "-o", tmp_path / "out", "-m", organ_source, cwd=PROJECT)
    assert done.returncode == 1
    assert "scripts/deploy_env.sh" in done.stderr.splitlines()[-1]


def test_a_bundle_without_weights_or_of_another_kind_is_refused(tmp_path: Path) -> None:
    bundle = copy_source(ORGANS, tmp_path)
    with pytest.raises(FileNotFoundError, match="no weights at"):
        read_model(bundle)
    (bundle / "models").mkdir()
    (bundle / "models/model.pt").touch()
    metadata = json.loads((bundle / "configs/metadata.json").read_text())
    metadata["network_data_format"]["outputs"]["pred"]["channel_def"]["1"] = "prostate"
    (bundle / "configs/metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match=r"predicts image of .*prostate.*; this app runs"):
        read_model(bundle)


def test_organ_weights_are_missed_before_the_run(tmp_path: Path) -> None:
    bundle = copy_source(TRAUMA, tmp_path)
    copy_source(ORGANS, tmp_path)
    (bundle / "models").mkdir()
    (bundle / "models/model.pt").touch()
    with pytest.raises(FileNotFoundError, match=r"no organ weights at .*; give the organ bundle's folder"):
        read_model(bundle)


def test_options_that_do_not_fit_the_bundle_are_refused(organ_source: Path, packages: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="is the organ bundle itself"):
        read_model(organ_source, organ_model=organ_source)
    with pytest.raises(ValueError, match="carries the variant that it was exported with"):
        read_model(packages[ORGANS] / "models/model.ts", variant="demo")


def test_torchscript_without_its_configs_is_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "model.ts")
    with pytest.raises(
        ValueError, match=r"carries no inference and metadata; export it with `monai.bundle ckpt_export"
    ):
        read_model(tmp_path / "model.ts")
    (tmp_path / "text.ts").write_text("no archive")
    with pytest.raises(ValueError, match="is no TorchScript file"):
        read_model(tmp_path / "text.ts")


def test_exported_torchscript_brings_its_variant(tmp_path: Path) -> None:
    """`ckpt_export` with two config files stores both, not what they make together."""
    weights = write_weights(ORGANS, tmp_path / "weights/model.pt")
    configs = BUNDLES / ORGANS / "configs"
    command = [sys.executable, "-m", "monai.bundle", "ckpt_export", "--net_id", "network_def"]
    command += ["--config_file", f"['{configs / 'inference.yaml'}','{configs / 'variants/demo.yaml'}']"]
    command += ["--meta_file", str(configs / "metadata.json"), "--bundle_root", str(BUNDLES / ORGANS)]
    command += ["--ckpt_file", str(weights), "--filepath", str(tmp_path / "model.ts")]
    subprocess.run(command, check=True, capture_output=True)
    model = read_model(tmp_path / "model.ts")
    assert model.task == "organs"
    assert model.names["variant"] == "demo"
    assert model.config["network_def"]["_target_"] == "UNet"


def test_the_bundle_that_is_run_is_written_beside_the_results(organ_source: Path, tmp_path: Path) -> None:
    model = read_model(organ_source, "demo")
    folder = model.write(tmp_path / "bundle")
    config = json.loads((folder / "configs/inference.json").read_text())
    assert config["bundle_root"] == str(organ_source)
    assert config["network_def"]["_target_"] == "UNet"
    load_weights(model_network(config), folder / "models/model.pt")


def model_network(config: dict[str, Any]) -> torch.nn.Module:
    from monai.bundle import ConfigParser

    return ConfigParser(config).get_parsed_content("network_def")
