// Pipes, events, and the vector clocks that tell whether one instruction waits for another.
//
// A core issues instructions to pipes that run at the same time. Each pipe numbers its instructions;
// `seen[p][q]` is the number of the latest instruction of pipe q that pipe p is known to run after.
// Only flags and barriers move it. Two instructions that touch the same bytes, one of them writing,
// must be ordered by `seen`, or the result depends on luck.
//
// Beside it runs a count of cycles: each pipe takes its instructions one after the other, flags and
// barriers make it wait, and the constants below say how long things take.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

#include "twin/error.h"

typedef enum {
    PIPE_S = 0,  // scalar unit
    PIPE_V,      // vector unit
    PIPE_MTE2,   // global memory -> UB
    PIPE_MTE3,   // UB -> global memory
    PIPE_ALL,
} pipe_t;

typedef enum {
    EVENT_ID0 = 0,
    EVENT_ID1,
    EVENT_ID2,
    EVENT_ID3,
    EVENT_ID4,
    EVENT_ID5,
    EVENT_ID6,
    EVENT_ID7,
} event_t;

using TEventID = int8_t;

namespace AscendC {

// Source and destination pipe of a flag.
enum class HardEvent : uint8_t {
    MTE2_V,
    V_MTE2,
    MTE3_V,
    V_MTE3,
    S_V,
    V_S,
    S_MTE2,
    MTE2_S,
    S_MTE3,
    MTE3_S,
    MTE2_MTE3,
    MTE3_MTE2,
    MAX,
};

}  // namespace AscendC

namespace twin {

using AscendC::HardEvent;

constexpr int kPipes = 4;
constexpr int kEvents = static_cast<int>(HardEvent::MAX);
constexpr int kEventIds = 8;

using Clock = std::array<uint32_t, kPipes>;

// What the count of cycles assumes of a core of a 910B2 at 1.8 GHz. CANN's documents give the clock and
// the width of the vector unit; the other four are assumptions, not measurements.
constexpr uint64_t kIssueCycles = 4;        // of the scalar unit for every instruction
constexpr uint64_t kVectorLatency = 16;     // from a repeat of 256 bytes to its result
constexpr uint64_t kDmaLatency = 900;       // from a DMA's start to its first byte: half a microsecond
constexpr double kDmaBytesPerCycle = 18.5;  // a 48th of 1.6 TB/s, each direction by itself
constexpr uint64_t kSyncAllCycles = 2700;   // a barrier of all cores: 1.5 microseconds

inline const char* name(pipe_t pipe)
{
    static const char* const names[] = {"S", "V", "MTE2", "MTE3", "ALL"};
    return names[pipe];
}

struct Ends {
    pipe_t from, to;
};

constexpr Ends ends(HardEvent event)
{
    constexpr Ends table[kEvents] = {
        {PIPE_MTE2, PIPE_V}, {PIPE_V, PIPE_MTE2}, {PIPE_MTE3, PIPE_V},    {PIPE_V, PIPE_MTE3},
        {PIPE_S, PIPE_V},    {PIPE_V, PIPE_S},    {PIPE_S, PIPE_MTE2},    {PIPE_MTE2, PIPE_S},
        {PIPE_S, PIPE_MTE3}, {PIPE_MTE3, PIPE_S}, {PIPE_MTE2, PIPE_MTE3}, {PIPE_MTE3, PIPE_MTE2},
    };
    return table[static_cast<int>(event)];
}

std::string name(HardEvent event);

// The clocks of one core and its flags: eight ids for each ordered pair of pipes.
class Clocks {
public:
    // Numbers the next instruction of a pipe.
    uint32_t issue(pipe_t pipe)
    {
        times_[PIPE_S].free += kIssueCycles;
        return ++now_[pipe];
    }

    // The latest instruction keeps its pipe busy for so long, and is done so much later.
    void spend(pipe_t pipe, uint64_t busy, uint64_t latency)
    {
        Time& time = times_[pipe];
        time.free = std::max(time.free, times_[PIPE_S].free) + busy;
        time.done = std::max(time.done, time.free + latency);
    }

    void spend_on_dma(pipe_t pipe, size_t bytes)
    {
        spend(pipe, static_cast<uint64_t>(static_cast<double>(bytes) / kDmaBytesPerCycle), kDmaLatency);
    }

    // The scalar unit takes a result of `pipe` from a register.
    void scalar_waits_for(pipe_t pipe)
    {
        times_[PIPE_S].free = std::max(times_[PIPE_S].free, times_[pipe].end());
    }

    // When everything that was issued is done.
    uint64_t cycles() const
    {
        uint64_t latest = 0;
        for (const Time& time : times_) {
            latest = std::max(latest, time.end());
        }
        return latest;
    }

    void pass(uint64_t cycles)
    {
        for (Time& time : times_) {
            time.free += cycles;
        }
    }

    // Does the next instruction of `pipe` run after instruction `time` of `other`? The scalar unit
    // runs its own instructions strictly one after the other; the other pipes need a barrier.
    bool ordered(pipe_t pipe, pipe_t other, uint32_t time) const
    {
        return (pipe == PIPE_S && other == PIPE_S) || seen_[pipe][other] >= time;
    }

    void barrier(pipe_t pipe)
    {
        if (pipe == PIPE_ALL) {
            seen_.fill(now_);
            const uint64_t latest = cycles();
            times_.fill({latest, latest});
        } else {
            seen_[pipe][pipe] = now_[pipe];
            times_[pipe].free = times_[pipe].end();
        }
    }

    // What a pipe has finished and knows to be finished, as of its latest instruction.
    Clock snapshot(pipe_t pipe) const
    {
        Clock clock = seen_[pipe];
        clock[pipe] = now_[pipe];
        return clock;
    }

    void learn(pipe_t pipe, const Clock& clock)
    {
        for (int q = 0; q < kPipes; ++q) {
            seen_[pipe][q] = std::max(seen_[pipe][q], clock[q]);
        }
    }

    // An id for a flag that nobody holds; queues and AllocEventID draw from the same eight.
    TEventID allocate(HardEvent event);

    // The first id that nobody has reserved.
    TEventID free_id(HardEvent event);

    void release(HardEvent event, int id);
    void set(HardEvent event, int id);
    void wait(HardEvent event, int id);

    // At the end of a block: a flag left set would be met by the next kernel.
    void check_all_waited_for(bool reserved_too) const;

    // A queue's flags are paired by the queue itself; the framework waits for the last ones.
    void mark_as_queue(HardEvent event, int id, bool by_queue) { at(event, id).by_queue = by_queue; }

private:
    struct Flag {
        bool set = false, reserved = false, by_queue = false;
        Clock clock{};
        uint64_t time = 0;
    };

    // When a pipe can start another instruction, and when its instructions so far are done.
    struct Time {
        uint64_t free = 0, done = 0;
        uint64_t end() const { return std::max(free, done); }
    };

    Flag& at(HardEvent event, int id);

    Clock now_{};
    std::array<Clock, kPipes> seen_{};
    std::array<Time, kPipes> times_{};
    std::array<std::array<Flag, kEventIds>, kEvents> flags_{};
};

}  // namespace twin
