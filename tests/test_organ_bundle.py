"""The organ bundle by MONAI's command line, from another working directory, on tiny volumes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser

from conftest import BUNDLES, SHARED_DATA
from trauma_monai.networks import load_weights
from trauma_monai.targets import ORGAN_CODES

BUNDLE = BUNDLES / "organ_ct_segmentation"
CONFIGS = BUNDLE / "configs"
LPS = np.diag([-2.0, -2.0, 5.0, 1.0])
SHAPE = (48, 40, 20)  # x, y, z of every volume written here

TINY = """
epochs: 2
num_workers: 0
val_interval: 1
encoder: test_resnet
decoder_channels: [16, 8, 8, 8]
image_size: 32
z_stride: 1
depth: 16
windows: 2
refine: 2
loss: {_target_: trauma_monai.OrganDiceCELoss}
"""


def run(*arguments: str, cwd: Path, nodes: int = 1) -> str:
    """Run `python -m monai.bundle run`, on several nodes by a torchrun of each, and return what was printed."""
    variables = {
        **os.environ,
        "MONAI_FAIL_ON_DUPLICATE_CONFIG": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    launcher = ["-m", "torch.distributed.run", f"--nnodes={nodes}", "--nproc_per_node=1", "--rdzv_id=test"]
    launcher += ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port()}"] if nodes > 1 else []
    command = [sys.executable, *(launcher if nodes > 1 else []), "-m", "monai.bundle", "run", *arguments]
    with tempfile.TemporaryFile("w+") as log:
        started = [subprocess.Popen(command, cwd=cwd, env=variables, stdout=log, stderr=log) for _ in range(nodes)]
        codes = [process.wait() for process in started]
        log.seek(0)
        printed = log.read()
    assert codes == [0] * nodes, printed
    return printed


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def config_files(*files: Path | str) -> str:
    return "[" + ",".join(f"'{file}'" for file in files) + "]"


def write_volume(path: Path, values: np.ndarray, affine: np.ndarray = LPS) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, affine), path)


def organs_of(seed: int) -> np.ndarray:
    """One block per organ; where they lie differs a little between volumes."""
    organs = np.zeros(SHAPE, dtype=np.uint8)
    shift = np.random.default_rng(seed).integers(0, 4)
    for code, x in zip(ORGAN_CODES.values(), (2, 10, 18, 26, 34), strict=True):
        organs[x + shift : x + shift + 6, 8:30, 3:17] = code
    return organs


@pytest.fixture(scope="module")
def dataset_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared data set of four volumes in two folds, as `trauma-monai prepare` lays it out."""
    root = tmp_path_factory.mktemp("prepared")
    items = []
    for number in range(4):
        organs = organs_of(number)
        noise = np.random.default_rng(number).normal(0, 10, SHAPE)
        image = np.where(organs > 0, 40 * organs.astype(float), -500) + noise
        name = f"{number}_7{number}.nii"
        write_volume(root / "images" / name, image.astype(np.int16))
        write_volume(root / "organs" / name, organs)
        items.append(
            {
                "image": f"images/{name}",
                "organs": f"organs/{name}",
                "patient_id": str(number),
                "series_id": f"7{number}",
                "fold": number % 2,
                "num_slices": SHAPE[2],
            }
        )
    (root / "datalist.json").write_text(json.dumps({"training": items, "test": []}))
    return root


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("variant") / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="module")
def trained(dataset_dir: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the checkpoints of a training that was stopped after two epochs and gone on with for one."""
    out = tmp_path_factory.mktemp("trained")
    common = ["--bundle_root", str(BUNDLE), "--dataset_dir", str(dataset_dir), "--ckpt_dir", str(out)]
    common += ["--output_dir", str(out / "eval"), "--config_file", config_files(CONFIGS / "train.yaml", tiny)]
    first = run("training", *common, cwd=out)
    assert "epoch 2/2, " in first
    again = run(*common, "--epochs", "3", "--resume", "True", cwd=out)  # `run` is the same job as `training`
    assert "epoch 3/3, " in again
    assert "epoch 1/3, " not in again
    return out


def test_training_keeps_a_flat_state_dict_that_loads_strictly(trained: Path, tiny: Path) -> None:
    parser = ConfigParser(ConfigParser.load_config_files([str(CONFIGS / "inference.yaml"), str(tiny)]))
    network = load_weights(parser.get_parsed_content("network_def"), trained / "model.pt")
    weights = torch.load(trained / "model.pt", weights_only=True)
    assert set(weights) == set(network.state_dict())


def test_training_writes_where_it_is_told_and_not_into_the_working_directory(trained: Path) -> None:
    assert {path.name for path in trained.iterdir()} == {"eval", "model.pt", "training_state.pt"}


def test_evaluation_writes_dice_per_organ_and_per_volume_on_the_scanner_grid(
    trained: Path, dataset_dir: Path, tiny: Path, tmp_path: Path
) -> None:
    files = config_files(CONFIGS / "train.yaml", tiny, CONFIGS / "evaluate.yaml")
    run(
        *("evaluating", "--config_file", files, "--bundle_root", str(BUNDLE), "--dataset_dir", str(dataset_dir)),
        *("--ckpt_dir", str(trained), "--output_dir", str(tmp_path), "--fold", "-1"),
        cwd=tmp_path,
    )
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert set(metrics) == {"val_mean_dice", *(f"dice_{organ}" for organ in ORGAN_CODES)}
    organs_mean = np.mean([metrics[f"dice_{organ}"] for organ in ORGAN_CODES])
    assert metrics["val_mean_dice"] == pytest.approx(organs_mean, abs=1e-6)
    assert len((tmp_path / "val_mean_dice_raw.csv").read_text().splitlines()) == 1 + 4


def test_inference_writes_uint8_codes_on_the_grid_of_the_input(trained: Path, tiny: Path, tmp_path: Path) -> None:
    rotated = np.array([[0, 2.5, 0, -7], [-2.0, 0, 0, 9], [0, 0, -4.0, 11], [0, 0, 0, 1.0]])
    hu = np.random.default_rng(5).integers(-1000, 1000, (40, 30, 21)).astype(np.int16)
    write_volume(tmp_path / "in/scan.nii.gz", hu, rotated)
    run(
        *("--config_file", config_files(CONFIGS / "inference.yaml", tiny), "--bundle_root", str(BUNDLE)),
        *("--dataset_dir", str(tmp_path / "in"), "--ckpt_dir", str(trained), "--output_dir", str(tmp_path / "out")),
        cwd=tmp_path,
    )
    organs = nib.load(tmp_path / "out/scan_organs.nii.gz")
    assert organs.get_data_dtype() == np.uint8
    assert organs.shape == hu.shape
    np.testing.assert_allclose(organs.affine, rotated, atol=1e-5)
    assert set(np.unique(np.asanyarray(organs.dataobj))) <= {0, *ORGAN_CODES.values()}


def test_two_nodes_train_and_evaluate_together(dataset_dir: Path, tiny: Path, tmp_path: Path) -> None:
    common = ["--bundle_root", str(BUNDLE), "--dataset_dir", str(dataset_dir), "--ckpt_dir", str(tmp_path)]
    common += ["--output_dir", str(tmp_path / "eval"), "--epochs", "1"]
    train = config_files(CONFIGS / "train.yaml", tiny, CONFIGS / "multi_gpu_train.yaml")
    evaluate = config_files(
        *(CONFIGS / "train.yaml", tiny, CONFIGS / "evaluate.yaml", CONFIGS / "multi_gpu_evaluate.yaml")
    )
    run("training", "--config_file", train, *common, cwd=tmp_path, nodes=2)
    run("evaluating", "--config_file", evaluate, *common, "--fold", "-1", cwd=tmp_path, nodes=2)
    by_two = json.loads((tmp_path / "eval/metrics.json").read_text())
    assert len((tmp_path / "eval/val_mean_dice_raw.csv").read_text().splitlines()) == 1 + 4, "each volume once"
    evaluate = config_files(CONFIGS / "train.yaml", tiny, CONFIGS / "evaluate.yaml")
    run("evaluating", "--config_file", evaluate, *common, "--fold", "-1", cwd=tmp_path)
    assert json.loads((tmp_path / "eval/metrics.json").read_text()) == pytest.approx(by_two, abs=1e-6)


def test_each_process_loads_its_own_volumes(dataset_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shares = []
    for rank in range(3):
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 3}.items():
            monkeypatch.setenv(name, str(value))
        parser = ConfigParser(
            ConfigParser.load_config_files([CONFIGS / "train.yaml", CONFIGS / "multi_gpu_train.yaml"])
        )
        parser.update({"dataset_dir": str(dataset_dir), "fold": -1})
        shares.append(
            [
                [Path(item["image"]).name[0] for item in parser.get_parsed_content(f"{section}::dataset::data")]
                for section in ("train", "validate")
            ]
        )
    # Of four volumes three processes train on two each, one volume twice; each is validated once.
    assert [train for train, _ in shares] == [["0", "3"], ["1", "0"], ["2", "1"]]
    assert [validate for _, validate in shares] == [["0", "3"], ["1"], ["2"]]


def test_metadata_and_label_codes_agree() -> None:
    outputs = ConfigParser.load_config_file(CONFIGS / "metadata.json")["network_data_format"]
    expected = {"0": "background"} | {str(code): organ for organ, code in ORGAN_CODES.items()}
    assert outputs["outputs"]["pred"]["channel_def"] == expected
    assert outputs["post_processed_outputs"]["pred"]["channel_def"] == expected
    assert outputs["outputs"]["pred"]["num_channels"] == len(ORGAN_CODES)


@pytest.mark.slow
@pytest.mark.skipif(not SHARED_DATA.exists(), reason="the real CT lies beside the project's own machines only")
def test_a_real_ct_is_learnt_to_a_dice_of_0_9(tmp_path: Path) -> None:
    """Agreement with TotalSegmentator on the volume that it was trained on: it can learn, no more."""
    item = {
        "image": str(SHARED_DATA / "totalsegmentator/example_ct.nii.gz"),
        "organs": str(SHARED_DATA / "totalsegmentator/derived/example_ct_rsna5.nii.gz"),
        "fold": 0,
    }
    (tmp_path / "datalist.json").write_text(json.dumps({"training": [item], "test": []}))
    variant = CONFIGS / "variants/real_ct.yaml"
    common = ["--bundle_root", str(BUNDLE), "--dataset_dir", str(tmp_path), "--ckpt_dir", str(tmp_path)]
    common += ["--output_dir", str(tmp_path / "eval"), "--fold", "-1"]
    run("training", "--config_file", config_files(CONFIGS / "train.yaml", variant), *common, cwd=tmp_path)
    files = config_files(CONFIGS / "train.yaml", variant, CONFIGS / "evaluate.yaml")
    run("evaluating", "--config_file", files, *common, cwd=tmp_path)
    assert json.loads((tmp_path / "eval/metrics.json").read_text())["val_mean_dice"] >= 0.90
