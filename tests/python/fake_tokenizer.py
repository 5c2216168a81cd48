"""A tokenizer whose tokens are bytes, for tests of the front; a template after Llama 3's."""

import codecs

import numpy as np

from star_attention.errors import UserError
from star_attention.models.tokenizer import Chat

BEGIN, END, TURN = 256, 257, 258
ROLES = ("system", "user", "assistant")


class ByteTokenizer:
    vocab_size = 259
    eos_token_ids = (END,)

    def __init__(self, uses_chat=True):
        self.uses_chat = uses_chat

    def text_tokens(self, text):
        return np.array([BEGIN, *text.encode()], np.int32)

    def context_tokens(self, text):
        return self.text_tokens(text).tolist()

    def least_tokens(self, text):
        return len(text) // 2

    def chat(self, messages):
        if not self.uses_chat:
            raise UserError("the model has no chat template")
        if messages[-1].role == "user" and not "".join(messages[-1].parts).strip():
            raise UserError("the last message of the user is empty: ask something")
        token_ids, starts = [BEGIN], []
        for message in messages:
            assert message.role in ROLES
            token_ids += [TURN, *message.role.encode(), 10]
            places, is_empty = [], True
            for part in map(str.strip, message.parts):
                if part and not is_empty:
                    token_ids.append(10)
                places.append(len(token_ids))
                token_ids += part.encode()
                is_empty = is_empty and not part
            starts.append(tuple(places))
            token_ids.append(END)
        token_ids += [TURN, *b"assistant", 10]
        return Chat(np.array(token_ids, np.int32), tuple(starts))

    def decode(self, tokens):
        return bytes(token for token in tokens if token < 256).decode(errors="replace")

    def decoder(self):
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return lambda token: decoder.decode(bytes([token] if token < 256 else []))

    def token_bytes(self, token):
        return bytes([token]) if token < 256 else f"<{token}>".encode()

    def token_text(self, token):
        return self.token_bytes(token).decode(errors="replace")
