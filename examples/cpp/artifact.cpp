#include "artifact.hpp"

#include <dlfcn.h>
#include <tvm/ffi/extra/module.h>

#include <algorithm>
#include <cstdlib>

#include "digests.hpp"
#include "machine.hpp"
#include "weights.hpp"

namespace ffi = tvm::ffi;

namespace {

constexpr int64_t kSchemaVersion = 3;
constexpr const char* kMain = "main";
constexpr const char* kMetadata = "metadata.json";
constexpr const char* kLibrary = "model.so";
constexpr const char* kRuntimeLibrary = "libtvm_runtime.so";
constexpr const char* kWeights = "weights.safetensors";

std::string ReadMetadata(const std::filesystem::path& folder) {
  if (!std::filesystem::is_directory(folder)) {
    throw Error(folder.string() + " does not exist, or is not a folder");
  }
  if (!std::filesystem::exists(folder / kMetadata)) {
    throw Error(folder.string() + " is not an artifact: it has no " + kMetadata);
  }
  MappedFile file = MapFile(folder / kMetadata);
  return std::string(reinterpret_cast<const char*>(file.data.get()), file.size);
}

void CheckVersion(const JsonObject& metadata) {
  auto version = Get<int64_t>(metadata, "schema_version");
  if (version != kSchemaVersion) {
    throw Error("the artifact has schema version " + std::to_string(version) +
                ", and this program reads " + std::to_string(kSchemaVersion) +
                ". Compile the model again, or take the program of that version.");
  }
}

void CheckDigest(const std::string& name, const MappedFile& file, const JsonObject& digests) {
  if (Digest(file.data.get(), file.size) != Get<std::string>(digests, name)) {
    throw Error(name + " was modified after it was written. Copy the artifact again.");
  }
}

TensorInfo ReadTensorInfo(const JsonObject& json) {
  TensorInfo info{Get<std::string>(json, "name"), Get<std::string>(json, "dtype"),
                  Get<std::string>(json, "layout"), {}};
  for (const ffi::Any& size : Get<JsonArray>(json, "shape")) {
    if (std::optional<int64_t> number = size.as<int64_t>()) {
      info.sizes.push_back({*number, ""});
      continue;
    }
    // "n" is any size, "32*h" a multiple of 32.
    auto text = Cast<std::string>(size, "a size of '" + info.name + "'");
    size_t star = text.rfind('*');
    bool plain = star == std::string::npos;
    info.sizes.push_back({plain ? 1 : std::max(std::atoll(text.c_str()), 1LL),
                          plain ? text : text.substr(star + 1)});
  }
  return info;
}

std::vector<TensorInfo> ReadTensorInfos(const JsonObject& entry, const std::string& name) {
  std::vector<TensorInfo> infos;
  for (const JsonObject& json : GetList<JsonObject>(entry, name)) {
    infos.push_back(ReadTensorInfo(json));
  }
  return infos;
}

// The size of an input, unless it is dynamic or no image.
std::optional<ImageSize> FixedSize(const TensorInfo& input) {
  size_t height = input.layout.find('H'), width = input.layout.find('W');
  if (height >= input.sizes.size() || width >= input.sizes.size()) return {};
  const TensorInfo::Size &rows = input.sizes[height], &columns = input.sizes[width];
  if (!rows.name.empty() || !columns.name.empty()) return {};
  return ImageSize{static_cast<int>(rows.multiple), static_cast<int>(columns.multiple)};
}

std::string Text(const ImageSize& size) {
  return std::to_string(size.height) + "x" + std::to_string(size.width);
}

bool Fits(const std::vector<int64_t>& shape, const TensorInfo& input) {
  return std::equal(shape.begin(), shape.end(), input.sizes.begin(), input.sizes.end(),
                    [](int64_t extent, const TensorInfo::Size& size) {
                      return size.name.empty() ? extent == size.multiple
                                               : extent % size.multiple == 0;
                    });
}

// Load TVM's runtime, whose symbols the code needs.
void LoadRuntime(const std::string& library, int threads) {
  // TVM reads the size of its thread pool from the environment when it first uses it.
  setenv("TVM_NUM_THREADS", std::to_string(threads).c_str(), /*overwrite=*/1);
  if (dlopen(library.c_str(), RTLD_NOW | RTLD_GLOBAL) == nullptr) {
    throw Error(std::string("TVM's runtime cannot be loaded: ") + dlerror());
  }
  constexpr int kShareAllCores = -3;  // Its default pins threads, and may put two on one core.
  ffi::Array<ffi::String> cores;
  for (const std::string& index : UsableProcessors()) cores.push_back(index);
  ffi::Function::GetGlobalRequired("runtime.config_threadpool")(kShareAllCores, threads, cores);
}

ffi::Function FindFunction(const ffi::Module& module, const std::string& name) {
  ffi::Optional<ffi::Function> found = module->GetFunction(name);
  if (!found) throw Error(std::string(kLibrary) + " has no function '" + name + "'");
  return *found;
}

ffi::Module LoadCode(const std::filesystem::path& library) {
  ffi::Module code = ffi::Module::LoadFromFile(std::filesystem::absolute(library).string());
  auto machine = FindFunction(code, "vm_load_executable")().cast<ffi::Module>();
  constexpr int kPooledAllocator = 2;
  FindFunction(machine, "vm_initialization")(static_cast<int>(kDLCPU), 0, kPooledAllocator);
  return machine;
}

Entry ReadEntry(const JsonObject& json, const JsonObject& preprocessing,
                const std::map<std::string, ffi::Tensor>& tensors) {
  std::vector<TensorInfo> inputs = ReadTensorInfos(json, "inputs");
  if (inputs.size() != 1 || inputs[0].dtype != "float32") {
    throw Error("this program runs models with one input of float32");
  }
  Entry entry{inputs[0], ReadTensorInfos(json, "outputs"), preprocessing, {}, {}};
  for (const auto& name : GetList<std::string>(json, "weights")) {
    auto tensor = tensors.find(name);
    if (tensor == tensors.end()) throw Error(std::string(kWeights) + " has no '" + name + "'");
    entry.weights.push_back(tensor->second);
  }
  return entry;
}

// A result is a tensor, or an array of results.
void Flatten(const ffi::Any& result, std::vector<ffi::Tensor>* tensors) {
  if (std::optional<ffi::Tensor> tensor = result.as<ffi::Tensor>()) {
    tensors->push_back(*tensor);
    return;
  }
  for (const ffi::Any& item : Cast<ffi::Array<ffi::Any>>(result, "a result")) {
    Flatten(item, tensors);
  }
}

}  // namespace

Artifact::Artifact(const std::filesystem::path& folder, bool trust_weights, int threads) {
  std::string text = ReadMetadata(folder);
  metadata_ = ParseJson(text, kMetadata);
  CheckVersion(metadata_);
  std::string canonical = CanonicalJson(text);
  if (Digest(canonical.data(), canonical.size()) != Get<std::string>(metadata_, "digest")) {
    throw Error(std::string(kMetadata) +
                " was modified after it was written. Copy the artifact again.");
  }
  CheckRunsHere();
  auto digests = Get<JsonObject>(metadata_, "digests");
  CheckDigest(kLibrary, MapFile(folder / kLibrary), digests);
  // An artifact for another system may have been compiled without it.
  std::string runtime = kRuntimeLibrary;
  if (digests.count(ffi::String(runtime)) > 0) {
    CheckDigest(runtime, MapFile(folder / runtime), digests);
    runtime = std::filesystem::absolute(folder / runtime).string();
  }
  MappedFile weights = MapFile(folder / kWeights);
  if (!trust_weights) CheckDigest(kWeights, weights, digests);

  labels_ = GetList<std::string>(metadata_, "labels");
  std::map<std::string, ffi::Tensor> tensors = ReadWeights(weights);
  LoadRuntime(runtime, threads);
  ffi::Module code = LoadCode(folder / kLibrary);
  auto entries = Get<JsonObject>(metadata_, "entries");
  auto add = [&](const std::string& name, const JsonObject& preprocessing) {
    entries_.push_back(ReadEntry(Get<JsonObject>(entries, name), preprocessing, tensors));
    entries_.back().function = FindFunction(code, name);
  };
  add(kMain, Get<JsonObject>(metadata_, "preprocessing"));
  if (metadata_.count(ffi::String("sizes")) == 0) return;
  for (const auto& [size, settings] : Get<JsonObject>(metadata_, "sizes")) {
    add(std::string(kMain) + "_" + Cast<std::string>(size, "a size"),
        Cast<JsonObject>(settings, "the settings of a size"));
  }
}

void Artifact::CheckRunsHere() const {
  auto target = Get<JsonObject>(metadata_, "target");
  auto kind = Get<std::string>(target, "kind");
  if (kind != "llvm") throw Error("the artifact is for a GPU (" + kind + "), not for CPUs");
  auto triple = Get<std::string>(target, "triple");
  std::string architecture = triple.substr(0, triple.find('-'));
  if (architecture != Architecture() || triple.find("linux") == std::string::npos) {
    throw Error("the artifact is for " + triple + ", and this is " + Architecture() +
                " Linux. Compile the model with another --target.");
  }
  auto features = GetList<std::string>(target, "features");
  std::string missing;
  for (const std::string& name : MissingFeatures(features)) {
    missing += (missing.empty() ? "" : ", ") + name;
  }
  if (!missing.empty()) {
    throw Error("the artifact is for another CPU (" + Get<std::string>(target, "mcpu") +
                "): this one lacks " + missing + ". Compile the model with another --target.");
  }
  auto has = [&](const char* name) {
    return std::find(features.begin(), features.end(), name) != features.end();
  };
  bool uses_tiles = false;
  for (const auto& [kernel, rule] : Get<JsonObject>(metadata_, "kernels")) {
    uses_tiles |= Cast<std::string>(rule, "a kernel's rule") == "tile_matmul";
  }
  if (has("amx-bf16") && has("amx-tile") && uses_tiles && !EnableAmx()) {
    throw Error("the system denies the use of AMX: it takes Linux 5.16, and a sandbox that permits "
                "arch_prctl. Otherwise compile the model in float32.");
  }
}

std::vector<ImageSize> Artifact::sizes() const {
  std::vector<ImageSize> sizes;
  for (const Entry& entry : entries_) {
    if (std::optional<ImageSize> size = FixedSize(entry.input)) sizes.push_back(*size);
  }
  return sizes;
}

const Entry& Artifact::EntryFor(const std::optional<ImageSize>& size) const {
  std::string allowed;
  for (const Entry& entry : entries_) {
    std::optional<ImageSize> fixed = FixedSize(entry.input);
    bool fits = !fixed || !size || (fixed->height == size->height && fixed->width == size->width);
    if (fits) return entry;
    allowed += (allowed.empty() ? "" : ", ") + Text(*fixed);
  }
  throw Error("the model does not take images of " + Text(*size) + ", but of " + allowed);
}

Preprocessing Artifact::preprocessing(const std::optional<ImageSize>& size) const {
  const Entry& entry = EntryFor(size);
  const JsonObject& settings = entry.preprocessing;
  if (settings.empty()) throw Error("the artifact has no preprocessing settings: pass a .f32 file");
  Preprocessing result;
  auto crop = GetList<int64_t>(settings, "crop");
  auto mean = GetList<double>(settings, "mean"), std = GetList<double>(settings, "std");
  if (crop.size() != 2 || mean.size() != 3 || std.size() != 3) {
    throw Error("the preprocessing settings are invalid");
  }
  result.resize = static_cast<int>(Get<int64_t>(settings, "resize"));
  result.crop = {static_cast<int>(crop[0]), static_cast<int>(crop[1])};
  if (size && !FixedSize(entry.input)) {
    result.crop = *size;
    result.resize = std::max(size->height, size->width);
  }
  std::copy(mean.begin(), mean.end(), result.mean);
  std::copy(std.begin(), std.end(), result.std);
  result.interpolation = Get<std::string>(settings, "interpolation");
  result.channels_first = Get<std::string>(settings, "layout") == "NCHW";
  return result;
}

std::vector<int64_t> Artifact::InputShape(const std::optional<ImageSize>& size) const {
  const TensorInfo& input = EntryFor(size).input;
  std::vector<int64_t> shape;
  for (size_t axis = 0; axis < input.sizes.size(); ++axis) {
    const TensorInfo::Size& expected = input.sizes[axis];
    char letter = axis < input.layout.size() ? input.layout[axis] : ' ';
    int64_t extent = letter == 'H' && size   ? size->height
                     : letter == 'W' && size ? size->width
                                             : 1;
    if (expected.name.empty()) extent = expected.multiple;
    if (extent % expected.multiple != 0) {
      throw Error("'" + expected.name + "' of the input is a multiple of " +
                  std::to_string(expected.multiple) + ", not " + std::to_string(extent));
    }
    shape.push_back(extent);
  }
  return shape;
}

std::vector<ffi::Tensor> Artifact::Run(const std::shared_ptr<uint8_t>& values,
                                       const std::vector<int64_t>& shape) const {
  auto entry = std::find_if(entries_.begin(), entries_.end(),
                            [&](const Entry& each) { return Fits(shape, each.input); });
  if (entry == entries_.end()) throw Error("the model takes no input of this shape");
  // Compiled code takes an axis of size 32*h as two.
  std::vector<int64_t> kernel_shape;
  for (size_t axis = 0; axis < shape.size(); ++axis) {
    const TensorInfo::Size& size = entry->input.sizes[axis];
    bool split = !size.name.empty() && size.multiple > 1;
    kernel_shape.push_back(split ? shape[axis] / size.multiple : shape[axis]);
    if (split) kernel_shape.push_back(size.multiple);
  }
  std::vector<ffi::AnyView> arguments;
  ffi::Tensor input = View(values, kernel_shape, DLDataType{kDLFloat, 32, 1});
  arguments.emplace_back(input);
  arguments.insert(arguments.end(), entry->weights.begin(), entry->weights.end());
  ffi::Any result;
  entry->function.CallPacked(arguments.data(), static_cast<int32_t>(arguments.size()), &result);
  std::vector<ffi::Tensor> outputs;
  Flatten(result, &outputs);
  if (outputs.size() != entry->outputs.size()) throw Error("the model returns another number of outputs");
  return outputs;
}
