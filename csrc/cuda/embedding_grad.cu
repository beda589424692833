// Per-sample gradient of an embedding table. A thread owns one component of one sample's table and walks the positions
// in order, so that equal ids need no atomics and the bits are the same in every run.
#include "load.cuh"
#include "reduce.cuh"

namespace privimage {
namespace DEVICE_NAMESPACE {
namespace {

constexpr int kBlock = 128;

__global__ void __launch_bounds__(kBlock) embedding_kernel(EmbeddingGradParams p) {
  const int64_t chunks = (p.dim + kBlock - 1) / kBlock;
  const int64_t sample = blockIdx.x / chunks, d = blockIdx.x % chunks * kBlock + threadIdx.x;
  if (d >= p.dim) return;
  float* table = p.out + sample * p.num_embeddings * p.dim + d;
  if (!p.accumulate)
    for (int64_t v = 0; v < p.num_embeddings; ++v) table[v * p.dim] = 0;
  for (int64_t t = sample * p.positions; t < (sample + 1) * p.positions; ++t) {
    const int64_t id = p.ids[t];
    if (p.padding_idx >= 0 && id == p.padding_idx) continue;
    if (id < 0 || id >= p.num_embeddings) {
      table[0] = __uint_as_float(0x7fc00000u);  // NaN: the sample is rejected; torch's lookup refused it already
      continue;
    }
    table[id * p.dim] += load_float(p.g, p.g_dtype, t * p.dim + d);
  }
}

}  // namespace

void embedding_grad(const EmbeddingGradParams& p, void* stream) {
  const char* op = __func__;
  if (p.samples == 0) return;
  if (p.dim > 0) {
    const unsigned grid = blocks_of(op, p.samples * ((p.dim + kBlock - 1) / kBlock));
    LAUNCH(op, embedding_kernel, grid, kBlock, 0, stream, p);
  }
  LAUNCH(op, row_norms_kernel<kThreads>, blocks_of(op, p.samples), kThreads, 0, stream, p.out, p.num_embeddings * p.dim, p.sq_norms);
}

}  // namespace DEVICE_NAMESPACE
}  // namespace privimage
