# Sources of the store and the kernels, without OpenVINO and Python: for the module and for the tests in C++. Includes are
# relative to CRUSH_SOURCE_DIR, and point one way: kernels <- store <- op <- python.
set(CRUSH_SOURCE_DIR ${CMAKE_CURRENT_LIST_DIR}/src)
set(CRUSH_CORE_SOURCES
  kernels/attention.cpp
  kernels/kernels.cpp
  kernels/kernels_scalar.cpp
  kernels/product.cpp
  kernels/product_scalar.cpp
  kernels/sampling.cpp
  kernels/sampling_scalar.cpp
  kernels/tile.cpp
  op/plan.cpp
  store/append.cpp
  store/arena.cpp
  store/capture.cpp
  store/claim.cpp
  store/clusters.cpp
  store/compact.cpp
  store/crop.cpp
  store/precisions.cpp
  store/prefill.cpp
  store/recall.cpp
  store/registry.cpp
  store/serialize.cpp
  store/staging.cpp
  store/store.cpp
  store/tokens.cpp
)
# Its results are the same on every CPU.
if(CMAKE_CXX_COMPILER_ID MATCHES "GNU|Clang")
  set_source_files_properties(${CRUSH_SOURCE_DIR}/store/clusters.cpp PROPERTIES COMPILE_OPTIONS "-ffp-contract=off")
endif()
# Each instruction set has a file of its own; which of them runs is decided at run time. kernels/kernels.cpp asks for them
# in the same case.
if(CMAKE_CXX_COMPILER_ID MATCHES "GNU|Clang" AND CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
  list(APPEND CRUSH_CORE_SOURCES
    kernels/attend_amx.cpp
    kernels/kernels_avx2.cpp
    kernels/kernels_avx512.cpp
    kernels/kernels_avx512bf16.cpp
    kernels/kernels_avx512vnni.cpp
    kernels/kernels_avxvnni.cpp
    kernels/kernels_bf16emulated.cpp
    kernels/prefill_amx.cpp
    kernels/product_avx2.cpp
    kernels/product_avx512.cpp
    kernels/product_avx512vnni.cpp
    kernels/product_avxvnni.cpp
    kernels/sampling_avx2.cpp
    kernels/sampling_avx512.cpp
    kernels/scores_amx.cpp
  )
  set_source_files_properties(${CRUSH_SOURCE_DIR}/kernels/kernels_avx2.cpp PROPERTIES COMPILE_OPTIONS "-mavx2;-mfma;-mf16c")
  set_source_files_properties(${CRUSH_SOURCE_DIR}/kernels/kernels_avx512.cpp PROPERTIES COMPILE_OPTIONS
    "-mavx512f;-mavx512bw;-mavx512dq;-mavx512vl;-mavx2;-mfma;-mf16c")
  set_source_files_properties(${CRUSH_SOURCE_DIR}/kernels/kernels_avx512bf16.cpp PROPERTIES COMPILE_OPTIONS
    "-mavx512f;-mavx512bw;-mavx512dq;-mavx512vl;-mavx512bf16;-mavx2;-mfma;-mf16c")
  set_source_files_properties(${CRUSH_SOURCE_DIR}/kernels/kernels_bf16emulated.cpp PROPERTIES COMPILE_OPTIONS
    "-mavx512f;-mavx512bw;-mavx512dq;-mavx512vl;-mavx2;-mfma;-mf16c")
  # Products of VNNI are inline assembly.
  set_source_files_properties(${CRUSH_SOURCE_DIR}/kernels/kernels_avxvnni.cpp PROPERTIES COMPILE_OPTIONS "-mavx2;-mfma;-mf16c")
  set_source_files_properties(${CRUSH_SOURCE_DIR}/kernels/kernels_avx512vnni.cpp PROPERTIES COMPILE_OPTIONS
    "-mavx512f;-mavx512bw;-mavx512dq;-mavx512vl;-mavx2;-mfma;-mf16c")
  set_source_files_properties(${CRUSH_SOURCE_DIR}/kernels/product_avx2.cpp PROPERTIES COMPILE_OPTIONS "-mavx2;-mfma;-mf16c")
  set_source_files_properties(${CRUSH_SOURCE_DIR}/kernels/product_avxvnni.cpp PROPERTIES COMPILE_OPTIONS "-mavx2;-mfma;-mf16c")
  set_source_files_properties(${CRUSH_SOURCE_DIR}/kernels/product_avx512.cpp PROPERTIES COMPILE_OPTIONS
    "-mavx512f;-mavx512bw;-mavx512dq;-mavx512vl;-mavx2;-mfma;-mf16c")
  set_source_files_properties(${CRUSH_SOURCE_DIR}/kernels/product_avx512vnni.cpp PROPERTIES COMPILE_OPTIONS
    "-mavx512f;-mavx512bw;-mavx512dq;-mavx512vl;-mavx2;-mfma;-mf16c")
  set_source_files_properties(${CRUSH_SOURCE_DIR}/kernels/sampling_avx2.cpp PROPERTIES COMPILE_OPTIONS "-mavx2;-mfma;-mf16c")
  set_source_files_properties(${CRUSH_SOURCE_DIR}/kernels/sampling_avx512.cpp PROPERTIES COMPILE_OPTIONS
    "-mavx512f;-mavx512bw;-mavx512dq;-mavx512vl;-mavx2;-mfma;-mf16c")
  # The tile instructions themselves are inline assembly.
  set_source_files_properties(${CRUSH_SOURCE_DIR}/kernels/attend_amx.cpp PROPERTIES COMPILE_OPTIONS
    "-mavx512f;-mavx512bw;-mavx512dq;-mavx512vl;-mavx512vbmi;-mavx2;-mfma;-mf16c")
  set_source_files_properties(${CRUSH_SOURCE_DIR}/kernels/prefill_amx.cpp PROPERTIES COMPILE_OPTIONS
    "-mavx512f;-mavx512bw;-mavx512dq;-mavx512vl;-mavx2;-mfma;-mf16c")
  set_source_files_properties(${CRUSH_SOURCE_DIR}/kernels/scores_amx.cpp PROPERTIES COMPILE_OPTIONS
    "-mavx512f;-mavx512bw;-mavx512dq;-mavx512vl;-mavx2;-mfma;-mf16c")
endif()
list(TRANSFORM CRUSH_CORE_SOURCES PREPEND ${CRUSH_SOURCE_DIR}/)
