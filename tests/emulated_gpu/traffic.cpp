/* Counts what the threads of a kernel read and write, as requests of warps.
 *
 * The rules, which are those of NVIDIA's GPUs since Volta:
 *
 * - A request is an instruction of a warp. Accesses of its threads belong to one if they are made
 *   at the same place of the code in the same iteration of all loops around it.
 * - Global memory moves in sectors of 32 bytes (CUDA C++ Best Practices Guide, "Coalesced Access to
 *   Global Memory"). A request needs as many as its distinct bytes fill, and touches those that
 *   they lie in. What of a block's sectors is distinct has to come from L2 at least once: blocks
 *   share no L1 cache that could be relied on.
 * - Shared memory has 32 banks of 4 bytes, each of which delivers one word a clock; threads that
 *   read the same word share it (CUDA C++ Programming Guide, "Shared Memory"). Such a delivery is a
 *   wavefront, as NVIDIA's profilers call it. It carries 128 bytes: a request of 8 bytes a thread
 *   is served by halves of the warp, one of 16 bytes by quarters, and so is ldmatrix, whose four
 *   matrices have eight rows of 16 bytes. Two halves, or two quarters of a half, are served
 *   together if each thread i reads what thread i ^ 1 reads, or each what i ^ 2 reads. (NVIDIA's
 *   guides say this of older GPUs, and not all of it; it is what people measure.) At least as many
 *   wavefronts are needed as the distinct words of a part fill.
 * - cp.async reads global memory, and writes shared memory as a store of as many bytes would.
 *
 * The accesses are those that are left by g++'s optimiser, which like NVIDIA's keeps in a register
 * what was loaded before and cannot have changed. It is told not to change the width of accesses.
 * What is in registers on a GPU lies on a thread's stack here, and does not count.
 */

#include "device.h"

#include <algorithm>
#include <unordered_map>
#include <unordered_set>

/* The shared library of the kernels, which holds their variables that are not shared memory. */
extern "C" const char __ehdr_start[] __attribute__((visibility("hidden")));
extern "C" const char _end[] __attribute__((visibility("hidden")));

namespace emulated {

namespace {

constexpr unsigned kSector = 32, kBanks = 32, kWord = 4, kMostBytes = 16;

struct GlobalCounts {
  uint64_t requests, sectors, least_sectors, block_sectors;
};

struct SharedCounts {
  uint64_t requests, wavefronts, least_wavefronts;
};

/* As `traffic.py` reads it. */
struct Counts {
  uint64_t blocks, counted;
  GlobalCounts global[2]; /* Loads and stores. */
  uint64_t copied_sectors; /* Of the loads, by cp.async. */
  SharedCounts shared[2];
  uint64_t products; /* mma.m16n8k16 */
};

struct Request {
  Access access;
  unsigned bytes, lanes; /* A bit for each thread. */
  uintptr_t at[kWarp];
};

Counts counts;
std::unordered_map<uint64_t, Request> requests;
std::unordered_set<uintptr_t> block_sectors[2];

uint64_t mix(uint64_t value) {
  value = (value ^ value >> 30) * 0xbf58476d1ce4e5b9;
  value = (value ^ value >> 27) * 0x94d049bb133111eb;
  return value ^ value >> 31;
}

void count_global(const Request &request) {
  GlobalCounts &sums = counts.global[request.access == kGlobalStore];
  std::unordered_set<uintptr_t> &of_block = block_sectors[request.access == kGlobalStore];
  uintptr_t starts[kWarp];
  unsigned lanes = 0;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (request.lanes >> lane & 1) starts[lanes++] = request.at[lane];
  }
  std::sort(starts, starts + lanes);
  uintptr_t end = 0, next = 0, bytes = 0; /* Behind the bytes, and the sectors, seen so far. */
  for (unsigned i = 0; i < lanes; ++i) {
    uintptr_t stop = starts[i] + request.bytes;
    if (stop > end) bytes += stop - std::max(end, starts[i]);
    end = std::max(end, stop);
    for (uintptr_t sector = starts[i] / kSector; sector <= (stop - 1) / kSector; ++sector) {
      if (sector < next) continue;
      next = sector + 1;
      ++sums.sectors;
      counts.copied_sectors += request.access == kGlobalCopy;
      of_block.insert(sector);
    }
  }
  ++sums.requests;
  sums.least_sectors += (bytes + kSector - 1) / kSector;
}

/* Whether all of some threads read what their neighbours at this distance do. */
bool in_pairs(const Request &request, unsigned first, unsigned threads, unsigned distance) {
  for (unsigned lane = first; lane < first + threads; ++lane) {
    unsigned other = lane ^ distance;
    bool both = request.lanes >> lane & request.lanes >> other & 1;
    if (both && request.at[lane] != request.at[other]) return false;
  }
  return true;
}

void count_part(const Request &request, unsigned first, unsigned threads, SharedCounts &sums) {
  uintptr_t touched[kWarp * kMostBytes / kWord];
  unsigned words = std::max(request.bytes / kWord, 1u), count = 0, in_bank[kBanks] = {};
  for (unsigned lane = first; lane < first + threads; ++lane) {
    if (!(request.lanes >> lane & 1)) continue;
    for (unsigned i = 0; i < words; ++i) touched[count++] = request.at[lane] / kWord + i;
  }
  std::sort(touched, touched + count);
  count = std::unique(touched, touched + count) - touched;
  for (unsigned i = 0; i < count; ++i) ++in_bank[touched[i] % kBanks];
  sums.wavefronts += *std::max_element(in_bank, in_bank + kBanks);
  sums.least_wavefronts += (count + kBanks - 1) / kBanks;
}

void count_shared(const Request &request) {
  SharedCounts &sums = counts.shared[request.access == kSharedStore];
  unsigned words = std::max(request.bytes / kWord, 1u), threads = kWarp / words;
  unsigned joined = words > 1 ? 2 * threads : threads;
  for (unsigned first = 0; first < kWarp; first += joined) {
    bool together = in_pairs(request, first, joined, 1) || in_pairs(request, first, joined, 2);
    unsigned part = together ? joined : threads;
    for (unsigned i = 0; i < joined; i += part) count_part(request, first + i, part, sums);
  }
  ++sums.requests;
}

bool lies(const void *at, const void *start, size_t bytes) {
  return uintptr_t(at) - uintptr_t(start) < bytes;
}

/* Where in shared memory an address is, or -1. */
ptrdiff_t place_in_shared(const void *at) {
  auto *byte = static_cast<const unsigned char *>(at);
  if (lies(at, shared, launch.shared_bytes)) return byte - shared;
  const char *fixed = __start_emulated_shared;
  return lies(at, fixed, __stop_emulated_shared - fixed) ? uintptr_t(at) - uintptr_t(fixed) : -1;
}

void count_plain(bool store, const void *place, const void *at, size_t bytes) {
  constexpr size_t kStacks = size_t{kStackBytes} * kMostThreads;
  bool by_thread = lies(__builtin_frame_address(0), stacks, kStacks);
  if (!by_thread || lies(at, stacks, kStacks)) return;
  bool fast = place_in_shared(at) >= 0;
  if (!fast && lies(at, __ehdr_start, _end - __ehdr_start)) return;
  if (bytes > kMostBytes) fail("an access to more than 16 bytes");
  if (fast) return count(store ? kSharedStore : kSharedLoad, place, at, bytes);
  count(store ? kGlobalStore : kGlobalLoad, place, at, bytes);
}

}  // namespace

void count(Access access, const void *place, const void *at, unsigned bytes) {
  unsigned lane = current->number % kWarp;
  uintptr_t address = access < kSharedLoad ? uintptr_t(at) : place_in_shared(at);
  uint64_t key = mix(mix(uintptr_t(place) * 8 + access) + current->turn) + current->number / kWarp;
  for (;; key = mix(key)) {
    Request &request = requests.try_emplace(key, Request{access, bytes}).first->second;
    if (request.lanes >> lane & 1) continue; /* Made before in this iteration. */
    request.lanes |= 1u << lane;
    request.at[lane] = address;
    return;
  }
}

void count_rows(const unsigned char *const *rows) {
  Request request = {kSharedLoad, 16, ~0u};
  for (unsigned i = 0; i < kWarp; ++i) request.at[i] = place_in_shared(rows[i]);
  count_shared(request);
}

void count_product() { ++counts.products; }

void end_block() {
  for (const auto &[key, request] : requests) {
    request.access < kSharedLoad ? count_global(request) : count_shared(request);
  }
  requests.clear();
  for (unsigned i = 0; i < 2; ++i) {
    counts.global[i].block_sectors += block_sectors[i].size();
    block_sectors[i].clear();
  }
}

void begin_launch(unsigned blocks, unsigned chosen) {
  counts = {blocks, chosen};
  requests.clear(); /* Left by a launch that failed. */
}

}  // namespace emulated

extern "C" {

/* What was counted in the last launch, as some numbers. */
__attribute__((visibility("default"))) const uint64_t *emulated_traffic(int *numbers) {
  *numbers = sizeof emulated::counts / sizeof(uint64_t);
  return reinterpret_cast<const uint64_t *>(&emulated::counts);
}

/* What code that is compiled with -fsanitize=thread calls. */

void __tsan_init() {}
void __tsan_func_entry(void *) {}
void __tsan_func_exit() {}

#define ACCESSES(bytes)                                                                           \
  void __tsan_read##bytes(void *at) { emulated::count_plain(false, PLACE, at, bytes); }           \
  void __tsan_write##bytes(void *at) { emulated::count_plain(true, PLACE, at, bytes); }           \
  void __tsan_unaligned_read##bytes(void *at) { emulated::count_plain(false, PLACE, at, bytes); } \
  void __tsan_unaligned_write##bytes(void *at) { emulated::count_plain(true, PLACE, at, bytes); }
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
#undef ACCESSES
void __tsan_read_range(void *at, size_t bytes) { emulated::count_plain(false, PLACE, at, bytes); }
void __tsan_write_range(void *at, size_t bytes) { emulated::count_plain(true, PLACE, at, bytes); }
}
