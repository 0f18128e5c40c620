// The CUDA kernel: one __global__ template. A thread owns the same lanes of one or more heads of
// one token; what a call needs to know about addresses is decided when the template is
// instantiated, what it needs to know about values is data.
#pragma once

#include "fused_rope/kernels/launch.h"
#include "fused_rope/kernels/rows.h"

// A failed check on the device, as PyTorch's own indexing fails: "device-side assert triggered".
// NDEBUG has no say here.
extern "C" __host__ __device__ void __assert_fail(const char* expression, const char* file,
                                                  unsigned line, const char* function) noexcept
    __attribute__((__noreturn__));

// What cannot return needs no registers kept for afterwards.
#define FUSED_ROPE_DEVICE_CHECK(condition)                                                   \
  do {                                                                                       \
    if (!(condition)) {                                                                      \
      __assert_fail(#condition, __FILE__, __LINE__, static_cast<const char*>(__FUNCTION__)); \
      __builtin_unreachable();                                                               \
    }                                                                                        \
  } while (false)

namespace fused_rope {

// The axis of each pair's position, passed by value so that a captured launch owns it.
struct PairAxes {
  alignas(8) uint8_t axis[kMaxAxisPairs];

  // The axes of kPairs pairs, each in a byte.
  template <int kPairs>
  __device__ __forceinline__ uint64_t load(uint32_t pair) const {
    if constexpr (kPairs == 8) return *reinterpret_cast<const uint64_t*>(axis + pair);
    if constexpr (kPairs == 4) return *reinterpret_cast<const uint32_t*>(axis + pair);
    if constexpr (kPairs == 2) return *reinterpret_cast<const uint16_t*>(axis + pair);
    return axis[pair];
  }
};
struct NoAxes {};

template <Rows kRows>
using AxesOf = std::conditional_t<kRows == Rows::kAxes, PairAxes, NoAxes>;

// Where a thread works, counted from the first token and head of its box: from the fastest axis to
// the slowest.
struct Place {
  uint32_t digits[3];
};

// An address that is linear in a place; all of it but the base fits in 32 bits.
struct Address {
  const char* base;
  uint32_t strides[3];  // bytes, from the fastest axis to the slowest

  Address() = default;
  Address(const void* data, const Strides& elements, int size, const Box& box,
          const std::array<Axis, 3>& order)
      : base(static_cast<const char*>(data)) {
    for (int i = 0; i < 3; ++i) {
      base += box.first[i] * stride_of(elements, static_cast<Axis>(i)) * size;
      // What does not fit is the stride of an axis along which the box has one coordinate, 0.
      strides[i] = static_cast<uint32_t>(stride_of(elements, order[i]) * size);
    }
  }

  __device__ __forceinline__ const char* at(const Place& place) const {
    const char* address = base;
#pragma unroll
    for (int i = 0; i < 3; ++i) address += uint64_t{place.digits[i]} * strides[i];
    return address;
  }
};

// A box of one tensor and the part of linear tables that belongs to it. What every thread reads
// comes first, so that it shares few lines of the constant cache.
struct Side {
  uint32_t threads, heads;
  Divider fast, middle;
  Address in, cos, sin, out;  // of a scattered tensor, out is that of row 0
  uint32_t head_step;         // the heads of one thread are head_step apart
  Axis order[2];
  bool scattered;
  int64_t next_in, next_out;     // bytes between the heads of one thread
  int64_t in_d, out_d, out_row;  // strides of lanes and of scattered rows
  int64_t first[3];              // by Axis
  Address positions;

  Side() = default;

  Side(const RotateParams& p, const TensorParams& t, const Plan& plan, const Box& box)
      : heads(static_cast<uint32_t>(box.size[kHead])),
        head_step(static_cast<uint32_t>(ceil_divide(box.size[kHead], plan.heads_per_thread))),
        scattered(t.scattered),
        in_d(t.in_strides.d),
        out_d(t.out_strides.d),
        out_row(t.out_strides.s),
        first{box.first[0], box.first[1], box.first[2]} {
    const std::array<Axis, 3> axes = memory_order(p, t);
    const std::array<int64_t, 3> sizes = {box.size[kBatch], box.size[kSequence], head_step};
    const Strides out_strides =
        scattered ? Strides{0, 0, t.out_strides.h, t.out_strides.d} : t.out_strides;
    in = Address(t.in, t.in_strides, size_of(p.dtype), box, axes);
    out = Address(t.out, out_strides, size_of(p.dtype), box, axes);
    cos = table(p, p.cos, plan, box, axes);
    sin = table(p, p.sin, plan, box, axes);
    positions = Address(p.rows.positions.data, {p.rows.positions_b, p.rows.positions_s, 0, 0},
                        size_of(p.rows.positions), box, axes);
    next_in = head_step * t.in_strides.h * size_of(p.dtype);
    next_out = head_step * t.out_strides.h * size_of(p.dtype);
    threads = static_cast<uint32_t>(sizes[0] * sizes[1] * sizes[2] * plan.units);
    for (int i = 0; i < 2; ++i) order[i] = axes[i];
    fast = Divider(sizes[order[0]]);
    middle = Divider(sizes[order[1]]);
  }

  __device__ __forceinline__ Place locate(uint32_t row) const {
    Place place;
    place.digits[0] = row;
    place.digits[1] = fast.divide(place.digits[0]);
    place.digits[2] = middle.divide(place.digits[1]);
    return place;
  }

  // The coordinate along an axis, within the box.
  __device__ __forceinline__ uint32_t along(const Place& place, Axis axis) const {
    return order[0] == axis   ? place.digits[0]
           : order[1] == axis ? place.digits[1]
                              : place.digits[2];
  }

 private:
  // Where token (b, s) and head h have their entries: all of it, or what is added to the row looked
  // up.
  static Address table(const RotateParams& p, const TableParams& table, const Plan& plan,
                       const Box& box, const std::array<Axis, 3>& order) {
    const int64_t first = plan.rows == Rows::kLinear ? p.rows.offset * table.m : 0;
    return Address(static_cast<const char*>(table.data) + first * size_of(p.table_dtype),
                   linear_strides(table, plan.rows), size_of(p.table_dtype), box, order);
  }
};

// All that one launch is told: q's box in its first blocks, k's in the rest.
struct Work {
  unsigned second_block;  // the first block of the second side
  Divider units, distance;
  uint32_t rotating_units;                 // threads of a head that rotate
  uint32_t rotated_vectors;                // kAdjacent: vectors that hold rotated lanes
  uint32_t copying_units, copied_vectors;  // threads of a head that copy, and what they copy
  bool inverse, in_place, vector_tables;
  Lanes lanes;
  Side sides[kMaxTensors];
  TableParams cos, sin;
  RowParams rows;

  Work(const RotateParams& p, const Plan& plan)
      : second_block(0),
        units(plan.units),
        distance(std::max<int64_t>(p.lanes.distance, 1)),
        rotating_units(static_cast<uint32_t>(plan.rotating_units)),
        rotated_vectors(static_cast<uint32_t>(2 * p.lanes.P / plan.vector)),
        copying_units(static_cast<uint32_t>(plan.units - plan.rotating_units)),
        copied_vectors(static_cast<uint32_t>((p.D - 2 * p.lanes.P) / plan.vector)),
        inverse(p.inverse),
        in_place(p.in_place),
        vector_tables(plan.vector_tables),
        lanes(p.lanes),
        cos(p.cos),
        sin(p.sin),
        rows(p.rows) {}
};

// The token at a place, as table_row asks for it: coordinates are put together only when needed.
struct PlacedToken {
  const Work& work;
  const Side& side;
  const Place& place;
  uint32_t axis = 0;

  __device__ __forceinline__ PlacedToken on(uint32_t other) const {
    return {work, side, place, other};
  }
  __device__ __forceinline__ int64_t b() const {
    return side.first[kBatch] + side.along(place, kBatch);
  }
  __device__ __forceinline__ int64_t s() const {
    return side.first[kSequence] + side.along(place, kSequence);
  }
  __device__ __forceinline__ int64_t position() const {
    const IndexParams here = {side.positions.at(place), work.rows.positions.is_int64};
    return load_index(here, axis * work.rows.positions_a);
  }
};

template <typename T, int kLanes>
struct alignas(sizeof(T) * kLanes) Vector {
  T lane[kLanes];
};

template <int kLanes, typename T>
__device__ __forceinline__ Vector<T, kLanes> load(const T* from) {
  return *reinterpret_cast<const Vector<T, kLanes>*>(from);
}

// Lanes are read once and written once: they make way for tables in the caches.
template <int kLanes, typename T>
__device__ __forceinline__ Vector<T, kLanes> load_once(const T* from) {
  if constexpr (kLanes * sizeof(T) == kVectorBytes) {
    const uint4 raw = __ldcs(reinterpret_cast<const uint4*>(from));
    Vector<T, kLanes> value;
    std::memcpy(&value, &raw, sizeof(value));
    return value;
  } else {
    return load<kLanes>(from);
  }
}

template <typename T, int kLanes>
__device__ __forceinline__ void store_once(T* to, const Vector<T, kLanes>& value) {
  if constexpr (kLanes * sizeof(T) == kVectorBytes) {
    uint4 raw;
    std::memcpy(&raw, &value, sizeof(raw));
    __stcs(reinterpret_cast<uint4*>(to), raw);
  } else {
    *to = value.lane[0];
  }
}

// kPairs entries of a table row from pair on, as the arithmetic of T sees them. `vectors`: they are
// neighbours and aligned.
template <typename T, Precision kPrecision, int kPairs, typename Table>
__device__ __forceinline__ void load_entries(const Table* row, uint32_t pair, int64_t stride,
                                             bool vectors, Wide<T>* entries) {
  constexpr int kLoad =
      kPairs * sizeof(Table) > kVectorBytes ? kVectorBytes / sizeof(Table) : kPairs;
  if (kPairs > 1 && vectors) {
#pragma unroll
    for (int i = 0; i < kPairs; i += kLoad) {
      const auto loaded = load<kLoad>(row + pair + i);
#pragma unroll
      for (int j = 0; j < kLoad; ++j)
        entries[i + j] = rounded<T, kPrecision>(widen(loaded.lane[j]));
    }
  } else {
    const Table* entry = row + pair * stride;
#pragma unroll
    for (int i = 0; i < kPairs; ++i, entry += stride)
      entries[i] = rounded<T, kPrecision>(widen(*entry));
  }
}

// Writes what was computed in the wide type, a packed conversion for each two lanes of a 16-bit
// type.
template <typename T>
__device__ __forceinline__ void narrow_two(Wide<T> x, Wide<T> y, T& to_x, T& to_y) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(x, y);
    to_x.bits = __bfloat16_as_ushort(both.x);
    to_y.bits = __bfloat16_as_ushort(both.y);
  } else if constexpr (std::is_same_v<T, Float16>) {
    const __half2 both = __floats2half2_rn(x, y);
    to_x.bits = __half_as_ushort(both.x);
    to_y.bits = __half_as_ushort(both.y);
  } else {
    to_x = x;
    to_y = y;
  }
}

// Pair 0 of a token's rows, if it is not copied through.
struct TableRows {
  const char* cos;
  const char* sin;
  bool copied;
};

// The two vectors that one thread moves of each of its heads, and how it rotates them.
template <typename T, typename Table, Precision kPrecision, Arrangement kArrangement, int kLanes>
struct Unit {
  // Neighbouring pairs: those of both vectors, or those within each.
  static constexpr int kGroups = kArrangement == Arrangement::kAdjacent ? 2 : 1;
  static constexpr int kPairs = kLanes / kGroups;
  static constexpr uint32_t kAllPairs = (1u << kLanes) - 1;
  using Vectors = Vector<T, kLanes>[2];

  bool rotates;
  uint32_t lane[2];  // the first lane of each vector; of an odd one out, twice the same
  uint32_t pair[kGroups];
  Wide<T> c[kLanes], s[kLanes];

  __device__ __forceinline__ Unit(const Work& work, uint32_t unit)
      : rotates(unit < work.rotating_units) {
    if (!rotates) {
      unit -= work.rotating_units;
      spread(unit, work.copying_units, work.copied_vectors);
      const auto offset = static_cast<uint32_t>(work.lanes.offset);
      const auto rotated = static_cast<uint32_t>(2 * work.lanes.P);
#pragma unroll
      for (uint32_t& first : lane) first += first < offset ? 0 : rotated;
    } else if constexpr (kArrangement == Arrangement::kAdjacent) {
      spread(unit, work.rotating_units, work.rotated_vectors);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        pair[i] = lane[i] / 2;
        lane[i] += static_cast<uint32_t>(work.lanes.offset);
      }
    } else {
      pair[0] = unit * kLanes;
      uint32_t within = pair[0];
      const uint32_t span = work.distance.divide(within);
      lane[0] =
          static_cast<uint32_t>(work.lanes.offset) + 2 * work.distance.divisor * span + within;
      lane[1] = lane[0] + work.distance.divisor;
    }
  }

  __device__ __forceinline__ void load_lanes(const char* head, int64_t stride, Vectors& x) const {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      x[i] = load_once<kLanes>(reinterpret_cast<const T*>(head) + at(i, stride));
  }

  __device__ __forceinline__ void store_lanes(char* head, int64_t stride, const Vectors& x) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) store_once(reinterpret_cast<T*>(head) + at(i, stride), x[i]);
  }

  // Reads the entries of these pairs from one row of cos or sin.
  __device__ __forceinline__ void load_row(const char* row, const TableParams& table, bool vectors,
                                           Wide<T> (&entries)[kLanes]) const {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      load_entries<T, kPrecision, kPairs>(reinterpret_cast<const Table*>(row), pair[i], table.j,
                                          vectors, entries + i * kPairs);
    }
  }

  // Reads the entries of these pairs from rows of cos and sin.
  __device__ __forceinline__ void load_rows(const Work& work, const TableRows& rows) {
    load_row(rows.cos, work.cos, work.vector_tables, c);
    load_row(rows.sin, work.sin, work.vector_tables, s);
    if (!work.inverse) return;
#pragma unroll
    for (Wide<T>& entry : s) entry = -entry;
  }

  // Calls f(axis, pairs) for each axis of these pairs, with a bit for each pair that has it.
  template <typename F>
  __device__ __forceinline__ void for_each_axis(const PairAxes& axes, const F& f) const {
    uint64_t packed = 0;  // the axis of each pair in a byte
#pragma unroll
    for (int i = 0; i < kGroups; ++i) packed |= axes.load<kPairs>(pair[i]) << 8 * i * kPairs;
    for (uint32_t left = kAllPairs; left != 0;) {
      const auto axis = static_cast<uint8_t>(packed >> 8 * (__ffs(left) - 1));
      uint32_t pairs = 0;
#pragma unroll
      for (int i = 0; i < kLanes; ++i)
        pairs |= static_cast<uint32_t>(static_cast<uint8_t>(packed >> 8 * i) == axis) << i;
      left &= ~pairs;
      f(axis, pairs);
    }
  }

  // Rotates the pairs whose bit is set; kAll: every pair.
  template <bool kAll>
  __device__ __forceinline__ void rotate(Vectors& x, uint32_t pairs) const {
    Pair<T> rotated[kLanes];
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      rotated[i] =
          rotate_pair<T, kPrecision>(widen(member(x, i, 0)), widen(member(x, i, 1)), c[i], s[i]);
    }
    // Two neighbouring lanes are narrowed at once where both are rotated.
    if constexpr (!kAll || kLanes == 1) {
#pragma unroll
      for (int i = 0; i < kLanes; ++i) {
        if (!kAll && !((pairs >> i) & 1)) continue;
        member(x, i, 0) = narrow<T>(rotated[i].a);
        member(x, i, 1) = narrow<T>(rotated[i].b);
      }
    } else if constexpr (kArrangement == Arrangement::kAdjacent) {
#pragma unroll
      for (int i = 0; i < kLanes; ++i)
        narrow_two<T>(rotated[i].a, rotated[i].b, member(x, i, 0), member(x, i, 1));
    } else {
#pragma unroll
      for (int i = 0; i < kLanes; i += 2) {
        narrow_two<T>(rotated[i].a, rotated[i + 1].a, member(x, i, 0), member(x, i + 1, 0));
        narrow_two<T>(rotated[i].b, rotated[i + 1].b, member(x, i, 1), member(x, i + 1, 1));
      }
    }
  }

 private:
  // The unit-th vector and the one `units` further, so that neighbouring threads read neighbouring
  // memory.
  __device__ __forceinline__ void spread(uint32_t unit, uint32_t units, uint32_t vectors) {
    const uint32_t other = unit + units;
    lane[0] = unit * kLanes;
    lane[1] = (other < vectors ? other : unit) * kLanes;
  }

  __device__ __forceinline__ int64_t at(int i, int64_t stride) const {
    return kLanes == 1 ? lane[i] * stride : lane[i];
  }

  // The lane of the first or second member of the i-th pair.
  __device__ __forceinline__ static T& member(Vectors& x, int i, int which) {
    if constexpr (kArrangement == Arrangement::kAdjacent) {
      return x[i / kPairs].lane[2 * (i % kPairs) + which];
    } else {
      return x[which].lane[i];
    }
  }
};

// Blocks that must fit on a multiprocessor: as few registers as the hot path needs, so that enough
// lanes are in flight.
template <typename T, typename Table>
constexpr int min_blocks(Rows rows, int heads) {
  const bool crowded = heads > 1 || rows == Rows::kAxes || sizeof(Table) > sizeof(Wide<T>);
  return crowded ? 4 : 6;
}

template <typename T, typename Table, Precision kPrecision, Arrangement kArrangement, int kLanes,
          Rows kRows, int kHeads>
__global__ void __launch_bounds__(kMaxThreads, min_blocks<T, Table>(kRows, kHeads))
    rotate_kernel(const __grid_constant__ Work work, const __grid_constant__ AxesOf<kRows> axes) {
  const bool is_second = blockIdx.x >= work.second_block;
  const Side& side = work.sides[is_second];
  uint32_t index = (blockIdx.x - (is_second ? work.second_block : 0)) * blockDim.x + threadIdx.x;
  if (index >= side.threads) return;
  const Place place = side.locate(work.units.divide(index));  // index becomes that of the unit
  Unit<T, Table, kPrecision, kArrangement, kLanes> unit(work, index);

  // All lanes are on their way before anything waits for a position or a table row.
  const uint32_t head = side.along(place, kHead);
  const auto is_head = [&](int n) { return n == 0 || head + n * side.head_step < side.heads; };
  const char* in = side.in.at(place);
  typename decltype(unit)::Vectors x[kHeads];
#pragma unroll
  for (int n = 0; n < kHeads; ++n) {
    if (is_head(n)) unit.load_lanes(in + n * side.next_in, side.in_d, x[n]);
  }

  const PlacedToken token = {work, side, place};
  const auto find_rows = [&](uint32_t axis) {
    const Row row = table_row(work.rows, token.on(axis));
    FUSED_ROPE_DEVICE_CHECK(row.copied || is_row(row.index, work.rows.M));
    const auto bytes = row.index * static_cast<int64_t>(sizeof(Table));
    return TableRows{static_cast<const char*>(work.cos.data) + bytes * work.cos.m,
                     static_cast<const char*>(work.sin.data) + bytes * work.sin.m, row.copied};
  };
  const auto rotate = [&]<bool kAll>(const TableRows& rows, uint32_t pairs) {
    unit.load_rows(work, rows);
#pragma unroll
    for (int n = 0; n < kHeads; ++n) unit.template rotate<kAll>(x[n], pairs);
  };
  if (unit.rotates) {
    if constexpr (kRows == Rows::kAxes) {
      unit.for_each_axis(axes, [&](uint32_t axis, uint32_t pairs) {
        const TableRows rows = find_rows(axis);
        if (!rows.copied) rotate.template operator()<false>(rows, pairs);
      });
    } else {
      const TableRows rows = kRows == Rows::kLinear || work.rows.gathered
                                 ? TableRows{side.cos.at(place), side.sin.at(place), false}
                                 : find_rows(0);
      unit.rotates = !rows.copied;
      if (unit.rotates) rotate.template operator()<true>(rows, unit.kAllPairs);
    }
  }
  if (!unit.rotates && work.in_place) return;

  char* out = const_cast<char*>(side.out.at(place));
  if (kRows != Rows::kLinear && work.rows.out_rows.data != nullptr) {
    const int64_t row = output_row(work.rows, token.b(), token.s());
    FUSED_ROPE_DEVICE_CHECK(row == -1 || is_row(row, work.rows.out_rows_limit));
    if (side.scattered) {
      if (row < 0) return;
      out += row * side.out_row * static_cast<int64_t>(sizeof(T));
    }
  }
#pragma unroll
  for (int n = 0; n < kHeads; ++n) {
    if (is_head(n)) unit.store_lanes(out + n * side.next_out, side.out_d, x[n]);
  }
}

template <typename T, typename Table, Precision kPrecision, Rows kRows>
auto choose_kernel(const Plan& plan) {
  constexpr int kLanes = kVectorBytes / sizeof(T);
  constexpr auto kPair = Arrangement::kPair;
  constexpr auto kAdjacent = Arrangement::kAdjacent;
  if (plan.vector == 1) return rotate_kernel<T, Table, kPrecision, kPair, 1, kRows, 1>;
  if (plan.arrangement == kPair) {
    return plan.heads_per_thread == 1
               ? rotate_kernel<T, Table, kPrecision, kPair, kLanes, kRows, 1>
               : rotate_kernel<T, Table, kPrecision, kPair, kLanes, kRows, kMaxHeads>;
  }
  return plan.heads_per_thread == 1
             ? rotate_kernel<T, Table, kPrecision, kAdjacent, kLanes, kRows, 1>
             : rotate_kernel<T, Table, kPrecision, kAdjacent, kLanes, kRows, kMaxHeads>;
}

// Launches once for q and k together, unless one of them is so large that it needs several boxes.
template <typename T, typename Table, Precision kPrecision, Rows kRows>
cudaError_t launch_boxes(const RotateParams& p, const Plan& plan, cudaStream_t stream) {
  const auto kernel = choose_kernel<T, Table, kPrecision, kRows>(plan);
  AxesOf<kRows> axes;
  if constexpr (kRows == Rows::kAxes) {
    for (int64_t j = 0; j < p.lanes.P; ++j) axes.axis[j] = static_cast<uint8_t>(p.axes[j]);
  }
  Work work(p, plan);
  int sides = 0;
  unsigned blocks = 0;
  const auto flush = [&] {
    if (sides == 1) work.second_block = blocks;
    if (sides > 0) kernel<<<blocks, static_cast<unsigned>(plan.threads), 0, stream>>>(work, axes);
    sides = 0;
    blocks = 0;
  };
  for (int i = 0; i < p.count; ++i) {
    const TensorParams& t = p.tensors[i];
    if (t.H == 0) continue;
    for_each_box(p, t, plan, {{0, 0, 0}, {p.B, p.S, t.H}}, [&](const Box& box) {
      if (sides == kMaxTensors) flush();
      if (sides == 1) work.second_block = blocks;
      work.sides[sides] = Side(p, t, plan, box);
      blocks += static_cast<unsigned>(ceil_divide(work.sides[sides].threads, plan.threads));
      ++sides;
    });
  }
  flush();
  return cudaGetLastError();
}

template <typename T, typename Table, Precision kPrecision>
cudaError_t launch_rows(const RotateParams& p, const Plan& plan, cudaStream_t stream) {
  switch (plan.rows) {
    case Rows::kLinear:
      return launch_boxes<T, Table, kPrecision, Rows::kLinear>(p, plan, stream);
    case Rows::kLookup:
      return launch_boxes<T, Table, kPrecision, Rows::kLookup>(p, plan, stream);
    default:
      return launch_boxes<T, Table, kPrecision, Rows::kAxes>(p, plan, stream);
  }
}

template <typename T, typename Table>
cudaError_t launch_table(const RotateParams& p, const Plan& plan, cudaStream_t stream) {
  if constexpr (sizeof(T) == 2) {  // in float32 and float64 the two precisions are one
    if (p.precision == Precision::kModel)
      return launch_rows<T, Table, Precision::kModel>(p, plan, stream);
  }
  return launch_rows<T, Table, Precision::kFp32>(p, plan, stream);
}

// Launches for elements of type T: tables are T's own type, float32 or float64.
template <typename T>
cudaError_t launch_elements(const RotateParams& p, const Plan& plan, cudaStream_t stream) {
  if (p.table_dtype == DType::kFloat32) return launch_table<T, float>(p, plan, stream);
  if (p.table_dtype == DType::kFloat64) return launch_table<T, double>(p, plan, stream);
  if constexpr (sizeof(T) == 2) return launch_table<T, T>(p, plan, stream);
  return cudaErrorInvalidValue;
}

}  // namespace fused_rope
