"""One patient's abdomen, drawn at random: where everything lies, not yet how bright it is.

All positions are in mm in a frame of the patient's own: x to the left, y to the back, z to the head, x = y = 0 on the
axis of the trunk, z = 0 just above the hip joints. The crest of the hip bone is near z = 95, the kidneys near 195,
liver and spleen near 250, the domes of the diaphragm near 325.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from trauma_monai.phantom.shapes import BelowDomes, Ellipsoid, Inside, Shape, Trunk, Tube, Union, Without

VERTEBRA_HEIGHT = 34.0
"""Distance from one vertebra to the next in mm."""


@dataclass(frozen=True)
class Gut:
    """A piece of the digestive tract.

    Attributes:
        name: what it is.
        tube: its course and outer radius.
        wall: thickness of the wall in mm.
        gas: fraction of the lumen, from the front, that is gas.
        contents: "fluid" or "stool".
        injured: whether the wall is swollen by an injury.
    """

    name: str
    tube: Tube
    wall: float
    gas: float
    contents: str = "fluid"
    injured: bool = False


@dataclass(frozen=True)
class Anatomy:
    """Where the parts of one patient lie. The order of the fields is the order of drawing: later ones win.

    Attributes:
        body: skin surface.
        wall: outer surface of the muscle layer.
        cavity: inner surface of the muscle layer, abdomen and chest together.
        diaphragm: what lies below it is abdomen.
        rib_phase: z of one rib at the back, mm.
        heart: lower part of the heart.
        liver: without the vessels in it being spared.
        spleen: likewise.
        kidneys: left and right, the fat around the renal pelvis spared.
        sinuses: that fat, left and right.
        gallbladder: beneath the liver.
        bladder: in the pelvis.
        pancreas: in front of the spine.
        guts: oesophagus, stomach, duodenum, colon and small bowel.
        spine_y: how far the middle of the spine lies behind the axis, mm.
        spine_phase: z of one disc, mm.
        iliac: how far the blades of the hip bone lean outwards, mm per mm of height.
        aorta: and its two branches.
        cava: and its two branches.
        portal: portal vein, its branches in the liver, splenic and mesenteric vein.
        hepatic: veins of the liver.
        arteries: small arteries.
        mesentery: small vessels of the gut.
        warp: amplitude (mm), wave number (1/mm), phase of three smooth bends of space, (3, 4).
    """

    body: Trunk
    wall: Trunk
    cavity: Trunk
    diaphragm: BelowDomes
    rib_phase: float
    heart: Shape
    liver: Shape
    spleen: Shape
    kidneys: tuple[Shape, Shape]
    sinuses: tuple[Shape, Shape]
    gallbladder: Shape
    bladder: Shape
    pancreas: Shape
    guts: tuple[Gut, ...]
    spine_y: float
    spine_phase: float
    iliac: float
    aorta: tuple[Tube, ...]
    cava: tuple[Tube, ...]
    portal: tuple[Tube, ...]
    hepatic: tuple[Tube, ...]
    arteries: tuple[Tube, ...]
    mesentery: tuple[Tube, ...]
    warp: NDArray[np.float64]

    @property
    def organs(self) -> dict[str, tuple[Shape, ...]]:
        """The solid organs that carry a label; kidneys as (left, right)."""
        return {"liver": (self.liver,), "spleen": (self.spleen,), "kidney": self.kidneys}

    def with_guts(self, guts: Sequence[Gut]) -> Anatomy:
        """The same patient with other guts."""
        return replace(self, guts=tuple(guts))


class _Sizes:
    """Random numbers of one patient, and the patient's proportions applied to nominal positions."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        overall = rng.uniform(0.94, 1.06)
        self.scale = overall * np.array([rng.uniform(0.94, 1.08), rng.uniform(0.93, 1.08), rng.uniform(0.98, 1.03)])

    def around(self, value: float, spread: float) -> float:
        """A number within ``value`` +- ``spread``."""
        return float(value + self.rng.uniform(-spread, spread))

    def at(self, *position: float, spread: float = 3.0) -> NDArray[np.float64]:
        """A nominal position in this patient, moved by up to ``spread`` mm along each axis."""
        return np.array(position) * self.scale + self.rng.uniform(-spread, spread, 3)

    def radii(self, *nominal: float, spread: float = 0.08) -> NDArray[np.float64]:
        """Nominal radii in this patient, each changed by up to the fraction ``spread``."""
        return np.array(nominal) * self.scale * self.rng.uniform(1 - spread, 1 + spread, 3)


def random_anatomy(rng: np.random.Generator) -> Anatomy:
    """Draw a patient."""
    sizes = _Sizes(rng)
    sx, sy, _ = sizes.scale
    fat = rng.uniform(9, 36)
    cavity = Trunk(128 * sx, 80 * sy, -10 * sy)
    wall = Trunk(145 * sx, 103 * sy, -1 * sy)
    body = Trunk(145 * sx + 0.85 * fat, 103 * sy + 0.95 * fat, -1 * sy + 0.05 * fat, hips=0.09)
    right_top, left_top = sizes.at(-60, -15, 334, spread=6), sizes.at(62, -5, 320, spread=6)
    diaphragm = BelowDomes((tuple(right_top), tuple(left_top)), drop=sizes.around(75, 8), half_width=85 * sx)
    kidneys, sinuses, capsules = _kidneys(sizes)
    spine_y = sizes.around(36, 3) * sy
    abdomen = Inside(cavity, diaphragm, 2.0)
    liver = _liver(sizes, abdomen)
    for capsule in capsules:
        liver = Without(liver, capsule)
    stomach = _stomach(sizes)
    spleen = Without(Without(_spleen(sizes, abdomen), capsules[0]), stomach.tube, 3.0)
    liver = Without(liver, stomach.tube, 2.0)
    small_bowel = _small_bowel(sizes, cavity)
    aorta, cava, portal, hepatic, arteries = _vessels(sizes, spine_y)
    return Anatomy(
        body=body,
        wall=wall,
        cavity=cavity,
        diaphragm=diaphragm,
        rib_phase=rng.uniform(0, 32),
        heart=Without(Ellipsoid(sizes.at(22, -38, 360), sizes.radii(55, 42, 52), (0, 0, 20)), diaphragm),
        liver=liver,
        spleen=spleen,
        kidneys=kidneys,
        sinuses=sinuses,
        gallbladder=Ellipsoid(sizes.at(-44, -52, 186), sizes.radii(12, 12, 22), (25, 10, 0)),
        bladder=Ellipsoid(sizes.at(0, -25, 5), sizes.radii(38, 30, rng.uniform(22, 42))),
        pancreas=Tube(
            [sizes.at(-32, -4, 194), sizes.at(-8, -18, 208), sizes.at(22, -12, 220), sizes.at(70, 20, 240)],
            [12, 9, 9, 8],
        ),
        guts=(*small_bowel, *_duodenum(sizes), *_colon(sizes), stomach, _oesophagus(sizes)),
        spine_y=spine_y,
        spine_phase=rng.uniform(0, VERTEBRA_HEIGHT),
        iliac=sizes.around(0.55, 0.1),
        aorta=aorta,
        cava=cava,
        portal=portal,
        hepatic=hepatic,
        arteries=arteries,
        mesentery=_mesentery(sizes, [gut.tube for gut in small_bowel]),
        warp=np.column_stack(
            [rng.uniform(2, 5, 3), rng.uniform(0.012, 0.03, (3, 2)), rng.uniform(0, 2 * np.pi, 3)],
        ),
    )


def _liver(sizes: _Sizes, abdomen: Shape) -> Shape:
    right = Ellipsoid(sizes.at(-64, -4, 252), sizes.radii(74, 76, 88), (0, sizes.around(10, 6), 0))
    left = Ellipsoid(sizes.at(6, -46, 274), sizes.radii(76, 34, 44), (0, sizes.around(-14, 6), sizes.around(-12, 6)))
    lobes = Union(right, left, 25.0)
    # The hollow of the lower, inner surface, where gallbladder, duodenum and colon lie.
    hollow = Ellipsoid(sizes.at(-12, 14, 200), sizes.radii(52, 58, 62), (0, 25, 0))
    return Inside(Without(lobes, hollow), abdomen, 1.5)


def _spleen(sizes: _Sizes, abdomen: Shape) -> Shape:
    whole = Ellipsoid(
        sizes.at(91, 34, 256, spread=5), sizes.radii(42, 42, 60, spread=0.14), (sizes.around(-12, 6), 10, 20)
    )
    hollow = Ellipsoid(sizes.at(54, 6, 252), sizes.radii(33, 36, 58), (0, 8, 10))
    return Inside(Without(whole, hollow), abdomen, 1.5)


def _kidneys(sizes: _Sizes) -> tuple[tuple[Shape, Shape], tuple[Shape, Shape], tuple[Shape, Shape]]:
    """Kidneys without their sinus, the sinuses, and the fat capsules; each (left, right)."""
    kidneys, sinuses, capsules = [], [], []
    for side, height in ((1, 202), (-1, 192)):
        centre = sizes.at(side * 64, 40, height, spread=5)
        radii = sizes.radii(27, 25, 54)
        angles = (sizes.around(-8, 3), -side * sizes.around(10, 4), side * sizes.around(35, 8))
        whole = Ellipsoid(centre, radii, angles)
        hilum = centre + np.array([-side * 17, -12, 0])
        sinus = Ellipsoid(hilum, (15, 9.5, 24), angles)
        kidneys.append(Without(whole, sinus))
        sinuses.append(sinus)
        capsules.append(Ellipsoid(centre + np.array([0, 8, -3]), radii + np.array([5, 10, 1]), angles))
    return (kidneys[0], kidneys[1]), (sinuses[0], sinuses[1]), (capsules[0], capsules[1])


def _stomach(sizes: _Sizes) -> Gut:
    filled = sizes.rng.uniform(0.75, 1.1)
    points = [(54, 10, 296), (55, -10, 278), (52, -34, 252), (34, -50, 228), (6, -56, 214), (-22, -42, 212)]
    tube = Tube([sizes.at(*p) for p in points], np.array([26, 35, 32, 26, 19, 11]) * filled)
    return Gut("stomach", tube, 4.5, sizes.rng.uniform(0.15, 0.5))


def _oesophagus(sizes: _Sizes) -> Gut:
    return Gut("oesophagus", Tube([sizes.at(16, 2, 304), sizes.at(8, 12, 330), sizes.at(4, 14, 400)], 9), 4.0, 0.3)


def _duodenum(sizes: _Sizes) -> list[Gut]:
    points = [(-26, -38, 212), (-46, -8, 204), (-46, 2, 172), (-20, 2, 156), (22, -4, 160), (30, -18, 184)]
    return [Gut("duodenum", Tube([sizes.at(*p) for p in points], 12), 3.0, sizes.rng.uniform(0, 0.4))]


def _colon(sizes: _Sizes) -> list[Gut]:
    """Ascending, transverse, descending and sigmoid colon."""
    courses = (
        ([(-84, 6, 62), (-96, 8, 110), (-97, 12, 150), (-92, 6, 180)], 24),
        ([(-92, -2, 184), (-66, -46, 166), (-30, -66, 150), (10, -70, 146), (48, -62, 168), (84, -20, 214)], 19),
        ([(86, -10, 218), (98, 20, 196), (100, 22, 140), (94, 10, 80), (86, -2, 58)], 15),
        ([(86, -4, 56), (56, -18, 34), (30, -6, 46), (10, 22, 34), (0, 36, 12), (0, 40, -30)], 15),
    )
    guts = []
    for course, radius in courses:
        points = np.array([sizes.at(*p, spread=5) for p in course])
        fine = _refine(points, step=9)
        bulges = 1 + 0.17 * np.sin(np.arange(len(fine)) * 2 * np.pi / 3.2 + sizes.rng.uniform(0, 6))  # haustra
        radii = radius * sizes.rng.uniform(0.8, 1.15) * bulges
        guts.append(Gut("colon", Tube(fine, radii), 2.6, sizes.rng.uniform(0.1, 0.75), "stool"))
    return guts


def _small_bowel(sizes: _Sizes, cavity: Trunk) -> list[Gut]:
    """Short bent loops around the points of a jittered lattice."""
    rng = sizes.rng
    guts = []
    for z in range(22, 192, 29):
        for y in range(-68, 4, 29):
            for x in range(-70, 84, 33):
                transverse_colon = z > 130 and y < -50
                centre = sizes.at(x, y, z, spread=9)
                if rng.random() < 0.12 or transverse_colon or abs(x) + y > 75:
                    continue
                if float(cavity.distance(*centre.astype(np.float32))) > -12:
                    continue
                guts.append(Gut("small bowel", _loop(rng, centre), 2.2, rng.choice([0.0, 0.0, 0.0, 0.35, 0.6])))
    order = rng.permutation(len(guts))
    return [guts[i] for i in order]


def _loop(rng: np.random.Generator, centre: NDArray) -> Tube:
    first = rng.normal(size=3) * (1, 1, 0.6)
    first /= np.linalg.norm(first)
    second = np.cross(first, rng.normal(size=3))
    second /= np.linalg.norm(second)
    angles = np.linspace(0, rng.uniform(1.6, 3.6), 6)[:, None]
    arc = rng.uniform(14, 21) * (np.cos(angles) * first + np.sin(angles) * second)
    radius = rng.uniform(9.5, 13.5) * (1 + 0.08 * rng.normal(size=6))
    return Tube(centre + arc - arc.mean(axis=0), radius)


def _refine(points: NDArray, step: float) -> NDArray[np.float64]:
    """Points about ``step`` mm apart on the line through ``points``, corners rounded."""
    lengths = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))])
    at = np.linspace(0, lengths[-1], max(3, int(lengths[-1] / step)))
    fine = np.column_stack([np.interp(at, lengths, points[:, i]) for i in range(3)])
    for _ in range(2):
        fine[1:-1] = (fine[:-2] + 2 * fine[1:-1] + fine[2:]) / 4
    return fine


def _vessels(sizes: _Sizes, spine_y: float) -> tuple[tuple[Tube, ...], ...]:
    """Aorta, vena cava, portal system, hepatic veins, small arteries."""
    front = spine_y - 30
    width = sizes.rng.uniform(0.88, 1.12)
    fork = sizes.at(4, 0, 98)
    fork[1] = front
    aorta = Tube(
        [fork, (7, front + 1, 160), (9, front + 2, 230), (8, front + 8, 300), (6, front + 14, 420)], 9.5 * width
    )
    course = np.array([(0, 0, 0), (24, 12, -38), (48, 16, -75), (58, -20, -120)])
    iliacs = [Tube(fork + course * (side, 1, 1), 5.8 * width) for side in (-1, 1)]
    low = np.array([-12, front + 5, 88])
    cava = Tube(
        [low, (-20, front + 3, 160), (-22, front - 2, 220), (-22, front - 4, 285), (-14, front - 8, 350)], 11 * width
    )
    course = np.array([(0, 0, 0), (30, 22, -40), (58, 14, -85)])
    cava_iliacs = [Tube(low + course * (side, 1, 1), 6.2 * width) for side in (-1, 1)]
    heart = np.array([-20, front - 4, 306])
    hepatic = [
        Tube([heart, sizes.at(*middle), sizes.at(*end)], [5, 4, 2])
        for middle, end in (
            ((-55, 5, 286), (-95, 18, 252)),
            ((-45, -25, 284), (-70, -50, 246)),
            ((-5, -32, 294), (25, -48, 278)),
        )
    ]
    confluence, hilum = sizes.at(-6, -16, 206), sizes.at(-32, -12, 240)
    right, left = sizes.at(-60, -8, 248), sizes.at(0, -38, 262)
    portal = [
        Tube([confluence, hilum], 6.5),
        Tube([hilum, right, sizes.at(-92, -25, 262)], [6, 5, 2.5]),
        Tube([right, sizes.at(-85, 22, 225)], [4.5, 2.5]),
        Tube([right, sizes.at(-80, -28, 215)], [4.5, 2.5]),
        Tube([hilum, left, sizes.at(30, -48, 266)], [5, 4, 2.5]),
        Tube([confluence, sizes.at(30, -4, 222), sizes.at(74, 22, 240)], [5, 4.5, 4]),
        Tube([confluence, sizes.at(-10, -24, 165), sizes.at(-14, -30, 110)], [5.5, 4.5, 3]),
    ]
    arteries = [Tube([(7, front, 212), (4, front - 22, 200), (2, front - 24, 110)], [3.6, 3.4, 2.2])]
    arteries.append(Tube([(8, front, 222), (8, front - 18, 226), (-22, front - 14, 236)], [3.4, 3.2, 2.2]))
    arteries.extend(Tube([(7, front + 3, 203), (side * 44, 26, 200)], [3.2, 2.4]) for side in (-1, 1))
    veins = [Tube([(-18, front, 200), (46, 24, 203)], 4.4), Tube([(-20, front, 196), (-44, 27, 194)], 4.4)]
    return (aorta, *iliacs), (cava, *cava_iliacs, *veins), tuple(portal), tuple(hepatic), tuple(arteries)


def _mesentery(sizes: _Sizes, loops: list[Tube]) -> tuple[Tube, ...]:
    """Thin vessels from the root of the mesentery to each loop."""
    vessels = []
    for loop in loops:
        end = loop.points.mean(axis=0)
        root = sizes.at(-6, -14, float(np.clip(end[2] + 18, 80, 190)), spread=6)
        vessels.append(Tube([root, (root + end) / 2 + sizes.rng.uniform(-10, 10, 3), end], [2.6, 2.0, 1.5]))
    return tuple(vessels)
