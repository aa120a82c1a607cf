// Batch, group and instance norm: y = (x − mean)·rstd·w + b, where the statistics belong to a channel, or to a group of channels of one sample.
//
// Memory is planes, [n, c, s], or pixels, [n, s, c]. A batch norm over pixels sees one sample of n·s of them.
// Macros: T; PATTERN (one for each kernel below); VEC elements move as one access if ALIGNED; it divides s (planes) or c (pixels);
// LANES: threads of a plane's sums; BACKWARD: 0 for y, 1 for dx, 2 for dx with constant statistics.
#include "kiln.cuh"

typedef Compute<T> C;
[[maybe_unused]] constexpr int UNROLL = 4;

// What the kernels know of the shape, after merging. `groups` is 0 for a batch norm.
struct Shape {
    i64 n, c, s, groups;
};

struct alignas(sizeof(T) * (ALIGNED ? VEC : 1)) Raw {
    T x[VEC];
};
__device__ __forceinline__ Raw read(const T* p, bool exists) {
#if ALIGNED
    return exists ? *(const Raw*)p : Raw{};
#else
    Raw raw{};
#pragma unroll
    for (int j = 0; j < VEC; ++j) {
        if (exists) {
            raw.x[j] = p[j];
        }
    }
    return raw;
#endif
}
__device__ __forceinline__ void write(T* p, const C* from) {
    Raw raw;
#pragma unroll
    for (int j = 0; j < VEC; ++j) {
        raw.x[j] = narrow<T>(from[j]);
    }
#if ALIGNED
    *(Raw*)p = raw;
#else
#pragma unroll
    for (int j = 0; j < VEC; ++j) {
        p[j] = raw.x[j];
    }
#endif
}

__device__ __forceinline__ i64 divide(i64 a, i64 b, i64& rest) {
    if (((u64)a | (u64)b) >> 32 == 0) {
        const u32 q = (u32)a / (u32)b;
        rest = (u32)a - q * (u32)b;
        return q;
    }
    const i64 q = a / b;
    rest = a - q * b;
    return q;
}

// The number of the statistics of a channel.
__device__ __forceinline__ i64 statistic_of(const Shape& p, i64 n, i64 c) {
    return p.groups == 0 ? c : n * p.groups + c / (p.c / p.groups);
}

// out = a·g + b·(x − centre) + c
struct alignas(4 * sizeof(C)) Coefficients {
    C centre, a, b, c;
};

// What a pass over the elements reads beside them: statistics and parameters (forward), or a table of coefficients, one for each channel, or for
// each channel of each sample if there are groups.
struct Constants {
    const C* mean;
    const C* rstd;
    const T* weight;
    const T* bias;
    const Coefficients* table;
};

__device__ __forceinline__ Coefficients coefficients_of(const Shape& p, const Constants& k, i64 n, i64 c) {
#if BACKWARD
    return k.table[p.groups == 0 ? c : n * p.c + c];
#else
    const i64 at = statistic_of(p, n, c);
    const C w = k.weight ? load(k.weight + c) : C(1), b = k.bias ? load(k.bias + c) : C(0);
    return Coefficients{k.mean[at], C(0), k.rstd[at] * w, b};
#endif
}

__device__ __forceinline__ C apply(const Coefficients& k, T g, T x) {
#if BACKWARD == 2
    return k.a * widen<T>(g);
#elif BACKWARD
    return k.a * widen<T>(g) + (k.b * (widen<T>(x) - k.centre) + k.c);
#else
    return (widen<T>(x) - k.centre) * k.b + k.c;
#endif
}

#if PATTERN == 0
extern "C" __global__ void __launch_bounds__(256) normalize_planes(const Shape p, const Constants k, const T* g, const T* x, T* out) {
    const i64 packs = p.s / VEC, total = p.n * p.c * packs, step = (i64)gridDim.x * 256 * UNROLL;
    for (i64 first = (i64)blockIdx.x * 256 * UNROLL + threadIdx.x; first < total; first += step) {
        Raw gs[UNROLL], xs[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            const i64 at = first + u * 256;
            gs[u] = read(g + at * VEC, BACKWARD && at < total);
            xs[u] = read(x + at * VEC, BACKWARD != 2 && at < total);
        }
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            const i64 at = first + u * 256;
            if (at < total) {
                i64 rest, c;
                const i64 n = divide(divide(at, packs, rest), p.c, c);
                const Coefficients of = coefficients_of(p, k, n, c);
                C y[VEC];
#pragma unroll
                for (int j = 0; j < VEC; ++j) {
                    y[j] = apply(of, gs[u].x[j], xs[u].x[j]);
                }
                write(out + at * VEC, y);
            }
        }
    }
}
KILN_KERNEL(normalize_planes)
#endif

#if PATTERN == 1
// A block takes `across` packs of channels of `chunk` pixels of a sample; the coefficients stay in registers.
extern "C" __global__ void __launch_bounds__(256)
    normalize_pixels(const Shape p, const Constants k, const T* g, const T* x, T* out, i32 across, i64 tiles, i64 chunks, i64 chunk) {
    const int down = 256 / across;
    i64 tile, part;
    const i64 n = divide(divide(blockIdx.x, tiles, tile), chunks, part);
    const i64 c = (tile * across + (int)threadIdx.x % across) * VEC;
    if (c >= p.c) {
        return;
    }
    Coefficients of[VEC];
#pragma unroll
    for (int j = 0; j < VEC; ++j) {
        of[j] = coefficients_of(p, k, n, c + j);
    }
    const i64 end = (part + 1) * chunk < p.s ? (part + 1) * chunk : p.s, base = n * p.s * p.c + c;
    for (i64 first = part * chunk + (int)threadIdx.x / across; first < end; first += down * UNROLL) {
        Raw gs[UNROLL], xs[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            const i64 pixel = first + u * down;
            gs[u] = read(g + base + pixel * p.c, BACKWARD && pixel < end);
            xs[u] = read(x + base + pixel * p.c, BACKWARD != 2 && pixel < end);
        }
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            const i64 pixel = first + u * down;
            if (pixel < end) {
                C y[VEC];
#pragma unroll
                for (int j = 0; j < VEC; ++j) {
                    y[j] = apply(of[j], gs[u].x[j], xs[u].x[j]);
                }
                write(out + base + pixel * p.c, y);
            }
        }
    }
}
KILN_KERNEL(normalize_pixels)
#endif

// Sums over the pixels of a channel of a sample, or of a part of them: Σ g, Σ g·(x − mean).
struct alignas(16) Sums {
    double g, dot;
};

#if PATTERN == 2
// LANES threads for each part of a plane; `sums` is [parts, n, c].
extern "C" __global__ void __launch_bounds__(256)
    plane_sums(const Shape p, const C* mean, const T* g, const T* x, Sums* sums, i64 parts, i64 chunk) {
    __shared__ double scratch[8];
    constexpr int PER_BLOCK = 256 / LANES;
    const int lane = threadIdx.x % LANES;
    const i64 planes = p.n * p.c;
    for (i64 first = (i64)blockIdx.x * PER_BLOCK; first < planes * parts; first += (i64)gridDim.x * PER_BLOCK) {
        const i64 task = first + threadIdx.x / LANES;
        double total = 0, dot = 0;
        if (task < planes * parts) {
            i64 plane, c;
            const i64 part = divide(task, planes, plane), n = divide(plane, p.c, c), packs = p.s / VEC;
            const C centre = mean[statistic_of(p, n, c)];
            const i64 end = (part + 1) * chunk < packs ? (part + 1) * chunk : packs;
            for (i64 at = part * chunk + lane; at < end; at += LANES * UNROLL) {
                Raw gs[UNROLL], xs[UNROLL];
#pragma unroll
                for (int u = 0; u < UNROLL; ++u) {
                    const bool exists = at + u * LANES < end;
                    gs[u] = read(g + plane * p.s + (at + u * LANES) * VEC, exists);
                    xs[u] = read(x + plane * p.s + (at + u * LANES) * VEC, exists);
                }
                C a[UNROLL * VEC], b[UNROLL * VEC];
#pragma unroll
                for (int i = 0; i < UNROLL * VEC; ++i) {
                    const C gi = widen<T>(gs[i / VEC].x[i % VEC]);
                    a[i] = gi;
                    b[i] = at + i / VEC * LANES < end ? gi * (widen<T>(xs[i / VEC].x[i % VEC]) - centre) : C(0);
                }
                auto add = [](C a, C b) { return a + b; };
                tree<UNROLL * VEC>(a, add);
                tree<UNROLL * VEC>(b, add);
                total += (double)a[0];
                dot += (double)b[0];
            }
        }
        if constexpr (LANES == 256) {
            total = block_sum<256>(total, scratch);
            dot = block_sum<256>(dot, scratch);
        } else {
            total = warp_sum(total);
            dot = warp_sum(dot);
        }
        if (lane == 0 && task < planes * parts) {
            sums[task] = Sums{total, dot};
        }
    }
}
KILN_KERNEL(plane_sums)
#endif

#if PATTERN == 3
// A block takes `across` packs of channels of a part of a sample's pixels; `sums` is [parts, n, c].
extern "C" __global__ void __launch_bounds__(256)
    pixel_sums(const Shape p, const C* mean, const T* g, const T* x, Sums* sums, i32 across, i64 tiles, i64 parts, i64 chunk) {
    __shared__ Sums scratch[VEC][256];
    const int down = 256 / across, ty = threadIdx.x / across;
    i64 tile, part;
    const i64 n = divide(divide(blockIdx.x, tiles, tile), parts, part);
    const i64 c = (tile * across + (int)threadIdx.x % across) * VEC;
    const i64 end = c >= p.c ? 0 : (part + 1) * chunk < p.s ? (part + 1) * chunk : p.s, base = n * p.s * p.c + c;
    C centre[VEC];
    Sums acc[VEC];
#pragma unroll
    for (int j = 0; j < VEC; ++j) {
        centre[j] = c < p.c ? mean[statistic_of(p, n, c + j)] : C(0);
        acc[j] = Sums{0, 0};
    }
    for (i64 first = part * chunk + ty; first < end; first += down * UNROLL) {
        Raw gs[UNROLL], xs[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            const i64 pixel = first + u * down;
            gs[u] = read(g + base + pixel * p.c, pixel < end);
            xs[u] = read(x + base + pixel * p.c, pixel < end);
        }
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            C a = 0, b = 0;
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) {
                const C gi = widen<T>(gs[u].x[j]);
                a += gi;
                b += first + u * down < end ? gi * (widen<T>(xs[u].x[j]) - centre[j]) : C(0);
            }
            acc[j].g += (double)a;
            acc[j].dot += (double)b;
        }
    }
#pragma unroll
    for (int j = 0; j < VEC; ++j) {
        scratch[j][threadIdx.x] = acc[j];
    }
    for (int half = down / 2; half > 0; half /= 2) {
        __syncthreads();
        if (ty < half) {
#pragma unroll
            for (int j = 0; j < VEC; ++j) {
                const Sums other = scratch[j][threadIdx.x + half * across];
                scratch[j][threadIdx.x].g += other.g;
                scratch[j][threadIdx.x].dot += other.dot;
            }
        }
    }
    if (ty == 0 && c < p.c) {
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            sums[(part * p.n + n) * p.c + c + j] = scratch[j][threadIdx.x];
        }
    }
}
KILN_KERNEL(pixel_sums)
#endif

#if PATTERN == 4
// A block for each statistic: the coefficients of dx = rstd·g·w + (x − mean)·b + c from the sums [parts, n, c] of its channels, and for a batch norm,
// whose statistics are the channels, the parameters' gradients. `len` elements share a statistic. With constant statistics b = c = 0.
extern "C" __global__ void __launch_bounds__(256) gradient_coefficients(const Shape p, const Sums* sums, i64 parts, const C* mean, const C* rstd,
                                                                        const T* weight, double len, Coefficients* table, T* dw, T* db, i32 fixed) {
    __shared__ double scratch[8];
    const bool batch = p.groups == 0;
    const i64 per_group = batch ? 1 : p.c / p.groups;
    for (i64 k = blockIdx.x; k < (batch ? p.c : p.n * p.groups); k += gridDim.x) {
        const double r = (double)rstd[k];
        double g = 0, dot = 0;
        if (batch) {
            for (i64 i = threadIdx.x; i < parts * p.n; i += 256) {
                const Sums one = sums[i * p.c + k];
                g += one.g;
                dot += one.dot;
            }
        } else {
            for (i64 i = threadIdx.x; i < parts * per_group; i += 256) {
                i64 member;
                const i64 part = divide(i, per_group, member), at = k * per_group + member;
                const Sums one = sums[part * p.n * p.c + at];
                const double w = weight ? (double)load(weight + at % p.c) : 1.0;
                g += one.g * w;
                dot += one.dot * w;
            }
        }
        g = block_sum<256>(g, scratch);
        dot = block_sum<256>(dot, scratch);
        if (batch) {
            if (threadIdx.x == 0) {
                if (dw) {
                    store(dw + k, (C)(dot * r));
                }
                if (db) {
                    store(db + k, (C)g);
                }
            }
            const double w = weight ? (double)load(weight + k) : 1.0;
            g *= w;
            dot *= w;
        }
        const C b = fixed ? C(0) : (C)(-r * r * r * dot / len), c = fixed ? C(0) : (C)(-r * g / len);
        for (i64 member = threadIdx.x; table && member < per_group; member += 256) {
            const i64 at = k * per_group + member;
            const double w = weight ? (double)load(weight + at % p.c) : 1.0;
            table[at] = Coefficients{mean[k], (C)(r * w), b, c};
        }
    }
}
KILN_KERNEL(gradient_coefficients)
#endif

#if PATTERN == 5
// A warp for each channel of a norm over groups: dw = Σ rstd·Σ g·(x − mean) over the samples, db = Σ g.
extern "C" __global__ void __launch_bounds__(256)
    gradient_parameters(const Shape p, const Sums* sums, i64 parts, const C* rstd, T* dw, T* db) {
    const i64 c = (i64)blockIdx.x * 8 + threadIdx.x / 32;
    if (c >= p.c) {
        return;
    }
    double g = 0, dot = 0;
    for (i64 i = threadIdx.x % 32; i < parts * p.n; i += 32) {
        const Sums one = sums[i * p.c + c];
        g += one.g;
        dot += one.dot * (double)rstd[statistic_of(p, i % p.n, c)];
    }
    g = warp_sum(g);
    dot = warp_sum(dot);
    if (threadIdx.x % 32 == 0) {
        if (dw) {
            store(dw + c, (C)dot);
        }
        if (db) {
            store(db + c, (C)g);
        }
    }
}
KILN_KERNEL(gradient_parameters)
#endif

#if PATTERN == 6
struct Spread {
    double count, mean, squares;
};
// The statistics of each of `groups` groups from the moments of its `members` neighbouring channels.
extern "C" __global__ void __launch_bounds__(256)
    group_statistics(const Spread* channels, i64 groups, i64 members, double eps, C* mean, C* rstd, C* var) {
    const i64 k = global_thread();
    if (k >= groups) {
        return;
    }
    Spread a{0, 0, 0};
    for (i64 i = 0; i < members; ++i) {
        const Spread b = channels[k * members + i];
        if (b.count > 0) {
            const double count = a.count + b.count, delta = b.mean - a.mean, share = b.count / count;
            a = Spread{count, a.count > 0 ? a.mean + delta * share : b.mean, a.squares + b.squares + delta * delta * a.count * share};
        }
    }
    mean[k] = (C)a.mean;
    rstd[k] = (C)(1.0 / sqrt(a.squares / a.count + eps));
    var[k] = (C)(a.squares / (a.count > 1 ? a.count - 1 : 0.0));
}
KILN_KERNEL(group_statistics)
#endif
