// star_attention._trt: engines built and run. Streams are integers, tensors those of TensorView.
// Errors of arguments become ValueError, those of TensorRT and CUDA RuntimeError.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <memory>
#include <tuple>

#include "bindings/quantized_pages.h"
#include "bindings/tensor_view.h"
#include "common/check.h"
#include "common/device_guard.h"
#include "star_attention/builder.h"
#include "star_attention/plugin.h"
#include "star_attention/session.h"

namespace star_attention {
namespace {

namespace py = pybind11;
using py::arg;
using ReleaseGil = py::call_guard<py::gil_scoped_release>;

cudaStream_t to_stream(uintptr_t stream) { return reinterpret_cast<cudaStream_t>(stream); }

// Calls Python's `function`, from threads that do not hold the interpreter's lock.
Log to_log(py::function function) {
  const std::shared_ptr<py::function> held(new py::function(std::move(function)), [](auto* f) {
    const py::gil_scoped_acquire acquire;
    delete f;
  });
  return [held](const char* level, const std::string& message) {
    const py::gil_scoped_acquire acquire;
    // Bytes that are no UTF-8 become "?": TensorRT promises none.
    const auto text = py::reinterpret_steal<py::str>(
        PyUnicode_DecodeUTF8(message.data(), static_cast<Py_ssize_t>(message.size()), "replace"));
    (*held)(level, text);
  };
}

const char* name_of(nvinfer1::DataType type) {
  switch (type) {
    case nvinfer1::DataType::kFLOAT:
      return "float32";
    case nvinfer1::DataType::kHALF:
      return "float16";
#if NV_TENSORRT_MAJOR >= 9
    case nvinfer1::DataType::kBF16:
      return "bfloat16";
#endif
    case nvinfer1::DataType::kINT32:
      return "int32";
    default:
      return "another type";
  }
}

ScalarType scalar_type(nvinfer1::DataType type) {
  switch (type) {
    case nvinfer1::DataType::kFLOAT:
      return kFloat32;
    case nvinfer1::DataType::kHALF:
      return kFloat16;
#if NV_TENSORRT_MAJOR >= 9
    case nvinfer1::DataType::kBF16:
      return kBFloat16;
#endif
    case nvinfer1::DataType::kINT32:
      return kInt32;
    default:
      return ScalarType::kOther;
  }
}

DType code_dtype(const std::string& name) {
  require(name == "fp8" || name == "int8", "kv_dtype", name, "fp8 or int8");
  return name == "fp8" ? DType::kFloat8 : DType::kInt8;
}

// Pages of kv_pool, whose elements have no type here but are of `dtype`; others as in
// QuantizePagesParams.
template <typename Function>
void with_quantized_pages(Function function, py::object kv_pool_, py::object scales_,
                          py::object pages_, py::object others_, const std::string& dtype,
                          const std::string& kv_dtype, uintptr_t stream) {
  const TensorView kv_pool("kv_pool", kv_pool_), scales("scales", scales_), pages("pages", pages_),
      others("others", others_);
  QuantizePagesParams p = quantize_pages_params(kv_pool, scales, pages, others);
  require(dtype == "float16" || dtype == "bfloat16", "dtype", dtype, "float16 or bfloat16");
  p.dtype = dtype == "float16" ? DType::kFloat16 : DType::kBFloat16;
  p.kv_dtype = code_dtype(kv_dtype);
  const DeviceGuard guard(kv_pool.device());
  function(p, to_stream(stream));
}

// A StepContext together with the Python objects that it points into.
class PyStepContext {
 public:
  StepContext context;

  py::object kv_pool() const { return kv_pool_; }
  void set_kv_pool(py::object tensor) {
    const TensorView view("kv_pool", tensor);
    view.rank(6).shape({-1, -1, 2, -1, -1, -1}).contiguous().device();
    context.kv_pool = view.data();
    context.num_layers = to_int(view.size(0), "kv_pool.shape[0]");
    context.num_pages = view.size(1);
    context.tokens_per_block = to_int(view.size(4), "kv_pool.shape[4]");
    kv_pool_ = std::move(tensor);
  }

  py::object merge() const { return merge_; }
  void set_merge(py::object merge) {
    context.merge = merge.is_none() ? nullptr : merge.cast<const RankMerge*>();
    merge_ = std::move(merge);
  }

  py::object exchange() const { return exchange_; }
  void set_exchange(py::object exchange) {
    context.exchange = exchange.is_none() ? nullptr : exchange.cast<PageExchange*>();
    exchange_ = std::move(exchange);
  }

  // Codes are in kv_pool's memory.
  void set_prefix(py::object scales_, const std::string& kv_dtype, py::object page_table_,
                  py::object kv_lens_, int max_kv_len) {
    const TensorView scales("scales", scales_), page_table("page_table", page_table_),
        kv_lens("kv_lens", kv_lens_);
    scales.dtype({kFloat32}).shape({context.num_layers, 2 * context.num_pages, 2, -1});
    scales.contiguous().device();
    page_table.dtype({kInt32}).rank(2).contiguous().device();
    kv_lens.dtype({kInt32}).shape({page_table.size(0)}).contiguous().device();
    QuantizedPrefix& prefix = context.prefix;
    prefix.kv_dtype = code_dtype(kv_dtype);
    prefix.scales = static_cast<const float*>(scales.data());
    prefix.page_table = static_cast<const int32_t*>(page_table.data());
    prefix.page_table_stride = to_int(page_table.size(1), "page_table.shape[1]");
    prefix.kv_lens = static_cast<const int32_t*>(kv_lens.data());
    prefix.max_kv_len = max_kv_len;
    prefix_ = py::make_tuple(scales_, page_table_, kv_lens_);
  }

  py::object workspace() const { return workspace_; }
  void set_workspace(py::object tensor) {
    if (tensor.is_none()) {
      context.workspace = nullptr;
      context.workspace_bytes = 0;
    } else {
      const TensorView view("workspace", tensor);
      view.contiguous().device();
      context.workspace = view.data();
      context.workspace_bytes = view.bytes();
    }
    workspace_ = std::move(tensor);
  }

 private:
  py::object kv_pool_, merge_ = py::none(), exchange_ = py::none(), workspace_ = py::none(),
                       prefix_ = py::none();
};

// An Execution together with what is bound to it.
class PyExecution {
 public:
  PyExecution(Session& session, int profile) : session_(session), execution_(session, profile) {}

  void bind(const std::string& name, py::object tensor) {
    const IoTensor& io = session_.tensor(name);
    const TensorView view(name.c_str(), tensor);
    const int rank = static_cast<int>(io.shape.size());
    view.dtype({scalar_type(io.type)}).rank(rank).contiguous();
    require(view.device() == session_.device(), name.c_str(),
            "device " + std::to_string(view.device()),
            "device " + std::to_string(session_.device()) + ", the engine's");
    Shape shape;
    for (int i = 0; i < rank; ++i) shape.push_back(view.size(i));
    if (io.is_input) {
      execution_.set_input(name, shape, view.data());
    } else {
      execution_.set_output(name, shape, view.data());
    }
    bound_[name] = std::move(tensor);
  }

  void bind_context(py::object context) {
    execution_.set_context(context.cast<PyStepContext&>().context);
    bound_["runtime_context"] = std::move(context);
  }

  void enqueue(uintptr_t stream) { execution_.enqueue(to_stream(stream)); }
  std::unique_ptr<Graph> capture(uintptr_t stream) { return execution_.capture(to_stream(stream)); }

 private:
  Session& session_;
  std::map<std::string, py::object> bound_;
  Execution execution_;
};

using PyRange = std::tuple<Shape, Shape, Shape>;

Profile to_profile(const std::map<std::string, PyRange>& ranges) {
  Profile profile;
  for (const auto& [name, range] : ranges) {
    profile[name] = {std::get<0>(range), std::get<1>(range), std::get<2>(range)};
  }
  return profile;
}

void build(const std::string& onnx, const std::string& engine,
           const std::vector<std::map<std::string, PyRange>>& profiles, const std::string& dtype,
           int optimization_level, const std::string& timing_cache, int64_t workspace_bytes,
           int workers, py::function log, int device) {
  BuildOptions options;
  options.onnx_file = onnx;
  options.engine_file = engine;
  for (const auto& ranges : profiles) options.profiles.push_back(to_profile(ranges));
  options.dtype = dtype;
  options.optimization_level = optimization_level;
  options.timing_cache = timing_cache;
  options.workspace_bytes = workspace_bytes;
  options.workers = workers;
  const Log to = to_log(std::move(log));
  const py::gil_scoped_release release;
  const DeviceGuard guard(device);
  build_engine(options, to);
}

// Of each tensor: name, dtype, whether it is an input, shape, (min, opt, max) of each profile.
py::list io_of(const Session& session) {
  py::list io;
  for (const IoTensor& tensor : session.io()) {
    std::vector<PyRange> profiles;
    for (const ShapeRange& range : tensor.profiles) {
      profiles.emplace_back(range.min, range.opt, range.max);
    }
    io.append(
        py::make_tuple(tensor.name, name_of(tensor.type), tensor.is_input, tensor.shape, profiles));
  }
  return io;
}

// Of each run: the other rank, the first page, how many.
using PyRuns = std::vector<std::tuple<int, int64_t, int64_t>>;

std::vector<PageExchange::Run> to_runs(const PyRuns& given) {
  std::vector<PageExchange::Run> runs;
  for (const auto& [peer, first, count] : given) runs.push_back({peer, first, count});
  return runs;
}

void bind_step(py::module_& m) {
  py::class_<PageExchange>(m, "PageExchange")
      .def(py::init([](NcclCommunicator& nccl, const PyRuns& sends, const PyRuns& receives) {
             return std::make_unique<PageExchange>(nccl, to_runs(sends), to_runs(receives));
           }),
           arg("nccl"), arg("sends"), arg("receives"), py::keep_alive<1, 2>())
      .def("wait_seconds", &PageExchange::wait_seconds);

  using Context = PyStepContext;
  const auto field = [](auto StepContext::* member) {
    return std::pair(
        [member](const Context& c) { return c.context.*member; },
        [member](Context& c, decltype(StepContext{}.*member) value) { c.context.*member = value; });
  };
  const auto [causal, set_causal] = field(&StepContext::causal);
  const auto [max_q_len, set_max_q_len] = field(&StepContext::max_q_len);
  const auto [max_kv_len, set_max_kv_len] = field(&StepContext::max_kv_len);
  const auto [layers, set_layers] = field(&StepContext::attending_layers);
  py::class_<Context>(m, "StepContext")
      .def(py::init([](py::object kv_pool, bool causal, int max_q_len, int max_kv_len,
                       int attending_layers, py::object merge, py::object exchange,
                       py::object workspace) {
             auto made = std::make_unique<Context>();
             made->set_kv_pool(std::move(kv_pool));
             made->context.causal = causal;
             made->context.max_q_len = max_q_len;
             made->context.max_kv_len = max_kv_len;
             made->context.attending_layers = attending_layers;
             made->set_merge(std::move(merge));
             made->set_exchange(std::move(exchange));
             made->set_workspace(std::move(workspace));
             return made;
           }),
           py::kw_only(), arg("kv_pool"), arg("causal"), arg("max_q_len"), arg("max_kv_len"),
           arg("attending_layers"), arg("merge") = py::none(), arg("exchange") = py::none(),
           arg("workspace") = py::none())
      // What the input runtime_context holds, for who runs an engine without Execution.
      .def_property_readonly(
          "address", [](const Context& c) { return reinterpret_cast<uintptr_t>(&c.context); })
      .def_property("kv_pool", &Context::kv_pool, &Context::set_kv_pool)
      .def_property("causal", causal, set_causal)
      .def_property("max_q_len", max_q_len, set_max_q_len)
      .def_property("max_kv_len", max_kv_len, set_max_kv_len)
      .def_property("attending_layers", layers, set_layers)
      .def_property("merge", &Context::merge, &Context::set_merge)
      .def_property("exchange", &Context::exchange, &Context::set_exchange)
      .def_property("workspace", &Context::workspace, &Context::set_workspace)
      .def("set_prefix", &Context::set_prefix, py::kw_only(), arg("scales"), arg("kv_dtype"),
           arg("page_table"), arg("kv_lens"), arg("max_kv_len"));

  const auto bind_pages = [&m](const char* name, auto function, const char* others) {
    m.def(
        name,
        [function](py::object kv_pool, py::object scales, py::object pages, py::object to,
                   const std::string& dtype, const std::string& kv_dtype, uintptr_t stream) {
          with_quantized_pages(function, kv_pool, scales, pages, to, dtype, kv_dtype, stream);
        },
        py::kw_only(), arg("kv_pool"), arg("scales"), arg("pages"), arg(others), arg("dtype"),
        arg("kv_dtype"), arg("stream"));
  };
  bind_pages("quantize_pages", &quantize_pages, "tokens");
  bind_pages("dequantize_pages", &dequantize_pages, "targets");

  m.def(
      "step_workspace_bytes",
      [](int num_q_heads, int num_kv_heads, int head_dim, int max_q_len, int max_merge_tokens,
         bool has_prefix, int device) {
        const DeviceGuard guard(device);
        return step_workspace_bytes(num_q_heads, num_kv_heads, head_dim, max_q_len,
                                    max_merge_tokens, has_prefix);
      },
      py::kw_only(), arg("num_q_heads"), arg("num_kv_heads"), arg("head_dim"), arg("max_q_len"),
      arg("max_merge_tokens"), arg("has_prefix"), arg("device"));
}

void bind_session(py::module_& m) {
  py::class_<Graph>(m, "Graph")
      .def(
          "launch", [](const Graph& graph, uintptr_t stream) { graph.launch(to_stream(stream)); },
          arg("stream"), ReleaseGil());
  py::class_<PyExecution>(m, "Execution")
      .def("bind", &PyExecution::bind, arg("name"), arg("tensor"))
      .def("bind_context", &PyExecution::bind_context, arg("context"))
      .def("enqueue", &PyExecution::enqueue, arg("stream"), ReleaseGil())
      .def("capture", &PyExecution::capture, arg("stream"), ReleaseGil(), py::keep_alive<0, 1>());
  py::class_<Session>(m, "Session")
      .def(py::init([](const std::string& engine_file, int device, py::function log) {
             Log to = to_log(std::move(log));
             const py::gil_scoped_release release;
             return std::make_unique<Session>(engine_file, device, std::move(to));
           }),
           arg("engine_file"), arg("device"), arg("log"))
      .def_property_readonly("io", &io_of)
      .def_property_readonly("num_profiles", &Session::num_profiles)
      .def_property_readonly("weight_bytes", &Session::weight_bytes)
      .def_property_readonly("activation_bytes", &Session::activation_bytes)
      .def(
          "execution",
          [](Session& session, int profile) {
            return std::make_unique<PyExecution>(session, profile);
          },
          arg("profile"), ReleaseGil(), py::keep_alive<0, 1>());
}

PYBIND11_MODULE(_trt, m) {
  py::module_::import("star_attention._C");  // has NcclCommunicator and RankMerge
  m.attr("HEADERS_VERSION") = compiled_version();
#ifdef STAR_ATTENTION_ONNX_PARSER
  m.attr("HAS_PARSER") = true;
#else
  m.attr("HAS_PARSER") = false;
#endif
#ifdef STAR_ATTENTION_CUBLAS
  m.attr("HAS_CUBLAS") = true;
  m.attr("HAS_FP8") = has_fp8_products();
#else
  m.attr("HAS_CUBLAS") = false;
  m.attr("HAS_FP8") = false;
#endif
  m.def("load", &load_tensorrt, arg("folder") = "", ReleaseGil());
  m.def("register_plugins", &register_plugins_globally);
  m.def("version", &tensorrt_version);
  m.def("build", &build, py::kw_only(), arg("onnx"), arg("engine"), arg("profiles"), arg("dtype"),
        arg("optimization_level"), arg("timing_cache"), arg("workspace_bytes"), arg("workers"),
        arg("log"), arg("device") = 0);
  bind_step(m);
  bind_session(m);
}

}  // namespace
}  // namespace star_attention
