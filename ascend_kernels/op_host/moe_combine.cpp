// Host side of MoeCombine: definition, inference, tiling.
#include "moe_combine_tiling.h"
#include "moe_rows_tiling.h"

namespace {
enum Input { EXPANDED_X, EXPANDED_ROW_IDX, SCALES };

ge::graphStatus InferShape(gert::InferShapeContext* context)
{
    const gert::Shape& rows = *context->GetInputShape(EXPANDED_X);
    const gert::Shape& scales = *context->GetInputShape(SCALES);
    if (!moe_host::AreRows(rows) || scales.GetDimNum() != 2) {
        return moe_host::Refuse(context->GetNodeName(),
            "shapes: expanded_x must be [E, C, H] or [R, H], and scales [T, K]");
    }
    gert::Shape& y = *context->GetOutputShape(0);
    y.SetDimNum(2);
    y.SetDim(0, scales.GetDim(0));
    y.SetDim(1, moe_host::WidthOf(rows));
    return ge::GRAPH_SUCCESS;
}

ge::graphStatus InferDataType(gert::InferDataTypeContext* context)
{
    return context->SetOutputDataType(0, context->GetInputDataType(EXPANDED_X));
}

ge::graphStatus Tile(gert::TilingContext* context)
{
    const gert::Shape& rows = context->GetInputShape(EXPANDED_X)->GetStorageShape();
    const gert::Shape& rowIdx = context->GetInputShape(EXPANDED_ROW_IDX)->GetStorageShape();
    const gert::Shape& scales = context->GetInputShape(SCALES)->GetStorageShape();
    if (!moe_host::AreRows(rows) || scales.GetDimNum() != 2 ||
        rowIdx.GetShapeSize() != scales.GetShapeSize()) {
        return moe_host::Refuse(context->GetNodeName(),
            "shapes: expanded_x must be [E, C, H] or [R, H], scales [T, K], expanded_row_idx [T * K]");
    }
    const moe_host::RowSizes sizes{
        scales.GetDim(0), scales.GetDim(1), moe_host::PlacesOf(rows), moe_host::WidthOf(rows)};
    return moe_host::TileRows<optiling::MoeCombineTilingData>(
        context, sizes, context->GetInputDesc(EXPANDED_X)->GetDataType(), true);
}
}  // namespace

namespace ops {
class MoeCombine : public OpDef {
public:
    explicit MoeCombine(const char* name) : OpDef(name)
    {
        using namespace moe_host;
        this->Input("expanded_x").ParamType(REQUIRED).DataType(RowTypes())
            .Format(AnyLayout()).UnknownShapeFormat(AnyLayout());
        this->Input("expanded_row_idx").ParamType(REQUIRED).DataType(Always(ge::DT_INT32))
            .Format(AnyLayout()).UnknownShapeFormat(AnyLayout());
        this->Input("scales").ParamType(REQUIRED).DataType(Always(ge::DT_FLOAT))
            .Format(AnyLayout()).UnknownShapeFormat(AnyLayout());
        this->Output("y").ParamType(REQUIRED).DataType(RowTypes())
            .Format(AnyLayout()).UnknownShapeFormat(AnyLayout());
        this->SetInferShape(InferShape).SetInferDataType(InferDataType);
        this->AICore().SetTiling(Tile);
        AddChips(this->AICore());
    }
};
OP_ADD(MoeCombine);
}  // namespace ops
