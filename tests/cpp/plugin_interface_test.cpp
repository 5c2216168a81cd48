// What TensorRT sees of the plugins, without TensorRT and without a GPU.
//
//   plugin_interface_test <libstar_attention_plugin.so>
#include <NvInfer.h>
#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "testing.h"

namespace {

using nvinfer1::DataType;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;
using Fields = std::vector<PluginField>;

nvinfer1::PluginFieldCollection collect(const Fields& fields) {
  return {static_cast<int32_t>(fields.size()), fields.data()};
}

// TensorRT's two interfaces by the same names.
#if NV_TENSORRT_MAJOR >= 10
constexpr char kGetCreators[] = "getCreators";
using AnyCreator = nvinfer1::IPluginCreatorInterface;
using Creator = nvinfer1::IPluginCreatorV3One;
using Plugin = std::unique_ptr<nvinfer1::IPluginV3>;
using Serialized = Fields;

Creator& creator_of(AnyCreator& creator) {
  expect(std::strcmp(creator.getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") == 0, "V3One");
  return static_cast<Creator&>(creator);
}

Plugin create(Creator& creator, const Fields& fields) {
  const auto all = collect(fields);
  return Plugin(
      creator.createPlugin(creator.getPluginName(), &all, nvinfer1::TensorRTPhase::kBUILD));
}

Plugin deserialize(Creator& creator, const Serialized& fields) {
  const auto all = collect(fields);
  return Plugin(
      creator.createPlugin(creator.getPluginName(), &all, nvinfer1::TensorRTPhase::kRUNTIME));
}

template <typename Capability>
Capability& capability(const Plugin& plugin, nvinfer1::PluginCapabilityType type) {
  auto* const found = static_cast<Capability*>(plugin->getCapabilityInterface(type));
  expect(found != nullptr, "a capability");
  return *found;
}

auto& core(const Plugin& plugin) {
  return capability<nvinfer1::IPluginV3OneCore>(plugin, nvinfer1::PluginCapabilityType::kCORE);
}

auto& build(const Plugin& plugin) {
  return capability<nvinfer1::IPluginV3OneBuild>(plugin, nvinfer1::PluginCapabilityType::kBUILD);
}

auto& runtime(const Plugin& plugin) {
  return capability<nvinfer1::IPluginV3OneRuntime>(plugin,
                                                   nvinfer1::PluginCapabilityType::kRUNTIME);
}

Plugin clone(const Plugin& plugin) { return Plugin(plugin->clone()); }

// With values of its own: those of a plugin end with it.
class Stored {
 public:
  explicit Stored(const Plugin& plugin) {
    const auto& all = *runtime(plugin).getFieldsToSerialize();
    for (int i = 0; i < all.nbFields; ++i) {
      const PluginField& field = all.fields[i];
      expect(field.length == 1, "a number");
      std::memcpy(&values_[i], field.data, 4);
      fields_.emplace_back(field.name, &values_[i], field.type, 1);
    }
  }
  Stored(const Stored&) = delete;
  const Serialized& get() const { return fields_; }
  std::vector<int32_t> numbers() const {
    return {values_.begin(), values_.begin() + static_cast<int>(fields_.size())};
  }
  void change_format() { ++values_[0]; }

 private:
  std::array<int32_t, 8> values_{};
  Fields fields_;
};

std::string name_of(const Plugin& plugin) { return core(plugin).getPluginName(); }

bool supports(const Plugin& plugin, int position, const std::vector<PluginTensorDesc>& tensors) {
  std::vector<nvinfer1::DynamicPluginTensorDesc> all(tensors.size());
  for (size_t i = 0; i < all.size(); ++i) all[i].desc = tensors[i];
  return build(plugin).supportsFormatCombination(position, all.data(),
                                                 static_cast<int32_t>(all.size()) - 1, 1);
}

DataType output_type(const Plugin& plugin, const std::vector<DataType>& inputs) {
  DataType type = DataType::kBOOL;
  const auto count = static_cast<int32_t>(inputs.size());
  expect(build(plugin).getOutputDataTypes(&type, 1, inputs.data(), count) == 0, "types");
  return type;
}

// For a first input of up to `rows` rows.
size_t workspace(const Plugin& plugin, int rows, int num_inputs, int width = 1) {
  std::vector<nvinfer1::DynamicPluginTensorDesc> inputs(num_inputs), outputs(1);
  inputs[0].desc.dims.nbDims = inputs[0].max.nbDims = 2;
  inputs[0].desc.dims.d[1] = inputs[0].max.d[1] = width;
  inputs[0].desc.dims.d[0] = -1;
  inputs[0].max.d[0] = rows;
  return build(plugin).getWorkspaceSize(inputs.data(), num_inputs, outputs.data(), 1);
}

int enqueue(const Plugin& plugin, const std::vector<PluginTensorDesc>& descs,
            const void* const* inputs, void* const* outputs) {
  return runtime(plugin).enqueue(descs.data(), descs.data(), inputs, outputs, nullptr, nullptr);
}

// As a new execution context has it.
Plugin attached(const Plugin& plugin) { return Plugin(runtime(plugin).attachToContext(nullptr)); }
#else
constexpr char kGetCreators[] = "getPluginCreators";
using AnyCreator = nvinfer1::IPluginCreator;
using Creator = nvinfer1::IPluginCreator;
using Serialized = std::vector<char>;

struct Destroy {
  void operator()(nvinfer1::IPluginV2DynamicExt* plugin) const { plugin->destroy(); }
};
using Plugin = std::unique_ptr<nvinfer1::IPluginV2DynamicExt, Destroy>;

Creator& creator_of(AnyCreator& creator) { return creator; }

Plugin create(Creator& creator, const Fields& fields) {
  const auto all = collect(fields);
  return Plugin(static_cast<nvinfer1::IPluginV2DynamicExt*>(
      creator.createPlugin(creator.getPluginName(), &all)));
}

Plugin deserialize(Creator& creator, const Serialized& data) {
  return Plugin(static_cast<nvinfer1::IPluginV2DynamicExt*>(
      creator.deserializePlugin(creator.getPluginName(), data.data(), data.size())));
}

Plugin clone(const Plugin& plugin) { return Plugin(plugin->clone()); }

class Stored {
 public:
  explicit Stored(const Plugin& plugin) : data_(plugin->getSerializationSize()) {
    plugin->serialize(data_.data());
  }
  const Serialized& get() const { return data_; }
  std::vector<int32_t> numbers() const {
    std::vector<int32_t> numbers(data_.size() / 4);
    std::memcpy(numbers.data(), data_.data(), data_.size());
    return numbers;
  }
  void change_format() { ++data_[0]; }

 private:
  Serialized data_;
};

std::string name_of(const Plugin& plugin) { return plugin->getPluginType(); }

bool supports(const Plugin& plugin, int position, const std::vector<PluginTensorDesc>& tensors) {
  return plugin->supportsFormatCombination(position, tensors.data(),
                                           static_cast<int32_t>(tensors.size()) - 1, 1);
}

DataType output_type(const Plugin& plugin, const std::vector<DataType>& inputs) {
  return plugin->getOutputDataType(0, inputs.data(), static_cast<int32_t>(inputs.size()));
}

size_t workspace(const Plugin& plugin, int rows, int num_inputs, int width = 1) {
  std::vector<PluginTensorDesc> inputs(num_inputs), outputs(1);
  inputs[0].dims.nbDims = 2;
  inputs[0].dims.d[1] = width;
  inputs[0].dims.d[0] = rows;
  return plugin->getWorkspaceSize(inputs.data(), num_inputs, outputs.data(), 1);
}

int enqueue(const Plugin& plugin, const std::vector<PluginTensorDesc>& descs,
            const void* const* inputs, void* const* outputs) {
  return plugin->enqueue(descs.data(), descs.data(), inputs, outputs, nullptr, nullptr);
}

Plugin attached(const Plugin& plugin) { return clone(plugin); }
#endif

std::vector<Creator*> creators;

Creator& find_creator(const std::string& name) {
  for (Creator* creator : creators) {
    if (creator->getPluginName() == name) return *creator;
  }
  throw std::runtime_error("no creator of " + name);
}

const std::vector<int32_t> kLayer = {3, 8, 2, 128};

Fields attention_fields(const std::vector<int32_t>& values) {
  constexpr const char* kNames[] = {"layer", "num_q_heads", "num_kv_heads", "head_dim"};
  Fields fields;
  for (size_t i = 0; i < values.size(); ++i) {
    fields.emplace_back(kNames[i], &values[i], PluginFieldType::kINT32, 1);
  }
  return fields;
}

Plugin attention() { return create(find_creator("StarAttention"), attention_fields(kLayer)); }

void test_creators() {
  for (const char* name : {"StarAttention", "StarGatherRows", "StarRmsNorm", "StarSiluMul"}) {
    Creator& creator = find_creator(name);
    expect(std::string(creator.getPluginVersion()) == "1", "version 1");
    expect(std::string(creator.getPluginNamespace()).empty(), "no namespace");
  }
  const auto& names = *find_creator("StarAttention").getFieldNames();
  expect(names.nbFields == 4, "four fields");
  expect(std::string(names.fields[3].name) == "head_dim", "the last one's name");
  expect(find_creator("StarSiluMul").getFieldNames()->nbFields == 0, "no fields");
}

void test_attributes() {
  Creator& creator = find_creator("StarAttention");
  expect(name_of(attention()) == "StarAttention", "the plugin's name");
  const std::vector<int32_t> odd_heads = {3, 7, 2, 128};
  expect(create(creator, attention_fields(odd_heads)) == nullptr, "no plugin of odd heads");
  expect(create(creator, {}) == nullptr, "no plugin without attributes");
  Fields fields = attention_fields(kLayer);
  fields[1].type = PluginFieldType::kFLOAT32;
  expect(create(creator, fields) == nullptr, "no plugin with a float for a number of heads");
}

void test_serialization() {
  const std::vector<int32_t> expected = {1, 3, 8, 2, 128};  // the format, then the attributes
  Creator& creator = find_creator("StarAttention");
  Stored stored(clone(attention()));
  expect(stored.numbers() == expected, "what engines have kept since format 1");
  const Plugin again = deserialize(creator, stored.get());
  expect(again != nullptr, "a plugin of an engine");
  expect(Stored(clone(again)).numbers() == expected, "the same once more");
  stored.change_format();
  expect(deserialize(creator, stored.get()) == nullptr, "no plugin of another format");

  const float eps = 1e-5f;
  Creator& norm = find_creator("StarRmsNorm");
  const Plugin made = create(norm, {{"eps", &eps, PluginFieldType::kFLOAT32, 1}});
  expect(deserialize(norm, Stored(made).get()) != nullptr, "a norm of an engine");
  Creator& product = find_creator("StarSiluMul");
  expect(deserialize(product, Stored(create(product, {})).get()) != nullptr, "no attributes");
}

// Of StarAttention's inputs and output.
std::vector<PluginTensorDesc> tensors_of(DataType first) {
  std::vector<PluginTensorDesc> tensors(9);
  for (PluginTensorDesc& tensor : tensors) {
    tensor.type = DataType::kINT32;
    tensor.format = nvinfer1::TensorFormat::kLINEAR;
  }
  tensors[0].type = tensors[8].type = first;
  tensors[6].type = DataType::kFLOAT;
  return tensors;
}

void test_formats() {
  const Plugin plugin = attention();
  std::vector<DataType> activations = {DataType::kHALF};
#if NV_TENSORRT_MAJOR >= 9
  activations.push_back(DataType::kBF16);
#endif
  for (const DataType type : activations) {
    auto tensors = tensors_of(type);
    for (int i = 0; i < 9; ++i) expect(supports(plugin, i, tensors), "the types of a layer");
    expect(output_type(plugin, std::vector<DataType>(8, type)) == type, "the first input's type");
    tensors[8].type = DataType::kFLOAT;
    expect(!supports(plugin, 8, tensors), "no other type of output");
    tensors[6].format = nvinfer1::TensorFormat::kCHW32;
    expect(!supports(plugin, 6, tensors), "linear tensors only");
    tensors.pop_back();
    expect(!supports(plugin, 0, tensors), "eight inputs only");
  }
  expect(!supports(plugin, 0, tensors_of(DataType::kFLOAT)), "no float32");
}

void test_workspace() {
  const size_t row = 8 * 128 * 2 + 8 * 4;  // rotated Q in 16 bits, LSE in float32
  expect(workspace(attention(), 100, 8) == 100 * row, "Q and LSE of all rows");
  expect(workspace(create(find_creator("StarSiluMul"), {}), 100, 1) == 0, "none");
}

// Weights in FP8 come as int32, four of them each, as do the bits of their scales.
void test_fp8() {
  const Plugin plugin = create(find_creator("StarLinearFp8Add"), {});
  std::vector<PluginTensorDesc> tensors(5);
  for (PluginTensorDesc& tensor : tensors) {
    tensor.type = DataType::kHALF;
    tensor.format = nvinfer1::TensorFormat::kLINEAR;
  }
  tensors[1].type = tensors[2].type = DataType::kINT32;
  for (int i = 0; i < 5; ++i) expect(supports(plugin, i, tensors), "the types of a product");
  tensors[1].type = DataType::kINT8;
  expect(!supports(plugin, 1, tensors), "no other weights");
  tensors[3].type = DataType::kINT32;
  expect(!supports(plugin, 3, tensors), "no other addend");

  const Plugin wide = create(find_creator("StarLinear"), {});
  const Plugin narrow = create(find_creator("StarLinearFp8"), {});
  const size_t rows = workspace(narrow, 128, 3, 512) - workspace(wide, 128, 2, 512);
  expect(rows == 128 * (512 + 4 + 4), "x in FP8, its scales, and rows of a bias");
}

// Every address is one that nobody may read: TensorRT times plugins with tensors of any content.
void test_build_phase() {
  std::vector<const void*> inputs(8, reinterpret_cast<const void*>(0x100));
  std::vector<void*> outputs(1, reinterpret_cast<void*>(0x100));
  std::vector<PluginTensorDesc> descs = tensors_of(DataType::kHALF);
  for (PluginTensorDesc& desc : descs) {
    desc.dims.nbDims = 2;
    desc.dims.d[0] = desc.dims.d[1] = 1 << 20;
  }
  const float eps = 1e-5f;
  for (Creator* creator : creators) {
    const std::string name = creator->getPluginName();
    Fields fields;
    if (name == "StarAttention") fields = attention_fields(kLayer);
    if (name == "StarRmsNorm") fields = {{"eps", &eps, PluginFieldType::kFLOAT32, 1}};
    const Plugin plugin = create(*creator, fields);
    expect(plugin != nullptr, "a plugin " + name);
    for (const auto& copy : {&clone, &attached}) {
      const int status = enqueue(copy(plugin), descs, inputs.data(), outputs.data());
      expect(status == 0, name + " does nothing");
    }
  }
}

void load(const char* path) {
  void* const library = dlopen(path, RTLD_LAZY);
  if (library == nullptr) throw std::runtime_error(dlerror());
  void* const address = dlsym(library, kGetCreators);
  expect(address != nullptr, std::string(kGetCreators) + " in the library");
  int32_t count = 0;
  AnyCreator* const* const all = reinterpret_cast<AnyCreator* const* (*)(int32_t&)>(address)(count);
  for (int32_t i = 0; i < count; ++i) creators.push_back(&creator_of(*all[i]));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s <libstar_attention_plugin.so>\n", argv[0]);
    return 2;
  }
  bool ok = passes("library", [&] { load(argv[1]); });
  if (!ok) return 1;
  ok &= passes("creators", test_creators);
  ok &= passes("attributes", test_attributes);
  ok &= passes("serialization", test_serialization);
  ok &= passes("formats", test_formats);
  ok &= passes("workspace", test_workspace);
  ok &= passes("build phase", test_build_phase);
  const auto is_fp8 = [](Creator* each) {
    return each->getPluginName() == std::string("StarLinearFp8");
  };
  if (std::any_of(creators.begin(), creators.end(), is_fp8)) ok &= passes("FP8", test_fp8);
  return ok ? 0 : 1;
}
