# Sourced by demo.sh and test.sh: makes .venv with this project in it, or reuses the one that is up to date.
# PYTHON chooses the interpreter (3.10 or newer).
project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv="$project/.venv"
wanted=$(cat "$project/pyproject.toml" "$project/constraints.txt" | cksum)
if [ "$(cat "$venv/installed" 2>/dev/null)" != "$wanted" ]; then
    python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        echo "Python 3.10 or newer is needed; $python is $("$python" --version 2>&1). Set PYTHON to another one." >&2
        exit 1
    }
    echo "Installing into .venv (a few minutes the first time: PyTorch alone is several GB) ..."
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        --constraint "$project/constraints.txt" --editable "$project[dev]"
    printf '%s\n' "$wanted" >"$venv/installed"
fi
export PATH="$venv/bin:$PATH"
