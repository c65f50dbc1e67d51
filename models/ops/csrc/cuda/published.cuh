// The kernels for the published layer: 8 heads of 32 channels, 4 levels of 4 points. They do what the kernels of
// kernels.cuh do for any sizes, in less than half of the instructions.
//
// The lane that works out a sample leaves in shared memory what its team needs of it. Where the sample's pixels lie in
// the map in all rows of the warp, loads need no condition; other samples take the functions of kernels.cuh. So the last
// bits of a row can depend on the rows beside it, and are the same each time for the same inputs.
#pragma once

#include "kernels.cuh"

namespace deformable {

/// The compiler knows all sizes but those of the images, so addresses, divisions and loops cost little.
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

template <class T, class Source>
__global__ void __launch_bounds__(kForwardThreads, 2)
    published_forward_kernel(const T* __restrict__ value, Source source, T* __restrict__ out, Teams teams,
                             const __grid_constant__ PublishedGeometry geometry) {
  using A = Accumulate<T>;
  constexpr int V = kVector<T>, size = kPublishedTeam<T>;
  // Samples whose loads are on their way together; where channels or sums are wide, there are registers for one.
  constexpr int kAhead = std::is_same_v<T, float> ? 2 : 1;
  constexpr unsigned kGroup = (1u << kAhead) - 1;
  const int lane = threadIdx.x % size, team = threadIdx.x - lane, channel = lane * V;
  const Row row = find_row(geometry, {size, teams.blocks});
  if (row.warp_is_idle) return;
  source.begin(row, geometry, lane, size);
  const T* map = map_of(value, row, geometry, channel);
  const Slots<A> slots;

  A total[V] = {};
#pragma unroll 1  // the code of both turns would not fit the instruction cache
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

}  // namespace deformable
