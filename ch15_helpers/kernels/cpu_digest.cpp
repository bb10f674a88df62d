// Digests of rows of 64-bit words, as disagg/checksum.py defines them: one pass at the speed at
// which memory is read. Sums are modulo 2**64, so any order gives the same bits.

#include <cstdint>

namespace {

constexpr long LINE = 8 * 127, FOLD = 16;

// Adds lines that lie one below the other to `sum`, or begins it with them.
template <long LINES>
inline void fold(const uint64_t* words, bool first, uint64_t* __restrict sum) {
    for (long c = 0; c < LINE; ++c) {
        uint64_t total = first ? 0 : sum[c];
        for (long l = 0; l < LINES; ++l) total += words[l * LINE + c];
        sum[c] = total;
    }
}

inline uint64_t dot(const uint64_t* words, const uint64_t* weights, long count) {
    uint64_t total = 0;
    for (long i = 0; i < count; ++i) total += words[i] * weights[i];
    return total;
}

}  // namespace

extern "C" {

// Rows are `stride` bytes apart; `lines` lines of each are folded, `rest` are the weights of the
// words after them.
void ch15_digest(const char* rows, long count, long stride, long num_words, long lines,
                 const uint64_t* columns, const uint64_t* groups, const uint64_t* rest,
                 uint64_t* digests) {
    uint64_t sum[LINE];
    for (long r = 0; r < count; ++r) {
        const uint64_t* words = (const uint64_t*)(rows + r * stride);
        uint64_t total = dot(words + lines * LINE, rest, num_words - lines * LINE);
        for (long start = 0; start < lines; start += FOLD) {
            const long stop = start + FOLD < lines ? start + FOLD : lines;
            long at = start;
            for (; at + 4 <= stop; at += 4) fold<4>(words + at * LINE, at == start, sum);
            for (; at < stop; ++at) fold<1>(words + at * LINE, at == start, sum);
            total += dot(sum, columns, LINE) * groups[start / FOLD];
        }
        digests[r] = total;
    }
}
}
