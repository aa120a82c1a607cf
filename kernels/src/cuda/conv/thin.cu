#include "kiln.cuh"
#include "conv_geometry.cuh"
// Convolution, or its gradient by the input, to few target channels (images of one or three colours), where a tile of a product would be mostly empty.
//
// Macros: T, VECTOR (1 where source channels are read by 16 bytes), LANES (that share a pixel's channels: a power of two up to 32), COUT (channels of a
// group of the target).
// LANES lanes sum the products of PIXELS neighbouring targets, each over some of the channels; their sums are then added in a fixed order.

typedef Compute<T> Sum;
constexpr i32 V = VECTOR ? 16 / (i32)sizeof(T) : 1;
constexpr i32 PIXELS = 4;
constexpr i32 TARGETS = 256 / LANES * PIXELS;

extern "C" __global__ void __launch_bounds__(256)
conv_thin(const ConvGather g, const T* __restrict__ x, const T* __restrict__ w, const T* __restrict__ bias, T* __restrict__ y, const i32 tiles, const i32 phases) {
    typedef Pack<T, V> Line;
    i64 block = blockIdx.x;
    const i32 tile = (i32)(block % tiles);
    block /= tiles;
    const i32 group = (i32)(block % g.groups);
    i32 p[3];
    axes_of_phase(g, (i32)(block / g.groups), p);
    const ConvPhase d = phase_of(g, 0, p[0]), h = phase_of(g, 1, p[1]), v = phase_of(g, 2, p[2]);
    const i64 pixels = g.n * d.targets * h.targets * v.targets;
    const i32 lane = threadIdx.x % LANES;
    const i64 pixel = (i64)tile * TARGETS + (i32)threadIdx.x / LANES * PIXELS;

    // The targets and, of each, the first pixel of its image in the source.
    i64 target[PIXELS], image_start[PIXELS];
    i32 first[PIXELS][3];
    i64 outer, image;
    i32 q0, q1, q2, none;
    split3(pixel, h.targets, v.targets, outer, q1, q2);
    split3(outer, 1, d.targets, image, none, q0);
#pragma unroll
    for (i32 i = 0; i < PIXELS; ++i) {
        const bool exists = pixel + i < pixels;
        target[i] = exists ? ((image * g.axis[0].target + p[0] + (i64)q0 * g.axis[0].period) * g.axis[1].target + p[1] + (i64)q1 * g.axis[1].period) *
                    g.axis[2].target + p[2] + (i64)q2 * g.axis[2].period
                           : -1;
        image_start[i] = image * g.axis[0].source * g.axis[1].source * g.axis[2].source;
        first[i][0] = d.first + q0 * g.axis[0].target_step;
        first[i][1] = h.first + q1 * g.axis[1].target_step;
        first[i][2] = v.first + q2 * g.axis[2].target_step;
        if (++q2 == v.targets) {
            q2 = 0;
            if (++q1 == h.targets) {
                q1 = 0;
                if (++q0 == d.targets) {
                    q0 = 0;
                    ++image;
                }
            }
        }
    }

    const i64 row = (i64)conv_taps(g) * g.cin;
    const T* weights = w + (i64)group * COUT * row + (i64)phase_start(g, d, h, v) * g.cin;
    const i32 pixel_len = g.groups * g.cin;
    Sum sum[PIXELS][COUT] = {};
    for (i32 t0 = 0; t0 < d.taps; ++t0) {
        for (i32 t1 = 0; t1 < h.taps; ++t1) {
            for (i32 t2 = 0; t2 < v.taps; ++t2, weights += g.cin) {
                const T* from[PIXELS];
                bool inside[PIXELS];
#pragma unroll
                for (i32 i = 0; i < PIXELS; ++i) {
                    const i32 sd = first[i][0] + t0 * g.axis[0].source_step;
                    const i32 sh = first[i][1] + t1 * g.axis[1].source_step;
                    const i32 sv = first[i][2] + t2 * g.axis[2].source_step;
                    inside[i] = target[i] >= 0 && (u32)sd < (u32)g.axis[0].source && (u32)sh < (u32)g.axis[1].source && (u32)sv < (u32)g.axis[2].source;
                    const i64 at = image_start[i] + ((i64)sd * g.axis[1].source + sh) * g.axis[2].source + sv;
                    from[i] = x + (inside[i] ? at * pixel_len + (i64)group * g.cin : 0);
                }
                for (i32 c = lane * V; c < g.cin; c += LANES * V) {
                    Line source[PIXELS];
#pragma unroll
                    for (i32 i = 0; i < PIXELS; ++i) {
                        source[i] = inside[i] ? *(const Line*)(from[i] + c) : Line{};
                    }
#pragma unroll
                    for (i32 j = 0; j < COUT; ++j) {
                        const Line factor = *(const Line*)(weights + j * row + c);
#pragma unroll
                        for (i32 e = 0; e < V; ++e) {
                            const Sum f = widen<T>(factor.x[e]);
#pragma unroll
                            for (i32 i = 0; i < PIXELS; ++i) {
                                sum[i][j] += widen<T>(source[i].x[e]) * f;
                            }
                        }
                    }
                }
            }
        }
    }
#pragma unroll
    for (i32 i = 0; i < PIXELS; ++i) {
#pragma unroll
        for (i32 j = 0; j < COUT; ++j) {
#pragma unroll
            for (i32 step = LANES / 2; step > 0; step >>= 1) {
                sum[i][j] += __shfl_xor_sync(0xffffffffu, sum[i][j], step);
            }
            if (lane == 0 && target[i] >= 0) {
                const i64 channel = (i64)group * COUT + j;
                store(y + target[i] * g.groups * COUT + channel, sum[i][j] + (bias ? load(bias + channel) : Sum(0)));
            }
        }
    }
}
KILN_KERNEL(conv_thin)
