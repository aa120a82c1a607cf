// The tensor cores: ldmatrix, stmatrix, mma and wgmma, each for a whole warp at once, once its 32 lanes are there. The figures of fragments are
// those of the PTX manual. Products are exact and are summed in f32 in the order of k.

#include "emulate_state.hpp"

#include "emulate_check.hpp"

#include <cmath>

namespace emulate {

static float as_float(u32 bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static float widen(u16 bits, u32 number) {
    if (number == KILN_BF16) {
        return as_float((u32)bits << 16);
    }
    const u32 magnitude = (u32)(bits & 0x7fff) << 13;
    const float x = magnitude >= 0x0f800000 ? as_float(magnitude + 0x70000000) : as_float(magnitude) * 0x1p112f;
    return bits >> 15 ? -x : x;
}

static const KilnMatrix& brought(const Warp& warp, u32 lane) {
    return *(const KilnMatrix*)warp.lanes[lane]->value;
}

// ---- 8x8 matrices of 16 bits ----

static void move_matrices(Warp& warp, bool load) {
    const KilnMatrix& first = brought(warp, 0);
    for (u32 i = 0; i < first.count; ++i) {
        u8* rows[8];
        for (u32 r = 0; r < 8; ++r) {
            Thread& t = *warp.lanes[8 * i + r];
            const u32 smem = brought(warp, t.lane).smem;
            if (smem % 16 != 0) {
                fail(format("%s gives ldmatrix or stmatrix a row at 0x%x, which is no multiple of 16", name_of(&t).c_str(), smem) + line_of(t.where));
            }
            rows[r] = resolve(smem, 16, load ? "ldmatrix" : "stmatrix");
            if (machine.checked) {
                check_shared(t, smem, 16, load ? Access::Read : Access::Write, t.where);
            }
        }
        for (u32 l = 0; l < 32; ++l) {
            u32& d = brought(warp, l).registers[i];
            for (u32 half = 0; half < 2; ++half) {
                const u32 row = first.trans ? 2 * (l % 4) + half : l / 4, column = first.trans ? l / 4 : 2 * (l % 4) + half;
                u16* element = (u16*)rows[row] + column;
                if (load) {
                    d = half == 0 ? *element : d | (u32)*element << 16;
                } else {
                    *element = (u16)(d >> 16 * half);
                }
            }
        }
    }
}

// ---- mma ----

// The row of A or D that register `i` of a lane holds, and the first of the two columns of a D register.
static u32 row_of(u32 lane, u32 i) {
    return lane / 4 + 8 * (i & 1);
}

// A is 16 x 16 in registers, as `mma` and `wgmma` take it.
static void spread_a(float (&a)[16][16], u32 lane, const u32* registers, u32 number) {
    for (u32 i = 0; i < 4; ++i) {
        for (u32 half = 0; half < 2; ++half) {
            a[row_of(lane, i)][2 * (lane % 4) + half + 8 * (i >> 1)] = widen((u16)(registers[i] >> 16 * half), number);
        }
    }
}

static void multiply(Warp& warp) {
    const u32 number = brought(warp, 0).number, depth = number == KILN_TF32 ? 8 : 16;
    float a[16][16], b[16][8], d[16][8];
    for (u32 l = 0; l < 32; ++l) {
        const KilnMatrix& m = brought(warp, l);
        if (number == KILN_TF32) {
            for (u32 i = 0; i < 4; ++i) {
                a[row_of(l, i)][l % 4 + 4 * (i >> 1)] = as_float(m.a[i] & ~0x1fffu);
            }
            for (u32 i = 0; i < 2; ++i) {
                b[l % 4 + 4 * i][l / 4] = as_float(m.b[i] & ~0x1fffu);
            }
        } else {
            spread_a(a, l, m.a, number);
            for (u32 i = 0; i < 2; ++i) {
                for (u32 half = 0; half < 2; ++half) {
                    b[2 * (l % 4) + half + 8 * i][l / 4] = widen((u16)(m.b[i] >> 16 * half), number);
                }
            }
        }
        for (u32 i = 0; i < 4; ++i) {
            d[l / 4 + 8 * (i >> 1)][2 * (l % 4) + (i & 1)] = m.d[i];
        }
    }
    for (u32 row = 0; row < 16; ++row) {
        for (u32 k = 0; k < depth; ++k) {
            for (u32 column = 0; column < 8; ++column) {
                d[row][column] += a[row][k] * b[k][column];
            }
        }
    }
    for (u32 l = 0; l < 32; ++l) {
        for (u32 i = 0; i < 4; ++i) {
            brought(warp, l).d[i] = d[l / 4 + 8 * (i >> 1)][2 * (l % 4) + (i & 1)];
        }
    }
}

// ---- wgmma ----

u32 swizzled(u32 smem, u32 swizzle);

// One factor in shared memory: `count` rows (of A, or columns of B) by 16 of k. Calls `piece(shared address, row, k)` for each 8 elements that lie together,
// which are neighbours in k, or in rows if these are contiguous.
template <class F> static void for_factor(u64 descriptor, u32 first_row, u32 count, bool rows_contiguous, F piece) {
    static const u32 widths[] = {0, 128, 64, 32};
    const u32 start = (u32)(descriptor & 0x3fff) << 4, leading = (u32)(descriptor >> 16 & 0x3fff) << 4, stride = (u32)(descriptor >> 32 & 0x3fff) << 4;
    const u32 width = widths[descriptor >> 62];
    for (u32 i = 0; i < count / 8 * 2 * 8; ++i) {
        u32 row, k, offset;
        if (rows_contiguous) {
            // Pieces of eight rows at one k. An atom is `width` bytes of rows by 8 of k; without swizzle 16 bytes of rows.
            row = first_row + i / 16 * 8, k = i % 16;
            if (width == 0) {
                offset = row / 8 * stride + k / 8 * leading + k % 8 * 16;
            } else {
                const u32 rows = width / 2;
                offset = row / rows * leading + k / 8 * stride + k % 8 * width + row % rows * 2;
            }
        } else {
            // Pieces of eight of k in one row.
            row = first_row + i / 2, k = i % 2 * 8;
            offset = width == 0 ? row / 8 * stride + k / 8 * leading + row % 8 * 16 : row / 8 * stride + row % 8 * width + k * 2;
        }
        piece(swizzled(start + offset, width), row - first_row, k);
    }
}

// Reads a factor into `to`, whose rows lie `row_step` apart and whose k `k_step`.
static void read_factor(float* to, u32 row_step, u32 k_step, u64 descriptor, u32 first_row, u32 count, bool rows_contiguous, u32 number) {
    for_factor(descriptor, first_row, count, rows_contiguous, [&](u32 smem, u32 row, u32 k) {
        u16 elements[8];
        memcpy(elements, resolve(smem, 16, "a wgmma's descriptor"), 16);
        for (u32 j = 0; j < 8; ++j) {
            to[rows_contiguous ? (row + j) * row_step + k * k_step : row * row_step + (k + j) * k_step] = widen(elements[j], number);
        }
    });
}

static void check_factors(Warp& warp, const Wgmma& op) {
    Thread& t = *warp.lanes[0];
    const KilnMatrix& m = op.matrix;
    const auto piece = [&](u32 smem, u32, u32) { check_async_read(t, smem, 16, op.where); };
    if (m.a == nullptr) {
        for_factor(m.a_descriptor, warp.id % 4 * 16, 16, m.a_mn, piece);
    }
    for_factor(m.b_descriptor, 0, m.columns, m.b_mn, piece);
}

static void execute(Warp& warp, Wgmma& op) {
    const KilnMatrix& m = op.matrix;
    static float a[16][16], b[16][256];
    if (m.a != nullptr) {
        for (u32 l = 0; l < 32; ++l) {
            spread_a(a, l, op.a[l], m.number);
        }
    } else {
        read_factor(a[0], 16, 1, m.a_descriptor, warp.id % 4 * 16, 16, m.a_mn, m.number);
    }
    read_factor(b[0], 1, 256, m.b_descriptor, 0, m.columns, m.b_mn, m.number);
    for (u32 row = 0; row < 16; ++row) {
        float* d = &op.accumulator->values[row * m.columns];
        for (u32 column = 0; !m.scale_d && column < m.columns; ++column) {
            d[column] = 0.0f;
        }
        for (u32 k = 0; k < 16; ++k) {
            for (u32 column = 0; column < m.columns; ++column) {
                d[column] += a[row][k] * b[k][column];
            }
        }
    }
    op.executed = true;
}

// Where the registers of a lane lie in the 16 rows of `columns` that a warp accumulates: calls `each(register, element)`.
template <class F> static void for_registers(u32 lane, u32 columns, F each) {
    for (u32 i = 0; i < columns / 2; ++i) {
        each(i, (lane / 4 + 8 * (i >> 1 & 1)) * columns + i / 4 * 8 + 2 * (lane % 4) + (i & 1));
    }
}

static void start_wgmma(Warp& warp) {
    Wgmma op = {};
    op.matrix = brought(warp, 0);
    op.group = warp.wgmma_group;
    op.where = warp.lanes[0]->where;
    for (u32 l = 0; l < 32; ++l) {
        const KilnMatrix& m = brought(warp, l);
        if (m.a_descriptor != op.matrix.a_descriptor || m.b_descriptor != op.matrix.b_descriptor || m.scale_d != op.matrix.scale_d) {
            fail("the lanes of a warp give wgmma different descriptors or scales" + line_of(op.where));
        }
        if (m.a != nullptr) {
            memcpy(op.a[l], m.a, sizeof op.a[l]);
        }
    }
    const u32 columns = op.matrix.columns;
    for (Accumulator* known : warp.accumulators) {
        if (known->d[0] == op.matrix.d) {
            op.accumulator = known;
        }
    }
    if (op.accumulator == nullptr) {
        op.accumulator = new Accumulator{{}, columns, 0, std::vector<float>(16 * columns)};
        warp.accumulators.push_back(op.accumulator);
        for (u32 l = 0; l < 32; ++l) {
            float* d = brought(warp, l).d;
            op.accumulator->d[l] = d;
            for_registers(l, columns, [&](u32 i, u32 element) { op.accumulator->values[element] = d[i]; });
            // Until the wait the registers hold nothing that may be used.
            memset(d, 0xff, columns / 2 * sizeof(float));
        }
    }
    ++op.accumulator->under_way;
    if (machine.checked) {
        check_factors(warp, op);
    }
    warp.wgmmas.push_back(op);
}

static void wait_wgmma(Warp& warp, u32 left) {
    size_t kept = 0;
    for (Wgmma& op : warp.wgmmas) {
        if (op.group + left >= warp.wgmma_group) {
            warp.wgmmas[kept++] = op;
            continue;
        }
        if (machine.checked) {
            check_factors(warp, op);
        }
        if (!op.executed) {
            execute(warp, op);
        }
        Accumulator* done = op.accumulator;
        if (--done->under_way > 0) {
            continue;
        }
        for (u32 l = 0; l < 32; ++l) {
            for_registers(l, done->columns, [&](u32 i, u32 element) { done->d[l][i] = done->values[element]; });
        }
        warp.accumulators.erase(std::find(warp.accumulators.begin(), warp.accumulators.end(), done));
        delete done;
    }
    warp.wgmmas.resize(kept);
}

void operate_on_matrices(u32 operation, Warp& warp) {
    switch (operation) {
    case KILN_LDMATRIX:
    case KILN_STMATRIX:
        move_matrices(warp, operation == KILN_LDMATRIX);
        break;
    case KILN_MMA:
        multiply(warp);
        break;
    case KILN_WGMMA:
        start_wgmma(warp);
        break;
    case KILN_WGMMA_COMMIT:
        ++warp.wgmma_group;
        break;
    case KILN_WGMMA_WAIT:
        wait_wgmma(warp, warp.lanes[0]->argument);
        break;
    default:
        // Fences of registers and their reallocation say nothing about values.
        break;
    }
}

} // namespace emulate
