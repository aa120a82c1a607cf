// Kernels for the emulator's own tests. Each leaves out one thing that it needs where BUG is the number of that.
#include "kiln.cuh"

#ifndef BUG
#define BUG 0
#endif

// Each block reverses its 256 numbers through shared memory. 1: the barrier. 2: the bounds.
extern "C" __global__ void __launch_bounds__(256) reverse(const float* x, float* y, i64 n) {
    __shared__ float tile[256];
    const i64 i = global_thread();
    tile[threadIdx.x] = i < n || BUG == 2 ? x[i] : 0.0f;
    if (BUG != 1) {
        __syncthreads();
    }
    if (i < n) {
        y[i] = tile[255 - threadIdx.x];
    }
}
KILN_KERNEL(reverse)

// Lanes exchange values through shared memory and directly. 3: the order within the warp.
extern "C" __global__ void lanes(i32* y) {
    KILN_SHARED(i32, tile);
    const u32 t = threadIdx.x, lane = t % 32;
    tile[t] = (i32)t;
    if (BUG != 3) {
        __syncwarp();
    }
    const i32 neighbour = tile[t ^ 1];
    i32 failures = neighbour != (i32)(t ^ 1);
    failures += __shfl_up_sync(0xffffffff, t, 1) != (lane == 0 ? t : t - 1);
    failures += __shfl_down_sync(0xffffffff, (double)t, 2, 8) != (double)(lane % 8 >= 6 ? t : t + 2);
    failures += __shfl_xor_sync(0xffffffff, (i64)t << 40, 16) != (i64)(t ^ 16) << 40;
    failures += __shfl_sync(0xffffffff, t, 3, 16) != t / 16 * 16 + 3;
    failures += __ballot_sync(0xffffffff, lane % 3 == 0) != 0x49249249;
    failures += __match_any_sync(0xffffffff, lane / 8) != 0xffu << lane / 8 * 8;
    failures += __any_sync(0xffffffff, lane == 7) == 0 || __all_sync(0xffffffff, lane == 7) != 0;
    if (lane < 8) {
        failures += __shfl_xor_sync(0xff, t, 4) != (t ^ 4);
    } else {
        failures += __popc(__ballot_sync(0xffffff00, 1)) != 24;
    }
    failures += __syncthreads_count(lane == 0) != (int)blockDim.x / 32;
    failures += __syncthreads_or(t == 33) == 0 || __syncthreads_and(t < 33) != 0;
    y[t] = failures;
}
KILN_KERNEL(lanes)

// Warps 0 and 1 hand each other a value through named barriers. 4: the number of threads at one of them.
extern "C" __global__ void hand_over(i32* y) {
    __shared__ i32 box[32];
    const u32 lane = threadIdx.x % 32;
    for (i32 round = 0; round < 3; ++round) {
        if (threadIdx.x < 32) {
            box[lane] = round * 100 + (i32)lane;
            bar_arrive(1, BUG == 4 ? 96 : 64);
            bar_sync(2, 64);
        } else {
            bar_sync(1, BUG == 4 ? 96 : 64);
            y[round * 32 + lane] = box[31 - lane];
            bar_arrive(2, 64);
        }
    }
}
KILN_KERNEL(hand_over)

// Copies 1024 floats by cp.async and adds what two threads copied. 5: the wait. 6: the barrier after it.
extern "C" __global__ void copy(const float* x, float* y, i32 n) {
    KILN_SHARED(float, tile);
    const i32 i = (i32)threadIdx.x * 4;
    cp_async16(smem_addr(tile + i), x + i, i < n);
    cp_async_commit();
    if (BUG != 5) {
        cp_async_wait<0>();
    }
    if (BUG != 6) {
        __syncthreads();
    }
    for (i32 j = 0; j < 4; ++j) {
        y[i + j] = tile[i + j] + tile[(i + j + 4) % 1024];
    }
}
KILN_KERNEL(copy)

// One warp: d = a·b for a 16 x 16, b 16 x 8 of bf16 (b stored by rows, or by columns where `columns`), and of TF32 for the first 8 of k.
extern "C" __global__ void multiply(const bf16* a, const bf16* b, float* d, float* d_tf32, i32 columns) {
    KILN_SHARED(bf16, tile);
    bf16* const tile_b = tile + 256;
    const u32 lane = threadIdx.x;
    for (u32 i = lane; i < 256; i += 32) {
        tile[i] = a[i];
    }
    for (u32 i = lane; i < 128; i += 32) {
        tile_b[i] = b[i];
    }
    __syncwarp();
    u32 fa[4], fb[2];
    ldmatrix_x4(fa, smem_addr(tile + (lane % 16) * 16 + lane / 16 * 8));
    if (columns) {
        ldmatrix_x2(fb, smem_addr(tile_b + lane % 8 * 16 + lane / 8 % 2 * 8));
    } else {
        ldmatrix_x2_trans(fb, smem_addr(tile_b + lane % 16 * 8));
    }
    float sum[4] = {}, sum_tf32[4] = {};
    mma<bf16>(sum, fa, fb);
    u32 ta[4], tb[2];
    for (u32 i = 0; i < 4; ++i) {
        ta[i] = f32_to_tf32(widen(tile[(lane / 4 + 8 * (i & 1)) * 16 + lane % 4 + 4 * (i >> 1)]));
    }
    for (u32 i = 0; i < 2; ++i) {
        const u32 k = lane % 4 + 4 * i, n = lane / 4;
        tb[i] = f32_to_tf32(widen(columns ? tile_b[n * 16 + k] : tile_b[k * 8 + n]));
    }
    mma_tf32(sum_tf32, ta, tb);
    for (u32 i = 0; i < 4; ++i) {
        const u32 at = (lane / 4 + 8 * (i >> 1)) * 8 + 2 * (lane % 4) + (i & 1);
        d[at] = sum[i];
        d_tf32[at] = sum_tf32[i];
    }
}
KILN_KERNEL(multiply)

// Brings a 64 x 64 box of bf16 in by TMA and stores it, doubled, at another place. 7: the wait for the load. 8: the fence before the store. 9: the wait for it.
extern "C" __global__ void tiles(const __grid_constant__ TensorMap from, const __grid_constant__ TensorMap to, i32 x0, i32 x1) {
    KILN_SHARED(bf16, tile);
    __shared__ u64 bar;
    if (threadIdx.x == 0) {
        mbarrier_init(smem_addr(&bar), 1);
        fence_mbarrier_init();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        mbarrier_expect_tx(smem_addr(&bar), 64 * 64 * 2);
        tma_load_2d(smem_addr(tile), &from, smem_addr(&bar), x0, x1);
    }
    if (BUG != 7) {
        mbarrier_wait(smem_addr(&bar), 0);
    }
    for (u32 i = threadIdx.x; i < 64 * 64; i += blockDim.x) {
        tile[i] = narrow<bf16>(2.0f * widen(tile[i]));
    }
    if (BUG != 8) {
        fence_proxy_async();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        tma_store_2d(&to, smem_addr(tile), x0 + 8, x1 + 3);
        tma_store_commit();
        if (BUG != 9) {
            tma_store_wait<0>();
        }
    }
}
KILN_KERNEL(tiles)

// A warpgroup: d = a·b with a 64 x 64 and b 64 x 32 of bf16, each brought in by TMA. MN_A and MN_B say that m and n are contiguous. 10: the wait for wgmma.
#ifndef MN_A
#define MN_A 0
#endif
#ifndef MN_B
#define MN_B 0
#endif
extern "C" __global__ void __launch_bounds__(128) multiply_group(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, float* d, i32 registers) {
    KILN_SHARED(u8, tiles);
    __shared__ u64 bar;
    const u32 sa = smem_addr(tiles), sb = sa + 8192, t = threadIdx.x;
    if (t == 0) {
        mbarrier_init(smem_addr(&bar), 1);
        fence_mbarrier_init();
    }
    __syncthreads();
    if (t == 0) {
        mbarrier_expect_tx(smem_addr(&bar), 8192 + (MN_B ? 8192 : 4096));
        tma_load_2d(sa, &a, smem_addr(&bar), 0, 0);
        tma_load_2d(sb, &b, smem_addr(&bar), 0, 0);
    }
    mbarrier_wait(smem_addr(&bar), 0);
    float sum[16];
    wgmma_fence();
    for (u32 k = 0; k < 4; ++k) {
        const u64 of_a = wgmma_descriptor(sa + k * (MN_A ? 2048 : 32), 8192, 1024), of_b = wgmma_descriptor(sb + k * (MN_B ? 2048 : 32), 8192, 1024);
        if (registers) {
            u32 fa[4];
            const u32 row = t / 32 * 16 + t % 16;
            const u32 chunk = k * 2 + t % 32 / 16;
            ldmatrix_x4(fa, sa + row * 128 + ((chunk ^ row % 8) << 4));
            wgmma_bf16<32, MN_B>(sum, fa, of_b, k > 0);
        } else {
            wgmma_bf16<32, MN_A, MN_B>(sum, of_a, of_b, k > 0);
        }
    }
    wgmma_commit();
    if (BUG != 10) {
        wgmma_wait<0>();
    }
    hold_registers(sum);
    for (u32 i = 0; i < 16; ++i) {
        const u32 row = t / 32 * 16 + t % 32 / 4 + 8 * (i >> 1 & 1);
        d[row * 32 + i / 4 * 8 + 2 * (t % 4) + (i & 1)] = sum[i];
    }
    wgmma_wait<0>();
}
KILN_KERNEL(multiply_group)

// Two blocks of a cluster: rank 0 loads for both, each doubles what it got, and adds the neighbour's. 11: the wait of the cluster before the neighbour is read.
extern "C" __global__ void __cluster_dims__(2, 1, 1) share(const __grid_constant__ TensorMap from, float* y) {
    KILN_SHARED(float, tile);
    float* const doubled = tile + 32;
    __shared__ u64 full, empty;
    const u32 t = threadIdx.x, rank = cluster_rank();
    if (t == 0) {
        mbarrier_init(smem_addr(&full), 1);
        mbarrier_init(smem_addr(&empty), 64);
        fence_mbarrier_init();
    }
    cluster_sync();
    for (u32 round = 0; round < 3; ++round) {
        if (t == 0) {
            mbarrier_expect_tx(smem_addr(&full), 128);
            if (rank == 0) {
                if (round > 0) {
                    mbarrier_wait(smem_addr(&empty), round - 1 & 1);
                }
                tma_load_2d_multicast(smem_addr(tile), &from, smem_addr(&full), (i32)round * 32, 0, 3);
            }
        }
        mbarrier_wait(smem_addr(&full), round & 1);
        doubled[t] = 2.0f * tile[t] + (float)rank;
        mbarrier_arrive_remote(smem_addr(&empty), 0);
        if (BUG == 11) {
            __syncthreads();
        } else {
            cluster_sync();
        }
        y[(round * 2 + rank) * 32 + t] = load_cluster(mapa(smem_addr(doubled + t), rank ^ 1));
        cluster_sync();
    }
}
KILN_KERNEL_CLUSTER(share, 2)

// The sum of all blocks' parts by the last block to finish. 12: the fence. 13: parts of their own.
extern "C" __global__ void sum_of_blocks(const float* x, float* parts, u32* count, float* y) {
    __shared__ bool last;
    const u32 b = blockIdx.x;
    if (threadIdx.x == 0) {
        parts[BUG == 13 ? 0 : b] = x[b];
        if (BUG != 12) {
            __threadfence();
        }
        last = atomicAdd(count, 1u) == gridDim.x - 1;
    }
    __syncthreads();
    if (last && threadIdx.x == 32) {
        float sum = 0.0f;
        for (u32 i = 0; i < gridDim.x; ++i) {
            sum += parts[i];
        }
        *y = sum;
    }
}
KILN_KERNEL(sum_of_blocks)

// Half types and integers that would show a wrong bit. Threads go through all f16.
extern "C" __global__ void numbers(const float* wide, u16* narrowed, float* halves) {
    const u32 i = (u32)global_thread();
    halves[i] = f16_to_f32((u16)i);
    narrowed[2 * i] = f32_to_f16(wide[i]);
    narrowed[2 * i + 1] = f32_to_bf16(wide[i]);
}
KILN_KERNEL(numbers)

extern "C" __global__ void stop(i32 at) {
    if ((i32)threadIdx.x == at) {
        __trap();
    }
}
KILN_KERNEL(stop)
