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

#define FUSED_ROPE_DEVICE_CHECK(condition) \
  ((condition)                             \
       ? static_cast<void>(0)              \
       : __assert_fail(#condition, __FILE__, __LINE__, static_cast<const char*>(__FUNCTION__)))

namespace fused_rope {

// The axis of each pair's position, passed by value so that a captured launch owns it.
struct PairAxes {
  static constexpr bool kPresent = true;
  uint8_t axis[kMaxAxisPairs];
};
struct NoAxes {
  static constexpr bool kPresent = false;
};

// Where a thread works, counted from the first token and head of its box: from the fastest axis to
// the slowest.
struct Place {
  uint32_t digits[3];
};

// x * y + sum, one instruction.
__device__ __forceinline__ int64_t multiply_add(int32_t x, uint32_t y, int64_t sum) {
  int64_t result;
  asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(result) : "r"(x), "r"(y), "l"(sum));
  return result;
}

// A box of one tensor, small enough that everything but its base addresses fits in 32 bits.
struct Side {
  const void* in;
  void* out;                              // of a scattered tensor: row 0
  int32_t in_strides[3], out_strides[3];  // from the fastest axis to the slowest
  int32_t in_h, out_h;                    // strides of heads
  int64_t in_d, out_d, out_row;           // strides of lanes and of scattered rows
  int64_t first[3];                       // by Axis
  uint32_t threads, heads, head_step;     // the heads of one thread are head_step apart
  Axis order[2];
  Divider fast, middle;
  bool scattered, same_strides;

  Side() = default;

  Side(const RotateParams& p, const TensorParams& t, const Plan& plan, const Box& box)
      : in(at(t.in, t.in_strides, box.first, p.dtype)),
        out(const_cast<void*>(at(t.out,
                                 t.scattered ? Strides{0, 0, t.out_strides.h, 0} : t.out_strides,
                                 box.first, p.dtype))),
        in_h(narrow(t.in_strides.h)),
        out_h(narrow(t.out_strides.h)),
        in_d(t.in_strides.d),
        out_d(t.out_strides.d),
        out_row(t.out_strides.s),
        first{box.first[0], box.first[1], box.first[2]},
        heads(static_cast<uint32_t>(box.size[kHead])),
        head_step(static_cast<uint32_t>(ceil_divide(box.size[kHead], plan.heads_per_thread))),
        scattered(t.scattered) {
    const std::array<Axis, 3> axes = memory_order(p, t);
    const std::array<int64_t, 3> sizes = {box.size[kBatch], box.size[kSequence], head_step};
    const int64_t from[] = {t.in_strides.b, t.in_strides.s, t.in_strides.h};
    const int64_t to[] = {t.out_strides.b, t.out_strides.s, t.out_strides.h};
    same_strides = !scattered;
    for (int i = 0; i < 3; ++i) {
      in_strides[i] = narrow(from[axes[i]]);
      out_strides[i] = narrow(to[axes[i]]);
      same_strides = same_strides && in_strides[i] == out_strides[i];
    }
    threads = static_cast<uint32_t>(sizes[0] * sizes[1] * sizes[2] * plan.units);
    for (int i = 0; i < 2; ++i) order[i] = axes[i];
    fast = Divider(sizes[order[0]]);
    middle = Divider(sizes[order[1]]);
  }

  __device__ __forceinline__ Place locate(uint32_t row) const {
    Place at;
    at.digits[0] = row;
    at.digits[1] = fast.divide(at.digits[0]);
    at.digits[2] = middle.divide(at.digits[1]);
    return at;
  }

  __device__ __forceinline__ uint32_t along(const Place& at, Axis axis) const {
    return order[0] == axis ? at.digits[0] : order[1] == axis ? at.digits[1] : at.digits[2];
  }

  // Offset of a head's lane 0 from the box's first.
  __device__ __forceinline__ static int64_t offset(const int32_t (&strides)[3], const Place& at) {
    return multiply_add(
        strides[0], at.digits[0],
        multiply_add(strides[1], at.digits[1], multiply_add(strides[2], at.digits[2], 0)));
  }

 private:
  // Strides that do not fit are those of axes along which the box has one coordinate, 0.
  static int32_t narrow(int64_t stride) { return static_cast<int32_t>(stride); }

  static const void* at(const void* data, const Strides& strides,
                        const std::array<int64_t, 3>& first, DType dtype) {
    const int64_t offset =
        first[kBatch] * strides.b + first[kSequence] * strides.s + first[kHead] * strides.h;
    return static_cast<const char*>(data) + offset * size_of(dtype);
  }
};

// All that one launch is told: q's box in its first blocks, k's in the rest.
struct Work {
  Side sides[kMaxTensors];
  unsigned second_block;  // the first block of the second side
  Divider units, distance;
  uint32_t rotating_units;  // threads of a head that rotate
  uint32_t half_log2;       // kShuffle: threads per half rotation, as a power of two
  Lanes lanes;
  int64_t D;
  TableParams cos, sin;
  RowParams rows;
  bool same_strides;  // of cos and sin
  bool known_rows;    // checked on the host: token s reads row s + offset of a shared table
  bool inverse, in_place, streaming, vector_tables;

  Work(const RotateParams& p, const Plan& plan)
      : second_block(0),
        units(plan.units),
        distance(std::max<int64_t>(p.lanes.distance, 1)),
        rotating_units(static_cast<uint32_t>(plan.rotating_units)),
        half_log2(0),
        lanes(p.lanes),
        D(p.D),
        cos(p.cos),
        sin(p.sin),
        rows(p.rows),
        same_strides(cos.j == sin.j && cos.m == sin.m && cos.b == sin.b && cos.s == sin.s &&
                     cos.h == sin.h),
        known_rows(!rows.gathered && rows.positions.data == nullptr &&
                   rows.offsets.data == nullptr && rows.cu_seqlens.data == nullptr),
        inverse(p.inverse),
        in_place(p.in_place),
        streaming(plan.streaming),
        vector_tables(plan.vector_tables) {
    while (int64_t{plan.vector} << (half_log2 + 1) <= p.lanes.distance) ++half_log2;
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

template <typename T, int kLanes>
__device__ __forceinline__ void store(T* to, const Vector<T, kLanes>& value, bool streaming) {
  if constexpr (sizeof(value) == kVectorBytes) {
    if (streaming) {
      uint4 raw;
      std::memcpy(&raw, &value, sizeof(raw));
      return __stcs(reinterpret_cast<uint4*>(to), raw);
    }
  }
  *reinterpret_cast<Vector<T, kLanes>*>(to) = value;
}

// The same vector of the thread `distance` threads away, within a group of 2 * distance threads
// that are all here.
template <typename T, int kLanes>
__device__ __forceinline__ Vector<T, kLanes> exchange(const Vector<T, kLanes>& own,
                                                      uint32_t distance) {
  const uint32_t group = 2 * distance;
  const uint32_t mask = (group == kWarp ? ~0u : (1u << group) - 1)
                        << (threadIdx.x % kWarp & ~(group - 1));
  uint32_t words[sizeof(own) / sizeof(uint32_t)];
  std::memcpy(words, &own, sizeof(own));
#pragma unroll
  for (uint32_t& word : words) word = __shfl_xor_sync(mask, word, distance);
  Vector<T, kLanes> partner;
  std::memcpy(&partner, words, sizeof(partner));
  return partner;
}

// kPairs entries of a table row from pair j on, as the arithmetic of T sees them.
template <typename T, Precision kPrecision, int kPairs, typename Table>
__device__ __forceinline__ void load_entries(const Table* row, int64_t stride, bool vectors,
                                             Wide<T> (&entries)[kPairs]) {
  constexpr int kLoad =
      kPairs * sizeof(Table) > kVectorBytes ? kVectorBytes / sizeof(Table) : kPairs;
  if (kPairs > 1 && vectors) {
#pragma unroll
    for (int i = 0; i < kPairs; i += kLoad) {
      const auto loaded = load<kLoad>(row + i);
#pragma unroll
      for (int j = 0; j < kLoad; ++j)
        entries[i + j] = rounded<T, kPrecision>(widen(loaded.lane[j]));
    }
  } else {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) entries[i] = rounded<T, kPrecision>(widen(row[i * stride]));
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

// What one thread moves of a head, and how it rotates it.
template <typename T, typename Table, Precision kPrecision, Arrangement kArrangement, int kLanes,
          typename Axes>
struct Unit {
  static constexpr int kVectors = kArrangement == Arrangement::kPair ? 2 : 1;
  static constexpr int kPairs = kArrangement == Arrangement::kAdjacent ? kLanes / 2 : kLanes;
  using LaneVector = Vector<T, kLanes>;

  int32_t lane[kVectors];  // the first lane of each vector; -1 where there is none
  int32_t pair;            // the first pair
  bool second;             // kShuffle: the vector holds second members
  Wide<T> c[kPairs], s[kPairs];
  uint32_t copied;  // pairs that are not rotated, one bit each

  // The unit-th group of rotated lanes.
  __device__ __forceinline__ void locate_rotated(const Work& work, uint32_t unit) {
    const int32_t offset = static_cast<int32_t>(work.lanes.offset);
    second = false;
    if constexpr (kArrangement == Arrangement::kPair) {
      uint32_t within = unit * kLanes;
      pair = static_cast<int32_t>(within);
      const uint32_t span = work.distance.divide(within);
      lane[0] = offset + static_cast<int32_t>(2 * work.distance.divisor * span + within);
      lane[kVectors - 1] = lane[0] + static_cast<int32_t>(work.distance.divisor);
    } else {
      lane[0] = offset + static_cast<int32_t>(unit * kLanes);
      if constexpr (kArrangement == Arrangement::kAdjacent) {
        pair = static_cast<int32_t>(unit * kPairs);
      } else {
        second = (unit >> work.half_log2) & 1;
        const uint32_t within = unit & ((1u << work.half_log2) - 1);
        pair = static_cast<int32_t>(((unit >> (work.half_log2 + 1) << work.half_log2) + within) *
                                    kLanes);
      }
    }
  }

  // The unit-th group of lanes outside the span.
  __device__ __forceinline__ void locate_copied(const Work& work, uint32_t unit) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int64_t outside = (int64_t{unit} * kVectors + i) * kLanes;
      const int64_t at = outside < work.lanes.offset ? outside : outside + 2 * work.lanes.P;
      lane[i] = at < work.D ? static_cast<int32_t>(at) : -1;
    }
  }

  // Reads cos and sin; false if the token is copied through.
  __device__ __forceinline__ bool load_rows(const Work& work, const Axes& axes, int64_t b,
                                            int64_t s_index, int64_t h) {
    const Table* cos = static_cast<const Table*>(work.cos.data);
    const Table* sin = static_cast<const Table*>(work.sin.data);
    copied = 0;
    if constexpr (Axes::kPresent) {
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        const Row row = table_row(work.rows, b, s_index, axes.axis[pair + i]);
        copied |= static_cast<uint32_t>(row.copied) << i;
        if (row.copied) continue;
        FUSED_ROPE_DEVICE_CHECK(is_row(row.index, work.rows.M));
        c[i] = rounded<T, kPrecision>(widen(cos[row.index * work.cos.m + (pair + i) * work.cos.j]));
        s[i] = rounded<T, kPrecision>(widen(sin[row.index * work.sin.m + (pair + i) * work.sin.j]));
      }
    } else {
      Row row = {s_index + work.rows.offset, false};
      if (!work.known_rows) {
        row = table_row(work.rows, b, s_index);
        if (row.copied) return false;
        FUSED_ROPE_DEVICE_CHECK(work.rows.gathered || is_row(row.index, work.rows.M));
      }
      const auto offset_in = [&](const TableParams& table) {
        const int64_t at_row = work.rows.gathered ? b * table.b + s_index * table.s + h * table.h
                                                  : row.index * table.m;
        return at_row + (work.vector_tables ? pair : pair * table.j);
      };
      const int64_t offset = offset_in(work.cos);
      load_entries<T, kPrecision>(cos + offset, work.cos.j, work.vector_tables, c);
      load_entries<T, kPrecision>(sin + (work.same_strides ? offset : offset_in(work.sin)),
                                  work.sin.j, work.vector_tables, s);
    }
    // The sign of sin holds the direction and, where a thread has second members only, which member
    // it computes.
    const bool negative =
        kArrangement == Arrangement::kShuffle ? work.inverse != !second : work.inverse;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) s[i] = negative ? -s[i] : s[i];
    return true;
  }

  __device__ __forceinline__ void load_lanes(const T* head, int64_t stride,
                                             LaneVector (&x)[kVectors]) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (lane[i] >= 0) x[i] = load<kLanes>(head + (kLanes == 1 ? lane[i] * stride : lane[i]));
    }
  }

  __device__ __forceinline__ void store_lanes(T* head, int64_t stride,
                                              const LaneVector (&x)[kVectors],
                                              bool streaming) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (lane[i] >= 0) store(head + (kLanes == 1 ? lane[i] * stride : lane[i]), x[i], streaming);
    }
  }

  // The lane of pair i's first or second member; kShuffle has one of the two.
  __device__ __forceinline__ static T& member(LaneVector (&x)[kVectors], int i, int which) {
    if constexpr (kArrangement == Arrangement::kAdjacent) return x[0].lane[2 * i + which];
    return x[which * (kVectors - 1)].lane[i];
  }

  __device__ __forceinline__ void rotate(const Work& work, LaneVector (&x)[kVectors]) const {
    LaneVector partner;
    if constexpr (kArrangement == Arrangement::kShuffle)
      partner = exchange(x[0], 1u << work.half_log2);
    Pair<T> rotated[kPairs];
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      if constexpr (kArrangement == Arrangement::kShuffle) {
        rotated[i].a =
            rotate_member<T, kPrecision>(widen(x[0].lane[i]), widen(partner.lane[i]), c[i], s[i]);
      } else {
        rotated[i] =
            rotate_pair<T, kPrecision>(widen(member(x, i, 0)), widen(member(x, i, 1)), c[i], s[i]);
      }
    }
    write(rotated, x);
  }

 private:
  // Two neighbouring lanes are narrowed at once where nothing between them may be copied through.
  __device__ __forceinline__ void write(const Pair<T> (&rotated)[kPairs],
                                        LaneVector (&x)[kVectors]) const {
    constexpr bool kBoth = kArrangement != Arrangement::kShuffle;
    if constexpr (Axes::kPresent || kPairs == 1) {
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        if ((copied >> i) & 1) continue;
        member(x, i, 0) = narrow<T>(rotated[i].a);
        if constexpr (kBoth) member(x, i, 1) = narrow<T>(rotated[i].b);
      }
    } else if constexpr (kArrangement == Arrangement::kAdjacent) {
#pragma unroll
      for (int i = 0; i < kPairs; ++i)
        narrow_two<T>(rotated[i].a, rotated[i].b, member(x, i, 0), member(x, i, 1));
    } else {
#pragma unroll
      for (int i = 0; i < kPairs; i += 2) {
        narrow_two<T>(rotated[i].a, rotated[i + 1].a, member(x, i, 0), member(x, i + 1, 0));
        if constexpr (kBoth)
          narrow_two<T>(rotated[i].b, rotated[i + 1].b, member(x, i, 1), member(x, i + 1, 1));
      }
    }
  }
};

template <typename T, typename Table, Precision kPrecision, Arrangement kArrangement, int kLanes,
          typename Axes>
__global__ void __launch_bounds__(kMaxThreads)
    rotate_kernel(const __grid_constant__ Work work, const __grid_constant__ Axes axes) {
  const bool is_second = blockIdx.x >= work.second_block;
  const Side& side = work.sides[is_second];
  uint32_t index = (blockIdx.x - (is_second ? work.second_block : 0)) * blockDim.x + threadIdx.x;
  if (index >= side.threads) return;
  const uint32_t row =
      work.units.divide(index);  // index becomes the thread's number within the head
  const Place at = side.locate(row);

  Unit<T, Table, kPrecision, kArrangement, kLanes, Axes> unit;
  bool rotates = index < work.rotating_units;
  if (rotates) {
    unit.locate_rotated(work, index);
  } else {
    unit.locate_copied(work, index - work.rotating_units);
  }

  // The lanes are on their way before anything waits for a position or a table row.
  const int64_t in_offset = Side::offset(side.in_strides, at);
  const T* in = static_cast<const T*>(side.in) + in_offset;
  Vector<T, kLanes> x[decltype(unit)::kVectors];
  unit.load_lanes(in, side.in_d, x);

  const int64_t b = side.first[kBatch] + side.along(at, kBatch);
  const int64_t s = side.first[kSequence] + side.along(at, kSequence);
  uint32_t h = side.along(at, kHead);
  T* out = static_cast<T*>(side.out);
  bool writes = true;
  if (work.rows.out_rows.data != nullptr) {
    const int64_t out_row = output_row(work.rows, b, s);
    FUSED_ROPE_DEVICE_CHECK(out_row == -1 || is_row(out_row, work.rows.out_rows_limit));
    if (side.scattered) {
      writes = out_row >= 0;
      out += multiply_add(side.out_h, h, out_row * side.out_row);
    }
  }
  if (side.same_strides) {
    out += in_offset;
  } else if (!side.scattered) {
    out += Side::offset(side.out_strides, at);
  }

  if (rotates) {
    rotates = unit.load_rows(work, axes, b, s, side.first[kHead] + h);
    if (!rotates && work.in_place) return;
  }
  while (true) {
    if (rotates) unit.rotate(work, x);
    if (writes) unit.store_lanes(out, side.out_d, x, work.streaming);
    h += side.head_step;
    if (h >= side.heads) return;
    in += multiply_add(side.in_h, side.head_step, 0);
    out += multiply_add(side.out_h, side.head_step, 0);
    unit.load_lanes(in, side.in_d, x);
  }
}

// Chooses the instance of the kernel for a plan and launches it: once for q and k together, unless
// one of them is so large that it needs several boxes.
template <typename T, typename Table, Precision kPrecision, typename Axes>
cudaError_t launch_instance(const RotateParams& p, const Plan& plan, const Axes& axes,
                            cudaStream_t stream) {
  constexpr int kLanes = kVectorBytes / sizeof(T);
  auto* kernel = rotate_kernel<T, Table, kPrecision, Arrangement::kPair, 1, Axes>;
  if (plan.vector > 1) {
    kernel = plan.arrangement == Arrangement::kPair
                 ? rotate_kernel<T, Table, kPrecision, Arrangement::kPair, kLanes, Axes>
             : plan.arrangement == Arrangement::kShuffle
                 ? rotate_kernel<T, Table, kPrecision, Arrangement::kShuffle, kLanes, Axes>
                 : rotate_kernel<T, Table, kPrecision, Arrangement::kAdjacent, kLanes, Axes>;
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
    for_each_box(t, {{0, 0, 0}, {p.B, p.S, t.H}}, plan.units, [&](const Box& box) {
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

template <typename T, typename Table>
cudaError_t launch_table(const RotateParams& p, const Plan& plan, cudaStream_t stream) {
  const auto run = [&]<Precision kPrecision>() {
    if (p.axes == nullptr) return launch_instance<T, Table, kPrecision>(p, plan, NoAxes{}, stream);
    PairAxes axes;
    for (int64_t j = 0; j < p.lanes.P; ++j) axes.axis[j] = static_cast<uint8_t>(p.axes[j]);
    return launch_instance<T, Table, kPrecision>(p, plan, axes, stream);
  };
  if constexpr (sizeof(T) == 2) {  // in float32 and float64 the two precisions are one
    if (p.precision == Precision::kModel) return run.template operator()<Precision::kModel>();
  }
  return run.template operator()<Precision::kFp32>();
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
