#!/usr/bin/env bash
# The runs behind docs/accuracy.md: RULER with SmolLM2-135M-Instruct on one GPU, dense and Star
# Attention with several block and anchor sizes. Some samples come first, one configuration after the
# other, and are timed; the rest follows, all configurations at the same time, without times.
#
#   scripts/accuracy.sh [RESULTS [OPTION ...]]
#
# Options are those of star-attn eval ruler: `scripts/accuracy.sh out --samples 100` takes more
# samples. A run that was stopped goes on when it is started again.
set -euo pipefail
results=${1:-results/accuracy}
ruler=(python3 -m star_attention eval ruler --model smollm2 --device cuda --kv-cache-gib 1
  --tokens-per-block 64 --results "$results" --no-report)

timed=("${ruler[@]}" --lengths 8192 --tasks vt --samples 24)
"${timed[@]}" --attention dense,star --anchor-size block,half,quarter,page,0 "${@:2}"
"${timed[@]}" --attention star --block-size half,eighth "${@:2}"

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # the processes share the cores
xargs --max-procs 8 --max-lines=1 "${ruler[@]}" --lengths 4096,1024,8192,2048 --samples 50 \
  --tasks niah_single_1,niah_single_2,niah_single_3,niah_multikey_1,niah_multivalue,vt,cwe,fwe \
  --no-times "${@:2}" <<'METHODS'
--attention dense
--attention star --block-size quarter --anchor-size block
--attention star --block-size quarter --anchor-size half
--attention star --block-size quarter --anchor-size quarter
--attention star --block-size quarter --anchor-size page
--attention star --block-size quarter --anchor-size 0
--attention star --block-size half --anchor-size block
--attention star --block-size eighth --anchor-size block
METHODS
python3 -m star_attention eval report "$results"
