// Queues of choices before the experts, shared by the blocks: what lies ahead of a block's own part of
// every queue, and the number of each of its choices in the queue of its expert.
//
// (1) Each block counts its own choices per expert; (2) after a barrier each sums the counts of all,
// which tells where its own part of every expert's queue begins; (3) it numbers its choices by running
// sums. The result is that of a single loop over the queue, bit by bit, for any number of blocks.
//
// All counts are float32, exact below 2^24 choices; the tilings refuse more.
#ifndef MOE_EXPERT_QUEUES_H
#define MOE_EXPERT_QUEUES_H

#include "moe_expert_counts.h"
#include "moe_one_hot.h"
#include "moe_transpose.h"

namespace moe {
constexpr int32_t NOTHING = -1;

// What the queues are given by a tiling.
struct QueueSizes {
    uint32_t items;      // rows of the queues
    uint32_t unit;       // rows that stay with one block
    uint32_t queues;     // 1, or one per choice
    uint32_t experts;    // E
    uint32_t tile;       // rows at a time, a power of two from 64 to 512
    uint32_t groups;     // one-hot matrices side by side
    uint32_t countRows;  // blocks whose counters are read as one piece
};

template <bool QUEUE_PER_CHOICE>
class ExpertQueues {
public:
    __aicore__ inline void Init(
        TPipe& pipe, GM_ADDR expertIdx, GM_ADDR slotSrc, uint32_t slots, GM_ADDR workspace,
        const QueueSizes& sizes)
    {
        queues_ = sizes.queues;
        experts_ = sizes.experts;
        expertsPad_ = AlignUp(experts_, GROUP);
        tile_ = sizes.tile;
        countRows_ = sizes.countRows;
        const Range share = ShareOfBlock(sizes.items / sizes.unit);
        share_ = {share.begin * sizes.unit, share.end * sizes.unit};

        const uint32_t blocks = static_cast<uint32_t>(GetBlockNum());
        expertIdx_.SetGlobalBuffer((__gm__ int32_t*)expertIdx, sizes.items * queues_);
        slotSrc_.SetGlobalBuffer((__gm__ int32_t*)slotSrc, slots);
        counts_.SetGlobalBuffer((__gm__ float*)workspace, blocks * Counters());

        const uint32_t tileBytes = tile_ * queues_ * sizeof(int32_t);
        const uint32_t counterBytes = Counters() * sizeof(float);
        pipe.InitBuffer(inQueue_, DOUBLE_BUFFER, tileBytes);
        pipe.InitBuffer(runQueue_, RUN_BUFFERS, tile_ * sizeof(int32_t));
        pipe.InitBuffer(start_, counterBytes);
        pipe.InitBuffer(total_, counterBytes);
        pipe.InitBuffer(experts32_, tile_ * sizeof(int32_t));
        pipe.InitBuffer(expertsFloat_, tile_ * sizeof(float));
        pipe.InitBuffer(places_, tile_ * sizeof(float));
        pipe.InitBuffer(index_, tile_ * sizeof(int32_t));
        pipe.InitBuffer(numbers_, tile_ * sizeof(int32_t));
        pipe.InitBuffer(bits_, AlignUp(tile_ / 8, BLOCK_BYTES));
        pipe.InitBuffer(empty_, tile_ * sizeof(int32_t));
        if constexpr (QUEUE_PER_CHOICE) {
            pipe.InitBuffer(offsetsIn_, tile_ * sizeof(int32_t));
        }
        expertCounts_.Init(pipe, tile_, expertsPad_);
        // before the matrices come, their room holds counters, or the running sums of the experts
        const uint32_t scanBytes = 4 * expertsPad_ * BLOCK_BYTES;
        const uint32_t countBytes = countRows_ * counterBytes;
        oneHot_.Init(pipe, tile_, expertsPad_, sizes.groups,
            countBytes > scanBytes ? countBytes : scanBytes);
    }

    // Stages (1) and (2). All blocks must come here: there is a barrier.
    __aicore__ inline void Open()
    {
        CreateVecIndex(index_.Get<int32_t>(), 0, tile_);
        Duplicate(empty_.Get<int32_t>(), NOTHING, static_cast<int32_t>(tile_));
        Duplicate(start_.Get<float>(), 0.0f, static_cast<int32_t>(Counters()));
        Duplicate(total_.Get<float>(), 0.0f, static_cast<int32_t>(Counters()));
        VectorBarrier();
        if constexpr (QUEUE_PER_CHOICE) {
            LocalTensor<int32_t> in = offsetsIn_.Get<int32_t>();
            Muls(in, index_.Get<int32_t>(), static_cast<int32_t>(queues_),
                static_cast<int32_t>(tile_));
            VectorBarrier();
            ToByteOffsets(in, tile_);
        }
        Count();
        SyncAll<true>();
        FindStarts();
    }

    // Between Open and the first tile: one queue after the other, so that a place is a number among
    // all choices. `ends` become where each expert's choices end, expertsPad floats.
    __aicore__ inline void Chain(const LocalTensor<float>& ends)
    {
        const uint32_t pitch = 2 * expertsPad_ * BLOCK_FLOATS;
        const int32_t size = static_cast<int32_t>(expertsPad_ * BLOCK_FLOATS);
        const int32_t experts = static_cast<int32_t>(expertsPad_);
        LocalTensor<float> room = oneHot_.Room();
        LocalTensor<float> total = total_.Get<float>();
        uint32_t from = 0;
        Duplicate(room, 0.0f, static_cast<int32_t>(2 * pitch));
        VectorBarrier();
        Brcb(Scanned(from, 0), total, static_cast<uint8_t>(expertsPad_ / GROUP), {1, REPEAT_BLOCKS});
        VectorBarrier();
        for (uint32_t shift = 1; shift < expertsPad_; shift *= 2) {
            Add(Scanned(1 - from, 0), Scanned(from, 0), Scanned(from, shift), size);
            VectorBarrier();
            from = 1 - from;
        }
        // the eight floats of a block are the same
        BlockReduceMax(ends, Scanned(from, 0), experts / static_cast<int32_t>(GROUP),
            static_cast<int32_t>(LANES), 1, 1, REPEAT_BLOCKS);
        VectorBarrier();
        LocalTensor<float> start = start_.Get<float>();
        Add(start, start, ends, experts);
        VectorBarrier();
        Sub(start, start, total, experts);
        VectorBarrier();
    }

    // After whatever used the room of the matrices.
    __aicore__ inline void Begin()
    {
        oneHot_.Clear();
    }

    // Puts one queue of a tile at hand: Known and the one-hot matrix.
    __aicore__ inline void Take(const LocalTensor<int32_t>& in, uint32_t queue)
    {
        TakeQueue(in, queue);
        oneHot_.SetQueue(expertsFloat_.Get<float>());
    }

    // slot_src: per expert, the numbers of its choices, packed in their order by GatherMask; expert e
    // has the places from e * stride on, `most` of them.
    __aicore__ inline void WriteSources(uint32_t first, uint32_t queue, uint32_t stride, uint32_t most)
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
                if (place < most) {
                    WriteRun((group + i) * stride + place, most - place, i);
                }
            }
            VectorBarrier();  // the bits have been read and may change
        }
        Sync<HardEvent::S_V>();  // `start` has been read and may change
    }

    // The number of each choice in its expert's queue, from 1; 0 for no expert.
    __aicore__ inline LocalTensor<float> Number(uint32_t queue)
    {
        LocalTensor<float> places = places_.Get<float>();
        Duplicate(places, 0.0f, static_cast<int32_t>(tile_));
        VectorBarrier();
        oneHot_.AddPlaces(places, start_.Get<float>()[queue * expertsPad_]);
        return places;
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

    __aicore__ inline void Free(LocalTensor<int32_t>& in)
    {
        inQueue_.FreeTensor(in);
    }

    // -1 from entry `begin` of slot_src to `end`.
    __aicore__ inline void WriteEmpty(uint32_t begin, uint32_t end)
    {
        while (begin < end) {
            const uint32_t count = Smaller(tile_, end - begin);
            Store(slotSrc_[begin], empty_.Get<int32_t>(), count);
            begin += count;
        }
    }

    // Choices of each expert in all blocks and queues.
    __aicore__ inline LocalTensor<float> Totals()
    {
        return total_.Get<float>();
    }

    // The experts of the queue at hand.
    __aicore__ inline LocalTensor<float> Known()
    {
        return expertsFloat_.Get<float>();
    }

    // [tile] int32 and bits, scratch once a queue is numbered; indices 0, 1, 2, ...
    __aicore__ inline LocalTensor<int32_t> Integers()
    {
        return experts32_.Get<int32_t>();
    }

    __aicore__ inline LocalTensor<uint8_t> Bits()
    {
        return bits_.Get<uint8_t>();
    }

    __aicore__ inline Range Share() const
    {
        return share_;
    }

    __aicore__ inline uint32_t ExpertsPad() const
    {
        return expertsPad_;
    }

private:
    // Counters of a block: one per queue and expert.
    __aicore__ inline uint32_t Counters() const
    {
        return queues_ * expertsPad_;
    }

    // A matrix of one block per expert in the room, seen `rows` rows earlier; as many zero rows are
    // ahead, for E may be no power of two.
    __aicore__ inline LocalTensor<float> Scanned(uint32_t which, uint32_t rows)
    {
        const uint32_t pitch = 2 * expertsPad_ * BLOCK_FLOATS;
        return oneHot_.Room()[which * pitch + (expertsPad_ - rows) * BLOCK_FLOATS];
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

    // runs are short: the store of one takes longer than finding the next
    static constexpr uint8_t RUN_BUFFERS = 4;

    TQue<TPosition::VECIN, DOUBLE_BUFFER> inQueue_;
    TQue<TPosition::VECOUT, DOUBLE_BUFFER> runQueue_;
    TBuf<TPosition::VECCALC> start_;         // [queues, experts]
    TBuf<TPosition::VECCALC> total_;         // [queues, experts]
    TBuf<TPosition::VECCALC> experts32_;     // [tile]
    TBuf<TPosition::VECCALC> expertsFloat_;  // [tile]
    TBuf<TPosition::VECCALC> places_;        // [tile]
    TBuf<TPosition::VECCALC> index_;         // [tile]: 0, 1, 2, ...
    TBuf<TPosition::VECCALC> numbers_;       // [tile]: the choices' own numbers
    TBuf<TPosition::VECCALC> bits_;          // [tile] bits
    TBuf<TPosition::VECCALC> empty_;         // [tile]: -1
    TBuf<TPosition::VECCALC> offsetsIn_;     // [tile]
    ExpertCounts expertCounts_;
    OneHot oneHot_;
    GlobalTensor<int32_t> expertIdx_;
    GlobalTensor<int32_t> slotSrc_;
    GlobalTensor<float> counts_;
    Range share_{0, 0};
    uint32_t queues_ = 0;
    uint32_t experts_ = 0;
    uint32_t expertsPad_ = 0;
    uint32_t tile_ = 0;
    uint32_t countRows_ = 0;
};
}  // namespace moe

#endif  // MOE_EXPERT_QUEUES_H
