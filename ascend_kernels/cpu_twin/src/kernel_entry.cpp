// One kernel, compiled as it is and entered into the table. Built once per kernel with
//   TWIN_KERNEL         its entry point, which is also the name of its file
//   TWIN_TILING_HEADER  the operator's tiling header in op_host, quoted
//   TWIN_KERNEL_SOURCE  the kernel's source, quoted
#define TWIN_KERNEL_SIDE
// the host's classes of the same names are other types: keep the linker from mixing them up
#define optiling twin_kernel_tiling
#include TWIN_TILING_HEADER
#undef optiling

#include "kernel_operator.h"

using namespace twin_kernel_tiling;

#include TWIN_KERNEL_SOURCE

#define TWIN_STRING_(text) #text
#define TWIN_STRING(text) TWIN_STRING_(text)

static const twin::RegisterKernel registration(TWIN_STRING(TWIN_KERNEL), &TWIN_KERNEL,
                                               sizeof(TwinTilingData));
