// Bounds, alignment, lengths, uninitialised bytes, outputs left unwritten.
#include "lab.h"

using namespace lab;

DEFECT(load_length)
{
    LocalTensor<float> a = bench.scratch(0);
    DataCopy(a, bench.x, bad ? 60 + 2 : 64);
    bench.save_zeros();
}

DEFECT(store_length)
{
    LocalTensor<float> b = bench.out.AllocTensor<float>();
    Duplicate(b, 1.0f, kCount);
    bench.out.EnQue(b);
    b = bench.out.DeQue<float>();
    DataCopy(bench.y, b, bad ? 63 : 64);
    bench.out.FreeTensor(b);
}

DEFECT(vector_alignment)
{
    Duplicate(bench.scratch(0)[bad ? 4 : 8], 1.0f, 8);
    bench.save_zeros();
}

DEFECT(dma_alignment)
{
    DataCopy(bench.scratch(0)[bad ? 1 : 0], bench.x, 8);
    bench.save_zeros();
}

DEFECT(global_alignment)
{
    GlobalTensor<float> shifted;
    shifted.SetGlobalBuffer(reinterpret_cast<float*>(bench.x_bytes + (bad ? 2 : 4)), 32);
    DataCopy(bench.scratch(0), shifted, 8);
    bench.save_zeros();
}

DEFECT(ub_overflow)
{
    TBuf<TPosition::VECCALC> more;
    bench.pipe.InitBuffer(more, bad ? 190000 : 180000);
    bench.save_zeros();
}

DEFECT(empty_buffer)
{
    TBuf<TPosition::VECCALC> more;
    bench.pipe.InitBuffer(more, bad ? 0 : 32);
    bench.save_zeros();
}

DEFECT(many_buffers)
{
    TBuf<TPosition::VECCALC> more[60];
    for (int i = 0; i < (bad ? 60 : 59); ++i) {
        bench.pipe.InitBuffer(more[i], 32);
    }
    bench.save_zeros();
}

DEFECT(vector_past_buffer)
{
    LocalTensor<float> b = bench.out.AllocTensor<float>();
    Duplicate(b, 1.0f, bad ? 72 : 64);
    bench.save(b);
}

DEFECT(scalar_past_buffer)
{
    bench.scratch(0).SetValue(bad ? 64 : 63, 1.0f);
    bench.save_zeros();
}

DEFECT(offset_past_buffer)
{
    bench.scratch(0)[bad ? 65 : 64].GetSize();
    bench.save_zeros();
}

DEFECT(view_past_buffer)
{
    bench.buffer.Get<float>(bad ? 257 : 256);
    bench.save_zeros();
}

DEFECT(buffer_never_initialised)
{
    TBuf<TPosition::VECCALC> other;
    if (!bad) {
        bench.pipe.InitBuffer(other, 32);
    }
    other.Get<float>();
    bench.save_zeros();
}

DEFECT(load_past_view)
{
    DataCopy(bench.scratch(0), bench.x[bad ? 8 : 0], 64);
    bench.save_zeros();
}

DEFECT(load_past_tensor)
{
    GlobalTensor<float> unlimited;
    unlimited.SetGlobalBuffer(reinterpret_cast<float*>(bench.x_bytes));
    DataCopy(bench.scratch(0), unlimited[bad ? 8 : 0], 64);
    bench.save_zeros();
}

DEFECT(store_past_tensor)
{
    GlobalTensor<float> unlimited;
    unlimited.SetGlobalBuffer(reinterpret_cast<float*>(bench.y_bytes));
    LocalTensor<float> b = bench.out.AllocTensor<float>();
    Duplicate(b, 1.0f, kCount);
    bench.out.EnQue(b);
    b = bench.out.DeQue<float>();
    DataCopy(unlimited, b, 64);
    DataCopyPad(unlimited[63], b, {1, bad ? 8u : 4u, 0, 0, 0});
    bench.out.FreeTensor(b);
}

DEFECT(global_scalar_past_tensor)
{
    bench.x.GetValue(bad ? 64 : 63);
    bench.save_zeros();
}

DEFECT(write_to_input)
{
    GlobalTensor<float> target;
    target.SetGlobalBuffer(reinterpret_cast<float*>(bad ? bench.x_bytes : bench.y_bytes), kCount);
    target.SetValue(0, 1.0f);
    PipeBarrier<PIPE_ALL>();
    bench.save_zeros();
}

DEFECT(uninitialised_ub)
{
    if (!bad) {
        Duplicate(bench.scratch(0), 1.0f, kCount);
        PipeBarrier<PIPE_V>();
    }
    LocalTensor<float> b = bench.out.AllocTensor<float>();
    Adds(b, bench.scratch(0), 1.0f, kCount);
    bench.save(b);
}

DEFECT(uninitialised_scalar)
{
    if (!bad) {
        bench.scratch(0).SetValue(5, 1.0f);
    }
    bench.scratch(0).GetValue(5);
    bench.save_zeros();
}

// Behind a padded burst the rest of the block is garbage.
DEFECT(uninitialised_padding)
{
    LocalTensor<float> a = bench.in.AllocTensor<float>();
    DataCopyPad(a, bench.x, {1, 20, 0, 0, 0}, {!bad, 0, 3, 0.0f});
    bench.in.EnQue(a);
    a = bench.in.DeQue<float>();
    Adds(bench.scratch(0), a, 1.0f, 8);
    bench.in.FreeTensor(a);
    bench.save_zeros();
}

// A buffer that comes back from the queue no longer holds what it held.
DEFECT(stale_queue_buffer)
{
    for (int i = 0; i < 3; ++i) {
        LocalTensor<float> a = bench.in.AllocTensor<float>();
        if (!bad || i < 2) {
            DataCopy(a, bench.x, kCount);
        }
        bench.in.EnQue(a);
        a = bench.in.DeQue<float>();
        Adds(bench.scratch(0), a, 1.0f, kCount);
        PipeBarrier<PIPE_V>();
        bench.in.FreeTensor(a);
    }
    bench.save_zeros();
}

DEFECT(uninitialised_workspace)
{
    GlobalTensor<float> shared;
    shared.SetGlobalBuffer(reinterpret_cast<float*>(bench.workspace), kCount);
    LocalTensor<float> a = bench.scratch(0);
    if (!bad) {
        Duplicate(a, 1.0f, kCount);
        PipeBarrier<PIPE_ALL>();
        DataCopy(shared, a, kCount);
        PipeBarrier<PIPE_ALL>();
    }
    DataCopy(a, shared, kCount);
    bench.save_zeros();
}

DEFECT(output_left_unwritten)
{
    LocalTensor<float> b = bench.out.AllocTensor<float>();
    Duplicate(b, 1.0f, kCount);
    bench.out.EnQue(b);
    b = bench.out.DeQue<float>();
    DataCopyPad(bench.y, b, {1, bad ? 252u : 256u, 0, 0, 0});
    bench.out.FreeTensor(b);
}

DEFECT(burst_cuts_an_element)
{
    DataCopyPad(bench.scratch(0), bench.x, {1, bad ? 6u : 8u, 0, 0, 0}, {false, 0, 0, 0.0f});
    bench.save_zeros();
}

DEFECT(no_bursts)
{
    const uint16_t bursts = bad ? 0 : 1;
    DataCopyPad(bench.scratch(0), bench.x, {bursts, 8, 0, 0, 0}, {false, 0, 0, 0.0f});
    bench.save_zeros();
}

DEFECT(empty_burst)
{
    DataCopyPad(bench.scratch(0), bench.x, {1, bad ? 0u : 8u, 0, 0, 0}, {false, 0, 0, 0.0f});
    bench.save_zeros();
}

DEFECT(wide_padding)
{
    const uint8_t right = bad ? 9 : 8;
    DataCopyPad(bench.scratch(0), bench.x, {1, 8, 0, 0, 0}, {true, 0, right, 0.0f});
    bench.save_zeros();
}

DEFECT(burst_starts_inside_an_element)
{
    DataCopyPad(bench.scratch(0), bench.x, {2, 8, bad ? 2u : 4u, 0, 0}, {false, 0, 0, 0.0f});
    bench.save_zeros();
}

DEFECT(stored_burst_starts_inside_an_element)
{
    LocalTensor<float> b = bench.out.AllocTensor<float>();
    Duplicate(b, 1.0f, kCount);
    bench.out.EnQue(b);
    b = bench.out.DeQue<float>();
    DataCopy(bench.y, b, kCount);
    DataCopyPad(bench.y, b, {2, 8, 0, bad ? 2u : 4u, 0});
    bench.out.FreeTensor(b);
}
