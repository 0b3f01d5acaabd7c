"""What a training run needs beside MONAI's handlers: reproducible epochs, resuming, keeping the best, progress."""

from __future__ import annotations

import logging
import random
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint
from monai.data.utils import set_rnd
from monai.engines import Evaluator
from monai.handlers import from_engine
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.optim.lr_scheduler import LRScheduler

from trauma_monai.files import PART, complete_or_absent
from trauma_monai.networks import SliceSequenceNet, create_encoder

__all__ = [
    "EpochSeeds",
    "PretrainedEncoder",
    "SaveBest",
    "SaveLast",
    "StepWithOptimizer",
    "StopEarly",
    "StopWhenDiverged",
    "TrainingProgress",
    "TrainingState",
]


LOSS_OF = from_engine("loss", first=True)


class EpochSeeds:
    """Draw all randomness of an epoch from the numbers of the run, the process and the epoch alone.

    A training that was interrupted then goes on with the same windows, augmentation and dropout as one that was not,
    and no state of any random generator has to be kept. Worker processes that outlive an epoch keep generators of
    their own: the data loader must start them anew (``persistent_workers: false``).

    Args:
        seed: of the run.
        dataset: training data, whose random transforms are seeded.
        rank: of this process, so that parallel ones draw differently.
    """

    def __init__(self, seed: int, dataset: Any, rank: int = 0) -> None:
        self.seed = seed
        self.dataset = dataset
        self.rank = rank

    def attach(self, engine: Engine) -> None:
        """Seed when an epoch starts, before its data loader does."""
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Seed Python, NumPy, torch (all devices) and the transforms."""
        numbers = np.random.SeedSequence([self.seed, self.rank, engine.state.epoch]).generate_state(2)
        random.seed(int(numbers[0]))
        np.random.seed(numbers[0])  # noqa: NPY002 third-party transforms draw from the global generator
        torch.manual_seed(int(numbers[0]))
        set_rnd(self.dataset, seed=int(numbers[1]))


class StepWithOptimizer:
    """Step a learning rate schedule whenever its optimizer steps, not once per batch or epoch.

    With gradient accumulation an optimizer steps once in several batches; the published schedules count its steps.
    A step that mixed precision skips does not count.

    Args:
        lr_scheduler: the schedule.
    """

    def __init__(self, lr_scheduler: LRScheduler) -> None:
        self.lr_scheduler = lr_scheduler

    def attach(self, engine: Engine) -> None:
        """Follow the optimizer from the start of the engine's run to its end."""
        engine.add_event_handler(Events.STARTED, self._follow)

    def _follow(self, engine: Engine) -> None:
        handle = self.lr_scheduler.optimizer.register_step_post_hook(lambda *_: self.lr_scheduler.step())
        engine.add_event_handler(Events.COMPLETED, handle.remove)


class PretrainedEncoder:
    """Start a network's encoder from timm's published weights when training starts.

    Training does this, not the network: one that is built for deployment never downloads anything.

    Args:
        network: the network, as built.
        encoder: timm model name of its encoder.
        image_size: pixels that it was built for.
        channels: slices per group.

    Raises:
        RuntimeError: when training starts and the weights cannot be had.
    """

    def __init__(self, network: SliceSequenceNet, encoder: str, image_size: int, channels: int) -> None:
        self.network = network
        self.encoder = encoder
        self.image_size = image_size
        self.channels = channels

    def attach(self, engine: Engine) -> None:
        """Load when the trainer starts."""
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self) -> None:
        """Load the weights."""
        published = create_encoder(self.encoder, True, self.image_size, self.channels)
        self.network.encoder.load_state_dict(published.state_dict())


class TrainingState:
    """Save all that a training needs to go on after each epoch, and go on from it.

    The deployable weights of the bundle hold the network alone; this file also holds the optimizer, the schedule, the
    loss scaler of mixed precision, the count of epochs and the best validation so far. Random generators are not in
    it: see :class:`EpochSeeds`.

    Args:
        path: file of the state; replaced at once, so that an interruption leaves the last whole one.
        objects: name -> what has a ``state_dict``: training network, optimizer, schedule.
        evaluator: validates this training; what was its best must not be replaced by the first one after resuming.
        resume: go on from the file.
        save: write the file; in parallel training one process does.

    Raises:
        FileNotFoundError: when there is nothing to go on from.
    """

    def __init__(
        self,
        path: str | Path,
        objects: Mapping[str, Any],
        evaluator: Evaluator,
        resume: bool = False,
        save: bool = True,
    ) -> None:
        self.path = Path(path)
        self.objects = dict(objects)
        self.evaluator = evaluator
        self.save = save
        if resume and not self.path.is_file():
            raise FileNotFoundError(f"no training state at {self.path} to go on from; train without `resume` first.")
        self.resume = resume

    def attach(self, engine: Engine) -> None:
        """Load when the trainer starts, save when an epoch ends."""
        objects = {**self.objects, "trainer": engine}
        if (scaler := getattr(engine, "scaler", None)) is not None:
            objects["scaler"] = scaler
        if self.resume:
            engine.add_event_handler(Events.STARTED, self._load, engine, objects)
        if self.save:
            for leftover in self.path.parent.glob(f"{self.path.name}.*{PART}"):
                leftover.unlink()  # of a training that was killed while it saved
            engine.add_event_handler(Events.EPOCH_COMPLETED, self._save, objects)

    def _load(self, engine: Engine, objects: Mapping[str, Any]) -> None:
        max_epochs = engine.state.max_epochs
        saved = torch.load(self.path, map_location="cpu", weights_only=True)
        best = saved.pop("best")
        self.evaluator.state.best_metric, self.evaluator.state.best_metric_epoch = best["metric"], best["epoch"]
        Checkpoint.load_objects(dict(objects), saved)
        # The epochs of this run count, not those that the interrupted one was to take.
        engine.state.max_epochs = max_epochs

    def _save(self, objects: Mapping[str, Any]) -> None:
        best = {"metric": self.evaluator.state.best_metric, "epoch": self.evaluator.state.best_metric_epoch}
        save_whole({**{name: thing.state_dict() for name, thing in objects.items()}, "best": best}, self.path)


class SaveLast:
    """Save the weights of a network when an epoch ends; what fails before its first one ended replaces nothing.

    Args:
        path: file for the flat state dict; replaced at once.
        network: what is saved, the deployed network.
    """

    def __init__(self, path: str | Path, network: torch.nn.Module) -> None:
        self.path = Path(path)
        self.network = network

    def attach(self, engine: Engine) -> None:
        """Look when the engine's epoch ends."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Save."""
        save_whole(self.network.state_dict(), self.path)


class SaveBest(SaveLast):
    """Save the weights of a network whenever an evaluator, which it is attached to, meets its best metric so far.

    MONAI's `CheckpointSaver` forgets the best score of an interrupted training and replaces it by the first after
    resuming. This one asks the evaluator, which :class:`TrainingState` reminds of it.
    """

    def __call__(self, engine: Engine) -> None:
        """Save when this validation was the best."""
        if cast(Any, engine.state).best_metric_epoch == engine.state.epoch:
            super().__call__(engine)


class StopEarly:
    """End a training whose validation has not become better for some time.

    Args:
        evaluator: validates this training.
        patience: epochs without a better validation; those after the last validation do not count yet.
    """

    def __init__(self, evaluator: Evaluator, patience: int) -> None:
        if patience < 1:
            raise ValueError(f"patience is {patience} epochs; expected at least 1 (null trains all epochs).")
        self.evaluator = evaluator
        self.patience = patience

    def attach(self, engine: Engine) -> None:
        """Look when an epoch ends, after its validation."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Terminate the trainer when patience has run out."""
        best = self.evaluator.state.best_metric_epoch
        if best > 0 and self.evaluator.state.epoch - best >= self.patience:
            logging.getLogger(__name__).info(f"Stopped: no better validation than in epoch {best}.")
            engine.terminate()


class StopWhenDiverged:
    """Fail a training whose loss has not been finite for several steps in a row.

    One such step is no reason: mixed precision skips it and goes on with a smaller scale.

    Args:
        steps: in a row.

    Raises:
        RuntimeError: when the training has diverged; the state of the last whole epoch stays.
    """

    def __init__(self, steps: int = 5) -> None:
        self.steps = steps
        self._in_a_row = 0

    def attach(self, engine: Engine) -> None:
        """Look at the loss of every step."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Count the steps without a finite loss."""
        self._in_a_row = 0 if np.isfinite(float(LOSS_OF(engine.state.output))) else self._in_a_row + 1
        if self._in_a_row == self.steps:
            raise RuntimeError(
                f"the loss of the last {self.steps} steps is not finite (epoch {engine.state.epoch}): the training has "
                "diverged. Lower `lr`, or train without mixed precision (`amp: false`)."
            )


class TrainingProgress:
    """Show how far a training is: epoch, loss, throughput and the time that is left.

    A bar in a terminal; in a log file, a line at the end of an epoch and, within a long one, every now and then.

    Args:
        batch_size: samples per iteration of one process.
        log_seconds: between two lines of a log file within an epoch.
    """

    def __init__(self, batch_size: int, log_seconds: float = 60.0) -> None:
        self.batch_size = batch_size
        self.log_seconds = log_seconds
        self._started = self._logged = 0.0
        self._first = 0
        columns = (
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty())

    def attach(self, engine: Engine) -> None:
        """Follow the engine from start to end, whatever the end is."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._advance)
        for event in (Events.COMPLETED, Events.TERMINATE, Events.EXCEPTION_RAISED, Events.INTERRUPT):
            engine.add_event_handler(event, self._stop)

    def _start(self, engine: Engine) -> None:
        self._started = self._logged = time.monotonic()
        self._first = engine.state.iteration
        self._bar.add_task("training", total=None, epoch=engine.state.epoch, state="")
        self._bar.start()

    def _advance(self, engine: Engine) -> None:
        now, done = time.monotonic(), engine.state.iteration
        total = cast(int, engine.state.max_epochs) * cast(int, engine.state.epoch_length)
        seconds = (now - self._started) / (done - self._first)
        loss = float(LOSS_OF(engine.state.output))
        rate = self.batch_size * idist.get_world_size() / seconds
        state = f"loss {loss:.4f}, {rate:.1f} samples/s"
        epoch = f"{engine.state.epoch}/{engine.state.max_epochs}"
        self._bar.update(self._bar.task_ids[-1], completed=done, total=total, epoch=epoch, state=state)
        epoch_ends = done % cast(int, engine.state.epoch_length) == 0
        if self._bar.disable and (epoch_ends or now - self._logged >= self.log_seconds):
            self._logged = now
            minutes = (total - done) * seconds / 60
            logging.getLogger(__name__).info(f"epoch {epoch}, step {done}/{total}: {state}, {minutes:.0f} min left")

    def _stop(self, engine: Engine, *error: BaseException) -> None:
        self._bar.stop()
        for reason in error:  # ignite drops an exception that a handler does not raise again
            raise reason


def save_whole(content: Any, path: Path) -> None:
    """Save with torch; a reader finds the old file or the new one, never a part.

    Args:
        content: what `torch.save` takes.
        path: file to write or replace; its folder is made.
    """
    with complete_or_absent(path, "wb") as file:
        torch.save(content, file)
