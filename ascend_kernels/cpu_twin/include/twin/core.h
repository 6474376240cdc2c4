// One core of the launch: its UB, clocks, mask, counters and its view of global memory.
#pragma once

#include <map>

#include "twin/clock.h"
#include "twin/counters.h"
#include "twin/global_memory.h"
#include "twin/mask.h"
#include "twin/unified_buffer.h"

namespace AscendC {
class TPipe;
}

namespace twin {

class Grid;

// Where a buffer of a queue stands.
enum class BufferState { free, allocated, queued, dequeued };

// A buffer in UB, owned by a queue or by a TBuf.
struct Buffer {
    size_t offset, bytes;
    BufferState state = BufferState::free;
    bool of_queue = false;
    uint32_t generation = 0;  // counts AllocTensor: an older handle is stale
    TEventID enqueued = -1, freed = -1;
};

class Core {
public:
    Core(Grid* grid, GlobalMemory* memory, int block, int blocks, size_t ub_bytes,
         uint64_t tiling_key)
        : memory(memory), block(block), blocks(blocks), tiling_key(tiling_key), ub(ub_bytes),
          grid_(grid)
    {
    }

    GlobalMemory* const memory;
    const int block, blocks;
    const uint64_t tiling_key;
    UnifiedBuffer ub;
    Clocks clocks;
    MaskRegister mask;
    Counters counters;
    std::vector<Buffer> buffers;
    AscendC::TPipe* pipe = nullptr;
    bool atomic = false;    // SetAtomicAdd is on: stores add
    bool aiv_only = false;  // the kernel's type is KERNEL_TYPE_AIV_ONLY

    // Takes `bytes` from UB for a buffer and returns its index.
    int take(size_t bytes, bool of_queue);

    // A DMA or scalar access to global memory: bounds, order within the core, races between cores.
    void touch_global(pipe_t issuer, uint32_t time, const void* address, size_t bytes,
                      size_t alignment, bool write, const char* what);

    // Waits until all blocks have come; drains the pipes first.
    void sync_all();

    // The end of the kernel on this core.
    void finish();

private:
    struct Store {
        const uint8_t* end;
        pipe_t pipe;
        uint32_t time;
    };

    // A core that reads or overwrites its own store must wait for the store to land.
    void check_global_order(pipe_t issuer, const uint8_t* begin, const uint8_t* end, bool write,
                            const char* what) const;

    Grid* const grid_;
    std::map<const uint8_t*, Store> own_writes_;
};

// The core that runs on this thread; set by the grid.
inline thread_local Core* current_core = nullptr;
inline Core& core() { return *current_core; }

}  // namespace twin
