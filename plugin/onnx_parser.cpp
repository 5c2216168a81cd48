// The only file that needs NvOnnxParser.h.
#include "onnx_parser.h"

#include <NvOnnxParser.h>

#include <stdexcept>

#include "star_attention/tensorrt.h"

namespace star_attention {
namespace {

void destroy(nvonnxparser::IParser* parser) {
#if NV_TENSORRT_MAJOR >= 10
  delete parser;
#else
  parser->destroy();  // 8.6.0 and 8.6.1 differ in where their virtual tables have the destructor
#endif
}

std::string describe(const nvonnxparser::IParserError& error, const std::string& logged) {
#if NV_TENSORRT_MAJOR >= 10
  if (error.node() < 0) return error.desc();
  return std::string("node ") + error.nodeName() + " (" + error.nodeOperator() +
         "): " + error.desc();
#else
  // "While parsing node number 3 [Gemm -> "gemm_3"]:" where it knows the node
  return logged + " " + error.desc();
#endif
}

}  // namespace

std::shared_ptr<void> parse_onnx(const std::string& file, nvinfer1::INetworkDefinition& network) {
  Logger& logger = Logger::instance();
  logger.take_error();
  const auto create =
      reinterpret_cast<void* (*)(void*, void*, int)>(find_in_parser("createNvOnnxParser_INTERNAL"));
  auto* made = static_cast<nvonnxparser::IParser*>(
      create(&network, static_cast<nvinfer1::ILogger*>(&logger), NV_ONNX_PARSER_VERSION));
  if (made == nullptr) throw std::runtime_error("TensorRT makes no parser: " + logger.take_error());
  const std::shared_ptr<nvonnxparser::IParser> parser(made, destroy);
  const int verbosity = static_cast<int>(nvinfer1::ILogger::Severity::kVERBOSE);
  if (parser->parseFromFile(file.c_str(), verbosity)) return parser;
  const std::string logged = logger.take_error();
  throw std::runtime_error(
      file + ": " + (parser->getNbErrors() > 0 ? describe(*parser->getError(0), logged) : logged));
}

}  // namespace star_attention
