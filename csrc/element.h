// Element types of tensors, for code that includes no PyTorch header.
#pragma once

namespace reclip {

enum class ElementType : int { kFloat64, kFloat32, kFloat16, kBFloat16 };

}  // namespace reclip
