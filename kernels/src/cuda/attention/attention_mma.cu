// Attention in f16 and bf16 on tensor cores by mma.sync (sm_80), FlashAttention-2's way: a warp keeps its rows' sums in registers, turns its tile of
// scores into the left factor of the next product there, and blocks of the other side come by asynchronous copies, one ahead.
//
// Defines: T (f16 or bf16); HEAD, a multiple of 64 that is at least the width of keys and of values; MASK, the kind of mask as in `Extents`;
// DROPOUT, 0 or 1.
// BACKWARD 0: WARPS of a block, ROW_TILES, the sixteens of queries of a warp (two let a fragment of K or V serve twice), and STEP, the keys of a step.
// BACKWARD 1: WARPS of a block, of sixteen rows each, and STEP, the rows of the other side in a step.
// Rows are contiguous, rows and matrices begin at multiples of 16 bytes, widths are multiples of 8, and the scale is positive.

#include "kiln.cuh"
#include "attention.cuh"

constexpr int THREADS = 32 * WARPS;
constexpr int ROW_BYTES = HEAD * 2;
constexpr float LOG2_E = 1.4426950408889634f;

/// The byte at which 16-byte chunk `chunk` of row `row` lies: chunks of eight neighbouring rows are in different banks.
__device__ __forceinline__ u32 chunk_at(int row, int chunk) { return row * ROW_BYTES + ((chunk & ~7) | ((chunk ^ row) & 7)) * 16; }

/// A matrix in global memory with contiguous rows.
struct Rows {
    const T* data;
    i64 rows, width, row_stride;

    __device__ __forceinline__ Rows(const T* data, const Matrices& layout, i64 matrix, i64 rows, i64 width)
        : data(data + offset_of(layout.begins, matrix)), rows(rows), width(width), row_stride(layout.row_stride) {}
    __device__ __forceinline__ Rows(const T* data, i64 i, i64 rows, i64 width) : data(data + i * rows * width), rows(rows), width(width), row_stride(width) {}

    /// Begins to copy COUNT rows from `first` on; what lies outside becomes zero.
    template <int COUNT, int BLOCK>
    __device__ __forceinline__ void copy(u32 to, i64 first) const {
#pragma unroll
        for (int i = 0; i < COUNT * HEAD / 8; i += BLOCK) {
            const int at = i + threadIdx.x, row = at / (HEAD / 8), chunk = at % (HEAD / 8);
            if (COUNT * HEAD / 8 % BLOCK == 0 || at < COUNT * HEAD / 8) {
                const bool valid = first + row < rows && chunk * 8 < width;
                cp_async16(to + chunk_at(row, chunk), valid ? data + (first + row) * row_stride + chunk * 8 : data, valid);
            }
        }
    }
};

// Fragments. A lane's address in a tile is found once; a step along a row flips bits 5 and 6, or goes 128 bytes further.

__device__ __forceinline__ u32 along_row(u32 at, int k) { return (at ^ (32 * (k % 4))) + 128 * (k / 4); }
__device__ __forceinline__ u32 lane_left() { return chunk_at(threadIdx.x % 16, threadIdx.x % 32 / 16); }
__device__ __forceinline__ u32 lane_right() { return chunk_at(threadIdx.x % 8 + threadIdx.x % 32 / 16 * 8, threadIdx.x / 8 % 2); }

/// The left factor's 16 rows from `row` on (a multiple of 8), columns 16·k to 16·k + 15.
__device__ __forceinline__ void load_left(u32 (&a)[4], u32 tile, int row, int k) { ldmatrix_x4(a, along_row(tile + row * ROW_BYTES + lane_left(), k)); }
/// The right factor for 16 columns: rows 16·n to 16·n + 15 of a tile whose columns are summed over.
__device__ __forceinline__ void load_right(u32 (&b)[2][2], u32 tile, int n, int k) {
    u32 d[4];
    ldmatrix_x4(d, along_row(tile + lane_right(), k) + 16 * n * ROW_BYTES);
    b[0][0] = d[0], b[0][1] = d[1], b[1][0] = d[2], b[1][1] = d[3];
}
/// The same: columns 16·n to 16·n + 15 of a tile whose rows are summed over.
__device__ __forceinline__ void load_right_transposed(u32 (&b)[2][2], u32 tile, int n, int k) {
    u32 d[4];
    ldmatrix_x4_trans(d, along_row(tile + lane_left(), n) + 16 * k * ROW_BYTES);
    b[0][0] = d[0], b[0][1] = d[1], b[1][0] = d[2], b[1][1] = d[3];
}

/// scores[m] = the rows 16·m from `row` on of `left` times the rows of `right`.
template <int TILES, int COLS>
__device__ __forceinline__ void multiply_rows(float (&scores)[TILES][COLS / 8][4], u32 left, int row, u32 right) {
#pragma unroll
    for (int m = 0; m < TILES; ++m) {
#pragma unroll
        for (int n = 0; n < COLS / 8; ++n) {
            scores[m][n][0] = scores[m][n][1] = scores[m][n][2] = scores[m][n][3] = 0;
        }
    }
#pragma unroll
    for (int k = 0; k < HEAD / 16; ++k) {
        u32 a[TILES][4];
#pragma unroll
        for (int m = 0; m < TILES; ++m) {
            load_left(a[m], left, row + 16 * m, k);
        }
#pragma unroll
        for (int n = 0; n < COLS / 16; ++n) {
            u32 b[2][2];
            load_right(b, right, n, k);
#pragma unroll
            for (int m = 0; m < TILES; ++m) {
                mma<T>(scores[m][2 * n], a[m], b[0]);
                mma<T>(scores[m][2 * n + 1], a[m], b[1]);
            }
        }
    }
}

/// sums[m] += weights[m] · the rows of `right`.
template <int TILES, int COLS>
__device__ __forceinline__ void add_weighted(float (&sums)[TILES][HEAD / 8][4], const float (&weights)[TILES][COLS / 8][4], u32 right) {
#pragma unroll
    for (int k = 0; k < COLS / 16; ++k) {
        u32 a[TILES][4];
#pragma unroll
        for (int m = 0; m < TILES; ++m) {
            const float(&low)[4] = weights[m][2 * k], (&high)[4] = weights[m][2 * k + 1];
            a[m][0] = pack<T>(low[0], low[1]), a[m][1] = pack<T>(low[2], low[3]);
            a[m][2] = pack<T>(high[0], high[1]), a[m][3] = pack<T>(high[2], high[3]);
        }
#pragma unroll
        for (int n = 0; n < HEAD / 16; ++n) {
            u32 b[2][2];
            load_right_transposed(b, right, n, k);
#pragma unroll
            for (int m = 0; m < TILES; ++m) {
                mma<T>(sums[m][2 * n], a[m], b[0]);
                mma<T>(sums[m][2 * n + 1], a[m], b[1]);
            }
        }
    }
}

template <int TILES>
__device__ __forceinline__ void clear(float (&sums)[TILES][HEAD / 8][4]) {
#pragma unroll
    for (int m = 0; m < TILES; ++m) {
#pragma unroll
        for (int n = 0; n < HEAD / 8; ++n) {
            sums[m][n][0] = sums[m][n][1] = sums[m][n][2] = sums[m][n][3] = 0;
        }
    }
}

/// Writes 16 rows of matrix `i` of row-major ones without gaps; `low` and `high` are the factors of this thread's two rows.
__device__ __forceinline__ void put_rows(T* to, i64 i, i64 rows, i64 width, i64 first, const float (&sums)[HEAD / 8][4], float low, float high) {
    const int lane = threadIdx.x % 32;
    const i64 row = first + lane / 4;
    T* const at = to + (i * rows + row) * width + 2 * (lane % 4);
#pragma unroll
    for (int n = 0; n < HEAD / 8; ++n) {
        if (8 * n < width) {
            if (row < rows) {
                *(u32*)(at + 8 * n) = pack<T>(sums[n][0] * low, sums[n][1] * low);
            }
            if (row + 8 < rows) {
                *(u32*)(at + 8 * width + 8 * n) = pack<T>(sums[n][2] * high, sums[n][3] * high);
            }
        }
    }
}

__device__ __forceinline__ float across_row(float x, bool sum) {
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
        const float other = __shfl_xor_sync(0xffffffffu, x, step);
        x = sum ? x + other : fmaxf(x, other);
    }
    return x;
}

/// The keys that the queries below `end` look at.
__device__ __forceinline__ i64 reach(const Extents& x, i64 end) { return x.causal != 0 && end < x.keys ? end : x.keys; }

/// What turns products into scores, in units of log2 e: an added mask is applied to scaled scores, otherwise scaling waits for the exponential.
struct Scores {
    Mask mask;
    i64 queries, keys;
    float factor;
    bool causal;

    __device__ __forceinline__ Scores(const void* data, const Matrices& layout, const Extents& x, i64 head)
        : mask(data, layout, x, head), queries(x.queries), keys(x.keys), factor((float)(x.scale * 1.4426950408889634)), causal(x.causal != 0) {}
    /// What the exponential still has to multiply by.
    __device__ __forceinline__ float scale() const { return MASK == 2 ? 1.0f : factor; }
    /// Whether a tile needs `apply`, if its first query and last key are these.
    __device__ __forceinline__ bool touches(i64 query, i64 key) const { return MASK != 0 || key >= keys || (causal && key > query); }
    __device__ __forceinline__ float apply(float product, i64 query, i64 key) const {
        if (key >= keys || query >= queries || (causal && key > query)) {
            return -infinity();
        }
        if constexpr (MASK == 1) {
            return mask.is_open(query, key) ? product : -infinity();
        }
        if constexpr (MASK == 2) {
            const float bias = mask.bias(query, key);
            if (bias == -infinity()) {
                return bias;
            }
            // The least number is no infinity in other units either.
            const float far = 1.7e38f;
            return product * factor + (bias - bias == 0.0f ? fminf(fmaxf(bias * LOG2_E, -far), far) : bias);
        }
        return product;
    }
};

/// Bit 2n + e: whether dropout keeps the weight of the key 8n + e after `key`. Loops stay loops: a body of Philox for each weight would overflow
/// the instruction cache.
template <int COLS>
__device__ __forceinline__ u32 kept_keys(Dropper& dropper, i64 query, i64 key) {
    u32 bits = 0;
#pragma unroll 1
    for (int i = 0; i < COLS / 4; ++i) {
        // Keys 16 apart are in turn, as they share a block of words.
        const int n = i % (COLS / 16), place = i / (COLS / 16);
        bits |= (u32)dropper.keeps(query, key + 16 * n + 8 * (place / 2) + place % 2) << (4 * n + place);
    }
    return bits;
}
/// Bit 4n + 2h + e: the same for the query 8n + e after `query` and the key 8h after `key`.
template <int COLS>
__device__ __forceinline__ u32 kept_queries(Dropper& dropper, i64 query, i64 key) {
    u32 bits = 0;
#pragma unroll 1
    for (int i = 0; i < COLS / 2; ++i) {
        bits |= (u32)dropper.keeps(query + i / 4 * 8 + i % 2, key + i / 2 % 2 * 8) << i;
    }
    return bits;
}

#if !BACKWARD

constexpr int ROWS = 16 * ROW_TILES * WARPS;
constexpr float LN_2 = 0.6931471805599453f;

// A block: ROWS queries of a head.
extern "C" __global__ void __launch_bounds__(THREADS)
attention_forward_mma(const T* q, Matrices q_layout, const T* k, Matrices k_layout, const T* v, Matrices v_layout, const void* mask_data,
    Matrices mask_layout, T* out, float* lse, Extents x) {
    KILN_SHARED(u8, smem);
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * (16 * ROW_TILES);
    const u32 q_tile = smem_addr(smem), k_tile = q_tile + ROWS * ROW_BYTES, v_tile = k_tile + 2 * STEP * ROW_BYTES;
    const i64 blocks = (x.queries + ROWS - 1) / ROWS;
    // The last queries of a causal problem have the most to do, so they begin.
    const i64 head = blockIdx.x % x.heads, first = (blocks - 1 - blockIdx.x / x.heads) * ROWS;
    const Rows queries(q, q_layout, head, x.queries, x.width);
    const Rows keys(k, k_layout, head / x.group, x.keys, x.width);
    const Rows values(v, v_layout, head / x.group, x.keys, x.value_width);
    const Scores score(mask_data, mask_layout, x, head);
    Dropper dropper(x, head);
    const float scale = score.scale();

    float sums[ROW_TILES][HEAD / 8][4], largest[ROW_TILES][2], total[ROW_TILES][2];
    clear(sums);
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) {
        largest[m][0] = largest[m][1] = -infinity();
        total[m][0] = total[m][1] = 0;
    }
    const i64 end = reach(x, first + ROWS);
    const int steps = (int)((end + STEP - 1) / STEP);
    queries.copy<ROWS, THREADS>(q_tile, first);
    keys.copy<STEP, THREADS>(k_tile, 0);
    cp_async_commit();
    values.copy<STEP, THREADS>(v_tile, 0);
    cp_async_commit();
    for (int step = 0; step < steps; ++step) {
        const u32 stage = step % 2 * (STEP * ROW_BYTES), next = STEP * ROW_BYTES - stage;
        const i64 key0 = (i64)step * STEP;
        // All warps are past the products that read what these copies overwrite: a barrier lies between.
        if (step + 1 < steps) {
            keys.copy<STEP, THREADS>(k_tile + next, key0 + STEP);
        }
        cp_async_commit();
        cp_async_wait<2>();
        __syncthreads();
        const bool idle = score.causal && key0 > first + row + 16 * ROW_TILES - 1;
        float tile[ROW_TILES][STEP / 8][4];
        if (!idle) {
            multiply_rows<ROW_TILES, STEP>(tile, q_tile, row, k_tile + stage);
            const bool edge = score.touches(first + row, key0 + STEP - 1);
#pragma unroll
            for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    if (edge) {
                        const i64 query = first + row + 16 * m + lane / 4 + 8 * h;
#pragma unroll
                        for (int n = 0; n < STEP / 8; ++n) {
#pragma unroll
                            for (int e = 0; e < 2; ++e) {
                                tile[m][n][2 * h + e] = score.apply(tile[m][n][2 * h + e], query, key0 + 8 * n + 2 * (lane % 4) + e);
                            }
                        }
                    }
                    float most = largest[m][h];
#pragma unroll
                    for (int n = 0; n < STEP / 8; ++n) {
                        most = fmaxf(most, fmaxf(tile[m][n][2 * h], tile[m][n][2 * h + 1]));
                    }
                    most = across_row(most, false);
                    // Where every score so far is shut, exponentials are taken relative to zero: they are zero, or NaN for a NaN.
                    const float shift = most == -infinity() ? 0.0f : most * scale;
                    const float factor = ex2_approx(largest[m][h] * scale - shift);
                    float sum = 0;
#pragma unroll
                    for (int n = 0; n < STEP / 8; ++n) {
#pragma unroll
                        for (int e = 0; e < 2; ++e) {
                            tile[m][n][2 * h + e] = ex2_approx(tile[m][n][2 * h + e] * scale - shift);
                            sum += tile[m][n][2 * h + e];
                        }
                    }
                    total[m][h] = total[m][h] * factor + sum;
                    largest[m][h] = most;
                    if constexpr (DROPOUT) {
                        const u32 kept = kept_keys<STEP>(dropper, first + row + 16 * m + lane / 4 + 8 * h, key0 + 2 * (lane % 4));
#pragma unroll
                        for (int i = 0; i < STEP / 4; ++i) {
                            float& weight = tile[m][i / 2][2 * h + i % 2];
                            weight = kept >> i & 1 ? weight * dropper.kept : 0.0f;
                        }
                    }
#pragma unroll
                    for (int n = 0; n < HEAD / 8; ++n) {
                        sums[m][n][2 * h] *= factor;
                        sums[m][n][2 * h + 1] *= factor;
                    }
                }
            }
        }
        if (step + 1 < steps) {
            values.copy<STEP, THREADS>(v_tile + next, key0 + STEP);
        }
        cp_async_commit();
        cp_async_wait<2>();
        __syncthreads();
        if (!idle) {
            add_weighted<ROW_TILES, STEP>(sums, tile, v_tile + stage);
        }
    }
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) {
        float factor[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const float sum = across_row(total[m][h], true);
            const i64 query = first + row + 16 * m + lane / 4 + 8 * h;
            if (lane % 4 == 0 && query < x.queries) {
                lse[head * x.queries + query] = sum == 0 ? infinity() : largest[m][h] * (scale * LN_2) + logf(sum);
            }
            factor[h] = sum == 0 ? 0.0f : 1 / sum;
        }
        put_rows(out, head, x.queries, x.value_width, first + row + 16 * m, sums[m], factor[0], factor[1]);
    }
}
KILN_KERNEL(attention_forward_mma)

#else

constexpr int ROWS = 16 * WARPS;

// along[row] = Σ grad ∘ out: some lanes a row, 16 bytes of it at a time each.
extern "C" __global__ void __launch_bounds__(256) attention_along_mma(const T* out, const T* grad, float* along, i64 rows, i64 width) {
    constexpr int LANES = HEAD > 128 ? 32 : HEAD / 8;
    const int lane = threadIdx.x % LANES;
    const i64 row = global_thread() / LANES;
    float sum = 0;
    if (row < rows) {
        for (i64 col = 8 * lane; col < width; col += 8 * LANES) {
            const Pack<T, 8> a = *(const Pack<T, 8>*)(out + row * width + col), b = *(const Pack<T, 8>*)(grad + row * width + col);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                sum += widen<T>(a.x[i]) * widen<T>(b.x[i]);
            }
        }
    }
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, step);
    }
    if (row < rows && lane == 0) {
        along[row] = sum;
    }
}
KILN_KERNEL(attention_along_mma)

// A block: ROWS queries of a head. dQ = scale · dS·K.
extern "C" __global__ void __launch_bounds__(THREADS)
attention_backward_queries_mma(const T* q, Matrices q_layout, const T* k, Matrices k_layout, const T* v, Matrices v_layout, const void* mask_data,
    Matrices mask_layout, const T* grad, const float* lse, const float* along, T* dq, Extents x) {
    KILN_SHARED(u8, smem);
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16;
    const u32 q_tile = smem_addr(smem), grad_tile = q_tile + ROWS * ROW_BYTES;
    const u32 k_tile = grad_tile + ROWS * ROW_BYTES, v_tile = k_tile + 2 * STEP * ROW_BYTES;
    const i64 blocks = (x.queries + ROWS - 1) / ROWS;
    const i64 head = blockIdx.x % x.heads, first = (blocks - 1 - blockIdx.x / x.heads) * ROWS;
    const Rows keys(k, k_layout, head / x.group, x.keys, x.width);
    const Rows values(v, v_layout, head / x.group, x.keys, x.value_width);
    const Scores score(mask_data, mask_layout, x, head);
    Dropper dropper(x, head);

    float sums[1][HEAD / 8][4], shift[2], mean[2];
    clear(sums);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const i64 query = first + row + lane / 4 + 8 * h;
        shift[h] = query < x.queries ? lse[head * x.queries + query] * LOG2_E : infinity();
        mean[h] = query < x.queries ? along[head * x.queries + query] : 0.0f;
    }
    const int steps = (int)((reach(x, first + ROWS) + STEP - 1) / STEP);
    Rows(q, q_layout, head, x.queries, x.width).copy<ROWS, THREADS>(q_tile, first);
    Rows(grad, head, x.queries, x.value_width).copy<ROWS, THREADS>(grad_tile, first);
    keys.copy<STEP, THREADS>(k_tile, 0);
    values.copy<STEP, THREADS>(v_tile, 0);
    cp_async_commit();
    for (int step = 0; step < steps; ++step) {
        const u32 stage = step % 2 * (STEP * ROW_BYTES), next = STEP * ROW_BYTES - stage;
        const i64 key0 = (i64)step * STEP;
        if (step + 1 < steps) {
            keys.copy<STEP, THREADS>(k_tile + next, key0 + STEP);
            values.copy<STEP, THREADS>(v_tile + next, key0 + STEP);
        }
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();
        if (!score.causal || key0 <= first + row + 15) {
            float tile[1][STEP / 8][4], d_tile[1][STEP / 8][4];
            multiply_rows<1, STEP>(tile, q_tile, row, k_tile + stage);
            multiply_rows<1, STEP>(d_tile, grad_tile, row, v_tile + stage);
            const bool edge = score.touches(first + row, key0 + STEP - 1);
            if constexpr (DROPOUT) {
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const u32 kept = kept_keys<STEP>(dropper, first + row + lane / 4 + 8 * h, key0 + 2 * (lane % 4));
#pragma unroll
                    for (int i = 0; i < STEP / 4; ++i) {
                        float& d_weight = d_tile[0][i / 2][2 * h + i % 2];
                        d_weight = kept >> i & 1 ? d_weight * dropper.kept : 0.0f;
                    }
                }
            }
#pragma unroll
            for (int n = 0; n < STEP / 8; ++n) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    float product = tile[0][n][e];
                    if (edge) {
                        product = score.apply(product, first + row + lane / 4 + e / 2 * 8, key0 + 8 * n + 2 * (lane % 4) + e % 2);
                    }
                    tile[0][n][e] = ex2_approx(product * score.scale() - shift[e / 2]) * (d_tile[0][n][e] - mean[e / 2]);
                }
            }
            add_weighted<1, STEP>(sums, tile, k_tile + stage);
        }
        __syncthreads();
    }
    const float scale = (float)x.scale;
    put_rows(dq, head, x.queries, x.width, first + row, sums[0], scale, scale);
}
KILN_KERNEL(attention_backward_queries_mma)

// A block: ROWS keys of a key head, and all queries that look at them. PARTS: 1 for dV = Pᵀ·dO, 2 for dK = scale · dSᵀ·Q, 3 for both.
template <int PARTS>
__device__ __forceinline__ void backward_keys(u8* smem, const T* q, const Matrices& q_layout, const T* k, const Matrices& k_layout, const T* v,
    const Matrices& v_layout, const void* mask_data, const Matrices& mask_layout, const T* grad, const float* lse, const float* along, T* dk, T* dv,
    const Extents& x) {
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16;
    const u32 k_tile = smem_addr(smem), v_tile = k_tile + ROWS * ROW_BYTES;
    const u32 q_tile = v_tile + ROWS * ROW_BYTES, grad_tile = q_tile + 2 * STEP * ROW_BYTES;
    const i64 key_heads = x.heads / x.group;
    const i64 key_head = blockIdx.x % key_heads, first = blockIdx.x / key_heads * ROWS;

    float d_keys[1][HEAD / 8][4], d_values[1][HEAD / 8][4];
    clear(d_keys);
    clear(d_values);
    // Queries before the first key do not look at the block.
    const i64 query_start = x.causal != 0 ? first / STEP * STEP : 0;
    const i64 per_head = x.queries > query_start ? (x.queries - query_start + STEP - 1) / STEP : 0, steps = per_head * x.group;
    const auto copy = [&](i64 step, u32 stage) {
        const i64 head = key_head * x.group + step / per_head, query0 = query_start + step % per_head * STEP;
        Rows(q, q_layout, head, x.queries, x.width).copy<STEP, THREADS>(q_tile + stage, query0);
        Rows(grad, head, x.queries, x.value_width).copy<STEP, THREADS>(grad_tile + stage, query0);
    };
    if (steps > 0) {
        Rows(k, k_layout, key_head, x.keys, x.width).copy<ROWS, THREADS>(k_tile, first);
        Rows(v, v_layout, key_head, x.keys, x.value_width).copy<ROWS, THREADS>(v_tile, first);
        copy(0, 0);
    }
    cp_async_commit();
    for (i64 step = 0; step < steps; ++step) {
        const u32 stage = step % 2 * (STEP * ROW_BYTES), next = STEP * ROW_BYTES - stage;
        if (step + 1 < steps) {
            copy(step + 1, next);
        }
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();
        const i64 head = key_head * x.group + step / per_head, query0 = query_start + step % per_head * STEP;
        if (x.causal == 0 || query0 + STEP - 1 >= first + row) {
            const Scores score(mask_data, mask_layout, x, head);
            float tile[1][STEP / 8][4], d_tile[1][STEP / 8][4];
            multiply_rows<1, STEP>(tile, k_tile, row, q_tile + stage);
            if (PARTS & 2) {
                multiply_rows<1, STEP>(d_tile, v_tile, row, grad_tile + stage);
            }
            const bool edge = score.touches(query0, first + row + 15);
            Dropper dropper(x, head);
            const u32 kept = DROPOUT ? kept_queries<STEP>(dropper, query0 + 2 * (lane % 4), first + row + lane / 4) : 0;
#pragma unroll
            for (int n = 0; n < STEP / 8; ++n) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const i64 query = query0 + 8 * n + 2 * (lane % 4) + e, at = head * x.queries + query;
                    const float shift = query < x.queries ? lse[at] * LOG2_E : infinity();
                    const float mean = (PARTS & 2) && query < x.queries ? along[at] : 0.0f;
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        float product = tile[0][n][2 * h + e];
                        if (edge) {
                            product = score.apply(product, query, first + row + lane / 4 + 8 * h);
                        }
                        const float factor = !DROPOUT ? 1.0f : kept >> (4 * n + 2 * h + e) & 1 ? dropper.kept : 0.0f;
                        tile[0][n][2 * h + e] = ex2_approx(product * score.scale() - shift);
                        if (PARTS & 2) {
                            d_tile[0][n][2 * h + e] = tile[0][n][2 * h + e] * (d_tile[0][n][2 * h + e] * factor - mean);
                        }
                        tile[0][n][2 * h + e] *= factor;
                    }
                }
            }
            if (PARTS & 1) {
                add_weighted<1, STEP>(d_values, tile, grad_tile + stage);
            }
            if (PARTS & 2) {
                add_weighted<1, STEP>(d_keys, d_tile, q_tile + stage);
            }
        }
        __syncthreads();
    }
    const float scale = (float)x.scale;
    if (PARTS & 1) {
        put_rows(dv, key_head, x.keys, x.value_width, first + row, d_values[0], 1, 1);
    }
    if (PARTS & 2) {
        put_rows(dk, key_head, x.keys, x.width, first + row, d_keys[0], scale, scale);
    }
}

// The sums of wide heads do not fit registers together, so they are made one after the other.
extern "C" __global__ void __launch_bounds__(THREADS)
attention_backward_keys_mma(const T* q, Matrices q_layout, const T* k, Matrices k_layout, const T* v, Matrices v_layout, const void* mask_data,
    Matrices mask_layout, const T* grad, const float* lse, const float* along, T* dk, T* dv, Extents x) {
    KILN_SHARED(u8, smem);
    if constexpr (HEAD > 128) {
        backward_keys<1>(smem, q, q_layout, k, k_layout, v, v_layout, mask_data, mask_layout, grad, lse, along, dk, dv, x);
        __syncthreads();
        backward_keys<2>(smem, q, q_layout, k, k_layout, v, v_layout, mask_data, mask_layout, grad, lse, along, dk, dv, x);
    } else {
        backward_keys<3>(smem, q, q_layout, k, k_layout, v, v_layout, mask_data, mask_layout, grad, lse, along, dk, dv, x);
    }
}
KILN_KERNEL(attention_backward_keys_mma)

#endif
