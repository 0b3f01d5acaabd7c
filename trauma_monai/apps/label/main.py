"""MONAI Label app: both bundles, and active learning for the organ bundle.

    monailabel start_server --app trauma_monai/apps/label --studies DIR [--conf bundles_dir DIR]

MONAI Label's own app for bundles asks a network how uncertain it is after the decision for an organ, where nothing of
the uncertainty is left. Here the probabilities are asked. See docs/label.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from monai.transforms import Activationsd
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.infer_v2 import InferTask
from monailabel.interfaces.tasks.scoring import ScoringMethod
from monailabel.interfaces.tasks.strategy import Strategy
from monailabel.interfaces.tasks.train import TrainTask
from monailabel.tasks.activelearning.epistemic import Epistemic
from monailabel.tasks.activelearning.first import First
from monailabel.tasks.activelearning.random import Random
from monailabel.tasks.infer.bundle import BundleInferTask
from monailabel.tasks.scoring.epistemic_v2 import EpistemicScoring
from monailabel.tasks.train.bundle import BundleTrainTask
from torch import nn

from trauma_monai import __version__
from trauma_monai.bundle_files import ORGAN_BUNDLE, TRAUMA_BUNDLE, find_bundles
from trauma_monai.targets import ORGAN_CODES


class TraumaApp(MONAILabelApp):
    """Serves both bundles, trains the organ bundle, and says which image to label next.

    Args:
        app_dir: folder of this file; MONAI Label adds folders of its own there.
        studies: folder with the images, or the address of a DICOMweb server.
        conf: what ``--conf NAME VALUE`` gave. ``bundles_dir``: folder with both bundles, with weights in their
            models/; those of the project unless given. ``epistemic_dropout`` (0.2), ``epistemic_simulation_size`` (5)
            and ``epistemic_max_samples`` (0: all): for the scoring.

    Raises:
        ValueError: when a bundle is not there, or the organ bundle has no weights: the trauma bundle needs it too.
    """

    def __init__(self, app_dir: str, studies: str, conf: Mapping[str, str]) -> None:
        self.organ_root, self.trauma_root = map(str, find_bundles(conf.get("bundles_dir")))
        super().__init__(
            app_dir,
            studies,
            conf,
            name="trauma_monai",
            description="CT trauma: organ masks with active learning, and injury probabilities",
            version=__version__,
            labels=list(ORGAN_CODES),
        )

    def init_infers(self) -> dict[str, InferTask]:
        """Serve the bundles that have weights."""
        organs, trauma = (BundleInferTask(root, self.conf) for root in (self.organ_root, self.trauma_root))
        if not organs.is_valid():
            raise ValueError(
                f"no weights at {Path(self.organ_root) / 'models/model.pt'}: train the bundle, or copy them."
            )
        return {ORGAN_BUNDLE: organs} | ({TRAUMA_BUNDLE: trauma} if trauma.is_valid() else {})

    def init_trainers(self) -> dict[str, TrainTask]:
        """Train the organ bundle alone: MONAI Label keeps label maps, not labels of studies."""
        return {ORGAN_BUNDLE: BundleTrainTask(self.organ_root, self.conf)}

    def init_strategies(self) -> dict[str, Strategy]:
        """Choose the next image at random, in order, or where the organ network is least certain."""
        return {"random": Random(), "first": First(), "epistemic": Epistemic()}

    def init_scoring_methods(self) -> dict[str, ScoringMethod]:
        """Score images for the epistemic strategy."""
        network = DropoutInferTask(
            self.organ_root, self.conf, dropout=float(self.conf.get("epistemic_dropout", 0.2)), skip_writer=True
        )
        scoring = VarianceScoring(
            network,
            max_samples=int(self.conf.get("epistemic_max_samples", 0)),
            simulation_size=int(self.conf.get("epistemic_simulation_size", 5)),
            use_variance=True,
        )
        return {"epistemic": scoring}


class DropoutInferTask(BundleInferTask):
    """The organ bundle as a random draw: dropout at work, organ probabilities on the network's grid."""

    def post_transforms(self, data: Any = None) -> list[Callable]:
        """Stop before the decision for an organ."""
        return [Activationsd(keys=self.key_pred, sigmoid=True)]

    def _get_network(self, device: str, data: Any) -> nn.Module:
        # Not the task's train_mode: batch normalisation would go by the volume at hand, and learn from it.
        network: nn.Module = super()._get_network(device, data)
        for module in network.modules():
            if isinstance(module, nn.Dropout):
                module.train()
        return network


class VarianceScoring(EpistemicScoring):
    """Scores an image by how much its organ probabilities vary between draws: their variance, summed over organs."""

    def __call__(self, request: Mapping[str, Any], datastore: Datastore) -> dict[str, Any]:
        """Score the images without label, one at a time: the task's config parser does not stand threads."""
        return super().__call__({**request, "max_workers": 1}, datastore)
