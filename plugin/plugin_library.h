// How the plugin library and TensorRT find each other.
#pragma once

#include <string>

namespace star_attention {

// To the logger of whoever called the plugin.
void log_error(const std::string& message) noexcept;

}  // namespace star_attention
