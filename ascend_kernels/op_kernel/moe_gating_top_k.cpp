// MoeGatingTopK: scores of all experts, the k best, optionally divided by their sum.
//
//   softmax_out = softmax(x) or sigmoid(x) in float32, if it is asked for; expert_idx = the k largest
//   of it, plus the bias if there is one, among the experts of the best groups if there are groups;
//   best first, the lower expert first among equals; y = their scores, without the bias, times a
//   factor; row_idx[t, j] = j * T + t. A finished token (padding) gets y = 0 and expert_idx = E, "no
//   expert"; its scores are still written.
#include "moe_expert_groups.h"
#include "moe_tiling_keys.h"

namespace moe {
template <typename T, bool IS_EIGHT>
class GatingTopK {
public:
    __aicore__ inline void Init(GM_ADDR x, GM_ADDR bias, GM_ADDR finished, GM_ADDR y,
        GM_ADDR expertIdx, GM_ADDR rowIdx, GM_ADDR softmaxOut, const MoeGatingTopKTilingData& tiling)
    {
        tokens_ = tiling.tokens;
        experts_ = tiling.experts;
        k_ = tiling.k;
        renorm_ = tiling.renorm != 0;
        hasFinished_ = tiling.hasFinished != 0;
        hasBias_ = tiling.hasBias != 0;
        hasGroups_ = tiling.groupCount > 1;
        isSigmoid_ = tiling.normType != 0;
        writesScores_ = tiling.outFlag != 0;
        factor_ = tiling.factor;
        width_ = tiling.width;
        tileTokens_ = tiling.tileTokens;
        columnPitch_ = AlignUp(tileTokens_, LANES);
        share_ = ShareOfBlock(tokens_);

        x_.SetGlobalBuffer((__gm__ T*)x, tokens_ * experts_);
        y_.SetGlobalBuffer((__gm__ float*)y, tokens_ * k_);
        expertIdx_.SetGlobalBuffer((__gm__ int32_t*)expertIdx, tokens_ * k_);
        rowIdx_.SetGlobalBuffer((__gm__ int32_t*)rowIdx, tokens_ * k_);
        softmaxOut_.SetGlobalBuffer(
            (__gm__ float*)softmaxOut, writesScores_ ? tokens_ * experts_ : 1);

        const uint32_t matrixBytes = tileTokens_ * width_ * sizeof(float);
        const uint32_t rowBytes = AlignUp(experts_ * sizeof(T), IS_EIGHT ? 1 : BLOCK_BYTES);
        const uint32_t chosenBytes = AlignUp(tileTokens_ * k_ * sizeof(float), BLOCK_BYTES);
        const uint32_t columnBytes = columnPitch_ * sizeof(float);
        pipe_.InitBuffer(xQueue_, DOUBLE_BUFFER, tileTokens_ * rowBytes);
        if (writesScores_) {
            pipe_.InitBuffer(softmaxQueue_, DOUBLE_BUFFER, matrixBytes);
        }
        // small and last in a tile: one buffer each, which also spares event ids (8 in all)
        pipe_.InitBuffer(yQueue_, 1, chosenBytes);
        pipe_.InitBuffer(expertQueue_, 1, chosenBytes);
        pipe_.InitBuffer(rowQueue_, 1, chosenBytes);
        pipe_.InitBuffer(probs_, matrixBytes);
        pipe_.InitBuffer(scratch_, matrixBytes);
        pipe_.InitBuffer(spread_, tileTokens_ * BLOCK_BYTES);
        pipe_.InitBuffer(bits_, AlignUp(tileTokens_ * width_ / 8, BLOCK_BYTES));
        pipe_.InitBuffer(numbers_, (IS_EIGHT ? LANES : width_) * sizeof(float));
        pipe_.InitBuffer(column_, columnBytes);
        pipe_.InitBuffer(values_, k_ * columnBytes);
        pipe_.InitBuffer(chosen_, k_ * columnBytes);
        pipe_.InitBuffer(gathered_, chosenBytes);
        pipe_.InitBuffer(offsets_, chosenBytes);
        pipe_.InitBuffer(rowPattern_, chosenBytes);
        if (hasBias_) {
            bias_.SetGlobalBuffer((__gm__ float*)bias, experts_);
            pipe_.InitBuffer(biasRow_, width_ * sizeof(float));
            pipe_.InitBuffer(choice_, matrixBytes);
        }
        if (hasGroups_) {
            groups_.Init(pipe_, tileTokens_, width_, tiling.groupCount,
                experts_ / tiling.groupCount, tiling.kGroup, tiling.groupSelectMode != 0);
        }
        if (hasFinished_) {
            finishedIn_.SetGlobalBuffer((__gm__ uint8_t*)finished, tokens_);
            pipe_.InitBuffer(finishedQueue_, DOUBLE_BUFFER, AlignUp(tileTokens_, BLOCK_BYTES));
            pipe_.InitBuffer(finishedHalf_, columnPitch_ * sizeof(half));
            pipe_.InitBuffer(finished_, columnBytes);
        }
    }

    __aicore__ inline void Process()
    {
        if (share_.begin >= share_.end) {
            return;
        }
        Prepare();
        if (!writesScores_ && GetBlockIdx() == 0) {
            Sync<HardEvent::V_MTE3>();
            Store(softmaxOut_, values_.Get<float>(), 1);  // an output has one element at least
            Sync<HardEvent::MTE3_V>();
        }
        for (uint32_t first = share_.begin; first < share_.end; first += tileTokens_) {
            Tile(first, Smaller(tileTokens_, share_.end - first));
        }
    }

private:
    // What is the same for all tiles.
    __aicore__ inline void Prepare()
    {
        const uint32_t count = tileTokens_ * k_;
        NumberColumns<IS_EIGHT>(numbers_.Get<float>(), scratch_.Get<int32_t>(), width_);
        LocalTensor<int32_t> offsets = offsets_.Get<int32_t>();
        LocalTensor<int32_t> pattern = rowPattern_.Get<int32_t>();
        // row_idx[t, j] = j * T + t: the transposed index with a pitch of T
        TransposedIndex(pattern, offsets, gathered_.Get<float>(), count, k_, tokens_);
        TransposedIndex(
            offsets, gathered_.Get<int32_t>(), scratch_.Get<float>(), count, k_, columnPitch_);
        ToByteOffsets(offsets, count);
        // the comparisons of whole repeats also read columns past the last token
        Duplicate(values_.Get<float>(), 0.0f, static_cast<int32_t>(k_ * columnPitch_));
        Duplicate(chosen_.Get<float>(), 0.0f, static_cast<int32_t>(k_ * columnPitch_));
        if (hasFinished_) {
            Duplicate(finished_.Get<float>(), 0.0f, static_cast<int32_t>(columnPitch_));
        }
        VectorBarrier();
        if (hasBias_) {
            LocalTensor<float> row = biasRow_.Get<float>();
            Duplicate(row, LOWEST, static_cast<int32_t>(width_));
            Sync<HardEvent::V_MTE2>();
            LoadPadded(row, bias_, experts_, LOWEST);
            Sync<HardEvent::MTE2_V>();
        }
        if (hasGroups_) {
            groups_.Prepare(numbers_.Get<float>(), width_, spread_.Get<float>());
        }
    }

    __aicore__ inline PickRoom Room()
    {
        return {scratch_.Get<float>(), spread_.Get<float>(), numbers_.Get<float>(),
            bits_.Get<uint8_t>()};
    }

    __aicore__ inline void Tile(uint32_t first, uint32_t tokens)
    {
        const RowMatrix<IS_EIGHT> matrix(AlignUp(tokens, EIGHT), width_);
        LocalTensor<float> probs = probs_.Get<float>();
        ReadTile(first, tokens, matrix);
        if (isSigmoid_) {
            Sigmoid(matrix, probs, scratch_.Get<float>());
        } else {
            Softmax(
                matrix, probs, scratch_.Get<float>(), column_.Get<float>(), spread_.Get<float>());
        }
        if (writesScores_) {
            WriteScores(first, tokens, matrix);
        }
        LocalTensor<float> choice = probs;
        if (hasBias_) {
            choice = choice_.Get<float>();
            matrix.AddRow(choice, probs, biasRow_.Get<float>());
        }
        if (hasGroups_) {
            choice = groups_.Restrict(matrix, choice, Room());
        }
        for (uint32_t j = 0; j < k_; ++j) {
            Pick(matrix, choice, j);
        }
        if (renorm_) {
            Normalize(tokens);
        }
        if (factor_ != 1.0f) {
            Muls(values_.Get<float>(), values_.Get<float>(), factor_,
                static_cast<int32_t>(k_ * columnPitch_));
            VectorBarrier();
        }
        if (hasFinished_) {
            MaskFinished(first, tokens);
        }
        WriteChosen(first, tokens);
    }

    __aicore__ inline void ReadTile(
        uint32_t first, uint32_t tokens, const RowMatrix<IS_EIGHT>& matrix)
    {
        LocalTensor<float> probs = probs_.Get<float>();
        LocalTensor<T> x = xQueue_.template AllocTensor<T>();
        if constexpr (IS_EIGHT) {
            Load(x, x_[first * experts_], tokens * experts_);
        } else {
            LoadRows(x, x_[first * experts_], tokens, experts_);
        }
        xQueue_.EnQue(x);
        x = xQueue_.template DeQue<T>();
        // whatever the logits do not reach: columns past the experts, rows past the tokens
        Duplicate(probs, LOWEST, matrix.Size());
        VectorBarrier();
        ReadLogits<T, IS_EIGHT>(probs, x, tokens, experts_, width_);
        xQueue_.FreeTensor(x);
    }

    __aicore__ inline void WriteScores(
        uint32_t first, uint32_t tokens, const RowMatrix<IS_EIGHT>& matrix)
    {
        LocalTensor<float> out = softmaxQueue_.template AllocTensor<float>();
        DataCopy(out, probs_.Get<float>(), static_cast<uint32_t>(matrix.Size()));
        VectorBarrier();
        softmaxQueue_.EnQue(out);
        out = softmaxQueue_.template DeQue<float>();
        if constexpr (IS_EIGHT) {
            Store(softmaxOut_[first * experts_], out, tokens * experts_);
        } else {
            const uint32_t gap = width_ / BLOCK_FLOATS - CeilDiv(experts_, BLOCK_FLOATS);
            StoreRows(softmaxOut_[first * experts_], out, tokens, experts_, gap);
        }
        softmaxQueue_.FreeTensor(out);
    }

    // The j-th expert of every row, and its score.
    __aicore__ inline void Pick(
        const RowMatrix<IS_EIGHT>& matrix, const LocalTensor<float>& choice, uint32_t j)
    {
        LocalTensor<float> value = values_.Get<float>()[j * columnPitch_];
        LocalTensor<float> expert = chosen_.Get<float>()[j * columnPitch_];
        const PickRoom room = Room();
        PickLargest(
            matrix, choice, room, value, expert, static_cast<float>(experts_), j + 1 < k_);
        if (hasBias_) {  // what was largest is not the score
            matrix.Spread(room.spread, expert);
            matrix.ColumnNumberIs(room.bits, room.numbers, room.spread, CMPMODE::EQ);
            matrix.SelectOr(room.scratch, room.bits, probs_.Get<float>(), 0.0f);
            matrix.RowSum(value, room.scratch, room.scratch);
        }
    }

    __aicore__ inline void Normalize(uint32_t tokens)
    {
        const int32_t count = static_cast<int32_t>(tokens);
        LocalTensor<float> sum = column_.Get<float>();
        LocalTensor<float> values = values_.Get<float>();
        DataCopy(sum, values, columnPitch_);
        VectorBarrier();
        for (uint32_t j = 1; j < k_; ++j) {
            Add(sum, sum, values[j * columnPitch_], count);
            VectorBarrier();
        }
        if (isSigmoid_) {
            Adds(sum, sum, TINY, count);
            VectorBarrier();
        }
        for (uint32_t j = 0; j < k_; ++j) {
            Div(values[j * columnPitch_], values[j * columnPitch_], sum, count);
        }
        VectorBarrier();
    }

    __aicore__ inline void MaskFinished(uint32_t first, uint32_t tokens)
    {
        LocalTensor<uint8_t> in = finishedQueue_.template AllocTensor<uint8_t>();
        Load(in, finishedIn_[first], tokens);
        finishedQueue_.EnQue(in);
        in = finishedQueue_.template DeQue<uint8_t>();
        LocalTensor<float> finished = finished_.Get<float>();
        LocalTensor<uint8_t> bits = bits_.Get<uint8_t>();
        Cast(finishedHalf_.Get<half>(), in, RoundMode::CAST_NONE, tokens);
        VectorBarrier();
        Cast(finished, finishedHalf_.Get<half>(), RoundMode::CAST_NONE, tokens);
        VectorBarrier();
        finishedQueue_.FreeTensor(in);
        CompareScalar(bits, finished, 0.5f, CMPMODE::LT, columnPitch_);
        VectorBarrier();
        for (uint32_t j = 0; j < k_; ++j) {
            LocalTensor<float> value = values_.Get<float>()[j * columnPitch_];
            LocalTensor<float> expert = chosen_.Get<float>()[j * columnPitch_];
            Select(value, bits, value, 0.0f, SELMODE::VSEL_TENSOR_SCALAR_MODE, columnPitch_);
            Select(expert, bits, expert, static_cast<float>(experts_),
                SELMODE::VSEL_TENSOR_SCALAR_MODE, columnPitch_);
        }
        VectorBarrier();
    }

    // Columns [k][tokens] -> rows [tokens][k], and out.
    __aicore__ inline void WriteChosen(uint32_t first, uint32_t tokens)
    {
        const uint32_t count = tokens * k_;
        LocalTensor<uint32_t> offsets = offsets_.Get<uint32_t>();
        LocalTensor<float> y = yQueue_.template AllocTensor<float>();
        Gather(y, values_.Get<float>(), offsets, 0U, count);
        yQueue_.EnQue(y);

        LocalTensor<int32_t> expert = expertQueue_.template AllocTensor<int32_t>();
        Gather(gathered_.Get<float>(), chosen_.Get<float>(), offsets, 0U, count);
        VectorBarrier();
        Cast(expert, gathered_.Get<float>(), RoundMode::CAST_RINT, count);
        expertQueue_.EnQue(expert);

        LocalTensor<int32_t> row = rowQueue_.template AllocTensor<int32_t>();
        Adds(row, rowPattern_.Get<int32_t>(), static_cast<int32_t>(first),
            static_cast<int32_t>(count));
        rowQueue_.EnQue(row);
        VectorBarrier();

        y = yQueue_.template DeQue<float>();
        Store(y_[first * k_], y, count);
        yQueue_.FreeTensor(y);
        expert = expertQueue_.template DeQue<int32_t>();
        Store(expertIdx_[first * k_], expert, count);
        expertQueue_.FreeTensor(expert);
        row = rowQueue_.template DeQue<int32_t>();
        Store(rowIdx_[first * k_], row, count);
        rowQueue_.FreeTensor(row);
    }

    TPipe pipe_;
    TQue<TPosition::VECIN, DOUBLE_BUFFER> xQueue_;
    TQue<TPosition::VECIN, DOUBLE_BUFFER> finishedQueue_;
    TQue<TPosition::VECOUT, DOUBLE_BUFFER> softmaxQueue_;
    TQue<TPosition::VECOUT, 1> yQueue_;
    TQue<TPosition::VECOUT, 1> expertQueue_;
    TQue<TPosition::VECOUT, 1> rowQueue_;
    TBuf<TPosition::VECCALC> probs_;         // [tile, width]
    TBuf<TPosition::VECCALC> scratch_;       // [tile, width]
    TBuf<TPosition::VECCALC> spread_;        // [tile] blocks
    TBuf<TPosition::VECCALC> bits_;          // [tile, width] bits
    TBuf<TPosition::VECCALC> numbers_;       // column numbers
    TBuf<TPosition::VECCALC> column_;        // [tile]
    TBuf<TPosition::VECCALC> values_;        // [k, tile]
    TBuf<TPosition::VECCALC> chosen_;        // [k, tile]
    TBuf<TPosition::VECCALC> gathered_;      // [tile, k]
    TBuf<TPosition::VECCALC> offsets_;       // [tile, k]: where in [k, tile]
    TBuf<TPosition::VECCALC> rowPattern_;    // [tile, k]: row_idx of a tile that starts at token 0
    TBuf<TPosition::VECCALC> biasRow_;       // [width]
    TBuf<TPosition::VECCALC> choice_;        // [tile, width]: scores and bias
    TBuf<TPosition::VECCALC> finishedHalf_;
    TBuf<TPosition::VECCALC> finished_;
    ExpertGroups<IS_EIGHT> groups_;
    GlobalTensor<T> x_;
    GlobalTensor<float> bias_;
    GlobalTensor<uint8_t> finishedIn_;
    GlobalTensor<float> y_;
    GlobalTensor<int32_t> expertIdx_;
    GlobalTensor<int32_t> rowIdx_;
    GlobalTensor<float> softmaxOut_;
    Range share_{0, 0};
    uint32_t tokens_ = 0;
    uint32_t experts_ = 0;
    uint32_t k_ = 0;
    uint32_t width_ = 0;
    uint32_t tileTokens_ = 0;
    uint32_t columnPitch_ = 0;
    bool renorm_ = false;
    bool hasFinished_ = false;
    bool hasBias_ = false;
    bool hasGroups_ = false;
    bool isSigmoid_ = false;
    bool writesScores_ = true;
    float factor_ = 1.0f;
};

template <typename T, bool IS_EIGHT>
__aicore__ inline void RunGatingTopK(GM_ADDR x, GM_ADDR bias, GM_ADDR finished, GM_ADDR y,
    GM_ADDR expertIdx, GM_ADDR rowIdx, GM_ADDR softmaxOut, const MoeGatingTopKTilingData& tiling)
{
    GatingTopK<T, IS_EIGHT> op;
    op.Init(x, bias, finished, y, expertIdx, rowIdx, softmaxOut, tiling);
    op.Process();
}
}  // namespace moe

extern "C" __global__ __aicore__ void moe_gating_top_k(GM_ADDR x, GM_ADDR bias, GM_ADDR finished,
    GM_ADDR y, GM_ADDR expert_idx, GM_ADDR row_idx, GM_ADDR softmax_out, GM_ADDR workspace,
    GM_ADDR tiling)
{
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
    GET_TILING_DATA(tilingData, tiling);
    if (TILING_KEY_IS(MOE_GATING_EIGHT_FLOAT)) {
        moe::RunGatingTopK<float, true>(
            x, bias, finished, y, expert_idx, row_idx, softmax_out, tilingData);
    } else if (TILING_KEY_IS(MOE_GATING_EIGHT_HALF)) {
        moe::RunGatingTopK<half, true>(
            x, bias, finished, y, expert_idx, row_idx, softmax_out, tilingData);
    } else if (TILING_KEY_IS(MOE_GATING_EIGHT_BFLOAT16)) {
        moe::RunGatingTopK<bfloat16_t, true>(
            x, bias, finished, y, expert_idx, row_idx, softmax_out, tilingData);
    } else if (TILING_KEY_IS(MOE_GATING_WIDE_FLOAT)) {
        moe::RunGatingTopK<float, false>(
            x, bias, finished, y, expert_idx, row_idx, softmax_out, tilingData);
    } else if (TILING_KEY_IS(MOE_GATING_WIDE_HALF)) {
        moe::RunGatingTopK<half, false>(
            x, bias, finished, y, expert_idx, row_idx, softmax_out, tilingData);
    } else if (TILING_KEY_IS(MOE_GATING_WIDE_BFLOAT16)) {
        moe::RunGatingTopK<bfloat16_t, false>(
            x, bias, finished, y, expert_idx, row_idx, softmax_out, tilingData);
    }
}
