// What kernels compiled for the emulator and its runtime (emulate.cpp) agree on. An address in shared memory (`smem`, `bar`) is that of the
// hardware's shared window: its low 24 bits lie in the block; above them is 0, or one more than the rank of another block of the cluster.
#pragma once

struct KilnKernel {
    const char* name;
    void (*run)(void* const* args);
    u32 blocks_of_cluster;
    u32 checked;
};
enum KilnBarrier { KILN_SYNC, KILN_ARRIVE };
enum KilnWarp {
    KILN_SYNCWARP,
    KILN_SHUFFLE,
    KILN_SHUFFLE_UP,
    KILN_SHUFFLE_DOWN,
    KILN_SHUFFLE_XOR,
    KILN_BALLOT,
    KILN_MATCH,
    KILN_ELECT,
    KILN_LDMATRIX,
    KILN_STMATRIX,
    KILN_MMA,
    KILN_WGMMA,
    KILN_WGMMA_FENCE,
    KILN_WGMMA_COMMIT,
    KILN_WGMMA_WAIT,
    KILN_SETMAXNREG
};
enum KilnAtomic { KILN_ADD, KILN_MAX, KILN_MIN, KILN_UMAX, KILN_UMIN, KILN_AND, KILN_OR, KILN_XOR, KILN_EXCHANGE, KILN_CAS, KILN_LOAD };
enum KilnNumber { KILN_F16, KILN_BF16, KILN_TF32 };
// What the lanes of a warp bring to an operation on matrices.
struct KilnMatrix {
    u32 count, trans, number, smem;
    u32* registers;
    float* d;
    const u32* a;
    const u32* b;
    // wgmma: columns, descriptors, whether d is kept, whether m and n are contiguous.
    u32 columns, scale_d, a_mn, b_mn;
    u64 a_descriptor, b_descriptor;
};

extern "C" {
int kiln_emulate_launch(const KilnKernel* kernel, const u32* grid, const u32* block, u32 shared, void** args, char* message, u64 message_len);
// Adds the arrival of this thread at a barrier of `threads` (0: of the whole block); returns how many of those who came had `predicate` set.
u32 kiln_emulate_barrier(u32 id, u32 threads, u32 kind, u32 predicate);
u64 kiln_emulate_warp(u32 operation, u32 mask, u64 value, u32 argument, u32 width);
u64 kiln_emulate_atomic(u32 operation, void* p, u32 bytes, u64 operand, u64 expected);
void kiln_emulate_fence();
void kiln_emulate_yield();
[[noreturn]] void kiln_emulate_trap();
u64 kiln_emulate_clock();
u32 kiln_emulate_shared_address(const void* p);

void kiln_emulate_cp_async(u32 smem, const void* gmem, u32 bytes, u32 valid);
void kiln_emulate_cp_async_commit();
void kiln_emulate_cp_async_wait(u32 left);
void kiln_emulate_mbarrier_init(u32 bar, u32 arrivals);
void kiln_emulate_mbarrier_arrive(u32 bar, i32 rank, u32 bytes);
u32 kiln_emulate_mbarrier_try_wait(u32 bar, u32 parity);
void kiln_emulate_fence_proxy_async();
void kiln_emulate_tma_load(u32 smem, const void* map, u32 bar, u32 rank, const i32* at, u32 blocks);
void kiln_emulate_tma_store(const void* map, u32 smem, u32 rank, const i32* at);
void kiln_emulate_bulk_load(u32 smem, const void* gmem, u32 bytes, u32 bar);
void kiln_emulate_bulk_store(void* gmem, u32 smem, u32 bytes);
void kiln_emulate_bulk_commit();
void kiln_emulate_bulk_wait(u32 left, u32 read_only);
u32 kiln_emulate_cluster_rank();
void kiln_emulate_cluster_arrive();
void kiln_emulate_cluster_wait();
u32 kiln_emulate_mapa(u32 smem, u32 rank);
u32 kiln_emulate_cluster_load(u32 remote);
void kiln_emulate_cluster_store(u32 remote, u32 bits);
}
