#include "kiln.cuh"
#include "axis_maps.cuh"
// Max pooling: the maximum of each window and where its first occurrence lies; and moving values from there and to there. Macros: T, CHANNELS (channels of a
// thread: 4 or 1). An index counts the positions of an image; -1 marks a window without inputs.

typedef Compute<T> Sum;
typedef Pack<T, CHANNELS> Channels;
typedef Pack<i32, CHANNELS> Indices;

extern "C" __global__ void __launch_bounds__(256)
max_pool(const AxisTables windows, const i32* __restrict__ numbers, const T* __restrict__ x, T* __restrict__ values, i32* __restrict__ indices, const i64 count,
    const i32 channels) {
    const AxisTable &md = windows.axis[0], &mh = windows.axis[1], &mw = windows.axis[2];
    for (i64 i = global_thread(); i < count; i += global_threads()) {
        const Place at = place_of(i, md.outputs, mh.outputs, mw.outputs, channels / CHANNELS);
        const Taps d = taps_of(md, numbers, at.d), h = taps_of(mh, numbers, at.h), w = taps_of(mw, numbers, at.w);
        const T* const image = x + at.image * md.inputs * mh.inputs * mw.inputs * channels + at.line * CHANNELS;
        Sum best[CHANNELS];
        Indices index;
#pragma unroll
        for (i32 e = 0; e < CHANNELS; ++e) {
            best[e] = (Sum)-__uint_as_float(0x7f800000);
            index.x[e] = -1;
        }
        for (i32 td = d.begin; td < d.end; ++td) {
            for (i32 th = h.begin; th < h.end; ++th) {
                const i32 row = (numbers[md.indices + td] * mh.inputs + numbers[mh.indices + th]) * mw.inputs;
                for (i32 tw = w.begin; tw < w.end; ++tw) {
                    const i32 position = row + numbers[mw.indices + tw];
                    const Channels line = *(const Channels*)(image + (i64)position * channels);
#pragma unroll
                    for (i32 e = 0; e < CHANNELS; ++e) {
                        const Sum value = widen<T>(line.x[e]);
                        // Not "below or equal" is "above, or one of them is NaN"; a NaN that is in already stays. A window of nothing but -inf has its
                        // first input as maximum.
                        const bool take = index.x[e] < 0 || (!(value <= best[e]) && best[e] == best[e]);
                        best[e] = take ? value : best[e];
                        index.x[e] = take ? position : index.x[e];
                    }
                }
            }
        }
        Channels out;
#pragma unroll
        for (i32 e = 0; e < CHANNELS; ++e) {
            out.x[e] = narrow<T>(best[e]);
        }
        *(Channels*)(values + i * CHANNELS) = out;
        *(Indices*)(indices + i * CHANNELS) = index;
    }
}
KILN_KERNEL(max_pool)

// Each input's sum of the gradients of the windows that chose it. `cover` gives the windows of each input: the transposed maps.
extern "C" __global__ void __launch_bounds__(256)
max_pool_backward(const AxisTables cover, const i32* __restrict__ numbers, const T* __restrict__ gy, const i32* __restrict__ indices, T* __restrict__ gx,
    const i64 count, const i32 channels) {
    const AxisTable &cd = cover.axis[0], &ch = cover.axis[1], &cw = cover.axis[2];
    for (i64 i = global_thread(); i < count; i += global_threads()) {
        const Place at = place_of(i, cd.outputs, ch.outputs, cw.outputs, channels / CHANNELS);
        const Taps d = taps_of(cd, numbers, at.d), h = taps_of(ch, numbers, at.h), w = taps_of(cw, numbers, at.w);
        const i32 position = (at.d * ch.outputs + at.h) * cw.outputs + at.w;
        const i64 image = at.image * cd.inputs * ch.inputs * cw.inputs;
        Sum sum[CHANNELS] = {};
        for (i32 td = d.begin; td < d.end; ++td) {
            for (i32 th = h.begin; th < h.end; ++th) {
                const i64 row = image + ((i64)numbers[cd.indices + td] * ch.inputs + numbers[ch.indices + th]) * cw.inputs;
                for (i32 tw = w.begin; tw < w.end; ++tw) {
                    const i64 from = (row + numbers[cw.indices + tw]) * channels + at.line * CHANNELS;
                    const Indices index = *(const Indices*)(indices + from);
                    const Channels line = *(const Channels*)(gy + from);
#pragma unroll
                    for (i32 e = 0; e < CHANNELS; ++e) {
                        sum[e] += index.x[e] == position ? widen<T>(line.x[e]) : Sum(0);
                    }
                }
            }
        }
        Channels out;
#pragma unroll
        for (i32 e = 0; e < CHANNELS; ++e) {
            out.x[e] = narrow<T>(sum[e]);
        }
        *(Channels*)(gx + i * CHANNELS) = out;
    }
}
KILN_KERNEL(max_pool_backward)

// out[o][c] = x[indices[o][c]][c], 0 where there is no input.
extern "C" __global__ void __launch_bounds__(256)
max_pool_gather(const T* __restrict__ x, const i32* __restrict__ indices, T* __restrict__ out, const i64 count, const i64 outputs, const i64 inputs,
    const i32 channels) {
    for (i64 i = global_thread(); i < count; i += global_threads()) {
        const i64 image = i / (outputs * channels);
        const i32 index = indices[i];
        out[i] = index < 0 ? T{} : x[(image * inputs + index) * channels + i % channels];
    }
}
KILN_KERNEL(max_pool_gather)
