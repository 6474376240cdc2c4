// MoeSwiglu: y = silu(gate) * up = gate / (1 + exp(-gate)) * up in float32, in the rows of the groups;
// 0 in those behind them, which are not read.
#include "moe_swiglu_common.h"
#include "moe_tiling_keys.h"

namespace moe {
template <typename T>
class Swiglu {
public:
    __aicore__ inline void Init(
        GM_ADDR gate, GM_ADDR up, GM_ADDR cumsum, GM_ADDR y, const MoeSwigluTilingData& tiling)
    {
        const uint64_t size = static_cast<uint64_t>(tiling.rows) * tiling.width;
        gate_.SetGlobalBuffer((__gm__ T*)gate, size);
        up_.SetGlobalBuffer((__gm__ T*)up, size);
        y_.SetGlobalBuffer((__gm__ T*)y, size);
        pipe_.InitBuffer(gateQueue_, DOUBLE_BUFFER, tiling.chunk * sizeof(T));
        pipe_.InitBuffer(upQueue_, DOUBLE_BUFFER, tiling.chunk * sizeof(T));
        pipe_.InitBuffer(yQueue_, DOUBLE_BUFFER, tiling.chunk * sizeof(T));
        pipe_.InitBuffer(silu_, tiling.chunk * sizeof(float));
        if constexpr (!std::is_same<T, float>::value) {
            pipe_.InitBuffer(gateFloat_, tiling.chunk * sizeof(float));
            pipe_.InitBuffer(upFloat_, tiling.chunk * sizeof(float));
        }
        elements_.Init(pipe_, cumsum, tiling.groups, tiling.rows, tiling.width, tiling.chunk,
            tiling.zeroBytes);
    }

    __aicore__ inline void Process()
    {
        const Range share = elements_.Share();
        for (uint32_t piece = share.begin; piece < share.end; ++piece) {
            Piece(elements_.Begin(piece), elements_.Count(piece));
        }
        elements_.ZeroRest(y_);
    }

private:
    __aicore__ inline void Piece(uint64_t at, uint32_t count)
    {
        LocalTensor<T> gate = gateQueue_.template AllocTensor<T>();
        Load(gate, gate_[at], count);
        gateQueue_.EnQue(gate);
        LocalTensor<T> up = upQueue_.template AllocTensor<T>();
        Load(up, up_[at], count);
        upQueue_.EnQue(up);
        gate = gateQueue_.template DeQue<T>();
        const int32_t n = static_cast<int32_t>(count);
        const LocalTensor<float> g = AsFloat<T>(gate, gateFloat_, count);
        LocalTensor<float> silu = silu_.Get<float>();
        OnePlusExp(silu, g, n);
        Div(silu, g, silu, n);
        VectorBarrier();
        gateQueue_.FreeTensor(gate);
        up = upQueue_.template DeQue<T>();
        const LocalTensor<float> u = AsFloat<T>(up, upFloat_, count);
        LocalTensor<T> y = yQueue_.template AllocTensor<T>();
        const LocalTensor<float> result = ResultIn<T>(y, silu);
        Mul(result, silu, u, n);
        VectorBarrier();
        RoundTo<T>(y, result, count);
        upQueue_.FreeTensor(up);
        yQueue_.EnQue(y);
        y = yQueue_.template DeQue<T>();
        Store(y_[at], y, count);
        yQueue_.FreeTensor(y);
    }

    TPipe pipe_;
    TQue<TPosition::VECIN, DOUBLE_BUFFER> gateQueue_;
    TQue<TPosition::VECIN, DOUBLE_BUFFER> upQueue_;
    TQue<TPosition::VECOUT, DOUBLE_BUFFER> yQueue_;
    TBuf<TPosition::VECCALC> silu_;
    TBuf<TPosition::VECCALC> gateFloat_;
    TBuf<TPosition::VECCALC> upFloat_;
    PackedElements elements_;
    GlobalTensor<T> gate_;
    GlobalTensor<T> up_;
    GlobalTensor<T> y_;
};

template <typename T>
__aicore__ inline void RunSwiglu(
    GM_ADDR gate, GM_ADDR up, GM_ADDR cumsum, GM_ADDR y, const MoeSwigluTilingData& tiling)
{
    Swiglu<T> op;
    op.Init(gate, up, cumsum, y, tiling);
    op.Process();
}
}  // namespace moe

extern "C" __global__ __aicore__ void moe_swiglu(GM_ADDR gate, GM_ADDR up,
    GM_ADDR expert_tokens_cumsum, GM_ADDR y, GM_ADDR workspace, GM_ADDR tiling)
{
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
    GET_TILING_DATA(tilingData, tiling);
    if (TILING_KEY_IS(MOE_ROWS_FLOAT)) {
        moe::RunSwiglu<float>(gate, up, expert_tokens_cumsum, y, tilingData);
    } else if (TILING_KEY_IS(MOE_ROWS_HALF)) {
        moe::RunSwiglu<half>(gate, up, expert_tokens_cumsum, y, tilingData);
    } else if (TILING_KEY_IS(MOE_ROWS_BFLOAT16)) {
        moe::RunSwiglu<bfloat16_t>(gate, up, expert_tokens_cumsum, y, tilingData);
    }
}
