#!/usr/bin/env sh
# Builds the kernels of multi-scale deformable attention in place: for the CPU, and for CUDA where there are a toolkit and
# a GPU. FORCE_CUDA=1 builds for CUDA without a GPU, TORCH_CUDA_ARCH_LIST says for which (setup.py tells all).
# Without them everything works too, slower: in Triton on a GPU, in plain PyTorch elsewhere.
set -u
cd "$(dirname "$0")" || exit
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -x ../../.venv/bin/python ]; then
  PATH=$(cd ../../.venv/bin && pwd):$PATH
fi

# say_missing <cpu|cuda>: what a build of that kind needs and this machine does not have
say_missing() {
  compiler=${CXX:-c++}
  command -v "$compiler" >/dev/null ||
    echo "  missing: a C++ compiler, called $compiler (on Debian: apt install g++; or set CXX)"
  python -c "import setuptools" 2>/dev/null || echo "  missing: setuptools (pip install setuptools)"
  if [ "$1" = cuda ]; then
    [ -n "${CUDA_HOME:-}" ] || command -v nvcc >/dev/null || echo "  missing: nvcc on PATH, or CUDA_HOME set to a CUDA toolkit"
  fi
}

# build <cpu|cuda>: the library, or what went wrong
build() {
  mkdir -p build
  if MS_DEFORM_ATTN_DEVICES=$1 python setup.py -q build_ext --inplace --build-temp "build/$1" >"build/$1.log" 2>&1; then
    echo "built the $1 kernels: $(pwd)/_$1.so"
    return
  fi
  echo "the $1 kernels could not be built:" >&2
  { say_missing "$1"; grep -iE "error|no CUDA|was built without" "build/$1.log" || tail -n 5 "build/$1.log"; } | head -n 12 >&2
  echo "  all of it: $(pwd)/build/$1.log. Everything works without them, slower." >&2
  failed=1
}

command -v python >/dev/null || { echo "make.sh: there is no python on PATH: activate the environment that has torch" >&2; exit 2; }
python -c "import torch" 2>/dev/null || { echo "make.sh: $(command -v python) has no torch: pip install torch" >&2; exit 2; }
failed=0
devices=${MS_DEFORM_ATTN_DEVICES:-$(python -c "import setup; print(*setup.devices(setup.CUDA_HOME))" 2>/dev/null || echo cpu)}
for device in $devices; do
  build "$device"
done
if [ "$devices" = cpu ] && [ -z "${MS_DEFORM_ATTN_DEVICES:-}${FORCE_CUDA:-}" ] &&
  { command -v nvcc >/dev/null || [ -n "${CUDA_HOME:-}" ]; }; then
  echo "there is a CUDA toolkit, but no GPU: FORCE_CUDA=1 sh ./make.sh builds for CUDA all the same"
fi
exit "$failed"
