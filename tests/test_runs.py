"""What a bundle run reads and writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Engine

from trauma_monai import runs
from trauma_monai.networks import SliceSequenceNet
from trauma_monai.runs import PretrainedEncoder, SaveMetrics, SaveProbabilities, StepWithOptimizer
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


def test_a_schedule_follows_the_steps_of_its_optimizer() -> None:
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)

    def train(engine: Engine, batch: int) -> None:
        weight.sum().backward()
        if batch % 2:
            optimizer.step()

    engine = Engine(train)
    StepWithOptimizer(schedule).attach(engine)
    engine.run(range(4))
    assert schedule.get_last_lr() == [0.25]
    optimizer.step()
    assert schedule.get_last_lr() == [0.25], "the schedule stands still after the training"


def test_published_weights_replace_those_of_the_encoder_when_training_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    published = SliceSequenceNet("test_resnet", hidden_size=4).encoder
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(runs, "create_encoder", lambda *arguments: asked.append(arguments) or published)
    network = SliceSequenceNet("test_resnet", hidden_size=4)
    engine = Engine(lambda engine, batch: None)
    PretrainedEncoder(network, "test_resnet", 64, 3).attach(engine)
    assert asked == []
    engine.run([0])
    assert asked == [("test_resnet", True, 64, 3)]
    for name, tensor in published.state_dict().items():
        torch.testing.assert_close(network.encoder.state_dict()[name], tensor)
