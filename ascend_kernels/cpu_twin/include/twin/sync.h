// Flags, barriers, block numbers, and the barrier of all blocks.
#pragma once

#include "twin/grid.h"
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
    twin::Core& core = twin::core();
    if (core.aiv_only) {
        twin::fail("SyncAll: a kernel of type KERNEL_TYPE_AIV_ONLY has no barrier between cores: its "
                   "type must be KERNEL_TYPE_MIX_AIV_1_0");
    }
    ++core.counters.sync_alls;
    core.clocks.barrier(PIPE_ALL);
    core.grid->sync_all();
}

// Makes scalar accesses and DMA agree on global memory. The twin has no data cache to clean.
enum class CacheLine { SINGLE_CACHE_LINE, ENTIRE_DATA_CACHE };
enum class DcciDst { CACHELINE_ALL, CACHELINE_UB, CACHELINE_OUT, CACHELINE_ATOMIC };

template <typename T, CacheLine line, DcciDst destination>
inline void DataCacheCleanAndInvalid(const GlobalTensor<T>&)
{
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
