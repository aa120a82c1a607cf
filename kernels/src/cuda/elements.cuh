// Where a reduction finds its elements: in memory, or (with CHAIN=1) as results of the function `chained` of CHAINED operands, which stands before it.
#pragma once
#include "kiln.cuh"

// Where elements are found, by their offsets.
struct Memory {
    const T* x;
    __device__ __forceinline__ Memory from(i64 offset) const {
        return Memory{x + offset};
    }
    __device__ __forceinline__ T at(i64 i) const {
        return x[i];
    }
    template <int N> __device__ __forceinline__ void pack(i64 i, T* to) const {
        *(Pack<T, N>*)to = *(const Pack<T, N>*)(x + i);
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
    __device__ __forceinline__ T at(i64 i) const {
        T to[1];
        pack<1>(i, to);
        return to[0];
    }
    template <int N> __device__ __forceinline__ void pack(i64 i, T* to) const {
        A v[CHAINED][N];
#pragma unroll
        for (int k = 0; k < CHAINED; ++k) {
            read<T, N>(*in, k, base + i, v[k]);
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
