#include "kiln.cuh"
#include "conv_geometry.cuh"
// Depthwise convolution, one channel a group: all passes in plain loops. Macros: T, CHANNELS (channels of a thread: 4 or 1).

typedef Compute<T> Sum;
typedef Pack<T, CHANNELS> Channels;

// The source pixel of a target under a tap, in its image; -1 if there is none.
__device__ __forceinline__ i64 source_pixel(const ConvGather& g, i32 b0, i32 b1, i32 b2, i32 t0, i32 t1, i32 t2) {
    const i32 d = source_of(g, 0, b0, t0 * g.axis[0].dilation);
    const i32 h = source_of(g, 1, b1, t1 * g.axis[1].dilation);
    const i32 w = source_of(g, 2, b2, t2 * g.axis[2].dilation);
    const bool inside = (u32)d < (u32)g.axis[0].source && (u32)h < (u32)g.axis[1].source && (u32)w < (u32)g.axis[2].source;
    return inside ? ((i64)d * g.axis[1].source + h) * g.axis[2].source + w : -1;
}

extern "C" __global__ void __launch_bounds__(256)
conv_depthwise(const ConvGather g, const T* __restrict__ x, const T* __restrict__ w, const T* __restrict__ bias, T* __restrict__ y) {
    const i32 taps = conv_taps(g), lines = g.groups / CHANNELS;
    const i64 source_image = (i64)g.axis[0].source * g.axis[1].source * g.axis[2].source;
    const i64 count = g.n * g.axis[0].target * g.axis[1].target * g.axis[2].target * lines;
    for (i64 i = global_thread(); i < count; i += global_threads()) {
        i64 pixel, outer, image;
        i32 none, c, o0, o1, o2;
        split3(i, 1, lines, pixel, none, c);
        split3(pixel, g.axis[1].target, g.axis[2].target, outer, o1, o2);
        split3(outer, 1, g.axis[0].target, image, none, o0);
        c *= CHANNELS;
        const i32 b0 = base_of(g, 0, o0), b1 = base_of(g, 1, o1), b2 = base_of(g, 2, o2);
        const T* factors = w + (i64)c * taps;
        Sum sum[CHANNELS];
#pragma unroll
        for (i32 e = 0; e < CHANNELS; ++e) {
            sum[e] = 0;
        }
        for (i32 t0 = 0; t0 < g.axis[0].kernel; ++t0) {
            for (i32 t1 = 0; t1 < g.axis[1].kernel; ++t1) {
                for (i32 t2 = 0; t2 < g.axis[2].kernel; ++t2, ++factors) {
                    const i64 at = source_pixel(g, b0, b1, b2, t0, t1, t2);
                    if (at < 0) {
                        continue;
                    }
                    const Channels line = *(const Channels*)(x + (image * source_image + at) * g.groups + c);
#pragma unroll
                    for (i32 e = 0; e < CHANNELS; ++e) {
                        sum[e] += widen<T>(line.x[e]) * load(factors + (i64)e * taps);
                    }
                }
            }
        }
        Channels out;
#pragma unroll
        for (i32 e = 0; e < CHANNELS; ++e) {
            out.x[e] = narrow<T>(sum[e] + (bias ? load(bias + c + e) : Sum(0)));
        }
        *(Channels*)(y + pixel * g.groups + c) = out;
    }
}
KILN_KERNEL(conv_depthwise)

// Sums of a part of the pixels, [part][channel][tap], for conv_weight_finish. A block has 32 channels and one tap; its 8 warps take every eighth pixel.
extern "C" __global__ void __launch_bounds__(256)
conv_depthwise_weight(const ConvGather g, const T* __restrict__ source, const T* __restrict__ target, Sum* __restrict__ partial, const i32 parts) {
    __shared__ Sum sums[8][32];
    const i32 taps = conv_taps(g), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    i64 outer;
    i32 tap, part;
    split3(blockIdx.x, parts, taps, outer, part, tap);
    const i64 c = outer * 32 + lane;
    const i32 t2 = tap % g.axis[2].kernel, t1 = tap / g.axis[2].kernel % g.axis[1].kernel, t0 = tap / g.axis[2].kernel / g.axis[1].kernel;
    const i64 source_image = (i64)g.axis[0].source * g.axis[1].source * g.axis[2].source;
    const i64 pixels = g.n * g.axis[0].target * g.axis[1].target * g.axis[2].target;
    const i64 end = pixels * (part + 1) / parts;
    Sum sum = 0;
    for (i64 pixel = pixels * part / parts + warp; pixel < end; pixel += 8) {
        i64 outer, image;
        i32 none, o0, o1, o2;
        split3(pixel, g.axis[1].target, g.axis[2].target, outer, o1, o2);
        split3(outer, 1, g.axis[0].target, image, none, o0);
        const i64 at = source_pixel(g, base_of(g, 0, o0), base_of(g, 1, o1), base_of(g, 2, o2), t0, t1, t2);
        if (at >= 0 && c < g.groups) {
            sum += load(source + (image * source_image + at) * g.groups + c) * load(target + pixel * g.groups + c);
        }
    }
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && c < g.groups) {
        for (i32 i = 1; i < 8; ++i) {
            sum += sums[i][lane];
        }
        partial[((i64)part * g.groups + c) * taps + tap] = sum;
    }
}
KILN_KERNEL(conv_depthwise_weight)
