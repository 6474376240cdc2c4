// Flags, barriers, block numbers, and the barrier of all blocks.
#pragma once

#include "twin/tensor.h"

namespace AscendC {

inline int64_t GetBlockIdx() { return twin::core().block; }
inline int64_t GetBlockNum() { return twin::core().blocks; }
inline int64_t GetSubBlockIdx() { return 0; }

template <pipe_t pipe>
inline void PipeBarrier()
{
    static_assert(pipe != PIPE_S, "PipeBarrier<PIPE_S> does not exist: the scalar unit is in order");
    ++twin::core().counters.barriers;
    twin::core().clocks.barrier(pipe);
}

template <HardEvent event>
inline void SetFlag(int32_t id)
{
    ++twin::core().counters.flags;
    twin::core().clocks.set(event, id);
}

template <HardEvent event>
inline void WaitFlag(int32_t id)
{
    twin::core().clocks.wait(event, id);
}

// Waits until all blocks have come; drains the pipes of the core first, as the device's does.
template <bool isAIVOnly = true>
inline void SyncAll()
{
    twin::core().sync_all();
}

// Makes scalar accesses and DMA agree on global memory. The twin has no data cache to clean.
enum class CacheLine { SINGLE_CACHE_LINE, ENTIRE_DATA_CACHE };
enum class DcciDst { CACHELINE_ALL, CACHELINE_UB, CACHELINE_OUT, CACHELINE_ATOMIC };

template <typename T, CacheLine line, DcciDst destination>
inline void DataCacheCleanAndInvalid(const GlobalTensor<T>&)
{
}

// How SetVectorMask's mask counts, and that mask; see twin/mask.h.
enum class MaskMode : uint8_t { NORMAL = 0, COUNTER };
constexpr uint64_t MASK_PLACEHOLDER = 0;

inline void SetMaskNorm() { twin::core().mask.set_mode(false); }
inline void SetMaskCount() { twin::core().mask.set_mode(true); }
inline void ResetMask() { twin::core().mask.reset(); }

template <typename T, MaskMode mode = MaskMode::NORMAL>
inline void SetVectorMask(const uint64_t maskHigh, const uint64_t maskLow)
{
    twin::core().mask.set(mode == MaskMode::COUNTER, maskHigh, maskLow);
}

template <typename T, MaskMode mode = MaskMode::NORMAL>
inline void SetVectorMask(int32_t len)
{
    twin::core().mask.set_first(mode == MaskMode::COUNTER, len, sizeof(T));
}

// While on, stores to global memory add. Only float, half, int16 and int32 can add on Atlas A2;
// the order of additions of several cores is not fixed, so the result may differ between runs.
template <typename T>
inline void SetAtomicAdd()
{
    twin::core().atomic = true;
}
inline void SetAtomicNone() { twin::core().atomic = false; }

}  // namespace AscendC
