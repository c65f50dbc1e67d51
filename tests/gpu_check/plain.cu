// The kernels that are written first: one thread computes one channel of one output, gradients are scalar atomics.
// float32, and no more checks than a comparison needs. tools/gpu_check.sh times the real kernels against them.
//
// Shape letters: B images, S tokens of all levels, M heads, D channels per head, Q queries, L levels, P points.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <tuple>
#include <vector>

namespace {

using torch::stable::Tensor;

constexpr int kThreads = 256;
constexpr int kMaxLevels = 8;

struct Sizes {
  int tokens, heads, channels, queries, levels, points;  // S M D Q L P
  int height[kMaxLevels], width[kMaxLevels], start[kMaxLevels];
};

/// Which output a thread computes.
struct Output {
  int image, head, channel;
  int64_t row;  // of (b, q, m)

  __device__ Output(int64_t thread, const Sizes& sizes)
      : image(thread / (int64_t(sizes.queries) * sizes.heads * sizes.channels)),
        head(thread / sizes.channels % sizes.heads),
        channel(thread % sizes.channels),
        row(thread / sizes.channels) {}
};

/// The four pixels around a sampling point.
struct Corners {
  float x, y;  // distances from the upper left one
  int column, line, height, width;
  bool inside;

  __device__ Corners(const float* location, int level, const Sizes& sizes)
      : height(sizes.height[level]), width(sizes.width[level]) {
    const float px = location[0] * width - 0.5f, py = location[1] * height - 0.5f;
    inside = px > -1 && px < width && py > -1 && py < height;
    column = inside ? static_cast<int>(floorf(px)) : 0;
    line = inside ? static_cast<int>(floorf(py)) : 0;
    x = px - column;
    y = py - line;
  }

  __device__ bool has(int k) const {
    const int c = column + k % 2, l = line + k / 2;
    return inside && c >= 0 && c < width && l >= 0 && l < height;
  }
  __device__ float bilinear(int k) const { return (k % 2 ? x : 1 - x) * (k / 2 ? y : 1 - y); }
  __device__ int64_t offset(int k, int level, const Output& output, const Sizes& sizes) const {
    const int token = sizes.start[level] + (line + k / 2) * width + column + k % 2;
    const int64_t pixel = (int64_t(output.image) * sizes.tokens + token) * sizes.heads + output.head;
    return pixel * sizes.channels + output.channel;
  }
};

__global__ void plain_forward_kernel(const float* value, const float* locations, const float* weights, float* out,
                                     int64_t count, Sizes sizes) {
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (thread >= count) return;
  const Output output(thread, sizes);
  float sum = 0;
  for (int level = 0; level < sizes.levels; ++level) {
    for (int point = 0; point < sizes.points; ++point) {
      const int64_t at = (output.row * sizes.levels + level) * sizes.points + point;
      const Corners corners(locations + 2 * at, level, sizes);
      for (int k = 0; k < 4; ++k) {
        if (corners.has(k)) sum += weights[at] * corners.bilinear(k) * value[corners.offset(k, level, output, sizes)];
      }
    }
  }
  out[thread] = sum;
}

__global__ void plain_backward_kernel(const float* grad, const float* value, const float* locations,
                                      const float* weights, float* grad_value, float* grad_locations,
                                      float* grad_weights, int64_t count, Sizes sizes) {
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (thread >= count) return;
  const Output output(thread, sizes);
  for (int level = 0; level < sizes.levels; ++level) {
    for (int point = 0; point < sizes.points; ++point) {
      const int64_t at = (output.row * sizes.levels + level) * sizes.points + point;
      const Corners corners(locations + 2 * at, level, sizes);
      if (!corners.inside) continue;
      float pixel[4] = {}, sampled = 0;
      for (int k = 0; k < 4; ++k) {
        if (!corners.has(k)) continue;
        const int64_t offset = corners.offset(k, level, output, sizes);
        pixel[k] = value[offset];
        sampled += corners.bilinear(k) * pixel[k];
        atomicAdd(grad_value + offset, weights[at] * corners.bilinear(k) * grad[thread]);
      }
      const float dx = (pixel[1] - pixel[0]) * (1 - corners.y) + (pixel[3] - pixel[2]) * corners.y;
      const float dy = (pixel[2] - pixel[0]) * (1 - corners.x) + (pixel[3] - pixel[1]) * corners.x;
      atomicAdd(grad_weights + at, grad[thread] * sampled);
      atomicAdd(grad_locations + 2 * at, grad[thread] * weights[at] * dx * corners.width);
      atomicAdd(grad_locations + 2 * at + 1, grad[thread] * weights[at] * dy * corners.height);
    }
  }
}

Sizes measure(const Tensor& value, const std::vector<int64_t>& shapes, const Tensor& locations) {
  STD_TORCH_CHECK(shapes.size() <= 2 * kMaxLevels, "the plain kernels take at most ", kMaxLevels, " levels");
  Sizes sizes = {int(value.size(1)), int(value.size(2)), int(value.size(3)), int(locations.size(1)),
                 int(locations.size(3)), int(locations.size(4)), {}, {}, {}};
  int start = 0;
  for (int level = 0; level < sizes.levels; ++level) {
    sizes.height[level] = int(shapes[2 * level]);
    sizes.width[level] = int(shapes[2 * level + 1]);
    sizes.start[level] = start;
    start += sizes.height[level] * sizes.width[level];
  }
  return sizes;
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Tensor& like, int64_t count, Arguments... arguments) {
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
  kernel<<<static_cast<unsigned>((count + kThreads - 1) / kThreads), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      arguments...);
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "plain kernel: ", cudaGetErrorString(error));
}

const float* data(const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); }
float* mutable_data(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

Tensor forward(const Tensor& value, std::vector<int64_t> shapes, const Tensor& locations, const Tensor& weights) {
  const Sizes sizes = measure(value, shapes, locations);
  Tensor out = torch::stable::new_empty(value, {value.size(0), locations.size(1), value.size(2) * value.size(3)});
  launch(plain_forward_kernel, value, out.numel(), data(value), data(locations), data(weights), mutable_data(out),
         out.numel(), sizes);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& value, std::vector<int64_t> shapes,
                                            const Tensor& locations, const Tensor& weights) {
  const auto zeros = [](const Tensor& like) { return torch::stable::new_zeros(like, like.sizes()); };
  const Sizes sizes = measure(value, shapes, locations);
  Tensor grad_value = zeros(value), grad_locations = zeros(locations), grad_weights = zeros(weights);
  launch(plain_backward_kernel, value, grad.numel(), data(grad), data(value), data(locations), data(weights),
         mutable_data(grad_value), mutable_data(grad_locations), mutable_data(grad_weights), grad.numel(), sizes);
  return {grad_value, grad_locations, grad_weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(deformable, m) {
  m.def("plain_forward(Tensor value, int[] shapes, Tensor locations, Tensor weights) -> Tensor");
  m.def(
      "plain_backward(Tensor grad, Tensor value, int[] shapes, Tensor locations, Tensor weights) "
      "-> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(deformable, CUDA, m) {
  m.impl("plain_forward", TORCH_BOX(&forward));
  m.impl("plain_backward", TORCH_BOX(&backward));
}
