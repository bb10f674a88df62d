// The product of many rows with a weight on Hopper's tensor cores: out = x @ w^T.
//
// After CUTLASS's warp-specialised persistent kernels, DeepGEMM (DeepSeek, 2025) and "Outperforming
// cuBLAS on H100" (Shankhdhar, 2024); written anew. A block of 12 warps works on tiles of 128 x 256.
// One warp starts bulk copies (TMA) into a ring of four stages, also for the tile to come; two
// groups of four warps multiply (wgmma, m64n256k16), each its 64 rows, and write while the other
// goes on. Two blocks form a cluster and share a tile of the weight: each copies one half of it
// into both (multicast), so that the L2 cache is read a third less. See hopper_gemm.py.
#include "hopper_parts.cuh"

namespace {

constexpr int TILE_ROWS = 4 * HALF_M;  // of both blocks of a cluster
constexpr int GROUP = 16;              // tiles of rows that share a column while it is in the cache

struct Params {
    int tiles, items, columns, steps;
    int w_half;  // weight rows between the two halves of a tile: gate and up, or neighbours
};

struct Item {
    int row, column;
};

// Work item -> its place: a group of tiles of rows for each column of tiles.
__device__ __forceinline__ Item locate(const Params& p, int item, int rank, int width) {
    const int per_group = GROUP * p.columns;
    const int first = item / per_group * GROUP, within = item % per_group;
    const int size = min(p.tiles - first, GROUP);
    return {(first + within % size) * TILE_ROWS + rank * 2 * HALF_M, within / size * width};
}

__device__ __forceinline__ void copy_warp(const CUtensorMap* x_map, const CUtensorMap* w_map,
                                          const Params& p, uint32_t base, int rank, int width) {
    const uint32_t full = base + BARRIER_OFFSET, empty = full + STAGES * 8;
    Ring ring;
    for (int i = blockIdx.x / 2; i < p.items; i += gridDim.x / 2) {
        const Item item = locate(p, i, rank, width);
        const int w_row = item.column + rank * p.w_half;
        for (int step = 0; step < p.steps; ++step, ring.next()) {
            const uint32_t bar = full + ring.stage * 8, x = base + ring.stage * STAGE_BYTES;
            const int k = step * TILE_K;
            // Both blocks are done with the stage: half of it is copied into the other one too.
            wait_barrier(empty + ring.stage * 8, ring.phase ^ 1);
            expect_bytes(bar, STAGE_BYTES);
            load_both(x + 2 * X_BYTES + rank * W_BYTES, w_map, bar, k, w_row);
            load(x, x_map, bar, k, item.row);
            load(x + X_BYTES, x_map, bar, k, item.row + HALF_M);
        }
    }
}

template <bool GATED>
__global__ void __launch_bounds__(THREADS, 1)
    gemm_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap w_map,
                const __grid_constant__ CUtensorMap out_map, const Params p) {
    extern __shared__ uint8_t shared[];
    const uint32_t base = (shared_address(shared) + 1023) & ~1023u;
    constexpr int WIDTH = GATED ? HALF_N : 2 * HALF_N;
    const int rank = static_cast<int>(cluster_rank());
    if (threadIdx.x == 0) init_ring(base, 4);  // two groups of two blocks free a stage
    cluster_sync();
    // 12 warps of 168 registers a thread: what the copying warps leave, the others take.
    const int group = __shfl_sync(0xFFFFFFFF, threadIdx.x / 128, 0) - 1;
    if (group < 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x == 0) copy_warp(&x_map, &w_map, p, base, rank, WIDTH);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        const int warp = threadIdx.x / 32 - 4;
        float d[128];
        Ring ring;
        for (int i = blockIdx.x / 2; i < p.items; i += gridDim.x / 2) {
            const Item item = locate(p, i, rank, WIDTH);
            multiply_steps<2>(d, ring, base, group, p.steps);
            write<GATED>(d, &out_map, base, warp, item.row + warp * 16, item.column);
        }
        asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
    }
    __syncwarp();
    // A block's memory must be there until the other has arrived at it for the last time.
    cluster_sync();
}

template <bool GATED>
cudaError_t run(const CUtensorMap& x, const CUtensorMap& w, const CUtensorMap& out, Params p,
                int width, int blocks, cudaStream_t stream) {
    constexpr int WIDTH = GATED ? HALF_N : 2 * HALF_N;
    p.columns = (width + WIDTH - 1) / WIDTH;
    p.items = p.tiles * p.columns;
    return Launch(blocks / 2 * 2, 2, false, stream).run(gemm_kernel<GATED>, x, w, out, p);
}

}  // namespace

// Returns a cudaError_t. `width`: columns of out; a gated weight has twice as many rows.
extern "C" int ch15_gemm(const void* x, const void* w, void* out, int num_rows, int64_t x_stride,
                         int width, int depth, int gated, int blocks, void* stream) {
    Params p = {};
    p.tiles = (num_rows + TILE_ROWS - 1) / TILE_ROWS;
    p.steps = (depth + TILE_K - 1) / TILE_K;
    p.w_half = gated ? width : HALF_N;
    CUtensorMap x_map, w_map, out_map;
    if (!describe(&x_map, x, num_rows, depth, x_stride, HALF_M) ||
        !describe(&w_map, w, gated ? 2 * width : width, depth, depth, HALF_N) ||
        !describe(&out_map, out, num_rows, width, width, 16))
        return cudaErrorInvalidValue;
    auto s = static_cast<cudaStream_t>(stream);
    return gated ? run<true>(x_map, w_map, out_map, p, width, blocks, s)
                 : run<false>(x_map, w_map, out_map, p, width, blocks, s);
}

extern "C" int ch15_gemm_prepare() {
    const cudaError_t error = prepare(gemm_kernel<true>);
    return error ? error : prepare(gemm_kernel<false>);
}
