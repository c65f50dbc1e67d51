#!/usr/bin/env bash
# What only a GPU can show, in some minutes: ./tools/gpu_check.sh --help. The steps are in tools/gpu_check/steps.py.
set -euo pipefail
# shellcheck source=tools/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

for python in python python3; do
  if "$python" -c 'import sys, importlib.util as u; sys.exit(u.find_spec("torch") is None)' 2>/dev/null; then
    exec "$python" -m tools.gpu_check "$@"
  fi
done
die "neither python nor python3 on PATH has torch: activate the environment that has it"
