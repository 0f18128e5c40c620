// The table rows of some tokens, widened and in the order in which the loops over pairs read them.
#pragma once

#include <algorithm>
#include <array>
#include <type_traits>
#include <vector>

#include "fused_rope/kernels/cpu/rotate_pairs.h"
#include "fused_rope/kernels/rows.h"

namespace fused_rope::kernels {

// The axes of positions that pairs read, in ascending order.
inline std::vector<int64_t> used_axes(const RotateParams& p) {
  if (p.axes == nullptr) return {0};
  bool used[kMaxAxes] = {};
  for (int64_t j = 0; j < p.pairing.P; ++j) used[p.axes[j]] = true;
  std::vector<int64_t> axes;
  for (int axis = 0; axis < kMaxAxes; ++axis) {
    if (used[axis]) axes.push_back(axis);
  }
  return axes;
}

// Which pairs of a token are copied.
enum class Copied { kNone, kSome, kAll };

// Holds the row of one token per slot. With M-RoPE a row is combined from the rows of all axes
// once, so that heads are rotated as without.
template <typename T, Precision kPrecision>
class TableRows {
 public:
  // for_words: bfloat16 rows in the order of WordPairs.
  TableRows(const RotateParams& params, int64_t slots, bool for_words)
      : p_(params),
        for_words_(std::is_same_v<T, BFloat16> && for_words),
        axes_(used_axes(params)),
        size_(order() == Order::kByElement ? 2 * params.pairing.P : params.pairing.P),
        copied_(slots),
        cos_(slots * size_),
        sin_(cos_.size()),
        mask_(params.axes == nullptr ? 0 : slots * 2 * params.pairing.P) {}

  int64_t size() const { return size_; }
  // [slots, size()], sin negated for the inverse.
  const Wide<T>* cos() const { return cos_.data(); }
  const Wide<T>* sin() const { return sin_.data(); }
  // [slots]
  const Copied* copied() const { return copied_.data(); }

  // Fills a slot with the row of token (b, s), and of head h where heads have rows of their own.
  void load(int64_t b, int64_t s, int64_t h, int64_t slot, Isa isa) {
    std::array<int64_t, kMaxAxes> rows;
    std::array<bool, kMaxAxes> copied;
    int64_t copies = 0, readable = 0;
    for (const int64_t axis : axes_) {
      const Row row = table_row(p_.rows, b, s, axis);
      rows[axis] = row.index;
      copied[axis] = row.copied;
      copies += row.copied;
      if (!row.copied) readable = row.index;
    }
    const bool all = copies == static_cast<int64_t>(axes_.size());
    copied_[slot] = all ? Copied::kAll : copies > 0 ? Copied::kSome : Copied::kNone;
    if (all) return;
    if (copies > 0) {
      for (const int64_t axis : axes_) {
        if (copied[axis]) rows[axis] = readable;
      }
      set_mask(copied, slot);
    }
    const auto offsets = [&](const TableParams& table) {
      std::array<int64_t, kMaxAxes> result;
      for (const int64_t axis : axes_) {
        result[axis] = table_offset(table, rows[axis], b, s, h);
      }
      return result;
    };
    load_entries(p_.cos, offsets(p_.cos), cos_.data() + slot * size_, isa);
    load_entries(p_.sin, offsets(p_.sin), sin_.data() + slot * size_, isa);
  }

  // Puts back the R elements of copied pairs.
  [[gnu::noinline]] void restore(const T* original, T* out, int64_t slot) const {
    const int64_t R = 2 * p_.pairing.P;
    const Bits* const mask = mask_.data() + slot * R;
    FUSED_ROPE_INDEPENDENT_ITERATIONS
    for (int64_t d = 0; d < R; ++d) {
      Bits bits, before;
      std::memcpy(&bits, out + d, sizeof(T));
      std::memcpy(&before, original + d, sizeof(T));
      bits ^= (bits ^ before) & mask[d];
      std::memcpy(out + d, &bits, sizeof(T));
    }
  }

  // The same for elements of the compute type.
  [[gnu::noinline]] void restore_wide(const Wide<T>* original, Wide<T>* out, int64_t slot) const {
    const int64_t R = 2 * p_.pairing.P;
    const Bits* const mask = mask_.data() + slot * R;
    for (int64_t d = 0; d < R; ++d) out[d] = mask[d] != 0 ? original[d] : out[d];
  }

 private:
  enum class Order {
    kByPair,
    kByElement,   // of rotate_interleaved
    kEvenThenOdd  // of WordPairs, in each block
  };

  // An integer of the size of an element.
  using Bits = std::conditional_t<sizeof(T) == 2, uint16_t,
                                  std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;

  bool interleaved() const { return p_.pairing.distance == 1; }

  Order order() const {
    if (for_words_) return interleaved() ? Order::kByPair : Order::kEvenThenOdd;
    return interleaved() ? Order::kByElement : Order::kByPair;
  }

  void set_mask(const std::array<bool, kMaxAxes>& copied, int64_t slot) {
    Bits* const mask = mask_.data() + slot * 2 * p_.pairing.P;
    for (int64_t j = 0; j < p_.pairing.P; ++j) {
      const int64_t first = p_.pairing.first(j) - p_.pairing.offset;
      const Bits bits = copied[p_.axes[j]] ? static_cast<Bits>(-1) : Bits{0};
      mask[first] = mask[first + p_.pairing.distance] = bits;
    }
  }

  // The tables have the type of x or its compute type.
  void load_entries(const TableParams& table, const std::array<int64_t, kMaxAxes>& offsets,
                    Wide<T>* to, Isa isa) const {
    const bool is_sin = &table == &p_.sin;
    const auto load = [&]<typename Table>() {
      const auto* data = static_cast<const Table*>(table.data);
      if (p_.axes == nullptr && table.j == 1) {
        run_on(isa, [=, this, row = data + offsets[0]](auto) {
          this->arrange([=](int64_t j) { return row[j]; }, is_sin, to);
        });
      } else {
        arrange(
            [&](int64_t j) {
              return data[offsets[p_.axes == nullptr ? 0 : p_.axes[j]] + j * table.j];
            },
            is_sin, to);
      }
    };
    p_.table_dtype == p_.dtype ? load.template operator()<T>()
                               : load.template operator()<Wide<T>>();
  }

  // Writes entries 0 to P - 1 of a row in their order.
  template <typename F>
  void arrange(const F& entry, bool is_sin, Wide<T>* to) const {
    const int64_t P = p_.pairing.P;
    const bool negated = is_sin && p_.inverse;
    const auto value = [=](int64_t j) {
      Wide<T> wide = rounded<T, kPrecision>(widen(entry(j)));
      if constexpr (std::is_same_v<T, BFloat16>) {
        wide = wide != wide ? widen(narrow<BFloat16>(wide)) : wide;  // as store_word expects
      }
      return negated ? -wide : wide;
    };
    switch (order()) {
      case Order::kByPair:
        FUSED_ROPE_INDEPENDENT_ITERATIONS
        for (int64_t j = 0; j < P; ++j) to[j] = value(j);
        break;
      case Order::kByElement:
        FUSED_ROPE_INDEPENDENT_ITERATIONS
        for (int64_t j = 0; j < P; ++j) {
          to[2 * j] = is_sin ? -value(j) : value(j);
          to[2 * j + 1] = value(j);
        }
        break;
      case Order::kEvenThenOdd:
        const int64_t n = p_.pairing.distance;
        const int64_t even = (n + 1) / 2;
        for (int64_t first = 0; first < P; first += n) {
          FUSED_ROPE_INDEPENDENT_ITERATIONS
          for (int64_t i = 0; i < n / 2; ++i) {
            to[first + i] = value(first + 2 * i);
            to[first + even + i] = value(first + 2 * i + 1);
          }
          if (n % 2 != 0) to[first + even - 1] = value(first + n - 1);
        }
    }
  }

  const RotateParams& p_;
  const bool for_words_;
  const std::vector<int64_t> axes_;
  const int64_t size_;  // entries of a row
  std::vector<Copied> copied_;
  std::vector<Wide<T>> cos_, sin_;
  std::vector<Bits> mask_;  // [slots, R], all ones for elements of copied pairs
};

}  // namespace fused_rope::kernels
