# Finds torch. The Python extension always uses its interpreter's torch. A C++-only build uses the torch that
# CMAKE_PREFIX_PATH or Torch_DIR names, else the interpreter's.
# Sets TORCH_FULL_VERSION (such as 2.13.0+cpu) and, for a CUDA build of torch, TORCH_CUDA_MAJOR.

set(Python_FIND_UNVERSIONED_NAMES FIRST)  # python3 before python3.x: prefers the virtual environment to the system
find_package(Python QUIET COMPONENTS Interpreter)

if(Python_Interpreter_FOUND)
  # The same path as torch.utils.cmake_prefix_path, without importing torch, which takes seconds.
  execute_process(
      COMMAND ${Python_EXECUTABLE} -c "from importlib.util import find_spec; print(*find_spec('torch').submodule_search_locations)"
      OUTPUT_VARIABLE torch_in_python OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
endif()
if(FUSED_ROPE_PYTHON AND torch_in_python)
  set(Torch_DIR ${torch_in_python}/share/cmake/Torch CACHE PATH "" FORCE)
elseif(FUSED_ROPE_PYTHON AND NOT Torch_DIR)  # with pip's build isolation, only setup.py sees torch
  message(FATAL_ERROR "${Python_EXECUTABLE} has no torch: install one there, or name another interpreter with "
                      "-DPython_EXECUTABLE=, or build for C++ alone with -DFUSED_ROPE_PYTHON=OFF.")
elseif(torch_in_python)
  list(APPEND CMAKE_PREFIX_PATH ${torch_in_python}/share/cmake)
endif()

# Torch's own search for CUDA requires a whole toolkit, mistakes the directory of an nvcc wrapper script for the
# toolkit's root, and aborts if there is none. Torch skips the search if this target exists; find_cuda.cmake adds its
# include directories.
add_library(torch::cudart INTERFACE IMPORTED)
find_package(Torch 2.11 REQUIRED)

set(TORCH_FULL_VERSION ${Torch_VERSION})
if(EXISTS ${TORCH_INSTALL_PREFIX}/version.py)
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${TORCH_INSTALL_PREFIX}/version.py)
  file(STRINGS ${TORCH_INSTALL_PREFIX}/version.py version_line REGEX "^__version__")
  string(REGEX REPLACE ".*'(.*)'.*" "\\1" TORCH_FULL_VERSION "${version_line}")
endif()
if(EXISTS ${TORCH_INSTALL_PREFIX}/lib/libc10_cuda.so)
  file(STRINGS ${TORCH_INSTALL_PREFIX}/lib/libc10_cuda.so runtime REGEX "^libcudart[.]so[.][0-9]+$")
  string(REGEX MATCH "[0-9]+$" TORCH_CUDA_MAJOR "${runtime}")
endif()

# Exceptions and streams cross the boundary to torch, so both sides must share one C++ runtime. If the compiler links a
# static runtime, there are two, and exceptions thrown by one side crash the other.
try_compile(runtime_check_linked
    SOURCE_FROM_CONTENT check.cpp "#include <iostream>\nint main() { std::cout << 1; }\n"
    COPY_FILE ${CMAKE_BINARY_DIR}/runtime_check)
if(runtime_check_linked AND CMAKE_SYSTEM_NAME STREQUAL Linux)
  file(STRINGS ${CMAKE_BINARY_DIR}/runtime_check shared_runtime REGEX "^libstdc\\+\\+[.]so|^libc\\+\\+[.]so")
  if(NOT shared_runtime)
    find_library(FUSED_ROPE_LIBSTDCXX libstdc++.so.6 PATH_SUFFIXES ${CMAKE_LIBRARY_ARCHITECTURE} REQUIRED)
    message(STATUS "The compiler links a static C++ runtime: linking torch's, ${FUSED_ROPE_LIBSTDCXX}")
    link_libraries(${FUSED_ROPE_LIBSTDCXX})
  endif()
endif()
