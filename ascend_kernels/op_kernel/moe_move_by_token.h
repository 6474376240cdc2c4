// Rows to their places, by token: a row is read once for all its places.
#ifndef MOE_MOVE_BY_TOKEN_H
#define MOE_MOVE_BY_TOKEN_H

#include "moe_table_part.h"

namespace moe {
template <typename TilingData>
class MoveByToken {
public:
    __aicore__ inline void Init(
        TPipe& pipe, GM_ADDR x, GM_ADDR rowIdx, GM_ADDR expandedX, const TilingData& tiling)
    {
        rowBytes_ = tiling.rowBytes;
        k_ = tiling.k;
        slots_ = tiling.slots;
        bufferBytes_ = tiling.bufferBytes;
        tileTokens_ = tiling.tableSize / k_;
        x_.SetGlobalBuffer((__gm__ uint8_t*)x, static_cast<uint64_t>(tiling.tokens) * rowBytes_);
        expandedX_.SetGlobalBuffer(
            (__gm__ uint8_t*)expandedX, static_cast<uint64_t>(slots_) * rowBytes_);
        table_.Init(pipe, rowIdx, tiling.tokens * k_, tiling.tableSize);
        pipe.InitBuffer(rows_, DOUBLE_BUFFER, bufferBytes_);
    }

    // The rows of some tokens.
    __aicore__ inline void Move(const Range& share)
    {
        const bool whole = AlignUp(rowBytes_, BLOCK_BYTES) <= bufferBytes_;
        for (uint32_t first = share.begin; first < share.end; first += tileTokens_) {
            const uint32_t count = Smaller(tileTokens_, share.end - first);
            table_.Read(first * k_, count * k_);
            uint32_t done = 0;
            while (done < count) {
                if (!IsKept(done)) {
                    ++done;  // a row without a place is not read
                } else if (whole) {
                    done += MoveRun(first, done, count);
                } else {
                    MoveInPieces(first + done, done);
                    ++done;
                }
            }
        }
    }

    __aicore__ inline GlobalTensor<uint8_t>& ExpandedX()
    {
        return expandedX_;
    }

private:
    // The place of a choice of the tile, or -1.
    __aicore__ inline int32_t Place(uint32_t choice) const
    {
        const int32_t place = table_.Get(choice);
        return static_cast<uint32_t>(place) < slots_ ? place : -1;
    }

    __aicore__ inline bool IsKept(uint32_t token) const
    {
        for (uint32_t choice = token * k_; choice < (token + 1) * k_; ++choice) {
            if (Place(choice) >= 0) {
                return true;
            }
        }
        return false;
    }

    // Consecutive tokens that have places, as many as a buffer holds: one load, a store per place.
    __aicore__ inline uint32_t MoveRun(uint32_t first, uint32_t done, uint32_t count)
    {
        const uint32_t pitch = AlignUp(rowBytes_, BLOCK_BYTES);
        const uint32_t most = Smaller(bufferBytes_ / pitch, count - done);
        uint32_t run = 1;
        while (run < most && IsKept(done + run)) {
            ++run;
        }
        LocalTensor<uint8_t> rows = rows_.template AllocTensor<uint8_t>();
        LoadRows(rows, x_[Offset(first + done)], run, rowBytes_);
        rows_.EnQue(rows);
        rows = rows_.template DeQue<uint8_t>();
        for (uint32_t i = 0; i < run; ++i) {
            StoreToPlaces(rows[i * pitch], done + i, 0, rowBytes_);
        }
        rows_.FreeTensor(rows);
        return run;
    }

    // One row that is larger than a buffer.
    __aicore__ inline void MoveInPieces(uint32_t token, uint32_t localToken)
    {
        for (uint32_t at = 0; at < rowBytes_; at += bufferBytes_) {
            const uint32_t bytes = Smaller(bufferBytes_, rowBytes_ - at);
            LocalTensor<uint8_t> piece = rows_.template AllocTensor<uint8_t>();
            Load(piece, x_[Offset(token) + at], bytes);
            rows_.EnQue(piece);
            piece = rows_.template DeQue<uint8_t>();
            StoreToPlaces(piece, localToken, at, bytes);
            rows_.FreeTensor(piece);
        }
    }

    __aicore__ inline void StoreToPlaces(
        const LocalTensor<uint8_t>& piece, uint32_t localToken, uint32_t at, uint32_t bytes)
    {
        for (uint32_t choice = localToken * k_; choice < (localToken + 1) * k_; ++choice) {
            const int32_t place = Place(choice);
            if (place >= 0) {
                Store(expandedX_[Offset(static_cast<uint32_t>(place)) + at], piece, bytes);
            }
        }
    }

    __aicore__ inline uint64_t Offset(uint32_t row) const
    {
        return static_cast<uint64_t>(row) * rowBytes_;
    }

    TQueBind<TPosition::VECIN, TPosition::VECOUT, DOUBLE_BUFFER> rows_;
    TablePart table_;
    GlobalTensor<uint8_t> x_;
    GlobalTensor<uint8_t> expandedX_;
    uint32_t rowBytes_ = 0;
    uint32_t k_ = 0;
    uint32_t slots_ = 0;
    uint32_t bufferBytes_ = 0;
    uint32_t tileTokens_ = 0;
};
}  // namespace moe

#endif  // MOE_MOVE_BY_TOKEN_H
