#!/usr/bin/env bash
# Trains: scripts/train.sh [--nproc N] [key=value ...]      scripts/train.sh --help lists more.
# Makes the virtual environment first where there is none. Relative paths, runs/ and data/ among
# them, are relative to the current directory.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
case " $* " in
  *" --help "* | *" -h "*) PYTHONPATH=$root exec "${PYTHON:-python3}" -m flashtrain.launch --help ;;  # needs no .venv
esac
"$root/scripts/setup_venv.sh"
exec "${FLASHTRAIN_VENV:-$root/.venv}/bin/python" -m flashtrain.launch "$@"
