// The plugin library libstar_attention_plugin.so. Loading it, by whatever way, makes StarAttention
// and the plugins of a layer's other operators, all version "1", known to the TensorRT that the
// process has loaded.
#pragma once

#include "star_attention/export.h"

namespace star_attention {

// For programs that load TensorRT after the plugin library, or that somebody else's loadLibrary may
// have taken the plugins from. False: no TensorRT is loaded.
STAR_ATTENTION_EXPORT bool register_plugins();

}  // namespace star_attention
