#pragma once
#include "register/tilingdata_base.h"

namespace optiling {
BEGIN_TILING_DATA_DEF(TwinLabTilingData)
TILING_DATA_FIELD_DEF(uint32_t, count);
TILING_DATA_FIELD_DEF(float, factor);
TILING_DATA_FIELD_DEF(uint64_t, wide);
TILING_DATA_FIELD_DEF_ARR(uint32_t, 3, list);
END_TILING_DATA_DEF;

REGISTER_TILING_DATA_CLASS(TwinLab, TwinLabTilingData)
}  // namespace optiling
