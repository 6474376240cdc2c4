// Gather, Brcb and CreateVecIndex: moving and making elements inside UB.
#pragma once

#include "twin/elementwise.h"

namespace AscendC {

struct BrcbRepeatParams {
    BrcbRepeatParams() = default;
    BrcbRepeatParams(uint16_t block, uint16_t repeat) : dstBlkStride(block), dstRepStride(repeat) {}
    uint16_t dstBlkStride = 1, dstRepStride = 8;
};

// dst[i] = the element at byte base + offset[i] of src.
template <typename T>
void Gather(const LocalTensor<T>& dst, const LocalTensor<T>& src, const LocalTensor<uint32_t>& offset,
            const uint32_t base, const uint32_t count)
{
    static_assert(sizeof(T) == 2 || sizeof(T) == 4, "Gather: elements of 2 or 4 bytes");
    twin::Instruction vector(PIPE_V, "Gather");
    const uint32_t* at = vector.in(offset, count);
    std::vector<T> found(count);
    for (uint32_t i = 0; i < count; ++i) {
        const uint32_t byte = base + at[i];
        if (byte % sizeof(T)) {
            twin::fail("Gather: offset ", byte, " of element ", i, " is not a multiple of ",
                       sizeof(T));
        }
        found[i] = *vector.in(src, byte / sizeof(T), 1, sizeof(T));
    }
    std::copy(found.begin(), found.end(), vector.out(dst, count));
    vector.check_overlap();
    vector.count_repeats(count * sizeof(T));
}

// Spreads each of eight elements per repeat over a block of its own.
template <typename T>
void Brcb(const LocalTensor<T>& dst, const LocalTensor<T>& src, const uint8_t repeats,
          const BrcbRepeatParams& p)
{
    static_assert(sizeof(T) == 2 || sizeof(T) == 4, "Brcb: elements of 2 or 4 bytes");
    twin::Instruction vector(PIPE_V, "Brcb");
    const size_t n = twin::block_elements(sizeof(T));
    const T* from = vector.in(src, repeats * 8);
    const std::vector<T> source(from, from + repeats * 8);
    for (size_t r = 0; r < repeats; ++r) {
        for (size_t k = 0; k < 8; ++k) {
            const size_t first = (r * p.dstRepStride + k * p.dstBlkStride) * n;
            std::fill_n(vector.out(dst, first, n), n, source[r * 8 + k]);
        }
    }
    vector.check_overlap();
    vector.count_repeats(repeats * twin::kRepeat);
}

// first, first + 1, first + 2, ...
template <typename T>
void CreateVecIndex(LocalTensor<T> dst, const T& first, uint32_t count)
{
    static_assert(twin::one_of<T, TWIN_NUMBERS>, "CreateVecIndex: no such type on Atlas A2");
    twin::Instruction vector(PIPE_V, "CreateVecIndex");
    T* to = vector.out(dst, count);
    for (uint32_t i = 0; i < count; ++i) {
        to[i] = twin::narrow<T>(static_cast<twin::Wide<T>>(first) + static_cast<twin::Wide<T>>(i));
    }
    vector.count_repeats(count * sizeof(T));
}

template <typename T>
void CreateVecIndex(LocalTensor<T>& dst, const T& first, uint64_t mask, uint8_t repeats,
                    uint16_t block_stride, uint8_t repeat_stride)
{
    static_assert(twin::one_of<T, TWIN_NUMBERS>, "CreateVecIndex: no such type on Atlas A2");
    twin::Instruction vector(PIPE_V, "CreateVecIndex");
    const twin::Lanes lanes_of = vector.lanes(true, mask, sizeof(T), repeats);
    const size_t n = twin::block_elements(sizeof(T));
    twin::for_each_block(lanes_of, n, [&](size_t r, size_t b, size_t lanes) {
        T* to = vector.out(dst, (r * repeat_stride + b * block_stride) * n, lanes);
        for (size_t i = 0; i < lanes; ++i) {
            const size_t index = r * mask + b * n + i;
            to[i] = twin::narrow<T>(static_cast<twin::Wide<T>>(first) +
                                    static_cast<twin::Wide<T>>(index));
        }
    });
    vector.count_repeats(repeats * twin::kRepeat);
}

}  // namespace AscendC
