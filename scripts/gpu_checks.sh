#!/usr/bin/env bash
# All that guards the CUDA code, on a machine with a GPU: scripts/gpu_checks.sh [PART ...], see --help.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
cd "$repository"
if [ "$venv" != none ] && command -v nvcc >/dev/null; then
  once kernels csrc plugin cmake CMakeLists.txt setup.py -- build_kernels
fi
exec python3 scripts/gpu_checks.py "$@"
