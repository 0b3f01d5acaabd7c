"""What connects batches and scores to MONAI's trainer and evaluator."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import ignite.distributed as idist
import numpy as np
import pandas as pd
import torch
from ignite.engine import Engine
from ignite.exceptions import NotComputableError
from ignite.metrics import Metric
from monai.data import MetaTensor
from monai.engines import PrepareBatch
from sklearn.metrics import roc_auc_score

from trauma_monai.files import complete_or_absent
from trauma_monai.metrics import best_constant, trauma_score
from trauma_monai.pooling import SeriesMode, SubmissionColumns, assessed_groups, pool_series
from trauma_monai.targets import GROUPS, TARGETS, get_target

__all__ = ["StudyBatch", "TraumaScore", "TruthBatch"]


class StudyBatch(PrepareBatch):
    """Training: the stack of slices, and the targets of :class:`trauma_monai.InjuryLoss`.

    Args:
        image_key: entry with the stacks (B, W, S, C, H, H).
        label_key: entry with the soft labels (B, W, S, T).
        organs_key: entry with the label maps (B, W, S, H, H); left out when the batch has none.

    Returns:
        ``(image, {"label", "organs"})`` on the device, as plain tensors.
    """

    def __init__(self, image_key: str = "image", label_key: str = "label", organs_key: str = "organs") -> None:
        self.image_key = image_key
        self.label_key = label_key
        self.organs_key = organs_key

    def __call__(
        self,
        batchdata: Mapping[str, Any],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Move a batch to the device."""
        target = {"label": _to_device(batchdata, self.label_key, device, non_blocking, **kwargs)}
        if self.organs_key in batchdata:
            target["organs"] = _to_device(batchdata, self.organs_key, device, non_blocking, **kwargs)
        return _to_device(batchdata, self.image_key, device, non_blocking, **kwargs), target


class TruthBatch(PrepareBatch):
    """Validation: the stack of slices, and the truth of the study.

    Args:
        image_key: entry with the stacks (B, W, S, C, H, H).
        truth_key: entry with the truth (B, 11) from :class:`trauma_monai.StudyTruthd`.

    Returns:
        ``(image, truth)`` on the device, as plain tensors.
    """

    def __init__(self, image_key: str = "image", truth_key: str = "truth") -> None:
        self.image_key = image_key
        self.truth_key = truth_key

    def __call__(
        self,
        batchdata: Mapping[str, Any],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Move a batch to the device."""
        image = _to_device(batchdata, self.image_key, device, non_blocking, **kwargs)
        return image, _to_device(batchdata, self.truth_key, device, non_blocking, **kwargs)


class SeriesPrediction(NamedTuple):
    """What validation keeps of one series.

    Attributes:
        patient_id: which patient.
        series_id: which series of the patient.
        aortic_hu: HU in the aorta; NaN when unknown.
        probabilities: (T,) predictions.
        truth: (11,) labels of the patient.
    """

    patient_id: str
    series_id: str
    aortic_hu: float
    probabilities: np.ndarray
    truth: np.ndarray


class TraumaScore(Metric):
    """The competition's metric of an evaluator, over patients and over all processes.

    Attach it as MONAI's ``key_val_metric: {trauma_score: ...}``. Lower is better: the evaluator then needs
    ``metric_cmp_fn: $operator.lt`` and `CheckpointSaver` ``key_metric_negative_sign: true``.

    When the validation epoch ends, the series of each patient are pooled, targets become the 13 columns, and
    ``engine.state.metrics`` gets the score under the name it is attached by, the six losses that it is the mean of
    (``bowel`` ... ``any_injury``), ``best_constant`` (the score to beat on these patients), the area under the ROC
    curve of each target over patients (``auc_liver_injury`` ...; NaN where all patients are alike) and their mean
    ``auc``.

    A series that several processes saw, as when `DistributedSampler` pads, counts once. A group that the model has no
    targets for gets the same constants for every patient (:func:`trauma_monai.pooling.prior_columns`), which the log
    says once.

    Needs decollated batches (MONAI's default) whose items hold ``patient_id``, ``series_id``, the truth (11,) of
    :class:`trauma_monai.StudyTruthd`, maybe ``aortic_hu``, and after post-processing the pooled ``pred`` (T,) of
    :class:`trauma_monai.PoolSlicesd`.

    Args:
        targets: names of the T predicted targets, in output order.
        series_mode: how the series of a patient are pooled, see :func:`trauma_monai.pool_series`.
        columns: turns target -> array of probabilities into the 13 columns; one component, or MONAI's `Compose` of
            :class:`trauma_monai.SubmissionColumns` and post-processing.
        predictions_path: CSV to write, if any, whenever validation ends: ``patient_id, series_id, aortic_hu`` and a
            column per target, one row per series. For out-of-fold predictions.
        pred_key: entry with the pooled prediction.
        truth_key: entry with the truth.

    Raises:
        KeyError: for an unknown target, and when an item lacks an entry.
        ValueError: when shapes do not fit, or the series of one patient disagree on the truth.
    """

    def __init__(
        self,
        targets: Sequence[str],
        series_mode: SeriesMode = "max",
        columns: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
        predictions_path: str | Path | None = None,
        pred_key: str = "pred",
        truth_key: str = "truth",
    ) -> None:
        self.targets = [get_target(name).name for name in targets]
        self.series_mode = series_mode
        self.columns = SubmissionColumns() if columns is None else columns
        self.predictions_path = None if predictions_path is None else Path(predictions_path)
        self.pred_key = pred_key
        self.truth_key = truth_key
        self.details: dict[str, float] = {}
        self._series: list[SeriesPrediction] = []
        assessed = assessed_groups(self.targets)
        if constant := [group for group in GROUPS if group not in assessed]:
            logging.getLogger(__name__).info(
                f"Not assessed by this model, scored as constants: {', '.join(constant)} (targets: "
                f"{', '.join(self.targets)})."
            )
        super().__init__()

    def reset(self) -> None:
        """Forget the series seen so far."""
        self._series = []

    def iteration_completed(self, engine: Engine) -> None:
        """Take the items of one iteration from the engine's batch and output."""
        batch, output = engine.state.batch, engine.state.output
        if not isinstance(batch, list) or not isinstance(output, list):
            raise ValueError(
                f"batch is a {type(batch).__name__} and output a {type(output).__name__}; expected lists of items: "
                "the evaluator needs decollate true."
            )
        # The truth may be an entry of the batch or, by a transform in post-processing, of the output.
        self.update([{**item, **result} for item, result in zip(batch, output, strict=True)])

    def update(self, output: Sequence[Mapping[str, Any]]) -> None:
        """Add series.

        Args:
            output: per series a dictionary with the entries listed above.
        """
        self._series.extend(self._read(item) for item in output)

    def compute(self) -> float:
        """Return the score over the series of all processes, and write the predictions if wanted."""
        series = self._gather()
        if not series:
            raise NotComputableError("TraumaScore has seen no series: the validation set is empty.")
        if self.predictions_path is not None and idist.get_rank() == 0:
            write_predictions(self.predictions_path, series, self.targets)
        probabilities, truth = self._by_patient(series)
        solution = _solution(truth)
        submission = pd.DataFrame(
            dict(self.columns({name: probabilities[name].to_numpy() for name in self.targets})), index=truth.index
        )
        score = trauma_score(solution, submission)
        self.details = {**score.parts, "best_constant": best_constant(solution).score}
        areas = {f"auc_{name}": _area_under_roc(truth[name], probabilities[name]) for name in self.targets}
        defined = [area for area in areas.values() if not np.isnan(area)]
        self.details |= {**areas, "auc": float(np.mean(defined)) if defined else float("nan")}
        return score.score

    def completed(self, engine: Engine, name: str) -> None:
        """Write the score and its details into ``engine.state.metrics``."""
        super().completed(engine, name)
        engine.state.metrics.update(self.details)

    def _read(self, item: Mapping[str, Any]) -> SeriesPrediction:
        for key in ("patient_id", "series_id", self.pred_key, self.truth_key):
            if key not in item:
                raise KeyError(f"a validation item has no {key!r}; it has {', '.join(map(str, item))}.")
        probabilities = _vector(item[self.pred_key], len(self.targets), f"{self.pred_key!r} (add PoolSlicesd)")
        truth = _vector(item[self.truth_key], len(TARGETS), f"{self.truth_key!r} (all targets of StudyTruthd)")
        aortic_hu = item.get("aortic_hu")
        return SeriesPrediction(
            str(item["patient_id"]),
            str(item["series_id"]),
            float("nan") if aortic_hu is None else float(aortic_hu),
            probabilities,
            truth,
        )

    def _gather(self) -> list[SeriesPrediction]:
        """The series of all processes, each once, in an order that does not depend on the processes."""
        ranks: list[Any] = [self._series]
        if idist.get_world_size() > 1:
            ranks = cast(list[Any], idist.all_gather(self._series))
        once = {(series.patient_id, series.series_id): series for rank in ranks for series in rank}
        return [once[key] for key in sorted(once)]

    def _by_patient(self, series: Sequence[SeriesPrediction]) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Pooled predictions and truth, both one row per patient and one column per target."""
        patients: dict[str, list[SeriesPrediction]] = {}
        for one in series:
            patients.setdefault(one.patient_id, []).append(one)
        for patient, own in patients.items():
            if any(not np.array_equal(one.truth, own[0].truth) for one in own):
                raise ValueError(f"the series of patient {patient} have different labels; expected one truth.")
        index = pd.Index(list(patients), name="patient_id")
        pooled = [
            pool_series([one.probabilities for one in own], self.series_mode, [one.aortic_hu for one in own])
            for own in patients.values()
        ]
        probabilities = pd.DataFrame(np.stack(pooled), index, self.targets)
        return probabilities, pd.DataFrame(np.stack([own[0].truth for own in patients.values()]), index, list(TARGETS))


def write_predictions(path: Path, series: Sequence[SeriesPrediction], targets: Sequence[str]) -> None:
    """Write one row per series to a CSV file, which a reader never sees half written.

    Args:
        path: file to write or replace; its folder is made.
        series: what to write.
        targets: names of the probabilities.
    """
    table = pd.DataFrame(
        [(one.patient_id, one.series_id, one.aortic_hu, *one.probabilities.tolist()) for one in series],
        columns=["patient_id", "series_id", "aortic_hu", *targets],
    )
    with complete_or_absent(path) as file:
        table.to_csv(file, index=False)


def _solution(truth: pd.DataFrame) -> pd.DataFrame:
    """Labels by target as the competition's one-hot columns."""
    columns: dict[str, pd.Series] = {}
    for names in GROUPS.values():
        injured = [truth[name] for name in names[1:]]
        columns |= dict(zip(names, [1 - sum(injured[1:], injured[0]), *injured], strict=True))
    return pd.DataFrame(columns)


def _area_under_roc(truth: pd.Series, probabilities: pd.Series) -> float:
    return float(roc_auc_score(truth, probabilities)) if truth.nunique() == 2 else float("nan")


def _vector(value: Any, length: int, what: str) -> np.ndarray:
    # torch first: bfloat16 has no numpy type.
    vector = torch.as_tensor(value).detach().to("cpu", torch.float64).numpy()
    if vector.shape != (length,):
        raise ValueError(f"{what} has shape {vector.shape}; expected ({length},).")
    return vector


def _to_device(
    batchdata: Mapping[str, Any], key: str, device: str | torch.device | None, non_blocking: bool, **kwargs: Any
) -> torch.Tensor:
    if key not in batchdata:
        raise KeyError(f"the batch has no {key!r}; it has {', '.join(map(str, batchdata))}.")
    value = batchdata[key]
    plain = value.as_tensor() if isinstance(value, MetaTensor) else value
    return plain.to(device=device, non_blocking=non_blocking, **kwargs)
