"""Stage 6 of 6, its pictures: HU slices and organ masks -> greyscale JPEG and an outline layer over it.

The picture and its outlines are two layers, so that a reader can switch the outlines off and see the tissue.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage

from trauma_monai.targets import CODES_OF_ORGAN, ORGAN_CODES

__all__ = ["ABDOMINAL_WINDOW", "ORGAN_COLOURS", "Picture", "draw_coronal", "draw_slice"]

ABDOMINAL_WINDOW = (-150, 250)
"""HU shown black and white: level 50, width 400, the usual soft-tissue window of the abdomen."""

ORGAN_COLOURS = {"liver": "#e69f00", "spleen": "#d682b4", "kidney": "#56b4e9", "bowel": "#1fb58a"}
"""Okabe and Ito's colours, told apart under every common colour blindness; brightened for a dark picture.

Source: https://jfly.uni-koeln.de/color/
"""

BODY_HU = -300
"""Between air with clothes and blanket (below) and fat (above)."""

LONG_SIDE = 480
"""Pixels of a picture's longer side: sharp on a phone, and a report of ten stays far below 3 MB."""

CORONAL_SLAB_MM = 6.0
"""Thickness averaged in the coronal picture, against noise."""

OUTLINE_WIDTH = 1.6
"""Pixels."""


@dataclass(frozen=True)
class Picture:
    """A picture for a self-contained page.

    Attributes:
        uri: the greyscale JPEG as a ``data:`` address.
        outlines: the organ outlines as a transparent PNG of the same size, a ``data:`` address.
        width: pixels.
        height: pixels.
    """

    uri: str
    outlines: str
    width: int
    height: int


def draw_slice(image: np.ndarray, organs: np.ndarray, spacing_mm: tuple[float, float]) -> Picture:
    """Draw one axial slice as it is displayed, cropped to the body.

    Args:
        image: HU, shape (Y, X), rows from front to back.
        organs: codes of :data:`trauma_monai.targets.ORGAN_CODES`, same shape.
        spacing_mm: distance of neighbouring rows and of neighbouring columns.
    """
    rows, columns = body_box(image)
    return _draw(image[rows, columns], organs[rows, columns], spacing_mm)


def draw_coronal(image: np.ndarray, organs: np.ndarray, spacing_mm: tuple[float, float, float]) -> Picture:
    """Draw the coronal plane that shows most of the organs, head up.

    Args:
        image: HU, shape (Z, Y, X), slices from feet to head.
        organs: codes of :data:`trauma_monai.targets.ORGAN_CODES`, same shape.
        spacing_mm: distance of neighbouring slices, rows and columns.
    """
    row = _coronal_row(image, organs)
    half = max(0, round(CORONAL_SLAB_MM / spacing_mm[1] / 2))
    slab = image[:, max(0, row - half) : row + half + 1].astype(np.float32).mean(axis=1)[::-1]
    _, columns = body_box(slab)
    return _draw(slab[:, columns], organs[::-1, row, columns], (spacing_mm[0], spacing_mm[2]))


def body_box(image: np.ndarray) -> tuple[slice, slice]:
    """Return the rows and columns of ``image`` (HU, 2D) that hold tissue; all of them when none does."""
    body = image > BODY_HU
    box = []
    for axis in (1, 0):
        # A line with less than 2 % tissue is table or noise, not body.
        inside = np.flatnonzero(body.mean(axis=axis) > 0.02)
        box.append(slice(inside[0], inside[-1] + 1) if len(inside) else slice(None))
    return box[0], box[1]


def _coronal_row(image: np.ndarray, organs: np.ndarray) -> int:
    """Return the row with most solid organ, or else most bowel, or else most tissue."""
    areas = np.zeros((3, organs.shape[1]), dtype=np.int64)
    for plane, codes in zip(image, organs, strict=True):  # slice by slice: no boolean copy of the whole volume
        tissue = plane > BODY_HU  # a label in the air is an error
        solid = tissue & (codes > 0) & (codes != ORGAN_CODES["bowel"])
        areas += [solid.sum(axis=1), (tissue & (codes > 0)).sum(axis=1), tissue.sum(axis=1)]
    return int(next((area for area in areas if area.any()), areas[-1]).argmax())


def _draw(image: np.ndarray, organs: np.ndarray, spacing_mm: tuple[float, float]) -> Picture:
    height_mm, width_mm = (n * mm for n, mm in zip(image.shape, spacing_mm, strict=True))
    scale = LONG_SIDE / max(height_mm, width_mm)
    size = (max(1, round(width_mm * scale)), max(1, round(height_mm * scale)))
    low, high = ABDOMINAL_WINDOW
    grey = ((image.astype(np.float32) - low) / (high - low)).clip(0, 1) * 255
    picture = Image.fromarray(grey.astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    outlines = Image.fromarray(_outline_layer(organs, size))
    return Picture(_data_uri(picture, "JPEG", quality=82), _data_uri(outlines, "PNG", optimize=True), *size)


def _outline_layer(organs: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return RGBA pixels, shape (height, width, 4), with one smooth line around each organ."""
    layer = np.zeros((size[1], size[0], 4), dtype=np.uint8)
    for organ, codes in CODES_OF_ORGAN.items():
        mask = np.isin(organs, codes)
        if not mask.any():
            continue
        enlarged = Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BILINEAR)
        soft = ndimage.gaussian_filter(np.asarray(enlarged, dtype=np.float32) / 255, sigma=1.5)
        # The distance to the outline, in pixels, is that of the value to 0.5 over the slope.
        slope = np.hypot(*np.gradient(soft))
        distance = np.abs(soft - 0.5) / np.maximum(slope, 1e-3)
        alpha = (0.5 + OUTLINE_WIDTH / 2 - distance).clip(0, 1) * 255
        drawn = alpha > layer[..., 3]
        layer[drawn, :3] = [int(ORGAN_COLOURS[organ][i : i + 2], 16) for i in (1, 3, 5)]
        layer[drawn, 3] = alpha[drawn].astype(np.uint8)
    return layer


def _data_uri(picture: Image.Image, kind: str, **options: int | bool) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
