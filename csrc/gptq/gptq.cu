#include <cuda_runtime.h>

#include "gptq/gptq.h"

namespace pgolf {
namespace {

// A thread has a row. Its differences and the block's part of the factor stay in shared memory; the sums of 16 columns
// at a time in registers. 96 KB, so that two thread blocks fit a multiprocessor; ptxas does not see them, they are
// asked for at the launch.
constexpr int most_columns = 128, panel = 16, rows_a_block = 64;

struct Shared {
  float factor[most_columns][most_columns];      // zero past the block's width
  float difference[most_columns][rows_a_block];  // [column][row], read by the thread that wrote it only
};
static_assert(sizeof(Shared) == 96 * 1024, "bench/kernels/static_report.py counts with it");

// The 16 numbers at `from`, the same for all threads of a warp.
__device__ __forceinline__ void load_panel(float (&to)[panel], const float* from) {
#pragma unroll
  for (int i = 0; i < panel / 4; ++i) {
    const float4 v = reinterpret_cast<const float4*>(from)[i];
    to[4 * i] = v.x, to[4 * i + 1] = v.y, to[4 * i + 2] = v.z, to[4 * i + 3] = v.w;
  }
}

__global__ void __launch_bounds__(rows_a_block) round_block(const BlockRounding block, int64_t row_tiles) {
  extern __shared__ float4 memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const int64_t matrix = blockIdx.x / row_tiles, row = blockIdx.x % row_tiles * rows_a_block + threadIdx.x;
  const bool is_row = row < block.rows;
  const float* factor = block.factor + (matrix * block.n + block.start) * block.n + block.start;
  for (int i = threadIdx.x; i < most_columns * most_columns; i += rows_a_block) {
    const int k = i / most_columns, column = i % most_columns;
    shared.factor[k][column] = k < block.width && column < block.width ? factor[k * block.n + column] : 0.0f;
  }
  __syncthreads();

  const int64_t at = (matrix * block.n + block.start) * block.rows + row;  // column 0 of the block in this row
  const float* weight = block.weight + at;
  const float* work = block.work + at;
  int8_t* values = block.values + at;
  float* difference = block.difference + matrix * block.width * block.rows + row;
  const float scale = is_row ? block.scale[matrix * block.rows + row] : 1.0f;
  const float limit = static_cast<float>(block.limit);
  const int panels = (block.width + panel - 1) / panel;

  for (int first = (panels - 1) * panel; first >= 0; first -= panel) {
    float sum[panel], own[panel], v[panel];
#pragma unroll
    for (int j = 0; j < panel; ++j) {
      const bool is_there = is_row && first + j < block.width;
      sum[j] = is_there ? work[(first + j) * block.rows] : 0.0f;
      own[j] = is_there ? weight[(first + j) * block.rows] : 0.0f;
    }
#pragma unroll 2
    for (int k = panels * panel - 1; k >= first + panel; --k) {
      const float d = shared.difference[k][threadIdx.x];
      load_panel(v, &shared.factor[k][first]);
#pragma unroll
      for (int j = 0; j < panel; ++j) sum[j] += d * v[j];
    }
#pragma unroll
    for (int j = panel - 1; j >= 0; --j) {
      const float q = rintf(fminf(fmaxf(sum[j] / scale, -limit), limit));
      const float d = own[j] - q * scale;
      shared.difference[first + j][threadIdx.x] = d;
      if (is_row && first + j < block.width) {
        values[(first + j) * block.rows] = static_cast<int8_t>(q);
        difference[(first + j) * block.rows] = d;
      }
      load_panel(v, &shared.factor[first + j][first]);
#pragma unroll
      for (int i = 0; i < j; ++i) sum[i] += d * v[i];
    }
  }
}

}  // namespace

std::string round_block_cuda(const BlockRounding& block, void* stream) {
  const int64_t row_tiles = (block.rows + rows_a_block - 1) / rows_a_block, blocks = block.count * row_tiles;
  if (blocks == 0 || block.width == 0) return "";
  if (blocks > 0x7fffffff) return "more than 2^31 - 1 thread blocks";
  constexpr int bytes = sizeof(Shared);
  cudaError_t status = cudaFuncSetAttribute(round_block, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status == cudaSuccess) {
    round_block<<<static_cast<unsigned>(blocks), rows_a_block, bytes, static_cast<cudaStream_t>(stream)>>>(block,
                                                                                                      row_tiles);
    status = cudaGetLastError();
  }
  return status == cudaSuccess ? "" : cudaGetErrorString(status);
}

}  // namespace pgolf
