"""Injuries of one phantom, drawn at random: which organs, how severe, where.

Sizes follow what a small network can still learn (see :data:`LACERATIONS`), prevalence is far above reality
(:data:`PREVALENCE`; in the competition 2 to 10 % per group).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from trauma_monai.phantom.anatomy import Anatomy
from trauma_monai.phantom.shapes import Ellipsoid, Inside, Shape, Tube

PREVALENCE = {"bowel": 0.35, "extravasation": 0.35, "kidney": 0.35, "liver": 0.38, "spleen": 0.38}
"""How often each group is injured; groups are drawn independently."""

LACERATIONS = {
    "liver": ((21.0, 25.0), (37.0, 44.0)),
    "spleen": ((14.0, 17.0), (24.0, 28.0)),
    "kidney": ((12.0, 14.5), (20.0, 24.0)),
}
"""Range of the mean radius in mm: low grade (one laceration), high grade (the largest of two or three)."""

LOWEST_BOWEL_INJURY = 45.0
"""In mm; lower down it could fall out of a series."""


@dataclass(frozen=True)
class Lesion:
    """One visible change.

    Attributes:
        group: injury that it belongs to, one of :data:`PREVALENCE`.
        kind: "laceration" (dark, within its organ), "haematoma" or "fluid" (in the fat around), "gas" (free in the
            abdomen) or "blush" (contrast that leaves a vessel).
        shape: where.
        organ: for a laceration, (organ name, index among the shapes of that organ).
    """

    group: str
    kind: str
    shape: Shape
    organ: tuple[str, int] | None = None


@dataclass(frozen=True)
class Injuries:
    """What one patient suffers from.

    Attributes:
        grades: group -> "healthy", "low", "high", or "injury" for bowel and extravasation.
        lesions: in the order of drawing.
    """

    grades: dict[str, str]
    lesions: tuple[Lesion, ...]

    @property
    def labels(self) -> dict[str, int]:
        """The columns of train.csv: one of each group is 1, and any_injury when one of them is not healthy."""
        classes = {"bowel": ("injury",), "extravasation": ("injury",)}
        row = {}
        for group, grade in self.grades.items():
            for name in ("healthy", *classes.get(group, ("low", "high"))):
                row[f"{group}_{name}"] = int(grade == name)
        row["any_injury"] = int(any(grade != "healthy" for grade in self.grades.values()))
        return row


def random_grades(rng: np.random.Generator) -> dict[str, str]:
    """Draw which groups are injured, each on its own; half of the injured organs are so severely."""
    grades = {}
    for group, prevalence in PREVALENCE.items():
        injured, severe = rng.random() < prevalence, rng.random() < 0.5
        name = "injury" if group in ("bowel", "extravasation") else ("high" if severe else "low")
        grades[group] = name if injured else "healthy"
    return grades


def injure(rng: np.random.Generator, anatomy: Anatomy, grades: dict[str, str]) -> tuple[Anatomy, Injuries]:
    """Draw injuries of these grades: returns the anatomy, whose bowel may be changed, and the injuries."""
    lesions: list[Lesion] = []
    for organ in LACERATIONS:
        if grades[organ] != "healthy":
            lesions += _lacerations(rng, anatomy, organ, high=grades[organ] == "high")
    if grades["bowel"] == "injury":
        anatomy, found = _bowel_injury(rng, anatomy)
        lesions += found
    if grades["extravasation"] == "injury":
        lesions += _extravasation(rng, anatomy)
    return anatomy, Injuries(grades, tuple(lesions))


def _points_inside(
    rng: np.random.Generator, shape: Shape, count: int, deepest: float, shallowest: float
) -> NDArray[np.float64]:
    """``count`` random points of ``shape``, between ``shallowest`` and ``deepest`` mm below its surface."""
    low, high = shape.bounds
    points = rng.uniform(low, high, (8000, 3))
    depth = -shape.distance(*points.T.astype(np.float32))
    # An organ thinner than asked for still has its deepest points.
    limit = min(shallowest, 0.7 * float(depth.max()))
    suitable = points[(depth >= limit) & (depth <= max(deepest, limit + 3))]
    return suitable[rng.integers(len(suitable), size=count)]


def _lacerations(rng: np.random.Generator, anatomy: Anatomy, organ: str, *, high: bool) -> list[Lesion]:
    shapes = anatomy.organs[organ]
    side = int(rng.integers(len(shapes)))
    shape = shapes[side]
    largest = rng.uniform(*LACERATIONS[organ][high])
    sizes = [largest]
    if high:
        sizes += list(largest * rng.uniform(0.5, 0.75, rng.integers(1, 3)))
    lesions = []
    for centre, size in zip(_points_inside(rng, shape, len(sizes), 1.3 * largest, 0.45 * largest), sizes, strict=True):
        radii = size * np.array([1.45, 0.8, 0.95]) * rng.uniform(0.9, 1.1, 3)
        angles = rng.uniform((-40, -40, 0), (40, 40, 180))
        tear = Ellipsoid(centre, radii, angles, bump=0.18 * size, bump_length=0.9 * size)
        lesions.append(Lesion(organ, "laceration", tear, (organ, side)))
        if high and size == largest:
            low_corner, high_corner = shape.bounds
            outward = centre - (low_corner + high_corner) / 2
            outward /= max(float(np.linalg.norm(outward)), 1.0)
            around = Ellipsoid(centre + 0.9 * size * outward, 1.3 * size * np.array([1.0, 1.0, 1.3]), bump=4)
            lesions.append(Lesion(organ, "haematoma", Inside(around, anatomy.cavity, 1.0)))
    return lesions


def _bowel_injury(rng: np.random.Generator, anatomy: Anatomy) -> tuple[Anatomy, list[Lesion]]:
    """Swollen loops, fluid between them and free gas in front."""
    middles = np.array([gut.tube.points.mean(axis=0) for gut in anatomy.guts])
    small = [i for i, gut in enumerate(anatomy.guts) if gut.name == "small bowel"]
    anchor = middles[rng.choice([i for i in small if middles[i][2] > LOWEST_BOWEL_INJURY])]
    nearest = sorted(small, key=lambda i: float(np.linalg.norm(middles[i] - anchor)))[:4]
    swollen = [
        replace(gut, tube=Tube(gut.tube.points, gut.tube.radii + 4.0), wall=8.0, gas=0.0, injured=True)
        for gut in (anatomy.guts[i] for i in nearest)
    ]
    guts = [gut for i, gut in enumerate(anatomy.guts) if i not in nearest] + swollen  # drawn last: seen whole
    fluid = Ellipsoid(anchor, rng.uniform(32, 40, 3) * (1.15, 1.0, 0.9), bump=6, bump_length=25)
    cavity = anatomy.cavity
    front = cavity.centre_y - cavity.half_depth
    lesions = [Lesion("bowel", "fluid", Inside(fluid, cavity, 1.0))]
    for _ in range(2):
        bubble_centre = (
            anchor[0] * 0.6 + rng.uniform(-25, 25),
            front + rng.uniform(4, 10),
            anchor[2] + rng.uniform(-12, 22),
        )
        bubble = Ellipsoid(bubble_centre, (rng.uniform(18, 30), rng.uniform(9, 13), rng.uniform(14, 22)), bump=2)
        lesions.append(Lesion("bowel", "gas", Inside(bubble, cavity, 1.0)))
    return anatomy.with_guts(guts), lesions


def _extravasation(rng: np.random.Generator, anatomy: Anatomy) -> list[Lesion]:
    """Contrast in a fresh haematoma, in the mesentery or behind the peritoneum."""
    sx, sy = anatomy.cavity.half_width / 128, anatomy.cavity.half_depth / 80
    nominal = np.array([(-50, -15, 130), (50, -15, 130), (70, -30, 190), (-60, 10, 80), (60, 10, 75), (25, -45, 100)])
    centre = (nominal[rng.integers(len(nominal))] + rng.uniform(-12, 12, 3)) * (sx, sy, 1)
    clot = Ellipsoid(centre, rng.uniform(30, 38, 3), bump=5, bump_length=22)
    lesions = [Lesion("extravasation", "haematoma", Inside(clot, anatomy.cavity, 1.0))]
    size = rng.uniform(14, 18)
    for offset, part in ((np.zeros(3), 1.0), (rng.normal(size=3) * 6, 0.7)):
        jet = Ellipsoid(centre + offset, size * part * rng.uniform(0.8, 1.25, 3), rng.uniform(0, 180, 3), 2.5, 11)
        lesions.append(Lesion("extravasation", "blush", jet))
    return lesions
