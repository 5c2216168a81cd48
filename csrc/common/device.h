// Properties of the current device, read once per device.
#pragma once

namespace star_attention {

struct DeviceInfo {
  int compute_capability;  // 90 for sm_90
  int num_sms;
};

const DeviceInfo& current_device();

}  // namespace star_attention
