# Installs a relocatable tree: lib/, include/ and the CMake package FusedRope. The wheel has the same tree under
# fused_rope/, and the component `python` as well.

set(CMAKE_INSTALL_MESSAGE LAZY)
set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/FusedRope)
install(TARGETS fused_rope fused_rope_kernels EXPORT FusedRopeTargets
        LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR}
        FILE_SET HEADERS DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(EXPORT FusedRopeTargets NAMESPACE FusedRope:: DESTINATION ${package_dir})
configure_package_config_file(cmake/FusedRopeConfig.cmake.in FusedRopeConfig.cmake INSTALL_DESTINATION ${package_dir})
write_basic_package_version_file(FusedRopeConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/FusedRopeConfig.cmake ${CMAKE_CURRENT_BINARY_DIR}/FusedRopeConfigVersion.cmake
        DESTINATION ${package_dir})

if(FUSED_ROPE_PYTHON)
  install(TARGETS _C LIBRARY DESTINATION . COMPONENT python EXCLUDE_FROM_ALL)
  install(FILES ${CMAKE_CURRENT_BINARY_DIR}/python/_build.py DESTINATION . COMPONENT python EXCLUDE_FROM_ALL)
endif()

if(FUSED_ROPE_INPLACE)
  set(inplace ${CMAKE_CURRENT_SOURCE_DIR}/python/fused_rope)
  set(stamp ${CMAKE_CURRENT_BINARY_DIR}/inplace.stamp)
  add_custom_command(
      OUTPUT ${stamp}
      COMMAND ${CMAKE_COMMAND} --install ${CMAKE_CURRENT_BINARY_DIR} --prefix ${inplace}
      COMMAND ${CMAKE_COMMAND} --install ${CMAKE_CURRENT_BINARY_DIR} --prefix ${inplace} --component python
      COMMAND ${CMAKE_COMMAND} -E touch ${stamp}
      DEPENDS fused_rope _C ${kernel_headers} ${operator_headers} ${CMAKE_CURRENT_BINARY_DIR}/python/_build.py
      COMMENT "Placing the package in ${inplace}" VERBATIM)
  add_custom_target(fused_rope_inplace ALL DEPENDS ${stamp})
endif()
