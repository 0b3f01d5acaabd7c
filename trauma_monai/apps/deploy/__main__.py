"""``python -m trauma_monai.apps.deploy -i DICOM_DIR -o OUT -m BUNDLE``: see docs/deploy.md.

Exit codes: 0 done; 1 bad input, with the reason in one line on stderr; 2 wrong usage.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

# Its own messages are many lines for each reason of ours; who needs them sets the variable.
os.environ.setdefault("HOLOSCAN_LOG_LEVEL", "OFF")


def main() -> int:
    """Read the arguments, run the app, and return the exit code."""
    arguments = _parse_arguments()
    try:
        for path in _run(arguments):
            print(path)
    except ModuleNotFoundError as error:
        return _fail(f"{error.name} is missing; MONAI Deploy has an environment of its own: scripts/deploy_env.sh.")
    except KeyError as error:
        return _fail(str(error.args[0]) if error.args else "KeyError")
    except (ValueError, OSError, RuntimeError) as error:
        return _fail(str(error))
    return 0


def _run(arguments: argparse.Namespace) -> list[Path]:
    """Run the app into a folder of its own; results reach OUT only when all of them are there."""
    from trauma_monai.apps.deploy.model import read_model
    from trauma_monai.scans import find_studies

    if not arguments.input.is_dir():
        raise ValueError(f"{arguments.input} is not a folder; expected the DICOM files of one study.")
    model = read_model(arguments.model, arguments.variant, arguments.organ_model, arguments.organ_variant)
    studies, left_out = find_studies(arguments.input)
    if len(studies) != 1:
        reasons = "; ".join(dict.fromkeys(item.reason for item in left_out)) or "nothing"
        raise ValueError(f"{arguments.input} holds {len(studies)} CT studies, expected one; left out: {reasons}.")

    from trauma_monai.apps.deploy.app import DeployApp

    arguments.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=arguments.output) as partial:
        results = Path(partial) / "results"
        results.mkdir()
        DeployApp(studies[0], results, model, model.write(Path(partial) / "bundle")).run()
        written = sorted(results.iterdir())
        if not written:
            raise RuntimeError("holoscan ended without a result; HOLOSCAN_LOG_LEVEL=INFO shows why.")
        return [path.replace(arguments.output / path.name) for path in written]


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m trauma_monai.apps.deploy",
        description="Run a bundle on MONAI Deploy: organs become a DICOM SEG, injuries a DICOM SR. For research only.",
    )
    # The variables are those that the SDK's containers set.
    for flag, name, help_text in (
        ("-i", "input", "folder with the DICOM files of one study"),
        ("-o", "output", "folder for the results"),
        ("-m", "model", "folder of a bundle with its weights, or the model.ts that monai.bundle ckpt_export wrote"),
    ):
        default = os.environ.get(f"HOLOSCAN_{name.upper()}_PATH")
        path = Path(default) if default else None
        parser.add_argument(flag, f"--{name}", type=Path, default=path, required=path is None, help=help_text)
    parser.add_argument("--variant", help="variant of the bundle that the weights belong to")
    parser.add_argument(
        "--organ-model", type=Path, help="folder of the organ bundle that makes the trauma bundle's masks"
    )
    parser.add_argument("--organ-variant", help="variant of that organ bundle")
    return parser.parse_args()


def _fail(reason: str) -> int:
    print(f"trauma-monai deploy: {' '.join(reason.split())}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
