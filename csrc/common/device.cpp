#include "common/device.h"

#include <array>
#include <map>
#include <mutex>

#include "common/check.h"

namespace star_attention {
namespace {

constexpr int kMaxDevices = 64;

DeviceInfo query_device(int device) {
  int major = 0, minor = 0, num_sms = 0, smem = 0;
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
             "compute capability");
  check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device),
             "compute capability");
  check_cuda(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device),
             "multiprocessor count");
  check_cuda(cudaDeviceGetAttribute(&smem, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
             "shared memory");
  require(major >= 8, "device",
          "compute capability " + std::to_string(major) + "." + std::to_string(minor),
          "8.0 or newer");
  return {10 * major + minor, num_sms, smem};
}

}  // namespace

const DeviceInfo& current_device() {
  static std::array<DeviceInfo, kMaxDevices> devices;
  static std::array<std::once_flag, kMaxDevices> once;
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  require(device < kMaxDevices, "device", device, "an index below 64");
  std::call_once(once[device], [&] { devices[device] = query_device(device); });
  return devices[device];
}

bool compiled_for_sm90(const void* kernel) {
  static std::mutex mutex;
  static std::map<const void*, bool> known;
  const std::lock_guard lock(mutex);
  const auto found = known.find(kernel);
  if (found != known.end()) return found->second;
  cudaFuncAttributes compiled;
  check_cuda(cudaFuncGetAttributes(&compiled, kernel), "kernel");
  return known[kernel] = compiled.ptxVersion >= 90;
}

}  // namespace star_attention
