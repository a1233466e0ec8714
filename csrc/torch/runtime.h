// What the running torch lends the kernels: its threads and, where it has one, its matrix tile.
#pragma once

#include <string>
#include <vector>

#include "../preact.h"

namespace preact {

// The tile providers that run here, the faster first: "portable" always, "brgemm" where this torch
// and processor have it.
std::vector<std::string> tile_providers();

// Whether the processor multiplies bfloat16, and a tile of ours or torch's has it do so.
bool multiplies_bfloat16();

// Takes one of tile_providers() for every later call in this process.
void use_tile_provider(const std::string& name);

// By default with the first of tile_providers().
Runtime torch_runtime();

}  // namespace preact
