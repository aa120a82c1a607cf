// What every kernel file begins with: element types, the type that each computes in, strided walks, and sums of a warp and a block in a fixed order.
// No header of CUDA's is needed: NVRTC compiles this without a toolkit, and the host's compiler for the emulator (KILN_EMULATE).
#pragma once

typedef signed char i8;
typedef unsigned char u8;
typedef unsigned short u16;
typedef int i32;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;

#include "ptx.cuh"

#ifndef KILN_EMULATE
#define KILN_KERNEL(name)
#define KILN_KERNEL_CLUSTER(name, blocks)
#define KILN_SHARED(type, name) extern __shared__ __align__(1024) type name[]
#endif

// Half types are their bits; arithmetic on them is done in float.
struct f16 {
    u16 bits;
};
struct bf16 {
    u16 bits;
};

// The element type that a kernel file is compiled for.
#ifdef KILN_T
typedef KILN_T T;
#endif

template <class T> struct ComputeOf {
    typedef T type;
};
template <> struct ComputeOf<f16> {
    typedef float type;
};
template <> struct ComputeOf<bf16> {
    typedef float type;
};
// The type that arithmetic on T is done in.
template <class T> using Compute = typename ComputeOf<T>::type;

template <class A, class B> struct Same {
    static constexpr bool value = false;
};
template <class A> struct Same<A, A> {
    static constexpr bool value = true;
};
template <class T> constexpr bool is_half_type = Same<T, f16>::value || Same<T, bf16>::value;
template <class T> constexpr bool is_float_type = is_half_type<T> || Same<T, float>::value || Same<T, double>::value;

template <class T> __device__ __forceinline__ Compute<T> widen(T x) {
    if constexpr (Same<T, f16>::value) {
        return f16_to_f32(x.bits);
    } else if constexpr (Same<T, bf16>::value) {
        return __uint_as_float((u32)x.bits << 16);
    } else {
        return x;
    }
}

// Rounds to nearest even; NaN stays NaN.
template <class T> __device__ __forceinline__ T narrow(Compute<T> x) {
    if constexpr (Same<T, f16>::value) {
        return f16{f32_to_f16(x)};
    } else if constexpr (Same<T, bf16>::value) {
        return bf16{f32_to_bf16(x)};
    } else {
        return x;
    }
}

// The bits of an f32, and those of 0 in the place of an infinity or NaN.
__device__ __forceinline__ u32 finite_or_zero(u32 bits) {
    return (bits & 0x7fffffffu) < 0x7f800000u ? bits : 0;
}

template <class T> __device__ __forceinline__ Compute<T> load(const T* p) {
    return widen<T>(*p);
}
template <class T> __device__ __forceinline__ void store(T* p, Compute<T> x) {
    *p = narrow<T>(x);
}

// `N` elements that move as one access of up to 16 bytes.
template <class T, int N> struct alignas(sizeof(T) * N) Pack {
    T x[N];
};

// Where the elements of a tensor lie: extents and distances in elements, outermost first.
struct Strided {
    i32 rank;
    i64 shape[8];
    i64 strides[8];
};

// The offset of row-major element `i` of a view. Loops with a division a dimension are not unrolled, here and where offsets are found elsewhere: kernels
// inline them in dozens of places, and would be several times as long, and as long in compilation.
__device__ __forceinline__ i64 offset_of(const Strided& view, i64 i) {
    i64 offset = 0;
#pragma unroll 1
    for (int d = view.rank - 1; d > 0; --d) {
        i64 rest = i / view.shape[d];
        offset += (i - rest * view.shape[d]) * view.strides[d];
        i = rest;
    }
    return view.rank > 0 ? offset + i * view.strides[0] : 0;
}

__device__ __forceinline__ i64 global_thread() {
    return (i64)blockIdx.x * blockDim.x + threadIdx.x;
}
__device__ __forceinline__ i64 global_threads() {
    return (i64)gridDim.x * blockDim.x;
}

// Combines the values of a warp's 32 lanes by a butterfly, so that every lane has the result: always in the same order.
template <class A, class F> __device__ __forceinline__ A warp_reduce(A x, F combine) {
    for (int step = 16; step > 0; step >>= 1) {
        x = combine(x, __shfl_xor_sync(0xffffffffu, x, step));
    }
    return x;
}
template <class A> __device__ __forceinline__ A warp_sum(A x) {
    return warp_reduce(x, [](A a, A b) { return a + b; });
}

// Combines the values of a block's THREADS threads (a multiple of 32); every thread gets the result. `scratch` holds THREADS / 32 values.
template <int THREADS, class A, class F> __device__ __forceinline__ A block_reduce(A x, F combine, A* scratch) {
    x = warp_reduce(x, combine);
    if constexpr (THREADS > 32) {
        __syncthreads();
        if (threadIdx.x % 32 == 0) {
            scratch[threadIdx.x / 32] = x;
        }
        __syncthreads();
        x = scratch[0];
        for (int w = 1; w < THREADS / 32; ++w) {
            x = combine(x, scratch[w]);
        }
    }
    return x;
}
template <int THREADS, class A> __device__ __forceinline__ A block_sum(A x, A* scratch) {
    return block_reduce<THREADS>(x, [](A a, A b) { return a + b; }, scratch);
}

// Combines x[0 .. N) as a tree; the result is in x[0].
template <int N, int M, class L, class F> __device__ __forceinline__ void tree(L (&x)[M], F combine) {
    if constexpr (N > 1) {
#pragma unroll
        for (int i = 0; i < N / 2; ++i) {
            x[i] = combine(x[i], x[i + (N + 1) / 2]);
        }
        tree<(N + 1) / 2>(x, combine);
    }
}
