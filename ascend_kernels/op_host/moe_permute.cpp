// Host side of MoePermute: definition, inference, tiling.
#include "moe_permute_tiling.h"
#include "moe_queues_tiling.h"

namespace {
enum Input { EXPERT_IDX, X };
enum Output { EXPANDED_ROW_IDX, SLOT_SRC, EXPERT_TOKENS_COUNT, EXPERT_TOKENS_CUMSUM, EXPANDED_X };
enum Attribute { EXPERT_NUM };

ge::graphStatus InferShape(gert::InferShapeContext* context)
{
    const gert::Shape& experts = *context->GetInputShape(EXPERT_IDX);
    const gert::Shape* x = context->GetOptionalInputShape(X);
    const int64_t expertNum = *context->GetAttrs()->GetInt(EXPERT_NUM);
    if (experts.GetDimNum() != 2 || (x != nullptr && x->GetDimNum() != 2)) {
        return moe_host::Refuse(
            context->GetNodeName(), "shapes: expert_idx must be [T, K], x [T, H]");
    }
    const int64_t choices = moe_host::Times(experts.GetDim(0), experts.GetDim(1));
    const int64_t sizes[] = {choices, choices, expertNum, expertNum};
    for (size_t i = EXPANDED_ROW_IDX; i <= EXPERT_TOKENS_CUMSUM; ++i) {
        gert::Shape& shape = *context->GetOutputShape(i);
        shape.SetDimNum(1);
        shape.SetDim(0, sizes[i]);
    }
    // one element where there are no rows: not every framework passes an empty tensor on
    gert::Shape& rows = *context->GetOutputShape(EXPANDED_X);
    rows.SetDimNum(2);
    rows.SetDim(0, x != nullptr ? choices : 1);
    rows.SetDim(1, x != nullptr ? x->GetDim(1) : 1);
    return ge::GRAPH_SUCCESS;
}

ge::graphStatus InferDataType(gert::InferDataTypeContext* context)
{
    for (size_t i = EXPANDED_ROW_IDX; i <= EXPERT_TOKENS_CUMSUM; ++i) {
        context->SetOutputDataType(i, ge::DT_INT32);
    }
    const ge::DataType rows = context->GetOptionalInputDataType(X);
    return context->SetOutputDataType(EXPANDED_X, rows == ge::DT_UNDEFINED ? ge::DT_FLOAT : rows);
}

ge::graphStatus Tile(gert::TilingContext* context)
{
    using namespace moe_host;
    constexpr uint32_t MOST_BUFFER = 64 * 1024;
    constexpr uint32_t MOST_ZEROS = 16 * 1024;
    const char* op = context->GetNodeName();
    const gert::Shape& experts = context->GetInputShape(EXPERT_IDX)->GetStorageShape();
    const gert::StorageShape* x = context->GetOptionalInputShape(X);
    const int64_t expertNum = *context->GetAttrs()->GetInt(EXPERT_NUM);
    if (CheckQueues(op, experts, expertNum) != ge::GRAPH_SUCCESS) {
        return ge::GRAPH_FAILED;
    }
    int64_t hidden = 0;
    int32_t dtype = 0;
    if (x != nullptr) {
        const gert::Shape& rows = x->GetStorageShape();
        dtype = DtypeNumber(context->GetOptionalInputDesc(X)->GetDataType());
        if (rows.GetDimNum() != 2 || rows.GetDim(0) != experts.GetDim(0) || rows.GetDim(1) < 1 ||
            rows.GetDim(1) >= MOST_ELEMENTS / 8) {
            return Refuse(op, "shapes: x must be [%ld, H] as expert_idx is, with 8 * H below 2^31",
                static_cast<long>(experts.GetDim(0)));
        }
        if (dtype < 0) {
            return Refuse(op, "dtype: x must be float32, float16 or bfloat16");
        }
        hidden = rows.GetDim(1);
    }
    Machine machine;
    if (ReadMachine(context, machine) != ge::GRAPH_SUCCESS) {
        return ge::GRAPH_FAILED;
    }
    const uint32_t tokens = static_cast<uint32_t>(experts.GetDim(0));
    const uint32_t k = static_cast<uint32_t>(experts.GetDim(1));
    // rows are worth a block for every token; tables alone are not, see MoeExpertCapacity
    const uint32_t blocks =
        BlocksFor(machine, x != nullptr ? tokens : std::min(tokens, CeilDiv(tokens * k, SMALLEST_TILE)));
    // UB of a block: with rows a 64th for their places, an 8th for zeros, a 16th at least for each of
    // two buffers of rows; beside the queues two of places, ends, counts, cumulative sums
    const uint32_t tableBytes = x != nullptr ? AlignDown(machine.ubBytes / 64, BLOCK_BYTES) : 0;
    const uint32_t zeroBytes = x != nullptr
        ? std::min(MOST_ZEROS, AlignDown(machine.ubBytes / 8, BLOCK_BYTES)) : BLOCK_BYTES;
    const uint32_t leastBuffer = x != nullptr ? AlignDown(machine.ubBytes / 16, BLOCK_BYTES) : 0;
    const auto beside = [&](const QueuePlan& plan) {
        return BUFFERS * plan.tile * static_cast<uint32_t>(sizeof(int32_t)) +
            3 * plan.expertsPad * static_cast<uint32_t>(sizeof(int32_t)) + tableBytes + zeroBytes;
    };
    const QueuePlan plan = PlanQueues(1, static_cast<uint32_t>(expertNum),
        CeilDiv(tokens, blocks) * k, blocks, x != nullptr ? LARGEST_TILE / 2 : LARGEST_TILE,
        machine.ubBytes,
        [&](const QueuePlan& plan) { return beside(plan) + BUFFERS * leastBuffer; });
    if (plan.tile == 0) {
        return Refuse(op, "UB: %u bytes do not hold 64 choices", machine.ubBytes);
    }
    const uint32_t left = machine.ubBytes - plan.UbBytes() - beside(plan);

    optiling::MoePermuteTilingData tiling;
    tiling.set_tokens(tokens);
    tiling.set_k(k);
    tiling.set_slots(tokens * k);
    tiling.set_experts(static_cast<uint32_t>(expertNum));
    tiling.set_tile(plan.tile);
    tiling.set_groups(plan.groups);
    tiling.set_countRows(plan.countRows);
    tiling.set_rowBytes(static_cast<uint32_t>(hidden) * DtypeBytes(dtype));
    tiling.set_tableSize(tableBytes / sizeof(int32_t));
    tiling.set_bufferBytes(std::min(MOST_BUFFER, AlignDown(left / BUFFERS, BLOCK_BYTES)));
    tiling.set_zeroBytes(zeroBytes);
    context->SetScheduleMode(1);  // the barrier between blocks needs all of them running
    return Commit(context, tiling, blocks, x != nullptr ? MOE_PERMUTE_ROWS : MOE_PERMUTE_TABLES,
        machine, static_cast<size_t>(blocks) * plan.CounterBytes());
}
}  // namespace

namespace ops {
class MoePermute : public OpDef {
public:
    explicit MoePermute(const char* name) : OpDef(name)
    {
        using namespace moe_host;
        this->Input("expert_idx").ParamType(REQUIRED).DataType(Always(ge::DT_INT32))
            .Format(AnyLayout()).UnknownShapeFormat(AnyLayout());
        this->Input("x").ParamType(OPTIONAL).DataType(RowTypes())
            .Format(AnyLayout()).UnknownShapeFormat(AnyLayout());
        this->Output("expanded_row_idx").ParamType(REQUIRED).DataType(Always(ge::DT_INT32))
            .Format(AnyLayout()).UnknownShapeFormat(AnyLayout());
        this->Output("slot_src").ParamType(REQUIRED).DataType(Always(ge::DT_INT32))
            .Format(AnyLayout()).UnknownShapeFormat(AnyLayout());
        this->Output("expert_tokens_count").ParamType(REQUIRED).DataType(Always(ge::DT_INT32))
            .Format(AnyLayout()).UnknownShapeFormat(AnyLayout());
        this->Output("expert_tokens_cumsum").ParamType(REQUIRED).DataType(Always(ge::DT_INT32))
            .Format(AnyLayout()).UnknownShapeFormat(AnyLayout());
        this->Output("expanded_x").ParamType(REQUIRED).DataType(RowTypes())
            .Format(AnyLayout()).UnknownShapeFormat(AnyLayout());
        this->Attr("expert_num").AttrType(REQUIRED).Int();
        this->SetInferShape(InferShape).SetInferDataType(InferDataType);
        this->AICore().SetTiling(Tile);
        AddChips(this->AICore());
    }
};
OP_ADD(MoePermute);
}  // namespace ops
