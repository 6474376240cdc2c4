// Cast: the conversions that Atlas A2 has, each with the rounding modes that it has.
#pragma once

#include "twin/elementwise.h"

namespace twin {

template <typename To, typename From>
constexpr bool cast_exists =
    (std::is_same_v<From, float> && one_of<To, float, half, bfloat16_t, int16_t, int32_t, int64_t>) ||
    (std::is_same_v<From, half> && one_of<To, float, int8_t, uint8_t, int16_t, int32_t>) ||
    (std::is_same_v<From, bfloat16_t> && one_of<To, float, int32_t>) ||
    (std::is_same_v<From, int32_t> && one_of<To, float, int16_t, int64_t>) ||
    (std::is_same_v<From, int64_t> && one_of<To, float, int32_t>) ||
    (std::is_same_v<From, int16_t> && one_of<To, float, half>) ||
    (std::is_same_v<From, uint8_t> && std::is_same_v<To, half>) ||
    (std::is_same_v<From, int8_t> && std::is_same_v<To, half>);

// CAST_NONE where nothing can be lost (and float to half), CAST_ODD for float to half only.
template <typename To, typename From>
bool mode_exists(RoundMode mode)
{
    constexpr bool to_integer = std::is_integral_v<To>, from_integer = std::is_integral_v<From>;
    constexpr bool to_half = std::is_same_v<From, float> && std::is_same_v<To, half>;
    constexpr bool widens = to_integer == from_integer && sizeof(To) > sizeof(From);
    constexpr bool small = from_integer && !to_integer && sizeof(From) < sizeof(int32_t);
    constexpr bool narrows_integer = from_integer && to_integer && sizeof(To) < sizeof(From);
    if (mode == RoundMode::CAST_NONE) {
        return widens || small || narrows_integer || to_half ||
               (std::is_same_v<From, half> && sizeof(To) == 1) ||
               (std::is_same_v<From, int32_t> && std::is_same_v<To, float>);
    }
    if (mode == RoundMode::CAST_ODD) {
        return to_half;
    }
    return !widens && !narrows_integer && !(small && sizeof(From) == 1) &&
           !(std::is_same_v<From, int16_t> && std::is_same_v<To, float>);
}

template <typename To, typename From>
To convert(From value, RoundMode mode)
{
    if constexpr (std::is_integral_v<From> && std::is_integral_v<To>) {
        return static_cast<To>(std::clamp<int64_t>(value, std::numeric_limits<To>::min(),
                                                   std::numeric_limits<To>::max()));
    } else if constexpr (std::is_integral_v<To>) {
        const double wide = static_cast<double>(static_cast<float>(value));
        const double whole = round_to_integer(wide, mode);
        if (std::isnan(whole)) {
            return 0;
        }
        // 2^63 - 1 is no double: compare with the power of two itself
        const double limit = std::ldexp(1.0, 8 * sizeof(To) - (std::is_signed_v<To> ? 1 : 0));
        const double low = std::is_signed_v<To> ? -limit : 0.0;
        if (whole >= limit) {
            return std::numeric_limits<To>::max();
        }
        return whole < low ? std::numeric_limits<To>::min() : static_cast<To>(whole);
    } else {
        double wide;
        if constexpr (std::is_integral_v<From>) {
            wide = static_cast<double>(value);
        } else {
            wide = static_cast<double>(static_cast<float>(value));
        }
        To result;
        if constexpr (std::is_same_v<To, half>) {
            result.bits = HalfFormat::encode(wide, mode);
        } else if constexpr (std::is_same_v<To, bfloat16_t>) {
            result.bits = BFloat16Format::encode(wide, mode);
        } else if constexpr (std::is_same_v<From, float>) {
            result = static_cast<float>(round_to_integer(wide, mode));  // float to whole float
        } else {
            result = static_cast<float>(wide);
        }
        return result;
    }
}

}  // namespace twin

namespace AscendC {

template <typename To, typename From>
void Cast(const LocalTensor<To>& dst, const LocalTensor<From>& src, const RoundMode& mode,
          const uint32_t count)
{
    static_assert(twin::cast_exists<To, From>, "Cast: no such conversion on Atlas A2");
    twin::Instruction vector(PIPE_V, "Cast");
    if (!twin::mode_exists<To, From>(mode)) {
        twin::fail("Cast: RoundMode ", int(mode), " does not exist for this pair of types");
    }
    const From* from = vector.in(src, count);
    To* to = vector.out(dst, count);
    vector.check_overlap();
    vector.count_repeats(count * std::max(sizeof(To), sizeof(From)));
    // a wider or narrower result in the same place is written behind or ahead of what is read
    std::vector<From> source(from, from + count);
    for (uint32_t i = 0; i < count; ++i) {
        to[i] = twin::convert<To, From>(source[i], mode);
    }
}

// In the repeat form the mask counts elements of the wider type; a block of either operand holds as
// many elements as fit in 32 bytes.
template <typename To, typename From, bool isSetMask = true>
void Cast(const LocalTensor<To>& dst, const LocalTensor<From>& src, const RoundMode& mode,
          const uint64_t mask, const uint8_t repeats, const UnaryRepeatParams& p)
{
    static_assert(twin::cast_exists<To, From>, "Cast: no such conversion on Atlas A2");
    twin::Instruction vector(PIPE_V, "Cast", twin::mask_of(isSetMask));
    if (!twin::mode_exists<To, From>(mode)) {
        twin::fail("Cast: RoundMode ", int(mode), " does not exist for this pair of types");
    }
    const twin::Lanes lanes_of =
        vector.lanes(isSetMask, mask, std::max(sizeof(To), sizeof(From)), repeats);
    const size_t to_block = twin::block_elements(sizeof(To));
    const size_t from_block = twin::block_elements(sizeof(From));
    for (size_t r = 0; r < lanes_of.repeats; ++r) {
        std::vector<To> lanes;
        for (size_t b = 0; b * from_block < lanes_of.of(r); ++b) {
            const size_t count = std::min<size_t>(from_block, lanes_of.of(r) - b * from_block);
            const size_t first = (r * p.srcRepStride + b * p.srcBlkStride) * from_block;
            const From* from = vector.in(src, first, count);
            for (size_t i = 0; i < count; ++i) {
                lanes.push_back(twin::convert<To, From>(from[i], mode));
            }
        }
        for (size_t b = 0; b * to_block < lanes.size(); ++b) {
            const size_t count = std::min<size_t>(to_block, lanes.size() - b * to_block);
            const size_t first = (r * p.dstRepStride + b * p.dstBlkStride) * to_block;
            std::copy_n(lanes.begin() + b * to_block, count, vector.out(dst, first, count));
        }
    }
    vector.count_repeats(lanes_of.repeats * twin::kRepeat);
}

}  // namespace AscendC
