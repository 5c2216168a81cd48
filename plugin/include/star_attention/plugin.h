// The plugin library libstar_attention_plugin.so: StarAttention and the plugins of a layer's other
// operators, all version "1". IPluginRegistry::loadLibrary makes them known to a registry; loading
// the library in another way changes no registry.
#pragma once

#include "star_attention/export.h"

namespace nvinfer1 {
class IPluginRegistry;
}

namespace star_attention {

// For programs that link the library: makes the plugins known to `registry`, a builder's, a
// runtime's or TensorRT's global one. Nothing changes where they are known.
STAR_ATTENTION_EXPORT void register_plugins(nvinfer1::IPluginRegistry& registry);

// Whether cuBLAS, as compiled with and as loaded, multiplies in FP8 as StarLinearFp8 needs it. Not
// in a library that was compiled without cuBLAS.
STAR_ATTENTION_EXPORT bool has_fp8_products();

}  // namespace star_attention
