// What every level of attention is told of a problem. T is the type of queries, keys, values, results and gradients.

#include "philox.cuh"

/// As the CPU's `Attention`: all matrices of queries, keys and values have these extents.
struct Extents {
    i64 heads;       // of queries
    i64 group;       // query heads that share a key head
    i64 queries;
    i64 keys;
    i64 width;       // values of a query or key
    i64 value_width; // values of a value
    double scale;    // factor of the scores
    Stream dropout;  // of the weights [heads][queries][keys]
    double kept;     // what it multiplies those by that it does not zero
    u32 threshold;   // below it, the upper 24 bits of a weight's word say zero
    i32 causal;      // query i looks at the keys 0 to i only
    i32 mask;        // 0: none; 1: bytes, not 0 where a query may look; 2: elements that are added to the scores
};

__device__ __forceinline__ float infinity() { return __uint_as_float(0x7f800000u); }

/// Matrices of the same extents: where each begins, and the distances of rows and columns, in elements.
struct Matrices {
    Strided begins;
    i64 row_stride, col_stride;
};

/// The mask of one query head.
struct Mask {
    const void* data;
    i64 offset, row_stride, col_stride;
    i32 kind;

    __device__ __forceinline__ Mask(const void* data, const Matrices& layout, const Extents& x, i64 head)
        : data(data), offset(0), row_stride(0), col_stride(0), kind(x.mask) {
        if (kind != 0) {
            offset = offset_of(layout.begins, head);
            row_stride = layout.row_stride;
            col_stride = layout.col_stride;
        }
    }
    /// The mask's element, as a byte or to be added.
    __device__ __forceinline__ bool is_open(i64 query, i64 key) const {
        return ((const u8*)data)[offset + query * row_stride + key * col_stride] != 0;
    }
    __device__ __forceinline__ Compute<T> bias(i64 query, i64 key) const {
        return load((const T*)data + offset + query * row_stride + key * col_stride);
    }
    /// The score with the mask on it. A shut key is -infinity whatever its score was.
    __device__ __forceinline__ Compute<T> apply(Compute<T> score, i64 query, i64 key) const {
        const Compute<T> shut = -(Compute<T>)infinity();
        if (kind == 0) {
            return score;
        }
        if (kind == 1) {
            return is_open(query, key) ? score : shut;
        }
        const Compute<T> added = bias(query, key);
        return added == shut ? shut : score + added;
    }
};

/// Dropout of the weights of one query head.
struct Dropper {
    WordReader reader;
    i64 first, keys;
    Compute<T> kept;
    u32 threshold;

    __device__ __forceinline__ Dropper(const Extents& x, i64 head)
        : reader(x.dropout), first(head * x.queries), keys(x.keys), kept((Compute<T>)x.kept), threshold(x.threshold) {}
    __device__ __forceinline__ bool keeps(i64 query, i64 key) { return reader.word((first + query) * keys + key) >> 8 >= threshold; }
    /// What the weight, or its gradient, is multiplied by.
    __device__ __forceinline__ Compute<T> factor(i64 query, i64 key) { return keeps(query, key) ? kept : Compute<T>(0); }
};
