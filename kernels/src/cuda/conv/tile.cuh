// A tile of a product, BM by BN, summed over stages of BK that lie in shared memory; shared by the convolution's passes.
//
// Macros: T, MATH, BM, BN, BK, and TM, TN (a thread's share, MATH_FMA) or WARPS_M, WARPS_N (else); A_ROWS is 1 where the left factor lies in rows of k
// ([m][k]), 0 where in rows of m ([k][m]). The right factor lies in rows of n ([k][n]). `a_place` and `b_place` say where an element of a stage is.
//
// A stage is multiplied by `start` and `finish`; in between, warpgroups are free to copy the next one.
#pragma once

// Multiply-adds; tensor cores on 16-bit elements; on f32 rounded to TF32; on f32 split into two TF32; Hopper's warpgroups on 16-bit elements.
#define MATH_FMA 0
#define MATH_HALF 1
#define MATH_TF32 2
#define MATH_TF32X3 3
#define MATH_WARPGROUP 4

typedef Compute<T> Sum;

#if MATH == MATH_WARPGROUP
// Blocks of 64 elements in lines of 128 bytes, whose 16-byte units are exchanged as Hopper's tensor cores expect (the 128-byte swizzle): by the line's
// number, modulo 8. Blocks of a factor that is not in rows of k follow one another.
static_assert(BK == 64, "a line of 128 bytes");
constexpr i32 A_SIZE = BM * BK;
constexpr i32 B_SIZE = BK * BN;
__device__ __forceinline__ i32 swizzled(i32 line, i32 column) {
    return line * 64 + ((column / 8 ^ line % 8) * 8 + column % 8);
}
__device__ __forceinline__ i32 b_place(i32 k, i32 n) {
    return n / 64 * BK * 64 + swizzled(k, n % 64);
}
__device__ __forceinline__ i32 a_place(i32 line, i32 column) {
    return A_ROWS ? swizzled(line, column) : b_place(line, column);
}
#else
// Rows are 16 bytes longer than their content (32 where single f32 are read by rows of k, or four f64), so that what a warp reads at once lies in
// different banks.
constexpr i32 PAD = sizeof(T) == 8 ? 4 : 16 / (i32)sizeof(T);
constexpr i32 WIDE_PAD = MATH >= MATH_TF32 ? 8 : PAD;
constexpr i32 A_STRIDE = A_ROWS ? BK + PAD : BM + WIDE_PAD;
constexpr i32 B_STRIDE = BN + WIDE_PAD;
constexpr i32 A_SIZE = (A_ROWS ? BM : BK) * A_STRIDE;
constexpr i32 B_SIZE = BK * B_STRIDE;
__device__ __forceinline__ i32 a_place(i32 row, i32 column) {
    return row * A_STRIDE + column;
}
__device__ __forceinline__ i32 b_place(i32 row, i32 column) {
    return row * B_STRIDE + column;
}
#endif
constexpr i32 STAGE_SIZE = A_SIZE + B_SIZE;

#if MATH == MATH_FMA

constexpr i32 THREADS = (BM / TM) * (BN / TN);
// Columns of a result that a thread holds side by side.
constexpr i32 GROUP = 4;

struct Tile {
    // Threads along m and n, and those of a warp.
    static constexpr i32 M = BM / TM, N = BN / TN;
    static constexpr i32 WARP_N = N < 8 ? N : 8, WARP_M = 32 / WARP_N;
    static_assert(THREADS % 32 == 0 && M % WARP_M == 0 && N % WARP_N == 0 && TM % 4 == 0 && TN % 4 == 0, "warps of whole rows");

    Sum sum[TM][TN];
    i32 m, n;

    __device__ __forceinline__ Tile() {
        const i32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        m = warp / (N / WARP_N) * WARP_M;
        n = warp % (N / WARP_N) * WARP_N;
        // Pairs of lanes share columns, so that reads of 16 bytes take few passes.
        m += WARP_N == 8 ? (lane & 1) | lane >> 4 << 1 : lane / WARP_N;
        n += WARP_N == 8 ? lane >> 1 & 7 : lane % WARP_N;
#pragma unroll
        for (i32 i = 0; i < TM; ++i) {
#pragma unroll
            for (i32 j = 0; j < TN; ++j) {
                sum[i][j] = 0;
            }
        }
    }

    static __device__ __forceinline__ i32 row_of(i32 m, i32 i) {
        return A_ROWS ? m + i * M : (i / 4 * M + m) * 4 + i % 4;
    }

    __device__ __forceinline__ void start(const T* a, const T* b) {
        typedef Pack<T, 4> Four;
        constexpr i32 STEP = A_ROWS ? 4 : 1;
#pragma unroll
        for (i32 k = 0; k < BK; k += STEP) {
            Four left[A_ROWS ? TM : TM / 4];
            if constexpr (A_ROWS) {
#pragma unroll
                for (i32 i = 0; i < TM; ++i) {
                    left[i] = *(const Four*)(a + (m + i * M) * A_STRIDE + k);
                }
            } else {
#pragma unroll
                for (i32 i = 0; i < TM / 4; ++i) {
                    left[i] = *(const Four*)(a + k * A_STRIDE + (i * M + m) * 4);
                }
            }
#pragma unroll
            for (i32 q = 0; q < STEP; ++q) {
                Sum right[TN];
#pragma unroll
                for (i32 j = 0; j < TN / 4; ++j) {
                    const Four four = *(const Four*)(b + (k + q) * B_STRIDE + (j * N + n) * 4);
#pragma unroll
                    for (i32 e = 0; e < 4; ++e) {
                        right[j * 4 + e] = widen<T>(four.x[e]);
                    }
                }
#pragma unroll
                for (i32 i = 0; i < TM; ++i) {
                    const Sum x = widen<T>(A_ROWS ? left[i].x[q] : left[A_ROWS ? 0 : i / 4].x[i % 4]);
#pragma unroll
                    for (i32 j = 0; j < TN; ++j) {
                        sum[i][j] += x * right[j];
                    }
                }
            }
        }
    }

    __device__ __forceinline__ void finish() {}

    // Calls use(prepare(column), row, column, sums of GROUP columns).
    template <class P, class F> __device__ __forceinline__ void each(P prepare, F use) {
#pragma unroll
        for (i32 j = 0; j < TN / 4; ++j) {
            const i32 column = (j * N + n) * 4;
            const auto prepared = prepare(column);
#pragma unroll
            for (i32 i = 0; i < TM; ++i) {
                const Sum four[4] = {sum[i][j * 4], sum[i][j * 4 + 1], sum[i][j * 4 + 2], sum[i][j * 4 + 3]};
                use(prepared, row_of(m, i), column, four);
            }
        }
    }
};

#elif MATH == MATH_WARPGROUP

constexpr i32 THREADS = WARPS_M * 32;
constexpr i32 GROUP = 2;
static_assert(WARPS_M * 16 == BM && WARPS_M % 4 == 0 && WARPS_N == 1 && BN % 64 == 0, "64 rows a warpgroup");

struct Tile {
    float sum[BN / 2];
    i32 group;

    __device__ __forceinline__ Tile() {
        group = warp_id() / 4;
#pragma unroll
        for (i32 i = 0; i < BN / 2; ++i) {
            sum[i] = 0;
        }
    }

    __device__ __forceinline__ void start(const T* a, const T* b) {
        constexpr u32 BLOCK_BYTES = 64 * BK * 2;
        const u64 left = wgmma_descriptor(smem_addr(a) + group * BLOCK_BYTES, A_ROWS ? 16 : BLOCK_BYTES, 1024);
        const u64 right = wgmma_descriptor(smem_addr(b), BLOCK_BYTES, 1024);
        wgmma_fence();
#pragma unroll
        for (i32 k = 0; k < BK / 16; ++k) {
            // Descriptors count in units of 16 bytes; 16 of k are 32 bytes of a line, or 16 lines.
            if constexpr (Same<T, bf16>::value) {
                wgmma_bf16<BN, !A_ROWS, 1>(sum, left + k * (A_ROWS ? 2 : 128), right + k * 128, 1);
            } else {
                wgmma_f16<BN, !A_ROWS, 1>(sum, left + k * (A_ROWS ? 2 : 128), right + k * 128, 1);
            }
        }
        wgmma_commit();
    }

    __device__ __forceinline__ void finish() {
        wgmma_wait<0>();
        hold_registers(sum);
    }

    template <class P, class F> __device__ __forceinline__ void each(P prepare, F use) {
        const i32 row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
#pragma unroll
        for (i32 j = 0; j < BN / 8; ++j) {
            const i32 column = j * 8 + threadIdx.x % 4 * 2;
            const auto prepared = prepare(column);
#pragma unroll
            for (i32 half = 0; half < 2; ++half) {
                const float two[2] = {sum[j * 4 + half * 2], sum[j * 4 + half * 2 + 1]};
                use(prepared, row + half * 8, column, two);
            }
        }
    }
};

#else

constexpr i32 THREADS = WARPS_M * WARPS_N * 32;
constexpr i32 GROUP = 2;

struct Tile {
    // A warp's share in matrices of 16 rows, and of 8 columns.
    static constexpr i32 M = BM / WARPS_M / 16, N = BN / WARPS_N / 8;
    static_assert(M * 16 * WARPS_M == BM && N * 8 * WARPS_N == BN && N % 2 == 0, "whole matrices");

    float sum[M][N][4];
    i32 row, col, lane;

    __device__ __forceinline__ Tile() {
        const i32 warp = threadIdx.x / 32;
        lane = threadIdx.x % 32;
        row = warp / WARPS_N * M * 16;
        col = warp % WARPS_N * N * 8;
#pragma unroll
        for (i32 i = 0; i < M; ++i) {
#pragma unroll
            for (i32 j = 0; j < N; ++j) {
#pragma unroll
                for (i32 e = 0; e < 4; ++e) {
                    sum[i][j][e] = 0;
                }
            }
        }
    }

#if MATH == MATH_HALF
    __device__ __forceinline__ void start(const T* a, const T* b) {
        const u32 a_at = smem_addr(a), b_at = smem_addr(b);
        // The row of an 8x8 matrix whose address this lane gives, and which of four matrices it belongs to.
        const i32 r = lane & 7, low = (lane >> 3 & 1) * 8, high = (lane >> 4) * 8;
#pragma unroll
        for (i32 k = 0; k < BK; k += 16) {
            u32 left[M][4], right[N / 2][4];
#pragma unroll
            for (i32 i = 0; i < M; ++i) {
                if constexpr (A_ROWS) {
                    ldmatrix_x4(left[i], a_at + ((row + i * 16 + low + r) * A_STRIDE + k + high) * 2);
                } else {
                    ldmatrix_x4_trans(left[i], a_at + ((k + high + r) * A_STRIDE + row + i * 16 + low) * 2);
                }
            }
#pragma unroll
            for (i32 j = 0; j < N / 2; ++j) {
                ldmatrix_x4_trans(right[j], b_at + ((k + low + r) * B_STRIDE + col + j * 16 + high) * 2);
            }
#pragma unroll
            for (i32 i = 0; i < M; ++i) {
#pragma unroll
                for (i32 j = 0; j < N; ++j) {
                    const u32 pair[2] = {right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]};
                    mma<T>(sum[i][j], left[i], pair);
                }
            }
        }
    }
#else
    // What TF32 leaves of `x`; nothing of an infinity.
    static __device__ __forceinline__ u32 rest(u32 x, u32 rounded) {
        return finite_or_zero(rounded) == rounded ? f32_to_tf32(__uint_as_float(x) - __uint_as_float(rounded)) : 0;
    }

    __device__ __forceinline__ void start(const T* a, const T* b) {
        const u32 a_at = smem_addr(a);
        const i32 r = lane & 7, low = (lane >> 3 & 1) * 8, high = (lane >> 4) * 4;
        const i32 k_of = lane % 4, of = lane / 4;
#pragma unroll
        for (i32 k = 0; k < BK; k += 8) {
            u32 left[M][4], left_rest[MATH == MATH_TF32X3 ? M : 1][4];
#pragma unroll
            for (i32 i = 0; i < M; ++i) {
                if constexpr (A_ROWS) {
                    ldmatrix_x4(left[i], a_at + ((row + i * 16 + low + r) * A_STRIDE + k + high) * 4);
                } else {
#pragma unroll
                    for (i32 e = 0; e < 4; ++e) {
                        left[i][e] = __float_as_uint(a[(k + k_of + e / 2 * 4) * A_STRIDE + row + i * 16 + of + e % 2 * 8]);
                    }
                }
#pragma unroll
                for (i32 e = 0; e < 4; ++e) {
                    const u32 x = left[i][e];
                    left[i][e] = f32_to_tf32(__uint_as_float(x));
                    if constexpr (MATH == MATH_TF32X3) {
                        left_rest[i][e] = rest(x, left[i][e]);
                    }
                }
            }
#pragma unroll
            for (i32 j = 0; j < N; ++j) {
                u32 right[2], right_rest[2];
#pragma unroll
                for (i32 e = 0; e < 2; ++e) {
                    const float x = b[(k + k_of + e * 4) * B_STRIDE + col + j * 8 + of];
                    right[e] = f32_to_tf32(x);
                    if constexpr (MATH == MATH_TF32X3) {
                        right_rest[e] = rest(__float_as_uint(x), right[e]);
                    }
                }
#pragma unroll
                for (i32 i = 0; i < M; ++i) {
                    if constexpr (MATH == MATH_TF32X3) {
                        // Infinities are for the last product alone: here they would meet rests, which may be zero or of any sign.
                        const u32 finite[4] = {
                            finite_or_zero(left[i][0]), finite_or_zero(left[i][1]), finite_or_zero(left[i][2]), finite_or_zero(left[i][3])};
                        const u32 right_finite[2] = {finite_or_zero(right[0]), finite_or_zero(right[1])};
                        mma_tf32(sum[i][j], left_rest[i], right_finite);
                        mma_tf32(sum[i][j], finite, right_rest);
                    }
                    mma_tf32(sum[i][j], left[i], right);
                }
            }
        }
    }
#endif

    __device__ __forceinline__ void finish() {}

    template <class P, class F> __device__ __forceinline__ void each(P prepare, F use) {
#pragma unroll
        for (i32 j = 0; j < N; ++j) {
            const i32 column = col + j * 8 + lane % 4 * 2;
            const auto prepared = prepare(column);
#pragma unroll
            for (i32 i = 0; i < M; ++i) {
#pragma unroll
                for (i32 half = 0; half < 2; ++half) {
                    const float two[2] = {sum[i][j][half * 2], sum[i][j][half * 2 + 1]};
                    use(prepared, row + i * 16 + half * 8 + lane / 4, column, two);
                }
            }
        }
    }
};

#endif

// Multiplies a stage whose copies this thread has waited for, and calls `copy` to fetch another one: before, where the thread itself multiplies, or meanwhile.
template <class F> __device__ __forceinline__ void multiply_stage(Tile& tile, const T* stage, F copy) {
    if constexpr (MATH == MATH_WARPGROUP) {
        tile.start(stage, stage + A_SIZE);
        copy();
        tile.finish();
    } else {
        copy();
        tile.start(stage, stage + A_SIZE);
    }
}

// Waits until all but the `N` latest stages that were copied can be read.
template <int N> __device__ __forceinline__ void await_stage() {
    copies_wait<N>();
    if constexpr (MATH == MATH_WARPGROUP) {
        fence_proxy_async();
    }
    __syncthreads();
}

// `GROUP` elements of a row, of which those from `end` on do not exist; `together` says that whole groups may be stored at once.
template <class E, class F> __device__ __forceinline__ void store_group(E* at, i32 col, i32 end, bool together, F value) {
    if (together && col + GROUP <= end) {
        Pack<E, GROUP> pack;
#pragma unroll
        for (i32 e = 0; e < GROUP; ++e) {
            pack.x[e] = narrow<E>(value(e));
        }
        *(Pack<E, GROUP>*)at = pack;
    } else {
#pragma unroll
        for (i32 e = 0; e < GROUP; ++e) {
            if (col + e < end) {
                at[e] = narrow<E>(value(e));
            }
        }
    }
}
