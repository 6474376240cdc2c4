// Host side of MoeSwigluGrad: definition, inference, tiling.
#include "moe_swiglu_host.h"
#include "moe_swiglu_grad_tiling.h"

namespace {
enum Input { DY, GATE, UP, EXPERT_TOKENS_CUMSUM };

ge::graphStatus InferShape(gert::InferShapeContext* context)
{
    *context->GetOutputShape(0) = *context->GetInputShape(DY);
    *context->GetOutputShape(1) = *context->GetInputShape(DY);
    return ge::GRAPH_SUCCESS;
}

ge::graphStatus InferDataType(gert::InferDataTypeContext* context)
{
    context->SetOutputDataType(0, context->GetInputDataType(DY));
    context->SetOutputDataType(1, context->GetInputDataType(DY));
    return ge::GRAPH_SUCCESS;
}

// Two buffers each of dy, gate, up and the results; two scratch; dy, gate and up in float32.
ge::graphStatus Tile(gert::TilingContext* context)
{
    return moe_host::TileSwiglu<optiling::MoeSwigluGradTilingData>(
        context, EXPERT_TOKENS_CUMSUM, {8, 2, 3});
}
}  // namespace

namespace ops {
class MoeSwigluGrad : public OpDef {
public:
    explicit MoeSwigluGrad(const char* name) : OpDef(name)
    {
        using namespace moe_host;
        this->Input("dy").ParamType(REQUIRED).DataType(RowTypes())
            .Format(AnyLayout()).UnknownShapeFormat(AnyLayout());
        this->Input("gate").ParamType(REQUIRED).DataType(RowTypes())
            .Format(AnyLayout()).UnknownShapeFormat(AnyLayout());
        this->Input("up").ParamType(REQUIRED).DataType(RowTypes())
            .Format(AnyLayout()).UnknownShapeFormat(AnyLayout());
        this->Input("expert_tokens_cumsum").ParamType(REQUIRED).DataType(Always(ge::DT_INT32))
            .Format(AnyLayout()).UnknownShapeFormat(AnyLayout());
        this->Output("d_gate").ParamType(REQUIRED).DataType(RowTypes())
            .Format(AnyLayout()).UnknownShapeFormat(AnyLayout());
        this->Output("d_up").ParamType(REQUIRED).DataType(RowTypes())
            .Format(AnyLayout()).UnknownShapeFormat(AnyLayout());
        this->SetInferShape(InferShape).SetInferDataType(InferDataType);
        this->AICore().SetTiling(Tile);
        AddChips(this->AICore());
    }
};
OP_ADD(MoeSwigluGrad);
}  // namespace ops
