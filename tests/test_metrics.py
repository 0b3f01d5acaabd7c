"""The metrics give the hosts' numbers, and name what is wrong with a table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from trauma_monai.metrics import (
    CSPINE_TARGETS,
    best_constant,
    best_constant_prediction,
    cspine_score,
    read_solution,
    read_submission,
    score_files,
    trauma_score,
)
from trauma_monai.targets import GROUPS, SUBMISSION_COLUMNS

UNIFORM = {
    column: 0.5 if len(columns) == 2 else 1 / 3 for columns in GROUPS.values() for column in columns
}  # sample_submission.csv, but for .333


def one_hot(classes: dict[str, list[int]]) -> pd.DataFrame:
    """A solution from the class index of each group; groups that are not given are healthy."""
    rows = len(next(iter(classes.values())))
    table: dict[str, object] = {"patient_id": [str(100 + row) for row in range(rows)]}
    for group, columns in GROUPS.items():
        of_group = np.array(classes.get(group, [0] * rows))
        table |= {column: (of_group == index).astype(int) for index, column in enumerate(columns)}
    return pd.DataFrame(table)


def constant(solution: pd.DataFrame, row: dict[str, float]) -> pd.DataFrame:
    return pd.DataFrame({"patient_id": solution["patient_id"], **row})


@pytest.fixture(scope="module")
def train() -> pd.DataFrame:
    """3,147 patients with the class counts of the real train.csv, 855 of them injured.

    The score of a constant depends on nothing else.
    """
    counts = {"bowel": [64], "extravasation": [200], "kidney": [115, 67], "liver": [259, 62], "spleen": [199, 155]}
    classes: dict[str, list[int]] = {}
    start = 0
    for group, of_group in counts.items():
        row = np.zeros(3147, int)
        for index, count in enumerate(of_group, start=1):
            row[(start + np.arange(count)) % 855] = index  # injuries are dealt out to the first 855 in turn
            start += count
        classes[group] = row.tolist()
    return one_hot(classes)


def test_best_constant_of_the_real_class_counts(train: pd.DataFrame):
    score = best_constant(train)
    assert score.score == pytest.approx(0.5793558, abs=5e-8)
    expected = {"bowel": 0.1675, "extravasation": 0.6851, "kidney": 0.5111, "liver": 0.6525, "spleen": 0.7591}
    assert score.parts == pytest.approx({**expected, "any_injury": 0.7008}, abs=5e-5)


def test_best_constant_raises_extravasation_only(train: pd.DataFrame):
    row = best_constant_prediction(train)
    assert row["extravasation_injury"] == pytest.approx(0.4903, abs=5e-5)
    assert row["bowel_injury"] == pytest.approx(2 * 64 / (2 * 64 + 3083))
    assert [row[c] for c in GROUPS["liver"]] == pytest.approx([n / 3592 for n in (2826, 2 * 259, 4 * 62)])
    assert list(row) == list(SUBMISSION_COLUMNS)


def test_constants_of_the_specification(train: pd.DataFrame):
    uniform = trauma_score(train, constant(train, UNIFORM))
    assert uniform.score == pytest.approx(0.8836080, abs=5e-8)
    assert uniform.parts["any_injury"] == pytest.approx(0.6195, abs=5e-5)
    means = {column: train[column].mean() for column in SUBMISSION_COLUMNS}
    assert trauma_score(train, constant(train, means)).score == pytest.approx(0.7860663, abs=5e-8)
    weights = {"healthy": 1, "low": 2, "high": 4, "injury": 2}
    weighted = {c: mean * weights[c.split("_")[1]] for c, mean in means.items()}
    weighted["extravasation_injury"] *= 3
    assert trauma_score(train, constant(train, weighted)).score == pytest.approx(0.6090680, abs=5e-8)


@pytest.mark.parametrize("seed", range(3))
def test_no_random_constant_beats_the_best_one(seed: int):
    """On odd tables too: few rows, classes that do not occur, injuries more frequent than any injury's weight."""
    random = np.random.default_rng(seed)
    sizes = {group: len(columns) for group, columns in GROUPS.items()}
    p_healthy = random.uniform(0, 1, 5)
    solution = one_hot(
        {
            group: np.where(random.random(12) < p, 0, random.integers(1, size, 12)).tolist()
            for (group, size), p in zip(sizes.items(), p_healthy, strict=True)
        }
    )
    best = best_constant(solution).score
    start = best_constant_prediction(solution)
    for scale in (0.01, 0.1, 1.0):
        for _ in range(8):
            row = {c: max(value, 1e-12) * np.exp(scale * random.normal()) for c, value in start.items()}
            assert trauma_score(solution, constant(solution, row)).score >= best - 1e-12


def test_score_worked_by_hand():
    """Two patients: one healthy; one with high-grade liver injury and bleeding."""
    solution = one_hot({"liver": [0, 2], "extravasation": [0, 1]})
    submission = constant(solution, UNIFORM)
    submission[["liver_healthy", "liver_low", "liver_high"]] = [[6, 3, 1], [2, 2, 4]]  # sums 10 and 8: normalised
    submission[["extravasation_healthy", "extravasation_injury"]] = [[0.9, 0.1], [0.4, 0.6]]
    score = trauma_score(solution, submission)
    assert score.parts["liver"] == pytest.approx((-np.log(0.6) - 4 * np.log(0.5)) / 5)
    assert score.parts["extravasation"] == pytest.approx((-np.log(0.9) - 6 * np.log(0.6)) / 7)
    assert score.parts["bowel"] == pytest.approx(np.log(2))
    assert score.parts["kidney"] == pytest.approx(np.log(3))
    # The kidney and spleen columns say 2/3 injured, the largest for patient 1; liver says 3/4 for patient 2.
    assert score.parts["any_injury"] == pytest.approx((-np.log(1 / 3) - 6 * np.log(0.75)) / 7)
    assert score.score == pytest.approx(np.mean(list(score.parts.values())))


def test_certainty_is_clipped_at_the_resolution_of_float64_even_for_float32_input():
    solution = one_hot({"bowel": [1]})
    wrong = constant(solution, {c: float(c.endswith("healthy")) for c in SUBMISSION_COLUMNS})
    wrong = wrong.astype({c: "float32" for c in SUBMISSION_COLUMNS})
    assert trauma_score(solution, wrong).parts["bowel"] == pytest.approx(-np.log(np.finfo(np.float64).eps))


def test_studies_all_healthy_and_a_perfect_prediction_score_zero():
    solution = one_hot({"bowel": [0, 0, 0]})
    assert trauma_score(solution, solution).score == pytest.approx(0, abs=1e-12)
    assert best_constant(solution).score == pytest.approx(0, abs=1e-12)


def test_order_of_rows_and_columns_and_type_of_patient_id_do_not_matter():
    solution = one_hot({"liver": [0, 1, 2], "bowel": [1, 0, 0]})
    submission = constant(solution, UNIFORM)
    submission["liver_high"] = [0.1, 0.2, 0.9]
    shuffled = submission.iloc[[2, 0, 1], ::-1].astype({"patient_id": int})
    assert trauma_score(solution, shuffled) == trauma_score(solution.set_index("patient_id"), submission)


def test_weights_of_the_solution_replace_the_table():
    solution = one_hot({"bowel": [0, 1]})
    submission = constant(solution, UNIFORM).assign(bowel_injury=[0.25, 0.75], bowel_healthy=[0.75, 0.25])
    weights = {f"{part}_weight": 1.0 for part in (*GROUPS, "any_injury")}
    hosts = solution.assign(**weights).assign(bowel_weight=[3.0, 1.0], any_injury=[0, 1])
    assert trauma_score(hosts, submission).parts["bowel"] == pytest.approx(-np.log(0.75))
    hosts["bowel_weight"] = [0.0, 1.0]
    with pytest.raises(ValueError, match="weights that are not above 0 in the rows of patients 100"):
        trauma_score(hosts, submission)
    with pytest.raises(ValueError, match=r"lacks columns .'spleen_weight'.; give all six or none"):
        trauma_score(hosts.drop(columns="spleen_weight"), submission)


FLAWS_OF_SUBMISSION = {
    "a negative": ({"liver_low": [0.1, -0.1]}, "liver_low is negative in the rows of patients 101"),
    "no number": ({"liver_low": ["0.1", "high"]}, "liver_low is not a finite number in the rows of patients 101"),
    "infinity": ({"bowel_injury": [np.inf, 1]}, "bowel_injury is not a finite number in the rows of patients 100"),
    "an empty cell": ({"bowel_injury": [0.1, None]}, "bowel_injury is not a finite number in the rows of patients 101"),
    "a zero sum": (
        {"bowel_healthy": [0, 1], "bowel_injury": [0, 0]},
        r"bowel_healthy \+ bowel_injury is 0 in the rows of patients 100",
    ),
    "an unknown column": ({"any_injury": [0, 1]}, "unknown columns .'any_injury'."),
    "a repeated patient": ({"patient_id": ["100", "100"]}, "repeats patients 100; expected one row each"),
    "another patient": ({"patient_id": ["100", "7"]}, "lacks a patient of the solution: 101"),
}


@pytest.mark.parametrize(("change", "message"), FLAWS_OF_SUBMISSION.values(), ids=FLAWS_OF_SUBMISSION)
def test_submission_is_refused_for(change: dict[str, list], message: str):
    solution = one_hot({"liver": [0, 1]})
    with pytest.raises(ValueError, match=message):
        trauma_score(solution, constant(solution, UNIFORM).assign(**change))


def test_submission_with_a_missing_column_or_a_patient_too_many_is_refused():
    solution = one_hot({"liver": [0, 1]})
    submission = constant(solution, UNIFORM)
    with pytest.raises(ValueError, match=r"lacks columns .'spleen_high'."):
        trauma_score(solution, submission.drop(columns="spleen_high"))
    with pytest.raises(ValueError, match="has a patient that the solution lacks: 101"):
        trauma_score(solution[:1], submission)
    with pytest.raises(ValueError, match="no column patient_id"):
        trauma_score(solution, submission.drop(columns="patient_id"))
    with pytest.raises(ValueError, match="no rows"):
        trauma_score(solution, submission[:0])


FLAWS_OF_SOLUTION = {
    "two classes": ({"liver_low": [0, 1], "liver_high": [0, 1]}, "liver columns are not one-hot .* patients 101"),
    "no class": ({"liver_low": [0, 0]}, "liver columns are not one-hot in the rows of patients 101"),
    "a half": ({"liver_low": [0.5, 1]}, "labels other than 0 and 1 in the rows of patients 100"),
    "a wrong any_injury": ({"any_injury": [1, 1]}, "any_injury contradicts the groups in the rows of patients 100"),
}


@pytest.mark.parametrize(("change", "message"), FLAWS_OF_SOLUTION.values(), ids=FLAWS_OF_SOLUTION)
def test_solution_is_refused_for(change: dict[str, list], message: str):
    with pytest.raises(ValueError, match=message):
        best_constant(one_hot({"liver": [0, 1]}).assign(**change))


def test_error_names_a_few_rows_and_counts_the_rest():
    solution = one_hot({"liver": [0] * 8})
    submission = constant(solution, UNIFORM).assign(liver_low=-1.0)
    with pytest.raises(ValueError, match="patients 100, 101, 102, 103, 104 and 3 more; expected"):
        trauma_score(solution, submission)


def test_files_are_read_with_text_ids_and_scored(tmp_path: Path):
    solution = one_hot({"liver": [0, 1]}).assign(patient_id=["007", "8"])
    solution.to_csv(tmp_path / "solution.csv", index=False)
    constant(solution, UNIFORM).to_csv(tmp_path / "submission.csv", index=False)
    assert list(read_solution(tmp_path / "solution.csv").index) == ["007", "8"]
    assert read_submission(tmp_path / "submission.csv").loc["007", "liver_low"] == pytest.approx(1 / 3)
    score = score_files(tmp_path / "solution.csv", tmp_path / "submission.csv", "rsna2023")
    assert score == trauma_score(solution, constant(solution, UNIFORM))
    with pytest.raises(ValueError, match="unknown competition 'rsna2024'; known: rsna2023, rsna2022"):
        score_files(tmp_path / "solution.csv", tmp_path / "submission.csv", "rsna2024")
    (tmp_path / "empty.csv").touch()
    with pytest.raises(ValueError, match="not a readable CSV"):
        read_solution(tmp_path / "empty.csv")


# RSNA 2022 ---------------------------------------------------------------------------------------------------------

CSPINE_POSITIVES = dict(zip(CSPINE_TARGETS, (961, 146, 285, 73, 108, 162, 277, 393), strict=True))
"""Of the 2,019 studies of the real train.csv."""


def cspine_table(labels: np.ndarray) -> pd.DataFrame:
    """Rows ``<study>_<target>`` from an array (studies, 8)."""
    row_ids = [f"1.2.{study}_{target}" for study in range(len(labels)) for target in CSPINE_TARGETS]
    return pd.DataFrame({"row_id": row_ids, "fractured": labels.ravel()})


@pytest.fixture(scope="module")
def cspine_train() -> pd.DataFrame:
    """2,019 studies with the real count of positives of each target; which fractures coincide is made up."""
    labels = np.zeros((2019, 8))
    start = 0
    for column, count in enumerate(CSPINE_POSITIVES.values()):
        if column == 0:
            labels[:count, 0] = 1
            continue
        labels[(start + np.arange(count)) % 961, column] = 1
        start += count
    return cspine_table(labels)


def test_cspine_worked_example():
    """-(2 ln .8 + ln .9 + ln .8 + 0 + 2 ln .6 + ln .7 + ln .9 + 14 ln .9) / 23."""
    solution = cspine_table(np.array([[1, 1, 0, 0, 0, 1, 0, 0]]))
    submission = cspine_table(np.array([[0.9, 0.8, 0.1, 0.2, 0.0, 0.6, 0.3, 0.1]]))
    for normalise in ("row", "global"):
        assert cspine_score(solution, submission, normalise).score == pytest.approx(0.162327, abs=5e-7)


def test_cspine_row_weighs_studies_alike_and_global_by_their_weights():
    """A healthy study (weights 14) at .5 throughout, and the worked example (weights 23)."""
    solution = cspine_table(np.array([[0] * 8, [1, 1, 0, 0, 0, 1, 0, 0]]))
    submission = cspine_table(np.array([[0.5] * 8, [0.9, 0.8, 0.1, 0.2, 0.0, 0.6, 0.3, 0.1]]))
    assert cspine_score(solution, submission).score == pytest.approx((np.log(2) + 0.162327) / 2, abs=5e-7)
    expected = (14 * np.log(2) + 23 * 0.162327) / (14 + 23)
    assert cspine_score(solution, submission, "global").score == pytest.approx(expected, abs=5e-7)


def test_cspine_constants_of_the_specification(cspine_train: pd.DataFrame):
    def score(row: list[float], normalise: str) -> float:
        return cspine_score(cspine_train, cspine_table(np.tile(row, (2019, 1))), normalise).score

    means = [count / 2019 for count in CSPINE_POSITIVES.values()]
    best = [0.644966, 0.134873, 0.247396, 0.069790, 0.101551, 0.148556, 0.241289, 0.325871]
    assert score([0.5] * 8, "row") == pytest.approx(0.693147, abs=5e-7)
    assert score([0.5] * 8, "global") == pytest.approx(0.693147, abs=5e-7)
    # "row" depends on which fractures coincide too, which the counts do not tell.
    assert score(means, "global") == pytest.approx(0.612669, abs=5e-7)
    assert score(best, "global") == pytest.approx(0.566751, abs=5e-7)


def test_cspine_truth_clipped_to_a_percent_costs_its_logarithm(cspine_train: pd.DataFrame):
    nearly = cspine_train.assign(fractured=cspine_train["fractured"].clip(0.01, 0.99))
    score = cspine_score(cspine_train, nearly)
    assert score.score == pytest.approx(-np.log(0.99))
    assert score.parts == pytest.approx(dict.fromkeys(CSPINE_TARGETS, -np.log(0.99)))


def test_cspine_certain_and_wrong_is_clipped():
    solution = cspine_table(np.zeros((1, 8)))
    wrong = cspine_table(np.eye(8)[:1])  # patient_overall certain, 7 of 14 weights
    # abs: 1 - 1e-15 is rounded in float64.
    assert cspine_score(solution, wrong).score == pytest.approx(-0.5 * np.log(1e-15), abs=2e-3)


def test_cspine_rows_at_fault_are_named():
    solution = cspine_table(np.zeros((1, 8)))
    submission = cspine_table(np.full((1, 8), 0.1))
    with pytest.raises(ValueError, match=r"row_id 1.2.0 C1 does not read <study>_<patient_overall"):
        cspine_score(solution, submission.replace("1.2.0_C1", "1.2.0 C1"))
    with pytest.raises(ValueError, match=r"studies 1.2.0 do not have 8 rows each"):
        cspine_score(solution, submission[1:])
    with pytest.raises(ValueError, match=r"lacks a row_id of the solution: 1.2.0_C1"):
        cspine_score(solution, submission.assign(row_id=submission["row_id"].str.replace("1.2.0", "1.2.1")))
    with pytest.raises(ValueError, match=r"fractured lies outside 0 to 1 in rows 1.2.0_patient_overall"):
        cspine_score(solution, submission.assign(fractured=[1.5] + [0.1] * 7))
    with pytest.raises(ValueError, match="neither 0 nor 1"):
        cspine_score(submission, submission)
    with pytest.raises(ValueError, match="expected row_id, fractured"):
        cspine_score(solution, submission.rename(columns={"fractured": "p"}))
    with pytest.raises(ValueError, match="expected 'row' or 'global'"):
        cspine_score(solution, submission, "none")
