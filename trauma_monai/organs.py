"""Stage 2 of 6: volume -> organ masks, visibility, crop.

The organ network looks at a small copy of the volume. Its answer, a label map in the competition's codes
(:data:`trauma_monai.targets.ORGAN_CODES`), goes back to the grid that the volume came in. From the label map follow
how much of each organ every slice shows, and the box that holds all organs.

Shape letters: Z, Y, X axes of the volume (slices, to posterior, to patient left); O organs; K organ codes (5).

Source: 1st place, RSNA 2023 Abdominal Trauma Detection, https://github.com/Nischaydnk/RSNA-2023-1st-place-solution
(`make_segmentation_data1.py`, `train_segmentation_model.py`, `make_info_data.py`).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine
from monai.bundle import ConfigParser
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.handlers import MeanDice, from_engine
from monai.losses import DiceCELoss
from monai.transforms import Compose, EnsureChannelFirstd, InvertibleTransform, LoadImaged, MapTransform, SaveImaged
from monai.utils import ImageMetaKey, MetaKeys, TraceKeys, convert_to_tensor, ensure_tuple_rep
from torch import nn
from torch.nn import functional

from trauma_monai.bundle_files import config_files
from trauma_monai.networks import load_weights
from trauma_monai.organ_masks import check_codes, check_same_grid
from trauma_monai.targets import CODES_OF_ORGAN, ORGAN_CODES

__all__ = [
    "CheckMaskd",
    "NameBySeriesd",
    "OrganDice",
    "OrganDiceCELoss",
    "OrganLabelMapd",
    "OrganSegmenter",
    "OrganVisibilityd",
    "ResizeSlicesd",
    "SegmentOrgansd",
]

SLICES_AT_ONCE = 32
"""Slices interpolated together: their float copies (32 MB at 512 x 512) stay near the processor's cache."""

MEASURED_SIZE = 128
"""Organ areas are measured on about this many pixels a side, as in the reference: a ratio needs no more."""


class CheckMaskd(MapTransform):
    """Refuse organ masks that are not of their image: a network would learn them all the same.

    Args:
        keys: masks as the reader gives them, shape (1, X, Y, Z), organ codes.
        image_key: the image; what the reader said of it is compared, whatever was done to it since.
        allow_missing_keys: skip a key that the sample lacks instead of failing.

    Raises:
        ValueError: when a mask has other voxels than the image, or holds other values than organ codes.
    """

    def __init__(
        self, keys: KeysCollection = "label", image_key: str = "image", allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.image_key = image_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        grids = (MetaKeys.SPATIAL_SHAPE, MetaKeys.ORIGINAL_AFFINE)
        sample = dict(data)
        image = [np.asarray(sample[self.image_key].meta[key]) for key in grids]
        for key in self.key_iterator(sample):
            mask = [np.asarray(sample[key].meta[name]) for name in grids]
            try:
                check_same_grid(mask[0].tolist(), mask[1], image[0].tolist(), image[1])
                check_codes(_plain(sample[key]).numpy())
            except ValueError as error:
                name = Path(str(sample[key].meta.get(ImageMetaKey.FILENAME_OR_OBJ, "its file"))).name
                raise ValueError(f"the mask {name} does not fit its image: {error}.") from error
        return sample


class ResizeSlicesd(MapTransform, InvertibleTransform):
    """Bring slices to one size and keep every n-th of them; the inverse restores the exact grid.

    The reference trains on every 2nd slice but applies the network to every slice. Here training and inference
    keep the same slices, and the inverse gives a slice that was left out the labels of a neighbour.

    The affine is updated: pixel centres, not corners, are mapped, so that nothing shifts in the patient.

    Args:
        keys: volumes of shape (1, Z, Y, X), any dtype, which is kept; become (1, ceil(Z / z_stride), size, size).
        size: pixels per side of a resized slice.
        z_stride: every how many slices one is kept, from the first on.
        mode: ``bilinear`` for images (rounded for integers) or ``nearest`` for label maps; one for all keys, or one
            each.
        allow_missing_keys: skip a key that the sample lacks instead of failing.

    Raises:
        ValueError: for an unknown mode, a stride or size below 1, or a volume that is not of shape (1, Z, Y, X).
    """

    def __init__(
        self,
        keys: KeysCollection,
        size: int,
        z_stride: int = 1,
        mode: str | Sequence[str] = "bilinear",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.mode = ensure_tuple_rep(mode, len(self.keys))
        if unknown := sorted(set(self.mode) - {"bilinear", "nearest"}):
            raise ValueError(f"unknown resize mode {unknown}; expected 'bilinear' or 'nearest'.")
        if size < 1 or z_stride < 1:
            raise ValueError(f"size={size} and z_stride={z_stride}; both must be at least 1.")
        self.size = size
        self.z_stride = z_stride

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        sample = dict(data)
        for key, mode in self.key_iterator(sample, self.mode):
            volume = convert_to_tensor(sample[key], track_meta=True)
            if volume.ndim != 4 or volume.shape[0] != 1:
                raise ValueError(
                    f"{key!r} has shape {tuple(volume.shape)}, expected (1, Z, Y, X): let EnsureChannelFirstd and "
                    "Orientationd run first."
                )
            sample[key] = self._resize(volume, mode)
        return sample

    def _resize(self, volume: MetaTensor, mode: str) -> MetaTensor:
        kept = volume.as_tensor()[:, :: self.z_stride]
        result = _like(_interpolate_slices(kept, self.size) if mode == "bilinear" else self._pick_nearest(kept), volume)
        original_size = tuple(volume.shape[1:])
        self.push_transform(
            result,
            orig_size=original_size,
            affine=self._new_to_old_index(original_size),
            extra_info={"affine": volume.affine.numpy()},
        )
        return result

    def _pick_nearest(self, volume: torch.Tensor) -> torch.Tensor:
        rows, columns = (_nearest_index(length, self.size) for length in volume.shape[-2:])
        return volume.index_select(2, rows.to(volume.device)).index_select(3, columns.to(volume.device))

    def _new_to_old_index(self, original_size: Sequence[int]) -> np.ndarray:
        """Where the centre of each new voxel lies on the old grid: 4 x 4 matrix for (z, y, x, 1)."""
        matrix = np.eye(4)
        matrix[0, 0] = self.z_stride
        for axis in (1, 2):
            factor = original_size[axis] / self.size
            matrix[axis, axis], matrix[axis, 3] = factor, (factor - 1) / 2
        return matrix

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        sample = dict(data)
        for key in self.key_iterator(sample):
            small: MetaTensor = sample[key]
            applied = self.pop_transform(small)
            depth, height, width = applied[TraceKeys.ORIG_SIZE]
            # A label map may be finer than the slices were, see OrganLabelMapd.
            per_kept = small.shape[1] // -(-depth // self.z_stride)
            # Each slice takes its nearest one (of two, the one before); after the last there is none.
            slices = (torch.arange(depth) * per_kept + (self.z_stride - 1) // 2) // self.z_stride
            slices = slices.clamp_(max=small.shape[1] - 1)
            rows, columns = _nearest_index(small.shape[2], height), _nearest_index(small.shape[3], width)
            # Slices last, so that the in-plane copies are made of the few slices only.
            full = small.as_tensor()
            for axis, index in ((2, rows), (3, columns), (1, slices)):
                full = full.index_select(axis, index.to(full.device))
            restored = _like(full, small)
            restored.affine = torch.as_tensor(applied[TraceKeys.EXTRA_INFO]["affine"])
            sample[key] = restored
        return sample


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_tensor() if isinstance(tensor, MetaTensor) else tensor


def _like(values: torch.Tensor, source: MetaTensor) -> MetaTensor:
    """Give values the meta data and the trace of transforms of their source, which an inversion needs."""
    return MetaTensor(values, meta=source.meta, applied_operations=source.applied_operations)


def _interpolate_slices(volume: torch.Tensor, size: int) -> torch.Tensor:
    """Resize (1, Z, Y, X) to (1, Z, size, size) linearly, a few slices at a time, in the volume's dtype."""
    resized = volume.new_empty((1, volume.shape[1], size, size))
    for start in range(0, volume.shape[1], SLICES_AT_ONCE):
        part = slice(start, start + SLICES_AT_ONCE)
        values = functional.interpolate(
            volume[:, part].to(torch.float32), size=(size, size), mode="bilinear", align_corners=False
        )
        resized[:, part] = values if volume.is_floating_point() else values.round_()
    return resized


def _nearest_index(old_length: int, new_length: int) -> torch.Tensor:
    """For each of ``new_length`` pixels along an axis, the old pixel under its centre; exact in integers.

    A centre on the border of two old pixels (all are, at even factors) takes the one behind it and the one before it
    in turn: always the same one would shift organs by half a pixel.
    """
    pixels = torch.arange(new_length)
    twice_centre = (2 * pixels + 1) * old_length
    on_border = twice_centre % (2 * new_length) == 0
    return twice_centre // (2 * new_length) - (on_border & (pixels % 2 == 1)).long()


class OrganLabelMapd(MapTransform):
    """Decide which organ each voxel belongs to: the likeliest, if its sigmoid is above one half.

    The network's voxels are several voxels of the scan wide. Its logits may be interpolated before the decision,
    which puts the organs' borders between its voxels, and gives slices that it did not see what lies between their
    neighbours. This goes a few slices at a time, so that only the decision, one byte a voxel, is ever held at the
    finer resolution; the inversion of :class:`ResizeSlicesd` takes a finer map as it is.

    Args:
        keys: logits of shape (5, Z, Y, X), channels in the order of :data:`trauma_monai.targets.ORGAN_CODES`; become
            a label map, uint8 of shape (1, Z * z_refine, Y * refine, X * refine), in the competition's codes, 0 where
            no organ is likely enough.
        refine: pixels of the label map per pixel of the logits and axis; 1 decides at the network's resolution, as
            the reference does.
        z_refine: slices of the label map per slice of the logits: the ``z_stride`` of :class:`ResizeSlicesd`, or 1.
        allow_missing_keys: skip a key that the sample lacks instead of failing.

    Raises:
        ValueError: when the number of channels is not 5, or ``refine`` or ``z_refine`` is below 1.
    """

    def __init__(
        self, keys: KeysCollection, refine: int = 1, z_refine: int = 1, allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if refine < 1 or z_refine < 1:
            raise ValueError(f"refine={refine} and z_refine={z_refine}; both must be at least 1.")
        self.refine = refine
        self.z_refine = z_refine

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        sample = dict(data)
        for key in self.key_iterator(sample):
            logits = sample[key]
            if logits.ndim != 4 or logits.shape[0] != len(ORGAN_CODES):
                raise ValueError(
                    f"{key!r} has shape {tuple(logits.shape)}, expected (5, Z, Y, X): one channel per code in "
                    f"{ORGAN_CODES}."
                )
            fine_slices = torch.arange(logits.shape[1] * self.z_refine, device=logits.device)
            parts = fine_slices.split(SLICES_AT_ONCE // 4)
            label_map = torch.cat([self._decide(_plain(logits), part) for part in parts], dim=1)
            sample[key] = _like(label_map, logits) if isinstance(logits, MetaTensor) else label_map
        return sample

    def _decide(self, logits: torch.Tensor, fine_slices: torch.Tensor) -> torch.Tensor:
        """Logits (5, Z, Y, X) -> some slices of the label map, (1, z, Y * refine, X * refine)."""
        below = torch.div(fine_slices, self.z_refine, rounding_mode="floor")
        above = (below + 1).clamp_(max=logits.shape[1] - 1)  # nothing follows the last slice
        share = (fine_slices % self.z_refine / self.z_refine).to(logits.dtype).view(-1, 1, 1)
        slices = torch.lerp(logits[:, below], logits[:, above], share)
        if self.refine > 1:
            slices = functional.interpolate(slices, scale_factor=self.refine, mode="bilinear", align_corners=False)
        codes = torch.tensor(list(ORGAN_CODES.values()), dtype=torch.uint8, device=logits.device)
        highest, channel = slices.max(dim=0, keepdim=True)
        return codes[channel].mul_(highest > 0)  # sigmoid(x) > 1/2 where x > 0


class OrganVisibilityd(MapTransform):
    """Measure how much of each organ every slice shows, and where in the slices the organs lie.

    Writes two entries. Visibility, float32 of shape (Z, O): area of the organ in the slice over its largest area in
    the series; 0 where the organ is absent (in the reference it is undefined there). Of an organ with several codes
    (the kidneys) the larger visibility counts. The box, int64 (y1, y2, x1, x2) in pixels, upper ends exclusive:
    bounds of all organs over all slices, the whole frame when there is no organ (there the reference fails). As in the
    reference it ends before the last measured row and column of the organs, unless there is but one.

    Args:
        keys: the label map, shape (1, Z, Y, X), in the competition's codes; may be memory-mapped, only every n-th row
            and column is read.
        organs: names of the O organs; see :data:`trauma_monai.targets.CODES_OF_ORGAN`.
        visibility_key: entry that receives the visibility.
        box_key: entry that receives the box.
        allow_missing_keys: skip a key that the sample lacks instead of failing.

    Raises:
        KeyError: for an unknown organ.
        ValueError: when the label map is not of shape (1, Z, Y, X).

    Source:
        `make_info_data.py` of the 1st place, where visibility is `<organ>_size` and the box `study_crop`.
    """

    def __init__(
        self,
        keys: KeysCollection = "organs",
        organs: Sequence[str] = tuple(CODES_OF_ORGAN),
        visibility_key: str = "visibility",
        box_key: str = "study_box",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if unknown := [organ for organ in organs if organ not in CODES_OF_ORGAN]:
            raise KeyError(f"unknown organs {unknown}; known: {', '.join(CODES_OF_ORGAN)}.")
        self.codes = [CODES_OF_ORGAN[organ] for organ in organs]
        self.visibility_key = visibility_key
        self.box_key = box_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        sample = dict(data)
        for key in self.key_iterator(sample):
            label_map = torch.as_tensor(sample[key])
            if label_map.ndim != 4 or label_map.shape[0] != 1:
                raise ValueError(f"{key!r} has shape {tuple(label_map.shape)}, expected (1, Z, Y, X).")
            height, width = label_map.shape[-2:]
            steps = max(1, height // MEASURED_SIZE), max(1, width // MEASURED_SIZE)
            measured = np.ascontiguousarray(_plain(label_map)[0, :, :: steps[0], :: steps[1]].numpy())
            sample[self.visibility_key] = self._visibility(measured)
            sample[self.box_key] = _bounding_box(measured > 0, steps, (height, width))
        return sample

    def _visibility(self, measured: np.ndarray) -> torch.Tensor:
        columns = []
        for codes in self.codes:
            areas = np.stack([np.count_nonzero(measured == code, axis=(1, 2)) for code in codes])  # codes, Z
            ratios = areas / np.maximum(areas.max(axis=1, keepdims=True), 1)
            columns.append(ratios.max(axis=0))
        return torch.from_numpy(np.stack(columns, axis=1).astype(np.float32))


def _bounding_box(present: np.ndarray, steps: tuple[int, int], frame: tuple[int, int]) -> torch.Tensor:
    """Bounds (y1, y2, x1, x2) of a mask (Z, y, x) that has every ``steps``-th pixel of a frame (Y, X)."""
    in_plane: np.ndarray = np.asarray(present.any(axis=0))
    if not in_plane.any():
        return torch.tensor([0, frame[0], 0, frame[1]])
    bounds: list[int] = []
    for axis, step, length in zip((0, 1), steps, frame, strict=True):
        filled = np.flatnonzero(np.asarray(in_plane.any(axis=1 - axis)))
        first, last = int(filled[0]), int(filled[-1])
        bounds += [first * step, last * step if last > first else min((last + 1) * step, length)]
    return torch.tensor(bounds)


class OrganDiceCELoss(nn.Module):
    """Dice and cross-entropy over organs that exclude each other, with a background that has no channel.

    The network has no background channel; here the logit of background is 0. The likeliest class is then background
    exactly where no organ's sigmoid exceeds one half: :class:`OrganLabelMapd` decides the same. It learns in about
    half the steps that the published multilabel Dice takes, which suits a demonstration.
    """

    def __init__(self) -> None:
        super().__init__()
        self.loss = DiceCELoss(softmax=True, to_onehot_y=True, batch=True)

    def forward(self, logits: torch.Tensor, label_map: torch.Tensor) -> torch.Tensor:
        """Compare logits with masks.

        Args:
            logits: shape (B, 5, Z, Y, X), channels in the order of :data:`trauma_monai.targets.ORGAN_CODES`.
            label_map: competition codes 0 to 5, shape (B, 1, Z, Y, X).

        Returns:
            The loss, a float32 scalar.
        """
        logits = logits.float()
        return self.loss(torch.cat([torch.zeros_like(logits[:, :1]), logits], dim=1), label_map)


class OrganDice(MeanDice):
    """Dice of each organ code between label maps, and their mean: the metric of validation and evaluation.

    ``engine.state.metrics`` gets the mean over organs and volumes under the name that the metric is attached by, and
    ``dice_liver``, ``dice_spleen``, ... per organ over volumes. An organ that a volume's label lacks does not count
    there (MONAI's convention), so that what a network imagines where there is nothing is not measured.

    Needs post-processed items whose ``pred`` and ``label`` are label maps (1, Z, Y, X) in the competition's codes.
    """

    def __init__(self) -> None:
        super().__init__(
            include_background=False,
            num_classes=1 + len(ORGAN_CODES),
            output_transform=from_engine(["pred", "label"]),
        )

    def completed(self, engine: Engine, name: str) -> None:
        """Write the mean and the organs' values into ``engine.state.metrics``."""
        super().completed(engine, name)
        state: Any = engine.state
        per_volume: torch.Tensor = state.metric_details[name]  # (volumes, organs)
        for organ, value in zip(ORGAN_CODES, torch.nanmean(per_volume, dim=0).tolist(), strict=True):
            state.metrics[f"dice_{organ}"] = value


class NameBySeriesd(MapTransform):
    """Name what is saved after its series, not after the first of its DICOM files.

    Args:
        keys: MetaTensors that will be saved.
        series_key: entry with the name; without it (MONAI Label, MONAI Deploy) nothing is renamed.
        allow_missing_keys: skip a key that the sample lacks instead of failing.
    """

    def __init__(self, keys: KeysCollection, series_key: str = "series_id", allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.series_key = series_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        sample = dict(data)
        if self.series_key in sample:
            for key in self.key_iterator(sample):
                # With an extension, or SaveImaged takes the last part of a UID for one and drops it.
                sample[key].meta[ImageMetaKey.FILENAME_OR_OBJ] = f"{sample[self.series_key]}.nii.gz"
        return sample


class OrganSegmenter:
    """The organ bundle as a function: volume in memory -> organ label map on the volume's grid.

    Everything comes from the bundle's inference config: network, preprocessing, inferer and post-processing; only
    loading and saving files are left out. So what is predicted here is what `monai.bundle run` predicts.

    Args:
        bundle_root: folder of the organ bundle, with configs/inference.yaml (or .json, in a packaged bundle).
        weights: state dict of ``network_def``; loaded strictly.
        variant: name of a file in configs/variants, the one that the weights were trained with; None for none.
        device: where the network runs; None lets the config choose.

    Raises:
        FileNotFoundError: when there is no such weights file.
        ValueError: when there is no such bundle or variant.
        RuntimeError: when the weights belong to another network (another variant, for instance).
    """

    def __init__(
        self,
        bundle_root: str | Path,
        weights: str | Path,
        variant: str | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        config = ConfigParser.load_config_files(config_files(Path(bundle_root), variant))
        parser = ConfigParser(config)
        overrides: dict[str, Any] = {"bundle_root": str(bundle_root)}
        if device is not None:
            overrides["device"] = str(device)
        parser.update(overrides)
        self.device = torch.device(parser.get_parsed_content("device"))
        self.network: nn.Module = parser.get_parsed_content("network")
        self.inferer = parser.get_parsed_content("inferer")
        self.preprocessing = _without_files(parser.get_parsed_content("preprocessing"))
        self.postprocessing = _without_files(parser.get_parsed_content("postprocessing"))
        load_weights(self.network, weights).eval()

    @torch.no_grad()
    def __call__(self, image: MetaTensor) -> MetaTensor:
        """Segment a volume.

        Args:
            image: HU, shape (1, Z, Y, X) or with its axes in any other order, as the affine says.

        Returns:
            Label map, uint8, of the same shape, with the affine of the image.

        Raises:
            TypeError: when the image has no affine (a plain tensor): left and right would be a guess.
        """
        if not isinstance(image, MetaTensor):
            raise TypeError(f"got a {type(image).__name__}, expected a MetaTensor: its affine says how the axes lie.")
        # A fresh trace: the post-processing undoes what this preprocessing does, not what came before.
        sample = self.preprocessing({"image": MetaTensor(image.as_tensor(), affine=image.affine)})
        sample["pred"] = self.inferer(sample["image"][None].to(self.device), self.network)[0].cpu()
        label_map = self.postprocessing(sample)["pred"]
        return MetaTensor(label_map.as_tensor().clone(), affine=image.affine)


def _without_files(transforms: Compose) -> Compose:
    """Leave out what reads and writes files; an image in memory has its channel axis already."""
    return Compose(
        [step for step in transforms.transforms if not isinstance(step, LoadImaged | EnsureChannelFirstd | SaveImaged)]
    )


class SegmentOrgansd(MapTransform):
    """Add organ masks to samples that have none; the network is built when the first such sample comes.

    Args:
        keys: the volume in HU, shape (1, Z, Y, X).
        bundle_root: see :class:`OrganSegmenter`.
        weights: see :class:`OrganSegmenter`; None for the bundle's own, models/model.pt.
        organs_key: entry that holds the label map, or receives it.
        variant: see :class:`OrganSegmenter`.
        device: see :class:`OrganSegmenter`.
        allow_missing_keys: skip a key that the sample lacks instead of failing.

    Raises:
        FileNotFoundError: when a sample has no organ masks and there are no weights.
    """

    def __init__(
        self,
        keys: KeysCollection = "image",
        bundle_root: str | Path = "bundles/organ_ct_segmentation",
        weights: str | Path | None = None,
        organs_key: str = "organs",
        variant: str | None = None,
        device: str | torch.device | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.bundle_root = bundle_root
        self.weights = weights
        self.organs_key = organs_key
        self.variant = variant
        self.device = device
        self._segmenter: OrganSegmenter | None = None

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        sample = dict(data)
        for key in self.key_iterator(sample):
            if self.organs_key not in sample:
                sample[self.organs_key] = self._segment(sample[key])
        return sample

    def _segment(self, image: MetaTensor) -> MetaTensor:
        if self._segmenter is None:
            weights = Path(self.weights or Path(self.bundle_root) / "models/model.pt")
            if not weights.is_file():
                raise FileNotFoundError(
                    f"the sample has no {self.organs_key!r} and there are no organ weights at {weights}: copy that "
                    "bundle's model.pt there, give other weights, or run `trauma-monai segment` first."
                )
            self._segmenter = OrganSegmenter(self.bundle_root, weights, self.variant, self.device)
        organs = self._segmenter(image)
        # Masks follow the image: what is undone for it later (its orientation) can be undone for them.
        organs.applied_operations = deepcopy(image.applied_operations)
        return organs
