// What all MoE kernels share: shares of blocks, pipe synchronisation, copies, dtype conversion.
#ifndef MOE_COMMON_H
#define MOE_COMMON_H

#include "kernel_operator.h"

namespace moe {
using namespace AscendC;

constexpr uint32_t BLOCK_BYTES = 32;                              // unit of UB addresses and DMA
constexpr uint32_t LANES = 64;                                    // floats of one vector repeat
constexpr uint32_t BLOCK_FLOATS = BLOCK_BYTES / sizeof(float);    // floats of one block
constexpr uint8_t REPEAT_BLOCKS = 8;                              // blocks of one vector repeat
constexpr uint32_t DOUBLE_BUFFER = 2;

__aicore__ inline uint32_t CeilDiv(uint32_t a, uint32_t b)
{
    return (a + b - 1) / b;
}

__aicore__ inline uint32_t AlignUp(uint32_t a, uint32_t unit)
{
    return CeilDiv(a, unit) * unit;
}

__aicore__ inline uint32_t Smaller(uint32_t a, uint32_t b)
{
    return a < b ? a : b;
}

// Half-open interval of items.
struct Range {
    uint32_t begin;
    uint32_t end;
};

// The items of this block: contiguous, and sizes differ by one at most. Empty if there are fewer
// items than blocks.
__aicore__ inline Range ShareOfBlock(uint32_t total)
{
    const uint32_t blocks = static_cast<uint32_t>(GetBlockNum());
    const uint32_t block = static_cast<uint32_t>(GetBlockIdx());
    const uint32_t base = total / blocks;
    const uint32_t extra = total % blocks;
    const uint32_t begin = block * base + Smaller(block, extra);
    return {begin, begin + base + (block < extra ? 1U : 0U)};
}

// The second pipe of EVENT waits for all that the first has been given so far.
template <HardEvent EVENT>
__aicore__ inline void Sync()
{
    const event_t id = static_cast<event_t>(GetTPipePtr()->FetchEventID(EVENT));
    SetFlag<EVENT>(id);
    WaitFlag<EVENT>(id);
}

// Vector instructions that depend on one another need a barrier in between.
__aicore__ inline void VectorBarrier()
{
    PipeBarrier<PIPE_V>();
}

// GM -> UB, any count and any GM address.
template <typename T>
__aicore__ inline void Load(const LocalTensor<T>& dst, const GlobalTensor<T>& src, uint32_t count)
{
    const DataCopyExtParams copy{1, static_cast<uint32_t>(count * sizeof(T)), 0, 0, 0};
    const DataCopyPadExtParams<T> noPadding;
    DataCopyPad(dst, src, copy, noPadding);
}

// The same, and `padding` in what is left of the last block, where Load leaves whatever it likes.
template <typename T>
__aicore__ inline void LoadPadded(
    const LocalTensor<T>& dst, const GlobalTensor<T>& src, uint32_t count, T padding)
{
    const uint32_t rest = AlignUp(count, BLOCK_BYTES / sizeof(T)) - count;
    const DataCopyExtParams copy{1, static_cast<uint32_t>(count * sizeof(T)), 0, 0, 0};
    const DataCopyPadExtParams<T> pad{true, 0, static_cast<uint8_t>(rest), padding};
    DataCopyPad(dst, src, copy, pad);
}

// GM -> UB, rows of any length; in UB each starts at a block.
template <typename T>
__aicore__ inline void LoadRows(
    const LocalTensor<T>& dst, const GlobalTensor<T>& src, uint32_t rows, uint32_t columns)
{
    const DataCopyExtParams copy{
        static_cast<uint16_t>(rows), static_cast<uint32_t>(columns * sizeof(T)), 0, 0, 0};
    const DataCopyPadExtParams<T> noPadding;
    DataCopyPad(dst, src, copy, noPadding);
}

// UB -> GM, any count and any GM address.
template <typename T>
__aicore__ inline void Store(const GlobalTensor<T>& dst, const LocalTensor<T>& src, uint32_t count)
{
    const DataCopyExtParams copy{1, static_cast<uint32_t>(count * sizeof(T)), 0, 0, 0};
    DataCopyPad(dst, src, copy);
}

// UB -> GM, rows that lie `gapBlocks` blocks apart in UB and without gaps in GM.
template <typename T>
__aicore__ inline void StoreRows(const GlobalTensor<T>& dst, const LocalTensor<T>& src,
    uint32_t rows, uint32_t columns, uint32_t gapBlocks)
{
    const DataCopyExtParams copy{static_cast<uint16_t>(rows),
        static_cast<uint32_t>(columns * sizeof(T)), gapBlocks, 0, 0};
    DataCopyPad(dst, src, copy);
}

// A float32 view of `src`: itself, or its values converted into `buffer`, which float32 rows do not
// need and need not initialise.
template <typename T>
__aicore__ inline LocalTensor<float> AsFloat(
    const LocalTensor<T>& src, TBuf<TPosition::VECCALC>& buffer, uint32_t count)
{
    if constexpr (std::is_same<T, float>::value) {
        return src;
    } else {
        LocalTensor<float> values = buffer.Get<float>();
        Cast(values, src, RoundMode::CAST_NONE, count);
        VectorBarrier();
        return values;
    }
}

// Sum of `count` floats into dst[0]; destroys `values`. A tree: its shape depends on count alone,
// so the same row gives the same bits wherever it is computed.
__aicore__ inline void SumInto(
    const LocalTensor<float>& dst, const LocalTensor<float>& values, uint32_t count)
{
    while (count > LANES) {
        const uint32_t half = AlignUp(CeilDiv(count, 2), LANES);
        Add(values, values, values[half], static_cast<int32_t>(count - half));
        VectorBarrier();
        count = half;
    }
    WholeReduceSum(dst, values, static_cast<int32_t>(count), 1, 1, 1, REPEAT_BLOCKS);
    VectorBarrier();
}
}  // namespace moe

#endif  // MOE_COMMON_H
