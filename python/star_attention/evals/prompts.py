"""From a sample to the text of a prompt and its number of tokens."""

from __future__ import annotations

from pathlib import Path

from star_attention.evals.sample import Sample
from star_attention.models.tokenizer import Template, Tokenizer


class PromptTokenizer(Tokenizer):
    """Writes the chat template and the answer prefix around samples, and counts tokens.

    The template is part of the texts, so the model reads them with `LLM(template="written")`: the
    answer prefix stands behind the template's closing, where the model's turn begins.

    Args:
        path: a Hugging Face folder or a GGUF file.
        template: `chat`, `none` (base models), or `auto`: `chat` where the model has a template.

    Raises:
        UserError: there is no tokenizer, or no chat template where one is asked for.
    """

    def __init__(self, path: Path, template: Template = "auto") -> None:
        super().__init__(path, template)
        self._is_written, self.uses_chat = True, False
        if self._tokenizer("").input_ids:  # it writes the opening token itself
            self._opening = self._opening.removeprefix(self._tokenizer.bos_token)

    def context(self, sample: Sample) -> str:
        return self._opening + sample.context

    def query(self, sample: Sample) -> str:
        return sample.query + self._closing + sample.answer_prefix

    def count(self, sample: Sample) -> int:
        """Tokens of the whole prompt."""
        context = self.context_tokens(self.context(sample))
        return len(context) + len(self.question_tokens(self.query(sample)))
