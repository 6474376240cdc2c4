// GlobalTensor and LocalTensor: typed views that check every scalar access.
#pragma once

#include "twin/core.h"
#include "twin/number.h"

#define __aicore__
#define __global__
#define __gm__
#define __ubuf__
#define GM_ADDR uint8_t*

namespace AscendC {

enum class TPosition : uint8_t { GM, VECIN, VECOUT, VECCALC };
using QuePosition = TPosition;

template <typename T>
class GlobalTensor {
public:
    using PrimType = T;

    void SetGlobalBuffer(T* buffer, uint64_t size)
    {
        data_ = buffer;
        size_ = size;
    }
    void SetGlobalBuffer(T* buffer) { SetGlobalBuffer(buffer, ~0ull); }

    GlobalTensor operator[](uint64_t offset) const
    {
        if (offset > size_) {
            twin::fail("GlobalTensor: offset ", offset, " is past its ", size_, " elements");
        }
        GlobalTensor part;
        part.SetGlobalBuffer(data_ + offset, size_ == ~0ull ? size_ : size_ - offset);
        return part;
    }

    T GetValue(uint64_t offset) const
    {
        touch(PIPE_S, offset, 1, false, "GlobalTensor::GetValue");
        return data_[offset];
    }
    void SetValue(uint64_t offset, T value)
    {
        touch(PIPE_S, offset, 1, true, "GlobalTensor::SetValue");
        data_[offset] = value;
    }
    T operator()(uint64_t offset) const { return GetValue(offset); }

    uint64_t GetSize() const { return size_; }
    const T* GetPhyAddr() const { return data_; }
    T* GetPhyAddr(uint64_t offset) const { return data_ + offset; }

    // Declares `count` elements from `offset` as read or written by a new instruction of `pipe`.
    T* touch(pipe_t pipe, uint64_t offset, uint64_t count, bool write, const char* what) const
    {
        twin::Core& core = twin::core();
        core.counters.scalar_gm_accesses += pipe == PIPE_S;
        return touch_at(pipe, core.clocks.issue(pipe), offset, count * sizeof(T), write, what);
    }

    T* touch_at(pipe_t pipe, uint32_t time, uint64_t offset, uint64_t bytes, bool write,
                const char* what) const
    {
        if (size_ != ~0ull && offset * sizeof(T) + bytes > size_ * sizeof(T)) {
            twin::fail(what, ": ", bytes, " bytes at element ", offset,
                       " leave the GlobalTensor of ", size_, " elements");
        }
        T* address = data_ + offset;
        twin::core().touch_global(pipe, time, address, bytes, sizeof(T), write, what);
        return address;
    }

private:
    T* data_ = nullptr;
    uint64_t size_ = 0;
};

template <typename T>
class LocalTensor {
public:
    using PrimType = T;

    LocalTensor() = default;
    LocalTensor(int buffer, size_t begin, size_t end) : buffer_(buffer), begin_(begin), end_(end)
    {
        generation_ = twin::core().buffers[buffer].generation;
    }

    LocalTensor operator[](uint32_t offset) const
    {
        LocalTensor part = *this;
        part.begin_ += offset * sizeof(T);
        if (part.begin_ > end_) {
            twin::fail("LocalTensor: offset ", offset, " is past its ", GetSize(), " elements");
        }
        return part;
    }

    template <typename U>
    LocalTensor<U> ReinterpretCast() const
    {
        LocalTensor<U> view;
        view.adopt(buffer_, begin_, end_, generation_);
        return view;
    }

    T GetValue(uint32_t index) const { return *scalar(index, false, "LocalTensor::GetValue"); }
    void SetValue(uint32_t index, T value) const
    {
        *scalar(index, true, "LocalTensor::SetValue") = value;
    }
    T operator()(uint32_t index) const { return GetValue(index); }

    uint32_t GetSize() const { return static_cast<uint32_t>((end_ - begin_) / sizeof(T)); }

    // The twin's own view, for instructions.
    int buffer() const { return buffer_; }
    size_t begin() const { return begin_; }
    size_t end() const { return end_; }

    // Elements as bytes in UB, after the checks that every access has in common.
    T* raw(size_t element, size_t count, const char* what) const
    {
        twin::Core& core = twin::core();
        if (buffer_ < 0) {
            twin::fail(what, ": the LocalTensor was never given a buffer");
        }
        const twin::Buffer& owner = core.buffers[buffer_];
        if (owner.of_queue && (owner.generation != generation_ ||
                               owner.state == twin::BufferState::free)) {
            twin::fail(what, ": the tensor is used after FreeTensor");
        }
        const size_t first = begin_ + element * sizeof(T);
        if (first + count * sizeof(T) > end_) {
            twin::fail(what, ": elements ", element, " to ", element + count,
                       " leave the buffer of ", GetSize(), " elements");
        }
        return reinterpret_cast<T*>(core.ub.at(first));
    }

    void adopt(int buffer, size_t begin, size_t end, uint32_t generation)
    {
        buffer_ = buffer;
        begin_ = begin;
        end_ = end;
        generation_ = generation;
    }
    uint32_t generation() const { return generation_; }

private:
    T* scalar(uint32_t index, bool write, const char* what) const
    {
        T* address = raw(index, 1, what);
        twin::Core& core = twin::core();
        const size_t offset = begin_ + index * sizeof(T);
        ++core.counters.scalar_ub_accesses;
        core.ub.touch(core.clocks, PIPE_S, core.clocks.issue(PIPE_S), offset, sizeof(T), write, what);
        if (write) {
            core.ub.mark_initialised(offset, sizeof(T));
        } else {
            core.ub.check_initialised(offset, sizeof(T), what);
        }
        return address;
    }

    int buffer_ = -1;
    size_t begin_ = 0, end_ = 0;
    uint32_t generation_ = 0;
};

}  // namespace AscendC
