// Host side of MoeGatingTopK: definition, inference, tiling.
#include "moe_gating_tiling.h"
#include "moe_gating_top_k_tiling.h"

namespace {
enum Input { X, BIAS, FINISHED };
enum Output { Y, EXPERT_IDX, ROW_IDX, SOFTMAX_OUT };
enum Attribute {
    K,
    RENORM,
    NORM_TYPE,
    GROUP_COUNT,
    K_GROUP,
    GROUP_SELECT_MODE,
    ROUTED_SCALING_FACTOR,
    OUT_FLAG
};
enum GroupSelectMode { BEST, TWO_BEST };

ge::graphStatus InferShape(gert::InferShapeContext* context)
{
    const gert::Shape& x = *context->GetInputShape(X);
    if (x.GetDimNum() != 2) {
        return moe_host::Refuse(context->GetNodeName(), "shapes: x must be [T, E]");
    }
    const int64_t k = *context->GetAttrs()->GetInt(K);
    for (size_t i = Y; i <= SOFTMAX_OUT; ++i) {
        gert::Shape& shape = *context->GetOutputShape(i);
        shape.SetDimNum(2);
        shape.SetDim(0, x.GetDim(0));
        shape.SetDim(1, i == SOFTMAX_OUT ? x.GetDim(1) : k);
    }
    if (!*context->GetAttrs()->GetBool(OUT_FLAG)) {
        // one element: not every framework passes an empty tensor on
        context->GetOutputShape(SOFTMAX_OUT)->SetDim(0, 1);
        context->GetOutputShape(SOFTMAX_OUT)->SetDim(1, 1);
    }
    return ge::GRAPH_SUCCESS;
}

ge::graphStatus InferDataType(gert::InferDataTypeContext* context)
{
    context->SetOutputDataType(Y, ge::DT_FLOAT);
    context->SetOutputDataType(EXPERT_IDX, ge::DT_INT32);
    context->SetOutputDataType(ROW_IDX, ge::DT_INT32);
    return context->SetOutputDataType(SOFTMAX_OUT, ge::DT_FLOAT);
}

// Groups of neighbouring experts.
struct Groups {
    int64_t count = 1;
    int64_t chosen = 1;
    int64_t mode = BEST;
};

ge::graphStatus CheckGroups(
    const char* op, const moe_host::GatingSizes& sizes, const Groups& groups)
{
    using namespace moe_host;
    if (groups.mode != BEST && groups.mode != TWO_BEST) {
        return Refuse(op, "group_select_mode: %ld: 0 (the best expert) or 1 (the two best)",
            static_cast<long>(groups.mode));
    }
    if (groups.count < 1 || groups.count > EIGHT || sizes.experts % groups.count != 0 ||
        (groups.count > 1 && sizes.experts / groups.count < groups.mode + 1)) {
        return Refuse(op, "group_count: %ld: from 1 to 8 equal groups of the %ld experts%s",
            static_cast<long>(groups.count), static_cast<long>(sizes.experts),
            groups.mode == TWO_BEST ? ", of two at least" : "");
    }
    if (groups.chosen < 1 || groups.chosen > groups.count ||
        groups.chosen * (sizes.experts / groups.count) < sizes.k) {
        return Refuse(op, "k_group: %ld: of the %ld groups as many as have %ld experts",
            static_cast<long>(groups.chosen), static_cast<long>(groups.count),
            static_cast<long>(sizes.k));
    }
    return ge::GRAPH_SUCCESS;
}

ge::graphStatus Tile(gert::TilingContext* context)
{
    using namespace moe_host;
    const char* op = context->GetNodeName();
    const gert::Shape& x = context->GetInputShape(X)->GetStorageShape();
    const gert::StorageShape* bias = context->GetOptionalInputShape(BIAS);
    const gert::StorageShape* finished = context->GetOptionalInputShape(FINISHED);
    if (x.GetDimNum() != 2) {
        return Refuse(op, "shapes: x must be [T, E]");
    }
    if (bias != nullptr && bias->GetStorageShape().GetShapeSize() != x.GetDim(1)) {
        return Refuse(op, "shapes: bias has %ld entries, x %ld columns: one each",
            static_cast<long>(bias->GetStorageShape().GetShapeSize()),
            static_cast<long>(x.GetDim(1)));
    }
    if (finished != nullptr && finished->GetStorageShape().GetShapeSize() != x.GetDim(0)) {
        return Refuse(op, "shapes: finished has %ld entries, x %ld rows: one each",
            static_cast<long>(finished->GetStorageShape().GetShapeSize()),
            static_cast<long>(x.GetDim(0)));
    }
    const GatingSizes sizes{x.GetDim(0), x.GetDim(1), *context->GetAttrs()->GetInt(K),
        DtypeNumber(context->GetInputDesc(X)->GetDataType())};
    const gert::RuntimeAttrs& attrs = *context->GetAttrs();
    const GatingRules rules{*attrs.GetBool(RENORM), *attrs.GetInt(NORM_TYPE),
        *attrs.GetFloat(ROUTED_SCALING_FACTOR)};
    const Groups groups{
        *attrs.GetInt(GROUP_COUNT), *attrs.GetInt(K_GROUP), *attrs.GetInt(GROUP_SELECT_MODE)};
    const bool writesScores = *attrs.GetBool(OUT_FLAG);
    Machine machine;
    if (CheckGating(op, sizes) != ge::GRAPH_SUCCESS || CheckRules(op, rules) != ge::GRAPH_SUCCESS ||
        CheckGroups(op, sizes, groups) != ge::GRAPH_SUCCESS ||
        ReadMachine(context, machine) != ge::GRAPH_SUCCESS) {
        return ge::GRAPH_FAILED;
    }
    const bool hasFinished = finished != nullptr;
    const uint32_t k = static_cast<uint32_t>(sizes.k);
    const auto ubBytes = [&](uint32_t tile) {
        const GatingBytes b(sizes, tile);
        // queues: x, softmax | with one buffer: y, experts, rows
        uint32_t bytes = BUFFERS * (b.logits + (writesScores ? b.matrix : 0)) + 3 * b.chosen;
        // probs, scratch | spread | bits | numbers | column, values, chosen | gathered, offsets,
        // rowPattern
        bytes += 2 * b.matrix + b.spread + b.bits + b.numbers + (1 + 2 * k) * b.column + 3 * b.chosen;
        if (bias != nullptr) {  // its row, and scores and bias
            bytes += RowWidth(sizes) * sizeof(float) + b.matrix;
        }
        if (groups.count > 1) {  // groupOf, numbers | columns, column | rows, offsets | restricted
            bytes += b.numbers + LANES * sizeof(float) + (EIGHT + 1) * b.column + 2 * b.spread +
                b.matrix;
        }
        if (hasFinished) {  // its queue, as float16 and as float32
            bytes += BUFFERS * AlignUp(tile, BLOCK_BYTES) + b.column / 2 + b.column;
        }
        return bytes;
    };
    optiling::MoeGatingTopKTilingData tiling;
    tiling.set_hasFinished(hasFinished ? 1 : 0);
    tiling.set_hasBias(bias != nullptr ? 1 : 0);
    tiling.set_outFlag(writesScores ? 1 : 0);
    tiling.set_groupCount(static_cast<uint32_t>(groups.count));
    tiling.set_kGroup(static_cast<uint32_t>(groups.chosen));
    tiling.set_groupSelectMode(static_cast<uint32_t>(groups.mode));
    return CommitGating(context, tiling, sizes, LargestTile(sizes, machine.ubBytes, ubBytes),
        rules, machine);
}
}  // namespace

namespace ops {
class MoeGatingTopK : public OpDef {
public:
    explicit MoeGatingTopK(const char* name) : OpDef(name)
    {
        using namespace moe_host;
        this->Input("x").ParamType(REQUIRED).DataType(RowTypes())
            .Format(AnyLayout()).UnknownShapeFormat(AnyLayout());
        this->Input("bias").ParamType(OPTIONAL).DataType(Always(ge::DT_FLOAT))
            .Format(AnyLayout()).UnknownShapeFormat(AnyLayout());
        this->Input("finished").ParamType(OPTIONAL).DataType(Always(ge::DT_BOOL))
            .Format(AnyLayout()).UnknownShapeFormat(AnyLayout());
        this->Output("y").ParamType(REQUIRED).DataType(Always(ge::DT_FLOAT))
            .Format(AnyLayout()).UnknownShapeFormat(AnyLayout());
        this->Output("expert_idx").ParamType(REQUIRED).DataType(Always(ge::DT_INT32))
            .Format(AnyLayout()).UnknownShapeFormat(AnyLayout());
        this->Output("row_idx").ParamType(REQUIRED).DataType(Always(ge::DT_INT32))
            .Format(AnyLayout()).UnknownShapeFormat(AnyLayout());
        this->Output("softmax_out").ParamType(REQUIRED).DataType(Always(ge::DT_FLOAT))
            .Format(AnyLayout()).UnknownShapeFormat(AnyLayout());
        this->Attr("k").AttrType(REQUIRED).Int();
        this->Attr("renorm").AttrType(OPTIONAL).Bool(true);
        this->Attr("norm_type").AttrType(OPTIONAL).Int(0);
        this->Attr("group_count").AttrType(OPTIONAL).Int(1);
        this->Attr("k_group").AttrType(OPTIONAL).Int(1);
        this->Attr("group_select_mode").AttrType(OPTIONAL).Int(BEST);
        this->Attr("routed_scaling_factor").AttrType(OPTIONAL).Float(1.0f);
        this->Attr("out_flag").AttrType(OPTIONAL).Bool(true);
        this->SetInferShape(InferShape).SetInferDataType(InferDataType);
        this->AICore().SetTiling(Tile);
        AddChips(this->AICore());
    }
};
OP_ADD(MoeGatingTopK);
}  // namespace ops
