// What the host side of all MoE operators shares: the machine, dtypes, sizes, refusals.
#ifndef MOE_HOST_COMMON_H
#define MOE_HOST_COMMON_H

#include <cstdint>
#include <cstdio>
#include <vector>

#include "../op_kernel/moe_tiling_keys.h"
#include "register/op_def_registry.h"
#include "tiling/platform/platform_ascendc.h"

namespace moe_host {
constexpr uint32_t BLOCK_BYTES = 32;
constexpr uint32_t LANES = 64;                  // floats of one vector repeat
constexpr uint32_t BUFFERS = 2;                 // of every queue
constexpr uint32_t RESERVED_UB = 8 * 1024;      // CANN's own temporaries live there
constexpr int64_t MOST_ELEMENTS = 1LL << 31;    // kernels count the small tensors in 32 bits
constexpr int64_t MOST_EXPERTS = 256;
constexpr int64_t MOST_CHOICES = 8;

inline uint32_t CeilDiv(uint32_t a, uint32_t b)
{
    return (a + b - 1) / b;
}

inline uint32_t AlignUp(uint32_t a, uint32_t unit)
{
    return CeilDiv(a, unit) * unit;
}

inline uint32_t AlignDown(uint32_t a, uint32_t unit)
{
    return a / unit * unit;
}

// Product of sizes of which any may be unknown (negative) at compile time.
inline int64_t Times(int64_t a, int64_t b)
{
    return a < 0 || b < 0 ? -1 : a * b;
}

// Says why a call is refused; the caller returns the result.
template <typename... Values>
ge::graphStatus Refuse(const char* op, const char* format, Values... values)
{
    std::fprintf(stderr, "%s: ", op);
    std::fprintf(stderr, format, values...);
    std::fputc('\n', stderr);
    return ge::GRAPH_FAILED;
}

inline ge::graphStatus Refuse(const char* op, const char* text)
{
    return Refuse(op, "%s", text);
}

// What the tiling may use.
struct Machine {
    uint32_t cores = 0;    // vector cores
    uint32_t ubBytes = 0;  // of each, without what CANN keeps
    uint32_t systemWorkspace = 0;
};

inline ge::graphStatus ReadMachine(gert::TilingContext* context, Machine& machine)
{
    const platform_ascendc::PlatformAscendC platform(context->GetPlatformInfo());
    uint64_t ub = 0;
    platform.GetCoreMemSize(platform_ascendc::CoreMemType::UB, ub);
    machine.cores = platform.GetCoreNumAiv();
    machine.systemWorkspace = platform.GetLibApiWorkSpaceSize();
    if (machine.cores == 0 || ub <= RESERVED_UB) {
        return Refuse(context->GetNodeName(), "platform: %u vector cores, %lu bytes of UB: both must"
            " be known and UB larger than 8 KB", machine.cores, static_cast<unsigned long>(ub));
    }
    machine.ubBytes = AlignDown(static_cast<uint32_t>(ub) - RESERVED_UB, BLOCK_BYTES);
    return ge::GRAPH_SUCCESS;
}

inline uint32_t BlocksFor(const Machine& machine, uint32_t work)
{
    return work < machine.cores ? (work > 0 ? work : 1) : machine.cores;
}

// float32, float16, bfloat16 -> 0, 1, 2, in the order of the tiling keys; -1 for others.
inline int32_t DtypeNumber(ge::DataType dtype)
{
    switch (dtype) {
        case ge::DT_FLOAT:
            return 0;
        case ge::DT_FLOAT16:
            return 1;
        case ge::DT_BF16:
            return 2;
        default:
            return -1;
    }
}

inline uint32_t DtypeBytes(int32_t dtypeNumber)
{
    return dtypeNumber == 0 ? 4 : 2;
}

template <typename TilingData>
ge::graphStatus Commit(gert::TilingContext* context, TilingData& tiling, uint32_t blocks,
    uint64_t key, const Machine& machine, size_t userWorkspace = 0)
{
    context->SetBlockDim(blocks);
    context->SetTilingKey(key);
    auto* raw = context->GetRawTilingData();
    tiling.SaveToBuffer(raw->GetData(), raw->GetCapacity());
    raw->SetDataSize(tiling.GetDataSize());
    context->GetWorkspaceSizes(1)[0] = machine.systemWorkspace + userWorkspace;
    return ge::GRAPH_SUCCESS;
}

// Columns of an OpDef for the three dtypes of the rows.
inline std::vector<ge::DataType> RowTypes()
{
    return {ge::DT_FLOAT, ge::DT_FLOAT16, ge::DT_BF16};
}

inline std::vector<ge::DataType> Always(ge::DataType dtype)
{
    return {dtype, dtype, dtype};
}

inline std::vector<ge::Format> AnyLayout()
{
    return {ge::FORMAT_ND, ge::FORMAT_ND, ge::FORMAT_ND};
}

// The chips that the kernels are written for: vector cores with DataCopyPad and bfloat16.
inline void AddChips(ops::OpAICoreDef& core)
{
    core.AddConfig("ascend910b");
    core.AddConfig("ascend910_93");
}
}  // namespace moe_host

#endif  // MOE_HOST_COMMON_H
