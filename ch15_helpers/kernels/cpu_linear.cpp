// Products with a weight in panels of WIDTH output features, each [in][WIDTH] (Goto and van de
// Geijn, "Anatomy of High-Performance Matrix Multiplication", 2008).
//
// A panel fits the core's own cache, so it comes from memory once, whatever the number of tokens;
// the tiles of one panel fetch the next while they multiply. A sum is one chain of multiply-adds:
// a token's result depends neither on the other tokens nor on the number of threads.
#include <type_traits>

#include "cpu_threads.h"
#include "cpu_vector.h"

namespace {

// Bytes between what is used and what is fetched, where one tile goes through each panel.
constexpr long STREAM = 8192;

template <long N>
using Bytes = std::integral_constant<long, N>;

// Up to R rows with one panel, the part'th of `parts` tiles that go through it. The first two fetch
// half of the next panel each; a lone one fetches what it will itself come to.
template <long R, typename T>
void tokens(long rows, long parts, const float* x, long depth, const T* panel, float* out,
            long stride, long part) {
    if constexpr (R > 1) {
        if (rows < R) return tokens<R - 1>(rows, parts, x, depth, panel, out, stride, part);
    }
    constexpr long BYTES = WIDTH * sizeof(T);
    const char* next = (const char*)(panel + WIDTH * depth) + part * depth * BYTES / 2;
    const auto multiply = [&](auto ahead, const char* from) {
        tile<R, false, decltype(ahead)::value>(x, depth, panel, WIDTH, depth, out, stride, from);
    };
    if (parts == 1) return multiply(Bytes<BYTES>{}, (const char*)panel + STREAM);
    if (part < 2) return multiply(Bytes<BYTES / 2>{}, next);
    multiply(Bytes<0>{}, next);
}

struct Span {
    long from, to;
};

// The part of `count` things that falls to one of `parts`.
INLINE Span share(long count, long part, long parts) {
    return {count * part / parts, count * (part + 1) / parts};
}

template <typename T>
void plain(const float* x, long rows, long depth, const T* weight, long panels, float* out,
           int threads) {
    const long parts = (rows + ROWS - 1) / ROWS, stride = panels * WIDTH;
#pragma omp parallel num_threads(threads)
    {
        const Span mine = share(panels, omp_get_thread_num(), omp_get_num_threads());
        for (long p = mine.from; p < mine.to; ++p)
            for (long part = 0; part < parts; ++part) {
                const Span some = share(rows, part, parts);
                tokens<ROWS>(some.to - some.from, parts, x + some.from * depth, depth,
                             weight + p * depth * WIDTH, out + some.from * stride + p * WIDTH,
                             stride, part);
            }
    }
}

// Panels of gates, then as many of ups; out = silu(gate) * up.
template <typename T>
void gated(const float* x, long rows, long depth, const T* weight, long panels, float* out,
           int threads) {
    const long parts = (rows + ROWS - 1) / ROWS, stride = panels * WIDTH;
#pragma omp parallel num_threads(threads)
    {
        const Span mine = share(panels, omp_get_thread_num(), omp_get_num_threads());
        float both[2][ROWS * WIDTH];
        for (long p = mine.from; p < mine.to; ++p)
            for (long part = 0; part < parts; ++part) {
                const Span some = share(rows, part, parts);
                const long count = some.to - some.from;
                for (long half = 0; half < 2; ++half)
                    tokens<ROWS>(count, parts, x + some.from * depth, depth,
                                 weight + (half * panels + p) * depth * WIDTH, both[half], WIDTH,
                                 part);
                for (long r = 0; r < count; ++r)
                    for (long i = 0; i < WIDTH; i += LANES) {
                        const vec gate = load(both[0] + r * WIDTH + i);
                        store(out + (some.from + r) * stride + p * WIDTH + i,
                              silu(gate) * load(both[1] + r * WIDTH + i));
                    }
            }
    }
}

}  // namespace

extern "C" {

long ch15_width() { return WIDTH; }

// out[rows][panels * WIDTH] = x[rows][depth] times the transposed weight.
void ch15_linear(const float* x, long rows, long depth, const float* weight, long panels,
                 float* out, int threads) {
    plain(x, rows, depth, weight, panels, out, threads);
}

void ch15_gated_linear(const float* x, long rows, long depth, const float* weight, long panels,
                       float* out, int threads) {
    gated(x, rows, depth, weight, panels, out, threads);
}
}
