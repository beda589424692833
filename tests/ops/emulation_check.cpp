// Built with AddressSanitizer by test_emulation_faults.py. One argument: a faulty kernel that the emulation has to catch,
// "sound" for the same kernels as they should be, or "ops" for every kernel of the package on buffers that end where
// their data ends.
#define PRIVIMAGE_EMULATE
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "../../csrc/cuda/mma.cuh"
#include "../../csrc/cuda/reduce.cuh"
#include "../../csrc/optimizer_step.h"

using namespace privimage;
using namespace privimage::emulated;

static const char* const kOp = "check";

// --- Faulty kernels ----------------------------------------------------------------------------------------------------

__global__ void reverse(const float* in, float* out, bool barrier) {
  STATIC_SHARED(float, tile, 64);
  tile[threadIdx.x] = in[threadIdx.x];
  if (barrier) __syncthreads();
  out[threadIdx.x] = tile[63 - threadIdx.x];
}

// Threads write in turn; without the second barrier a thread may write before the others have read.
__global__ void turns(float* out, bool barrier) {
  STATIC_SHARED(float, last, 1);
  float sum = 0;
  for (unsigned turn = 0; turn < 64; ++turn) {
    if (threadIdx.x == turn) last[0] = static_cast<float>(turn);
    __syncthreads();
    sum += last[0];
    if (barrier) __syncthreads();
  }
  out[threadIdx.x] = sum;
}

__global__ void uninitialised(float* out, bool set) {
  STATIC_SHARED(float, tile, 64);
  if (set || threadIdx.x != 17) tile[threadIdx.x] = 1;
  __syncthreads();
  float sum = 0;
  for (int i = 0; i < 64; ++i) sum += tile[i];
  out[threadIdx.x] = sum;
}

__global__ void staged(const float* in, float* out, bool wait) {
  DYNAMIC_SHARED(shared);
  float* tile = reinterpret_cast<float*>(shared);
  emulated::copy_async(tile + 4 * threadIdx.x, in + 4 * threadIdx.x, true);
  emulated::commit_copies();
  if (wait) emulated::wait_copies<0>();
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x];
}

__global__ void diverging(float* out, bool together) {
  if (together || threadIdx.x < 48) __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void half_a_warp(float* out, bool together) {
  float v = 1;
  if (together || threadIdx.x < 16) v = __shfl_xor_sync(kFullWarp, v, 1);
  out[threadIdx.x] = v;
}

__global__ void past_global(float* out, bool inside) { out[threadIdx.x + (inside ? 0 : 1)] = 1; }

__global__ void past_shared(float* out, bool inside) {
  DYNAMIC_SHARED(shared);
  reinterpret_cast<float*>(shared)[threadIdx.x + (inside ? 0 : 1)] = 1;
  out[threadIdx.x] = 1;
}

// Whether out is what it should be, thread by thread.
template <class Launch, class Expected>
static bool right(Launch run, Expected expected) {
  std::vector<float> out(64, -1.0f);
  run(out.data());
  for (int i = 0; i < 64; ++i)
    if (!(out[i] == static_cast<float>(expected(i)))) return false;
  return true;
}

static bool run_case(const std::string& name, bool sound) {
  std::vector<float> in(256);
  for (int i = 0; i < 256; ++i) in[i] = static_cast<float>(i);
  const auto one = [](int) { return 1; };
  if (name == "missing-barrier")
    return right([&](float* out) { LAUNCH(kOp, reverse, 1, 64, 0, nullptr, in.data(), out, sound); }, [](int i) { return 63 - i; });
  if (name == "missing-second-barrier")
    return right([&](float* out) { LAUNCH(kOp, turns, 1, 64, 0, nullptr, out, sound); }, [](int) { return 2016; });
  if (name == "uninitialised")
    return right([&](float* out) { LAUNCH(kOp, uninitialised, 1, 64, 0, nullptr, out, sound); }, [](int) { return 64; });
  if (name == "missing-wait")
    return right([&](float* out) { LAUNCH(kOp, staged, 1, 64, 1024, nullptr, in.data(), out, sound); }, [](int i) { return i; });
  if (name == "diverging") return right([&](float* out) { LAUNCH(kOp, diverging, 1, 64, 0, nullptr, out, sound); }, one);
  if (name == "half-a-warp") return right([&](float* out) { LAUNCH(kOp, half_a_warp, 1, 64, 0, nullptr, out, sound); }, one);
  if (name == "past-global") {
    std::unique_ptr<float[]> own(new float[64]);
    LAUNCH(kOp, past_global, 1, 64, 0, nullptr, own.get(), sound);
    return own[63] == 1;
  }
  if (name == "past-shared") return right([&](float* out) { LAUNCH(kOp, past_shared, 1, 64, 256, nullptr, out, sound); }, one);
  std::fprintf(stderr, "no case %s\n", name.c_str());
  std::exit(2);
}

// --- Every kernel on exact buffers ---------------------------------------------------------------------------------------

static std::mt19937 generator(7);

// Heap memory of exactly this size, 16-byte aligned as device memory is.
template <class T>
struct Exact {
  std::unique_ptr<T[]> memory;
  explicit Exact(int64_t n) : memory(new T[static_cast<size_t>(n)]) {}
  T* get() const { return memory.get(); }
};

static Exact<unsigned char> random_tensor(int64_t n, DType dtype) {
  Exact<unsigned char> bytes(n * (dtype == DType::bf16 ? 2 : 4));
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < n; ++i) {
    const float v = normal(generator);
    const uint16_t half = static_cast<uint16_t>(__float_as_uint(v) >> 16);
    std::memcpy(bytes.get() + i * (dtype == DType::bf16 ? 2 : 4), dtype == DType::bf16 ? static_cast<const void*>(&half) : &v,
                dtype == DType::bf16 ? 2 : 4);
  }
  return bytes;
}

struct Conv {
  int64_t samples, multiplicity, groups, channels, outputs, height, width, kernel, stride, padding, dilation;
};

template <class Params>
static void describe(Params& p, const Conv& c, bool channels_last) {
  p.samples = c.samples;
  p.multiplicity = c.multiplicity;
  p.groups = c.groups;
  p.in_channels = c.channels;
  p.out_channels = c.outputs;
  const int64_t size[2] = {c.height, c.width};
  for (int i = 0; i < 2; ++i) {
    p.in_size[i] = size[i];
    p.out_size[i] = (size[i] + 2 * c.padding - c.dilation * (c.kernel - 1) - 1) / c.stride + 1;
    p.kernel[i] = c.kernel;
    p.stride[i] = c.stride;
    p.padding[i] = c.padding;
    p.dilation[i] = c.dilation;
  }
  const auto strides = [&](int64_t (&s)[4], int64_t channels, const int64_t (&plane)[2]) {
    s[0] = channels * plane[0] * plane[1];
    s[1] = channels_last ? 1 : plane[0] * plane[1];
    s[2] = channels_last ? channels * plane[1] : plane[1];
    s[3] = channels_last ? channels : 1;
  };
  strides(p.x_stride, c.channels, p.in_size);
  strides(p.g_stride, c.outputs, p.out_size);
}

static bool finite(const double* values, int64_t n) {
  return std::all_of(values, values + n, [](double v) { return std::isfinite(v); });
}

static bool run_ops() {
  bool good = true;
  // samples, K, groups, channels, outputs, height, width, kernel, stride, padding, dilation
  const Conv convs[] = {{1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 1},    {2, 3, 1, 5, 7, 1, 1, 3, 1, 1, 1},  {2, 1, 1, 8, 8, 5, 3, 3, 1, 1, 1},
                        {1, 2, 1, 72, 136, 4, 3, 3, 1, 1, 1}, {2, 1, 4, 16, 32, 7, 6, 3, 2, 1, 1}, {1, 1, 1, 4, 12, 9, 2, 2, 3, 4, 2},
                        {1, 2, 1, 130, 66, 2, 2, 1, 1, 0, 1}, {1, 1, 3, 6, 9, 8, 8, 3, 1, 2, 2}};
  for (const Conv& c : convs)
    for (DType dtype : {DType::f32, DType::bf16})
      for (bool channels_last : {true, false})
        for (bool store : {true, false}) {
          ConvWeightGradParams p;
          describe(p, c, channels_last);
          const int64_t rows = c.samples * c.multiplicity;
          const auto x = random_tensor(rows * p.x_stride[0], dtype), g = random_tensor(rows * p.g_stride[0], dtype);
          p.x = x.get();
          p.g = g.get();
          p.x_dtype = p.g_dtype = dtype;
          const int64_t in_group = c.channels / c.groups, columns = in_group * c.kernel * c.kernel;
          Exact<float> out(c.samples * c.outputs * columns);
          if (store) p.out = out.get();
          const int64_t strides[5] = {c.outputs * columns, columns, 1, c.kernel * in_group, in_group};
          std::copy(strides, strides + 5, p.out_stride);
          p.partials_size = c.samples * c.groups * ((c.outputs / c.groups + 63) / 64) * ((columns + 63) / 64);
          Exact<double> partials(p.partials_size), norms(c.samples), gram_norms(c.samples);
          p.partials = partials.get();
          p.sq_norms = norms.get();
          emulated::conv_weight_grad(p, nullptr);
          good &= finite(norms.get(), c.samples);
          const std::vector<double> alone(norms.get(), norms.get() + c.samples);
          const ConvWeightGradParams several[] = {p, p};
          emulated::conv_weight_grads({several, 2}, nullptr);
          good &= std::equal(alone.begin(), alone.end(), norms.get());
          if (store) {  // rounded, then once more on top of it
            Exact<uint16_t> halves(c.samples * c.outputs * columns);
            Exact<double> rounded(c.samples);
            p.out = halves.get();
            p.out_dtype = DType::bf16;
            p.sq_norms = rounded.get();
            for (double factor : {1.0, 4.0}) {
              emulated::conv_weight_grad(p, nullptr);
              for (int64_t b = 0; b < c.samples; ++b)
                good &= std::fabs(rounded.get()[b] / (factor * norms.get()[b]) - 1) <= 0x1p-6;
              p.accumulate = true;
            }
          }

          ConvGramParams q;
          describe(q, c, channels_last);
          q.x = x.get();
          q.g = g.get();
          q.x_dtype = q.g_dtype = dtype;
          const int64_t side = (c.multiplicity * q.out_size[0] * q.out_size[1] + 63) / 64;
          q.partials_size = c.samples * c.groups * side * (side + 1) / 2;
          Exact<double> gram_partials(q.partials_size);
          q.partials = gram_partials.get();
          q.sq_norms = gram_norms.get();
          emulated::conv_gram(q, nullptr);
          for (int64_t b = 0; b < c.samples; ++b)
            good &= std::fabs(gram_norms.get()[b] - norms.get()[b]) <= 1e-5 * norms.get()[b] + 1e-12;
        }

  for (int64_t channels : {1, 9, 40})
    for (bool last : {true, false}) {
      AffineGradParams p;
      const int64_t positions = 11, rows = 6;
      const auto x = random_tensor(rows * channels * positions, DType::bf16), g = random_tensor(rows * channels * positions, DType::f32);
      const auto mean = random_tensor(rows, DType::f32), rstd = random_tensor(rows, DType::f32);
      p.x = x.get();
      p.g = g.get();
      p.x_dtype = DType::bf16;
      p.layout = last ? AffineGradParams::Layout::channels_last : AffineGradParams::Layout::channels_first;
      p.mean = reinterpret_cast<const float*>(mean.get());
      p.rstd = reinterpret_cast<const float*>(rstd.get());
      p.samples = 3;
      p.multiplicity = 2;
      p.channels = channels;
      p.positions = positions;
      Exact<float> weight(3 * channels), bias(3 * channels);
      Exact<double> norms(6);
      p.weight = weight.get();
      p.bias = bias.get();
      p.sq_norms_weight = norms.get();
      p.sq_norms_bias = norms.get() + 3;
      emulated::affine_grad(p, nullptr);
      good &= finite(norms.get(), 6);
    }

  {
    EmbeddingGradParams p;
    Exact<int64_t> ids(2 * 5);
    for (int i = 0; i < 10; ++i) ids.get()[i] = i % 4;
    const auto g = random_tensor(2 * 5 * 130, DType::f32);
    Exact<float> out(2 * 4 * 130);
    Exact<double> norms(2);
    p.ids = ids.get();
    p.g = g.get();
    p.samples = 2;
    p.positions = 5;
    p.dim = 130;
    p.num_embeddings = 4;
    p.out = out.get();
    p.sq_norms = norms.get();
    emulated::embedding_grad(p, nullptr);
    good &= finite(norms.get(), 2);
  }

  for (int64_t n : {1, 7, 8, 64, 1003}) {
    const auto stored = random_tensor(3 * n, DType::f32);
    Exact<float> sum(n), coef(3), factors(3);
    Exact<double> norms(3);
    std::fill_n(sum.get(), n, 0.0f);
    std::fill_n(norms.get(), 3, 4.0);
    ClipFactorsParams c;
    c.sq_norms = norms.get();
    c.max_grad_norm = 1;
    c.samples = 3;
    c.factors = coef.get();
    emulated::clip_factors(c, nullptr);
    good &= coef.get()[2] == 0.5f;
    const WeightedSumParams::Item item{sum.get(), stored.get(), n, 1, 1, n};
    WeightedSumParams w;
    w.items = &item;
    w.num_items = 1;
    w.coef = coef.get();
    w.samples = 3;
    emulated::weighted_sum(w, nullptr);
    // The same as a convolution's: 4 kernel offsets or as many as divide it.
    const int64_t offsets = n == 1003 ? 17 : n == 7 ? 7 : n >= 8 ? 4 : 1;
    const WeightedSumParams::Item planes{sum.get(), item.stored, n, n == 64 ? 2 : 1, offsets, n / offsets / (n == 64 ? 2 : 1)};
    for (int64_t offset : {0, 5, 8, 11}) {
      Exact<float> param(n), first(n), second(n), ema(n), grad(n);
      for (float* t : {param.get(), first.get(), second.get(), ema.get()}) std::fill_n(t, n, 0.0f);
      PrivateStepParams p;
      p.param = param.get();
      p.grad_sum = sum.get();
      p.exp_avg = first.get();
      p.exp_avg_sq = second.get();
      p.ema = ema.get();
      p.grad_out = grad.get();
      p.size = n;
      p.noise.offset = offset;
      p.noise_std = 1;
      p.optimizer = Optimizer::adam;
      p.lr = 0.1;
      p.eps = 1e-8;
      w.items = &planes;
      if (offset < 8) {
        emulated::private_step(p, nullptr);
      } else {
        emulated::summed_step({p, w}, nullptr);
      }
      for (int64_t i = 0; i < n; ++i) good &= std::isfinite(param.get()[i]) && param.get()[i] != 0 && sum.get()[i] == 0;
      Exact<ArmedStep> armed(1);
      p.armed = armed.get();
      emulated::spend_step(p, nullptr);
      for (bool usable : {true, false}) {  // the second time nobody arms it
        if (usable) emulated::arm_step(p, nullptr);
        emulated::private_step(p, nullptr);
        for (int64_t i = 0; i < n; ++i) good &= std::isfinite(param.get()[i]) == usable;
      }
    }
  }
  return good;
}

int main(int count, char** arguments) {
  if (count < 2) return 2;
  const std::string what = arguments[1];
  if (count > 2) emulation::set_schedule(std::strtoull(arguments[2], nullptr, 10));
  try {
    bool good = true;
    if (what == "ops") {
      good = run_ops();
    } else if (what == "sound") {
      for (const char* name : {"missing-barrier", "missing-second-barrier", "uninitialised", "missing-wait", "diverging", "half-a-warp",
                               "past-global", "past-shared"})
        good &= run_case(name, true);
    } else {
      good = run_case(what, false);
    }
    std::puts(good ? "right" : "wrong");
  } catch (const std::exception& error) {
    std::printf("refused: %s\n", error.what());
  }
  return 0;
}
