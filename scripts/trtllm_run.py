#!/usr/bin/env python3
"""Star Attention with TensorRT-LLM's own Session: one GPU, one question, the likeliest tokens. What
`star-attn ask --engine_dir` does over ranks, in a page; a start for a runtime of your own.

python scripts/trtllm_run.py engines/llama report.txt "Who wrote it?"
"""

import sys
from pathlib import Path

import numpy as np
import torch
from tensorrt_llm.runtime import Session

from star_attention.config import StarConfig
from star_attention.engines.tensorrt.folder import ROTARY, plan_file
from star_attention.engines.tensorrt.library import load_tensorrt
from star_attention.engines.tensorrt.read import read_engine_config
from star_attention.models.tokenizer import Tokenizer
from star_attention.plan import make_plan

DEVICE = "cuda"


class Engine:
    """The engine of `folder` with a KV pool for `num_tokens` tokens, whose slot is their place."""

    def __init__(self, folder, num_tokens):
        self.config = read_engine_config(folder)
        model, self.page = self.config.model, self.config.limits.tokens_per_block
        trt = load_tensorrt()
        trt.register_plugins()  # where Session looks for them
        self.session = Session.from_serialized_engine(plan_file(folder).read_bytes())
        rotary = np.fromfile(folder / ROTARY, np.float32).reshape(-1, model.head_dim)
        self.rotary = torch.from_numpy(rotary).to(DEVICE)
        self.pages = list(range(-(-num_tokens // self.page)))
        self.pool = torch.zeros(
            *(model.num_layers, len(self.pages), 2, model.num_kv_heads, self.page, model.head_dim),
            dtype=torch.int16,  # only the kernels know that it is float16 or bfloat16
            device=DEVICE,
        )
        heads = {"num_q_heads": model.num_q_heads, "num_kv_heads": model.num_kv_heads}
        most = self.config.limits.max_num_tokens
        size = trt.step_workspace_bytes(
            **heads, head_dim=model.head_dim, max_q_len=most, max_merge_tokens=0, device=0
        )
        self.context = trt.StepContext(
            kv_pool=self.pool,
            causal=True,
            max_q_len=most,
            max_kv_len=num_tokens,
            attending_layers=model.num_layers,
            workspace=torch.empty(size, dtype=torch.uint8, device=DEVICE),
        )

    def step(self, tokens, begin, pages):
        """`tokens` from position `begin` on see `pages`, the last of which are their own; returns
        the last one's logits."""
        count = len(tokens)
        places = np.arange(begin, begin + count)
        seen = (len(pages) - 1) * self.page + (begin + count - 1) % self.page + 1
        values = {
            "input_ids": tokens,
            "position_ids": places,
            "slot_mapping": places,
            "cu_seqlens_q": [0, count],
            "kv_lens": [seen],
            "page_table": [pages],
            "logit_rows": [count - 1],
        }
        inputs = {
            name: torch.tensor(np.array(value, np.int32), device=DEVICE)
            for name, value in values.items()
        }
        inputs["rotary"] = self.rotary
        address = torch.tensor([self.context.address], dtype=torch.int64)  # stays on the host
        inputs["runtime_context"] = address.view(torch.int32)
        logits = torch.empty(1, self.config.model.vocab_size, device=DEVICE)
        self.session.set_shapes(inputs)
        stream = torch.cuda.current_stream()
        if not self.session.run(inputs, {"logits": logits}, stream.cuda_stream):
            raise SystemExit("TensorRT failed: see its messages")
        stream.synchronize()
        return logits[0]


def main(folder, text, question, max_tokens=128):
    tokenizer = Tokenizer(folder)
    context = tokenizer.context_tokens(text)
    asked = tokenizer.question_tokens(question)
    engine = Engine(folder, len(context) + len(asked) + max_tokens)
    page, limits = engine.page, engine.config.limits
    plan = make_plan(len(context), limits.divide(StarConfig(tokens_per_block=page)), num_ranks=1)
    for block in plan.blocks:  # phase 1
        prefix = engine.pages[: block.prefix // page]
        own = engine.pages[block.start // page : -(-block.end // page)]
        engine.step(context[block.start : block.end], block.start, prefix + own)

    ends = {*engine.config.model.eos_token_ids, *tokenizer.eos_token_ids}
    answer, new, begin = [], asked, len(context)  # phase 2
    while len(answer) < max_tokens:
        pages = engine.pages[: -(-(begin + len(new)) // page)]
        token = int(engine.step(new, begin, pages).argmax())
        if token in ends:
            break
        begin, new = begin + len(new), [token]
        answer.append(token)
    print(tokenizer.decode(answer))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]).read_text(), sys.argv[3])
