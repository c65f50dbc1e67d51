// The kernels of multi-scale deformable attention; letters and terms are explained in sampling.cuh.
#pragma once

#include "sampling.cuh"

namespace deformable {

constexpr int kForwardThreads = 512;
constexpr int kBackwardThreads = 256;
constexpr int kThreads = 256;  // of the small kernels

/// kChannels is D where the compiler should know it, else 0.
template <int kChannels, int V>
__device__ __forceinline__ int team_size(const Teams& teams) {
  return kChannels ? kChannels / V : teams.size;
}

// ---- forward -------------------------------------------------------------------------------------------------------

/// total += weight * the bilinear sample of V channels; `base` is the image's first pixel, this head's channel.
template <int V, class T, class A>
__device__ __forceinline__ void add_sample(A (&total)[V], const Sample<A>& sample, const T* base, int pixel_stride) {
  Pack<T, V> pixel[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) pixel[k] = load<V>(pixels_on(base, sample.token_of(k), pixel_stride), sample.has(k));
  A sampled[V] = {};
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const A bilinear = sample.bilinear(k);
#pragma unroll
    for (int v = 0; v < V; ++v) sampled[v] += bilinear * pixel[k].template get<A>(v);
  }
  // The weight comes last: outside it meets a plain zero, so that what is not finite shows, as in the reference.
#pragma unroll
  for (int v = 0; v < V; ++v) total[v] += sample.weight * sampled[v];
}

/// value [B, S, M, D] at the source's points -> out [B, Q, M * D].
template <class T, int V, int kChannels, class Source>
__global__ void __launch_bounds__(kForwardThreads, kChannels ? 2 : 1)
    forward_kernel(const T* __restrict__ value, Source source, T* __restrict__ out, Teams teams,
                   const __grid_constant__ Geometry geometry) {
  using A = Accumulate<T>;
  // Two samples in turn, so that some of their loads overlap: with 64 registers ptxas for sm_90 issues three of the eight loads,
  // waits, and issues the rest. For 8 channels there are no registers for a second sample.
  [[maybe_unused]] constexpr int kAhead = V > 4 ? 1 : 2;
  const int size = team_size<kChannels, V>(teams), lane = threadIdx.x % size;
  const int channels = kChannels ? kChannels : geometry.channels;
  const Row row = find_row(geometry, {size, teams.blocks});
  if (row.warp_is_idle) return;
  source.begin(row, geometry, lane, size);
  const T* map = value + (static_cast<int64_t>(row.image) * geometry.tokens * geometry.heads + row.head) * channels;
  for (int chunk = 0; chunk < channels; chunk += size * V) {
    const int channel = chunk + lane * V;
    const bool has_channel = kChannels || channel < channels;
    A total[V] = {};
    for (int first = 0; first < geometry.samples(); first += size) {
      const Sample<A> mine = take_sample<A>(source, row, geometry, first + lane);
      const int count = min(size, geometry.samples() - first);
#pragma unroll kAhead
      for (int i = 0; i < count; ++i) {
        Sample<A> sample = from_lane(mine, i, size);
        if (!has_channel) sample.corners = 0;
        add_sample(total, sample, map + channel, geometry.heads * channels);
      }
    }
    if (row.valid && has_channel) store(out + row.index * channels + channel, total);
  }
}

// ---- backward ------------------------------------------------------------------------------------------------------

/// The derivatives of <grad, output> for one sample's x, y (in pixels, without the weight) and weight.
template <class A>
struct Slopes {
  A x = 0, y = 0, weight = 0;
};

template <class A>
__device__ __forceinline__ Slopes<A> slopes(const Sample<A>& sample, const A (&dot)[4]) {
  Slopes<A> slope;
  slope.x = (dot[1] - dot[0]) * (1 - sample.y) + (dot[3] - dot[2]) * sample.y;
  slope.y = (dot[2] - dot[0]) * (1 - sample.x) + (dot[3] - dot[1]) * sample.x;
#pragma unroll
  for (int k = 0; k < 4; ++k) slope.weight += sample.bilinear(k) * dot[k];
  return slope;
}

template <int V, class T, class A>
__device__ __forceinline__ A inner_product(const A (&grad)[V], const Pack<T, V>& pixel) {
  A sum = 0;
#pragma unroll
  for (int v = 0; v < V; ++v) sum += grad[v] * pixel.template get<A>(v);
  return sum;
}

/// <grad, pixel> over this lane's channels for the four corners; a corner outside the map counts as zero.
template <int V, class T, class A>
__device__ __forceinline__ void corner_dots(A (&dot)[4], const Sample<A>& sample, const A (&grad)[V], const T* base,
                                            int pixel_stride) {
  Pack<T, V> pixel[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) pixel[k] = load<V>(pixels_on(base, sample.token_of(k), pixel_stride), sample.has(k));
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    dot[k] = inner_product(grad, pixel[k]);
    if (!sample.has(k)) dot[k] = 0;  // also where the gradient is not finite
  }
}

template <int V, class A>
__device__ __forceinline__ void scatter(A* base, const Sample<A>& sample, const A (&grad)[V], int pixel_stride) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (!sample.has(k)) continue;
    const A factor = sample.weight * sample.bilinear(k);
    A part[V];
#pragma unroll
    for (int v = 0; v < V; ++v) part[v] = factor * grad[v];
    atomic_add(pixels_on(base, sample.token_of(k), pixel_stride), part);
  }
}

/// Gradients of locations or offsets [B, Q, M, L, P, 2], and of weights or logits [B, Q, M, L, P].
template <class U>
struct PointGradients {
  U* locations;
  U* weights;
};

/// Slopes for x, y of the point -> for the location or offset that it is made of. Outside samples get zeros, exactly.
template <class A, class Source, class G>
__device__ __forceinline__ Slopes<A> source_slopes(const Source& source, const Row& row, const G& geometry, int i,
                                                   const Sample<A>& sample, Slopes<A> slope) {
  if (!sample.corners) return {};
  slope.x *= sample.weight;
  slope.y *= sample.weight;
  const int level = static_cast<unsigned>(i) / static_cast<unsigned>(geometry.points);
  source.through_point(slope.x, slope.y, row, geometry, level);
  return slope;
}

/// Writes the gradients of sample i, or adds to those of the channels before.
template <class A>
__device__ __forceinline__ void put_slopes(const PointGradients<A>& grads, const Located<A>& source, const Row& row,
                                           const Geometry& geometry, int i, const Sample<A>& sample, Slopes<A> slope,
                                           bool add) {
  slope = source_slopes(source, row, geometry, i, sample, slope);
  const int64_t at = row.index * geometry.samples() + i;
  A* location = grads.locations + 2 * at;
  location[0] = add ? location[0] + slope.x : slope.x;
  location[1] = add ? location[1] + slope.y : slope.y;
  grads.weights[at] = add ? grads.weights[at] + slope.weight : slope.weight;
}

/// grad [B, Q, M * D] -> the gradients of locations and weights and, unless grad_value is null, atomic sums in the
/// zeroed grad_value [B, S, M, D].
///
/// ptxas chooses the registers, except for float64, where for sm_80 it would take too few and keep some in memory.
template <class T, int V, int kChannels>
__global__ void __launch_bounds__(kBackwardThreads, std::is_same_v<T, double> ? 2 : 0)
    backward_kernel(const T* __restrict__ grad, const T* __restrict__ value, Located<Accumulate<T>> source,
                    Accumulate<T>* __restrict__ grad_value, PointGradients<Accumulate<T>> grads, Teams teams,
                    const __grid_constant__ Geometry geometry) {
  using A = Accumulate<T>;
  const int size = team_size<kChannels, V>(teams), lane = threadIdx.x % size;
  const int channels = kChannels ? kChannels : geometry.channels, pixel_stride = geometry.heads * channels;
  const Row row = find_row(geometry, {size, teams.blocks});
  if (row.warp_is_idle) return;
  const int64_t map = (static_cast<int64_t>(row.image) * geometry.tokens * geometry.heads + row.head) * channels;
  for (int chunk = 0; chunk < channels; chunk += size * V) {
    const int channel = chunk + lane * V;
    const bool has_channel = kChannels || channel < channels;
    A out_grad[V];
    unpack(out_grad, load<V>(grad + row.index * channels + channel, has_channel));
    for (int first = 0; first < geometry.samples(); first += size) {
      const Sample<A> mine = take_sample<A>(source, row, geometry, first + lane);
      Slopes<A> my_slopes;
      const int count = min(size, geometry.samples() - first);
      for (int i = 0; i < count; ++i) {
        Sample<A> sample = from_lane(mine, i, size);
        if (!has_channel) sample.corners = 0;
        A dot[4];
        corner_dots(dot, sample, out_grad, value + map + channel, pixel_stride);
        if (grad_value && row.valid) scatter(grad_value + map + channel, sample, out_grad, pixel_stride);
        Slopes<A> slope = slopes(sample, dot);
        slope.x = team_sum(slope.x, size);
        slope.y = team_sum(slope.y, size);
        slope.weight = team_sum(slope.weight, size);
        if (i == lane) my_slopes = slope;
      }
      if (row.valid && lane < count) {
        put_slopes(grads, source, row, geometry, first + lane, mine, my_slopes, chunk > 0);
      }
    }
  }
}

// ---- gradient of the values in a fixed order -----------------------------------------------------------------------

constexpr int kTileBytes = 16384;
template <class A>
constexpr int kTilePixels = kTileBytes / (kWarp * sizeof(A));

/// Level l is cut into tiles of `pixels[l]` neighbouring pixels; `first[l]` is its first tile in an image and head.
struct Tiles {
  int pixels[kMaxLevels], first[kMaxLevels + 1];
  int chunks;  // of 32 channels
};

/// One tile of one head's map, 32 of its channels: lane c sums channel c, and so owns it.
struct Tile {
  int image, head, level, channel;
  int begin, end;  // tokens of the image
};

__device__ __forceinline__ Tile find_tile(int64_t job, const Geometry& geometry, const Tiles& tiles) {
  Tile tile;
  const int count = tiles.first[geometry.levels];
  const int number = static_cast<int>(job % count);
  job /= count;
  tile.channel = static_cast<int>(job % tiles.chunks) * kWarp + threadIdx.x;
  job /= tiles.chunks;
  tile.head = static_cast<int>(job % geometry.heads);
  tile.image = static_cast<int>(job / geometry.heads);
  tile.level = 0;
  while (number >= tiles.first[tile.level + 1]) ++tile.level;
  const int level_end = geometry.start[tile.level] + geometry.height[tile.level] * geometry.width[tile.level];
  tile.begin = geometry.start[tile.level] + (number - tiles.first[tile.level]) * tiles.pixels[tile.level];
  tile.end = min(tile.begin + tiles.pixels[tile.level], level_end);
  return tile;
}

/// Sample i of all that a tile's level and head take part in, in the order of queries, then points; only corners within
/// the tile count.
template <class A>
__device__ __forceinline__ Sample<A> sample_on_tile(const Tile& tile, const Located<A>& source,
                                                    const Geometry& geometry, int i, int64_t& row) {
  if (i >= geometry.queries * geometry.points) return {};
  const int query = i / geometry.points, point = i - query * geometry.points;
  row = (static_cast<int64_t>(tile.image) * geometry.queries + query) * geometry.heads + tile.head;
  const int64_t at = (row * geometry.levels + tile.level) * geometry.points + point;
  const A x = source.locations[2 * at], y = source.locations[2 * at + 1];
  Sample<A> sample = find_corners(source.place(x, y, A(0), geometry, tile.level), geometry, tile.level);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const bool within = sample.token_of(k) >= tile.begin && sample.token_of(k) < tile.end;
    if (!within) sample.corners &= ~(1 << k);
  }
  if (sample.corners) sample.weight = source.weights[at];  // few samples get here
  return sample;
}

template <class T, class A>
__device__ __forceinline__ void add_to_tile(A* sums, const Tile& tile, const Sample<A>& sample, A grad) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (sample.has(k)) sums[(sample.token_of(k) - tile.begin) * kWarp] += sample.weight * sample.bilinear(k) * grad;
  }
}

/// grad_value [B, S, M, D], every element written. A warp owns a tile, looks at all samples that could touch it and
/// adds those that do, one after the other: the same sum in the same order each time, and no atomics.
template <class T>
__global__ void __launch_bounds__(kWarp)
    ordered_value_gradient_kernel(const T* __restrict__ grad, Located<Accumulate<T>> source, T* __restrict__ grad_value,
                                  int64_t jobs, const __grid_constant__ Tiles tiles,
                                  const __grid_constant__ Geometry geometry) {
  using A = Accumulate<T>;
  __shared__ A all_sums[kTilePixels<A> * kWarp];
  A* sums = all_sums + threadIdx.x;  // a lane keeps to its own column, so none needs to wait for another
  const int samples = geometry.queries * geometry.points;  // of a level and head
  for (int64_t job = blockIdx.x; job < jobs; job += gridDim.x) {
    const Tile tile = find_tile(job, geometry, tiles);
    const bool has_channel = tile.channel < geometry.channels;
    for (int pixel = 0; pixel < tile.end - tile.begin; ++pixel) sums[pixel * kWarp] = 0;
    for (int first = 0; first < samples; first += kWarp) {
      int64_t my_row = 0;
      const Sample<A> mine = sample_on_tile(tile, source, geometry, first + static_cast<int>(threadIdx.x), my_row);
      unsigned hits = __ballot_sync(kAllLanes, mine.corners != 0);
      for (; hits; hits &= hits - 1) {
        const int lane = __ffs(hits) - 1;
        const Sample<A> sample = from_lane(mine, lane, kWarp);
        const int64_t row = __shfl_sync(kAllLanes, my_row, lane);
        const T* from = grad + row * geometry.channels + tile.channel;
        add_to_tile<T>(sums, tile, sample, has_channel ? static_cast<A>(*from) : A(0));
      }
    }
    const int64_t map = static_cast<int64_t>(tile.image) * geometry.tokens * geometry.heads + tile.head;
    T* to = grad_value + map * geometry.channels;
    for (int token = tile.begin; has_channel && token < tile.end; ++token) {
      pixels_on(to, token, geometry.pixel_stride())[tile.channel] = static_cast<T>(sums[(token - tile.begin) * kWarp]);
    }
  }
}

// ---- around the backward of raw offsets and logits -----------------------------------------------------------------

/// Raw inputs -> points in pixels and softmax weights, as the backward kernels take them.
template <class A, class U>
__global__ void __launch_bounds__(kThreads)
    locate_kernel(Raw<A, U> source, A* __restrict__ pixels, A* __restrict__ weights, Teams teams,
                  const __grid_constant__ Geometry geometry) {
  const int lane = threadIdx.x % teams.size;
  const Row row = find_row(geometry, teams);
  if (row.warp_is_idle) return;
  source.begin(row, geometry, lane, teams.size);
  for (int i = lane; row.valid && i < geometry.samples(); i += teams.size) {
    const Point<A> point = source.point(row, geometry, i, i / geometry.points);
    const int64_t at = row.index * geometry.samples() + i;
    pixels[2 * at] = point.x;
    pixels[2 * at + 1] = point.y;
    weights[at] = point.weight;
  }
}

/// Gradients for pixels and weights -> gradients of offsets and logits.
///
/// Softmax: grad_logit_i = weight_i * (grad_weight_i - sum over j of weight_j * grad_weight_j).
template <class A, class U>
__global__ void __launch_bounds__(kThreads)
    raw_gradient_kernel(Raw<A, U> source, const A* __restrict__ weights, PointGradients<A> grads,
                        U* __restrict__ grad_offsets, U* __restrict__ grad_logits, Teams teams,
                        const __grid_constant__ Geometry geometry) {
  const int lane = threadIdx.x % teams.size, samples = geometry.samples();
  const Row row = find_row(geometry, teams);
  if (row.warp_is_idle) return;
  A mean = 0;
  for (int i = lane; i < samples; i += teams.size) {
    mean += weights[row.index * samples + i] * grads.weights[row.index * samples + i];
  }
  mean = team_sum(mean, teams.size);
  for (int i = lane; row.valid && i < samples; i += teams.size) {
    const int64_t at = row.index * samples + i;
    A x = grads.locations[2 * at], y = grads.locations[2 * at + 1];
    source.through_point(x, y, row, geometry, i / geometry.points);
    grad_offsets[2 * at] = static_cast<U>(x);
    grad_offsets[2 * at + 1] = static_cast<U>(y);
    grad_logits[at] = static_cast<U>(weights[at] * (grads.weights[at] - mean));
  }
}

/// The gradient of the reference points [B, Q, L, 2 or 4]: a thread owns one (b, q, l, x or y) and sums over heads and
/// points in their order, so it is the same each time.
template <class A, class U>
__global__ void __launch_bounds__(kThreads)
    reference_gradient_kernel(Raw<A, U> source, const A* __restrict__ grad_pixels, A* __restrict__ grad_reference,
                              int64_t threads, const __grid_constant__ Geometry geometry) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (thread >= threads) return;
  const int axis = thread % 2;
  const int64_t query_level = thread / 2, query = query_level / geometry.levels;
  const int level = static_cast<int>(query_level % geometry.levels);
  A location = 0, size = 0;
  for (int head = 0; head < geometry.heads; ++head) {
    const int64_t at = ((query * geometry.heads + head) * geometry.levels + level) * geometry.points;
    for (int point = 0; point < geometry.points; ++point) {
      const A slope = grad_pixels[2 * (at + point) + axis];
      location += slope;
      if (source.coordinates == 4) size += slope * static_cast<A>(source.offsets[2 * (at + point) + axis]);
    }
  }
  const A scale = axis ? geometry.height[level] : geometry.width[level];
  A* to = grad_reference + query_level * source.coordinates;
  to[axis] = location * scale;
  // without points nothing was added, and there is nothing to divide by
  if (source.coordinates == 4) to[axis + 2] = geometry.points == 0 ? A(0) : size * scale * (A(0.5) / geometry.points);
}

}  // namespace deformable
