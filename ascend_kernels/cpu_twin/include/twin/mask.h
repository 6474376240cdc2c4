// The mask register of the vector unit: which lanes the next instruction computes.
//
// SetVectorMask sets it, for instructions whose isSetMask is false; ResetMask restores all lanes. In
// normal mode it holds a bit a lane of one repeat, in counter mode (SetMaskCount, left by
// SetMaskNorm) the number of elements of the whole instruction. All other instructions set it
// themselves: a mask that is still there is lost, or cuts them short, and at the end of a kernel the
// next one would meet it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace twin {

// What an instruction in its repeat form computes: the first lanes of each repeat.
struct Lanes {
    size_t repeats, each, last;

    size_t of(size_t repeat) const { return repeat + 1 == repeats ? last : each; }
};

class MaskRegister {
public:
    void set_mode(bool counter) { counter_ = counter; }
    void set(bool counter, uint64_t high, uint64_t low);
    void set_first(bool counter, int32_t length, size_t element_bytes);
    void reset();

    // An instruction that sets the register itself, if that disturbs nobody.
    void take(const char* what);

    // The lanes of an instruction that leaves the register as it is.
    Lanes lanes(size_t element_bytes, int repeats, const char* what) const;

    // At the end of a kernel.
    void check_default() const;

private:
    bool counter_ = false;
    bool set_ = false;               // by SetVectorMask, and not reset
    uint64_t high_ = ~0ull, low_ = ~0ull;
    const char* taken_by_ = nullptr;  // since the kernel itself set it for the last time
};

}  // namespace twin
