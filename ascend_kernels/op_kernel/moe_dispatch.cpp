// MoeDispatch: expanded_x[s] = x[slot_src[s] / k], or zero where slot_src[s] < 0.
//
// Nothing is computed, so nothing but DMA instructions runs, and rows are bytes whatever the dtype.
// With expanded_row_idx, the inverse of slot_src, a row is read once instead of once per place.
#include "moe_dispatch_by_place.h"
#include "moe_dispatch_by_token.h"
#include "moe_tiling_keys.h"

extern "C" __global__ __aicore__ void moe_dispatch(GM_ADDR x, GM_ADDR slot_src,
    GM_ADDR expanded_row_idx, GM_ADDR expanded_x, GM_ADDR workspace, GM_ADDR tiling)
{
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
    GET_TILING_DATA(tilingData, tiling);
    if (TILING_KEY_IS(MOE_DISPATCH_BY_PLACE_WHOLE_ROWS)) {
        moe::DispatchByPlace<MoeDispatchTilingData> op;
        op.Init(x, slot_src, expanded_x, tilingData);
        op.Process<true>();
    } else if (TILING_KEY_IS(MOE_DISPATCH_BY_PLACE_SPLIT_ROWS)) {
        moe::DispatchByPlace<MoeDispatchTilingData> op;
        op.Init(x, slot_src, expanded_x, tilingData);
        op.Process<false>();
    } else if (TILING_KEY_IS(MOE_DISPATCH_BY_TOKEN)) {
        moe::DispatchByToken<MoeDispatchTilingData> op;
        op.Init(x, slot_src, expanded_row_idx, expanded_x, tilingData);
        op.Process();
    }
}
