import csv
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from trauma_monai.pictures import draw_coronal
from trauma_monai.pooling import ModelOutput
from trauma_monai.report import _spread, render_index, render_report
from trauma_monai.results import (
    SeriesResult,
    SliceScores,
    StudyResult,
    find_key_slices,
    organ_volumes_ml,
    pick_key_slices,
    quality_remarks,
    study_record,
    write_submission,
)
from trauma_monai.targets import GROUPS, ORGANS, SUBMISSION_COLUMNS

TARGETS = ("spleen_injury", "spleen_low", "spleen_high", "bowel_injury")
SPACING = (10.0, 2.0, 2.0)  # z, y, x in mm


def label_map() -> np.ndarray:
    """10 slices of 40 x 60: a spleen (code 2) of 8 x 10 x 10 voxels that ends below the top slice."""
    organs = np.zeros((10, 40, 60), dtype=np.uint8)
    organs[1:9, 15:25, 30:40] = 2
    return organs


def volume() -> np.ndarray:
    image = np.full((10, 40, 60), -1000, dtype=np.int16)
    image[:, 8:32, 10:50] = 40
    image[label_map() == 2] = 120
    return image


def scores(spleen: list[float], bowel: list[float] | None = None) -> SliceScores:
    spleen_injury = np.array(spleen, dtype=np.float32)
    columns = [spleen_injury, spleen_injury * 0.5, spleen_injury * 0.25]
    columns.append(np.zeros_like(spleen_injury) if bowel is None else np.array(bowel, dtype=np.float32))
    z_index = np.linspace(1, 8, len(spleen)).astype(int)
    visibility = np.zeros((len(spleen), 4), dtype=np.float32)
    visibility[:, ORGANS.index("spleen")] = 1
    return SliceScores(
        TARGETS, ORGANS, z_index, z_index * 10.0 - 600, 100 - z_index, np.stack(columns, axis=1), visibility
    )


def series(
    uid: str = "1.2.3", spleen: tuple[float, ...] = (0.1, 0.9, 0.2), remarks: tuple[str, ...] = ()
) -> SeriesResult:
    found = scores(list(spleen))
    return SeriesResult(
        series_uid=uid,
        organs_file="organs.nii.gz",
        shape=(10, 40, 60),
        spacing_mm=SPACING,
        facts={"kVp": 120.0, "PatientName": "DOE^JANE"},
        scores=found,
        outputs=[ModelOutput(dict(zip(TARGETS, found.probabilities.max(axis=0).tolist(), strict=True)))],
        volumes_ml=organ_volumes_ml(label_map(), SPACING),
        remarks=remarks,
        key_slices=find_key_slices(found, volume(), label_map(), SPACING),
        coronal=draw_coronal(volume(), label_map(), SPACING),
    )


def study(*members: SeriesResult, patient_id: str = "10004") -> StudyResult:
    columns = dict.fromkeys(SUBMISSION_COLUMNS, 1 / 3) | {
        "bowel_healthy": 0.9,
        "bowel_injury": 0.1,
        "extravasation_healthy": 0.2,
        "extravasation_injury": 0.8,
        "spleen_healthy": 0.3,
        "spleen_low": 0.5,
        "spleen_high": 0.2,
    }
    return StudyResult(
        patient_id=patient_id,
        study_uid="1.2.9",
        series=members or (series(),),
        pooled=dict(zip(TARGETS, (0.9, 0.45, 0.225, 0.0), strict=True)),
        columns=columns,
        not_assessed=["extravasation", "kidney", "liver"],
        left_out=[],
        model={"variant": "demo"},
        version="0.1.0",
    )


def test_organ_volume_is_voxels_times_voxel_size():
    # 8 * 10 * 10 voxels of 10 * 2 * 2 mm3 = 32,000 mm3
    assert organ_volumes_ml(label_map(), SPACING) == {"spleen": 32.0}


def test_any_injury_is_the_highest_of_the_assessed_groups():
    # bowel 1 - 0.9, spleen 1 - 0.3; extravasation's 0.8 is not the model's
    assert study().any_injury == pytest.approx(0.7)
    assert replace(study(), not_assessed=list(GROUPS)).any_injury is None


def test_second_key_slice_is_suspicious_and_lies_apart():
    # z_index 1, 4, 8, so 30 and 40 mm apart
    assert pick_key_slices(scores([0.6, 0.9, 0.4])) == [("spleen", 1), ("spleen", 0), ("bowel", 0)]
    assert pick_key_slices(scores([0.4, 0.9, 0.4])) == [("spleen", 1), ("bowel", 0)]
    neighbours = replace(scores([0.9, 0.8, 0.1]), z_mm=np.array([0.0, 10.0, 50.0]))
    assert pick_key_slices(neighbours) == [("spleen", 0), ("bowel", 0)]


def test_finding_without_injury_target_is_judged_by_its_grades():
    graded = replace(scores([0.1, 0.8]), targets=("x", "spleen_low", "spleen_high", "bowel_injury"))
    np.testing.assert_allclose(graded.of_group("spleen"), [0.05, 0.4])
    assert graded.of_group("liver") is None


def test_label_map_without_organs_is_remarked_upon():
    (remark,) = quality_remarks(np.zeros((2, 3, 3), dtype=np.uint8), SPACING, {}, {})
    assert remark.startswith("No abdominal organ was found")
    (remark,) = quality_remarks(np.zeros((2, 3, 3), dtype=np.uint8), SPACING, {"liver": 90.0, "kidney_left": 3.0}, {})
    assert remark.startswith("No abdominal organ of an adult's size was found")


def test_stray_voxels_are_not_an_organ():
    organs = label_map()
    organs[0, 0, :40] = 1  # 40 voxels of 0.04 ml: 1.6 ml
    assert list(organ_volumes_ml(organs, SPACING)) == ["spleen"]
    organs[0, 1, :20] = 1  # 2.4 ml
    assert list(organ_volumes_ml(organs, SPACING)) == ["liver", "spleen"]


def test_what_the_reader_changed_is_said_even_of_a_scan_without_organs():
    facts = {"slices_stored_inverted": 3.0, "repeated_slices_dropped": 1.0}
    remarks = quality_remarks(np.zeros((2, 3, 3), dtype=np.uint8), SPACING, {}, facts)
    assert remarks[:2] == [
        "Slices that the series holds more than once were dropped: 1.",
        "Slices whose values were stored inverted (MONOCHROME1) were turned back: 3.",
    ]
    assert len(remarks) == 3


def test_missing_small_and_cut_off_organs_are_remarked_upon():
    organs = label_map()
    organs[8:, 0:2, 0:30] = 1  # 120 voxels, 4.8 ml; 240 mm2 of the top slice
    remarks = quality_remarks(organs, SPACING, organ_volumes_ml(organs, SPACING), {"repeated_slices_dropped": 2.0})
    assert remarks == [
        "Slices that the series holds more than once were dropped: 2.",
        "Not found: left kidney, right kidney, bowel.",
        "Unusually small, perhaps incompletely scanned or segmented: liver.",
        "Cut off at the top of the scan: liver.",
        "Slices lie 10.0 mm apart; small injuries may fall between them.",
    ]


def test_record_has_the_13_columns_and_a_row_per_slice_group():
    record = json.loads(json.dumps(study_record(study())))
    assert list(record["probabilities"]) == list(SUBMISSION_COLUMNS)
    assert record["organs_found"] == ["spleen"]
    assert record["not_assessed"] == ["extravasation", "kidney", "liver"]
    assert record["slices"][1] == {
        "series": "1.2.3",
        "z_index": 4,
        "z_mm": -560.0,
        "instance_number": 96,
        "probabilities": {"spleen_injury": 0.9, "spleen_low": 0.45, "spleen_high": 0.225, "bowel_injury": 0.0},
        "visibility": {"liver": 0.0, "spleen": 1.0, "kidney": 0.0, "bowel": 0.0},
    }


def test_submission_takes_the_most_injured_study_of_a_patient_group_by_group(tmp_path):
    first = study_record(study())
    second = {**first, "probabilities": {**first["probabilities"], "bowel_healthy": 0.4, "bowel_injury": 0.6}}
    second["probabilities"].update(spleen_healthy=0.8, spleen_low=0.1, spleen_high=0.1)
    write_submission([first, second, study_record(study(patient_id="007"))], tmp_path / "submission.csv")
    rows = list(csv.DictReader((tmp_path / "submission.csv").open()))
    assert [row["patient_id"] for row in rows] == ["007", "10004"]
    assert list(rows[0]) == ["patient_id", *SUBMISSION_COLUMNS]
    assert (rows[1]["bowel_injury"], rows[1]["spleen_healthy"], rows[1]["spleen_low"]) == ("0.6", "0.3", "0.5")


def test_scan_of_another_body_part_names_no_organ_and_plays_its_figures_down():
    stray = replace(series(), volumes_ml={"bowel": 60.0})
    assert study_record(study(stray))["organs_found"] == []
    assert study_record(study(stray, series()))["organs_found"] == ["spleen"]
    assert 'class="grid unreliable"' in render_report(study(stray))
    assert 'class="grid unreliable"' not in render_report(study())
    assert "no organ found" in render_index([("10004", study_record(study(stray, patient_id="1")))], [])


def test_labels_are_spread_apart_and_stay_inside():
    assert _spread([50.0, 52.0, 98.0], 10, 100) == [50.0, 60.0, 95.0]
    assert _spread([90.0, 94.0, 99.0], 10, 100) == [75.0, 85.0, 95.0]


def test_report_says_what_is_not_assessed_and_shows_only_known_facts():
    page = render_report(study())
    assert page.count('<span class="tag">not assessed</span>') == 6  # three findings, among the bars and the curves
    assert "RESEARCH USE ONLY" in page
    assert "120 kVp" in page
    assert "DOE" not in page


def test_key_slices_of_several_series_name_their_series_most_suspicious_first():
    page = render_report(study(series("1.2.3"), series("1.2.4", spleen=(0.2, 0.95, 0.1))))
    captions = re.findall(r"Series \d, slice \d+ of 10, image no. \d+, z −\d+ mm", page)  # noqa: RUF001
    assert captions == [
        "Series 2, slice 5 of 10, image no. 96, z −560 mm",  # noqa: RUF001
        "Series 1, slice 5 of 10, image no. 96, z −560 mm",  # noqa: RUF001
        "Series 1, slice 2 of 10, image no. 99, z −590 mm",  # noqa: RUF001
    ]


def test_text_from_a_file_is_escaped():
    page = render_report(study(patient_id="<script>alert(1)</script>"))
    assert "<script" not in page


def test_pages_are_self_contained():
    record = study_record(study())
    for page in (render_report(study()), render_index([("10004", record)], [("a", "no CT")])):
        addresses = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]+)""", page)
        outside = [
            a for a in addresses if not re.match(r"data:|#|10004/report\.html|submission\.csv|rejected\.csv|organs", a)
        ]
        assert addresses
        assert outside == []
        assert "<script" not in page
        assert "@import" not in page
        assert len(page) < 3_000_000


def chromium() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    if os.environ.get("CI") == "true":
        pytest.fail("chromium is not installed, and the report's look is part of what CI checks.")
    pytest.skip("chromium is not installed.")


def browse(page: Path, profile: Path, *options: str) -> subprocess.CompletedProcess[str]:
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    quiet += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"]
    # No host resolves: a page that asked for anything outside would say so on the console.
    quiet += ["--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", f"--user-data-dir={profile}"]
    command = [chromium(), *quiet, *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@pytest.mark.parametrize("width", [375, 1400])
@pytest.mark.parametrize("kind", ["report", "index"])
def test_page_fits_its_window_and_the_console_stays_silent(tmp_path, kind, width):
    long_id = "A" * 64
    members = (series(uid="1." + "2" * 62), series("1.2.4", remarks=("Not found: liver.",)))
    result = study(*members, patient_id=long_id)
    page = {
        "report": render_report(result),
        "index": render_index([(long_id, study_record(result))], [("x" * 90, "no CT")]),
    }
    # Chromium's own window may be wider than a phone, so the page is laid out in a frame of the wanted width.
    (tmp_path / "page.html").write_text(page[kind], encoding="utf-8")
    (tmp_path / "frame.html").write_text(
        f'<iframe src="page.html" style="width:{width}px;height:900px;border:0"></iframe><pre id="measured"></pre>'
        "<script>"
        "onload = () => { const page = document.querySelector('iframe').contentDocument.documentElement;"
        "document.getElementById('measured').textContent = page.scrollWidth + ' ' + page.scrollHeight; };</script>",
        encoding="utf-8",
    )
    done = browse(tmp_path / "frame.html", tmp_path / "profile", "--allow-file-access-from-files", "--dump-dom")
    scroll_width, scroll_height = map(int, re.search(r'id="measured">(\d+) (\d+)<', done.stdout).groups())
    assert scroll_width == width
    assert scroll_height > 400
    assert "CONSOLE" not in done.stderr


def test_screenshot_shows_the_pictures(tmp_path):
    from PIL import Image

    (tmp_path / "page.html").write_text(render_report(study()), encoding="utf-8")
    shot = tmp_path / "shot.png"
    browse(tmp_path / "page.html", tmp_path / "profile", f"--screenshot={shot}", "--window-size=1400,1800")
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    assert pixels.shape == (1800, 1400, 3)
    # The outline of the spleen in its colour #d682b4, wide enough to have full-strength pixels.
    assert (np.abs(pixels - [0xD6, 0x82, 0xB4]).max(axis=2) < 12).sum() > 200
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100
