// Typed access to JSON that tvm-ffi has parsed.
#pragma once

#include <tvm/ffi/extra/json.h>

#include <optional>
#include <string>
#include <vector>

#include "error.hpp"

using JsonObject = tvm::ffi::json::Object;
using JsonArray = tvm::ffi::json::Array;

inline JsonObject ParseJson(const std::string& text, const std::string& file) {
  tvm::ffi::String problem;
  tvm::ffi::Any value = tvm::ffi::json::Parse(text, &problem);
  std::optional<JsonObject> object = value.try_cast<JsonObject>();
  if (!problem.empty() || !object) throw Error(file + " is damaged: it is not valid JSON");
  return *object;
}

template <typename T>
T Cast(const tvm::ffi::Any& value, const std::string& name) {
  std::optional<T> result = value.try_cast<T>();
  if (!result) throw Error(name + " has another type than it should");
  return *result;
}

template <typename T>
T Get(const JsonObject& object, const std::string& name) {
  std::optional<tvm::ffi::Any> value = object.Get(tvm::ffi::String(name));
  if (!value) throw Error("'" + name + "' is missing");
  return Cast<T>(*value, "'" + name + "'");
}

template <typename T>
std::vector<T> GetList(const JsonObject& object, const std::string& name) {
  std::vector<T> result;
  for (const auto& item : Get<JsonArray>(object, name)) {
    result.push_back(Cast<T>(item, "'" + name + "'"));
  }
  return result;
}
