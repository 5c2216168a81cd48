"""A model that reads a context in phase 1 under any attention and answers over all of its KV."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch

from star_attention.distributed import SingleProcess
from star_attention.engines.torch.attention import Attention, PagedTables
from star_attention.engines.torch.operators import PassInputs, TorchOperators
from star_attention.errors import UserError
from star_attention.models.checkpoint import find_model, open_checkpoint
from star_attention.models.decoder import decode
from star_attention.models.loading import load_weights
from star_attention.models.rotary import rotary_table
from star_attention.models.weights import weight_table

PAGE = 128


class Reader:
    """Contexts of a batch and their KV pages.

    Args:
        batch: contexts at a time.
        length: tokens of context, question and answer at most.
    """

    def __init__(self, model: str, device: str, batch: int, length: int) -> None:
        self.device = torch.device(device)
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        checkpoint = open_checkpoint(find_model(model))
        self.config = checkpoint.config
        if self.config.rope.rows_per_position > 1:
            raise UserError("the study does not know longrope, whose rotation depends on the text")
        with ThreadPoolExecutor() as threads:  # dequantising takes longer than all the rest
            table = weight_table(self.config)
            tensors = {weight: threads.submit(checkpoint.tensor, weight) for weight in table}
            read = replace(checkpoint, tensor=lambda weight: tensors.pop(weight).result())
            self._weights = load_weights(read, self.dtype, self.device)
        self.scale = self.config.head_dim**-0.5
        self._pages = -(-length // PAGE) + 1
        shape = self.config.kv_shape(batch * self._pages, PAGE)
        # Zeros: what a page holds behind its tokens is masked, but must be finite.
        self._pool = torch.zeros(shape, dtype=self.dtype, device=self.device)
        self._rotary = rotary_table(
            self.config.rope, self.config.head_dim, self._pages * PAGE, self.device
        )

    @torch.inference_mode()
    def read(self, place: int, tokens: np.ndarray, attention: Attention, unit: int) -> None:
        """Phase 1 of the batch's context `place`, padded to a multiple of `unit` tokens."""
        padded = np.pad(tokens, (0, -len(tokens) % unit))
        ids = self._int32(padded)
        rows = torch.arange(len(padded), dtype=torch.int32, device=self.device)
        inputs = PassInputs(ids, rows, rows, rows[:0])
        pool = self._pool[:, place * self._pages : (place + 1) * self._pages]
        self._decode(inputs, pool, attention)

    @torch.inference_mode()
    def answer(
        self,
        lengths: Sequence[int],
        questions: Sequence[np.ndarray],
        max_tokens: int,
        ends: frozenset[int],
    ) -> list[list[int]]:
        """Greedy answers to a question for each of the batch's contexts, without the ending token.

        Args:
            lengths: of the contexts that were read.
            ends: tokens that end an answer.
        """
        count = len(lengths)
        sizes = np.array([len(question) for question in questions])
        starts = np.concatenate(([0], sizes.cumsum()))
        positions = np.concatenate(
            [length + np.arange(size) for length, size in zip(lengths, sizes, strict=True)]
        )
        places = np.arange(count).repeat(sizes)
        table = self._int32(np.arange(count * self._pages).reshape(count, -1))
        kv_lens = np.array(lengths) + sizes
        tables = self._tables(table, starts, kv_lens, int(sizes.max()))
        offset = places * self._pages * PAGE
        inputs = PassInputs(
            *map(self._int32, (np.concatenate(questions), positions, positions + offset)),
            self._int32(starts[1:] - 1),
        )
        logits = self._decode(inputs, self._pool, self._attention(tables))
        answers = [logits.argmax(-1)]
        ended = torch.zeros(count, dtype=torch.bool, device=self.device)
        endings = torch.tensor(sorted(ends), device=self.device)
        next_positions = self._int32(kv_lens)
        offsets = self._int32(np.arange(count) * self._pages * PAGE)
        for step in range(1, max_tokens):
            ended |= torch.isin(answers[-1], endings)
            if step % 8 == 0 and bool(ended.all()):
                break
            tables = PagedTables(
                table,
                torch.arange(count + 1, dtype=torch.int32, device=self.device),
                next_positions + 1,
                True,
                1,
                int(kv_lens.max()) + step,
            )
            inputs = PassInputs(answers[-1].int(), next_positions, next_positions + offsets, None)
            answers.append(self._decode(inputs, self._pool, self._attention(tables)).argmax(-1))
            next_positions = next_positions + 1
        found = torch.stack(answers, 1).tolist()
        return [_before_end(tokens, ends) for tokens in found]

    def _decode(
        self, inputs: PassInputs, pool: torch.Tensor, attention: Attention
    ) -> torch.Tensor | None:
        operators = TorchOperators(
            self.config, inputs, pool, self._rotary, attention, SingleProcess()
        )
        return decode(operators, self._weights)

    def _attention(self, tables: PagedTables) -> Attention:
        return Attention([tables], SingleProcess(), self.scale)

    def _tables(
        self, table: torch.Tensor, starts: np.ndarray, kv_lens: np.ndarray, most: int
    ) -> PagedTables:
        begins, lens = self._int32(starts), self._int32(kv_lens)
        return PagedTables(table, begins, lens, True, most, int(kv_lens.max()))

    def _int32(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.asarray(values, np.int32)).to(self.device)


def _before_end(tokens: list[int], ends: frozenset[int]) -> list[int]:
    end = next((index for index, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:end]
