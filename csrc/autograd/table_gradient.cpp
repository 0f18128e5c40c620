#include "autograd/table_gradient.h"

#include <ATen/ATen.h>

#include "ops/checks.h"
#include "ops/token_rows.h"

namespace fused_rope {
namespace {

Layout layout_of(const Arguments& a) { return parse<Layout>("rotate", a.layout); }

TableLayout table_layout_of(const Arguments& a) {
  return parse<TableLayout>("rotate", a.table_layout);
}

// The distance between the elements of a pair, not 0 if there are no pairs.
c10::SymInt divisor(const Arguments& a, const c10::SymInt& P) {
  return P == 0 ? c10::SymInt(1) : pair_distance(a, P);
}

// The first or second elements of all pairs of rotated elements, [B, S, H, P], in the dtype that
// the rotation is computed in.
at::Tensor members(const Arguments& a, const at::Tensor& elements, int64_t which) {
  const c10::SymInt P = elements.sym_size(-1) / 2;
  const c10::SymInt distance = divisor(a, P);
  const at::Tensor x = as_bshd(elements, layout_of(a));
  const c10::SymInt B = x.sym_size(0), S = x.sym_size(1), H = x.sym_size(2);
  // Batched gradients support neither unflatten nor flatten.
  const at::Tensor pairs = x.reshape_symint({B, S, H, P / distance, 2, distance});
  const at::Tensor wide = pairs.scalar_type() == at::kDouble ? pairs : pairs.to(at::kFloat);
  return wide.select(-2, which).reshape_symint({B, S, H, P});
}

// P of a table.
c10::SymInt pairs_of(const Arguments& a, const at::Tensor& table) {
  return fused_rope::pairs_of(table_layout_of(a), table.sym_size(-1));
}

// The gradient of a whole table [..., P or 2P] from that of the numbers that are read, [..., P].
at::Tensor with_unread_columns(const Arguments& a, const at::Tensor& grad) {
  switch (table_layout_of(a)) {
    case TableLayout::kTiled:
      return at::cat({grad, at::zeros_like(grad)}, -1);
    case TableLayout::kRepeated: {
      c10::SymDimVector sizes(grad.sym_sizes());
      sizes.back() = sizes.back() * 2;
      return at::stack({grad, at::zeros_like(grad)}, -1).reshape_symint(sizes);
    }
    default:
      return grad;
  }
}

// The table row that each pair of each token reads, [B, S, P or 1], and which pairs are copied
// through instead.
struct PairRows {
  PairRows(const Arguments& a, const at::Tensor& x) {
    const c10::SymInt B = x.sym_size(0), S = x.sym_size(1);
    const at::Tensor rows = token_rows_by_pair(a, S, x.device());
    index = rows.expand_symint({B, S, rows.sym_size(-1)});
    copied = index == -1;
    index = index.masked_fill(copied, 0);
  }

  at::Tensor index, copied;
};

// Sums [B, S, P] over the tokens that read each row of a shared table, in a fixed order. On the CPU
// only embedding's backward has one, on CUDA only an accumulating index_put. The former is not
// differentiable without tokens.
at::Tensor sum_rows(const at::Tensor& terms, const at::Tensor& index, const c10::SymInt& M) {
  const c10::SymInt P = terms.sym_size(-1);
  const bool by_row = index.sym_size(-1) == 1;
  at::Tensor rows = index.flatten();
  at::Tensor sums = terms.reshape_symint({terms.sym_size(0) * terms.sym_size(1), P});
  if (!by_row) {  // pairs read different rows: flatten the table to one column of entries
    rows = (index * P + at::arange(c10::Scalar(P), index.options())).flatten();
    sums = terms.reshape({-1, 1});
  }
  const c10::SymInt entries = by_row ? M : M * P;
  if (terms.is_cuda() || TORCH_GUARD_OR_FALSE(rows.sym_numel().sym_eq(0))) {
    const at::Tensor zeros = at::zeros_symint({entries, sums.sym_size(1)}, terms.options());
    sums = at::index_put(zeros, {rows}, sums, /*accumulate=*/true);
  } else {
    sums = at::embedding_dense_backward_symint(sums, rows, entries, -1, false);
  }
  return sums.view_symint({M, P});
}

}  // namespace

at::Tensor rotated_elements(const Arguments& a, const at::Tensor& x, const at::Tensor& cos) {
  return x.narrow_symint(-1, a.rotary_offset, 2 * pairs_of(a, cos));
}

TensorPair table_gradient(const Arguments& a, const at::Tensor& elements, const at::Tensor& grad,
                          const at::Tensor& cos) {
  const at::Tensor grad_elements = rotated_elements(a, grad, cos);
  const at::Tensor xa = members(a, elements, 0), xb = members(a, elements, 1);
  const at::Tensor ga = members(a, grad_elements, 0), gb = members(a, grad_elements, 1);
  const at::Tensor cos_term = ga * xa + gb * xb;
  const at::Tensor sin_term = a.inverse ? ga * xb - gb * xa : gb * xa - ga * xb;
  if (is_shared(cos)) {
    const PairRows rows(a, xa);
    const auto reduce = [&](const at::Tensor& term) {
      const at::Tensor rotated = term.sum(2).masked_fill(rows.copied, 0);
      return with_unread_columns(
          a, sum_rows(rotated, rows.index, cos.sym_size(0)).to(cos.scalar_type()));
    };
    return {reduce(cos_term), reduce(sin_term)};
  }
  const auto reduce = [&](const at::Tensor& term) {
    const at::Tensor by_table = is_per_head(cos) ? term : term.sum(2);
    c10::SymDimVector sizes(cos.sym_sizes());
    sizes.back() = pairs_of(a, cos);
    return with_unread_columns(a, by_table.sum_to_size_symint(sizes).to(cos.scalar_type()));
  };
  return {reduce(cos_term), reduce(sin_term)};
}

at::Tensor table_tangent(const Arguments& a, const at::Tensor& x, const at::Tensor& cos_tangent,
                         const at::Tensor& sin_tangent) {
  const at::Tensor rotated =
      std::get<0>(call_rotate({"rotate", {&x, nullptr}, cos_tangent, sin_tangent, a}));
  const at::Tensor elements = as_bshd(rotated_elements(a, rotated, cos_tangent), layout_of(a));
  at::Tensor tangent = at::zeros_like(rotated);
  at::Tensor target = as_bshd(rotated_elements(a, tangent, cos_tangent), layout_of(a));
  if (!is_shared(cos_tangent)) {
    target.copy_(elements);
    return tangent;
  }
  at::Tensor mask = PairRows(a, elements).copied.unsqueeze(2);  // [B, S, 1, P or 1]
  if (mask.sym_size(-1) != 1) {  // both elements of a pair, in the order of the elements
    const c10::SymInt P = pairs_of(a, cos_tangent), distance = divisor(a, P);
    mask = mask.unflatten_symint(-1, {P / distance, 1, distance});
    mask = mask.expand_symint({mask.sym_size(0), mask.sym_size(1), 1, P / distance, 2, distance})
               .flatten(-3);
  }
  target.copy_(elements.masked_fill(mask, 0));
  return tangent;
}

}  // namespace fused_rope
