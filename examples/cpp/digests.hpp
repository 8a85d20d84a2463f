// Digests by which an artifact finds damaged files.
#pragma once

#include <cstddef>
#include <string>

// The SHA-256 of the SHA-256 of each part of 16 MiB; of one part, its plain SHA-256. Hexadecimal.
std::string Digest(const void* data, size_t size);

// A JSON object without its key "digest", as Python writes it with sorted keys and no spaces.
// The text must come from Python's json.dumps: numbers and strings are copied as they are.
std::string CanonicalJson(const std::string& text);
