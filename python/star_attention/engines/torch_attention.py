"""The attention of one forward pass in torch: this rank's kernels plus what the ranks exchange."""

from __future__ import annotations

import numpy as np
import torch

from star_attention import ops
from star_attention.distributed import Communicator
from star_attention.engines.base import AttentionStep, PagedStep, RingStep


class PagedAttention:
    """A `PagedStep` on a device: called once a layer, with the layer's pool already written."""

    def __init__(
        self, step: PagedStep, comm: Communicator, scale: float, device: torch.device
    ) -> None:
        self._comm = comm if comm.size > 1 else None
        self._merge = step.merge
        self._shared = None
        if step.shared_pages is not None:
            self._shared = to_device(step.shared_pages, device)
        self._kernel = _Kernel(
            step.page_table, step.cu_seqlens_q, step.kv_lens, step.causal, scale, device
        )

    def __call__(self, q: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
        """q [T, Hq, D] over pool [num_pages, 2, Hkv, tokens_per_block, D]; [T, Hq, D]."""
        if self._shared is not None and self._comm:
            pages = pool[self._shared]
            self._comm.broadcast(pages)
            if self._comm.rank:
                pool[self._shared] = pages
        o, lse = self._kernel(q, pool)
        if self._merge and self._comm:
            return merge_over_ranks(self._comm, o, lse)
        return o


class RingAttention:
    """A `RingStep` on a device. While this rank attends to one rank's pages, they travel on to the
    next rank and the previous rank's arrive.

    Source: Ring Attention, arXiv 2310.01889, section 3.
    """

    def __init__(
        self, step: RingStep, comm: Communicator, scale: float, device: torch.device
    ) -> None:
        self._comm = comm
        self._pages = to_device(step.pages, device)
        self._hops = [
            (
                hop.num_pages,
                _Kernel(hop.page_table, step.cu_seqlens_q, hop.kv_lens, hop.causal, scale, device),
            )
            for hop in step.hops
        ]

    def __call__(self, q: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
        """q [T, Hq, D] over every rank's pages; [T, Hq, D]."""
        comm = self._comm
        here = pool[self._pages]
        merged = None
        for hop, (_, kernel) in enumerate(self._hops):
            request = None
            if hop + 1 < len(self._hops):
                arriving = pool.new_empty(self._hops[hop + 1][0], *pool.shape[1:])
                request = comm.exchange(
                    here, (comm.rank + 1) % comm.size, arriving, (comm.rank - 1) % comm.size
                )
            o, lse = kernel(q, here)
            if merged is None:
                merged = o.float(), lse
            else:
                merged = ops.merge_lse(
                    torch.stack((merged[0], o.float())), torch.stack((merged[1], lse))
                )
            if request:
                request.wait()
                here = arriving
        assert merged is not None
        return merged[0].to(q.dtype)


def attention_on(
    step: AttentionStep, comm: Communicator, scale: float, device: torch.device
) -> PagedAttention | RingAttention:
    """The attention that `step` describes, ready on `device`."""
    kind = RingAttention if isinstance(step, RingStep) else PagedAttention
    return kind(step, comm, scale, device)


def merge_over_ranks(comm: Communicator, o: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """Attention over all ranks' keys from each rank's o [T, Hq, D] and lse [T, Hq]; o's dtype."""
    partial = torch.cat((o.float(), lse[..., None]), dim=-1)
    partials = partial.new_empty(comm.size, *partial.shape)
    comm.all_gather(partial, partials)
    return ops.merge_lse(partials[..., :-1], partials[..., -1])[0].to(o.dtype)


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)


class _Kernel:
    """`ops.paged_attention` with its tables on the device and its bounds known."""

    def __init__(
        self,
        page_table: np.ndarray,
        cu_seqlens_q: np.ndarray,
        kv_lens: np.ndarray,
        causal: bool,
        scale: float,
        device: torch.device,
    ) -> None:
        self._tables = [to_device(table, device) for table in (page_table, cu_seqlens_q, kv_lens)]
        self._options = {
            "causal": causal,
            "scale": scale,
            "max_q_len": int(np.diff(cu_seqlens_q).max(initial=0)),
            "max_kv_len": int(kv_lens.max(initial=0)),
        }

    def __call__(self, q: torch.Tensor, pool: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return ops.paged_attention(q, pool, *self._tables, **self._options)
