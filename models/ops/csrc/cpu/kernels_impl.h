// The CPU kernels. Included once per instruction set, within that set's namespace and target, after VECTOR_BYTES says how
// wide its registers are. Everything is in an unnamed namespace: no inline function compiled for one machine may be
// picked by the linker for another.
//
// Queries are taken sixteen at a time. What is computed per sample (where it lies, its four corners, its share of each)
// is computed for a sample of all sixteen at once, by loops over the queries that the compiler makes vectors of; what is
// computed per channel, by vectors over the channels of a head.

namespace {

#include "types.h"

constexpr int kQueries = 16;
constexpr int kWide = 32;                          // channels that are kept in registers at once
constexpr int64_t kScratchBytes = int64_t{8} << 20;  // of a level's gradient, per thread; see backward_value

template <class A>
constexpr int kNative = VECTOR_BYTES / sizeof(A);

// work.chunk<lanes, vectors>(first channel) over [0, channels), in the widest chunks that fit. Work is a struct because
// GCC compiles a lambda for the machine of the command line, whatever the target around it.
template <class A, class Work>
inline void over_channels(int64_t channels, const Work& work) {
  constexpr int native = kNative<A>;
  int64_t c = 0;
  for (; c + kWide <= channels; c += kWide) work.template chunk<native, kWide / native>(c);
  for (; c + native <= channels; c += native) work.template chunk<native, 1>(c);
  if constexpr (native > 8)
    for (; c + 8 <= channels; c += 8) work.template chunk<8, 1>(c);
  if constexpr (native > 4)
    for (; c + 4 <= channels; c += 4) work.template chunk<4, 1>(c);
  for (; c < channels; ++c) work.template chunk<1, 1>(c);
}

// exp for x <= 0, by 2^n * exp(r) with |r| <= ln(2) / 2 and Taylor's polynomial; in loops it becomes vectors.
inline float exponential(float x) {
  constexpr float shifter = 0x1.8p23f;  // adding it rounds to an integer, which then stands in the lowest bits
  const float clamped = x < -87.0f ? -87.0f : x;
  const float shifted = clamped * 1.44269504f + shifter;
  const float n = shifted - shifter;
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;  // ln(2) in two parts
  float series = 1.0f / 5040;
  for (const float coefficient : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    series = series * r + coefficient;
  const float power = bits_as<float>((bits_as<uint32_t>(shifted) << 23) + 0x3f800000u);
  return x < -87.0f ? 0.0f : series * power;
}
inline double exponential(double x) { return std::exp(x); }

template <class A, int lanes>
inline Vector<A, lanes / 2> folded(const Vector<A, lanes>& vector) {
  Vector<A, lanes / 2> halves[2];
  std::memcpy(halves, &vector, sizeof(vector));
  return halves[0] + halves[1];
}

// Adds the sum of each of four vectors to the four numbers at `to`.
template <class A, int lanes>
inline void add_sums(const Vector<A, lanes> (&from)[4], A* to) {
  if constexpr (lanes > 4) {
    const Vector<A, lanes / 2> half[4] = {folded<A, lanes>(from[0]), folded<A, lanes>(from[1]), folded<A, lanes>(from[2]),
                                          folded<A, lanes>(from[3])};
    add_sums<A, lanes / 2>(half, to);
  } else if constexpr (lanes == 4) {
    using Four = Vector<A, 4>;
    const auto &a = from[0], &b = from[1], &c = from[2], &d = from[3];
    const Four ab = Four{a[0], b[0], a[1], b[1]} + Four{a[2], b[2], a[3], b[3]};
    const Four cd = Four{c[0], d[0], c[1], d[1]} + Four{c[2], d[2], c[3], d[3]};
    const Four all = Four{ab[0], ab[1], cd[0], cd[1]} + Four{ab[2], ab[3], cd[2], cd[3]};
    store<A, 4, A>(to, load<4>(to) + all);
  } else {
    for (int k = 0; k < 4; ++k)
      for (int lane = 0; lane < lanes; ++lane) to[k] += from[k][lane];
  }
}

// The samples of up to sixteen queries for one head and a range of levels. Sample j of query i stands at [j * 16 + i].
template <class A>
class Samples {
 public:
  Samples(const Problem& problem, int64_t first_level, int64_t end_level, bool for_gradients)
      : problem_(problem), first_(first_level), end_(end_level), count_((end_level - first_level) * problem.points) {
    const size_t size = static_cast<size_t>(count_) * kQueries;
    for (auto* each : {&raw_x_, &raw_y_, &weight_}) each->resize(size);
    for (auto& each : factor_) each.resize(size);
    for (auto& each : corner_) each.resize(size);
    seen_.resize(size);
    const size_t per_level = static_cast<size_t>(end_ - first_) * kQueries;
    for (auto* each : {&shift_x_, &shift_y_, &scale_x_, &scale_y_}) each->resize(per_level);
    if (!for_gradients) return;
    for (auto* each : {share_x_, share_y_, slope_x_, slope_y_})
      for (int side = 0; side < 2; ++side) each[side].resize(size);
  }

  int64_t count() const { return count_; }  // samples of a query
  bool seen(int64_t at) const { return seen_[at]; }
  int32_t corner(int k, int64_t at) const { return corner_[k][at]; }
  A factor(int k, int64_t at) const { return factor_[k][at]; }

  // Reads queries [query, query + number) of image b. `origin` is the first level's first pixel.
  void read(const Inputs& in, int64_t b, int64_t query, int number, int64_t head) {
    const int64_t all = problem_.samples();
    for (int i = 0; i < number; ++i) {
      const int64_t row = ((b * problem_.queries + query + i) * problem_.heads + head) * all + first_ * problem_.points;
      if constexpr (std::is_same_v<A, float>) {
        if (in.raw == Type::float16) read_row<float16>(in, row, i);
        else if (in.raw == Type::bfloat16) read_row<bfloat16>(in, row, i);
        else read_row<float>(in, row, i);
      } else {
        read_row<double>(in, row, i);
      }
    }
    read_reference(in, b, query, number);
  }

  // Turns logits into weights, over all levels; keeps the largest logit and the sum for `restore_softmax`.
  void softmax(A* largest, A* sum) {
    for (int i = 0; i < kQueries; ++i) largest[i] = count_ ? weight_[i] : A(0), sum[i] = 0;
    for (int64_t j = 1; j < count_; ++j)
      for (int i = 0; i < kQueries; ++i) {
        const A logit = weight_[j * kQueries + i];
        largest[i] = logit > largest[i] ? logit : largest[i];
      }
    for (int64_t j = 0; j < count_; ++j)
      for (int i = 0; i < kQueries; ++i) {
        const A power = exponential(weight_[j * kQueries + i] - largest[i]);
        weight_[j * kQueries + i] = power;
        sum[i] += power;
      }
    A inverse[kQueries];
    for (int i = 0; i < kQueries; ++i) inverse[i] = 1 / sum[i];
    for (int64_t j = 0; j < count_; ++j)
      for (int i = 0; i < kQueries; ++i) weight_[j * kQueries + i] *= inverse[i];
  }

  // The weights of some of the levels, from what `softmax` found over all.
  void restore_softmax(const A* largest, const A* sum) {
    A inverse[kQueries];
    for (int i = 0; i < kQueries; ++i) inverse[i] = 1 / sum[i];
    for (int64_t j = 0; j < count_; ++j)
      for (int i = 0; i < kQueries; ++i)
        weight_[j * kQueries + i] = exponential(weight_[j * kQueries + i] - largest[i]) * inverse[i];
  }

  // Corners as tokens counted from `origin`, and the share of each in the output (weight times bilinear coefficient).
  template <bool for_gradients>
  void locate(int64_t origin) {
    for (int64_t l = first_; l < end_; ++l)
      for (int64_t p = 0; p < problem_.points; ++p)
        locate_sample<for_gradients>(problem_.levels[l], origin, l - first_, (l - first_) * problem_.points + p);
  }

  // dots[4 * at + k]: the output's gradient times the value at corner k. Leaves the gradients of raw x, raw y and weight
  // (or logit) in their arrays, and adds that of the reference to reference [queries, L, 2 or 4], if there is one.
  void gradients(const A* dots, int number, A* reference) {
    for (int64_t l = first_; l < end_; ++l)
      for (int64_t p = 0; p < problem_.points; ++p) {
        const int64_t j = (l - first_) * problem_.points + p;
        differentiate(dots + 4 * j * kQueries, j);
        if (problem_.form != Form::ready) add_reference(problem_.levels[l], l, j, number, reference);
        for (int64_t at = j * kQueries, i = 0; i < kQueries; ++i, ++at) {
          raw_x_[at] = slope_x_[0][at] * scale_x_[(l - first_) * kQueries + i];
          raw_y_[at] = slope_y_[0][at] * scale_y_[(l - first_) * kQueries + i];
        }
      }
    if (problem_.form != Form::ready) through_softmax();
    else weight_.swap(share_x_[0]);
  }

  // What `gradients` left, in the type that the inputs had.
  void write_gradients(const Inputs& in, const Gradients& to, int64_t b, int64_t query, int number, int64_t head) const {
    for (int i = 0; i < number; ++i) {
      const int64_t row = ((b * problem_.queries + query + i) * problem_.heads + head) * count_;
      if constexpr (std::is_same_v<A, float>) {
        if (in.raw == Type::float16) write_row<float16>(to, row, i);
        else if (in.raw == Type::bfloat16) write_row<bfloat16>(to, row, i);
        else write_row<float>(to, row, i);
      } else {
        write_row<double>(to, row, i);
      }
    }
  }

 private:
  template <class R>
  void read_row(const Inputs& in, int64_t row, int i) {
    const R* xy = static_cast<const R*>(in.locations) + 2 * row;
    const R* weights = static_cast<const R*>(in.weights) + row;
    for (int64_t j = 0, at = i; j < count_; ++j, at += kQueries) {
      raw_x_[at] = load_one(xy + 2 * j);
      raw_y_[at] = load_one(xy + 2 * j + 1);
      weight_[at] = load_one(weights + j);
    }
  }

  template <class R>
  void write_row(const Gradients& to, int64_t row, int i) const {
    R* xy = static_cast<R*>(to.locations) + 2 * row;
    R* weights = static_cast<R*>(to.weights) + row;
    for (int64_t j = 0, at = i; j < count_; ++j, at += kQueries) {
      store_one<R, A>(xy + 2 * j, raw_x_[at]);
      store_one<R, A>(xy + 2 * j + 1, raw_y_[at]);
      store_one<R, A>(weights + j, weight_[at]);
    }
  }

  // The pixel of a sample is shift + raw * scale, whatever the form.
  void read_reference(const Inputs& in, int64_t b, int64_t query, int number) {
    const int64_t levels = static_cast<int64_t>(problem_.levels.size());
    const A* boxes = static_cast<const A*>(in.reference);
    const int coordinates = problem_.form == Form::from_boxes ? 4 : 2;
    for (int64_t l = first_; l < end_; ++l) {
      const A width = problem_.levels[l].width, height = problem_.levels[l].height;
      for (int i = 0; i < number; ++i) {
        const int64_t at = (l - first_) * kQueries + i;
        const A* box = boxes + (problem_.form == Form::ready ? 0 : ((b * problem_.queries + query + i) * levels + l) * coordinates);
        const A half = A(0.5) / problem_.points;
        shift_x_[at] = problem_.form == Form::ready ? A(-0.5) : box[0] * width - A(0.5);
        shift_y_[at] = problem_.form == Form::ready ? A(-0.5) : box[1] * height - A(0.5);
        scale_x_[at] = problem_.form == Form::ready ? width : problem_.form == Form::from_points ? A(1) : box[2] * width * half;
        scale_y_[at] = problem_.form == Form::ready ? height : problem_.form == Form::from_points ? A(1) : box[3] * height * half;
      }
    }
  }

  template <bool for_gradients>
  void locate_sample(const Level& level, int64_t origin, int64_t l, int64_t j) {
    const A width = level.width, height = level.height;
    const int32_t last_x = level.width - 1, last_y = level.height - 1, row = level.width;
    const int32_t start = static_cast<int32_t>(level.start - origin);
    const bool empty = level.width == 0 || level.height == 0;
    const A *shift_x = &shift_x_[l * kQueries], *scale_x = &scale_x_[l * kQueries];
    const A *shift_y = &shift_y_[l * kQueries], *scale_y = &scale_y_[l * kQueries];
    const int64_t first = j * kQueries;
    const A *raw_x = &raw_x_[first], *raw_y = &raw_y_[first], *weight = &weight_[first];
#pragma GCC ivdep
    for (int i = 0; i < kQueries; ++i) {
      const int64_t at = first + i;
      A x = shift_x[i] + raw_x[i] * scale_x[i];
      A y = shift_y[i] + raw_y[i] * scale_y[i];
      // NaN is not inside, and nothing is converted to an integer before it is known to fit one
      const bool inside = !empty & (x > -1) & (x < width) & (y > -1) & (y < height);
      x = inside ? x : 0;
      y = inside ? y : 0;
      int32_t x0 = static_cast<int32_t>(x), y0 = static_cast<int32_t>(y);
      x0 -= x < x0;
      y0 -= y < y0;
      const A fx = x - x0, fy = y - y0;
      const bool left = inside & (x0 >= 0), right = inside & (x0 < last_x);
      const bool top = inside & (y0 >= 0), bottom = inside & (y0 < last_y);
      const A left_share = left ? 1 - fx : 0, right_share = right ? fx : 0;
      const A top_share = top ? 1 - fy : 0, bottom_share = bottom ? fy : 0;
      // A corner outside is replaced by its neighbour, which belongs to the same sample, with no share: NaN shows only
      // where it belongs, although an infinite value at the border shows as NaN.
      const int32_t x_left = left ? x0 : 0, x_right = right ? x0 + 1 : (left ? x0 : 0);
      const int32_t y_top = (top ? y0 : 0) * row + start, y_bottom = (bottom ? y0 + 1 : (top ? y0 : 0)) * row + start;
      corner_[0][at] = y_top + x_left;
      corner_[1][at] = y_top + x_right;
      corner_[2][at] = y_bottom + x_left;
      corner_[3][at] = y_bottom + x_right;
      factor_[0][at] = weight[i] * top_share * left_share;
      factor_[1][at] = weight[i] * top_share * right_share;
      factor_[2][at] = weight[i] * bottom_share * left_share;
      factor_[3][at] = weight[i] * bottom_share * right_share;
      // a weight that is not finite shows in the output although its sample lies outside
      seen_[at] = inside | (!empty & !(weight[i] * 0 == 0));
      if constexpr (for_gradients) {
        share_x_[0][at] = left_share, share_x_[1][at] = right_share;
        share_y_[0][at] = top_share, share_y_[1][at] = bottom_share;
        slope_x_[0][at] = left ? -1 : 0, slope_x_[1][at] = right ? 1 : 0;
        slope_y_[0][at] = top ? -1 : 0, slope_y_[1][at] = bottom ? 1 : 0;
      }
    }
  }

  // From here on share_x_[0] holds the gradient of the weight, slope_x_[0] and slope_y_[0] those of the pixel.
  void differentiate(const A* dots, int64_t j) {
    for (int i = 0; i < kQueries; ++i) {
      const int64_t at = j * kQueries + i;
      const A upper = share_x_[0][at] * dots[4 * i + 0] + share_x_[1][at] * dots[4 * i + 1];
      const A lower = share_x_[0][at] * dots[4 * i + 2] + share_x_[1][at] * dots[4 * i + 3];
      const A upper_slope = slope_x_[0][at] * dots[4 * i + 0] + slope_x_[1][at] * dots[4 * i + 1];
      const A lower_slope = slope_x_[0][at] * dots[4 * i + 2] + slope_x_[1][at] * dots[4 * i + 3];
      share_x_[0][at] = share_y_[0][at] * upper + share_y_[1][at] * lower;
      slope_x_[0][at] = weight_[at] * (share_y_[0][at] * upper_slope + share_y_[1][at] * lower_slope);
      slope_y_[0][at] = weight_[at] * (slope_y_[0][at] * upper + slope_y_[1][at] * lower);
    }
  }

  void add_reference(const Level& level, int64_t l, int64_t j, int number, A* reference) {
    const int64_t levels = static_cast<int64_t>(problem_.levels.size());
    const int coordinates = problem_.form == Form::from_boxes ? 4 : 2;
    const A half = A(0.5) / problem_.points;
    for (int i = 0; i < number; ++i) {
      const int64_t at = j * kQueries + i;
      A* to = reference + (i * levels + l) * coordinates;
      to[0] += slope_x_[0][at] * level.width;
      to[1] += slope_y_[0][at] * level.height;
      if (coordinates == 2) continue;
      to[2] += slope_x_[0][at] * level.width * raw_x_[at] * half;
      to[3] += slope_y_[0][at] * level.height * raw_y_[at] * half;
    }
  }

  void through_softmax() {
    A mean[kQueries] = {};
    for (int64_t j = 0; j < count_; ++j)
      for (int i = 0; i < kQueries; ++i) mean[i] += weight_[j * kQueries + i] * share_x_[0][j * kQueries + i];
    for (int64_t j = 0; j < count_; ++j)
      for (int i = 0; i < kQueries; ++i) weight_[j * kQueries + i] *= share_x_[0][j * kQueries + i] - mean[i];
  }

  const Problem& problem_;
  const int64_t first_, end_, count_;
  std::vector<A> raw_x_, raw_y_, weight_;
  std::vector<A> shift_x_, shift_y_, scale_x_, scale_y_;  // per level and query
  std::vector<int32_t> corner_[4];
  std::vector<A> factor_[4];
  std::vector<uint8_t> seen_;
  std::vector<A> share_x_[2], share_y_[2], slope_x_[2], slope_y_[2];
};

// The output of query i for one head: the weighted sum of its samples.
template <class T>
struct Gather {
  using A = Accumulator<T>;
  const Samples<A>& samples;
  int i;
  const T* value;
  int64_t stride;  // from token to token
  T* out;

  template <int lanes, int vectors>
  void chunk(int64_t c) const {
    Vector<A, lanes> total[vectors] = {};
    for (int64_t j = 0, at = i; j < samples.count(); ++j, at += kQueries) {
      if (!samples.seen(at)) continue;
      for (int k = 0; k < 4; ++k) {
        const T* from = value + samples.corner(k, at) * stride + c;
        const A factor = samples.factor(k, at);
        for (int v = 0; v < vectors; ++v) total[v] += factor * load<lanes>(from + v * lanes);
      }
    }
    for (int v = 0; v < vectors; ++v) store<T, lanes, A>(out + c + v * lanes, total[v]);
  }
};

template <class T>
void forward(const Problem& problem, const Inputs& in, void* out, int64_t b, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  const int64_t width = problem.heads * problem.channels;
  Samples<A> samples(problem, 0, static_cast<int64_t>(problem.levels.size()), false);
  A largest[kQueries], sum[kQueries];
  for (int64_t head = 0; head < problem.heads; ++head) {  // a head's values stay in the cache from query to query
    const T* value = static_cast<const T*>(in.value) + b * problem.tokens * width + head * problem.channels;
    for (int64_t query = begin; query < end; query += kQueries) {
      const int number = static_cast<int>(std::min<int64_t>(kQueries, end - query));
      samples.read(in, b, query, number, head);
      if (problem.form != Form::ready) samples.softmax(largest, sum);
      samples.template locate<false>(0);
      for (int i = 0; i < number; ++i) {
        T* to = static_cast<T*>(out) + (b * problem.queries + query + i) * width + head * problem.channels;
        over_channels<A>(problem.channels, Gather<T>{samples, i, value, width, to});
      }
    }
  }
}

// The products of query i's output gradient with the values at the corners of its samples, summed over the channels.
template <class T>
struct Dots {
  using A = Accumulator<T>;
  const Samples<A>& samples;
  int i;
  const T* grad;
  const T* value;
  int64_t stride;
  A* dots;  // four for every sample

  template <int lanes, int vectors>
  void chunk(int64_t c) const {
    Vector<A, lanes> given[vectors];
    for (int v = 0; v < vectors; ++v) given[v] = load<lanes>(grad + c + v * lanes);
    for (int64_t j = 0, at = i; j < samples.count(); ++j, at += kQueries) {
      if (!samples.seen(at)) continue;
      Vector<A, lanes> products[4];
      for (int k = 0; k < 4; ++k) {
        const T* from = value + samples.corner(k, at) * stride + c;
        products[k] = given[0] * load<lanes>(from);
        for (int v = 1; v < vectors; ++v) products[k] += given[v] * load<lanes>(from + v * lanes);
      }
      add_sums<A, lanes>(products, dots + 4 * at);
    }
  }
};

template <class T>
void backward_samples(const Problem& problem, const Inputs& in, const Gradients& gradients, int64_t b, int64_t begin,
                      int64_t end) {
  using A = Accumulator<T>;
  const int64_t width = problem.heads * problem.channels, levels = static_cast<int64_t>(problem.levels.size());
  const int64_t coordinates = problem.form == Form::ready ? 0 : problem.form == Form::from_points ? 2 : 4;
  Samples<A> samples(problem, 0, levels, true);
  std::vector<A> dots(4 * samples.count() * kQueries);
  A* reference = static_cast<A*>(gradients.reference);
  if (coordinates) {
    reference += b * problem.queries * levels * coordinates;
    std::fill(reference + begin * levels * coordinates, reference + end * levels * coordinates, A(0));
  }
  A largest[kQueries], sum[kQueries];
  for (int64_t head = 0; head < problem.heads; ++head) {
    const T* value = static_cast<const T*>(in.value) + b * problem.tokens * width + head * problem.channels;
    for (int64_t query = begin; query < end; query += kQueries) {
      const int number = static_cast<int>(std::min<int64_t>(kQueries, end - query));
      samples.read(in, b, query, number, head);
      if (coordinates) {
        samples.softmax(largest, sum);
        A* kept = static_cast<A*>(gradients.softmax) + ((b * problem.queries + query) * problem.heads + head) * 2;
        for (int i = 0; i < number; ++i, kept += 2 * problem.heads) kept[0] = largest[i], kept[1] = sum[i];
      }
      samples.template locate<true>(0);
      std::fill(dots.begin(), dots.end(), A(0));
      for (int i = 0; i < number; ++i) {
        const T* grad = static_cast<const T*>(gradients.out) + (b * problem.queries + query + i) * width + head * problem.channels;
        over_channels<A>(problem.channels, Dots<T>{samples, i, grad, value, width, dots.data()});
      }
      samples.gradients(dots.data(), number, reference + query * levels * coordinates);
      samples.write_gradients(in, gradients, b, query, number, head);
    }
  }
}

template <class A>
void read_weighted(Samples<A>& samples, const Problem& problem, const Inputs& in, const Gradients& gradients, int64_t b,
                   int64_t query, int number, int64_t head) {
  samples.read(in, b, query, number, head);
  if (problem.form == Form::ready) return;
  A largest[kQueries] = {}, sum[kQueries];
  std::fill(sum, sum + kQueries, A(1));
  const A* kept = static_cast<const A*>(gradients.softmax) + ((b * problem.queries + query) * problem.heads + head) * 2;
  for (int i = 0; i < number; ++i, kept += 2 * problem.heads) largest[i] = kept[0], sum[i] = kept[1];
  samples.restore_softmax(largest, sum);
}

// Adds what query i's samples owe to the values at their corners.
template <class T>
struct Scatter {
  using A = Accumulator<T>;
  const Samples<A>& samples;
  int i;
  const T* grad;
  A* total;
  int64_t stride;

  template <int lanes, int vectors>
  void chunk(int64_t c) const {
    Vector<A, lanes> given[vectors];
    for (int v = 0; v < vectors; ++v) given[v] = load<lanes>(grad + c + v * lanes);
    for (int64_t j = 0, at = i; j < samples.count(); ++j, at += kQueries) {
      if (!samples.seen(at)) continue;
      for (int k = 0; k < 4; ++k) {
        A* to = total + samples.corner(k, at) * stride + c;
        const A factor = samples.factor(k, at);
        for (int v = 0; v < vectors; ++v, to += lanes) store<A, lanes, A>(to, load<lanes>(to) + factor * given[v]);
      }
    }
  }
};

template <class T>
struct Convert {
  const Accumulator<T>* from;
  T* to;

  template <int lanes, int vectors>
  void chunk(int64_t c) const {
    for (int v = 0; v < vectors; ++v)
      store<T, lanes, Accumulator<T>>(to + c + v * lanes, load<lanes>(from + c + v * lanes));
  }
};

// Every query's part is added in its turn, in the accumulation type, to a copy of the level that this thread owns.
template <class T>
void backward_value(const Problem& problem, const Inputs& in, const Gradients& gradients, int64_t b, int64_t head,
                    int64_t l) {
  using A = Accumulator<T>;
  const Level& level = problem.levels[l];
  const int64_t pixels = int64_t{level.height} * level.width, width = problem.heads * problem.channels;
  if (pixels == 0) return;
  // as many channels at once as the scratch holds, but no less than a cache line of them
  const int64_t fitting = std::max<int64_t>(kScratchBytes / (pixels * sizeof(A)) / 16 * 16, 16);
  const int64_t at_once = std::min(fitting, problem.channels);
  std::vector<A> total(pixels * at_once);
  Samples<A> samples(problem, l, l + 1, false);
  for (int64_t channel = 0; channel < problem.channels; channel += at_once) {
    const int64_t channels = std::min(at_once, problem.channels - channel);
    if (channel) std::fill(total.begin(), total.end(), A(0));
    const int64_t offset = head * problem.channels + channel;
    const T* grad = static_cast<const T*>(gradients.out) + b * problem.queries * width + offset;
    for (int64_t query = 0; query < problem.queries; query += kQueries) {
      const int number = static_cast<int>(std::min<int64_t>(kQueries, problem.queries - query));
      read_weighted(samples, problem, in, gradients, b, query, number, head);
      samples.template locate<false>(level.start);
      for (int i = 0; i < number; ++i)
        over_channels<A>(channels, Scatter<T>{samples, i, grad + (query + i) * width, total.data(), channels});
    }
    T* to = static_cast<T*>(gradients.value) + (b * problem.tokens + level.start) * width + offset;
    for (int64_t pixel = 0; pixel < pixels; ++pixel)
      over_channels<A>(channels, Convert<T>{total.data() + pixel * channels, to + pixel * width});
  }
}

template <class T>
constexpr Kernels kKernels{forward<T>, backward_samples<T>, backward_value<T>};

}  // namespace

Kernels kernels(Type value) {
  switch (value) {
    case Type::float64: return kKernels<double>;
    case Type::float16: return kKernels<float16>;
    case Type::bfloat16: return kKernels<bfloat16>;
    default: return kKernels<float>;
  }
}
