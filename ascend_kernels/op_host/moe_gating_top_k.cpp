// Host side of MoeGatingTopK: definition, inference, tiling.
#include "moe_gating_tiling.h"
#include "moe_gating_top_k_tiling.h"

namespace {
enum Input { X, FINISHED };
enum Output { Y, EXPERT_IDX, ROW_IDX, SOFTMAX_OUT };
enum Attribute { K, RENORM };

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
    return ge::GRAPH_SUCCESS;
}

ge::graphStatus InferDataType(gert::InferDataTypeContext* context)
{
    context->SetOutputDataType(Y, ge::DT_FLOAT);
    context->SetOutputDataType(EXPERT_IDX, ge::DT_INT32);
    context->SetOutputDataType(ROW_IDX, ge::DT_INT32);
    return context->SetOutputDataType(SOFTMAX_OUT, ge::DT_FLOAT);
}

ge::graphStatus Tile(gert::TilingContext* context)
{
    using namespace moe_host;
    const char* op = context->GetNodeName();
    const gert::Shape& x = context->GetInputShape(X)->GetStorageShape();
    const gert::StorageShape* finished = context->GetOptionalInputShape(FINISHED);
    if (x.GetDimNum() != 2) {
        return Refuse(op, "shapes: x must be [T, E]");
    }
    if (finished != nullptr && finished->GetStorageShape().GetShapeSize() != x.GetDim(0)) {
        return Refuse(op, "shapes: finished has %ld entries, x %ld rows: one each",
            static_cast<long>(finished->GetStorageShape().GetShapeSize()),
            static_cast<long>(x.GetDim(0)));
    }
    const GatingSizes sizes{x.GetDim(0), x.GetDim(1), *context->GetAttrs()->GetInt(K),
        DtypeNumber(context->GetInputDesc(X)->GetDataType())};
    Machine machine;
    if (CheckGating(op, sizes) != ge::GRAPH_SUCCESS ||
        ReadMachine(context, machine) != ge::GRAPH_SUCCESS) {
        return ge::GRAPH_FAILED;
    }
    const bool hasFinished = finished != nullptr;
    const uint32_t k = static_cast<uint32_t>(sizes.k);
    const auto ubBytes = [&](uint32_t tile) {
        const GatingBytes b(sizes, tile);
        // queues: x, softmax | with one buffer: y, experts, rows
        uint32_t bytes = BUFFERS * (b.logits + b.matrix) + 3 * b.chosen;
        // probs, scratch | spread | bits | numbers | column, values, chosen | gathered, offsets,
        // rowPattern
        bytes += 2 * b.matrix + b.spread + b.bits + b.numbers + (1 + 2 * k) * b.column + 3 * b.chosen;
        if (hasFinished) {  // its queue, as float16 and as float32
            bytes += BUFFERS * AlignUp(tile, BLOCK_BYTES) + b.column / 2 + b.column;
        }
        return bytes;
    };
    optiling::MoeGatingTopKTilingData tiling;
    tiling.set_hasFinished(hasFinished ? 1 : 0);
    return CommitGating(context, tiling, sizes, LargestTile(sizes, machine.ubBytes, ubBytes),
        *context->GetAttrs()->GetBool(RENORM), machine);
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
        this->SetInferShape(InferShape).SetInferDataType(InferDataType);
        this->AICore().SetTiling(Tile);
        AddChips(this->AICore());
    }
};
OP_ADD(MoeGatingTopK);
}  // namespace ops
