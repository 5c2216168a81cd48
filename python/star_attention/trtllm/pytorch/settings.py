"""Star Attention's settings in TensorRT-LLM, which hands no options of others to its ranks: they
are environment variables. Their names begin as TensorRT-LLM's own do."""

from __future__ import annotations

import os
from dataclasses import dataclass

from star_attention.config import StarConfig
from star_attention.errors import UserError

PREFIX = "TRTLLM_STAR_"
QUERY_SIZE = 1024


@dataclass(frozen=True)
class Settings:
    """Tokens; None: `StarConfig`'s default.

    Attributes:
        query_size: tokens at the end of a prompt that see all of it, at least 1.
    """

    block_size: int | None = None
    anchor_size: int | None = None
    query_size: int = QUERY_SIZE

    @classmethod
    def from_environment(cls) -> Settings:
        """Raises UserError where a variable is no number of tokens."""
        given = {name: os.environ.get(PREFIX + name.upper()) for name in vars(cls())}
        for name, text in given.items():
            least = 0 if name == "anchor_size" else 1
            if text is not None and not (text.isdecimal() and int(text) >= least):
                raise UserError(
                    f"{PREFIX}{name.upper()} is {text!r}: use a number of tokens, {least} or more"
                )
        return cls(**{name: int(text) for name, text in given.items() if text is not None})

    def on_pages(self, page: int) -> tuple[StarConfig, int]:
        """With pages of so many tokens; and `query_size`.

        Raises:
            UserError: the sizes are no multiples of a page.
        """
        config = StarConfig(
            self.block_size, self.anchor_size, anchor_mode="local", tokens_per_block=page
        )
        return config, self.query_size
