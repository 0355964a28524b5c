# The options every target of this project shares, kept per target so that nothing leaks.

# Warnings are errors; includes are written from the project's root ("transport/link.h").
function(presync_options target)
  target_compile_options(${target} PRIVATE
    -Wall -Wextra -Wpedantic -Wshadow -Wno-missing-field-initializers -Werror
    $<$<COMPILE_LANG_AND_ID:CXX,Clang>:-Wthread-safety>)
  target_include_directories(${target} PUBLIC ${PROJECT_SOURCE_DIR})
  if(PRESYNC_SANITIZE)
    target_compile_options(${target} PUBLIC
      -fsanitize=${PRESYNC_SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer
      $<$<BOOL:${PRESYNC_FUZZ}>:-fsanitize=fuzzer-no-link>)
    target_link_options(${target} PUBLIC -fsanitize=${PRESYNC_SANITIZE})
  endif()
  set(kind "")
  if(CMAKE_CURRENT_SOURCE_DIR MATCHES "^${PROJECT_SOURCE_DIR}/tests" AND NOT CMAKE_CURRENT_SOURCE_DIR MATCHES "/fuzz$")
    set(kind _tests)
    target_compile_options(${target} PRIVATE ${PRESYNC_TEST_OPTIONS})
  endif()
  get_target_property(sources ${target} SOURCES)
  if(PRESYNC_PRECOMPILE AND NOT sources MATCHES "\\.c(;|$)")  # C has none to reuse
    target_precompile_headers(${target} REUSE_FROM presync_precompiled${kind})
    presync_one_kind_of_code(${target})
  endif()
endfunction()

# Headers that are compiled once are for code that is compiled alike: programs as libraries, and with the macro that whoever
# links GTest defines.
function(presync_one_kind_of_code target)
  target_compile_options(${target} PRIVATE -fPIC -DGTEST_HAS_PTHREAD=1)
endfunction()

# presync_precompile(name header ...): an object of compiled headers, for sources in this folder.
function(presync_precompile name)
  file(CONFIGURE OUTPUT ${CMAKE_CURRENT_BINARY_DIR}/${name}.cc CONTENT "")
  add_library(${name} OBJECT ${CMAKE_CURRENT_BINARY_DIR}/${name}.cc)
  set(PRESYNC_PRECOMPILE OFF)
  presync_options(${name})
  presync_one_kind_of_code(${name})
  # Else clang writes the time of each header into what it compiles, and ccache serves no later clone.
  target_compile_options(${name} PRIVATE "$<$<CXX_COMPILER_ID:Clang>:SHELL:-Xclang -fno-pch-timestamp>")
  list(TRANSFORM ARGN REPLACE ".+" "$<$<COMPILE_LANGUAGE:CXX>:\\0>")
  target_precompile_headers(${name} PRIVATE ${ARGN})
endfunction()

# The headers that most sources include.
set(PRESYNC_COMMON_HEADERS
  <algorithm> <atomic> <cstdint> <cstring> <filesystem> <fstream> <functional> <map> <memory>
  <optional> <random> <sstream> <string> <thread> <utility> <vector>
  <absl/status/status.h> <absl/status/statusor.h> <absl/strings/str_cat.h>
  <absl/strings/str_format.h> <absl/strings/str_join.h> <absl/strings/str_split.h>
  <absl/time/clock.h> <absl/time/time.h> <absl/types/span.h> <nlohmann/json.hpp>)
if(PRESYNC_PRECOMPILE)
  presync_precompile(presync_precompiled ${PRESYNC_COMMON_HEADERS})
endif()

# presync_library(name SOURCES a.cc ... LIBS x ...)
function(presync_library name)
  cmake_parse_arguments(ARG "" "" "SOURCES;LIBS" ${ARGN})
  add_library(${name} STATIC ${ARG_SOURCES})
  presync_options(${name})
  target_link_libraries(${name} PUBLIC ${ARG_LIBS})
endfunction()

# The unit and net tests, and the programs that some of them run: what tools/sanitized builds.
add_custom_target(sanitized_tests)

# presync_test(name LABEL unit|net|qemu|rdma SOURCES a.cc ... LIBS x ...)
function(presync_test name)
  cmake_parse_arguments(ARG "" "LABEL" "SOURCES;LIBS" ${ARGN})
  add_executable(${name} ${ARG_SOURCES})
  presync_options(${name})
  target_link_libraries(${name} PRIVATE ${ARG_LIBS} GTest::gmock GTest::gtest_main)
  add_test(NAME ${name} COMMAND ${name})
  set_tests_properties(${name} PROPERTIES LABELS "${ARG_LABEL}" TIMEOUT 300)
  if(ARG_LABEL MATCHES "^(unit|net)$")
    add_dependencies(sanitized_tests ${name})
  endif()
endfunction()

# presync_benchmark(name SOURCES a.cc ... LIBS x ...)
function(presync_benchmark name)
  cmake_parse_arguments(ARG "" "" "SOURCES;LIBS" ${ARGN})
  add_executable(${name} ${ARG_SOURCES})
  presync_options(${name})
  target_link_libraries(${name} PRIVATE ${ARG_LIBS} benchmark::benchmark_main)
endfunction()
