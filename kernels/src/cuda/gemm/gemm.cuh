// What all levels of the matrix product C = epilogue(alpha · A · B) share: their arguments, the type that sums are kept in, and what happens to a sum before
// it is stored. Macros: T (type of A, B and the bias), OUT (type of C and the residual), ACTIVATION (an expression of `x`, as in the pointwise table), HAS_BIAS,
// HAS_RESIDUAL.
#include "math.cuh"

#ifndef ACTIVATION
#define ACTIVATION x
#endif
#ifndef HAS_BIAS
#define HAS_BIAS 0
#endif
#ifndef HAS_RESIDUAL
#define HAS_RESIDUAL 0
#endif

// Halves are summed in f32; integers as unsigned ones of at least 32 bits, where wrapping around is defined.
template <class E> struct SumOf {
    typedef u32 type;
};
template <> struct SumOf<f16> {
    typedef float type;
};
template <> struct SumOf<bf16> {
    typedef float type;
};
template <> struct SumOf<float> {
    typedef float type;
};
template <> struct SumOf<double> {
    typedef double type;
};
template <> struct SumOf<i64> {
    typedef u64 type;
};
typedef SumOf<T>::type Sum;

// A factor: element (i, j) of batch item b lies at data[i·row + j·col] behind the item's begin, which is offsets[b] or, without
// offsets, outer·(b / batch_inner) + inner·(b % batch_inner). In elements.
struct GemmMatrix {
    const T* data;
    i64 row, col, outer, inner;
    const i64* offsets;
};

// The bias is one value per column. The residual is a matrix of C's shape with its own distances of rows and of batch items; it may be C itself
// (accumulation). Neither is read unless HAS_BIAS or HAS_RESIDUAL.
struct GemmEpilogue {
    const T* bias;
    const OUT* residual;
    i64 residual_row, residual_batch;
};

struct GemmArgs {
    i64 m, n, k, batch, batch_inner;
    GemmMatrix a, b;
    OUT* c;
    i64 c_row, c_batch;
    GemmEpilogue epilogue;
    // Sums of the parts of k, at [split][batch][m][n], for gemm_reduce to add.
    Sum* partial;
    i64 splits;
    double alpha;
};

__device__ __forceinline__ const T* item_of(const GemmMatrix& matrix, i64 batch, i64 batch_inner) {
    if (matrix.offsets != nullptr) {
        return matrix.data + matrix.offsets[batch];
    }
    const i64 outer = batch / batch_inner;
    return matrix.data + outer * matrix.outer + (batch - outer * batch_inner) * matrix.inner;
}

__device__ __forceinline__ Sum activation(Sum x) {
    typedef Sum A;
    return (A)(ACTIVATION);
}

// The value of C[batch][row][col] for the sum of its products times alpha.
__device__ __forceinline__ Sum finish(const GemmEpilogue& epilogue, Sum sum, i64 batch, i64 row, i64 col) {
    if constexpr (HAS_BIAS) {
        sum += (Sum)load<T>(epilogue.bias + col);
    }
    sum = activation(sum);
    if constexpr (HAS_RESIDUAL) {
        sum += (Sum)load<OUT>(epilogue.residual + batch * epilogue.residual_batch + row * epilogue.residual_row + col);
    }
    return sum;
}

// alpha as a factor of sums: of integers, truncated.
__device__ __forceinline__ Sum scale_of(double alpha) {
    if constexpr (is_float_type<T>) {
        return (Sum)alpha;
    } else {
        return (Sum)(i64)alpha;
    }
}

__device__ __forceinline__ void store_sum(OUT* p, Sum x) {
    store<OUT>(p, (Compute<OUT>)x);
}

// Finishes a sum of the whole of k and stores it.
__device__ __forceinline__ void store_finished(const GemmArgs& args, Sum sum, i64 batch, i64 row, i64 col) {
    store_sum(args.c + batch * args.c_batch + row * args.c_row + col, finish(args.epilogue, scale_of(args.alpha) * sum, batch, row, col));
}

// Where the sum of a part of k waits for gemm_reduce.
__device__ __forceinline__ Sum* partial_at(const GemmArgs& args, i64 split, i64 batch, i64 row, i64 col) {
    return args.partial + ((split * args.batch + batch) * args.m + row) * args.n + col;
}
