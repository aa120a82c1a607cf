// What the convolution kernels share: where a kernel tap's source pixel lies, and copies to shared memory.
//
// As on the processor, forward pass and input gradient are one thing, a gather: each target pixel sums over taps a source pixel times the tap's matrix of
// weights. Under a transposed gather only some of the taps touch a target, the same ones for all targets a stride apart. Such targets are a phase; along
// an axis its q-th target and i-th tap have their source at first + q·target_step + i·source_step. A forward gather has one phase.
#pragma once

struct ConvAxis {
    i32 source, target, kernel;
    i32 stride, padding, dilation;
    // Targets of a phase lie `period` apart, its taps `tap_step`.
    i32 period, tap_step;
    i32 target_step, source_step;
};

struct ConvGather {
    i64 n;
    // Channels of the source and the target are those of one group.
    i32 groups, cin, cout;
    i32 transposed;
    // Weight (group, c, j, tap) lies at group · cin · cout · taps + c · in_stride + j · out_stride + tap.
    i64 in_stride, out_stride;
    ConvAxis axis[3];
};

struct ConvPhase {
    i32 targets, taps;
    i32 first_tap, first;
    // Taps of the phases before it.
    i32 start;
};

__device__ __forceinline__ i32 conv_taps(const ConvGather& g) {
    return g.axis[0].kernel * g.axis[1].kernel * g.axis[2].kernel;
}

// The first tap that touches targets of phase `p`; `kernel` if none does.
__device__ __forceinline__ i32 first_tap_of(const ConvAxis& axis, i32 p) {
    for (i32 tap = 0; tap < min(axis.kernel, axis.tap_step); ++tap) {
        if ((p + axis.padding - tap * axis.dilation) % axis.stride == 0) {
            return tap;
        }
    }
    return axis.kernel;
}

__device__ __forceinline__ i32 taps_from(const ConvAxis& axis, i32 first_tap) {
    return (axis.kernel - first_tap + axis.tap_step - 1) / axis.tap_step;
}

__device__ __forceinline__ ConvPhase phase_of(const ConvGather& g, i32 a, i32 p) {
    const ConvAxis& axis = g.axis[a];
    if (!g.transposed) {
        return ConvPhase{axis.target, axis.kernel, 0, -axis.padding, 0};
    }
    ConvPhase phase;
    phase.targets = (axis.target - p + axis.period - 1) / axis.period;
    phase.first_tap = first_tap_of(axis, p);
    phase.taps = taps_from(axis, phase.first_tap);
    phase.first = (p + axis.padding - phase.first_tap * axis.dilation) / axis.stride;
    phase.start = 0;
    for (i32 before = 0; before < p; ++before) {
        phase.start += taps_from(axis, first_tap_of(axis, before));
    }
    return phase;
}

// Taps of the phases (of three axes) before the one that `d`, `h` and `w` make: packed weights lie in this order.
__device__ __forceinline__ i32 phase_start(const ConvGather& g, const ConvPhase& d, const ConvPhase& h, const ConvPhase& w) {
    return (d.start * g.axis[1].kernel + d.taps * h.start) * g.axis[2].kernel + d.taps * h.taps * w.start;
}

// What a target's position is counted from along an axis, for `source_of`.
__device__ __forceinline__ i32 base_of(const ConvGather& g, i32 a, i32 target) {
    return g.transposed ? target + g.axis[a].padding : target * g.axis[a].stride - g.axis[a].padding;
}

// The source's position along an axis for a tap at `shift` = tap · dilation; -1 if it does not touch the target. It may lie outside of the image.
__device__ __forceinline__ i32 source_of(const ConvGather& g, i32 a, i32 base, i32 shift) {
    if (!g.transposed) {
        return base + shift;
    }
    const i32 distance = base - shift, stride = g.axis[a].stride;
    if (stride == 1) {
        return distance;
    }
    const i32 source = distance / stride;
    return source * stride == distance ? source : -1;
}

// Splits a number, counted over the extents of three axes, the last one fastest.
__device__ __forceinline__ void split3(i64 i, i32 e1, i32 e2, i64& outer, i32& d1, i32& d2) {
    // Most counts are small enough for divisions that the GPU is good at.
    if ((u64)i <= 0xffffffff) {
        const u32 rest = (u32)i / (u32)e2;
        d2 = (i32)((u32)i - rest * (u32)e2);
        const u32 first = rest / (u32)e1;
        d1 = (i32)(rest - first * (u32)e1);
        outer = first;
        return;
    }
    const i64 rest = i / e2;
    d2 = (i32)(i - rest * e2);
    outer = rest / e1;
    d1 = (i32)(rest - outer * e1);
}

// Number of the phase that three axes make, split into those of the axes.
__device__ __forceinline__ void axes_of_phase(const ConvGather& g, i32 phase, i32 (&p)[3]) {
    const i32 h = min(g.axis[1].period, g.axis[1].target), w = min(g.axis[2].period, g.axis[2].target);
    p[2] = phase % w;
    p[1] = phase / w % h;
    p[0] = phase / w / h;
}

#if defined(KILN_EMULATE) || __CUDA_ARCH__ >= 800
#define CONV_ASYNC 1
#else
#define CONV_ASYNC 0
#endif

// 16 bytes to shared memory, zeros if not `valid`: behind the back of the thread where the GPU can do that.
template <class E> __device__ __forceinline__ void copy16(E* shared, const E* global, bool valid) {
    if constexpr (CONV_ASYNC) {
        cp_async16(smem_addr(shared), global, valid);
    } else {
        typedef Pack<u32, 4> Line;
        *(Line*)shared = valid ? *(const Line*)global : Line{{0, 0, 0, 0}};
    }
}

// One element to shared memory, zero if not `valid`.
template <class E> __device__ __forceinline__ void copy1(E* shared, const E* global, bool valid) {
    if constexpr (CONV_ASYNC && sizeof(E) == 4) {
        cp_async4(smem_addr(shared), global, valid);
    } else {
        *shared = valid ? *global : E{};
    }
}

__device__ __forceinline__ void copies_commit() {
    if constexpr (CONV_ASYNC) {
        cp_async_commit();
    }
}
template <int N> __device__ __forceinline__ void copies_wait() {
    if constexpr (CONV_ASYNC) {
        cp_async_wait<N>();
    }
}
