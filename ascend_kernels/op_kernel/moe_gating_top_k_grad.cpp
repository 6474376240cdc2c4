// MoeGatingTopKGrad: from the gradients of y and of softmax_out to that of the logits.
//
//   p = softmax(x) or sigmoid(x), recomputed; g[t, e] = d_softmax_out[t, e] + sum over j with
//   expert_idx[t, j] = e of c[t, j]; dx = p * (g - <p, g>), or g * p * (1 - p). With d = dy times the
//   factor: without renormalisation c = d; with it, y_j = p_j / S with S the sum of the chosen p, and
//   c_j = (d_j - <d, y>) / S.
//   A token without experts (expert_idx = E) has no c: only d_softmax_out reaches its logits.
#include "moe_gating_common.h"
#include "moe_tiling_keys.h"

namespace moe {
template <typename T, bool IS_EIGHT>
class GatingTopKGrad {
public:
    __aicore__ inline void Init(GM_ADDR x, GM_ADDR expertIdx, GM_ADDR dy, GM_ADDR dSoftmaxOut,
        GM_ADDR dx, const MoeGatingTopKGradTilingData& tiling)
    {
        experts_ = tiling.experts;
        k_ = tiling.k;
        renorm_ = tiling.renorm != 0;
        hasDSoftmax_ = tiling.hasDSoftmax != 0;
        isSigmoid_ = tiling.normType != 0;
        factor_ = tiling.factor;
        width_ = tiling.width;
        tileTokens_ = tiling.tileTokens;
        columnPitch_ = AlignUp(tileTokens_, LANES);
        share_ = ShareOfBlock(tiling.tokens);

        x_.SetGlobalBuffer((__gm__ T*)x, tiling.tokens * experts_);
        dx_.SetGlobalBuffer((__gm__ T*)dx, tiling.tokens * experts_);
        expertIdx_.SetGlobalBuffer((__gm__ int32_t*)expertIdx, tiling.tokens * k_);
        dy_.SetGlobalBuffer((__gm__ float*)dy, tiling.tokens * k_);

        const uint32_t matrixBytes = tileTokens_ * width_ * sizeof(float);
        const uint32_t rowBytes = AlignUp(experts_ * sizeof(T), IS_EIGHT ? 1 : BLOCK_BYTES);
        const uint32_t chosenBytes = AlignUp(tileTokens_ * k_ * sizeof(float), BLOCK_BYTES);
        const uint32_t columnBytes = columnPitch_ * sizeof(float);
        pipe_.InitBuffer(xQueue_, DOUBLE_BUFFER, tileTokens_ * rowBytes);
        // small, and free again early in a tile: one buffer each, which also spares event ids
        pipe_.InitBuffer(expertQueue_, 1, chosenBytes);
        pipe_.InitBuffer(dyQueue_, 1, chosenBytes);
        pipe_.InitBuffer(dxQueue_, DOUBLE_BUFFER, tileTokens_ * rowBytes);
        if (hasDSoftmax_) {
            dSoftmaxOut_.SetGlobalBuffer((__gm__ float*)dSoftmaxOut, tiling.tokens * experts_);
            const uint32_t floatRow = AlignUp(experts_ * sizeof(float), IS_EIGHT ? 1 : BLOCK_BYTES);
            pipe_.InitBuffer(dSoftmaxQueue_, DOUBLE_BUFFER, tileTokens_ * floatRow);
        }
        pipe_.InitBuffer(probs_, matrixBytes);
        pipe_.InitBuffer(dProbs_, matrixBytes);
        pipe_.InitBuffer(scratch_, matrixBytes);
        pipe_.InitBuffer(spread_, tileTokens_ * BLOCK_BYTES);
        pipe_.InitBuffer(bits_, AlignUp(tileTokens_ * width_ / 8, BLOCK_BYTES));
        pipe_.InitBuffer(numbers_, (IS_EIGHT ? LANES : width_) * sizeof(float));
        pipe_.InitBuffer(column_, columnBytes);
        pipe_.InitBuffer(sum_, columnBytes);
        pipe_.InitBuffer(chosen_, k_ * columnBytes);
        pipe_.InitBuffer(dChosen_, k_ * columnBytes);
        pipe_.InitBuffer(probsChosen_, k_ * columnBytes);
        pipe_.InitBuffer(offsets_, columnBytes);
        pipe_.InitBuffer(integers_, columnBytes);
    }

    __aicore__ inline void Process()
    {
        if (share_.begin >= share_.end) {
            return;
        }
        Prepare();
        for (uint32_t first = share_.begin; first < share_.end; first += tileTokens_) {
            Tile(first, Smaller(tileTokens_, share_.end - first));
        }
    }

private:
    __aicore__ inline void Prepare()
    {
        const int32_t all = static_cast<int32_t>(k_ * columnPitch_);
        NumberColumns<IS_EIGHT>(numbers_.Get<float>(), scratch_.Get<int32_t>(), width_);
        // column j of rows of k: every k-th element
        LocalTensor<int32_t> offsets = offsets_.Get<int32_t>();
        CreateVecIndex(offsets, 0, tileTokens_);
        VectorBarrier();
        Muls(offsets, offsets, static_cast<int32_t>(k_), static_cast<int32_t>(tileTokens_));
        VectorBarrier();
        ToByteOffsets(offsets, tileTokens_);
        Duplicate(chosen_.Get<float>(), static_cast<float>(experts_), all);
        Duplicate(dChosen_.Get<float>(), 0.0f, all);
        Duplicate(probsChosen_.Get<float>(), 0.0f, all);
        VectorBarrier();
    }

    __aicore__ inline void Tile(uint32_t first, uint32_t tokens)
    {
        const RowMatrix<IS_EIGHT> matrix(AlignUp(tokens, EIGHT), width_);
        LocalTensor<float> probs = probs_.Get<float>();
        LocalTensor<float> dProbs = dProbs_.Get<float>();
        LocalTensor<float> scratch = scratch_.Get<float>();
        LocalTensor<float> column = column_.Get<float>();
        LocalTensor<float> spread = spread_.Get<float>();

        ReadMatrix(probs, xQueue_, x_[first * experts_], tokens, matrix, LOWEST);
        if (isSigmoid_) {
            Sigmoid(matrix, probs, scratch);
        } else {
            Softmax(matrix, probs, scratch, column, spread);
        }
        if (hasDSoftmax_) {
            ReadMatrix(
                dProbs, dSoftmaxQueue_, dSoftmaxOut_[first * experts_], tokens, matrix, 0.0f);
        } else {
            Duplicate(dProbs, 0.0f, matrix.Size());
            VectorBarrier();
        }
        ReadChosen(first, tokens);
        if (factor_ != 1.0f) {
            LocalTensor<float> dChosen = dChosen_.Get<float>();
            Muls(dChosen, dChosen, factor_, static_cast<int32_t>(k_ * columnPitch_));
            VectorBarrier();
        }
        if (renorm_) {
            Renormalize(matrix);
        }
        for (uint32_t j = 0; j < k_; ++j) {
            AddToChosen(matrix, j);
        }
        if (isSigmoid_) {
            SigmoidGradient(matrix);
        } else {
            SoftmaxGradient(matrix);
        }
        WriteGradient(first, tokens);
    }

    // Rows of a global matrix into `dst`, `rest` wherever they do not reach.
    template <typename U, typename Queue>
    __aicore__ inline void ReadMatrix(const LocalTensor<float>& dst, Queue& queue,
        const GlobalTensor<U>& src, uint32_t tokens, const RowMatrix<IS_EIGHT>& matrix, float rest)
    {
        LocalTensor<U> in = queue.template AllocTensor<U>();
        if constexpr (IS_EIGHT) {
            Load(in, src, tokens * experts_);
        } else {
            LoadRows(in, src, tokens, experts_);
        }
        queue.EnQue(in);
        in = queue.template DeQue<U>();
        Duplicate(dst, rest, matrix.Size());
        VectorBarrier();
        ReadLogits<U, IS_EIGHT>(dst, in, tokens, experts_, width_);
        queue.FreeTensor(in);
    }

    // g -> p * (g - <p, g>)
    __aicore__ inline void SoftmaxGradient(const RowMatrix<IS_EIGHT>& matrix)
    {
        LocalTensor<float> probs = probs_.Get<float>();
        LocalTensor<float> dProbs = dProbs_.Get<float>();
        LocalTensor<float> scratch = scratch_.Get<float>();
        Mul(scratch, probs, dProbs, matrix.Size());
        VectorBarrier();
        matrix.RowSum(column_.Get<float>(), scratch, scratch);
        matrix.Spread(spread_.Get<float>(), column_.Get<float>());
        matrix.SubtractColumn(dProbs, dProbs, spread_.Get<float>());
        Mul(dProbs, dProbs, probs, matrix.Size());
        VectorBarrier();
    }

    // g -> g * p * (1 - p)
    __aicore__ inline void SigmoidGradient(const RowMatrix<IS_EIGHT>& matrix)
    {
        LocalTensor<float> probs = probs_.Get<float>();
        LocalTensor<float> dProbs = dProbs_.Get<float>();
        LocalTensor<float> scratch = scratch_.Get<float>();
        Muls(scratch, probs, -1.0f, matrix.Size());
        Mul(dProbs, dProbs, probs, matrix.Size());
        VectorBarrier();
        Adds(scratch, scratch, 1.0f, matrix.Size());
        VectorBarrier();
        Mul(dProbs, dProbs, scratch, matrix.Size());
        VectorBarrier();
    }

    // Rows [tokens][k] of experts and dy -> columns [k][tokens]; dy is 0 where there is no expert.
    __aicore__ inline void ReadChosen(uint32_t first, uint32_t tokens)
    {
        LocalTensor<int32_t> expert = expertQueue_.template AllocTensor<int32_t>();
        Load(expert, expertIdx_[first * k_], tokens * k_);
        expertQueue_.EnQue(expert);
        LocalTensor<float> dy = dyQueue_.template AllocTensor<float>();
        Load(dy, dy_[first * k_], tokens * k_);
        dyQueue_.EnQue(dy);
        expert = expertQueue_.template DeQue<int32_t>();
        dy = dyQueue_.template DeQue<float>();

        LocalTensor<int32_t> integers = integers_.Get<int32_t>();
        LocalTensor<uint32_t> offsets = offsets_.Get<uint32_t>();
        LocalTensor<uint8_t> bits = bits_.Get<uint8_t>();
        for (uint32_t j = 0; j < k_; ++j) {
            LocalTensor<float> chosen = chosen_.Get<float>()[j * columnPitch_];
            LocalTensor<float> dChosen = dChosen_.Get<float>()[j * columnPitch_];
            const uint32_t shift = j * static_cast<uint32_t>(sizeof(int32_t));
            Gather(integers, expert, offsets, shift, tokens);
            Gather(dChosen, dy, offsets, shift, tokens);
            VectorBarrier();
            Cast(chosen, integers, RoundMode::CAST_NONE, tokens);
            VectorBarrier();
            CompareScalar(bits, chosen, static_cast<float>(experts_) - 0.5f, CMPMODE::LT,
                columnPitch_);
            VectorBarrier();
            Select(dChosen, bits, dChosen, 0.0f, SELMODE::VSEL_TENSOR_SCALAR_MODE, columnPitch_);
            VectorBarrier();
        }
        expertQueue_.FreeTensor(expert);
        dyQueue_.FreeTensor(dy);
    }

    // dy -> c = (dy - <dy, y>) / S, with y = p / S.
    __aicore__ inline void Renormalize(const RowMatrix<IS_EIGHT>& matrix)
    {
        const int32_t count = static_cast<int32_t>(columnPitch_);
        LocalTensor<float> sum = sum_.Get<float>();
        LocalTensor<float> inner = column_.Get<float>();
        Duplicate(sum, 0.0f, count);
        Duplicate(inner, 0.0f, count);
        VectorBarrier();
        for (uint32_t j = 0; j < k_; ++j) {
            LocalTensor<float> p = probsChosen_.Get<float>()[j * columnPitch_];
            LocalTensor<float> dy = dChosen_.Get<float>()[j * columnPitch_];
            MarkChosen(matrix, j);
            matrix.SelectOr(scratch_.Get<float>(), bits_.Get<uint8_t>(), probs_.Get<float>(), 0.0f);
            matrix.RowSum(p, scratch_.Get<float>(), scratch_.Get<float>());
            Add(sum, sum, p, count);
            VectorBarrier();
            Mul(p, p, dy, count);
            VectorBarrier();
            Add(inner, inner, p, count);
            VectorBarrier();
        }
        // tokens without experts have S = 0 and dy = 0: any divisor keeps their c at 0
        if (isSigmoid_) {
            Adds(sum, sum, TINY, count);
        } else {
            Maxs(sum, sum, SMALLEST_SUM, count);
        }
        VectorBarrier();
        Div(inner, inner, sum, count);
        VectorBarrier();
        for (uint32_t j = 0; j < k_; ++j) {
            LocalTensor<float> dy = dChosen_.Get<float>()[j * columnPitch_];
            Sub(dy, dy, inner, count);
            VectorBarrier();
            Div(dy, dy, sum, count);
        }
        VectorBarrier();
    }

    __aicore__ inline void AddToChosen(const RowMatrix<IS_EIGHT>& matrix, uint32_t j)
    {
        LocalTensor<float> scratch = scratch_.Get<float>();
        LocalTensor<float> spread = spread_.Get<float>();
        MarkChosen(matrix, j);
        matrix.Spread(spread, dChosen_.Get<float>()[j * columnPitch_]);
        matrix.SelectColumn(scratch, bits_.Get<uint8_t>(), spread, 0.0f);
        Add(dProbs_.Get<float>(), dProbs_.Get<float>(), scratch, matrix.Size());
        VectorBarrier();
    }

    // Sets the bit of the j-th chosen expert of every row.
    __aicore__ inline void MarkChosen(const RowMatrix<IS_EIGHT>& matrix, uint32_t j)
    {
        LocalTensor<float> spread = spread_.Get<float>();
        matrix.Spread(spread, chosen_.Get<float>()[j * columnPitch_]);
        matrix.ColumnNumberIs(
            bits_.Get<uint8_t>(), numbers_.Get<float>(), spread, CMPMODE::EQ);
    }

    __aicore__ inline void WriteGradient(uint32_t first, uint32_t tokens)
    {
        LocalTensor<T> dx = dxQueue_.template AllocTensor<T>();
        WriteLogits<T, IS_EIGHT>(dx, dProbs_.Get<float>(), tokens, experts_, width_);
        dxQueue_.EnQue(dx);
        dx = dxQueue_.template DeQue<T>();
        if constexpr (IS_EIGHT) {
            Store(dx_[first * experts_], dx, tokens * experts_);
        } else {
            StoreRows(dx_[first * experts_], dx, tokens, experts_, 0);
        }
        dxQueue_.FreeTensor(dx);
    }

    static constexpr float SMALLEST_SUM = 1.0e-37f;

    TPipe pipe_;
    TQue<TPosition::VECIN, DOUBLE_BUFFER> xQueue_;
    TQue<TPosition::VECIN, 1> expertQueue_;
    TQue<TPosition::VECIN, 1> dyQueue_;
    TQue<TPosition::VECIN, DOUBLE_BUFFER> dSoftmaxQueue_;
    TQue<TPosition::VECOUT, DOUBLE_BUFFER> dxQueue_;
    TBuf<TPosition::VECCALC> probs_;        // [tile, width]
    TBuf<TPosition::VECCALC> dProbs_;       // [tile, width]
    TBuf<TPosition::VECCALC> scratch_;      // [tile, width]
    TBuf<TPosition::VECCALC> spread_;       // [tile] blocks
    TBuf<TPosition::VECCALC> bits_;         // [tile, width] bits
    TBuf<TPosition::VECCALC> numbers_;      // column numbers
    TBuf<TPosition::VECCALC> column_;       // [tile]
    TBuf<TPosition::VECCALC> sum_;          // [tile]
    TBuf<TPosition::VECCALC> chosen_;       // [k, tile] experts
    TBuf<TPosition::VECCALC> dChosen_;      // [k, tile] dy, then c
    TBuf<TPosition::VECCALC> probsChosen_;  // [k, tile] p of the chosen
    TBuf<TPosition::VECCALC> offsets_;      // [tile]
    TBuf<TPosition::VECCALC> integers_;     // [tile]
    GlobalTensor<T> x_;
    GlobalTensor<T> dx_;
    GlobalTensor<int32_t> expertIdx_;
    GlobalTensor<float> dy_;
    GlobalTensor<float> dSoftmaxOut_;
    Range share_{0, 0};
    uint32_t experts_ = 0;
    uint32_t k_ = 0;
    uint32_t width_ = 0;
    uint32_t tileTokens_ = 0;
    uint32_t columnPitch_ = 0;
    bool renorm_ = false;
    bool hasDSoftmax_ = false;
    bool isSigmoid_ = false;
    float factor_ = 1.0f;
};

template <typename T, bool IS_EIGHT>
__aicore__ inline void RunGatingTopKGrad(GM_ADDR x, GM_ADDR expertIdx, GM_ADDR dy,
    GM_ADDR dSoftmaxOut, GM_ADDR dx, const MoeGatingTopKGradTilingData& tiling)
{
    GatingTopKGrad<T, IS_EIGHT> op;
    op.Init(x, expertIdx, dy, dSoftmaxOut, dx, tiling);
    op.Process();
}
}  // namespace moe

extern "C" __global__ __aicore__ void moe_gating_top_k_grad(GM_ADDR x, GM_ADDR expert_idx,
    GM_ADDR dy, GM_ADDR d_softmax_out, GM_ADDR dx, GM_ADDR workspace, GM_ADDR tiling)
{
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
    GET_TILING_DATA(tilingData, tiling);
    if (TILING_KEY_IS(MOE_GATING_EIGHT_FLOAT)) {
        moe::RunGatingTopKGrad<float, true>(x, expert_idx, dy, d_softmax_out, dx, tilingData);
    } else if (TILING_KEY_IS(MOE_GATING_EIGHT_HALF)) {
        moe::RunGatingTopKGrad<half, true>(x, expert_idx, dy, d_softmax_out, dx, tilingData);
    } else if (TILING_KEY_IS(MOE_GATING_EIGHT_BFLOAT16)) {
        moe::RunGatingTopKGrad<bfloat16_t, true>(x, expert_idx, dy, d_softmax_out, dx, tilingData);
    } else if (TILING_KEY_IS(MOE_GATING_WIDE_FLOAT)) {
        moe::RunGatingTopKGrad<float, false>(x, expert_idx, dy, d_softmax_out, dx, tilingData);
    } else if (TILING_KEY_IS(MOE_GATING_WIDE_HALF)) {
        moe::RunGatingTopKGrad<half, false>(x, expert_idx, dy, d_softmax_out, dx, tilingData);
    } else if (TILING_KEY_IS(MOE_GATING_WIDE_BFLOAT16)) {
        moe::RunGatingTopKGrad<bfloat16_t, false>(x, expert_idx, dy, d_softmax_out, dx, tilingData);
    }
}
