// The whole contract between Python and the kernels: one params struct and one launcher per op.
//
// Nothing here knows torch or Python: pointers, sizes, strides counted in elements. A batch has samples*multiplicity
// rows; sample b owns rows b*K .. b*K+K-1 and its gradient is the sum over them. The caller has checked every size; a
// launcher trusts its struct. No field may be left uninitialised, so each has a default.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace privimage {

enum class DType : int { f32 = 0, bf16 = 1 };

// W_b[p,c,i,j] = sum over K rows and output positions of g[p,oh,ow] * x[c, oh*stride+i*dilation-padding, ...].
// A linear layer is this with a 1x1 kernel and T positions.
struct ConvWeightGradParams {
  enum class Algorithm : int { automatic = 0, direct = 1, winograd2 = 2, winograd4 = 3 };  // Winograd: 3x3, stride 1
  const void* x = nullptr;
  const void* g = nullptr;
  DType x_dtype = DType::f32, g_dtype = DType::f32;
  int64_t samples = 0, multiplicity = 1, groups = 1;
  int64_t in_channels = 0, out_channels = 0;
  int64_t in_size[2] = {1, 1}, out_size[2] = {1, 1};
  int64_t kernel[2] = {1, 1}, stride[2] = {1, 1}, padding[2] = {0, 0}, dilation[2] = {1, 1};
  int64_t x_stride[4] = {0, 0, 0, 0};       // row, channel, height, width
  int64_t g_stride[4] = {0, 0, 0, 0};
  void* out = nullptr;                      // null: norms only
  DType out_dtype = DType::f32;             // bf16, on CUDA only: rounded to nearest even, and the norm is of what is rounded
  int64_t out_stride[5] = {0, 0, 0, 0, 0};  // sample, output channel, input channel in the group, kernel h, kernel w
  bool accumulate = false;                  // out += W_b, and the norm is that of the sum
  double* sq_norms = nullptr;               // (samples,) squared norms of what is in out
  Algorithm algorithm = Algorithm::automatic;
  int num_threads = 1;
  // CUDA only. partials: room for a number a tile of 64 × 64, (samples, groups, ceil(p / 64), ceil(c * kernel / 64)).
  double* partials = nullptr;
  int64_t partials_size = 0;
  bool tf32 = false;  // one product of rounded operands instead of three; the norm is still that of what is in out
  // Not null: out[i] = sum of coef[b] * W_b over samples i * chunk .. (i+1) * chunk - 1, and no norms. A sample whose
  // coefficient is 0 adds nothing, whatever it holds.
  const float* coef = nullptr;
  int64_t chunk = 1;
};

// Several of these at once, without coefficients. On CUDA, those with one kind of tile share a launch, up to a dozen of
// them, and the norms of all another.
struct ConvWeightGradsParams {
  const ConvWeightGradParams* items = nullptr;
  int64_t num_items = 0;
};

// The squared norms of a ConvWeightGradParams alone, from inner products of pairs of positions; W_b is never formed.
struct ConvGramParams {
  const void* x = nullptr;
  const void* g = nullptr;
  DType x_dtype = DType::f32, g_dtype = DType::f32;
  int64_t samples = 0, multiplicity = 1, groups = 1;
  int64_t in_channels = 0, out_channels = 0;
  int64_t in_size[2] = {1, 1}, out_size[2] = {1, 1};
  int64_t kernel[2] = {1, 1}, stride[2] = {1, 1}, padding[2] = {0, 0}, dilation[2] = {1, 1};
  int64_t x_stride[4] = {0, 0, 0, 0};  // row, channel, height, width
  int64_t g_stride[4] = {0, 0, 0, 0};
  double* sq_norms = nullptr;  // (samples,)
  int num_threads = 1;
  double* partials = nullptr;  // CUDA only: (samples, groups, n (n + 1) / 2) with n = ceil(positions of a sample / 64)
  int64_t partials_size = 0;
};

// Affine gradients: dbias_c = sum g, dweight_c = sum g * (x - mean) * rstd, over everything but sample and channel.
// mean == nullptr: bias only. x and g share one layout.
struct AffineGradParams {
  enum class Layout : int { channels_first = 0, channels_last = 1 };  // (R, C, S) or (R, S, C), contiguous
  enum class Stats : int { per_group = 0, per_position = 1 };         // mean, rstd are (R, groups) or (R, S)
  const void* x = nullptr;
  const void* g = nullptr;
  DType x_dtype = DType::f32, g_dtype = DType::f32;
  Layout layout = Layout::channels_first;
  Stats stats = Stats::per_group;
  const float* mean = nullptr;
  const float* rstd = nullptr;
  int64_t samples = 0, multiplicity = 1, channels = 0, positions = 0, groups = 1;
  float* weight = nullptr;  // (samples, channels); unused without mean
  float* bias = nullptr;    // (samples, channels)
  bool accumulate_weight = false, accumulate_bias = false;
  double* sq_norms_weight = nullptr;
  double* sq_norms_bias = nullptr;
  int num_threads = 1;
};

// y = (x - mean) * rstd * weight + bias, then y * sigmoid(y) with silu; with g its backward pass. On GPUs alone.
// x, y, g, dx are (rows, positions, channels), contiguous, 16-byte aligned; channels a multiple of 8.
struct GroupNormParams {
  const void* x = nullptr;
  DType dtype = DType::f32;  // of x, y, g, dx
  int64_t rows = 0, positions = 0, channels = 0, groups = 1;
  const float* weight = nullptr;  // (channels,); null: ones
  const float* bias = nullptr;    // (channels,); null: zeros
  const float* shift = nullptr;   // (rows, channels), added to x before anything else; null: zeros
  double eps = 0;
  bool silu = false;
  float* mean = nullptr;  // (rows, groups): written by the forward pass, read by the other
  float* rstd = nullptr;
  void* y = nullptr;
  const void* g = nullptr;       // null: the forward pass
  void* dx = nullptr;            // null: not wanted
  float* weight_rows = nullptr;  // (rows, channels): each row's gradient of weight and bias
  float* bias_rows = nullptr;
  float* shift_rows = nullptr;   // (rows, channels): the gradient of shift; null: not wanted
};

// out = (a + b + bias_a + bias_b) * scale; with g its backward pass, d = g * scale, for a and b alike. Layout as above.
struct ResidualParams {
  const void* a = nullptr;
  const void* b = nullptr;
  DType dtype = DType::f32;  // of a, b, out, g, d
  int64_t rows = 0, positions = 0, channels = 0;
  const float* bias_a = nullptr;  // (channels,); null: zeros
  const float* bias_b = nullptr;
  float scale = 1;
  void* out = nullptr;
  const void* g = nullptr;     // null: the forward pass
  void* d = nullptr;           // null: not wanted
  float* bias_rows = nullptr;  // (rows, channels): each row's gradient of either bias
};

// E_b[v,:] = sum of g over the sample's positions whose id is v; ids equal to padding_idx are dropped.
struct EmbeddingGradParams {
  const int64_t* ids = nullptr;  // (samples * positions), positions = K*T; all in [0, num_embeddings)
  const void* g = nullptr;       // (samples * positions, dim), contiguous
  DType g_dtype = DType::f32;
  int64_t samples = 0, positions = 0, dim = 0, num_embeddings = 0;
  int64_t padding_idx = -1;  // -1: none
  float* out = nullptr;      // (samples, num_embeddings, dim)
  bool accumulate = false;   // false: out is overwritten
  double* sq_norms = nullptr;
  int num_threads = 1;
};

// factors[b] = weight_b * min(1, C / sqrt(sq_norms[b])) rounded toward zero; 0 where the norm is not finite.
struct ClipFactorsParams {
  const double* sq_norms = nullptr;
  const double* sample_weight = nullptr;  // null: ones
  double max_grad_norm = 0;
  int64_t samples = 0;
  float* factors = nullptr;
};

// out += sum over b of coef[b] * stored_b; samples with coef 0 are never read. Both are (outer, offsets, channels): stored
// in that order, as conv_weight_grad writes it, and out as (outer, channels, offsets), as torch keeps a weight. With
// offsets 1 both are flat.
struct WeightedSumParams {
  struct Item {
    float* out;
    const void* stored;
    int64_t stored_stride;  // between samples
    int64_t outer, offsets, channels;
    DType stored_dtype = DType::f32;
  };
  const Item* items = nullptr;
  int64_t num_items = 0;
  const float* coef = nullptr;
  int64_t samples = 0;
  int num_threads = 1;
};

// Where in the noise space a call stands. One normal never serves two places: (stream, rank, step) are the ChaCha20
// nonce, and normal i of the call comes from block (offset + i) / 8.
struct NoiseKey {
  uint32_t key[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  uint32_t stream = 0, rank = 0, step = 0;
  int64_t offset = 0;
};

struct GaussianNoiseParams {
  NoiseKey noise;
  int64_t size = 0;
  double* out = nullptr;
  int num_threads = 1;
};

enum class Optimizer : int { sgd = 0, adam = 1, adamw = 2 };

// One pass over flat parameters: g = (grad_sum + noise_std * N(0,1)) / denominator, optimizer update, EMA, grad_sum = 0.
struct PrivateStepParams {
  float* param = nullptr;
  float* grad_sum = nullptr;
  float* exp_avg = nullptr;     // first moment, or SGD's momentum buffer (null: no momentum)
  float* exp_avg_sq = nullptr;  // Adam and AdamW only
  float* ema = nullptr;         // null: no EMA
  float* grad_out = nullptr;    // null: the noisy gradient is not kept
  int64_t size = 0;
  NoiseKey noise;
  double noise_std = 0;  // 0: the generator is not run
  double denominator = 1;
  Optimizer optimizer = Optimizer::sgd;
  double lr = 0, beta1 = 0, beta2 = 0, eps = 0, weight_decay = 0, momentum = 0, ema_decay = 0;
  int64_t optimizer_step = 1;  // 1 at the first step, for the bias correction
  int num_threads = 1;
  // CUDA only. Not null: an ArmedStep (optimizer_step.h) in device memory, from which the kernel takes the key, the step
  // and all constants, instead of from here; so a launch that is captured in a graph can be replayed. Each use spends it.
  void* armed = nullptr;
};

// weighted_sum and private_step in one pass on a GPU, with the bits of the two: the last micro-batch's sum never goes to
// memory. The items' outputs are disjoint parts of step.grad_sum, by rising address.
struct SummedStepParams {
  PrivateStepParams step;
  WeightedSumParams sum;
};

// --- CPU: run-time dispatch over one table per instruction set ------------------------------------------------------

struct CpuKernels {
  const char* isa;
  void (*conv_weight_grad)(const ConvWeightGradParams&);
  void (*conv_gram)(const ConvGramParams&);
  void (*affine_grad)(const AffineGradParams&);
  void (*embedding_grad)(const EmbeddingGradParams&);
  void (*weighted_sum)(const WeightedSumParams&);
  void (*gaussian_noise)(const GaussianNoiseParams&);
  void (*private_step)(const PrivateStepParams&);
};

constexpr int kIsaLevels = 3;                       // baseline, avx2, avx512
const CpuKernels* cpu_kernels_compiled(int level);  // null: not compiled for this machine type
const CpuKernels& cpu_kernels();                    // the level in use
bool set_cpu_isa(const char* name);                 // "" = best; false: not compiled, or this CPU lacks it

void clip_factors(const ClipFactorsParams& params);

// Cache-line aligned memory that the calling thread keeps between calls; contents undefined. Throws std::bad_alloc.
void* scratch(size_t bytes);

// --- CUDA and its host emulation ------------------------------------------------------------------------------------
// Launchers of cuda/*.cu. `stream` is a cudaStream_t; they throw std::runtime_error on a launch error.

#ifdef PRIVIMAGE_WITH_CUDA
namespace cuda {
std::string problem();  // why the kernels cannot run here; empty: they can
void conv_weight_grad(const ConvWeightGradParams& params, void* stream);
void conv_weight_grads(const ConvWeightGradsParams& params, void* stream);
void conv_gram(const ConvGramParams& params, void* stream);
void affine_grad(const AffineGradParams& params, void* stream);
void group_norm(const GroupNormParams& params, void* stream);
void residual(const ResidualParams& params, void* stream);
void embedding_grad(const EmbeddingGradParams& params, void* stream);
void clip_factors(const ClipFactorsParams& params, void* stream);
void weighted_sum(const WeightedSumParams& params, void* stream);
void private_step(const PrivateStepParams& params, void* stream);
void arm_step(const PrivateStepParams& params, void* stream);    // writes params.armed, for one private_step
void spend_step(const PrivateStepParams& params, void* stream);  // a private_step with params.armed makes NaN from here on
void summed_step(const SummedStepParams& params, void* stream);
}  // namespace cuda
#endif

namespace emulated {  // the same .cu files compiled as C++ and run on the host, block by block
void conv_weight_grad(const ConvWeightGradParams& params, void* stream);
void conv_weight_grads(const ConvWeightGradsParams& params, void* stream);
void conv_gram(const ConvGramParams& params, void* stream);
void affine_grad(const AffineGradParams& params, void* stream);
void group_norm(const GroupNormParams& params, void* stream);
void residual(const ResidualParams& params, void* stream);
void embedding_grad(const EmbeddingGradParams& params, void* stream);
void clip_factors(const ClipFactorsParams& params, void* stream);
void weighted_sum(const WeightedSumParams& params, void* stream);
void private_step(const PrivateStepParams& params, void* stream);
void arm_step(const PrivateStepParams& params, void* stream);    // writes params.armed, for one private_step
void spend_step(const PrivateStepParams& params, void* stream);  // a private_step with params.armed makes NaN from here on
void summed_step(const SummedStepParams& params, void* stream);
}  // namespace emulated

namespace emulation {
void set_schedule(uint64_t seed);  // 0: the threads of a block run in order; otherwise shuffled, from this seed
uint64_t launches();               // since the process began
}  // namespace emulation

}  // namespace privimage
