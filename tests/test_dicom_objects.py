"""DICOM SEG and SR that `predict --dicom` writes, read back by highdicom and judged by dciodvfy."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import highdicom as hd
import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from monai.data import MetaTensor
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.sr.codedict import codes
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from trauma_monai import cli, pipeline
from trauma_monai.dicom_codes import ORGAN_TYPES
from trauma_monai.models import Models
from trauma_monai.pipeline import Predictions, predict
from trauma_monai.pooling import ModelOutput
from trauma_monai.results import SliceScores
from trauma_monai.targets import ORGAN_CODES, ORGANS

STUDY = "1.2.826.0.1.3680043.8.498.7"
TARGETS = ("bowel_injury", "liver_injury", "liver_low", "liver_high")

AXIAL, SAGITTAL, CORONAL = (1, 0, 0, 0, 1, 0), (0, 1, 0, 0, 0, -1), (1, 0, 0, 0, 0, -1)
ROTATED = (-1, 0, 0, 0, -1, 0)  # prone: rows run to the patient's right, columns to the front


def write_series(
    folder: Path, number: int = 1, cosines: tuple[int, ...] = AXIAL, slices: int = 8, **attributes: Any
) -> None:
    """A CT of 24 x 20 pixels of 10 mm; the fifth slice along its normal has a voxel of 700 HU."""
    folder.mkdir(parents=True)
    normal = np.cross(cosines[:3], cosines[3:])
    for z in range(slices):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = CTImageStorage
        meta.MediaStorageSOPInstanceUID = f"{STUDY}.{number}.{z + 1}"
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds = FileDataset(str(folder / f"{z}.dcm"), {}, file_meta=meta, preamble=b"\0" * 128)
        ds.SOPClassUID, ds.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        ds.PatientName, ds.PatientID, ds.PatientBirthDate, ds.PatientSex = "DOE^JANE", "10004", "19700101", "F"
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = STUDY, f"{STUDY}.{number}", f"{STUDY}.0"
        ds.StudyDate, ds.StudyTime, ds.StudyID, ds.AccessionNumber = "20230726", "101500", "S1", "A1"
        ds.ReferringPhysicianName, ds.Modality, ds.ImageType = "", "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
        ds.PositionReferenceIndicator, ds.InstanceNumber = "", z + 1
        center = np.array([0.0, 0.0, -200.0])
        corner = center - np.multiply(cosines[:3], 115.0) - np.multiply(cosines[3:], 95.0) + normal * 20.0 * (z - 3.5)
        ds.ImagePositionPatient, ds.ImageOrientationPatient = corner.tolist(), list(cosines)
        ds.PixelSpacing, ds.SliceThickness, ds.KVP = [10, 10], 20, 120
        ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = 20, 24, 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
        ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType = 1, 0, "HU"
        pixels = np.zeros((20, 24), dtype=np.int16)
        if z == 4:
            pixels[12, 3] = 700
        ds.PixelData = pixels.tobytes()
        for keyword, value in attributes.items():
            if value is None:
                del ds[keyword]
            else:
                setattr(ds, keyword, value)
        ds.save_as(folder / f"{z}.dcm")


def segment(image: MetaTensor) -> MetaTensor:
    """A liver in the right upper half of the body, a spleen in the left, by their place in the patient."""
    index = np.stack(np.meshgrid(*map(np.arange, image.shape[1:]), indexing="ij"), axis=-1)
    affine = np.asarray(image.affine)
    x, y, z = np.moveaxis(index @ affine[:3, :3].T + affine[:3, 3], -1, 0)  # RAS: x to the right, y to the front
    codes_ = np.zeros(image.shape[1:], dtype=np.uint8)
    codes_[(x > 22) & (z > -205)] = ORGAN_CODES["liver"]
    codes_[(x < -52) & (y < -11) & (z > -205)] = ORGAN_CODES["spleen"]
    return MetaTensor(torch.from_numpy(codes_)[None], affine=image.affine)


def classify(image: MetaTensor, organs: MetaTensor) -> tuple[list[ModelOutput], SliceScores]:
    """Bowel: the highest HU of a slice in thousands; liver: 0.5, 0.25 and 0.125."""
    peak = image[0].as_tensor().amax((1, 2)).double().numpy() / 1000
    values = np.stack([peak, *(np.full_like(peak, p) for p in (0.5, 0.25, 0.125))], axis=1)
    z_index = np.arange(len(peak))
    scores = SliceScores(
        TARGETS, ORGANS, z_index, z_index.astype(float), None, values, np.ones((len(peak), len(ORGANS)))
    )
    return [ModelOutput(dict(zip(TARGETS, values.max(axis=0).tolist(), strict=True)))], scores


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Predictions]:
    """Predict ``tmp_path/in`` into ``tmp_path/out`` with networks that do arithmetic."""

    def run_with(source: Path = tmp_path / "in", out: str = "out", weights: str = "a", **options: Any) -> Predictions:
        names = {"variant": "test", "organ_weights": weights, "trauma_weights": "b"}
        monkeypatch.setattr(pipeline, "load_models", lambda *_: Models(segment, classify, names))
        return predict(source, tmp_path / out, "organ.pt", "trauma.pt", **({"dicom": True} | options))

    return run_with


def read_record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "probabilities.json").read_text())


def concept(item: pydicom.Dataset) -> tuple[str, str]:
    return str(item.get("CodeValue") or item.get("LongCodeValue")), str(item.CodingSchemeDesignator)


def measurement_groups(report: pydicom.Dataset) -> dict[str, pydicom.Dataset]:
    """Tracking identifier -> measurement group, of the plain data set."""
    imaging = [item for item in report.ContentSequence if item.ConceptNameCodeSequence[0].CodeValue == "126010"]
    return {item.ContentSequence[0].TextValue: item for item in imaging[0].ContentSequence}


def numbers(group: pydicom.Dataset) -> dict[str, float]:
    return {
        concept(item.ConceptNameCodeSequence[0])[0]: float(item.MeasuredValueSequence[0].NumericValue)
        for item in group.ContentSequence
        if item.ValueType == "NUM" and "ContentSequence" not in item
    }


def test_a_study_gets_a_segmentation_per_series_and_one_report(tmp_path, run):
    write_series(tmp_path / "in/a", number=1)
    write_series(tmp_path / "in/b", number=2)
    run()
    folder = tmp_path / "out/10004"
    written = ["organs_1.dcm", "organs_2.dcm", "report.dcm"]
    assert sorted(path.name for path in folder.glob("*.dcm")) == written
    assert read_record(folder)["dicom_files"] == written
    assert 'href="report.dcm"' in (folder / "report.html").read_text()
    for number in (1, 2):
        (reference,) = pydicom.dcmread(folder / f"organs_{number}.dcm").ReferencedSeriesSequence
        assert reference.SeriesInstanceUID == f"{STUDY}.{number}"


@pytest.mark.parametrize("cosines", [AXIAL, ROTATED, SAGITTAL, CORONAL])
def test_segments_are_the_label_map_and_lie_where_the_organs_are(tmp_path, run, cosines):
    write_series(tmp_path / "in", cosines=cosines)
    run()
    folder = tmp_path / "out/10004"
    label_map: Any = nib.load(folder / "organs.nii.gz")
    segmentation = hd.seg.segread(folder / "organs.dcm")

    # Slice by slice, on the pixels of the source images: NIfTI has columns first.
    instances = [
        uid
        for uid, _, _ in pipeline.read_scan(pipeline.find_studies(tmp_path / "in")[0][0].series[f"{STUDY}.1"]).instances
    ]
    frames = segmentation.get_pixels_by_source_instance(
        instances, combine_segments=True, assert_missing_frames_are_empty=True
    )
    np.testing.assert_array_equal(frames, np.asarray(label_map.dataobj).T)

    # In the patient, by the positions that the object itself carries (LPS: x to the left, y to the back).
    volume = segmentation.get_volume(combine_segments=True)
    for organ, side in (("liver", -1), ("spleen", 1)):
        found = np.argwhere(volume.array == ORGAN_CODES[organ])
        assert len(found) > 100
        x, _, z = (found @ volume.affine[:3, :3].T + volume.affine[:3, 3]).T
        assert (x * side).min() > 22
        assert z.min() > -205


def test_segments_are_coded_and_say_what_made_them(tmp_path, run):
    write_series(tmp_path / "in")
    run()
    segmentation = hd.seg.segread(tmp_path / "out/10004/organs.dcm")
    assert segmentation.segmentation_type == hd.seg.SegmentationTypeValues.BINARY
    assert segmentation.PixelRepresentation == 0
    found = {item.SegmentLabel: item for item in segmentation.SegmentSequence}
    assert {label: concept(item.SegmentedPropertyTypeCodeSequence[0]) for label, item in found.items()} == {
        "liver": ("10200004", "SCT"),
        "spleen": ("78961009", "SCT"),
        "left kidney": ("18639004", "SCT"),
        "right kidney": ("9846003", "SCT"),
        "bowel": ("113276009", "SCT"),
    }
    assert [item.SegmentNumber for item in segmentation.SegmentSequence] == list(ORGAN_CODES.values())
    category = found["liver"].SegmentedPropertyCategoryCodeSequence[0]
    assert concept(category) == (codes.SCT.AnatomicalStructure.value, "SCT")
    algorithm = found["liver"].SegmentationAlgorithmIdentificationSequence[0]
    assert algorithm.AlgorithmName == "trauma_monai organ_ct_segmentation"
    assert "organ_weights=a" in algorithm.AlgorithmParameters
    assert len({tuple(item.RecommendedDisplayCIELabValue) for item in found.values()}) == 4  # kidneys share one


def test_objects_carry_the_patient_and_study_of_their_source(tmp_path, run):
    write_series(tmp_path / "in")
    run()
    for name in ("organs.dcm", "report.dcm"):
        ds = pydicom.dcmread(tmp_path / "out/10004" / name)
        assert (ds.PatientName, ds.PatientID, ds.PatientBirthDate, ds.PatientSex) == (
            "DOE^JANE",
            "10004",
            "19700101",
            "F",
        )
        assert (ds.StudyInstanceUID, ds.StudyDate, ds.AccessionNumber) == (STUDY, "20230726", "A1")
    assert pydicom.dcmread(tmp_path / "out/10004/organs.dcm").FrameOfReferenceUID == f"{STUDY}.0"


def test_the_report_says_what_probabilities_json_says(tmp_path, run):
    write_series(tmp_path / "in")
    run()
    folder = tmp_path / "out/10004"
    record = read_record(folder)
    report = hd.sr.srread(folder / "report.dcm")
    assert isinstance(report, hd.sr.ComprehensiveSR)
    groups = measurement_groups(report)
    assert set(groups) == {"liver", "bowel", "any"}  # spleen, kidney and extravasation are not assessed
    said = {name: value for group in groups.values() for name, value in numbers(group).items()}
    expected = {name: p for name, p in record["probabilities"].items() if name.partition("_")[0] in groups}
    assert said == pytest.approx(expected | {"any_injury": record["any_injury"]}, abs=1e-9)
    assert said["liver_healthy"] == pytest.approx(0.5)


def test_findings_have_their_type_site_and_algorithm(tmp_path, run):
    write_series(tmp_path / "in")
    run()
    content = hd.sr.srread(tmp_path / "out/10004/report.dcm").content
    groups = {group.tracking_identifier: group for group in content.get_image_measurement_groups()}
    assert groups["liver"].finding_type == codes.SCT.TraumaticInjury
    assert [site.value for site in groups["liver"].finding_sites] == [codes.SCT.Liver]
    algorithm = {
        item.ConceptNameCodeSequence[0].CodeMeaning: item.TextValue
        for item in measurement_groups(pydicom.dcmread(tmp_path / "out/10004/report.dcm"))["liver"].ContentSequence
        if item.ValueType == "TEXT" and item.ConceptNameCodeSequence[0].CodeMeaning.startswith("Algorithm")
    }
    assert algorithm["Algorithm Name"] == "trauma_monai trauma_ct_classification"
    assert algorithm["Algorithm Version"] == read_record(tmp_path / "out/10004")["version"]


def test_a_finding_names_the_image_that_shows_it(tmp_path, run):
    write_series(tmp_path / "in")
    run()
    report = pydicom.dcmread(tmp_path / "out/10004/report.dcm")
    (evidence,) = [
        item
        for item in measurement_groups(report)["bowel"].ContentSequence
        if item.ValueType == "NUM" and "ContentSequence" in item
    ]
    assert float(evidence.MeasuredValueSequence[0].NumericValue) == pytest.approx(0.7)
    (image,) = evidence.ContentSequence[0].ReferencedSOPSequence
    assert image.ReferencedSOPInstanceUID == f"{STUDY}.1.5"  # the slice with the bright voxel
    (study,) = report.CurrentRequestedProcedureEvidenceSequence
    assert len(study.ReferencedSeriesSequence[0].ReferencedSOPSequence) == 8


def test_slices_cut_across_the_acquired_ones_name_no_image(tmp_path, run):
    write_series(tmp_path / "in", cosines=CORONAL)
    run()
    report = pydicom.dcmread(tmp_path / "out/10004/report.dcm")
    items = [item for group in measurement_groups(report).values() for item in group.ContentSequence]
    assert not [item for item in items if item.ValueType == "NUM" and "ContentSequence" in item]


def test_the_report_tells_its_limits(tmp_path, run):
    write_series(tmp_path / "in")
    (tmp_path / "in/notes.txt").write_text("x")
    run()
    comments = [
        item.TextValue
        for item in pydicom.dcmread(tmp_path / "out/10004/report.dcm").ContentSequence
        if item.ConceptNameCodeSequence[0].CodeValue == codes.DCM.Comment.value
    ]
    assert comments[0].startswith("For research only. Not a medical device")
    assert comments[1:] == read_record(tmp_path / "out/10004")["warnings"]
    assert "Left out: not a DICOM file (1 x)" in comments


def test_objects_conform_to_the_standard(tmp_path, run):
    """By dciodvfy of dicom3tools, which checks each attribute against the object's definition."""
    if shutil.which("dciodvfy") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("dciodvfy is missing; .ci/run installs dicom3tools.")
        pytest.skip("dciodvfy is not installed (Debian and Ubuntu: apt install dicom3tools)")
    write_series(tmp_path / "in/a", number=1)
    write_series(tmp_path / "in/b", number=2, cosines=SAGITTAL)
    run()
    files = sorted((tmp_path / "out/10004").glob("*.dcm"))
    assert len(files) == 3
    for path in files:
        done = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True)
        lines = (done.stdout + done.stderr).splitlines()
        assert ("Segmentation" if path.name.startswith("organs") else "ComprehensiveSR") in lines
        assert [line for line in lines if line.startswith("Error")] == []


def test_a_repeated_run_makes_the_same_objects_and_another_model_makes_others(tmp_path, run):
    write_series(tmp_path / "in")

    def uids(**options: str) -> list[str]:
        run(**options)
        files = [pydicom.dcmread(tmp_path / options["out"] / "10004" / name) for name in ("organs.dcm", "report.dcm")]
        return [uid for ds in files for uid in (ds.SOPInstanceUID, ds.SeriesInstanceUID)]

    first, again, other = uids(out="first"), uids(out="again"), uids(out="other", weights="c")
    assert len(set(first)) == 4
    assert again == first
    assert not set(other) & set(first)


def test_what_was_finished_without_dicom_is_completed_and_then_kept(tmp_path, run):
    write_series(tmp_path / "in")
    assert run(dicom=False).kept == 0
    assert read_record(tmp_path / "out/10004")["dicom_files"] is None
    assert run().kept == 0
    assert (tmp_path / "out/10004/report.dcm").is_file()
    assert run().kept == 1
    assert run(dicom=False).kept == 1
    assert (tmp_path / "out/10004/report.dcm").is_file()


def assert_everything_but_dicom(folder: Path, reason: str) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["organs.nii.gz", "probabilities.json", "report.html"]
    record = read_record(folder)
    assert record["dicom_files"] == []
    assert record["warnings"][0].startswith("No DICOM SEG and SR were written: ")
    assert reason in record["warnings"][0]
    assert "No DICOM SEG and SR were written" in (folder / "report.html").read_text()


def test_a_nifti_file_gets_the_other_outputs_and_a_remark(tmp_path, run):
    nib.save(nib.Nifti1Image(np.zeros((6, 7, 8), np.int16), np.diag([20.0, 20, 20, 1])), tmp_path / "case.nii.gz")
    run(tmp_path / "case.nii.gz")
    assert_everything_but_dicom(tmp_path / "out/case", "the input is not DICOM")
    assert run(tmp_path / "case.nii.gz").kept == 1


@pytest.mark.parametrize("keyword", ["FrameOfReferenceUID", "StudyInstanceUID"])
def test_a_source_with_blanked_uids_gets_the_other_outputs_and_a_remark(tmp_path, run, keyword):
    write_series(tmp_path / "in", **{keyword: ""})
    run()
    assert_everything_but_dicom(tmp_path / "out/10004", f"lacks {keyword}")


def test_images_that_share_their_uid_are_not_referred_to(tmp_path, run):
    write_series(tmp_path / "in", SOPInstanceUID=f"{STUDY}.1.1")
    run()
    assert_everything_but_dicom(tmp_path / "out/10004", "share a SOPInstanceUID")


def test_anonymised_files_without_optional_attributes_will_do(tmp_path, run):
    lacking = ("PatientName", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID", "AccessionNumber")
    write_series(tmp_path / "in", **dict.fromkeys(lacking, None))
    run()
    for name in ("organs.dcm", "report.dcm"):
        ds = pydicom.dcmread(tmp_path / "out/10004" / name)
        assert all(keyword in ds and not ds[keyword].value for keyword in lacking)


def test_a_slice_that_was_dropped_as_repeated_is_not_referred_to(tmp_path, run):
    write_series(tmp_path / "in")
    copy = pydicom.dcmread(tmp_path / "in/6.dcm")
    copy.SOPInstanceUID = copy.file_meta.MediaStorageSOPInstanceUID = f"{STUDY}.1.99"
    copy.save_as(tmp_path / "in/z_copy.dcm")
    run()
    (reference,) = pydicom.dcmread(tmp_path / "out/10004/organs.dcm").ReferencedSeriesSequence
    named = {item.ReferencedSOPInstanceUID for item in reference.ReferencedInstanceSequence}
    assert named == {f"{STUDY}.1.{z}" for z in range(1, 9)}


def test_a_scan_without_organs_still_gets_its_objects(tmp_path, run, monkeypatch):
    monkeypatch.setitem(globals(), "segment", lambda image: MetaTensor(image.as_tensor().byte() * 0, image.affine))
    write_series(tmp_path / "in")
    run()
    segmentation = hd.seg.segread(tmp_path / "out/10004/organs.dcm")
    assert len(segmentation.SegmentSequence) == 5
    assert not segmentation.pixel_array.any()
    comments = [
        item.get("TextValue", "") for item in pydicom.dcmread(tmp_path / "out/10004/report.dcm").ContentSequence
    ]
    assert any(text.startswith("No abdominal organ was found") for text in comments)


def test_organ_codes_are_those_of_the_standard_where_it_has_them():
    assert (ORGAN_TYPES["liver"], ORGAN_TYPES["spleen"]) == (codes.SCT.Liver, codes.SCT.Spleen)
    assert list(ORGAN_TYPES) == list(ORGAN_CODES)


def test_the_command_line_asks_for_dicom(tmp_path, run, monkeypatch):
    write_series(tmp_path / "in")
    run(dicom=False)
    weights = ["--organ-weights", "organ.pt", "--trauma-weights", "trauma.pt"]
    monkeypatch.setattr(sys, "argv", ["trauma-monai", "predict", str(tmp_path / "in"), str(tmp_path / "out"), *weights])
    sys.argv.append("--dicom")
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert (tmp_path / "out/10004/organs.dcm").is_file()
