// What softmax and cross-entropy share: exponentials, and their sum over a line relative to its largest element. VEC neighbours move as one
// access if ALIGNED.
#pragma once
#include "kiln.cuh"

typedef Compute<T> C;

__device__ __forceinline__ C exponential(C x) {
    if constexpr (is_half_type<T>) {
        return ex2_approx(x * 1.4426950408889634f);
    } else if constexpr (Same<C, float>::value) {
        return expf(x);
    } else {
        return exp(x);
    }
}
__device__ __forceinline__ C logarithm(C x) {
    if constexpr (Same<C, float>::value) {
        return logf(x);
    } else {
        return log(x);
    }
}
// The larger; a NaN may be lost: it comes back in the sum of the exponentials.
__device__ __forceinline__ C larger(C a, C b) {
    return a > b ? a : b;
}
__device__ __forceinline__ C lowest() {
    return -(C)__int_as_float(0x7f800000);
}

// What a forward pass knows of a line: the exponentials' sum relative to `top`.
struct Scaled {
    C top;
    double sum;
};
__device__ __forceinline__ double rescaled(Scaled a, C top) {
    return a.top == top || a.sum == 0 ? a.sum : a.sum * exp((double)a.top - (double)top);
}
// Adds the exponentials of N elements; missing ones are −∞.
template <int N> __device__ __forceinline__ void accumulate(Scaled& acc, const C (&x)[N]) {
    C part[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
        part[i] = x[i];
    }
    tree<N>(part, larger);
    const C top = larger(part[0], acc.top);
    if (top > acc.top) {
        acc.sum = rescaled(acc, top);
        acc.top = top;
    }
    // Relative to 0 while there are only −∞ (which add 0) and NaN.
    const C shift = top > lowest() ? top : C(0);
#pragma unroll
    for (int i = 0; i < N; ++i) {
        part[i] = exponential(x[i] - shift);
    }
    tree<N>(part, [](C a, C b) { return a + b; });
    acc.sum += (double)part[0];
}

// Reads VEC elements of which `left` exist; the others are `missing`.
__device__ __forceinline__ void read(const T* p, i64 left, C missing, C* to) {
    alignas(sizeof(T) * VEC) T raw[VEC];
#if ALIGNED
    if (left >= VEC) {
        *(Pack<T, VEC>*)raw = *(const Pack<T, VEC>*)p;
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            to[j] = widen<T>(raw[j]);
        }
        return;
    }
#endif
#pragma unroll
    for (int j = 0; j < VEC; ++j) {
        if (j < left) {
            raw[j] = p[j];
        }
    }
#pragma unroll
    for (int j = 0; j < VEC; ++j) {
        to[j] = j < left ? widen<T>(raw[j]) : missing;
    }
}

__device__ __forceinline__ void write(T* p, i64 left, const C* from) {
#if ALIGNED
    if (left >= VEC) {
        alignas(sizeof(T) * VEC) T raw[VEC];
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            raw[j] = narrow<T>(from[j]);
        }
        *(Pack<T, VEC>*)p = *(Pack<T, VEC>*)raw;
        return;
    }
#endif
#pragma unroll
    for (int j = 0; j < VEC; ++j) {
        if (j < left) {
            store(p + j, from[j]);
        }
    }
}
