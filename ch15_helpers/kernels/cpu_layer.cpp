// The two halves of a decoder layer around its attention, each in one call from Python: at one
// token, eight calls in each of thirty layers take a fifth of the step, on top of the arithmetic.
#include <vector>

extern "C" {

void ch15_linear(const float* x, long rows, long depth, const float* weight, long panels,
                 float* out, int threads);
void ch15_gated_linear(const float* x, long rows, long depth, const float* weight, long panels,
                       float* out, int threads);
void ch15_rms_norm(const float* x, const float* residual, const float* weight, float* out,
                   float* total, long rows, long size, float eps, int threads);
long ch15_width();

// total = x + residual, out = norm(total) times the weight of `panels`.
void ch15_norm_linear(const float* x, const float* residual, const float* norm, float eps,
                      const float* weight, float* total, float* out, long rows, long hidden,
                      long panels, int threads) {
    std::vector<float> normal(rows * hidden);
    ch15_rms_norm(x, residual, norm, normal.data(), total, rows, hidden, eps, threads);
    ch15_linear(normal.data(), rows, hidden, weight, panels, out, threads);
}

// total = mixed * o_proj + residual, out = feed-forward block of norm(total).
void ch15_feed_forward(const float* mixed, const float* residual, const float* o_proj,
                       const float* norm, float eps, const float* gate_up, const float* down,
                       float* total, float* out, long rows, long depth, long hidden, long inner,
                       int threads) {
    const long width = ch15_width();
    std::vector<float> x(rows * hidden), gated(rows * inner);
    ch15_linear(mixed, rows, depth, o_proj, hidden / width, x.data(), threads);
    ch15_rms_norm(x.data(), residual, norm, x.data(), total, rows, hidden, eps, threads);
    ch15_gated_linear(x.data(), rows, hidden, gate_up, inner / width, gated.data(), threads);
    ch15_linear(gated.data(), rows, inner, down, hidden / width, out, threads);
}
}
