// What the kernels of multi-scale deformable attention share: sizes, sampling points, bilinear corners.
//
// Shape letters: B images, S tokens of all levels, M heads, D channels per head, Q queries, L levels, P points.
// Types: T of the values, A of all arithmetic (float64 for float64, else float32), U of raw offsets and logits.
//
// A *row* is one (b, q, m): the sum over L * P samples of D channels. A *team* is the 1, 2, 4, ... or 32 lanes of a
// warp that share a row. Each lane of a team works out one sample, and hands it to the others, so that a sample's
// arithmetic is done once and not once for every channel. Warps need nothing of each other, so there are no barriers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace deformable {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kMaxLevels = 32;

template <class T>
constexpr int kVector = 16 / sizeof(T);  // channels in a 16-byte load

template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <class T>
using Accumulate = typename Accumulator<T>::type;

/// The sizes of one call. A kernel takes them by value, so nothing is copied to the device and nobody waits for it.
struct Geometry {
  int tokens, heads, channels, queries, levels, points;  // S M D Q L P
  int height[kMaxLevels], width[kMaxLevels], start[kMaxLevels];

  __host__ __device__ int samples() const { return levels * points; }
  __host__ __device__ int rows() const { return queries * heads; }  // of one image
  __host__ __device__ int pixel_stride() const { return heads * channels; }
};

/// How rows are spread over the grid: `size` lanes a row, `blocks` blocks an image.
struct Teams {
  int size, blocks;
};

/// Where a team works. Teams behind the last row repeat it, as shuffles need every lane, but must not write.
struct Row {
  int image, head, query;
  int64_t index;  // of (b, q, m)
  bool valid;
  bool warp_is_idle;  // no team of this warp has a valid row
};

template <class G>
__device__ __forceinline__ Row find_row(const G& geometry, const Teams& teams) {
  // One 32-bit division finds the image, whatever the batch; heads are next to each other, as they are in memory.
  const int image = blockIdx.x / teams.blocks;
  const int first = (blockIdx.x - image * teams.blocks) * (blockDim.x / teams.size);
  const int wanted = first + threadIdx.x / teams.size;
  const int last = geometry.rows() - 1;
  const int row = wanted < last ? wanted : last;
  const int warp_begin = first + threadIdx.x / kWarp * (kWarp / teams.size);
  return {image, row % geometry.heads, row / geometry.heads, int64_t(image) * geometry.rows() + row,
          wanted <= last, warp_begin > last};
}

// ---- within a team -------------------------------------------------------------------------------------------------

template <class X>
__device__ __forceinline__ X team_sum(X x, int size) {
#pragma unroll
  for (int step = size / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

template <class X>
__device__ __forceinline__ X team_max(X x, int size) {
#pragma unroll
  for (int step = size / 2; step > 0; step /= 2) {
    const X other = __shfl_xor_sync(kAllLanes, x, step);
    x = other > x ? other : x;
  }
  return x;
}

// ---- memory --------------------------------------------------------------------------------------------------------

/// V neighbouring channels, moved by one instruction. Whole words, as 16-bit elements that may be absent would each be
/// selected on their own.
template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  using Word = std::conditional_t<(sizeof(T) * V < 4), uint16_t, uint32_t>;
  Word words[sizeof(T) * V / sizeof(Word)];

  template <class A>
  __device__ __forceinline__ A get(int v) const {
    if constexpr (std::is_same_v<T, c10::BFloat16> && V % 2 == 0) {  // the upper half of a float32
      const uint32_t bits = v % 2 ? words[v / 2] & 0xffff0000u : words[v / 2] << 16;
      float x;
      std::memcpy(&x, &bits, sizeof x);
      return x;
    } else {
      T x;
      std::memcpy(static_cast<void*>(&x), reinterpret_cast<const char*>(words) + v * sizeof(T), sizeof x);
      return static_cast<A>(x);
    }
  }
};

/// a * b in 64 bits. The compiler, left alone, widens the factors first and multiplies with three instructions.
__device__ __forceinline__ uint64_t wide_product(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return static_cast<uint64_t>(a) * b;
#endif
}

/// The address `token` pixels on. 64 bits cost one product, so there is no variant with 32-bit offsets. A token outside
/// the map, which may be negative, gives an address that means nothing, and that nobody uses.
template <class X>
__device__ __forceinline__ X* pixels_on(X* base, int token, int pixel_stride) {
  using Byte = std::conditional_t<std::is_const_v<X>, const char, char>;
  const uint32_t stride = static_cast<uint32_t>(pixel_stride) * static_cast<uint32_t>(sizeof(X));
  return reinterpret_cast<X*>(reinterpret_cast<Byte*>(base) + wide_product(static_cast<uint32_t>(token), stride));
}

template <int V, class T>
__device__ __forceinline__ Pack<T, V> load(const T* from) {
  return *reinterpret_cast<const Pack<T, V>*>(from);
}

/// Zeros, without a look at the memory, where `condition` does not hold.
template <int V, class T>
__device__ __forceinline__ Pack<T, V> load(const T* from, bool condition) {
  Pack<T, V> pack{};
  if (condition) pack = load<V>(from);
  return pack;
}

template <int V, class T, class A>
__device__ __forceinline__ void unpack(A (&x)[V], const Pack<T, V>& pack) {
#pragma unroll
  for (int v = 0; v < V; ++v) x[v] = pack.template get<A>(v);
}

template <int V, class T, class A>
__device__ __forceinline__ void store(T* to, const A (&x)[V]) {
  T converted[V];
#pragma unroll
  for (int v = 0; v < V; ++v) converted[v] = static_cast<T>(x[v]);
  Pack<T, V> pack;
  std::memcpy(&pack, converted, sizeof pack);
  *reinterpret_cast<Pack<T, V>*>(to) = pack;
}

#ifdef __CUDACC__
/// The block's shared memory, of the size that the launch says.
__device__ __forceinline__ void* shared_memory() {
  extern __shared__ float4 memory[];
  return memory;
}
#endif

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define DEFORMABLE_VECTOR_ATOMICS
#endif

/// Numbers that one atomic addition takes, of V: 16 bytes of float32 where the architecture can.
///
/// There are packed bfloat16 and float16 atomics too. They round the sum after each addition, and a pixel of a coarse
/// level takes thousands: gradients of these types are summed in float32 and converted at the end.
#ifdef DEFORMABLE_VECTOR_ATOMICS
template <class A, int V>
constexpr int kAtomic = V % 4 == 0 && sizeof(A) == sizeof(float) ? 4 : 1;
#else
template <class A, int V>
constexpr int kAtomic = 1;
#endif

/// to[v] += x[v]
template <int V, class A>
__device__ __forceinline__ void atomic_add(A* to, const A (&x)[V]) {
#pragma unroll
  for (int v = 0; v < V; v += kAtomic<A, V>) {
    if constexpr (kAtomic<A, V> == 4) {
      atomicAdd(reinterpret_cast<float4*>(to + v), make_float4(x[v], x[v + 1], x[v + 2], x[v + 3]));
    } else {
      atomicAdd(to + v, x[v]);
    }
  }
}

// ---- samples -------------------------------------------------------------------------------------------------------

/// A sampling point in pixels of its level: (0, 0) is the centre of the upper left pixel.
template <class A>
struct Point {
  A x, y, weight;
};

/// A point's four pixels, in the order upper left, upper right, lower left, lower right.
template <class A>
struct Sample {
  int token = 0;    // of the upper left one, within the image; of no meaning where that lies outside the map
  int pitch = 0;    // tokens from one row of the map to the next
  int corners = 0;  // bit k is set where pixel k lies in the map; 0 for a sample outside
  A x = 0, y = 0;   // distances from the upper left pixel, in [0, 1)
  A weight = 0;

  __device__ bool has(int k) const { return corners >> k & 1; }
  __device__ int token_of(int k) const { return token + (k >> 1) * pitch + (k & 1); }
  __device__ A bilinear(int k) const { return (k & 1 ? x : 1 - x) * (k & 2 ? y : 1 - y); }
};

template <class A>
__device__ __forceinline__ Sample<A> find_corners(const Point<A>& point, const Geometry& geometry, int level) {
  const int height = geometry.height[level], width = geometry.width[level];
  Sample<A> sample;
  sample.weight = point.weight;
  // NaN and infinity fail a comparison, so only numbers that fit become integers.
  const A x = point.x, y = point.y;
  if (!(x > -1 && x < width && y > -1 && y < height)) return sample;
  const A left = std::floor(x), top = std::floor(y);
  const int column = static_cast<int>(left), line = static_cast<int>(top);
  const int columns = (column >= 0 ? 1 : 0) | (column + 1 < width ? 2 : 0);
  sample.corners = (line >= 0 ? columns : 0) | (line + 1 < height ? columns << 2 : 0);
  sample.token = geometry.start[level] + line * width + column;
  sample.pitch = width;
  sample.x = x - left;
  sample.y = y - top;
  return sample;
}

/// The sample that lane `lane` of each team worked out.
template <class A>
__device__ __forceinline__ Sample<A> from_lane(const Sample<A>& mine, int lane, int size) {
  Sample<A> sample;
  sample.token = __shfl_sync(kAllLanes, mine.token, lane, size);
  sample.pitch = __shfl_sync(kAllLanes, mine.pitch, lane, size);
  sample.corners = __shfl_sync(kAllLanes, mine.corners, lane, size);
  sample.x = __shfl_sync(kAllLanes, mine.x, lane, size);
  sample.y = __shfl_sync(kAllLanes, mine.y, lane, size);
  sample.weight = __shfl_sync(kAllLanes, mine.weight, lane, size);
  return sample;
}

// ---- sources of points ---------------------------------------------------------------------------------------------

/// Locations [B, Q, M, L, P, 2] and weights [B, Q, M, L, P] as they are given.
template <class A>
struct Located {
  static constexpr bool kSoftmax = false;
  const A* locations;
  const A* weights;
  bool in_pixels;  // locations are Point's x and y, else in [0, 1] of the level

  template <class G>
  __device__ void begin(const Row&, const G&, int, int) {}

  template <class G>
  __device__ __forceinline__ Point<A> point(const Row& row, const G& geometry, int i, int level) const {
    const int64_t at = row.index * geometry.samples() + i;
    return place(locations[2 * at], locations[2 * at + 1], weights[at], geometry, level);
  }

  __device__ __forceinline__ Point<A> place(A x, A y, A weight, const Geometry& geometry, int level) const {
    if (in_pixels) return {x, y, weight};
    return {x * geometry.width[level] - A(0.5), y * geometry.height[level] - A(0.5), weight};
  }

  /// Turns the gradient of a point's x, y into that of its location.
  template <class G>
  __device__ __forceinline__ void through_point(A& x, A& y, const Row&, const G& geometry, int level) const {
    if (in_pixels) return;
    x *= geometry.width[level];
    y *= geometry.height[level];
  }
};

/// Reference points [B, Q, L, 2 or 4], offsets [B, Q, M, L, P, 2] and logits [B, Q, M, L, P]: locations and softmax are
/// worked out on the way and never stored.
template <class A, class U>
struct Raw {
  static constexpr bool kSoftmax = true;
  const A* reference;
  const U* offsets;
  const U* logits;
  int coordinates;       // 2: x, y; 4: x, y, width, height
  A maximum, normalize;  // of the row's softmax, set by begin()

  template <class G>
  __device__ __forceinline__ A logit(const Row& row, const G& geometry, int i) const {
    return static_cast<A>(logits[row.index * geometry.samples() + i]);
  }

  template <class G>
  __device__ __forceinline__ void begin(const Row& row, const G& geometry, int lane, int size) {
    maximum = -INFINITY;
    for (int first = 0; first < geometry.samples(); first += size) {
      const A x = first + lane < geometry.samples() ? logit(row, geometry, first + lane) : maximum;
      maximum = x > maximum ? x : maximum;
    }
    maximum = team_max(maximum, size);
    A sum = 0;
    for (int first = 0; first < geometry.samples(); first += size) {
      if (first + lane < geometry.samples()) sum += std::exp(logit(row, geometry, first + lane) - maximum);
    }
    normalize = 1 / team_sum(sum, size);
  }

  template <class G>
  __device__ __forceinline__ Point<A> point(const Row& row, const G& geometry, int i, int level) const {
    const int64_t at = row.index * geometry.samples() + i;
    const A* around = reference_of(row, geometry, level);
    const A weight = std::exp(logit(row, geometry, i) - maximum) * normalize;
    const A x = static_cast<A>(offsets[2 * at]), y = static_cast<A>(offsets[2 * at + 1]);
    const int width = geometry.width[level], height = geometry.height[level];
    if (coordinates == 2) return {around[0] * width + x - A(0.5), around[1] * height + y - A(0.5), weight};
    const A part = A(0.5) / geometry.points;  // offsets are in half boxes, divided among the points
    return {(around[0] + x * part * around[2]) * width - A(0.5), (around[1] + y * part * around[3]) * height - A(0.5),
            weight};
  }

  /// Turns the gradient of a point's x, y into that of its offset.
  template <class G>
  __device__ __forceinline__ void through_point(A& x, A& y, const Row& row, const G& geometry, int level) const {
    if (coordinates == 2) return;
    const A* box = reference_of(row, geometry, level);
    x *= geometry.width[level] * (A(0.5) / geometry.points) * box[2];
    y *= geometry.height[level] * (A(0.5) / geometry.points) * box[3];
  }

  template <class G>
  __device__ __forceinline__ const A* reference_of(const Row& row, const G& geometry, int level) const {
    const int64_t query = static_cast<int64_t>(row.image) * geometry.queries + row.query;
    return reference + (query * geometry.levels + level) * coordinates;
  }
};

/// Sample i of a row; nothing behind the last one.
template <class A, class Source, class G>
__device__ __forceinline__ Sample<A> take_sample(const Source& source, const Row& row, const G& geometry, int i) {
  if (i >= geometry.samples()) return {};
  const int level = static_cast<unsigned>(i) / static_cast<unsigned>(geometry.points);
  return find_corners(source.point(row, geometry, i, level), geometry, level);
}

}  // namespace deformable
