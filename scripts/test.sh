#!/usr/bin/env bash
# Lint and tests. `scripts/test.sh` needs no GPU; `scripts/test.sh --gpu` runs what does.
# Further arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
cd "$repository"
if [ "${1:-}" = --gpu ]; then
  shift
  exec python -m pytest tests/gpu "$@"
fi
ruff check .
ruff format --check .
exec python -m pytest "$@"
