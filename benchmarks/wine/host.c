// Runs the entry "main" of a model for Windows: reads arguments from arguments.bin, writes the first
// result to result.bin. It calls tvm_ffi.dll by its C interface and needs no C library's headers, so
// that Zig links it without building one.
#include <stddef.h>
#include <stdint.h>
#include <tvm/ffi/c_api.h>

typedef struct FILE FILE;
FILE* fopen(const char*, const char*);
size_t fread(void*, size_t, size_t, FILE*);
size_t fwrite(const void*, size_t, size_t, FILE*);
int fclose(FILE*);
int fflush(FILE*);
int puts(const char*);
size_t strlen(const char*);
void exit(int);
void* _aligned_malloc(size_t size, size_t alignment);
void* LoadLibraryA(const char*);

enum { kAlignment = 64, kPooledAllocator = 2 };

static void Fail(const char* what) {
  TVMFFIObjectHandle error = NULL;
  TVMFFIErrorMoveFromRaised(&error);
  puts(what);
  if (error != NULL) puts(((TVMFFIErrorCell*)((TVMFFIObject*)error + 1))->message.data);
  fflush(NULL);
  exit(1);
}

static TVMFFIAny Text(const char* value) {
  TVMFFIAny any = {.type_index = kTVMFFIRawStr};
  any.v_c_str = value;
  return any;
}

static TVMFFIAny Integer(int64_t value) {
  TVMFFIAny any = {.type_index = kTVMFFIInt};
  any.v_int64 = value;
  return any;
}

static TVMFFIAny Call(TVMFFIObjectHandle function, TVMFFIAny* arguments, int count) {
  TVMFFIAny result = {.type_index = kTVMFFINone};
  if (TVMFFIFunctionCall(function, arguments, count, &result) != 0) Fail("a call fails");
  return result;
}

static TVMFFIObjectHandle Global(const char* name) {
  TVMFFIByteArray bytes = {name, strlen(name)};
  TVMFFIObjectHandle function = NULL;
  if (TVMFFIFunctionGetGlobal(&bytes, &function) != 0 || function == NULL) Fail(name);
  return function;
}

static TVMFFIObjectHandle Method(TVMFFIAny module, const char* name) {
  TVMFFIAny arguments[] = {module, Text(name), Integer(1)};
  TVMFFIAny result = Call(Global("ffi.ModuleGetFunction"), arguments, 3);
  if (result.type_index != kTVMFFIFunction) Fail(name);
  return result.v_obj;
}

static void KeepTensor(DLManagedTensor* tensor) { (void)tensor; }

static void* Read(FILE* file, size_t size) {
  void* data = _aligned_malloc(size + 1, kAlignment);
  if (fread(data, 1, size, file) != size) Fail("arguments.bin ends early");
  return data;
}

// A float32 tensor: number of axes, sizes, values.
static TVMFFIAny ReadTensor(FILE* file) {
  int64_t axes = *(int64_t*)Read(file, 8), count = 1;
  int64_t* shape = Read(file, 8 * axes);
  int64_t* strides = _aligned_malloc(8 * axes + 8, kAlignment);
  for (int64_t axis = axes - 1; axis >= 0; --axis) {
    strides[axis] = count;
    count *= shape[axis];
  }
  DLManagedTensor* tensor = _aligned_malloc(sizeof(DLManagedTensor), kAlignment);
  *tensor = (DLManagedTensor){.deleter = KeepTensor};
  tensor->dl_tensor = (DLTensor){.data = Read(file, 4 * count),
                                 .device = {kDLCPU, 0},
                                 .ndim = (int32_t)axes,
                                 .dtype = {kDLFloat, 32, 1},
                                 .shape = shape,
                                 .strides = strides};
  TVMFFIAny any = {.type_index = kTVMFFITensor};
  if (TVMFFITensorFromDLPack(tensor, kAlignment, 1, (TVMFFIObjectHandle*)&any.v_obj) != 0) {
    Fail("an argument is invalid");
  }
  return any;
}

void Start(void) {
  if (LoadLibraryA("tvm_runtime.dll") == NULL) Fail("tvm_runtime.dll cannot be loaded");
  TVMFFIAny path[] = {Text("model.so"), Text("so")};
  TVMFFIAny code = Call(Global("ffi.Module.load_from_file.so"), path, 2);
  TVMFFIAny machine = Call(Method(code, "vm_load_executable"), NULL, 0);
  TVMFFIAny device[] = {Integer(kDLCPU), Integer(0), Integer(kPooledAllocator)};
  Call(Method(machine, "vm_initialization"), device, 3);
  FILE* file = fopen("arguments.bin", "rb");
  int64_t count = *(int64_t*)Read(file, 8);
  TVMFFIAny* arguments = _aligned_malloc(count * sizeof(TVMFFIAny), kAlignment);
  for (int64_t index = 0; index < count; ++index) arguments[index] = ReadTensor(file);
  TVMFFIAny result = Call(Method(machine, "main"), arguments, (int32_t)count);
  if (result.type_index == kTVMFFIArray) {
    TVMFFIAny first[] = {result, Integer(0)};
    result = Call(Global("ffi.ArrayGetItem"), first, 2);
  }
  if (result.type_index != kTVMFFITensor) Fail("the result is no tensor");
  DLTensor* tensor = (DLTensor*)((TVMFFIObject*)result.v_obj + 1);
  int64_t size = 4;
  for (int32_t axis = 0; axis < tensor->ndim; ++axis) size *= tensor->shape[axis];
  FILE* output = fopen("result.bin", "wb");
  fwrite((char*)tensor->data + tensor->byte_offset, 1, size, output);
  fclose(output);
  fflush(NULL);
  exit(0);
}
