// The operators of deformable:: for CUDA tensors: checks, memory, launches on the current stream, registration.
//
// Schemas, types and shapes are in models/ops/compiled.py. Nothing here waits for the device or copies to it, so calls
// can be captured in CUDA graphs. LibTorch's stable ABI: one build serves every torch from 2.10 on.

#include <sstream>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "launches.cuh"

namespace deformable {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
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

ScalarType accumulator_of(ScalarType type) { return type == ScalarType::Double ? type : ScalarType::Float; }

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
  void operator()(void (*kernel)(Parameters...), int64_t blocks, int threads, Arguments... arguments) const {
    if (blocks == 0) return;
    STD_TORCH_CHECK(blocks <= std::numeric_limits<int>::max(), "too many queries for one call: ", blocks, " blocks");
    kernel<<<static_cast<unsigned>(blocks), threads, 0, stream_>>>(arguments...);
    check_launch(cudaGetLastError());
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

// ---- checks --------------------------------------------------------------------------------------------------------

std::string text(const Tensor& tensor) {
  std::ostringstream out;
  const char* separator = "[";
  for (const int64_t size : tensor.sizes()) {
    out << separator << size;
    separator = ", ";
  }
  out << (tensor.dim() ? "]" : "[]");
  return out.str();
}

void check(const Tensor& tensor, const char* name, const Tensor& value, const std::vector<int64_t>& sizes) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == value.get_device_index(), name,
                  " must be on the CUDA device of value");
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
  bool same = tensor.dim() == static_cast<int64_t>(sizes.size());
  for (size_t i = 0; same && i < sizes.size(); ++i) same = tensor.size(static_cast<int64_t>(i)) == sizes[i];
  STD_TORCH_CHECK(same, name, " has a wrong shape: ", text(tensor), " with value ", text(value));
}

void check_type(const Tensor& tensor, const char* name, bool fits) {
  STD_TORCH_CHECK(fits, name, " has the wrong type, ", torch::headeronly::toString(tensor.scalar_type()));
}

/// The sizes of a call. `points` is what says Q, L and P: locations or offsets [B, Q, M, L, P, 2].
Geometry measure(const Tensor& value, const Shapes& shapes, const Tensor& points, const char* points_name) {
  STD_TORCH_CHECK(value.dim() == 4, "value must be [B, S, M, D], not ", text(value));
  STD_TORCH_CHECK(points.dim() == 6, points_name, " must be [B, Q, M, L, P, 2], not ", text(points));
  const int64_t levels = static_cast<int64_t>(shapes.size()) / 2;
  STD_TORCH_CHECK(shapes.size() % 2 == 0 && levels <= kMaxLevels, "shapes must be height, width of at most ", kMaxLevels,
                  " levels on CUDA, got ", shapes.size(), " numbers");
  check(value, "value", value, {value.size(0), value.size(1), value.size(2), value.size(3)});
  check(points, points_name, value, {value.size(0), points.size(1), value.size(2), levels, points.size(4), 2});
  // Whatever is counted in 32 bits; arrays may be larger, their offsets have 64. 8 bytes is the largest element.
  constexpr int64_t kMost = std::numeric_limits<int>::max();
  STD_TORCH_CHECK(value.size(1) <= kMost && value.size(2) * value.size(3) <= kMost / 8 &&
                      points.size(1) * value.size(2) <= kMost - kForwardThreads && levels * points.size(4) <= kMost - kWarp,
                  "too large for the CUDA kernels: value ", text(value), ", ", points_name, " ", text(points));
  Geometry geometry = {};
  geometry.tokens = static_cast<int>(value.size(1));
  geometry.heads = static_cast<int>(value.size(2));
  geometry.channels = static_cast<int>(value.size(3));
  geometry.queries = static_cast<int>(points.size(1));
  geometry.levels = static_cast<int>(levels);
  geometry.points = static_cast<int>(points.size(4));
  int64_t tokens = 0;
  for (int level = 0; level < geometry.levels; ++level) {
    const int64_t height = shapes[2 * level], width = shapes[2 * level + 1];
    STD_TORCH_CHECK(height >= 0 && width >= 0 && height <= kMost && width <= kMost, "shapes must not be negative");
    geometry.height[level] = static_cast<int>(height);
    geometry.width[level] = static_cast<int>(width);
    geometry.start[level] = static_cast<int>(tokens);
    tokens += height * width;
    STD_TORCH_CHECK(tokens <= geometry.tokens, "shapes hold more tokens than value ", text(value));
  }
  STD_TORCH_CHECK(tokens == geometry.tokens, "shapes hold ", tokens, " tokens, value is ", text(value));
  return geometry;
}

std::vector<int64_t> weights_shape(const Tensor& points) {
  return {points.size(0), points.size(1), points.size(2), points.size(3), points.size(4)};
}

Geometry measure_located(const Tensor& value, const Shapes& shapes, const Tensor& locations, const Tensor& weights) {
  const Geometry geometry = measure(value, shapes, locations, "locations");
  check(weights, "weights", value, weights_shape(locations));
  check_type(locations, "locations", locations.scalar_type() == accumulator_of(value.scalar_type()));
  check_type(weights, "weights", weights.scalar_type() == locations.scalar_type());
  return geometry;
}

Geometry measure_raw(const Tensor& value, const Shapes& shapes, const Tensor& reference, const Tensor& offsets,
                     const Tensor& logits) {
  const Geometry geometry = measure(value, shapes, offsets, "offsets");
  check(logits, "logits", value, weights_shape(offsets));
  const int64_t coordinates = reference.dim() == 4 && reference.size(3) == 4 ? 4 : 2;
  check(reference, "reference", value, {offsets.size(0), offsets.size(1), offsets.size(3), coordinates});
  const ScalarType type = value.scalar_type(), accumulator = accumulator_of(type);
  check_type(reference, "reference", reference.scalar_type() == accumulator);
  check_type(offsets, "offsets", offsets.scalar_type() == type || offsets.scalar_type() == accumulator);
  check_type(logits, "logits", logits.scalar_type() == offsets.scalar_type());
  return geometry;
}

void check_grad(const Tensor& grad, const Tensor& value, const Geometry& geometry) {
  check(grad, "grad", value, {value.size(0), geometry.queries, value.size(2) * value.size(3)});
  check_type(grad, "grad", grad.scalar_type() == value.scalar_type());
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

/// The gradient of value; those of the source's locations and weights go to `grads`.
template <class T>
Tensor run_backward(const Launcher& launch, const Tensor& grad, const Tensor& value, const Located<Accumulate<T>>& source,
                    const PointGradients<Accumulate<T>>& grads, bool deterministic, const Geometry& geometry) {
  using A = Accumulate<T>;
  const ScalarType type = value.scalar_type();
  const int64_t images = value.size(0);
  if (deterministic) {
    Tensor grad_value = empty(value, type);
    backward<T>(launch, data<T>(grad), data<T>(value), source, nullptr, grads, images, geometry);
    ordered_value_gradient(launch, data<T>(grad), source, mutable_data<T>(grad_value), images, geometry);
    return grad_value;
  }
  Tensor sums = zeros(value, accumulator_of(type));
  backward<T>(launch, data<T>(grad), data<T>(value), source, mutable_data<A>(sums), grads, images, geometry);
  return std::is_same_v<T, A> ? sums : torch::stable::to(sums, type);
}

std::tuple<Tensor, Tensor, Tensor> backward_op(const Tensor& grad, const Tensor& value, Shapes shapes,
                                               const Tensor& locations, const Tensor& weights, bool deterministic) {
  const Geometry geometry = measure_located(value, shapes, locations, weights);
  check_grad(grad, value, geometry);
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

/// Points and weights are worked out once more into memory that lives for this call: the backward of values, in either
/// order, reads them more than once.
template <class T, class U>
std::tuple<Tensor, Tensor, Tensor, Tensor> run_fused_backward(const Tensor& grad, const Tensor& value,
                                                              const Tensor& reference, const Tensor& offsets,
                                                              const Tensor& logits, bool deterministic,
                                                              const Geometry& geometry) {
  using A = Accumulate<T>;
  const Launcher launch(value);
  const int64_t images = value.size(0);
  const ScalarType accumulator = reference.scalar_type();
  const auto raw = raw_source<A, U>(reference, offsets, logits);
  const Tensor pixels = empty(offsets, accumulator), weights = empty(logits, accumulator);
  locate(launch, raw, mutable_data<A>(pixels), mutable_data<A>(weights), images, geometry);

  const Located<A> source = {data<A>(pixels), data<A>(weights), true};
  const Tensor grad_pixels = empty(offsets, accumulator), grad_weights = empty(logits, accumulator);
  const PointGradients<A> grads = {mutable_data<A>(grad_pixels), mutable_data<A>(grad_weights)};
  Tensor grad_value = run_backward<T>(launch, grad, value, source, grads, deterministic, geometry);

  Tensor grad_reference = empty(reference, accumulator);
  Tensor grad_offsets = empty(offsets, offsets.scalar_type()), grad_logits = empty(logits, logits.scalar_type());
  raw_gradients(launch, raw, data<A>(weights), grads, mutable_data<A>(grad_reference), mutable_data<U>(grad_offsets),
                mutable_data<U>(grad_logits), images, geometry);
  return {grad_value, grad_reference, grad_offsets, grad_logits};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> fused_backward_op(const Tensor& grad, const Tensor& value, Shapes shapes,
                                                             const Tensor& reference, const Tensor& offsets,
                                                             const Tensor& logits, bool deterministic) {
  const Geometry geometry = measure_raw(value, shapes, reference, offsets, logits);
  check_grad(grad, value, geometry);
  if (grad.numel() == 0) return {zeros(value), zeros(reference), zeros(offsets), zeros(logits)};
  std::tuple<Tensor, Tensor, Tensor, Tensor> grads;
  with_type(value.scalar_type(), [&](auto tag) {
    using T = TypeOf<decltype(tag)>;
    with_raw_type<T>(offsets.scalar_type(), [&](auto raw_tag) {
      using U = TypeOf<decltype(raw_tag)>;
      grads = run_fused_backward<T, U>(grad, value, reference, offsets, logits, deterministic, geometry);
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
