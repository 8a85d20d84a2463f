/* A CUDA driver and runtime that computes on the processor, for tests on machines without a GPU.
 *
 * Device memory is memory of the process, a stream is a number, and everything is done at once, but
 * for what is launched on a stream that is being captured. Of kernels it knows those of the toy
 * model, by their names; others are launched and do nothing. What happens is written to a log.
 */

#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OK, OUT_OF_MEMORY = 2, NOT_IN_CAPTURE = 900, LIMIT = 1 << 16 };

typedef struct {
  unsigned grid[3], block[3], shared;
  void *stream, *attributes;
  unsigned count;
} Config;

typedef struct {
  char name[64];
  float *arguments[3];
  unsigned elements;
} Launch;

typedef struct {
  Launch launches[1024];
  int count;
} Graph;

static char log_text[LIMIT];
static size_t log_size, used;
static __thread int current_device;
static void *captured_stream;
static Graph *captured;

static void say(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  log_size += vsnprintf(log_text + log_size, LIMIT - log_size, format, arguments);
  va_end(arguments);
}

static size_t setting(const char *name, size_t otherwise) {
  const char *text = getenv(name);
  return text ? strtoull(text, NULL, 10) : otherwise;
}

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
int cuGetErrorName(int error, const char **name) { return *name = "CUDA_ERROR", OK; }
int cuGetErrorString(int error, const char **text) { return *text = "an error", OK; }
int cuFuncSetAttribute(void *function, int attribute, int value) { return OK; }
int cuTensorMapEncodeTiled(void) { return 801; }

int cuDeviceGetAttribute(int *value, int attribute, int device) {
  int capability = setting("FAKE_SM", 90);
  *value = attribute == 75 ? capability / 10 : attribute == 76 ? capability % 10 : 132;
  return OK;
}

int cuModuleLoadData(void **module, const void *image) {
  say("load %s\n", memcmp(image, "\x7f" "ELF", 4) ? "no cubin" : "cubin");
  *module = (void *)image;
  return OK;
}

int cuModuleUnload(void *module) { return say("unload\n"), OK; }
int cuModuleGetFunction(void **function, void *module, const char *name) {
  return *function = strdup(name), OK;
}

static void compute(const Launch *launch) {
  float *out = launch->arguments[0], *a = launch->arguments[1], *b = launch->arguments[2];
  for (unsigned i = 0; i < launch->elements; ++i) {
    if (!strcmp(launch->name, "add_kernel")) out[i] = a[i] + b[i];
    if (!strcmp(launch->name, "relu_kernel")) out[i] = a[i] > 0 ? a[i] : 0;
    if (!strcmp(launch->name, "reshape_kernel")) out[i] = a[i];
  }
}

int cuLaunchKernelEx(const Config *config, void *function, void **parameters, void **more) {
  Launch launch = {.elements = config->grid[0] * config->block[0]};
  snprintf(launch.name, sizeof launch.name, "%s", (const char *)function);
  int count = strcmp(launch.name, "add_kernel") ? 2 : 3;
  for (int i = 0; i < count; ++i) launch.arguments[i] = *(float **)parameters[i];
  if (captured && config->stream == captured_stream) {
    captured->launches[captured->count++] = launch;
    say("capture %s\n", launch.name);
    return OK;
  }
  say("launch %s gpu=%d stream=%td\n", launch.name, current_device, (intptr_t)config->stream);
  compute(&launch);
  return OK;
}

/* The runtime. */

int cudaGetDeviceCount(int *count) { return cuDeviceGetCount(count); }
int cudaSetDevice(int device) { return current_device = device, OK; }
int cudaGetDevice(int *device) { return *device = current_device, OK; }
int cudaDeviceGetAttribute(int *value, int attribute, int device) {
  return cuDeviceGetAttribute(value, attribute, device);
}
int cudaGetDeviceProperties(void *properties, int device) { return 1; }
int cudaGetLastError(void) { return say("forget error\n"), OK; }
int cudaPeekAtLastError(void) { return OK; }

const char *cudaGetErrorName(int error) {
  return error == OUT_OF_MEMORY ? "cudaErrorMemoryAllocation" : "cudaErrorUnknown";
}
const char *cudaGetErrorString(int error) { return "an error"; }

int cudaMemGetInfo(size_t *unused, size_t *total) {
  cuDeviceTotalMem_v2(total, 0);
  *unused = *total - used;
  return OK;
}

/* The size stands in front of the memory. */
int cudaMalloc(void **memory, size_t size) {
  size_t available, total;
  if (captured) return NOT_IN_CAPTURE;
  cudaMemGetInfo(&available, &total);
  if (size > available) return OUT_OF_MEMORY;
  char *start = aligned_alloc(256, (size + 511) / 256 * 256);
  *(size_t *)start = size;
  memset(start + 256, 0xff, size); /* NaN */
  used += size;
  say("malloc %zu\n", size);
  *memory = start + 256;
  return OK;
}

int cudaFree(void *memory) {
  char *start = (char *)memory - 256;
  used -= *(size_t *)start;
  say("free %zu\n", *(size_t *)start);
  free(start);
  return OK;
}

int cudaMallocHost(void **memory, size_t size) { return !(*memory = malloc(size)); }
int cudaFreeHost(void *memory) { return free(memory), OK; }

int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream) {
  static const char *const names[] = {"h2h", "h2d", "d2h", "d2d"};
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
int cudaStreamSynchronize(void *stream) { return say("sync %td\n", (intptr_t)stream), OK; }

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
  captured = calloc(1, sizeof *captured);
  captured_stream = stream;
  return OK;
}
int cudaStreamEndCapture(void *stream, void **graph) {
  *graph = captured;
  captured = NULL;
  return OK;
}
int cudaGraphInstantiate(void **executable, Graph *graph, unsigned long long flags) {
  *executable = memcpy(malloc(sizeof *graph), graph, sizeof *graph);
  return OK;
}
int cudaGraphDestroy(void *graph) { return free(graph), OK; }
int cudaGraphExecDestroy(void *executable) { return free(executable), OK; }
int cudaGraphLaunch(const Graph *graph, void *stream) {
  say("graph of %d stream=%td\n", graph->count, (intptr_t)stream);
  for (int i = 0; i < graph->count; ++i) compute(&graph->launches[i]);
  return OK;
}
