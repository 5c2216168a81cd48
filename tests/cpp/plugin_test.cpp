// StarAttention inside a network of one node, against direct calls of the library, bit for bit; and
// the plugins of a layer's other operators, against sums on the host.
//
//   plugin_test [folder of TensorRT's libraries]
//
// Exit status 77: there is no TensorRT.
#include "star_attention/plugin.h"

#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <functional>
#include <iterator>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/check.h"
#include "star_attention/merge.h"
#include "star_attention/paged_attention.h"
#include "star_attention/quantize_pages.h"
#include "star_attention/rope.h"
#include "star_attention/session.h"
#include "testing.h"

namespace star_attention {
namespace {

constexpr int kQHeads = 4, kKvHeads = 2, kHeadDim = 64, kTokensPerBlock = 64;
constexpr int kLayer = 1, kLayers = 2, kPages = 8, kPositions = 512;
constexpr int kMaxTokens = 256, kMaxSeqs = 2, kMaxPages = 4;
constexpr int kQkvWidth = (kQHeads + 2 * kKvHeads) * kHeadDim, kOutWidth = kQHeads * kHeadDim;
constexpr size_t kLayerElements = size_t{kPages} * 2 * kKvHeads * kTokensPerBlock * kHeadDim;

// The exception's text.
std::string expect_failure(const std::function<void()>& function) {
  try {
    function();
  } catch (const std::exception& error) {
    return error.what();
  }
  throw std::runtime_error("expected an exception");
}

void expect_text(const std::string& text, const char* part) {
  expect(text.find(part) != std::string::npos, std::string(part) + " in: " + text);
  expect(text.find('\n') == std::string::npos, "one line: " + text);
}

std::vector<std::string> errors;  // that were logged

void keep_errors(const char* level, const std::string& message) {
  if (level == std::string("error")) errors.push_back(message);
}

template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t count) : count_(count) {
    check_cuda(cudaMalloc(reinterpret_cast<void**>(&data_), count * sizeof(T)), "cudaMalloc");
    check_cuda(cudaMemset(data_, 0, count * sizeof(T)), "cudaMemset");
  }
  explicit DeviceArray(const std::vector<T>& values) : DeviceArray(values.size()) {
    check_cuda(cudaMemcpy(data_, values.data(), count_ * sizeof(T), cudaMemcpyDefault), "copy");
  }
  ~DeviceArray() { cudaFree(data_); }
  DeviceArray(const DeviceArray&) = delete;

  T* data() const { return data_; }
  size_t bytes() const { return count_ * sizeof(T); }
  std::vector<char> host() const {
    std::vector<char> bytes(this->bytes());
    check_cuda(cudaMemcpy(bytes.data(), data_, bytes.size(), cudaMemcpyDefault), "copy");
    return bytes;
  }

 private:
  T* data_ = nullptr;
  size_t count_ = 0;
};

std::vector<__half> random_halfs(size_t count) {
  static std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<__half> values(count);
  for (__half& value : values) value = __float2half(normal(random));
  return values;
}

// cos² + sin² need not be 1 for a comparison.
std::vector<float> random_rotary() {
  std::mt19937 random(2);
  std::uniform_real_distribution<float> uniform(-1, 1);
  std::vector<float> values(size_t{kPositions} * kHeadDim);
  for (float& value : values) value = uniform(random);
  return values;
}

// Sequence s owns pages kMaxPages * s and following. Its next tokens go through the step.
struct Step {
  Step(const std::vector<int>& q_lens, const std::vector<int>& kv_lens_now)
      : num_tokens(0), num_seqs(static_cast<int>(q_lens.size())) {
    std::vector<int> all_positions, all_slots, all_starts = {0}, pages;
    for (int s = 0; s < num_seqs; ++s) {
      for (int i = kv_lens_now[s] - q_lens[s]; i < kv_lens_now[s]; ++i) {
        all_positions.push_back(i);
        all_slots.push_back(kMaxPages * s * kTokensPerBlock + i);
      }
      num_tokens += q_lens[s];
      all_starts.push_back(num_tokens);
      for (int p = 0; p < kMaxPages; ++p) pages.push_back(kMaxPages * s + p);
      max_q_len = std::max(max_q_len, q_lens[s]);
      max_kv_len = std::max(max_kv_len, kv_lens_now[s]);
    }
    qkv.reset(new DeviceArray<__half>(random_halfs(size_t(num_tokens) * kQkvWidth)));
    positions.reset(new DeviceArray<int>(all_positions));
    slots.reset(new DeviceArray<int>(all_slots));
    starts.reset(new DeviceArray<int>(all_starts));
    kv_lens.reset(new DeviceArray<int>(kv_lens_now));
    page_table.reset(new DeviceArray<int>(pages));
  }

  int num_tokens, num_seqs, max_q_len = 0, max_kv_len = 0;
  std::unique_ptr<DeviceArray<__half>> qkv;
  std::unique_ptr<DeviceArray<int>> positions, slots, starts, kv_lens, page_table;
};

Step context_step() { return Step({150, 50}, {150, 50}); }
Step decode_step() { return Step({1, 1}, {151, 51}); }

// What the plugin should do, by the library.
class Direct {
 public:
  void run(const Step& step, const RankMerge* merge = nullptr,
           const QuantizedPrefix* prefix = nullptr) {
    RopeAppendParams r{};
    r.dtype = DType::kFloat16;
    r.num_q_heads = kQHeads;
    r.num_kv_heads = kKvHeads;
    r.head_dim = kHeadDim;
    r.tokens_per_block = kTokensPerBlock;
    r.qkv = step.qkv->data();
    r.qkv_stride = kQkvWidth;
    r.positions = step.positions->data();
    r.rotary = rotary.data();
    r.slot_mapping = step.slots->data();
    r.num_tokens = step.num_tokens;
    r.q = q_.data();
    r.kv_pool = kv_pool.data() + kLayer * kLayerElements;
    rope_append(r, nullptr);

    PagedAttentionParams p{};
    p.dtype = DType::kFloat16;
    p.o_dtype = merge ? DType::kFloat32 : DType::kFloat16;
    p.num_q_heads = kQHeads;
    p.num_kv_heads = kKvHeads;
    p.head_dim = kHeadDim;
    p.tokens_per_block = kTokensPerBlock;
    p.causal = true;
    p.scale = 0.125f;
    p.q = q_.data();
    p.q_stride = kOutWidth;
    p.kv_pool = r.kv_pool;
    p.num_pages = kPages;
    p.page_table = step.page_table->data();
    p.page_table_stride = kMaxPages;
    p.cu_seqlens_q = step.starts->data();
    p.kv_lens = step.kv_lens->data();
    p.num_seqs = step.num_seqs;
    p.num_tokens = step.num_tokens;
    p.max_q_len = step.max_q_len;
    p.max_kv_len = step.max_kv_len;
    p.o = merge ? static_cast<void*>(partials_.data()) : out.data();
    p.lse = lse_.data();
    prefix ? attend_behind(*prefix, p) : attend(p);
    if (merge) {
      PeerMergeParams m{};
      m.dtype = DType::kFloat32;
      m.out_dtype = DType::kFloat16;
      m.num_tokens = step.num_tokens;
      m.num_heads = kQHeads;
      m.head_dim = kHeadDim;
      m.o = partials_.data();
      m.lse = lse_.data();
      m.out = out.data();
      merge->merge(m, nullptr);
    }
    check_cuda(cudaDeviceSynchronize(), "direct calls");
  }

  void copy_page(int from, int to) {
    __half* const pages = kv_pool.data() + kLayer * kLayerElements;
    constexpr size_t kPage = kLayerElements / kPages;
    check_cuda(cudaMemcpy(pages + to * kPage, pages + from * kPage, kPage * sizeof(__half),
                          cudaMemcpyDefault),
               "copy");
  }

  DeviceArray<float> rotary{random_rotary()};
  DeviceArray<__half> kv_pool{kLayers * kLayerElements};
  DeviceArray<__half> out{size_t{kMaxTokens} * kOutWidth};

 private:
  static void attend(const PagedAttentionParams& p) {
    const DeviceArray<char> workspace(paged_attention_workspace(p) + 1);
    paged_attention(p, workspace.data(), workspace.bytes(), nullptr);
  }

  static void attend_behind(const QuantizedPrefix& prefix, const PagedAttentionParams& own) {
    const int rows = own.num_tokens * kQHeads;
    const DeviceArray<float> o(size_t(2) * rows * kHeadDim), lse(size_t(2) * rows);
    PagedAttentionParams p = own;
    p.o_dtype = DType::kFloat32;
    p.o = o.data() + rows * kHeadDim;
    p.lse = lse.data() + rows;
    attend(p);
    p.causal = false;
    p.num_pages = 2 * kPages;
    p.kv_scales = prefix.scales + size_t{kLayer} * 2 * kPages * 2 * kKvHeads;
    p.kv_dtype = prefix.kv_dtype;
    p.page_table = prefix.page_table;
    p.page_table_stride = prefix.page_table_stride;
    p.kv_lens = prefix.kv_lens;
    p.max_kv_len = prefix.max_kv_len;
    p.o = o.data();
    p.lse = lse.data();
    attend(p);
    MergeLseParams m{};
    m.dtype = DType::kFloat32;
    m.out_dtype = own.o_dtype;
    m.num_shards = 2;
    m.num_tokens = own.num_tokens;
    m.num_heads = kQHeads;
    m.head_dim = kHeadDim;
    m.o = o.data();
    m.o_shard_stride = int64_t{rows} * kHeadDim;
    m.o_token_stride = kOutWidth;
    m.lse = lse.data();
    m.lse_shard_stride = rows;
    m.lse_token_stride = kQHeads;
    m.out = own.o;
    m.out_lse = own.lse;
    merge_lse(m, nullptr);
    check_cuda(cudaDeviceSynchronize(), "attention");
  }

  DeviceArray<__half> q_{size_t{kMaxTokens} * kOutWidth};
  DeviceArray<float> partials_{size_t{kMaxTokens} * kOutWidth};
  DeviceArray<float> lse_{size_t{kMaxTokens} * kQHeads};
};

class Engine {
 public:
  explicit Engine(const std::string& file)
      : session_(file, 0, &keep_errors), execution_(session_, 0) {
    check_cuda(cudaStreamCreate(&stream_), "cudaStreamCreate");
    context.kv_pool = kv_pool.data();
    context.num_layers = kLayers;
    context.num_pages = kPages;
    context.tokens_per_block = kTokensPerBlock;
    context.attending_layers = kLayers;
    context.workspace = workspace_.data();
    context.workspace_bytes = static_cast<int64_t>(workspace_.bytes());
  }
  ~Engine() { cudaStreamDestroy(stream_); }

  void bind(const Step& step) {
    const int64_t tokens = step.num_tokens, seqs = step.num_seqs;
    execution_.set_input("qkv", {tokens, kQkvWidth}, step.qkv->data());
    execution_.set_input("position_ids", {tokens}, step.positions->data());
    execution_.set_input("cu_seqlens_q", {seqs + 1}, step.starts->data());
    execution_.set_input("kv_lens", {seqs}, step.kv_lens->data());
    execution_.set_input("page_table", {seqs, kMaxPages}, step.page_table->data());
    execution_.set_input("slot_mapping", {tokens}, step.slots->data());
    execution_.set_input("rotary", {kPositions, kHeadDim}, rotary_.data());
    execution_.set_output("out", {tokens, kOutWidth}, out.data());
    execution_.set_context(context);
    context.max_q_len = step.max_q_len;
    context.max_kv_len = step.max_kv_len;
  }
  void run(const Step& step) {
    bind(step);
    execution_.enqueue(stream_);
    wait();
  }
  void run_graph(const Step& step) {
    bind(step);
    const auto graph = execution_.capture(stream_);
    graph->launch(stream_);
    wait();
  }

  Session& session() { return session_; }
  Execution& execution() { return execution_; }

  StepContext context;
  DeviceArray<__half> kv_pool{kLayers * kLayerElements};
  DeviceArray<__half> out{size_t{kMaxTokens} * kOutWidth};

 private:
  void wait() { check_cuda(cudaStreamSynchronize(stream_), "engine"); }

  Session session_;
  Execution execution_;
  DeviceArray<float> rotary_{random_rotary()};
  DeviceArray<char> workspace_{
      step_workspace_bytes(kQHeads, kKvHeads, kHeadDim, kMaxTokens, kMaxTokens, true)};
  cudaStream_t stream_ = nullptr;
};

// A network whose layers are plugins, and its engine.
class Network {
 public:
  using DataType = nvinfer1::DataType;
  using ITensor = nvinfer1::ITensor;
  using Field = nvinfer1::PluginField;

  // A dimension may vary from `least` to `most`.
  ITensor* input(const char* name, DataType type, const Shape& least, const Shape& most) {
    Shape shape = least;
    for (size_t i = 0; i < shape.size(); ++i) {
      if (least[i] != most[i]) shape[i] = -1;
    }
    ITensor* const tensor = network_->addInput(name, type, to_dims(shape));
    if (least != most) {
      profile_.setDimensions(name, nvinfer1::OptProfileSelector::kMIN, to_dims(least));
      profile_.setDimensions(name, nvinfer1::OptProfileSelector::kOPT, to_dims(most));
      profile_.setDimensions(name, nvinfer1::OptProfileSelector::kMAX, to_dims(most));
    }
    return tensor;
  }

  // Of `values`, which have to stay until the engine is built.
  ITensor* constant(DataType type, const Shape& shape, const void* values) {
    int64_t count = 1;
    for (const int64_t size : shape) count *= size;
    return network_->addConstant(to_dims(shape), {type, values, count})->getOutput(0);
  }

  ITensor* plugin(const char* name, const std::vector<Field>& fields,
                  const std::vector<ITensor*>& inputs) {
    nvinfer1::IPluginRegistry& registry = builder_->getPluginRegistry();
    const nvinfer1::PluginFieldCollection collection{static_cast<int32_t>(fields.size()),
                                                     fields.data()};
    const auto num_inputs = static_cast<int32_t>(inputs.size());
#if NV_TENSORRT_MAJOR >= 10
    auto* creator = static_cast<nvinfer1::IPluginCreatorV3One*>(registry.getCreator(name, "1", ""));
    expect(creator != nullptr, std::string(name) + "'s creator in the builder's registry");
    const std::unique_ptr<nvinfer1::IPluginV3> made(
        creator->createPlugin(name, &collection, nvinfer1::TensorRTPhase::kBUILD));
    expect(made != nullptr, std::string("a plugin ") + name);
    auto* layer = network_->addPluginV3(inputs.data(), num_inputs, nullptr, 0, *made);
#else
    auto* creator = registry.getPluginCreator(name, "1", "");
    expect(creator != nullptr, std::string(name) + "'s creator in the builder's registry");
    const auto destroy = [](nvinfer1::IPluginV2* plugin) { plugin->destroy(); };
    const std::unique_ptr<nvinfer1::IPluginV2, decltype(destroy)> made(
        creator->createPlugin(name, &collection), destroy);
    expect(made != nullptr, std::string("a plugin ") + name);
    auto* layer = network_->addPluginV2(inputs.data(), num_inputs, *made);
#endif
    expect(layer != nullptr, "a plugin layer");  // it has a copy
    return layer->getOutput(0);
  }

  void build(ITensor& out, const std::string& file) {
    out.setName("out");
    network_->markOutput(out);
    const std::unique_ptr<nvinfer1::IBuilderConfig> config(builder_->createBuilderConfig());
#if NV_TENSORRT_MAJOR < 9
    out.setType(DataType::kHALF);
    config->setFlag(nvinfer1::BuilderFlag::kFP16);
#endif
    config->setTacticSources(0);
    config->addOptimizationProfile(&profile_);
    const std::unique_ptr<nvinfer1::IHostMemory> engine(
        builder_->buildSerializedNetwork(*network_, *config));
    expect(engine != nullptr, "an engine: " + Logger::instance().take_error());
    std::ofstream(file, std::ios::binary)
        .write(static_cast<const char*>(engine->data()),
               static_cast<std::streamsize>(engine->size()));
  }

 private:
#if NV_TENSORRT_MAJOR >= 9
  static constexpr auto kFlag = nvinfer1::NetworkDefinitionCreationFlag::kSTRONGLY_TYPED;
#else
  static constexpr auto kFlag = nvinfer1::NetworkDefinitionCreationFlag::kEXPLICIT_BATCH;
#endif
  std::unique_ptr<nvinfer1::IBuilder> builder_ = create_builder();
  std::unique_ptr<nvinfer1::INetworkDefinition> network_{
      builder_->createNetworkV2(1U << static_cast<int>(kFlag))};
  nvinfer1::IOptimizationProfile& profile_ = *builder_->createOptimizationProfile();
};

void build(const std::string& file) {
  using DataType = nvinfer1::DataType;
  Network network;
  const std::vector<nvinfer1::ITensor*> inputs = {
      network.input("qkv", DataType::kHALF, {1, kQkvWidth}, {kMaxTokens, kQkvWidth}),
      network.input("position_ids", DataType::kINT32, {1}, {kMaxTokens}),
      network.input("cu_seqlens_q", DataType::kINT32, {2}, {kMaxSeqs + 1}),
      network.input("kv_lens", DataType::kINT32, {1}, {kMaxSeqs}),
      network.input("page_table", DataType::kINT32, {1, 1}, {kMaxSeqs, kMaxPages}),
      network.input("slot_mapping", DataType::kINT32, {1}, {kMaxTokens}),
      network.input("rotary", DataType::kFLOAT, {1, kHeadDim}, {kPositions, kHeadDim}),
      network.input("runtime_context", DataType::kINT32, {2}, {2}),
  };
  const int32_t values[] = {kLayer, kQHeads, kKvHeads, kHeadDim};
  constexpr auto kInt = nvinfer1::PluginFieldType::kINT32;
  nvinfer1::ITensor* out = network.plugin("StarAttention",
                                          {{"layer", &values[0], kInt, 1},
                                           {"num_q_heads", &values[1], kInt, 1},
                                           {"num_kv_heads", &values[2], kInt, 1},
                                           {"head_dim", &values[3], kInt, 1}},
                                          inputs);
  network.build(*out, file);
}

// out = h + down silu_mul(gate_up norm(h) + bias), h being some rows of a table.
struct Mlp {
  static constexpr int kTable = 50, kRows = 9, kHidden = 256, kInner = 320;
  static constexpr float kEps = 1e-5f;

  std::vector<int> rows = {3, 0, 49, 3, 17, 8, 1, 2, 30};
  std::vector<__half> table = random_halfs(kTable * kHidden), norm = random_halfs(kHidden);
  std::vector<__half> gate_up = random_halfs(2 * kInner * kHidden);
  std::vector<__half> bias = random_halfs(2 * kInner), down = random_halfs(kHidden * kInner);

  static void build(const std::string& file) {
    using DataType = nvinfer1::DataType;
    Network network;
    const auto half = [&](const char* name, const Shape& shape) {
      return network.input(name, DataType::kHALF, shape, shape);
    };
    auto* const rows = network.input("rows", DataType::kINT32, {1}, {kRows});
    auto* const h = network.plugin("StarGatherRows", {}, {half("table", {kTable, kHidden}), rows});
    constexpr auto kFloat = nvinfer1::PluginFieldType::kFLOAT32;
    auto* const normed =
        network.plugin("StarRmsNorm", {{"eps", &kEps, kFloat, 1}}, {h, half("norm", {kHidden})});
    auto* const gate_up = network.plugin(
        "StarLinearAdd", {},
        {normed, half("gate_up", {2 * kInner, kHidden}), half("bias", {2 * kInner})});
    auto* const product = network.plugin("StarSiluMul", {}, {gate_up});
    auto* const out =
        network.plugin("StarLinearAdd", {}, {product, half("down", {kHidden, kInner}), h});
    network.build(*out, file);
  }

  std::vector<double> row(int index) const {
    const auto at = [](const std::vector<__half>& values, size_t i) {
      return double(__half2float(values[i]));
    };
    std::vector<double> h(kHidden), out;
    double squares = 0;
    for (int i = 0; i < kHidden; ++i) {
      h[i] = at(table, size_t(rows[index]) * kHidden + i);
      squares += h[i] * h[i] / kHidden;
    }
    std::vector<double> inner(2 * kInner);
    for (int j = 0; j < 2 * kInner; ++j) {
      inner[j] = at(bias, j);
      for (int i = 0; i < kHidden; ++i) {
        inner[j] += h[i] / std::sqrt(squares + kEps) * at(norm, i) * at(gate_up, j * kHidden + i);
      }
    }
    for (int i = 0; i < kHidden; ++i) {
      double sum = h[i];
      for (int j = 0; j < kInner; ++j) {
        const double gate = inner[j];
        sum += gate / (1 + std::exp(-gate)) * inner[kInner + j] * at(down, i * kInner + j);
      }
      out.push_back(sum);
    }
    return out;
  }
};

void test_layer_operators(const std::string& file) {
  Mlp::build(file);
  const Mlp mlp;
  Session session(file, 0, &keep_errors);
  Execution execution(session, 0);
  const DeviceArray<int> rows(mlp.rows);
  const DeviceArray<__half> table(mlp.table), norm(mlp.norm), gate_up(mlp.gate_up);
  const DeviceArray<__half> bias(mlp.bias), down(mlp.down);
  const DeviceArray<__half> out(size_t{Mlp::kRows} * Mlp::kHidden);
  execution.set_input("rows", {Mlp::kRows}, rows.data());
  execution.set_input("table", {Mlp::kTable, Mlp::kHidden}, table.data());
  execution.set_input("norm", {Mlp::kHidden}, norm.data());
  execution.set_input("gate_up", {2 * Mlp::kInner, Mlp::kHidden}, gate_up.data());
  execution.set_input("bias", {2 * Mlp::kInner}, bias.data());
  execution.set_input("down", {Mlp::kHidden, Mlp::kInner}, down.data());
  execution.set_output("out", {Mlp::kRows, Mlp::kHidden}, out.data());
  cudaStream_t stream = nullptr;
  check_cuda(cudaStreamCreate(&stream), "cudaStreamCreate");
  execution.enqueue(stream);
  check_cuda(cudaStreamSynchronize(stream), "engine");
  execution.capture(stream)->launch(stream);
  check_cuda(cudaStreamSynchronize(stream), "graph");
  cudaStreamDestroy(stream);

  const std::vector<char> bytes = out.host();
  const auto* halfs = reinterpret_cast<const __half*>(bytes.data());
  double errors = 0, sizes = 0;
  for (int r = 0; r < Mlp::kRows; ++r) {
    const std::vector<double> expected = mlp.row(r);
    for (int i = 0; i < Mlp::kHidden; ++i) {
      const double error = __half2float(halfs[r * Mlp::kHidden + i]) - expected[i];
      errors += error * error;
      sizes += expected[i] * expected[i];
    }
  }
  const double relative = std::sqrt(errors / sizes);
  expect(relative < 2e-3, "an error under 2e-3, not " + std::to_string(relative));
}

// x weight^T + bias, and x weight^T + addend, the weight being a constant in FP8.
struct Fp8Products {
  static constexpr int kMaxRows = 40, kIn = 256, kOut = 320;

  std::vector<__half> x = random_halfs(kMaxRows * kIn), bias = random_halfs(kOut);
  std::vector<__half> addend = random_halfs(kMaxRows * kOut);
  std::vector<uint8_t> weight;  // [kOut, kIn]
  std::vector<float> scales;

  Fp8Products() {
    for (const __half value : random_halfs(kOut * kIn)) {
      weight.push_back(__nv_cvt_float_to_fp8(100 * __half2float(value), __NV_SATFINITE, __NV_E4M3));
    }
    for (int i = 0; i < kOut; ++i) scales.push_back(1e-3f + 1e-5f * static_cast<float>(i));
  }

  void build(const std::string& file, bool with_bias) const {
    using DataType = nvinfer1::DataType;
    Network network;
    auto* const x = network.input("x", DataType::kHALF, {1, kIn}, {kMaxRows, kIn});
    auto* const added = with_bias
                            ? network.constant(DataType::kHALF, {kOut}, bias.data())
                            : network.input("addend", DataType::kHALF, {1, kOut}, {kMaxRows, kOut});
    network.build(
        *network.plugin("StarLinearFp8Add", {},
                        {x, network.constant(DataType::kINT32, {kOut, kIn / 4}, weight.data()),
                         network.constant(DataType::kINT32, {kOut}, scales.data()), added}),
        file);
  }

  double at(int row, int column, bool with_bias) const {
    double sum = 0;
    for (int k = 0; k < kIn; ++k) {
      const __half_raw w = __nv_cvt_fp8_to_halfraw(weight[column * kIn + k], __NV_E4M3);
      sum += double(__half2float(x[row * kIn + k])) * __half2float(__half(w));
    }
    const __half& other = with_bias ? bias[column] : addend[row * kOut + column];
    return sum * scales[column] + __half2float(other);
  }
};

// Of few rows, which are not quantised, and of many.
void test_fp8_products(const std::string& file) {
  const Fp8Products products;
  const DeviceArray<__half> x(products.x), addend(products.addend);
  for (const bool with_bias : {false, true}) {
    products.build(file, with_bias);
    Session session(file, 0, &keep_errors);
    Execution execution(session, 0);
    for (const int rows : {1, 3, Fp8Products::kMaxRows - 3, Fp8Products::kMaxRows}) {
      const DeviceArray<__half> out(size_t(rows) * Fp8Products::kOut);
      execution.set_input("x", {rows, Fp8Products::kIn}, x.data());
      if (!with_bias) execution.set_input("addend", {rows, Fp8Products::kOut}, addend.data());
      execution.set_output("out", {rows, Fp8Products::kOut}, out.data());
      execution.enqueue(nullptr);
      check_cuda(cudaDeviceSynchronize(), "engine");
      const std::vector<char> bytes = out.host();
      const auto* halfs = reinterpret_cast<const __half*>(bytes.data());
      double errors = 0, sizes = 0;
      for (int i = 0; i < rows * Fp8Products::kOut; ++i) {
        const double expected =
            products.at(i / Fp8Products::kOut, i % Fp8Products::kOut, with_bias);
        errors += std::pow(__half2float(halfs[i]) - expected, 2);
        sizes += expected * expected;
      }
      const double relative = std::sqrt(errors / sizes), most = rows > 8 ? 0.04 : 1e-3;
      std::printf("FP8, %d rows, %s: error %.1e\n", rows, with_bias ? "bias" : "sum", relative);
      expect(relative < most, "an error under " + std::to_string(most));
      expect(rows <= 8 || relative > 2e-3, "rows in FP8");
    }
  }
}

void expect_equal(const Engine& engine, const Direct& direct) {
  expect(engine.out.host() == direct.out.host(), "the library's output");
  expect(engine.kv_pool.host() == direct.kv_pool.host(), "the library's KV");
}

void test_context_and_decode(Engine& engine) {
  Direct direct;
  for (const Step& step : {context_step(), decode_step()}) {
    direct.run(step);
    engine.run(step);
    expect_equal(engine, direct);
  }
}

void test_graph(Engine& engine) {
  Direct direct;
  direct.run(context_step());
  const Step step = decode_step();
  engine.run(step);  // prepares the shapes
  direct.run(step);
  check_cuda(cudaMemcpy(engine.kv_pool.data(), direct.kv_pool.data(), direct.kv_pool.bytes(),
                        cudaMemcpyDefault),
             "copy");
  check_cuda(cudaMemset(engine.out.data(), 0, engine.out.bytes()), "cudaMemset");
  check_cuda(cudaMemset(direct.out.data(), 0, direct.out.bytes()), "cudaMemset");
  direct.run(step);
  engine.run_graph(step);
  expect_equal(engine, direct);
}

void test_merge(Engine& engine) {
  PeerMerge peers(/*rank=*/0, /*size=*/1, /*capacity=*/1 << 20, /*timeout_seconds=*/10, 0);
  const PeerMemory::Handle handle = peers.peers().handle();
  peers.peers().open(&handle);
  const RankMerge merge(peers);
  engine.context.merge = &merge;
  Direct direct;
  const Step step = context_step();
  direct.run(step, &merge);
  engine.run(step);
  expect_equal(engine, direct);

  engine.context.workspace_bytes = 256;
  expect_text(expect_failure([&] { engine.run(step); }), "workspace");
}

// A rank sends pages to itself: what is stored in this step is seen in this step.
void test_exchange(Engine& engine) {
  NcclCommunicator nccl(make_nccl_id(), /*rank=*/0, /*size=*/1, /*device=*/0);
  PageExchange exchange(nccl, {{0, 0, 1}, {0, 2, 1}}, {{0, 4, 1}, {0, 7, 1}});
  engine.context.exchange = &exchange;
  Direct direct;
  const Step step({150, 50}, {150, 114});  // the second sequence is in pages 4 and 5
  const auto run = [&] {
    direct.run(step);
    direct.copy_page(0, 4);
    direct.copy_page(2, 7);
    direct.run(step);
    engine.run(step);
  };
  run();
  expect_equal(engine, direct);
  expect(exchange.wait_seconds() > 0, "some time");

  engine.context.attending_layers = kLayer;
  for (const auto* pool : {&direct.kv_pool, &engine.kv_pool}) {
    check_cuda(cudaMemset(pool->data(), 0, pool->bytes()), "cudaMemset");
  }
  run();
  expect(engine.kv_pool.host() == direct.kv_pool.host(), "the library's KV");

  PageExchange beyond(nccl, {{0, kPages - 1, 2}}, {{0, 0, 2}});
  engine.context.exchange = &beyond;
  expect_text(expect_failure([&] { engine.run(step); }), "sends: got 9");
  expect_text(expect_failure([&] { PageExchange(nccl, {}, {{1, 0, 1}}); }), "receives: got 1");
}

// A question over contexts in 8 bits, its own pages in 16. Sequence 0 has pages 0 to 2, sequence 1
// page 4; of pages 6 and 7 there are 8-bit pages 12 and 13.
void test_prefix(Engine& engine, const RankMerge* merge) {
  constexpr int kPadded = 2 * kPages, kPerPage = 2 * kKvHeads;
  Direct direct;
  const DeviceArray<__half> values(random_halfs(kLayers * kLayerElements));
  const DeviceArray<float> scales(size_t{kLayers} * kPadded * kPerPage);
  const DeviceArray<int> pages(std::vector<int>{6, 7}), tokens(std::vector<int>{64, 40});
  const DeviceArray<int> table(std::vector<int>{12, 13, 13, 0}), lens(std::vector<int>{104, 33});
  for (const DType kv_dtype : {DType::kFloat8, DType::kInt8}) {
    QuantizePagesParams q{};
    q.dtype = DType::kFloat16;
    q.kv_dtype = kv_dtype;
    q.num_layers = kLayers;
    q.num_kv_heads = kKvHeads;
    q.head_dim = kHeadDim;
    q.tokens_per_block = kTokensPerBlock;
    q.num_pages = kPages;
    q.scales = scales.data();
    q.pages = pages.data();
    q.others = tokens.data();
    q.count = 2;
    for (const auto* pool : {&direct.kv_pool, &engine.kv_pool}) {
      check_cuda(cudaMemcpy(pool->data(), values.data(), pool->bytes(), cudaMemcpyDefault), "copy");
      q.kv_pool = pool->data();
      quantize_pages(q, nullptr);
    }
    QuantizedPrefix& prefix = engine.context.prefix;
    prefix = {kv_dtype, scales.data(), table.data(), 2, lens.data(), 104};
    engine.context.merge = merge;
    for (const Step& step : {context_step(), decode_step()}) {
      direct.run(step, merge, &prefix);
      engine.run(step);
      expect_equal(engine, direct);
    }
  }
}

void test_storing_layer(Engine& engine) {
  engine.context.attending_layers = kLayer;
  Direct direct;
  const Step step = context_step();
  direct.run(step);
  engine.run(step);
  expect(engine.kv_pool.host() == direct.kv_pool.host(), "the library's KV");
  const std::vector<char> out = engine.out.host();
  expect(out == std::vector<char>(out.size(), 0), "an output that nobody wrote");
}

void test_wrong_context(Engine& engine) {
  const Step step = context_step();
  engine.context.magic ^= 1;
  errors.clear();
  expect_text(expect_failure([&] { engine.run(step); }), "runtime_context");
  expect(!errors.empty(), "a logged line");

  engine.context.magic = StepContext::kMagic;
  engine.context.num_layers = kLayer;
  expect_text(expect_failure([&] { engine.run(step); }), "kv_pool");
}

// What step_workspace_bytes() says is enough for every shorter step.
void test_workspace_bound() {
  constexpr int kHeads[][2] = {{8, 2}, {32, 8}, {8, 8}, {32, 1}};
  constexpr int kMaxRows = 9000;
  alignas(256) static char somewhere[256];  // the checks want addresses
  for (const auto& heads : kHeads) {
    const size_t bound = step_workspace_bytes(heads[0], heads[1], 128, kMaxRows, 0);
    const size_t bound_8bit =
        step_workspace_bytes(heads[0], heads[1], 128, kMaxRows, kMaxRows, true);
    const size_t partials = sizeof(float) * kMaxRows * heads[0] * (3 * 128 + 2);
    PagedAttentionParams p{};
    p.dtype = DType::kFloat16;
    p.o_dtype = DType::kFloat32;
    p.num_q_heads = heads[0];
    p.num_kv_heads = heads[1];
    p.head_dim = p.tokens_per_block = 128;
    p.causal = true;
    p.scale = 1.f;
    p.q = p.kv_pool = p.o = somewhere;
    p.page_table = p.cu_seqlens_q = p.kv_lens = reinterpret_cast<int32_t*>(somewhere);
    p.lse = reinterpret_cast<float*>(somewhere);
    p.num_pages = p.page_table_stride = 10000;
    for (int rows = 1; rows <= kMaxRows; rows += 1 + rows / 50) {
      for (const int seqs : {1, 3}) {
        for (const int kv_len : {rows, 20000, 1000000}) {
          p.max_q_len = rows;
          p.num_seqs = seqs;
          p.num_tokens = rows * seqs;
          p.max_kv_len = kv_len;
          const size_t needed = paged_attention_workspace(p);
          expect(needed <= bound, "at most " + std::to_string(bound) + " bytes for " +
                                      std::to_string(rows) + " rows: " + std::to_string(needed));
          PagedAttentionParams in_8_bits = p;
          in_8_bits.causal = false;
          in_8_bits.kv_scales = p.lse;
          in_8_bits.kv_dtype = DType::kInt8;
          expect(partials + paged_attention_workspace(in_8_bits) <= bound_8bit, "enough in 8 bits");
        }
      }
    }
  }
}

void test_limits(Engine& engine) {
  const auto set = [&](int64_t tokens) {
    engine.execution().set_input("position_ids", {tokens}, engine.out.data());
  };
  const std::string text = expect_failure([&] { set(kMaxTokens + 1); });
  expect_text(text, "position_ids");
  expect_text(text, "[257]");
  expect_text(text, "[256]");
  expect_text(expect_failure([&] { engine.session().tensor("x"); }), "no tensor x");
  expect_text(expect_failure([&] { Execution(engine.session(), 7); }), "profile");
}

void test_bad_engines(const std::string& file) {
  std::ifstream input(file, std::ios::binary);
  const std::string whole{std::istreambuf_iterator<char>(input), {}};
  const std::string bad = file + ".bad";
  for (const std::string& content :
       {std::string(), std::string("not an engine"), whole.substr(0, whole.size() / 2)}) {
    std::ofstream(bad, std::ios::binary) << content;
    expect_text(expect_failure([&] { Session(bad, 0, &keep_errors); }), bad.c_str());
  }
  std::remove(bad.c_str());
  expect_text(expect_failure([&] { Session(bad, 0, &keep_errors); }), "No such file");
}

int run(const std::string& folder) {
  if (!passes("TensorRT", [&] { load_tensorrt(folder); })) return 77;
  std::printf("TensorRT %s, compiled with %s\n", tensorrt_version().c_str(),
              compiled_version().c_str());
  const LogScope scope(&keep_errors);
  const std::string file = "/tmp/plugin_test." + std::to_string(getpid()) + ".plan";
  bool ok = passes("build", [&] { build(file); });
  const auto with_engine = [&](const char* name, const std::function<void(Engine&)>& test) {
    ok &= passes(name, [&] {
      Engine engine(file);
      test(engine);
    });
  };
  if (ok) {
    with_engine("context and decode", test_context_and_decode);
    with_engine("CUDA graph", test_graph);
    with_engine("merge", test_merge);
    with_engine("prefix", [](Engine& engine) { test_prefix(engine, nullptr); });
    with_engine("prefix and merge", [](Engine& engine) {
      PeerMerge peers(/*rank=*/0, /*size=*/1, /*capacity=*/1 << 20, /*timeout_seconds=*/10, 0);
      const PeerMemory::Handle handle = peers.peers().handle();
      peers.peers().open(&handle);
      const RankMerge merge(peers);
      test_prefix(engine, &merge);
    });
    try {
      load_nccl("");
      with_engine("exchange", test_exchange);
    } catch (const std::exception& error) {
      std::printf("exchange: skipped, %s\n", error.what());
    }
    with_engine("layer that stores only", test_storing_layer);
    with_engine("wrong context", test_wrong_context);
    with_engine("limits", test_limits);
    ok &= passes("workspace bound", test_workspace_bound);
    ok &= passes("bad engines", [&] { test_bad_engines(file); });
  }
#ifdef STAR_ATTENTION_CUBLAS
  ok &= passes("layer operators", [&] { test_layer_operators(file); });
  int major = 0;
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), "device");
  if (has_fp8_products() && major >= 9) {
    ok &= passes("FP8", [&] { test_fp8_products(file); });
  } else {
    std::printf("FP8: skipped, it needs compute capability 9.0 and cuBLAS 12.9\n");
  }
#else
  std::printf("layer operators: skipped, compiled without cuBLASLt\n");
#endif
  std::remove(file.c_str());
  return ok ? 0 : 1;
}

}  // namespace
}  // namespace star_attention

int main(int argc, char** argv) {
  std::setbuf(stdout, nullptr);
  return star_attention::run(argc > 1 ? argv[1] : "");
}
