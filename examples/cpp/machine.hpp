// This machine: architecture, CPU features, cores.
#pragma once

#include <string>
#include <vector>

// LLVM's name of the processor architecture that this program is compiled for.
std::string Architecture();

// The required features, in LLVM's names, that this processor does not have.
std::vector<std::string> MissingFeatures(const std::vector<std::string>& required);

// Ask Linux for the permission to use AMX's tile registers: without it, their first use ends the
// process. Return whether it is granted.
bool EnableAmx();

// Number of physical cores that this process may use.
int PhysicalCores();

// Indices of the logical processors that this process may use.
std::vector<std::string> UsableProcessors();
