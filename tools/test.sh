#!/usr/bin/env bash
# Style, types and the whole test suite: ./tools/test.sh [arguments of pytest]. Creates the environment first if it is missing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=tools/dev/env.sh
source tools/dev/env.sh
# shellcheck source=tools/dev/setup.sh
source tools/dev/setup.sh
# training needs none of these; without them the tests of exported files are skipped
python -c "import onnx, onnxscript, onnxruntime" 2> /dev/null ||
  python -m pip install --quiet --disable-pip-version-check onnx onnxscript onnxruntime || echo "continuing without ONNX"
ruff check .
ruff format --check --quiet . || { echo "run: ruff format ." >&2; exit 1; }
mypy

# One process more than cores, because programs that the tests start often wait; each with one thread. Processes take tests
# from each other at the end, so that none is left with a long file.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
python -m pytest -n 3 --dist worksteal "$@"
