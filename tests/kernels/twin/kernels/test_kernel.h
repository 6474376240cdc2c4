// Kernels of the twin's own tests: no operator around them, one integer of tiling data.
#pragma once

#include "kernel_operator.h"

struct TwinTilingData {
    uint32_t n;
};

#define TEST_KERNEL(name) \
    static const twin::RegisterKernel register_##name(#name, &name, sizeof(TwinTilingData));
