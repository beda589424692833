// Which algorithm computes a convolution's weight gradient.
#include "conv_weight_grad.h"
#include "microkernel.h"

namespace privimage {
namespace ISA_NAMESPACE {
namespace {

constexpr int64_t kScratchBytes = 64 << 20;  // a thread's; Winograd needs more than that for very wide layers only

// Cycles of one step of a tile: multiply-adds two a cycle, loads two a cycle, the latency of a multiply-add.
double step_cycles(int64_t scalars, int64_t vectors) {
  const double products = 0.5 * static_cast<double>(scalars * vectors), loads = 0.5 * static_cast<double>(scalars + vectors);
  return products < 4 && loads < 4 ? 4 : products > loads ? products : loads;
}

// A matrix product's cost by blocks: the last block of vectors or of scalars may be narrow.
struct Blocks {
  double pairs;   // of a block of vectors and a block of scalars
  double cycles;  // of one step of all pairs
  Blocks(int64_t vector_channels, int64_t scalars) {
    const int64_t vb = div_up(vector_channels, kWide), sb = div_up(scalars, kBroadcasts);
    const int64_t last_vectors = vector_channels - (vb - 1) * kWide > kLanes ? kVectors : 1;
    const int64_t last_scalars = scalars - (sb - 1) * kBroadcasts;
    pairs = static_cast<double>(vb * sb);
    cycles = static_cast<double>((vb - 1) * (sb - 1)) * step_cycles(kBroadcasts, kVectors) +
             static_cast<double>(vb - 1) * step_cycles(last_scalars, kVectors) +
             static_cast<double>(sb - 1) * step_cycles(kBroadcasts, last_vectors) + step_cycles(last_scalars, last_vectors);
  }
};

// Cycles for one sample and group, up to what all algorithms share. The constants of packing, transforms and writing are
// fitted to single-thread times on AVX2 (Zen 3): 3 to 192 channels, images of 4 to 32 a side, K = 1 to 8.
double direct_cycles(const ConvWeightGradParams& p, int64_t in, int64_t out) {
  const double positions = static_cast<double>(p.multiplicity * p.out_size[0] * p.out_size[1]);
  const Blocks natural(in, out), swapped(out, 9 * in);
  const double x_blocks = static_cast<double>(div_up(in, kWide)), g_blocks = static_cast<double>(div_up(out, kBroadcasts));
  const double runs = 9 * (1 + positions / 256);
  const double by_inputs = natural.cycles * 9 * positions + natural.pairs * (40 * runs + 500);
  const double by_outputs = swapped.cycles * positions + swapped.pairs * (40 * runs / 9 + 200);
  return (by_inputs < by_outputs ? by_inputs : by_outputs) + positions * (8 * x_blocks + 6 * g_blocks);
}

double winograd_cycles(const ConvWeightGradParams& p, int64_t in, int64_t out, int64_t m) {
  const double tiles = static_cast<double>(p.multiplicity * div_up(p.out_size[0], m) * div_up(p.out_size[1], m));
  const double points = static_cast<double>((m + 2) * (m + 2)), runs = 1 + tiles / (m == 4 ? 64 : 128);
  const double x_blocks = static_cast<double>(div_up(in, kWide)), g_blocks = static_cast<double>(div_up(out, kBroadcasts));
  const double x_tile = m == 4 ? 320 : 90, g_tile = m == 4 ? 130 : 40, weights = m == 4 ? 1100 : 750;
  const Blocks blocks(in, out);
  return blocks.cycles * points * tiles + blocks.pairs * (25 * points * runs + weights) +
         tiles * (x_tile * x_blocks + g_tile * g_blocks);
}

ConvWeightGradParams::Algorithm choose(const ConvWeightGradParams& p) {
  using Algorithm = ConvWeightGradParams::Algorithm;
  // A norm without its gradient must be that of a gradient which somebody else computes: the plainest rounding.
  if (!p.out) return Algorithm::direct;
  for (int i = 0; i < 2; ++i)
    if (p.kernel[i] != 3 || p.stride[i] != 1 || p.dilation[i] != 1) return Algorithm::direct;
  const int64_t in = p.in_channels / p.groups, out = p.out_channels / p.groups;
  Algorithm best = Algorithm::direct;
  double least = direct_cycles(p, in, out);
  for (int tile = 2; tile <= 4; tile += 2) {
    const double cycles = winograd_cycles(p, in, out, tile);
    if (cycles >= least || conv_winograd_bytes(p, tile) > kScratchBytes) continue;
    least = cycles;
    best = tile == 2 ? Algorithm::winograd2 : Algorithm::winograd4;
  }
  return best;
}

}  // namespace

void conv_weight_grad(const ConvWeightGradParams& p) {
  using Algorithm = ConvWeightGradParams::Algorithm;
  if (p.samples == 0) return;
  switch (p.algorithm == Algorithm::automatic ? choose(p) : p.algorithm) {
    case Algorithm::winograd2: return conv_winograd(p, 2);
    case Algorithm::winograd4: return conv_winograd(p, 4);
    default: return conv_direct(p);
  }
}

}  // namespace ISA_NAMESPACE
}  // namespace privimage
