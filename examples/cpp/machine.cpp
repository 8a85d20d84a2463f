#include "machine.hpp"

#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <fstream>
#include <map>
#include <set>
#include <sstream>

namespace {

// LLVM's names of the CPU features that compiled code may use, with those of /proc/cpuinfo. Others
// have no effect on compiled code. A copy of _KERNEL_FLAGS in dcnv3_tvm/machine.py.
const std::map<std::string, std::string> kKernelFlags = {
    {"avx", "avx"}, {"avx2", "avx2"}, {"avx512bf16", "avx512_bf16"},
    {"avx512bitalg", "avx512_bitalg"}, {"avx512bw", "avx512bw"}, {"avx512cd", "avx512cd"},
    {"avx512dq", "avx512dq"}, {"avx512f", "avx512f"}, {"avx512fp16", "avx512_fp16"},
    {"avx512ifma", "avx512ifma"}, {"avx512vbmi", "avx512vbmi"}, {"avx512vbmi2", "avx512_vbmi2"},
    {"avx512vl", "avx512vl"}, {"avx512vnni", "avx512_vnni"},
    {"avx512vp2intersect", "avx512_vp2intersect"}, {"avx512vpopcntdq", "avx512_vpopcntdq"},
    {"avxvnni", "avx_vnni"}, {"amx-bf16", "amx_bf16"}, {"amx-int8", "amx_int8"},
    {"amx-tile", "amx_tile"}, {"bmi", "bmi1"}, {"bmi2", "bmi2"}, {"f16c", "f16c"}, {"fma", "fma"},
    {"fma4", "fma4"}, {"gfni", "gfni"}, {"lzcnt", "abm"}, {"movbe", "movbe"}, {"popcnt", "popcnt"},
    {"sse3", "pni"}, {"sse4.1", "sse4_1"}, {"sse4.2", "sse4_2"}, {"sse4a", "sse4a"},
    {"ssse3", "ssse3"}, {"vaes", "vaes"}, {"vpclmulqdq", "vpclmulqdq"}, {"xop", "xop"},
    {"bf16", "bf16"}, {"dotprod", "asimddp"}, {"fullfp16", "asimdhp"}, {"i8mm", "i8mm"},
    {"lse", "atomics"}, {"neon", "asimd"}, {"rdm", "asimdrdm"}, {"sve", "sve"}, {"sve2", "sve2"},
};

#if defined(__x86_64__)
constexpr const char* kArchitecture = "x86_64";
constexpr const char* kFlagsField = "flags";
#elif defined(__aarch64__)
constexpr const char* kArchitecture = "aarch64";
constexpr const char* kFlagsField = "Features";
#else
#error "artifacts are for x86-64 and aarch64"
#endif

std::set<std::string> CpuFlags() {
  std::ifstream file("/proc/cpuinfo");
  std::string line;
  while (std::getline(file, line)) {
    if (line.rfind(kFlagsField, 0) != 0) continue;
    std::istringstream words(line.substr(line.find(':') + 1));
    std::set<std::string> flags;
    for (std::string word; words >> word;) flags.insert(word);
    return flags;
  }
  return {};
}

}  // namespace

std::string Architecture() { return kArchitecture; }

std::vector<std::string> MissingFeatures(const std::vector<std::string>& required) {
  std::set<std::string> present = CpuFlags();
  std::vector<std::string> missing;
  if (present.empty()) return missing;  // Unknown, as in some sandboxes and emulators.
  for (const std::string& name : required) {
    auto flag = kKernelFlags.find(name);
    if (flag != kKernelFlags.end() && present.count(flag->second) == 0) missing.push_back(name);
  }
  return missing;
}

bool EnableAmx() {
#if defined(__x86_64__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

std::vector<std::string> UsableProcessors() {
  cpu_set_t set;
  std::vector<std::string> indices;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) {
    for (int i = 0; i < CPU_SETSIZE; ++i) {
      if (CPU_ISSET(i, &set)) indices.push_back(std::to_string(i));
    }
  }
  if (indices.empty()) indices.push_back("0");
  return indices;
}

int PhysicalCores() {
  std::set<std::string> cores;
  for (const std::string& index : UsableProcessors()) {
    std::ifstream file("/sys/devices/system/cpu/cpu" + index + "/topology/thread_siblings_list");
    std::string siblings;
    cores.insert(std::getline(file, siblings) ? siblings : index);
  }
  return static_cast<int>(cores.size());
}
