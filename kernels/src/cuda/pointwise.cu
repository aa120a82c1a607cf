// Functions of one element of each of up to OPERANDS tensors, in one pass over memory.
//
// Rust appends the functions and the kernels that run them: one for each row of the pointwise table, or one for a chain of rows, which may have
// several results. Elements go in the order of the results' memory.
//
// Macros: T (element type of the operands), OPERANDS.
#include "operands.cuh"

template <class Out, int RESULTS> struct Results {
    Out* at[RESULTS];
};

constexpr int THREADS = 256;
// Accesses of 16 bytes of T that a thread has under way at a time.
constexpr int UNROLL = 2;
constexpr int WIDE = 16 / sizeof(T);

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
