#include "autograd/table_gradient.h"

#include <ATen/ATen.h>

#include "ops/checks.h"

namespace fused_rope {
namespace {

// x as [B, S, H, lanes], a view.
at::Tensor as_bshd(const Arguments& a, const at::Tensor& x) {
  switch (parse_layout("rotate", a.layout)) {
    case Layout::kBHSD:
      return x.transpose(1, 2);
    case Layout::kSBHD:
      return x.transpose(0, 1);
    case Layout::kTHD:
      return x.unsqueeze(0);
    default:
      return x;
  }
}

// The distance between the members of a pair; 1 where there is no pair.
c10::SymInt pair_distance(const Arguments& a, const c10::SymInt& P) {
  return a.interleaved || P == 0 ? c10::SymInt(1) : P / a.blocks;
}

// The first or second members of all pairs of rotated lanes, [B, S, H, P], in the type the rotation
// is computed in.
at::Tensor members(const Arguments& a, const at::Tensor& lanes, int64_t which) {
  const c10::SymInt P = lanes.sym_size(-1) / 2;
  const c10::SymInt distance = pair_distance(a, P);
  const at::Tensor x = as_bshd(a, lanes);
  const c10::SymInt B = x.sym_size(0), S = x.sym_size(1), H = x.sym_size(2);
  // Batches of gradients know neither unflatten nor flatten.
  const at::Tensor pairs = x.reshape_symint({B, S, H, P / distance, 2, distance});
  const at::Tensor wide = pairs.scalar_type() == at::kDouble ? pairs : pairs.to(at::kFloat);
  return wide.select(-2, which).reshape_symint({B, S, H, P});
}

// The table row of every token, [B, S, 1] or [B, S, P] with axes, and which are copied through
// instead.
struct TokenRows {
  at::Tensor index;
  at::Tensor copied;
};

TokenRows token_rows(const Arguments& a, const c10::SymInt& B, const c10::SymInt& S,
                     const at::Device& device) {
  const auto options = at::TensorOptions(device).dtype(at::kLong);
  at::Tensor index = at::arange(c10::Scalar(S), options).unsqueeze(0);  // [1, S], then [A, B, S]
  at::Tensor copied = at::zeros({1, 1}, options.dtype(at::kBool));
  at::Tensor sequence;
  if (a.cu_seqlens.has_value()) {
    const at::Tensor starts = a.cu_seqlens->to(at::kLong);
    const at::Tensor token = index.select(0, 0);
    sequence =
        (at::searchsorted(starts, token, /*out_int32=*/false, /*right=*/true) - 1).clamp_min(0);
    sequence = at::minimum(sequence, at::full({}, starts.sym_size(0) - 2, options).clamp_min(0));
    copied = (token >= starts.select(0, -1)).unsqueeze(0);
    index = (token - starts.index_select(0, sequence)).unsqueeze(0);
  }
  if (a.positions.has_value()) {
    index = a.positions->to(at::kLong);
    if (index.dim() == (a.axes.has_value() ? 2 : 1)) index = index.unsqueeze(-2);
    copied = copied.logical_or(index == -1);
  }
  if (!a.axes.has_value()) {
    index = index.unsqueeze(0);
    copied = copied.unsqueeze(0);
  }
  index = index + a.offset;
  if (a.offsets.has_value() && a.offsets->sym_size(0) != 0) {
    index = index +
            (sequence.defined() ? a.offsets->index_select(0, sequence) : a.offsets->unsqueeze(1));
  }
  if (a.axes.has_value()) {
    const at::Tensor axis = at::tensor(*a.axes, at::kLong).to(device, /*non_blocking=*/true);
    index = index.index_select(0, axis);
    if (copied.dim() == 3) copied = copied.index_select(0, axis);
  }
  index = index.expand_symint({index.sym_size(0), B, S}).permute({1, 2, 0});
  copied = (copied.dim() == 3 ? copied : copied.unsqueeze(0)).permute({1, 2, 0});
  return {index.masked_fill(copied, 0), copied};
}

// Sums [B, S, P] over the tokens that read each row of a shared table, in a fixed order: on the CPU
// embedding's backward keeps one, on CUDA an accumulating index_put, and neither the other way
// round.
at::Tensor sum_rows(const at::Tensor& terms, const at::Tensor& index, const c10::SymInt& M) {
  const c10::SymInt P = terms.sym_size(-1);
  const bool by_row = index.sym_size(-1) == 1;
  at::Tensor rows = index.flatten();
  at::Tensor sums = terms.reshape_symint({terms.sym_size(0) * terms.sym_size(1), P});
  if (!by_row) {  // every pair reads a row of its own: the table as one column of entries
    rows = (index * P + at::arange(c10::Scalar(P), index.options())).flatten();
    sums = terms.reshape({-1, 1});
  }
  const c10::SymInt entries = by_row ? M : M * P;
  if (terms.is_cuda()) {
    const at::Tensor zeros = at::zeros_symint({entries, sums.sym_size(1)}, terms.options());
    sums = at::index_put(zeros, {rows}, sums, /*accumulate=*/true);
  } else {
    sums = at::embedding_dense_backward_symint(sums, rows, entries, -1, false);
  }
  return sums.view_symint({M, P});
}

}  // namespace

at::Tensor rotated_lanes(const Arguments& a, const at::Tensor& x, const at::Tensor& cos) {
  return x.narrow_symint(-1, a.rotary_offset, 2 * cos.sym_size(-1));
}

TensorPair table_gradient(const Arguments& a, const at::Tensor& x_lanes, const at::Tensor& grad,
                          const at::Tensor& cos) {
  const at::Tensor grad_lanes = rotated_lanes(a, grad, cos);
  const at::Tensor xa = members(a, x_lanes, 0), xb = members(a, x_lanes, 1);
  const at::Tensor ga = members(a, grad_lanes, 0), gb = members(a, grad_lanes, 1);
  TensorPair terms = {ga * xa + gb * xb, a.inverse ? ga * xb - gb * xa : gb * xa - ga * xb};
  const bool shared = cos.dim() == 2;
  TokenRows rows;
  if (shared) rows = token_rows(a, xa.sym_size(0), xa.sym_size(1), xa.device());
  const auto reduce = [&](at::Tensor term) {
    if (!shared) {
      if (cos.dim() == 3) term = term.sum(2);
      return term.sum_to_size_symint(cos.sym_sizes()).to(cos.scalar_type());
    }
    term = term.sum(2).masked_fill(rows.copied, 0);
    return sum_rows(term, rows.index, cos.sym_size(0)).to(cos.scalar_type());
  };
  return {reduce(std::get<0>(terms)), reduce(std::get<1>(terms))};
}

at::Tensor table_tangent(const Arguments& a, const at::Tensor& x, const at::Tensor& cos_tangent,
                         const at::Tensor& sin_tangent) {
  const at::Tensor rotated = call_rotate(a, x, cos_tangent, sin_tangent);
  const at::Tensor lanes = as_bshd(a, rotated_lanes(a, rotated, cos_tangent));
  at::Tensor tangent = at::zeros_like(rotated);
  at::Tensor target = as_bshd(a, rotated_lanes(a, tangent, cos_tangent));
  if (cos_tangent.dim() != 2) {
    target.copy_(lanes);
    return tangent;
  }
  // A pair's lanes are copied through together, so its mask is laid out as its members are.
  const at::Tensor copied = token_rows(a, lanes.sym_size(0), lanes.sym_size(1), x.device()).copied;
  const c10::SymInt P = cos_tangent.sym_size(-1);
  at::Tensor mask = copied.unsqueeze(2);
  if (copied.sym_size(-1) != 1) {
    const c10::SymInt distance = pair_distance(a, P);
    mask = mask.unflatten_symint(-1, {P / distance, 1, distance});
    mask = mask.expand_symint({mask.sym_size(0), mask.sym_size(1), 1, P / distance, 2, distance})
               .flatten(-3);
  }
  target.copy_(lanes.masked_fill(mask, 0));
  return tangent;
}

}  // namespace fused_rope
