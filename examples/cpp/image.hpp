// Read an image, resize its shorter side, crop the center, normalize.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

struct ImageSize {
  int height, width;
};

struct Preprocessing {
  int resize;  // pixels of the shorter side
  ImageSize crop;
  float mean[3], std[3];      // RGB, for values between 0 and 1
  std::string interpolation;  // "bicubic" or "bilinear"
  bool channels_first;
};

struct Image {
  int width, height;
  std::vector<uint8_t> pixels;  // RGB, 8 bits
};

// Read a PPM file, or with stb_image also JPEG and PNG.
Image ReadImage(const std::filesystem::path& path);

// Write crop.height * crop.width * 3 values. Computes what dcnv3_tvm's `preprocess` does.
void Preprocess(const Image& image, const Preprocessing& settings, float* values);
