// DataCopy and DataCopyPad: the DMA between global memory and UB.
#pragma once

#include "twin/instruction.h"

namespace AscendC {

// Lengths and strides in blocks of 32 bytes; a stride is the gap behind a burst.
struct DataCopyParams {
    DataCopyParams() = default;
    DataCopyParams(uint16_t count, uint16_t length, uint16_t source_gap, uint16_t destination_gap)
        : blockCount(count), blockLen(length), srcStride(source_gap), dstStride(destination_gap)
    {
    }
    uint16_t blockCount = 1, blockLen = 0, srcStride = 0, dstStride = 0;
};

// Lengths in bytes; strides in bytes on the side of global memory, in blocks on the side of UB.
struct DataCopyExtParams {
    DataCopyExtParams() = default;
    DataCopyExtParams(uint16_t count, uint32_t length, uint32_t source_gap,
                      uint32_t destination_gap, uint32_t reserved)
        : blockCount(count),
          blockLen(length),
          srcStride(source_gap),
          dstStride(destination_gap),
          rsv(reserved)
    {
    }
    uint16_t blockCount = 1;
    uint32_t blockLen = 0, srcStride = 0, dstStride = 0, rsv = 0;
};

template <typename T>
struct DataCopyPadExtParams {
    DataCopyPadExtParams() = default;
    DataCopyPadExtParams(bool pad, uint8_t left, uint8_t right, T value)
        : isPad(pad), leftPadding(left), rightPadding(right), paddingValue(value)
    {
    }
    bool isPad = false;
    uint8_t leftPadding = 0, rightPadding = 0;
    T paddingValue{};
};

}  // namespace AscendC

namespace twin {

using AscendC::GlobalTensor;
using AscendC::LocalTensor;

inline void count_read(size_t bytes)
{
    core().counters.read_bytes += bytes;
    core().counters.read_block_bytes += round_up(bytes);
}

inline void count_write(size_t bytes)
{
    core().counters.write_bytes += bytes;
    core().counters.write_block_bytes += round_up(bytes);
}

// Stores a burst; while SetAtomicAdd is on, adds it instead.
template <typename T>
void store(T* destination, const T* source, size_t count)
{
    if (!core().atomic) {
        std::memcpy(destination, source, count * sizeof(T));
        return;
    }
    if constexpr (std::is_same_v<T, float> || std::is_same_v<T, half> ||
                  std::is_same_v<T, int32_t> || std::is_same_v<T, int16_t>) {
        for (size_t i = 0; i < count; ++i) {
            destination[i] = static_cast<T>(destination[i] + source[i]);
        }
    } else {
        fail("SetAtomicAdd: this type cannot be added in global memory");
    }
}

// `bursts` bursts of `length` bytes; the gaps are in bytes on both sides.
template <typename T>
void load_bursts(Instruction& load, const LocalTensor<T>& destination,
                 const GlobalTensor<T>& source, size_t bursts, size_t length, size_t source_gap,
                 size_t destination_gap)
{
    for (size_t b = 0; b < bursts; ++b) {
        const size_t from = b * (length + source_gap), to = b * (length + destination_gap);
        if (from % sizeof(T)) {
            fail(load.what(), ": a burst starts inside an element of global memory");
        }
        const T* address = source.touch_at(PIPE_MTE2, load.time(), from / sizeof(T), length, false,
                                           load.what());
        T* row = load.out(destination, to / sizeof(T), length / sizeof(T));
        std::memcpy(row, address, length);
        count_read(length);
    }
}

template <typename T>
void store_bursts(Instruction& save, const GlobalTensor<T>& destination,
                  const LocalTensor<T>& source, size_t bursts, size_t length, size_t source_gap,
                  size_t destination_gap)
{
    for (size_t b = 0; b < bursts; ++b) {
        const size_t from = b * (length + source_gap), to = b * (length + destination_gap);
        if (to % sizeof(T)) {
            fail(save.what(), ": a burst starts inside an element of global memory");
        }
        const T* row = save.in(source, from / sizeof(T), length / sizeof(T));
        T* address = destination.touch_at(PIPE_MTE3, save.time(), to / sizeof(T), length, true,
                                          save.what());
        store(address, row, length / sizeof(T));
        count_write(length);
    }
}

inline void check_whole_blocks(size_t bytes, const char* what)
{
    if (bytes == 0 || bytes % kBlock) {
        fail(what, ": a length of ", bytes, " bytes is not a multiple of 32");
    }
}

inline void check_bursts(size_t bursts, size_t length, const char* what)
{
    if (bursts < 1 || bursts > 4095) {
        fail(what, ": blockCount ", bursts, " is not in 1 to 4095");
    }
    if (length < 1 || length >= (1u << 21)) {
        fail(what, ": blockLen ", length, " is not in 1 to 2097151 bytes");
    }
}

}  // namespace twin

namespace AscendC {

template <typename T>
void DataCopy(const LocalTensor<T>& destination, const GlobalTensor<T>& source, const uint32_t count)
{
    twin::Instruction load(PIPE_MTE2, "DataCopy GM->UB");
    twin::check_whole_blocks(count * sizeof(T), load.what());
    twin::load_bursts(load, destination, source, 1, count * sizeof(T), 0, 0);
    ++twin::core().counters.read_instructions;
}

template <typename T>
void DataCopy(const GlobalTensor<T>& destination, const LocalTensor<T>& source, const uint32_t count)
{
    twin::Instruction save(PIPE_MTE3, "DataCopy UB->GM");
    twin::check_whole_blocks(count * sizeof(T), save.what());
    twin::store_bursts(save, destination, source, 1, count * sizeof(T), 0, 0);
    ++twin::core().counters.write_instructions;
}

template <typename T>
void DataCopy(const LocalTensor<T>& destination, const GlobalTensor<T>& source,
              const DataCopyParams& p)
{
    twin::Instruction load(PIPE_MTE2, "DataCopy GM->UB");
    twin::check_bursts(p.blockCount, p.blockLen * twin::kBlock, load.what());
    twin::load_bursts(load, destination, source, p.blockCount, p.blockLen * twin::kBlock,
                      p.srcStride * twin::kBlock, p.dstStride * twin::kBlock);
    ++twin::core().counters.read_instructions;
}

template <typename T>
void DataCopy(const GlobalTensor<T>& destination, const LocalTensor<T>& source,
              const DataCopyParams& p)
{
    twin::Instruction save(PIPE_MTE3, "DataCopy UB->GM");
    twin::check_bursts(p.blockCount, p.blockLen * twin::kBlock, save.what());
    twin::store_bursts(save, destination, source, p.blockCount, p.blockLen * twin::kBlock,
                       p.srcStride * twin::kBlock, p.dstStride * twin::kBlock);
    ++twin::core().counters.write_instructions;
}

// UB to UB, done by the vector unit.
template <typename T>
void DataCopy(const LocalTensor<T>& destination, const LocalTensor<T>& source, const uint32_t count)
{
    twin::Instruction copy(PIPE_V, "DataCopy UB->UB");
    twin::check_whole_blocks(count * sizeof(T), copy.what());
    const T* from = copy.in(source, count);
    T* to = copy.out(destination, count);
    copy.check_overlap();
    copy.count_repeats(count * sizeof(T));
    std::memmove(to, from, count * sizeof(T));
}

// Bursts of any number of bytes, each at the start of a block of UB. Behind a burst the rest of its
// block is garbage, unless isPad asks for a value there (at most 32 bytes of padding on each side).
template <typename T>
void DataCopyPad(const LocalTensor<T>& destination, const GlobalTensor<T>& source,
                 const DataCopyExtParams& p, const DataCopyPadExtParams<T>& pad)
{
    twin::Instruction load(PIPE_MTE2, "DataCopyPad GM->UB");
    twin::check_bursts(p.blockCount, p.blockLen, load.what());
    if (p.blockLen % sizeof(T)) {
        twin::fail(load.what(), ": blockLen ", p.blockLen, " cuts an element");
    }
    const size_t left = pad.isPad ? pad.leftPadding : 0;
    const size_t right = pad.isPad ? pad.rightPadding : 0;
    if (left * sizeof(T) > twin::kBlock || right * sizeof(T) > twin::kBlock) {
        twin::fail(load.what(), ": more than 32 bytes of padding on one side");
    }
    const size_t count = p.blockLen / sizeof(T), row = left + count + right;
    const size_t pitch = twin::round_up(row * sizeof(T)) + p.dstStride * twin::kBlock;
    for (size_t b = 0; b < p.blockCount; ++b) {
        const size_t from = b * (p.blockLen + size_t(p.srcStride));
        if (from % sizeof(T)) {
            twin::fail(load.what(), ": a burst starts inside an element of global memory");
        }
        const T* address = source.touch_at(PIPE_MTE2, load.time(), from / sizeof(T), p.blockLen,
                                           false, load.what());
        const size_t whole = twin::round_up(row * sizeof(T)) / sizeof(T);
        T* line = load.out(destination, b * pitch / sizeof(T), whole);
        twin::core().ub.forget(destination.begin() + b * pitch + row * sizeof(T),
                               (whole - row) * sizeof(T));
        std::fill_n(line, left, pad.paddingValue);
        std::memcpy(line + left, address, p.blockLen);
        std::fill_n(line + left + count, right, pad.paddingValue);
        twin::count_read(p.blockLen);
    }
    ++twin::core().counters.read_instructions;
}

template <typename T>
void DataCopyPad(const GlobalTensor<T>& destination, const LocalTensor<T>& source,
                 const DataCopyExtParams& p)
{
    twin::Instruction save(PIPE_MTE3, "DataCopyPad UB->GM");
    twin::check_bursts(p.blockCount, p.blockLen, save.what());
    if (p.blockLen % sizeof(T)) {
        twin::fail(save.what(), ": blockLen ", p.blockLen, " cuts an element");
    }
    const size_t gap = twin::round_up(p.blockLen) - p.blockLen + p.srcStride * twin::kBlock;
    twin::store_bursts(save, destination, source, p.blockCount, p.blockLen, gap, p.dstStride);
    ++twin::core().counters.write_instructions;
}

}  // namespace AscendC
