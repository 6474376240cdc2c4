// Host side of MoeExpertCapacity: definition, inference, tiling.
#include <algorithm>

#include "moe_expert_capacity_tiling.h"
#include "moe_host_common.h"

namespace {
enum Output { EXPANDED_ROW_IDX, SLOT_SRC, EXPERT_TOKENS };
enum Attribute { EXPERT_NUM, EXPERT_CAPACITY, DROP_PRIORITY };
enum Priority { TOKEN_MAJOR, CHOICE_MAJOR };

ge::graphStatus InferShape(gert::InferShapeContext* context)
{
    const gert::Shape& experts = *context->GetInputShape(0);
    const int64_t expertNum = *context->GetAttrs()->GetInt(EXPERT_NUM);
    const int64_t capacity = *context->GetAttrs()->GetInt(EXPERT_CAPACITY);
    if (experts.GetDimNum() != 2) {
        return moe_host::Refuse(context->GetNodeName(), "shapes: expert_idx must be [T, K]");
    }
    const int64_t sizes[] = {moe_host::Times(experts.GetDim(0), experts.GetDim(1)),
        moe_host::Times(expertNum, capacity), expertNum};
    for (size_t i = 0; i < 3; ++i) {
        gert::Shape& shape = *context->GetOutputShape(i);
        shape.SetDimNum(1);
        shape.SetDim(0, sizes[i]);
    }
    return ge::GRAPH_SUCCESS;
}

ge::graphStatus InferDataType(gert::InferDataTypeContext* context)
{
    context->SetOutputDataType(EXPANDED_ROW_IDX, ge::DT_INT32);
    context->SetOutputDataType(SLOT_SRC, ge::DT_INT32);
    return context->SetOutputDataType(EXPERT_TOKENS, ge::DT_INT32);
}

// What the tiling chooses, and what UB it takes.
struct Plan {
    uint32_t queues = 1;
    uint32_t expertsPad = 8;
    uint32_t tile = 0;       // rows at a time
    uint32_t groups = 1;     // one-hot matrices side by side
    uint32_t countRows = 1;  // blocks whose counters are read as one piece, into the matrices

    uint32_t CounterBytes() const
    {
        return queues * expertsPad * sizeof(float);
    }

    uint32_t UbBytes() const
    {
        using namespace moe_host;
        const uint32_t all = tile * queues * sizeof(int32_t);
        const uint32_t column = tile * sizeof(int32_t);
        const uint32_t matrix = tile * BLOCK_BYTES;
        const uint32_t bits = AlignUp(tile / 8, BLOCK_BYTES);
        const uint32_t perExpert = expertsPad * sizeof(float);
        // inQueue, rowQueue | four of runQueue | start, total | tokensOut
        uint32_t bytes = 2 * BUFFERS * all + 4 * column + 2 * CounterBytes() + perExpert;
        // experts32, expertsFloat, places, scratch, index, numbers, empty | bits
        bytes += 7 * column + bits;
        if (queues > 1) {  // rows, offsetsOut, wide, wideReal | offsetsIn
            bytes += 4 * all + column;
        }
        // counts of experts: bits, marks of eight | ones | parts, sums
        bytes += 8 * (bits + column) + LANES * sizeof(float) + expertsPad * BLOCK_BYTES + perExpert;
        // one-hot matrices: spread | bits, column | numbers | ones | the matrices
        bytes += matrix + groups * (tile + column) + perExpert + LANES * sizeof(float);
        return bytes + std::max(MatricesBytes(), CounterBytes());
    }

    // Two a group, each with the zero rows ahead of it.
    uint32_t MatricesBytes() const
    {
        return groups * 3 * tile * moe_host::BLOCK_BYTES;
    }
};

ge::graphStatus Tile(gert::TilingContext* context)
{
    using namespace moe_host;
    constexpr uint32_t LARGEST_TILE = 512;
    constexpr uint32_t SMALLEST_TILE = 64;
    constexpr int64_t MOST_COUNTED = 1 << 24;  // float32 counts exactly up to there
    const char* op = context->GetNodeName();
    const gert::Shape& experts = context->GetInputShape(0)->GetStorageShape();
    const int64_t expertNum = *context->GetAttrs()->GetInt(EXPERT_NUM);
    const int64_t capacity = *context->GetAttrs()->GetInt(EXPERT_CAPACITY);
    const int64_t priority = *context->GetAttrs()->GetInt(DROP_PRIORITY);
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
    if (capacity < 1 || capacity > MOST_COUNTED || expertNum * capacity >= MOST_ELEMENTS) {
        return Refuse(op, "expert_capacity: %ld: at least 1, at most 2^24, and E * C below 2^31",
            static_cast<long>(capacity));
    }
    if (priority != TOKEN_MAJOR && priority != CHOICE_MAJOR) {
        return Refuse(op, "drop_priority: %ld: 0 (token-major) or 1 (choice-major)",
            static_cast<long>(priority));
    }
    Machine machine;
    if (ReadMachine(context, machine) != ge::GRAPH_SUCCESS) {
        return ge::GRAPH_FAILED;
    }
    // with one choice per token both orders are the same queue
    const uint32_t choices = static_cast<uint32_t>(experts.GetDim(1));
    const uint32_t queues = priority == CHOICE_MAJOR ? choices : 1;
    const uint32_t items = static_cast<uint32_t>(experts.GetShapeSize()) / queues;
    // a block with fewer rows than the smallest tile would wait for the barrier, not work
    const uint32_t blocks = BlocksFor(machine, CeilDiv(items, SMALLEST_TILE));
    Plan plan;
    plan.queues = queues;
    plan.expertsPad = AlignUp(static_cast<uint32_t>(expertNum), 8);
    // no tile larger than a block's share needs: what is padding costs as much as choices do
    plan.tile = LARGEST_TILE;
    while (plan.tile > SMALLEST_TILE && plan.tile / 2 >= CeilDiv(items, blocks)) {
        plan.tile /= 2;
    }
    while (plan.tile > SMALLEST_TILE && plan.UbBytes() > machine.ubBytes) {
        plan.tile /= 2;
    }
    if (plan.UbBytes() > machine.ubBytes) {
        return Refuse(op, "UB: %u bytes are not enough: %u is the least here", machine.ubBytes,
            plan.UbBytes());
    }
    plan.groups = plan.expertsPad > 8 ? 2 : 1;
    if (plan.UbBytes() > machine.ubBytes) {
        plan.groups = 1;
    }
    // the counters of all blocks lie where the matrices come to lie
    plan.countRows =
        std::min(blocks, std::max(1U, plan.MatricesBytes() / plan.CounterBytes()));

    optiling::MoeExpertCapacityTilingData tiling;
    tiling.set_items(items);
    tiling.set_queues(queues);
    tiling.set_experts(static_cast<uint32_t>(expertNum));
    tiling.set_capacity(static_cast<uint32_t>(capacity));
    tiling.set_tile(plan.tile);
    tiling.set_groups(plan.groups);
    tiling.set_countRows(plan.countRows);
    context->SetScheduleMode(1);  // the barrier between blocks needs all of them running
    return Commit(context, tiling, blocks,
        queues > 1 ? MOE_CAPACITY_QUEUE_PER_CHOICE : MOE_CAPACITY_ONE_QUEUE, machine,
        static_cast<size_t>(blocks) * plan.CounterBytes());
}
}  // namespace

namespace ops {
class MoeExpertCapacity : public OpDef {
public:
    explicit MoeExpertCapacity(const char* name) : OpDef(name)
    {
        const std::vector<ge::DataType> int32{ge::DT_INT32};
        const std::vector<ge::Format> layout{ge::FORMAT_ND};
        this->Input("expert_idx").ParamType(REQUIRED).DataType(int32)
            .Format(layout).UnknownShapeFormat(layout);
        this->Output("expanded_row_idx").ParamType(REQUIRED).DataType(int32)
            .Format(layout).UnknownShapeFormat(layout);
        this->Output("slot_src").ParamType(REQUIRED).DataType(int32)
            .Format(layout).UnknownShapeFormat(layout);
        this->Output("expert_tokens_before_capacity").ParamType(REQUIRED).DataType(int32)
            .Format(layout).UnknownShapeFormat(layout);
        this->Attr("expert_num").AttrType(REQUIRED).Int();
        this->Attr("expert_capacity").AttrType(REQUIRED).Int();
        this->Attr("drop_priority").AttrType(OPTIONAL).Int(TOKEN_MAJOR);
        this->SetInferShape(InferShape).SetInferDataType(InferDataType);
        this->AICore().SetTiling(Tile);
        moe_host::AddChips(this->AICore());
    }
};
OP_ADD(MoeExpertCapacity);
}  // namespace ops
