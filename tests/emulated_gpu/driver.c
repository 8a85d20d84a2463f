/* A CUDA driver and runtime that computes on the processor, for machines without a GPU.
 *
 * Device memory is memory of the process, initialised with NaN. Kernels compiled by `nvcc.py` are
 * run; launches of machine code for GPUs do nothing. Errors: writes outside of allocations, launches
 * beyond the GPU's limits, and what CUDA forbids any thread during a capture. Calls are recorded in a
 * log.
 */

#include "driver.h"

#include <dlfcn.h>
#include <elf.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { LOG_BYTES = 1 << 16, PAGE = 4096, MARGIN = 1 << 16, ALIGNMENT = 256 };
enum { STATIC_SHARED = 48 << 10, REGISTERS = 65536, MOST_THREAD_REGISTERS = 255 };
enum { HOST_TO_HOST, HOST_TO_DEVICE, DEVICE_TO_HOST, DEVICE_TO_DEVICE };

typedef struct {
  unsigned grid[3], block[3], shared;
  void *stream, *attributes;
  unsigned count;
} Config;

/* Device memory between two margins; the pages around them are not accessible. */
typedef struct Block {
  struct Block *next;
  unsigned char *pages, *memory;
  size_t size, mapped;
} Block;

static char log_text[LOG_BYTES], failure[512];
static size_t log_size, used;
static Block *blocks;
static __thread int last_error; /* As cudaGetLastError returns it. */
__thread int current_device;
int fault;

static pthread_mutex_t mutex = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;
int enter(void) { return pthread_mutex_lock(&mutex); }
void leave(int *entered) { pthread_mutex_unlock(&mutex); }

void say(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  size_t rest = LOG_BYTES - log_size, length = vsnprintf(log_text + log_size, rest, format, arguments);
  log_size += length < rest ? length : rest - 1;
  va_end(arguments);
}

size_t setting(const char *name, size_t otherwise) {
  const char *text = getenv(name);
  return text ? strtoull(text, NULL, 10) : otherwise;
}

int outcome(int error) {
  if (fault) error = fault;
  if (error) last_error = error;
  return error;
}

/* Act as after a fault. Wrong accesses that the emulator finds let the process go on. */
void fake_fault(void) { fault = FAILED; }
const char *fake_log(void) { return log_text; }
void fake_clear(void) { log_size = log_text[0] = 0; }
size_t fake_used(void) { return used; }

/* The driver. */

int cuInit(unsigned flags) { return OK; }
int cuDriverGetVersion(int *version) { return *version = setting("FAKE_CUDA", 13000), OK; }
int cuDeviceGetCount(int *count) { return *count = setting("FAKE_GPUS", 2), OK; }
int cuDeviceGet(int *device, int index) { return *device = index, OK; }
int cuDeviceTotalMem_v2(size_t *size, int device) { return *size = setting("FAKE_BYTES", 1 << 30), OK; }
int cuDeviceGetName(char *name, int size, int device) { return snprintf(name, size, "Fake"), OK; }
int cuGetErrorName(int error, const char **name) {
  return *name = *failure ? failure : "CUDA_ERROR", OK;
}
int cuGetErrorString(int error, const char **text) {
  return *text = *failure ? failure : "an error", OK;
}
int cuTensorMapEncodeTiled(void) { return 801; }

int cuDeviceGetAttribute(int *value, int attribute, int device) {
  int capability = setting("FAKE_SM", 90);
  *value = attribute == 75 ? capability / 10 : attribute == 76 ? capability % 10 : 132;
  return OK;
}

/* Return the size of an ELF file, whose section table is at its end. */
static size_t elf_size(const void *image) {
  const Elf64_Ehdr *header = image;
  return header->e_shoff + (size_t)header->e_shnum * header->e_shentsize;
}

int cuModuleLoadData(void **module, const void *image) {
  ENTER;
  if (forbidden(NOT_IN_CAPTURE)) return NOT_IN_CAPTURE;
  const Elf64_Ehdr *header = image;
  int code = !memcmp(image, ELFMAG, SELFMAG);
  say("load %s\n", code ? "cubin" : "no cubin");
  *module = NULL;
  if (!code || header->e_type != ET_DYN) return OK;
  char path[] = "/tmp/dcnv3-tvm-kernels-XXXXXX";
  int file = mkstemp(path);
  size_t size = elf_size(image);
  if (file < 0) return INVALID;
  if (write(file, image, size) == (ssize_t)size) *module = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  close(file);
  unlink(path);
  if (!*module) snprintf(failure, sizeof failure, "cannot load the kernels");
  return *module ? OK : INVALID;
}

int cuModuleUnload(void *module) {
  say("unload\n");
  return module ? dlclose(module) : OK;
}

int cuModuleGetFunction(Function **found, void *module, const char *name) {
  Function *function = calloc(1, sizeof *function);
  char symbol[160];
  snprintf(function->name, sizeof function->name, "%s", name);
  function->most_shared = STATIC_SHARED;
  if (module) {
    snprintf(symbol, sizeof symbol, "emulated_%s", name);
    function->run = (Run *)dlsym(module, symbol);
    snprintf(symbol, sizeof symbol, "emulated_%s_bytes", name);
    function->parameter_bytes = dlsym(module, symbol);
    snprintf(symbol, sizeof symbol, "emulated_%s_limits", name);
    const unsigned *limits = dlsym(module, symbol);
    if (!function->run || !function->parameter_bytes || !limits) return NOT_FOUND;
    function->most_threads = limits[0];
    function->static_shared = limits[1];
    function->most_shared -= function->static_shared;
  }
  return *found = function, OK;
}

static int is_untouched(const unsigned char *from, const unsigned char *to) {
  for (; from < to; ++from) {
    if (*from != 0xff) return 0;
  }
  return 1;
}

int compute(Launch *launch) {
  Function *function = launch->function;
  void *parameters[MOST_PARAMETERS];
  if (!function->run) return OK;
  for (int i = 0; i < MOST_PARAMETERS; ++i) parameters[i] = &launch->values[i];
  const char *wrong = function->run(launch->config, parameters, launch->backwards);
  for (Block *block = blocks; block && !wrong; block = block->next) {
    const unsigned char *end = block->memory + block->size, *last = block->pages + block->mapped;
    if (!is_untouched(block->pages, block->memory) || !is_untouched(end, last)) {
      wrong = "write outside an allocation";
    }
  }
  if (wrong) snprintf(failure, sizeof failure, "%s: %s", function->name, wrong);
  return wrong ? FAILED : OK;
}

/* Return the most shared memory of a block, from the CUDA programming guide. */
static unsigned most_shared(void) {
  switch (setting("FAKE_SM", 90)) {
    case 80:
    case 87:
      return 163 << 10;
    case 86:
    case 89:
    case 120:
      return 99 << 10;
    default:
      return 227 << 10;
  }
}

int cuFuncSetAttribute(Function *function, int attribute, int value) {
  if (attribute != 8) return OK;
  if (value < 0 || value + function->static_shared > most_shared()) return INVALID;
  return function->most_shared = value, OK;
}

/* Return what is wrong with the sizes of a launch, for any GPU from sm_75 on; else NULL. */
static const char *wrong_size(const Config *config, const Function *function) {
  const unsigned *grid = config->grid, *block = config->block;
  for (int i = 0; i < 3; ++i) {
    if (!grid[i] || !block[i]) return "an empty launch";
  }
  if (grid[0] > 0x7fffffff || grid[1] > 65535 || grid[2] > 65535) return "too many blocks";
  uint64_t threads = (uint64_t)block[0] * block[1] * block[2];
  if (threads > 1024 || block[2] > 64) return "too many threads";
  /* The assembler keeps within the registers of as many threads as a kernel declares. */
  if (!function->run) return NULL;
  uint64_t most = function->most_threads ? function->most_threads : REGISTERS / MOST_THREAD_REGISTERS;
  if (threads > most) return "too many registers for the threads";
  return config->shared > function->most_shared ? "more shared memory than allowed" : NULL;
}

int cuLaunchKernelEx(const Config *config, Function *function, void **parameters, void **more) {
  ENTER;
  Operation operation = {.kind = LAUNCH, .stream = number_of(config->stream)};
  Launch *launch = &operation.launch;
  *launch = (Launch){.function = function, .backwards = setting("FAKE_BACKWARDS", 0)};
  const char *wrong = wrong_size(config, function);
  if (wrong) {
    snprintf(failure, sizeof failure, "%s: %s", function->name, wrong);
    return TOO_MANY_RESOURCES;
  }
  memcpy(launch->config, config, sizeof launch->config);
  const int *bytes = function->parameter_bytes;
  for (int i = 0; bytes && bytes[i]; ++i) memcpy(&launch->values[i], parameters[i], bytes[i]);
  if (is_captured(operation.stream)) {
    say("capture %s\n", function->name);
  } else {
    say("launch %s gpu=%d stream=%td\n", function->name, current_device, (intptr_t)config->stream);
  }
  return fault ? fault : issue(operation);
}

/* The runtime. */

int cudaGetDeviceCount(int *count) { return cuDeviceGetCount(count); }
int cudaSetDevice(int device) { return current_device = device, OK; }
int cudaGetDevice(int *device) { return *device = current_device, OK; }
int cudaDeviceGetAttribute(int *value, int attribute, int device) {
  return cuDeviceGetAttribute(value, attribute, device);
}
int cudaGetDeviceProperties(void *properties, int device) { return 1; }
int cudaPeekAtLastError(void) { return fault ? fault : last_error; }
int cudaGetLastError(void) {
  int error = cudaPeekAtLastError();
  last_error = OK;
  return say("forget error\n"), error;
}

const char *cudaGetErrorName(int error) {
  return error == OUT_OF_MEMORY ? "cudaErrorMemoryAllocation" : "cudaErrorUnknown";
}
const char *cudaGetErrorString(int error) { return *failure ? failure : "an error"; }

int cudaMemGetInfo(size_t *unused, size_t *total) {
  cuDeviceTotalMem_v2(total, 0);
  *unused = *total - used;
  return OK;
}

int cudaMalloc(void **memory, size_t size) {
  ENTER;
  size_t available, total;
  if (fault || forbidden(NOT_IN_CAPTURE)) return outcome(NOT_IN_CAPTURE);
  cudaMemGetInfo(&available, &total);
  if (size > available) return say("no memory\n"), outcome(OUT_OF_MEMORY);
  size_t filled = (size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
  size_t mapped = (filled + PAGE - 1) / PAGE * PAGE;
  size_t reserved = mapped + 2 * MARGIN;
  unsigned char *pages = mmap(NULL, reserved, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pages == MAP_FAILED) return OUT_OF_MEMORY;
  Block *block = malloc(sizeof *block);
  *block = (Block){blocks, pages + MARGIN, pages + MARGIN + mapped - filled, size, mapped};
  mprotect(block->pages, mapped, PROT_READ | PROT_WRITE);
  memset(block->pages, 0xff, mapped); /* NaN */
  blocks = block;
  used += size;
  say("malloc %zu\n", size);
  *memory = block->memory;
  return OK;
}

int cudaFree(void *memory) {
  ENTER;
  if (fault || forbidden(NOT_IN_CAPTURE)) return outcome(NOT_IN_CAPTURE);
  int failed = finish_all();
  if (failed) return outcome(failed);
  for (Block **link = &blocks; *link; link = &(*link)->next) {
    Block *block = *link;
    if (block->memory != memory) continue;
    *link = block->next;
    used -= block->size;
    say("free %zu\n", block->size);
    munmap(block->pages - MARGIN, block->mapped + 2 * MARGIN);
    free(block);
    return OK;
  }
  return memory ? INVALID : OK;
}

int cudaMallocHost(void **memory, size_t size) { return !(*memory = malloc(size)); }
int cudaFreeHost(void *memory) { return free(memory), OK; }

int cudaMemcpyAsync(void *to, void *from, size_t size, int kind, void *stream) {
  static const char *const names[] = {"h2h", "h2d", "d2h", "d2d"};
  ENTER;
  if (fault) return outcome(OK);
  say("copy %s %zu stream=%td\n", names[kind], size, (intptr_t)stream);
  Operation operation = {.kind = COPY, .stream = number_of(stream)};
  operation.copy = (Copy){to, from, NULL, size, kind != DEVICE_TO_DEVICE};
  /* The host may change its memory afterwards, and has the result of a copy to it. */
  if (kind == HOST_TO_DEVICE) operation.copy.staged = memcpy(malloc(size + 1), from, size);
  int result = issue(operation);
  int waits = kind == DEVICE_TO_HOST || kind == HOST_TO_HOST;
  return outcome(waits && result == OK ? finish_stream(operation.stream) : result);
}
int cudaMemcpyPeerAsync(void *to, int there, void *from, int here, size_t size, void *stream) {
  return cudaMemcpyAsync(to, from, size, DEVICE_TO_DEVICE, stream);
}
