// Per-sample weight gradient of a 3x3 convolution by Winograd's bilinear form: g in tiles of M x M positions, x in the
// (M + 2) x (M + 2) windows above them. With both transformed, the gradient of all nine taps is one product per point,
// (M + 2)^2 of them instead of 9 M^2: 2.25 times fewer for M = 2, 4 times for M = 4.
//
// Each point is a small matrix product over the tiles of all rows of a sample. Transformed operands are packed block by
// block of channels,
//
//   x [block][point][tile][kWide lanes],  g [block][point][tile][kBroadcasts of kLanes lanes],
//
// a run of tile rows at a time. One (g block, x block) pair then takes all its points through the registers, and, after
// the last run, transforms the sums while they are in the first cache and writes the weights with their norm.
#include "conv_weight_grad.h"
#include "microkernel.h"
#include "packing.h"
#include "team.h"
#include "winograd_transforms.h"

namespace privimage {
namespace ISA_NAMESPACE {
namespace {

constexpr int64_t kStageFloats = 8192;  // a band of packed positions, half of the second cache at most
constexpr int64_t kSharedFloats = 65536;  // g blocks that stay in the second cache while x blocks pass

template <int M>
struct Plan {
  static constexpr int kSide = M + 2, kPoints = kSide * kSide;
  static constexpr int64_t kRunTiles = M == 4 ? 64 : 128, kLongestRun = 4 * kRunTiles;

  const ConvWeightGradParams& p;
  int64_t in, out;                    // channels of a group
  int64_t x_blocks, g_blocks;
  int64_t tile_rows, tile_cols;       // of one image
  int64_t rows;                       // tile rows of a sample, image after image
  int64_t run_rows, band_rows;        // tile rows packed before a product; of them staged at once
  int64_t tiles;                      // between two points of a packed block
  bool one_run;
  int64_t x_floats, g_floats, sum_floats, stage_floats;

  explicit Plan(const ConvWeightGradParams& params) : p(params) {
    in = p.in_channels / p.groups;
    out = p.out_channels / p.groups;
    x_blocks = div_up(in, kWide);
    g_blocks = div_up(out, kBroadcasts);
    tile_rows = div_up(p.out_size[0], M);
    tile_cols = div_up(p.out_size[1], M);
    rows = p.multiplicity * tile_rows;
    set_run(div_up(rows, div_up(rows * tile_cols, kRunTiles)));
    if (!one_run && rows * tile_cols <= kLongestRun) {  // sums in memory may cost more of it than a longer run
      const int64_t floats = x_floats + g_floats + sum_floats, shorter = run_rows;
      set_run(rows);
      if (x_floats + g_floats > floats) set_run(shorter);
    }
    const int64_t row_floats = M * (M * tile_cols + 2) * kWide;
    band_rows = max64(1, min64(tile_rows, kStageFloats / row_floats));
    stage_floats = (band_rows * M + 2) * (M * tile_cols + 2) * kWide;
  }

  void set_run(int64_t tile_rows_of_run) {
    run_rows = tile_rows_of_run;
    one_run = run_rows >= rows;
    tiles = run_rows * tile_cols | 1;  // odd: the points of a tile then fall into different sets of the first cache
    x_floats = x_blocks * kPoints * tiles * kWide;
    g_floats = g_blocks * kPoints * tiles * kLanes;
    sum_floats = one_run ? 0 : g_blocks * x_blocks * kPoints * kTile;
  }

  int64_t lanes(int64_t x_block) const {
    return x_block + 1 < x_blocks || in - x_block * kWide > kLanes ? kWide : kLanes;
  }
};

// x, g: operands of a run; sums: products so far, for all blocks; sq: squared norms by block; stage: of one thread.
struct Buffers {
  float *x, *g, *sums, *stage;
  double* sq;
};

// Packs and transforms tile rows first..last of a sample for one block of channels: `lanes` wide, `n` channels of it real.
template <int M, bool kGradient>
void pack_block(const Plan<M>& plan, float* stage, float* dst, int64_t lanes, int64_t n, int64_t b, int64_t channel,
                int64_t first, int64_t last) {
  const ConvWeightGradParams& p = plan.p;
  const int64_t* stride = kGradient ? p.g_stride : p.x_stride;
  const int64_t* size = kGradient ? p.out_size : p.in_size;
  const Image image{size[0], size[1], stride[1], stride[2], stride[3]};
  const int64_t halo = kGradient ? 0 : 2, cols = M * plan.tile_cols + halo, pitch = cols * lanes;
  float* tile = dst;
  for (int64_t row = first; row < last;) {
    const int64_t k = row / plan.tile_rows, r = row % plan.tile_rows;
    const int64_t band = min64(plan.band_rows, min64(plan.tile_rows - r, last - row));
    Window window{r * M, 0, band * M + halo, cols};
    if (!kGradient) {
      window.h0 -= p.padding[0];
      window.w0 -= p.padding[1];
    }
    for (int64_t v = 0; v < lanes; v += kLanes) {
      pack_window(stage + v, lanes, cols, kGradient ? p.g : p.x, kGradient ? p.g_dtype : p.x_dtype,
                  (b * p.multiplicity + k) * stride[0] + (channel + v) * stride[1], min64(kLanes, n - v), image, window);
    }
    for (int64_t i = 0; i < band; ++i) {
      for (int64_t j = 0; j < plan.tile_cols; ++j, tile += lanes) {
        const float* corner = stage + i * M * pitch + j * M * lanes;
        for (int64_t v = 0; v < lanes; v += kLanes) {
          if (kGradient) {
            transform_gradient<M>(corner + v, lanes, pitch, tile + v, plan.tiles * lanes);
          } else {
            transform_input<M>(corner + v, lanes, pitch, tile + v, plan.tiles * lanes);
          }
        }
      }
    }
    row += band;
  }
}

// Adds the products of a run at every point.
template <int M, int NB, int NV>
void multiply(const Plan<M>& plan, const float* x, const float* g, int64_t n, float* sums, bool first) {
  for (int point = 0; point < Plan<M>::kPoints; ++point) {
    outer_products<NB, NV>(x, g, n, sums, first);
    x += plan.tiles * NV * kLanes;
    g += plan.tiles * kLanes;
    sums += kTile;
  }
}

template <int M, int NV, int NB = kBroadcasts>
void multiply(const Plan<M>& plan, int64_t count, const float* x, const float* g, int64_t n, float* sums, bool first) {
  if constexpr (NB > 1) {
    if (count < NB) return multiply<M, NV, NB - 1>(plan, count, x, g, n, sums, first);
  }
  multiply<M, NB, NV>(plan, x, g, n, sums, first);
}

// Turns the sums of one block pair into weights, writes them, and returns the squared norm of what was written.
template <int M>
double finish(const Plan<M>& plan, const float* sums, int64_t x_block, int64_t g_block, int64_t group, float* out) {
  const ConvWeightGradParams& p = plan.p;
  const int64_t lanes = plan.lanes(x_block), count = min64(kBroadcasts, plan.out - g_block * kBroadcasts);
  const int64_t n = min64(lanes, plan.in - x_block * kWide), step = p.out_stride[2];
  SquareSum sq;
  for (int64_t j = 0; j < count; ++j) {
    float* row = out ? out + (group * plan.out + g_block * kBroadcasts + j) * p.out_stride[1] + x_block * kWide * step : nullptr;
    for (int64_t v = 0; v < n; v += kLanes) {
      vf w[9];
      transform_weight<M>(sums + j * lanes + v, kTile, w);
      const int64_t m = min64(kLanes, n - v);
      if (!row && m == kLanes) {
        for (const vf& each : w) sq.add_vector(each);
        continue;
      }
      if (row && step == 1 && m == kLanes) {
#pragma GCC unroll 9
        for (int i = 0; i < 9; ++i) {
          float* dst = row + v + i / 3 * p.out_stride[3] + i % 3 * p.out_stride[4];
          if (p.accumulate) w[i] += load<vf>(dst);
          store(dst, w[i]);
          sq.add_vector(w[i]);
        }
        continue;
      }
      for (int i = 0; i < 9; ++i) {
        float f[kLanes];
        store(f, w[i]);
        for (int64_t lane = 0; lane < m; ++lane) {
          if (row) {
            float* dst = row + (v + lane) * step + i / 3 * p.out_stride[3] + i % 3 * p.out_stride[4];
            if (p.accumulate) f[lane] += *dst;
            *dst = f[lane];
          }
          sq.add(f[lane]);
        }
      }
    }
  }
  return sq.total();
}

// Asks for the lines that finish will write, so that they arrive during the products.
template <int M>
void prefetch(const Plan<M>& plan, int64_t x_block, int64_t g_block, int64_t group, const float* out) {
  const ConvWeightGradParams& p = plan.p;
  if (!out || p.out_stride[2] != 1) return;
  out += (group * plan.out + g_block * kBroadcasts) * p.out_stride[1] + x_block * kWide;
  const int64_t count = min64(kBroadcasts, plan.out - g_block * kBroadcasts);
  for (int64_t j = 0; j < count; ++j)
    for (int i = 0; i < 9; ++i)
      __builtin_prefetch(out + j * p.out_stride[1] + i / 3 * p.out_stride[3] + i % 3 * p.out_stride[4], 1);
}

// The block pairs of one run, and after the last one their weights.
template <int M>
void multiply_run(const Plan<M>& plan, const Buffers& buf, int64_t n, int64_t group, bool first, bool last, float* out,
                  Team team) {
  const int64_t x_block_floats = Plan<M>::kPoints * plan.tiles * kWide;
  const int64_t g_block_floats = Plan<M>::kPoints * plan.tiles * kLanes;
  const int64_t shared = min64(plan.g_blocks, max64(1, kSharedFloats / g_block_floats));
  const int64_t pairs = plan.g_blocks * plan.x_blocks;
  alignas(64) float local[Plan<M>::kPoints * kTile];
  for (int64_t i = team.first(pairs); i < team.last(pairs); ++i) {
    // Pair i: `shared` g blocks at a time meet every x block.
    const int64_t chunk = i / (shared * plan.x_blocks), g0 = chunk * shared, width = min64(shared, plan.g_blocks - g0);
    const int64_t inner = i - g0 * plan.x_blocks, x_block = inner / width, g_block = g0 + inner % width;
    float* sums = plan.one_run ? local : buf.sums + i * Plan<M>::kPoints * kTile;
    const float *x = buf.x + x_block * x_block_floats, *g = buf.g + g_block * g_block_floats;
    const int64_t count = min64(kBroadcasts, plan.out - g_block * kBroadcasts);
    if (last) prefetch(plan, x_block, g_block, group, out);
    if (plan.lanes(x_block) == kWide) {
      multiply<M, kVectors>(plan, count, x, g, n, sums, first);
    } else {
      multiply<M, 1>(plan, count, x, g, n, sums, first);
    }
    if (last) buf.sq[i] = finish(plan, sums, x_block, g_block, group, out);
  }
}

template <int M>
void sample_grad(const Plan<M>& plan, const Buffers& buf, int64_t b, Team team) {
  const ConvWeightGradParams& p = plan.p;
  float* out = p.out ? static_cast<float*>(p.out) + b * p.out_stride[0] : nullptr;
  double sum = 0;
  for (int64_t group = 0; group < p.groups; ++group) {
    for (int64_t row = 0; row < plan.rows; row += plan.run_rows) {
      const int64_t end = min64(plan.rows, row + plan.run_rows), items = plan.x_blocks + plan.g_blocks;
      for (int64_t i = team.member; i < items; i += team.size) {
        if (i < plan.x_blocks) {
          pack_block<M, false>(plan, buf.stage, buf.x + i * Plan<M>::kPoints * plan.tiles * kWide, plan.lanes(i),
                               plan.in - i * kWide, b, group * plan.in + i * kWide, row, end);
        } else {
          const int64_t block = i - plan.x_blocks, channel = block * kBroadcasts;
          pack_block<M, true>(plan, buf.stage, buf.g + block * Plan<M>::kPoints * plan.tiles * kLanes, kLanes,
                              plan.out - channel, b, group * plan.out + channel, row, end);
        }
      }
      team.barrier();
      multiply_run(plan, buf, (end - row) * plan.tile_cols, group, row == 0, end == plan.rows, out, team);
      team.barrier();
    }
    if (team.member == 0)
      for (int64_t i = 0; i < plan.g_blocks * plan.x_blocks; ++i) sum += buf.sq[i];
    team.barrier();
  }
  if (team.member == 0) p.sq_norms[b] = sum;
}

int64_t padded(int64_t floats) { return div_up(floats, 16) * 16; }

template <int M>
int64_t thread_floats(const Plan<M>& plan) {
  return padded(plan.x_floats) + padded(plan.g_floats) + padded(plan.sum_floats) + padded(2 * plan.g_blocks * plan.x_blocks) +
         padded(plan.stage_floats);
}

template <int M>
void winograd(const ConvWeightGradParams& p) {
  const Plan<M> plan(p);
  const int64_t floats = thread_floats(plan);
  for_each_sample(p.samples, p.num_threads, static_cast<size_t>(floats) * sizeof(float),
                  [&](int64_t b, char* shared, char* own, Team team) {
                    Buffers buf;
                    buf.x = reinterpret_cast<float*>(shared);
                    buf.g = buf.x + padded(plan.x_floats);
                    buf.sums = buf.g + padded(plan.g_floats);
                    buf.sq = reinterpret_cast<double*>(buf.sums + padded(plan.sum_floats));
                    buf.stage = reinterpret_cast<float*>(own) + floats - padded(plan.stage_floats);
                    sample_grad(plan, buf, b, team);
                  });
}

}  // namespace

void conv_winograd(const ConvWeightGradParams& p, int tile) {
  if (tile == 2) return winograd<2>(p);
  winograd<4>(p);
}

int64_t conv_winograd_bytes(const ConvWeightGradParams& p, int tile) {
  return 4 * (tile == 2 ? thread_floats(Plan<2>(p)) : thread_floats(Plan<4>(p)));
}

}  // namespace ISA_NAMESPACE
}  // namespace privimage
