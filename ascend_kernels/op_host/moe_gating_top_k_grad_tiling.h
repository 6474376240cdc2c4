// What the tiling of MoeGatingTopKGrad hands to its kernel.
#ifndef MOE_GATING_TOP_K_GRAD_TILING_H
#define MOE_GATING_TOP_K_GRAD_TILING_H

#include "register/tilingdata_base.h"

namespace optiling {
BEGIN_TILING_DATA_DEF(MoeGatingTopKGradTilingData)
    TILING_DATA_FIELD_DEF(uint32_t, tokens);          // T
    TILING_DATA_FIELD_DEF(uint32_t, experts);         // E
    TILING_DATA_FIELD_DEF(uint32_t, k);               // K
    TILING_DATA_FIELD_DEF(uint32_t, renorm);          // 1: y was divided by its sum
    TILING_DATA_FIELD_DEF(uint32_t, hasDSoftmax);     // 1: the input is there
    TILING_DATA_FIELD_DEF(uint32_t, normType);        // 0: softmax, 1: sigmoid
    TILING_DATA_FIELD_DEF(float, factor);             // of y
    TILING_DATA_FIELD_DEF(uint32_t, width);           // floats of a row in UB
    TILING_DATA_FIELD_DEF(uint32_t, tileTokens);      // rows of a tile, a multiple of 8
END_TILING_DATA_DEF;

REGISTER_TILING_DATA_CLASS(MoeGatingTopKGrad, MoeGatingTopKGradTilingData)
}  // namespace optiling

#endif  // MOE_GATING_TOP_K_GRAD_TILING_H
