import csv
import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from trauma_monai import pipeline
from trauma_monai.bundle_files import ORGAN_BUNDLE, TRAUMA_BUNDLE, config_files, find_bundle
from trauma_monai.classifier import TraumaFlow
from trauma_monai.models import Models
from trauma_monai.networks import deployed
from trauma_monai.organs import OrganSegmenter
from trauma_monai.pipeline import Predictions, predict
from trauma_monai.pooling import ModelOutput
from trauma_monai.results import SliceScores
from trauma_monai.scans import find_studies, read_scan, safe_name
from trauma_monai.targets import GROUPS, ORGANS, SUBMISSION_COLUMNS

TARGETS = ("bowel_injury", "spleen_injury", "spleen_low", "spleen_high")
BACKGROUND_HU, SPLEEN_HU = 0, 100


def write_series(
    folder: Path,
    peak_hu: int,
    patient_id: str = "10004",
    study: str = "1.2.9",
    series: str = "1.2.9.1",
    slices: int = 8,
) -> None:
    """An axial CT of 16 x 12 pixels whose slice 5 (from the feet) peaks at ``peak_hu``; image 1 is at the head."""
    folder.mkdir(parents=True)
    for z in range(slices):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = CTImageStorage
        meta.MediaStorageSOPInstanceUID = f"{series or '1.2.7'}.{z + 1}"
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds = FileDataset(str(folder / f"{z}.dcm"), {}, file_meta=meta, preamble=b"\0" * 128)
        ds.SOPClassUID, ds.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        ds.PatientName, ds.PatientID, ds.Modality = "DOE^JANE", patient_id, "CT"
        ds.PatientBirthDate, ds.ReferringPhysicianName = "19700101", "SMITH^ANN"
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = study, series, "1.2.8"
        ds.SeriesDescription, ds.ImageType = "DOE^JANE abdomen", ["ORIGINAL", "PRIMARY", "AXIAL"]
        ds.InstanceNumber = slices - z
        ds.ImagePositionPatient, ds.ImageOrientationPatient = [-20.0, -15.0, 5.0 * z - 300], [1, 0, 0, 0, 1, 0]
        ds.PixelSpacing, ds.SliceThickness, ds.KVP = [2.5, 2.5], 5.0, 120
        ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = 12, 16, 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
        ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType = 1, 0, "HU"
        pixels = np.full((12, 16), BACKGROUND_HU, dtype=np.int16)
        pixels[0] = -1000  # a row of air
        pixels[4:8, 9:13] = SPLEEN_HU
        if z == 5:
            pixels[10, 2] = peak_hu
        ds.PixelData = pixels.tobytes()
        ds.save_as(folder / f"{z}.dcm")


def segment(image: MetaTensor) -> MetaTensor:
    """Everything at the HU of the spleen is spleen."""
    return MetaTensor((image.as_tensor() == SPLEEN_HU).to(torch.uint8) * 2, affine=image.affine)


def classify(image: MetaTensor, organs: MetaTensor) -> tuple[list[ModelOutput], SliceScores]:
    """Bowel: the highest HU of a slice in thousands; spleen: 0.5, 0.25 and 0.125."""
    peak = image[0].as_tensor().amax((1, 2)).double().numpy() / 1000
    values = np.stack([peak, *(np.full_like(peak, p) for p in (0.5, 0.25, 0.125))], axis=1)
    z_index = np.arange(len(peak))
    visibility = np.repeat((organs[0].as_tensor() > 0).any(2).any(1).numpy().astype(float)[:, None], 4, axis=1)
    scores = SliceScores(TARGETS, ORGANS, z_index, z_index.astype(float), None, values, visibility)
    return [ModelOutput(dict(zip(TARGETS, values.max(axis=0).tolist(), strict=True)))], scores


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Predictions]:
    """Predict ``tmp_path/in`` into ``tmp_path/out`` with networks that do arithmetic."""

    def run_with(source: Path = tmp_path / "in", weights: str = "a", **options: bool) -> Predictions:
        names = {"variant": "test", "organ_weights": weights, "trauma_weights": "b"}
        monkeypatch.setattr(pipeline, "load_models", lambda *_: Models(segment, classify, names))
        return predict(source, tmp_path / "out", "organ.pt", "trauma.pt", **options)

    return run_with


def read_record(folder: Path) -> dict:
    return json.loads((folder / "probabilities.json").read_text())


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_dicom_study_gets_every_file(tmp_path, run):
    write_series(tmp_path / "in", peak_hu=700)
    done = run()
    folder = tmp_path / "out" / "10004"
    assert done.reports == [folder / "report.html"]
    assert sorted(path.name for path in folder.iterdir()) == ["organs.nii.gz", "probabilities.json", "report.html"]
    assert sorted(path.name for path in folder.parent.iterdir()) == ["10004", "index.html", "submission.csv"]
    record = read_record(folder)
    assert (record["patient_id"], record["study"], record["series"]) == ("10004", "1.2.9", ["1.2.9.1"])
    assert record["probabilities"]["bowel_injury"] == pytest.approx(0.7)
    # healthy 1 - .5, low .25, high 2 * .125, over their sum of 1
    assert record["probabilities"]["spleen_healthy"] == pytest.approx(0.5)
    assert record["not_assessed"] == ["extravasation", "kidney", "liver"]
    (row,) = read_rows(tmp_path / "out" / "submission.csv")
    assert list(row) == ["patient_id", *SUBMISSION_COLUMNS]
    assert row["patient_id"] == "10004"
    for columns in GROUPS.values():
        assert sum(float(row[column]) for column in columns) == pytest.approx(1, abs=1e-5)


def test_slices_carry_their_place_in_the_patient_and_their_image_number(tmp_path, run):
    write_series(tmp_path / "in", peak_hu=700)
    run()
    slices = read_record(tmp_path / "out" / "10004")["slices"]
    peak = max(slices, key=lambda row: row["probabilities"]["bowel_injury"])
    # slice 5 of 8, from -300 mm in steps of 5 mm; image 1 is at the head
    assert (peak["z_index"], peak["z_mm"], peak["instance_number"]) == (5, -275.0, 3)
    assert "image no. 3, z −275 mm" in (tmp_path / "out/10004/report.html").read_text()  # noqa: RUF001


def test_label_map_lies_on_the_grid_of_the_dicom_series(tmp_path, run):
    write_series(tmp_path / "in", peak_hu=700)
    run()
    image = nib.load(tmp_path / "out/10004/organs.nii.gz")
    assert image.shape == (16, 12, 8)
    assert image.get_data_dtype() == np.uint8
    # column 9, row 4, slice 0 of the spleen: DICOM (-20 + 9 * 2.5, -15 + 4 * 2.5, -300), and RAS is (-x, -y, z)
    codes = np.asarray(image.dataobj)
    corner = np.argwhere(codes == 2) @ image.affine[:3, :3].T + image.affine[:3, 3]
    np.testing.assert_allclose(corner.max(axis=0), [-2.5, 5.0, -265.0])
    assert (codes == 2).sum() == 4 * 4 * 8


@pytest.mark.parametrize("flips", [(1, 1, 1), (-1, 1, -1)])
def test_label_map_of_a_nifti_file_has_its_axes(tmp_path, run, flips):
    voxels = np.zeros((6, 7, 8), dtype=np.int16)
    voxels[1, 2, 3] = SPLEEN_HU
    affine = np.diag([*(2.0 * np.array(flips)), 1.0])
    nib.save(nib.Nifti1Image(voxels, affine), tmp_path / "case one.nii.gz")
    run(tmp_path / "case one.nii.gz")
    (folder,) = [path for path in (tmp_path / "out").iterdir() if path.is_dir()]
    image = nib.load(folder / "organs.nii.gz")
    np.testing.assert_allclose(image.affine, affine)
    assert np.argwhere(np.asarray(image.dataobj)).tolist() == [[1, 2, 3]]
    assert read_record(folder)["patient_id"] == "case one"


def test_series_of_a_study_are_pooled_by_the_highest(tmp_path, run):
    write_series(tmp_path / "in/b", peak_hu=300, series="1.2.9.2")
    write_series(tmp_path / "in/a", peak_hu=800, series="1.2.9.1")
    run()
    record = read_record(tmp_path / "out" / "10004")
    assert record["network_outputs"]["bowel_injury"] == pytest.approx(0.8)
    assert record["organ_files"] == {"1.2.9.1": "organs_1.nii.gz", "1.2.9.2": "organs_2.nii.gz"}
    assert len(record["slices"]) == 16
    assert (tmp_path / "out/10004/organs_2.nii.gz").is_file()


def test_two_studies_of_a_patient_share_a_row_of_the_submission(tmp_path, run):
    write_series(tmp_path / "in/a", peak_hu=300, study="1.2.8", series="1.2.8.1")
    write_series(tmp_path / "in/b", peak_hu=800, study="1.2.9", series="1.2.9.1")
    done = run()
    assert len({report.parent.name for report in done.reports}) == 2
    assert all(report.parent.name.startswith("10004-") for report in done.reports)
    (row,) = read_rows(tmp_path / "out" / "submission.csv")
    assert float(row["bowel_injury"]) == pytest.approx(0.8)


def test_broken_series_takes_no_other_down(tmp_path, run, monkeypatch):
    write_series(tmp_path / "in/a", peak_hu=300)
    write_series(tmp_path / "in/b", peak_hu=800, series="1.2.9.2")
    write_series(tmp_path / "in/c", peak_hu=500, patient_id="10007", study="1.3", series="1.3.1")
    read = pipeline.read_scan

    def read_or_fail(source):
        if source.series_uid == "1.2.9.2":
            raise ValueError("slice 3 is damaged in /data/DOE_JANE/3.dcm.")
        return read(source)

    monkeypatch.setattr(pipeline, "read_scan", read_or_fail)
    done = run()
    assert len(done.reports) == 2
    assert read_rows(tmp_path / "out/rejected.csv") == [{"path": "1.2.9.2", "reason": "slice 3 is damaged in 3.dcm."}]
    record = read_record(tmp_path / "out" / "10004")
    assert record["series"] == ["1.2.9.1"]
    assert record["warnings"][0] == "Left out: series 1.2.9.2: slice 3 is damaged in 3.dcm."
    assert "slice 3 is damaged" in (tmp_path / "out/10004/report.html").read_text()
    assert not (tmp_path / "out/10004/organs_2.nii.gz").exists()
    monkeypatch.setattr(pipeline, "read_scan", read)
    assert run().kept == 1  # the study that misses a series is tried again
    assert not (tmp_path / "out/rejected.csv").exists()
    assert len(read_record(tmp_path / "out" / "10004")["series"]) == 2


def test_other_files_in_the_folder_are_counted_in_the_report(tmp_path, run):
    write_series(tmp_path / "in", peak_hu=300)
    for name in ("a.txt", "b.txt"):
        (tmp_path / "in" / name).write_text("notes")
    run()
    assert [row["path"] for row in read_rows(tmp_path / "out/rejected.csv")] == ["a.txt", "b.txt"]
    assert read_record(tmp_path / "out/10004")["warnings"][0] == "Left out: not a DICOM file (2 x)"


def test_nothing_to_predict_is_an_error_with_the_reason(tmp_path, run, monkeypatch):
    write_series(tmp_path / "in", peak_hu=300)

    def fail(source):
        raise ValueError("gantry tilt")

    monkeypatch.setattr(pipeline, "read_scan", fail)
    with pytest.raises(ValueError, match="could be predicted: gantry tilt"):
        run()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["rejected.csv"]


def test_failed_second_run_leaves_the_first_result(tmp_path, run, monkeypatch):
    write_series(tmp_path / "in", peak_hu=300)
    run()
    before = (tmp_path / "out/10004/probabilities.json").read_bytes()
    monkeypatch.setattr(pipeline, "render_report", lambda study: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(overwrite=True)
    assert (tmp_path / "out/10004/probabilities.json").read_bytes() == before
    assert not list((tmp_path / "out").glob(".*"))


def test_second_run_keeps_what_is_done_and_redoes_what_has_changed(tmp_path, run):
    write_series(tmp_path / "in", peak_hu=300)
    assert run().kept == 0
    assert run().kept == 1
    assert run(overwrite=True).kept == 0
    assert run(weights="others").kept == 0
    write_series(tmp_path / "in/more", peak_hu=900, series="1.2.9.7")
    assert run(weights="others").kept == 0
    assert read_record(tmp_path / "out" / "10004")["probabilities"]["bowel_injury"] == pytest.approx(0.9)


def test_a_scan_that_was_replaced_by_another_of_the_same_size_is_predicted_again(tmp_path, run):
    write_series(tmp_path / "in", peak_hu=300)
    run()
    shutil.rmtree(tmp_path / "in")
    write_series(tmp_path / "in", peak_hu=900)
    assert run().kept == 0
    assert read_record(tmp_path / "out" / "10004")["probabilities"]["bowel_injury"] == pytest.approx(0.9)


def test_a_full_disk_ends_the_run_and_blames_no_series(tmp_path, run, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    write_series(tmp_path / "in", peak_hu=300)
    monkeypatch.setattr(pipeline.nib, "save", full)
    with pytest.raises(OSError, match="No space left"):
        run()
    assert list((tmp_path / "out").iterdir()) == []


def test_patient_name_is_in_no_output(tmp_path, run):
    write_series(tmp_path / "in", peak_hu=300)
    run()
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) == 5
    for path in files:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        for secret in (b"DOE", b"JANE", b"SMITH", b"19700101"):
            assert secret not in content, path
        assert "DOE" not in str(path.relative_to(tmp_path))


def test_scan_without_organs_is_reported_as_such(tmp_path, run):
    voxels = np.random.default_rng(0).integers(-1000, 90, (20, 16, 12)).astype(np.int16)
    nib.save(nib.Nifti1Image(voxels, np.diag([2.0, 2.0, 3.0, 1.0])), tmp_path / "neck.nii.gz")
    run(tmp_path / "neck.nii.gz")
    record = read_record(tmp_path / "out" / "neck")
    assert record["organs_found"] == []
    assert record["warnings"][0].startswith("No abdominal organ was found")
    assert "No abdominal organ was found" in (tmp_path / "out/neck/report.html").read_text()


def test_patient_ids_become_safe_folder_names():
    assert safe_name("10004", "k") == "10004"
    assert safe_name("../a/b", "k").startswith("a_b-")
    assert safe_name("a/b", "k1") != safe_name("a/b", "k2")
    assert safe_name("", "k").startswith("study-")


def test_study_without_ids_is_named_by_a_checksum_not_by_its_folder(tmp_path, run):
    write_series(tmp_path / "in/DOE_JANE", peak_hu=300, patient_id="", study="", series="")
    write_series(tmp_path / "in/DOE_JOHN", peak_hu=300, patient_id="", study="", series="")
    done = run()
    names = {report.parent.name for report in done.reports}
    assert len(names) == 2
    assert all(name.startswith("study-") for name in names)
    assert "DOE" not in "".join(report.read_text() for report in done.reports)


def test_missing_weights_are_told_before_anything_is_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights at"):
        predict(tmp_path, tmp_path / "out", tmp_path / "organ.pt", tmp_path / "trauma.pt")
    assert not (tmp_path / "out").exists()


def test_missing_input_is_told(tmp_path, run):
    with pytest.raises(ValueError, match="does not exist; expected a folder of DICOM files or a NIfTI file"):
        run(tmp_path / "absent")
    (tmp_path / "a.png").touch()
    with pytest.raises(ValueError, match="neither a folder nor a NIfTI file"):
        run(tmp_path / "a.png")


def test_unknown_variant_and_bundle_are_answered_with_what_there_is(tmp_path):
    root = find_bundle(TRAUMA_BUNDLE)
    with pytest.raises(ValueError, match=r"no variant 'absent'; it has .*demo"):
        config_files(root, "absent")
    with pytest.raises(ValueError, match="no bundle 'organ_ct_segmentation'"):
        find_bundle(ORGAN_BUNDLE, tmp_path)
    (tmp_path / TRAUMA_BUNDLE / "configs").mkdir(parents=True)
    assert find_bundle(TRAUMA_BUNDLE, tmp_path) == tmp_path / TRAUMA_BUNDLE


def save_untrained_network(bundle: str, path: Path) -> Path:
    parser = ConfigParser(ConfigParser.load_config_files(config_files(find_bundle(bundle), "demo")))
    torch.manual_seed(0)
    torch.save(parser.get_parsed_content("network_def").state_dict(), path)
    return path


def test_both_bundles_predict_a_study_by_their_own_configs(tmp_path):
    write_series(tmp_path / "in", peak_hu=300)
    organ = save_untrained_network(ORGAN_BUNDLE, tmp_path / "organ.pt")
    trauma = save_untrained_network(TRAUMA_BUNDLE, tmp_path / "trauma.pt")
    done = predict(tmp_path / "in", tmp_path / "out", organ, trauma, variant="demo", device="cpu")
    record = read_record(tmp_path / "out" / "10004")
    assert len(done.reports) == 1
    assert {row["z_index"] for row in record["slices"]} <= set(range(8))
    assert all(0 <= value <= 1 for row in record["slices"] for value in row["probabilities"].values())
    # The study is as suspicious as its most suspicious slice.
    highest = max(row["probabilities"]["bowel_injury"] for row in record["slices"])
    assert record["network_outputs"]["bowel_injury"] == pytest.approx(highest, abs=1e-6)
    assert record["model"]["organ_variant"] == "demo"


def test_fast_moves_probabilities_by_less_than_a_thousandth_and_no_mask(tmp_path, monkeypatch):
    monkeypatch.setattr(deployed, "gains_from_float16", lambda device: True)
    monkeypatch.setattr(deployed, "can_compile", lambda device: False)
    write_series(tmp_path / "in", peak_hu=300)
    organ = save_untrained_network(ORGAN_BUNDLE, tmp_path / "organ.pt")
    trauma = save_untrained_network(TRAUMA_BUNDLE, tmp_path / "trauma.pt")
    masks, outputs = [], []
    for fast in (False, True):
        out = tmp_path / f"fast_{fast}"
        predict(tmp_path / "in", out, organ, trauma, variant="demo", device="cpu", fast=fast)
        outputs.append(read_record(out / "10004")["network_outputs"])
        masks.append(np.asarray(nib.load(next(out.glob("10004/*.nii.gz"))).dataobj))
    np.testing.assert_array_equal(*masks)
    assert outputs[0] != outputs[1]
    assert outputs[1] == pytest.approx(outputs[0], abs=1e-3)


def test_predict_gives_the_network_what_the_bundle_itself_would_read(tmp_path):
    """`predict` has the volume in memory; `monai.bundle run` reads files and segments inside its preprocessing."""
    write_series(tmp_path / "in", peak_hu=300)
    organ = save_untrained_network(ORGAN_BUNDLE, tmp_path / "organ.pt")
    organ_root, trauma_root = find_bundle(ORGAN_BUNDLE), find_bundle(TRAUMA_BUNDLE)
    parser = ConfigParser(ConfigParser.load_config_files(config_files(trauma_root, "demo")))
    parser.update(
        {"organ_bundle_root": str(organ_root), "organ_weights": str(organ), "organ_variant": "demo", "device": "cpu"}
    )
    by_bundle = parser.get_parsed_content("preprocessing")({"image": str(tmp_path / "in")})

    (study,), _ = find_studies(tmp_path / "in")
    scan = read_scan(study.series["1.2.9.1"])
    organs = OrganSegmenter(organ_root, organ, variant="demo", device="cpu")(scan.image)
    in_memory = TraumaFlow(trauma_root, "demo", torch.device("cpu")).prepare(scan.image, organs)
    for key in ("image", "organs", "visibility", "slice_index"):
        torch.testing.assert_close(
            torch.as_tensor(np.asarray(in_memory[key])), torch.as_tensor(np.asarray(by_bundle[key])), rtol=0, atol=0
        )


def test_slice_in_two_windows_gets_its_highest_probability():
    flow = TraumaFlow.__new__(TraumaFlow)
    flow.targets, flow.organs = ("bowel_injury",), ("bowel",)
    sample = {
        "slice_index": torch.tensor([[1, 4], [4, 7]]),
        "visibility": torch.tensor([[[0.0], [1.0]], [[1.0], [0.5]]]),
    }
    scores = flow.scores(sample, torch.tensor([[[0.1], [0.2]], [[0.6], [0.3]]]))
    assert scores.z_index.tolist() == [1, 4, 7]
    np.testing.assert_allclose(scores.probabilities[:, 0], [0.1, 0.6, 0.3])
    np.testing.assert_allclose(scores.visibility[:, 0], [0.0, 1.0, 0.5])


def test_reader_of_the_written_series_agrees(tmp_path):
    """Guards this module's own DICOM writer."""
    write_series(tmp_path / "in", peak_hu=700)
    assert pydicom.dcmread(tmp_path / "in/5.dcm").pixel_array[10, 2] == 700
