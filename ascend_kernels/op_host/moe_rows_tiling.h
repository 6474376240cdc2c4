// Tiling of the two operators that sum rows: MoeCombine and MoeDispatchGrad.
#ifndef MOE_ROWS_TILING_H
#define MOE_ROWS_TILING_H

#include <algorithm>

#include "moe_host_common.h"

namespace moe_host {
// Sizes of an operation on rows of H elements.
struct RowSizes {
    int64_t tokens = 0;
    int64_t k = 0;
    int64_t slots = 0;
    int64_t hidden = 0;
};

// Rows lie [E, C, H], a place of an expert each, or [R, H], sorted by expert.
inline bool AreRows(const gert::Shape& rows)
{
    return rows.GetDimNum() == 3 || rows.GetDimNum() == 2;
}

// How many rows, -1 where that is not known yet.
inline int64_t PlacesOf(const gert::Shape& rows)
{
    return rows.GetDimNum() == 3 ? Times(rows.GetDim(0), rows.GetDim(1)) : rows.GetDim(0);
}

// Their H.
inline int64_t WidthOf(const gert::Shape& rows)
{
    return rows.GetDim(rows.GetDimNum() - 1);
}

inline ge::graphStatus CheckRowSizes(const char* op, const RowSizes& sizes)
{
    if (sizes.tokens < 1 || sizes.k < 1 || sizes.slots < 1 || sizes.hidden < 1) {
        return Refuse(op, "shapes: T %ld, K %ld, E * C %ld, H %ld: every size must be at least 1",
            static_cast<long>(sizes.tokens), static_cast<long>(sizes.k),
            static_cast<long>(sizes.slots), static_cast<long>(sizes.hidden));
    }
    if (sizes.k > MOST_CHOICES) {
        return Refuse(op, "shapes: K %ld: at most 8 experts per token", static_cast<long>(sizes.k));
    }
    if (sizes.tokens * sizes.k >= MOST_ELEMENTS || sizes.slots >= MOST_ELEMENTS ||
        sizes.hidden >= MOST_ELEMENTS / 8) {
        return Refuse(op, "shapes: T * K, E * C and 8 * H must be below 2^31");
    }
    return ge::GRAPH_SUCCESS;
}

// Elements of a row that fit `bytes` at `bytesPerElement`: all of them, or whole vector repeats.
inline uint32_t ChunkOf(int64_t hidden, uint32_t bytes, uint32_t bytesPerElement)
{
    const uint32_t most = AlignDown(bytes / bytesPerElement, LANES);
    return hidden <= most ? static_cast<uint32_t>(hidden) : most;
}

// UB of a block: per element of the chunk, two row buffers, two output buffers, and for 16-bit
// rows a float32 row and a float32 sum: 16 bytes either way. One 16th of UB for the tables. What
// shorter rows leave goes to more row buffers: a queue may have eight, as there are event ids, and
// with six there are five rows on their way.
template <typename TilingData>
ge::graphStatus TileRows(
    gert::TilingContext* context, const RowSizes& sizes, ge::DataType dtype, bool weighted)
{
    constexpr uint32_t BYTES_PER_ELEMENT = 16;
    constexpr uint32_t MOST_ROW_BUFFERS = 6;
    const char* op = context->GetNodeName();
    const int32_t number = DtypeNumber(dtype);
    Machine machine;
    if (CheckRowSizes(op, sizes) != ge::GRAPH_SUCCESS ||
        ReadMachine(context, machine) != ge::GRAPH_SUCCESS) {
        return ge::GRAPH_FAILED;
    }
    if (number < 0) {
        return Refuse(op, "dtype: rows must be float32, float16 or bfloat16");
    }
    const uint32_t k = static_cast<uint32_t>(sizes.k);
    const uint32_t tables = weighted ? 2 : 1;
    const uint32_t tableBytes = AlignDown(machine.ubBytes / 16 / tables, BLOCK_BYTES);
    const uint32_t tileTokens = tableBytes / (k * sizeof(int32_t));
    // every one of the six buffers is rounded up to a block
    const uint32_t forRows = machine.ubBytes - tables * tableBytes - 6 * BLOCK_BYTES;
    const uint32_t chunk = ChunkOf(sizes.hidden, forRows, BYTES_PER_ELEMENT);
    if (machine.ubBytes < 4 * 1024 || tileTokens == 0 || chunk == 0) {
        return Refuse(op, "UB: %u bytes are not enough: 4 KB is the least", machine.ubBytes);
    }
    const uint32_t rowBytes = AlignUp(chunk * DtypeBytes(number), BLOCK_BYTES);
    const uint32_t floatBytes = number == 0 ? 0 : 2 * AlignUp(chunk * sizeof(float), BLOCK_BYTES);
    const uint32_t forQueue =
        machine.ubBytes - tables * (tableBytes + BLOCK_BYTES) - BUFFERS * rowBytes - floatBytes;
    TilingData tiling;
    tiling.set_rowBuffers(std::min(MOST_ROW_BUFFERS, forQueue / rowBytes));
    tiling.set_tokens(static_cast<uint32_t>(sizes.tokens));
    tiling.set_k(k);
    tiling.set_slots(static_cast<uint32_t>(sizes.slots));
    tiling.set_hidden(static_cast<uint32_t>(sizes.hidden));
    tiling.set_chunk(chunk);
    tiling.set_tileTokens(std::min(tileTokens, static_cast<uint32_t>(sizes.tokens)));
    const uint32_t blocks = BlocksFor(machine, static_cast<uint32_t>(sizes.tokens));
    return Commit(context, tiling, blocks, MOE_ROWS_FLOAT + number, machine);
}
}  // namespace moe_host

#endif  // MOE_ROWS_TILING_H
