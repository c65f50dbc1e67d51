// Vectors of the compiler (GCC and Clang: vector_size), and loads and stores that convert to the accumulation type.
// Included by every instruction set within its own namespace.

template <class Element, int lanes>
struct VectorOf {
  typedef Element type __attribute__((vector_size(lanes * sizeof(Element))));
};
template <class Element, int lanes>
using Vector = typename VectorOf<Element, lanes>::type;

struct float16 {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};

// Four elements chosen from two vectors of four, counted through both.
#if defined(__clang__) || __GNUC__ >= 12
#define DEFORMABLE_SHUFFLE(one, two, ...) __builtin_shufflevector(one, two, __VA_ARGS__)
#else
#define DEFORMABLE_SHUFFLE(one, two, ...) \
  __builtin_shuffle(one, two, Vector<std::conditional_t<sizeof(one[0]) == 8, int64_t, int32_t>, 4>{__VA_ARGS__})
#endif

// The accumulation type of a value's type.
template <class T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class To, class From>
inline To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// `lanes` elements; of a partial vector the first `used`, fewer than all but at least one, and zeros.
template <class Element, int lanes, bool partial>
inline Vector<Element, lanes> load_raw(const void* from, int used) {
  Vector<Element, lanes> vector = {};
  if constexpr (partial && lanes > 1) {
    const Element* elements = static_cast<const Element*>(from);
    for (int i = 0; i < lanes - 1; ++i)
      if (i < used) std::memcpy(reinterpret_cast<Element*>(&vector) + i, elements + i, sizeof(Element));
  } else {
    std::memcpy(&vector, from, sizeof(vector));
  }
  return vector;
}

template <class Element, int lanes, bool partial>
inline void store_raw(void* to, const Vector<Element, lanes>& vector, int used) {
  if constexpr (partial && lanes > 1) {
    for (int i = 0; i < lanes - 1; ++i)
      if (i < used) static_cast<Element*>(to)[i] = vector[i];
  } else {
    std::memcpy(to, &vector, sizeof(vector));
  }
}

// `lanes` elements of T as accumulators.
template <int lanes, bool partial = false, class T>
inline Vector<Accumulator<T>, lanes> load(const T* from, int used = lanes) {
  if constexpr (std::is_same_v<T, bfloat16>) {  // the upper half of a float
    const auto wide = __builtin_convertvector((load_raw<uint16_t, lanes, partial>(from, used)), Vector<uint32_t, lanes>);
    return bits_as<Vector<float, lanes>>(wide << 16);
  } else if constexpr (std::is_same_v<T, float16>) {
    // Exponent and mantissa shifted into place give the number times 2^-112, subnormal ones too; a multiplication
    // rebases. Infinity and NaN get their exponent by hand.
    const auto wide = __builtin_convertvector((load_raw<uint16_t, lanes, partial>(from, used)), Vector<uint32_t, lanes>);
    const auto magnitude = (wide & 0x7fffu) << 13;
    const auto special = bits_as<Vector<uint32_t, lanes>>(magnitude >= (0x7c00u << 13)) & 0x7f800000u;
    const auto scaled = bits_as<Vector<uint32_t, lanes>>(bits_as<Vector<float, lanes>>(magnitude) * 0x1p112f);
    return bits_as<Vector<float, lanes>>(scaled | special | (wide & 0x8000u) << 16);
  } else {
    return load_raw<T, lanes, partial>(from, used);
  }
}

// Round to nearest, ties to even; NaN stays NaN.
template <class T, int lanes, class A, bool partial = false>
inline void store(T* to, const Vector<A, lanes>& accumulator, int used = lanes) {
  if constexpr (std::is_same_v<T, A>) {
    store_raw<A, lanes, partial>(to, accumulator, used);
  } else {
    using Bits = Vector<uint32_t, lanes>;
    const Bits bits = bits_as<Bits>(accumulator);
    const Bits magnitude = bits & 0x7fffffffu, sign = (bits & 0x80000000u) >> 16;
    const Bits is_nan = bits_as<Bits>(magnitude > 0x7f800000u);
    Bits rounded;
    if constexpr (std::is_same_v<T, bfloat16>) {
      rounded = (magnitude + 0x7fffu + ((magnitude >> 16) & 1u)) >> 16;
      rounded = (rounded & ~is_nan) | (0x7fc0u & is_nan);
    } else {
      const Bits normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
      // adding 1/2 leaves the mantissa of a subnormal half, rounded, in the lowest bits
      const Bits small = bits_as<Bits>(bits_as<Vector<float, lanes>>(magnitude) + 0.5f) - 0x3f000000u;
      const Bits is_small = bits_as<Bits>(magnitude < (113u << 23));
      const Bits is_big = bits_as<Bits>(magnitude >= 0x477ff000u);  // 65520 and above round to infinity
      rounded = (small & is_small) | (normal & ~is_small);
      rounded = (rounded & ~is_big) | (0x7c00u & is_big);
      rounded = (rounded & ~is_nan) | (0x7e00u & is_nan);
    }
    store_raw<uint16_t, lanes, partial>(to, __builtin_convertvector(rounded | sign, Vector<uint16_t, lanes>), used);
  }
}

template <class T>
inline Accumulator<T> load_one(const T* from) {
  return load<1>(from)[0];
}

template <class T, class A>
inline void store_one(T* to, A value) {
  store<T, 1, A>(to, Vector<A, 1>{value});
}
