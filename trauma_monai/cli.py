"""The command line: read the arguments, call the module that does the work, print what came out.

Exit codes: 0 done; 1 bad input, with the reason in one line on stderr; 2 wrong usage; 130 interrupted.
Heavy modules are imported inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from trauma_monai import __version__

if TYPE_CHECKING:
    from trauma_monai.pooling import SeriesMode

app = typer.Typer(
    name="trauma-monai",
    help="CT trauma detection: from a folder of DICOM to organ masks, injury probabilities and a report.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Region(str, Enum):
    """What of a patient a synthetic CT shows."""

    abdomen = "abdomen"


class Bundle(str, Enum):
    """The bundles of this project."""

    organ = "organ_ct_segmentation"
    trauma = "trauma_ct_classification"


class Competition(str, Enum):
    """Competitions whose metric is known."""

    rsna2023 = "rsna2023"
    rsna2022 = "rsna2022"


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


Workers = Annotated[int | None, typer.Option(min=1, help="Processes; all cores by default.")]


@app.command()
def phantom(
    out: Annotated[Path, typer.Argument(help="New folder, filled in the layout of the RSNA 2023 competition.")],
    studies: Annotated[int, typer.Option(min=1, help="Patients, each with one or two series.")] = 24,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same bytes.")] = 0,
    matrix: Annotated[int, typer.Option(min=64, help="Rows and columns of a slice.")] = 256,
    slice_thickness: Annotated[float, typer.Option(min=0.5, help="Distance between slices in mm.")] = 5.0,
    region: Annotated[Region, typer.Option(help="Part of the body.")] = Region.abdomen,
    workers: Workers = None,
) -> None:
    """Make synthetic trauma CTs: DICOM, organ masks and label tables."""
    from trauma_monai.console import progress_bar
    from trauma_monai.phantom import write_phantoms

    with progress_bar() as bar:
        task = bar.add_task("patients", total=studies)
        write_phantoms(
            out,
            studies,
            seed,
            matrix=matrix,
            slice_thickness_mm=slice_thickness,
            workers=workers,
            progress=lambda made, _: bar.update(task, completed=made),
        )


@app.command()
def prepare(
    rsna_dir: Annotated[Path, typer.Argument(help="Folder in the layout of the RSNA 2023 competition.")],
    out: Annotated[Path, typer.Argument(help="Folder for volumes, masks, datalist.json and rejected.csv.")],
    workers: Workers = None,
    folds: Annotated[int, typer.Option(min=2, help="Parts that the patients are split into.")] = 4,
    scheduler: Annotated[str | None, typer.Option(help="Address of a Dask scheduler, to use a cluster.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Prepare again what OUT already holds.")] = False,
) -> None:
    """Check every series and write it as a volume that is fast to read. Run it again to go on where it stopped."""
    from trauma_monai.prepare import prepare as prepare_dataset

    prepare_dataset(rsna_dir, out, workers=workers, folds=folds, scheduler=scheduler, overwrite=overwrite)


@app.command()
def segment(
    out: Annotated[Path, typer.Argument(help="Folder that 'prepare' wrote.")],
    weights: Annotated[Path, typer.Option(help="Weights of organ_ct_segmentation, model.pt.")],
    variant: Annotated[str | None, typer.Option(help="Variant of the bundle that the weights belong to.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    overwrite: Annotated[bool, typer.Option(help="Make again also the masks that these weights made.")] = False,
) -> None:
    """Fill in organ masks for the prepared series that have none, or whose masks other weights made."""
    from trauma_monai.segment import segment as segment_dataset

    segment_dataset(out, weights, variant=variant, device=device, overwrite=overwrite)


@app.command()
def predict(
    source: Annotated[
        Path, typer.Argument(metavar="INPUT", help="DICOM folder (any mix), one series, or a NIfTI file.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder for one report per study and submission.csv.")],
    organ_weights: Annotated[Path, typer.Option(help="Weights of organ_ct_segmentation, model.pt.")],
    trauma_weights: Annotated[Path | None, typer.Option(help="Weights of trauma_ct_classification, model.pt.")] = None,
    variant: Annotated[str | None, typer.Option(help="Variant that the weights belong to.")] = None,
    ensemble: Annotated[
        Path | None, typer.Option(help="List of checkpoints, instead of --trauma-weights and --variant.")
    ] = None,
    organ_variant: Annotated[
        str | None, typer.Option(help="Variant of the organ bundle, where it is another one.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    overwrite: Annotated[bool, typer.Option(help="Predict again what OUT already holds.")] = False,
    dicom: Annotated[bool, typer.Option("--dicom", help="Also write the organs as DICOM SEG, the rest as SR.")] = False,
    fast: Annotated[
        bool, typer.Option("--fast", help="Classify in float16 and compiled; probabilities move by less than 0.001.")
    ] = False,
) -> None:
    """Predict injuries of every study in INPUT and write a report for each."""
    if trauma_weights is None and ensemble is None:
        raise typer.BadParameter("expected --trauma-weights or --ensemble.")
    from trauma_monai.console import say
    from trauma_monai.pipeline import predict as predict_studies

    done = predict_studies(
        source,
        out,
        organ_weights,
        trauma_weights,
        variant=variant,
        organ_variant=organ_variant,
        device=device,
        overwrite=overwrite,
        ensemble=ensemble,
        dicom=dicom,
        fast=fast,
    )
    left_out = f"; {len(done.left_out)} left out, see rejected.csv" if done.left_out else ""
    say(f"{len(done.reports)} reports ({done.kept} from an earlier run) in {out / 'index.html'}{left_out}")


@app.command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint of a published system.")],
    out: Annotated[Path, typer.Argument(help="Where to write the weights, such as models/model.pt.")],
    variant: Annotated[str | None, typer.Option(help="Variant that the checkpoint belongs to.")] = None,
    bundle: Annotated[Bundle, typer.Option(help="Bundle that the weights are for.")] = Bundle.trauma,
) -> None:
    """Turn a published checkpoint into weights of a bundle. Every tensor is accounted for."""
    from trauma_monai.convert import convert_for_bundle

    conversion = convert_for_bundle(checkpoint, out, bundle.value, variant)
    typer.echo(f"{conversion.system}: {conversion.used} tensors in {out}")
    for part, reason in conversion.dropped.items():
        typer.echo(f"left out {part}*: {reason}")


@app.command()
def package(
    bundle: Annotated[str, typer.Argument(help="Name of a bundle, or the folder of one.")],
    out: Annotated[Path, typer.Argument(help="New folder for the package.")],
    variant: Annotated[str | None, typer.Option(help="Variant that goes into the configs.")] = None,
    weights: Annotated[Path | None, typer.Option(help="model.pt; by default that of the bundle, if any.")] = None,
    organ_weights: Annotated[
        Path | None, typer.Option(help="model.pt of organ_ct_segmentation, to segment within trauma_ct_classification.")
    ] = None,
    organ_variant: Annotated[
        str | None, typer.Option(help="Variant of the organ bundle, where it is another one.")
    ] = None,
    as_zip: Annotated[bool, typer.Option("--zip", help="Also write OUT.zip and OUT.zip.sha256.")] = False,
) -> None:
    """Write a bundle as a folder that needs only MONAI and public packages, for the model zoo, Label and Deploy."""
    from trauma_monai.packaging import package as package_bundle

    done = package_bundle(bundle, out, variant, weights, organ_weights, organ_variant, as_zip)
    for path in filter(None, (done.folder, done.zip_file)):
        typer.echo(path)
    for remark in done.remarks:
        typer.echo(f"note: {remark}")


@app.command()
def score(
    solution: Annotated[Path, typer.Argument(help="CSV with the truth, such as train.csv.")],
    submission: Annotated[Path, typer.Argument(help="CSV with predicted probabilities.")],
    competition: Annotated[Competition, typer.Option(help="Whose metric.")] = Competition.rsna2023,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON at full precision.")] = False,
) -> None:
    """Score a submission with the competition's metric. Lower is better.

    For RSNA 2023 the table also shows the best constant prediction for the same studies: what a model must beat.
    """
    from trauma_monai.metrics import best_constant, read_solution, score_files

    result = score_files(solution, submission, competition.value)
    if as_json:
        typer.echo(json.dumps({"score": result.score, "parts": result.parts}))
        return
    columns = {"submission": result}
    if competition is Competition.rsna2023:
        columns["best constant"] = best_constant(read_solution(solution))
    typer.echo(" " * 18 + "".join(f"{title:>15}" for title in columns))
    for part in result.parts:
        typer.echo(f"{part:<18}" + "".join(f"{column.parts[part]:>15.4f}" for column in columns.values()))
    typer.echo(f"{'score':<18}" + "".join(f"{column.score:>15.4f}" for column in columns.values()))


@app.command()
def oof(
    out: Annotated[Path, typer.Argument(help="YAML file to write: scores, and factors that an ensemble can name.")],
    predictions: Annotated[
        list[Path], typer.Argument(help="CSV files of the folds of one model; or a folder of them for each model.")
    ],
    solution: Annotated[Path, typer.Option(help="CSV with the truth, such as train.csv.")],
    series_mode: Annotated[
        str, typer.Option(help="How the series of a patient are pooled: max, mean or lowest_aortic_hu.")
    ] = "max",
) -> None:
    """Score out-of-fold predictions, of one model or averaged over several, and fit scaling factors on them."""
    from trauma_monai.oof import collect_oof, write_oof

    result = collect_oof(predictions, solution, cast("SeriesMode", series_mode))
    write_oof(result, out)
    rows = {"score": result.score.score, "best constant": result.best_constant, "scaled": result.scaled_score}
    if result.held_out_score is not None:
        rows["scaled, held out"] = result.held_out_score
    typer.echo(f"{result.patients} patients")
    for name, value in rows.items():
        typer.echo(f"{name:<18}{value:>15.4f}")


def main() -> None:
    """Run the command line; bad input ends in one line on stderr and exit code 1."""
    # MONAI's loader sets up all its readers, and warns that one of them lacks a decoder for GPUs. It is not used here.
    logging.getLogger("monai.data.nvimgcodec_pydicom_plugin").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="NvImgCodecPydicomReader")
    try:
        app()
    except KeyError as error:
        _fail(str(error.args[0]) if error.args else "KeyError")
    except (ValueError, OSError, RuntimeError) as error:
        _fail(str(error))


def _fail(reason: str) -> None:
    print(f"trauma-monai: {' '.join(reason.split())}", file=sys.stderr)
    sys.exit(1)
