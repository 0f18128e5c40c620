# Finds nvcc and decides what it builds. FUSED_ROPE_WITH_CUDA means that the operators get CUDA kernels: always with a
# CUDA build of torch, unless FUSED_ROPE_CUDA=OFF. The kernels do not depend on torch: with the C++ tests they are also
# compiled for a torch without CUDA, for one architecture, to keep them building.

set(FUSED_ROPE_WITH_CUDA OFF)
if(NOT FUSED_ROPE_CUDA)
  return()
elseif(NOT TORCH_CUDA_MAJOR AND NOT FUSED_ROPE_CUDA STREQUAL AUTO)
  message(FATAL_ERROR "FUSED_ROPE_CUDA=${FUSED_ROPE_CUDA}, but torch ${TORCH_FULL_VERSION} is a build without CUDA: install "
                      "a CUDA build of torch, or leave FUSED_ROPE_CUDA out.")
elseif(NOT TORCH_CUDA_MAJOR AND NOT FUSED_ROPE_TESTS)
  return()
endif()

# Reports why the CUDA kernels of a CUDA build of torch cannot be compiled, and what to do.
function(fused_rope_no_cuda why)
  if(TORCH_CUDA_MAJOR)
    message(FATAL_ERROR "torch ${TORCH_FULL_VERSION} is a CUDA build, but ${why}: install a CUDA ${TORCH_CUDA_MAJOR} toolkit "
                        "and put its nvcc on PATH or set CUDA_HOME, or set FUSED_ROPE_CUDA=OFF to build for the CPU alone.")
  endif()
  message(STATUS "CUDA kernels are not compiled: ${why}")
endfunction()

find_program(nvcc nvcc HINTS ${CMAKE_CUDA_COMPILER} ENV CUDACXX ENV CUDA_HOME PATHS /usr/local/cuda PATH_SUFFIXES bin NO_CACHE)
if(CMAKE_CUDA_COMPILER)
  set(nvcc ${CMAKE_CUDA_COMPILER})
endif()
if(NOT nvcc)
  fused_rope_no_cuda("there is no nvcc on PATH or under CUDA_HOME")
  return()
endif()

# The nvcc on PATH may be a wrapper script. A dry run prints the directory of the real one.
execute_process(COMMAND ${nvcc} --dryrun -x cu /dev/null ERROR_VARIABLE dryrun OUTPUT_QUIET)
if(dryrun MATCHES "_HERE_=([^\r\n]+)")
  set(nvcc ${CMAKE_MATCH_1}/nvcc)
endif()
set(CMAKE_CUDA_COMPILER ${nvcc} CACHE FILEPATH "")
cmake_path(GET nvcc PARENT_PATH CUDAToolkit_ROOT)
cmake_path(GET CUDAToolkit_ROOT PARENT_PATH CUDAToolkit_ROOT)
find_package(CUDAToolkit REQUIRED)

if(TORCH_CUDA_MAJOR AND NOT TORCH_CUDA_MAJOR EQUAL CUDAToolkit_VERSION_MAJOR)
  fused_rope_no_cuda("${nvcc} is of CUDA ${CUDAToolkit_VERSION}")
elseif(TORCH_CUDA_MAJOR)
  set(FUSED_ROPE_WITH_CUDA ON)
  target_include_directories(torch::cudart INTERFACE ${CUDAToolkit_INCLUDE_DIRS})
endif()

# Architectures: TORCH_CUDA_ARCH_LIST in torch's format ("8.0;9.0+PTX", or "All"), else those of the GPUs of this machine,
# else every supported one that nvcc has, and PTX of the newest.
if(NOT DEFINED TORCH_CUDA_ARCH_LIST)
  set(TORCH_CUDA_ARCH_LIST $ENV{TORCH_CUDA_ARCH_LIST})
endif()
if(NOT TORCH_CUDA_ARCH_LIST)
  execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
                  OUTPUT_VARIABLE capabilities RESULT_VARIABLE failed ERROR_QUIET)
  if(NOT failed)
    string(REGEX MATCHALL "[0-9]+[.][0-9]" TORCH_CUDA_ARCH_LIST "${capabilities}")
    list(REMOVE_DUPLICATES TORCH_CUDA_ARCH_LIST)
  endif()
elseif(TORCH_CUDA_ARCH_LIST STREQUAL All)
  set(TORCH_CUDA_ARCH_LIST)
endif()
if(CMAKE_CUDA_ARCHITECTURES)
  # Set by the user in CMake's format.
elseif(TORCH_CUDA_ARCH_LIST)
  string(REGEX MATCHALL "[^ ;]+" entries "${TORCH_CUDA_ARCH_LIST}")
  foreach(entry IN LISTS entries)
    if(NOT entry MATCHES "^([0-9]+)[.]([0-9][af]?)([+]PTX)?$")
      message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST: expected All, or entries such as 9.0 or 9.0+PTX, got ${entry}")
    endif()
    set(number ${CMAKE_MATCH_1}${CMAKE_MATCH_2})
    list(APPEND CMAKE_CUDA_ARCHITECTURES ${number}-real)
    if(CMAKE_MATCH_3)
      list(APPEND CMAKE_CUDA_ARCHITECTURES ${number}-virtual)
    endif()
  endforeach()
elseif(NOT FUSED_ROPE_WITH_CUDA)
  set(CMAKE_CUDA_ARCHITECTURES 90-real)
else()
  execute_process(COMMAND ${nvcc} --list-gpu-arch OUTPUT_VARIABLE known)
  foreach(number 75 80 86 89 90 100 120)
    if(known MATCHES "compute_${number}[^0-9]")
      list(APPEND CMAKE_CUDA_ARCHITECTURES ${number}-real)
      set(newest ${number})
    endif()
  endforeach()
  list(APPEND CMAKE_CUDA_ARCHITECTURES ${newest}-virtual)
endif()
enable_language(CUDA)
message(STATUS "CUDA kernels: ${nvcc} ${CUDAToolkit_VERSION}, architectures ${CMAKE_CUDA_ARCHITECTURES}, "
               "in the operators: ${FUSED_ROPE_WITH_CUDA}")
