// The operators for the CPU: checks, outputs, and the kernels of this machine's instruction set over all threads.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <tuple>

#include "../checks.h"
#include "kernels.h"

namespace deformable {
namespace {

// The best instruction set of this machine; MS_DEFORM_ATTN_ISA=baseline, avx2 or avx512 asks for a lesser one.
Kernels choose_kernels(Type value) {
#if defined(__x86_64__)
  const char* wanted = std::getenv("MS_DEFORM_ATTN_ISA");
  const auto allowed = [&](const char* name) { return wanted == nullptr || std::strcmp(wanted, name) == 0; };
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (has_avx512 && allowed("avx512")) return avx512::kernels(value);
  if (has_avx2 && (allowed("avx2") || allowed("avx512"))) return avx2::kernels(value);
#endif
  return baseline::kernels(value);
}

Type type_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double: return Type::float64;
    case ScalarType::Half: return Type::float16;
    case ScalarType::BFloat16: return Type::bfloat16;
    default: return Type::float32;
  }
}

Problem make_problem(const Tensor& value, const std::vector<int64_t>& shapes, const Tensor& locations, Form form) {
  Problem problem{value.size(0), value.size(1), value.size(2), value.size(3), locations.size(1), locations.size(4), {}, form};
  int64_t start = 0;
  for (size_t i = 0; i < shapes.size(); i += 2) {
    problem.levels.push_back({static_cast<int32_t>(shapes[i]), static_cast<int32_t>(shapes[i + 1]), start});
    start += shapes[i] * shapes[i + 1];
  }
  return problem;
}

Form form_of(const Tensor& reference) { return reference.size(3) == 2 ? Form::from_points : Form::from_boxes; }

// body(image, first query, end) for all queries of all images, in parallel. A piece is large enough to find a head's
// values in the cache again, and small enough to leave every thread several.
template <class Body>
void over_queries(const Problem& problem, const Body& body) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t piece = std::clamp<int64_t>(problem.batch * problem.queries / (threads * 4) / 16 * 16, 16, 512);
  const int64_t pieces = (problem.queries + piece - 1) / piece;
  torch::stable::parallel_for(0, problem.batch * pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      body(i / pieces, i % pieces * piece, std::min((i % pieces + 1) * piece, problem.queries));
  });
}

Tensor run_forward(const Problem& problem, const Inputs& in, const Tensor& value) {
  Tensor out = torch::stable::new_empty(value, {problem.batch, problem.queries, problem.heads * problem.channels});
  const Kernels kernels = choose_kernels(type_of(value));
  over_queries(problem, [&](int64_t b, int64_t begin, int64_t end) {
    kernels.forward(problem, in, out.mutable_data_ptr(), b, begin, end);
  });
  return out;
}

void run_backward(const Problem& problem, const Inputs& in, const Gradients& gradients, Type value) {
  const Kernels kernels = choose_kernels(value);
  over_queries(problem, [&](int64_t b, int64_t begin, int64_t end) {
    kernels.backward_samples(problem, in, gradients, b, begin, end);
  });
  const int64_t levels = static_cast<int64_t>(problem.levels.size());
  torch::stable::parallel_for(0, problem.batch * problem.heads * levels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      kernels.backward_value(problem, in, gradients, i / levels / problem.heads, i / levels % problem.heads, i % levels);
  });
}

Tensor forward(const Tensor& value, std::vector<int64_t> shapes, const Tensor& locations, const Tensor& weights) {
  check_ready(value, shapes, locations, weights);
  const Problem problem = make_problem(value, shapes, locations, Form::ready);
  const Inputs in{value.const_data_ptr(), locations.const_data_ptr(), weights.const_data_ptr(), nullptr, type_of(locations)};
  return run_forward(problem, in, value);
}

// `deterministic` makes no difference: these kernels always are.
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& value, std::vector<int64_t> shapes,
                                            const Tensor& locations, const Tensor& weights, bool) {
  check_ready(value, shapes, locations, weights);
  check_grad(grad, value, locations.size(1));
  const Problem problem = make_problem(value, shapes, locations, Form::ready);
  const Inputs in{value.const_data_ptr(), locations.const_data_ptr(), weights.const_data_ptr(), nullptr, type_of(locations)};
  Tensor grad_value = torch::stable::empty_like(value), grad_locations = torch::stable::empty_like(locations),
         grad_weights = torch::stable::empty_like(weights);
  const Gradients gradients{grad.const_data_ptr(), grad_value.mutable_data_ptr(), grad_locations.mutable_data_ptr(),
                            grad_weights.mutable_data_ptr(), nullptr, nullptr};
  run_backward(problem, in, gradients, type_of(value));
  return {grad_value, grad_locations, grad_weights};
}

Tensor fused_forward(const Tensor& value, std::vector<int64_t> shapes, const Tensor& reference, const Tensor& offsets,
                     const Tensor& logits) {
  check_fused(value, shapes, reference, offsets, logits);
  const Problem problem = make_problem(value, shapes, offsets, form_of(reference));
  const Inputs in{value.const_data_ptr(), offsets.const_data_ptr(), logits.const_data_ptr(), reference.const_data_ptr(),
                  type_of(offsets)};
  return run_forward(problem, in, value);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> fused_backward(const Tensor& grad, const Tensor& value, std::vector<int64_t> shapes,
                                                          const Tensor& reference, const Tensor& offsets, const Tensor& logits,
                                                          bool needs_reference, bool) {
  check_fused(value, shapes, reference, offsets, logits);
  check_grad(grad, value, offsets.size(1));
  const Problem problem = make_problem(value, shapes, offsets, form_of(reference));
  const Inputs in{value.const_data_ptr(), offsets.const_data_ptr(), logits.const_data_ptr(), reference.const_data_ptr(),
                  type_of(offsets)};
  Tensor grad_value = torch::stable::empty_like(value), grad_offsets = torch::stable::empty_like(offsets),
         grad_logits = torch::stable::empty_like(logits);
  // an empty tensor stands for a gradient that nobody needs
  Tensor grad_reference = needs_reference ? torch::stable::empty_like(reference) : torch::stable::new_empty(reference, {0});
  Tensor softmax = torch::stable::new_empty(reference, {problem.batch, problem.queries, problem.heads, 2});
  const Gradients gradients{grad.const_data_ptr(),           grad_value.mutable_data_ptr(),
                            grad_offsets.mutable_data_ptr(), grad_logits.mutable_data_ptr(),
                            needs_reference ? grad_reference.mutable_data_ptr() : nullptr, softmax.mutable_data_ptr()};
  run_backward(problem, in, gradients, type_of(value));
  return {grad_value, grad_reference, grad_offsets, grad_logits};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deformable, CPU, library) {
  library.impl("compiled_forward", TORCH_BOX(&forward));
  library.impl("compiled_backward", TORCH_BOX(&backward));
  library.impl("compiled_fused_forward", TORCH_BOX(&fused_forward));
  library.impl("compiled_fused_backward", TORCH_BOX(&fused_backward));
}

}  // namespace deformable
