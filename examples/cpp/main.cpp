// Run a compiled model on an image and print the most probable classes.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <fstream>
#include <numeric>

#include "artifact.hpp"
#include "image.hpp"
#include "machine.hpp"
#include "weights.hpp"

namespace ffi = tvm::ffi;

namespace {

constexpr const char* kUsage =
    "usage: run_artifact ARTIFACT IMAGE [--top K] [--size HxW] [--threads N] "
    "[--output FILE] [--save-input FILE] [--trust-weights]\n"
    "IMAGE is a PPM, JPEG or PNG file, or the input itself: a file *.f32 of float32 values.\n";

struct Options {
  std::string artifact, image, output, save_input;
  std::optional<ImageSize> size;
  int top = 5, threads = PhysicalCores();
  bool trust_weights = false;
};

int Count(const char* text) {
  char* end = nullptr;
  long value = std::strtol(text, &end, 10);
  if (*end != '\0' || value < 1 || value > 1024) {
    throw Error(std::string("a number from 1 to 1024 is needed, not '") + text + "'");
  }
  return static_cast<int>(value);
}

ImageSize Size(const std::string& text) {
  ImageSize size = {};
  int length = 0;
  int count = std::sscanf(text.c_str(), "%5d%nx%5d%n", &size.height, &length, &size.width, &length);
  if (count == 1) size.width = size.height;
  bool is_size = count >= 1 && length == static_cast<int>(text.size());
  if (!is_size || size.height < 1 || size.width < 1) {
    throw Error("a size such as 384x640 or 224 is needed, not '" + text + "'");
  }
  return size;
}

Options Parse(int argc, char** argv) {
  Options options;
  std::vector<std::string> files;
  for (int i = 1; i < argc; ++i) {
    std::string word = argv[i];
    if (word.rfind("--", 0) != 0) {
      files.push_back(word);
    } else if (word == "--trust-weights") {
      options.trust_weights = true;
    } else if (i + 1 == argc) {
      throw Error(kUsage);
    } else if (word == "--top") {
      options.top = Count(argv[++i]);
    } else if (word == "--size") {
      options.size = Size(argv[++i]);
    } else if (word == "--threads") {
      options.threads = Count(argv[++i]);
    } else if (word == "--output") {
      options.output = argv[++i];
    } else if (word == "--save-input") {
      options.save_input = argv[++i];
    } else {
      throw Error(kUsage);
    }
  }
  if (files.size() != 2) throw Error(kUsage);
  options.artifact = files[0];
  options.image = files[1];
  return options;
}

void Save(const std::string& path, const void* data, size_t size) {
  std::ofstream file(path, std::ios::binary);
  file.write(static_cast<const char*>(data), static_cast<std::streamsize>(size));
  file.close();
  if (!file) throw Error(path + " cannot be written");
}

size_t Elements(const std::vector<int64_t>& shape) {
  return std::accumulate(shape.begin(), shape.end(), size_t{1},
                         [](size_t size, int64_t extent) { return size * extent; });
}

struct Input {
  std::shared_ptr<uint8_t> values;
  std::vector<int64_t> shape;
};

Input PreparedImage(const Artifact& model, const Options& options) {
  Preprocessing settings = model.preprocessing(options.size);
  std::vector<int64_t> shape = model.InputShape(settings.crop);
  if (Elements(shape) != size_t(settings.crop.height) * settings.crop.width * 3) {
    throw Error("the input of the model is not one RGB image of the size of its crop");
  }
  Input input{AlignedMemory(Elements(shape) * sizeof(float)), shape};
  Preprocess(ReadImage(options.image), settings, reinterpret_cast<float*>(input.values.get()));
  return input;
}

// Read values of the shape that is asked for, or of the only one that has as many.
Input RawInput(const Artifact& model, const Options& options) {
  std::vector<std::vector<int64_t>> shapes;
  for (const ImageSize& size : model.sizes()) shapes.push_back(model.InputShape(size));
  if (options.size || shapes.empty()) shapes = {model.InputShape(options.size)};
  MappedFile file = MapFile(options.image);
  std::string sizes;
  std::vector<std::vector<int64_t>> fitting;
  for (const auto& shape : shapes) {
    size_t size = Elements(shape) * sizeof(float);
    if (size == file.size) fitting.push_back(shape);
    sizes += (sizes.empty() ? "" : " or ") + std::to_string(size);
  }
  if (fitting.empty()) {
    throw Error(options.image + " has " + std::to_string(file.size) + " bytes; the input has " +
                sizes);
  }
  if (fitting.size() > 1) throw Error("several sizes have as many values: add --size HxW");
  Input input{AlignedMemory(file.size), fitting[0]};
  std::memcpy(input.values.get(), file.data.get(), file.size);
  return input;
}

void PrintClasses(const ffi::Tensor& logits, int top, const std::vector<std::string>& labels) {
  const auto* values = static_cast<const float*>(logits.data_ptr());
  auto classes = static_cast<size_t>(logits.size(1));
  double highest = *std::max_element(values, values + classes), sum = 0;
  for (size_t i = 0; i < classes; ++i) sum += std::exp(values[i] - highest);
  if (!std::isfinite(sum)) throw Error("the logits are not finite");
  std::vector<size_t> order(classes);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return values[a] > values[b]; });
  order.resize(std::min<size_t>(classes, top));
  for (size_t i : order) {
    std::string label = i < labels.size() ? labels[i] : std::to_string(i);
    std::printf("%6.2f %%  %s\n", 100 * std::exp(values[i] - highest) / sum, label.c_str());
  }
}

void Run(const Options& options) {
  Artifact model(options.artifact, options.trust_weights, options.threads);
  bool is_raw = std::filesystem::path(options.image).extension() == ".f32";
  auto [values, shape] = is_raw ? RawInput(model, options) : PreparedImage(model, options);
  if (!options.save_input.empty()) {
    Save(options.save_input, values.get(), Elements(shape) * sizeof(float));
  }
  std::vector<ffi::Tensor> outputs = model.Run(values, shape);
  const ffi::Tensor& first = outputs[0];
  if (!options.output.empty()) {
    Save(options.output, first.data_ptr(), first.numel() * (first.dtype().bits / 8));
  }
  bool is_classifier = outputs.size() == 1 && first.ndim() == 2 &&
                       first.dtype().code == kDLFloat && first.dtype().bits == 32;
  if (is_classifier) {
    PrintClasses(first, options.top, model.labels());
    return;
  }
  for (size_t i = 0; i < outputs.size(); ++i) {
    std::printf("%s:", model.outputs()[i].name.c_str());
    for (int64_t extent : outputs[i].shape()) std::printf(" %lld", static_cast<long long>(extent));
    std::printf("\n");
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && std::string(argv[1]) == "--help") {
    std::fputs(kUsage, stdout);
    return 0;
  }
  try {
    Run(Parse(argc, argv));
    return 0;
  } catch (const ffi::Error& error) {  // Its what() has a backtrace.
    std::fprintf(stderr, "run_artifact: error: %s\n", error.message().c_str());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "run_artifact: error: %s\n", error.what());
  }
  return 1;
}
