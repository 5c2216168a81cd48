"""Run alone or under mpirun: answers of the model in a folder, printed by rank 0."""

import sys

from star_attention import LLM, SamplingParams, StarConfig
from test_llm import QUESTION, TEXT

llm = LLM(sys.argv[1], StarConfig(block_size=128, tokens_per_block=32, kv_placement="round_robin"))
for mode in ("recompute", "local", "broadcast"):
    config = StarConfig(block_size=128, anchor_mode=mode, kv_placement="round_robin")
    context = llm.encode(TEXT, config)
    answers = [llm.ask(context, QUESTION, SamplingParams(max_tokens=40))]
    sampled = SamplingParams(max_tokens=20, temperature=0.9, top_k=50, seed=3)
    answers += llm.ask(context, [QUESTION, "When does it close?"], sampled)
    print(*answers, sep="\n")
