"""What the model zoo's checks, and users, do with a package. A program, run where this project is not importable.

    python zoo_tasks.py PACKAGE OUT SETTINGS.json

SETTINGS has `overrides` of any workflow, `dataset_dir`, `scan` (a NIfTI file), `schema` (of metadata.json) and `other`
(the package of the other bundle). Each task starts from the same fresh state, in a process of its own that this one
forks, has the folder OUT/TASK, and leaves OUT/TASK.log; the last line of that file is `done` when the task succeeded.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import monai.bundle
import torch
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.bundle.scripts import verify_metadata, verify_net_in_out

PACKAGE, OUT, SETTINGS = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(Path(sys.argv[3]).read_text())
CONFIGS = PACKAGE / "configs"
CHECKPOINT = PACKAGE / "models/model.pt"
FILES = {"config_file": str(CONFIGS / "inference.json"), "meta_file": str(CONFIGS / "metadata.json")}


def load_for_inference(folder: Path) -> None:
    _load("inference")


def load_for_training(folder: Path) -> None:
    _load("train")


def _load(workflow_type: str) -> None:
    network = monai.bundle.load(
        PACKAGE.name, bundle_dir=str(PACKAGE.parent), workflow_type=workflow_type, device="cpu", source="github"
    )
    saved = torch.load(CHECKPOINT, weights_only=True)
    torch.testing.assert_close(dict(network.state_dict()), saved, rtol=0, atol=0)


def train(folder: Path) -> None:
    _run_workflow(["train"], "train", dataset_dir=SETTINGS["dataset_dir"], ckpt_dir=folder, output_dir=folder)
    assert (folder / "model.pt").is_file()


def evaluate(folder: Path) -> None:
    _run_workflow(["train", "evaluate"], "train", dataset_dir=SETTINGS["dataset_dir"], output_dir=folder)
    assert json.loads((folder / "metrics.json").read_text())


def infer(folder: Path) -> None:
    _run_workflow(["inference"], "infer", dataset_dir=SETTINGS["scan"], output_dir=folder)


def infer_beside_the_other_package(folder: Path) -> None:
    """One process serves both, as MONAI Label does: the modules that it imports are those of the first."""
    other = Path(SETTINGS["other"])
    monai.bundle.load(
        other.name, bundle_dir=str(other.parent), workflow_type="inference", device="cpu", source="github"
    )
    infer(folder)


def _run_workflow(names: list[str], workflow_type: str, **overrides: Any) -> None:
    """The zoo's own check of a workflow: initialise, find its properties, run."""
    workflow = ConfigWorkflow(
        config_file=[str(CONFIGS / f"{name}.json") for name in names],
        workflow_type=workflow_type,
        **SETTINGS["overrides"],
        **{name: str(value) for name, value in overrides.items()},
    )
    workflow.initialize()
    assert workflow.bundle_root == str(PACKAGE)
    assert not workflow.check_properties()
    workflow.run()
    workflow.finalize()


def train_by_command(folder: Path) -> None:
    """With tracking, which goes into the database that MONAI makes by default."""
    folders = {"ckpt_dir": folder, "output_dir": folder}
    _run_command("training", "train", dataset_dir=SETTINGS["dataset_dir"], tracking="mlflow", **folders)
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlruns.db")
    (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert run.data.metrics


def infer_by_command(folder: Path) -> None:
    _run_command("run", "inference", dataset_dir=SETTINGS["scan"], output_dir=folder)
    assert [path for path in folder.iterdir() if path.suffix in (".json", ".gz")]


def _run_command(run_id: str, name: str, **overrides: Any) -> None:
    """`python -m monai.bundle run RUN_ID ...`, which learns of the bundle's folder by the path of the config only."""
    options = {"config_file": CONFIGS / f"{name}.json", **SETTINGS["overrides"], **overrides}
    sys.argv = ["monai.bundle", "run", run_id]
    sys.argv += [text for key, value in options.items() for text in (f"--{key}", str(value))]
    runpy.run_module("monai.bundle", run_name="__main__", alter_sys=True)


def check_metadata(folder: Path) -> None:
    schema = folder / "schema.json"
    schema.write_bytes(Path(SETTINGS["schema"]).read_bytes())  # where there is a file, MONAI downloads none
    verify_metadata(meta_file=FILES["meta_file"], filepath=str(schema))


def check_network(folder: Path) -> None:
    sys.path.insert(0, str(PACKAGE))  # as the zoo's checks do
    verify_net_in_out(net_id="network_def", device="cpu", **FILES)


def export_torchscript(folder: Path) -> None:
    """As the zoo's full mode: by script, not by trace."""
    network, example = _network(), _example()
    out = str(folder / "model.ts")
    monai.bundle.ckpt_export(net_id="network_def", filepath=out, ckpt_file=str(CHECKPOINT), **FILES)
    torch.testing.assert_close(torch.jit.load(out)(example), network(example))


def export_onnx(folder: Path) -> None:
    import onnxruntime

    network, example = _network(), _example()
    out = str(folder / "model.onnx")
    monai.bundle.onnx_export(net_id="network_def", filepath=out, ckpt_file=str(CHECKPOINT), **FILES)
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    (pred,) = session.run(None, {session.get_inputs()[0].name: example.numpy()})
    torch.testing.assert_close(torch.from_numpy(pred), network(example), rtol=1e-3, atol=1e-4)


def export_program(folder: Path) -> None:
    """By torch.export, which replaces TorchScript."""
    network, example = _network(), _example()
    out = folder / "model.pt2"
    torch.export.save(torch.export.export(network, (example,)), out)
    torch.testing.assert_close(torch.export.load(out).module()(example), network(example))


def _network() -> torch.nn.Module:
    sys.path.insert(0, str(PACKAGE))
    network = ConfigParser(ConfigParser.load_config_file(FILES["config_file"])).get_parsed_content("network_def")
    network.load_state_dict(torch.load(CHECKPOINT, weights_only=True))
    return network.eval()


def _example() -> torch.Tensor:
    image = ConfigParser.load_config_file(FILES["meta_file"])["network_data_format"]["inputs"]["image"]
    torch.manual_seed(0)
    return torch.rand(1, image["num_channels"], *image["spatial_shape"])


TASKS: tuple[Callable[[Path], None], ...] = (
    *(
        load_for_inference,
        load_for_training,
        train,
        evaluate,
        infer,
        infer_beside_the_other_package,
        train_by_command,
        infer_by_command,
    ),
    *(check_metadata, check_network, export_torchscript, export_onnx, export_program),
)


def run_apart(task: Callable[[Path], None]) -> None:
    """Run a task in a fork, so that it finds nothing that another one has imported or put on the path."""
    folder = OUT / task.__name__
    folder.mkdir()
    if (child := os.fork()) == 0:
        log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT)
        os.dup2(log, sys.stdout.fileno())
        os.dup2(log, sys.stderr.fileno())
        try:
            task(folder)
            print("done")
        except BaseException:  # whatever it is, it ends here: only the parent goes on to the next task
            traceback.print_exc(file=sys.stdout)
        finally:
            sys.stdout.flush()
            os._exit(0)
    os.waitpid(child, 0)


if __name__ == "__main__":
    try:
        import trauma_monai  # noqa: F401
    except ModuleNotFoundError:
        pass
    else:
        sys.exit("this project is importable: vendoring would not be tested")
    for each in TASKS:
        run_apart(each)
