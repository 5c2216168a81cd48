# GPU architectures, however they are spelt.
set(STAR_ATTENTION_SUPPORTED_ARCHS 80 86 89 90a 100a 120)
list(JOIN STAR_ATTENTION_SUPPORTED_ARCHS ", " STAR_ATTENTION_SUPPORTED_TEXT)

# The compute capabilities of this machine's GPUs.
function(star_attention_native_architectures result)
  execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
                  OUTPUT_VARIABLE found ERROR_QUIET RESULT_VARIABLE status)
  string(REGEX MATCHALL "[0-9]+\\.[0-9]+" found "${found}")
  if(status OR NOT found)
    message(FATAL_ERROR " STAR_ATTENTION_ARCHS=native: nvidia-smi finds no GPU: name some of "
                        "${STAR_ATTENTION_SUPPORTED_TEXT}")
  endif()
  set(${result} ${found} PARENT_SCOPE)
endfunction()

# As CMake and this project spell them: 90a for `90`, `9.0`, `sm_90a` or `compute_90a`. Several are
# divided by `;`, `,` or spaces; `native` is this machine's GPUs. CMake's -real and -virtual stay.
function(star_attention_architectures result spelt)
  string(TOLOWER "${spelt}" spelt)
  string(REGEX REPLACE "[ ,;]+" ";" spelt "${spelt}")
  if("native" IN_LIST spelt)
    star_attention_native_architectures(native)
    list(TRANSFORM spelt REPLACE "^native$" "${native}")
  endif()
  set(archs "")
  foreach(arch IN LISTS spelt)
    string(REGEX MATCH "^(sm_|compute_)?([0-9]+)\\.?([0-9])(a?)(-real|-virtual)?$" _ "${arch}")
    set(number "${CMAKE_MATCH_2}${CMAKE_MATCH_3}")
    set(kind "${CMAKE_MATCH_5}")
    if("${number}${CMAKE_MATCH_4}" IN_LIST STAR_ATTENTION_SUPPORTED_ARCHS)
      list(APPEND archs ${number}${CMAKE_MATCH_4}${kind})
    elseif("${number}a" IN_LIST STAR_ATTENTION_SUPPORTED_ARCHS)
      message(STATUS "${arch} means ${number}a, which has all of the GPU's instructions")
      list(APPEND archs ${number}a${kind})
    elseif(NOT arch STREQUAL "")
      message(FATAL_ERROR " STAR_ATTENTION_ARCHS: ${arch} is not one of "
                          "${STAR_ATTENTION_SUPPORTED_TEXT} or native")
    endif()
  endforeach()
  if(NOT archs)
    message(FATAL_ERROR " STAR_ATTENTION_ARCHS is empty: name some of "
                        "${STAR_ATTENTION_SUPPORTED_TEXT}, or native")
  endif()
  list(REMOVE_DUPLICATES archs)
  set(${result} ${archs} PARENT_SCOPE)
endfunction()
