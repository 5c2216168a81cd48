#include "linear_plugin.h"

#include <cublasLt.h>

#include <map>
#include <mutex>

#include "star_attention/layers.h"

namespace star_attention {
namespace {

constexpr size_t kWorkspaceBytes = 32 << 20;  // what NVIDIA recommends for Hopper

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

// Of [tokens, in] and [out, in]; `addend` is null, or [out] (a bias), or [tokens, out].
void few_rows(const PluginCall& call, const void* addend, bool bias) {
  SkinnyLinearParams p{};
  p.dtype = call.dtype();
  p.num_tokens = call.size(0, 0);
  p.in_features = call.size(0, 1);
  p.out_features = call.size(1, 0);
  p.x = call.inputs[0];
  p.x_stride = p.in_features;
  p.weight = call.inputs[1];
  p.addend = addend;
  p.addend_stride = bias ? 0 : p.out_features;
  p.out = call.output;
  skinny_linear(p, call.stream);
}

void many_rows(const PluginCall& call, const void* addend, bool bias) {
  const int tokens = call.size(0, 0), in = call.size(0, 1), out = call.size(1, 0);
  const cublasLtHandle_t handle = handle_of_device();
  cublasLtMatmulDescOpaque_t operation;
  check_cublas(cublasLtMatmulDescInit(&operation, CUBLAS_COMPUTE_32F, CUDA_R_32F), "matmul");
  set(&operation, CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T);
  if (bias) {
    set(&operation, CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
    set(&operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER, addend);
  }
  const cudaDataType_t type = call.dtype() == DType::kFloat16 ? CUDA_R_16F : CUDA_R_16BF;
  auto weight = layout(type, out, in), x = layout(type, tokens, in);
  auto result = layout(type, tokens, out);

  cublasLtMatmulPreferenceOpaque_t preference;
  check_cublas(cublasLtMatmulPreferenceInit(&preference), "matmul preference");
  check_cublas(
      cublasLtMatmulPreferenceSetAttribute(&preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                           &kWorkspaceBytes, sizeof(kWorkspaceBytes)),
      "matmul preference");
  cublasLtMatmulHeuristicResult_t best{};
  int found = 0;
  check_cublas(cublasLtMatmulAlgoGetHeuristic(handle, &operation, &weight, &x, &result, &result,
                                              &preference, 1, &best, &found),
               "matmul algorithm");

  const bool sum = addend != nullptr && !bias;
  const float alpha = 1.f, beta = sum ? 1.f : 0.f;
  check_cublas(cublasLtMatmul(handle, &operation, &alpha, call.inputs[1], &weight, call.inputs[0],
                              &x, &beta, sum ? addend : call.output, &result, call.output, &result,
                              &best.algo, call.workspace, kWorkspaceBytes, call.stream),
               "matmul");
}

}  // namespace

template <bool kAddend>
nvinfer1::DimsExprs LinearOpOf<kAddend>::output_dims(const nvinfer1::DimsExprs* inputs,
                                                     nvinfer1::IExprBuilder&) const {
  nvinfer1::DimsExprs out = inputs[0];
  out.d[1] = inputs[1].d[0];
  return out;
}

template <bool kAddend>
size_t LinearOpOf<kAddend>::workspace_bytes(int64_t) const {
  return kWorkspaceBytes;
}

template <bool kAddend>
void LinearOpOf<kAddend>::run(const PluginCall& call) {
  const void* const addend = kAddend ? call.inputs[2] : nullptr;
  const bool bias = kAddend && call.descs[2].dims.nbDims == 1;
  const bool few = call.size(0, 0) <= max_skinny_tokens(call.size(0, 1));
  (few ? few_rows : many_rows)(call, addend, bias);
}

template class LinearOpOf<false>;
template class LinearOpOf<true>;

}  // namespace star_attention
