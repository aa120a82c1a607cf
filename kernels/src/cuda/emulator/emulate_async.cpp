// What moves data behind the threads' backs: cp.async, mbarriers, the copy engine (TMA), and the other blocks of a cluster.
//
// A copy comes in as late as can be: cp.async at the wait for its group, a load of the copy engine when no thread can go on, so that a kernel that
// forgets to wait reads NaN. In shuffled runs loads also come in early.

#include "emulate_state.hpp"

#include "emulate_check.hpp"

namespace emulate {

// ---- tensor maps ----

// What lies in the 128 bytes of a TensorMap. Extents and coordinates are in elements, the innermost dimension first; strides in bytes.
struct Map {
    u64 address;
    u64 dims[5];
    u64 strides[4];
    u32 box[5];
    u8 rank, element, swizzle, unused;
    u32 mark;
};
static_assert(sizeof(Map) <= 128, "a tensor map has 128 bytes");
constexpr u32 MAP_MARK = 0x6b694d70;

static const Map& map_at(const void* p, u32 rank, const void* where) {
    const Map& map = *(const Map*)p;
    if ((u64)p % 64 != 0 || map.mark != MAP_MARK) {
        fail("this is no tensor map" + line_of(where));
    }
    if (map.rank != rank) {
        fail(format("%u coordinates for a tensor map of rank %u", rank, map.rank) + line_of(where));
    }
    return map;
}

static u32 box_bytes(const Map& map) {
    u32 bytes = map.element;
    for (u32 d = 0; d < map.rank; ++d) {
        bytes *= map.box[d];
    }
    return bytes;
}

u32 swizzled(u32 smem, u32 swizzle) {
    return swizzle == 0 ? smem : smem ^ (smem >> 7 & (swizzle / 16 - 1)) << 4;
}

// Calls `piece(shared address, global address, bytes inside the tensor, offset of those)` for each 16 bytes of a box; a piece that lies outside has none inside.
template <class F> static void for_pieces(const Map& map, u32 smem, const i32* at, F piece) {
    const u32 row_bytes = map.box[0] * map.element, rows = box_bytes(map) / row_bytes;
    for (u32 row = 0; row < rows; ++row) {
        u64 address = map.address;
        bool inside = true;
        for (u32 d = 1, rest = row; d < map.rank; rest /= map.box[d], ++d) {
            const i64 x = (i64)at[d] + rest % map.box[d];
            inside &= x >= 0 && x < (i64)map.dims[d];
            address += (u64)x * map.strides[d - 1];
        }
        const i64 end = (i64)map.dims[0] * map.element, start = (i64)at[0] * map.element;
        for (u32 i = 0; i < row_bytes; i += 16) {
            const i64 first = start + i, from = std::max<i64>(first, 0), to = std::min<i64>(first + 16, end);
            const u32 bytes = inside && from < to ? (u32)(to - from) : 0;
            piece(swizzled(smem + row * row_bytes + i, map.swizzle), (u8*)(address + (u64)from), bytes, bytes == 0 ? 0 : (u32)(from - first));
        }
    }
}

// ---- mbarriers ----

static Mbarrier& mbarrier_at(u32 rank, u32 bar, const void* where) {
    const auto found = machine.mbarriers.find((u64)rank << 32 | (bar & 0xffffff));
    if (found == machine.mbarriers.end()) {
        fail("there is no initialised mbarrier at " + shared_name(bar) + line_of(where));
    }
    return found->second;
}

static void settle(Mbarrier& bar) {
    if (bar.pending > 0 || bar.bytes != 0) {
        return;
    }
    ++bar.phase;
    bar.pending = bar.expected;
    if (machine.checked) {
        check_phase_ends(bar.knowledge, bar.released);
    }
    for (Thread* waiting : bar.waiting) {
        make_ready(waiting);
    }
    bar.waiting.clear();
}

// ---- loads ----

static void come_in(const Load& load) {
    const u32 offset = load.smem & 0xffffff;
    for (u32 rank = 0; rank < machine.block_count; ++rank) {
        if (!(load.blocks >> rank & 1)) {
            continue;
        }
        const u32 there = (rank + 1) << 24 | offset;
        if (load.rank == 0) {
            memcpy(resolve(there, load.bytes, "a bulk load"), (const void*)load.global, load.bytes);
        } else {
            for_pieces(*(const Map*)load.map, there, load.at, [&](u32 smem, const u8* global, u32 bytes, u32 first) {
                u8* to = resolve(smem, 16, "a TMA load");
                memset(to, 0, 16);
                memcpy(to + first, global, bytes);
            });
        }
        Mbarrier& bar = mbarrier_at(rank, load.bar, load.where);
        if (machine.checked) {
            check_async_write_ends(*load.thread, there, load.bytes, &bar, load.where);
        }
        bar.bytes -= load.bytes;
        settle(bar);
    }
}

bool run_something_asynchronous() {
    if (machine.loads.empty()) {
        return false;
    }
    const u32 chosen = machine.random.below((u32)machine.loads.size());
    const Load load = machine.loads[chosen];
    machine.loads[chosen] = machine.loads.back();
    machine.loads.pop_back();
    come_in(load);
    return true;
}

static void start_load(Load load) {
    if (machine.checked) {
        for (u32 rank = 0; rank < machine.block_count; ++rank) {
            if (load.blocks >> rank & 1) {
                check_async_write_starts(*load.thread, (rank + 1) << 24 | (load.smem & 0xffffff), load.bytes, load.where);
            }
        }
    }
    machine.loads.push_back(load);
}

void block_ends(Block& block) {
    for (const Load& load : machine.loads) {
        if (load.blocks >> block.rank & 1) {
            fail(format("block %u ends before a load into %s has come in", block.rank, shared_name(load.smem).c_str()) + line_of(load.where));
        }
    }
}

// ---- stores ----

static void execute(const BulkStore& store) {
    if (store.bytes != 0) {
        memcpy((void*)store.global, resolve(store.smem, store.bytes, "a bulk store"), store.bytes);
        return;
    }
    for_pieces(*(const Map*)store.map, store.smem, store.at, [&](u32 smem, u8* global, u32 bytes, u32 first) {
        memcpy(global, resolve(smem, 16, "a TMA store") + first, bytes);
    });
}

static void check_store_reads(Thread& thread, const BulkStore& store) {
    check_async_read(thread, store.smem, store.bytes != 0 ? store.bytes : box_bytes(*(const Map*)store.map), store.where);
}

void thread_ends(Thread& thread) {
    if (!thread.stores.empty()) {
        fail(name_of(&thread) + " ends while a bulk store may still read shared memory" + line_of(thread.stores[0].where));
    }
    if (thread.warp->wgmmas.size() > 0) {
        fail(name_of(&thread) + " ends while a wgmma is under way" + line_of(thread.warp->wgmmas[0].where));
    }
    if (machine.cluster_pending[thread.id] == 1) {
        --machine.cluster_arrived;
    }
}

// ---- clusters ----

void cluster_completes() {
    machine.cluster_arrived = 0;
    ++machine.cluster_phase;
    if (machine.checked) {
        check_phase_ends(machine.cluster_knowledge, machine.cluster_released);
    }
    for (u8& pending : machine.cluster_pending) {
        pending = pending == 1 ? 2 : pending;
    }
    for (Thread* waiting : machine.cluster_waiting) {
        make_ready(waiting);
    }
    machine.cluster_waiting.clear();
}

} // namespace emulate

using namespace emulate;

extern "C" {

// Fills a tensor map as cuTensorMapEncodeTiled does; `swizzle` is its width in bytes, or 0. Not 0 if the copy engine would not take it.
int kiln_emulate_tensor_map(void* to, u32 element, u32 rank, u64 address, const u64* dims, const u64* strides, const u32* box, u32 swizzle) {
    Map map = {};
    if (rank < 1 || rank > 5 || address % 16 != 0 || (element != 1 && element != 2 && element != 4 && element != 8)) {
        return 1;
    }
    if (swizzle != 0 && swizzle != 32 && swizzle != 64 && swizzle != 128) {
        return 1;
    }
    for (u32 d = 0; d < rank; ++d) {
        if (dims[d] == 0 || dims[d] > 1ull << 32 || box[d] == 0 || box[d] > 256 || (d > 0 && (strides[d - 1] % 16 != 0 || strides[d - 1] >= 1ull << 40))) {
            return 1;
        }
        map.dims[d] = dims[d];
        map.box[d] = box[d];
        if (d > 0) {
            map.strides[d - 1] = strides[d - 1];
        }
    }
    if (box[0] * element % 16 != 0 || (swizzle != 0 && box[0] * element > swizzle)) {
        return 1;
    }
    map.address = address;
    map.rank = (u8)rank;
    map.element = (u8)element;
    map.swizzle = (u8)swizzle;
    map.mark = MAP_MARK;
    memset(to, 0, 128);
    memcpy(to, &map, sizeof map);
    return 0;
}

void kiln_emulate_cp_async(u32 smem, const void* gmem, u32 bytes, u32 valid) {
    Thread& t = *machine.current;
    const void* where = __builtin_return_address(0);
    if (smem % bytes != 0 || (valid > 0 && (u64)gmem % bytes != 0) || valid > bytes) {
        fail(format("cp.async of %u of %u bytes from %p to %s: the addresses must be aligned", valid, bytes, gmem, shared_name(smem).c_str()) + line_of(where));
    }
    resolve(smem, bytes, "cp.async");
    if (machine.checked) {
        check_global(t, gmem, valid, Access::Read, where);
        check_async_write_starts(t, smem, bytes, where);
    }
    t.copies.push_back({t.copy_group, smem, (const u8*)gmem, bytes, valid, where});
}

void kiln_emulate_cp_async_commit() {
    ++machine.current->copy_group;
}

void kiln_emulate_cp_async_wait(u32 left) {
    Thread& t = *machine.current;
    size_t kept = 0;
    for (const Copy& copy : t.copies) {
        if (copy.group + left >= t.copy_group) {
            t.copies[kept++] = copy;
            continue;
        }
        u8* to = resolve(copy.smem, copy.bytes, "cp.async");
        memset(to, 0, copy.bytes);
        if (copy.valid > 0) {
            memcpy(to, copy.global, copy.valid);
        }
        if (machine.checked) {
            check_async_write_ends(t, copy.smem, copy.bytes, nullptr, copy.where);
        }
    }
    t.copies.resize(kept);
}

void kiln_emulate_mbarrier_init(u32 bar, u32 arrivals) {
    const void* where = __builtin_return_address(0);
    resolve(bar, 8, "an mbarrier");
    if (bar % 8 != 0 || arrivals == 0 || arrivals >= 1 << 20) {
        fail(format("an mbarrier at 0x%x for %u arrivals", bar, arrivals) + line_of(where));
    }
    if (machine.checked) {
        check_shared(*machine.current, bar, 8, Access::Write, where);
    }
    Mbarrier& m = machine.mbarriers[(u64)rank_of(bar) << 32 | (bar & 0xffffff)];
    m.expected = m.pending = arrivals;
    m.phase = 0;
    m.bytes = 0;
}

// `rank` is that of the block whose barrier it is, or -1 for the address as it is.
void kiln_emulate_mbarrier_arrive(u32 bar, i32 rank, u32 bytes) {
    Thread& t = *machine.current;
    const void* where = __builtin_return_address(0);
    const u32 there = rank < 0 ? bar : (u32)(rank + 1) << 24 | (bar & 0xffffff);
    resolve(there, 8, "an arrival at an mbarrier");
    Mbarrier& m = mbarrier_at(rank_of(there), there, where);
    if (machine.checked) {
        check_arrives(t, m.knowledge);
    }
    if (m.pending == 0) {
        fail("more arrivals than the mbarrier at " + shared_name(bar) + " expects" + line_of(where));
    }
    m.bytes += bytes;
    --m.pending;
    settle(m);
}

u32 kiln_emulate_mbarrier_try_wait(u32 bar, u32 parity) {
    Thread& t = *machine.current;
    const void* where = __builtin_return_address(0);
    const u32 rank = t.block->rank;
    Mbarrier* m = &mbarrier_at(rank, bar, where);
    if ((m->phase & 1) == parity) {
        t.wait_id = bar & 0xffffff;
        t.wait_for = parity;
        m->waiting.push_back(&t);
        wait_for(Waits::Mbarrier, where);
    }
    if ((m->phase & 1) == parity) {
        return 0;
    }
    if (machine.checked) {
        check_waited(t, m->released);
    }
    return 1;
}

void kiln_emulate_fence_proxy_async() {
    if (machine.checked) {
        check_fence_proxy(*machine.current);
    }
}

void kiln_emulate_tma_load(u32 smem, const void* at_map, u32 bar, u32 rank, const i32* at, u32 blocks) {
    Thread& t = *machine.current;
    const void* where = __builtin_return_address(0);
    const Map& map = map_at(at_map, rank, where);
    if (smem % 128 != 0) {
        fail(format("a TMA load to 0x%x, which is no multiple of 128", smem) + line_of(where));
    }
    Load load = {};
    memcpy(load.map, &map, sizeof map);
    std::copy(at, at + rank, load.at);
    load.rank = rank;
    load.smem = smem;
    load.bar = bar;
    load.bytes = box_bytes(map);
    load.blocks = blocks != 0 ? blocks : 1u << rank_of(smem);
    load.thread = &t;
    load.where = where;
    resolve(smem, load.bytes, "a TMA load");
    mbarrier_at(rank_of(bar), bar, where);
    if (blocks >> machine.block_count != 0) {
        fail(format("a TMA load for blocks 0x%x of a cluster of %u", blocks, machine.block_count) + line_of(where));
    }
    if (machine.checked) {
        for_pieces(map, smem, at, [&](u32, const u8* global, u32 bytes, u32) { check_global(t, global, bytes, Access::Read, where); });
    }
    start_load(load);
}

void kiln_emulate_bulk_load(u32 smem, const void* gmem, u32 bytes, u32 bar) {
    Thread& t = *machine.current;
    const void* where = __builtin_return_address(0);
    if (smem % 16 != 0 || (u64)gmem % 16 != 0 || bytes % 16 != 0) {
        fail(format("a bulk load of %u bytes from %p to 0x%x: all must be multiples of 16", bytes, gmem, smem) + line_of(where));
    }
    Load load = {};
    load.global = (u64)gmem;
    load.smem = smem;
    load.bar = bar;
    load.bytes = bytes;
    load.blocks = 1u << rank_of(smem);
    load.thread = &t;
    load.where = where;
    resolve(smem, bytes, "a bulk load");
    mbarrier_at(rank_of(bar), bar, where);
    if (machine.checked) {
        check_global(t, gmem, bytes, Access::Read, where);
    }
    start_load(load);
}

void kiln_emulate_tma_store(const void* at_map, u32 smem, u32 rank, const i32* at) {
    Thread& t = *machine.current;
    const void* where = __builtin_return_address(0);
    const Map& map = map_at(at_map, rank, where);
    if (smem % 128 != 0) {
        fail(format("a TMA store from 0x%x, which is no multiple of 128", smem) + line_of(where));
    }
    BulkStore store = {};
    store.group = t.bulk_group;
    store.smem = smem;
    store.where = where;
    memcpy(store.map, &map, sizeof map);
    std::copy(at, at + rank, store.at);
    resolve(smem, box_bytes(map), "a TMA store");
    if (machine.checked) {
        check_store_reads(t, store);
        for_pieces(map, smem, at, [&](u32, u8* global, u32 bytes, u32) { check_global(t, global, bytes, Access::Write, where); });
    }
    t.stores.push_back(store);
}

void kiln_emulate_bulk_store(void* gmem, u32 smem, u32 bytes) {
    Thread& t = *machine.current;
    const void* where = __builtin_return_address(0);
    if (smem % 16 != 0 || (u64)gmem % 16 != 0 || bytes % 16 != 0 || bytes == 0) {
        fail(format("a bulk store of %u bytes from 0x%x to %p: all must be multiples of 16", bytes, smem, gmem) + line_of(where));
    }
    BulkStore store = {};
    store.group = t.bulk_group;
    store.smem = smem;
    store.global = (u64)gmem;
    store.bytes = bytes;
    store.where = where;
    resolve(smem, bytes, "a bulk store");
    if (machine.checked) {
        check_store_reads(t, store);
        check_global(t, gmem, bytes, Access::Write, where);
    }
    t.stores.push_back(store);
}

void kiln_emulate_bulk_commit() {
    ++machine.current->bulk_group;
}

void kiln_emulate_bulk_wait(u32 left, u32) {
    Thread& t = *machine.current;
    size_t kept = 0;
    for (const BulkStore& store : t.stores) {
        if (store.group + left >= t.bulk_group) {
            t.stores[kept++] = store;
            continue;
        }
        if (machine.checked) {
            check_store_reads(t, store);
        }
        execute(store);
    }
    t.stores.resize(kept);
}

u32 kiln_emulate_cluster_rank() {
    return machine.current->block->rank;
}

void kiln_emulate_cluster_arrive() {
    Thread& t = *machine.current;
    if (machine.cluster_pending[t.id] != 0) {
        fail(name_of(&t) + " arrives at the cluster's barrier again without having waited" + line_of(__builtin_return_address(0)));
    }
    if (machine.checked) {
        check_arrives(t, machine.cluster_knowledge);
    }
    machine.cluster_pending[t.id] = 1;
    if (++machine.cluster_arrived == machine.live) {
        cluster_completes();
    }
}

void kiln_emulate_cluster_wait() {
    Thread& t = *machine.current;
    if (machine.cluster_pending[t.id] == 0) {
        fail(name_of(&t) + " waits at the cluster's barrier without having arrived" + line_of(__builtin_return_address(0)));
    }
    if (machine.cluster_pending[t.id] == 1) {
        machine.cluster_waiting.push_back(&t);
        wait_for(Waits::Cluster, __builtin_return_address(0));
    }
    machine.cluster_pending[t.id] = 0;
    if (machine.checked) {
        check_waited(t, machine.cluster_released);
    }
}

u32 kiln_emulate_mapa(u32 smem, u32 rank) {
    if (rank >= machine.block_count) {
        fail(format("mapa names block %u of a cluster of %u", rank, machine.block_count) + line_of(__builtin_return_address(0)));
    }
    return (rank + 1) << 24 | (smem & 0xffffff);
}

u32 kiln_emulate_cluster_load(u32 remote) {
    const u8* from = resolve(remote, 4, "a load from the cluster");
    if (machine.checked) {
        check_shared(*machine.current, remote, 4, Access::Read, __builtin_return_address(0));
    }
    u32 bits;
    memcpy(&bits, from, 4);
    return bits;
}

void kiln_emulate_cluster_store(u32 remote, u32 bits) {
    u8* to = resolve(remote, 4, "a store to the cluster");
    if (machine.checked) {
        check_shared(*machine.current, remote, 4, Access::Write, __builtin_return_address(0));
    }
    memcpy(to, &bits, 4);
}

} // extern "C"
