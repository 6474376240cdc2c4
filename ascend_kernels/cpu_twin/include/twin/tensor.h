// GlobalTensor and LocalTensor: typed views that check every scalar access.
#pragma once

#include "twin/core.h"
#include "twin/number.h"

#define __aicore__
#define __global__
#define __gm__
#define __ubuf__
#define GM_ADDR uint8_t*

namespace twin {

// What a GlobalTensor is whatever its type: an address in global memory and a number of elements.
class GlobalView {
public:
    explicit GlobalView(size_t element) : element_(element) {}

    size_t element() const { return element_; }

    // Declares `bytes` from element `offset` as read or written by instruction `time` of `pipe`.
    void* touch_at(pipe_t pipe, uint32_t time, uint64_t offset, uint64_t bytes, bool write,
                   const char* what) const;

protected:
    void* scalar(uint64_t offset, bool write, const char* what) const;
    void move(uint64_t offset);

    size_t element_;  // bytes
    uint8_t* data_ = nullptr;
    uint64_t size_ = 0;
};

// What a LocalTensor is whatever its type: a part of a buffer in UB, as that buffer was given out.
class LocalView {
public:
    explicit LocalView(size_t element) : element_(element) {}
    LocalView(size_t element, int buffer, size_t begin, size_t end);

    size_t element() const { return element_; }
    int buffer() const { return buffer_; }
    size_t begin() const { return begin_; }
    uint32_t generation() const { return generation_; }

    // Elements as bytes in UB, after the checks that every access has in common.
    void* raw(size_t first, size_t count, const char* what) const;

    // The same part with elements of another size.
    LocalView as(size_t element) const
    {
        LocalView view = *this;
        view.element_ = element;
        return view;
    }

protected:
    void* scalar(uint32_t index, bool write, const char* what) const;
    void move(uint32_t offset);

    size_t element_;  // bytes
    int buffer_ = -1;
    size_t begin_ = 0, end_ = 0;
    uint32_t generation_ = 0;
};

}  // namespace twin

namespace AscendC {

enum class TPosition : uint8_t { GM, VECIN, VECOUT, VECCALC };
using QuePosition = TPosition;

template <typename T>
class GlobalTensor : public twin::GlobalView {
public:
    using PrimType = T;

    GlobalTensor() : GlobalView(sizeof(T)) {}

    void SetGlobalBuffer(T* buffer, uint64_t size)
    {
        data_ = reinterpret_cast<uint8_t*>(buffer);
        size_ = size;
    }
    void SetGlobalBuffer(T* buffer) { SetGlobalBuffer(buffer, ~0ull); }

    GlobalTensor operator[](uint64_t offset) const
    {
        GlobalTensor part = *this;
        part.move(offset);
        return part;
    }

    T GetValue(uint64_t offset) const
    {
        return *static_cast<const T*>(scalar(offset, false, "GlobalTensor::GetValue"));
    }
    void SetValue(uint64_t offset, T value)
    {
        *static_cast<T*>(scalar(offset, true, "GlobalTensor::SetValue")) = value;
    }
    T operator()(uint64_t offset) const { return GetValue(offset); }

    uint64_t GetSize() const { return size_; }
    const T* GetPhyAddr() const { return reinterpret_cast<const T*>(data_); }
    T* GetPhyAddr(uint64_t offset) const { return reinterpret_cast<T*>(data_) + offset; }
};

template <typename T>
class LocalTensor : public twin::LocalView {
public:
    using PrimType = T;

    LocalTensor() : LocalView(sizeof(T)) {}
    LocalTensor(int buffer, size_t begin, size_t end) : LocalView(sizeof(T), buffer, begin, end) {}
    explicit LocalTensor(const LocalView& view) : LocalView(view.as(sizeof(T))) {}

    LocalTensor operator[](uint32_t offset) const
    {
        LocalTensor part = *this;
        part.move(offset);
        return part;
    }

    template <typename U>
    LocalTensor<U> ReinterpretCast() const
    {
        return LocalTensor<U>(static_cast<const LocalView&>(*this));
    }

    T GetValue(uint32_t index) const
    {
        return *static_cast<const T*>(scalar(index, false, "LocalTensor::GetValue"));
    }
    void SetValue(uint32_t index, T value) const
    {
        *static_cast<T*>(scalar(index, true, "LocalTensor::SetValue")) = value;
    }
    T operator()(uint32_t index) const { return GetValue(index); }

    uint32_t GetSize() const { return static_cast<uint32_t>((end_ - begin_) / sizeof(T)); }
};

}  // namespace AscendC
