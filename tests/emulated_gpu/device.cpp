/* Threads, memory and instructions of the emulated GPU, compiled once for all kernels. */

#include "device.h"

#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <xmmintrin.h>

namespace emulated {

constexpr unsigned kMostThreads = 1024, kStackBytes = 1 << 16, kSharedBytes = 1 << 18;
constexpr unsigned kMostCopies = 256;
constexpr unsigned kFlush = 0x8040; /* Bits of MXCSR: subnormal results and operands are zero. */

struct Copy {
  void *to;
  const void *from;
  unsigned bytes, group;
};

enum class State { kReady, kAtBarrier, kAtWarp, kDone };

/* Return values of `_setjmp(scheduler)`. */
enum { kStart, kPaused, kFailed };

struct Thread {
  Dim index;
  unsigned number;
  State state;
  int line;
  unsigned mask;
  void *operands;
  jmp_buf context;
  Copy copies[kMostCopies];
  unsigned copy_count, groups;

  Thread *warp();
  unsigned lanes() const;
};

Thread threads[kMostThreads];
unsigned thread_count;
Thread *current;
Dim thread_index, block_index;
Launch launch;
void (*kernel)(void **);
void **parameters;
jmp_buf scheduler;
char error[256];
unsigned char *shared;
char *stacks;

/* Bounds of static shared memory. */
extern "C" char __start_emulated_shared[] __attribute__((weak));
extern "C" char __stop_emulated_shared[] __attribute__((weak));

Thread *Thread::warp() { return threads + number / kWarp * kWarp; }
unsigned Thread::lanes() const {
  unsigned rest = thread_count - number / kWarp * kWarp;
  return rest < kWarp ? rest : kWarp;
}

void fail(const char *what) {
  snprintf(error, sizeof error, "%s: thread (%u, %u, %u) of block (%u, %u, %u)", what,
           thread_index.x, thread_index.y, thread_index.z, block_index.x, block_index.y,
           block_index.z);
  _longjmp(scheduler, kFailed);
}

/* Synchronisation. */

static void pause(State state, int line) {
  current->state = state;
  current->line = line;
  if (!_setjmp(current->context)) _longjmp(scheduler, kPaused);
}

void barrier(int line) { pause(State::kAtBarrier, line); }

void together(int line, unsigned mask, void *operands, void (*perform)(void **)) {
  Thread *first = current->warp();
  void *all[kWarp] = {};
  current->operands = operands;
  current->mask = mask;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (~mask >> lane & 1) continue;
    const Thread &other = first[lane];
    bool there = other.state == State::kAtWarp && other.line == line && other.mask == mask;
    if (&other != current && !there) return pause(State::kAtWarp, line);
    all[lane] = other.operands;
  }
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (all[lane]) first[lane].state = State::kReady;
  }
  perform(all);
}

/* Scheduling. */

static void live() {
  if (!_setjmp(current->context)) _longjmp(scheduler, kPaused);
  for (;;) {
    kernel(parameters);
    pause(State::kDone, 0);
  }
}

static void make_fiber(unsigned number) {
  static ucontext_t back;
  ucontext_t start;
  if (!stacks) {
    stacks = static_cast<char *>(mmap(nullptr, size_t{kStackBytes} * kMostThreads,
                                      PROT_READ | PROT_WRITE,
                                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  }
  getcontext(&start);
  start.uc_stack.ss_sp = stacks + size_t{kStackBytes} * number;
  start.uc_stack.ss_size = kStackBytes;
  start.uc_link = nullptr;
  makecontext(&start, live, 0);
  threads[number].number = number;
  current = threads + number;
  if (_setjmp(scheduler) == kStart) swapcontext(&back, &start);
}

/* Run a thread until it waits. */
static bool resume(Thread *thread) {
  int how = _setjmp(scheduler);
  if (how == kStart) {
    current = thread;
    thread_index = thread->index;
    _longjmp(thread->context, 1);
  }
  return how == kPaused;
}

/* Run the threads of a warp until all wait for other warps. */
static bool run_warp(Thread *first) {
  unsigned lanes = first->lanes(), idle = 0;
  for (unsigned turn = 0; idle < lanes; turn = (turn + 1) % lanes) {
    Thread *thread = first + (launch.backwards ? lanes - 1 - turn : turn);
    ++idle;
    if (thread->state != State::kReady) continue;
    idle = 0;
    if (!resume(thread)) return false;
  }
  return true;
}

static bool run_block() {
  memset(shared, 0xff, launch.shared_bytes);
  if (__start_emulated_shared) {
    memset(__start_emulated_shared, 0xff, __stop_emulated_shared - __start_emulated_shared);
  }
  for (unsigned i = 0; i < thread_count; ++i) {
    threads[i].state = State::kReady;
    threads[i].copy_count = threads[i].groups = 0;
  }
  unsigned warps = (thread_count + kWarp - 1) / kWarp;
  for (;;) {
    for (unsigned i = 0; i < warps; ++i) {
      if (!run_warp(threads + (launch.backwards ? warps - 1 - i : i) * kWarp)) return false;
    }
    const Thread &first = threads[0];
    for (unsigned i = 0; i < thread_count; ++i) {
      const Thread &other = threads[i];
      if (other.state == first.state && other.line == first.line && first.state != State::kAtWarp) {
        continue;
      }
      snprintf(error, sizeof error,
               "deadlock: (%u, %u, %u) in line %d, (0, 0, 0) in line %d (0: finished)",
               other.index.x, other.index.y, other.index.z, other.line, first.line);
      return false;
    }
    if (first.state == State::kDone) return true;
    for (unsigned i = 0; i < thread_count; ++i) threads[i].state = State::kReady;
  }
}

static void caught(int number) {
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, number);
  sigprocmask(SIG_UNBLOCK, &set, nullptr);
  fail(number == SIGILL ? "a misaligned access" : "an access to unmapped memory");
}

/* Return dynamic shared memory that ends, up to alignment, at an inaccessible page. */
static unsigned char *shared_memory(unsigned bytes) {
  static unsigned char *pages = [] {
    void *found = mmap(nullptr, kSharedBytes + (1 << 16), PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    auto *start = static_cast<unsigned char *>(found);
    mprotect(start + kSharedBytes, 1 << 16, PROT_NONE);
    return start;
  }();
  return pages + kSharedBytes - (bytes + 63) / 64 * 64;
}

const char *run(void (*function)(void **), const Launch &config, void **arguments) {
  static char stack[1 << 16];
  static unsigned fibers = 0;
  const int signals[] = {SIGSEGV, SIGBUS, SIGILL};
  struct sigaction action = {}, before[3];
  stack_t own = {}, others;
  error[0] = 0;
  launch = config;
  kernel = function;
  parameters = arguments;
  shared = shared_memory(launch.shared_bytes);
  const Dim &grid = launch.grid, &block = launch.block;
  thread_count = block.x * block.y * block.z;
  for (; fibers < thread_count; ++fibers) make_fiber(fibers);
  for (unsigned i = 0; i < thread_count; ++i) {
    threads[i].index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
  }
  own.ss_sp = stack;
  own.ss_size = sizeof stack;
  action.sa_handler = caught;
  action.sa_flags = SA_ONSTACK;
  sigaltstack(&own, &others);
  for (int i = 0; i < 3; ++i) sigaction(signals[i], &action, &before[i]);
  unsigned blocks = grid.x * grid.y * grid.z, rounding = _mm_getcsr();
  if (launch.flushes) _mm_setcsr(rounding | kFlush);
  for (unsigned n = 0; n < blocks; ++n) {
    unsigned b = launch.backwards ? blocks - 1 - n : n;
    block_index = {b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y};
    if (!run_block()) {
      fibers = 0; /* They stopped in the middle of the kernel and cannot be reused. */
      break;
    }
  }
  _mm_setcsr(rounding);
  for (int i = 0; i < 3; ++i) sigaction(signals[i], &before[i], nullptr);
  sigaltstack(&others, nullptr);
  return *error ? error : nullptr;
}

/* Asynchronous copies into shared memory. */

static void do_copy(const Copy &copy) { memcpy(copy.to, copy.from, copy.bytes); }

/* Addresses of static shared variables start at kStatic, those of dynamic memory at 0. */
constexpr unsigned kStatic = 1u << 31;

unsigned shared_address(const void *pointer) {
  auto *at = static_cast<const unsigned char *>(pointer);
  if (at >= shared && at < shared + launch.shared_bytes) return at - shared;
  ptrdiff_t offset = static_cast<const char *>(pointer) - __start_emulated_shared;
  if (offset < 0 || pointer >= __stop_emulated_shared) fail("an address is not in shared memory");
  return kStatic + offset;
}

static unsigned char *shared_at(unsigned address, unsigned bytes) {
  bool fixed = address >= kStatic;
  unsigned offset = fixed ? address - kStatic : address;
  size_t size = fixed ? __stop_emulated_shared - __start_emulated_shared : launch.shared_bytes;
  if (offset % bytes) fail("an address of shared memory is misaligned");
  if (offset + bytes > size) fail("an address is beyond shared memory");
  return (fixed ? reinterpret_cast<unsigned char *>(__start_emulated_shared) : shared) + offset;
}

void copy(unsigned to, const void *from, unsigned bytes) {
  Copy made = {shared_at(to, bytes), from, bytes, current->groups};
  if (reinterpret_cast<uintptr_t>(from) % bytes) fail("a copy reads from a misaligned address");
  if (launch.backwards) return do_copy(made);
  if (current->copy_count == kMostCopies) fail("too many copies are not waited for");
  current->copies[current->copy_count++] = made;
}

void copy_or_clear(unsigned to, const void *from, unsigned bytes, int predicate) {
  if (predicate == 1) return copy(to, from, bytes);
  memset(shared_at(to, bytes), 0, bytes);
}

void commit_copies() { ++current->groups; }

void wait_for_copies(unsigned pending) {
  unsigned kept = 0;
  for (unsigned i = 0; i < current->copy_count; ++i) {
    const Copy &made = current->copies[i];
    if (made.group + pending < current->groups) {
      do_copy(made);
    } else {
      current->copies[kept++] = made;
    }
  }
  current->copy_count = kept;
}

/* 16-bit floating-point types. */

static uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

static float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

float nudged(float value, unsigned units) {
  if (!isnormal(value)) return value;
  uint32_t bits = bits_of(value), moved = bits * 0x9e3779b9u >> 31 ? bits + units : bits - units;
  return float_of(moved);
}

static float compute_half(unsigned bits) {
  int exponent = bits >> 10 & 31, fraction = bits & 1023;
  float value = exponent == 31 ? (fraction ? NAN : INFINITY)
                : exponent     ? ldexpf(1024 + fraction, exponent - 25)
                               : ldexpf(fraction, -24);
  return bits >> 15 ? -value : value;
}

float from_half(uint16_t bits) {
  static const float *table = [] {
    static float values[1 << 16];
    for (unsigned i = 0; i < 1 << 16; ++i) values[i] = compute_half(i);
    return values;
  }();
  return table[bits];
}

uint16_t to_half(float value) {
  uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  if (size > 0x7f800000) return 0x7fff;
  if (size >= 0x477ff000) return sign | 0x7c00;
  if (size < 0x38800000) return sign | static_cast<uint16_t>(rintf(ldexpf(float_of(size), 24)));
  return sign | ((size + 0xfff + (size >> 13 & 1) - 0x38000000) >> 13);
}

float from_bfloat(uint16_t bits) { return float_of(uint32_t{bits} << 16); }

uint16_t to_bfloat(float value) {
  uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

/* Warp instructions. */

struct Rows {
  unsigned words[4];
  const unsigned char *at;
};

void load_matrix(int line, unsigned &a, unsigned &b, unsigned &c, unsigned &d,
                        unsigned address) {
  Rows mine = {{}, shared_at(address, 16)};
  if (current->lanes() < kWarp) fail("ldmatrix in a warp that is not full");
  together(line, whole_warp(), &mine, [](void **all) {
    for (unsigned i = 0; i < 4 * kWarp; ++i) {
      unsigned matrix = i / kWarp, lane = i % kWarp;
      const Rows *row = static_cast<Rows *>(all[8 * matrix + lane / 4]);
      void *word = &static_cast<Rows *>(all[lane])->words[matrix];
      memcpy(word, row->at + lane % 4 * 4, 4);
    }
  });
  a = mine.words[0], b = mine.words[1], c = mine.words[2], d = mine.words[3];
}

struct Factors {
  unsigned a[4], b[2];
  float sums[4];
};

template <float (*From)(uint16_t)>
__attribute__((optimize("O3"))) static void multiply_all(void **all) {
  double a[16][16], b[16][8], sums[16][8] = {};
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    const Factors *mine = static_cast<Factors *>(all[lane]);
    unsigned outer = lane / 4, inner = lane % 4 * 2;
    for (unsigned side = 0; side < 2; ++side) {
      auto number = [&](unsigned word) { return From(word >> 16 * side & 0xffff); };
      for (unsigned i = 0; i < 4; ++i) {
        a[outer + i % 2 * 8][inner + i / 2 * 8 + side] = number(mine->a[i]);
      }
      for (unsigned i = 0; i < 2; ++i) b[inner + i * 8 + side][outer] = number(mine->b[i]);
    }
  }
  for (unsigned i = 0; i < 16; ++i) {
    for (unsigned k = 0; k < 16; ++k) {
      for (unsigned j = 0; j < 8; ++j) sums[i][j] += a[i][k] * b[k][j];
    }
  }
  for (unsigned i = 0; i < 4 * kWarp; ++i) {
    unsigned lane = i / 4, row = lane / 4 + i % 4 / 2 * 8, column = lane % 4 * 2 + i % 2;
    static_cast<Factors *>(all[lane])->sums[i % 4] += sums[row][column];
  }
}

template <float (*From)(uint16_t)>
void multiply(int line, float &d0, float &d1, float &d2, float &d3, unsigned a0, unsigned a1,
                     unsigned a2, unsigned a3, unsigned b0, unsigned b1, float c0, float c1,
                     float c2, float c3) {
  Factors mine = {{a0, a1, a2, a3}, {b0, b1}, {c0, c1, c2, c3}};
  if (current->lanes() < kWarp) fail("mma in a warp that is not full");
  together(line, whole_warp(), &mine, multiply_all<From>);
  d0 = mine.sums[0], d1 = mine.sums[1], d2 = mine.sums[2], d3 = mine.sums[3];
}

template void multiply<from_half>(int, float &, float &, float &, float &, unsigned, unsigned,
                                  unsigned, unsigned, unsigned, unsigned, float, float, float,
                                  float);
template void multiply<from_bfloat>(int, float &, float &, float &, float &, unsigned, unsigned,
                                    unsigned, unsigned, unsigned, unsigned, float, float, float,
                                    float);

unsigned lane() { return current->number % kWarp; }

unsigned whole_warp() { return ~0u >> (kWarp - current->lanes()); }

}  // namespace emulated
