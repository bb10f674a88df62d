// A decoder layer in one call from Python: at one token, eight calls in each of thirty layers take
// a fifth of the step, on top of the arithmetic.
#include <cstdint>

extern "C" {

void ch15_linear(const float* x, long rows, long depth, const float* weight, long panels,
                 float* out, int threads);
void ch15_gated_linear(const float* x, long rows, long depth, const float* weight, long panels,
                       float* out, int threads);
void ch15_rms_norm(const float* x, const float* residual, const float* weight, float* out,
                   float* total, long rows, long size, float eps, int threads);
void ch15_rope_write(const float* q, const float* k, const float* v, const float* cos_full,
                     const float* sin_signed, const int64_t* slots, float* q_out, float* k_cache,
                     float* v_cache, long tokens, long heads, long kv_heads, long dim,
                     long token_stride, long page, long block_stride, long slot_stride,
                     long head_stride, int threads);
void ch15_attention_float32(const float* q, const float* k, const float* v, float* out,
                            const int32_t* tables, const int32_t* starts, const int32_t* lens,
                            long seqs, long table_stride, long heads, long kv_heads, long dim,
                            long page, long q_stride, long block_stride, long slot_stride,
                            long head_stride, float scale, int threads);
void ch15_grid_linear(const float* x, long rows, long depth, const uint8_t* weight, long panels,
                      float* out, long bits, int gated, int threads);
long ch15_width();

// In panels of floats, or on a grid of so many bits (cpu_grid.cpp).
struct Weight {
    const void* numbers;
    int64_t bits;
};

// cpu_layer.py has the same fields in the same order.
struct Layer {
    const float *input_norm, *post_norm;
    Weight qkv_proj, o_proj, gate_up_proj, down_proj;
};

// What is the same in every layer of a step.
struct Step {
    const float *cos_full, *sin_signed;
    const int64_t* slots;
    const int32_t *tables, *starts, *lens;
    float* scratch;  // rows x (hidden + 2 heads x dim + q, k and v + inner)
    int64_t rows, hidden, inner, heads, kv_heads, dim, seqs, table_stride, page, block_stride,
        slot_stride, head_stride, threads;
    float eps, scale;
};

static void multiply(const float* x, long rows, long depth, Weight weight, long outputs, bool gated,
                     float* out, int threads) {
    if (weight.bits)
        return ch15_grid_linear(x, rows, depth, (const uint8_t*)weight.numbers, outputs / 16, out,
                                weight.bits, gated, threads);
    (gated ? ch15_gated_linear : ch15_linear)(x, rows, depth, (const float*)weight.numbers,
                                              outputs / ch15_width(), out, threads);
}

// hidden and residual [rows][hidden], in and out; writes K and V into the layer's pages.
void ch15_layer(const Layer* layer, const Step* step, float* k, float* v, float* hidden,
                float* residual) {
    const Step& s = *step;
    const int threads = int(s.threads);
    const long q_size = s.heads * s.dim, kv_size = s.kv_heads * s.dim;
    const long qkv_size = q_size + 2 * kv_size;
    float *x = s.scratch, *qkv = x + s.rows * s.hidden, *q = qkv + s.rows * qkv_size,
          *mixed = q + s.rows * q_size, *gated = mixed + s.rows * q_size;

    ch15_rms_norm(hidden, residual, layer->input_norm, x, residual, s.rows, s.hidden, s.eps,
                  threads);
    multiply(x, s.rows, s.hidden, layer->qkv_proj, qkv_size, false, qkv, threads);
    ch15_rope_write(qkv, qkv + q_size, qkv + q_size + kv_size, s.cos_full,
                    s.sin_signed, s.slots, q, k, v, s.rows, s.heads, s.kv_heads, s.dim,
                    qkv_size, s.page, s.block_stride, s.slot_stride, s.head_stride, threads);
    ch15_attention_float32(q, k, v, mixed, s.tables, s.starts, s.lens, s.seqs,
                           s.table_stride, s.heads, s.kv_heads, s.dim, s.page, q_size,
                           s.block_stride, s.slot_stride, s.head_stride, s.scale, threads);

    multiply(mixed, s.rows, q_size, layer->o_proj, s.hidden, false, x, threads);
    ch15_rms_norm(x, residual, layer->post_norm, x, residual, s.rows, s.hidden,
                  s.eps, threads);
    multiply(x, s.rows, s.hidden, layer->gate_up_proj, s.inner, true, gated, threads);
    multiply(gated, s.rows, s.inner, layer->down_proj, s.hidden, false, hidden, threads);
}
}
