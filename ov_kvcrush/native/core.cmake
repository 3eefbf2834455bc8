# Sources of the store and the kernels, without OpenVINO and Python: for the module and for the tests in C++.
set(CRUSH_SOURCE_DIR ${CMAKE_CURRENT_LIST_DIR}/src)
set(CRUSH_CORE_SOURCES
  arena.cpp
  attention.cpp
  kernels.cpp
  kernels_scalar.cpp
  plan.cpp
  registry.cpp
  store.cpp
  store_files.cpp
  store_growth.cpp
  store_prefill.cpp
  store_selection.cpp
  store_staging.cpp
  tile.cpp
  tokens.cpp
)
# Each instruction set has a file of its own; which of them runs is decided at run time. kernels.cpp asks for them in the same case.
if(CMAKE_CXX_COMPILER_ID MATCHES "GNU|Clang" AND CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
  list(APPEND CRUSH_CORE_SOURCES kernels_avx2.cpp kernels_avx512.cpp kernels_amx.cpp prefill_amx.cpp scores_amx.cpp)
  set_source_files_properties(${CRUSH_SOURCE_DIR}/kernels_avx2.cpp PROPERTIES COMPILE_OPTIONS "-mavx2;-mfma;-mf16c")
  set_source_files_properties(${CRUSH_SOURCE_DIR}/kernels_avx512.cpp PROPERTIES COMPILE_OPTIONS
    "-mavx512f;-mavx512bw;-mavx512dq;-mavx512vl;-mavx2;-mfma;-mf16c")
  # The tile instructions themselves are inline assembly.
  set_source_files_properties(${CRUSH_SOURCE_DIR}/kernels_amx.cpp PROPERTIES COMPILE_OPTIONS
    "-mavx512f;-mavx512bw;-mavx512dq;-mavx512vl;-mavx512vbmi;-mavx2;-mfma;-mf16c")
  set_source_files_properties(${CRUSH_SOURCE_DIR}/prefill_amx.cpp PROPERTIES COMPILE_OPTIONS
    "-mavx512f;-mavx512bw;-mavx512dq;-mavx512vl;-mavx2;-mfma;-mf16c")
  set_source_files_properties(${CRUSH_SOURCE_DIR}/scores_amx.cpp PROPERTIES COMPILE_OPTIONS
    "-mavx512f;-mavx512bw;-mavx512dq;-mavx512vl;-mavx2;-mfma;-mf16c")
endif()
list(TRANSFORM CRUSH_CORE_SOURCES PREPEND ${CRUSH_SOURCE_DIR}/)
