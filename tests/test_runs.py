"""What a bundle run reads and writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Engine

from trauma_monai.runs import SaveMetrics, SaveProbabilities
from trauma_monai.targets import SUBMISSION_COLUMNS, TARGETS


def test_metrics_that_are_not_defined_are_written_as_null(tmp_path: Path) -> None:
    engine = Engine(lambda engine, batch: None)
    SaveMetrics(tmp_path / "new" / "metrics.json").attach(engine)
    engine.state.metrics = {"trauma_score": torch.tensor(0.5), "auc": float("nan")}
    engine.run([0])
    assert json.loads((tmp_path / "new" / "metrics.json").read_text()) == {"trauma_score": 0.5, "auc": None}


def test_series_of_a_patient_are_pooled_before_they_are_written(tmp_path: Path) -> None:
    probabilities = {"a": np.linspace(0, 1, 11), "b": np.linspace(1, 0, 11)}

    def evaluate(engine: Engine, series: str) -> list[dict[str, Any]]:
        engine.state.batch = [{"patient_id": "7", "series_id": series}]
        return [{"pred": torch.from_numpy(probabilities[series])}]

    engine = Engine(evaluate)
    SaveProbabilities(tmp_path / "probabilities.json", list(TARGETS)).attach(engine)
    engine.run(["a", "b"])
    record = json.loads((tmp_path / "probabilities.json").read_text())["7"]
    assert record["series"] == ["a", "b"]
    assert list(record["targets"].values()) == pytest.approx([1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.6, 0.7, 0.8, 0.9, 1])
    assert list(record["probabilities"]) == list(SUBMISSION_COLUMNS)
