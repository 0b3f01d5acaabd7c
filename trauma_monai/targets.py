"""Organs, injuries and competition columns: the names that every other module agrees on.

Source: RSNA 2023 Abdominal Trauma Detection, data page and evaluation page.
"""

from __future__ import annotations

from typing import NamedTuple

ORGAN_CODES = {"liver": 1, "spleen": 2, "kidney_left": 3, "kidney_right": 4, "bowel": 5}
"""Codes of the competition's segmentations; 0 is background."""

ORGANS = ("liver", "spleen", "kidney", "bowel")
"""Organs that carry a label. The two kidneys share one."""

CODES_OF_ORGAN = {"liver": (1,), "spleen": (2,), "kidney": (3, 4), "bowel": (5,)}
"""Segmentation codes that make up each labelled organ."""


class Target(NamedTuple):
    """One injury that a network predicts.

    Attributes:
        name: its name in datalists, configs and outputs.
        organ: the organ that it sits in, one of :data:`ORGANS`; None when it may be anywhere.
        frame_label: whether the competition says slice by slice where it is visible.
    """

    name: str
    organ: str | None
    frame_label: bool = False


TARGETS = {
    target.name: target
    for target in (
        Target("liver_injury", "liver"),
        Target("spleen_injury", "spleen"),
        Target("kidney_injury", "kidney"),
        Target("liver_low", "liver"),
        Target("liver_high", "liver"),
        Target("spleen_low", "spleen"),
        Target("spleen_high", "spleen"),
        Target("kidney_low", "kidney"),
        Target("kidney_high", "kidney"),
        Target("bowel_injury", "bowel", frame_label=True),
        Target("extravasation_injury", None, frame_label=True),
    )
}

FRAME_TARGETS = tuple(name for name, target in TARGETS.items() if target.frame_label)
"""Targets labelled per slice, in the column order of the sample's ``frame_labels``."""

FRAME_LABEL_NAMES = {"Bowel": "bowel_injury", "Active_Extravasation": "extravasation_injury"}
"""``injury_name`` in image_level_labels.csv -> target."""

GROUPS = {
    "bowel": ("bowel_healthy", "bowel_injury"),
    "extravasation": ("extravasation_healthy", "extravasation_injury"),
    "kidney": ("kidney_healthy", "kidney_low", "kidney_high"),
    "liver": ("liver_healthy", "liver_low", "liver_high"),
    "spleen": ("spleen_healthy", "spleen_low", "spleen_high"),
}
"""Competition columns that sum to one, per group, in the order of train.csv."""

SUBMISSION_COLUMNS = tuple(column for columns in GROUPS.values() for column in columns)
"""The 13 probability columns of a submission."""

CLASS_FREQUENCIES = {
    "bowel_injury": 0.02034,
    "extravasation_injury": 0.06355,
    "kidney_low": 0.03654,
    "kidney_high": 0.02129,
    "liver_low": 0.08230,
    "liver_high": 0.01970,
    "spleen_low": 0.06323,
    "spleen_high": 0.04925,
}
"""How often each class occurs among the 3,147 patients of train.csv: what is said where nothing was assessed."""


def get_target(name: str) -> Target:
    """Look up a target; an unknown name is answered with the known ones.

    Raises:
        KeyError: for a name that is not in :data:`TARGETS`.
    """
    if name not in TARGETS:
        raise KeyError(f"unknown target {name!r}; known: {', '.join(TARGETS)}.")
    return TARGETS[name]
