/* What kernels and `device.h` tell `traffic.cpp`, which counts what goes through a GPU's memory.
 *
 * Kernels are compiled with -fsanitize=thread: a call stands in front of each of their accesses to
 * memory that others may see. Without EMULATED_TRAFFIC nothing is counted, and nothing is told.
 */

#pragma once

#include <stdint.h>

namespace emulated {

/* A copy is a load by cp.async. */
enum Access { kGlobalLoad, kGlobalStore, kGlobalCopy, kSharedLoad, kSharedStore };

#ifdef EMULATED_TRAFFIC

/* Of functions that do what a GPU does by other means than the accesses of a thread. */
#define UNCOUNTED __attribute__((no_sanitize("thread")))
/* Of functions a GPU has none of: their accesses are those of the kernel, place by place. */
#define INLINE __attribute__((always_inline))
/* Of functions that say where they are called. */
#define PLACED __attribute__((noinline))
#define PLACE __builtin_return_address(0)

/* One access by the thread that runs. Those of a warp at the same place are one request. */
void count(Access access, const void *place, const void *at, unsigned bytes);
/* A request for 16 bytes by each thread of a warp. */
void count_rows(const unsigned char *const *rows);
void count_product();
void end_block();
void begin_launch(unsigned blocks, unsigned chosen);

#else

#define UNCOUNTED
#define INLINE
#define PLACED
#define PLACE nullptr

inline void count(Access, const void *, const void *, unsigned) {}
inline void count_rows(const unsigned char *const *) {}
inline void count_product() {}
inline void end_block() {}
inline void begin_launch(unsigned, unsigned) {}

#endif

}  // namespace emulated
