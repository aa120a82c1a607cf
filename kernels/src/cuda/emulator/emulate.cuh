// CUDA's language and the functions of ptx.cuh on the host, for the emulator. What a thread does alone is here; whatever waits for other threads or
// moves data behind their backs is in the runtime (emulate.cpp), which is compiled once and loaded before any kernel.
//
// A kernel reads `threadIdx` and its like as constants: the runtime changes them when it switches to another thread, and no thread ever sees a change.
// Static shared memory is the module's zero-initialised data.
// Not emulated: atomics on floats (Kiln has none) and what only the hardware's speed depends on. Casts of numbers out of range follow the host.

#define __global__ __attribute__((visibility("hidden")))
#define __device__
#define __host__
#define __constant__
#define __shared__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))
// A standard attribute may not follow `static`.
#define alignas(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __grid_constant__
#define __restrict__ __restrict
#define __CUDA_ARCH__ 900

#define KILN_VECTOR(T, name, bytes) \
    struct alignas(2 * bytes) name##2 { \
        T x, y; \
    }; \
    struct name##3 { \
        T x, y, z; \
    }; \
    struct alignas(bytes < 4 ? 4 * bytes : 16) name##4 { \
        T x, y, z, w; \
    }; \
    __forceinline__ name##2 make_##name##2(T x, T y) { return {x, y}; } \
    __forceinline__ name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; } \
    __forceinline__ name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
KILN_VECTOR(signed char, char, 1)
KILN_VECTOR(u8, uchar, 1)
KILN_VECTOR(short, short, 2)
KILN_VECTOR(u16, ushort, 2)
KILN_VECTOR(i32, int, 4)
KILN_VECTOR(u32, uint, 4)
KILN_VECTOR(i64, longlong, 8)
KILN_VECTOR(u64, ulonglong, 8)
KILN_VECTOR(float, float, 4)
KILN_VECTOR(double, double, 8)
#undef KILN_VECTOR
struct dim3 {
    u32 x = 1, y = 1, z = 1;
};

// ---- the runtime ----

#include "emulate_abi.cuh"

extern "C" {
extern const uint3 threadIdx __asm__("kiln_emulate_thread");
extern const uint3 blockIdx __asm__("kiln_emulate_block");
extern const uint3 blockDim __asm__("kiln_emulate_block_dim");
extern const uint3 gridDim __asm__("kiln_emulate_grid_dim");
extern char* const kiln_emulate_shared;
}

// Calls a kernel with arguments of the types that its signature says. What is done here and by the launcher is not the kernel's, and is not checked.
template <auto K> struct KilnInvoke;
template <class... A, void (*K)(A...)> struct KilnInvoke<K> {
    template <u32...> struct Indices {};
    template <u32... I> __attribute__((no_sanitize("thread"))) static void unpack(void* const* args, Indices<I...>) {
        K(*(A*)args[I]...);
    }
    __attribute__((no_sanitize("thread"))) static void run(void* const* args) { unpack(args, Indices<__integer_pack(sizeof...(A))...>()); }
};

#ifdef KILN_EMULATE_CHECK
#define KILN_CHECKED 1
#else
#define KILN_CHECKED 0
#endif
#define KILN_KERNEL_CLUSTER(name, blocks) \
    extern "C" __attribute__((visibility("default"), no_sanitize("thread"))) int name##__launch( \
        const u32 grid[3], const u32 block[3], u32 shared_bytes, void** args, char* message, u64 message_len) { \
        const KilnKernel kernel = {#name, KilnInvoke<name>::run, blocks, KILN_CHECKED}; \
        return kiln_emulate_launch(&kernel, grid, block, shared_bytes, args, message, message_len); \
    }
#define KILN_KERNEL(name) KILN_KERNEL_CLUSTER(name, 1)
#define KILN_SHARED(type, name) type* const name = (type*)kiln_emulate_shared

// ---- threads, warps and blocks ----

constexpr int warpSize = 32;

__forceinline__ void __syncthreads() { kiln_emulate_barrier(0, 0, KILN_SYNC, 0); }
__forceinline__ int __syncthreads_count(int predicate) { return (int)kiln_emulate_barrier(0, 0, KILN_SYNC, predicate != 0); }
__forceinline__ int __syncthreads_or(int predicate) { return kiln_emulate_barrier(0, 0, KILN_SYNC, predicate != 0) != 0; }
__forceinline__ int __syncthreads_and(int predicate) { return kiln_emulate_barrier(0, 0, KILN_SYNC, predicate == 0) == 0; }
__forceinline__ void __syncwarp(u32 mask = 0xffffffff) { kiln_emulate_warp(KILN_SYNCWARP, mask, 0, 0, 32); }

template <class V> __forceinline__ u64 kiln_bits(V x) {
    static_assert(sizeof(V) == 4 || sizeof(V) == 8, "lanes exchange values of 4 or 8 bytes");
    if constexpr (sizeof(V) == 4) {
        return __builtin_bit_cast(u32, x);
    } else {
        return __builtin_bit_cast(u64, x);
    }
}
template <class V> __forceinline__ V kiln_value(u64 bits) {
    if constexpr (sizeof(V) == 4) {
        return __builtin_bit_cast(V, (u32)bits);
    } else {
        return __builtin_bit_cast(V, bits);
    }
}
template <class V> __forceinline__ V __shfl_sync(u32 mask, V x, int lane, int width = 32) {
    return kiln_value<V>(kiln_emulate_warp(KILN_SHUFFLE, mask, kiln_bits(x), (u32)lane, (u32)width));
}
template <class V> __forceinline__ V __shfl_up_sync(u32 mask, V x, u32 step, int width = 32) {
    return kiln_value<V>(kiln_emulate_warp(KILN_SHUFFLE_UP, mask, kiln_bits(x), step, (u32)width));
}
template <class V> __forceinline__ V __shfl_down_sync(u32 mask, V x, u32 step, int width = 32) {
    return kiln_value<V>(kiln_emulate_warp(KILN_SHUFFLE_DOWN, mask, kiln_bits(x), step, (u32)width));
}
template <class V> __forceinline__ V __shfl_xor_sync(u32 mask, V x, int step, int width = 32) {
    return kiln_value<V>(kiln_emulate_warp(KILN_SHUFFLE_XOR, mask, kiln_bits(x), (u32)step, (u32)width));
}
__forceinline__ u32 __ballot_sync(u32 mask, int predicate) { return (u32)kiln_emulate_warp(KILN_BALLOT, mask, predicate != 0, 0, 32); }
__forceinline__ int __any_sync(u32 mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
__forceinline__ int __all_sync(u32 mask, int predicate) { return __ballot_sync(mask, predicate == 0) == 0; }
template <class V> __forceinline__ u32 __match_any_sync(u32 mask, V x) { return (u32)kiln_emulate_warp(KILN_MATCH, mask, kiln_bits(x), 0, 32); }
// The hardware may run any lane apart from the others, so a kernel has to work with this answer.
__forceinline__ u32 __activemask() { return 1u << (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32; }

__forceinline__ void __threadfence() { kiln_emulate_fence(); }
__forceinline__ void __threadfence_block() { kiln_emulate_fence(); }
__forceinline__ void __threadfence_system() { kiln_emulate_fence(); }
__forceinline__ void __nanosleep(u32) { kiln_emulate_yield(); }
[[noreturn]] __forceinline__ void __trap() { kiln_emulate_trap(); }
__forceinline__ i64 clock64() { return (i64)kiln_emulate_clock(); }

#define KILN_ATOMIC(name, T, operation) \
    __forceinline__ T name(T* p, T x) { return (T)kiln_emulate_atomic(operation, p, sizeof(T), (u64)x, 0); }
#define KILN_ATOMIC_ALL(name, operation) \
    KILN_ATOMIC(name, i32, operation) \
    KILN_ATOMIC(name, u32, operation) \
    KILN_ATOMIC(name, i64, operation) \
    KILN_ATOMIC(name, u64, operation)
KILN_ATOMIC_ALL(atomicAdd, KILN_ADD)
KILN_ATOMIC_ALL(atomicExch, KILN_EXCHANGE)
KILN_ATOMIC_ALL(atomicAnd, KILN_AND)
KILN_ATOMIC_ALL(atomicOr, KILN_OR)
KILN_ATOMIC_ALL(atomicXor, KILN_XOR)
KILN_ATOMIC(atomicMax, i32, KILN_MAX)
KILN_ATOMIC(atomicMax, i64, KILN_MAX)
KILN_ATOMIC(atomicMax, u32, KILN_UMAX)
KILN_ATOMIC(atomicMax, u64, KILN_UMAX)
KILN_ATOMIC(atomicMin, i32, KILN_MIN)
KILN_ATOMIC(atomicMin, i64, KILN_MIN)
KILN_ATOMIC(atomicMin, u32, KILN_UMIN)
KILN_ATOMIC(atomicMin, u64, KILN_UMIN)
#undef KILN_ATOMIC
#undef KILN_ATOMIC_ALL
#define KILN_CAS_OF(T) \
    __forceinline__ T atomicCAS(T* p, T expected, T x) { return (T)kiln_emulate_atomic(KILN_CAS, p, sizeof(T), (u64)x, (u64)expected); }
KILN_CAS_OF(i32)
KILN_CAS_OF(u32)
KILN_CAS_OF(i64)
KILN_CAS_OF(u64)
#undef KILN_CAS_OF
__forceinline__ u32 atomicSub(u32* p, u32 x) { return atomicAdd(p, 0u - x); }
__forceinline__ i32 atomicSub(i32* p, i32 x) { return (i32)atomicSub((u32*)p, (u32)x); }

template <class V> __forceinline__ V __ldg(const V* p) { return *p; }
template <class V> __forceinline__ V __ldcg(const V* p) { return *p; }
template <class V> __forceinline__ V __ldcs(const V* p) { return *p; }
template <class V> __forceinline__ void __stcs(V* p, V x) { *p = x; }
template <class V> __forceinline__ void __stcg(V* p, V x) { *p = x; }

// ---- bits ----

__forceinline__ int __popc(u32 x) { return __builtin_popcount(x); }
__forceinline__ int __popcll(u64 x) { return __builtin_popcountll(x); }
__forceinline__ int __clz(int x) { return x == 0 ? 32 : __builtin_clz((u32)x); }
__forceinline__ int __clzll(i64 x) { return x == 0 ? 64 : __builtin_clzll((u64)x); }
__forceinline__ int __ffs(int x) { return __builtin_ffs(x); }
__forceinline__ int __ffsll(i64 x) { return __builtin_ffsll(x); }
__forceinline__ u32 __brev(u32 x) {
    x = (x & 0x55555555) << 1 | (x >> 1 & 0x55555555);
    x = (x & 0x33333333) << 2 | (x >> 2 & 0x33333333);
    x = (x & 0x0f0f0f0f) << 4 | (x >> 4 & 0x0f0f0f0f);
    return __builtin_bswap32(x);
}
__forceinline__ u64 __brevll(u64 x) { return (u64)__brev((u32)x) << 32 | __brev((u32)(x >> 32)); }
__forceinline__ u32 __umulhi(u32 a, u32 b) { return (u32)((u64)a * b >> 32); }
__forceinline__ int __mulhi(int a, int b) { return (int)((i64)a * b >> 32); }
__forceinline__ u64 __umul64hi(u64 a, u64 b) { return (u64)((unsigned __int128)a * b >> 64); }
__forceinline__ i64 __mul64hi(i64 a, i64 b) { return (i64)((__int128)a * b >> 64); }
__forceinline__ u32 __funnelshift_l(u32 low, u32 high, u32 shift) { return (u32)(((u64)high << 32 | low) << (shift & 31) >> 32); }
__forceinline__ u32 __funnelshift_r(u32 low, u32 high, u32 shift) { return (u32)(((u64)high << 32 | low) >> (shift & 31)); }
__forceinline__ u32 __byte_perm(u32 a, u32 b, u32 selector) {
    const u64 bytes = (u64)b << 32 | a;
    u32 result = 0;
    for (int i = 0; i < 4; ++i) {
        result |= (u32)(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
    }
    return result;
}
__forceinline__ float __int_as_float(int x) { return __builtin_bit_cast(float, x); }
__forceinline__ float __uint_as_float(u32 x) { return __builtin_bit_cast(float, x); }
__forceinline__ int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
__forceinline__ u32 __float_as_uint(float x) { return __builtin_bit_cast(u32, x); }
__forceinline__ i64 __double_as_longlong(double x) { return __builtin_bit_cast(i64, x); }
__forceinline__ double __longlong_as_double(i64 x) { return __builtin_bit_cast(double, x); }
__forceinline__ int __double2hiint(double x) { return (int)(__double_as_longlong(x) >> 32); }
__forceinline__ int __double2loint(double x) { return (int)__double_as_longlong(x); }
__forceinline__ double __hiloint2double(int high, int low) { return __longlong_as_double((i64)((u64)(u32)high << 32 | (u32)low)); }

// ---- mathematics ----

extern "C" {
int printf(const char*, ...);
void* memcpy(void*, const void*, unsigned long);
void* memset(void*, int, unsigned long);
int abs(int);
long long llabs(long long);
#define KILN_MATH_1(name) \
    float name##f(float); \
    double name(double);
#define KILN_MATH_2(name) \
    float name##f(float, float); \
    double name(double, double);
// clang-format off
KILN_MATH_1(exp) KILN_MATH_1(exp2) KILN_MATH_1(exp10) KILN_MATH_1(expm1) KILN_MATH_1(log) KILN_MATH_1(log2) KILN_MATH_1(log10) KILN_MATH_1(log1p)
KILN_MATH_1(sqrt) KILN_MATH_1(cbrt) KILN_MATH_1(sin) KILN_MATH_1(cos) KILN_MATH_1(tan) KILN_MATH_1(asin) KILN_MATH_1(acos) KILN_MATH_1(atan)
KILN_MATH_1(sinh) KILN_MATH_1(cosh) KILN_MATH_1(tanh) KILN_MATH_1(asinh) KILN_MATH_1(acosh) KILN_MATH_1(atanh) KILN_MATH_1(erf) KILN_MATH_1(erfc)
KILN_MATH_1(lgamma) KILN_MATH_1(tgamma) KILN_MATH_1(floor) KILN_MATH_1(ceil) KILN_MATH_1(trunc) KILN_MATH_1(rint) KILN_MATH_1(nearbyint)
KILN_MATH_1(round) KILN_MATH_1(fabs) KILN_MATH_2(pow) KILN_MATH_2(atan2) KILN_MATH_2(fmod) KILN_MATH_2(fmin) KILN_MATH_2(fmax)
KILN_MATH_2(copysign) KILN_MATH_2(hypot) KILN_MATH_2(remainder) KILN_MATH_2(fdim) KILN_MATH_2(nextafter)
// clang-format on
float fmaf(float, float, float);
double fma(double, double, double);
float ldexpf(float, int);
double ldexp(double, int);
float frexpf(float, int*);
double frexp(double, int*);
void sincosf(float, float*, float*);
void sincos(double, double*, double*);
long lrintf(float);
long lrint(double);
#undef KILN_MATH_1
#undef KILN_MATH_2
}

// CUDA overloads the names of double functions for float.
#define KILN_OVERLOAD_1(name) \
    __forceinline__ float name(float x) { return name##f(x); }
#define KILN_OVERLOAD_2(name) \
    __forceinline__ float name(float x, float y) { return name##f(x, y); }
// clang-format off
KILN_OVERLOAD_1(exp) KILN_OVERLOAD_1(exp2) KILN_OVERLOAD_1(expm1) KILN_OVERLOAD_1(log) KILN_OVERLOAD_1(log2) KILN_OVERLOAD_1(log10)
KILN_OVERLOAD_1(log1p) KILN_OVERLOAD_1(sqrt) KILN_OVERLOAD_1(cbrt) KILN_OVERLOAD_1(sin) KILN_OVERLOAD_1(cos) KILN_OVERLOAD_1(tan)
KILN_OVERLOAD_1(asin) KILN_OVERLOAD_1(acos) KILN_OVERLOAD_1(atan) KILN_OVERLOAD_1(sinh) KILN_OVERLOAD_1(cosh) KILN_OVERLOAD_1(tanh)
KILN_OVERLOAD_1(asinh) KILN_OVERLOAD_1(acosh) KILN_OVERLOAD_1(atanh) KILN_OVERLOAD_1(erf) KILN_OVERLOAD_1(erfc) KILN_OVERLOAD_1(lgamma)
KILN_OVERLOAD_1(floor) KILN_OVERLOAD_1(ceil) KILN_OVERLOAD_1(trunc) KILN_OVERLOAD_1(rint) KILN_OVERLOAD_1(nearbyint) KILN_OVERLOAD_1(round)
KILN_OVERLOAD_1(fabs) KILN_OVERLOAD_2(pow) KILN_OVERLOAD_2(atan2) KILN_OVERLOAD_2(fmod) KILN_OVERLOAD_2(fmin) KILN_OVERLOAD_2(fmax)
KILN_OVERLOAD_2(copysign) KILN_OVERLOAD_2(hypot)
// clang-format on
#undef KILN_OVERLOAD_1
#undef KILN_OVERLOAD_2
__forceinline__ float fma(float a, float b, float c) { return fmaf(a, b, c); }
__forceinline__ float ldexp(float x, int e) { return ldexpf(x, e); }
__forceinline__ float abs(float x) { return fabsf(x); }
__forceinline__ double abs(double x) { return fabs(x); }
__forceinline__ i64 abs(i64 x) { return llabs(x); }

__forceinline__ float rsqrtf(float x) { return (float)(1.0 / sqrt((double)x)); }
__forceinline__ double rsqrt(double x) { return 1.0 / sqrt(x); }
__forceinline__ float rsqrt(float x) { return rsqrtf(x); }
__forceinline__ double normcdf(double x) { return 0.5 * erfc(-x * 0.70710678118654752440); }
__forceinline__ float normcdff(float x) { return (float)normcdf((double)x); }
__forceinline__ float normcdf(float x) { return normcdff(x); }
__forceinline__ double sinpi(double x) { return sin(fmod(x, 2.0) * 3.14159265358979323846); }
__forceinline__ double cospi(double x) { return cos(fmod(x, 2.0) * 3.14159265358979323846); }
__forceinline__ float sinpif(float x) { return (float)sinpi((double)x); }
__forceinline__ float cospif(float x) { return (float)cospi((double)x); }
__forceinline__ void sincospif(float x, float* s, float* c) {
    *s = sinpif(x);
    *c = cospif(x);
}

template <class V> __forceinline__ bool isnan(V x) { return __builtin_isnan(x); }
template <class V> __forceinline__ bool isinf(V x) { return __builtin_isinf(x); }
template <class V> __forceinline__ bool isfinite(V x) { return __builtin_isfinite(x); }
template <class V> __forceinline__ bool signbit(V x) { return __builtin_signbit(x); }

// As CUDA's: of two signs of one width the unsigned one decides, and of a number and NaN the number is returned.
#define KILN_MIN_MAX(R, A, B) \
    __forceinline__ R min(A a, B b) { return (R)a < (R)b ? (R)a : (R)b; } \
    __forceinline__ R max(A a, B b) { return (R)a > (R)b ? (R)a : (R)b; }
KILN_MIN_MAX(i32, i32, i32)
KILN_MIN_MAX(u32, u32, u32)
KILN_MIN_MAX(u32, i32, u32)
KILN_MIN_MAX(u32, u32, i32)
KILN_MIN_MAX(i64, i64, i64)
KILN_MIN_MAX(u64, u64, u64)
KILN_MIN_MAX(u64, i64, u64)
KILN_MIN_MAX(u64, u64, i64)
#undef KILN_MIN_MAX
__forceinline__ float min(float a, float b) { return fminf(a, b); }
__forceinline__ float max(float a, float b) { return fmaxf(a, b); }
__forceinline__ double min(double a, double b) { return fmin(a, b); }
__forceinline__ double max(double a, double b) { return fmax(a, b); }

__forceinline__ float __expf(float x) { return expf(x); }
__forceinline__ float __exp10f(float x) { return exp10f(x); }
__forceinline__ float __logf(float x) { return logf(x); }
__forceinline__ float __log2f(float x) { return log2f(x); }
__forceinline__ float __log10f(float x) { return log10f(x); }
__forceinline__ float __powf(float x, float y) { return powf(x, y); }
__forceinline__ float __sinf(float x) { return sinf(x); }
__forceinline__ float __cosf(float x) { return cosf(x); }
__forceinline__ float __tanf(float x) { return tanf(x); }
__forceinline__ void __sincosf(float x, float* s, float* c) { sincosf(x, s, c); }
__forceinline__ float __fdividef(float a, float b) { return a / b; }
__forceinline__ float __saturatef(float x) { return fminf(fmaxf(x, 0.0f), 1.0f); }
__forceinline__ float __fadd_rn(float a, float b) { return a + b; }
__forceinline__ float __fsub_rn(float a, float b) { return a - b; }
__forceinline__ float __fmul_rn(float a, float b) { return a * b; }
__forceinline__ float __fdiv_rn(float a, float b) { return a / b; }
__forceinline__ float __frcp_rn(float x) { return 1.0f / x; }
__forceinline__ float __fsqrt_rn(float x) { return sqrtf(x); }
__forceinline__ float __frsqrt_rn(float x) { return rsqrtf(x); }
__forceinline__ float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
__forceinline__ double __dadd_rn(double a, double b) { return a + b; }
__forceinline__ double __dsub_rn(double a, double b) { return a - b; }
__forceinline__ double __dmul_rn(double a, double b) { return a * b; }
__forceinline__ double __ddiv_rn(double a, double b) { return a / b; }
__forceinline__ double __dsqrt_rn(double x) { return sqrt(x); }
__forceinline__ double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
// Out of range these saturate, and NaN becomes 0, as on the GPU.
template <class R> __forceinline__ R kiln_to_integer(double x, double low, double high) {
    return x != x ? (R)0 : x <= low ? (R)low : x >= high ? (R) ~((R)low) : (R)x;
}
__forceinline__ int __float2int_rz(float x) { return kiln_to_integer<i32>(truncf(x), -2147483648.0, 2147483648.0); }
__forceinline__ int __float2int_rn(float x) { return kiln_to_integer<i32>(rintf(x), -2147483648.0, 2147483648.0); }
__forceinline__ int __float2int_rd(float x) { return kiln_to_integer<i32>(floorf(x), -2147483648.0, 2147483648.0); }
__forceinline__ int __float2int_ru(float x) { return kiln_to_integer<i32>(ceilf(x), -2147483648.0, 2147483648.0); }
__forceinline__ u32 __float2uint_rz(float x) { return kiln_to_integer<u32>(truncf(x), 0.0, 4294967296.0); }
__forceinline__ u32 __float2uint_rn(float x) { return kiln_to_integer<u32>(rintf(x), 0.0, 4294967296.0); }
__forceinline__ int __double2int_rz(double x) { return kiln_to_integer<i32>(trunc(x), -2147483648.0, 2147483648.0); }
__forceinline__ int __double2int_rn(double x) { return kiln_to_integer<i32>(rint(x), -2147483648.0, 2147483648.0); }
__forceinline__ i64 __double2ll_rz(double x) { return kiln_to_integer<i64>(trunc(x), -9223372036854775808.0, 9223372036854775808.0); }
__forceinline__ i64 __double2ll_rn(double x) { return kiln_to_integer<i64>(rint(x), -9223372036854775808.0, 9223372036854775808.0); }
__forceinline__ i64 __float2ll_rz(float x) { return __double2ll_rz((double)x); }
__forceinline__ i64 __float2ll_rn(float x) { return __double2ll_rn((double)x); }
__forceinline__ float __int2float_rn(int x) { return (float)x; }
__forceinline__ float __uint2float_rn(u32 x) { return (float)x; }
__forceinline__ double __int2double_rn(int x) { return (double)x; }
__forceinline__ float __double2float_rn(double x) { return (float)x; }

// ---- the functions of ptx.cuh ----

__forceinline__ u32 smem_addr(const void* p) { return kiln_emulate_shared_address(p); }
__forceinline__ u32 lane_id() { return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32; }
__forceinline__ u32 warp_id() { return threadIdx.x / 32; }
__forceinline__ bool elect_one() { return kiln_emulate_warp(KILN_ELECT, 0xffffffff, 0, 0, 32) != 0; }
__forceinline__ u64 global_timer() { return kiln_emulate_clock(); }
[[noreturn]] __forceinline__ void trap() { kiln_emulate_trap(); }

__forceinline__ float ex2_approx(float x) { return exp2f(x); }
__forceinline__ float lg2_approx(float x) { return log2f(x); }
__forceinline__ float rcp_approx(float x) { return 1.0f / x; }
__forceinline__ float tanh_approx(float x) { return tanhf(x); }
__forceinline__ float f16_to_f32(u16 x) {
    const u32 magnitude = (u32)(x & 0x7fff) << 13;
    // Shifted into f32's place the exponent is 112 too small; the product also normalises denormals.
    const u32 bits = magnitude >= 0x0f800000 ? magnitude + 0x70000000 : __float_as_uint(__uint_as_float(magnitude) * 0x1p112f);
    return __uint_as_float(bits | (u32)(x & 0x8000) << 16);
}
__forceinline__ u16 f32_to_f16(float x) {
    const u32 sign = __float_as_uint(x) >> 16 & 0x8000, magnitude = __float_as_uint(x) & 0x7fffffff;
    if (magnitude > 0x7f800000) {
        return 0x7fff;
    }
    if (magnitude >= 0x477ff000) {
        return (u16)(sign | 0x7c00);
    }
    if (magnitude < 0x38800000) {
        // The sum's last bit weighs as much as f16's last denormal bit, so that the addition rounds.
        return (u16)(sign | (__float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000));
    }
    return (u16)(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}
__forceinline__ float bf16_to_f32(u16 x) { return __uint_as_float((u32)x << 16); }
__forceinline__ u16 f32_to_bf16(float x) {
    const u32 bits = __float_as_uint(x);
    return x != x ? (u16)0x7fff : (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
__forceinline__ u32 pack_f16(float low, float high) { return (u32)f32_to_f16(low) | (u32)f32_to_f16(high) << 16; }
__forceinline__ u32 pack_bf16(float low, float high) { return (u32)f32_to_bf16(low) | (u32)f32_to_bf16(high) << 16; }
__forceinline__ u32 f32_to_tf32(float x) { return x != x ? 0x7fffffff : (__float_as_uint(x) + 0x1000) & ~0x1fffu; }

__forceinline__ void bar_sync(u32 id, u32 threads) { kiln_emulate_barrier(id, threads, KILN_SYNC, 0); }
__forceinline__ void bar_arrive(u32 id, u32 threads) { kiln_emulate_barrier(id, threads, KILN_ARRIVE, 0); }

__forceinline__ void cp_async16(u32 smem, const void* gmem, bool valid) { kiln_emulate_cp_async(smem, gmem, 16, valid ? 16 : 0); }
__forceinline__ void cp_async16_partial(u32 smem, const void* gmem, u32 bytes) { kiln_emulate_cp_async(smem, gmem, 16, bytes); }
__forceinline__ void cp_async8(u32 smem, const void* gmem, bool valid) { kiln_emulate_cp_async(smem, gmem, 8, valid ? 8 : 0); }
__forceinline__ void cp_async4(u32 smem, const void* gmem, bool valid) { kiln_emulate_cp_async(smem, gmem, 4, valid ? 4 : 0); }
__forceinline__ void cp_async_commit() { kiln_emulate_cp_async_commit(); }
template <int N> __forceinline__ void cp_async_wait() { kiln_emulate_cp_async_wait(N); }

__forceinline__ void kiln_ldmatrix(u32* d, u32 smem, u32 count, u32 trans) {
    KilnMatrix m = {count, trans, 0, smem, d};
    kiln_emulate_warp(KILN_LDMATRIX, 0xffffffff, (u64)&m, count << 1 | trans, 32);
}
__forceinline__ void ldmatrix_x4(u32 (&d)[4], u32 smem) { kiln_ldmatrix(d, smem, 4, 0); }
__forceinline__ void ldmatrix_x4_trans(u32 (&d)[4], u32 smem) { kiln_ldmatrix(d, smem, 4, 1); }
__forceinline__ void ldmatrix_x2(u32 (&d)[2], u32 smem) { kiln_ldmatrix(d, smem, 2, 0); }
__forceinline__ void ldmatrix_x2_trans(u32 (&d)[2], u32 smem) { kiln_ldmatrix(d, smem, 2, 1); }
__forceinline__ void ldmatrix_x1(u32& d, u32 smem) { kiln_ldmatrix(&d, smem, 1, 0); }
__forceinline__ void ldmatrix_x1_trans(u32& d, u32 smem) { kiln_ldmatrix(&d, smem, 1, 1); }
__forceinline__ void kiln_stmatrix(u32 smem, const u32* d, u32 count, u32 trans) {
    KilnMatrix m = {count, trans, 0, smem, (u32*)d};
    kiln_emulate_warp(KILN_STMATRIX, 0xffffffff, (u64)&m, count << 1 | trans, 32);
}
__forceinline__ void stmatrix_x4(u32 smem, const u32 (&d)[4]) { kiln_stmatrix(smem, d, 4, 0); }
__forceinline__ void stmatrix_x4_trans(u32 smem, const u32 (&d)[4]) { kiln_stmatrix(smem, d, 4, 1); }
__forceinline__ void stmatrix_x2(u32 smem, const u32 (&d)[2]) { kiln_stmatrix(smem, d, 2, 0); }
__forceinline__ void stmatrix_x2_trans(u32 smem, const u32 (&d)[2]) { kiln_stmatrix(smem, d, 2, 1); }

__forceinline__ void kiln_mma(float* d, const u32* a, const u32* b, u32 number) {
    KilnMatrix m = {0, 0, number, 0, nullptr, d, a, b};
    kiln_emulate_warp(KILN_MMA, 0xffffffff, (u64)&m, number, 32);
}
__forceinline__ void mma_f16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) { kiln_mma(d, a, b, KILN_F16); }
__forceinline__ void mma_bf16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) { kiln_mma(d, a, b, KILN_BF16); }
__forceinline__ void mma_tf32(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) { kiln_mma(d, a, b, KILN_TF32); }

__forceinline__ void mbarrier_init(u32 bar, u32 arrivals) { kiln_emulate_mbarrier_init(bar, arrivals); }
__forceinline__ void fence_mbarrier_init() {}
__forceinline__ void mbarrier_expect_tx(u32 bar, u32 bytes) { kiln_emulate_mbarrier_arrive(bar, -1, bytes); }
__forceinline__ void mbarrier_arrive(u32 bar) { kiln_emulate_mbarrier_arrive(bar, -1, 0); }
__forceinline__ void mbarrier_arrive_remote(u32 bar, u32 rank) { kiln_emulate_mbarrier_arrive(bar, (i32)rank, 0); }
__forceinline__ bool mbarrier_try_wait(u32 bar, u32 parity) { return kiln_emulate_mbarrier_try_wait(bar, parity) != 0; }
__forceinline__ void mbarrier_wait(u32 bar, u32 parity) {
    while (!mbarrier_try_wait(bar, parity)) {
    }
}
__forceinline__ void fence_proxy_async() { kiln_emulate_fence_proxy_async(); }

__forceinline__ void tma_prefetch(const TensorMap*) {}
template <class... X> __forceinline__ void kiln_tma_load(u32 smem, const TensorMap* map, u32 bar, u32 blocks, X... x) {
    const i32 at[] = {x...};
    kiln_emulate_tma_load(smem, map, bar, sizeof...(X), at, blocks);
}
template <class... X> __forceinline__ void kiln_tma_store(const TensorMap* map, u32 smem, X... x) {
    const i32 at[] = {x...};
    kiln_emulate_tma_store(map, smem, sizeof...(X), at);
}
__forceinline__ void tma_load_2d(u32 smem, const TensorMap* map, u32 bar, i32 x0, i32 x1) { kiln_tma_load(smem, map, bar, 0, x0, x1); }
__forceinline__ void tma_load_3d(u32 smem, const TensorMap* map, u32 bar, i32 x0, i32 x1, i32 x2) { kiln_tma_load(smem, map, bar, 0, x0, x1, x2); }
__forceinline__ void tma_load_4d(u32 smem, const TensorMap* map, u32 bar, i32 x0, i32 x1, i32 x2, i32 x3) {
    kiln_tma_load(smem, map, bar, 0, x0, x1, x2, x3);
}
__forceinline__ void tma_load_5d(u32 smem, const TensorMap* map, u32 bar, i32 x0, i32 x1, i32 x2, i32 x3, i32 x4) {
    kiln_tma_load(smem, map, bar, 0, x0, x1, x2, x3, x4);
}
__forceinline__ void tma_load_2d_multicast(u32 smem, const TensorMap* map, u32 bar, i32 x0, i32 x1, u16 blocks) {
    kiln_tma_load(smem, map, bar, blocks, x0, x1);
}
__forceinline__ void tma_load_3d_multicast(u32 smem, const TensorMap* map, u32 bar, i32 x0, i32 x1, i32 x2, u16 blocks) {
    kiln_tma_load(smem, map, bar, blocks, x0, x1, x2);
}
__forceinline__ void tma_load_4d_multicast(u32 smem, const TensorMap* map, u32 bar, i32 x0, i32 x1, i32 x2, i32 x3, u16 blocks) {
    kiln_tma_load(smem, map, bar, blocks, x0, x1, x2, x3);
}
__forceinline__ void tma_store_2d(const TensorMap* map, u32 smem, i32 x0, i32 x1) { kiln_tma_store(map, smem, x0, x1); }
__forceinline__ void tma_store_3d(const TensorMap* map, u32 smem, i32 x0, i32 x1, i32 x2) { kiln_tma_store(map, smem, x0, x1, x2); }
__forceinline__ void tma_store_4d(const TensorMap* map, u32 smem, i32 x0, i32 x1, i32 x2, i32 x3) { kiln_tma_store(map, smem, x0, x1, x2, x3); }
__forceinline__ void tma_store_commit() { kiln_emulate_bulk_commit(); }
template <int N> __forceinline__ void tma_store_wait_read() { kiln_emulate_bulk_wait(N, 1); }
template <int N> __forceinline__ void tma_store_wait() { kiln_emulate_bulk_wait(N, 0); }
__forceinline__ void bulk_load(u32 smem, const void* gmem, u32 bytes, u32 bar) { kiln_emulate_bulk_load(smem, gmem, bytes, bar); }
__forceinline__ void bulk_store(void* gmem, u32 smem, u32 bytes) { kiln_emulate_bulk_store(gmem, smem, bytes); }

__forceinline__ u32 cluster_rank() { return kiln_emulate_cluster_rank(); }
__forceinline__ void cluster_arrive() { kiln_emulate_cluster_arrive(); }
__forceinline__ void cluster_wait() { kiln_emulate_cluster_wait(); }
__forceinline__ void cluster_sync() {
    cluster_arrive();
    cluster_wait();
}
__forceinline__ u32 mapa(u32 smem, u32 rank) { return kiln_emulate_mapa(smem, rank); }
__forceinline__ float load_cluster(u32 remote) { return __uint_as_float(kiln_emulate_cluster_load(remote)); }
__forceinline__ void load_cluster4(float (&x)[4], u32 remote) {
    for (u32 i = 0; i < 4; ++i) {
        x[i] = load_cluster(remote + i * 4);
    }
}
__forceinline__ void store_cluster(u32 remote, float x) { kiln_emulate_cluster_store(remote, __float_as_uint(x)); }

template <int N> __forceinline__ void setmaxnreg_inc() { kiln_emulate_warp(KILN_SETMAXNREG, 0xffffffff, 0, N, 32); }
template <int N> __forceinline__ void setmaxnreg_dec() { kiln_emulate_warp(KILN_SETMAXNREG, 0xffffffff, 0, N, 32); }
__forceinline__ void wgmma_fence() { kiln_emulate_warp(KILN_WGMMA_FENCE, 0xffffffff, 0, 0, 32); }
__forceinline__ void wgmma_commit() { kiln_emulate_warp(KILN_WGMMA_COMMIT, 0xffffffff, 0, 0, 32); }
template <int N> __forceinline__ void wgmma_wait() { kiln_emulate_warp(KILN_WGMMA_WAIT, 0xffffffff, 0, N, 32); }
template <class R, int N> __forceinline__ void hold_registers(R (&)[N]) {
    static_assert(sizeof(R) == 4, "registers have four bytes");
}
__forceinline__ void kiln_wgmma(u32 number, u32 columns, float* d, const u32* a, u64 a_descriptor, u64 b, u32 scale_d, u32 a_mn, u32 b_mn) {
    KilnMatrix m = {0, 0, number, 0, nullptr, d, a, nullptr, columns, scale_d, a_mn, b_mn, a_descriptor, b};
    kiln_emulate_warp(KILN_WGMMA, 0xffffffff, (u64)&m, columns, 32);
}
template <int N, int MnA, int MnB> __forceinline__ void wgmma_bf16(float (&d)[N / 2], u64 a, u64 b, u32 scale_d) {
    kiln_wgmma(KILN_BF16, N, d, nullptr, a, b, scale_d, MnA, MnB);
}
template <int N, int MnA, int MnB> __forceinline__ void wgmma_f16(float (&d)[N / 2], u64 a, u64 b, u32 scale_d) {
    kiln_wgmma(KILN_F16, N, d, nullptr, a, b, scale_d, MnA, MnB);
}
template <int N, int MnB> __forceinline__ void wgmma_bf16(float (&d)[N / 2], const u32 (&a)[4], u64 b, u32 scale_d) {
    kiln_wgmma(KILN_BF16, N, d, a, 0, b, scale_d, 0, MnB);
}
template <int N, int MnB> __forceinline__ void wgmma_f16(float (&d)[N / 2], const u32 (&a)[4], u64 b, u32 scale_d) {
    kiln_wgmma(KILN_F16, N, d, a, 0, b, scale_d, 0, MnB);
}
