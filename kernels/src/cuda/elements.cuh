// Where a reduction finds its elements: in memory, or (with CHAIN=1) as results of the function `chained` of CHAINED operands, which stands before it.
#pragma once
#include "kiln.cuh"

// Where elements are found, by their offsets.
struct Memory {
    const T* x;
    __device__ __forceinline__ Memory from(i64 offset) const {
        return Memory{x + offset};
    }
    // N neighbours by one access.
    template <int N> __device__ __forceinline__ void pack(T* to) const {
        *(Pack<T, N>*)to = *(const Pack<T, N>*)x;
    }
    // The first `count` of N elements that are `stride` apart, and zeros for those that are missing.
    template <int N> __device__ __forceinline__ void strided(i64 stride, i64 count, T* to) const {
        if (count >= N) {
#pragma unroll
            for (int j = 0; j < N; ++j) {
                to[j] = x[j * stride];
            }
            return;
        }
#pragma unroll
        for (int j = 0; j < N; ++j) {
            to[j] = T{};
            if (j < count) {
                to[j] = x[j * stride];
            }
        }
    }
};

#if CHAIN
// Elements that are made as they are read. Offsets are those of a dense result of the operands' order.
struct Made {
    const Operands* in;
    i64 base;
    __device__ __forceinline__ Made from(i64 offset) const {
        return Made{in, base + offset};
    }
    // One after the other: the chain N times over would be most of a kernel's code, and of the time that it takes to compile.
    template <int N> __device__ __forceinline__ void strided(i64 stride, i64 count, T* to) const {
        T made[N] = {};
#pragma unroll 1
        for (int j = 0; j < N && j < count; ++j) {
            from(j * stride).pack<1>(made + j);
        }
#pragma unroll
        for (int j = 0; j < N; ++j) {
            to[j] = made[j];
        }
    }
    template <int N> __device__ __forceinline__ void pack(T* to) const {
        A v[CHAINED][N];
#pragma unroll
        for (int k = 0; k < CHAINED; ++k) {
            read<T, N>(*in, k, base, v[k]);
        }
        const A none[2] = {};
#pragma unroll
        for (int j = 0; j < N; ++j) {
            A x[CHAINED];
#pragma unroll
            for (int k = 0; k < CHAINED; ++k) {
                x[k] = v[k][j];
            }
            chained(x, none, to + j);
        }
    }
};
typedef Operands Input;
typedef Made Elements;
__device__ __forceinline__ Made elements(const Operands& in) {
    return Made{&in, 0};
}
#else
typedef const T* Input;
typedef Memory Elements;
__device__ __forceinline__ Memory elements(const T* x) {
    return Memory{x};
}
#endif
