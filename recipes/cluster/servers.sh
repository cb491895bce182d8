#!/usr/bin/env bash
#SBATCH --job-name=tessy-server
#SBATCH --gpus-per-task=1
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
# One task of an array runs one vLLM server, and is in LIST for as long as it answers:
#   sbatch --array=0-3 servers.sh LIST PORT MODEL [options of vllm serve]
# LIST is what base_url: file://LIST of a recipe names. A server that is told to end leaves the list two minutes before.
# The middleware is there after `pip install --no-deps tessy-hf` beside vLLM; leave it out where that cannot be.
set -euo pipefail
list=$1 port=$2 model=$3
shift 3
address=http://${SLURMD_NODENAME:-$(hostname)}:$port/v1

change() { # rewrites the list in one step, so that nobody reads half of it
  (
    flock 9
    touch "$list"
    { grep -vxF "$address" "$list" || true; [ "$1" = leave ] || echo "$address"; } >"$list.new"
    mv "$list.new" "$list"
  ) 9>"$list.lock"
}

vllm serve "$model" --port "$port" --enable-scale-out --enable-prompt-tokens-details \
  --scheduling-policy priority --middleware tessy_hf.vllm_middleware.Deltas "$@" &
server=$!
trap 'change leave; sleep "${DRAIN_SECONDS:-60}"; kill "$server"' TERM INT
trap 'change leave' EXIT
until curl --silent --fail --output /dev/null "http://localhost:$port/health"; do
  kill -0 "$server"
  sleep 5
done
change join
wait "$server"
