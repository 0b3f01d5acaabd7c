"""Phantoms: the layout and headers of the competition, injuries that can be seen, the same bytes for the same seed."""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest

from trauma_monai.phantom import dataset, write_phantoms
from trauma_monai.phantom.anatomy import random_anatomy
from trauma_monai.phantom.injuries import PREVALENCE, Injuries, injure, random_grades
from trauma_monai.phantom.rendering import Grid, Rendering, random_phase, render
from trauma_monai.phantom.shapes import Ellipsoid, Inside, Tube, Union, Without
from trauma_monai.phantom.storage import PIXEL_FORMATS, PixelFormat, SeriesHeader
from trauma_monai.targets import GROUPS, ORGAN_CODES

STUDIES = 6
TINY = {"matrix": 48, "slice_thickness_mm": 12.0, "workers": 1}
HEALTHY = dict.fromkeys(PREVALENCE, "healthy")
GRID = Grid((35, 64, 64), (10.0, 6.4, 6.4), (0.0, 0.0, 0.0))


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("phantoms") / "rsna"
    write_phantoms(out, STUDIES, seed=3, test_studies=1, **TINY)
    return out


def rows(table: Path) -> list[dict[str, str]]:
    with table.open() as file:
        return list(csv.DictReader(file))


def series_folders(phantoms: Path) -> list[Path]:
    return sorted(phantoms.glob("train_images/*/*"))


def headers(folder: Path) -> list[pydicom.Dataset]:
    """Headers of a series, feet first by position."""
    found = [pydicom.dcmread(path, stop_before_pixels=True) for path in folder.iterdir()]
    return sorted(found, key=lambda header: np.dot(header.ImagePositionPatient, normal(header)))


def normal(header: pydicom.Dataset) -> np.ndarray:
    return np.cross(header.ImageOrientationPatient[:3], header.ImageOrientationPatient[3:])


def digest(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def scan_of(grades: dict[str, str], phase: str = "portal") -> tuple[Rendering, Rendering]:
    """One patient scanned healthy, and scanned with these injuries and the same noise."""
    rng = np.random.default_rng(5)
    healthy = random_anatomy(rng)
    contrast = random_phase(rng, phase)
    anatomy, injuries = injure(rng, healthy, HEALTHY | grades)
    first = render(healthy, Injuries(HEALTHY, ()), contrast, GRID, np.random.default_rng(1))
    return first, render(anatomy, injuries, contrast, GRID, np.random.default_rng(1))


# Shapes


def test_distance_from_an_ellipsoid_is_zero_on_its_surface_and_negative_inside():
    ball = Ellipsoid((10, 0, 0), (5, 5, 5))
    assert ball.distance(*np.float32([[10, 15, 17], [0, 0, 0], [0, 0, 0]])).tolist() == pytest.approx([-5, 0, 2])


def test_a_turned_ellipsoid_has_its_bounds_turned():
    low, high = Ellipsoid((0, 0, 0), (30, 10, 5), (0, 0, 90)).bounds
    assert high == pytest.approx([10, 30, 5])
    assert low == pytest.approx([-10, -30, -5])


def test_a_tube_narrows_along_its_course():
    tube = Tube([(0, 0, 0), (0, 0, 100)], [10, 20])
    assert tube.distance(*np.float32([[15, 15], [0, 0], [0, 100]])).tolist() == pytest.approx([5, -5])


def test_shapes_are_joined_cut_and_limited():
    left, right = Ellipsoid((-4, 0, 0), (5, 5, 5)), Ellipsoid((4, 0, 0), (5, 5, 5))
    points = np.float32([[-6, 0, 6], [0, 0, 0], [0, 0, 0]])
    inside = {
        "union": (Union(left, right).distance(*points) < 0).tolist(),
        "without": (Without(left, right).distance(*points) < 0).tolist(),
        "inside": (Inside(left, right).distance(*points) < 0).tolist(),
    }
    assert inside == {"union": [True] * 3, "without": [True, False, False], "inside": [False, True, False]}


# Pixels


def test_thirteen_bit_negative_numbers_keep_their_high_bits_clear():
    stored = PixelFormat(13, True, 0).store(np.array([-1000, 0, 400], dtype=np.int16))
    assert stored.tolist() == [8192 - 1000, 0, 400]


def test_unsigned_formats_are_shifted_by_their_intercept():
    hu = np.array([-1024, 40], dtype=np.int16)
    assert PixelFormat(12, False, -1024).store(hu).tolist() == [0, 1064]
    assert PixelFormat(16, False, -8192).store(hu).tolist() == [7168, 8232]


def test_all_pixel_formats_of_the_competition_occur_and_give_back_air(phantoms: Path):
    seen = set()
    for folder in series_folders(phantoms):
        slices = [pydicom.dcmread(path) for path in folder.iterdir()]
        first = slices[0]
        seen.add((first.BitsStored, bool(first.PixelRepresentation), int(first.RescaleIntercept)))
        for image in slices:
            assert image.file_meta.TransferSyntaxUID == "1.2.840.10008.1.2.5"
            raw = image.pixel_array.astype(np.int64) & ((1 << image.BitsStored) - 1)
            if image.PixelRepresentation:
                raw -= (raw >> (image.BitsStored - 1)) << image.BitsStored
            assert raw[0, 0] + image.RescaleIntercept == -1024
    assert seen == {(f.bits_stored, f.signed, f.intercept) for f in PIXEL_FORMATS}


def test_no_header_names_a_person(phantoms: Path):
    for folder in phantoms.glob("*_images/*/*"):
        header = headers(folder)[0]
        assert str(header.PatientName) == ""
        assert header.PatientID == folder.parent.name
        assert header.SeriesInstanceUID.rpartition(".")[2] == folder.name


# Geometry


def test_slices_are_evenly_spaced_along_the_normal(phantoms: Path):
    tilts = []
    for folder in series_folders(phantoms):
        found = headers(folder)
        positions = np.array([header.ImagePositionPatient for header in found], dtype=float)
        np.testing.assert_allclose(
            np.diff(positions, axis=0), np.tile(12 * normal(found[0]), (len(found) - 1, 1)), atol=1e-6
        )
        tilts.append(abs(normal(found[0])[2]) < 0.9999)
    assert 0 < sum(tilts) < len(tilts)


def test_instance_numbers_run_either_way_and_start_above_one(phantoms: Path):
    directions = set()
    for folder in series_folders(phantoms):
        numbers = [int(header.InstanceNumber) for header in headers(folder)]
        assert sorted(numbers) == sorted(int(path.stem) for path in folder.iterdir())
        assert min(numbers) > 1
        directions |= set(np.diff(numbers).tolist())
    assert directions == {1, -1}


def test_head_first_is_the_default_order():
    header = SeriesHeader(
        1, 2, 0, PIXEL_FORMATS[0], first_instance=10, feet_first=False, kvp=120, patient_position="HFS"
    )
    assert header.instance_numbers(3).tolist() == [12, 11, 10]


def test_masks_lie_where_the_slices_lie(phantoms: Path):
    for folder in series_folders(phantoms):
        mask = nib.load(phantoms / "segmentations" / f"{folder.name}.nii")
        assert nib.aff2axcodes(mask.affine) == ("L", "A", "S")
        assert mask.get_data_dtype() == np.uint8
        found = headers(folder)
        assert mask.shape == (48, 48, len(found))
        for index in (0, len(found) - 1):
            # Pixel [z, y, x] is mask[x, Ny - 1 - y, z]; DICOM's x and y point the other way than NIfTI's.
            corner = mask.affine @ (0, 47, index, 1)
            np.testing.assert_allclose(corner[:3] * (-1, -1, 1), found[index].ImagePositionPatient, atol=1e-3)


def test_liver_lies_on_the_right_and_spleen_on_the_left(phantoms: Path):
    for path in (phantoms / "segmentations").iterdir():
        mask = nib.load(path)
        codes = np.asarray(mask.dataobj)
        assert set(np.unique(codes)) == {0, *ORGAN_CODES.values()}
        column = {name: np.argwhere(codes == code)[:, 0].mean() for name, code in ORGAN_CODES.items()}
        assert column["liver"] < column["bowel"] < column["spleen"]
        assert column["kidney_right"] < column["kidney_left"]


# Injuries


@pytest.mark.parametrize(("organ", "codes"), [("liver", [1]), ("spleen", [2]), ("kidney", [3, 4])])
def test_a_laceration_is_darker_than_its_organ_and_larger_when_severe(organ: str, codes: list[int]):
    sizes = {}
    for grade in ("low", "high"):
        healthy, injured = scan_of({organ: grade})
        within = np.isin(healthy.organs, codes) & np.isin(injured.organs, codes)
        darker = within & (injured.hu.astype(int) < healthy.hu.astype(int) - 30)
        sizes[grade] = darker.sum() / within.sum()
    assert 0 < sizes["low"] < sizes["high"] < 0.7


@pytest.mark.parametrize("phase", ["arterial", "portal"])
def test_extravasation_is_bright_in_the_labelled_slices_only(phase: str):
    healthy, injured = scan_of({"extravasation": "injury"}, phase)
    brighter = (injured.hu.astype(int) - healthy.hu > 120).any(axis=(1, 2))
    assert injured.frames["bowel"] == []
    assert injured.frames["extravasation"]
    assert brighter[injured.frames["extravasation"]].all()
    far = np.delete(brighter, np.unique(np.add.outer(injured.frames["extravasation"], (-1, 0, 1)).clip(0, 34)))
    assert not far.any()


def test_bowel_injury_frees_gas_and_changes_the_labelled_slices():
    healthy, injured = scan_of({"bowel": "injury"})
    changed = np.abs(injured.hu.astype(int) - healthy.hu) > 25
    assert changed[injured.frames["bowel"]].sum(axis=(1, 2)).min() > 2
    assert ((injured.hu < -500) & (healthy.hu > -200)).any()


def test_a_healthy_patient_has_no_labelled_slice():
    healthy, _ = scan_of({"liver": "low"})
    assert healthy.frames == {"bowel": [], "extravasation": []}


def test_about_a_third_is_injured_in_each_group_half_of_them_severely():
    rng = np.random.default_rng(0)
    grades = [random_grades(rng) for _ in range(1000)]
    for group in PREVALENCE:
        assert 0.3 < np.mean([grade[group] != "healthy" for grade in grades]) < 0.42
    assert 0.43 < np.mean([g["liver"] == "high" for g in grades if g["liver"] != "healthy"]) < 0.57


# Tables


def test_every_group_of_train_csv_has_one_class_and_any_injury_sums_them_up(phantoms: Path):
    found = rows(phantoms / "train.csv")
    assert len(found) == STUDIES
    for row in found:
        assert all(sum(int(row[column]) for column in columns) == 1 for columns in GROUPS.values())
        assert int(row["any_injury"]) == max(1 - int(row[f"{group}_healthy"]) for group in GROUPS)


def test_series_table_lists_every_series_with_its_aortic_contrast(phantoms: Path):
    found = rows(phantoms / "train_series_meta.csv")
    assert {f"{row['patient_id']}/{row['series_id']}" for row in found} == {
        f"{folder.parent.name}/{folder.name}" for folder in series_folders(phantoms)
    }
    by_patient: dict[str, list[float]] = {}
    for row in found:
        by_patient.setdefault(row["patient_id"], []).append(float(row["aortic_hu"]))
    for first, *second in by_patient.values():
        assert 130 < first < 360
        assert not second or first + 80 < second[0]  # two series are a portal and an arterial one
    assert {len(contrast) for contrast in by_patient.values()} == {1, 2}


def test_labelled_frames_exist_and_belong_to_injured_patients(phantoms: Path):
    found = rows(phantoms / "image_level_labels.csv")
    groups = {"Bowel": "bowel_injury", "Active_Extravasation": "extravasation_injury"}
    truth = {row["patient_id"]: row for row in rows(phantoms / "train.csv")}
    for row in found:
        file = phantoms / "train_images" / row["patient_id"] / row["series_id"] / f"{row['instance_number']}.dcm"
        assert file.is_file()
        assert truth[row["patient_id"]][groups[row["injury_name"]]] == "1"
    labelled = {(row["patient_id"], row["series_id"], groups[row["injury_name"]]) for row in found}
    injured = {
        (row["patient_id"], row["series_id"], column)
        for row in rows(phantoms / "train_series_meta.csv")
        for column in groups.values()
        if truth[row["patient_id"]][column] == "1"
    }
    assert labelled == injured


def test_test_patients_have_images_and_tables_but_no_truth(phantoms: Path):
    (row,) = rows(phantoms / "sample_submission.csv")
    assert [path.name for path in (phantoms / "test_images").iterdir()] == [row["patient_id"]]
    assert (row["bowel_injury"], row["liver_high"]) == ("0.5", "0.333")
    series = {meta["series_id"] for meta in rows(phantoms / "test_series_meta.csv")}
    assert series == {path.name for path in (phantoms / "test_images" / row["patient_id"]).iterdir()}
    assert not any((phantoms / "segmentations" / f"{name}.nii").exists() for name in series)


# The data set as a whole


def test_a_patient_depends_on_seed_and_index_alone(phantoms: Path, tmp_path: Path):
    write_phantoms(tmp_path / "fewer", 2, seed=3, **{**TINY, "workers": 2})
    fewer, more = digest(tmp_path / "fewer" / "train_images"), digest(phantoms / "train_images")
    assert fewer
    assert fewer.items() <= more.items()


def test_another_seed_gives_other_patients(phantoms: Path, tmp_path: Path):
    write_phantoms(tmp_path / "other", 1, seed=4, **TINY)
    assert not {*digest(tmp_path / "other" / "train_images")} & {*digest(phantoms / "train_images")}


def test_segmentations_can_be_left_out(tmp_path: Path):
    done = []
    write_phantoms(tmp_path / "bare", 1, masked_fraction=0, progress=lambda *step: done.append(step), **TINY)
    assert not (tmp_path / "bare" / "segmentations").exists()
    assert done == [(1, 1)]


def test_a_folder_with_content_is_left_alone(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not an empty folder: remove it or name another one"):
        write_phantoms(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(dataset, "write_mask", fail)
    with pytest.raises(OSError, match="disk full"):
        write_phantoms(tmp_path / "out", 1, **TINY)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"studies": 0}, "studies is 0; expected 1 to"),
        ({"studies": 1, "seed": -1}, "seed is -1; expected 0 to"),
        ({"studies": 1, "matrix": 8}, "matrix is 8; expected 32 to 1024"),
        ({"studies": 1, "masked_fraction": 2}, "masked_fraction is 2; expected 0 to 1"),
    ],
)
def test_numbers_out_of_range_are_named(tmp_path: Path, wrong: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        write_phantoms(tmp_path / "out", **wrong)
    assert list(tmp_path.iterdir()) == []
