// The operators of deformable:: for CUDA tensors: checks, memory, launches on the current stream, registration.
//
// Schemas, types and shapes are in models/ops/compiled.py. Nothing here waits for the device or copies to it, so calls
// can be captured in CUDA graphs. LibTorch's stable ABI: one build serves every torch from 2.10 on.

#include <initializer_list>
#include <limits>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../checks.h"
#include "launches.cuh"

namespace deformable {
namespace {

using Shapes = std::vector<int64_t>;

// ---- types ---------------------------------------------------------------------------------------------------------

template <class X>
struct Type {
  using type = X;
};
template <class Tag>
using TypeOf = typename std::decay_t<Tag>::type;

/// do_it(Type<T>{}) for the T of `type`.
template <class Do>
void with_type(ScalarType type, const Do& do_it) {
  switch (type) {
    case ScalarType::Float: return do_it(Type<float>{});
    case ScalarType::Double: return do_it(Type<double>{});
    case ScalarType::Half: return do_it(Type<c10::Half>{});
    case ScalarType::BFloat16: return do_it(Type<c10::BFloat16>{});
    default: STD_TORCH_CHECK(false, "value must be float32, float64, float16 or bfloat16");
  }
}

/// do_it(Type<U>{}) for offsets of the values' type T or of the arithmetic's.
template <class T, class Do>
void with_raw_type(ScalarType type, const Do& do_it) {
  if (type == torch::headeronly::CppTypeToScalarType<Accumulate<T>>::value) return do_it(Type<Accumulate<T>>{});
  if constexpr (!std::is_same_v<T, Accumulate<T>>) do_it(Type<T>{});
}

template <class X>
const X* data(const Tensor& tensor) {
  return static_cast<const X*>(tensor.const_data_ptr());
}

template <class X>
X* mutable_data(const Tensor& tensor) {
  return static_cast<X*>(tensor.mutable_data_ptr());
}

Tensor empty(const Tensor& like, ScalarType type) { return torch::stable::new_empty(like, like.sizes(), type); }
Tensor zeros(const Tensor& like, ScalarType type) { return torch::stable::new_zeros(like, like.sizes(), type); }
Tensor zeros(const Tensor& like) { return zeros(like, like.scalar_type()); }
Tensor nothing(const Tensor& like) { return torch::stable::new_empty(like, {0}); }  // for a gradient that nobody needs

// ---- launches ------------------------------------------------------------------------------------------------------

#define DEFORMABLE_TEXT(...) #__VA_ARGS__
#define DEFORMABLE_TEXT_OF(...) DEFORMABLE_TEXT(__VA_ARGS__)

void check_launch(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::string remedy;
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion) {
    remedy = ". The kernels were built for compute capabilities " DEFORMABLE_TEXT_OF(__CUDA_ARCH_LIST__)
             " (800 is 8.0): build them again for this GPU, with TORCH_CUDA_ARCH_LIST";
  }
  STD_TORCH_CHECK(false, "multi-scale deformable attention on CUDA: ", cudaGetErrorString(error), remedy);
}

/// Makes the device of the tensors the current one, and starts kernels on its current stream.
class Launcher {
 public:
  explicit Launcher(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared_bytes,
                  Arguments... arguments) const {
    if (blocks == 0) return;
    STD_TORCH_CHECK(blocks <= std::numeric_limits<int>::max(), "too many queries for one call: ", blocks, " blocks");
    kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, stream_>>>(arguments...);
    check_launch(cudaGetLastError());
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

// ---- sizes ---------------------------------------------------------------------------------------------------------

void check_device(const Tensor& value, std::initializer_list<const Tensor*> others) {
  for (const Tensor* other : others) {
    STD_TORCH_CHECK(other->is_cuda() && other->get_device_index() == value.get_device_index(),
                    "all tensors must be on the CUDA device of value");
  }
}

/// The sizes of a checked call; `points` is locations or offsets [B, Q, M, L, P, 2].
Geometry measure(const Tensor& value, const Shapes& shapes, const Tensor& points) {
  const int64_t levels = points.size(3);
  STD_TORCH_CHECK(levels <= kMaxLevels, "on CUDA there can be ", kMaxLevels, " levels, got ", levels);
  // These are counted in 32 bits, with room for a block behind the end; the arrays may be larger. An element has at
  // most 8 bytes.
  constexpr int64_t kMost = std::numeric_limits<int>::max() - kForwardThreads;
  STD_TORCH_CHECK(value.size(2) * value.size(3) <= kMost / 8 && points.size(1) * value.size(2) <= kMost &&
                      levels * points.size(4) <= kMost && points.size(1) * points.size(4) <= kMost,
                  "too large for CUDA: heads * channels, or queries * heads, queries * points or levels * points");
  Geometry geometry = {};
  geometry.tokens = static_cast<int>(value.size(1));
  geometry.heads = static_cast<int>(value.size(2));
  geometry.channels = static_cast<int>(value.size(3));
  geometry.queries = static_cast<int>(points.size(1));
  geometry.levels = static_cast<int>(levels);
  geometry.points = static_cast<int>(points.size(4));
  int start = 0;
  for (int level = 0; level < geometry.levels; ++level) {
    geometry.height[level] = static_cast<int>(shapes[2 * level]);
    geometry.width[level] = static_cast<int>(shapes[2 * level + 1]);
    geometry.start[level] = start;
    start += geometry.height[level] * geometry.width[level];
  }
  return geometry;
}

Geometry measure_located(const Tensor& value, const Shapes& shapes, const Tensor& locations, const Tensor& weights) {
  check_ready(value, shapes, locations, weights);
  check_device(value, {&value, &locations, &weights});
  return measure(value, shapes, locations);
}

Geometry measure_raw(const Tensor& value, const Shapes& shapes, const Tensor& reference, const Tensor& offsets,
                     const Tensor& logits) {
  check_fused(value, shapes, reference, offsets, logits);
  check_device(value, {&value, &reference, &offsets, &logits});
  return measure(value, shapes, offsets);
}

void check_gradient(const Tensor& grad, const Tensor& value, const Geometry& geometry) {
  check_grad(grad, value, geometry.queries);
  check_device(value, {&grad});
}

Tensor new_output(const Tensor& value, const Geometry& geometry) {
  return torch::stable::new_empty(value, {value.size(0), geometry.queries, value.size(2) * value.size(3)});
}

// ---- operators -----------------------------------------------------------------------------------------------------

Tensor forward_op(const Tensor& value, Shapes shapes, const Tensor& locations, const Tensor& weights) {
  const Geometry geometry = measure_located(value, shapes, locations, weights);
  Tensor out = new_output(value, geometry);
  if (out.numel() == 0) return out;
  const Launcher launch(value);
  with_type(value.scalar_type(), [&](auto tag) {
    using T = TypeOf<decltype(tag)>;
    using A = Accumulate<T>;
    const Located<A> source = {data<A>(locations), data<A>(weights), false};
    forward(launch, data<T>(value), source, mutable_data<T>(out), value.size(0), geometry);
  });
  return out;
}

/// Sums of gradients of the values, in the values' type.
Tensor rounded(const Tensor& sums, ScalarType type) {
  return sums.scalar_type() == type ? sums : torch::stable::to(sums, type);
}

/// The gradient of value; those of the source's locations and weights go to `grads`.
template <class T>
Tensor run_backward(const Launcher& launch, const Tensor& grad, const Tensor& value,
                    const Located<Accumulate<T>>& source, const PointGradients<Accumulate<T>>& grads,
                    bool deterministic, const Geometry& geometry) {
  using A = Accumulate<T>;
  const ScalarType type = value.scalar_type();
  const int64_t images = value.size(0);
  if (deterministic) {
    Tensor grad_value = empty(value, type);
    backward<T>(launch, data<T>(grad), data<T>(value), source, nullptr, grads, images, geometry);
    ordered_value_gradient(launch, data<T>(grad), source, mutable_data<T>(grad_value), images, geometry);
    return grad_value;
  }
  Tensor sums = zeros(value, accumulator(type));
  backward<T>(launch, data<T>(grad), data<T>(value), source, mutable_data<A>(sums), grads, images, geometry);
  return rounded(sums, type);
}

std::tuple<Tensor, Tensor, Tensor> backward_op(const Tensor& grad, const Tensor& value, Shapes shapes,
                                               const Tensor& locations, const Tensor& weights, bool deterministic) {
  const Geometry geometry = measure_located(value, shapes, locations, weights);
  check_gradient(grad, value, geometry);
  if (grad.numel() == 0) return {zeros(value), zeros(locations), zeros(weights)};
  const Launcher launch(value);
  Tensor grad_value, grad_locations = empty(locations, locations.scalar_type());
  Tensor grad_weights = empty(weights, weights.scalar_type());
  with_type(value.scalar_type(), [&](auto tag) {
    using T = TypeOf<decltype(tag)>;
    using A = Accumulate<T>;
    const Located<A> source = {data<A>(locations), data<A>(weights), false};
    const PointGradients<A> grads = {mutable_data<A>(grad_locations), mutable_data<A>(grad_weights)};
    grad_value = run_backward<T>(launch, grad, value, source, grads, deterministic, geometry);
  });
  return {grad_value, grad_locations, grad_weights};
}

template <class A, class U>
Raw<A, U> raw_source(const Tensor& reference, const Tensor& offsets, const Tensor& logits) {
  return {data<A>(reference), data<U>(offsets), data<U>(logits), static_cast<int>(reference.size(3)), A(0), A(0)};
}

Tensor fused_forward_op(const Tensor& value, Shapes shapes, const Tensor& reference, const Tensor& offsets,
                        const Tensor& logits) {
  const Geometry geometry = measure_raw(value, shapes, reference, offsets, logits);
  Tensor out = new_output(value, geometry);
  if (out.numel() == 0) return out;
  const Launcher launch(value);
  with_type(value.scalar_type(), [&](auto tag) {
    using T = TypeOf<decltype(tag)>;
    with_raw_type<T>(offsets.scalar_type(), [&](auto raw_tag) {
      const auto source = raw_source<Accumulate<T>, TypeOf<decltype(raw_tag)>>(reference, offsets, logits);
      forward(launch, data<T>(value), source, mutable_data<T>(out), value.size(0), geometry);
    });
  });
  return out;
}

/// One kernel for the published sizes. For others, in a fixed order, or with a gradient for the reference points,
/// points and weights are worked out once more into memory that lives for this call: more than one kernel reads them.
template <class T, class U>
std::tuple<Tensor, Tensor, Tensor, Tensor> run_fused_backward(const Tensor& grad, const Tensor& value,
                                                              const Tensor& reference, const Tensor& offsets,
                                                              const Tensor& logits, bool needs_reference,
                                                              bool deterministic, const Geometry& geometry) {
  using A = Accumulate<T>;
  const Launcher launch(value);
  const int64_t images = value.size(0);
  const ScalarType wide = reference.scalar_type();
  const auto raw = raw_source<A, U>(reference, offsets, logits);
  Tensor grad_offsets = empty(offsets, offsets.scalar_type()), grad_logits = empty(logits, logits.scalar_type());
  Tensor grad_reference = needs_reference ? empty(reference, wide) : nothing(reference);

  if (!deterministic && !needs_reference && is_published_backward(geometry, data<T>(grad), data<T>(value))) {
    const Tensor sums = zeros(value, wide);
    const PointGradients<U> grads = {mutable_data<U>(grad_offsets), mutable_data<U>(grad_logits)};
    published_backward(launch, data<T>(grad), data<T>(value), raw, mutable_data<A>(sums), grads, images, geometry);
    return {rounded(sums, value.scalar_type()), grad_reference, grad_offsets, grad_logits};
  }

  const Tensor pixels = empty(offsets, wide), weights = empty(logits, wide);
  locate(launch, raw, mutable_data<A>(pixels), mutable_data<A>(weights), images, geometry);
  const Located<A> source = {data<A>(pixels), data<A>(weights), true};
  const Tensor grad_pixels = empty(offsets, wide), grad_weights = empty(logits, wide);
  const PointGradients<A> grads = {mutable_data<A>(grad_pixels), mutable_data<A>(grad_weights)};
  Tensor grad_value = run_backward<T>(launch, grad, value, source, grads, deterministic, geometry);
  raw_gradients(launch, raw, data<A>(weights), grads, needs_reference ? mutable_data<A>(grad_reference) : nullptr,
                mutable_data<U>(grad_offsets), mutable_data<U>(grad_logits), images, geometry);
  return {grad_value, grad_reference, grad_offsets, grad_logits};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> fused_backward_op(const Tensor& grad, const Tensor& value, Shapes shapes,
                                                             const Tensor& reference, const Tensor& offsets,
                                                             const Tensor& logits, bool needs_reference,
                                                             bool deterministic) {
  const Geometry geometry = measure_raw(value, shapes, reference, offsets, logits);
  check_gradient(grad, value, geometry);
  if (grad.numel() == 0) {
    return {zeros(value), needs_reference ? zeros(reference) : nothing(reference), zeros(offsets), zeros(logits)};
  }
  std::tuple<Tensor, Tensor, Tensor, Tensor> grads;
  with_type(value.scalar_type(), [&](auto tag) {
    using T = TypeOf<decltype(tag)>;
    with_raw_type<T>(offsets.scalar_type(), [&](auto raw_tag) {
      using U = TypeOf<decltype(raw_tag)>;
      grads = run_fused_backward<T, U>(grad, value, reference, offsets, logits, needs_reference, deterministic,
                                       geometry);
    });
  });
  return grads;
}

}  // namespace
}  // namespace deformable

STABLE_TORCH_LIBRARY_IMPL(deformable, CUDA, m) {
  m.impl("compiled_forward", TORCH_BOX(&deformable::forward_op));
  m.impl("compiled_backward", TORCH_BOX(&deformable::backward_op));
  m.impl("compiled_fused_forward", TORCH_BOX(&deformable::fused_forward_op));
  m.impl("compiled_fused_backward", TORCH_BOX(&deformable::fused_backward_op));
}
