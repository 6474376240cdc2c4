// An operator for the tests of the runner: y = factor * x, wrong on demand by its attribute `defect`.
#include "register/op_def_registry.h"
#include "tiling/platform/platform_ascendc.h"
#include "twin_lab_tiling.h"

enum Defect { NONE, TOO_MANY_BLOCKS, REFUSES, HALF_OF_THE_TILING, NO_SCHEDULE_MODE, OTHER_TYPE };

static int64_t Defect(const gert::RuntimeAttrs* attrs)
{
    return *attrs->GetAttrPointer<int64_t>(1);
}

namespace optiling {
static ge::graphStatus Tiling(gert::TilingContext* context)
{
    const int64_t defect = Defect(context->GetAttrs());
    if (defect == REFUSES) {
        return ge::GRAPH_FAILED;
    }
    auto platform = platform_ascendc::PlatformAscendC(context->GetPlatformInfo());
    uint64_t ub = 0;
    platform.GetCoreMemSize(platform_ascendc::CoreMemType::UB, ub);
    TwinLabTilingData tiling;
    const uint32_t list[3] = {7, 8, platform.GetCoreNumAiv()};
    tiling.set_count(static_cast<uint32_t>(context->GetInputShape(0)->GetStorageShape().GetShapeSize()));
    tiling.set_factor(*context->GetAttrs()->GetFloat(0));
    tiling.set_wide(ub);
    tiling.set_list(list);
    tiling.SaveToBuffer(context->GetRawTilingData()->GetData(),
                        context->GetRawTilingData()->GetCapacity());
    context->GetRawTilingData()->SetDataSize(tiling.GetDataSize() / (defect == HALF_OF_THE_TILING ? 2 : 1));
    context->SetBlockDim(platform.GetCoreNumAiv() + (defect == TOO_MANY_BLOCKS));
    context->SetTilingKey(5);
    if (defect != NO_SCHEDULE_MODE) {
        context->SetScheduleMode(1);
    }
    context->GetWorkspaceSizes(1)[0] = platform.GetLibApiWorkSpaceSize() + 64;
    return ge::GRAPH_SUCCESS;
}
}  // namespace optiling

namespace ge {
static graphStatus InferShape(gert::InferShapeContext* context)
{
    if (context->GetInputShape(0)->GetDimNum() != 1) {
        return GRAPH_FAILED;
    }
    *context->GetOutputShape(0) = *context->GetInputShape(0);
    return GRAPH_SUCCESS;
}
static graphStatus InferDataType(gert::InferDataTypeContext* context)
{
    const bool other = Defect(context->GetAttrs()) == OTHER_TYPE;
    return context->SetOutputDataType(0, other ? DT_INT32 : context->GetInputDataType(0));
}
}  // namespace ge

namespace ops {
class TwinLab : public OpDef {
public:
    explicit TwinLab(const char* name) : OpDef(name)
    {
        for (const char* input : {"x", "bias"}) {
            this->Input(input)
                .ParamType(input[0] == 'x' ? REQUIRED : OPTIONAL)
                .DataType({ge::DT_FLOAT, ge::DT_INT32})
                .Format({ge::FORMAT_ND, ge::FORMAT_ND})
                .UnknownShapeFormat({ge::FORMAT_ND, ge::FORMAT_ND});
        }
        this->Output("y")
            .ParamType(REQUIRED)
            .DataType({ge::DT_FLOAT, ge::DT_INT32})
            .Format({ge::FORMAT_ND, ge::FORMAT_ND})
            .UnknownShapeFormat({ge::FORMAT_ND, ge::FORMAT_ND});
        this->Attr("factor").AttrType(REQUIRED).Float();
        this->Attr("defect").AttrType(OPTIONAL).Int(0);
        this->SetInferShape(ge::InferShape).SetInferDataType(ge::InferDataType);
        this->AICore().SetTiling(optiling::Tiling);
        this->AICore().AddConfig("ascend910b");
    }
};
OP_ADD(TwinLab);
}  // namespace ops
