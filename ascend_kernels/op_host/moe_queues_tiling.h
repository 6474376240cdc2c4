// Tiling of the queues of choices before the experts, see op_kernel/moe_expert_queues.h.
#ifndef MOE_QUEUES_TILING_H
#define MOE_QUEUES_TILING_H

#include <algorithm>

#include "moe_host_common.h"

namespace moe_host {
constexpr uint32_t LARGEST_TILE = 512;
constexpr uint32_t SMALLEST_TILE = 64;
constexpr int64_t MOST_COUNTED = 1 << 24;  // float32 counts exactly up to there

// What the tiling chooses, and what UB it takes.
struct QueuePlan {
    uint32_t queues = 1;
    uint32_t expertsPad = 8;
    uint32_t tile = 0;       // rows at a time
    uint32_t groups = 1;     // one-hot matrices side by side
    uint32_t countRows = 1;  // blocks whose counters are read as one piece, into the matrices

    uint32_t CounterBytes() const
    {
        return queues * expertsPad * sizeof(float);
    }

    // Two a group, each with the zero rows ahead of it.
    uint32_t MatricesBytes() const
    {
        return groups * 3 * tile * BLOCK_BYTES;
    }

    uint32_t UbBytes() const
    {
        const uint32_t all = tile * queues * sizeof(int32_t);
        const uint32_t column = tile * sizeof(int32_t);
        const uint32_t bits = AlignUp(tile / 8, BLOCK_BYTES);
        const uint32_t perExpert = expertsPad * sizeof(float);
        // in | four of run | start, total
        uint32_t bytes = BUFFERS * all + 4 * column + 2 * CounterBytes();
        // experts32, expertsFloat, places, index, numbers, empty, offsetsIn | bits
        bytes += (queues > 1 ? 7 : 6) * column + bits;
        // counts of experts: bits, marks of eight | ones | parts, sums
        bytes += 8 * (bits + column) + LANES * sizeof(float) + expertsPad * BLOCK_BYTES + perExpert;
        // one-hot matrices: spread | bits, column | numbers | ones
        bytes += tile * BLOCK_BYTES + groups * (tile + column) + perExpert + LANES * sizeof(float);
        // the matrices, and what uses their room before them
        const uint32_t room = std::max(countRows * CounterBytes(), 4 * expertsPad * BLOCK_BYTES);
        return bytes + std::max(MatricesBytes(), room);
    }
};

// The largest plan for `share` rows a block that fits `available` beside `more(plan)`; its tile is
// 0 if none does.
template <typename More>
QueuePlan PlanQueues(uint32_t queues, uint32_t experts, uint32_t share, uint32_t blocks,
    uint32_t largest, uint32_t available, More more)
{
    QueuePlan plan;
    plan.queues = queues;
    plan.expertsPad = AlignUp(experts, 8);
    const auto fits = [&] { return plan.UbBytes() + more(plan) <= available; };
    // no tile larger than a block's share needs: what is padding costs as much as choices do
    plan.tile = largest;
    while (plan.tile > SMALLEST_TILE && plan.tile / 2 >= share) {
        plan.tile /= 2;
    }
    while (plan.tile >= SMALLEST_TILE && !fits()) {
        plan.tile /= 2;
    }
    if (plan.tile < SMALLEST_TILE) {
        plan.tile = 0;
        return plan;
    }
    plan.groups = plan.expertsPad > 8 ? 2 : 1;
    if (!fits()) {
        plan.groups = 1;
    }
    // the counters of all blocks lie where the matrices come to lie
    plan.countRows = std::min(blocks, std::max(1U, plan.MatricesBytes() / plan.CounterBytes()));
    return plan;
}

// The sizes of the tables that both operators make.
inline ge::graphStatus CheckQueues(const char* op, const gert::Shape& experts, int64_t expertNum)
{
    if (experts.GetDimNum() != 2 || experts.GetDim(0) < 1 || experts.GetDim(1) < 1 ||
        experts.GetDim(1) > MOST_CHOICES) {
        return Refuse(op, "shapes: expert_idx must be [T, K] with T at least 1 and K from 1 to 8");
    }
    if (experts.GetShapeSize() >= MOST_COUNTED) {
        return Refuse(op, "shapes: T * K %ld: must be below 2^24, where float32 stops counting",
            static_cast<long>(experts.GetShapeSize()));
    }
    if (expertNum < 1 || expertNum > MOST_EXPERTS) {
        return Refuse(op, "expert_num: %ld: from 1 to 256", static_cast<long>(expertNum));
    }
    return ge::GRAPH_SUCCESS;
}
}  // namespace moe_host

#endif  // MOE_QUEUES_TILING_H
