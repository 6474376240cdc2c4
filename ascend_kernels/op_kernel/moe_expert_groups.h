// Experts of a token's best groups: groups of neighbouring experts are ranked, and the experts of all
// others struck out, before any expert is chosen (DeepSeek-V2 and V3).
#ifndef MOE_EXPERT_GROUPS_H
#define MOE_EXPERT_GROUPS_H

#include "moe_gating_common.h"

namespace moe {
template <bool IS_EIGHT>
class ExpertGroups {
public:
    // `tokens`: rows of a tile; `width`: floats of a row; `groups`: 2 to 8, of `size` experts each;
    // `chosen`: how many of them are kept; `byTwo`: a group is as good as the sum of its two best
    // experts, else as its best.
    __aicore__ inline void Init(TPipe& pipe, uint32_t tokens, uint32_t width, uint32_t groups,
        uint32_t size, uint32_t chosen, bool byTwo)
    {
        tokens_ = tokens;
        groups_ = groups;
        size_ = size;
        chosen_ = chosen;
        byTwo_ = byTwo;
        columnPitch_ = AlignUp(tokens, LANES);
        pipe.InitBuffer(groupOf_, (IS_EIGHT ? LANES : width) * sizeof(float));
        pipe.InitBuffer(numbers_, LANES * sizeof(float));
        pipe.InitBuffer(columns_, EIGHT * columnPitch_ * sizeof(float));
        pipe.InitBuffer(column_, columnPitch_ * sizeof(float));
        pipe.InitBuffer(rows_, tokens * BLOCK_BYTES);
        pipe.InitBuffer(offsets_, tokens * BLOCK_BYTES);
        pipe.InitBuffer(restricted_, tokens * width * sizeof(float));
    }

    // What is the same for all tiles. `columnNumbers`: of the experts, as NumberColumns makes them;
    // `width`: floats of a row; `real`: scratch of a block per token.
    __aicore__ inline void Prepare(
        const LocalTensor<float>& columnNumbers, uint32_t width, const LocalTensor<float>& real)
    {
        const int32_t count = static_cast<int32_t>(IS_EIGHT ? LANES : width);
        LocalTensor<float> groupOf = groupOf_.Get<float>();
        // floor((column + 0.5) / size): the half keeps the rounding off the integers
        Adds(groupOf, columnNumbers, 0.5f, count);
        VectorBarrier();
        Muls(groupOf, groupOf, 1.0f / static_cast<float>(size_), count);
        VectorBarrier();
        Cast(groupOf, groupOf, RoundMode::CAST_FLOOR, static_cast<uint32_t>(count));
        VectorBarrier();
        NumberColumns<true>(numbers_.Get<float>(), rows_.Get<int32_t>(), EIGHT);
        TransposedIndex(offsets_.Get<int32_t>(), rows_.Get<int32_t>(), real, tokens_ * EIGHT, EIGHT,
            columnPitch_);
        ToByteOffsets(offsets_.Get<int32_t>(), tokens_ * EIGHT);
        // the columns of groups that there are not are never the best
        Duplicate(columns_.Get<float>(), LOWEST, static_cast<int32_t>(EIGHT * columnPitch_));
        VectorBarrier();
    }

    // `values` where the expert is of one of its token's best groups, LOWEST elsewhere.
    __aicore__ inline LocalTensor<float> Restrict(const RowMatrix<IS_EIGHT>& matrix,
        const LocalTensor<float>& values, const PickRoom& room)
    {
        LocalTensor<float> restricted = restricted_.Get<float>();
        const uint32_t tokens = matrix.Rows();
        for (uint32_t group = 0; group < groups_; ++group) {
            Rate(matrix, values, room, group);
        }
        LocalTensor<float> rows = rows_.Get<float>();
        Gather(rows, columns_.Get<float>(), offsets_.Get<uint32_t>(), 0U, tokens * EIGHT);
        Duplicate(restricted, LOWEST, matrix.Size());
        VectorBarrier();
        const RowMatrix<true> groups(tokens, EIGHT);
        PickRoom ofGroups = room;
        ofGroups.numbers = numbers_.Get<float>();
        LocalTensor<float> best = columns_.Get<float>();  // the ratings are in `rows` now
        LocalTensor<float> group = column_.Get<float>();
        for (uint32_t j = 0; j < chosen_; ++j) {
            PickLargest(groups, rows, ofGroups, best, group, NO_GROUP, true);
            matrix.Spread(room.spread, group);
            matrix.ColumnNumberIs(room.bits, groupOf_.Get<float>(), room.spread, CMPMODE::EQ);
            matrix.SelectOr(room.scratch, room.bits, values, LOWEST);
            Max(restricted, restricted, room.scratch, matrix.Size());
            VectorBarrier();
        }
        return restricted;
    }

private:
    // How good a group is for every token, into its column. Only the parts of the rows that the group
    // lies in are looked at.
    __aicore__ inline void Rate(const RowMatrix<IS_EIGHT>& whole, const LocalTensor<float>& values,
        const PickRoom& wholeRoom, uint32_t group)
    {
        const uint32_t first = IS_EIGHT ? 0 : group * size_ / LANES * LANES;
        const RowMatrix<IS_EIGHT> matrix =
            whole.Parts(CeilDiv((group + 1) * size_ - first, LANES));
        const PickRoom room{wholeRoom.scratch[first], wholeRoom.spread, wholeRoom.numbers[first],
            wholeRoom.bits};
        LocalTensor<float> restricted = restricted_.Get<float>()[first];
        LocalTensor<float> rating = columns_.Get<float>()[group * columnPitch_];
        Duplicate(room.spread, static_cast<float>(group),
            static_cast<int32_t>(matrix.Rows() * BLOCK_FLOATS));
        VectorBarrier();
        matrix.ColumnNumberIs(room.bits, groupOf_.Get<float>()[first], room.spread, CMPMODE::EQ);
        matrix.SelectOr(restricted, room.bits, values[first], LOWEST);
        if (!byTwo_) {
            matrix.RowMax(rating, restricted, room.scratch);
            return;
        }
        LocalTensor<float> second = column_.Get<float>();
        PickLargest(matrix, restricted, room, rating, second, NO_GROUP, true);
        matrix.RowMax(second, restricted, room.scratch);
        Add(rating, rating, second, static_cast<int32_t>(matrix.Rows()));
        VectorBarrier();
    }

    static constexpr float NO_GROUP = 1024.0f;  // of no column

    TBuf<TPosition::VECCALC> groupOf_;     // the group of every column of a row
    TBuf<TPosition::VECCALC> numbers_;     // eight rows of 0 to 7
    TBuf<TPosition::VECCALC> columns_;     // [8, tile]: how good each group is
    TBuf<TPosition::VECCALC> column_;      // [tile]
    TBuf<TPosition::VECCALC> rows_;        // [tile, 8]: the same
    TBuf<TPosition::VECCALC> offsets_;     // [tile, 8]: where in [8, tile]
    TBuf<TPosition::VECCALC> restricted_;  // [tile, width]
    uint32_t tokens_ = 0;
    uint32_t groups_ = 0;
    uint32_t size_ = 0;
    uint32_t chosen_ = 0;
    uint32_t columnPitch_ = 0;
    bool byTwo_ = false;
};
}  // namespace moe

#endif  // MOE_EXPERT_GROUPS_H
