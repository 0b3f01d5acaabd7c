"""A training step of the slice network with its mask heads: our loop against the published one, restated."""

from __future__ import annotations

import copy
import resource
from collections.abc import Callable
from typing import Any

import torch
from monai.bundle import ConfigParser

from benchmarks.common import TRAUMA_BUNDLE, Row, Settings, compare, take_turns
from trauma_monai.memory import keep_freed_memory

ENCODERS = ("coat_lite_medium_384", "tf_efficientnetv2_s")
"""The two families of the twelve models."""

GROUPS_CPU, SIZE_CPU, ENCODERS_CPU = 8, 128, ("coat_lite_small", "tf_efficientnetv2_s")
"""A CPU would take minutes for a step at full size."""


def run(settings: Settings) -> list[Row]:
    """Compare the time of a step (forward, loss, backward, optimizer) and, on a GPU, its peak memory."""
    encoders = ENCODERS_CPU if settings.device.type == "cpu" else ENCODERS
    return [row for encoder in encoders for row in _network(encoder, settings)]


def _network(encoder: str, settings: Settings) -> list[Row]:
    parser = ConfigParser(ConfigParser.load_config_file(TRAUMA_BUNDLE / "configs/train.yaml"))
    parser["device"], parser["encoder"] = str(settings.device), encoder
    if settings.device.type == "cpu":
        parser["num_groups"], parser["image_size"] = GROUPS_CPU, SIZE_CPU
    torch.manual_seed(0)
    network, loss = parser.get_parsed_content("network"), parser.get_parsed_content("loss")
    published = copy.deepcopy(network).to(memory_format=torch.contiguous_format)
    batch = _batch(parser, settings.device)
    keep_freed_memory()  # as the config does when it starts; here both sides have it
    sides = {
        "trauma_monai": _step(network, parser.get_parsed_content("optimizer"), loss, batch),
        "published way": _step(published, torch.optim.AdamW(published.parameters(), lr=1e-4), loss, batch),
    }
    shape = " x ".join(map(str, batch["image"].shape))
    rows = compare("train", f"{encoder}, {shape}", take_turns(sides, settings), "s per step")
    return rows + _memory(encoder, sides, settings)


def _batch(parser: ConfigParser, device: torch.device) -> dict[str, torch.Tensor]:
    size, groups, windows = int(parser["image_size"]), int(parser["num_groups"]), int(parser["batch_size"])
    return {
        "image": torch.rand(windows, 1, groups, 3, size, size, device=device),
        "label": torch.rand(windows, 1, groups, len(parser["targets"]), device=device),
        "organs": torch.randint(0, 6, (windows, 1, groups, size, size), device=device, dtype=torch.uint8),
    }


def _step(
    network: torch.nn.Module, optimizer: torch.optim.Optimizer, loss: Any, batch: dict[str, torch.Tensor]
) -> Callable[[], None]:
    on_gpu = batch["image"].is_cuda
    scaler = torch.amp.GradScaler(enabled=on_gpu)
    target = {"label": batch["label"].flatten(0, 1), "organs": batch["organs"].flatten(0, 1)}

    def step() -> None:
        with torch.autocast(batch["image"].device.type, dtype=torch.float16, enabled=on_gpu):
            value = loss(network(batch["image"].flatten(0, 1)), target)
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return step


def _memory(encoder: str, sides: dict[str, Callable[[], None]], settings: Settings) -> list[Row]:
    if settings.device.type == "cpu":
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        return compare("train", "peak memory of the process so far", {"both sides": peak}, "GiB")
    peaks = {}
    for name, step in sides.items():
        torch.cuda.reset_peak_memory_stats(settings.device)
        step()
        peaks[name] = torch.cuda.max_memory_allocated(settings.device) / 2**30
    return compare("train", f"{encoder}, peak memory", peaks, "GiB")
