#!/usr/bin/env bash
# The environment everything is checked in, .venv, from nothing.
# UPLIFT_TORCH names other torch packages than the tested ones, UPLIFT_PYTHON another interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || "${UPLIFT_PYTHON:-python3}" -m venv .venv
# Modules are compiled when they are first imported (tools/check.sh lets them be kept): pip would compile all of them,
# which takes a minute.
# shellcheck disable=SC2086
.venv/bin/python -m pip install --quiet --no-compile ${UPLIFT_TORCH:-torch==2.14.1 torchvision==0.29.1}
.venv/bin/python -m pip install --quiet --no-compile --editable ".[test]"
