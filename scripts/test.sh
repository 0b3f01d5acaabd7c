#!/usr/bin/env bash
# Lint, types and tests. Arguments go to pytest: bash scripts/test.sh tests/test_dicom.py -k rle
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
cd "$project"
ruff check .
ruff format --check .
mypy
# One process per core, each single-threaded: tiny tensors gain nothing from more threads.
export OMP_NUM_THREADS=1
exec pytest --numprocesses=auto --dist=loadfile "$@"
