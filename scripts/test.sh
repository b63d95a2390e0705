#!/usr/bin/env bash
# Install the test extra and run all checks: format, lint, types and the test suite.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/install.sh test
BIN=.venv/bin
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
mapfile -t SOURCES < <(git ls-files '*.py')
"$BIN/black" --check "${SOURCES[@]}"
"$BIN/isort" --check-only "${SOURCES[@]}"
"$BIN/ruff" check "${SOURCES[@]}"
"$BIN/mypy" --no-error-summary "${SOURCES[@]}"
# One process per core; a file stays in one process, so that its fixtures are built once. Files come in their order, since
# those of most tests are not the longest ones.
exec "$BIN/python" -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@"
