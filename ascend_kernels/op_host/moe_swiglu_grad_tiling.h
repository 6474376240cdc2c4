// What the tiling of MoeSwigluGrad hands to its kernel.
#ifndef MOE_SWIGLU_GRAD_TILING_H
#define MOE_SWIGLU_GRAD_TILING_H

#include "register/tilingdata_base.h"

namespace optiling {
BEGIN_TILING_DATA_DEF(MoeSwigluGradTilingData)
    TILING_DATA_FIELD_DEF(uint32_t, rows);            // R
    TILING_DATA_FIELD_DEF(uint32_t, width);           // I
    TILING_DATA_FIELD_DEF(uint32_t, groups);          // entries of expert_tokens_cumsum
    TILING_DATA_FIELD_DEF(uint32_t, chunk);           // elements at a time
    TILING_DATA_FIELD_DEF(uint32_t, zeroBytes);       // of the buffer of zeros
END_TILING_DATA_DEF;

REGISTER_TILING_DATA_CLASS(MoeSwigluGrad, MoeSwigluGradTilingData)
}  // namespace optiling

#endif  // MOE_SWIGLU_GRAD_TILING_H
