// Attention of one head of one sentence, forward and backward, with dropout of the weights.
//
// Scores and weights exist for kQueries queries at a time; the backward pass computes them again
// from the logarithm of the softmax's denominator.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "bfloat16.h"
#include "draws.h"
#include "exponential.h"
#include "products.h"

namespace {

constexpr int64_t kQueries = 48;

// Queries, keys or values of all heads: row `slot` is `data + slot * row`. The rows of sentence b
// are slots[t * sentences + b] for t < length; a negative one is padding, which has no row.
template <typename N>
struct Tokens {
  N* data;
  int64_t row;
  const int32_t* slots;
  int64_t length, sentences;

  int64_t slot(int64_t t, int64_t b) const { return slots[t * sentences + b]; }
};

template <typename N, typename T>
struct Attention {
  Tokens<N> queries, keys, values;
  T* denominators;  // (B, H, T): logarithms
  const T* bias;    // (T, S), added to the scores, or null; its rows are bias_row apart
  int64_t bias_row;
  int64_t heads, size;
  T scale;
  Mask mask;  // of the weights (B, H, T, S)
};

// Works on one head after the other with buffers of its own.
template <typename N, typename T>
class Head {
 public:
  explicit Head(const Attention<N, T>& all)
      : all_(all), reader_(all.mask), columns_(whole_vectors<T>(all.size)) {}

  // Write the outputs of head h of sentence b.
  void forward(int64_t b, int64_t h, const Tokens<N>& out) {
    gather(b, h);
    gather_rows(all_.values, b, h, T(1), values_);
    for (int64_t first = 0; first < all_.queries.length; first += kQueries) {
      if (!load_queries(b, h, first)) continue;
      compute_scores(b, h);
      for (size_t i = 0; i < rows_.size(); ++i) {
        T* row = scores_.data() + i * keys_wide_;
        T top = std::numeric_limits<T>::lowest(), total = 0;
#pragma omp simd reduction(max : top)
        for (int64_t s = 0; s < keys_wide_; ++s) top = std::max(top, row[s]);
#pragma omp simd reduction(+ : total)
        for (int64_t s = 0; s < keys_wide_; ++s) {
          row[s] = exp_nonpositive(row[s] - top);
          total += row[s];
        }
        const T* kept = read_mask(b, h, i);
        // A query from which every key is hidden gets zeros: padding before the first token.
        T inverse = total > 0 ? 1 / total : T(0);
        for (int64_t s = 0; s < keys_wide_; ++s) row[s] *= inverse * kept[s];
        all_.denominators[(b * all_.heads + h) * all_.queries.length + times_[i]] =
            total > 0 ? top + std::log(total) : T(0);
      }
      fill(mixed_, rows_.size() * columns_);
      add_product<T>({scores_.data(), keys_wide_, 1}, values_.data(), columns_, mixed_.data(),
                     columns_, rows_.size(), columns_, num_keys_);
      for (size_t i = 0; i < rows_.size(); ++i) {
        N* to = out.data + rows_[i] * out.row + h * all_.size;
        for (int64_t c = 0; c < all_.size; ++c) store(to[c], mixed_[i * columns_ + c]);
      }
    }
  }

  // Write the gradients of queries, keys and values of head h of sentence b, given those of the
  // outputs. Each has the rows of what it is the gradient of.
  void backward(int64_t b, int64_t h, const Tokens<N>& by_out, const Tokens<N>& by_queries,
                const Tokens<N>& by_keys, const Tokens<N>& by_values) {
    gather(b, h);
    gather_rows(all_.keys, b, h, T(1), keys_);
    gather_columns(all_.values, b, h, values_);  // transposed
    fill(by_keys_, num_keys_ * columns_);
    fill(by_values_, num_keys_ * columns_);
    for (int64_t first = 0; first < all_.queries.length; first += kQueries) {
      if (!load_queries(b, h, first)) continue;
      int64_t num = static_cast<int64_t>(rows_.size());
      compute_scores(b, h);
      fill(by_mixed_, num * columns_);
      for (int64_t i = 0; i < num; ++i) {
        const N* from = by_out.data + rows_[i] * by_out.row + h * all_.size;
        for (int64_t c = 0; c < all_.size; ++c) by_mixed_[i * columns_ + c] = load(from[c]);
      }
      fill(by_scores_, num * keys_wide_);
      add_product<T>({by_mixed_.data(), columns_, 1}, values_.data(), keys_wide_,
                     by_scores_.data(), keys_wide_, num, keys_wide_, columns_);
      // scores -> weights after dropout; gradients of the weights -> gradients of the scores.
      for (int64_t i = 0; i < num; ++i) {
        T* row = scores_.data() + i * keys_wide_;
        T* by_row = by_scores_.data() + i * keys_wide_;
        T log_total = all_.denominators[(b * all_.heads + h) * all_.queries.length + times_[i]];
        const T* kept = read_mask(b, h, i);
        T mean = 0;
#pragma omp simd reduction(+ : mean)
        for (int64_t s = 0; s < keys_wide_; ++s) {
          T weight = exp_nonpositive(row[s] - log_total);
          T dropped = weight * kept[s];
          row[s] = dropped;
          mean += dropped * by_row[s];
          by_row[s] = by_row[s] * kept[s];
          weights_[s] = weight;
        }
        for (int64_t s = 0; s < keys_wide_; ++s) by_row[s] = weights_[s] * (by_row[s] - mean);
      }
      add_product<T>({scores_.data(), 1, keys_wide_}, by_mixed_.data(), columns_,
                     by_values_.data(), columns_, num_keys_, columns_, num);
      add_product<T>({by_scores_.data(), 1, keys_wide_}, queries_.data(), columns_,
                     by_keys_.data(), columns_, num_keys_, columns_, num);
      fill(mixed_, num * columns_);
      add_product<T>({by_scores_.data(), keys_wide_, 1}, keys_.data(), columns_, mixed_.data(),
                     columns_, num, columns_, num_keys_);
      for (int64_t i = 0; i < num; ++i) {
        N* to = by_queries.data + rows_[i] * by_queries.row + h * all_.size;
        for (int64_t c = 0; c < all_.size; ++c) {
          store(to[c], mixed_[i * columns_ + c] * all_.scale);
        }
      }
    }
    scatter(by_keys_, by_keys, b, h);
    scatter(by_values_, by_values, b, h);
  }

 private:
  // Find the keys of sentence b, and gather them transposed. Padding before the first key and after
  // the last is left out; between them it has a score of minus infinity.
  void gather(int64_t b, int64_t h) {
    int64_t end = all_.keys.length;
    first_key_ = 0;
    while (first_key_ < end && all_.keys.slot(first_key_, b) < 0) ++first_key_;
    while (end > first_key_ && all_.keys.slot(end - 1, b) < 0) --end;
    num_keys_ = end - first_key_;
    keys_wide_ = whole_vectors<T>(num_keys_);
    kept_.assign(keys_wide_, T(0));
    weights_.resize(keys_wide_);
    holes_.clear();
    for (int64_t s = 0; s < num_keys_; ++s) {
      if (all_.keys.slot(first_key_ + s, b) < 0) holes_.push_back(s);
    }
    gather_columns(all_.keys, b, h, keys_transposed_);
  }

  // to (num_keys, columns): the rows of the keys' places.
  void gather_rows(const Tokens<N>& from, int64_t b, int64_t h, T scale, std::vector<T>& to) {
    fill(to, num_keys_ * columns_);
    for (int64_t s = 0; s < num_keys_; ++s) {
      int64_t slot = all_.keys.slot(first_key_ + s, b);
      if (slot < 0) continue;
      const N* row = from.data + slot * from.row + h * all_.size;
      for (int64_t c = 0; c < all_.size; ++c) to[s * columns_ + c] = load(row[c]) * scale;
    }
  }

  // to (columns, keys_wide): the same transposed.
  void gather_columns(const Tokens<N>& from, int64_t b, int64_t h, std::vector<T>& to) {
    fill(to, columns_ * keys_wide_);
    for (int64_t s = 0; s < num_keys_; ++s) {
      int64_t slot = all_.keys.slot(first_key_ + s, b);
      if (slot < 0) continue;
      const N* row = from.data + slot * from.row + h * all_.size;
      for (int64_t c = 0; c < all_.size; ++c) to[c * keys_wide_ + s] = load(row[c]);
    }
  }

  void scatter(const std::vector<T>& from, const Tokens<N>& to, int64_t b, int64_t h) {
    for (int64_t s = 0; s < num_keys_; ++s) {
      int64_t slot = all_.keys.slot(first_key_ + s, b);
      if (slot < 0) continue;
      N* row = to.data + slot * to.row + h * all_.size;
      for (int64_t c = 0; c < all_.size; ++c) store(row[c], from[s * columns_ + c]);
    }
  }

  // Gather the queries among `first` and the kQueries - 1 after it, scaled; false: there are none.
  bool load_queries(int64_t b, int64_t h, int64_t first) {
    rows_.clear();
    times_.clear();
    int64_t end = std::min(first + kQueries, all_.queries.length);
    for (int64_t t = first; t < end; ++t) {
      int64_t slot = all_.queries.slot(t, b);
      if (slot < 0) continue;
      rows_.push_back(slot);
      times_.push_back(t);
    }
    fill(queries_, rows_.size() * columns_);
    for (size_t i = 0; i < rows_.size(); ++i) {
      const N* row = all_.queries.data + rows_[i] * all_.queries.row + h * all_.size;
      for (int64_t c = 0; c < all_.size; ++c) {
        queries_[i * columns_ + c] = load(row[c]) * all_.scale;
      }
    }
    return !rows_.empty();
  }

  void compute_scores(int64_t b, int64_t h) {
    int64_t num = static_cast<int64_t>(rows_.size());
    fill(scores_, num * keys_wide_);
    add_product<T>({queries_.data(), columns_, 1}, keys_transposed_.data(), keys_wide_,
                   scores_.data(), keys_wide_, num, keys_wide_, columns_);
    for (int64_t i = 0; i < num; ++i) {
      T* row = scores_.data() + i * keys_wide_;
      if (all_.bias) {
        const T* bias = all_.bias + times_[i] * all_.bias_row + first_key_;
        for (int64_t s = 0; s < num_keys_; ++s) row[s] += bias[s];
      }
      for (int64_t s : holes_) row[s] = kHidden;
      std::fill(row + num_keys_, row + keys_wide_, kHidden);
    }
  }

  // Factors of dropout for query i of the block and every key.
  const T* read_mask(int64_t b, int64_t h, int64_t i) {
    int64_t row = (b * all_.heads + h) * all_.queries.length + times_[i];
    reader_.read(row * all_.keys.length + first_key_, num_keys_, kept_.data());
    return kept_.data();
  }

  // A score whose weight is zero. Rows are whole vectors, since g++ computes the rest one by one.
  static constexpr T kHidden = -std::numeric_limits<T>::infinity();

  static void fill(std::vector<T>& buffer, int64_t size) { buffer.assign(size, T(0)); }

  const Attention<N, T>& all_;
  MaskReader reader_;
  int64_t columns_, first_key_ = 0, num_keys_ = 0, keys_wide_ = 0;
  std::vector<int64_t> rows_, times_;  // of the block's queries
  std::vector<int64_t> holes_;         // padding between keys
  std::vector<T> keys_, keys_transposed_, values_, queries_, scores_, mixed_, kept_, weights_;
  std::vector<T> by_keys_, by_values_, by_scores_, by_mixed_;
};

}  // namespace
