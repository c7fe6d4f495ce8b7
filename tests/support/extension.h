// In the place of torch/extension.h: of a thousand headers those that DeepSpeed's CPU Adam needs.
#pragma once
#include <ATen/core/Tensor.h>
#include <torch/csrc/utils/pybind.h>

namespace torch {
using namespace at;
constexpr auto kFloat32 = at::kFloat;
} // namespace torch
