#include "star_attention_plugin.h"

#include <array>
#include <cstring>
#include <exception>
#include <iterator>

#include "common/check.h"
#include "plugin_library.h"

namespace star_attention {
namespace {

using nvinfer1::DataType;
using nvinfer1::PluginField;
using nvinfer1::PluginTensorDesc;

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

// The node's attributes, in the order of AttentionLayer.
constexpr std::array<const char*, 4> kFields = {"layer", "num_q_heads", "num_kv_heads", "head_dim"};

struct Serialized {
  static constexpr int32_t kFormat = 1;

  int32_t format = kFormat;
  AttentionLayer layer;
};

bool is_activation(DataType type) {
#if NV_TENSORRT_MAJOR >= 9
  if (type == DataType::kBF16) return true;
#endif
  return type == DataType::kHALF;
}

size_t q_bytes(int64_t num_tokens, const AttentionLayer& layer) {
  return sizeof(uint16_t) * num_tokens * layer.num_q_heads * layer.head_dim;
}

// TensorRT's callbacks must not throw: what they would throw is logged, and `failed` returned.
template <typename Result, typename Function>
Result logged(const std::string& what, Result failed, Function function) noexcept {
  try {
    return function();
  } catch (const std::exception& error) {
    log_error(what + ": " + error.what());
    return failed;
  }
}

int32_t value_of(const nvinfer1::PluginFieldCollection& fields, const char* name) {
  for (int i = 0; i < fields.nbFields; ++i) {
    const PluginField& field = fields.fields[i];
    if (std::strcmp(field.name, name) != 0) continue;
    require(field.type == nvinfer1::PluginFieldType::kINT32 && field.length == 1, name,
            "another type", "one int32");
    return *static_cast<const int32_t*>(field.data);
  }
  require(false, name, "nothing", "the node's attribute");
  return 0;
}

}  // namespace

nvinfer1::IPluginV2DynamicExt* StarAttentionPlugin::clone() const noexcept {
  return logged<StarAttentionPlugin*>(kName, nullptr, [&] {
    auto* copy = new StarAttentionPlugin(layer_);
    copy->namespace_ = namespace_;
    return copy;
  });
}

nvinfer1::DimsExprs StarAttentionPlugin::getOutputDimensions(
    int32_t, const nvinfer1::DimsExprs* inputs, int32_t, nvinfer1::IExprBuilder& builder) noexcept {
  nvinfer1::DimsExprs out{};
  out.nbDims = 2;
  out.d[0] = inputs[kQkv].d[0];
  out.d[1] = builder.constant(layer_.num_q_heads * layer_.head_dim);
  return out;
}

DataType StarAttentionPlugin::getOutputDataType(int32_t, const DataType* input_types,
                                                int32_t) const noexcept {
  return input_types[kQkv];
}

bool StarAttentionPlugin::supportsFormatCombination(int32_t position,
                                                    const PluginTensorDesc* tensors,
                                                    int32_t num_inputs, int32_t) noexcept {
  if (num_inputs != kNumInputs) return false;
  const DataType type = tensors[position].type;
  if (tensors[position].format != nvinfer1::TensorFormat::kLINEAR) return false;
  if (position == kQkv) return is_activation(type);
  if (position == kRotary) return type == DataType::kFLOAT;
  if (position >= num_inputs) return type == tensors[kQkv].type;
  return type == DataType::kINT32;
}

size_t StarAttentionPlugin::getWorkspaceSize(const PluginTensorDesc* inputs, int32_t,
                                             const PluginTensorDesc*, int32_t) const noexcept {
  const int64_t num_tokens = inputs[kQkv].dims.d[0];
  return q_bytes(num_tokens, layer_) + sizeof(float) * num_tokens * layer_.num_q_heads;
}

int32_t StarAttentionPlugin::enqueue(const PluginTensorDesc* descs, const PluginTensorDesc*,
                                     const void* const* inputs, void* const* outputs,
                                     void* workspace, cudaStream_t stream) noexcept {
  return logged(kName, 1, [&] {
    const StepContext& context = context_at(inputs[kRuntimeContext]);
    const auto ints = [&](Input input) { return static_cast<const int32_t*>(inputs[input]); };
    StepTensors t{};
    t.dtype = descs[kQkv].type == DataType::kHALF ? DType::kFloat16 : DType::kBFloat16;
    t.num_tokens = static_cast<int>(descs[kQkv].dims.d[0]);
    t.num_seqs = static_cast<int>(descs[kPageTable].dims.d[0]);
    t.page_table_stride = static_cast<int>(descs[kPageTable].dims.d[1]);
    t.qkv = inputs[kQkv];
    t.position_ids = ints(kPositionIds);
    t.cu_seqlens_q = ints(kCuSeqlensQ);
    t.kv_lens = ints(kKvLens);
    t.page_table = ints(kPageTable);
    t.slot_mapping = ints(kSlotMapping);
    t.rotary = static_cast<const float*>(inputs[kRotary]);
    t.q = workspace;
    t.lse = reinterpret_cast<float*>(static_cast<char*>(workspace) + q_bytes(t.num_tokens, layer_));
    t.out = outputs[0];
    run_attention(layer_, t, context, stream);
    return 0;
  });
}

size_t StarAttentionPlugin::getSerializationSize() const noexcept { return sizeof(Serialized); }

void StarAttentionPlugin::serialize(void* buffer) const noexcept {
  const Serialized serialized{Serialized::kFormat, layer_};
  std::memcpy(buffer, &serialized, sizeof(serialized));
}

// TensorRT takes `words` for an address on the device. Whoever binds device memory there, as
// trtexec does, gets an error and not a crash.
const StepContext& StarAttentionPlugin::context_at(const void* words) {
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

const nvinfer1::PluginFieldCollection* StarAttentionCreator::getFieldNames() noexcept {
  static const auto fields = [] {
    std::array<PluginField, kFields.size()> all;
    for (size_t i = 0; i < all.size(); ++i) {
      all[i] = PluginField(kFields[i], nullptr, nvinfer1::PluginFieldType::kINT32, 1);
    }
    return all;
  }();
  static const nvinfer1::PluginFieldCollection collection{static_cast<int32_t>(fields.size()),
                                                          fields.data()};
  return &collection;
}

nvinfer1::IPluginV2* StarAttentionCreator::createPlugin(
    const char* name, const nvinfer1::PluginFieldCollection* fields) noexcept {
  return logged<StarAttentionPlugin*>(name, nullptr, [&] {
    const AttentionLayer layer = {value_of(*fields, kFields[0]), value_of(*fields, kFields[1]),
                                  value_of(*fields, kFields[2]), value_of(*fields, kFields[3])};
    check(layer);
    auto* plugin = new StarAttentionPlugin(layer);
    plugin->setPluginNamespace(namespace_.c_str());
    return plugin;
  });
}

nvinfer1::IPluginV2* StarAttentionCreator::deserializePlugin(const char* name, const void* data,
                                                             size_t size) noexcept {
  return logged<StarAttentionPlugin*>(name, nullptr, [&] {
    Serialized serialized{};
    if (size == sizeof(serialized)) std::memcpy(&serialized, data, size);
    require(size == sizeof(serialized) && serialized.format == Serialized::kFormat, "engine",
            "a StarAttention of another version", "one built with this version: build it again");
    auto* plugin = new StarAttentionPlugin(serialized.layer);
    plugin->setPluginNamespace(namespace_.c_str());
    return plugin;
  });
}

}  // namespace star_attention
