"""Stage 5 of 6: slice probabilities -> study probabilities.

Slices and windows are pooled to one vector per series, series to one per patient, models to one per ensemble. The
targets of the networks then become the 13 columns of the competition, which post-processing may rescale.

Columns are mappings from name to number, or to an array with one number per study: all arithmetic is elementwise.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform
from scipy.optimize import minimize

from trauma_monai.metrics import CLASS_WEIGHTS
from trauma_monai.targets import CLASS_FREQUENCIES, GROUPS, SUBMISSION_COLUMNS, TARGETS, get_target

__all__ = [
    "BlendPrior",
    "ModelOutput",
    "PoolSlicesd",
    "Power",
    "ScaleColumns",
    "SeriesMode",
    "SubmissionColumns",
    "assessed_groups",
    "fit_scales",
    "merge_models",
    "pool_series",
    "pool_study",
    "prior_columns",
]

Columns: TypeAlias = Mapping[str, Any]
"""Column or target -> probability, a float or an array with one value per study."""

SeriesMode: TypeAlias = Literal["max", "mean", "lowest_aortic_hu"]
"""How the series of a patient are pooled, see :func:`pool_series`."""

TARGETS_OF_GROUP = {
    "bowel": ("bowel_injury",),
    "extravasation": ("extravasation_injury",),
    "kidney": ("kidney_injury", "kidney_low", "kidney_high"),
    "liver": ("liver_injury", "liver_low", "liver_high"),
    "spleen": ("spleen_injury", "spleen_low", "spleen_high"),
}
"""What a model has to predict for a group of the competition to be assessed."""

INJURY_COLUMNS = tuple(column for columns in GROUPS.values() for column in columns[1:])
"""Columns that get factors. Healthy ones need none: only ratios within a group matter."""

FAILED_AORTIC_HU = -1000.0
"""At or below it (the competition's table has -1024) the measurement in the aorta failed: it is not contrast."""

SATURATION = 1e-6
"""Probabilities are kept this far from 0 and 1, or a saturated sigmoid would leave a group without any probability."""

FIRST_SCALE_STEP = 0.5
"""Step of the first tries of :func:`fit_scales` in the logarithm of a factor: times 1.6."""


class PoolSlicesd(MapTransform):
    """Pool the probabilities of all slice groups in all windows of a series to one per target.

    Args:
        keys: probabilities (after the sigmoid) of shape (W, S, T); become (T,), float32.
        mode: ``max``: a series is as injured as its most suspicious slice group (1st place); or ``mean``.
        slices_key: entry that keeps the slice probabilities, (W, S, T), for the report and for ensembles.
        allow_missing_keys: skip a key that the sample lacks instead of failing.

    Raises:
        ValueError: for an unknown mode, a shape other than (W, S, T), and values outside 0 to 1 or NaN.

    Source:
        1st place, RSNA 2023: https://github.com/Nischaydnk/RSNA-2023-1st-place-solution (max over steps, windows
        and series).
    """

    def __init__(
        self,
        keys: KeysCollection = "pred",
        mode: Literal["max", "mean"] = "max",
        slices_key: str = "slice_probabilities",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if mode not in ("max", "mean"):
            raise ValueError(f"mode is {mode!r}; expected 'max' or 'mean'.")
        self.mode = mode
        self.slices_key = slices_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        sample = dict(data)
        for key in self.key_iterator(sample):
            probabilities = torch.as_tensor(sample[key]).float()
            if probabilities.ndim != 3 or not probabilities.numel():
                raise ValueError(
                    f"{key!r} has shape {tuple(probabilities.shape)}; expected (windows, slice groups, targets), "
                    "each 1 or more."
                )
            if not (probabilities.min() >= 0 and probabilities.max() <= 1):
                raise ValueError(
                    f"{key!r} spans {probabilities.min():g} to {probabilities.max():g}, expected 0 to 1: apply the "
                    "sigmoid first (Activationsd); NaN means that the network has diverged."
                )
            sample[self.slices_key] = probabilities
            sample[key] = probabilities.amax((0, 1)) if self.mode == "max" else probabilities.mean((0, 1))
        return sample


def pool_series(
    probabilities: Sequence[Any],
    mode: SeriesMode = "max",
    aortic_hu: Sequence[float | None] = (),
) -> np.ndarray:
    """Pool the series of one patient.

    Args:
        probabilities: per series a vector of shape (T,).
        mode: ``max`` (1st place) or ``mean`` (2nd place) over series, or ``lowest_aortic_hu``: only the series with
            the least contrast in the aorta, the late (portal venous) phase (3rd place).
        aortic_hu: HU measured in the aorta, per series; needed only for ``lowest_aortic_hu`` of several series.
            None, NaN and the table's failure value -1024 are unknown, and never the lowest.

    Returns:
        float64 vector of shape (T,).

    Raises:
        ValueError: for an unknown mode, no series, or several series none of which has a known aortic HU.
    """
    if not len(probabilities):
        raise ValueError("a patient has no series to pool; expected one or more.")
    stacked = np.stack([np.asarray(vector, dtype=np.float64) for vector in probabilities])
    if mode == "max":
        return stacked.max(axis=0)
    if mode == "mean":
        return stacked.mean(axis=0)
    if mode != "lowest_aortic_hu":
        raise ValueError(f"mode is {mode!r}; expected 'max', 'mean' or 'lowest_aortic_hu'.")
    return stacked[_lowest_aortic_hu(aortic_hu, len(stacked))]


def _lowest_aortic_hu(aortic_hu: Sequence[float | None], num_series: int) -> int:
    if num_series == 1:
        return 0
    if len(aortic_hu) != num_series:
        raise ValueError(f"{len(aortic_hu)} values of aortic_hu for {num_series} series; expected one each.")
    values = np.array([np.nan if value is None else value for value in aortic_hu], dtype=np.float64)
    values[values <= FAILED_AORTIC_HU] = np.nan
    if np.isnan(values).all():
        raise ValueError(f"none of {num_series} series has a known aortic_hu; pool them by 'max' or 'mean' instead.")
    return int(np.nanargmin(values))


def merge_models(predictions: Sequence[Columns], weights: Sequence[float] | None = None) -> dict[str, Any]:
    """Average models that may cover different targets, such as an organ model and a bleeding model.

    Models of one architecture (folds, seeds) are better averaged slice by slice before the pooling, by MONAI's
    `MeanEnsembled`; different architectures, whose slices differ, after it, by this function (1st place).

    Args:
        predictions: per model its targets -> probability.
        weights: per model a weight above 0; equal unless given. Each target is divided by the weights of the models
            that predict it.

    Returns:
        Every target that any model predicts -> probability.

    Raises:
        ValueError: without models, or when the weights do not fit.
    """
    if not predictions:
        raise ValueError("no predictions to merge; expected those of one or more models.")
    weights = [1.0] * len(predictions) if weights is None else list(weights)
    if len(weights) != len(predictions) or min(weights) <= 0:
        raise ValueError(f"weights are {weights} for {len(predictions)} models; expected one above 0 for each.")
    merged: dict[str, Any] = {}
    for target in dict.fromkeys(target for prediction in predictions for target in prediction):
        voices = [(w, p[target]) for w, p in zip(weights, predictions, strict=True) if target in p]
        merged[target] = sum(w * value for w, value in voices) / sum(w for w, _ in voices)
    return merged


class ModelOutput(NamedTuple):
    """What one model says of one series.

    Attributes:
        probabilities: target -> probability over the series.
        weight: what the model counts for among others, above 0.
    """

    probabilities: Mapping[str, float]
    weight: float = 1.0


def pool_study(series: Sequence[Sequence[ModelOutput]], mode: SeriesMode = "max") -> dict[str, float]:
    """Pool the series of a patient for each model, and then the models: the published order, which `oof` has too.

    Args:
        series: per series the outputs of the models, all in one order.
        mode: see :func:`pool_series`.

    Returns:
        Every target that any model predicts -> probability, in the order of :data:`trauma_monai.targets.TARGETS`.
    """
    of_models = []
    for outputs in zip(*series, strict=True):
        targets = list(outputs[0].probabilities)
        vector = pool_series([[output.probabilities[name] for name in targets] for output in outputs], mode)
        of_models.append(dict(zip(targets, vector.tolist(), strict=True)))
    merged = merge_models(of_models, [output.weight for output in series[0]])
    return {name: merged[name] for name in TARGETS if name in merged}


def assessed_groups(targets: Sequence[str]) -> tuple[str, ...]:
    """Groups of the competition that a model with these targets says something about.

    Raises:
        KeyError: for an unknown target.
        ValueError: when the targets cover a group in part, such as liver_injury without its grades.
    """
    names = {get_target(name).name for name in targets}
    assessed = []
    for group, needed in TARGETS_OF_GROUP.items():
        missing = [name for name in needed if name not in names]
        if not missing:
            assessed.append(group)
        elif len(missing) < len(needed):
            raise ValueError(f"the targets cover {group} in part: {missing} missing; expected {list(needed)} or none.")
    return tuple(assessed)


def prior_columns(group: str) -> dict[str, float]:
    """What is said of a group that no model assesses: how often its classes occur, weighted as the metric does.

    This is the constant with the least loss, not a probability of injury: reports call such a group "not assessed".

    Args:
        group: one of :data:`trauma_monai.targets.GROUPS`.
    """
    columns = GROUPS[group]
    injured = [CLASS_FREQUENCIES[column] for column in columns[1:]]
    frequencies = [1 - sum(injured), *injured]
    weighted = [f * w for f, w in zip(frequencies, CLASS_WEIGHTS[group], strict=True)]
    return {column: value / sum(weighted) for column, value in zip(columns, weighted, strict=True)}


class SubmissionColumns:
    """Turn the targets of the networks into the 13 columns of the competition, each group summing to 1.

    Organ: healthy = 1 - injury, low, high_factor * high. Bowel: injury, 1 - injury. Extravasation, with the prior r:
    injury = 3 r + 4 p, healthy = (1 - r) / 2 + (1 - p) / 2: raised, since the metric weighs extravasation by 6 and
    takes "any injury" from the largest group. A group without targets gets :func:`prior_columns`.

    Args:
        high_factor: what high grades are multiplied by; they weigh most in the metric.
        extravasation_prior: r, how often extravasation occurs; None leaves p and 1 - p.

    Raises:
        ValueError: for a factor that is not above 0 or a prior outside 0 to 1.

    Source:
        1st place, RSNA 2023: https://github.com/Nischaydnk/RSNA-2023-1st-place-solution (validation code; the
        factors of their final notebook are not public).
    """

    def __init__(self, high_factor: float = 2.0, extravasation_prior: float | None = 0.0636) -> None:
        if not high_factor > 0:
            raise ValueError(f"high_factor is {high_factor}; expected above 0.")
        if extravasation_prior is not None and not 0 <= extravasation_prior <= 1:
            raise ValueError(f"extravasation_prior is {extravasation_prior}; expected 0 to 1, or None.")
        self.high_factor = high_factor
        self.extravasation_prior = extravasation_prior

    def __call__(self, probabilities: Columns) -> dict[str, Any]:
        """Map targets to columns.

        Args:
            probabilities: target -> probability, 0 to 1, for all or some of the groups.

        Returns:
            The 13 columns in the order of train.csv.

        Raises:
            KeyError: for an unknown target.
            ValueError: when the targets cover a group in part.
        """
        assessed = assessed_groups(list(probabilities))
        p = {name: np.clip(np.float64(value), SATURATION, 1 - SATURATION) for name, value in probabilities.items()}
        columns: dict[str, Any] = {}
        for group, names in GROUPS.items():
            values = self._group(group, p) if group in assessed else list(prior_columns(group).values())
            columns.update(zip(names, values, strict=True))
        return _normalised(columns)

    def _group(self, group: str, p: Columns) -> list[Any]:
        injury = p[f"{group}_injury"]
        prior = self.extravasation_prior
        if group == "extravasation" and prior is not None:
            return [0.5 * (1 - prior) + 0.5 * (1 - injury), 3 * prior + 4 * injury]
        if len(TARGETS_OF_GROUP[group]) == 1:
            return [1 - injury, injury]
        return [1 - injury, p[f"{group}_low"], self.high_factor * p[f"{group}_high"]]


class ScaleColumns:
    """Multiply columns by factors and normalise each group again.

    Args:
        factors: column -> factor above 0; columns that are not named keep their value.

    Raises:
        KeyError: for an unknown column.
        ValueError: for a factor that is not above 0.

    Source:
        9th place, RSNA 2023: 1.5 on low, high and extravasation_injury; 3rd place: factors fitted to the metric
        (https://github.com/yujiariyasu/rsna_2023_abdominal_trauma_detection).
    """

    def __init__(self, factors: Mapping[str, float]) -> None:
        _check_columns(factors)
        if wrong := {column: factor for column, factor in factors.items() if not factor > 0}:
            raise ValueError(f"factors {wrong} are not above 0.")
        self.factors = dict(factors)

    def __call__(self, columns: Columns) -> dict[str, Any]:
        """Return the 13 columns, scaled."""
        return _normalised({name: columns[name] * self.factors.get(name, 1.0) for name in SUBMISSION_COLUMNS})


class BlendPrior:
    """Draw every column towards how often its class occurs, weighted as the metric does: less certain, safer.

    Args:
        weight: of the prior, 0 (columns stay) to 1 (nothing but the prior).

    Raises:
        ValueError: for a weight outside 0 to 1.

    Source:
        The general form of the prior in the 1st place's extravasation column, see :class:`SubmissionColumns`.
    """

    def __init__(self, weight: float) -> None:
        if not 0 <= weight <= 1:
            raise ValueError(f"weight is {weight}; expected 0 to 1.")
        self.weight = weight
        self.prior = {column: value for group in GROUPS for column, value in prior_columns(group).items()}

    def __call__(self, columns: Columns) -> dict[str, Any]:
        """Return the 13 columns, blended."""
        normalised = _normalised({name: columns[name] for name in SUBMISSION_COLUMNS})
        return {name: (1 - self.weight) * value + self.weight * self.prior[name] for name, value in normalised.items()}


class Power:
    """Raise every column to a power and normalise each group again; below 1 it evens the classes out.

    Args:
        exponent: above 0.

    Raises:
        ValueError: for an exponent that is not above 0.

    Source:
        8th place, RSNA 2023: p ** 0.5 helped on the private leaderboard.
    """

    def __init__(self, exponent: float = 0.5) -> None:
        if not exponent > 0:
            raise ValueError(f"exponent is {exponent}; expected above 0.")
        self.exponent = exponent

    def __call__(self, columns: Columns) -> dict[str, Any]:
        """Return the 13 columns, raised."""
        return _normalised({name: columns[name] ** self.exponent for name in SUBMISSION_COLUMNS})


def fit_scales(
    columns: Columns,
    loss: Callable[[Columns], float],
    start: Mapping[str, float] | None = None,
    max_evaluations: int = 2000,
    names: Sequence[str] = INJURY_COLUMNS,
) -> ScaleColumns:
    """Fit one factor per injury column to a loss by Nelder-Mead, on predictions for studies not trained on.

    Args:
        columns: the 13 columns, each an array with one value per study.
        loss: what scaled columns cost, for instance the competition's metric.
        start: column -> factor to start from; 1 unless given.
        max_evaluations: of the loss.
        names: the columns that get factors, all injuries unless given; a class that no study shows must not have one.

    Returns:
        The factors that were found, as post-processing.

    Source:
        3rd place, RSNA 2023 (see :class:`ScaleColumns`).
    """
    if not names:
        return ScaleColumns({})
    first = np.log([1.0 if start is None else start.get(name, 1.0) for name in names])

    def scales(log_factors: np.ndarray) -> ScaleColumns:
        return ScaleColumns(dict(zip(names, map(float, np.exp(log_factors)), strict=True)))

    # SciPy's own first simplex has steps of 0.00025 from a factor of 1: too small to find anything.
    simplex = np.vstack([first, first + FIRST_SCALE_STEP * np.eye(len(first))])
    options = {"maxfev": max_evaluations, "adaptive": True, "initial_simplex": simplex}
    found = minimize(lambda x: loss(scales(x)(columns)), first, method="Nelder-Mead", options=options)
    return scales(found.x)


def _check_columns(columns: Columns) -> None:
    if unknown := sorted(set(columns) - set(SUBMISSION_COLUMNS)):
        raise KeyError(f"unknown columns {unknown}; known: {', '.join(SUBMISSION_COLUMNS)}.")


def _normalised(columns: Columns) -> dict[str, Any]:
    """The 13 columns with each group divided by its sum."""
    result: dict[str, Any] = {}
    for names in GROUPS.values():
        total = sum(columns[name] for name in names)
        for name in names:
            value = columns[name] / total
            result[name] = value if isinstance(value, np.ndarray) and value.ndim else float(value)
    return result
