// Per-sample gradient of an embedding table: scatter-add, then the norm over the rows that were touched.
#include "kernel_list.h"

namespace privimage {
namespace ISA_NAMESPACE {

template <class T>
static void sample_grad(const EmbeddingGradParams& p, int64_t b) {
  float* table = p.out + b * p.num_embeddings * p.dim;
  if (!p.accumulate) std::memset(table, 0, static_cast<size_t>(p.num_embeddings * p.dim) * sizeof(float));
  const int64_t* ids = p.ids + b * p.positions;
  const T* g = static_cast<const T*>(p.g) + b * p.positions * p.dim;
  for (int64_t t = 0; t < p.positions; ++t) {
    if (ids[t] == p.padding_idx) continue;
    float* row = table + ids[t] * p.dim;
    for (int64_t i = 0; i < p.dim; ++i) row[i] += to_float(g[t * p.dim + i]);
  }
  p.sq_norms[b] = square_sum(table, p.num_embeddings * p.dim);
}

void embedding_grad(const EmbeddingGradParams& p) {
#pragma omp parallel for schedule(static) num_threads(p.num_threads) if (p.samples > 1 && p.num_threads > 1)
  for (int64_t b = 0; b < p.samples; ++b) {
    if (p.g_dtype == DType::bf16) {
      sample_grad<bf16>(p, b);
    } else {
      sample_grad<float>(p, b);
    }
  }
}

}  // namespace ISA_NAMESPACE
}  // namespace privimage
