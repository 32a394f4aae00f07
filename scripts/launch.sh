#!/usr/bin/env bash
# One run on several machines: start this on each of them, with the same arguments.
#   NODES=2 HEAD=node-a scripts/launch.sh experiment=llama_8b data.path=/shared/tokens parallel=fsdp
# Torchrun starts one process per GPU; the machines meet at HEAD. The run folder (run_dir, default
# runs/...) must lie on a file system that all of them share. The same command goes on where a run
# stopped.
#   NODES     machines (default 1)              HEAD     name or address of one of them
#   GPUS      processes of this machine (default: its GPUs; a number where there are none)
#   PORT      of HEAD (default 29500)           RUN_ID   another where two runs share HEAD and PORT
#   RESTARTS  starts after a process died (default 3)
#   ADDRESS   of this machine for the others, where its host name does not lead to it
# SIGTERM and SIGUSR1 reach the processes, which save the step they are at and end; torchrun then
# reports the signal and ends with 1. ended.json in the run folder says that all was saved.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
nodes=${NODES:-1} head=${HEAD:-}
[[ $nodes =~ ^[1-9][0-9]*$ ]] || { echo "launch: NODES=$nodes must be a whole number, 1 or more" >&2; exit 2; }
if [ -z "$head" ]; then
  [ "$nodes" = 1 ] || { echo "launch: NODES=$nodes need HEAD, the name of one of them" >&2; exit 2; }
  head=localhost
fi
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}  # seconds to save in
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "${FLASHTRAIN_VENV:-$root/.venv}/bin/torchrun" \
  --nnodes "$nodes" --nproc-per-node "${GPUS:-gpu}" --max-restarts "${RESTARTS:-3}" \
  --rdzv-backend c10d --rdzv-endpoint "$head:${PORT:-29500}" --rdzv-id "${RUN_ID:-flashtrain}" \
  ${ADDRESS:+--local-addr "$ADDRESS"} \
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
  -m flashtrain.train "$@"
