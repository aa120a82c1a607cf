// Layer norm, y = (x − mean)·rstd·w + b over each row with rstd = 1/√(var + ε), and RMS norm, the same without the mean.
//
// Macros: T; PATTERN:
//   0: forward, a row in the registers of LANES threads (a warp or less of it, or a block);    1: forward, long rows, read three times;
//   2: backward, a row in registers, and with PARAMETERS the sums of the parameters' gradients over a block's rows;
//   3: backward of long rows, read twice;    4: sums of the parameters' gradients, column by column;    5: their partial sums' total.
// VEC elements are neighbours in a thread, and move as one access if ALIGNED; it divides n. ITEMS such groups are in a thread's registers.
#include "kiln.cuh"

typedef Compute<T> C;

[[maybe_unused]] constexpr int VALUES = ITEMS * VEC;
constexpr int WIDTH = LANES > 32 ? LANES : 256;
[[maybe_unused]] constexpr int PER_BLOCK = WIDTH / LANES;

__device__ __forceinline__ C root(C x) {
    if constexpr (Same<C, float>::value) {
        return sqrtf(x);
    } else {
        return sqrt(x);
    }
}

struct alignas(sizeof(T) * (ALIGNED ? VEC : 1)) Raw {
    T x[VEC];
};
// Reads VEC neighbours, zeros where there are none.
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

// The sums of N numbers over a row's lanes.
template <int N> __device__ __forceinline__ void over_lanes(C (&x)[N], C (*scratch)[N]) {
    constexpr int STEPS = LANES < 32 ? LANES : 32;
#pragma unroll
    for (int step = STEPS / 2; step > 0; step >>= 1) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            x[i] += __shfl_xor_sync(0xffffffffu, x[i], step);
        }
    }
    if constexpr (LANES > 32) {
        __syncthreads();
        if (threadIdx.x % 32 == 0) {
#pragma unroll
            for (int i = 0; i < N; ++i) {
                scratch[threadIdx.x / 32][i] = x[i];
            }
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < N; ++i) {
            x[i] = scratch[0][i];
        }
        for (int warp = 1; warp < LANES / 32; ++warp) {
#pragma unroll
            for (int i = 0; i < N; ++i) {
                x[i] += scratch[warp][i];
            }
        }
    }
}

// (d·rstd)·w + b for VEC elements d = x − mean.
__device__ __forceinline__ void scale(const C* d, C rstd, const T* w, const T* b, i64 at, T* y) {
    C out[VEC];
    if (w || b) {
        const Raw weight = read(w ? w + at : b, w != nullptr), bias = read(b ? b + at : w, b != nullptr);
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            out[j] = d[j] * rstd * (w ? widen<T>(weight.x[j]) : C(1)) + widen<T>(bias.x[j]);
        }
    } else {
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            out[j] = d[j] * rstd;
        }
    }
    write(y + at, out);
}

#if PATTERN == 0
extern "C" __global__ void __launch_bounds__(WIDTH)
    layer_norm_rows(const T* x, const T* w, const T* b, T* y, C* means, C* rstds, i64 rows, i64 n, double eps, i32 centered) {
    __shared__ C scratch[32][1];
    const int lane = threadIdx.x % LANES;
    for (i64 first = (i64)blockIdx.x * PER_BLOCK; first < rows; first += (i64)gridDim.x * PER_BLOCK) {
        const i64 row = first + threadIdx.x / LANES, end = row < rows ? n : 0;
        C v[VALUES], part[VALUES], total[1];
#pragma unroll
        for (int k = 0; k < ITEMS; ++k) {
            const i64 at = (k * LANES + lane) * VEC;
            const Raw raw = read(x + row * n + at, at < end);
#pragma unroll
            for (int j = 0; j < VEC; ++j) {
                part[k * VEC + j] = v[k * VEC + j] = widen<T>(raw.x[j]);
            }
        }
        auto add = [](C a, C b) { return a + b; };
        C mean = 0;
        if (centered) {
            tree<VALUES>(part, add);
            total[0] = part[0];
            over_lanes(total, scratch);
            mean = total[0] / C(n);
        }
#pragma unroll
        for (int i = 0; i < VALUES; ++i) {
            v[i] = (i / VEC * LANES + lane) * VEC < end ? v[i] - mean : C(0);
            part[i] = v[i] * v[i];
        }
        tree<VALUES>(part, add);
        total[0] = part[0];
        over_lanes(total, scratch);
        const C rstd = C(1) / root(total[0] / C(n) + C(eps));
        if (lane == 0 && row < rows) {
            means[row] = mean;
            rstds[row] = rstd;
        }
#pragma unroll
        for (int k = 0; k < ITEMS; ++k) {
            const i64 at = (k * LANES + lane) * VEC;
            if (at < end) {
                scale(v + k * VEC, rstd, w, b, at, y + row * n);
            }
        }
    }
}
KILN_KERNEL(layer_norm_rows)
#endif

#if PATTERN == 1
extern "C" __global__ void __launch_bounds__(WIDTH)
    layer_norm_long_rows(const T* x, const T* w, const T* b, T* y, C* means, C* rstds, i64 rows, i64 n, double eps, i32 centered) {
    __shared__ double scratch[32];
    for (i64 row = blockIdx.x; row < rows; row += gridDim.x) {
        const T* from = x + row * n;
        C mean = 0;
        double squares = 0;
        // The mean, and then the squared deviations from it.
        for (int pass = centered ? 0 : 1; pass < 2; ++pass) {
            double sum = 0;
            for (i64 start = (i64)threadIdx.x * VEC; start < n; start += (i64)LANES * VALUES) {
                C part[VALUES];
#pragma unroll
                for (int k = 0; k < ITEMS; ++k) {
                    const i64 at = start + k * LANES * VEC;
                    const Raw raw = read(from + at, at < n);
#pragma unroll
                    for (int j = 0; j < VEC; ++j) {
                        const C d = at < n ? widen<T>(raw.x[j]) - mean : C(0);
                        part[k * VEC + j] = pass ? d * d : d;
                    }
                }
                tree<VALUES>(part, [](C a, C b) { return a + b; });
                sum += (double)part[0];
            }
            sum = block_sum<LANES>(sum, scratch);
            if (pass) {
                squares = sum;
            } else {
                mean = (C)(sum / n);
            }
        }
        const C rstd = (C)(1.0 / sqrt(squares / n + eps));
        if (threadIdx.x == 0) {
            means[row] = mean;
            rstds[row] = rstd;
        }
        for (i64 at = (i64)threadIdx.x * VEC; at < n; at += (i64)LANES * VEC) {
            const Raw raw = read(from + at, true);
            C d[VEC];
#pragma unroll
            for (int j = 0; j < VEC; ++j) {
                d[j] = widen<T>(raw.x[j]) - mean;
            }
            scale(d, rstd, w, b, at, y + row * n);
        }
    }
}
KILN_KERNEL(layer_norm_long_rows)
#endif

#if PATTERN == 2
// Each lane of rows takes `chain` rows. `parts` gets 2·n sums of each block: Σ g·h, and Σ g. `g_stride` is 0 if one row of g stands for all.
extern "C" __global__ void __launch_bounds__(WIDTH) layer_norm_backward_rows(const T* g, i64 g_stride, const T* x, const T* w, const C* means,
                                                                             const C* rstds, T* dx, C* parts, i64 rows, i64 n, i64 chain, i32 centered) {
    __shared__ C scratch[32][2];
    const int lane = threadIdx.x % LANES;
    const i64 first = (i64)blockIdx.x * PER_BLOCK * chain + threadIdx.x / LANES;
    C dw[PARAMETERS ? VALUES : 1], db[PARAMETERS ? VALUES : 1];
    if constexpr (PARAMETERS) {
#pragma unroll
        for (int i = 0; i < VALUES; ++i) {
            dw[i] = db[i] = 0;
        }
    }
    Raw g_next[ITEMS], x_next[ITEMS];
    auto fetch = [&](i64 row) {
#pragma unroll
        for (int k = 0; k < ITEMS; ++k) {
            const i64 at = (k * LANES + lane) * VEC;
            const bool exists = row < rows && at < n;
            g_next[k] = read(g + row * g_stride + at, exists);
            x_next[k] = read(x + row * n + at, exists);
        }
    };
    fetch(first);
    for (i64 step = 0; step < chain; ++step) {
        const i64 row = first + step * PER_BLOCK;
        const C mean = row < rows ? means[row] : C(0), rstd = row < rows ? rstds[row] : C(0);
        Raw g_raw[ITEMS];
        C d[VALUES];
#pragma unroll
        for (int k = 0; k < ITEMS; ++k) {
            g_raw[k] = g_next[k];
#pragma unroll
            for (int j = 0; j < VEC; ++j) {
                d[k * VEC + j] = (k * LANES + lane) * VEC < n ? widen<T>(x_next[k].x[j]) - mean : C(0);
            }
        }
        // The next row is under way while this one's sums go around.
        if (step + 1 < chain) {
            fetch(row + PER_BLOCK);
        }
        C gw[VALUES], sums[2] = {0, 0};
#pragma unroll
        for (int k = 0; k < ITEMS; ++k) {
            const i64 at = (k * LANES + lane) * VEC;
            const Raw weight = read(w + at, w != nullptr && at < n);
#pragma unroll
            for (int j = 0; j < VEC; ++j) {
                const int i = k * VEC + j;
                const C gi = widen<T>(g_raw[k].x[j]);
                gw[i] = w ? gi * widen<T>(weight.x[j]) : gi;
                sums[0] += gw[i];
                sums[1] += gw[i] * d[i];
                if constexpr (PARAMETERS) {
                    dw[i] += gi * (d[i] * rstd);
                    db[i] += gi;
                }
            }
        }
        over_lanes(sums, scratch);
        const C along = -rstd * rstd * rstd * sums[1] / C(n), level = centered ? -rstd * sums[0] / C(n) : C(0);
#pragma unroll
        for (int k = 0; k < ITEMS; ++k) {
            const i64 at = (k * LANES + lane) * VEC;
            C out[VEC];
#pragma unroll
            for (int j = 0; j < VEC; ++j) {
                const int i = k * VEC + j;
                out[j] = gw[i] * rstd + (d[i] * along + level);
            }
            if (row < rows && at < n) {
                write(dx + row * n + at, out);
            }
        }
    }
    if constexpr (PARAMETERS) {
        __shared__ C total[2][PER_BLOCK > 1 ? VALUES * LANES : 1];
        if constexpr (PER_BLOCK > 1) {
            // Lanes of rows within a warp, then the warps one after another.
#pragma unroll
            for (int step = LANES; step < 32; step <<= 1) {
#pragma unroll
                for (int i = 0; i < VALUES; ++i) {
                    dw[i] += __shfl_xor_sync(0xffffffffu, dw[i], step);
                    db[i] += __shfl_xor_sync(0xffffffffu, db[i], step);
                }
            }
            for (int warp = 0; warp < WIDTH / 32; ++warp) {
                __syncthreads();
                if ((int)threadIdx.x / 32 == warp && (int)threadIdx.x % 32 < LANES) {
#pragma unroll
                    for (int i = 0; i < VALUES; ++i) {
                        const int at = (i / VEC * LANES + lane) * VEC + i % VEC;
                        total[0][at] = dw[i] = warp == 0 ? dw[i] : total[0][at] + dw[i];
                        total[1][at] = db[i] = warp == 0 ? db[i] : total[1][at] + db[i];
                    }
                }
            }
        }
        // The last warp has the sums of all.
        const int writer = PER_BLOCK > 1 ? WIDTH - 32 : 0;
        if ((int)threadIdx.x >= writer && (int)threadIdx.x - writer < LANES) {
#pragma unroll
            for (int i = 0; i < VALUES; ++i) {
                const i64 at = (i / VEC * LANES + lane) * VEC + i % VEC;
                if (at < n) {
                    parts[(i64)blockIdx.x * 2 * n + at] = dw[i];
                    parts[((i64)blockIdx.x * 2 + 1) * n + at] = db[i];
                }
            }
        }
    }
}
KILN_KERNEL(layer_norm_backward_rows)
#endif

#if PATTERN == 3
extern "C" __global__ void __launch_bounds__(WIDTH)
    layer_norm_backward_long_rows(const T* g, i64 g_stride, const T* x, const T* w, const C* means, const C* rstds, T* dx, i64 rows, i64 n, i32 centered) {
    __shared__ double scratch[32];
    for (i64 row = blockIdx.x; row < rows; row += gridDim.x) {
        const C mean = means[row], rstd = rstds[row];
        double sum = 0, dot = 0;
        for (i64 at = (i64)threadIdx.x * VEC; at < n; at += (i64)LANES * VEC) {
            const Raw gs = read(g + row * g_stride + at, true), xs = read(x + row * n + at, true), ws = read(w + at, w != nullptr);
            C part[2] = {0, 0};
#pragma unroll
            for (int j = 0; j < VEC; ++j) {
                const C gw = w ? widen<T>(gs.x[j]) * widen<T>(ws.x[j]) : widen<T>(gs.x[j]);
                part[0] += gw;
                part[1] += gw * (widen<T>(xs.x[j]) - mean);
            }
            sum += (double)part[0];
            dot += (double)part[1];
        }
        sum = block_sum<LANES>(sum, scratch);
        dot = block_sum<LANES>(dot, scratch);
        const double r = rstd;
        const C along = (C)(-r * r * r * dot / n), level = centered ? (C)(-r * sum / n) : C(0);
        for (i64 at = (i64)threadIdx.x * VEC; at < n; at += (i64)LANES * VEC) {
            const Raw gs = read(g + row * g_stride + at, true), xs = read(x + row * n + at, true), ws = read(w + at, w != nullptr);
            C out[VEC];
#pragma unroll
            for (int j = 0; j < VEC; ++j) {
                const C gw = w ? widen<T>(gs.x[j]) * widen<T>(ws.x[j]) : widen<T>(gs.x[j]);
                out[j] = gw * rstd + ((widen<T>(xs.x[j]) - mean) * along + level);
            }
            write(dx + row * n + at, out);
        }
    }
}
KILN_KERNEL(layer_norm_backward_long_rows)
#endif

#if PATTERN == 4
// A block takes 32 groups of columns of `chain` rows; `parts` is as that of `layer_norm_backward_rows`, one for each chain of rows.
extern "C" __global__ void __launch_bounds__(256)
    layer_norm_parameter_columns(const T* g, i64 g_stride, const T* x, const C* means, const C* rstds, C* parts, i64 rows, i64 n, i64 chain) {
    __shared__ C total[2][VEC][256];
    const i64 tiles = (n / VEC + 31) / 32;
    const i64 part = blockIdx.x / tiles, at = (blockIdx.x % tiles * 32 + threadIdx.x % 32) * VEC;
    const i64 end = (part + 1) * chain < rows ? (part + 1) * chain : rows;
    C dw[VEC], db[VEC];
#pragma unroll
    for (int j = 0; j < VEC; ++j) {
        dw[j] = db[j] = 0;
    }
    for (i64 row = part * chain + threadIdx.x / 32; row < end; row += 8) {
        const bool exists = at < n;
        const Raw gs = read(g + row * g_stride + at, exists), xs = read(x + row * n + at, exists);
        const C mean = means[row], rstd = rstds[row];
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            dw[j] += widen<T>(gs.x[j]) * ((widen<T>(xs.x[j]) - mean) * rstd);
            db[j] += widen<T>(gs.x[j]);
        }
    }
#pragma unroll
    for (int j = 0; j < VEC; ++j) {
        total[0][j][threadIdx.x] = dw[j];
        total[1][j][threadIdx.x] = db[j];
    }
    __syncthreads();
    if (threadIdx.x < 32 && at < n) {
        for (int which = 0; which < 2; ++which) {
#pragma unroll
            for (int j = 0; j < VEC; ++j) {
                C sum = 0;
                for (int lane = 0; lane < 256; lane += 32) {
                    sum += total[which][j][threadIdx.x + lane];
                }
                parts[(part * 2 + which) * n + at + j] = sum;
            }
        }
    }
}
KILN_KERNEL(layer_norm_parameter_columns)
#endif

#if PATTERN == 5
// Adds up `count` parts of 2·n sums. A block takes 32 columns, of either half.
extern "C" __global__ void __launch_bounds__(1024) layer_norm_parameters(const C* parts, i64 count, i64 n, T* dw, T* db) {
    __shared__ double total[1024];
    const i64 at = (i64)blockIdx.x * 32 + threadIdx.x % 32;
    double sum = 0;
    if (at < 2 * n && (at < n ? dw : db)) {
#pragma unroll 8
        for (i64 part = threadIdx.x / 32; part < count; part += 32) {
            sum += (double)parts[part * 2 * n + at];
        }
    }
    total[threadIdx.x] = sum;
    for (int half = 512; half >= 32; half /= 2) {
        __syncthreads();
        if ((int)threadIdx.x < half) {
            total[threadIdx.x] += total[threadIdx.x + half];
        }
    }
    if (threadIdx.x < 32 && at < 2 * n) {
        T* out = at < n ? dw : db;
        if (out) {
            store(out + (at < n ? at : at - n), (C)total[threadIdx.x]);
        }
    }
}
KILN_KERNEL(layer_norm_parameters)
#endif
