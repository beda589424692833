// Noise, division, optimizer and EMA in one pass. A thread owns one ChaCha20 block, so the 8 elements it serves: where
// they lie in aligned memory as two runs of four (kFours), they are read and written so.
//
// With the last micro-batch's sum (summed_step), a block owns a run of elements in shared memory: its threads add up what is
// stored of them, in stored order so that reads are coalesced, and then take the step in flat order.
#include "../chacha20.h"
#include "../gaussian.h"
#include "../optimizer_step.h"
#include "load.cuh"

namespace privimage {
namespace DEVICE_NAMESPACE {
namespace {

static __device__ __forceinline__ void draw(const NoiseKey& noise, int64_t block, double (&normals)[kNormalsPerBlock]) {
  const uint32_t nonce[3] = {noise.stream, noise.rank, noise.step};
  uint32_t words[16];
  chacha20_block<uint32_t>(noise.key, static_cast<uint32_t>(block), nonce, 0u, words);
#pragma unroll
  for (int i = 0; i < 4; ++i)
    box_muller<ScalarMath>(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3], normals[2 * i],
                           normals[2 * i + 1]);
}

// kCount elements of each array, from i on; an array that is absent reads as zeroes and is not written.
template <int kCount>
struct Elements {
  float v[kCount];

  __device__ __forceinline__ Elements(const float* from, int64_t i) {
#pragma unroll
    for (int e = 0; e < kCount; ++e) v[e] = 0;
    if (!from) return;
    if (kCount == 4) {
      const float4 four = *reinterpret_cast<const float4*>(from + i);
      v[0] = four.x;
      v[1 % kCount] = four.y;
      v[2 % kCount] = four.z;
      v[3 % kCount] = four.w;
    } else {
      v[0] = from[i];
    }
  }
  __device__ __forceinline__ void store(float* to, int64_t i) const {
    if (!to) return;
    if (kCount == 4) {
      *reinterpret_cast<float4*>(to + i) = {v[0], v[1 % kCount], v[2 % kCount], v[3 % kCount]};
    } else {
      to[i] = v[0];
    }
  }
};

// sums: those of the kCount elements from i on.
template <Optimizer kOptimizer, bool kMomentum, int kCount>
static __device__ __forceinline__ void update(const PrivateStepParams& p, const StepConstants& c, const double* normals,
                                              const float* sums, int64_t i) {
  Elements<kCount> param(p.param, i), grad(sums, 0), first(p.exp_avg, i), second(p.exp_avg_sq, i), ema(p.ema, i);
#pragma unroll
  for (int e = 0; e < kCount; ++e) {
    grad.v[e] = noisy_gradient(c, grad.v[e], normals[e]);
    param.v[e] = update_element<kOptimizer, kMomentum, ScalarMath>(c, param.v[e], grad.v[e], first.v[e], second.v[e]);
    ema.v[e] += c.one_minus_ema * (param.v[e] - ema.v[e]);
  }
  Elements<kCount>(nullptr, 0).store(p.grad_sum, i);
  grad.store(p.grad_out, i);
  param.store(p.param, i);
  first.store(p.exp_avg, i);
  second.store(p.exp_avg_sq, i);
  ema.store(p.ema, i);
}

// The 8 elements of a ChaCha20 block from `first` on, as far as they are elements; sums[0] belongs to the first.
template <Optimizer kOptimizer, bool kMomentum, bool kFours>
static __device__ __forceinline__ void update_block(const PrivateStepParams& p, const StepConstants& c, int64_t block,
                                                    const float* sums, int64_t first) {
  double normals[kNormalsPerBlock] = {};
  if (c.noise_std != 0) draw(p.noise, block, normals);
  if (kFours && first + kNormalsPerBlock <= p.size) {
    update<kOptimizer, kMomentum, 4>(p, c, normals, sums, first);
    update<kOptimizer, kMomentum, 4>(p, c, normals + 4, sums + 4, first + 4);
  } else {
#pragma unroll
    for (int j = 0; j < kNormalsPerBlock; ++j)
      if (first + j >= 0 && first + j < p.size) update<kOptimizer, kMomentum, 1>(p, c, normals + j, sums + j, first + j);
  }
}

// What a captured launch cannot hold. After one use the device memory is all NaN (spend_kernel), and so is what a step then makes.
static __device__ __forceinline__ void take_armed(PrivateStepParams& p, StepConstants& c) {
  const ArmedStep& armed = *static_cast<const ArmedStep*>(p.armed);
#pragma unroll
  for (int i = 0; i < 8; ++i) p.noise.key[i] = armed.key[i];
  p.noise.stream = armed.stream;
  p.noise.rank = armed.rank;
  p.noise.step = armed.step;
  c = armed.constants;
}

// The value travels with the launch, so nothing on the host has to outlive it.
__global__ void arm_kernel(ArmedStep* to, ArmedStep value) { *to = value; }

// A launch of its own: blocks of a step run at different times, and each must find what the host armed.
__global__ void spend_kernel(uint32_t* words) {
  for (unsigned i = threadIdx.x; i < sizeof(ArmedStep) / sizeof *words; i += blockDim.x) words[i] = 0xffffffffu;
}

template <Optimizer kOptimizer, bool kMomentum, bool kFours, bool kArmed>
__global__ void __launch_bounds__(kThreads) private_step_kernel(PrivateStepParams p, StepConstants c) {
  if (kArmed) take_armed(p, c);
  const int64_t begin = p.noise.offset, end = begin + p.size;
  const int64_t last = (end + kNormalsPerBlock - 1) / kNormalsPerBlock;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  int64_t block = begin / kNormalsPerBlock + static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; block < last; block += step) {
    const int64_t first = block * kNormalsPerBlock - begin;
    update_block<kOptimizer, kMomentum, kFours>(p, c, block, p.grad_sum + first, first);
  }
}

void spend(const char* op, const PrivateStepParams& p, void* stream) {
  LAUNCH(op, spend_kernel, 1, 32, 0, stream, static_cast<uint32_t*>(p.armed));
}

bool in_fours(const PrivateStepParams& p) {
  bool fours = p.noise.offset % kNormalsPerBlock == 0;
  for (const float* t : {p.param, p.grad_sum, p.exp_avg, p.exp_avg_sq, p.ema, p.grad_out})
    fours = fours && reinterpret_cast<uintptr_t>(t) % 16 == 0;
  return fours;
}

template <Optimizer kOptimizer, bool kMomentum, bool kFours>
void launch_step(const char* op, const PrivateStepParams& p, void* stream) {
  const unsigned grid = grid_for(p.size / kNormalsPerBlock + 2);  // an offset can add a block at either end
  if (p.armed) {
    LAUNCH(op, (private_step_kernel<kOptimizer, kMomentum, kFours, true>), grid, kThreads, 0, stream, p, StepConstants{});
    spend(op, p, stream);
  } else {
    LAUNCH(op, (private_step_kernel<kOptimizer, kMomentum, kFours, false>), grid, kThreads, 0, stream, p, step_constants(p));
  }
}

template <Optimizer kOptimizer, bool kMomentum>
void run(const char* op, const PrivateStepParams& p, void* stream) {
  if (in_fours(p)) return launch_step<kOptimizer, kMomentum, true>(op, p, stream);
  launch_step<kOptimizer, kMomentum, false>(op, p, stream);
}

// --- With the last micro-batch's sum -----------------------------------------------------------------------------------

constexpr int kRun = kThreads * kNormalsPerBlock;  // elements of a block
constexpr int kItems = 64;

struct Stored {
  WeightedSumParams::Item items[kItems];  // those that have elements of this launch, by rising address
  int count;
  const float* coef;
  int64_t samples;
};
static_assert(sizeof(PrivateStepParams) + sizeof(StepConstants) + sizeof(Stored) <= 4096, "kernel arguments are limited to 4 KB");

static HOST_DEVICE int64_t size_of(const WeightedSumParams::Item& item) {
  return item.outer * item.offsets * item.channels;
}

// What is stored at one place, over all samples; T is float, or uint16_t for bfloat16.
template <class T>
static __device__ __forceinline__ float sum_stored(const Stored& s, const T* stored, int64_t stride) {
  float sum = 0;
#pragma unroll 8
  for (int64_t b = 0; b < s.samples; ++b) {
    const float factor = s.coef[b];
    if (factor != 0) sum += factor * load_float(stored, b * stride);  // a rejected sample is never multiplied
  }
  return sum;
}

// sums[i] += what is stored for element i of the item, for lo <= i < hi in a box: `planes` planes from `plane` on, and in each
// of them all offsets of `width` channels from `channel` on.
static __device__ __forceinline__ void add_box(const Stored& s, const WeightedSumParams::Item& item, int64_t plane, int planes,
                                               int64_t channel, int width, int64_t lo, int64_t hi, float* sums, int64_t first) {
  const int offsets = static_cast<int>(item.offsets);
  for (int e = static_cast<int>(threadIdx.x); e < planes * offsets * width; e += kThreads) {
    const int line = e / width, offset = line % offsets;
    const int64_t c = channel + e % width, corner = (plane + line / offsets) * item.offsets * item.channels;
    const int64_t i = corner + c * offsets + offset;
    if (i < lo || i >= hi) continue;
    const int64_t at = corner + offset * item.channels + c;
    sums[i - first] += item.stored_dtype == DType::bf16
                           ? sum_stored(s, static_cast<const uint16_t*>(item.stored) + at, item.stored_stride)
                           : sum_stored(s, static_cast<const float*>(item.stored) + at, item.stored_stride);
  }
}

// The same for every element lo .. hi - 1; sums[0] belongs to element `first`.
static __device__ __forceinline__ void add_stored(const Stored& s, const WeightedSumParams::Item& item, int64_t lo, int64_t hi,
                                                  float* sums, int64_t first) {
  if (item.offsets == 1) return add_box(s, item, 0, 1, lo, static_cast<int>(hi - lo), lo, hi, sums, first);
  // Part of a plane, whole planes, part of a plane.
  const int64_t plane = item.offsets * item.channels, whole = (lo + plane - 1) / plane, last = hi / plane;
  if (lo % plane) {
    const int64_t end = hi < whole * plane ? hi : whole * plane, channel = lo % plane / item.offsets;
    const int64_t past = (end - 1) % plane / item.offsets + 1;
    add_box(s, item, whole - 1, 1, channel, static_cast<int>(past - channel), lo, hi, sums, first);
  }
  if (whole < last)
    add_box(s, item, whole, static_cast<int>(last - whole), 0, static_cast<int>(item.channels), lo, hi, sums, first);
  if (whole <= last && hi % plane)
    add_box(s, item, last, 1, 0, static_cast<int>((hi % plane - 1) / item.offsets + 1), lo, hi, sums, first);
}

template <Optimizer kOptimizer, bool kMomentum, bool kFours>
__global__ void __launch_bounds__(kThreads) summed_step_kernel(PrivateStepParams p, StepConstants c, Stored s) {
  DYNAMIC_SHARED(shared);
  float* const sums = reinterpret_cast<float*>(shared);
  const int64_t begin = p.noise.offset, block = begin / kNormalsPerBlock + static_cast<int64_t>(blockIdx.x) * kThreads;
  // Of what the block serves, elements from .. end - 1 exist.
  const int64_t first = block * kNormalsPerBlock - begin, from = first > 0 ? first : 0;
  const int64_t end = first + kRun < p.size ? first + kRun : p.size;
  for (int64_t i = from + threadIdx.x; i < end; i += kThreads) sums[i - first] = p.grad_sum[i];
  __syncthreads();
  for (int k = 0; k < s.count; ++k) {
    const WeightedSumParams::Item& item = s.items[k];
    const int64_t start = item.out - p.grad_sum, size = size_of(item);  // start < 0: begun by an earlier launch
    if (start >= end) break;
    const int64_t lo = from > start ? from - start : 0, hi = end - start < size ? end - start : size;
    if (lo < hi) add_stored(s, item, lo, hi, sums, first - start);
  }
  __syncthreads();
  const int at = static_cast<int>(threadIdx.x) * kNormalsPerBlock;
  if (first + at < p.size) update_block<kOptimizer, kMomentum, kFours>(p, c, block + threadIdx.x, sums + at, first + at);
}

// Elements lo .. hi - 1 of the flat tensors, which still know their place in the noise.
PrivateStepParams part(PrivateStepParams p, int64_t lo, int64_t hi) {
  for (float** t : {&p.param, &p.grad_sum, &p.exp_avg, &p.exp_avg_sq, &p.ema, &p.grad_out})
    if (*t) *t += lo;
  p.noise.offset += lo;
  p.size = hi - lo;
  return p;
}

template <Optimizer kOptimizer, bool kMomentum>
void run(const char* op, const SummedStepParams& p, void* stream) {
  const StepConstants c = step_constants(p.step);
  const WeightedSumParams::Item* const items = p.sum.items;
  const auto start = [&](int64_t i) { return static_cast<int64_t>(items[i].out - p.step.grad_sum); };
  int64_t next = 0;
  for (int64_t lo = 0, hi; lo < p.step.size; lo = hi) {
    Stored s{};
    s.coef = p.sum.coef;
    s.samples = p.sum.samples;
    while (next < p.sum.num_items && start(next) + size_of(items[next]) <= lo) ++next;
    int64_t i = next;
    for (; i < p.sum.num_items && s.count < kItems; ++i) s.items[s.count++] = items[i];
    // What is left is for another launch, from a whole ChaCha20 block on: an item may be in both.
    const int64_t offset = p.step.noise.offset;
    hi = i == p.sum.num_items ? p.step.size : (start(i) + offset) / kNormalsPerBlock * kNormalsPerBlock - offset;
    const PrivateStepParams q = part(p.step, lo, hi);
    const unsigned grid = blocks_of(op, (q.size + q.noise.offset % kNormalsPerBlock + kRun - 1) / kRun);
    constexpr size_t kShared = kRun * sizeof(float);
    if (in_fours(q)) {
      LAUNCH(op, (summed_step_kernel<kOptimizer, kMomentum, true>), grid, kThreads, kShared, stream, q, c, s);
    } else {
      LAUNCH(op, (summed_step_kernel<kOptimizer, kMomentum, false>), grid, kThreads, kShared, stream, q, c, s);
    }
  }
}

template <class Params>
void run(const char* op, const PrivateStepParams& step, const Params& p, void* stream) {
  if (step.size == 0) return;
  if (step.optimizer == Optimizer::adam) return run<Optimizer::adam, false>(op, p, stream);
  if (step.optimizer == Optimizer::adamw) return run<Optimizer::adamw, false>(op, p, stream);
  if (step.exp_avg) return run<Optimizer::sgd, true>(op, p, stream);
  run<Optimizer::sgd, false>(op, p, stream);
}

}  // namespace

void arm_step(const PrivateStepParams& p, void* stream) {
  ArmedStep value{};
  for (int i = 0; i < 8; ++i) value.key[i] = p.noise.key[i];
  value.stream = p.noise.stream;
  value.rank = p.noise.rank;
  value.step = p.noise.step;
  value.constants = step_constants(p);
  LAUNCH(__func__, arm_kernel, 1, 1, 0, stream, static_cast<ArmedStep*>(p.armed), value);
}

void spend_step(const PrivateStepParams& p, void* stream) { spend(__func__, p, stream); }

void private_step(const PrivateStepParams& p, void* stream) { run(__func__, p, p, stream); }
void summed_step(const SummedStepParams& p, void* stream) { run(__func__, p.step, p, stream); }

}  // namespace DEVICE_NAMESPACE
}  // namespace privimage
