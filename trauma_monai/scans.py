"""What is in an input: DICOM series or a NIfTI file -> studies to predict, and each series in memory."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import LoadImage
from monai.utils import MetaKeys, SpaceKeys

from trauma_monai.dicom import SeriesFiles, discover_series, read_series
from trauma_monai.volume_reader import NIFTI, VolumeReader

__all__ = ["LeftOut", "Scan", "StudyFiles", "check_input", "find_studies", "one_line", "read_scan", "source_files"]

FOLDERS = re.compile(r"(?:[A-Za-z]:)?[^\s'\"]*[/\\](?=[^\s'\"/\\])")
"""The folders of a path within a sentence."""


class LeftOut(NamedTuple):
    """A file, folder or series that was not predicted, and why."""

    path: str
    reason: str


class Scan(NamedTuple):
    """One series in memory.

    Attributes:
        image: HU of shape (1, X, Y, Z) in the axes of the input, with a RAS+ affine.
        facts: kVp and the like; see :data:`trauma_monai.report.FACTS`.
        instances: SOPInstanceUID, InstanceNumber and file of each slice along the last axis; none for a NIfTI file.
    """

    image: MetaTensor
    facts: Mapping[str, str | float]
    instances: tuple[tuple[str, int, Path], ...]

    def instances_from_feet(self) -> tuple[tuple[str, int, Path], ...]:
        """Return the instances in the order of displayed slices; none when these are not the acquired ones."""
        axis, sign = nib.io_orientation(np.asarray(self.image.affine))[2]
        if axis != 2:
            return ()
        return self.instances if sign > 0 else self.instances[::-1]


@dataclass(frozen=True)
class StudyFiles:
    """What belongs to one study.

    Attributes:
        patient_id: DICOM PatientID; the stem of a NIfTI file; the folder where a PatientID is missing.
        study_uid: StudyInstanceUID, or the stem of a file.
        folder: name of the study's folder in the output, safe on every file system.
        series: series UID (or stem) -> what to read.
    """

    patient_id: str
    study_uid: str
    folder: str
    series: Mapping[str, SeriesFiles | Path]


def find_studies(path: Path) -> tuple[list[StudyFiles], list[LeftOut]]:
    """Find what can be predicted: in a DICOM folder (any mix of series and patients), a NIfTI file or a folder of them.

    NIfTI files in a folder count where it holds no CT in DICOM: beside DICOM they are masks of it, mostly.

    Returns:
        Studies, ordered by folder name, and what is not a CT series, with the reason.

    Raises:
        ValueError: see :func:`check_input`.
    """
    check_input(path)
    if not path.is_dir():
        return [_nifti_study(path)], []
    found, rejected = discover_series(path)
    nifti = [] if found else sorted(file for file in path.iterdir() if _is_nifti(file))
    left_out = [LeftOut(_relative(item.path, path), item.reason) for item in rejected if item.path not in nifti]
    return [*_group(found), *map(_nifti_study, nifti)], left_out


def check_input(path: Path) -> None:
    """Refuse what cannot hold a study, without looking into it.

    Raises:
        ValueError: when the path does not exist, or is a file other than NIfTI.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist; expected a folder of DICOM files or a NIfTI file.")
    if not path.is_dir() and not _is_nifti(path):
        raise ValueError(f"{path} is neither a folder nor a NIfTI file ({' or '.join(NIFTI)}); give the DICOM folder.")


def read_scan(source: SeriesFiles | Path) -> Scan:
    """Read a series once.

    Raises:
        ValueError: for what cannot be read as a CT volume; see :mod:`trauma_monai.dicom`.
    """
    if isinstance(source, Path):
        image = LoadImage(reader=VolumeReader(), image_only=True, dtype=None, ensure_channel_first=True)(source)
        if image.ndim != 4 or len(image) != 1:
            raise ValueError(f"the file has shape {tuple(image.shape[1:])}; expected a volume with three axes.")
        return Scan(image, {}, ())
    volume = read_series(source)
    meta = {MetaKeys.SPACE: SpaceKeys.RAS, MetaKeys.ORIGINAL_CHANNEL_DIM: 0}
    image = MetaTensor(torch.from_numpy(volume.array)[None], affine=torch.from_numpy(volume.affine), meta=meta)
    return Scan(image, volume.facts, volume.instances)


def source_files(source: SeriesFiles | Path) -> tuple[Path, ...]:
    """Return the files that a series is read from."""
    return (source,) if isinstance(source, Path) else source.files


def one_line(error: Exception) -> str:
    """Return what went wrong in one line, without folders, which may be named after patients."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return FOLDERS.sub("", " ".join(text.split())) or type(error).__name__


def safe_name(name: str, key: str) -> str:
    """Make a folder name of ``name``; where characters had to go, a checksum of ``key`` keeps names apart."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._")[:64]
    return safe if safe and safe == name else f"{safe or 'study'}-{_checksum(key)}"


def _is_nifti(path: Path) -> bool:
    return path.name.lower().endswith(NIFTI) and path.is_file()


def _nifti_study(path: Path) -> StudyFiles:
    stem = re.sub(r"\.nii(\.gz)?$", "", path.name, flags=re.IGNORECASE)
    return StudyFiles(stem, stem, safe_name(stem, stem), {stem: path})


def _group(found: list[SeriesFiles]) -> list[StudyFiles]:
    """Sort series into studies; a patient with one study gets a folder named after the patient."""
    by_study: dict[tuple[str, str], list[SeriesFiles]] = {}
    for series in found:
        # Some exports blank the UIDs: a series without study stands for itself, since nothing says what it joins.
        by_study.setdefault((series.patient_id, series.study_uid or _name(series)), []).append(series)
    studies_of = [patient_id for patient_id, _ in by_study]
    studies = []
    for (patient_id, study_uid), members in by_study.items():
        folder = safe_name(patient_id, patient_id + study_uid)
        if patient_id and studies_of.count(patient_id) > 1:
            folder = f"{safe_name(patient_id, patient_id)}-{_checksum(study_uid)}"
        ordered = {_name(series): series for series in sorted(members, key=_name)}
        studies.append(StudyFiles(patient_id or folder, study_uid, folder, ordered))
    return sorted(studies, key=lambda study: study.folder)


def _name(series: SeriesFiles) -> str:
    """Series UID; a checksum where the folder stands in for a blank one, as folders may be named after patients."""
    uid = series.series_uid
    return uid if re.fullmatch(r"[0-9.]+", uid) else f"series-{_checksum(uid + str(series.files[0].parent))}"


def _checksum(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:8]


def _relative(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else path.name
