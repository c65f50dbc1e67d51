// What the CPU kernels compute on, and the table of kernels that one instruction set offers.
//
// Shape letters: B images, S tokens of all levels, M heads, D channels per head, Q queries, L levels, P points.
#pragma once

#include <cstdint>
#include <vector>

namespace deformable {

enum class Type { float32, float64, float16, bfloat16 };

struct Level {
  int32_t height, width;
  int64_t start;  // its first token
};

// How the sampling locations and attention weights are given.
enum class Form {
  ready,         // locations [B, Q, M, L, P, 2] in [0, 1] of a level, weights [B, Q, M, L, P]
  from_points,   // offsets in pixels around reference points [B, Q, L, 2], and logits
  from_boxes,    // offsets in half boxes / P around reference boxes [B, Q, L, 4], and logits
};

struct Problem {
  int64_t batch, tokens, heads, channels, queries, points;
  std::vector<Level> levels;
  Form form;

  int64_t samples() const { return static_cast<int64_t>(levels.size()) * points; }  // of a query and head
};

// Types: T is that of `value`, A (the accumulation type) is float64 for float64 and float32 for all others.
struct Inputs {
  const void* value;      // [B, S, M, D] of T
  const void* locations;  // [B, Q, M, L, P, 2] of `raw`: locations or offsets
  const void* weights;    // [B, Q, M, L, P] of `raw`: weights or logits
  const void* reference;  // [B, Q, L, 2 or 4] of A, unless the form is `ready`
  Type raw;
};

struct Gradients {
  const void* out;  // given: [B, Q, M * D] of T
  void* value;      // [B, S, M, D] of T
  void* locations;  // [B, Q, M, L, P, 2] of `raw`
  void* weights;    // [B, Q, M, L, P] of `raw`
  void* reference;  // [B, Q, L, 2 or 4] of A, unless the form is `ready`; null: not needed
  void* softmax;    // [B, Q, M, 2] of A: largest logit and sum of exponentials; left by `samples` for `value`
};

// No function touches what another call of it with other arguments writes, so any number of threads may share the
// work, and none of the results depends on how it is shared.
struct Kernels {
  // Queries [begin, end) of image b: the output [B, Q, M * D] of T.
  void (*forward)(const Problem&, const Inputs&, void* out, int64_t b, int64_t begin, int64_t end);
  // Queries [begin, end) of image b: the gradients of locations, weights and reference.
  void (*backward_samples)(const Problem&, const Inputs&, const Gradients&, int64_t b, int64_t begin, int64_t end);
  // One level and head of image b: the gradient of its values.
  void (*backward_value)(const Problem&, const Inputs&, const Gradients&, int64_t b, int64_t head, int64_t level);
};

namespace baseline {
Kernels kernels(Type value);
}
#if defined(__x86_64__)
namespace avx2 {
Kernels kernels(Type value);
}
namespace avx512 {
Kernels kernels(Type value);
}
#endif

}  // namespace deformable
