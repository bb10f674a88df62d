// Products of bfloat16 numbers in the processor's matrix tiles (cpu_tiles.h), summed in float32 and
// rounded once. The weight is in tiles [outputs / 16][inputs / 32][16 pairs of inputs][16][2].
//
// A pair of panels stays in the core's cache while the rows go by, and comes from memory once. A
// row's result depends neither on the other rows nor on the number of threads.
#include <initializer_list>
#include <vector>

#include "cpu_threads.h"
#include "cpu_tiles.h"

#ifdef CH15_TILES
namespace {

typedef const bfloat16* Numbers;

// One or two tiles of rows by two panels; `ahead` is what will be needed in so many bytes.
template <bool TWO>
void multiply_tiles(Numbers x, Numbers more, long depth, Numbers left, Numbers right, long ahead,
                    float (*sums)[PANEL * PANEL]) {
    TILE_ZERO(0);
    TILE_ZERO(1);
    if (TWO) TILE_ZERO(2);
    if (TWO) TILE_ZERO(3);
    for (long i = 0; i < depth; i += BLOCK, left += TILE, right += TILE) {
        for (long byte = 0; byte < ahead; byte += 64) {
            __builtin_prefetch((const char*)left + ahead * 8 + byte, 0, 2);
            __builtin_prefetch((const char*)right + ahead * 8 + byte, 0, 2);
        }
        TILE_LOAD_ROWS(4, x + i, 2 * depth);
        TILE_LOAD(6, left);
        TILE_DOT(0, 4, 6);
        TILE_LOAD(7, right);
        TILE_DOT(1, 4, 7);
        if (TWO) {
            TILE_LOAD_ROWS(5, more + i, 2 * depth);
            TILE_DOT(2, 5, 6);
            TILE_DOT(3, 5, 7);
        }
    }
    TILE_STORE(0, sums[0]);
    TILE_STORE(1, sums[1]);
    if (TWO) TILE_STORE(2, sums[2]);
    if (TWO) TILE_STORE(3, sums[3]);
}

INLINE __m256i narrow(vec value) { return (__m256i)_mm512_cvtneps_pbh((__m512)value); }
INLINE vec rounded(vec value) {
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow(value)), 16);
}
INLINE void put(bfloat16* to, vec value) { _mm256_storeu_si256((__m256i*)to, narrow(value)); }

// Two panels' sums of `rows` rows to their outputs; where they are gate and up, to one panel.
void finish(const float* left, const float* right, long rows, bool gated, bfloat16* out,
            bfloat16* beside, long stride) {
    for (long r = 0; r < rows; ++r) {
        const vec one = load(left + r * PANEL), other = load(right + r * PANEL);
        if (gated) {
            put(out + r * stride, rounded(silu(rounded(one))) * rounded(other));
            continue;
        }
        put(out + r * stride, one);
        if (beside) put(beside + r * stride, other);
    }
}

void multiply(Numbers x, long rows, long depth, Numbers weight, long panels, bool gated,
              bfloat16* out, int threads) {
    const long stride = panels * PANEL, size = depth * PANEL;
    const long some = rows < PANEL ? rows : PANEL;
    const long pairs = gated ? panels : (panels + 1) / 2;
#pragma omp parallel num_threads(threads)
    {
        TileConfig config;
        config.use(some, {0, 1, 2, 3, 4, 5});
        alignas(64) float sums[4][PANEL * PANEL];
        const long thread = omp_get_thread_num(), count = omp_get_num_threads();
        for (long p = pairs * thread / count; p < pairs * (thread + 1) / count; ++p) {
            const long left = gated ? p : 2 * p, lone = !gated && left + 1 == panels;
            const long right = gated ? panels + p : lone ? left : left + 1;
            for (long r = 0; r < rows; r += 2 * PANEL) {
                // The last tile of rows starts early, so that it is full.
                const long last = rows - some, first = r < last ? r : last;
                const long second = r + PANEL < last ? r + PANEL : last;
                const bool two = r + PANEL < rows;
                auto* const go = two ? multiply_tiles<true> : multiply_tiles<false>;
                go(x + first * depth, x + second * depth, depth, weight + left * size,
                   weight + right * size, r ? 0 : 1024, sums);
                for (long t = 0; t < 1 + two; ++t) {
                    bfloat16* to = out + (t ? second : first) * stride + left * PANEL;
                    bfloat16* beside = lone ? nullptr : to + PANEL;
                    finish(sums[2 * t], sums[2 * t + 1], some, gated, to, beside, stride);
                }
            }
        }
        config.release();
    }
}

}  // namespace

extern "C" {

long ch15_has_tiles() {
    static const bool granted = tiles_granted();
    return granted;
}

// out[rows][panels * 16]; with `gated`, panels of gates, then as many of ups.
void ch15_linear_bfloat16(const bfloat16* x, long rows, long depth, const bfloat16* weight,
                          long panels, bfloat16* out, int gated, int threads) {
    if (rows) multiply(x, rows, depth, weight, panels, gated, out, threads);
}
}
#else
extern "C" {
long ch15_has_tiles() { return 0; }
void ch15_linear_bfloat16(const bfloat16*, long, long, const bfloat16*, long, bfloat16*, int,
                          int) {}
}
#endif
