// The UB of one core with its shadow: which bytes hold a value, and who touched each block last.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "twin/clock.h"

namespace twin {

constexpr size_t kBlock = 32;
constexpr size_t kRepeat = 256;

constexpr size_t round_up(size_t bytes, size_t unit = kBlock)
{
    return (bytes + unit - 1) / unit * unit;
}

class UnifiedBuffer {
public:
    explicit UnifiedBuffer(size_t size);

    size_t size() const { return initialised_.size(); }
    uint8_t* at(size_t offset) { return base_ + offset; }

    void forget(size_t offset, size_t bytes);
    void check_initialised(size_t offset, size_t bytes, const char* what) const;
    void mark_initialised(size_t offset, size_t bytes);

    // Declares that instruction `time` of `pipe` reads or writes bytes; complains about a hazard.
    void touch(const Clocks& clocks, pipe_t pipe, uint32_t time, size_t offset, size_t bytes,
               bool write, const char* what);

private:
    // Latest instruction of each pipe that wrote or read a block of 32 bytes.
    struct Shadow {
        Clock written{}, read{};
    };

    std::vector<uint8_t> data_;
    uint8_t* base_;
    std::vector<bool> initialised_;
    std::vector<Shadow> shadow_;
};

}  // namespace twin
