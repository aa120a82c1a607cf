// Operands of functions of one element of each: how they lie, and how they are read in the order of the result's memory.
//
// Macros: T (element type of the operands), OPERANDS.
#pragma once
#include "math.cuh"

typedef Compute<T> A;

struct Operands {
    // Null for a number.
    const void* data[OPERANDS];
    double number[OPERANDS];
    // What lies between neighbours of each dimension, where the operand does not lie like the result.
    i64 strides[OPERANDS][8];
    u8 is_strided[OPERANDS];
    double params[2];
    i64 shape[8];
    i32 rank;
    // Elements that a thread takes at a time: a 16-byte access of the result's order, or 1.
    i32 width;
    i64 numel;
};

// The offset of element `i` in an operand that does not lie like the result.
__device__ __forceinline__ i64 strided_offset(const Operands& in, int k, i64 i) {
    i64 offset = 0;
    if (in.numel <= 0x7fffffff) {
        u32 at = (u32)i;
#pragma unroll 1
        for (int d = in.rank - 1; d > 0; --d) {
            u32 extent = (u32)in.shape[d], rest = at / extent;
            offset += (i64)(at - rest * extent) * in.strides[k][d];
            at = rest;
        }
        return offset + (i64)at * in.strides[k][0];
    }
#pragma unroll 1
    for (int d = in.rank - 1; d > 0; --d) {
        i64 rest = i / in.shape[d];
        offset += (i - rest * in.shape[d]) * in.strides[k][d];
        i = rest;
    }
    return offset + i * in.strides[k][0];
}

// WIDTH elements of operand `k` from element `i` of the result's order on.
template <class S, int WIDTH> __device__ __forceinline__ void read(const Operands& in, int k, i64 i, A (&v)[WIDTH]) {
    if (in.data[k] == nullptr) {
        for (int w = 0; w < WIDTH; ++w) {
            v[w] = math::convert<A>(in.number[k]);
        }
        return;
    }
    const S* from = (const S*)in.data[k] + (in.is_strided[k] ? strided_offset(in, k, i) : i);
    if (WIDTH > 1 && in.is_strided[k] && in.strides[k][in.rank - 1] == 0) {
        A x = A(load(from));
        for (int w = 0; w < WIDTH; ++w) {
            v[w] = x;
        }
        return;
    }
    Pack<S, WIDTH> pack = *(const Pack<S, WIDTH>*)from;
    for (int w = 0; w < WIDTH; ++w) {
        v[w] = A(widen<S>(pack.x[w]));
    }
}
