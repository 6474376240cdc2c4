// What a kernel costs: bytes moved and instructions issued.
#pragma once

#include <algorithm>
#include <cstdint>

namespace twin {

// Plain integers in this order: the runner hands them out as an array. Of several blocks the sums,
// except of `ub_peak_bytes` and `cycles`, which are the largest.
struct Counters {
    uint64_t read_bytes = 0;           // global memory -> UB by DMA, exact
    uint64_t read_block_bytes = 0;     // the same, each burst rounded up to 32 bytes
    uint64_t read_instructions = 0;
    uint64_t write_bytes = 0;          // UB -> global memory by DMA, exact
    uint64_t write_block_bytes = 0;
    uint64_t write_instructions = 0;
    uint64_t vector_instructions = 0;
    uint64_t vector_repeats = 0;       // steps of 256 bytes
    uint64_t scalar_ub_accesses = 0;   // GetValue and SetValue of LocalTensor
    uint64_t scalar_gm_accesses = 0;   // GetValue and SetValue of GlobalTensor
    uint64_t barriers = 0;
    uint64_t flags = 0;                // SetFlag by the kernel and by its queues
    uint64_t sync_alls = 0;
    uint64_t ub_peak_bytes = 0;
    uint64_t cycles = 0;               // calculated, under the assumptions of twin/clock.h

    void add(const Counters& other)
    {
        const auto* from = reinterpret_cast<const uint64_t*>(&other);
        auto* to = reinterpret_cast<uint64_t*>(this);
        const uint64_t peak = std::max(ub_peak_bytes, other.ub_peak_bytes);
        const uint64_t latest = std::max(cycles, other.cycles);
        for (unsigned i = 0; i < sizeof(Counters) / sizeof(uint64_t); ++i) {
            to[i] += from[i];
        }
        ub_peak_bytes = peak;
        cycles = latest;
    }
};

}  // namespace twin
