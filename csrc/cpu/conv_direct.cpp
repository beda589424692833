// Per-sample weight gradient of any convolution, with its norm in the epilogue. No im2col.
//
// A gradient tile is an outer product summed over positions; microkernel.h keeps it in registers.
//
//   natural  vectors run over input channels, scalars over output channels; one tile per kernel offset.
//   swapped  vectors run over output channels, scalars over (input channel, kernel offset) pairs: for layers with few
//            input channels (an RGB stem), where natural would leave most lanes empty.
//
// x (zero-padded) and g are packed channels innermost, block by block of channels, so that the inner loop reads both as
// streams; a kernel offset is a shifted pointer. Scalars that follow each other along a row of the image are read where
// they are: they need no padding, and a tile reads only a few such rows at once.
//
// A group of tiles shares one block of vectors: a run of positions short enough for the first cache passes through all of
// them before the next run. Rows of one sample are packed a few at a time; after the last of them a group is written
// while its tiles are near.
#include "conv_weight_grad.h"
#include "microkernel.h"
#include "packing.h"
#include "team.h"

namespace privimage {
namespace ISA_NAMESPACE {
namespace {

constexpr int64_t kRun = 256;      // positions of a run: 16 KiB of vectors at 16 lanes
constexpr int64_t kPacked = 1024;  // positions packed at once, where several rows are
constexpr int64_t kGroup = 9;      // tiles of a group, where a kernel does not need more
constexpr int64_t kNearFloats = 4096;  // half of the first cache
constexpr int64_t kStayFloats = 65536;  // half of the second

struct Plan {
  const ConvWeightGradParams& p;
  int64_t in, out;       // channels of a group of the convolution
  int64_t offsets;       // kernel positions
  int64_t xh, xw;        // the part of the padded input that windows reach, as packed
  int64_t gh, gw;        // output
  int64_t images;        // rows of the batch packed at once
  bool flat;             // 1x1, stride 1, no padding: positions form one line
  bool swapped;
  bool in_place;         // g is not packed
  int64_t scalars, scalar_lanes;  // scalars of all tiles; floats between two positions of the scalar operand
  int64_t scalar_blocks, vector_blocks, vectors;
  int64_t tiles_per_block;        // tiles of a block of scalars
  int64_t group_blocks, groups;   // scalar blocks of a group of tiles; such groups
  int64_t x_block, g_block;       // floats of a packed block of channels
  int64_t x_blocks, g_blocks;
  bool vectors_first;             // a block of vectors meets all groups, rather than a group all blocks of vectors
  bool one_pass;                  // all rows of a sample are packed at once

  explicit Plan(const ConvWeightGradParams& params) : p(params) {
    in = p.in_channels / p.groups;
    out = p.out_channels / p.groups;
    offsets = p.kernel[0] * p.kernel[1];
    flat = offsets == 1 && p.stride[0] == 1 && p.stride[1] == 1 && p.padding[0] == 0 && p.padding[1] == 0;
    gh = p.out_size[0];
    gw = p.out_size[1];
    xh = (gh - 1) * p.stride[0] + (p.kernel[0] - 1) * p.dilation[0] + 1;
    xw = (gw - 1) * p.stride[1] + (p.kernel[1] - 1) * p.dilation[1] + 1;
    images = max64(1, min64(p.multiplicity, kPacked / (gh * gw)));
    one_pass = images == p.multiplicity;

    const auto cost = [](int64_t vector_channels, int64_t all_scalars) {
      return div_up(vector_channels, kLanes) * kLanes * all_scalars;
    };
    swapped = cost(out, in * offsets) * 5 < cost(in, out * offsets) * 4;  // scattered writes want a reason
    vectors = swapped ? out : in;
    scalars = swapped ? in * offsets : out;
    scalar_blocks = div_up(scalars, kBroadcasts);
    vector_blocks = div_up(vectors, kWide);
    tiles_per_block = swapped ? 1 : offsets;
    group_blocks = min64(scalar_blocks, max64(1, kGroup / tiles_per_block));
    groups = div_up(scalar_blocks, group_blocks);
    in_place = !swapped && p.g_dtype == DType::f32 && p.g_stride[3] == 1;
    scalar_lanes = swapped ? div_up(in, kLanes) * kLanes : kLanes;
    x_block = images * xh * xw * (swapped ? scalar_lanes : kWide);
    g_block = images * gh * gw * (swapped ? kWide : kLanes);
    // The operand of the inner loop is read again for each step of the outer one: the lesser evil.
    const int64_t vector_floats = vector_blocks * (swapped ? g_block : x_block);
    const int64_t scalar_floats = swapped ? x_block : images * gh * gw * out;
    vectors_first = vector_floats > kStayFloats && groups * vector_floats > vector_blocks * scalar_floats;
    x_blocks = swapped ? 1 : vector_blocks;
    g_blocks = swapped ? vector_blocks : in_place ? 0 : scalar_blocks;
  }

  int64_t lanes(int64_t vector_block) const {
    return vector_block + 1 < vector_blocks || vectors - vector_block * kWide > kLanes ? kWide : kLanes;
  }
  int64_t group_floats() const { return group_blocks * tiles_per_block * kTile; }
  // Floats between x at kernel offset 0 and at `offset`, positions `lanes` apart.
  int64_t shift(int64_t offset, int64_t lanes) const {
    return ((offset / p.kernel[1]) * p.dilation[0] * xw + (offset % p.kernel[1]) * p.dilation[1]) * lanes;
  }
};

// sums: tiles so far, of all groups, or of the group at hand in one pass; sq: squared norms by group and vector block.
struct Buffers {
  float *x, *g, *sums;
  double* sq;
};

// Packs all blocks of channels of `images` rows, from row `first` of the batch and `channel` on.
void pack_operand(const Plan& plan, bool gradient, float* dst, int64_t first, int64_t images, int64_t channel, Team team) {
  const ConvWeightGradParams& p = plan.p;
  const int64_t* stride = gradient ? p.g_stride : p.x_stride;
  const int64_t* size = gradient ? p.out_size : p.in_size;
  const bool scalars = gradient != plan.swapped;
  const int64_t channels = gradient ? plan.out : plan.in, blocks = gradient ? plan.g_blocks : plan.x_blocks;
  const int64_t block_channels = !scalars ? kWide : gradient ? kBroadcasts : channels;
  const int64_t block_floats = gradient ? plan.g_block : plan.x_block;
  const int64_t rows = gradient ? plan.gh : plan.xh, cols = gradient ? plan.gw : plan.xw;
  const int64_t h0 = gradient ? 0 : -p.padding[0], w0 = gradient ? 0 : -p.padding[1];
  const Image image{size[0], size[1], stride[1], stride[2], stride[3]};
  // Where channels are adjacent, all blocks take their part of some positions while these are in the first cache.
  const int64_t near = stride[1] == 1 ? max64(8, kNearFloats / channels) : rows * cols;
  const int64_t band_cols = min64(cols, near), band_rows = min64(rows, max64(1, near / cols));
  for (int64_t k = 0; k < images; ++k) {
    for (int64_t r = 0; r < rows; r += band_rows) {
      for (int64_t q = 0; q < cols; q += band_cols) {
        const Window window{h0 + r, w0 + q, min64(band_rows, rows - r), min64(band_cols, cols - q)};
        for (int64_t i = team.member; i < blocks; i += team.size) {
          const int64_t lanes = scalars ? plan.scalar_lanes : plan.lanes(i), n = channels - i * block_channels;
          float* at = dst + i * block_floats + ((k * rows + r) * cols + q) * lanes;
          for (int64_t v = 0; v < min64(lanes, div_up(n, kLanes) * kLanes); v += kLanes) {
            pack_window(at + v, lanes, cols, gradient ? p.g : p.x, gradient ? p.g_dtype : p.x_dtype,
                        (first + k) * stride[0] + (channel + i * block_channels + v) * stride[1], min64(kLanes, n - v), image,
                        window);
          }
        }
      }
    }
  }
}

// Passes `images` packed rows through the tiles of one group and one block of vectors. g: the first of them, where g is
// read in place.
void accumulate_group(const Plan& plan, const Buffers& buf, const float* g_in_place, float* sums, int64_t group, int64_t vb,
                      int64_t images, bool fresh) {
  const ConvWeightGradParams& p = plan.p;
  const int64_t lanes = plan.lanes(vb);
  const int64_t x_lanes = plan.swapped ? plan.scalar_lanes : lanes, g_lanes = plan.swapped ? lanes : plan.scalar_lanes;
  const int64_t last_block = min64(plan.scalar_blocks, (group + 1) * plan.group_blocks);
  Walk x{plan.xh * plan.xw * x_lanes, p.stride[0] * plan.xw * x_lanes, p.stride[1] * x_lanes};
  Walk g{plan.gh * plan.gw * g_lanes, plan.gw * g_lanes, g_lanes};
  if (plan.in_place) g = Walk{p.g_stride[0], p.g_stride[2], 1};
  int64_t rows = plan.gh, cols = plan.gw;
  if (plan.flat && g.row == cols * g.col) {  // rows follow each other, images may
    cols *= rows;
    rows = 1;
    if (g.image == cols * g.col) {
      cols *= images;
      images = 1;
    }
  }
  const int64_t run_cols = min64(cols, rows > 1 ? cols : kRun);
  const int64_t run_rows = max64(1, min64(rows, kRun / run_cols));
  const int64_t run_images = run_rows < rows || run_cols < cols ? 1 : max64(1, min64(images, kRun / (rows * run_cols)));
  for (int64_t image = 0; image < images; image += run_images) {
    for (int64_t row = 0; row < rows; row += run_rows) {
      for (int64_t col = 0; col < cols; col += run_cols) {
        const Run run{min64(run_images, images - image), min64(run_rows, rows - row), min64(run_cols, cols - col),
                      plan.swapped ? g : x, plan.swapped ? x : g};
        const bool start = fresh && image == 0 && row == 0 && col == 0;
        const float* xp = buf.x + image * x.image + row * x.row + col * x.col + (plan.swapped ? 0 : vb * plan.x_block);
        const float* gp = (plan.in_place ? g_in_place : buf.g) + image * g.image + row * g.row + col * g.col +
                          (plan.swapped ? vb * plan.g_block : 0);
        float* tile = sums;
        for (int64_t sb = group * plan.group_blocks; sb < last_block; ++sb) {
          const int64_t count = min64(kBroadcasts, plan.scalars - sb * kBroadcasts);
          int64_t at[kBroadcasts];
          if (plan.swapped) {
            for (int64_t j = 0; j < count; ++j) {
              const int64_t scalar = sb * kBroadcasts + j;  // channel-major: scalar = channel * offsets + offset
              at[j] = scalar / plan.offsets + plan.shift(scalar % plan.offsets, x_lanes);
            }
            outer_run<true>(count, lanes)(run, gp, xp, at, tile, start);
            tile += kTile;
            continue;
          }
          if (plan.in_place)
            for (int64_t j = 0; j < count; ++j) at[j] = (sb * kBroadcasts + j) * p.g_stride[1];
          const OuterRun outer = plan.in_place ? outer_run<true>(count, lanes) : outer_run<false>(count, lanes);
          const float* scalars = plan.in_place ? gp : gp + sb * plan.g_block;
          for (int64_t offset = 0; offset < plan.offsets; ++offset, tile += kTile)
            outer(run, xp + plan.shift(offset, x_lanes), scalars, at, tile, start);
        }
      }
    }
  }
}

// Writes the tiles of one group where the caller wants them and returns the squared norm of what was written.
double finish_group(const Plan& plan, const float* sums, int64_t group, int64_t vb, int64_t conv_group, float* out) {
  const ConvWeightGradParams& p = plan.p;
  const int64_t lanes = plan.lanes(vb), n = min64(lanes, plan.vectors - vb * kWide);
  const int64_t step = p.out_stride[plan.swapped ? 1 : 2];
  const int64_t last_block = min64(plan.scalar_blocks, (group + 1) * plan.group_blocks);
  SquareSum sq;
  for (int64_t sb = group * plan.group_blocks; sb < last_block; ++sb, sums += plan.tiles_per_block * kTile) {
    for (int64_t j = 0; j < min64(kBroadcasts, plan.scalars - sb * kBroadcasts); ++j) {
      for (int64_t i = 0; i < plan.tiles_per_block; ++i) {
        const int64_t scalar = sb * kBroadcasts + j, offset = plan.swapped ? scalar % plan.offsets : i;
        const int64_t channel_out = plan.swapped ? vb * kWide : scalar;
        const int64_t channel_in = plan.swapped ? scalar / plan.offsets : vb * kWide;
        float* dst = nullptr;
        if (out)
          dst = out + (conv_group * plan.out + channel_out) * p.out_stride[1] + channel_in * p.out_stride[2] +
                (offset / p.kernel[1]) * p.out_stride[3] + (offset % p.kernel[1]) * p.out_stride[4];
        write_weights(sums + i * kTile + j * lanes, n, dst, step, p.accumulate, sq);
      }
    }
  }
  return sq.total();
}

void sample_grad(const Plan& plan, const Buffers& buf, int64_t b, Team team) {
  const ConvWeightGradParams& p = plan.p;
  float* out = p.out ? static_cast<float*>(p.out) + b * p.out_stride[0] : nullptr;
  const int64_t items = plan.groups * plan.vector_blocks;
  double sum = 0;
  for (int64_t conv_group = 0; conv_group < p.groups; ++conv_group) {
    for (int64_t k = 0; k < p.multiplicity; k += plan.images) {
      const int64_t images = min64(plan.images, p.multiplicity - k), row = b * p.multiplicity + k;
      const bool last = k + images == p.multiplicity;
      pack_operand(plan, false, buf.x, row, images, conv_group * plan.in, team);
      pack_operand(plan, true, buf.g, row, images, conv_group * plan.out, team);
      team.barrier();
      const float* g = nullptr;
      if (plan.in_place) g = static_cast<const float*>(p.g) + row * p.g_stride[0] + conv_group * plan.out * p.g_stride[1];
      for (int64_t i = team.first(items); i < team.last(items); ++i) {
        const int64_t group = plan.vectors_first ? i % plan.groups : i / plan.vector_blocks;
        const int64_t vb = plan.vectors_first ? i / plan.groups : i % plan.vector_blocks;
        float* sums = buf.sums + (plan.one_pass ? team.member : i) * plan.group_floats();
        accumulate_group(plan, buf, g, sums, group, vb, images, k == 0);
        if (last) buf.sq[i] = finish_group(plan, sums, group, vb, conv_group, out);
      }
      team.barrier();
    }
    if (team.member == 0)
      for (int64_t i = 0; i < items; ++i) sum += buf.sq[i];
    team.barrier();
  }
  if (team.member == 0) p.sq_norms[b] = sum;
}

}  // namespace

void conv_direct(const ConvWeightGradParams& p) {
  const Plan plan(p);
  const auto padded = [](int64_t floats) { return div_up(floats, 16) * 16; };
  const int64_t items = plan.groups * plan.vector_blocks;
  const int64_t x_floats = padded(plan.x_blocks * plan.x_block), g_floats = padded(plan.g_blocks * plan.g_block);
  const int64_t sum_floats = padded((plan.one_pass ? max64(1, p.num_threads) : items) * plan.group_floats());
  const int64_t floats = x_floats + g_floats + sum_floats + padded(2 * items);
  for_each_sample(p.samples, p.num_threads, static_cast<size_t>(floats) * sizeof(float),
                  [&](int64_t b, char* shared, char*, Team team) {
                    Buffers buf;
                    buf.x = reinterpret_cast<float*>(shared);
                    buf.g = buf.x + x_floats;
                    buf.sums = buf.g + g_floats;
                    buf.sq = reinterpret_cast<double*>(buf.sums + sum_floats);
                    sample_grad(plan, buf, b, team);
                  });
}

}  // namespace ISA_NAMESPACE
}  // namespace privimage
