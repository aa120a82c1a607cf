// Functions of one element of each of up to OPERANDS tensors, in one pass over memory.
//
// Rust appends the functions and the kernels that run them: one for each row of the pointwise table, or one for a chain of rows, which may have
// several results. Elements go in the order of the results' memory.
//
// Macros: T (element type of the operands), OPERANDS.
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

template <class Out, int RESULTS> struct Results {
    Out* at[RESULTS];
};

constexpr int THREADS = 256;
// Accesses of 16 bytes of T that a thread has under way at a time.
constexpr int UNROLL = 2;
constexpr int WIDE = 16 / sizeof(T);

// The offset of element `i` in an operand that does not lie like the result.
__device__ __forceinline__ i64 strided_offset(const Operands& in, int k, i64 i) {
    i64 offset = 0;
    if (in.numel <= 0x7fffffff) {
        u32 at = (u32)i;
        for (int d = in.rank - 1; d > 0; --d) {
            u32 extent = (u32)in.shape[d], rest = at / extent;
            offset += (i64)(at - rest * extent) * in.strides[k][d];
            at = rest;
        }
        return offset + (i64)at * in.strides[k][0];
    }
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

// Each thread's elements: UNROLL groups of WIDTH, a block's groups side by side. Operand 0 has type First, the others T.
template <int N, int WIDTH, int GROUPS, class First, class Out, int RESULTS, class F>
__device__ __forceinline__ void run_groups(const Operands& in, const Results<Out, RESULTS>& out, i64 begin, i64 end, F f) {
    const A params[2] = {math::convert<A>(in.params[0]), math::convert<A>(in.params[1])};
    i64 first = begin + ((i64)blockIdx.x * THREADS * GROUPS + threadIdx.x) * WIDTH;
    A v[GROUPS][N][WIDTH];
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
        i64 i = first + (i64)g * THREADS * WIDTH;
        if (i < end) {
            read<First, WIDTH>(in, 0, i, v[g][0]);
#pragma unroll
            for (int k = 1; k < N; ++k) {
                read<T, WIDTH>(in, k, i, v[g][k]);
            }
        }
    }
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
        i64 i = first + (i64)g * THREADS * WIDTH;
        if (i < end) {
            Pack<Out, WIDTH> results[RESULTS];
#pragma unroll
            for (int w = 0; w < WIDTH; ++w) {
                A x[N];
#pragma unroll
                for (int k = 0; k < N; ++k) {
                    x[k] = v[g][k][w];
                }
                Out values[RESULTS];
                f(x, params, values);
#pragma unroll
                for (int r = 0; r < RESULTS; ++r) {
                    results[r].x[w] = values[r];
                }
            }
#pragma unroll
            for (int r = 0; r < RESULTS; ++r) {
                *(Pack<Out, WIDTH>*)(out.at[r] + i) = results[r];
            }
        }
    }
}

// The grid has enough threads for either width (see `launch` in pointwise.rs).
template <int N, class First, class Out, int RESULTS, class F>
__device__ __forceinline__ void run(const Operands& in, const Results<Out, RESULTS>& out, F f) {
    if (in.width == 1) {
        run_groups<N, 1, 1, First>(in, out, 0, in.numel, f);
        return;
    }
    i64 whole = in.numel / WIDE * WIDE;
    run_groups<N, WIDE, UNROLL, First>(in, out, 0, whole, f);
    // Fewer than WIDE elements are left: the first block takes them.
    if (blockIdx.x == 0) {
        run_groups<N, 1, 1, First>(in, out, whole, in.numel, f);
    }
}

// A kernel of `function`, which writes `results` values: `void function(const A* v, const A* p, Out* results)`.
#define KILN_POINTWISE_RESULTS(kernel, n, First, Out, results, function)                                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS) kernel(const Operands in, const Results<Out, results> out) {                     \
        run<n, First>(in, out, [](const A* v, const A* p, Out* values) { function(v, p, values); });                                       \
    }                                                                                                                                      \
    KILN_KERNEL(kernel)

// A kernel of `function`, which returns its one value: `Out function(const A* v, const A* p)`.
#define KILN_POINTWISE(kernel, n, First, Out, function)                                                                                    \
    __device__ __forceinline__ void write_##kernel(const A* v, const A* p, Out* values) {                                                  \
        *values = function(v, p);                                                                                                          \
    }                                                                                                                                      \
    KILN_POINTWISE_RESULTS(kernel, n, First, Out, 1, write_##kernel)
