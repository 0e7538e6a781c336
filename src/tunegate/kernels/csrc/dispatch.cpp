// Which level runs: the best that the build holds and the processor and the system allow, or the one that
// TUNEGATE_CPU_LEVEL names. Decided once, at import.
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "table.h"

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace tunegate {

#define TUNEGATE_TABLE(level) \
  namespace level {           \
  extern const Kernels table; \
  }
TUNEGATE_TABLE(plain)
#ifdef TUNEGATE_X86
TUNEGATE_TABLE(avx2)
TUNEGATE_TABLE(avx512)
TUNEGATE_TABLE(avx512bf16)
TUNEGATE_TABLE(amx)
#endif
#ifdef TUNEGATE_EMULATION
TUNEGATE_TABLE(emulated512)
TUNEGATE_TABLE(emulatedbf16)
TUNEGATE_TABLE(emulatedamx)
#endif

namespace {

struct Level {
  const char* name;
  const Kernels* table;
  bool runs;
  bool chosen_by_itself;  // false: only if named, because something else is as right and faster
};

#ifdef TUNEGATE_X86
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// AMX needs the bits of CPUID leaf 7 and the system's leave to use the tile registers (Linux: arch_prctl
// ARCH_REQ_XCOMP_PERM for XFEATURE_XTILEDATA, kernel documentation x86/xstate.rst).
bool has_amx() {
#if defined(__linux__)
  unsigned eax = 7, ebx = 0, ecx = 0, edx = 0;
  asm volatile("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
  bool tiles = (edx >> 24 & 1) && (edx >> 22 & 1);  // AMX-TILE, AMX-BF16
  return has_avx512bf16() && tiles && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}
#endif

std::vector<Level> levels() {
  return {
#ifdef TUNEGATE_X86
      {"amx", &amx::table, has_amx(), true},
      {"avx512bf16", &avx512bf16::table, has_avx512bf16(), true},
      {"avx512", &avx512::table, has_avx512(), true},
      {"avx2", &avx2::table, has_avx2(), true},
#endif
      {"plain", &plain::table, true, true},
#ifdef TUNEGATE_EMULATION
      {"emulated512", &emulated512::table, true, false},
      {"emulatedbf16", &emulatedbf16::table, true, false},
      {"emulatedamx", &emulatedamx::table, true, false},
#endif
  };
}

struct Choice {
  const Kernels* table;
  std::string name, reason, here;
};

Choice choose() {
  Choice choice{};
  const char* named = std::getenv("TUNEGATE_CPU_LEVEL");
  bool asked = named && *named;
  for (const Level& level : levels()) {
    if (!level.runs) continue;
    choice.here += (choice.here.empty() ? "" : ",") + std::string(level.name);
    if (asked ? level.name == std::string(named) : !choice.table && level.chosen_by_itself)
      choice.table = level.table, choice.name = level.name;
  }
  choice.reason = asked ? "named by TUNEGATE_CPU_LEVEL" : "the best of " + choice.here + " here";
  if (!choice.table)
    throw std::runtime_error("TUNEGATE_CPU_LEVEL is '" + std::string(named) + "'; this machine and build offer " +
                             choice.here);
  return choice;
}

const Choice& choice() {
  static const Choice chosen = choose();
  return chosen;
}

}  // namespace

const Kernels& active() { return *choice().table; }
const char* level_name() { return choice().name.c_str(); }
const char* level_reason() { return choice().reason.c_str(); }
const char* levels_here() { return choice().here.c_str(); }

}  // namespace tunegate
