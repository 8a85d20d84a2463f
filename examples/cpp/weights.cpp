#include "weights.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <new>

#include "error.hpp"
#include "json.hpp"

namespace ffi = tvm::ffi;

namespace {

constexpr size_t kAlignment = 64;

const std::map<std::string, DLDataType> kTypes = {
    {"F64", {kDLFloat, 64, 1}}, {"F32", {kDLFloat, 32, 1}},     {"F16", {kDLFloat, 16, 1}},
    {"I64", {kDLInt, 64, 1}},   {"BF16", {kDLBfloat, 16, 1}},   {"I32", {kDLInt, 32, 1}},
    {"I16", {kDLInt, 16, 1}},   {"I8", {kDLInt, 8, 1}},         {"U8", {kDLUInt, 8, 1}},
    {"BOOL", {kDLBool, 8, 1}}};

Error Damaged(const std::string& reason) {
  return Error("weights.safetensors is truncated or damaged: " + reason);
}

// Allocates nothing: the tensor refers to memory that somebody else has allocated.
struct Owner {
  std::shared_ptr<const uint8_t> memory;
  void AllocData(DLTensor* tensor) { tensor->data = const_cast<uint8_t*>(memory.get()); }
  void FreeData(DLTensor*) {}
};

}  // namespace

MappedFile MapFile(const std::filesystem::path& path) {
  int descriptor = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  struct stat status = {};
  bool opened = descriptor >= 0 && fstat(descriptor, &status) == 0;
  if (!opened) throw Error(path.string() + " cannot be read: " + std::strerror(errno));
  auto size = static_cast<size_t>(status.st_size);
  if (!S_ISREG(status.st_mode) || size == 0) {
    close(descriptor);
    throw Error(path.string() + (size == 0 ? " is empty" : " is not a file"));
  }
  void* address = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, descriptor, 0);
  close(descriptor);
  if (address == MAP_FAILED) {
    throw Error(path.string() + " cannot be mapped into memory: " + std::strerror(errno));
  }
  auto unmap = [size](const uint8_t* data) { munmap(const_cast<uint8_t*>(data), size); };
  return {std::shared_ptr<const uint8_t>(static_cast<const uint8_t*>(address), unmap), size};
}

std::shared_ptr<uint8_t> AlignedMemory(size_t size) {
  size_t rounded = (size / kAlignment + 1) * kAlignment;
  void* memory = std::aligned_alloc(kAlignment, rounded);
  if (memory == nullptr) throw std::bad_alloc();
  return std::shared_ptr<uint8_t>(static_cast<uint8_t*>(memory), std::free);
}

ffi::Tensor View(std::shared_ptr<const uint8_t> memory, const std::vector<int64_t>& shape,
                 DLDataType dtype) {
  return ffi::Tensor::FromNDAlloc(Owner{std::move(memory)},
                                  ffi::ShapeView(shape.data(), shape.size()), dtype,
                                  DLDevice{kDLCPU, 0});
}

std::map<std::string, ffi::Tensor> ReadWeights(const MappedFile& file) {
  uint64_t length = 0;
  if (file.size < sizeof(length)) throw Damaged("it has no header");
  std::memcpy(&length, file.data.get(), sizeof(length));
  if (length > file.size - sizeof(length)) throw Damaged("its header is longer than the file");
  const uint8_t* data = file.data.get() + sizeof(length) + length;
  uint64_t available = file.size - sizeof(length) - length;
  std::string text(reinterpret_cast<const char*>(file.data.get()) + sizeof(length), length);
  std::map<std::string, ffi::Tensor> tensors;
  for (const auto& [key, value] : ParseJson(text, "the header of weights.safetensors")) {
    auto name = Cast<std::string>(key, "a name in weights.safetensors");
    if (name == "__metadata__") continue;
    auto entry = Cast<JsonObject>(value, "'" + name + "' in weights.safetensors");
    auto shape = GetList<int64_t>(entry, "shape");
    auto range = GetList<int64_t>(entry, "data_offsets");
    auto type = kTypes.find(Get<std::string>(entry, "dtype"));
    if (type == kTypes.end() || range.size() != 2) throw Damaged("'" + name + "' is invalid");
    // Multiplied as long as it fits into the file, so nothing overflows.
    uint64_t size = type->second.bits / 8;
    for (int64_t extent : shape) {
      bool fits = extent >= 0 && (extent == 0 || size <= available / static_cast<uint64_t>(extent));
      if (!fits) throw Damaged("'" + name + "' has an invalid shape");
      size *= static_cast<uint64_t>(extent);
    }
    auto start = static_cast<uint64_t>(range[0]);
    bool inside = range[0] >= 0 && start <= available && size <= available - start;
    if (!inside || static_cast<uint64_t>(range[1]) != start + size) {
      throw Damaged("'" + name + "' is not inside the file");
    }
    std::shared_ptr<const uint8_t> memory(file.data, data + start);
    if (reinterpret_cast<uintptr_t>(memory.get()) % kAlignment != 0) {
      std::shared_ptr<uint8_t> copy = AlignedMemory(size);
      std::memcpy(copy.get(), memory.get(), size);
      memory = copy;
    }
    tensors.emplace(name, View(memory, shape, type->second));
  }
  return tensors;
}
