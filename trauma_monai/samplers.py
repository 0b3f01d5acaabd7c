"""Training: which windows an epoch shows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import distributed
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler

__all__ = ["BalancedSampler"]


class BalancedSampler(DistributedSampler):
    """Show as many windows of patients without an injury as of injured ones.

    An epoch is every window of the injured patients once, and as many windows of the others, drawn with replacement
    and drawn anew for each epoch, all in random order. Where every patient is injured there is nothing to draw: the
    epoch is each window once.

    In parallel training every process draws the same epoch and takes its own share of it; shares have the same length,
    for which up to ``num_replicas - 1`` windows are shown twice. MONAI's engines call ``set_epoch`` by themselves.

    Args:
        dataset: a MONAI dataset of the windows, or the list of items itself. A window counts as injured when any entry
            of its ``label`` is 1.
        num_replicas: processes that share the epoch; those of torch.distributed by default, 1 where it is not in use.
        rank: this process; that of torch.distributed by default, 0 where it is not in use.
        seed: the same seed and epoch give the same windows in the same order.

    Raises:
        KeyError: when an item has no ``label``.
        ValueError: when no window is injured, or ``rank`` does not lie below ``num_replicas``.

    Source:
        1st place, RSNA 2023 Abdominal Trauma Detection, https://github.com/Nischaydnk/RSNA-2023-1st-place-solution
    """

    def __init__(
        self,
        dataset: Dataset | Sequence[Mapping[str, Any]],
        num_replicas: int | None = None,
        rank: int | None = None,
        seed: int = 0,
    ) -> None:
        in_parallel = distributed.is_available() and distributed.is_initialized()
        if num_replicas is None:
            num_replicas = distributed.get_world_size() if in_parallel else 1
        if rank is None:
            rank = distributed.get_rank() if in_parallel else 0
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=True, seed=seed)  # type: ignore[arg-type]
        # A MONAI dataset keeps its items, before any transform, in `data`.
        items = cast(Sequence[Mapping[str, Any]], getattr(dataset, "data", dataset))
        injured = torch.tensor([_is_injured(item) for item in items], dtype=torch.bool)
        if not injured.any():
            raise ValueError(
                f"none of {len(injured)} windows belongs to an injured patient, so there is nothing to balance; "
                "expected some with a label of 1. Take more patients or another fold."
            )
        self.injured_windows = injured.nonzero()[:, 0]
        self.other_windows = (~injured).nonzero()[:, 0]
        epoch_length = len(self.injured_windows) * (2 if len(self.other_windows) else 1)
        self.num_samples = math.ceil(epoch_length / self.num_replicas)
        self.total_size = self.num_samples * self.num_replicas

    def __iter__(self) -> Iterator[int]:
        # The same generator on every rank: the ranks must cut their shares out of one and the same epoch.
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        windows = self.injured_windows
        if len(self.other_windows):
            draw = torch.randint(len(self.other_windows), (len(windows),), generator=generator)
            windows = torch.cat([windows, self.other_windows[draw]])
        windows = windows[torch.randperm(len(windows), generator=generator)]
        # Wrap around to a multiple of the ranks; one window can be needed several times when there are many ranks.
        windows = windows[torch.arange(self.total_size) % len(windows)]
        return iter(windows[self.rank :: self.num_replicas].tolist())


def _is_injured(item: Mapping[str, Any]) -> bool:
    if "label" not in item:
        raise KeyError(f"an item has no 'label', which says whether its patient is injured; it has {sorted(item)}.")
    return any(value > 0 for value in item["label"].values())
