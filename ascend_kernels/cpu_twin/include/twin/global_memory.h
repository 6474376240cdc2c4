// The global memory that a kernel may touch: bounds, read-only inputs, unwritten bytes, and races.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "twin/clock.h"

namespace twin {

// One tensor in global memory.
struct Region {
    enum class Role { input, output, workspace };

    std::string name;
    Role role;
    uint8_t* begin;
    size_t size;
    std::vector<bool> written{};  // one a byte; empty for inputs

    bool holds(const uint8_t* p, size_t bytes) const
    {
        return p >= begin && p + bytes <= begin + size;
    }
};

// A stretch of bytes that one block touched between two barriers of all blocks.
struct Access {
    int region;
    size_t begin, end;
    bool write;
    int block;
};

// All tensors of a launch, shared by its blocks (which run one at a time).
class GlobalMemory {
public:
    std::vector<Region> regions;

    void add(std::string name, Region::Role role, void* begin, size_t size)
    {
        regions.push_back({std::move(name), role, static_cast<uint8_t*>(begin), size});
        if (role != Region::Role::input) {
            regions.back().written.assign(size, false);
        }
    }

    // Checks an access and returns the index of its region.
    int check(const void* address, size_t bytes, size_t alignment, bool write, const char* what)
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
        fail(what, ": ", bytes, " bytes ", describe(p), " are outside every global tensor");
    }

    void note(int region, const void* address, size_t bytes, bool write, int block)
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

    // At a barrier of all blocks and at the end: no block may have touched what another one wrote.
    void check_races()
    {
        std::sort(log_.begin(), log_.end(), [](const Access& a, const Access& b) {
            return std::tie(a.region, a.begin) < std::tie(b.region, b.begin);
        });
        for (size_t i = 0; i < log_.size(); ++i) {
            for (size_t j = i + 1; j < log_.size() && log_[j].region == log_[i].region &&
                                   log_[j].begin < log_[i].end;
                 ++j) {
                report_race(log_[i], log_[j]);
            }
        }
        log_.clear();
    }

    // At the end: an output starts as garbage on the device, so every byte must be written.
    void check_outputs_complete() const
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

private:
    void check_initialised(const Region& region, size_t offset, size_t bytes, const char* what)
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

    void report_race(const Access& a, const Access& b) const
    {
        if (a.block != b.block && (a.write || b.write)) {
            fail("race between blocks ", a.block, a.write ? " (writes)" : " (reads)", " and ",
                 b.block, b.write ? " (writes)" : " (reads)", " at byte ", b.begin, " of ",
                 regions[a.region].name, ": no SyncAll between them");
        }
    }

    // Where an address lies, as seen from the nearest tensor in front of it.
    std::string describe(const uint8_t* p) const
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

    std::vector<Access> log_;
};

}  // namespace twin
