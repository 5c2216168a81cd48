#include "attention_plugin.h"

#include <cstring>

namespace star_attention {
namespace {

using nvinfer1::DataType;

enum Input {
  kQkv,
  kPositionIds,
  kCuSeqlensQ,
  kKvLens,
  kPageTable,
  kSlotMapping,
  kRotary,
  kRuntimeContext,
  kNumInputs
};

size_t q_bytes(int64_t num_tokens, const AttentionLayer& layer) {
  return sizeof(uint16_t) * num_tokens * layer.num_q_heads * layer.head_dim;
}

}  // namespace

int AttentionOp::num_inputs() const { return kNumInputs; }

DataType AttentionOp::input_type(int input, DataType) const {
  return input == kRotary ? DataType::kFLOAT : DataType::kINT32;
}

nvinfer1::DimsExprs AttentionOp::output_dims(const nvinfer1::DimsExprs* inputs,
                                             nvinfer1::IExprBuilder& builder) const {
  nvinfer1::DimsExprs out{};
  out.nbDims = 2;
  out.d[0] = inputs[kQkv].d[0];
  out.d[1] = builder.constant(attributes().num_q_heads * attributes().head_dim);
  return out;
}

size_t AttentionOp::workspace_bytes(int64_t num_tokens, int64_t) const {
  return q_bytes(num_tokens, attributes()) + sizeof(float) * num_tokens * attributes().num_q_heads;
}

void AttentionOp::run(const PluginCall& call) {
  const StepContext& context = context_at(call.inputs[kRuntimeContext]);
  StepTensors t{};
  t.dtype = call.dtype();
  t.num_tokens = call.size(kQkv, 0);
  t.num_seqs = call.size(kPageTable, 0);
  t.page_table_stride = call.size(kPageTable, 1);
  t.qkv = call.inputs[kQkv];
  t.position_ids = call.ints(kPositionIds);
  t.cu_seqlens_q = call.ints(kCuSeqlensQ);
  t.kv_lens = call.ints(kKvLens);
  t.page_table = call.ints(kPageTable);
  t.slot_mapping = call.ints(kSlotMapping);
  t.rotary = static_cast<const float*>(call.inputs[kRotary]);
  t.q = call.workspace;
  t.lse = reinterpret_cast<float*>(static_cast<char*>(call.workspace) +
                                   q_bytes(t.num_tokens, attributes()));
  t.out = call.output;
  run_attention(attributes(), t, context, call.stream);
}

// TensorRT takes `words` for an address on the device. Whoever binds device memory there, as
// trtexec does, gets an error and not a crash.
const StepContext& AttentionOp::context_at(const void* words) {
  if (words != host_words_) {
    cudaPointerAttributes attributes{};
    check_cuda(cudaPointerGetAttributes(&attributes, words), "runtime_context");
    require(attributes.type != cudaMemoryTypeDevice, "runtime_context", "device memory",
            "two int32 in host memory, the address of a StepContext (trtexec cannot run this "
            "engine: build it with --skipInference)");
    host_words_ = words;
  }
  uint64_t address = 0;
  std::memcpy(&address, words, sizeof(address));
  const auto* context = reinterpret_cast<const StepContext*>(address);
  require(context && address % alignof(StepContext) == 0 && context->magic == StepContext::kMagic,
          "runtime_context", reinterpret_cast<const void*>(address),
          "the address of a StepContext of this version");
  return *context;
}

}  // namespace star_attention
