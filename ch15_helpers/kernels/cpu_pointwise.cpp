// Norm, rotation and activation: each is one pass over a token's numbers, which at one token costs
// less than the half dozen separate operations that it replaces take to start.

#include <cmath>
#include <vector>

#include "cpu_vector.h"

namespace {

// Sum of squares in LANES_OF_SUM lanes, whatever the width of the registers.
INLINE float squares(const float* x, long size) {
    float sum[LANES_OF_SUM] = {};
    for (long i = 0; i < size; i += LANES_OF_SUM)
        for (long l = 0; l < LANES_OF_SUM; ++l) sum[l] += x[i + l] * x[i + l];
    for (long half = LANES_OF_SUM / 2; half > 0; half /= 2)
        for (long l = 0; l < half; ++l) sum[l] += sum[l + half];
    return sum[0];
}

// In place of a float, as it would be read back.
INLINE vec rounded(const float*, vec value) { return value; }
INLINE vec rounded(const bfloat16*, vec value) {
    bfloat16 narrow[LANES];
    store(narrow, value);
    return load(narrow);
}
INLINE void put(float* to, float value) { *to = value; }
INLINE void put(bfloat16* to, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    to->bits = uint16_t(value == value ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16
                                       : (bits >> 16) | 0x40);
}

template <typename T>
void norm(const T* x, const T* residual, const T* weight, T* out, T* total, long rows, long size,
          float eps, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        std::vector<float> wide(size);
#pragma omp for
        for (long r = 0; r < rows; ++r) {
            const long at = r * size;
            for (long i = 0; i < size; i += LANES) {
                vec sum = load(x + at + i);
                if (residual) {
                    sum = rounded(x, sum + load(residual + at + i));
                    store(total + at + i, sum);
                }
                store(&wide[i], sum);
            }
            const float scale = 1.0f / std::sqrt(squares(wide.data(), size) / size + eps);
            for (long i = 0; i < size; i += LANES)
                store(out + at + i, rounded(x, load(&wide[i]) * scale) * load(weight + i));
        }
    }
}

template <typename T>
void rope_write(const T* q, const T* k, const T* v, const float* cos_full, const float* sin_signed,
                const int64_t* slots, T* q_out, T* k_cache, T* v_cache, long tokens, long heads,
                long kv_heads, long dim, long token_stride, long page, long block_stride,
                long slot_stride, long head_stride, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (long t = 0; t < tokens; ++t) {
        const float *c = cos_full + t * dim, *s = sin_signed + t * dim;
        const long half = dim / 2, slot = slots[t];
        const auto rotate = [&](const T* from, T* to) {
            for (long i = 0; i < half; ++i)
                put(to + i, widen(from[i]) * c[i] + widen(from[i + half]) * s[i]);
            for (long i = half; i < dim; ++i)
                put(to + i, widen(from[i]) * c[i] + widen(from[i - half]) * s[i]);
        };
        for (long h = 0; h < heads; ++h)
            rotate(q + t * token_stride + h * dim, q_out + (t * heads + h) * dim);
        if (slot < 0) continue;
        const long at = slot / page * block_stride + slot % page * slot_stride;
        for (long h = 0; h < kv_heads; ++h) {
            rotate(k + t * token_stride + h * dim, k_cache + at + h * head_stride);
            std::memcpy(v_cache + at + h * head_stride, v + t * token_stride + h * dim,
                        dim * sizeof(T));
        }
    }
}

}  // namespace

// total = x + residual (where there is one), out = total / rms(total) * weight; size is a multiple
// of LANES_OF_SUM.
#define CH15_RMS_NORM(NAME, T)                                                                     \
    void NAME(const T* x, const T* residual, const T* weight, T* out, T* total, long rows,         \
              long size, float eps, int threads) {                                                 \
        norm(x, residual, weight, out, total, rows, size, eps, threads);                           \
    }

// Rotates q into q_out [tokens][heads][dim] and k into its slot of the cache; writes v beside it.
// Strides are in numbers; a slot of -1 is not written.
#define CH15_ROPE_WRITE(NAME, T)                                                                   \
    void NAME(const T* q, const T* k, const T* v, const float* cos_full, const float* sin_signed,  \
              const int64_t* slots, T* q_out, T* k_cache, T* v_cache, long tokens, long heads,     \
              long kv_heads, long dim, long token_stride, long page, long block_stride,            \
              long slot_stride, long head_stride, int threads) {                                   \
        rope_write(q, k, v, cos_full, sin_signed, slots, q_out, k_cache, v_cache, tokens, heads,   \
                   kv_heads, dim, token_stride, page, block_stride, slot_stride, head_stride,      \
                   threads);                                                                       \
    }

extern "C" {
CH15_RMS_NORM(ch15_rms_norm, float)
CH15_RMS_NORM(ch15_rms_norm_bfloat16, bfloat16)
CH15_ROPE_WRITE(ch15_rope_write, float)
CH15_ROPE_WRITE(ch15_rope_write_bfloat16, bfloat16)
}
