// What both matrix products for Hopper are made of: barriers, bulk copies (TMA), tensor cores
// (wgmma), and how a tile of results is written. The instructions are PTX's (sm_90a).
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace {

constexpr int HALF_M = 64;    // rows of one group of warps
constexpr int HALF_N = 128;   // weight rows of one bulk copy
constexpr int TILE_K = 64;    // 128 bytes: one swizzled row
constexpr int STAGES = 4;
constexpr int BUFFERS = 2;   // of results, for each warp
constexpr int THREADS = 384;
constexpr int X_BYTES = HALF_M * TILE_K * 2;
constexpr int W_BYTES = HALF_N * TILE_K * 2;
constexpr int STAGE_BYTES = 2 * X_BYTES + 2 * W_BYTES;
constexpr int OUT_BYTES = 16 * 64 * 2;  // what one warp writes at once: 16 rows of 64
constexpr int OUT_OFFSET = STAGES * STAGE_BYTES;
constexpr int BARRIER_OFFSET = OUT_OFFSET + 8 * BUFFERS * OUT_BYTES;
constexpr int SHARED_BYTES = 1024 + BARRIER_OFFSET + 2 * STAGES * 8;

__device__ __forceinline__ uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive;\nbarrier.cluster.wait;\n" ::: "memory");
}

__device__ __forceinline__ void init_barrier(uint32_t bar, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count));
}

__device__ __forceinline__ void wait_barrier(uint32_t bar, uint32_t parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "AGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra READY;\nbra AGAIN;\nREADY:\n}" ::"r"(bar), "r"(parity) : "memory");
}

__device__ __forceinline__ void expect_bytes(uint32_t bar, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void init_ring(uint32_t base, int readers, int stages = STAGES) {
    for (int stage = 0; stage < stages; ++stage) {
        init_barrier(base + BARRIER_OFFSET + stage * 8, 1);
        init_barrier(base + BARRIER_OFFSET + (stages + stage) * 8, readers);
    }
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void arrive(uint32_t bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}

// Arrives at the barrier at the same place in a block of this cluster.
__device__ __forceinline__ void arrive_at(uint32_t bar, uint32_t rank) {
    asm volatile(
        "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(bar), "r"(rank) : "memory");
}

__device__ __forceinline__ void load(uint32_t to, const CUtensorMap* map, uint32_t bar, int k,
                                     int row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%3, %4}], [%2];" ::"r"(to), "l"(map), "r"(bar), "r"(k), "r"(row)
        : "memory");
}

// Into both blocks of the cluster; each one's own barrier counts the bytes.
__device__ __forceinline__ void load_both(uint32_t to, const CUtensorMap* map, uint32_t bar, int k,
                                          int row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to), "l"(map), "r"(bar),
        "r"(k), "r"(row), "h"(static_cast<uint16_t>(3))
        : "memory");
}

__device__ __forceinline__ void store(const CUtensorMap* map, uint32_t from, int column, int row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];\n"
        "cp.async.bulk.commit_group;" ::"l"(map), "r"(from), "r"(column), "r"(row) : "memory");
}

__device__ __forceinline__ void fence_async() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// A tile of rows of 128 bytes, swizzled by 128: eight rows make a group of 1024 bytes.
__device__ __forceinline__ uint64_t descriptor(uint32_t address) {
    return static_cast<uint64_t>((address & 0x3FFFF) >> 4) | (1ull << 16) | (64ull << 32) |
           (1ull << 62);
}

__device__ __forceinline__ void multiply(float (&d)[128], uint64_t a, uint64_t w, int add) {
#define F4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define F16(i) F4(i), F4(i + 4), F4(i + 8), F4(i + 12)
    asm volatile(
        "{\n.reg .pred add;\nsetp.ne.b32 add, %130, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, "
        "%111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, "
        "%125, %126, %127}, %128, %129, add, 1, 1, 0, 0;\n}"
        : F16(0), F16(16), F16(32), F16(48), F16(64), F16(80), F16(96), F16(112)
        : "l"(a), "l"(w), "r"(add));
#undef F16
#undef F4
}

struct Ring {
    uint32_t stage = 0, phase = 0;
    __device__ __forceinline__ void next() {
        if (++stage == STAGES) stage = 0, phase ^= 1;
    }
};

// Says, to each block that fills it, that this group has read a stage.
template <int BLOCKS>
__device__ __forceinline__ void free_stage(uint32_t empty) {
    const uint32_t thread = threadIdx.x % 128;
    if constexpr (BLOCKS == 1) {
        if (thread == 0) arrive(empty);
    } else if (thread < BLOCKS) {
        arrive_at(empty, thread);
    }
}

// One group's products of `count` stages: d = its 64 rows of x, times the 256 rows of w.
template <int BLOCKS>
__device__ __forceinline__ void multiply_steps(float (&d)[128], Ring& ring, uint32_t base,
                                               int group, int count) {
    const uint32_t full = base + BARRIER_OFFSET, empty = full + STAGES * 8;
    const uint64_t x_first = descriptor(base + group * X_BYTES);
    const uint64_t w_first = descriptor(base + 2 * X_BYTES);
    uint32_t last = 0;
    for (int step = 0; step < count; ++step, ring.next()) {
        wait_barrier(full + ring.stage * 8, ring.phase);
        const uint64_t x = x_first + ring.stage * (STAGE_BYTES / 16);
        const uint64_t w = w_first + ring.stage * (STAGE_BYTES / 16);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int k = 0; k < 4; ++k) multiply(d, x + 2 * k, w + 2 * k, step > 0 || k > 0);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        // The product before this one is done: its stage may be filled again.
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
        if (step > 0) free_stage<BLOCKS>(empty + last * 8);
        last = ring.stage;
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    free_stage<BLOCKS>(empty + last * 8);
#pragma unroll
    for (int j = 0; j < 128; ++j) asm volatile("" : "+f"(d[j])::"memory");
}

__device__ __forceinline__ uint32_t pack(float low, float high) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&both);
}

__device__ __forceinline__ float gated(float gate, float up) {
    return __fdividef(gate, 1.0f + __expf(-gate)) * up;
}

// Each warp writes its 16 rows, 64 columns at a time, through two buffers of its own.
template <bool GATED>
__device__ __forceinline__ void write(float (&d)[128], const CUtensorMap* out_map, uint32_t base,
                                      int warp, int row, int column) {
    const uint32_t buffers = base + OUT_OFFSET + warp * BUFFERS * OUT_BYTES;
    const int lane = threadIdx.x % 32;
    const int at = lane % 16;  // row whose 16 bytes this lane addresses
#pragma unroll
    for (int part = 0; part < (GATED ? 2 : 4); ++part) {
        const uint32_t buffer = buffers + part % BUFFERS * OUT_BYTES;
        if (lane == 0) asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(BUFFERS - 1) : "memory");
        __syncwarp();
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
            uint32_t v[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int j = part * 32 + pair * 8 + i * 2;
                if constexpr (GATED)
                    v[i] = pack(gated(d[j], d[j + 64]), gated(d[j + 1], d[j + 65]));
                else
                    v[i] = pack(d[j], d[j + 1]);
            }
            const uint32_t to = buffer + at * 128 + ((pair * 2 + lane / 16) ^ (at % 8)) * 16;
            asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                             to),
                         "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
                         : "memory");
        }
        fence_async();
        __syncwarp();
        if (lane == 0) store(out_map, buffer, column + part * 64, row);
    }
}

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                            const cuuint64_t*, const cuuint32_t*, const cuuint32_t*,
                            CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                            CUtensorMapFloatOOBfill);

Encode find_encode() {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault,
                                         &result) != cudaSuccess)
        return nullptr;
    return reinterpret_cast<Encode>(found);
}

bool describe(CUtensorMap* map, const void* data, int64_t rows, int64_t width, int64_t stride,
              int box_rows) {
    static const Encode encode = find_encode();
    const cuuint64_t shape[2] = {cuuint64_t(width), cuuint64_t(rows)};
    const cuuint64_t strides[1] = {cuuint64_t(stride) * 2};
    const cuuint32_t box[2] = {64, cuuint32_t(box_rows)}, steps[2] = {1, 1};
    return encode && encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(data),
                            shape, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                            CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                            CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// Loads a kernel, which must not happen first while a graph is captured.
template <typename Kernel>
cudaError_t prepare(Kernel* kernel) {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED_BYTES);
}

// A launch in clusters; `early`: it may begin before the kernel before it has ended.
struct Launch {
    cudaLaunchAttribute attributes[2] = {};
    cudaLaunchConfig_t config = {};
    Launch(int blocks, int cluster, bool early, cudaStream_t stream) {
        attributes[0].id = cudaLaunchAttributeClusterDimension;
        attributes[0].val.clusterDim.x = cluster;
        attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
        attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[1].val.programmaticStreamSerializationAllowed = 1;
        config.gridDim = dim3(blocks);
        config.blockDim = dim3(THREADS);
        config.dynamicSmemBytes = SHARED_BYTES;
        config.stream = stream;
        config.attrs = attributes;
        config.numAttrs = early ? 2 : 1;
    }
    template <typename Kernel, typename... Arguments>
    cudaError_t run(Kernel* kernel, const Arguments&... arguments) {
        const cudaError_t error = prepare(kernel);
        return error ? error : cudaLaunchKernelEx(&config, kernel, arguments...);
    }
};

}  // namespace
