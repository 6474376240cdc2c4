#include "kernel_operator.h"

using namespace AscendC;

// Block 0 does everything, eight floats at a time, and then meets the others.
extern "C" __global__ __aicore__ void twin_lab(GM_ADDR x, GM_ADDR bias, GM_ADDR y, GM_ADDR workspace,
                                               GM_ADDR tiling)
{
    GET_TILING_DATA(sizes, tiling);
    if (TILING_KEY_IS(5) && GetBlockIdx() == 0) {
        TPipe pipe;
        TBuf<TPosition::VECCALC> buffer;
        pipe.InitBuffer(buffer, sizes.count * sizeof(float));
        GlobalTensor<float> from, to;
        from.SetGlobalBuffer(reinterpret_cast<float*>(x), sizes.count);
        to.SetGlobalBuffer(reinterpret_cast<float*>(y), sizes.count);
        LocalTensor<float> values = buffer.Get<float>();
        DataCopy(values, from, sizes.count);
        PipeBarrier<PIPE_ALL>();
        Muls(values, values, bias ? 0.0f : sizes.factor, static_cast<int32_t>(sizes.count));
        PipeBarrier<PIPE_ALL>();
        DataCopy(to, values, sizes.count);
        GlobalTensor<int32_t> shared;
        shared.SetGlobalBuffer(reinterpret_cast<int32_t*>(GetUserWorkspace(workspace)), 16);
        shared.SetValue(15, static_cast<int32_t>(sizes.list[2]));
    }
    SyncAll();
}
