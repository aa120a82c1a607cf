// Attention for any dtype, extents and strides, on the plain arithmetic units: out = dropout(softmax(scale · Q·Kᵀ + mask)) · V block by block, and its
// gradients. Defines: T; DROPOUT, 0 or 1; WIDTH, a multiple of 16 that is at least the width of keys and of values; in sixteens, ROWS and STEP, the rows of a block and
// of those that it walks over, and GRAD_ROWS and GRAD_STEP, the same of the backward pass: what registers (sums of WIDTH values a row) and 48 KiB of
// shared memory hold. Shared memory: `stage_size` values and one tile of `weights_size` (backward, for keys: two).
//
// Every kernel gives a block some rows (queries, or keys for dK and dV) and walks over blocks of the other side, so each result has one writer and its
// sums one order. Two steps do all the work: `multiply_rows` makes a tile of scores from two blocks of rows, `add_weighted` adds rows weighted by a
// tile. A thread of the 16x16 has the rows ty + 16i of the block, and the columns tx + 16j.

#include "kiln.cuh"
#include "attention.cuh"

typedef Compute<T> Real;

constexpr int THREADS = 256;
constexpr int COLS = WIDTH / 16;
// Columns of a staged chunk of rows; PITCH keeps quads aligned and reads free of bank conflicts.
constexpr int CHUNK = 16;
constexpr int PITCH = CHUNK + 4;

// Values in shared memory: two staged chunks of rows, or a chunk of whole rows; and a tile of weights.
__device__ constexpr int stage_size(int rows, int step) { return 16 * (rows + step) * PITCH > CHUNK * WIDTH ? 16 * (rows + step) * PITCH : CHUNK * WIDTH; }
__device__ constexpr int weights_size(int rows, int step) { return 16 * rows * (16 * step + 4); }

struct alignas(4 * sizeof(Real)) Quad {
    Real x[4];
};

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float logarithm(float x) { return logf(x); }
__device__ __forceinline__ double logarithm(double x) { return log(x); }
__device__ __forceinline__ Real larger(Real a, Real b) { return a > b ? a : b; }

/// A matrix in global memory.
struct Rows {
    const T* data;
    i64 rows, cols, row_stride, col_stride;

    __device__ __forceinline__ Rows(const T* data, const Matrices& layout, i64 matrix, i64 rows, i64 cols)
        : data(data + offset_of(layout.begins, matrix)), rows(rows), cols(cols), row_stride(layout.row_stride), col_stride(layout.col_stride) {}
    /// Matrix `i` of row-major ones without gaps.
    __device__ __forceinline__ Rows(const T* data, i64 i, i64 rows, i64 cols)
        : data(data + i * rows * cols), rows(rows), cols(cols), row_stride(cols), col_stride(1) {}
    /// What lies outside counts as zero.
    __device__ __forceinline__ Real at(i64 row, i64 col) const {
        return row < rows && col < cols ? load(data + row * row_stride + col * col_stride) : Real(0);
    }
};

/// tile[i][j] = Σ a(a_row + ty + 16i, ·) · b(b_row + tx + 16j, ·). `stage` has 16·(A + B)·PITCH values.
template <int A, int B>
__device__ __forceinline__ void multiply_rows(Real (&tile)[A][B], const Rows& a, i64 a_row, const Rows& b, i64 b_row, Real* stage) {
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    Real* const stage_b = stage + 16 * A * PITCH;
#pragma unroll
    for (int i = 0; i < A; ++i) {
#pragma unroll
        for (int j = 0; j < B; ++j) {
            tile[i][j] = 0;
        }
    }
    for (i64 col = 0; col < a.cols; col += CHUNK) {
        __syncthreads();
#pragma unroll
        for (int i = 0; i < A; ++i) {
            stage[(ty + 16 * i) * PITCH + tx] = a.at(a_row + ty + 16 * i, col + tx);
        }
#pragma unroll
        for (int j = 0; j < B; ++j) {
            stage_b[(ty + 16 * j) * PITCH + tx] = b.at(b_row + ty + 16 * j, col + tx);
        }
        __syncthreads();
#pragma unroll
        for (int e = 0; e < CHUNK; e += 4) {
            Quad x[A];
#pragma unroll
            for (int i = 0; i < A; ++i) {
                x[i] = *(const Quad*)&stage[(ty + 16 * i) * PITCH + e];
            }
#pragma unroll
            for (int j = 0; j < B; ++j) {
                const Quad y = *(const Quad*)&stage_b[(tx + 16 * j) * PITCH + e];
#pragma unroll
                for (int i = 0; i < A; ++i) {
#pragma unroll
                    for (int s = 0; s < 4; ++s) {
                        tile[i][j] += x[i].x[s] * y.x[s];
                    }
                }
            }
        }
    }
}

/// Writes a tile for `add_weighted`, whose barrier makes it visible.
template <int A, int B>
__device__ __forceinline__ void put_weights(Real* weights, const Real (&tile)[A][B]) {
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
#pragma unroll
    for (int i = 0; i < A; ++i) {
#pragma unroll
        for (int j = 0; j < B; ++j) {
            weights[(ty + 16 * i) * (16 * B + 4) + tx + 16 * j] = tile[i][j];
        }
    }
}

/// sums[i][j] += Σ over k of weights[ty + 16i][k] · m(row + k, tx + 16j), for the k below 16·B whose rows exist. `stage` has CHUNK·WIDTH values.
template <int A, int B>
__device__ __forceinline__ void add_weighted(Real (&sums)[A][COLS], const Real* weights, const Rows& m, i64 row, Real* stage) {
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    for (int first = 0; first < 16 * B && row + first < m.rows; first += CHUNK) {
        __syncthreads();
        for (int i = threadIdx.x; i < CHUNK * WIDTH; i += THREADS) {
            stage[i] = m.at(row + first + i / WIDTH, i % WIDTH);
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < CHUNK; k += 4) {
            Quad w[A];
#pragma unroll
            for (int i = 0; i < A; ++i) {
                w[i] = *(const Quad*)&weights[(ty + 16 * i) * (16 * B + 4) + first + k];
            }
#pragma unroll
            for (int j = 0; j < COLS; ++j) {
#pragma unroll
                for (int s = 0; s < 4; ++s) {
                    const Real x = stage[(k + s) * WIDTH + tx + 16 * j];
#pragma unroll
                    for (int i = 0; i < A; ++i) {
                        sums[i][j] += w[i].x[s] * x;
                    }
                }
            }
        }
    }
}

template <int A>
__device__ __forceinline__ void clear(Real (&sums)[A][COLS]) {
#pragma unroll
    for (int i = 0; i < A; ++i) {
#pragma unroll
        for (int j = 0; j < COLS; ++j) {
            sums[i][j] = 0;
        }
    }
}

/// Writes a block of rows of matrix `i` of row-major ones without gaps.
template <int A>
__device__ __forceinline__ void put_rows(T* to, i64 i, i64 rows, i64 cols, i64 first, const Real (&sums)[A][COLS], Real factor) {
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
#pragma unroll
    for (int r = 0; r < A; ++r) {
        const i64 row = first + ty + 16 * r;
#pragma unroll
        for (int j = 0; j < COLS; ++j) {
            const i64 col = tx + 16 * j;
            if (row < rows && col < cols) {
                store(to + (i * rows + row) * cols + col, sums[r][j] * factor);
            }
        }
    }
}

/// The sum or maximum of the 16 lanes that share a row.
template <class F>
__device__ __forceinline__ Real across_row(Real x, F combine) {
#pragma unroll
    for (int step = 8; step > 0; step >>= 1) {
        x = combine(x, __shfl_xor_sync(0xffffffffu, x, step));
    }
    return x;
}

/// The keys that the queries below `end` look at.
__device__ __forceinline__ i64 reach(const Extents& x, i64 end) { return x.causal != 0 && end < x.keys ? end : x.keys; }

// A block: 16·ROWS queries of a head.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
attention_forward(const T* q, Matrices q_layout, const T* k, Matrices k_layout, const T* v, Matrices v_layout, const void* mask_data, Matrices mask_layout,
    T* out, Real* lse, Extents x) {
    KILN_SHARED(Real, stage);
    Real* const weights = stage + stage_size(ROWS, STEP);
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    const i64 blocks = (x.queries + 16 * ROWS - 1) / (16 * ROWS);
    // The last queries of a causal problem have the most to do, so they begin.
    const i64 head = blockIdx.x % x.heads, first = (blocks - 1 - blockIdx.x / x.heads) * (16 * ROWS);
    const Rows queries(q, q_layout, head, x.queries, x.width);
    const Rows keys(k, k_layout, head / x.group, x.keys, x.width);
    const Rows values(v, v_layout, head / x.group, x.keys, x.value_width);
    const Mask mask(mask_data, mask_layout, x, head);
    Dropper dropper(x, head);
    const Real shut = -(Real)infinity();

    Real sums[ROWS][COLS], largest[ROWS], total[ROWS];
    clear(sums);
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        largest[i] = shut;
        total[i] = 0;
    }
    const i64 end = reach(x, first + 16 * ROWS);
    for (i64 key0 = 0; key0 < end; key0 += 16 * STEP) {
        Real tile[ROWS][STEP];
        multiply_rows(tile, queries, first, keys, key0, stage);
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            const i64 query = first + ty + 16 * i;
            Real most = largest[i];
#pragma unroll
            for (int j = 0; j < STEP; ++j) {
                const i64 key = key0 + tx + 16 * j;
                const bool open = query < x.queries && key < x.keys && (x.causal == 0 || key <= query);
                tile[i][j] = open ? mask.apply(tile[i][j] * (Real)x.scale, query, key) : shut;
                most = larger(tile[i][j], most);
            }
            most = across_row(most, larger);
            // Where every score so far is shut, exponentials are taken relative to zero: they are zero, or NaN for a NaN.
            const Real shift = most == shut ? Real(0) : most;
            Real sum = 0;
#pragma unroll
            for (int j = 0; j < STEP; ++j) {
                tile[i][j] = exponential(tile[i][j] - shift);
                sum += tile[i][j];
                if constexpr (DROPOUT) {
                    tile[i][j] *= dropper.factor(query, key0 + tx + 16 * j);
                }
            }
            const Real factor = exponential(largest[i] - shift);
            total[i] = total[i] * factor + across_row(sum, [](Real a, Real b) { return a + b; });
            largest[i] = most;
#pragma unroll
            for (int j = 0; j < COLS; ++j) {
                sums[i][j] *= factor;
            }
        }
        put_weights(weights, tile);
        add_weighted<ROWS, STEP>(sums, weights, values, key0, stage);
    }
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        const i64 query = first + ty + 16 * i;
        if (tx == 0 && query < x.queries) {
            lse[head * x.queries + query] = total[i] == 0 ? (Real)infinity() : largest[i] + logarithm(total[i]);
        }
        const Real factor = total[i] == 0 ? Real(0) : 1 / total[i];
#pragma unroll
        for (int j = 0; j < COLS; ++j) {
            sums[i][j] *= factor;
        }
    }
    put_rows(out, head, x.queries, x.value_width, first, sums, Real(1));
}
KILN_KERNEL(attention_forward)

// along[row] = Σ grad ∘ out, a warp a row.
extern "C" __global__ void __launch_bounds__(THREADS) attention_along(const T* out, const T* grad, Real* along, i64 rows, i64 width) {
    for (i64 row = global_thread() / 32; row < rows; row += global_threads() / 32) {
        Real sum = 0;
        for (i64 col = threadIdx.x % 32; col < width; col += 32) {
            sum += load(out + row * width + col) * load(grad + row * width + col);
        }
        sum = warp_sum(sum);
        if (threadIdx.x % 32 == 0) {
            along[row] = sum;
        }
    }
}
KILN_KERNEL(attention_along)

/// The weight of a query's key, from its score (a product still to be scaled).
__device__ __forceinline__ Real weight(Real score, i64 query, i64 key, Real lse, const Mask& mask, const Extents& x) {
    const bool open = query < x.queries && key < x.keys && (x.causal == 0 || key <= query);
    return open ? exponential(mask.apply(score * (Real)x.scale, query, key) - lse) : Real(0);
}

// A block: 16·GRAD_ROWS queries of a head. dQ = scale · dS·K.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
attention_backward_queries(const T* q, Matrices q_layout, const T* k, Matrices k_layout, const T* v, Matrices v_layout, const void* mask_data,
    Matrices mask_layout, const T* grad, const Real* lse, const Real* along, T* dq, Extents x) {
    KILN_SHARED(Real, stage);
    Real* const weights = stage + stage_size(GRAD_ROWS, GRAD_STEP);
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    const i64 blocks = (x.queries + 16 * GRAD_ROWS - 1) / (16 * GRAD_ROWS);
    const i64 head = blockIdx.x % x.heads, first = (blocks - 1 - blockIdx.x / x.heads) * (16 * GRAD_ROWS);
    const Rows queries(q, q_layout, head, x.queries, x.width);
    const Rows keys(k, k_layout, head / x.group, x.keys, x.width);
    const Rows values(v, v_layout, head / x.group, x.keys, x.value_width);
    const Rows grads(grad, head, x.queries, x.value_width);
    const Mask mask(mask_data, mask_layout, x, head);
    Dropper dropper(x, head);

    Real sums[GRAD_ROWS][COLS];
    clear(sums);
    const i64 end = reach(x, first + 16 * GRAD_ROWS);
    for (i64 key0 = 0; key0 < end; key0 += 16 * GRAD_STEP) {
        Real tile[GRAD_ROWS][GRAD_STEP], d_weights[GRAD_ROWS][GRAD_STEP];
        multiply_rows(tile, queries, first, keys, key0, stage);
        multiply_rows(d_weights, grads, first, values, key0, stage);
#pragma unroll
        for (int i = 0; i < GRAD_ROWS; ++i) {
            const i64 query = first + ty + 16 * i;
            const i64 at = head * x.queries + (query < x.queries ? query : 0);
            const Real sum = lse[at], mean = along[at];
#pragma unroll
            for (int j = 0; j < GRAD_STEP; ++j) {
                const i64 key = key0 + tx + 16 * j;
                if constexpr (DROPOUT) {
                    d_weights[i][j] *= dropper.factor(query, key);
                }
                tile[i][j] = weight(tile[i][j], query, key, sum, mask, x) * (d_weights[i][j] - mean);
            }
        }
        put_weights(weights, tile);
        add_weighted<GRAD_ROWS, GRAD_STEP>(sums, weights, keys, key0, stage);
    }
    put_rows(dq, head, x.queries, x.width, first, sums, (Real)x.scale);
}
KILN_KERNEL(attention_backward_queries)

// A block: 16·GRAD_ROWS keys of a key head. dV = Pᵀ·dO, dK = scale · dSᵀ·Q, summed over the query heads that share the key head.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
attention_backward_keys(const T* q, Matrices q_layout, const T* k, Matrices k_layout, const T* v, Matrices v_layout, const void* mask_data,
    Matrices mask_layout, const T* grad, const Real* lse, const Real* along, T* dk, T* dv, Extents x) {
    KILN_SHARED(Real, stage);
    Real* const weights = stage + stage_size(GRAD_ROWS, GRAD_STEP);
    Real* const d_scores = weights + weights_size(GRAD_ROWS, GRAD_STEP);
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    const i64 key_heads = x.heads / x.group;
    const i64 key_head = blockIdx.x % key_heads, first = blockIdx.x / key_heads * (16 * GRAD_ROWS);
    const Rows keys(k, k_layout, key_head, x.keys, x.width);
    const Rows values(v, v_layout, key_head, x.keys, x.value_width);

    Real d_keys[GRAD_ROWS][COLS], d_values[GRAD_ROWS][COLS];
    clear(d_keys);
    clear(d_values);
    for (i64 head = key_head * x.group; head < (key_head + 1) * x.group; ++head) {
        const Rows queries(q, q_layout, head, x.queries, x.width);
        const Rows grads(grad, head, x.queries, x.value_width);
        const Mask mask(mask_data, mask_layout, x, head);
        Dropper dropper(x, head);
        // Queries before the first key do not look at the block.
        for (i64 query0 = x.causal != 0 ? first : 0; query0 < x.queries; query0 += 16 * GRAD_STEP) {
            Real tile[GRAD_ROWS][GRAD_STEP], d_tile[GRAD_ROWS][GRAD_STEP];
            multiply_rows(tile, keys, first, queries, query0, stage);
            multiply_rows(d_tile, values, first, grads, query0, stage);
#pragma unroll
            for (int j = 0; j < GRAD_STEP; ++j) {
                const i64 query = query0 + tx + 16 * j;
                const i64 at = head * x.queries + (query < x.queries ? query : 0);
                const Real sum = lse[at], mean = along[at];
#pragma unroll
                for (int i = 0; i < GRAD_ROWS; ++i) {
                    const i64 key = first + ty + 16 * i;
                    const Real factor = DROPOUT ? dropper.factor(query, key) : Real(1);
                    tile[i][j] = weight(tile[i][j], query, key, sum, mask, x);
                    d_tile[i][j] = tile[i][j] * (d_tile[i][j] * factor - mean);
                    tile[i][j] *= factor;
                }
            }
            put_weights(weights, tile);
            put_weights(d_scores, d_tile);
            add_weighted<GRAD_ROWS, GRAD_STEP>(d_values, weights, grads, query0, stage);
            add_weighted<GRAD_ROWS, GRAD_STEP>(d_keys, d_scores, queries, query0, stage);
        }
    }
    put_rows(dk, key_head, x.keys, x.width, first, d_keys, (Real)x.scale);
    put_rows(dv, key_head, x.keys, x.value_width, first, d_values, Real(1));
}
KILN_KERNEL(attention_backward_keys)
