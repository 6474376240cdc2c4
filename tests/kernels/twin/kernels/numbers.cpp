// One instruction over many values, so that its arithmetic can be compared with an oracle.
#include "test_kernel.h"

using namespace AscendC;

namespace {

constexpr uint32_t kTile = 1024;

struct NumbersTilingData {
    uint32_t n, mode;
};

// y = f(x), kTile elements at a time; n is a multiple of kTile.
template <typename To, typename From, typename Function>
void map(GM_ADDR x, GM_ADDR y, uint32_t n, const Function& f)
{
    TPipe pipe;
    TQue<QuePosition::VECIN, 1> in;
    TQue<QuePosition::VECOUT, 1> out;
    pipe.InitBuffer(in, 1, kTile * sizeof(From));
    pipe.InitBuffer(out, 1, kTile * sizeof(To));
    GlobalTensor<From> from;
    GlobalTensor<To> to;
    from.SetGlobalBuffer(reinterpret_cast<From*>(x), n);
    to.SetGlobalBuffer(reinterpret_cast<To*>(y), n);
    for (uint32_t i = 0; i < n; i += kTile) {
        LocalTensor<From> a = in.AllocTensor<From>();
        DataCopy(a, from[i], kTile);
        in.EnQue(a);
        a = in.DeQue<From>();
        LocalTensor<To> b = out.AllocTensor<To>();
        f(b, a);
        in.FreeTensor(a);
        out.EnQue(b);
        b = out.DeQue<To>();
        DataCopy(to[i], b, kTile);
        out.FreeTensor(b);
    }
}

template <typename To, typename From>
void cast(GM_ADDR x, GM_ADDR y, GM_ADDR, GM_ADDR tiling)
{
    GET_TILING_DATA_WITH_STRUCT(NumbersTilingData, t, tiling);
    map<To, From>(x, y, t.n, [&](LocalTensor<To>& b, LocalTensor<From>& a) {
        Cast(b, a, static_cast<RoundMode>(t.mode), kTile);
    });
}

// The upper half of `a` is the other operand.
template <typename T>
void arithmetic(GM_ADDR x, GM_ADDR y, GM_ADDR, GM_ADDR tiling)
{
    GET_TILING_DATA_WITH_STRUCT(NumbersTilingData, t, tiling);
    map<T, T>(x, y, t.n, [&](LocalTensor<T>& b, LocalTensor<T>& a) {
        constexpr int32_t half_tile = kTile / 2;
        const LocalTensor<T> left = a, right = a[half_tile];
        Duplicate(b, T(0.0f), kTile);
        PipeBarrier<PIPE_V>();
        switch (t.mode) {
            case 0: Add(b, left, right, half_tile); break;
            case 1: Sub(b, left, right, half_tile); break;
            case 2: Mul(b, left, right, half_tile); break;
            case 3: Div(b, left, right, half_tile); break;
            case 4: Max(b, left, right, half_tile); break;
            case 5: Min(b, left, right, half_tile); break;
            case 6: Exp(b, left, half_tile); break;
            case 7: Muls(b, left, T(1.5f), half_tile); break;
            case 8: Sqrt(b, left, half_tile); break;
            default: Abs(b, left, half_tile); break;
        }
    });
}

// The sum of each repeat, in the order of the vector unit.
void sums(GM_ADDR x, GM_ADDR y, GM_ADDR, GM_ADDR tiling)
{
    GET_TILING_DATA_WITH_STRUCT(NumbersTilingData, t, tiling);
    map<float, float>(x, y, t.n, [&](LocalTensor<float>& b, LocalTensor<float>& a) {
        Duplicate(b, 0.0f, kTile);
        PipeBarrier<PIPE_V>();
        switch (t.mode) {
            case 0: WholeReduceSum(b, a, 64, kTile / 64, 1, 1, 8); break;
            case 1: BlockReduceSum(b, a, kTile / 64, 64, 1, 1, 8); break;
            case 2:
                WholeReduceMax(b, a, 64, kTile / 64, 1, 1, 8, ReduceOrder::ORDER_VALUE_INDEX);
                break;
            default:
                WholeReduceMin(b, a, 40, kTile / 64, 1, 1, 8, ReduceOrder::ORDER_ONLY_VALUE);
        }
    });
}

// b = a + 1 in the lanes of the mask register, 0 elsewhere. mode 0 to 64: so many of each repeat;
// above: so many elements of the whole tile, in counter mode.
template <typename T>
void masked(GM_ADDR x, GM_ADDR y, GM_ADDR, GM_ADDR tiling)
{
    GET_TILING_DATA_WITH_STRUCT(NumbersTilingData, t, tiling);
    map<T, T>(x, y, t.n, [&](LocalTensor<T>& b, LocalTensor<T>& a) {
        constexpr uint8_t repeats = kTile * sizeof(T) / 256;
        Duplicate(b, T(0.0f), kTile);
        PipeBarrier<PIPE_V>();
        if (t.mode <= 64) {
            SetMaskNorm();
            SetVectorMask<T, MaskMode::NORMAL>(t.mode);
        } else {
            SetMaskCount();
            SetVectorMask<T, MaskMode::COUNTER>(t.mode);
        }
        Adds<T, false>(b, a, T(1.0f), MASK_PLACEHOLDER, t.mode <= 64 ? repeats : 1, {1, 1, 8, 8});
        SetMaskNorm();
        ResetMask();
    });
}

// b = a where a < limit, else -1; then rows of eight reversed by a gather.
void choose(GM_ADDR x, GM_ADDR y, GM_ADDR, GM_ADDR tiling)
{
    GET_TILING_DATA_WITH_STRUCT(NumbersTilingData, t, tiling);
    TPipe* pipe = nullptr;
    map<float, float>(x, y, t.n, [&](LocalTensor<float>& b, LocalTensor<float>& a) {
        TBuf<TPosition::VECCALC> bits_buffer, index_buffer, chosen_buffer;
        pipe = GetTPipePtr();
        pipe->InitBuffer(bits_buffer, kTile / 8);
        pipe->InitBuffer(index_buffer, kTile * sizeof(int32_t));
        pipe->InitBuffer(chosen_buffer, kTile * sizeof(float));
        LocalTensor<uint8_t> bits = bits_buffer.Get<uint8_t>();
        LocalTensor<int32_t> index = index_buffer.Get<int32_t>();
        LocalTensor<float> chosen = chosen_buffer.Get<float>();
        if (t.mode == 0) {
            CompareScalar(bits, a, 0.5f, CMPMODE::LT, kTile);
        } else {
            CompareScalar(bits, a, 0.5f, CMPMODE::LT, 64ull, kTile / 64, {1, 1, 8, 8});
        }
        CreateVecIndex(index, 0, kTile);
        PipeBarrier<PIPE_V>();
        if (t.mode == 0) {
            Select(chosen, bits, a, -1.0f, SELMODE::VSEL_TENSOR_SCALAR_MODE, kTile);
        } else {
            Select(chosen, bits, a, -1.0f, SELMODE::VSEL_TENSOR_SCALAR_MODE, 64ull, kTile / 64,
                   {1, 1, 1, 8, 8, 8});
        }
        Muls(index, index, -4, kTile);
        PipeBarrier<PIPE_V>();
        Adds(index, index, static_cast<int32_t>(4 * (kTile - 1)), kTile);
        PipeBarrier<PIPE_V>();
        Gather(b, chosen, index.ReinterpretCast<uint32_t>(), 0, kTile);
    });
}

}  // namespace

#define NUMBERS_KERNEL(label, entry) \
    static const twin::RegisterKernel register_##label(#label, &entry, sizeof(NumbersTilingData));
#define CAST_KERNEL(label, to, from) \
    static const twin::RegisterKernel register_##label(#label, &cast<to, from>, \
                                                       sizeof(NumbersTilingData));

CAST_KERNEL(float_to_half, half, float)
CAST_KERNEL(float_to_bf16, bfloat16_t, float)
CAST_KERNEL(half_to_float, float, half)
CAST_KERNEL(bf16_to_float, float, bfloat16_t)
CAST_KERNEL(float_to_int, int32_t, float)
CAST_KERNEL(float_to_float, float, float)
CAST_KERNEL(int_to_float, float, int32_t)
NUMBERS_KERNEL(half_arithmetic, arithmetic<half>)
NUMBERS_KERNEL(float_arithmetic, arithmetic<float>)
NUMBERS_KERNEL(sums, sums)
NUMBERS_KERNEL(choose, choose)
NUMBERS_KERNEL(masked_float, masked<float>)
NUMBERS_KERNEL(masked_half, masked<half>)
