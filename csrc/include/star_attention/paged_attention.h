// The entry point of attention: checks the arguments and picks the kernel.
#pragma once

#include "star_attention/attention.h"

namespace star_attention {

// kAuto: a query kernel, which cuts the KV into shares and merges their results, where few rows
// make memory the bound or where a context kernel has too few tiles of rows for all
// multiprocessors; else a context kernel. On compute capability 9.0 those of sm_90, but the query
// kernel of sm_80 where memory is the bound; those of sm_80 on any other from 8.0 on. The rest is
// for benchmarks and tests.
enum class AttentionKernel { kAuto, kContextSm80, kContextSm90, kQuerySm80, kQuerySm90 };

// Throws std::invalid_argument if the call would not be valid; the call itself checks too.
STAR_ATTENTION_EXPORT void check(const PagedAttentionParams& params);

// Bytes of device memory that a call needs. Depends on the host-side sizes only, so a workspace
// stays valid for graph replays; its contents do not matter before or after a call.
STAR_ATTENTION_EXPORT size_t paged_attention_workspace(
    const PagedAttentionParams& params, AttentionKernel kernel = AttentionKernel::kAuto);

// The most that kAuto needs for up to params.max_q_len rows a sequence, however many sequences and
// tokens there are.
STAR_ATTENTION_EXPORT size_t most_paged_attention_workspace(PagedAttentionParams params);

STAR_ATTENTION_EXPORT void paged_attention(const PagedAttentionParams& params, void* workspace,
                                           size_t workspace_bytes, cudaStream_t stream,
                                           AttentionKernel kernel = AttentionKernel::kAuto);

}  // namespace star_attention
