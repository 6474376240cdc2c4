// What the tiling of MoeDispatchGrad hands to its kernel.
#ifndef MOE_DISPATCH_GRAD_TILING_H
#define MOE_DISPATCH_GRAD_TILING_H

#include "register/tilingdata_base.h"

namespace optiling {
BEGIN_TILING_DATA_DEF(MoeDispatchGradTilingData)
    TILING_DATA_FIELD_DEF(uint32_t, tokens);          // T
    TILING_DATA_FIELD_DEF(uint32_t, k);               // K
    TILING_DATA_FIELD_DEF(uint32_t, slots);           // E * C
    TILING_DATA_FIELD_DEF(uint32_t, hidden);          // H
    TILING_DATA_FIELD_DEF(uint32_t, chunk);           // elements of a row at a time
    TILING_DATA_FIELD_DEF(uint32_t, tileTokens);      // tokens of a part of the tables
    TILING_DATA_FIELD_DEF(uint32_t, rowBuffers);      // of the queue of rows
END_TILING_DATA_DEF;

REGISTER_TILING_DATA_CLASS(MoeDispatchGrad, MoeDispatchGradTilingData)
}  // namespace optiling

#endif  // MOE_DISPATCH_GRAD_TILING_H
