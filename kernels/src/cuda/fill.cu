// New tensors: constants, ranges, identity matrices.
//
// T: type of the elements; BOOL where u8 stands for bool. With FILL, which gives the kernel `fill` alone, T is an unsigned integer of their size.
#include "kiln.cuh"

#ifdef FILL
constexpr int VEC = 16 / sizeof(T);

extern "C" __global__ void __launch_bounds__(256) fill(T* out, i64 n, u64 bits) {
    Pack<T, VEC> vector;
#pragma unroll
    for (int j = 0; j < VEC; ++j) {
        vector.x[j] = (T)bits;
    }
    const i64 whole = (u64)out % 16 == 0 ? n / VEC : 0;
    for (i64 i = global_thread(); i < whole; i += global_threads()) {
        ((Pack<T, VEC>*)out)[i] = vector;
    }
    for (i64 i = whole * VEC + global_thread(); i < n; i += global_threads()) {
        out[i] = (T)bits;
    }
}
KILN_KERNEL(fill)

#else
// The nearest value to an f64; integers truncate and saturate.
template <class E> __device__ __forceinline__ E from_double(double x) {
#ifdef BOOL
    return x != 0;
#else
    if constexpr (Same<E, bf16>::value) {
        // As the processor's conversion: the low half of the significand is cut off before the rest is rounded.
        return narrow<E>((float)__hiloint2double(__double2hiint(x), 0));
    } else if constexpr (is_float_type<E>) {
        return narrow<E>((Compute<E>)x);
    } else if constexpr (Same<E, u8>::value) {
        return (u8)(x > 0 ? x < 255 ? x : 255 : 0);
    } else if constexpr (Same<E, i32>::value) {
        return x != x ? 0 : __double2int_rz(x);
    } else {
        return x != x ? 0 : __double2ll_rz(x);
    }
#endif
}

extern "C" __global__ void __launch_bounds__(256) arange(T* out, i64 n, double start, double step) {
    for (i64 i = global_thread(); i < n; i += global_threads()) {
        out[i] = from_double<T>(__dadd_rn(start, __dmul_rn((double)i, step)));
    }
}
KILN_KERNEL(arange)

// From the nearer end, so that both ends are exact.
extern "C" __global__ void __launch_bounds__(256) linspace(T* out, i64 n, double start, double end, double step) {
    for (i64 i = global_thread(); i < n; i += global_threads()) {
        const bool first_half = i < n / 2 || n == 1;
        const double offset = __dmul_rn((double)(first_half ? i : n - 1 - i), step);
        out[i] = from_double<T>(first_half ? __dadd_rn(start, offset) : __dsub_rn(end, offset));
    }
}
KILN_KERNEL(linspace)

extern "C" __global__ void __launch_bounds__(256) eye(T* out, i64 rows) {
    for (i64 i = global_thread(); i < rows * rows; i += global_threads()) {
        out[i] = from_double<T>(i % (rows + 1) == 0);
    }
}
KILN_KERNEL(eye)
#endif
