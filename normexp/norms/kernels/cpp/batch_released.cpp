// BN as released: one step of training, forward and backward. Equations and rules of the state:
// normexp/norms/batch_released.py (also the plain implementation), running_norm.py.
//
// Padded positions hold the mean of the real tokens, and all T*B positions count. So they change
// neither the mean nor the sum of squared distances from it, only the number by which that is
// divided. The gradients that reach them do the same: each of the N real tokens gets an N-th of
// theirs, which cancels what they add to the mean of all gradients, so that what is left is
//   dL/dxg = w / sqrt(var + eps) (g - mean_N(g) - x_hat sum_N(g x_hat) / (T*B)),
// xg = x / sqrt(mean_C(x^2) + eps), with sums over real tokens only.
#include "moments.h"

namespace normexp {
namespace {

struct Options {
  double eps, momentum;
};

struct State {
  const Tensor &running_mean, &running_var, &step, &num_rejected;
};

// The backward of BN as released.
template <class T>
struct Released {
  using A = Accumulator<T>;
  static constexpr const char* name = "BatchNormReleasedBackward";

  Options options;
  Padding padding;
  std::unique_ptr<A[]> r;  // (rows,), of real tokens
  Vectors<A> kept;         // mean, 1 / sqrt(var + eps)

  variable_list backward(const Tensor& of_x, const Tensor& weight, variable_list gradients) {
    if (at::GradMode::is_enabled()) return differentiable(of_x, weight, gradients[0]);
    const Tensor gradient = dense(gradients[0], of_x), dx = allocate_like(of_x);
    const Rows<T> x(of_x);
    const Values<A> w(weight);
    const int64_t channels = x.channels;
    const Vectors<A> work(6, channels);
    A *scale = work[0], *slope = work[1], *shift = work[2], *dw = work[3], *db = work[4];
    A* of_padding = work[5];
    const A *mean = kept[0], *inverse = kept[1];
    Sums<A> sums(x.count, 3, channels);
    const T* upstream = content<T>(gradient);
    sum_gradients(x, upstream, sums);
    sums.total(0, dw);
    sums.total(1, db);
    sums.total(2, of_padding);
    const A n = static_cast<A>(std::max<int64_t>(padding.num_tokens(), 1));
    const A positions = static_cast<A>(std::max<int64_t>(x.count, 1));
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      dw[c] *= inverse[c];
      scale[c] = w[c] * inverse[c];
      slope[c] = -scale[c] * inverse[c] * dw[c] / positions;
      shift[c] = -scale[c] * db[c] / n;
      db[c] += of_padding[c];
    }
    propagate(x, upstream, scale, slope, mean, shift, writable<T>(dx));
    const auto type = weight.scalar_type();
    return {dx, make(dw, channels, type), make(db, channels, type)};
  }

 private:
  // Sums: quantity 0 of gradient (xg - mean), 1 of gradient, over real tokens; 2 of gradient over
  // padding.
  void sum_gradients(const Rows<T>& x, const T* gradient, Sums<A>& sums) const {
    const A* mean = kept[0];
    over_blocks(x.count, x.channels, [&](int thread, int64_t first, int64_t last) {
      A *products = sums.block(thread), *plain = products + x.channels;
      A* of_padding = plain + x.channels;
      const auto token = [&](int64_t row) { return !padding(row); };
      in_groups(first, last, token, [&](auto group) {
        constexpr int kRows = decltype(group)::size;
        const auto in = rows_at<const T, kRows>(x.values, group.rows, x.channels);
        const auto up = rows_at<const T, kRows>(gradient, group.rows, x.channels);
        const auto factor = factors<true, kRows>(r.get(), group.rows);
#pragma omp simd
        for (int64_t c = 0; c < x.channels; ++c) {
          A product = 0, sum = 0;
#pragma GCC unroll 4
          for (int i = 0; i < kRows; ++i) {
            const A g = load(up[i][c]);
            product += g * (load(in[i][c]) * factor[i] - mean[c]);
            sum += g;
          }
          products[c] += product;
          plain[c] += sum;
        }
      });
      for (int64_t row = first; row < last; ++row) {
        if (!padding(row)) continue;
        const T* up = gradient + row * x.channels;
#pragma omp simd
        for (int64_t c = 0; c < x.channels; ++c) of_padding[c] += load(up[c]);
      }
      sums.end_block(thread);
    });
  }

  // d = gradient scale + (xg - mean) slope + shift, dx = r (d - xg mean_C(d xg)); zero at padding.
  void propagate(const Rows<T>& x, const T* gradient, const A* scale, const A* slope,
                 const A* mean, const A* shift, T* dx) const {
    over_blocks(x.count, x.channels, [&](int, int64_t first, int64_t last) {
      const auto token = [&](int64_t row) {
        if (!padding(row)) return true;
        std::memset(static_cast<void*>(dx + row * x.channels), 0, x.channels * sizeof(T));
        return false;
      };
      in_groups(first, last, token, [&](auto group) {
        constexpr int kRows = decltype(group)::size;
        const auto in = rows_at<const T, kRows>(x.values, group.rows, x.channels);
        const auto up = rows_at<const T, kRows>(gradient, group.rows, x.channels);
        const auto out = rows_at<T, kRows>(dx, group.rows, x.channels);
        const auto factor = factors<true, kRows>(r.get(), group.rows);
        const auto d = [&](int i, int64_t c, A value) {
          return load(up[i][c]) * scale[c] + (value - mean[c]) * slope[c] + shift[c];
        };
        auto dots = sum_for_rows<kRows, A>(x.channels, [&](int i, int64_t c) {
          const A value = load(in[i][c]) * factor[i];
          return d(i, c, value) * value;
        });
        for (A& dot : dots) dot /= static_cast<A>(x.channels);
#pragma omp simd
        for (int64_t c = 0; c < x.channels; ++c) {
#pragma GCC unroll 4
          for (int i = 0; i < kRows; ++i) {
            const A value = load(in[i][c]) * factor[i];
            store(out[i][c], (d(i, c, value) - value * dots[i]) * factor[i]);
          }
        }
      });
    });
  }

  // The same in operations that autograd knows, for second derivatives.
  variable_list differentiable(const Tensor& x, const Tensor& weight, const Tensor& gradient) {
    if (!gradient.defined()) return variable_list(3);
    const int64_t channels = weight.size(0);
    const Tensor token_mask = padding.token_mask();
    const Tensor tokens = x.to(scalar_type<A>()).reshape({-1, channels});
    const Tensor scaled = tokens * at::rsqrt(tokens.square().mean(-1, true) + options.eps);
    const Tensor real = at::where(token_mask, scaled, at::zeros({}, scaled.options()));
    const double n = static_cast<double>(std::max<int64_t>(padding.num_tokens(), 1));
    const double positions = static_cast<double>(std::max<int64_t>(tokens.size(0), 1));
    const Tensor mean = real.sum(0) / n;
    const Tensor centered = at::where(token_mask, scaled - mean, at::zeros({}, scaled.options()));
    const Tensor inverse = at::rsqrt(centered.square().sum(0) / positions + options.eps);
    const Tensor y = centered * (inverse * weight);
    const Tensor upstream = gradient.reshape({-1, channels}).to(y.scalar_type());
    auto result = torch::autograd::grad({y}, {x, weight}, {upstream}, /*retain_graph=*/true,
                                        /*create_graph=*/true);
    result.push_back(upstream.sum(0).to(weight.scalar_type()));
    return result;
  }
};

// x -> y of BN as released; advances the state unless the forward repeats another one.
template <class T>
Tensor forward(const Tensor& of_x, const std::optional<Tensor>& mask, const Tensor& weight,
               const Tensor& bias, const State& state, const Options& options, bool is_replay) {
  using A = Accumulator<T>;
  const Rows<T> x(of_x);
  Padding padding(of_x, mask);
  const int64_t channels = x.channels, n = padding.num_tokens();
  Tensor y = allocate_like(of_x);
  const Values<A> w(weight), b(bias);
  std::unique_ptr<A[]> r(new A[static_cast<size_t>(x.count)]);
  Vectors<A> kept(2, channels);
  const Vectors<A> work(3, channels);
  A *mean = kept[0], *inverse = kept[1], *var = work[0], *scale = work[1];
  over_blocks(x.count, channels, [&](int, int64_t first, int64_t last) {
    in_groups(first, last, [&](int64_t row) { return !padding(row); }, [&](auto group) {
      constexpr int kRows = decltype(group)::size;
      A factor[kRows];
      const auto in = rows_at<const T, kRows>(x.values, group.rows, channels);
      inverse_rms<kRows>(in.data(), channels, options.eps, factor);
      for (int i = 0; i < kRows; ++i) r[group.rows[i]] = factor[i];
    });
  });
  moments<true>(x, padding, r.get(), mean, var);
  const A share = static_cast<A>(n) / static_cast<A>(std::max<int64_t>(x.count, 1));
  const A eps = static_cast<A>(options.eps);
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c) {
    var[c] *= share;
    inverse[c] = 1 / std::sqrt(var[c] + eps);
    scale[c] = inverse[c] * w[c];
  }
  T* to = writable<T>(y);
  T* of_padding = reinterpret_cast<T*>(work[2]);  // one row, of the bias
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c) store(of_padding[c], b[c]);
  over_blocks(x.count, channels, [&](int, int64_t first, int64_t last) {
    const auto token = [&](int64_t row) {
      if (!padding(row)) return true;
      std::copy_n(of_padding, channels, to + row * channels);
      return false;
    };
    in_groups(first, last, token, [&](auto group) {
      constexpr int kRows = decltype(group)::size;
      const auto in = rows_at<const T, kRows>(x.values, group.rows, channels);
      const auto out = rows_at<T, kRows>(to, group.rows, channels);
      const auto factor = factors<true, kRows>(r.get(), group.rows);
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) {
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i) {
          store(out[i][c], (load(in[i][c]) * factor[i] - mean[c]) * scale[c] + b[c]);
        }
      }
    });
  });
  const auto finite = [&] {
    return all_finite(mean, channels, state.running_mean) &&
           all_finite(var, channels, state.running_mean);
  };
  if (!is_replay && is_usable(n, finite(), state.num_rejected)) {
    const double positions = static_cast<double>(x.count);
    average(state.running_mean, mean, options.momentum);
    average(state.running_var, var, options.momentum, positions / std::max(positions - 1, 1.0));
    count_step(state.step);
  }
  record(of_x, weight, bias, {&y},
         Released<T>{options, std::move(padding), std::move(r), std::move(kept)});
  return y;
}

// One step of BN as released. Returns y.
Tensor batch_released(const Tensor& x, const std::optional<Tensor>& mask, const Tensor& weight,
                      const Tensor& bias, const Tensor& running_mean, const Tensor& running_var,
                      const Tensor& step, const Tensor& num_rejected, bool is_replay, double eps,
                      double momentum) {
  check(x, {&weight, &bias, &running_mean, &running_var}, {&step, &num_rejected});
  return by_type(x, [&](auto* null) {
    return forward<std::remove_pointer_t<decltype(null)>>(
        x, mask, weight, bias, {running_mean, running_var, step, num_rejected}, {eps, momentum},
        is_replay);
  });
}

TORCH_LIBRARY_FRAGMENT(normexp, library) {
  library.def(
      "batch_released(Tensor x, Tensor? mask, Tensor weight, Tensor bias, "
      "Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!) step, Tensor(d!) num_rejected, "
      "bool is_replay, float eps, float momentum) -> Tensor",
      batch_released);
}

}  // namespace
}  // namespace normexp
