// The CUDA operators on the CPU, for ctypes: device code and launches as they are, plain pointers instead of tensors.
#include "emulate.h"

#include "../../models/ops/csrc/cuda/launches.cuh"

namespace {

using namespace deformable;

const emulation::Launch launch;

/// Everything a call needs. Pointers are to arrays of the types that `type` and `raw_type` name.
struct Call {
  int type;      // of values: 0 float32, 1 float64, 2 float16, 3 bfloat16
  int raw_type;  // of offsets and logits: 0 as values, 1 as the arithmetic
  int coordinates;
  int deterministic;
  int64_t images;
  const Geometry* geometry;
  const void *grad, *value, *reference;
  const void *locations, *weights;  // or offsets and logits
  void *out, *grad_value, *grad_reference, *grad_locations, *grad_weights;  // no grad_reference: it is not needed
};

template <class T>
Located<Accumulate<T>> located(const Call& call) {
  using A = Accumulate<T>;
  return {static_cast<const A*>(call.locations), static_cast<const A*>(call.weights), false};
}

template <class A, class U>
Raw<A, U> raw(const Call& call) {
  const U *offsets = static_cast<const U*>(call.locations), *logits = static_cast<const U*>(call.weights);
  return {static_cast<const A*>(call.reference), offsets, logits, call.coordinates, A(0), A(0)};
}

/// add(sums), and the sums rounded to the gradient of value.
template <class T, class Add>
void with_sums(const Call& call, const Add& add) {
  using A = Accumulate<T>;
  const int64_t count = call.images * call.geometry->tokens * call.geometry->pixel_stride();
  // 16 bytes before the sums keep them as aligned as torch's memory is
  std::vector<A> memory(count + 16 / sizeof(A));
  A* sums = reinterpret_cast<A*>((reinterpret_cast<std::uintptr_t>(memory.data()) + 15) / 16 * 16);
  add(sums);
  for (int64_t i = 0; i < count; ++i) static_cast<T*>(call.grad_value)[i] = static_cast<T>(sums[i]);
}

template <class T>
void run_backward(const Call& call, const Located<Accumulate<T>>& source, const PointGradients<Accumulate<T>>& grads) {
  using A = Accumulate<T>;
  const T *grad = static_cast<const T*>(call.grad), *value = static_cast<const T*>(call.value);
  if (call.deterministic) {
    backward<T>(launch, grad, value, source, nullptr, grads, call.images, *call.geometry);
    ordered_value_gradient(launch, grad, source, static_cast<T*>(call.grad_value), call.images, *call.geometry);
    return;
  }
  with_sums<T>(call, [&](A* sums) {
    backward<T>(launch, grad, value, source, sums, grads, call.images, *call.geometry);
  });
}

template <class T>
void run_forward(const Call& call) {
  const T* value = static_cast<const T*>(call.value);
  forward(launch, value, located<T>(call), static_cast<T*>(call.out), call.images, *call.geometry);
}

template <class T>
void run_backward(const Call& call) {
  using A = Accumulate<T>;
  run_backward<T>(call, located<T>(call), {static_cast<A*>(call.grad_locations), static_cast<A*>(call.grad_weights)});
}

template <class T, class U>
void run_fused_forward(const Call& call) {
  const T* value = static_cast<const T*>(call.value);
  forward(launch, value, raw<Accumulate<T>, U>(call), static_cast<T*>(call.out), call.images, *call.geometry);
}

template <class T, class U>
void run_fused_backward(const Call& call) {
  using A = Accumulate<T>;
  const Geometry& geometry = *call.geometry;
  const int64_t samples = call.images * geometry.rows() * geometry.samples();
  std::vector<A> pixels(2 * samples), weights(samples), grad_pixels(2 * samples), grad_weights(samples);
  const auto source = raw<A, U>(call);
  U *grad_offsets = static_cast<U*>(call.grad_locations), *grad_logits = static_cast<U*>(call.grad_weights);
  const T *grad = static_cast<const T*>(call.grad), *value = static_cast<const T*>(call.value);
  if (!call.deterministic && !call.grad_reference && is_published_backward(geometry, grad, value)) {
    return with_sums<T>(call, [&](A* sums) {
      const PointGradients<U> grads = {grad_offsets, grad_logits};
      published_backward(launch, grad, value, source, sums, grads, call.images, geometry);
    });
  }
  locate(launch, source, pixels.data(), weights.data(), call.images, geometry);
  const PointGradients<A> grads = {grad_pixels.data(), grad_weights.data()};
  run_backward<T>(call, Located<A>{pixels.data(), weights.data(), true}, grads);
  raw_gradients(launch, source, weights.data(), grads, static_cast<A*>(call.grad_reference),
                grad_offsets, grad_logits, call.images, geometry);
}

}  // namespace

#define FOR_EACH_TYPE(function)                              \
  switch (call->type) {                                      \
    case 0: return function<float>(*call);                   \
    case 1: return function<double>(*call);                  \
    case 2: return function<c10::Half>(*call);               \
    case 3: return function<c10::BFloat16>(*call);           \
    default: emulation::fail("no such type");                \
  }

#define FOR_EACH_RAW_TYPE(function)                                                                       \
  switch (call->type) {                                                                                   \
    case 0: return function<float, float>(*call);                                                         \
    case 1: return function<double, double>(*call);                                                       \
    case 2: return call->raw_type ? function<c10::Half, float>(*call) : function<c10::Half, c10::Half>(*call); \
    case 3:                                                                                               \
      return call->raw_type ? function<c10::BFloat16, float>(*call)                                       \
                            : function<c10::BFloat16, c10::BFloat16>(*call);                              \
    default: emulation::fail("no such type");                                                             \
  }

extern "C" {
void forward_call(const Call* call) { FOR_EACH_TYPE(run_forward) }
void backward_call(const Call* call) { FOR_EACH_TYPE(run_backward) }
void fused_forward_call(const Call* call) { FOR_EACH_RAW_TYPE(run_fused_forward) }
void fused_backward_call(const Call* call) { FOR_EACH_RAW_TYPE(run_fused_backward) }
}
