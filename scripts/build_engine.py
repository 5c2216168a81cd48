#!/usr/bin/env python3
"""Builds a TensorRT engine for 128K contexts in blocks of 32K; a start for your own script.

python scripts/build_engine.py ~/Llama-3.1-8B-Instruct engines/llama-3.1-8b
"""

import sys
from pathlib import Path

from star_attention.engines.tensorrt.build import BuildOptions, build_engine
from star_attention.engines.tensorrt.folder import EngineLimits

model, folder = map(Path, sys.argv[1:])
limits = EngineLimits(
    max_batch_size=4,
    max_input_len=128 * 1024,
    max_seq_len=129 * 1024,
    max_num_tokens=64 * 1024,  # a block and, with anchor mode recompute, its anchor
    block_size=32 * 1024,
)
build_engine(model, folder, limits, BuildOptions(dtype="float16"), on_progress=print)
