// TPipe, TQue, TQueBind, TBuf: buffers of UB and the hand-over between pipes.
#pragma once

#include <deque>

#include "twin/sync.h"

namespace AscendC {

class TPipe;

// The pipe that fills a buffer of this position, and the one that empties it.
constexpr pipe_t producer(TPosition position)
{
    return position == TPosition::VECIN ? PIPE_MTE2 : PIPE_V;
}
constexpr pipe_t consumer(TPosition position)
{
    return position == TPosition::VECOUT ? PIPE_MTE3 : PIPE_V;
}

constexpr HardEvent event_between(pipe_t from, pipe_t to)
{
    for (int e = 0; e < twin::kEvents; ++e) {
        if (twin::ends(HardEvent(e)).from == from && twin::ends(HardEvent(e)).to == to) {
            return HardEvent(e);
        }
    }
    return HardEvent::MAX;
}

// Hands buffers from the pipe that fills `source` to the pipe that empties `destination`.
template <TPosition source, TPosition destination, int32_t depth, auto mask = 0>
class TQueBind {
    static_assert(source == TPosition::VECIN || source == TPosition::VECOUT);
    static_assert(destination == TPosition::VECIN || destination == TPosition::VECOUT);
    static constexpr HardEvent kFilled = event_between(producer(source), consumer(destination));
    static constexpr HardEvent kEmptied = event_between(consumer(destination), producer(source));

public:
    template <typename T>
    LocalTensor<T> AllocTensor()
    {
        for (size_t i = 0; i < own_.size(); ++i) {
            const int index = own_[(cursor_ + i) % own_.size()];
            twin::Buffer& buffer = twin::core().buffers[index];
            if (buffer.state != twin::BufferState::free) {
                continue;
            }
            cursor_ = (cursor_ + i + 1) % own_.size();
            take_flag(kEmptied, buffer.freed);
            buffer.state = twin::BufferState::allocated;
            ++buffer.generation;
            twin::core().ub.forget(buffer.offset, buffer.bytes);
            return handle<T>(index);
        }
        if (own_.empty()) {
            twin::fail("AllocTensor: the queue was never given buffers by TPipe::InitBuffer");
        }
        twin::fail("AllocTensor: all ", own_.size(),
                   " buffers of the queue are in use (missing FreeTensor)");
    }

    template <typename T>
    bool EnQue(const LocalTensor<T>& tensor)
    {
        twin::Buffer& buffer = own(tensor, "EnQue");
        if (buffer.state != twin::BufferState::allocated &&
            buffer.state != twin::BufferState::dequeued) {
            twin::fail("EnQue: the tensor is not allocated (", describe(buffer.state), ")");
        }
        if (static_cast<int32_t>(waiting_.size()) >= depth) {
            twin::fail("EnQue: more than ", depth, " tensors in a queue of depth ", depth);
        }
        buffer.state = twin::BufferState::queued;
        waiting_.push_back(tensor.buffer());
        buffer.enqueued = put_flag(kFilled);
        return true;
    }

    template <typename T>
    LocalTensor<T> DeQue()
    {
        if (waiting_.empty()) {
            twin::fail("DeQue: the queue is empty (missing EnQue; the core would hang)");
        }
        const int index = waiting_.front();
        waiting_.pop_front();
        twin::Buffer& buffer = twin::core().buffers[index];
        take_flag(kFilled, buffer.enqueued);
        buffer.state = twin::BufferState::dequeued;
        return handle<T>(index);
    }

    template <typename T>
    void FreeTensor(LocalTensor<T>& tensor)
    {
        twin::Buffer& buffer = own(tensor, "FreeTensor");
        if (buffer.state != twin::BufferState::dequeued &&
            buffer.state != twin::BufferState::allocated) {
            twin::fail("FreeTensor: the tensor is ", describe(buffer.state));
        }
        buffer.state = twin::BufferState::free;
        buffer.freed = put_flag(kEmptied);
    }

    bool VacantInQue() const { return static_cast<int32_t>(waiting_.size()) < depth; }
    bool HasTensorInQue() const { return !waiting_.empty(); }
    int32_t GetTensorCountInQue() const { return static_cast<int32_t>(waiting_.size()); }

private:
    friend class TPipe;

    static const char* describe(twin::BufferState state)
    {
        static const char* const names[] = {"free already", "allocated", "still in the queue",
                                            "taken from the queue"};
        return names[static_cast<int>(state)];
    }

    template <typename T>
    static LocalTensor<T> handle(int index)
    {
        const twin::Buffer& buffer = twin::core().buffers[index];
        return LocalTensor<T>(index, buffer.offset, buffer.offset + buffer.bytes);
    }

    template <typename T>
    twin::Buffer& own(const LocalTensor<T>& tensor, const char* what)
    {
        if (std::find(own_.begin(), own_.end(), tensor.buffer()) == own_.end()) {
            twin::fail(what, ": the tensor belongs to another queue or buffer");
        }
        twin::Buffer& buffer = twin::core().buffers[tensor.buffer()];
        if (buffer.generation != tensor.generation()) {
            twin::fail(what, ": the tensor was freed and its buffer allocated anew");
        }
        return buffer;
    }

    static TEventID put_flag(HardEvent event)
    {
        twin::Core& core = twin::core();
        const TEventID id = core.clocks.allocate(event);
        core.clocks.mark_as_queue(event, id, true);
        ++core.counters.flags;
        core.clocks.set(event, id);
        return id;
    }

    static void take_flag(HardEvent event, TEventID& id)
    {
        if (id < 0) {
            return;
        }
        twin::Core& core = twin::core();
        core.clocks.wait(event, id);
        core.clocks.mark_as_queue(event, id, false);
        core.clocks.release(event, id);
        id = -1;
    }

    std::vector<int> own_;
    std::deque<int> waiting_;
    size_t cursor_ = 0;
};

template <TPosition position, int32_t depth, auto mask = 0>
class TQue : public TQueBind<position, position, depth, mask> {};

// A buffer without hand-over: its user orders accesses by barriers and flags.
template <TPosition position = TPosition::VECCALC>
class TBuf {
public:
    template <typename T>
    LocalTensor<T> Get()
    {
        const twin::Buffer& buffer = owner();
        return LocalTensor<T>(index_, buffer.offset, buffer.offset + buffer.bytes);
    }

    template <typename T>
    LocalTensor<T> Get(uint32_t count)
    {
        return GetWithOffset<T>(count, 0);
    }

    // `count` elements of T from `offset` bytes.
    template <typename T>
    LocalTensor<T> GetWithOffset(uint32_t count, uint32_t offset)
    {
        const twin::Buffer& buffer = owner();
        if (offset + count * sizeof(T) > buffer.bytes) {
            twin::fail("TBuf::Get: ", count * sizeof(T), " bytes at ", offset,
                       " leave its buffer of ", buffer.bytes);
        }
        const size_t begin = buffer.offset + offset;
        return LocalTensor<T>(index_, begin, begin + count * sizeof(T));
    }

private:
    friend class TPipe;

    const twin::Buffer& owner() const
    {
        if (index_ < 0) {
            twin::fail("TBuf::Get: the buffer was never initialised by TPipe::InitBuffer");
        }
        return twin::core().buffers[index_];
    }

    int index_ = -1;
};

class TPipe {
public:
    TPipe() { twin::core().pipe = this; }

    template <class Queue>
    bool InitBuffer(Queue& queue, uint8_t buffers, uint32_t bytes)
    {
        for (int i = 0; i < buffers; ++i) {
            queue.own_.push_back(twin::core().take(bytes, true));
        }
        return true;
    }

    template <TPosition position>
    bool InitBuffer(TBuf<position>& buffer, uint32_t bytes)
    {
        buffer.index_ = twin::core().take(bytes, false);
        return true;
    }

    template <HardEvent event>
    TEventID AllocEventID()
    {
        return twin::core().clocks.allocate(event);
    }

    template <HardEvent event>
    void ReleaseEventID(TEventID id)
    {
        twin::core().clocks.release(event, id);
    }

    // An id that nobody has reserved; it is not reserved by this call either.
    TEventID FetchEventID(HardEvent event) { return twin::core().clocks.free_id(event); }

    template <HardEvent event>
    TEventID FetchEventID()
    {
        return FetchEventID(event);
    }
};

}  // namespace AscendC

inline AscendC::TPipe* GetTPipePtr() { return twin::core().pipe; }
