// Where defects are planted: each kernel is right when `bad` is false, and breaks one rule when true.
#pragma once

#include "test_kernel.h"

namespace lab {

using namespace AscendC;

constexpr uint32_t kCount = 64;
constexpr uint32_t kBytes = kCount * sizeof(float);

// x: 64 floats in, y: 64 floats out, and the buffers that most kernels want.
struct Bench {
    Bench(GM_ADDR x_address, GM_ADDR y_address, GM_ADDR workspace_address)
        : x_bytes(x_address), y_bytes(y_address), workspace(GetUserWorkspace(workspace_address))
    {
        x.SetGlobalBuffer(reinterpret_cast<float*>(x_address), kCount);
        y.SetGlobalBuffer(reinterpret_cast<float*>(y_address), kCount);
        pipe.InitBuffer(in, 2, kBytes);
        pipe.InitBuffer(out, 2, kBytes);
        pipe.InitBuffer(buffer, 4 * kBytes);
    }

    LocalTensor<float> load()
    {
        LocalTensor<float> a = in.AllocTensor<float>();
        DataCopy(a, x, kCount);
        in.EnQue(a);
        return in.DeQue<float>();
    }

    void save(LocalTensor<float> b)
    {
        out.EnQue(b);
        b = out.DeQue<float>();
        DataCopy(y, b, kCount);
        out.FreeTensor(b);
    }

    void save_zeros()
    {
        LocalTensor<float> b = out.AllocTensor<float>();
        Duplicate(b, 0.0f, kCount);
        save(b);
    }

    template <typename T = float>
    LocalTensor<T> scratch(uint32_t part)
    {
        return buffer.GetWithOffset<T>(kBytes / sizeof(T), part * kBytes);
    }

    GM_ADDR x_bytes;
    GM_ADDR y_bytes;
    GM_ADDR workspace;
    TPipe pipe;
    TQue<QuePosition::VECIN, 2> in;
    TQue<QuePosition::VECOUT, 2> out;
    TBuf<TPosition::VECCALC> buffer;
    GlobalTensor<float> x, y;
};

template <HardEvent event>
void wait_here(TPipe& pipe)
{
    const TEventID id = pipe.FetchEventID(event);
    SetFlag<event>(id);
    WaitFlag<event>(id);
}

}  // namespace lab

#define DEFECT(name)                                                                    \
    static void name##_body(lab::Bench& bench, bool bad);                               \
    static void name(GM_ADDR x, GM_ADDR y, GM_ADDR workspace, GM_ADDR tiling)           \
    {                                                                                   \
        GET_TILING_DATA(sizes, tiling);                                                 \
        lab::Bench bench(x, y, workspace);                                              \
        name##_body(bench, sizes.n != 0);                                               \
    }                                                                                   \
    TEST_KERNEL(name)                                                                   \
    static void name##_body([[maybe_unused]] lab::Bench& bench, [[maybe_unused]] bool bad)
