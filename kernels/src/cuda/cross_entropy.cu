// Losses of classes: weights of targets, the values that they pick, and cross-entropy of rows of logits in one pass.
//
// Targets [n, s] name classes of [n, c, s]. One that is `ignored` counts nothing; one that is no class gives NaN, and is reported by `weigh`.
// Macros: T; LANES: threads of a row of `cross_entropy_rows`, a warp or a block; VEC elements move as one access if ALIGNED; ITEMS groups make a batch.
#include "softmax.cuh"

constexpr int BLOCK = LANES > 32 ? LANES : 256;

struct Classes {
    const i64* targets;
    i64 ignored;
    i64 n, c, s;
};

__device__ __forceinline__ C not_a_number() {
    return (C)__int_as_float(0x7fc00000);
}

// What a block of `weigh` found: the sum of its weights, and the first target that is no class (or as many as there are).
struct Found {
    double total;
    i64 bad;
};
__device__ __forceinline__ Found found_by_block(Found mine, double* sums, i64* bads) {
    mine.total = block_sum<256>(mine.total, sums);
    mine.bad = block_reduce<256>(mine.bad, [](i64 a, i64 b) { return a < b ? a : b; }, bads);
    return mine;
}

// Each target's factor: its class's weight, 1 without weights, 0 where it is ignored. A block takes `chunk` targets.
extern "C" __global__ void __launch_bounds__(256) weigh(const Classes k, const T* weight, T* weights, Found* found, i64 chunk) {
    __shared__ double sums[8];
    __shared__ i64 bads[8];
    const i64 count = k.n * k.s, first = blockIdx.x * chunk, end = first + chunk < count ? first + chunk : count;
    Found mine{0, count};
    for (i64 i = first + threadIdx.x; i < end; i += 256) {
        const i64 target = k.targets[i];
        const bool ignored = target == k.ignored, bad = !ignored && (target < 0 || target >= k.c);
        const C w = ignored ? C(0) : bad ? not_a_number() : weight ? load(weight + target) : C(1);
        store(weights + i, w);
        mine.total += (double)w;
        mine.bad = bad && i < mine.bad ? i : mine.bad;
    }
    mine = found_by_block(mine, sums, bads);
    if (threadIdx.x == 0) {
        found[blockIdx.x] = mine;
    }
}
KILN_KERNEL(weigh)

// The sum of all weights, and the first target that is no class, -1 if there is none.
extern "C" __global__ void __launch_bounds__(256) weighed(const Found* found, i64 blocks, i64 count, double* total, i64* bad) {
    __shared__ double sums[8];
    __shared__ i64 bads[8];
    Found mine{0, count};
    for (i64 i = threadIdx.x; i < blocks; i += 256) {
        const Found other = found[i];
        mine = Found{mine.total + other.total, other.bad < mine.bad ? other.bad : mine.bad};
    }
    mine = found_by_block(mine, sums, bads);
    if (threadIdx.x == 0) {
        *total = mine.total;
        *bad = mine.bad < count ? mine.bad : -1;
    }
}
KILN_KERNEL(weighed)

// out[n, s] = x[n, target, s]; 0 where it is ignored.
extern "C" __global__ void __launch_bounds__(256) pick(const Classes k, const T* x, T* out) {
    const i64 count = k.n * k.s;
    for (i64 i = global_thread(); i < count; i += global_threads()) {
        const i64 target = k.targets[i];
        C value = target == k.ignored ? C(0) : not_a_number();
        if (target != k.ignored && target >= 0 && target < k.c) {
            value = load(x + (i / k.s * k.c + target) * k.s + i % k.s);
        }
        store(out + i, value);
    }
}
KILN_KERNEL(pick)

// out[n, c, s] = x[n, s] if c is the target there and not ignored, else 0. VEC divides c·s.
extern "C" __global__ void __launch_bounds__(256) place(const Classes k, const T* x, T* out) {
    const i64 per_sample = k.c * k.s, packs = k.n * per_sample / VEC;
    for (i64 pack = global_thread(); pack < packs; pack += global_threads()) {
        const i64 sample = pack * VEC / per_sample, rest = pack * VEC - sample * per_sample;
        C values[VEC];
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            const i64 c = k.s == 1 ? rest + j : (rest + j) / k.s, i = sample * k.s + (rest + j - c * k.s), target = k.targets[i];
            values[j] = target == c && target != k.ignored ? load(x + i) : C(0);
        }
        write(out + pack * VEC, VEC, values);
    }
}
KILN_KERNEL(place)

// loss[i] = log Σ exp(x[i]) − x[i, target], 0 where it is ignored. `kept` gets the largest element and log Σ exp(x − it) of each row.
extern "C" __global__ void __launch_bounds__(BLOCK) cross_entropy_rows(const Classes k, const T* x, T* loss, C* kept) {
    constexpr int PER_BLOCK = BLOCK / LANES;
    __shared__ C tops[32];
    __shared__ double sums[32];
    const int lane = threadIdx.x % LANES;
    for (i64 first = (i64)blockIdx.x * PER_BLOCK; first < k.n; first += (i64)gridDim.x * PER_BLOCK) {
        const i64 row = first + threadIdx.x / LANES;
        const i64 target = row < k.n ? k.targets[row] : k.ignored;
        // The statistics of an ignored row are never read.
        const i64 end = target == k.ignored ? 0 : k.c;
        Scaled acc{lowest(), 0};
        for (i64 start = (i64)lane * VEC; start < end; start += LANES * ITEMS * VEC) {
            C v[ITEMS * VEC];
#pragma unroll
            for (int i = 0; i < ITEMS; ++i) {
                const i64 at = start + i * LANES * VEC;
                read(x + row * k.c + at, end - at, lowest(), v + i * VEC);
            }
            accumulate(acc, v);
        }
        if constexpr (LANES > 32) {
            const C top = block_reduce<LANES>(acc.top, larger, tops);
            acc = Scaled{top, block_sum<LANES>(rescaled(acc, top), sums)};
        } else {
            const C top = warp_reduce(acc.top, larger);
            acc = Scaled{top, warp_sum(rescaled(acc, top))};
        }
        if (lane == 0 && row < k.n) {
            const double log_sum = log(acc.sum);
            const bool good = target >= 0 && target < k.c;
            const C value = good ? (C)(log_sum + ((double)acc.top - (double)load(x + row * k.c + target))) : not_a_number();
            store(loss + row, target == k.ignored ? C(0) : value);
            kept[row] = acc.top;
            kept[k.n + row] = (C)log_sum;
        }
    }
}
KILN_KERNEL(cross_entropy_rows)

// dx[i, j] = (softmax(x[i])[j] − (1 if j is the target))·g[i], 0 where it is ignored.
extern "C" __global__ void __launch_bounds__(256) cross_entropy_backward_rows(const Classes k, const T* x, const C* kept, const T* g, T* dx) {
    constexpr int UNROLL = 4;
    const i64 packs = k.c / VEC, total = k.n * packs;
    for (i64 first = (i64)blockIdx.x * 256 * UNROLL + threadIdx.x; first < total; first += (i64)gridDim.x * 256 * UNROLL) {
        C v[UNROLL][VEC];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            const i64 pack = first + u * 256;
            read(x + pack * VEC, pack < total ? VEC : 0, C(0), v[u]);
        }
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            const i64 pack = first + u * 256;
            if (pack < total) {
                const i64 row = total >> 32 == 0 ? (u32)pack / (u32)packs : pack / packs, at = (pack - row * packs) * VEC;
                const i64 target = k.targets[row];
                const C top = kept[row], log_sum = kept[k.n + row], slope = load(g + row);
#pragma unroll
                for (int j = 0; j < VEC; ++j) {
                    const C p = exponential(v[u][j] - top - log_sum) - (at + j == target ? C(1) : C(0));
                    v[u][j] = target == k.ignored ? C(0) : p * slope;
                }
                write(dx + pack * VEC, VEC, v[u]);
            }
        }
    }
}
KILN_KERNEL(cross_entropy_backward_rows)
