#!/usr/bin/env bash
# Everything about the attention operator that needs a GPU, offline: builds the kernels, tests them, looks for wrong accesses and
# times them. Needs python3 with torch, a CUDA toolkit and a C++ compiler. Logs and results go to a folder:
#   ./tools/gpu_check.sh [folder]    default: gpu_check
# The last lines are a table of what passed; the exit status is 1 if anything failed. Some minutes on an H100.
# shellcheck disable=SC2317 # `step` calls functions by their names
set -euo pipefail
# shellcheck source=tools/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
usage() {
  sed -n '2,5s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  exit 2
}
[[ $# -le 1 && ${1:-} != -* ]] || usage
out=${1:-gpu_check}

# The scripts call `python`; where only python3 has torch, it gets that name.
use_python3() {
  local python3
  if python -c "import torch" 2>/dev/null; then return; fi
  python3=$(command -v python3) || die "there is neither python nor python3 on PATH"
  "$python3" -c "import torch" 2>/dev/null || die "neither python nor $python3 has torch: activate the environment that has it"
  mkdir -p "$out/bin"
  # a script, not a link: a virtual environment's python must be called by its own path
  printf '#!/bin/sh\nexec "%s" "$@"\n' "$python3" >"$out/bin/python"
  chmod +x "$out/bin/python"
  PATH=$(cd "$out/bin" && pwd):$PATH
  export PATH
}

require_gpu() {
  python -c "import sys, torch; sys.exit(not torch.cuda.is_available())" ||
    die "no GPU: torch $(torch_version) sees no CUDA device here; run this on a machine that has one"
}

torch_version() {
  python -c "import torch; print(torch.__version__)"
}

has_module() {
  python -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"
}

# find_tool <name>: its path, on PATH or in the CUDA toolkit; nothing if it is not there
find_tool() {
  command -v "$1" || command -v "${CUDA_HOME:-/usr/local/cuda}/bin/$1" || true
}

summary=()
failed=0

# step <name> <command...>: runs it into <name>.log
step() {
  local name=$1 begin=$SECONDS result=passed
  shift
  echo "== $name"
  "$@" >"$out/$name.log" 2>&1 || result="FAILED ($?)"
  [[ $result == passed ]] || { failed=1 && tail -n 15 "$out/$name.log"; }
  add_line "$name" "$result" "$((SECONDS - begin)) s" "$(tail -n 1 "$out/$name.log" | cut -c1-90)"
}

# skip <name> <why>
skip() {
  echo "== $1: skipped, $2"
  add_line "$1" skipped "" "$2"
}

# add_line <name> <result> <time> <remark>
add_line() {
  summary+=("$(printf '%-12s %-13s %6s   %s' "$@")")
}

describe_machine() {
  nvidia-smi
  nvcc=$(find_tool nvcc)
  [[ -z $nvcc ]] || "$nvcc" --version
  python --version
  echo "torch $(torch_version) on $(python -c "import torch; print(torch.cuda.get_device_name())")"
}

build() {
  (cd models/ops && FORCE_CUDA=1 sh ./make.sh)
}

self_test() {
  (cd models/ops && python test.py)
}

# What allocates for itself shows each access beyond an array; torch's allocator would hand out parts of larger blocks.
sanitize() {
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$1" --error-exitcode 1 python -m tools.gpu_check.exercise --short
}

build_plain() {
  local include
  include=$(python -c "from torch.utils.cpp_extension import include_paths; print(*include_paths())")
  # shellcheck disable=SC2046,SC2086 # several flags each
  "$nvcc" -std=c++20 -O3 -arch=native -shared -Xcompiler -fPIC $(printf -- '-isystem %s ' $include) -DUSE_CUDA \
    -DTORCH_TARGET_VERSION=0x020a000000000000 tools/gpu_check/plain.cu -o "$out/plain.so"
}

compare_plain() {
  build_plain && python -m tools.gpu_check.compare_plain --plain "$out/plain.so" --output "$out"
}

command -v python3 >/dev/null || command -v python >/dev/null || die "there is neither python nor python3 on PATH"
mkdir -p "$out"
out=$(cd "$out" && pwd)
use_python3
require_gpu
sanitizer=$(find_tool compute-sanitizer)
nvcc=$(find_tool nvcc)

step machine describe_machine
step build build
step self_test self_test
step exercise python -m tools.gpu_check.exercise
if has_module pytest; then
  step pytest python -m pytest -q -m gpu tests/test_ops*.py
else
  skip pytest "python has no pytest"
fi
for tool in memcheck racecheck; do
  if [[ -n $sanitizer ]]; then
    step "$tool" sanitize "$tool"
  else
    skip "$tool" "there is no compute-sanitizer"
  fi
done
step benchmark python benchmark.py op
if [[ -n $nvcc ]]; then
  step plain compare_plain
else
  skip plain "there is no nvcc on PATH or in CUDA_HOME"
fi

echo
printf '%s\n' "${summary[@]}" | tee "$out/summary.txt"
exit "$failed"
