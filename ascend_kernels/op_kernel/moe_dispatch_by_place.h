// Dispatch from slot_src alone: blocks share the places, and every place fetches its row.
#ifndef MOE_DISPATCH_BY_PLACE_H
#define MOE_DISPATCH_BY_PLACE_H

#include "moe_table_part.h"
#include "moe_zero_rows.h"

namespace moe {
template <typename TilingData>
class DispatchByPlace {
public:
    __aicore__ inline void Init(
        GM_ADDR x, GM_ADDR slotSrc, GM_ADDR expandedX, const TilingData& tiling)
    {
        rowBytes_ = tiling.rowBytes;
        tokens_ = tiling.tokens;
        k_ = tiling.k;
        share_ = ShareOfBlock(tiling.slots);
        tableSize_ = tiling.tableSize;
        bufferBytes_ = tiling.bufferBytes;
        x_.SetGlobalBuffer((__gm__ uint8_t*)x, static_cast<uint64_t>(tokens_) * rowBytes_);
        expandedX_.SetGlobalBuffer(
            (__gm__ uint8_t*)expandedX, static_cast<uint64_t>(tiling.slots) * rowBytes_);
        table_.Init(pipe_, slotSrc, tiling.slots, tableSize_);
        pipe_.InitBuffer(rows_, DOUBLE_BUFFER, bufferBytes_);
        zeros_.Init(pipe_, tiling.zeroBytes);
    }

    template <bool WHOLE_ROWS>
    __aicore__ inline void Process()
    {
        for (uint32_t first = share_.begin; first < share_.end; first += tableSize_) {
            const uint32_t count = Smaller(tableSize_, share_.end - first);
            table_.Read(first, count);
            uint32_t done = 0;
            while (done < count) {
                done += Token(done) < 0 ? WriteEmpty(first, done, count)
                                        : WriteFilled<WHOLE_ROWS>(first, done, count);
            }
        }
    }

private:
    // The token that fills entry `i` of the table, or -1. A choice out of range (-1 is the largest
    // number without a sign) fills nothing.
    __aicore__ inline int32_t Token(uint32_t i) const
    {
        const int32_t choice = table_.Get(i);
        if (static_cast<uint32_t>(choice) >= tokens_ * k_) {
            return -1;
        }
        return choice / static_cast<int32_t>(k_);
    }

    // Writes the run of empty places that starts at `done`; returns its length.
    __aicore__ inline uint32_t WriteEmpty(uint32_t first, uint32_t done, uint32_t count)
    {
        uint32_t run = 1;
        while (done + run < count && Token(done + run) < 0) {
            ++run;
        }
        zeros_.Fill(expandedX_, Offset(first + done), Offset(run));
        return run;
    }

    // Moves filled places from `done` on; returns how many.
    template <bool WHOLE_ROWS>
    __aicore__ inline uint32_t WriteFilled(uint32_t first, uint32_t done, uint32_t count)
    {
        if constexpr (WHOLE_ROWS) {
            return MoveRun(first, done, count);
        } else {
            MoveInPieces(Offset(Token(done)), Offset(first + done));
            return 1;
        }
    }

    // As many consecutive filled places as a buffer holds: a load each, one store.
    __aicore__ inline uint32_t MoveRun(uint32_t first, uint32_t done, uint32_t count)
    {
        const uint32_t pitch = AlignUp(rowBytes_, BLOCK_BYTES);
        const uint32_t most = Smaller(bufferBytes_ / pitch, count - done);
        LocalTensor<uint8_t> rows = rows_.template AllocTensor<uint8_t>();
        uint32_t run = 0;
        for (int32_t token = Token(done); token >= 0; token = Token(done + run)) {
            Load(rows[run * pitch], x_[Offset(token)], rowBytes_);
            if (++run == most) {
                break;
            }
        }
        rows_.EnQue(rows);
        rows = rows_.template DeQue<uint8_t>();
        StoreRows(expandedX_[Offset(first + done)], rows, run, rowBytes_, 0);
        rows_.FreeTensor(rows);
        return run;
    }

    // One row that is larger than a buffer.
    __aicore__ inline void MoveInPieces(uint64_t from, uint64_t to)
    {
        for (uint32_t at = 0; at < rowBytes_; at += bufferBytes_) {
            const uint32_t bytes = Smaller(bufferBytes_, rowBytes_ - at);
            LocalTensor<uint8_t> piece = rows_.template AllocTensor<uint8_t>();
            Load(piece, x_[from + at], bytes);
            rows_.EnQue(piece);
            piece = rows_.template DeQue<uint8_t>();
            Store(expandedX_[to + at], piece, bytes);
            rows_.FreeTensor(piece);
        }
    }

    __aicore__ inline uint64_t Offset(uint32_t row) const
    {
        return static_cast<uint64_t>(row) * rowBytes_;
    }

    TPipe pipe_;
    TQueBind<TPosition::VECIN, TPosition::VECOUT, DOUBLE_BUFFER> rows_;
    ZeroRows zeros_;
    TablePart table_;
    GlobalTensor<uint8_t> x_;
    GlobalTensor<uint8_t> expandedX_;
    Range share_{0, 0};
    uint32_t rowBytes_ = 0;
    uint32_t tokens_ = 0;
    uint32_t k_ = 0;
    uint32_t tableSize_ = 0;
    uint32_t bufferBytes_ = 0;
};
}  // namespace moe

#endif  // MOE_DISPATCH_BY_PLACE_H
