#!/usr/bin/env bash
# The latency benchmark on several nodes of a Slurm cluster: sbatch scripts/slurm_multinode.sh
# Any star-attn command runs the same way. Merges inside a node go over NVLink peer memory only if all
# ranks are on it; over several nodes NCCL does all.
#SBATCH --job-name=star-attention
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=00:30:00
set -euo pipefail
source "$SLURM_SUBMIT_DIR/scripts/setup_env.sh"
cd "$repository"
mpirun -n "$SLURM_NTASKS" --map-by "ppr:$SLURM_NTASKS_PER_NODE:node" --bind-to none \
  python scripts/bench_latency.py --methods broadcast recompute ring --lengths 256K 1M \
  --output "benchmarks/results/latency_${SLURM_JOB_ID}.json"
