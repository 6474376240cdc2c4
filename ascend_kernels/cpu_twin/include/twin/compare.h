// Compare, CompareScalar and Select: bit masks, one bit an element, and choosing by them.
#pragma once

#include "twin/elementwise.h"

namespace AscendC {

enum class CMPMODE { LT = 0, GT, EQ, LE, GE, NE };
enum class SELMODE { VSEL_CMPMASK_SPR = 0, VSEL_TENSOR_SCALAR_MODE, VSEL_TENSOR_TENSOR_MODE };

}  // namespace AscendC

namespace twin {

using AscendC::CMPMODE;

template <typename T>
bool holds(CMPMODE mode, T a, T b)
{
    switch (mode) {
        case CMPMODE::LT: return a < b;
        case CMPMODE::GT: return a > b;
        case CMPMODE::EQ: return a == b;
        case CMPMODE::LE: return a <= b;
        case CMPMODE::GE: return a >= b;
        default: return a != b;
    }
}

template <typename T>
void check_comparison(CMPMODE mode, size_t count, const char* what)
{
    static_assert(one_of<T, half, float, int32_t>, "Compare: half, float, and int32 for EQ");
    if (std::is_same_v<T, int32_t> && mode != CMPMODE::EQ) {
        fail(what, ": int32 can only be compared by EQ on Atlas A2");
    }
    if (count == 0 || count * sizeof(T) % kRepeat) {
        fail(what, ": ", count * sizeof(T), " bytes are not whole repeats of 256 bytes");
    }
}

template <typename T, typename U, typename Right>
void compare(Instruction& vector, const LocalTensor<U>& dst, const LocalTensor<T>& src,
             CMPMODE mode, uint32_t count, const Right& right)
{
    static_assert(sizeof(U) == 1, "Compare: the mask is uint8_t or int8_t");
    const T* a = vector.in(src, count);
    std::vector<uint8_t> bits(count / 8, 0);
    for (uint32_t i = 0; i < count; ++i) {
        const bool yes = holds<Wide<T>>(mode, static_cast<Wide<T>>(a[i]), right(i));
        bits[i / 8] |= static_cast<uint8_t>(yes) << i % 8;
    }
    std::memcpy(vector.out(dst, bits.size()), bits.data(), bits.size());
    vector.count_repeats(count * sizeof(T));
}

template <typename T, typename U, typename Other>
void select(Instruction& vector, const LocalTensor<T>& dst, const LocalTensor<U>& mask,
            const LocalTensor<T>& src, uint32_t count, const Other& other)
{
    static_assert(one_of<T, TWIN_FLOATS>, "Select: half and float only");
    const auto* bits = reinterpret_cast<const uint8_t*>(
        vector.in(mask, (count + 8 * sizeof(U) - 1) / (8 * sizeof(U))));
    const T* a = vector.in(src, count);
    T* to = vector.out(dst, count);
    for (uint32_t i = 0; i < count; ++i) {
        to[i] = bits[i / 8] >> i % 8 & 1 ? a[i] : other(i);
    }
    vector.count_repeats(count * sizeof(T));
}

// The repeat forms take a mask of all lanes only: what they write for idle lanes is not documented.
inline void check_full_mask(const Lanes& lanes, size_t element_bytes, const char* what)
{
    if (lanes.each != kRepeat / element_bytes || lanes.last != lanes.each) {
        fail(what, ": in the repeat form the mask must cover all ", kRepeat / element_bytes,
             " elements of a repeat");
    }
}

// The bits of one repeat follow those of the one before: 256 / sizeof(T) / 8 bytes each.
template <typename T>
constexpr size_t kBitBytes = kRepeat / sizeof(T) / 8;

template <typename T, typename U, typename Right>
void compare_repeats(Instruction& vector, const LocalTensor<U>& dst, const LocalTensor<T>& src,
                     CMPMODE mode, size_t repeats, Stride from, const Right& right)
{
    static_assert(sizeof(U) == 1, "Compare: the mask is uint8_t or int8_t");
    const size_t n = block_elements(sizeof(T));
    std::vector<uint8_t> bits(repeats * kBitBytes<T>, 0);
    for_each_block({repeats, kRepeat / sizeof(T), kRepeat / sizeof(T)}, n, [&](size_t r, size_t b, size_t lanes) {
        const T* a = vector.in(src, (r * from.repeat + b * from.block) * n, lanes);
        const T* other = right(r, b);
        for (size_t i = 0; i < lanes; ++i) {
            const size_t bit = r * kBitBytes<T> * 8 + b * n + i;
            const bool yes = holds<Wide<T>>(mode, static_cast<Wide<T>>(a[i]),
                                            static_cast<Wide<T>>(other[i]));
            bits[bit / 8] |= static_cast<uint8_t>(yes) << bit % 8;
        }
    });
    std::memcpy(vector.out(dst, bits.size()), bits.data(), bits.size());
    vector.count_repeats(repeats * kRepeat);
}

template <typename T, typename U, typename Other>
void select_repeats(Instruction& vector, const LocalTensor<T>& dst, const LocalTensor<U>& mask,
                    const LocalTensor<T>& src, size_t repeats,
                    const AscendC::BinaryRepeatParams& p, const Other& other)
{
    static_assert(one_of<T, TWIN_FLOATS>, "Select: half and float only");
    static_assert(sizeof(U) == 1, "Select: the mask is uint8_t or int8_t");
    const size_t n = block_elements(sizeof(T));
    const auto* bits =
        reinterpret_cast<const uint8_t*>(vector.in(mask, repeats * kBitBytes<T>));
    for_each_block({repeats, kRepeat / sizeof(T), kRepeat / sizeof(T)}, n, [&](size_t r, size_t b, size_t lanes) {
        const T* a = vector.in(src, (r * p.src0RepStride + b * p.src0BlkStride) * n, lanes);
        const T* rest = other(r, b);
        T* to = vector.out(dst, (r * p.dstRepStride + b * p.dstBlkStride) * n, lanes);
        for (size_t i = 0; i < lanes; ++i) {
            const size_t bit = r * kBitBytes<T> * 8 + b * n + i;
            to[i] = bits[bit / 8] >> bit % 8 & 1 ? a[i] : rest[i];
        }
    });
    vector.count_repeats(repeats * kRepeat);
}

// One block of a scalar, for instructions whose other operand is one.
template <typename T>
std::vector<T> block_of(T scalar)
{
    return std::vector<T>(block_elements(sizeof(T)), scalar);
}

}  // namespace twin

namespace AscendC {

template <typename T, typename U>
void Compare(const LocalTensor<U>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1,
             CMPMODE mode, uint32_t count)
{
    twin::Instruction vector(PIPE_V, "Compare");
    twin::check_comparison<T>(mode, count, vector.what());
    const T* b = vector.in(src1, count);
    twin::compare(vector, dst, src0, mode, count,
                  [b](uint32_t i) { return static_cast<twin::Wide<T>>(b[i]); });
}

template <typename T, typename U>
void CompareScalar(const LocalTensor<U>& dst, const LocalTensor<T>& src, const T scalar,
                   CMPMODE mode, uint32_t count)
{
    twin::Instruction vector(PIPE_V, "CompareScalar");
    twin::check_comparison<T>(mode, count, vector.what());
    twin::compare(vector, dst, src, mode, count,
                  [scalar](uint32_t) { return static_cast<twin::Wide<T>>(scalar); });
}

// src0 where the bit is set, src1 elsewhere.
template <typename T, typename U>
void Select(const LocalTensor<T>& dst, const LocalTensor<U>& mask, const LocalTensor<T>& src0,
            const LocalTensor<T>& src1, SELMODE mode, uint32_t count)
{
    twin::Instruction vector(PIPE_V, "Select");
    if (mode == SELMODE::VSEL_TENSOR_SCALAR_MODE) {
        twin::fail("Select: VSEL_TENSOR_SCALAR_MODE takes a scalar as second source");
    }
    const T* b = vector.in(src1, count);
    twin::select(vector, dst, mask, src0, count, [b](uint32_t i) { return b[i]; });
}

// src where the bit is set, the scalar elsewhere.
template <typename T, typename U>
void Select(const LocalTensor<T>& dst, const LocalTensor<U>& mask, const LocalTensor<T>& src,
            T scalar, SELMODE mode, uint32_t count)
{
    twin::Instruction vector(PIPE_V, "Select");
    if (mode != SELMODE::VSEL_TENSOR_SCALAR_MODE) {
        twin::fail("Select: with a scalar the mode is VSEL_TENSOR_SCALAR_MODE");
    }
    twin::select(vector, dst, mask, src, count, [scalar](uint32_t) { return scalar; });
}

template <typename T, typename U, bool isSetMask = true>
void Compare(const LocalTensor<U>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1,
             CMPMODE mode, const uint64_t mask, uint8_t repeats, const BinaryRepeatParams& p)
{
    twin::Instruction vector(PIPE_V, "Compare", twin::mask_of(isSetMask));
    twin::check_comparison<T>(mode, twin::kRepeat / sizeof(T), vector.what());
    const twin::Lanes all = vector.lanes(isSetMask, mask, sizeof(T), repeats);
    twin::check_full_mask(all, sizeof(T), vector.what());
    const size_t n = twin::block_elements(sizeof(T));
    twin::compare_repeats(vector, dst, src0, mode, all.repeats, {p.src0BlkStride, p.src0RepStride},
                          [&](size_t r, size_t b) {
                              const size_t block = r * p.src1RepStride + b * p.src1BlkStride;
                              return vector.in(src1, block * n, n);
                          });
}

template <typename T, typename U, bool isSetMask = true>
void CompareScalar(const LocalTensor<U>& dst, const LocalTensor<T>& src, const T scalar,
                   CMPMODE mode, const uint64_t mask, uint8_t repeats, const UnaryRepeatParams& p)
{
    twin::Instruction vector(PIPE_V, "CompareScalar", twin::mask_of(isSetMask));
    twin::check_comparison<T>(mode, twin::kRepeat / sizeof(T), vector.what());
    const twin::Lanes all = vector.lanes(isSetMask, mask, sizeof(T), repeats);
    twin::check_full_mask(all, sizeof(T), vector.what());
    const std::vector<T> right = twin::block_of(scalar);
    twin::compare_repeats(vector, dst, src, mode, all.repeats, {p.srcBlkStride, p.srcRepStride},
                          [&](size_t, size_t) { return right.data(); });
}

template <typename T, typename U, bool isSetMask = true>
void Select(const LocalTensor<T>& dst, const LocalTensor<U>& mask, const LocalTensor<T>& src0,
            const LocalTensor<T>& src1, SELMODE mode, uint64_t lanes, uint8_t repeats,
            const BinaryRepeatParams& p)
{
    twin::Instruction vector(PIPE_V, "Select", twin::mask_of(isSetMask));
    if (mode != SELMODE::VSEL_TENSOR_TENSOR_MODE) {
        twin::fail("Select: the repeat form of two tensors is VSEL_TENSOR_TENSOR_MODE in the twin");
    }
    const twin::Lanes all = vector.lanes(isSetMask, lanes, sizeof(T), repeats);
    twin::check_full_mask(all, sizeof(T), vector.what());
    const size_t n = twin::block_elements(sizeof(T));
    twin::select_repeats(vector, dst, mask, src0, all.repeats, p, [&](size_t r, size_t b) {
        return vector.in(src1, (r * p.src1RepStride + b * p.src1BlkStride) * n, n);
    });
}

template <typename T, typename U, bool isSetMask = true>
void Select(const LocalTensor<T>& dst, const LocalTensor<U>& mask, const LocalTensor<T>& src,
            T scalar, SELMODE mode, uint64_t lanes, uint8_t repeats, const BinaryRepeatParams& p)
{
    twin::Instruction vector(PIPE_V, "Select", twin::mask_of(isSetMask));
    if (mode != SELMODE::VSEL_TENSOR_SCALAR_MODE) {
        twin::fail("Select: with a scalar the mode is VSEL_TENSOR_SCALAR_MODE");
    }
    const twin::Lanes all = vector.lanes(isSetMask, lanes, sizeof(T), repeats);
    twin::check_full_mask(all, sizeof(T), vector.what());
    const std::vector<T> rest = twin::block_of(scalar);
    twin::select_repeats(vector, dst, mask, src, all.repeats, p,
                         [&](size_t, size_t) { return rest.data(); });
}

}  // namespace AscendC
