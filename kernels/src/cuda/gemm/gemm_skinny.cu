// Matrix products with few rows or columns, at the speed at which the large factor can be read. Macros: those of gemm.cuh, PARTIAL as in gemm.cu, and
//   SWAP      0 if A has few rows (B is the large factor), 1 if B has few columns (A is),
//   FEW       how many are computed, at least as many as there are,
//   ALONG_K   1 if the large factor's k has stride 1, 0 if its other dimension, its rows here, has,
//   VECTOR    elements of it that are loaded at once along that dimension: more than 1 needs everything else aligned to as many,
//   FEW_ALONG_K   1 if the small factor may be loaded in the same way along k.
#include "kiln.cuh"
#include "gemm.cuh"

constexpr i32 WARPS = 8, THREADS = WARPS * 32;
// Rows of the large factor that a warp takes at once (along k): they share what is loaded of the small one.
constexpr i32 ROWS = FEW >= 4 ? 2 : 1;
// Steps whose loads are under way at once: with few sums, a step alone does not keep memory busy.
constexpr i32 UNROLL = FEW == 1 ? 4 : FEW == 2 ? 2 : 1, ROWS_UNROLL = FEW >= 4 ? 2 : 4;
// Lanes along the rows (not along k): with vectors, together 128 bytes.
constexpr i32 LANES = VECTOR > 1 ? 8 : 32;

// The large factor as R×k and the small one as FEW×k.
struct Sides {
    const T *large, *small;
    i64 large_row, large_k, small_row, small_k, rows, few;
};

__device__ __forceinline__ Sides sides_of(const GemmArgs& args, i64 batch) {
    const T *a = item_of(args.a, batch, args.batch_inner), *b = item_of(args.b, batch, args.batch_inner);
    if constexpr (SWAP) {
        return {a, b, args.a.row, args.a.col, args.b.col, args.b.row, args.m, args.n};
    } else {
        return {b, a, args.b.col, args.b.row, args.a.row, args.a.col, args.n, args.m};
    }
}

__device__ __forceinline__ void put(const GemmArgs& args, Sum sum, i64 split, i64 batch, i64 row, i64 which) {
    const i64 i = SWAP ? row : which, j = SWAP ? which : row;
    if constexpr (PARTIAL) {
        *partial_at(args, split, batch, i, j) = sum;
    } else {
        store_finished(args, sum, batch, i, j);
    }
}

// VECTOR elements from `p` on, of which `left` exist; the rest is zero.
template <bool CONTIGUOUS, bool WHOLE> __device__ __forceinline__ Pack<T, VECTOR> load_vector(const T* p, i64 stride, i64 left) {
    if constexpr (CONTIGUOUS && WHOLE) {
        return *(const Pack<T, VECTOR>*)p;
    } else {
        Pack<T, VECTOR> x;
#pragma unroll
        for (i32 e = 0; e < VECTOR; ++e) {
            x.x[e] = WHOLE || e < left ? p[e * stride] : T{};
        }
        return x;
    }
}

// One vector along k of each row of both sides.
template <bool WHOLE> __device__ __forceinline__ void add_products(Sum (&acc)[ROWS][FEW], const T* const (&large)[ROWS], const T* const (&small)[FEW], const Sides& sides,
    i64 k, i64 left) {
    Pack<T, VECTOR> x[ROWS];
#pragma unroll
    for (i32 r = 0; r < ROWS; ++r) {
        x[r] = load_vector<true, WHOLE>(large[r] + k, 1, left);
    }
#pragma unroll
    for (i32 f = 0; f < FEW; ++f) {
        const Pack<T, VECTOR> y = load_vector<FEW_ALONG_K, WHOLE>(small[f] + k * sides.small_k, sides.small_k, left);
#pragma unroll
        for (i32 r = 0; r < ROWS; ++r) {
#pragma unroll
            for (i32 e = 0; e < VECTOR; ++e) {
                acc[r][f] += (Sum)widen<T>(x[r].x[e]) * (Sum)widen<T>(y.x[e]);
            }
        }
    }
}

// A warp per ROWS rows; its lanes share k.
__device__ __forceinline__ void products_along_k(const GemmArgs& args) {
    const i64 rows = SWAP ? args.m : args.n;
    const i64 groups = (rows + ROWS - 1) / ROWS;
    const i64 units = groups * args.batch * args.splits;
    const i64 steps = (args.k + 32 * VECTOR - 1) / (32 * VECTOR);
    const i32 lane = threadIdx.x % 32;
    for (i64 unit = (i64)blockIdx.x * WARPS + threadIdx.x / 32; unit < units; unit += (i64)gridDim.x * WARPS) {
        const i64 item = unit / groups;
        const i64 batch = item / args.splits, split = item % args.splits;
        const i64 row0 = unit % groups * ROWS;
        const Sides sides = sides_of(args, batch);
        const T *large[ROWS], *small[FEW];
#pragma unroll
        for (i32 r = 0; r < ROWS; ++r) {
            large[r] = sides.large + min(row0 + r, sides.rows - 1) * sides.large_row;
        }
#pragma unroll
        for (i32 f = 0; f < FEW; ++f) {
            small[f] = sides.small + min((i64)f, sides.few - 1) * sides.small_row;
        }
        Sum acc[ROWS][FEW] = {};
        const i64 first = steps * split / args.splits, last = steps * (split + 1) / args.splits;
        // Steps that lie in k as a whole load without a question, so that several are under way at once.
        const i64 whole = min(last, args.k / (32 * VECTOR));
#pragma unroll UNROLL
        for (i64 step = first; step < whole; ++step) {
            add_products<true>(acc, large, small, sides, (step * 32 + lane) * VECTOR, VECTOR);
        }
        if (whole < last) {
            const i64 k = (whole * 32 + lane) * VECTOR;
            add_products<false>(acc, large, small, sides, k, args.k - k);
        }
#pragma unroll
        for (i32 r = 0; r < ROWS; ++r) {
#pragma unroll
            for (i32 f = 0; f < FEW; ++f) {
                const Sum sum = warp_sum(acc[r][f]);
                if (lane == 0 && row0 + r < sides.rows && f < sides.few) {
                    put(args, sum, split, batch, row0 + r, f);
                }
            }
        }
    }
}

// One vector along the rows at one k.
template <bool WHOLE> __device__ __forceinline__ void add_products(Sum (&acc)[FEW][VECTOR], const Sides& sides, i64 row, i64 k, i64 left) {
    const Pack<T, VECTOR> x = load_vector<true, WHOLE>(sides.large + k * sides.large_k + row, 1, left);
#pragma unroll
    for (i32 f = 0; f < FEW; ++f) {
        const Sum y = (Sum)load<T>(sides.small + min((i64)f, sides.few - 1) * sides.small_row + k * sides.small_k);
#pragma unroll
        for (i32 e = 0; e < VECTOR; ++e) {
            acc[f][e] += (Sum)widen<T>(x.x[e]) * y;
        }
    }
}

// A block per LANES · VECTOR rows, which are neighbours in memory; the other lanes and the warps share k.
__device__ __forceinline__ void products_along_rows(const GemmArgs& args) {
    constexpr i32 TILE = LANES * VECTOR, K_LANES = THREADS / LANES;
    static_assert(TILE <= THREADS);
    __shared__ Sum sums[WARPS][TILE];
    const i64 rows = SWAP ? args.m : args.n;
    const i64 tiles = (rows + TILE - 1) / TILE;
    const i64 units = tiles * args.batch * args.splits;
    const i64 steps = (args.k + K_LANES - 1) / K_LANES;
    const i32 my_rows = threadIdx.x % LANES * VECTOR, my_k = threadIdx.x / LANES;
    for (i64 unit = blockIdx.x; unit < units; unit += gridDim.x) {
        const i64 item = unit / tiles;
        const i64 batch = item / args.splits, split = item % args.splits;
        const i64 row0 = unit % tiles * TILE;
        const Sides sides = sides_of(args, batch);
        const i64 left = sides.rows - row0 - my_rows;
        Sum acc[FEW][VECTOR] = {};
        const i64 first = (steps * split / args.splits) * K_LANES + my_k, last = min(steps * (split + 1) / args.splits * K_LANES, args.k);
        if (left >= VECTOR) {
#pragma unroll ROWS_UNROLL
            for (i64 k = first; k < last; k += K_LANES) {
                add_products<true>(acc, sides, row0 + my_rows, k, left);
            }
        } else if (left > 0) {
            for (i64 k = first; k < last; k += K_LANES) {
                add_products<false>(acc, sides, row0 + my_rows, k, left);
            }
        }
#pragma unroll
        for (i32 f = 0; f < FEW; ++f) {
#pragma unroll
            for (i32 e = 0; e < VECTOR; ++e) {
#pragma unroll
                for (i32 step = LANES; step < 32; step *= 2) {
                    acc[f][e] += __shfl_xor_sync(0xffffffffu, acc[f][e], step);
                }
                if (threadIdx.x % 32 < LANES) {
                    sums[threadIdx.x / 32][my_rows + e] = acc[f][e];
                }
            }
            __syncthreads();
            if (threadIdx.x < TILE && row0 + threadIdx.x < sides.rows && f < sides.few) {
                Sum sum = sums[0][threadIdx.x];
                for (i32 w = 1; w < WARPS; ++w) {
                    sum += sums[w][threadIdx.x];
                }
                put(args, sum, split, batch, row0 + threadIdx.x, f);
            }
            __syncthreads();
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, FEW <= 2 ? 4 : FEW <= 4 ? 2 : 1) gemm_skinny(const GemmArgs args) {
    if constexpr (ALONG_K) {
        products_along_k(args);
    } else {
        products_along_rows(args);
    }
}
KILN_KERNEL(gemm_skinny)
