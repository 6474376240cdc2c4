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

// Adds elements to what global memory holds, as a store does while SetAtomicAdd is on.
using AddInto = void (*)(void* destination, const void* source, size_t count);

template <typename T>
void add_into(void* destination, const void* source, size_t count)
{
    T* to = static_cast<T*>(destination);
    const T* from = static_cast<const T*>(source);
    for (size_t i = 0; i < count; ++i) {
        to[i] = static_cast<T>(to[i] + from[i]);
    }
}

// Null where Atlas A2 cannot add.
template <typename T>
constexpr AddInto adder()
{
    if constexpr (std::is_same_v<T, float> || std::is_same_v<T, half> ||
                  std::is_same_v<T, int32_t> || std::is_same_v<T, int16_t>) {
        return &add_into<T>;
    } else {
        return nullptr;
    }
}

using AscendC::DataCopyExtParams;
using AscendC::DataCopyParams;

// The copies, whatever the type of the elements.
void load(const LocalView& destination, const GlobalView& source, size_t bytes);
void load(const LocalView& destination, const GlobalView& source, const DataCopyParams& p);
void load(const LocalView& destination, const GlobalView& source, const DataCopyExtParams& p,
          size_t left, size_t right, const void* padding);
void store(const GlobalView& destination, const LocalView& source, size_t bytes, AddInto add);
void store(const GlobalView& destination, const LocalView& source, const DataCopyParams& p,
           AddInto add);
void store(const GlobalView& destination, const LocalView& source, const DataCopyExtParams& p,
           AddInto add);
void copy_inside(const LocalView& destination, const LocalView& source, size_t count);

}  // namespace twin

namespace AscendC {

template <typename T>
void DataCopy(const LocalTensor<T>& destination, const GlobalTensor<T>& source, const uint32_t count)
{
    twin::load(destination, source, count * sizeof(T));
}

template <typename T>
void DataCopy(const GlobalTensor<T>& destination, const LocalTensor<T>& source, const uint32_t count)
{
    twin::store(destination, source, count * sizeof(T), twin::adder<T>());
}

template <typename T>
void DataCopy(const LocalTensor<T>& destination, const GlobalTensor<T>& source,
              const DataCopyParams& p)
{
    twin::load(destination, source, p);
}

template <typename T>
void DataCopy(const GlobalTensor<T>& destination, const LocalTensor<T>& source,
              const DataCopyParams& p)
{
    twin::store(destination, source, p, twin::adder<T>());
}

// UB to UB, done by the vector unit, which does not ask its mask.
template <typename T>
void DataCopy(const LocalTensor<T>& destination, const LocalTensor<T>& source, const uint32_t count)
{
    twin::copy_inside(destination, source, count);
}

// Bursts of any number of bytes, each at the start of a block of UB. Behind a burst the rest of its
// block is garbage, unless isPad asks for a value there (at most 32 bytes of padding on each side).
template <typename T>
void DataCopyPad(const LocalTensor<T>& destination, const GlobalTensor<T>& source,
                 const DataCopyExtParams& p, const DataCopyPadExtParams<T>& pad)
{
    twin::load(destination, source, p, pad.isPad ? pad.leftPadding : 0,
               pad.isPad ? pad.rightPadding : 0, &pad.paddingValue);
}

template <typename T>
void DataCopyPad(const GlobalTensor<T>& destination, const LocalTensor<T>& source,
                 const DataCopyExtParams& p)
{
    twin::store(destination, source, p, twin::adder<T>());
}

}  // namespace AscendC
