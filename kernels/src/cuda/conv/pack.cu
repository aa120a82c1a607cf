#include "kiln.cuh"
#include "conv_geometry.cuh"
// What comes before and after the products of a convolution: weights in the order of the sums, and sums of parts added up. Macro: T.

typedef Compute<T> Sum;

// Weights of every group as [tap][c][j] (`k_rows`: [j][tap][c]), taps in the order of their phases, rows filled up to `width` with zeros.
extern "C" __global__ void __launch_bounds__(256)
conv_pack(const ConvGather g, const T* __restrict__ w, T* __restrict__ packed, const i32 width, const i32 k_rows) {
    const i32 taps = conv_taps(g);
    const i64 count = (i64)g.groups * g.cin * width;
    for (i64 i = global_thread(); i < count; i += global_threads()) {
        i64 outer, group;
        i32 j, c, none;
        split3(i, 1, width, outer, none, j);
        split3(outer, 1, g.cin, group, none, c);
        const i64 in_group = (i64)taps * g.cin;
        const T* const from = w + group * g.cin * g.cout * taps + c * g.in_stride + j * g.out_stride;
        T* const to = packed + group * in_group * width + (k_rows ? j * in_group + c : (i64)c * width + j);
        const i64 step = (i64)g.cin * (k_rows ? 1 : width);
        if (!g.transposed) {
            for (i32 tap = 0; tap < taps; ++tap) {
                to[tap * step] = j < g.cout ? from[tap] : T{};
            }
            continue;
        }
        i32 tap = 0;
        for (i32 t0 = 0; t0 < g.axis[0].kernel; ++t0) {
            for (i32 t1 = 0; t1 < g.axis[1].kernel; ++t1) {
                for (i32 t2 = 0; t2 < g.axis[2].kernel; ++t2, ++tap) {
                    const i32 at[3] = {t0, t1, t2};
                    ConvPhase phase[3];
                    i32 place[3];
                    bool used = true;
                    for (i32 a = 0; a < 3; ++a) {
                        const ConvAxis& axis = g.axis[a];
                        // The first target of the phase, counted from the start of the padding.
                        const i32 rest = (at[a] * axis.dilation - axis.padding) % axis.stride;
                        const i32 p = rest < 0 ? rest + axis.stride : rest;
                        used = used && p < axis.target;
                        phase[a] = used ? phase_of(g, a, p) : ConvPhase{0, 0, 0, 0, 0};
                        place[a] = (at[a] - phase[a].first_tap) / axis.tap_step;
                    }
                    if (used) {
                        const i32 row = phase_start(g, phase[0], phase[1], phase[2]) + (place[0] * phase[1].taps + place[1]) * phase[2].taps + place[2];
                        to[row * step] = j < g.cout ? from[tap] : T{};
                    }
                }
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
#pragma unroll 4
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
#pragma unroll 4
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
