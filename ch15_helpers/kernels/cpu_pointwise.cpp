// Norm, rotation and activation: each is one pass over a token's numbers, which at one token costs
// less than the half dozen separate operations that it replaces take to start.

#include <cmath>

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

}  // namespace

extern "C" {

// total = x + residual (where there is one), out = total / rms(total) * weight; size is a multiple
// of LANES_OF_SUM.
void ch15_rms_norm(const float* x, const float* residual, const float* weight, float* out,
                   float* total, long rows, long size, float eps, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (long r = 0; r < rows; ++r) {
        const float* in = x + r * size;
        if (residual) {
            for (long i = 0; i < size; ++i) total[r * size + i] = in[i] + residual[r * size + i];
            in = total + r * size;
        }
        const float scale = 1.0f / std::sqrt(squares(in, size) / size + eps);
        for (long i = 0; i < size; ++i) out[r * size + i] = in[i] * scale * weight[i];
    }
}

// Rotates q into q_out [tokens][heads][dim] and k into its slot of the cache; writes v beside it.
// Strides are in floats; a slot of -1 is not written.
void ch15_rope_write(const float* q, const float* k, const float* v, const float* cos_full,
                     const float* sin_signed, const int64_t* slots, float* q_out, float* k_cache,
                     float* v_cache, long tokens, long heads, long kv_heads, long dim,
                     long token_stride, long page, long block_stride, long slot_stride,
                     long head_stride, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (long t = 0; t < tokens; ++t) {
        const float *c = cos_full + t * dim, *s = sin_signed + t * dim;
        const long half = dim / 2, slot = slots[t];
        const auto rotate = [&](const float* from, float* to) {
            for (long i = 0; i < half; ++i) to[i] = from[i] * c[i] + from[i + half] * s[i];
            for (long i = half; i < dim; ++i) to[i] = from[i] * c[i] + from[i - half] * s[i];
        };
        for (long h = 0; h < heads; ++h)
            rotate(q + t * token_stride + h * dim, q_out + (t * heads + h) * dim);
        if (slot < 0) continue;
        const long at = slot / page * block_stride + slot % page * slot_stride;
        for (long h = 0; h < kv_heads; ++h) {
            rotate(k + t * token_stride + h * dim, k_cache + at + h * head_stride);
            std::memcpy(v_cache + at + h * head_stride, v + t * token_stride + h * dim,
                        dim * sizeof(float));
        }
    }
}
}
