#!/bin/sh
# The fast tests with the oldest versions that requirements.txt allows, in .venv-oldest: sh scripts/test_oldest.sh
# With the newest versions, in .venv-newest: VERSIONS=newest sh scripts/test_oldest.sh
# Each folder takes 5 GB; remove it afterwards. Arguments go to pytest.
set -e
cd "$(dirname "$0")/.."
venv=.venv-${VERSIONS:=oldest}
requirements=$venv/requirements.txt
PYTHON=
mkdir -p "$venv"
case $VERSIONS in
    oldest) sed 's/>=\(.*\)/==\1.*/' requirements.txt | cat - requirements-dev.txt requirements-export.txt requirements-networks.txt requirements-detection.txt > "$requirements" ;;
    newest) cat requirements.txt requirements-dev.txt requirements-export.txt requirements-networks.txt requirements-detection.txt > "$requirements" ;;
    *) echo "error: VERSIONS is oldest or newest, not $VERSIONS" >&2; exit 2 ;;
esac
. scripts/env.sh

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$python" -m pytest -n 2 --dist worksteal tests/unit tests/golden "$@"
