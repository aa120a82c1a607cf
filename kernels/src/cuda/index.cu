// Reading and writing at positions that are data. Positions were checked (`bounds`) before these kernels are launched; one that is out of range all
// the same, because a recorded graph is replayed with other values, reads as zero and writes nothing: no kernel leaves its arrays.
//
// Compiled in four ways, by which macro is defined: MOVE, T an unsigned integer of the elements' size or of several together (16 bytes: WIDE);
// SUM, T a number; SCAN, T the elements' type; INDEX, for what only positions take part in.
#include "kiln.cuh"

constexpr int THREADS = 256;

// How blocks share out the columns of many rows, so that nothing is divided for each element: `lanes` (a power of two) threads a row, each with
// COLUMNS_EACH columns `lanes` apart; `parts` blocks for the columns of a group of rows.
struct Rows {
    i64 rows;
    i64 columns;
    i32 lanes;
    i32 parts;
};

constexpr int COLUMNS_EACH = 8;

// This thread's row and first column; false if there is no such row.
__device__ __forceinline__ bool find_columns(const Rows& shape, i64& row, i64& first) {
    const i64 group = blockIdx.x / shape.parts, part = blockIdx.x % shape.parts;
    const int lane = threadIdx.x & (shape.lanes - 1);
    row = group * (THREADS / shape.lanes) + threadIdx.x / shape.lanes;
    first = part * shape.lanes * COLUMNS_EACH + lane;
    return row < shape.rows;
}

// The offset of row-major element `i`, by divisions of 32 bits where the extents allow it.
__device__ __forceinline__ i64 place_of(const Strided& view, i64 i, bool small) {
    if (!small) {
        return offset_of(view, i);
    }
    u32 rest = (u32)i;
    i64 offset = 0;
#pragma unroll 1
    for (int d = view.rank - 1; d > 0; --d) {
        const u32 extent = (u32)view.shape[d], next = rest / extent;
        offset += (i64)(rest - next * extent) * view.strides[d];
        rest = next;
    }
    return view.rank > 0 ? offset + (i64)rest * view.strides[0] : 0;
}

__device__ __forceinline__ bool is_small(i64 n) {
    return n <= 0x7fffffff;
}

#if defined(MOVE)
#ifdef WIDE
typedef Pack<u32, 4> W;
#else
typedef T W;
#endif

// out[o, j, ..] = src[o, index[j], ..]; rows are the pairs (o, j).
extern "C" __global__ void __launch_bounds__(THREADS) select_rows(const W* src, const i64* index, W* out, Rows shape, i64 count, i64 n) {
    i64 row, first;
    if (!find_columns(shape, row, first)) {
        return;
    }
    const i64 o = count == shape.rows ? 0 : row / count;
    const i64 position = index[row - o * count];
    const bool inside = (u64)position < (u64)n;
    const W* from = src + (o * n + (inside ? position : 0)) * shape.columns;
    W* to = out + row * shape.columns;
    // All loads are under way before the first is needed.
    W words[COLUMNS_EACH] = {};
#pragma unroll
    for (int i = 0; i < COLUMNS_EACH; ++i) {
        const i64 column = first + (i64)i * shape.lanes;
        if (inside && column < shape.columns) {
            words[i] = from[column];
        }
    }
#pragma unroll
    for (int i = 0; i < COLUMNS_EACH; ++i) {
        const i64 column = first + (i64)i * shape.lanes;
        if (column < shape.columns) {
            to[column] = words[i];
        }
    }
}
KILN_KERNEL(select_rows)

#ifndef WIDE
// out[i] = src[place of i, whose coordinate `dim` is index[i] instead]; `view` has stride 0 there.
extern "C" __global__ void __launch_bounds__(THREADS) gather(const T* src, Strided view, i64 extent, i64 stride, const i64* index, T* out, i64 n) {
    const bool small = is_small(n);
    for (i64 i = global_thread(); i < n; i += global_threads()) {
        const i64 position = index[i];
        out[i] = (u64)position < (u64)extent ? src[place_of(view, i, small) + position * stride] : T{};
    }
}
KILN_KERNEL(gather)

// Where several sources meet, the last in row-major order wins: `winners` (0 before) holds one more than the largest that names each place. Null if no two can meet.
extern "C" __global__ void __launch_bounds__(THREADS) scatter(const T* src, Strided view, i64 extent, i64 stride, const i64* index, T* out, const u32* winners, i64 n) {
    const bool small = is_small(n);
    for (i64 i = global_thread(); i < n; i += global_threads()) {
        const i64 position = index[i];
        if ((u64)position < (u64)extent) {
            const i64 place = place_of(view, i, small) + position * stride;
            if (winners == nullptr || winners[place] == (u32)i + 1) {
                out[place] = src[i];
            }
        }
    }
}
KILN_KERNEL(scatter)

// Keeps the columns c of row r of each matrix for which from <= c - r < to, and zeroes the rest.
extern "C" __global__ void __launch_bounds__(THREADS) triangle(const T* x, T* out, Rows shape, i64 rows, i64 from, i64 to) {
    i64 row, first;
    if (!find_columns(shape, row, first)) {
        return;
    }
    const i64 r = row % rows;
#pragma unroll
    for (int i = 0; i < COLUMNS_EACH; ++i) {
        const i64 column = first + (i64)i * shape.lanes;
        if (column < shape.columns) {
            out[row * shape.columns + column] = column - r >= from && column - r < to ? x[row * shape.columns + column] : T{};
        }
    }
}
KILN_KERNEL(triangle)
#endif

#elif defined(INDEX)
// bounds[0] and bounds[1]: the least and the greatest of the positions and of what was there before.
extern "C" __global__ void __launch_bounds__(THREADS) bounds(const i64* index, i64 n, i64* bounds) {
    i64 least = 0x7fffffffffffffffll, greatest = -least - 1;
    for (i64 i = global_thread(); i < n; i += global_threads()) {
        least = min(least, index[i]);
        greatest = max(greatest, index[i]);
    }
    least = warp_reduce(least, [](i64 a, i64 b) { return min(a, b); });
    greatest = warp_reduce(greatest, [](i64 a, i64 b) { return max(a, b); });
    if (threadIdx.x % 32 == 0) {
        atomicMin(&bounds[0], least);
        atomicMax(&bounds[1], greatest);
    }
}
KILN_KERNEL(bounds)

// keys[i]: the position as a key to sort by; one that is out of range comes last.
extern "C" __global__ void __launch_bounds__(THREADS) position_keys(const i64* index, i64 n, i64 extent, u32* keys) {
    for (i64 i = global_thread(); i < n; i += global_threads()) {
        keys[i] = (u64)index[i] < (u64)extent ? (u32)index[i] : (u32)extent;
    }
}
KILN_KERNEL(position_keys)

// keys[i]: the place that source i of a scatter goes to; `numel`, the number of places, for one that is out of range.
extern "C" __global__ void __launch_bounds__(THREADS) place_keys(Strided view, i64 extent, i64 stride, const i64* index, i64 n, i64 numel, u32* keys) {
    const bool small = is_small(n);
    for (i64 i = global_thread(); i < n; i += global_threads()) {
        const i64 position = index[i];
        keys[i] = (u32)((u64)position < (u64)extent ? place_of(view, i, small) + position * stride : numel);
    }
}
KILN_KERNEL(place_keys)

// winners[place] = 1 + the largest source that goes there: a maximum, which any order gives alike.
extern "C" __global__ void __launch_bounds__(THREADS) find_winners(Strided view, i64 extent, i64 stride, const i64* index, i64 n, u32* winners) {
    const bool small = is_small(n);
    for (i64 i = global_thread(); i < n; i += global_threads()) {
        const i64 position = index[i];
        if ((u64)position < (u64)extent) {
            atomicMax(&winners[place_of(view, i, small) + position * stride], (u32)i + 1);
        }
    }
}
KILN_KERNEL(find_winners)

extern "C" __global__ void __launch_bounds__(THREADS) one_hot(const i64* index, i64* out, Rows shape) {
    i64 row, first;
    if (!find_columns(shape, row, first)) {
        return;
    }
    const i64 position = index[row];
#pragma unroll
    for (int i = 0; i < COLUMNS_EACH; ++i) {
        const i64 column = first + (i64)i * shape.lanes;
        if (column < shape.columns) {
            out[row * shape.columns + column] = column == position;
        }
    }
}
KILN_KERNEL(one_hot)

#elif defined(SUM)
// Sums over sources that were sorted by where they go (`keys`, with `places` ascending for equal keys): each target takes its sources in the order of the index, one
// after the other, so the sums are those of the processor.

typedef Compute<T> A;

__device__ __forceinline__ A plus(A a, A b) {
    return (A)(a + b);
}

// A target with more sources than this is left to `add_long`.
constexpr int LONG = 128;

// Whether the sorted sources of a target that begin at `r` are more than LONG.
__device__ __forceinline__ bool is_long(const u32* keys, i64 r, i64 count) {
    return r + LONG < count && keys[r + LONG] == keys[r];
}

// out[o, key, ..] += src[o, place, ..], a thread for each column of each target. For narrow rows.
extern "C" __global__ void __launch_bounds__(THREADS) add_narrow(const u32* keys, const u32* places, i64 count, i64 n, i64 inner, i64 outer, const T* src, T* out) {
    const i64 items = outer * count * inner;
    for (i64 item = global_thread(); item < items; item += global_threads()) {
        const i64 row = item / inner, column = item - row * inner;
        const i64 o = row / count;
        i64 r = row - o * count;
        const u32 key = keys[r];
        if (key >= n || (r > 0 && keys[r - 1] == key) || is_long(keys, r, count)) {
            continue;
        }
        T* target = out + (o * n + key) * inner + column;
        const T* from = src + o * count * inner + column;
        A sum = load(target);
        do {
            sum = plus(sum, load(from + (i64)places[r] * inner));
            ++r;
        } while (r < count && keys[r] == key);
        store(target, sum);
    }
}
KILN_KERNEL(add_narrow)

// The same, a warp for 32 * N columns of each target; N elements at a time.
template <int N> __device__ __forceinline__ void add_wide(const u32* keys, const u32* places, i64 count, i64 n, i64 inner, i64 outer, const T* src, T* out) {
    typedef Pack<T, N> Vector;
    // Rows that are read before they are added, so that many loads are under way.
    constexpr int AHEAD = 8;
    const i64 parts = (inner + 32 * N - 1) / (32 * N);
    const int lane = threadIdx.x % 32;
    for (i64 item = global_thread() / 32; item < outer * count * parts; item += global_threads() / 32) {
        const i64 row = item / parts, column = (item - row * parts) * 32 * N + lane * N;
        const i64 o = row / count;
        i64 r = row - o * count;
        const u32 key = keys[r];
        if (key >= n || (r > 0 && keys[r - 1] == key) || is_long(keys, r, count)) {
            continue;
        }
        const bool inside = column < inner;
        T* target = out + (o * n + key) * inner + column;
        const T* from = src + o * count * inner + column;
        A sums[N];
        if (inside) {
            const Vector old = *(const Vector*)target;
#pragma unroll
            for (int j = 0; j < N; ++j) {
                sums[j] = widen(old.x[j]);
            }
        }
        while (true) {
            // Each lane looks at one of the next 32 sources.
            const bool same = r + lane < count && keys[r + lane] == key;
            const u32 place = same ? places[r + lane] : 0;
            const u32 others = ~__ballot_sync(0xffffffffu, same);
            const int found = others == 0 ? 32 : __ffs(others) - 1;
            for (int first = 0; first < found; first += AHEAD) {
                Vector ahead[AHEAD];
#pragma unroll
                for (int i = 0; i < AHEAD; ++i) {
                    const i64 at = (i64)__shfl_sync(0xffffffffu, place, (first + i) & 31) * inner;
                    if (inside && first + i < found) {
                        ahead[i] = *(const Vector*)(from + at);
                    }
                }
#pragma unroll
                for (int i = 0; i < AHEAD; ++i) {
                    if (inside && first + i < found) {
#pragma unroll
                        for (int j = 0; j < N; ++j) {
                            sums[j] = plus(sums[j], widen(ahead[i].x[j]));
                        }
                    }
                }
            }
            if (found < 32) {
                break;
            }
            r += 32;
        }
        if (inside) {
            Vector result;
#pragma unroll
            for (int j = 0; j < N; ++j) {
                result.x[j] = narrow<T>(sums[j]);
            }
            *(Vector*)target = result;
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) add_single(const u32* keys, const u32* places, i64 count, i64 n, i64 inner, i64 outer, const T* src, T* out) {
    add_wide<1>(keys, places, count, n, inner, outer, src, out);
}
KILN_KERNEL(add_single)

extern "C" __global__ void __launch_bounds__(THREADS) add_vectors(const u32* keys, const u32* places, i64 count, i64 n, i64 inner, i64 outer, const T* src, T* out) {
    add_wide<16 / sizeof(T)>(keys, places, count, n, inner, outer, src, out);
}
KILN_KERNEL(add_vectors)

// The same for targets of many sources, a block for `width` (a power of two up to 128) columns of each: one addition after the other, but their operands
// are read by all threads at once, while those that were read before are added.
//
// Blocks stand at every SPACING-th source. The first that stands among a target's sources sums them.
constexpr int SPACING = 64;
constexpr int AT_ONCE = sizeof(T) == 8 ? 4096 : 8192;
constexpr int READS = AT_ONCE / THREADS;

extern "C" __global__ void __launch_bounds__(THREADS) add_long(const u32* keys, const u32* places, i64 count, i64 n, i64 inner, i64 outer, const T* src, T* out, i32 width) {
    __shared__ T operands[AT_ONCE];
    const i64 parts = (inner + width - 1) / width;
    const i64 part = blockIdx.x % parts, o = blockIdx.x / parts % outer, here = blockIdx.x / parts / outer * SPACING;
    const u32 key = keys[here];
    if (key >= n || (here >= SPACING && keys[here - SPACING] == key)) {
        return;
    }
    const int t = threadIdx.x;
    const i64 looked_at = here - t;
    const i64 first = here - __syncthreads_count(t < SPACING && looked_at >= 0 && keys[looked_at] == key) + 1;
    if (!is_long(keys, first, count)) {
        return;
    }
    // The end, by a search that cuts the rest into as many parts as there are threads.
    i64 end = first, limit = count;
    for (i64 step = limit - end; step > 1;) {
        step = (limit - end + THREADS - 1) / THREADS;
        const i64 probe = end + t * step;
        const int same = __syncthreads_count(probe < limit && keys[probe] == key);
        end += (same - 1) * step;
        limit = min(limit, end + step);
    }
    ++end;
    const int column_here = t & (width - 1), row_here = t / width, rows_apart = THREADS / width, rows = AT_ONCE / width;
    const i64 column = part * width + column_here;
    const bool inside = column < inner;
    const T* from = src + o * count * inner + column;
    T* target = out + (o * n + key) * inner + column;
    const bool adds = t < width && inside;
    A sum = adds ? load(target) : A{};
    T read[READS];
    auto read_rows = [&](i64 at) {
#pragma unroll
        for (int i = 0; i < READS; ++i) {
            const i64 r = at + i * rows_apart + row_here;
            if (inside && r < end) {
                read[i] = from[(i64)places[r] * inner];
            }
        }
    };
    read_rows(first);
    for (i64 at = first; at < end; at += rows) {
        __syncthreads();
#pragma unroll
        for (int i = 0; i < READS; ++i) {
            operands[i * THREADS + t] = read[i];
        }
        __syncthreads();
        if (at + rows < end) {
            read_rows(at + rows);
        }
        if (adds) {
            const int added = end - at < rows ? (int)(end - at) : rows;
#pragma unroll 8
            for (int row = 0; row < added; ++row) {
                sum = plus(sum, widen(operands[row * width + t]));
            }
        }
    }
    if (adds) {
        store(target, sum);
    }
}
KILN_KERNEL(add_long)

// A scatter along a short dimension: a thread for each of the other coordinates takes its `extent` sources one after the other. The views are of the sources and of the
// target, with extent 1 in that dimension.
extern "C" __global__ void __launch_bounds__(THREADS) scatter_add_columns(Strided from, Strided to, i64 columns, i64 sources, i64 source_stride, i64 extent, i64 stride, const i64* index, const T* src, T* out) {
    const bool small = is_small(columns);
    for (i64 c = global_thread(); c < columns; c += global_threads()) {
        const i64 at = place_of(from, c, small), target = place_of(to, c, small);
        for (i64 j = 0; j < sources; ++j) {
            const i64 position = index[at + j * source_stride];
            if ((u64)position < (u64)extent) {
                T* place = out + target + position * stride;
                store(place, plus(load(place), load(src + at + j * source_stride)));
            }
        }
    }
}
KILN_KERNEL(scatter_add_columns)

#elif defined(SCAN)
constexpr int EACH = 16;
// Elements of a block: `CHUNK` of index.rs.
constexpr int CHUNK = THREADS * EACH;

__device__ __forceinline__ bool is_nonzero(T x) {
    return widen(x) != 0;
}

// counts[block]: how many elements of a chunk are not zero (NaN is not).
extern "C" __global__ void __launch_bounds__(THREADS) count_nonzero(const T* x, i64 n, u32* counts) {
    __shared__ u32 scratch[THREADS / 32];
    u32 count = 0;
    for (int i = 0; i < EACH; ++i) {
        const i64 at = (i64)blockIdx.x * CHUNK + i * THREADS + threadIdx.x;
        count += at < n && is_nonzero(x[at]);
    }
    count = block_sum<THREADS>(count, scratch);
    if (threadIdx.x == 0) {
        counts[blockIdx.x] = count;
    }
}
KILN_KERNEL(count_nonzero)

// The sum of x over the threads before this one; `total` becomes the sum over all.
__device__ __forceinline__ i64 sum_before(i64 x, i64* scratch, i64& total) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    i64 sum = x;
    for (int step = 1; step < 32; step *= 2) {
        const i64 other = __shfl_up_sync(0xffffffffu, sum, step);
        sum += lane >= step ? other : 0;
    }
    __syncthreads();
    if (lane == 31) {
        scratch[warp] = sum;
    }
    __syncthreads();
    i64 before = 0;
    total = 0;
    for (int w = 0; w < THREADS / 32; ++w) {
        before += w < warp ? scratch[w] : 0;
        total += scratch[w];
    }
    return before + sum - x;
}

// starts[i]: the sum of the counts before i; starts[chunks]: of all. One block.
extern "C" __global__ void __launch_bounds__(THREADS) scan_nonzero(const u32* counts, i64 chunks, i64* starts) {
    __shared__ i64 scratch[THREADS / 32];
    i64 carry = 0;
    for (i64 first = 0; first < chunks; first += THREADS) {
        const i64 at = first + threadIdx.x;
        i64 total;
        const i64 before = sum_before(at < chunks ? counts[at] : 0, scratch, total);
        if (at < chunks) {
            starts[at] = carry + before;
        }
        carry += total;
    }
    if (threadIdx.x == 0) {
        starts[chunks] = carry;
    }
}
KILN_KERNEL(scan_nonzero)

struct Extents {
    i32 rank;
    i64 shape[8];
};

// The coordinates of the elements that are not zero, ascending: `rank` numbers each.
extern "C" __global__ void __launch_bounds__(THREADS) write_nonzero(const T* x, i64 n, const i64* starts, const __grid_constant__ Extents extents, i64* out) {
    __shared__ i64 scratch[THREADS / 32];
    // A thread's elements are neighbours.
    const i64 first = (i64)blockIdx.x * CHUNK + threadIdx.x * EACH;
    u32 found = 0;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        if (first + i < n && is_nonzero(x[first + i])) {
            found |= 1u << i;
        }
    }
    i64 total;
    i64 to = starts[blockIdx.x] + sum_before(__popc(found), scratch, total);
    for (; found != 0; found &= found - 1, ++to) {
        i64 rest = first + __ffs(found) - 1;
        for (int d = extents.rank - 1; d >= 0; --d) {
            const i64 next = rest / extents.shape[d];
            out[to * extents.rank + d] = rest - next * extents.shape[d];
            rest = next;
        }
    }
}
KILN_KERNEL(write_nonzero)
#endif
