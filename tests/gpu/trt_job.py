"""Run under mpirun: what a model or an engine answers in every anchor mode.

trt_job.py MODEL TEXT_FILE DTYPE MODES
"""

import json
import sys
from pathlib import Path

from star_attention import LLM, SamplingParams, StarConfig

QUESTIONS = ["What is the magic number?", "Which colour has the sky?"]


def main():
    model, text, dtype, modes = sys.argv[1:]
    options = {"device": "cuda", "dtype": dtype, "kv_cache_gib": 1}
    llm = LLM(model, StarConfig(block_size=512, tokens_per_block=64), **options)
    answers = {}
    for mode in modes.split(","):
        config = StarConfig(block_size=512, anchor_mode=mode, tokens_per_block=64)
        context = llm.encode(Path(text).read_text(), config)
        params = SamplingParams(max_tokens=24)
        together = llm.ask(context, QUESTIONS, params)
        alone = llm.ask(context, QUESTIONS[0], params)
        answers[mode] = [answer.token_ids for answer in (*together, alone)]
        context.release()
    print(json.dumps({"answers": answers, "text": alone.text}))


main()
