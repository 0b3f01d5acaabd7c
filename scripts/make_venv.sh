# Sourced by venv.sh, label_env.sh and deploy_env.sh: makes an environment, or reuses the one that is up to date.
# PYTHON chooses the interpreter (3.10 or newer).
project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

make_venv() { # DIR [FILE ...]: calls install_packages, unless that is done for this project and these files as they are
    venv=$1
    local wanted python=${PYTHON:-python3}
    wanted=$(cat "$project/pyproject.toml" "$project/constraints.txt" "${@:2}" | cksum)
    [ "$(cat "$venv/installed" 2>/dev/null)" != "$wanted" ] || return 0
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        echo "Python 3.10 or newer is needed; $python is $("$python" --version 2>&1). Set PYTHON to another one." >&2
        exit 1
    }
    echo "Installing into $venv (a few minutes the first time) ..." >&2
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    install_packages
    printf '%s\n' "$wanted" >"$venv/installed"
}

pip_install() { # CONSTRAINTS ARGUMENT ...
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint "$@"
}

# Lets the environment fall back on the packages of another one. PyTorch alone is several GB: it need not be there twice.
fall_back_on() { # DIR
    local packages='import sysconfig; print(sysconfig.get_path("purelib"))'
    "$1/bin/python" -c "$packages" >"$("$venv/bin/python" -c "$packages")/below.pth"
}
