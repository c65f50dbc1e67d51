// Which kernels run for a call, and on how many threads, given plain pointers.
//
// `launch(kernel, blocks, threads, shared_bytes, arguments...)` is given by the caller; that of ops.cu uses the current
// stream.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <type_traits>

#include "kernels.cuh"
#include "published.cuh"

namespace deformable {

/// Can V channels of these arrays be moved at once?
template <class T>
bool fits_vectors(int channels, std::initializer_list<const void*> arrays) {
  const auto aligned = [](const void* array) { return reinterpret_cast<std::uintptr_t>(array) % 16 == 0; };
  return channels % kVector<T> == 0 && std::all_of(arrays.begin(), arrays.end(), aligned);
}

/// run(constant) with D as a constant for the compiler where it is a common one, else 0.
template <class Run>
void with_channels(int channels, const Run& run) {
  switch (channels) {
    case 16: return run(std::integral_constant<int, 16>{});
    case 32: return run(std::integral_constant<int, 32>{});  // 256 in 8 heads
    case 64: return run(std::integral_constant<int, 64>{});
    default: return run(std::integral_constant<int, 0>{});
  }
}

/// The smallest team whose lanes cover `items`, or a whole warp.
inline int team_for(int items) {
  int size = 1;
  while (size < items && size < kWarp) size *= 2;
  return size;
}

/// Few rows are spread over many small blocks, so that every multiprocessor gets some; many rows come in large blocks,
/// since queries next to each other read the same pixels, and a block shares a cache.
inline int threads_for(int64_t images, int rows, int team, int most) {
  constexpr int64_t kEnoughForAll = 1 << 18;
  return images * rows * team < kEnoughForAll ? 64 : most;
}

/// Can the kernels of published.cuh run? They move `kVector` channels at once, and count bytes of an image in 32 bits;
/// X is the widest type of a value, or of its gradient.
template <class X>
bool is_published(const Geometry& geometry) {
  using G = PublishedGeometry;
  return geometry.heads == G::heads && geometry.channels == G::channels && geometry.levels == G::levels &&
         geometry.points == G::points &&
         static_cast<uint64_t>(geometry.tokens) * G::pixel_stride() * sizeof(X) <= std::numeric_limits<uint32_t>::max();
}

template <class Launch, class... Parameters, class G, class... Arguments>
void launch_rows(const Launch& launch, void (*kernel)(Parameters...), int team, int most_threads, int shared_bytes,
                 int64_t images, const G& geometry, Arguments... arguments) {
  const int threads = threads_for(images, geometry.rows(), team, most_threads);
  const int rows_per_block = threads / team;
  const int blocks = (geometry.rows() + rows_per_block - 1) / rows_per_block;
  launch(kernel, images * blocks, threads, shared_bytes * threads, arguments..., Teams{team, blocks}, geometry);
}

template <class T, class Source, class Launch>
void forward(const Launch& launch, const T* value, const Source& source, T* out, int64_t images,
             const Geometry& geometry) {
  constexpr int V = kVector<T>;
  const int channels = geometry.channels;
  const auto run = [&](auto kernel, int team) {
    launch_rows(launch, kernel, team, kForwardThreads, 0, images, geometry, value, source, out);
  };
  if (!fits_vectors<T>(channels, {value, out})) return run(forward_kernel<T, 1, 0, Source>, team_for(channels));
  if (is_published<T>(geometry)) {
    return launch_rows(launch, published_forward_kernel<T, Source>, kPublishedTeam<T>, kForwardThreads,
                       Slots<Accumulate<T>>::kBytes, images, PublishedGeometry{geometry}, value, source, out);
  }
  with_channels(channels, [&](auto known) {
    run(forward_kernel<T, V, decltype(known)::value, Source>, team_for(channels / V));
  });
}

/// Can published_backward run, with sums aligned as torch's memory is?
template <class T>
bool is_published_backward(const Geometry& geometry, const T* grad, const T* value) {
  return is_published<Accumulate<T>>(geometry) && fits_vectors<T>(geometry.channels, {grad, value});
}

/// All gradients of `source` but that of reference points, in one kernel; sums in grad_value, which must be zero
/// before.
template <class T, class Source, class U, class Launch>
void published_backward(const Launch& launch, const T* grad, const T* value, const Source& source,
                        Accumulate<T>* grad_value, const PointGradients<U>& grads, int64_t images,
                        const Geometry& geometry) {
  launch_rows(launch, published_backward_kernel<T, Source, U>, kPublishedTeam<T>, kBackwardThreads,
              Slots<Accumulate<T>>::kBytes, images, PublishedGeometry{geometry}, grad, value, source, grad_value,
              grads);
}

/// Gradients of locations and weights; sums in grad_value, which must be zero before, unless it is null.
template <class T, class Launch>
void backward(const Launch& launch, const T* grad, const T* value, const Located<Accumulate<T>>& source,
              Accumulate<T>* grad_value, const PointGradients<Accumulate<T>>& grads, int64_t images,
              const Geometry& geometry) {
  constexpr int V = kVector<T>;
  const int channels = geometry.channels;
  if (grad_value && is_published_backward(geometry, grad, value)) {
    return published_backward(launch, grad, value, source, grad_value, grads, images, geometry);
  }
  const auto run = [&](auto kernel, int team) {
    launch_rows(launch, kernel, team, kBackwardThreads, 0, images, geometry, grad, value, source, grad_value, grads);
  };
  if (!fits_vectors<T>(channels, {grad, value, grad_value})) return run(backward_kernel<T, 1, 0>, team_for(channels));
  with_channels(channels, [&](auto known) {
    run(backward_kernel<T, V, decltype(known)::value>, team_for(channels / V));
  });
}

/// Tiles as large as shared memory allows on large levels, and at least some dozens a level, as each of a small level's
/// pixels is hit often.
template <class A>
Tiles cut_tiles(const Geometry& geometry) {
  constexpr int kTilesPerLevel = 64;
  Tiles tiles = {};
  tiles.chunks = (geometry.channels + kWarp - 1) / kWarp;
  for (int level = 0; level < geometry.levels; ++level) {
    const int pixels = geometry.height[level] * geometry.width[level];
    tiles.pixels[level] = std::clamp(pixels / kTilesPerLevel, 1, kTilePixels<A>);
    tiles.first[level + 1] = tiles.first[level] + (pixels + tiles.pixels[level] - 1) / tiles.pixels[level];
  }
  return tiles;
}

/// Writes grad_value [B, S, M, D], in an order that does not change.
template <class T, class Launch>
void ordered_value_gradient(const Launch& launch, const T* grad, const Located<Accumulate<T>>& source, T* grad_value,
                            int64_t images, const Geometry& geometry) {
  const Tiles tiles = cut_tiles<Accumulate<T>>(geometry);
  const int64_t jobs = images * geometry.heads * tiles.chunks * tiles.first[geometry.levels];
  const int64_t blocks = std::min<int64_t>(jobs, std::numeric_limits<int>::max());
  launch(ordered_value_gradient_kernel<T>, blocks, kWarp, 0, grad, source, grad_value, jobs, tiles, geometry);
}

template <class A, class U, class Launch>
void locate(const Launch& launch, const Raw<A, U>& source, A* pixels, A* weights, int64_t images,
            const Geometry& geometry) {
  launch_rows(launch, locate_kernel<A, U>, team_for(geometry.samples()), kThreads, 0, images, geometry, source,
              pixels, weights);
}

/// What `backward` found for pixels and weights -> the gradients of offsets, logits and, unless it is null, reference
/// points.
template <class A, class U, class Launch>
void raw_gradients(const Launch& launch, const Raw<A, U>& source, const A* weights, const PointGradients<A>& grads,
                   A* grad_reference, U* grad_offsets, U* grad_logits, int64_t images, const Geometry& geometry) {
  launch_rows(launch, raw_gradient_kernel<A, U>, team_for(geometry.samples()), kThreads, 0, images, geometry, source,
              weights, grads, grad_offsets, grad_logits);
  if (!grad_reference) return;
  const int64_t threads = images * geometry.queries * geometry.levels * 2;
  launch(reference_gradient_kernel<A, U>, (threads + kThreads - 1) / kThreads, kThreads, 0, source,
         grads.locations, grad_reference, threads, geometry);
}

}  // namespace deformable
