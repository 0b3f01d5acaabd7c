"""The trauma bundle as its users run it: training, evaluation, inference, in parallel, and interrupted."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow

from conftest import BUNDLES
from trauma_monai.networks import load_weights
from trauma_monai.oof import collect_oof
from trauma_monai.runs import series_items
from trauma_monai.targets import GROUPS, SUBMISSION_COLUMNS, TARGETS

BUNDLE = BUNDLES / "trauma_ct_classification"
CONFIGS = BUNDLE / "configs"

# The demo variant, made smaller still.
TINY = {
    "image_size": 32,
    "num_groups": 4,
    "hidden_size": 8,
    "epochs": 1,
    "val_interval": 1,
    "device": "cpu",
    "amp": False,
}


def write_series(folder: Path, patient: int) -> dict[str, Any]:
    """Write a 24 x 24 x 12 volume with organs and return its item; every second patient has an injured liver."""
    rng = np.random.default_rng(patient)
    hu = rng.normal(40, 10, (24, 24, 12)).astype(np.int16)
    codes = np.zeros(hu.shape, dtype=np.uint8)
    for code in range(1, 6):
        codes[3 * code : 3 * code + 3, 6:18, 2:10] = code
    injured = patient % 2
    if injured:
        hu[3:6, 10:14, 4:8] -= 60
    affine = np.diag([-2.0, -2.0, 5.0, 1.0])
    item: dict[str, Any] = {}
    for kind, array in (("images", hu), ("organs", codes)):
        path = folder / kind / f"{patient}_1.nii"
        path.parent.mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(array, affine), path)
        item["image" if kind == "images" else kind] = f"{kind}/{path.name}"
    label = {name: int(injured and name in ("liver_injury", "liver_low", "extravasation_injury")) for name in TARGETS}
    frames = {"bowel_injury": [], "extravasation_injury": [4, 5] if injured else []}
    return item | {
        "label": label,
        "frame_labels": frames,
        "patient_id": str(patient),
        "series_id": "1",
        "fold": patient // 2 % 2,
        "aortic_hu": None,
        "num_slices": 12,
    }


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    items = [write_series(folder, patient) for patient in range(8)]
    (folder / "datalist.json").write_text(json.dumps({"training": items, "test": []}))
    return folder


def arguments(prepared: Path, out: Path, **more: Any) -> dict[str, Any]:
    paths = {"bundle_root": str(BUNDLE), "dataset_dir": str(prepared), "output_dir": str(out), "ckpt_dir": str(out)}
    return TINY | paths | more


def command(run_id: str | None, files: list[str], **overrides: Any) -> list[str]:
    paths = ",".join(f"'{CONFIGS / file}'" for file in files)
    return [
        *("-m", "monai.bundle", "run", *([run_id] if run_id else [])),
        *("--config_file", f"[{paths}]"),
        *(text for name, value in overrides.items() for text in (f"--{name}", str(value))),
    ]


def execute(arguments: list[str], folder: Path) -> str:
    """Run Python in ``folder``, from where no path of the project is visible but by PYTHONPATH."""
    environment = os.environ | {
        "PYTHONPATH": str(BUNDLES.parent),
        "OMP_NUM_THREADS": "1",
        "MONAI_FAIL_ON_DUPLICATE_CONFIG": "1",
    }
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def workflow(files: list[str], workflow_type: str = "train", **overrides: Any) -> ConfigWorkflow:
    return ConfigWorkflow(
        config_file=[str(CONFIGS / file) for file in files],
        meta_file=str(CONFIGS / "metadata.json"),
        logging_file=False,
        workflow_type=workflow_type,
        **overrides,
    )


@pytest.fixture(scope="module")
def trained(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training that the command line made, started in another folder than the project's."""
    out = tmp_path_factory.mktemp("trained")
    execute(command("training", ["train.yaml", "variants/demo.yaml"], **arguments(prepared, out)), out)
    return out


def test_training_saves_the_deployed_network_alone(trained: Path) -> None:
    overrides = {name: TINY[name] for name in ("image_size", "num_groups", "hidden_size")}
    parser = ConfigParser(ConfigParser.load_config_files([CONFIGS / "inference.yaml", CONFIGS / "variants/demo.yaml"]))
    parser.update(overrides)
    for name in ("model.pt", "model_last.pt"):
        load_weights(parser.get_parsed_content("network_def"), trained / name)
    state = torch.load(trained / "training_state.pt", weights_only=True)
    assert set(state) == {"network", "optimizer", "lr_scheduler", "trainer", "best"}


def test_run_is_the_job_that_the_overlay_names() -> None:
    parser = ConfigParser(ConfigParser.load_config_files([CONFIGS / "train.yaml", CONFIGS / "evaluate.yaml"]))
    parser.resolve_macro_and_relative_ids()
    assert parser["training"] == parser["evaluating"] == parser["run"]


def test_evaluation_writes_metrics_and_predictions(prepared: Path, trained: Path) -> None:
    files = ["train.yaml", "variants/demo.yaml", "evaluate.yaml"]
    evaluation = workflow(files, **arguments(prepared, trained, fold=-1))
    evaluation.initialize()
    assert not evaluation.check_properties()
    evaluation.run()
    metrics = json.loads((trained / "metrics.json").read_text())
    parts = ["bowel", "extravasation", "kidney", "liver", "spleen", "any_injury"]
    assert metrics["trauma_score"] == pytest.approx(np.mean([metrics[part] for part in parts]))
    assert 0 <= metrics["auc_liver_injury"] <= 1
    assert metrics["auc_bowel_injury"] is None
    with (trained / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["patient_id"] for row in rows] == [str(patient) for patient in range(8)]
    assert list(rows[0])[3:] == list(TARGETS)


def test_inference_writes_the_competition_columns_of_each_patient(prepared: Path, trained: Path) -> None:
    run = arguments(prepared, trained)
    execute(command(None, ["inference.yaml", "variants/demo.yaml"], **run), trained)
    record = json.loads((trained / "probabilities.json").read_text())
    assert set(record) == {str(patient) for patient in range(8)}
    assert list(record["3"]["probabilities"]) == list(SUBMISSION_COLUMNS)
    assert record["3"]["series"] == ["1"]
    # The same network on the same series: evaluation and inference agree.
    with (trained / "predictions.csv").open() as file:
        of_patient = {row["patient_id"]: row for row in csv.DictReader(file)}
    assert record["3"]["targets"]["liver_low"] == pytest.approx(float(of_patient["3"]["liver_low"]), abs=1e-6)


def test_an_interrupted_training_goes_on_where_it_stopped(prepared: Path, trained: Path) -> None:
    files = ["train.yaml", "variants/demo.yaml"]
    training = workflow(files, **arguments(prepared, trained, resume=True, epochs=2))
    training.initialize()
    assert not training.check_properties()
    training.run()
    assert training.trainer.state.epoch == 2
    steps_per_epoch = len(training.trainer.data_loader)
    assert training.parser.get_parsed_content("lr_scheduler").last_epoch == 2 * steps_per_epoch


def test_a_killed_training_ends_with_the_weights_of_one_that_was_not(prepared: Path, tmp_path: Path) -> None:
    files = ["train.yaml", "variants/demo.yaml"]
    more = {"epochs": 4, "num_workers": 1, "prob_flip_x": 0.5}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    execute(command("training", files, **arguments(prepared, whole, **more)), tmp_path)

    run = command("training", files, **arguments(prepared, killed, **more))
    environment = os.environ | {"PYTHONPATH": str(BUNDLES.parent), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, *run], cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
    while not (killed / "training_state.pt").is_file() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "the training ended before it could be killed"

    execute([*run, "--resume", "True"], tmp_path)
    for name in ("model.pt", "model_last.pt"):
        expected = torch.load(whole / name, weights_only=True)
        for key, tensor in torch.load(killed / name, weights_only=True).items():
            torch.testing.assert_close(tensor, expected[key], rtol=0, atol=0)


def test_the_schedule_counts_steps_of_the_optimizer_not_batches(prepared: Path, tmp_path: Path) -> None:
    """Fold 1 leaves 4 windows, 2 of injured patients: an epoch of 4 batches of 1, and 2 steps of 2 batches."""
    overrides = arguments(prepared, tmp_path, fold=1, batch_size=1, accumulation_steps=2, schedule_factor=2.0)
    training = workflow(["train.yaml", "variants/demo.yaml"], **overrides)
    training.initialize()
    training.run()
    schedule = training.parser.get_parsed_content("lr_scheduler")
    assert (schedule.last_epoch, schedule.t_total) == (2, 4)
    # Half way through the cosine.
    assert schedule.get_last_lr()[0] == pytest.approx(training.parser.get_parsed_content("lr") / 2)


def test_two_processes_train_and_evaluate_together(prepared: Path, tmp_path: Path) -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    run = arguments(prepared, tmp_path)
    run.pop("device")  # the overlay names one per process
    files = ["train.yaml", "variants/demo.yaml", "multi_gpu_train.yaml"]
    execute([*launch, *command("training", files, **run)], tmp_path)
    assert (tmp_path / "model.pt").is_file()
    files = ["train.yaml", "variants/demo.yaml", "evaluate.yaml", "multi_gpu_evaluate.yaml"]
    execute([*launch, *command(None, files, **run, fold=-1)], tmp_path)
    with (tmp_path / "predictions.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 8
    by_two = json.loads((tmp_path / "metrics.json").read_text())
    execute(command(None, files[:-1], **run, fold=-1), tmp_path)
    by_one = json.loads((tmp_path / "metrics.json").read_text())
    assert {name: by_one[name] for name in by_two if by_two[name] is not None} == pytest.approx(
        {name: value for name, value in by_two.items() if value is not None}, abs=1e-6
    )


def test_two_processes_learn_what_one_learns_from_the_same_batches(prepared: Path, tmp_path: Path) -> None:
    """Where the loss is a mean over samples: no batch normalisation (CoaT has none), no Dice over a process's batch.

    Nothing is random here. Plain gradient descent: Adam turns the rounding of a gradient near 0 into a whole step.
    """
    overlay = tmp_path / "plain.yaml"
    sgd = "{_target_: torch.optim.SGD, params: $@network.parameters(), lr: '@lr'}"
    overlay.write_text(f"train::warp: '@resize'\ndropout: 0.0\noptimizer: {sgd}\n")
    files = ["train.yaml", "variants/demo.yaml", str(overlay)]
    run = {"encoder": "coat_lite_tiny", "mask_decoder": "none", "lr": 0.1, "epochs": 2, "fold": -1}
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    execute(command("training", files, **arguments(prepared, whole, **run, batch_size=4)), tmp_path)
    of_each = arguments(prepared, shared, **run, batch_size=2)
    of_each.pop("device")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    execute([*launch, *command("training", [*files, "multi_gpu_train.yaml"], **of_each)], tmp_path)
    expected = torch.load(whole / "model_last.pt", weights_only=True)
    for name, tensor in torch.load(shared / "model_last.pt", weights_only=True).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-5)


def test_a_process_that_fails_ends_the_job_with_its_reason(prepared: Path, tmp_path: Path) -> None:
    broken = tmp_path / "prepared"
    shutil.copytree(prepared, broken)
    (broken / "images/5_1.nii").write_bytes(b"")
    run = arguments(broken, tmp_path, fold=-1)
    run.pop("device")
    files = ["train.yaml", "variants/demo.yaml", "multi_gpu_train.yaml"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    with pytest.raises(AssertionError, match=r"5_1\.nii"):
        execute([*launch, *command("training", files, **run)], tmp_path)


def test_series_are_listed_from_a_prepared_set_and_from_nifti_files(prepared: Path) -> None:
    from_list, from_files = series_items(prepared), series_items(prepared / "images")
    assert set(from_list[0]) == {"image", "organs", "patient_id", "series_id"}
    assert from_files[0]["patient_id"] == "0_1"
    assert "organs" not in from_files[0]


def test_a_folder_without_ct_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no CT series in"):
        series_items(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        series_items(tmp_path / "nowhere")


def test_folds_trained_in_turn_score_every_patient_by_the_network_that_has_not_seen_it(
    prepared: Path, tmp_path: Path
) -> None:
    items = json.loads((prepared / "datalist.json").read_text())["training"]
    labels = {item["patient_id"]: item["label"] for item in items}
    for fold in (0, 1):
        run = arguments(prepared, tmp_path / str(fold), fold=fold, predictions_path=str(tmp_path / f"oof/{fold}.csv"))
        for files in (["train.yaml", "variants/demo.yaml"], ["train.yaml", "variants/demo.yaml", "evaluate.yaml"]):
            job = workflow(files, **run)
            job.initialize()
            job.run()
    with (tmp_path / "train.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["patient_id", *SUBMISSION_COLUMNS, "any_injury"])
        writer.writeheader()
        for patient, label in labels.items():
            row = {"patient_id": patient, "any_injury": int(any(label.values()))}
            for healthy, *injuries in GROUPS.values():
                row |= {name: label[name] for name in injuries}
                row[healthy] = int(not any(label[name] for name in injuries))
            writer.writerow(row)
    result = collect_oof(sorted((tmp_path / "oof").iterdir()), tmp_path / "train.csv")
    assert result.patients == len(labels)
    assert 0 < result.scaled_score <= result.score.score
