// What SwiGLU and its gradient share: elements of the rows that are somebody's, in pieces; zeros
// behind them.
#ifndef MOE_SWIGLU_COMMON_H
#define MOE_SWIGLU_COMMON_H

#include "moe_table_part.h"
#include "moe_zero_rows.h"

namespace moe {
// The rows of the groups are consecutive elements, whatever their length: blocks share them by whole
// pieces, and what is behind them likewise.
class PackedElements {
public:
    // `cumsum`: where groups end, the last of which counts; `chunk`: elements of a piece.
    __aicore__ inline void Init(TPipe& pipe, GM_ADDR cumsum, uint32_t groups, uint32_t rows,
        uint32_t width, uint32_t chunk, uint32_t zeroBytes)
    {
        chunk_ = chunk;
        end_.Init(pipe, cumsum, groups, BLOCK_BYTES / sizeof(int32_t));
        zeros_.Init(pipe, zeroBytes);
        end_.Read(groups - 1, 1);
        const int32_t filled = end_.Get(0);
        const uint32_t kept = filled > 0 ? Smaller(static_cast<uint32_t>(filled), rows) : 0;
        filled_ = static_cast<uint64_t>(kept) * width;
        all_ = static_cast<uint64_t>(rows) * width;
        share_ = ShareOfBlock(static_cast<uint32_t>((filled_ + chunk - 1) / chunk));
    }

    // The pieces of this block.
    __aicore__ inline Range Share() const
    {
        return share_;
    }

    __aicore__ inline uint64_t Begin(uint32_t piece) const
    {
        return static_cast<uint64_t>(piece) * chunk_;
    }

    __aicore__ inline uint32_t Count(uint32_t piece) const
    {
        const uint64_t left = filled_ - Begin(piece);
        return left < chunk_ ? static_cast<uint32_t>(left) : chunk_;
    }

    // Zeroes this block's part of the elements behind the groups.
    template <typename T>
    __aicore__ inline void ZeroRest(GlobalTensor<T>& rows)
    {
        const Range rest = ShareOfBlock(static_cast<uint32_t>((all_ - filled_ + chunk_ - 1) / chunk_));
        const uint64_t begin = filled_ + Begin(rest.begin);
        const uint64_t end = filled_ + Begin(rest.end);
        if (begin < all_ && rest.begin < rest.end) {
            zeros_.Fill(rows, begin, (end < all_ ? end : all_) - begin);
        }
    }

private:
    TablePart end_;
    ZeroRows zeros_;
    Range share_{0, 0};
    uint64_t filled_ = 0;
    uint64_t all_ = 0;
    uint32_t chunk_ = 0;
};

// 1 + exp(-x)
__aicore__ inline void OnePlusExp(
    const LocalTensor<float>& dst, const LocalTensor<float>& x, int32_t count)
{
    Muls(dst, x, -1.0f, count);
    VectorBarrier();
    Exp(dst, dst, count);
    VectorBarrier();
    Adds(dst, dst, 1.0f, count);
    VectorBarrier();
}

// Float32 values into a tensor of dtype T; for float32 they are made there.
template <typename T>
__aicore__ inline LocalTensor<float> ResultIn(
    const LocalTensor<T>& out, const LocalTensor<float>& scratch)
{
    if constexpr (std::is_same<T, float>::value) {
        return out;
    } else {
        return scratch;
    }
}

template <typename T>
__aicore__ inline void RoundTo(
    const LocalTensor<T>& out, const LocalTensor<float>& values, uint32_t count)
{
    if constexpr (!std::is_same<T, float>::value) {
        Cast(out, values, RoundMode::CAST_RINT, count);
        VectorBarrier();
    }
}
}  // namespace moe

#endif  // MOE_SWIGLU_COMMON_H
