#!/usr/bin/env bash
# Checks in some minutes what only a GPU can show: ./tools/gpu_check.sh --help. The steps are in tests/gpu_check/steps.py.
set -euo pipefail
# shellcheck source=tools/dev/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/dev/env.sh"

for python in python python3; do
  if "$python" -c 'import sys, importlib.util as u; sys.exit(u.find_spec("torch") is None)' 2>/dev/null; then
    exec "$python" -m tests.gpu_check "$@"
  fi
done
die "neither python nor python3 on PATH has torch: activate the environment that has it"
