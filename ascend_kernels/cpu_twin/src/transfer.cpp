// Copies between global memory and UB, and the queues that hand buffers over.
#include <algorithm>
#include <cstring>

#include "twin/copy.h"
#include "twin/queue.h"

namespace twin {
namespace {

const char* const kLoad = "DataCopy GM->UB";
const char* const kStore = "DataCopy UB->GM";
const char* const kLoadPad = "DataCopyPad GM->UB";
const char* const kStorePad = "DataCopyPad UB->GM";

void count_read(size_t bytes)
{
    core().counters.read_bytes += bytes;
    core().counters.read_block_bytes += round_up(bytes);
}

void count_write(size_t bytes)
{
    core().counters.write_bytes += bytes;
    core().counters.write_block_bytes += round_up(bytes);
}

void check_whole_blocks(size_t bytes, const char* what)
{
    if (bytes == 0 || bytes % kBlock) {
        fail(what, ": a length of ", bytes, " bytes is not a multiple of 32");
    }
}

void check_bursts(size_t bursts, size_t length, const char* what)
{
    if (bursts < 1 || bursts > 4095) {
        fail(what, ": blockCount ", bursts, " is not in 1 to 4095");
    }
    if (length < 1 || length >= (1u << 21)) {
        fail(what, ": blockLen ", length, " is not in 1 to 2097151 bytes");
    }
}

// Where a burst starts in global memory, in elements.
size_t whole_elements(size_t bytes, size_t element, const char* what)
{
    if (bytes % element) {
        fail(what, ": a burst starts inside an element of global memory");
    }
    return bytes / element;
}

// `bursts` bursts of `length` bytes; the gaps are in bytes on both sides.
void load_bursts(const char* what, const LocalView& destination, const GlobalView& source,
                 size_t bursts, size_t length, size_t source_gap, size_t destination_gap)
{
    Instruction instruction(PIPE_MTE2, what);
    const size_t element = source.element();
    for (size_t b = 0; b < bursts; ++b) {
        const size_t from = whole_elements(b * (length + source_gap), element, what);
        const size_t to = b * (length + destination_gap) / element;
        const void* address =
            source.touch_at(PIPE_MTE2, instruction.time(), from, length, false, what);
        std::memcpy(instruction.operand(destination, to, length / element, kBlock, true), address,
                    length);
        count_read(length);
    }
    core().clocks.spend_on_dma(PIPE_MTE2, bursts * round_up(length));
    ++core().counters.read_instructions;
}

void store_bursts(const char* what, const GlobalView& destination, const LocalView& source,
                  size_t bursts, size_t length, size_t source_gap, size_t destination_gap,
                  AddInto add)
{
    Instruction instruction(PIPE_MTE3, what);
    const size_t element = source.element(), count = length / element;
    for (size_t b = 0; b < bursts; ++b) {
        const size_t to = whole_elements(b * (length + destination_gap), element, what);
        const size_t from = b * (length + source_gap) / element;
        const void* row = instruction.operand(source, from, count, kBlock, false);
        void* address =
            destination.touch_at(PIPE_MTE3, instruction.time(), to, length, true, what);
        if (!core().atomic) {
            std::memcpy(address, row, length);
        } else if (add) {
            add(address, row, count);
        } else {
            fail("SetAtomicAdd: this type cannot be added in global memory");
        }
        count_write(length);
    }
    core().clocks.spend_on_dma(PIPE_MTE3, bursts * round_up(length));
    ++core().counters.write_instructions;
}

void fill(uint8_t* to, size_t count, const void* value, size_t element)
{
    for (size_t i = 0; i < count; ++i) {
        std::memcpy(to + i * element, value, element);
    }
}

}  // namespace

void load(const LocalView& destination, const GlobalView& source, size_t bytes)
{
    check_whole_blocks(bytes, kLoad);
    load_bursts(kLoad, destination, source, 1, bytes, 0, 0);
}

void load(const LocalView& destination, const GlobalView& source, const DataCopyParams& p)
{
    check_bursts(p.blockCount, p.blockLen * kBlock, kLoad);
    load_bursts(kLoad, destination, source, p.blockCount, p.blockLen * kBlock, p.srcStride * kBlock,
                p.dstStride * kBlock);
}

void load(const LocalView& destination, const GlobalView& source, const DataCopyExtParams& p,
          size_t left, size_t right, const void* padding)
{
    Instruction instruction(PIPE_MTE2, kLoadPad);
    const size_t element = source.element();
    check_bursts(p.blockCount, p.blockLen, kLoadPad);
    if (p.blockLen % element) {
        fail(kLoadPad, ": blockLen ", p.blockLen, " cuts an element");
    }
    if (left * element > kBlock || right * element > kBlock) {
        fail(kLoadPad, ": more than 32 bytes of padding on one side");
    }
    const size_t row = (left + right) * element + p.blockLen, whole = round_up(row);
    const size_t pitch = whole + p.dstStride * kBlock;
    for (size_t b = 0; b < p.blockCount; ++b) {
        const size_t from =
            whole_elements(b * (p.blockLen + size_t(p.srcStride)), element, kLoadPad);
        const void* address =
            source.touch_at(PIPE_MTE2, instruction.time(), from, p.blockLen, false, kLoadPad);
        auto* line = static_cast<uint8_t*>(
            instruction.operand(destination, b * pitch / element, whole / element, kBlock, true));
        core().ub.forget(destination.begin() + b * pitch + row, whole - row);
        fill(line, left, padding, element);
        std::memcpy(line + left * element, address, p.blockLen);
        fill(line + left * element + p.blockLen, right, padding, element);
        count_read(p.blockLen);
    }
    core().clocks.spend_on_dma(PIPE_MTE2, p.blockCount * round_up(p.blockLen));
    ++core().counters.read_instructions;
}

void store(const GlobalView& destination, const LocalView& source, size_t bytes, AddInto add)
{
    check_whole_blocks(bytes, kStore);
    store_bursts(kStore, destination, source, 1, bytes, 0, 0, add);
}

void store(const GlobalView& destination, const LocalView& source, const DataCopyParams& p,
           AddInto add)
{
    check_bursts(p.blockCount, p.blockLen * kBlock, kStore);
    store_bursts(kStore, destination, source, p.blockCount, p.blockLen * kBlock,
                 p.srcStride * kBlock, p.dstStride * kBlock, add);
}

void store(const GlobalView& destination, const LocalView& source, const DataCopyExtParams& p,
           AddInto add)
{
    check_bursts(p.blockCount, p.blockLen, kStorePad);
    if (p.blockLen % source.element()) {
        fail(kStorePad, ": blockLen ", p.blockLen, " cuts an element");
    }
    const size_t gap = round_up(p.blockLen) - p.blockLen + p.srcStride * kBlock;
    store_bursts(kStorePad, destination, source, p.blockCount, p.blockLen, gap, p.dstStride, add);
}

void copy_inside(const LocalView& destination, const LocalView& source, size_t count)
{
    Instruction copy(PIPE_V, "DataCopy UB->UB", Mask::none);
    const size_t bytes = count * source.element();
    check_whole_blocks(bytes, copy.what());
    const void* from = copy.operand(source, 0, count, kBlock, false);
    void* to = copy.operand(destination, 0, count, kBlock, true);
    copy.check_overlap();
    copy.count_repeats(bytes);
    std::memmove(to, from, bytes);
}

// ---- Queues.

static LocalView handle(int index)
{
    const Buffer& buffer = core().buffers[index];
    return LocalView(1, index, buffer.offset, buffer.offset + buffer.bytes);
}

static TEventID put_flag(HardEvent event)
{
    const TEventID id = core().clocks.allocate(event);
    core().clocks.mark_as_queue(event, id, true);
    ++core().counters.flags;
    core().clocks.set(event, id);
    return id;
}

static void take_flag(HardEvent event, TEventID& id)
{
    if (id < 0) {
        return;
    }
    Clocks& clocks = core().clocks;
    clocks.wait(event, id);
    clocks.mark_as_queue(event, id, false);
    clocks.release(event, id);
    id = -1;
}

static const char* describe(BufferState state)
{
    static const char* const names[] = {"free already", "allocated", "still in the queue",
                                        "taken from the queue"};
    return names[static_cast<int>(state)];
}

LocalView Queue::allocate()
{
    for (size_t i = 0; i < own_.size(); ++i) {
        const int index = own_[(cursor_ + i) % own_.size()];
        Buffer& buffer = core().buffers[index];
        if (buffer.state != BufferState::free) {
            continue;
        }
        cursor_ = (cursor_ + i + 1) % own_.size();
        take_flag(emptied_, buffer.freed);
        buffer.state = BufferState::allocated;
        ++buffer.generation;
        core().ub.forget(buffer.offset, buffer.bytes);
        return handle(index);
    }
    if (own_.empty()) {
        fail("AllocTensor: the queue was never given buffers by TPipe::InitBuffer");
    }
    fail("AllocTensor: all ", own_.size(), " buffers of the queue are in use (missing FreeTensor)");
}

void Queue::enqueue(const LocalView& tensor)
{
    Buffer& buffer = own(tensor, "EnQue");
    if (buffer.state != BufferState::allocated && buffer.state != BufferState::dequeued) {
        fail("EnQue: the tensor is not allocated (", describe(buffer.state), ")");
    }
    if (static_cast<int32_t>(waiting_.size()) >= depth_) {
        fail("EnQue: more than ", depth_, " tensors in a queue of depth ", depth_);
    }
    buffer.state = BufferState::queued;
    waiting_.push_back(tensor.buffer());
    buffer.enqueued = put_flag(filled_);
}

LocalView Queue::dequeue()
{
    if (waiting_.empty()) {
        fail("DeQue: the queue is empty (missing EnQue; the core would hang)");
    }
    const int index = waiting_.front();
    waiting_.erase(waiting_.begin());
    Buffer& buffer = core().buffers[index];
    take_flag(filled_, buffer.enqueued);
    buffer.state = BufferState::dequeued;
    return handle(index);
}

void Queue::free(const LocalView& tensor)
{
    Buffer& buffer = own(tensor, "FreeTensor");
    if (buffer.state != BufferState::dequeued && buffer.state != BufferState::allocated) {
        fail("FreeTensor: the tensor is ", describe(buffer.state));
    }
    buffer.state = BufferState::free;
    buffer.freed = put_flag(emptied_);
}

Buffer& Queue::own(const LocalView& tensor, const char* what)
{
    if (std::find(own_.begin(), own_.end(), tensor.buffer()) == own_.end()) {
        fail(what, ": the tensor belongs to another queue or buffer");
    }
    Buffer& buffer = core().buffers[tensor.buffer()];
    if (buffer.generation != tensor.generation()) {
        fail(what, ": the tensor was freed and its buffer allocated anew");
    }
    return buffer;
}

LocalView Scratch::whole() const
{
    if (index_ < 0) {
        fail("TBuf::Get: the buffer was never initialised by TPipe::InitBuffer");
    }
    return handle(index_);
}

LocalView Scratch::part(size_t bytes, size_t offset) const
{
    whole();
    const Buffer& buffer = core().buffers[index_];
    if (offset + bytes > buffer.bytes) {
        fail("TBuf::Get: ", bytes, " bytes at ", offset, " leave its buffer of ", buffer.bytes);
    }
    return LocalView(1, index_, buffer.offset + offset, buffer.offset + offset + bytes);
}

}  // namespace twin
