#include "kiln.cuh"
// Rotary position embedding: pairs of a row's elements turned by the angles of a table; the rest of a row is copied.
//
// Macros: T; VEC: elements of an access, a divisor of the pairs and of the rest, to which all rows are aligned; INTERLEAVED: whether 2i and 2i + 1 are a
// pair, or i and i + pairs.

typedef Compute<T> C;
typedef Pack<T, VEC> Part;

// The rows' extents, and what lies between neighbours.
struct Rows {
    i64 shape[8];
    i64 x[8];
    i64 cos[8];
    i64 sin[8];
    i32 rank;
};

// A thread takes VEC pairs, or VEC elements of the rest. `sin_sign` is −1 to turn back.
extern "C" __global__ void __launch_bounds__(256) rotate(const Rows rows, const T* __restrict__ x, const C* __restrict__ cos, const C* __restrict__ sin,
                                                         T* __restrict__ out, const i64 count, const i32 pairs, const i32 rest, const i32 sin_sign) {
    const i32 units = (pairs + rest) / VEC, width = 2 * pairs + rest;
    for (i64 i = global_thread(); i < count; i += global_threads()) {
        i64 row = i / units;
        const i32 unit = (i32)(i - row * units);
        T* const to = out + row * width;
        i64 at_x = 0, at_cos = 0, at_sin = 0;
        for (int d = rows.rank - 1; d >= 0; --d) {
            const i64 above = d > 0 ? row / rows.shape[d] : 0, at = row - above * rows.shape[d];
            at_x += at * rows.x[d];
            at_cos += at * rows.cos[d];
            at_sin += at * rows.sin[d];
            row = above;
        }
        const T* const from = x + at_x;
        const i32 first = unit * VEC;
        if (first >= pairs) {
            *(Part*)(to + pairs + first) = *(const Part*)(from + pairs + first);
            continue;
        }
        const i32 low = INTERLEAVED ? 2 * first : first, high = INTERLEAVED ? low + VEC : low + pairs;
        Part part[2] = {*(const Part*)(from + low), *(const Part*)(from + high)};
        T values[2 * VEC];
#pragma unroll
        for (i32 e = 0; e < 2 * VEC; ++e) {
            values[e] = part[e / VEC].x[e % VEC];
        }
#pragma unroll
        for (i32 e = 0; e < VEC; ++e) {
            constexpr i32 NEXT = INTERLEAVED ? 2 : 1, APART = INTERLEAVED ? 1 : VEC;
            T &first_of = values[e * NEXT], &second_of = values[e * NEXT + APART];
            const C a = widen<T>(first_of), b = widen<T>(second_of);
            const C c = cos[at_cos + first + e], s = C(sin_sign) * sin[at_sin + first + e];
            first_of = narrow<T>(a * c - b * s);
            second_of = narrow<T>(b * c + a * s);
        }
#pragma unroll
        for (i32 e = 0; e < 2 * VEC; ++e) {
            part[e / VEC].x[e % VEC] = values[e];
        }
        *(Part*)(to + low) = part[0];
        *(Part*)(to + high) = part[1];
    }
}
KILN_KERNEL(rotate)
