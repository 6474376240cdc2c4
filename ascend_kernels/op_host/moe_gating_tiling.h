// Tiling that the gating operator and its gradient share.
#ifndef MOE_GATING_TILING_H
#define MOE_GATING_TILING_H

#include "moe_host_common.h"

namespace moe_host {
constexpr uint32_t EIGHT = 8;

// Sizes of a gating call.
struct GatingSizes {
    int64_t tokens = 0;
    int64_t experts = 0;
    int64_t k = 0;
    int32_t dtype = 0;  // DtypeNumber of the logits
};

// What a gating call makes of the logits; the attributes of both operators.
struct GatingRules {
    bool renorm = true;
    int64_t normType = 0;
    float factor = 1.0f;
};

inline ge::graphStatus CheckRules(const char* op, const GatingRules& rules)
{
    if (rules.normType != 0 && rules.normType != 1) {
        return Refuse(op, "norm_type: %ld: 0 (softmax) or 1 (sigmoid)",
            static_cast<long>(rules.normType));
    }
    if (!(rules.factor > 0.0f && rules.factor < 1.0e30f)) {
        return Refuse(op, "routed_scaling_factor: %g: above 0 and finite",
            static_cast<double>(rules.factor));
    }
    return ge::GRAPH_SUCCESS;
}

inline bool IsEight(const GatingSizes& sizes)
{
    return sizes.experts == EIGHT;
}

inline ge::graphStatus CheckGating(const char* op, const GatingSizes& sizes)
{
    if (sizes.tokens < 1 || sizes.experts < 1 || sizes.experts > MOST_EXPERTS) {
        return Refuse(op, "shapes: x [%ld, %ld]: must be [T, E] with T at least 1, E from 1 to 256",
            static_cast<long>(sizes.tokens), static_cast<long>(sizes.experts));
    }
    if (sizes.k < 1 || sizes.k > MOST_CHOICES || sizes.k > sizes.experts) {
        return Refuse(op, "k: %ld: from 1 to 8, and no more than the %ld experts",
            static_cast<long>(sizes.k), static_cast<long>(sizes.experts));
    }
    if (sizes.tokens * sizes.experts >= MOST_ELEMENTS || sizes.tokens * sizes.k >= MOST_ELEMENTS) {
        return Refuse(op, "shapes: T * E and T * K must be below 2^31");
    }
    if (sizes.dtype < 0) {
        return Refuse(op, "dtype: x must be float32, float16 or bfloat16");
    }
    return ge::GRAPH_SUCCESS;
}

// Floats of a row in UB: a block for eight experts, else whole vector repeats.
inline uint32_t RowWidth(const GatingSizes& sizes)
{
    return IsEight(sizes) ? EIGHT : AlignUp(static_cast<uint32_t>(sizes.experts), LANES);
}

// What a tile of `tokens` takes of UB, in units that both kernels are made of.
struct GatingBytes {
    GatingBytes(const GatingSizes& sizes, uint32_t tokens)
    {
        const uint32_t experts = static_cast<uint32_t>(sizes.experts);
        const uint32_t width = RowWidth(sizes);
        const uint32_t unit = IsEight(sizes) ? 1 : BLOCK_BYTES;
        matrix = tokens * width * sizeof(float);
        logits = tokens * AlignUp(experts * DtypeBytes(sizes.dtype), unit);
        floats = tokens * AlignUp(experts * 4, unit);
        chosen = AlignUp(tokens * static_cast<uint32_t>(sizes.k) * 4, BLOCK_BYTES);
        column = AlignUp(tokens, LANES) * sizeof(float);
        spread = tokens * BLOCK_BYTES;
        bits = AlignUp(tokens * width / 8, BLOCK_BYTES);
        numbers = (IsEight(sizes) ? LANES : width) * sizeof(float);
    }
    uint32_t matrix;   // float32, rows padded
    uint32_t logits;   // as they come
    uint32_t floats;   // the same in float32
    uint32_t chosen;   // [tokens, k]
    uint32_t column;   // [tokens], whole repeats
    uint32_t spread;   // a block per token
    uint32_t bits;     // a bit per element of the matrix
    uint32_t numbers;  // column numbers
};

// The largest tile, a multiple of 8 tokens, that fits; 0 if none does. `ubBytes(tile)` says what a
// tile takes.
template <typename UbBytes>
uint32_t LargestTile(const GatingSizes& sizes, uint32_t available, UbBytes ubBytes)
{
    // repeats of an instruction are at most 255: an eighth of the rows, or the rows
    uint32_t tile = IsEight(sizes) ? 512 : 248;
    while (tile > 0 && ubBytes(tile) > available) {
        tile -= EIGHT;
    }
    return tile;
}

template <typename TilingData>
ge::graphStatus CommitGating(gert::TilingContext* context, TilingData& tiling,
    const GatingSizes& sizes, uint32_t tile, const GatingRules& rules, const Machine& machine)
{
    if (tile == 0) {
        return Refuse(context->GetNodeName(), "UB: %u bytes do not hold 8 tokens of %ld experts",
            machine.ubBytes, static_cast<long>(sizes.experts));
    }
    const uint32_t tokens = static_cast<uint32_t>(sizes.tokens);
    // as many blocks as have eight tokens each; and tiles no larger than a block's share
    const uint32_t blocks = BlocksFor(machine, CeilDiv(tokens, EIGHT));
    const uint32_t share = AlignUp(CeilDiv(tokens, blocks), EIGHT);
    tiling.set_tokens(tokens);
    tiling.set_experts(static_cast<uint32_t>(sizes.experts));
    tiling.set_k(static_cast<uint32_t>(sizes.k));
    tiling.set_renorm(rules.renorm ? 1 : 0);
    tiling.set_normType(static_cast<uint32_t>(rules.normType));
    tiling.set_factor(rules.factor);
    tiling.set_width(RowWidth(sizes));
    tiling.set_tileTokens(tile < share ? tile : share);
    const uint64_t first = IsEight(sizes) ? MOE_GATING_EIGHT_FLOAT : MOE_GATING_WIDE_FLOAT;
    return Commit(context, tiling, blocks, first + sizes.dtype, machine);
}
}  // namespace moe_host

#endif  // MOE_GATING_TILING_H
