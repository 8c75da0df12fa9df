// Moments of the tokens of a batch, for BN and BN as released.
#pragma once

#include "rows.h"

namespace normexp {

// The factors of some rows, one each; ones that nobody reads unless kScaled.
template <bool kScaled, int kRows, class A>
std::array<A, kRows> factors(const A* r, const int64_t* rows) {
  std::array<A, kRows> result{};
  if constexpr (kScaled) {
    for (int i = 0; i < kRows; ++i) result[i] = r[rows[i]];
  }
  return result;
}

// Writes mean and (biased) variance of the real tokens; with kScaled of x r, r (rows,). Each block
// by itself in two passes, then combined (Chan, Golub, LeVeque 1979): a difference of sums of
// squares would lose its digits where the mean is large.
template <bool kScaled, class T>
void moments(const Rows<T>& x, const Padding& padding, const Accumulator<T>* r,
             Accumulator<T>* mean_of, Accumulator<T>* var_of) {
  using A = Accumulator<T>;
  const int64_t channels = x.channels, threads = num_threads(x.count, channels);
  const auto value_of = [](const auto& rows, int i, int64_t c, const auto& factor) {
    return kScaled ? load(rows[i][c]) * factor[i] : load(rows[i][c]);
  };
  std::vector<double> means(threads * channels), m2s(threads * channels);
  std::vector<double> counts(threads);
  over_blocks(x.count, channels, [&](int thread, int64_t first, int64_t last) {
    const auto token = [&](int64_t row) { return !padding(row); };
    std::vector<A> sums(2 * channels);
    A *mean = sums.data(), *m2 = mean + channels;
    int64_t count = 0;
    in_groups(first, last, token, [&](auto group) {
      constexpr int kRows = decltype(group)::size;
      count += kRows;
      const auto in = rows_at<const T, kRows>(x.values, group.rows, channels);
      const auto factor = factors<kScaled, kRows>(r, group.rows);
      const auto next = rows_at<const T, kRows>(x.values, group.next, channels);
      over_strips(channels, [&](int64_t begin, int64_t end) {
#pragma omp simd
        for (int64_t c = begin; c < end; ++c) {
          A sum = 0;
#pragma GCC unroll 4
          for (int i = 0; i < kRows; ++i) sum += value_of(in, i, c, factor);
          mean[c] += sum;
        }
      }, next);
    });
    if (count == 0) return;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) mean[c] /= static_cast<A>(count);
    in_groups(first, last, token, [&](auto group) {
      constexpr int kRows = decltype(group)::size;
      const auto in = rows_at<const T, kRows>(x.values, group.rows, channels);
      const auto factor = factors<kScaled, kRows>(r, group.rows);
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) {
        A sum = 0;
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i) {
          const A centered = value_of(in, i, c, factor) - mean[c];
          sum += centered * centered;
        }
        m2[c] += sum;
      }
    });
    double *all_mean = means.data() + thread * channels, *all_m2 = m2s.data() + thread * channels;
    const double before = counts[thread];
    counts[thread] += static_cast<double>(count);
    const double share = static_cast<double>(count) / counts[thread];
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      const double apart = mean[c] - all_mean[c];
      all_mean[c] += share * apart;
      all_m2[c] += m2[c] + apart * apart * before * share;
    }
  });
  for (int64_t thread = 1; thread < threads; ++thread) {
    if (counts[thread] == 0) continue;
    const double *mean = means.data() + thread * channels, *m2 = m2s.data() + thread * channels;
    const double before = counts[0];
    counts[0] += counts[thread];
    const double share = counts[thread] / counts[0];
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      const double apart = mean[c] - means[c];
      means[c] += share * apart;
      m2s[c] += m2[c] + apart * apart * before * share;
    }
  }
  const double n = std::max(counts[0], 1.0);
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c) {
    mean_of[c] = static_cast<A>(means[c]);
    var_of[c] = static_cast<A>(m2s[c] / n);
  }
}

}  // namespace normexp
