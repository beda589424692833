// Runs the threads of one block as fibers of one host thread, switched at barriers and warp operations.
//
// What that shows: a thread that does not wait runs on, so what a missing barrier would have ordered happens in the
// wrong order; shuffled scheduling tries other orders. Shared memory starts as signalling NaNs. Threads that wait at
// different places are an error, not a hang. Memory faults are AddressSanitizer's part: shared memory is allocated with
// its exact size.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace privimage {
namespace emulation {

struct Index {
  unsigned x = 1, y = 1, z = 1;
  constexpr Index(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// Of the fiber that runs now. One kernel runs at a time: launches wait for each other.
extern Index thread_index, block_index, block_dim, grid_dim;

constexpr int kWarp = 32;
constexpr uint32_t kPoison = 0x7fa07fa0u;  // a signalling NaN as float32 and as two bfloat16

// Runs `thread` for every thread of the grid, block after block. Throws what a thread throws, and std::runtime_error
// where the threads of a block can no longer go on.
void launch(const char* kernel, Index grid, Index block, size_t shared_bytes, const std::function<void()>& thread);

// 0: threads in order; otherwise the order is shuffled, from this seed.
void set_schedule(uint64_t seed);

// Since the process began.
uint64_t launches();

// --- Called by device code -------------------------------------------------------------------------------------------

void sync_block();

using WarpFunction = void (*)(const unsigned char* const* in, unsigned char* const* out);

// All 32 lanes give `in`; the last to arrive computes every lane's `out`.
void warp_collective(const char* operation, WarpFunction compute, const void* in, size_t in_bytes, void* out, size_t out_bytes);

int lane();

unsigned char* dynamic_shared();
// The block's array for the declaration that `site` stands for.
unsigned char* static_shared(const void* site, size_t bytes);

// `bytes` zeroes or a copy of `src`, delivered by the wait; until then the destination is poison.
void copy_async(void* dst, const void* src, size_t bytes, bool zero);
void commit_copies();
void wait_copies(size_t pending_groups);

}  // namespace emulation
}  // namespace privimage
