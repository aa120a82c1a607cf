// The state of the emulated GPU: one cluster of blocks at a time, all on one thread of the host.
#pragma once

#include <cstddef>
#include <algorithm>
#include <cstring>
#include <string>
#include <unordered_map>
#include <vector>

typedef unsigned char u8;
typedef unsigned short u16;
typedef int i32;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;

#include "emulate_abi.cuh"

namespace emulate {

struct Index {
    u32 x, y, z;
};

// A stack, and where its execution rests.
struct Fiber {
    void* context;
    u8* low;
    u8* high;
};

enum class Waits : u8 { Nothing, Barrier, Warp, Mbarrier, Cluster };

struct Block;
struct Warp;
struct Knowledge;

// A copy by cp.async, or a store by the copy engine: from its issue to the wait for its group.
struct Copy {
    u32 group;
    u32 smem;
    const u8* global;
    u32 bytes, valid;
    const void* where;
};
struct BulkStore {
    u32 group;
    u32 smem;
    u64 global;
    u32 bytes;
    u64 map[16];
    i32 at[5];
    const void* where;
};

struct Thread {
    Index index;
    u32 id;
    u32 lane;
    Block* block;
    Warp* warp;
    Fiber* fiber;
    bool done;
    Waits waits;
    u32 operation, mask, argument, width;
    u64 value, result;
    // The barrier that it waits at: its number or address, and what for.
    u32 wait_id, wait_for;
    const void* where;
    u32 copy_group, bulk_group;
    std::vector<Copy> copies;
    std::vector<BulkStore> stores;
};

struct Barrier {
    u32 threads, arrived, predicates;
    std::vector<Thread*> waiting;
    Knowledge* knowledge;
};

struct Mbarrier {
    u32 expected, pending, phase;
    i64 bytes;
    std::vector<Thread*> waiting;
    // What those know who arrived in this phase, and in the one before.
    Knowledge* knowledge;
    Knowledge* released;
};

struct Block {
    Index index;
    u32 rank;
    u32 live;
    u8* dynamic;
    u8* statics;
    Barrier barriers[16];
};

// The accumulators of a warp that wgmmas under way add to.
struct Accumulator {
    float* d[32];
    u32 columns;
    u32 under_way;
    std::vector<float> values;
};
struct Wgmma {
    KilnMatrix matrix;
    u32 group;
    bool executed;
    Accumulator* accumulator;
    u32 a[32][4];
    const void* where;
};
struct Warp {
    u32 id;
    u32 live;
    u32 waiting;
    Block* block;
    Thread* lanes[32];
    u32 wgmma_group;
    std::vector<Wgmma> wgmmas;
    std::vector<Accumulator*> accumulators;
};

// A load by the copy engine that has not come in yet.
struct Load {
    u64 map[16];
    i32 at[5];
    u64 global;
    u32 smem, bar, bytes, blocks;
    u32 rank;
    Thread* thread;
    const void* where;
};

struct Random {
    u64 state;
    u64 next() {
        u64 x = state += 0x9e3779b97f4a7c15;
        x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
        x = (x ^ x >> 27) * 0x94d049bb133111eb;
        return x ^ x >> 31;
    }
    u32 below(u32 n) { return (u32)((next() >> 32) * n >> 32); }
};

// Where the loader put a module: all of it, and its zero-initialised data, which are its kernels' static shared memory.
struct Image {
    u8* begin;
    u8* end;
    u8* statics;
    u32 static_bytes;
};

struct Machine {
    const KilnKernel* kernel;
    void** args;
    Image image;
    Thread* current;
    Block* active;
    std::vector<Thread*> threads;
    std::vector<Warp*> warps;
    std::vector<Block*> blocks;
    u32 thread_count, warp_count, block_count;
    u32 live;
    u32 next_unstarted;
    // A ring of those that can go on; in shuffled runs a bag.
    std::vector<Thread*> ready;
    u32 ready_first, ready_count;
    u32 idle_turns;
    bool shuffle;
    Random random;
    std::vector<Load> loads;
    std::unordered_map<u64, Mbarrier> mbarriers;
    u32 cluster_arrived, cluster_phase;
    std::vector<Thread*> cluster_waiting;
    std::vector<u8> cluster_pending;
    Knowledge* cluster_knowledge;
    Knowledge* cluster_released;
    u32 shared_bytes, static_bytes, static_first;
    bool checked;
    bool failed;
    std::string message;
};
extern Machine machine;

// Ends the launch with this message. Must be called by a thread of the kernel.
[[noreturn]] void fail(const std::string& message);
std::string format(const char* text, ...) __attribute__((format(printf, 1, 2)));
std::string name_of(const Thread* thread);
// The file and line of an instruction, if the module was compiled with them.
std::string line_of(const void* where);
std::string shared_name(u32 smem);

// Lets another thread run until this one is made ready.
void wait_for(Waits what, const void* where);
void make_ready(Thread* thread);

// Where `bytes` bytes at a shared address are on the host.
u8* resolve(u32 smem, u32 bytes, const char* what);
u32 rank_of(u32 smem);

// Executes what may happen at any time: one step, chosen at random. False if there is nothing.
bool run_something_asynchronous();
void operate_on_matrices(u32 operation, Warp& warp);
void block_ends(Block& block);
void thread_ends(Thread& thread);
void cluster_completes();

constexpr u32 DYNAMIC_FIRST = 1024;
constexpr u32 SHARED_LIMIT = 227 << 10;
constexpr u32 CLUSTER_LIMIT = 16;

} // namespace emulate
