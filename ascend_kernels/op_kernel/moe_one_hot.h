// Which of eight experts each choice of a queue takes, as a matrix of one 32-byte block per choice;
// counted, or summed from above. The queue runs down the rows, so that every shift along it is a
// whole number of blocks: the running sums of the queue are plain vector additions.
#ifndef MOE_ONE_HOT_H
#define MOE_ONE_HOT_H

#include "moe_common.h"

namespace moe {
constexpr uint32_t GROUP = 8;  // experts of a matrix: the floats of a block

class OneHot {
public:
    // `choices`: rows of a matrix, a power of two from 64 to 1024.
    __aicore__ inline void Init(TPipe& pipe, uint32_t choices)
    {
        choices_ = choices;
        const uint32_t matrixBytes = choices * BLOCK_BYTES;
        pipe.InitBuffer(spread_, matrixBytes);
        pipe.InitBuffer(bits_, choices);
        pipe.InitBuffer(numbers_, LANES * sizeof(float));
        pipe.InitBuffer(shifted_, LANES * sizeof(float));
        pipe.InitBuffer(ones_, LANES * sizeof(float));
        // each half is headed by the zero rows that the longest shift reaches back to
        pipe.InitBuffer(matrices_, 2 * (matrixBytes + matrixBytes / 2));
        Duplicate(matrices_.Get<float>(), 0.0f, static_cast<int32_t>(2 * Pitch()));
        Duplicate(ones_.Get<float>(), 1.0f, static_cast<int32_t>(LANES));
        CreateVecIndex(shifted_.Get<int32_t>(), 0, LANES);
        VectorBarrier();
        Cast(numbers_.Get<float>(), shifted_.Get<int32_t>(), RoundMode::CAST_NONE, LANES);
        VectorBarrier();
        for (uint32_t row = 1; row < LANES / GROUP; ++row) {
            LocalTensor<float> part = numbers_.Get<float>()[row * GROUP];
            Adds(part, part, -static_cast<float>(row * GROUP), static_cast<int32_t>(GROUP));
        }
        VectorBarrier();
    }

    // The queue: the expert of every choice; a number outside of all groups is no expert.
    __aicore__ inline void SetQueue(const LocalTensor<float>& experts)
    {
        Brcb(spread_.Get<float>(), experts, static_cast<uint8_t>(choices_ / GROUP),
            {1, REPEAT_BLOCKS});
        VectorBarrier();
    }

    // counts[0..8) += choices of the experts [first, first + 8).
    __aicore__ inline void AddCounts(const LocalTensor<float>& counts, uint32_t first)
    {
        LocalTensor<float> matrix = Matrix(0);
        Mark(matrix, first);
        for (uint32_t rows = choices_ / 2; rows > 0; rows /= 2) {
            Add(matrix, matrix, matrix[rows * GROUP], static_cast<int32_t>(rows * GROUP));
            VectorBarrier();
        }
        Add(counts, counts, matrix, static_cast<int32_t>(GROUP));
        VectorBarrier();
    }

    // places[i] += what number choice i is in the queue of its expert (1, 2, ...), for the experts
    // [first, first + 8), if `counts` came before; counts then include the whole queue.
    __aicore__ inline void AddPlaces(const LocalTensor<float>& places,
        const LocalTensor<float>& counts, const LocalTensor<float>& scratch, uint32_t first)
    {
        const int32_t size = static_cast<int32_t>(choices_ * GROUP);
        uint32_t from = 0;
        Mark(Matrix(from), first);
        Add(Matrix(from), Matrix(from), counts, static_cast<int32_t>(GROUP));
        VectorBarrier();
        // Hillis and Steele's scan; the rows before the first are zero
        for (uint32_t shift = 1; shift < choices_; shift *= 2) {
            Add(Matrix(1 - from), Matrix(from), Before(from, shift), size);
            VectorBarrier();
            from = 1 - from;
        }
        Adds(counts, Matrix(from)[(choices_ - 1) * GROUP], 0.0f, static_cast<int32_t>(GROUP));
        LocalTensor<float> own = Matrix(1 - from);
        Select(own, bits_.Get<uint8_t>(), Matrix(from), 0.0f, SELMODE::VSEL_TENSOR_SCALAR_MODE,
            static_cast<uint32_t>(size));
        VectorBarrier();
        BlockReduceSum(scratch, own, static_cast<int32_t>(choices_ / GROUP),
            static_cast<int32_t>(LANES), 1, 1, REPEAT_BLOCKS);
        VectorBarrier();
        Add(places, places, scratch, static_cast<int32_t>(choices_));
        VectorBarrier();
    }

private:
    // 1 where the choice takes the expert of the column, 0 elsewhere.
    __aicore__ inline void Mark(const LocalTensor<float>& matrix, uint32_t first)
    {
        const uint8_t repeats = static_cast<uint8_t>(choices_ / GROUP);
        LocalTensor<float> shifted = shifted_.Get<float>();
        LocalTensor<uint8_t> bits = bits_.Get<uint8_t>();
        Adds(shifted, numbers_.Get<float>(), static_cast<float>(first), static_cast<int32_t>(LANES));
        VectorBarrier();
        Compare(bits, spread_.Get<float>(), shifted, CMPMODE::EQ, static_cast<uint64_t>(LANES),
            repeats, {1, 1, 1, REPEAT_BLOCKS, REPEAT_BLOCKS, 0});
        VectorBarrier();
        Select(matrix, bits, ones_.Get<float>(), 0.0f, SELMODE::VSEL_TENSOR_SCALAR_MODE,
            static_cast<uint64_t>(LANES), repeats, {1, 1, 1, REPEAT_BLOCKS, 0, REPEAT_BLOCKS});
        VectorBarrier();
    }

    __aicore__ inline uint32_t Pitch() const
    {
        return (choices_ + choices_ / 2) * GROUP;
    }

    __aicore__ inline LocalTensor<float> Matrix(uint32_t which)
    {
        return Before(which, 0);
    }

    // The matrix, seen `rows` rows earlier.
    __aicore__ inline LocalTensor<float> Before(uint32_t which, uint32_t rows)
    {
        return matrices_.Get<float>()[which * Pitch() + (choices_ / 2 - rows) * GROUP];
    }

    TBuf<TPosition::VECCALC> spread_;    // [choices] blocks: the expert of every choice
    TBuf<TPosition::VECCALC> bits_;      // [choices, 8] bits
    TBuf<TPosition::VECCALC> numbers_;   // eight times 0 to 7
    TBuf<TPosition::VECCALC> shifted_;   // the same for the group at hand
    TBuf<TPosition::VECCALC> ones_;
    TBuf<TPosition::VECCALC> matrices_;  // two of [choices / 2 zero rows + choices, 8]
    uint32_t choices_ = 0;
};
}  // namespace moe

#endif  // MOE_ONE_HOT_H
