#!/bin/sh
# All tests, and the linter. Arguments go to pytest: sh scripts/test.sh tests/test_models.py -k vgg
. "$(dirname "$0")/env.sh"
"$python" -m ruff check .
exec "$python" -m pytest "$@"
