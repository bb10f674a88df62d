// SwiGLU of the product of few rows (128 at most) with a weight, as fast as that can be read.
//
// Each block takes one tile of results: its gate rows and its up rows of the weight, as many as
// make the tiles of all blocks fill the GPU once. Copies of them begin before the kernel that makes
// the rows has ended (programmatic dependent launch), as many stages deep as memory allows. See
// hopper_gemm.py for the arguments.
#include "hopper_parts.cuh"

namespace {

struct FewParams {
    int num_rows, width, steps, halves;  // halves: of 64 rows
};

// N: weight rows of a tile, half of them gate, half of them up.
template <int N>
struct Tile {
    static constexpr int WIDTH = N / 2;
    static constexpr int STAGE = 2 * X_BYTES + N * TILE_K * 2;
    static constexpr int COUNT = BARRIER_OFFSET / STAGE;  // of stages
    static constexpr int PITCH = WIDTH * 2 + 16;          // bytes of a row of results: no conflicts
    static constexpr int SHARED = 1024 + BARRIER_OFFSET + 2 * COUNT * 8;
    static_assert(SHARED <= 232448 && 2 * HALF_M * PITCH <= BARRIER_OFFSET);
};

template <int N>
struct TileRing {
    uint32_t stage = 0, phase = 0;
    __device__ __forceinline__ void next() {
        if (++stage == Tile<N>::COUNT) stage = 0, phase ^= 1;
    }
};

#define P0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
#define P1 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
#define P2 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define P3 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, " \
    "%110, %111"
#define D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define D16(i) D4(i), D4(i + 4), D4(i + 8), D4(i + 12)
#define D32(i) D16(i), D16(i + 16)

__device__ __forceinline__ void multiply(float (&d)[96], uint64_t a, uint64_t w, int add) {
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %98, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n192k16.f32.bf16.bf16 {" P0 P1 P2
                 "}, %96, %97, add, 1, 1, 0, 0;\n}"
                 : D32(0), D32(32), D32(64)
                 : "l"(a), "l"(w), "r"(add));
}

__device__ __forceinline__ void multiply(float (&d)[112], uint64_t a, uint64_t w, int add) {
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %114, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n224k16.f32.bf16.bf16 {" P0 P1 P2 P3
                 "}, %112, %113, add, 1, 1, 0, 0;\n}"
                 : D32(0), D32(32), D32(64), D16(96)
                 : "l"(a), "l"(w), "r"(add));
}

template <int N>
__device__ __forceinline__ void copy_few(const CUtensorMap* x_map, const CUtensorMap* w_map,
                                         const FewParams& p, uint32_t base, int w_row) {
    using T = Tile<N>;
    const uint32_t full = base + BARRIER_OFFSET, empty = full + T::COUNT * 8;
    TileRing<N> ring;
    auto start = [&](int step, uint32_t stage) {
        const uint32_t w = base + stage * T::STAGE + 2 * X_BYTES, bar = full + stage * 8;
        expect_bytes(bar, N * TILE_K * 2 + p.halves * X_BYTES);
        load(w, w_map, bar, step * TILE_K, w_row);
        load(w + N * TILE_K, w_map, bar, step * TILE_K, w_row + p.width);
    };
    const int early = min(p.steps, T::COUNT);
    for (int step = 0; step < early; ++step) start(step, step);
    asm volatile("griddepcontrol.wait;" ::: "memory");
    for (int step = 0; step < p.steps; ++step, ring.next()) {
        if (step >= early) {
            wait_barrier(empty + ring.stage * 8, ring.phase ^ 1);
            start(step, ring.stage);
        }
        const uint32_t x = base + ring.stage * T::STAGE, bar = full + ring.stage * 8;
        load(x, x_map, bar, step * TILE_K, 0);
        if (p.halves > 1) load(x + X_BYTES, x_map, bar, step * TILE_K, HALF_M);
    }
}

// One group's product: d = its 64 rows of x, times the N rows of w.
template <int N>
__device__ __forceinline__ void multiply_tile(float (&d)[N / 2], uint32_t base, int group,
                                              int count) {
    using T = Tile<N>;
    const uint32_t full = base + BARRIER_OFFSET, empty = full + T::COUNT * 8;
    const uint64_t x_first = descriptor(base + group * X_BYTES);
    const uint64_t w_first = descriptor(base + 2 * X_BYTES);
    TileRing<N> ring;
    uint32_t last = 0;
    for (int step = 0; step < count; ++step, ring.next()) {
        wait_barrier(full + ring.stage * 8, ring.phase);
        const uint64_t x = x_first + ring.stage * (T::STAGE / 16);
        const uint64_t w = w_first + ring.stage * (T::STAGE / 16);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int k = 0; k < 4; ++k) multiply(d, x + 2 * k, w + 2 * k, step > 0 || k > 0);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        // The product before this one is done: its stage may be filled again.
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
        if (step > 0) free_stage<1>(empty + last * 8);
        last = ring.stage;
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
    for (int j = 0; j < N / 2; ++j) asm volatile("" : "+f"(d[j])::"memory");
}

// A thread's results, from where they are multiplied to rows in shared memory.
template <int N>
__device__ __forceinline__ void stage_results(const float (&d)[N / 2], uint32_t base, int row) {
    using T = Tile<N>;
    const int lane = threadIdx.x % 32;
    const uint32_t to = base + (row + lane / 4) * T::PITCH + lane % 4 * 4;
#pragma unroll
    for (int j = 0; j < N / 4; j += 4) {
        const int u = j + N / 4;
#pragma unroll
        for (int i = 0; i < 4; i += 2)
            asm volatile("st.shared.b32 [%0], %1;" ::"r"(to + j * 4 + i * 4 * T::PITCH),
                         "r"(pack(gated(d[j + i], d[u + i]), gated(d[j + i + 1], d[u + i + 1])))
                         : "memory");
    }
}

// All threads of both groups: 16 bytes each, so that rows are written in whole pieces.
template <int N>
__device__ __forceinline__ void write_rows(__nv_bfloat16* out, const FewParams& p, uint32_t base,
                                           int column) {
    using T = Tile<N>;
    constexpr int PIECES = T::WIDTH / 8;
    for (int i = threadIdx.x - 128; i < p.num_rows * PIECES; i += 256) {
        const int row = i / PIECES, at = i % PIECES * 8;
        uint4 v;
        asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                     : "r"(base + row * T::PITCH + at * 2) : "memory");
        if (column + at < p.width)
            *reinterpret_cast<uint4*>(out + int64_t(row) * p.width + column + at) = v;
    }
}

template <int N>
__global__ void __launch_bounds__(THREADS, 1)
    few_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap w_map,
               __nv_bfloat16* out, const FewParams p) {
    using T = Tile<N>;
    extern __shared__ uint8_t shared[];
    const uint32_t base = (shared_address(shared) + 1023) & ~1023u;
    const int column = blockIdx.x * T::WIDTH;
    if (threadIdx.x == 0) init_ring(base, p.halves, T::COUNT);
    __syncthreads();
    const int group = __shfl_sync(0xFFFFFFFF, threadIdx.x / 128, 0) - 1;
    if (group < 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x == 0) copy_few<N>(&x_map, &w_map, p, base, column);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        // What is written may be what the kernel before this one still reads.
        asm volatile("griddepcontrol.wait;" ::: "memory");
        float d[N / 2];
        if (group < p.halves) multiply_tile<N>(d, base, group, p.steps);
        asm volatile("bar.sync 1, 256;" ::: "memory");  // nobody reads a stage any more
        if (group < p.halves) stage_results<N>(d, base, (threadIdx.x / 32 - 4) * 16);
        asm volatile("bar.sync 1, 256;" ::: "memory");
        write_rows<N>(out, p, base, column);
    }
}

template <int N>
cudaError_t prepare_few() {
    return cudaFuncSetAttribute(few_kernel<N>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                Tile<N>::SHARED);
}

template <int N>
cudaError_t run_few(const void* x, const void* w, void* out, const FewParams& p, int64_t x_stride,
                    int depth, cudaStream_t stream) {
    CUtensorMap x_map, w_map;
    if (!describe(&x_map, x, p.num_rows, depth, x_stride, HALF_M) ||
        !describe(&w_map, w, 2 * p.width, depth, depth, N / 2))
        return cudaErrorInvalidValue;
    Launch launch((p.width + N / 2 - 1) / (N / 2), 1, true, stream);
    launch.config.dynamicSmemBytes = Tile<N>::SHARED;
    const cudaError_t error = prepare_few<N>();
    return error ? error
                 : cudaLaunchKernelEx(&launch.config, few_kernel<N>, x_map, w_map,
                                      static_cast<__nv_bfloat16*>(out), p);
}

}  // namespace

// Returns a cudaError_t. As ch15_gemm, gated; one block for each `tile` columns of out: 96, 112 or
// 128.
extern "C" int ch15_gemm_few(const void* x, const void* w, void* out, int num_rows,
                             int64_t x_stride, int width, int depth, int tile, void* stream) {
    const FewParams p = {num_rows, width, (depth + TILE_K - 1) / TILE_K, num_rows > HALF_M ? 2 : 1};
    auto s = static_cast<cudaStream_t>(stream);
    if (tile == 96) return run_few<192>(x, w, out, p, x_stride, depth, s);
    if (tile == 112) return run_few<224>(x, w, out, p, x_stride, depth, s);
    return tile == 128 ? run_few<256>(x, w, out, p, x_stride, depth, s) : cudaErrorInvalidValue;
}

extern "C" int ch15_gemm_few_prepare() {
    cudaError_t error = prepare_few<192>();
    if (!error) error = prepare_few<224>();
    return error ? error : prepare_few<256>();
}
