#include "star_attention/nccl_communicator.h"

#include <dlfcn.h>

#include <algorithm>

#include "common/device_guard.h"

namespace star_attention {
namespace {

// What is used of nccl.h: names and values are NCCL's binary interface, unchanged since 2.10.
struct ncclUniqueId {
  char internal[128];
};
static_assert(sizeof(NcclId) == sizeof(ncclUniqueId));
using ncclComm_t = void*;
using ncclResult_t = int;
constexpr ncclResult_t ncclSuccess = 0, ncclInProgress = 7;
using ncclDataType_t = int;
constexpr ncclDataType_t ncclInt8 = 0, ncclFloat16 = 6, ncclFloat32 = 7, ncclBfloat16 = 9;
using ncclRedOp_t = int;
constexpr ncclRedOp_t ncclSum = 0;

struct Nccl {
  ncclResult_t (*GetUniqueId)(ncclUniqueId*);
  ncclResult_t (*CommInitRank)(ncclComm_t*, int size, ncclUniqueId, int rank);
  ncclResult_t (*CommDestroy)(ncclComm_t);
  ncclResult_t (*CommAbort)(ncclComm_t);
  ncclResult_t (*CommGetAsyncError)(ncclComm_t, ncclResult_t*);
  const char* (*GetErrorString)(ncclResult_t);
  const char* (*GetLastError)(ncclComm_t);
  ncclResult_t (*GroupStart)();
  ncclResult_t (*GroupEnd)();
  ncclResult_t (*AllGather)(const void*, void*, size_t, ncclDataType_t, ncclComm_t, cudaStream_t);
  ncclResult_t (*AllReduce)(const void*, void*, size_t, ncclDataType_t, ncclRedOp_t, ncclComm_t,
                            cudaStream_t);
  ncclResult_t (*Send)(const void*, size_t, ncclDataType_t, int peer, ncclComm_t, cudaStream_t);
  ncclResult_t (*Recv)(void*, size_t, ncclDataType_t, int peer, ncclComm_t, cudaStream_t);
};

template <typename Function>
void find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  if (function == nullptr) {
    throw std::runtime_error(std::string("libnccl.so.2 has no ") + name + ": it is too old");
  }
}

void* open_library(const std::string& path) {
  constexpr const char* kName = "libnccl.so.2";
  if (void* loaded = dlopen(kName, RTLD_NOW | RTLD_NOLOAD)) return loaded;
  void* library = dlopen(path.empty() ? kName : path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr)
    throw std::runtime_error(std::string("NCCL cannot be loaded: ") + dlerror());
  return library;
}

const Nccl& nccl(const std::string& path = {}) {
  static const Nccl functions = [&] {
    void* library = open_library(path);
    Nccl table;
    find(library, "ncclGetUniqueId", table.GetUniqueId);
    find(library, "ncclCommInitRank", table.CommInitRank);
    find(library, "ncclCommDestroy", table.CommDestroy);
    find(library, "ncclCommAbort", table.CommAbort);
    find(library, "ncclCommGetAsyncError", table.CommGetAsyncError);
    find(library, "ncclGetErrorString", table.GetErrorString);
    find(library, "ncclGetLastError", table.GetLastError);
    find(library, "ncclGroupStart", table.GroupStart);
    find(library, "ncclGroupEnd", table.GroupEnd);
    find(library, "ncclAllGather", table.AllGather);
    find(library, "ncclAllReduce", table.AllReduce);
    find(library, "ncclSend", table.Send);
    find(library, "ncclRecv", table.Recv);
    return table;
  }();
  return functions;
}

void check_nccl(ncclResult_t result, const char* what, ncclComm_t comm = nullptr) {
  if (result == ncclSuccess || result == ncclInProgress) return;
  std::string text = std::string("NCCL, ") + what + ": " + nccl().GetErrorString(result);
  const char* details = nccl().GetLastError(comm);
  if (details != nullptr && *details != '\0') text += std::string("; ") + details;
  throw std::runtime_error(text.substr(0, text.find('\n')));
}

ncclDataType_t type_of(DType dtype) {
  return dtype == DType::kFloat16    ? ncclFloat16
         : dtype == DType::kBFloat16 ? ncclBfloat16
                                     : ncclFloat32;
}

}  // namespace

void load_nccl(const std::string& path) { nccl(path); }

NcclId make_nccl_id() {
  ncclUniqueId id;
  check_nccl(nccl().GetUniqueId(&id), "unique id");
  NcclId bytes;
  std::copy(std::begin(id.internal), std::end(id.internal), bytes.begin());
  return bytes;
}

NcclCommunicator::NcclCommunicator(const NcclId& bytes, int rank, int size, int device)
    : size_(size), device_(device) {
  require(size >= 1, "size", size, "at least 1");
  require(rank >= 0 && rank < size, "rank", rank, "0 to " + std::to_string(size - 1));
  ncclUniqueId id;
  std::copy(bytes.begin(), bytes.end(), id.internal);
  const DeviceGuard guard(device);
  ncclComm_t comm = nullptr;
  check_nccl(nccl().CommInitRank(&comm, size, id, rank), "initialisation");
  comm_ = comm;
}

NcclCommunicator::~NcclCommunicator() { close(); }

void NcclCommunicator::close() {
  if (ncclComm_t comm = comm_.exchange(nullptr)) nccl().CommDestroy(comm);
}

void NcclCommunicator::all_gather(const void* buffer, void* gathered, size_t bytes,
                                  cudaStream_t stream) {
  const DeviceGuard guard(device_);
  check_nccl(nccl().AllGather(buffer, gathered, bytes, ncclInt8, comm(), stream), "all-gather",
             comm());
}

void NcclCommunicator::send(const void* buffer, size_t bytes, int dest, cudaStream_t stream) {
  require(dest >= 0 && dest < size_, "dest", dest, "0 to " + std::to_string(size_ - 1));
  const DeviceGuard guard(device_);
  check_nccl(nccl().Send(buffer, bytes, ncclInt8, dest, comm(), stream), "send", comm());
}

void NcclCommunicator::receive(void* buffer, size_t bytes, int source, cudaStream_t stream) {
  require(source >= 0 && source < size_, "source", source, "0 to " + std::to_string(size_ - 1));
  const DeviceGuard guard(device_);
  check_nccl(nccl().Recv(buffer, bytes, ncclInt8, source, comm(), stream), "receive", comm());
}

void NcclCommunicator::all_reduce(void* buffer, size_t count, DType dtype, cudaStream_t stream) {
  const DeviceGuard guard(device_);
  check_nccl(nccl().AllReduce(buffer, buffer, count, type_of(dtype), ncclSum, comm(), stream),
             "all-reduce", comm());
}

void NcclCommunicator::group_start() { check_nccl(nccl().GroupStart(), "group start"); }

void NcclCommunicator::group_end() {
  const DeviceGuard guard(device_);
  check_nccl(nccl().GroupEnd(), "group end");
}

void NcclCommunicator::check() const {
  ncclResult_t error = ncclSuccess;
  check_nccl(nccl().CommGetAsyncError(comm(), &error), "check", comm());
  check_nccl(error, "connection", comm());
}

void NcclCommunicator::abort() {
  if (ncclComm_t comm = comm_.exchange(nullptr)) nccl().CommAbort(comm);
}

void* NcclCommunicator::comm() const {
  void* comm = comm_;
  if (comm == nullptr) throw std::runtime_error("NCCL: this communicator is over");
  return comm;
}

}  // namespace star_attention
