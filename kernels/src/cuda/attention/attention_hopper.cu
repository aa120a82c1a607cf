// Attention in f16 and bf16 on Hopper (sm_90a), FlashAttention-3's way: one warp brings tiles by TMA, warpgroups of 64 rows each multiply by wgmma.
//
// Forward. While a warpgroup turns the scores of a step into weights, the product of the last step's weights and values is under way; and where
// PINGPONG is set, warpgroups take turns in starting their products, so that the others' exponentials run under them. Blocks stay, and each takes the next
// tile of ROWS queries when it is done with one. Which block has which tile changes nothing in the tile's bits.
//
// Backward. dK and dV belong to a block of keys, dQ to a block of queries, in two kernels: scores are computed twice (seven products in place of five),
// but each result has one writer and no two blocks wait for each other.
//
// Defines: T (f16 or bf16); HEAD, 64, 128 or 256 (backward: 64 or 128) and at least the width of keys and of values; CAUSAL, 0 or 1; STAGES of a ring.
// BACKWARD 0: ROWS, the queries of a tile, STEP, the keys of a step, and PINGPONG, 0 or 1.
// BACKWARD 1: KEY_ROWS and KEY_STEP, the keys of a block and the queries of a step for dK and dV; QUERY_ROWS and QUERY_STEP, the same turned round for dQ.
// Shared memory: all tiles, for dK and dV two rings of a float a query, and 8 bytes each for at most 2 + 4·STAGES barriers, and 16 for the tile's `Work`.
// Every matrix comes as a map of dimensions (width, rows, heads, batch); widths are multiples of 8; the scale is positive.

#include "kiln.cuh"
#include "attention.cuh"

constexpr int PANELS = HEAD / 64; // of 64 columns, 128 bytes a row
// What the registers of a multiprocessor give each thread of a warpgroup that copies, and of one that multiplies.
__device__ constexpr int copier_registers(int warpgroups) { return warpgroups == 1 ? 56 : warpgroups == 2 ? 24 : 32; }
__device__ constexpr int worker_registers(int warpgroups) { return warpgroups == 3 ? 160 : 240; }

// ---- products: a tile of R rows lies in panels, R·128 bytes each ----

template <int N, int A_MN, int B_MN>
__device__ __forceinline__ void wgmma(float (&d)[N / 2], u64 a, u64 b, u32 scale_d) {
    if constexpr (Same<T, bf16>::value) {
        wgmma_bf16<N, A_MN, B_MN>(d, a, b, scale_d);
    } else {
        wgmma_f16<N, A_MN, B_MN>(d, a, b, scale_d);
    }
}
template <int N, int B_MN>
__device__ __forceinline__ void wgmma(float (&d)[N / 2], const u32 (&a)[4], u64 b, u32 scale_d) {
    if constexpr (Same<T, bf16>::value) {
        wgmma_bf16<N, B_MN>(d, a, b, scale_d);
    } else {
        wgmma_f16<N, B_MN>(d, a, b, scale_d);
    }
}

/// tile = 64 rows from `left` on (of a tile of LEFT rows) times the N rows of `right`, over HEAD columns.
template <int LEFT, int N>
__device__ __forceinline__ void multiply_rows(float (&tile)[N / 2], u32 left, u32 right) {
    const u64 a = wgmma_descriptor(left, 0, 1024), b = wgmma_descriptor(right, 0, 1024);
#pragma unroll
    for (int k = 0; k < HEAD / 16; ++k) {
        wgmma<N, 0, 0>(tile, a + (k / 4 * LEFT * 128 + k % 4 * 32) / 16, b + (k / 4 * N * 128 + k % 4 * 32) / 16, k != 0);
    }
}

/// sums += weights · the K rows of `right`.
template <int K>
__device__ __forceinline__ void add_weighted(float (&sums)[HEAD / 2], const u32 (&weights)[K / 16][4], u32 right) {
    const u64 b = wgmma_descriptor(right, K * 128, 1024);
#pragma unroll
    for (int k = 0; k < K / 16; ++k) {
        wgmma<HEAD, 1>(sums, weights[k], b + k * (16 * 128 / 16), 1);
    }
}

/// A tile of sums as the left factor of the next product.
template <int N>
__device__ __forceinline__ void pack_left(u32 (&packed)[N / 16][4], const float (&tile)[N / 2]) {
#pragma unroll
    for (int k = 0; k < N / 16; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            packed[k][i] = pack<T>(tile[8 * k + 2 * i], tile[8 * k + 2 * i + 1]);
        }
    }
}

template <int N>
__device__ __forceinline__ void clear(float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
        x[i] = 0;
    }
}

// ---- stages ----

/// Which stage of a ring comes next, and the parity of its present use.
template <int COUNT>
struct Ring {
    u32 stage = 0, parity = 0;

    __device__ __forceinline__ void advance() {
        if (++stage == COUNT) {
            stage = 0;
            parity ^= 1;
        }
    }
};

/// Brings COUNT rows from `row` on of a head to a tile.
template <int COUNT>
__device__ __forceinline__ void load_tile(u32 tile, const TensorMap* map, u32 bar, i64 row, i64 head, i32 inner) {
    const i32 batch = (i32)head / inner;
#pragma unroll
    for (int panel = 0; panel < PANELS; ++panel) {
        tma_load_4d(tile + panel * COUNT * 128, map, bar, panel * 64, (i32)row, (i32)head - batch * inner, batch);
    }
}

/// Waits anew for a phase that is known to have ended. The compiler would move arithmetic behind the end of the products that it is to run under; what
/// was held before a loop stays before it.
__device__ __forceinline__ void stay_before(u32 bar, u32 parity) { mbarrier_wait(bar, parity); }

__device__ __forceinline__ void arrive_warp(u32 bar) {
    if (threadIdx.x % 32 == 0) {
        mbarrier_arrive(bar);
    }
}

// ---- results ----

/// Lane t of four gets what the four hold at index t, in the order of the lanes.
__device__ __forceinline__ void transpose_four(u32 (&x)[4]) {
    const int lane = threadIdx.x % 4;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        const u32 other = __shfl_xor_sync(0xffffffffu, lane & 2 ? x[j] : x[j + 2], 2);
        (lane & 2 ? x[j] : x[j + 2]) = other;
    }
#pragma unroll
    for (int j = 0; j < 4; j += 2) {
        const u32 other = __shfl_xor_sync(0xffffffffu, lane & 1 ? x[j] : x[j + 1], 1);
        (lane & 1 ? x[j] : x[j + 1]) = other;
    }
}

struct alignas(16) Quad {
    u32 x[4];
};

/// Writes a warpgroup's 64 rows from `first` on of matrix `i` of row-major ones without gaps. `low` and `high` are the factors of a thread's two rows.
__device__ __forceinline__ void put_rows(T* to, i64 i, i64 rows, i64 width, i64 first, const float (&sums)[HEAD / 2], float low, float high) {
    const i64 row = first + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
    const int lane = threadIdx.x % 4;
    T* const at = to + (i * rows + row) * width + 8 * lane;
#pragma unroll
    for (int n = 0; n < HEAD / 8; n += 4) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            Quad packed;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float factor = h == 0 ? low : high;
                packed.x[j] = pack<T>(sums[4 * (n + j) + 2 * h] * factor, sums[4 * (n + j) + 2 * h + 1] * factor);
            }
            transpose_four(packed.x);
            if (row + 8 * h < rows && 8 * (n + lane) < width) {
                *(Quad*)(at + 8 * h * width + 8 * n) = packed;
            }
        }
    }
}

__device__ __forceinline__ float row_largest(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ __forceinline__ float row_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

#if !BACKWARD

// ---- forward ----

constexpr float LN_2 = 0.6931471805599453f;

/// A tile of queries, and how many steps of keys it takes; none at the end.
struct Work {
    i32 head, first, steps;

    Work() = default;
    /// Piece `i` of the order: sections of `section` heads, whose keys and values fit the second-level cache together; in each, the last queries first.
    __device__ __forceinline__ Work(const Extents& x, u32 i, u32 section) {
        const u32 all = (u32)x.heads, blocks = ((u32)x.queries + ROWS - 1) / ROWS, begin = i / (section * blocks) * section;
        const u32 heads = begin + section < all ? section : all - begin, rank = i - begin * blocks;
        head = (i32)(begin + rank % heads);
        first = (i32)(blocks - 1 - rank / heads) * ROWS;
        const i64 end = CAUSAL && first + ROWS < x.keys ? first + ROWS : x.keys;
        steps = (i32)((end + STEP - 1) / STEP);
    }
};

/// A thread's two rows of the online softmax.
struct Softmax {
    float largest[2], total[2], scale;

    /// Turns products into weights relative to the largest so far; `factor` takes earlier sums to the same scale. `open` is how many columns of the
    /// tile, less this lane's first, each row looks at.
    template <bool MASKED>
    __device__ __forceinline__ void weigh(float (&tile)[STEP / 2], float (&factor)[2], const i32 (&open)[2]) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            // Two chains each for the largest and the sum, so that one does not wait for its own last link.
            float most_of[2] = {largest[h], -infinity()};
#pragma unroll
            for (int n = 0; n < STEP / 8; ++n) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    float& s = tile[4 * n + 2 * h + e];
                    if (MASKED && 8 * n + e >= open[h]) {
                        s = -infinity();
                    }
                    most_of[e] = fmaxf(most_of[e], s);
                }
            }
            const float most = row_largest(fmaxf(most_of[0], most_of[1]));
            // Where every score so far is shut, exponentials are taken relative to zero: they are zero, or NaN for a NaN.
            const float shift = most == -infinity() ? 0.0f : most * scale;
            factor[h] = ex2_approx(largest[h] * scale - shift);
            largest[h] = most;
            float sum[2] = {0, 0};
#pragma unroll
            for (int n = 0; n < STEP / 8; ++n) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    float& s = tile[4 * n + 2 * h + e];
                    s = ex2_approx(s * scale - shift);
                    sum[e] += s;
                }
            }
            total[h] = total[h] * factor[h] + (sum[0] + sum[1]);
        }
    }
};

constexpr int WORKERS = ROWS / 64;
constexpr int TILE_BYTES = STEP * HEAD * 2;

// The warpgroups' turns in starting products; barrier 0 is the block's.
__device__ __forceinline__ void await_turn(u32 worker) {
    if (PINGPONG && WORKERS > 1) {
        bar_sync(1 + worker, 256);
    }
}
__device__ __forceinline__ void pass_turn(u32 worker) {
    if (PINGPONG && WORKERS > 1) {
        bar_arrive(1 + (worker + 1) % WORKERS, 256);
    }
}

/// What a worker of the forward kernel goes through with.
struct Worker {
    u32 index, q_tile, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty;
    Ring<STAGES> k_ring, v_ring;
    Softmax softmax;
    float sums[HEAD / 2];
    u32 weights[STEP / 16][4];

    /// How many columns of step `step` each of this thread's rows looks at, less its first column.
    __device__ __forceinline__ void open_columns(i32 (&open)[2], const Extents& x, i32 first, i32 step) const {
        const i64 query = (i64)first + index * 64 + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const i64 end = CAUSAL && query + 8 * h < x.keys ? query + 8 * h + 1 : x.keys;
            const i64 left = end - (i64)step * STEP - threadIdx.x % 4 * 2;
            open[h] = (i32)(left < 0 ? 0 : left < STEP ? left : STEP);
        }
    }

    __device__ __forceinline__ void await_keys() const { mbarrier_wait(k_full + 8 * k_ring.stage, k_ring.parity); }

    /// The last keys' weights.
    __device__ __forceinline__ void begin(const Extents& x, i32 first, i32 step) {
        float tile[STEP / 2], factor[2];
        i32 open[2];
        await_keys();
        wgmma_fence();
        multiply_rows<ROWS, STEP>(tile, q_tile, k_tiles + k_ring.stage * TILE_BYTES);
        wgmma_commit();
        open_columns(open, x, first, step);
        wgmma_wait<0>();
        hold_registers(tile);
        arrive_warp(k_empty + 8 * k_ring.stage);
        k_ring.advance();
        softmax.weigh<true>(tile, factor, open);
        pack_left<STEP>(weights, tile);
        if (step > 0) {
            await_keys();
        }
    }

    /// Adds the values of the step before under the weights of this one, whose keys have come, and waits for the next keys.
    template <bool MASKED>
    __device__ __forceinline__ void step(const Extents& x, i32 first, i32 step) {
        float tile[STEP / 2], factor[2];
        i32 open[2] = {0, 0};
        await_turn(index);
        wgmma_fence();
        multiply_rows<ROWS, STEP>(tile, q_tile, k_tiles + k_ring.stage * TILE_BYTES);
        wgmma_commit();
        mbarrier_wait(v_full + 8 * v_ring.stage, v_ring.parity);
        wgmma_fence();
        add_weighted<STEP>(sums, weights, v_tiles + v_ring.stage * TILE_BYTES);
        wgmma_commit();
        pass_turn(index);
        if (MASKED) {
            open_columns(open, x, first, step);
        }
        wgmma_wait<1>();
        hold_registers(tile);
        arrive_warp(k_empty + 8 * k_ring.stage);
        k_ring.advance();
        softmax.weigh<MASKED>(tile, factor, open);
        // Held, and with this wait between, the exponentials stay before the end of the products (see `stay_before`).
        hold_registers(tile);
        hold_registers(softmax.total);
        if (step > 0) {
            await_keys();
        }
        wgmma_wait<0>();
        hold_registers(sums);
        arrive_warp(v_empty + 8 * v_ring.stage);
        v_ring.advance();
        pack_left<STEP>(weights, tile);
#pragma unroll
        for (int i = 0; i < HEAD / 2; ++i) {
            sums[i] *= factor[i / 2 % 2];
        }
    }

    /// Adds the values of the last step.
    __device__ __forceinline__ void end() {
        mbarrier_wait(v_full + 8 * v_ring.stage, v_ring.parity);
        wgmma_fence();
        add_weighted<STEP>(sums, weights, v_tiles + v_ring.stage * TILE_BYTES);
        wgmma_commit();
        wgmma_wait<0>();
        hold_registers(sums);
        arrive_warp(v_empty + 8 * v_ring.stage);
        v_ring.advance();
    }
};

// Blocks: as many as there are multiprocessors, at most one a tile. If there are more tiles, `taken` is a zero, which counts those that were taken after.
extern "C" __global__ void __launch_bounds__(128 * (WORKERS + 1), 1)
attention_forward_hopper(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map,
    i32 inner, i32 key_inner, i32 value_inner, u32 section, u32* taken, T* out, float* lse, Extents x) {
    KILN_SHARED(u8, smem);
    const u32 q_tile = smem_addr(smem), k_tiles = q_tile + ROWS * HEAD * 2, v_tiles = k_tiles + STAGES * TILE_BYTES;
    const u32 q_full = v_tiles + STAGES * TILE_BYTES, q_empty = q_full + 8, k_full = q_empty + 8, k_empty = k_full + 8 * STAGES;
    const u32 v_full = k_empty + 8 * STAGES, v_empty = v_full + 8 * STAGES;
    // What the queries in shared memory are of: written and read under their barriers.
    Work* const current = (Work*)(smem + (v_empty + 8 * STAGES - q_tile));
    if (threadIdx.x == 0) {
        mbarrier_init(q_full, 1);
        mbarrier_init(q_empty, 4 * WORKERS);
        for (int i = 0; i < STAGES; ++i) {
            mbarrier_init(k_full + 8 * i, 1);
            mbarrier_init(v_full + 8 * i, 1);
            mbarrier_init(k_empty + 8 * i, 4 * WORKERS);
            mbarrier_init(v_empty + 8 * i, 4 * WORKERS);
        }
        fence_mbarrier_init();
    }
    __syncthreads();
    const u32 pieces = ((u32)x.queries + ROWS - 1) / ROWS * (u32)x.heads;
    if (warp_id() < 4) {
        setmaxnreg_dec<copier_registers(WORKERS)>();
        if (threadIdx.x == 0) {
            Ring<STAGES> k_ring, v_ring;
            const auto load_keys = [&](i32 head, i32 step) {
                const u32 full = k_full + 8 * k_ring.stage;
                mbarrier_wait(k_empty + 8 * k_ring.stage, k_ring.parity ^ 1);
                mbarrier_expect_tx(full, TILE_BYTES);
                load_tile<STEP>(k_tiles + k_ring.stage * TILE_BYTES, &k_map, full, (i64)step * STEP, head, key_inner);
                k_ring.advance();
            };
            const auto load_values = [&](i32 head, i32 step) {
                const u32 full = v_full + 8 * v_ring.stage;
                mbarrier_wait(v_empty + 8 * v_ring.stage, v_ring.parity ^ 1);
                mbarrier_expect_tx(full, TILE_BYTES);
                load_tile<STEP>(v_tiles + v_ring.stage * TILE_BYTES, &v_map, full, (i64)step * STEP, head, value_inner);
                v_ring.advance();
            };
            u32 parity = 0;
            for (u32 piece = blockIdx.x, next; piece < pieces; piece = next) {
                const Work work(x, piece, section);
                mbarrier_wait(q_empty, parity ^ 1);
                *current = work;
                mbarrier_expect_tx(q_full, ROWS * HEAD * 2);
                load_tile<ROWS>(q_tile, &q_map, q_full, work.first, work.head, inner);
                parity ^= 1;
                next = pieces > gridDim.x ? gridDim.x + atomicAdd(taken, 1u) : pieces;
                const i32 key_head = work.head / (i32)x.group;
                load_keys(key_head, work.steps - 1);
                for (i32 step = work.steps - 1; step >= 0; --step) {
                    if (step > 0) {
                        load_keys(key_head, step - 1);
                    }
                    load_values(key_head, step);
                }
            }
            mbarrier_wait(q_empty, parity ^ 1);
            current->steps = 0;
            mbarrier_arrive(q_full);
        }
    } else {
        setmaxnreg_inc<worker_registers(WORKERS)>();
        Worker w;
        w.index = warp_id() / 4 - 1;
        w.q_tile = q_tile + w.index * (64 * 128);
        w.k_tiles = k_tiles, w.v_tiles = v_tiles;
        w.k_full = k_full, w.k_empty = k_empty, w.v_full = v_full, w.v_empty = v_empty;
        w.softmax.scale = (float)(x.scale * 1.4426950408889634);
        // The first worker's first turn.
        if (w.index == WORKERS - 1) {
            pass_turn(w.index);
        }
        u32 parity = 0;
        while (true) {
            mbarrier_wait(q_full, parity);
            parity ^= 1;
            const Work work = *current;
            if (work.steps == 0) {
                break;
            }
            clear(w.sums);
            w.softmax.largest[0] = w.softmax.largest[1] = -infinity();
            w.softmax.total[0] = w.softmax.total[1] = 0;
            i32 step = work.steps - 1;
            w.begin(x, work.first, step);
            // Steps whose every key is open to every query of the tile need no mask.
            const i32 open_steps = (i32)((CAUSAL && work.first + 1 < x.keys ? work.first + 1 : x.keys) / STEP);
            for (--step; step >= open_steps; --step) {
                w.step<true>(x, work.first, step);
            }
            for (; step >= 0; --step) {
                w.step<false>(x, work.first, step);
            }
            arrive_warp(q_empty);
            w.end();

            float factor[2];
            const i64 query = (i64)work.first + w.index * 64 + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const float total = row_sum(w.softmax.total[h]);
                factor[h] = total == 0 ? 0.0f : 1 / total;
                if (threadIdx.x % 4 == 0 && query + 8 * h < x.queries) {
                    lse[(i64)work.head * x.queries + query + 8 * h] =
                        total == 0 ? infinity() : (w.softmax.largest[h] * w.softmax.scale + lg2_approx(total)) * LN_2;
                }
            }
            put_rows(out, work.head, x.queries, x.value_width, (i64)work.first + w.index * 64, w.sums, factor[0], factor[1]);
        }
    }
}
KILN_KERNEL(attention_forward_hopper)

#else

// ---- backward ----

constexpr float LOG2_E = 1.4426950408889634f;

// For each query, `shift` = lse · log2 e and `mean` = Σ grad ∘ out: some lanes a row, 16 bytes of it at a time each. Every head has `padded` of both;
// those of no query make its weights zero.
extern "C" __global__ void __launch_bounds__(256)
attention_along_hopper(const T* out, const T* grad, const float* lse, float* shift, float* mean, i64 padded, Extents x) {
    constexpr int LANES = HEAD / 8;
    const int lane = threadIdx.x % LANES;
    const i64 i = global_thread() / LANES, head = i / padded, query = i % padded;
    const bool real = head < x.heads && query < x.queries;
    const i64 row = head * x.queries + query;
    float sum = 0;
    if (real && 8 * lane < x.value_width) {
        const i64 at = row * x.value_width + 8 * lane;
        const Pack<T, 8> a = *(const Pack<T, 8>*)(out + at), b = *(const Pack<T, 8>*)(grad + at);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            sum += widen<T>(a.x[j]) * widen<T>(b.x[j]);
        }
    }
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, step);
    }
    if (lane == 0 && head < x.heads) {
        shift[i] = real ? lse[row] * LOG2_E : infinity();
        mean[i] = sum;
    }
}
KILN_KERNEL(attention_along_hopper)

constexpr int KEY_WORKERS = KEY_ROWS / 64;
constexpr int KEY_STEP_BYTES = KEY_STEP * HEAD * 2;

// A block: KEY_ROWS keys of a key head, and all queries that look at them. Scores are transposed, a row a key, so that weights and their gradients are
// left factors in registers: dV = Pᵀ·dO, dK = scale · dSᵀ·Q.
extern "C" __global__ void __launch_bounds__(128 * (KEY_WORKERS + 1), 1)
attention_backward_keys_hopper(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map,
    const __grid_constant__ TensorMap grad_map, i32 inner, i32 key_inner, i32 value_inner, i32 grad_inner, const float* shift, const float* mean,
    i64 padded, T* dk, T* dv, Extents x) {
    KILN_SHARED(u8, smem);
    const u32 k_tile = smem_addr(smem), v_tile = k_tile + KEY_ROWS * HEAD * 2;
    const u32 q_tiles = v_tile + KEY_ROWS * HEAD * 2, grad_tiles = q_tiles + STAGES * KEY_STEP_BYTES;
    constexpr u32 VECTORS = (2 * KEY_ROWS * HEAD * 2) + 2 * STAGES * KEY_STEP_BYTES;
    float* const shifts = (float*)(smem + VECTORS);
    float* const means = shifts + STAGES * KEY_STEP;
    const u32 kv_full = k_tile + VECTORS + 2 * STAGES * KEY_STEP * 4, q_full = kv_full + 8, q_empty = q_full + 8 * STAGES;
    const u32 grad_full = q_empty + 8 * STAGES, grad_empty = grad_full + 8 * STAGES;
    if (threadIdx.x == 0) {
        mbarrier_init(kv_full, 1);
        for (int i = 0; i < STAGES; ++i) {
            mbarrier_init(q_full + 8 * i, 1);
            mbarrier_init(grad_full + 8 * i, 1);
            mbarrier_init(q_empty + 8 * i, 4 * KEY_WORKERS);
            mbarrier_init(grad_empty + 8 * i, 4 * KEY_WORKERS);
        }
        fence_mbarrier_init();
    }
    __syncthreads();
    // The first keys of a causal problem have the most to do, and begin.
    const i64 key_heads = x.heads / x.group, key_head = blockIdx.x % key_heads, first = blockIdx.x / key_heads * KEY_ROWS;
    // Queries before the first key do not look at the block.
    const i32 start = CAUSAL ? (i32)(first / KEY_STEP) : 0, blocks = (i32)((x.queries + KEY_STEP - 1) / KEY_STEP);
    const i32 steps = blocks > start ? (blocks - start) * (i32)x.group : 0;
    if (warp_id() < 4) {
        setmaxnreg_dec<copier_registers(KEY_WORKERS)>();
        if (threadIdx.x == 0 && steps > 0) {
            mbarrier_expect_tx(kv_full, 2 * KEY_ROWS * HEAD * 2);
            load_tile<KEY_ROWS>(k_tile, &k_map, kv_full, first, key_head, key_inner);
            load_tile<KEY_ROWS>(v_tile, &v_map, kv_full, first, key_head, value_inner);
            Ring<STAGES> ring;
            for (i64 head = key_head * x.group; head < (key_head + 1) * x.group; ++head) {
                for (i32 block = start; block < blocks; ++block) {
                    const u32 q_bar = q_full + 8 * ring.stage, grad_bar = grad_full + 8 * ring.stage;
                    const i64 query0 = (i64)block * KEY_STEP, at = head * padded + query0;
                    mbarrier_wait(q_empty + 8 * ring.stage, ring.parity ^ 1);
                    mbarrier_expect_tx(q_bar, KEY_STEP_BYTES + KEY_STEP * 4);
                    load_tile<KEY_STEP>(q_tiles + ring.stage * KEY_STEP_BYTES, &q_map, q_bar, query0, head, inner);
                    bulk_load(smem_addr(shifts + ring.stage * KEY_STEP), shift + at, KEY_STEP * 4, q_bar);
                    mbarrier_wait(grad_empty + 8 * ring.stage, ring.parity ^ 1);
                    mbarrier_expect_tx(grad_bar, KEY_STEP_BYTES + KEY_STEP * 4);
                    load_tile<KEY_STEP>(grad_tiles + ring.stage * KEY_STEP_BYTES, &grad_map, grad_bar, query0, head, grad_inner);
                    bulk_load(smem_addr(means + ring.stage * KEY_STEP), mean + at, KEY_STEP * 4, grad_bar);
                    ring.advance();
                }
            }
        }
    } else {
        setmaxnreg_inc<worker_registers(KEY_WORKERS)>();
        const u32 index = warp_id() / 4 - 1;
        const u32 k_rows = k_tile + index * (64 * 128), v_rows = v_tile + index * (64 * 128);
        const float scale = (float)(x.scale * 1.4426950408889634);
        float d_keys[HEAD / 2], d_values[HEAD / 2];
        clear(d_keys);
        clear(d_values);
        hold_registers(d_keys);
        hold_registers(d_values);
        if (steps > 0) {
            Ring<STAGES> ring;
            mbarrier_wait(kv_full, 0);
            // Columns of the first step, and of this lane, below `shut` do not look at the first of its two keys.
            const i32 shut_first =
                (i32)(first - (i64)start * KEY_STEP) + index * 64 + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4 - threadIdx.x % 4 * 2;
            i32 block = start;
            for (i32 step = 0; step < steps; ++step) {
                const u32 stage = ring.stage, q_tile = q_tiles + stage * KEY_STEP_BYTES, grad_tile = grad_tiles + stage * KEY_STEP_BYTES;
                float tile[KEY_STEP / 2], d_tile[KEY_STEP / 2];
                mbarrier_wait(q_full + 8 * stage, ring.parity);
                wgmma_fence();
                multiply_rows<KEY_ROWS, KEY_STEP>(tile, k_rows, q_tile);
                wgmma_commit();
                // While these scores are made, the last step's sums end: its tiles and the registers of its left factors are free.
                wgmma_wait<1>();
                if (step > 0) {
                    const u32 last = stage == 0 ? STAGES - 1 : stage - 1;
                    arrive_warp(q_empty + 8 * last);
                    arrive_warp(grad_empty + 8 * last);
                }
                mbarrier_wait(grad_full + 8 * stage, ring.parity);
                wgmma_fence();
                multiply_rows<KEY_ROWS, KEY_STEP>(d_tile, v_rows, grad_tile);
                wgmma_commit();
                wgmma_wait<1>();
                hold_registers(tile);
                const i32 shut = shut_first - (block - start) * KEY_STEP;
                const bool masked = CAUSAL && shut > -8;
#pragma unroll
                for (int n = 0; n < KEY_STEP / 8; ++n) {
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        const float less = shifts[stage * KEY_STEP + 8 * n + 2 * (threadIdx.x % 4) + e];
#pragma unroll
                        for (int h = 0; h < 2; ++h) {
                            float& s = tile[4 * n + 2 * h + e];
                            s = ex2_approx(s * scale - less);
                            if (masked && 8 * n + e < shut + 8 * h) {
                                s = 0;
                            }
                        }
                    }
                }
                hold_registers(tile);
                stay_before(grad_full + 8 * stage, ring.parity);
                wgmma_wait<0>();
                hold_registers(d_tile);
#pragma unroll
                for (int n = 0; n < KEY_STEP / 8; ++n) {
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        const float less = means[stage * KEY_STEP + 8 * n + 2 * (threadIdx.x % 4) + e];
                        d_tile[4 * n + e] = tile[4 * n + e] * (d_tile[4 * n + e] - less);
                        d_tile[4 * n + 2 + e] = tile[4 * n + 2 + e] * (d_tile[4 * n + 2 + e] - less);
                    }
                }
                u32 weights[KEY_STEP / 16][4], d_scores[KEY_STEP / 16][4];
                pack_left<KEY_STEP>(weights, tile);
                pack_left<KEY_STEP>(d_scores, d_tile);
                wgmma_fence();
                add_weighted<KEY_STEP>(d_values, weights, grad_tile);
                add_weighted<KEY_STEP>(d_keys, d_scores, q_tile);
                wgmma_commit();
                ring.advance();
                if (++block == blocks) {
                    block = start;
                }
            }
            wgmma_wait<0>();
            hold_registers(d_keys);
            hold_registers(d_values);
        }
        put_rows(dk, key_head, x.keys, x.width, first + index * 64, d_keys, (float)x.scale, (float)x.scale);
        put_rows(dv, key_head, x.keys, x.value_width, first + index * 64, d_values, 1, 1);
    }
}
KILN_KERNEL(attention_backward_keys_hopper)

constexpr int QUERY_WORKERS = QUERY_ROWS / 64;
constexpr int QUERY_STEP_BYTES = QUERY_STEP * HEAD * 2;

// A block: QUERY_ROWS queries of a head. dQ = scale · dS·K.
extern "C" __global__ void __launch_bounds__(128 * (QUERY_WORKERS + 1), 1)
attention_backward_queries_hopper(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
    const __grid_constant__ TensorMap v_map, const __grid_constant__ TensorMap grad_map, i32 inner, i32 key_inner, i32 value_inner, i32 grad_inner,
    const float* shift, const float* mean, i64 padded, T* dq, Extents x) {
    KILN_SHARED(u8, smem);
    const u32 q_tile = smem_addr(smem), grad_tile = q_tile + QUERY_ROWS * HEAD * 2;
    const u32 k_tiles = grad_tile + QUERY_ROWS * HEAD * 2, v_tiles = k_tiles + STAGES * QUERY_STEP_BYTES;
    const u32 q_full = v_tiles + STAGES * QUERY_STEP_BYTES, k_full = q_full + 8, k_empty = k_full + 8 * STAGES;
    const u32 v_full = k_empty + 8 * STAGES, v_empty = v_full + 8 * STAGES;
    if (threadIdx.x == 0) {
        mbarrier_init(q_full, 1);
        for (int i = 0; i < STAGES; ++i) {
            mbarrier_init(k_full + 8 * i, 1);
            mbarrier_init(v_full + 8 * i, 1);
            mbarrier_init(k_empty + 8 * i, 4 * QUERY_WORKERS);
            mbarrier_init(v_empty + 8 * i, 4 * QUERY_WORKERS);
        }
        fence_mbarrier_init();
    }
    __syncthreads();
    const i64 blocks = (x.queries + QUERY_ROWS - 1) / QUERY_ROWS;
    const i64 head = blockIdx.x % x.heads, first = (blocks - 1 - blockIdx.x / x.heads) * QUERY_ROWS;
    const i64 end = CAUSAL && first + QUERY_ROWS < x.keys ? first + QUERY_ROWS : x.keys;
    const i32 steps = (i32)((end + QUERY_STEP - 1) / QUERY_STEP);
    if (warp_id() < 4) {
        setmaxnreg_dec<copier_registers(QUERY_WORKERS)>();
        if (threadIdx.x == 0) {
            mbarrier_expect_tx(q_full, 2 * QUERY_ROWS * HEAD * 2);
            load_tile<QUERY_ROWS>(q_tile, &q_map, q_full, first, head, inner);
            load_tile<QUERY_ROWS>(grad_tile, &grad_map, q_full, first, head, grad_inner);
            Ring<STAGES> ring;
            for (i32 step = 0; step < steps; ++step) {
                const u32 k_bar = k_full + 8 * ring.stage, v_bar = v_full + 8 * ring.stage;
                mbarrier_wait(k_empty + 8 * ring.stage, ring.parity ^ 1);
                mbarrier_expect_tx(k_bar, QUERY_STEP_BYTES);
                load_tile<QUERY_STEP>(k_tiles + ring.stage * QUERY_STEP_BYTES, &k_map, k_bar, (i64)step * QUERY_STEP, head / x.group, key_inner);
                mbarrier_wait(v_empty + 8 * ring.stage, ring.parity ^ 1);
                mbarrier_expect_tx(v_bar, QUERY_STEP_BYTES);
                load_tile<QUERY_STEP>(v_tiles + ring.stage * QUERY_STEP_BYTES, &v_map, v_bar, (i64)step * QUERY_STEP, head / x.group, value_inner);
                ring.advance();
            }
        }
    } else {
        setmaxnreg_inc<worker_registers(QUERY_WORKERS)>();
        const u32 index = warp_id() / 4 - 1;
        const u32 q_rows = q_tile + index * (64 * 128), grad_rows = grad_tile + index * (64 * 128);
        const float scale = (float)(x.scale * 1.4426950408889634);
        const i64 query = first + index * 64 + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
        const float less[2] = {shift[head * padded + query], shift[head * padded + query + 8]};
        const float mean_of[2] = {mean[head * padded + query], mean[head * padded + query + 8]};
        float sums[HEAD / 2];
        clear(sums);
        hold_registers(sums);
        Ring<STAGES> ring;
        mbarrier_wait(q_full, 0);
        for (i32 step = 0; step < steps; ++step) {
            const u32 stage = ring.stage;
            float tile[QUERY_STEP / 2], d_tile[QUERY_STEP / 2];
            mbarrier_wait(k_full + 8 * stage, ring.parity);
            wgmma_fence();
            multiply_rows<QUERY_ROWS, QUERY_STEP>(tile, q_rows, k_tiles + stage * QUERY_STEP_BYTES);
            wgmma_commit();
            // While these scores are made, the last step's sums end: its keys and the registers of its left factor are free.
            wgmma_wait<1>();
            if (step > 0) {
                arrive_warp(k_empty + 8 * (stage == 0 ? STAGES - 1 : stage - 1));
            }
            mbarrier_wait(v_full + 8 * stage, ring.parity);
            wgmma_fence();
            multiply_rows<QUERY_ROWS, QUERY_STEP>(d_tile, grad_rows, v_tiles + stage * QUERY_STEP_BYTES);
            wgmma_commit();
            wgmma_wait<1>();
            hold_registers(tile);
            const i64 key0 = (i64)step * QUERY_STEP;
            const bool masked = key0 + QUERY_STEP > x.keys || (CAUSAL && key0 + QUERY_STEP - 1 > first + index * 64);
            i32 open[2];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const i64 limit = CAUSAL && query + 8 * h < x.keys ? query + 8 * h + 1 : x.keys;
                const i64 left = limit - key0 - threadIdx.x % 4 * 2;
                open[h] = !masked ? QUERY_STEP : (i32)(left < 0 ? 0 : left < QUERY_STEP ? left : QUERY_STEP);
            }
#pragma unroll
            for (int n = 0; n < QUERY_STEP / 8; ++n) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    float& s = tile[4 * n + e];
                    s = ex2_approx(s * scale - less[e / 2]);
                    if (masked && 8 * n + e % 2 >= open[e / 2]) {
                        s = 0;
                    }
                }
            }
            hold_registers(tile);
            stay_before(v_full + 8 * stage, ring.parity);
            wgmma_wait<0>();
            hold_registers(d_tile);
            arrive_warp(v_empty + 8 * stage);
#pragma unroll
            for (int i = 0; i < QUERY_STEP / 2; ++i) {
                d_tile[i] = tile[i] * (d_tile[i] - mean_of[i / 2 % 2]);
            }
            u32 d_scores[QUERY_STEP / 16][4];
            pack_left<QUERY_STEP>(d_scores, d_tile);
            wgmma_fence();
            add_weighted<QUERY_STEP>(sums, d_scores, k_tiles + stage * QUERY_STEP_BYTES);
            wgmma_commit();
            ring.advance();
        }
        wgmma_wait<0>();
        hold_registers(sums);
        put_rows(dq, head, x.queries, x.width, first + index * 64, sums, (float)x.scale, (float)x.scale);
    }
}
KILN_KERNEL(attention_backward_queries_hopper)

#endif
