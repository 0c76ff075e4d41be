// One pass over a tile of u = x·yᵀ: z = scale·u + bias, softplus, σ, dz and their sums. Compiled once for each level.
//
// With a = -s·z and e = exp(-|a|):  softplus(a) = max(a, 0) + log1p(e),  σ(a) = (a < 0 ? e : 1) / (1 + e).
// The log1p of many pairs costs one: Π(1 + e) - 1 is carried as p ← p + (e + p·e).

#include "epilogue.h"

#include <type_traits>

#include "convert.h"
#include "math.h"

namespace siglip::SIGLIP_LEVEL {
namespace {

constexpr int kSegment = 16;  // vectors between two looks at the labels
constexpr int kRun = 48;      // and between two times that float32 sums go to float64: p stays below 2^(kRun + kSegment)

template <class T>
SIGLIP_INLINE void add_to(Vector<double>& total, Vector<T> part) {
  if constexpr (sizeof(T) == sizeof(double)) {
    total += part;
  } else {
    Vector<T, SIGLIP_VECTOR_BYTES / 2> halves[2];
    std::memcpy(halves, &part, sizeof part);
    total += __builtin_convertvector(halves[0], Vector<double>) + __builtin_convertvector(halves[1], Vector<double>);
  }
}

double across(Vector<double> total) {
  double sum = 0;
  for (int lane = 0; lane < kLanes<double>; ++lane) sum += total[lane];
  return sum;
}

template <class T>
struct Sums {
  Vector<T> positive_part{}, product{}, dz_u{}, dz{};
  Vector<double> total_loss{}, total_dz_u{}, total_dz{};
  int vectors = 0;

  SIGLIP_INLINE void flush() {
    add_to<T>(total_loss, positive_part + log1p_of_nonnegative<T>(product));
    add_to<T>(total_dz_u, dz_u);
    add_to<T>(total_dz, dz);
    positive_part = product = dz_u = dz = Vector<T>{};
    vectors = 0;
  }
};

// Logits of the positive pairs [0] and of the negative ones [1].
template <class T>
struct Stats {
  Vector<T> sum[2]{}, count[2]{};
  Vector<T> least[2] = {broadcast(kInf), broadcast(kInf)}, largest[2] = {broadcast(-kInf), broadcast(-kInf)};
  Vector<double> total_sum[2]{}, total_count[2]{};

  template <class Mask>
  SIGLIP_INLINE void add(int which, Vector<T> z, Mask chosen) {
    sum[which] += chosen ? z : Vector<T>{};
    count[which] += chosen ? broadcast(T(1)) : Vector<T>{};
    least[which] = (chosen & (z < least[which])) ? z : least[which];
    largest[which] = (chosen & (z > largest[which])) ? z : largest[which];
  }

  SIGLIP_INLINE void flush() {
    for (int which = 0; which < 2; ++which) {
      add_to<T>(total_sum[which], sum[which]);
      add_to<T>(total_count[which], count[which]);
      sum[which] = count[which] = Vector<T>{};
    }
  }

  void write(double* to) const {
    for (int which = 0; which < 2; ++which) {
      to[which] = across(total_sum[which]);
      to[2 + which] = across(total_count[which]);
      to[4 + which] = kInf;
      to[6 + which] = -kInf;
      for (int lane = 0; lane < kLanes<T>; ++lane) {
        if (least[which][lane] < to[4 + which]) to[4 + which] = least[which][lane];
        if (largest[which][lane] > to[6 + which]) to[6 + which] = largest[which][lane];
      }
    }
  }

 private:
  static constexpr T kInf = T(__builtin_inf());
};

struct NoOutput {
  template <class T>
  SIGLIP_INLINE static void store(void*, int64_t, Vector<T>, int) {}
};
struct SameOutput {
  template <class T>
  SIGLIP_INLINE static void store(void* to, int64_t index, Vector<T> value, int count) {
    std::memcpy(static_cast<T*>(to) + index, &value, count * sizeof(T));
  }
};
template <Halves (*kConvert)(Floats)>
struct HalfOutput {
  template <class T>
  SIGLIP_INLINE static void store(void* to, int64_t index, Vector<T> value, int count) {
    const Halves halves = kConvert(value);
    std::memcpy(static_cast<int16_t*>(to) + index, &halves, count * sizeof(int16_t));
  }
};

// kGeneral: pairs that are left out, masses and stats too, and weights or not, as the block says.
template <class T, class Output, bool kWeights, bool kLossOnly, bool kGeneral = false>
class Pass {
 public:
  explicit Pass(const Block& block)
      : block_(block),
        scale_(*static_cast<const T*>(block.scale)),
        bias_(*static_cast<const T*>(block.bias)),
        dz_scale_(block.dz_scale ? *static_cast<const T*>(block.dz_scale) : T(1)) {}

  void run(const T* u, int64_t u_stride, Range rows, Range cols, double* sums) {
    for (int64_t i = rows.begin; i < rows.end; ++i, u += u_stride)
      for (int64_t j = cols.begin; j < cols.end; j += kWidth)
        segment(u + (j - cols.begin), i, {j, j + kWidth < cols.end ? j + kWidth : cols.end});
    flush();
    if constexpr (kGeneral)
      if (block_.stats) stats_.write(sums + kSums);
    sums[0] = across(sums_.total_loss);
    sums[1] = across(sums_.total_dz_u);
    sums[2] = across(sums_.total_dz);
  }

 private:
  static constexpr int kWidth = kSegment * kLanes<T>;

  SIGLIP_INLINE void flush() {
    sums_.flush();
    if constexpr (kGeneral) stats_.flush();
  }

  SIGLIP_INLINE bool weighted() const { return kGeneral ? block_.image_weights != nullptr : kWeights; }

  // Signs and masses of the pairs (i, cols); sign 0: left out.
  void label(int64_t i, Range cols) {
    const auto* image_masses = static_cast<const T*>(block_.image_masses);
    const auto* text_masses = static_cast<const T*>(block_.text_masses);
    for (int64_t j = cols.begin; j < cols.end; ++j) {
      const bool same = block_.image_ids[i] == block_.text_ids[j];
      const bool positive = block_.ignore_ids ? i + block_.offset == j : same;
      signs_[j - cols.begin] = positive ? T(-1) : same ? T(0) : T(1);
      masses_[j - cols.begin] = positive && image_masses ? image_masses[i] + text_masses[j] : T(1);
    }
  }

  SIGLIP_INLINE void segment(const T* u, int64_t i, Range cols) {
    if (block_.image_ids) {
      if constexpr (kGeneral)
        label(i, cols);
      else
        for (int64_t j = cols.begin; j < cols.end; ++j)
          signs_[j - cols.begin] = block_.image_ids[i] == block_.text_ids[j] ? T(-1) : T(1);
      segment<true>(u, i, cols);
    } else if (const int64_t j = i + block_.offset; cols.begin <= j && j < cols.end) {
      for (T& sign : signs_) sign = 1;
      signs_[j - cols.begin] = -1;
      segment<true>(u, i, cols);
    } else {
      segment<false>(u, i, cols);
    }
    if (sums_.vectors >= kRun) flush();
  }

  template <bool kSigns>
  SIGLIP_INLINE void segment(const T* u, int64_t i, Range cols) {
    int64_t j = cols.begin;
    for (; j + kLanes<T> <= cols.end; j += kLanes<T>)
      step<kSigns, false>(u + (j - cols.begin), i, j, j - cols.begin, kLanes<T>);
    if (j < cols.end) step<kSigns, true>(u + (j - cols.begin), i, j, j - cols.begin, int(cols.end - j));
    sums_.vectors += kSegment;
  }

  // Pairs (i, j), (i, j + 1), …; of the last vector of a ragged row only the first `count`.
  template <bool kSigns, bool kRagged>
  SIGLIP_INLINE void step(const T* u_at, int64_t i, int64_t j, int64_t in_segment, int count) {
    const int lanes = kRagged ? count : kLanes<T>;
    const Vector<T> u = load(u_at, lanes);
    Vector<T> a = u * scale_ + bias_, sign;
    if constexpr (kSigns) a *= sign = load(signs_ + in_segment, lanes);
    if constexpr (kSigns && kGeneral) a = sign == 0 ? broadcast(-T(__builtin_inf())) : a;
    if constexpr (kRagged) a = lane_numbers() < T(count) ? a : broadcast(-T(__builtin_inf()));  // counts for nothing

    const auto negative = a < 0;
    const Vector<T> e = exp_of_nonpositive<T>(minus_magnitude<T>(a));
    const Vector<T> positive_part = negative ? Vector<T>{} : a;
    Vector<T> weight, mass;
    if (weighted()) {
      weight = static_cast<const T*>(block_.image_weights)[i] *
               load(static_cast<const T*>(block_.text_weights) + j, lanes);
      const Vector<T> log = log1p_of_nonnegative<T>(e);
      Vector<T> softplus = positive_part + log;
      if constexpr (kSigns && kGeneral) {
        if (block_.image_masses) {
          mass = sign < 0 ? load(masses_ + in_segment, lanes) : broadcast(T(1));
          // Of soft targets mass·softplus(a) + (1 - mass)·softplus(-a), the latter of positives only.
          if (block_.soft_targets)
            softplus = log + mass * positive_part + (negative & (sign < 0) ? (mass - 1) * a : Vector<T>{});
          else
            softplus *= mass;
        }
      }
      sums_.positive_part += weight * softplus;
    } else {
      sums_.positive_part += positive_part;
      sums_.product += e + sums_.product * e;
    }
    if constexpr (kGeneral) {
      if (block_.stats) {
        const Vector<T> z = u * scale_ + bias_;
        auto valid = lane_numbers() < T(lanes);
        if (weighted()) valid &= weight != 0;
        if constexpr (kSigns) {
          stats_.add(0, z, valid & (sign < 0));
          valid &= sign > 0;
        }
        stats_.add(1, z, valid);
      }
    }
    if constexpr (kLossOnly) return;

    Vector<T> dz = (negative ? e : broadcast(T(1))) / (1 + e);
    if constexpr (kSigns && kGeneral) {
      if (block_.image_masses) {
        dz *= mass;
        if (block_.soft_targets) dz -= (1 - mass) * ((negative ? broadcast(T(1)) : e) / (1 + e));
      }
    }
    if constexpr (kSigns) dz *= sign;
    if (weighted()) dz *= weight;
    sums_.dz_u += dz * u;
    sums_.dz += dz;
    Output::template store<T>(block_.dz, i * block_.dz_stride + j, dz * dz_scale_, lanes);
  }

  SIGLIP_INLINE static Vector<T> lane_numbers() {
    Vector<T> numbers;
    for (int lane = 0; lane < kLanes<T>; ++lane) numbers[lane] = T(lane);
    return numbers;
  }

  const Block& block_;
  const T scale_, bias_, dz_scale_;
  struct Nothing {};
  Sums<T> sums_;
  std::conditional_t<kGeneral, Stats<T>, Nothing> stats_;
  T signs_[kWidth], masses_[kGeneral ? kWidth : 1];
};

template <class T, class Output, bool kLossOnly = false>
void run(const Block& block, const void* u, int64_t u_stride, Range rows, Range cols, double* sums) {
  const T* first = static_cast<const T*>(u);
  if (block.image_masses || block.ignore_ids || block.stats)
    Pass<T, Output, false, kLossOnly, true>(block).run(first, u_stride, rows, cols, sums);
  else if (block.image_weights)
    Pass<T, Output, true, kLossOnly>(block).run(first, u_stride, rows, cols, sums);
  else
    Pass<T, Output, false, kLossOnly>(block).run(first, u_stride, rows, cols, sums);
}

template <class T, class F>
void map(F function, const void* in, void* out, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    const int lanes = count - i < kLanes<T> ? int(count - i) : kLanes<T>;
    const auto value = function(load(static_cast<const T*>(in) + i, lanes));
    constexpr int kSize = sizeof value / kLanes<T>;
    std::memcpy(static_cast<char*>(out) + i * kSize, &value, lanes * kSize);
  }
}

}  // namespace

void epilogue(const Block& block, const void* u, int64_t u_stride, Range rows, Range cols, double* sums) {
  if (block.logits == Dtype::kFloat64) {
    if (block.loss_only) return run<double, NoOutput, true>(block, u, u_stride, rows, cols, sums);
    if (!block.dz) return run<double, NoOutput>(block, u, u_stride, rows, cols, sums);
    return run<double, SameOutput>(block, u, u_stride, rows, cols, sums);
  }
  if (block.loss_only) return run<float, NoOutput, true>(block, u, u_stride, rows, cols, sums);
  if (!block.dz) return run<float, NoOutput>(block, u, u_stride, rows, cols, sums);
  switch (block.operand) {
    case Dtype::kBfloat16: return run<float, HalfOutput<to_bfloat16>>(block, u, u_stride, rows, cols, sums);
    case Dtype::kFloat16: return run<float, HalfOutput<to_float16>>(block, u, u_stride, rows, cols, sums);
    default: return run<float, SameOutput>(block, u, u_stride, rows, cols, sums);
  }
}

void evaluate(Function function, Dtype dtype, const void* in, void* out, int64_t count) {
  const bool wide = dtype == Dtype::kFloat64;
  switch (function) {
    case Function::kExp: return wide ? map<double>(exp_of_nonpositive<double>, in, out, count)
                                     : map<float>(exp_of_nonpositive<float>, in, out, count);
    case Function::kLog1p: return wide ? map<double>(log1p_of_nonnegative<double>, in, out, count)
                                       : map<float>(log1p_of_nonnegative<float>, in, out, count);
    case Function::kToBfloat16: return map<float>(to_bfloat16, in, out, count);
    case Function::kToFloat16: return map<float>(to_float16, in, out, count);
  }
}

}  // namespace siglip::SIGLIP_LEVEL
