"""What is known of organs and findings is known of each: targets.py names them, other modules how they are shown."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from trauma_monai import dicom_codes, metrics, pictures, pooling, report, results
from trauma_monai.targets import CODES_OF_ORGAN, GROUPS, ORGAN_CODES, ORGANS

OF_GROUPS = {
    "titles of the report": report.GROUP_TITLES,
    "colours of the report": report.GROUP_COLOURS,
    "order of the report": results.FINDINGS,
    "targets to be assessed": pooling.TARGETS_OF_GROUP,
    "weights of the metric": set(metrics.CLASS_WEIGHTS) - {"any_injury"},
    "sites of findings": set(dicom_codes.FINDING_SITES) - {"any"},
    "names of findings": set(dicom_codes.FINDING_NAMES) - {"any"},
}
OF_ORGAN_CODES = {
    "titles": results.ORGAN_TITLES,
    "least volumes": results.MIN_ORGAN_ML,
    "coded types": dicom_codes.ORGAN_TYPES,
}
OF_ORGANS = {"colours": pictures.ORGAN_COLOURS, "codes": CODES_OF_ORGAN}


@pytest.mark.parametrize("table", OF_GROUPS.values(), ids=OF_GROUPS)
def test_every_group_of_the_competition_has_its_entry(table: Iterable[str]) -> None:
    assert set(table) == set(GROUPS)


@pytest.mark.parametrize("table", OF_ORGAN_CODES.values(), ids=OF_ORGAN_CODES)
def test_every_organ_code_has_its_entry(table: Iterable[str]) -> None:
    assert set(table) == set(ORGAN_CODES)


@pytest.mark.parametrize("table", OF_ORGANS.values(), ids=OF_ORGANS)
def test_every_organ_has_its_entry(table: Iterable[str]) -> None:
    assert set(table) == set(ORGANS)


def test_both_kidneys_are_one_organ_and_no_code_is_left_over() -> None:
    assert sorted(code for codes in CODES_OF_ORGAN.values() for code in codes) == sorted(ORGAN_CODES.values())
