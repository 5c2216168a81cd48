// TMA descriptors.
#pragma once

#include <cuda.h>

#include "common/driver.h"
#include "star_attention/attention.h"

namespace star_attention {

// A tensor of 16-bit elements whose first dimension is contiguous, read in boxes that arrive in
// shared memory in the 128-byte swizzle. Strides are in bytes.
inline CUtensorMap make_tensor_map(DType dtype, const void* base, const cuuint64_t (&dims)[3],
                                   const cuuint64_t (&strides)[2], const cuuint32_t (&box)[3],
                                   const char* what) {
  static const auto encode =
      driver_function<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled", 12000);
  const auto type =
      dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const cuuint32_t element_strides[3] = {1, 1, 1};
  CUtensorMap map;
  const CUresult result =
      encode(&map, type, 3, const_cast<void*>(base), dims, strides, box, element_strides,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error(std::string("tensor map of ") + what + ": CUDA driver error " +
                             std::to_string(result));
  }
  return map;
}

}  // namespace star_attention
