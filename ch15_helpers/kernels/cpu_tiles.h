// The processor's matrix tiles (AMX), where it has them: 16 rows of 64 bytes, and a product of two
// of them, of bfloat16 numbers summed in float32.
#pragma once
#include "cpu_vector.h"

#if defined(__linux__) && defined(__AMX_BF16__) && defined(__AVX512BW__) && defined(__AVX512BF16__)
#define CH15_TILES
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <initializer_list>

#define TILE_LOAD_ROWS(T, FROM, STRIDE) \
    asm volatile("tileloadd (%0,%1,1), %%tmm" #T ::"r"(FROM), "r"((long)(STRIDE)) : "memory")
#define TILE_LOAD(T, FROM) TILE_LOAD_ROWS(T, FROM, 64)
#define TILE_STORE_ROWS(T, TO, STRIDE) \
    asm volatile("tilestored %%tmm" #T ", (%0,%1,1)" ::"r"(TO), "r"((long)(STRIDE)) : "memory")
#define TILE_STORE(T, TO) TILE_STORE_ROWS(T, TO, 64)
#define TILE_ZERO(T) asm volatile("tilezero %%tmm" #T ::)
#define TILE_DOT(SUM, X, W) \
    asm volatile("tdpbf16ps %%tmm" #W ", %%tmm" #X ", %%tmm" #SUM ::)

// A tile of a weight: BLOCK inputs by PANEL outputs; of x: up to PANEL rows by BLOCK inputs.
constexpr long BLOCK = 32, PANEL = 16, TILE = BLOCK * PANEL;

// What a thread tells its processor before it uses tiles: `rows` in those of `with_rows`, else 16.
struct TileConfig {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};

    INLINE void use(long some, std::initializer_list<int> with_rows) {
        TileConfig config;
        for (int tile : with_rows) config.rows[tile] = uint8_t(some);
        asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
    }
    INLINE void release() { asm volatile("tilerelease" ::); }
};

// Linux hands tiles out on request, to the whole process.
INLINE bool tiles_granted() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }
#endif
