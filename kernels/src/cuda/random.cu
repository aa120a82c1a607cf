// Counter-based random numbers: Philox4x32-10, laid out as cpu/random.rs says, so that integers and uniforms are the processor's, bit for bit, and
// single-precision normals too: they are the same operations in the same order.
//
// A warp draws a tile at a time: 32 blocks of Philox (two groups), or twice as many for types of two bytes. Results of neighbouring lanes lie in
// neighbouring places, so a lane's own results lie far apart; they go through shared memory to be written 16 bytes a lane.
//
// T: type of the elements.
#include "kiln.cuh"
#include "philox.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int VEC = 16 / sizeof(T);
// Blocks of Philox that a lane computes for a tile, and elements of a tile: `tile` of random.rs.
constexpr int BLOCKS = sizeof(T) == 2 ? 2 : 1;
constexpr int TILE = 32 * VEC;
// Results of a block.
constexpr int RESULTS = sizeof(T) == 8 ? 2 : 4;

__device__ __forceinline__ u64 long_draw(const Words& words, int half) {
    return (u64)words.w[2 * half] << 32 | words.w[2 * half + 1];
}

__device__ __forceinline__ float unit(u32 word) {
    return __fmul_rn((float)(word >> 8), 0x1p-24f);
}
__device__ __forceinline__ double unit(u64 draw) {
    return __dmul_rn((double)(draw >> 11), 0x1p-53);
}

// Natural logarithm of a normal number in (0, 1]: see cpu/random.rs.
__device__ __forceinline__ float ln(float x) {
    const int bits = __float_as_int(x) - 0x3F3504F3;
    const float e = (float)(bits >> 23);
    const float f = __fsub_rn(__int_as_float((bits & 0x007FFFFF) + 0x3F3504F3), 1.0f);
    const float square = __fmul_rn(f, f);
    float p = 7.0376836e-2f;
    p = __fmaf_rn(p, f, -1.151461e-1f);
    p = __fmaf_rn(p, f, 1.1676999e-1f);
    p = __fmaf_rn(p, f, -1.2420141e-1f);
    p = __fmaf_rn(p, f, 1.4249323e-1f);
    p = __fmaf_rn(p, f, -1.6668058e-1f);
    p = __fmaf_rn(p, f, 2.0000715e-1f);
    p = __fmaf_rn(p, f, -2.4999994e-1f);
    p = __fmaf_rn(p, f, 3.333333e-1f);
    const float low = __fsub_rn(__fmaf_rn(__fmul_rn(p, f), square, __fmul_rn(e, -2.1219444e-4f)), __fmul_rn(square, 0.5f));
    return __fmaf_rn(e, 0.6933594f, __fadd_rn(f, low));
}

// sin and cos of 2πt for t in [0, 1).
__device__ __forceinline__ void sin_cos_turns(float t, float& sine, float& cosine) {
    const float quarters = __fmul_rn(t, 4.0f);
    // Added to 1.5 · 2²³ a number below 2²² is rounded to an integer, which the lowest bits hold.
    const float shifted = __fadd_rn(quarters, 12582912.0f);
    const u32 quadrant = __float_as_uint(shifted);
    const float x = __fmul_rn(__fsub_rn(quarters, __fsub_rn(shifted, 12582912.0f)), 1.57079637f);
    const float z = __fmul_rn(x, x);
    float s = __fmaf_rn(__fmaf_rn(-1.9515296e-4f, z, 8.332161e-3f), z, -1.6666655e-1f);
    s = __fmaf_rn(__fmul_rn(s, z), x, x);
    float c = __fmaf_rn(__fmaf_rn(2.4433157e-5f, z, -1.3887316e-3f), z, 4.1666646e-2f);
    c = __fmaf_rn(__fmul_rn(c, z), z, __fmaf_rn(z, -0.5f, 1.0f));
    const bool odd = quadrant & 1;
    sine = __uint_as_float(__float_as_uint(odd ? c : s) ^ (quadrant & 2) << 30);
    cosine = __uint_as_float(__float_as_uint(odd ? s : c) ^ ((quadrant + 1) & 2) << 30);
}

__device__ __forceinline__ void box_muller(u32 a, u32 b, float& x, float& y) {
    const float u = __fmul_rn(__fadd_rn((float)(a >> 1), 1.0f), 0x1p-31f);
    const float radius = __fsqrt_rn(__fmul_rn(ln(u), -2.0f));
    float sine, cosine;
    sin_cos_turns(unit(b), sine, cosine);
    x = __fmul_rn(radius, cosine);
    y = __fmul_rn(radius, sine);
}

// Writes what `draw(words, results)` makes of each block's words, in the stream's order.
template <class F> __device__ __forceinline__ void fill(Stream stream, T* out, i64 n, F draw) {
    __shared__ __align__(16) T stage[WARPS][TILE];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    T* tile = stage[warp];
    const bool aligned = (u64)out % 16 == 0;
    for (i64 at = (global_thread() / 32) * TILE; at < n; at += global_threads() / 32 * TILE) {
        __syncwarp();
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b) {
            T results[RESULTS];
            draw(philox(stream, at / RESULTS + b * 32 + lane), results);
#pragma unroll
            for (int r = 0; r < RESULTS; ++r) {
                tile[(2 * b + lane / 16) * 16 * RESULTS + r * 16 + lane % 16] = results[r];
            }
        }
        __syncwarp();
        const i64 first = at + lane * VEC;
        if (aligned && first + VEC <= n) {
            *(Pack<T, VEC>*)(out + first) = *(const Pack<T, VEC>*)(tile + lane * VEC);
        } else {
            for (int j = 0; j < VEC && first + j < n; ++j) {
                out[first + j] = tile[lane * VEC + j];
            }
        }
    }
}

#if defined(FLOAT)
template <class E> __device__ __forceinline__ void uniforms(const Words& words, E* results) {
#pragma unroll
    for (int r = 0; r < RESULTS; ++r) {
        if constexpr (sizeof(E) == 8) {
            results[r] = unit(long_draw(words, r));
        } else if constexpr (sizeof(E) == 4) {
            results[r] = unit(words.w[r]);
        } else {
            // As many bits as the significand holds.
            constexpr int BITS = Same<E, f16>::value ? 11 : 8;
            results[r] = narrow<E>((float)(words.w[r] >> (32 - BITS)) * (1.0f / (1 << BITS)));
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) uniform(Stream stream, T* out, i64 n) {
    fill(stream, out, n, [](const Words& words, T* results) { uniforms<T>(words, results); });
}
KILN_KERNEL(uniform)

template <class E> __device__ __forceinline__ void normals(const Words& words, E* results) {
    if constexpr (sizeof(E) == 8) {
        const double radius = sqrt(-2.0 * log(unit(long_draw(words, 0)) + 0x1p-53));
        double sine, cosine;
        sincos(6.283185307179586477 * unit(long_draw(words, 1)), &sine, &cosine);
        results[0] = radius * cosine;
        results[1] = radius * sine;
    } else {
#pragma unroll
        for (int r = 0; r < 4; r += 2) {
            float x, y;
            box_muller(words.w[r], words.w[r + 1], x, y);
            results[r] = narrow<E>(x);
            results[r + 1] = narrow<E>(y);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) normal(Stream stream, T* out, i64 n) {
    fill(stream, out, n, [](const Words& words, T* results) { normals<T>(words, results); });
}
KILN_KERNEL(normal)

// Zero where `bernoulli` of the same stream is true, else x · scale.
extern "C" __global__ void __launch_bounds__(THREADS) dropout(Stream stream, const T* x, T* out, i64 n, u32 threshold, Compute<T> scale) {
    // A lane's elements: those of two groups shared out among the lanes, in each of BLOCKS rounds.
    constexpr int EACH = 4 * BLOCKS;
    constexpr int PIECE = sizeof(T) * EACH > 16 ? VEC : EACH;
    const int lane = threadIdx.x % 32;
    const bool aligned = ((u64)x | (u64)out) % 16 == 0;
    for (i64 at = (global_thread() / 32) * 32 * EACH; at < n; at += global_threads() / 32 * 32 * EACH) {
        // Bit l of mask[r]: whether word r of lane l says to drop, which is place 64 · (l / 16) + 16 · r + l % 16.
        u32 dropped = 0;
        const int place = lane * EACH;
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b) {
            const Words words = philox(stream, at / 4 + b * 32 + lane);
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                const u32 mask = __ballot_sync(0xffffffffu, words.w[r] >> 8 < threshold);
                if (place / 128 == b && place / 16 % 4 == r) {
                    dropped = mask >> (place / 64 % 2 * 16 + place % 16);
                }
            }
        }
        const i64 first = at + place;
        if (aligned && first + EACH <= n) {
#pragma unroll
            for (int piece = 0; piece < EACH; piece += PIECE) {
                Pack<T, PIECE> v = *(const Pack<T, PIECE>*)(x + first + piece);
#pragma unroll
                for (int j = 0; j < PIECE; ++j) {
                    v.x[j] = dropped >> (piece + j) & 1 ? narrow<T>(0) : narrow<T>(widen(v.x[j]) * scale);
                }
                *(Pack<T, PIECE>*)(out + first + piece) = v;
            }
        } else {
            for (int j = 0; j < EACH && first + j < n; ++j) {
                out[first + j] = dropped >> j & 1 ? narrow<T>(0) : narrow<T>(widen(x[first + j]) * scale);
            }
        }
    }
}
KILN_KERNEL(dropout)

#elif defined(INTEGERS)
extern "C" __global__ void __launch_bounds__(THREADS) integers(Stream stream, T* out, i64 n, i64 low, u64 range) {
    fill(stream, out, n, [=](const Words& words, T* results) {
#pragma unroll
        for (int r = 0; r < RESULTS; ++r) {
            results[r] = (i64)((u64)low + __umul64hi(long_draw(words, r), range));
        }
    });
}
KILN_KERNEL(integers)

// Fisher and Yates' shuffle swaps element i with element target[i] <= i, for i from the last to the first. A swap leaves the final element at i, so
// element i becomes what lay at target[i] before. The last swap that put something there was the next larger i' with the same target, and it
// put there what lay at i' before: its own number, unless a still larger swap had put something at i', and so on. So the result follows from the swaps
// sorted by target (stably, so that those of one target ascend), without doing them one by one.

// targets[i] = draw · (i + 1) >> 64.
extern "C" __global__ void __launch_bounds__(THREADS) shuffle_targets(Stream stream, u32* targets, i64 n) {
    for (i64 number = global_thread(); number / 16 * 32 < n; number += global_threads()) {
        const Words words = philox(stream, number);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const i64 i = number / 16 * 32 + half * 16 + number % 16;
            if (i < n) {
                targets[i] = (u32)__umul64hi(long_draw(words, half), (u64)i + 1);
            }
        }
    }
}
KILN_KERNEL(shuffle_targets)

constexpr u32 NONE = 0xffffffffu;

// For swap i: next[i], the next larger swap of the same target. For place p: above[p], the smallest swap larger than p of target p. `above` is NONE before.
extern "C" __global__ void __launch_bounds__(THREADS) shuffle_links(const u32* sorted_targets, const u32* swaps, i64 n, u32* next, u32* above) {
    for (i64 r = global_thread(); r < n; r += global_threads()) {
        const u32 target = sorted_targets[r], swap = swaps[r];
        const u32 after = r + 1 < n && sorted_targets[r + 1] == target ? swaps[r + 1] : NONE;
        next[swap] = after;
        if (r == 0 || sorted_targets[r - 1] != target) {
            above[target] = swap == target ? after : swap;
        }
    }
}
KILN_KERNEL(shuffle_links)

extern "C" __global__ void __launch_bounds__(THREADS) shuffle_walk(const u32* targets, const u32* next, const u32* above, i64* out, i64 n) {
    for (i64 i = global_thread(); i < n; i += global_threads()) {
        u32 found = targets[i];
        // Some ln n steps at most, nearly always.
        for (u32 swap = next[i]; swap != NONE; swap = above[swap]) {
            found = swap;
        }
        out[i] = found;
    }
}
KILN_KERNEL(shuffle_walk)

#else
// True where the upper 24 bits of the word are below the threshold.
extern "C" __global__ void __launch_bounds__(THREADS) bernoulli(Stream stream, T* out, i64 n, u32 threshold) {
    const int lane = threadIdx.x % 32;
    const bool aligned = (u64)out % 4 == 0;
    for (i64 at = (global_thread() / 32) * 128; at < n; at += global_threads() / 32 * 128) {
        const Words words = philox(stream, at / 4 + lane);
        u32 bits = 0;
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const u32 mask = __ballot_sync(0xffffffffu, words.w[r] >> 8 < threshold);
            if (lane / 4 % 4 == r) {
                bits = mask >> (lane / 16 * 16 + lane % 4 * 4);
            }
        }
        const i64 first = at + lane * 4;
        if (aligned && first + 4 <= n) {
            *(u32*)(out + first) = (bits & 1) | (bits & 2) << 7 | (bits & 4) << 14 | (bits & 8) << 21;
        } else {
            for (int j = 0; j < 4 && first + j < n; ++j) {
                out[first + j] = bits >> j & 1;
            }
        }
    }
}
KILN_KERNEL(bernoulli)
#endif
