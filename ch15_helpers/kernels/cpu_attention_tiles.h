// Attention's products in the processor's matrix tiles: keys, values and weights are bfloat16, sums
// float32. A row of a product depends on its own query alone.
#pragma once
#include <vector>

#include "cpu_tiles.h"

#ifdef CH15_TILES

// One run of TOKENS tokens of one KV head, and up to `rows` queries; a thread's own memory.
template <long TOKENS>
struct AttentionTiles {
    bfloat16 *q, *keys, *values, *weights;  // [rows][dim], turned, in pairs, [rows][TOKENS]
    float* mixed;                           // [PANEL][dim]
    long dim;

    AttentionTiles(long rows, long dim) : dim(dim) {
        static thread_local std::vector<float> memory;
        const long halves = (rows * dim + 2 * TOKENS * dim + rows * TOKENS) / 2;
        const size_t size = halves + PANEL * dim + 16;
        if (memory.size() < size) memory.resize(size);
        mixed = memory.data() + (64 - uintptr_t(memory.data()) % 64) % 64 / sizeof(float);
        q = (bfloat16*)(mixed + PANEL * dim);
        keys = q + rows * dim;
        values = keys + TOKENS * dim;
        weights = values + TOKENS * dim;
    }

    // Keys to [TOKENS / 16][dim / 32][16 pairs of channels][16 tokens][2], values to
    // [TOKENS / 32][dim / 16][16 pairs of tokens][16 channels][2]; zeros past `count`.
    void gather(const bfloat16* const* k, const bfloat16* const* v, long count) {
        for (long t = 0; t < count; t += PANEL)
            for (long i = 0; i < dim; i += BLOCK) {
                vec square[LANES];
                for (long l = 0; l < LANES; ++l)
                    square[l] = t + l < count ? load((const float*)(k[t + l] + i)) : vec{};
                transpose(square);
                float* to = (float*)(keys + t * dim + i * PANEL);
                for (long l = 0; l < LANES; ++l) store(to + l * LANES, square[l]);
            }
        const auto row = [&](long t, long i) {
            return t < count ? _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(v[t] + i)))
                             : _mm512_setzero_si512();
        };
        for (long t = 0; t < count || t % BLOCK; t += 2)
            for (long i = 0; i < dim; i += PANEL) {
                const __m512i pair =
                    _mm512_or_si512(row(t, i), _mm512_slli_epi32(row(t + 1, i), 16));
                bfloat16* to = values + t / BLOCK * BLOCK * dim + i * BLOCK + t % BLOCK * PANEL;
                _mm512_storeu_si512(to, pair);
            }
    }

    // scores [rows][TOKENS] of PANEL rows from `first`.
    void score(long first, long count, float* scores) {
        for (long t = 0; t < count; t += 2 * PANEL) {
            const bfloat16 *left = keys + t * dim, *right = left + PANEL * dim;
            TILE_ZERO(0);
            TILE_ZERO(1);
            for (long i = 0; i < dim; i += BLOCK) {
                TILE_LOAD_ROWS(4, q + first * dim + i, 2 * dim);
                TILE_LOAD(5, left + i * PANEL);
                TILE_DOT(0, 4, 5);
                TILE_LOAD(6, right + i * PANEL);
                TILE_DOT(1, 4, 6);
            }
            TILE_STORE_ROWS(0, scores + first * TOKENS + t, 4 * TOKENS);
            TILE_STORE_ROWS(1, scores + first * TOKENS + t + PANEL, 4 * TOKENS);
        }
    }

    void weigh(long row, const float* scores) {
        for (long t = 0; t < TOKENS; t += LANES)
            _mm256_storeu_si256((__m256i*)(weights + row * TOKENS + t),
                                (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(scores + t)));
    }

    // Adds weights * values of `rows` rows from `first` to sums [rows][stride].
    void mix(long first, long rows, long count, float* sums, long stride) {
        for (long i = 0; i < dim; i += 2 * PANEL) {
            TILE_ZERO(0);
            TILE_ZERO(1);
            for (long t = 0; t < count; t += BLOCK) {
                TILE_LOAD_ROWS(4, weights + first * TOKENS + t, 2 * TOKENS);
                TILE_LOAD(5, values + t * dim + i * BLOCK);
                TILE_DOT(0, 4, 5);
                TILE_LOAD(6, values + t * dim + (i + PANEL) * BLOCK);
                TILE_DOT(1, 4, 6);
            }
            TILE_STORE_ROWS(0, mixed + i, 4 * dim);
            TILE_STORE_ROWS(1, mixed + i + PANEL, 4 * dim);
        }
        for (long r = 0; r < rows; ++r)
            for (long i = 0; i < dim; i += LANES) {
                float* sum = sums + (first + r) * stride + i;
                store(sum, load(sum) + load(mixed + r * dim + i));
            }
    }
};
#endif
