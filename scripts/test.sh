#!/usr/bin/env bash
# Tests: scripts/test.sh [pytest arguments]      paths are relative to the repository.
# Runs what needs no GPU and ends within minutes; `-m gpu`, `-m slow` or `-m ""` choose otherwise.
# Without arguments two processes share the files of tests. Makes the virtual environment first where
# there is none.
set -euo pipefail
case " $* " in *" --help "* | *" -h "*) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit ;; esac
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$root/scripts/setup_venv.sh"
python=${FLASHTRAIN_VENV:-$root/.venv}/bin/python
[ "${python:0:1}" = / ] || python=$PWD/$python
cd "$root"
[ $# -gt 0 ] || set -- -n 2 --dist loadfile
exec "$python" -m pytest -m "not gpu and not slow" "$@"  # of two -m, pytest takes the last
