// What CPU and CUDA code share and what needs no PyTorch header.
#pragma once

namespace reclip {

enum class ElementType : int { kFloat64, kFloat32, kFloat16, kBFloat16 };

// In place of a row number: a patch whose scores are not finite.
constexpr int kBadPatch = -2;

// Areas below this cannot be divided by in float32: a quotient by them may overflow, and the smallest of them have lost their
// digits. Masks given as values count as empty below it; soft masks made from logits are normalised by logarithms instead.
constexpr double kSmallArea = 1e-30;

}  // namespace reclip
