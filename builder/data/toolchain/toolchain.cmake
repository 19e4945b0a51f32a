# CMake reads this file because the environment sets CMAKE_TOOLCHAIN_FILE. The file selects native compilers, and the headers
# and libraries of the target.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR $ENV{GRACEFARM_TARGET})
set(CMAKE_C_COMPILER $ENV{CC})
set(CMAKE_CXX_COMPILER $ENV{CXX})
set(CMAKE_LIBRARY_ARCHITECTURE $ENV{GRACEFARM_TARGET}-linux-gnu)
set(CMAKE_C_LIBRARY_ARCHITECTURE ${CMAKE_LIBRARY_ARCHITECTURE})
set(CMAKE_CXX_LIBRARY_ARCHITECTURE ${CMAKE_LIBRARY_ARCHITECTURE})
if(DEFINED ENV{CUDA_HOME})
    set(CMAKE_CUDA_COMPILER $ENV{CUDA_HOME}/bin/nvcc)
    set(CMAKE_CUDA_HOST_COMPILER $ENV{CXX})
    set(CUDAToolkit_ROOT $ENV{CUDA_HOME})
    # torch still contains FindCUDA. FindCUDA does not search for the toolkit in a cross build.
    set(CUDA_TOOLKIT_ROOT_DIR $ENV{CUDA_HOME} CACHE PATH "the target's toolkit")
    set(CMAKE_CUDA_ARCHITECTURES $ENV{GRACEFARM_CMAKE_SM})
endif()
set(CMAKE_CROSSCOMPILING_EMULATOR /gracefarm/bin/emulate)
# In a cross build, FindPython does not run an interpreter. Our interpreter belongs to the target, so these variables name it.
foreach(GRACEFARM_PREFIX Python Python3)
    set(${GRACEFARM_PREFIX}_EXECUTABLE /env/bin/python3)
    set(${GRACEFARM_PREFIX}_INCLUDE_DIR $ENV{GRACEFARM_PYTHON_INCLUDE})
endforeach()
# GRACEFARM_CMAKE contains the key `cmake` of the recipe's table [build], with one NAME=VALUE per line.
string(REPLACE "\n" ";" GRACEFARM_CACHE "$ENV{GRACEFARM_CMAKE}")
foreach(GRACEFARM_ENTRY IN LISTS GRACEFARM_CACHE)
    string(REGEX MATCH "^([^=]+)=(.*)$" GRACEFARM_MATCH "${GRACEFARM_ENTRY}")
    set(${CMAKE_MATCH_1} "${CMAKE_MATCH_2}" CACHE STRING "set by the recipe" FORCE)
endforeach()
