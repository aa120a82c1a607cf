// Reductions, compiled for one element type and one fold: -DT=float -DFLOAT_FOLDS=1 (for floats) -DFOLD=Sum -DVECTOR=1 (packs of
// elements may be loaded as one) -DPATTERN=0 (rows_by_lanes), 1 (rows_by_blocks) or 2 (columns). With -DCHAIN=1 (and what `operands.cuh` asks for) the
// elements are the results of the function `chained` of CHAINED operands, which stands above this file then.
//
//   rows:     neighbours in memory belong to one output. A group of lanes, or a block, folds each.
//   columns:  neighbours in memory belong to different outputs. A thread folds a few columns, the rows of a block's threads are merged.
//   finish:   merges the parts that the first two left, where outputs are few and elements many.
//
// A thread takes a batch of elements at a time: the batch is combined in the lane type (as a tree), and its result is merged into a wide
// accumulator, so that rounding does not grow with the length. Which elements make a batch follows from the shape alone.
#include "kiln.cuh"
#include "elements.cuh"

constexpr bool IS_FLOAT = is_float_type<T>;

template <class A, class B, bool FIRST> struct Either {
    typedef A type;
};
template <class A, class B> struct Either<A, B, false> {
    typedef B type;
};

typedef Compute<T> C;
// What sums of a batch are taken in (64 u8 fit i32), and what they are added up in.
typedef typename Either<C, typename Either<i32, i64, Same<T, u8>::value>::type, IS_FLOAT>::type SumLane;
typedef typename Either<double, i64, IS_FLOAT>::type Wide;
// What elements are compared in.
typedef typename Either<C, typename Either<i64, i32, Same<T, i64>::value>::type, IS_FLOAT>::type CompareLane;
// The type of sums and products.
typedef typename Either<T, i64, IS_FLOAT>::type Total;

// Elements of one 16-byte access, accesses of a batch of a row.
constexpr int PACK = 16 / sizeof(T);
constexpr int UNROLL = 4;
constexpr int BATCH = PACK * UNROLL;
// Columns of a thread, rows of a batch of a column.
constexpr int COLUMNS = PACK < 4 ? PACK : 4;
constexpr int ROWS = 8;
constexpr int THREADS = 256;

// Where results go, and the fold's numbers.
struct Results {
    void* out;
    void* second;
    void* third;
    double a, b;
    i32 mode;
};

__device__ __forceinline__ float lowest(float) {
    return -__int_as_float(0x7f800000);
}
__device__ __forceinline__ double lowest(double) {
    return -(double)__int_as_float(0x7f800000);
}
__device__ __forceinline__ i32 lowest(i32) {
    return (i32)0x80000000;
}
__device__ __forceinline__ i64 lowest(i64) {
    return (i64)0x8000000000000000ull;
}
template <class L> __device__ __forceinline__ L highest(L x) {
    if constexpr (Same<L, float>::value || Same<L, double>::value) {
        return -lowest(x);
    } else {
        return ~lowest(x);
    }
}
__device__ __forceinline__ float magnitude(float x) {
    return fabsf(x);
}
__device__ __forceinline__ double magnitude(double x) {
    return fabs(x);
}
__device__ __forceinline__ float power(float x, double p) {
    return powf(x, (float)p);
}
__device__ __forceinline__ double power(double x, double p) {
    return pow(x, p);
}
__device__ __forceinline__ float exponential(float x) {
    return expf(x);
}
__device__ __forceinline__ double exponential(double x) {
    return exp(x);
}

template <class A> __device__ __forceinline__ A exchange(A x, int step) {
    return __shfl_xor_sync(0xffffffffu, x, step);
}

__device__ __forceinline__ void write_total(const Results& r, i64 o, Wide total) {
    if constexpr (IS_FLOAT) {
        store((T*)r.out + o, (C)total);
    } else {
        ((i64*)r.out)[o] = total;
    }
}

// A fold has a lane type that elements are read as, and an accumulator. `batch` takes N elements, of which the bits of `valid` exist, unless FULL.
// `at(i)` is the number of element i in its reduction.

// Folds whose mapped elements are combined lane by lane: M has Lane, neutral(), map(x), combine(a, b), and the accumulator's promote, merge and finish.
template <class M> struct Each {
    typedef typename M::Lane Lane;
    typedef typename M::Acc Acc;
    static __device__ __forceinline__ Acc empty() {
        return M::promote(M::neutral());
    }
    template <bool FULL, int N, class At> static __device__ __forceinline__ void batch(Acc& acc, Lane (&x)[N], u64 valid, At, const Results& r) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            x[i] = FULL || (valid >> i & 1) ? M::map(x[i], r) : M::neutral();
        }
        tree<N>(x, [](Lane a, Lane b) { return M::combine(a, b); });
        acc = M::merge(acc, M::promote(x[0]));
    }
    static __device__ __forceinline__ Acc merge(Acc a, Acc b) {
        return M::merge(a, b);
    }
    static __device__ __forceinline__ Acc shuffle(Acc a, int step) {
        return exchange(a, step);
    }
    static __device__ __forceinline__ void finish(Acc acc, const Results& r, i64 o) {
        M::finish(acc, r, o);
    }
};

struct Summed {
    typedef SumLane Lane;
    typedef Wide Acc;
    static __device__ __forceinline__ Lane neutral() {
        return 0;
    }
    static __device__ __forceinline__ Lane combine(Lane a, Lane b) {
        return a + b;
    }
    static __device__ __forceinline__ Acc promote(Lane x) {
        return x;
    }
    static __device__ __forceinline__ Acc merge(Acc a, Acc b) {
        return a + b;
    }
};

// Σ x, over the number a if a mean is wanted (mode 1).
struct SumOf : Summed {
    static __device__ __forceinline__ Lane map(Lane x, const Results&) {
        return x;
    }
    static __device__ __forceinline__ void finish(Acc acc, const Results& r, i64 o) {
        if constexpr (IS_FLOAT) {
            write_total(r, o, r.mode == 1 ? acc / r.a : acc);
        } else {
            write_total(r, o, acc);
        }
    }
};
typedef Each<SumOf> Sum;

struct ProductOf {
    typedef typename Either<C, i64, IS_FLOAT>::type Lane;
    typedef Wide Acc;
    static __device__ __forceinline__ Lane neutral() {
        return 1;
    }
    static __device__ __forceinline__ Lane map(Lane x, const Results&) {
        return x;
    }
    static __device__ __forceinline__ Lane combine(Lane a, Lane b) {
        return a * b;
    }
    static __device__ __forceinline__ Acc promote(Lane x) {
        return x;
    }
    static __device__ __forceinline__ Acc merge(Acc a, Acc b) {
        return a * b;
    }
    static __device__ __forceinline__ void finish(Acc acc, const Results& r, i64 o) {
        write_total(r, o, acc);
    }
};
typedef Each<ProductOf> Product;

// The largest (MAX) or smallest mapped element; NaN if any is.
template <bool MAX, bool MAGNITUDE> struct ExtremeOf {
    typedef CompareLane Lane;
    typedef CompareLane Acc;
    static __device__ __forceinline__ Lane neutral() {
        return !MAX ? highest(Lane(0)) : MAGNITUDE ? Lane(0) : lowest(Lane(0));
    }
    // A template, so that magnitudes are looked up for floats only.
    template <class L> static __device__ __forceinline__ L map(L x, const Results&) {
        if constexpr (MAGNITUDE) {
            return magnitude(x);
        } else {
            return x;
        }
    }
    static __device__ __forceinline__ Lane combine(Lane a, Lane b) {
        return a != a || (MAX ? a > b : a < b) ? a : b;
    }
    static __device__ __forceinline__ Acc promote(Lane x) {
        return x;
    }
    static __device__ __forceinline__ Acc merge(Acc a, Acc b) {
        return combine(a, b);
    }
    static __device__ __forceinline__ void finish(Acc acc, const Results& r, i64 o) {
        store((T*)r.out + o, (Compute<T>)acc);
    }
};
typedef Each<ExtremeOf<true, false>> Max;
typedef Each<ExtremeOf<false, false>> Min;

// Whether any element is not zero (ANY), or all are.
template <bool ANY> struct TruthOf {
    typedef CompareLane Lane;
    typedef i32 Acc;
    static __device__ __forceinline__ Lane neutral() {
        return ANY ? 0 : 1;
    }
    static __device__ __forceinline__ Lane map(Lane x, const Results&) {
        return x != 0 ? 1 : 0;
    }
    static __device__ __forceinline__ Lane combine(Lane a, Lane b) {
        return ANY ? (a > b ? a : b) : (a < b ? a : b);
    }
    static __device__ __forceinline__ Acc promote(Lane x) {
        return x != 0;
    }
    static __device__ __forceinline__ Acc merge(Acc a, Acc b) {
        return ANY ? a | b : a & b;
    }
    static __device__ __forceinline__ void finish(Acc acc, const Results& r, i64 o) {
        ((u8*)r.out)[o] = (u8)acc;
    }
};
typedef Each<TruthOf<true>> Any;
typedef Each<TruthOf<false>> All;

// The first largest (MAX) or smallest element and its number; a NaN counts as such.
template <bool MAX> struct ArgExtreme {
    typedef CompareLane Lane;
    struct Acc {
        Lane value;
        i64 index; // -1 while there is none
    };
    static __device__ __forceinline__ Acc empty() {
        return Acc{Lane(0), -1};
    }
    static __device__ __forceinline__ bool beats(Lane x, Lane best) {
        return (MAX ? x > best : x < best) || (x != x && best == best);
    }
    template <bool FULL, int N, class At> static __device__ __forceinline__ void batch(Acc& acc, Lane (&x)[N], u64 valid, At at, const Results&) {
        // A thread's elements come in rising order.
        Lane best = acc.value;
        int place = -1;
        bool none = acc.index < 0;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            bool takes = (FULL || (valid >> i & 1)) && (none || beats(x[i], best));
            best = takes ? x[i] : best;
            place = takes ? i : place;
            none = none && !takes;
        }
        if (place >= 0) {
            acc = Acc{best, at(place)};
        }
    }
    static __device__ __forceinline__ Acc merge(Acc a, Acc b) {
        bool same = a.value == b.value || (a.value != a.value && b.value != b.value);
        bool takes = a.index < 0 || (b.index >= 0 && (beats(b.value, a.value) || (same && b.index < a.index)));
        return takes ? b : a;
    }
    static __device__ __forceinline__ Acc shuffle(Acc a, int step) {
        return Acc{exchange(a.value, step), exchange(a.index, step)};
    }
    static __device__ __forceinline__ void finish(Acc acc, const Results& r, i64 o) {
        store((T*)r.out + o, (Compute<T>)acc.value);
        ((i64*)r.second)[o] = acc.index;
    }
};
typedef ArgExtreme<true> ArgMax;
typedef ArgExtreme<false> ArgMin;

#if FLOAT_FOLDS
struct MagnitudesOf : Summed {
    static __device__ __forceinline__ Lane map(Lane x, const Results&) {
        return magnitude(x);
    }
    static __device__ __forceinline__ void finish(Acc acc, const Results& r, i64 o) {
        write_total(r, o, acc);
    }
};
typedef Each<MagnitudesOf> AbsSum;

struct NonzerosOf : Summed {
    static __device__ __forceinline__ Lane map(Lane x, const Results&) {
        return x != 0 ? 1 : 0;
    }
    static __device__ __forceinline__ void finish(Acc acc, const Results& r, i64 o) {
        write_total(r, o, acc);
    }
};
typedef Each<NonzerosOf> CountNonzero;

struct SquaresOf : Summed {
    static __device__ __forceinline__ Lane map(Lane x, const Results&) {
        return x * x;
    }
    static __device__ __forceinline__ void finish(Acc acc, const Results& r, i64 o) {
        write_total(r, o, sqrt(acc));
    }
};
typedef Each<SquaresOf> Euclidean;

// (Σ |x|^a)^(1/a)
struct PowersOf : Summed {
    static __device__ __forceinline__ Lane map(Lane x, const Results& r) {
        return power(magnitude(x), r.a);
    }
    static __device__ __forceinline__ void finish(Acc acc, const Results& r, i64 o) {
        write_total(r, o, pow(acc, 1.0 / r.a));
    }
};
typedef Each<PowersOf> PowerNorm;

typedef Each<ExtremeOf<true, true>> AbsMax;
typedef Each<ExtremeOf<false, true>> AbsMin;

// Number, mean and squared deviations. Within a batch the deviations are taken from its own rounded mean (and how far that is off is found with
// them); batches are merged by Chan's formula: no cancellation, however far the mean lies from zero.
struct Moments {
    typedef C Lane;
    struct Acc {
        double count, mean, squares;
    };
    static __device__ __forceinline__ Acc empty() {
        return Acc{0, 0, 0};
    }
    template <bool FULL, int N, class At> static __device__ __forceinline__ void batch(Acc& acc, C (&x)[N], u64 valid, At, const Results&) {
        const int count = FULL ? N : __popcll(valid);
        if (count == 0) {
            return;
        }
        C part[N];
#pragma unroll
        for (int i = 0; i < N; ++i) {
            part[i] = FULL || (valid >> i & 1) ? x[i] : C(0);
        }
        tree<N>(part, [](C a, C b) { return a + b; });
        const C centre = part[0] / C(count);
        if (!(magnitude(centre) < highest(C(0)))) {
            acc = merge(acc, Acc{(double)count, (double)centre, (double)(centre - centre)});
            return;
        }
        C squares[N];
#pragma unroll
        for (int i = 0; i < N; ++i) {
            part[i] = FULL || (valid >> i & 1) ? x[i] - centre : C(0);
            squares[i] = part[i] * part[i];
        }
        tree<N>(part, [](C a, C b) { return a + b; });
        tree<N>(squares, [](C a, C b) { return a + b; });
        const C off = part[0] / C(count);
        const C about_mean = squares[0] - part[0] * off;
        acc = merge(acc, Acc{(double)count, (double)centre + (double)off, about_mean < C(0) ? 0.0 : (double)about_mean});
    }
    static __device__ __forceinline__ Acc merge(Acc a, Acc b) {
        if (b.count == 0) {
            return a;
        }
        if (a.count == 0) {
            return b;
        }
        const double count = a.count + b.count, delta = b.mean - a.mean, share = b.count / count;
        return Acc{count, a.mean + delta * share, a.squares + b.squares + delta * delta * a.count * share};
    }
    static __device__ __forceinline__ Acc shuffle(Acc a, int step) {
        return Acc{exchange(a.count, step), exchange(a.mean, step), exchange(a.squares, step)};
    }
    static __device__ __forceinline__ double variance(Acc acc, double correction) {
        const double divisor = acc.count - correction;
        return acc.squares / (divisor > 0 ? divisor : 0.0);
    }
    // Mode 0: count, mean and squares in f64; 1: variance with correction a; 2: its root; 3: mean, 1/√(variance + b) and the variance with
    // correction a, in the compute type.
    static __device__ __forceinline__ void finish(Acc acc, const Results& r, i64 o) {
        if (r.mode == 0) {
            double* out = (double*)r.out + 3 * o;
            out[0] = acc.count;
            out[1] = acc.mean;
            out[2] = acc.squares;
        } else if (r.mode == 3) {
            ((C*)r.out)[o] = (C)acc.mean;
            ((C*)r.second)[o] = (C)(1.0 / sqrt(variance(acc, 0.0) + r.b));
            ((C*)r.third)[o] = (C)variance(acc, r.a);
        } else {
            const double v = variance(acc, r.a);
            write_total(r, o, r.mode == 2 ? sqrt(v) : v);
        }
    }
};

// log Σ exp(x) as a sum relative to the largest element so far. `shift` is finite, or −∞ while nothing finite was seen.
struct LogSumExp {
    typedef C Lane;
    struct Acc {
        C shift;
        double sum;
    };
    static __device__ __forceinline__ Acc empty() {
        return Acc{lowest(C(0)), 0};
    }
    static __device__ __forceinline__ double scaled(Acc a, C shift) {
        return a.shift == shift || a.sum == 0 || !(a.sum < highest(0.0)) ? a.sum : a.sum * exp((double)a.shift - (double)shift);
    }
    template <bool FULL, int N, class At> static __device__ __forceinline__ void batch(Acc& acc, C (&x)[N], u64 valid, At, const Results&) {
        C top[N];
#pragma unroll
        for (int i = 0; i < N; ++i) {
            top[i] = FULL || (valid >> i & 1) ? x[i] : lowest(C(0));
        }
        tree<N>(top, [](C a, C b) { return a != a || a > b ? a : b; });
        const C most = top[0];
        if (!(magnitude(most) < highest(C(0)))) {
            // NaN and ∞ stay, −∞ adds nothing.
            acc.sum = most == lowest(C(0)) ? acc.sum : acc.sum + (double)most;
            return;
        }
        if (most > acc.shift) {
            acc.sum = scaled(acc, most);
            acc.shift = most;
        }
#pragma unroll
        for (int i = 0; i < N; ++i) {
            x[i] = FULL || (valid >> i & 1) ? exponential(x[i] - acc.shift) : C(0);
        }
        tree<N>(x, [](C a, C b) { return a + b; });
        acc.sum += (double)x[0];
    }
    static __device__ __forceinline__ Acc merge(Acc a, Acc b) {
        const C shift = a.shift > b.shift ? a.shift : b.shift;
        return Acc{shift, scaled(a, shift) + scaled(b, shift)};
    }
    static __device__ __forceinline__ Acc shuffle(Acc a, int step) {
        return Acc{exchange(a.shift, step), exchange(a.sum, step)};
    }
    static __device__ __forceinline__ void finish(Acc acc, const Results& r, i64 o) {
        const bool plain = acc.sum > 0 && acc.sum < highest(0.0);
        write_total(r, o, plain ? log(acc.sum) + (double)acc.shift : acc.sum == 0 ? lowest(0.0) : acc.sum);
    }
};
#endif

typedef FOLD F;
typedef F::Lane Lane;
typedef F::Acc Acc;

// Dimensions of the kept elements (with the strides of the input and of the output) and of the reduced ones, outermost first.
struct Plan {
    i32 kept_rank;
    i32 reduced_rank;
    i64 kept_shape[8];
    i64 kept_strides[8];
    i64 out_strides[8];
    i64 reduced_shape[8];
    i64 reduced_strides[8];
    i64 outputs;
    // Of the innermost reduced dimension (rows) or kept dimension (columns).
    i64 run;
    i64 stride;
    // Units of an output (packs of rows, or rows of columns), those of a part, and parts.
    i64 units;
    i64 part;
    i64 parts;
    // Threads of a row; or packs of columns and threads side by side.
    i32 lanes;
    i64 tiles;
};

// The quotient and rest of numbers that mostly fit 32 bits, where dividing is several times faster.
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

__device__ __forceinline__ void kept_offsets(const Plan& p, int rank, i64 o, i64& in, i64& out) {
    in = out = 0;
#pragma unroll 1
    for (int d = rank - 1; d >= 0; --d) {
        i64 i = o;
        if (d > 0) {
            o = divide(o, p.kept_shape[d], i);
        }
        in += i * p.kept_strides[d];
        out += i * p.out_strides[d];
    }
}

// The offset of element `i` of the outer `rank` reduced dimensions.
__device__ __forceinline__ i64 reduced_offset(const Plan& p, int rank, i64 i) {
    i64 offset = 0;
#pragma unroll 1
    for (int d = rank - 1; d > 0; --d) {
        i64 at;
        i = divide(i, p.reduced_shape[d], at);
        offset += at * p.reduced_strides[d];
    }
    return rank > 0 ? offset + i * p.reduced_strides[0] : 0;
}

template <class X> __device__ __forceinline__ Lane lane_of(X x) {
    return (Lane)widen<T>(x);
}

// Folds every `lanes`-th pack of units first .. end of the row at x.
__device__ __forceinline__ Acc fold_row(const Elements x, const Plan& p, i64 first, i64 end, i64 lane, i64 lanes, const Results& r) {
    Acc acc = F::empty();
    const i64 packs = (p.run + PACK - 1) / PACK;
    const bool single = p.reduced_rank <= 1;
    for (i64 u = first + lane; u < end; u += lanes * UNROLL) {
        alignas(16) T raw[BATCH];
        u64 valid = 0;
        i64 places[UNROLL];
#pragma unroll
        for (int k = 0; k < UNROLL; ++k) {
            const i64 unit = u + k * lanes;
            i64 at = unit, start = 0;
            if (!single) {
                start = reduced_offset(p, p.reduced_rank - 1, divide(unit, packs, at));
            }
            at *= PACK;
            places[k] = at;
            const i64 left = unit < end ? p.run - at : 0;
            const Elements from = x.from(start + at * p.stride);
            T* to = raw + k * PACK;
            valid |= (left >= PACK ? ~0ull >> (64 - PACK) : left > 0 ? (1ull << left) - 1 : 0) << (k * PACK);
            if (VECTOR && left >= PACK) {
                from.pack<PACK>(to);
            } else {
                from.strided<PACK>(p.stride, left, to);
            }
        }
        Lane v[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            v[i] = lane_of(raw[i]);
        }
        auto at = [&](int i) { return places[i / PACK] + i % PACK; };
        if (valid == ~0ull >> (64 - BATCH)) {
            F::batch<true>(acc, v, valid, at, r);
        } else {
            F::batch<false>(acc, v, valid, at, r);
        }
    }
    return acc;
}

// Merges over `lanes` neighbouring threads of a warp, a power of two.
__device__ __forceinline__ Acc merge_lanes(Acc acc, int lanes) {
    for (int step = lanes / 2; step > 0; step >>= 1) {
        acc = F::merge(acc, F::shuffle(acc, step));
    }
    return acc;
}

// Merges over the block; thread 0 has the result.
__device__ __forceinline__ Acc merge_block(Acc acc, Acc* scratch) {
    acc = merge_lanes(acc, 32);
    __syncthreads();
    if (threadIdx.x % 32 == 0) {
        scratch[threadIdx.x / 32] = acc;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int w = 1; w < THREADS / 32; ++w) {
            acc = F::merge(acc, scratch[w]);
        }
    }
    return acc;
}

#if PATTERN == 0
// A group of `lanes` threads (up to 32) for each output.
extern "C" __global__ void __launch_bounds__(THREADS) rows_by_lanes(const __grid_constant__ Input x, const Plan p, const Results r) {
    const int lanes = p.lanes, lane = threadIdx.x % lanes, per_block = THREADS / lanes;
    for (i64 first = (i64)blockIdx.x * per_block; first < p.outputs; first += (i64)gridDim.x * per_block) {
        const i64 o = first + threadIdx.x / lanes;
        i64 in = 0, out = 0;
        Acc acc = F::empty();
        if (o < p.outputs) {
            kept_offsets(p, p.kept_rank, o, in, out);
            acc = fold_row(elements(x).from(in), p, 0, p.units, lane, lanes, r);
        }
        acc = merge_lanes(acc, lanes);
        if (lane == 0 && o < p.outputs) {
            F::finish(acc, r, out);
        }
    }
}
KILN_KERNEL(rows_by_lanes)
#endif

#if PATTERN == 1
// A block for each part of each output. With several parts, `parts` gets the accumulators.
extern "C" __global__ void __launch_bounds__(THREADS) rows_by_blocks(const __grid_constant__ Input x, const Plan p, const Results r, Acc* parts) {
    __shared__ Acc scratch[THREADS / 32];
    for (i64 task = blockIdx.x; task < p.outputs * p.parts; task += gridDim.x) {
        i64 part = 0, in, out;
        const i64 o = p.parts == 1 ? task : divide(task, p.parts, part);
        kept_offsets(p, p.kept_rank, o, in, out);
        const i64 first = part * p.part, end = first + p.part < p.units ? first + p.part : p.units;
        const Acc acc = merge_block(fold_row(elements(x).from(in), p, first, end, threadIdx.x, THREADS, r), scratch);
        if (threadIdx.x == 0) {
            if (p.parts == 1) {
                F::finish(acc, r, out);
            } else {
                parts[task] = acc;
            }
        }
        __syncthreads();
    }
}
KILN_KERNEL(rows_by_blocks)
#endif

#if PATTERN == 2
// A block for each part of each tile of `lanes` packs of columns.
extern "C" __global__ void __launch_bounds__(THREADS) columns(const __grid_constant__ Input x, const Plan p, const Results r, Acc* parts) {
    __shared__ Acc scratch[THREADS * COLUMNS];
    const int across = p.lanes, down = THREADS / across, tx = threadIdx.x % across, ty = threadIdx.x / across;
    const i64 outer = p.outputs / p.run;
    for (i64 task = blockIdx.x; task < outer * p.tiles * p.parts; task += gridDim.x) {
        i64 part, tile, in, out;
        const i64 line = divide(divide(task, p.parts, part), p.tiles, tile);
        kept_offsets(p, p.kept_rank - 1, line, in, out);
        const i64 column = (tile * across + tx) * COLUMNS;
        const i64 first = part * p.part, end = first + p.part < p.units ? first + p.part : p.units;
        const i64 left = p.run - column;
        Acc acc[COLUMNS];
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j) {
            acc[j] = F::empty();
        }
        if (left > 0) {
            const Elements base = elements(x).from(in + column * p.stride);
            for (i64 row = first + ty; row < end; row += (i64)down * ROWS) {
                alignas(16) T raw[ROWS][COLUMNS];
#pragma unroll
                for (int k = 0; k < ROWS; ++k) {
                    const i64 at = row + (i64)k * down;
                    const bool exists = at < end;
                    const Elements from = base.from(exists ? reduced_offset(p, p.reduced_rank, at) : 0);
                    if (VECTOR && left >= COLUMNS) {
                        *(Pack<T, COLUMNS>*)raw[k] = Pack<T, COLUMNS>{};
                        if (exists) {
                            from.pack<COLUMNS>(raw[k]);
                        }
                    } else {
                        from.strided<COLUMNS>(p.stride, exists ? left : 0, raw[k]);
                    }
                }
                const bool full = row + (i64)(ROWS - 1) * down < end;
                u64 valid = 0;
#pragma unroll
                for (int k = 0; k < ROWS; ++k) {
                    valid |= (u64)(row + (i64)k * down < end) << k;
                }
                auto at = [&](int k) { return row + (i64)k * down; };
#pragma unroll
                for (int j = 0; j < COLUMNS; ++j) {
                    Lane v[ROWS];
#pragma unroll
                    for (int k = 0; k < ROWS; ++k) {
                        v[k] = lane_of(raw[k][j]);
                    }
                    if (full) {
                        F::batch<true>(acc[j], v, valid, at, r);
                    } else {
                        F::batch<false>(acc[j], v, valid, at, r);
                    }
                }
            }
        }
        __syncthreads();
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j) {
            scratch[j * THREADS + threadIdx.x] = acc[j];
        }
        for (int half = down / 2; half > 0; half /= 2) {
            __syncthreads();
            if (ty < half) {
#pragma unroll
                for (int j = 0; j < COLUMNS; ++j) {
                    Acc* mine = scratch + j * THREADS + threadIdx.x;
                    *mine = F::merge(*mine, mine[half * across]);
                }
            }
        }
        if (ty == 0) {
#pragma unroll
            for (int j = 0; j < COLUMNS; ++j) {
                const i64 c = column + j;
                if (c < p.run) {
                    const Acc result = scratch[j * THREADS + threadIdx.x];
                    if (p.parts == 1) {
                        F::finish(result, r, out + c * p.out_strides[p.kept_rank - 1]);
                    } else {
                        parts[(line * p.run + c) * p.parts + part] = result;
                    }
                }
            }
        }
    }
}
KILN_KERNEL(columns)
#endif

// Merges the parts of each output: by a warp, or by a block if `lanes` is 256. Without parts, the result over nothing.
extern "C" __global__ void __launch_bounds__(THREADS) finish(const Acc* parts, const Plan p, const Results r) {
    __shared__ Acc scratch[THREADS / 32];
    const int lanes = p.lanes, lane = threadIdx.x % lanes, per_block = THREADS / lanes;
    for (i64 first = (i64)blockIdx.x * per_block; first < p.outputs; first += (i64)gridDim.x * per_block) {
        const i64 o = first + threadIdx.x / lanes;
        Acc acc = F::empty();
        if (o < p.outputs) {
            for (i64 part = lane; part < p.parts; part += lanes) {
                acc = F::merge(acc, parts[o * p.parts + part]);
            }
        }
        acc = lanes == THREADS ? merge_block(acc, scratch) : merge_lanes(acc, lanes);
        if (lane == 0 && o < p.outputs) {
            i64 in, out;
            kept_offsets(p, p.kept_rank, o, in, out);
            F::finish(acc, r, out);
        }
        __syncthreads();
    }
}
KILN_KERNEL(finish)
