"""The graph: series of a study -> bundle inference -> DICOM SEG, or DICOM SR and probabilities.json."""

from __future__ import annotations

import sys
from pathlib import Path

from monai.deploy.core import AppContext, Application, Image, IOType
from monai.deploy.operators.monai_bundle_inference_operator import IOMapping, MonaiBundleInferenceOperator

from trauma_monai import __version__
from trauma_monai.apps.deploy.model import DeployModel
from trauma_monai.apps.deploy.operators import OrganWriter, SeriesLoader
from trauma_monai.apps.deploy.trauma import ReportWriter, TraumaInference
from trauma_monai.bundle_files import ORGAN_BUNDLE, TRAUMA_BUNDLE
from trauma_monai.dicom_objects import Algorithm
from trauma_monai.scans import StudyFiles

__all__ = ["DeployApp"]


class DeployApp(Application):
    """Run a bundle over the CT series of one study.

    Args:
        study: what to read.
        folder: existing folder for the results.
        model: the bundle.
        bundle_path: folder that ``model.write`` made.
    """

    def __init__(self, study: StudyFiles, folder: Path, model: DeployModel, bundle_path: Path) -> None:
        self.study = study
        self.folder = folder
        self.model = model
        self.bundle_path = bundle_path
        super().__init__([sys.executable])  # or holoscan would read the command line

    def compose(self) -> None:
        """Connect the operators."""
        # No model in the context: the SDK would load TorchScript only. The operator loads what bundle_path holds.
        context = AppContext({"model": str(self.bundle_path / "none")})
        loader = SeriesLoader(self, study=self.study, name="loader")
        if self.model.task == "organs":
            infer = MonaiBundleInferenceOperator(
                self,
                app_context=context,
                input_mapping=[IOMapping("image", Image, IOType.IN_MEMORY)],
                output_mapping=[IOMapping("pred", Image, IOType.IN_MEMORY)],
                bundle_path=self.bundle_path,
                name="infer",
            )
            writer = OrganWriter(self, folder=self.folder, algorithm=self._algorithm(ORGAN_BUNDLE), name="writer")
        else:
            infer = TraumaInference(self, app_context=context, bundle_path=self.bundle_path, name="infer")
            algorithm = self._algorithm(TRAUMA_BUNDLE)
            writer = ReportWriter(self, folder=self.folder, algorithm=algorithm, flow=infer.flow, name="writer")
            self.add_flow(infer, writer, {("evidence", "evidence")})
        self.add_flow(loader, infer, {("image", "image")})
        self.add_flow(infer, writer, {("pred", "pred")})
        self.add_flow(loader, writer, {("series", "series")})

    def _algorithm(self, bundle: str) -> Algorithm:
        return Algorithm(f"trauma_monai {bundle}", __version__, self.model.names)
