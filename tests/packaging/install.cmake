# SPDX-License-Identifier: Apache-2.0
# cmake -DBUILD=... -DSOURCE=... -DPREFIX=... -P install.cmake
# Installs, moves the result to PREFIX, and finds no path of this machine in it.
cmake_minimum_required(VERSION 3.25)
file(REMOVE_RECURSE ${PREFIX} ${PREFIX}.first)
execute_process(COMMAND ${CMAKE_COMMAND} --install ${BUILD} --prefix ${PREFIX}.first COMMAND_ERROR_IS_FATAL ANY)
file(RENAME ${PREFIX}.first ${PREFIX})

file(GLOB top RELATIVE ${PREFIX} ${PREFIX}/*)
if(NOT top STREQUAL "include;share")
  message(FATAL_ERROR "installed ${top}, expected include and share")
endif()
foreach(file IN ITEMS include/moe/moe.hpp share/cmake/moe/moe-config.cmake share/cmake/moe/moe-config-version.cmake
                      share/pkgconfig/moe.pc share/pkgconfig/moe-cpu.pc)
  if(NOT EXISTS ${PREFIX}/${file})
    message(FATAL_ERROR "${file} is not installed")
  endif()
endforeach()

file(GLOB_RECURSE files ${PREFIX}/share/*)
foreach(file IN LISTS files)
  file(READ ${file} text)
  foreach(path IN ITEMS ${SOURCE} ${BUILD} ${PREFIX} /usr/ /home/)
    string(FIND "${text}" ${path} at)
    if(NOT at EQUAL -1)
      message(FATAL_ERROR "${file} holds the path ${path}")
    endif()
  endforeach()
endforeach()
