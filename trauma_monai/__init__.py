"""CT trauma detection as MONAI bundles: the components that the bundles' configs point into.

Every public component is reachable as ``trauma_monai.Name`` (that is how configs name it) and imported on first use,
so that ``trauma-monai --help`` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Module -> its public components, in the order of the flow. A component is added here and in its module's __all__.
_COMPONENTS = {
    "dicom": (
        "DicomError",
        "discover_series",
        "read_series",
    ),
    "volume_reader": ("VolumeReader",),
    "organs": (
        "CheckMaskd",
        "NameBySeriesd",
        "OrganDice",
        "OrganDiceCELoss",
        "OrganLabelMapd",
        "OrganSegmenter",
        "OrganVisibilityd",
        "ResizeSlicesd",
        "SegmentOrgansd",
    ),
    "stacks": (
        "CropToBoxd",
        "RandWarpStackd",
        "ResizeStackd",
        "SelectSlicesd",
        "StackSlicesd",
        "WindowSlicesd",
        "slice_windows",
    ),
    "networks": (
        "ConvMaskHeads",
        "EffNetMaskDecoder",
        "Encoder",
        "InflatedUNet",
        "SliceSequenceNet",
        "UNetMaskDecoder",
        "WithOrganMasks",
        "create_encoder",
        "for_inference",
        "inflate",
        "load_weights",
    ),
    "inferers": ("StudyInferer",),
    "pooling": (
        "BlendPrior",
        "PoolSlicesd",
        "Power",
        "ScaleColumns",
        "SubmissionColumns",
        "assessed_groups",
        "fit_scales",
        "merge_models",
        "pool_series",
        "prior_columns",
    ),
    "labels": (
        "FrameLabelsd",
        "SoftSliceLabelsd",
        "StudyTruthd",
    ),
    "losses": (
        "InjuryLoss",
        "MultilabelDiceLoss",
    ),
    "samplers": ("BalancedSampler",),
    "datalist": (
        "load_datalist",
        "organ_items",
        "window_items",
    ),
    "handlers": (
        "StudyBatch",
        "TraumaScore",
        "TruthBatch",
    ),
    "metrics": (
        "CLASS_WEIGHTS",
        "Score",
        "best_constant",
        "best_constant_prediction",
        "cspine_score",
        "read_solution",
        "read_submission",
        "score_files",
        "trauma_loss",
        "trauma_score",
    ),
    "oof": (
        "collect_oof",
        "write_oof",
    ),
    "ensemble": ("EnsembleClassifier",),
    "memory": ("keep_freed_memory",),
    "training": (
        "EpochSeeds",
        "PretrainedEncoder",
        "SaveBest",
        "SaveLast",
        "StepWithOptimizer",
        "StopEarly",
        "StopWhenDiverged",
        "TrainingProgress",
        "TrainingState",
    ),
    "sample_pictures": ("SamplePictures",),
    "runs": (
        "SaveMetrics",
        "SaveProbabilities",
        "check_switches",
        "series_items",
    ),
}
_MODULE_OF = {name: module for module, names in _COMPONENTS.items() for name in names}

__all__ = ["__version__", *sorted(_MODULE_OF)]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(
            f"module 'trauma_monai' has no component {name!r}; it has {', '.join(sorted(_MODULE_OF))}."
        )
    return getattr(importlib.import_module(f"trauma_monai.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return list(__all__)
