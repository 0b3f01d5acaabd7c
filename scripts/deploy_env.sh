#!/usr/bin/env bash
# Makes the environment that trauma_monai.apps.deploy runs in, or reuses the one that is up to date: deploy_env.sh [DIR]
# It is one of its own: MONAI Deploy's packages exclude some versions that the tests of the project itself pass with.
# PYTHON chooses the interpreter (3.10 or newer).
set -euo pipefail
project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${1:-$project/.venv-deploy}
wanted=$(cat "$project/pyproject.toml" "$project/constraints.txt" "${BASH_SOURCE[0]}" | cksum)
if [ "$(cat "$venv/installed" 2>/dev/null)" != "$wanted" ]; then
    python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        echo "Python 3.10 or newer is needed; $python is $("$python" --version 2>&1). Set PYTHON to another one." >&2
        exit 1
    }
    echo "Installing into $venv (several GB, a few minutes the first time) ..."
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    # The SDK's client for inference servers stays below protobuf 7 and ml-dtypes 0.6.
    grep -v -E '^(protobuf|ml-dtypes)==' "$project/constraints.txt" >"$venv/constraints.txt"
    # SimpleITK: the SDK's operators import it but do not ask for it.
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint "$venv/constraints.txt" \
        "monai-deploy-app-sdk==4.0.0" "SimpleITK==2.5.7" --editable "$project"
    printf '%s\n' "$wanted" >"$venv/installed"
fi
echo "$venv/bin/python"
