"""Stage 3 of 6: volume + organ masks -> 2.5D stack.

A series of any length becomes windows of a fixed number of slices; each window becomes groups of neighbouring
slices, the channels of a 2D encoder. Shape letters: Z, Y, X axes of the volume (feet to head, to posterior, to
patient left); W windows; L slices of a window; S slice groups; C slices (channels) of a group; L = S * C.

Source: 1st place, RSNA 2023 Abdominal Trauma Detection, https://github.com/Nischaydnk/RSNA-2023-1st-place-solution
(`make_our_data_volumes.py` and the Dataset of the training scripts).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, Randomizable, Transform
from torch.nn import functional

from trauma_monai.targets import CODES_OF_ORGAN, ORGANS

__all__ = [
    "CropToBoxd",
    "RandWarpStackd",
    "ResizeStackd",
    "SelectSlicesd",
    "StackSlicesd",
    "WindowSlicesd",
    "slice_windows",
]

UNKNOWN_CODE = 255
"""Marks a mask value that is not a segmentation code in the table of :func:`_merge_kidneys`."""


def slice_windows(
    num_slices: int, mode: str = "windows", length: int = 96, window: int = 100, max_slices: int = 400
) -> np.ndarray:
    """Choose the slices of each window of a series.

    Args:
        num_slices: number of slices of the series.
        mode: ``windows``: consecutive windows of ``window`` slices, plus one that ends with the last slice when
            they do not come out even; of each the first ``length`` slices are kept (the published code). A series
            shorter than one window is stretched to it by repeating slices.
            ``equidistant``: one window of ``length`` slices spread over the series (the published description).
        length: slices kept of each window, L.
        window: slices of a window before ``length`` of them are kept.
        max_slices: of a series longer than this, only every second slice is used.

    Returns:
        Slice indices, int64 of shape (W, L), ascending within a window.

    Raises:
        ValueError: for an unknown mode, an empty series, or ``length`` above ``window``.
    """
    if num_slices < 1:
        raise ValueError(f"a series of {num_slices} slices cannot be cut into windows; expected at least 1.")
    if mode == "equidistant":
        return np.rint(np.linspace(0, num_slices - 1, length)).astype(np.int64)[None]
    if mode != "windows":
        raise ValueError(f"unknown slice mode {mode!r}; expected 'windows' or 'equidistant'.")
    if not 1 <= length <= window:
        raise ValueError(f"length={length} slices cannot be kept of a window of {window}; raise the window.")
    slices = np.arange(0, num_slices, 2 if num_slices > max_slices else 1)
    if len(slices) < window:
        # The reference's expression, floating point included: 58 * 0.01 * 50 is 28.999..., which gives slice 28.
        slices = slices[(np.arange(0, 1, 1 / window)[:window] * len(slices)).astype(np.int64)]
    starts = list(range(0, len(slices) - window + 1, window))
    if len(slices) % window:
        starts.append(len(slices) - window)
    return np.stack([slices[start : start + length] for start in starts])


class SelectSlicesd(MapTransform):
    """Take the slices of the windows of a series, and the rows that belong to them.

    Indexing is the first time that the pixels of a memory-mapped volume are touched, so that only the selected
    slices are read. All windows are taken, or one where the sample names it (training draws single windows).

    Writes ``slice_index``, int64 of shape (W, L): where each slice came from in the volume.

    Args:
        keys: volumes of shape (1, Z, Y, X), all with the same Z; become (W, L, Y, X), plain tensors.
        mode: see :func:`slice_windows`.
        length: see :func:`slice_windows`.
        window: see :func:`slice_windows`.
        max_slices: see :func:`slice_windows`.
        head_first: take the slices from the last to the first, which lies at the feet. ``slice_index`` and the
            companions follow; the volume stays as it is.
        window_key: entry with the index of the one window to take; all are taken when the sample lacks it.
        companions: entries with one row per slice, (Z, k), cut alike to (W, L, k); those that a sample lacks
            (labels, at inference) are skipped.
        allow_missing_keys: skip a key that the sample lacks instead of failing.

    Raises:
        ValueError: when an entry has another number of slices than the first, or there is no such window.
    """

    def __init__(
        self,
        keys: KeysCollection,
        mode: str = "windows",
        length: int = 96,
        window: int = 100,
        max_slices: int = 400,
        head_first: bool = False,
        window_key: str = "window",
        companions: Sequence[str] = ("visibility", "frame_labels"),
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.mode = mode
        self.length = length
        self.window = window
        self.max_slices = max_slices
        self.head_first = head_first
        self.window_key = window_key
        self.companions = tuple(companions)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        sample = dict(data)
        num_slices = int(sample[self.first_key(sample)].shape[1])
        index = torch.from_numpy(slice_windows(num_slices, self.mode, self.length, self.window, self.max_slices))
        if self.head_first:
            index = num_slices - 1 - index
        if self.window_key in sample:
            chosen = int(sample[self.window_key])
            if not 0 <= chosen < len(index):
                raise ValueError(f"window {chosen} asked for, but {num_slices} slices give {len(index)} window(s).")
            index = index[chosen : chosen + 1]
        for key in self.key_iterator(sample):
            sample[key] = self._take(sample[key], index, num_slices, key, axis=1)[0]
        for key in self.companions:
            if key in sample:
                sample[key] = self._take(sample[key], index, num_slices, key, axis=0)
        sample["slice_index"] = index
        return sample

    def _take(self, values: Any, index: torch.Tensor, num_slices: int, key: Hashable, axis: int) -> torch.Tensor:
        """Replace axis ``axis`` (slices) by the axes (W, L) of ``index``."""
        tensor = values.as_tensor() if isinstance(values, MetaTensor) else torch.as_tensor(values)
        if tensor.shape[axis] != num_slices:
            raise ValueError(f"{key!r} has {tensor.shape[axis]} slices, expected {num_slices} as in {self.keys[0]!r}.")
        taken = tensor.index_select(axis, index.flatten())
        return taken.unflatten(axis, tuple(index.shape))


class WindowSlicesd(MapTransform):
    """Window HU slices and store them in 8 bit, with the reference's arithmetic.

    Values are clipped to ``window``, shifted and scaled to 0..1, multiplied by 255 and cut off (not rounded) to
    uint8, in double precision. A look-up table does this for integer input: same bytes, a tenth of the time.

    Args:
        keys: slices in HU, shape (..., Y, X), any number of leading axes; become uint8. A MetaTensor keeps its meta
            data.
        window: lowest and highest HU that are told apart, for instance (-150, 250) for soft tissue.
        per_slice_minmax: stretch each slice between its own lowest and highest clipped value, as all published
            systems do, instead of between the ends of the window. A constant slice becomes 0.
        allow_missing_keys: skip a key that the sample lacks instead of failing.

    Raises:
        ValueError: when the window is empty.
    """

    def __init__(
        self,
        keys: KeysCollection,
        window: Sequence[float] = (-150, 250),
        per_slice_minmax: bool = True,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.low, self.high = window
        if not self.low < self.high:
            raise ValueError(f"window {list(window)} is empty; expected two HU values, the lower one first.")
        self.per_slice_minmax = per_slice_minmax

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        sample = dict(data)
        for key in self.key_iterator(sample):
            sample[key] = self._window(sample[key])
        return sample

    def _window(self, image: Any) -> torch.Tensor:
        plain = image.as_tensor() if isinstance(image, MetaTensor) else torch.as_tensor(image)
        slices = plain.reshape(-1, *plain.shape[-2:]).numpy()
        values = self._look_up(slices) if slices.dtype == np.int16 else self._compute(slices)
        windowed = torch.from_numpy(values).reshape(plain.shape)
        if isinstance(image, MetaTensor):
            # A volume keeps its place in the patient, and what has to be undone to return to the file's grid.
            return MetaTensor(windowed, meta=image.meta, applied_operations=image.applied_operations)
        return windowed

    def _ends(self, values: np.ndarray) -> tuple[float, float]:
        """Values that become 0 and 255 in a slice."""
        if not self.per_slice_minmax:
            return self.low, self.high
        return float(np.clip(values.min(), self.low, self.high)), float(np.clip(values.max(), self.low, self.high))

    def _to_uint8(self, values: np.ndarray, low: float, high: float) -> np.ndarray:
        clipped = np.clip(values.astype(np.float64), self.low, self.high)
        if high == low:
            return np.zeros(values.shape, dtype=np.uint8)
        return (np.clip((clipped - low) / (high - low), 0.0, 1.0) * 255).astype(np.uint8)

    def _compute(self, slices: np.ndarray) -> np.ndarray:
        return np.stack([self._to_uint8(values, *self._ends(values)) for values in slices])

    def _look_up(self, slices: np.ndarray) -> np.ndarray:
        every_value = np.arange(2**16, dtype=np.uint16).view(np.int16)
        tables: dict[tuple[float, float], np.ndarray] = {}
        windowed = np.empty(slices.shape, dtype=np.uint8)
        for values, out in zip(slices, windowed, strict=True):
            ends = self._ends(values)
            if ends not in tables:
                tables[ends] = self._to_uint8(every_value, *ends)
            # Signed values address the table as unsigned ones, so that none is out of its range.
            np.take(tables[ends], values.view(np.uint16), out=out, mode="wrap")
        return windowed


class StackSlicesd(MapTransform):
    """Turn the slices of a window into groups of neighbouring slices, the channels of a 2D encoder.

    The label map and the companions keep the middle slice of each group: the one that a group is judged by.

    Args:
        keys: slices of shape (W, L, Y, X); become (W, S, C, Y, X).
        label_map_key: entry with the label map (W, L, Y, X); becomes (W, S, Y, X); skipped when missing.
        companions: entries with one row per slice, (W, L, ...); become (W, S, ...); skipped when missing.
        num_groups: slice groups of a window, S.
        channels: slices of a group, C.
        allow_missing_keys: skip a key that the sample lacks instead of failing.

    Raises:
        ValueError: when L is not S * C.
    """

    def __init__(
        self,
        keys: KeysCollection,
        label_map_key: str = "organs",
        companions: Sequence[str] = ("visibility", "frame_labels", "slice_index"),
        num_groups: int = 32,
        channels: int = 3,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.of_middle_slices = (label_map_key, *companions)
        self.num_groups = num_groups
        self.channels = channels

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        sample = dict(data)
        for key in self.key_iterator(sample):
            sample[key] = self._group(sample[key], key)
        for key in self.of_middle_slices:
            if key in sample:
                sample[key] = self._group(sample[key], key)[:, :, self.channels // 2]
        return sample

    def _group(self, values: torch.Tensor, key: Hashable) -> torch.Tensor:
        if values.shape[1] != self.num_groups * self.channels:
            raise ValueError(
                f"{key!r} has {values.shape[1]} slices per window, expected {self.num_groups} groups of "
                f"{self.channels}: let SelectSlicesd keep length = num_groups * channels slices."
            )
        return values.unflatten(1, (self.num_groups, self.channels))


class CropToBoxd(MapTransform):
    """Crop slices to a box, as a view: nothing is copied.

    Args:
        keys: entries of shape (..., Y, X).
        box_key: entry with the box (y1, y2, x1, x2) in pixels, upper ends exclusive.
        region: ``study`` crops to the box of the study's organs; ``none`` keeps the whole slice (bleeding may be
            anywhere).
        allow_missing_keys: skip a key that the sample lacks instead of failing.

    Raises:
        ValueError: for an unknown region, or a box that is empty or leaves the slice.
    """

    def __init__(
        self,
        keys: KeysCollection,
        box_key: str = "study_box",
        region: str = "study",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if region not in ("study", "none"):
            raise ValueError(f"unknown region {region!r}; expected 'study' or 'none'.")
        self.box_key = box_key
        self.region = region

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        sample = dict(data)
        if self.region == "none":
            return sample
        y1, y2, x1, x2 = (int(edge) for edge in sample[self.box_key])
        for key in self.key_iterator(sample):
            height, width = sample[key].shape[-2:]
            if not (0 <= y1 < y2 <= height and 0 <= x1 < x2 <= width):
                raise ValueError(
                    f"{self.box_key!r} is y {y1}:{y2}, x {x1}:{x2}; expected a box within the {height} x {width} "
                    f"pixels of {key!r}."
                )
            sample[key] = sample[key][..., y1:y2, x1:x2]
        return sample


class Warp(NamedTuple):
    """One random draw of :class:`RandWarpStackd`.

    Attributes:
        corners: what the four corners of the result show, as (x, y) from 0 to 1 across the source, clockwise from
            the upper left.
        flip_x: left and right are exchanged.
        flip_y: top and bottom are exchanged.
        angle_degrees: rotation of the picture, counter-clockwise as displayed.
    """

    corners: tuple[tuple[float, float], ...] = ((0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0))
    flip_x: bool = False
    flip_y: bool = False
    angle_degrees: float = 0.0


class ResizeStackd(Transform):
    """Resize a stack to the encoder's input: images linearly, label maps to the nearest pixel.

    The image becomes a fresh MetaTensor without the volume's meta data: its axes have no place in the patient.
    Codes of the label map become 0 background and 1.. in the order of :data:`trauma_monai.targets.ORGANS` (the two
    kidneys are one organ).

    Args:
        image_size: height and width of the result in pixels.
        image_key: uint8 stack (W, S, C, Y, X); becomes float32 (W, S, C, H, H), 0 to 1.
        organs_key: uint8 label map (W, S, Y, X) in the competition's codes; becomes (W, S, H, H); skipped when
            missing.

    Raises:
        ValueError: when the label map holds a value that is not a segmentation code.
    """

    def __init__(self, image_size: int, image_key: str = "image", organs_key: str = "organs") -> None:
        self.image_size = image_size
        self.image_key = image_key
        self.organs_key = organs_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        return self.resample(data, Warp())

    def resample(self, data: Mapping[Hashable, Any], warp: Warp) -> dict[Hashable, Any]:
        """Resize with a warp in the same step."""
        sample = dict(data)
        grid = _sampling_grid(warp, self.image_size)
        sample[self.image_key] = MetaTensor(_sample_linearly(sample[self.image_key], grid))
        if self.organs_key in sample:
            sample[self.organs_key] = _merge_kidneys(_sample_nearest(sample[self.organs_key], grid))
        return sample


class RandWarpStackd(Randomizable, Transform):
    """Training's :class:`ResizeStackd`: perspective, flips and rotation with the resize, in one resampling.

    One draw applies to all slices and the label map. The steps follow the published system, in its order: resize,
    perspective (corners move inwards, so that nothing has to be padded), left-right flip, up-down flip, rotation
    (what it uncovers is filled by reflection about the border pixels). There, each step resamples every slice;
    here, they are composed to one grid of source positions, which is faster and keeps the image sharper.

    Args:
        resize: the resize that this one stands in for.
        prob_perspective: how often the perspective changes.
        perspective: range of the standard deviation by which corners move, relative to the side.
        prob_flip_x: how often left and right are exchanged.
        prob_flip_y: how often top and bottom are exchanged.
        prob_rotate: how often the stack is rotated.
        max_angle_degrees: largest rotation to either side.

    Source:
        ReplayCompose of the published training scripts (albumentations 1.3): Resize, Perspective(p=0.5),
        HorizontalFlip(p=0.5), VerticalFlip(p=0.5), Rotate(limit=25, p=0.5).
    """

    def __init__(
        self,
        resize: ResizeStackd,
        prob_perspective: float = 0.5,
        perspective: Sequence[float] = (0.05, 0.1),
        prob_flip_x: float = 0.5,
        prob_flip_y: float = 0.5,
        prob_rotate: float = 0.5,
        max_angle_degrees: float = 25.0,
    ) -> None:
        self.resize = resize
        self.prob_perspective = prob_perspective
        self.lowest_perspective, self.highest_perspective = perspective
        self.prob_flip_x = prob_flip_x
        self.prob_flip_y = prob_flip_y
        self.prob_rotate = prob_rotate
        self.max_angle_degrees = max_angle_degrees
        self.warp = Warp()

    def randomize(self, data: Any = None) -> None:
        """Draw :attr:`warp`."""
        self.warp = Warp(
            corners=self._draw_corners() if self.R.random() < self.prob_perspective else Warp().corners,
            flip_x=bool(self.R.random() < self.prob_flip_x),
            flip_y=bool(self.R.random() < self.prob_flip_y),
            angle_degrees=self._draw_angle() if self.R.random() < self.prob_rotate else 0.0,
        )

    def _draw_corners(self) -> tuple[tuple[float, float], ...]:
        deviation = self.R.uniform(self.lowest_perspective, self.highest_perspective)
        inwards = np.abs(self.R.normal(0.0, deviation, size=(4, 2)))
        # At the middle of the side two corners would meet and the picture would fold.
        corners = np.abs(np.array(Warp().corners) - np.minimum(inwards, 0.45))
        return tuple((float(x), float(y)) for x, y in corners)

    def _draw_angle(self) -> float:
        return float(self.R.uniform(-self.max_angle_degrees, self.max_angle_degrees))

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        self.randomize()
        return self.resize.resample(data, self.warp)


def _homography(corners: Sequence[tuple[float, float]]) -> list[list[float]]:
    """The projective map that takes the corners of the unit square to ``corners``, as 3 x 3 numbers."""
    equations, values = [], []
    for (u, v), (x, y) in zip(Warp().corners, corners, strict=True):
        equations += [[u, v, 1, 0, 0, 0, -u * x, -v * x], [0, 0, 0, u, v, 1, -u * y, -v * y]]
        values += [x, y]
    return np.append(np.linalg.solve(np.array(equations), np.array(values)), 1.0).reshape(3, 3).tolist()


def _sampling_grid(warp: Warp, size: int) -> torch.Tensor:
    """Where each pixel of the result lies in the source: (size, size, 2), (x, y) from 0 to 1 across the source.

    Read from the result back to the source: undo the rotation, then the flips, then the perspective.
    """
    pixels = torch.arange(size, dtype=torch.float64)
    y, x = torch.meshgrid(pixels, pixels, indexing="ij")
    if warp.angle_degrees:
        x, y = (_reflect(p, size) for p in _rotate(x, y, warp.angle_degrees, (size - 1) / 2))
    x, y = (x + 0.5) / size, (y + 0.5) / size
    if warp.flip_y:
        y = 1 - y
    if warp.flip_x:
        x = 1 - x
    (a, b, c), (d, e, f), (g, h, i) = _homography(warp.corners)
    depth = g * x + h * y + i
    return torch.stack([(a * x + b * y + c) / depth, (d * x + e * y + f) / depth], dim=-1)


def _rotate(x: torch.Tensor, y: torch.Tensor, degrees: float, centre: float) -> tuple[torch.Tensor, torch.Tensor]:
    cosine, sine = float(np.cos(np.deg2rad(degrees))), float(np.sin(np.deg2rad(degrees)))
    x, y = x - centre, y - centre
    return cosine * x - sine * y + centre, sine * x + cosine * y + centre


def _reflect(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """Fold positions back at the border pixels, which are not repeated (OpenCV's BORDER_REFLECT_101)."""
    last = size - 1
    return last - ((pixels % (2 * last)) - last).abs()


def _sample_linearly(stack: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """Resample a uint8 stack (W, S, C, Y, X) to float32 0..1 (W, S, C, H, H)."""
    images = stack.flatten(0, 1)
    # A few images at a time, one per thread: their float copies stay in the cache, which halves the time.
    at_a_time = max(2, torch.get_num_threads())
    positions = (grid * 2 - 1).to(torch.float32).expand(at_a_time, *grid.shape)
    sampled = torch.empty(*images.shape[:2], *grid.shape[:2])
    for start in range(0, len(images), at_a_time):
        part = images[start : start + at_a_time].to(torch.float32)
        sampled[start : start + at_a_time] = functional.grid_sample(
            part, positions[: len(part)], mode="bilinear", padding_mode="border", align_corners=False
        )
    return sampled.div_(255).unflatten(0, stack.shape[:2])


def _sample_nearest(label_map: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """Resample a label map (W, S, Y, X) to (W, S, H, H)."""
    height, width = label_map.shape[-2:]
    columns = (grid[..., 0] * width).long().clamp_(0, width - 1)
    rows = (grid[..., 1] * height).long().clamp_(0, height - 1)
    # NumPy's take does in a sixth of the time what indexing a tensor with two tensors does.
    pixels = (rows * width + columns).flatten().numpy()
    sampled = np.take(label_map.flatten(0, 1).flatten(1).numpy(), pixels, axis=1)
    return torch.from_numpy(sampled).reshape(*label_map.shape[:2], *grid.shape[:2])


def _merge_kidneys(label_map: torch.Tensor) -> torch.Tensor:
    """Competition codes (left and right kidney apart) -> position of the organ in ORGANS, from 1."""
    table = np.full(256, UNKNOWN_CODE, dtype=np.uint8)
    table[0] = 0
    for position, organ in enumerate(ORGANS, start=1):
        table[list(CODES_OF_ORGAN[organ])] = position
    merged = np.take(table, label_map.numpy())
    if merged.max(initial=0) == UNKNOWN_CODE:
        unknown = sorted(set(np.unique(label_map.numpy()).tolist()) - set(np.flatnonzero(table != UNKNOWN_CODE)))
        raise ValueError(f"the organ masks hold the values {unknown}, expected only 0 to 5 (see ORGAN_CODES).")
    return torch.from_numpy(merged)
