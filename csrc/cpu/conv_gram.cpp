// Squared norms of per-sample convolution weight gradients without the gradients:
//
//   |W_b|^2 = sum over pairs of positions (k,t), (k',t') of <g_kt, g_k't'> * sum over offsets d of <x_k,t+d, x_k',t'+d>
//
// Nothing is unfolded and nothing grows with the square of the image. For two lines of positions and a distance between
// their rows, the row-pair Grams R_r = X_r^T X_r' slide along the diagonal: a ring of them serves all kernel rows, so each
// is computed once. Then T[w][w'] = sum over (i,j) of R_{h*s+i*d}[w*s+j*d][w'*s+j*d], and the norm gains T * G.
//
//   segment  up to kLine output columns of one image with the input columns they see. A 1x1 kernel has no neighbours, so
//            there all K*T positions form one row.
//   line     adjacent segments side by side, so that small images fill the vectors and pairs of images come along.
//   phase    at stride s, kernel column j meets only columns equal to j*d mod s; packed apart, each is contiguous.
//
// The terms may cancel, so everything is in double from packing on. A pair of lines and a row distance is one task with
// its own partial sum, and those are added in a fixed order: the thread count changes no bit.
#include <cmath>

#include "gram_tile.h"
#include "kernel_list.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace privimage {
namespace ISA_NAMESPACE {
namespace {

constexpr int64_t kLine = 48;  // columns of a line; two 48 x 48 matrices of doubles fit beside the packed rows

struct Phase {
  int64_t remainder = 0, longest = 0;   // column j*d of the kernel = remainder + stride * shift, shift <= longest
  int64_t low = 0, count = 0, lanes = 0;  // packed: local columns low .. low+count-1 of a segment, in `lanes` lanes
  int64_t begin = 0;                    // lanes of a line in the phases before
};

// x or g of one sample and group, packed as [line][row][phase][channel][lane].
struct Operand {
  const void* src = nullptr;
  DType dtype = DType::f32;
  int64_t sample_stride = 0, channel_stride = 0, row_stride = 0;  // of src
  int64_t channels = 0, rows = 0, lanes = 0;                      // lanes of a line, all phases
  int64_t* from = nullptr;  // [line][lane]: where the value is in a row of src; -1 for zero
  int64_t size(int64_t lines) const { return lines * rows * lanes * channels; }
  int64_t at(int64_t line, int64_t row, int64_t begin) const { return ((line * rows + row) * lanes + begin) * channels; }
};

// Memory cut from one block; without a block it only counts.
struct Arena {
  char* base = nullptr;
  size_t used = 0;
  template <class T>
  T* take(int64_t n) {
    char* p = base ? base + used : nullptr;
    used += (static_cast<size_t>(n) * sizeof(T) + 63) / 64 * 64;
    return reinterpret_cast<T*>(p);
  }
};

// Everything about the layer that does not depend on the sample.
struct Plan {
  const ConvGramParams& p;
  bool flat;                                         // 1x1, no padding: one row of all positions
  int64_t kernel_w, stride_w;
  int64_t images, in_width, out_height, out_width;
  int64_t seg_width, image_segs, segs, line_segs, lines;
  int64_t width, seg_pitch, pitch;                   // of a segment's rows and columns and of a whole line, in R and G
  int64_t matrix;                                    // doubles of one
  int64_t span;                                      // rows of the ring
  int64_t phases = 0, tasks;
  Operand x, g;
  Phase* phase = nullptr;      // by the first kernel column that has it
  int64_t* phase_of = nullptr;  // by kernel column
  uint64_t* valid = nullptr;   // [line][pitch]: all bits where there is an output

  explicit Plan(const ConvGramParams& params) : p(params) {
    flat = p.kernel[0] == 1 && p.kernel[1] == 1 && p.padding[0] == 0 && p.padding[1] == 0;
    kernel_w = p.kernel[1];
    stride_w = flat ? 1 : p.stride[1];
    images = flat ? 1 : p.multiplicity;
    out_height = flat ? 1 : p.out_size[0];
    out_width = flat ? p.multiplicity * p.out_size[0] * p.out_size[1] : p.out_size[1];
    in_width = flat ? out_width : p.in_size[1];
    // Symmetry skips half of the pairs of lines but nothing within one, so a few short lines beat a long one.
    const int64_t widest = flat ? max64(16, min64(kLine, align_lanes(div_up(out_width, 4)))) : kLine;
    image_segs = div_up(out_width, widest);
    seg_width = div_up(out_width, image_segs);
    segs = images * image_segs;
    line_segs = flat ? 1 : min64(segs, max64(1, kLine / align_lanes(seg_width)));
    lines = div_up(segs, line_segs);
    span = (p.kernel[0] - 1) * p.dilation[0] + 1;
    tasks = lines * out_height + lines * (lines - 1) / 2 * (2 * out_height - 1);

    const int64_t longest = (kernel_w - 1) * p.dilation[1] / stride_w;
    width = seg_width + longest;
    seg_pitch = max64(width, align_lanes(seg_width));
    for (int64_t j = 0; j < kernel_w; ++j) {
      if (first_with(j) != j) continue;
      const Phase f = make_phase(j);
      seg_pitch = max64(seg_pitch, f.low + f.lanes);
      x.lanes += line_segs * f.lanes;
      ++phases;
    }
    pitch = align_lanes(line_segs * seg_pitch + longest + kLineAlign);  // vectors may begin on the last column
    matrix = line_segs * width * pitch;
    g.lanes = line_segs * align_lanes(seg_width);
    x.src = p.x, x.dtype = p.x_dtype, x.rows = flat ? 1 : p.in_size[0], x.channels = p.in_channels / p.groups;
    g.src = p.g, g.dtype = p.g_dtype, g.rows = out_height, g.channels = p.out_channels / p.groups;
    x.sample_stride = p.multiplicity * p.x_stride[0], g.sample_stride = p.multiplicity * p.g_stride[0];
    x.channel_stride = p.x_stride[1], g.channel_stride = p.g_stride[1];
    x.row_stride = p.x_stride[2], g.row_stride = p.g_stride[2];
  }

  int64_t shift(int64_t j) const { return j * p.dilation[1] / stride_w; }
  int64_t segments_of(int64_t line) const { return min64(line_segs, segs - line * line_segs); }
  int64_t outputs_of(int64_t seg) const {
    return seg < segs ? min64(seg_width, out_width - seg % image_segs * seg_width) : 0;
  }

  int64_t first_with(int64_t j) const {  // this kernel column's remainder
    int64_t first = 0;
    while ((j - first) * p.dilation[1] % stride_w != 0) ++first;
    return first;
  }

  Phase make_phase(int64_t j) const {
    Phase f;
    f.remainder = j * p.dilation[1] % stride_w;
    for (int64_t other = j; other < kernel_w; ++other)
      if (first_with(other) == j) f.longest = shift(other);
    int64_t high = seg_width + f.longest;
    if (image_segs == 1) {  // padding is not packed: the matrices hold zeros around what is
      const int64_t before = p.padding[1] - f.remainder;
      f.low = before > 0 ? div_up(before, stride_w) : 0;
      high = in_width + before > 0 ? min64(high, div_up(in_width + before, stride_w)) : 0;
    }
    f.count = max64(0, high - f.low);
    f.lanes = align_lanes(f.count);
    return f;
  }

  // Element of `stride`'s tensor within its row: column `column` of image `image`.
  int64_t source(const int64_t stride[4], int64_t image, int64_t column, bool input) const {
    if (!flat) return image * stride[0] + column * stride[3];
    const int64_t ow = column % p.out_size[1], line = column / p.out_size[1];
    const int64_t oh = line % p.out_size[0], k = line / p.out_size[0];
    return k * stride[0] + oh * (input ? p.stride[0] : 1) * stride[2] + ow * (input ? p.stride[1] : 1) * stride[3];
  }

  void tables(Arena& arena) {
    phase = arena.take<Phase>(kernel_w);
    phase_of = arena.take<int64_t>(kernel_w);
    x.from = arena.take<int64_t>(lines * x.lanes);
    g.from = arena.take<int64_t>(lines * g.lanes);
    valid = arena.take<uint64_t>(lines * pitch);
    if (!arena.base) return;
    int64_t begin = 0;
    for (int64_t j = 0; j < kernel_w; ++j) {
      phase_of[j] = first_with(j);
      if (phase_of[j] != j) continue;
      phase[j] = make_phase(j);
      phase[j].begin = begin;
      begin += line_segs * phase[j].lanes;
    }
    std::memset(valid, 0, static_cast<size_t>(lines * pitch) * sizeof *valid);
    for (int64_t line = 0; line < lines; ++line)
      for (int64_t s = 0; s < line_segs; ++s) fill_segment(line, s);
  }

  void fill_segment(int64_t line, int64_t s) {
    const int64_t seg = line * line_segs + s, image = seg / image_segs, column0 = seg % image_segs * seg_width;
    const int64_t outputs = outputs_of(seg);
    for (int64_t w = 0; w < align_lanes(seg_width); ++w)
      g.from[line * g.lanes + s * align_lanes(seg_width) + w] =
          w < outputs ? source(p.g_stride, image, column0 + w, false) : -1;
    for (int64_t w = 0; w < outputs; ++w) valid[line * pitch + s * seg_pitch + w] = ~uint64_t{0};
    for (int64_t j = 0; j < kernel_w; ++j) {
      if (phase_of[j] != j) continue;
      const Phase& f = phase[j];
      int64_t* from = x.from + line * x.lanes + f.begin + s * f.lanes;
      for (int64_t i = 0; i < f.lanes; ++i) {
        const int64_t local = f.low + i;
        const int64_t column = (column0 + local) * stride_w + f.remainder - (flat ? 0 : p.padding[1]);
        bool used = false;  // what no output sees stays out: it may be inf
        for (int64_t other = j; other < kernel_w && !used; ++other)
          used = phase_of[other] == j && local >= shift(other) && local - shift(other) < outputs;
        used = used && i < f.count && column >= 0 && column < in_width;
        from[i] = used ? source(p.x_stride, image, column, true) : -1;
      }
    }
  }
};

// Of one thread, except that a sample shared by all threads is packed into the first one's x and g.
struct Buffers {
  double* x;
  double* g;
  double* partial;      // [group][task]
  double* ring;         // [row of the ring][phase] matrices
  double* products;     // the matrix G
  int64_t* held;        // which row of x a place of the ring holds
  const double** taps;  // the ring seen from each kernel offset

  Buffers(const Plan& plan, Arena& arena) {
    x = arena.take<double>(plan.x.size(plan.lines));
    g = arena.take<double>(plan.g.size(plan.lines));
    partial = arena.take<double>(plan.p.groups * plan.tasks);
    ring = arena.take<double>(plan.span * plan.phases * plan.matrix);
    products = arena.take<double>(plan.matrix);
    held = arena.take<int64_t>(plan.span);
    taps = arena.take<const double*>(plan.p.kernel[0] * plan.p.kernel[1]);
  }
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
void pack_rows(const Operand& o, const Plan& plan, bool input, double* packed, int64_t b, int64_t group, int member,
               int team) {
  const T* src = static_cast<const T*>(o.src) + b * o.sample_stride + group * o.channels * o.channel_stride;
  for (int64_t i = member; i < plan.lines * o.rows; i += team) {
    const int64_t line = i / o.rows, row = i % o.rows;
    for (int64_t j = 0; j < (input ? plan.kernel_w : 1); ++j) {
      if (input && plan.phase_of[j] != j) continue;
      const int64_t begin = input ? plan.phase[j].begin : 0;
      const int64_t lanes = input ? plan.line_segs * plan.phase[j].lanes : o.lanes;
      pack_line(packed + o.at(line, row, begin), lanes, src + row * o.row_stride, o.from + line * o.lanes + begin, lanes,
                o.channels, o.channel_stride);
    }
  }
}

void pack(const Operand& o, const Plan& plan, bool input, double* packed, int64_t b, int64_t group, int member, int team) {
  auto* f = o.dtype == DType::bf16 ? pack_rows<bf16> : pack_rows<float>;
  f(o, plan, input, packed, b, group, member, team);
}

// Sum over the valid outputs of lines a and b of T * G.
double contract(const Plan& plan, const double* const* taps, int64_t count, const double* products, int64_t a, int64_t b) {
  const int64_t columns = plan.segments_of(b) * plan.seg_pitch;
  const uint64_t* valid = plan.valid + b * plan.pitch;
  vd sum = vd{};
  for (int64_t s = 0; s < plan.segments_of(a); ++s) {
    const int64_t outputs = plan.outputs_of(a * plan.line_segs + s);
    for (int64_t w = 0; w < outputs; ++w) {
      const int64_t row = (s * plan.width + w) * plan.pitch;
      for (int64_t v = 0; v < columns; v += kDoubleLanes) {
        vd t = load<vd>(taps[0] + row + v);
        for (int64_t i = 1; i < count; ++i) t += load<vd>(taps[i] + row + v);
        const vd term = t * load<vd>(products + row + v);
        sum += reinterpret_cast<vd>(reinterpret_cast<vul>(term) & load<vul>(valid + v));
      }
    }
  }
  double total = 0;
  for (int i = 0; i < kDoubleLanes; ++i) total += sum[i];
  return total;
}

// Lines a and b, rows h and h + distance for every h.
double run_task(const Plan& plan, const Buffers& own, const double* x, const double* g, int64_t a, int64_t b,
                int64_t distance) {
  const ConvGramParams& p = plan.p;
  double sum = 0;
  for (int64_t i = 0; i < plan.span; ++i) own.held[i] = -1;
  const int64_t a_segs = plan.segments_of(a), b_segs = plan.segments_of(b);
  for (int64_t h = max64(0, -distance); h < min64(plan.out_height, plan.out_height - distance); ++h) {
    int64_t count = 0;
    for (int64_t i = 0; i < p.kernel[0]; ++i) {
      const int64_t padded = plan.flat ? 0 : h * p.stride[0] + i * p.dilation[0];
      const int64_t row = padded - p.padding[0], other = row + distance * p.stride[0];
      if (row < 0 || row >= plan.x.rows || other < 0 || other >= plan.x.rows) continue;
      double* slot = own.ring + padded % plan.span * plan.phases * plan.matrix;
      const bool fresh = own.held[padded % plan.span] != row;
      own.held[padded % plan.span] = row;
      double* place = slot;
      for (int64_t j = 0; j < plan.kernel_w; ++j) {
        const Phase& f = plan.phase[j];
        if (plan.phase_of[j] != j) continue;
        if (fresh && f.lanes) {
          const LineLayout to{b_segs, f.lanes, f.low, f.count, plan.width, plan.seg_pitch, plan.pitch};
          gram(x + plan.x.at(a, row, f.begin), x + plan.x.at(b, other, f.begin), plan.line_segs * f.lanes,
               plan.x.channels, a_segs, to, place);
        }
        for (int64_t tap = j; tap < plan.kernel_w; ++tap)
          if (plan.phase_of[tap] == j) own.taps[count++] = place + plan.shift(tap) * (plan.pitch + 1);
        place += plan.matrix;
      }
    }
    if (count == 0) continue;
    const int64_t lanes = align_lanes(plan.seg_width);
    const LineLayout to{b_segs, lanes, 0, plan.seg_width, plan.width, plan.seg_pitch, plan.pitch};
    gram(g + plan.g.at(a, h, 0), g + plan.g.at(b, h + distance, 0), plan.g.lanes, plan.g.channels, a_segs, to, own.products);
    sum += contract(plan, own.taps, count, own.products, a, b);
  }
  return sum;
}

// One sample, by `team` threads of which this is `member`; `shared` is where it is packed.
void sample_norm(const Plan& plan, const Buffers& own, const Buffers& shared, int64_t b, int member, int team) {
  for (int64_t group = 0; group < plan.p.groups; ++group) {
    pack(plan.x, plan, true, shared.x, b, group, member, team);
    pack(plan.g, plan, false, shared.g, b, group, member, team);
    barrier(team);
    int64_t task = 0;
    double* partial = shared.partial + group * plan.tasks;
    for (int64_t i = 0; i < plan.lines; ++i) {
      for (int64_t j = i; j < plan.lines; ++j) {
        // Each unordered pair of (line, row) once; the others are its mirror images.
        for (int64_t d = i == j ? 0 : 1 - plan.out_height; d < plan.out_height; ++d, ++task) {
          if (task % team != member) continue;
          const double weight = i == j && d == 0 ? 1.0 : 2.0;
          partial[task] = weight * run_task(plan, own, shared.x, shared.g, i, j, d);
        }
      }
    }
    barrier(team);
  }
  if (member == 0) {
    double sum = 0;
    for (int64_t i = 0; i < plan.p.groups * plan.tasks; ++i) sum += shared.partial[i];
    // Rounding may leave a zero norm below zero; what is not finite has to stay so.
    plan.p.sq_norms[b] = std::isfinite(sum) ? (sum > 0 ? sum : 0.0) : std::fabs(sum);
  }
  barrier(team);
}

}  // namespace

void conv_gram(const ConvGramParams& p) {
  if (p.samples == 0) return;
  Plan plan(p);
  const int threads = static_cast<int>(max64(1, p.num_threads));
  // Samples in whole rounds of one per thread; what is left over is shared by all threads, task by task.
  const int64_t alone = p.samples / threads * threads;
  Arena count;
  plan.tables(count);
  const size_t table_bytes = count.used;
  Buffers(plan, count);
  const size_t bytes = count.used - table_bytes;
  Arena arena;
  arena.base = static_cast<char*>(scratch(table_bytes + bytes * static_cast<size_t>(threads)));
  plan.tables(arena);
  const auto buffers = [&](int team) {
    Arena own{arena.base, table_bytes + bytes * static_cast<size_t>(team)};
    return Buffers(plan, own);
  };
  const auto work = [&](int member, int team) {
    const Buffers own = buffers(member);
    // Around what a Gram writes there is padding: zero from here on.
    std::memset(own.ring, 0, static_cast<size_t>(plan.span * plan.phases * plan.matrix) * sizeof(double));
    std::memset(own.products, 0, static_cast<size_t>(plan.matrix) * sizeof(double));
    for (int64_t b = member; b < alone; b += team) sample_norm(plan, own, own, b, 0, 1);
    barrier(team);
    for (int64_t b = alone; b < p.samples; ++b) sample_norm(plan, own, buffers(0), b, member, team);
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
