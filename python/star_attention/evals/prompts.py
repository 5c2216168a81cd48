"""From a sample to its number of tokens."""

from __future__ import annotations

from star_attention.evals.sample import Sample
from star_attention.models.tokenizer import Tokenizer


class PromptTokenizer(Tokenizer):
    """Counts tokens of samples. Their prompts are those of `star-attn ask`: the context, the query,
    and, in the model's turn, the answer prefix."""

    def count(self, sample: Sample) -> int:
        """Tokens of the whole prompt."""
        question = self.question_tokens(sample.query, sample.answer_prefix)
        return len(self.context_tokens(sample.context)) + len(question)
