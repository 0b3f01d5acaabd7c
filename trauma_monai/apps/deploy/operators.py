"""Operators around the App SDK's bundle inference: series of a study -> images; label maps -> DICOM SEG."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from holoscan.conditions import CountCondition
from monai.deploy.core import Fragment, Image, Operator, OperatorSpec
from monai.utils import MetaKeys, SpaceKeys

from trauma_monai.dicom_objects import Algorithm, organ_segmentation, read_sources
from trauma_monai.scans import LeftOut, Scan, StudyFiles, one_line, read_scan

__all__ = ["OrganWriter", "SeriesLoader", "SeriesMessage"]


class SeriesMessage(NamedTuple):
    """What goes with the image of a series to those who write results.

    Attributes:
        study: all that belongs to the study.
        series_uid: which series.
        number: its place among the series of the study, from 1.
        scan: the series in memory.
        left_out: series of the study that could not be read so far; with the last series, all of them.
        last: whether no other series follows.
    """

    study: StudyFiles
    series_uid: str
    number: int
    scan: Scan
    left_out: Sequence[LeftOut]
    last: bool


class SeriesLoader(Operator):
    """Read the CT series of a study, one a tick.

    In place of the SDK's DICOMDataLoader, Selector and SeriesToVolume operators, which take one series, repair missing
    and sheared slices in silence, and give all slices the number type that suits the first one. This one reads what
    `trauma-monai predict` and `monai.bundle run` read. It reads one series ahead, so as to know which one is the last.

    Outputs:
        image: HU, array of shape (X, Y, Z) with affine.
        series: :class:`SeriesMessage`.

    Args:
        fragment: the application.
        study: what to read.

    Raises:
        ValueError: when no series of the study can be read, with the reasons.
    """

    def __init__(self, fragment: Fragment, *args: Any, study: StudyFiles, **kwargs: Any) -> None:
        self.study = study
        self.left_out: list[LeftOut] = []
        self._scans = self._readable()
        self._ahead: tuple[int, str, Scan] | None = None
        super().__init__(fragment, CountCondition(fragment, len(study.series)), *args, **kwargs)

    def setup(self, spec: OperatorSpec) -> None:
        """Name the ports."""
        spec.output("image")
        spec.output("series")

    def compute(self, op_input: Any, op_output: Any, context: Any) -> None:
        """Hand on the next series; nothing when there is none left, since some could not be read."""
        current = self._ahead or next(self._scans, None)
        if current is None:
            if len(self.left_out) == len(self.study.series):
                reasons = "; ".join(dict.fromkeys(item.reason for item in self.left_out))
                raise ValueError(f"no series of the study could be read: {reasons}")
            return
        self._ahead = next(self._scans, None)
        number, series_uid, scan = current
        image = scan.image
        meta = {
            MetaKeys.AFFINE: np.asarray(image.affine),
            MetaKeys.ORIGINAL_AFFINE: np.asarray(image.affine),
            MetaKeys.SPACE: SpaceKeys.RAS,
            MetaKeys.SPATIAL_SHAPE: np.asarray(image.shape[1:]),
            MetaKeys.ORIGINAL_CHANNEL_DIM: "no_channel",
        }
        op_output.emit(Image(np.asarray(image[0]), meta), "image")
        message = SeriesMessage(self.study, series_uid, number, scan, tuple(self.left_out), last=self._ahead is None)
        op_output.emit(message, "series")

    def _readable(self) -> Iterator[tuple[int, str, Scan]]:
        for number, (series_uid, source) in enumerate(self.study.series.items(), start=1):
            try:
                yield number, series_uid, read_scan(source)
            except Exception as error:  # decoders raise anything; the next series may well be fine
                self.left_out.append(LeftOut(series_uid, one_line(error)))


class OrganWriter(Operator):
    """Write the label map of each series as DICOM SEG, organs.dcm or organs_1.dcm, organs_2.dcm, ...

    Inputs:
        pred: label map of shape (Z, Y, X), as the SDK's inference operator turns its images.
        series: :class:`SeriesMessage`.

    Args:
        fragment: the application.
        folder: where to write.
        algorithm: what segmented.
    """

    def __init__(self, fragment: Fragment, *args: Any, folder: Path, algorithm: Algorithm, **kwargs: Any) -> None:
        self.folder = folder
        self.algorithm = algorithm
        super().__init__(fragment, *args, **kwargs)

    def setup(self, spec: OperatorSpec) -> None:
        """Name the ports."""
        spec.input("pred")
        spec.input("series")

    def compute(self, op_input: Any, op_output: Any, context: Any) -> None:
        """Write one series."""
        label_map: np.ndarray = op_input.receive("pred").asnumpy().swapaxes(0, 2)
        series: SeriesMessage = op_input.receive("series")
        name = "organs.dcm" if len(series.study.series) == 1 else f"organs_{series.number}.dcm"
        sources = read_sources(series.scan.instances)
        organ_segmentation(label_map, sources, self.algorithm).save_as(self.folder / name)
