// Host side of MoeDispatch: definition, inference, tiling.
#include "moe_dispatch_tiling.h"
#include "moe_rows_tiling.h"

namespace {
enum Input { X, SLOT_SRC, EXPANDED_ROW_IDX };
enum Attribute { EXPERT_NUM, EXPERT_CAPACITY, K };

ge::graphStatus InferShape(gert::InferShapeContext* context)
{
    const gert::Shape& x = *context->GetInputShape(X);
    if (x.GetDimNum() != 2) {
        return moe_host::Refuse(context->GetNodeName(), "shapes: x must be [T, H]");
    }
    gert::Shape& rows = *context->GetOutputShape(0);
    rows.SetDimNum(3);
    rows.SetDim(0, *context->GetAttrs()->GetInt(EXPERT_NUM));
    rows.SetDim(1, *context->GetAttrs()->GetInt(EXPERT_CAPACITY));
    rows.SetDim(2, x.GetDim(1));
    return ge::GRAPH_SUCCESS;
}

ge::graphStatus InferDataType(gert::InferDataTypeContext* context)
{
    return context->SetOutputDataType(0, context->GetInputDataType(X));
}

// UB of a block: a 64th for each table, an 8th for zeros (16 KB at most), the rest for two buffers of
// rows (64 KB each at most: more would only delay the first store).
ge::graphStatus Tile(gert::TilingContext* context)
{
    using namespace moe_host;
    constexpr uint32_t MOST_BUFFER = 64 * 1024;
    constexpr uint32_t MOST_ZEROS = 16 * 1024;
    const char* op = context->GetNodeName();
    const gert::Shape& x = context->GetInputShape(X)->GetStorageShape();
    const int64_t slots = context->GetInputShape(SLOT_SRC)->GetStorageShape().GetShapeSize();
    const int64_t experts = *context->GetAttrs()->GetInt(EXPERT_NUM);
    const int64_t capacity = *context->GetAttrs()->GetInt(EXPERT_CAPACITY);
    const int64_t k = *context->GetAttrs()->GetInt(K);
    if (x.GetDimNum() != 2 || experts < 1 || capacity < 1 || slots != experts * capacity) {
        return Refuse(op, "shapes: x must be [T, H] and slot_src [E * C] = %ld, not %ld",
            static_cast<long>(experts * capacity), static_cast<long>(slots));
    }
    const gert::StorageShape* rowIdx = context->GetOptionalInputShape(EXPANDED_ROW_IDX);
    if (rowIdx != nullptr && rowIdx->GetStorageShape().GetShapeSize() != x.GetDim(0) * k) {
        return Refuse(op, "shapes: expanded_row_idx must be [T * K] = %ld, not %ld",
            static_cast<long>(x.GetDim(0) * k),
            static_cast<long>(rowIdx->GetStorageShape().GetShapeSize()));
    }
    const RowSizes sizes{x.GetDim(0), k, slots, x.GetDim(1)};
    const int32_t dtype = DtypeNumber(context->GetInputDesc(X)->GetDataType());
    Machine machine;
    if (CheckRowSizes(op, sizes) != ge::GRAPH_SUCCESS ||
        ReadMachine(context, machine) != ge::GRAPH_SUCCESS) {
        return ge::GRAPH_FAILED;
    }
    if (dtype < 0) {
        return Refuse(op, "dtype: x must be float32, float16 or bfloat16");
    }
    if (machine.ubBytes < 4 * 1024) {
        return Refuse(op, "UB: %u bytes are not enough: 4 KB is the least", machine.ubBytes);
    }
    const uint32_t rowBytes = static_cast<uint32_t>(sizes.hidden) * DtypeBytes(dtype);
    const uint32_t tableBytes = AlignDown(machine.ubBytes / 64, BLOCK_BYTES);
    const uint32_t zeroBytes = std::min(MOST_ZEROS, AlignDown(machine.ubBytes / 8, BLOCK_BYTES));
    const uint32_t rest = machine.ubBytes - 2 * tableBytes - zeroBytes;
    const uint32_t bufferBytes = std::min(MOST_BUFFER, AlignDown(rest / BUFFERS, BLOCK_BYTES));

    optiling::MoeDispatchTilingData tiling;
    tiling.set_tokens(static_cast<uint32_t>(sizes.tokens));
    tiling.set_k(static_cast<uint32_t>(k));
    tiling.set_slots(static_cast<uint32_t>(slots));
    tiling.set_rowBytes(rowBytes);
    tiling.set_tableSize(tableBytes / sizeof(int32_t));
    tiling.set_bufferBytes(bufferBytes);
    tiling.set_zeroBytes(zeroBytes);
    const bool whole = AlignUp(rowBytes, BLOCK_BYTES) <= bufferBytes;
    const bool byToken = rowIdx != nullptr;
    const uint64_t byPlace =
        whole ? MOE_DISPATCH_BY_PLACE_WHOLE_ROWS : MOE_DISPATCH_BY_PLACE_SPLIT_ROWS;
    const uint64_t key = byToken ? MOE_DISPATCH_BY_TOKEN : byPlace;
    // by token the larger of both shares decides: tokens to move, or places to zero
    const int64_t work = byToken ? std::max(sizes.tokens, slots) : slots;
    return Commit(
        context, tiling, BlocksFor(machine, static_cast<uint32_t>(work)), key, machine);
}
}  // namespace

namespace ops {
class MoeDispatch : public OpDef {
public:
    explicit MoeDispatch(const char* name) : OpDef(name)
    {
        using namespace moe_host;
        this->Input("x").ParamType(REQUIRED).DataType(RowTypes())
            .Format(AnyLayout()).UnknownShapeFormat(AnyLayout());
        this->Input("slot_src").ParamType(REQUIRED).DataType(Always(ge::DT_INT32))
            .Format(AnyLayout()).UnknownShapeFormat(AnyLayout());
        this->Input("expanded_row_idx").ParamType(OPTIONAL).DataType(Always(ge::DT_INT32))
            .Format(AnyLayout()).UnknownShapeFormat(AnyLayout());
        this->Output("expanded_x").ParamType(REQUIRED).DataType(RowTypes())
            .Format(AnyLayout()).UnknownShapeFormat(AnyLayout());
        this->Attr("expert_num").AttrType(REQUIRED).Int();
        this->Attr("expert_capacity").AttrType(REQUIRED).Int();
        this->Attr("k").AttrType(REQUIRED).Int();
        this->SetInferShape(InferShape).SetInferDataType(InferDataType);
        this->AICore().SetTiling(Tile);
        AddChips(this->AICore());
    }
};
OP_ADD(MoeDispatch);
}  // namespace ops
