// The sigmoid-BCE epilogue over rows of inner products: one pass, from u to dz and three sums.
#pragma once

#include <type_traits>
#include <vector>

#include "api.h"
#include "vec.h"

namespace siglip {
namespace {

// Rows whose sums are added up together; the order does not depend on the number of threads.
constexpr int64_t kStrip = 16;
// Vectors of a row whose 1 + e are multiplied together before a logarithm is taken: at most 2^64.
constexpr int64_t kProduct = 64;

template <class T>
struct Sums {
  Vec<T> loss{}, dzu{}, dz{}, product{};
};

template <class Out, class T>
inline void store_as(Out* out, Vec<T> v) {
  if constexpr (std::is_same_v<Out, T>) {
    store(out, v);
  } else {
    // Round to nearest even; a NaN keeps its quiet bit.
    typedef uint32_t Word __attribute__((vector_size(kBytes)));
    typedef uint16_t Half __attribute__((vector_size(kBytes / 2)));
    const Word word = bits<Word>(v);
    const Word rounded = v == v ? (word + 0x7fff + ((word >> 16) & 1)) >> 16 : Word{} + 0x7fc0;
    const Half half = __builtin_convertvector(rounded, Half);
    std::memcpy(out, &half, sizeof half);
  }
}

// One vector of a row: a = -s·z. `sign` is s negated: -1 on a positive pair. Out of range a is -infinity.
template <class T, class Out, bool kSigned, bool kWeighted, bool kLossOnly>
inline void step(Vec<T> u, Vec<T> sign, Vec<T> weight, Vec<T> beyond, T scale, T bias, Sums<T>& sums, Out* dz) {
  Vec<T> a = u * scale + bias;
  if constexpr (kSigned) a *= sign;
  a += beyond;
  const Vec<T> e = exp_nonpositive<T>(a < 0 ? a : -a);
  const Vec<T> positive_part = a > 0 ? a : Vec<T>{};
  if constexpr (kWeighted) {
    sums.loss += (positive_part + log1p_nonnegative<T>(e)) * weight;
  } else {
    // Σ log1p(e) = log1p(p), where p gathers Π(1 + e) - 1 without forming 1 + e.
    sums.loss += positive_part;
    sums.product += e + sums.product * e;
  }
  if constexpr (!kLossOnly) {
    Vec<T> g = (a < 0 ? e : splat<T>(1)) / (1 + e);
    if constexpr (kSigned) g *= sign;
    if constexpr (kWeighted) g *= weight;
    sums.dzu += g * u;
    sums.dz += g;
    if (dz != nullptr) store_as<Out, T>(dz, g);
  }
}

template <class T>
inline void add_up(const Sums<T>& sums, bool weighted, double* totals) {
  const Vec<T> log = weighted ? Vec<T>{} : log1p_nonnegative<T>(sums.product);
  for (int i = 0; i < kWidth<T>; ++i) {
    totals[0] += static_cast<double>(sums.loss[i]) + static_cast<double>(log[i]);
    totals[1] += static_cast<double>(sums.dzu[i]);
    totals[2] += static_cast<double>(sums.dz[i]);
  }
}

// One row. `signs` [c]: -1 on its positive pairs, else 1; read where there are any (kSigned).
template <class T, class Out, bool kSigned, bool kWeighted, bool kLossOnly>
void row(const Block& block, const T* u, Out* dz, const T* signs, T image_weight, double* totals) {
  constexpr int64_t W = kWidth<T>, kChunk = kProduct * W;
  const T scale = *static_cast<const T*>(block.scale), bias = *static_cast<const T*>(block.bias);
  const T* weights = static_cast<const T*>(block.text_weights);
  const int64_t whole = block.c - block.c % W;
  for (int64_t begin = 0; begin < block.c; begin += kChunk) {
    Sums<T> sums;
    const int64_t end = begin + kChunk < whole ? begin + kChunk : whole;
    for (int64_t j = begin; j < end; j += W) {
      const Vec<T> sign = kSigned ? load(signs + j) : Vec<T>{};
      const Vec<T> weight = kWeighted ? load(weights + j) * image_weight : Vec<T>{};
      step<T, Out, kSigned, kWeighted, kLossOnly>(load(u + j), sign, weight, Vec<T>{}, scale, bias, sums,
                                                  dz == nullptr ? nullptr : dz + j);
    }
    if (whole < block.c && block.c - begin <= kChunk) {
      // The last, partial vector goes by way of buffers of a whole one.
      T tail_u[W] = {}, tail_sign[W] = {}, tail_weight[W] = {}, beyond[W] = {};
      Out tail_dz[W];
      for (int64_t j = whole; j < whole + W; ++j) {
        const bool inside = j < block.c;
        tail_u[j - whole] = inside ? u[j] : 0;
        tail_sign[j - whole] = kSigned && inside ? signs[j] : 1;
        tail_weight[j - whole] = kWeighted && inside ? weights[j] * image_weight : 0;
        beyond[j - whole] = inside ? 0 : -std::numeric_limits<T>::infinity();
      }
      step<T, Out, kSigned, kWeighted, kLossOnly>(load(tail_u), load(tail_sign), load(tail_weight), load(beyond),
                                                  scale, bias, sums, tail_dz);
      if (dz != nullptr) std::memcpy(dz + whole, tail_dz, static_cast<size_t>(block.c - whole) * sizeof(Out));
    }
    add_up<T>(sums, kWeighted, totals);
  }
}

// Rows [begin, end) of the block, whose inner products begin at `u`. `signs` [c] holds ones, and does so afterwards.
template <class T, class Out>
void rows(const Block& block, int64_t begin, int64_t end, const T* u, int64_t ldu, T* signs, double* totals) {
  using Row = void (*)(const Block&, const T*, Out*, const T*, T, double*);
  static constexpr Row kRows[2][2][2] = {
      {{row<T, Out, false, false, false>, row<T, Out, false, false, true>},
       {row<T, Out, false, true, false>, row<T, Out, false, true, true>}},
      {{row<T, Out, true, false, false>, row<T, Out, true, false, true>},
       {row<T, Out, true, true, false>, row<T, Out, true, true, true>}},
  };
  const T* image_weights = static_cast<const T*>(block.image_weights);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t positive = block.labels == kOffset ? i + block.offset : -1;
    const bool on_diagonal = positive >= 0 && positive < block.c;
    if (on_diagonal) signs[positive] = -1;
    if (block.labels == kIds) {
      for (int64_t j = 0; j < block.c; ++j) signs[j] = block.text_ids[j] == block.image_ids[i] ? T(-1) : T(1);
    }
    const bool is_signed = on_diagonal || block.labels == kIds, weighted = image_weights != nullptr;
    Out* dz = block.dz == nullptr ? nullptr : static_cast<Out*>(block.dz) + i * block.lddz;
    kRows[is_signed][weighted][block.loss_only != 0](block, u + (i - begin) * ldu, dz, signs,
                                                     weighted ? image_weights[i] : T(1), totals);
    if (on_diagonal) signs[positive] = 1;
  }
}

// Calls body(strip) for every strip of `height` rows on torch's threads, and adds the strips' sums up in their order.
template <class Body>
void for_each_strip(const Block& block, int64_t height, const Body& body) {
  const int64_t strips = (block.r + height - 1) / height;
  std::vector<double> partials(static_cast<size_t>(3 * strips));
  struct Context {
    const Body& body;
    double* partials;
  } context{body, partials.data()};
  block.parallel_for(
      0, strips, 1,
      [](int64_t begin, int64_t end, void* pointer) {
        const Context& context = *static_cast<Context*>(pointer);
        context.body(begin, end, context.partials);
      },
      &context);
  for (int k = 0; k < 3; ++k) block.sums[k] = 0;
  for (int64_t strip = 0; strip < strips; ++strip) {
    for (int k = 0; k < 3; ++k) block.sums[k] += partials[static_cast<size_t>(3 * strip + k)];
  }
}

template <class T, class Out>
void epilogue(const Block& block) {
  for_each_strip(block, kStrip, [&block](int64_t first, int64_t last, double* partials) {
    std::vector<T> signs(static_cast<size_t>(block.c), T(1));
    for (int64_t strip = first; strip < last; ++strip) {
      const int64_t begin = strip * kStrip, end = begin + kStrip < block.r ? begin + kStrip : block.r;
      const T* u = static_cast<const T*>(block.u) + begin * block.ldu;
      rows<T, Out>(block, begin, end, u, block.ldu, signs.data(), partials + 3 * strip);
    }
  });
}

}  // namespace
}  // namespace siglip
