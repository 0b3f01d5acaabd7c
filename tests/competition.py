"""Small data sets in the competition's layout, written here.

A slice has 6 rows and 8 columns of 2.0 x 1.5 mm; slices are 3 mm apart. The HU of a pixel tell where it is:
100 * slice (counted from the feet) + 10 * row + column, so that no flip goes unseen.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nibabel
import numpy as np
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from trauma_monai.prepare import Prepared, prepare
from trauma_monai.targets import SUBMISSION_COLUMNS

SLICES, ROWS, COLUMNS = 5, 6, 8
SHAPE = (COLUMNS, ROWS, SLICES)
HU = 100 * np.arange(SLICES) + 10 * np.arange(ROWS)[:, None] + np.arange(COLUMNS)[:, None, None]
AFFINE = np.array([[-1.5, 0, 0, 10], [0, -2.0, 0, 20], [0, 0, 3.0, -100], [0, 0, 0, 1]])
"""DICOM's x = -10 and y = -20 point to the left and to the back; NIfTI's axes point the other way."""


class Competition:
    """A folder in the competition's layout, filled patient by patient."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.patients: dict[str, dict] = {}
        self.series: list[dict] = []
        self.frames: list[dict] = []

    def patient(self, patient_id: str, **injuries: int) -> None:
        row = {column: int(column.endswith("_healthy")) for column in SUBMISSION_COLUMNS} | injuries
        for column, value in injuries.items():
            if value:
                row[f"{column.rpartition('_')[0]}_healthy"] = 0
        self.patients[patient_id] = {"patient_id": patient_id} | row

    def add_series(
        self, patient_id: str, series_id: str, head_first: bool = True, aortic_hu: float | None = 200
    ) -> Path:
        """Write DICOM; ``head_first``: instance 1 is the slice nearest to the head, as in most series."""
        folder = self.folder / "train_images" / patient_id / series_id
        write_dicom(folder, head_first)
        self.series.append({"patient_id": patient_id, "series_id": series_id, "aortic_hu": aortic_hu})
        return folder

    def add_mask(self, series_id: str, codes: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
        path = self.folder / "segmentations" / f"{series_id}.nii"
        path.parent.mkdir(exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(codes, affine), path)
        return path

    def write_tables(self) -> None:
        frame_columns = ("patient_id", "series_id", "instance_number", "injury_name")
        self._write("train.csv", ("patient_id", *SUBMISSION_COLUMNS), list(self.patients.values()))
        self._write("train_series_meta.csv", ("patient_id", "series_id", "aortic_hu"), self.series)
        self._write("image_level_labels.csv", frame_columns, self.frames)

    def _write(self, name: str, columns: tuple[str, ...], rows: list[dict]) -> None:
        with (self.folder / name).open("w", newline="") as file:
            table = csv.DictWriter(file, columns)
            table.writeheader()
            table.writerows(rows)


def write_dicom(folder: Path, head_first: bool = True) -> None:
    folder.mkdir(parents=True)
    study, series, frame = generate_uid(), generate_uid(), generate_uid()
    for z in range(SLICES):
        instance = SLICES - z if head_first else z + 1
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = CTImageStorage, ExplicitVRLittleEndian
        meta.MediaStorageSOPInstanceUID = generate_uid()
        path = folder / f"{instance}.dcm"
        image = FileDataset(path, {}, bytes(128), meta, is_implicit_VR=False, is_little_endian=True)
        image.SOPClassUID, image.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        image.StudyInstanceUID, image.SeriesInstanceUID, image.FrameOfReferenceUID = study, series, frame
        image.PatientID, image.Modality, image.InstanceNumber = folder.parent.name, "CT", instance
        image.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        image.Rows, image.Columns, image.PixelSpacing, image.SliceThickness = ROWS, COLUMNS, [2.0, 1.5], 3.0
        image.ImagePositionPatient = [-10, -20, -100 + 3 * z]
        image.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
        image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 16, 12, 11, 0
        image.RescaleIntercept, image.RescaleSlope = -1024, 1
        image.PixelData = (HU[:, :, z].T + 1024).astype("<u2").tobytes()
        image.save_as(path)


def run(competition: Competition, out: Path, **options: object) -> Prepared:
    return prepare(competition.folder, out, **{"workers": 1, "folds": 2, "progress": False} | options)


def items_of(out: Path, section: str = "training") -> dict[str, dict]:
    return {item["series_id"]: item for item in json.loads((out / "datalist.json").read_text())[section]}


def rejected_of(out: Path) -> list[tuple[str, ...]]:
    with (out / "rejected.csv").open(newline="") as file:
        return [tuple(row) for row in csv.reader(file)][1:]


def one_voxel(code: int = 1) -> np.ndarray:
    """A mask of one voxel: slice 4, row 1, column 6, whose HU are 416."""
    codes = np.zeros(SHAPE, np.uint8)
    codes[6, 1, 4] = code
    return codes
