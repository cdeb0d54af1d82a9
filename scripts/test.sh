#!/usr/bin/env bash
# Installs everything into .venv (a few minutes the first time), then runs every gate: style, types, import layers, docs, tests.
#
#   scripts/test.sh                    all gates
#   scripts/test.sh tests/unit         gates, and only these tests (arguments go to pytest)
#   R3_PYTHON=/path/to/python scripts/test.sh    an environment of your own; nothing is installed
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"

cd "$REPO"
# More threads than cores slow the small models of the tests down many times over.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Nothing in the tests may reach for a model hub or an account.
export HF_HUB_OFFLINE=1 WANDB_MODE=${WANDB_MODE:-offline}

gate() {
    printf '\n== %s\n' "$*"
    "$PYTHON" -m "$@"
}

# import-linter has no `python -m` form.
layers() {
    printf '\n== lint-imports\n'
    "$PYTHON" -c 'from importlinter.cli import lint_imports_command; lint_imports_command()'
}

gate ruff check .
gate ruff format --check .
gate mypy -p r3
layers
# mkdocs-material announces its successor on every build.
NO_MKDOCS_2_WARNING=1 gate mkdocs build --strict --quiet
# Something shared is broken where ten tests fail; the rest would only take their time-outs.
gate pytest -m "not slow and not gpu" --maxfail=10 "$@"
