# Sets TENSORRT_INCLUDE_DIR, TENSORRT_VERSION and TENSORRT_PARSER_INCLUDE_DIR, where found: in
# TENSORRT_ROOT, in the pip package kernel-lens of the Python used (whose packages are in
# PYTHON_PACKAGES), in the system's paths.
if(Python_EXECUTABLE)
  execute_process(COMMAND ${Python_EXECUTABLE} -c
                  "import sysconfig; print(sysconfig.get_paths()['purelib'])"
                  OUTPUT_VARIABLE PYTHON_PACKAGES OUTPUT_STRIP_TRAILING_WHITESPACE)
endif()

set(TENSORRT_ROOT "" CACHE PATH "TensorRT's SDK, or a folder with its include/")

if(TENSORRT_ROOT)
  find_path(TENSORRT_INCLUDE_DIR NvInfer.h NO_CACHE NO_DEFAULT_PATH
            HINTS ${TENSORRT_ROOT}/include PATH_SUFFIXES x86_64-linux-gnu aarch64-linux-gnu)
  if(NOT TENSORRT_INCLUDE_DIR)
    message(FATAL_ERROR "TENSORRT_ROOT is ${TENSORRT_ROOT}: it has no include/NvInfer.h")
  endif()
else()
  find_path(TENSORRT_INCLUDE_DIR NvInfer.h NO_CACHE
            HINTS ${PYTHON_PACKAGES}/kernel_lens/include/tensorrt)
endif()

if(TENSORRT_INCLUDE_DIR)
  file(READ ${TENSORRT_INCLUDE_DIR}/NvInferVersion.h version_header)
  set(TENSORRT_VERSION "")
  foreach(part MAJOR MINOR PATCH)
    string(REGEX MATCH "define (NV_TENSORRT_${part}|TRT_${part}_ENTERPRISE) ([0-9]+)" _
           "${version_header}")
    list(APPEND TENSORRT_VERSION ${CMAKE_MATCH_2})
  endforeach()
  list(JOIN TENSORRT_VERSION "." TENSORRT_VERSION)

  find_path(TENSORRT_PARSER_INCLUDE_DIR NvOnnxParser.h NO_CACHE NO_DEFAULT_PATH
            HINTS ${TENSORRT_INCLUDE_DIR})
  if(TENSORRT_PARSER_INCLUDE_DIR)
    set(parser "with the ONNX parser")
  else()
    set(parser "without NvOnnxParser.h: engines cannot be built from Python")
  endif()
  message(STATUS "TensorRT ${TENSORRT_VERSION}: ${TENSORRT_INCLUDE_DIR}, ${parser}")
else()
  message(STATUS "TensorRT: no headers, no plugin (set TENSORRT_ROOT, or pip install kernel-lens)")
endif()
