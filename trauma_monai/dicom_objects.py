"""Stage 6 of 6, for a PACS: organ label maps -> DICOM SEG, injury probabilities -> DICOM SR.

Both refer to the images that they were made from and carry their patient and study. Their UIDs are made from what they
say (sources, model, content), not at random: who sends the same result twice does not put it into the archive twice,
and a result that differs is another object.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import highdicom as hd
import nibabel as nib
import numpy as np
import pydicom
from highdicom.sr import (
    AlgorithmIdentification,
    ComprehensiveSR,
    DeviceObserverIdentifyingAttributes,
    FindingSite,
    Measurement,
    MeasurementReport,
    MeasurementsAndQualitativeEvaluations,
    ObservationContext,
    ObserverContext,
    RelationshipTypeValues,
    SourceImageForMeasurement,
    TextContentItem,
    TrackingIdentifier,
)
from PIL import ImageColor
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import generate_uid

from trauma_monai import __version__
from trauma_monai.dicom_codes import (
    FINDING_SITES,
    FINDING_TYPES,
    KEY_SLICE,
    ORGAN_TYPES,
    PRIVATE_SCHEME,
    probability_code,
)
from trauma_monai.pictures import ORGAN_COLOURS
from trauma_monai.pixels import DicomError
from trauma_monai.results import FINDINGS, ORGAN_TITLES, StudyResult, study_record
from trauma_monai.targets import GROUPS, ORGAN_CODES

__all__ = ["Algorithm", "KeyImage", "injury_report", "organ_segmentation", "read_sources", "write_dicom_objects"]

RESEARCH_USE = "For research only. Not a medical device; must not guide the care of patients."

NEEDED_UIDS = ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID")
"""What a reference to an image and its place in space consist of."""

MAY_BE_EMPTY = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex"),
    *("StudyID", "StudyDate", "StudyTime", "AccessionNumber", "ReferringPhysicianName"),
)
"""Attributes of type 2: present in every object (PS3.5, 7.4.3), though anonymised files often lack them."""

FREE_TEXT = ("PatientComments", "AdditionalPatientHistory", "OtherPatientNames", "OtherPatientIDs")
"""Attributes that may tell more of a patient than a result has to."""

MAKER = "trauma_monai"

SERIES_NUMBERS = {"SEG": 9001, "SR": 9002}
"""Behind those of the scanner in a viewer's list."""


class Algorithm(NamedTuple):
    """What a result was made by.

    Attributes:
        name: bundle.
        version: of the bundle or of this package.
        parameters: variants, names of weights and their checksums.
    """

    name: str
    version: str
    parameters: Mapping[str, str]


class KeyImage(NamedTuple):
    """A slice that a finding is most suspicious in.

    Attributes:
        group: the finding, one of :data:`trauma_monai.targets.GROUPS`.
        output: network output, 0 to 1.
        image: SOPInstanceUID of the slice.
    """

    group: str
    output: float
    image: str


def write_dicom_objects(study: StudyResult, folder: Path) -> list[str]:
    """Write the organs of each series as DICOM SEG and the probabilities of the study as DICOM SR.

    Nothing is written unless everything can be.

    Args:
        study: the result.
        folder: holds the organ label maps of the result (``organs.nii.gz``); receives a ``.dcm`` file beside each, and
            ``report.dcm``.

    Returns:
        Names of the files.

    Raises:
        DicomError: when a series does not come from DICOM, or its files lack what a reference needs.
    """
    sources = [read_sources(series.instances) for series in study.series]
    parameters = {name: str(value) for name, value in study.model.items()}
    organ_algorithm, trauma_algorithm = (
        Algorithm(f"{MAKER} {bundle}", study.version, parameters)
        for bundle in ("organ_ct_segmentation", "trauma_ct_classification")
    )
    objects: dict[str, Dataset] = {}
    for series, images in zip(study.series, sources, strict=True):
        label_map = np.asarray(nib.load(folder / series.organs_file).dataobj)  # type: ignore[attr-defined]
        objects[series.organs_file.replace(".nii.gz", ".dcm")] = organ_segmentation(label_map, images, organ_algorithm)
    record = study_record(study)
    objects["report.dcm"] = injury_report(
        record,
        _key_images(study),
        [image for images in sources for image in images],
        trauma_algorithm,
        comments=record["warnings"],
    )
    for name, content in objects.items():
        content.save_as(folder / name)
    return list(objects)


def organ_segmentation(label_map: np.ndarray, sources: Sequence[Dataset], algorithm: Algorithm) -> hd.seg.Segmentation:
    """Turn a label map into a binary DICOM SEG with one segment per organ, numbered by the organ's code.

    All organs are described; of an organ that was not found there are no frames.

    Args:
        label_map: codes of :data:`trauma_monai.targets.ORGAN_CODES`, shape (X, Y, Z): columns, rows, slices.
        sources: headers of the Z slices in their order, from :func:`read_sources`.
        algorithm: what segmented.

    Raises:
        ValueError: when the label map does not lie on the slices.
    """
    first = sources[0]
    if label_map.shape != (expected := (first.Columns, first.Rows, len(sources))):
        raise ValueError(f"the label map has shape {label_map.shape}; expected {expected}, as its source series.")
    frames = np.ascontiguousarray(label_map.astype(np.uint8).T)
    identity = [*(image.SOPInstanceUID for image in sources), *_identity(algorithm), _checksum(frames.tobytes())]
    ends = np.array([first.ImagePositionPatient, sources[-1].ImagePositionPatient], dtype=np.float64)
    distance_mm = float(np.linalg.norm(ends[1] - ends[0])) / (len(sources) - 1)
    identification = hd.AlgorithmIdentificationSequence(
        name=algorithm.name,
        family=codes.DCM.ArtificialIntelligence,
        version=algorithm.version,
        source=MAKER,
        parameters={name: _ascii(value) for name, value in algorithm.parameters.items()},
    )
    return hd.seg.Segmentation(
        source_images=sources,
        pixel_array=frames,
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[_describe(name, identification) for name in ORGAN_CODES],
        pixel_measures=hd.PixelMeasuresSequence(
            pixel_spacing=first.PixelSpacing, slice_thickness=distance_mm, spacing_between_slices=distance_mm
        ),
        content_label="ORGANS",
        content_description="Abdominal organs",
        content_creator_name="",
        series_description="Organs (research only)",
        **_instance("SEG", identity),
    )


def injury_report(
    record: Mapping[str, Any],
    key_images: Sequence[KeyImage],
    sources: Sequence[Dataset],
    algorithm: Algorithm,
    comments: Sequence[str] = (),
) -> ComprehensiveSR:
    """Turn probabilities into a Comprehensive SR, an imaging measurement report (TID 1500).

    Each finding that the model assesses is a measurement group: a traumatic injury with its site, one measurement per
    class (code: its column in probabilities.json), and one per key slice, inferred from that image. "Any injury" is a
    group of its own. The research-use note and what limits the result are comments.

    Args:
        record: ``probabilities`` (13 columns), ``any_injury`` and ``not_assessed`` as in probabilities.json.
        key_images: most suspicious slices.
        sources: headers of all slices that were read, from :func:`read_sources`; the report names them as evidence.
        algorithm: what classified.
        comments: what a reader must know.
    """
    comments = list(dict.fromkeys([RESEARCH_USE, *map(_ascii, comments)]))
    said = json.dumps([record["probabilities"], record["any_injury"], key_images, comments], sort_keys=True)
    identity = [*(image.SOPInstanceUID for image in sources), *_identity(algorithm), _checksum(said.encode())]
    classes_of = {group: GROUPS[group] for group in FINDINGS if group not in record["not_assessed"]}
    if record["any_injury"] is not None:
        classes_of["any"] = ("any_injury",)
    values = {**record["probabilities"], "any_injury": record["any_injury"]}
    image_class = {image.SOPInstanceUID: image.SOPClassUID for image in sources}
    groups = [
        _finding(
            group,
            {name: values[name] for name in columns},
            [(key, image_class[key.image]) for key in key_images if key.group == group],
            algorithm,
            _uid("finding", group, *identity),
        )
        for group, columns in classes_of.items()
    ]
    content = MeasurementReport(
        observation_context=_observed_by_this_package(),
        procedure_reported=codes.LN.CTUnspecifiedBodyRegion,
        imaging_measurements=groups,
        title=codes.DCM.ImagingMeasurementReport,
    )
    for text in comments:  # the template may be extended
        comment = TextContentItem(codes.DCM.Comment, text, RelationshipTypeValues.CONTAINS)
        content[0].ContentSequence.append(comment)
    return ComprehensiveSR(
        evidence=list(sources),
        content=content[0],
        is_complete=True,
        is_final=False,
        is_verified=False,
        coding_schemes=[PRIVATE_SCHEME],
        series_description="Injury probabilities (research only)",
        **_instance("SR", identity),
    )


def read_sources(instances: Sequence[tuple[str, int, Path]]) -> list[Dataset]:
    """Read the headers of a series' slices, fit to be referred to.

    Attributes that may be empty are added where the files lack them.

    Args:
        instances: SOPInstanceUID, InstanceNumber and file of each slice, as :class:`trauma_monai.scans.Scan` has them.

    Raises:
        DicomError: when there are none, when one lacks a UID that a reference needs, and when two share theirs.
    """
    if not instances:
        raise DicomError("the input is not DICOM; there are no images that a DICOM SEG or SR could refer to.")
    images: list[Dataset] = []
    for uid, _, path in instances:
        image = pydicom.dcmread(path, stop_before_pixels=True)
        image.SOPInstanceUID = uid  # some files have it in their file meta information only
        if missing := [keyword for keyword in NEEDED_UIDS if not image.get(keyword)]:
            raise DicomError(
                f"the series lacks {', '.join(missing)}: a DICOM SEG or SR could not refer to its images. Use files "
                "whose UIDs were replaced, not blanked."
            )
        for keyword in MAY_BE_EMPTY:
            if keyword not in image:
                setattr(image, keyword, None)
        for keyword in FREE_TEXT:
            if keyword in image:
                delattr(image, keyword)
        images.append(image)
    if len({image.SOPInstanceUID for image in images}) < len(images):
        raise DicomError("several images of the series share a SOPInstanceUID: it is not clear which one is meant.")
    return images


# --- parts ------------------------------------------------------------------------------------------------------------


def _key_images(study: StudyResult) -> list[KeyImage]:
    """Key slices that are acquired images, not cut through the volume across them."""
    return [
        KeyImage(key.group, round(key.probability, 6), str(series.scores.sop_instance_uid[key.row]))
        for series in study.series
        if series.scores.sop_instance_uid is not None
        for key in series.key_slices
    ]


def _describe(organ: str, identification: hd.AlgorithmIdentificationSequence) -> hd.seg.SegmentDescription:
    red, green, blue = ImageColor.getrgb(ORGAN_COLOURS[organ.partition("_")[0]])[:3]
    return hd.seg.SegmentDescription(
        segment_number=ORGAN_CODES[organ],
        segment_label=ORGAN_TITLES[organ],
        segmented_property_category=codes.SCT.AnatomicalStructure,
        segmented_property_type=ORGAN_TYPES[organ],
        algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=identification,
        display_color=hd.color.CIELabColor.from_rgb(red, green, blue),
    )


def _finding(
    group: str,
    probabilities: Mapping[str, float],
    key_images: Sequence[tuple[KeyImage, str]],
    algorithm: Algorithm,
    uid: str,
) -> MeasurementsAndQualitativeEvaluations:
    measurements = [Measurement(probability_code(name), p, codes.UCUM.NoUnits) for name, p in probabilities.items()]
    measurements += [
        Measurement(
            KEY_SLICE,
            key.output,
            codes.UCUM.NoUnits,
            referenced_images=[SourceImageForMeasurement(image_class, key.image)],
        )
        for key, image_class in key_images
    ]
    return MeasurementsAndQualitativeEvaluations(
        tracking_identifier=TrackingIdentifier(uid=hd.UID(uid), identifier=group),
        finding_type=FINDING_TYPES[group],
        finding_sites=[FindingSite(FINDING_SITES[group])],
        algorithm_id=AlgorithmIdentification(
            name=algorithm.name,
            version=algorithm.version,
            parameters=[f"{name}: {_ascii(value)}" for name, value in algorithm.parameters.items()],
            manufacturer=MAKER,
        ),
        measurements=measurements,
    )


def _observed_by_this_package() -> ObservationContext:
    device = DeviceObserverIdentifyingAttributes(
        uid=_uid("device", __version__), name=MAKER, manufacturer_name=MAKER, model_name=MAKER
    )
    return ObservationContext(observer_device_context=ObserverContext(codes.DCM.Device, device))


def _instance(modality: str, identity: Sequence[str]) -> dict[str, Any]:
    """What names an object: a series of one instance, and the equipment that made it."""
    return {
        "series_instance_uid": _uid(f"{modality} series", *identity),
        "sop_instance_uid": _uid(f"{modality} instance", *identity),
        "series_number": SERIES_NUMBERS[modality],
        "instance_number": 1,
        "manufacturer": MAKER,
        "manufacturer_model_name": MAKER,
        "software_versions": __version__,
        "device_serial_number": __version__,  # software has none, but the attribute must not be empty
    }


def _identity(algorithm: Algorithm) -> list[str]:
    return [algorithm.name, algorithm.version, *(f"{name}={value}" for name, value in algorithm.parameters.items())]


def _uid(*what: str) -> str:
    return generate_uid(entropy_srcs=["\n".join(what)])


def _checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _ascii(text: str) -> str:
    """Text that fits every character set that the source may declare."""
    return text.encode("ascii", "replace").decode()
