// Host side of MoeGatingTopKGrad: definition, inference, tiling.
#include "moe_gating_tiling.h"
#include "moe_gating_top_k_grad_tiling.h"

namespace {
enum Input { X, EXPERT_IDX, DY, D_SOFTMAX_OUT };
enum Attribute { K, RENORM, NORM_TYPE, ROUTED_SCALING_FACTOR };

ge::graphStatus InferShape(gert::InferShapeContext* context)
{
    *context->GetOutputShape(0) = *context->GetInputShape(X);
    return ge::GRAPH_SUCCESS;
}

ge::graphStatus InferDataType(gert::InferDataTypeContext* context)
{
    return context->SetOutputDataType(0, context->GetInputDataType(X));
}

ge::graphStatus Tile(gert::TilingContext* context)
{
    using namespace moe_host;
    const char* op = context->GetNodeName();
    const gert::Shape& x = context->GetInputShape(X)->GetStorageShape();
    const gert::Shape& experts = context->GetInputShape(EXPERT_IDX)->GetStorageShape();
    const gert::Shape& dy = context->GetInputShape(DY)->GetStorageShape();
    const gert::StorageShape* dSoftmax = context->GetOptionalInputShape(D_SOFTMAX_OUT);
    const int64_t k = *context->GetAttrs()->GetInt(K);
    if (x.GetDimNum() != 2 || experts.GetShapeSize() != x.GetDim(0) * k ||
        dy.GetShapeSize() != x.GetDim(0) * k ||
        (dSoftmax != nullptr &&
            dSoftmax->GetStorageShape().GetShapeSize() != x.GetShapeSize())) {
        return Refuse(op, "shapes: x and d_softmax_out must be [T, E], expert_idx and dy [T, %ld]",
            static_cast<long>(k));
    }
    const GatingSizes sizes{
        x.GetDim(0), x.GetDim(1), k, DtypeNumber(context->GetInputDesc(X)->GetDataType())};
    const GatingRules rules{*context->GetAttrs()->GetBool(RENORM),
        *context->GetAttrs()->GetInt(NORM_TYPE), *context->GetAttrs()->GetFloat(ROUTED_SCALING_FACTOR)};
    Machine machine;
    if (CheckGating(op, sizes) != ge::GRAPH_SUCCESS || CheckRules(op, rules) != ge::GRAPH_SUCCESS ||
        ReadMachine(context, machine) != ge::GRAPH_SUCCESS) {
        return ge::GRAPH_FAILED;
    }
    const auto ubBytes = [&](uint32_t tile) {
        const GatingBytes b(sizes, tile);
        // queues: x, dx, d_softmax | with one buffer: experts, dy
        uint32_t bytes = BUFFERS * (2 * b.logits + (dSoftmax ? b.floats : 0)) + 2 * b.chosen;
        // probs, dProbs, scratch | spread | bits | numbers | column, sum, offsets, integers |
        // chosen, dChosen, probsChosen
        return bytes + 3 * b.matrix + b.spread + b.bits + b.numbers +
            (4 + 3 * static_cast<uint32_t>(k)) * b.column;
    };
    optiling::MoeGatingTopKGradTilingData tiling;
    tiling.set_hasDSoftmax(dSoftmax != nullptr ? 1 : 0);
    return CommitGating(context, tiling, sizes, LargestTile(sizes, machine.ubBytes, ubBytes),
        rules, machine);
}
}  // namespace

namespace ops {
class MoeGatingTopKGrad : public OpDef {
public:
    explicit MoeGatingTopKGrad(const char* name) : OpDef(name)
    {
        using namespace moe_host;
        this->Input("x").ParamType(REQUIRED).DataType(RowTypes())
            .Format(AnyLayout()).UnknownShapeFormat(AnyLayout());
        this->Input("expert_idx").ParamType(REQUIRED).DataType(Always(ge::DT_INT32))
            .Format(AnyLayout()).UnknownShapeFormat(AnyLayout());
        this->Input("dy").ParamType(REQUIRED).DataType(Always(ge::DT_FLOAT))
            .Format(AnyLayout()).UnknownShapeFormat(AnyLayout());
        this->Input("d_softmax_out").ParamType(OPTIONAL).DataType(Always(ge::DT_FLOAT))
            .Format(AnyLayout()).UnknownShapeFormat(AnyLayout());
        this->Output("dx").ParamType(REQUIRED).DataType(RowTypes())
            .Format(AnyLayout()).UnknownShapeFormat(AnyLayout());
        this->Attr("k").AttrType(REQUIRED).Int();
        this->Attr("renorm").AttrType(OPTIONAL).Bool(true);
        this->Attr("norm_type").AttrType(OPTIONAL).Int(0);
        this->Attr("routed_scaling_factor").AttrType(OPTIONAL).Float(1.0f);
        this->SetInferShape(InferShape).SetInferDataType(InferDataType);
        this->AICore().SetTiling(Tile);
        AddChips(this->AICore());
    }
};
OP_ADD(MoeGatingTopKGrad);
}  // namespace ops
