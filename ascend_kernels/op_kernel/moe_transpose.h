// [tokens][k] <-> [k][tokens]: offsets with which Gather turns small matrices around in UB.
#ifndef MOE_TRANSPOSE_H
#define MOE_TRANSPOSE_H

#include "moe_common.h"

namespace moe {
// Index i = a * inner + b of a matrix becomes b * pitch + a, that of its transpose with rows `pitch`
// apart. `a`: int32 scratch, `real`: float32 scratch, `count` elements each.
__aicore__ inline void TransposedIndex(const LocalTensor<int32_t>& index,
    const LocalTensor<int32_t>& a, const LocalTensor<float>& real, uint32_t count, uint32_t inner,
    uint32_t pitch)
{
    const int32_t n = static_cast<int32_t>(count);
    CreateVecIndex(index, 0, count);
    VectorBarrier();
    // a = floor((i + 0.5) / inner): the half keeps the rounding of the product off the integers
    Cast(real, index, RoundMode::CAST_NONE, count);
    VectorBarrier();
    Adds(real, real, 0.5f, n);
    VectorBarrier();
    Muls(real, real, 1.0f / static_cast<float>(inner), n);
    VectorBarrier();
    Cast(a, real, RoundMode::CAST_FLOOR, count);
    VectorBarrier();
    // b * pitch + a, with b = i - a * inner
    Muls(a, a, -static_cast<int32_t>(inner), n);
    VectorBarrier();
    Add(index, index, a, n);
    VectorBarrier();
    Muls(index, index, static_cast<int32_t>(pitch), n);
    Cast(a, real, RoundMode::CAST_FLOOR, count);
    VectorBarrier();
    Add(index, index, a, n);
    VectorBarrier();
}

// Element indices -> byte offsets, as Gather wants them.
__aicore__ inline void ToByteOffsets(const LocalTensor<int32_t>& index, uint32_t count)
{
    Muls(index, index, static_cast<int32_t>(sizeof(int32_t)), static_cast<int32_t>(count));
    VectorBarrier();
}
}  // namespace moe

#endif  // MOE_TRANSPOSE_H
