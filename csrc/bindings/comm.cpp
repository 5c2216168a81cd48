// Everything here belongs to one device, by its number at construction; streams are integers.
#include "bindings/comm.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>

#include "bindings/tensor_view.h"
#include "common/device_guard.h"
#include "star_attention/nccl_communicator.h"
#include "star_attention/peer_merge.h"
#include "star_attention/rank_merge.h"

namespace star_attention {
namespace {

namespace py = pybind11;
using py::arg;

cudaStream_t to_stream(uintptr_t stream) { return reinterpret_cast<cudaStream_t>(stream); }

const TensorView& buffer_of(const TensorView& tensor) {
  return tensor.dtype({kFloat16, kBFloat16, kFloat32, kInt32, kUInt8}).contiguous();
}

void require_device(const TensorView& tensor, const char* argument, int device) {
  require(tensor.device() == device, argument, "device " + std::to_string(tensor.device()),
          "device " + std::to_string(device) + ", the communicator's");
}

class Stream {
 public:
  explicit Stream(int device) {
    const DeviceGuard guard(device);
    int least = 0, greatest = 0;
    check_cuda(cudaDeviceGetStreamPriorityRange(&least, &greatest), "stream priorities");
    // Communication first: it occupies little of the GPU, and others wait for it.
    check_cuda(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, greatest),
               "cudaStreamCreate");
  }
  ~Stream() { cudaStreamDestroy(stream_); }
  Stream(const Stream&) = delete;

  uintptr_t handle() const { return reinterpret_cast<uintptr_t>(stream_); }

 private:
  cudaStream_t stream_ = nullptr;
};

class Event {
 public:
  explicit Event(int device) : device_(device) {
    const DeviceGuard guard(device);
    check_cuda(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), "cudaEventCreate");
  }
  ~Event() { cudaEventDestroy(event_); }
  Event(const Event&) = delete;

  void record(uintptr_t stream) {
    const DeviceGuard guard(device_);
    check_cuda(cudaEventRecord(event_, to_stream(stream)), "cudaEventRecord");
  }
  void block(uintptr_t stream) {
    const DeviceGuard guard(device_);
    check_cuda(cudaStreamWaitEvent(to_stream(stream), event_), "cudaStreamWaitEvent");
  }

 private:
  int device_;
  cudaEvent_t event_ = nullptr;
};

class DeviceMemory {
 public:
  DeviceMemory(int64_t bytes, int device) : bytes_(bytes) {
    require(bytes > 0, "bytes", bytes, "more than 0");
    const DeviceGuard guard(device);
    check_cuda(cudaMalloc(&memory_, bytes), "cudaMalloc");
  }
  ~DeviceMemory() { cudaFree(memory_); }
  DeviceMemory(const DeviceMemory&) = delete;

  void* data() const { return memory_; }
  int64_t bytes() const { return bytes_; }

  // Bytes `begin` to `end` as __cuda_array_interface__.
  py::dict array_interface(int64_t begin, int64_t end) const {
    require(begin >= 0 && begin < end && end <= bytes_, "range",
            std::to_string(begin) + ":" + std::to_string(end),
            "a part of 0:" + std::to_string(bytes_));
    py::dict interface;
    interface["shape"] = py::make_tuple(end - begin);
    interface["typestr"] = "|u1";
    interface["data"] = py::make_tuple(reinterpret_cast<uintptr_t>(memory_) + begin, false);
    interface["version"] = 3;
    return interface;
  }

 private:
  int64_t bytes_;
  void* memory_ = nullptr;
};

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();  // no driver: not an error of a later call
    return 0;
  }
  return count;
}

// What tells GPUs of all machines apart.
std::string device_id(int device) {
  cudaDeviceProp properties;
  check_cuda(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
  std::string id;
  for (const char byte : properties.uuid.bytes) {
    char digits[3];
    std::snprintf(digits, sizeof(digits), "%02x", static_cast<unsigned char>(byte));
    id += digits;
  }
  char bus[32];
  std::snprintf(bus, sizeof(bus), " %x:%x:%x", properties.pciDomainID, properties.pciBusID,
                properties.pciDeviceID);
  return id + bus;
}

// Between host and device either way; returns when it is done.
void copy(py::object source_, py::object target_, int device, uintptr_t stream) {
  const TensorView source("source", source_), target("target", target_);
  buffer_of(source);
  buffer_of(target);
  require(target.bytes() == source.bytes(), "target.nbytes", target.bytes(),
          std::to_string(source.bytes()) + ", the source's");
  const py::gil_scoped_release release;
  const DeviceGuard guard(device);
  check_cuda(cudaMemcpyAsync(target.data(), source.data(), source.bytes(), cudaMemcpyDefault,
                             to_stream(stream)),
             "cudaMemcpyAsync");
  check_cuda(cudaStreamSynchronize(to_stream(stream)), "cudaStreamSynchronize");
}

// The o, lse and out of one rank's part of a merge.
struct Partial {
  Partial(py::handle o_, py::handle lse_, py::handle out_)
      : o("o", o_), lse("lse", lse_), out("out", out_) {
    o.dtype({kFloat16, kBFloat16, kFloat32}).rank(3).contiguous();
    lse.dtype({kFloat32}).shape({o.size(0), o.size(1)}).contiguous();
    out.dtype({kFloat16, kBFloat16, kFloat32}).shape({o.size(0), o.size(1), o.size(2)});
    out.contiguous();
  }

  TensorView o, lse, out;
};

PeerMergeParams params_of(const Partial& partial) {
  PeerMergeParams p{};
  p.dtype = dtype_of(partial.o);
  p.out_dtype = dtype_of(partial.out);
  p.num_tokens = to_int(partial.o.size(0), "o.shape[0]");
  p.num_heads = to_int(partial.o.size(1), "o.shape[1]");
  p.head_dim = to_int(partial.o.size(2), "o.shape[2]");
  p.o = partial.o.data();
  p.lse = static_cast<const float*>(partial.lse.data());
  p.out = partial.out.data();
  return p;
}

void py_merge_gathered(py::object gathered_, int num_shards, py::object o, py::object lse,
                       py::object out, int device, uintptr_t stream) {
  const Partial partial(o, lse, out);
  const TensorView gathered("gathered", gathered_);
  const int64_t bytes = num_shards * (partial.o.bytes() + partial.lse.bytes());
  gathered.dtype({kUInt8}).rank(1).contiguous();
  require(gathered.bytes() >= bytes, "gathered.nbytes", gathered.bytes(),
          "at least " + std::to_string(bytes));
  require_device(gathered, "gathered", device);
  const DeviceGuard guard(device);
  merge_gathered(params_of(partial), gathered.data(), num_shards, to_stream(stream));
}

NcclId to_nccl_id(const py::bytes& bytes) {
  const std::string text = bytes;
  NcclId id;
  require(text.size() == id.size(), "unique_id", std::to_string(text.size()) + " bytes",
          std::to_string(id.size()));
  std::copy(text.begin(), text.end(), id.begin());
  return id;
}

void bind_nccl(py::module_& m) {
  m.def("load_nccl", &load_nccl, arg("path"), py::call_guard<py::gil_scoped_release>());
  m.def("make_nccl_id", [] {
    const NcclId id = make_nccl_id();
    return py::bytes(id.data(), id.size());
  });

  using Comm = NcclCommunicator;
  // Destroyed by `close` only: NCCL waits for the end of all graphs that captured its calls, and
  // Python promises no order at its exit.
  py::class_<Comm, std::unique_ptr<Comm, py::nodelete>>(m, "NcclCommunicator")
      .def(py::init([](const py::bytes& unique_id, int rank, int size, int device) {
             const NcclId id = to_nccl_id(unique_id);
             const py::gil_scoped_release release;
             return new Comm(id, rank, size, device);
           }),
           arg("unique_id"), arg("rank"), arg("size"), arg("device"))
      .def(
          "all_gather",
          [](Comm& comm, py::object buffer_, py::object gathered_, uintptr_t stream) {
            const TensorView buffer("buffer", buffer_), gathered("gathered", gathered_);
            require_device(buffer_of(buffer), "buffer", comm.device());
            require_device(buffer_of(gathered), "gathered", comm.device());
            require(gathered.bytes() == comm.size() * buffer.bytes(), "gathered.nbytes",
                    gathered.bytes(), comm.size() * buffer.bytes());
            const py::gil_scoped_release release;
            comm.all_gather(buffer.data(), gathered.data(), buffer.bytes(), to_stream(stream));
          },
          arg("buffer"), arg("gathered"), arg("stream"))
      .def(
          "send",
          [](Comm& comm, py::object buffer_, int dest, uintptr_t stream) {
            const TensorView buffer("buffer", buffer_);
            require_device(buffer_of(buffer), "buffer", comm.device());
            const py::gil_scoped_release release;
            comm.send(buffer.data(), buffer.bytes(), dest, to_stream(stream));
          },
          arg("buffer"), arg("dest"), arg("stream"))
      .def(
          "receive",
          [](Comm& comm, py::object buffer_, int source, uintptr_t stream) {
            const TensorView buffer("buffer", buffer_);
            require_device(buffer_of(buffer), "buffer", comm.device());
            const py::gil_scoped_release release;
            comm.receive(buffer.data(), buffer.bytes(), source, to_stream(stream));
          },
          arg("buffer"), arg("source"), arg("stream"))
      .def(
          "all_reduce",
          [](Comm& comm, py::object buffer_, uintptr_t stream) {
            const TensorView buffer("buffer", buffer_);
            buffer.dtype({kFloat16, kBFloat16, kFloat32}).contiguous();
            require_device(buffer, "buffer", comm.device());
            const int64_t count = buffer.bytes() / (buffer.type() == kFloat32 ? 4 : 2);
            const py::gil_scoped_release release;
            comm.all_reduce(buffer.data(), count, dtype_of(buffer), to_stream(stream));
          },
          arg("buffer"), arg("stream"))
      .def("__enter__", &Comm::group_start)
      .def(
          "__exit__", [](Comm& comm, const py::args&) { comm.group_end(); },
          "Calls within `with` become one operation.")
      .def("check", &Comm::check)
      .def("close", &Comm::close, py::call_guard<py::gil_scoped_release>())
      .def("abort", &Comm::abort, py::call_guard<py::gil_scoped_release>());
}

py::bytes bytes_of(const PeerMemory& memory) {
  const PeerMemory::Handle handle = memory.handle();
  return py::bytes(reinterpret_cast<const char*>(&handle), sizeof(handle));
}

void open(PeerMemory& memory, const std::vector<std::string>& handles) {
  std::array<PeerMemory::Handle, PeerMemory::kMaxRanks> opened{};
  const auto size = static_cast<size_t>(memory.size());
  require(handles.size() == size, "handles", std::to_string(handles.size()), std::to_string(size));
  for (size_t r = 0; r < size; ++r) {
    require(handles[r].size() == sizeof(opened[r]), "handles",
            std::to_string(handles[r].size()) + " bytes",
            std::to_string(sizeof(opened[r])) + " each");
    std::memcpy(&opened[r], handles[r].data(), sizeof(opened[r]));
  }
  const py::gil_scoped_release release;
  memory.open(opened.data());
}

void bind_peer_memory(py::module_& m) {
  py::class_<PeerMemory>(m, "PeerMemory")
      .def(py::init([](int rank, int size, py::object memory_, int device) {
             const TensorView memory("memory", memory_);
             require_device(memory.contiguous(), "memory", device);
             return std::make_unique<PeerMemory>(rank, size, memory.data(), device);
           }),
           arg("rank"), arg("size"), arg("memory"), arg("device"))
      .def("handle", &bytes_of)
      .def("open", &open, arg("handles"))
      .def_property_readonly(
          "addresses",
          [](const PeerMemory& memory) {
            std::vector<uintptr_t> addresses;
            for (int r = 0; r < memory.size(); ++r) {
              addresses.push_back(reinterpret_cast<uintptr_t>(memory.at(r)));
            }
            return addresses;
          },
          "Of each rank's memory, as mapped here.");
}

void bind_peer_merge(py::module_& m) {
  py::class_<PeerMerge>(m, "PeerMerge")
      .def(py::init<int, int, int64_t, double, int>(), py::call_guard<py::gil_scoped_release>(),
           arg("rank"), arg("size"), arg("capacity"), arg("timeout"), arg("device"))
      .def("handle", [](PeerMerge& merge) { return bytes_of(merge.peers()); })
      .def(
          "open",
          [](PeerMerge& merge, const std::vector<std::string>& handles) {
            open(merge.peers(), handles);
          },
          arg("handles"))
      .def("check", py::overload_cast<>(&PeerMerge::check, py::const_));
}

void bind_rank_merge(py::module_& m) {
  py::class_<RankMerge>(m, "RankMerge")
      .def(py::init<const PeerMerge&>(), py::keep_alive<1, 2>(), arg("peers"))
      .def(py::init([](NcclCommunicator& nccl, const DeviceMemory& workspace) {
             return RankMerge(nccl, workspace.data(), workspace.bytes());
           }),
           py::keep_alive<1, 3>(), arg("nccl"), arg("workspace"))
      .def(
          "merge",
          [](const RankMerge& merge, py::object o, py::object lse, py::object out,
             uintptr_t stream) {
            const Partial partial(o, lse, out);
            const PeerMergeParams p = params_of(partial);
            check(p);
            require_device(partial.o, "o", merge.device());
            require_device(partial.lse, "lse", merge.device());
            require_device(partial.out, "out", merge.device());
            merge.merge(p, to_stream(stream));
          },
          arg("o"), arg("lse"), arg("out"), arg("stream"));
}

}  // namespace

void bind_comm(py::module_& m) {
  bind_nccl(m);
  bind_peer_memory(m);
  bind_peer_merge(m);
  py::class_<Stream>(m, "Stream")
      .def(py::init<int>(), arg("device"))
      .def_property_readonly("handle", &Stream::handle);
  py::class_<Event>(m, "Event")
      .def(py::init<int>(), arg("device"))
      .def("record", &Event::record, arg("stream"))
      .def("block", &Event::block, arg("stream"));
  py::class_<DeviceMemory>(m, "DeviceMemory")
      .def(py::init<int64_t, int>(), arg("bytes"), arg("device"))
      .def("array_interface", &DeviceMemory::array_interface, arg("begin"), arg("end"));
  bind_rank_merge(m);
  m.def("device_count", &device_count);
  m.def("device_id", &device_id, arg("device"));
  m.def("copy", &copy, arg("source"), arg("target"), arg("device"), arg("stream"));
  m.def("merge_gathered", &py_merge_gathered, arg("gathered"), arg("num_shards"), arg("o"),
        arg("lse"), arg("out"), arg("device"), arg("stream"));
}

}  // namespace star_attention
