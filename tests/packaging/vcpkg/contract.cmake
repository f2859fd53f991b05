# SPDX-License-Identifier: Apache-2.0
# cmake -DPORT_DIR=... -DWORK=... -P contract.cmake
# Runs the port's own portfile with the functions of vcpkg reduced to what they do for a header-only port, then checks what
# vcpkg checks after a build. The package is left in WORK/package.
cmake_minimum_required(VERSION 3.25)
get_filename_component(CURRENT_PORT_DIR ${PORT_DIR} ABSOLUTE)
set(PORT moe)
set(CURRENT_PACKAGES_DIR ${WORK}/package)
set(CURRENT_BUILDTREES_DIR ${WORK}/build)
file(REMOVE_RECURSE ${WORK})

function(called name)
  if(NOT VCPKG_BUILD_TYPE STREQUAL "release")
    message(FATAL_ERROR "${name}: VCPKG_BUILD_TYPE is '${VCPKG_BUILD_TYPE}'; a header-only port sets it to release first")
  endif()
  set_property(GLOBAL APPEND PROPERTY called ${name})
  if(ARGN)
    message(FATAL_ERROR "${name}: unknown arguments ${ARGN}")
  endif()
endfunction()

function(vcpkg_cmake_configure)
  cmake_parse_arguments(PARSE_ARGV 0 arg "" "SOURCE_PATH" "OPTIONS")
  called(vcpkg_cmake_configure ${arg_UNPARSED_ARGUMENTS})
  execute_process(COMMAND ${CMAKE_COMMAND} -S ${arg_SOURCE_PATH} -B ${CURRENT_BUILDTREES_DIR} ${arg_OPTIONS}
                          -DCMAKE_INSTALL_PREFIX=${CURRENT_PACKAGES_DIR} -DCMAKE_BUILD_TYPE=Release
                          -DCMAKE_CXX_COMPILER=${CMAKE_CXX_COMPILER}
                  COMMAND_ERROR_IS_FATAL ANY)
endfunction()

function(vcpkg_cmake_install)
  called(vcpkg_cmake_install ${ARGN})
  execute_process(COMMAND ${CMAKE_COMMAND} --build ${CURRENT_BUILDTREES_DIR} --target install COMMAND_ERROR_IS_FATAL ANY)
endfunction()

# Moves the CMake package to share/<port> and counts the folders from there to the prefix anew.
function(vcpkg_cmake_config_fixup)
  cmake_parse_arguments(PARSE_ARGV 0 arg "" "CONFIG_PATH" "")
  called(vcpkg_cmake_config_fixup ${arg_UNPARSED_ARGUMENTS})
  file(RENAME ${CURRENT_PACKAGES_DIR}/${arg_CONFIG_PATH} ${CURRENT_PACKAGES_DIR}/share/${PORT})
  file(REMOVE_RECURSE ${CURRENT_PACKAGES_DIR}/share/cmake)
  set(up [[get_filename_component(_IMPORT_PREFIX "${_IMPORT_PREFIX}" PATH)]])
  file(GLOB files ${CURRENT_PACKAGES_DIR}/share/${PORT}/*.cmake)
  foreach(file IN LISTS files)
    file(READ ${file} text)
    string(REPLACE "${up}\n${up}\n${up}" "${up}\n${up}" text "${text}")
    file(WRITE ${file} "${text}")
  endforeach()
endfunction()

function(vcpkg_fixup_pkgconfig)
  called(vcpkg_fixup_pkgconfig ${ARGN})
  file(GLOB files ${CURRENT_PACKAGES_DIR}/share/pkgconfig/*.pc)
  if(NOT files)
    message(FATAL_ERROR "vcpkg_fixup_pkgconfig: there are no files for pkg-config")
  endif()
endfunction()

function(vcpkg_install_copyright)
  cmake_parse_arguments(PARSE_ARGV 0 arg "" "" "FILE_LIST")
  called(vcpkg_install_copyright ${arg_UNPARSED_ARGUMENTS})
  configure_file(${arg_FILE_LIST} ${CURRENT_PACKAGES_DIR}/share/${PORT}/copyright COPYONLY)
endfunction()

include(${CURRENT_PORT_DIR}/portfile.cmake)

get_property(called GLOBAL PROPERTY called)
foreach(name IN ITEMS vcpkg_cmake_configure vcpkg_cmake_install vcpkg_cmake_config_fixup vcpkg_fixup_pkgconfig
                      vcpkg_install_copyright)
  if(NOT name IN_LIST called)
    message(FATAL_ERROR "the portfile does not call ${name}")
  endif()
endforeach()

# --- What vcpkg checks after a build ---

file(GLOB top RELATIVE ${CURRENT_PACKAGES_DIR} ${CURRENT_PACKAGES_DIR}/*)
if(NOT top STREQUAL "include;share")
  message(FATAL_ERROR "the package of a header-only port holds include and share, not ${top}")
endif()
file(GLOB share RELATIVE ${CURRENT_PACKAGES_DIR}/share ${CURRENT_PACKAGES_DIR}/share/*)
if(NOT share STREQUAL "moe;pkgconfig")
  message(FATAL_ERROR "share holds ${share}, expected moe and pkgconfig")
endif()
foreach(file IN ITEMS include/moe/moe.hpp share/moe/copyright share/moe/usage share/moe/moe-config.cmake
                      share/moe/moe-config-version.cmake)
  if(NOT EXISTS ${CURRENT_PACKAGES_DIR}/${file})
    message(FATAL_ERROR "${file} is missing")
  endif()
endforeach()

file(GLOB_RECURSE files ${CURRENT_PACKAGES_DIR}/share/*)
foreach(file IN LISTS files)
  file(READ ${file} text)
  foreach(path IN ITEMS ${SOURCE_PATH} ${WORK})
    string(FIND "${text}" ${path} at)
    if(NOT at EQUAL -1)
      message(FATAL_ERROR "${file} holds the path ${path}")
    endif()
  endforeach()
endforeach()
