"""trauma-monai prepare: volumes, masks, labels, folds, rejections, restarts, cluster."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from dask.distributed import LocalCluster

import trauma_monai.prepare as module
from competition import AFFINE, HU, ROWS, SHAPE, SLICES, items_of, one_voxel, rejected_of, run, write_dicom
from trauma_monai import workers
from trauma_monai.organ_masks import mask_on_grid
from trauma_monai.prepare import prepare
from trauma_monai.rsna_layout import assign_folds
from trauma_monai.targets import SUBMISSION_COLUMNS, TARGETS

# Volumes


def test_a_volume_is_stored_as_hu_with_axes_to_left_back_and_head(competition, out):
    run(competition, out)
    image = nibabel.load(out / "images/10_1.nii")
    assert np.array_equal(np.asanyarray(image.dataobj), HU)
    assert image.get_data_dtype() == np.int16
    assert nibabel.aff2axcodes(image.affine) == ("L", "P", "S")
    assert np.allclose(image.affine, AFFINE)
    assert np.allclose(image.get_qform(), AFFINE, atol=1e-5)
    assert (image.header["sform_code"], image.header["qform_code"]) == (1, 1)
    assert image.header.get_xyzt_units()[0] == "mm"


def test_a_slice_is_one_run_of_bytes_in_the_file(competition, out):
    run(competition, out)
    content = (out / "images/10_1.nii").read_bytes()
    assert len(content) == 352 + 2 * 5 * 6 * 8
    third_slice = np.frombuffer(content, "<i2", count=6 * 8, offset=352 + 2 * 2 * 6 * 8)
    assert np.array_equal(third_slice.reshape(6, 8), HU[:, :, 2].T)


# Masks


def test_a_mask_in_the_competitions_orientation_meets_its_pixels(competition, out):
    # The competition's masks are (L, A, S): the rows run the other way.
    rows_reversed = AFFINE @ np.array([[1, 0, 0, 0], [0, -1, 0, ROWS - 1], [0, 0, 1, 0], [0, 0, 0, 1]])
    competition.add_mask("1", one_voxel()[:, ::-1], rows_reversed)
    run(competition, out)
    mask = nibabel.load(out / items_of(out)["1"]["organs"])
    assert HU[np.asanyarray(mask.dataobj) == 1].tolist() == [416]
    assert mask.get_data_dtype() == np.uint8
    assert np.allclose(mask.affine, AFFINE)
    assert items_of(out)["1"]["organs_from"] == "segmentations"


@pytest.mark.parametrize("axes", ["RAS", "LPS", "SPL", "AIR"])
def test_a_mask_in_any_orientation_meets_its_pixels(tmp_path, axes):
    turned = nibabel.Nifti1Image(one_voxel(), AFFINE).as_reoriented(
        nibabel.orientations.ornt_transform(
            nibabel.orientations.axcodes2ornt("LPS"), nibabel.orientations.axcodes2ornt(axes)
        )
    )
    nibabel.save(turned, tmp_path / "mask.nii")
    assert np.array_equal(mask_on_grid(tmp_path / "mask.nii", SHAPE, AFFINE), one_voxel())


def test_rounding_of_an_affine_is_tolerated(competition, out):
    rounded = AFFINE.copy()
    rounded[:3, 3] += 0.01
    competition.add_mask("1", one_voxel(), rounded)
    run(competition, out)
    assert "organs" in items_of(out)["1"]
    assert rejected_of(out) == []


@pytest.mark.parametrize(
    ("codes", "shift_mm", "reason"),
    [
        (one_voxel(), 3.0, "it lies up to 1.00 voxels from the image"),
        (one_voxel()[:, :, :4], 0, r"shape (8, 6, 4) differs from that of the image, (8, 6, 5)"),
        (one_voxel(9), 0, "values 0 to 9, expected organ codes 0 to 5"),
        (one_voxel() * np.float32(0.5), 0, "values 0 to 0.5, expected organ codes"),
    ],
    ids=["one slice off", "a slice short", "an unknown code", "not a code"],
)
def test_a_mask_that_does_not_fit_is_refused_and_its_series_kept(competition, out, codes, shift_mm, reason):
    shifted = AFFINE.copy()
    shifted[2, 3] += shift_mm
    competition.add_mask("1", codes, shifted)
    run(competition, out)
    assert "organs" not in items_of(out)["1"]
    assert not (out / "organs/10_1.nii").exists()
    [(patient, series, why)] = rejected_of(out)
    assert (patient, series) == ("10", "1")
    assert why.startswith("mask not used: ")
    assert reason in why


def test_a_mask_that_does_not_say_which_side_is_left_is_refused(tmp_path):
    image = nibabel.Nifti1Image(one_voxel(), None)
    image.header["sform_code"] = image.header["qform_code"] = 0
    nibabel.save(image, tmp_path / "mask.nii")
    with pytest.raises(ValueError, match="does not say which side is left"):
        mask_on_grid(tmp_path / "mask.nii", SHAPE, AFFINE)


def test_a_file_that_is_no_mask_is_refused(competition, out):
    competition.add_mask("1", one_voxel()).write_bytes(b"nothing")
    run(competition, out)
    assert rejected_of(out)[0][2].startswith("mask not used: ")


# Labels


def test_labels_are_the_patients_and_a_graded_organ_is_injured_when_it_has_a_grade(competition, out):
    run(competition, out)
    assert set(items_of(out)["1"]["label"].values()) == {0}
    for series in ("2", "3"):
        label = items_of(out)[series]["label"]
        assert list(label) == list(TARGETS)
        assert {name for name, value in label.items() if value} == {"kidney_high", "kidney_injury", "bowel_injury"}


def test_frame_labels_are_slice_indices_whichever_way_the_instances_run(competition, out):
    for series in ("2", "3"):
        for instance, injury in ((1, "Bowel"), (2, "Bowel"), (2, "Active_Extravasation")):
            row = {"patient_id": "20", "series_id": series, "instance_number": instance, "injury_name": injury}
            competition.frames.append(row)
    competition.write_tables()
    run(competition, out)
    # Head first: instance 1 is the uppermost of 5 slices, index 4. Feet first: index 0.
    assert items_of(out)["2"]["frame_labels"] == {"bowel_injury": [3, 4], "extravasation_injury": [3]}
    assert items_of(out)["3"]["frame_labels"] == {"bowel_injury": [0, 1], "extravasation_injury": [1]}
    assert items_of(out)["1"]["frame_labels"] == {"bowel_injury": [], "extravasation_injury": []}


def test_a_frame_label_of_a_slice_that_is_not_there_is_reported(competition, out):
    competition.frames.append({"patient_id": "20", "series_id": "2", "instance_number": 9, "injury_name": "Bowel"})
    competition.write_tables()
    run(competition, out)
    assert rejected_of(out) == [("20", "2", "frame labels not used: no single slice has instance number 9")]
    assert "2" in items_of(out)


def test_an_unknown_injury_name_is_an_error(competition, out):
    competition.frames.append({"patient_id": "20", "series_id": "2", "instance_number": 1, "injury_name": "Spleen"})
    competition.write_tables()
    with pytest.raises(ValueError, match=r"names injuries \['Spleen'\]; known: Bowel, Active_Extravasation"):
        run(competition, out)


def test_an_aorta_that_was_not_measured_is_unknown(competition, out):
    for series, aortic_hu in zip(competition.series, (180.5, -1024.0, None), strict=True):
        series["aortic_hu"] = aortic_hu
    competition.write_tables()
    run(competition, out)
    assert [items_of(out)[series]["aortic_hu"] for series in "123"] == [180.5, None, None]


def test_an_item_holds_what_docs_promise(competition, out):
    run(competition, out)
    item = items_of(out)["3"]
    assert item["image"] == "images/20_3.nii"
    assert (item["patient_id"], item["series_id"], item["num_slices"]) == ("20", "3", 5)
    assert "organs" not in item


# Folds


def test_both_series_of_a_patient_are_in_one_fold(competition, out):
    run(competition, out)
    folds = {series: item["fold"] for series, item in items_of(out).items()}
    assert folds["2"] == folds["3"] != folds["1"]


def test_folds_hold_the_same_share_of_a_rare_injury():
    healthy, bowel, liver = (
        {name: int(name == injured) for name in TARGETS} for injured in ("", "bowel_injury", "liver_low")
    )
    labels = {str(i): (bowel if i < 4 else liver if i < 12 else healthy) for i in range(40)}
    folds = assign_folds(labels, 4)
    assert sorted(folds[str(i)] for i in range(4)) == [0, 1, 2, 3]
    assert sorted(folds[str(i)] for i in range(4, 12)) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert sorted(folds.values()) == [fold for fold in range(4) for _ in range(10)]
    assert assign_folds(dict(reversed(labels.items())), 4) == folds


def test_an_injury_rarer_than_the_folds_does_not_hinder_the_split(recwarn):
    labels = {str(i): {"bowel_injury": int(i == 0), "liver_low": int(i == 1)} for i in range(8)}
    assert sorted(assign_folds(labels, 4).values()) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert not recwarn.list


def test_a_series_that_breaks_moves_nobody_to_another_fold(competition, out):
    run(competition, out)
    before = items_of(out)
    next((competition.folder / "train_images/10/1").iterdir()).write_bytes(b"broken")
    run(competition, out)
    assert {series: item["fold"] for series, item in items_of(out).items()} == {s: before[s]["fold"] for s in "23"}


def test_fewer_patients_than_folds_is_an_error(competition, out):
    with pytest.raises(ValueError, match="2 patients cannot be split into 3 folds"):
        run(competition, out, folds=3)


# What is refused


def test_series_without_labels_folder_or_patient_are_named(competition, out):
    write_dicom(competition.folder / "train_images/20/60")
    competition.add_series("30", "4")
    competition.series.append({"patient_id": "10", "series_id": "5", "aortic_hu": 100})
    competition.write_tables()
    run(competition, out)
    assert set(items_of(out)) == {"1", "2", "3"}
    assert rejected_of(out) == [
        ("10", "5", "no folder train_images/10/5"),
        ("20", "60", "not in train_series_meta.csv: it has no labels"),
        ("30", "4", "its patient is not in train.csv"),
    ]


def test_a_broken_series_does_not_take_the_others_down(competition, out):
    for path in (competition.folder / "train_images/20/2").iterdir():
        path.write_bytes(path.read_bytes()[:200])
    run(competition, out)
    assert set(items_of(out)) == {"1", "3"}
    [(patient, series, reason)] = rejected_of(out)
    assert (patient, series) == ("20", "2")
    assert reason
    assert str(competition.folder) not in reason
    assert not (out / "images/20_2.nii").exists()


@pytest.mark.parametrize("instance", [1, 3, 5])
def test_a_series_with_one_broken_file_is_refused_wherever_that_lies(competition, out, instance):
    (competition.folder / f"train_images/20/2/{instance}.dcm").write_bytes(b"broken")
    run(competition, out)
    assert [row[:2] for row in rejected_of(out)] == [("20", "2")]


def test_an_empty_folder_is_refused(competition, out):
    for path in (competition.folder / "train_images/20/2").iterdir():
        path.unlink()
    run(competition, out)
    assert rejected_of(out) == [("20", "2", "no .dcm files")]


def test_a_patient_whose_groups_do_not_sum_to_one_is_refused(competition, out):
    competition.patient("30", liver_low=1)
    competition.patients["20"]["liver_low"] = 1
    competition.write_tables()
    run(competition, out)
    assert set(items_of(out)) == {"1"}
    assert rejected_of(out)[0] == ("20", "2", "train.csv: columns of liver do not hold exactly one 1")


def test_nothing_that_can_be_read_is_an_error_with_a_reason(competition, out):
    for path in competition.folder.glob("train_images/*/*/*.dcm"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"no series could be prepared \(.+\); all reasons are in .*rejected.csv"):
        run(competition, out)
    assert len(rejected_of(out)) == 3


def test_a_folder_in_another_layout_is_an_error(tmp_path, out):
    with pytest.raises(FileNotFoundError, match="expected the layout of the RSNA 2023 competition"):
        prepare(tmp_path, out)


def test_a_missing_table_and_a_missing_column_are_named(competition, out):
    table = competition.folder / "train_series_meta.csv"
    table.write_text("patient_id,series_id\n10,1\n")
    with pytest.raises(ValueError, match=r"train_series_meta.csv lacks the columns \['aortic_hu'\]"):
        run(competition, out)
    table.unlink()
    with pytest.raises(FileNotFoundError, match=r"no train_series_meta\.csv"):
        run(competition, out)


def test_test_images_become_the_test_section_without_labels(competition, out):
    write_dicom(competition.folder / "test_images/90/8")
    write_dicom(competition.folder / "test_images/90/9")
    (competition.folder / "test_series_meta.csv").write_text("patient_id,series_id,aortic_hu\n90,8,150.5\n")
    summary = run(competition, out)
    assert (summary.training, summary.test) == (3, 2)
    assert items_of(out, "test") == {
        series: {
            "image": f"images/90_{series}.nii",
            "patient_id": "90",
            "series_id": series,
            "aortic_hu": hu,
            "num_slices": 5,
        }
        for series, hu in (("8", 150.5), ("9", None))
    }


# Runs that go on where one stopped


@pytest.mark.parametrize(
    ("table", "text", "reason"),
    [
        ("train.csv", "", "train.csv is not a readable CSV file"),
        ("train.csv", "\xff\xfe", "train.csv is not a readable CSV file"),
        ("train.csv", "{titles}\n10,1,0,1,0,1,0,0,1,0,0,abc,0,0\n", "line 2: spleen_healthy is 'abc'"),
        ("train.csv", "{titles}\n,1,0,1,0,1,0,0,1,0,0,1,0,0\n", "train.csv, line 2: no patient_id"),
        (
            "train_series_meta.csv",
            "patient_id,series_id,aortic_hu\n10,1,high\n",
            "aortic_hu is 'high'; expected a number",
        ),
        (
            "image_level_labels.csv",
            "patient_id,series_id,instance_number,injury_name\n20,2,3.5,Bowel\n",
            "image_level_labels.csv has instance numbers that are not whole",
        ),
    ],
)
def test_a_malformed_table_is_an_error_that_names_it(competition, out, table, text, reason):
    titles = ",".join(("patient_id", *SUBMISSION_COLUMNS))
    (competition.folder / table).write_bytes(text.format(titles=titles).encode("latin-1"))
    with pytest.raises(ValueError, match=reason):
        run(competition, out)


def test_labels_that_contradict_themselves_are_refused(competition, out):
    competition.patient("30")
    for patient_id, any_injury in (("10", 1), ("20", 1), ("30", 0)):
        competition.patients[patient_id]["any_injury"] = any_injury
    columns = ("patient_id", *SUBMISSION_COLUMNS, "any_injury")
    competition._write("train.csv", columns, list(competition.patients.values()))
    run(competition, out)
    assert rejected_of(out) == [("10", "1", "train.csv: any_injury contradicts the other columns")]


def test_frame_labels_of_a_series_that_is_not_there_are_reported(competition, out):
    competition.frames.append({"patient_id": "20", "series_id": "99", "instance_number": 1, "injury_name": "Bowel"})
    competition.write_tables()
    run(competition, out)
    assert rejected_of(out) == [("20", "99", "frame labels of a series that is not there")]


def test_frame_labels_count_the_files_as_the_layout_says(competition, out):
    for path in (competition.folder / "train_images/20/2").iterdir():
        header = pydicom.dcmread(path)
        header.InstanceNumber += 1
        header.save_as(path)
    competition.frames.append({"patient_id": "20", "series_id": "2", "instance_number": 1, "injury_name": "Bowel"})
    competition.write_tables()
    run(competition, out)
    assert items_of(out)["2"]["frame_labels"]["bowel_injury"] == [SLICES - 1], "file 1 lies nearest to the head"


def test_a_series_in_both_sections_is_taken_once(competition, out):
    competition.add_mask("1", one_voxel())
    shutil.copytree(competition.folder / "train_images/10", competition.folder / "test_images/10")
    run(competition, out)
    assert (out / items_of(out)["1"]["organs"]).exists()
    assert items_of(out, "test") == {}
    assert rejected_of(out) == [("10", "1", "in test_images, but train_images has it too")]


@pytest.mark.parametrize("damaged", ["[]", "null", '{"version": 2}'])
def test_a_damaged_record_is_made_again(competition, out, damaged):
    run(competition, out)
    (out / "records/10_1.json").write_text(damaged)
    assert run(competition, out).reused == 2
    assert set(items_of(out)) == {"1", "2", "3"}


def written_at(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in out.glob("images/*")}


def test_what_is_done_is_not_done_again(competition, out):
    assert run(competition, out).reused == 0
    first, datalist = written_at(out), (out / "datalist.json").read_text()
    assert run(competition, out).reused == 3
    assert written_at(out) == first
    assert (out / "datalist.json").read_text() == datalist


def test_overwrite_does_everything_again(competition, out):
    run(competition, out)
    assert run(competition, out, overwrite=True).reused == 0


@pytest.mark.parametrize("broken", ["images/10_1.nii", "records/10_1.json"])
def test_an_output_that_was_cut_short_is_made_again(competition, out, broken):
    run(competition, out)
    (out / broken).write_bytes((out / broken).read_bytes()[:100])
    assert run(competition, out).reused == 2
    assert np.array_equal(np.asanyarray(nibabel.load(out / "images/10_1.nii").dataobj), HU)


def test_a_mask_that_came_later_is_taken_in(competition, out):
    run(competition, out)
    competition.add_mask("3", one_voxel())
    assert run(competition, out).reused == 2
    assert "organs" in items_of(out)["3"]


def test_tables_are_read_anew_though_volumes_are_kept(competition, out):
    run(competition, out)
    competition.patient("10", spleen_low=1)
    competition.write_tables()
    assert run(competition, out).reused == 3
    assert items_of(out)["1"]["label"]["spleen_injury"] == 1


def test_a_rejected_series_is_tried_again(competition, out):
    path = competition.folder / "train_images/20/2/3.dcm"
    content = path.read_bytes()
    path.write_bytes(content[:200])
    run(competition, out)
    assert "2" not in items_of(out)
    path.write_bytes(content)
    assert run(competition, out).reused == 2
    assert "2" in items_of(out)
    assert rejected_of(out) == []


KILLED_WHILE_WRITING = """
import os, signal, sys
import nibabel
from trauma_monai.prepare import prepare

whole = nibabel.Nifti1Image.to_stream
calls = []

def to_stream(image, file):
    calls.append(file)
    if len(calls) == 3:
        file.write(b"half a volume")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    whole(image, file)

nibabel.Nifti1Image.to_stream = to_stream
prepare(sys.argv[1], sys.argv[2], workers=1, folds=2, progress=False)
"""


def test_a_run_that_was_killed_goes_on_where_it_was(competition, out):
    arguments = [sys.executable, "-c", KILLED_WHILE_WRITING, str(competition.folder), str(out)]
    killed = subprocess.run(
        arguments, env=os.environ | {"PYTHONPATH": str(Path(module.__file__).parents[1])}, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert len(list(out.glob("images/*.part"))) == 1
    assert not (out / "images/20_3.nii").exists()
    assert run(competition, out).reused == 2
    assert list(out.rglob("*.part")) == []
    assert np.array_equal(np.asanyarray(nibabel.load(out / "images/20_3.nii").dataobj), HU)
    assert set(items_of(out)) == {"1", "2", "3"}


def test_an_interrupted_run_keeps_what_is_done_and_says_so(competition, out, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(module, "read_series", interrupt_at_call(2, module.read_series))
        with pytest.raises(KeyboardInterrupt):
            run(competition, out)
    assert "interrupted: 1 of 3 series are done and kept" in capsys.readouterr().err
    assert run(competition, out).reused == 1


def interrupt_at_call(number: int, function):
    calls = []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == number:
            raise KeyboardInterrupt
        return function(*args)

    return interrupted


def test_a_full_disk_stops_the_run_and_blames_no_series(competition, out, monkeypatch):
    def full(image, file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nibabel.Nifti1Image, "to_stream", full)
    with pytest.raises(OSError, match="No space left"):
        run(competition, out)
    assert not (out / "rejected.csv").exists()
    assert list(out.rglob("*.part")) == []


# In parallel


def test_workers_of_a_cluster_write_the_same_as_one_process(competition, out, tmp_path):
    next((competition.folder / "train_images/10/1").iterdir()).write_bytes(b"broken")
    run(competition, out)
    with LocalCluster(n_workers=2, processes=False, protocol="tcp", dashboard_address=None) as cluster:
        run(competition, tmp_path / "parallel", scheduler=cluster.scheduler_address)
    for name in ("datalist.json", "rejected.csv", "images/20_2.nii", "images/20_3.nii"):
        assert (tmp_path / "parallel" / name).read_bytes() == (out / name).read_bytes()


def killed_by_series_2(job):
    if job.name == "20_2":
        os.kill(os.getpid(), signal.SIGKILL)
    return prepare_series(job)


prepare_series = module._prepare_series


def test_workers_do_not_wait_for_torch() -> None:
    """Each worker is a process of its own, and imports what it runs."""
    code = "import sys, trauma_monai.prepare; print(sorted({'monai', 'sklearn', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_series_that_kills_its_process_does_not_take_the_others_down(competition, out, tmp_path, monkeypatch):
    run(competition, out)
    monkeypatch.setattr(module, "_prepare_series", killed_by_series_2)
    # One attempt: starting a process takes seconds.
    monkeypatch.setitem(workers.LOCAL_DASK, "distributed.scheduler.allowed-failures", 0)
    run(competition, tmp_path / "parallel", workers=2)
    [(_, series, reason)] = rejected_of(tmp_path / "parallel")
    assert series == "2"
    assert reason.startswith("the process that read it was killed")
    assert items_of(tmp_path / "parallel") == {series: items_of(out)[series] for series in "13"}


# Synthetic studies


def test_organs_of_synthetic_studies_look_like_organs_in_the_prepared_images(dataset_dir):
    items = items_of(dataset_dir).values()
    assert items
    for item in items:
        image, organs = (np.asanyarray(nibabel.load(dataset_dir / item[key]).dataobj) for key in ("image", "organs"))
        for code in (1, 2, 3, 4):
            assert 20 < np.median(image[organs == code]) < 350
        assert np.median(image[organs == 0]) < 0
