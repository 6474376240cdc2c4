// out[t] = sum over k of weight[t, k] * rows[row_idx[t * K + k]], over the choices that are kept.
//
// The combine operator, and with all weights 1 the gradient of dispatch. Every row is read once and
// written once; sums are float32 in the order of k, whatever the number of blocks.
#ifndef MOE_WEIGHTED_ROWS_H
#define MOE_WEIGHTED_ROWS_H

#include "moe_common.h"

namespace moe {
template <typename T, typename TilingData, bool WEIGHTED>
class WeightedRows {
public:
    // `weights` is not looked at unless WEIGHTED.
    __aicore__ inline void Init(
        GM_ADDR rows, GM_ADDR rowIdx, GM_ADDR weights, GM_ADDR out, const TilingData& tiling)
    {
        k_ = tiling.k;
        hidden_ = tiling.hidden;
        slots_ = tiling.slots;
        chunk_ = tiling.chunk;
        tileTokens_ = tiling.tileTokens;
        share_ = ShareOfBlock(tiling.tokens);
        rows_.SetGlobalBuffer((__gm__ T*)rows, static_cast<uint64_t>(slots_) * hidden_);
        rowIdx_.SetGlobalBuffer((__gm__ int32_t*)rowIdx, tiling.tokens * k_);
        out_.SetGlobalBuffer((__gm__ T*)out, static_cast<uint64_t>(tiling.tokens) * hidden_);
        // all but one are on their way while a row is added
        pipe_.InitBuffer(rowQueue_, static_cast<uint8_t>(tiling.rowBuffers),
            AlignUp(chunk_ * sizeof(T), BLOCK_BYTES));
        pipe_.InitBuffer(outQueue_, DOUBLE_BUFFER, AlignUp(chunk_ * sizeof(T), BLOCK_BYTES));
        if constexpr (!std::is_same<T, float>::value) {
            pipe_.InitBuffer(rowFloat_, AlignUp(chunk_ * sizeof(float), BLOCK_BYTES));
            pipe_.InitBuffer(sum_, AlignUp(chunk_ * sizeof(float), BLOCK_BYTES));
        }
        const uint32_t tableBytes = AlignUp(tileTokens_ * k_ * sizeof(int32_t), BLOCK_BYTES);
        pipe_.InitBuffer(rowIdxBuffer_, tableBytes);
        if constexpr (WEIGHTED) {
            weights_.SetGlobalBuffer((__gm__ float*)weights, tiling.tokens * k_);
            pipe_.InitBuffer(weightBuffer_, tableBytes);
        }
    }

    __aicore__ inline void Process()
    {
        for (uint32_t first = share_.begin; first < share_.end; first += tileTokens_) {
            const uint32_t tokens = Smaller(tileTokens_, share_.end - first);
            ReadTables(first * k_, tokens * k_);
            for (uint32_t t = 0; t < tokens; ++t) {
                for (uint32_t column = 0; column < hidden_; column += chunk_) {
                    SumToken(t, first + t, column, Smaller(chunk_, hidden_ - column));
                }
            }
        }
    }

private:
    __aicore__ inline void ReadTables(uint32_t first, uint32_t count)
    {
        Sync<HardEvent::S_MTE2>();
        Load(rowIdxBuffer_.Get<int32_t>(), rowIdx_[first], count);
        if constexpr (WEIGHTED) {
            Load(weightBuffer_.Get<float>(), weights_[first], count);
        }
        Sync<HardEvent::MTE2_S>();
    }

    __aicore__ inline void SumToken(
        uint32_t localToken, uint32_t token, uint32_t column, uint32_t count)
    {
        LocalTensor<int32_t> rowIdx = rowIdxBuffer_.Get<int32_t>();
        LocalTensor<T> out = outQueue_.AllocTensor<T>();
        LocalTensor<float> sum;
        if constexpr (std::is_same<T, float>::value) {
            sum = out;
        } else {
            sum = sum_.Get<float>();
        }
        bool empty = true;
        for (uint32_t choice = localToken * k_; choice < (localToken + 1) * k_; ++choice) {
            const uint32_t slot = static_cast<uint32_t>(rowIdx.GetValue(choice));
            if (slot >= slots_) {
                continue;  // dropped (-1 is the largest number): the row is not even read
            }
            AddRow(sum, static_cast<uint64_t>(slot) * hidden_ + column, count, Weight(choice), empty);
            empty = false;
        }
        if (empty) {
            Duplicate(sum, 0.0f, static_cast<int32_t>(count));
            VectorBarrier();
        }
        if constexpr (!std::is_same<T, float>::value) {
            Cast(out, sum, RoundMode::CAST_RINT, count);
            VectorBarrier();
        }
        outQueue_.EnQue(out);
        out = outQueue_.template DeQue<T>();
        Store(out_[static_cast<uint64_t>(token) * hidden_ + column], out, count);
        outQueue_.FreeTensor(out);
    }

    __aicore__ inline float Weight(uint32_t choice)
    {
        if constexpr (WEIGHTED) {
            return weightBuffer_.Get<float>().GetValue(choice);
        } else {
            return 1.0f;
        }
    }

    __aicore__ inline void AddRow(const LocalTensor<float>& sum, uint64_t from, uint32_t count,
        float weight, bool isFirst)
    {
        LocalTensor<T> row = rowQueue_.AllocTensor<T>();
        Load(row, rows_[from], count);
        rowQueue_.EnQue(row);
        row = rowQueue_.template DeQue<T>();
        const LocalTensor<float> values = AsFloat<T>(row, rowFloat_, count);
        if (isFirst) {
            Muls(sum, values, weight, static_cast<int32_t>(count));
        } else {
            Axpy(sum, values, weight, static_cast<int32_t>(count));
        }
        VectorBarrier();
        rowQueue_.FreeTensor(row);
    }

    TPipe pipe_;
    TQue<TPosition::VECIN, DOUBLE_BUFFER> rowQueue_;
    TQue<TPosition::VECOUT, DOUBLE_BUFFER> outQueue_;
    TBuf<TPosition::VECCALC> rowFloat_;
    TBuf<TPosition::VECCALC> sum_;
    TBuf<TPosition::VECCALC> rowIdxBuffer_;
    TBuf<TPosition::VECCALC> weightBuffer_;
    GlobalTensor<T> rows_;
    GlobalTensor<T> out_;
    GlobalTensor<int32_t> rowIdx_;
    GlobalTensor<float> weights_;
    Range share_{0, 0};
    uint32_t k_ = 0;
    uint32_t hidden_ = 0;
    uint32_t slots_ = 0;
    uint32_t chunk_ = 0;
    uint32_t tileTokens_ = 0;
};

template <typename T, typename TilingData, bool WEIGHTED>
__aicore__ inline void RunWeightedRows(
    GM_ADDR rows, GM_ADDR rowIdx, GM_ADDR weights, GM_ADDR out, const TilingData& tiling)
{
    WeightedRows<T, TilingData, WEIGHTED> op;
    op.Init(rows, rowIdx, weights, out, tiling);
    op.Process();
}
}  // namespace moe

#endif  // MOE_WEIGHTED_ROWS_H
