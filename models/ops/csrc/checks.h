// What the operators check before they touch memory, the same for CPU and CUDA. models/ops/functions.py has said all this
// in better words; these lines are for those who call the operators from elsewhere.
//
// Shape letters: B images, S tokens of all levels, M heads, D channels per head, Q queries, L levels, P points.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <vector>

namespace deformable {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline ScalarType accumulator(ScalarType value) { return value == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

inline void check(const char* name, const Tensor& tensor, std::initializer_list<int64_t> sizes) {
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
  STD_TORCH_CHECK(tensor.dim() == static_cast<int64_t>(sizes.size()), name, " must have ", sizes.size(), " dimensions");
  int64_t axis = 0;
  for (const int64_t size : sizes) {
    STD_TORCH_CHECK(tensor.size(axis) == size, name, " must have ", size, " at axis ", axis, ", not ", tensor.size(axis));
    ++axis;
  }
}

inline void check_value(const Tensor& value, const std::vector<int64_t>& shapes) {
  const ScalarType type = value.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half || type == ScalarType::BFloat16,
                  "value must be float32, float64, float16 or bfloat16");
  STD_TORCH_CHECK(value.dim() == 4 && value.is_contiguous(), "value must be contiguous, [B, S, M, D]");
  STD_TORCH_CHECK(shapes.size() % 2 == 0, "shapes must be height, width of every level");
  int64_t tokens = 0;
  for (size_t i = 0; i + 1 < shapes.size(); i += 2) {
    STD_TORCH_CHECK(shapes[i] >= 0 && shapes[i + 1] >= 0, "shapes must not be negative");
    tokens += shapes[i] * shapes[i + 1];
  }
  STD_TORCH_CHECK(tokens == value.size(1), "shapes hold ", tokens, " tokens, value has ", value.size(1));
  STD_TORCH_CHECK(tokens < (int64_t{1} << 31), "value must have fewer than 2^31 tokens");
}

inline void check_samples(const Tensor& value, const std::vector<int64_t>& shapes, const Tensor& locations, const Tensor& weights,
                          const char* locations_name, const char* weights_name) {
  STD_TORCH_CHECK(locations.dim() == 6, locations_name, " must be [B, Q, M, L, P, 2]");
  const int64_t levels = static_cast<int64_t>(shapes.size() / 2), queries = locations.size(1), points = locations.size(4);
  check(locations_name, locations, {value.size(0), queries, value.size(2), levels, points, 2});
  check(weights_name, weights, {value.size(0), queries, value.size(2), levels, points});
  STD_TORCH_CHECK(locations.scalar_type() == weights.scalar_type(), weights_name, " must have the type of ", locations_name);
}

inline void check_ready(const Tensor& value, const std::vector<int64_t>& shapes, const Tensor& locations, const Tensor& weights) {
  check_value(value, shapes);
  check_samples(value, shapes, locations, weights, "locations", "weights");
  STD_TORCH_CHECK(locations.scalar_type() == accumulator(value.scalar_type()),
                  "locations must be float32, or float64 where value is");
}

inline void check_fused(const Tensor& value, const std::vector<int64_t>& shapes, const Tensor& reference, const Tensor& offsets,
                        const Tensor& logits) {
  check_value(value, shapes);
  check_samples(value, shapes, offsets, logits, "offsets", "logits");
  const ScalarType wanted = accumulator(value.scalar_type());
  STD_TORCH_CHECK(offsets.scalar_type() == wanted || offsets.scalar_type() == value.scalar_type(),
                  "offsets must have the type of value, or float32");
  STD_TORCH_CHECK(reference.dim() == 4 && (reference.size(3) == 2 || reference.size(3) == 4), "reference must be [B, Q, L, 2 or 4]");
  check("reference", reference, {value.size(0), offsets.size(1), static_cast<int64_t>(shapes.size() / 2), reference.size(3)});
  STD_TORCH_CHECK(reference.scalar_type() == wanted, "reference must be float32, or float64 where value is");
}

inline void check_grad(const Tensor& grad, const Tensor& value, int64_t queries) {
  check("grad", grad, {value.size(0), queries, value.size(2) * value.size(3)});
  STD_TORCH_CHECK(grad.scalar_type() == value.scalar_type(), "grad must have the type of value");
}

}  // namespace deformable
