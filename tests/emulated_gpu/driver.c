/* A CUDA driver and runtime that computes on the processor, for machines without a GPU.
 *
 * Device memory is memory of the process, a stream is a number, and every operation is synchronous,
 * except launches on a stream that is being captured. Kernels compiled by `nvcc.py` are run;
 * launches of machine code for GPUs do nothing. Device memory is initialised with NaN, and writes
 * outside of allocations are errors. Calls are recorded in a log.
 */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { OK, INVALID = 1, OUT_OF_MEMORY, NOT_FOUND = 500, FAILED = 700, NOT_IN_CAPTURE = 900, INVALIDATED };
enum { LOG_BYTES = 1 << 16, PAGE = 4096, MARGIN = 1 << 16, ALIGNMENT = 256 };
enum { STATIC_SHARED = 48 << 10, MOST_SHARED = 227 << 10 }; /* Most of sm_90. */
enum { MOST_PARAMETERS = 32, MOST_LAUNCHES = 4096 };

typedef struct {
  unsigned grid[3], block[3], shared;
  void *stream, *attributes;
  unsigned count;
} Config;

/* Entry function of a kernel compiled by `nvcc.py`. */
typedef const char *Run(const unsigned *config, void **parameters, int backwards);

typedef struct {
  char name[128];
  Run *run;                   /* NULL for machine code. */
  const int *parameter_bytes; /* Terminated by 0. */
  unsigned most_shared;
} Function;

typedef struct {
  Function *function;
  unsigned config[7];
  uint64_t values[MOST_PARAMETERS];
} Launch;

typedef struct {
  Launch launches[MOST_LAUNCHES];
  int count;
} Graph;

/* Device memory between two margins; the pages around them are not accessible. */
typedef struct Block {
  struct Block *next;
  unsigned char *pages, *memory;
  size_t size, mapped;
} Block;

static char log_text[LOG_BYTES], failure[512];
static int fault;                   /* Error of all later operations, after a fault on the device. */
static __thread int last_error;     /* As cudaGetLastError returns it. */
static size_t log_size, used;
static Block *blocks;
static __thread int current_device;
static void *captured_stream;
static Graph *captured;

static void say(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  size_t rest = LOG_BYTES - log_size, length = vsnprintf(log_text + log_size, rest, format, arguments);
  log_size += length < rest ? length : rest - 1;
  va_end(arguments);
}

static size_t setting(const char *name, size_t otherwise) {
  const char *text = getenv(name);
  return text ? strtoull(text, NULL, 10) : otherwise;
}

/* Return the result of an operation of the runtime, or the fault that an earlier one left. */
static int outcome(int error) {
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
    if (!function->run || !function->parameter_bytes) return NOT_FOUND;
  }
  return *found = function, OK;
}

int cuFuncSetAttribute(Function *function, int attribute, int value) {
  if (attribute == 8) function->most_shared = value;
  return OK;
}

static int is_untouched(const unsigned char *from, const unsigned char *to) {
  for (; from < to; ++from) {
    if (*from != 0xff) return 0;
  }
  return 1;
}

static int compute(Launch *launch) {
  Function *function = launch->function;
  void *parameters[MOST_PARAMETERS];
  if (!function->run) return OK;
  for (int i = 0; i < MOST_PARAMETERS; ++i) parameters[i] = &launch->values[i];
  int backwards = setting("FAKE_BACKWARDS", 0);
  const char *wrong = NULL;
  if (launch->config[6] > function->most_shared) {
    wrong = "more shared memory than allowed";
  } else {
    wrong = function->run(launch->config, parameters, backwards);
  }
  for (Block *block = blocks; block && !wrong; block = block->next) {
    const unsigned char *end = block->memory + block->size, *last = block->pages + block->mapped;
    if (!is_untouched(block->pages, block->memory) || !is_untouched(end, last)) {
      wrong = "write outside an allocation";
    }
  }
  if (wrong) snprintf(failure, sizeof failure, "%s: %s", function->name, wrong);
  return wrong ? FAILED : OK;
}

/* Return what is wrong with the sizes of a launch, for any GPU from sm_75 on; else NULL. */
static const char *wrong_size(const Config *config) {
  const unsigned *grid = config->grid, *block = config->block;
  for (int i = 0; i < 3; ++i) {
    if (!grid[i] || !block[i]) return "an empty launch";
  }
  if (grid[0] > 0x7fffffff || grid[1] > 65535 || grid[2] > 65535) return "too many blocks";
  if ((uint64_t)block[0] * block[1] * block[2] > 1024 || block[2] > 64) return "too many threads";
  return config->shared > MOST_SHARED ? "too much shared memory" : NULL;
}

int cuLaunchKernelEx(const Config *config, Function *function, void **parameters, void **more) {
  Launch launch = {.function = function};
  const char *wrong = wrong_size(config);
  if (wrong) return snprintf(failure, sizeof failure, "%s: %s", function->name, wrong), INVALID;
  memcpy(launch.config, config, sizeof launch.config);
  const int *bytes = function->parameter_bytes;
  for (int i = 0; bytes && bytes[i]; ++i) memcpy(&launch.values[i], parameters[i], bytes[i]);
  if (captured && config->stream == captured_stream) {
    if (captured->count == MOST_LAUNCHES) return INVALID;
    captured->launches[captured->count++] = launch;
    say("capture %s\n", function->name);
    return OK;
  }
  say("launch %s gpu=%d stream=%td\n", function->name, current_device, (intptr_t)config->stream);
  return fault ? fault : compute(&launch);
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
  size_t available, total;
  if (fault || captured) return outcome(NOT_IN_CAPTURE);
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
  if (fault) return outcome(OK);
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

int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream) {
  static const char *const names[] = {"h2h", "h2d", "d2h", "d2d"};
  if (fault) return outcome(OK);
  say("copy %s %zu stream=%td\n", names[kind], size, (intptr_t)stream);
  memcpy(to, from, size);
  return OK;
}
int cudaMemcpyPeerAsync(void *to, int there, const void *from, int here, size_t size, void *stream) {
  return cudaMemcpyAsync(to, from, size, 3, stream);
}

int cudaStreamCreate(void **stream) {
  static intptr_t next = 1000;
  return *stream = (void *)next++, OK;
}
int cudaStreamCreateWithFlags(void **stream, unsigned flags) { return cudaStreamCreate(stream); }
int cudaStreamDestroy(void *stream) { return OK; }
int cudaStreamSynchronize(void *stream) {
  return say("sync %td\n", (intptr_t)stream), outcome(OK);
}

int cudaEventCreate(void **event) { return *event = calloc(1, sizeof(void *)), OK; }
int cudaEventDestroy(void *event) { return free(event), OK; }
int cudaEventRecord(void *event, void *stream) { return *(void **)event = stream, OK; }
int cudaEventSynchronize(void *event) { return OK; }
int cudaEventElapsedTime(float *time, void *start, void *stop) { return *time = 1, OK; }
int cudaStreamWaitEvent(void *stream, void *event, unsigned flags) {
  say("stream %td waits for %td\n", (intptr_t)stream, *(intptr_t *)event);
  return OK;
}

int cudaStreamBeginCapture(void *stream, int mode) {
  if (captured) return outcome(NOT_IN_CAPTURE);
  captured = calloc(1, sizeof *captured);
  captured_stream = stream;
  return OK;
}
int cudaStreamEndCapture(void *stream, void **graph) {
  static int invalidated;
  int fails = setting("FAKE_INVALID_CAPTURES", 0) > (size_t)invalidated;
  invalidated += fails;
  *graph = fails ? NULL : captured;
  captured = NULL;
  return fails ? outcome(INVALIDATED) : OK;
}
int cudaGraphInstantiate(void **executable, Graph *graph, unsigned long long flags) {
  if (!graph) return outcome(INVALID);
  *executable = memcpy(malloc(sizeof *graph), graph, sizeof *graph);
  return OK;
}
int cudaGraphDestroy(void *graph) { return free(graph), OK; }
int cudaGraphExecDestroy(void *executable) {
  if (fault) return outcome(OK);
  return say("graph destroyed\n"), free(executable), OK;
}
int cudaGraphLaunch(Graph *graph, void *stream) {
  int result = outcome(OK);
  say("graph of %d stream=%td\n", graph->count, (intptr_t)stream);
  for (int i = 0; i < graph->count && result == OK; ++i) result = compute(&graph->launches[i]);
  return result;
}
