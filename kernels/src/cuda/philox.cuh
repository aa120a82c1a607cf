// Philox4x32-10, and where a stream's words lie: see cpu/random.rs.
#pragma once
#include "kiln.cuh"

struct Stream {
    u64 seed;
    u64 offset;
};

struct Words {
    u32 w[4];
};

// Block `number` of the stream's part that begins at its offset.
__device__ __forceinline__ Words philox(Stream stream, i64 number) {
    const u64 group = stream.offset + (u64)(number >> 4);
    u32 a = (u32)(group << 4) | (u32)(number & 15), b = (u32)(group >> 28), c = (u32)(group >> 60), d = 0;
    u32 key0 = (u32)stream.seed, key1 = (u32)(stream.seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const u64 first = (u64)a * 0xD2511F53u, second = (u64)c * 0xCD9E8D57u;
        a = (u32)(second >> 32) ^ b ^ key0;
        b = (u32)second;
        c = (u32)(first >> 32) ^ d ^ key1;
        d = (u32)first;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return {{a, b, c, d}};
}

/// Finds words by their place in the stream; what lies in the last block comes from there.
struct WordReader {
    Stream stream;
    i64 number;
    Words words;

    __device__ __forceinline__ explicit WordReader(Stream stream) : stream(stream), number(-1) {}
    __device__ __forceinline__ u32 word(i64 i) {
        const i64 wanted = i / 64 * 16 + i % 16;
        if (wanted != number) {
            number = wanted;
            words = philox(stream, wanted);
        }
        const int w = (int)(i / 16 % 4);
        return w < 2 ? (w == 0 ? words.w[0] : words.w[1]) : (w == 2 ? words.w[2] : words.w[3]);
    }
};
