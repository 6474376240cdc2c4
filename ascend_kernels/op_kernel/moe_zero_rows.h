// Zeros for the places that no choice fills.
#ifndef MOE_ZERO_ROWS_H
#define MOE_ZERO_ROWS_H

#include "moe_common.h"

namespace moe {
// A buffer of zeros that is written wherever zeros are wanted.
class ZeroRows {
public:
    // `bytes`: size of the buffer, a multiple of 32.
    __aicore__ inline void Init(TPipe& pipe, uint32_t bytes)
    {
        bytes_ = bytes;
        pipe.InitBuffer(buffer_, bytes);
        Duplicate(buffer_.Get<int32_t>(), 0, static_cast<int32_t>(bytes / sizeof(int32_t)));
        Sync<HardEvent::V_MTE3>();
    }

    // Zeroes `count` elements from element `begin` on.
    template <typename T>
    __aicore__ inline void Fill(GlobalTensor<T>& dst, uint64_t begin, uint64_t count)
    {
        const uint64_t most = bytes_ / sizeof(T);
        while (count > 0) {
            const uint32_t part = static_cast<uint32_t>(count < most ? count : most);
            Store(dst[begin], buffer_.Get<T>(), part);
            begin += part;
            count -= part;
        }
    }

private:
    TBuf<TPosition::VECCALC> buffer_;
    uint32_t bytes_ = 0;
};
}  // namespace moe

#endif  // MOE_ZERO_ROWS_H
