// Elementary functions by the type of their argument, and the functions of the pointwise table that need more than an expression.
// What is the same for floats and integers is a template; nothing here is undefined for any value.
#pragma once
#include "kiln.cuh"

namespace math {

#define KILN_MATH(name)                                                                                                                    \
    __device__ __forceinline__ float name(float x) {                                                                                       \
        return ::name##f(x);                                                                                                               \
    }                                                                                                                                      \
    __device__ __forceinline__ double name(double x) {                                                                                     \
        return ::name(x);                                                                                                                  \
    }
KILN_MATH(exp)
KILN_MATH(expm1)
KILN_MATH(log)
KILN_MATH(log1p)
KILN_MATH(sqrt)
KILN_MATH(sin)
KILN_MATH(cos)
KILN_MATH(tanh)
KILN_MATH(erf)
KILN_MATH(normcdf)
#undef KILN_MATH

// Rounding: integers are round already.
#define KILN_ROUND(name, function)                                                                                                         \
    template <class A> __device__ __forceinline__ A name(A x) {                                                                            \
        if constexpr (Same<A, float>::value) {                                                                                             \
            return ::function##f(x);                                                                                                       \
        } else if constexpr (Same<A, double>::value) {                                                                                     \
            return ::function(x);                                                                                                          \
        } else {                                                                                                                           \
            return x;                                                                                                                      \
        }                                                                                                                                  \
    }
KILN_ROUND(floor, floor)
KILN_ROUND(ceil, ceil)
KILN_ROUND(round, rint)
#undef KILN_ROUND

// |x|; the most negative integer stays.
template <class A> __device__ __forceinline__ A abs(A x) {
    if constexpr (Same<A, float>::value) {
        return ::fabsf(x);
    } else if constexpr (Same<A, double>::value) {
        return ::fabs(x);
    } else {
        return x < 0 ? A(-x) : x;
    }
}

// min(max(x, low), high); NaN stays, and of bounds in the wrong order the upper one wins.
template <class A> __device__ __forceinline__ A clamp(A x, A low, A high) {
    x = x < low ? low : x;
    return x > high ? high : x;
}

// 1 / (1 + e^−x), without overflow on either side, so that small values keep their digits.
template <class A> __device__ __forceinline__ A sigmoid(A x) {
    A e = exp(-abs(x));
    return (x < 0 ? e : A(1)) / (A(1) + e);
}

// Beyond ±128 every gate is open or shut, and infinity times 0 would be NaN.
template <class A> __device__ __forceinline__ A bounded(A x) {
    return clamp(x, A(-128), A(128));
}

// The density of the standard normal distribution.
template <class A> __device__ __forceinline__ A normal_density(A x) {
    return A(0.39894228040143267794) * exp(A(-0.5) * x * x);
}

template <class A> __device__ __forceinline__ A softplus(A x) {
    return x > 0 ? x + log1p(exp(-x)) : log1p(exp(x));
}

// Twice the argument of the hyperbolic tangent in GELU's tanh form.
template <class A> __device__ __forceinline__ A gelu_tanh_argument(A x) {
    return A(1.5957691216057307117) * (x + A(0.044715) * x * x * x);
}

template <class A> __device__ __forceinline__ A gelu_backward(A x, A g) {
    x = bounded(x);
    return g * (normcdf(x) + x * normal_density(x));
}

template <class A> __device__ __forceinline__ A gelu_tanh_backward(A x, A g) {
    x = bounded(x);
    A v = gelu_tanh_argument(x), slope = A(1.5957691216057307117) * (A(1) + A(0.134145) * x * x);
    return g * (sigmoid(v) * (A(1) + x * slope * sigmoid(-v)));
}

template <class A> __device__ __forceinline__ A silu_backward(A x, A g) {
    x = bounded(x);
    return g * (sigmoid(x) * (A(1) + x * sigmoid(-x)));
}

template <class A> __device__ __forceinline__ A mish_backward(A x, A g) {
    x = bounded(x);
    A t = tanh(softplus(x));
    return g * (t + x * sigmoid(x) * (A(1) - t * t));
}

// Rounded towards zero for integers, and 0 where the divisor is.
template <class A> __device__ __forceinline__ A divide(A a, A b) {
    if constexpr (is_float_type<A>) {
        return a / b;
    } else {
        return b == 0 ? A(0) : b == A(-1) ? A(-a) : A(a / b);
    }
}

// a − b·⌊a/b⌋, with the divisor's sign; of integers 0 where the divisor is.
template <class A> __device__ __forceinline__ A remainder(A a, A b) {
    A r;
    if constexpr (Same<A, float>::value) {
        r = ::fmodf(a, b);
    } else if constexpr (Same<A, double>::value) {
        r = ::fmod(a, b);
    } else {
        r = b == 0 || b == A(-1) ? A(0) : A(a % b);
    }
    return r != 0 && (r < 0) != (b < 0) ? A(r + b) : r;
}

// a^b; of integers by squaring, with 1/a rounded towards zero for a negative exponent.
template <class A> __device__ __forceinline__ A power(A a, A b) {
    if constexpr (Same<A, float>::value) {
        return ::powf(a, b);
    } else if constexpr (Same<A, double>::value) {
        return ::pow(a, b);
    } else {
        if (b < 0) {
            return a == 1 ? A(1) : a == A(-1) ? (b % 2 == 0 ? A(1) : a) : A(0);
        }
        A result = 1;
        for (; b > 0; b /= 2) {
            if (b % 2 == 1) {
                result = A(result * a);
            }
            a = A(a * a);
        }
        return result;
    }
}

__device__ __forceinline__ float atan2(float a, float b) {
    return ::atan2f(a, b);
}
__device__ __forceinline__ double atan2(double a, double b) {
    return ::atan2(a, b);
}

// A number in another type: floats to integers truncate and saturate (NaN gives 0), integers to narrower ones wrap.
template <class B, class A> __device__ __forceinline__ B convert(A x) {
    if constexpr (is_float_type<A> && !is_float_type<B>) {
        constexpr bool wide = sizeof(B) == 8, byte = sizeof(B) == 1;
        // The bounds are exact in A or beyond B's: the type's largest value itself may not be a float.
        constexpr A low = byte ? A(0) : wide ? A(-9223372036854775808.0) : A(-2147483648.0);
        constexpr A high = byte ? A(255) : wide ? A(9223372036854775808.0) : A(2147483648.0);
        constexpr B most = byte ? B(255) : wide ? B(0x7fffffffffffffffLL) : B(0x7fffffff);
        return x != x ? B(0) : x <= low ? B(low) : x >= high ? most : B(x);
    } else {
        return B(x);
    }
}

} // namespace math
