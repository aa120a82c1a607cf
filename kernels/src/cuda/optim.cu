// Optimiser updates of a list of tensors, one launch. The formula is not here: RULE is written by optim.rs, which runs the rule that the processor
// runs on symbols instead of numbers, so both do the same operations in the same order. Each is rounded by itself: nothing is contracted.
//
// T: type of parameters and gradients; STATES: number of states; RULE: statements on p, g, s[i] and the constants c[i].
#include "kiln.cuh"

typedef Compute<T> A;

// What a launch's parameters leave room for (4 KB in all).
struct Table {
    u64 words[480];
};
struct Constants {
    A c[24];
};

// The words of a tensor: elements, its first block, addresses of parameter, gradient and states.
constexpr int WORDS = 4 + STATES;
constexpr int THREADS = 256;
// Elements of an access of 16 bytes.
constexpr int VEC = 16 / sizeof(T);
// Elements of a block: `CHUNK` of optim.rs.
constexpr int CHUNK = 4096;

__device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ float sub(float a, float b) { return __fsub_rn(a, b); }
__device__ __forceinline__ float mul(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float div(float a, float b) { return __fdiv_rn(a, b); }
__device__ __forceinline__ float root(float a) { return __fsqrt_rn(a); }
__device__ __forceinline__ double add(double a, double b) { return __dadd_rn(a, b); }
__device__ __forceinline__ double sub(double a, double b) { return __dsub_rn(a, b); }
__device__ __forceinline__ double mul(double a, double b) { return __dmul_rn(a, b); }
__device__ __forceinline__ double div(double a, double b) { return __ddiv_rn(a, b); }
__device__ __forceinline__ double root(double a) { return __dsqrt_rn(a); }
__device__ __forceinline__ A neg(A a) { return -a; }
// The second where either is NaN.
__device__ __forceinline__ A larger(A a, A b) { return a > b ? a : b; }
__device__ __forceinline__ A sign(A a) { return a > 0 ? (A)1 : a < 0 ? (A)-1 : a; }

struct States {
    A s[STATES > 0 ? STATES : 1];
};

__device__ __forceinline__ void update(A& p, A g, States& states, const A* c) {
    A* s = states.s;
    RULE
}

// VEC elements, by pieces of at most 16 bytes.
template <class X> struct Pieces {
    static constexpr int SIZE = 16 / sizeof(X) < VEC ? 16 / sizeof(X) : VEC;
    typedef Pack<X, SIZE> Piece;
    __device__ __forceinline__ static void load(const X* from, X* to) {
#pragma unroll
        for (int i = 0; i < VEC; i += SIZE) {
            const Piece piece = *(const Piece*)(from + i);
#pragma unroll
            for (int j = 0; j < SIZE; ++j) {
                to[i + j] = piece.x[j];
            }
        }
    }
    __device__ __forceinline__ static void store(const X* from, X* to) {
#pragma unroll
        for (int i = 0; i < VEC; i += SIZE) {
            Piece piece;
#pragma unroll
            for (int j = 0; j < SIZE; ++j) {
                piece.x[j] = from[i + j];
            }
            *(Piece*)(to + i) = piece;
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS) optim_step(const __grid_constant__ Table table, i32 count, const __grid_constant__ Constants constants, const double* factor,
                                                               double number) {
    // Of all gradients; NaN leaves out the step.
    const A scale = (A)(factor ? *factor : number);
    if (scale != scale) {
        return;
    }
    // The last tensor that begins at this block or before.
    i32 low = 0, high = count;
    while (high - low > 1) {
        const i32 middle = (low + high) / 2;
        if (table.words[middle * WORDS + 1] <= blockIdx.x) {
            low = middle;
        } else {
            high = middle;
        }
    }
    const u64* slot = table.words + low * WORDS;
    const i64 start = (i64)(blockIdx.x - slot[1]) * CHUNK;
    const i64 rest = (i64)slot[0] - start;
    const int len = rest < CHUNK ? (int)rest : CHUNK;
    T* param = (T*)slot[2] + start;
    const T* grad = (const T*)slot[3] + start;
    A* state[STATES > 0 ? STATES : 1];
    u64 addresses = slot[2] | slot[3];
#pragma unroll
    for (int k = 0; k < STATES; ++k) {
        state[k] = (A*)slot[4 + k] + start;
        addresses |= slot[4 + k];
    }
    const int whole = addresses % 16 == 0 ? len / VEC * VEC : 0;
#pragma unroll 1
    for (int i = threadIdx.x * VEC; i < whole; i += THREADS * VEC) {
        T p[VEC], g[VEC];
        A s[STATES > 0 ? STATES : 1][VEC];
        Pieces<T>::load(param + i, p);
        Pieces<T>::load(grad + i, g);
#pragma unroll
        for (int k = 0; k < STATES; ++k) {
            Pieces<A>::load(state[k] + i, s[k]);
        }
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            A x = widen(p[j]);
            States states;
#pragma unroll
            for (int k = 0; k < STATES; ++k) {
                states.s[k] = s[k][j];
            }
            update(x, mul(widen(g[j]), scale), states, constants.c);
            p[j] = narrow<T>(x);
#pragma unroll
            for (int k = 0; k < STATES; ++k) {
                s[k][j] = states.s[k];
            }
        }
        Pieces<T>::store(p, param + i);
#pragma unroll
        for (int k = 0; k < STATES; ++k) {
            Pieces<A>::store(s[k], state[k] + i);
        }
    }
#pragma unroll 1
    for (int i = whole + threadIdx.x; i < len; i += THREADS) {
        A x = load(param + i);
        States states;
#pragma unroll
        for (int k = 0; k < STATES; ++k) {
            states.s[k] = state[k][i];
        }
        update(x, mul(load(grad + i), scale), states, constants.c);
        store(param + i, x);
#pragma unroll
        for (int k = 0; k < STATES; ++k) {
            state[k][i] = states.s[k];
        }
    }
}
KILN_KERNEL(optim_step)
