"""Settings of the HTTP front."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class ServeOptions:
    """How the front serves; the command line's options of the same names.

    Attributes:
        model_names: what clients may call the model; the first is what answers call it.
        host: the address that the server is bound to. On loopback, requests must name a loopback
            host or one of `allowed_hosts`, so that a web site cannot reach it by rebinding DNS.
        block_tokens: a question longer than this is divided: its end is asked, the rest is read.
        max_tokens: of an answer, unless the request says otherwise.
        max_context_tokens: of a context; None: what the engine allows.
        max_queue: answers and contexts that are waited for at once; further ones get a 429.
        max_body_mib: of a request's body.
        request_timeout: seconds a request may take in all.
        body_timeout: seconds its head, and then its body, may take to arrive.
        client_timeout: seconds a client may leave a stream unread.
        api_keys: any of them opens the API; none: it is open.
        allowed_hosts: host names, beside loopback's, under which browsers reach the server.
        cors_origins: web sites whose pages may use the API, such as `https://example.org`.
        context_dir: named contexts are saved in its folder `contexts`; None: not saved.
        max_contexts: named contexts at most.
    """

    model_names: tuple[str, ...]
    host: str = "127.0.0.1"
    block_tokens: int = 4096
    max_tokens: int = 1024
    max_context_tokens: int | None = None
    max_queue: int = 256
    max_body_mib: float = 32.0
    request_timeout: float = 600.0
    body_timeout: float = 60.0
    client_timeout: float = 30.0
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    context_dir: Path | None = None
    max_contexts: int = 64

    @property
    def max_body_bytes(self) -> int:
        return int(self.max_body_mib * 2**20)
