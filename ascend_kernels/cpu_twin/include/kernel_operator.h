// The CPU twin of AscendC's kernel_operator.h: kernel sources compile against it unchanged with g++,
// run block by block, and every instruction is checked against the rules of the hardware.
//
// Modelled on Atlas A2 (Ascend 910B) and the documented API of CANN 8.1. What is not declared here,
// kernels do not use. See README.md in this directory for the rules and their limits.
#pragma once

#include "twin/cast.h"
#include "twin/compare.h"
#include "twin/copy.h"
#include "twin/elementwise.h"
#include "twin/gather.h"
#include "twin/gather_mask.h"
#include "twin/launch.h"
#include "twin/queue.h"
#include "twin/reduce.h"
#include "twin/sync.h"
