# Sourced by the other scripts: makes .venv with this project in it, or reuses the one that is up to date.
source "$(dirname "${BASH_SOURCE[0]}")/make_venv.sh"
install_packages() { pip_install "$project/constraints.txt" --editable "$project[dev]"; }
make_venv "$project/.venv"
export PATH="$venv/bin:$PATH"
