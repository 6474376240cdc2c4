// Kernels without a defect: what they do must pass every check, and cost what they should.
#include "test_kernel.h"

using namespace AscendC;

namespace {

constexpr uint32_t kTile = 64;

// y = 2 x, a tile per step, double-buffered; the tail by DataCopyPad.
void twice(GM_ADDR x, GM_ADDR y, GM_ADDR, GM_ADDR tiling)
{
    GET_TILING_DATA(sizes, tiling);
    const uint32_t n = sizes.n;
    TPipe pipe;
    TQue<QuePosition::VECIN, 2> in;
    TQue<QuePosition::VECOUT, 2> out;
    pipe.InitBuffer(in, 2, kTile * sizeof(float));
    pipe.InitBuffer(out, 2, kTile * sizeof(float));
    GlobalTensor<float> from, to;
    from.SetGlobalBuffer(reinterpret_cast<float*>(x), n);
    to.SetGlobalBuffer(reinterpret_cast<float*>(y), n);
    const uint32_t step = kTile * static_cast<uint32_t>(GetBlockNum());
    for (uint32_t i = kTile * static_cast<uint32_t>(GetBlockIdx()); i < n; i += step) {
        const uint32_t count = n - i < kTile ? n - i : kTile;
        const DataCopyExtParams burst{1, static_cast<uint32_t>(count * sizeof(float)), 0, 0, 0};
        LocalTensor<float> a = in.AllocTensor<float>();
        DataCopyPad(a, from[i], burst, {false, 0, 0, 0.0f});
        in.EnQue(a);
        a = in.DeQue<float>();
        LocalTensor<float> b = out.AllocTensor<float>();
        Muls(b, a, 2.0f, static_cast<int32_t>(count));
        in.FreeTensor(a);
        out.EnQue(b);
        b = out.DeQue<float>();
        DataCopyPad(to[i], b, burst);
        out.FreeTensor(b);
    }
}

// y = x through a queue that only copies: MTE2 hands to MTE3 directly.
void copy_through(GM_ADDR x, GM_ADDR y, GM_ADDR, GM_ADDR tiling)
{
    GET_TILING_DATA(sizes, tiling);
    TPipe pipe;
    TQueBind<TPosition::VECIN, TPosition::VECOUT, 2> queue;
    pipe.InitBuffer(queue, 2, kTile * sizeof(float));
    GlobalTensor<float> from, to;
    from.SetGlobalBuffer(reinterpret_cast<float*>(x), sizes.n);
    to.SetGlobalBuffer(reinterpret_cast<float*>(y), sizes.n);
    for (uint32_t i = 0; i < sizes.n; i += kTile) {
        LocalTensor<float> row = queue.AllocTensor<float>();
        DataCopy(row, from[i], kTile);
        queue.EnQue(row);
        row = queue.DeQue<float>();
        DataCopy(to[i], row, kTile);
        queue.FreeTensor(row);
    }
}

// Each block puts its number into the workspace; after SyncAll each reads all of them, twice over.
void meet(GM_ADDR y, GM_ADDR workspace, GM_ADDR)
{
    TPipe pipe;
    TBuf<TPosition::VECCALC> buffer;
    pipe.InitBuffer(buffer, 32 * 64);
    const uint32_t blocks = static_cast<uint32_t>(GetBlockNum());
    const uint32_t block = static_cast<uint32_t>(GetBlockIdx());
    GlobalTensor<int32_t> shared, out;
    shared.SetGlobalBuffer(reinterpret_cast<int32_t*>(GetUserWorkspace(workspace)), 8 * 64);
    out.SetGlobalBuffer(reinterpret_cast<int32_t*>(y), 2 * blocks);
    int32_t total = 0;
    for (uint32_t round = 0; round < 2; ++round) {
        LocalTensor<int32_t> mine = buffer.Get<int32_t>();
        PipeBarrier<PIPE_ALL>();
        Duplicate(mine, static_cast<int32_t>(block + round), 8);
        PipeBarrier<PIPE_ALL>();
        DataCopy(shared[8 * block], mine, 8);
        SyncAll();
        for (uint32_t other = 0; other < blocks; ++other) {
            DataCopy(mine[8 * other], shared[8 * other], 8);
        }
        PipeBarrier<PIPE_ALL>();
        for (uint32_t other = 0; other < blocks; ++other) {
            total += mine.GetValue(8 * other);
        }
        SyncAll();
        out.SetValue(2 * block + round, total);
    }
}

// A vector result read by the scalar unit, with flags whose ids are reserved.
void flags(GM_ADDR y, GM_ADDR, GM_ADDR)
{
    TPipe pipe;
    TBuf<TPosition::VECCALC> buffer;
    pipe.InitBuffer(buffer, 64);
    LocalTensor<float> a = buffer.Get<float>();
    Duplicate(a, 3.0f, 16);
    const TEventID done = pipe.AllocEventID<HardEvent::V_S>();
    SetFlag<HardEvent::V_S>(done);
    WaitFlag<HardEvent::V_S>(done);
    pipe.ReleaseEventID<HardEvent::V_S>(done);
    a.SetValue(1, a.GetValue(0) + 1.0f);
    const event_t ready = static_cast<event_t>(GetTPipePtr()->FetchEventID(HardEvent::S_MTE3));
    SetFlag<HardEvent::S_MTE3>(ready);
    WaitFlag<HardEvent::S_MTE3>(ready);
    const event_t written = static_cast<event_t>(GetTPipePtr()->FetchEventID(HardEvent::V_MTE3));
    SetFlag<HardEvent::V_MTE3>(written);
    WaitFlag<HardEvent::V_MTE3>(written);
    GlobalTensor<float> out;
    out.SetGlobalBuffer(reinterpret_cast<float*>(y), 16);
    DataCopy(out, a, 16);
}

}  // namespace

TEST_KERNEL(twice)
TEST_KERNEL(copy_through)
TEST_KERNEL(meet)
TEST_KERNEL(flags)
