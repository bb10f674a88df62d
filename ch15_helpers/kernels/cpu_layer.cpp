// A decoder layer in one call from Python: at one token, eight calls in each of thirty layers take
// a fifth of the step, on top of the arithmetic.
#include "cpu_vector.h"

#define CH15_KERNELS(T, NORM, ROPE, ATTENTION)                                                     \
    void NORM(const T* x, const T* residual, const T* weight, T* out, T* total, long rows,         \
              long size, float eps, int threads);                                                  \
    void ROPE(const T* q, const T* k, const T* v, const float* cos_full, const float* sin_signed,  \
              const int64_t* slots, T* q_out, T* k_cache, T* v_cache, long tokens, long heads,     \
              long kv_heads, long dim, long token_stride, long page, long block_stride,            \
              long slot_stride, long head_stride, int threads);                                    \
    void ATTENTION(const T* q, const T* k, const T* v, T* out, const int32_t* tables,              \
                   const int32_t* starts, const int32_t* lens, long seqs, long table_stride,       \
                   long heads, long kv_heads, long dim, long page, long q_stride,                  \
                   long block_stride, long slot_stride, long head_stride, float scale,             \
                   int threads);

extern "C" {

CH15_KERNELS(float, ch15_rms_norm, ch15_rope_write, ch15_attention_float32)
CH15_KERNELS(bfloat16, ch15_rms_norm_bfloat16, ch15_rope_write_bfloat16, ch15_attention_bfloat16)

void ch15_linear(const float* x, long rows, long depth, const float* weight, long panels,
                 float* out, int threads);
void ch15_gated_linear(const float* x, long rows, long depth, const float* weight, long panels,
                       float* out, int threads);
void ch15_grid_linear(const float* x, long rows, long depth, const uint8_t* weight, long panels,
                      float* out, long bits, int gated, int threads);
void ch15_linear_bfloat16(const bfloat16* x, long rows, long depth, const bfloat16* weight,
                          long panels, bfloat16* out, int gated, int threads);
long ch15_width();
}

namespace {

// Floats in panels, or on a grid of so many bits (cpu_grid.cpp); or bfloat16 in tiles.
struct Weight {
    const void* numbers;
    int64_t bits;
};

// cpu_layer.py has the same fields in the same order.
struct Layer {
    const void *input_norm, *post_norm;
    Weight qkv_proj, o_proj, gate_up_proj, down_proj;
};

// What is the same in every layer of a step.
struct Step {
    const float *cos_full, *sin_signed;
    const int64_t* slots;
    const int32_t *tables, *starts, *lens;
    void* scratch;  // rows x (hidden + 2 heads x dim + q, k and v + inner)
    int64_t rows, hidden, inner, heads, kv_heads, dim, seqs, table_stride, page, block_stride,
        slot_stride, head_stride, threads;
    float eps, scale;
};

struct Float32 {
    typedef float number;
    static constexpr auto norm = ch15_rms_norm;
    static constexpr auto rope = ch15_rope_write;
    static constexpr auto attention = ch15_attention_float32;
    static void multiply(const float* x, long rows, long depth, Weight weight, long outputs,
                         bool gated, float* out, int threads) {
        if (weight.bits)
            return ch15_grid_linear(x, rows, depth, (const uint8_t*)weight.numbers, outputs / 16,
                                    out, weight.bits, gated, threads);
        (gated ? ch15_gated_linear : ch15_linear)(x, rows, depth, (const float*)weight.numbers,
                                                  outputs / ch15_width(), out, threads);
    }
};

struct Bfloat16 {
    typedef bfloat16 number;
    static constexpr auto norm = ch15_rms_norm_bfloat16;
    static constexpr auto rope = ch15_rope_write_bfloat16;
    static constexpr auto attention = ch15_attention_bfloat16;
    static void multiply(const bfloat16* x, long rows, long depth, Weight weight, long outputs,
                         bool gated, bfloat16* out, int threads) {
        ch15_linear_bfloat16(x, rows, depth, (const bfloat16*)weight.numbers, outputs / 16, out,
                             gated, threads);
    }
};

template <typename Kernels, typename T = typename Kernels::number>
void run(const Layer& layer, const Step& s, T* k, T* v, T* hidden, T* residual) {
    const int threads = int(s.threads);
    const long q_size = s.heads * s.dim, kv_size = s.kv_heads * s.dim;
    const long qkv_size = q_size + 2 * kv_size;
    T *x = (T*)s.scratch, *qkv = x + s.rows * s.hidden, *q = qkv + s.rows * qkv_size,
      *mixed = q + s.rows * q_size, *gated = mixed + s.rows * q_size;

    Kernels::norm(hidden, residual, (const T*)layer.input_norm, x, residual, s.rows, s.hidden,
                  s.eps, threads);
    Kernels::multiply(x, s.rows, s.hidden, layer.qkv_proj, qkv_size, false, qkv, threads);
    Kernels::rope(qkv, qkv + q_size, qkv + q_size + kv_size, s.cos_full, s.sin_signed, s.slots, q,
                  k, v, s.rows, s.heads, s.kv_heads, s.dim, qkv_size, s.page, s.block_stride,
                  s.slot_stride, s.head_stride, threads);
    Kernels::attention(q, k, v, mixed, s.tables, s.starts, s.lens, s.seqs, s.table_stride, s.heads,
                       s.kv_heads, s.dim, s.page, q_size, s.block_stride, s.slot_stride,
                       s.head_stride, s.scale, threads);

    Kernels::multiply(mixed, s.rows, q_size, layer.o_proj, s.hidden, false, x, threads);
    Kernels::norm(x, residual, (const T*)layer.post_norm, x, residual, s.rows, s.hidden, s.eps,
                  threads);
    Kernels::multiply(x, s.rows, s.hidden, layer.gate_up_proj, s.inner, true, gated, threads);
    Kernels::multiply(gated, s.rows, s.inner, layer.down_proj, s.hidden, false, hidden, threads);
}

}  // namespace

extern "C" {

// hidden and residual [rows][hidden], in and out; writes K and V into the layer's pages.
void ch15_layer(const Layer* layer, const Step* step, float* k, float* v, float* hidden,
                float* residual) {
    run<Float32>(*layer, *step, k, v, hidden, residual);
}

void ch15_layer_bfloat16(const Layer* layer, const Step* step, bfloat16* k, bfloat16* v,
                         bfloat16* hidden, bfloat16* residual) {
    run<Bfloat16>(*layer, *step, k, v, hidden, residual);
}
}
