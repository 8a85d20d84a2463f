#include "image.hpp"

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstring>
#include <memory>

#include "error.hpp"
#include "weights.hpp"

#ifdef HAVE_STB_IMAGE
#define STB_IMAGE_IMPLEMENTATION
#define STB_IMAGE_STATIC
#define STBI_ONLY_JPEG
#define STBI_ONLY_PNG
#include <stb_image.h>
#endif

namespace {

constexpr int kMaxAspectRatio = 8;  // Longer images are cropped first, which bounds the memory.
constexpr int kMaxPixels = 1 << 28;

Image ReadPpm(const MappedFile& file, const std::string& path) {
  size_t position = 2;
  const auto* bytes = file.data.get();
  auto number = [&]() -> int64_t {
    while (position < file.size && (std::isspace(bytes[position]) || bytes[position] == '#')) {
      if (bytes[position] == '#') {
        while (position < file.size && bytes[position] != '\n') ++position;
      } else {
        ++position;
      }
    }
    int64_t value = -1;
    while (position < file.size && std::isdigit(bytes[position]) && value <= kMaxPixels) {
      value = std::max<int64_t>(value, 0) * 10 + (bytes[position++] - '0');
    }
    return value;
  };
  int64_t width = number(), height = number(), highest = number();
  ++position;
  if (width < 1 || height < 1 || highest != 255 || width * height > kMaxPixels) {
    throw Error(path + " is not a PPM file of 8 bits");
  }
  size_t size = static_cast<size_t>(width * height) * 3;
  if (position > file.size || file.size - position < size) throw Error(path + " ends early");
  return {static_cast<int>(width), static_cast<int>(height),
          std::vector<uint8_t>(bytes + position, bytes + position + size)};
}

#ifdef HAVE_STB_IMAGE
// The EXIF orientation of a JPEG file, from 1 to 8; 1 if it has none.
int Orientation(const MappedFile& file) {
  const auto* bytes = file.data.get();
  auto big = [&](size_t at) { return bytes[at] << 8 | bytes[at + 1]; };
  for (size_t at = 2; at + 18 <= file.size && bytes[at] == 0xff;) {
    size_t length = big(at + 2), tiff = at + 10, end = std::min(at + 2 + length, file.size);
    if (bytes[at + 1] == 0xda) break;  // The pixels begin.
    bool is_exif = bytes[at + 1] == 0xe1 && std::memcmp(bytes + at + 4, "Exif\0\0", 6) == 0;
    at += 2 + length;
    if (!is_exif || tiff + 8 > end) continue;
    bool little = bytes[tiff] == 'I';
    auto u16 = [&](size_t p) { return little ? bytes[p] | bytes[p + 1] << 8 : big(p); };
    auto u32 = [&](size_t p) {
      return little ? uint32_t(u16(p)) | uint32_t(u16(p + 2)) << 16
                    : uint32_t(u16(p)) << 16 | uint32_t(u16(p + 2));
    };
    size_t directory = tiff + u32(tiff + 4);
    if (directory + 2 > end) continue;
    for (int i = 0, count = u16(directory); i < count; ++i) {
      size_t tag = directory + 2 + 12 * static_cast<size_t>(i);
      if (tag + 12 > end) break;
      int value = u16(tag + 8);
      if (u16(tag) == 0x0112) return value >= 1 && value <= 8 ? value : 1;
    }
  }
  return 1;
}

Image Oriented(const Image& image, int orientation) {
  bool swapped = orientation >= 5;
  Image result{swapped ? image.height : image.width, swapped ? image.width : image.height, {}};
  result.pixels.resize(image.pixels.size());
  bool flip_x = orientation == 2 || orientation == 3 || orientation == 7 || orientation == 8;
  bool flip_y = orientation == 3 || orientation == 4 || orientation == 6 || orientation == 7;
  for (int y = 0; y < result.height; ++y) {
    for (int x = 0; x < result.width; ++x) {
      int source_x = swapped ? y : x, source_y = swapped ? x : y;
      if (flip_x) source_x = image.width - 1 - source_x;
      if (flip_y) source_y = image.height - 1 - source_y;
      std::memcpy(&result.pixels[(size_t(y) * result.width + x) * 3],
                  &image.pixels[(size_t(source_y) * image.width + source_x) * 3], 3);
    }
  }
  return result;
}

Image ReadWithStb(const MappedFile& file, const std::string& path) {
  int width = 0, height = 0, channels = 0;
  const auto* bytes = reinterpret_cast<const stbi_uc*>(file.data.get());
  int size = static_cast<int>(std::min<size_t>(file.size, INT32_MAX));
  Image image{0, 0, {}};
  if (!stbi_info_from_memory(bytes, size, &width, &height, &channels) ||
      int64_t{width} * height > kMaxPixels) {
    throw Error(path + " is not a PPM, JPEG or PNG file of at most 2^28 pixels");
  }
  size_t count = size_t(width) * height * 3;
  if (stbi_is_16_bit_from_memory(bytes, size)) {
    std::unique_ptr<stbi_us, void (*)(void*)> pixels(
        stbi_load_16_from_memory(bytes, size, &width, &height, &channels, 3), stbi_image_free);
    if (pixels) {
      image.pixels.resize(count);
      for (size_t i = 0; i < count; ++i) image.pixels[i] = (pixels.get()[i] + 128) / 257;
    }
  } else {
    std::unique_ptr<stbi_uc, void (*)(void*)> pixels(
        stbi_load_from_memory(bytes, size, &width, &height, &channels, 3), stbi_image_free);
    if (pixels) image.pixels.assign(pixels.get(), pixels.get() + count);
  }
  if (image.pixels.empty()) throw Error(path + " cannot be read: " + stbi_failure_reason());
  image.width = width, image.height = height;
  int orientation = bytes[0] == 0xff ? Orientation(file) : 1;
  return orientation == 1 ? image : Oriented(image, orientation);
}
#endif

Image Crop(const Image& image, int left, int top, int width, int height) {
  Image result{width, height, std::vector<uint8_t>(size_t(width) * height * 3)};
  for (int y = 0; y < height; ++y) {
    std::memcpy(&result.pixels[size_t(y) * width * 3],
                &image.pixels[(size_t(y + top) * image.width + left) * 3], size_t(width) * 3);
  }
  return result;
}

double Bicubic(double x) {
  constexpr double a = -0.5;
  x = std::abs(x);
  if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
  if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
  return 0.0;
}

double Bilinear(double x) { return std::max(1.0 - std::abs(x), 0.0); }

struct Filter {
  double (*function)(double);
  double support;
};

// Resize the rows of an image, antialiased, in the fixed-point arithmetic of Pillow.
Image ResizeRows(const Image& image, int width, const Filter& filter) {
  if (width == image.width) return image;
  constexpr int kPrecision = 32 - 8 - 2;
  double scale = static_cast<double>(image.width) / width, filter_scale = std::max(scale, 1.0);
  double support = filter.support * filter_scale;
  Image result{width, image.height, std::vector<uint8_t>(size_t(width) * image.height * 3)};
  std::vector<double> exact;
  std::vector<int> weights;
  for (int x = 0; x < width; ++x) {
    double center = (x + 0.5) * scale;
    int first = std::max(static_cast<int>(center - support + 0.5), 0);
    int count = std::min(static_cast<int>(center + support + 0.5), image.width) - first;
    exact.resize(count), weights.resize(count);
    double sum = 0;
    for (int i = 0; i < count; ++i) {
      exact[i] = filter.function((i + first - center + 0.5) * (1.0 / filter_scale));
      sum += exact[i];
    }
    for (int i = 0; i < count; ++i) {
      double weight = (sum == 0 ? exact[i] : exact[i] / sum) * (1 << kPrecision);
      weights[i] = static_cast<int>(weight < 0 ? weight - 0.5 : weight + 0.5);
    }
    for (int y = 0; y < image.height; ++y) {
      const uint8_t* source = &image.pixels[(size_t(y) * image.width + first) * 3];
      for (int channel = 0; channel < 3; ++channel) {
        int value = 1 << (kPrecision - 1);
        for (int i = 0; i < count; ++i) value += source[3 * i + channel] * weights[i];
        result.pixels[(size_t(y) * width + x) * 3 + channel] =
            static_cast<uint8_t>(std::clamp(value >> kPrecision, 0, 255));
      }
    }
  }
  return result;
}

Image Transposed(const Image& image) {
  Image result{image.height, image.width, std::vector<uint8_t>(image.pixels.size())};
  for (int y = 0; y < image.height; ++y) {
    for (int x = 0; x < image.width; ++x) {
      std::memcpy(&result.pixels[(size_t(x) * image.height + y) * 3],
                  &image.pixels[(size_t(y) * image.width + x) * 3], 3);
    }
  }
  return result;
}

}  // namespace

Image ReadImage(const std::filesystem::path& path) {
  MappedFile file = MapFile(path);
  if (file.size > 2 && std::memcmp(file.data.get(), "P6", 2) == 0) {
    return ReadPpm(file, path.string());
  }
#ifdef HAVE_STB_IMAGE
  return ReadWithStb(file, path.string());
#else
  throw Error(path.string() +
              " is not a PPM file, and this program was built without stb_image, which reads JPEG "
              "and PNG. Install libstb-dev and build again, or convert the image.");
#endif
}

void Preprocess(const Image& image, const Preprocessing& settings, float* values) {
  bool is_bicubic = settings.interpolation == "bicubic";
  Filter filter = is_bicubic ? Filter{Bicubic, 2.0} : Filter{Bilinear, 1.0};
  if (!is_bicubic && settings.interpolation != "bilinear") {
    throw Error("this program has no interpolation '" + settings.interpolation + "'");
  }
  int limit = kMaxAspectRatio * std::min(image.width, image.height);
  int kept_width = std::min(image.width, limit), kept_height = std::min(image.height, limit);
  Image picture = Crop(image, (image.width - kept_width) / 2, (image.height - kept_height) / 2,
                       kept_width, kept_height);
  int shorter = std::min(picture.width, picture.height);
  double scale = static_cast<double>(settings.resize) / shorter;
  auto resized = [&](int size) {
    return size == shorter ? settings.resize : static_cast<int>(scale * size);
  };
  int width = std::max(resized(picture.width), settings.crop.width);
  int height = std::max(resized(picture.height), settings.crop.height);
  picture = ResizeRows(picture, width, filter);
  picture = Transposed(ResizeRows(Transposed(picture), height, filter));
  // Half to even, as Python rounds.
  int left = static_cast<int>(std::nearbyint((width - settings.crop.width) / 2.0));
  int top = static_cast<int>(std::nearbyint((height - settings.crop.height) / 2.0));
  picture = Crop(picture, left, top, settings.crop.width, settings.crop.height);
  size_t area = size_t(settings.crop.width) * settings.crop.height;
  for (size_t i = 0; i < area; ++i) {
    for (size_t c = 0; c < 3; ++c) {
      float mean = settings.mean[c] * 255, std = settings.std[c] * 255;
      size_t index = settings.channels_first ? c * area + i : 3 * i + c;
      values[index] = (static_cast<float>(picture.pixels[3 * i + c]) - mean) / std;
    }
  }
}
