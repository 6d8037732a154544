#!/usr/bin/env bash
# Everything the project is checked with, from nothing: its environment (see environment.sh), linter, types, all tests.
set -euo pipefail
cd "$(dirname "$0")/.."
unset PYTHONDONTWRITEBYTECODE  # else every program of the tests would compile torch anew, which takes it seconds
bash tools/environment.sh
.venv/bin/ruff check .
.venv/bin/mypy
.venv/bin/python -m pytest "$@"
