"""Shapes that an anatomy is built from: each tells how far a point lies outside it, in mm.

Distances are approximate away from the surface; only their sign there and their scale near it matter.
Axes are the patient's: x to the left, y to the back, z to the head, in mm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Vector = Sequence[float] | NDArray[np.float64]
Bounds = tuple[NDArray[np.float64], NDArray[np.float64]]


class Shape(Protocol):
    """A region of the patient."""

    @property
    def bounds(self) -> Bounds:
        """Lowest and highest corner of a box around the shape, each (3,), mm."""

    def distance(self, x: Array, y: Array, z: Array) -> Array:
        """Distance from the surface in mm, negative inside; coordinates broadcast together."""


def rotation(angles: Vector) -> NDArray[np.float64]:
    """Turn about x, then y, then z by ``angles`` in degrees, as a matrix (3, 3)."""
    (cx, cy, cz), (sx, sy, sz) = np.cos(np.radians(angles)), np.sin(np.radians(angles))
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


class Ellipsoid:
    """An ellipsoid, optionally with a bumpy surface.

    Args:
        centre: mm, (3,).
        radii: half lengths of the axes in mm, (3,).
        angles: how it is turned, see :func:`rotation`.
        bump: height of the bumps in mm.
        bump_length: distance between bumps in mm.
    """

    def __init__(
        self,
        centre: Vector,
        radii: Vector,
        angles: Vector = (0.0, 0.0, 0.0),
        bump: float = 0.0,
        bump_length: float = 12.0,
    ) -> None:
        self.centre = np.asarray(centre, dtype=np.float64)
        self.radii = np.asarray(radii, dtype=np.float64)
        self.bump = bump
        self.bump_length = bump_length
        self._turn = rotation(angles)

    @property
    def bounds(self) -> Bounds:
        reach = np.sqrt(((self._turn * self.radii) ** 2).sum(axis=1)) + self.bump
        return self.centre - reach, self.centre + reach

    def distance(self, x: Array, y: Array, z: Array) -> Array:
        to_unit = (self._turn / self.radii).T.astype(np.float32)  # rows: the ellipsoid's axes over their radii
        dx, dy, dz = (axis - np.float32(c) for axis, c in zip((x, y, z), self.centre, strict=True))
        squared = sum((row[0] * dx + row[1] * dy + row[2] * dz) ** 2 for row in to_unit)
        out = (np.sqrt(squared) - 1) * np.float32(self.radii.min())
        if self.bump:
            wave = np.float32(2 * np.pi / self.bump_length)
            bumps = np.sin(wave * (dx + 0.6 * dz)) + np.sin(wave * (dy - 0.5 * dx)) + np.sin(wave * (dz + 0.4 * dy))
            out = out + np.float32(self.bump / 3) * bumps
        return out


class Tube:
    """A chain of round segments: vessels, gut.

    Args:
        points: centre line in mm, (N, 3), N >= 2.
        radii: radius at each point in mm, (N,) or one for all.
    """

    def __init__(self, points: Sequence[Vector] | NDArray[np.float64], radii: Vector | float) -> None:
        self.points = np.asarray(points, dtype=np.float64)
        self.radii = np.broadcast_to(np.asarray(radii, dtype=np.float64), (len(self.points),))

    @property
    def bounds(self) -> Bounds:
        reach = self.radii[:, None]
        return (self.points - reach).min(axis=0), (self.points + reach).max(axis=0)

    @property
    def segments(self) -> list[Tube]:
        """The tube cut at its points: far cheaper to draw one by one, each in its own small box."""
        return [Tube(self.points[i : i + 2], self.radii[i : i + 2]) for i in range(len(self.points) - 1)]

    def distance(self, x: Array, y: Array, z: Array) -> Array:
        if len(self.points) > 2:
            return np.minimum.reduce([segment.distance(x, y, z) for segment in self.segments])
        (ax, ay, az), along = self.points[0].astype(np.float32), np.diff(self.points, axis=0)[0]
        ux, uy, uz = (along / max(float(along @ along), 1e-6)).astype(np.float32)
        dx, dy, dz = x - ax, y - ay, z - az
        t = np.clip(dx * ux + dy * uy + dz * uz, 0, 1)
        lx, ly, lz = along.astype(np.float32)
        squared = (dx - t * lx) ** 2 + (dy - t * ly) ** 2 + (dz - t * lz) ** 2
        radius = np.float32(self.radii[0]) + t * np.float32(self.radii[1] - self.radii[0])
        return np.sqrt(squared) - radius


@dataclass(frozen=True)
class Trunk:
    """A tube along z with the cross-section of a torso, a rounded rectangle.

    Attributes:
        half_width: mm, at the waist.
        half_depth: mm, front to back.
        centre_y: mm.
        hips: how much wider it is at z = 0, as a fraction.
        chest: how much wider it is at z = 350 mm, as a fraction.
    """

    half_width: float
    half_depth: float
    centre_y: float = 0.0
    hips: float = 0.06
    chest: float = 0.03

    @property
    def bounds(self) -> Bounds:
        reach = np.array([self.half_width * 1.2, self.half_depth * 1.2, 1e4])
        centre = np.array([0, self.centre_y, 0])
        return centre - reach, centre + reach

    def distance(self, x: Array, y: Array, z: Array) -> Array:
        widening = 1 + self.hips * np.exp(-((z / 90) ** 2)) + self.chest * np.exp(-(((z - 350) / 90) ** 2))
        u = np.abs(x / (np.float32(self.half_width) * widening))
        v = np.abs((y - np.float32(self.centre_y)) / np.float32(self.half_depth))
        # |u|^2.5 + |v|^2.5 by square roots, which are several times faster than a power; 2.5 makes it first order.
        return (u * u * np.sqrt(u) + v * v * np.sqrt(v) - 1) * np.float32(min(self.half_width, self.half_depth) / 2.5)


@dataclass(frozen=True)
class Union:
    """Both shapes, melted together over ``blend`` mm."""

    first: Shape
    second: Shape
    blend: float = 1.0

    @property
    def bounds(self) -> Bounds:
        (a_low, a_high), (b_low, b_high) = self.first.bounds, self.second.bounds
        return np.minimum(a_low, b_low) - self.blend, np.maximum(a_high, b_high) + self.blend

    def distance(self, x: Array, y: Array, z: Array) -> Array:
        a, b = self.first.distance(x, y, z), self.second.distance(x, y, z)
        # Polynomial smooth minimum: https://iquilezles.org/articles/smin/
        mix = np.maximum(np.float32(self.blend) - np.abs(a - b), 0) / np.float32(self.blend)
        return np.minimum(a, b) - mix * mix * np.float32(self.blend / 4)


@dataclass(frozen=True)
class Inside:
    """The part of a shape that lies at least ``margin`` mm inside another."""

    shape: Shape
    limit: Shape
    margin: float = 0.0

    @property
    def bounds(self) -> Bounds:
        (a_low, a_high), (b_low, b_high) = self.shape.bounds, self.limit.bounds
        return np.maximum(a_low, b_low), np.minimum(a_high, b_high)

    def distance(self, x: Array, y: Array, z: Array) -> Array:
        return np.maximum(self.shape.distance(x, y, z), self.limit.distance(x, y, z) + np.float32(self.margin))


@dataclass(frozen=True)
class Without:
    """A shape less another one, grown by ``margin`` mm."""

    shape: Shape
    taken: Shape
    margin: float = 0.0

    @property
    def bounds(self) -> Bounds:
        return self.shape.bounds

    def distance(self, x: Array, y: Array, z: Array) -> Array:
        return np.maximum(self.shape.distance(x, y, z), np.float32(self.margin) - self.taken.distance(x, y, z))


@dataclass(frozen=True)
class BelowDomes:
    """Everything below the two domes of the diaphragm.

    Attributes:
        tops: highest point of the right and the left dome, mm, (2, 3).
        drop: how much lower it is at ``half_width`` to the side of a top (and at half_width to front or back), mm.
        half_width: mm.
    """

    tops: tuple[tuple[float, float, float], tuple[float, float, float]]
    drop: float = 75.0
    half_width: float = 85.0

    @property
    def bounds(self) -> Bounds:
        return np.full(3, -1e4), np.array([1e4, 1e4, max(top[2] for top in self.tops)])

    def distance(self, x: Array, y: Array, z: Array) -> Array:
        surfaces = []
        for top_x, top_y, top_z in self.tops:
            away = ((x - np.float32(top_x)) ** 2 + (y - np.float32(top_y)) ** 2) / np.float32(self.half_width**2)
            surfaces.append(np.float32(top_z) - np.float32(self.drop) * away)
        return (z - np.maximum(*surfaces)) * np.float32(0.7)  # the dome is oblique: less than the height difference
