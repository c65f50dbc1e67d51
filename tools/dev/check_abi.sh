#!/usr/bin/env bash
# Shows that the kernels need no new build after an upgrade: builds them with one PyTorch and Python, and runs the
# self-test with another.
#
#     ./tools/dev/check_abi.sh <python of the one environment> <python of the other>
#
# Both need torch 2.10 or later, the first setuptools and a C++ compiler as well. FORCE_CUDA=1 builds the CUDA kernels too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=tools/dev/env.sh
source tools/dev/env.sh
(($# == 2)) || die "usage: $0 <python to build with> <python to load with>"
for python in "$@"; do
  "$python" -c 'import torch' || die "$python has no torch, or is not there"
done

describe() { "$1" -c 'import sys, torch; print("Python", sys.version.split()[0], "torch", torch.__version__)'; }

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mkdir "$folder/models"
cp -r models/__init__.py models/ops "$folder/models/"
rm -rf "$folder"/models/ops/{build,_cpu.*,_cuda.*}
mkdir "$folder/bin"
printf '#!/bin/sh\nexec "%s" "$@"\n' "$(command -v "$1")" >"$folder/bin/python"
chmod +x "$folder/bin/python"
echo "== building with $(describe "$1")"
(cd "$folder/models/ops" && VIRTUAL_ENV=$folder PATH=$folder/bin:$PATH sh ./make.sh)
echo "== loading with $(describe "$2")"
(cd "$folder/models/ops" && MS_DEFORM_ATTN_BACKEND=compiled "$2" test.py)
