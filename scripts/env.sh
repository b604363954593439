# Sets $python, for the runners beside this file: . "$(dirname "$0")/env.sh"
# The variable PYTHON names an interpreter that has all of requirements.txt; without it, .venv is made and filled.
set -e
cd "$(dirname "$0")/.."
if [ -n "${PYTHON:-}" ]; then
    python=$PYTHON
else
    python=.venv/bin/python
    if ! cmp -s requirements.txt .venv/installed; then
        base=$(command -v python3 || command -v python) || { echo "error: install Python 3.11 or newer" >&2; exit 2; }
        "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
            { echo "error: $base is older than Python 3.11; install a newer one or set PYTHON" >&2; exit 2; }
        echo "installing requirements.txt into .venv (once; PyTorch is large)"
        [ -x .venv/bin/python ] || "$base" -m venv .venv
        .venv/bin/python -m pip install --quiet --requirement requirements.txt
        cp requirements.txt .venv/installed
    fi
fi
