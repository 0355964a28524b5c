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
endfunction()

# presync_library(name SOURCES a.cc ... LIBS x ...)
function(presync_library name)
  cmake_parse_arguments(ARG "" "" "SOURCES;LIBS" ${ARGN})
  add_library(${name} STATIC ${ARG_SOURCES})
  presync_options(${name})
  target_link_libraries(${name} PUBLIC ${ARG_LIBS})
endfunction()

# The unit and net tests: what is built with a sanitizer (CONTRIBUTING.md); tools/check has no such step.
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
