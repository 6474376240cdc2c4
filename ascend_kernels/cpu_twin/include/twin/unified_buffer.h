// The UB of one core with its shadow: which bytes hold a value, and who touched each block last.
#pragma once

#include <algorithm>
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
    explicit UnifiedBuffer(size_t size)
        : data_(size + kBlock, 0xCD), initialised_(size, false), shadow_(round_up(size) / kBlock)
    {
        base_ = data_.data() + (kBlock - reinterpret_cast<uintptr_t>(data_.data()) % kBlock) % kBlock;
    }

    size_t size() const { return initialised_.size(); }
    uint8_t* at(size_t offset) { return base_ + offset; }

    void forget(size_t offset, size_t bytes)
    {
        std::fill_n(initialised_.begin() + offset, bytes, false);
    }

    void check_initialised(size_t offset, size_t bytes, const char* what) const
    {
        const auto begin = initialised_.begin() + offset;
        const auto hole = std::find(begin, begin + bytes, false);
        if (hole != begin + bytes) {
            fail(what, ": reads UB byte ", hole - initialised_.begin(),
                 ", which nobody has written (uninitialised)");
        }
    }

    void mark_initialised(size_t offset, size_t bytes)
    {
        std::fill_n(initialised_.begin() + offset, bytes, true);
    }

    // Declares that instruction `time` of `pipe` reads or writes bytes; complains about a hazard.
    void touch(const Clocks& clocks, pipe_t pipe, uint32_t time, size_t offset, size_t bytes,
               bool write, const char* what)
    {
        for (size_t i = offset / kBlock; i < round_up(offset + bytes) / kBlock; ++i) {
            Shadow& block = shadow_[i];
            for (int p = 0; p < kPipes; ++p) {
                const pipe_t other = static_cast<pipe_t>(p);
                const bool self = other == pipe && block.written[p] == time;
                if (!self && !clocks.ordered(pipe, other, block.written[p])) {
                    hazard(write ? "write after write" : "read after write", pipe, other, i, what);
                }
                // a pipe starts its instructions in order, so it cannot overtake its own reads
                if (write && other != pipe && !clocks.ordered(pipe, other, block.read[p])) {
                    hazard("write after read", pipe, other, i, what);
                }
            }
            (write ? block.written : block.read)[pipe] = time;
        }
    }

private:
    // Latest instruction of each pipe that wrote or read a block of 32 bytes.
    struct Shadow {
        Clock written{}, read{};
    };

    [[noreturn]] static void hazard(const char* kind, pipe_t pipe, pipe_t other, size_t block,
                                    const char* what)
    {
        const std::string remedy =
            pipe == other ? std::string("PipeBarrier<PIPE_") + name(pipe) + ">"
                          : std::string("SetFlag and WaitFlag ") + name(other) + "_" + name(pipe) +
                                " or a queue";
        fail(what, ": hazard, ", kind, ": pipe ", name(pipe), " does not wait for pipe ", name(other),
             " at UB byte ", block * kBlock, " (needs ", remedy, ")");
    }

    std::vector<uint8_t> data_;
    uint8_t* base_;
    std::vector<bool> initialised_;
    std::vector<Shadow> shadow_;
};

}  // namespace twin
