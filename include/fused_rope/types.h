// Public enumerations, free of torch.
#pragma once

namespace fused_rope {

// The order of a tensor's dimensions. kTHD holds packed sequences, [T, H, D]; the others are 4-D.
enum class Layout { kBSHD, kBHSD, kSBHD, kTHD };

// What the columns of a table with P pairs are; each number is read once.
// kHalf: P columns, one for each pair.
// kTiled: 2P columns, the second half, which is not read, a copy of the first.
// kRepeated: 2P columns, each number twice in succession, of which the first is read.
enum class TableLayout { kHalf, kTiled, kRepeated };

// How a rotation rounds; T is x's dtype.
// kFp32: every product and sum to float32 (float64 for float64 x), the result to T once.
// kModel: the table, every product and the sum to T, as eager PyTorch does in T.
enum class Precision { kFp32, kModel };

// Where a norm rounds its result to x's dtype.
// kNever: nowhere before the output.
// kBefore: before the product with the weight, and after it.
// kAfter: after the product with the weight.
enum class Cast { kNever, kBefore, kAfter };

}  // namespace fused_rope
