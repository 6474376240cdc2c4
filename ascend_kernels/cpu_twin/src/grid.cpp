// Global memory, shared by the blocks of a launch, and the turns that the blocks take.
#include "twin/grid.h"

#include <algorithm>
#include <thread>
#include <tuple>

namespace twin {

// ---- Global memory.

void GlobalMemory::add(std::string name, Region::Role role, void* begin, size_t size)
{
    regions.push_back({std::move(name), role, static_cast<uint8_t*>(begin), size});
    if (role != Region::Role::input) {
        regions.back().written.assign(size, false);
    }
}

static void check_initialised(const Region& region, size_t offset, size_t bytes, const char* what)
{
    if (region.role == Region::Role::input) {
        return;
    }
    const auto begin = region.written.begin() + offset;
    const auto hole = std::find(begin, begin + bytes, false);
    if (hole != begin + bytes) {
        fail(what, ": reads byte ", hole - region.written.begin(), " of ", region.name,
             ", which nobody has written");
    }
}

// Where an address lies, as seen from the nearest tensor in front of it.
static std::string describe(const std::vector<Region>& regions, const uint8_t* p)
{
    const Region* nearest = nullptr;
    for (const Region& region : regions) {
        if (region.begin <= p && (!nearest || region.begin > nearest->begin)) {
            nearest = &region;
        }
    }
    if (!nearest) {
        return "in front of all tensors";
    }
    return "at byte " + std::to_string(p - nearest->begin) + " of " + nearest->name + " (" +
           std::to_string(nearest->size) + " bytes)";
}

int GlobalMemory::check(const void* address, size_t bytes, size_t alignment, bool write,
                        const char* what)
{
    const auto* p = static_cast<const uint8_t*>(address);
    if (reinterpret_cast<uintptr_t>(p) % alignment) {
        fail(what, ": global address is not aligned to its element of ", alignment, " bytes");
    }
    for (size_t i = 0; i < regions.size(); ++i) {
        Region& region = regions[i];
        if (!region.holds(p, bytes)) {
            continue;
        }
        const size_t offset = p - region.begin;
        if (write) {
            if (region.role == Region::Role::input) {
                fail(what, ": writes to ", region.name, ", which is an input");
            }
            std::fill_n(region.written.begin() + offset, bytes, true);
        } else {
            check_initialised(region, offset, bytes, what);
        }
        return static_cast<int>(i);
    }
    fail(what, ": ", bytes, " bytes ", describe(regions, p), " are outside every global tensor");
}

void GlobalMemory::note(int region, const void* address, size_t bytes, bool write, int block)
{
    const size_t begin = static_cast<const uint8_t*>(address) - regions[region].begin;
    if (!log_.empty()) {  // neighbouring rows become one stretch
        Access& last = log_.back();
        if (last.region == region && last.write == write && last.block == block &&
            last.end == begin) {
            last.end += bytes;
            return;
        }
    }
    log_.push_back({region, begin, begin + bytes, write, block});
}

static void report_race(const std::vector<Region>& regions, const Access& a, const Access& b)
{
    if (a.block != b.block && (a.write || b.write)) {
        fail("race between blocks ", a.block, a.write ? " (writes)" : " (reads)", " and ",
             b.block, b.write ? " (writes)" : " (reads)", " at byte ", b.begin, " of ",
             regions[a.region].name, ": no SyncAll between them");
    }
}

void GlobalMemory::check_races()
{
    std::sort(log_.begin(), log_.end(), [](const Access& a, const Access& b) {
        return std::tie(a.region, a.begin) < std::tie(b.region, b.begin);
    });
    for (size_t i = 0; i < log_.size(); ++i) {
        for (size_t j = i + 1; j < log_.size() && log_[j].region == log_[i].region &&
                               log_[j].begin < log_[i].end;
             ++j) {
            report_race(regions, log_[i], log_[j]);
        }
    }
    log_.clear();
}

void GlobalMemory::check_outputs_complete() const
{
    for (const Region& region : regions) {
        if (region.role != Region::Role::output) {
            continue;
        }
        const auto hole = std::find(region.written.begin(), region.written.end(), false);
        if (hole != region.written.end()) {
            fail("output ", region.name, ": byte ", hole - region.written.begin(), " of ",
                 region.size, " was never written");
        }
    }
}

// ---- The turns of the blocks.

void Grid::run(const std::function<void()>& kernel)
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

void Grid::sync_all()
{
    std::unique_lock<std::mutex> lock(mutex_);
    const int block = core().block;
    states_[block] = State::waiting;
    pass_on(block);
    wait_for_turn(lock, block);
}

void Grid::run_block(int block, const std::function<void()>& kernel)
{
    {
        std::unique_lock<std::mutex> lock(mutex_);
        turned_.wait(lock, [&] { return turn_ == block || !error_.empty(); });
        if (!error_.empty()) {
            return;
        }
    }
    Core core(this, &memory_, block, blocks(), ub_bytes_, tiling_key_);
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

void Grid::pass_on(int block)
{
    int next = block + 1;
    if (next == blocks() && error_.empty()) {
        meet();
        next = 0;
    }
    turn_ = next;
    turned_.notify_all();
}

void Grid::meet()
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

void Grid::wait_for_turn(std::unique_lock<std::mutex>& lock, int block)
{
    turned_.wait(lock, [&] {
        return !error_.empty() || (turn_ == block && states_[block] == State::ready);
    });
    if (!error_.empty()) {
        throw Aborted();
    }
}

}  // namespace twin
