// Vector instructions that treat every element alike: two forms each, by count and by repeats.
//
// The count form handles `count` elements that lie side by side. The repeat form handles up to 256
// bytes (`mask` elements of eight blocks) per repeat; strides are in blocks of 32 bytes, between the
// blocks of a repeat and between repeats. A repeat stride of 0 reads the same operand again.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "twin/instruction.h"

namespace AscendC {

struct UnaryRepeatParams {
    UnaryRepeatParams() = default;
    UnaryRepeatParams(uint16_t dst_block, uint16_t src_block, uint8_t dst_repeat, uint8_t src_repeat)
        : dstBlkStride(dst_block),
          srcBlkStride(src_block),
          dstRepStride(dst_repeat),
          srcRepStride(src_repeat)
    {
    }
    uint16_t dstBlkStride = 1, srcBlkStride = 1;
    uint8_t dstRepStride = 8, srcRepStride = 8;
};

struct BinaryRepeatParams {
    BinaryRepeatParams() = default;
    BinaryRepeatParams(uint8_t dst_block, uint8_t src0_block, uint8_t src1_block,
                       uint8_t dst_repeat, uint8_t src0_repeat, uint8_t src1_repeat)
        : dstBlkStride(dst_block),
          src0BlkStride(src0_block),
          src1BlkStride(src1_block),
          dstRepStride(dst_repeat),
          src0RepStride(src0_repeat),
          src1RepStride(src1_repeat)
    {
    }
    uint8_t dstBlkStride = 1, src0BlkStride = 1, src1BlkStride = 1;
    uint8_t dstRepStride = 8, src0RepStride = 8, src1RepStride = 8;
};

struct CopyRepeatParams {
    CopyRepeatParams() = default;
    CopyRepeatParams(uint16_t dst_block, uint16_t src_block, uint16_t dst_repeat,
                     uint16_t src_repeat)
        : dstStride(dst_block),
          srcStride(src_block),
          dstRepeatSize(dst_repeat),
          srcRepeatSize(src_repeat)
    {
    }
    uint16_t dstStride = 1, srcStride = 1, dstRepeatSize = 8, srcRepeatSize = 8;
};

}  // namespace AscendC

namespace twin {

using AscendC::LocalTensor;

template <typename T, typename... Allowed>
constexpr bool one_of = (std::is_same_v<T, Allowed> || ...);

// What an instruction computes in before it rounds once to its type: half in float (exact for one
// operation), integers in a wider type that cannot overflow, then wrapped.
template <typename T>
using Wide = std::conditional_t<std::is_integral_v<T>, int64_t, float>;

template <typename T>
T narrow(Wide<T> value)
{
    if constexpr (std::is_same_v<T, bfloat16_t>) {
        return bfloat16_t(static_cast<double>(value));
    } else {
        return static_cast<T>(value);
    }
}

constexpr size_t block_elements(size_t element_bytes) { return kBlock / element_bytes; }

// The distance between blocks and between repeats of an operand, in blocks.
struct Stride {
    size_t block, repeat;
};

// Visits the blocks of a repeat form: f(repeat, block, elements of this block).
template <typename Visit>
void for_each_block(const Lanes& lanes, size_t per_block, const Visit& visit)
{
    for (size_t r = 0; r < lanes.repeats; ++r) {
        for (size_t b = 0; b * per_block < lanes.of(r); ++b) {
            visit(r, b, std::min(per_block, lanes.of(r) - b * per_block));
        }
    }
}

template <typename T, typename Function>
void unary(const char* what, const LocalTensor<T>& dst, const LocalTensor<T>& src, int32_t count,
           const Function& f)
{
    Instruction vector(PIPE_V, what);
    const T* from = vector.in(src, count);
    T* to = vector.out(dst, count);
    vector.check_overlap();
    vector.count_repeats(count * sizeof(T));
    for (int32_t i = 0; i < count; ++i) {
        to[i] = narrow<T>(f(static_cast<Wide<T>>(from[i])));
    }
}

template <typename T, typename Function>
void unary_repeats(const char* what, const LocalTensor<T>& dst, const LocalTensor<T>& src,
                   bool own, uint64_t mask, uint8_t repeats, Stride to, Stride from,
                   const Function& f)
{
    Instruction vector(PIPE_V, what, mask_of(own));
    const Lanes lanes_of = vector.lanes(own, mask, sizeof(T), repeats);
    const size_t n = block_elements(sizeof(T));
    for_each_block(lanes_of, n, [&](size_t r, size_t b, size_t lanes) {
        const T* x = vector.in(src, (r * from.repeat + b * from.block) * n, lanes);
        T* y = vector.out(dst, (r * to.repeat + b * to.block) * n, lanes);
        for (size_t i = 0; i < lanes; ++i) {
            y[i] = narrow<T>(f(static_cast<Wide<T>>(x[i])));
        }
    });
    vector.count_repeats(lanes_of.repeats * kRepeat);
}

template <typename T, typename Function>
void binary(const char* what, const LocalTensor<T>& dst, const LocalTensor<T>& src0,
            const LocalTensor<T>& src1, int32_t count, const Function& f)
{
    Instruction vector(PIPE_V, what);
    const T* a = vector.in(src0, count);
    const T* b = vector.in(src1, count);
    T* to = vector.out(dst, count);
    vector.check_overlap();
    vector.count_repeats(count * sizeof(T));
    for (int32_t i = 0; i < count; ++i) {
        to[i] = narrow<T>(f(static_cast<Wide<T>>(a[i]), static_cast<Wide<T>>(b[i])));
    }
}

template <typename T, typename Function>
void binary_repeats(const char* what, const LocalTensor<T>& dst, const LocalTensor<T>& src0,
                    const LocalTensor<T>& src1, bool own, uint64_t mask, uint8_t repeats,
                    const AscendC::BinaryRepeatParams& p, const Function& f)
{
    Instruction vector(PIPE_V, what, mask_of(own));
    const Lanes lanes_of = vector.lanes(own, mask, sizeof(T), repeats);
    const size_t n = block_elements(sizeof(T));
    for_each_block(lanes_of, n, [&](size_t r, size_t b, size_t lanes) {
        const T* x0 = vector.in(src0, (r * p.src0RepStride + b * p.src0BlkStride) * n, lanes);
        const T* x1 = vector.in(src1, (r * p.src1RepStride + b * p.src1BlkStride) * n, lanes);
        T* y = vector.out(dst, (r * p.dstRepStride + b * p.dstBlkStride) * n, lanes);
        for (size_t i = 0; i < lanes; ++i) {
            y[i] = narrow<T>(f(static_cast<Wide<T>>(x0[i]), static_cast<Wide<T>>(x1[i])));
        }
    });
    vector.count_repeats(lanes_of.repeats * kRepeat);
}

}  // namespace twin

namespace AscendC {

// NaN in an operand of Max and Min gives NaN, as on the device.
#define TWIN_BINARY(NAME, TYPES, EXPRESSION)                                                       \
    template <typename T>                                                                          \
    void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1,   \
              const int32_t& count)                                                                \
    {                                                                                              \
        static_assert(twin::one_of<T, TYPES>, #NAME ": no such type on Atlas A2");                 \
        twin::binary(#NAME, dst, src0, src1, count, [](auto a, auto b) { return EXPRESSION; });    \
    }                                                                                              \
    template <typename T, bool isSetMask = true>                                                   \
    void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1,   \
              uint64_t mask, const uint8_t repeats, const BinaryRepeatParams& params)              \
    {                                                                                              \
        static_assert(twin::one_of<T, TYPES>, #NAME ": no such type on Atlas A2");                 \
        twin::binary_repeats(#NAME, dst, src0, src1, isSetMask, mask, repeats, params,             \
                             [](auto a, auto b) { return EXPRESSION; });                           \
    }

#define TWIN_SCALAR(NAME, TYPES, EXPRESSION)                                                       \
    template <typename T>                                                                          \
    void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src, const T& scalar,               \
              const int32_t& count)                                                                \
    {                                                                                              \
        static_assert(twin::one_of<T, TYPES>, #NAME ": no such type on Atlas A2");                 \
        const auto b = static_cast<twin::Wide<T>>(scalar);                                         \
        twin::unary(#NAME, dst, src, count, [b](auto a) { return EXPRESSION; });                   \
    }                                                                                              \
    template <typename T, bool isSetMask = true>                                                   \
    void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src, const T& scalar,               \
              uint64_t mask, const uint8_t repeats, const UnaryRepeatParams& p)                    \
    {                                                                                              \
        static_assert(twin::one_of<T, TYPES>, #NAME ": no such type on Atlas A2");                 \
        const auto b = static_cast<twin::Wide<T>>(scalar);                                         \
        twin::unary_repeats(#NAME, dst, src, isSetMask, mask, repeats,                             \
                            {p.dstBlkStride, p.dstRepStride},                                      \
                            {p.srcBlkStride, p.srcRepStride}, [b](auto a) { return EXPRESSION; }); \
    }

#define TWIN_UNARY(NAME, TYPES, EXPRESSION)                                                        \
    template <typename T>                                                                          \
    void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src, const int32_t& count)          \
    {                                                                                              \
        static_assert(twin::one_of<T, TYPES>, #NAME ": no such type on Atlas A2");                 \
        twin::unary(#NAME, dst, src, count, [](auto a) { return EXPRESSION; });                    \
    }                                                                                              \
    template <typename T, bool isSetMask = true>                                                   \
    void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src, uint64_t mask,                 \
              const uint8_t repeats, const UnaryRepeatParams& p)                                   \
    {                                                                                              \
        static_assert(twin::one_of<T, TYPES>, #NAME ": no such type on Atlas A2");                 \
        twin::unary_repeats(#NAME, dst, src, isSetMask, mask, repeats,                             \
                            {p.dstBlkStride, p.dstRepStride},                                      \
                            {p.srcBlkStride, p.srcRepStride}, [](auto a) { return EXPRESSION; });  \
    }

#define TWIN_FLOATS half, float
#define TWIN_NUMBERS half, float, int16_t, int32_t
#define TWIN_BITS int16_t, uint16_t

TWIN_BINARY(Add, TWIN_NUMBERS, a + b)
TWIN_BINARY(Sub, TWIN_NUMBERS, a - b)
TWIN_BINARY(Mul, TWIN_NUMBERS, a * b)
TWIN_BINARY(Div, TWIN_FLOATS, a / b)
TWIN_BINARY(Max, TWIN_NUMBERS, a != a || a > b ? a : b)
TWIN_BINARY(Min, TWIN_NUMBERS, a != a || a < b ? a : b)
TWIN_BINARY(And, TWIN_BITS, a & b)
TWIN_BINARY(Or, TWIN_BITS, a | b)

TWIN_SCALAR(Adds, TWIN_NUMBERS, a + b)
TWIN_SCALAR(Muls, TWIN_NUMBERS, a * b)
TWIN_SCALAR(Maxs, TWIN_NUMBERS, a != a || a > b ? a : b)
TWIN_SCALAR(Mins, TWIN_NUMBERS, a != a || a < b ? a : b)

TWIN_UNARY(Exp, TWIN_FLOATS, std::exp(a))
TWIN_UNARY(Ln, TWIN_FLOATS, std::log(a))
TWIN_UNARY(Sqrt, TWIN_FLOATS, std::sqrt(a))
TWIN_UNARY(Rsqrt, TWIN_FLOATS, 1.0f / std::sqrt(a))
TWIN_UNARY(Reciprocal, TWIN_FLOATS, 1.0f / a)
TWIN_UNARY(Abs, TWIN_FLOATS, std::fabs(a))
TWIN_UNARY(Relu, TWIN_FLOATS, a > 0 ? a : 0 * a)
TWIN_UNARY(Not, TWIN_BITS, ~a)

#undef TWIN_BINARY
#undef TWIN_SCALAR
#undef TWIN_UNARY

// dst += src * scalar, rounded twice: after the product and after the sum.
template <typename T, typename U>
void Axpy(const LocalTensor<T>& dst, const LocalTensor<U>& src, const U& scalar,
          const int32_t& count)
{
    static_assert(twin::one_of<T, TWIN_FLOATS> && twin::one_of<U, TWIN_FLOATS>);
    static_assert(sizeof(T) >= sizeof(U), "Axpy: half += float does not exist");
    twin::Instruction vector(PIPE_V, "Axpy");
    const U* x = vector.in(src, count);
    vector.in(dst, count);
    T* y = vector.out(dst, count);
    vector.check_overlap();
    vector.count_repeats(count * sizeof(T));
    for (int32_t i = 0; i < count; ++i) {
        const T product = twin::narrow<T>(static_cast<float>(x[i]) * static_cast<float>(scalar));
        y[i] = twin::narrow<T>(static_cast<float>(y[i]) + static_cast<float>(product));
    }
}

template <typename T>
void Duplicate(const LocalTensor<T>& dst, const T& scalar, const int32_t& count)
{
    static_assert(sizeof(T) == 2 || sizeof(T) == 4, "Duplicate: elements of 2 or 4 bytes");
    twin::Instruction vector(PIPE_V, "Duplicate");
    std::fill_n(vector.out(dst, count), count, scalar);
    vector.count_repeats(count * sizeof(T));
}

template <typename T, bool isSetMask = true>
void Duplicate(const LocalTensor<T>& dst, const T& scalar, uint64_t mask, const uint8_t repeats,
               const uint16_t block_stride, const uint8_t repeat_stride)
{
    static_assert(sizeof(T) == 2 || sizeof(T) == 4, "Duplicate: elements of 2 or 4 bytes");
    twin::Instruction vector(PIPE_V, "Duplicate", twin::mask_of(isSetMask));
    const twin::Lanes lanes_of = vector.lanes(isSetMask, mask, sizeof(T), repeats);
    const size_t n = twin::block_elements(sizeof(T));
    twin::for_each_block(lanes_of, n, [&](size_t r, size_t b, size_t lanes) {
        std::fill_n(vector.out(dst, (r * repeat_stride + b * block_stride) * n, lanes), lanes,
                    scalar);
    });
    vector.count_repeats(lanes_of.repeats * twin::kRepeat);
}

template <typename T, bool isSetMask = true>
void Copy(const LocalTensor<T>& dst, const LocalTensor<T>& src, const uint64_t mask,
          const uint8_t repeats, const CopyRepeatParams& p)
{
    static_assert(sizeof(T) == 2 || sizeof(T) == 4, "Copy: elements of 2 or 4 bytes");
    twin::Instruction vector(PIPE_V, "Copy", twin::mask_of(isSetMask));
    const twin::Lanes lanes_of = vector.lanes(isSetMask, mask, sizeof(T), repeats);
    const size_t n = twin::block_elements(sizeof(T));
    twin::for_each_block(lanes_of, n, [&](size_t r, size_t b, size_t lanes) {
        const T* x = vector.in(src, (r * p.srcRepeatSize + b * p.srcStride) * n, lanes);
        T* y = vector.out(dst, (r * p.dstRepeatSize + b * p.dstStride) * n, lanes);
        std::memmove(y, x, lanes * sizeof(T));
    });
    vector.count_repeats(lanes_of.repeats * twin::kRepeat);
}

}  // namespace AscendC
