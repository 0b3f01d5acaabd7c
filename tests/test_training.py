"""Handlers of a training run: reproducible epochs, the best weights, going on, stopping."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import Dataset
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import ValidationHandler
from monai.transforms import RandScaleIntensityd

from trauma_monai import training
from trauma_monai.networks import SliceSequenceNet
from trauma_monai.training import (
    EpochSeeds,
    PretrainedEncoder,
    SaveBest,
    SaveLast,
    StepWithOptimizer,
    StopEarly,
    StopWhenDiverged,
    TrainingProgress,
    TrainingState,
)


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


def run_with_losses(losses: list[float], steps: int) -> Engine:
    engine = Engine(lambda _, loss: [{"loss": torch.tensor(loss)}])
    StopWhenDiverged(steps).attach(engine)
    engine.run(losses)
    return engine


def test_a_training_whose_loss_stays_nan_fails_with_the_reason() -> None:
    with pytest.raises(RuntimeError, match=r"last 3 steps is not finite .* diverged\. Lower `lr`"):
        run_with_losses([0.5, math.nan, math.inf, math.nan, 0.5], 3)


def test_a_step_that_mixed_precision_skips_does_not_stop_a_training() -> None:
    assert run_with_losses([0.5, math.nan, math.nan, 0.4, math.nan, math.nan, 0.3], 3).state.iteration == 7


def test_published_weights_replace_those_of_the_encoder_when_training_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    published = SliceSequenceNet("test_resnet", hidden_size=4).encoder
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(training, "create_encoder", lambda *arguments: asked.append(arguments) or published)
    network = SliceSequenceNet("test_resnet", hidden_size=4)
    engine = Engine(lambda engine, batch: None)
    PretrainedEncoder(network, "test_resnet", 64, 3).attach(engine)
    assert asked == []
    engine.run([0])
    assert asked == [("test_resnet", True, 64, 3)]
    for name, tensor in published.state_dict().items():
        torch.testing.assert_close(network.encoder.state_dict()[name], tensor)


def drawn(seed: int, rank: int, epochs: int, start: int = 0) -> list[tuple[float, float, float]]:
    """What torch, Python and a MONAI transform draw in each epoch after ``start``."""
    dataset = Dataset([{"x": torch.ones(1)}], RandScaleIntensityd("x", factors=0.5, prob=1.0))
    draws: list[tuple[float, float, float]] = []
    engine = Engine(lambda engine, batch: draws.append((float(torch.rand(1)), random.random(), float(dataset[0]["x"]))))
    EpochSeeds(seed, dataset, rank).attach(engine)
    engine.state.epoch, engine.state.iteration, engine.state.max_epochs = start, start, epochs
    engine.state.epoch_length = 1
    engine.run([0], max_epochs=epochs)
    return draws


def test_an_epoch_draws_the_same_whatever_came_before() -> None:
    whole = drawn(seed=3, rank=0, epochs=4)
    assert len(set(whole)) == 4
    assert drawn(seed=3, rank=0, epochs=4, start=2) == whole[2:]


def test_runs_and_processes_draw_differently() -> None:
    first = drawn(seed=3, rank=0, epochs=1)
    assert drawn(seed=4, rank=0, epochs=1) != first
    assert drawn(seed=3, rank=1, epochs=1) != first


def trained(
    folder: Path, scores: Sequence[float], resume: bool = False, patience: int | None = None, interval: int = 1
) -> Any:
    """Train one weight, +1 an epoch; validation number ``n`` of all gives ``scores[n]``, of which less is better."""
    network = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(network.weight)
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    evaluator = SupervisedEvaluator(
        torch.device("cpu"),
        [{"image": torch.ones(1, 1), "label": torch.ones(1, 1)}],
        network,
        metric_cmp_fn=lambda now, best: now < best,
        decollate=False,
        val_handlers=[],
    )

    def score(engine: Engine) -> None:
        engine.state.key_metric_name = "score"
        engine.state.metrics["score"] = now = scores[engine.state.epoch - 1]
        if engine.state.best_metric_epoch == -1 or now < engine.state.best_metric:
            engine.state.best_metric, engine.state.best_metric_epoch = now, engine.state.epoch

    evaluator.add_event_handler(Events.EPOCH_COMPLETED, score)
    SaveBest(folder / "model.pt", network).attach(evaluator)
    handlers = [
        ValidationHandler(interval, evaluator),
        TrainingState(
            folder / "state.pt", {"network": network, "optimizer": optimizer}, evaluator=evaluator, resume=resume
        ),
        TrainingProgress(1, log_seconds=0.0),
    ]
    if patience is not None:
        handlers.append(StopEarly(evaluator, patience))
    trainer = SupervisedTrainer(
        torch.device("cpu"),
        len(scores),
        [{"image": torch.ones(1, 1), "label": torch.ones(1, 1)}],
        network,
        optimizer,
        loss_function=lambda prediction, label: -prediction.mean(),
        train_handlers=handlers,
    )
    trainer.run()
    return trainer


def best_weight(folder: Path) -> float:
    return float(torch.load(folder / "model.pt", weights_only=True)["weight"])


def test_the_best_validation_is_kept(tmp_path: Path) -> None:
    trained(tmp_path, [0.5, 0.3, 0.4])
    assert best_weight(tmp_path) == 2.0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.pt", "state.pt"]


def test_what_fails_before_its_first_epoch_ended_leaves_the_last_weights_alone(tmp_path: Path) -> None:
    network = torch.nn.Linear(1, 1)
    path = tmp_path / "model_last.pt"

    def train(losses: list[float]) -> None:
        engine = Engine(lambda _, loss: 1 / loss)
        SaveLast(path, network).attach(engine)
        engine.run(losses)

    train([1.0])
    before = path.read_bytes()
    torch.nn.init.zeros_(network.weight)
    with pytest.raises(ZeroDivisionError):
        train([0.0])
    assert path.read_bytes() == before


def test_a_training_that_goes_on_remembers_its_best(tmp_path: Path) -> None:
    trained(tmp_path, [0.3])
    trained(tmp_path, [0.3, 0.5, 0.4], resume=True)
    assert best_weight(tmp_path) == 1.0
    trained(tmp_path, [0.3, 0.5, 0.4, 0.2], resume=True)
    assert best_weight(tmp_path) == 4.0


def test_going_on_without_a_state_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no training state at .*state.pt to go on from; train without"):
        trained(tmp_path, [0.3], resume=True)


def test_training_stops_when_validation_gets_no_better(tmp_path: Path) -> None:
    assert trained(tmp_path, [0.5, 0.3, 0.4, 0.4, 0.1], patience=2).state.epoch == 4
    with pytest.raises(ValueError, match="patience is 0 epochs; expected at least 1"):
        trained(tmp_path, [0.5], patience=0)


def test_epochs_without_a_validation_do_not_use_up_patience(tmp_path: Path) -> None:
    """Validated in epochs 4, 8 and 12, of which the first is the best; patience 2 runs out at the second."""
    assert trained(tmp_path, [0.3] * 12, patience=2, interval=4).state.epoch == 8
    assert trained(tmp_path, [0.3] * 12, patience=5, interval=4).state.epoch == 12


def test_progress_in_a_log_tells_epoch_loss_and_what_is_left(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        trained(tmp_path, [0.5, 0.3])
    lines = [record.getMessage() for record in caplog.records if record.name == "trauma_monai.training"]
    assert len(lines) == 2
    assert lines[0].startswith("epoch 1/2, step 1/2: loss 0.0000, ")
    assert lines[0].endswith(" samples/s, 0 min left")


def test_an_error_in_training_is_not_swallowed_by_the_progress() -> None:
    def fail(engine: Engine, batch: int) -> None:
        raise RuntimeError("broken")

    engine = Engine(fail)
    TrainingProgress(1).attach(engine)
    with pytest.raises(RuntimeError, match="broken"):
        engine.run([0])
