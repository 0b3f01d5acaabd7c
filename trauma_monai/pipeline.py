"""The flow for one study: DICOM or NIfTI -> masks -> stack -> probabilities -> report.

:func:`predict_series` is the flow itself, stage by stage; :func:`predict` runs it over whatever a folder holds. Both
bundles run by their own ``inference.yaml``: no transform is written here again.

A study's folder appears at once and whole, or not at all. A second run into the same OUT goes on where the first
stopped: it keeps the studies whose probabilities.json names the same series, weights, variants and version.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import nibabel as nib
import numpy as np
from monai.data import MetaTensor
from monai.transforms import Orientation
from rich.console import Console

from trauma_monai import __version__
from trauma_monai.console import progress_bar
from trauma_monai.files import fingerprint, write_csv, write_json, write_text
from trauma_monai.models import Models, load_models
from trauma_monai.pictures import draw_coronal
from trauma_monai.pooling import assessed_groups, pool_study
from trauma_monai.report import render_index, render_report
from trauma_monai.results import (
    SeriesResult,
    StudyResult,
    find_key_slices,
    organ_volumes_ml,
    quality_remarks,
    study_record,
    write_submission,
)
from trauma_monai.scans import (
    LeftOut,
    Scan,
    StudyFiles,
    check_input,
    find_studies,
    one_line,
    read_scan,
    source_files,
)
from trauma_monai.targets import GROUPS

__all__ = ["Predictions", "predict", "predict_series", "predict_study"]

logger = logging.getLogger(__name__)

LISTED = ("patient_id", "probabilities", "any_injury", "not_assessed", "organs_found", "warnings")
"""What the index and submission.csv tell of a study; the slices stay in its folder, for there may be millions."""


@dataclass
class Predictions:
    """What :func:`predict` did.

    Attributes:
        reports: one per study, new and kept.
        kept: how many of them an earlier run had made.
        left_out: what could not be predicted and why; also in OUT/rejected.csv.
    """

    reports: list[Path] = field(default_factory=list)
    kept: int = 0
    left_out: list[LeftOut] = field(default_factory=list)


def predict_series(scan: Scan, models: Models, series_uid: str, organs_file: str) -> tuple[SeriesResult, MetaTensor]:
    """Run the flow on one series.

    Args:
        scan: the series, stage 1.
        models: both bundles.
        series_uid: how the result is named.
        organs_file: name under which the label map will be written.

    Returns:
        The result, and the organ label map on the grid of the input, uint8.
    """
    label_map = models.segment(scan.image)  # stage 2
    image, organs = _from_feet_to_head(scan.image), _from_feet_to_head(label_map)
    outputs, scores = models.classify(image, organs)  # stages 2 to 5

    hu, codes = np.asarray(image[0]), np.asarray(organs[0])  # stage 6
    affine = np.asarray(image.affine)
    dz, dy, dx = (float(mm) for mm in np.linalg.norm(affine[:3, :3], axis=0))
    scores = scores.at_positions(affine, scan.instances_from_feet())
    volumes_ml = organ_volumes_ml(codes, (dz, dy, dx))
    result = SeriesResult(
        series_uid=series_uid,
        organs_file=organs_file,
        shape=hu.shape,
        spacing_mm=(dz, dy, dx),
        facts=scan.facts,
        scores=scores,
        outputs=outputs,
        volumes_ml=volumes_ml,
        remarks=quality_remarks(codes, (dz, dy, dx), volumes_ml, scan.facts),
        key_slices=find_key_slices(scores, hu, codes, (dz, dy, dx)),
        coronal=draw_coronal(hu, codes, (dz, dy, dx)),
        instances=scan.instances,
    )
    return result, label_map


def predict_study(study: StudyFiles, models: Models, folder: Path) -> tuple[StudyResult | None, list[LeftOut]]:
    """Predict the series of a study one after the other and pool them.

    A series that cannot be read or predicted is left out; that a result cannot be written ends the run. Label maps are
    ``organs.nii.gz``, or ``organs_1.nii.gz``, ``organs_2.nii.gz``, ... in the order of the series UIDs when the study
    has several series.

    Args:
        study: what to read.
        models: both bundles.
        folder: existing folder for the label maps.

    Returns:
        The result, None when no series could be predicted; and the series that were left out.
    """
    results: list[SeriesResult] = []
    left_out: list[LeftOut] = []
    for number, (series_uid, source) in enumerate(study.series.items(), start=1):
        organs_file = "organs.nii.gz" if len(study.series) == 1 else f"organs_{number}.nii.gz"
        try:
            result, label_map = predict_series(read_scan(source), models, series_uid, organs_file)
        except Exception as error:  # decoders raise anything; the next series may well be fine
            logger.debug("series left out", exc_info=True)
            left_out.append(LeftOut(series_uid, one_line(error)))
            continue
        _write_label_map(label_map, folder / organs_file)
        results.append(result)
    return (_pool(study, results, left_out, models) if results else None), left_out


def predict(
    input_path: Path | str,
    out: Path | str,
    organ_weights: Path | str,
    trauma_weights: Path | str | None = None,
    variant: str | None = None,
    organ_variant: str | None = None,
    device: str = "auto",
    bundles_dir: Path | str | None = None,
    overwrite: bool = False,
    ensemble: Path | str | None = None,
    dicom: bool = False,
    fast: bool = False,
) -> Predictions:
    """Predict every study of an input and write a report for each.

    Writes per study OUT/<patient>/report.html, probabilities.json and organ label maps; and OUT/submission.csv,
    OUT/index.html and, when something was left out, OUT/rejected.csv. With ``dicom`` also the organs as DICOM SEG
    beside each label map and the probabilities as DICOM SR, report.dcm; a source that these cannot refer to gets a
    remark.

    Args:
        input_path: DICOM folder (any mix of series and patients), one series, a NIfTI file or a folder of them.
        out: folder for the results, made when it does not exist.
        organ_weights: state dict for organ_ct_segmentation.
        trauma_weights: state dict for trauma_ct_classification; not with an ensemble.
        variant: variant that the weights belong to; taken for the organ bundle too, where that has it.
        organ_variant: variant of the organ bundle, where it is another one.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        bundles_dir: folder with both bundles; by default those that come with this package.
        overwrite: predict again what OUT already holds.
        ensemble: list of checkpoints in place of trauma_weights and variant, see :mod:`trauma_monai.ensemble`.
        dicom: write DICOM objects as well; a study that an earlier run finished without them is predicted again.
        fast: classify in float16 and compiled where the device gains from it, see :func:`trauma_monai.for_inference`.
            Masks stay exact: they decide the crop, and a voxel more in it moves probabilities further than rounding.

    Raises:
        FileNotFoundError: when a weights file is missing.
        ValueError: for trauma_weights or a variant beside an ensemble, and without either; for an unknown variant or
            device, weights that do not fit, an input that cannot be read, and when nothing at all could be predicted,
            with the reasons.
    """
    input_path, out = Path(input_path), Path(out)
    trauma_weights, ensemble = (path if path is None else Path(path) for path in (trauma_weights, ensemble))
    check_input(input_path)  # cheaper to refuse than networks are to build
    variants = variant, organ_variant
    models = load_models(Path(organ_weights), trauma_weights, *variants, ensemble, device, bundles_dir, fast)
    studies, left_out = find_studies(input_path)
    if out.is_file():
        raise ValueError(f"{out} is a file; expected a folder for the results.")
    out.mkdir(parents=True, exist_ok=True)
    done = Predictions(left_out=left_out)
    records: dict[str, dict[str, Any]] = {}
    with progress_bar() as bar:
        for study in bar.track(studies, description="predicting"):
            record = None if overwrite else _finished(out / study.folder, study, models, dicom)
            if record is not None:
                done.kept += 1
            else:
                others = left_out if len(studies) == 1 else []
                record, broken = _predict_into(out / study.folder, study, models, others, dicom)
                done.left_out += broken
                _tell(bar.console, study, record, broken)
            if record is not None:
                records[study.folder] = {name: record[name] for name in LISTED}
                done.reports.append(out / study.folder / "report.html")
    if done.left_out:
        write_csv(out / "rejected.csv", LeftOut._fields, done.left_out)
    else:
        (out / "rejected.csv").unlink(missing_ok=True)
    if not records:
        reasons = "; ".join(dict.fromkeys(item.reason.rstrip(".") for item in done.left_out)) or "it holds no CT series"
        raise ValueError(f"nothing in {input_path} could be predicted: {reasons}.")
    write_submission(list(records.values()), out / "submission.csv")
    write_text(out / "index.html", render_index(list(records.items()), done.left_out))
    return done


# --- one study --------------------------------------------------------------------------------------------------------


def _pool(
    study: StudyFiles, results: Sequence[SeriesResult], left_out: Sequence[LeftOut], models: Models
) -> StudyResult:
    pooled = pool_study([result.outputs for result in results], models.series_mode)
    assessed = assessed_groups(list(pooled))
    return StudyResult(
        patient_id=study.patient_id,
        study_uid=study.study_uid,
        series=results,
        pooled=pooled,
        columns=models.columns(pooled),
        not_assessed=[group for group in GROUPS if group not in assessed],
        left_out=[f"series {item.path}: {item.reason}" for item in left_out],
        model=models.names,
        version=__version__,
    )


def _from_feet_to_head(volume: MetaTensor) -> MetaTensor:
    """Turn (1, X, Y, Z) of any orientation into (1, Z, Y, X) as displayed; a view where the slices lie in order."""
    turned = Orientation(axcodes="SPL", labels=None)(volume)
    return cast("MetaTensor", turned)


def _write_label_map(organs: MetaTensor, path: Path) -> None:
    image = nib.Nifti1Image(np.asarray(organs[0]).astype(np.uint8), np.asarray(organs.affine, dtype=np.float64))
    image.header.set_xyzt_units("mm")
    nib.save(image, path)


# --- the output folder ------------------------------------------------------------------------------------------------


def _predict_into(
    folder: Path, study: StudyFiles, models: Models, left_out: Sequence[LeftOut], dicom: bool
) -> tuple[dict[str, Any] | None, list[LeftOut]]:
    """Predict a study into a folder that appears whole; the old one stays when nothing could be predicted."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        result, broken = predict_study(study, models, partial)
        if result is None:
            return None, broken
        others = Counter(item.reason for item in left_out)
        notes = [*result.left_out, *(f"{reason} ({count} x)" for reason, count in others.items())]
        result = replace(result, left_out=notes)
        if dicom:
            result = _with_dicom_objects(result, partial)
        record = {**study_record(result), "input": _fingerprint(study, models)}
        write_text(partial / "report.html", render_report(result))
        write_json(partial / "probabilities.json", record)
        _replace_folder(partial, folder)
        return record, broken
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _with_dicom_objects(result: StudyResult, folder: Path) -> StudyResult:
    """Write DICOM SEG and SR, or say why not: the other outputs do not depend on them."""
    from trauma_monai.dicom_objects import write_dicom_objects  # highdicom takes a second to import

    try:
        return replace(result, dicom_files=write_dicom_objects(result, folder))
    except Exception as error:  # highdicom meets headers of any kind
        logger.debug("no DICOM objects", exc_info=True)
        return replace(result, dicom_files=[], remarks=[f"No DICOM SEG and SR were written: {one_line(error)}"])


def _replace_folder(new: Path, folder: Path) -> None:
    """Put a finished folder in place of an older one; the old one steps aside, as one step cannot replace it."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def _finished(folder: Path, study: StudyFiles, models: Models, dicom: bool) -> dict[str, Any] | None:
    """Return the record of a study that an earlier run finished with the same input and models, else None.

    A study with a series that could not be predicted is tried again: the reason may be gone.
    """
    try:
        record: dict[str, Any] = json.loads((folder / "probabilities.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    same = record.get("input") == _fingerprint(study, models) and record.get("series") == list(study.series)
    lacks_dicom = dicom and record.get("dicom_files") is None
    return record if same and not lacks_dicom else None


def _fingerprint(study: StudyFiles, models: Models) -> str:
    """What a result depends on, as one short text: files, models and version."""
    files = [file for source in study.series.values() for file in source_files(source)]
    facts = (study.patient_id, study.study_uid, *study.series, *models.names.values(), __version__)
    return fingerprint(files, *facts)[:16]


def _tell(console: Console, study: StudyFiles, record: Mapping[str, Any] | None, broken: Sequence[LeftOut]) -> None:
    for item in broken:
        console.print(f"{study.patient_id}: series {item.path} left out: {item.reason}", markup=False, highlight=False)
    if record is not None and record["any_injury"] is not None:
        doubt = "" if record["organs_found"] else " (no organ found: means nothing)"
        text = f"{study.patient_id}: any injury {record['any_injury']:.0%}{doubt} -> {study.folder}/report.html"
        console.print(text, markup=False, highlight=False)
