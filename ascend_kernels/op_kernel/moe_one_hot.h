// Which of eight experts each choice of a queue takes, as a matrix of one 32-byte block per choice,
// summed from above. The queue runs down the rows, so that every shift along it is a whole number of
// blocks: the running sums of the queue are plain vector additions.
#ifndef MOE_ONE_HOT_H
#define MOE_ONE_HOT_H

#include "moe_common.h"

namespace moe {
constexpr uint32_t GROUP = 8;  // experts of a matrix: the floats of a block

class OneHot {
public:
    // `choices`: rows of a matrix, a power of two from 64 to 1024; `experts`: a multiple of 8;
    // `groups`: matrices that are summed side by side, so that they share their barriers;
    // `room`: bytes that they take at least.
    __aicore__ inline void Init(
        TPipe& pipe, uint32_t choices, uint32_t experts, uint32_t groups, uint32_t room)
    {
        choices_ = choices;
        experts_ = experts;
        groups_ = groups;
        const uint32_t matrixBytes = choices * BLOCK_BYTES;
        pipe.InitBuffer(spread_, matrixBytes);
        pipe.InitBuffer(bits_, groups * choices);
        pipe.InitBuffer(columns_, groups * choices * sizeof(float));
        pipe.InitBuffer(numbers_, experts * sizeof(float));
        pipe.InitBuffer(ones_, LANES * sizeof(float));
        const uint32_t matricesBytes = 2 * groups * (matrixBytes + matrixBytes / 2);
        pipe.InitBuffer(matrices_, matricesBytes > room ? matricesBytes : room);
        Duplicate(ones_.Get<float>(), 1.0f, static_cast<int32_t>(LANES));
        CreateVecIndex(numbers_.Get<float>(), 0.0f, experts);
        VectorBarrier();
    }

    // The room of the matrices, for whatever comes before Clear.
    __aicore__ inline LocalTensor<float> Room()
    {
        return matrices_.Get<float>();
    }

    // Each matrix is headed by the zero rows that the longest shift reaches back to.
    __aicore__ inline void Clear()
    {
        Duplicate(matrices_.Get<float>(), 0.0f, static_cast<int32_t>(2 * groups_ * Pitch()));
        VectorBarrier();
    }

    // The queue: the expert of every choice; a number outside of all groups is no expert.
    __aicore__ inline void SetQueue(const LocalTensor<float>& experts)
    {
        Brcb(spread_.Get<float>(), experts, static_cast<uint8_t>(choices_ / GROUP),
            {1, REPEAT_BLOCKS});
        VectorBarrier();
    }

    // places[i] += what number choice i is in the queue of its expert (1, 2, ...), if `counts` came
    // before; counts then include the whole queue.
    __aicore__ inline void AddPlaces(
        const LocalTensor<float>& places, const LocalTensor<float>& counts)
    {
        for (uint32_t first = 0; first < experts_; first += groups_ * GROUP) {
            const uint32_t groups = Smaller(groups_, (experts_ - first) / GROUP);
            AddPlacesOf(places, counts[first], first, groups);
        }
    }

private:
    __aicore__ inline void AddPlacesOf(const LocalTensor<float>& places,
        const LocalTensor<float>& counts, uint32_t first, uint32_t groups)
    {
        const int32_t size = static_cast<int32_t>(choices_ * GROUP);
        const int32_t group = static_cast<int32_t>(GROUP);
        uint32_t from = 0;
        Mark(first, groups);
        for (uint32_t g = 0; g < groups; ++g) {
            Add(Matrix(from, g), Matrix(from, g), counts[g * GROUP], group);
        }
        VectorBarrier();
        // Hillis and Steele's scan; the rows before the first are zero
        for (uint32_t shift = 1; shift < choices_; shift *= 2) {
            for (uint32_t g = 0; g < groups; ++g) {
                Add(Matrix(1 - from, g), Matrix(from, g), Before(from, g, shift), size);
            }
            VectorBarrier();
            from = 1 - from;
        }
        for (uint32_t g = 0; g < groups; ++g) {
            Adds(counts[g * GROUP], Matrix(from, g)[(choices_ - 1) * GROUP], 0.0f, group);
            Select(Matrix(1 - from, g), Bits(g), Matrix(from, g), 0.0f,
                SELMODE::VSEL_TENSOR_SCALAR_MODE, static_cast<uint32_t>(size));
        }
        VectorBarrier();
        for (uint32_t g = 0; g < groups; ++g) {
            BlockReduceSum(Column(g), Matrix(1 - from, g), static_cast<int32_t>(choices_ / GROUP),
                static_cast<int32_t>(LANES), 1, 1, REPEAT_BLOCKS);
        }
        VectorBarrier();
        for (uint32_t g = 0; g < groups; ++g) {
            Add(places, places, Column(g), static_cast<int32_t>(choices_));
            VectorBarrier();
        }
    }

    // 1 where the choice takes the expert of the column, 0 elsewhere.
    __aicore__ inline void Mark(uint32_t first, uint32_t groups)
    {
        const uint8_t repeats = static_cast<uint8_t>(choices_ / GROUP);
        for (uint32_t g = 0; g < groups; ++g) {
            // a block of eight expert numbers, read again for every choice
            Compare(Bits(g), spread_.Get<float>(), numbers_.Get<float>()[first + g * GROUP],
                CMPMODE::EQ, static_cast<uint64_t>(LANES), repeats,
                {1, 1, 0, REPEAT_BLOCKS, REPEAT_BLOCKS, 0});
        }
        VectorBarrier();
        for (uint32_t g = 0; g < groups; ++g) {
            Select(Matrix(0, g), Bits(g), ones_.Get<float>(), 0.0f,
                SELMODE::VSEL_TENSOR_SCALAR_MODE, static_cast<uint64_t>(LANES), repeats,
                {1, 1, 1, REPEAT_BLOCKS, 0, REPEAT_BLOCKS});
        }
        VectorBarrier();
    }

    __aicore__ inline uint32_t Pitch() const
    {
        return (choices_ + choices_ / 2) * GROUP;
    }

    __aicore__ inline LocalTensor<float> Matrix(uint32_t which, uint32_t group)
    {
        return Before(which, group, 0);
    }

    // The matrix, seen `rows` rows earlier.
    __aicore__ inline LocalTensor<float> Before(uint32_t which, uint32_t group, uint32_t rows)
    {
        return matrices_.Get<float>()[(2 * group + which) * Pitch() + (choices_ / 2 - rows) * GROUP];
    }

    __aicore__ inline LocalTensor<uint8_t> Bits(uint32_t group)
    {
        return bits_.Get<uint8_t>()[group * choices_];
    }

    __aicore__ inline LocalTensor<float> Column(uint32_t group)
    {
        return columns_.Get<float>()[group * choices_];
    }

    TBuf<TPosition::VECCALC> spread_;    // [choices] blocks: the expert of every choice
    TBuf<TPosition::VECCALC> bits_;      // [groups, choices, 8] bits
    TBuf<TPosition::VECCALC> columns_;   // [groups, choices]
    TBuf<TPosition::VECCALC> numbers_;   // [experts]: 0, 1, 2, ...
    TBuf<TPosition::VECCALC> ones_;
    TBuf<TPosition::VECCALC> matrices_;  // [groups, 2, choices / 2 zero rows + choices, 8]
    uint32_t choices_ = 0;
    uint32_t experts_ = 0;
    uint32_t groups_ = 0;
};
}  // namespace moe

#endif  // MOE_ONE_HOT_H
