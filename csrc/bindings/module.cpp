// star_attention._C: the library's entry points over TensorView. Outputs are passed in, streams are
// integers, nothing synchronises. Errors of arguments become ValueError, those of CUDA
// RuntimeError.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <limits>

#include "bindings/comm.h"
#include "bindings/quantized_pages.h"
#include "bindings/tensor_view.h"
#include "common/check.h"
#include "common/device_guard.h"
#include "star_attention/layers.h"
#include "star_attention/merge.h"
#include "star_attention/paged_attention.h"
#include "star_attention/rope.h"
#include "star_attention/selection.h"

namespace star_attention {
namespace {

namespace py = pybind11;

// Makes the tensors' common device current for the call.
class DeviceScope {
 public:
  DeviceScope(const TensorView& first, std::initializer_list<const TensorView*> others)
      : guard_(first.device()) {
    for (const TensorView* tensor : others) {
      require(tensor->device() == first.device(), "device", tensor->device(),
              "every tensor on device " + std::to_string(first.device()));
    }
  }

 private:
  DeviceGuard guard_;
};

AttentionKernel kernel_named(const std::string& name) {
  if (name == "auto") return AttentionKernel::kAuto;
  if (name == "context_sm80") return AttentionKernel::kContextSm80;
  if (name == "context_sm90") return AttentionKernel::kContextSm90;
  if (name == "query_sm80") return AttentionKernel::kQuerySm80;
  if (name == "query_sm90") return AttentionKernel::kQuerySm90;
  require(false, "kernel", name, "auto, context_sm80, context_sm90, query_sm80 or query_sm90");
  return AttentionKernel::kAuto;
}

// What allocate(bytes) gives, beside `tensor`.
TensorView allocated(const py::function& allocate, size_t bytes, const TensorView& tensor) {
  const TensorView workspace("workspace", allocate(bytes));
  workspace.contiguous();
  if (bytes > 0) {
    require(workspace.device() == tensor.device(), "workspace.device", workspace.device(),
            tensor.device());
  }
  return workspace;
}

// Of 8-bit codes; uint8 stands for e4m3, which has no name in every DLPack.
DType code_dtype_of(const TensorView& codes) {
  return codes.type() == kUInt8 ? DType::kFloat8 : DType::kInt8;
}

// Calls allocate(bytes) for the workspace once the arguments are checked.
void py_paged_attention(py::object q_, py::object kv_pool_, py::object page_table_,
                        py::object cu_seqlens_q_, py::object kv_lens_, py::object other_pool_,
                        py::object kv_scales_, py::object starts_, py::object o_, py::object lse_,
                        py::function allocate, bool causal, double scale, int64_t max_q_len,
                        int64_t max_kv_len, const std::string& kernel_name, uintptr_t stream) {
  const TensorView q("q", q_), kv_pool("kv_pool", kv_pool_), page_table("page_table", page_table_),
      cu_seqlens_q("cu_seqlens_q", cu_seqlens_q_), kv_lens("kv_lens", kv_lens_),
      other_pool("other_pool", other_pool_.is_none() ? kv_pool_ : other_pool_), o("o", o_),
      lse("lse", lse_);
  q.dtype({kFloat16, kBFloat16}).rank(3).contiguous(2);
  const bool is_8bit = !kv_scales_.is_none();
  if (is_8bit) {
    kv_pool.dtype({kUInt8, kInt8}).rank(5);
  } else {
    kv_pool.dtype({q.type()}).rank(5);
  }
  const int64_t tokens = q.size(0), q_heads = q.size(1), head_dim = q.size(2);
  kv_pool.shape({-1, 2, -1, -1, head_dim}).contiguous();
  other_pool.dtype({kv_pool.type()});
  other_pool.shape({-1, 2, kv_pool.size(2), kv_pool.size(3), head_dim}).contiguous();
  const TensorView kv_scales("kv_scales", is_8bit ? kv_scales_ : lse_);
  if (is_8bit) {
    kv_scales.dtype({kFloat32}).shape({kv_pool.size(0), 2, kv_pool.size(2)}).contiguous();
  }
  const TensorView starts("starts", starts_.is_none() ? kv_lens_ : starts_);
  if (!starts_.is_none()) starts.dtype({kInt32}).shape({tokens}).contiguous();
  const bool by_head = page_table.num_dims() == 3;
  const int64_t seqs = page_table.size(0);
  page_table.dtype({kInt32});
  kv_lens.dtype({kInt32}).contiguous();
  if (by_head) {
    page_table.shape({-1, kv_pool.size(2), -1}).contiguous();
    kv_lens.shape({seqs, kv_pool.size(2)});
  } else {
    page_table.rank(2).contiguous(1);
    kv_lens.shape({seqs});
  }
  const int64_t listed = page_table.size(by_head ? 2 : 1);
  cu_seqlens_q.dtype({kInt32}).shape({seqs + 1}).contiguous();
  o.dtype({q.type(), kFloat32}).shape({tokens, q_heads, head_dim}).contiguous();
  lse.dtype({kFloat32}).shape({tokens, q_heads}).contiguous();
  const AttentionKernel kernel = kernel_named(kernel_name);
  require(max_q_len >= 0, "max_q_len", max_q_len, "at least 0");
  require(max_kv_len >= 0, "max_kv_len", max_kv_len, "at least 0");

  PagedAttentionParams p{};
  p.dtype = dtype_of(q);
  p.o_dtype = dtype_of(o);
  p.num_q_heads = to_int(q_heads, "q.shape[1]");
  p.num_kv_heads = to_int(kv_pool.size(2), "kv_pool.shape[2]");
  p.head_dim = to_int(head_dim, "q.shape[2]");
  p.tokens_per_block = to_int(kv_pool.size(3), "kv_pool.shape[3]");
  p.causal = causal;
  p.scale = static_cast<float>(scale);
  p.q = q.data();
  p.q_stride = q.stride(0, q_heads * head_dim);
  p.kv_pool = kv_pool.data();
  p.num_pages = kv_pool.size(0);
  if (is_8bit) {
    p.kv_scales = static_cast<const float*>(kv_scales.data());
    p.kv_dtype = code_dtype_of(kv_pool);
  }
  p.page_table = static_cast<const int32_t*>(page_table.data());
  p.page_table_stride =
      to_int(by_head ? listed : page_table.stride(0, listed), "page_table.stride(0)");
  p.cu_seqlens_q = static_cast<const int32_t*>(cu_seqlens_q.data());
  p.kv_lens = static_cast<const int32_t*>(kv_lens.data());
  if (!starts_.is_none()) p.starts = static_cast<const int32_t*>(starts.data());
  p.by_head = by_head;
  p.other_pool = other_pool.size(0) > 0 && !other_pool_.is_none() ? other_pool.data() : nullptr;
  p.num_other_pages = other_pool.size(0);
  p.num_seqs = to_int(seqs, "page_table.shape[0]");
  p.num_tokens = to_int(tokens, "q.shape[0]");
  p.max_q_len = to_int(std::min(max_q_len, tokens), "max_q_len");
  p.max_kv_len = to_int(max_kv_len, "max_kv_len");
  p.o = o.data();
  p.lse = static_cast<float*>(lse.data());
  check(p);
  const int64_t capacity = listed * p.tokens_per_block;
  require(max_kv_len <= capacity, "max_kv_len", max_kv_len,
          "at most the " + std::to_string(capacity) + " tokens that a row of page_table lists");

  const DeviceScope scope(q, {&kv_pool, &page_table, &cu_seqlens_q, &kv_lens, &other_pool,
                              &kv_scales, &starts, &o, &lse});
  const size_t bytes = paged_attention_workspace(p, kernel);
  const TensorView workspace = allocated(allocate, bytes, q);
  paged_attention(p, workspace.data(), workspace.bytes(), reinterpret_cast<cudaStream_t>(stream),
                  kernel);
}

template <typename Function>
void with_quantized_pages(Function function, py::object kv_pool_, py::object codes_,
                          py::object scales_, py::object pages_, py::object others_,
                          uintptr_t stream) {
  const TensorView kv_pool("kv_pool", kv_pool_), codes("codes", codes_), scales("scales", scales_),
      pages("pages", pages_), others("others", others_);
  kv_pool.dtype({kFloat16, kBFloat16});
  QuantizePagesParams p = quantize_pages_params(kv_pool, scales, pages, others);
  codes.dtype({kUInt8, kInt8}).contiguous();
  codes.shape({p.num_layers, 2 * p.num_pages, 2, p.num_kv_heads, p.tokens_per_block, p.head_dim});
  require(codes.data() == kv_pool.data(), "codes", "memory of its own", "that of kv_pool");
  p.dtype = dtype_of(kv_pool);
  p.kv_dtype = code_dtype_of(codes);
  const DeviceScope scope(kv_pool, {&codes, &scales, &pages, &others});
  function(p, reinterpret_cast<cudaStream_t>(stream));
}

void py_quantize_pages(py::object kv_pool, py::object codes, py::object scales, py::object pages,
                       py::object tokens, uintptr_t stream) {
  with_quantized_pages(quantize_pages, kv_pool, codes, scales, pages, tokens, stream);
}

void py_dequantize_pages(py::object kv_pool, py::object codes, py::object scales,
                         py::object sources, py::object targets, uintptr_t stream) {
  with_quantized_pages(dequantize_pages, kv_pool, codes, scales, sources, targets, stream);
}

void py_rope_append(py::object qkv_, py::object positions_, py::object rotary_, py::object kv_pool_,
                    py::object slot_mapping_, py::object q_, uintptr_t stream) {
  const TensorView qkv("qkv", qkv_), positions("positions", positions_), rotary("rotary", rotary_),
      kv_pool("kv_pool", kv_pool_), slot_mapping("slot_mapping", slot_mapping_), q("q", q_);
  qkv.dtype({kFloat16, kBFloat16}).rank(2).contiguous(1);
  kv_pool.dtype({qkv.type()}).rank(5);
  const int64_t tokens = qkv.size(0), kv_heads = kv_pool.size(2), head_dim = kv_pool.size(4);
  kv_pool.shape({-1, 2, -1, -1, -1}).contiguous();
  q.dtype({qkv.type()}).shape({tokens, -1, head_dim}).contiguous();
  const int64_t q_heads = q.size(1);
  qkv.shape({tokens, (q_heads + 2 * kv_heads) * head_dim});
  positions.dtype({kInt32}).shape({tokens}).contiguous();
  slot_mapping.dtype({kInt32}).shape({tokens}).contiguous();
  rotary.dtype({kFloat32}).shape({-1, head_dim}).contiguous();

  RopeAppendParams p{};
  p.dtype = dtype_of(qkv);
  p.num_q_heads = to_int(q_heads, "q.shape[1]");
  p.num_kv_heads = to_int(kv_heads, "kv_pool.shape[2]");
  p.head_dim = to_int(head_dim, "kv_pool.shape[4]");
  p.tokens_per_block = to_int(kv_pool.size(3), "kv_pool.shape[3]");
  p.qkv = qkv.data();
  p.qkv_stride = qkv.stride(0, qkv.size(1));
  p.positions = static_cast<const int32_t*>(positions.data());
  p.rotary = static_cast<const float*>(rotary.data());
  p.slot_mapping = static_cast<const int32_t*>(slot_mapping.data());
  p.num_tokens = to_int(tokens, "qkv.shape[0]");
  p.q = q.data();
  p.kv_pool = kv_pool.data();
  check(p);
  const DeviceScope scope(qkv, {&positions, &rotary, &kv_pool, &slot_mapping, &q});
  rope_append(p, reinterpret_cast<cudaStream_t>(stream));
}

void py_merge_lse(py::object o_, py::object lse_, py::object out_, py::object out_lse_,
                  uintptr_t stream) {
  const TensorView o("o", o_), lse("lse", lse_), out("out", out_);
  o.dtype({kFloat16, kBFloat16, kFloat32}).rank(4).contiguous(2);
  const int64_t shards = o.size(0), tokens = o.size(1), heads = o.size(2), head_dim = o.size(3);
  lse.dtype({kFloat32}).shape({shards, tokens, heads}).contiguous(1);
  out.dtype({kFloat16, kBFloat16, kFloat32}).shape({tokens, heads, head_dim}).contiguous();

  MergeLseParams p{};
  p.dtype = dtype_of(o);
  p.out_dtype = dtype_of(out);
  p.num_shards = to_int(shards, "o.shape[0]");
  p.num_tokens = to_int(tokens, "o.shape[1]");
  p.num_heads = to_int(heads, "o.shape[2]");
  p.head_dim = to_int(head_dim, "o.shape[3]");
  p.o = o.data();
  p.o_token_stride = o.stride(1, heads * head_dim);
  p.o_shard_stride = o.stride(0, tokens * heads * head_dim);
  p.lse = static_cast<const float*>(lse.data());
  p.lse_token_stride = lse.stride(1, heads);
  p.lse_shard_stride = lse.stride(0, tokens * heads);
  p.out = out.data();
  if (out_lse_.is_none()) {
    check(p);
    const DeviceScope scope(o, {&lse, &out});
    merge_lse(p, reinterpret_cast<cudaStream_t>(stream));
    return;
  }
  const TensorView out_lse("out_lse", out_lse_);
  out_lse.dtype({kFloat32}).shape({tokens, heads}).contiguous();
  p.out_lse = static_cast<float*>(out_lse.data());
  check(p);
  const DeviceScope scope(o, {&lse, &out, &out_lse});
  merge_lse(p, reinterpret_cast<cudaStream_t>(stream));
}

// Of rows in FP8, float32 [rows]; null for None. The rows are bytes then, otherwise of `type`.
float* row_scales(const TensorView& rows, const TensorView& scales, bool given, ScalarType type) {
  rows.dtype({given ? kUInt8 : type}).rank(2).contiguous();
  if (!given) return nullptr;
  scales.dtype({kFloat32}).shape({rows.size(0)}).contiguous();
  return static_cast<float*>(scales.data());
}

void py_rms_norm(py::object x_, py::object weight_, py::object out_, py::object scales_, double eps,
                 uintptr_t stream) {
  const TensorView x("x", x_), weight("weight", weight_), out("out", out_),
      scales("scales", scales_.is_none() ? out_ : scales_);
  x.dtype({kFloat16, kBFloat16}).rank(2).contiguous(1);
  const int64_t tokens = x.size(0), hidden = x.size(1);
  weight.dtype({x.type()}).shape({hidden}).contiguous();
  require(eps >= 0, "eps", eps, "at least 0");

  RmsNormParams p{};
  p.scales = row_scales(out, scales, !scales_.is_none(), x.type());
  out.shape({tokens, hidden});
  p.dtype = dtype_of(x);
  p.num_tokens = to_int(tokens, "x.shape[0]");
  p.hidden_size = to_int(hidden, "x.shape[1]");
  p.eps = static_cast<float>(eps);
  p.x = x.data();
  p.x_stride = x.stride(0, hidden);
  p.weight = weight.data();
  p.out = out.data();
  check(p);
  const DeviceScope scope(x, {&weight, &out, &scales});
  rms_norm(p, reinterpret_cast<cudaStream_t>(stream));
}

void py_silu_mul(py::object gate_up_, py::object out_, py::object scales_, uintptr_t stream) {
  const TensorView gate_up("gate_up", gate_up_), out("out", out_),
      scales("scales", scales_.is_none() ? out_ : scales_);
  gate_up.dtype({kFloat16, kBFloat16}).rank(2).contiguous(1);

  SiluMulParams p{};
  p.scales = row_scales(out, scales, !scales_.is_none(), gate_up.type());
  gate_up.shape({out.size(0), 2 * out.size(1)});
  p.dtype = dtype_of(gate_up);
  p.num_tokens = to_int(out.size(0), "out.shape[0]");
  p.intermediate_size = to_int(out.size(1), "out.shape[1]");
  p.gate_up = gate_up.data();
  p.stride = gate_up.stride(0, gate_up.size(1));
  p.out = out.data();
  check(p);
  const DeviceScope scope(gate_up, {&out, &scales});
  silu_mul(p, reinterpret_cast<cudaStream_t>(stream));
}

void py_quantize_rows(py::object x_, py::object out_, py::object scales_, uintptr_t stream) {
  const TensorView x("x", x_), out("out", out_), scales("scales", scales_);
  x.dtype({kFloat16, kBFloat16}).rank(2).contiguous(1);

  QuantizeRowsParams p{};
  p.dtype = dtype_of(x);
  p.num_rows = to_int(x.size(0), "x.shape[0]");
  p.width = to_int(x.size(1), "x.shape[1]");
  p.x = x.data();
  p.x_stride = x.stride(0, x.size(1));
  p.scales = row_scales(out, scales, true, x.type());
  out.shape({x.size(0), x.size(1)});
  p.out = out.data();
  check(p);
  const DeviceScope scope(x, {&out, &scales});
  quantize_rows(p, reinterpret_cast<cudaStream_t>(stream));
}

void py_skinny_linear(py::object x_, py::object weight_, py::object scales_, py::object addend_,
                      py::object out_, uintptr_t stream) {
  const TensorView x("x", x_), weight("weight", weight_), out("out", out_),
      scales("scales", scales_.is_none() ? out_ : scales_);
  const TensorView addend("addend", addend_.is_none() ? out_ : addend_);
  x.dtype({kFloat16, kBFloat16}).rank(2).contiguous(1);
  const int64_t tokens = x.size(0), in_features = x.size(1);
  SkinnyLinearParams p{};
  p.scales = row_scales(weight, scales, !scales_.is_none(), x.type());
  weight.shape({-1, in_features});
  const int64_t out_features = weight.size(0);
  out.dtype({x.type()}).shape({tokens, out_features}).contiguous();
  const bool bias = addend.num_dims() == 1;
  addend.dtype({x.type()}).contiguous();
  if (bias) {
    addend.shape({out_features});
  } else {
    addend.shape({tokens, out_features});
  }

  p.dtype = dtype_of(x);
  p.num_tokens = to_int(tokens, "x.shape[0]");
  p.in_features = to_int(in_features, "x.shape[1]");
  p.out_features = to_int(out_features, "weight.shape[0]");
  p.x = x.data();
  p.x_stride = x.stride(0, in_features);
  p.weight = weight.data();
  p.addend = addend_.is_none() ? nullptr : addend.data();
  p.addend_stride = bias ? 0 : out_features;
  p.out = out.data();
  check(p);
  const DeviceScope scope(x, {&weight, &scales, &addend, &out});
  skinny_linear(p, reinterpret_cast<cudaStream_t>(stream));
}

void py_page_means(py::object kv_pool_, py::object pages_, py::object rows_, py::object means_,
                   uintptr_t stream) {
  const TensorView kv_pool("kv_pool", kv_pool_), pages("pages", pages_), rows("rows", rows_),
      means("means", means_);
  kv_pool.dtype({kFloat16, kBFloat16}).shape({-1, 2, -1, kSelectionPage, -1}).contiguous();
  pages.dtype({kInt32}).rank(1).contiguous();
  rows.dtype({kInt32}).shape({pages.size(0)}).contiguous();
  means.dtype({kv_pool.type()}).shape({-1, kv_pool.size(2), kSelectionMeans, kv_pool.size(4)});
  means.contiguous();

  PageMeansParams p{};
  p.dtype = dtype_of(kv_pool);
  p.num_kv_heads = to_int(kv_pool.size(2), "kv_pool.shape[2]");
  p.head_dim = to_int(kv_pool.size(4), "kv_pool.shape[4]");
  p.kv_pool = kv_pool.data();
  p.num_pages = to_int(pages.size(0), "pages.shape[0]");
  p.pages = static_cast<const int32_t*>(pages.data());
  p.rows = static_cast<const int32_t*>(rows.data());
  p.means = means.data();
  check(p);
  const DeviceScope scope(kv_pool, {&pages, &rows, &means});
  page_means(p, reinterpret_cast<cudaStream_t>(stream));
}

void py_select_pages(py::object q_, py::object lse_, py::object tiles_, py::object candidates_,
                     py::object means_, py::object lists_, py::object counts_,
                     py::function allocate, double scale, uintptr_t stream) {
  const TensorView q("q", q_), lse("lse", lse_), tiles("tiles", tiles_),
      candidates("candidates", candidates_), means("means", means_), lists("lists", lists_),
      counts("counts", counts_);
  q.dtype({kFloat16, kBFloat16}).rank(3).contiguous(2);
  const int64_t tokens = q.size(0), q_heads = q.size(1), head_dim = q.size(2);
  lse.dtype({kFloat32}).shape({tokens, q_heads}).contiguous();
  means.dtype({q.type()}).shape({-1, -1, kSelectionMeans, head_dim}).contiguous();
  const int64_t kv_heads = means.size(1);
  candidates.dtype({kInt32}).rank(1).contiguous();
  const int64_t num_tiles = candidates.size(0);
  tiles.dtype({kInt32}).shape({num_tiles + 1}).contiguous();
  lists.dtype({kInt32}).shape({num_tiles, kv_heads, -1}).contiguous();
  counts.dtype({kInt32}).shape({num_tiles, kv_heads}).contiguous();

  SelectPagesParams p{};
  p.dtype = dtype_of(q);
  p.num_q_heads = to_int(q_heads, "q.shape[1]");
  p.num_kv_heads = to_int(kv_heads, "means.shape[1]");
  p.head_dim = to_int(head_dim, "q.shape[2]");
  p.scale = static_cast<float>(scale);
  p.count = to_int(lists.size(2), "lists.shape[2]");
  p.q = q.data();
  p.q_stride = q.stride(0, q_heads * head_dim);
  p.lse = static_cast<const float*>(lse.data());
  p.tiles = static_cast<const int32_t*>(tiles.data());
  p.num_tiles = to_int(num_tiles, "candidates.shape[0]");
  p.candidates = static_cast<const int32_t*>(candidates.data());
  p.means = means.data();
  p.num_pages = to_int(means.size(0), "means.shape[0]");
  p.lists = static_cast<int32_t*>(lists.data());
  p.counts = static_cast<int32_t*>(counts.data());
  const size_t bytes = select_pages_workspace(p);
  const DeviceScope scope(q, {&lse, &tiles, &candidates, &means, &lists, &counts});
  select_pages(p, allocated(allocate, bytes, q).data(), reinterpret_cast<cudaStream_t>(stream));
}

void py_fetch_pages(py::object lists_, py::object counts_, py::object pages_, py::object owners_,
                    const std::vector<uintptr_t>& pools, int rank, py::object fetched_,
                    py::object planes_, py::function allocate, uintptr_t stream) {
  const TensorView lists("lists", lists_), counts("counts", counts_), pages("pages", pages_),
      owners("owners", owners_), fetched("fetched", fetched_), planes("planes", planes_);
  lists.dtype({kInt32}).rank(3).contiguous();
  const int64_t tiles = lists.size(0), kv_heads = lists.size(1), count = lists.size(2);
  counts.dtype({kInt32}).shape({tiles, kv_heads}).contiguous();
  planes.dtype({kInt32}).shape({tiles, kv_heads, count}).contiguous();
  pages.dtype({kInt32}).rank(1).contiguous();
  owners.dtype({kInt32}).shape({pages.size(0)}).contiguous();
  fetched.dtype({kFloat16, kBFloat16}).shape({-1, 2, kv_heads, -1, -1}).contiguous();
  require(pools.size() <= FetchPagesParams::kMaxRanks, "pools", std::to_string(pools.size()),
          "one for each of up to 8 ranks");

  FetchPagesParams p{};
  p.rank = rank;
  p.num_kv_heads = to_int(kv_heads, "lists.shape[1]");
  p.plane_bytes = to_int(fetched.size(3) * fetched.size(4) * 2, "fetched");
  p.count = to_int(count, "lists.shape[2]");
  p.num_tiles = to_int(tiles, "lists.shape[0]");
  p.num_pages = to_int(pages.size(0), "pages.shape[0]");
  p.lists = static_cast<const int32_t*>(lists.data());
  p.counts = static_cast<const int32_t*>(counts.data());
  p.pages = static_cast<const int32_t*>(pages.data());
  p.owners = static_cast<const int32_t*>(owners.data());
  for (size_t r = 0; r < pools.size(); ++r) p.pools[r] = reinterpret_cast<const void*>(pools[r]);
  p.fetched = fetched.data();
  p.num_fetched = to_int(fetched.size(0), "fetched.shape[0]");
  p.planes = static_cast<int32_t*>(planes.data());
  const size_t bytes = fetch_pages_workspace(p);
  const DeviceScope scope(lists, {&counts, &pages, &owners, &planes});
  fetch_pages(p, allocated(allocate, bytes, lists).data(), reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  using py::arg;
  m.def("paged_attention", &py_paged_attention, arg("q"), arg("kv_pool"), arg("page_table"),
        arg("cu_seqlens_q"), arg("kv_lens"), arg("other_pool"), arg("kv_scales"), arg("starts"),
        arg("o"), arg("lse"), arg("allocate"), arg("causal"), arg("scale"), arg("max_q_len"),
        arg("max_kv_len"), arg("kernel"), arg("stream"));
  m.def("quantize_pages", &py_quantize_pages, arg("kv_pool"), arg("codes"), arg("scales"),
        arg("pages"), arg("tokens"), arg("stream"));
  m.def("dequantize_pages", &py_dequantize_pages, arg("kv_pool"), arg("codes"), arg("scales"),
        arg("sources"), arg("targets"), arg("stream"));
  m.def("rope_append", &py_rope_append, arg("qkv"), arg("positions"), arg("rotary"), arg("kv_pool"),
        arg("slot_mapping"), arg("q"), arg("stream"));
  m.def("merge_lse", &py_merge_lse, arg("o"), arg("lse"), arg("out"), arg("out_lse"),
        arg("stream"));
  m.def("rms_norm", &py_rms_norm, arg("x"), arg("weight"), arg("out"), arg("scales"), arg("eps"),
        arg("stream"));
  m.def("silu_mul", &py_silu_mul, arg("gate_up"), arg("out"), arg("scales"), arg("stream"));
  m.def("quantize_rows", &py_quantize_rows, arg("x"), arg("out"), arg("scales"), arg("stream"));
  m.def("skinny_linear", &py_skinny_linear, arg("x"), arg("weight"), arg("scales"), arg("addend"),
        arg("out"), arg("stream"));
  m.def("max_skinny_tokens", &max_skinny_tokens, arg("in_features"));
  m.def("max_skinny_tokens_fp8", &max_skinny_tokens_fp8, arg("in_features"));
  m.def("page_means", &py_page_means, arg("kv_pool"), arg("pages"), arg("rows"), arg("means"),
        arg("stream"));
  m.def("select_pages", &py_select_pages, arg("q"), arg("lse"), arg("tiles"), arg("candidates"),
        arg("means"), arg("lists"), arg("counts"), arg("allocate"), arg("scale"), arg("stream"));
  m.def("fetch_pages", &py_fetch_pages, arg("lists"), arg("counts"), arg("pages"), arg("owners"),
        arg("pools"), arg("rank"), arg("fetched"), arg("planes"), arg("allocate"), arg("stream"));
  bind_comm(m);
}

}  // namespace star_attention
