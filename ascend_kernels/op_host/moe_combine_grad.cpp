// Host side of MoeCombineGrad: definition, inference, tiling.
#include "moe_combine_grad_tiling.h"
#include "moe_rows_tiling.h"

namespace {
enum Input { DY, EXPANDED_X, SLOT_SRC, EXPANDED_ROW_IDX, SCALES };
enum Output { D_EXPANDED_X, D_SCALES };

ge::graphStatus InferShape(gert::InferShapeContext* context)
{
    *context->GetOutputShape(D_EXPANDED_X) = *context->GetInputShape(EXPANDED_X);
    *context->GetOutputShape(D_SCALES) = *context->GetInputShape(SCALES);
    return ge::GRAPH_SUCCESS;
}

ge::graphStatus InferDataType(gert::InferDataTypeContext* context)
{
    context->SetOutputDataType(D_EXPANDED_X, context->GetInputDataType(EXPANDED_X));
    return context->SetOutputDataType(D_SCALES, ge::DT_FLOAT);
}

// UB of a block: a 64th for slot_src, a 16th for zeros, an 8th for the tables of the tokens and
// their products; the rest for rows: per element two buffers each of dy, expanded_x and
// d_expanded_x, a float32 product, and for 16-bit rows dy and expanded_x in float32. What shorter
// rows leave goes to more buffers of expanded_x: with those of dy they have six of eight event ids.
ge::graphStatus Tile(gert::TilingContext* context)
{
    using namespace moe_host;
    constexpr uint32_t MOST_ROW_BUFFERS = 4;
    const char* op = context->GetNodeName();
    const gert::Shape& dy = context->GetInputShape(DY)->GetStorageShape();
    const gert::Shape& rows = context->GetInputShape(EXPANDED_X)->GetStorageShape();
    const gert::Shape& scales = context->GetInputShape(SCALES)->GetStorageShape();
    const int64_t sources = context->GetInputShape(SLOT_SRC)->GetStorageShape().GetShapeSize();
    const int64_t choices =
        context->GetInputShape(EXPANDED_ROW_IDX)->GetStorageShape().GetShapeSize();
    if (dy.GetDimNum() != 2 || !AreRows(rows) || scales.GetDimNum() != 2 ||
        dy.GetDim(0) != scales.GetDim(0) || dy.GetDim(1) != WidthOf(rows) ||
        choices != scales.GetShapeSize() || sources != PlacesOf(rows)) {
        return Refuse(op, "shapes: dy must be [T, H], expanded_x [E, C, H] or [R, H], slot_src"
            " [E * C] or [R], expanded_row_idx [T * K], scales [T, K]");
    }
    const RowSizes sizes{dy.GetDim(0), scales.GetDim(1), sources, dy.GetDim(1)};
    const int32_t dtype = DtypeNumber(context->GetInputDesc(DY)->GetDataType());
    Machine machine;
    if (CheckRowSizes(op, sizes) != ge::GRAPH_SUCCESS ||
        ReadMachine(context, machine) != ge::GRAPH_SUCCESS) {
        return ge::GRAPH_FAILED;
    }
    if (dtype < 0) {
        return Refuse(op, "dtype: rows must be float32, float16 or bfloat16");
    }
    if (machine.ubBytes < 8 * 1024) {
        return Refuse(op, "UB: %u bytes are not enough: 8 KB is the least", machine.ubBytes);
    }
    const uint32_t k = static_cast<uint32_t>(sizes.k);
    const uint32_t hidden = static_cast<uint32_t>(sizes.hidden);
    const uint32_t bytesPerElement =
        3 * BUFFERS * DtypeBytes(dtype) + (dtype == 0 ? 1 : 3) * sizeof(float);
    const uint32_t tableBytes = AlignDown(machine.ubBytes / 64, BLOCK_BYTES);
    const uint32_t zeroBytes = AlignDown(machine.ubBytes / 16, BLOCK_BYTES);
    const uint32_t tokenBytes = AlignDown(machine.ubBytes / 8, BLOCK_BYTES);
    // every one of the nine row buffers is rounded up to a block
    const uint32_t forRows =
        machine.ubBytes - tableBytes - zeroBytes - tokenBytes - 9 * BLOCK_BYTES;
    const uint32_t chunk = ChunkOf(sizes.hidden, forRows, bytesPerElement);
    // of every token: its part of two tables, and one product per piece of the row
    const uint32_t columns = 2 + CeilDiv(hidden, chunk);
    const uint32_t tokenChoices = tokenBytes / (columns * sizeof(float)) / 8 * 8;
    if (tokenChoices < k) {
        return Refuse(op, "H: %u is too long for %u bytes of UB", hidden, machine.ubBytes);
    }
    optiling::MoeCombineGradTilingData tiling;
    tiling.set_tokens(static_cast<uint32_t>(sizes.tokens));
    tiling.set_k(k);
    tiling.set_slots(static_cast<uint32_t>(sizes.slots));
    tiling.set_hidden(hidden);
    tiling.set_chunk(chunk);
    tiling.set_tileTokens(std::min(tokenChoices / k, static_cast<uint32_t>(sizes.tokens)));
    tiling.set_tableSize(tableBytes / sizeof(int32_t));
    tiling.set_zeroBytes(zeroBytes);
    const uint32_t rowBytes = AlignUp(chunk * DtypeBytes(dtype), BLOCK_BYTES);
    const uint32_t floatBytes = (dtype == 0 ? 1 : 3) * AlignUp(chunk * sizeof(float), BLOCK_BYTES);
    const uint32_t forQueue = machine.ubBytes - tableBytes - zeroBytes - tokenBytes -
        2 * BUFFERS * rowBytes - floatBytes;
    tiling.set_rowBuffers(std::min(MOST_ROW_BUFFERS, forQueue / rowBytes));
    const uint32_t work = static_cast<uint32_t>(std::max(sizes.tokens, sizes.slots));
    return Commit(context, tiling, BlocksFor(machine, work), MOE_ROWS_FLOAT + dtype, machine);
}
}  // namespace

namespace ops {
class MoeCombineGrad : public OpDef {
public:
    explicit MoeCombineGrad(const char* name) : OpDef(name)
    {
        using namespace moe_host;
        this->Input("dy").ParamType(REQUIRED).DataType(RowTypes())
            .Format(AnyLayout()).UnknownShapeFormat(AnyLayout());
        this->Input("expanded_x").ParamType(REQUIRED).DataType(RowTypes())
            .Format(AnyLayout()).UnknownShapeFormat(AnyLayout());
        this->Input("slot_src").ParamType(REQUIRED).DataType(Always(ge::DT_INT32))
            .Format(AnyLayout()).UnknownShapeFormat(AnyLayout());
        this->Input("expanded_row_idx").ParamType(REQUIRED).DataType(Always(ge::DT_INT32))
            .Format(AnyLayout()).UnknownShapeFormat(AnyLayout());
        this->Input("scales").ParamType(REQUIRED).DataType(Always(ge::DT_FLOAT))
            .Format(AnyLayout()).UnknownShapeFormat(AnyLayout());
        this->Output("d_expanded_x").ParamType(REQUIRED).DataType(RowTypes())
            .Format(AnyLayout()).UnknownShapeFormat(AnyLayout());
        this->Output("d_scales").ParamType(REQUIRED).DataType(Always(ge::DT_FLOAT))
            .Format(AnyLayout()).UnknownShapeFormat(AnyLayout());
        this->SetInferShape(InferShape).SetInferDataType(InferDataType);
        this->AICore().SetTiling(Tile);
        AddChips(this->AICore());
    }
};
OP_ADD(MoeCombineGrad);
}  // namespace ops
