"""Stage 6 of 6: what was found in a study -> report.html; all studies -> index.html.

Every page stands alone: no script, no font and no picture comes from elsewhere, so it can be mailed, archived and
printed. This module works out what the pages show, down to the geometry of the charts; templates/ holds the markup.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from trauma_monai.pictures import ORGAN_COLOURS
from trauma_monai.results import FINDINGS, ORGAN_TITLES, SUSPICIOUS, KeySlice, SeriesResult, StudyResult
from trauma_monai.targets import CODES_OF_ORGAN, GROUPS, ORGAN_CODES

__all__ = ["FACTS", "render_index", "render_report"]

GROUP_TITLES = {
    "liver": "Liver",
    "spleen": "Spleen",
    "kidney": "Kidneys",
    "bowel": "Bowel and mesentery",
    "extravasation": "Active extravasation",
}

SHORT_TITLES = {"bowel": "Bowel", "extravasation": "Bleeding"}
"""Where a title is too long for the margin of a picture."""

GROUP_COLOURS = {**ORGAN_COLOURS, "extravasation": "#d55e00"}

CLASS_TITLES = {"healthy": "no injury", "low": "low grade", "high": "high grade", "injury": "injury"}

NO_BREAK_SPACE = "\u00a0"

MAX_REJECTED = 50
"""Rows of the index's table; a folder may hold thousands of other files, which rejected.csv lists."""

FACTS = {
    "kVp": ("Tube voltage", "kVp"),
    "contrast_phase": ("Contrast phase", ""),
    "contrast_agent": ("Contrast agent", ""),
    "slice_thickness_mm": ("Slice thickness", "mm"),
    "kernel": ("Kernel", ""),
    "manufacturer": ("Manufacturer", ""),
    "model": ("Scanner", ""),
}
"""Entries of a series' facts that the report shows -> title, unit. A closed list keeps everything else out."""


def render_report(study: StudyResult) -> str:
    """Return the page of one study as self-contained HTML."""
    return _template("report.html.j2").render(
        study=study,
        any_injury=study.any_injury,
        groups=[_group_bars(study, group) for group in FINDINGS],
        series=[_series_view(series, number, study) for number, series in enumerate(study.series, start=1)],
        key_slices=_key_slice_views(study),
        model=[(name.replace("_", " "), value) for name, value in study.model.items()],
    )


def render_index(records: Sequence[tuple[str, Mapping[str, Any]]], rejected: Sequence[tuple[str, str]]) -> str:
    """Return the page that links the reports.

    Args:
        records: folder name and content of probabilities.json of each study.
        rejected: what was left out and why.
    """
    studies = [
        {
            "folder": folder,
            "record": record,
            "groups": [
                {
                    "title": title,
                    "colour": GROUP_COLOURS[group],
                    "value": None
                    if group in record["not_assessed"]
                    else 1 - record["probabilities"][f"{group}_healthy"],
                }
                for group, title in GROUP_TITLES.items()
            ],
        }
        for folder, record in records
    ]
    shown, hidden = rejected[:MAX_REJECTED], max(0, len(rejected) - MAX_REJECTED)
    studies.sort(key=lambda study: -(study["record"]["any_injury"] or 0))  # type: ignore[index]
    return _template("index.html.j2").render(
        studies=studies, titles=GROUP_TITLES.values(), rejected=shown, hidden=hidden
    )


def _template(name: str) -> Template:
    environment = Environment(
        loader=PackageLoader("trauma_monai"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = _percent
    environment.filters["number"] = lambda value: f"{value:.1f}".rstrip("0").rstrip(".")
    return environment.get_template(name)


def _percent(value: float) -> str:
    """Format a probability; never 0 % or 100 %, which a network cannot know."""
    text = "< 1" if value < 0.01 else "> 99" if value > 0.99 else f"{value * 100:.0f}"
    return f"{text} %".replace(" ", NO_BREAK_SPACE)


def _group_bars(study: StudyResult, group: str) -> dict[str, Any]:
    """Bars of one finding: the classes, and what the network itself said."""
    return {
        "title": GROUP_TITLES[group],
        "colour": GROUP_COLOURS[group],
        "assessed": group not in study.not_assessed,
        "classes": [
            (column.removeprefix(f"{group}_"), CLASS_TITLES[column.removeprefix(f"{group}_")], study.columns[column])
            for column in GROUPS[group]
        ],
        "outputs": [
            (CLASS_TITLES[name.removeprefix(f"{group}_")], value)
            for name, value in study.pooled.items()
            if name.startswith(f"{group}_")
        ],
    }


def _key_slice_views(study: StudyResult) -> list[dict[str, Any]]:
    """Key slices of all series, the most suspicious finding first; of each finding at most two."""
    found: dict[str, list[tuple[float, int, KeySlice]]] = {}
    for number, series in enumerate(study.series):
        for key in series.key_slices:
            found.setdefault(key.group, []).append((key.probability, number, key))
    views = []
    for entries in sorted(found.values(), key=lambda entries: -max(entry[0] for entry in entries)):
        best = sorted(entries, key=lambda entry: -entry[0])
        shown = best[:1] + [entry for entry in best[1:2] if entry[0] >= SUSPICIOUS]
        views += [_key_slice_view(study, number, key) for _, number, key in shown]
    return views


def _key_slice_view(study: StudyResult, number: int, key: KeySlice) -> dict[str, Any]:
    series = study.series[number]
    position = _position(series, key.row)
    title = GROUP_TITLES[key.group]
    return {
        "picture": key.picture,
        "title": title,
        "colour": GROUP_COLOURS[key.group],
        "probability": key.probability,
        "position": position,
        "series": number + 1 if len(study.series) > 1 else None,
        "alt": f"Axial CT slice, {position}, most suspicious for {title.lower()}, network output "
        f"{_percent(key.probability)}",
    }


def _position(series: SeriesResult, row: int) -> str:
    scores = series.scores
    text = f"slice {scores.z_index[row] + 1} of {series.shape[0]}"
    if scores.instance_number is not None:
        text += f", image no. {scores.instance_number[row]}"
    return f"{text}, z {scores.z_mm[row]:.0f} mm".replace("-", "−")  # noqa: RUF001


def _series_view(series: SeriesResult, number: int, study: StudyResult) -> dict[str, Any]:
    slices, rows, columns = series.shape
    dz, dy, dx = series.spacing_mm
    facts = [
        ("Slices", f"{slices}, {dz:.2f} mm apart ({slices * dz / 10:.0f} cm)"),
        ("Matrix", f"{columns} x {rows}, pixel {dx:.2f} x {dy:.2f} mm"),
    ]
    for key, (title, unit) in FACTS.items():
        value = series.facts.get(key)
        if value not in (None, ""):
            shown = f"{value:g}" if isinstance(value, float) else str(value)
            facts.append((title, f"{shown} {unit}".strip()))
    return {
        "number": number if len(study.series) > 1 else None,
        "uid": series.series_uid,
        "facts": facts,
        "organs_file": series.organs_file,
        "volumes": [
            (ORGAN_TITLES[name], _colour_of_code(name), series.volumes_ml.get(name), name in series.volumes_ml)
            for name in ORGAN_CODES
        ],
        "remarks": series.remarks,
        "coronal": _coronal_view(series),
        "panels": [_panel(series, group) for group in FINDINGS],
    }


def _colour_of_code(name: str) -> str:
    code = ORGAN_CODES[name]
    return next(ORGAN_COLOURS[organ] for organ, codes in CODES_OF_ORGAN.items() if code in codes)


# --- charts: geometry only, the template writes the SVG ---------------------------------------------------------------

PANEL = {"width": 360, "height": 178, "left": 48, "right": 16, "top": 14, "bottom": 40}
"""SVG units of a chart, which are pixels on a phone of 375."""

CORONAL_GUTTER = 114
"""SVG units right of the overview for the names of the marked slices; the whole is as wide as a chart."""

LABEL_HEIGHT = 17
"""SVG units between two of these names."""


def _panel(series: SeriesResult, group: str) -> dict[str, Any]:
    """Chart of one finding along z: network outputs over the visibility of its organ."""
    scores = series.scores
    last = max(series.shape[0] - 1, 1)
    width = PANEL["width"] - PANEL["left"] - PANEL["right"]
    height = PANEL["height"] - PANEL["top"] - PANEL["bottom"]

    def x_of(z_index: float) -> float:
        return round(PANEL["left"] + z_index / last * width, 1)

    def y_of(value: float) -> float:
        return round(PANEL["top"] + (1 - value) * height, 1)

    def points(values: np.ndarray) -> str:
        return " ".join(f"{x_of(z)},{y_of(v)}" for z, v in zip(scores.z_index, values, strict=True))

    curves = [
        {"kind": kind, "points": points(scores.probabilities[:, scores.targets.index(f"{group}_{kind}")])}
        for kind in ("low", "high", "injury")
        if f"{group}_{kind}" in scores.targets
    ]
    area = None
    if group in scores.organs:
        visible = scores.visibility[:, scores.organs.index(group)]
        area = f"{x_of(scores.z_index[0])},{y_of(0)} {points(visible)} {x_of(scores.z_index[-1])},{y_of(0)}"
    values = scores.of_group(group)
    peak = None
    if values is not None:
        row = int(values.argmax())
        x, y = x_of(scores.z_index[row]), y_of(values[row])
        # The label stands above the peak, clear of the frame on either side; at the top it stands beside.
        above = y > PANEL["top"] + 10
        side = "start" if x < PANEL["width"] / 2 else "end"
        near_frame = x < PANEL["left"] + 60 or x > PANEL["width"] - 90
        peak = {
            "x": x,
            "y": y,
            "text_x": x if above else x + (9 if side == "start" else -9),
            "text_y": y - 8 if above else y + 4,
            "anchor": side if near_frame or not above else "middle",
            "value": float(values[row]),
            "position": _position(series, row),
        }
    return {
        "title": GROUP_TITLES[group],
        "colour": GROUP_COLOURS[group],
        "curves": curves,
        "area": area,
        "peak": peak,
        "y_ticks": [(y_of(value), f"{value * 100:.0f} %") for value in (0, 0.5, 1)],
        "x_ticks": [
            (x_of(z), z + 1, f"{np.interp(z, *_z_line(series)):.0f}".replace("-", "−"))  # noqa: RUF001
            for z in _ticks(last)
        ],
        "frame": PANEL,
    }


def _z_line(series: SeriesResult) -> tuple[list[float], list[float]]:
    """Two points of the line from slice index to z in mm: slices are equally spaced."""
    z0 = float(series.scores.z_mm[0]) - float(series.scores.z_index[0]) * series.spacing_mm[0]
    last = max(series.shape[0] - 1, 1)
    return [0.0, float(last)], [z0, z0 + last * series.spacing_mm[0]]


def _ticks(last: int) -> list[int]:
    """Return 4 to 6 slice indices with round slice numbers, from 0 on."""
    step = next(step for step in (1, 2, 5, 10, 20, 25, 50, 100, 200, 250, 500, 1000, 10**9) if last / step <= 5)
    return [0, *(number - 1 for number in range(step, last + 2, step) if number - 1 > step / 2)]


def _coronal_view(series: SeriesResult) -> dict[str, Any]:
    """The overview with one line per finding at its most suspicious slice; names are spread so that none overlap."""
    picture, scores = series.coronal, series.scores
    width = PANEL["width"] - CORONAL_GUTTER
    height = round(width * picture.height / picture.width, 1)
    marks: list[dict[str, Any]] = []
    for group in FINDINGS:
        values = scores.of_group(group)
        if values is not None:
            row = int(values.argmax())
            y = (1 - (scores.z_index[row] + 0.5) / series.shape[0]) * height
            marks.append(
                {
                    "y": round(float(y), 1),
                    "title": SHORT_TITLES.get(group, GROUP_TITLES[group]),
                    "value": float(values[row]),
                    "colour": GROUP_COLOURS[group],
                }
            )
    marks.sort(key=lambda mark: mark["y"])
    labels = _spread([mark["y"] for mark in marks], LABEL_HEIGHT, height)
    for mark, label_y in zip(marks, labels, strict=True):
        mark["label_y"] = round(label_y, 1)
    return {"picture": picture, "picture_width": width, "width": PANEL["width"], "height": height, "marks": marks}


def _spread(wanted: Sequence[float], distance: float, height: float) -> list[float]:
    """Move sorted positions as little as needed to lie ``distance`` apart between half of it and the height."""
    placed: list[float] = []
    for y in wanted:
        placed.append(max(y, placed[-1] + distance if placed else distance / 2))
    limit = height - distance / 2
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], limit)
        limit = placed[i] - distance
    return placed
