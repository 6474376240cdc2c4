// All blocks of a launch. Each block is a thread, but only one runs at a time: a block runs until it
// ends or waits in SyncAll, then the next one goes on. So every run is the same, and blocks that
// must exchange data really have to meet in SyncAll.
#pragma once

#include <condition_variable>
#include <functional>
#include <mutex>
#include <vector>

#include "twin/core.h"

namespace twin {

class Grid {
public:
    Grid(GlobalMemory& memory, int blocks, size_t ub_bytes, uint64_t tiling_key)
        : memory_(memory), ub_bytes_(ub_bytes), tiling_key_(tiling_key), states_(blocks, State::ready),
          counters_(blocks)
    {
    }

    // Runs `kernel` once per block; throws the first violation, with its block in front.
    void run(const std::function<void()>& kernel);

    // The calling block waits here until all blocks have come.
    void sync_all();

    const std::vector<Counters>& counters() const { return counters_; }

private:
    enum class State { ready, waiting, done };
    struct Aborted {};  // unwinds a block because another one has failed

    int blocks() const { return static_cast<int>(states_.size()); }

    void run_block(int block, const std::function<void()>& kernel);

    // Gives the turn to the next block that can run; opens the barrier when all have come.
    void pass_on(int block);
    void meet();
    void wait_for_turn(std::unique_lock<std::mutex>& lock, int block);

    GlobalMemory& memory_;
    const size_t ub_bytes_;
    const uint64_t tiling_key_;
    std::vector<State> states_;
    std::vector<Counters> counters_;
    std::mutex mutex_;
    std::condition_variable turned_;
    int turn_ = 0;
    std::string error_;
};

}  // namespace twin
