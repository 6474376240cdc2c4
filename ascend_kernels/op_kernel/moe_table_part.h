// The index tables (slot_src, expanded_row_idx), read entry by entry: each entry starts a DMA.
#ifndef MOE_TABLE_PART_H
#define MOE_TABLE_PART_H

#include "moe_common.h"

namespace moe {
// A stretch of an int32 table in UB, for reading by the scalar unit.
class TablePart {
public:
    __aicore__ inline void Init(TPipe& pipe, GM_ADDR table, uint32_t size, uint32_t partSize)
    {
        table_.SetGlobalBuffer((__gm__ int32_t*)table, size);
        pipe.InitBuffer(buffer_, AlignUp(partSize * sizeof(int32_t), BLOCK_BYTES));
    }

    // Entries [begin, begin + count); after it, `Get(0)` is entry `begin`.
    __aicore__ inline void Read(uint32_t begin, uint32_t count)
    {
        part_ = buffer_.Get<int32_t>();
        Sync<HardEvent::S_MTE2>();
        Load(part_, table_[begin], count);
        Sync<HardEvent::MTE2_S>();
    }

    __aicore__ inline int32_t Get(uint32_t i) const
    {
        return part_.GetValue(i);
    }

private:
    GlobalTensor<int32_t> table_;
    TBuf<TPosition::VECCALC> buffer_;
    LocalTensor<int32_t> part_;
};
}  // namespace moe

#endif  // MOE_TABLE_PART_H
