"""Operators of the trauma bundle: image -> probabilities with their evidence -> DICOM SR and probabilities.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.data import MetaTensor
from monai.deploy.core import AppContext, Fragment, Image, IOType, Operator, OperatorSpec
from monai.deploy.operators.monai_bundle_inference_operator import IOMapping, MonaiBundleInferenceOperator

from trauma_monai.apps.deploy.operators import SeriesMessage
from trauma_monai.classifier import TraumaFlow
from trauma_monai.dicom_objects import Algorithm, KeyImage, injury_report, read_sources
from trauma_monai.files import write_json
from trauma_monai.organs import SegmentOrgansd
from trauma_monai.pooling import ModelOutput, SubmissionColumns, assessed_groups, pool_study
from trauma_monai.results import (
    SliceScores,
    StudyResult,
    organ_volumes_ml,
    pick_key_slices,
    quality_remarks,
    study_record,
)
from trauma_monai.targets import GROUPS

__all__ = ["Evidence", "ReportWriter", "TraumaInference"]


class Evidence(NamedTuple):
    """What lies behind the probabilities of a series.

    Attributes:
        organs: label map, shape (1, Z, Y, X) from feet to head, with affine.
        scores: network outputs along z.
    """

    organs: MetaTensor
    scores: SliceScores


class TraumaInference(MonaiBundleInferenceOperator):
    """The SDK's bundle inference, which also hands on what the bundle found on its way to the probabilities.

    Inputs:
        image: from :class:`trauma_monai.apps.deploy.operators.SeriesLoader`.

    Outputs:
        pred: the SDK's dictionary; ``probabilities`` are those of the targets over the series.
        evidence: :class:`Evidence`.

    Args:
        fragment: the application.
        app_context: the SDK's context.
        bundle_path: folder with configs and weights.
    """

    def __init__(
        self, fragment: Fragment, *args: Any, app_context: AppContext, bundle_path: Path, **kwargs: Any
    ) -> None:
        self.flow = TraumaFlow(bundle_path, None, torch.device("cpu"))
        super().__init__(
            fragment,
            *args,
            app_context=app_context,
            input_mapping=[IOMapping("image", Image, IOType.IN_MEMORY)],
            output_mapping=[IOMapping("pred", dict, IOType.IN_MEMORY)],
            bundle_path=bundle_path,
            **kwargs,
        )

    def setup(self, spec: OperatorSpec) -> None:
        """Name the ports."""
        super().setup(spec)
        spec.output("evidence")

    def compute(self, op_input: Any, op_output: Any, context: Any) -> None:
        """Infer one series."""
        super().compute(op_input, op_output, context)
        op_output.emit(Evidence(self._organs, self._scores), "evidence")

    def pre_process(self, data: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the bundle's preprocessing, and keep the masks as they are before they are cropped."""
        steps = self._preproc.transforms
        segmented = 1 + next(i for i, step in enumerate(steps) if isinstance(step, SegmentOrgansd))
        sample = self._preproc(data, end=segmented)
        self._organs = sample["organs"]
        return self._preproc(sample, start=segmented)

    def predict(self, data: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the network on the image alone; the SDK would hand it the masks and indices of the sample too."""
        return super().predict(data)

    def post_process(self, data: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the bundle's post-processing, and keep the probabilities of the slices."""
        sample = super().post_process(data, *args, **kwargs)
        self._scores = self.flow.scores(sample, sample["slice_probabilities"])
        return sample


class ReportWriter(Operator):
    """Pool the series of a study and write report.dcm (DICOM SR) and probabilities.json when the last one has come.

    Inputs:
        pred: from :class:`TraumaInference`.
        evidence: from :class:`TraumaInference`.
        series: :class:`trauma_monai.apps.deploy.operators.SeriesMessage`.

    Args:
        fragment: the application.
        folder: where to write.
        algorithm: what classified.
        flow: names of the targets and how series are pooled.
    """

    def __init__(
        self, fragment: Fragment, *args: Any, folder: Path, algorithm: Algorithm, flow: TraumaFlow, **kwargs: Any
    ) -> None:
        self.folder = folder
        self.algorithm = algorithm
        self.flow = flow
        self._outputs: dict[str, list[ModelOutput]] = {}
        self._sources: list[Any] = []
        self._key_images: list[KeyImage] = []
        self._remarks: list[str] = []
        super().__init__(fragment, *args, **kwargs)

    def setup(self, spec: OperatorSpec) -> None:
        """Name the ports."""
        for port in ("pred", "evidence", "series"):
            spec.input(port)

    def compute(self, op_input: Any, op_output: Any, context: Any) -> None:
        """Take in one series."""
        series: SeriesMessage = op_input.receive("series")
        self._sources += read_sources(series.scan.instances)
        probabilities = op_input.receive("pred")["probabilities"].tolist()
        of_targets = dict(zip(self.flow.targets, probabilities, strict=True))
        self._outputs[series.series_uid] = [ModelOutput(of_targets)]
        self._look_at(op_input.receive("evidence"), series)
        if series.last:
            self._write(series)

    def _look_at(self, evidence: Evidence, series: SeriesMessage) -> None:
        """Keep the key slices and what limits the result of a series."""
        affine = np.asarray(evidence.organs.affine)
        dz, dy, dx = (float(mm) for mm in np.linalg.norm(affine[:3, :3], axis=0))
        codes = np.asarray(evidence.organs[0])
        volumes_ml = organ_volumes_ml(codes, (dz, dy, dx))
        self._remarks += quality_remarks(codes, (dz, dy, dx), volumes_ml, series.scan.facts)
        scores = evidence.scores.at_positions(affine, series.scan.instances_from_feet())
        for group, row in pick_key_slices(scores):
            values = scores.of_group(group)
            if values is not None and scores.sop_instance_uid is not None:
                image = str(scores.sop_instance_uid[row])
                self._key_images.append(KeyImage(group, round(float(values[row]), 6), image))

    def _write(self, series: SeriesMessage) -> None:
        pooled = pool_study(list(self._outputs.values()), self.flow.series_mode)
        assessed = assessed_groups(self.flow.targets)
        result = StudyResult(
            patient_id=series.study.patient_id,
            study_uid=series.study.study_uid,
            series=(),
            pooled=pooled,
            columns=SubmissionColumns()(pooled),
            not_assessed=[group for group in GROUPS if group not in assessed],
            left_out=[f"series {item.path}: {item.reason}" for item in series.left_out],
            model=self.algorithm.parameters,
            version=self.algorithm.version,
            remarks=self._remarks,
        )
        record = study_record(result)
        record["series"] = list(self._outputs)
        kept = ("patient_id", "study", "series", "probabilities", "any_injury", "not_assessed", "network_outputs")
        content = {name: record[name] for name in (*kept, "warnings", "model", "version")}
        write_json(self.folder / "probabilities.json", content)
        report = injury_report(record, self._key_images, self._sources, self.algorithm, record["warnings"])
        report.save_as(self.folder / "report.dcm")
