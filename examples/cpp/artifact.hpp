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

class Artifact {
 public:
  // Load an artifact, after checking that it is intact and runs on this machine. `trust_weights`:
  // do not compute the digest of the weights, which reads all of them.
  Artifact(const std::filesystem::path& folder, bool trust_weights, int threads);

  // How an image becomes the input.
  Preprocessing preprocessing() const;

  // Names of the classes; empty if the artifact has none.
  const std::vector<std::string>& labels() const { return labels_; }

  const std::vector<TensorInfo>& outputs() const { return outputs_; }

  // The shape of the input for one image; dynamic sizes are those of `crop`.
  std::vector<int64_t> InputShape(const std::optional<Preprocessing>& crop) const;

  // Call the function "main". `values` holds the input, contiguous.
  std::vector<tvm::ffi::Tensor> Run(const std::shared_ptr<uint8_t>& values,
                                    const std::vector<int64_t>& shape) const;

 private:
  void CheckRunsHere() const;

  JsonObject metadata_;
  TensorInfo input_;
  std::vector<TensorInfo> outputs_;
  std::vector<std::string> labels_;
  std::vector<tvm::ffi::Tensor> weights_;  // in call order
  tvm::ffi::Function main_;
};
