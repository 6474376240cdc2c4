// MoeCombine: y[t] = sum over the kept choices of scales[t, k] * expanded_x[expanded_row_idx].
#include "moe_tiling_keys.h"
#include "moe_weighted_rows.h"

extern "C" __global__ __aicore__ void moe_combine(GM_ADDR expanded_x, GM_ADDR expanded_row_idx,
    GM_ADDR scales, GM_ADDR y, GM_ADDR workspace, GM_ADDR tiling)
{
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
    GET_TILING_DATA(tilingData, tiling);
    if (TILING_KEY_IS(MOE_ROWS_FLOAT)) {
        moe::RunWeightedRows<float, MoeCombineTilingData, true>(
            expanded_x, expanded_row_idx, scales, y, tilingData);
    } else if (TILING_KEY_IS(MOE_ROWS_HALF)) {
        moe::RunWeightedRows<half, MoeCombineTilingData, true>(
            expanded_x, expanded_row_idx, scales, y, tilingData);
    } else if (TILING_KEY_IS(MOE_ROWS_BFLOAT16)) {
        moe::RunWeightedRows<bfloat16_t, MoeCombineTilingData, true>(
            expanded_x, expanded_row_idx, scales, y, tilingData);
    }
}
