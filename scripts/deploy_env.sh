#!/usr/bin/env bash
# Makes the environment that trauma_monai.apps.deploy runs in, or reuses the one that is up to date: deploy_env.sh [DIR]
# It lies on top of the project's .venv: MONAI Deploy's packages exclude some versions that the project is tested with.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

install_packages() {
    fall_back_on "$project/.venv"
    # The SDK's client for inference servers stays below protobuf 7 and ml-dtypes 0.6.
    grep -v -E '^(protobuf|ml-dtypes)==' "$project/constraints.txt" >"$venv/constraints.txt"
    # SimpleITK: the SDK's operators import it but do not ask for it.
    pip_install "$venv/constraints.txt" "monai-deploy-app-sdk==4.0.0" "SimpleITK==2.5.7" --editable "$project"
    # The SDK is a part of the package monai and is found only beside it.
    pip_install "$venv/constraints.txt" --no-deps --ignore-installed monai
}

PYTHON=$project/.venv/bin/python make_venv "${1:-$project/.venv-deploy}" "${BASH_SOURCE[0]}"
echo "$venv/bin/python"
