// The checker: kernels that are compiled with -fsanitize=thread call the `__tsan_…` functions below at each access to memory.
//
// An access outside of live buffers, shared memory and the thread's own stack ends the launch. So do two accesses to one byte, at least one of them a
// write and not both atomic, that nothing orders. For this each thread counts the times it synchronised (its clock) and knows up to which clock of each
// other thread all accesses came before its own; a byte remembers its last write and two reads (of more readers only two can be caught).
// Blocks run one after the other, so blocks are ordered by an atomic operation on one address between __threadfence calls, and by nothing else.

#include "emulate_check.hpp"

#include <map>

namespace emulate {

// ---- what threads know of each other ----

// For each thread of the cluster, the clock up to which its accesses came before. Shared by those who know the same.
struct Knowledge {
    u32 users;
    std::vector<u32> clocks;
};

// What a thread knows: of its warp, and of all others since and until the last barrier of the whole block.
struct Past {
    u32 lanes[32];
    const u32* base;
    Knowledge* extra;
    u32 proxy_fence;
    bool fenced;
};

static std::vector<Past> pasts;
static std::vector<u32> bases[CLUSTER_LIMIT][2];
static u32 newest_base[CLUSTER_LIMIT];
static std::vector<Knowledge*> unused;

static Knowledge* new_knowledge() {
    Knowledge* k;
    if (unused.empty()) {
        k = new Knowledge();
    } else {
        k = unused.back();
        unused.pop_back();
    }
    k->users = 1;
    k->clocks.assign(machine.thread_count, 0);
    return k;
}

static void drop(Knowledge*& k) {
    if (k != nullptr && --k->users == 0) {
        unused.push_back(k);
    }
    k = nullptr;
}

static void raise(std::vector<u32>& to, const u32* from) {
    u32* a = to.data();
    for (size_t i = 0, n = to.size(); i < n; ++i) {
        a[i] = std::max(a[i], from[i]);
    }
}

static u32& clock_of(const Thread& t) {
    return pasts[t.id].lanes[t.lane];
}

static const u32* others(const Past& past) {
    return past.extra != nullptr ? past.extra->clocks.data() : past.base;
}

static bool knows(const Thread& t, u32 other, u32 clock) {
    const Past& past = pasts[t.id];
    const Thread& o = *machine.threads[other];
    return (o.warp == t.warp ? past.lanes[o.lane] : others(past)[other]) >= clock;
}

static u32 first_of(const Warp& warp) {
    return warp.lanes[0]->id;
}

static u32 lanes_of(const Warp& warp) {
    return std::min(32u, machine.thread_count / machine.block_count - warp.id * 32);
}

void check_arrives(Thread& t, Knowledge*& into) {
    if (into == nullptr) {
        into = new_knowledge();
    }
    Past& past = pasts[t.id];
    raise(into->clocks, others(past));
    for (u32 l = 0, first = first_of(*t.warp); l < lanes_of(*t.warp); ++l) {
        into->clocks[first + l] = std::max(into->clocks[first + l], past.lanes[l]);
    }
    ++clock_of(t);
}

void check_waited(Thread& t, const Knowledge* from) {
    if (from == nullptr) {
        return;
    }
    Past& past = pasts[t.id];
    if (past.extra == nullptr || past.extra->users > 1) {
        Knowledge* own = new_knowledge();
        raise(own->clocks, others(past));
        drop(past.extra);
        past.extra = own;
    }
    raise(past.extra->clocks, from->clocks.data());
    for (u32 l = 0, first = first_of(*t.warp); l < lanes_of(*t.warp); ++l) {
        past.lanes[l] = std::max(past.lanes[l], from->clocks[first + l]);
    }
}

void check_phase_ends(Knowledge*& gathered, Knowledge*& released) {
    drop(released);
    std::swap(gathered, released);
}

void check_barrier_completes(Block& block, Barrier& barrier, bool whole_block) {
    if (!whole_block) {
        for (Thread* t : barrier.waiting) {
            check_waited(*t, barrier.knowledge);
        }
        drop(barrier.knowledge);
        return;
    }
    const u32 count = machine.thread_count / machine.block_count, first = block.rank * count;
    const u32 next = newest_base[block.rank] ^= 1;
    std::vector<u32>& base = bases[block.rank][next];
    base = bases[block.rank][next ^ 1];
    const Knowledge* last = nullptr;
    for (const Thread* t : barrier.waiting) {
        const Knowledge* extra = pasts[t->id].extra;
        if (extra != nullptr && extra != last) {
            raise(base, extra->clocks.data());
            last = extra;
        }
    }
    // A thread that has returned counts as one that came: nothing of it is still under way.
    for (u32 i = first; i < first + count; ++i) {
        base[i] = clock_of(*machine.threads[i]);
    }
    for (u32 i = first; i < first + count; ++i) {
        Thread& t = *machine.threads[i];
        Past& past = pasts[i];
        drop(past.extra);
        past.base = base.data();
        memcpy(past.lanes, base.data() + first_of(*t.warp), lanes_of(*t.warp) * sizeof(u32));
        ++clock_of(t);
    }
}

void check_lanes_meet(Warp& warp, u32 lanes) {
    u32 common[32] = {};
    Knowledge* extra = pasts[warp.lanes[__builtin_ctz(lanes)]->id].extra;
    bool same = true;
    for (u32 rest = lanes; rest != 0; rest &= rest - 1) {
        const Past& past = pasts[warp.lanes[__builtin_ctz(rest)]->id];
        same &= past.extra == extra;
        for (u32 l = 0; l < 32; ++l) {
            common[l] = std::max(common[l], past.lanes[l]);
        }
    }
    if (!same) {
        extra = new_knowledge();
        for (u32 rest = lanes; rest != 0; rest &= rest - 1) {
            raise(extra->clocks, others(pasts[warp.lanes[__builtin_ctz(rest)]->id]));
        }
    }
    for (u32 rest = lanes; rest != 0; rest &= rest - 1) {
        Thread& t = *warp.lanes[__builtin_ctz(rest)];
        Past& past = pasts[t.id];
        memcpy(past.lanes, common, sizeof common);
        ++clock_of(t);
        if (!same) {
            drop(past.extra);
            past.extra = extra;
            ++extra->users;
        }
    }
    if (!same) {
        drop(extra);
    }
}

void check_fence_proxy(Thread& t) {
    pasts[t.id].proxy_fence = ++clock_of(t);
}

// ---- who touched a byte ----

// Cluster (its number since the program began): 24 bits, thread 14, clock 24, whether atomic, whether by the copy engine.
typedef u64 Stamp;
constexpr u64 ATOMIC = 1, ASYNC = 2;

static u32 cluster_of(Stamp s) {
    return (u32)(s >> 40);
}
static u32 thread_of(Stamp s) {
    return (u32)(s >> 26 & 0x3fff);
}
static u32 clock_in(Stamp s) {
    return (u32)(s >> 2 & 0xffffff);
}

// What touched four bytes, or one if they are told apart. `where` is an instruction's distance from the module's begin.
struct Cell {
    Stamp write, reads[2];
    u32 write_where, read_where[2];
    bool under_way;
    // The launch whose accesses tell the bytes apart, and where these are.
    u32 split_launch, split;
};
struct Split {
    Cell bytes[4];
};

// A live buffer of the device.
struct Buffer {
    u64 begin;
    u64 bytes;
    Cell* cells;
};

static std::map<u64, Buffer> buffers;
static Buffer* recent;
static Cell* shared_cells;
constexpr u32 SHARED_CELLS = 512 << 10 >> 2;
static std::vector<Split> splits;
static u32 launch_number, cluster_number, first_cluster;
static std::vector<Index> cluster_index;
// Clusters of this launch whose writes to global memory come before what the running one does.
static std::vector<u64> before;
static std::unordered_map<u64, std::vector<u64>> released;

static Cell* new_cells(u64 count) {
    void* cells = mmap(nullptr, count * sizeof(Cell), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return cells == MAP_FAILED ? nullptr : (Cell*)cells;
}

static u64 cells_of(const Buffer& buffer) {
    return (buffer.bytes + (buffer.begin & 3) + 3) / 4;
}

static void forget(Buffer& buffer) {
    if (buffer.cells != nullptr) {
        munmap(buffer.cells, cells_of(buffer) * sizeof(Cell));
        buffer.cells = nullptr;
    }
}

void check_launch_starts(u64 clusters) {
    ++launch_number;
    splits.clear();
    if (cluster_number + clusters >= 1 << 24) {
        cluster_number = 0;
        for (auto& [begin, buffer] : buffers) {
            forget(buffer);
        }
        if (shared_cells != nullptr) {
            munmap(shared_cells, CLUSTER_LIMIT * SHARED_CELLS * sizeof(Cell));
            shared_cells = nullptr;
        }
    }
    if (shared_cells == nullptr) {
        shared_cells = new_cells(CLUSTER_LIMIT * SHARED_CELLS);
    }
    first_cluster = cluster_number + 1;
    cluster_index.clear();
    released.clear();
}

void check_cluster_starts() {
    ++cluster_number;
    cluster_index.push_back(machine.blocks[0]->index);
    before.clear();
    pasts.resize(machine.thread_count);
    for (u32 rank = 0; rank < machine.block_count; ++rank) {
        bases[rank][0].assign(machine.thread_count, 0);
        newest_base[rank] = 0;
    }
    for (u32 i = 0; i < machine.thread_count; ++i) {
        Thread& t = *machine.threads[i];
        pasts[i] = {{}, bases[t.block->rank][0].data(), nullptr, 0, false};
        clock_of(t) = 1;
    }
}

void check_cluster_ends() {
    for (Past& past : pasts) {
        drop(past.extra);
    }
    for (Block* block : machine.blocks) {
        for (Barrier& barrier : block->barriers) {
            drop(barrier.knowledge);
        }
    }
    for (auto& [address, bar] : machine.mbarriers) {
        drop(bar.knowledge);
        drop(bar.released);
    }
    drop(machine.cluster_knowledge);
    drop(machine.cluster_released);
}

static Stamp stamp_of(const Thread& t) {
    return (u64)cluster_number << 40 | (u64)t.id << 26 | (u64)(clock_of(t) & 0xffffff) << 2;
}

static bool is_before(Stamp s, const Thread& t) {
    if (cluster_of(s) == cluster_number) {
        return thread_of(s) == t.id || knows(t, thread_of(s), clock_in(s));
    }
    const u32 cluster = cluster_of(s) - first_cluster;
    return cluster / 64 < before.size() && before[cluster / 64] >> cluster % 64 & 1;
}

static std::string name_of(Stamp s) {
    const u32 per_block = machine.thread_count / machine.block_count, cluster = cluster_of(s) - first_cluster;
    std::string name = format("thread %u", thread_of(s) % per_block);
    if (cluster_of(s) != cluster_number || machine.block_count > 1) {
        const Index& at = cluster_index[cluster];
        name += format(" of block (%u,%u,%u)", at.x + thread_of(s) / per_block, at.y, at.z);
    }
    return name;
}

static std::string line_at(u32 where) {
    return line_of(machine.image.begin + where);
}

// A place in memory: what its name is, and who touched it there before.
struct Place {
    bool shared;
    u32 smem;
    const Buffer* buffer;
    u64 address;

    std::string name() const {
        if (shared) {
            return shared_name(smem) + (machine.block_count > 1 ? format(" of block %u", rank_of(smem)) : "");
        }
        return format("byte %llu of a buffer of %llu", address - buffer->begin, buffer->bytes);
    }
    bool is_current(Stamp s) const { return s != 0 && (shared ? cluster_of(s) == cluster_number : cluster_of(s) >= first_cluster); }
};

[[noreturn]] static void fail_race(const Place& place, const char* first, Stamp stamp, u32 stamp_where, const char* second, const Thread& t, u32 where) {
    fail("race on " + place.name() + ": " + name_of(stamp) + first + line_at(stamp_where) + " and " + name_of(stamp_of(t)) + second + line_at(where) +
        ", and nothing orders them");
}

static void touch(Cell& cell, const Place& place, const Thread& t, Stamp stamp, Access access, u32 where) {
    const bool written = place.is_current(cell.write);
    if (cell.under_way && written) {
        fail(name_of(stamp_of(t)) + " touches " + place.name() + line_at(where) + ", into which an asynchronous copy has not come in" + line_at(cell.write_where));
    }
    if (written && !is_before(cell.write, t) && !(access == Access::Atomic && cell.write & ATOMIC)) {
        fail_race(place, " writes", cell.write, cell.write_where, access == Access::Read ? " reads" : " writes", t, where);
    }
    if (access == Access::Read) {
        // In the place of a read that came before this one; of reads at the same time two stay.
        u32 slot = 0;
        if (place.is_current(cell.reads[0]) && !is_before(cell.reads[0], t)) {
            slot = 1;
        }
        cell.reads[slot] = stamp;
        cell.read_where[slot] = where;
        return;
    }
    for (u32 slot = 0; slot < 2; ++slot) {
        if (place.is_current(cell.reads[slot]) && !is_before(cell.reads[slot], t)) {
            fail_race(place, " reads", cell.reads[slot], cell.read_where[slot], " writes", t, where);
        }
        cell.reads[slot] = 0;
    }
    cell.write = stamp;
    cell.write_where = where;
    cell.under_way = false;
}

// Calls `each(cell, place)` for the cells of bytes that lie in one row of cells.
template <class F> static void for_cells(Cell* cells, u64 offset, u32 bytes, Place place, F each) {
    while (bytes > 0) {
        Cell& cell = cells[offset / 4];
        const u32 first = offset % 4, part = std::min(bytes, 4 - first);
        const bool apart = cell.split_launch == launch_number;
        if (part == 4 && !apart) {
            each(cell, place);
        } else {
            if (!apart) {
                splits.push_back({{cell, cell, cell, cell}});
                cell.split_launch = launch_number;
                cell.split = (u32)splits.size() - 1;
            }
            for (u32 i = first; i < first + part; ++i) {
                each(splits[cell.split].bytes[i], place);
            }
        }
        offset += part;
        bytes -= part;
        place.smem += part;
        place.address += part;
    }
}

static Cell* cells_of_block(u32 rank) {
    return shared_cells + rank * SHARED_CELLS;
}

static u32 distance(const void* where) {
    return (u32)((u64)where - (u64)machine.image.begin);
}

template <class F> static void for_shared(u32 smem, u32 bytes, F each) {
    for_cells(cells_of_block(rank_of(smem)), smem & 0xffffff, bytes, {true, smem, nullptr, 0}, each);
}

void check_shared(Thread& t, u32 smem, u32 bytes, Access access, const void* where) {
    const Stamp stamp = stamp_of(t) | (access == Access::Atomic ? ATOMIC : 0);
    for_shared(smem, bytes, [&](Cell& cell, const Place& place) {
        if ((access == Access::Read ? cell.reads[0] : cell.write) != stamp || cell.under_way || access == Access::Atomic) {
            touch(cell, place, t, stamp, access, distance(where));
        }
    });
}

static const char* verb(Access access) {
    return access == Access::Read ? "reads" : access == Access::Write ? "writes" : "operates on";
}

[[noreturn]] static void fail_bounds(const Thread& t, u64 address, u64 bytes, Access access, const void* where) {
    std::string text = emulate::name_of(&t) + " " + verb(access) + format(" %llu bytes at 0x%llx", bytes, address) + line_of(where);
    auto next = buffers.upper_bound(address);
    if (next != buffers.begin()) {
        const Buffer& under = std::prev(next)->second;
        if (address < under.begin + under.bytes) {
            fail(text + format(", the last of which lie beyond a buffer of %llu bytes", under.bytes));
        }
        if (address - under.begin - under.bytes < 1 << 20) {
            text += format(", %llu bytes past the end of a buffer of %llu", address - under.begin - under.bytes, under.bytes);
        }
    }
    if (next != buffers.end() && next->second.begin - address < 1 << 20) {
        text += format(", %llu bytes before the begin of a buffer of %llu", next->second.begin - address, next->second.bytes);
    }
    fail(text + ": there is no live buffer");
}

void check_global(Thread& t, const void* p, u64 bytes, Access access, const void* where) {
    const u64 address = (u64)p;
    if (bytes == 0) {
        return;
    }
    if (recent == nullptr || address - recent->begin >= recent->bytes) {
        auto next = buffers.upper_bound(address);
        if (next == buffers.begin() || address - std::prev(next)->second.begin >= std::prev(next)->second.bytes) {
            fail_bounds(t, address, bytes, access, where);
        }
        recent = &std::prev(next)->second;
    }
    Buffer& buffer = *recent;
    if (bytes > buffer.bytes - (address - buffer.begin)) {
        fail_bounds(t, address, bytes, access, where);
    }
    if (buffer.cells == nullptr) {
        buffer.cells = new_cells(cells_of(buffer));
        if (buffer.cells == nullptr) {
            fail("the host has no memory left to check with");
        }
    }
    const Stamp stamp = stamp_of(t) | (access == Access::Atomic ? ATOMIC : 0);
    for_cells(buffer.cells, address - (buffer.begin & ~3ull), (u32)bytes, {false, 0, &buffer, address}, [&](Cell& cell, const Place& place) {
        if ((access == Access::Read ? cell.reads[0] : cell.write) != stamp || access == Access::Atomic) {
            touch(cell, place, t, stamp, access, distance(where));
        }
    });
}

void check_async_read(Thread& t, u32 smem, u32 bytes, const void* where) {
    for_shared(smem, bytes, [&](Cell& cell, const Place& place) {
        touch(cell, place, t, stamp_of(t), Access::Read, distance(where));
        if (place.is_current(cell.write) && !(cell.write & ASYNC) && pasts[thread_of(cell.write)].proxy_fence <= clock_in(cell.write)) {
            fail(name_of(cell.write) + " writes " + place.name() + line_at(cell.write_where) +
                " and calls no fence_proxy_async before the copy engine or the tensor cores read it" + line_at(distance(where)));
        }
    });
}

void check_async_write_starts(Thread& t, u32 smem, u32 bytes, const void* where) {
    for_shared(smem, bytes, [&](Cell& cell, const Place& place) {
        touch(cell, place, t, stamp_of(t) | ASYNC, Access::Write, distance(where));
        cell.under_way = true;
    });
}

// A copy by a thread counts as done at its wait; one by the copy engine when it was asked for, which whoever waits for `bar` then knows.
void check_async_write_ends(Thread& t, u32 smem, u32 bytes, Mbarrier* bar, const void*) {
    u32 clock = 0;
    for_shared(smem, bytes, [&](Cell& cell, const Place&) {
        cell.under_way = false;
        clock = std::max(clock, clock_in(cell.write));
        if (bar == nullptr) {
            cell.write = stamp_of(t) | ASYNC;
        }
    });
    if (bar != nullptr) {
        if (bar->knowledge == nullptr) {
            bar->knowledge = new_knowledge();
        }
        bar->knowledge->clocks[t.id] = std::max(bar->knowledge->clocks[t.id], clock);
    }
}

// ---- order between blocks ----

void check_fence(Thread& t) {
    pasts[t.id].fenced = true;
}

static void join(std::vector<u64>& to, const std::vector<u64>& from) {
    to.resize(std::max(to.size(), from.size()));
    for (size_t i = 0; i < from.size(); ++i) {
        to[i] |= from[i];
    }
}

static bool is_global(const void* p) {
    const auto next = buffers.upper_bound((u64)p);
    return next != buffers.begin() && (u64)p - std::prev(next)->second.begin < std::prev(next)->second.bytes;
}

// ---- accesses that the compiler reports ----

static void check_access(const void* p, u64 bytes, Access access, const void* where) {
    Thread* t = machine.current;
    if (t == nullptr) {
        return;
    }
    const u64 address = (u64)p;
    if (address - (u64)t->fiber->low < STACK) {
        for (const Accumulator* busy : t->warp->accumulators) {
            if (address - (u64)busy->d[t->lane] < busy->columns * 2) {
                fail(emulate::name_of(t) + " uses an accumulator of a wgmma that it has not waited for" + line_of(where));
            }
        }
        return;
    }
    const u64 in_arena = address - (u64)shared_arena, in_statics = address - (u64)machine.image.statics;
    if (in_arena < CLUSTER_LIMIT * SHARED_ROOM) {
        const u64 offset = address - (u64)t->block->dynamic;
        if (offset >= machine.shared_bytes || bytes > machine.shared_bytes - offset) {
            fail(emulate::name_of(t) + " " + verb(access) + format(" %llu bytes at byte %lld of dynamic shared memory, which has %u", bytes, (i64)offset, machine.shared_bytes) +
                line_of(where));
        }
        check_shared(*t, DYNAMIC_FIRST + (u32)offset, (u32)bytes, access, where);
    } else if (in_statics < machine.static_bytes) {
        check_shared(*t, machine.static_first + (u32)in_statics, (u32)bytes, access, where);
    } else if (address - (u64)machine.image.begin < (u64)(machine.image.end - machine.image.begin)) {
        if (access != Access::Read) {
            fail(emulate::name_of(t) + " writes to a constant" + line_of(where));
        }
    } else {
        check_global(*t, p, bytes, access, where);
    }
}

void check_atomic(void* p, u32 bytes, const void* where) {
    check_access(p, bytes, Access::Atomic, where);
    if (!is_global(p)) {
        return;
    }
    const auto found = released.find((u64)p);
    if (found != released.end()) {
        join(before, found->second);
    }
    if (pasts[machine.current->id].fenced) {
        std::vector<u64>& mine = released[(u64)p];
        join(mine, before);
        const u32 cluster = cluster_number - first_cluster;
        mine.resize(std::max<size_t>(mine.size(), cluster / 64 + 1));
        mine[cluster / 64] |= 1ull << cluster % 64;
    }
}

} // namespace emulate

extern "C" {

// `bytes` bytes that kernels may touch from now on; with 0 those at `address` no longer.
void kiln_emulate_memory(u64 address, u64 bytes) {
    const std::lock_guard<std::mutex> lock(one_at_a_time);
    recent = nullptr;
    const auto known = buffers.find(address);
    if (known != buffers.end()) {
        forget(known->second);
        buffers.erase(known);
    }
    if (bytes > 0) {
        buffers[address] = {address, bytes, nullptr};
    }
}

void __tsan_init() {}

#define KILN_REPORTS(bytes) \
    void __tsan_read##bytes(void* p) { check_access(p, bytes, Access::Read, __builtin_return_address(0)); } \
    void __tsan_write##bytes(void* p) { check_access(p, bytes, Access::Write, __builtin_return_address(0)); } \
    void __tsan_unaligned_read##bytes(void* p) { check_access(p, bytes, Access::Read, __builtin_return_address(0)); } \
    void __tsan_unaligned_write##bytes(void* p) { check_access(p, bytes, Access::Write, __builtin_return_address(0)); }
KILN_REPORTS(1)
KILN_REPORTS(2)
KILN_REPORTS(4)
KILN_REPORTS(8)
KILN_REPORTS(16)
#undef KILN_REPORTS

void __tsan_read_range(void* p, size_t bytes) {
    check_access(p, bytes, Access::Read, __builtin_return_address(0));
}

void __tsan_write_range(void* p, size_t bytes) {
    check_access(p, bytes, Access::Write, __builtin_return_address(0));
}

} // extern "C"
