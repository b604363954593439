# Sets $python, for the runners beside this file: . "$(dirname "$0")/env.sh"
# PYTHON may name an interpreter that has everything in $requirements (requirements.txt). Without it, $python is that of
# $venv (.venv), into which the packages are installed first where they are missing.
set -e
# glibc's malloc asks for huge pages, which are faster on a CPU; results stay bit-identical (docs/speed.md)
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
cd "$(dirname "$0")/.."
venv=${venv:-.venv}
requirements=${requirements:-requirements.txt}
if [ -n "${PYTHON:-}" ]; then
    python=$PYTHON
else
    python=$venv/bin/python
    if [ ! -f "$venv/installed" ] || cat $requirements | grep -qvxFf "$venv/installed"; then
        base=$(command -v python3 || command -v python) || { echo "error: install Python 3.11 or newer" >&2; exit 2; }
        "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
            { echo "error: $base is older than Python 3.11; install a newer one or set PYTHON" >&2; exit 2; }
        echo "installing $requirements into $venv (once; PyTorch is large)"
        [ -x "$python" ] || "$base" -m venv "$venv"
        cat $requirements > "$venv/asked"
        "$python" -m pip install --quiet --requirement "$venv/asked"
        mv "$venv/asked" "$venv/installed"
    fi
fi
