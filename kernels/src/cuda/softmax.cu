// Softmax and log-softmax along the middle of [outer, n, inner], forward and backward.
//
// Macros: T; BLOCK (threads); KIND (0 softmax, 1 its logarithm, 2 and 3 their backward passes); PATTERN:
//   0: inner = 1, LANES threads (a warp or less of it, or a block) hold a row in registers;
//   1: inner = 1, a block of LANES threads reads a row that is too long for registers twice;
//   2: columns in registers, LANES threads side by side, each with VEC neighbouring columns;
//   3: columns that are too long for registers, read twice.
// BLOCK: threads of a block (LANES of them where a row is a block's);
// VEC elements are neighbours in a thread, and move as one access if ALIGNED; ITEMS such groups are in a thread's registers (or in a batch).
#include "softmax.cuh"

constexpr bool LOG = KIND % 2 == 1;
constexpr bool BACKWARD = KIND >= 2;
[[maybe_unused]] constexpr int VALUES = ITEMS * VEC;

// The term of a backward pass' sum.
__device__ __forceinline__ C term(C g, C y) {
    return LOG ? g : g * y;
}
__device__ __forceinline__ C gradient(C g, C y, C sum) {
    return LOG ? g - exponential(y) * sum : (g - sum) * y;
}

__device__ __forceinline__ C forward(C x, C top, C scale, C log) {
    return LOG ? x - top - log : exponential(x - top) * scale;
}

#if PATTERN == 0
constexpr int PER_BLOCK = BLOCK / LANES;

template <class F> __device__ __forceinline__ C over_lanes(C x, F combine, C* scratch) {
    if constexpr (LANES > 32) {
        return block_reduce<LANES>(x, combine, scratch);
    } else {
#pragma unroll
        for (int step = LANES / 2; step > 0; step >>= 1) {
            x = combine(x, __shfl_xor_sync(0xffffffffu, x, step));
        }
        return x;
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK) softmax_rows(const T* a, const T* b, T* out, i64 outer, i64 n) {
    __shared__ C scratch[32];
    const int lane = threadIdx.x % LANES;
    for (i64 first = (i64)blockIdx.x * PER_BLOCK; first < outer; first += (i64)gridDim.x * PER_BLOCK) {
        const i64 row = first + threadIdx.x / LANES;
        const i64 base = row * n, end = row < outer ? n : 0;
        C v[VALUES], w[VALUES];
#pragma unroll
        for (int k = 0; k < ITEMS; ++k) {
            const i64 at = (k * LANES + lane) * VEC;
            read(a + base + at, end - at, BACKWARD ? C(0) : lowest(), v + k * VEC);
            if constexpr (BACKWARD) {
                read(b + base + at, end - at, C(0), w + k * VEC);
            }
        }
        C part[VALUES];
        auto add = [](C a, C b) { return a + b; };
        if constexpr (BACKWARD) {
#pragma unroll
            for (int i = 0; i < VALUES; ++i) {
                part[i] = term(v[i], w[i]);
            }
            tree<VALUES>(part, add);
            const C sum = over_lanes(part[0], add, scratch);
#pragma unroll
            for (int i = 0; i < VALUES; ++i) {
                v[i] = gradient(v[i], w[i], sum);
            }
        } else {
#pragma unroll
            for (int i = 0; i < VALUES; ++i) {
                part[i] = v[i];
            }
            tree<VALUES>(part, larger);
            const C top = over_lanes(part[0], larger, scratch);
#pragma unroll
            for (int i = 0; i < VALUES; ++i) {
                v[i] = v[i] - top;
                part[i] = exponential(v[i]);
                v[i] = LOG ? v[i] : part[i];
            }
            tree<VALUES>(part, add);
            const C sum = over_lanes(part[0], add, scratch);
            const C scale = LOG ? logarithm(sum) : C(1) / sum;
#pragma unroll
            for (int i = 0; i < VALUES; ++i) {
                v[i] = LOG ? v[i] - scale : v[i] * scale;
            }
        }
#pragma unroll
        for (int k = 0; k < ITEMS; ++k) {
            const i64 at = (k * LANES + lane) * VEC;
            write(out + base + at, end - at, v + k * VEC);
        }
    }
}
KILN_KERNEL(softmax_rows)
#endif

#if PATTERN == 1
extern "C" __global__ void __launch_bounds__(LANES) softmax_long_rows(const T* a, const T* b, T* out, i64 outer, i64 n) {
    __shared__ C tops[LANES / 32];
    __shared__ double sums[LANES / 32];
    constexpr i64 STEP = (i64)LANES * VALUES;
    for (i64 row = blockIdx.x; row < outer; row += gridDim.x) {
        const i64 base = row * n;
        Scaled acc{lowest(), 0};
        for (i64 start = 0; start < n; start += STEP) {
            C v[VALUES], w[VALUES];
#pragma unroll
            for (int k = 0; k < ITEMS; ++k) {
                const i64 at = start + (k * LANES + (int)threadIdx.x) * VEC;
                read(a + base + at, n - at, BACKWARD ? C(0) : lowest(), v + k * VEC);
                if constexpr (BACKWARD) {
                    read(b + base + at, n - at, C(0), w + k * VEC);
                }
            }
            if constexpr (BACKWARD) {
#pragma unroll
                for (int i = 0; i < VALUES; ++i) {
                    v[i] = term(v[i], w[i]);
                }
                tree<VALUES>(v, [](C a, C b) { return a + b; });
                acc.sum += (double)v[0];
            } else {
                accumulate(acc, v);
            }
        }
        if constexpr (!BACKWARD) {
            const C top = block_reduce<LANES>(acc.top, larger, tops);
            acc = Scaled{top, rescaled(acc, top)};
        }
        const double sum = block_sum<LANES>(acc.sum, sums);
        const C scale = BACKWARD ? (C)sum : LOG ? C(0) : (C)(1.0 / sum), log = LOG && !BACKWARD ? (C)::log(sum) : C(0);
        // From the end: what was read last is still in the caches.
        for (i64 start = (n - 1) / STEP * STEP; start >= 0; start -= STEP) {
            C v[VALUES], w[VALUES];
#pragma unroll
            for (int k = 0; k < ITEMS; ++k) {
                const i64 at = start + (k * LANES + (int)threadIdx.x) * VEC;
                read(a + base + at, n - at, C(0), v + k * VEC);
                if constexpr (BACKWARD) {
                    read(b + base + at, n - at, C(0), w + k * VEC);
                }
            }
#pragma unroll
            for (int i = 0; i < VALUES; ++i) {
                v[i] = BACKWARD ? gradient(v[i], w[i], scale) : forward(v[i], acc.top, scale, log);
            }
#pragma unroll
            for (int k = 0; k < ITEMS; ++k) {
                const i64 at = start + (k * LANES + (int)threadIdx.x) * VEC;
                write(out + base + at, n - at, v + k * VEC);
            }
        }
    }
}
KILN_KERNEL(softmax_long_rows)
#endif

#if PATTERN >= 2
// Combines a value of each of a thread's columns over the threads below one another, of which there are a power of two.
template <class A, class F> __device__ __forceinline__ void over_column(A (&x)[VEC], F combine, A (*scratch)[BLOCK]) {
    if constexpr (BLOCK > LANES) {
        __syncthreads();
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            scratch[j][threadIdx.x] = x[j];
        }
        for (int half = BLOCK / LANES / 2; half > 0; half /= 2) {
            __syncthreads();
            if ((int)threadIdx.x / LANES < half) {
#pragma unroll
                for (int j = 0; j < VEC; ++j) {
                    scratch[j][threadIdx.x] = combine(scratch[j][threadIdx.x], scratch[j][threadIdx.x + half * LANES]);
                }
            }
        }
        __syncthreads();
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            x[j] = scratch[j][threadIdx.x % LANES];
        }
    }
}
constexpr int DOWN = BLOCK / LANES;
#endif

#if PATTERN == 2
extern "C" __global__ void __launch_bounds__(BLOCK) softmax_columns(const T* a, const T* b, T* out, i64 outer, i64 n, i64 inner) {
    __shared__ C scratch[VEC][BLOCK];
    const i64 packs = inner / VEC, lines = outer * packs;
    const int ty = threadIdx.x / LANES;
    for (i64 first = (i64)blockIdx.x * LANES; first < lines; first += (i64)gridDim.x * LANES) {
        const i64 line = first + threadIdx.x % LANES;
        const i64 end = line < lines ? n : 0;
        const i64 base = line / packs * n * inner + line % packs * VEC;
        C v[ITEMS][VEC], w[ITEMS][VEC];
#pragma unroll
        for (int k = 0; k < ITEMS; ++k) {
            const i64 row = k * DOWN + ty;
            read(a + base + row * inner, row < end ? VEC : 0, BACKWARD ? C(0) : lowest(), v[k]);
            if constexpr (BACKWARD) {
                read(b + base + row * inner, row < end ? VEC : 0, C(0), w[k]);
            }
        }
        auto add = [](C a, C b) { return a + b; };
        C sum[VEC];
        if constexpr (BACKWARD) {
#pragma unroll
            for (int j = 0; j < VEC; ++j) {
                C part[ITEMS];
#pragma unroll
                for (int k = 0; k < ITEMS; ++k) {
                    part[k] = term(v[k][j], w[k][j]);
                }
                tree<ITEMS>(part, add);
                sum[j] = part[0];
            }
            over_column(sum, add, scratch);
        } else {
            C top[VEC];
#pragma unroll
            for (int j = 0; j < VEC; ++j) {
                top[j] = v[0][j];
#pragma unroll
                for (int k = 1; k < ITEMS; ++k) {
                    top[j] = larger(top[j], v[k][j]);
                }
            }
            over_column(top, larger, scratch);
#pragma unroll
            for (int j = 0; j < VEC; ++j) {
                C part[ITEMS];
#pragma unroll
                for (int k = 0; k < ITEMS; ++k) {
                    v[k][j] = v[k][j] - top[j];
                    part[k] = exponential(v[k][j]);
                    v[k][j] = LOG ? v[k][j] : part[k];
                }
                tree<ITEMS>(part, add);
                sum[j] = part[0];
            }
            over_column(sum, add, scratch);
#pragma unroll
            for (int j = 0; j < VEC; ++j) {
                sum[j] = LOG ? logarithm(sum[j]) : C(1) / sum[j];
            }
        }
#pragma unroll
        for (int k = 0; k < ITEMS; ++k) {
            const i64 row = k * DOWN + ty;
#pragma unroll
            for (int j = 0; j < VEC; ++j) {
                v[k][j] = BACKWARD ? gradient(v[k][j], w[k][j], sum[j]) : LOG ? v[k][j] - sum[j] : v[k][j] * sum[j];
            }
            write(out + base + row * inner, row < end ? VEC : 0, v[k]);
        }
    }
}
KILN_KERNEL(softmax_columns)
#endif

#if PATTERN == 3
extern "C" __global__ void __launch_bounds__(BLOCK) softmax_long_columns(const T* a, const T* b, T* out, i64 outer, i64 n, i64 inner) {
    __shared__ C tops[VEC][BLOCK];
    __shared__ double sums[VEC][BLOCK];
    const i64 packs = inner / VEC, lines = outer * packs;
    const int ty = threadIdx.x / LANES;
    for (i64 first = (i64)blockIdx.x * LANES; first < lines; first += (i64)gridDim.x * LANES) {
        const i64 line = first + threadIdx.x % LANES;
        const i64 end = line < lines ? n : 0;
        const i64 base = line / packs * n * inner + line % packs * VEC;
        Scaled acc[VEC];
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            acc[j] = Scaled{lowest(), 0};
        }
        for (i64 start = 0; start < end; start += DOWN * ITEMS) {
            C v[ITEMS][VEC], w[ITEMS][VEC];
#pragma unroll
            for (int k = 0; k < ITEMS; ++k) {
                const i64 row = start + k * DOWN + ty;
                read(a + base + row * inner, row < end ? VEC : 0, BACKWARD ? C(0) : lowest(), v[k]);
                if constexpr (BACKWARD) {
                    read(b + base + row * inner, row < end ? VEC : 0, C(0), w[k]);
                }
            }
#pragma unroll
            for (int j = 0; j < VEC; ++j) {
                C part[ITEMS];
#pragma unroll
                for (int k = 0; k < ITEMS; ++k) {
                    part[k] = BACKWARD ? term(v[k][j], w[k][j]) : v[k][j];
                }
                if constexpr (BACKWARD) {
                    tree<ITEMS>(part, [](C a, C b) { return a + b; });
                    acc[j].sum += (double)part[0];
                } else {
                    accumulate(acc[j], part);
                }
            }
        }
        C top[VEC];
        double sum[VEC];
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            top[j] = acc[j].top;
        }
        if constexpr (!BACKWARD) {
            over_column(top, larger, tops);
        }
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            sum[j] = BACKWARD ? acc[j].sum : rescaled(acc[j], top[j]);
        }
        over_column(sum, [](double a, double b) { return a + b; }, sums);
        C scale[VEC], log[VEC];
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            scale[j] = BACKWARD ? (C)sum[j] : LOG ? C(0) : (C)(1.0 / sum[j]);
            log[j] = LOG && !BACKWARD ? (C)::log(sum[j]) : C(0);
        }
        for (i64 start = end > 0 ? (end - 1) / (DOWN * ITEMS) * (DOWN * ITEMS) : -1; start >= 0; start -= DOWN * ITEMS) {
            C v[ITEMS][VEC], w[ITEMS][VEC];
#pragma unroll
            for (int k = 0; k < ITEMS; ++k) {
                const i64 row = start + k * DOWN + ty;
                read(a + base + row * inner, row < end ? VEC : 0, C(0), v[k]);
                if constexpr (BACKWARD) {
                    read(b + base + row * inner, row < end ? VEC : 0, C(0), w[k]);
                }
            }
#pragma unroll
            for (int k = 0; k < ITEMS; ++k) {
                const i64 row = start + k * DOWN + ty;
#pragma unroll
                for (int j = 0; j < VEC; ++j) {
                    v[k][j] = BACKWARD ? gradient(v[k][j], w[k][j], scale[j]) : forward(v[k][j], top[j], scale[j], log[j]);
                }
                write(out + base + row * inner, row < end ? VEC : 0, v[k]);
            }
        }
    }
}
KILN_KERNEL(softmax_long_columns)
#endif
