#include "kiln.cuh"
#include "axis_maps.cuh"
// Linear maps of images that factor over the axes: average pooling, interpolation, and their transposes. Macros: T, CHANNELS (channels of a thread: 4 or 1).

typedef Compute<T> Sum;
typedef Pack<T, CHANNELS> Channels;

extern "C" __global__ void __launch_bounds__(256)
resample(const AxisTables maps, const Sum* __restrict__ factors, const i32* __restrict__ numbers, const T* __restrict__ x, T* __restrict__ out, const i64 count,
    const i32 channels) {
    const AxisTable &md = maps.axis[0], &mh = maps.axis[1], &mw = maps.axis[2];
    for (i64 i = global_thread(); i < count; i += global_threads()) {
        const Place at = place_of(i, md.outputs, mh.outputs, mw.outputs, channels / CHANNELS);
        const Taps d = taps_of(md, numbers, at.d), h = taps_of(mh, numbers, at.h), w = taps_of(mw, numbers, at.w);
        const T* const image = x + at.image * md.inputs * mh.inputs * mw.inputs * channels + at.line * CHANNELS;
        const Sum divisor = factors[md.divisors + at.d] * factors[mh.divisors + at.h] * factors[mw.divisors + at.w];
        const bool single = d.end - d.begin == 1 && h.end - h.begin == 1 && w.end - w.begin == 1;
        Sum sum[CHANNELS] = {};
        Channels line = {};
        bool copied = false;
        for (i32 td = d.begin; td < d.end; ++td) {
            for (i32 th = h.begin; th < h.end; ++th) {
                const i64 row = ((i64)numbers[md.indices + td] * mh.inputs + numbers[mh.indices + th]) * mw.inputs;
                const Sum factor = factors[md.weights + td] * factors[mh.weights + th];
                for (i32 tw = w.begin; tw < w.end; ++tw) {
                    line = *(const Channels*)(image + (row + numbers[mw.indices + tw]) * channels);
                    const Sum weight = factor * factors[mw.weights + tw];
                    // A copy keeps the sign of zero.
                    copied = single && weight == Sum(1) && divisor == Sum(1);
#pragma unroll
                    for (i32 e = 0; e < CHANNELS; ++e) {
                        sum[e] += weight * widen<T>(line.x[e]);
                    }
                }
            }
        }
#pragma unroll
        for (i32 e = 0; e < CHANNELS; ++e) {
            line.x[e] = copied ? line.x[e] : narrow<T>(sum[e] / divisor);
        }
        *(Channels*)(out + i * CHANNELS) = line;
    }
}
KILN_KERNEL(resample)
