#include "linear_plugin.h"

#include <cublasLt.h>

#include <map>
#include <mutex>

#include "star_attention/layers.h"
#include "star_attention/plugin.h"

// Scales of rows came with cuBLAS 12.9.
#if CUBLAS_VERSION >= 120900
#define STAR_ATTENTION_ROW_SCALES
#endif

namespace star_attention {
namespace {

constexpr size_t kCublasBytes = 32 << 20;  // what NVIDIA recommends for Hopper

void check_cublas(cublasStatus_t status, const char* what) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  throw std::runtime_error(std::string(what) + ": " + cublasLtGetStatusString(status));
}

cublasLtHandle_t handle_of_device() {
  static std::mutex mutex;
  static auto& handles = *new std::map<int, cublasLtHandle_t>;  // cuBLAS may end before statics do
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard lock(mutex);
  cublasLtHandle_t& handle = handles[device];
  if (!handle) check_cublas(cublasLtCreate(&handle), "cublasLtCreate");
  return handle;
}

// cuBLAS counts columns first: a row-major [rows, columns] is its columns × rows.
cublasLtMatrixLayoutOpaque_t layout(cudaDataType_t type, int rows, int columns) {
  cublasLtMatrixLayoutOpaque_t made;
  check_cublas(cublasLtMatrixLayoutInit(&made, type, columns, rows, columns), "matrix layout");
  return made;
}

template <typename Value>
void set(cublasLtMatmulDesc_t operation, cublasLtMatmulDescAttributes_t attribute, Value value) {
  check_cublas(cublasLtMatmulDescSetAttribute(operation, attribute, &value, sizeof(value)),
               "matmul attribute");
}

// A row-major matrix, rows one behind the other, of which each may have a scale.
struct Matrix {
  const void* data;
  const float* scales;
};

// Of [tokens, in] and [out, in]; the addend is null, [out], a bias, or [tokens, out].
struct Product {
  explicit Product(const PluginCall& call, const void* addend_of, bool is_bias_of)
      : tokens(call.size(0, 0)),
        in(call.size(0, 1)),
        out(call.size(1, 0)),
        dtype(call.dtype()),
        x{call.inputs[0], nullptr},
        weight{call.inputs[1], nullptr},
        addend(addend_of),
        is_bias(is_bias_of),
        result(call.output),
        stream(call.stream) {}

  int tokens, in, out;
  DType dtype;  // of the result, and of what has no scales
  Matrix x, weight;
  const void* addend;
  bool is_bias;
  void* result;
  cudaStream_t stream;
};

void few_rows(const Product& product) {
  SkinnyLinearParams p{};
  p.dtype = product.dtype;
  p.num_tokens = product.tokens;
  p.in_features = product.in;
  p.out_features = product.out;
  p.x = product.x.data;
  p.x_stride = p.in_features;
  p.weight = product.weight.data;
  p.scales = product.weight.scales;
  p.addend = product.addend;
  p.addend_stride = product.is_bias ? 0 : p.out_features;
  p.out = product.result;
  skinny_linear(p, product.stream);
}

void set_scales(cublasLtMatmulDesc_t operation, const Product& product) {
#ifdef STAR_ATTENTION_ROW_SCALES
  constexpr int32_t kOfRows = CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
  set(operation, CUBLASLT_MATMUL_DESC_A_SCALE_MODE, kOfRows);
  set(operation, CUBLASLT_MATMUL_DESC_B_SCALE_MODE, kOfRows);
  set(operation, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, product.weight.scales);
  set(operation, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, product.x.scales);
  set(operation, CUBLASLT_MATMUL_DESC_FAST_ACCUM, int8_t{1});
#else
  throw std::runtime_error("compiled with a cuBLAS before 12.9, which knows no scales of rows");
#endif
}

void many_rows(const Product& p, void* workspace) {
  const cublasLtHandle_t handle = handle_of_device();
  cublasLtMatmulDescOpaque_t operation;
  check_cublas(cublasLtMatmulDescInit(&operation, CUBLAS_COMPUTE_32F, CUDA_R_32F), "matmul");
  set(&operation, CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T);
  if (p.is_bias) {
    set(&operation, CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
    set(&operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER, p.addend);
  }
  if (p.weight.scales) set_scales(&operation, p);
  const cudaDataType_t wide = p.dtype == DType::kFloat16 ? CUDA_R_16F : CUDA_R_16BF;
  const cudaDataType_t type = p.weight.scales ? CUDA_R_8F_E4M3 : wide;
  auto weight = layout(type, p.out, p.in), x = layout(type, p.tokens, p.in);
  auto result = layout(wide, p.tokens, p.out);

  cublasLtMatmulPreferenceOpaque_t preference;
  check_cublas(cublasLtMatmulPreferenceInit(&preference), "matmul preference");
  check_cublas(
      cublasLtMatmulPreferenceSetAttribute(&preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                           &kCublasBytes, sizeof(kCublasBytes)),
      "matmul preference");
  cublasLtMatmulHeuristicResult_t best{};
  int found = 0;
  check_cublas(cublasLtMatmulAlgoGetHeuristic(handle, &operation, &weight, &x, &result, &result,
                                              &preference, 1, &best, &found),
               "matmul algorithm");

  const bool sum = p.addend != nullptr && !p.is_bias;
  const float alpha = 1.f, beta = sum ? 1.f : 0.f;
  check_cublas(cublasLtMatmul(handle, &operation, &alpha, p.weight.data, &weight, p.x.data, &x,
                              &beta, sum ? p.addend : p.result, &result, p.result, &result,
                              &best.algo, workspace, kCublasBytes, p.stream),
               "matmul");
}

// What a product in FP8 has behind cuBLAS's workspace: x quantised, and as many zeros as it has
// rows.
struct Fp8Workspace {
  Fp8Workspace(int64_t rows, int64_t width)
      : scales(rounded(rows * width)),
        zeros(scales + rounded(sizeof(float) * rows)),
        bytes(zeros + rounded(sizeof(int32_t) * rows)) {}

  size_t scales, zeros, bytes;  // where they begin, behind the rows; and where all of it ends

 private:
  static size_t rounded(size_t bytes) { return (bytes + 255) / 256 * 256; }
};

// The bias in every row of the result, for a sum: cuBLAS adds no bias to every product in FP8.
void spread_bias(const Product& product, void* zeros) {
  check_cuda(cudaMemsetAsync(zeros, 0, sizeof(int32_t) * product.tokens, product.stream),
             "cudaMemsetAsync");
  GatherRowsParams p{};
  p.num_rows = product.tokens;
  p.width = product.out;
  p.x = product.addend;
  p.rows = static_cast<const int32_t*>(zeros);
  p.out = product.result;
  gather_rows(p, product.stream);
}

void many_rows_fp8(Product product, void* workspace) {
  const Fp8Workspace places(product.tokens, product.in);
  char* const own = static_cast<char*>(workspace) + kCublasBytes;
  QuantizeRowsParams p{};
  p.dtype = product.dtype;
  p.num_rows = product.tokens;
  p.width = product.in;
  p.x = product.x.data;
  p.x_stride = p.width;
  p.out = own;
  p.scales = reinterpret_cast<float*>(own + places.scales);
  quantize_rows(p, product.stream);
  product.x = {p.out, p.scales};
  if (product.is_bias) {
    spread_bias(product, own + places.zeros);
    product.addend = product.result;
    product.is_bias = false;
  }
  many_rows(product, workspace);
}

}  // namespace

bool has_fp8_products() {
#ifdef STAR_ATTENTION_ROW_SCALES
  return cublasLtGetVersion() >= 120900;
#else
  return false;
#endif
}

template <bool kFp8, bool kAddend>
nvinfer1::DimsExprs LinearOpOf<kFp8, kAddend>::output_dims(const nvinfer1::DimsExprs* inputs,
                                                           nvinfer1::IExprBuilder&) const {
  nvinfer1::DimsExprs out = inputs[0];
  out.d[1] = inputs[1].d[0];
  return out;
}

template <bool kFp8, bool kAddend>
size_t LinearOpOf<kFp8, kAddend>::workspace_bytes(int64_t num_rows, int64_t in_features) const {
  return kCublasBytes + (kFp8 ? Fp8Workspace(num_rows, in_features).bytes : 0);
}

template <bool kFp8, bool kAddend>
void LinearOpOf<kFp8, kAddend>::run(const PluginCall& call) {
  constexpr int kAddendInput = kNumWeights + 1;
  const void* const addend = kAddend ? call.inputs[kAddendInput] : nullptr;
  Product product(call, addend, kAddend && call.descs[kAddendInput].dims.nbDims == 1);
  if constexpr (kFp8) {
    product.weight.scales = static_cast<const float*>(call.inputs[2]);
    const bool few = product.tokens <= max_skinny_tokens_fp8(product.in);
    few ? few_rows(product) : many_rows_fp8(product, call.workspace);
  } else {
    const bool few = product.tokens <= max_skinny_tokens(product.in);
    few ? few_rows(product) : many_rows(product, call.workspace);
  }
}

template class LinearOpOf<false, false>;
template class LinearOpOf<false, true>;
template class LinearOpOf<true, false>;
template class LinearOpOf<true, true>;

}  // namespace star_attention
