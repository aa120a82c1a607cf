#include "kiln.cuh"
#include "conv_geometry.cuh"
// Convolution and its gradient by the input, as a product whose left factor is gathered while it is loaded.
//
// Macros: T, VECTOR (1 where a source pixel's channels are read by 16 bytes, 0 by elements), PARTIAL (1: sums of a part of the taps and channels, in f32 or
// f64, to be finished by conv_finish), STAGES, BLOCKS (that a multiprocessor is to hold), and those of conv_tile.cuh.
//
// In essence, for target pixels m of a phase and target channels n:
//     for k in taps × source channels { acc[m][n] += x[source(m, tap)][c] · w[k][n] }     y[m][n] = acc[m][n] + bias[n]
//  1. The pixels of a tile are looked up once (`rows`); a thread copies the same few of them at every step, each a part of one tap's channels.
//  2. Weights were packed in the order of k, rows padded with zeros to whole tiles, so they need no lookup.
//  3. Copies run STAGES - 1 steps ahead of the products.
// The order of a sum depends on k and the number of parts alone.
#define A_ROWS 1
#include "conv_tile.cuh"

constexpr i32 V = VECTOR ? 16 / (i32)sizeof(T) : 1;
// Copies of a row of the tile at one step, rows that the threads copy at once, and how often they do.
constexpr i32 A_COPIES = BK / V;
constexpr i32 A_ROWS_AT_ONCE = THREADS / A_COPIES;
constexpr i32 A_TURNS = BM / A_ROWS_AT_ONCE;
constexpr i32 B_COPIES = BN * (i32)sizeof(T) / 16;
static_assert(THREADS % A_COPIES == 0 && BM % A_ROWS_AT_ONCE == 0, "all threads copy alike");

// A target pixel; pixels are counted over all images. What is out of the tile's phase has a source outside of any image.
struct Row {
    i64 source;
    i64 target;
    i32 first[3];
    i32 unused;
};
constexpr i32 OUTSIDE = -(1 << 30) - (1 << 29);

// The taps of a phase, and the place of k among them.
struct Taps {
    i32 count[3];
    i32 at[3];
    i32 c;

    __device__ __forceinline__ void seek(i32 tap) {
        at[2] = tap % count[2];
        tap /= count[2];
        at[1] = tap % count[1];
        at[0] = tap / count[1];
    }
    // Goes `step` further in k; true if that leaves the tap.
    __device__ __forceinline__ bool advance(i32 step, i32 channels) {
        c += step;
        if (c < channels) {
            return false;
        }
        if constexpr (VECTOR) {
            do {
                c -= channels;
                if (++at[2] == count[2]) {
                    at[2] = 0;
                    if (++at[1] == count[1]) {
                        at[1] = 0;
                        ++at[0];
                    }
                }
            } while (c >= channels);
        } else {
            const i32 taps = c / channels;
            c -= taps * channels;
            seek((at[0] * count[1] + at[1]) * count[2] + at[2] + taps);
        }
        return true;
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
conv_gather(const ConvGather g, const T* __restrict__ x, const T* __restrict__ w, const T* __restrict__ bias, T* __restrict__ y, Sum* __restrict__ partial,
    const i32 parts, const i32 tiles_m, const i32 tiles_n, const i32 phases, const i32 aligned) {
    KILN_SHARED(u8, shared);
    T* const stages = (T*)shared;
    Row* const rows = (Row*)(shared + STAGES * STAGE_SIZE * sizeof(T));

    i64 block = blockIdx.x;
    const i32 tile_n = (i32)(block % tiles_n);
    block /= tiles_n;
    const i32 tile_m = (i32)(block % tiles_m);
    block /= tiles_m;
    const i32 group = (i32)(block % g.groups);
    block /= g.groups;
    i32 p[3];
    axes_of_phase(g, (i32)(block % phases), p);
    const i32 part = (i32)(block / phases);

    const ConvPhase d = phase_of(g, 0, p[0]), h = phase_of(g, 1, p[1]), v = phase_of(g, 2, p[2]);
    const i64 pixels = g.n * d.targets * h.targets * v.targets;
    const i64 first_row = (i64)tile_m * BM;
    if (first_row >= pixels) {
        return;
    }
    for (i32 r = threadIdx.x; r < BM; r += THREADS) {
        Row row = {0, -1, {OUTSIDE, OUTSIDE, OUTSIDE}, 0};
        if (first_row + r < pixels) {
            i64 outer, image;
            i32 q0, q1, q2, none;
            split3(first_row + r, h.targets, v.targets, outer, q1, q2);
            split3(outer, 1, d.targets, image, none, q0);
            row.source = image * g.axis[0].source * g.axis[1].source * g.axis[2].source;
            row.target = ((image * g.axis[0].target + p[0] + (i64)q0 * g.axis[0].period) * g.axis[1].target + p[1] + (i64)q1 * g.axis[1].period) *
                    g.axis[2].target +
                p[2] + (i64)q2 * g.axis[2].period;
            row.first[0] = d.first + q0 * g.axis[0].target_step;
            row.first[1] = h.first + q1 * g.axis[1].target_step;
            row.first[2] = v.first + q2 * g.axis[2].target_step;
        }
        rows[r] = row;
    }
    __syncthreads();

    const i32 all_k = d.taps * h.taps * v.taps * g.cin;
    const i64 blocks_of_k = (all_k + BK - 1) / BK;
    const i32 first_k = (i32)(blocks_of_k * part / parts) * BK;
    const i32 end_k = min(all_k, (i32)(blocks_of_k * (part + 1) / parts) * BK);
    const i32 steps = max(0, (end_k - first_k + BK - 1) / BK);

    // Where the weights of this tile start, and how wide their rows are.
    const i32 width = tiles_n * BN;
    const T* const weights = w + ((i64)group * conv_taps(g) + phase_start(g, d, h, v)) * g.cin * width + tile_n * BN;

    const i32 column = (i32)threadIdx.x % A_COPIES * V, my_row = threadIdx.x / A_COPIES;
    Taps taps = {{max(d.taps, 1), max(h.taps, 1), max(v.taps, 1)}, {0, 0, 0}, 0};
    i32 k = first_k + column;
    if (g.cin > 0) {
        taps.c = k % g.cin;
        taps.seek(k / g.cin);
    }
    const i32 pixel_len = g.groups * g.cin;
    // Element of the source that is to be copied next into each of this thread's rows, and whether there is one.
    i64 at[VECTOR ? A_TURNS : 1];
    u32 inside = 0;
    static_assert(!VECTOR || A_TURNS <= 32, "a bit each");
    const auto look_up = [&](i32 turn, i64& element) -> bool {
        const Row& row = rows[my_row + turn * A_ROWS_AT_ONCE];
        const i32 sd = row.first[0] + taps.at[0] * g.axis[0].source_step;
        const i32 sh = row.first[1] + taps.at[1] * g.axis[1].source_step;
        const i32 sv = row.first[2] + taps.at[2] * g.axis[2].source_step;
        const bool within = (u32)sd < (u32)g.axis[0].source && (u32)sh < (u32)g.axis[1].source && (u32)sv < (u32)g.axis[2].source;
        const i64 pixel = row.source + ((i64)sd * g.axis[1].source + sh) * g.axis[2].source + sv;
        element = within ? pixel * pixel_len + (group * g.cin + taps.c) : 0;
        return within;
    };
    const auto look_up_all = [&]() {
        if constexpr (VECTOR) {
            inside = 0;
#pragma unroll
            for (i32 turn = 0; turn < A_TURNS; ++turn) {
                inside |= (u32)look_up(turn, at[turn]) << turn;
            }
        }
    };
    look_up_all();
    i32 loaded = first_k;
    const auto copy_step = [&](i32 stage) {
        T* const a = stages + stage * STAGE_SIZE;
        if constexpr (VECTOR) {
#pragma unroll
            for (i32 turn = 0; turn < A_TURNS; ++turn) {
                copy16(a + a_place(my_row + turn * A_ROWS_AT_ONCE, column), x + at[turn], k < end_k && (inside >> turn & 1));
            }
        } else {
#pragma unroll 4
            for (i32 turn = 0; turn < A_TURNS; ++turn) {
                i64 element;
                const bool within = k < end_k && look_up(turn, element);
                copy1(a + a_place(my_row + turn * A_ROWS_AT_ONCE, column), x + (within ? element : 0), within);
            }
        }
        T* const b = stages + stage * STAGE_SIZE + A_SIZE;
#pragma unroll
        for (i32 i = threadIdx.x; i < BK * B_COPIES; i += THREADS) {
            const i32 row = i / B_COPIES, n = i % B_COPIES * (16 / (i32)sizeof(T));
            const bool exists = loaded + row < end_k;
            copy16(b + b_place(row, n), weights + (exists ? (i64)(loaded + row) * width + n : 0), exists);
        }
        loaded += BK;
        k += BK;
        if (taps.advance(BK, g.cin)) {
            look_up_all();
        } else if constexpr (VECTOR) {
#pragma unroll
            for (i32 turn = 0; turn < A_TURNS; ++turn) {
                at[turn] += BK;
            }
        }
    };

    Tile tile;
#pragma unroll
    for (i32 s = 0; s < STAGES - 1; ++s) {
        if (s < steps) {
            copy_step(s);
        }
        copies_commit();
    }
    for (i32 step = 0, stage = 0; step < steps; ++step) {
        await_stage<STAGES - 2>();
        multiply_stage(tile, stages + stage * STAGE_SIZE, [&]() {
            if (step + STAGES - 1 < steps) {
                copy_step(stage == 0 ? STAGES - 1 : stage - 1);
            }
            copies_commit();
        });
        stage = stage == STAGES - 1 ? 0 : stage + 1;
    }

    const i64 target_len = (i64)g.groups * g.cout;
    tile.each([&](i32 r, i32 n, const Sum (&sum)[GROUP]) {
        const i64 target = rows[r].target;
        const i32 channel = tile_n * BN + n;
        if (target < 0 || channel >= g.cout) {
            return;
        }
        const i64 element = target * target_len + (i64)group * g.cout + channel;
        if constexpr (PARTIAL) {
            const i64 images = g.n * g.axis[0].target * g.axis[1].target * g.axis[2].target;
            store_group(partial + part * images * target_len + element, channel, g.cout, aligned, [&](i32 e) { return sum[e]; });
        } else {
            store_group(y + element, channel, g.cout, aligned,
                [&](i32 e) { return sum[e] + (bias && channel + e < g.cout ? load(bias + (i64)group * g.cout + channel + e) : Sum(0)); });
        }
    });
}
KILN_KERNEL(conv_gather)
