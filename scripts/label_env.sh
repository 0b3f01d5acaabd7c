#!/usr/bin/env bash
# Makes the environment that MONAI Label serves the bundles in, or reuses the one that is up to date: label_env.sh [DIR]
# It is one of its own: MONAI Label's packages exclude some versions that the tests of the project itself pass with.
# PYTHON chooses the interpreter (3.10 or newer).
set -euo pipefail
project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${1:-$project/.venv-label}
wanted=$(cat "$project/pyproject.toml" "$project/constraints.txt" "${BASH_SOURCE[0]}" | cksum)
if [ "$(cat "$venv/installed" 2>/dev/null)" != "$wanted" ]; then
    python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        echo "Python 3.10 or newer is needed; $python is $("$python" --version 2>&1). Set PYTHON to another one." >&2
        exit 1
    }
    echo "Installing into $venv (several GB, a few minutes the first time) ..."
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    # pynetdicom 2 stays below pydicom 2.5, pydicom-seg below numpy 2 and jsonschema 4; the newest pandas wants numpy 2.
    grep -v -E '^(jsonschema|numpy|pandas|pydicom)==' "$project/constraints.txt" >"$venv/constraints.txt"
    install=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint "$venv/constraints.txt")
    "${install[@]}" "torch>=2.6,<3" torchvision setuptools wheel
    # MONAI Label asks for sam2, which builds against torch: against this one, not another 7 GB of its own.
    SAM2_BUILD_CUDA=0 "${install[@]}" --no-build-isolation sam2
    "${install[@]}" "monailabel==0.8.5" "pydicom<3" "pynetdicom<3" "dicomweb-client[gcp]<0.60" "monai==1.6.1" \
        timm rich python-gdcm
    # The project without what it asks for: highdicom wants pydicom 3, the decoders beside GDCM want numpy 2. The former
    # has no part in serving, the latter decode nothing that GDCM does not.
    "${install[@]}" --no-deps --editable "$project"
    printf '%s\n' "$wanted" >"$venv/installed"
fi
echo "$venv/bin/python"
