// The CUDA kernel: one __global__ template. A thread owns some lanes of one head of one token; what
// a call needs to know about addresses is decided when the template is instantiated, what it needs
// to know about values is data.
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
using AxesOf = std::conditional_t<has_axes(kRows), PairAxes, NoAxes>;

// What is at the first coordinates of a box.
inline const char* first_of(const void* data, const Walk& walk, const Box& box) {
  return static_cast<const char*>(data) + box.first[kBatch] * walk[kBatch] +
         box.first[kSequence] * walk[kSequence] + box.first[kHead] * walk[kHead];
}

// Pair 0 of a token's rows, if it is not copied through.
struct TableRows {
  const char* cos;
  const char* sin;
  bool copied;
};

// All of a box of one tensor that a thread needs where nothing is looked up.
struct Side {
  uint32_t threads;
  Quotient outer, outermost;  // by threads of the fastest axis, of the two fastest
  Steps in_steps;
  const char* in;
  const char* cos;        // of the first token: its row, or what is added to the row looked up
  int64_t sin_after_cos;  // bytes, where both take the same steps
  Steps cos_steps, out_steps;
  char* out;  // of a scattered tensor, row 0

  Side() = default;

  Side(const RotateParams& p, const TensorParams& t, const Plan& plan, const Walks& walks,
       const Runs& runs)
      : threads(static_cast<uint32_t>(runs.heads() * plan.units)),
        outer(runs.size(0) * plan.units),
        outermost(runs.size(0) * runs.size(1) * plan.units),
        in_steps(walks[kIn], runs),
        in(first_of(t.in, walks[kIn], runs.box)),
        cos(first_entry(p, p.cos, plan, walks[kCos], runs.box)),
        sin_after_cos(first_entry(p, p.sin, plan, walks[kSin], runs.box) - cos),
        cos_steps(walks[kCos], runs),
        out_steps(walks[kOut], runs),
        out(const_cast<char*>(first_of(t.out, walks[kOut], runs.box))) {}

  // Where thread `index` works; index becomes that of its unit. No division waits for another.
  __device__ __forceinline__ Place locate(uint32_t units, const Quotient& by_units,
                                          uint32_t& index) const {
    const Place place = {{by_units.of(index), outer.of(index), outermost.of(index)}};
    index -= place.before[0] * units;
    return place;
  }

 private:
  static const char* first_entry(const RotateParams& p, const TableParams& table, const Plan& plan,
                                 const Walk& walk, const Box& box) {
    const int64_t row = is_linear(plan.rows) ? p.rows.offset * table.m : 0;
    return first_of(table.data, walk, box) + row * size_of(p.table_dtype);
  }
};

// The rest that is known of a box.
struct Details {
  Axis order[2];
  uint32_t fast, middle;  // coordinates along the two fastest axes
  bool scattered;
  int64_t in_d, out_d, out_row;  // strides of lanes and of scattered rows
  int64_t first[3];              // by Axis
  Steps sin_steps, positions_steps;
  const char* positions;

  Details() = default;

  Details(const RotateParams& p, const TensorParams& t, const Walks& walks, const Runs& runs)
      : order{runs.order[0], runs.order[1]},
        fast(static_cast<uint32_t>(runs.size(0))),
        middle(static_cast<uint32_t>(runs.size(1))),
        scattered(t.scattered),
        in_d(t.in_strides.d),
        out_d(t.out_strides.d),
        out_row(t.out_strides.s),
        first{runs.box.first[0], runs.box.first[1], runs.box.first[2]},
        sin_steps(walks[kSin], runs),
        positions_steps(walks[kPositions], runs),
        positions(first_of(p.rows.positions.data, walks[kPositions], runs.box)) {}

  // The coordinate along an axis, within the box.
  __device__ __forceinline__ uint32_t along(const Place& place, Axis axis) const {
    const auto& before = place.before;
    return order[0] == axis   ? before[0] - before[1] * fast
           : order[1] == axis ? before[1] - before[2] * middle
                              : before[2];
  }
};

// All that one launch is told: a box of q and one of k, in blocks one after the other or in turn.
// What calls without look-ups need comes first, in few lines of the constant cache.
struct Work {
  uint32_t second_block;     // blocks from here on are the second side's
  uint32_t units, distance;  // threads of a head, lanes between the members of a pair
  Quotient by_units, by_distance;
  uint32_t first_lane, to_partner;     // of pair 0, and kPair: from a lane to its partner's
  uint64_t lane_policy, table_policy;  // of the L2 cache
  bool inverse;                        // kPair: done by first_lane and to_partner
  bool in_place;
  uint8_t turns;  // kPerHead, 1: odd blocks are the second side's
  Side sides[kMaxTensors];
  uint32_t rotating_units, copying_units;    // threads of a head that rotate, that copy
  uint32_t rotated_vectors, copied_vectors;  // kAdjacent: vectors of rotated lanes; of the others
  Lanes lanes;
  TableParams cos, sin;
  RowParams rows;
  Details details[kMaxTensors];

  Work(const RotateParams& p, const Plan& plan)
      : second_block(0),
        units(static_cast<uint32_t>(plan.units)),
        distance(static_cast<uint32_t>(std::max<int64_t>(p.lanes.distance, 1))),
        by_units(units),
        by_distance(distance),
        first_lane(static_cast<uint32_t>(p.lanes.offset)),
        to_partner(static_cast<uint32_t>(p.lanes.distance)),
        lane_policy(plan.streams ? kFirstInL2 : kNormalInL2),
        table_policy(plan.keeps_tables ? kLastInL2 : kUnchangedInL2),
        inverse(p.inverse),
        in_place(p.in_place),
        turns(0),
        rotating_units(static_cast<uint32_t>(plan.rotating_units)),
        copying_units(static_cast<uint32_t>(plan.units - plan.rotating_units)),
        rotated_vectors(static_cast<uint32_t>(2 * p.lanes.P / plan.vector)),
        copied_vectors(static_cast<uint32_t>((p.D - 2 * p.lanes.P) / plan.vector)),
        lanes(p.lanes),
        cos(p.cos),
        sin(p.sin),
        rows(p.rows) {
    // Turning (a, b) back is turning (b, a): in kPair a thread takes the second members first.
    if (p.inverse && plan.arrangement == Arrangement::kPair) {
      first_lane += to_partner;
      to_partner = -to_partner;
      inverse = false;
    }
  }

  void set(int side, const RotateParams& p, const TensorParams& t, const Plan& plan,
           const Walks& walks, const Runs& runs) {
    sides[side] = Side(p, t, plan, walks, runs);
    details[side] = Details(p, t, walks, runs);
  }
};

// The token at a place, as table_row asks for it: coordinates are put together only when needed.
struct PlacedToken {
  const Work& work;
  const Details& details;
  const Place& place;
  uint32_t axis = 0;

  __device__ __forceinline__ PlacedToken on(uint32_t other) const {
    return {work, details, place, other};
  }
  __device__ __forceinline__ int64_t b() const {
    return details.first[kBatch] + details.along(place, kBatch);
  }
  __device__ __forceinline__ int64_t s() const {
    return details.first[kSequence] + details.along(place, kSequence);
  }
  __device__ __forceinline__ int64_t position() const {
    const IndexParams here = {details.positions + details.positions_steps.to(place),
                              work.rows.positions.is_int64};
    return load_index(here, axis * work.rows.positions_a);
  }
};

template <typename T, int kLanes>
struct alignas(sizeof(T) * kLanes) Vector {
  T lane[kLanes];
};

// Words of a vector that is moved with a policy of the L2 cache: 1, 2 or 4; 0 where it has none.
template <typename T, int kLanes>
#if __CUDA_ARCH__ >= 800
constexpr int kWords = kLanes > 1 || sizeof(T) == 8 ? kLanes * sizeof(T) / 4 : 0;
#else
constexpr int kWords = 0;
#endif

// Reads a vector if it is `wanted`, without a branch.
template <int kLanes, typename T>
__device__ __forceinline__ Vector<T, kLanes> load(const T* from, uint64_t policy, bool wanted) {
  using V = Vector<T, kLanes>;
  V value{};
  if constexpr (kWords<T, kLanes> > 0) {
    const auto flag = static_cast<uint32_t>(wanted);
    uint32_t words[kWords<T, kLanes>];
    if constexpr (kWords<T, kLanes> == 4) {
      asm volatile(
          "{\n"
          ".reg .pred wanted;\n"
          "setp.ne.u32 wanted, %6, 0;\n"
          "@wanted ld.global.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;\n"
          "}"
          : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
          : "l"(from), "l"(policy), "r"(flag));
    } else if constexpr (kWords<T, kLanes> == 2) {
      asm volatile(
          "{\n"
          ".reg .pred wanted;\n"
          "setp.ne.u32 wanted, %4, 0;\n"
          "@wanted ld.global.L2::cache_hint.v2.u32 {%0, %1}, [%2], %3;\n"
          "}"
          : "=r"(words[0]), "=r"(words[1])
          : "l"(from), "l"(policy), "r"(flag));
    } else {
      asm volatile(
          "{\n"
          ".reg .pred wanted;\n"
          "setp.ne.u32 wanted, %3, 0;\n"
          "@wanted ld.global.L2::cache_hint.u32 %0, [%1], %2;\n"
          "}"
          : "=r"(words[0])
          : "l"(from), "l"(policy), "r"(flag));
    }
    std::memcpy(&value, words, sizeof(value));
  } else if (wanted) {
    value = *reinterpret_cast<const V*>(from);
  }
  return value;
}

template <typename T, int kLanes>
__device__ __forceinline__ void store(T* to, const Vector<T, kLanes>& value, uint64_t policy) {
  using V = Vector<T, kLanes>;
  if constexpr (kWords<T, kLanes> > 0) {
    uint32_t words[kWords<T, kLanes>];
    std::memcpy(words, &value, sizeof(value));
    if constexpr (kWords<T, kLanes> == 4) {
      asm volatile("st.global.L2::cache_hint.v4.u32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(to),
                   "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3]), "l"(policy)
                   : "memory");
    } else if constexpr (kWords<T, kLanes> == 2) {
      asm volatile("st.global.L2::cache_hint.v2.u32 [%0], {%1, %2}, %3;" ::"l"(to), "r"(words[0]),
                   "r"(words[1]), "l"(policy)
                   : "memory");
    } else {
      asm volatile("st.global.L2::cache_hint.u32 [%0], %1, %2;" ::"l"(to), "r"(words[0]),
                   "l"(policy)
                   : "memory");
    }
  } else {
    *reinterpret_cast<V*>(to) = value;
  }
}

// kPairs entries of a table row from pair on, as the arithmetic of T sees them. kVectors: they are
// neighbours and aligned.
template <typename T, Precision kPrecision, int kPairs, bool kVectors, typename Table>
__device__ __forceinline__ void load_entries(const Table* row, uint32_t pair, int64_t stride,
                                             uint64_t policy, Wide<T>* entries) {
  if constexpr (kVectors) {
    constexpr int kLoad =
        kPairs * sizeof(Table) > kVectorBytes ? kVectorBytes / sizeof(Table) : kPairs;
#pragma unroll
    for (int i = 0; i < kPairs; i += kLoad) {
      const auto loaded = load<kLoad>(row + pair + i, policy, true);
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

// One lane in the wide type. bfloat16 in the upper half of a register is there already, but for the
// lower half.
template <typename T, int kLanes>
__device__ __forceinline__ Wide<T> widen_lane(const Vector<T, kLanes>& x, int i) {
  if constexpr (std::is_same_v<T, BFloat16> && kLanes > 1) {
    if (i % 2 == 1) {
      uint32_t both;
      std::memcpy(&both, &x.lane[i - 1], sizeof(both));
      return float_of(both & 0xffff0000u);
    }
  }
  return widen(x.lane[i]);
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

// The vectors that one thread moves of its head, and how it rotates them.
template <typename T, typename Table, Precision kPrecision, Arrangement kArrangement, int kLanes,
          Rows kRows, bool kVectorTables, bool kPlain>
struct Unit {
  static constexpr int kVectors = vectors_of_thread(kArrangement, kRows);
  static constexpr int kPairs = kLanes * kVectors / 2;
  // Neighbouring pairs: those of both vectors, or those within each.
  static constexpr int kGroups = kArrangement == Arrangement::kAdjacent ? kVectors : 1;
  static constexpr int kPairsOfGroup = kPairs / kGroups;
  static constexpr uint32_t kAllPairs = (1u << kPairs) - 1;
  using Vectors = Vector<T, kLanes>[kVectors];

  bool rotates;
  uint32_t lane[kVectors];  // the first of each vector; of an odd one out, twice the same
  uint32_t pair[kGroups];
  Wide<T> c[kPairs], s[kPairs];

  __device__ __forceinline__ Unit(const Work& work, uint32_t unit)
      : rotates(kPlain || unit < work.rotating_units) {
    if (!rotates) {
      unit -= work.rotating_units;
      spread(unit, work.copying_units, work.copied_vectors);
      const auto offset = static_cast<uint32_t>(work.lanes.offset);
      const auto rotated = static_cast<uint32_t>(2 * work.lanes.P);
#pragma unroll
      for (uint32_t& first : lane) first += first < offset ? 0 : rotated;
    } else if constexpr (kArrangement == Arrangement::kAdjacent) {
      spread(unit, kPlain ? work.units : work.rotating_units, work.rotated_vectors);
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        pair[i] = lane[i] / 2;
        lane[i] += work.first_lane;
      }
    } else {
      pair[0] = unit * kLanes;
      lane[0] = work.first_lane + pair[0];
      if (!kPlain) lane[0] += work.by_distance.of(pair[0]) * work.distance;
      lane[1] = lane[0] + work.to_partner;
    }
  }

  __device__ __forceinline__ void load_lanes(const char* head, int64_t stride, uint64_t policy,
                                             bool wanted, Vectors& x) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
      x[i] = load<kLanes>(reinterpret_cast<const T*>(head) + at(i, stride), policy, wanted);
  }

  __device__ __forceinline__ void store_lanes(char* head, int64_t stride, uint64_t policy,
                                              const Vectors& x) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
      store(reinterpret_cast<T*>(head) + at(i, stride), x[i], policy);
  }

  // Reads the entries of these pairs from rows of cos and sin.
  __device__ __forceinline__ void load_rows(const Work& work, const TableRows& rows) {
    const auto load_row = [&](const char* row, const TableParams& table, Wide<T>* entries) {
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
        load_entries<T, kPrecision, kPairsOfGroup, kVectorTables>(
            reinterpret_cast<const Table*>(row), pair[i], table.j, work.table_policy,
            entries + i * kPairsOfGroup);
      }
    };
    load_row(rows.cos, work.cos, c);
    load_row(rows.sin, work.sin, s);
    if constexpr (kArrangement == Arrangement::kAdjacent) {
      if (!work.inverse) return;
#pragma unroll
      for (Wide<T>& entry : s) entry = -entry;
    }
  }

  // Calls f(axis, pairs) for each axis of these pairs, with a bit for each pair that has it.
  template <typename F>
  __device__ __forceinline__ void for_each_axis(const PairAxes& axes, const F& f) const {
    uint64_t packed = 0;  // the axis of each pair in a byte
#pragma unroll
    for (int i = 0; i < kGroups; ++i)
      packed |= axes.load<kPairsOfGroup>(pair[i]) << 8 * i * kPairsOfGroup;
    for (uint32_t left = kAllPairs; left != 0;) {
      const auto axis = static_cast<uint8_t>(packed >> 8 * (__ffs(left) - 1));
      uint32_t pairs = 0;
#pragma unroll
      for (int i = 0; i < kPairs; ++i)
        pairs |= static_cast<uint32_t>(static_cast<uint8_t>(packed >> 8 * i) == axis) << i;
      left &= ~pairs;
      f(axis, pairs);
    }
  }

  // Rotates the pairs whose bit is set; kAll: every pair.
  template <bool kAll>
  __device__ __forceinline__ void rotate(Vectors& x, uint32_t pairs) const {
    Pair<T> rotated[kPairs];
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      rotated[i] =
          rotate_pair<T, kPrecision>(widen_member(x, i, 0), widen_member(x, i, 1), c[i], s[i]);
    }
    // Two neighbouring lanes are narrowed at once where both are rotated.
    if constexpr (!kAll || kPairs == 1) {
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        if (!kAll && !((pairs >> i) & 1)) continue;
        member(x, i, 0) = narrow<T>(rotated[i].a);
        member(x, i, 1) = narrow<T>(rotated[i].b);
      }
    } else if constexpr (kArrangement == Arrangement::kAdjacent) {
#pragma unroll
      for (int i = 0; i < kPairs; ++i)
        narrow_two<T>(rotated[i].a, rotated[i].b, member(x, i, 0), member(x, i, 1));
    } else {
#pragma unroll
      for (int i = 0; i < kPairs; i += 2) {
        narrow_two<T>(rotated[i].a, rotated[i + 1].a, member(x, i, 0), member(x, i + 1, 0));
        narrow_two<T>(rotated[i].b, rotated[i + 1].b, member(x, i, 1), member(x, i + 1, 1));
      }
    }
  }

 private:
  // The unit-th vector and the one `units` further, so that neighbouring threads read neighbouring
  // memory.
  __device__ __forceinline__ void spread(uint32_t unit, uint32_t units, uint32_t vectors) {
    lane[0] = unit * kLanes;
    if constexpr (kVectors == 2) {
      const uint32_t other = unit + units;
      lane[1] = (other < vectors ? other : unit) * kLanes;
    }
  }

  __device__ __forceinline__ int64_t at(int i, int64_t stride) const {
    return kLanes == 1 ? lane[i] * stride : lane[i];
  }

  // Where the first or second member of the i-th pair is.
  struct Spot {
    int vector, lane;
  };
  __device__ __forceinline__ static constexpr Spot spot(int i, int which) {
    return kArrangement == Arrangement::kAdjacent
               ? Spot{i / kPairsOfGroup, 2 * (i % kPairsOfGroup) + which}
               : Spot{which, i};
  }
  __device__ __forceinline__ static T& member(Vectors& x, int i, int which) {
    return x[spot(i, which).vector].lane[spot(i, which).lane];
  }
  __device__ __forceinline__ static Wide<T> widen_member(const Vectors& x, int i, int which) {
    return widen_lane(x[spot(i, which).vector], spot(i, which).lane);
  }
};

// Blocks that must fit on a multiprocessor: as few registers as the hot path needs, so that enough
// lanes are in flight.
template <typename T, typename Table>
constexpr int min_blocks(Rows rows) {
  const bool crowded = rows == Rows::kAxes || sizeof(Table) > sizeof(Wide<T>);
  return crowded ? 4 : 6;
}

// Which box a block works on, and the how manieth of it the block is.
struct Turn {
  bool is_second;
  uint32_t block;
};

template <Rows kRows>
__device__ __forceinline__ Turn turn_of(const Work& work, uint32_t block) {
  if (kRows == Rows::kPerHead && work.turns) return {block % 2 != 0, block / 2};
  const bool is_second = block >= work.second_block;
  return {is_second, block - (is_second ? work.second_block : 0)};
}

template <typename T, typename Table, Precision kPrecision, Arrangement kArrangement, int kLanes,
          Rows kRows, bool kVectorTables, bool kPlain>
__global__ void __launch_bounds__(kMaxThreads, min_blocks<T, Table>(kRows))
    rotate_kernel(const __grid_constant__ Work work, const __grid_constant__ AxesOf<kRows> axes) {
  const Turn turn = turn_of<kRows>(work, blockIdx.x);
  const Side& side = work.sides[turn.is_second];
  const Details& details = work.details[turn.is_second];
  uint32_t index = turn.block * blockDim.x + threadIdx.x;
  const bool has_work = index < side.threads;
  const Place place = side.locate(work.units, work.by_units, index);
  Unit<T, Table, kPrecision, kArrangement, kLanes, kRows, kVectorTables, kPlain> unit(work, index);

  // The lanes are on their way before anything waits for a position, a table row, or the branch
  // of threads beyond the last head.
  typename decltype(unit)::Vectors x;
  unit.load_lanes(side.in + side.in_steps.to(place), details.in_d, work.lane_policy, has_work, x);
  if (!has_work) return;

  const PlacedToken token = {work, details, place};
  const auto find_rows = [&](uint32_t axis) {
    const Row row = table_row(work.rows, token.on(axis));
    FUSED_ROPE_DEVICE_CHECK(row.copied || is_row(row.index, work.rows.M));
    const auto bytes = row.index * static_cast<int64_t>(sizeof(Table));
    return TableRows{static_cast<const char*>(work.cos.data) + bytes * work.cos.m,
                     static_cast<const char*>(work.sin.data) + bytes * work.sin.m, row.copied};
  };
  const auto choose_rows = [&]() -> TableRows {
    if constexpr (kRows == Rows::kSections) {
      return find_rows(axes.axis[unit.pair[0]]);
    } else {
      if (!is_linear(kRows) && !work.rows.gathered) return find_rows(0);
      const char* cos = side.cos + side.cos_steps.to(place);
      if (is_linear(kRows)) return {cos, cos + side.sin_after_cos, false};
      const char* sin = side.cos + side.sin_after_cos + details.sin_steps.to(place);
      return {cos, sin, false};
    }
  };
  if (unit.rotates) {
    if constexpr (kRows == Rows::kAxes) {
      unit.for_each_axis(axes, [&](uint32_t axis, uint32_t pairs) {
        const TableRows rows = find_rows(axis);
        if (rows.copied) return;
        unit.load_rows(work, rows);
        unit.template rotate<false>(x, pairs);
      });
    } else {
      const TableRows rows = choose_rows();
      unit.rotates = !rows.copied;
      if (unit.rotates) {
        unit.load_rows(work, rows);
        unit.template rotate<true>(x, unit.kAllPairs);
      }
    }
  }
  if (!unit.rotates && work.in_place) return;

  char* out = side.out + side.out_steps.to(place);
  if (!is_linear(kRows) && work.rows.out_rows.data != nullptr) {
    const int64_t row = output_row(work.rows, token.b(), token.s());
    FUSED_ROPE_DEVICE_CHECK(row == -1 || is_row(row, work.rows.out_rows_limit));
    if (details.scattered) {
      if (row < 0) return;
      out += row * details.out_row * static_cast<int64_t>(sizeof(T));
    }
  }
  unit.store_lanes(out, details.out_d, work.lane_policy, x);
}

// The instance for vectors of lanes; plain heads have some of their own where tables are aligned.
template <typename T, typename Table, Precision kPrecision, Arrangement kArrangement, Rows kRows>
auto choose_vectors(const Plan& plan) {
  constexpr int kLanes = kVectorBytes / sizeof(T);
  if constexpr (kRows != Rows::kPerHead) {
    if (!plan.vector_tables)
      return rotate_kernel<T, Table, kPrecision, kArrangement, kLanes, kRows, false, false>;
  }
  if constexpr (kRows != Rows::kAxes) {
    if constexpr (kRows == Rows::kLinear && sizeof(T) == 2) {
      constexpr int kShortest = shortest_vector(kArrangement, kRows) / sizeof(T);
      if (plan.vector == kShortest)
        return rotate_kernel<T, Table, kPrecision, kArrangement, kShortest, kRows, true, true>;
      if (kShortest < kLanes / 2 && plan.vector == kLanes / 2)
        return rotate_kernel<T, Table, kPrecision, kArrangement, kLanes / 2, kRows, true, true>;
    }
    if (plan.plain)
      return rotate_kernel<T, Table, kPrecision, kArrangement, kLanes, kRows, true, true>;
  }
  return rotate_kernel<T, Table, kPrecision, kArrangement, kLanes, kRows, true, false>;
}

template <typename T, typename Table, Precision kPrecision, Rows kRows>
auto choose_kernel(const Plan& plan) {
  constexpr auto kPair = Arrangement::kPair;
  constexpr auto kAdjacent = Arrangement::kAdjacent;
  if constexpr (kRows != Rows::kAxes && kRows != Rows::kPerHead) {  // a single pair has one axis
    if (plan.vector == 1) return rotate_kernel<T, Table, kPrecision, kPair, 1, kRows, false, false>;
  }
  if constexpr (kRows != Rows::kAxes || sizeof(T) < sizeof(double)) {  // nor has one of two lanes
    if (plan.arrangement == kAdjacent)
      return choose_vectors<T, Table, kPrecision, kAdjacent, kRows>(plan);
  }
  return choose_vectors<T, Table, kPrecision, kPair, kRows>(plan);
}

#if defined(__CUDACC__)  // elsewhere the tests' emulation launches
template <typename Axes>
cudaError_t enqueue(void (*kernel)(Work, Axes), unsigned blocks, int threads, cudaStream_t stream,
                    const Work& work, const Axes& axes) {
  kernel<<<blocks, static_cast<unsigned>(threads), 0, stream>>>(work, axes);
  return cudaGetLastError();
}
#endif

// Launches once for q and k together, unless one of them is so large that it needs several boxes.
template <typename T, typename Table, Precision kPrecision, Rows kRows>
cudaError_t launch_boxes(const RotateParams& p, const Plan& plan, cudaStream_t stream) {
  const auto kernel = choose_kernel<T, Table, kPrecision, kRows>(plan);
  AxesOf<kRows> axes;
  if constexpr (has_axes(kRows)) {
    for (int64_t j = 0; j < p.lanes.P; ++j) axes.axis[j] = static_cast<uint8_t>(p.axes[j]);
  }
  Work work(p, plan);
  int sides = 0;
  unsigned blocks[kMaxTensors] = {};  // of each side
  cudaError_t error = cudaSuccess;
  const auto flush = [&] {
    work.second_block = blocks[0];
    work.turns = plan.rows == Rows::kPerHead && blocks[0] == blocks[1] ? 1 : 0;
    if (sides > 0 && error == cudaSuccess)
      error = enqueue(kernel, blocks[0] + blocks[1], plan.threads, stream, work, axes);
    sides = 0;
    blocks[0] = blocks[1] = 0;
  };
  for (int i = 0; i < p.count; ++i) {
    const TensorParams& t = p.tensors[i];
    if (t.H == 0) continue;
    const Walks walks = walks_of(p, t, plan.rows);
    const Runs whole = {memory_order(p, t), {{0, 0, 0}, {p.B, p.S, t.H}}};
    for_each_box(walks, whole, plan, [&](const Runs& runs) {
      if (sides == kMaxTensors) flush();
      work.set(sides, p, t, plan, walks, runs);
      const int64_t threads = work.sides[sides].threads;
      blocks[sides++] = static_cast<unsigned>(ceil_divide(threads, plan.threads));
    });
  }
  flush();
  return error;
}

template <typename T, typename Table, Precision kPrecision>
cudaError_t launch_rows(const RotateParams& p, const Plan& plan, cudaStream_t stream) {
  switch (plan.rows) {
    case Rows::kLinear:
      return launch_boxes<T, Table, kPrecision, Rows::kLinear>(p, plan, stream);
    case Rows::kPerHead:
      return launch_boxes<T, Table, kPrecision, Rows::kPerHead>(p, plan, stream);
    case Rows::kLookup:
      return launch_boxes<T, Table, kPrecision, Rows::kLookup>(p, plan, stream);
    case Rows::kSections:
      return launch_boxes<T, Table, kPrecision, Rows::kSections>(p, plan, stream);
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
