#include "bindings/tensor_view.h"

#include <algorithm>

#include "common/check.h"

namespace star_attention {

namespace py = pybind11;

// The ABI of DLPack, in all its versions so far.
struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t type_code, type_bits;
  uint16_t type_lanes;
  int64_t* shape;
  int64_t* strides;  // null if contiguous
  uint64_t byte_offset;
};

namespace {

// The table of C functions that types of tensors have since DLPack 1.2, as far as it is used here.
struct DLPackExchangeApi {
  uint32_t major_version, minor_version;
  const void* previous;
  const void* managed_tensors[3];
  int (*dltensor_from_py_object_no_sync)(void* object, DLTensor* out);
};

// Null: the type has none, or none that lends tensors.
const DLPackExchangeApi* exchange_api(py::handle object) {
  static PyObject* last_type = nullptr;  // most calls are about torch.Tensor only
  static const DLPackExchangeApi* last_api = nullptr;
  PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(object.ptr()));
  if (type == last_type) return last_api;
  last_api = nullptr;
  if (py::hasattr(type, "__dlpack_c_exchange_api__")) {
    const py::object capsule = py::handle(type).attr("__dlpack_c_exchange_api__");
    const auto* api = static_cast<const DLPackExchangeApi*>(
        PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (api == nullptr) throw py::error_already_set();
    if (api->major_version == 1 && api->dltensor_from_py_object_no_sync) last_api = api;
  }
  Py_INCREF(type);  // its address must stay its own
  last_type = type;
  return last_api;
}

constexpr int kDLCuda = 2;
constexpr int kDLInt = 0, kDLUInt = 1, kDLFloat = 2, kDLBfloat = 4;

ScalarType scalar_type(int code, int bits) {
  if (code == kDLFloat && bits == 16) return ScalarType::kFloat16;
  if (code == kDLBfloat && bits == 16) return ScalarType::kBFloat16;
  if (code == kDLFloat && bits == 32) return ScalarType::kFloat32;
  if (code == kDLInt && bits == 32) return ScalarType::kInt32;
  if (code == kDLUInt && bits == 8) return ScalarType::kUInt8;
  if (code == kDLInt && bits == 8) return ScalarType::kInt8;
  return ScalarType::kOther;
}

std::string type_name(int code, int bits) {
  switch (code) {
    case kDLInt:
      return "int" + std::to_string(bits);
    case kDLUInt:
      return "uint" + std::to_string(bits);
    case kDLFloat:
      return "float" + std::to_string(bits);
    case kDLBfloat:
      return "bfloat" + std::to_string(bits);
    default:
      return "DLPack type " + std::to_string(code) + " of " + std::to_string(bits) + " bits";
  }
}

const char* type_name(ScalarType type) {
  switch (type) {
    case ScalarType::kFloat16:
      return "float16";
    case ScalarType::kBFloat16:
      return "bfloat16";
    case ScalarType::kFloat32:
      return "float32";
    case ScalarType::kInt32:
      return "int32";
    case ScalarType::kUInt8:
      return "uint8";
    case ScalarType::kInt8:
      return "int8";
    default:
      return "another type";
  }
}

int64_t item_size(ScalarType type) {
  switch (type) {
    case ScalarType::kFloat16:
    case ScalarType::kBFloat16:
      return 2;
    case ScalarType::kUInt8:
    case ScalarType::kInt8:
      return 1;
    default:
      return 4;
  }
}

std::string to_string(const std::vector<int64_t>& sizes) {
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); ++i) {
    text += (i ? ", " : "") + (sizes[i] < 0 ? "any" : std::to_string(sizes[i]));
  }
  return text + "]";
}

std::vector<int64_t> packed_strides(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (int i = static_cast<int>(sizes.size()) - 2; i >= 0; --i) {
    strides[i] = strides[i + 1] * sizes[i + 1];
  }
  return strides;
}

}  // namespace

TensorView::TensorView(const char* name, py::handle object) : name_(name) {
  if (const DLPackExchangeApi* api = exchange_api(object)) {
    DLTensor tensor;
    if (api->dltensor_from_py_object_no_sync(object.ptr(), &tensor) != 0) {
      throw py::error_already_set();
    }
    owner_ = py::reinterpret_borrow<py::object>(object);
    take(tensor);
  } else if (py::hasattr(object, "__dlpack__")) {
    from_dlpack(object);
  } else if (py::hasattr(object, "__cuda_array_interface__")) {
    from_cuda_array_interface(object);
  } else {
    throw py::type_error(name_ + ": got " + std::string(py::str(py::type::of(object))) +
                         ", expected a tensor with __dlpack__ or __cuda_array_interface__");
  }
}

void TensorView::from_dlpack(py::handle object) {
  const auto where = object.attr("__dlpack_device__")().cast<py::tuple>();
  // -1: the caller has ordered the streams already.
  const auto capsule = where[0].cast<int>() == kDLCuda
                           ? object.attr("__dlpack__")(py::arg("stream") = -1)
                           : object.attr("__dlpack__")();
  const auto* tensor =
      static_cast<const DLTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
  if (tensor == nullptr) throw py::error_already_set();
  owner_ = capsule;
  take(*tensor);
}

void TensorView::take(const DLTensor& tensor) {
  data_ = static_cast<char*>(tensor.data) + tensor.byte_offset;
  type_ =
      tensor.type_lanes == 1 ? scalar_type(tensor.type_code, tensor.type_bits) : ScalarType::kOther;
  type_name_ = type_name(tensor.type_code, tensor.type_bits);
  sizes_.assign(tensor.shape, tensor.shape + tensor.ndim);
  if (tensor.strides) {
    strides_.assign(tensor.strides, tensor.strides + tensor.ndim);
  } else {
    strides_ = packed_strides(sizes_);
  }
  device_ = tensor.device_type == kDLCuda ? tensor.device_id : -1;
}

void TensorView::from_cuda_array_interface(py::handle object) {
  const auto interface = object.attr("__cuda_array_interface__").cast<py::dict>();
  owner_ = py::reinterpret_borrow<py::object>(object);
  const auto pointer = interface["data"].cast<py::tuple>()[0].cast<uintptr_t>();
  data_ = reinterpret_cast<void*>(pointer);
  type_name_ = interface["typestr"].cast<std::string>();
  type_ = type_name_ == "<f2"   ? ScalarType::kFloat16
          : type_name_ == "<f4" ? ScalarType::kFloat32
          : type_name_ == "<i4" ? ScalarType::kInt32
          : type_name_ == "|u1" ? ScalarType::kUInt8
          : type_name_ == "|i1" ? ScalarType::kInt8
                                : ScalarType::kOther;
  for (const auto size : interface["shape"].cast<py::tuple>())
    sizes_.push_back(size.cast<int64_t>());
  strides_ = packed_strides(sizes_);
  if (interface.contains("strides") && !interface["strides"].is_none()) {
    const auto bytes = interface["strides"].cast<py::tuple>();
    for (size_t i = 0; i < strides_.size(); ++i) {
      strides_[i] = bytes[i].cast<int64_t>() / item_size(type_);
    }
  }
  if (data_ == nullptr) return;
  cudaPointerAttributes attributes;
  check_cuda(cudaPointerGetAttributes(&attributes, data_), name_.c_str());
  if (attributes.type == cudaMemoryTypeDevice) device_ = attributes.device;
}

const TensorView& TensorView::dtype(std::initializer_list<ScalarType> allowed) const {
  if (std::find(allowed.begin(), allowed.end(), type_) != allowed.end()) return *this;
  std::string expected;
  for (const ScalarType type : allowed) {
    expected += (expected.empty() ? "" : " or ") + std::string(type_name(type));
  }
  fail("dtype", type_name_, expected);
}

const TensorView& TensorView::rank(int expected) const {
  if (static_cast<int>(sizes_.size()) == expected) return *this;
  fail("shape", to_string(sizes_), std::to_string(expected) + " dimensions");
}

const TensorView& TensorView::shape(std::initializer_list<int64_t> expected) const {
  bool same = expected.size() == sizes_.size();
  for (size_t i = 0; same && i < sizes_.size(); ++i) {
    const int64_t size = expected.begin()[i];
    same = size < 0 || size == sizes_[i];
  }
  if (same) return *this;
  fail("shape", to_string(sizes_), to_string(std::vector<int64_t>(expected)));
}

const TensorView& TensorView::contiguous(int dims) const {
  int64_t packed = 1;
  const int rank = static_cast<int>(sizes_.size());
  for (int i = rank - 1; i >= rank - dims; --i) {
    if (sizes_[i] > 1 && strides_[i] != packed) {
      fail("strides", to_string(strides_),
           dims == rank ? "a contiguous tensor"
                        : "the last " + std::to_string(dims) + " dimensions contiguous");
    }
    packed *= sizes_[i];
  }
  return *this;
}

int TensorView::device() const {
  if (device_ < 0) fail("device", "host memory", "a CUDA device");
  return device_;
}

void TensorView::fail(const char* property, const std::string& got,
                      const std::string& expected) const {
  refuse(name_ + "." + property, got, expected);
}

int64_t TensorView::bytes() const {
  int64_t count = item_size(type_);
  for (const int64_t size : sizes_) count *= size;
  return count;
}

}  // namespace star_attention
