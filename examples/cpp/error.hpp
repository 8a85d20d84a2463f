// Errors that the user can cause; main prints them and exits with 1.
#pragma once

#include <stdexcept>
#include <string>

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};
