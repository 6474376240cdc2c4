// Runs one kernel over its blocks.
#pragma once

#include "twin/launch.h"

namespace twin {

// A launch as the framework prepares it. The kernel gets `arguments` (null for absent inputs), then
// workspace and tiling.
struct Launch {
    std::string kernel;
    GlobalMemory memory;
    std::vector<GM_ADDR> arguments;
    std::vector<uint8_t> tiling;
    size_t workspace_bytes = 0;
    uint64_t tiling_key = 0;
    int blocks = 1;
    size_t ub_bytes = 0;
};

// Returns the counters of each block. Throws Violation.
std::vector<Counters> run(Launch& launch);

}  // namespace twin
