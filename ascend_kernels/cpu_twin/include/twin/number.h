// half and bfloat16_t with the rounding of the hardware's Cast instruction.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace AscendC {

// CAST_NONE is for lossless conversions; where one loses bits after all, it rounds as CAST_RINT.
enum class RoundMode {
    CAST_NONE = 0,
    CAST_RINT,   // to nearest, ties to even
    CAST_FLOOR,  // towards minus infinity
    CAST_CEIL,   // towards plus infinity
    CAST_ROUND,  // to nearest, ties away from zero
    CAST_TRUNC,  // towards zero
    CAST_ODD,    // von Neumann: an inexact result gets an odd last bit
};

}  // namespace AscendC

namespace twin {

using AscendC::RoundMode;

// `value` rounded to an integer; the mode's direction counts for the signed value.
inline double round_to_integer(double value, RoundMode mode)
{
    switch (mode) {
        case RoundMode::CAST_FLOOR: return std::floor(value);
        case RoundMode::CAST_CEIL: return std::ceil(value);
        case RoundMode::CAST_ROUND: return std::round(value);
        case RoundMode::CAST_TRUNC: return std::trunc(value);
        case RoundMode::CAST_ODD: {
            const double low = std::trunc(value);
            const bool odd = std::fmod(low, 2.0) != 0.0;
            return value == low || odd ? low : low + std::copysign(1.0, value);
        }
        default: return std::nearbyint(value);  // the default rounding mode is ties to even
    }
}

// A 16-bit binary floating-point format with `Fraction` stored bits of the significand.
template <int Fraction>
struct Format {
    static constexpr int exponent_bits = 15 - Fraction;
    static constexpr int smallest_exponent = 2 - (1 << (exponent_bits - 1));
    static constexpr uint16_t infinity = ((1u << exponent_bits) - 1) << Fraction;

    // The nearest representable value in the direction of `mode`. Overflow follows IEEE 754:
    // infinity, or the largest finite value where the mode points towards zero (the hardware's
    // non-saturating mode, the default on Atlas A2).
    static uint16_t encode(double value, RoundMode mode)
    {
        const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
        if (std::isnan(value)) {
            return sign | infinity | (1u << (Fraction - 1));
        }
        if (std::isinf(value)) {
            return sign | infinity;
        }
        if (value == 0.0) {
            return sign;
        }
        const int exponent = std::max(std::ilogb(value), smallest_exponent);
        const double units = std::ldexp(value, Fraction - exponent);  // exact: a power of two
        const auto count = static_cast<int64_t>(std::fabs(round_to_integer(units, mode)));
        // a count that rounds up to the next binade carries into the exponent by itself
        const int64_t biased = exponent - smallest_exponent;
        const int64_t bits = (biased << Fraction) + count;
        if (bits >= infinity) {
            const bool towards_zero = mode == RoundMode::CAST_TRUNC || mode == RoundMode::CAST_ODD ||
                                      mode == (sign ? RoundMode::CAST_CEIL : RoundMode::CAST_FLOOR);
            return sign | (towards_zero ? infinity - 1 : infinity);
        }
        return sign | static_cast<uint16_t>(bits);
    }

    static float decode(uint16_t bits)
    {
        const int biased = (bits & 0x7fff) >> Fraction;
        const int fraction = bits & ((1 << Fraction) - 1);
        const float sign = bits & 0x8000 ? -1.0f : 1.0f;
        if (biased == (1 << exponent_bits) - 1) {
            return fraction ? std::numeric_limits<float>::quiet_NaN()
                            : sign * std::numeric_limits<float>::infinity();
        }
        const int significand = biased ? fraction | (1 << Fraction) : fraction;
        const int exponent = smallest_exponent + std::max(biased, 1) - 1 - Fraction;
        return sign * std::ldexp(static_cast<float>(significand), exponent);
    }
};

using HalfFormat = Format<10>;
using BFloat16Format = Format<7>;

}  // namespace twin

// IEEE binary16. The device compiler's scalar half converts from and to arithmetic types.
struct half {
    uint16_t bits;

    half() = default;
    half(double value) : bits(twin::HalfFormat::encode(value, twin::RoundMode::CAST_RINT)) {}
    half(float value) : half(static_cast<double>(value)) {}
    half(int value) : half(static_cast<double>(value)) {}
    operator float() const { return twin::HalfFormat::decode(bits); }
};

// The upper half of a float. The device has no scalar arithmetic on it: see ToFloat, ToBfloat16.
struct bfloat16_t {
    uint16_t bits;

    bfloat16_t() = default;
    explicit bfloat16_t(double value)
        : bits(twin::BFloat16Format::encode(value, twin::RoundMode::CAST_RINT))
    {
    }
    explicit operator float() const { return twin::BFloat16Format::decode(bits); }
};

namespace AscendC {

inline float ToFloat(const bfloat16_t& value) { return static_cast<float>(value); }
inline bfloat16_t ToBfloat16(const float& value) { return bfloat16_t(value); }

}  // namespace AscendC
