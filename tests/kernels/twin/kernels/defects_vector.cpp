// Rules of single vector instructions.
#include "lab.h"

using namespace lab;

DEFECT(partial_overlap)
{
    Duplicate(bench.scratch(0), 1.0f, kCount);
    PipeBarrier<PIPE_V>();
    Adds(bench.buffer.Get<float>()[bad ? 8 : 64], bench.scratch(0), 1.0f, kCount);
    bench.save_zeros();
}

DEFECT(gather_offset_inside_an_element)
{
    Duplicate(bench.scratch(0), 1.0f, kCount);
    Duplicate(bench.scratch<uint32_t>(1), bad ? 6u : 4u, 8);
    PipeBarrier<PIPE_V>();
    Gather(bench.scratch(2), bench.scratch(0), bench.scratch<uint32_t>(1), 0, 8);
    bench.save_zeros();
}

DEFECT(gather_past_buffer)
{
    Duplicate(bench.scratch(0), 1.0f, kCount);
    Duplicate(bench.scratch<uint32_t>(1), bad ? 256u : 252u, 8);
    PipeBarrier<PIPE_V>();
    Gather(bench.scratch(2), bench.scratch(0), bench.scratch<uint32_t>(1), 0, 8);
    bench.save_zeros();
}

DEFECT(compare_part_of_a_repeat)
{
    Duplicate(bench.scratch(0), 1.0f, kCount);
    PipeBarrier<PIPE_V>();
    CompareScalar(bench.scratch<uint8_t>(1), bench.scratch(0), 1.0f, CMPMODE::EQ, bad ? 32 : 64);
    bench.save_zeros();
}

DEFECT(compare_integers)
{
    Duplicate(bench.scratch<int32_t>(0), 1, kCount);
    PipeBarrier<PIPE_V>();
    Compare(bench.scratch<uint8_t>(1), bench.scratch<int32_t>(0), bench.scratch<int32_t>(0),
            bad ? CMPMODE::LT : CMPMODE::EQ, kCount);
    bench.save_zeros();
}

DEFECT(compare_with_a_mask)
{
    Duplicate(bench.scratch(0), 1.0f, kCount);
    PipeBarrier<PIPE_V>();
    Compare(bench.scratch<uint8_t>(1), bench.scratch(0), bench.scratch(0), CMPMODE::EQ,
            static_cast<uint64_t>(bad ? 8 : 64), 1, {});
    bench.save_zeros();
}

DEFECT(select_mode)
{
    Duplicate(bench.scratch(0), 1.0f, kCount);
    PipeBarrier<PIPE_V>();
    CompareScalar(bench.scratch<uint8_t>(1), bench.scratch(0), 1.0f, CMPMODE::EQ, 64);
    PipeBarrier<PIPE_V>();
    const SELMODE mode = bad ? SELMODE::VSEL_TENSOR_TENSOR_MODE : SELMODE::VSEL_TENSOR_SCALAR_MODE;
    Select(bench.scratch(2), bench.scratch<uint8_t>(1), bench.scratch(0), 0.0f, mode, kCount);
    bench.save_zeros();
}

DEFECT(mask_too_wide)
{
    Duplicate(bench.scratch(0), 1.0f, static_cast<uint64_t>(bad ? 65 : 64), 1, 1, 8);
    bench.save_zeros();
}

DEFECT(repeats_past_buffer)
{
    Duplicate(bench.buffer.Get<float>(), 1.0f, 64ull, bad ? 5 : 4, 1, 8);
    bench.save_zeros();
}

DEFECT(reduce_repeats)
{
    Duplicate(bench.scratch(0), 1.0f, kCount);
    PipeBarrier<PIPE_V>();
    WholeReduceSum(bench.scratch(1), bench.scratch(0), 64, bad ? 256 : 1, 1, 1, 0);
    bench.save_zeros();
}

DEFECT(cast_mode)
{
    Duplicate(bench.scratch(0), 1.0f, kCount);
    PipeBarrier<PIPE_V>();
    Cast(bench.scratch<int32_t>(1), bench.scratch(0),
         bad ? RoundMode::CAST_NONE : RoundMode::CAST_RINT, kCount);
    bench.save_zeros();
}

DEFECT(tensor_without_a_buffer)
{
    LocalTensor<float> nothing;
    if (!bad) {
        nothing = bench.scratch(0);
    }
    Duplicate(nothing, 1.0f, 8);
    bench.save_zeros();
}

DEFECT(gather_mask_without_counter)
{
    Duplicate(bench.scratch(0), 1.0f, kCount);
    Duplicate(bench.scratch<uint32_t>(1), 0xffffffffu, 8);
    PipeBarrier<PIPE_V>();
    uint64_t found = 0;
    GatherMask(bench.scratch(2), bench.scratch(0), bench.scratch<uint32_t>(1), !bad, kCount,
               {1, 1, 8, 8}, found);
    bench.save_zeros();
}

DEFECT(select_two_tensors_by_scalar)
{
    Duplicate(bench.scratch(0), 1.0f, kCount);
    Duplicate(bench.scratch<uint16_t>(1), static_cast<uint16_t>(0), 16);
    PipeBarrier<PIPE_V>();
    const SELMODE mode = bad ? SELMODE::VSEL_TENSOR_SCALAR_MODE : SELMODE::VSEL_TENSOR_TENSOR_MODE;
    Select(bench.scratch(2), bench.scratch<uint8_t>(1), bench.scratch(0), bench.scratch(0), mode,
           kCount);
    bench.save_zeros();
}

// y = x + 1 in the lanes that the mask register says; the rest of `part` keeps what it held.
static void add_one(lab::Bench& bench, uint32_t part, uint8_t repeats)
{
    Adds<float, false>(bench.scratch(part), bench.scratch(0), 1.0f, MASK_PLACEHOLDER, repeats,
                       {1, 1, 8, 8});
}

static void ones(lab::Bench& bench)
{
    Duplicate(bench.scratch(0), 1.0f, kCount);
    PipeBarrier<PIPE_V>();
}

DEFECT(mask_left_set)
{
    ones(bench);
    bench.save_zeros();
    SetVectorMask<float>(16);
    add_one(bench, 1, 1);
    if (!bad) {
        ResetMask();
    }
}

DEFECT(counter_mode_left_on)
{
    ones(bench);
    bench.save_zeros();
    SetMaskCount();
    SetVectorMask<float, MaskMode::COUNTER>(40);
    add_one(bench, 1, 1);
    if (!bad) {
        SetMaskNorm();
    }
    ResetMask();
}

DEFECT(mask_lost)
{
    ones(bench);
    SetVectorMask<float>(16);
    add_one(bench, 1, 1);
    if (!bad) {
        ResetMask();
    }
    bench.save_zeros();
}

DEFECT(count_in_counter_mode)
{
    ones(bench);
    SetMaskCount();
    if (!bad) {
        SetMaskNorm();
    }
    bench.save_zeros();
    SetMaskNorm();
}

DEFECT(mask_of_another_instruction)
{
    ones(bench);
    if (!bad) {
        ResetMask();
    }
    add_one(bench, 1, 1);
    bench.save_zeros();
}

DEFECT(mask_of_another_mode)
{
    ones(bench);
    if (!bad) {
        SetMaskCount();
    }
    SetVectorMask<float, MaskMode::COUNTER>(40);
    add_one(bench, 1, 1);
    SetMaskNorm();
    ResetMask();
    bench.save_zeros();
}

DEFECT(mask_with_a_gap)
{
    ones(bench);
    SetVectorMask<float>(0, bad ? 5 : 7);
    add_one(bench, 1, 1);
    ResetMask();
    bench.save_zeros();
}

DEFECT(mask_of_too_many)
{
    SetVectorMask<float>(bad ? 65 : 64);
    ResetMask();
    bench.save_zeros();
}

DEFECT(counter_past_buffer)
{
    ones(bench);
    SetMaskCount();
    SetVectorMask<float, MaskMode::COUNTER>(bad ? 65 : 64);
    add_one(bench, 1, 1);
    SetMaskNorm();
    ResetMask();
    bench.save_zeros();
}
