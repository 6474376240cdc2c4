// All blocks of a launch. Each block is a thread, but only one runs at a time: a block runs until it
// ends or waits in SyncAll, then the next one goes on. So every run is the same, and blocks that
// must exchange data really have to meet in SyncAll.
#pragma once

#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "twin/core.h"

namespace twin {

class Grid {
public:
    Grid(GlobalMemory& memory, int blocks, size_t ub_bytes, uint64_t tiling_key = 0)
        : tiling_key(tiling_key), memory_(memory), ub_bytes_(ub_bytes), states_(blocks, State::ready), counters_(blocks)
    {
    }

    const uint64_t tiling_key;

    // Runs `kernel` once per block; throws the first violation, with its block in front.
    void run(const std::function<void()>& kernel)
    {
        std::vector<std::thread> threads;
        for (int block = 0; block < blocks(); ++block) {
            threads.emplace_back([this, block, &kernel] { run_block(block, kernel); });
        }
        for (auto& thread : threads) {
            thread.join();
        }
        if (!error_.empty()) {
            throw Violation(error_);
        }
        memory_.check_races();
        memory_.check_outputs_complete();
    }

    // The calling block waits here until all blocks have come.
    void sync_all()
    {
        std::unique_lock<std::mutex> lock(mutex_);
        const int block = core().block;
        states_[block] = State::waiting;
        pass_on(block);
        wait_for_turn(lock, block);
    }

    const std::vector<Counters>& counters() const { return counters_; }

private:
    enum class State { ready, waiting, done };
    struct Aborted {};  // unwinds a block because another one has failed

    int blocks() const { return static_cast<int>(states_.size()); }

    void run_block(int block, const std::function<void()>& kernel)
    {
        {
            std::unique_lock<std::mutex> lock(mutex_);
            turned_.wait(lock, [&] { return turn_ == block || !error_.empty(); });
            if (!error_.empty()) {
                return;
            }
        }
        Core core(this, &memory_, block, blocks(), ub_bytes_);
        current_core = &core;
        std::string error;
        try {
            kernel();
            core.finish();
        } catch (const Violation& violation) {
            error = "block " + std::to_string(block) + " of " + std::to_string(blocks()) + ": " +
                    violation.what();
        } catch (const Aborted&) {
        }
        current_core = nullptr;
        const std::lock_guard<std::mutex> lock(mutex_);
        counters_[block] = core.counters;
        states_[block] = State::done;
        if (!error.empty() && error_.empty()) {
            error_ = error;
        }
        pass_on(block);
    }

    // Gives the turn to the next block that can run; opens the barrier when all have come.
    void pass_on(int block)
    {
        int next = block + 1;
        if (next == blocks() && error_.empty()) {
            meet();
            next = 0;
        }
        turn_ = next;
        turned_.notify_all();
    }

    void meet()
    {
        int waiting = -1, done = -1;
        for (int b = 0; b < blocks(); ++b) {
            (states_[b] == State::waiting ? waiting : done) = b;
        }
        if (waiting >= 0 && done >= 0) {
            error_ = "SyncAll: block " + std::to_string(waiting) + " waits for block " +
                     std::to_string(done) + ", which has ended (the launch would hang)";
            return;
        }
        if (waiting >= 0) {
            try {
                memory_.check_races();
            } catch (const Violation& violation) {
                error_ = violation.what();
            }
            std::fill(states_.begin(), states_.end(), State::ready);
        }
    }

    void wait_for_turn(std::unique_lock<std::mutex>& lock, int block)
    {
        turned_.wait(lock, [&] {
            return !error_.empty() || (turn_ == block && states_[block] == State::ready);
        });
        if (!error_.empty()) {
            throw Aborted();
        }
    }

    GlobalMemory& memory_;
    const size_t ub_bytes_;
    std::vector<State> states_;
    std::vector<Counters> counters_;
    std::mutex mutex_;
    std::condition_variable turned_;
    int turn_ = 0;
    std::string error_;
};

}  // namespace twin
