// Properties of the current device, read once per device.
#pragma once

namespace star_attention {

struct DeviceInfo {
  int compute_capability;  // 90 for sm_90
  int num_sms;
  int smem_per_block;  // bytes, the most that a kernel can ask for
};

const DeviceInfo& current_device();

// Whether a kernel's code on the current device was compiled for compute capability 9.0 or newer,
// which the device's own need not tell: newer GPUs run older code too. Looked up once.
bool compiled_for_sm90(const void* kernel);

}  // namespace star_attention
