// Vectors of floats, as wide as the processor's registers. A sum whose order could depend on that
// width is written out in LANES_OF_SUM lanes, so processors with a fused multiply-add give the same
// bits.
#pragma once
#include <cstdint>
#include <cstring>

// A tile of products is ROWS x WIDTH sums, which together fill the registers.
#if defined(__AVX512F__)
constexpr long LANES = 16, ROWS = 12, WIDTH = 2 * LANES;  // 24 of 32 registers
#elif defined(__AVX__)
constexpr long LANES = 8, ROWS = 6, WIDTH = 2 * LANES;  // 12 of 16
#elif defined(__aarch64__)
constexpr long LANES = 4, ROWS = 6, WIDTH = 4 * LANES;  // 24 of 32
#else
constexpr long LANES = 4, ROWS = 3, WIDTH = 4 * LANES;  // 12 of 16
#endif
constexpr long LANES_OF_SUM = 16;

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

// The upper half of a float.
struct bfloat16 {
    uint16_t bits;
};

#define INLINE static inline __attribute__((always_inline))

INLINE vec load(const float* from) { return *(const vec*)from; }
INLINE void store(float* to, vec value) { *(vec*)to = value; }
INLINE float widen(float value) { return value; }

INLINE vec load(const bfloat16* from) {
    return (vec)(__builtin_convertvector(*(const halves*)from, uvec) << 16);
}

// Rounds to the nearest, ties to even; a NaN stays one.
INLINE void store(bfloat16* to, vec value) {
    uvec bits = (uvec)value;
    uvec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    *(halves*)to = __builtin_convertvector(value == value ? rounded : (bits >> 16) | 0x40, halves);
}

INLINE float widen(bfloat16 value) {
    uint32_t bits = uint32_t(value.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

INLINE vec splat(float value) { return value - vec{}; }

// The lanes of a and b by turns: those of their lower halves, or of their upper ones.
template <bool UPPER>
INLINE vec zip(vec a, vec b) {
    constexpr long from = UPPER ? LANES / 2 : 0;
#if defined(__clang__)
    vec out;
    for (long i = 0; i < LANES / 2; ++i) out[2 * i] = a[from + i], out[2 * i + 1] = b[from + i];
    return out;
#else
    ivec order;
    for (long i = 0; i < LANES / 2; ++i) {
        order[2 * i] = from + i;
        order[2 * i + 1] = LANES + from + i;
    }
    return __builtin_shuffle(a, b, order);
#endif
}

// Turns the rows of a square into columns: with each round of zips one bit of a number's row and
// one of its column change places.
INLINE void transpose(vec (&rows)[LANES]) {
    for (long round = 1; round < LANES; round *= 2) {
        vec next[LANES];
        for (long i = 0; i < LANES / 2; ++i) {
            next[2 * i] = zip<false>(rows[i], rows[i + LANES / 2]);
            next[2 * i + 1] = zip<true>(rows[i], rows[i + LANES / 2]);
        }
        for (long i = 0; i < LANES; ++i) rows[i] = next[i];
    }
}

// e^x = 2^n * e^r with |r| <= ln(2) / 2; within 2 units in the last place (Cephes' polynomial).
// Below -87 it is zero, above 88 infinite.
INLINE vec exp_of(vec x) {
    vec in = x > 88.0f ? splat(88.0f) : x;
    vec n = (in * 1.44269504f + 12582912.0f) - 12582912.0f;
    vec r = in - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    vec two_to_n = (vec)((__builtin_convertvector(n, ivec) + 127) << 23);
    vec some = x > 88.0f ? splat(__builtin_inff()) : p * two_to_n;
    return x < -87.0f ? vec{} : some;
}

INLINE vec silu(vec x) { return x / (1.0f + exp_of(-x)); }

// out[r][0 .. WIDTH) (+)= sum over i of x[r][i] * w[i][0 .. WIDTH), in the order of i. While it
// works, it asks for `ahead` bytes per step of what will be needed next.
template <long R, bool ADD, long AHEAD = 0, typename T>
INLINE void tile(const float* x, long x_stride, const T* w, long w_stride, long depth, float* out,
                 long out_stride, const char* next = nullptr) {
    constexpr long V = WIDTH / LANES;
    vec sum[R][V];
    for (long r = 0; r < R; ++r)
        for (long v = 0; v < V; ++v)
            sum[r][v] = ADD ? load(out + r * out_stride + v * LANES) : vec{};
#pragma GCC unroll 2
    for (long i = 0; i < depth; ++i, w += w_stride, next += AHEAD) {
        vec weight[V];
        for (long v = 0; v < V; ++v) weight[v] = load(w + v * LANES);
        for (long byte = 0; byte < AHEAD; byte += 64) __builtin_prefetch(next + byte, 0, 2);
        for (long r = 0; r < R; ++r)
            for (long v = 0; v < V; ++v) sum[r][v] += x[r * x_stride + i] * weight[v];
    }
    for (long r = 0; r < R; ++r)
        for (long v = 0; v < V; ++v) store(out + r * out_stride + v * LANES, sum[r][v]);
}
