#!/usr/bin/env sh
# Builds the compiled kernels of multi-scale deformable attention: there are none yet, so there is nothing to build.
# The operator runs as it is, in plain PyTorch, on every device.
set -eu
cd "$(dirname "$0")"
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -x ../../.venv/bin/python ]; then
  PATH=$(cd ../../.venv/bin && pwd):$PATH
fi
python - <<'PYTHON'
import sys
sys.path.insert(0, "../..")
import models.ops.functions  # noqa: F401 - registers the operator, or says what is missing
print("ms_deform_attn: no compiled kernels in this version, nothing to build; the plain PyTorch path is in use")
PYTHON
