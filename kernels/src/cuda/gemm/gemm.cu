// The portable matrix product: every type, any strides, plain multiply-adds. Macros: those of gemm.cuh, TILE_M, TILE_N, TILE_K (a block's tile), THREAD_M, THREAD_N
// (a thread's, multiples of 4), PARTIAL (1: k is cut into args.splits parts, whose sums go to the workspace), and for each factor
//   A_ALONG_K, B_ALONG_K   1 if neighbouring threads load neighbours in k, 0 if in m or n: the dimension of stride 1 should be that one,
//   A_VECTOR, B_VECTOR     elements that are loaded at once along it: more than 1 needs stride 1, and all else aligned to as many elements.
//
// A block multiplies TILE_K of k from shared memory, as [k][m] and [k][n], while the next TILE_K are on their way to registers; two buffers, one barrier a step.
// A thread's tile is cut into quads of 4x4 that are spread over the block's, so that a warp reads whole lines of shared memory without bank conflicts.
#include "kiln.cuh"
#include "gemm.cuh"

constexpr i32 THREADS = (TILE_M / THREAD_M) * (TILE_N / THREAD_N);
// Blocks of a multiprocessor that its registers suffice for: 128 registers a thread.
#ifndef BLOCKS
#define BLOCKS (512 / THREADS)
#endif
constexpr i32 QUADS_M = THREAD_M / 4, QUADS_N = THREAD_N / 4;
// Keeps rows 16-byte aligned and moves the columns of neighbouring k to other banks.
constexpr i32 PAD = 4;
// A warp's threads in each direction.
constexpr i32 LANES_M = 4, LANES_N = 8;
constexpr i32 WARPS_N = TILE_N / THREAD_N / LANES_N;
static_assert(THREADS % 32 == 0 && (TILE_M / THREAD_M) % LANES_M == 0 && (TILE_N / THREAD_N) % LANES_N == 0);

// Brings EXTENT rows (of A: m, of B: n) by TILE_K of k from memory to registers, and from there to shared memory.
template <i32 EXTENT, bool ALONG_K, i32 VECTOR> struct Loader {
    static constexpr i32 VECTORS = EXTENT * TILE_K / THREADS / VECTOR;
    static constexpr i32 PER_LINE = (ALONG_K ? TILE_K : EXTENT) / VECTOR;
    static_assert(VECTORS * VECTOR * THREADS == EXTENT * TILE_K && PER_LINE * VECTOR == (ALONG_K ? TILE_K : EXTENT));
    Pack<T, VECTOR> held[VECTORS];

    static __device__ __forceinline__ void place(i32 i, i32& row, i32& k) {
        const i32 v = threadIdx.x + i * THREADS;
        row = ALONG_K ? v / PER_LINE : v % PER_LINE * VECTOR;
        k = ALONG_K ? v % PER_LINE * VECTOR : v / PER_LINE;
    }

    // `at` is the tile's first element; rows and ks are how many there are from it on. What lies outside is zero.
    __device__ __forceinline__ void fetch(const T* at, i64 row_stride, i64 k_stride, i64 rows, i64 ks) {
#pragma unroll
        for (i32 i = 0; i < VECTORS; ++i) {
            i32 row, k;
            place(i, row, k);
            const T* p = at + row * row_stride + k * k_stride;
            if (row + (ALONG_K ? 0 : VECTOR - 1) < rows && k + (ALONG_K ? VECTOR - 1 : 0) < ks) {
                held[i] = *(const Pack<T, VECTOR>*)p;
            } else {
#pragma unroll
                for (i32 e = 0; e < VECTOR; ++e) {
                    const bool inside = row + (ALONG_K ? 0 : e) < rows && k + (ALONG_K ? e : 0) < ks;
                    held[i].x[e] = inside ? p[e] : T{};
                }
            }
        }
    }

    __device__ __forceinline__ void put(Sum (*tile)[EXTENT + PAD]) const {
#pragma unroll
        for (i32 i = 0; i < VECTORS; ++i) {
            i32 row, k;
            place(i, row, k);
#pragma unroll
            for (i32 e = 0; e < VECTOR; ++e) {
                tile[k + (ALONG_K ? e : 0)][row + (ALONG_K ? 0 : e)] = (Sum)widen<T>(held[i].x[e]);
            }
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) gemm_tiled(const GemmArgs args) {
    __shared__ __align__(16) Sum a_tile[2][TILE_K][TILE_M + PAD];
    __shared__ __align__(16) Sum b_tile[2][TILE_K][TILE_N + PAD];
    const i32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const i32 my_row = (warp / WARPS_N * LANES_M + lane / LANES_N) * 4;
    const i32 my_col = (warp % WARPS_N * LANES_N + lane % LANES_N) * 4;
    const i64 rows = (args.m + TILE_M - 1) / TILE_M, cols = (args.n + TILE_N - 1) / TILE_N;
    const i64 steps = (args.k + TILE_K - 1) / TILE_K;
    const i64 units = rows * cols * args.batch * args.splits;
    for (i64 unit = blockIdx.x; unit < units; unit += gridDim.x) {
        const i64 item = unit / (rows * cols), tile = unit % (rows * cols);
        const i64 batch = item / args.splits, split = item % args.splits;
        const i64 row0 = tile % rows * TILE_M, col0 = tile / rows * TILE_N;
        const i64 first = steps * split / args.splits, last = steps * (split + 1) / args.splits;
        const T* a = item_of(args.a, batch, args.batch_inner) + row0 * args.a.row + first * TILE_K * args.a.col;
        const T* b = item_of(args.b, batch, args.batch_inner) + col0 * args.b.col + first * TILE_K * args.b.row;
        Loader<TILE_M, A_ALONG_K, A_VECTOR> a_loader;
        Loader<TILE_N, B_ALONG_K, B_VECTOR> b_loader;
        Sum acc[THREAD_M][THREAD_N] = {};
        a_loader.fetch(a, args.a.row, args.a.col, args.m - row0, args.k - first * TILE_K);
        b_loader.fetch(b, args.b.col, args.b.row, args.n - col0, args.k - first * TILE_K);
        a_loader.put(a_tile[0]);
        b_loader.put(b_tile[0]);
        __syncthreads();
        for (i64 step = first; step < last; ++step) {
            const i32 now = (step - first) & 1;
            const bool more = step + 1 < last;
            if (more) {
                a += TILE_K * args.a.col;
                b += TILE_K * args.b.row;
                a_loader.fetch(a, args.a.row, args.a.col, args.m - row0, args.k - (step + 1) * TILE_K);
                b_loader.fetch(b, args.b.col, args.b.row, args.n - col0, args.k - (step + 1) * TILE_K);
            }
#pragma unroll
            for (i32 k = 0; k < TILE_K; ++k) {
                Pack<Sum, 4> x[QUADS_M], y[QUADS_N];
#pragma unroll
                for (i32 q = 0; q < QUADS_M; ++q) {
                    x[q] = *(const Pack<Sum, 4>*)&a_tile[now][k][q * (TILE_M / QUADS_M) + my_row];
                }
#pragma unroll
                for (i32 q = 0; q < QUADS_N; ++q) {
                    y[q] = *(const Pack<Sum, 4>*)&b_tile[now][k][q * (TILE_N / QUADS_N) + my_col];
                }
#pragma unroll
                for (i32 i = 0; i < THREAD_M; ++i) {
#pragma unroll
                    for (i32 j = 0; j < THREAD_N; ++j) {
                        acc[i][j] += x[i / 4].x[i % 4] * y[j / 4].x[j % 4];
                    }
                }
            }
            if (more) {
                a_loader.put(a_tile[now ^ 1]);
                b_loader.put(b_tile[now ^ 1]);
            }
            __syncthreads();
        }
#pragma unroll
        for (i32 i = 0; i < THREAD_M; ++i) {
            const i64 row = row0 + i / 4 * (TILE_M / QUADS_M) + my_row + i % 4;
#pragma unroll
            for (i32 j = 0; j < THREAD_N; ++j) {
                const i64 col = col0 + j / 4 * (TILE_N / QUADS_N) + my_col + j % 4;
                if (row < args.m && col < args.n) {
                    if constexpr (PARTIAL) {
                        *partial_at(args, split, batch, row, col) = acc[i][j];
                    } else {
                        store_finished(args, acc[i][j], batch, row, col);
                    }
                }
            }
        }
    }
}
KILN_KERNEL(gemm_tiled)
