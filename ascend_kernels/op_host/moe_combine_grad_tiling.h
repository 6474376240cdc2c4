// What the tiling of MoeCombineGrad hands to its kernel.
#ifndef MOE_COMBINE_GRAD_TILING_H
#define MOE_COMBINE_GRAD_TILING_H

#include "register/tilingdata_base.h"

namespace optiling {
BEGIN_TILING_DATA_DEF(MoeCombineGradTilingData)
    TILING_DATA_FIELD_DEF(uint32_t, tokens);          // T
    TILING_DATA_FIELD_DEF(uint32_t, k);               // K
    TILING_DATA_FIELD_DEF(uint32_t, slots);           // E * C
    TILING_DATA_FIELD_DEF(uint32_t, hidden);          // H
    TILING_DATA_FIELD_DEF(uint32_t, chunk);           // elements of a row at a time
    TILING_DATA_FIELD_DEF(uint32_t, tileTokens);      // tokens of a part of the tables
    TILING_DATA_FIELD_DEF(uint32_t, tableSize);       // entries of slot_src at a time
    TILING_DATA_FIELD_DEF(uint32_t, zeroBytes);       // of the buffer of zeros
    TILING_DATA_FIELD_DEF(uint32_t, rowBuffers);      // of the queue of rows of expanded_x
END_TILING_DATA_DEF;

REGISTER_TILING_DATA_CLASS(MoeCombineGrad, MoeCombineGradTilingData)
}  // namespace optiling

#endif  // MOE_COMBINE_GRAD_TILING_H
