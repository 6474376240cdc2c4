// The global memory that a kernel may touch: bounds, read-only inputs, unwritten bytes, and races.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
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

    void add(std::string name, Region::Role role, void* begin, size_t size);

    // Checks an access and returns the index of its region.
    int check(const void* address, size_t bytes, size_t alignment, bool write, const char* what);

    void note(int region, const void* address, size_t bytes, bool write, int block);

    // At a barrier of all blocks and at the end: no block may have touched what another one wrote.
    void check_races();

    // At the end: an output starts as garbage on the device, so every byte must be written.
    void check_outputs_complete() const;

private:
    std::vector<Access> log_;
};

}  // namespace twin
