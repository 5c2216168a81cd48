#!/usr/bin/env bash
# Lint and tests; also compiles the CUDA kernels where nvcc is found (not with STAR_ATTENTION_CUDA=0).
# `scripts/test.sh` needs no GPU, `scripts/test.sh --gpu` runs what does. Further arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
cd "$repository"
if [ "$venv" != none ] && [ "${STAR_ATTENTION_CUDA:-}" != 0 ] && command -v nvcc >/dev/null; then
  once kernels csrc plugin cmake CMakeLists.txt setup.py -- build_kernels
fi
if [ "${1:-}" = --gpu ]; then
  shift
  exec python -m pytest tests/gpu "$@"
fi
ruff check .
ruff format --check .
find csrc plugin tests/cpp \( -name '*.cpp' -o -name '*.cu*' -o -name '*.h' \) \
  -exec clang-format --dry-run -Werror {} +
exec python -m pytest "$@"
