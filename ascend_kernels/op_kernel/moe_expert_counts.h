// How many choices of a queue take each expert, by whole vectors: no scalar ever reads a choice.
#ifndef MOE_EXPERT_COUNTS_H
#define MOE_EXPERT_COUNTS_H

#include "moe_common.h"

namespace moe {
// Marks and counts the choices of a tile, eight experts between two barriers.
class ExpertCounts {
public:
    static constexpr uint32_t AT_ONCE = 8;

    // `choices`: of a tile, a multiple of 64, at most 512; `experts`: a multiple of 8.
    __aicore__ inline void Init(TPipe& pipe, uint32_t choices, uint32_t experts)
    {
        choices_ = choices;
        experts_ = experts;
        bitsPitch_ = AlignUp(choices / 8, BLOCK_BYTES);
        pipe.InitBuffer(bits_, AT_ONCE * bitsPitch_);
        pipe.InitBuffer(ones_, LANES * sizeof(float));
        pipe.InitBuffer(marks_, AT_ONCE * choices * sizeof(float));
        pipe.InitBuffer(parts_, experts * BLOCK_BYTES);
        pipe.InitBuffer(sums_, experts * sizeof(float));
        Duplicate(ones_.Get<float>(), 1.0f, static_cast<int32_t>(LANES));
        // a repeat of a tile fills one part of eight; those that a small tile has not stay zero
        Duplicate(parts_.Get<float>(), 0.0f, static_cast<int32_t>(experts * BLOCK_FLOATS));
        VectorBarrier();
    }

    // counts[0..experts) += choices of each expert; `chosen`: the expert of every choice.
    __aicore__ inline void Add(const LocalTensor<float>& counts, const LocalTensor<float>& chosen)
    {
        const uint8_t repeats = static_cast<uint8_t>(choices_ / LANES);
        LocalTensor<float> marks = marks_.Get<float>();
        LocalTensor<float> parts = parts_.Get<float>();
        for (uint32_t first = 0; first < experts_; first += AT_ONCE) {
            Mark(chosen, first, AT_ONCE);
            for (uint32_t i = 0; i < AT_ONCE; ++i) {
                Select(marks[i * choices_], Bits(i), ones_.Get<float>(), 0.0f,
                    SELMODE::VSEL_TENSOR_SCALAR_MODE, static_cast<uint64_t>(LANES), repeats,
                    {1, 1, 1, REPEAT_BLOCKS, 0, REPEAT_BLOCKS});
            }
            VectorBarrier();
            for (uint32_t i = 0; i < AT_ONCE; ++i) {
                WholeReduceSum(parts[(first + i) * BLOCK_FLOATS], marks[i * choices_],
                    static_cast<int32_t>(LANES), repeats, 1, 1, REPEAT_BLOCKS);
            }
            VectorBarrier();
        }
        LocalTensor<float> sums = sums_.Get<float>();
        BlockReduceSum(sums, parts, static_cast<int32_t>(experts_ / BLOCK_FLOATS),
            static_cast<int32_t>(LANES), 1, 1, REPEAT_BLOCKS);
        VectorBarrier();
        AscendC::Add(counts, counts, sums, static_cast<int32_t>(experts_));
        VectorBarrier();
    }

    // Sets a bit per choice for each of `count` experts from `first` on, at most eight.
    __aicore__ inline void Mark(const LocalTensor<float>& chosen, uint32_t first, uint32_t count)
    {
        for (uint32_t i = 0; i < count; ++i) {
            CompareScalar(Bits(i), chosen, static_cast<float>(first + i), CMPMODE::EQ, choices_);
        }
        VectorBarrier();
    }

    // The bits of the `i`-th expert that was marked last.
    __aicore__ inline LocalTensor<uint8_t> Bits(uint32_t i)
    {
        return bits_.Get<uint8_t>()[i * bitsPitch_];
    }

private:
    TBuf<TPosition::VECCALC> bits_;   // [8, choices] bits
    TBuf<TPosition::VECCALC> ones_;
    TBuf<TPosition::VECCALC> marks_;  // [8, choices]: 1 where the choice takes the expert
    TBuf<TPosition::VECCALC> parts_;  // [experts] blocks: sums of the repeats of a tile
    TBuf<TPosition::VECCALC> sums_;   // [experts]
    uint32_t choices_ = 0;
    uint32_t experts_ = 0;
    uint32_t bitsPitch_ = 0;
};
}  // namespace moe

#endif  // MOE_EXPERT_COUNTS_H
