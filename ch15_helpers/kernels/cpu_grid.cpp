// Products with a weight whose numbers lie on a grid: in each run of BLOCK inputs of an output,
// number = step * scale + offset with a whole step. That is what a quantised checkpoint (ggml's
// Q4_0, Q4_1, Q8_0) holds, so the float32 weight is kept without loss in 0.75 or 1.25 bytes.
//
// Steps of at most 8 bits are exact as bfloat16, and a float is the exact sum of three of them. So
// the processor's tiles (AMX) multiply steps and parts without error and sum in float32; scale and
// offset follow for each block. A row's result depends neither on the other rows nor on the number
// of threads.
//
//   y[r][o] = sum over blocks of scale[o] * (sum of step[o][i] * x[r][i])
//                              + offset[o] * (sum of x[r][i])
#include <cmath>
#include <initializer_list>
#include <type_traits>
#include <vector>

#include "cpu_threads.h"
#include "cpu_tiles.h"

#ifdef CH15_TILES
#define INLINED __attribute__((always_inline))

namespace {

// A float is the sum of so many bfloat16 numbers.
constexpr long PARTS = 3;
// Bytes of x that stay in a core's cache while the weight goes by.
constexpr long CACHE = 1 << 20;

// Steps, then scales and offsets of one tile.
constexpr long step_bytes(long bits) { return TILE * bits / 8; }
constexpr long tile_bytes(long bits) { return step_bytes(bits) + 2 * PANEL * sizeof(float); }

template <long N>
using Number = std::integral_constant<long, N>;

struct Grid {
    float scale, offset;
    int step[BLOCK];
};

// Whether each number is `lowest` (to be step `first`) plus whole steps of `scale`, exactly.
bool on_grid(const float* w, float lowest, float scale, long first, long last, Grid& grid) {
    const float offset = lowest - first * scale;
    for (long i = 0; i < BLOCK; ++i) {
        const float step = std::nearbyint((w[i] - offset) / scale);
        if (!(step >= first && step <= last) || step * scale + offset != w[i]) return false;
        grid.step[i] = int(step);
    }
    grid.scale = scale, grid.offset = offset;
    return true;
}

// The grid of a block, if it has one of `bits` bits. The scale is a half, as ggml stores it.
bool find_grid(const float* w, long bits, Grid& grid) {
    float low = w[0], high = w[0];
    for (long i = 1; i < BLOCK; ++i)
        low = w[i] < low ? w[i] : low, high = w[i] > high ? w[i] : high;
    if (low == high) return on_grid(w, low, 1.0f, 0, 0, grid);
    const auto half = [](float value) { return float(_Float16(value)); };
    if (bits == 8) {
        const float scale = half((-low > high ? -low : high) / 127);
        return scale > 0 && on_grid(w, -127 * scale, scale, -127, 127, grid) && grid.offset == 0;
    }
    for (long steps = 15; steps > 0; --steps) {
        const float scale = half((high - low) / steps);
        if (scale > 0 && on_grid(w, low, scale, -8, 7, grid)) return true;
    }
    return false;
}

// The 4-bit steps of inputs 8g .. 8g + 7 are the digits of 32 words, as pairs of inputs.
template <long BITS>
void put_step(uint8_t* tile, long input, long output, int step) {
    const long pair = input / 2, word = 2 * output + input % 2;
    if constexpr (BITS == 8) {
        tile[pair * 32 + word] = uint8_t(step);
    } else {
        const long bit = pair % 4 * 4;
        tile[pair / 4 * 64 + 2 * word + bit / 8] |= uint8_t((step + 8) << bit % 8);
    }
}

// [inputs / 2][outputs][2] as tdpbf16ps wants it.
template <long BITS>
INLINE void widen_steps(const uint8_t* tile, uint16_t* to) {
    if constexpr (BITS == 8) {
        for (long row = 0; row < 16; ++row) {
            const __m128i* from = (const __m128i*)(tile + row * 32);
            const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from)));
            const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from + 1)));
            _mm512_storeu_si512(to + row * 32, (__m512i)_mm512_cvtne2ps_pbh(high, low));
        }
    } else {
        // -8 .. 7, twice: the fifth bit of an index is another step's.
        alignas(64) static constexpr uint16_t VALUES[32] = {
            0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000,
            0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040,
            0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};
        const __m512i values = _mm512_load_si512(VALUES);
        for (long group = 0; group < 4; ++group) {
            const __m512i words = _mm512_loadu_si512(tile + group * 64);
            for (int row = 0; row < 4; ++row)
                _mm512_storeu_si512(
                    to + (group * 4 + row) * 32,
                    _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4 * row), values));
        }
    }
}

// The next address of a cache line.
INLINE uint16_t* aligned(uint16_t* at) { return at + (64 - uintptr_t(at) % 64) % 64 / 2; }

// The rows of x in parts [row tiles][blocks][PARTS][PANEL][BLOCK] and their sums over a block.
struct Parts {
    std::vector<uint16_t> memory;
    std::vector<float> sum_memory;
    uint16_t* x;
    float* sums;

    void reserve(long tiles) {
        if (long(sum_memory.size()) < tiles * PANEL) {
            memory.resize(tiles * PARTS * TILE + 32);
            sum_memory.resize(tiles * PANEL);
        }
        x = aligned(memory.data());
        sums = sum_memory.data();
    }
};

// One block of one row: upper, middle and lower eight bits of each number.
INLINE void split(const float* from, uint16_t* to, float* sum) {
    __m512 number[2] = {_mm512_loadu_ps(from), _mm512_loadu_ps(from + 16)};
    *sum = _mm512_reduce_add_ps(_mm512_add_ps(number[0], number[1]));
    for (long part = 0; part < PARTS; ++part)
        for (long half = 0; half < 2; ++half) {
            const __m512i bits = _mm512_castps_si512(number[half]);
            _mm256_storeu_si256((__m256i*)(to + part * TILE + half * 16),
                                _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
            const __m512i upper = _mm512_and_si512(bits, _mm512_set1_epi32(0xffff0000));
            number[half] = _mm512_sub_ps(number[half], _mm512_castsi512_ps(upper));
        }
}

// R rows with one panel. Where it is FIRST to need the panel, it widens the steps into `wide`, one
// block ahead. A block multiplies while the one before it is stored and the one before that added.
template <long R, long BITS, bool FIRST>
void rows_by_panel(const uint16_t* x, const float* sums, const uint8_t* panel, uint16_t* wide,
                   long blocks, long rows, float* out, long stride) {
    alignas(64) float dots[2][PANEL * PANEL];
    vec total[R];
#pragma GCC unroll 16
    for (long r = 0; r < R; ++r) total[r] = vec{};
    const auto multiply = [&](auto odd, long b) INLINED {
        if (FIRST && b + 1 < blocks) {
            const uint8_t* next = panel + (b + 1) * tile_bytes(BITS);
            for (long byte = 0; byte < tile_bytes(BITS); byte += 64)
                __builtin_prefetch(next + byte + 8192, 0, 2);
            widen_steps<BITS>(next, wide + (b + 1) * TILE);
        }
        const uint16_t* parts = x + b * PARTS * TILE;
        TILE_LOAD(3, wide + b * TILE);
        TILE_LOAD(0, parts);
        TILE_LOAD(1, parts + TILE);
        TILE_LOAD(2, parts + 2 * TILE);
        if constexpr (decltype(odd)::value) {
            TILE_ZERO(5);
            TILE_DOT(5, 2, 3);
            TILE_DOT(5, 1, 3);
            TILE_DOT(5, 0, 3);
        } else {
            TILE_ZERO(4);
            TILE_DOT(4, 2, 3);
            TILE_DOT(4, 1, 3);
            TILE_DOT(4, 0, 3);
        }
    };
    const auto add = [&](auto odd, long b) INLINED {
        const float* dot = dots[decltype(odd)::value];
        const float* grid = (const float*)(panel + b * tile_bytes(BITS) + step_bytes(BITS));
        const vec scale = load(grid), offset = load(grid + PANEL);
#pragma GCC unroll 16
        for (long r = 0; r < R; ++r) {
            total[r] += load(dot + r * PANEL) * scale;
            total[r] += sums[b * PANEL + r] * offset;
        }
    };
    if (FIRST) widen_steps<BITS>(panel, wide);
    for (long b = 0; b < blocks + 2; b += 2) {
        if (b < blocks) multiply(Number<0>{}, b);
        if (b > 0 && b - 1 < blocks) TILE_STORE(5, dots[1]);
        if (b > 0) add(Number<0>{}, b - 2);
        if (b + 1 < blocks) multiply(Number<1>{}, b + 1);
        if (b < blocks) TILE_STORE(4, dots[0]);
        if (b > 0 && b - 1 < blocks) add(Number<1>{}, b - 1);
    }
#pragma GCC unroll 16
    for (long r = 0; r < R; ++r)
        if (r < rows) store(out + r * stride, total[r]);
}

// All of x in parts: rows up to R of each tile, those past the last are zero.
template <long R>
void split_rows(const float* x, long rows, long depth, const Parts& parts) {
    const long blocks = depth / BLOCK, tiles = (rows + PANEL - 1) / PANEL;
#pragma omp for
    for (long i = 0; i < tiles * R; ++i)
        for (long b = 0; b < blocks; ++b) {
            const long row = i % R, r = i / R * PANEL + row, at = i / R * blocks + b;
            uint16_t* to = parts.x + at * PARTS * TILE + row * BLOCK;
            if (r < rows) {
                split(x + r * depth + b * BLOCK, to, parts.sums + at * PANEL + row);
                continue;
            }
            parts.sums[at * PANEL + row] = 0;
            for (long p = 0; p < PARTS; ++p) std::memset(to + p * TILE, 0, 2 * BLOCK);
        }
}

// A chunk of row tiles, whose parts a core's own cache holds, goes through all panels.
template <long R, long BITS>
void multiply_rows(const float* x, long rows, long depth, const uint8_t* weight, long panels,
                   bool gated, float* out, int threads) {
    const long blocks = depth / BLOCK, tiles = (rows + PANEL - 1) / PANEL;
    const long stride = panels * PANEL, size = blocks * tile_bytes(BITS);
    const long fitting = CACHE / (blocks * PARTS * TILE * 2), chunk = fitting > 1 ? fitting : 1;
    static thread_local Parts memory;
    memory.reserve(tiles * blocks);
    const Parts& parts = memory;
#pragma omp parallel num_threads(threads)
    {
        split_rows<R>(x, rows, depth, parts);
        TileConfig config;
        config.use(R, {0, 1, 2, 4, 5});
        static thread_local std::vector<uint16_t> wide_memory;
        static thread_local std::vector<float> gates;
        if (long(wide_memory.size()) < depth * PANEL + 32) wide_memory.resize(depth * PANEL + 32);
        if (gated) gates.resize(chunk * PANEL * PANEL);
        uint16_t* wide = aligned(wide_memory.data());
        const auto multiply = [&](long first, long last, const uint8_t* panel, float* to,
                                  long to_stride) {
            for (long t = first; t < last; ++t, to += PANEL * to_stride) {
                auto* const go = t == first ? rows_by_panel<R, BITS, true>
                                            : rows_by_panel<R, BITS, false>;
                go(parts.x + t * blocks * PARTS * TILE, parts.sums + t * blocks * PANEL, panel,
                   wide, blocks, rows - t * PANEL, to, to_stride);
            }
        };
        const long thread = omp_get_thread_num(), count = omp_get_num_threads();
        for (long first = 0; first < tiles; first += chunk) {
            const long last = first + chunk < tiles ? first + chunk : tiles;
            const long some = (last * PANEL < rows ? last * PANEL : rows) - first * PANEL;
            for (long p = panels * thread / count; p < panels * (thread + 1) / count; ++p) {
                float* to = out + first * PANEL * stride + p * PANEL;
                if (gated) multiply(first, last, weight + p * size, gates.data(), PANEL);
                multiply(first, last, weight + (gated ? panels + p : p) * size, to, stride);
                for (long r = 0; gated && r < some; ++r)
                    store(to + r * stride, silu(load(&gates[r * PANEL])) * load(to + r * stride));
            }
        }
        config.release();
    }
}

template <long BITS>
void multiply_any(const float* x, long rows, long depth, const uint8_t* weight, long panels,
                  bool gated, float* out, int threads) {
    auto* const go = rows <= 1   ? multiply_rows<1, BITS>
                     : rows <= 4 ? multiply_rows<4, BITS>
                     : rows <= 8 ? multiply_rows<8, BITS>
                                 : multiply_rows<16, BITS>;
    go(x, rows, depth, weight, panels, gated, out, threads);
}

template <long BITS>
bool pack(const float* weight, long outputs, long depth, uint8_t* to, int threads) {
    const long blocks = depth / BLOCK;
    bool good = true;
#pragma omp parallel for num_threads(threads)
    for (long p = 0; p < outputs / PANEL; ++p)
        for (long b = 0; b < blocks && *(volatile bool*)&good; ++b) {
            uint8_t* tile = to + (p * blocks + b) * tile_bytes(BITS);
            float* numbers = (float*)(tile + step_bytes(BITS));
            std::memset(tile, 0, step_bytes(BITS));
            for (long o = 0; o < PANEL; ++o) {
                Grid grid;
                if (!find_grid(weight + (p * PANEL + o) * depth + b * BLOCK, BITS, grid)) {
                    good = false;
                    break;
                }
                for (long i = 0; i < BLOCK; ++i) put_step<BITS>(tile, i, o, grid.step[i]);
                numbers[o] = grid.scale, numbers[PANEL + o] = grid.offset;
            }
        }
    return good;
}

template <long BITS>
void unpack(const uint8_t* from, long outputs, long depth, float* weight) {
    const long blocks = depth / BLOCK;
    for (long p = 0; p < outputs / PANEL; ++p)
        for (long b = 0; b < blocks; ++b, from += tile_bytes(BITS)) {
            uint16_t wide[TILE];
            widen_steps<BITS>(from, wide);
            const float* numbers = (const float*)(from + step_bytes(BITS));
            for (long o = 0; o < PANEL; ++o)
                for (long i = 0; i < BLOCK; ++i)
                    weight[(p * PANEL + o) * depth + b * BLOCK + i] =
                        widen(bfloat16{wide[i / 2 * 32 + 2 * o + i % 2]}) * numbers[o] +
                        numbers[PANEL + o];
        }
}

}  // namespace

extern "C" {

// Bytes of a tile of the weight with steps of 4 or 8 bits.
long ch15_grid_bytes(long bits) { return tile_bytes(bits); }

// weight [outputs][depth] into tiles [outputs / 16][depth / 32]; 0 where it is on no such grid.
long ch15_grid_pack(const float* weight, long outputs, long depth, uint8_t* to, long bits,
                    int threads) {
    return bits == 4 ? pack<4>(weight, outputs, depth, to, threads)
                     : pack<8>(weight, outputs, depth, to, threads);
}

void ch15_grid_unpack(const uint8_t* from, long outputs, long depth, float* weight, long bits) {
    bits == 4 ? unpack<4>(from, outputs, depth, weight) : unpack<8>(from, outputs, depth, weight);
}

// out[rows][panels * 16]; with `gated`, panels of gates, then as many of ups.
void ch15_grid_linear(const float* x, long rows, long depth, const uint8_t* weight, long panels,
                      float* out, long bits, int gated, int threads) {
    bits == 4 ? multiply_any<4>(x, rows, depth, weight, panels, gated, out, threads)
              : multiply_any<8>(x, rows, depth, weight, panels, gated, out, threads);
}
}
#else
extern "C" {
long ch15_grid_bytes(long) { return 0; }
long ch15_grid_pack(const float*, long, long, uint8_t*, long, int) { return 0; }
void ch15_grid_unpack(const uint8_t*, long, long, float*, long) {}
void ch15_grid_linear(const float*, long, long, const uint8_t*, long, float*, long, int, int) {}
}
#endif
