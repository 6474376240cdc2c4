// One core of the launch: its UB, clocks, counters and its view of global memory.
#pragma once

#include <map>

#include "twin/clock.h"
#include "twin/counters.h"
#include "twin/global_memory.h"
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
    Core(Grid* grid, GlobalMemory* memory, int block, int blocks, size_t ub_bytes)
        : grid(grid), memory(memory), block(block), blocks(blocks), ub(ub_bytes)
    {
    }

    Grid* const grid;
    GlobalMemory* const memory;
    const int block, blocks;
    UnifiedBuffer ub;
    Clocks clocks;
    Counters counters;
    std::vector<Buffer> buffers;
    AscendC::TPipe* pipe = nullptr;
    bool atomic = false;    // SetAtomicAdd is on: stores add
    bool aiv_only = false;  // the kernel's type is KERNEL_TYPE_AIV_ONLY

    // Takes `bytes` from UB for a buffer and returns its index.
    int take(size_t bytes, bool of_queue)
    {
        const size_t offset = counters.ub_peak_bytes;
        bytes = round_up(bytes);
        counters.ub_peak_bytes += bytes;
        if (counters.ub_peak_bytes > ub.size()) {
            fail("InitBuffer: UB overflow, the buffers take ", counters.ub_peak_bytes,
                 " bytes and the budget is ", ub.size());
        }
        if (bytes == 0) {
            fail("InitBuffer: a buffer of 0 bytes");
        }
        if (buffers.size() == 64) {
            fail("InitBuffer: more than 64 buffers in one TPipe");
        }
        buffers.push_back({offset, bytes});
        buffers.back().of_queue = of_queue;
        return static_cast<int>(buffers.size()) - 1;
    }

    // A DMA or scalar access to global memory: bounds, order within the core, races between cores.
    void touch_global(pipe_t issuer, uint32_t time, const void* address, size_t bytes,
                      size_t alignment, bool write, const char* what)
    {
        const int region = memory->check(address, bytes, alignment, write, what);
        const auto* begin = static_cast<const uint8_t*>(address);
        check_global_order(issuer, begin, begin + bytes, write, what);
        if (write) {
            own_writes_[begin] = {begin + bytes, issuer, time};
        }
        memory->note(region, address, bytes, write, block);
    }

    // The end of the kernel on this core.
    void finish() const
    {
        clocks.check_all_waited_for(true);
        for (size_t i = 0; i < buffers.size(); ++i) {
            if (buffers[i].state != BufferState::free) {
                fail("buffer ", i, " of UB: not given back by FreeTensor at the end of the kernel");
            }
        }
        if (atomic) {
            fail("SetAtomicAdd: still on at the end of the kernel (missing SetAtomicNone)");
        }
    }

private:
    struct Store {
        const uint8_t* end;
        pipe_t pipe;
        uint32_t time;
    };

    // A core that reads or overwrites its own store must wait for the store to land.
    void check_global_order(pipe_t issuer, const uint8_t* begin, const uint8_t* end, bool write,
                            const char* what) const
    {
        auto next = own_writes_.lower_bound(begin);
        if (next != own_writes_.begin()) {
            --next;
        }
        for (; next != own_writes_.end() && next->first < end; ++next) {
            const Store& store = next->second;
            const bool in_order = issuer == store.pipe && write;  // one pipe stores in order
            if (store.end > begin && !in_order &&
                !clocks.ordered(issuer, store.pipe, store.time)) {
                fail(what, ": hazard in global memory: pipe ", name(issuer),
                     " does not wait for the core's own store on pipe ", name(store.pipe));
            }
        }
    }

    std::map<const uint8_t*, Store> own_writes_;
};

// The core that runs on this thread; set by the grid.
inline thread_local Core* current_core = nullptr;
inline Core& core() { return *current_core; }

}  // namespace twin
