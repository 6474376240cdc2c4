// MoeExpertCapacity: every choice gets the next free place of its expert until the expert is full.
//
//   expanded_row_idx[t * K + k] = e * C + place, or -1 for a choice that found its expert full;
//   slot_src[e * C + place]     = t * K + k, or -1 for an empty place;
//   expert_tokens_before_capacity[e] = choices of e, with or without a place.
//
// One queue serves token by token (token-major); a queue per choice serves all first choices before
// any second (choice-major). Blocks share the tokens, see moe_expert_queues.h.
#include "moe_expert_queues.h"
#include "moe_tiling_keys.h"

namespace moe {
template <bool QUEUE_PER_CHOICE>
class ExpertCapacity {
public:
    __aicore__ inline void Init(GM_ADDR expertIdx, GM_ADDR expandedRowIdx, GM_ADDR slotSrc,
        GM_ADDR expertTokens, GM_ADDR workspace, const MoeExpertCapacityTilingData& tiling)
    {
        queues_ = tiling.queues;
        experts_ = tiling.experts;
        capacity_ = tiling.capacity;
        tile_ = tiling.tile;
        expandedRowIdx_.SetGlobalBuffer((__gm__ int32_t*)expandedRowIdx, tiling.items * queues_);
        expertTokens_.SetGlobalBuffer((__gm__ int32_t*)expertTokens, experts_);
        places_.Init(pipe_, expertIdx, slotSrc, experts_ * capacity_, workspace,
            {tiling.items, 1, queues_, experts_, tile_, tiling.groups, tiling.countRows});
        const uint32_t tileBytes = tile_ * queues_ * sizeof(int32_t);
        pipe_.InitBuffer(rowQueue_, DOUBLE_BUFFER, tileBytes);
        pipe_.InitBuffer(tokensOut_, places_.ExpertsPad() * sizeof(int32_t));
        pipe_.InitBuffer(scratch_, tile_ * sizeof(float));
        if constexpr (QUEUE_PER_CHOICE) {
            pipe_.InitBuffer(rows_, tileBytes);
            pipe_.InitBuffer(offsetsOut_, tileBytes);
            pipe_.InitBuffer(wide_, tileBytes);
            pipe_.InitBuffer(wideReal_, tileBytes);
        }
    }

    __aicore__ inline void Process()
    {
        if constexpr (QUEUE_PER_CHOICE) {
            const uint32_t count = tile_ * queues_;
            LocalTensor<int32_t> out = offsetsOut_.Get<int32_t>();
            TransposedIndex(
                out, wide_.Get<int32_t>(), wideReal_.Get<float>(), count, queues_, tile_);
            ToByteOffsets(out, count);
        }
        places_.Open();
        places_.Begin();
        WriteExpertTokens();
        const Range share = places_.Share();
        for (uint32_t first = share.begin; first < share.end; first += tile_) {
            Place(first, Smaller(tile_, share.end - first));
        }
    }

private:
    __aicore__ inline void WriteExpertTokens()
    {
        const uint32_t blocks = static_cast<uint32_t>(GetBlockNum());
        const uint32_t block = static_cast<uint32_t>(GetBlockIdx());
        LocalTensor<int32_t> tokens = tokensOut_.Get<int32_t>();
        Cast(tokens, places_.Totals(), RoundMode::CAST_RINT, places_.ExpertsPad());
        Sync<HardEvent::V_MTE3>();
        Sync<HardEvent::V_S>();
        if (block == 0) {
            Store(expertTokens_, tokens, experts_);
        }
        // the empty places of every blocks-th expert: behind its last choice
        for (uint32_t expert = block; expert < experts_; expert += blocks) {
            places_.WriteEmpty(expert * capacity_ + static_cast<uint32_t>(tokens.GetValue(expert)),
                (expert + 1) * capacity_);
        }
    }

    // (3) Places for the choices of one tile.
    __aicore__ inline void Place(uint32_t first, uint32_t items)
    {
        LocalTensor<int32_t> in = places_.ReadTile(first, items);
        LocalTensor<int32_t> rows = rowQueue_.template AllocTensor<int32_t>();
        for (uint32_t queue = 0; queue < queues_; ++queue) {
            places_.Take(in, queue);
            places_.WriteSources(first, queue, capacity_, capacity_);
            const LocalTensor<float> numbers = places_.Number(queue);
            if constexpr (QUEUE_PER_CHOICE) {
                WriteRows(rows_.Get<int32_t>()[queue * tile_], numbers);
            } else {
                WriteRows(rows, numbers);
            }
        }
        places_.Free(in);
        if constexpr (QUEUE_PER_CHOICE) {
            Gather(rows, rows_.Get<int32_t>(), offsetsOut_.Get<uint32_t>(), 0U, items * queues_);
            VectorBarrier();
        }
        rowQueue_.EnQue(rows);
        rows = rowQueue_.template DeQue<int32_t>();
        Store(expandedRowIdx_[first * queues_], rows, items * queues_);
        rowQueue_.FreeTensor(rows);
    }

    // dst = expert * C + place - 1 where 1 <= place <= C, -1 elsewhere.
    __aicore__ inline void WriteRows(
        const LocalTensor<int32_t>& dst, const LocalTensor<float>& places)
    {
        const int32_t n = static_cast<int32_t>(tile_);
        LocalTensor<float> scratch = scratch_.Get<float>();
        LocalTensor<uint8_t> bits = places_.Bits();
        LocalTensor<int32_t> integers = places_.Integers();
        CompareScalar(
            bits, places, static_cast<float>(capacity_) + 0.5f, CMPMODE::LT, tile_);
        VectorBarrier();
        Select(places, bits, places, 0.0f, SELMODE::VSEL_TENSOR_SCALAR_MODE, tile_);
        VectorBarrier();
        CompareScalar(bits, places, 0.5f, CMPMODE::GT, tile_);
        VectorBarrier();
        // without a place the expert is taken for 0: 0 * C + 0 - 1 = -1
        Select(scratch, bits, places_.Known(), 0.0f, SELMODE::VSEL_TENSOR_SCALAR_MODE,
            tile_);
        VectorBarrier();
        Cast(dst, scratch, RoundMode::CAST_RINT, tile_);
        Cast(integers, places, RoundMode::CAST_RINT, tile_);
        VectorBarrier();
        Muls(dst, dst, static_cast<int32_t>(capacity_), n);
        VectorBarrier();
        Add(dst, dst, integers, n);
        VectorBarrier();
        Adds(dst, dst, -1, n);
        VectorBarrier();
    }

    TPipe pipe_;
    ExpertQueues<QUEUE_PER_CHOICE> places_;
    TQue<TPosition::VECOUT, DOUBLE_BUFFER> rowQueue_;
    TBuf<TPosition::VECCALC> tokensOut_;   // [experts]
    TBuf<TPosition::VECCALC> scratch_;     // [tile]
    TBuf<TPosition::VECCALC> rows_;        // [queues, tile]
    TBuf<TPosition::VECCALC> offsetsOut_;  // [tile, queues]
    TBuf<TPosition::VECCALC> wide_;        // [tile, queues]
    TBuf<TPosition::VECCALC> wideReal_;    // [tile, queues]
    GlobalTensor<int32_t> expandedRowIdx_;
    GlobalTensor<int32_t> expertTokens_;
    uint32_t queues_ = 0;
    uint32_t experts_ = 0;
    uint32_t capacity_ = 0;
    uint32_t tile_ = 0;
};

template <bool QUEUE_PER_CHOICE>
__aicore__ inline void RunExpertCapacity(GM_ADDR expertIdx, GM_ADDR expandedRowIdx,
    GM_ADDR slotSrc, GM_ADDR expertTokens, GM_ADDR workspace,
    const MoeExpertCapacityTilingData& tiling)
{
    ExpertCapacity<QUEUE_PER_CHOICE> op;
    op.Init(expertIdx, expandedRowIdx, slotSrc, expertTokens, workspace, tiling);
    op.Process();
}
}  // namespace moe

extern "C" __global__ __aicore__ void moe_expert_capacity(GM_ADDR expert_idx,
    GM_ADDR expanded_row_idx, GM_ADDR slot_src, GM_ADDR expert_tokens_before_capacity,
    GM_ADDR workspace, GM_ADDR tiling)
{
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_MIX_AIV_1_0);  // vector cores only, with SyncAll
    GET_TILING_DATA(tilingData, tiling);
    GM_ADDR counts = AscendC::GetUserWorkspace(workspace);
    if (TILING_KEY_IS(MOE_CAPACITY_ONE_QUEUE)) {
        moe::RunExpertCapacity<false>(expert_idx, expanded_row_idx, slot_src,
            expert_tokens_before_capacity, counts, tilingData);
    } else if (TILING_KEY_IS(MOE_CAPACITY_QUEUE_PER_CHOICE)) {
        moe::RunExpertCapacity<true>(expert_idx, expanded_row_idx, slot_src,
            expert_tokens_before_capacity, counts, tilingData);
    }
}
