// Reductions: of each block, of each repeat, of a whole tensor.
#pragma once

#include "twin/elementwise.h"

namespace AscendC {

enum class ReduceOrder {
    ORDER_VALUE_INDEX = 0,
    ORDER_INDEX_VALUE,
    ORDER_ONLY_VALUE,
    ORDER_ONLY_INDEX,
};

}  // namespace AscendC

namespace twin {

// Sums as the vector unit does: neighbours in pairs, then the pairs, each sum rounded.
template <typename T>
T tree_sum(const T* values, size_t count)
{
    std::vector<T> level(values, values + count);
    while (level.size() > 1) {
        std::vector<T> next;
        for (size_t i = 0; i < level.size(); i += 2) {
            next.push_back(i + 1 < level.size() ? narrow<T>(Wide<T>(level[i]) + Wide<T>(level[i + 1]))
                                                : level[i]);
        }
        level.swap(next);
    }
    return level.empty() ? T(0) : level[0];
}

// The first of the largest (or smallest) elements.
template <typename T, bool largest>
size_t extreme(const T* values, size_t count)
{
    size_t best = 0;
    for (size_t i = 1; i < count; ++i) {
        const float candidate = values[i], current = values[best];
        if (largest ? candidate > current : candidate < current) {
            best = i;
        }
    }
    return best;
}

// The `mask` elements of one repeat, gathered from its blocks.
template <typename T>
std::vector<T> repeat_of(Instruction& vector, const LocalTensor<T>& src, size_t repeat, size_t mask,
                         Stride stride)
{
    const size_t n = block_elements(sizeof(T));
    std::vector<T> lanes;
    for (size_t b = 0; b * n < mask; ++b) {
        const size_t count = std::min(n, mask - b * n);
        const T* block = vector.in(src, (repeat * stride.repeat + b * stride.block) * n, count);
        lanes.insert(lanes.end(), block, block + count);
    }
    return lanes;
}

// One value per block of each repeat; eight values per step of the destination.
template <typename T, typename Reduce>
void block_reduce(const char* what, const LocalTensor<T>& dst, const LocalTensor<T>& src,
                  int32_t repeats, int32_t mask, int32_t dst_repeat, int32_t src_block,
                  int32_t src_repeat, bool own, const Reduce& reduce)
{
    static_assert(one_of<T, TWIN_FLOATS>, "BlockReduce: half and float only");
    Instruction vector(PIPE_V, what, mask_of(own));
    const Lanes lanes_of = vector.lanes(own, mask, sizeof(T), repeats);
    const size_t n = block_elements(sizeof(T));
    for_each_block(lanes_of, n, [&](size_t r, size_t b, size_t lanes) {
        const T* x = vector.in(src, (r * src_repeat + b * src_block) * n, lanes);
        const T result = reduce(x, lanes);
        *vector.out(dst, r * dst_repeat * 8 + b, 1, sizeof(T)) = result;
    });
    vector.count_repeats(lanes_of.repeats * kRepeat);
}

template <typename T, bool largest>
void whole_extreme(const char* what, const LocalTensor<T>& dst, const LocalTensor<T>& src,
                   int32_t mask, int32_t repeats, int32_t dst_repeat, Stride from,
                   AscendC::ReduceOrder order, bool own)
{
    static_assert(one_of<T, TWIN_FLOATS>, "WholeReduce: half and float only");
    using AscendC::ReduceOrder;
    Instruction vector(PIPE_V, what, mask_of(own));
    const Lanes lanes_of = vector.lanes(own, mask, sizeof(T), repeats);
    const bool both = order == ReduceOrder::ORDER_VALUE_INDEX || order == ReduceOrder::ORDER_INDEX_VALUE;
    for (size_t r = 0; r < lanes_of.repeats; ++r) {
        const std::vector<T> lanes = repeat_of(vector, src, r, lanes_of.of(r), from);
        const size_t at = extreme<T, largest>(lanes.data(), lanes.size());
        T index{};  // the bits of an unsigned integer, in the place of a T
        if constexpr (sizeof(T) == 2) {
            const uint16_t bits = static_cast<uint16_t>(at);
            std::memcpy(&index, &bits, sizeof(T));
        } else {
            const uint32_t bits = static_cast<uint32_t>(at);
            std::memcpy(&index, &bits, sizeof(T));
        }
        const size_t width = both ? 2 : 1;  // dst_repeat counts results, not elements
        T* to = vector.out(dst, r * dst_repeat * width, width, sizeof(T));
        const bool index_first =
            order == ReduceOrder::ORDER_INDEX_VALUE || order == ReduceOrder::ORDER_ONLY_INDEX;
        to[0] = index_first ? index : lanes[at];
        if (both) {
            to[1] = index_first ? lanes[at] : index;
        }
    }
    vector.count_repeats(lanes_of.repeats * kRepeat);
}

}  // namespace twin

namespace AscendC {

#define TWIN_BLOCK_REDUCE(NAME, RESULT)                                                           \
    template <typename T, bool isSetMask = true>                                                  \
    void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src, const int32_t repeats,        \
              const int32_t mask, const int32_t dst_repeat, const int32_t src_block,              \
              const int32_t src_repeat)                                                           \
    {                                                                                             \
        twin::block_reduce(#NAME, dst, src, repeats, mask, dst_repeat, src_block, src_repeat,     \
                           isSetMask, [](const T* x, size_t n) -> T { return RESULT; });                     \
    }

TWIN_BLOCK_REDUCE(BlockReduceMax, (x[twin::extreme<T, true>(x, n)]))
TWIN_BLOCK_REDUCE(BlockReduceMin, (x[twin::extreme<T, false>(x, n)]))
TWIN_BLOCK_REDUCE(BlockReduceSum, twin::tree_sum(x, n))

#undef TWIN_BLOCK_REDUCE

template <typename T, bool isSetMask = true>
void WholeReduceSum(const LocalTensor<T>& dst, const LocalTensor<T>& src, const int32_t mask,
                    const int32_t repeats, const int32_t dst_repeat, const int32_t src_block,
                    const int32_t src_repeat)
{
    static_assert(twin::one_of<T, TWIN_FLOATS>, "WholeReduceSum: half and float only");
    twin::Instruction vector(PIPE_V, "WholeReduceSum", twin::mask_of(isSetMask));
    const twin::Lanes lanes_of = vector.lanes(isSetMask, mask, sizeof(T), repeats);
    const twin::Stride from{size_t(src_block), size_t(src_repeat)};
    for (size_t r = 0; r < lanes_of.repeats; ++r) {
        const std::vector<T> lanes = twin::repeat_of(vector, src, r, lanes_of.of(r), from);
        *vector.out(dst, r * dst_repeat, 1, sizeof(T)) = twin::tree_sum(lanes.data(), lanes.size());
    }
    vector.count_repeats(lanes_of.repeats * twin::kRepeat);
}

template <typename T, bool isSetMask = true>
void WholeReduceMax(const LocalTensor<T>& dst, const LocalTensor<T>& src, const int32_t mask,
                    const int32_t repeats, const int32_t dst_repeat, const int32_t src_block,
                    const int32_t src_repeat, ReduceOrder order = ReduceOrder::ORDER_VALUE_INDEX)
{
    twin::whole_extreme<T, true>("WholeReduceMax", dst, src, mask, repeats, dst_repeat,
                                 {size_t(src_block), size_t(src_repeat)}, order, isSetMask);
}

template <typename T, bool isSetMask = true>
void WholeReduceMin(const LocalTensor<T>& dst, const LocalTensor<T>& src, const int32_t mask,
                    const int32_t repeats, const int32_t dst_repeat, const int32_t src_block,
                    const int32_t src_repeat, ReduceOrder order = ReduceOrder::ORDER_VALUE_INDEX)
{
    twin::whole_extreme<T, false>("WholeReduceMin", dst, src, mask, repeats, dst_repeat,
                                  {size_t(src_block), size_t(src_repeat)}, order, isSetMask);
}

// The sum of `count` elements: a tree in each repeat, then a tree over the repeats in `work`.
template <typename T, bool isSetMask = true>
void ReduceSum(const LocalTensor<T>& dst, const LocalTensor<T>& src, const LocalTensor<T>& work,
               const int32_t count)
{
    static_assert(twin::one_of<T, TWIN_FLOATS>, "ReduceSum: half and float only");
    twin::Instruction vector(PIPE_V, "ReduceSum");
    const T* x = vector.in(src, count);
    const size_t lanes = twin::kRepeat / sizeof(T);
    std::vector<T> sums;
    for (size_t i = 0; i < size_t(count); i += lanes) {
        sums.push_back(twin::tree_sum(x + i, std::min(lanes, count - i)));
    }
    vector.out(work, sums.size());
    *vector.out(dst, 0, 1, sizeof(T)) = twin::tree_sum(sums.data(), sums.size());
    vector.count_repeats(count * sizeof(T));
}

}  // namespace AscendC
