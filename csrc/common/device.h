// Properties of the current device, read once per device.
#pragma once

namespace star_attention {

struct DeviceInfo {
  int compute_capability;  // 90 for sm_90
  int num_sms;
  int smem_per_block;  // bytes, the most that a kernel can ask for
};

const DeviceInfo& current_device();

}  // namespace star_attention
