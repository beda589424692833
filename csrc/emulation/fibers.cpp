#include "fibers.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace privimage {
namespace emulation {

Index thread_index, block_index, block_dim, grid_dim;

// --- Switching stacks --------------------------------------------------------------------------------------------------
#if defined(__x86_64__)
// swapcontext makes a system call each time; a warp operation switches 64 times.
extern "C" void privimage_switch_stack(void** save, void* load);
asm(R"(
.text
.hidden privimage_switch_stack
.globl privimage_switch_stack
.type privimage_switch_stack, @function
privimage_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size privimage_switch_stack, .-privimage_switch_stack
)");

struct Context {
  void* stack_pointer = nullptr;

  void prepare(unsigned char* stack, size_t bytes, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + bytes);
    *--top = nullptr;  // the return address of entry, which never returns; keeps the stack aligned as after a call
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    stack_pointer = top;
  }
  static void change(Context& from, Context& to) { privimage_switch_stack(&from.stack_pointer, to.stack_pointer); }
};
#else
struct Context {
  ucontext_t context;

  void prepare(unsigned char* stack, size_t bytes, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  static void change(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
};
#endif

// --- State of the block that runs --------------------------------------------------------------------------------------
namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kSlotBytes = 64;

// Stacks are kept for the process; each ends in a page that may not be touched.
struct Stacks {
  std::vector<unsigned char*> list;

  unsigned char* get(size_t i) {
    while (list.size() <= i) {
      void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (memory == MAP_FAILED) throw std::bad_alloc();
      mprotect(memory, 4096, PROT_NONE);
      list.push_back(static_cast<unsigned char*>(memory));
    }
    return list[i];
  }
};

enum class State { ready, at_barrier, in_warp, done };

struct Copy {
  void* dst;
  const void* src;
  size_t bytes;
  bool zero;
};

struct Fiber {
  Context context;
  unsigned char* stack = nullptr;
  Index index;
  State state = State::ready;
  const char* waits_for = "";
  std::vector<Copy> open;                // not committed
  std::deque<std::vector<Copy>> groups;  // committed, oldest first
};

struct Warp {
  int arrived = 0;
  const char* operation = nullptr;
  alignas(16) unsigned char in[kWarp][kSlotBytes], out[kWarp][kSlotBytes];
};

struct Poisoned {
  std::unique_ptr<unsigned char[]> memory;
  explicit Poisoned(size_t bytes) : memory(new unsigned char[bytes]) {
    for (size_t i = 0; i < bytes; ++i) memory[i] = reinterpret_cast<const unsigned char*>(&kPoison)[i % 4];
  }
};

struct Block {
  const std::function<void()>* thread = nullptr;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::unique_ptr<Poisoned> dynamic;
  std::map<const void*, Poisoned> statics;
  size_t at_barrier = 0;
  size_t current = 0;
  Context scheduler;
  std::exception_ptr error;
};

std::mutex one_launch;
Stacks stacks;
Block* block = nullptr;
uint64_t schedule_seed = 0, launch_count = 0;

#if defined(__SANITIZE_ADDRESS__)
const void* scheduler_bottom = nullptr;
size_t scheduler_bytes = 0;

void enter_fiber(Fiber& f) {
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, f.stack, kStackBytes);
  Context::change(block->scheduler, f.context);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
}

void leave_fiber(Fiber& f) {
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(f.state == State::done ? nullptr : &fake, scheduler_bottom, scheduler_bytes);
  Context::change(f.context, block->scheduler);
  __sanitizer_finish_switch_fiber(fake, &scheduler_bottom, &scheduler_bytes);
}
#else
void enter_fiber(Fiber& f) { Context::change(block->scheduler, f.context); }
void leave_fiber(Fiber& f) { Context::change(f.context, block->scheduler); }
#endif

void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom, &scheduler_bytes);
#endif
  Fiber& self = block->fibers[block->current];
  try {
    (*block->thread)();
  } catch (...) {
    block->error = std::current_exception();
  }
  self.state = State::done;
  leave_fiber(self);
}

void wait(State state, const char* what) {
  Fiber& self = block->fibers[block->current];
  self.state = state;
  self.waits_for = what;
  leave_fiber(self);
}

std::string stuck(const char* kernel) {
  std::map<std::string, std::pair<int, std::string>> waiting;
  for (const Fiber& f : block->fibers) {
    const std::string what = f.state == State::done ? "finished" : f.waits_for;
    auto& entry = waiting[what];
    if (entry.first++ == 0)
      entry.second = std::to_string(f.index.x) + "," + std::to_string(f.index.y) + "," + std::to_string(f.index.z);
  }
  std::string text = std::string(kernel) + ": the threads of block " + std::to_string(block_index.x) + "," +
                     std::to_string(block_index.y) + "," + std::to_string(block_index.z) + " wait for each other:";
  for (const auto& [what, entry] : waiting)
    text += " " + std::to_string(entry.first) + " at " + what + " (first: thread " + entry.second + ")";
  return text;
}

void run_block(const char* kernel, size_t shared_bytes, const std::function<void()>& thread, std::mt19937_64& random) {
  const size_t threads = size_t{block_dim.x} * block_dim.y * block_dim.z;
  Block state;
  block = &state;
  state.thread = &thread;
  state.fibers.resize(threads);
  state.warps.resize((threads + kWarp - 1) / kWarp);
  state.dynamic = std::make_unique<Poisoned>(shared_bytes);
  std::vector<size_t> order(threads);
  for (size_t i = 0; i < threads; ++i) {
    Fiber& f = state.fibers[i];
    order[i] = i;
    f.index = {unsigned(i % block_dim.x), unsigned(i / block_dim.x % block_dim.y), unsigned(i / block_dim.x / block_dim.y)};
    f.stack = stacks.get(i);
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(f.stack, kStackBytes);  // the last fiber here never returned from its frames
#endif
    f.context.prepare(f.stack, kStackBytes, fiber_main);
  }
  size_t done = 0;
  while (done < threads) {
    if (schedule_seed) std::shuffle(order.begin(), order.end(), random);
    bool moved = false;
    for (size_t i : order) {
      Fiber& f = state.fibers[i];
      if (f.state != State::ready) continue;
      moved = true;
      state.current = i;
      thread_index = f.index;
      enter_fiber(f);
      if (state.error) std::rethrow_exception(state.error);
      done += f.state == State::done;
    }
    if (!moved) throw std::runtime_error(stuck(kernel));
  }
}

}  // namespace

void launch(const char* kernel, Index grid, Index dim, size_t shared_bytes, const std::function<void()>& thread) {
  const std::lock_guard<std::mutex> lock(one_launch);
  const size_t threads = size_t{dim.x} * dim.y * dim.z;
  if (threads == 0 || threads > 1024 || size_t{grid.x} * grid.y * grid.z == 0 || grid.y > 65535 || grid.z > 65535)
    throw std::runtime_error(std::string(kernel) + ": no GPU would launch this grid or block");
  ++launch_count;
  std::mt19937_64 random(schedule_seed);
  grid_dim = grid;
  block_dim = dim;
  struct Reset {
    ~Reset() { block = nullptr; }
  } reset;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        block_index = {x, y, z};
        run_block(kernel, shared_bytes, thread, random);
      }
}

void set_schedule(uint64_t seed) {
  const std::lock_guard<std::mutex> lock(one_launch);
  schedule_seed = seed;
}

uint64_t launches() {
  const std::lock_guard<std::mutex> lock(one_launch);
  return launch_count;
}

int lane() { return static_cast<int>(block->current % kWarp); }

void sync_block() {
  if (++block->at_barrier < block->fibers.size()) return wait(State::at_barrier, "__syncthreads");
  block->at_barrier = 0;
  for (Fiber& f : block->fibers)
    if (f.state == State::at_barrier) f.state = State::ready;
}

void warp_collective(const char* operation, WarpFunction compute, const void* in, size_t in_bytes, void* out, size_t out_bytes) {
  if (in_bytes > kSlotBytes || out_bytes > kSlotBytes) throw std::logic_error("warp_collective: operands too large");
  Warp& warp = block->warps[block->current / kWarp];
  const int self = lane();
  if (warp.arrived == 0) warp.operation = operation;
  if (std::strcmp(warp.operation, operation) != 0)
    throw std::runtime_error(std::string("lanes of one warp are at ") + warp.operation + " and at " + operation);
  std::memcpy(warp.in[self], in, in_bytes);
  if (++warp.arrived < kWarp) {
    wait(State::in_warp, operation);
  } else {
    warp.arrived = 0;
    const unsigned char* ins[kWarp];
    unsigned char* outs[kWarp];
    for (int l = 0; l < kWarp; ++l) {
      ins[l] = warp.in[l];
      outs[l] = warp.out[l];
    }
    compute(ins, outs);
    const size_t first = block->current / kWarp * kWarp;
    for (size_t i = first; i < first + kWarp; ++i)
      if (i != block->current) block->fibers[i].state = State::ready;
  }
  std::memcpy(out, warp.out[self], out_bytes);  // no lane can start the next operation's compute before all are here
}

unsigned char* dynamic_shared() { return block->dynamic->memory.get(); }

unsigned char* static_shared(const void* site, size_t bytes) {
  return block->statics.try_emplace(site, bytes).first->second.memory.get();
}

void copy_async(void* dst, const void* src, size_t bytes, bool zero) {
  if (reinterpret_cast<uintptr_t>(dst) % bytes || (!zero && reinterpret_cast<uintptr_t>(src) % bytes))
    throw std::runtime_error("cp.async: an address is not aligned to the " + std::to_string(bytes) + " bytes copied");
  for (size_t i = 0; i < bytes; i += 4) std::memcpy(static_cast<unsigned char*>(dst) + i, &kPoison, 4);
  block->fibers[block->current].open.push_back({dst, src, bytes, zero});
}

void commit_copies() {
  Fiber& f = block->fibers[block->current];
  f.groups.push_back(std::move(f.open));
  f.open.clear();
}

void wait_copies(size_t pending_groups) {
  Fiber& f = block->fibers[block->current];
  while (f.groups.size() > pending_groups) {
    for (const Copy& copy : f.groups.front()) {
      if (copy.zero) {
        std::memset(copy.dst, 0, copy.bytes);
      } else {
        std::memcpy(copy.dst, copy.src, copy.bytes);
      }
    }
    f.groups.pop_front();
  }
}

}  // namespace emulation
}  // namespace privimage
