// Copies between layouts. T is an unsigned integer of the element's size: nothing is computed.
#include "kiln.cuh"

struct Layouts {
    i64 shape[8];
    i64 from[8];
    i64 to[8];
    i32 rank;
    // Elements of the innermost dimension that move as one access.
    i32 width;
    i64 numel;
};

__device__ __forceinline__ void offsets_of(const Layouts& l, i64 i, i64& from, i64& to) {
    from = to = 0;
#pragma unroll 1
    for (int d = l.rank - 1; d > 0; --d) {
        i64 rest;
        if (l.numel <= 0x7fffffff) {
            rest = (u32)i / (u32)l.shape[d];
        } else {
            rest = i / l.shape[d];
        }
        i64 at = i - rest * l.shape[d];
        from += at * l.from[d];
        to += at * l.to[d];
        i = rest;
    }
    if (l.rank > 0) {
        from += i * l.from[0];
        to += i * l.to[0];
    }
}

template <int WIDTH> __device__ __forceinline__ void copy_groups(const Layouts& l, const T* from, T* to) {
    constexpr int GROUPS = 4;
    i64 first = ((i64)blockIdx.x * 256 * GROUPS + threadIdx.x) * WIDTH;
    Pack<T, WIDTH> packs[GROUPS];
    i64 targets[GROUPS];
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
        i64 i = first + (i64)g * 256 * WIDTH, source;
        if (i < l.numel) {
            offsets_of(l, i, source, targets[g]);
            packs[g] = *(const Pack<T, WIDTH>*)(from + source);
        }
    }
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
        if (first + (i64)g * 256 * WIDTH < l.numel) {
            *(Pack<T, WIDTH>*)(to + targets[g]) = packs[g];
        }
    }
}

extern "C" __global__ void __launch_bounds__(256) copy_strided(const Layouts l, const T* from, T* to) {
    if (l.width == 1) {
        copy_groups<1>(l, from, to);
    } else {
        copy_groups<16 / sizeof(T)>(l, from, to);
    }
}
KILN_KERNEL(copy_strided)

// The last dimension is contiguous in the target, the one before it in the source: tiles go through shared memory, so that both sides are
// accessed along their lines. One block a tile; the outer dimensions are walked as in `copy_strided`.
extern "C" __global__ void __launch_bounds__(256) copy_transposed(const Layouts l, const T* from, T* to) {
    constexpr int SIDE = 32;
    __shared__ T tile[SIDE][SIDE + 1];
    const i64 rows = l.shape[l.rank - 2], cols = l.shape[l.rank - 1];
    const i64 row_tiles = (rows + SIDE - 1) / SIDE, col_tiles = (cols + SIDE - 1) / SIDE;
    i64 block = blockIdx.x;
    const i64 col0 = block % col_tiles * SIDE;
    block /= col_tiles;
    const i64 row0 = block % row_tiles * SIDE;
    Layouts outer = l;
    outer.rank = l.rank - 2;
    i64 source, target;
    offsets_of(outer, block / row_tiles, source, target);
    const int x = threadIdx.x % SIDE, y = threadIdx.x / SIDE;
#pragma unroll
    for (int j = y; j < SIDE; j += 256 / SIDE) {
        if (col0 + j < cols && row0 + x < rows) {
            tile[j][x] = from[source + (row0 + x) * l.from[l.rank - 2] + (col0 + j) * l.from[l.rank - 1]];
        }
    }
    __syncthreads();
#pragma unroll
    for (int i = y; i < SIDE; i += 256 / SIDE) {
        if (row0 + i < rows && col0 + x < cols) {
            to[target + (row0 + i) * l.to[l.rank - 2] + (col0 + x) * l.to[l.rank - 1]] = tile[x][i];
        }
    }
}
KILN_KERNEL(copy_transposed)
