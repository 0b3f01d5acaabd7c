#!/usr/bin/env bash
# Makes the environment that MONAI Label serves the bundles in, or reuses the one that is up to date: label_env.sh [DIR]
# It lies on top of the project's .venv: MONAI Label's packages exclude some versions that the project is tested with.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

install_packages() {
    fall_back_on "$project/.venv"
    # pynetdicom 2 stays below pydicom 2.5, pydicom-seg below numpy 2 and jsonschema 4; the newest pandas wants numpy 2.
    grep -v -E '^(jsonschema|numpy|pandas|pydicom)==' "$project/constraints.txt" >"$venv/constraints.txt"
    pip_install "$venv/constraints.txt" setuptools wheel
    # MONAI Label asks for sam2, which builds against torch: against this one, not another 7 GB of its own.
    SAM2_BUILD_CUDA=0 pip_install "$venv/constraints.txt" --no-build-isolation sam2
    # What .venv has and asks for newer packages: highdicom wants pydicom 3 and has no part in serving; the decoders want
    # numpy 2 and work with 1.26. So no warning of these, and no requirements.
    pip_install "$venv/constraints.txt" --no-warn-conflicts "monailabel==0.8.5" "pydicom<3" "pynetdicom<3" \
        "dicomweb-client[gcp]<0.60" "monai==1.6.1"
    pip_install "$venv/constraints.txt" --no-deps --editable "$project"
}

PYTHON=$project/.venv/bin/python make_venv "${1:-$project/.venv-label}" "${BASH_SOURCE[0]}"
echo "$venv/bin/python"
