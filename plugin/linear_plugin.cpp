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

}  // namespace

template <bool kAddend>
nvinfer1::DimsExprs LinearOpOf<kAddend>::output_dims(const nvinfer1::DimsExprs* inputs,
                                                     nvinfer1::IExprBuilder&) const {
  nvinfer1::DimsExprs out = inputs[0];
  out.d[1] = inputs[1].d[0];
  return out;
}

template <bool kAddend>
size_t LinearOpOf<kAddend>::workspace_bytes(const nvinfer1::PluginTensorDesc*) const {
  return kWorkspaceBytes;
}

template <bool kAddend>
void LinearOpOf<kAddend>::run(const PluginCall& call) {
  const int tokens = call.size(0, 0), in = call.size(0, 1), out = call.size(1, 0);
  const bool bias = kAddend && call.descs[2].dims.nbDims == 1;
  if (tokens <= max_skinny_tokens(in)) {
    SkinnyLinearParams p{};
    p.dtype = call.dtype();
    p.num_tokens = tokens;
    p.in_features = in;
    p.out_features = out;
    p.x = call.inputs[0];
    p.x_stride = in;
    p.weight = call.inputs[1];
    p.addend = kAddend ? call.inputs[2] : nullptr;
    p.addend_stride = bias ? 0 : out;
    p.out = call.output;
    skinny_linear(p, call.stream);
    return;
  }

  const cublasLtHandle_t handle = handle_of_device();
  cublasLtMatmulDescOpaque_t operation;
  check_cublas(cublasLtMatmulDescInit(&operation, CUBLAS_COMPUTE_32F, CUDA_R_32F), "matmul");
  set(&operation, CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T);
  if (bias) {
    set(&operation, CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
    set(&operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER, call.inputs[2]);
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

  const bool sum = kAddend && !bias;
  const float alpha = 1.f, beta = sum ? 1.f : 0.f;
  const void* const addend = sum ? call.inputs[2] : call.output;
  check_cublas(cublasLtMatmul(handle, &operation, &alpha, call.inputs[1], &weight, call.inputs[0],
                              &x, &beta, addend, &result, call.output, &result, &best.algo,
                              call.workspace, kWorkspaceBytes, call.stream),
               "matmul");
}

template class LinearOpOf<false>;
template class LinearOpOf<true>;

}  // namespace star_attention
