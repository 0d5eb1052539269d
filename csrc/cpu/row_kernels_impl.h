// The loops of row_kernels.h, in plain C++ that compilers vectorise. This file is included once for each instruction
// set, under the pragma of that set, and fills the namespace DML_ISA. So it must not include headers.
//
// Sums are kept in a fixed number of lanes that are merged in a fixed order, so that the bits do not depend on the
// vector length that the compiler picks.

namespace dml::cpu::DML_ISA {
namespace {

constexpr std::int64_t sum_lanes = 16;

template <class A>
struct Exp;

// exp(x) = 2^n exp(r) with n = round(x / ln 2) and r = x - n ln 2, |r| <= 0.347: exp(r) by its Taylor polynomial, and
// 2^n by the exponent bits.
template <>
struct Exp<float> {
  using Bits = std::uint32_t;
  static constexpr float lowest = -87.3f, highest = 88.3f, magic = 12582912.f;  // 1.5 * 2^23: leaves n in low bits
  static constexpr float log2e = 1.44269504088896341f, ln2_hi = 0.693359375f, ln2_lo = -2.12194440e-4f;
  static constexpr int mantissa = 23;
  static constexpr Bits one = 0x3f800000u;
  static float taylor(float r) {
    float p = 1.f / 5040;
    p = p * r + 1.f / 720;
    p = p * r + 1.f / 120;
    p = p * r + 1.f / 24;
    p = p * r + 1.f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.f;
    return p * r + 1.f;
  }
};

template <>
struct Exp<double> {
  using Bits = std::uint64_t;
  static constexpr double lowest = -708.3, highest = 709.0, magic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double log2e = 1.44269504088896340736, ln2_hi = 6.93145751953125e-1,
                          ln2_lo = 1.42860682030941723212e-6;
  static constexpr int mantissa = 52;
  static constexpr Bits one = 0x3ff0000000000000ull;
  static double taylor(double r) {
    double p = 1.0 / 6227020800.0;
    p = p * r + 1.0 / 479001600.0;
    p = p * r + 1.0 / 39916800.0;
    p = p * r + 1.0 / 3628800.0;
    p = p * r + 1.0 / 362880.0;
    p = p * r + 1.0 / 40320.0;
    p = p * r + 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    p = p * r + 1.0;
    return p * r + 1.0;
  }
};

// Below `lowest` the result is 0, never a subnormal number. NaN stays NaN, because every comparison with it is false.
template <class A>
inline A exp_of(A x) {
  using E = Exp<A>;
  A c = x < E::lowest ? E::lowest : x;
  c = c > E::highest ? E::highest : c;
  const A shifted = c * E::log2e + E::magic;
  const A n = shifted - E::magic;
  const A r = (c - n * E::ln2_hi) - n * E::ln2_lo;
  typename E::Bits bits;
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << E::mantissa) + E::one;
  A power;
  __builtin_memcpy(&power, &bits, sizeof bits);
  const A y = E::taylor(r) * power;
  return x < E::lowest ? A(0) : y;
}

// Reduces over j in lanes with `step(lane, j)`, then joins one half of the lanes with the other until one is left.
template <class A, std::int64_t lanes = sum_lanes, class Step, class Join>
inline A fold(std::int64_t n, A start, Step step, Join join) {
  A lane[lanes];
  for (std::int64_t l = 0; l < lanes; ++l) lane[l] = start;
  std::int64_t j = 0;
  for (; j + lanes <= n; j += lanes)
    for (std::int64_t l = 0; l < lanes; ++l) lane[l] = step(lane[l], j + l);
  for (std::int64_t l = 0; j + l < n; ++l) lane[l] = step(lane[l], j + l);
  for (std::int64_t half = lanes / 2; half; half /= 2)
    for (std::int64_t l = 0; l < half; ++l) lane[l] = join(lane[l], lane[l + half]);
  return lane[0];
}

template <class A>
inline A plus(A a, A b) {
  return a + b;
}

template <class A, Metric metric, bool scaled, bool biased>
bool logits_of(const A* raw, const Row<A>& row, const Columns<A>& c, A* z, A* s_out, std::int64_t n) {
  const A r = metric == Metric::dot ? row.r : 2 * row.r, sq = row.sq, kt = row.kt, o = row.o;
  const A share = A(near_share);
  int close = 0;
  for (std::int64_t j = 0; j < n; ++j) {
    A s = scaled ? raw[j] * r * c.r[j] : raw[j] * r;
    if (metric != Metric::dot) {
      const A span = sq + c.sq[j];
      s -= span;
      close |= s > -share * span;
      s = s > A(0) ? A(0) : s;
      if (metric == Metric::euclidean) s = -std::sqrt(-s);
    }
    if (s_out) s_out[j] = s;
    const A v = kt * (s - o);
    z[j] = biased ? v + c.b[j] : v;
  }
  return close;
}

template <class A, Metric metric>
bool logits_for(const A* raw, const Row<A>& row, const Columns<A>& c, A* z, A* s, std::int64_t n) {
  if (c.r)
    return c.b ? logits_of<A, metric, true, true>(raw, row, c, z, s, n)
               : logits_of<A, metric, true, false>(raw, row, c, z, s, n);
  return c.b ? logits_of<A, metric, false, true>(raw, row, c, z, s, n)
             : logits_of<A, metric, false, false>(raw, row, c, z, s, n);
}

template <class A>
bool logits(Metric metric, const A* raw, const Row<A>& row, const Columns<A>& c, A* z, A* s, std::int64_t n) {
  switch (metric) {
    case Metric::dot:
      return logits_for<A, Metric::dot>(raw, row, c, z, s, n);
    case Metric::sqeuclidean:
      return logits_for<A, Metric::sqeuclidean>(raw, row, c, z, s, n);
    default:
      return logits_for<A, Metric::euclidean>(raw, row, c, z, s, n);
  }
}

template <class A>
A max_of(const A* z, std::int64_t n) {
  constexpr std::int64_t wide = 4 * sum_lanes;  // enough chains to hide a maximum's latency
  const auto larger = [](A a, A b) { return a > b ? a : b; };
  return fold<A, wide>(
      n, -std::numeric_limits<A>::infinity(), [=](A a, std::int64_t j) { return larger(a, z[j]); }, larger);
}

template <class A>
double sum_exp(const A* z, std::int64_t n, A max) {
  return fold<A>(n, A(0), [=](A a, std::int64_t j) { return a + exp_of<A>(z[j] - max); }, plus<A>);
}

template <class A>
double sum_used(const A* z, std::int64_t n) {
  constexpr A out = -std::numeric_limits<A>::infinity();
  return fold<A>(n, A(0), [=](A a, std::int64_t j) { return a + (z[j] == out ? A(0) : z[j]); }, plus<A>);
}

template <class A>
void weights(A* z, std::int64_t n, A lse, A g, A h) {
  constexpr A out = -std::numeric_limits<A>::infinity();
  if (h == A(0))
    for (std::int64_t j = 0; j < n; ++j) z[j] = g * exp_of<A>(z[j] - lse);
  else
    for (std::int64_t j = 0; j < n; ++j) z[j] = g * exp_of<A>(z[j] - lse) + (z[j] == out ? A(0) : h);
}

template <class A>
void root_grad(A* dz, const A* s, std::int64_t n) {
  for (std::int64_t j = 0; j < n; ++j) dz[j] *= root_slope(s[j]);
}

template <class A>
A sum(const A* v, std::int64_t n) {
  return fold<A>(n, A(0), [=](A a, std::int64_t j) { return a + v[j]; }, plus<A>);
}

template <class A>
A dot(const A* a, const A* b, std::int64_t n) {
  return fold<A>(n, A(0), [=](A t, std::int64_t j) { return t + a[j] * b[j]; }, plus<A>);
}

template <class A>
A squared_distance(const A* u, const A* p, std::int64_t n) {
  const auto step = [=](A t, std::int64_t j) {
    const A difference = u[j] - p[j];
    return t + difference * difference;
  };
  return fold<A>(n, A(0), step, plus<A>);
}

template <class A>
void add(A* total, const A* v, std::int64_t n) {
  for (std::int64_t j = 0; j < n; ++j) total[j] += v[j];
}

template <class A>
void scale(A* v, A f, std::int64_t n) {
  for (std::int64_t j = 0; j < n; ++j) v[j] *= f;
}

template <class A>
void axpy(A* y, A a, const A* x, std::int64_t n) {
  for (std::int64_t j = 0; j < n; ++j) y[j] += a * x[j];
}

template <class A>
void scale_each(const A* v, A f, const A* r, A* out, std::int64_t n) {
  if (r)
    for (std::int64_t j = 0; j < n; ++j) out[j] = v[j] * f * r[j];
  else
    for (std::int64_t j = 0; j < n; ++j) out[j] = v[j] * f;
}

// Rounds the bits to nearest even; NaN stays NaN.
inline std::uint16_t to_bf16(float value) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return std::uint16_t(value != value ? 0x7fc0u : rounded);
}

inline float from_bf16(std::uint16_t half) {
  const std::uint32_t bits = std::uint32_t(half) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

template <class A>
void scale_each_bf16(const A* v, A f, const A* r, bf16* out, std::int64_t n) {
  auto* half = reinterpret_cast<std::uint16_t*>(out);
  if (r)
    for (std::int64_t j = 0; j < n; ++j) half[j] = to_bf16(float(v[j] * f * r[j]));
  else
    for (std::int64_t j = 0; j < n; ++j) half[j] = to_bf16(float(v[j] * f));
}

template <class A>
void widen(const bf16* v, A* out, std::int64_t n) {
  const auto* half = reinterpret_cast<const std::uint16_t*>(v);
  for (std::int64_t j = 0; j < n; ++j) out[j] = A(from_bf16(half[j]));
}

template <class A>
void add_bf16(A* total, const bf16* v, std::int64_t n) {
  const auto* half = reinterpret_cast<const std::uint16_t*>(v);
  for (std::int64_t j = 0; j < n; ++j) total[j] += A(from_bf16(half[j]));
}

#include "fp16_impl.h"

template <class A>
void affine(A* z, A k, A o, std::int64_t n) {
  for (std::int64_t j = 0; j < n; ++j) z[j] = k * z[j] + o;
}

template <class A>
double sum_positive(const A* z, std::int64_t n, std::int64_t& count) {
  count +=
      std::int64_t(fold<A>(n, A(0), [=](A a, std::int64_t j) { return a + (z[j] <= A(0) ? A(0) : A(1)); }, plus<A>));
  return fold<A>(n, A(0), [=](A a, std::int64_t j) { return a + (z[j] <= A(0) ? A(0) : z[j]); }, plus<A>);
}

template <class A>
void indicate(A* z, A value, std::int64_t n) {
  for (std::int64_t j = 0; j < n; ++j) z[j] = z[j] <= A(0) ? A(0) : value;
}

template <class A>
void within(A* z, A sign, A low, A high, std::int64_t n) {
  constexpr A out = -std::numeric_limits<A>::infinity();
  for (std::int64_t j = 0; j < n; ++j) z[j] = (z[j] >= low) & (z[j] <= high) ? sign * z[j] : out;
}

template <class A>
std::int64_t count_used(const A* z, std::int64_t n) {
  constexpr A out = -std::numeric_limits<A>::infinity();
  return std::int64_t(fold<A>(n, A(0), [=](A a, std::int64_t j) { return a + (z[j] > out ? A(1) : A(0)); }, plus<A>));
}
#include "policy_kernels_impl.h"

}  // namespace

template <class A>
const RowKernels<A>& table() {
  static constexpr RowKernels<A> kernels = {
      .logits = logits<A>,
      .max = max_of<A>,
      .sum_exp = sum_exp<A>,
      .sum_used = sum_used<A>,
      .weights = weights<A>,
      .root_grad = root_grad<A>,
      .sum = sum<A>,
      .dot = dot<A>,
      .squared_distance = squared_distance<A>,
      .add = add<A>,
      .scale = scale<A>,
      .axpy = axpy<A>,
      .scale_each = scale_each<A>,
      .scale_each_bf16 = scale_each_bf16<A>,
      .widen = widen<A>,
      .add_bf16 = add_bf16<A>,
      .widen_fp16 = widen_fp16<A>,
      .narrow_fp16 = narrow_fp16<A>,
      .affine = affine<A>,
      .sum_positive = sum_positive<A>,
      .indicate = indicate<A>,
      .within = within<A>,
      .count_used = count_used<A>,
      .max_pool = max_pool<A>,
      .softmax_pool = softmax_pool<A>,
      .spread = spread<A>,
      .circle = circle<A>,
      .multiply_by = multiply_by<A>,
  };
  return kernels;
}

template const RowKernels<float>& table<float>();
template const RowKernels<double>& table<double>();

}  // namespace dml::cpu::DML_ISA
