// Per-sample weight gradients as one matrix product a sample: rows are output channels, columns are (kernel offset,
// input channel), and the contraction runs over the K rows' output positions. Nothing is unfolded: a block gathers each
// column's shifted input as it goes. The squared norm is taken from the accumulators, so W_b need not be stored.
//
// A block makes one kM × kN tile of one sample's gradient. Its pipeline of kStages slots in shared memory holds
// [position][channel] tiles of g and x; where both are channels-last and aligned, chunks of 16 bytes come by cp.async
// (kVector), else elements are fetched one by one with whatever strides there are.
//
// With coefficients, a block goes through several samples and adds up coef_b W_b: the clipped sum of gradients that were
// not stored, as exact as the norms that were taken of them.
#include <type_traits>
#include <vector>

#include "conv_geometry.cuh"
#include "conv_loaders.cuh"
#include "load.cuh"
#include "mma.cuh"
#include "reduce.cuh"

namespace privimage {
namespace DEVICE_NAMESPACE {
namespace {

// tf32x3: a float is the sum of two TF32 numbers to 22 bits; three of the four products are kept.
enum class Mode { bf16, tf32, tf32x3 };

template <Mode mode>
struct ElementOf {
  using type = float;
};
template <>
struct ElementOf<Mode::bf16> {
  using type = uint16_t;
};

constexpr int kStages = 4;

template <Mode mode, int m, int n, int warp_m, int warp_n, bool vector>
struct Tile {
  using Element = typename ElementOf<mode>::type;
  static constexpr Mode kMode = mode;
  static constexpr bool kVector = vector;
  static constexpr int kM = m, kN = n, kWarpM = warp_m, kWarpN = warp_n;
  static constexpr int kBlock = (m / warp_m) * (n / warp_n) * 32;
  static constexpr int kDepth = mode == Mode::bf16 ? 32 : 16;  // positions a stage
  // Eight elements of padding: the rows of a fragment then lie in different banks.
  static constexpr int kRowM = m + 8, kRowN = n + 8;
  static constexpr int kSlot = kDepth * (kRowM + kRowN);  // g, then x
  static constexpr size_t kShared = kStages * kSlot * sizeof(Element);
  // Stages between additions of the matrix unit's sums to the rounded ones: 8 products deep, or 6 for tf32x3.
  static constexpr int kFlush = mode == Mode::tf32x3 ? 1 : 4;
  static constexpr int kBlocksPerSM = m == 128 ? 1 : 3;
};

struct Problem {
  ConvGeometry shape;
  int tiles_m, tiles_n;
  void* out;
  int64_t out_stride[5];
  bool accumulate;
  bool rounded;  // out is bfloat16, else float32
  bool packed;   // out's columns are contiguous and two neighbours are one aligned pair
  double* partials;
  const float* coef;  // null: every tile is one sample's
  int samples, chunk, stages;  // stages of one sample
};

template <class T>
struct Sums {
  static constexpr int kRows = T::kWarpM / 16, kColumns = T::kWarpN / 8;
  Accumulator tile[kRows][kColumns];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j)
#pragma unroll
        for (int k = 0; k < 4; ++k) tile[i][j].c[k] = 0;
  }
  template <bool kScaled>
  __device__ __forceinline__ void add(const Sums& other, float factor) {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j)
#pragma unroll
        for (int k = 0; k < 4; ++k) tile[i][j].c[k] += kScaled ? factor * other.tile[i][j].c[k] : other.tile[i][j].c[k];
  }
};

// sums += the stage's product, for this warp's part of the tile; a and b are its corners in shared memory.
template <class T>
static __device__ __forceinline__ void multiply_bf16(Sums<T>& sums, const uint16_t* a, const uint16_t* b) {
  const int lane = static_cast<int>(threadIdx.x) % 32, matrix = lane / 8, row = lane % 8;
#pragma unroll
  for (int k = 0; k < T::kDepth; k += 16) {
    uint32_t right[Sums<T>::kColumns][2];
#pragma unroll
    for (int j = 0; j < Sums<T>::kColumns; j += 2) {
      uint32_t r[4];
      load_matrices_transposed(r, b + (k + row + matrix % 2 * 8) * T::kRowN + j * 8 + matrix / 2 * 8);
      right[j][0] = r[0];
      right[j][1] = r[1];
      right[j + 1][0] = r[2];
      right[j + 1][1] = r[3];
    }
#pragma unroll
    for (int i = 0; i < Sums<T>::kRows; ++i) {
      uint32_t left[4];
      load_matrices_transposed(left, a + (k + row + matrix / 2 * 8) * T::kRowM + i * 16 + matrix % 2 * 8);
#pragma unroll
      for (int j = 0; j < Sums<T>::kColumns; ++j) mma_bf16(sums.tile[i][j], left, right[j]);
    }
  }
}

template <int n>
static __device__ __forceinline__ void split(const float (&v)[n], float (&big)[n], float (&small)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) {
    big[i] = to_tf32(v[i]);
    small[i] = to_tf32(v[i] - big[i]);
  }
}

template <class T>
static __device__ __forceinline__ void multiply_tf32(Sums<T>& sums, const float* a, const float* b) {
  const int lane = static_cast<int>(threadIdx.x) % 32, group = lane / 4, member = lane % 4;
#pragma unroll
  for (int k = 0; k < T::kDepth; k += 8) {
    const float* lower = b + (k + member) * T::kRowN + group;
    float right[Sums<T>::kColumns][2], right_small[Sums<T>::kColumns][2];
#pragma unroll
    for (int j = 0; j < Sums<T>::kColumns; ++j) {
      const float v[2] = {lower[j * 8], lower[j * 8 + 4 * T::kRowN]};
      split(v, right[j], right_small[j]);
    }
#pragma unroll
    for (int i = 0; i < Sums<T>::kRows; ++i) {
      const float* corner = a + (k + member) * T::kRowM + i * 16 + group;
      const float v[4] = {corner[0], corner[8], corner[4 * T::kRowM], corner[4 * T::kRowM + 8]};
      float left[4], left_small[4];
      split(v, left, left_small);
#pragma unroll
      for (int j = 0; j < Sums<T>::kColumns; ++j) {
        if (T::kMode == Mode::tf32x3) {
          mma_tf32(sums.tile[i][j], left_small, right[j]);
          mma_tf32(sums.tile[i][j], left, right_small[j]);
        }
        mma_tf32(sums.tile[i][j], left, right[j]);
      }
    }
  }
}

template <class T>
static __device__ __forceinline__ void multiply(Sums<T>& sums, const uint16_t* a, const uint16_t* b) {
  multiply_bf16<T>(sums, a, b);
}
template <class T>
static __device__ __forceinline__ void multiply(Sums<T>& sums, const float* a, const float* b) {
  multiply_tf32<T>(sums, a, b);
}

// v[0], or v[0] and its neighbour v[1], to out from element `at` on. v becomes what is there then: after the addition, and after
// the rounding, so that a norm is that of what will be summed.
template <int kCount>
static __device__ __forceinline__ void put(const Problem& p, int64_t at, float (&v)[2]) {
  if (p.rounded) {
    uint16_t* to = static_cast<uint16_t*>(p.out) + at;
    uint32_t bits[2];
#pragma unroll
    for (int s = 0; s < kCount; ++s) {
      bits[s] = to_bf16(p.accumulate ? v[s] + load_float(to, s) : v[s]);
      v[s] = __uint_as_float(bits[s] << 16);
    }
    if (kCount == 2) {
      *reinterpret_cast<uint32_t*>(to) = bits[0] | bits[1] << 16;
    } else {
      *to = static_cast<uint16_t>(bits[0]);
    }
    return;
  }
  float* to = static_cast<float*>(p.out) + at;
  if (kCount == 2) {
    float2* pair = reinterpret_cast<float2*>(to);
    if (p.accumulate) {
      const float2 before = *pair;
      v[0] += before.x;
      v[1] += before.y;
    }
    *pair = {v[0], v[1]};
  } else {
    if (p.accumulate) v[0] += *to;
    *to = v[0];
  }
}

// Writes this thread's part of the tile, whose rows and columns count from element `first` of out; returns the sum of squares of what is now there.
template <class T>
static __device__ __forceinline__ double finish(const Problem& p, const Sums<T>& sums, int64_t first, int m0, int n0) {
  const ConvGeometry& q = p.shape;
  const int lane = static_cast<int>(threadIdx.x) % 32, group = lane / 4, member = lane % 4;
  double squares = 0;
#pragma unroll
  for (int j = 0; j < Sums<T>::kColumns; ++j) {
    const int column = n0 + j * 8 + member * 2;
    int64_t offset[2] = {column, column + 1};
    if (!p.packed) {
      for (int s = 0; s < 2; ++s) {
        int c, kernel_x;
        const int kernel_y = q.kernel_width.divide(q.per_offset.divide(column + s, c), kernel_x);
        offset[s] = c * p.out_stride[2] + kernel_y * p.out_stride[3] + kernel_x * p.out_stride[4];
      }
    }
#pragma unroll
    for (int i = 0; i < Sums<T>::kRows; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int m = m0 + i * 16 + group + half * 8;
        if (m >= q.out_group || column >= q.columns) continue;
        float v[2] = {sums.tile[i][j].c[2 * half], sums.tile[i][j].c[2 * half + 1]};
        const int64_t at = first + m * p.out_stride[1];
        if (p.out && p.packed) {
          put<2>(p, at + column, v);
        } else if (p.out) {
#pragma unroll
          for (int s = 0; s < 2; ++s) {
            float one[2] = {v[s]};
            if (column + s < q.columns) put<1>(p, at + offset[s], one);
            v[s] = one[0];
          }
        }
        squares += static_cast<double>(v[0]) * v[0];
        if (column + 1 < q.columns) squares += static_cast<double>(v[1]) * v[1];  // beyond: padding times g
      }
    }
  }
  return squares;
}

// The tile of the problem's block number `block`.
template <class T>
static __device__ __forceinline__ void make_tile(const Problem& p, unsigned block) {
  const ConvGeometry& q = p.shape;
  using Element = typename T::Element;
  static_assert((T::kMode == Mode::bf16) == (sizeof(Element) == 2));
  DYNAMIC_SHARED(shared);
  Element* const slots = reinterpret_cast<Element*>(shared);

  const int tile_n = static_cast<int>(block) % p.tiles_n;
  const int tile_m = static_cast<int>(block) / p.tiles_n % p.tiles_m;
  const int group = static_cast<int>(block) / (p.tiles_n * p.tiles_m) % q.groups;
  const int64_t out_index = block / (p.tiles_n * p.tiles_m * q.groups), sample = out_index * p.chunk;
  const int first_m = tile_m * T::kM, first_n = tile_n * T::kN;
  std::conditional_t<T::kVector, ChunkLoader<T>, ElementLoader<T>> loader(q, p.stages, sample, group, first_m, first_n);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int warp_m = warp % (T::kM / T::kWarpM) * T::kWarpM, warp_n = warp / (T::kM / T::kWarpM) * T::kWarpN;

  const int samples = static_cast<int>(p.chunk < p.samples - sample ? p.chunk : p.samples - sample);
  const int stages = p.stages * samples;
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < stages) loader.load(slots + s * T::kSlot);
    commit_copies();
  }
  Sums<T> total;
  total.clear();
  int s = 0;
  const auto make_stage = [&](Sums<T>& sums) {
    wait_copies<kStages - 2>();
    __syncthreads();  // everyone's copies of stage s are there, and everyone has left stage s - 1
    const int next = s + kStages - 1;
    if (next < stages) loader.load(slots + next % kStages * T::kSlot);
    commit_copies();
    const Element* slot = slots + s % kStages * T::kSlot;
    multiply<T>(sums, slot + warp_m, slot + T::kDepth * T::kRowM + warp_n);
    ++s;
  };
  for (int64_t b = sample; b < sample + samples; ++b) {
    const float factor = p.coef ? p.coef[b] : 1.0f;
    for (int within = 0; within < p.stages; within += T::kFlush) {
      Sums<T> sums;
      sums.clear();
#pragma unroll
      for (int k = 0; k < T::kFlush; ++k)
        if (within + k < p.stages) make_stage(sums);
      if (!p.coef) {
        total.template add<false>(sums, 1);
      } else if (factor != 0) {  // a rejected sample is never multiplied
        total.template add<true>(sums, factor);
      }
    }
  }
  const int64_t first = out_index * p.out_stride[0] + int64_t{group} * q.out_group * p.out_stride[1];
  double squares = finish<T>(p, total, first, first_m + warp_m, first_n + warp_n);
  if (p.coef) return;
  squares = block_sum<T::kBlock>(squares);
  if (threadIdx.x == 0) p.partials[block] = squares;
}

template <class T>
__global__ void __launch_bounds__(T::kBlock, T::kBlocksPerSM) weight_grad_kernel(Problem p) {
  make_tile<T>(p, blockIdx.x);
}

constexpr int kProblems = 12;  // kernel arguments are limited to 4 KB

struct Batch {
  Problem problems[kProblems];
  unsigned first_block[kProblems + 1];
  int count;
};
static_assert(sizeof(Batch) <= 4096);

template <class T>
__global__ void __launch_bounds__(T::kBlock, T::kBlocksPerSM) weight_grads_kernel(const __grid_constant__ Batch batch) {
  int which = 0;
  while (blockIdx.x >= batch.first_block[which + 1]) ++which;
  make_tile<T>(batch.problems[which], blockIdx.x - batch.first_block[which]);
}

bool chunked(const void* p, int chunk, int channels, const int64_t (&stride)[4]) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && channels % chunk == 0 && stride[1] == 1 && stride[0] % chunk == 0 &&
         stride[2] % chunk == 0 && stride[3] % chunk == 0;
}

Problem problem_of(const char* op, const ConvWeightGradParams& p) {
  Problem q{};
  q.shape = conv_geometry(op, p);
  const int in_group = q.shape.in_group, columns = q.shape.columns;
  q.out = p.out;
  for (int i = 0; i < 5; ++i) q.out_stride[i] = p.out_stride[i];
  q.accumulate = p.accumulate;
  q.rounded = p.out_dtype == DType::bf16;
  q.coef = p.coef;
  q.samples = narrow(op, p.samples);
  q.chunk = p.coef ? narrow(op, p.chunk) : 1;
  q.packed = p.out && columns % 2 == 0 && reinterpret_cast<uintptr_t>(p.out) % (q.rounded ? 4 : 8) == 0 && p.out_stride[0] % 2 == 0 &&
             p.out_stride[1] % 2 == 0 && p.out_stride[2] == 1 && (p.kernel[1] == 1 || p.out_stride[4] == in_group) &&
             (p.kernel[0] == 1 || p.out_stride[3] == p.kernel[1] * in_group);
  return q;
}

// Whether g's positions are evenly spaced, from row to row as well.
bool evenly_spaced(const ConvWeightGradParams& p) {
  return (p.out_size[0] == 1 || p.g_stride[2] == p.out_size[1] * p.g_stride[3]) &&
         (p.multiplicity == 1 || p.g_stride[0] == p.out_size[0] * p.out_size[1] * p.g_stride[3]);
}

constexpr int kKinds = 8;

// Which of the tiles below a problem takes.
int kind_of(const ConvWeightGradParams& p, const Problem& q) {
  const int chunk = p.x_dtype == DType::bf16 ? 8 : 4;
  const bool vector = chunked(p.x, chunk, q.shape.in_group, p.x_stride) && chunked(p.g, chunk, q.shape.out_group, p.g_stride) &&
                      evenly_spaced(p);
  if (p.x_dtype != DType::bf16) return (p.tf32 ? 3 : 5) + vector;
  if (!vector) return 0;
  if (q.shape.out_group <= 32 && q.shape.columns > 64) return 7;
  return q.shape.out_group <= 64 || q.shape.columns <= 64 ? 1 : 2;
}

template <class Use>
void with_tile(int kind, Use use) {
  switch (kind) {
    case 0: return use(Tile<Mode::bf16, 64, 64, 32, 32, false>());
    case 1: return use(Tile<Mode::bf16, 64, 64, 32, 32, true>());
    case 2: return use(Tile<Mode::bf16, 128, 128, 64, 32, true>());
    case 3: return use(Tile<Mode::tf32, 64, 64, 32, 32, false>());
    case 4: return use(Tile<Mode::tf32, 64, 64, 32, 32, true>());
    case 5: return use(Tile<Mode::tf32x3, 64, 64, 32, 32, false>());
    case 6: return use(Tile<Mode::tf32x3, 64, 64, 32, 32, true>());
    case 7: return use(Tile<Mode::bf16, 32, 128, 32, 32, true>());
  }
}

std::string item_name(const char* op, int64_t i) { return std::string(op) + "[" + std::to_string(i) + "]"; }

// Fills in what depends on the tile, and where norms go; returns the tiles of one sample.
template <class T>
int64_t cut(const char* op, const ConvWeightGradParams& p, Problem& q) {
  q.tiles_m = (q.shape.out_group + T::kM - 1) / T::kM;
  q.tiles_n = (q.shape.columns + T::kN - 1) / T::kN;
  q.stages = (q.shape.positions + T::kDepth - 1) / T::kDepth;
  narrow(op, q.stages * p.chunk + kStages);
  const int64_t tiles = int64_t{q.shape.groups} * q.tiles_m * q.tiles_n;
  if (!p.coef && tiles > 1 && p.partials_size < p.samples * tiles)
    throw std::runtime_error(std::string(op) + ": the buffer of partial norms is too small");
  q.partials = tiles > 1 ? p.partials : p.sq_norms;
  return tiles;
}

template <class T>
void run(const char* op, const ConvWeightGradParams& p, Problem q, void* stream) {
  const int64_t tiles = cut<T>(op, p, q);
  if (p.coef) {
    const int64_t chunks = (p.samples + p.chunk - 1) / p.chunk;
    LAUNCH(op, weight_grad_kernel<T>, blocks_of(op, chunks * tiles), T::kBlock, T::kShared, stream, q);
    return;
  }
  LAUNCH(op, weight_grad_kernel<T>, blocks_of(op, p.samples * tiles), T::kBlock, T::kShared, stream, q);
  if (tiles > 1) LAUNCH(op, sum_partials_kernel<false>, blocks_of(op, p.samples), 32, 0, stream, q.partials, tiles, p.sq_norms);
}

// Those of `items` that take this tile, kProblems a launch; their partial norms join `norms`.
template <class T>
void run_kind(
    const char* op, const ConvWeightGradsParams& p, const std::vector<Problem>& problems, const std::vector<int>& kinds, int kind,
    std::vector<PartialNorms>& norms, void* stream) {
  for (int64_t next = 0; next < p.num_items;) {
    Batch batch{};
    for (; next < p.num_items && batch.count < kProblems; ++next) {
      if (kinds[next] != kind) continue;
      const std::string name = item_name(op, next);
      const ConvWeightGradParams& item = p.items[next];
      Problem q = problems[next];
      const int64_t tiles = cut<T>(name.c_str(), item, q);
      if (tiles > 1) norms.push_back({q.partials, item.sq_norms, tiles, narrow(name.c_str(), item.samples)});
      batch.problems[batch.count] = q;
      batch.first_block[batch.count + 1] = blocks_of(name.c_str(), batch.first_block[batch.count] + item.samples * tiles);
      ++batch.count;
    }
    if (batch.count)
      LAUNCH(op, weight_grads_kernel<T>, batch.first_block[batch.count], T::kBlock, T::kShared, stream, batch);
  }
}

}  // namespace

void conv_weight_grad(const ConvWeightGradParams& p, void* stream) {
  const Problem q = problem_of(__func__, p);
  const char* op = __func__;
  with_tile(kind_of(p, q), [&](auto tile) { run<decltype(tile)>(op, p, q, stream); });
}

void conv_weight_grads(const ConvWeightGradsParams& p, void* stream) {
  const char* op = __func__;
  std::vector<Problem> problems;
  std::vector<int> kinds;
  for (int64_t i = 0; i < p.num_items; ++i) {
    if (p.items[i].coef) throw std::runtime_error(item_name(op, i) + ": coefficients are for one problem at a time");
    problems.push_back(problem_of(item_name(op, i).c_str(), p.items[i]));
    kinds.push_back(kind_of(p.items[i], problems.back()));
  }
  std::vector<PartialNorms> norms;
  for (int kind = 0; kind < kKinds; ++kind)
    with_tile(kind, [&](auto tile) { run_kind<decltype(tile)>(op, p, problems, kinds, kind, norms, stream); });
  sum_partials<false>(op, norms, stream);
}

}  // namespace DEVICE_NAMESPACE
}  // namespace privimage
