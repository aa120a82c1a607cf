#include "kiln.cuh"
#include "conv_geometry.cuh"
// The gradient of a convolution by its weights, as a product over target pixels: rows are target channels, columns are taps × source channels.
//
// Macros: T, DENSE_VECTOR and SOURCE_VECTOR (1 where the channels of a target or source pixel are read by 16 bytes, 0 by elements), STAGES, BLOCKS, and those
// of conv_tile.cuh.
//
// In essence, for target channels m and columns (tap, c):     for p in target pixels { acc[m][(tap, c)] += target[p][m] · source[s(p, tap)][c] }
//  1. A thread copies the same column, thus one tap, at every step; the pixels of a step are looked up one step before by one thread each.
//  2. Pixels are cut into parts, whose sums conv_weight_finish adds in order. Their number depends on the shape alone.
#define A_ROWS 0
#include "conv_tile.cuh"

constexpr i32 LINE = 16 / (i32)sizeof(T);
constexpr i32 DENSE_V = DENSE_VECTOR ? LINE : 1, SOURCE_V = SOURCE_VECTOR ? LINE : 1;
constexpr i32 DENSE_COPIES = BM / DENSE_V, SOURCE_COPIES = BN / SOURCE_V;
static_assert(THREADS % SOURCE_COPIES == 0 && BK % (THREADS / SOURCE_COPIES) == 0 && THREADS >= BK, "a thread copies from one column");

// A target pixel: the first pixel of its image in the source, and what a tap's position is counted from.
struct Pixel {
    i64 source;
    i32 base[3];
    i32 exists;
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
conv_weight(const ConvGather g, const T* __restrict__ source, const T* __restrict__ target, Sum* __restrict__ partial, const i32 parts, const i32 tiles_m,
    const i32 tiles_n, const i32 aligned) {
    KILN_SHARED(u8, shared);
    T* const stages = (T*)shared;
    Pixel* const table = (Pixel*)(shared + STAGES * STAGE_SIZE * sizeof(T));

    i64 block = blockIdx.x;
    const i32 tile_n = (i32)(block % tiles_n);
    block /= tiles_n;
    const i32 tile_m = (i32)(block % tiles_m);
    block /= tiles_m;
    const i32 group = (i32)(block % g.groups);
    const i32 part = (i32)(block / g.groups);

    const i64 pixels = g.n * g.axis[0].target * g.axis[1].target * g.axis[2].target;
    const i64 blocks_of_pixels = (pixels + BK - 1) / BK;
    const i64 first = blocks_of_pixels * part / parts * BK;
    const i64 end = min(pixels, blocks_of_pixels * (part + 1) / parts * BK);
    const i32 steps = (i32)((end - first + BK - 1) / BK);

    // Looks up the pixels of a step. Those of the next step are looked up while these are copied.
    const auto look_up = [&](i32 step) {
        if ((i32)threadIdx.x < BK) {
            const i64 pixel = first + (i64)step * BK + threadIdx.x;
            i64 outer, image;
            i32 t0, t1, t2, none;
            split3(pixel, g.axis[1].target, g.axis[2].target, outer, t1, t2);
            split3(outer, 1, g.axis[0].target, image, none, t0);
            const i32 at[3] = {t0, t1, t2};
            Pixel& entry = table[step % 2 * BK + threadIdx.x];
            entry.source = image * g.axis[0].source * g.axis[1].source * g.axis[2].source;
#pragma unroll
            for (i32 a = 0; a < 3; ++a) {
                entry.base[a] = base_of(g, a, at[a]);
            }
            entry.exists = pixel < end;
        }
    };

    const i32 columns = conv_taps(g) * g.cin;
    const i32 n = (i32)threadIdx.x % SOURCE_COPIES * SOURCE_V, my_row = threadIdx.x / SOURCE_COPIES;
    const i32 column = tile_n * BN + n;
    i32 tap = column / g.cin;
    const i32 channel = group * g.cin + column - tap * g.cin;
    const bool is_column = column < columns;
    i32 shift[3];
#pragma unroll
    for (i32 a = 2; a >= 0; --a) {
        shift[a] = tap % g.axis[a].kernel * g.axis[a].dilation;
        tap /= g.axis[a].kernel;
    }
    const i32 source_len = g.groups * g.cin, target_len = g.groups * g.cout;

    const auto copy_step = [&](i32 step, i32 stage) {
        T* const a = stages + stage * STAGE_SIZE;
        const i64 pixel = first + (i64)step * BK;
#pragma unroll 4
        for (i32 i = threadIdx.x; i < BK * DENSE_COPIES; i += THREADS) {
            const i32 row = i / DENSE_COPIES, m = i % DENSE_COPIES * DENSE_V;
            const bool exists = pixel + row < end && tile_m * BM + m < g.cout;
            const T* const from = target + (exists ? (pixel + row) * target_len + (i64)group * g.cout + tile_m * BM + m : 0);
            if constexpr (DENSE_VECTOR) {
                copy16(a + a_place(row, m), from, exists);
            } else {
                copy1(a + a_place(row, m), from, exists);
            }
        }
        T* const b = a + A_SIZE;
#pragma unroll 4
        for (i32 row = my_row; row < BK; row += THREADS / SOURCE_COPIES) {
            const Pixel& entry = table[step % 2 * BK + row];
            const i32 d = source_of(g, 0, entry.base[0], shift[0]);
            const i32 h = source_of(g, 1, entry.base[1], shift[1]);
            const i32 v = source_of(g, 2, entry.base[2], shift[2]);
            const bool exists = is_column && entry.exists && (u32)d < (u32)g.axis[0].source && (u32)h < (u32)g.axis[1].source && (u32)v < (u32)g.axis[2].source;
            const i64 at = entry.source + ((i64)d * g.axis[1].source + h) * g.axis[2].source + v;
            const T* const from = source + (exists ? at * source_len + channel : 0);
            if constexpr (SOURCE_VECTOR) {
                copy16(b + b_place(row, n), from, exists);
            } else {
                copy1(b + b_place(row, n), from, exists);
            }
        }
    };

    Tile tile;
    look_up(0);
#pragma unroll
    for (i32 s = 0; s < STAGES - 1; ++s) {
        __syncthreads();
        if (s < steps) {
            copy_step(s, s);
        }
        look_up(s + 1);
        copies_commit();
    }
    for (i32 step = 0, stage = 0; step < steps; ++step) {
        await_stage<STAGES - 2>();
        multiply_stage(tile, stages + stage * STAGE_SIZE, [&]() {
            const i32 ahead = step + STAGES - 1;
            if (ahead < steps) {
                copy_step(ahead, stage == 0 ? STAGES - 1 : stage - 1);
            }
            look_up(ahead + 1);
            copies_commit();
        });
        stage = stage == STAGES - 1 ? 0 : stage + 1;
    }

    Sum* const sums = partial + ((i64)part * g.groups + group) * g.cout * columns;
    tile.each([&](i32 m, i32 n, const Sum (&sum)[GROUP]) {
        const i32 row = tile_m * BM + m, at = tile_n * BN + n;
        if (row < g.cout && at < columns) {
            store_group(sums + (i64)row * columns + at, at, columns, aligned, [&](i32 e) { return sum[e]; });
        }
    });
}
KILN_KERNEL(conv_weight)
