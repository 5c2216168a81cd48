#!/usr/bin/env bash
# Public headers of TensorRT's releases, for tests/python/test_tensorrt_headers.py:
#   scripts/tensorrt_headers.sh FOLDER && TENSORRT_HEADERS=FOLDER scripts/test.sh
# TENSORRT_GIT and ONNX_TENSORRT_GIT name mirrors of the repositories.
set -euo pipefail
folder=${1:?usage: $0 FOLDER}
tensorrt=${TENSORRT_GIT:-https://github.com/NVIDIA/TensorRT}
parser=${ONNX_TENSORRT_GIT:-https://github.com/onnx/onnx-tensorrt}

# get FOLDER REPOSITORY REVISION TREE PATH...: files of a revision, without its history.
get() {
  local to=$1 repository=$2 revision=$3
  shift 3
  git init --quiet --bare "$to/git"
  git -C "$to/git" fetch --quiet --depth 1 --filter=blob:none "$repository" "$revision"
  # A partial clone gets what is read from the repository it was made of.
  git -C "$to/git" config remote.origin.url "$repository"
  git -C "$to/git" config remote.origin.promisor true
  git -C "$to/git" archive "$@" | tar -x -C "$to"
  rm -rf "$to/git"
}

# The tag, and the parser's branch where the tag lacks its header.
while read -r tag branch; do
  [ -e "$folder/$tag/NvInfer.h" ] && continue
  mkdir -p "$folder/$tag"
  get "$folder/$tag" "$tensorrt" "refs/tags/$tag" FETCH_HEAD:include
  [ -z "$branch" ] || get "$folder/$tag" "$parser" "refs/heads/$branch" FETCH_HEAD NvOnnxParser.h
done <<END
v8.6.0 8.6-EA
v8.6.1 8.6-GA
v9.3.0 9.3
v10.0.0 10.0-GA
v10.1.0 10.1-GA
v10.14
v10.16
v11.0
v11.1
END
