// TPipe, TQue, TQueBind, TBuf: buffers of UB and the hand-over between pipes.
#pragma once

#include "twin/sync.h"

namespace AscendC {

class TPipe;

}  // namespace AscendC

namespace twin {

// A queue of buffers, whatever their elements.
class Queue {
public:
    Queue(HardEvent filled, HardEvent emptied, int32_t depth)
        : filled_(filled), emptied_(emptied), depth_(depth)
    {
    }

protected:
    friend class AscendC::TPipe;

    LocalView allocate();
    void enqueue(const LocalView& tensor);
    LocalView dequeue();
    void free(const LocalView& tensor);

    std::vector<int> waiting_;  // buffers, the first one in front

private:
    Buffer& own(const LocalView& tensor, const char* what);

    const HardEvent filled_, emptied_;
    const int32_t depth_;
    std::vector<int> own_;
    size_t cursor_ = 0;
};

// A buffer that belongs to no queue.
class Scratch {
protected:
    friend class AscendC::TPipe;

    LocalView whole() const;
    LocalView part(size_t bytes, size_t offset) const;

private:
    int index_ = -1;
};

}  // namespace twin

namespace AscendC {

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
class TQueBind : public twin::Queue {
    static_assert(source == TPosition::VECIN || source == TPosition::VECOUT);
    static_assert(destination == TPosition::VECIN || destination == TPosition::VECOUT);

public:
    TQueBind()
        : Queue(event_between(producer(source), consumer(destination)),
                event_between(consumer(destination), producer(source)), depth)
    {
    }

    template <typename T>
    LocalTensor<T> AllocTensor()
    {
        return LocalTensor<T>(allocate());
    }

    template <typename T>
    bool EnQue(const LocalTensor<T>& tensor)
    {
        enqueue(tensor);
        return true;
    }

    template <typename T>
    LocalTensor<T> DeQue()
    {
        return LocalTensor<T>(dequeue());
    }

    template <typename T>
    void FreeTensor(LocalTensor<T>& tensor)
    {
        free(tensor);
    }

    bool VacantInQue() const { return GetTensorCountInQue() < depth; }
    bool HasTensorInQue() const { return GetTensorCountInQue() != 0; }
    int32_t GetTensorCountInQue() const { return static_cast<int32_t>(waiting_.size()); }
};

template <TPosition position, int32_t depth, auto mask = 0>
class TQue : public TQueBind<position, position, depth, mask> {};

// A buffer without hand-over: its user orders accesses by barriers and flags.
template <TPosition position = TPosition::VECCALC>
class TBuf : public twin::Scratch {
public:
    template <typename T>
    LocalTensor<T> Get()
    {
        return LocalTensor<T>(whole());
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
        return LocalTensor<T>(part(count * sizeof(T), offset));
    }
};

class TPipe {
public:
    TPipe() { twin::core().pipe = this; }

    bool InitBuffer(twin::Queue& queue, uint8_t buffers, uint32_t bytes)
    {
        for (int i = 0; i < buffers; ++i) {
            queue.own_.push_back(twin::core().take(bytes, true));
        }
        return true;
    }

    bool InitBuffer(twin::Scratch& buffer, uint32_t bytes)
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
