// MoeExpertCapacity: every choice gets the next free place of its expert until the expert is full.
//
//   expanded_row_idx[t * K + k] = e * C + place, or -1 for a choice that found its expert full;
//   slot_src[e * C + place]     = t * K + k, or -1 for an empty place;
//   expert_tokens_before_capacity[e] = choices of e, with or without a place.
//
// One queue serves token by token; a queue per choice serves all first choices before any second.
// Blocks share the tokens: (1) each counts its own choices per expert; (2) after a barrier each
// sums the counts of all, which tells where its own part of every expert's queue begins; (3) it
// places its choices by running sums, and writes the part of every expert's table that is its own.
// The result is that of a single loop over the queue, bit by bit, for any number of blocks.
//
// All counts are float32, exact below 2^24 choices; the tiling refuses more.
#include "moe_expert_counts.h"
#include "moe_one_hot.h"
#include "moe_tiling_keys.h"
#include "moe_transpose.h"

namespace moe {
template <bool QUEUE_PER_CHOICE>
class ExpertCapacity {
public:
    __aicore__ inline void Init(GM_ADDR expertIdx, GM_ADDR expandedRowIdx, GM_ADDR slotSrc,
        GM_ADDR expertTokens, GM_ADDR workspace, const MoeExpertCapacityTilingData& tiling)
    {
        items_ = tiling.items;
        queues_ = tiling.queues;
        experts_ = tiling.experts;
        capacity_ = tiling.capacity;
        tile_ = tiling.tile;
        countRows_ = tiling.countRows;
        expertsPad_ = AlignUp(experts_, GROUP);
        share_ = ShareOfBlock(items_);

        const uint32_t choices = items_ * queues_;
        const uint32_t blocks = static_cast<uint32_t>(GetBlockNum());
        expertIdx_.SetGlobalBuffer((__gm__ int32_t*)expertIdx, choices);
        expandedRowIdx_.SetGlobalBuffer((__gm__ int32_t*)expandedRowIdx, choices);
        slotSrc_.SetGlobalBuffer((__gm__ int32_t*)slotSrc, experts_ * capacity_);
        expertTokens_.SetGlobalBuffer((__gm__ int32_t*)expertTokens, experts_);
        counts_.SetGlobalBuffer((__gm__ float*)workspace, blocks * Counters());

        const uint32_t tileBytes = tile_ * queues_ * sizeof(int32_t);
        const uint32_t counterBytes = Counters() * sizeof(float);
        pipe_.InitBuffer(inQueue_, DOUBLE_BUFFER, tileBytes);
        pipe_.InitBuffer(rowQueue_, DOUBLE_BUFFER, tileBytes);
        pipe_.InitBuffer(runQueue_, RUN_BUFFERS, tile_ * sizeof(int32_t));
        pipe_.InitBuffer(start_, counterBytes);
        pipe_.InitBuffer(total_, counterBytes);
        pipe_.InitBuffer(tokensOut_, expertsPad_ * sizeof(int32_t));
        pipe_.InitBuffer(experts32_, tile_ * sizeof(int32_t));
        pipe_.InitBuffer(expertsFloat_, tile_ * sizeof(float));
        pipe_.InitBuffer(places_, tile_ * sizeof(float));
        pipe_.InitBuffer(scratch_, tile_ * sizeof(float));
        pipe_.InitBuffer(index_, tile_ * sizeof(int32_t));
        pipe_.InitBuffer(numbers_, tile_ * sizeof(int32_t));
        pipe_.InitBuffer(bits_, AlignUp(tile_ / 8, BLOCK_BYTES));
        pipe_.InitBuffer(empty_, tile_ * sizeof(int32_t));
        if constexpr (QUEUE_PER_CHOICE) {
            pipe_.InitBuffer(rows_, tileBytes);
            pipe_.InitBuffer(offsetsIn_, tile_ * sizeof(int32_t));
            pipe_.InitBuffer(offsetsOut_, tileBytes);
            pipe_.InitBuffer(wide_, tileBytes);
            pipe_.InitBuffer(wideReal_, tileBytes);
        }
        expertCounts_.Init(pipe_, tile_, expertsPad_);
        oneHot_.Init(pipe_, tile_, expertsPad_, tiling.groups, countRows_ * counterBytes);
    }

    __aicore__ inline void Process()
    {
        Prepare();
        Count();
        SyncAll<true>();
        FindStarts();
        oneHot_.Clear();
        WriteExpertTokens();
        for (uint32_t first = share_.begin; first < share_.end; first += tile_) {
            Place(first, Smaller(tile_, share_.end - first));
        }
    }

private:
    // Counters of a block: one per queue and expert.
    __aicore__ inline uint32_t Counters() const
    {
        return queues_ * expertsPad_;
    }

    __aicore__ inline void Prepare()
    {
        CreateVecIndex(index_.Get<int32_t>(), 0, tile_);
        Duplicate(empty_.Get<int32_t>(), NOTHING, static_cast<int32_t>(tile_));
        Duplicate(start_.Get<float>(), 0.0f, static_cast<int32_t>(Counters()));
        Duplicate(total_.Get<float>(), 0.0f, static_cast<int32_t>(Counters()));
        VectorBarrier();
        if constexpr (QUEUE_PER_CHOICE) {
            const uint32_t count = tile_ * queues_;
            LocalTensor<int32_t> in = offsetsIn_.Get<int32_t>();
            Muls(in, index_.Get<int32_t>(), static_cast<int32_t>(queues_),
                static_cast<int32_t>(tile_));
            VectorBarrier();
            ToByteOffsets(in, tile_);
            LocalTensor<int32_t> out = offsetsOut_.Get<int32_t>();
            TransposedIndex(
                out, wide_.Get<int32_t>(), wideReal_.Get<float>(), count, queues_, tile_);
            ToByteOffsets(out, count);
        }
    }

    // (1) The choices of this block, per queue and expert, into the workspace.
    __aicore__ inline void Count()
    {
        LocalTensor<float> counts = start_.Get<float>();
        for (uint32_t first = share_.begin; first < share_.end; first += tile_) {
            LocalTensor<int32_t> in = ReadTile(first, Smaller(tile_, share_.end - first));
            for (uint32_t queue = 0; queue < queues_; ++queue) {
                TakeQueue(in, queue);
                expertCounts_.Add(counts[queue * expertsPad_], expertsFloat_.Get<float>());
            }
            inQueue_.FreeTensor(in);
        }
        Sync<HardEvent::V_MTE3>();
        Store(counts_[static_cast<uint32_t>(GetBlockIdx()) * Counters()], counts, Counters());
        Sync<HardEvent::MTE3_V>();
    }

    // (2) start = choices ahead of this block's first one, per queue and expert; total = choices of
    // an expert in all queues, in the counters of the first queue. The counters of all blocks come as
    // one piece where they fit UB.
    __aicore__ inline void FindStarts()
    {
        const uint32_t blocks = static_cast<uint32_t>(GetBlockNum());
        const int32_t counters = static_cast<int32_t>(Counters());
        const int32_t experts = static_cast<int32_t>(expertsPad_);
        LocalTensor<float> start = start_.Get<float>();
        LocalTensor<float> total = total_.Get<float>();
        Duplicate(start, 0.0f, counters);
        VectorBarrier();
        for (uint32_t first = 0; first < blocks; first += countRows_) {
            AddRows(start, total, first, Smaller(countRows_, blocks - first));
        }
        Add(total, total, start, counters);
        VectorBarrier();
        for (uint32_t queue = 1; queue < queues_; ++queue) {
            // ahead of a queue: all of the queues before it
            Add(start[queue * expertsPad_], start[queue * expertsPad_], total, experts);
            VectorBarrier();
            Add(total, total, total[queue * expertsPad_], experts);
            VectorBarrier();
        }
    }

    // The counters of blocks [first, first + rows): to `before` those of blocks ahead of this one, to
    // `others` the rest. Two sums, each in halves, between the same barriers.
    __aicore__ inline void AddRows(const LocalTensor<float>& before,
        const LocalTensor<float>& others, uint32_t first, uint32_t rows)
    {
        const uint32_t block = static_cast<uint32_t>(GetBlockIdx());
        const int32_t counters = static_cast<int32_t>(Counters());
        LocalTensor<float> counts = oneHot_.Room();
        Sync<HardEvent::V_MTE2>();
        Load(counts, counts_[first * Counters()], rows * Counters());
        Sync<HardEvent::MTE2_V>();
        const uint32_t ahead = block > first ? Smaller(block - first, rows) : 0;
        LocalTensor<float> rest = counts[ahead * Counters()];
        uint32_t left = ahead;
        uint32_t right = rows - ahead;
        while (left > 1 || right > 1) {
            left = AddHalf(counts, left);
            right = AddHalf(rest, right);
            VectorBarrier();
        }
        if (left > 0) {
            Add(before, before, counts, counters);
        }
        if (right > 0) {
            Add(others, others, rest, counters);
        }
        VectorBarrier();
    }

    // Adds the second half of some rows of counters to the first; returns how many are left.
    __aicore__ inline uint32_t AddHalf(const LocalTensor<float>& rows, uint32_t count)
    {
        const uint32_t half = CeilDiv(count, 2);
        if (count > 1) {
            Add(rows, rows, rows[half * Counters()], static_cast<int32_t>((count - half) * Counters()));
        }
        return half;
    }

    __aicore__ inline void WriteExpertTokens()
    {
        const uint32_t blocks = static_cast<uint32_t>(GetBlockNum());
        const uint32_t block = static_cast<uint32_t>(GetBlockIdx());
        LocalTensor<int32_t> tokens = tokensOut_.Get<int32_t>();
        Cast(tokens, total_.Get<float>(), RoundMode::CAST_RINT, expertsPad_);
        Sync<HardEvent::V_MTE3>();
        Sync<HardEvent::V_S>();
        if (block == 0) {
            Store(expertTokens_, tokens, experts_);
        }
        // the empty places of every blocks-th expert: behind its last choice
        for (uint32_t expert = block; expert < experts_; expert += blocks) {
            uint32_t place = static_cast<uint32_t>(tokens.GetValue(expert));
            while (place < capacity_) {
                const uint32_t count = Smaller(tile_, capacity_ - place);
                Store(slotSrc_[expert * capacity_ + place], empty_.Get<int32_t>(), count);
                place += count;
            }
        }
    }

    // (3) Places for the choices of one tile.
    __aicore__ inline void Place(uint32_t first, uint32_t items)
    {
        LocalTensor<int32_t> in = ReadTile(first, items);
        LocalTensor<int32_t> rows = rowQueue_.template AllocTensor<int32_t>();
        for (uint32_t queue = 0; queue < queues_; ++queue) {
            TakeQueue(in, queue);
            oneHot_.SetQueue(expertsFloat_.Get<float>());
            WriteSources(first, queue);
            PlaceQueue(queue);
            if constexpr (QUEUE_PER_CHOICE) {
                WriteRows(rows_.Get<int32_t>()[queue * tile_]);
            } else {
                WriteRows(rows);
            }
        }
        inQueue_.FreeTensor(in);
        if constexpr (QUEUE_PER_CHOICE) {
            Gather(rows, rows_.Get<int32_t>(), offsetsOut_.Get<uint32_t>(), 0U, items * queues_);
            VectorBarrier();
        }
        rowQueue_.EnQue(rows);
        rows = rowQueue_.template DeQue<int32_t>();
        Store(expandedRowIdx_[first * queues_], rows, items * queues_);
        rowQueue_.FreeTensor(rows);
    }

    // The experts of `items` items; "no expert" behind them.
    __aicore__ inline LocalTensor<int32_t> ReadTile(uint32_t first, uint32_t items)
    {
        LocalTensor<int32_t> in = inQueue_.template AllocTensor<int32_t>();
        if (items < tile_) {
            Duplicate(in, NOTHING, static_cast<int32_t>(tile_ * queues_));
            Sync<HardEvent::V_MTE2>();
        }
        LoadPadded(in, expertIdx_[first * queues_], items * queues_, NOTHING);
        inQueue_.EnQue(in);
        return inQueue_.template DeQue<int32_t>();
    }

    // One queue of a tile as consecutive numbers.
    __aicore__ inline void TakeQueue(const LocalTensor<int32_t>& in, uint32_t queue)
    {
        LocalTensor<int32_t> experts = in;
        if constexpr (QUEUE_PER_CHOICE) {
            experts = experts32_.Get<int32_t>();
            Gather(experts, in, offsetsIn_.Get<uint32_t>(),
                queue * static_cast<uint32_t>(sizeof(int32_t)), tile_);
            VectorBarrier();
        }
        LocalTensor<float> known = expertsFloat_.Get<float>();
        LocalTensor<uint8_t> bits = bits_.Get<uint8_t>();
        Cast(known, experts, RoundMode::CAST_NONE, tile_);
        VectorBarrier();
        // numbers from E on are no expert, also where the last group has columns for them
        CompareScalar(bits, known, static_cast<float>(experts_) - 0.5f, CMPMODE::LT, tile_);
        VectorBarrier();
        Select(known, bits, known, static_cast<float>(NOTHING),
            SELMODE::VSEL_TENSOR_SCALAR_MODE, tile_);
        VectorBarrier();
    }

    // slot_src: per expert, the numbers of its choices, packed in their order by GatherMask.
    __aicore__ inline void WriteSources(uint32_t first, uint32_t queue)
    {
        LocalTensor<int32_t> numbers = numbers_.Get<int32_t>();
        LocalTensor<float> start = start_.Get<float>();
        const int32_t n = static_cast<int32_t>(tile_);
        Muls(numbers, index_.Get<int32_t>(), static_cast<int32_t>(queues_), n);
        VectorBarrier();
        Adds(numbers, numbers, static_cast<int32_t>(first * queues_ + queue), n);
        VectorBarrier();
        Sync<HardEvent::V_S>();  // `start` is as the last queue left it
        for (uint32_t group = 0; group < experts_; group += ExpertCounts::AT_ONCE) {
            const uint32_t count = Smaller(ExpertCounts::AT_ONCE, experts_ - group);
            expertCounts_.Mark(expertsFloat_.Get<float>(), group, count);
            for (uint32_t i = 0; i < count; ++i) {
                const uint32_t place = static_cast<uint32_t>(
                    start.GetValue(queue * expertsPad_ + group + i));
                if (place < capacity_) {
                    WriteRun((group + i) * capacity_ + place, capacity_ - place, i);
                }
            }
            VectorBarrier();  // the bits have been read and may change
        }
        Sync<HardEvent::S_V>();  // `start` has been read and may change
    }

    // The choices of the `i`-th expert that is marked, at most `most`, from place `at` on.
    __aicore__ inline void WriteRun(uint32_t at, uint32_t most, uint32_t i)
    {
        LocalTensor<int32_t> run = runQueue_.template AllocTensor<int32_t>();
        uint64_t found = 0;
        GatherMask(run, numbers_.Get<int32_t>(),
            expertCounts_.Bits(i).template ReinterpretCast<uint32_t>(), true, tile_, {1, 1, 0, 0},
            found);
        runQueue_.EnQue(run);
        run = runQueue_.template DeQue<int32_t>();
        if (found > 0) {
            Store(slotSrc_[at], run, Smaller(static_cast<uint32_t>(found), most));
        }
        runQueue_.FreeTensor(run);
    }

    // places = number of each choice in its expert's queue, from 1; 0 for no expert.
    __aicore__ inline void PlaceQueue(uint32_t queue)
    {
        LocalTensor<float> places = places_.Get<float>();
        Duplicate(places, 0.0f, static_cast<int32_t>(tile_));
        VectorBarrier();
        oneHot_.AddPlaces(places, start_.Get<float>()[queue * expertsPad_]);
    }

    // dst = expert * C + place - 1 where 1 <= place <= C, -1 elsewhere.
    __aicore__ inline void WriteRows(const LocalTensor<int32_t>& dst)
    {
        const int32_t n = static_cast<int32_t>(tile_);
        LocalTensor<float> places = places_.Get<float>();
        LocalTensor<float> scratch = scratch_.Get<float>();
        LocalTensor<uint8_t> bits = bits_.Get<uint8_t>();
        LocalTensor<int32_t> integers = experts32_.Get<int32_t>();
        CompareScalar(
            bits, places, static_cast<float>(capacity_) + 0.5f, CMPMODE::LT, tile_);
        VectorBarrier();
        Select(places, bits, places, 0.0f, SELMODE::VSEL_TENSOR_SCALAR_MODE, tile_);
        VectorBarrier();
        CompareScalar(bits, places, 0.5f, CMPMODE::GT, tile_);
        VectorBarrier();
        // without a place the expert is taken for 0: 0 * C + 0 - 1 = -1
        Select(scratch, bits, expertsFloat_.Get<float>(), 0.0f, SELMODE::VSEL_TENSOR_SCALAR_MODE,
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

    static constexpr int32_t NOTHING = -1;
    // runs are short: the store of one takes longer than finding the next
    static constexpr uint8_t RUN_BUFFERS = 4;

    TPipe pipe_;
    TQue<TPosition::VECIN, DOUBLE_BUFFER> inQueue_;
    TQue<TPosition::VECOUT, DOUBLE_BUFFER> rowQueue_;
    TQue<TPosition::VECOUT, DOUBLE_BUFFER> runQueue_;
    TBuf<TPosition::VECCALC> start_;         // [queues, experts]
    TBuf<TPosition::VECCALC> total_;         // [queues, experts]
    TBuf<TPosition::VECCALC> tokensOut_;     // [experts]
    TBuf<TPosition::VECCALC> experts32_;     // [tile]
    TBuf<TPosition::VECCALC> expertsFloat_;  // [tile]
    TBuf<TPosition::VECCALC> places_;        // [tile]
    TBuf<TPosition::VECCALC> scratch_;       // [tile]
    TBuf<TPosition::VECCALC> index_;         // [tile]: 0, 1, 2, ...
    TBuf<TPosition::VECCALC> numbers_;       // [tile]: the choices' own numbers
    TBuf<TPosition::VECCALC> bits_;          // [tile] bits
    TBuf<TPosition::VECCALC> empty_;         // [tile]: -1
    TBuf<TPosition::VECCALC> rows_;          // [queues, tile]
    TBuf<TPosition::VECCALC> offsetsIn_;     // [tile]
    TBuf<TPosition::VECCALC> offsetsOut_;    // [tile, queues]
    TBuf<TPosition::VECCALC> wide_;          // [tile, queues]
    TBuf<TPosition::VECCALC> wideReal_;      // [tile, queues]
    ExpertCounts expertCounts_;
    OneHot oneHot_;
    GlobalTensor<int32_t> expertIdx_;
    GlobalTensor<int32_t> expandedRowIdx_;
    GlobalTensor<int32_t> slotSrc_;
    GlobalTensor<int32_t> expertTokens_;
    GlobalTensor<float> counts_;
    Range share_{0, 0};
    uint32_t items_ = 0;
    uint32_t queues_ = 0;
    uint32_t experts_ = 0;
    uint32_t expertsPad_ = 0;
    uint32_t capacity_ = 0;
    uint32_t tile_ = 0;
    uint32_t countRows_ = 0;
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
