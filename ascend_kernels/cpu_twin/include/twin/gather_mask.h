// GatherMask: packs the elements whose bits are set, and counts them.
#pragma once

#include "twin/elementwise.h"

namespace AscendC {

struct GatherMaskParams {
    GatherMaskParams() = default;
    GatherMaskParams(uint8_t block, uint16_t repeats, uint16_t repeat, uint8_t pattern)
        : src0BlockStride(block), repeatTimes(repeats), src0RepeatStride(repeat),
          src1RepeatStride(pattern)
    {}
    uint8_t src0BlockStride = 1;
    uint16_t repeatTimes = 0, src0RepeatStride = 8;
    uint8_t src1RepeatStride = 8;
};

// Counter mode with the bits in a tensor: a repeat takes `mask` consecutive elements. Other modes
// are not here. The count returns through a register that the scalar unit reads by itself.
template <typename T, typename U>
void GatherMask(const LocalTensor<T>& dst, const LocalTensor<T>& src, const LocalTensor<U>& bits,
                const bool counter_mode, const uint32_t mask, const GatherMaskParams& p,
                uint64_t& found)
{
    static_assert(sizeof(T) == sizeof(U) && (sizeof(T) == 2 || sizeof(T) == 4),
                  "GatherMask: bits must be uint16_t for 2-byte and uint32_t for 4-byte elements");
    static_assert(twin::one_of<U, uint16_t, uint32_t>, "GatherMask: bits must be unsigned");
    twin::Instruction vector(PIPE_V, "GatherMask");
    if (!counter_mode || mask == 0 || p.src0BlockStride != 1) {
        twin::fail("GatherMask: the twin knows counter mode on consecutive elements only");
    }
    std::vector<T> kept;
    for (size_t r = 0; r < p.repeatTimes; ++r) {
        const T* from = vector.in(src, r * p.src0RepeatStride * twin::block_elements(sizeof(T)), mask);
        const uint8_t* pattern = vector.in(bits.template ReinterpretCast<uint8_t>(),
                                           r * p.src1RepeatStride * twin::kBlock, (mask + 7) / 8);
        for (size_t i = 0; i < mask; ++i) {
            if (pattern[i / 8] >> (i % 8) & 1) {
                kept.push_back(from[i]);
            }
        }
    }
    if (!kept.empty()) {
        std::copy(kept.begin(), kept.end(), vector.out(dst, kept.size()));
    }
    vector.check_overlap();
    vector.count_repeats(static_cast<size_t>(p.repeatTimes) * mask * sizeof(T));
    found = kept.size();
    twin::core().clocks.scalar_waits_for(PIPE_V);
}

}  // namespace AscendC
