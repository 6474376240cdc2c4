// Host side of MoeDispatchGrad: definition, inference, tiling.
#include "moe_dispatch_grad_tiling.h"
#include "moe_rows_tiling.h"

namespace {
enum Input { D_EXPANDED_X, EXPANDED_ROW_IDX };
enum Attribute { K };

ge::graphStatus InferShape(gert::InferShapeContext* context)
{
    const gert::Shape& rows = *context->GetInputShape(D_EXPANDED_X);
    const gert::Shape& rowIdx = *context->GetInputShape(EXPANDED_ROW_IDX);
    const int64_t k = *context->GetAttrs()->GetInt(K);
    if (!moe_host::AreRows(rows) || rowIdx.GetDimNum() != 1 || k < 1) {
        return moe_host::Refuse(context->GetNodeName(), "shapes: d_expanded_x must be [E, C, H] or"
            " [R, H], expanded_row_idx [T * K], k at least 1");
    }
    gert::Shape& dx = *context->GetOutputShape(0);
    dx.SetDimNum(2);
    dx.SetDim(0, rowIdx.GetDim(0) < 0 ? -1 : rowIdx.GetDim(0) / k);
    dx.SetDim(1, moe_host::WidthOf(rows));
    return ge::GRAPH_SUCCESS;
}

ge::graphStatus InferDataType(gert::InferDataTypeContext* context)
{
    return context->SetOutputDataType(0, context->GetInputDataType(D_EXPANDED_X));
}

ge::graphStatus Tile(gert::TilingContext* context)
{
    const gert::Shape& rows = context->GetInputShape(D_EXPANDED_X)->GetStorageShape();
    const int64_t choices =
        context->GetInputShape(EXPANDED_ROW_IDX)->GetStorageShape().GetShapeSize();
    const int64_t k = *context->GetAttrs()->GetInt(K);
    if (!moe_host::AreRows(rows) || k < 1 || choices % k != 0) {
        return moe_host::Refuse(context->GetNodeName(), "shapes: d_expanded_x must be [E, C, H] or"
            " [R, H], expanded_row_idx [T * K] a multiple of k");
    }
    const moe_host::RowSizes sizes{
        choices / k, k, moe_host::PlacesOf(rows), moe_host::WidthOf(rows)};
    return moe_host::TileRows<optiling::MoeDispatchGradTilingData>(
        context, sizes, context->GetInputDesc(D_EXPANDED_X)->GetDataType(), false);
}
}  // namespace

namespace ops {
class MoeDispatchGrad : public OpDef {
public:
    explicit MoeDispatchGrad(const char* name) : OpDef(name)
    {
        using namespace moe_host;
        this->Input("d_expanded_x").ParamType(REQUIRED).DataType(RowTypes())
            .Format(AnyLayout()).UnknownShapeFormat(AnyLayout());
        this->Input("expanded_row_idx").ParamType(REQUIRED).DataType(Always(ge::DT_INT32))
            .Format(AnyLayout()).UnknownShapeFormat(AnyLayout());
        this->Output("dx").ParamType(REQUIRED).DataType(RowTypes())
            .Format(AnyLayout()).UnknownShapeFormat(AnyLayout());
        this->Attr("k").AttrType(REQUIRED).Int();
        this->SetInferShape(InferShape).SetInferDataType(InferDataType);
        this->AICore().SetTiling(Tile);
        AddChips(this->AICore());
    }
};
OP_ADD(MoeDispatchGrad);
}  // namespace ops
