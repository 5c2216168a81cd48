// The plugin library libstar_attention_plugin.so. Loading it, by whatever way, makes the plugin
// StarAttention, version "1", known to the TensorRT that the process has loaded.
#pragma once

namespace star_attention {

// For programs that load TensorRT after the plugin library, or that somebody else's loadLibrary may
// have taken the plugin from. False: no TensorRT is loaded.
bool register_plugin();

}  // namespace star_attention
