#!/bin/sh
# All tests; the linter, the formatter and the type checker: sh scripts/test.sh
# The unit and golden tests alone, in a minute: sh scripts/test.sh --fast
# Arguments go to pytest: sh scripts/test.sh tests/unit/test_models.py -k vgg
requirements="requirements.txt requirements-dev.txt requirements-export.txt requirements-networks.txt requirements-detection.txt"
. "$(dirname "$0")/env.sh"

if [ "${1:-}" = --fast ]; then
    shift
    set -- tests/unit tests/golden "$@"
fi
# The tests' networks are small: threads that wait for each other gain nothing, and crawl on a busy machine; two
# processes halve the time.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
unset PYTHONDONTWRITEBYTECODE # or else each of the many processes compiles all modules anew
"$python" -m ruff check .
"$python" -m ruff format --check --quiet .
"$python" -m mypy --no-error-summary
exec "$python" -m pytest -n 2 --dist worksteal "$@"
