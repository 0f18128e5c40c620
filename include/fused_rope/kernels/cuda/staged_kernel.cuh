// The CUDA kernel for x whose place, widths or axes rule out vectors of 16 bytes in each thread.
#pragma once

#include "fused_rope/kernels/cuda/kernel.cuh"

namespace fused_rope::kernels {

using VectorBytes = Vector<uint32_t, kVectorBytes / 4>;

__device__ __forceinline__ uint32_t misalignment(const void* data) {
  return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(data) % kVectorBytes);
}

// The part of a contiguous span in one of the aligned vectors that it touches: bytes [begin, end)
// of the vector.
struct Piece {
  int32_t begin, end;

  __device__ __forceinline__ Piece(const void* span, uint32_t vector, uint32_t span_bytes) {
    const auto start = static_cast<int32_t>(misalignment(span) - vector * kVectorBytes);
    begin = max(start, 0);
    end = min(start + static_cast<int32_t>(span_bytes), kVectorBytes);
  }
  __device__ __forceinline__ bool is_whole() const { return begin == 0 && end == kVectorBytes; }

  // Copies its elements from one aligned vector to another.
  template <typename T>
  __device__ __forceinline__ void copy(const char* from, char* to) const {
#pragma unroll
    for (int i = 0; i < kVectorBytes; i += int{sizeof(T)}) {
      if (i >= begin && i < end)
        *reinterpret_cast<T*>(to + i) = *reinterpret_cast<const T*>(from + i);
    }
  }
};

// Sixteen bytes of shared memory from any place.
__device__ __forceinline__ VectorBytes load_unaligned(const char* from) {
  const uint32_t shift = misalignment(from);
  if (shift == 0) return *reinterpret_cast<const VectorBytes*>(from);
  const auto* word = reinterpret_cast<const uint32_t*>(from - shift % 4);
  VectorBytes bytes;
#pragma unroll
  for (int i = 0; i < kVectorBytes / 4; ++i) {
    const uint64_t both = uint64_t{word[i + 1]} << 32 | word[i];
    bytes.element[i] = static_cast<uint32_t>(both >> shift % 4 * 8);
  }
  return bytes;
}

// The chunks of a block. They follow one another in memory, and start in shared memory as many
// bytes after a multiple of 16 as in the input.
struct BlockSpan {
  uint32_t first, count;  // chunks
  LinearCoordinates at;   // of the first one
  uint32_t bytes;
  const char* in;

  __device__ __forceinline__ BlockSpan(const KernelParams& params, const TensorArgs& tensor,
                                       const LookupArgs& lookups, uint32_t block) {
    const uint32_t run = lookups.per_run.div(block);
    const uint32_t chunk = (block - run * lookups.run_blocks) * params.chunks.count;
    first = run * lookups.run_chunks + chunk;
    count = min(params.chunks.count, lookups.run_chunks - chunk);
    at = tensor.locate(first);
    bytes = count * params.chunks.bytes;
    in = tensor.in + tensor.in_offset.at(at);
  }

  // How many vectors the span touches at `place`.
  __device__ __forceinline__ uint32_t vectors(const void* place) const {
    return (misalignment(place) + bytes + kVectorBytes - 1) / kVectorBytes;
  }

  // Starts to copy a vector of the input to shared memory.
  template <typename T>
  __device__ __forceinline__ void load_vector(VectorBytes* shared, uint32_t vector) const {
    const char* from = in - misalignment(in) + vector * kVectorBytes;
    const Piece piece(in, vector, bytes);
    if (piece.is_whole())
      copy_async(shared[vector], from, true);
    else
      piece.template copy<T>(from, reinterpret_cast<char*>(shared + vector));
  }

  // Stores a vector of the output from shared memory, where the span starts at `shared`.
  template <typename T>
  __device__ __forceinline__ void store_vector(const KernelParams& params, const char* shared,
                                               char* out, uint32_t vector) const {
    const auto start = static_cast<int32_t>(vector * kVectorBytes - misalignment(out));
    const Piece piece(out, vector, bytes);
    if (piece.is_whole())
      store(reinterpret_cast<uint32_t*>(out + start), load_unaligned(shared + start),
            params.store_policy, true);
    else
      piece.template copy<T>(shared + start, out + start);
  }
};

// What a block looks up in shared memory, after its span.
struct SharedRows {
  RowPointers* rows;  // [chunk, axis]; null where pairs are copied
  uint8_t* axis;      // of each pair

  __device__ __forceinline__ SharedRows(const ChunkArgs& chunks, char* after_span)
      : rows(reinterpret_cast<RowPointers*>(after_span)),
        axis(reinterpret_cast<uint8_t*>(rows + chunks.count * chunks.axes)) {}

  // All threads of the block must call it.
  __device__ __forceinline__ void look_up(const KernelParams& params, const TensorArgs& tensor,
                                          const LookupArgs& lookups, const PairAxes& axes,
                                          const BlockSpan& span) const {
    const uint32_t count = params.chunks.axes;
    const int flags = params.row_flags;
    if (count > 1) {
      for (uint32_t j = threadIdx.x; j < params.chunks.pairs; j += blockDim.x)
        axis[j] = axes.axis[j];
    }
    const auto find = [&](const TileToken& token, uint32_t i, const SequencePosition& place) {
      RowPointers& found = rows[i * count + token.axis];
      if (flags & kGathered) {
        found = gathered_row(tensor, lookups, token.at, false);
        return;
      }
      const Row row = find_row(params, flags, PlacedToken{token, place});
      found = row.copied ? RowPointers{nullptr, nullptr} : pointers_to(params, tensor, row.index);
    };
    if (flags & kHasSequences) {
      share_in_warps(span.count, count, [&](uint32_t i, uint32_t lane) {
        const LinearCoordinates at = tensor.locate(span.first + i);
        const TileToken token = {params, tensor, lookups, at, lane};
        const SequencePosition place = find_sequence_in_warp(params.rows, token.s());
        if (axes.is_used(lane)) find(token, i, place);
      });
      return;
    }
    for (uint32_t i = threadIdx.x; i < span.count * kMaxAxes; i += blockDim.x) {
      const LinearCoordinates at = tensor.locate(span.first + i / kMaxAxes);
      const uint32_t axis = i % kMaxAxes;
      if (axes.is_used(axis))
        find(TileToken{params, tensor, lookups, at, axis}, i / kMaxAxes, SequencePosition{0, 0});
    }
    sync_block();
  }
};

// What one thread rotates of a chunk: the same pairs of every head.
template <typename Traits>
struct Rotation {
  using T = typename Traits::Element;
  uint32_t chunk;
  ThreadTile<Traits> tile;
  uint32_t pairs;  // that are not copied

  // Loads the entries of rotation i of a block, if it exists.
  __device__ __forceinline__ Rotation(const KernelParams& params, const TensorArgs& tensor,
                                      const BlockSpan& span, const SharedRows& shared, uint32_t i)
      : chunk(params.chunks.per_rotation.div(i)),
        tile(params, i - chunk * params.rotating_threads) {
    const bool exists = i < span.count * params.rotating_threads;
    if constexpr (is_linear(Traits::kLookup)) {
      const char* cos = tensor.cos + tensor.row_offset.at(tensor.locate(span.first + chunk));
      const RowPointers row = {cos, cos + tensor.sin_after_cos};
      pairs = tile.load_entries(params, exists, [&](uint32_t) { return row; });
    } else {
      const uint32_t axes = params.chunks.axes;
      const RowPointers* rows = shared.rows + chunk * axes;
      const RowPointers row = exists ? rows[0] : RowPointers{nullptr, nullptr};
      pairs = tile.load_entries(params, exists, [&](uint32_t j) {
        return exists && axes > 1 ? rows[shared.axis[j]] : row;
      });
    }
  }

  // head: the chunk in shared memory. kAll: no pair is copied.
  template <bool kAll, bool kSingleElements>
  __device__ __forceinline__ void rotate_heads(T* head, uint32_t heads, uint32_t D) const {
    using Part = Vector<T, kSingleElements ? 1 : Traits::kVectorSize>;
    constexpr int kParts = sizeof(Vector<T, Traits::kVectorSize>) / sizeof(Part);
#pragma unroll
    for (uint32_t h = 0; h < kMaxChunkHeads; ++h, head += D) {
      if (h >= heads) break;
      typename ThreadTile<Traits>::Vectors x;
      const auto move = [&](const auto& f) {
#pragma unroll
        for (int i = 0; i < Traits::kVectors; ++i) {
#pragma unroll
          for (int k = 0; k < kParts; ++k)
            f(reinterpret_cast<Part*>(head + tile.start[i])[k], reinterpret_cast<Part*>(&x[i])[k]);
        }
      };
      move([](const Part& shared, Part& part) { part = shared; });
      tile.template rotate<kAll>(x, pairs);
      move([](Part& shared, const Part& part) { shared = part; });
    }
  }

  __device__ __forceinline__ void rotate(const ChunkArgs& chunks, char* span) const {
    T* head = reinterpret_cast<T*>(span + chunk * chunks.bytes);
    const auto rotate_all = [&]<bool kAll>() {
      if (Traits::kVectorSize > 1 && chunks.single_elements)
        rotate_heads<kAll, true>(head, chunks.heads, chunks.D);
      else
        rotate_heads<kAll, false>(head, chunks.heads, chunks.D);
    };
    if (is_linear(Traits::kLookup) || pairs == tile.kAllPairs)
      rotate_all.template operator()<true>();
    else
      rotate_all.template operator()<false>();
  }
};

// Rotates the span of a block in shared memory, where it starts at `staged`. `wait` waits for it.
template <typename Traits, typename Wait>
__device__ __forceinline__ void rotate_span(const KernelParams& params, const TensorArgs& tensor,
                                            const BlockSpan& span, const SharedRows& rows,
                                            char* staged, const Wait& wait) {
  const uint32_t rotations = span.count * params.rotating_threads;
  Rotation<Traits> rotation(params, tensor, span, rows, threadIdx.x);
  wait();
  sync_block();
  for (uint32_t i = threadIdx.x; i < rotations; i += blockDim.x) {
    if (i != threadIdx.x) rotation = Rotation<Traits>(params, tensor, span, rows, i);
    rotation.rotate(params.chunks, staged);
  }
  sync_block();
}

// A block copies its span to shared memory in vectors of 16 bytes, rotates pairs there, and copies
// it back. Without look-ups, all vectors are whole and pass through registers: 0.95 to 1.00 of a
// clone instead of 0.83 to 0.99 with asynchronous copies.
template <typename Traits>
__global__ void __launch_bounds__(kStagedThreads, fitting_blocks(kMinStagedBlocks, kStagedThreads))
    rotate_staged_kernel(const __grid_constant__ KernelParams params,
                         const __grid_constant__ AxesOf<Traits::kLookup> axes) {
  using T = typename Traits::Element;
  const TileBlock assigned = assign_block<Traits::kLookup>(params, blockIdx.x);
  const TensorArgs& tensor = params.tensors[assigned.is_second];
  const LookupArgs& lookups = params.lookups[assigned.is_second];
  const BlockSpan span(params, tensor, lookups, assigned.block);
  auto* shared = static_cast<VectorBytes*>(shared_memory());
  const SharedRows rows(params.chunks, reinterpret_cast<char*>(shared + params.chunks.vectors));
  char* const staged = reinterpret_cast<char*>(shared) + misalignment(span.in);
  char* out = tensor.out + tensor.out_offset.at(span.at);

  if constexpr (is_linear(Traits::kLookup)) {
    const uint32_t vectors = span.bytes / kVectorBytes;
    const auto* from = reinterpret_cast<const uint32_t*>(span.in);
    VectorBytes loaded[kStagedLoads];
#pragma unroll
    for (int i = 0; i < kStagedLoads; ++i) {
      const uint32_t vector = threadIdx.x + i * blockDim.x;
      loaded[i] = load<kVectorBytes / 4>(from + vector * (kVectorBytes / 4), params.load_policy,
                                         vector < vectors);
    }
    rotate_span<Traits>(params, tensor, span, rows, reinterpret_cast<char*>(shared), [&] {
#pragma unroll
      for (int i = 0; i < kStagedLoads; ++i) {
        const uint32_t vector = threadIdx.x + i * blockDim.x;
        if (vector < vectors) shared[vector] = loaded[i];
      }
      for (uint32_t i = threadIdx.x + kStagedLoads * blockDim.x; i < vectors; i += blockDim.x)
        shared[i] = reinterpret_cast<const VectorBytes*>(span.in)[i];
    });
    for (uint32_t i = threadIdx.x; i < vectors; i += blockDim.x) {
      const VectorBytes stored = shared[i];
      store(reinterpret_cast<uint32_t*>(out) + i * (kVectorBytes / 4), stored, params.store_policy,
            true);
    }
  } else {
    for (uint32_t i = threadIdx.x; i < span.vectors(span.in); i += blockDim.x)
      span.load_vector<T>(shared, i);
    rows.look_up(params, tensor, lookups, axes, span);
    rotate_span<Traits>(params, tensor, span, rows, staged, [] {
      commit_copies();
      wait_for_copies<0>();
    });
    if (params.row_flags & kHasOutRows) {
      const TileToken token = {params, tensor, lookups, span.at, 0};
      if (!to_out_row<T>(params, lookups, token, out)) return;
    }
    for (uint32_t i = threadIdx.x; i < span.vectors(out); i += blockDim.x)
      span.store_vector<T>(params, staged, out, i);
  }
}

}  // namespace fused_rope::kernels
