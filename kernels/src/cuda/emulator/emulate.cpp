// The runtime of the emulator: threads as fibers, barriers and exchanges among the lanes of a warp. Compiled once and loaded, with its symbols
// visible to all, before kernels that were compiled with emulate.cuh.
//
// A thread runs until it has to wait; then the next one runs. A thread that never waits leaves its stack to the next, so that a kernel without
// barriers costs a call per thread. KILN_EMULATE_SHUFFLE=seed runs blocks and threads in a random order, and lets copies come in early.

#include "emulate_state.hpp"

#include "emulate_check.hpp"

#include <algorithm>
#include <chrono>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>

extern "C" {
emulate::Index kiln_emulate_thread, kiln_emulate_block, kiln_emulate_block_dim, kiln_emulate_grid_dim;
char* kiln_emulate_shared;
}

#include "emulate_fibers.cpp"

namespace emulate {

Machine machine;

static std::mutex one_at_a_time;

// ---- messages ----

std::string format(const char* text, ...) {
    char line[1024];
    va_list list;
    va_start(list, text);
    vsnprintf(line, sizeof line, text, list);
    va_end(list);
    return line;
}

std::string name_of(const Thread* t) {
    const Index& d = kiln_emulate_block_dim;
    std::string name = d.y == 1 && d.z == 1 ? format("thread %u", t->index.x) : format("thread (%u,%u,%u)", t->index.x, t->index.y, t->index.z);
    if (machine.block_count > 1) {
        name += format(" of block %u of the cluster", t->block->rank);
    }
    return name;
}

std::string line_of(const void* where) {
    Dl_info info;
    if (where == nullptr || dladdr(where, &info) == 0 || info.dli_fname == nullptr) {
        return "";
    }
    // The instruction that called, not the one to return to; the first line is the innermost of the functions that were inlined there.
    const u64 offset = (u64)where - 1 - (u64)info.dli_fbase;
    std::string lines;
    if (FILE* pipe = popen(format("addr2line -i -s -e '%s' 0x%llx 2>/dev/null", info.dli_fname, offset).c_str(), "r")) {
        char text[256];
        while (fgets(text, sizeof text, pipe) != nullptr) {
            std::string line = text;
            line.erase(line.find_first_of("\n ("));
            if (line[0] != '?' && line.compare(0, 8, "emulate.") != 0) {
                lines += (lines.empty() ? " (" : " in ") + line;
            }
        }
        pclose(pipe);
    }
    return lines.empty() ? format(" (at 0x%llx in the module)", offset) : lines + ")";
}

std::string shared_name(u32 smem) {
    const u32 offset = smem & 0xffffff;
    if (offset >= machine.static_first) {
        return format("byte %u of static shared memory", offset - machine.static_first);
    }
    return format("byte %d of dynamic shared memory", (i32)(offset - DYNAMIC_FIRST));
}

[[noreturn]] void fail(const std::string& message) {
    const Index& b = machine.current->block->index;
    machine.failed = true;
    machine.message = format("kernel %s, block (%u,%u,%u): ", machine.kernel->name, b.x, b.y, b.z) + message;
    switch_to(machine.current->fiber, &host);
    abort();
}

static std::string missing_lanes(const Thread& t) {
    std::string lanes;
    u32 count = 0;
    for (u32 l = 0; l < 32; ++l) {
        const Thread* other = t.warp->lanes[l];
        const bool needed = t.mask >> l & t.warp->live >> l & 1;
        if (needed && !(other->waits == Waits::Warp && other->mask == t.mask && other->operation == t.operation)) {
            lanes += count++ == 0 ? format("%u", l) : format(",%u", l);
        }
    }
    return lanes;
}

static std::string describe_wait(const Thread& t) {
    static const char* const names[] = {"__syncwarp", "__shfl_sync", "__shfl_up_sync", "__shfl_down_sync", "__shfl_xor_sync", "a vote", "__match_any_sync",
        "elect_one", "ldmatrix", "stmatrix", "mma", "wgmma", "wgmma_fence", "wgmma_commit", "wgmma_wait", "setmaxnreg"};
    switch (t.waits) {
    case Waits::Barrier: {
        const Barrier& barrier = t.block->barriers[t.wait_id];
        if (t.wait_id == 0 && barrier.threads == 0) {
            return format("__syncthreads (%u of %u threads are there)", barrier.arrived, t.block->live);
        }
        return format("barrier %u (%u of %u threads are there)", t.wait_id, barrier.arrived, barrier.threads);
    }
    case Waits::Warp:
        return format("%s with mask 0x%x for lanes %s of warp %u", names[t.operation], t.mask, missing_lanes(t).c_str(), t.warp->id);
    case Waits::Mbarrier: {
        const Mbarrier& bar = machine.mbarriers[(u64)t.block->rank << 32 | t.wait_id];
        return format("the mbarrier at %s for the end of phase %u (it lacks %u of %u arrivals and %lld bytes)", shared_name(t.wait_id).c_str(),
            t.wait_for, bar.pending, bar.expected, bar.bytes);
    }
    case Waits::Cluster:
        return format("the cluster's barrier (%u of %u threads have arrived)", machine.cluster_arrived, machine.live);
    case Waits::Nothing:
        break;
    }
    return "its turn";
}

[[noreturn]] static void fail_deadlock() {
    std::string text = "deadlock:";
    std::vector<std::string> seen;
    for (u32 i = 0; i < machine.thread_count; ++i) {
        const Thread& t = *machine.threads[i];
        if (t.done) {
            continue;
        }
        const std::string wait = describe_wait(t);
        if (std::find(seen.begin(), seen.end(), wait) != seen.end()) {
            continue;
        }
        u32 count = 0;
        for (u32 j = i; j < machine.thread_count; ++j) {
            const Thread& other = *machine.threads[j];
            count += !other.done && describe_wait(other) == wait;
        }
        if (seen.size() == 6) {
            text += "; and others";
            break;
        }
        text += (seen.empty() ? " " : "; ") + name_of(&t) + (count > 1 ? format(" and %u more wait", count - 1) : " waits") + " at " + wait + line_of(t.where);
        seen.push_back(wait);
    }
    fail(text);
}

// ---- which thread runs ----

static void activate(Block* block) {
    if (machine.active != nullptr && machine.static_bytes != 0 && machine.block_count > 1) {
        memcpy(machine.active->statics, machine.image.statics, machine.static_bytes);
        memcpy(machine.image.statics, block->statics, machine.static_bytes);
    }
    machine.active = block;
    kiln_emulate_block = block->index;
    kiln_emulate_shared = (char*)block->dynamic;
}

static void enter(Thread* thread) {
    machine.current = thread;
    kiln_emulate_thread = thread->index;
    if (thread->block != machine.active) {
        activate(thread->block);
    }
}

void make_ready(Thread* thread) {
    thread->waits = Waits::Nothing;
    u32 at = machine.ready_first + machine.ready_count++;
    if (at >= machine.ready.size()) {
        at -= (u32)machine.ready.size();
    }
    machine.ready[at] = thread;
    machine.idle_turns = 0;
}

// The next thread to run, or none if all wait or are done.
static Thread* select() {
    if (machine.shuffle) {
        while (machine.random.below(4) == 0 && run_something_asynchronous()) {
        }
    }
    for (;;) {
        if (machine.next_unstarted < machine.thread_count) {
            return machine.threads[machine.next_unstarted++];
        }
        if (machine.ready_count > 0) {
            if (machine.shuffle) {
                std::swap(machine.ready[0], machine.ready[machine.random.below(machine.ready_count)]);
                Thread* chosen = machine.ready[0];
                machine.ready[0] = machine.ready[--machine.ready_count];
                return chosen;
            }
            Thread* first = machine.ready[machine.ready_first];
            if (++machine.ready_first == machine.ready.size()) {
                machine.ready_first = 0;
            }
            --machine.ready_count;
            return first;
        }
        if (!run_something_asynchronous()) {
            return nullptr;
        }
    }
}

// Leaves the current thread, whose continuation stays on its fiber.
static void go_on() {
    Thread* self = machine.current;
    Thread* next = select();
    if (next == self) {
        return;
    }
    if (next == nullptr) {
        fail_deadlock();
    }
    Fiber* from = self->fiber;
    if (next->fiber == nullptr) {
        next->fiber = take_fiber();
    }
    enter(next);
    switch_to(from, next->fiber);
}

void wait_for(Waits what, const void* where) {
    machine.current->waits = what;
    machine.current->where = where;
    go_on();
}

static void complete(Block& block, u32 id);
static bool try_exchange(Thread& by);

// The bookkeeping of a thread that returned: others may have waited for it only.
static void finish(Thread& thread) {
    thread_ends(thread);
    thread.done = true;
    machine.idle_turns = 0;
    --machine.live;
    Block& block = *thread.block;
    Warp& warp = *thread.warp;
    --block.live;
    warp.live &= ~(1u << thread.lane);
    if (block.live == 0) {
        block_ends(block);
    } else {
        const Barrier& barrier = block.barriers[0];
        if (barrier.arrived == block.live && barrier.threads == 0) {
            complete(block, 0);
        }
    }
    for (u32 l = 0; warp.waiting != 0 && l < 32; ++l) {
        if (warp.waiting >> l & 1) {
            Thread& other = *warp.lanes[l];
            if (try_exchange(other)) {
                make_ready(&other);
            }
        }
    }
    if (machine.cluster_arrived > 0 && machine.cluster_arrived == machine.live) {
        cluster_completes();
    }
}

static void fiber_main() {
    for (;;) {
        Thread* thread = machine.current;
        machine.kernel->run(machine.args);
        finish(*thread);
        Fiber* fiber = thread->fiber;
        Thread* next = select();
        if (next == nullptr) {
            if (machine.live > 0) {
                fail_deadlock();
            }
            switch_to(fiber, &host);
            abort();
        }
        thread->fiber = nullptr;
        if (next->fiber == nullptr) {
            next->fiber = fiber;
            enter(next);
        } else {
            free_fibers.push_back(fiber);
            enter(next);
            switch_to(fiber, next->fiber);
            abort();
        }
    }
}

// ---- barriers of a block ----

static void complete(Block& block, u32 id) {
    Barrier& barrier = block.barriers[id];
    if (machine.checked) {
        check_barrier_completes(block, barrier, id == 0 && barrier.threads == 0);
    }
    for (Thread* waiting : barrier.waiting) {
        waiting->result = barrier.predicates;
        make_ready(waiting);
    }
    barrier.waiting.clear();
    barrier.arrived = barrier.predicates = 0;
}

// ---- warps ----

static u64 shuffled(const Thread& t, u32 present) {
    const u32 first = t.lane & ~(t.width - 1), last = first | (t.width - 1);
    u32 source = t.lane;
    switch (t.operation) {
    case KILN_SHUFFLE:
        source = first | (t.argument & (t.width - 1));
        break;
    case KILN_SHUFFLE_UP:
        source = t.argument > t.lane - first ? t.lane : t.lane - t.argument;
        break;
    case KILN_SHUFFLE_DOWN:
        source = t.argument > last - t.lane ? t.lane : t.lane + t.argument;
        break;
    default:
        source = (t.lane ^ t.argument) > last ? t.lane : t.lane ^ t.argument;
    }
    // The value of a lane that takes no part is undefined: a NaN of both widths shows where it is used.
    return present >> source & 1 ? t.warp->lanes[source]->value : 0x7fffdead7fffdeadull;
}

// Completes the operation that `by` waits in if all the lanes of its mask are there, and makes the others ready.
static bool try_exchange(Thread& by) {
    Warp& warp = *by.warp;
    const u32 present = by.mask & warp.live;
    if ((warp.waiting & present) != present) {
        return false;
    }
    for (u32 rest = present; rest != 0; rest &= rest - 1) {
        const Thread& t = *warp.lanes[__builtin_ctz(rest)];
        if (t.mask != by.mask || t.operation != by.operation) {
            return false;
        }
    }
    u64 common = 0;
    if (by.operation == KILN_BALLOT) {
        for (u32 rest = present; rest != 0; rest &= rest - 1) {
            const u32 l = (u32)__builtin_ctz(rest);
            common |= (u64)(warp.lanes[l]->value != 0) << l;
        }
    } else if (by.operation == KILN_ELECT) {
        common = machine.shuffle ? machine.random.below(32) : 0;
        while (!(present >> common & 1)) {
            common = (common + 1) % 32;
        }
    } else if (by.operation >= KILN_LDMATRIX) {
        if (present != 0xffffffff) {
            fail("an operation on matrices needs all 32 lanes of its warp" + line_of(by.where));
        }
        operate_on_matrices(by.operation, warp);
    }
    for (u32 rest = present; rest != 0; rest &= rest - 1) {
        Thread& t = *warp.lanes[__builtin_ctz(rest)];
        switch (t.operation) {
        case KILN_SHUFFLE:
        case KILN_SHUFFLE_UP:
        case KILN_SHUFFLE_DOWN:
        case KILN_SHUFFLE_XOR:
            t.result = shuffled(t, present);
            break;
        case KILN_MATCH:
            t.result = 0;
            for (u32 others = present; others != 0; others &= others - 1) {
                const u32 l = (u32)__builtin_ctz(others);
                t.result |= (u64)(warp.lanes[l]->value == t.value) << l;
            }
            break;
        case KILN_ELECT:
            t.result = t.lane == common;
            break;
        default:
            t.result = common;
        }
    }
    if (machine.checked) {
        check_lanes_meet(warp, present);
    }
    warp.waiting &= ~present;
    for (u32 rest = present; rest != 0; rest &= rest - 1) {
        Thread* t = warp.lanes[__builtin_ctz(rest)];
        if (t != &by) {
            make_ready(t);
        }
    }
    return true;
}

// ---- addresses ----

static u8* shared_arena;
constexpr size_t SHARED_ROOM = 512 << 10;

u32 rank_of(u32 smem) {
    const u32 rank = smem >> 24;
    return rank == 0 ? machine.current->block->rank : rank - 1;
}

u8* resolve(u32 smem, u32 bytes, const char* what) {
    const u32 rank = rank_of(smem), offset = smem & 0xffffff;
    if (rank >= machine.block_count) {
        fail(format("%s names block %u of a cluster of %u", what, rank, machine.block_count));
    }
    Block& block = *machine.blocks[rank];
    if (block.live == 0) {
        fail(format("%s reaches into block %u of the cluster, which has ended", what, rank));
    }
    if (offset >= DYNAMIC_FIRST && offset + bytes <= DYNAMIC_FIRST + machine.shared_bytes) {
        return block.dynamic + (offset - DYNAMIC_FIRST);
    }
    if (offset >= machine.static_first && offset + bytes <= machine.static_first + machine.static_bytes) {
        return (&block == machine.active ? machine.image.statics : block.statics) + (offset - machine.static_first);
    }
    fail(format("%s of %u bytes at 0x%x lies outside of shared memory (%u bytes dynamic, %u static)", what, bytes, offset, machine.shared_bytes,
        machine.static_bytes));
}

// ---- launches ----

constexpr u32 CANARY = 256;

static void reset(std::vector<Thread*>& threads, u32 count) {
    while (threads.size() < count) {
        threads.push_back(new Thread());
    }
}

// The parts of the machine that a cluster of this shape needs.
static void build(const u32* block_dim, u32 blocks) {
    const u32 threads = block_dim[0] * block_dim[1] * block_dim[2], warps = (threads + 31) / 32;
    machine.block_count = blocks;
    machine.thread_count = threads * blocks;
    machine.warp_count = warps * blocks;
    reset(machine.threads, machine.thread_count);
    while (machine.warps.size() < machine.warp_count) {
        machine.warps.push_back(new Warp());
    }
    if (shared_arena == nullptr) {
        shared_arena = (u8*)mmap(nullptr, CLUSTER_LIMIT * SHARED_ROOM, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    }
    while (machine.blocks.size() < blocks) {
        Block* block = new Block();
        block->rank = (u32)machine.blocks.size();
        block->dynamic = shared_arena + block->rank * SHARED_ROOM;
        block->statics = block->dynamic + SHARED_ROOM / 2;
        machine.blocks.push_back(block);
    }
    for (u32 b = 0; b < blocks; ++b) {
        for (u32 i = 0; i < threads; ++i) {
            Thread& t = *machine.threads[b * threads + i];
            t.id = b * threads + i;
            t.index = {i % block_dim[0], i / block_dim[0] % block_dim[1], i / block_dim[0] / block_dim[1]};
            t.lane = i % 32;
            t.block = machine.blocks[b];
            t.warp = machine.warps[b * warps + i / 32];
            t.warp->id = i / 32;
            t.warp->block = t.block;
            t.warp->lanes[t.lane] = &t;
        }
    }
    machine.ready.resize(machine.thread_count + 1);
}

static void start_cluster(Index first) {
    const u32 per_block = machine.thread_count / machine.block_count, warps = machine.warp_count / machine.block_count;
    // What nobody wrote reads as NaN, and what is written past the end shows when the block ends.
    for (u32 b = 0; b < machine.block_count; ++b) {
        Block& block = *machine.blocks[b];
        block.index = {first.x + b, first.y, first.z};
        block.live = per_block;
        memset(block.dynamic, 0xff, machine.shared_bytes);
        memset(block.dynamic + machine.shared_bytes, 0xa5, CANARY);
        if (machine.block_count > 1) {
            memset(block.statics, 0xff, machine.static_bytes);
        }
        for (Barrier& barrier : block.barriers) {
            barrier.arrived = barrier.threads = barrier.predicates = 0;
            barrier.waiting.clear();
        }
        for (u32 w = 0; w < warps; ++w) {
            Warp& warp = *machine.warps[b * warps + w];
            const u32 lanes = std::min(32u, per_block - w * 32);
            warp.live = lanes == 32 ? 0xffffffff : (1u << lanes) - 1;
            warp.waiting = 0;
            warp.wgmma_group = 0;
            warp.wgmmas.clear();
            for (Accumulator* abandoned : warp.accumulators) {
                delete abandoned;
            }
            warp.accumulators.clear();
        }
    }
    memset(machine.image.statics, 0xff, machine.static_bytes);
    for (u32 i = 0; i < machine.thread_count; ++i) {
        Thread& t = *machine.threads[i];
        t.fiber = nullptr;
        t.done = false;
        t.waits = Waits::Nothing;
        t.copy_group = t.bulk_group = 0;
        t.copies.clear();
        t.stores.clear();
    }
    machine.live = machine.thread_count;
    machine.ready_first = machine.ready_count = 0;
    machine.idle_turns = 0;
    machine.active = nullptr;
    machine.loads.clear();
    machine.mbarriers.clear();
    machine.cluster_arrived = machine.cluster_phase = 0;
    machine.cluster_waiting.clear();
    machine.cluster_pending.assign(machine.thread_count, 0);
    machine.next_unstarted = 0;
    if (machine.shuffle) {
        machine.next_unstarted = machine.thread_count;
        for (u32 i = 0; i < machine.thread_count; ++i) {
            machine.ready[i] = machine.threads[i];
        }
        machine.ready_count = machine.thread_count;
    }
}

static void run_cluster() {
    if (machine.checked) {
        check_cluster_starts();
    }
    Thread* thread = select();
    thread->fiber = take_fiber();
    enter(thread);
    switch_to(&host, thread->fiber);
    machine.current = nullptr;
    free_fibers = all_fibers;
    if (machine.checked) {
        check_cluster_ends();
    }
    if (machine.failed) {
        return;
    }
    for (u32 b = 0; b < machine.block_count; ++b) {
        const u8* end = machine.blocks[b]->dynamic + machine.shared_bytes;
        for (u32 i = 0; i < CANARY; ++i) {
            if (end[i] != 0xa5) {
                const Index& at = machine.blocks[b]->index;
                machine.failed = true;
                machine.message = format("kernel %s, block (%u,%u,%u): a write beyond the %u bytes of dynamic shared memory, %u bytes past its end",
                    machine.kernel->name, at.x, at.y, at.z, machine.shared_bytes, i);
                return;
            }
        }
    }
}

// Asked at each launch: a module may be unloaded and another be put in its place.
static Image find_image(const void* code) {
    Image image = {(u8*)code, nullptr, nullptr, 0};
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* out) {
            Image& image = *(Image*)out;
            u8* const base = (u8*)info->dlpi_addr;
            Image here = {nullptr, nullptr, nullptr, 0};
            for (u32 i = 0; i < info->dlpi_phnum; ++i) {
                const auto& part = info->dlpi_phdr[i];
                if (part.p_type != PT_LOAD) {
                    continue;
                }
                u8* const begin = base + part.p_vaddr;
                u8* const end = begin + part.p_memsz;
                here.begin = here.begin == nullptr ? begin : std::min(here.begin, begin);
                here.end = std::max(here.end, end);
                if (part.p_memsz > part.p_filesz) {
                    here.statics = begin + part.p_filesz;
                    here.static_bytes = (u32)(part.p_memsz - part.p_filesz);
                }
            }
            const bool is_it = image.begin >= here.begin && image.begin < here.end;
            if (is_it) {
                image = here;
            }
            return is_it ? 1 : 0;
        },
        &image);
    return image;
}

static std::string refuse(const KilnKernel* kernel, const u32* grid, const u32* block, u32 shared) {
    const u64 threads = (u64)block[0] * block[1] * block[2];
    if (threads == 0 || threads > 1024 || block[2] > 64) {
        return format("a block of %u x %u x %u threads", block[0], block[1], block[2]);
    }
    if (grid[0] == 0 || grid[1] == 0 || grid[2] == 0 || grid[0] > 0x7fffffff || grid[1] > 65535 || grid[2] > 65535) {
        return format("a grid of %u x %u x %u blocks", grid[0], grid[1], grid[2]);
    }
    // The module's static shared memory is that of all its kernels: what one of them takes is for the compiler to limit.
    if (shared > SHARED_LIMIT || machine.image.static_bytes > SHARED_ROOM / 2) {
        return format("%u bytes of dynamic shared memory (and %u bytes static in all kernels of the file)", shared, machine.image.static_bytes);
    }
    if (grid[0] % kernel->blocks_of_cluster != 0 || kernel->blocks_of_cluster > CLUSTER_LIMIT) {
        return format("a grid of %u blocks in clusters of %u", grid[0], kernel->blocks_of_cluster);
    }
    return "";
}

static void launch(const KilnKernel* kernel, const u32* grid, const u32* block, u32 shared, void** args) {
    machine.image = find_image((const void*)kernel->run);
    const std::string refusal = refuse(kernel, grid, block, shared);
    machine.failed = !refusal.empty();
    if (machine.failed) {
        machine.message = format("kernel %s cannot be launched: ", kernel->name) + refusal;
        return;
    }
    const char* seed = getenv("KILN_EMULATE_SHUFFLE");
    machine.shuffle = seed != nullptr && *seed != 0;
    machine.random.state = machine.shuffle ? strtoull(seed, nullptr, 0) : 0;
    machine.kernel = kernel;
    machine.args = args;
    machine.checked = kernel->checked != 0;
    machine.shared_bytes = shared;
    machine.static_bytes = machine.image.static_bytes;
    // Aligned as on the host, so that an address has the same low bits there and here.
    machine.static_first = DYNAMIC_FIRST + (shared + CANARY + 1023) / 1024 * 1024 + (u32)((u64)machine.image.statics % 1024);
    kiln_emulate_block_dim = {block[0], block[1], block[2]};
    kiln_emulate_grid_dim = {grid[0], grid[1], grid[2]};
    build(block, kernel->blocks_of_cluster);
    const u64 row = grid[0] / kernel->blocks_of_cluster, clusters = row * grid[1] * grid[2];
    if (machine.checked) {
        check_launch_starts(clusters);
    }
    // A step that shares no factor with the number of clusters visits each once.
    u64 step = 1, at = 0;
    if (machine.shuffle && clusters > 1) {
        at = machine.random.next() % clusters;
        do {
            step = machine.random.next() % clusters | 1;
        } while (std::__gcd(step, clusters) != 1);
    }
    for (u64 i = 0; i < clusters && !machine.failed; ++i, at = (at + step) % clusters) {
        start_cluster({(u32)(at % row) * kernel->blocks_of_cluster, (u32)(at / row % grid[1]), (u32)(at / row / grid[1])});
        run_cluster();
    }
}

} // namespace emulate

#include "emulate_async.cpp"
#include "emulate_matrix.cpp"
#include "emulate_check.cpp"

// ---- what kernels call ----

using namespace emulate;

extern "C" {

int kiln_emulate_launch(const KilnKernel* kernel, const u32* grid, const u32* block, u32 shared, void** args, char* message, u64 message_len) {
    const std::lock_guard<std::mutex> lock(one_at_a_time);
    launch(kernel, grid, block, shared, args);
    if (machine.failed && message_len > 0) {
        snprintf(message, message_len, "%s", machine.message.c_str());
    }
    return machine.failed ? 1 : 0;
}

u32 kiln_emulate_barrier(u32 id, u32 threads, u32 kind, u32 predicate) {
    Thread& t = *machine.current;
    Block& block = *t.block;
    const void* where = __builtin_return_address(0);
    if (id > 15 || threads % 32 != 0) {
        fail(format("barrier %u of %u threads: there are 16, and warps come whole", id, threads) + line_of(where));
    }
    Barrier& barrier = block.barriers[id];
    if (barrier.arrived > 0 && barrier.threads != threads) {
        fail(format("%s comes to barrier %u with %u threads, others with %u", name_of(&t).c_str(), id, threads, barrier.threads) + line_of(where));
    }
    barrier.threads = threads;
    ++barrier.arrived;
    barrier.predicates += predicate;
    if (machine.checked && threads != 0) {
        check_arrives(t, barrier.knowledge);
    }
    const bool last = barrier.arrived == (threads == 0 ? block.live : threads);
    if (kind == KILN_SYNC) {
        barrier.waiting.push_back(&t);
        t.wait_id = id;
    }
    if (last) {
        complete(block, id);
    }
    if (kind == KILN_SYNC) {
        if (last) {
            // It is among those made ready, and takes its turn with them.
            t.where = where;
            go_on();
        } else {
            wait_for(Waits::Barrier, where);
        }
    }
    return (u32)t.result;
}

u64 kiln_emulate_warp(u32 operation, u32 mask, u64 value, u32 argument, u32 width) {
    Thread& t = *machine.current;
    if (!(mask >> t.lane & 1)) {
        fail(format("%s is not in the mask 0x%x that it gives", name_of(&t).c_str(), mask) + line_of(__builtin_return_address(0)));
    }
    t.operation = operation;
    t.mask = mask;
    t.value = value;
    t.argument = argument;
    t.width = width;
    t.where = __builtin_return_address(0);
    t.warp->waiting |= 1u << t.lane;
    if (!try_exchange(t)) {
        wait_for(Waits::Warp, t.where);
    }
    return t.result;
}

u64 kiln_emulate_atomic(u32 operation, void* p, u32 bytes, u64 operand, u64 expected) {
    if (machine.checked) {
        check_atomic(p, bytes, __builtin_return_address(0));
    }
    if ((u64)p % bytes != 0) {
        fail(format("an atomic operation on %u bytes at the unaligned address %p", bytes, p) + line_of(__builtin_return_address(0)));
    }
    u64 old = bytes == 4 ? *(u32*)p : *(u64*)p;
    // As signed numbers of their width.
    const i64 a = bytes == 4 ? (i32)old : (i64)old, b = bytes == 4 ? (i32)operand : (i64)operand;
    u64 fresh = old;
    switch (operation) {
    case KILN_ADD:
        fresh = old + operand;
        break;
    case KILN_MAX:
        fresh = (u64)std::max(a, b);
        break;
    case KILN_MIN:
        fresh = (u64)std::min(a, b);
        break;
    case KILN_UMAX:
        fresh = std::max(old, operand);
        break;
    case KILN_UMIN:
        fresh = std::min(old, operand);
        break;
    case KILN_AND:
        fresh = old & operand;
        break;
    case KILN_OR:
        fresh = old | operand;
        break;
    case KILN_XOR:
        fresh = old ^ operand;
        break;
    case KILN_EXCHANGE:
        fresh = operand;
        break;
    case KILN_CAS:
        fresh = a == (bytes == 4 ? (i32)expected : (i64)expected) ? operand : old;
        break;
    }
    if (bytes == 4) {
        *(u32*)p = (u32)fresh;
    } else {
        *(u64*)p = fresh;
    }
    return old;
}

void kiln_emulate_fence() {
    if (machine.checked) {
        check_fence(*machine.current);
    }
}

void kiln_emulate_yield() {
    if (++machine.idle_turns > (1u << 20)) {
        fail(name_of(machine.current) + " waits in a loop that nothing will end" + line_of(__builtin_return_address(0)));
    }
    const u32 turns = machine.idle_turns;
    if (machine.ready_count == 0) {
        run_something_asynchronous();
    }
    make_ready(machine.current);
    machine.idle_turns = turns;
    go_on();
}

[[noreturn]] void kiln_emulate_trap() {
    fail("a trap by " + name_of(machine.current) + line_of(__builtin_return_address(0)));
}

u64 kiln_emulate_clock() {
    return (u64)std::chrono::steady_clock::now().time_since_epoch().count();
}

u32 kiln_emulate_shared_address(const void* p) {
    const Block& block = *machine.current->block;
    const u64 dynamic = (u64)p - (u64)block.dynamic, statics = (u64)p - (u64)machine.image.statics;
    if (dynamic <= machine.shared_bytes) {
        return DYNAMIC_FIRST + (u32)dynamic;
    }
    if (statics < machine.static_bytes) {
        return machine.static_first + (u32)statics;
    }
    fail("the shared address of something that is not in shared memory" + line_of(__builtin_return_address(0)));
}

} // extern "C"
