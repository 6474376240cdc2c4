// What the tiling of MoeGatingTopK hands to its kernel.
#ifndef MOE_GATING_TOP_K_TILING_H
#define MOE_GATING_TOP_K_TILING_H

#include "register/tilingdata_base.h"

namespace optiling {
BEGIN_TILING_DATA_DEF(MoeGatingTopKTilingData)
    TILING_DATA_FIELD_DEF(uint32_t, tokens);          // T
    TILING_DATA_FIELD_DEF(uint32_t, experts);         // E
    TILING_DATA_FIELD_DEF(uint32_t, k);               // K
    TILING_DATA_FIELD_DEF(uint32_t, renorm);          // 1: y sums to 1
    TILING_DATA_FIELD_DEF(uint32_t, hasFinished);     // 1: the input is there
    TILING_DATA_FIELD_DEF(uint32_t, hasBias);         // 1: the input is there
    TILING_DATA_FIELD_DEF(uint32_t, outFlag);         // 1: softmax_out is written
    TILING_DATA_FIELD_DEF(uint32_t, groupCount);      // groups of experts
    TILING_DATA_FIELD_DEF(uint32_t, kGroup);          // groups that a token's experts are of
    TILING_DATA_FIELD_DEF(uint32_t, groupSelectMode); // 0: by the best expert, 1: by the two best
    TILING_DATA_FIELD_DEF(uint32_t, normType);        // 0: softmax, 1: sigmoid
    TILING_DATA_FIELD_DEF(float, factor);             // of y
    TILING_DATA_FIELD_DEF(uint32_t, width);           // floats of a row in UB
    TILING_DATA_FIELD_DEF(uint32_t, tileTokens);      // rows of a tile, a multiple of 8
END_TILING_DATA_DEF;

REGISTER_TILING_DATA_CLASS(MoeGatingTopK, MoeGatingTopKTilingData)
}  // namespace optiling

#endif  // MOE_GATING_TOP_K_TILING_H
