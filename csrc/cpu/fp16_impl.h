// Conversions between fp16 and the accumulation type; a part of row_kernels_impl.h. They use integer arithmetic and
// selections, for which every instruction set has vector instructions. Subnormal fp16 numbers are computed from normal
// fp32 numbers, so that a processor that flushes subnormals keeps them.

inline float float_of(std::uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

inline std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float from_fp16(std::uint16_t half) {
  constexpr std::uint32_t top = 0x7c00u << 13;  // the exponent of infinity and NaN
  const std::uint32_t bits = std::uint32_t(half & 0x7fffu) << 13, exponent = bits & top;
  const std::uint32_t wide = bits + (exponent == top ? 224u << 23 : 112u << 23);
  // 2^-14 (1 + m) - 2^-14 = 2^-14 m
  const std::uint32_t small = bits_of(float_of(bits + (113u << 23)) - float_of(113u << 23));
  return float_of((exponent == 0 ? small : wide) | std::uint32_t(half & 0x8000u) << 16);
}

// Rounds to nearest even. A value that is too large becomes infinity; NaN stays NaN.
inline std::uint16_t to_fp16(float value) {
  constexpr std::uint32_t half_one = 126u << 23, infinity = 255u << 23;
  const std::uint32_t bits = bits_of(value) & 0x7fffffffu, sign = (bits_of(value) >> 16) & 0x8000u;
  // For values below 2^-14: the last bit of 0.5 in fp32 is worth the smallest subnormal of fp16, so that adding 0.5
  // rounds.
  const std::uint32_t small = bits_of(float_of(bits) + float_of(half_one)) - half_one;
  const std::uint32_t normal = (bits - (112u << 23) + 0xfffu + ((bits >> 13) & 1u)) >> 13;
  const std::uint32_t large = bits > infinity ? 0x7e00u : 0x7c00u;
  return std::uint16_t(sign | (bits >= 143u << 23 ? large : bits < 113u << 23 ? small : normal));
}

template <class A>
void widen_fp16(const fp16* v, A* out, std::int64_t n) {
  const auto* half = reinterpret_cast<const std::uint16_t*>(v);
  for (std::int64_t j = 0; j < n; ++j) out[j] = A(from_fp16(half[j]));
}

template <class A>
void narrow_fp16(const A* v, fp16* out, std::int64_t n) {
  auto* half = reinterpret_cast<std::uint16_t*>(out);
  for (std::int64_t j = 0; j < n; ++j) half[j] = to_fp16(float(v[j]));
}
