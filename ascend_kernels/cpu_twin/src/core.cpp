// The parts of a core: clocks and flags, mask, UB, order of its own stores; operands of instructions.
#include "twin/core.h"

#include <algorithm>

#include "twin/grid.h"
#include "twin/instruction.h"

namespace twin {

void fail_with(std::initializer_list<Part> parts)
{
    std::string message;
    for (const Part& part : parts) {
        message += part.text ? std::string(part.text) : std::to_string(part.number);
    }
    throw Violation(message);
}

// ---- Clocks and flags.

std::string name(HardEvent event)
{
    return std::string(name(ends(event).from)) + "_" + name(ends(event).to);
}

TEventID Clocks::allocate(HardEvent event)
{
    const TEventID id = free_id(event);
    Flag& flag = at(event, id);
    if (flag.set) {
        fail("event id ", int(id), " of ", name(event),
             " is in use by SetFlag but not reserved: FetchEventID does not reserve, use "
             "AllocEventID");
    }
    flag.reserved = true;
    return id;
}

TEventID Clocks::free_id(HardEvent event)
{
    for (int id = 0; id < kEventIds; ++id) {
        if (!at(event, id).reserved) {
            return static_cast<TEventID>(id);
        }
    }
    fail("all 8 event ids of ", name(event), " are in use: too many buffers or events at once");
}

void Clocks::release(HardEvent event, int id)
{
    Flag& flag = at(event, id);
    if (!flag.reserved) {
        fail("ReleaseEventID: event id ", id, " of ", name(event), " was not allocated");
    }
    if (flag.set) {
        fail("ReleaseEventID: event id ", id, " of ", name(event), " was set and is not waited for");
    }
    flag.reserved = false;
}

void Clocks::set(HardEvent event, int id)
{
    Flag& flag = at(event, id);
    if (flag.set) {
        fail("SetFlag ", name(event), " id ", id,
             ": set twice without a WaitFlag between (the second is lost)");
    }
    flag.set = true;
    flag.clock = snapshot(ends(event).from);
    flag.time = times_[ends(event).from].end();
}

void Clocks::wait(HardEvent event, int id)
{
    Flag& flag = at(event, id);
    if (!flag.set) {
        fail("WaitFlag ", name(event), " id ", id, ": no SetFlag before it (the core would hang)");
    }
    flag.set = false;
    learn(ends(event).to, flag.clock);
    uint64_t& free = times_[ends(event).to].free;
    free = std::max(free, flag.time);
}

void Clocks::check_all_waited_for(bool reserved_too) const
{
    for (int e = 0; e < kEvents; ++e) {
        for (int id = 0; id < kEventIds; ++id) {
            const Flag& flag = flags_[e][id];
            if (flag.set && !flag.by_queue) {
                fail("SetFlag ", name(HardEvent(e)), " id ", id,
                     ": still set at the end of the kernel (missing WaitFlag)");
            }
            if (reserved_too && flag.reserved && !flag.by_queue) {
                fail("AllocEventID ", name(HardEvent(e)), " id ", id,
                     ": not released at the end of the kernel");
            }
        }
    }
}

Clocks::Flag& Clocks::at(HardEvent event, int id)
{
    if (id < 0 || id >= kEventIds) {
        fail("event id ", id, " of ", name(event), ": must be 0 to 7");
    }
    return flags_[static_cast<int>(event)][id];
}

// ---- The mask register.

void MaskRegister::set(bool counter, uint64_t high, uint64_t low)
{
    if (counter != counter_) {
        fail("SetVectorMask: MaskMode::", counter ? "COUNTER" : "NORMAL", " after ",
             counter_ ? "SetMaskCount" : "SetMaskNorm");
    }
    if (counter ? high != 0 || low == 0 : high == 0 && low == 0) {
        fail("SetVectorMask: ", counter ? "in counter mode maskHigh is 0 and maskLow a number of elements"
                                        : "no lane is set");
    }
    high_ = high;
    low_ = low;
    set_ = true;
    taken_by_ = nullptr;
}

void MaskRegister::set_first(bool counter, int32_t length, size_t element_bytes)
{
    const int64_t most = counter ? INT32_MAX : int64_t(kRepeat / element_bytes);
    if (length < 1 || length > most) {
        fail("SetVectorMask: ", length, " elements is not in 1 to ", most);
    }
    if (counter) {
        set(true, 0, length);
    } else {
        const uint64_t low = length >= 64 ? ~0ull : (1ull << length) - 1;
        const uint64_t high = length <= 64 ? 0 : length == 128 ? ~0ull : (1ull << (length - 64)) - 1;
        set(false, high, low);
    }
}

void MaskRegister::reset()
{
    high_ = low_ = ~0ull;
    set_ = false;
    taken_by_ = nullptr;
}

void MaskRegister::take(const char* what)
{
    if (counter_) {
        fail(what, ": sets its own mask while SetMaskCount is on (missing SetMaskNorm)");
    }
    if (set_) {
        fail(what, ": sets its own mask and loses that of SetVectorMask (missing ResetMask)");
    }
    taken_by_ = what;
}

Lanes MaskRegister::lanes(size_t element_bytes, int repeats, const char* what) const
{
    if (taken_by_) {
        fail(what, ": isSetMask is false, but since SetVectorMask or ResetMask ", taken_by_,
             " has set its own mask");
    }
    const size_t lanes = kRepeat / element_bytes;
    if (counter_) {
        const size_t count = low_, needed = (count + lanes - 1) / lanes;
        return {needed, lanes, count - (needed - 1) * lanes};
    }
    size_t first = 0;
    while (first < lanes && (first < 64 ? low_ >> first : high_ >> (first - 64)) & 1) {
        ++first;
    }
    for (size_t lane = first; lane < lanes; ++lane) {
        if ((lane < 64 ? low_ >> lane : high_ >> (lane - 64)) & 1) {
            fail(what, ": the twin knows masks of the first lanes only");
        }
    }
    check_mask(first, element_bytes, repeats, what);
    return {static_cast<size_t>(repeats), first, first};
}

void MaskRegister::check_default() const
{
    if (counter_) {
        fail("SetMaskCount: still on at the end of the kernel (missing SetMaskNorm)");
    }
    if (set_) {
        fail("SetVectorMask: still set at the end of the kernel (missing ResetMask)");
    }
}

// ---- UB and its shadow.

UnifiedBuffer::UnifiedBuffer(size_t size)
    : data_(size + kBlock, 0xCD), initialised_(size, false), shadow_(round_up(size) / kBlock)
{
    base_ = data_.data() + (kBlock - reinterpret_cast<uintptr_t>(data_.data()) % kBlock) % kBlock;
}

void UnifiedBuffer::forget(size_t offset, size_t bytes)
{
    std::fill_n(initialised_.begin() + offset, bytes, false);
}

void UnifiedBuffer::check_initialised(size_t offset, size_t bytes, const char* what) const
{
    const auto begin = initialised_.begin() + offset;
    const auto hole = std::find(begin, begin + bytes, false);
    if (hole != begin + bytes) {
        fail(what, ": reads UB byte ", hole - initialised_.begin(),
             ", which nobody has written (uninitialised)");
    }
}

void UnifiedBuffer::mark_initialised(size_t offset, size_t bytes)
{
    std::fill_n(initialised_.begin() + offset, bytes, true);
}

[[noreturn]] static void hazard(const char* kind, pipe_t pipe, pipe_t other, size_t block,
                                const char* what)
{
    const std::string remedy =
        pipe == other ? std::string("PipeBarrier<PIPE_") + name(pipe) + ">"
                      : std::string("SetFlag and WaitFlag ") + name(other) + "_" + name(pipe) +
                            " or a queue";
    fail(what, ": hazard, ", kind, ": pipe ", name(pipe), " does not wait for pipe ", name(other),
         " at UB byte ", block * kBlock, " (needs ", remedy, ")");
}

void UnifiedBuffer::touch(const Clocks& clocks, pipe_t pipe, uint32_t time, size_t offset,
                          size_t bytes, bool write, const char* what)
{
    for (size_t i = offset / kBlock; i < round_up(offset + bytes) / kBlock; ++i) {
        Shadow& block = shadow_[i];
        for (int p = 0; p < kPipes; ++p) {
            const pipe_t other = static_cast<pipe_t>(p);
            const bool self = other == pipe && block.written[p] == time;
            if (!self && !clocks.ordered(pipe, other, block.written[p])) {
                hazard(write ? "write after write" : "read after write", pipe, other, i, what);
            }
            // a pipe starts its instructions in order, so it cannot overtake its own reads
            if (write && other != pipe && !clocks.ordered(pipe, other, block.read[p])) {
                hazard("write after read", pipe, other, i, what);
            }
        }
        (write ? block.written : block.read)[pipe] = time;
    }
}

// ---- The core itself.

int Core::take(size_t bytes, bool of_queue)
{
    const size_t offset = counters.ub_peak_bytes;
    bytes = round_up(bytes);
    counters.ub_peak_bytes += bytes;
    if (counters.ub_peak_bytes > ub.size()) {
        fail("InitBuffer: UB overflow, the buffers take ", counters.ub_peak_bytes,
             " bytes and the budget is ", ub.size());
    }
    if (bytes == 0) {
        fail("InitBuffer: a buffer of 0 bytes");
    }
    if (buffers.size() == 64) {
        fail("InitBuffer: more than 64 buffers in one TPipe");
    }
    buffers.push_back({offset, bytes});
    buffers.back().of_queue = of_queue;
    return static_cast<int>(buffers.size()) - 1;
}

void Core::touch_global(pipe_t issuer, uint32_t time, const void* address, size_t bytes,
                        size_t alignment, bool write, const char* what)
{
    const int region = memory->check(address, bytes, alignment, write, what);
    const auto* begin = static_cast<const uint8_t*>(address);
    check_global_order(issuer, begin, begin + bytes, write, what);
    if (write) {
        own_writes_[begin] = {begin + bytes, issuer, time};
    }
    memory->note(region, address, bytes, write, block);
}

void Core::sync_all()
{
    if (aiv_only) {
        fail("SyncAll: a kernel of type KERNEL_TYPE_AIV_ONLY has no barrier between cores: its "
             "type must be KERNEL_TYPE_MIX_AIV_1_0");
    }
    ++counters.sync_alls;
    clocks.barrier(PIPE_ALL);
    clocks.pass(kSyncAllCycles);
    grid_->sync_all();
}

void Core::finish()
{
    counters.cycles = clocks.cycles();
    clocks.check_all_waited_for(true);
    for (size_t i = 0; i < buffers.size(); ++i) {
        if (buffers[i].state != BufferState::free) {
            fail("buffer ", i, " of UB: not given back by FreeTensor at the end of the kernel");
        }
    }
    if (atomic) {
        fail("SetAtomicAdd: still on at the end of the kernel (missing SetAtomicNone)");
    }
    mask.check_default();
}

void Core::check_global_order(pipe_t issuer, const uint8_t* begin, const uint8_t* end, bool write,
                              const char* what) const
{
    auto next = own_writes_.lower_bound(begin);
    if (next != own_writes_.begin()) {
        --next;
    }
    for (; next != own_writes_.end() && next->first < end; ++next) {
        const Store& store = next->second;
        const bool in_order = issuer == store.pipe && write;  // one pipe stores in order
        if (store.end > begin && !in_order && !clocks.ordered(issuer, store.pipe, store.time)) {
            fail(what, ": hazard in global memory: pipe ", name(issuer),
                 " does not wait for the core's own store on pipe ", name(store.pipe));
        }
    }
}

// ---- Views of memory, and the operands of instructions.

void* GlobalView::touch_at(pipe_t pipe, uint32_t time, uint64_t offset, uint64_t bytes, bool write,
                           const char* what) const
{
    if (size_ != ~0ull && offset * element_ + bytes > size_ * element_) {
        fail(what, ": ", bytes, " bytes at element ", offset, " leave the GlobalTensor of ", size_,
             " elements");
    }
    uint8_t* address = data_ + offset * element_;
    core().touch_global(pipe, time, address, bytes, element_, write, what);
    return address;
}

void* GlobalView::scalar(uint64_t offset, bool write, const char* what) const
{
    ++core().counters.scalar_gm_accesses;
    return touch_at(PIPE_S, core().clocks.issue(PIPE_S), offset, element_, write, what);
}

void GlobalView::move(uint64_t offset)
{
    if (offset > size_) {
        fail("GlobalTensor: offset ", offset, " is past its ", size_, " elements");
    }
    data_ += offset * element_;
    size_ = size_ == ~0ull ? size_ : size_ - offset;
}

LocalView::LocalView(size_t element, int buffer, size_t begin, size_t end)
    : element_(element), buffer_(buffer), begin_(begin), end_(end),
      generation_(core().buffers[buffer].generation)
{
}

void LocalView::move(uint32_t offset)
{
    const size_t elements = (end_ - begin_) / element_;
    begin_ += offset * element_;
    if (begin_ > end_) {
        fail("LocalTensor: offset ", offset, " is past its ", elements, " elements");
    }
}

void* LocalView::raw(size_t first, size_t count, const char* what) const
{
    if (buffer_ < 0) {
        fail(what, ": the LocalTensor was never given a buffer");
    }
    const Buffer& owner = core().buffers[buffer_];
    if (owner.of_queue &&
        (owner.generation != generation_ || owner.state == BufferState::free)) {
        fail(what, ": the tensor is used after FreeTensor");
    }
    const size_t offset = begin_ + first * element_;
    if (offset + count * element_ > end_) {
        fail(what, ": elements ", first, " to ", first + count, " leave the buffer of ",
             (end_ - begin_) / element_, " elements");
    }
    return core().ub.at(offset);
}

void* LocalView::scalar(uint32_t index, bool write, const char* what) const
{
    void* address = raw(index, 1, what);
    Core& here = core();
    const size_t offset = begin_ + index * element_;
    ++here.counters.scalar_ub_accesses;
    here.ub.touch(here.clocks, PIPE_S, here.clocks.issue(PIPE_S), offset, element_, write, what);
    if (write) {
        here.ub.mark_initialised(offset, element_);
    } else {
        here.ub.check_initialised(offset, element_, what);
    }
    return address;
}

Instruction::Instruction(pipe_t pipe, const char* what, Mask mask)
    : pipe_(pipe), what_(what), time_(core().clocks.issue(pipe))
{
    core().counters.vector_instructions += pipe == PIPE_V;
    if (pipe == PIPE_V && mask == Mask::own) {
        core().mask.take(what);
    }
}

void* Instruction::operand(const LocalView& tensor, size_t first, size_t count, size_t alignment,
                           bool write)
{
    const size_t offset = tensor.begin() + first * tensor.element();
    if (offset % alignment) {
        fail(what_, ": UB address ", offset, " is not aligned to ", alignment, " bytes");
    }
    void* address = tensor.raw(first, count, what_);
    const size_t bytes = count * tensor.element();
    UnifiedBuffer& ub = core().ub;
    ub.touch(core().clocks, pipe_, time_, offset, bytes, write, what_);
    if (write) {
        ub.mark_initialised(offset, bytes);
    } else {
        ub.check_initialised(offset, bytes, what_);
    }
    (write ? writes_ : reads_).push_back({offset, offset + bytes});
    return address;
}

Lanes Instruction::lanes(bool own, uint64_t mask, size_t element_bytes, int repeats) const
{
    if (!own) {
        return core().mask.lanes(element_bytes, repeats, what_);
    }
    check_mask(mask, element_bytes, repeats, what_);
    return {static_cast<size_t>(repeats), mask, mask};
}

void Instruction::check_overlap() const
{
    for (const Range& read : reads_) {
        for (const Range& write : writes_) {
            const bool apart = read.end <= write.begin || write.end <= read.begin;
            if (!apart && read.begin != write.begin) {
                fail(what_, ": source and destination overlap without coinciding (UB bytes ",
                     read.begin, " and ", write.begin, ")");
            }
        }
    }
}

void check_mask(size_t mask, size_t element_bytes, int repeats, const char* what)
{
    if (mask < 1 || mask > kRepeat / element_bytes) {
        fail(what, ": mask ", mask, " is not in 1 to ", kRepeat / element_bytes);
    }
    if (repeats < 0 || repeats > 255) {
        fail(what, ": repeatTimes ", repeats, " is not in 0 to 255");
    }
}

}  // namespace twin
