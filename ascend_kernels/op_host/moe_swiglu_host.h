// Tiling that SwiGLU and its gradient share.
#ifndef MOE_SWIGLU_HOST_H
#define MOE_SWIGLU_HOST_H

#include <algorithm>

#include "moe_host_common.h"

namespace moe_host {
// `values`: inputs of rows in float32, beside the scratch, of which float32 rows need none;
// `buffers`: of rows, in their dtype.
struct SwigluBuffers {
    uint32_t buffers;
    uint32_t scratch;
    uint32_t values;
};

template <typename TilingData>
ge::graphStatus TileSwiglu(
    gert::TilingContext* context, size_t inputs, const SwigluBuffers& needed)
{
    constexpr uint32_t MOST_ZEROS = 16 * 1024;
    const char* op = context->GetNodeName();
    const gert::Shape& first = context->GetInputShape(0)->GetStorageShape();
    const gert::Shape& cumsum = context->GetInputShape(inputs)->GetStorageShape();
    for (size_t i = 0; i < inputs; ++i) {
        const gert::Shape& shape = context->GetInputShape(i)->GetStorageShape();
        if (shape.GetDimNum() != 2 || shape.GetDim(0) != first.GetDim(0) ||
            shape.GetDim(1) != first.GetDim(1) || shape.GetDim(0) < 1 || shape.GetDim(1) < 1) {
            return Refuse(op, "shapes: gate, up and dy must be [R, I], every size at least 1");
        }
    }
    if (cumsum.GetDimNum() != 1 || cumsum.GetDim(0) < 1 || cumsum.GetDim(0) >= MOST_ELEMENTS) {
        return Refuse(op, "shapes: expert_tokens_cumsum must be [E] with E at least 1");
    }
    if (first.GetDim(0) >= MOST_ELEMENTS || first.GetDim(1) >= MOST_ELEMENTS ||
        first.GetShapeSize() / LANES >= MOST_ELEMENTS) {
        return Refuse(op, "shapes: R, I and R * I / 64 must be below 2^31");
    }
    const int32_t dtype = DtypeNumber(context->GetInputDesc(0)->GetDataType());
    Machine machine;
    if (ReadMachine(context, machine) != ge::GRAPH_SUCCESS) {
        return ge::GRAPH_FAILED;
    }
    if (dtype < 0) {
        return Refuse(op, "dtype: rows must be float32, float16 or bfloat16");
    }
    // UB of a block: an 8th for zeros, a block for the end of the groups, the rest for rows
    const uint32_t zeroBytes = std::min(MOST_ZEROS, AlignDown(machine.ubBytes / 8, BLOCK_BYTES));
    const uint32_t bytesPerElement = needed.buffers * DtypeBytes(dtype) +
        (needed.scratch + (dtype == 0 ? 0 : needed.values)) * static_cast<uint32_t>(sizeof(float));
    const uint32_t most = machine.ubBytes < 4 * 1024
        ? 0 : AlignDown((machine.ubBytes - zeroBytes - BLOCK_BYTES) / bytesPerElement, LANES);
    if (most == 0) {
        return Refuse(op, "UB: %u bytes are not enough: 4 KB is the least", machine.ubBytes);
    }
    // pieces no longer than a block's share, so that all blocks have some
    const int64_t size = first.GetShapeSize();
    const int64_t share = (size + machine.cores - 1) / machine.cores;
    const uint32_t chunk = static_cast<uint32_t>(
        std::min<int64_t>(most, (share + LANES - 1) / LANES * LANES));
    TilingData tiling;
    tiling.set_rows(static_cast<uint32_t>(first.GetDim(0)));
    tiling.set_width(static_cast<uint32_t>(first.GetDim(1)));
    tiling.set_groups(static_cast<uint32_t>(cumsum.GetDim(0)));
    tiling.set_chunk(chunk);
    tiling.set_zeroBytes(zeroBytes);
    const int64_t pieces = (size + chunk - 1) / chunk;
    return Commit(context, tiling, BlocksFor(machine, static_cast<uint32_t>(pieces)),
        MOE_ROWS_FLOAT + dtype, machine);
}
}  // namespace moe_host

#endif  // MOE_SWIGLU_HOST_H
