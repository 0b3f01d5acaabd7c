"""The command line as a user meets it: help, exit codes, one-line reasons, and the whole way from DICOM to a score."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from trauma_monai.targets import SUBMISSION_COLUMNS

COMMANDS = ("phantom", "prepare", "segment", "predict", "convert", "package", "score", "oof")


def trauma_monai(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "trauma_monai", *map(str, arguments)], capture_output=True, text=True, cwd=cwd
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    result = trauma_monai(command, "--help")
    assert result.returncode == 0
    assert "Usage" in result.stdout


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys, trauma_monai.cli as c\n"
        "try: c.app(['--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'monai', 'pandas')))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_wrong_usage_ends_with_code_2() -> None:
    assert trauma_monai("score").returncode == 2
    assert trauma_monai("no-such-command").returncode == 2
    assert trauma_monai("phantom", "out", "--studies", "none").returncode == 2


def write_tables(folder: Path, **changes: float) -> tuple[Path, Path]:
    """Two patients: one with a low-grade liver injury, one healthy; and the uniform submission for them."""
    healthy = {column: float(column.endswith("healthy")) for column in SUBMISSION_COLUMNS}
    injured = {**healthy, "liver_healthy": 0.0, "liver_low": 1.0}
    uniform = {c: 1 / 2 if c.startswith(("bowel", "extravasation")) else 1 / 3 for c in SUBMISSION_COLUMNS}
    solution, submission = folder / "solution.csv", folder / "submission.csv"
    pd.DataFrame([{"patient_id": 1, **injured}, {"patient_id": 2, **healthy}]).to_csv(solution, index=False)
    pd.DataFrame([{"patient_id": 1, **uniform, **changes}, {"patient_id": 2, **uniform}]).to_csv(
        submission, index=False
    )
    return solution, submission


def test_score_prints_json_at_full_precision(tmp_path: Path) -> None:
    result = trauma_monai("score", *write_tables(tmp_path), "--json")
    scored = json.loads(result.stdout)
    assert set(scored) == {"score", "parts"}
    assert set(scored["parts"]) == {"bowel", "extravasation", "kidney", "liver", "spleen", "any_injury"}
    # Uniform: ln 2 for two classes, ln 3 for three, whatever the weights. any: 1 - 1/3 in all groups is the largest.
    assert scored["parts"]["bowel"] == pytest.approx(0.6931471805599453, abs=1e-15)
    assert scored["parts"]["liver"] == pytest.approx(1.0986122886681098, abs=1e-15)
    assert scored["parts"]["any_injury"] == pytest.approx((6 * 0.4054651081081644 + 1.0986122886681098) / 7, abs=1e-15)


def test_a_bad_submission_is_answered_in_one_line_with_code_1(tmp_path: Path) -> None:
    result = trauma_monai("score", *write_tables(tmp_path, liver_low=-0.1))
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "negative" in result.stderr.lower()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    result = trauma_monai("score", tmp_path / "nothing.csv", tmp_path / "nothing.csv")
    assert result.returncode == 1
    assert "nothing.csv" in result.stderr
    assert "Traceback" not in result.stderr


def test_prepare_of_a_folder_that_is_no_competition_says_what_is_missing(tmp_path: Path) -> None:
    result = trauma_monai("prepare", tmp_path, tmp_path / "out")
    assert result.returncode == 1
    assert "train.csv" in result.stderr
