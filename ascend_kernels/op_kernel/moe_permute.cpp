// MoePermute: all choices sorted by expert, those of one expert by token; padding has no place.
//
//   expanded_row_idx[t * K + k] = place of the choice among all that are somebody's, or -1;
//   slot_src[place]             = t * K + k, or -1 behind the last one;
//   expert_tokens_count[e], expert_tokens_cumsum[e] = choices of e, and of all up to e;
//   expanded_x[place]           = x[t], zero behind the last one, if x is given.
//
// A counting sort: the queues of MoeExpertCapacity, one behind the other. A block then moves the rows
// of its own tokens, whose places it has just written.
#include "moe_expert_queues.h"
#include "moe_move_by_token.h"
#include "moe_tiling_keys.h"
#include "moe_zero_rows.h"

namespace moe {
template <bool HAS_ROWS>
class Permute {
public:
    __aicore__ inline void Init(GM_ADDR expertIdx, GM_ADDR x, GM_ADDR expandedRowIdx,
        GM_ADDR slotSrc, GM_ADDR count, GM_ADDR cumsum, GM_ADDR expandedX, GM_ADDR workspace,
        const MoePermuteTilingData& tiling)
    {
        k_ = tiling.k;
        slots_ = tiling.slots;
        experts_ = tiling.experts;
        tile_ = tiling.tile;
        rowBytes_ = tiling.rowBytes;
        expandedRowIdx_.SetGlobalBuffer((__gm__ int32_t*)expandedRowIdx, slots_);
        count_.SetGlobalBuffer((__gm__ int32_t*)count, experts_);
        cumsum_.SetGlobalBuffer((__gm__ int32_t*)cumsum, experts_);
        places_.Init(pipe_, expertIdx, slotSrc, slots_, workspace,
            {slots_, k_, 1, experts_, tile_, tiling.groups, tiling.countRows});
        const uint32_t perExpert = places_.ExpertsPad() * sizeof(int32_t);
        pipe_.InitBuffer(rowQueue_, DOUBLE_BUFFER, tile_ * sizeof(int32_t));
        pipe_.InitBuffer(ends_, perExpert);
        pipe_.InitBuffer(countOut_, perExpert);
        pipe_.InitBuffer(cumsumOut_, perExpert);
        zeros_.Init(pipe_, tiling.zeroBytes);
        if constexpr (HAS_ROWS) {
            rows_.Init(pipe_, x, expandedRowIdx, expandedX, tiling);
        } else {
            nothing_.SetGlobalBuffer((__gm__ float*)expandedX, 1);
        }
    }

    __aicore__ inline void Process()
    {
        places_.Open();
        places_.Chain(ends_.Get<float>());
        places_.Begin();
        const uint32_t filled = WriteCounts();
        const Range share = places_.Share();
        for (uint32_t first = share.begin; first < share.end; first += tile_) {
            Place(first, Smaller(tile_, share.end - first));
        }
        const Range empty = ShareOfBlock(slots_ - filled);
        places_.WriteEmpty(filled + empty.begin, filled + empty.end);
        if constexpr (HAS_ROWS) {
            Sync<HardEvent::MTE3_MTE2>();  // the places that this block has written
            rows_.Move({share.begin / k_, share.end / k_});
            zeros_.Fill(rows_.ExpandedX(), static_cast<uint64_t>(filled + empty.begin) * rowBytes_,
                static_cast<uint64_t>(empty.end - empty.begin) * rowBytes_);
        } else if (GetBlockIdx() == 0) {
            zeros_.Fill(nothing_, 0, 1);  // an output has one element at least
        }
    }

private:
    // Returns how many choices are somebody's.
    __aicore__ inline uint32_t WriteCounts()
    {
        LocalTensor<int32_t> count = countOut_.Get<int32_t>();
        LocalTensor<int32_t> cumsum = cumsumOut_.Get<int32_t>();
        Cast(count, places_.Totals(), RoundMode::CAST_RINT, places_.ExpertsPad());
        Cast(cumsum, ends_.Get<float>(), RoundMode::CAST_RINT, places_.ExpertsPad());
        Sync<HardEvent::V_MTE3>();
        Sync<HardEvent::V_S>();
        if (GetBlockIdx() == 0) {
            Store(count_, count, experts_);
            Store(cumsum_, cumsum, experts_);
        }
        return static_cast<uint32_t>(cumsum.GetValue(experts_ - 1));
    }

    // The places of the choices of one tile: their numbers among all, from 0; -1 for nobody's.
    __aicore__ inline void Place(uint32_t first, uint32_t items)
    {
        LocalTensor<int32_t> in = places_.ReadTile(first, items);
        LocalTensor<int32_t> rows = rowQueue_.template AllocTensor<int32_t>();
        places_.Take(in, 0);
        places_.WriteSources(first, 0, 0, slots_);
        Cast(rows, places_.Number(0), RoundMode::CAST_RINT, tile_);
        VectorBarrier();
        Adds(rows, rows, -1, static_cast<int32_t>(tile_));
        VectorBarrier();
        places_.Free(in);
        rowQueue_.EnQue(rows);
        rows = rowQueue_.template DeQue<int32_t>();
        Store(expandedRowIdx_[first], rows, items);
        rowQueue_.FreeTensor(rows);
    }

    TPipe pipe_;
    ExpertQueues<false> places_;
    TQue<TPosition::VECOUT, DOUBLE_BUFFER> rowQueue_;
    TBuf<TPosition::VECCALC> ends_;       // [experts]
    TBuf<TPosition::VECCALC> countOut_;   // [experts]
    TBuf<TPosition::VECCALC> cumsumOut_;  // [experts]
    ZeroRows zeros_;
    MoveByToken<MoePermuteTilingData> rows_;
    GlobalTensor<int32_t> expandedRowIdx_;
    GlobalTensor<int32_t> count_;
    GlobalTensor<int32_t> cumsum_;
    GlobalTensor<float> nothing_;
    uint32_t k_ = 0;
    uint32_t slots_ = 0;
    uint32_t experts_ = 0;
    uint32_t tile_ = 0;
    uint32_t rowBytes_ = 0;
};

template <bool HAS_ROWS>
__aicore__ inline void RunPermute(GM_ADDR expertIdx, GM_ADDR x, GM_ADDR expandedRowIdx,
    GM_ADDR slotSrc, GM_ADDR count, GM_ADDR cumsum, GM_ADDR expandedX, GM_ADDR workspace,
    const MoePermuteTilingData& tiling)
{
    Permute<HAS_ROWS> op;
    op.Init(
        expertIdx, x, expandedRowIdx, slotSrc, count, cumsum, expandedX, workspace, tiling);
    op.Process();
}
}  // namespace moe

extern "C" __global__ __aicore__ void moe_permute(GM_ADDR expert_idx, GM_ADDR x,
    GM_ADDR expanded_row_idx, GM_ADDR slot_src, GM_ADDR expert_tokens_count,
    GM_ADDR expert_tokens_cumsum, GM_ADDR expanded_x, GM_ADDR workspace, GM_ADDR tiling)
{
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_MIX_AIV_1_0);  // vector cores only, with SyncAll
    GET_TILING_DATA(tilingData, tiling);
    GM_ADDR counts = AscendC::GetUserWorkspace(workspace);
    if (TILING_KEY_IS(MOE_PERMUTE_TABLES)) {
        moe::RunPermute<false>(expert_idx, x, expanded_row_idx, slot_src, expert_tokens_count,
            expert_tokens_cumsum, expanded_x, counts, tilingData);
    } else if (TILING_KEY_IS(MOE_PERMUTE_ROWS)) {
        moe::RunPermute<true>(expert_idx, x, expanded_row_idx, slot_src, expert_tokens_count,
            expert_tokens_cumsum, expanded_x, counts, tilingData);
    }
}
