// Sparse matrices along the three axes of an image (`AxisMap` on the host), as pooling and resampling read them.
#pragma once

// Where the rows of an axis lie: `starts` and `indices` among the whole numbers, `weights` and `divisors` among the factors.
struct AxisTable {
    i32 inputs, outputs;
    i32 starts, indices, weights, divisors;
};

struct AxisTables {
    AxisTable axis[3];
};

// The taps of row `o` of an axis.
struct Taps {
    i32 begin, end;
};
__device__ __forceinline__ Taps taps_of(const AxisTable& axis, const i32* numbers, i32 o) {
    return Taps{numbers[axis.starts + o], numbers[axis.starts + o + 1]};
}

// Splits the number of an element, counted over images, rows of three axes, and `lines` lines of channels.
struct Place {
    i64 image;
    i32 d, h, w, line;
};
__device__ __forceinline__ Place place_of(i64 i, i32 depth, i32 height, i32 width, i32 lines) {
    Place place;
    // Most counts are small enough for divisions that the GPU is good at.
    if ((u64)i <= 0xffffffff) {
        u32 at = (u32)i;
        place.line = at % (u32)lines;
        at /= (u32)lines;
        place.w = at % (u32)width;
        at /= (u32)width;
        place.h = at % (u32)height;
        at /= (u32)height;
        place.d = at % (u32)depth;
        place.image = at / (u32)depth;
    } else {
        place.line = (i32)(i % lines);
        i /= lines;
        place.w = (i32)(i % width);
        i /= width;
        place.h = (i32)(i % height);
        i /= height;
        place.d = (i32)(i % depth);
        place.image = i / depth;
    }
    return place;
}
