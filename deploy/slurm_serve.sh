#!/usr/bin/env bash
# A server over several nodes of a Slurm cluster: ENGINE=/shared/engine sbatch deploy/slurm_serve.sh
# The page and the API are on the first node; who is elsewhere reaches them through it:
#   ssh -L 8000:localhost:8000 FIRST_NODE
# Arguments go to star-attn serve.
#SBATCH --job-name=star-attention-serve
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=08:00:00
#SBATCH --signal=B:TERM@90
set -euo pipefail
source "$SLURM_SUBMIT_DIR/scripts/setup_env.sh"
cd "$repository"
echo "http://$(hostname):8000, from $(hostname) itself"

mpirun -n "$SLURM_NTASKS" --map-by "ppr:$SLURM_NTASKS_PER_NODE:node" --bind-to none \
  star-attn serve --engine_dir "${ENGINE:?set it to an engine folder that all nodes see}" \
  --context-dir "${CONTEXTS:-$HOME/star-attention-contexts}" --shutdown-timeout 60 "$@" &
mpirun=$!

# The front, a child of rank 0, sees requests in flight to their end. mpirun itself would end the ranks.
stop() {
  kill -TERM "$(pgrep -f 'star_attention serve' -P "$(pgrep -d, -P "$mpirun")")"
}
trap stop TERM
wait "$mpirun" || wait "$mpirun"
