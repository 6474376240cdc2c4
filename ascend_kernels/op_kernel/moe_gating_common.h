// What the gating operator and its gradient share: logits in, softmax, columns in and out.
#ifndef MOE_GATING_COMMON_H
#define MOE_GATING_COMMON_H

#include "moe_row_matrix.h"
#include "moe_transpose.h"

namespace moe {
// Keeps the quotient of scores that are all zero finite (DeepSeek's constant).
constexpr float TINY = 1.0e-20f;

// Logits [rows, experts] of dtype T in UB -> float32 matrix; columns past the experts are LOWEST,
// so that the softmax gives them 0. Rows of `src` start at blocks (EIGHT: without gaps).
template <typename T, bool IS_EIGHT>
__aicore__ inline void ReadLogits(const LocalTensor<float>& dst, const LocalTensor<T>& src,
    uint32_t rows, uint32_t experts, uint32_t width)
{
    if constexpr (IS_EIGHT) {
        const uint32_t count = rows * EIGHT;
        if constexpr (std::is_same<T, float>::value) {
            DataCopy(dst, src, count);
        } else {
            Cast(dst, src, RoundMode::CAST_NONE, count);
        }
    } else {
        const uint32_t blockElements = BLOCK_BYTES / sizeof(T);
        const uint8_t srcStride = static_cast<uint8_t>(CeilDiv(experts, blockElements));
        const uint8_t dstStride = static_cast<uint8_t>(width / BLOCK_FLOATS);
        for (uint32_t at = 0; at < experts; at += LANES) {
            const uint64_t lanes = Smaller(LANES, experts - at);
            if constexpr (std::is_same<T, float>::value) {
                Copy(dst[at], src[at], lanes, static_cast<uint8_t>(rows),
                    {1, 1, dstStride, srcStride});
            } else {
                Cast(dst[at], src[at], RoundMode::CAST_NONE, lanes, static_cast<uint8_t>(rows),
                    {1, 1, dstStride, srcStride});
            }
        }
    }
    VectorBarrier();
}

// The way back: the first `experts` columns of a float32 matrix as dtype T, rows at blocks.
template <typename T, bool IS_EIGHT>
__aicore__ inline void WriteLogits(const LocalTensor<T>& dst, const LocalTensor<float>& src,
    uint32_t rows, uint32_t experts, uint32_t width)
{
    if constexpr (IS_EIGHT) {
        const uint32_t count = rows * EIGHT;
        if constexpr (std::is_same<T, float>::value) {
            DataCopy(dst, src, count);
        } else {
            Cast(dst, src, RoundMode::CAST_RINT, count);
        }
    } else {
        const uint32_t blockElements = BLOCK_BYTES / sizeof(T);
        const uint8_t dstStride = static_cast<uint8_t>(CeilDiv(experts, blockElements));
        const uint8_t srcStride = static_cast<uint8_t>(width / BLOCK_FLOATS);
        for (uint32_t at = 0; at < experts; at += LANES) {
            const uint64_t lanes = Smaller(LANES, experts - at);
            if constexpr (std::is_same<T, float>::value) {
                Copy(dst[at], src[at], lanes, static_cast<uint8_t>(rows),
                    {1, 1, dstStride, srcStride});
            } else {
                Cast(dst[at], src[at], RoundMode::CAST_RINT, lanes, static_cast<uint8_t>(rows),
                    {1, 1, dstStride, srcStride});
            }
        }
    }
    VectorBarrier();
}

// Softmax along the rows, in place and in float32. `spread`: a block per row; `column`: a float per
// row; `scratch`: a matrix.
template <bool IS_EIGHT>
__aicore__ inline void Softmax(const RowMatrix<IS_EIGHT>& matrix, const LocalTensor<float>& values,
    const LocalTensor<float>& scratch, const LocalTensor<float>& column,
    const LocalTensor<float>& spread)
{
    matrix.RowMax(column, values, scratch);
    matrix.Spread(spread, column);
    matrix.SubtractColumn(values, values, spread);
    Exp(values, values, matrix.Size());
    VectorBarrier();
    matrix.RowSum(column, values, scratch);
    matrix.Spread(spread, column);
    matrix.DivideByColumn(values, values, spread);
}

// The logistic function of every element, in place and in float32: 1 / (1 + exp(-x)), which is 0
// where the exponential overflows. `scratch`: a matrix.
template <bool IS_EIGHT>
__aicore__ inline void Sigmoid(const RowMatrix<IS_EIGHT>& matrix, const LocalTensor<float>& values,
    const LocalTensor<float>& scratch)
{
    const int32_t size = matrix.Size();
    Muls(values, values, -1.0f, size);
    Duplicate(scratch, 1.0f, size);
    VectorBarrier();
    Exp(values, values, size);
    VectorBarrier();
    Adds(values, values, 1.0f, size);
    VectorBarrier();
    Div(values, scratch, values, size);
    VectorBarrier();
}

// What a choice among the columns of a matrix needs.
struct PickRoom {
    LocalTensor<float> scratch;   // a matrix
    LocalTensor<float> spread;    // a block per row
    LocalTensor<float> numbers;   // column numbers
    LocalTensor<uint8_t> bits;    // a bit per element
};

// The largest of every row and its column, the lower one among equals; `none` where nothing equals
// the largest, as in a row with a NaN. If `remove`, it is not found again.
template <bool IS_EIGHT>
__aicore__ inline void PickLargest(const RowMatrix<IS_EIGHT>& matrix,
    const LocalTensor<float>& values, const PickRoom& room, const LocalTensor<float>& largest,
    const LocalTensor<float>& column, float none, bool remove)
{
    matrix.RowMax(largest, values, room.scratch);
    matrix.Spread(room.spread, largest);
    matrix.EqualsColumn(room.bits, values, room.spread);
    matrix.SelectColumnNumber(room.scratch, room.bits, room.numbers, none);
    matrix.RowMin(column, room.scratch, room.scratch);
    if (remove) {
        matrix.Spread(room.spread, column);
        matrix.ColumnNumberIs(room.bits, room.numbers, room.spread, CMPMODE::NE);
        matrix.SelectOr(values, room.bits, values, LOWEST);
    }
}

// Column numbers 0, 1, 2, ... for RowMatrix: one row; with EIGHT, eight rows of 0 to 7.
template <bool IS_EIGHT>
__aicore__ inline void NumberColumns(
    const LocalTensor<float>& numbers, const LocalTensor<int32_t>& scratch, uint32_t width)
{
    const int32_t count = static_cast<int32_t>(IS_EIGHT ? LANES : width);
    CreateVecIndex(scratch, 0, static_cast<uint32_t>(count));
    VectorBarrier();
    Cast(numbers, scratch, RoundMode::CAST_NONE, static_cast<uint32_t>(count));
    VectorBarrier();
    if constexpr (IS_EIGHT) {
        // row r counts from 8 r: take off eight times the row number
        for (uint32_t row = 1; row < EIGHT; ++row) {
            Adds(numbers[row * EIGHT], numbers[row * EIGHT], -static_cast<float>(row * EIGHT),
                static_cast<int32_t>(EIGHT));
        }
        VectorBarrier();
    }
}
}  // namespace moe

#endif  // MOE_GATING_COMMON_H
