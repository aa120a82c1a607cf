// Sorting: rows of up to TILE elements in shared memory (bitonic), long ones by digits of eight bits, least significant first (radix sort). Both are
// stable: the first because a key is followed by its place, so that no two are equal, the second by construction.
//
// T: type of the elements (BOOL where u8 stands for bool); KEY: u32 or u64, unsigned keys of the same order.
#include "kiln.cuh"

typedef KEY K;

// Keys as in cpu/sort.rs: NaN is the largest, -0 equals 0.
template <class E> __device__ __forceinline__ K key_of(E x) {
    if constexpr (is_float_type<E>) {
        constexpr int BITS = 8 * sizeof(E);
        constexpr K SIGN = (K)1 << (BITS - 1), ALL = SIGN | (SIGN - 1);
        K bits, infinity;
        if constexpr (Same<E, float>::value) {
            bits = __float_as_uint(x);
            infinity = 0x7f800000u;
        } else if constexpr (Same<E, double>::value) {
            bits = (K)__double_as_longlong(x);
            infinity = (K)0x7ff0000000000000ull;
        } else {
            bits = x.bits;
            infinity = Same<E, f16>::value ? 0x7c00u : 0x7f80u;
        }
        const K magnitude = bits & (SIGN - 1);
        return magnitude > infinity ? ALL : magnitude == 0 ? SIGN : bits == magnitude ? bits | SIGN : ~bits & ALL;
    } else if constexpr (Same<E, i64>::value) {
        return (K)x ^ (K)(1ull << 63);
    } else if constexpr (Same<E, i32>::value) {
        return (K)((u32)x ^ 0x80000000u);
    } else {
#ifdef BOOL
        return x != 0;
#else
        return (K)x;
#endif
    }
}

// ---- short rows ----

// A key with the place of its element behind it.
template <class Key> struct alignas(16) ItemOf {
    Key key;
    u32 at;
    __device__ __forceinline__ static ItemOf make(Key key, u32 place) { return {key, place}; }
    __device__ __forceinline__ u32 place() const { return at; }
    __device__ __forceinline__ bool operator<(const ItemOf& other) const { return key != other.key ? key < other.key : at < other.at; }
};
template <> struct ItemOf<u32> {
    u64 packed;
    __device__ __forceinline__ static ItemOf make(u32 key, u32 place) { return {(u64)key << 32 | place}; }
    __device__ __forceinline__ u32 place() const { return (u32)packed; }
    __device__ __forceinline__ bool operator<(const ItemOf& other) const { return packed < other.packed; }
};
typedef ItemOf<K> Item;

constexpr int TILE_THREADS = 1024;
// Items of a block: `TILE` of sort.rs.
constexpr int TILE = 2 * TILE_THREADS;

// Sorts aligned runs of `run` items (a power of two) of a tile.
__device__ __forceinline__ void bitonic(Item* tile, int run) {
    const int t = threadIdx.x;
    int before = TILE;
    for (int size = 2; size <= run; size *= 2) {
        for (int step = size / 2; step > 0; step /= 2) {
            // A warp's items stay its own while it compares within 64.
            if (before > 32 || step > 32) {
                __syncthreads();
            } else {
                __syncwarp();
            }
            before = step;
            const int i = 2 * t - (t & (step - 1)), j = i + step;
            const bool ascending = size == run || (i & size) == 0;
            const Item a = tile[i], b = tile[j];
            if ((b < a) == ascending) {
                tile[i] = b;
                tile[j] = a;
            }
        }
    }
    __syncthreads();
}

// Cuts rows of `len` elements into `parts` runs and writes the first `k` (or all that there are) of each in sorted order: to `places`, or with their keys to `items`, where
// the runs of a row follow one another without gaps. `from` is what an earlier call wrote to `items`; else elements come from `x`.
extern "C" __global__ void __launch_bounds__(TILE_THREADS) sort_runs(const T* x, const Item* from, i64 rows, i64 len, i32 run, i64 parts, i32 k, K flip, Item* items, i64* places) {
    __shared__ Item tile[TILE];
    // With several parts a row, a run is a whole tile.
    const i64 first_run = (i64)blockIdx.x * (TILE / run);
    const i64 runs = rows * parts;
    for (int i = threadIdx.x; i < TILE; i += TILE_THREADS) {
        const i64 r = first_run + i / run;
        const i64 row = r / parts, place = (r % parts) * run + i % run;
        Item item = Item::make((K)~(K)0, 0xffffffffu);
        if (r < runs && place < len) {
            item = from != nullptr ? from[row * len + place] : Item::make(key_of<T>(x[row * len + place]) ^ flip, (u32)place);
        }
        tile[i] = item;
    }
    bitonic(tile, run);
    const i64 last = len - (parts - 1) * run;
    const i64 kept_of_row = (parts - 1) * k + (k < last ? k : last);
    for (int i = threadIdx.x; i < TILE; i += TILE_THREADS) {
        const i64 r = first_run + i / run;
        const i64 row = r / parts, part = r % parts;
        const int at = i % run;
        if (r < runs && at < k && part * run + at < len) {
            const i64 to = row * kept_of_row + part * k + at;
            if (places != nullptr) {
                places[to] = tile[i].place();
            } else {
                items[to] = tile[i];
            }
        }
    }
}
KILN_KERNEL(sort_runs)

// ---- long rows ----

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int DIGITS = 256;
// Keys of a thread and of a block, as many as shared memory holds: `part` of sort.rs.
constexpr int EACH = sizeof(K) == 4 ? 16 : 8;
constexpr int PART = THREADS * EACH;

extern "C" __global__ void __launch_bounds__(THREADS) make_keys(const T* x, i64 n, K flip, K* keys) {
    for (i64 i = global_thread(); i < n; i += global_threads()) {
        keys[i] = key_of<T>(x[i]) ^ flip;
    }
}
KILN_KERNEL(make_keys)

__device__ __forceinline__ u32 digit_of(K key, i32 shift) {
    return (u32)(key >> shift) & (DIGITS - 1);
}

// counts[row][digit][part]: how many keys of a part of a row have the digit.
extern "C" __global__ void __launch_bounds__(THREADS) count_digits(const K* keys, i64 len, i64 parts, i32 shift, u32* counts) {
    __shared__ u32 histogram[DIGITS];
    const i64 row = blockIdx.x / parts, part = blockIdx.x % parts;
    histogram[threadIdx.x] = 0;
    __syncthreads();
    keys += row * len;
    const int lane = threadIdx.x % 32;
    for (int i = 0; i < EACH; ++i) {
        const i64 at = part * PART + i * THREADS + threadIdx.x;
        const u32 digit = at < len ? digit_of(keys[at], shift) : DIGITS;
        const u32 peers = __match_any_sync(0xffffffffu, digit);
        if (digit < DIGITS && (peers & ((1u << lane) - 1)) == 0) {
            atomicAdd(&histogram[digit], (u32)__popc(peers));
        }
    }
    __syncthreads();
    counts[(row * DIGITS + threadIdx.x) * parts + part] = histogram[threadIdx.x];
}
KILN_KERNEL(count_digits)

// The sum of x over the threads before this one. `scratch` holds WARPS numbers; `total` becomes the sum over all.
__device__ __forceinline__ u32 sum_before(u32 x, u32* scratch, u32& total) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u32 sum = x;
    for (int step = 1; step < 32; step *= 2) {
        const u32 other = __shfl_up_sync(0xffffffffu, sum, step);
        sum += lane >= step ? other : 0;
    }
    __syncthreads();
    if (lane == 31) {
        scratch[warp] = sum;
    }
    __syncthreads();
    u32 before = 0;
    total = 0;
    for (int w = 0; w < WARPS; ++w) {
        before += w < warp ? scratch[w] : 0;
        total += scratch[w];
    }
    return before + sum - x;
}

// For each row and digit (a block): counts become the numbers of such keys in the parts before; totals[row][digit] the number in all.
extern "C" __global__ void __launch_bounds__(THREADS) scan_counts(u32* counts, i64 parts, u32* totals) {
    __shared__ u32 scratch[WARPS];
    counts += blockIdx.x * parts;
    u32 carry = 0;
    for (i64 first = 0; first < parts; first += THREADS) {
        const i64 at = first + threadIdx.x;
        u32 total;
        const u32 before = sum_before(at < parts ? counts[at] : 0, scratch, total);
        if (at < parts) {
            counts[at] = carry + before;
        }
        carry += total;
    }
    if (threadIdx.x == 0) {
        totals[blockIdx.x] = carry;
    }
}
KILN_KERNEL(scan_counts)

// A part of a row, in order.
struct Sorted {
    K keys[PART];
    u32 places[PART];
};

// Moves keys to where their digit sorts them to. `places` go with them: null means 0, 1, 2, ... A part's keys are put in order in shared memory first, so that those of one digit are written
// together. With `final`, which has room for `k` places a row, the first k places are written there and nothing else. A row of one part needs no counts. Dynamic shared memory: a `Sorted`.
extern "C" __global__ void __launch_bounds__(THREADS) move_keys(const K* keys, const u32* places, i64 len, i64 parts, i32 shift, const u32* counts, const u32* totals, K* keys_out, u32* places_out, i64* final, i64 k) {
    __shared__ u32 counters[WARPS][DIGITS];
    __shared__ u32 base[DIGITS];
    __shared__ u32 scratch[WARPS];
    KILN_SHARED(Sorted, sorted);
    const i64 row = blockIdx.x / parts, part = blockIdx.x % parts;
    const int t = threadIdx.x, lane = t % 32, warp = t / 32;
    const int held = len - part * PART < PART ? (int)(len - part * PART) : PART;
    keys += row * len + part * PART;
    for (int w = 0; w < WARPS; ++w) {
        counters[w][t] = 0;
    }
    __syncthreads();
    // A warp's keys are neighbours; the place of each among those of its digit in the warp is its rank.
    K key[EACH];
    u32 rank[EACH];
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const int at = (warp * EACH + i) * 32 + lane;
        key[i] = at < held ? keys[at] : 0;
    }
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const int at = (warp * EACH + i) * 32 + lane;
        const u32 digit = at < held ? digit_of(key[i], shift) : DIGITS;
        const u32 peers = __match_any_sync(0xffffffffu, digit);
        const u32 before = __popc(peers & ((1u << lane) - 1));
        const u32 counted = digit < DIGITS ? counters[warp][digit] : 0;
        __syncwarp();
        if (digit < DIGITS && before == 0) {
            counters[warp][digit] = counted + __popc(peers);
        }
        __syncwarp();
        rank[i] = counted + before;
    }
    __syncthreads();
    // Thread t is digit t's: where its keys begin in the part, and in the row.
    u32 of_digit = 0;
    for (int w = 0; w < WARPS; ++w) {
        const u32 count = counters[w][t];
        counters[w][t] = of_digit;
        of_digit += count;
    }
    u32 total;
    const u32 start = sum_before(of_digit, scratch, total);
    for (int w = 0; w < WARPS; ++w) {
        counters[w][t] += start;
    }
    u32 start_in_row = start;
    if (counts != nullptr) {
        start_in_row = sum_before(totals[row * DIGITS + t], scratch, total) + counts[(row * DIGITS + t) * parts + part];
    }
    base[t] = start_in_row - start;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const int at = (warp * EACH + i) * 32 + lane;
        if (at < held) {
            const u32 to = counters[warp][digit_of(key[i], shift)] + rank[i];
            sorted->keys[to] = key[i];
            sorted->places[to] = places != nullptr ? places[row * len + part * PART + at] : (u32)(part * PART + at);
        }
    }
    __syncthreads();
    for (int i = t; i < held; i += THREADS) {
        const K moved = sorted->keys[i];
        const i64 to = base[digit_of(moved, shift)] + (u32)i;
        if (final == nullptr) {
            keys_out[row * len + to] = moved;
            places_out[row * len + to] = sorted->places[i];
        } else if (to < k) {
            final[row * k + to] = sorted->places[i];
        }
    }
}
KILN_KERNEL(move_keys)
