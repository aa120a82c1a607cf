// Matrix products of f16 and bf16 on Hopper's tensor cores (sm_90a): C = epilogue(alpha · A · B), batched.
//
// Macros: those of gemm.cuh, A_MN and B_MN (1 where a factor's m or n is contiguous, 0 where its k is), BLOCK_M, BLOCK_N (a tile of C), STAGES, CLUSTER (1 | 2),
// PINGPONG (0 | 1), SWAP (1: C is stored transposed, for products of few rows, whose factors the host has exchanged), and STORE: STORE_TMA where nothing but alpha
// follows a sum and C has 16 bits and rows of whole 16 bytes, STORE_STAGED for all else, STORE_PARTIAL for the sums of parts of k, STORE_SWAPPED.
//
// In essence, for each tile of C:       for k0 in (0..k).step_by(64) { load A[tile rows][k0..] and B[k0..][tile columns]; acc += A·B }  store(acc)
//  1. A block of 3 warpgroups stays on its multiprocessor and takes every gridDim-th tile.
//  2. One thread of warpgroup 0 issues the loads (TMA) into a ring of STAGES stages; `full` barriers say that a stage has landed, `empty` ones that it has been
//     consumed. The other two warpgroups multiply (wgmma) and hold the sums in registers, which the producer gives up (setmaxnreg).
//  3. They share a tile, each with half of its rows; or (PINGPONG) they take tiles in turn, so that one multiplies while the other finishes and stores.
//  4. One group of wgmma stays in flight while the next is issued: a stage is released one step late.
//  5. The two blocks of a cluster take tiles one above the other and need the same columns of B: each loads half of them into both (multicast), which
//     saves a third of the traffic from L2. A stage may be overwritten only when the consumers of both blocks have released it.
//  6. Tiles are visited in groups of a few rows, column by column and back, so that the blocks that run together share rows and columns in L2.
//  7. Each warp stores its 16 rows on its own through a small swizzled buffer and TMA, without a barrier.
// The sums' order depends on k and the splits alone.
#include "kiln.cuh"
#include "gemm.cuh"

#define STORE_STAGED 0
#define STORE_TMA 1
#define STORE_PARTIAL 2
#define STORE_SWAPPED 3

constexpr i32 BLOCK_K = 64;
// 64-row blocks of a consumer, and consumers of a stage.
constexpr i32 ROWS = BLOCK_M / (PINGPONG ? 64 : 128);
constexpr i32 SHARERS = PINGPONG ? 1 : 2;
constexpr u32 A_BYTES = BLOCK_M * BLOCK_K * 2;
constexpr u32 B_BYTES = BLOCK_N * BLOCK_K * 2;
constexpr u32 STAGE_BYTES = A_BYTES + B_BYTES;
// A warp's buffer for stores: two chunks of 16 rows by 64 columns of C, or one of sums.
constexpr u32 CHUNK_BYTES = 16 * 64 * 2, WARP_BYTES = 2 * CHUNK_BYTES;
constexpr u32 STORE_BYTES = STORE == STORE_TMA || STORE == STORE_STAGED ? 8 * WARP_BYTES : 0;
// 64 rows or columns by BLOCK_K of k, m or n contiguous; 64 rows, k contiguous.
constexpr u32 CHUNK_64_BYTES = 64 * BLOCK_K * 2;
static_assert(ROWS * SHARERS * 64 == BLOCK_M && BLOCK_N % (8 * CLUSTER) == 0 && (!B_MN || BLOCK_N % (64 * CLUSTER) == 0));
static_assert((STORE != STORE_TMA || BLOCK_N % 64 == 0) && (STORE == STORE_PARTIAL || SWAP == (STORE == STORE_SWAPPED)));

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
    // Whether rows of C and of the residual are aligned to 16 bytes.
    i64 vectors;
};

struct Tiles {
    i32 cluster_rows, cols, blocks_of_k;
    i64 units;
};

// The work of one step: a tile of C and a range of blocks of k.
struct Unit {
    i32 row, col, outer, inner, split, first_k, last_k;
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
    __device__ __forceinline__ void advance(u32 steps) {
        stage += steps;
        parity ^= stage / STAGES & 1;
        stage %= STAGES;
    }
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
    constexpr u16 ALL = (1 << CLUSTER) - 1;
    if constexpr (A_MN) {
#pragma unroll
        for (i32 i = 0; i < BLOCK_M / 64; ++i) {
            tma_load_4d(smem + i * CHUNK_64_BYTES, map_a, full, unit.row + i * 64, k, a_inner, a_outer);
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
                tma_load_4d_multicast(smem + chunk * CHUNK_64_BYTES, map_b, full, unit.col + chunk * 64, k, b_inner, b_outer, ALL);
            } else {
                tma_load_4d(smem + chunk * CHUNK_64_BYTES, map_b, full, unit.col + chunk * 64, k, b_inner, b_outer);
            }
        }
    } else {
        constexpr i32 SHARE = BLOCK_N / CLUSTER;
        const i32 at = rank * SHARE;
        if constexpr (CLUSTER > 1) {
            tma_load_4d_multicast(smem + at * BLOCK_K * 2, map_b, full, k, unit.col + at, b_inner, b_outer, ALL);
        } else {
            tma_load_4d(smem + at * BLOCK_K * 2, map_b, full, k, unit.col + at, b_inner, b_outer);
        }
    }
}

// Multiplies a consumer's rows of a stage, from 64-row block `first` on, with all of its B.
__device__ __forceinline__ void multiply_stage(float (&acc)[ROWS][BLOCK_N / 2], u32 smem, u32 first, bool fresh) {
    const u64 a = wgmma_descriptor(smem + first * CHUNK_64_BYTES, A_MN ? CHUNK_64_BYTES : 16, 1024);
    const u64 b = wgmma_descriptor(smem + A_BYTES, B_MN ? CHUNK_64_BYTES : 16, 1024);
#pragma unroll
    for (i32 k = 0; k < BLOCK_K / 16; ++k) {
#pragma unroll
        for (i32 r = 0; r < ROWS; ++r) {
            // Descriptors count in units of 16 bytes.
            const u64 a_at = a + (r * CHUNK_64_BYTES + k * (A_MN ? 2048 : 32)) / 16;
            const u64 b_at = b + k * (B_MN ? 2048 : 32) / 16;
            if constexpr (Same<T, bf16>::value) {
                wgmma_bf16<BLOCK_N, A_MN, B_MN>(acc[r], a_at, b_at, !(fresh && k == 0));
            } else {
                wgmma_f16<BLOCK_N, A_MN, B_MN>(acc[r], a_at, b_at, !(fresh && k == 0));
            }
        }
    }
}

// Stores a warp's 16 rows of sums, times alpha and rounded, through its buffer and TMA, 64 columns at a time.
template <class Out> __device__ __forceinline__ void store_by_tma(const float (&acc)[BLOCK_N / 2], const TensorMap* map_c, float alpha, i32 batch, i32 row, i32 col, u32 buffer) {
    const u32 lane = lane_id();
    // Where the lane's row of an 8x8 matrix lies in a chunk, and which of its 16-byte units is first.
    const u32 line = (lane & 15) * 128, first = lane >> 4;
#pragma unroll
    for (i32 chunk = 0; chunk < BLOCK_N / 64; ++chunk) {
        const u32 at = buffer + (chunk & 1) * CHUNK_BYTES;
        if (lane == 0) {
            // The buffer's last store is the one before the latest, or, where a tile has an odd number of chunks, may be that one.
            tma_store_wait_read<BLOCK_N / 64 % 2 == 0 ? 1 : 0>();
        }
        __syncwarp();
#pragma unroll
        for (i32 part = 0; part < 4; ++part) {
            u32 packed[4];
#pragma unroll
            for (i32 i = 0; i < 4; ++i) {
                const i32 e = chunk * 32 + part * 8 + i * 2;
                packed[i] = pack<Out>(alpha * acc[e], alpha * acc[e + 1]);
            }
            stmatrix_x4(at + line + (((part * 2 + first) ^ (lane & 7)) << 4), packed);
        }
        fence_proxy_async();
        __syncwarp();
        if (lane == 0) {
            tma_store_3d(map_c, at, col + chunk * 64, row, batch);
            tma_store_commit();
        }
    }
}

// Where column `col` (a multiple of 4) of a row lies in a buffer of 16 rows by 64 sums: units of 16 bytes are permuted, so that neither the rows of a fragment nor
// the units of a row meet in a bank.
__device__ __forceinline__ i32 staged(i32 row, i32 col) {
    return row * 64 + ((col / 4) ^ ((row & 7) * 2)) * 4;
}

// Finishes and stores 16 rows by 64 columns of sums from a buffer. One rolled loop: what follows a sum can be long.
__device__ __forceinline__ void finish_chunk(const float* buffer, const HopperShape& shape, const HopperOut& out, const GemmEpilogue& epilogue, i64 batch, i32 row0,
    i32 col0, bool vectors) {
    const i32 lane = threadIdx.x % 32;
    OUT* c = out.c + batch * out.batch_stride;
    if (vectors) {
        const i32 in_chunk = lane % 8 * 8, col = col0 + in_chunk;
        if (col + 8 <= shape.n) {
            float bias[8];
#pragma unroll
            for (i32 e = 0; e < 8; ++e) {
                bias[e] = HAS_BIAS ? load<T>(epilogue.bias + col + e) : 0.f;
            }
#pragma unroll 1
            for (i32 i = lane / 8; i < 16; i += 4) {
                if (row0 + i >= shape.m) {
                    break;
                }
                // Half of the lanes begin with the second unit, so that all read different banks.
                const i32 swap = lane / 4 % 2;
                const Pack<float, 4> first = *(const Pack<float, 4>*)&buffer[staged(i, in_chunk + swap * 4)];
                const Pack<float, 4> second = *(const Pack<float, 4>*)&buffer[staged(i, in_chunk + (swap ^ 1) * 4)];
                Pack<OUT, 8 / (sizeof(OUT) / 2)> residual[sizeof(OUT) / 2], result[sizeof(OUT) / 2];
                constexpr i32 WIDTH = 8 / (sizeof(OUT) / 2);
#pragma unroll
                for (i32 h = 0; h < (i32)sizeof(OUT) / 2; ++h) {
                    if constexpr (HAS_RESIDUAL) {
                        const OUT* from = epilogue.residual + batch * epilogue.residual_batch + (row0 + i) * epilogue.residual_row + col + h * WIDTH;
                        residual[h] = *(const Pack<OUT, WIDTH>*)from;
                    }
                }
#pragma unroll
                for (i32 e = 0; e < 8; ++e) {
                    const float sum = (e < 4) != (swap != 0) ? first.x[e % 4] : second.x[e % 4];
                    float x = shape.alpha * sum;
                    if constexpr (HAS_BIAS) {
                        x += bias[e];
                    }
                    x = activation(x);
                    if constexpr (HAS_RESIDUAL) {
                        x += widen<OUT>(residual[e / WIDTH].x[e % WIDTH]);
                    }
                    result[e / WIDTH].x[e % WIDTH] = narrow<OUT>(x);
                }
#pragma unroll
                for (i32 h = 0; h < (i32)sizeof(OUT) / 2; ++h) {
                    *(Pack<OUT, WIDTH>*)(c + (row0 + i) * out.row_stride + col + h * WIDTH) = result[h];
                }
            }
            return;
        }
        // The last columns, one by one.
        for (i32 i = lane / 8; i < 16 && row0 + i < shape.m; i += 4) {
            for (i32 e = 0; e < 8 && col + e < shape.n; ++e) {
                const float sum = buffer[staged(i, in_chunk + e / 4 * 4) + e % 4];
                store<OUT>(c + (row0 + i) * out.row_stride + col + e, finish(epilogue, shape.alpha * sum, batch, row0 + i, col + e));
            }
        }
        return;
    }
#pragma unroll 1
    for (i32 i = 0; i < 16 && row0 + i < shape.m; ++i) {
        for (i32 at = lane; at < 64 && col0 + at < shape.n; at += 32) {
            const float sum = buffer[staged(i, at / 4 * 4) + at % 4];
            store<OUT>(c + (row0 + i) * out.row_stride + col0 + at, finish(epilogue, shape.alpha * sum, batch, row0 + i, col0 + at));
        }
    }
}

// Finishes a warp's 16 rows of sums and stores them through its buffer, 64 columns at a time, by lines.
__device__ __forceinline__ void store_staged(const float (&acc)[BLOCK_N / 2], const HopperShape& shape, const HopperOut& out, const GemmEpilogue& epilogue, i64 batch,
    i32 row, i32 col, float* buffer, bool vectors) {
    const i32 lane = threadIdx.x % 32;
#pragma unroll
    for (i32 chunk = 0; chunk < (BLOCK_N + 63) / 64; ++chunk) {
        __syncwarp();
#pragma unroll
        for (i32 j = 0; j < min(8, BLOCK_N / 8 - chunk * 8); ++j) {
#pragma unroll
            for (i32 half = 0; half < 2; ++half) {
                const i32 e = chunk * 32 + j * 4 + half * 2;
                float* at = buffer + staged(lane / 4 + half * 8, j * 8 + (lane & 2) * 2) + (lane & 1) * 2;
                *(Pack<float, 2>*)at = {acc[e], acc[e + 1]};
            }
        }
        __syncwarp();
        finish_chunk(buffer, shape, out, epilogue, batch, row, col + chunk * 64, vectors);
    }
}

// Stores a warp's 16 rows of sums one by one: those of a part of k as they are, or those of a transposed C.
__device__ __forceinline__ void store_singly(const float (&acc)[BLOCK_N / 2], const HopperShape& shape, const HopperOut& out, const GemmEpilogue& epilogue, i64 batch,
    i32 split, i32 row, i32 col) {
    const u32 lane = lane_id();
    const i64 item = (i64)split * shape.batch_outer * shape.batch_inner + batch;
#pragma unroll
    for (i32 half = 0; half < 2; ++half) {
        const i32 r = row + lane / 4 + half * 8;
#pragma unroll
        for (i32 e = 0; e < BLOCK_N / 4; ++e) {
            const i32 c = col + e / 2 * 8 + (lane & 3) * 2 + e % 2;
            if (r < shape.m && c < shape.n) {
                const float sum = acc[e / 2 * 4 + half * 2 + e % 2];
                const i64 i = SWAP ? c : r, j = SWAP ? r : c;
                if constexpr (STORE == STORE_PARTIAL) {
                    out.partial[(item * (SWAP ? shape.n : shape.m) + i) * (SWAP ? shape.m : shape.n) + j] = sum;
                } else {
                    store<OUT>(out.c + batch * out.batch_stride + i * out.row_stride + j, finish(epilogue, shape.alpha * sum, batch, i, j));
                }
            }
        }
    }
}

extern "C" __global__ void
#if CLUSTER > 1
__cluster_dims__(CLUSTER, 1, 1)
#endif
__launch_bounds__(384, 1)
gemm_hopper(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b, const __grid_constant__ TensorMap map_c, const HopperShape shape,
    const HopperOut out, const GemmEpilogue epilogue) {
    KILN_SHARED(u8, shared);
    const u32 stages = smem_addr(shared);
    const u32 buffers = stages + STAGES * STAGE_BYTES;
    const u32 full = buffers + STORE_BYTES, empty = full + STAGES * 8;
    const u32 warp = warp_id(), lane = lane_id();
    const u32 rank = CLUSTER > 1 ? cluster_rank() : 0;
    if (threadIdx.x == 0) {
        tma_prefetch(&map_a);
        tma_prefetch(&map_b);
        for (i32 s = 0; s < STAGES; ++s) {
            mbarrier_init(full + s * 8, 1);
            mbarrier_init(empty + s * 8, SHARERS * 4 * CLUSTER);
        }
        fence_mbarrier_init();
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
        const u32 first_block = PINGPONG ? 0 : consumer * ROWS;
        const u32 my_buffer = (warp - 4) * WARP_BYTES;
        const bool vectors = out.vectors != 0;
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
        // Consumers multiply in turn: barriers know a phase only from its neighbours, so none may wait for a stage whose content before its own has not come.
        constexpr u32 TURN = 1;
        // Leaves out the stages of a tile that the other consumer takes.
        const auto skip = [&](i64 index) {
            if (index < tiles.units) {
                const Unit unit = unit_of(shape, tiles, index, rank);
                ring.advance(unit.last_k - unit.first_k);
            }
        };
        i64 index = blockIdx.x / CLUSTER;
        if (PINGPONG && consumer == 1) {
            bar_arrive(TURN, 256);
            skip(index);
            index += step;
        }
        while (index < tiles.units) {
            const Unit unit = unit_of(shape, tiles, index, rank);
            if constexpr (PINGPONG) {
                bar_sync(TURN + consumer, 256);
            }
            u32 last = 0;
            for (i32 k = unit.first_k; k < unit.last_k; ++k) {
                mbarrier_wait(full + ring.stage * 8, ring.parity);
                wgmma_fence();
                multiply_stage(acc, stages + ring.stage * STAGE_BYTES, first_block, k == unit.first_k);
                wgmma_commit();
                if (k > unit.first_k) {
                    wgmma_wait<1>();
                    release(last);
                }
                last = ring.stage;
                ring.advance();
            }
            index += step;
            if constexpr (PINGPONG) {
                if (index < tiles.units) {
                    bar_arrive(TURN + (consumer ^ 1), 256);
                }
                skip(index);
                index += step;
            }
            wgmma_wait<0>();
            release(last);
            const i64 batch = (i64)unit.outer * shape.batch_inner + unit.inner;
#pragma unroll
            for (i32 r = 0; r < ROWS; ++r) {
                hold_registers(acc[r]);
                const i32 row = unit.row + (first_block + r) * 64 + (warp & 3) * 16;
                if constexpr (STORE == STORE_TMA) {
                    store_by_tma<OUT>(acc[r], &map_c, shape.alpha, (i32)batch, row, unit.col, buffers + my_buffer);
                } else if constexpr (STORE == STORE_STAGED) {
                    store_staged(acc[r], shape, out, epilogue, batch, row, unit.col, (float*)(shared + STAGES * STAGE_BYTES + my_buffer), vectors);
                } else {
                    store_singly(acc[r], shape, out, epilogue, batch, unit.split, row, unit.col);
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
