// The kernels for the published layer: 8 heads of 32 channels, 4 levels of 4 points. They do what the kernels of
// kernels.cuh do for any sizes, with fewer instructions (docs/ops.md has the counts).
//
// The lane that works out a sample leaves in shared memory what its team needs of it. Where the sample's pixels lie in
// the map in all rows of the warp, loads need no condition; other samples take the functions of kernels.cuh. So the
// last bits of a row can depend on the rows beside it. They are the same each time for the same inputs.
#pragma once

#include "kernels.cuh"

namespace deformable {

/// The compiler knows all sizes but those of the images, so addresses, divisions and loops cost little. The constants
/// hide the numbers of the same names in Geometry.
struct PublishedGeometry : Geometry {
  static constexpr int heads = 8, channels = 32, levels = 4, points = 4;
  __host__ __device__ static constexpr int samples() { return levels * points; }
  __host__ __device__ static constexpr int pixel_stride() { return heads * channels; }
};

template <class T>
constexpr int kPublishedTeam = PublishedGeometry::channels / kVector<T>;

/// What each lane leaves of its sample for the team.
template <class A>
struct Slots {
  struct alignas(16) Factors {
    A of[4];  // bilinear * attention weight, of the four pixels
  };
  struct alignas(8) Place {  // in bytes; 32 bits are enough, as the launch checks
    uint32_t offset;         // of the upper left pixel, in the image
    uint32_t pitch;          // from one row of the map to the next
  };
  static constexpr int kBytes = sizeof(Factors) + sizeof(Place);  // of a thread

  Factors* factors = static_cast<Factors*>(shared_memory());
  Place* places = reinterpret_cast<Place*>(factors + blockDim.x);

  __device__ __forceinline__ void put(const Sample<A>& sample, uint32_t pixel_bytes) const {
    Factors mine;
#pragma unroll
    for (int k = 0; k < 4; ++k) mine.of[k] = sample.weight * sample.bilinear(k);
    factors[threadIdx.x] = mine;
    places[threadIdx.x] = {sample.token * pixel_bytes, sample.pitch * pixel_bytes};
  }
};

/// Bit i is set where `condition` holds in the i-th lane of every team of the warp.
template <int size>
__device__ __forceinline__ unsigned in_all_teams(bool condition) {
  unsigned lanes = __ballot_sync(kAllLanes, condition);
#pragma unroll
  for (int step = size; step < kWarp; step *= 2) lanes &= lanes >> step;
  return lanes & ((1u << size) - 1);
}

template <class X>
__device__ __forceinline__ X* bytes_on(X* base, uint32_t bytes) {
  using Byte = std::conditional_t<std::is_const_v<X>, const char, char>;
  return reinterpret_cast<X*>(reinterpret_cast<Byte*>(base) + bytes);
}

/// A sample's four pixels, without a condition.
template <int V, class T, class Place>
__device__ __forceinline__ void load_pixels(Pack<T, V> (&pixel)[4], const T* map, const Place& place) {
  const T* upper = bytes_on(map, place.offset);
  const T* lower = bytes_on(upper, place.pitch);
  pixel[0] = load<V>(upper);
  pixel[1] = load<V>(upper + PublishedGeometry::pixel_stride());
  pixel[2] = load<V>(lower);
  pixel[3] = load<V>(lower + PublishedGeometry::pixel_stride());
}

/// The first pixel of the row's map, at the lane's first channel.
template <class X>
__device__ __forceinline__ X* map_of(X* values, const Row& row, const PublishedGeometry& geometry, int channel) {
  return values + static_cast<int64_t>(row.image) * geometry.tokens * geometry.pixel_stride() +
         row.head * geometry.channels + channel;
}

// ---- forward -------------------------------------------------------------------------------------------------------

/// As forward_kernel.
template <class T, class Source>
__global__ void __launch_bounds__(kForwardThreads, 2)
    published_forward_kernel(const T* __restrict__ value, Source source, T* __restrict__ out, Teams teams,
                             const __grid_constant__ PublishedGeometry geometry) {
  using A = Accumulate<T>;
  constexpr int V = kVector<T>, size = kPublishedTeam<T>;
  // Samples whose loads are on their way together. 8 channels, or sums in float64, leave registers for one.
  constexpr int kAhead = std::is_same_v<T, float> ? 2 : 1;
  constexpr unsigned kGroup = (1u << kAhead) - 1;
  const int lane = threadIdx.x % size, team = threadIdx.x - lane, channel = lane * V;
  const Row row = find_row(geometry, {size, teams.blocks});
  if (row.warp_is_idle) return;
  source.begin(row, geometry, lane, size);
  const T* map = map_of(value, row, geometry, channel);
  const Slots<A> slots;

  A total[V] = {};
#pragma unroll 1  // one copy of this long code is enough for the instruction cache
  for (int first = 0; first < geometry.samples(); first += size) {
    const Sample<A> mine = take_sample<A>(source, row, geometry, first + lane);
    slots.put(mine, geometry.pixel_stride() * sizeof(T));
    // A weight that is not finite must meet the sampled value, not the pixels: add_sample does that.
    const unsigned inside = in_all_teams<size>(mine.corners == 15 && std::isfinite(mine.weight));
    unsigned left = (1u << size) - 1;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < size; i += kAhead) {
      if ((inside >> i & kGroup) != kGroup) continue;
      left &= ~(kGroup << i);
      Pack<T, V> pixel[kAhead][4];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) load_pixels(pixel[j], map, slots.places[team + i + j]);
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const auto factors = slots.factors[team + i + j];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
#pragma unroll
          for (int v = 0; v < V; ++v) total[v] += factors.of[k] * pixel[j][k].template get<A>(v);
        }
      }
    }
#pragma unroll 1
    for (; left; left &= left - 1) {
      add_sample(total, from_lane(mine, __ffs(left) - 1, size), map, geometry.pixel_stride());
    }
    __syncwarp();  // all have read before the next samples come
  }
  if (row.valid) store(out + row.index * geometry.channels + channel, total);
}

// ---- backward ------------------------------------------------------------------------------------------------------

/// dot[j][k] of each lane, summed over the team; lane i is left with those of sample j = i % 2 in dot[0].
///
/// The first exchange halves what a lane cares for: fewer shuffles than sums of both samples for all lanes. Four
/// samples at a time would save more of them, but there are no registers for that.
template <int size, class A>
__device__ __forceinline__ void sum_for_owners(A (&dot)[2][4], int lane) {
  const bool odd = lane % 2;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const A kept = odd ? dot[1][k] : dot[0][k], given = odd ? dot[0][k] : dot[1][k];
    dot[0][k] = kept + __shfl_xor_sync(kAllLanes, given, 1);
#pragma unroll
    for (int step = 2; step < size; step *= 2) dot[0][k] += __shfl_xor_sync(kAllLanes, dot[0][k], step);
  }
}

/// The channels that a lane adds to the gradient of the values. They are not those that it reads: an atomic instruction
/// of a team covers neighbouring addresses, since the second-level cache adds to 32 bytes at a time.
template <class T>
struct Added {
  using A = Accumulate<T>;
  static constexpr int kStep = kAtomic<A, kVector<T>>, kParts = kVector<T> / kStep;
  static constexpr int kWider = sizeof(A) / sizeof(T);  // the slots count bytes of T

  A grad[kParts][kStep];

  __device__ static constexpr int channel(int part, int lane) { return (part * kPublishedTeam<T> + lane) * kStep; }

  __device__ __forceinline__ Added(const T* row_grad, int lane) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) unpack(grad[part], load<kStep>(row_grad + channel(part, lane)));
  }

  /// Adds to the four pixels of a sample inside the map; `map` is at the row's first channel.
  __device__ __forceinline__ void scatter(A* map, const typename Slots<A>::Factors& factors,
                                          const typename Slots<A>::Place& place, int lane) const {
    A* upper = bytes_on(map, place.offset * kWider);
    A* lower = bytes_on(upper, place.pitch * kWider);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      A* pixel = (k & 2 ? lower : upper) + (k & 1) * PublishedGeometry::pixel_stride();
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        A x[kStep];
#pragma unroll
        for (int v = 0; v < kStep; ++v) x[v] = factors.of[k] * grad[part][v];
        atomic_add(pixel + channel(part, lane), x);
      }
    }
  }
};

/// Blocks that a multiprocessor has registers for, without keeping some in memory.
template <class T>
constexpr int kBackwardBlocks = std::is_same_v<T, float> ? 4 : std::is_same_v<T, double> ? 2 : 3;

/// Gradients of locations and weights, or of offsets and logits, and sums in grad_value, which must be zero before.
/// Nothing is stored in between.
template <class T, class Source, class U>
__global__ void __launch_bounds__(kBackwardThreads, kBackwardBlocks<T>)
    published_backward_kernel(const T* __restrict__ grad, const T* __restrict__ value, Source source,
                              Accumulate<T>* __restrict__ grad_value, PointGradients<U> grads, Teams teams,
                              const __grid_constant__ PublishedGeometry geometry) {
  using A = Accumulate<T>;
  constexpr int V = kVector<T>, size = kPublishedTeam<T>, kTurns = geometry.samples() / size;
  constexpr int kBatch = 2;  // samples whose sums are exchanged together
  const int lane = threadIdx.x % size, team = threadIdx.x - lane, channel = lane * V;
  const Row row = find_row(geometry, {size, teams.blocks});
  if (row.warp_is_idle) return;
  source.begin(row, geometry, lane, size);
  const T* map = map_of(value, row, geometry, channel);
  A* grad_map = map_of(grad_value, row, geometry, 0);
  const T* row_grad = grad + row.index * geometry.channels;
  A out_grad[V];
  unpack(out_grad, load<V>(row_grad + channel));
  const Added<T> added(row_grad, lane);
  const Slots<A> slots;

  A weights[kTurns] = {}, weight_slopes[kTurns] = {};  // of this lane's samples
#pragma unroll 1  // one copy of this long code is enough for the instruction cache
  for (int turn = 0; turn < kTurns; ++turn) {
    const int i = turn * size + lane;
    const Sample<A> mine = take_sample<A>(source, row, geometry, i);
    slots.put(mine, geometry.pixel_stride() * sizeof(T));
    const unsigned inside = in_all_teams<size>(mine.corners == 15);
    __syncwarp();

    A my_dot[4] = {};
#pragma unroll 1
    for (int first = 0; first < size; first += kBatch) {
      A dot[kBatch][4];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        if (inside >> (first + j) & 1) {
          const auto place = slots.places[team + first + j];
          Pack<T, V> pixel[4];
          load_pixels(pixel, map, place);
#pragma unroll
          for (int k = 0; k < 4; ++k) dot[j][k] = inner_product(out_grad, pixel[k]);
          if (row.valid) added.scatter(grad_map, slots.factors[team + first + j], place, lane);
        } else {
          const Sample<A> sample = from_lane(mine, first + j, size);
          corner_dots(dot[j], sample, out_grad, map, geometry.pixel_stride());
          if (row.valid) scatter(grad_map + channel, sample, out_grad, geometry.pixel_stride());
        }
      }
      sum_for_owners<size>(dot, lane);
#pragma unroll
      for (int k = 0; k < 4; ++k) my_dot[k] = lane / kBatch == first / kBatch ? dot[0][k] : my_dot[k];
    }

    const Slopes<A> slope = source_slopes(source, row, geometry, i, mine, slopes(mine, my_dot));
    if (row.valid) {
      U* location = grads.locations + 2 * (row.index * geometry.samples() + i);
      location[0] = static_cast<U>(slope.x);
      location[1] = static_cast<U>(slope.y);
    }
#pragma unroll
    for (int t = 0; t < kTurns; ++t) {  // an index known to the compiler keeps the arrays in registers
      weights[t] = t == turn ? mine.weight : weights[t];
      weight_slopes[t] = t == turn ? slope.weight : weight_slopes[t];
    }
    __syncwarp();  // all have read before the next samples come
  }

  A mean = 0;
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) mean += weights[turn] * weight_slopes[turn];
  if constexpr (Source::kSoftmax) mean = team_sum(mean, size);
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    if (Source::kSoftmax) weight_slopes[turn] = weights[turn] * (weight_slopes[turn] - mean);
    if (row.valid) {
      grads.weights[row.index * geometry.samples() + turn * size + lane] = static_cast<U>(weight_slopes[turn]);
    }
  }
}

}  // namespace deformable
