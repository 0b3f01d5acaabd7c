"""Run a slice network on studies made of several windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from monai.data import MetaTensor
from monai.inferers import Inferer

__all__ = ["StudyInferer"]


class StudyInferer(Inferer):
    """Give the windows of all studies to the network as one batch, and sort its answer by study again.

    Shapes: B studies, W windows, S slice groups, C channels, H x H pixels.

    Args:
        windows_per_batch: windows that the network sees at a time, which bounds memory: a study may have many. None
            for all at once, which is what training needs (one forward pass for one backward pass).

    Raises:
        ValueError: for a number of windows below 1.
    """

    def __init__(self, windows_per_batch: int | None = None) -> None:
        super().__init__()
        if windows_per_batch is not None and windows_per_batch < 1:
            raise ValueError(f"windows_per_batch is {windows_per_batch}; expected 1 or more, or None for all.")
        self.windows_per_batch = windows_per_batch

    def __call__(self, inputs: torch.Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the network.

        Args:
            inputs: stacks of shape (B, W, S, C, H, H).
            network: takes (N, S, C, H, H); returns tensors with N in front, alone or in tuples, lists and dicts.
            args: passed on to the network.
            kwargs: passed on to the network.

        Returns:
            What the network returns, each tensor (N, ...) as (B, W, ...).

        Raises:
            ValueError: when the input does not have six axes or holds no window.
        """
        if inputs.ndim != 6 or not inputs.shape[0] * inputs.shape[1]:
            raise ValueError(
                f"input has shape {tuple(inputs.shape)}; expected (studies, windows, slice groups, channels, height, "
                "width) with at least one window."
            )
        plain = inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
        windows = plain.flatten(0, 1)
        batches = windows.split(self.windows_per_batch or len(windows))
        outputs = [network(batch, *args, **kwargs) for batch in batches]
        return _join(outputs, inputs.shape[:2])


def _join(outputs: Sequence[Any], studies_windows: Sequence[int]) -> Any:
    """Concatenate the batches' outputs tensor by tensor and split their first axis into (B, W)."""
    first = outputs[0]
    if isinstance(first, torch.Tensor):
        return (torch.cat(list(outputs)) if len(outputs) > 1 else first).unflatten(0, tuple(studies_windows))
    if isinstance(first, dict):
        return {key: _join([output[key] for output in outputs], studies_windows) for key in first}
    if isinstance(first, tuple | list):
        return type(first)(_join(parts, studies_windows) for parts in zip(*outputs, strict=True))
    raise TypeError(f"the network returned a {type(first).__name__}; expected tensors, alone or in tuples or dicts.")
