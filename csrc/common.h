// Shared by CPU and CUDA code; needs no PyTorch header.
#pragma once

namespace reclip {

enum class ElementType : int { kFloat64, kFloat32, kFloat16, kBFloat16 };

// In place of a row number: a patch with non-finite scores.
constexpr int kBadPatch = -2;

// Smaller areas cannot be divisors in float32: the quotient may overflow, and the smallest have lost precision. Masks given as
// values count as empty below this; soft masks computed from logits are normalised in log space instead.
constexpr double kSmallArea = 1e-30;

}  // namespace reclip
