# shellcheck shell=bash
# Sourced by the scripts in configs/ and tools/. Checks that they are run from the project's root, puts the
# root's .venv first on PATH if no other environment is active, and defines the functions that they share.

# die <message>: one line on standard error, exit status 2.
die() {
  echo "${0##*/}: $1" >&2
  exit 2
}

# Paths on the command line and the default data/ and exps/ are relative to the root, so no script changes the folder.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
[[ . -ef $root ]] || die "run this from the project's root: cd $root"

if [[ -z ${VIRTUAL_ENV:-}${CONDA_PREFIX:-} && -x .venv/bin/python ]]; then
  export VIRTUAL_ENV=$PWD/.venv
  export PATH=$VIRTUAL_ENV/bin:$PATH
fi

# Without this, PyTorch prints a C++ stack with each warning of a lost connection, which hides the line that matters.
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}

# require_torch: exits with the remedy if there is no `python` or it has no torch. It does not import torch, which
# takes seconds.
require_torch() {
  local remedy="run ./tools/quickstart.sh or ./tools/test.sh once, or pip install -r requirements.txt in your own environment"
  local python
  python=$(command -v python) || die "there is no python on PATH: $remedy"
  python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' >/dev/null ||
    die "$python has no torch: $remedy"
}

# split_over_nodes <processes>: checks GPUS_PER_NODE, the processes on each node (default: 8, or all if there are
# fewer), and sets NODES.
split_over_nodes() {
  [[ $1 =~ ^[1-9][0-9]*$ ]] || die "the number of processes must be a positive integer, not '$1'"
  GPUS_PER_NODE=${GPUS_PER_NODE:-$(($1 < 8 ? $1 : 8))}
  [[ $GPUS_PER_NODE =~ ^[1-9][0-9]*$ ]] || die "GPUS_PER_NODE must be a positive integer, not '$GPUS_PER_NODE'"
  (($1 % GPUS_PER_NODE == 0)) ||
    die "$1 processes do not divide into nodes of $GPUS_PER_NODE: set GPUS_PER_NODE to the processes on each node"
  export GPUS_PER_NODE
  # shellcheck disable=SC2034 # for the script that calls
  NODES=$(($1 / GPUS_PER_NODE))
}
