// A device tensor that Python lends for one call, by DLPack or __cuda_array_interface__.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

namespace star_attention {

enum class ScalarType { kFloat16, kBFloat16, kFloat32, kInt32, kUInt8, kOther };

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
  int64_t size(int dim) const { return sizes_[dim]; }
  // Elements between neighbours in `dim`; for a dimension of size 1, `packed`.
  int64_t stride(int dim, int64_t packed) const { return sizes_[dim] > 1 ? strides_[dim] : packed; }
  int64_t bytes() const;

 private:
  void from_dlpack(pybind11::handle object);
  void from_cuda_array_interface(pybind11::handle object);

  std::string name_;
  pybind11::object owner_;  // keeps the memory and the DLPack strides alive
  void* data_ = nullptr;
  ScalarType type_ = ScalarType::kOther;
  std::string type_name_;
  std::vector<int64_t> sizes_, strides_;
  int device_ = -1;
};

}  // namespace star_attention
