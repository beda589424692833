// Squared norms of per-sample weight gradients from inner products of pairs of positions:
// |W_b|^2 = sum over s, t of <x_s, x_t> <g_s, g_t>, with x_s the input under the kernel at position s.
//
// In double on the matrix units (67 TFLOP/s on an H100): the sum may be far below its terms, and a norm that is too
// small would break the clip bound. A block makes one 64 × 64 tile of pairs, both inner products, and their sum of
// products; tiles above the diagonal count twice.
#include "conv_geometry.cuh"
#include "load.cuh"
#include "mma.cuh"
#include "reduce.cuh"

namespace privimage {
namespace DEVICE_NAMESPACE {
namespace {

constexpr int kSide = 64, kDepth = 16, kBlock = 128, kPart = 32;  // a warp makes kPart × kPart pairs
constexpr int kRow = kSide + 4;                                  // a half-warp's fragment lies in sixteen banks

using Inner = double[kPart / 8][kPart / 8][2];

// (kDepth, kSide): components d0… of the vectors at positions n0…, zero beyond the end.
template <bool kInput, class Element>
static __device__ __forceinline__ void fetch(const ConvGeometry& q, const Element* from, int n0, int d0, double* tile) {
  const bool across = (kInput ? q.x_stride[0] : q.g_stride[0]) == 1;  // neighbouring threads take neighbours in memory
  for (int e = static_cast<int>(threadIdx.x); e < kDepth * kSide; e += kBlock) {
    const int d = across ? e % kDepth : e / kSide, s = across ? e / kDepth : e % kSide;
    double value = 0;
    if (n0 + s < q.positions && d0 + d < (kInput ? q.columns : q.out_group)) {
      const ConvGeometry::Position position(q, n0 + s);
      int64_t offset;
      if (!kInput) {
        value = load_float(from, q.output(position, d0 + d));
      } else if (q.input(position, ConvGeometry::Column(q, d0 + d), offset)) {
        value = load_float(from, offset);
      }
    }
    tile[d * kRow + s] = value;
  }
}

template <bool kInput, class Element>
static __device__ __forceinline__ void inner_products(const ConvGeometry& q, const Element* from, int s0, int t0, double* left,
                                                      double* right, Inner& sums) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int corner_s = warp % 2 * kPart + lane / 4, corner_t = warp / 2 * kPart + lane / 4;
#pragma unroll
  for (int i = 0; i < kPart / 8; ++i)
#pragma unroll
    for (int j = 0; j < kPart / 8; ++j) sums[i][j][0] = sums[i][j][1] = 0;
  const int depth = kInput ? q.columns : q.out_group;
  for (int d0 = 0; d0 < depth; d0 += kDepth) {
    __syncthreads();  // the previous tile has been read
    fetch<kInput>(q, from, s0, d0, left);
    fetch<kInput>(q, from, t0, d0, right);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kDepth; k += 4) {
      double b[kPart / 8];
#pragma unroll
      for (int j = 0; j < kPart / 8; ++j) b[j] = right[(k + lane % 4) * kRow + corner_t + 8 * j];
#pragma unroll
      for (int i = 0; i < kPart / 8; ++i) {
        const double a = left[(k + lane % 4) * kRow + corner_s + 8 * i];
#pragma unroll
        for (int j = 0; j < kPart / 8; ++j) mma_f64(sums[i][j], a, b[j]);
      }
    }
  }
}

template <class Element>
__global__ void __launch_bounds__(kBlock) gram_kernel(ConvGeometry q, int side, int tiles, double* partials) {
  STATIC_SHARED(double, left, kDepth * kRow);
  STATIC_SHARED(double, right, kDepth * kRow);
  int at = static_cast<int>(blockIdx.x) % tiles, first = 0;
  while (at >= side - first) at -= side - first++;
  const int second = first + at;
  const int group = static_cast<int>(blockIdx.x) / tiles % q.groups;
  const int64_t sample = blockIdx.x / tiles / q.groups;
  Inner of_x, of_g;
  inner_products<true>(q, q.inputs<Element>(sample, group), first * kSide, second * kSide, left, right, of_x);
  inner_products<false>(q, q.outputs<Element>(sample, group), first * kSide, second * kSide, left, right, of_g);
  double sum = 0;
#pragma unroll
  for (int i = 0; i < kPart / 8; ++i)
#pragma unroll
    for (int j = 0; j < kPart / 8; ++j) sum += of_x[i][j][0] * of_g[i][j][0] + of_x[i][j][1] * of_g[i][j][1];
  sum = block_sum<kBlock>(sum);
  if (threadIdx.x == 0) partials[blockIdx.x] = first == second ? sum : 2 * sum;
}

}  // namespace

void conv_gram(const ConvGramParams& p, void* stream) {
  const char* op = __func__;
  const ConvGeometry q = conv_geometry(op, p);
  const int64_t side = (q.positions + kSide - 1) / kSide, tiles = side * (side + 1) / 2;
  if (p.partials_size < p.samples * q.groups * tiles)
    throw std::runtime_error("conv_gram: the buffer of partial norms is too small");
  const unsigned grid = blocks_of(op, p.samples * q.groups * tiles);
  if (p.x_dtype == DType::bf16) {
    LAUNCH(op, gram_kernel<uint16_t>, grid, kBlock, 0, stream, q, static_cast<int>(side), static_cast<int>(tiles), p.partials);
  } else {
    LAUNCH(op, gram_kernel<float>, grid, kBlock, 0, stream, q, static_cast<int>(side), static_cast<int>(tiles), p.partials);
  }
  LAUNCH(op, sum_partials_kernel<true>, blocks_of(op, p.samples), 32, 0, stream, p.partials, q.groups * tiles, p.sq_norms);
}

}  // namespace DEVICE_NAMESPACE
}  // namespace privimage
