#include "kiln.cuh"
#include "conv_geometry.cuh"
// What comes before and after the products of a convolution: weights in the order of the sums, and sums of parts added up. Macro: T.

typedef Compute<T> Sum;

// Where a tap's weights lie among those of all phases; -1 if no target uses it.
__device__ __forceinline__ i32 packed_row(const ConvGather& g, i32 tap) {
    ConvPhase phase[3];
    i32 place[3];
    for (i32 a = 2; a >= 0; --a) {
        const ConvAxis& axis = g.axis[a];
        const i32 at = tap % axis.kernel;
        tap /= axis.kernel;
        // The first target of the phase, counted from the start of the padding.
        const i32 rest = (at * axis.dilation - axis.padding) % axis.stride;
        const i32 p = rest < 0 ? rest + axis.stride : rest;
        if (p >= axis.target) {
            return -1;
        }
        phase[a] = phase_of(g, a, p);
        place[a] = (at - phase[a].first_tap) / axis.tap_step;
    }
    return phase_start(g, phase[0], phase[1], phase[2]) + (place[0] * phase[1].taps + place[1]) * phase[2].taps + place[2];
}

// Weights of every group as [tap][c][j] (`k_rows`: [j][tap][c]), taps in the order of their phases, rows filled up to `width` with zeros. The taps of a
// pair of channels are cut into `parts`, for as many threads.
extern "C" __global__ void __launch_bounds__(128)
conv_pack(const ConvGather g, const T* __restrict__ w, T* __restrict__ packed, const i32 width, const i32 k_rows, const i32 parts) {
    const i32 taps = conv_taps(g);
    const i64 pairs = (i64)g.groups * g.cin * width;
    for (i64 i = global_thread(); i < pairs * parts; i += global_threads()) {
        const i32 part = (i32)(i / pairs);
        i64 outer, group;
        i32 j, c, none;
        split3(i - part * pairs, 1, width, outer, none, j);
        split3(outer, 1, g.cin, group, none, c);
        const i64 in_group = (i64)taps * g.cin;
        const T* const from = w + group * g.cin * g.cout * taps + c * g.in_stride + j * g.out_stride;
        T* const to = packed + group * in_group * width + (k_rows ? j * in_group + c : (i64)c * width + j);
        const i64 step = (i64)g.cin * (k_rows ? 1 : width);
        const i32 end = (i32)((i64)taps * (part + 1) / parts);
        for (i32 tap = (i32)((i64)taps * part / parts); tap < end; ++tap) {
            const i32 row = g.transposed ? packed_row(g, tap) : tap;
            if (row >= 0) {
                to[row * step] = j < g.cout ? from[tap] : T{};
            }
        }
    }
}
KILN_KERNEL(conv_pack)

// y = Σ parts + bias, the parts in order; `channels` are those of all groups.
extern "C" __global__ void __launch_bounds__(256)
conv_finish(const Sum* __restrict__ partial, const T* __restrict__ bias, T* __restrict__ y, const i64 count, const i32 channels, const i32 parts) {
    for (i64 i = global_thread(); i < count; i += global_threads()) {
        Sum sum = 0;
#pragma unroll 8
        for (i32 part = 0; part < parts; ++part) {
            sum += partial[part * count + i];
        }
        store(y + i, sum + (bias ? load(bias + i % channels) : Sum(0)));
    }
}
KILN_KERNEL(conv_finish)

// The weights' gradient from parts [part][group][target channel][tap][source channel], added in order.
extern "C" __global__ void __launch_bounds__(256)
conv_weight_finish(const ConvGather g, const Sum* __restrict__ partial, T* __restrict__ gw, const i32 parts) {
    const i32 taps = conv_taps(g);
    const i64 in_group = (i64)g.cin * g.cout * taps, count = g.groups * in_group;
    for (i64 i = global_thread(); i < count; i += global_threads()) {
        Sum sum = 0;
#pragma unroll 8
        for (i32 part = 0; part < parts; ++part) {
            sum += partial[part * count + i];
        }
        i64 outer, group;
        i32 c, tap, m, none;
        split3(i, taps, g.cin, outer, tap, c);
        split3(outer, 1, g.cout, group, none, m);
        store(gw + group * in_group + c * g.in_stride + m * g.out_stride + tap, sum);
    }
}
KILN_KERNEL(conv_weight_finish)
