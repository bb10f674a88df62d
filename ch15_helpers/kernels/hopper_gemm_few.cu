// SwiGLU of the product of few rows (128 at most) with a weight, as fast as that can be read.
//
// Each block takes one tile of 128 results: its gate rows and its up rows of the weight. Copies of
// them begin before the kernel that makes the rows has ended (programmatic dependent launch), four
// stages deep. See hopper_gemm.py for the arguments.
#include "hopper_parts.cuh"

namespace {

struct FewParams {
    int width, steps, halves;  // halves: of 64 rows
};

__device__ __forceinline__ void copy_few(const CUtensorMap* x_map, const CUtensorMap* w_map,
                                         const FewParams& p, uint32_t base, int w_row) {
    const uint32_t full = base + BARRIER_OFFSET, empty = full + STAGES * 8;
    Ring ring;
    auto start = [&](int step, uint32_t stage) {
        const uint32_t w = base + stage * STAGE_BYTES + 2 * X_BYTES, bar = full + stage * 8;
        expect_bytes(bar, 2 * W_BYTES + p.halves * X_BYTES);
        load(w, w_map, bar, step * TILE_K, w_row);
        load(w + W_BYTES, w_map, bar, step * TILE_K, w_row + p.width);
    };
    const int early = min(p.steps, STAGES);
    for (int step = 0; step < early; ++step) start(step, step);
    asm volatile("griddepcontrol.wait;" ::: "memory");
    for (int step = 0; step < p.steps; ++step, ring.next()) {
        if (step >= early) {
            wait_barrier(empty + ring.stage * 8, ring.phase ^ 1);
            start(step, ring.stage);
        }
        const uint32_t x = base + ring.stage * STAGE_BYTES, bar = full + ring.stage * 8;
        load(x, x_map, bar, step * TILE_K, 0);
        if (p.halves > 1) load(x + X_BYTES, x_map, bar, step * TILE_K, HALF_M);
    }
}

__global__ void __launch_bounds__(THREADS, 1)
    few_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap w_map,
               const __grid_constant__ CUtensorMap out_map, const FewParams p) {
    extern __shared__ uint8_t shared[];
    const uint32_t base = (shared_address(shared) + 1023) & ~1023u;
    const int column = blockIdx.x * HALF_N;
    if (threadIdx.x == 0) init_ring(base, p.halves);
    __syncthreads();
    const int group = __shfl_sync(0xFFFFFFFF, threadIdx.x / 128, 0) - 1;
    if (group < 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x == 0) copy_few(&x_map, &w_map, p, base, column);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        // What is written may be what the kernel before this one still reads.
        asm volatile("griddepcontrol.wait;" ::: "memory");
        if (group < p.halves) {
            const int warp = threadIdx.x / 32 - 4;
            float d[128];
            Ring ring;
            multiply_steps<1>(d, ring, base, group, p.steps);
            write<true>(d, &out_map, base, warp, warp * 16, column);
            asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
        }
    }
}

}  // namespace

// Returns a cudaError_t. As ch15_gemm, gated; one block for each 128 columns of out.
extern "C" int ch15_gemm_few(const void* x, const void* w, void* out, int num_rows,
                             int64_t x_stride, int width, int depth, void* stream) {
    const FewParams p = {width, (depth + TILE_K - 1) / TILE_K, num_rows > HALF_M ? 2 : 1};
    CUtensorMap x_map, w_map, out_map;
    if (!describe(&x_map, x, num_rows, depth, x_stride, HALF_M) ||
        !describe(&w_map, w, 2 * width, depth, depth, HALF_N) ||
        !describe(&out_map, out, num_rows, width, width, 16))
        return cudaErrorInvalidValue;
    Launch launch((width + HALF_N - 1) / HALF_N, 1, true, static_cast<cudaStream_t>(stream));
    return launch.run(few_kernel, x_map, w_map, out_map, p);
}

extern "C" int ch15_gemm_few_prepare() { return prepare(few_kernel); }
