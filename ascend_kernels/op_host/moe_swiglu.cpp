// Host side of MoeSwiglu: definition, inference, tiling.
#include "moe_swiglu_host.h"
#include "moe_swiglu_tiling.h"

namespace {
enum Input { GATE, UP, EXPERT_TOKENS_CUMSUM };

ge::graphStatus InferShape(gert::InferShapeContext* context)
{
    *context->GetOutputShape(0) = *context->GetInputShape(GATE);
    return ge::GRAPH_SUCCESS;
}

ge::graphStatus InferDataType(gert::InferDataTypeContext* context)
{
    context->SetOutputDataType(0, context->GetInputDataType(GATE));
    return ge::GRAPH_SUCCESS;
}

// Two buffers each of gate, up and y; silu(gate); gate and up in float32.
ge::graphStatus Tile(gert::TilingContext* context)
{
    return moe_host::TileSwiglu<optiling::MoeSwigluTilingData>(
        context, EXPERT_TOKENS_CUMSUM, {6, 1, 2});
}
}  // namespace

namespace ops {
class MoeSwiglu : public OpDef {
public:
    explicit MoeSwiglu(const char* name) : OpDef(name)
    {
        using namespace moe_host;
        this->Input("gate").ParamType(REQUIRED).DataType(RowTypes())
            .Format(AnyLayout()).UnknownShapeFormat(AnyLayout());
        this->Input("up").ParamType(REQUIRED).DataType(RowTypes())
            .Format(AnyLayout()).UnknownShapeFormat(AnyLayout());
        this->Input("expert_tokens_cumsum").ParamType(REQUIRED).DataType(Always(ge::DT_INT32))
            .Format(AnyLayout()).UnknownShapeFormat(AnyLayout());
        this->Output("y").ParamType(REQUIRED).DataType(RowTypes())
            .Format(AnyLayout()).UnknownShapeFormat(AnyLayout());
        this->SetInferShape(InferShape).SetInferDataType(InferDataType);
        this->AICore().SetTiling(Tile);
        AddChips(this->AICore());
    }
};
OP_ADD(MoeSwiglu);
}  // namespace ops
