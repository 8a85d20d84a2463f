/* The part of CUDA that generated kernels use, on the processor.
 *
 * Each thread of a block is a fiber that runs until it waits for its block (barrier) or its warp
 * (warp instruction). Threads run in ascending or descending order, and asynchronous copies complete
 * as late as possible or at once, so a missing barrier changes the result in one of the two. Shared
 * memory is initialised with NaN and ends at an inaccessible page. Detected as errors: misaligned
 * accesses, deadlocks, and warp instructions that some threads of their mask do not reach. What a
 * shuffle reads from a thread outside of its mask, or that does not exist, is NaN.
 */

#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>

/* Kernels are compiled without optimisation, because compiling takes longer than running them. */
#pragma GCC push_options
#pragma GCC optimize("O2")

namespace emulated {

constexpr unsigned kWarp = 32;

struct Dim {
  unsigned x, y, z;
};

struct Launch {
  Dim grid, block;
  unsigned shared_bytes;
  bool backwards, flushes; /* Subnormal float32 numbers are zero: --ftz=true. */
};

extern Dim thread_index, block_index;
extern Launch launch;
extern unsigned char *shared; /* Dynamic shared memory. */

/* Run a kernel; return the error, or null. */
const char *run(void (*function)(void **), const Launch &config, void **arguments);

/* Stop the kernel with an error. */
[[noreturn]] void fail(const char *what);

void barrier(int line);

/* A warp instruction: the last thread of the mask to arrive performs it for all. The operands of
 * other threads are null.
 */
void together(int line, unsigned mask, void *operands, void (*perform)(void **));

unsigned lane();
unsigned whole_warp();

/* Asynchronous copies into shared memory. */

unsigned shared_address(const void *pointer);
void copy(unsigned to, const void *from, unsigned bytes);
void copy_or_clear(unsigned to, const void *from, unsigned bytes, int predicate);
void commit_copies();
void wait_for_copies(unsigned pending);

/* 16-bit floating-point types. */

float from_half(uint16_t bits);
uint16_t to_half(float value);
float from_bfloat(uint16_t bits);
uint16_t to_bfloat(float value);

template <float (*From)(uint16_t), uint16_t (*To)(float)>
struct Number {
  uint16_t bits;

  Number() = default;
  template <class T, class = std::enable_if_t<std::is_arithmetic_v<T>>>
  Number(T value) : bits(To(static_cast<float>(value))) {}
  operator float() const { return From(bits); }

  friend Number operator+(Number a, Number b) { return float(a) + float(b); }
  friend Number operator-(Number a, Number b) { return float(a) - float(b); }
  friend Number operator*(Number a, Number b) { return float(a) * float(b); }
  friend Number operator/(Number a, Number b) { return float(a) / float(b); }
};

/* Approximate instructions of --prec-div=false, --prec-sqrt=false and --ftz=true: as inexact as
 * NVIDIA documents. */

float nudged(float value, unsigned units);

template <class T, class U>
inline auto divide(T a, U b) {
  auto exact = a / b;
  if constexpr (std::is_same_v<decltype(exact), float>) return nudged(exact, 2);
  return exact;
}

inline float square_root(float value) { return nudged(sqrtf(value), 1); }
inline float power_of_2(float value) { return value == 0 ? 1 : nudged(exp2f(value), 2); }

/* Warp instructions. */

/* ldmatrix.x4: threads 8i to 8i+7 hold the row addresses of matrix i; each thread gets two values. */
void load_matrix(int line, unsigned &a, unsigned &b, unsigned &c, unsigned &d, unsigned address);

/* mma.m16n8k16 */
template <float (*From)(uint16_t)>
void multiply(int line, float &d0, float &d1, float &d2, float &d3, unsigned a0, unsigned a1,
              unsigned a2, unsigned a3, unsigned b0, unsigned b1, float c0, float c1, float c2,
              float c3);

/* red.add, if `predicate` is not zero: threads run one at a time, so that additions are atomic. */
template <class T, class... Values>
inline void add_elements(T *to, T predicate, Values... values) {
  if (predicate != 0) ((*to++ += values), ...);
}

/* red.add.v2 and .v4 */
template <class T, class... Values>
inline void add_vector(T *to, T predicate, Values... values) {
  if (reinterpret_cast<uintptr_t>(to) % (sizeof...(values) * sizeof(T))) {
    fail("an address of a vector to add to is misaligned");
  }
  add_elements(to, predicate, values...);
}

template <class T>
struct Shuffled {
  T value, result;
  unsigned source;
};

template <class T>
inline T shuffle(int line, unsigned mask, T value, unsigned source) {
  Shuffled<T> mine = {value, value, source};
  if (~mask >> lane() & 1) fail("a shuffle by a thread that is not in its mask");
  if (mask & ~whole_warp()) fail("a mask with threads that the warp has not");
  together(line, mask, &mine, [](void **all) {
    for (unsigned i = 0; i < kWarp; ++i) {
      auto *one = static_cast<Shuffled<T> *>(all[i]);
      if (!one) continue;
      auto *from = static_cast<Shuffled<T> *>(all[one->source]);
      if (from) {
        one->result = from->value;
      } else {
        memset(&one->result, 0xff, sizeof(T)); /* NaN: not defined by CUDA */
      }
    }
  });
  return mine.result;
}

/* The lanes that shuffles read, in segments of `width` lanes; beyond them, a thread reads its own. */
inline unsigned of_segment(unsigned source, unsigned width) {
  return lane() / width * width + source % width;
}
inline unsigned within_segment(unsigned source, unsigned width) {
  return source < (lane() / width + 1) * width ? source : lane();
}

}  // namespace emulated

/* CUDA keywords, built-in variables and functions. */

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

#define threadIdx emulated::thread_index
#define blockIdx emulated::block_index
#define blockDim emulated::launch.block
#define gridDim emulated::launch.grid

#define __syncthreads() emulated::barrier(__LINE__)
#define __activemask() emulated::whole_warp()
#define __shfl_sync(mask, value, source, width) \
  emulated::shuffle(__LINE__, mask, value, emulated::of_segment(source, width))
#define __shfl_down_sync(mask, value, by, width) \
  emulated::shuffle(__LINE__, mask, value, emulated::within_segment(emulated::lane() + (by), width))
#define __shfl_xor_sync(mask, value, by, width) \
  emulated::shuffle(__LINE__, mask, value, emulated::within_segment(emulated::lane() ^ (by), width))
#define __cvta_generic_to_shared(pointer) emulated::shared_address(pointer)

#define CUDART_INF_F INFINITY
#define CUDART_NAN_F NAN

using half = emulated::Number<emulated::from_half, emulated::to_half>;
using nv_bfloat16 = emulated::Number<emulated::from_bfloat, emulated::to_bfloat>;
using __half = half;
struct half2 {
  half x, y;
};
using __half2 = half2;
struct nv_bfloat162 {
  nv_bfloat16 x, y;
  nv_bfloat162() = default;
  nv_bfloat162(nv_bfloat16 x, nv_bfloat16 y) : x(x), y(y) {}
};

#define EMULATED_VECTORS(type, name)                                       \
  struct alignas(2 * sizeof(type)) name##2 {                               \
    type x, y;                                                             \
  };                                                                       \
  struct alignas(4 * sizeof(type)) name##4 {                               \
    type x, y, z, w;                                                       \
  };                                                                       \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }         \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
EMULATED_VECTORS(double, double)
EMULATED_VECTORS(float, float)
EMULATED_VECTORS(int, int)
EMULATED_VECTORS(unsigned, uint)
#undef EMULATED_VECTORS

inline float __half2float(half value) { return value; }
inline half __float2half(float value) { return value; }
inline half __float2half_rn(float value) { return value; }
inline float __bfloat162float(nv_bfloat16 value) { return value; }
inline nv_bfloat16 __float2bfloat16(float value) { return value; }
inline nv_bfloat16 __float2bfloat16_rn(float value) { return value; }
inline bool __hgt(float a, float b) { return a > b; }
inline bool __hlt(float a, float b) { return a < b; }

inline float rsqrtf(float value) { return emulated::nudged(1 / sqrtf(value), 2); }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

#pragma GCC pop_options
