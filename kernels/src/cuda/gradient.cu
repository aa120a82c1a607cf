// What clipping does to gradients: sums of squares in f64 over a list of tensors, and scaling and clamping in place. T: type of the elements.
#include "kiln.cuh"

// What a launch's parameters leave room for.
struct Table {
    u64 words[480];
};

constexpr int THREADS = 256;
constexpr int VEC = 16 / sizeof(T);
// Elements of a block: `CHUNK` of gradient.rs.
constexpr int CHUNK = 16384;

typedef Pack<T, VEC> Vector;

__device__ __forceinline__ double square(T x) {
    const double wide = widen(x);
    return wide * wide;
}

// partials[block] = Σ x² of a chunk of one of the tensors: words are elements, first block, address.
extern "C" __global__ void __launch_bounds__(THREADS) squares(const __grid_constant__ Table table, i32 count, double* partials) {
    i32 low = 0, high = count;
    while (high - low > 1) {
        const i32 middle = (low + high) / 2;
        if (table.words[middle * 3 + 1] <= blockIdx.x) {
            low = middle;
        } else {
            high = middle;
        }
    }
    const u64* slot = table.words + low * 3;
    const i64 start = (i64)(blockIdx.x - slot[1]) * CHUNK;
    const i64 rest = (i64)slot[0] - start;
    const int len = rest < CHUNK ? (int)rest : CHUNK;
    const T* x = (const T*)slot[2] + start;
    const int whole = slot[2] % 16 == 0 ? len / VEC * VEC : 0;
    // Several sums, so that additions need not wait for one another.
    double sums[VEC] = {};
#pragma unroll 4
    for (int i = threadIdx.x * VEC; i < whole; i += THREADS * VEC) {
        const Vector v = *(const Vector*)(x + i);
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            sums[j] += square(v.x[j]);
        }
    }
    for (int i = whole + threadIdx.x; i < len; i += THREADS) {
        sums[0] += square(x[i]);
    }
    double sum = 0;
#pragma unroll
    for (int j = 0; j < VEC; ++j) {
        sum += sums[j];
    }
    __shared__ double scratch[THREADS / 32];
    sum = block_sum<THREADS>(sum, scratch);
    if (threadIdx.x == 0) {
        partials[blockIdx.x] = sum;
    }
}
KILN_KERNEL(squares)

// total[0] = the sum of `n` numbers. One block.
extern "C" __global__ void __launch_bounds__(THREADS) total(const double* partials, i64 n, double* total) {
    double sum = 0;
    for (i64 i = threadIdx.x; i < n; i += THREADS) {
        sum += partials[i];
    }
    __shared__ double scratch[THREADS / 32];
    sum = block_sum<THREADS>(sum, scratch);
    if (threadIdx.x == 0) {
        total[0] = sum;
    }
}
KILN_KERNEL(total)

// The root of a total of squares, and what brings it to `max_norm`: 1 if it is not larger, NaN if it is not finite.
extern "C" __global__ void clip_factor(const double* total, double max_norm, double* norm, double* factor) {
    const double root = __dsqrt_rn(total[0]);
    const double clip = __ddiv_rn(max_norm, __dadd_rn(root, 1e-6));
    const double nothing = root - root;
    norm[0] = root;
    factor[0] = nothing == 0 ? (clip < 1 ? clip : 1.0) : nothing;
}
KILN_KERNEL(clip_factor)

template <class F> __device__ __forceinline__ void for_each(T* x, i64 n, F f) {
    const i64 whole = (u64)x % 16 == 0 ? n / VEC : 0;
    for (i64 i = global_thread(); i < whole; i += global_threads()) {
        Vector v = ((Vector*)x)[i];
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            v.x[j] = f(v.x[j]);
        }
        ((Vector*)x)[i] = v;
    }
    for (i64 i = whole * VEC + global_thread(); i < n; i += global_threads()) {
        x[i] = f(x[i]);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) scale(T* x, i64 n, Compute<T> factor) {
    for_each(x, n, [=](T v) { return narrow<T>(widen(v) * factor); });
}
KILN_KERNEL(scale)

// The bounds are values of T, widened.
extern "C" __global__ void __launch_bounds__(THREADS) clamp(T* x, i64 n, Compute<T> low, Compute<T> high) {
    for_each(x, n, [=](T v) {
        const Compute<T> wide = widen(v);
        return wide < low ? narrow<T>(low) : wide > high ? narrow<T>(high) : v;
    });
}
KILN_KERNEL(clamp)
