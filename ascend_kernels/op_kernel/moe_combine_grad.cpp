// MoeCombineGrad, the gradients of y[t] = sum_k scales[t, k] * expanded_x[expanded_row_idx]:
//
//   d_expanded_x[s] = scales[t, k] * dy[t] where choice (t, k) fills s, zero where s is empty;
//   d_scales[t, k]  = <expanded_x[s], dy[t]> where (t, k) fills s, 0 where it was dropped.
//
// Blocks share the tokens, so that a row of dy is read once for all its choices and the d_scales
// of a block are consecutive. Then they share the places, to zero the empty ones.
#include "moe_empty_places.h"
#include "moe_tiling_keys.h"

namespace moe {
template <typename T>
class CombineGrad {
public:
    __aicore__ inline void Init(GM_ADDR dy, GM_ADDR expandedX, GM_ADDR slotSrc, GM_ADDR rowIdx,
        GM_ADDR scales, GM_ADDR dExpandedX, GM_ADDR dScales, const MoeCombineGradTilingData& tiling)
    {
        k_ = tiling.k;
        hidden_ = tiling.hidden;
        slots_ = tiling.slots;
        chunk_ = tiling.chunk;
        tileTokens_ = tiling.tileTokens;
        dotsPitch_ = AlignUp(tileTokens_ * k_, BLOCK_FLOATS);
        choices_ = tiling.tokens * k_;
        tokenShare_ = ShareOfBlock(tiling.tokens);

        dy_.SetGlobalBuffer((__gm__ T*)dy, static_cast<uint64_t>(tiling.tokens) * hidden_);
        expandedX_.SetGlobalBuffer((__gm__ T*)expandedX, static_cast<uint64_t>(slots_) * hidden_);
        rowIdx_.SetGlobalBuffer((__gm__ int32_t*)rowIdx, choices_);
        scales_.SetGlobalBuffer((__gm__ float*)scales, choices_);
        dExpandedX_.SetGlobalBuffer((__gm__ T*)dExpandedX, static_cast<uint64_t>(slots_) * hidden_);
        dScales_.SetGlobalBuffer((__gm__ float*)dScales, choices_);

        const uint32_t rowBytes = AlignUp(chunk_ * sizeof(T), BLOCK_BYTES);
        const uint32_t floatBytes = AlignUp(chunk_ * sizeof(float), BLOCK_BYTES);
        pipe_.InitBuffer(dyQueue_, DOUBLE_BUFFER, rowBytes);
        pipe_.InitBuffer(rowQueue_, static_cast<uint8_t>(tiling.rowBuffers), rowBytes);
        pipe_.InitBuffer(outQueue_, DOUBLE_BUFFER, rowBytes);
        pipe_.InitBuffer(product_, floatBytes);
        if constexpr (!std::is_same<T, float>::value) {
            pipe_.InitBuffer(dyFloat_, floatBytes);
            pipe_.InitBuffer(rowFloat_, floatBytes);
        }
        pipe_.InitBuffer(rowIdxBuffer_, dotsPitch_ * sizeof(int32_t));
        pipe_.InitBuffer(scaleBuffer_, dotsPitch_ * sizeof(float));
        pipe_.InitBuffer(dots_, CeilDiv(hidden_, chunk_) * dotsPitch_ * sizeof(float));
        emptyPlaces_.Init(
            pipe_, slotSrc, slots_, choices_, tiling.tableSize, tiling.zeroBytes);
    }

    __aicore__ inline void Process()
    {
        for (uint32_t first = tokenShare_.begin; first < tokenShare_.end; first += tileTokens_) {
            Tile(first, Smaller(tileTokens_, tokenShare_.end - first));
        }
        emptyPlaces_.Zero(dExpandedX_, hidden_);
    }

private:
    __aicore__ inline void Tile(uint32_t first, uint32_t tokens)
    {
        const uint32_t pieces = CeilDiv(hidden_, chunk_);
        LocalTensor<float> dots = dots_.Get<float>();
        ReadTables(first * k_, tokens * k_);
        Sync<HardEvent::MTE3_V>();
        Duplicate(dots, 0.0f, static_cast<int32_t>(pieces * dotsPitch_));
        VectorBarrier();
        for (uint32_t t = 0; t < tokens; ++t) {
            if (!IsKept(t)) {
                continue;  // dy of a token without places is not read
            }
            for (uint32_t piece = 0; piece < pieces; ++piece) {
                const uint32_t column = piece * chunk_;
                Token(t, first + t, column, Smaller(chunk_, hidden_ - column), dots[piece * dotsPitch_]);
            }
        }
        for (uint32_t piece = 1; piece < pieces; ++piece) {
            Add(dots, dots, dots[piece * dotsPitch_], static_cast<int32_t>(dotsPitch_));
            VectorBarrier();
        }
        Sync<HardEvent::V_MTE3>();
        Store(dScales_[first * k_], dots, tokens * k_);
    }

    __aicore__ inline void ReadTables(uint32_t first, uint32_t count)
    {
        Sync<HardEvent::S_MTE2>();
        Load(rowIdxBuffer_.Get<int32_t>(), rowIdx_[first], count);
        Load(scaleBuffer_.Get<float>(), scales_[first], count);
        Sync<HardEvent::MTE2_S>();
    }

    // The place of a choice of the tile, or -1.
    __aicore__ inline int32_t Place(uint32_t choice)
    {
        const int32_t slot = rowIdxBuffer_.Get<int32_t>().GetValue(choice);
        return static_cast<uint32_t>(slot) < slots_ ? slot : -1;
    }

    __aicore__ inline bool IsKept(uint32_t token)
    {
        for (uint32_t choice = token * k_; choice < (token + 1) * k_; ++choice) {
            if (Place(choice) >= 0) {
                return true;
            }
        }
        return false;
    }

    // Columns [column, column + count) of all that one token takes part in.
    __aicore__ inline void Token(uint32_t localToken, uint32_t token, uint32_t column,
        uint32_t count, const LocalTensor<float>& dots)
    {
        LocalTensor<T> dy = dyQueue_.template AllocTensor<T>();
        Load(dy, dy_[static_cast<uint64_t>(token) * hidden_ + column], count);
        dyQueue_.EnQue(dy);
        dy = dyQueue_.template DeQue<T>();
        const LocalTensor<float> dyValues = AsFloat<T>(dy, dyFloat_, count);
        for (uint32_t choice = localToken * k_; choice < (localToken + 1) * k_; ++choice) {
            const int32_t slot = Place(choice);
            if (slot < 0) {
                continue;
            }
            const uint64_t at = static_cast<uint64_t>(slot) * hidden_ + column;
            WriteRowGradient(dyValues, scaleBuffer_.Get<float>().GetValue(choice), at, count);
            Dot(dots[choice], dyValues, at, count);
        }
        dyQueue_.FreeTensor(dy);
    }

    __aicore__ inline void WriteRowGradient(
        const LocalTensor<float>& dy, float scale, uint64_t at, uint32_t count)
    {
        LocalTensor<T> out = outQueue_.template AllocTensor<T>();
        if constexpr (std::is_same<T, float>::value) {
            Muls(out, dy, scale, static_cast<int32_t>(count));
        } else {
            LocalTensor<float> product = product_.Get<float>();
            Muls(product, dy, scale, static_cast<int32_t>(count));
            VectorBarrier();
            Cast(out, product, RoundMode::CAST_RINT, count);
        }
        VectorBarrier();
        outQueue_.EnQue(out);
        out = outQueue_.template DeQue<T>();
        Store(dExpandedX_[at], out, count);
        outQueue_.FreeTensor(out);
    }

    __aicore__ inline void Dot(
        const LocalTensor<float>& dst, const LocalTensor<float>& dy, uint64_t at, uint32_t count)
    {
        LocalTensor<T> row = rowQueue_.template AllocTensor<T>();
        Load(row, expandedX_[at], count);
        rowQueue_.EnQue(row);
        row = rowQueue_.template DeQue<T>();
        const LocalTensor<float> values = AsFloat<T>(row, rowFloat_, count);
        LocalTensor<float> product = product_.Get<float>();
        Mul(product, values, dy, static_cast<int32_t>(count));
        VectorBarrier();
        SumInto(dst, product, count);
        rowQueue_.FreeTensor(row);
    }

    TPipe pipe_;
    TQue<TPosition::VECIN, DOUBLE_BUFFER> dyQueue_;
    TQue<TPosition::VECIN, DOUBLE_BUFFER> rowQueue_;
    TQue<TPosition::VECOUT, DOUBLE_BUFFER> outQueue_;
    TBuf<TPosition::VECCALC> product_;
    TBuf<TPosition::VECCALC> dyFloat_;
    TBuf<TPosition::VECCALC> rowFloat_;
    TBuf<TPosition::VECCALC> rowIdxBuffer_;
    TBuf<TPosition::VECCALC> scaleBuffer_;
    TBuf<TPosition::VECCALC> dots_;
    EmptyPlaces<T> emptyPlaces_;
    GlobalTensor<T> dy_;
    GlobalTensor<T> expandedX_;
    GlobalTensor<T> dExpandedX_;
    GlobalTensor<int32_t> rowIdx_;
    GlobalTensor<float> scales_;
    GlobalTensor<float> dScales_;
    Range tokenShare_{0, 0};
    uint32_t k_ = 0;
    uint32_t hidden_ = 0;
    uint32_t slots_ = 0;
    uint32_t choices_ = 0;
    uint32_t chunk_ = 0;
    uint32_t tileTokens_ = 0;
    uint32_t dotsPitch_ = 0;
};

template <typename T>
__aicore__ inline void RunCombineGrad(GM_ADDR dy, GM_ADDR expandedX, GM_ADDR slotSrc,
    GM_ADDR rowIdx, GM_ADDR scales, GM_ADDR dExpandedX, GM_ADDR dScales,
    const MoeCombineGradTilingData& tiling)
{
    CombineGrad<T> op;
    op.Init(dy, expandedX, slotSrc, rowIdx, scales, dExpandedX, dScales, tiling);
    op.Process();
}
}  // namespace moe

extern "C" __global__ __aicore__ void moe_combine_grad(GM_ADDR dy, GM_ADDR expanded_x,
    GM_ADDR slot_src, GM_ADDR expanded_row_idx, GM_ADDR scales, GM_ADDR d_expanded_x,
    GM_ADDR d_scales, GM_ADDR workspace, GM_ADDR tiling)
{
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
    GET_TILING_DATA(tilingData, tiling);
    if (TILING_KEY_IS(MOE_ROWS_FLOAT)) {
        moe::RunCombineGrad<float>(dy, expanded_x, slot_src, expanded_row_idx, scales,
            d_expanded_x, d_scales, tilingData);
    } else if (TILING_KEY_IS(MOE_ROWS_HALF)) {
        moe::RunCombineGrad<half>(dy, expanded_x, slot_src, expanded_row_idx, scales,
            d_expanded_x, d_scales, tilingData);
    } else if (TILING_KEY_IS(MOE_ROWS_BFLOAT16)) {
        moe::RunCombineGrad<bfloat16_t>(dy, expanded_x, slot_src, expanded_row_idx, scales,
            d_expanded_x, d_scales, tilingData);
    }
}
