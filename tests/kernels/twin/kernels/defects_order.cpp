// Queues, events, hazards between pipes, races between blocks.
#include "lab.h"

using namespace lab;

DEFECT(enque_twice)
{
    LocalTensor<float> a = bench.in.AllocTensor<float>();
    DataCopy(a, bench.x, kCount);
    bench.in.EnQue(a);
    if (bad) {
        bench.in.EnQue(a);
    }
    a = bench.in.DeQue<float>();
    bench.in.FreeTensor(a);
    bench.save_zeros();
}

DEFECT(deque_empty)
{
    LocalTensor<float> a = bench.in.AllocTensor<float>();
    DataCopy(a, bench.x, kCount);
    if (!bad) {
        bench.in.EnQue(a);
    }
    a = bench.in.DeQue<float>();
    bench.in.FreeTensor(a);
    bench.save_zeros();
}

DEFECT(never_freed)
{
    for (int i = 0; i < 3; ++i) {
        LocalTensor<float> a = bench.load();
        if (!bad) {
            bench.in.FreeTensor(a);
        }
    }
    bench.save_zeros();
}

DEFECT(last_one_never_freed)
{
    LocalTensor<float> a = bench.load();
    if (!bad) {
        bench.in.FreeTensor(a);
    }
    bench.save_zeros();
}

DEFECT(freed_twice)
{
    LocalTensor<float> a = bench.load();
    bench.in.FreeTensor(a);
    if (bad) {
        bench.in.FreeTensor(a);
    }
    bench.save_zeros();
}

DEFECT(freed_in_the_queue)
{
    LocalTensor<float> a = bench.in.AllocTensor<float>();
    DataCopy(a, bench.x, kCount);
    bench.in.EnQue(a);
    if (!bad) {
        a = bench.in.DeQue<float>();
    }
    bench.in.FreeTensor(a);
    bench.save_zeros();
}

DEFECT(another_queue)
{
    LocalTensor<float> a = bench.load();
    if (bad) {
        bench.out.FreeTensor(a);
    } else {
        bench.in.FreeTensor(a);
    }
    bench.save_zeros();
}

DEFECT(used_after_free)
{
    LocalTensor<float> a = bench.load();
    if (bad) {
        bench.in.FreeTensor(a);
    }
    Adds(bench.scratch(0), a, 1.0f, kCount);
    if (!bad) {
        bench.in.FreeTensor(a);
    }
    bench.save_zeros();
}

DEFECT(queue_without_buffers)
{
    TQue<QuePosition::VECIN, 1> other;
    if (!bad) {
        bench.pipe.InitBuffer(other, 1, 32);
    }
    LocalTensor<float> a = other.AllocTensor<float>();
    other.FreeTensor(a);
    bench.save_zeros();
}

DEFECT(queue_deeper_than_said)
{
    TQue<QuePosition::VECIN, 1> other;
    bench.pipe.InitBuffer(other, 2, 32);
    const int buffers = bad ? 2 : 1;
    for (int i = 0; i < buffers; ++i) {
        LocalTensor<float> a = other.AllocTensor<float>();
        DataCopy(a, bench.x, 8);
        other.EnQue(a);
    }
    for (int i = 0; i < buffers; ++i) {
        LocalTensor<float> a = other.DeQue<float>();
        other.FreeTensor(a);
    }
    bench.save_zeros();
}

DEFECT(too_many_events)
{
    TQue<QuePosition::VECIN, 9> wide;
    bench.pipe.InitBuffer(wide, 9, 32);
    const int buffers = bad ? 9 : 8;
    for (int i = 0; i < buffers; ++i) {
        LocalTensor<float> a = wide.AllocTensor<float>();
        DataCopy(a, bench.x, 8);
        wide.EnQue(a);
    }
    for (int i = 0; i < buffers; ++i) {
        LocalTensor<float> a = wide.DeQue<float>();
        wide.FreeTensor(a);
    }
    bench.save_zeros();
}

DEFECT(wait_without_set)
{
    if (!bad) {
        SetFlag<HardEvent::V_S>(EVENT_ID0);
    }
    WaitFlag<HardEvent::V_S>(EVENT_ID0);
    bench.save_zeros();
}

DEFECT(set_twice)
{
    SetFlag<HardEvent::V_S>(EVENT_ID1);
    if (bad) {
        SetFlag<HardEvent::V_S>(EVENT_ID1);
    }
    WaitFlag<HardEvent::V_S>(EVENT_ID1);
    bench.save_zeros();
}

DEFECT(set_and_forgotten)
{
    SetFlag<HardEvent::V_S>(EVENT_ID2);
    if (!bad) {
        WaitFlag<HardEvent::V_S>(EVENT_ID2);
    }
    bench.save_zeros();
}

DEFECT(event_id_out_of_range)
{
    const int id = bad ? 8 : 7;
    SetFlag<HardEvent::V_S>(id);
    WaitFlag<HardEvent::V_S>(id);
    bench.save_zeros();
}

DEFECT(event_not_released)
{
    const TEventID id = bench.pipe.AllocEventID<HardEvent::V_S>();
    if (!bad) {
        bench.pipe.ReleaseEventID<HardEvent::V_S>(id);
    }
    bench.save_zeros();
}

DEFECT(event_released_twice)
{
    const TEventID id = bench.pipe.AllocEventID<HardEvent::V_S>();
    bench.pipe.ReleaseEventID<HardEvent::V_S>(id);
    if (bad) {
        bench.pipe.ReleaseEventID<HardEvent::V_S>(id);
    }
    bench.save_zeros();
}

DEFECT(event_released_while_set)
{
    const TEventID id = bench.pipe.AllocEventID<HardEvent::V_S>();
    SetFlag<HardEvent::V_S>(id);
    if (bad) {
        bench.pipe.ReleaseEventID<HardEvent::V_S>(id);
    }
    WaitFlag<HardEvent::V_S>(id);
    bench.pipe.ReleaseEventID<HardEvent::V_S>(id);
    bench.save_zeros();
}

// The queue's release of its buffer needs the id that was only looked up.
DEFECT(fetched_id_taken_by_a_queue)
{
    LocalTensor<float> a = bench.load();
    const TEventID id = bench.pipe.FetchEventID(HardEvent::V_MTE2);
    if (!bad) {
        bench.in.FreeTensor(a);
    }
    const TEventID used = bad ? id : bench.pipe.FetchEventID(HardEvent::V_MTE2);
    SetFlag<HardEvent::V_MTE2>(used);
    if (bad) {
        bench.in.FreeTensor(a);
    }
    WaitFlag<HardEvent::V_MTE2>(used);
    bench.save_zeros();
}

DEFECT(read_after_write_in_v)
{
    Duplicate(bench.scratch(0), 1.0f, kCount);
    if (!bad) {
        PipeBarrier<PIPE_V>();
    }
    Adds(bench.scratch(1), bench.scratch(0), 1.0f, kCount);
    bench.save_zeros();
}

DEFECT(write_after_write_in_v)
{
    Duplicate(bench.scratch(0), 1.0f, kCount);
    if (!bad) {
        PipeBarrier<PIPE_V>();
    }
    Duplicate(bench.scratch(0), 2.0f, kCount);
    bench.save_zeros();
}

DEFECT(compute_before_load)
{
    DataCopy(bench.scratch(0), bench.x, kCount);
    if (!bad) {
        wait_here<HardEvent::MTE2_V>(bench.pipe);
    }
    Adds(bench.scratch(1), bench.scratch(0), 1.0f, kCount);
    bench.save_zeros();
}

DEFECT(store_before_compute)
{
    Duplicate(bench.scratch(0), 1.0f, kCount);
    if (!bad) {
        wait_here<HardEvent::V_MTE3>(bench.pipe);
    }
    DataCopy(bench.y, bench.scratch(0), kCount);
}

DEFECT(overwrite_before_store)
{
    Duplicate(bench.scratch(0), 1.0f, kCount);
    wait_here<HardEvent::V_MTE3>(bench.pipe);
    DataCopy(bench.y, bench.scratch(0), kCount);
    PipeBarrier<PIPE_V>();
    if (!bad) {
        wait_here<HardEvent::MTE3_V>(bench.pipe);
    }
    Duplicate(bench.scratch(0), 2.0f, kCount);
}

DEFECT(reload_before_compute)
{
    DataCopy(bench.scratch(0), bench.x, kCount);
    wait_here<HardEvent::MTE2_V>(bench.pipe);
    Adds(bench.scratch(1), bench.scratch(0), 1.0f, kCount);
    if (!bad) {
        wait_here<HardEvent::V_MTE2>(bench.pipe);
    }
    DataCopy(bench.scratch(0), bench.x, kCount);
    bench.save_zeros();
}

DEFECT(vector_before_scalar)
{
    bench.scratch(0).SetValue(0, 1.0f);
    if (!bad) {
        wait_here<HardEvent::S_V>(bench.pipe);
    }
    Adds(bench.scratch(1), bench.scratch(0), 1.0f, 1);
    bench.save_zeros();
}

DEFECT(scalar_before_vector)
{
    Duplicate(bench.scratch(0), 1.0f, kCount);
    if (!bad) {
        wait_here<HardEvent::V_S>(bench.pipe);
    }
    bench.scratch(0).GetValue(0);
    bench.save_zeros();
}

// The prototype's find: a scalar fills a buffer again that MTE3 may still be reading.
DEFECT(scalar_overwrites_before_store)
{
    LocalTensor<float> a = bench.scratch(0);
    for (uint32_t round = 0; round < 2; ++round) {
        for (uint32_t i = 0; i < kCount; ++i) {
            a.SetValue(i, 1.0f);
        }
        wait_here<HardEvent::S_MTE3>(bench.pipe);
        DataCopy(bench.y, a, kCount);
        if (!bad) {
            wait_here<HardEvent::MTE3_S>(bench.pipe);
        }
    }
}

// A wait of one pipe says nothing about another: V waits, MTE3 reads.
DEFECT(the_wrong_pipe_waits)
{
    DataCopy(bench.scratch(0), bench.x, kCount);
    if (bad) {
        wait_here<HardEvent::MTE2_V>(bench.pipe);
    } else {
        wait_here<HardEvent::MTE2_MTE3>(bench.pipe);
    }
    DataCopy(bench.y, bench.scratch(0), kCount);
}

DEFECT(load_before_own_store)
{
    bench.save_zeros();
    if (!bad) {
        wait_here<HardEvent::MTE3_MTE2>(bench.pipe);
    }
    DataCopy(bench.scratch(0), bench.y, kCount);
}

DEFECT(scalar_load_before_own_store)
{
    bench.save_zeros();
    if (!bad) {
        wait_here<HardEvent::MTE3_S>(bench.pipe);
    }
    bench.y.GetValue(0);
}

DEFECT(atomic_left_on)
{
    bench.save_zeros();
    SetAtomicAdd<float>();
    if (!bad) {
        SetAtomicNone();
    }
}

// With two blocks: both write the same bytes, or each its half.
DEFECT(two_blocks_write)
{
    const uint32_t half_count = kCount / 2;
    const uint32_t first = static_cast<uint32_t>(GetBlockIdx()) * half_count;
    Duplicate(bench.scratch(0), 1.0f, kCount);
    wait_here<HardEvent::V_MTE3>(bench.pipe);
    DataCopy(bench.y[bad ? 0 : first], bench.scratch(0), bad ? kCount : half_count);
}

DEFECT(read_without_sync_all)
{
    const uint32_t half_count = kCount / 2;
    const uint32_t block = static_cast<uint32_t>(GetBlockIdx());
    Duplicate(bench.scratch(0), 1.0f, kCount);
    wait_here<HardEvent::V_MTE3>(bench.pipe);
    DataCopy(bench.y[block * half_count], bench.scratch(0), half_count);
    if (!bad) {
        SyncAll();
    }
    if (block == 1) {
        PipeBarrier<PIPE_ALL>();
        DataCopy(bench.scratch(1), bench.y, half_count);
    }
}

DEFECT(sync_all_in_a_kernel_of_vector_cores_alone)
{
    KERNEL_TASK_TYPE_DEFAULT(bad ? KERNEL_TYPE_AIV_ONLY : KERNEL_TYPE_MIX_AIV_1_0);
    Duplicate(bench.scratch(0), 1.0f, kCount);
    wait_here<HardEvent::V_MTE3>(bench.pipe);
    SyncAll();
    DataCopy(bench.y, bench.scratch(0), kCount);
}

DEFECT(sync_all_without_a_block)
{
    const uint32_t half_count = kCount / 2;
    const uint32_t block = static_cast<uint32_t>(GetBlockIdx());
    Duplicate(bench.scratch(0), 1.0f, kCount);
    wait_here<HardEvent::V_MTE3>(bench.pipe);
    DataCopy(bench.y[block * half_count], bench.scratch(0), half_count);
    if (!bad || block == 0) {
        SyncAll();
    }
}

// The handle of an earlier round, after its buffer went round the queue once more.
DEFECT(handle_of_an_earlier_round)
{
    LocalTensor<float> old = bench.load();
    LocalTensor<float> again = old;
    bench.in.FreeTensor(old);
    LocalTensor<float> second = bench.load();
    bench.in.FreeTensor(second);
    LocalTensor<float> third = bench.load();  // the buffer of the first
    if (bad) {
        bench.in.FreeTensor(again);
    } else {
        bench.in.FreeTensor(third);
    }
    bench.save_zeros();
}

DEFECT(atomic_of_a_type_that_cannot_add)
{
    bench.save_zeros();
    PipeBarrier<PIPE_ALL>();
    SetAtomicAdd<float>();
    if (bad) {
        GlobalTensor<uint32_t> bits;
        bits.SetGlobalBuffer(reinterpret_cast<uint32_t*>(bench.y_bytes), kCount);
        Duplicate(bench.scratch<uint32_t>(0), 1u, kCount);
        PipeBarrier<PIPE_ALL>();
        DataCopy(bits, bench.scratch<uint32_t>(0), kCount);
    }
    SetAtomicNone();
}
