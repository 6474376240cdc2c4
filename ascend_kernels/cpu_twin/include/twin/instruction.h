// One instruction of a pipe that reads and writes UB: declares its operands, with all checks.
#pragma once

#include "twin/tensor.h"

namespace twin {

class Instruction {
public:
    Instruction(pipe_t pipe, const char* what)
        : pipe_(pipe), what_(what), time_(core().clocks.issue(pipe))
    {
        core().counters.vector_instructions += pipe == PIPE_V;
    }

    const char* what() const { return what_; }
    uint32_t time() const { return time_; }

    // Elements that the instruction reads; `alignment` is what the operand's address must obey.
    template <typename T>
    const T* in(const AscendC::LocalTensor<T>& tensor, size_t first, size_t count,
                size_t alignment = kBlock)
    {
        const T* address = operand(tensor, first, count, alignment);
        const size_t offset = tensor.begin() + first * sizeof(T), bytes = count * sizeof(T);
        core().ub.touch(core().clocks, pipe_, time_, offset, bytes, false, what_);
        core().ub.check_initialised(offset, bytes, what_);
        reads_.push_back({offset, offset + bytes});
        return address;
    }
    template <typename T>
    const T* in(const AscendC::LocalTensor<T>& tensor, size_t count)
    {
        return in(tensor, 0, count);
    }

    // Elements that the instruction writes. Declare them after everything that it reads.
    template <typename T>
    T* out(const AscendC::LocalTensor<T>& tensor, size_t first, size_t count,
           size_t alignment = kBlock)
    {
        T* address = operand(tensor, first, count, alignment);
        const size_t offset = tensor.begin() + first * sizeof(T), bytes = count * sizeof(T);
        core().ub.touch(core().clocks, pipe_, time_, offset, bytes, true, what_);
        core().ub.mark_initialised(offset, bytes);
        writes_.push_back({offset, offset + bytes});
        return address;
    }
    template <typename T>
    T* out(const AscendC::LocalTensor<T>& tensor, size_t count)
    {
        return out(tensor, 0, count);
    }

    // Source and destination of a count-style instruction may coincide or be apart, not overlap.
    void check_overlap() const
    {
        for (const Range& read : reads_) {
            for (const Range& write : writes_) {
                const bool apart = read.end <= write.begin || write.end <= read.begin;
                if (!apart && read.begin != write.begin) {
                    fail(what_, ": source and destination overlap without coinciding (UB bytes ",
                         read.begin, " and ", write.begin, ")");
                }
            }
        }
    }

    void count_repeats(size_t bytes) { core().counters.vector_repeats += round_up(bytes, kRepeat) / kRepeat; }

private:
    struct Range {
        size_t begin, end;
    };

    template <typename T>
    T* operand(const AscendC::LocalTensor<T>& tensor, size_t first, size_t count, size_t alignment)
    {
        const size_t offset = tensor.begin() + first * sizeof(T);
        if (offset % alignment) {
            fail(what_, ": UB address ", offset, " is not aligned to ", alignment, " bytes");
        }
        return tensor.raw(first, count, what_);
    }

    pipe_t pipe_;
    const char* what_;
    uint32_t time_;
    std::vector<Range> reads_, writes_;
};

}  // namespace twin
