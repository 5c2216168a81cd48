#!/usr/bin/env bash
# Star Attention with a small real model over four MPI ranks on this machine's CPU cores.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
exec python "$repository/scripts/demo.py" "$@"
