"""Strict loading of saved weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

__all__ = ["check_weights", "describe", "load_weights", "read_tensors", "read_weights"]

Network = TypeVar("Network", bound=nn.Module)


def load_weights(network: Network, path: str | Path) -> Network:
    """Load a flat state dict into a network, every tensor of both accounted for.

    Args:
        network: the deployed network, e.g. a SliceSequenceNet or an InflatedUNet.
        path: a file that holds a state dict and nothing else; it is read without running code from it.

    Returns:
        The network, so that configs can go on with it.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is no state dict, or tensors are missing, left over or of another shape.
    """
    weights = read_weights(Path(path))
    check_weights(weights, network, str(path))
    network.load_state_dict(weights)
    return network


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read a flat state dict onto the CPU, without running code from the file.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is no state dict.
    """
    weights = read_tensors(path)
    if not isinstance(weights, Mapping) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise ValueError(f"{path} is not a flat state dict (name -> tensor).")
    return dict(weights)


def read_tensors(path: Path) -> Any:
    """Read whatever tensors and plain values a file holds, without running code from it.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it holds anything else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}: train the network, or copy its model.pt there.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load answers a damaged or foreign file with many types of error
        raise ValueError(
            f"{path} is damaged, or holds other things than tensors ({type(error).__name__}); expected what "
            "torch.save(network.state_dict(), file) writes."
        ) from error


def check_weights(weights: Mapping[str, torch.Tensor], network: nn.Module, source: str) -> None:
    """Compare the names and shapes of weights with a network's.

    Raises:
        ValueError: naming what is missing, left over, of another shape, or not finite: a training that has diverged.
    """
    expected = network.state_dict()
    problems = {
        "missing": [name for name in expected if name not in weights],
        "unexpected": [name for name in weights if name not in expected],
        "wrong shape": [
            f"{name} {tuple(weights[name].shape)}, expected {tuple(tensor.shape)}"
            for name, tensor in expected.items()
            if name in weights and weights[name].shape != tensor.shape
        ],
        "not finite": [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()],
    }
    found = [f"{problem}: {describe(names)}." for problem, names in problems.items() if names]
    if found:
        raise ValueError(
            f"{source} does not fit {type(network).__name__}. {' '.join(found)} Weights of a variant need its name."
        )


def describe(names: list[str], shown: int = 5) -> str:
    """List the first few names and count the rest."""
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{', '.join(names[:shown])}{rest}"
