// What the tiling of MoeExpertCapacity hands to its kernel.
#ifndef MOE_EXPERT_CAPACITY_TILING_H
#define MOE_EXPERT_CAPACITY_TILING_H

#include "register/tilingdata_base.h"

namespace optiling {
BEGIN_TILING_DATA_DEF(MoeExpertCapacityTilingData)
    TILING_DATA_FIELD_DEF(uint32_t, items);           // rows of the queues: T * K, or T
    TILING_DATA_FIELD_DEF(uint32_t, queues);          // 1, or K
    TILING_DATA_FIELD_DEF(uint32_t, experts);         // E
    TILING_DATA_FIELD_DEF(uint32_t, capacity);        // C
    TILING_DATA_FIELD_DEF(uint32_t, tile);            // rows at a time, a power of two
    TILING_DATA_FIELD_DEF(uint32_t, groups);          // one-hot matrices side by side
    TILING_DATA_FIELD_DEF(uint32_t, countRows);       // blocks whose counters are read as one piece
END_TILING_DATA_DEF;

REGISTER_TILING_DATA_CLASS(MoeExpertCapacity, MoeExpertCapacityTilingData)
}  // namespace optiling

#endif  // MOE_EXPERT_CAPACITY_TILING_H
