// A device tensor that Python lends for one call, by DLPack or __cuda_array_interface__.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <string>
#include <vector>

#include "common/check.h"
#include "star_attention/attention.h"

namespace star_attention {

struct DLTensor;

enum class ScalarType { kFloat16, kBFloat16, kFloat32, kInt32, kUInt8, kInt8, kOther };

class TensorView {
 public:
  TensorView(const char* name, pybind11::handle object);

  // The checks throw std::invalid_argument with the tensor's name. Those of a tensor's form come
  // first; device() checks that it lives on a CUDA device.
  const TensorView& dtype(std::initializer_list<ScalarType> allowed) const;
  const TensorView& rank(int expected) const;
  // -1 in `expected` stands for any size.
  const TensorView& shape(std::initializer_list<int64_t> expected) const;
  // The last `dims` dimensions are contiguous.
  const TensorView& contiguous(int dims) const;
  const TensorView& contiguous() const { return contiguous(static_cast<int>(sizes_.size())); }
  int device() const;

  void* data() const { return data_; }
  ScalarType type() const { return type_; }
  int num_dims() const { return static_cast<int>(sizes_.size()); }
  int64_t size(int dim) const { return sizes_[dim]; }
  // Elements between neighbours in `dim`; for a dimension of size 1, `packed`.
  int64_t stride(int dim, int64_t packed) const { return sizes_[dim] > 1 ? strides_[dim] : packed; }
  int64_t bytes() const;

 private:
  void from_dlpack(pybind11::handle object);
  void take(const DLTensor& tensor);
  void from_cuda_array_interface(pybind11::handle object);

  [[noreturn]] void fail(const char* property, const std::string& got,
                         const std::string& expected) const;

  std::string name_;
  pybind11::object owner_;  // keeps the memory and the DLPack strides alive
  void* data_ = nullptr;
  ScalarType type_ = ScalarType::kOther;
  std::string type_name_;
  std::vector<int64_t> sizes_, strides_;
  int device_ = -1;
};

constexpr auto kFloat16 = ScalarType::kFloat16;
constexpr auto kBFloat16 = ScalarType::kBFloat16;
constexpr auto kFloat32 = ScalarType::kFloat32;
constexpr auto kInt32 = ScalarType::kInt32;
constexpr auto kUInt8 = ScalarType::kUInt8;
constexpr auto kInt8 = ScalarType::kInt8;

// Of a tensor of one of the three floating-point types.
inline DType dtype_of(const TensorView& tensor) {
  return tensor.type() == kFloat16    ? DType::kFloat16
         : tensor.type() == kBFloat16 ? DType::kBFloat16
                                      : DType::kFloat32;
}

inline int to_int(int64_t value, const char* argument) {
  require(value <= std::numeric_limits<int>::max(), argument, value, "less than 2^31");
  return static_cast<int>(value);
}

}  // namespace star_attention
