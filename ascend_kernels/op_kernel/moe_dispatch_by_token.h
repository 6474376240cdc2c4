// Dispatch with both tables: blocks share the tokens, so that a row is read once for all its places;
// then they share the places, to zero the empty ones.
#ifndef MOE_DISPATCH_BY_TOKEN_H
#define MOE_DISPATCH_BY_TOKEN_H

#include "moe_empty_places.h"
#include "moe_move_by_token.h"

namespace moe {
template <typename TilingData>
class DispatchByToken {
public:
    __aicore__ inline void Init(GM_ADDR x, GM_ADDR slotSrc, GM_ADDR rowIdx, GM_ADDR expandedX,
        const TilingData& tiling)
    {
        rowBytes_ = tiling.rowBytes;
        share_ = ShareOfBlock(tiling.tokens);
        rows_.Init(pipe_, x, rowIdx, expandedX, tiling);
        emptyPlaces_.Init(pipe_, slotSrc, tiling.slots, tiling.tokens * tiling.k, tiling.tableSize,
            tiling.zeroBytes);
    }

    __aicore__ inline void Process()
    {
        rows_.Move(share_);
        emptyPlaces_.Zero(rows_.ExpandedX(), rowBytes_);
    }

private:
    TPipe pipe_;
    MoveByToken<TilingData> rows_;
    EmptyPlaces<uint8_t> emptyPlaces_;
    Range share_{0, 0};
    uint32_t rowBytes_ = 0;
};
}  // namespace moe

#endif  // MOE_DISPATCH_BY_TOKEN_H
