// Masked BN, also regularized BN: one step of training, forward and backward. Equations and rules
// of the state: normexp/norms/batch.py (also the plain implementation), regularized_batch.py,
// running_norm.py.
#include "moments.h"

namespace normexp {
namespace {

// Of regularized BN: 1 / sqrt(max(var, eps)), running_var takes the biased variance, and the
// distance of the batch's moments from the running ones is a penalty.
struct Regularization {
  double penalty_mean, penalty_var;
};

struct Options {
  double eps, momentum;
  std::optional<Regularization> regularization;
};

struct State {
  const Tensor &running_mean, &running_var, &step, &num_rejected;
};

// The factor of x - mean, from a variance.
template <class A>
A inverse_std(A var, const Options& options) {
  const A eps = static_cast<A>(options.eps);
  return 1 / std::sqrt(options.regularization ? std::max(var, eps) : var + eps);
}

// Derivative of inverse_std, which has the value `inverse` there.
template <class A>
A inverse_std_slope(A var, A inverse, const Options& options) {
  if (options.regularization && var < static_cast<A>(options.eps)) return 0;
  return A(-0.5) * inverse * inverse * inverse;
}

// The backward of BN. Outputs: y, and with regularization the penalty.
template <class T>
struct Standardize {
  using A = Accumulator<T>;
  static constexpr const char* name = "BatchNormBackward";

  Options options;
  Padding padding;
  Vectors<A> kept;  // mean, var; with regularization also running_mean, running_var

  variable_list backward(const Tensor& of_x, const Tensor& weight, variable_list gradients) {
    if (at::GradMode::is_enabled()) return differentiable(of_x, weight, gradients);
    const Tensor gradient = dense(gradients[0], of_x), dx = allocate_like(of_x);
    const Rows<T> x(of_x);
    const Values<A> w(weight);
    const int64_t channels = x.channels;
    const A n = static_cast<A>(std::max<int64_t>(padding.num_tokens(), 1));
    const Vectors<A> work(5, channels);
    A *scale = work[0], *slope = work[1], *shift = work[2], *dw = work[3], *db = work[4];
    const A *mean = kept[0], *var = kept[1];
    Sums<A> sums(x.count, 2, channels);
    const T* upstream = content<T>(gradient);
    sum_products<true>(x, upstream, padding, mean, sums);
    sums.total(0, dw);
    sums.total(1, db);
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      const A inverse = inverse_std(var[c], options);
      scale[c] = w[c] * inverse;
      slope[c] = 2 * dw[c] * w[c] * inverse_std_slope(var[c], inverse, options) / n;
      shift[c] = -db[c] * scale[c] / n;
      dw[c] *= inverse;
    }
    if (options.regularization && gradients[1].defined() && padding.num_tokens() > 0) {
      const A factor = gradients[1].item().to<A>() / n;
      const A of_mean = factor * static_cast<A>(options.regularization->penalty_mean);
      const A of_var = factor * static_cast<A>(options.regularization->penalty_var);
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) {
        const A apart = kept[3][c] - var[c];
        shift[c] -= 2 * of_mean * (kept[2][c] - mean[c]);
        slope[c] -= 2 * of_var * static_cast<A>((apart > 0) - (apart < 0));
      }
    }
    propagate<false, true>(x, upstream, padding, scale, slope, mean, shift, writable<T>(dx),
                           nullptr);
    const auto type = weight.scalar_type();
    return {dx, make(dw, channels, type), make(db, channels, type)};
  }

 private:
  // The same in operations that autograd knows, for second derivatives.
  variable_list differentiable(const Tensor& x, const Tensor& weight,
                               const variable_list& gradients) {
    const int64_t channels = weight.size(0);
    const Tensor token_mask = padding.token_mask(), zero = at::zeros({}, at::kFloat);
    const auto mask_padding = [&](const Tensor& values) {
      const Tensor rows = values.reshape({-1, channels});
      return at::where(token_mask, rows, zero.to(rows.scalar_type()));
    };
    const Tensor tokens = mask_padding(x.to(scalar_type<A>()));
    const double n = static_cast<double>(std::max<int64_t>(padding.num_tokens(), 1));
    const Tensor mean = tokens.sum(0) / n;
    const Tensor centered = mask_padding(tokens - mean);
    const Tensor var = centered.square().sum(0) / n;
    const Tensor inverse =
        at::rsqrt(options.regularization ? var.clamp_min(options.eps) : var + options.eps);
    const Tensor y = centered * (inverse * weight);
    const Tensor upstream = gradients[0].defined() ? mask_padding(gradients[0]).to(y.dtype())
                                                   : at::zeros_like(y);
    variable_list outputs{y}, upstreams{upstream};
    if (options.regularization && gradients[1].defined() && padding.num_tokens() > 0) {
      const Tensor running_mean = make(kept[2], channels, scalar_type<A>());
      const Tensor running_var = make(kept[3], channels, scalar_type<A>());
      outputs.push_back(options.regularization->penalty_mean *
                            (running_mean - mean).square().sum() +
                        options.regularization->penalty_var * (running_var - var).abs().sum());
      upstreams.push_back(gradients[1]);
    }
    auto result = torch::autograd::grad(outputs, {x, weight}, upstreams, /*retain_graph=*/true,
                                        /*create_graph=*/true);
    result.push_back(upstream.sum(0).to(weight.scalar_type()));
    return result;
  }
};

struct Outputs {
  Tensor y, penalty, mean;  // penalty and mean with regularization only
};

// x -> y of BN; advances the state unless the forward repeats another one.
template <class T>
Outputs forward(const Tensor& of_x, const std::optional<Tensor>& mask, const Tensor& weight,
                const Tensor& bias, const State& state, const Options& options, bool is_replay) {
  using A = Accumulator<T>;
  const Rows<T> x(of_x);
  Padding padding(of_x, mask);
  const int64_t channels = x.channels, n = padding.num_tokens();
  Outputs out{allocate_like(of_x), {}, {}};
  const Values<A> w(weight), b(bias);
  Vectors<A> kept(options.regularization ? 4 : 2, channels);
  const Vectors<A> work(1, channels);
  A *mean = kept[0], *var = kept[1], *scale = work[0];
  moments<false>(x, padding, nullptr, mean, var);
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c) scale[c] = inverse_std(var[c], options) * w[c];
  scale_tokens<false, true>(x, padding, scale, b.data(), mean, writable<T>(out.y), nullptr);
  const auto finite = [&] {
    return all_finite(mean, channels, state.running_mean) &&
           all_finite(var, channels, state.running_mean);
  };
  if (!is_replay && is_usable(n, finite(), state.num_rejected)) {
    const double count = static_cast<double>(n);
    const double unbiased = options.regularization ? 1 : count / std::max(count - 1, 1.0);
    average(state.running_mean, mean, options.momentum);
    average(state.running_var, var, options.momentum, unbiased);
    count_step(state.step);
  }
  if (options.regularization) {
    const Values<A> running_mean(state.running_mean), running_var(state.running_var);
    std::copy_n(running_mean.data(), channels, kept[2]);
    std::copy_n(running_var.data(), channels, kept[3]);
    A of_mean = 0, of_var = 0;
    for (int64_t c = 0; c < channels; ++c) {
      of_mean += (kept[2][c] - mean[c]) * (kept[2][c] - mean[c]);
      of_var += std::abs(kept[3][c] - var[c]);
    }
    const A penalty = static_cast<A>(options.regularization->penalty_mean) * of_mean +
                      static_cast<A>(options.regularization->penalty_var) * of_var;
    out.penalty = allocate({}, scalar_type<A>());
    *writable<A>(out.penalty) = n > 0 ? penalty : 0;
    out.mean = make(mean, channels, scalar_type<A>());
    record(of_x, weight, bias, {&out.y, &out.penalty},
           Standardize<T>{options, std::move(padding), std::move(kept)});
  } else {
    record(of_x, weight, bias, {&out.y},
           Standardize<T>{options, std::move(padding), std::move(kept)});
  }
  return out;
}

Outputs dispatch(const Tensor& x, const std::optional<Tensor>& mask, const Tensor& weight,
                 const Tensor& bias, const State& state, const Options& options, bool is_replay) {
  check(x, {&weight, &bias, &state.running_mean, &state.running_var},
        {&state.step, &state.num_rejected});
  return by_type(x, [&](auto* null) {
    return forward<std::remove_pointer_t<decltype(null)>>(x, mask, weight, bias, state, options,
                                                          is_replay);
  });
}

// One step of BN. Returns y.
Tensor batch(const Tensor& x, const std::optional<Tensor>& mask, const Tensor& weight,
             const Tensor& bias, const Tensor& running_mean, const Tensor& running_var,
             const Tensor& step, const Tensor& num_rejected, bool is_replay, double eps,
             double momentum) {
  return dispatch(x, mask, weight, bias, {running_mean, running_var, step, num_rejected},
                  {eps, momentum, std::nullopt}, is_replay)
      .y;
}

// One step of regularized BN. Returns y; the penalty, a scalar, from the running values after this
// step; the batch's mean (C,), by which a forward that repeats this one is recognised. A repeated
// forward passes the running values that the first one had in the end.
std::tuple<Tensor, Tensor, Tensor> regularized_batch(
    const Tensor& x, const std::optional<Tensor>& mask, const Tensor& weight, const Tensor& bias,
    const Tensor& running_mean, const Tensor& running_var, const Tensor& step,
    const Tensor& num_rejected, bool is_replay, double eps, double momentum, double penalty_mean,
    double penalty_var) {
  const auto out = dispatch(x, mask, weight, bias, {running_mean, running_var, step, num_rejected},
                            {eps, momentum, Regularization{penalty_mean, penalty_var}}, is_replay);
  return {out.y, out.penalty, out.mean};
}

TORCH_LIBRARY_FRAGMENT(normexp, library) {
  library.def(
      "batch(Tensor x, Tensor? mask, Tensor weight, Tensor bias, Tensor(a!) running_mean, "
      "Tensor(b!) running_var, Tensor(c!) step, Tensor(d!) num_rejected, bool is_replay, "
      "float eps, float momentum) -> Tensor",
      batch);
  library.def(
      "regularized_batch(Tensor x, Tensor? mask, Tensor weight, Tensor bias, "
      "Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!) step, Tensor(d!) num_rejected, "
      "bool is_replay, float eps, float momentum, float penalty_mean, float penalty_var) -> "
      "(Tensor, Tensor, Tensor)",
      regularized_batch);
}

}  // namespace
}  // namespace normexp
