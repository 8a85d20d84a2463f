#include "digests.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <thread>
#include <utility>
#include <vector>

#include "error.hpp"

#if defined(__x86_64__) && !defined(PORTABLE_SHA256)
#define HAVE_SHA_INSTRUCTIONS
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace {

constexpr size_t kPart = size_t{1} << 24;

using Hash = std::array<uint8_t, 32>;
using State = std::array<uint32_t, 8>;

constexpr uint32_t kRound[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

uint32_t Rotate(uint32_t x, int bits) { return x >> bits | x << (32 - bits); }

void CompressBlock(State& state, const uint8_t* block) {
  uint32_t w[64];
  for (int i = 0; i < 16; ++i) {
    w[i] = uint32_t{block[4 * i]} << 24 | uint32_t{block[4 * i + 1]} << 16 |
           uint32_t{block[4 * i + 2]} << 8 | block[4 * i + 3];
  }
  for (int i = 16; i < 64; ++i) {
    uint32_t s0 = Rotate(w[i - 15], 7) ^ Rotate(w[i - 15], 18) ^ w[i - 15] >> 3;
    uint32_t s1 = Rotate(w[i - 2], 17) ^ Rotate(w[i - 2], 19) ^ w[i - 2] >> 10;
    w[i] = w[i - 16] + s0 + w[i - 7] + s1;
  }
  auto [a, b, c, d, e, f, g, h] = state;
  for (int i = 0; i < 64; ++i) {
    uint32_t s1 = Rotate(e, 6) ^ Rotate(e, 11) ^ Rotate(e, 25);
    uint32_t t1 = h + s1 + ((e & f) ^ (~e & g)) + kRound[i] + w[i];
    uint32_t s0 = Rotate(a, 2) ^ Rotate(a, 13) ^ Rotate(a, 22);
    uint32_t t2 = s0 + ((a & b) ^ (a & c) ^ (b & c));
    h = g, g = f, f = e, e = d + t1, d = c, c = b, b = a, a = t1 + t2;
  }
  const uint32_t change[8] = {a, b, c, d, e, f, g, h};
  for (int i = 0; i < 8; ++i) state[i] += change[i];
}

#ifdef HAVE_SHA_INSTRUCTIONS
bool HasShaInstructions() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b >> 29 & 1) == 1;
}

// Five times as fast.
__attribute__((target("sha,sse4.1"))) void CompressWithInstructions(State& state,
                                                                    const uint8_t* data,
                                                                    size_t blocks) {
  const __m128i big_endian = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
  // The instructions take the state as (a, b, e, f) and (c, d, g, h), the first one highest.
  auto [a, b, c, d, e, f, g, h] = state;
  __m128i abef = _mm_set_epi32(a, b, e, f), cdgh = _mm_set_epi32(c, d, g, h);
  for (; blocks > 0; --blocks, data += 64) {
    __m128i before[2] = {abef, cdgh}, w[4];
    for (int i = 0; i < 4; ++i) {
      auto* words = reinterpret_cast<const __m128i*>(data) + i;
      w[i] = _mm_shuffle_epi8(_mm_loadu_si128(words), big_endian);
    }
    for (int i = 0; i < 16; ++i) {
      __m128i& word = w[i % 4];
      if (i >= 4) {
        const __m128i &next = w[(i + 1) % 4], &last = w[(i + 3) % 4];
        __m128i sum = _mm_add_epi32(_mm_sha256msg1_epu32(word, next),
                                    _mm_alignr_epi8(last, w[(i + 2) % 4], 4));
        word = _mm_sha256msg2_epu32(sum, last);
      }
      auto* constants = reinterpret_cast<const __m128i*>(kRound) + i;
      __m128i sum = _mm_add_epi32(word, _mm_loadu_si128(constants));
      cdgh = _mm_sha256rnds2_epu32(cdgh, abef, sum);
      abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(sum, 0x0e));
    }
    abef = _mm_add_epi32(abef, before[0]);
    cdgh = _mm_add_epi32(cdgh, before[1]);
  }
  state = {uint32_t(_mm_extract_epi32(abef, 3)), uint32_t(_mm_extract_epi32(abef, 2)),
           uint32_t(_mm_extract_epi32(cdgh, 3)), uint32_t(_mm_extract_epi32(cdgh, 2)),
           uint32_t(_mm_extract_epi32(abef, 1)), uint32_t(_mm_extract_epi32(abef, 0)),
           uint32_t(_mm_extract_epi32(cdgh, 1)), uint32_t(_mm_extract_epi32(cdgh, 0))};
}
#endif

void Compress(State& state, const uint8_t* data, size_t blocks) {
#ifdef HAVE_SHA_INSTRUCTIONS
  static const bool has_instructions = HasShaInstructions();
  if (has_instructions) return CompressWithInstructions(state, data, blocks);
#endif
  for (; blocks > 0; --blocks, data += 64) CompressBlock(state, data);
}

Hash Sha256(const uint8_t* data, size_t size) {
  State state = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  size_t whole = size / 64 * 64, rest = size - whole;
  Compress(state, data, size / 64);
  uint8_t tail[128] = {};
  if (rest > 0) std::memcpy(tail, data + whole, rest);
  tail[rest] = 0x80;
  size_t padded = rest < 56 ? 64 : 128;
  uint64_t bits = uint64_t{size} * 8;
  for (int i = 0; i < 8; ++i) tail[padded - 1 - i] = static_cast<uint8_t>(bits >> (8 * i));
  Compress(state, tail, padded / 64);
  Hash hash;
  for (int i = 0; i < 32; ++i) hash[i] = static_cast<uint8_t>(state[i / 4] >> (24 - 8 * (i % 4)));
  return hash;
}

// Rewrites JSON token by token.
class Canonical {
 public:
  explicit Canonical(const std::string& text) : text_(text) {}

  std::string Document() {
    std::string result = Value(/*is_document=*/true);
    if (Peek() != '\0') throw Damaged();
    return result;
  }

 private:
  static constexpr int kMaxDepth = 100;

  static Error Damaged() { return Error("metadata.json is damaged: it is not valid JSON"); }

  char Peek() {
    position_ = std::min(text_.find_first_not_of(" \t\r\n", position_), text_.size());
    return position_ < text_.size() ? text_[position_] : '\0';
  }

  bool Skip(char expected) {
    if (Peek() != expected) return false;
    ++position_;
    return true;
  }

  std::string String() {
    if (Peek() != '"') throw Damaged();
    size_t end = position_ + 1;
    while (end < text_.size() && text_[end] != '"') end += text_[end] == '\\' ? 2 : 1;
    if (end >= text_.size()) throw Damaged();
    std::string token = text_.substr(position_, end + 1 - position_);
    position_ = end + 1;
    return token;
  }

  std::string Value(bool is_document = false) {
    if (++depth_ > kMaxDepth) throw Damaged();
    std::string result;
    char first = Peek();
    if (first == '{') {
      result = Object(is_document);
    } else if (first == '[') {
      result = List();
    } else if (first == '"') {
      result = String();
    } else {
      size_t end = std::min(text_.find_first_of(",]} \t\r\n", position_), text_.size());
      if (end == position_) throw Damaged();
      result = text_.substr(position_, end - position_);
      position_ = end;
    }
    --depth_;
    return result;
  }

  std::string Object(bool is_document) {
    std::vector<std::pair<std::string, std::string>> items;
    Skip('{');
    if (!Skip('}')) {
      do {
        std::string key = String();
        if (!Skip(':')) throw Damaged();
        std::string value = Value();
        // Without quotes, for Python's order.
        key = key.substr(1, key.size() - 2);
        if (!is_document || key != "digest") items.emplace_back(key, value);
      } while (Skip(','));
      if (!Skip('}')) throw Damaged();
    }
    std::sort(items.begin(), items.end());
    std::string result = "{";
    for (const auto& [key, value] : items) {
      result += (result.size() > 1 ? ",\"" : "\"") + key + "\":" + value;
    }
    return result + "}";
  }

  std::string List() {
    std::string result = "[";
    Skip('[');
    if (!Skip(']')) {
      do {
        result += (result.size() > 1 ? "," : "") + Value();
      } while (Skip(','));
      if (!Skip(']')) throw Damaged();
    }
    return result + "]";
  }

  const std::string& text_;
  size_t position_ = 0;
  int depth_ = 0;
};

}  // namespace

std::string Digest(const void* data, size_t size) {
  const auto* bytes = static_cast<const uint8_t*>(data);
  size_t count = std::max<size_t>((size + kPart - 1) / kPart, 1);
  std::vector<Hash> parts(count);
  std::atomic<size_t> next{0};
  auto work = [&] {
    for (size_t i = next++; i < count; i = next++) {
      parts[i] = Sha256(bytes + i * kPart, std::min(kPart, size - i * kPart));
    }
  };
  std::vector<std::thread> threads;
  for (size_t i = 1; i < std::min<size_t>(count, std::thread::hardware_concurrency()); ++i) {
    threads.emplace_back(work);
  }
  work();
  for (auto& thread : threads) thread.join();
  Hash hash = count == 1 ? parts[0] : Sha256(parts[0].data(), count * sizeof(Hash));
  std::string text;
  for (uint8_t byte : hash) {
    text += "0123456789abcdef"[byte >> 4];
    text += "0123456789abcdef"[byte & 15];
  }
  return text;
}

std::string CanonicalJson(const std::string& text) { return Canonical(text).Document(); }
