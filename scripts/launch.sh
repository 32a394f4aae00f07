#!/usr/bin/env bash
# One run on several machines: start this on each of them, with the same arguments.
#   NODES=2 HEAD=node-a scripts/launch.sh experiment=llama_8b data.path=/shared/tokens parallel=fsdp
# Each machine prepares the data as scripts/train.sh does, and looks at configuration, data and itself:
# what cannot run is said in one line, with status 2, and the others wait up to 10 minutes for that
# machine. Torchrun then starts one process per GPU; the machines meet at HEAD. The run folder
# (run_dir, default runs/...) must lie on a file system that all of them share. The same command goes
# on where a run stopped.
#   --check   as the first word: look at all that and stop
#   NODES     machines (default 1), or 2:4: as many as there are, at least two; one that is lost is
#             left out or replaced, one that comes is taken in
#   HEAD      name or address of one of them, which must last: the machines find each other there
#   GPUS      processes of this machine (default: its GPUs; a number where there are none), and, as
#             is taken when the configuration is checked, of each of the others
#   PORT      of HEAD (default 29500)           RUN_ID   another where two runs share HEAD and PORT
#   RESTARTS  starts after a process died (default 3)
#   ADDRESS   of this machine for the others, where its host name does not lead to it
# SIGTERM and SIGUSR1 reach the processes, which save the step they are at and end; torchrun then
# reports the signal and ends with 1. ended.json in the run folder says that all was saved.
set -euo pipefail
case " $* " in *" --help "* | *" -h "*) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit ;; esac
only=
[ "${1:-}" != --check ] || { only=1; shift; }
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
nodes=${NODES:-1} head=${HEAD:-}
[[ $nodes =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]] ||
  { echo "launch: NODES=$nodes must be a whole number, 1 or more, or two of them like 2:4" >&2; exit 2; }
if [ -z "$head" ]; then
  [ "$nodes" = 1 ] || { echo "launch: NODES=$nodes need HEAD, the name of one of them" >&2; exit 2; }
  head=localhost
fi
venv=${FLASHTRAIN_VENV:-$root/.venv}
[ -x "$venv/bin/torchrun" ] ||
  { echo "launch: there is no virtual environment in $venv: scripts/setup_venv.sh makes it" >&2; exit 2; }
gpus=${GPUS:-$("$venv/bin/python" -c 'import torch; print(torch.cuda.device_count())')}
[ "$gpus" != 0 ] ||
  { echo "launch: PyTorch sees no GPU here: say in GPUS how many processes are to run on the CPU" >&2; exit 2; }
[[ $gpus =~ ^[1-9][0-9]*$ ]] || { echo "launch: GPUS=$gpus must be a whole number, 1 or more" >&2; exit 2; }
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}  # seconds to save in
# torchrun 2.13 tells a machine that comes later nothing of the store it shares with the workers, and
# both wait until they give up; without sharing it does
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
# what cannot run is said once, here: each of the workers and each of their starts would say it again
"$venv/bin/python" -m flashtrain.launch --check "${nodes%%:*}" --nproc "$gpus" "$@" || exit
[ -z "$only" ] || exit 0
exec "$venv/bin/torchrun" \
  --nnodes "$nodes" --nproc-per-node "${GPUS:-gpu}" --max-restarts "${RESTARTS:-3}" \
  --rdzv-backend c10d --rdzv-endpoint "$head:${PORT:-29500}" --rdzv-id "${RUN_ID:-flashtrain}" \
  --rdzv-conf keep_alive_interval=1,keep_alive_max_attempt=5,last_call_timeout=5 \
  ${ADDRESS:+--local-addr "$ADDRESS"} \
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
  -m flashtrain.train "$@"
