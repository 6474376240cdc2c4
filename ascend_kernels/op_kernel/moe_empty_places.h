// Zeroes the rows of the places that no choice fills.
#ifndef MOE_EMPTY_PLACES_H
#define MOE_EMPTY_PLACES_H

#include "moe_table_part.h"
#include "moe_zero_rows.h"

namespace moe {
template <typename T>
class EmptyPlaces {
public:
    // `tableSize`: entries of slot_src that are read at a time; `zeroBytes`: of the zero buffer;
    // `choices`: T * K, a source from there on fills nothing.
    __aicore__ inline void Init(TPipe& pipe, GM_ADDR slotSrc, uint32_t slots, uint32_t choices,
        uint32_t tableSize, uint32_t zeroBytes)
    {
        const uint32_t share = CeilDiv(slots, static_cast<uint32_t>(GetBlockNum()));
        slots_ = slots;
        choices_ = choices;
        part_ = Smaller(Smaller(AlignUp(share, BLOCK_FLOATS), MOST_PART), tableSize);
        table_.Init(pipe, slotSrc, slots, tableSize);
        zeros_.Init(pipe, zeroBytes);
    }

    // Zeroes this block's share of the empty places of `rows`, each `size` elements long. Blocks take
    // turns at short parts: the empty places of an expert lie together, behind its last choice.
    __aicore__ inline void Zero(GlobalTensor<T>& rows, uint32_t size)
    {
        const uint32_t step = static_cast<uint32_t>(GetBlockNum()) * part_;
        for (uint64_t at = static_cast<uint64_t>(GetBlockIdx()) * part_; at < slots_; at += step) {
            const uint32_t first = static_cast<uint32_t>(at);
            const uint32_t count = Smaller(part_, slots_ - first);
            table_.Read(first, count);
            uint32_t i = 0;
            while (i < count) {
                const uint32_t start = i;
                while (i < count && IsEmpty(i)) {
                    ++i;
                }
                zeros_.Fill(rows, static_cast<uint64_t>(first + start) * size,
                    static_cast<uint64_t>(i - start) * size);
                while (i < count && !IsEmpty(i)) {
                    ++i;
                }
            }
        }
    }

private:
    __aicore__ inline bool IsEmpty(uint32_t i) const
    {
        return static_cast<uint32_t>(table_.Get(i)) >= choices_;  // -1 is the largest number
    }

    static constexpr uint32_t MOST_PART = 64;

    TablePart table_;
    ZeroRows zeros_;
    uint32_t slots_ = 0;
    uint32_t choices_ = 0;
    uint32_t part_ = 0;
};
}  // namespace moe

#endif  // MOE_EMPTY_PLACES_H
