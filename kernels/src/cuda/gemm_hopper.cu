// Matrix products of f16 and bf16 on Hopper's tensor cores (sm_90a): C = epilogue(alpha · A · B), batched.
//
// Macros: T (f16 | bf16), OUT (type of C), A_MN and B_MN (1 where a factor's m or n is contiguous, 0 where its k is), BLOCK_M, BLOCK_N (the tile; BLOCK_M is 64
// times CONSUMERS times the 64-row blocks of each), STAGES, CLUSTER, STORE, and those of gemm.cuh.
//
// In essence, for each tile of C:       for k0 in (0..k).step_by(64) { load A[tile rows][k0..] and B[k0..][tile columns]; acc += A·B }  store(acc)
//  1. A block of 3 warpgroups stays on its multiprocessor and takes every gridDim-th tile, so that loads of the next tile overlap the stores of the last one.
//  2. One thread of warpgroup 0 issues the loads (TMA) into a ring of STAGES stages; `full` barriers say that a stage has landed, `empty` ones that it has been
//     consumed. The other warpgroups each multiply their rows of the tile (wgmma) and hold the sums in registers, which the producer gives up (setmaxnreg).
//  3. One group of wgmma stays in flight while the next is issued: a stage is released one step late.
//  4. The two blocks of a cluster take tiles one above the other and need the same columns of B: each loads half of them into both (multicast), which
//     saves a third of the traffic from L2. A stage may be overwritten only when the consumers of both blocks have released it.
//  5. Tiles are visited in groups of a few rows, column by column and back, so that the blocks that run together share rows and columns in L2.
//  6. Each warp stores its 16 rows on its own through a small swizzled buffer and TMA, without a barrier.
// The sums' order depends on k and the splits alone.
#include "kiln.cuh"
#include "gemm.cuh"

#ifndef CONSUMERS
#define CONSUMERS 2
#endif
#define STORE_DIRECT 0
#define STORE_TMA 1
#define STORE_PARTIAL 2

constexpr i32 BLOCK_K = 64;
// 64-row blocks of a consumer.
constexpr i32 ROWS = BLOCK_M / 64 / CONSUMERS;
constexpr u32 A_BYTES = BLOCK_M * BLOCK_K * 2;
constexpr u32 B_BYTES = BLOCK_N * BLOCK_K * 2;
constexpr u32 STAGE_BYTES = A_BYTES + B_BYTES;
// A warp's buffer for stores: two chunks of 16 rows by 64 columns.
constexpr u32 CHUNK_BYTES = 16 * 64 * 2;
constexpr u32 STORE_BYTES = STORE == STORE_TMA ? CONSUMERS * 4 * 2 * CHUNK_BYTES : 0;
// 64 rows or columns by BLOCK_K of k, m or n contiguous.
constexpr u32 MN_CHUNK_BYTES = 64 * BLOCK_K * 2;
static_assert(ROWS * 64 * CONSUMERS == BLOCK_M && BLOCK_N % (64 * CLUSTER) == 0);

// Extents, and how tiles and batch items are visited.
struct HopperShape {
    i32 m, n, k;
    // Batch items are pairs (outer, inner); a factor that does not move with one of them has step 0 there.
    i32 batch_outer, batch_inner;
    i32 a_outer, a_inner, b_outer, b_inner;
    // Parts that k is cut into, each a tile of its own (STORE_PARTIAL).
    i32 splits;
    // Rows of tiles in a group.
    i32 group;
    float alpha;
};

// Where C lies, for stores that are not by TMA; partial sums lie at [split][batch][m][n].
struct HopperOut {
    OUT* c;
    i64 row_stride;
    i64 batch_stride;
    float* partial;
};

// The work of one step of a block: a tile of C and a range of blocks of k.
struct Unit {
    i32 row, col, outer, inner, split, first_k, last_k;
};

struct Tiles {
    i32 cluster_rows, cols, blocks_of_k;
    i64 units;
};

__device__ __forceinline__ Tiles tiles_of(const HopperShape& shape) {
    Tiles tiles;
    tiles.cluster_rows = (shape.m + BLOCK_M * CLUSTER - 1) / (BLOCK_M * CLUSTER);
    tiles.cols = (shape.n + BLOCK_N - 1) / BLOCK_N;
    tiles.blocks_of_k = (shape.k + BLOCK_K - 1) / BLOCK_K;
    tiles.units = (i64)tiles.cluster_rows * tiles.cols * shape.splits * shape.batch_outer * shape.batch_inner;
    return tiles;
}

__device__ __forceinline__ Unit unit_of(const HopperShape& shape, const Tiles& tiles, i64 index, u32 rank) {
    const i32 a_matrix = tiles.cluster_rows * tiles.cols;
    i32 item = (i32)(index / a_matrix);
    const i32 tile = (i32)(index - (i64)item * a_matrix);
    const i32 in_group = shape.group * tiles.cols;
    const i32 group = tile / in_group;
    const i32 first = group * shape.group;
    const i32 rows = min(shape.group, tiles.cluster_rows - first);
    const i32 rest = tile - group * in_group;
    const i32 col = rest / rows;
    Unit unit;
    unit.row = ((first + rest - col * rows) * CLUSTER + (i32)rank) * BLOCK_M;
    unit.col = (group & 1 ? tiles.cols - 1 - col : col) * BLOCK_N;
    unit.split = item % shape.splits;
    item /= shape.splits;
    unit.inner = item % shape.batch_inner;
    unit.outer = item / shape.batch_inner;
    unit.first_k = (i32)((i64)tiles.blocks_of_k * unit.split / shape.splits);
    unit.last_k = (i32)((i64)tiles.blocks_of_k * (unit.split + 1) / shape.splits);
    return unit;
}

// A place in the ring of stages, and the parity of its barriers' phase.
struct Ring {
    u32 stage, parity;
    __device__ __forceinline__ void advance() {
        if (++stage == STAGES) {
            stage = 0;
            parity ^= 1;
        }
    }
};

// Loads the blocks of one stage; with a cluster, this block's share of B goes to both.
__device__ __forceinline__ void load_stage(const TensorMap* map_a, const TensorMap* map_b, const HopperShape& shape, const Unit& unit, i32 k, u32 smem, u32 full,
    u32 rank) {
    const i32 a_inner = unit.inner * shape.a_inner, a_outer = unit.outer * shape.a_outer;
    const i32 b_inner = unit.inner * shape.b_inner, b_outer = unit.outer * shape.b_outer;
    if constexpr (A_MN) {
#pragma unroll
        for (i32 i = 0; i < BLOCK_M / 64; ++i) {
            tma_load_4d(smem + i * MN_CHUNK_BYTES, map_a, full, unit.row + i * 64, k, a_inner, a_outer);
        }
    } else {
        tma_load_4d(smem, map_a, full, k, unit.row, a_inner, a_outer);
    }
    smem += A_BYTES;
    if constexpr (B_MN) {
        constexpr i32 SHARE = BLOCK_N / 64 / CLUSTER;
#pragma unroll
        for (i32 i = 0; i < SHARE; ++i) {
            const i32 chunk = rank * SHARE + i;
            if constexpr (CLUSTER > 1) {
                tma_load_4d_multicast(smem + chunk * MN_CHUNK_BYTES, map_b, full, unit.col + chunk * 64, k, b_inner, b_outer, (u16)((1 << CLUSTER) - 1));
            } else {
                tma_load_4d(smem + chunk * MN_CHUNK_BYTES, map_b, full, unit.col + chunk * 64, k, b_inner, b_outer);
            }
        }
    } else {
        constexpr i32 SHARE = BLOCK_N / CLUSTER;
        const i32 at = rank * SHARE;
        if constexpr (CLUSTER > 1) {
            tma_load_4d_multicast(smem + at * BLOCK_K * 2, map_b, full, k, unit.col + at, b_inner, b_outer, (u16)((1 << CLUSTER) - 1));
        } else {
            tma_load_4d(smem + at * BLOCK_K * 2, map_b, full, k, unit.col + at, b_inner, b_outer);
        }
    }
}

// Multiplies one stage's rows of A (those of the consumer) with all of its B.
__device__ __forceinline__ void multiply_stage(float (&acc)[ROWS][BLOCK_N / 2], u32 smem, u32 consumer, bool fresh) {
    constexpr u32 A_ROWS_BYTES = 64 * BLOCK_K * 2;
    const u64 b = wgmma_descriptor(smem + A_BYTES, B_MN ? MN_CHUNK_BYTES : 16, 1024);
    const u64 a = wgmma_descriptor(smem + consumer * ROWS * A_ROWS_BYTES, A_MN ? MN_CHUNK_BYTES : 16, 1024);
#pragma unroll
    for (i32 k = 0; k < BLOCK_K / 16; ++k) {
#pragma unroll
        for (i32 r = 0; r < ROWS; ++r) {
            // Descriptors count in units of 16 bytes.
            const u64 a_at = a + (r * A_ROWS_BYTES + k * (A_MN ? 2048 : 32)) / 16;
            const u64 b_at = b + k * (B_MN ? 2048 : 32) / 16;
            if constexpr (Same<T, bf16>::value) {
                wgmma_bf16<BLOCK_N, A_MN, B_MN>(acc[r], a_at, b_at, !(fresh && k == 0));
            } else {
                wgmma_f16<BLOCK_N, A_MN, B_MN>(acc[r], a_at, b_at, !(fresh && k == 0));
            }
        }
    }
}

// Finishes a warp's 16 rows of sums and stores them through its buffer, 64 columns at a time.
__device__ __forceinline__ void store_by_tma(const float (&acc)[BLOCK_N / 2], const TensorMap* map_c, const HopperShape& shape, const GemmEpilogue& epilogue,
    const Unit& unit, i32 row, u32 buffer) {
    const u32 lane = lane_id();
    const i64 batch = (i64)unit.outer * shape.batch_inner + unit.inner;
    // Where the lane's row of an 8x8 matrix lies in a chunk, and which of its 16-byte units is first.
    const u32 line = (lane & 15) * 128, first = lane >> 4;
#pragma unroll
    for (i32 chunk = 0; chunk < BLOCK_N / 64; ++chunk) {
        const u32 at = buffer + (chunk & 1) * CHUNK_BYTES;
        if (lane == 0) {
            tma_store_wait_read<1>();
        }
        __syncwarp();
#pragma unroll
        for (i32 part = 0; part < 4; ++part) {
            u32 packed[4];
#pragma unroll
            for (i32 i = 0; i < 4; ++i) {
                float pair[2];
#pragma unroll
                for (i32 e = 0; e < 2; ++e) {
                    const i32 r = row + lane / 4 + (i & 1) * 8;
                    const i32 c = unit.col + chunk * 64 + part * 16 + (i >> 1) * 8 + (lane & 3) * 2 + e;
                    const float sum = shape.alpha * acc[chunk * 32 + part * 8 + i * 2 + e];
                    if constexpr (HAS_BIAS || HAS_RESIDUAL) {
                        pair[e] = r < shape.m && c < shape.n ? finish(epilogue, sum, batch, r, c) : 0.f;
                    } else {
                        pair[e] = activation(sum);
                    }
                }
                packed[i] = pack<OUT>(pair[0], pair[1]);
            }
            stmatrix_x4(at + line + (((part * 2 + first) ^ (lane & 7)) << 4), packed);
        }
        fence_proxy_async();
        __syncwarp();
        if (lane == 0) {
            tma_store_3d(map_c, at, unit.col + chunk * 64, row, (i32)batch);
            tma_store_commit();
        }
    }
}

// Stores a warp's 16 rows of sums from registers: C of any alignment, or the partial sums of a part of k.
__device__ __forceinline__ void store_direct(const float (&acc)[BLOCK_N / 2], const HopperShape& shape, const HopperOut& out, const GemmEpilogue& epilogue,
    const Unit& unit, i32 row) {
    const u32 lane = lane_id();
    const i64 batch = (i64)unit.outer * shape.batch_inner + unit.inner;
    const i64 item = (i64)unit.split * shape.batch_outer * shape.batch_inner + batch;
#pragma unroll
    for (i32 half = 0; half < 2; ++half) {
        const i32 r = row + lane / 4 + half * 8;
#pragma unroll
        for (i32 j = 0; j < BLOCK_N / 8; ++j) {
#pragma unroll
            for (i32 e = 0; e < 2; ++e) {
                const i32 c = unit.col + j * 8 + (lane & 3) * 2 + e;
                if (r < shape.m && c < shape.n) {
                    const float sum = acc[j * 4 + half * 2 + e];
                    if constexpr (STORE == STORE_PARTIAL) {
                        out.partial[(item * shape.m + r) * shape.n + c] = sum;
                    } else {
                        store<OUT>(out.c + batch * out.batch_stride + r * out.row_stride + c, finish(epilogue, shape.alpha * sum, batch, r, c));
                    }
                }
            }
        }
    }
}

extern "C" __global__ void
#if CLUSTER > 1
__cluster_dims__(CLUSTER, 1, 1)
#endif
__launch_bounds__(128 * (CONSUMERS + 1), 1)
gemm_hopper(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b, const __grid_constant__ TensorMap map_c, const HopperShape shape,
    const HopperOut out, const GemmEpilogue epilogue) {
    KILN_SHARED(u8, shared);
    const u32 stages = smem_addr(shared);
    const u32 buffers = stages + STAGES * STAGE_BYTES;
    const u32 full = buffers + STORE_BYTES, empty = full + STAGES * 8;
    const u32 warp = warp_id(), lane = lane_id();
    const u32 rank = CLUSTER > 1 ? cluster_rank() : 0;
    if (threadIdx.x == 0) {
        for (i32 s = 0; s < STAGES; ++s) {
            mbarrier_init(full + s * 8, 1);
            mbarrier_init(empty + s * 8, CONSUMERS * 4 * CLUSTER);
        }
        fence_mbarrier_init();
        tma_prefetch(&map_a);
        tma_prefetch(&map_b);
    }
    if constexpr (CLUSTER > 1) {
        cluster_sync();
    } else {
        __syncthreads();
    }
    const Tiles tiles = tiles_of(shape);
    const i64 step = gridDim.x / CLUSTER;
    Ring ring = {0, 0};
    if (warp < 4) {
        setmaxnreg_dec<40>();
        if (warp == 0 && lane == 0) {
            for (i64 index = blockIdx.x / CLUSTER; index < tiles.units; index += step) {
                const Unit unit = unit_of(shape, tiles, index, rank);
                for (i32 k = unit.first_k; k < unit.last_k; ++k) {
                    mbarrier_wait(empty + ring.stage * 8, ring.parity ^ 1);
                    mbarrier_expect_tx(full + ring.stage * 8, STAGE_BYTES);
                    load_stage(&map_a, &map_b, shape, unit, k * BLOCK_K, stages + ring.stage * STAGE_BYTES, full + ring.stage * 8, rank);
                    ring.advance();
                }
            }
        }
        __syncwarp();
    } else {
        setmaxnreg_inc<232>();
        const u32 consumer = warp / 4 - 1;
        const u32 buffer = buffers + (warp - 4) * 2 * CHUNK_BYTES;
        float acc[ROWS][BLOCK_N / 2];
        // Lane i tells block i of the cluster.
        const auto release = [&](u32 stage) {
            if constexpr (CLUSTER > 1) {
                if (lane < CLUSTER) {
                    mbarrier_arrive_remote(empty + stage * 8, lane);
                }
            } else if (lane == 0) {
                mbarrier_arrive(empty + stage * 8);
            }
        };
        for (i64 index = blockIdx.x / CLUSTER; index < tiles.units; index += step) {
            const Unit unit = unit_of(shape, tiles, index, rank);
            u32 last = 0;
            for (i32 k = unit.first_k; k < unit.last_k; ++k) {
                mbarrier_wait(full + ring.stage * 8, ring.parity);
                wgmma_fence();
                multiply_stage(acc, stages + ring.stage * STAGE_BYTES, consumer, k == unit.first_k);
                wgmma_commit();
                if (k > unit.first_k) {
                    wgmma_wait<1>();
                    release(last);
                }
                last = ring.stage;
                ring.advance();
            }
            wgmma_wait<0>();
            release(last);
#pragma unroll
            for (i32 r = 0; r < ROWS; ++r) {
                hold_registers(acc[r]);
                const i32 row = unit.row + (consumer * ROWS + r) * 64 + (warp & 3) * 16;
                if constexpr (STORE == STORE_TMA) {
                    store_by_tma(acc[r], &map_c, shape, epilogue, unit, row, buffer);
                } else {
                    store_direct(acc[r], shape, out, epilogue, unit, row);
                }
            }
        }
        if constexpr (STORE == STORE_TMA) {
            if (lane == 0) {
                tma_store_wait_read<0>();
            }
            __syncwarp();
        }
    }
    // A block's shared memory must outlive the copies and arrivals that its neighbour sends there.
    if constexpr (CLUSTER > 1) {
        cluster_sync();
    }
}
KILN_KERNEL_CLUSTER(gemm_hopper, CLUSTER)
