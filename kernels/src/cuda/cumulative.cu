// Cumulative sums along the middle of [outer, n, inner], in f64 or i64, from either end (step i of a line is element n − 1 − i if REVERSE).
//
// Where lines are few, they are cut into parts of `part` steps: a first kernel sums each part, and each part of the second begins with
// the sum of those before it. Macros: T, REVERSE.
#include "kiln.cuh"

template <bool FLOAT> struct WideOf {
    typedef double type;
};
template <> struct WideOf<false> {
    typedef i64 type;
};
template <bool FLOAT> struct TotalOf {
    typedef T type;
};
template <> struct TotalOf<false> {
    typedef i64 type;
};
typedef typename WideOf<is_float_type<T>>::type Wide;
typedef typename TotalOf<is_float_type<T>>::type Total;

constexpr int BLOCK = 256;
constexpr int ITEMS = 8;
constexpr int TILE = BLOCK * ITEMS;

__device__ __forceinline__ Wide value(const T* x, i64 at) {
    return (Wide)load(x + at);
}
template <class Out> __device__ __forceinline__ void put(Out* y, i64 at, Wide x) {
    if constexpr (is_float_type<T>) {
        store(y + at, (Compute<T>)x);
    } else {
        y[at] = x;
    }
}
__device__ __forceinline__ i64 place(i64 step, i64 n) {
    return REVERSE ? n - 1 - step : step;
}

// ---- inner = 1: a block for each part of each line ----

// `totals` is [parts, lines].
extern "C" __global__ void __launch_bounds__(BLOCK) line_totals(const T* x, Wide* totals, i64 lines, i64 n, i64 parts, i64 part) {
    __shared__ Wide scratch[BLOCK / 32];
    for (i64 task = blockIdx.x; task < lines * parts; task += gridDim.x) {
        const i64 line = task / parts, k = task % parts;
        const i64 end = (k + 1) * part < n ? (k + 1) * part : n;
        Wide sum = 0;
        for (i64 step = k * part + threadIdx.x; step < end; step += BLOCK) {
            sum += value(x + line * n, place(step, n));
        }
        sum = block_sum<BLOCK>(sum, scratch);
        if (threadIdx.x == 0) {
            totals[k * lines + line] = sum;
        }
    }
}
KILN_KERNEL(line_totals)

// Where element `i` of a tile lies in shared memory: neighbouring threads, which have ITEMS each, use different banks.
__device__ __forceinline__ int slot(int i) {
    return i + i / ITEMS;
}

// Part `k` of line `line`; `tile` and `scratch` are free once all threads have met.
__device__ __forceinline__ void scan_part(const T* x, Total* y, const Wide* totals, i64 lines, i64 n, i64 part, i64 line, i64 k, Wide* tile, Wide* scratch) {
    const i64 end = (k + 1) * part < n ? (k + 1) * part : n;
    Wide before = 0;
    for (i64 i = threadIdx.x; i < k; i += BLOCK) {
        before += totals[i * lines + line];
    }
    before = block_sum<BLOCK>(before, scratch);
    for (i64 start = k * part; start < end; start += TILE) {
        __syncthreads();
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            const int at = i * BLOCK + threadIdx.x;
            tile[slot(at)] = start + at < end ? value(x + line * n, place(start + at, n)) : Wide(0);
        }
        __syncthreads();
        Wide sums[ITEMS], sum = 0;
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            sums[i] = sum += tile[slot(threadIdx.x * ITEMS + i)];
        }
        // The sums of the threads up to each, and then of the warps.
        Wide up_to = sum;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const Wide other = __shfl_up_sync(0xffffffffu, up_to, step);
            up_to += threadIdx.x % 32 >= step ? other : Wide(0);
        }
        if (threadIdx.x % 32 == 31) {
            scratch[threadIdx.x / 32] = up_to;
        }
        __syncthreads();
        Wide first = before, all = before;
        for (int warp = 0; warp < BLOCK / 32; ++warp) {
            first += warp < (int)threadIdx.x / 32 ? scratch[warp] : Wide(0);
            all += scratch[warp];
        }
        // What this thread's own sum is left out of: exact for integers, and for floats the sum of the lanes below.
        const Wide below = __shfl_up_sync(0xffffffffu, up_to, 1);
        first += threadIdx.x % 32 == 0 ? Wide(0) : below;
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            tile[slot(threadIdx.x * ITEMS + i)] = first + sums[i];
        }
        before = all;
        __syncthreads();
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            const int at = i * BLOCK + threadIdx.x;
            if (start + at < end) {
                put(y + line * n, place(start + at, n), tile[slot(at)]);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK) scan_lines(const T* x, Total* y, const Wide* totals, i64 lines, i64 n, i64 parts, i64 part) {
    __shared__ Wide tile[TILE + TILE / ITEMS];
    __shared__ Wide scratch[BLOCK / 32];
    for (i64 task = blockIdx.x; task < lines * parts; task += gridDim.x) {
        __syncthreads();
        scan_part(x, y, totals, lines, n, part, task / parts, task % parts, tile, scratch);
    }
}
KILN_KERNEL(scan_lines)

// ---- inner > 1: a thread for each part of each column ----

extern "C" __global__ void __launch_bounds__(BLOCK) column_totals(const T* x, Wide* totals, i64 lines, i64 n, i64 inner, i64 parts, i64 part) {
    const i64 task = global_thread(), line = task % lines, k = task / lines;
    if (k >= parts) {
        return;
    }
    const i64 base = line / inner * n * inner + line % inner, end = (k + 1) * part < n ? (k + 1) * part : n;
    Wide sum = 0;
#pragma unroll 8
    for (i64 step = k * part; step < end; ++step) {
        sum += value(x, base + place(step, n) * inner);
    }
    totals[task] = sum;
}
KILN_KERNEL(column_totals)

extern "C" __global__ void __launch_bounds__(BLOCK)
    scan_columns(const T* x, Total* y, const Wide* totals, i64 lines, i64 n, i64 inner, i64 parts, i64 part) {
    const i64 task = global_thread(), line = task % lines, k = task / lines;
    if (k >= parts) {
        return;
    }
    const i64 base = line / inner * n * inner + line % inner, end = (k + 1) * part < n ? (k + 1) * part : n;
    Wide sum = 0;
    for (i64 i = 0; i < k; ++i) {
        sum += totals[i * lines + line];
    }
#pragma unroll 8
    for (i64 step = k * part; step < end; ++step) {
        const i64 at = base + place(step, n) * inner;
        sum += value(x, at);
        put(y, at, sum);
    }
}
KILN_KERNEL(scan_columns)
