// Map files into memory, and the tensors of a safetensors file.
#pragma once

#include <tvm/ffi/container/tensor.h>

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

struct MappedFile {
  std::shared_ptr<const uint8_t> data;  // unmapped with its last owner
  size_t size;
};

MappedFile MapFile(const std::filesystem::path& path);

// Uninitialized memory at a multiple of 64 bytes: compiled code loads whole vectors from there.
std::shared_ptr<uint8_t> AlignedMemory(size_t size);

// A tensor over memory that it keeps alive.
tvm::ffi::Tensor View(std::shared_ptr<const uint8_t> memory, const std::vector<int64_t>& shape,
                      DLDataType dtype);

// The tensors of a safetensors file, by name. They share the memory of the file, except those that
// are not aligned, which are copied.
std::map<std::string, tvm::ffi::Tensor> ReadWeights(const MappedFile& file);
