// What the tiling of MoePermute hands to its kernel.
#ifndef MOE_PERMUTE_TILING_H
#define MOE_PERMUTE_TILING_H

#include "register/tilingdata_base.h"

namespace optiling {
BEGIN_TILING_DATA_DEF(MoePermuteTilingData)
    TILING_DATA_FIELD_DEF(uint32_t, tokens);          // T
    TILING_DATA_FIELD_DEF(uint32_t, k);               // K
    TILING_DATA_FIELD_DEF(uint32_t, slots);           // T * K, rows of expanded_x
    TILING_DATA_FIELD_DEF(uint32_t, experts);         // E
    TILING_DATA_FIELD_DEF(uint32_t, tile);            // choices at a time, a power of two
    TILING_DATA_FIELD_DEF(uint32_t, groups);          // one-hot matrices side by side
    TILING_DATA_FIELD_DEF(uint32_t, countRows);       // blocks whose counters are read as one piece
    TILING_DATA_FIELD_DEF(uint32_t, rowBytes);        // of x; 0: no rows are moved
    TILING_DATA_FIELD_DEF(uint32_t, tableSize);       // entries of expanded_row_idx at a time
    TILING_DATA_FIELD_DEF(uint32_t, bufferBytes);     // of each of two buffers of rows
    TILING_DATA_FIELD_DEF(uint32_t, zeroBytes);       // of the buffer of zeros
END_TILING_DATA_DEF;

REGISTER_TILING_DATA_CLASS(MoePermute, MoePermuteTilingData)
}  // namespace optiling

#endif  // MOE_PERMUTE_TILING_H
