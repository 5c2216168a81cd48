#include "linear_plugin.h"

#include <cublasLt.h>

#include <map>
#include <memory>
#include <mutex>

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

template <typename T, cublasStatus_t (*kDestroy)(T*)>
struct Destroy {
  void operator()(T* object) const { kDestroy(object); }
};
template <typename T, cublasStatus_t (*kDestroy)(T*)>
using Owned = std::unique_ptr<T, Destroy<T, kDestroy>>;
using Operation = Owned<cublasLtMatmulDescOpaque_t, cublasLtMatmulDescDestroy>;
using Layout = Owned<cublasLtMatrixLayoutOpaque_t, cublasLtMatrixLayoutDestroy>;
using Preference = Owned<cublasLtMatmulPreferenceOpaque_t, cublasLtMatmulPreferenceDestroy>;

// cuBLAS counts columns first: a row-major [rows, columns] is its columns × rows.
Layout layout(cudaDataType_t type, int rows, int columns) {
  cublasLtMatrixLayout_t made = nullptr;
  check_cublas(cublasLtMatrixLayoutCreate(&made, type, columns, rows, columns), "matrix layout");
  return Layout(made);
}

template <typename Value>
void set(const Operation& operation, cublasLtMatmulDescAttributes_t attribute, Value value) {
  check_cublas(cublasLtMatmulDescSetAttribute(operation.get(), attribute, &value, sizeof(value)),
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
  const cudaDataType_t type = call.dtype() == DType::kFloat16 ? CUDA_R_16F : CUDA_R_16BF;
  const cublasLtHandle_t handle = handle_of_device();

  cublasLtMatmulDesc_t made = nullptr;
  check_cublas(cublasLtMatmulDescCreate(&made, CUBLAS_COMPUTE_32F, CUDA_R_32F), "matmul");
  const Operation operation(made);
  set(operation, CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T);
  const bool bias = kAddend && call.descs[2].dims.nbDims == 1;
  if (bias) {
    set(operation, CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
    set(operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER, call.inputs[2]);
  }
  const bool sum = kAddend && !bias;
  const Layout weight = layout(type, out, in), x = layout(type, tokens, in);
  const Layout result = layout(type, tokens, out);

  cublasLtMatmulPreference_t preferred = nullptr;
  check_cublas(cublasLtMatmulPreferenceCreate(&preferred), "matmul preference");
  const Preference preference(preferred);
  check_cublas(
      cublasLtMatmulPreferenceSetAttribute(preferred, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                           &kWorkspaceBytes, sizeof(kWorkspaceBytes)),
      "matmul preference");
  cublasLtMatmulHeuristicResult_t best{};
  int found = 0;
  check_cublas(
      cublasLtMatmulAlgoGetHeuristic(handle, operation.get(), weight.get(), x.get(), result.get(),
                                     result.get(), preferred, 1, &best, &found),
      "matmul algorithm");

  const float alpha = 1.f, beta = sum ? 1.f : 0.f;
  const void* const addend = sum ? call.inputs[2] : call.output;
  check_cublas(
      cublasLtMatmul(handle, operation.get(), &alpha, call.inputs[1], weight.get(), call.inputs[0],
                     x.get(), &beta, addend, result.get(), call.output, result.get(), &best.algo,
                     call.workspace, kWorkspaceBytes, call.stream),
      "matmul");
}

template class LinearOpOf<false>;
template class LinearOpOf<true>;

}  // namespace star_attention
