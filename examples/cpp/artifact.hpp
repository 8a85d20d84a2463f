// A compiled model: a folder that dcnv3-tvm has written.
#pragma once

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/function.h>

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "image.hpp"
#include "json.hpp"

struct TensorInfo {
  struct Size {
    int64_t multiple;  // the size itself, or what a dynamic size is a multiple of
    std::string name;  // of a dynamic size, otherwise empty
  };
  std::string name, dtype, layout;
  std::vector<Size> sizes;
};

// What a model computes for images of one size, or of any if its input has dynamic sizes.
struct Entry {
  TensorInfo input;
  std::vector<TensorInfo> outputs;
  JsonObject preprocessing;
  std::vector<tvm::ffi::Tensor> weights;  // in call order
  tvm::ffi::Function function;
};

class Artifact {
 public:
  // Load an artifact, after checking that it is intact and runs on this machine. `trust_weights`:
  // do not compute the digest of the weights, which reads all of them.
  Artifact(const std::filesystem::path& folder, bool trust_weights, int threads);

  // The sizes of the images that the model takes, by default the first; empty if they are dynamic.
  std::vector<ImageSize> sizes() const;

  // How an image becomes the input of a size, by default the first.
  Preprocessing preprocessing(const std::optional<ImageSize>& size = {}) const;

  // Names of the classes; empty if the artifact has none.
  const std::vector<std::string>& labels() const { return labels_; }

  const std::vector<TensorInfo>& outputs() const { return entries_[0].outputs; }

  // The shape of the input for one image of a size, by default the first.
  std::vector<int64_t> InputShape(const std::optional<ImageSize>& size = {}) const;

  // Call the model. `values` holds the input, contiguous.
  std::vector<tvm::ffi::Tensor> Run(const std::shared_ptr<uint8_t>& values,
                                    const std::vector<int64_t>& shape) const;

 private:
  void CheckRunsHere() const;

  const Entry& EntryFor(const std::optional<ImageSize>& size) const;

  JsonObject metadata_;
  std::vector<Entry> entries_;  // one for each size; at least one
  std::vector<std::string> labels_;
};
