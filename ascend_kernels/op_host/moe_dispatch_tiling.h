// What the tiling of MoeDispatch hands to its kernel.
#ifndef MOE_DISPATCH_TILING_H
#define MOE_DISPATCH_TILING_H

#include "register/tilingdata_base.h"

namespace optiling {
BEGIN_TILING_DATA_DEF(MoeDispatchTilingData)
    TILING_DATA_FIELD_DEF(uint32_t, tokens);          // T
    TILING_DATA_FIELD_DEF(uint32_t, k);               // K
    TILING_DATA_FIELD_DEF(uint32_t, slots);           // E * C
    TILING_DATA_FIELD_DEF(uint32_t, rowBytes);        // H * size of an element
    TILING_DATA_FIELD_DEF(uint32_t, tableSize);       // entries of slot_src at a time
    TILING_DATA_FIELD_DEF(uint32_t, bufferBytes);     // of each row buffer
    TILING_DATA_FIELD_DEF(uint32_t, zeroBytes);       // of the buffer of zeros
END_TILING_DATA_DEF;

REGISTER_TILING_DATA_CLASS(MoeDispatch, MoeDispatchTilingData)
}  // namespace optiling

#endif  // MOE_DISPATCH_TILING_H
