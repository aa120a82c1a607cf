// Matrix products of f16 and bf16 on Hopper's tensor cores (sm_90a): C = epilogue(alpha · A · B), batched.
//
// Macros: those of gemm.cuh, A_MN and B_MN (1 where a factor's m or n is contiguous, 0 where its k is), BLOCK_M, BLOCK_N (a tile of C), STAGES, CLUSTER (1 | 2),
// PARTS (of k; 1, or up to 8 where CLUSTER is 1), PINGPONG (0 | 1), SWAP (1: C is stored transposed, for products of few rows, whose factors the host has exchanged),
// and STORE: STORE_TMA where nothing but alpha follows a sum, C has 16 bits and rows of whole 16 bytes, and neither PARTS nor SWAP; else STORE_STAGED.
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
//  7. Each warp stores its 16 rows on its own through a small permuted buffer, without a barrier.
//  8. Where tiles are too few to fill the GPU, the PARTS blocks of a cluster share one, each with a part of k; the sums meet in shared memory, where each block adds
//     those of its share of the tile in the order of the parts.
#include "kiln.cuh"
#include "gemm.cuh"

#define STORE_STAGED 0
#define STORE_TMA 1
#define CLUSTER_BLOCKS (CLUSTER * PARTS)

constexpr i32 BLOCK_K = 64;
// 64-row blocks of a consumer, and consumers of a stage.
constexpr i32 ROWS = BLOCK_M / (PINGPONG ? 64 : 128);
constexpr i32 SHARERS = PINGPONG ? 1 : 2;
constexpr u32 A_BYTES = BLOCK_M * BLOCK_K * 2;
constexpr u32 B_BYTES = BLOCK_N * BLOCK_K * 2;
constexpr u32 STAGE_BYTES = A_BYTES + B_BYTES;
// A warp's buffer for stores: 16 rows by 64 columns of sums, or two such chunks of C. Parts of k meet where the stages were.
constexpr u32 SUMS_BYTES = 16 * 64 * 4;
constexpr u32 STORE_BYTES = PARTS == 1 ? 8 * SUMS_BYTES : 0;
// Chunks of sums that a tile has side by side.
constexpr i32 CHUNKS = (BLOCK_N + 63) / 64;
// 64 rows or columns by BLOCK_K of k, m or n contiguous; 64 rows, k contiguous.
constexpr u32 CHUNK_64_BYTES = 64 * BLOCK_K * 2;
static_assert(ROWS * SHARERS * 64 == BLOCK_M && BLOCK_N % (8 * CLUSTER) == 0 && (!B_MN || BLOCK_N % (64 * CLUSTER) == 0));
static_assert(STORE != STORE_TMA || (BLOCK_N % 64 == 0 && !SWAP && PARTS == 1));
static_assert(PARTS == 1 || (CLUSTER == 1 && !PINGPONG && STAGES * STAGE_BYTES >= BLOCK_M / 16 * CHUNKS * SUMS_BYTES));

// Extents, and how tiles and batch items are visited.
struct HopperShape {
    i32 m, n, k;
    // Batch items are pairs (outer, inner); a factor that does not move with one of them has step 0 there.
    i32 batch_outer, batch_inner;
    i32 a_outer, a_inner, b_outer, b_inner;
    // Rows of tiles in a group.
    i32 group;
    float alpha;
};

// Where C lies, for stores that are not by TMA.
struct HopperOut {
    OUT* c;
    i64 row_stride;
    i64 batch_stride;
    // Whether rows of C and of the residual are aligned to 16 bytes.
    i64 vectors;
};

struct Tiles {
    i32 cluster_rows, cols, blocks_of_k;
    i64 units;
};

// The work of one step: a tile of C and a range of blocks of k.
struct Unit {
    i32 row, col, outer, inner, first_k, last_k;
};

__device__ __forceinline__ Tiles tiles_of(const HopperShape& shape) {
    Tiles tiles;
    tiles.cluster_rows = (shape.m + BLOCK_M * CLUSTER - 1) / (BLOCK_M * CLUSTER);
    tiles.cols = (shape.n + BLOCK_N - 1) / BLOCK_N;
    tiles.blocks_of_k = (shape.k + BLOCK_K - 1) / BLOCK_K;
    tiles.units = (i64)tiles.cluster_rows * tiles.cols * shape.batch_outer * shape.batch_inner;
    return tiles;
}

__device__ __forceinline__ Unit unit_of(const HopperShape& shape, const Tiles& tiles, i64 index, u32 rank) {
    const i32 a_matrix = tiles.cluster_rows * tiles.cols;
    const i32 item = (i32)(index / a_matrix);
    const i32 tile = (i32)(index - (i64)item * a_matrix);
    const i32 in_group = shape.group * tiles.cols;
    const i32 group = tile / in_group;
    const i32 first = group * shape.group;
    const i32 rows = min(shape.group, tiles.cluster_rows - first);
    const i32 rest = tile - group * in_group;
    const i32 col = rest / rows;
    Unit unit;
    unit.row = ((first + rest - col * rows) * CLUSTER + (CLUSTER > 1 ? (i32)rank : 0)) * BLOCK_M;
    unit.col = (group & 1 ? tiles.cols - 1 - col : col) * BLOCK_N;
    unit.inner = item % shape.batch_inner;
    unit.outer = item / shape.batch_inner;
    unit.first_k = PARTS > 1 ? tiles.blocks_of_k * (i32)rank / PARTS : 0;
    unit.last_k = PARTS > 1 ? tiles.blocks_of_k * ((i32)rank + 1) / PARTS : tiles.blocks_of_k;
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
        const u32 at = buffer + (chunk & 1) * (SUMS_BYTES / 2);
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

// 16 rows by 64 columns of sums: in this block's shared memory, or in parts in those of the cluster's blocks.
struct Sums {
    const float* local;
    u32 at;

    __device__ __forceinline__ Pack<float, 4> four(i32 offset) const {
        if constexpr (PARTS == 1) {
            return *(const Pack<float, 4>*)&local[offset];
        } else {
            Pack<float, 4> sum = {};
#pragma unroll
            for (u32 part = 0; part < PARTS; ++part) {
                float x[4];
                load_cluster4(x, mapa(at, part) + offset * 4);
#pragma unroll
                for (i32 e = 0; e < 4; ++e) {
                    sum.x[e] = part == 0 ? x[e] : sum.x[e] + x[e];
                }
            }
            return sum;
        }
    }

    __device__ __forceinline__ float one(i32 row, i32 col) const {
        const i32 offset = staged(row, col / 4 * 4) + col % 4;
        if constexpr (PARTS == 1) {
            return local[offset];
        } else {
            float sum = load_cluster(mapa(at, 0) + offset * 4);
#pragma unroll
            for (u32 part = 1; part < PARTS; ++part) {
                sum += load_cluster(mapa(at, part) + offset * 4);
            }
            return sum;
        }
    }
};

// Finishes and stores such sums. In rolled loops: what follows a sum can be long.
__device__ __forceinline__ void finish_chunk(const Sums& sums, const HopperShape& shape, const HopperOut& out, const GemmEpilogue& epilogue, i64 batch, i32 row0,
    i32 col0) {
    const i32 lane = threadIdx.x % 32;
    OUT* c = out.c + batch * out.batch_stride;
    if constexpr (SWAP) {
        // Neighbours in C are neighbours in a column of the tile.
#pragma unroll 1
        for (i32 i = lane; i < 16 * min(64, shape.n - col0); i += 32) {
            const i32 row = i % 16, col = i / 16;
            if (row0 + row < shape.m) {
                const float sum = shape.alpha * sums.one(row, col);
                store<OUT>(c + (col0 + col) * out.row_stride + row0 + row, finish(epilogue, sum, batch, col0 + col, row0 + row));
            }
        }
        return;
    }
    const i32 in_chunk = lane % 8 * 8, col = col0 + in_chunk;
    if (out.vectors && col + 8 <= shape.n) {
        constexpr i32 WIDTH = 16 / sizeof(OUT), VECTORS = 8 / WIDTH;
        float bias[8];
#pragma unroll
        for (i32 e = 0; e < 8; ++e) {
            bias[e] = HAS_BIAS ? load<T>(epilogue.bias + col + e) : 0.f;
        }
#pragma unroll 1
        for (i32 i = lane / 8; i < 16 && row0 + i < shape.m; i += 4) {
            // Half of the lanes begin with the second unit, so that all read different banks.
            const i32 second_first = lane / 4 % 2;
            const Pack<float, 4> x = sums.four(staged(i, in_chunk + second_first * 4)), y = sums.four(staged(i, in_chunk + (second_first ^ 1) * 4));
            Pack<OUT, WIDTH> residual[VECTORS], result[VECTORS];
#pragma unroll
            for (i32 v = 0; v < VECTORS; ++v) {
                if constexpr (HAS_RESIDUAL) {
                    residual[v] = *(const Pack<OUT, WIDTH>*)(epilogue.residual + batch * epilogue.residual_batch + (row0 + i) * epilogue.residual_row + col + v * WIDTH);
                }
            }
#pragma unroll
            for (i32 e = 0; e < 8; ++e) {
                float value = shape.alpha * ((e < 4) != (second_first != 0) ? x.x[e % 4] : y.x[e % 4]);
                if constexpr (HAS_BIAS) {
                    value += bias[e];
                }
                value = activation(value);
                if constexpr (HAS_RESIDUAL) {
                    value += widen<OUT>(residual[e / WIDTH].x[e % WIDTH]);
                }
                result[e / WIDTH].x[e % WIDTH] = narrow<OUT>(value);
            }
#pragma unroll
            for (i32 v = 0; v < VECTORS; ++v) {
                *(Pack<OUT, WIDTH>*)(c + (row0 + i) * out.row_stride + col + v * WIDTH) = result[v];
            }
        }
    }
    // Rows that are not aligned, or the last columns.
    const i32 rest = out.vectors ? max(shape.n / 8 * 8 - col0, 0) : 0;
#pragma unroll 1
    for (i32 i = 0; i < 16 && row0 + i < shape.m; ++i) {
        for (i32 at = rest + lane; at < 64 && col0 + at < shape.n; at += 32) {
            const float sum = shape.alpha * sums.one(i, at);
            store<OUT>(c + (row0 + i) * out.row_stride + col0 + at, finish(epilogue, sum, batch, row0 + i, col0 + at));
        }
    }
}

// Puts 64 columns of a warp's 16 rows of sums into a buffer.
__device__ __forceinline__ void stage_chunk(const float (&acc)[BLOCK_N / 2], i32 chunk, float* buffer) {
    const i32 lane = threadIdx.x % 32;
#pragma unroll
    for (i32 j = 0; j < min(8, BLOCK_N / 8 - chunk * 8); ++j) {
#pragma unroll
        for (i32 half = 0; half < 2; ++half) {
            const i32 e = chunk * 32 + j * 4 + half * 2;
            float* at = buffer + staged(lane / 4 + half * 8, j * 8 + (lane & 2) * 2) + (lane & 1) * 2;
            *(Pack<float, 2>*)at = {acc[e], acc[e + 1]};
        }
    }
}

extern "C" __global__ void
#if CLUSTER_BLOCKS > 1
__cluster_dims__(CLUSTER_BLOCKS, 1, 1)
#endif
__launch_bounds__(384, 1)
gemm_hopper(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b, const __grid_constant__ TensorMap map_c, const HopperShape shape,
    const HopperOut out, const GemmEpilogue epilogue) {
    KILN_SHARED(u8, shared);
    const u32 stages = smem_addr(shared);
    const u32 buffers = stages + STAGES * STAGE_BYTES;
    const u32 full = buffers + STORE_BYTES, empty = full + STAGES * 8;
    const u32 warp = warp_id(), lane = lane_id();
    const u32 rank = CLUSTER_BLOCKS > 1 ? cluster_rank() : 0;
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
    const i64 step = gridDim.x / CLUSTER_BLOCKS;
    Ring ring = {0, 0};
    if (warp < 4) {
        setmaxnreg_dec<40>();
        if (warp == 0 && lane == 0) {
            for (i64 index = blockIdx.x / CLUSTER_BLOCKS; index < tiles.units; index += step) {
                const Unit unit = unit_of(shape, tiles, index, rank);
                for (i32 k = unit.first_k; k < unit.last_k; ++k) {
                    mbarrier_wait(empty + ring.stage * 8, ring.parity ^ 1);
                    mbarrier_expect_tx(full + ring.stage * 8, STAGE_BYTES);
                    load_stage(&map_a, &map_b, shape, unit, k * BLOCK_K, stages + ring.stage * STAGE_BYTES, full + ring.stage * 8, CLUSTER > 1 ? rank : 0);
                    ring.advance();
                }
            }
        }
        __syncwarp();
        if constexpr (PARTS > 1) {
            cluster_sync();
        }
    } else {
        setmaxnreg_inc<232>();
        const u32 consumer = warp / 4 - 1;
        const u32 first_block = PINGPONG ? 0 : consumer * ROWS;
        const u32 my_buffer = (warp - 4) * SUMS_BYTES;
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
        i64 index = blockIdx.x / CLUSTER_BLOCKS;
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
            const i32 my_row = first_block * 64 + (warp & 3) * 16;
#pragma unroll
            for (i32 r = 0; r < ROWS; ++r) {
                hold_registers(acc[r]);
            }
            if constexpr (PARTS > 1) {
                // Both consumers have read all stages.
                bar_sync(TURN, 256);
            }
#pragma unroll
            for (i32 r = 0; r < ROWS; ++r) {
                const i32 row = my_row + r * 64;
                if constexpr (STORE == STORE_TMA) {
                    store_by_tma<OUT>(acc[r], &map_c, shape.alpha, (i32)batch, unit.row + row, unit.col, buffers + my_buffer);
                } else {
#pragma unroll
                    for (i32 chunk = 0; chunk < CHUNKS; ++chunk) {
                        if constexpr (PARTS > 1) {
                            stage_chunk(acc[r], chunk, (float*)(shared + (row / 16 * CHUNKS + chunk) * SUMS_BYTES));
                        } else {
                            float* buffer = (float*)(shared + STAGES * STAGE_BYTES + my_buffer);
                            __syncwarp();
                            stage_chunk(acc[r], chunk, buffer);
                            __syncwarp();
                            finish_chunk({buffer, 0}, shape, out, epilogue, batch, unit.row + row, unit.col + chunk * 64);
                        }
                    }
                }
            }
            if constexpr (PARTS > 1) {
                cluster_sync();
#pragma unroll 1
                for (i32 i = rank * 8 + warp - 4; i < BLOCK_M / 16 * CHUNKS; i += PARTS * 8) {
                    finish_chunk({nullptr, stages + i * SUMS_BYTES}, shape, out, epilogue, batch, unit.row + i / CHUNKS * 16, unit.col + i % CHUNKS * 64);
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
    // A block's shared memory must outlive what its neighbours send there and read from there.
    if constexpr (CLUSTER_BLOCKS > 1) {
        cluster_sync();
    }
}
KILN_KERNEL_CLUSTER(gemm_hopper, CLUSTER_BLOCKS)
