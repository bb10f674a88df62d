// Attention over the paged KV cache, on the pages where they are.
//
// Each query's context is cut into SPANs of tokens. Within one a softmax runs along, TOKENS keys at
// a time (Dao et al., "FlashAttention", 2022), and the spans' results are merged in their order
// (as in Flash-Decoding, 2023). The cuts are the same for a prompt and for a decode, and a sum is
// one chain of multiply-adds: a query's result depends neither on the other queries of the step,
// nor on the page size, nor on the number of threads. The query heads of one KV head go together,
// so keys and values are read once for all of them.
#include "cpu_threads.h"

#include <cmath>
#include <memory>
#include <type_traits>
#include <vector>

#include "cpu_attention_tiles.h"
#include "cpu_vector.h"

namespace {

constexpr long TOKENS = 64, SPAN = 256, MAX_ROWS = 96;

// What ch15_attention was called with; strides in elements, of a head's row of numbers.
template <typename T>
struct Call {
    const T *q, *k, *v;
    T* out;
    const int32_t *tables, *starts, *lens;
    long table_stride, heads, kv_heads, dim, page, q_stride, block_stride, slot_stride, head_stride;
    float scale;
    long group, padded;
    bool tiles;
};

// Some queries of one sequence with one KV head, and a range of its context's spans.
struct Work {
    long seq, head, first, count, position, from, to, partial;
};

// Sums of one span or of several: for each row the largest score, the sum of the weights and the
// weighted values.
struct Sums {
    float *top, *total, *mixed;
};

// A thread's own memory, kept from one call to the next.
struct Scratch {
    float *q, *keys, *values, *scores, *span, *all;

    template <typename T>
    explicit Scratch(const Call<T>& c) {
        static thread_local std::vector<float> memory;
        const size_t sizes[] = {size_t(MAX_ROWS * c.dim),         size_t(c.dim * TOKENS),
                                size_t(TOKENS * c.padded),        size_t(MAX_ROWS * TOKENS),
                                size_t(MAX_ROWS * (c.padded + 2)),
                                size_t(MAX_ROWS * (c.padded + 2))};
        size_t total = 0;
        for (size_t size : sizes) total += size;
        if (memory.size() < total) memory.resize(total);
        float** const parts[] = {&q, &keys, &values, &scores, &span, &all};
        float* at = memory.data();
        for (int i = 0; i < 6; at += sizes[i++]) *parts[i] = at;
    }
};

INLINE Sums sums_in(float* memory, long rows) {
    return {memory, memory + rows, memory + 2 * rows};
}

template <long R, bool ADD>
void product(long rows, const float* x, long x_stride, const float* w, long w_stride, long depth,
             float* out, long out_stride) {
    if constexpr (R > 1) {
        if (rows < R)
            return product<R - 1, ADD>(rows, x, x_stride, w, w_stride, depth, out, out_stride);
    }
    tile<R, ADD>(x, x_stride, w, w_stride, depth, out, out_stride);
}

// out (+)= x * w for any number of rows and a multiple of WIDTH columns of rows of `stride`.
template <bool ADD>
void multiply(long rows, const float* x, long x_stride, const float* w, long columns, long stride,
              long depth, float* out) {
    for (long r = 0; r < rows; r += ROWS)
        for (long i = 0; i < columns; i += WIDTH)
            product<ROWS, ADD>(rows - r < ROWS ? rows - r : ROWS, x + r * x_stride, x_stride, w + i,
                               stride, depth, out + r * stride + i, stride);
}

// Where the keys and values of `count` tokens lie.
template <typename T>
void find(const Call<T>& c, const Work& work, long from, long count, const T** keys,
          const T** values) {
    const int32_t* table = c.tables + work.seq * c.table_stride;
    for (long t = 0, block = from / c.page, slot = from % c.page; t < count; ++t) {
        const long at =
            table[block] * c.block_stride + slot * c.slot_stride + work.head * c.head_stride;
        keys[t] = c.k + at, values[t] = c.v + at;
        if (++slot == c.page) slot = 0, ++block;
    }
}

// The values of `count` tokens, and their keys turned so that TOKENS of them lie side by side.
template <typename T>
void gather(const Call<T>& c, const T* const* keys, const T* const* values, long count,
            Scratch& scratch) {
    const long whole = c.dim / LANES * LANES;
    for (long i = 0; i < whole; i += LANES) {
        for (long t = 0; t < count; ++t)
            store(&scratch.values[t * c.padded + i], load(values[t] + i));
        for (long t = 0; t < count; t += LANES) {
            vec square[LANES];
            for (long l = 0; l < LANES; ++l)
                square[l] = t + l < count ? load(keys[t + l] + i) : vec{};
            transpose(square);
            for (long l = 0; l < LANES; ++l) store(&scratch.keys[(i + l) * TOKENS + t], square[l]);
        }
    }
    for (long i = whole; i < c.dim; ++i)
        for (long t = 0; t < count; ++t) {
            scratch.keys[i * TOKENS + t] = widen(keys[t][i]);
            scratch.values[t * c.padded + i] = widen(values[t][i]);
        }
}

// Turns a row of scores into weights and returns the factor for what was summed before.
INLINE float soften(float* row, long seen, float scale, float& top, float& total) {
    ivec lane;
    for (long l = 0; l < LANES; ++l) lane[l] = l;
    vec score[TOKENS / LANES], most = splat(-INFINITY);
    for (long i = 0; i < TOKENS / LANES; ++i) {
        const vec scaled = load(row + i * LANES) * scale;
        score[i] = lane + int(i * LANES) < int(seen) ? scaled : splat(-INFINITY);
        most = score[i] > most ? score[i] : most;
    }
    float lanes[LANES], high = top, part[LANES_OF_SUM] = {};
    store(lanes, most);
    for (long l = 0; l < LANES; ++l) high = lanes[l] > high ? lanes[l] : high;
    const float least = high == -INFINITY ? 0.0f : high;
    for (long i = 0; i < TOKENS / LANES; ++i) {
        const vec weight = exp_of(score[i] - least);
        store(row + i * LANES, weight);
        float* sum = part + i * LANES % LANES_OF_SUM;
        store(sum, load(sum) + weight);
    }
    for (long half = LANES_OF_SUM / 2; half > 0; half /= 2)
        for (long i = 0; i < half; ++i) part[i] += part[i + half];
    const float factor = top == high ? 1.0f : top == -INFINITY ? 0.0f : std::exp(top - high);
    total = total * factor + part[0];
    top = high;
    return factor;
}

// Turns the scores of all rows into weights.
template <typename T>
void soften_rows(const Call<T>& c, const Work& work, long at, long count, Scratch& scratch,
                 Sums sums) {
    for (long r = 0; r < work.count * c.group; ++r) {
        const long seen = work.position + r / c.group + 1 - at;
        const float factor = soften(&scratch.scores[r * TOKENS], seen < count ? seen : count,
                                    c.scale, sums.top[r], sums.total[r]);
        if (factor != 1.0f)
            for (long i = 0; i < c.padded; ++i) sums.mixed[r * c.padded + i] *= factor;
    }
}

#ifdef CH15_TILES
void attend_in_tiles(const Call<bfloat16>& c, const Work& work, long at, long count,
                     const bfloat16* const* keys, const bfloat16* const* values, Scratch& scratch,
                     Sums sums) {
    const long rows = work.count * c.group;
    AttentionTiles<TOKENS> tiles(MAX_ROWS, c.dim);
    tiles.gather(keys, values, count);
    for (long r = 0; r < rows; r += PANEL) tiles.score(r, count, scratch.scores);
    soften_rows(c, work, at, count, scratch, sums);
    for (long r = 0; r < rows; ++r) tiles.weigh(r, scratch.scores + r * TOKENS);
    for (long r = 0; r < rows; r += PANEL)
        tiles.mix(r, rows - r < PANEL ? rows - r : PANEL, count, sums.mixed, c.padded);
}
#endif

// One span of the context for all rows of some work.
template <typename T>
void attend_span(const Call<T>& c, const Work& work, long from, long to, Scratch& scratch,
                 Sums sums) {
    const long rows = work.count * c.group;
    for (long r = 0; r < rows; ++r) sums.top[r] = -INFINITY, sums.total[r] = 0;
    std::memset(sums.mixed, 0, rows * c.padded * sizeof(float));
    const T *keys[TOKENS], *values[TOKENS];
    for (long at = from; at < to; at += TOKENS) {
        const long count = to - at < TOKENS ? to - at : TOKENS;
        find(c, work, at, count, keys, values);
#ifdef CH15_TILES
        if constexpr (std::is_same<T, bfloat16>::value)
            if (c.tiles) {
                attend_in_tiles(c, work, at, count, keys, values, scratch, sums);
                continue;
            }
#endif
        gather(c, keys, values, count, scratch);
        const long columns = (count + WIDTH - 1) / WIDTH * WIDTH;
        multiply<false>(rows, scratch.q, c.dim, scratch.keys, columns, TOKENS, c.dim,
                        scratch.scores);
        soften_rows(c, work, at, count, scratch, sums);
        multiply<true>(rows, scratch.scores, TOKENS, scratch.values, c.padded, c.padded,
                       count, sums.mixed);
    }
}

// Adds a later span to the sums of those before it.
void merge(Sums into, Sums span, long rows, long padded) {
    for (long r = 0; r < rows; ++r) {
        if (span.top[r] == -INFINITY) continue;
        const bool higher = !(span.top[r] <= into.top[r]);
        const float top = higher ? span.top[r] : into.top[r];
        const float old = higher ? std::exp(into.top[r] - top) : 1.0f;
        const float fresh = higher ? 1.0f : std::exp(span.top[r] - top);
        into.top[r] = top;
        into.total[r] = into.total[r] * old + span.total[r] * fresh;
        for (long i = r * padded; i < (r + 1) * padded; ++i)
            into.mixed[i] = into.mixed[i] * old + span.mixed[i] * fresh;
    }
}

template <typename T>
void finish(const Call<T>& c, const Work& work, Sums sums) {
    for (long r = 0; r < work.count * c.group; ++r) {
        const long token = work.first + r / c.group, head = work.head * c.group + r % c.group;
        T row[LANES], *out = c.out + (token * c.heads + head) * c.dim;
        for (long i = 0; i < c.dim; i += LANES) {
            store(row, load(sums.mixed + r * c.padded + i) / sums.total[r]);
            std::memcpy(out + i, row, (c.dim - i < LANES ? c.dim - i : LANES) * sizeof(T));
        }
    }
}

template <typename T>
void load_queries(const Call<T>& c, const Work& work, float* to) {
    for (long r = 0; r < work.count * c.group; ++r) {
        const long token = work.first + r / c.group, head = work.head * c.group + r % c.group;
        const T* q = c.q + token * c.q_stride + head * c.dim;
        for (long i = 0; i < c.dim; ++i) to[r * c.dim + i] = widen(q[i]);
#ifdef CH15_TILES
        if (c.tiles)
            std::memcpy(AttentionTiles<TOKENS>(MAX_ROWS, c.dim).q + r * c.dim, q, 2 * c.dim);
#endif
    }
}

// All spans of some work, merged; of a lone query that is one of several, only its own.
template <typename T>
void attend(const Call<T>& c, const Work& work, Scratch& scratch, float* partials) {
    const long rows = work.count * c.group;
    load_queries(c, work, scratch.q);
    const Sums span = sums_in(scratch.span, rows);
    const Sums all = sums_in(work.partial < 0 ? scratch.all : partials + work.partial, rows);
    const long end = work.position + work.count;
    for (long s = work.from; s < work.to; ++s) {
        const long to = (s + 1) * SPAN < end ? (s + 1) * SPAN : end;
        attend_span(c, work, s * SPAN, to, scratch, s == work.from ? all : span);
        if (s > work.from) merge(all, span, rows, c.padded);
    }
    if (work.partial < 0) finish(c, work, all);
}

// Queries that go together, and for a lone query each span on its own: `partials` counts the
// floats that those leave to be merged.
template <typename T>
std::vector<Work> plan(const Call<T>& c, long seqs, long& partials) {
    std::vector<Work> works;
    const long most = MAX_ROWS / c.group > 1 ? MAX_ROWS / c.group : 1;
    for (long seq = 0; seq < seqs; ++seq) {
        const long start = c.starts[seq], queries = c.starts[seq + 1] - start, len = c.lens[seq];
        if (len < queries || queries == 0) continue;
        for (long head = 0; head < c.kv_heads; ++head)
            for (long first = 0; first < queries; first += most) {
                const long count = queries - first < most ? queries - first : most;
                const long position = len - queries + first;
                const long spans = (position + count + SPAN - 1) / SPAN;
                const Work whole = {seq, head, start + first, count, position, 0, spans, -1};
                if (queries > 1 || spans == 1) {
                    works.push_back(whole);
                    continue;
                }
                for (long s = 0; s < spans; ++s, partials += c.group * (c.padded + 2)) {
                    works.push_back(whole);
                    works.back().from = s, works.back().to = s + 1;
                    works.back().partial = partials;
                }
            }
    }
    return works;
}

template <typename T>
void run(Call<T> c, long seqs, int threads) {
    c.group = c.heads / c.kv_heads;
    c.padded = (c.dim + WIDTH - 1) / WIDTH * WIDTH;
#ifdef CH15_TILES
    static const bool granted = tiles_granted();
    c.tiles = granted && sizeof(T) == 2 && c.dim % BLOCK == 0;
#endif
    long floats = 0;
    const std::vector<Work> works = plan(c, seqs, floats);
    const std::unique_ptr<float[]> partials(new float[floats ? floats : 1]);
    const long count = long(works.size());
#pragma omp parallel num_threads(threads)
    {
        Scratch scratch(c);
#ifdef CH15_TILES
        TileConfig config;
        if (c.tiles) config.use(PANEL, {});
#endif
#pragma omp for schedule(dynamic, 1)
        for (long i = count - 1; i >= 0; --i) attend(c, works[i], scratch, partials.get());
#pragma omp for
        for (long i = 0; i < count; ++i) {
            if (works[i].partial < 0 || works[i].from > 0) continue;
            const Sums all = sums_in(partials.get() + works[i].partial, c.group);
            for (long j = i + 1; j < count && works[j].from > 0; ++j)
                merge(all, sums_in(partials.get() + works[j].partial, c.group), c.group, c.padded);
            finish(c, works[i], all);
        }
#ifdef CH15_TILES
        if (c.tiles) config.release();
#endif
    }
}

}  // namespace

#define CH15_ATTENTION(NAME, T)                                                                    \
    void NAME(const T* q, const T* k, const T* v, T* out, const int32_t* tables,                   \
              const int32_t* starts, const int32_t* lens, long seqs, long table_stride,            \
              long heads, long kv_heads, long dim, long page, long q_stride, long block_stride,    \
              long slot_stride, long head_stride, float scale, int threads) {                      \
        run<T>({q, k, v, out, tables, starts, lens, table_stride, heads, kv_heads, dim, page,      \
                q_stride, block_stride, slot_stride, head_stride, scale, 0, 0, false},             \
               seqs, threads);                                                                     \
    }

extern "C" {
// See paged_attention_compiled.py for the arguments.
CH15_ATTENTION(ch15_attention_float32, float)
CH15_ATTENTION(ch15_attention_bfloat16, bfloat16)
}
