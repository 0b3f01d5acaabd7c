"""Phantom series on disk: DICOM slices with the competition's headers, and masks in its orientation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from pydicom import dcmwrite
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import PYDICOM_IMPLEMENTATION_UID, PYDICOM_ROOT_UID, UID, CTImageStorage, RLELossless
from rle import encode_pixel_data  # pylibjpeg-rle


@dataclass(frozen=True)
class PixelFormat:
    """How HU are stored.

    Attributes:
        bits_stored: of the 16 that are allocated.
        signed: whether the stored numbers are two's complement.
        intercept: HU = stored number + intercept.
    """

    bits_stored: int
    signed: bool
    intercept: int

    def store(self, hu: NDArray[np.int16]) -> NDArray[np.uint16]:
        """HU -> the 16 bits of each pixel.

        Bits above ``bits_stored`` stay 0 even for negative numbers: the competition's 13-bit series are like that.
        """
        half = 1 << (self.bits_stored - 1)
        low, high = (-half, half - 1) if self.signed else (0, 2 * half - 1)
        stored = np.clip(hu.astype(np.int32) - self.intercept, low, high)
        return (stored & ((1 << self.bits_stored) - 1)).astype(np.uint16)


PIXEL_FORMATS = (
    PixelFormat(12, False, -1024),
    PixelFormat(16, True, -1024),
    PixelFormat(13, True, 0),
    PixelFormat(16, True, 0),
    PixelFormat(16, False, -8192),
)
"""The combinations that occur in the competition."""


@dataclass(frozen=True)
class SeriesHeader:
    """What the DICOM files of a series say besides their pixels.

    Attributes:
        patient_id: number of the patient.
        series_id: number of the series, last part of its UID.
        seed: of the data set; keeps the UIDs of data sets apart.
        pixel_format: how HU are stored.
        first_instance: lowest instance number; above 1 when the scan was cut to the abdomen.
        feet_first: whether instance numbers rise from the feet to the head instead of from the head to the feet.
        kvp: tube voltage.
        patient_position: "FFS" or "HFS".
    """

    patient_id: int
    series_id: int
    seed: int
    pixel_format: PixelFormat
    first_instance: int
    feet_first: bool
    kvp: int
    patient_position: str

    def instance_numbers(self, slices: int) -> NDArray[np.int64]:
        """Instance number of each slice, slices from feet to head."""
        rising = np.arange(slices) + self.first_instance
        return rising if self.feet_first else rising[::-1]


def write_dicom(folder: Path, hu: NDArray[np.int16], affine: NDArray[np.float64], header: SeriesHeader) -> None:
    """Write one series, a file per slice, RLE Lossless.

    Args:
        folder: gets ``<instance number>.dcm``.
        hu: (slices, rows, columns).
        affine: column, row, slice index -> position in DICOM's patient frame (x left, y back, z head), mm, 4x4.
        header: the rest.
    """
    folder.mkdir(parents=True)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    directions = affine[:3, :3] / spacing
    data_set = _series_data_set(hu.shape, spacing, directions, header)
    stored = header.pixel_format.store(hu)
    for index, number in enumerate(header.instance_numbers(len(hu))):
        uid = UID(f"{data_set.SeriesInstanceUID}.{number}")
        data_set.file_meta.MediaStorageSOPInstanceUID = data_set.SOPInstanceUID = uid
        data_set.InstanceNumber = int(number)
        data_set.ImagePositionPatient = _decimals(affine[:3, :3] @ (0, 0, index) + affine[:3, 3])
        data_set.PixelData = encapsulate([_rle(stored[index])])
        data_set["PixelData"].is_undefined_length = True
        dcmwrite(folder / f"{number}.dcm", data_set)


def write_mask(path: Path, organs: NDArray[np.uint8], affine: NDArray[np.float64]) -> None:
    """Write organ codes as the competition does: array (columns, rows, slices), axes to left, front and head.

    Args:
        path: ``<series_id>.nii``.
        organs: (slices, rows, columns).
        affine: as for :func:`write_dicom`.
    """
    flip_rows = np.eye(4)
    flip_rows[1, 1], flip_rows[1, 3] = -1, organs.shape[1] - 1
    to_ras = np.diag([-1.0, -1.0, 1.0, 1.0])
    image = nib.Nifti1Image(np.ascontiguousarray(organs.transpose(2, 1, 0)[:, ::-1]), to_ras @ affine @ flip_rows)
    image.header.set_xyzt_units("mm")
    nib.save(image, path)


def _series_data_set(
    shape: tuple[int, ...], spacing: NDArray[np.float64], directions: NDArray[np.float64], header: SeriesHeader
) -> FileDataset:
    """Everything that the slices of a series share."""
    study_uid = f"{PYDICOM_ROOT_UID}{header.seed}.{header.patient_id}"
    meta = FileMetaDataset()
    meta.FileMetaInformationGroupLength = 0  # filled in on writing
    meta.FileMetaInformationVersion = b"\x00\x01"
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = UID(study_uid)
    meta.TransferSyntaxUID = RLELossless
    meta.ImplementationClassUID = PYDICOM_IMPLEMENTATION_UID
    elements: Mapping[str, object] = {
        "SpecificCharacterSet": "ISO_IR 100",
        "ImageType": ["DERIVED", "SECONDARY", "AXIAL"],
        "SOPClassUID": CTImageStorage,
        "StudyDate": "",
        "StudyTime": "",
        "AccessionNumber": "",
        "Modality": "CT",
        "Manufacturer": "trauma_monai phantom",
        "ReferringPhysicianName": "",
        "PatientName": "",
        "PatientID": str(header.patient_id),
        "PatientBirthDate": "",
        "PatientSex": "",
        "SliceThickness": _decimals([spacing[2]])[0],
        "KVP": str(header.kvp),
        "PatientPosition": header.patient_position,
        "StudyInstanceUID": study_uid,
        "SeriesInstanceUID": f"{study_uid}.{header.series_id}",
        "StudyID": "",
        "SeriesNumber": 3,
        "FrameOfReferenceUID": f"{study_uid}.0",
        "PositionReferenceIndicator": "",
        "ImageOrientationPatient": _decimals([*directions[:, 0], *directions[:, 1]]),
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "Rows": shape[1],
        "Columns": shape[2],
        "PixelSpacing": _decimals([spacing[1], spacing[0]]),
        "BitsAllocated": 16,
        "BitsStored": header.pixel_format.bits_stored,
        "HighBit": header.pixel_format.bits_stored - 1,
        "PixelRepresentation": int(header.pixel_format.signed),
        "WindowCenter": "50",
        "WindowWidth": "400",
        "RescaleIntercept": str(header.pixel_format.intercept),
        "RescaleSlope": "1",
        "RescaleType": "HU",
    }
    data_set = FileDataset("", {}, b"\0" * 128, meta, is_implicit_VR=False, is_little_endian=True)
    for keyword, value in elements.items():
        setattr(data_set, keyword, value)
    return data_set


def _decimals(numbers: NDArray[np.float64] | list[float]) -> list[str]:
    """Numbers as DICOM decimal strings, which hold 16 characters."""
    return [f"{number + 0.0:.9f}"[:16] if abs(number) >= 1e-9 else "0" for number in np.asarray(numbers, dtype=float)]


def _rle(frame: NDArray[np.uint16]) -> bytes:
    """Encode one slice."""
    rows, columns = frame.shape
    return encode_pixel_data(
        frame.astype("<u2").tobytes(), rows=rows, columns=columns, samples_per_pixel=1, bits_allocated=16, byteorder="<"
    )
