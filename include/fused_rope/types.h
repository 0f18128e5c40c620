// Public enumerations, free of torch.
#pragma once

namespace fused_rope {

// The order of a tensor's dimensions. kTHD holds packed sequences, [T, H, D]; the others are 4-D.
enum class Layout { kBSHD, kBHSD, kSBHD, kTHD };

// How a rotation rounds; T is x's dtype.
// kFp32: every product and sum to float32 (float64 for float64 x), the result to T once.
// kModel: the table, every product and the sum to T, as eager PyTorch does in T.
enum class Precision { kFp32, kModel };

}  // namespace fused_rope
