// How to embed an engine: asks one question about one context on one GPU, without Python.
//
//   LD_LIBRARY_PATH=<TensorRT's libraries> ask_tokens <engine folder> <query length> <new tokens>
//
// Reads token ids from its input, the context's and then the query's, and writes those it
// generates, greedily. Star Attention on one rank: phase 1 runs the context, each block seeing the
// anchor and itself; phase 2 the query and what follows, which see everything.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <vector>

#include "star_attention/session.h"
#include "star_attention/step_context.h"

namespace {

using star_attention::Execution;
using star_attention::Session;
using star_attention::StepContext;

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t count) {
    check(cudaMalloc(reinterpret_cast<void**>(&data_), count * sizeof(T)));
  }
  explicit DeviceArray(const std::vector<T>& values) : DeviceArray(values.size()) {
    check(cudaMemcpy(data_, values.data(), values.size() * sizeof(T), cudaMemcpyDefault));
  }
  ~DeviceArray() { cudaFree(data_); }
  DeviceArray(const DeviceArray&) = delete;

  T* data() const { return data_; }

 private:
  T* data_ = nullptr;
};

// What <engine folder>/config.json says.
struct Config {
  explicit Config(const std::string& folder) {
    std::ifstream file(folder + "/config.json");
    if (!file) throw std::runtime_error(folder + "/config.json cannot be read");
    const nlohmann::json json = nlohmann::json::parse(file);
    const auto& model = json.at("model");
    const auto& limits = json.at("limits");
    num_layers = model.at("num_layers");
    num_q_heads = model.at("num_q_heads");
    num_kv_heads = model.at("num_kv_heads");
    head_dim = model.at("head_dim");
    vocab_size = model.at("vocab_size");
    engine_file = folder + "/engine.plan";
    max_num_tokens = limits.at("max_num_tokens");
    max_batch_size = limits.at("max_batch_size");
    max_seq_len = limits.at("max_seq_len");
    tokens_per_block = limits.at("tokens_per_block");
    block_size = limits.at("block_size").is_null()
                     ? max_num_tokens / tokens_per_block * tokens_per_block
                     : limits.at("block_size").get<int>();
    anchor_size =
        limits.at("anchor_size").is_null() ? block_size : limits.at("anchor_size").get<int>();
  }

  int num_pages() const { return (max_seq_len + tokens_per_block - 1) / tokens_per_block; }
  size_t kv_bytes() const {
    return size_t{2} * num_layers * num_pages() * 2 * num_kv_heads * tokens_per_block * head_dim;
  }

  std::string engine_file;
  int num_layers, num_q_heads, num_kv_heads, head_dim, vocab_size;
  int max_num_tokens, max_batch_size, max_seq_len, tokens_per_block, block_size, anchor_size;
};

std::vector<float> read_floats(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  if (bytes.empty()) throw std::runtime_error(path + " cannot be read");
  const auto* floats = reinterpret_cast<const float*>(bytes.data());
  return {floats, floats + bytes.size() / sizeof(float)};
}

// Neighbouring tokens of the prompt that go through the engine together. They see the anchor, their
// block from its begin on, and one another causally.
struct Piece {
  int block_begin;
  int begin, end;
};

class Model {
 public:
  explicit Model(const std::string& folder)
      : config_(folder),
        session_(config_.engine_file, /*device=*/0, &print_errors),
        context_profile_(session_, 0),
        generation_profile_(session_, session_.num_profiles() - 1),
        rotary_(read_floats(folder + "/rotary.bin")),
        kv_pool_(config_.kv_bytes()),
        workspace_(workspace_bytes()),
        logits_(config_.vocab_size) {
    step_.kv_pool = kv_pool_.data();
    step_.num_layers = config_.num_layers;
    step_.num_pages = config_.num_pages();
    step_.tokens_per_block = config_.tokens_per_block;
    step_.workspace = workspace_.data();
    step_.workspace_bytes = static_cast<int64_t>(workspace_bytes());
    check(cudaStreamCreate(&stream_));
  }
  ~Model() { cudaStreamDestroy(stream_); }

  // Phase 1. Its output is the KV: the last layer need not attend.
  void encode(const std::vector<int>& tokens, int length) {
    step_.attending_layers = config_.num_layers - 1;
    std::vector<Piece> pass;
    int room = config_.max_num_tokens;
    const auto flush = [&] {
      if (!pass.empty()) run(context_profile_, tokens, pass);
      pass.clear();
      room = config_.max_num_tokens;
    };
    for (int block = 0; block < length; block += config_.block_size) {
      const int block_end = std::min(length, block + config_.block_size);
      for (int begin = block; begin < block_end;) {
        const int end = std::min(block_end, begin + room);
        pass.push_back({block, begin, end});
        room -= end - begin;
        begin = end;
        if (room == 0 || static_cast<int>(pass.size()) == config_.max_batch_size) flush();
      }
    }
    flush();
  }

  // Phase 2: the token that comes after tokens `begin` and following, which see the whole prompt.
  int next(const std::vector<int>& tokens, int begin) {
    step_.attending_layers = config_.num_layers;
    const int length = static_cast<int>(tokens.size());
    while (length - begin > config_.max_num_tokens) {
      run(context_profile_, tokens, {{0, begin, begin + config_.max_num_tokens}});
      begin += config_.max_num_tokens;
    }
    run(length - begin > 1 ? context_profile_ : generation_profile_, tokens, {{0, begin, length}});
    std::vector<float> logits(config_.vocab_size);
    check(cudaMemcpy(logits.data(), logits_.data(), logits.size() * sizeof(float),
                     cudaMemcpyDefault));
    return static_cast<int>(std::max_element(logits.begin(), logits.end()) - logits.begin());
  }

  int max_seq_len() const { return config_.max_seq_len; }

 private:
  static void print_errors(const char* level, const std::string& message) {
    if (level == std::string("error")) std::cerr << message << "\n";
  }

  size_t workspace_bytes() const {
    return star_attention::step_workspace_bytes(config_.num_q_heads, config_.num_kv_heads,
                                                config_.head_dim, config_.max_num_tokens,
                                                /*max_merge_tokens=*/0);
  }

  // Token i of the prompt is in slot i of the pool, so its page is i / tokens_per_block: the
  // anchor's pages are those of the first block.
  std::vector<int> pages_of(const Piece& piece) const {
    const int size = config_.tokens_per_block;
    std::vector<int> pages;
    for (int p = 0; p < anchor_of(piece) / size; ++p) pages.push_back(p);
    for (int p = piece.block_begin / size; p * size < piece.end; ++p) pages.push_back(p);
    return pages;
  }
  int anchor_of(const Piece& piece) const { return piece.block_begin ? config_.anchor_size : 0; }
  int kv_len_of(const Piece& piece) const {
    return anchor_of(piece) + piece.end - piece.block_begin;
  }

  // Leaves the logits of the last token in logits_.
  void run(Execution& execution, const std::vector<int>& tokens, const std::vector<Piece>& pieces) {
    std::vector<int> ids, positions, starts = {0}, kv_lens, page_table;
    size_t num_pages = 0;
    for (const Piece& piece : pieces) num_pages = std::max(num_pages, pages_of(piece).size());
    step_.max_q_len = step_.max_kv_len = 0;
    for (const Piece& piece : pieces) {
      for (int i = piece.begin; i < piece.end; ++i) {
        ids.push_back(tokens[i]);
        positions.push_back(i);
      }
      starts.push_back(static_cast<int>(ids.size()));
      kv_lens.push_back(kv_len_of(piece));
      std::vector<int> pages = pages_of(piece);
      pages.resize(num_pages);
      page_table.insert(page_table.end(), pages.begin(), pages.end());
      step_.max_q_len = std::max(step_.max_q_len, piece.end - piece.begin);
      step_.max_kv_len = std::max(step_.max_kv_len, kv_lens.back());
    }
    const int64_t num_tokens = ids.size(), num_seqs = pieces.size();
    const DeviceArray<int> ids_in(ids), positions_in(positions), starts_in(starts),
        kv_lens_in(kv_lens), page_table_in(page_table), row_in(std::vector<int>{starts.back() - 1});
    execution.set_input("input_ids", {num_tokens}, ids_in.data());
    execution.set_input("position_ids", {num_tokens}, positions_in.data());
    execution.set_input("slot_mapping", {num_tokens}, positions_in.data());
    execution.set_input("cu_seqlens_q", {num_seqs + 1}, starts_in.data());
    execution.set_input("kv_lens", {num_seqs}, kv_lens_in.data());
    execution.set_input("page_table", {num_seqs, static_cast<int64_t>(num_pages)},
                        page_table_in.data());
    execution.set_input("rotary", {config_.max_seq_len, config_.head_dim}, rotary_.data());
    execution.set_input("logit_rows", {1}, row_in.data());
    execution.set_output("logits", {1, config_.vocab_size}, logits_.data());
    execution.set_context(step_);
    execution.enqueue(stream_);
    check(cudaStreamSynchronize(stream_));
  }

  Config config_;
  Session session_;
  Execution context_profile_, generation_profile_;
  DeviceArray<float> rotary_;
  DeviceArray<char> kv_pool_, workspace_;
  DeviceArray<float> logits_;
  StepContext step_;
  cudaStream_t stream_ = nullptr;
};

void ask(const std::string& folder, int query_length, int new_tokens) {
  star_attention::load_tensorrt("");
  std::vector<int> tokens{std::istream_iterator<int>(std::cin), {}};
  Model model(folder);
  const int context_length = static_cast<int>(tokens.size()) - query_length;
  if (query_length < 1 || context_length < 0 || new_tokens < 1 ||
      static_cast<int>(tokens.size()) + new_tokens > model.max_seq_len()) {
    throw std::runtime_error("the prompt has " + std::to_string(tokens.size()) +
                             " tokens: at least the query's, and with the new ones at most " +
                             std::to_string(model.max_seq_len()));
  }
  model.encode(tokens, context_length);
  int begin = context_length;
  for (int i = 0; i < new_tokens; ++i) {
    const int token = model.next(tokens, begin);
    begin = static_cast<int>(tokens.size());
    tokens.push_back(token);
    std::cout << token << (i + 1 < new_tokens ? " " : "\n") << std::flush;
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::cerr << "usage: ask_tokens <engine folder> <query length> <new tokens> < token ids\n";
    return 2;
  }
  try {
    ask(argv[1], std::atoi(argv[2]), std::atoi(argv[3]));
    return 0;
  } catch (const std::exception& error) {
    std::cerr << "ask_tokens: " << error.what() << "\n";
    return 1;
  }
}
