"""Training: from labels per study and lists of slices to one soft label per slice group.

Shape letters: Z slices of the series; W windows; S slice groups of a window; T targets; O organs; F frame targets.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform

from trauma_monai.targets import FRAME_TARGETS, ORGANS, TARGETS, get_target

__all__ = ["FrameLabelsd", "SoftSliceLabelsd", "StudyTruthd"]


class StudyTruthd(MapTransform):
    """Copy a study's labels into a vector that validation compares predictions with.

    Args:
        keys: entry with the labels, ``{target: 0 | 1}`` as in datalist.json; stays as it is.
        targets: the order of the vector; all eleven of :data:`trauma_monai.targets.TARGETS` unless given, which is
            what :class:`trauma_monai.TraumaScore` expects, whatever the network predicts.
        truth_key: entry to write: float32, shape (T,).
        allow_missing_keys: skip a key that the sample lacks instead of failing.

    Raises:
        KeyError: for an unknown target, and when the labels lack one.
        ValueError: for a label that is neither 0 nor 1.
    """

    def __init__(
        self,
        keys: KeysCollection = "label",
        targets: Sequence[str] = tuple(TARGETS),
        truth_key: str = "truth",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.targets = [get_target(name).name for name in targets]
        self.truth_key = truth_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        sample = dict(data)
        for key in self.key_iterator(sample):
            sample[self.truth_key] = torch.tensor(
                [_study_label(sample[key], name) for name in self.targets], dtype=torch.float32
            )
        return sample


class FrameLabelsd(MapTransform):
    """Turn lists of the slices that show an injury into one column per injury.

    Args:
        keys: entry with ``{frame target: [slice indices]}``, indices into the Z axis of the image; replaced by a
            float32 tensor (Z, F) of 0 and 1, columns in the order of :data:`trauma_monai.targets.FRAME_TARGETS`
            (bowel_injury, extravasation_injury). A series without the entry, and a target without a list, shows
            none: the competition lists positive slices only.
        image_key: entry with the whole volume, shape (1, Z, Y, X). Comes before slices are selected.

    Raises:
        KeyError: for a list under a name that is not a frame target.
        ValueError: for an index outside the volume.
    """

    def __init__(self, keys: KeysCollection = "frame_labels", image_key: str = "image") -> None:
        super().__init__(keys)
        self.image_key = image_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        sample = dict(data)
        num_slices = sample[self.image_key].shape[-3]
        for key in self.keys:
            sample[key] = _frame_columns(sample.get(key) or {}, num_slices)
        return sample


class SoftSliceLabelsd(MapTransform):
    """Spread study labels over slice groups by how much of the organ each group shows.

    "Liver injured" is known for the whole study, but a group of slices without liver holds no evidence of it. The
    label of a group is the study label times the visibility of the target's organ. Injuries that the competition
    marks slice by slice (bowel, extravasation) take that mark, alone or times the visibility of their organ.

    Args:
        keys: entry with the labels of the study, ``{target: 0 | 1}``; replaced by float32 (W, S, T), 0 to 1.
        targets: names of the T targets in output order; see :data:`trauma_monai.targets.TARGETS`.
        organs: names of the O organs, in the order of the visibility columns.
        visibility_key: entry of shape (W, S, O): organ area in the slice over the largest area of that organ in the
            series. A ratio, 0 to 1; 0 where the organ is absent.
        frame_key: entry of shape (W, S, F) from :class:`FrameLabelsd`.
        frame_targets_times_visibility: frame targets whose mark is multiplied by the visibility of their organ.
            The published systems differ: bowel is multiplied in the CoaT models only.
        allow_missing_keys: skip a key that the sample lacks instead of failing.

    Raises:
        KeyError: for an unknown target or a key that the sample lacks.
        ValueError: when a target's organ is not among ``organs``, a target in ``frame_targets_times_visibility`` is
            not marked by slice or has no organ, shapes do not fit, or a visibility lies outside 0 to 1 (areas in
            pixels passed in place of ratios).

    Source:
        1st place, RSNA 2023 Abdominal Trauma Detection, section "Data Preprocessing":
        https://www.kaggle.com/competitions/rsna-2023-abdominal-trauma-detection/discussion/447449, and the scripts
        of https://github.com/Nischaydnk/RSNA-2023-1st-place-solution for the order of the columns.
    """

    def __init__(
        self,
        keys: KeysCollection,
        targets: Sequence[str],
        organs: Sequence[str] = ORGANS,
        visibility_key: str = "visibility",
        frame_key: str = "frame_labels",
        frame_targets_times_visibility: Sequence[str] = (),
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.targets = [get_target(name) for name in targets]
        self.organs = list(organs)
        self.visibility_key = visibility_key
        self.frame_key = frame_key
        self.multiplied = list(frame_targets_times_visibility)
        for target in map(get_target, self.multiplied):
            if not target.frame_label or target.organ is None:
                raise ValueError(
                    f"{target.name} cannot be a frame label times visibility: it needs labels by slice and an organ."
                )
        by_organ = {t.organ for t in self.targets if t.organ and (not t.frame_label or t.name in self.multiplied)}
        if missing := sorted(by_organ - set(self.organs)):
            raise ValueError(f"targets need organs {missing}, but visibility covers {self.organs}.")

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        sample = dict(data)
        visibility = torch.as_tensor(sample[self.visibility_key], dtype=torch.float32)
        frames = torch.as_tensor(sample[self.frame_key], dtype=torch.float32)
        self._check(visibility, frames)
        for key in self.key_iterator(sample):
            labels = sample[key]
            columns = [self._column(name, labels, visibility, frames) for name in (t.name for t in self.targets)]
            sample[key] = torch.stack(columns, dim=-1)
        return sample

    def _column(
        self, name: str, labels: Mapping[str, Any], visibility: torch.Tensor, frames: torch.Tensor
    ) -> torch.Tensor:
        """Soft label of one target in each slice group, shape (W, S)."""
        target = get_target(name)
        if not target.frame_label:
            return _study_label(labels, name) * self._visible(target.organ, visibility)
        marked = frames[..., FRAME_TARGETS.index(name)]
        return marked * self._visible(target.organ, visibility) if name in self.multiplied else marked

    def _visible(self, organ: str | None, visibility: torch.Tensor) -> torch.Tensor:
        # What has no organ may be anywhere: every group of slices is evidence.
        return torch.ones(visibility.shape[:-1]) if organ is None else visibility[..., self.organs.index(organ)]

    def _check(self, visibility: torch.Tensor, frames: torch.Tensor) -> None:
        groups = visibility.shape[:-1]
        if visibility.shape[-1] != len(self.organs) or frames.shape != (*groups, len(FRAME_TARGETS)):
            raise ValueError(
                f"{self.visibility_key!r} has shape {tuple(visibility.shape)} and {self.frame_key!r} "
                f"{tuple(frames.shape)}; expected (W, S, {len(self.organs)}) and (W, S, {len(FRAME_TARGETS)})."
            )
        if visibility.numel() and not (visibility.min() >= 0 and visibility.max() <= 1):
            raise ValueError(
                f"{self.visibility_key!r} spans {visibility.min():g} to {visibility.max():g}, expected 0 to 1: "
                "divide each organ's area by its largest area in the series."
            )


def _study_label(labels: Mapping[str, Any], name: str) -> float:
    if name not in labels:
        raise KeyError(f"the study has no label {name!r}; it has {', '.join(map(str, labels)) or 'none'}.")
    label = float(labels[name])
    if label not in (0.0, 1.0):
        raise ValueError(f"label {name!r} of the study is {label:g}; expected 0 or 1.")
    return label


def _frame_columns(indices: Mapping[str, Sequence[int]], num_slices: int) -> torch.Tensor:
    if unknown := sorted(set(indices) - set(FRAME_TARGETS)):
        raise KeyError(f"frame labels for {unknown}; known: {', '.join(FRAME_TARGETS)}.")
    columns = torch.zeros(num_slices, len(FRAME_TARGETS))
    for column, name in enumerate(FRAME_TARGETS):
        rows = torch.as_tensor(indices.get(name, ()), dtype=torch.int64)
        if rows.numel() and not (rows.min() >= 0 and rows.max() < num_slices):
            raise ValueError(
                f"frame labels of {name} name slices {int(rows.min())} to {int(rows.max())} of a volume with "
                f"{num_slices} slices; expected 0 to {num_slices - 1}."
            )
        columns[rows, column] = 1
    return columns
