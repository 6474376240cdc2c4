"""Every rule of the twin, with a kernel that breaks it: caught, by name; and, mended, it passes.

The kernels are in ``kernels/defects_*.cpp``; each is right or wrong by its tiling data, so that
what is caught can only be the one thing that differs.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from kernels.support.twin import TwinError

CAUGHT = {
    # bounds, alignment, lengths
    "load_length": "DataCopy GM->UB: a length of 248 bytes is not a multiple of 32",
    "store_length": "DataCopy UB->GM: a length of 252 bytes is not a multiple of 32",
    "vector_alignment": r"Duplicate: UB address \d+ is not aligned to 32 bytes",
    "dma_alignment": r"DataCopy GM->UB: UB address \d+ is not aligned to 32 bytes",
    "global_alignment": "DataCopy GM->UB: global address is not aligned to its element of 4 bytes",
    "ub_overflow": r"InitBuffer: UB overflow, the buffers take \d+ bytes and the budget is 188416",
    "empty_buffer": "InitBuffer: a buffer of 0 bytes",
    "many_buffers": "InitBuffer: more than 64 buffers",
    "vector_past_buffer": "Duplicate: elements 0 to 72 leave the buffer of 64 elements",
    "scalar_past_buffer": "SetValue: elements 64 to 65 leave the buffer of 64 elements",
    "offset_past_buffer": "LocalTensor: offset 65 is past its 64 elements",
    "view_past_buffer": "TBuf::Get: 1028 bytes at 0 leave its buffer of 1024",
    "buffer_never_initialised": "TBuf::Get: the buffer was never initialised",
    "load_past_view": "256 bytes at element 0 leave the GlobalTensor of 56 elements",
    "load_past_tensor": "256 bytes at byte 32 of i0 .256 bytes. are outside every global tensor",
    "store_past_tensor": "8 bytes at byte 252 of o1 .256 bytes. are outside every global tensor",
    "global_scalar_past_tensor": "GetValue: 4 bytes at element 64 leave the GlobalTensor of 64",
    "write_to_input": "SetValue: writes to i0, which is an input",
    "burst_cuts_an_element": "DataCopyPad GM->UB: blockLen 6 cuts an element",
    "no_bursts": "DataCopyPad GM->UB: blockCount 0 is not in 1 to 4095",
    "empty_burst": "DataCopyPad GM->UB: blockLen 0 is not in 1 to 2097151",
    "wide_padding": "DataCopyPad GM->UB: more than 32 bytes of padding",
    "burst_starts_inside_an_element": "GM->UB: a burst starts inside an element of global memory",
    "stored_burst_starts_inside_an_element": "UB->GM: a burst starts inside an element of global",
    # values nobody has written
    "uninitialised_ub": r"Adds: reads UB byte \d+, which nobody has written",
    "uninitialised_scalar": r"GetValue: reads UB byte \d+, which nobody has written",
    "uninitialised_padding": r"Adds: reads UB byte 20, which nobody has written",
    "stale_queue_buffer": r"Adds: reads UB byte 0, which nobody has written",
    "uninitialised_workspace": "GM->UB: reads byte 0 of workspace, which nobody has written",
    "output_left_unwritten": "output o1: byte 252 of 256 was never written",
    # queues
    "enque_twice": r"EnQue: the tensor is not allocated \(still in the queue\)",
    "deque_empty": r"DeQue: the queue is empty \(missing EnQue",
    "never_freed": r"AllocTensor: all 2 buffers of the queue are in use \(missing FreeTensor\)",
    "last_one_never_freed": "buffer 0 of UB: not given back by FreeTensor",
    "freed_twice": "FreeTensor: the tensor is free already",
    "freed_in_the_queue": "FreeTensor: the tensor is still in the queue",
    "another_queue": "FreeTensor: the tensor belongs to another queue",
    "used_after_free": "Adds: the tensor is used after FreeTensor",
    "handle_of_an_earlier_round": "FreeTensor: the tensor was freed and its buffer allocated anew",
    "queue_without_buffers": "AllocTensor: the queue was never given buffers",
    "queue_deeper_than_said": "EnQue: more than 1 tensors in a queue of depth 1",
    # events
    "too_many_events": "all 8 event ids of MTE2_V are in use",
    "wait_without_set": "WaitFlag V_S id 0: no SetFlag before it",
    "set_twice": "SetFlag V_S id 1: set twice",
    "set_and_forgotten": "SetFlag V_S id 2: still set at the end of the kernel",
    "event_id_out_of_range": "event id 8 of V_S: must be 0 to 7",
    "event_not_released": "AllocEventID V_S id 0: not released",
    "event_released_twice": "ReleaseEventID: event id 0 of V_S was not allocated",
    "event_released_while_set": "ReleaseEventID: event id 0 of V_S was set and is not waited for",
    "fetched_id_taken_by_a_queue": "V_MTE2 is in use by SetFlag but not reserved: FetchEventID",
    # hazards between pipes
    "read_after_write_in_v": r"Adds: hazard, read after write: .*needs PipeBarrier<PIPE_V>",
    "write_after_write_in_v": r"Duplicate: hazard, write after write: .*needs PipeBarrier<PIPE_V>",
    "compute_before_load": "Adds: hazard, read after write: pipe V does not wait for pipe MTE2",
    "store_before_compute": "UB->GM: hazard, read after write: pipe MTE3 does not wait for pipe V",
    "overwrite_before_store": "Duplicate: hazard, write after read: pipe V does not wait .* MTE3",
    "reload_before_compute": "GM->UB: hazard, write after read: pipe MTE2 does not wait .* pipe V",
    "vector_before_scalar": "Adds: hazard, read after write: pipe V does not wait for pipe S",
    "scalar_before_vector": "GetValue: hazard, read after write: pipe S does not wait for pipe V",
    "scalar_overwrites_before_store": "SetValue: hazard, write after read: pipe S .* pipe MTE3",
    "the_wrong_pipe_waits": "hazard, read after write: pipe MTE3 does not wait for pipe MTE2",
    "load_before_own_store": "hazard in global memory: pipe MTE2 .* own store on pipe MTE3",
    "scalar_load_before_own_store": "hazard in global memory: pipe S .* own store on pipe MTE3",
    "atomic_left_on": "SetAtomicAdd: still on at the end",
    "atomic_of_a_type_that_cannot_add": "SetAtomicAdd: this type cannot be added",
    # between blocks
    "two_blocks_write": r"race between blocks \d \(writes\) and \d \(writes\) at byte 0 of o1",
    "read_without_sync_all": r"race between blocks 0 \(writes\) and 1 \(reads\)|"
    r"race between blocks 1 \(reads\) and 0 \(writes\)",
    "sync_all_in_a_kernel_of_vector_cores_alone": "SyncAll: a kernel of type KERNEL_TYPE_AIV_ONLY",
    "sync_all_without_a_block": "SyncAll: block 0 waits for block 1, which has ended",
    # single instructions
    "partial_overlap": "Adds: source and destination overlap without coinciding",
    "gather_offset_inside_an_element": "Gather: offset 6 of element 0 is not a multiple of 4",
    "gather_past_buffer": "Gather: elements 64 to 65 leave the buffer",
    "compare_part_of_a_repeat": "CompareScalar: 128 bytes are not whole repeats of 256 bytes",
    "compare_integers": "Compare: int32 can only be compared by EQ",
    "compare_with_a_mask": "Compare: in the repeat form the mask must cover all 64 elements",
    "select_mode": "Select: with a scalar the mode is VSEL_TENSOR_SCALAR_MODE",
    "select_two_tensors_by_scalar": "Select: VSEL_TENSOR_SCALAR_MODE takes a scalar",
    "gather_mask_without_counter": "GatherMask: the twin knows counter mode",
    "mask_too_wide": "Duplicate: mask 65 is not in 1 to 64",
    "repeats_past_buffer": "Duplicate: elements 256 to 264 leave the buffer of 256",
    "reduce_repeats": "WholeReduceSum: repeatTimes 256 is not in 0 to 255",
    "cast_mode": "Cast: RoundMode 0 does not exist for this pair of types",
    # the mask register
    "mask_left_set": "SetVectorMask: still set at the end of the kernel .missing ResetMask",
    "counter_mode_left_on": "SetMaskCount: still on at the end of the kernel .missing SetMaskNorm",
    "mask_lost": "Duplicate: sets its own mask and loses that of SetVectorMask",
    "count_in_counter_mode": "Duplicate: sets its own mask while SetMaskCount is on",
    "mask_of_another_instruction": "Adds: isSetMask is false, but since .* Duplicate has set",
    "mask_of_another_mode": "SetVectorMask: MaskMode::COUNTER after SetMaskNorm",
    "mask_with_a_gap": "Adds: the twin knows masks of the first lanes only",
    "mask_of_too_many": "SetVectorMask: 65 elements is not in 1 to 64",
    "counter_past_buffer": "Adds: elements 64 to 65 leave the buffer of 64 elements",
    "tensor_without_a_buffer": "Duplicate: the LocalTensor was never given a buffer",
}
TWO_BLOCKS = {"two_blocks_write", "read_without_sync_all", "sync_all_without_a_block"}


def run(lab, kernel, bad):
    x = np.arange(64, dtype=np.float32)
    y, workspace = np.empty(64, np.float32), np.empty(64, np.float32)
    blocks = 2 if kernel in TWO_BLOCKS else 1
    return lab(kernel, ("i", x), ("o", y), ("w", workspace), n=int(bad), blocks=blocks)


@pytest.mark.parametrize("kernel", CAUGHT)
def test_a_planted_defect_is_caught_and_its_mended_twin_passes(lab, kernel):
    run(lab, kernel, bad=False)
    with pytest.raises(TwinError, match=CAUGHT[kernel]) as caught:
        run(lab, kernel, bad=True)
    assert str(caught.value).startswith(f"{kernel}: ")


def test_every_planted_defect_is_tested():
    planted = set()
    for path in (Path(__file__).parent / "kernels").glob("defects_*.cpp"):
        planted |= set(re.findall(r"^DEFECT\((\w+)\)", path.read_text(), re.MULTILINE))
    assert planted == set(CAUGHT)


def test_a_message_names_kernel_and_block(lab):
    with pytest.raises(TwinError, match=r"^vector_alignment: block 0 of 1: Duplicate: "):
        run(lab, "vector_alignment", bad=True)


def test_an_unknown_kernel(lab):
    with pytest.raises(TwinError, match="no kernel nobody in this library"):
        lab("nobody")


def test_tiling_data_of_another_size(lab):
    with pytest.raises(TwinError, match="wrote 0 bytes, the kernel reads 4"):
        lab.library.launch("flags", [("o", np.empty(16, np.float32))], tiling=b"")


def test_a_missing_argument(lab):
    with pytest.raises(TwinError, match="takes 3 addresses, the operator has 2"):
        lab("flags")


def test_the_twin_survives_a_violation(lab):
    """A failed launch leaves nothing behind that would disturb the next one."""
    for _ in range(3):
        with pytest.raises(TwinError):
            run(lab, "sync_all_without_a_block", bad=True)
        run(lab, "sync_all_without_a_block", bad=False)
