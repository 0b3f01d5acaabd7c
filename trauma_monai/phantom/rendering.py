"""From an anatomy to the voxels of one series: HU, organ codes, and the slices in which an injury is seen."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage

from trauma_monai.phantom.anatomy import VERTEBRA_HEIGHT, Anatomy, Gut
from trauma_monai.phantom.injuries import Injuries, Lesion
from trauma_monai.phantom.shapes import Array, Bounds, Shape, Tube, rotation
from trauma_monai.targets import ORGAN_CODES

Number = float | NDArray[np.floating]

AIR, LUNG, FAT, MUSCLE, FLUID, GAS = -1000.0, -850.0, -102.0, 58.0, 12.0, -960.0
CODES = {
    "liver": (ORGAN_CODES["liver"],),
    "spleen": (ORGAN_CODES["spleen"],),
    "kidney": (ORGAN_CODES["kidney_left"], ORGAN_CODES["kidney_right"]),
}
AORTA_NOT_FOUND = -1024.0
"""What the competition's table has where the measurement failed."""

MOTTLE_BLOCK = 80
"""Voxels along each side of the block of texture that is repeated."""

VISIBLE_AREA_MM2 = {"bowel": 200.0, "extravasation": 50.0}
"""A slice gets a frame label when the injury covers at least this much of it."""


@dataclass(frozen=True)
class Phase:
    """How bright contrast makes things, in HU.

    Attributes:
        name: "arterial" or "portal".
        aorta: lumen of aorta and arteries.
        cava: lumen of the vena cava and its tributaries.
        portal: lumen of the portal and hepatic veins.
        liver: parenchyma.
        spleen: parenchyma.
        cortex: outer kidney.
        medulla: inner kidney.
        gut_wall: mucosa.
        blush: contrast outside vessels.
    """

    name: str
    aorta: float
    cava: float
    portal: float
    liver: float
    spleen: float
    cortex: float
    medulla: float
    gut_wall: float
    blush: float


def random_phase(rng: np.random.Generator, name: str) -> Phase:
    """Draw the contrast of one series: an "arterial" one (about 30 s after injection) or a "portal" one (70 s)."""
    vary = rng.uniform(-1, 1, 9)
    middle, spread = {
        "arterial": (
            np.array([305, 95, 105, 90, 128, 195, 105, 92, 340]),
            np.array([45, 20, 15, 8, 10, 15, 15, 12, 20]),
        ),
        "portal": (np.array([152, 148, 168, 114, 124, 182, 172, 88, 270]), np.array([18, 12, 12, 8, 8, 15, 15, 8, 20])),
    }[name]
    return Phase(name, *(middle + spread * vary))


@dataclass(frozen=True)
class Grid:
    """Where the voxels of a series lie in the patient.

    Attributes:
        shape: slices, rows, columns.
        spacing: between slices, rows, columns, mm.
        middle: position of the middle of the lowest slice, (3,), mm.
        tilt: turn of the slices about the patient's axes in degrees, (3,).
    """

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    middle: tuple[float, float, float]
    tilt: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @property
    def affine(self) -> NDArray[np.float64]:
        """Column, row, slice index -> position (x left, y back, z head), 4x4."""
        out = np.eye(4)
        out[:3, :3] = rotation(self.tilt) * self.spacing[::-1]
        _, rows, columns = self.shape
        out[:3, 3] = np.array(self.middle) - out[:3, :3] @ ((columns - 1) / 2, (rows - 1) / 2, 0)
        return out

    def coordinates(self) -> list[Array]:
        """x, y, z of every voxel, each broadcastable to ``shape``: axes that do not matter have length one."""
        slices, rows, columns = self.shape
        indices = (
            np.arange(columns, dtype=np.float32)[None, None, :],
            np.arange(rows, dtype=np.float32)[None, :, None],
            np.arange(slices, dtype=np.float32)[:, None, None],
        )
        out = []
        for row in self.affine[:3].astype(np.float32):
            axis = row[3].reshape(1, 1, 1)
            for factor, index in zip(row[:3], indices, strict=True):
                if factor:
                    axis = axis + factor * index
            out.append(axis)
        return out


@dataclass(frozen=True)
class Rendering:
    """The voxels of one series.

    Attributes:
        hu: int16, (slices, rows, columns), slices from feet to head.
        organs: uint8 codes of the competition, same shape.
        frames: "bowel" and "extravasation" -> indices of the slices in which that injury is seen.
        aortic_hu: mean within the aorta before noise; :data:`AORTA_NOT_FOUND` when no voxel lies well inside.
        complete: whether liver, spleen and kidneys lie wholly inside the series.
    """

    hu: NDArray[np.int16]
    organs: NDArray[np.uint8]
    frames: dict[str, list[int]]
    aortic_hu: float
    complete: bool


def render(anatomy: Anatomy, injuries: Injuries, phase: Phase, grid: Grid, rng: np.random.Generator) -> Rendering:
    """Scan a patient."""
    canvas = _Canvas(anatomy, grid, rng)
    _draw_trunk(canvas, anatomy)
    _draw_organs(canvas, anatomy, phase)
    _draw_skeleton(canvas, anatomy)
    _draw_vessels(canvas, anatomy, phase)
    canvas.seen["bowel"] &= canvas.organs == ORGAN_CODES["bowel"]  # where nothing was drawn over it
    for lesion in injuries.lesions:
        _draw_lesion(canvas, lesion, phase)
    aorta = canvas.marked(anatomy.aorta[0], depth=3.0)
    _draw_table(canvas, anatomy)
    hu = _scan(canvas.hu, grid, rng)
    pixel_area = grid.spacing[1] * grid.spacing[2]
    frames = {
        group: [int(i) for i in np.flatnonzero(seen.sum(axis=(1, 2)) * pixel_area >= VISIBLE_AREA_MM2[group])]
        for group, seen in canvas.seen.items()
    }
    ends = canvas.organs[[0, -1]]
    return Rendering(
        hu=np.clip(np.rint(hu), -1024, 3071).astype(np.int16),
        organs=canvas.organs,
        frames=frames,
        aortic_hu=round(float(canvas.hu[aorta].mean()), 2) if aorta.any() else AORTA_NOT_FOUND,
        complete=not np.isin(ends, [code for codes in CODES.values() for code in codes]).any(),
    )


class _Canvas:
    """Volumes under construction, and the coordinates to draw by."""

    def __init__(self, anatomy: Anatomy, grid: Grid, rng: np.random.Generator) -> None:
        self.grid = grid
        self.hu = np.full(grid.shape, AIR, dtype=np.float32)
        self.organs = np.zeros(grid.shape, dtype=np.uint8)
        self.seen = {name: np.zeros(grid.shape, dtype=bool) for name in ("bowel", "extravasation")}
        x, y, z = grid.coordinates()
        bends = [
            np.float32(height) * np.sin(np.float32(k1) * a + np.float32(k2) * b + np.float32(phase))
            for (height, k1, k2, phase), (a, b) in zip(anatomy.warp, ((y, z), (x, z), (x, y)), strict=True)
        ]
        self.coordinates = [axis + bend for axis, bend in zip((x, y, z), bends, strict=True)]
        self._to_index = np.linalg.inv(grid.affine)
        self._margin = float(anatomy.warp[:, 0].max()) + 2.0
        # Soft mottle, standard deviation 1, grain about 8 mm; one block repeated, which nobody notices.
        block = rng.standard_normal(tuple(min(n, MOTTLE_BLOCK) for n in grid.shape), dtype=np.float32)
        block = ndimage.gaussian_filter(block, [3.0 / step for step in grid.spacing], mode="wrap")
        repeats = [-(-n // MOTTLE_BLOCK) for n in grid.shape]
        self.mottle = np.tile(block / block.std(), repeats)[tuple(slice(n) for n in grid.shape)]

    def box(self, bounds: Bounds) -> tuple[slice, slice, slice]:
        """Index ranges that hold everything between two corners."""
        low, high = (np.clip(corner, -2e3, 2e3) for corner in bounds)
        corners = np.array(np.meshgrid(*zip(low - self._margin, high + self._margin, strict=True))).reshape(3, -1)
        index = self._to_index[:3, :3] @ corners + self._to_index[:3, 3:]
        first, last = np.floor(index.min(axis=1)).astype(int), np.ceil(index.max(axis=1)).astype(int) + 1
        sizes = self.grid.shape[::-1]
        ranges = [slice(*np.clip((a, b), 0, n).tolist()) for a, b, n in zip(first, last, sizes, strict=True)]
        return ranges[2], ranges[1], ranges[0]

    def local(self, box: tuple[slice, slice, slice]) -> list[Array]:
        """Coordinates within a box."""
        return [
            axis[tuple(part if size > 1 else slice(None) for part, size in zip(box, axis.shape, strict=True))]
            for axis in self.coordinates
        ]

    def distance(self, shape: Shape) -> tuple[tuple[slice, slice, slice], Array]:
        """A box around a shape and the distance from it there."""
        box = self.box(shape.bounds)
        size = tuple(part.stop - part.start for part in box)
        if 0 in size:
            return box, np.ones(size, dtype=np.float32)
        if isinstance(shape, Tube):
            return box, self._tube_distance(shape, box, size)
        return box, np.broadcast_to(shape.distance(*self.local(box)), size)

    def _tube_distance(self, tube: Tube, box: tuple[slice, ...], size: tuple[int, ...]) -> Array:
        out = np.full(size, 99.0, dtype=np.float32)
        for segment in tube.segments:
            part = self.box(segment.bounds)
            if any(side.stop <= side.start for side in part):
                continue
            inner = tuple(slice(p.start - b.start, p.stop - b.start) for p, b in zip(part, box, strict=True))
            np.minimum(out[inner], segment.distance(*self.local(part)), out=out[inner])
        return out

    def fill(self, shape: Shape, hu: float, mottle: float = 0.0, code: int | None = None) -> None:
        """Draw a shape: brightness, its mottle, and the organ code when it has one (0 clears it)."""
        box, distance = self.distance(shape)
        inside = distance < 0
        self.hu[box][inside] = hu + mottle * self.mottle[box][inside]
        if code is not None:
            self.organs[box][inside] = code

    def marked(self, shape: Shape, depth: float = 0.0) -> NDArray[np.bool_]:
        """Voxels at least ``depth`` mm inside a shape."""
        out = np.zeros(self.grid.shape, dtype=bool)
        box, distance = self.distance(shape)
        out[box] = distance < -depth
        return out


def _draw_trunk(canvas: _Canvas, anatomy: Anatomy) -> None:
    """Skin, fat, muscle wall with ribs, the fat of the abdomen, the lungs."""
    x, y, z = canvas.coordinates
    body, wall, cavity = (shape.distance(x, y, z) for shape in (anatomy.body, anatomy.wall, anatomy.cavity))
    hu, mottle = canvas.hu, canvas.mottle
    within = body < 0
    hu[within] = FAT + 5 * mottle[within]
    hu[within & (body > -2.0)] = 5.0
    muscle = (wall < 0) & (cavity >= 0)
    hu[muscle] = MUSCLE + 7 * mottle[muscle]
    # The flank has three flat muscles with thin fat between them.
    layers = muscle & (np.abs(x) > 0.5 * anatomy.cavity.half_width) & (y < 0.35 * anatomy.cavity.half_depth)
    between = layers & ((np.abs(wall + 4.5) < 0.8) | (np.abs(wall + 9.5) < 0.8)) & (z < 230)
    hu[between] = -35.0
    midline = muscle & (np.abs(x) < 3) & (y < -0.5 * anatomy.cavity.half_depth) & (z < 260)
    hu[midline] = -30.0
    _draw_ribs(canvas, anatomy, muscle, cavity)
    inside = cavity < 0
    hu[inside] = FAT + 6 * mottle[inside]
    lung = inside & (anatomy.diaphragm.distance(x, y, z) > 1.5)
    hu[lung] = LUNG + 25 * mottle[lung]
    hu[lung & (mottle > 2.2)] = -100.0  # vessels


def _draw_ribs(canvas: _Canvas, anatomy: Anatomy, muscle: NDArray[np.bool_], cavity: Array) -> None:
    """Ribs slope down towards the front, end in cartilage, and the lower ones do not reach the front."""
    x, y, z = canvas.coordinates
    half_width, half_depth = np.float32(anatomy.cavity.half_width), np.float32(anatomy.cavity.half_depth)
    front = np.clip(-y / half_depth, -1, 1)  # 1 in front, -1 at the back
    height = z + 66 * front - np.float32(anatomy.rib_phase)
    along = np.abs(np.mod(height, 32) - 16)
    lowest = 170 + 72 * np.clip(front + 0.4, 0, 2)
    band = muscle & (np.abs(cavity - 5.0) < 4.2) & (along < 6.5) & (z > lowest) & (np.abs(x) > 0.18 * half_width)
    core = band & (np.abs(cavity - 5.0) < 2.2) & (along < 4.5)
    canvas.hu[band] = 430.0
    canvas.hu[core] = 180.0
    cartilage = band & (front > 0.72)
    canvas.hu[cartilage] = 110.0


def _draw_organs(canvas: _Canvas, anatomy: Anatomy, phase: Phase) -> None:
    canvas.fill(anatomy.heart, 0.5 * (phase.aorta + phase.cava), 12)
    canvas.fill(anatomy.bladder, 8.0, 2)
    for vessel in anatomy.mesentery:
        canvas.fill(vessel, 0.8 * phase.portal)
    for gut in anatomy.guts:
        _draw_gut(canvas, gut, phase)
    canvas.fill(anatomy.pancreas, 92.0, 12, code=0)
    canvas.fill(anatomy.liver, phase.liver, 5, code=CODES["liver"][0])
    canvas.fill(anatomy.gallbladder, FLUID - 4, 2, code=0)
    # An arterial spleen is striped: its two kinds of pulp fill at different speed.
    canvas.fill(anatomy.spleen, phase.spleen, 15 if phase.name == "arterial" else 5, code=CODES["spleen"][0])
    for kidney, sinus, code in zip(anatomy.kidneys, anatomy.sinuses, CODES["kidney"], strict=True):
        box, distance = canvas.distance(kidney)
        inside, medulla = distance < 0, distance < -7 + 3 * canvas.mottle[box]
        canvas.hu[box][inside] = phase.cortex
        canvas.hu[box][medulla] = phase.medulla
        canvas.organs[box][inside] = code
        canvas.fill(sinus, FAT + 25, 20, code=0)


def _draw_gut(canvas: _Canvas, gut: Gut, phase: Phase) -> None:
    box, distance = canvas.distance(gut.tube)
    inside = distance < 0
    if not inside.any():
        return
    hu, mottle = canvas.hu[box], canvas.mottle[box]
    hu[inside] = phase.gut_wall - 12 if gut.injured else phase.gut_wall
    canvas.organs[box][inside] = ORGAN_CODES["bowel"]
    lumen = distance < -gut.wall
    _, y, _ = canvas.local(box)
    y = np.broadcast_to(y, lumen.shape)
    stool = gut.contents == "stool"
    hu[lumen] = 20.0 + (35 if stool else 9) * mottle[lumen]
    if stool:
        hu[lumen & (mottle > 1.3)] = -350.0  # bubbles
    if gut.gas and lumen.any():
        # Gas rises to the front, section by section of the tube; the level is flat where the contents are fluid.
        middle = _middle_y(gut.tube, canvas, box)
        radius = float(gut.tube.radii.mean()) - gut.wall
        level = middle + radius * np.float32(2 * gut.gas - 1) + (3 * mottle if stool else 0)
        hu[lumen & (y < level)] = GAS
    if gut.injured:
        canvas.seen["bowel"][box] |= inside


def _middle_y(tube: Tube, canvas: _Canvas, box: tuple[slice, slice, slice]) -> Array | np.float32:
    """Depth y of the tube's centre line, by height for an upright tube and by x for a lying one; else its mean."""
    points = tube.points
    if len(points) < 7:
        return np.float32(points[:, 1].mean())
    x, _, z = canvas.local(box)
    axis = int(np.ptp(points[:, 2]) > np.ptp(points[:, 0]))
    at = points[:, 2] if axis else points[:, 0]
    order = np.argsort(at)
    return np.interp(z if axis else x, at[order], points[order, 1]).astype(np.float32)


class _Brush:
    """Draws bone and muscle around the spine: positions relative to the middle of the vertebral bodies.

    Args:
        canvas: what is drawn on.
        anatomy: where the spine is.
        half_width: how far to the sides it can reach, mm.
        lowest: lower end, mm.
        highest: upper end, mm.
    """

    def __init__(self, canvas: _Canvas, anatomy: Anatomy, half_width: float, lowest: float, highest: float) -> None:
        middle = anatomy.spine_y
        low, high = np.array([-half_width, middle - 85, lowest]), np.array([half_width, middle + 85, highest])
        self.box = canvas.box((low, high))
        self.x, y, self.z = canvas.local(self.box)
        self.y = y - np.float32(middle)
        self.side = np.abs(self.x)
        self.inside_wall = anatomy.wall.distance(self.x, y, self.z) < -3
        self._hu, self._organs, self._mottle = (
            volume[self.box] for volume in (canvas.hu, canvas.organs, canvas.mottle)
        )

    def ellipse(self, cx: Number, cy: Number, rx: Number, ry: Number) -> Array:
        """Squared distance from a centre on either side of the spine, in radii: below 1 is inside."""
        return ((self.side - cx) / rx) ** 2 + ((self.y - cy) / ry) ** 2

    def draw(self, where: NDArray[np.bool_], hu: float, mottle: float) -> None:
        """Set brightness; no organ is left there."""
        self._hu[where] = hu + mottle * self._mottle[where]
        self._organs[where] = 0


def _draw_skeleton(canvas: _Canvas, anatomy: Anatomy) -> None:
    """Spine and hip bones with the muscles along them."""
    _draw_pelvis(_Brush(canvas, anatomy, 130, -60, 100), anatomy)
    brush = _Brush(canvas, anatomy, 62, -60, 440)
    y, z, ellipse, draw = brush.y, brush.z, brush.ellipse, brush.draw
    psoas = 23 - 17 * np.clip((z - 40) / 200, 0, 1)
    draw((ellipse(21 + psoas * 0.72, 2, psoas * 0.85, psoas) < 1) & (z < 240), MUSCLE + 4, 7)
    back = ellipse(30, 42, 27, 18)
    draw((back < 1.22) & brush.inside_wall, -45.0, 15)  # fat between the back muscle and its neighbours
    draw((back < 1) & brush.inside_wall, MUSCLE, 14)
    draw(ellipse(0, 0, 25, 19) < 1, 25.0, 4)  # so that no fat shines through between the parts of the spine
    height = np.mod(z - np.float32(anatomy.spine_phase), VERTEBRA_HEIGHT)
    rim = (height < 10.5) | (height > VERTEBRA_HEIGHT - 2.5)
    body = ellipse(0, 0, 23, 17)
    draw(body < 1, 420.0, 30)
    draw((body < 0.8) & ~rim, 190.0, 40)
    draw((body < 0.98) & (height < 8), 85.0, 6)
    arch = (ellipse(0, 25, 15, 13) < 1) & (y > 14)
    spinous = (brush.side < 3.6) & (y > 36) & (y < 58) & (height > 6) & (height < 28)
    transverse = (np.abs(y - 24) < 3.5) & (brush.side < 37) & (height > 16) & (height < 26)
    facet = ellipse(17, 28, 7, 8) < 1
    draw(arch | facet | spinous | transverse, 330.0, 60)
    draw(ellipse(0, 25, 9.5, 8) < 1, 32.0, 4)


def _draw_pelvis(brush: _Brush, anatomy: Anatomy) -> None:
    """Sacrum, and the blades of the hip bone from the sacrum outwards and forwards between their muscles."""
    if 0 in brush.inside_wall.shape:
        return
    y, z, side, draw = brush.y, brush.z, brush.side, brush.draw
    t = np.clip((side - 40) / 72, 0, 1)
    crest = 95 - 45 * (t - 0.55) ** 2
    blade = (y - (34 - 92 * t**1.6 + np.float32(anatomy.iliac) * 0.25 * (z - 50))) / (1 + 1.2 * t)
    near = (side > 40) & brush.inside_wall & (z < crest + 8)
    draw(near & (blade > 0), MUSCLE, 10)
    draw(near & (blade > -11) & (z < crest - 6), MUSCLE, 8)
    wing = near & (side < 112) & (z < crest)
    draw(wing & (np.abs(blade) < 5.5), 430.0, 40)
    draw(wing & (np.abs(blade) < 3.0) & (z < crest - 4), 190.0, 50)
    draw((brush.ellipse(0, 10 + (75 - z) * 0.15, 48, 20) < 1) & (z < 62), 230.0, 60)


def _draw_vessels(canvas: _Canvas, anatomy: Anatomy, phase: Phase) -> None:
    for vessel in anatomy.hepatic:
        canvas.fill(vessel, phase.portal if phase.name == "portal" else 0.9 * phase.liver, 3)
    for vessel in anatomy.portal:
        canvas.fill(vessel, phase.portal, 3)
    for vessel in anatomy.cava:
        canvas.fill(vessel, phase.cava, 6, code=0)
    for vessel in anatomy.arteries:
        canvas.fill(vessel, 0.9 * phase.aorta, 3, code=0)
    for vessel in anatomy.aorta:
        canvas.fill(vessel, phase.aorta, 3, code=0)


def _draw_lesion(canvas: _Canvas, lesion: Lesion, phase: Phase) -> None:
    box, distance = canvas.distance(lesion.shape)
    where = distance < 0
    hu, organs, mottle = canvas.hu[box], canvas.organs[box], canvas.mottle[box]
    fat = (hu < -40) & (hu > -250) & (organs == 0)
    if lesion.kind == "laceration" and lesion.organ is not None:
        name, side = lesion.organ
        where = where & (organs == CODES[name][side])
        hu[where] = 26 + 8 * mottle[where]
    elif lesion.kind == "haematoma":
        # Bleeding from a vessel also pushes the gut aside.
        where = where & (fat | ((organs == ORGAN_CODES["bowel"]) & (lesion.group == "extravasation")))
        hu[where] = 56 + 7 * mottle[where]
        organs[where] = 0
    elif lesion.kind == "fluid":
        where = where & fat & (mottle > -1.4)
        hu[where] = 16 + 6 * mottle[where]
    elif lesion.kind == "gas":
        where = where & (organs != CODES["liver"][0])
        hu[where] = GAS
        organs[where] = 0
    elif lesion.kind == "blush":
        where = where & (hu > -250) & (hu < 200) & (organs == 0)
        hu[where] = phase.blush + 12 * mottle[where]
    if lesion.kind in ("fluid", "gas", "blush") and lesion.group in canvas.seen:
        canvas.seen[lesion.group][box] |= where


def _draw_table(canvas: _Canvas, anatomy: Anatomy) -> None:
    x, y, _ = canvas.grid.coordinates()
    top = np.float32(anatomy.body.centre_y + anatomy.body.half_depth + 4) - (x / 62) ** 2
    shell = (np.abs(y - top - 9) < 9) & (np.abs(x) < 205)
    skin = (np.abs(y - top - 1.2) < 1.2) & (np.abs(x) < 205)
    for where, value in ((shell, -935.0), (skin, -320.0)):
        where = np.broadcast_to(where, canvas.hu.shape) & (canvas.hu < -980)
        canvas.hu[where] = value


def _scan(hu: Array, grid: Grid, rng: np.random.Generator) -> Array:
    """What a scanner makes of the true brightness: finite sharpness and the grainy noise of back-projection."""
    _, rows, columns = grid.shape
    frequency = np.hypot(fft.fftfreq(rows)[:, None], fft.rfftfreq(columns)[None, :])
    sharpness = np.exp(-2 * (np.pi * 0.8 * frequency) ** 2).astype(np.float32)  # Gaussian of 0.8 pixels
    # Noise power: ramp filter times a soft kernel, so little at low frequencies.
    grain = ((frequency + 0.02) * np.exp(-((frequency / 0.28) ** 2))).astype(np.float32)
    grain *= rng.uniform(8, 14) * np.sqrt(rows * columns / np.mean(2 * grain**2))
    out = np.empty_like(hu)
    for index, plane in enumerate(hu):
        # A slice also sees a little of its neighbours.
        below, above = hu[max(index - 1, 0)], hu[min(index + 1, len(hu) - 1)]
        spectrum = fft.rfft2(0.84 * plane + 0.08 * (below + above)) * sharpness
        noise = rng.standard_normal((*frequency.shape, 2), dtype=np.float32).view(np.complex64)[..., 0]
        out[index] = fft.irfft2(spectrum + noise * grain, s=(rows, columns))
    radius = np.hypot(np.arange(rows)[:, None] - (rows - 1) / 2, np.arange(columns) - (columns - 1) / 2)
    out[:, radius > max(rows, columns) / 2] = AIR - 24  # the scanner reconstructs a circle
    return out
