#!/usr/bin/env bash
# Contexts in 8 bits on this machine's GPUs: tests, the kernels' speed, and decode steps.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD/python:$PWD/tests/python
out=${OUT:-/tmp}
python3 -m pytest -q tests/gpu/test_quantized_pages.py tests/gpu/test_query_attention.py \
  tests/gpu/test_kv_engine.py tests/gpu/test_page_copies.py 2>&1 | tail -40
python3 scripts/bench_attention.py --phases quantized quantizing \
  --output "$out/attention_8bit.json" 2>&1 | tail -25
ranks=$(($(nvidia-smi -L | wc -l) > 1 ? 2 : 1))
for kv_dtype in auto fp8 int8; do
  echo "kv_dtype $kv_dtype"
  python3 scripts/bench_latency.py --methods broadcast --lengths 128K --block-size 32K \
    --layers 8 --ranks "$ranks" --kv-dtype "$kv_dtype" \
    --output "$out/latency_$kv_dtype.json" 2>&1 | tail -8
done
