// Host side of MoeExpertCapacity: definition, inference, tiling.
#include "moe_expert_capacity_tiling.h"
#include "moe_queues_tiling.h"

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

ge::graphStatus Tile(gert::TilingContext* context)
{
    using namespace moe_host;
    const char* op = context->GetNodeName();
    const gert::Shape& experts = context->GetInputShape(0)->GetStorageShape();
    const int64_t expertNum = *context->GetAttrs()->GetInt(EXPERT_NUM);
    const int64_t capacity = *context->GetAttrs()->GetInt(EXPERT_CAPACITY);
    const int64_t priority = *context->GetAttrs()->GetInt(DROP_PRIORITY);
    if (CheckQueues(op, experts, expertNum) != ge::GRAPH_SUCCESS) {
        return ge::GRAPH_FAILED;
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
    // beside the queues: two of rows, tokensOut, scratch | queue per choice: rows, offsetsOut, wide,
    // wideReal
    const auto more = [&](const QueuePlan& plan) {
        const uint32_t all = plan.tile * queues * sizeof(int32_t);
        return (queues > 1 ? 4 + BUFFERS : BUFFERS) * all + plan.tile * sizeof(float) +
            plan.expertsPad * sizeof(int32_t);
    };
    const QueuePlan plan = PlanQueues(queues, static_cast<uint32_t>(expertNum),
        CeilDiv(items, blocks), blocks, LARGEST_TILE, machine.ubBytes, more);
    if (plan.tile == 0) {
        return Refuse(op, "UB: %u bytes do not hold 64 rows of choices", machine.ubBytes);
    }

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
