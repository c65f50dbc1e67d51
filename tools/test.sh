#!/usr/bin/env bash
# Style and the whole test suite: ./tools/test.sh [arguments of pytest]. Makes the environment first if need be.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=tools/env.sh
source tools/env.sh
# shellcheck source=tools/setup.sh
source tools/setup.sh
ruff check .
ruff format --check --quiet . || { echo "run: ruff format ." >&2; exit 1; }
python -m pytest "$@"
