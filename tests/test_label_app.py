"""MONAI Label serves the bundles: its own app and ours, by a real server in the environment that MONAI Label needs."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from pydicom.uid import (
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from conftest import BUNDLES, PROJECT
from test_decoders import write_jpeg_series
from test_dicom import write_series
from trauma_monai.dicom import read_series
from trauma_monai.targets import ORGAN_CODES, TARGETS

ORGANS, TRAUMA = "organ_ct_segmentation", "trauma_ct_classification"
ENVIRONMENT = PROJECT / ".venv-label"
APP = PROJECT / "trauma_monai/apps/label"

TINY: dict[str, dict[str, Any]] = {
    ORGANS: {
        "num_workers": 0,
        "encoder": "test_resnet",
        "decoder_channels": [16, 8, 8, 8],
        "image_size": 32,
        "z_stride": 1,
        "depth": 16,
        "windows": 2,
        "refine": 2,
    },
    TRAUMA: {
        "encoder": "test_resnet",
        "slice_mode": "equidistant",
        "num_groups": 4,
        "image_size": 32,
        "hidden_size": 8,
    },
}


@pytest.fixture(scope="module")
def python() -> str:
    """The interpreter of MONAI Label's environment."""
    in_ci = os.environ.get("CI") == "true"
    if not in_ci and not (ENVIRONMENT / "installed").is_file():
        pytest.skip("MONAI Label is not installed; scripts/label_env.sh does that")
    made = subprocess.run(
        ["bash", PROJECT / "scripts/label_env.sh"], capture_output=True, text=True, timeout=3000, check=False
    )
    assert made.returncode == 0, made.stdout + made.stderr
    return made.stdout.splitlines()[-1]


def environment() -> dict[str, str]:
    """One thread, no GPU, and no scoring that nobody asked for."""
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "MONAI_LABEL_AUTO_UPDATE_SCORING": "false",
        "PYTHONPATH": "",
    }


def write_bundles(folder: Path) -> None:
    """Write both bundles as `trauma-monai package` would: a variant merged in, as JSON, with (random) weights."""
    for name, tiny in TINY.items():
        root = folder / name
        shutil.copytree(BUNDLES / name, root, ignore=shutil.ignore_patterns("models", "eval", "variants"))
        (root / "models").mkdir()
        for job in ("train", "inference"):
            source = root / f"configs/{job}.yaml"
            config = ConfigParser.load_config_file(source)
            config |= {key: value for key, value in tiny.items() if key in config}
            ConfigParser.export_config_file(config, source.with_suffix(".json"))
            source.unlink()
        torch.manual_seed(3)
        network = ConfigParser(config).get_parsed_content("network_def")
        torch.save(network.state_dict(), root / "models/model.pt")


@dataclass
class Server:
    """A running server, and where its bundles, images and log lie."""

    url: str
    bundles: Path
    studies: Path
    log: Path

    def ask(self, method: str, path: str, body: bytes | None = None, content_type: str = "application/json") -> bytes:
        """Make a request; what fails shows the end of the server's log."""
        request = urllib.request.Request(self.url + path, body, {"Content-Type": content_type}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=300) as response:
                return response.read()
        except urllib.error.HTTPError as error:
            pytest.fail(f"{method} {path}: {error} {error.read().decode()}\n{self.log_tail()}")

    def get(self, path: str) -> Any:
        return json.loads(self.ask("GET", path))

    def post(self, path: str, **params: Any) -> Any:
        return json.loads(self.ask("POST", path, json.dumps(params).encode()))

    def infer(self, model: str, image: str, output: str, **params: Any) -> bytes:
        query = urllib.parse.urlencode({"image": image, "output": output})
        form = urllib.parse.urlencode({"params": json.dumps(params)}).encode()
        return self.ask("POST", f"/infer/{model}?{query}", form, "application/x-www-form-urlencoded")

    def save_label(self, image: str, file: Path) -> None:
        boundary = uuid.uuid4().hex
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="label"; filename="{file.name}"\r\n\r\n'
        body = head.encode() + file.read_bytes() + f"\r\n--{boundary}--\r\n".encode()
        self.ask("PUT", f"/datastore/label?image={image}&tag=final", body, f"multipart/form-data; boundary={boundary}")

    def wait_for(self, task: str) -> None:
        """Wait until the last task in the background (train or scoring) is done."""
        for _ in range(600):
            status = self.get(f"/{task}/")
            if status["status"] not in ("SUBMITTED", "RUNNING"):
                break
            time.sleep(0.5)
        assert status["status"] == "DONE", "\n".join(status["details"]) + self.log_tail()

    def log_tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-60:])


@contextlib.contextmanager
def running(python: str, app: Path, bundles: Path, studies: Path, **conf: str) -> Iterator[Server]:
    """Start a server, wait until it answers, and end it with all that it started."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = Server(f"http://127.0.0.1:{port}", bundles, studies, app / "server.log")
    command = [python, "-m", "monailabel.main", "start_server", "--app", app, "--studies", studies]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += [text for setting in conf.items() for text in ("--conf", *setting)]
    with server.log.open("w") as log:
        process = subprocess.Popen(
            command, cwd=app, env=environment(), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            _wait_until_it_answers(server, process)
            yield server
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait_until_it_answers(server: Server, process: subprocess.Popen) -> None:
    for _ in range(360):
        assert process.poll() is None, f"the server ended:\n{server.log_tail()}"
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{server.url}/info/", timeout=60):
            return
        time.sleep(0.5)
    pytest.fail(f"the server does not answer:\n{server.log_tail()}")


@pytest.fixture(scope="module")
def stock(python: str, dataset_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """MONAI Label's own app for bundles, with both bundles in its folder, on the images of four synthetic patients."""
    folder = tmp_path_factory.mktemp("stock")
    download = [python, "-m", "monailabel.main", "apps", "--download", "--name", "monaibundle", "--output", folder]
    subprocess.run(download, check=True, capture_output=True)
    app = folder / "monaibundle"
    write_bundles(app / "model")
    shutil.copytree(dataset_dir / "images", folder / "studies")
    conf = {"models": f"{ORGANS},{TRAUMA}", "zoo_source": "ngc", "sam2": "false", "epistemic_model": ORGANS}
    with running(python, app, app / "model", folder / "studies", **conf) as server:
        yield server


@pytest.fixture(scope="module")
def ours(python: str, dataset_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Our app on the same images."""
    folder = tmp_path_factory.mktemp("ours")
    app, bundles = folder / "app", folder / "bundles"
    shutil.copytree(APP, app, ignore=shutil.ignore_patterns("logs", "__pycache__"))
    write_bundles(bundles)
    shutil.copytree(dataset_dir / "images", folder / "studies")
    conf = {"bundles_dir": str(bundles), "epistemic_simulation_size": "3"}
    with running(python, app, bundles, folder / "studies", **conf) as server:
        yield server


@pytest.fixture(params=["stock", "ours"])
def server(request: pytest.FixtureRequest) -> Server:
    return request.getfixturevalue(request.param)


def bundle_run(python: str, server: Server, bundle: str, image: Path, out: Path) -> Path:
    """Run the server's bundle by MONAI's command line, with the weights of now."""
    root = server.bundles / bundle
    done = subprocess.run(
        [
            *(python, "-m", "monai.bundle", "run", "--config_file", root / "configs/inference.json"),
            *("--bundle_root", root, "--dataset_dir", image, "--output_dir", out),
        ],
        env=environment(),
        cwd=out,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def image_ids(server: Server) -> list[str]:
    return sorted(path.name.split(".nii")[0] for path in server.studies.glob("*.nii"))


def label_map(server: Server, tmp_path: Path, image: str, **params: Any) -> nib.Nifti1Image:
    file = tmp_path / f"{uuid.uuid4().hex}{params.get('result_extension', '.nii')}"
    file.write_bytes(server.infer(ORGANS, image, "image", **params))
    return nib.load(file)


def values(image: nib.Nifti1Image) -> np.ndarray:
    return np.asanyarray(image.dataobj)


def test_the_organ_masks_are_those_of_monai_bundle_on_the_grid_of_the_image(
    server: Server, python: str, tmp_path: Path
) -> None:
    image_id = image_ids(server)[0]
    served = label_map(server, tmp_path, image_id)
    image = nib.load(server.studies / f"{image_id}.nii")
    expected = nib.load(
        bundle_run(python, server, ORGANS, server.studies / f"{image_id}.nii", tmp_path) / f"{image_id}_organs.nii.gz"
    )
    assert served.shape == image.shape
    np.testing.assert_allclose(served.affine, image.affine, atol=1e-4)
    assert len(np.unique(values(served))) > 2
    np.testing.assert_array_equal(values(served), values(expected))


def test_a_folder_of_dicom_gives_the_masks_of_its_volume(server: Server, rsna_dir: Path, tmp_path: Path) -> None:
    image_id = image_ids(server)[0]
    series = rsna_dir / "train_images" / image_id.replace("_", "/")
    served = label_map(server, tmp_path, str(series), result_extension=".nii.gz")
    np.testing.assert_array_equal(values(served), values(label_map(server, tmp_path, image_id)))


def test_its_older_pydicom_reads_every_transfer_syntax_exactly(python: str, tmp_path: Path) -> None:
    hu = np.random.default_rng(0).integers(-1000, 1000, size=(3, 64, 64))
    syntaxes = (ExplicitVRLittleEndian, RLELossless, JPEG2000Lossless, JPEGLSLossless)
    for syntax in syntaxes:
        (tmp_path / syntax.keyword).mkdir()
        write_series(tmp_path / syntax.keyword, hu, syntax=syntax)
    write_jpeg_series(tmp_path / JPEGLosslessSV1.keyword)
    program = (
        "import sys, pydicom, numpy; from trauma_monai.dicom import read_series; print(pydicom.__version__);"
        "[numpy.save(f'{folder}.npy', read_series(folder).array) for folder in sys.argv[1:]]"
    )
    folders = [tmp_path / syntax.keyword for syntax in (*syntaxes, JPEGLosslessSV1)]
    done = subprocess.run([python, "-c", program, *folders], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2."), "MONAI Label has pydicom 3 now: what is written for 2 can go"
    for folder in folders:
        np.testing.assert_array_equal(np.load(folder.with_suffix(".npy")), read_series(folder).array)


def test_the_scores_are_those_of_monai_bundle(server: Server, python: str, tmp_path: Path) -> None:
    image_id = image_ids(server)[0]
    served = json.loads(server.infer(TRAUMA, image_id, "json"))["prediction"]
    out = bundle_run(python, server, TRAUMA, server.studies / f"{image_id}.nii", tmp_path)
    expected = json.loads((out / "probabilities.json").read_text())[image_id]["targets"]
    assert [(item["idx"], item["label"]) for item in served] == list(enumerate(TARGETS))
    assert [item["score"] for item in served] == pytest.approx(list(expected.values()), abs=1e-6)
    assert len({item["score"] for item in served}) == len(TARGETS)


def test_the_pooling_can_be_chosen_at_each_request(server: Server) -> None:
    highest, average = (
        json.loads(server.infer(TRAUMA, image_ids(server)[0], "json", slice_pooling=mode))["prediction"]
        for mode in ("max", "mean")
    )
    assert all(a["score"] > b["score"] for a, b in zip(highest, average, strict=True))


def test_an_epoch_on_saved_labels_goes_on_from_the_weights_and_replaces_them(
    server: Server, dataset_dir: Path, tmp_path: Path
) -> None:
    model = server.bundles / ORGANS / "models/model.pt"
    before = torch.load(model, weights_only=True)
    for image_id in image_ids(server)[:2]:
        server.save_label(image_id, dataset_dir / f"organs/{image_id}.nii")
    server.post(f"/train/{ORGANS}", max_epochs=1, val_split=0.5)
    server.wait_for("train")
    after = torch.load(model, weights_only=True)
    assert f"Restored all variables from {model}" in server.log.read_text()
    assert set(after) == set(before)
    head = "segmentation_head.weight"
    assert not torch.equal(after[head], before[head])
    assert (after[head] - before[head]).abs().max() < 0.01  # AdamW's first step is as long as the learning rate, 5e-4
    assert label_map(server, tmp_path, image_ids(server)[0]).shape  # served at once


def test_the_kind_and_the_labels_of_each_model_are_known(server: Server) -> None:
    models = server.get("/info/")["models"]
    kinds = {name: model["type"] for name, model in models.items()}
    assert kinds == {ORGANS: "segmentation", TRAUMA: "classification"}
    assert models[ORGANS]["labels"] == ORGAN_CODES
    assert models[TRAUMA]["labels"] == {target: index for index, target in enumerate(TARGETS)}


def test_our_app_offers_what_can_be_labelled_and_trained(ours: Server) -> None:
    info = ours.get("/info/")
    assert info["labels"] == list(ORGAN_CODES)
    assert list(info["trainers"]) == [ORGANS]
    assert list(info["strategies"]) == ["random", "first", "epistemic"]


def scores_after(server: Server, method: str) -> dict[str, float]:
    """Score the images without label, in the background; return what the server then says of them.

    The background and the server write the same file of image infos, and MONAI Label may lose what one of them wrote:
    scoring is asked for again then, as a user would. It does only the images without a score.
    """
    scores: list[float | None] = [None]
    for _ in range(3):
        server.post(f"/scoring/{method}")
        server.wait_for("scoring")
        for _ in range(30):  # the server reads again what the background has written
            images = server.get("/datastore/?output=all")["objects"]
            unlabeled = {name: image["image"]["info"] for name, image in images.items() if not image["labels"]}
            scores = [info.get("epistemic_entropy") for info in unlabeled.values()]
            if None not in scores:
                return dict(zip(unlabeled, scores, strict=True))
            time.sleep(0.5)
    pytest.fail(f"images stay without a score: {scores}\n{server.log_tail()}")


def test_the_organ_bundle_bears_the_scoring_of_the_stock_app(stock: Server) -> None:
    assert len(scores_after(stock, ORGANS)) >= 3


def test_the_image_that_the_network_is_least_certain_of_comes_next(ours: Server) -> None:
    scores = scores_after(ours, "epistemic")
    assert len(set(scores.values())) >= 3
    assert min(scores.values()) > 0
    assert ours.post("/activelearning/epistemic")["id"] == max(scores, key=lambda name: scores[name])


def test_an_app_without_organ_weights_does_not_start(python: str, tmp_path: Path) -> None:
    bundles, app = tmp_path / "bundles", tmp_path / "app"
    shutil.copytree(APP, app, ignore=shutil.ignore_patterns("logs", "__pycache__"))
    write_bundles(bundles)
    (bundles / ORGANS / "models/model.pt").unlink()
    with (
        pytest.raises(AssertionError, match=r"ValueError: no weights at .*organ_ct_segmentation/models/model\.pt"),
        running(python, app, bundles, tmp_path, bundles_dir=str(bundles)),
    ):
        pass
