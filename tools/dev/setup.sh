# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh. Creates .venv, installs the requirements if they have changed, and builds the
# attention kernels.

if [[ ! -x .venv/bin/python ]]; then
  python=$(command -v python3 || command -v python) || die "there is no python3 on PATH: install Python 3.10 or later"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || die "$python is too old: install Python 3.10 or later"
  echo "== virtual environment .venv"
  "$python" -m venv .venv || die "no virtual environment could be made (on Debian: apt install python3-venv)"
fi
export VIRTUAL_ENV=$PWD/.venv
export PATH=$VIRTUAL_ENV/bin:$PATH

if ! cmp -s requirements.txt .venv/installed.txt; then
  echo "== requirements (torch alone is some gigabytes; this takes minutes)"
  python -m pip install --quiet --disable-pip-version-check -r requirements.txt ||
    die "the requirements could not be installed, see above; fix that and run this again: it goes on where it stopped"
  cp requirements.txt .venv/installed.txt
fi

# Kernels of these sources may be there already. Without a compiler everything works, but slower.
if ! python -c 'import sys; from models.ops import compiled; sys.exit(compiled.missing("cpu") is not None)'; then
  echo "== attention kernels"
  sh models/ops/make.sh || echo "continuing without the compiled kernels"
fi
