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
constexpr int kWide = 32;                            // channels that are kept in registers at once
constexpr int64_t kScratchBytes = int64_t{8} << 20;  // of a level's gradient, per thread; see backward_value

template <class A>
constexpr int kNative = VECTOR_BYTES / sizeof(A);

// work.chunk<lanes, vectors>(first channel) over [0, channels), in the widest chunks that fit; what is left over is a last
// vector of which some lanes are not used. Work is a struct because GCC compiles a lambda for the machine of the command
// line, whatever the target around it.
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
  constexpr int last = native < 4 ? native : 4;
  if (c < channels) work.template chunk<last, 1, true>(c, static_cast<int>(channels - c));
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
    const Four ab = DEFORMABLE_SHUFFLE(from[0], from[1], 0, 4, 1, 5) + DEFORMABLE_SHUFFLE(from[0], from[1], 2, 6, 3, 7);
    const Four cd = DEFORMABLE_SHUFFLE(from[2], from[3], 0, 4, 1, 5) + DEFORMABLE_SHUFFLE(from[2], from[3], 2, 6, 3, 7);
    const Four all = DEFORMABLE_SHUFFLE(ab, cd, 0, 1, 4, 5) + DEFORMABLE_SHUFFLE(ab, cd, 2, 3, 6, 7);
    store<A, 4, A>(to, load<4>(to) + all);
  } else {
    for (int k = 0; k < 4; ++k)
      for (int lane = 0; lane < lanes; ++lane) to[k] += from[k][lane];
  }
}

template <class A>
inline void transpose(Vector<A, 4> (&m)[4]) {
  using Four = Vector<A, 4>;
  const Four a = DEFORMABLE_SHUFFLE(m[0], m[1], 0, 4, 1, 5), b = DEFORMABLE_SHUFFLE(m[2], m[3], 0, 4, 1, 5);
  const Four c = DEFORMABLE_SHUFFLE(m[0], m[1], 2, 6, 3, 7), d = DEFORMABLE_SHUFFLE(m[2], m[3], 2, 6, 3, 7);
  m[0] = DEFORMABLE_SHUFFLE(a, b, 0, 1, 4, 5), m[1] = DEFORMABLE_SHUFFLE(a, b, 2, 3, 6, 7);
  m[2] = DEFORMABLE_SHUFFLE(c, d, 0, 1, 4, 5), m[3] = DEFORMABLE_SHUFFLE(c, d, 2, 3, 6, 7);
}

// Along one axis, the two pixels on either side of sampling points, as vectors over queries.
template <class A>
struct Side {
  static constexpr int lanes = kNative<A> < kQueries ? kNative<A> : kQueries;
  using Integer = std::conditional_t<std::is_same_v<A, double>, int64_t, int32_t>;
  using Reals = Vector<A, lanes>;
  using Integers = Vector<Integer, lanes>;

  Integers first_index, second_index;
  Reals first_share, second_share;  // of the sample; 0 outside the map
  Reals first_slope, second_slope;  // of those, per pixel

  Side(const Reals& position, const Integers& inside, Integer last) {
    Integers floor = __builtin_convertvector(position, Integers);
    floor += position < __builtin_convertvector(floor, Reals);
    const Reals fraction = position - __builtin_convertvector(floor, Reals);
    const Integers has_first = inside & (floor >= 0), has_second = inside & (floor < last);
    // A pixel outside is replaced by its neighbour, which belongs to the same sample, with no share: NaN shows only
    // where it belongs, although an infinite value at the border shows as NaN.
    first_index = floor & has_first;
    second_index = has_second ? floor + 1 : first_index;
    first_index = has_first ? first_index : second_index;
    first_share = has_first ? 1 - fraction : Reals{};
    second_share = has_second ? fraction : Reals{};
    first_slope = __builtin_convertvector(has_first, Reals);
    second_slope = -__builtin_convertvector(has_second, Reals);
  }
};

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

  int64_t count() const { return count_; }           // samples of a query
  bool seen(int64_t at) const { return seen_[at]; }  // does it have a share in the output?
  int32_t corner(int k, int64_t at) const { return corner_[k][at]; }
  A factor(int k, int64_t at) const { return factor_[k][at]; }

  // Reads queries [query, query + number) of image b.
  void read(const Inputs& in, int64_t b, int64_t query, int number, int64_t head) {
    const int64_t first = row_of(b, query, head) + first_ * problem_.points;
    with_raw_type(in.raw, [&](auto type) { read_rows<decltype(type)>(in, first, number); });
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
        if (reference) add_reference(problem_.levels[l], l, j, number, reference);
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
    const int64_t first = row_of(b, query, head);
    with_raw_type(in.raw, [&](auto type) { write_rows<decltype(type)>(to, first, number); });
  }

 private:
  static constexpr int kLanes = Side<A>::lanes;
  using Integer = typename Side<A>::Integer;
  using Reals = typename Side<A>::Reals;
  using Integers = typename Side<A>::Integers;

  // body(an element of the type that locations and weights are given in). The body may be a lambda, see over_channels,
  // as long as it does nothing but call.
  template <class Body>
  static void with_raw_type(Type raw, const Body& body) {
    if constexpr (std::is_same_v<A, double>) return body(double{});
    else if (raw == Type::float16) return body(float16{});
    else if (raw == Type::bfloat16) return body(bfloat16{});
    else return body(float{});
  }

  // The first sample of a query and head, and how far on that of the next query is.
  int64_t row_of(int64_t b, int64_t query, int64_t head) const {
    return ((b * problem_.queries + query) * problem_.heads + head) * problem_.samples();
  }
  int64_t row_stride() const { return problem_.heads * problem_.samples(); }

  // Memory has a query's samples side by side, the arrays here have a sample of all queries so: four by four, rows
  // become columns. Behind the last query it is read again.
  template <class R>
  void read_rows(const Inputs& in, int64_t first, int number) {
    for (int i = 0; i < number; i += 4) {
      const R *xy[4], *weights[4];
      for (int k = 0; k < 4; ++k) {
        const int64_t row = first + std::min(i + k, number - 1) * row_stride();
        xy[k] = static_cast<const R*>(in.locations) + 2 * row;
        weights[k] = static_cast<const R*>(in.weights) + row;
      }
      int64_t j = 0;
      if constexpr (kLanes >= 4) {
        for (; j + 4 <= count_; j += 4) {
          Vector<A, 4> first_two[4], last_two[4], four[4];  // x, y, x, y; then the weights
          for (int k = 0; k < 4; ++k) {
            first_two[k] = load<4>(xy[k] + 2 * j);
            last_two[k] = load<4>(xy[k] + 2 * j + 4);
            four[k] = load<4>(weights[k] + j);
          }
          transpose<A>(first_two), transpose<A>(last_two), transpose<A>(four);
          for (int k = 0; k < 4; ++k) {
            auto& to = k % 2 ? raw_y_ : raw_x_;
            store<A, 4, A>(&to[(j + k / 2) * kQueries + i], first_two[k]);
            store<A, 4, A>(&to[(j + 2 + k / 2) * kQueries + i], last_two[k]);
            store<A, 4, A>(&weight_[(j + k) * kQueries + i], four[k]);
          }
        }
      }
      for (; j < count_; ++j)
        for (int k = 0; k < 4; ++k) {
          raw_x_[j * kQueries + i + k] = load_one(xy[k] + 2 * j);
          raw_y_[j * kQueries + i + k] = load_one(xy[k] + 2 * j + 1);
          weight_[j * kQueries + i + k] = load_one(weights[k] + j);
        }
    }
  }

  template <class R>
  void write_rows(const Gradients& to, int64_t first, int number) const {
    for (int i = 0; i < number; i += 4) {
      R* xy = static_cast<R*>(to.locations) + 2 * (first + i * row_stride());
      R* weights = static_cast<R*>(to.weights) + first + i * row_stride();
      const int rows = std::min(4, number - i);
      int64_t j = 0;
      if constexpr (kLanes >= 4) {
        for (; rows == 4 && j + 4 <= count_; j += 4) {
          Vector<A, 4> first_two[4], last_two[4], four[4];
          for (int k = 0; k < 4; ++k) {
            const auto& from = k % 2 ? raw_y_ : raw_x_;
            first_two[k] = load<4>(&from[(j + k / 2) * kQueries + i]);
            last_two[k] = load<4>(&from[(j + 2 + k / 2) * kQueries + i]);
            four[k] = load<4>(&weight_[(j + k) * kQueries + i]);
          }
          transpose<A>(first_two), transpose<A>(last_two), transpose<A>(four);
          for (int k = 0; k < 4; ++k) {
            store<R, 4, A>(xy + 2 * (k * row_stride() + j), first_two[k]);
            store<R, 4, A>(xy + 2 * (k * row_stride() + j) + 4, last_two[k]);
            store<R, 4, A>(weights + k * row_stride() + j, four[k]);
          }
        }
      }
      for (; j < count_; ++j)
        for (int k = 0; k < rows; ++k) {
          const int64_t at = j * kQueries + i + k;
          store_one<R, A>(xy + 2 * (k * row_stride() + j), raw_x_[at]);
          store_one<R, A>(xy + 2 * (k * row_stride() + j) + 1, raw_y_[at]);
          store_one<R, A>(weights + k * row_stride() + j, weight_[at]);
        }
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

  // Sample j of all sixteen queries. Comparisons of vectors give masks: -1 where they hold, 0 elsewhere.
  template <bool for_gradients>
  void locate_sample(const Level& level, int64_t origin, int64_t l, int64_t j) {
    if (level.width == 0 || level.height == 0) return leave_out(j, for_gradients);
    for (int i = 0; i < kQueries; i += kLanes) {
      const int64_t at = j * kQueries + i, around = l * kQueries + i;
      const Reals weight = load<kLanes>(&weight_[at]);
      const Reals x = load<kLanes>(&shift_x_[around]) + load<kLanes>(&raw_x_[at]) * load<kLanes>(&scale_x_[around]);
      const Reals y = load<kLanes>(&shift_y_[around]) + load<kLanes>(&raw_y_[at]) * load<kLanes>(&scale_y_[around]);
      // NaN is not inside, and nothing is converted to an integer before it is known to fit one
      const Integers inside = (x > -1) & (x < A(level.width)) & (y > -1) & (y < A(level.height));
      const Side<A> across(inside ? x : Reals{}, inside, level.width - 1);
      const Side<A> down(inside ? y : Reals{}, inside, level.height - 1);
      const Integers start = Integers{} + static_cast<Integer>(level.start - origin);
      const Integers upper = start + down.first_index * level.width, lower = start + down.second_index * level.width;
      put(corner_[0], at, upper + across.first_index);
      put(corner_[1], at, upper + across.second_index);
      put(corner_[2], at, lower + across.first_index);
      put(corner_[3], at, lower + across.second_index);
      put(factor_[0], at, weight * down.first_share * across.first_share);
      put(factor_[1], at, weight * down.first_share * across.second_share);
      put(factor_[2], at, weight * down.second_share * across.first_share);
      put(factor_[3], at, weight * down.second_share * across.second_share);
      // a weight that is not finite shows in the output although its sample lies outside
      put(seen_, at, inside | ~(weight * 0 == 0));
      if constexpr (for_gradients) {
        put(share_x_[0], at, across.first_share), put(share_x_[1], at, across.second_share);
        put(share_y_[0], at, down.first_share), put(share_y_[1], at, down.second_share);
        put(slope_x_[0], at, across.first_slope), put(slope_x_[1], at, across.second_slope);
        put(slope_y_[0], at, down.first_slope), put(slope_y_[1], at, down.second_slope);
      }
    }
  }

  // A sample of an empty level.
  void leave_out(int64_t j, bool for_gradients) {
    std::fill_n(&seen_[j * kQueries], kQueries, 0);
    if (!for_gradients) return;
    for (auto* each : {share_x_, share_y_, slope_x_, slope_y_})
      for (int side = 0; side < 2; ++side) std::fill_n(&each[side][j * kQueries], kQueries, A(0));
  }

  static void put(std::vector<A>& to, int64_t at, const Reals& reals) { store<A, kLanes, A>(&to[at], reals); }
  static void put(std::vector<int32_t>& to, int64_t at, const Integers& integers) {
    const auto narrow = __builtin_convertvector(integers, Vector<int32_t, kLanes>);
    std::memcpy(&to[at], &narrow, sizeof(narrow));
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
  std::vector<int32_t> seen_;
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

  template <int lanes, int vectors, bool partial = false>
  void chunk(int64_t c, int used = lanes) const {
    Vector<A, lanes> total[vectors] = {};
    for (int64_t j = 0, at = i; j < samples.count(); ++j, at += kQueries) {
      if (!samples.seen(at)) continue;
      for (int k = 0; k < 4; ++k) {
        const T* from = value + samples.corner(k, at) * stride + c;
        const A factor = samples.factor(k, at);
        for (int v = 0; v < vectors; ++v) total[v] += factor * load<lanes, partial>(from + v * lanes, used);
      }
    }
    for (int v = 0; v < vectors; ++v) store<T, lanes, A, partial>(out + c + v * lanes, total[v], used);
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

  template <int lanes, int vectors, bool partial = false>
  void chunk(int64_t c, int used = lanes) const {
    Vector<A, lanes> given[vectors];
    for (int v = 0; v < vectors; ++v) given[v] = load<lanes, partial>(grad + c + v * lanes, used);
    for (int64_t j = 0, at = i; j < samples.count(); ++j, at += kQueries) {
      if (!samples.seen(at)) continue;
      Vector<A, lanes> products[4];
      for (int k = 0; k < 4; ++k) {
        const T* from = value + samples.corner(k, at) * stride + c;
        products[k] = given[0] * load<lanes, partial>(from, used);
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
  if (reference) {
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
      samples.gradients(dots.data(), number, reference ? reference + query * levels * coordinates : nullptr);
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

  template <int lanes, int vectors, bool partial = false>
  void chunk(int64_t c, int used = lanes) const {
    Vector<A, lanes> given[vectors];
    for (int v = 0; v < vectors; ++v) given[v] = load<lanes, partial>(grad + c + v * lanes, used);
    for (int64_t j = 0, at = i; j < samples.count(); ++j, at += kQueries) {
      if (!samples.seen(at)) continue;
      for (int k = 0; k < 4; ++k) {
        A* to = total + samples.corner(k, at) * stride + c;
        const A factor = samples.factor(k, at);
        for (int v = 0; v < vectors; ++v, to += lanes) {
          const Vector<A, lanes> sum = load<lanes, partial>(to, used) + factor * given[v];
          store<A, lanes, A, partial>(to, sum, used);
        }
      }
    }
  }
};

template <class T>
struct Convert {
  const Accumulator<T>* from;
  T* to;

  template <int lanes, int vectors, bool partial = false>
  void chunk(int64_t c, int used = lanes) const {
    for (int v = 0; v < vectors; ++v) {
      const auto sums = load<lanes, partial>(from + c + v * lanes, used);
      store<T, lanes, Accumulator<T>, partial>(to + c + v * lanes, sums, used);
    }
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
