# CUDA's toolkit, looked at before its language is enabled: what is wrong with it is said in one line.
set(install "install one of 12.4 to 13 from developer.nvidia.com/cuda-downloads")
find_package(CUDAToolkit QUIET)
if(NOT CUDAToolkit_FOUND)
  message(FATAL_ERROR " no CUDA toolkit was found: ${install}, or name its folder in "
                      "CUDAToolkit_ROOT")
endif()
if(CUDAToolkit_VERSION VERSION_LESS 12.4)
  message(FATAL_ERROR " CUDA ${CUDAToolkit_VERSION} (${CUDAToolkit_NVCC_EXECUTABLE}) is too old: "
                      "${install}")
endif()
if(CUDAToolkit_VERSION VERSION_LESS 12.8 AND CMAKE_CUDA_ARCHITECTURES MATCHES "100a|120")
  message(FATAL_ERROR " STAR_ATTENTION_ARCHS: ${CMAKE_MATCH_0} needs CUDA 12.8 or newer, this is "
                      "${CUDAToolkit_VERSION}")
endif()
if(NOT CMAKE_CUDA_COMPILER)
  set(CMAKE_CUDA_COMPILER ${CUDAToolkit_NVCC_EXECUTABLE})
endif()
enable_language(CUDA)
list(JOIN CMAKE_CUDA_ARCHITECTURES " " archs)
message(STATUS "CUDA ${CUDAToolkit_VERSION} for ${archs}")
