# For C++: headers, libraries and what find_package(star_attention) reads. For Python, the component
# `python`: the modules and their libraries in one folder.
include(CMakePackageConfigHelpers)
include(GNUInstallDirs)
set(package ${CMAKE_INSTALL_LIBDIR}/cmake/star_attention)

set(headers ${PROJECT_SOURCE_DIR}/csrc/include/)
set(shared star_attention)
set_target_properties(star_attention PROPERTIES EXPORT_NAME kernels)
install(TARGETS star_attention EXPORT kernels INCLUDES DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(EXPORT kernels NAMESPACE star_attention:: DESTINATION ${package})

if(TARGET star_attention_plugin)
  list(APPEND headers ${PROJECT_SOURCE_DIR}/plugin/include/)
  list(APPEND shared star_attention_plugin)
  set_target_properties(star_attention_plugin PROPERTIES EXPORT_NAME plugin)
  set_target_properties(star_attention_engine PROPERTIES EXPORT_NAME engine)
  install(TARGETS star_attention_plugin star_attention_engine tensorrt_headers EXPORT engine
          INCLUDES DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
  install(EXPORT engine NAMESPACE star_attention:: DESTINATION ${package})
  string(REGEX MATCH "^[0-9]+" TENSORRT_MAJOR ${TENSORRT_VERSION})
  install(FILES ${PROJECT_SOURCE_DIR}/plugin/tensorrt_headers.cmake DESTINATION ${package})
endif()

install(DIRECTORY ${headers} DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
configure_package_config_file(${PROJECT_SOURCE_DIR}/cmake/star_attention-config.cmake.in
                              ${PROJECT_BINARY_DIR}/star_attention-config.cmake
                              INSTALL_DESTINATION ${package})
write_basic_package_version_file(${PROJECT_BINARY_DIR}/star_attention-config-version.cmake
                                 COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/star_attention-config.cmake
              ${PROJECT_BINARY_DIR}/star_attention-config-version.cmake DESTINATION ${package})

foreach(module _C _trt)
  if(TARGET ${module})
    list(APPEND shared ${module})
  endif()
endforeach()
install(TARGETS ${shared} LIBRARY
  DESTINATION . NAMELINK_SKIP COMPONENT python EXCLUDE_FROM_ALL)
