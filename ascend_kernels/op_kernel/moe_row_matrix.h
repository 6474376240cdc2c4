// A matrix of float32 in UB, one row a token, and the operations along its rows.
//
// Two shapes, so that the vector unit is never fed padding where eight experts are the whole row:
//   EIGHT: a row is 8 floats, one 32-byte block; a vector repeat covers 8 rows.
//   WIDE:  a row is 1 to 4 vector repeats of 64 floats; an instruction covers one repeat of all rows.
//
// A column of one value per row is spread by Brcb to one block per row; as an operand it is then
// repeated along the row by a block stride of 0.
#ifndef MOE_ROW_MATRIX_H
#define MOE_ROW_MATRIX_H

#include "moe_common.h"

namespace moe {
constexpr uint32_t EIGHT = 8;
// Less than any logit, and far enough from the end of float32 that a difference stays finite or
// becomes -infinity, never NaN.
constexpr float LOWEST = -3.0e38f;

template <bool IS_EIGHT>
class RowMatrix {
public:
    // `rows`: a multiple of 8, at most 248; `width`: floats of a row, 8 or a multiple of 64.
    __aicore__ inline RowMatrix(uint32_t rows, uint32_t width) : RowMatrix(rows, width, width) {}

    // Some parts of every row, of a matrix whose tensors are handed over from the first of them on.
    __aicore__ inline RowMatrix Parts(uint32_t count) const
    {
        return RowMatrix(rows_, IS_EIGHT ? width_ : count * LANES, rowStride_ * BLOCK_FLOATS);
    }

    // One value per row -> one block per row.
    __aicore__ inline void Spread(
        const LocalTensor<float>& blocks, const LocalTensor<float>& column) const
    {
        Brcb(blocks, column, static_cast<uint8_t>(rows_ / EIGHT), {1, REPEAT_BLOCKS});
        VectorBarrier();
    }

    __aicore__ inline void SubtractColumn(const LocalTensor<float>& dst,
        const LocalTensor<float>& src, const LocalTensor<float>& spread) const
    {
        for (uint32_t part = 0; part < parts_; ++part) {
            Sub(dst[part * LANES], src[part * LANES], spread, static_cast<uint64_t>(LANES), repeats_,
                WithColumn());
        }
        VectorBarrier();
    }

    // dst = src + row, the same row for all; `row`: a row of floats (EIGHT: one block).
    __aicore__ inline void AddRow(const LocalTensor<float>& dst, const LocalTensor<float>& src,
        const LocalTensor<float>& row) const
    {
        const BinaryRepeatParams params{
            1, 1, static_cast<uint8_t>(IS_EIGHT ? 0 : 1), rowStride_, rowStride_, 0};
        for (uint32_t part = 0; part < parts_; ++part) {
            Add(dst[part * LANES], src[part * LANES], row[part * LANES],
                static_cast<uint64_t>(LANES), repeats_, params);
        }
        VectorBarrier();
    }

    __aicore__ inline void DivideByColumn(const LocalTensor<float>& dst,
        const LocalTensor<float>& src, const LocalTensor<float>& spread) const
    {
        for (uint32_t part = 0; part < parts_; ++part) {
            Div(dst[part * LANES], src[part * LANES], spread, static_cast<uint64_t>(LANES), repeats_,
                WithColumn());
        }
        VectorBarrier();
    }

    // A bit per element of the matrix: does it equal its row's value?
    __aicore__ inline void EqualsColumn(const LocalTensor<uint8_t>& bits,
        const LocalTensor<float>& src, const LocalTensor<float>& spread) const
    {
        for (uint32_t part = 0; part < parts_; ++part) {
            Compare(bits[part * PartBits()], src[part * LANES], spread, CMPMODE::EQ,
                static_cast<uint64_t>(LANES), repeats_, WithColumn());
        }
        VectorBarrier();
    }

    // A bit per element: is (or is not) its column number its row's value? `numbers`: 0, 1, 2, ...,
    // one row of them (EIGHT: eight rows, one repeat).
    __aicore__ inline void ColumnNumberIs(const LocalTensor<uint8_t>& bits,
        const LocalTensor<float>& numbers, const LocalTensor<float>& spread, CMPMODE mode) const
    {
        BinaryRepeatParams params = WithColumn();
        params.src0RepStride = 0;
        for (uint32_t part = 0; part < parts_; ++part) {
            Compare(bits[part * PartBits()], numbers[part * LANES], spread, mode,
                static_cast<uint64_t>(LANES), repeats_, params);
        }
        VectorBarrier();
    }

    // dst = src where the bit is set, `other` elsewhere.
    __aicore__ inline void SelectOr(const LocalTensor<float>& dst,
        const LocalTensor<uint8_t>& bits, const LocalTensor<float>& src, float other) const
    {
        SelectWith(dst, bits, src, other, {1, 1, 1, rowStride_, rowStride_, rowStride_});
    }

    // dst = the column's number where the bit is set, `other` elsewhere.
    __aicore__ inline void SelectColumnNumber(const LocalTensor<float>& dst,
        const LocalTensor<uint8_t>& bits, const LocalTensor<float>& numbers, float other) const
    {
        SelectWith(dst, bits, numbers, other, {1, 1, 1, rowStride_, 0, rowStride_});
    }

    // dst = the row's value where the bit is set, `other` elsewhere.
    __aicore__ inline void SelectColumn(const LocalTensor<float>& dst,
        const LocalTensor<uint8_t>& bits, const LocalTensor<float>& spread, float other) const
    {
        const BinaryRepeatParams params{1, ColumnBlockStride(), 1, rowStride_, ColumnRowStride(), 1};
        for (uint32_t part = 0; part < parts_; ++part) {
            Select(dst[part * LANES], bits[part * PartBits()], spread, other,
                SELMODE::VSEL_TENSOR_SCALAR_MODE, static_cast<uint64_t>(LANES), repeats_, params);
        }
        VectorBarrier();
    }

    // Reductions along the rows. `scratch` is a matrix; it may be `src`, which is then destroyed.
    __aicore__ inline void RowMax(const LocalTensor<float>& column, const LocalTensor<float>& src,
        const LocalTensor<float>& scratch) const
    {
        if constexpr (IS_EIGHT) {
            BlockReduceMax(column, src, repeats_, static_cast<int32_t>(LANES), 1, 1, REPEAT_BLOCKS);
        } else {
            const LocalTensor<float> folded = Fold<MaxOf>(src, scratch);
            WholeReduceMax(column, folded, static_cast<int32_t>(LANES), repeats_, 1, 1,
                FoldedStride(), ReduceOrder::ORDER_ONLY_VALUE);
        }
        VectorBarrier();
    }

    __aicore__ inline void RowMin(const LocalTensor<float>& column, const LocalTensor<float>& src,
        const LocalTensor<float>& scratch) const
    {
        if constexpr (IS_EIGHT) {
            BlockReduceMin(column, src, repeats_, static_cast<int32_t>(LANES), 1, 1, REPEAT_BLOCKS);
        } else {
            const LocalTensor<float> folded = Fold<MinOf>(src, scratch);
            WholeReduceMin(column, folded, static_cast<int32_t>(LANES), repeats_, 1, 1,
                FoldedStride(), ReduceOrder::ORDER_ONLY_VALUE);
        }
        VectorBarrier();
    }

    __aicore__ inline void RowSum(const LocalTensor<float>& column, const LocalTensor<float>& src,
        const LocalTensor<float>& scratch) const
    {
        if constexpr (IS_EIGHT) {
            BlockReduceSum(column, src, repeats_, static_cast<int32_t>(LANES), 1, 1, REPEAT_BLOCKS);
        } else {
            const LocalTensor<float> folded = Fold<SumOf>(src, scratch);
            WholeReduceSum(
                column, folded, static_cast<int32_t>(LANES), repeats_, 1, 1, FoldedStride());
        }
        VectorBarrier();
    }

    __aicore__ inline uint32_t Rows() const
    {
        return rows_;
    }

    __aicore__ inline int32_t Size() const
    {
        return static_cast<int32_t>(rows_ * width_);
    }

private:
    // `pitch`: floats from one row to the next.
    __aicore__ inline RowMatrix(uint32_t rows, uint32_t width, uint32_t pitch)
        : rows_(rows), width_(width),
          parts_(IS_EIGHT ? 1 : width / LANES),
          repeats_(static_cast<uint8_t>(IS_EIGHT ? rows / EIGHT : rows)),
          rowStride_(static_cast<uint8_t>(IS_EIGHT ? REPEAT_BLOCKS : pitch / BLOCK_FLOATS))
    {}

    struct MaxOf {
        __aicore__ static inline void Apply(const LocalTensor<float>& dst,
            const LocalTensor<float>& a, const LocalTensor<float>& b, uint8_t repeats,
            const BinaryRepeatParams& params)
        {
            Max(dst, a, b, static_cast<uint64_t>(LANES), repeats, params);
        }
    };
    struct MinOf {
        __aicore__ static inline void Apply(const LocalTensor<float>& dst,
            const LocalTensor<float>& a, const LocalTensor<float>& b, uint8_t repeats,
            const BinaryRepeatParams& params)
        {
            Min(dst, a, b, static_cast<uint64_t>(LANES), repeats, params);
        }
    };
    struct SumOf {
        __aicore__ static inline void Apply(const LocalTensor<float>& dst,
            const LocalTensor<float>& a, const LocalTensor<float>& b, uint8_t repeats,
            const BinaryRepeatParams& params)
        {
            Add(dst, a, b, static_cast<uint64_t>(LANES), repeats, params);
        }
    };

    // Combines the parts of every row into the first part of `scratch`.
    template <typename OP>
    __aicore__ inline LocalTensor<float> Fold(
        const LocalTensor<float>& src, const LocalTensor<float>& scratch) const
    {
        if (parts_ == 1) {
            return src;
        }
        const BinaryRepeatParams params{1, 1, 1, rowStride_, rowStride_, rowStride_};
        OP::Apply(scratch, src, src[LANES], repeats_, params);
        VectorBarrier();
        for (uint32_t part = 2; part < parts_; ++part) {
            OP::Apply(scratch, scratch, src[part * LANES], repeats_, params);
            VectorBarrier();
        }
        return scratch;
    }

    __aicore__ inline void SelectWith(const LocalTensor<float>& dst,
        const LocalTensor<uint8_t>& bits, const LocalTensor<float>& src, float other,
        const BinaryRepeatParams& params) const
    {
        for (uint32_t part = 0; part < parts_; ++part) {
            Select(dst[part * LANES], bits[part * PartBits()], src[part * LANES], other,
                SELMODE::VSEL_TENSOR_SCALAR_MODE, static_cast<uint64_t>(LANES), repeats_, params);
        }
        VectorBarrier();
    }

    // matrix (op) spread column -> matrix
    __aicore__ inline BinaryRepeatParams WithColumn() const
    {
        return {1, 1, ColumnBlockStride(), rowStride_, rowStride_, ColumnRowStride()};
    }

    __aicore__ inline uint8_t ColumnBlockStride() const
    {
        return IS_EIGHT ? 1 : 0;
    }

    __aicore__ inline uint8_t ColumnRowStride() const
    {
        return IS_EIGHT ? REPEAT_BLOCKS : 1;
    }

    __aicore__ inline int32_t FoldedStride() const
    {
        return rowStride_;
    }

    // Bytes of mask bits of one part: eight for each repeat.
    __aicore__ inline uint32_t PartBits() const
    {
        return repeats_ * EIGHT;
    }

    uint32_t rows_;
    uint32_t width_;
    uint32_t parts_;
    uint8_t repeats_;
    uint8_t rowStride_;
};
}  // namespace moe

#endif  // MOE_ROW_MATRIX_H
