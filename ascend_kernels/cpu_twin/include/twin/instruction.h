// One instruction of a pipe that reads and writes UB: declares its operands, with all checks.
#pragma once

#include "twin/tensor.h"

namespace twin {

void check_mask(size_t mask, size_t element_bytes, int repeats, const char* what);

// Where an instruction of the vector unit has its mask from: it sets it itself, by a count or by an
// argument; or it finds it in the register; or it has none.
enum class Mask { own, in_register, none };

class Instruction {
public:
    Instruction(pipe_t pipe, const char* what, Mask mask = Mask::own);

    const char* what() const { return what_; }
    uint32_t time() const { return time_; }

    // Elements that the instruction reads; `alignment` is what the operand's address must obey.
    template <typename T>
    const T* in(const AscendC::LocalTensor<T>& tensor, size_t first, size_t count,
                size_t alignment = kBlock)
    {
        return static_cast<const T*>(operand(tensor, first, count, alignment, false));
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
        return static_cast<T*>(operand(tensor, first, count, alignment, true));
    }
    template <typename T>
    T* out(const AscendC::LocalTensor<T>& tensor, size_t count)
    {
        return out(tensor, 0, count);
    }

    // The same of any type, as an address.
    void* operand(const LocalView& tensor, size_t first, size_t count, size_t alignment, bool write);

    // The lanes of a repeat form whose mask is `mask` (`own`), or in the register.
    Lanes lanes(bool own, uint64_t mask, size_t element_bytes, int repeats) const;

    // Source and destination of a count-style instruction may coincide or be apart, not overlap.
    void check_overlap() const;

    void count_repeats(size_t bytes)
    {
        const size_t repeats = round_up(bytes, kRepeat) / kRepeat;
        core().counters.vector_repeats += repeats;
        core().clocks.spend(PIPE_V, repeats, kVectorLatency);
    }

private:
    struct Range {
        size_t begin, end;
    };

    pipe_t pipe_;
    const char* what_;
    uint32_t time_;
    std::vector<Range> reads_, writes_;
};

// The mask of a repeat form.
constexpr Mask mask_of(bool is_set_mask)
{
    return is_set_mask ? Mask::own : Mask::in_register;
}

}  // namespace twin
