// Per-sample convolution weight gradient with its norm in the epilogue. No im2col.
//
// A gradient tile is an outer product summed over positions: one operand is read a vector of channels at a time, the
// other one scalar at a time, broadcast. kVectors x kBroadcasts accumulators stay in registers over a run of positions,
// so each loaded vector feeds kBroadcasts multiply-adds.
//
//   natural  vectors run over input channels, scalars over output channels; one tile per kernel offset.
//   swapped  vectors run over output channels, scalars over (input channel, kernel offset) pairs: for layers with few
//            input channels (an RGB stem), where natural would leave most lanes empty.
//
// Before that, each row's x (zero-padded) and g are packed block by block of channels, so that the inner loop reads
// both as streams: x[block][image][h][w][lanes]. Rows of one sample are packed a few at a time until a run is long
// enough to pay for loading and storing the accumulators.
#include "conv_weight_grad.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace privimage {
namespace ISA_NAMESPACE {
namespace {

constexpr int kVectors = 2;                                      // vectors of a tile
constexpr int kWide = kVectors * kLanes;                         // lanes of a tile
constexpr int kBroadcasts = PRIVIMAGE_ISA_LEVEL == 2 ? 8 : 4;    // 16 of 32 registers; 8 of 16
constexpr int kTile = kWide * kBroadcasts;
constexpr int64_t kRun = 256;                                    // positions per run: 32 KiB of x at 16 lanes

// Channels in blocks of `lanes`; the last may be `last_lanes` apart. Element (c, position) sits at
// (c / lanes) * block_stride + position * (lanes of that block) + c % lanes.
struct Packing {
  int64_t channels = 0, lanes = 1, last_lanes = 1, block_stride = 0, blocks = 1;
  int64_t lanes_of(int64_t block) const { return block + 1 < blocks ? lanes : last_lanes; }
};

Packing pack_vectors(int64_t channels, int64_t positions) {
  Packing k;
  k.channels = channels;
  k.lanes = kWide;
  k.blocks = div_up(channels, kWide);
  k.last_lanes = channels - (k.blocks - 1) * kWide > kLanes ? kWide : kLanes;
  k.block_stride = positions * kWide;
  return k;
}

Packing pack_scalars(int64_t channels, int64_t positions, int64_t lanes) {
  Packing k;
  k.channels = channels;
  k.lanes = k.last_lanes = lanes;
  k.blocks = div_up(channels, lanes);
  k.block_stride = positions * lanes;
  return k;
}

// One row's activations, as the caller strides them.
struct Source {
  int64_t height, width, channel_stride, h_stride, w_stride;
};

// Where channels c0 .. c0+kLanes-1 of a packing go: one vector, or several scalar blocks, or `count` loose floats.
struct Target {
  float* base;
  int64_t position_stride;
  int64_t parts, part_stride;  // scalar blocks
  int64_t count;               // loose floats

  Target(const Packing& k, float* dst, int64_t c0) {
    const int64_t block = c0 / k.lanes;
    position_stride = k.lanes_of(block);
    base = dst + block * k.block_stride + c0 % k.lanes;
    parts = count = 0;
    part_stride = k.block_stride;
    if (k.lanes % kLanes == 0) return;
    if (kLanes % kBroadcasts == 0 && k.lanes == kBroadcasts) {
      parts = min64(kLanes / kBroadcasts, k.blocks - block);
    } else {
      count = min64(kLanes, k.channels - c0);  // such a packing has one block
    }
  }

  bool is_vector() const { return !parts && !count; }

  HOST_DEVICE void put_vector(int64_t position, vf v) const { store(base + position * position_stride, v); }

  // Lanes past the last channel are written as the zeros they hold.
  HOST_DEVICE void put(int64_t position, vf v) const {
    if (is_vector()) return put_vector(position, v);
    float* at = base + position * position_stride;
    float f[kLanes];
    store(f, v);
    for (int64_t i = 0; i < parts; ++i) std::memcpy(at + i * part_stride, f + i * kBroadcasts, sizeof(float) * kBroadcasts);
    for (int64_t i = 0; i < count; ++i) at[i] = f[i];
  }
};

template <class T>
HOST_DEVICE vf load_some(const T* p, int64_t n) {
  T values[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) values[i] = p[i];
  return load_floats(values);
}

// Packs one row; position of (h, w) is origin + h * row_pitch + w.
template <class T>
void pack(const Packing& k, float* dst, const T* src, const Source& s, int64_t origin, int64_t row_pitch) {
  const int64_t size = s.height * s.width;
  const bool plane = s.w_stride == 1 && (s.height == 1 || s.h_stride == s.width);  // positions are one line in memory
  for (int64_t c0 = 0; c0 < k.channels; c0 += kLanes) {
    const int64_t n = min64(kLanes, k.channels - c0);
    const Target target(k, dst, c0);
    const T* channel = src + c0 * s.channel_stride;
    int64_t w = 0, at = origin;
    const auto advance = [&] {
      ++at;
      if (++w == s.width) {
        w = 0;
        at += row_pitch - s.width;
      }
    };
    if (plane && s.channel_stride != 1) {
      for (int64_t i = 0; i < size; i += kLanes) {
        const int64_t m = min64(kLanes, size - i);
        vf tile[kLanes];
        if (n == kLanes && m == kLanes) {
#pragma GCC unroll 16
          for (int j = 0; j < kLanes; ++j) tile[j] = load_floats(channel + j * s.channel_stride + i);
        } else {
          for (int j = 0; j < kLanes; ++j) {
            const T* line = channel + j * s.channel_stride + i;
            tile[j] = j >= n ? vf{} : m == kLanes ? load_floats(line) : load_some(line, m);
          }
        }
        transpose(tile);
        if (target.is_vector()) {
          for (int64_t j = 0; j < m; ++j, advance()) target.put_vector(at, tile[j]);
        } else {
          for (int64_t j = 0; j < m; ++j, advance()) target.put(at, tile[j]);
        }
      }
      continue;
    }
    for (int64_t h = 0; h < s.height; ++h) {
      for (int64_t col = 0; col < s.width; ++col, advance()) {
        const T* pixel = channel + h * s.h_stride + col * s.w_stride;
        if (s.channel_stride == 1) {
          target.put(at, n == kLanes ? load_floats(pixel) : load_some(pixel, n));
        } else {
          float f[kLanes] = {};
          for (int64_t j = 0; j < n; ++j) f[j] = to_float(pixel[j * s.channel_stride]);
          target.put(at, load<vf>(f));
        }
      }
    }
  }
}

// A run of positions: images x rows x cols, and how far the vector and the scalar operand move along each.
struct Run {
  int64_t images, rows, cols;
  int64_t v_image, v_row, v_col;
  int64_t s_image, s_row, s_col;
};

// acc[j][lane] (+)= sum over the run of scalar j times vector. kGather: scalar j is at s[delta[j]], else at s[j].
template <int NB, int NV, bool kGather>
void accumulate(const Run& r, const float* v, const float* s, const int64_t* delta, float* tile, bool first) {
  vf acc[NB][NV];
  int64_t d[NB];
#pragma GCC unroll 8
  for (int j = 0; j < NB; ++j) {
    d[j] = kGather ? delta[j] : j;
#pragma GCC unroll 2
    for (int i = 0; i < NV; ++i) acc[j][i] = first ? vf{} : load<vf>(tile + (j * NV + i) * kLanes);
  }
  for (int64_t image = 0; image < r.images; ++image) {
    for (int64_t row = 0; row < r.rows; ++row) {
      const float* vp = v + image * r.v_image + row * r.v_row;
      const float* sp = s + image * r.s_image + row * r.s_row;
      for (int64_t col = 0; col < r.cols; ++col) {
        vf x[NV];
#pragma GCC unroll 2
        for (int i = 0; i < NV; ++i) x[i] = load<vf>(vp + i * kLanes);
#pragma GCC unroll 8
        for (int j = 0; j < NB; ++j) {
          const float scalar = kGather ? sp[d[j]] : sp[j];
#pragma GCC unroll 2
          for (int i = 0; i < NV; ++i) acc[j][i] += x[i] * scalar;
        }
        vp += r.v_col;
        sp += r.s_col;
      }
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < NB; ++j)
#pragma GCC unroll 2
    for (int i = 0; i < NV; ++i) store(tile + (j * NV + i) * kLanes, acc[j][i]);
}

using Accumulate = void (*)(const Run&, const float*, const float*, const int64_t*, float*, bool);

template <int NV, bool kGather>
Accumulate pick_count(int64_t n) {
  switch (n) {
    case 1: return accumulate<1, NV, kGather>;
    case 2: return accumulate<2, NV, kGather>;
    case 3: return accumulate<3, NV, kGather>;
    case 4: return accumulate<4, NV, kGather>;
    case 5: return accumulate<5, NV, kGather>;
    case 6: return accumulate<6, NV, kGather>;
    case 7: return accumulate<7, NV, kGather>;
    default: return accumulate<8, NV, kGather>;
  }
}

Accumulate pick(int64_t n, bool wide, bool gather) {
  if (wide) return gather ? pick_count<2, true>(n) : pick_count<2, false>(n);
  return gather ? pick_count<1, true>(n) : pick_count<1, false>(n);
}

// Everything about the layer that does not depend on the sample.
struct Plan {
  const ConvWeightGradParams& p;
  int64_t in, out;             // channels of a group
  int64_t offsets;             // kernel positions
  int64_t xh, xw;              // padded input, as packed
  int64_t gh, gw;              // output
  int64_t images;              // rows of the batch packed at once
  bool flat;                   // 1x1, stride 1, no padding: positions form one line
  bool swapped;
  Packing xk, gk;
  int64_t scalars, scalar_blocks, vector_blocks, units, tiles;
  int64_t x_floats, g_floats, tile_floats;

  explicit Plan(const ConvWeightGradParams& params) : p(params) {
    in = p.in_channels / p.groups;
    out = p.out_channels / p.groups;
    offsets = p.kernel[0] * p.kernel[1];
    flat = offsets == 1 && p.stride[0] == 1 && p.stride[1] == 1 && p.padding[0] == 0 && p.padding[1] == 0;
    gh = p.out_size[0];
    gw = p.out_size[1];
    // All of the input, past the last window too: a stride's remainder is not worth a special case.
    xh = p.in_size[0] + 2 * p.padding[0];
    xw = p.in_size[1] + 2 * p.padding[1];
    if (flat) {
      gw *= gh;
      xw *= xh;
      gh = xh = 1;
    }
    images = max64(1, min64(p.multiplicity, kRun / max64(1, gh * gw)));
    const int64_t natural_cost = div_up(in, kLanes) * kLanes * out * offsets;
    const int64_t swapped_cost = div_up(out, kLanes) * kLanes * in * offsets;
    swapped = swapped_cost < natural_cost;
    const int64_t xp = images * xh * xw, gp = images * gh * gw;
    xk = swapped ? pack_scalars(in, xp, in) : pack_vectors(in, xp);
    gk = swapped ? pack_vectors(out, gp) : pack_scalars(out, gp, kBroadcasts);
    scalars = swapped ? in * offsets : out;
    scalar_blocks = div_up(scalars, kBroadcasts);
    vector_blocks = swapped ? gk.blocks : xk.blocks;
    units = vector_blocks * (swapped ? 1 : offsets);
    tiles = units * scalar_blocks;
    x_floats = div_up(xk.blocks * xk.block_stride, 16) * 16;
    g_floats = div_up(gk.blocks * gk.block_stride, 16) * 16;
    tile_floats = tiles * kTile;
  }

  // Floats between x at kernel offset 0 and at `offset`, for a block of `lanes`.
  int64_t shift(int64_t offset, int64_t lanes) const {
    return ((offset / p.kernel[1]) * p.dilation[0] * xw + (offset % p.kernel[1]) * p.dilation[1]) * lanes;
  }
};

// Buffers of one team (one thread, or all threads when there are fewer samples than threads).
struct Buffers {
  float* x;
  float* g;
  float* tiles;
  double* sq;  // a partial norm per scalar block and group: the sum's order does not depend on the thread count
};

void barrier(int team) {
#ifdef _OPENMP
  if (team > 1) {
#pragma omp barrier
  }
#else
  (void)team;
#endif
}

template <class T>
void pack_rows(const Packing& k, float* dst, const void* base, const int64_t stride[4], int64_t row0, int64_t images,
               int64_t channel0, const Source& s, int64_t image_positions, int64_t origin, int64_t pitch, int member,
               int team) {
  for (int64_t i = member; i < images; i += team) {
    const T* src = static_cast<const T*>(base) + (row0 + i) * stride[0] + channel0 * stride[1];
    pack<T>(k, dst, src, s, i * image_positions + origin, pitch);
  }
}

// Adds `images` packed rows into tiles first..last.
void accumulate_tiles(const Plan& plan, const Buffers& buf, int64_t images, int64_t first, int64_t last, bool fresh) {
  const ConvWeightGradParams& p = plan.p;
  int64_t rows = plan.gh, cols = plan.gw;
  Run run{};
  run.images = images;
  if (plan.flat) {  // images follow each other too
    run.images = 1;
    cols *= images;
  }
  const int64_t rows_per_run = images > 1 ? rows : max64(1, min64(rows, kRun / max64(1, cols)));
  for (int64_t row0 = 0; row0 < rows; row0 += rows_per_run) {
    run.rows = min64(rows_per_run, rows - row0);
    const int64_t cols_per_run = rows == 1 && run.images == 1 ? kRun : cols;
    for (int64_t col0 = 0; col0 < cols; col0 += cols_per_run) {
      run.cols = min64(cols_per_run, cols - col0);
      for (int64_t tile = first; tile < last; ++tile) {
        const int64_t unit = tile / plan.scalar_blocks, sb = tile % plan.scalar_blocks;
        const int64_t vb = plan.swapped ? unit : unit / p.kernel[0] / p.kernel[1];
        const int64_t offset = plan.swapped ? 0 : unit % plan.offsets;
        const int64_t count = min64(kBroadcasts, plan.scalars - sb * kBroadcasts);
        const Packing& vk = plan.swapped ? plan.gk : plan.xk;
        const int64_t lanes = vk.lanes_of(vb);
        const int64_t xl = plan.swapped ? plan.xk.lanes : lanes, gl = plan.swapped ? lanes : plan.gk.lanes;
        const int64_t x_image = plan.xh * plan.xw * xl, x_row = p.stride[0] * plan.xw * xl, x_col = p.stride[1] * xl;
        const int64_t g_image = plan.gh * plan.gw * gl, g_row = plan.gw * gl, g_col = gl;
        const float* x = buf.x + (plan.swapped ? 0 : vb * plan.xk.block_stride) + row0 * x_row + col0 * x_col +
                         (plan.swapped ? 0 : plan.shift(offset, lanes));
        const float* g = buf.g + (plan.swapped ? vb : sb) * plan.gk.block_stride + row0 * g_row + col0 * g_col;
        const bool start = fresh && row0 == 0 && col0 == 0;
        float* out = buf.tiles + tile * kTile;
        const Accumulate f = pick(count, lanes == kWide, plan.swapped);
        if (plan.swapped) {
          int64_t delta[kBroadcasts] = {};
          for (int64_t j = 0; j < count; ++j) {
            const int64_t scalar = sb * kBroadcasts + j;  // channel-major: scalar = channel * offsets + offset
            delta[j] = scalar / plan.offsets + plan.shift(scalar % plan.offsets, plan.xk.lanes);
          }
          run.v_image = g_image, run.v_row = g_row, run.v_col = g_col;
          run.s_image = x_image, run.s_row = x_row, run.s_col = x_col;
          f(run, g, x, delta, out, start);
        } else {
          run.v_image = x_image, run.v_row = x_row, run.v_col = x_col;
          run.s_image = g_image, run.s_row = g_row, run.s_col = g_col;
          f(run, x, g, nullptr, out, start);
        }
      }
    }
  }
}

// Writes the tiles of one scalar block where the caller wants them, in the order of their addresses, and returns the
// squared norm of what was written.
double finish_block(const Plan& plan, const float* tiles, int64_t sb, int64_t group, float* out) {
  const ConvWeightGradParams& p = plan.p;
  const Packing& vk = plan.swapped ? plan.gk : plan.xk;
  const int64_t count = min64(kBroadcasts, plan.scalars - sb * kBroadcasts);
  const int64_t unit_offsets = plan.swapped ? 1 : plan.offsets;
  const int64_t step = p.out_stride[plan.swapped ? 1 : 2];
  SquareSum sq;
  for (int64_t j = 0; j < count; ++j) {
    const int64_t scalar = sb * kBroadcasts + j;
    for (int64_t o = 0; o < unit_offsets; ++o) {
      const int64_t offset = plan.swapped ? scalar % plan.offsets : o;
      for (int64_t vb = 0; vb < plan.vector_blocks; ++vb) {
        const int64_t width = vk.lanes_of(vb), n = min64(width, vk.channels - vb * kWide);
        const float* values = tiles + ((vb * unit_offsets + o) * plan.scalar_blocks + sb) * kTile + j * width;
        const int64_t channel_out = plan.swapped ? vb * kWide : scalar;
        const int64_t channel_in = plan.swapped ? scalar / plan.offsets : vb * kWide;
        float* dst = nullptr;
        if (out)
          dst = out + (group * plan.out + channel_out) * p.out_stride[1] + channel_in * p.out_stride[2] +
                (offset / p.kernel[1]) * p.out_stride[3] + (offset % p.kernel[1]) * p.out_stride[4];
        int64_t i = 0;
        if (!dst) {
          for (; i + kLanes <= n; i += kLanes) sq.add_vector(values + i);
        } else if (step == 1) {
          for (; i + kLanes <= n; i += kLanes) {
            store(dst + i, p.accumulate ? load<vf>(values + i) + load<vf>(dst + i) : load<vf>(values + i));
            sq.add_vector(p.accumulate ? dst + i : values + i);
          }
        }
        for (; i < n; ++i) {
          float v = values[i];
          if (dst) {
            if (p.accumulate) v += dst[i * step];
            dst[i * step] = v;
          }
          sq.add(v);
        }
      }
    }
  }
  return sq.total();
}

// One sample, by `team` threads of which this is `member`. All of them call it.
void sample_grad(const Plan& plan, const Buffers& buf, int64_t b, int member, int team) {
  const ConvWeightGradParams& p = plan.p;
  float* out = p.out ? p.out + b * p.out_stride[0] : nullptr;
  const int64_t first = plan.tiles * member / team, last = plan.tiles * (member + 1) / team;
  Source xs{p.in_size[0], p.in_size[1], p.x_stride[1], p.x_stride[2], p.x_stride[3]};
  Source gs{p.out_size[0], p.out_size[1], p.g_stride[1], p.g_stride[2], p.g_stride[3]};
  const int64_t x_pitch = plan.flat ? p.in_size[1] : plan.xw;
  const int64_t x_origin = plan.flat ? 0 : p.padding[0] * plan.xw + p.padding[1];
  for (int64_t group = 0; group < p.groups; ++group) {
    for (int64_t k = 0; k < p.multiplicity; k += plan.images) {
      const int64_t images = min64(plan.images, p.multiplicity - k), row = b * p.multiplicity + k;
      auto* pack_x = p.x_dtype == DType::bf16 ? pack_rows<bf16> : pack_rows<float>;
      auto* pack_g = p.g_dtype == DType::bf16 ? pack_rows<bf16> : pack_rows<float>;
      pack_x(plan.xk, buf.x, p.x, p.x_stride, row, images, group * plan.in, xs, plan.xh * plan.xw, x_origin, x_pitch,
             member, team);
      pack_g(plan.gk, buf.g, p.g, p.g_stride, row, images, group * plan.out, gs, plan.gh * plan.gw, 0, p.out_size[1],
             member, team);
      barrier(team);
      accumulate_tiles(plan, buf, images, first, last, k == 0);
      barrier(team);
    }
    for (int64_t sb = member; sb < plan.scalar_blocks; sb += team)
      buf.sq[group * plan.scalar_blocks + sb] = finish_block(plan, buf.tiles, sb, group, out);
    barrier(team);
  }
  if (member == 0) {
    double sum = 0;
    for (int64_t i = 0; i < p.groups * plan.scalar_blocks; ++i) sum += buf.sq[i];
    p.sq_norms[b] = sum;
  }
  barrier(team);
}

}  // namespace

void conv_weight_grad(const ConvWeightGradParams& p) {
  if (p.samples == 0) return;
  if (p.algorithm == ConvWeightGradParams::Algorithm::winograd2) return conv_winograd(p, 2);
  if (p.algorithm == ConvWeightGradParams::Algorithm::winograd4) return conv_winograd(p, 4);
  const Plan plan(p);
  const int threads = static_cast<int>(max64(1, p.num_threads));
  // Samples in whole rounds of one per thread; what is left over is shared by all threads, tile by tile.
  const int64_t alone = p.samples / threads * threads;
  const size_t floats = static_cast<size_t>(plan.x_floats + plan.g_floats + plan.tile_floats);
  const size_t sums = static_cast<size_t>(div_up(p.groups * plan.scalar_blocks, 8) * 8);
  const size_t bytes = floats * sizeof(float) + sums * sizeof(double);
  char* memory = static_cast<char*>(scratch(bytes * static_cast<size_t>(threads)));
  const auto buffers = [&](int team) {
    Buffers buf;
    buf.x = reinterpret_cast<float*>(memory + bytes * static_cast<size_t>(team));
    buf.g = buf.x + plan.x_floats;
    buf.tiles = buf.g + plan.g_floats;
    buf.sq = reinterpret_cast<double*>(buf.tiles + plan.tile_floats);
    return buf;
  };
  const auto work = [&](int member, int team) {
    const Buffers own = buffers(member);
    std::memset(own.x, 0, static_cast<size_t>(plan.x_floats) * sizeof(float));  // padding stays zero from here on
    for (int64_t b = member; b < alone; b += team) sample_grad(plan, own, b, 0, 1);
    barrier(team);
    for (int64_t b = alone; b < p.samples; ++b) sample_grad(plan, buffers(0), b, member, team);
  };
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    work(omp_get_thread_num(), omp_get_num_threads());
    return;
  }
#endif
  work(0, 1);
}

}  // namespace ISA_NAMESPACE
}  // namespace privimage
