// Picks the best instruction set this CPU has, once; PRIVIMAGE_CPU_ISA can lower it.
#include <cstdlib>
#include <cstring>
#include <new>

#include "../kernels.h"

namespace privimage {

namespace isa_baseline {
extern const CpuKernels kTable;
}
#ifdef PRIVIMAGE_X86_LEVELS
namespace isa_avx2 {
extern const CpuKernels kTable;
}
namespace isa_avx512 {
extern const CpuKernels kTable;
}
#endif

const CpuKernels* cpu_kernels_compiled(int level) {
#ifdef PRIVIMAGE_X86_LEVELS
  if (level == 2) return &isa_avx512::kTable;
  if (level == 1) return &isa_avx2::kTable;
#endif
  return level == 0 ? &isa_baseline::kTable : nullptr;
}

static bool cpu_has(int level) {
  if (level == 0) return true;
#ifdef PRIVIMAGE_X86_LEVELS
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (level == 1) return avx2;
  return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

static const CpuKernels* find(const char* name) {
  for (int level = kIsaLevels - 1; level >= 0; --level) {
    const CpuKernels* table = cpu_kernels_compiled(level);
    if (table && cpu_has(level) && (!*name || std::strcmp(name, table->isa) == 0)) return table;
  }
  return nullptr;
}

static const CpuKernels*& chosen() {
  static const CpuKernels* table = [] {
    const char* wanted = std::getenv("PRIVIMAGE_CPU_ISA");
    const CpuKernels* t = wanted ? find(wanted) : nullptr;
    return t ? t : find("");
  }();
  return table;
}

const CpuKernels& cpu_kernels() { return *chosen(); }

bool set_cpu_isa(const char* name) {
  const CpuKernels* table = find(name);
  if (table) chosen() = table;
  return table != nullptr;
}

// Page faults on fresh memory cost more than a small layer's arithmetic, so each thread keeps its buffer.
void* scratch(size_t bytes) {
  struct Buffer {
    void* data = nullptr;
    size_t size = 0;
    ~Buffer() { std::free(data); }
  };
  static thread_local Buffer buffer;
  if (bytes > buffer.size) {
    const size_t size = (bytes + 63) / 64 * 64;
    std::free(buffer.data);
    buffer.size = 0;
    buffer.data = std::aligned_alloc(64, size);
    if (!buffer.data) throw std::bad_alloc();
    buffer.size = size;
  }
  return buffer.data;
}

}  // namespace privimage
