"""What a bundle run reads and writes: the series of a folder, metrics and probabilities as JSON."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from ignite.engine import Engine, Events

from trauma_monai.datalist import has_items, load_datalist
from trauma_monai.files import DATALIST, write_json
from trauma_monai.pooling import SeriesMode, SubmissionColumns, pool_series
from trauma_monai.scans import find_studies

__all__ = [
    "SaveMetrics",
    "SaveProbabilities",
    "check_switches",
    "series_items",
]


def series_items(dataset_dir: str | Path) -> list[dict[str, Any]]:
    """List the series to predict.

    Args:
        dataset_dir: a data set from ``trauma-monai prepare`` (all its series), or what ``trauma-monai predict`` takes:
            a folder of DICOM files, any mix of series and patients, a NIfTI file or a folder of them.

    Returns:
        Items with ``image`` (a path, or the files of a DICOM series), ``patient_id`` and ``series_id``; ``organs``
        where the data set has masks.

    Raises:
        ValueError: when there is nothing at ``dataset_dir``, or no CT series, with the reason why files were left out.
    """
    path = Path(dataset_dir).expanduser().absolute()
    if (path / DATALIST).is_file():
        sections = [section for section in ("all", "test") if has_items(path, section)]
        items = [item for section in sections for item in load_datalist(path, section, require=())]
        return [{key: item[key] for key in KEPT_KEYS if key in item} for item in items]
    studies, left_out = find_studies(path)
    if not studies:
        reasons = sorted({item.reason for item in left_out})
        raise ValueError(f"no CT series in {path}: {'; '.join(reasons) or 'it holds no DICOM and no NIfTI files'}.")
    for reason, count in Counter(item.reason for item in left_out).items():
        logging.getLogger(__name__).warning(f"left out: {count} x {reason}")
    named = Counter(series_id for study in studies for series_id in study.series)
    studies_of = Counter(study.patient_id for study in studies)
    return [
        {
            "image": str(source) if isinstance(source, Path) else [str(file) for file in source.files],
            # Results are kept by patient: two studies of one are two.
            "patient_id": study.patient_id if studies_of[study.patient_id] == 1 else study.folder,
            # What is written is named after the series: copies of one for two patients must not meet.
            "series_id": series_id if named[series_id] == 1 else f"{study.folder}_{series_id}",
        }
        for study in studies
        for series_id, source in study.series.items()
    ]


KEPT_KEYS = ("image", "organs", "patient_id", "series_id")
"""What inference needs of an item of a prepared data set: no labels."""


def check_switches(**switches: Any) -> None:
    """Refuse a switch of the command line that would mean its opposite.

    The command line of MONAI reads ``--amp False``; of ``--amp false`` it makes a text, and a text counts as yes.

    Raises:
        ValueError: for a text that is not ``true``.
    """
    for name, value in switches.items():
        if isinstance(value, str) and value.lower() != "true":
            raise ValueError(f"--{name} is the text {value!r}; write --{name} False or --{name} True.")


class SaveMetrics:
    """Write an evaluator's metrics to a JSON file when it is done.

    Numbers that are not defined (the area under a ROC curve when all patients are alike) become null.

    Args:
        path: file to write; its folder is made.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def attach(self, engine: Engine) -> None:
        """Write when the engine's epoch ends."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Write the file."""
        metrics = {name: _number(value) for name, value in engine.state.metrics.items()}
        write_json(self.path, metrics)


class SaveProbabilities:
    """Write what an evaluator predicts, pooled by patient, to a JSON file.

    ``{patient_id: {"series": [series ids], "targets": {target: p}, "probabilities": {13 columns}}}``. Needs items with
    ``patient_id``, ``series_id`` and the pooled ``pred`` (T,) of :class:`trauma_monai.PoolSlicesd`.

    Args:
        path: file to write; its folder is made.
        targets: names of the T targets in output order.
        series_mode: how the series of a patient are pooled, see :func:`trauma_monai.pool_series`.
    """

    def __init__(self, path: str | Path, targets: Sequence[str], series_mode: SeriesMode = "max") -> None:
        self.path = Path(path)
        self.targets = list(targets)
        self.series_mode = series_mode
        self.columns = SubmissionColumns()
        self._series: dict[str, dict[str, Any]] = {}

    def attach(self, engine: Engine) -> None:
        """Collect during the engine's epoch, write when it ends."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._reset)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._collect)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._write)

    def _reset(self) -> None:
        self._series = {}

    def _collect(self, engine: Engine) -> None:
        items, outputs = cast(list, engine.state.batch), cast(list, engine.state.output)
        for item, output in zip(items, outputs, strict=True):
            of_patient = self._series.setdefault(str(item["patient_id"]), {})
            of_patient[str(item["series_id"])] = torch.as_tensor(output["pred"]).cpu().double().numpy()

    def _write(self) -> None:
        write_json(self.path, {patient: self._record(series) for patient, series in self._series.items()})

    def _record(self, series: Mapping[str, Any]) -> dict[str, Any]:
        pooled = pool_series(list(series.values()), self.series_mode)
        targets = dict(zip(self.targets, pooled.tolist(), strict=True))
        return {"series": list(series), "targets": targets, "probabilities": self.columns(targets)}


def _number(value: Any) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None
