// MoeSwigluGrad, the gradients of y = silu(gate) * up, with s = 1 / (1 + exp(-gate)):
//
//   d_gate = dy * up * s * (1 + gate * (1 - s));  d_up = dy * gate * s
//
// in float32, in the rows of the groups; 0 in those behind them, which are not read.
#include "moe_swiglu_common.h"
#include "moe_tiling_keys.h"

namespace moe {
template <typename T>
class SwigluGrad {
public:
    __aicore__ inline void Init(GM_ADDR dy, GM_ADDR gate, GM_ADDR up, GM_ADDR cumsum,
        GM_ADDR dGate, GM_ADDR dUp, const MoeSwigluGradTilingData& tiling)
    {
        const uint64_t size = static_cast<uint64_t>(tiling.rows) * tiling.width;
        dy_.SetGlobalBuffer((__gm__ T*)dy, size);
        gate_.SetGlobalBuffer((__gm__ T*)gate, size);
        up_.SetGlobalBuffer((__gm__ T*)up, size);
        dGate_.SetGlobalBuffer((__gm__ T*)dGate, size);
        dUp_.SetGlobalBuffer((__gm__ T*)dUp, size);
        pipe_.InitBuffer(dyQueue_, DOUBLE_BUFFER, tiling.chunk * sizeof(T));
        pipe_.InitBuffer(gateQueue_, DOUBLE_BUFFER, tiling.chunk * sizeof(T));
        pipe_.InitBuffer(upQueue_, DOUBLE_BUFFER, tiling.chunk * sizeof(T));
        pipe_.InitBuffer(outQueue_, DOUBLE_BUFFER, tiling.chunk * sizeof(T));
        pipe_.InitBuffer(sigmoid_, tiling.chunk * sizeof(float));
        pipe_.InitBuffer(rest_, tiling.chunk * sizeof(float));
        if constexpr (!std::is_same<T, float>::value) {
            pipe_.InitBuffer(dyFloat_, tiling.chunk * sizeof(float));
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
        elements_.ZeroRest(dGate_);
        elements_.ZeroRest(dUp_);
    }

private:
    __aicore__ inline void Piece(uint64_t at, uint32_t count)
    {
        const int32_t n = static_cast<int32_t>(count);
        LocalTensor<T> gate = Read(gateQueue_, gate_, at, count);
        LocalTensor<T> dy = Read(dyQueue_, dy_, at, count);
        LocalTensor<T> up = Read(upQueue_, up_, at, count);
        gate = gateQueue_.template DeQue<T>();
        const LocalTensor<float> g = AsFloat<T>(gate, gateFloat_, count);
        LocalTensor<float> sigmoid = sigmoid_.Get<float>();
        LocalTensor<float> rest = rest_.Get<float>();
        OnePlusExp(sigmoid, g, n);
        Duplicate(rest, 1.0f, n);
        VectorBarrier();
        Div(sigmoid, rest, sigmoid, n);
        VectorBarrier();

        dy = dyQueue_.template DeQue<T>();
        const LocalTensor<float> d = AsFloat<T>(dy, dyFloat_, count);
        Mul(rest, g, sigmoid, n);
        VectorBarrier();
        Write(dUp_, at, rest, d, n);  // silu * dy

        up = upQueue_.template DeQue<T>();
        const LocalTensor<float> u = AsFloat<T>(up, upFloat_, count);
        Muls(rest, sigmoid, -1.0f, n);
        VectorBarrier();
        Adds(rest, rest, 1.0f, n);
        VectorBarrier();
        Mul(rest, rest, g, n);
        VectorBarrier();
        Adds(rest, rest, 1.0f, n);
        VectorBarrier();
        Mul(rest, rest, sigmoid, n);
        VectorBarrier();
        Mul(rest, rest, u, n);
        VectorBarrier();
        Write(dGate_, at, rest, d, n);
        gateQueue_.FreeTensor(gate);
        dyQueue_.FreeTensor(dy);
        upQueue_.FreeTensor(up);
    }

    __aicore__ inline LocalTensor<T> Read(TQue<TPosition::VECIN, DOUBLE_BUFFER>& queue,
        const GlobalTensor<T>& from, uint64_t at, uint32_t count)
    {
        LocalTensor<T> values = queue.template AllocTensor<T>();
        Load(values, from[at], count);
        queue.EnQue(values);
        return values;
    }

    // to[at...] = a * b; destroys `a`.
    __aicore__ inline void Write(const GlobalTensor<T>& to, uint64_t at,
        const LocalTensor<float>& a, const LocalTensor<float>& b, int32_t count)
    {
        LocalTensor<T> out = outQueue_.template AllocTensor<T>();
        const LocalTensor<float> result = ResultIn<T>(out, a);
        Mul(result, a, b, count);
        VectorBarrier();
        RoundTo<T>(out, result, static_cast<uint32_t>(count));
        outQueue_.EnQue(out);
        out = outQueue_.template DeQue<T>();
        Store(to[at], out, static_cast<uint32_t>(count));
        outQueue_.FreeTensor(out);
    }

    TPipe pipe_;
    TQue<TPosition::VECIN, DOUBLE_BUFFER> dyQueue_;
    TQue<TPosition::VECIN, DOUBLE_BUFFER> gateQueue_;
    TQue<TPosition::VECIN, DOUBLE_BUFFER> upQueue_;
    TQue<TPosition::VECOUT, DOUBLE_BUFFER> outQueue_;
    TBuf<TPosition::VECCALC> sigmoid_;
    TBuf<TPosition::VECCALC> rest_;
    TBuf<TPosition::VECCALC> dyFloat_;
    TBuf<TPosition::VECCALC> gateFloat_;
    TBuf<TPosition::VECCALC> upFloat_;
    PackedElements elements_;
    GlobalTensor<T> dy_;
    GlobalTensor<T> gate_;
    GlobalTensor<T> up_;
    GlobalTensor<T> dGate_;
    GlobalTensor<T> dUp_;
};

template <typename T>
__aicore__ inline void RunSwigluGrad(GM_ADDR dy, GM_ADDR gate, GM_ADDR up, GM_ADDR cumsum,
    GM_ADDR dGate, GM_ADDR dUp, const MoeSwigluGradTilingData& tiling)
{
    SwigluGrad<T> op;
    op.Init(dy, gate, up, cumsum, dGate, dUp, tiling);
    op.Process();
}
}  // namespace moe

extern "C" __global__ __aicore__ void moe_swiglu_grad(GM_ADDR dy, GM_ADDR gate, GM_ADDR up,
    GM_ADDR expert_tokens_cumsum, GM_ADDR d_gate, GM_ADDR d_up, GM_ADDR workspace, GM_ADDR tiling)
{
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
    GET_TILING_DATA(tilingData, tiling);
    if (TILING_KEY_IS(MOE_ROWS_FLOAT)) {
        moe::RunSwigluGrad<float>(dy, gate, up, expert_tokens_cumsum, d_gate, d_up, tilingData);
    } else if (TILING_KEY_IS(MOE_ROWS_HALF)) {
        moe::RunSwigluGrad<half>(dy, gate, up, expert_tokens_cumsum, d_gate, d_up, tilingData);
    } else if (TILING_KEY_IS(MOE_ROWS_BFLOAT16)) {
        moe::RunSwigluGrad<bfloat16_t>(
            dy, gate, up, expert_tokens_cumsum, d_gate, d_up, tilingData);
    }
}
