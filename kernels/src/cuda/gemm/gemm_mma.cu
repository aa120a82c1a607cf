// Matrix products on the tensor cores of a warp (sm_80 and later): f16, bf16, and f32 as TF32 or, more exactly, as sums of two TF32.
// Macros: those of gemm.cuh, BLOCK_M, BLOCK_N (a block's tile), WARP_M, WARP_N (a warp's), STAGES, GROUP (rows of tiles that are visited together), PARTIAL (as in
// gemm.cu), A_MN, B_MN (1 where a factor's m or n has stride 1, 0 where its k has), TF32_TERMS (1 | 3, for f32). The factors' addresses and their other strides
// are multiples of 16 bytes; extents are arbitrary.
//
// Blocks of k, 128 bytes of it, come by asynchronous copies into a ring of STAGES stages. A factor lies in shared memory as in memory, its lines cut into units of
// 16 bytes that are permuted so that the 8 lines which one load of a fragment reads lie in different banks:
//   k contiguous: a line is a row of 128 bytes; ldmatrix reads fragments as they are (a TF32 is a pair of 16-bit halves to it);
//   m or n contiguous: a line is one k; ldmatrix transposes halves, TF32 are read one by one.
// Tensor cores cut off what does not fit an f32 when they add. Where f32 is to be nearly exact, each block of k is summed on its own and added by a rounded addition.
#include "kiln.cuh"
#include "gemm.cuh"

constexpr bool HALVES = is_half_type<T>;
constexpr i32 BLOCK_K = 128 / sizeof(T);
// Elements of a unit of 16 bytes, and of k in one step of mma.
constexpr i32 UNIT = 16 / sizeof(T);
constexpr i32 STEP_K = HALVES ? 16 : 8;
constexpr i32 WARPS_N = BLOCK_N / WARP_N;
constexpr i32 THREADS = BLOCK_M / WARP_M * WARPS_N * 32;
constexpr i32 TILES_M = WARP_M / 16, TILES_N = WARP_N / 8;
constexpr u32 A_BYTES = BLOCK_M * 128, B_BYTES = BLOCK_N * 128;
// Parts of a factor that are multiplied: x, or x = high + low.
constexpr i32 PARTS = !HALVES && TF32_TERMS == 3 ? 2 : 1;
static_assert(WARP_M % 16 == 0 && WARP_N % 16 == 0 && BLOCK_M * 8 % THREADS == 0 && BLOCK_N * 8 % THREADS == 0);

// The byte where unit `unit` of line `line` of a factor's block lies.
template <i32 EXTENT, bool MN> __device__ __forceinline__ u32 place(u32 line, u32 unit) {
    if constexpr (!MN) {
        return line * 128 + ((unit ^ (line & 7)) << 4);
    } else if constexpr (HALVES) {
        return line * (EXTENT * 2) + ((unit ^ (line & 7)) << 4);
    } else {
        // A warp reads two units of each of four lines.
        return line * (EXTENT * 4) + ((unit ^ ((line & 3) << 1)) << 4);
    }
}

// Starts the copies of a block of EXTENT rows (of A: m, of B: n) by BLOCK_K of k; `at` is its first element, and `rows`, `ks` are left from there on.
template <i32 EXTENT, bool MN> __device__ __forceinline__ void copy_block(u32 smem, const T* at, i64 stride, i64 rows, i64 ks) {
    constexpr i32 UNITS = MN ? EXTENT / UNIT : 8;
#pragma unroll
    for (i32 i = 0; i < EXTENT * 8 / THREADS; ++i) {
        const i32 v = threadIdx.x + i * THREADS;
        const i32 line = v / UNITS, unit = v % UNITS;
        const i64 left = line < (MN ? ks : rows) ? ((MN ? rows : ks) - unit * UNIT) * (i64)sizeof(T) : 0;
        const u32 bytes = left >= 16 ? 16 : left > 0 ? (u32)left : 0;
        cp_async16_partial(smem + place<EXTENT, MN>(line, unit), bytes > 0 ? at + line * stride + unit * UNIT : at, bytes);
    }
}

// Splits an f32 into TF32: itself rounded, and what that leaves (not wanted where there is one part: `low` may then be `high`), which is nothing
// of an infinity.
__device__ __forceinline__ void split_tf32(u32 bits, u32& high, u32& low) {
    const float x = __uint_as_float(bits);
    high = f32_to_tf32(x);
    if constexpr (PARTS == 2) {
        low = finite_or_zero(high) == high ? f32_to_tf32(x - __uint_as_float(high)) : 0;
    }
}

// The fragments of A for 16 rows from `row` on and STEP_K of k from `k` on.
__device__ __forceinline__ void load_a(u32 (&a)[PARTS][4], u32 smem, i32 row, i32 k, const u8* shared) {
    const u32 lane = lane_id();
    if constexpr (!A_MN || HALVES) {
        u32 raw[4];
        if constexpr (!A_MN) {
            ldmatrix_x4(raw, smem + place<BLOCK_M, false>(row + (lane & 15), k / UNIT + (lane >> 4)));
        } else {
            ldmatrix_x4_trans(raw, smem + place<BLOCK_M, true>(k + (lane & 7) + ((lane >> 4) << 3), row / UNIT + ((lane >> 3) & 1)));
        }
#pragma unroll
        for (i32 i = 0; i < 4; ++i) {
            if constexpr (HALVES) {
                a[0][i] = raw[i];
            } else {
                split_tf32(raw[i], a[0][i], a[PARTS - 1][i]);
            }
        }
    } else {
#pragma unroll
        for (i32 i = 0; i < 4; ++i) {
            const u32 m = row + (lane >> 2) + (i & 1) * 8;
            split_tf32(*(const u32*)(shared + place<BLOCK_M, true>(k + (lane & 3) + (i >> 1) * 4, m / UNIT) + m % UNIT * 4), a[0][i], a[PARTS - 1][i]);
        }
    }
}

// The fragments of B for 16 columns from `col` on (two of mma's) and STEP_K of k from `k` on.
__device__ __forceinline__ void load_b(u32 (&b)[2][PARTS][2], u32 smem, i32 col, i32 k, const u8* shared) {
    const u32 lane = lane_id();
    if constexpr (!B_MN || HALVES) {
        u32 raw[4];
        if constexpr (!B_MN) {
            ldmatrix_x4(raw, smem + place<BLOCK_N, false>(col + (lane & 7) + ((lane >> 4) << 3), k / UNIT + ((lane >> 3) & 1)));
        } else {
            ldmatrix_x4_trans(raw, smem + place<BLOCK_N, true>(k + (lane & 15), col / UNIT + (lane >> 4)));
        }
#pragma unroll
        for (i32 i = 0; i < 4; ++i) {
            if constexpr (HALVES) {
                b[i >> 1][0][i & 1] = raw[i];
            } else {
                split_tf32(raw[i], b[i >> 1][0][i & 1], b[i >> 1][PARTS - 1][i & 1]);
            }
        }
    } else {
#pragma unroll
        for (i32 i = 0; i < 4; ++i) {
            const u32 n = col + (i >> 1) * 8 + (lane >> 2);
            split_tf32(*(const u32*)(shared + place<BLOCK_N, true>(k + (lane & 3) + (i & 1) * 4, n / UNIT) + n % UNIT * 4), b[i >> 1][0][i & 1],
                b[i >> 1][PARTS - 1][i & 1]);
        }
    }
}

template <class E> __device__ __forceinline__ void multiply(float (&acc)[4], const u32 (&a)[PARTS][4], const u32 (&b)[PARTS][2]) {
    if constexpr (is_half_type<E>) {
        mma<E>(acc, a[0], b[0]);
    } else {
        if constexpr (PARTS == 2) {
            // Small products first. Infinities are for the last one alone: in these they would meet rests, which may be zero or of any sign.
            const u32 a_finite[4] = {finite_or_zero(a[0][0]), finite_or_zero(a[0][1]), finite_or_zero(a[0][2]), finite_or_zero(a[0][3])};
            const u32 b_finite[2] = {finite_or_zero(b[0][0]), finite_or_zero(b[0][1])};
            mma_tf32(acc, a[1], b_finite);
            mma_tf32(acc, a_finite, b[1]);
        }
        mma_tf32(acc, a[0], b[0]);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) gemm_mma(const GemmArgs args) {
    KILN_SHARED(u8, shared);
    const u32 ring = smem_addr(shared);
    const i32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const i32 warp_row = warp / WARPS_N * WARP_M, warp_col = warp % WARPS_N * WARP_N;
    const i64 rows = (args.m + BLOCK_M - 1) / BLOCK_M, cols = (args.n + BLOCK_N - 1) / BLOCK_N;
    const i64 blocks_of_k = (args.k + BLOCK_K - 1) / BLOCK_K;
    const i64 units = rows * cols * args.batch * args.splits;
    const i64 a_stride = A_MN ? args.a.col : args.a.row, b_stride = B_MN ? args.b.row : args.b.col;
    for (i64 index = blockIdx.x; index < units; index += gridDim.x) {
        const i64 item = index / (rows * cols), tile = index % (rows * cols);
        const i64 batch = item / args.splits, split = item % args.splits;
        const i64 group = tile / (GROUP * cols), in_group = tile % (GROUP * cols);
        const i64 group_rows = min((i64)GROUP, rows - group * GROUP);
        const i64 row0 = (group * GROUP + in_group % group_rows) * BLOCK_M, col0 = in_group / group_rows * BLOCK_N;
        const i64 first = blocks_of_k * split / args.splits, last = blocks_of_k * (split + 1) / args.splits;
        const T* a = item_of(args.a, batch, args.batch_inner) + row0 * args.a.row + first * BLOCK_K * args.a.col;
        const T* b = item_of(args.b, batch, args.batch_inner) + col0 * args.b.col + first * BLOCK_K * args.b.row;
        float acc[TILES_M][TILES_N][4] = {};
        i64 to_copy = first;
        u32 copy_stage = 0, stage = 0;
        // Starts the copies of the next block, if there is one; a group of copies either way, so that counting groups counts blocks.
        const auto copy_next = [&]() {
            if (to_copy < last) {
                const u32 smem = ring + copy_stage * (A_BYTES + B_BYTES);
                copy_block<BLOCK_M, A_MN>(smem, a, a_stride, args.m - row0, args.k - to_copy * BLOCK_K);
                copy_block<BLOCK_N, B_MN>(smem + A_BYTES, b, b_stride, args.n - col0, args.k - to_copy * BLOCK_K);
                a += BLOCK_K * args.a.col;
                b += BLOCK_K * args.b.row;
                ++to_copy;
            }
            cp_async_commit();
            copy_stage = copy_stage + 1 == STAGES ? 0 : copy_stage + 1;
        };
        for (i32 s = 0; s < STAGES - 1; ++s) {
            copy_next();
        }
        for (i64 block = first; block < last; ++block) {
            cp_async_wait<STAGES - 2>();
            // The block has landed for all threads, and all have left the stage that is filled next.
            __syncthreads();
            copy_next();
            const u32 offset = stage * (A_BYTES + B_BYTES);
            // The fragments of a step are loaded while those of the last one are multiplied.
            u32 x[2][TILES_M][PARTS][4], y[2][TILES_N / 2][2][PARTS][2];
            const auto load_step = [&](i32 step) {
#pragma unroll
                for (i32 i = 0; i < TILES_M; ++i) {
                    load_a(x[step & 1][i], ring + offset, warp_row + i * 16, step * STEP_K, shared + offset);
                }
#pragma unroll
                for (i32 j = 0; j < TILES_N / 2; ++j) {
                    load_b(y[step & 1][j], ring + offset + A_BYTES, warp_col + j * 16, step * STEP_K, shared + offset + A_BYTES);
                }
            };
            float sums[TILES_M][TILES_N][4] = {};
            load_step(0);
#pragma unroll
            for (i32 step = 0; step < BLOCK_K / STEP_K; ++step) {
                if (step + 1 < BLOCK_K / STEP_K) {
                    load_step(step + 1);
                }
#pragma unroll
                for (i32 i = 0; i < TILES_M; ++i) {
#pragma unroll
                    for (i32 j = 0; j < TILES_N; ++j) {
                        multiply<T>(PARTS == 2 ? sums[i][j] : acc[i][j], x[step & 1][i], y[step & 1][j / 2][j % 2]);
                    }
                }
            }
            if constexpr (PARTS == 2) {
#pragma unroll
                for (i32 i = 0; i < TILES_M * TILES_N * 4; ++i) {
                    acc[i / 4 / TILES_N][i / 4 % TILES_N][i % 4] += sums[i / 4 / TILES_N][i / 4 % TILES_N][i % 4];
                }
            }
            stage = stage + 1 == STAGES ? 0 : stage + 1;
        }
        cp_async_wait<0>();
        __syncthreads();
#pragma unroll
        for (i32 i = 0; i < TILES_M; ++i) {
#pragma unroll
            for (i32 j = 0; j < TILES_N; ++j) {
#pragma unroll
                for (i32 e = 0; e < 4; ++e) {
                    const i64 row = row0 + warp_row + i * 16 + (lane >> 2) + (e >> 1) * 8;
                    const i64 col = col0 + warp_col + j * 8 + (lane & 3) * 2 + (e & 1);
                    if (row < args.m && col < args.n) {
                        if constexpr (PARTIAL) {
                            *partial_at(args, split, batch, row, col) = acc[i][j][e];
                        } else {
                            store_finished(args, acc[i][j][e], batch, row, col);
                        }
                    }
                }
            }
        }
    }
}
KILN_KERNEL(gemm_mma)
