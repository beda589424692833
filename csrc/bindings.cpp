// Python bindings, the only file that knows pybind11. Pointers arrive as integers (tensor.data_ptr()); native.py has
// checked every size and keeps the tensors alive. The GIL is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__linux__) && defined(_OPENMP)
#include <dlfcn.h>
#endif

#include <array>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "chacha20.h"
#include "gaussian.h"
#include "kernels.h"
#include "optimizer_step.h"

namespace py = pybind11;
using namespace privimage;
using py::literals::operator""_a;

namespace {

using Address = uintptr_t;
using Pair = std::array<int64_t, 2>;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

template <size_t N>
void copy(const std::array<int64_t, N>& from, int64_t (&to)[N]) {
  for (size_t i = 0; i < N; ++i) to[i] = from[i];
}

NoiseKey noise_key(const py::bytes& key, uint32_t stream, uint32_t rank, uint32_t step, int64_t offset) {
  const std::string bytes = key;
  if (bytes.size() != 32) throw py::value_error("key: expected 32 bytes, got " + std::to_string(bytes.size()));
  NoiseKey noise;
  for (size_t i = 0; i < 32; ++i) noise.key[i / 4] |= uint32_t{static_cast<uint8_t>(bytes[i])} << (8 * (i % 4));
  noise.stream = stream;
  noise.rank = rank;
  noise.step = step;
  noise.offset = offset;
  return noise;
}

enum class Backend { cpu, cuda, emulated };

// cuda_op is null in a build without CUDA, where backend_of has already refused that backend.
template <class Params>
void run_on(Backend backend, const Params& p, void (*cpu)(const Params&), void (*emulated_op)(const Params&, void*),
            std::common_type_t<void (*)(const Params&, void*)> cuda_op, Address stream) {
  py::gil_scoped_release release;
  if (backend == Backend::cpu) return cpu(p);
  if (backend == Backend::emulated) return emulated_op(p, nullptr);
  cuda_op(p, pointer<void>(stream));
}

#ifdef PRIVIMAGE_WITH_CUDA
#define CUDA_OP(op) cuda::op
#else
#define CUDA_OP(op) nullptr
#endif

Backend backend_of(const std::string& device) {
  if (device == "cpu") return Backend::cpu;
  if (device == "emulated") return Backend::emulated;
#ifdef PRIVIMAGE_WITH_CUDA
  if (device == "cuda") return Backend::cuda;
#endif
  throw py::value_error("device: this build has no kernels for " + device);
}

#define RUN_ON(device, p, cpu_op, op, stream) run_on(backend_of(device), p, cpu_op, emulated::op, CUDA_OP(op), stream)

void conv_weight_grad(Address x, Address g, int x_dtype, int g_dtype, int64_t samples, int64_t multiplicity,
                      int64_t groups, int64_t in_channels, int64_t out_channels, Pair in_size, Pair out_size,
                      Pair kernel, Pair stride, Pair padding, Pair dilation, std::array<int64_t, 4> x_stride,
                      std::array<int64_t, 4> g_stride, Address out, std::array<int64_t, 5> out_stride, bool accumulate,
                      Address sq_norms, int num_threads, const std::string& device, Address stream, Address partials,
                      int64_t partials_size, bool tf32, Address coef, int64_t chunk, int algorithm, int out_dtype) {
  ConvWeightGradParams p;
  p.x = pointer<void>(x);
  p.g = pointer<void>(g);
  p.x_dtype = static_cast<DType>(x_dtype);
  p.g_dtype = static_cast<DType>(g_dtype);
  p.samples = samples;
  p.multiplicity = multiplicity;
  p.groups = groups;
  p.in_channels = in_channels;
  p.out_channels = out_channels;
  copy(in_size, p.in_size);
  copy(out_size, p.out_size);
  copy(kernel, p.kernel);
  copy(stride, p.stride);
  copy(padding, p.padding);
  copy(dilation, p.dilation);
  copy(x_stride, p.x_stride);
  copy(g_stride, p.g_stride);
  p.out = pointer<void>(out);
  p.out_dtype = static_cast<DType>(out_dtype);
  copy(out_stride, p.out_stride);
  p.accumulate = accumulate;
  p.sq_norms = pointer<double>(sq_norms);
  p.num_threads = num_threads;
  p.partials = pointer<double>(partials);
  p.partials_size = partials_size;
  p.tf32 = tf32;
  p.coef = pointer<float>(coef);
  p.chunk = chunk;
  p.algorithm = static_cast<ConvWeightGradParams::Algorithm>(algorithm);
  RUN_ON(device, p, cpu_kernels().conv_weight_grad, conv_weight_grad, stream);
}

// One linear layer: x (rows, positions, inputs), g (rows, positions, outputs), out (samples, outputs, inputs).
using LinearItem = std::tuple<Address, Address, int, int64_t, int64_t, int64_t, int64_t, std::array<int64_t, 3>,
                              std::array<int64_t, 3>, Address, std::array<int64_t, 3>, Address, Address, int64_t>;

void linear_weight_grads(const std::string& device, const std::vector<LinearItem>& items, int64_t multiplicity, bool tf32,
                         int out_dtype, Address stream) {
  const Backend backend = backend_of(device);
  if (backend == Backend::cpu) throw py::value_error("linear_weight_grads: a CPU does one after the other");
  std::vector<ConvWeightGradParams> list;
  list.reserve(items.size());
  for (const auto& [x, g, dtype, samples, positions, inputs, outputs, x_stride, g_stride, out, out_stride, sq_norms, partials,
                    partials_size] : items) {
    ConvWeightGradParams p;  // a 1×1 convolution
    p.x = pointer<void>(x);
    p.g = pointer<void>(g);
    p.x_dtype = p.g_dtype = static_cast<DType>(dtype);
    p.samples = samples;
    p.multiplicity = multiplicity;
    p.in_channels = inputs;
    p.out_channels = outputs;
    p.in_size[1] = p.out_size[1] = positions;
    copy({x_stride[0], x_stride[2], 0, x_stride[1]}, p.x_stride);
    copy({g_stride[0], g_stride[2], 0, g_stride[1]}, p.g_stride);
    p.out = pointer<void>(out);
    p.out_dtype = static_cast<DType>(out_dtype);
    copy({out_stride[0], out_stride[1], out_stride[2], 0, 0}, p.out_stride);
    p.sq_norms = pointer<double>(sq_norms);
    p.partials = pointer<double>(partials);
    p.partials_size = partials_size;
    p.tf32 = tf32;
    list.push_back(p);
  }
  ConvWeightGradsParams p;
  p.items = list.data();
  p.num_items = static_cast<int64_t>(list.size());
  run_on<ConvWeightGradsParams>(backend, p, nullptr, emulated::conv_weight_grads, CUDA_OP(conv_weight_grads), stream);
}

void conv_gram(Address x, Address g, int x_dtype, int g_dtype, int64_t samples, int64_t multiplicity, int64_t groups,
               int64_t in_channels, int64_t out_channels, Pair in_size, Pair out_size, Pair kernel, Pair stride,
               Pair padding, Pair dilation, std::array<int64_t, 4> x_stride, std::array<int64_t, 4> g_stride,
               Address sq_norms, int num_threads, const std::string& device, Address stream, Address partials,
               int64_t partials_size) {
  ConvGramParams p;
  p.x = pointer<void>(x);
  p.g = pointer<void>(g);
  p.x_dtype = static_cast<DType>(x_dtype);
  p.g_dtype = static_cast<DType>(g_dtype);
  p.samples = samples;
  p.multiplicity = multiplicity;
  p.groups = groups;
  p.in_channels = in_channels;
  p.out_channels = out_channels;
  copy(in_size, p.in_size);
  copy(out_size, p.out_size);
  copy(kernel, p.kernel);
  copy(stride, p.stride);
  copy(padding, p.padding);
  copy(dilation, p.dilation);
  copy(x_stride, p.x_stride);
  copy(g_stride, p.g_stride);
  p.sq_norms = pointer<double>(sq_norms);
  p.num_threads = num_threads;
  p.partials = pointer<double>(partials);
  p.partials_size = partials_size;
  RUN_ON(device, p, cpu_kernels().conv_gram, conv_gram, stream);
}

void affine_grad(Address x, Address g, int x_dtype, int g_dtype, bool channels_last, bool per_position, Address mean,
                 Address rstd, int64_t samples, int64_t multiplicity, int64_t channels, int64_t positions,
                 int64_t groups, Address weight, Address bias, bool accumulate_weight, bool accumulate_bias,
                 Address sq_norms_weight, Address sq_norms_bias, int num_threads, const std::string& device,
                 Address stream) {
  AffineGradParams p;
  p.x = pointer<void>(x);
  p.g = pointer<void>(g);
  p.x_dtype = static_cast<DType>(x_dtype);
  p.g_dtype = static_cast<DType>(g_dtype);
  p.layout = channels_last ? AffineGradParams::Layout::channels_last : AffineGradParams::Layout::channels_first;
  p.stats = per_position ? AffineGradParams::Stats::per_position : AffineGradParams::Stats::per_group;
  p.mean = pointer<float>(mean);
  p.rstd = pointer<float>(rstd);
  p.samples = samples;
  p.multiplicity = multiplicity;
  p.channels = channels;
  p.positions = positions;
  p.groups = groups;
  p.weight = pointer<float>(weight);
  p.bias = pointer<float>(bias);
  p.accumulate_weight = accumulate_weight;
  p.accumulate_bias = accumulate_bias;
  p.sq_norms_weight = pointer<double>(sq_norms_weight);
  p.sq_norms_bias = pointer<double>(sq_norms_bias);
  p.num_threads = num_threads;
  RUN_ON(device, p, cpu_kernels().affine_grad, affine_grad, stream);
}

void group_norm(const std::string& device, Address x, int dtype, int64_t rows, int64_t positions, int64_t channels,
                int64_t groups, Address weight, Address bias, Address shift, double eps, bool silu, Address mean, Address rstd,
                Address y, Address g, Address dx, Address weight_rows, Address bias_rows, Address shift_rows, Address stream) {
  GroupNormParams p;
  p.x = pointer<void>(x);
  p.dtype = static_cast<DType>(dtype);
  p.rows = rows;
  p.positions = positions;
  p.channels = channels;
  p.groups = groups;
  p.weight = pointer<float>(weight);
  p.bias = pointer<float>(bias);
  p.eps = eps;
  p.silu = silu;
  p.mean = pointer<float>(mean);
  p.rstd = pointer<float>(rstd);
  p.y = pointer<void>(y);
  p.g = pointer<void>(g);
  p.dx = pointer<void>(dx);
  p.weight_rows = pointer<float>(weight_rows);
  p.bias_rows = pointer<float>(bias_rows);
  p.shift = pointer<float>(shift);
  p.shift_rows = pointer<float>(shift_rows);
  const Backend backend = backend_of(device);
  if (backend == Backend::cpu) throw py::value_error("group_norm: a CPU has torch's");
  run_on<GroupNormParams>(backend, p, nullptr, emulated::group_norm, CUDA_OP(group_norm), stream);
}

void residual(const std::string& device, int dtype, int64_t rows, int64_t positions, int64_t channels, Address a, Address b,
              Address bias_a, Address bias_b, double scale, Address out, Address g, Address d, Address bias_rows,
              Address stream) {
  ResidualParams p;
  p.a = pointer<void>(a);
  p.b = pointer<void>(b);
  p.dtype = static_cast<DType>(dtype);
  p.rows = rows;
  p.positions = positions;
  p.channels = channels;
  p.bias_a = pointer<float>(bias_a);
  p.bias_b = pointer<float>(bias_b);
  p.scale = static_cast<float>(scale);
  p.out = pointer<void>(out);
  p.g = pointer<void>(g);
  p.d = pointer<void>(d);
  p.bias_rows = pointer<float>(bias_rows);
  const Backend backend = backend_of(device);
  if (backend == Backend::cpu) throw py::value_error("residual: a CPU has torch's");
  run_on<ResidualParams>(backend, p, nullptr, emulated::residual, CUDA_OP(residual), stream);
}

void embedding_grad(Address ids, Address g, int g_dtype, int64_t samples, int64_t positions, int64_t dim,
                    int64_t num_embeddings, int64_t padding_idx, Address out, bool accumulate, Address sq_norms,
                    int num_threads, const std::string& device, Address stream) {
  EmbeddingGradParams p;
  p.ids = pointer<int64_t>(ids);
  p.g = pointer<void>(g);
  p.g_dtype = static_cast<DType>(g_dtype);
  p.samples = samples;
  p.positions = positions;
  p.dim = dim;
  p.num_embeddings = num_embeddings;
  p.padding_idx = padding_idx;
  p.out = pointer<float>(out);
  p.accumulate = accumulate;
  p.sq_norms = pointer<double>(sq_norms);
  p.num_threads = num_threads;
  RUN_ON(device, p, cpu_kernels().embedding_grad, embedding_grad, stream);
}

void clip_factors_(Address sq_norms, Address sample_weight, double max_grad_norm, int64_t samples, Address factors,
                   const std::string& device, Address stream) {
  ClipFactorsParams p;
  p.sq_norms = pointer<double>(sq_norms);
  p.sample_weight = pointer<double>(sample_weight);
  p.max_grad_norm = max_grad_norm;
  p.samples = samples;
  p.factors = pointer<float>(factors);
  RUN_ON(device, p, clip_factors, clip_factors, stream);
}

// (out, stored, stored_stride, outer, offsets, channels, dtype of stored) of one layer.
using SumItem = std::tuple<Address, Address, int64_t, int64_t, int64_t, int64_t, int>;

std::vector<WeightedSumParams::Item> sum_items(const std::vector<SumItem>& items) {
  std::vector<WeightedSumParams::Item> list;
  list.reserve(items.size());
  for (const auto& [out, stored, stored_stride, outer, offsets, channels, dtype] : items)
    list.push_back({pointer<float>(out), pointer<void>(stored), stored_stride, outer, offsets, channels, static_cast<DType>(dtype)});
  return list;
}

WeightedSumParams sum_params(const std::vector<WeightedSumParams::Item>& items, Address coef, int64_t samples, int num_threads) {
  WeightedSumParams p;
  p.items = items.data();
  p.num_items = static_cast<int64_t>(items.size());
  p.coef = pointer<float>(coef);
  p.samples = samples;
  p.num_threads = num_threads;
  return p;
}

void weighted_sum(const std::string& device, const std::vector<SumItem>& items, Address coef, int64_t samples,
                  int num_threads, Address stream) {
  const auto list = sum_items(items);
  const WeightedSumParams p = sum_params(list, coef, samples, num_threads);
  RUN_ON(device, p, cpu_kernels().weighted_sum, weighted_sum, stream);
}

void gaussian_noise(const py::bytes& key, uint32_t step, uint32_t rank, uint32_t stream, int64_t offset, int64_t size,
                    Address out, int num_threads) {
  GaussianNoiseParams p;
  p.noise = noise_key(key, stream, rank, step, offset);
  p.size = size;
  p.out = pointer<double>(out);
  p.num_threads = num_threads;
  py::gil_scoped_release release;
  cpu_kernels().gaussian_noise(p);
}

py::bytes chacha20_block_(const py::bytes& key, uint32_t counter, std::array<uint32_t, 3> nonce) {
  const NoiseKey noise = noise_key(key, 0, 0, 0, 0);
  uint32_t words[16];
  chacha20_block<uint32_t>(noise.key, counter, nonce.data(), 0u, words);
  std::string bytes;
  for (uint32_t word : words)
    for (int shift = 0; shift < 32; shift += 8) bytes.push_back(static_cast<char>(word >> shift));
  return py::bytes(bytes);
}

// On a CPU the noise takes so much longer than memory that one pass would gain nothing (measured).
void summed_step_on_cpu(const SummedStepParams& p) {
  cpu_kernels().weighted_sum(p.sum);
  cpu_kernels().private_step(p.step);
}

void private_step(const std::string& device, Address param, Address grad_sum, Address exp_avg, Address exp_avg_sq,
                  Address ema, Address grad_out, int64_t size, const py::bytes& key, uint32_t step, uint32_t rank,
                  uint32_t stream, int64_t offset, double noise_std, double denominator, int optimizer, double lr,
                  double beta1, double beta2, double eps, double weight_decay, double momentum, double ema_decay,
                  int64_t optimizer_step, int num_threads, Address cuda_stream, const std::vector<SumItem>& items,
                  Address coef, int64_t samples, Address armed, const std::string& phase) {
  PrivateStepParams p;
  p.param = pointer<float>(param);
  p.grad_sum = pointer<float>(grad_sum);
  p.exp_avg = pointer<float>(exp_avg);
  p.exp_avg_sq = pointer<float>(exp_avg_sq);
  p.ema = pointer<float>(ema);
  p.grad_out = pointer<float>(grad_out);
  p.size = size;
  p.noise = noise_key(key, stream, rank, step, offset);
  p.noise_std = noise_std;
  p.denominator = denominator;
  p.optimizer = static_cast<Optimizer>(optimizer);
  p.lr = lr;
  p.beta1 = beta1;
  p.beta2 = beta2;
  p.eps = eps;
  p.weight_decay = weight_decay;
  p.momentum = momentum;
  p.ema_decay = ema_decay;
  p.optimizer_step = optimizer_step;
  p.num_threads = num_threads;
  p.armed = pointer<void>(armed);
  void (*const nowhere)(const PrivateStepParams&) = [](const PrivateStepParams&) {  // only captured launches need it
    throw std::runtime_error("private_step: a step on the CPU is not armed");
  };
  if (phase == "arm") return RUN_ON(device, p, nowhere, arm_step, cuda_stream);
  if (phase == "spend") return RUN_ON(device, p, nowhere, spend_step, cuda_stream);
  if (items.empty()) return RUN_ON(device, p, cpu_kernels().private_step, private_step, cuda_stream);
  const auto list = sum_items(items);
  const SummedStepParams both{p, sum_params(list, coef, samples, num_threads)};
  RUN_ON(device, both, summed_step_on_cpu, summed_step, cuda_stream);
}

py::dict build_info() {
  std::vector<std::string> compiled, usable;
  const std::string in_use = cpu_kernels().isa;
  for (int level = 0; level < kIsaLevels; ++level) {
    const CpuKernels* table = cpu_kernels_compiled(level);
    if (!table) continue;
    compiled.emplace_back(table->isa);
    if (set_cpu_isa(table->isa)) usable.emplace_back(table->isa);
  }
  set_cpu_isa(in_use.c_str());
  py::dict info("isa"_a = in_use, "isa_compiled"_a = compiled, "isa_usable"_a = usable);
#ifdef _OPENMP
  info["openmp"] = true;
  std::string runtime;
#if defined(__linux__)
  // torch's wheel brings an OpenMP runtime of the same name; this says which one this module's calls reach.
  Dl_info where;
  if (dladdr(reinterpret_cast<void*>(&omp_get_max_threads), &where) && where.dli_fname) runtime = where.dli_fname;
#endif
  info["openmp_runtime"] = runtime;
#else
  info["openmp"] = false;
  info["openmp_runtime"] = "";
#endif
#ifdef PRIVIMAGE_WITH_CUDA
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  info["cuda_status"] = PRIVIMAGE_CUDA_STATUS;
  info["cuda_archs"] = PRIVIMAGE_CUDA_ARCHS;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of privimage_fast; call them through privimage_fast.ops.";
  m.def("conv_weight_grad", &conv_weight_grad, py::kw_only(), "x"_a, "g"_a, "x_dtype"_a, "g_dtype"_a, "samples"_a,
        "multiplicity"_a, "groups"_a, "in_channels"_a, "out_channels"_a, "in_size"_a, "out_size"_a, "kernel"_a,
        "stride"_a, "padding"_a, "dilation"_a, "x_stride"_a, "g_stride"_a, "out"_a, "out_stride"_a, "accumulate"_a,
        "sq_norms"_a, "num_threads"_a, "device"_a = "cpu", "stream"_a = 0, "partials"_a = 0, "partials_size"_a = 0,
        "tf32"_a = false, "coef"_a = 0, "chunk"_a = 1, "algorithm"_a = 0, "out_dtype"_a = 0);
  m.def("linear_weight_grads", &linear_weight_grads, py::kw_only(), "device"_a, "items"_a, "multiplicity"_a, "tf32"_a,
        "out_dtype"_a, "stream"_a);
  m.def("conv_gram", &conv_gram, py::kw_only(), "x"_a, "g"_a, "x_dtype"_a, "g_dtype"_a, "samples"_a, "multiplicity"_a,
        "groups"_a, "in_channels"_a, "out_channels"_a, "in_size"_a, "out_size"_a, "kernel"_a, "stride"_a, "padding"_a,
        "dilation"_a, "x_stride"_a, "g_stride"_a, "sq_norms"_a, "num_threads"_a, "device"_a = "cpu", "stream"_a = 0,
        "partials"_a = 0, "partials_size"_a = 0);
  m.def("affine_grad", &affine_grad, py::kw_only(), "x"_a, "g"_a, "x_dtype"_a, "g_dtype"_a, "channels_last"_a,
        "per_position"_a, "mean"_a, "rstd"_a, "samples"_a, "multiplicity"_a, "channels"_a, "positions"_a, "groups"_a,
        "weight"_a, "bias"_a, "accumulate_weight"_a, "accumulate_bias"_a, "sq_norms_weight"_a, "sq_norms_bias"_a,
        "num_threads"_a, "device"_a = "cpu", "stream"_a = 0);
  m.def("group_norm", &group_norm, py::kw_only(), "device"_a, "x"_a, "dtype"_a, "rows"_a, "positions"_a, "channels"_a,
        "groups"_a, "weight"_a, "bias"_a, "shift"_a, "eps"_a, "silu"_a, "mean"_a, "rstd"_a, "y"_a = 0, "g"_a = 0, "dx"_a = 0,
        "weight_rows"_a = 0, "bias_rows"_a = 0, "shift_rows"_a = 0, "stream"_a = 0);
  m.def("residual", &residual, py::kw_only(), "device"_a, "dtype"_a, "rows"_a, "positions"_a, "channels"_a, "a"_a = 0,
        "b"_a = 0, "bias_a"_a = 0, "bias_b"_a = 0, "scale"_a, "out"_a = 0, "g"_a = 0, "d"_a = 0, "bias_rows"_a = 0,
        "stream"_a = 0);
  m.def("embedding_grad", &embedding_grad, py::kw_only(), "ids"_a, "g"_a, "g_dtype"_a, "samples"_a, "positions"_a,
        "dim"_a, "num_embeddings"_a, "padding_idx"_a, "out"_a, "accumulate"_a, "sq_norms"_a, "num_threads"_a,
        "device"_a = "cpu", "stream"_a = 0);
  m.def("clip_factors", &clip_factors_, py::kw_only(), "sq_norms"_a, "sample_weight"_a, "max_grad_norm"_a, "samples"_a,
        "factors"_a, "device"_a = "cpu", "stream"_a = 0);
  m.def("weighted_sum", &weighted_sum, py::kw_only(), "device"_a, "items"_a, "coef"_a, "samples"_a, "num_threads"_a,
        "stream"_a);
  m.def("gaussian_noise", &gaussian_noise, py::kw_only(), "key"_a, "step"_a, "rank"_a, "stream"_a, "offset"_a, "size"_a,
        "out"_a, "num_threads"_a);
  m.def("chacha20_block", &chacha20_block_, "key"_a, "counter"_a, "nonce"_a);
  m.def("private_step", &private_step, py::kw_only(), "device"_a, "param"_a, "grad_sum"_a, "exp_avg"_a, "exp_avg_sq"_a,
        "ema"_a, "grad_out"_a, "size"_a, "key"_a, "step"_a, "rank"_a, "stream"_a, "offset"_a, "noise_std"_a,
        "denominator"_a, "optimizer"_a, "lr"_a, "beta1"_a, "beta2"_a, "eps"_a, "weight_decay"_a, "momentum"_a,
        "ema_decay"_a, "optimizer_step"_a, "num_threads"_a, "cuda_stream"_a, "items"_a = std::vector<SumItem>(),
        "coef"_a = 0, "samples"_a = 0, "armed"_a = 0, "phase"_a = "step");
  m.attr("ARMED_STEP_BYTES") = sizeof(ArmedStep);
  m.def("build_info", &build_info);
#ifdef PRIVIMAGE_WITH_CUDA
  m.def("cuda_problem", &cuda::problem);
#else
  m.def("cuda_problem", [] { return std::string("this build has no CUDA kernels"); });
#endif
  m.def("emulated_launches", &emulation::launches);
  m.def("set_emulation_schedule", &emulation::set_schedule, "seed"_a);
  m.def("set_cpu_isa", [](const std::string& name) { return set_cpu_isa(name.c_str()); }, "name"_a);
}
