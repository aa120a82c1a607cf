// Every line of inline PTX of the project, as small functions. Without a GPU the same functions come from "emulate.cuh", which runs them on the host.
//
// Shared memory is addressed by 32-bit shared-window addresses (`smem_addr`), so that descriptors, barriers and addresses of other blocks of a
// cluster (`mapa`) have one type. A matrix fragment is an array of registers, laid out as the PTX manual's figures say.

struct f16;
struct bf16;

/// A TMA descriptor, filled on the host and passed to a kernel as `const __grid_constant__ TensorMap`.
struct alignas(64) TensorMap {
    u64 words[16];
};

#ifdef KILN_EMULATE
#define KILN_DEVICE inline
#include "emulate.cuh"
#else
#define KILN_DEVICE __device__ __forceinline__

// ---- addresses and lanes ----

KILN_DEVICE u32 smem_addr(const void* p) { return (u32)__cvta_generic_to_shared(p); }
KILN_DEVICE u32 lane_id() {
    u32 lane;
    asm("mov.u32 %0, %%laneid;" : "=r"(lane));
    return lane;
}
/// The warp's index in its block, known to the compiler to be the same in all lanes. The block's y and z extents must be 1.
KILN_DEVICE u32 warp_id() { return __shfl_sync(0xffffffff, threadIdx.x / 32, 0); }
/// True in one lane of a converged warp (sm_90).
KILN_DEVICE bool elect_one() {
    u32 chosen;
    asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.b32 %0, 1, 0, p;\n}" : "=r"(chosen));
    return chosen != 0;
}
/// Nanoseconds of the device's clock.
KILN_DEVICE u64 global_timer() {
    u64 t;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
    return t;
}
KILN_DEVICE void trap() { asm volatile("trap;"); }

// ---- arithmetic ----

KILN_DEVICE float ex2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
KILN_DEVICE float lg2_approx(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
KILN_DEVICE float rcp_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
KILN_DEVICE float f16_to_f32(u16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}
KILN_DEVICE u16 f32_to_f16(float x) {
    u16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}
KILN_DEVICE float bf16_to_f32(u16 x) { return __uint_as_float((u32)x << 16); }
KILN_DEVICE u16 f32_to_bf16(float x) {
#if __CUDA_ARCH__ >= 900
    u16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
#else
    const u32 bits = __float_as_uint(x);
    return x != x ? (u16)0x7fff : (u16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
#endif
}
/// Two f16 in one register, the first in the low half.
KILN_DEVICE u32 pack_f16(float low, float high) {
#if __CUDA_ARCH__ >= 800
    u32 y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
#else
    return (u32)f32_to_f16(low) | (u32)f32_to_f16(high) << 16;
#endif
}
/// Two bf16 in one register, the first in the low half.
KILN_DEVICE u32 pack_bf16(float low, float high) {
#if __CUDA_ARCH__ >= 800
    u32 y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
#else
    return (u32)f32_to_bf16(low) | (u32)f32_to_bf16(high) << 16;
#endif
}
/// `x` rounded to TF32 (10 bits of mantissa, ties away from zero), as the bits of an f32 (sm_80).
KILN_DEVICE u32 f32_to_tf32(float x) {
    u32 y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
    return y;
}

// ---- barriers of a block ----

/// Waits until `threads` threads (a multiple of 32) have come to barrier `id` (1 to 15; 0 is `__syncthreads`).
KILN_DEVICE void bar_sync(u32 id, u32 threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
KILN_DEVICE void bar_arrive(u32 id, u32 threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// ---- asynchronous copies (sm_80) ----

/// Copies 16 bytes, or writes zeros if not `valid`; both addresses are multiples of 16. `gmem` is not read if not `valid`.
KILN_DEVICE void cp_async16(u32 smem, const void* gmem, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem), "l"(__cvta_generic_to_global(gmem)), "r"(valid ? 16 : 0) : "memory");
}
/// Copies the first `bytes` (0 to 16) of 16 bytes and writes zeros over the rest.
KILN_DEVICE void cp_async16_partial(u32 smem, const void* gmem, u32 bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem), "l"(__cvta_generic_to_global(gmem)), "r"(bytes) : "memory");
}
/// Copies 4 bytes, or writes zeros if not `valid`; both addresses are multiples of 4.
KILN_DEVICE void cp_async4(u32 smem, const void* gmem, bool valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(smem), "l"(__cvta_generic_to_global(gmem)), "r"(valid ? 4 : 0) : "memory");
}
KILN_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Waits until at most the `N` latest groups of this thread's copies are still under way.
template <int N>
KILN_DEVICE void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ---- warp matrices ----

/// Loads four 8x8 matrices of 16-bit elements: lane 8i+r gives the address of row r of matrix i.
KILN_DEVICE void ldmatrix_x4(u32 (&d)[4], u32 smem) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(smem) : "memory");
}
KILN_DEVICE void ldmatrix_x4_trans(u32 (&d)[4], u32 smem) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(smem) : "memory");
}
KILN_DEVICE void ldmatrix_x2(u32 (&d)[2], u32 smem) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];" : "=r"(d[0]), "=r"(d[1]) : "r"(smem) : "memory");
}
KILN_DEVICE void ldmatrix_x2_trans(u32 (&d)[2], u32 smem) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];" : "=r"(d[0]), "=r"(d[1]) : "r"(smem) : "memory");
}
/// The inverse of `ldmatrix_x4` (sm_90).
KILN_DEVICE void stmatrix_x4(u32 smem, const u32 (&d)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(smem), "r"(d[0]), "r"(d[1]), "r"(d[2]), "r"(d[3]) : "memory");
}
KILN_DEVICE void stmatrix_x4_trans(u32 smem, const u32 (&d)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(smem), "r"(d[0]), "r"(d[1]), "r"(d[2]), "r"(d[3]) : "memory");
}

/// d += a·b with a 16x16, b 16x8 (sm_80).
KILN_DEVICE void mma_f16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
KILN_DEVICE void mma_bf16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
/// d += a·b with a 16x8, b 8x8 of TF32 (sm_80).
KILN_DEVICE void mma_tf32(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ---- mbarriers (sm_90) ----

KILN_DEVICE void mbarrier_init(u32 bar, u32 arrivals) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(arrivals) : "memory"); }
/// Makes initialised barriers visible to the copy engine and to the other blocks of the cluster.
KILN_DEVICE void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
/// Arrives, and announces `bytes` that copies will bring before the phase can end.
KILN_DEVICE void mbarrier_expect_tx(u32 bar, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
KILN_DEVICE void mbarrier_arrive(u32 bar) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory"); }
/// Arrives at the barrier that lies at `bar` in block `rank` of the cluster.
KILN_DEVICE void mbarrier_arrive_remote(u32 bar, u32 rank) {
    asm volatile("{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\nmbarrier.arrive.shared::cluster.b64 _, [remote];\n}"
        ::"r"(bar), "r"(rank) : "memory");
}
/// True once the phase of this parity has ended; may wait a short while first.
KILN_DEVICE bool mbarrier_try_wait(u32 bar, u32 parity) {
    u32 done;
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.b32 %0, 1, 0, p;\n}" : "=r"(done) : "r"(bar), "r"(parity) : "memory");
    return done != 0;
}
/// Waits until the phase of this parity has ended. With KILN_WAIT_LIMIT (nanoseconds) a wait that lasts longer stops the kernel with an error.
KILN_DEVICE void mbarrier_wait(u32 bar, u32 parity) {
    if (mbarrier_try_wait(bar, parity)) {
        return;
    }
#ifdef KILN_WAIT_LIMIT
    const u64 start = global_timer();
    while (!mbarrier_try_wait(bar, parity)) {
        if (global_timer() - start > KILN_WAIT_LIMIT) {
            trap();
        }
    }
#else
    while (!mbarrier_try_wait(bar, parity)) {
    }
#endif
}
// Orders this thread's plain accesses to shared memory before later ones by the copy engine or the tensor cores.
KILN_DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- tensor memory accelerator (sm_90): coordinates are in elements, the innermost dimension first ----

KILN_DEVICE void tma_prefetch(const TensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }
KILN_DEVICE void tma_load_2d(u32 smem, const TensorMap* map, u32 bar, i32 x0, i32 x1) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3,%4}], [%2];"
        ::"r"(smem), "l"(map), "r"(bar), "r"(x0), "r"(x1) : "memory");
}
KILN_DEVICE void tma_load_3d(u32 smem, const TensorMap* map, u32 bar, i32 x0, i32 x1, i32 x2) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3,%4,%5}], [%2];"
        ::"r"(smem), "l"(map), "r"(bar), "r"(x0), "r"(x1), "r"(x2) : "memory");
}
KILN_DEVICE void tma_load_4d(u32 smem, const TensorMap* map, u32 bar, i32 x0, i32 x1, i32 x2, i32 x3) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3,%4,%5,%6}], [%2];"
        ::"r"(smem), "l"(map), "r"(bar), "r"(x0), "r"(x1), "r"(x2), "r"(x3) : "memory");
}
KILN_DEVICE void tma_load_5d(u32 smem, const TensorMap* map, u32 bar, i32 x0, i32 x1, i32 x2, i32 x3, i32 x4) {
    asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3,%4,%5,%6,%7}], [%2];"
        ::"r"(smem), "l"(map), "r"(bar), "r"(x0), "r"(x1), "r"(x2), "r"(x3), "r"(x4) : "memory");
}
/// The box lands at `smem` in each block of the cluster whose bit is set in `blocks`, and counts at each one's own barrier `bar`.
KILN_DEVICE void tma_load_2d_multicast(u32 smem, const TensorMap* map, u32 bar, i32 x0, i32 x1, u16 blocks) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3,%4}], [%2], %5;"
        ::"r"(smem), "l"(map), "r"(bar), "r"(x0), "r"(x1), "h"(blocks) : "memory");
}
KILN_DEVICE void tma_load_3d_multicast(u32 smem, const TensorMap* map, u32 bar, i32 x0, i32 x1, i32 x2, u16 blocks) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3,%4,%5}], [%2], %6;"
        ::"r"(smem), "l"(map), "r"(bar), "r"(x0), "r"(x1), "r"(x2), "h"(blocks) : "memory");
}
KILN_DEVICE void tma_load_4d_multicast(u32 smem, const TensorMap* map, u32 bar, i32 x0, i32 x1, i32 x2, i32 x3, u16 blocks) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3,%4,%5,%6}], [%2], %7;"
        ::"r"(smem), "l"(map), "r"(bar), "r"(x0), "r"(x1), "r"(x2), "r"(x3), "h"(blocks) : "memory");
}
KILN_DEVICE void tma_store_2d(const TensorMap* map, u32 smem, i32 x0, i32 x1) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2,%3}], [%1];" ::"l"(map), "r"(smem), "r"(x0), "r"(x1) : "memory");
}
KILN_DEVICE void tma_store_3d(const TensorMap* map, u32 smem, i32 x0, i32 x1, i32 x2) {
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2,%3,%4}], [%1];" ::"l"(map), "r"(smem), "r"(x0), "r"(x1), "r"(x2) : "memory");
}
KILN_DEVICE void tma_store_4d(const TensorMap* map, u32 smem, i32 x0, i32 x1, i32 x2, i32 x3) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2,%3,%4,%5}], [%1];"
        ::"l"(map), "r"(smem), "r"(x0), "r"(x1), "r"(x2), "r"(x3) : "memory");
}
KILN_DEVICE void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
/// Waits until all but the `N` latest groups of this thread's stores have read their shared memory (which may then be reused).
template <int N>
KILN_DEVICE void tma_store_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}
/// Waits until all but the `N` latest groups of this thread's stores are complete.
template <int N>
KILN_DEVICE void tma_store_wait() {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
}
/// Copies `bytes` (a multiple of 16, as both addresses) of plain memory.
KILN_DEVICE void bulk_load(u32 smem, const void* gmem, u32 bytes, u32 bar) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
        ::"r"(smem), "l"(__cvta_generic_to_global(gmem)), "r"(bytes), "r"(bar) : "memory");
}
KILN_DEVICE void bulk_store(void* gmem, u32 smem, u32 bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(__cvta_generic_to_global(gmem)), "r"(smem), "r"(bytes) : "memory");
}

// ---- clusters (sm_90) ----

KILN_DEVICE u32 cluster_rank() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
KILN_DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
KILN_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
KILN_DEVICE void cluster_sync() {
    cluster_arrive();
    cluster_wait();
}
/// The cluster-wide address of `smem` in block `rank`.
KILN_DEVICE u32 mapa(u32 smem, u32 rank) {
    u32 remote;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(smem), "r"(rank));
    return remote;
}
KILN_DEVICE float load_cluster(u32 remote) {
    float x;
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(x) : "r"(remote) : "memory");
    return x;
}
/// Four neighbours at a multiple of 16 bytes.
KILN_DEVICE void load_cluster4(float (&x)[4], u32 remote) {
    asm volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3]) : "r"(remote) : "memory");
}
KILN_DEVICE void store_cluster(u32 remote, float x) { asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(remote), "f"(x) : "memory"); }

// ---- warpgroups (sm_90a) ----

template <int N>
KILN_DEVICE void setmaxnreg_inc() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
KILN_DEVICE void setmaxnreg_dec() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
/// Before the first `wgmma`, and whenever registers that it reads or adds to were written otherwise.
KILN_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
KILN_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
/// Waits until at most the `N` latest groups are under way.
template <int N>
KILN_DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
/// Keeps the compiler from moving accesses to `d` across this point.
template <int N>
KILN_DEVICE void hold_registers(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
        asm volatile("" : "+f"(d[i])::"memory");
    }
}
template <int N>
KILN_DEVICE void hold_registers(u32 (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
        asm volatile("" : "+r"(d[i])::"memory");
    }
}

// d[N/2] += A·B for A 64x16 and B 16xN: thread t of the warpgroup holds, for j < N/8, d[4j + {0,1}] = D[16·(t/32) + (t%32)/4][8j + 2(t%4) + {0,1}]
// and d[4j + {2,3}] eight rows below. The lists name the registers; GROUPS is N/8 and the numbers after it are those of the operands behind them.

#define KILN_LIST_1 "%0,%1,%2,%3"
#define KILN_LIST_2 KILN_LIST_1 "," "%4,%5,%6,%7"
#define KILN_LIST_3 KILN_LIST_2 "," "%8,%9,%10,%11"
#define KILN_LIST_4 KILN_LIST_3 "," "%12,%13,%14,%15"
#define KILN_LIST_5 KILN_LIST_4 "," "%16,%17,%18,%19"
#define KILN_LIST_6 KILN_LIST_5 "," "%20,%21,%22,%23"
#define KILN_LIST_7 KILN_LIST_6 "," "%24,%25,%26,%27"
#define KILN_LIST_8 KILN_LIST_7 "," "%28,%29,%30,%31"
#define KILN_LIST_9 KILN_LIST_8 "," "%32,%33,%34,%35"
#define KILN_LIST_10 KILN_LIST_9 "," "%36,%37,%38,%39"
#define KILN_LIST_11 KILN_LIST_10 "," "%40,%41,%42,%43"
#define KILN_LIST_12 KILN_LIST_11 "," "%44,%45,%46,%47"
#define KILN_LIST_13 KILN_LIST_12 "," "%48,%49,%50,%51"
#define KILN_LIST_14 KILN_LIST_13 "," "%52,%53,%54,%55"
#define KILN_LIST_15 KILN_LIST_14 "," "%56,%57,%58,%59"
#define KILN_LIST_16 KILN_LIST_15 "," "%60,%61,%62,%63"
#define KILN_LIST_17 KILN_LIST_16 "," "%64,%65,%66,%67"
#define KILN_LIST_18 KILN_LIST_17 "," "%68,%69,%70,%71"
#define KILN_LIST_19 KILN_LIST_18 "," "%72,%73,%74,%75"
#define KILN_LIST_20 KILN_LIST_19 "," "%76,%77,%78,%79"
#define KILN_LIST_21 KILN_LIST_20 "," "%80,%81,%82,%83"
#define KILN_LIST_22 KILN_LIST_21 "," "%84,%85,%86,%87"
#define KILN_LIST_23 KILN_LIST_22 "," "%88,%89,%90,%91"
#define KILN_LIST_24 KILN_LIST_23 "," "%92,%93,%94,%95"
#define KILN_LIST_25 KILN_LIST_24 "," "%96,%97,%98,%99"
#define KILN_LIST_26 KILN_LIST_25 "," "%100,%101,%102,%103"
#define KILN_LIST_27 KILN_LIST_26 "," "%104,%105,%106,%107"
#define KILN_LIST_28 KILN_LIST_27 "," "%108,%109,%110,%111"
#define KILN_LIST_29 KILN_LIST_28 "," "%112,%113,%114,%115"
#define KILN_LIST_30 KILN_LIST_29 "," "%116,%117,%118,%119"
#define KILN_LIST_31 KILN_LIST_30 "," "%120,%121,%122,%123"
#define KILN_LIST_32 KILN_LIST_31 "," "%124,%125,%126,%127"
#define KILN_REGS_1 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define KILN_REGS_2 KILN_REGS_1, "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define KILN_REGS_3 KILN_REGS_2, "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11])
#define KILN_REGS_4 KILN_REGS_3, "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define KILN_REGS_5 KILN_REGS_4, "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19])
#define KILN_REGS_6 KILN_REGS_5, "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23])
#define KILN_REGS_7 KILN_REGS_6, "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27])
#define KILN_REGS_8 KILN_REGS_7, "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define KILN_REGS_9 KILN_REGS_8, "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35])
#define KILN_REGS_10 KILN_REGS_9, "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39])
#define KILN_REGS_11 KILN_REGS_10, "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43])
#define KILN_REGS_12 KILN_REGS_11, "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
#define KILN_REGS_13 KILN_REGS_12, "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51])
#define KILN_REGS_14 KILN_REGS_13, "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55])
#define KILN_REGS_15 KILN_REGS_14, "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59])
#define KILN_REGS_16 KILN_REGS_15, "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define KILN_REGS_17 KILN_REGS_16, "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67])
#define KILN_REGS_18 KILN_REGS_17, "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71])
#define KILN_REGS_19 KILN_REGS_18, "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75])
#define KILN_REGS_20 KILN_REGS_19, "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79])
#define KILN_REGS_21 KILN_REGS_20, "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83])
#define KILN_REGS_22 KILN_REGS_21, "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87])
#define KILN_REGS_23 KILN_REGS_22, "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91])
#define KILN_REGS_24 KILN_REGS_23, "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])
#define KILN_REGS_25 KILN_REGS_24, "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99])
#define KILN_REGS_26 KILN_REGS_25, "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103])
#define KILN_REGS_27 KILN_REGS_26, "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107])
#define KILN_REGS_28 KILN_REGS_27, "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111])
#define KILN_REGS_29 KILN_REGS_28, "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115])
#define KILN_REGS_30 KILN_REGS_29, "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119])
#define KILN_REGS_31 KILN_REGS_30, "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123])
#define KILN_REGS_32 KILN_REGS_31, "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])
#define KILN_WGMMA_SHAPES(X) \
    X(8, 1, 4, 5, 6, 7, 8, 9, 10) \
    X(16, 2, 8, 9, 10, 11, 12, 13, 14) \
    X(24, 3, 12, 13, 14, 15, 16, 17, 18) \
    X(32, 4, 16, 17, 18, 19, 20, 21, 22) \
    X(40, 5, 20, 21, 22, 23, 24, 25, 26) \
    X(48, 6, 24, 25, 26, 27, 28, 29, 30) \
    X(56, 7, 28, 29, 30, 31, 32, 33, 34) \
    X(64, 8, 32, 33, 34, 35, 36, 37, 38) \
    X(72, 9, 36, 37, 38, 39, 40, 41, 42) \
    X(80, 10, 40, 41, 42, 43, 44, 45, 46) \
    X(88, 11, 44, 45, 46, 47, 48, 49, 50) \
    X(96, 12, 48, 49, 50, 51, 52, 53, 54) \
    X(104, 13, 52, 53, 54, 55, 56, 57, 58) \
    X(112, 14, 56, 57, 58, 59, 60, 61, 62) \
    X(120, 15, 60, 61, 62, 63, 64, 65, 66) \
    X(128, 16, 64, 65, 66, 67, 68, 69, 70) \
    X(144, 18, 72, 73, 74, 75, 76, 77, 78) \
    X(160, 20, 80, 81, 82, 83, 84, 85, 86) \
    X(176, 22, 88, 89, 90, 91, 92, 93, 94) \
    X(192, 24, 96, 97, 98, 99, 100, 101, 102) \
    X(208, 26, 104, 105, 106, 107, 108, 109, 110) \
    X(224, 28, 112, 113, 114, 115, 116, 117, 118) \
    X(240, 30, 120, 121, 122, 123, 124, 125, 126) \
    X(256, 32, 128, 129, 130, 131, 132, 133, 134)

// Both factors in shared memory: operands A and B are the descriptors, C the scale of d, D and E the transposes.
#define KILN_WGMMA_SHARED(TYPE, SHAPE, GROUPS, A, B, C, D, E)                                                                                   \
    if constexpr (N == SHAPE) {                                                                                                                 \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #C ", 0;\nwgmma.mma_async.sync.aligned.m64n" #SHAPE "k16.f32." TYPE                   \
                     " {" KILN_LIST_##GROUPS "}, %" #A ", %" #B ", p, 1, 1, %" #D ", %" #E ";\n}"                                               \
            : KILN_REGS_##GROUPS : "l"(a), "l"(b), "r"(scale_d), "n"(MnA), "n"(MnB));                                                         \
    }
// The left factor in registers: operands A to D; E is the descriptor, F the scale of d, G the transpose.
#define KILN_WGMMA_REGISTERS(TYPE, SHAPE, GROUPS, A, B, C, D, E, F, G)                                                                          \
    if constexpr (N == SHAPE) {                                                                                                                 \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #F ", 0;\nwgmma.mma_async.sync.aligned.m64n" #SHAPE "k16.f32." TYPE                   \
                     " {" KILN_LIST_##GROUPS "}, {%" #A ",%" #B ",%" #C ",%" #D "}, %" #E ", p, 1, 1, %" #G ";\n}"                              \
            : KILN_REGS_##GROUPS : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(scale_d), "n"(MnB));                                \
    }
#define KILN_BF16_SHARED(SHAPE, GROUPS, A, B, C, D, E, F, G) KILN_WGMMA_SHARED("bf16.bf16", SHAPE, GROUPS, A, B, C, D, E)
#define KILN_F16_SHARED(SHAPE, GROUPS, A, B, C, D, E, F, G) KILN_WGMMA_SHARED("f16.f16", SHAPE, GROUPS, A, B, C, D, E)
#define KILN_BF16_REGISTERS(SHAPE, GROUPS, A, B, C, D, E, F, G) KILN_WGMMA_REGISTERS("bf16.bf16", SHAPE, GROUPS, A, B, C, D, E, F, G)
#define KILN_F16_REGISTERS(SHAPE, GROUPS, A, B, C, D, E, F, G) KILN_WGMMA_REGISTERS("f16.f16", SHAPE, GROUPS, A, B, C, D, E, F, G)

/// d = scale_d·d + A·B (scale_d is 0 or 1), both factors in shared memory, named by descriptors. MnA and MnB are 0 where the factor's k is contiguous
/// there, 1 where its m or n is.
template <int N, int MnA, int MnB>
KILN_DEVICE void wgmma_bf16(float (&d)[N / 2], u64 a, u64 b, u32 scale_d) {
    KILN_WGMMA_SHAPES(KILN_BF16_SHARED)
}
template <int N, int MnA, int MnB>
KILN_DEVICE void wgmma_f16(float (&d)[N / 2], u64 a, u64 b, u32 scale_d) {
    KILN_WGMMA_SHAPES(KILN_F16_SHARED)
}
/// The same with A in registers: each warp holds its 16 rows as for `mma_bf16`.
template <int N, int MnB>
KILN_DEVICE void wgmma_bf16(float (&d)[N / 2], const u32 (&a)[4], u64 b, u32 scale_d) {
    KILN_WGMMA_SHAPES(KILN_BF16_REGISTERS)
}
template <int N, int MnB>
KILN_DEVICE void wgmma_f16(float (&d)[N / 2], const u32 (&a)[4], u64 b, u32 scale_d) {
    KILN_WGMMA_SHAPES(KILN_F16_REGISTERS)
}

#endif // KILN_EMULATE

// ---- what both share ----

/// mma of a dtype: d += a·b.
template <class E>
KILN_DEVICE void mma(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]);
template <>
KILN_DEVICE void mma<bf16>(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    mma_bf16(d, a, b);
}
template <>
KILN_DEVICE void mma<f16>(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    mma_f16(d, a, b);
}

/// Two elements in one register, the first in the low half.
template <class E>
KILN_DEVICE u32 pack(float low, float high);
template <>
KILN_DEVICE u32 pack<bf16>(float low, float high) {
    return pack_bf16(low, high);
}
template <>
KILN_DEVICE u32 pack<f16>(float low, float high) {
    return pack_f16(low, high);
}

/// A wgmma descriptor of a matrix at `smem` in 128-byte swizzled atoms of 8 rows of 128 bytes (as TMA writes them; the atoms are aligned to 1024 bytes).
/// k contiguous: an atom is 8 rows by 64 of k, `atom_stride` is the distance of the next 8 rows, `chunk_stride` is not used; 16 further in k lie 32 bytes further.
/// m or n contiguous: an atom is 8 of k by 64 rows, `atom_stride` is the distance of the next 8 of k, `chunk_stride` that of the next 64 rows.
KILN_DEVICE u64 wgmma_descriptor(u32 smem, u32 chunk_stride, u32 atom_stride) {
    return (u64)((smem & 0x3ffff) >> 4) | (u64)(chunk_stride >> 4) << 16 | (u64)(atom_stride >> 4) << 32 | (u64)1 << 62;
}
