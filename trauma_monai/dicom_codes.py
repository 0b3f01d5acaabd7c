"""Coded concepts of the DICOM objects that are written: organs, findings and probabilities.

SNOMED CT where it has a code of that very meaning, else the private scheme 99TRAUMA, whose codes are the column names
of probabilities.json. An injury is coded as DICOM has it, by "traumatic injury" and the organ that is its site.
"""

from __future__ import annotations

from highdicom.coding_schemes import CodingSchemeIdentificationItem
from highdicom.sr import CodedConcept
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

__all__ = ["FINDING_SITES", "FINDING_TYPES", "KEY_SLICE", "ORGAN_TYPES", "PRIVATE_SCHEME", "probability_code"]

DESIGNATOR = "99TRAUMA"

PRIVATE_SCHEME = CodingSchemeIdentificationItem(
    designator=DESIGNATOR,
    name="Injury probabilities of trauma_monai",
    responsible_organization="The trauma_monai contributors",
)

# pydicom knows the codes that DICOM itself uses; the others are SNOMED CT's, as HL7's mCODE profiles have them.
INTESTINE = Code("113276009", "SCT", "Intestine")

ORGAN_TYPES = {
    "liver": codes.SCT.Liver,
    "spleen": codes.SCT.Spleen,
    "kidney_left": Code("18639004", "SCT", "Left kidney"),
    "kidney_right": Code("9846003", "SCT", "Right kidney"),
    "bowel": INTESTINE,
}
"""What each organ of :data:`trauma_monai.targets.ORGAN_CODES` is. SNOMED CT has codes for a kidney of either side."""

FINDING_SITES = {
    "liver": codes.SCT.Liver,
    "spleen": codes.SCT.Spleen,
    "kidney": codes.SCT.Kidney,
    "bowel": INTESTINE,
    "extravasation": codes.SCT.Abdomen,
    "any": codes.SCT.Abdomen,
}
"""Where the finding of each group of the competition lies; ``any`` is an injury of any group."""

FINDING_TYPES = {
    **dict.fromkeys(FINDING_SITES, codes.SCT.TraumaticInjury),
    # DICOM's sets have hemorrhage, which is more than contrast agent leaving a vessel, and extravasation at injections.
    "extravasation": Code("extravasation", DESIGNATOR, "Active extravasation"),
}
"""What the finding of each group is."""

KEY_SLICE = CodedConcept("slice_output", DESIGNATOR, "Network output for the slice")

PROBABILITY_MEANINGS = {
    "healthy": "Probability of no {finding}",
    "low": "Probability of low-grade {finding}",
    "high": "Probability of high-grade {finding}",
    "injury": "Probability of {finding}",
}

FINDING_NAMES = {
    "liver": "liver injury",
    "spleen": "spleen injury",
    "kidney": "kidney injury",
    "bowel": "bowel or mesenteric injury",
    "extravasation": "active extravasation",
    "any": "any injury",
}


def probability_code(column: str) -> CodedConcept:
    """Return the code of a column of probabilities.json, such as ``liver_low`` or ``any_injury``."""
    group, _, grade = column.partition("_")
    return CodedConcept(column, DESIGNATOR, PROBABILITY_MEANINGS[grade].format(finding=FINDING_NAMES[group]))
