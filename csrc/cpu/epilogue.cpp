// One pass over a tile of u = x·yᵀ: z = scale·u + bias, softplus, σ, dz and their sums. Compiled for each ISA level.
//
// With a = -s·z and e = exp(-|a|):  softplus(a) = max(a, 0) + log1p(e),  σ(a) = (a < 0 ? e : 1) / (1 + e).
// Many pairs share one log1p: p = Π(1 + e) - 1 is accumulated as p ← p + (e + p·e).
// With masses, a balance or a teacher the term is f·softplus(a) + g·softplus(-a) instead, and dz is -s·(f·σ(a) - g·σ(-a)).

#include "epilogue.h"

#include <type_traits>

#include "convert.h"
#include "simd_math.h"

namespace siglip::SIGLIP_ISA_LEVEL {
namespace {

constexpr int kSegmentVectors = 16;  // vectors between two checks for positives
constexpr int kFlushVectors = 48;  // vectors between flushes to float64: p stays below 2^(the sum of both)

template <class T>
SIGLIP_INLINE void add_as_double(Vector<double>& total, Vector<T> part) {
  if constexpr (sizeof(T) == sizeof(double)) {
    total += part;
  } else {
    Vector<T, SIGLIP_VECTOR_BYTES / 2> halves[2];
    std::memcpy(halves, &part, sizeof part);
    total += __builtin_convertvector(halves[0], Vector<double>) + __builtin_convertvector(halves[1], Vector<double>);
  }
}

template <int kBytes = SIGLIP_VECTOR_BYTES>
SIGLIP_INLINE double reduce_add(Vector<double, kBytes> total) {
  if constexpr (kBytes == 2 * sizeof(double)) {
    return total[0] + total[1];
  } else {
    Vector<double, kBytes / 2> halves[2];
    std::memcpy(halves, &total, sizeof total);
    return reduce_add<kBytes / 2>(halves[0] + halves[1]);
  }
}

template <class T>
struct Sums {
  Vector<T> relu{}, product{}, dz_u{}, dz{};  // loss: relu(a), and Π(1 + e) - 1
  Vector<double> total_loss{}, total_dz_u{}, total_dz{};
  int num_vectors = 0;  // since the last flush

  template <bool kLossOnly>
  SIGLIP_INLINE void flush() {
    add_as_double<T>(total_loss, relu + log1p_nonnegative<T>(product));
    relu = product = Vector<T>{};
    num_vectors = 0;
    if constexpr (kLossOnly) return;
    add_as_double<T>(total_dz_u, dz_u);
    add_as_double<T>(total_dz, dz);
    dz_u = dz = Vector<T>{};
  }
};

// Of the logits of positive pairs [0] and of negative pairs [1].
template <class T>
struct Stats {
  Vector<T> sum[2]{}, count[2]{};
  Vector<T> min[2] = {broadcast(kInf), broadcast(kInf)}, max[2] = {broadcast(-kInf), broadcast(-kInf)};
  Vector<double> total_sum[2]{}, total_count[2]{};

  template <class Mask>
  SIGLIP_INLINE void add(int kind, Vector<T> z, Mask mask) {
    sum[kind] += mask ? z : Vector<T>{};
    count[kind] += mask ? broadcast(T(1)) : Vector<T>{};
    min[kind] = (mask & (z < min[kind])) ? z : min[kind];
    max[kind] = (mask & (z > max[kind])) ? z : max[kind];
  }

  SIGLIP_INLINE void flush() {
    for (int kind = 0; kind < 2; ++kind) {
      add_as_double<T>(total_sum[kind], sum[kind]);
      add_as_double<T>(total_count[kind], count[kind]);
      sum[kind] = count[kind] = Vector<T>{};
    }
  }

  void write(double* out) const {
    for (int kind = 0; kind < 2; ++kind) {
      out[kind] = reduce_add(total_sum[kind]);
      out[2 + kind] = reduce_add(total_count[kind]);
      out[4 + kind] = kInf;
      out[6 + kind] = -kInf;
      for (int lane = 0; lane < kLanes<T>; ++lane) {
        if (min[kind][lane] < out[4 + kind]) out[4 + kind] = min[kind][lane];
        if (max[kind][lane] > out[6 + kind]) out[6 + kind] = max[kind][lane];
      }
    }
  }

 private:
  static constexpr T kInf = T(__builtin_inf());
};

// Where dz goes: nowhere, to the logits' dtype, to half precision.
struct NoDz {
  template <class T>
  SIGLIP_INLINE static void store(void*, int64_t, Vector<T>, int) {}
};
struct LogitsDz {
  template <class T>
  SIGLIP_INLINE static void store(void* dz, int64_t index, Vector<T> value, int count) {
    std::memcpy(static_cast<T*>(dz) + index, &value, count * sizeof(T));
  }
};
template <Halves (*kConvert)(Floats)>
struct HalfDz {
  template <class T>
  SIGLIP_INLINE static void store(void* dz, int64_t index, Vector<T> value, int count) {
    const Halves halves = kConvert(value);
    std::memcpy(static_cast<int16_t*>(dz) + index, &halves, count * sizeof(int16_t));
  }
};

// kGeneral: also ignored pairs, masses, a balance, a teacher and stats, and weights if there are any, all checked at run time.
// kByImage: also the loss of every image, which kGeneral writes if it is asked for.
template <class T, class DzOutput, bool kWeights, bool kLossOnly, bool kGeneral = false, bool kByImage = false>
class TileEpilogue {
 public:
  explicit TileEpilogue(const BlockParams& params)
      : params_(params),
        scale_(*static_cast<const T*>(params.scale)),
        bias_(*static_cast<const T*>(params.bias)),
        dz_scale_(params.dz_scale ? *static_cast<const T*>(params.dz_scale) : T(1)) {}

  void run(const T* u, int64_t u_stride, Range rows, Range cols, double* sums) {
    for (int64_t i = rows.begin; i < rows.end; ++i, u += u_stride) {
      for (int64_t j = cols.begin; j < cols.end; j += kSegmentWidth)
        run_segment(u + (j - cols.begin), i, {j, j + kSegmentWidth < cols.end ? j + kSegmentWidth : cols.end});
      if ((kByImage || (kGeneral && kLossOnly)) && params_.image_losses) write_image_loss(cols.begin / kTileColumns * params_.rows + i);
    }
    flush();
    if constexpr (kGeneral)
      if (params_.stats) stats_.write(sums + kNumSums);
    sums[0] = reduce_add(sums_.total_loss);
    sums[1] = reduce_add(sums_.total_dz_u);
    sums[2] = reduce_add(sums_.total_dz);
  }

 private:
  static constexpr int kSegmentWidth = kSegmentVectors * kLanes<T>;

  // The loss of what has run since the last call.
  SIGLIP_INLINE void write_image_loss(int64_t index) {
    flush();
    const double total = reduce_add(sums_.total_loss);
    params_.image_losses[index] = total - previous_loss_;
    previous_loss_ = total;
  }

  SIGLIP_INLINE void flush() {
    sums_.template flush<kLossOnly>();
    if constexpr (kGeneral) stats_.flush();
  }

  SIGLIP_INLINE bool has_weights() const { return kGeneral ? params_.image_weights != nullptr : kWeights; }
  SIGLIP_INLINE bool has_parts() const {
    return kGeneral && (params_.image_masses || params_.has_balance || params_.teacher);
  }
  SIGLIP_INLINE bool has_second_part() const {
    return params_.soft_targets || params_.teacher || (params_.has_balance && params_.label_smoothing != 0);
  }

  // Signs and masses of the pairs (i, cols). Ignored pairs have the sign 0.
  void fill_signs_and_masses(int64_t i, Range cols) {
    const auto* image_masses = static_cast<const T*>(params_.image_masses);
    const auto* text_masses = static_cast<const T*>(params_.text_masses);
    for (int64_t j = cols.begin; j < cols.end; ++j) {
      const bool same = params_.image_ids[i] == params_.text_ids[j];
      const bool positive = params_.ignore_ids ? i + params_.offset == j : same;
      signs_[j - cols.begin] = positive ? T(-1) : same ? T(0) : T(1);
      masses_[j - cols.begin] = positive && image_masses ? image_masses[i] + text_masses[j] : T(1);
    }
  }

  // f and g of the terms of a vector, the pairs (i, j), (i, j + 1), …, without their weights.
  SIGLIP_INLINE void load_parts(Vector<T> sign, int64_t i, int64_t j, int64_t segment_offset, int lanes, Vector<T>& f,
                                Vector<T>& g) const {
    const Vector<T> ones = broadcast(T(1)), mass = params_.image_masses ? load(masses_ + segment_offset, lanes) : ones;
    f = mass;
    g = params_.soft_targets ? 1 - f : Vector<T>{};
    if (params_.has_balance) mix(T(1 - params_.label_smoothing), T(params_.label_smoothing) * g,
                                 T(params_.label_smoothing) * f, f, g);
    if (params_.teacher) {
      const Vector<T> u = load(static_cast<const T*>(params_.teacher) + i * params_.teacher_stride + j, lanes);
      const Vector<T> a = sign * (u * *static_cast<const T*>(params_.teacher_scale) +
                                  *static_cast<const T*>(params_.teacher_bias));
      const Vector<T> e = exp_nonpositive<T>(negative_abs<T>(a));
      const Vector<T> weight = T(params_.teacher_weight) * (params_.soft_targets ? ones : mass) / (1 + e);
      mix(T(1 - params_.teacher_weight), weight * (a < 0 ? ones : e), weight * (a < 0 ? e : ones), f, g);
    }
    if (params_.has_balance) {  // positive_weight is a factor of softplus(-z): of f for a positive pair, else of g
      const Vector<T> positive_weight = broadcast(T(params_.positive_weight));
      f *= sign < 0 ? positive_weight : ones;
      g *= sign < 0 ? ones : positive_weight;
    }
  }
  SIGLIP_INLINE static void mix(T rest, Vector<T> more_f, Vector<T> more_g, Vector<T>& f, Vector<T>& g) {
    f = rest * f + more_f;
    g = rest * g + more_g;
  }

  SIGLIP_INLINE void run_segment(const T* u, int64_t i, Range cols) {
    if (params_.image_ids) {
      if constexpr (kGeneral)
        fill_signs_and_masses(i, cols);
      else
        for (int64_t j = cols.begin; j < cols.end; ++j)
          signs_[j - cols.begin] = params_.image_ids[i] == params_.text_ids[j] ? T(-1) : T(1);
      run_segment<true>(u, i, cols);
    } else if (const int64_t j = i + params_.offset; cols.begin <= j && j < cols.end) {
      for (T& sign : signs_) sign = 1;
      signs_[j - cols.begin] = -1;
      run_segment<true>(u, i, cols);
    } else {
      run_segment<false>(u, i, cols);
    }
    if (sums_.num_vectors >= kFlushVectors) flush();
  }

  template <bool kSigns>
  SIGLIP_INLINE void run_segment(const T* u, int64_t i, Range cols) {
    int64_t j = cols.begin;
    for (; j + kLanes<T> <= cols.end; j += kLanes<T>)
      run_vector<kSigns, false>(u + (j - cols.begin), i, j, j - cols.begin, kLanes<T>);
    if (j < cols.end) run_vector<kSigns, true>(u + (j - cols.begin), i, j, j - cols.begin, int(cols.end - j));
    sums_.num_vectors += kSegmentVectors;
  }

  // The pairs (i, j), (i, j + 1), … of one vector: with kRagged, at the end of a row, only the first `count`.
  template <bool kSigns, bool kRagged>
  SIGLIP_INLINE void run_vector(const T* u_src, int64_t i, int64_t j, int64_t segment_offset, int count) {
    const int lanes = kRagged ? count : kLanes<T>;
    const Vector<T> u = load(u_src, lanes);
    Vector<T> a = u * scale_ + bias_, sign = broadcast(T(1));
    if constexpr (kSigns) a *= sign = load(signs_ + segment_offset, lanes);
    if constexpr (kSigns && kGeneral) a = sign == 0 ? broadcast(-T(__builtin_inf())) : a;
    if constexpr (kRagged) a = lane_indices() < T(count) ? a : broadcast(-T(__builtin_inf()));  // adds 0 to every sum

    const auto negative = a < 0;
    const Vector<T> e = exp_nonpositive<T>(negative_abs<T>(a));
    const Vector<T> relu = negative ? Vector<T>{} : a;
    Vector<T> weight, f, g;
    if (has_weights()) {
      weight = static_cast<const T*>(params_.image_weights)[i] *
               load(static_cast<const T*>(params_.text_weights) + j, lanes);
      const Vector<T> log = log1p_nonnegative<T>(e);
      Vector<T> softplus = relu + log;
      if (has_parts()) {
        load_parts(sign, i, j, segment_offset, lanes, f, g);
        if (has_second_part()) {
          // softplus(-a) = max(-a, 0) + log, but 0 for what is left out: pairs of sign 0, and past the row's end. Of 0
          // times infinity nothing is left.
          const auto counted = (kSigns ? sign != 0 : lane_indices() < T(lanes)) & (g != 0);
          softplus = f * relu + (f + g) * log + (negative & counted ? -g * a : Vector<T>{});
        } else {
          softplus *= f;
        }
      }
      sums_.relu += weight * softplus;
    } else {
      sums_.relu += relu;
      sums_.product += e + sums_.product * e;
    }
    if constexpr (kGeneral) {
      if (params_.stats) {
        const Vector<T> z = u * scale_ + bias_;
        auto valid = lane_indices() < T(lanes);
        if (has_weights()) valid &= weight != 0;
        if constexpr (kSigns) {
          stats_.add(0, z, valid & (sign < 0));
          valid &= sign > 0;
        }
        stats_.add(1, z, valid);
      }
    }
    if constexpr (kLossOnly) return;

    Vector<T> dz = (negative ? e : broadcast(T(1))) / (1 + e);
    if (has_parts()) {
      dz *= f;
      if (has_second_part()) dz -= g * ((negative ? broadcast(T(1)) : e) / (1 + e));
    }
    if constexpr (kSigns) dz *= sign;
    if (has_weights()) dz *= weight;
    sums_.dz_u += dz * u;
    sums_.dz += dz;
    DzOutput::template store<T>(params_.dz, i * params_.dz_stride + j, dz * dz_scale_, lanes);
  }

  SIGLIP_INLINE static Vector<T> lane_indices() {
    Vector<T> indices;
    for (int lane = 0; lane < kLanes<T>; ++lane) indices[lane] = T(lane);
    return indices;
  }

  const BlockParams& params_;
  const T scale_, bias_, dz_scale_;
  struct Empty {};
  Sums<T> sums_;
  double previous_loss_ = 0;
  std::conditional_t<kGeneral, Stats<T>, Empty> stats_;
  T signs_[kSegmentWidth], masses_[kGeneral ? kSegmentWidth : 1];
};

// Not inlined, so that its size does not change how the compiler treats the other paths.
template <class T, class DzOutput, bool kLossOnly>
[[gnu::noinline]] void run_general(const BlockParams& params, const T* u, int64_t u_stride, Range rows, Range cols,
                                   double* sums) {
  TileEpilogue<T, DzOutput, false, kLossOnly, true>(params).run(u, u_stride, rows, cols, sums);
}

template <class T>
[[gnu::noinline]] void run_by_image(const BlockParams& params, const T* u, int64_t u_stride, Range rows, Range cols,
                                    double* sums) {
  if (params.image_weights)
    TileEpilogue<T, NoDz, true, true, false, true>(params).run(u, u_stride, rows, cols, sums);
  else
    TileEpilogue<T, NoDz, false, true, false, true>(params).run(u, u_stride, rows, cols, sums);
}

template <class T, class DzOutput, bool kLossOnly = false>
void run_epilogue(const BlockParams& params, const void* u, int64_t u_stride, Range rows, Range cols, double* sums) {
  const T* first = static_cast<const T*>(u);
  if (params.image_masses || params.has_balance || params.teacher || params.ignore_ids || params.stats)
    run_general<T, DzOutput, kLossOnly>(params, first, u_stride, rows, cols, sums);
  else if (kLossOnly && params.image_losses)
    run_by_image<T>(params, first, u_stride, rows, cols, sums);
  else if (params.image_weights)
    TileEpilogue<T, DzOutput, true, kLossOnly>(params).run(first, u_stride, rows, cols, sums);
  else
    TileEpilogue<T, DzOutput, false, kLossOnly>(params).run(first, u_stride, rows, cols, sums);
}

template <class T, class F>
void apply(F function, const void* in, void* out, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    const int lanes = count - i < kLanes<T> ? int(count - i) : kLanes<T>;
    const auto value = function(load(static_cast<const T*>(in) + i, lanes));
    constexpr int kSize = sizeof value / kLanes<T>;
    std::memcpy(static_cast<char*>(out) + i * kSize, &value, lanes * kSize);
  }
}

}  // namespace

void epilogue(const BlockParams& params, const void* u, int64_t u_stride, Range rows, Range cols, double* sums) {
  if (params.logits == Dtype::kFloat64) {
    if (params.loss_only) return run_epilogue<double, NoDz, true>(params, u, u_stride, rows, cols, sums);
    if (!params.dz) return run_epilogue<double, NoDz>(params, u, u_stride, rows, cols, sums);
    return run_epilogue<double, LogitsDz>(params, u, u_stride, rows, cols, sums);
  }
  if (params.loss_only) return run_epilogue<float, NoDz, true>(params, u, u_stride, rows, cols, sums);
  if (!params.dz) return run_epilogue<float, NoDz>(params, u, u_stride, rows, cols, sums);
  switch (params.operand) {
    case Dtype::kBfloat16: return run_epilogue<float, HalfDz<to_bfloat16>>(params, u, u_stride, rows, cols, sums);
    case Dtype::kFloat16: return run_epilogue<float, HalfDz<to_float16>>(params, u, u_stride, rows, cols, sums);
    default: return run_epilogue<float, LogitsDz>(params, u, u_stride, rows, cols, sums);
  }
}

void evaluate(VectorFunction function, Dtype dtype, const void* in, void* out, int64_t count) {
  const bool wide = dtype == Dtype::kFloat64;
  switch (function) {
    case VectorFunction::kExp: return wide ? apply<double>(exp_nonpositive<double>, in, out, count)
                                           : apply<float>(exp_nonpositive<float>, in, out, count);
    case VectorFunction::kLog1p: return wide ? apply<double>(log1p_nonnegative<double>, in, out, count)
                                             : apply<float>(log1p_nonnegative<float>, in, out, count);
    case VectorFunction::kToBfloat16: return apply<float>(to_bfloat16, in, out, count);
    case VectorFunction::kToFloat16: return apply<float>(to_float16, in, out, count);
  }
}

}  // namespace siglip::SIGLIP_ISA_LEVEL
